// A network for Python, which can only wait: real TCP connections to a server on this machine,
// used synchronously. A worker holds the connection; this thread sleeps until it answers.
//
// It hands out what arrives in pieces of its own choice, and can break: the ways in which a real
// network disturbs a reader, on demand and always the same.
import type { Command } from "./link-worker.ts";

export interface Weather {
  /** The size of the next piece; `total` bytes of this response were handed out before. */
  piece?: (total: number) => number;
  /** After that many bytes of a response the connection ends. */
  cutAfter?: number;
  /** After that many bytes of a response nothing comes any more. */
  silentAfter?: number;
  /** Seconds until the next piece comes; `total` as above. */
  late?: (total: number) => number;
  /** That many connections are not even refused. */
  deaf?: number;
  /** Only for requests whose first line matches; all without it. */
  only?: RegExp;
  /** Changes the bytes of a response on the way. */
  spoil?: (bytes: Uint8Array, total: number) => Uint8Array;
  /** Sees a response whole, before any of it is handed out, and may change it. */
  answer?: (bytes: Uint8Array) => Uint8Array;
}

export class Link {
  weather: Weather = {};
  /** Changes a request on the way; the head comes whole. */
  rewrite?: ((request: string) => string) | undefined;
  /** The first line of every request. */
  readonly requests: string[] = [];
  #worker = new Worker(new URL("./link-worker.ts", import.meta.url).href);
  #state: Int32Array;
  #data: Uint8Array;
  #inbox: Uint8Array = new Uint8Array(0);
  #total = 0;
  #late: number | undefined;
  #head = "";
  #line = "";

  constructor(public port: number) {
    const memory = new SharedArrayBuffer(8 + 65536);
    this.#state = new Int32Array(memory, 0, 2);
    this.#data = new Uint8Array(memory, 8);
    this.#ask({ do: "start", memory });
  }

  #ask(command: Command): number {
    Atomics.store(this.#state, 0, 0);
    this.#worker.postMessage(command);
    if (Atomics.wait(this.#state, 0, 0, 120_000) === "timed-out") {
      throw new Error(`the network does not answer: ${command.do}`);
    }
    return this.#state[1]!;
  }

  /** Does nobody answer this time? */
  deaf(): boolean {
    const left = this.weather.deaf ?? 0;
    if (left > 0) this.weather.deaf = left - 1;
    return left > 0;
  }

  #now(): Weather {
    return !this.weather.only || this.weather.only.test(this.#line) ? this.weather : {};
  }

  /** How many seconds the next piece still needs. */
  late(): number {
    const { late, silentAfter = Infinity } = this.#now();
    if (this.#total >= silentAfter) return Infinity;
    this.#late ??= late?.(this.#total) ?? 0;
    return this.#late;
  }

  /** The reader has waited that many seconds. */
  waited(seconds: number): void {
    this.#late = (this.#late ?? 0) - seconds;
  }

  /** Opens a connection; false if nobody listens. */
  open(): boolean {
    this.#inbox = new Uint8Array(0);
    this.#total = 0;
    this.#late = undefined;
    this.#head = this.#line = "";
    return this.#ask({ do: "open", port: this.port }) === 0;
  }

  /** TLS from here on; false unless the server has a certificate of this authority for the name. */
  secure(host: string, ca: Uint8Array): boolean {
    const pem = `-----BEGIN CERTIFICATE-----\n${Buffer.from(ca).toString("base64")}\n-----END CERTIFICATE-----\n`;
    return this.#ask({ do: "secure", host, ca: pem }) === 0;
  }

  send(bytes: Uint8Array): void {
    this.#head += new TextDecoder().decode(bytes);
    if (!this.#head.endsWith("\r\n\r\n")) return;
    this.#line = this.#head.split("\r\n")[0]!;
    this.requests.push(this.#line);
    const head = this.rewrite?.(this.#head) ?? this.#head;
    this.#ask({ do: "send", bytes: new TextEncoder().encode(head) });
    this.#head = "";
  }

  #next(): Uint8Array {
    const size = this.#ask({ do: "receive" });
    return new Uint8Array(this.#data.subarray(0, size));
  }

  /** The next piece, empty at the end of the connection. */
  receive(): Uint8Array {
    const weather = this.#now();
    const cut = weather.cutAfter ?? Infinity;
    const silent = weather.silentAfter ?? Infinity;
    this.#late = undefined;
    if (this.#total >= cut) return new Uint8Array(0);
    if (this.#inbox.length === 0) this.#inbox = this.#next();
    if (weather.answer && this.#total === 0) {
      const all = [this.#inbox];
      while (all.at(-1)!.length > 0) all.push(this.#next());
      this.#inbox = weather.answer(new Uint8Array(Buffer.concat(all)));
    }
    const size = Math.min(
      weather.piece?.(this.#total) ?? 512,
      cut - this.#total,
      silent - this.#total,
    );
    let piece: Uint8Array = this.#inbox.slice(0, size);
    this.#inbox = this.#inbox.slice(piece.length);
    if (weather.spoil && piece.length > 0) piece = weather.spoil(piece, this.#total);
    this.#total += piece.length;
    return piece;
  }

  close(): void {
    this.#ask({ do: "close" });
  }

  stop(): void {
    this.#worker.terminate();
  }
}
