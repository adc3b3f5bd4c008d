/** What stands between a device and a server in the field: bad lines, caches, disks that fail. */

import { connect, createServer, type AddressInfo, type Socket } from "node:net";
import { constants } from "node:os";
import { fileSystem, type Disk } from "../../ota.ts";

/** A line that breaks: one connection after another passes so many bytes, and then no more. */
export class Line implements AsyncDisposable {
  readonly #server = createServer((client) => this.#carry(client));
  readonly #open = new Set<Socket>();

  /** @param breaks after how many bytes of an answer each connection breaks; later ones hold */
  private constructor(
    private readonly target: number,
    private readonly breaks: number[],
  ) {}

  static async start(url: string, breaks: number[]): Promise<Line> {
    const line = new Line(Number(new URL(url).port), breaks);
    await new Promise<void>((done) => line.#server.listen(0, "127.0.0.1", done));
    return line;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  #carry(client: Socket): void {
    const server = connect(this.target, "127.0.0.1");
    let left = this.breaks.shift() ?? Infinity;
    for (const [one, other] of [[client, server] as const, [server, client] as const]) {
      this.#open.add(one);
      one.on("close", () => this.#open.delete(one) && other.destroy());
      one.on("error", () => other.destroy());
    }
    client.pipe(server, { end: false });
    server.on("data", (piece: Uint8Array) => {
      client.write(left < piece.length ? piece.subarray(0, left) : piece);
      left -= piece.length;
      if (left <= 0) client.end();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#open) socket.destroy();
    this.#server.close();
  }
}

/** A cache in front of a server, as a CDN is: it keeps content, whatever becomes of it behind. */
export class Cache implements AsyncDisposable {
  readonly #kept = new Map<string, { body: Uint8Array; init: ResponseInit }>();
  readonly #server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: (asked) => this.#get(asked),
  });

  constructor(private readonly origin: () => string) {}

  get url(): string {
    return this.#server.url.origin;
  }

  /** A minute passes: nothing may be kept for longer. */
  expire(): void {
    this.#kept.clear();
  }

  async #get({ url, headers }: Request): Promise<Response> {
    const { pathname, search } = new URL(url);
    const vary = ["accept-encoding", "available-dictionary", "range", "if-range"];
    const key = [pathname + search, ...vary.map((name) => headers.get(name))].join("\n");
    const kept = this.#kept.get(key);
    if (kept) return new Response(kept.body, kept.init);
    const target = this.origin() + pathname + search;
    const answer = await fetch(target, { headers, decompress: false });
    const made = {
      body: await answer.bytes(),
      init: { status: answer.status, headers: answer.headers },
    };
    const mayKeep = answer.status === 200 && answer.headers.get("cache-control") !== "no-store";
    if (mayKeep) this.#kept.set(key, made);
    return new Response(made.body, made.init);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server.stop(true);
  }
}

/** What happens to a disk: at its n-th operation it fails, or the process is killed. */
export interface Trouble {
  at: number;
  kind: "kill" | "ENOSPC" | "EIO";
}

/** Operations that a full disk refuses. */
const GROWING = new Set<string>(["write", "append", "link", "copy", "mkdir"]);

/** The disk of a device when it is in trouble. Once it is killed, nothing reaches the disk. */
export function troubled(root: string, { at, kind }: Trouble): Disk {
  const real = fileSystem(root);
  let count = 0;
  const trouble = (name: keyof Disk, args: unknown[]): unknown => {
    const call = (...args: unknown[]): unknown => Reflect.apply(real[name], real, args);
    if (kind !== "ENOSPC" || GROWING.has(name)) count++;
    const isHit =
      kind === "EIO"
        ? count === at
        : kind === "kill"
          ? count >= at
          : count >= at && GROWING.has(name);
    if (!isHit) return call(...args);
    const [path, data] = args;
    // What is written may be there in part.
    if (count === at && data instanceof Uint8Array) call(path, data.subarray(0, data.length / 2));
    const code = kind === "kill" ? "EIO" : kind;
    const errno = constants.errno[code];
    const error = new Error(`${code}: ${name} '${String(path)}' (${kind})`);
    throw Object.assign(error, { code, errno });
  };
  return new Proxy<Disk>(real, {
    get:
      (_, name) =>
      (...args: unknown[]) =>
        trouble(name as keyof Disk, args),
  });
}

/** Runs a task while pauses pass twenty times as fast; a timeout of 30 s stays one. */
export async function hurried<T>(task: () => Promise<T>): Promise<T> {
  const real = globalThis.setTimeout;
  const fast = (run: () => void, ms = 0) => real(run, ms < 10_000 ? ms / 20 : ms);
  Object.assign(globalThis, { setTimeout: fast });
  try {
    return await task();
  } finally {
    Object.assign(globalThis, { setTimeout: real });
  }
}
