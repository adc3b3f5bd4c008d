// The network side of link.ts: real TCP connections in a thread of their own, one at a time.
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

export type Command =
  | { do: "start"; memory: SharedArrayBuffer }
  | { do: "open"; port: number }
  | { do: "send"; bytes: Uint8Array }
  | { do: "receive" }
  | { do: "close" };

self.onmessage = ({ data: command }: MessageEvent<Command>) => {
  switch (command.do) {
    case "start":
      state = new Int32Array(command.memory, 0, 2);
      data = new Uint8Array(command.memory, 8);
      return reply(0);
    case "open":
      inbox = [];
      ended = false;
      // (At a close, the `connect` of node:net may lose the last of what came.)
      void Bun.connect({
        hostname: "127.0.0.1",
        port: command.port,
        socket: {
          open: (mine) => {
            socket = mine;
            reply(0);
          },
          data: (mine, bytes) => {
            if (socket !== mine) return;
            inbox.push(Uint8Array.from(bytes));
            wake();
          },
          end: over,
          close: over,
          connectError: () => reply(-1),
        },
      }).catch(() => {});
      return;
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
