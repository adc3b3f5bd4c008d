#!/usr/bin/env bun
/**
 * An update over LoRa itself: datagrams of at most 200 bytes, some of which are lost, come twice or
 * in another order. What `WiFiOTA` is in Pycom's OTA tutorial, for a radio: a transport is a
 * subclass of `OTA` with `connect` and `getData`.
 *
 *     bun examples/lora-transport.ts                       # a clean channel
 *     bun examples/lora-transport.ts --loss 0.2 --seed 7   # every fifth message is lost
 *
 * The radio is UDP on this machine, with a channel in between that does the losing. It takes a
 * meter from examples/smart-meter/1.0.0 to 1.0.1, and counts messages.
 *
 *     LoraOTA  ──datagrams──  LossyChannel  ──datagrams──  Gateway  ──HTTP──  serve
 *
 * @module
 */

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as zlib from "node:zlib";
import {
  type TransferResponse,
  DirectoryOTA,
  type Encoding,
  HttpOTA,
  OTA,
  OTAError,
  type OTAOptions,
  type Outcome,
  serve,
  SIGNATURE_HEADER,
  TransferError,
  type TransferRequest,
} from "../ota.ts";

// ──── Protocol ──────────────────────────────────────────────────────────────────────────────────
// Every datagram begins with seven bytes, numbers big-endian:
//
//            0     1 2   3 4     5        6       7 …
//     ASK    1     id    round   index    count   one fragment of a request
//     MORE   2     id    round   first            one bit a fragment, from `first` on: 1, it is here
//     REPLY  3     id    index   count            one fragment of the reply
//
// The device asks; the gateway answers and never speaks first. To a whole ASK it sends the first 64
// fragments of the reply. From then on the device alone knows what is missing: when it has all 64,
// or has heard nothing for a while, it sends one MORE, and gets what that has no 1 for among the 64
// from `first` on. While nothing of the reply has come, it sends ASK again. Nothing else is
// acknowledged: a reply that fits in 64 fragments costs one message up when none is lost.
//
// Each ASK and MORE has a higher `round` than those before it. The gateway answers a round once and
// none that is older, so a datagram that comes twice or late makes it send nothing.

/** The most bytes of a datagram. */
export const MAX_DATAGRAM = 200;

const ASK = 1;
const MORE = 2;
const REPLY = 3;
const HEADER = 7;
const FRAGMENT = MAX_DATAGRAM - HEADER;
/** Fragments that are sent for one round. */
const WINDOW = 64;
/** Fragments are counted in two bytes, those of a request in one. */
const MAX_REPLY = 0xffff * FRAGMENT;
const MAX_REQUEST = 0xff * FRAGMENT;

interface Datagram {
  kind: number;
  id: number;
  /** Bytes 3 and 4, and 5 and 6. */
  a: number;
  b: number;
  rest: Uint8Array;
}

function pack(kind: number, id: number, a: number, b: number, rest: Uint8Array): Uint8Array {
  const header = Buffer.alloc(HEADER);
  header.writeUInt8(kind, 0);
  header.writeUInt16BE(id, 1);
  header.writeUInt16BE(a, 3);
  header.writeUInt16BE(b, 5);
  return Buffer.concat([header, rest]);
}

/** @returns `undefined` for what is no datagram of ours */
function unpack(bytes: Buffer): Datagram | undefined {
  if (bytes.length < HEADER || bytes.length > MAX_DATAGRAM) return undefined;
  return {
    kind: bytes.readUInt8(0),
    id: bytes.readUInt16BE(1),
    a: bytes.readUInt16BE(3),
    b: bytes.readUInt16BE(5),
    rest: bytes.subarray(HEADER),
  };
}

function fragments(bytes: Uint8Array): number {
  return Math.max(1, Math.ceil(bytes.byteLength / FRAGMENT));
}

function fragment(bytes: Uint8Array, index: number): Uint8Array {
  return bytes.subarray(index * FRAGMENT, (index + 1) * FRAGMENT);
}

function hasBit(bits: Uint8Array, at: number): boolean {
  return (((bits[at >> 3] ?? 0) >> (at & 7)) & 1) === 1;
}

/** Which of the 64 fragments from `first` on are here; zeros at the end are not sent. */
function bitsOf(here: Iterable<number>, first: number): Uint8Array {
  const bits = new Uint8Array(WINDOW / 8);
  for (const index of here) bits[(index - first) >> 3]! |= 1 << ((index - first) & 7);
  return bits.subarray(0, bits.findLastIndex((byte) => byte > 0) + 1);
}

// ── What requests and replies say ──

/** What is asked for: `TransferRequest` without its signal, and the path. */
type Request = Omit<TransferRequest, "signal"> & { path: string };

/** What most requests are made of, as a dictionary for deflate: both ends must have the same. */
const COMMON = Buffer.from(
  "-/flash/lib/.py/sd/firmware_.bin ota-patch+br,dcz,br,zstd,gzip 0123456789abcdef" +
    "/manifest.json?current_ver=1.0.0&firmware_ver=1.0.0&hash=sha256&devid=&base=&brief=1 ota-patch+br,dcz,br,zstd,gzip",
);

/** The name of a coding (`ota-patch, br`) without spaces and commas, and back. */
const packName = (name: Encoding) => name.replace(", ", "+");
const unpackName = (text: string) => text.replace("+", ", ") as Encoding;

/** `path codings dictionary offset etag`, `-` for none, and small enough for one datagram. */
function packRequest({ path, accept = [], dictionary, offset = 0, etag }: Request): Uint8Array {
  const hex = dictionary && Buffer.from(dictionary).toString("hex");
  const resume = offset > 0 && etag !== undefined ? [offset, etag] : [];
  const fields = [path, accept.map(packName).join(",") || "-", hex ?? "-", ...resume];
  return zlib.deflateRawSync(fields.join(" "), { dictionary: COMMON, level: 9 });
}

/** @throws {Error} when that is no request */
function unpackRequest(bytes: Uint8Array): Request {
  const options = { dictionary: COMMON, maxOutputLength: 16 * 1024 };
  const text = zlib.inflateRawSync(bytes, options).toString();
  const [path = "", accept = "-", dictionary = "-", offset = "0", etag] = text.split(" ");
  if (!path.startsWith("/")) throw new Error("the path begins with no slash");
  return {
    path,
    ...(accept !== "-" && { accept: accept.split(",").map(unpackName) }),
    ...(dictionary !== "-" && { dictionary: Buffer.from(dictionary, "hex") }),
    ...(etag !== undefined && { offset: Number(offset), etag }),
  };
}

/** A line `coding offset total etag signature`, `-` for none, in front of the body. */
function packReply(data: Omit<TransferResponse, "body">, body: Uint8Array): Uint8Array {
  const { encoding, offset, total = offset + body.byteLength, etag = "-", headers } = data;
  const head = (tag: string) => {
    return `${packName(encoding)} ${offset} ${total} ${tag} ${headers.get(SIGNATURE_HEADER) ?? "-"}\n`;
  };
  // A tag is there to resume with: where all fits in one message, it would only make it two.
  const isShort = head("-").length + body.byteLength <= FRAGMENT;
  const tag = isShort || /\s/.test(etag) ? "-" : etag;
  return Buffer.concat([Buffer.from(head(tag)), body]);
}

/** Why there is no body: `! again pause message`. */
function packFailure(error: unknown): Uint8Array {
  const { retry, pause } =
    error instanceof TransferError ? error : new TransferError(String(error), true);
  const message = error instanceof Error ? error.message : String(error);
  return Buffer.from(`! ${Number(retry)} ${pause} ${message.replaceAll("\n", " ")}\n`);
}

/** @throws {TransferError} the gateway's, or that this is no head */
function unpackHead(line: string): Omit<TransferResponse, "body"> {
  const failure = /^! ([01]) ([0-9.]+) (.*)$/.exec(line);
  if (failure) throw new TransferError(failure[3]!, failure[1] === "1", Number(failure[2]));
  const fields = /^([a-z+-]+) (\d+) (\d+) (\S+) (\S+)$/.exec(line);
  if (!fields) throw new TransferError(`the gateway's reply begins with ${line}`, true);
  const [, encoding, offset, total, etag, signature] = fields;
  return {
    encoding: unpackName(encoding!),
    offset: Number(offset),
    total: Number(total),
    ...(etag !== "-" && { etag }),
    headers: new Headers(signature === "-" ? [] : [[SIGNATURE_HEADER, signature!]]),
  };
}

// ──── Gateway ───────────────────────────────────────────────────────────────────────────────────
// The far end. It has no timers and keeps nothing of a device but its latest exchanges, so that
// what was lost of a reply can be sent again.

/** Where a gateway has its content from: another transport. */
export type Source = Pick<OTA, "getData">;

/** A request and its reply. */
interface Exchange {
  /** The latest round that was answered. */
  round: number;
  /** Fragments of the request, by their index. */
  request: Map<number, Uint8Array>;
  isAsked: boolean;
  reply?: Uint8Array;
}

/** Exchanges that are kept, of all devices; those that were not used for longest go. */
const MAX_EXCHANGES = 64;
/** Seconds in which the source must have answered. */
const SOURCE_TIMEOUT = 60;

/** Answers devices that are reached by datagrams, with what another transport gets. */
export class Gateway implements Disposable {
  readonly #source: Source;
  readonly #exchanges = new Map<string, Exchange>();
  #socket: Bun.udp.Socket<"buffer"> | undefined;

  private constructor(source: Source) {
    this.#source = source;
  }

  /**
   * Starts to listen on this machine.
   *
   * @param source such as an `HttpOTA`, whose root is then of no account
   * @param port 0 picks a free one
   */
  static async start(source: Source, port = 0): Promise<Gateway> {
    const gateway = new Gateway(source);
    gateway.#socket = await Bun.udpSocket({
      hostname: "127.0.0.1",
      port,
      socket: {
        data: (socket, bytes, from, address) => {
          const send = (datagram: Uint8Array) => void socket.send(datagram, from, address);
          gateway.#take(unpack(bytes), `${address} ${from}`, send);
        },
        error() {},
      },
    });
    return gateway;
  }

  get port(): number {
    return this.#socket!.port;
  }

  [Symbol.dispose](): void {
    this.#socket?.close();
  }

  #take(datagram: Datagram | undefined, device: string, send: (one: Uint8Array) => void): void {
    if (datagram?.kind !== ASK && datagram?.kind !== MORE) return;
    const { kind, id, a: round, b, rest } = datagram;
    const key = `${device} ${id}`;
    const known = this.#exchanges.get(key);
    if (!known && kind === MORE) return;
    const exchange: Exchange = known ?? { round: 0, request: new Map(), isAsked: false };
    this.#exchanges.delete(key);
    this.#exchanges.set(key, exchange);
    if (this.#exchanges.size > MAX_EXCHANGES) {
      this.#exchanges.delete(this.#exchanges.keys().next().value!);
    }
    if (kind === ASK) exchange.request.set(b >> 8, rest);
    const isWhole = kind === MORE || exchange.request.size === (b & 0xff);
    if (!isWhole || round <= exchange.round) return;
    exchange.round = round;
    if (exchange.reply) {
      const [first, here] = kind === MORE ? [b, rest] : [0, new Uint8Array()];
      sendWindow(exchange.reply, id, first, here, send);
    } else if (kind === ASK && !exchange.isAsked) {
      exchange.isAsked = true;
      void this.#answer(exchange.request).then((reply) => {
        exchange.reply = reply;
        if (!this.#socket!.closed) sendWindow(reply, id, 0, new Uint8Array(), send);
      });
    }
  }

  /** The reply to a request, or why there is none. */
  async #answer(request: ReadonlyMap<number, Uint8Array>): Promise<Uint8Array> {
    try {
      const pieces = Array.from({ length: request.size }, (_, index) => request.get(index)!);
      const { path, ...want } = unpackRequest(Buffer.concat(pieces));
      const signal = AbortSignal.timeout(SOURCE_TIMEOUT * 1000);
      const data = await this.#source.getData(path, { ...want, signal });
      const body: Uint8Array[] = [];
      let size = 0;
      for await (const piece of data.body) {
        body.push(piece);
        size += piece.byteLength;
        if (size > MAX_REPLY - FRAGMENT) throw new TransferError(`${path} is too long`, false);
      }
      return packReply(data, Buffer.concat(body));
    } catch (error) {
      return packFailure(error);
    }
  }
}

/** Sends those of the 64 fragments from `first` on that are not `here` yet. */
function sendWindow(
  reply: Uint8Array,
  id: number,
  first: number,
  here: Uint8Array,
  send: (datagram: Uint8Array) => void,
): void {
  const count = fragments(reply);
  for (let index = first; index < Math.min(count, first + WINDOW); index++) {
    if (!hasBit(here, index - first)) send(pack(REPLY, id, index, count, fragment(reply, index)));
  }
}

// ──── Device ────────────────────────────────────────────────────────────────────────────────────
// The transport. `OTA` plans, verifies and decodes; what is here asks until all fragments are there
// and hands them on in order. When the radio falls silent in the middle, `OTA` has kept what came,
// and its next try begins behind that.

/** What `LoraOTA` needs beside the rest. */
export interface LoraOptions extends OTAOptions {
  /** Seconds of silence after which the device asks again; 0.25. On a real radio: some seconds. */
  wait?: number;
  /** How often in a row it asks in vain before it gives up; 20. */
  tries?: number;
  /** Asks for content as it is, without codings and deltas, to compare. */
  plain?: boolean;
}

/** A device that updates by datagrams of at most 200 bytes. */
export class LoraOTA extends OTA {
  protected override readonly isBrief: boolean;
  readonly #gateway: { address: string; port: number };
  readonly #wait: number;
  readonly #tries: number;
  readonly #plain: boolean;
  readonly #inboxes = new Map<number, Inbox>();
  #socket: Bun.udp.Socket<"buffer"> | undefined;
  #id = Math.floor(Math.random() * 0x10000);
  #hasHeard = false;

  /** @param gateway its IP address and port */
  constructor(gateway: { address: string; port: number }, options: LoraOptions) {
    const { wait = 0.25, tries = 20, plain = false } = options;
    // A radio says one thing at a time, and silence is ours to judge: OTA's patience is longer.
    super({ ...options, jobs: 1, timeout: 10 + 2 * wait * tries });
    this.#gateway = gateway;
    this.#wait = wait;
    this.#tries = tries;
    this.#plain = plain;
    this.isBrief = !plain;
  }

  override async connect(): Promise<void> {
    this.#socket?.close();
    this.#socket = await Bun.udpSocket({
      socket: { data: (_, bytes) => this.#take(unpack(bytes)), error() {} },
    });
  }

  /** As `OTA` has it; then the radio is switched off. */
  override async update(): Promise<Outcome> {
    try {
      return await super.update();
    } finally {
      this.#socket?.close();
    }
  }

  override async getData(
    url: string,
    { signal, ...want }: TransferRequest,
  ): Promise<TransferResponse> {
    const { pathname, search } = new URL(url, "http://gateway");
    const path = pathname + search;
    const request = packRequest(this.#plain ? { path } : { path, ...want });
    const pieces = this.#exchange(path, request, signal);
    const { line, rest } = await readLine(pieces);
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        if (rest.byteLength > 0) controller.enqueue(rest);
      },
      async pull(controller) {
        const { done, value } = await pieces.next();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      async cancel() {
        await pieces.return();
      },
    });
    return { ...unpackHead(line), body };
  }

  /**
   * Asks, and yields the fragments of the reply in order.
   *
   * @throws {TransferError} when nothing new came however often we asked
   */
  async *#exchange(
    path: string,
    request: Uint8Array,
    signal: AbortSignal,
  ): AsyncGenerator<Uint8Array, void> {
    if (request.byteLength > MAX_REQUEST) throw new TransferError(`too long: ${path}`, false);
    const id = (this.#id = (this.#id + 1) & 0xffff);
    const inbox = new Inbox();
    this.#inboxes.set(id, inbox);
    /** Fragments that came before their turn. */
    const early = new Map<number, Uint8Array>();
    let [next, count] = [0, 0];
    try {
      for (let round = 1, vain = 0; vain < this.#tries; round++) {
        if (count === 0) this.#ask(id, round, request);
        else this.#send(pack(MORE, id, round, next, bitsOf(early.keys(), next)));
        const end = next + WINDOW;
        vain++;
        for (;;) {
          const datagram = await inbox.take(this.#wait, signal);
          if (!datagram) break;
          const { a: index, b, rest } = datagram;
          if (index < next || index >= next + WINDOW || early.has(index)) continue;
          vain = 0;
          count = b;
          early.set(index, rest);
          for (let piece = early.get(next); piece; piece = early.get(next)) {
            early.delete(next++);
            yield piece;
          }
          if (next === count) return;
          if (next === end) break;
        }
      }
    } finally {
      this.#inboxes.delete(id);
    }
    const { address, port } = this.#gateway;
    const [times, seconds] = [this.#tries, (this.#tries * this.#wait).toFixed(1)];
    const silence =
      `the gateway at ${address}:${port} is silent: ` +
      `asked it ${times} times in ${seconds} s for ${path}`;
    // Who was never heard is not there, or not in reach: OTA need not try five times as often.
    const hint = this.#hasHeard ? "" : "; is it running, and in reach?";
    throw new TransferError(silence + hint, this.#hasHeard);
  }

  #ask(id: number, round: number, request: Uint8Array): void {
    const count = fragments(request);
    for (let index = 0; index < count; index++) {
      this.#send(pack(ASK, id, round, (index << 8) | count, fragment(request, index)));
    }
  }

  #send(datagram: Uint8Array): void {
    const { address, port } = this.#gateway;
    if (this.#socket && !this.#socket.closed) this.#socket.send(datagram, port, address);
  }

  #take(datagram: Datagram | undefined): void {
    if (datagram?.kind !== REPLY || datagram.a >= datagram.b) return;
    this.#hasHeard = true;
    this.#inboxes.get(datagram.id)?.put(datagram);
  }
}

/** Datagrams that wait to be looked at. */
class Inbox {
  readonly #waiting: Datagram[] = [];
  #wake = () => {};

  put(datagram: Datagram): void {
    this.#waiting.push(datagram);
    this.#wake();
  }

  /** The next one; `undefined` when none came for some seconds. */
  async take(seconds: number, signal: AbortSignal): Promise<Datagram | undefined> {
    signal.throwIfAborted();
    if (this.#waiting.length === 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#wake = resolve;
      const timer = setTimeout(resolve, seconds * 1000);
      signal.addEventListener("abort", this.#wake);
      await promise;
      clearTimeout(timer);
      signal.removeEventListener("abort", this.#wake);
      signal.throwIfAborted();
    }
    return this.#waiting.shift();
  }
}

/** Reads up to the first line's end. */
async function readLine(
  pieces: AsyncGenerator<Uint8Array, void>,
): Promise<{ line: string; rest: Uint8Array }> {
  let read = Buffer.alloc(0);
  for (;;) {
    const { done, value } = await pieces.next();
    if (done) throw new TransferError("the gateway's reply ended in its first line", true);
    read = Buffer.concat([read, value]);
    const end = read.indexOf("\n");
    if (end >= 0) return { line: read.toString("utf8", 0, end), rest: read.subarray(end + 1) };
  }
}

// ──── Channel ───────────────────────────────────────────────────────────────────────────────────
// The air between one device and a gateway, with what it does to datagrams, and a meter.

/** What a channel does to datagrams; probabilities from 0 to 1, of which 0 is the default. */
export interface ChannelOptions {
  /** A datagram is lost. */
  loss?: number;
  /** It comes twice. */
  twice?: number;
  /** It is overtaken by others. */
  late?: number;
  /** The same one makes the same choices for the n-th datagram of a direction; 1. */
  seed?: number;
}

/** What was sent in one direction, lost datagrams included. */
export interface Sent {
  messages: number;
  bytes: number;
  /** The longest datagram. */
  longest: number;
}

/** Milliseconds by which a datagram may be late. */
const LATE = 10;

/** Carries datagrams between a device and a gateway, not all of them, and counts them. */
export class LossyChannel implements Disposable {
  readonly up: Sent = { messages: 0, bytes: 0, longest: 0 };
  readonly down: Sent = { messages: 0, bytes: 0, longest: 0 };
  /** Nothing passes any more. */
  isDead = false;
  readonly #options: ChannelOptions;
  /** The end that the device talks to, and the one that talks to the gateway. */
  #near: Bun.udp.Socket<"buffer"> | undefined;
  #far: Bun.udp.Socket<"buffer"> | undefined;
  #devicePort = 0;

  private constructor(options: ChannelOptions) {
    this.#options = options;
  }

  /** Opens a channel to a gateway on this machine. */
  static async open(gatewayPort: number, options: ChannelOptions = {}): Promise<LossyChannel> {
    const channel = new LossyChannel(options);
    const { seed = 1 } = options;
    const [chanceUp, chanceDown] = [chances(seed), chances(~seed)];
    channel.#near = await Bun.udpSocket({
      hostname: "127.0.0.1",
      socket: {
        data: (_, bytes, from) => {
          channel.#devicePort = from;
          channel.#carry(bytes, channel.up, chanceUp, channel.#far!, gatewayPort);
        },
        error() {},
      },
    });
    channel.#far = await Bun.udpSocket({
      hostname: "127.0.0.1",
      socket: {
        data: (_, bytes) => {
          channel.#carry(bytes, channel.down, chanceDown, channel.#near!, channel.#devicePort);
        },
        error() {},
      },
    });
    return channel;
  }

  /** Where the device finds the gateway. */
  get gateway(): { address: string; port: number } {
    return { address: "127.0.0.1", port: this.#near!.port };
  }

  [Symbol.dispose](): void {
    this.#near?.close();
    this.#far?.close();
  }

  #carry(
    bytes: Buffer,
    sent: Sent,
    chance: (probability?: number) => boolean,
    socket: Bun.udp.Socket<"buffer">,
    port: number,
  ): void {
    sent.messages++;
    sent.bytes += bytes.byteLength;
    sent.longest = Math.max(sent.longest, bytes.byteLength);
    const { loss, twice, late } = this.#options;
    // Always three choices, so that one does not shift the others.
    const [isLost, comesTwice, isLate] = [chance(loss), chance(twice), chance(late)];
    const pass = () => void (socket.closed || this.isDead || socket.send(bytes, port, "127.0.0.1"));
    if (isLost) return;
    if (isLate) setTimeout(pass, LATE);
    else pass();
    if (comesTwice) setTimeout(pass, LATE / 2);
  }
}

/** Makes choices that the same seed repeats (mulberry32). */
function chances(seed: number): (probability?: number) => boolean {
  let state = seed >>> 0;
  return (probability = 0) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 < probability;
  };
}

// ──── Command line ──────────────────────────────────────────────────────────────────────────────

const RELEASES = join(import.meta.dir, "smart-meter");
const OLD = "1.0.0";

/** Makes a meter on the old release, as it leaves the workshop: installed from an SD card. */
async function makeMeter(root: string, card: string): Promise<void> {
  for (const name of [OLD, `firmware_${OLD}.bin`]) {
    fs.cpSync(join(RELEASES, name), join(card, name), { recursive: true });
  }
  fs.mkdirSync(root);
  await new DirectoryOTA(card, { root }).update();
}

/** What an update by datagrams took. */
export interface Measured {
  outcome: Outcome;
  up: Sent;
  down: Sent;
}

/**
 * Takes a new meter from the old release to the newest one.
 *
 * @param options of the channel, and of the device but its root
 * @throws {OTAError} when that failed
 */
export async function measure(
  options: ChannelOptions & Omit<LoraOptions, "root"> = {},
): Promise<Measured> {
  const scratch = fs.mkdtempSync(join(tmpdir(), "lora-transport-"));
  try {
    const root = join(scratch, "meter");
    await makeMeter(root, join(scratch, "card"));
    await using server = await serve({ root: RELEASES, host: "127.0.0.1", port: 0, quiet: 0 });
    using gateway = await Gateway.start(new HttpOTA(server.url, { root }));
    using channel = await LossyChannel.open(gateway.port, options);
    const outcome = await new LoraOTA(channel.gateway, { ...options, root }).update();
    return { outcome, up: channel.up, down: channel.down };
  } finally {
    fs.rmSync(scratch, { recursive: true });
  }
}

function tell(title: string, { up, down }: Measured): void {
  const columns = [up, down].map(({ messages, bytes }) => {
    return `${String(messages).padStart(4)} (${String(bytes).padStart(5)} bytes)`;
  });
  console.log(`  ${title.padEnd(32)} up ${columns[0]}   down ${columns[1]}`);
}

const USAGE = "usage: bun examples/lora-transport.ts [--loss 0…0.9] [--seed N]";

/** @throws {OTAError} when they are wrong */
function readArguments(): { loss: number; seed: number } {
  const loss = { type: "string", default: "0" } as const;
  const seed = { type: "string", default: "1" } as const;
  try {
    const { values } = parseArgs({ options: { loss, seed } });
    const found = { loss: Number(values.loss), seed: Number(values.seed) };
    if (found.loss >= 0 && found.loss <= 0.9 && Number.isInteger(found.seed)) return found;
  } catch {
    // Told below.
  }
  throw new OTAError(USAGE, 2);
}

async function main(): Promise<void> {
  const { loss, seed } = readArguments();
  const report: OTAOptions["report"] = (event) => {
    if (event.kind === "fetched") console.log(`  fetched ${event.path} (${event.size} bytes)`);
    if (event.kind === "note") console.log(`  ${event.text}`);
  };
  const percent = (part: number) => `${Math.round(part * 100)} %`;
  console.log(
    `An update by datagrams of at most ${MAX_DATAGRAM} bytes: ${percent(loss)} are lost, ` +
      `${percent(loss / 2)} come twice and ${percent(loss / 2)} late (seed ${seed}).`,
  );
  const channel = { loss, twice: loss / 2, late: loss / 2, seed };
  const measured = await measure({ ...channel, wait: 0.1, tries: 60, report });
  const { result, from, to, firmware } = measured.outcome;
  const image = firmware ? `, firmware ${firmware.from} -> ${firmware.to}` : "";
  console.log(`${result} ${from} -> ${to}${image}`);
  console.log("Messages:");
  tell("this update", measured);
  if (loss > 0) tell("the same, nothing lost", await measure());
  tell("plain, nothing lost", await measure({ plain: true }));
}

if (import.meta.main) {
  await main().catch((error: unknown) => {
    if (!(error instanceof OTAError)) throw error;
    console.error(error.message);
    process.exit(error.exitCode);
  });
}
