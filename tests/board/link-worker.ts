// The network side of link.ts: real TCP connections in a thread of their own, one at a time.
import { isIP } from "node:net";

declare const self: Worker;

let socket: Bun.Socket | undefined;
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

function over(mine: Bun.Socket): void {
  if (socket !== mine) return;
  ended = true;
  wake();
}

/** What hears of a connection. (At a close, the `connect` of node:net may lose the last bytes.) */
function listener(): Bun.SocketHandler {
  inbox = [];
  ended = false;
  return {
    data: (mine, bytes) => {
      if (socket !== mine) return;
      inbox.push(Uint8Array.from(bytes));
      wake();
    },
    end: over,
    close: over,
    connectError: () => reply(-1),
  };
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
      const open = (mine: Bun.Socket) => {
        socket = mine;
        reply(0);
      };
      const { port } = command;
      const socketOf = { ...listener(), open };
      void Bun.connect({ hostname: "127.0.0.1", port, socket: socketOf }).catch(() => {});
      return;
    }
    case "secure": {
      const { host, ca } = command;
      let isOpen = false;
      const handshake: Bun.SocketHandler["handshake"] = (mine, success, error) => {
        if (isOpen) return;
        isOpen = true;
        socket = mine as Bun.Socket;
        reply(success && !error ? 0 : -1);
      };
      const close = (mine: Bun.Socket) => {
        if (!isOpen) reply(-1);
        isOpen = true;
        over(mine);
      };
      const plain = socket!;
      socket = undefined;
      const tls = { ca, ...(isIP(host) ? {} : { serverName: host, servername: host }) };
      plain.upgradeTLS<undefined>({
        data: undefined,
        tls,
        socket: { ...listener(), handshake, close },
      });
      return;
    }
    case "send":
      socket?.write(command.bytes);
      return reply(0);
    case "receive":
      return receive();
    case "close": {
      const mine = socket;
      socket = undefined;
      mine?.terminate();
      return reply(0);
    }
  }
};
