/**
 * Readers that take their time, or nothing at all, and what a server holds in memory for them. What
 * lies in the kernel's buffers for sockets is not the server's, and not counted.
 */

import { randomBytes } from "node:crypto";
import { mebibytes, memoryOf, scratch, serve, table, type Effort } from "./harness.ts";
import { writeFiles } from "./trees.ts";

const MEBIBYTE = 2 ** 20;
/** Milliseconds between two portions of a slow reader. */
const TICK = 100;

/** Connections that each ask for one path. */
interface Crowd {
  what: string;
  /** What is in the root. */
  files: number;
  size: number;
  readers: number;
  /** Bytes a second that each takes. */
  speed: number;
  /** What they accept. */
  accept?: string;
}

const CROWDS: readonly Crowd[] = [
  {
    what: "60 readers at 200 KB/s of 60 files of 15 MiB",
    ...{ files: 60, size: 15 * MEBIBYTE, readers: 60, speed: 200_000 },
  },
  {
    what: "1,200 who do not read of 12 files of 15 MiB",
    ...{ files: 12, size: 15 * MEBIBYTE, readers: 1200, speed: 0 },
  },
  {
    what: "1,200 who do not read of 12 files of 3 MiB",
    ...{ files: 12, size: 3 * MEBIBYTE, readers: 1200, speed: 0 },
  },
  {
    what: "1,200 who do not read of 60 files of 3 MiB, zstd",
    ...{ files: 60, size: 3 * MEBIBYTE, readers: 1200, speed: 0, accept: "zstd" },
  },
  {
    what: "10,000 at 10 KB/s of one image of 1 MiB",
    ...{ files: 1, size: MEBIBYTE, readers: 10_000, speed: 10_000 },
  },
];

/** Content of which zstd leaves nine tenths, so that its coded form is another one to keep. */
function content(size: number): Uint8Array {
  const bytes = randomBytes(size);
  for (let at = 0; at < size; at += 1000) bytes.fill(65, at, at + 100);
  return bytes;
}

export async function benchSlow({ quick }: Effort): Promise<void> {
  const rows: string[][] = [];
  for (const [i, crowd] of CROWDS.entries()) {
    const root = scratch(`slow/${i}`);
    writeFiles(
      `${root}/1.0.1`,
      Array.from({ length: crowd.files }, (_, n) => [`f${n}`, content(crowd.size)] as const),
    );
    await using server = await serve(root);
    const before = memoryOf(server.pid).resident;
    await using readers = await Readers.open(server.port, crowd);
    await Bun.sleep(quick ? 3000 : 12_000);
    const { peak, resident } = memoryOf(server.pid);
    rows.push([
      crowd.what,
      mebibytes(before),
      mebibytes(resident),
      mebibytes(peak),
      `${readers.answered} of ${crowd.readers}`,
    ]);
  }
  table("Resident memory while clients are slow", ["", "idle", "then", "peak", "answered"], rows);
}

class Readers implements AsyncDisposable {
  readonly #sockets: Bun.Socket<{ left: number; got: number }>[] = [];
  #timer: Timer | undefined;

  /** Opens the connections, a few at a time. */
  static async open(port: number, crowd: Crowd): Promise<Readers> {
    const { readers, files, speed, accept } = crowd;
    const portion = (speed * TICK) / 1000;
    const all = new Readers();
    const coded = accept === undefined ? "" : `Accept-Encoding: ${accept}\r\n`;
    for (let n = 0; n < readers; n++) {
      const socket = await Bun.connect<{ left: number; got: number }>({
        hostname: "127.0.0.1",
        port,
        data: { left: portion, got: 0 },
        socket: {
          data(socket, data) {
            socket.data.got += data.byteLength;
            socket.data.left -= data.byteLength;
            if (socket.data.left <= 0) socket.pause();
          },
          error() {},
        },
      });
      socket.write(`GET /1.0.1/f${n % files} HTTP/1.1\r\nHost: a\r\n${coded}\r\n`);
      if (portion === 0) socket.pause();
      all.#sockets.push(socket);
    }
    if (portion > 0) all.#timer = setInterval(() => all.#feed(portion), TICK);
    return all;
  }

  /** How many have had something; who does not read cannot tell. */
  get answered(): number {
    return this.#sockets.filter(({ data, readyState }) => data.got > 0 || readyState === 1).length;
  }

  #feed(portion: number): void {
    for (const socket of this.#sockets) {
      socket.data.left = Math.min(socket.data.left + portion, portion);
      if (socket.data.left > 0) socket.resume();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#timer);
    for (const socket of this.#sockets) socket.terminate();
  }
}
