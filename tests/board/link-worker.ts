// The network side of link.ts: real TCP connections in a thread of their own, one at a time.
import { connect, isIP, type Socket } from "node:net";
import { connect as connectTLS } from "node:tls";

declare const self: Worker;

let socket: Socket | undefined;
/** What carries it, where it is TLS. */
let plain: Socket | undefined;
let inbox: Uint8Array[] = [];
let ended = false;
let waiting: (() => void) | undefined;
let state: Int32Array;
let data: Uint8Array;

function reply(status: number, bytes?: Uint8Array): void {
  if (bytes) data.set(bytes);
  Atomics.store(state, 1, status);
  Atomics.store(state, 0, 1);
  Atomics.notify(state, 0);
}

function receive(): void {
  const next = inbox.shift();
  if (next) {
    const now = next.subarray(0, data.length);
    if (next.length > now.length) inbox.unshift(next.subarray(now.length));
    reply(now.length, now);
  } else if (ended) reply(0);
  else waiting = receive;
}

function wake(): void {
  const then = waiting;
  waiting = undefined;
  then?.();
}

/** Answers when the connection stands, or cannot. */
function use(mine: Socket, ready: "connect" | "secureConnect"): void {
  inbox = [];
  ended = false;
  let open = false;
  socket = mine;
  mine.on(ready, () => {
    open = true;
    reply(0);
  });
  mine.on("data", (bytes: Uint8Array) => {
    if (socket !== mine) return;
    inbox.push(bytes);
    wake();
  });
  const fail = () => {
    if (!open && socket === mine) reply(-1);
    open = true;
  };
  mine.on("error", fail);
  mine.on("close", () => {
    fail();
    if (socket !== mine) return;
    ended = true;
    wake();
  });
}

export type Command =
  | { do: "start"; memory: SharedArrayBuffer }
  | { do: "open"; port: number }
  | { do: "secure"; host: string; ca: string }
  | { do: "send"; bytes: Uint8Array }
  | { do: "receive" }
  | { do: "close" };

self.onmessage = ({ data: command }: MessageEvent<Command>) => {
  switch (command.do) {
    case "start":
      state = new Int32Array(command.memory, 0, 2);
      data = new Uint8Array(command.memory, 8);
      return reply(0);
    case "open": {
      plain = connect(command.port, "127.0.0.1");
      return use(plain, "connect");
    }
    case "secure": {
      // What arrives from here on is for TLS.
      for (const event of ["data", "close"]) plain!.removeAllListeners(event);
      const { host, ca } = command;
      const name = isIP(host) ? {} : { servername: host };
      return use(connectTLS({ socket: plain!, ca, host, ...name }), "secureConnect");
    }
    case "send":
      socket?.write(command.bytes);
      return reply(0);
    case "receive":
      return receive();
    case "close":
      socket?.destroy();
      socket = undefined;
      return reply(0);
  }
};
