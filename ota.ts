#!/usr/bin/env bun
/**
 * ota.ts: both ends of an over-the-air (OTA) update, in one file.
 *
 *     bun ota.ts serve --root examples/smart-meter       # a directory of releases, over HTTP
 *     bun ota.ts client --ver 1.0.0 --root ./device      # a device that ends up on the newest one
 *     bun ota.ts --help
 *
 * The server works out what a device at version X needs to reach the latest release and answers
 * with a manifest: what to delete, add, change and flash. The device fetches, verifies, applies,
 * and goes back when the new release is bad. The wire format is the one of Pycom's OTA tutorial,
 * so boards with Pycom's MicroPython library are served as they are.
 *
 * The file is read from top to bottom, in the parts and sections of the contents below; each
 * section uses only what stands above it. Importing it has no side effects.
 *
 * @module
 */

// Contents
//
// I    Common: the words that both ends speak.
//      Errors and helpers · Event loop · Cache · JSON · Versions · Paths · Manifest
//      Reading manifests · Queries · Trust · Signed steps
// II   Codings: content made smaller for the air.
//      Patch format · Address fields · Instructions · Patch decoding · Matching
//      Address learning · Matched covers · Cheapest covers · Patch encoding · Patch threads
//      Codings · Negotiation · Inline content
// III  Release root: from a directory to what a device needs.
//      Snapshot · Hashing · Settling copies · Index · Signed releases · Models · Scan
//      Files beside releases · Decide · Compose · One root · Roots of models · Releases · Signing
//      Watch · Lint
// IV   Server: from that to bytes on a socket.
//      Encoding · Responses and headers · Log and metrics · Bodies in flight · File answers
//      Certificates and proxies · Request checks · Contents in manifests · Manifest answers
//      Request handling · Air costs · Listening
// V    Fleet: who is on what, and what happened to whom.
//      Device reports · Device records · Offers and failures · Windows · Fleet answers · Rollouts
//      Typed rollouts · Rollout rules · Rollout waves · Rollout ends · Store schema
//      Store opening · Store writes · Store limits · Forgetting · Store reads · Store lists
//      Fleet trends · Urgent devices · Rollout records · Eligible devices · Rollout commands
//      Rollout silence · Rollout progress · Rollout places · Merging · Rollout merging
//      Names and labels · Store batches · Fleet store · Store thread · Fleet options
//      Place lease · Admission · Fleet writer · Fleet questions · Fleet · Fleet words
//      Admin answers · Admin access · Fleet requests · Rollout words · Rollout API · Fleet API
//      Rollout notices · Staged versions
// VI   Page: what an operator looks at, and the server with all of it.
//      HTML templates · Page frame · Charts · Costs on the page · Fleet glance
//      Rollouts on the page · Rollout forms · Releases on the page · Fleet view · Device list
//      Device view · Style · Script · Page files · Form fields · Page views · Page requests
//      Serving
// VII  Device disk: files changed as one transaction.
//      Disk · Files · Preflight · Staging · State format · State files · Inventory
//      Change preparation · Apply and sync · Repairs · Transactions · Journal
// VIII Update: the workflow of a device.
//      Update options · Time-outs · Health check · Status · Target release · Plan and space
//      Receiving and retries · Download attempts · Fetching content · Verification
//      Manifest client · Device survey · Device
// IX   Transports: bytes from somewhere, and nothing else.
//      HTTP · Directory
// X    Command line: the way in.
//      Options · Reading options · Output · Costs · Server commands · Release commands
//      Device commands · Fleet tables · Fleet summary · Fleet commands · Rollout options
//      Rollout command · Commands · Help and main

import { Database } from "bun:sqlite";
import {
  createHmac,
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  randomBytes,
  sign,
  timingSafeEqual,
  verify,
  X509Certificate,
} from "node:crypto";
import * as fs from "node:fs";
import { BlockList, isIP } from "node:net";
import { setPriority, tmpdir } from "node:os";
import { basename, dirname, extname, relative, resolve } from "node:path";
import { parseArgs, promisify } from "node:util";
import * as threads from "node:worker_threads";
import * as zlib from "node:zlib";

/** The version of this tool, as `--version` prints it. */
export const TOOL_VERSION = "0.2.0";

// ════ I Common ═══════════════════════════════════════════════════════════════════════════════════
// What server and device share: versions and their order, the manifest, and signatures. What a
// manifest says is checked here, before anything uses it.

// ──── Errors and helpers ──────────────────────────────────────────────────────────────────────────
// Errors and small helpers. Anything thrown that is neither an `OTAError` nor a system error is a
// bug in this file.

/**
 * A failure that a person can do something about. Its message is shown as it is, without a stack.
 *
 * @param message one or two lines: what was expected, what was found, what to do
 * @param exitCode the process's exit code when this ends it: 1 failed, 2 usage, 3 bad release
 */
export class OTAError extends Error {
  override name = "OTAError";
  constructor(
    message: string,
    readonly exitCode: 1 | 2 | 3 = 1,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** `3 devices`, `1 device`. */
function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** The `code` of a system error (`"ENOENT"`), or `undefined` for anything else. */
function errorCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string"
    ? error.code
    : undefined;
}

/** Whether an error is a bug in this file: neither an `OTAError` nor a system error. */
function isBug(error: unknown): boolean {
  if (error instanceof OTAError) return false;
  const code = errorCode(error);
  // Node's argument errors have a code, too, but are bugs of the caller.
  return code === undefined || (error instanceof TypeError && code.startsWith("ERR_"));
}

/** Whether a system error means that a path does not exist. */
function isMissing(error: unknown): boolean {
  return saysMissing(errorCode(error));
}

/** `isMissing`, given only the error's code. */
function saysMissing(code: string | undefined): boolean {
  return code === "ENOENT" || code === "ENOTDIR";
}

/** The text of anything thrown. */
function errorText(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Lets failures of the system and of people pass, for `catch`. @throws what is a bug */
function refuseBugs(error: unknown): void {
  if (isBug(error)) throw error;
}

/** Does what may fail: a cleanup that the next run does again, a refinement. */
function ignoreErrors(task: () => void): void {
  try {
    task();
  } catch {
    // As the name says.
  }
}

/** Letters A to Z in lower case, as SQL's LOWER has them in both databases. */
function asciiLower(text: string): string {
  return text.replace(/[A-Z]/g, (letter) => letter.toLowerCase());
}

/** Text in UTF-8. */
const utf8 = (text: string) => new TextEncoder().encode(text);

/** The lowercase hex digest of bytes, or of text in UTF-8. */
function hexDigest(algorithm: "sha1" | "sha256", data: string | Uint8Array): string {
  return new Bun.CryptoHasher(algorithm).update(data).digest("hex");
}

const sha256 = (data: string | Uint8Array) => hexDigest("sha256", data);

/** The algorithm of a hash, by its number of hex digits. */
function algorithmOf(hash: string): "sha1" | "sha256" {
  return hash.length === 64 ? "sha256" : "sha1";
}

/** Parses an http(s) URL; `undefined` for anything else. */
function parseHttpURL(text: string): URL | undefined {
  const url = URL.parse(text);
  return url && /^https?:$/.test(url.protocol) ? url : undefined;
}

/** Formats a size: `812 B`, `4.1 KB`, `1.5 MB`. */
function formatBytes(bytes: number): string {
  if (bytes < 1000) return `${bytes} B`;
  const power = Math.min(Math.floor(Math.log10(bytes) / 3), 4);
  return `${(bytes / 1000 ** power).toFixed(1)} ${" KMGT"[power]}B`;
}

/** Whether text has control characters. */
function hasControls(text: string): boolean {
  return /[\u0000-\u001f\u007f-\u009f]/.test(text);
}

/**
 * Compares two strings by Unicode code point, which is also the order of their UTF-8 bytes. (`<`
 * compares UTF-16 units, and so puts U+1F600 before U+FFFD.)
 *
 * @returns negative, zero or positive, as for `Array.prototype.sort`
 */
export function compareCodePoints(a: string, b: string): number {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) {
    const x = a.charCodeAt(i);
    const y = b.charCodeAt(i);
    // Surrogates stand for code points above U+FFFF: lift them over U+E000 to U+FFFF.
    if (x !== y) return liftSurrogate(x) - liftSurrogate(y);
  }
  return a.length - b.length;
}

function liftSurrogate(unit: number): number {
  return unit < 0xd800 ? unit : unit < 0xe000 ? unit + 0x2000 : unit - 0x800;
}

const SECONDS = { "": 1, s: 1, m: 60, h: 3600, d: 86400 };

/** Reads `90`, `90s`, `10m`, `1h` or `365d` as seconds. */
function parseDuration(name: "every" | "expires" | "silent" | "soak", text: string): number {
  const [, amount, unit] = /^(\d+)(s|m|h|d|)$/.exec(text) ?? [];
  const seconds = Number(amount) * SECONDS[unit as keyof typeof SECONDS];
  if (seconds >= 1 && seconds <= 100 * 365 * SECONDS.d) return seconds;
  const examples = name === "expires" ? "365d or 12h" : "30s, 10m or 1h";
  throw new OTAError(`--${name} expects a duration such as ${examples}, found ${text || '""'}`, 2);
}

// ──── Event loop ──────────────────────────────────────────────────────────────────────────────────
// Long work must not keep the event loop from answering requests: it is done in slices, a few tasks at
// a time, and without data structures that block when they grow.

/** CPU time of this thread so far, in milliseconds. */
function cpuTime(): number {
  const { user, system } = process.threadCpuUsage();
  return (user + system) / 1000;
}

/** How long work may block the event loop, in milliseconds. */
const TURN = 8;

/**
 * Whether a worker can run this very file. Bundled into another program, this file is that program,
 * which must not be started again.
 */
const canRunWorkers = import.meta.main || import.meta.url.endsWith("/ota.ts");

/** Splits long work on the event loop into slices, so that requests are answered in between. */
class TimeSlicer {
  #since = performance.now();
  #cpu = cpuTime();
  /** CPU time of the work so far, without the pauses, in milliseconds. */
  busy = 0;

  /** Whether the current slice has used up its time. */
  get isDue(): boolean {
    return performance.now() - this.#since > TURN;
  }

  /** Yields to the event loop, or until a promise has settled. */
  async pause<T = void>(until: Promise<T> = new Promise(setImmediate)): Promise<T> {
    this.busy += cpuTime() - this.#cpu;
    try {
      return await until;
    } finally {
      this.#since = performance.now();
      this.#cpu = cpuTime();
    }
  }

  /** Calls `work` with each item, yielding in between. */
  async each<T>(items: Iterable<T>, work: (item: T) => void): Promise<void> {
    for (const item of items) {
      work(item);
      if (this.isDue) await this.pause();
    }
  }

  /** Merge sort that yields to the event loop; returns a new array. */
  async sort<T>(items: readonly T[], compare: (a: T, b: T) => number): Promise<T[]> {
    if (this.isDue) await this.pause();
    if (items.length <= 1000) return [...items].sort(compare);
    const half = items.length >> 1;
    const low = await this.sort(items.slice(0, half), compare);
    const high = await this.sort(items.slice(half), compare);
    const merged: T[] = [];
    for (let i = 0, j = 0; merged.length < items.length;) {
      const isLow = j === high.length || (i < half && compare(low[i]!, high[j]!) <= 0);
      merged.push(isLow ? low[i++]! : high[j++]!);
      if (this.isDue) await this.pause();
    }
    return merged;
  }
}

/** Entries in one of the maps that make up a `SortedMap`. */
const CHUNK = 4096;

/**
 * A map filled in the order of its keys, by code point. It is made of small maps: a single one of
 * 100,000 entries stops the event loop for 30 ms when it grows.
 */
export class SortedMap<V> {
  readonly #chunks: { first: string; map: Map<string, V> }[] = [];
  #size = 0;

  get size(): number {
    return this.#size;
  }

  /** Adds an entry; keys must be added in ascending order. */
  append(key: string, value: V): void {
    let last = this.#chunks.at(-1);
    if (!last || last.map.size >= CHUNK) {
      this.#chunks.push((last = { first: key, map: new Map() }));
    }
    last.map.set(key, value);
    this.#size++;
  }

  get(key: string): V | undefined {
    let [low, high] = [0, this.#chunks.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (compareCodePoints(this.#chunks[middle]!.first, key) <= 0) low = middle;
      else high = middle;
    }
    return this.#chunks[low]?.map.get(key);
  }

  has(key: string): boolean {
    return this.get(key) !== undefined;
  }

  *keys(): Generator<string> {
    for (const { map } of this.#chunks) yield* map.keys();
  }

  *values(): Generator<V> {
    for (const { map } of this.#chunks) yield* map.values();
  }

  *[Symbol.iterator](): Generator<[string, V]> {
    for (const { map } of this.#chunks) yield* map;
  }
}

/** Runs tasks, a few at a time; the others wait in order. */
class Pool {
  #running = 0;
  readonly #waiting: (() => void)[] = [];

  /** @param width tasks at a time */
  constructor(private readonly width: number) {}

  async run<T>(task: () => Promise<T>): Promise<T> {
    if (this.#running < this.width) this.#running++;
    else await new Promise<void>((go) => this.#waiting.push(go));
    try {
      return await task();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    }
  }

  /**
   * Runs a task for every item. The first failure stops it, and is thrown once the tasks that were
   * running have ended.
   *
   * @param task gets a signal that another one has failed
   */
  async each<T>(
    items: Iterable<T>,
    task: (item: T, failed: AbortSignal) => Promise<void>,
  ): Promise<void> {
    const failure = new AbortController();
    const runUnlessFailed = async (item: T) => {
      if (!failure.signal.aborted) await task(item, failure.signal);
    };
    const tasks = Array.from(items, (item) => this.run(() => runUnlessFailed(item)));
    await Promise.all(tasks.map((one) => one.catch((error) => failure.abort(error))));
    failure.signal.throwIfAborted();
  }
}

// ──── Cache ─────────────────────────────────────────────────────────────────────────────────────
// Bounded caches, and freeing their memory. Blobs and buffers lie outside the JavaScript heap,
// where Bun's garbage collector does not count them.

/** Overhead of a cache entry, in bytes. */
const ENTRY_COST = 512;

/** Values by key, up to a budget in bytes; the oldest goes first, unless it was used meanwhile. */
class Cache<T> {
  readonly #kept = new Map<string, { value: T; cost: number; used: boolean }>();
  #cost = 0;

  constructor(private readonly budget: number) {}

  get(key: string): T | undefined {
    const entry = this.#kept.get(key);
    if (entry) entry.used = true;
    return entry?.value;
  }

  /** @param size bytes of the value */
  set(key: string, value: T, size: number): void {
    this.#cost -= this.#kept.get(key)?.cost ?? 0;
    this.#kept.delete(key);
    const cost = size + key.length + ENTRY_COST;
    if (cost > this.budget) return;
    for (const [oldest, entry] of this.#kept) {
      if (this.#cost + cost <= this.budget) break;
      this.#kept.delete(oldest);
      // Second chance (CLOCK): used since it was last considered.
      if (entry.used) {
        this.#kept.set(oldest, { ...entry, used: false });
      } else {
        this.#cost -= entry.cost;
        discard(entry.cost);
      }
    }
    this.#kept.set(key, { value, cost, used: false });
    this.#cost += cost;
  }
}

/** Runs a task once for all callers that ask for it while it runs. */
class SingleFlight<T> {
  readonly #running = new Map<string, Promise<T>>();

  has(key: string): boolean {
    return this.#running.has(key);
  }

  /** @param task must not throw before its first `await` */
  run(key: string, task: () => Promise<T>): Promise<T> {
    let running = this.#running.get(key);
    if (running) return running;
    running = task().finally(() => this.#running.delete(key));
    this.#running.set(key, running);
    return running;
  }
}

/** Bytes of garbage outside the JavaScript heap that trigger a full collection. */
const MAX_GARBAGE = 16 * 1024 * 1024;
/** The minimum time between two full collections, in milliseconds: each blocks the event loop. */
const COLLECT_PAUSE = 1000;
let garbage = 0;
let collected = -Infinity;
let collecting: Timer | undefined;

/**
 * Reports that blobs or buffers of so many bytes have become garbage. The collector sees only a
 * small object for each, and would not free hundreds of MiB of them.
 */
function discard(bytes: number): void {
  garbage += bytes;
  if (garbage < MAX_GARBAGE || collecting) return;
  const wait = Math.max(0, collected + COLLECT_PAUSE - performance.now());
  collecting = setTimeout(() => {
    garbage = 0;
    collecting = undefined;
    Bun.gc(true);
    collected = performance.now();
  }, wait);
  collecting.unref();
}

/** Frees the memory of bytes that are no longer used, unless they are part of a larger buffer. */
function release({ buffer, byteLength }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer && buffer.byteLength === byteLength) buffer.transfer(0);
}

/** Moves bytes into a blob; they must not be used afterwards. */
function intoBlob(bytes: Uint8Array): Blob {
  const blob = new Blob([bytes as Uint8Array<ArrayBuffer>]);
  release(bytes);
  return blob;
}

// ──── JSON ────────────────────────────────────────────────────────────────────────────────────────
// Checks of JSON that others wrote: a server, an operator, an earlier version of this tool. Each
// names what is wrong.

/** Parses JSON; `undefined` when the text is not valid JSON. */
function parseJSON(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** JSON that is not what it should be: `new[0].size: not a byte count`. */
class FormatError extends OTAError {
  override name = "FormatError";
}

function malformed(found: string): never {
  throw new FormatError(found);
}

function asObject(value: unknown, name: string): Record<string, unknown> {
  return isObject(value) ? value : malformed(`${name}: not a JSON object`);
}

function asList<T>(value: unknown, name: string, item: (value: unknown, name: string) => T): T[] {
  if (!Array.isArray(value)) malformed(`${name}: not a list`);
  return value.map((one, i) => item(one, `${name}[${i}]`));
}

function asText(value: unknown, name: string): string {
  return typeof value === "string" ? value : malformed(`${name}: not a string`);
}

function asFlag(value: unknown, name: string): boolean {
  return typeof value === "boolean" ? value : malformed(`${name}: not a boolean`);
}

function asNumber(value: unknown, name: string): number {
  return typeof value === "number" ? value : malformed(`${name}: not a number`);
}

/** A number of bytes. */
function asSize(value: unknown, name: string): number {
  const isSize = Number.isSafeInteger(value) && (value as number) >= 0;
  return isSize ? (value as number) : malformed(`${name}: not a byte count`);
}

/** A digest in hex; lowercase in the result. */
function asDigest(value: unknown, name: string, digits: 40 | 64): string {
  const hex = asText(value, name).toLowerCase();
  const isHex = hex.length === digits && /^[0-9a-f]+$/.test(hex);
  return isHex ? hex : malformed(`${name}: not ${digits} hex digits`);
}

/** A SHA-256 in hex, or in base64, as brief manifests have it; lowercase hex in the result. */
function asSHA256(value: unknown, name: string): string {
  const text = asText(value, name);
  const bytes = Buffer.from(text, "base64");
  const isBase64 = bytes.byteLength === 32 && bytes.toString("base64") === text;
  return isBase64 ? bytes.toString("hex") : asDigest(text, name, 64);
}

/** What a check makes of JSON; `undefined` when that is malformed. */
function wellFormed<T>(as: (json: unknown) => T, json: unknown): T | undefined {
  try {
    return as(json);
  } catch (error) {
    if (error instanceof FormatError) return undefined;
    throw error;
  }
}

// ──── Versions ──────────────────────────────────────────────────────────────────────────────────
// How releases are ordered. The order is total: comparing whatever text a device sends as its
// version gives an answer, never an exception.

/**
 * A version number in the loose scheme of Python's `distutils.version.LooseVersion`: runs of
 * digits, runs of `a-z`, and whatever stands between them; dots only separate. A number sorts
 * before a string, as in Python 2 (Python 3 raises, which would let any device stop the server).
 *
 * @param text any text; `""` has no parts and is smaller than every other version
 *
 * @example
 * new LooseVersion("1.0.10").compare("1.0.9"); // positive
 * new LooseVersion("1.00.0").compare("1.0.0"); // 0
 */
export class LooseVersion {
  /** The text split into its parts: numbers of any size, and strings. */
  readonly parts: readonly (bigint | string)[];

  constructor(readonly text: string) {
    this.parts = text
      .split(/([0-9]+|[a-z]+|\.)/)
      .filter((part) => part !== "" && part !== ".")
      .map((part) => (/^[0-9]+$/.test(part) ? BigInt(part) : part));
  }

  /**
   * Compares part by part, then by length.
   *
   * @returns negative when this version is older than `other`, zero when equal, positive when newer
   */
  compare(other: LooseVersion | string): number {
    const theirs = typeof other === "string" ? new LooseVersion(other).parts : other.parts;
    const mine = this.parts;
    for (let i = 0; i < mine.length && i < theirs.length; i++) {
      const order = compareParts(mine[i]!, theirs[i]!);
      if (order !== 0) return order;
    }
    return mine.length - theirs.length;
  }

  /** The same text for equal versions, and for no others. */
  get key(): string {
    return JSON.stringify(this.parts, (_, part) => (typeof part === "bigint" ? `${part}` : part));
  }

  toString(): string {
    return this.text;
  }
}

function compareParts(a: bigint | string, b: bigint | string): number {
  if (typeof a === "string") return typeof b === "string" ? compareCodePoints(a, b) : 1;
  if (typeof b === "string") return -1;
  return a < b ? -1 : a > b ? 1 : 0;
}

/** What `isReleaseName` tests for, in words. */
const RELEASE_NAME_RULE =
  "a digit (after an optional v), then digits, letters and . + _ -, and no ending like .bak or .tmp";

/**
 * Whether `name` can be the name of a release: `[vV]?`, a digit, then any of `0-9A-Za-z.+_-`, and
 * not the ending of a backup or a temporary file.
 */
export function isReleaseName(name: string): boolean {
  return name.length <= 128 && /^[vV]?[0-9][0-9A-Za-z.+_-]*$/.test(name) && !PUT_ASIDE.test(name);
}

/** File endings of backups and temporary files. */
const PUT_ASIDE = /\.(bak|old|orig|tmp|part|swp)$/i;

/** The usual name of a firmware image. */
const imageName = (version: string) => `firmware_${version}.bin`;

/**
 * The VERSION in `firmware_VERSION.bin`, or `undefined` when `name` is not a firmware image's.
 * Pycom's OTA tutorial spells it `firmare_` once, so that counts too.
 */
export function firmwareVersion(name: string): string | undefined {
  const version = /^firmw?are_(.+)\.bin$/.exec(name)?.[1];
  return version !== undefined && isReleaseName(version) ? version : undefined;
}

// ──── Paths ───────────────────────────────────────────────────────────────────────────────────────
// Paths on a device come from the network, and must not lead out of its root. In URLs and queries
// they are percent-encoded.

/** The file in which a device keeps its version for its own code. No release contains it. */
export const VERSION_FILE = "flash/OTA_VERSION.py";
/** Where the updater keeps what is its own, below the device's root. */
export const OTA_DIR = ".ota";
/** A path with more parts than this is refused. */
const MAX_PARTS = 32;
/** Characters that HFS+ ignores in names. */
const INVISIBLE = /[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]/g;
/**
 * Says what is wrong with a path below a device's root, or `undefined` when nothing is. A good
 * path is relative and normal, stays below the root on every file system, and does not enter
 * `.ota` in any spelling.
 */
export function pathProblem(path: string): string | undefined {
  if (path === "") return "is empty";
  // Lone surrogates would all become U+FFFD on disk.
  if (!path.isWellFormed()) return "has half a surrogate pair";
  if (hasControls(path)) return "has a control character";
  if (path.includes("\\")) return "has a backslash";
  if (Buffer.byteLength(path) > 1024) return "is longer than 1024 bytes";
  const parts = path.split("/");
  for (const part of parts) {
    if (part === "") return "has an empty part";
    if (part === "." || part === "..") return `has a part "${part}"`;
    if (Buffer.byteLength(part) > 255) return "has a part longer than 255 bytes";
  }
  if (parts.length > MAX_PARTS) return `has more than ${MAX_PARTS} parts`;
  // FAT and macOS know no case; FAT drops trailing dots and spaces, and has short names (OTA~1);
  // macOS drops what has no width.
  const top = parts[0]!
    .toLowerCase()
    .replace(INVISIBLE, "")
    .replace(/[. ]+$/, "");
  if (top === OTA_DIR || /^ota~\d/.test(top)) return `enters ${OTA_DIR}`;
  return undefined;
}

/** The paths above `path`, nearest first: `a/b/c` has `a/b` and `a`. */
export function ancestors(path: string): string[] {
  const found = [];
  for (let at = path.lastIndexOf("/"); at > 0; at = path.lastIndexOf("/", at - 1)) {
    found.push(path.slice(0, at));
  }
  return found;
}

/**
 * Decodes `%xx` and leaves what cannot be decoded as it is. A `+` stays a `+`, unlike in
 * `URLSearchParams`: release names have them, and boards do not encode.
 */
function percentDecode(text: string): string {
  if (!text.includes("%")) return text;
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** A path for a URL: every part percent-encoded, the slashes kept. */
function encodePath(path: string): string {
  return path.split("/").map(encodeURIComponent).join("/");
}

// ──── Manifest ──────────────────────────────────────────────────────────────────────────────────
// The wire format, and the only place where foreign JSON becomes ours. What `parseManifest` lets
// through cannot name a path outside the device's root, nor the updater's own files.

/** Content that a manifest carries itself; only when asked for with `brief=1`. */
export interface InlineContent {
  /** The content, where it is text. */
  text?: string;
  /** Otherwise base64 of the content, coded as `coding` says. */
  content?: string;
  /** A content coding, see `toInline`; absent: none. */
  coding?: string;
}

/** One file to fetch. Field names and their order are the wire's. */
export interface ManifestEntry extends InlineContent {
  /**
   * Where to fetch it: absolute http(s), path parts percent-encoded. A path where `brief=1` left it
   * out: it is then looked for below the server's address.
   */
  URL: string;
  /** Where it goes on the device, with a leading slash: `/flash/main.py`. */
  dst_path: string;
  /** SHA-1 of the content, lowercase hex; with `brief=1`, SHA-256 alone. */
  hash?: string;
  /** SHA-256 of the content, lowercase hex; only when asked for with `hash=sha256`. */
  sha256?: string;
  /** Bytes; only when asked for with `hash=sha256`. */
  size?: number;
  /** The owner may run the file; only when asked for with `hash=sha256`, and never `false`. */
  executable?: true;
}

/** The firmware image to flash. */
export interface ManifestFirmware extends InlineContent {
  URL: string;
  hash?: string;
  sha256?: string;
  size?: number;
  /** The image's version; from the file name when the server does not send it. */
  version?: string;
}

/** A DSSE envelope. */
export interface Envelope {
  /** Base64. */
  payload: string;
  payloadType: string;
  /** `sig` is base64; `keyid` only a hint. */
  signatures: { keyid: string; sig: string }[];
}

/** What brings a device from one release to another. Keys are sorted, as on the wire. */
export interface Manifest {
  /** The `base` of a request with `reqid`, when the lists are what changes that very release. */
  base?: string;
  /** Paths to delete, without a leading slash, as deployed boards expect. */
  delete: string[];
  firmware?: ManifestFirmware;
  /** The list is the whole release: what the device installed and the list lacks must go too. */
  full?: true;
  /** Files that the previous version does not have. */
  new: ManifestEntry[];
  previous_version?: string;
  /** The `reqid` of the request. */
  request_id?: string;
  /** The step, as it was signed at home; only when asked for with `signed=1`. */
  signed?: Envelope;
  /** Files that the previous version has with other content. */
  update: ManifestEntry[];
  version: string;
}

function asManifest(json: unknown): Manifest {
  const fields = asObject(json, "the manifest");
  const version = asText(fields.version, "version");
  if (!isReleaseName(version)) malformed(`version ${JSON.stringify(version)}: not a release name`);
  const manifest: Manifest = {
    delete: asList(fields.delete, "delete", asPath),
    new: asList(fields.new, "new", (item, at) => asEntry(item, at, version)),
    update: asList(fields.update, "update", (item, at) => asEntry(item, at, version)),
    version,
  };
  const { firmware, full, base, previous_version, request_id } = fields;
  if (firmware !== undefined) manifest.firmware = asFirmware(firmware);
  if (full !== undefined && asFlag(full, "full")) manifest.full = true;
  if (base !== undefined) manifest.base = asDigest(base, "base", 64);
  if (previous_version !== undefined) {
    manifest.previous_version = asText(previous_version, "previous_version");
  }
  if (request_id !== undefined) manifest.request_id = asText(request_id, "request_id");
  if (fields.signed !== undefined) manifest.signed = asEnvelope(fields.signed, "signed");
  return manifest;
}

/** Limits of an envelope: verifying must not become work. */
const ENVELOPE = { payload: 4096, signatures: 16 };

function asEnvelope(value: unknown, name: string): Envelope {
  const { payload, payloadType, signatures } = asObject(value, name);
  const envelope = {
    payload: asText(payload, `${name}.payload`),
    payloadType: asText(payloadType, `${name}.payloadType`),
    signatures: asList(signatures, `${name}.signatures`, (one, at) => {
      const { keyid = "", sig } = asObject(one, at);
      return { keyid: asText(keyid, `${at}.keyid`), sig: asText(sig, `${at}.sig`) };
    }),
  };
  const isLong = envelope.payload.length > ENVELOPE.payload;
  if (isLong) malformed(`${name}.payload: more than ${ENVELOPE.payload} characters`);
  const count = envelope.signatures.length;
  if (count > ENVELOPE.signatures) malformed(`${name}.signatures: ${count}, too many`);
  return envelope;
}

function asPath(value: unknown, name: string): string {
  const path = asText(value, name);
  const problem = pathProblem(path);
  return problem ? malformed(`${name}: the path ${JSON.stringify(path)} ${problem}`) : path;
}

/**
 * The fields that files and firmware share. What can be verified and had without them needs no URL
 * and no SHA-1, and may come with its content.
 */
function asContent(fields: Record<string, unknown>, name: string) {
  const { size, sha256, hash } = fields;
  const isBrief = sha256 !== undefined && size !== undefined;
  return {
    URL: isBrief && fields.URL === undefined ? undefined : asURL(fields.URL, `${name}.URL`),
    ...(!(isBrief && hash === undefined) && { hash: asDigest(hash, `${name}.hash`, 40) }),
    ...(sha256 !== undefined && { sha256: asSHA256(sha256, `${name}.sha256`) }),
    ...(size !== undefined && { size: asSize(size, `${name}.size`) }),
    ...(isBrief && asInline(fields, name)),
  };
}

function asURL(value: unknown, name: string): string {
  return parseHttpURL(asText(value, name))?.href ?? malformed(`${name}: not an http(s) address`);
}

/** Whether what is in there can be decoded shows only when it is used: see `fromInline`. */
function asInline({ text, content, coding }: Record<string, unknown>, name: string): InlineContent {
  return {
    ...(text !== undefined && { text: asText(text, `${name}.text`) }),
    ...(content !== undefined && { content: asText(content, `${name}.content`) }),
    ...(coding !== undefined && { coding: asText(coding, `${name}.coding`) }),
  };
}

/** @param version that of the manifest */
function asEntry(value: unknown, name: string, version: string): ManifestEntry {
  const fields = asObject(value, name);
  const path = asText(fields.dst_path, `${name}.dst_path`).replace(/^\//, "");
  const { executable } = fields;
  const known = asContent(fields, name);
  return {
    ...known,
    URL: known.URL ?? `/${encodePath(`${version}/${path}`)}`,
    dst_path: `/${asPath(path, `${name}.dst_path`)}`,
    ...(executable !== undefined &&
      asFlag(executable, `${name}.executable`) && { executable: true as const }),
  };
}

function asFirmware(value: unknown): ManifestFirmware {
  const fields = asObject(value, "firmware");
  const known = asContent(fields, "firmware");
  const file = known.URL === undefined ? "" : basename(percentDecode(new URL(known.URL).pathname));
  const version =
    fields.version === undefined
      ? firmwareVersion(file)
      : asText(fields.version, "firmware.version");
  if (version === undefined || !isReleaseName(version)) {
    malformed(`firmware: no version in ${JSON.stringify(version ?? file)}`);
  }
  return { ...known, URL: known.URL ?? `/${encodePath(imageName(version))}`, version };
}

// ──── Reading manifests ───────────────────────────────────────────────────────────────────────────
// From the body of a response to a manifest that agrees with itself, or to a reason to refuse it.

/** A manifest larger than this is refused. */
export const MAX_MANIFEST_BYTES = 64 * 1024 * 1024;

/**
 * Reads a manifest from a server, ours or the one of Pycom's OTA tutorial (which sends no sizes,
 * and `dst_path` with or without the slash). In the result every `dst_path` has a leading slash,
 * no `delete` has one, hashes are lowercase hex, and there is one of each content; a URL that was
 * left out is a path below the server's address; firmware has a version, and nothing names
 * `flash/OTA_VERSION.py`, which the device writes itself.
 *
 * @param body the response body: JSON text
 * @param current the version of the device; an older manifest is refused
 * @returns the manifest, or `null` when the server has nothing newer
 * @throws {OTAError} naming the first thing that is wrong; nothing of such a manifest may be used
 */
export function parseManifest(body: string | Uint8Array, current?: string): Manifest | null {
  const size = typeof body === "string" ? Buffer.byteLength(body) : body.byteLength;
  if (size === 0) refuse("an empty body");
  if (size > MAX_MANIFEST_BYTES) refuse(`${size} bytes, more than ${MAX_MANIFEST_BYTES}`);
  const json = parseJSON(typeof body === "string" ? body : new TextDecoder().decode(body));
  if (json === undefined) refuse("not JSON");
  if (json === null) return null;
  let manifest: Manifest;
  try {
    manifest = asManifest(json);
  } catch (error) {
    if (error instanceof FormatError) refuse(error.message);
    throw error;
  }
  if (current !== undefined) refuseOlder(manifest, current);
  checkPathsAgree(manifest);
  const ours = (path: string) => path !== VERSION_FILE;
  manifest.delete = manifest.delete.filter(ours);
  manifest.new = manifest.new.filter((item) => ours(item.dst_path.slice(1)));
  manifest.update = manifest.update.filter((item) => ours(item.dst_path.slice(1)));
  return manifest;
}

/** @throws {RefusedError} when a manifest leads to an older version than a device has */
function refuseOlder({ version }: Manifest, current: string): void {
  if (new LooseVersion(version).compare(current) >= 0) return;
  refuse(`version ${version}, older than the device's ${current}`);
}

/** A manifest that must not be used. */
class RefusedError extends OTAError {
  override name = "RefusedError";
}

function refuse(found: string): never {
  throw new RefusedError(`refused the manifest: ${found}`);
}

/** One path, one content: no duplicates, no file below a file, nothing both deleted and written. */
function checkPathsAgree(manifest: Manifest): void {
  const written = new Set<string>();
  for (const { dst_path } of [...manifest.new, ...manifest.update]) {
    if (written.has(dst_path)) refuse(`${dst_path} is listed twice`);
    written.add(dst_path);
  }
  for (const path of written) {
    const above = ancestors(path).find((ancestor) => written.has(ancestor));
    if (above) refuse(`${path} is below ${above}, which is a file`);
    if (path.startsWith(`/${VERSION_FILE}/`)) refuse(`${path} is below a file of the device's own`);
  }
  const both = manifest.delete.find((path) => written.has(`/${path}`));
  if (both) refuse(`${both} is both deleted and written`);
}

/**
 * The digest of a whole release, sent as `base`: lowercase hex SHA-256 over the lines
 * `path NUL sha256hex LF`, sorted by path in UTF-8 byte order.
 *
 * @param files path (without a leading slash) and SHA-256 of every file
 */
export function releaseDigest(files: Iterable<readonly [path: string, sha256: string]>): string {
  const hasher = new Bun.CryptoHasher("sha256");
  for (const [path, sha256] of [...files].sort((a, b) => compareCodePoints(a[0], b[0]))) {
    hasher.update(releaseLine(path, sha256));
  }
  return hasher.digest("hex");
}

const releaseLine = (path: string, sha256: string) => `${path}\0${sha256}\n`;

// ──── Queries ─────────────────────────────────────────────────────────────────────────────────────
// What a device says of itself when it asks for a manifest.

/** What a device asks for, as query parameters of `GET /manifest.json`. */
export interface ManifestQuery {
  /** The release the device is on; absent or empty: it has nothing. */
  current_ver?: string;
  /** The firmware it runs; empty: none that it knows of; absent: an old board that never says. */
  firmware_ver?: string;
  /** `releaseDigest` of what it really has. */
  base?: string;
  /** SHA-256 of the firmware image that it really has. */
  firmware_sha256?: string;
  /**
   * `1` asks for a brief manifest: no SHA-1, no URL that follows from the path, and small contents
   * inside it. `base` and `firmware_sha256` say which older contents these may be coded with.
   */
  brief?: string;
  /** Asks for all files of this version, whatever the device is on: nothing is an update then. */
  list?: string;
  /** `sha256` asks for the fields `sha256`, `size` and `firmware.version`. */
  hash?: string;
  /** `1` asks for the step as it was signed at home, and for `hash=sha256`. */
  signed?: string;
  /** The kind of board; where its root has versions of its own, the device gets these. */
  model?: string;
  /** The same as older boards name it; `model` goes before it. */
  sysname?: string;
  /** Echoed as `request_id`. */
  reqid?: string;
  /** The device's name. */
  devid?: string;
  /** Its WiFi address, by which older boards name themselves. */
  wmac?: string;
  /** A release that it took back. */
  failed?: string;
  token?: string;
}

/**
 * Reads a query string (without `?`). Of a parameter sent twice the first counts; unknown ones,
 * which devices in the field do send, are dropped.
 */
export function parseQuery(search: string): ManifestQuery {
  const query: ManifestQuery = {};
  for (const pair of search.split("&")) {
    const at = pair.indexOf("=");
    const name = (at < 0 ? pair : pair.slice(0, at)) as keyof ManifestQuery;
    if (PARAMETERS.has(name)) query[name] ??= at < 0 ? "" : percentDecode(pair.slice(at + 1));
  }
  return query;
}

const PARAMETERS: ReadonlySet<keyof ManifestQuery> = new Set([
  ...(["current_ver", "firmware_ver", "base", "firmware_sha256", "list", "hash"] as const),
  ...(["brief", "signed", "model", "sysname"] as const),
  ...(["reqid", "devid", "wmac", "failed", "token"] as const),
]);

// ──── Trust ─────────────────────────────────────────────────────────────────────────────────────
// Who made a manifest. A signature binds its bytes to the request that asked for them, so that
// neither a changed nor an old answer passes; the hashes in the manifest then vouch for content.

/** The response header that carries a manifest's signature, in base64. */
export const SIGNATURE_HEADER = "X-OTA-Signature";

/** What is signed: Ed25519 over `ota-manifest-1` LF `reqid` LF body, body before any coding. */
function signedBytes(body: string | Uint8Array, reqid: string): Uint8Array {
  return Buffer.concat([Buffer.from(`ota-manifest-1\n${reqid}\n`), Buffer.from(body)]);
}

/** Makes a key pair, both PEM as openssl reads and writes them (PKCS #8, SPKI). */
export function makeKeys(): { key: string; pub: string } {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return {
    key: privateKey.export({ type: "pkcs8", format: "pem" }).toString(),
    pub: publicKey.export({ type: "spki", format: "pem" }).toString(),
  };
}

/**
 * Signs a manifest.
 *
 * @param reqid of the request; empty when none was sent
 * @returns base64
 */
export function signManifest(body: string | Uint8Array, reqid: string, key: KeyObject): string {
  return sign(null, signedBytes(body, reqid), key).toString("base64");
}

/** Whether a signature was made by one of the keys. */
function isSignedBy(
  keys: readonly KeyObject[],
  signature: string,
  body: string | Uint8Array,
  reqid: string,
): boolean {
  const bytes = Buffer.from(signature, "base64");
  return keys.some((key) => verify(null, signedBytes(body, reqid), key, bytes));
}

/**
 * Reads a key of a key pair.
 *
 * @param file PEM, as `keygen` and openssl write it
 * @throws {OTAError} when it cannot be read or is no Ed25519 key of that kind
 */
export function readKey(file: string, kind: "private" | "public"): KeyObject {
  try {
    const pem = fs.readFileSync(file);
    const key = kind === "private" ? createPrivateKey(pem) : createPublicKey(pem);
    if (key.asymmetricKeyType === "ed25519") return key;
    throw new Error(`it is a key for ${key.asymmetricKeyType}`);
  } catch (error) {
    throw new OTAError(
      `cannot use ${file}: expected an Ed25519 ${kind} key in PEM, as keygen writes it; found: ` +
        errorText(error),
      2,
    );
  }
}

/**
 * Reads the certificate of an authority, or of a server with those that lead to its authority.
 *
 * @param file PEM
 * @returns its text, and the first certificate in it
 * @throws {OTAError} exit code 2 when it cannot be read, has no certificate, or a damaged one
 */
export function readCertificates(file: string): { pem: string; first: X509Certificate } {
  const pem = readPem(file);
  const blocks = pem.match(/^-----BEGIN ([A-Z0-9 ]*CERTIFICATE)-----.*?^-----END \1-----/gms) ?? [];
  try {
    const [first] = blocks.map((block) => new X509Certificate(block));
    if (first) return { pem, first };
  } catch {
    // OpenSSL's messages do not name the cause.
  }
  const found = blocks.length === 0 ? "none" : "a damaged one";
  throw new OTAError(`cannot use ${file}: expected a certificate in PEM, found ${found}`, 2);
}

/** A certificate and its key, in PEM, or the files that hold them. */
export interface Certificate {
  cert: string;
  key: string;
}

/**
 * Reads the certificate of a server and its key. TLS itself would find out at the first connection.
 *
 * @param files both PEM
 * @returns their texts
 * @throws {OTAError} exit code 2 when one of them cannot be used, or they do not belong together
 */
export function readServerCertificate(files: Certificate): Certificate {
  const { pem: cert, first } = readCertificates(files.cert);
  const key = readPem(files.key);
  let parsed: KeyObject;
  try {
    parsed = createPrivateKey(key);
  } catch (error) {
    const isLocked = errorCode(error) === "ERR_MISSING_PASSPHRASE";
    const found = isLocked ? "one with a passphrase, which nobody is there to enter" : "none";
    throw new OTAError(`cannot use ${files.key}: expected a private key in PEM, found ${found}`, 2);
  }
  if (first.checkPrivateKey(parsed)) return { cert, key };
  throw new OTAError(
    `${files.key} is not the key of ${files.cert}: expected the two of one pair, ` +
      "with the server's own certificate first",
    2,
  );
}

/** A file that an option names. */
function readPem(file: string): string {
  try {
    return fs.readFileSync(file, "utf8");
  } catch (error) {
    throw new OTAError(`cannot read ${file}: ${errorText(error)}`, 2);
  }
}

/** Constant-time comparison of secrets. */
function isSameSecret(a: string, b: string): boolean {
  return timingSafeEqual(Buffer.from(sha256(a)), Buffer.from(sha256(b)));
}

// ──── Signed steps ────────────────────────────────────────────────────────────────────────────────
// What is signed at home, once for each release: a step, which brings a device from one release to
// another. Any server, mirror or stick may carry it, and none can change it. It is a payload in a DSSE
// envelope (Dead Simple Signing Envelope, version 1, as in in-toto and sigstore).

/** What brings a device from one release to another. Keys are sorted, as in the payload. */
export interface Step {
  /** ISO 8601; after this the step is no longer accepted. `null`: never. */
  expires: string | null;
  /** The image that belongs to the release `to`, whatever runs on the device. */
  firmware: { sha256: string; size: number; version: string } | null;
  /** The release that the device is on: `""` none, `"*"` any, for the full list. */
  from: string;
  /** When it was signed, ISO 8601. */
  issued: string;
  /** The kind of board that it is for; `null`: not said. */
  model: string | null;
  /** `releaseDigest` of `to`: what the device must end up with, whatever it had. */
  release: string;
  /** `stepsDigest` of the manifest. */
  steps: string;
  to: string;
}

/** The payload type of a step. */
export const STEP_TYPE = "application/vnd.ota-step+json";

/** `from` of a step to the full list. */
const ANY = "*";

/** DSSE's pre-authentication encoding: the bytes of an envelope that are signed. */
function preAuthEncoding({ payloadType, payload }: Envelope): Uint8Array {
  const bytes = Buffer.from(payload, "base64");
  const head = `DSSEv1 ${Buffer.byteLength(payloadType)} ${payloadType} ${bytes.byteLength} `;
  return Buffer.concat([Buffer.from(head), bytes]);
}

/**
 * The digest of what a manifest changes: lowercase hex SHA-256 over `D path LF` for each `delete`,
 * `F LF` if it is full, `N path NUL sha256 LF` for each `new` and `U path NUL sha256 LF` for each
 * `update`, in their order, paths without a leading slash.
 *
 * @throws {FormatError} when an entry has no SHA-256
 */
function stepsDigest(manifest: {
  delete: readonly string[];
  full?: boolean;
  new: readonly Pick<ManifestEntry, "dst_path" | "sha256">[];
  update: readonly Pick<ManifestEntry, "dst_path" | "sha256">[];
}): string {
  const hasher = new Bun.CryptoHasher("sha256");
  const line = (kind: string, { dst_path, sha256 }: Pick<ManifestEntry, "dst_path" | "sha256">) =>
    hasher.update(
      `${kind} ${dst_path.slice(1)}\0${sha256 ?? malformed(`${dst_path}: no sha256`)}\n`,
    );
  for (const path of manifest.delete) hasher.update(`D ${path}\n`);
  if (manifest.full) hasher.update("F\n");
  for (const entry of manifest.new) line("N", entry);
  for (const entry of manifest.update) line("U", entry);
  return hasher.digest("hex");
}

/** The raw bytes of an Ed25519 public key in lowercase hex, as boards are given it. */
export function rawPublicKey(key: KeyObject): string {
  const { x } = key.export({ format: "jwk" });
  return Buffer.from(x!, "base64url").toString("hex");
}

/** Puts a step into an envelope without signatures. */
function sealStep(step: Step): Envelope {
  const payload = Buffer.from(JSON.stringify(step)).toString("base64");
  return { payload, payloadType: STEP_TYPE, signatures: [] };
}

/** Adds a signature to an envelope, unless this key has signed it. @param key private */
function signEnvelope(envelope: Envelope, key: KeyObject): void {
  const pub = createPublicKey(key);
  if (signersOf(envelope, [pub]).size > 0) return;
  const sig = sign(null, preAuthEncoding(envelope), key).toString("base64");
  envelope.signatures.push({ keyid: rawPublicKey(pub).slice(0, 16), sig });
}

/** Those of the keys, as indices, that signed an envelope; each counts once. */
function signersOf(envelope: Envelope, keys: readonly KeyObject[]): Set<number> {
  const bytes = preAuthEncoding(envelope);
  const signers = new Set<number>();
  for (const { sig } of envelope.signatures) {
    // 64 bytes in base64.
    if (sig.length !== 88) continue;
    const signature = Buffer.from(sig, "base64");
    for (const key of keys) {
      // The first of those that are the same key.
      const index = () => keys.findIndex((other) => other.equals(key));
      if (verify(null, bytes, key, signature)) signers.add(index());
    }
  }
  return signers;
}

/** A time in ISO 8601 and UTC. */
function asTime(value: unknown, name: string): string {
  const text = asText(value, name);
  const isTime = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/.test(text);
  return isTime && !Number.isNaN(Date.parse(text)) ? text : malformed(`${name}: not a time in UTC`);
}

/**
 * Reads the step in an envelope. That says nothing of its signatures.
 *
 * @throws {FormatError} when it is of another type, or its payload is no step
 */
function stepIn({ payload, payloadType }: Envelope): Step {
  if (payloadType !== STEP_TYPE) malformed(`payloadType: not ${STEP_TYPE}`);
  const json = parseJSON(Buffer.from(payload, "base64").toString());
  const fields = asObject(json, "the payload");
  const { expires, firmware, from, issued, model, release, steps, to } = fields;
  const image = firmware === null ? null : asObject(firmware, "firmware");
  return {
    expires: expires === null ? null : asTime(expires, "expires"),
    firmware: image && {
      sha256: asDigest(image.sha256, "firmware.sha256", 64),
      size: asSize(image.size, "firmware.size"),
      version: asText(image.version, "firmware.version"),
    },
    from: asText(from, "from"),
    issued: asTime(issued, "issued"),
    model: model === null ? null : asText(model, "model"),
    release: asDigest(release, "release", 64),
    steps: asDigest(steps, "steps", 64),
    to: asText(to, "to"),
  };
}

// ════ II Codings ═════════════════════════════════════════════════════════════════════════════════
// How content is made smaller for the air. Beside the usual codings there is one of our own, for
// firmware above all: a patch that says how new content is made of the old that the device has. A
// device only needs the format (Patch format), to find addresses in its old content (Address fields,
// Instructions), and to apply the patch (Patch decoding); the sections after that make patches.

// ──── Patch format ────────────────────────────────────────────────────────────────────────────────
// `ota-patch`, version 1: new content made of old. Where code moves, the addresses of what moved
// change, all over the old content, and most of them by the same amount. So a patch holds a short
// table of what to add to which addresses; they are predicted in what is copied, and only what was
// predicted wrongly has to be sent. A number is an unsigned LEB128; a signed one is a number, too:
// 0, -1, 1, -2 … are 0, 1, 2, 3 …
//
//     magic        4 bytes: 89 4F 54 50
//     version      1 byte: 1
//     old length   number
//     new length   number
//     old SHA-256  32 bytes
//     new SHA-256  32 bytes
//     architecture 1 byte, what is predicted: 0 nothing, 1 words, 2 words and Thumb-2,
//                  3 words and Xtensa, 4 words and RISC-V
//     code         if architecture is 2 or more: the number of ranges of code (64 at most), and for
//                  each how far it begins after the end of the one before, and its length
//     tables       if architecture is 1 or more, that of absolute addresses; if it is 2 or more,
//                  that of relative ones. The number of entries (4,096 at most), and for each the
//                  first address that it holds for, less that of the entry before, and, signed, what
//                  is added to these addresses (modulo 2^32)
//     segments     until the new length is reached:
//         insert   the number of bytes that are inserted here, and these bytes
//         seek     unless the new length is reached. Signed: how far the copy begins after the end
//                  of the last copy, in the old content
//         tokens   numbers: 4 × n + k. The next n bytes are copied as predicted; k bytes follow, to
//                  be added to the next k predicted ones (modulo 256). k = 0 ends the copy, which
//                  has at least one byte
//
// Each copy predicts anew the blocks of old content that it reaches into (Address fields). So that a
// few bytes cannot keep a board busy for hours, all copies together predict at most
// 64 + (old length + new length) / 64 blocks. A patch is at most 2 × new length + 96 KiB long.

/** `magic` and `version`. */
const PATCH_MAGIC = Uint8Array.of(0x89, 0x4f, 0x54, 0x50, 1);
const MAX_CODE_RANGES = 64;
const MAX_TABLE = 4096;
/** The longest patch: at worst something is added to every byte, and both tables are full. */
const maxPatch = (newSize: number) => 2 * newSize + 96 * 1024;
/** How many blocks the copies of a patch may predict. */
const maxBlocks = (oldSize: number, newSize: number) => 64 + ((oldSize + newSize) >>> 6);
/** What is predicted. */
const ARCHITECTURES = { none: 0, words: 1, thumb: 2, xtensa: 3, riscv: 4 } as const;

/** An address from which on something is added to addresses. */
interface TableEntry {
  /** Unsigned, 32 bits. */
  from: number;
  /** Signed, 32 bits. */
  add: number;
}

/** What becomes of the addresses in old content. */
class AddressTable {
  readonly #from: Float64Array;
  readonly #add: Int32Array;
  /** The addresses for which the last answer holds. */
  #low = 0;
  #high = 0;
  #last = 0;

  /** @param entries in ascending order */
  constructor(readonly entries: readonly TableEntry[] = []) {
    this.#from = Float64Array.from(entries, ({ from }) => from);
    this.#add = Int32Array.from(entries, ({ add }) => add);
  }

  /** What to add to an address (unsigned). */
  at(address: number): number {
    if (address >= this.#low && address < this.#high) return this.#last;
    let [low, high] = [-1, this.#from.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.#from[middle]! <= address) low = middle;
      else high = middle;
    }
    this.#low = this.#from[low] ?? 0;
    this.#high = this.#from[high] ?? 2 ** 32;
    this.#last = this.#add[low] ?? 0;
    return this.#last;
  }
}

/** Where the addresses in old content are, and what becomes of them. */
interface Prediction {
  architecture: number;
  /** Ranges of code, [start, end), in order. */
  code: readonly (readonly [start: number, end: number])[];
  absolute: AddressTable;
  relative: AddressTable;
}

const NO_ADDRESSES = new AddressTable();
const NO_PREDICTION: Prediction = {
  architecture: ARCHITECTURES.none,
  code: [],
  absolute: NO_ADDRESSES,
  relative: NO_ADDRESSES,
};

/** content[at, at + length) is made of old[from, from + length). */
interface Cover {
  at: number;
  from: number;
  length: number;
}

/** Reads a patch; throws where it ends before its time. */
class PatchReader {
  constructor(
    readonly bytes: Uint8Array,
    public at = 0,
  ) {}

  byte(): number {
    const byte = this.bytes[this.at++];
    if (byte === undefined) throw new Error("the patch is cut off");
    return byte;
  }

  /** @param most throws when it is more */
  number(most: number): number {
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      const byte = this.byte();
      value += (byte & 127) * unit;
      if (value > most || unit > 2 ** 42) throw new Error("the patch has a number out of range");
      if (byte < 128) return value;
    }
  }

  /** @param most of its absolute value */
  signed(most: number): number {
    const value = this.number(2 * most + 1);
    return value % 2 === 0 ? value / 2 : -(value + 1) / 2;
  }

  take(length: number): Uint8Array {
    const taken = this.bytes.subarray(this.at, this.at + length);
    if (taken.length < length) throw new Error("the patch is cut off");
    this.at += length;
    return taken;
  }

  table(): AddressTable {
    let from = 0;
    const entry = () => {
      from += this.number(2 ** 32 - 1 - from);
      return { from, add: this.signed(2 ** 31) | 0 };
    };
    return new AddressTable(Array.from({ length: this.number(MAX_TABLE) }, entry));
  }

  /** @param size of the old content */
  prediction(size: number): Prediction {
    const architecture = this.byte();
    if (architecture > ARCHITECTURES.riscv) throw new Error("the patch is of a newer kind");
    let end = 0;
    const range = () => {
      const start = end + this.number(size - end);
      end = start + this.number(size - start);
      return [start, end] as const;
    };
    const ranges = architecture > ARCHITECTURES.words ? this.number(MAX_CODE_RANGES) : 0;
    return {
      architecture,
      code: Array.from({ length: ranges }, range),
      absolute: architecture >= ARCHITECTURES.words ? this.table() : NO_ADDRESSES,
      relative: architecture > ARCHITECTURES.words ? this.table() : NO_ADDRESSES,
    };
  }
}

/** Writes a patch. */
class PatchWriter {
  #bytes = new Uint8Array(4096);
  #length = 0;

  byte(byte: number): void {
    this.#reserve(1);
    this.#bytes[this.#length++] = byte;
  }

  take(bytes: ArrayLike<number>): void {
    this.#reserve(bytes.length);
    this.#bytes.set(bytes, this.#length);
    this.#length += bytes.length;
  }

  #reserve(length: number): void {
    const needed = this.#length + length;
    if (needed <= this.#bytes.length) return;
    const larger = new Uint8Array(2 * needed);
    larger.set(this.#bytes);
    this.#bytes = larger;
  }

  number(value: number): void {
    for (; value >= 128; value = Math.floor(value / 128)) this.byte((value % 128) + 128);
    this.byte(value);
  }

  signed(value: number): void {
    this.number(value < 0 ? -2 * value - 1 : 2 * value);
  }

  table({ entries }: AddressTable): void {
    this.number(entries.length);
    entries.forEach(({ from, add }, index) => {
      this.number(from - (entries[index - 1]?.from ?? 0));
      this.signed(add);
    });
  }

  prediction({ architecture, code, absolute, relative }: Prediction): void {
    this.byte(architecture);
    if (architecture > ARCHITECTURES.words) {
      this.number(code.length);
      code.forEach(([start, end], index) => {
        this.number(start - (code[index - 1]?.[1] ?? 0));
        this.number(end - start);
      });
    }
    if (architecture >= ARCHITECTURES.words) this.table(absolute);
    if (architecture > ARCHITECTURES.words) this.table(relative);
  }

  get bytes(): Uint8Array {
    return this.#bytes.slice(0, this.#length);
  }
}

// ──── Address fields ──────────────────────────────────────────────────────────────────────────────
// Where addresses are in old content. A decoder must find the same ones, so they are found in the
// old bytes alone, and in blocks of 1,024 bytes, each by itself: a small decoder needs no more than
// a block and 64 bytes on either side. The value of a field is an address: that of an absolute one
// as the program sees it, that of a relative one as if the old content were loaded at 0.
//
// - Everywhere, aligned words (32 bits, little endian); but in RISC-V code there are none.
// - Thumb-2: BL (Arm v7-M Architecture Reference Manual, A7.7.18).
// - Xtensa: CALL0, 4, 8, 12 and L32R (Xtensa ISA Reference Manual, 8.2). Instructions have no
//   alignment; ENTRY, with which functions begin, has, and data in between ends at it.
// - RISC-V: JAL; LUI and AUIPC, with each load, store, ADDI or JALR that completes them within 64
//   bytes (The RISC-V Instruction Set Manual, volume I, 2.4 to 2.6).

/** The kinds of fields. `upper` and `lower` are the halves of a RISC-V address. */
const FIELD = {
  word: 1,
  bl: 2,
  call: 3,
  l32r: 4,
  jal: 5,
  upper: 6,
  lower: 7,
  relativeUpper: 8,
  relativeLower: 9,
} as const;
/** In bytes, by kind. */
const FIELD_SIZES = [0, 4, 4, 3, 3, 4, 4, 4, 4, 4];

const BLOCK = 1024;
const MARGIN = 64;

/** A block of old content, with what is needed of its neighbours. */
interface BlockWindow {
  bytes: Uint8Array;
  /** Where `bytes` begins in the old content; a multiple of 4. */
  base: number;
  /** Where the block is in `bytes`. */
  start: number;
  end: number;
}

/**
 * Is called with a field that reaches into the block.
 *
 * @param at in the bytes of the window
 * @param address unsigned
 * @param origin where the instruction is that a relative address counts from: `at`, but for a lower
 *   half
 */
type FieldVisitor = (kind: number, at: number, address: number, origin: number) => void;

const isAbsolute = (kind: number) =>
  kind === FIELD.word || kind === FIELD.upper || kind === FIELD.lower;

const get16 = (bytes: Uint8Array, at: number) => bytes[at]! | (bytes[at + 1]! << 8);
const get32 = (bytes: Uint8Array, at: number) => get16(bytes, at) | (get16(bytes, at + 2) << 16);

/**
 * Visits the fields of a block, in order.
 *
 * @param everyWord visits words also where nothing is added to them
 */
function visitFields(
  window: BlockWindow,
  { architecture, code, absolute }: Prediction,
  visit: FieldVisitor,
  everyWord = false,
): void {
  const { bytes, base, start, end } = window;
  const isAddress = (at: number) => absolute.at(get32(bytes, at) >>> 0) !== 0;
  const visitWord = (at: number) => visit(FIELD.word, at, get32(bytes, at) >>> 0, at);
  let range = 0;
  for (let at = Math.max(0, start - MARGIN); at < end;) {
    while (range < code.length && code[range]![1] <= at + base) range++;
    const isCode = range < code.length && code[range]![0] <= at + base;
    const codeEnd = isCode ? code[range]![1] - base : 0;
    if (
      at % 4 === 0 &&
      at + 4 <= bytes.length &&
      !(isCode && architecture === ARCHITECTURES.riscv)
    ) {
      const moves = isAddress(at);
      if ((moves || everyWord) && at >= start) visitWord(at);
      if (moves) {
        at += 4;
        continue;
      }
    }
    // No field is sought where it could reach beyond the code.
    if (!isCode) at = (at | 3) + 1;
    else if (at + 8 > codeEnd) at = codeEnd;
    else if (architecture === ARCHITECTURES.riscv) at += visitRISCV(window, at, codeEnd, visit);
    else {
      const isXtensa = architecture === ARCHITECTURES.xtensa;
      const size = isXtensa ? xtensaSize(bytes, at) : thumbSize(bytes, at);
      const kind = isXtensa ? xtensaKind(bytes, at) : thumbKind(bytes, at);
      const aligned = (at | 3) + 1;
      const isSplit = aligned < at + size;
      // What stands across an address, or the start of a function, was no instruction.
      if (isSplit && (isAddress(aligned) || (isXtensa && isEntry(bytes, aligned)))) {
        at = aligned;
        continue;
      }
      if (isSplit && everyWord && aligned >= start && aligned < end) visitWord(aligned);
      if (kind !== 0 && at + size > start) {
        visit(kind, at, addressOf(kind, get32(bytes, at), at + base), at);
      }
      at += size;
    }
  }
}

/** The size of an instruction of Thumb-2. */
function thumbSize(bytes: Uint8Array, at: number): number {
  return bytes[at + 1]! < 0xe8 ? 2 : 4;
}

/** Its field, or 0. */
function thumbKind(bytes: Uint8Array, at: number): number {
  return (bytes[at + 1]! & 0xf8) === 0xf0 && (bytes[at + 3]! & 0xd0) === 0xd0 ? FIELD.bl : 0;
}

/** The size of an instruction of Xtensa. */
function xtensaSize(bytes: Uint8Array, at: number): number {
  const operation = bytes[at]! & 15;
  return operation >= 8 && operation < 14 ? 2 : 3;
}

/** Its field, or 0. */
function xtensaKind(bytes: Uint8Array, at: number): number {
  const operation = bytes[at]! & 15;
  return operation === 5 ? FIELD.call : operation === 1 ? FIELD.l32r : 0;
}

/** Whether Xtensa's ENTRY with the stack pointer is there. */
function isEntry(bytes: Uint8Array, at: number): boolean {
  return bytes[at] === 0x36 && (bytes[at + 1]! & 15) === 1;
}

const OPCODE = { load: 0x03, floatLoad: 0x07, addi: 0x13, auipc: 0x17, store: 0x23 } as const;
const BRANCH = 0x63;
const JALR = 0x67;
const LUI = 0x37;
const JAL = 0x6f;

/** The field of five bits that begins at a bit of an instruction. */
const register = (instruction: number, bit: number) => (instruction >> bit) & 31;
/** Whether it is a store, of an integer or a float. */
const isStore = (instruction: number) => (instruction & 0x7b) === OPCODE.store;

/** Whether a RISC-V instruction adds 12 bits to a register. */
function addsLower(instruction: number): boolean {
  const opcode = instruction & 0x7f;
  if (opcode === OPCODE.addi || opcode === JALR) return (instruction & 0x7000) === 0;
  return opcode === OPCODE.load || opcode === OPCODE.floatLoad || isStore(instruction);
}

/** The 12 bits, signed. */
function lowerOf(instruction: number): number {
  if (!isStore(instruction)) return instruction >> 20;
  return ((instruction >> 25) << 5) | register(instruction, 7);
}

/** Visits the field of a RISC-V instruction, and what completes it; returns its size. */
function visitRISCV(
  { bytes, base, start }: BlockWindow,
  at: number,
  codeEnd: number,
  visit: FieldVisitor,
): number {
  if ((bytes[at]! & 3) !== 3) return 2;
  const upper = get32(bytes, at);
  const opcode = upper & 0x7f;
  const isSeen = at + 4 > start;
  if (opcode === JAL && isSeen) visit(FIELD.jal, at, addressOf(FIELD.jal, upper, at + base), at);
  const isRelative = opcode === OPCODE.auipc;
  if (!isRelative && opcode !== LUI) return 4;
  const target = register(upper, 7);
  if (target === 0) return 4;
  const page = (upper & ~0xfff) + (isRelative ? at + base : 0);
  const upperKind = isRelative ? FIELD.relativeUpper : FIELD.upper;
  const lowerKind = isRelative ? FIELD.relativeLower : FIELD.lower;
  let isFirst = true;
  for (let next = at + 4; next + 4 <= Math.min(at + MARGIN, codeEnd);) {
    const instruction = get32(bytes, next);
    const isLong = (instruction & 3) === 3;
    if (isLong && addsLower(instruction) && register(instruction, 15) === target) {
      const address = (page + lowerOf(instruction)) >>> 0;
      if (isFirst && isSeen) visit(upperKind, at, address, at);
      if (next + 4 > start) visit(lowerKind, next, address, at);
      isFirst = false;
    }
    // Stores and branches have no target.
    const hasTarget = isLong && !isStore(instruction) && (instruction & 0x7f) !== BRANCH;
    if (hasTarget && register(instruction, 7) === target) break;
    next += isLong ? 4 : 2;
  }
  return 4;
}

// ──── Instructions ───────────────────────────────────────────────────────────────────────────────
// How fields hold addresses, and what a copy of a block is predicted to be. Here an instruction is a
// number of 32 bits, its first byte the lowest; above one of three bytes is the byte that follows it.

/**
 * The address in a field, but for the halves of a RISC-V address, which take two instructions.
 *
 * @param code the instruction, or the word
 * @param origin where it is
 */
function addressOf(kind: number, code: number, origin: number): number {
  switch (kind) {
    case FIELD.bl: {
      const sign = (code << 21) >> 31;
      const second = (~((code >> 29) ^ sign) & 1) << 23;
      const third = (~((code >> 27) ^ sign) & 1) << 22;
      const low = ((code & 0x3ff) << 12) | ((code >>> 15) & 0xffe);
      return (origin + 4 + ((sign << 24) | second | third | low)) >>> 0;
    }
    case FIELD.call:
      return ((origin & ~3) + 4 + ((code << 8) >> 14) * 4) >>> 0;
    case FIELD.l32r:
      // The bits above the 16 are ones: a literal is always before the instruction.
      return (((origin + 3) & ~3) + ((((code >>> 8) & 0xffff) - 0x10000) << 2)) >>> 0;
    case FIELD.jal: {
      const high = ((code >> 31) << 20) | (code & 0xff000);
      return (origin + (high | ((code >> 9) & 0x800) | ((code >> 20) & 0x7fe))) >>> 0;
    }
    default:
      return code >>> 0;
  }
}

/** Whether an offset fits into a signed field of so many bits, and is a multiple of `unit`. */
function fits(offset: number, bits: number, unit: number): boolean {
  return offset % unit === 0 && (offset << (32 - bits)) >> (32 - bits) === offset;
}

/**
 * An instruction, or a word, with another address in its field; unchanged where the field cannot
 * hold it.
 *
 * @param origin where the new instruction is that a relative address counts from
 */
function withAddress(kind: number, code: number, origin: number, address: number): number {
  switch (kind) {
    case FIELD.word:
      return address;
    case FIELD.bl: {
      const offset = (address - origin - 4) | 0;
      if (!fits(offset, 25, 2)) return code;
      const sign = offset >>> 31;
      const second = (~((offset >> 23) ^ sign) & 1) << 29;
      const third = (~((offset >> 22) ^ sign) & 1) << 27;
      const low = (sign << 10) | ((offset >> 12) & 0x3ff) | ((offset & 0xffe) << 15);
      return (code & 0xd000f800) | second | third | low;
    }
    case FIELD.call: {
      const offset = (address - (origin & ~3) - 4) | 0;
      return fits(offset, 20, 4) ? (code & ~0xffffc0) | ((offset << 4) & 0xffffc0) : code;
    }
    case FIELD.l32r: {
      const offset = (address - ((origin + 3) & ~3)) | 0;
      const isNear = offset % 4 === 0 && offset < 0 && offset >= -0x40000;
      return isNear ? (code & ~0xffff00) | ((offset << 6) & 0xffff00) : code;
    }
    case FIELD.jal: {
      const offset = (address - origin) | 0;
      if (!fits(offset, 21, 2)) return code;
      const low = ((offset & 0x800) << 9) | ((offset & 0x7fe) << 20);
      return (code & 0xfff) | low | (offset & 0x800ff000);
    }
    default:
      return withHalf(kind, code, kind < FIELD.relativeUpper ? address : address - origin);
  }
}

/** A RISC-V instruction with a half of another value in it. */
function withHalf(kind: number, code: number, value: number): number {
  if (kind === FIELD.upper || kind === FIELD.relativeUpper) {
    // The lower half is signed.
    return (code & 0xfff) | ((value + 0x800) & ~0xfff);
  }
  if (!isStore(code)) return (code & 0xfffff) | (value << 20);
  return (code & 0x1fff07f) | ((value & 0xfe0) << 20) | ((value & 31) << 7);
}

/** Puts a field into a block; the part of it that is outside of the block is left out. */
function putField(block: Uint8Array, at: number, kind: number, code: number): void {
  const end = Math.min(at + FIELD_SIZES[kind]!, block.length);
  for (let place = Math.max(at, 0); place < end; place++) block[place] = code >> (8 * (place - at));
}

/**
 * Predicts a block for a copy.
 *
 * @param shift by how much the copy moves it
 */
function predictBlock(window: BlockWindow, prediction: Prediction, shift: number): Uint8Array {
  const { bytes, base, start, end } = window;
  // A copy, also of a Buffer, whose `slice` is none.
  const predicted = new Uint8Array(bytes.subarray(start, end));
  if (prediction.architecture === ARCHITECTURES.none) return predicted;
  visitFields(window, prediction, (kind, at, address, origin) => {
    const moved = predictedAddress(prediction, kind, address);
    const code = withAddress(kind, get32(bytes, at), origin + base + shift, moved);
    putField(predicted, at - start, kind, code);
  });
  return predicted;
}

/** What is predicted to become of the address in a field. */
function predictedAddress(prediction: Prediction, kind: number, address: number): number {
  const table = isAbsolute(kind) ? prediction.absolute : prediction.relative;
  return (address + table.at(address)) | 0;
}

// ──── Patch decoding ──────────────────────────────────────────────────────────────────────────────
// Makes new content of old content and a patch. Both may be larger than memory: the old is read in
// blocks where it lies, and the new comes in pieces. Whatever a patch says, nothing is read beyond
// the old content, and nothing comes beyond the new length.

/** Reads bytes of old content; throws when they cannot be read. */
type ReadOld = (from: number, length: number) => Uint8Array;

/** Reads the header of a patch. */
function readPatchHeader(patch: PatchReader) {
  const start = patch.take(PATCH_MAGIC.length);
  if (Buffer.compare(start, PATCH_MAGIC) !== 0) throw new Error("this is no patch of version 1");
  const hash = () => Buffer.from(patch.take(32)).toString("hex");
  const [oldSize, newSize] = [patch.number(MAX_CODED), patch.number(MAX_CODED)];
  return { oldSize, newSize, oldHash: hash(), newHash: hash() };
}

/**
 * Applies a patch.
 *
 * @param limit the most bytes that the new content may have
 * @returns pieces of the new content
 * @throws on a malformed patch, or one of other content
 */
export function* applyPatch(
  patch: Uint8Array,
  limit: number,
  { size, sha256, read }: Dictionary,
): Generator<Uint8Array> {
  const reader = new PatchReader(patch);
  const { oldSize, oldHash, newSize } = readPatchHeader(reader);
  if (oldSize !== size || oldHash !== sha256) throw new Error("another dictionary");
  if (newSize > limit) throw new Error(`more than ${limit} bytes`);
  yield* gather(applyPatchBody(reader, oldSize, newSize, read));
}

/** Size of the pieces in which new content comes; of fewer bytes, where these are small copies. */
const PATCHED_PIECE = 64 * 1024;
const MAX_GATHERED = 4096;

/** Makes small pieces into larger ones. */
function* gather(pieces: Iterable<Uint8Array>): Generator<Uint8Array> {
  let gathered: Uint8Array[] = [];
  let size = 0;
  for (const piece of pieces) {
    gathered.push(piece);
    size += piece.length;
    if (size < PATCHED_PIECE && gathered.length < MAX_GATHERED) continue;
    yield Buffer.concat(gathered);
    gathered = [];
    size = 0;
  }
  if (size > 0) yield Buffer.concat(gathered);
}

/**
 * Applies a patch from the architecture on.
 *
 * @param oldSize of the old content
 * @param newSize of the new content
 * @returns pieces of the new content
 * @throws on a patch that is malformed, or does not make exactly the new size
 */
function* applyPatchBody(
  patch: PatchReader,
  oldSize: number,
  newSize: number,
  read: ReadOld,
): Generator<Uint8Array> {
  const predictor = new BlockPredictor(patch.prediction(oldSize), oldSize, newSize, read);
  let [at, from] = [0, 0];
  while (at < newSize) {
    const insert = patch.number(newSize - at);
    if (insert > 0) yield patch.take(insert);
    at += insert;
    if (at === newSize) break;
    from += patch.signed(oldSize);
    if (from < 0 || from >= oldSize)
      throw new Error("the patch copies from beyond the old content");
    const most = Math.min(newSize - at, oldSize - from);
    const copied = yield* applyCopy(patch, { at, from, length: most }, predictor);
    if (copied === 0) throw new Error("the patch copies nothing");
    at += copied;
    from += copied;
  }
  if (patch.at !== patch.bytes.length) throw new Error("the patch goes on after its end");
}

/** Predicts blocks of old content, as many as a patch may have. */
class BlockPredictor {
  #left: number;

  constructor(
    private readonly prediction: Prediction,
    private readonly oldSize: number,
    newSize: number,
    private readonly read: ReadOld,
  ) {
    this.#left = maxBlocks(oldSize, newSize);
  }

  /** @param start of the block; @param shift by how much the copy moves it */
  block(start: number, shift: number): Uint8Array {
    if (this.#left-- === 0) throw new Error("the patch copies from too many places");
    return predictBlock(readWindow(start, this.oldSize, this.read), this.prediction, shift);
  }
}

/** Applies the tokens of a copy of at most `length` bytes; returns how many it made. */
function* applyCopy(
  patch: PatchReader,
  { at, from, length }: Cover,
  predictor: BlockPredictor,
): Generator<Uint8Array, number> {
  let done = 0;
  let block: Uint8Array = new Uint8Array(0);
  let start = -1;
  /** The predicted bytes from here to the end of the block, or as many as are wanted. */
  const next = (wanted: number) => {
    const place = from + done;
    const here = place - (place % BLOCK);
    if (here !== start) {
      start = here;
      block = predictor.block(start, at - from);
    }
    const piece = block.subarray(place - start, place - start + wanted);
    done += piece.length;
    return piece;
  };
  for (;;) {
    const token = patch.number((length - done) * 4 + 3);
    const adds = token % 4;
    let copied = (token - adds) / 4;
    if (copied + adds > length - done) throw new Error("the patch copies too much");
    while (copied > 0) {
      const piece = next(copied);
      copied -= piece.length;
      yield piece;
    }
    if (adds === 0) return done;
    for (const add of patch.take(adds)) {
      const [byte] = next(1);
      yield Uint8Array.of(byte! + add);
    }
  }
}

/** Reads a block of old content, and its margins. */
function readWindow(start: number, size: number, read: ReadOld): BlockWindow {
  const base = Math.max(0, start - MARGIN);
  const end = Math.min(size, start + BLOCK);
  const bytes = read(base, Math.min(size, end + MARGIN) - base);
  return { bytes, base, start: start - base, end: end - base };
}

// ──── Matching ────────────────────────────────────────────────────────────────────────────────────
// Where in old content some content is found: a long match, though not always the longest. (A suffix
// array finds that, but takes a second more for firmware of 2 MB, and patches are no smaller.)

/**
 * After so much work, in steps of a few nanoseconds, an encoder settles for what it has. Firmware of
 * 8 MB takes less than half of it, and rarely all; noise of two letters would take ten times as much.
 */
const MAX_WORK = 600_000_000;

/** Thrown when content would take too long to encode. */
class TooMuchWork extends Error {}

/** The work that an encoder may still do. */
class WorkBudget {
  #left = MAX_WORK;

  /** @throws {TooMuchWork} */
  spend(steps: number): void {
    this.#left -= steps;
    if (this.#left < 0) throw new TooMuchWork();
  }

  /** To find the fields in so many bytes. @throws {TooMuchWork} */
  scan({ architecture }: Prediction, length: number): void {
    // An instruction of RISC-V may be followed for 64 bytes.
    this.spend(length * (architecture === ARCHITECTURES.riscv ? 4 : 1) + BLOCK);
  }
}

/** A copy of fewer bytes costs more than the bytes. */
const MIN_MATCH = 5;
/** How many places are tried, the first in old content first. */
const MAX_TRIES = 32;

/** Finds matches in old content, by chains of the places where the same few bytes are. */
class Matcher {
  /** For each hash of `MIN_MATCH` bytes the first place where they may be, or -1. */
  readonly #first: Int32Array;
  /** For each place the next one with the same hash, or -1. */
  readonly #next: Int32Array;
  /** By how much a hash of 32 bits is shifted to be an index of `#first`. */
  readonly #hashShift: number;
  /** Of the match found last; its length is 0 when there was none. */
  length = 0;
  from = 0;
  /** By how much it is moved. */
  #moved = 0;

  constructor(
    private readonly old: Uint8Array,
    private readonly work: WorkBudget,
  ) {
    const bits = Math.min(21, Math.max(8, Math.ceil(Math.log2(old.length + 1))));
    this.#hashShift = 32 - bits;
    this.#first = new Int32Array(2 ** bits).fill(-1);
    this.#next = new Int32Array(old.length);
    for (let at = old.length - MIN_MATCH, run = 0; at >= 0; at--) {
      // Of a run of one byte only the start: all of it would fill a chain.
      run = old[at] === old[at + 1] ? run + 1 : 0;
      if (run >= MIN_MATCH && old[at] === old[at - 1]) continue;
      const hash = this.#hash(old, at);
      this.#next[at] = this.#first[hash]!;
      this.#first[hash] = at;
    }
  }

  /**
   * Sets `length` and `from` to the longest match that was found; of several, to the one that is
   * moved most like the last.
   */
  find(content: Uint8Array, at: number): void {
    this.length = 0;
    if (at + MIN_MATCH > content.length) return;
    const { old } = this;
    const likely = at - this.#moved;
    if (likely >= 0 && likely < old.length) this.#try(content, at, likely);
    let tries = 0;
    let from = this.#first[this.#hash(content, at)]!;
    for (; from >= 0 && tries < MAX_TRIES; from = this.#next[from]!, tries++) {
      // The last byte of a match that would be better, tried before all the others.
      const last = this.#isCloser(at, from) ? Math.max(0, this.length - 1) : this.length;
      if (old[from + last] === content[at + last]) this.#try(content, at, from);
    }
    this.work.spend(8 + 2 * tries);
    if (this.length > 0) this.#moved = at - this.from;
  }

  /** Takes the match at a place if it is better than the one found so far. */
  #try(content: Uint8Array, at: number, from: number): void {
    const { old } = this;
    const most = Math.min(old.length - from, content.length - at);
    let length = 0;
    while (length < most && old[from + length] === content[at + length]) length++;
    this.work.spend(length);
    if (length < MIN_MATCH || length < this.length) return;
    if (length === this.length && !this.#isCloser(at, from)) return;
    this.length = length;
    this.from = from;
  }

  /** Whether a match is moved more like the last one than the one found so far. */
  #isCloser(at: number, from: number): boolean {
    const likely = at - this.#moved;
    return Math.abs(likely - from) < Math.abs(likely - this.from);
  }

  /** The hash of the bytes at a place. */
  #hash(bytes: Uint8Array, at: number): number {
    const hash = Math.imul(get32(bytes, at), 0x9e3779b1) ^ Math.imul(bytes[at + 4]!, 0x85ebca6b);
    return Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d) >>> this.#hashShift;
  }
}

// ──── Address learning ────────────────────────────────────────────────────────────────────────────
// Learns from old content, new content, and copies between them, what becomes of which addresses.

/** What a table costs, about in bits. */
const TABLE_COST = {
  entry: 56,
  /** An address that changes otherwise than the table says. */
  missed: 14,
  /** One that does not change, but does by the table: it would have cost nothing without. */
  changed: 28,
} as const;

/** Addresses in old content, and what was added to each. */
class AddressSamples {
  /** Each sample is the address × 2^21 + the index in `#adds` of what was added. */
  #samples = new Float64Array(4096);
  #count = 0;
  readonly #adds = [0];
  readonly #indices = new Map<number, number>([[0, 0]]);

  add(address: number, add: number): void {
    let index = this.#indices.get(add);
    if (index === undefined) {
      index = this.#adds.length;
      if (index === 2 ** 21) return;
      this.#adds.push(add);
      this.#indices.set(add, index);
    }
    if (this.#count === this.#samples.length) {
      const larger = new Float64Array(2 * this.#count);
      larger.set(this.#samples);
      this.#samples = larger;
    }
    this.#samples[this.#count++] = address * 2 ** 21 + index;
  }

  /** The table that costs least, by its entries and by the addresses that it gets wrong. */
  table(): AddressTable {
    interface Entries extends TableEntry {
      last?: Entries;
    }
    /** For each amount the cheapest entries that end in adding it. All wrong is a cost of 0. */
    const paths = new Map<number, { cost: number; entries: Entries }>();
    const samples = this.#samples.subarray(0, this.#count).sort();
    let cheapest = { cost: 0, entries: { from: 0, add: 0 } as Entries };
    paths.set(0, cheapest);
    for (let k = 0; k < samples.length;) {
      const address = Math.floor(samples[k]! / 2 ** 21);
      const before = cheapest.entries;
      const cost = cheapest.cost + TABLE_COST.entry;
      while (Math.floor(samples[k]! / 2 ** 21) === address) {
        const sample = samples[k]!;
        const first = k;
        while (samples[k] === sample) k++;
        const add = this.#adds[sample % 2 ** 21]!;
        const path = paths.get(add) ?? { cost: Infinity, entries: before };
        paths.set(add, path);
        if (path.cost > cost) {
          path.cost = cost;
          path.entries = { from: address, add, last: before };
        }
        path.cost -= (k - first) * (add === 0 ? TABLE_COST.changed : TABLE_COST.missed);
        if (path.cost < cheapest.cost) cheapest = path;
      }
    }
    const entries: TableEntry[] = [];
    for (let entry: Entries | undefined = cheapest.entries; entry; entry = entry.last) {
      entries.push({ from: entry.from, add: entry.add });
    }
    entries.reverse();
    if (entries[0]!.add === 0) entries.shift();
    return new AddressTable(entries.slice(0, MAX_TABLE));
  }
}

/** The blocks of content that reach into [from, to); the last one ends at `to`. */
function* blocksOf(bytes: Uint8Array, from: number, to: number): Generator<BlockWindow> {
  for (let start = from - (from % BLOCK); start < to; start += BLOCK) {
    yield { bytes, base: 0, start, end: Math.min(to, start + BLOCK) };
  }
}

/**
 * Learns a prediction.
 *
 * @param prediction says where code is, and what to take for an address as far as that is known
 */
function learnAddresses(
  old: Uint8Array,
  content: Uint8Array,
  covers: readonly Cover[],
  prediction: Prediction,
  work: WorkBudget,
): Prediction {
  if (prediction.architecture === ARCHITECTURES.none) return prediction;
  const absolute = new AddressSamples();
  const relative = new AddressSamples();
  for (const { at: coverAt, from, length } of covers) {
    work.scan(prediction, length);
    const [end, shift] = [from + length, coverAt - from];
    for (const window of blocksOf(old, from, end)) {
      const visit: FieldVisitor = (kind, at, address, origin) => {
        // Each field once, and whole.
        if (at < window.start || Math.min(at, origin) < from) return;
        if (at + FIELD_SIZES[kind]! > end) return;
        work.spend(8);
        const now = actualAddress(old, content, kind, at, origin, shift);
        if (now === undefined) return;
        (isAbsolute(kind) ? absolute : relative).add(address, (now - address) | 0);
      };
      visitFields(window, prediction, visit, true);
    }
  }
  return { ...prediction, absolute: absolute.table(), relative: relative.table() };
}

/**
 * The address in a field of new content; `undefined` where there is no such field, and for an upper
 * half, of which the lower one says it all.
 */
function actualAddress(
  old: Uint8Array,
  content: Uint8Array,
  kind: number,
  at: number,
  origin: number,
  shift: number,
): number | undefined {
  const isSame = (place: number, mask: number) =>
    ((old[place]! ^ content[place + shift]!) & mask) === 0;
  switch (kind) {
    case FIELD.word:
      break;
    case FIELD.bl:
      if (!isSame(at + 1, 0xf8) || !isSame(at + 3, 0xd0)) return undefined;
      break;
    case FIELD.call:
    case FIELD.l32r:
      if (!isSame(at, 0x0f)) return undefined;
      break;
    case FIELD.jal:
      if (!isSame(at, 0x7f)) return undefined;
      break;
    case FIELD.lower:
    case FIELD.relativeLower: {
      if (!isSame(at, 0x7f) || !isSame(origin, 0x7f)) return undefined;
      const page = get32(content, origin + shift) & ~0xfff;
      const base = kind === FIELD.lower ? 0 : origin + shift;
      return (page + lowerOf(get32(content, at + shift)) + base) >>> 0;
    }
    default:
      return undefined;
  }
  return addressOf(kind, get32(content, at + shift), at + shift);
}

/** Old content as it is predicted, for copies that are moved by whatever amount. */
class PredictedContent {
  /** As it is predicted for a copy that is not moved. */
  readonly bytes: Uint8Array;
  /** For each byte of a relative field, its kind × 4 + the index of the byte in it; else 0. */
  readonly #fields: Uint8Array;
  /** Where a relative field begins, the address that it will have. */
  readonly #addresses: Int32Array;

  constructor(
    private readonly old: Uint8Array,
    prediction: Prediction,
  ) {
    const { length } = old;
    this.bytes = new Uint8Array(old);
    this.#fields = new Uint8Array(length);
    const hasRelative = prediction.architecture > ARCHITECTURES.words;
    this.#addresses = new Int32Array(hasRelative ? length : 0);
    if (prediction.architecture === ARCHITECTURES.none) return;
    for (const window of blocksOf(old, 0, length)) {
      const { start, end } = window;
      const bytes = this.bytes.subarray(start, end);
      const fields = this.#fields.subarray(start, end);
      visitFields(window, prediction, (kind, at, address, origin) => {
        const moved = predictedAddress(prediction, kind, address);
        putField(bytes, at - start, kind, withAddress(kind, get32(old, at), origin, moved));
        const isRelative = !isAbsolute(kind);
        // In each byte kind × 4, and its index.
        putField(fields, at - start, kind, isRelative ? kind * 0x04040404 + 0x03020100 : 0);
        // A lower half of RISC-V counts from its upper one; here, as all others, from itself.
        if (isRelative) this.#addresses[at] = moved + at - origin;
      });
    }
  }

  get length(): number {
    return this.bytes.length;
  }

  /** The byte at a place, in a copy that moves it by `shift`. */
  at(from: number, shift: number): number {
    const field = this.#fields[from]!;
    if (field === 0) return this.bytes[from]!;
    const index = field & 3;
    const at = from - index;
    const code = withAddress(field >> 2, get32(this.old, at), at + shift, this.#addresses[at]!);
    return (code >> (8 * index)) & 0xff;
  }
}

// ──── Matched covers ─────────────────────────────────────────────────────────────────────────────
// What to copy from where, by exact matches that are extended over differences, much as bsdiff does
// (Percival, "Naive Differences of Executable Code", 2003). It is enough to learn from.

/** A match begins a copy if it has more right than the copy before it would, by more than this. */
const SLACK = 8;

/** Covers by exact matches. */
function matchedCovers(matcher: Matcher, old: Uint8Array, content: Uint8Array): Cover[] {
  const covers: Cover[] = [];
  let last: Cover = { at: 0, from: 0, length: 0 };
  let misses = 0;
  for (let at = 0; at < content.length;) {
    matcher.find(content, at);
    const { from, length } = matcher;
    const shift = last.at - last.from;
    let right = 0;
    for (let k = at; k < at + length; k++) if (old[k - shift] === content[k]) right++;
    if (length > right + SLACK) {
      const next = { at, from, length };
      divideBetween(old, content, last, next);
      if (last.length > 0) covers.push(last);
      last = next;
      misses = 0;
    }
    // Within a match, and where nothing matches, not every place need be looked at.
    if (length > 0 && (last.at === at || length === right)) at += length;
    else at += 1 + (length >> 4) + (length < SLACK ? misses++ >> 8 : 0);
  }
  divideBetween(old, content, last, { at: content.length, from: 0, length: 0 });
  if (last.length > 0) covers.push(last);
  return covers;
}

/** Divides what is between two matches: the first grows forward, the second back. */
function divideBetween(old: Uint8Array, content: Uint8Array, last: Cover, next: Cover): void {
  const isRight = (cover: Cover, at: number) => old[cover.from + at - cover.at] === content[at];
  // Each as far as at least half of it is right.
  last.length = 0;
  for (let at = last.at, right = 0, best = 0; at < next.at; at++) {
    if (isRight(last, at)) right++;
    const gain = 2 * right - (at + 1 - last.at);
    if (gain <= best) continue;
    best = gain;
    last.length = at + 1 - last.at;
  }
  let begin = next.at;
  const lowest = Math.max(last.at, next.at - next.from);
  for (let at = next.at - 1, right = 0, best = 0; at >= lowest; at--) {
    if (isRight(next, at)) right++;
    const gain = 2 * right - (next.at - at);
    if (gain <= best) continue;
    best = gain;
    begin = at;
  }
  // Where they overlap, they part where most is right.
  const end = last.at + last.length;
  if (begin < end) {
    let split = begin;
    for (let at = begin, gain = 0, best = 0; at < end; at++) {
      gain += Number(isRight(last, at)) - Number(isRight(next, at));
      if (gain <= best) continue;
      best = gain;
      split = at + 1;
    }
    last.length = split - last.at;
    begin = split;
  }
  next.from -= next.at - begin;
  next.length += next.at - begin;
  next.at = begin;
}

// ──── Cheapest covers ────────────────────────────────────────────────────────────────────────────
// What to copy from where, once addresses are predicted: the cheapest way through the content. It is
// found byte by byte, by following for each shift (how far a copy is moved) the cheapest path that
// ends in a copy with it.

/** What the parts of a patch cost once it is compressed, about in bits. */
const COST = {
  /** A byte that is copied as predicted. */
  right: 0.05,
  /** One to which something is added: the first, and another after it. */
  wrong: 9,
  wrongAgain: 8,
  /** A byte that is inserted. */
  insert: 5,
  /** To begin a copy, and to begin inserting. */
  seek: 36,
  beginInsert: 10.8,
} as const;

/** How many shifts are followed at once. */
const MAX_PATHS = 64;
/** A copy may begin so many bytes before what matches exactly. */
const LEAD = 64;
/**
 * How many more bytes may be wrong than right before a shift is no longer followed: at first, and at
 * most, however much was right.
 */
const PATIENCE = { first: 96, most: 128 } as const;

/** A part of a path: a copy that is moved by `shift`; without one, bytes that are inserted. */
interface PathStep {
  at: number;
  shift: number | undefined;
  last: PathStep | undefined;
}

/** The cheapest path up to the place reached that ends in a part with this shift. */
interface Path {
  shift: number | undefined;
  cost: number;
  /** Whether its last byte is wrong. */
  isWrong: boolean;
  /** See `PATIENCE`. */
  patience: number;
  /** Where its last part begins. */
  since: number;
  /** The part before that. */
  last: PathStep | undefined;
  /** Its last part, once another path continues it. */
  step: PathStep | undefined;
}

function stepOf(path: Path): PathStep {
  path.step ??= { at: path.since, shift: path.shift, last: path.last };
  return path.step;
}

/** Makes a path the continuation of another from a place on. */
function switchTo(path: Path, at: number, other: Path, cost: number): void {
  path.last = stepOf(other);
  path.step = undefined;
  path.since = at;
  path.cost = cost;
  path.isWrong = false;
}

function newPath(shift: number | undefined): Path {
  const patience = PATIENCE.first;
  return { shift, cost: 0, isWrong: false, patience, since: 0, last: undefined, step: undefined };
}

// Where a copy may begin, and its shift, as one number: these sort by place.
const packBegin = ({ at, from }: Cover) => Math.max(0, at - LEAD) * 2 ** 25 + (at - from) + 2 ** 24;
const beginOf = (packed: number) => Math.floor(packed / 2 ** 25);
const shiftOf = (packed: number) => (packed % 2 ** 25) - 2 ** 24;

/** Where copies may begin, in order: where the known ones do, and where else something matches. */
function findBegins(matcher: Matcher, content: Uint8Array, covers: readonly Cover[]): Float64Array {
  const begins = covers.map(packBegin);
  for (let at = 0; at + MIN_MATCH <= content.length;) {
    matcher.find(content, at);
    const { from, length } = matcher;
    if (length > 0) begins.push(packBegin({ at, from, length }));
    // Before this match ends, another one may begin that goes on for longer.
    at += Math.max(1, length - 12);
  }
  return Float64Array.from(begins).sort();
}

/**
 * Finds the cheapest covers.
 *
 * @param covers that are known, which are a good start
 * @throws {TooMuchWork}
 */
function cheapestCovers(
  old: PredictedContent,
  content: Uint8Array,
  covers: readonly Cover[],
  work: WorkBudget,
): Cover[] {
  const begins = findBegins(new Matcher(old.bytes, work), content, covers);
  return new CoverSearch(old, content, begins, work).covers();
}

/** The search for the cheapest covers. */
class CoverSearch {
  readonly #inserted = newPath(undefined);
  readonly #copies: Path[] = [];
  /** The next of `begins`. */
  #next = 0;
  /** The cheapest path up to the place reached. */
  #cheapest = this.#inserted;
  /** What the cheapest other copy costs. */
  #second = Infinity;

  /** @param begins see `findBegins` */
  constructor(
    private readonly old: PredictedContent,
    private readonly content: Uint8Array,
    private readonly begins: Float64Array,
    private readonly work: WorkBudget,
  ) {}

  /** @throws {TooMuchWork} */
  covers(): Cover[] {
    const { length } = this.content;
    for (let at = 0; ; at++) {
      this.#compare();
      at = this.#passRight(at);
      if (at === length) break;
      this.#begin(at);
      this.#advance(at);
    }
    const covers: Cover[] = [];
    let end = length;
    for (let step: PathStep | undefined = stepOf(this.#cheapest); step; step = step.last) {
      const { at, shift } = step;
      if (shift !== undefined && end > at) covers.push({ at, from: at - shift, length: end - at });
      end = at;
    }
    return covers.reverse();
  }

  /** Finds the cheapest path. */
  #compare(): void {
    let cheapest = this.#inserted;
    let second = Infinity;
    for (const path of this.#copies) {
      if (path.cost < cheapest.cost) {
        if (cheapest !== this.#inserted) second = cheapest.cost;
        cheapest = path;
      } else if (path.cost < second) second = path.cost;
    }
    this.#cheapest = cheapest;
    this.#second = second;
  }

  /**
   * Takes the cheapest path to the end of what it has right, once all others are so far behind that
   * they cannot do better than to begin anew after it.
   *
   * @returns the place reached
   */
  #passRight(at: number): number {
    const cheapest = this.#cheapest;
    const { shift, cost } = cheapest;
    const isAhead =
      this.#second >= cost + COST.seek - 0.01 && this.#inserted.cost >= cost + COST.beginInsert;
    if (shift === undefined || !isAhead) return at;
    const { begins, content, old } = this;
    const due = this.#next < begins.length ? beginOf(begins[this.#next]!) : Infinity;
    const limit = Math.min(content.length, old.length + shift, due);
    let end = at;
    while (end < limit && old.at(end - shift, shift) === content[end]) end++;
    if (end <= at) return at;
    this.work.spend(end - at);
    cheapest.cost += (end - at) * COST.right;
    cheapest.isWrong = false;
    this.#inserted.cost = Infinity;
    for (const path of this.#copies) if (path !== cheapest) path.cost = Infinity;
    return end;
  }

  /** Begins the copies that may begin here. */
  #begin(at: number): void {
    for (; this.#copies.length < MAX_PATHS; this.#next++) {
      const begin = this.begins[this.#next];
      if (begin === undefined || beginOf(begin) > at) return;
      const shift = shiftOf(begin);
      const isInside = at >= shift && at - shift < this.old.length;
      if (!isInside || this.#copies.some((path) => path.shift === shift)) continue;
      const path = newPath(shift);
      switchTo(path, at, this.#cheapest, this.#cheapest.cost + COST.seek);
      this.#copies.push(path);
    }
  }

  /** Takes all paths over one byte. */
  #advance(at: number): void {
    const cheapest = this.#cheapest;
    const inserted = this.#inserted;
    const insert = cheapest.cost + COST.beginInsert;
    const seek = cheapest.cost + COST.seek;
    // When there is no room for more, those are given up that would have to begin anew.
    const most = this.#copies.length < MAX_PATHS ? Infinity : seek;
    if (inserted.cost > insert) switchTo(inserted, at, cheapest, insert);
    inserted.cost += COST.insert;
    const { old } = this;
    const copies = this.#copies;
    const byte = this.content[at];
    this.work.spend(8 + 4 * copies.length);
    let kept = 0;
    for (let k = 0; k < copies.length; k++) {
      const path = copies[k]!;
      const from = at - path.shift!;
      if (path.cost > most || path.patience < 0 || from >= old.length) continue;
      if (path.cost > seek) switchTo(path, at, cheapest, seek);
      if (old.at(from, path.shift!) === byte) {
        path.cost += COST.right;
        path.isWrong = false;
        path.patience = Math.min(path.patience + 1, PATIENCE.most);
      } else {
        path.cost += path.isWrong ? COST.wrongAgain : COST.wrong;
        path.isWrong = true;
        path.patience--;
      }
      copies[kept++] = path;
    }
    copies.length = kept;
  }
}

// ──── Patch encoding ──────────────────────────────────────────────────────────────────────────────
// Makes a patch: finds what to copy, learns what to predict, and writes it down.

/** There is no patch when less than this of the new content is copied. */
const MIN_COMMON = 1 / 16;
/**
 * Better copies teach more of the addresses, and that finds better copies: another round is made
 * when the last one made the patch smaller by this.
 */
const MIN_GAIN = 1 / 64;
const MAX_ROUNDS = 3;

/**
 * Makes new content into a patch of old content.
 *
 * @returns `undefined` where they have too little in common, or where it would take too long
 */
export function encodePatch(old: Uint8Array, content: Uint8Array): Uint8Array | undefined {
  const body = unlessTooMuch(() => encodePatchBody(old, content));
  if (!body) return undefined;
  const header = new PatchWriter();
  header.take(PATCH_MAGIC);
  header.number(old.length);
  header.number(content.length);
  for (const end of [old, content]) header.take(Buffer.from(sha256(end), "hex"));
  header.take(body);
  return header.bytes;
}

/** The result of work; `undefined` when it was too much. */
function unlessTooMuch<T>(work: () => T): T | undefined {
  try {
    return work();
  } catch (error) {
    if (error instanceof TooMuchWork) return undefined;
    throw error;
  }
}

/** A patch from the architecture on. */
function encodePatchBody(old: Uint8Array, content: Uint8Array): Uint8Array | undefined {
  const work = new WorkBudget();
  const matched = matchedCovers(new Matcher(old, work), old, content);
  const common = matched.reduce((sum, { length }) => sum + length, 0);
  if (common < content.length * MIN_COMMON) return undefined;
  let covers = withinBlocks(matched, old, content);
  let best = bestPrediction(old, content, covers, work);
  for (let round = 0; round < MAX_ROUNDS; round++) {
    const better = unlessTooMuch(() => {
      work.scan(best.prediction, old.length);
      const predicted = new PredictedContent(old, best.prediction);
      covers = withinBlocks(cheapestCovers(predicted, content, covers, work), old, content);
      const learned = learnAddresses(old, content, covers, best.prediction, work);
      return draft(old, content, covers, learned, work);
    });
    const gain = better ? best.size - better.size : 0;
    if (better && gain > 0) best = better;
    if (gain < best.size * MIN_GAIN) break;
  }
  return best.patch;
}

/** Covers that predict no more blocks than a patch may: without the shortest, if need be. */
function withinBlocks(covers: Cover[], old: Uint8Array, content: Uint8Array): Cover[] {
  const blocks = ({ from, length }: Cover) =>
    Math.floor((from + length - 1) / BLOCK) - Math.floor(from / BLOCK) + 1;
  let over = -maxBlocks(old.length, content.length);
  for (const cover of covers) over += blocks(cover);
  const dropped = new Set<Cover>();
  for (const cover of over > 0 ? covers.toSorted((a, b) => a.length - b.length) : []) {
    if (over <= 0) break;
    over -= blocks(cover);
    dropped.add(cover);
  }
  return dropped.size === 0 ? covers : covers.filter((cover) => !dropped.has(cover));
}

/** A patch that may be sent, from the architecture on. */
interface Draft {
  patch: Uint8Array;
  prediction: Prediction;
  /** About its size once it is compressed. */
  size: number;
}

function draft(
  old: Uint8Array,
  content: Uint8Array,
  covers: readonly Cover[],
  prediction: Prediction,
  work: WorkBudget,
): Draft {
  const patch = writePatch(old, content, covers, prediction, work);
  return { patch, prediction, size: zlib.deflateRawSync(patch, { level: 1 }).length };
}

/** Learns what to predict, for each architecture that the content may be for; keeps the best. */
function bestPrediction(
  old: Uint8Array,
  content: Uint8Array,
  covers: readonly Cover[],
  work: WorkBudget,
): Draft {
  const image = espImage(old);
  const code = [[0, old.length]] as const;
  const { words, thumb, xtensa, riscv } = ARCHITECTURES;
  const candidates = image
    ? [image]
    : [
        { architecture: words, code: [] },
        ...[thumb, xtensa, riscv].map((architecture) => ({ architecture, code })),
      ];
  let best = draft(old, content, covers, NO_PREDICTION, work);
  for (const candidate of candidates) {
    const unlearned = { ...NO_PREDICTION, ...candidate };
    const learned = learnAddresses(old, content, covers, unlearned, work);
    const one = draft(old, content, covers, learned, work);
    if (one.size < best.size) best = one;
  }
  return best;
}

/** Espressif's chips with Xtensa cores, by their number in an image: ESP32, S2, S3. */
const XTENSA_CHIPS = [0, 2, 9];

/**
 * Where code is in an image for an ESP32 (ESP-IDF, "App Image Format"); `undefined` for anything
 * else.
 */
function espImage(old: Uint8Array): Pick<Prediction, "architecture" | "code"> | undefined {
  if (old[0] !== 0xe9 || old.length < 24) return undefined;
  const isXtensa = XTENSA_CHIPS.includes(get16(old, 12));
  const code: [number, number][] = [];
  let at = 24;
  for (let left = old[1]!; left > 0; left--) {
    if (at + 8 > old.length) return undefined;
    const [address, length] = [get32(old, at) >>> 0, get32(old, at + 4) >>> 0];
    at += 8;
    if (length > old.length - at) return undefined;
    // There instructions are loaded.
    if (address >>> 28 === 4 && length > 0) code.push([at, at + length]);
    at += length;
  }
  const { xtensa, riscv } = ARCHITECTURES;
  return code.length > MAX_CODE_RANGES
    ? undefined
    : { architecture: isXtensa ? xtensa : riscv, code };
}

/** Writes a patch from the architecture on. */
function writePatch(
  old: Uint8Array,
  content: Uint8Array,
  covers: readonly Cover[],
  prediction: Prediction,
  work: WorkBudget,
): Uint8Array {
  const patch = new PatchWriter();
  patch.prediction(prediction);
  let [at, from] = [0, 0];
  for (const cover of covers) {
    work.scan(prediction, cover.length);
    patch.number(cover.at - at);
    patch.take(content.subarray(at, cover.at));
    patch.signed(cover.from - from);
    writeCopy(patch, old, content, cover, prediction);
    at = cover.at + cover.length;
    from = cover.from + cover.length;
  }
  if (at < content.length) {
    patch.number(content.length - at);
    patch.take(content.subarray(at));
  }
  return patch.bytes;
}

/** Writes the tokens of a copy. */
function writeCopy(
  patch: PatchWriter,
  old: Uint8Array,
  content: Uint8Array,
  { at, from, length }: Cover,
  prediction: Prediction,
): void {
  let right = 0;
  const adds: number[] = [];
  const flush = () => {
    if (adds.length === 0) return;
    patch.number(right * 4 + adds.length);
    patch.take(adds);
    adds.length = right = 0;
  };
  for (const window of blocksOf(old, from, from + length)) {
    const { start, end } = window;
    const predicted = predictBlock(window, prediction, at - from);
    for (let k = Math.max(start, from); k < end; k++) {
      const add = (content[at - from + k]! - predicted[k - start]!) & 0xff;
      if (add === 0 || adds.length === 3) flush();
      if (add === 0) right++;
      else adds.push(add);
    }
  }
  flush();
  patch.number(right * 4);
}

// ──── Patch threads ───────────────────────────────────────────────────────────────────────────────
// Patches are made beside the thread that answers requests, in workers that run this very file.

/** Marks a worker of ours, to this file in it. */
const PATCH_WORKER = "ota.ts: patches";
/** After a job with more content than this, in bytes, a worker ends, which frees its memory. */
const SMALL_PATCH = 256 * 1024;
/** How long a worker waits for another job, in milliseconds. */
const PATCH_WORKER_REST = 10_000;

/** Threads that make patches: one for each job at a time, of which the caller bounds the number. */
class PatchThreads {
  readonly #idle = new Map<threads.Worker, Timer>();

  /** Does what `encodePatch` does; see there. Rejects when the thread fails. */
  async encode(old: Uint8Array, content: Uint8Array): Promise<Uint8Array | undefined> {
    const worker = this.#take();
    let mayRest = false;
    try {
      const done = new Promise<Uint8Array | undefined>((resolve, reject) => {
        worker.once("message", resolve);
        worker.once("error", reject);
        worker.once("exit", () => reject(new Error("the thread that makes patches has ended")));
      });
      worker.postMessage([old, content]);
      const patch = await done;
      mayRest = old.length + content.length <= SMALL_PATCH;
      return patch;
    } finally {
      worker.removeAllListeners();
      // An error that nobody listens for would end the process.
      worker.on("error", () => {});
      if (mayRest) this.#rest(worker);
      else this.#end(worker);
    }
  }

  #take(): threads.Worker {
    for (const [worker, end] of this.#idle) {
      this.#idle.delete(worker);
      clearTimeout(end);
      return worker;
    }
    const worker = new threads.Worker(new URL(import.meta.url), { workerData: PATCH_WORKER });
    // It must not keep the process running.
    worker.unref();
    return worker;
  }

  #rest(worker: threads.Worker): void {
    const end = setTimeout(() => this.#end(worker), PATCH_WORKER_REST);
    this.#idle.set(worker, end);
    worker.once("exit", () => this.#idle.delete(worker));
    end.unref();
  }

  #end(worker: threads.Worker): void {
    this.#idle.delete(worker);
    // What cannot be ended has ended.
    worker.terminate().catch(() => {});
  }
}

/** Size of the cache of patches that are not compressed yet, in bytes. */
const PATCH_BUDGET = 8 * 1024 * 1024;

/** Makes each patch once, however it is compressed then. */
class Patches {
  readonly #threads = new PatchThreads();
  readonly #done = new Cache<{ patch: Uint8Array | undefined }>(PATCH_BUDGET);
  readonly #running = new SingleFlight<Uint8Array | undefined>();

  /**
   * Does what `encodePatch` does; see there. Rejects when its thread fails.
   *
   * @param pair tells this pair of contents from all others
   */
  async make(old: Uint8Array, content: Uint8Array, pair: string): Promise<Uint8Array | undefined> {
    if (!canRunWorkers) return undefined;
    const done = this.#done.get(pair);
    if (done) return done.patch;
    return this.#running.run(pair, async () => {
      const patch = await this.#threads.encode(old, content);
      this.#done.set(pair, { patch }, patch?.byteLength ?? 0);
      return patch;
    });
  }
}

const patches = new Patches();

/** What a worker does. */
function servePatches(port: threads.MessagePort): void {
  port.on("message", ([old, content]: [Uint8Array, Uint8Array]) => {
    port.postMessage(encodePatch(old, content));
  });
}

// ──── Codings ─────────────────────────────────────────────────────────────────────────────────────
// Whoever adds a coding adds it to the table `CODINGS`, and nowhere else. `dcz` is RFC 9842,
// Compression Dictionary Transport: a zstd frame made with the file that the device has as its
// dictionary, so that only what changed is sent. We depart from the RFC in two ways: plain http will
// do, and a device may name any content that the server knows, without `Use-As-Dictionary`. Patches
// are asked for in the same way. They are compressed by a second coding, which the device can undo:
// a board has `deflate`.

/** Content that both ends have, to encode other content against. */
interface Dictionary {
  size: number;
  /** Lowercase hex. */
  sha256: string;
  /** Reads bytes of it; throws when it cannot. */
  read: ReadOld;
}

/** A content coding (RFC 9110, 8.4.1) that needs nothing else. */
interface PlainCodec {
  needsDictionary: false;
  /** Content larger than this is left to the codings after it; absent: none is. */
  most?: number;
  /** Whether it is only for boards: we can decode others that are smaller. */
  isForBoards?: boolean;
  /**
   * Encodes off the event loop.
   *
   * @param level compression level; absent: the smallest result that is worth its time
   */
  encode(content: Uint8Array, level?: number): Promise<Uint8Array>;
  /**
   * Decodes.
   *
   * @param limit the most bytes that the result may have
   * @throws on malformed input, or a result beyond the limit
   */
  decode(bytes: Uint8Array, limit: number): Uint8Array;
}

/** A content coding, or two of them, that encodes against older content that both ends have. */
interface DeltaCodec {
  needsDictionary: true;
  isForBoards?: boolean;
  /**
   * Encodes off the event loop; gives `undefined` where it is not worth its time.
   *
   * @param pair tells this pair of contents from all others
   */
  encode(content: Uint8Array, old: Uint8Array, pair: string): Promise<Uint8Array | undefined>;
  /**
   * Decodes.
   *
   * @param limit the most bytes that the result may have
   * @returns pieces of the result
   * @throws on malformed input, another dictionary, or a result beyond the limit
   */
  decode(bytes: Uint8Array, limit: number, old: Dictionary): Iterable<Uint8Array>;
}

/**
 * Content and dictionaries larger than this are not coded: both ends hold them in memory, several
 * at a time, and a window of this size is what RFC 9842 lets every decoder have.
 */
export const MAX_CODED = 8 * 1024 * 1024;

/** The fixed part of a dcz header (RFC 9842, section 5); the dictionary's SHA-256 follows. */
const DCZ_MAGIC = Buffer.from("5e2a4d1820000000", "hex");

/** Above this size zstd's level 19 takes seconds, and 12 a fraction of one. */
const MAX_BEST = 2 * 1024 * 1024;
/** Level 22 gains less than 1 % over level 19. */
const bestLevel = (size: number) => (size <= MAX_BEST ? 19 : 12);

/**
 * Above this size brotli takes hundreds of milliseconds, five times as long as zstd's level 19, and
 * gains 5 % over it; of a page of text it is 10 to 15 %.
 */
const MAX_BROTLI = 128 * 1024;
/** Below this quality brotli gains nothing over zstd's level 1. */
const MIN_QUALITY = 5;
/** A window of 1 KiB, which fits into the memory of a board, and costs patches 1 to 3 %. */
const BOARD_WINDOW = 10;

const gzipAsync = promisify(zlib.gzip);
const deflateAsync = promisify(zlib.deflate);
const brotliAsync = promisify(zlib.brotliCompress);
const zstdAsync = promisify(zlib.zstdCompress);

const dczHeader = (sha256: string) => Buffer.concat([DCZ_MAGIC, Buffer.from(sha256, "hex")]);

const dcz: DeltaCodec = {
  needsDictionary: true,
  async encode(content, old) {
    // The window holds all of the dictionary and the content, and no more.
    const window = Math.ceil(Math.log2(content.byteLength + old.byteLength + 1));
    const params = {
      [zlib.constants.ZSTD_c_compressionLevel]: bestLevel(content.byteLength),
      [zlib.constants.ZSTD_c_windowLog]: Math.min(23, Math.max(10, window)),
    };
    const frame = await zstdAsync(content, { params, dictionary: Buffer.from(old) });
    return Buffer.concat([dczHeader(sha256(old)), frame]);
  },
  *decode(bytes, limit, old) {
    const header = dczHeader(old.sha256);
    if (!header.equals(bytes.subarray(0, header.length))) throw new Error("another dictionary");
    const dictionary = Buffer.from(old.read(0, old.size));
    const options = { maxOutputLength: limit, dictionary };
    yield zlib.zstdDecompressSync(bytes.subarray(header.length), options);
  },
};

const brotli: PlainCodec = {
  needsDictionary: false,
  most: MAX_BROTLI,
  encode: (content, level = zlib.constants.BROTLI_MAX_QUALITY) => {
    const params = {
      [zlib.constants.BROTLI_PARAM_QUALITY]: Math.max(level, MIN_QUALITY),
      [zlib.constants.BROTLI_PARAM_SIZE_HINT]: content.byteLength,
    };
    return brotliAsync(content, { params });
  },
  decode: (bytes, limit) => zlib.brotliDecompressSync(bytes, { maxOutputLength: limit }),
};

const zstd: PlainCodec = {
  needsDictionary: false,
  encode: (content, level = bestLevel(content.byteLength)) => Bun.zstdCompress(content, { level }),
  decode: (bytes, limit) => zlib.zstdDecompressSync(bytes, { maxOutputLength: limit }),
};

const gzip: PlainCodec = {
  needsDictionary: false,
  encode: (content, level = 9) => gzipAsync(content, { level }),
  decode: (bytes, limit) => zlib.gunzipSync(bytes, { maxOutputLength: limit }),
};

const deflate: PlainCodec = {
  needsDictionary: false,
  isForBoards: true,
  encode: (content) => deflateAsync(content, { level: 9, memLevel: 9, windowBits: BOARD_WINDOW }),
  decode: (bytes, limit) => zlib.inflateSync(bytes, { maxOutputLength: limit }),
};

/** Of a patch that is larger, brotli's best quality takes 4 s a MiB, and gains 3 to 5 % over 9. */
const MAX_BEST_PATCH = 1024 * 1024;
const FAST_QUALITY = 9;

/** A patch, compressed by another coding. */
function patchIn({ encode, decode, isForBoards = false }: PlainCodec): DeltaCodec {
  return {
    needsDictionary: true,
    isForBoards,
    async encode(content, old, pair) {
      const patch = await patches.make(old, content, pair);
      return patch && encode(patch, patch.byteLength > MAX_BEST_PATCH ? FAST_QUALITY : undefined);
    },
    decode: (bytes, limit, old) => applyPatch(decode(bytes, maxPatch(limit)), limit, old),
  };
}

/** By what stands in `Content-Encoding`, in order of preference. */
const CODINGS = {
  "ota-patch, br": patchIn(brotli),
  "ota-patch, deflate": patchIn(deflate),
  dcz,
  br: brotli,
  zstd,
  gzip,
  deflate,
} satisfies Record<string, PlainCodec | DeltaCodec>;

/** The name of a coding. */
export type Coding = keyof typeof CODINGS;
type PlainCoding = {
  [name in Coding]: (typeof CODINGS)[name] extends PlainCodec ? name : never;
}[Coding];
/** How the bytes of a body are coded; `identity`: not at all. */
export type Encoding = Coding | "identity";

const ALL_CODINGS = Object.keys(CODINGS) as Coding[];

const isPlainCoding = (name: Coding): name is PlainCoding => !CODINGS[name].needsDictionary;

/**
 * Decodes content.
 *
 * @param limit the most bytes that the result may have
 * @param old the dictionary that was offered
 * @returns pieces of the result
 * @throws on malformed input, another dictionary, or a result beyond the limit
 */
function decodeContent(
  encoding: Encoding,
  bytes: Uint8Array,
  limit: number,
  old?: Dictionary,
): Iterable<Uint8Array> {
  if (encoding === "identity") return [bytes];
  const codec = CODINGS[encoding];
  const most = Math.max(1, limit);
  if (!codec.needsDictionary) return [codec.decode(bytes, most)];
  if (!old) throw new Error("no dictionary was offered");
  return codec.decode(bytes, most, old);
}

// ──── Negotiation ────────────────────────────────────────────────────────────────────────────────
// Which codings a device asks for, and which of them a server may use (RFC 9110, 12.5.3; RFC 9842).

/** The coding that a `Content-Encoding` header names; `undefined` for one that is not ours. */
function encodingOf(header: string | null): Encoding | undefined {
  const names = (header ?? "identity").toLowerCase().split(",");
  const name = names.map((part) => part.trim()).join(", ");
  return name === "identity" || Object.hasOwn(CODINGS, name) ? (name as Encoding) : undefined;
}

/** The codings that we ask for: all, or those that need no dictionary; in order of preference. */
function codings(hasDictionary: boolean): Coding[] {
  const ours = ALL_CODINGS.filter((name) => !CODINGS[name].isForBoards);
  return hasDictionary ? ours : ours.filter(isPlainCoding);
}

/** An `Accept-Encoding` header that accepts codings. */
function acceptEncoding(accepted: readonly Encoding[]): string {
  return [...new Set(accepted.flatMap((name) => name.split(", ")))].join(", ");
}

const NO_CODINGS: ReadonlySet<Coding> = new Set();

/** The codings of ours that an `Accept-Encoding` header accepts; `q=0` means no. */
function acceptedCodings(header: string | null): ReadonlySet<Coding> {
  if (header === null) return NO_CODINGS;
  const named = new Set<string>();
  for (const item of header.toLowerCase().split(",")) {
    const [name = "", ...parameters] = item.split(";").map((part) => part.trim());
    if (!parameters.some((parameter) => /^q=0(\.0*)?$/.test(parameter))) named.add(name);
  }
  return new Set(ALL_CODINGS.filter((name) => name.split(", ").every((part) => named.has(part))));
}

/** The preferred one of the accepted codings that need no dictionary, for content of a size. */
function bestWithoutDictionary(
  accepted: ReadonlySet<Coding>,
  size: number,
): PlainCoding | undefined {
  if (accepted.size === 0) return undefined;
  const isFit = (name: PlainCoding) => accepted.has(name) && size <= (CODINGS[name].most ?? size);
  return ALL_CODINGS.filter(isPlainCoding).find(isFit);
}

/** The accepted codings that need a dictionary; of those of a patch the preferred one. */
function withDictionary(accepted: ReadonlySet<Coding>): Coding[] {
  const names = ALL_CODINGS.filter((name) => accepted.has(name) && !isPlainCoding(name));
  return names.filter((name, index) => index === 0 || !name.startsWith("ota-patch"));
}

/** The SHA-256, lowercase hex, in an `Available-Dictionary: :base64:`; `undefined` for none. */
function availableDictionary(header: string | null): string | undefined {
  const base64 = /^:([A-Za-z0-9+/]{43}=):$/.exec(header?.trim() ?? "")?.[1];
  return base64 === undefined ? undefined : Buffer.from(base64, "base64").toString("hex");
}

// ──── Inline content ──────────────────────────────────────────────────────────────────────────────
// Content inside a manifest, for clients that ask with `brief=1`: a request and its headers are
// more than what changes in a page of text. The manifest states its size and SHA-256, as of all
// content, and against these it is checked.

/** Content inside a manifest, and older content that it is coded with, has at most so many bytes. */
const MAX_INLINE = 64 * 1024;

/**
 * Puts content into a manifest.
 *
 * @param coded as `CODINGS[encoding]` made it
 */
function toInline(coded: Uint8Array, encoding: Encoding): InlineContent {
  // What a dcz begins with follows from the dictionary: it is left out.
  const bare = encoding === "dcz" ? coded.subarray(DCZ_MAGIC.length + 32) : coded;
  const content = Buffer.from(bare).toString("base64");
  return encoding === "identity" ? { content } : { content, coding: encoding };
}

/**
 * Puts text into a manifest: as it is, since the manifest as a whole is coded.
 *
 * @returns `undefined` when the content is not UTF-8
 */
function textToInline(content: Uint8Array): InlineContent | undefined {
  try {
    // A byte order mark is content.
    return { text: new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(content) };
  } catch {
    return undefined;
  }
}

/**
 * Takes content out of a manifest. It is still to be verified.
 *
 * @param size as the manifest states it: the most bytes that the result may have
 * @param dictionary the content that the device has in its place
 * @throws when it is malformed, of an unknown coding, or too long
 */
function fromInline(
  { text, content = "", coding = "identity" }: InlineContent,
  size: number,
  dictionary: Dictionary | undefined,
): Uint8Array {
  // Encoding may enlarge small content a little, and base64 by a third.
  if ((text ?? "").length > size || content.length > 2 * (size + 1024)) {
    throw new Error(`it is longer than the ${size} bytes expected`);
  }
  if (text !== undefined) return utf8(text);
  const encoding = encodingOf(coding);
  if (!encoding) throw new Error("its coding is not known here");
  const bytes = Buffer.from(content, "base64");
  if (bytes.toString("base64") !== content) throw new Error("it is not base64");
  const isBare = encoding === "dcz" && dictionary;
  const whole = isBare ? Buffer.concat([dczHeader(dictionary.sha256), bytes]) : bytes;
  return Buffer.concat([...decodeContent(encoding, whole, size, dictionary)]);
}

// ════ III Release root ═══════════════════════════════════════════════════════════════════════════
// From a directory of releases to "what does this device need". A scan takes a snapshot of each
// version and image (Snapshot), waits until a copy in progress has settled (Settling copies),
// hashes what is new (Hashing), and replaces the index (Index, Scan). A request is decided by the
// index alone (Decide, Compose): that reads no directory and hashes no file.

// ──── Snapshot ──────────────────────────────────────────────────────────────────────────────────
// The names and `stat` data of a version, without its content: what counts, what is ignored and
// why. Two snapshots with the same stamp are of the same files.

/** How to read a release root. */
export interface ReleasesOptions {
  /** Globs of files to ignore. Without a slash they match names, else paths in the version. */
  ignore?: readonly string[];
  /** The highest version and firmware to offer; absent: all. */
  latest?: string;
  /** Seconds without a change before a version counts (1). With 0, the root is taken to be complete. */
  quiet?: number;
  /** Serve offered releases only, and no other file below the root. */
  onlyReleases?: boolean;
  /** Ignore `signed_V.json`, as before a release is signed. */
  ignoreSigned?: boolean;
  /** Files that are never offered, wherever they turn up: the keys of a server. */
  secrets?: readonly string[];
}

/** An entry below the root that is ignored, and why. */
export interface Ignored {
  /** Below the root. */
  path: string;
  reason: string;
}

/** A snapshot of a version or an image. */
interface Snapshot {
  files: SnapshotFile[];
  ignored: Ignored[];
  /** The same as long as nothing changes. */
  stamp: string;
  /** When something changed last, in ms since 1970, by the clock that files are stamped with. */
  changed: number;
  /** Why the whole version or image is ignored. */
  problem?: string;
}

/** A file in a snapshot. */
interface SnapshotFile {
  /** Path on the device. */
  path: string;
  /** Absolute, links resolved. */
  file: string;
  size: number;
  executable: boolean;
  stamp: string;
}

const NEVER_CONTENT = new Set([".DS_Store", "pymakr.conf", "Thumbs.db", "__pycache__"]);

/** Reads names and `stat` data below one root. Follows links, but never out of the root. */
class RootReader {
  readonly #secrets: readonly fs.Stats[];

  /**
   * @param root absolute, links resolved
   * @param ignore globs of files to ignore
   * @param secrets files that are ignored wherever they turn up
   */
  constructor(
    readonly root: string,
    private readonly ignore: readonly Bun.Glob[],
    secrets: readonly string[],
    private readonly slicer: TimeSlicer,
  ) {
    this.#secrets = secrets.filter((file) => fs.existsSync(file)).map((file) => fs.statSync(file));
  }

  /**
   * Takes a snapshot of a version. It is not atomic: a second one with the same stamp shows that
   * nothing changed meanwhile.
   *
   * @param directory links resolved
   */
  async snapshotVersion(name: string, directory: string): Promise<Snapshot> {
    const snapshot: Snapshot = { files: [], ignored: [], stamp: "", changed: 0 };
    let hash = 0n;
    const note = (path: string, real: string, stat: fs.Stats) => {
      const stamp = stampOf(stat);
      hash = Bun.hash.wyhash(`${path}\0${real}\0${stamp}`, hash);
      snapshot.changed = Math.max(snapshot.changed, stat.ctimeMs);
      return stamp;
    };
    const visit = async (
      real: string,
      prefix: string,
      above: readonly string[],
      linked = false,
    ) => {
      note(prefix, real, fs.statSync(real));
      // Off this thread: reading a directory of 100,000 entries takes long.
      const reading = fs.promises.readdir(real, { withFileTypes: true });
      for (const item of await this.slicer.pause(reading)) {
        if (this.slicer.isDue) await this.slicer.pause();
        const path = prefix + item.name;
        const skip = (reason: string) => snapshot.ignored.push({ path: `${name}/${path}`, reason });
        const reason = this.#noContent(item.name, path);
        if (reason) {
          skip(reason);
        } else if (item.isDirectory()) {
          await visit(`${real}/${item.name}`, `${path}/`, [...above, real], linked);
        } else {
          const at = `${real}/${item.name}`;
          const found = item.isFile() ? { real: at, stat: fs.statSync(at) } : this.#follow(at);
          if (typeof found === "string") skip(found);
          else if (this.#isSecret(found.stat)) skip("a key of this server");
          else if (found.stat.isFile()) {
            snapshot.files.push(
              snapshotFile(path, found.real, found.stat, note(path, found.real, found.stat)),
            );
          } else if ([...above, real].includes(found.real)) skip("a link to a directory above it");
          else if (linked) skip("a link to a directory, below another such link");
          else await visit(found.real, `${path}/`, [...above, real], true);
        }
      }
    };
    try {
      await visit(directory, "", []);
    } catch (error) {
      if (!isMissing(error)) {
        return { ...snapshot, files: [], stamp: name, problem: `unreadable: ${errorText(error)}` };
      }
      // A file vanished meanwhile: this stamp must equal no other.
      hash = Bun.hash.wyhash(`${performance.now()}`);
      snapshot.changed = Infinity;
    }
    snapshot.stamp = `${name} ${hash}`;
    return snapshot;
  }

  #noContent(name: string, path: string): string | undefined {
    if (NEVER_CONTENT.has(name)) return "never content";
    if (path === VERSION_FILE) return "the device writes it itself";
    if (name.includes("\ufffd")) return "its name is not UTF-8";
    const problem = pathProblem(path);
    if (problem) return `the path ${problem}`;
    const ignored = this.ignore.some((glob) => glob.match(path) || glob.match(name));
    return ignored ? "--ignore" : undefined;
  }

  /** Resolves a path below the root; a text says why it must not be used. */
  resolve(path: string): { real: string; stat: fs.Stats } | string {
    if (path.startsWith(".")) return "its name begins with a dot";
    if (path.includes("\ufffd")) return "its name is not UTF-8";
    return this.#follow(`${this.root}/${path}`);
  }

  /** `resolve` for an absolute path; the target of a version that is a link may be a dot entry. */
  #follow(path: string): { real: string; stat: fs.Stats } | string {
    try {
      const real = fs.realpathSync(path);
      if (!isInside(real, this.root)) return "a link that leaves the root";
      const stat = fs.statSync(real);
      return stat.isDirectory() || stat.isFile()
        ? { real, stat }
        : "neither a file nor a directory";
    } catch (error) {
      return errorCode(error) === "ENOENT" ? "a broken link" : `unreadable: ${errorText(error)}`;
    }
  }

  #isSecret({ dev, ino }: fs.Stats): boolean {
    return this.#secrets.some((secret) => secret.ino === ino && secret.dev === dev);
  }

  /** Takes a snapshot of a firmware image. @param file links resolved */
  async snapshotImage(name: string, file: string): Promise<Snapshot> {
    try {
      const stat = fs.statSync(file);
      if (this.#isSecret(stat)) {
        return { files: [], ignored: [], stamp: "", changed: 0, problem: "a key of this server" };
      }
      const stamp = stampOf(stat);
      const files = [snapshotFile(name, file, stat, stamp)];
      return { files, ignored: [], stamp: `${name} ${file} ${stamp}`, changed: stat.ctimeMs };
    } catch {
      return { files: [], ignored: [], stamp: `${name} ${performance.now()}`, changed: Infinity };
    }
  }
}

function snapshotFile(path: string, file: string, stat: fs.Stats, stamp: string): SnapshotFile {
  const executable = (stat.mode & fs.constants.S_IXUSR) !== 0;
  return { path, file, size: stat.size, executable, stamp };
}

/**
 * Whether a path below the root belongs to a version or an image by its name, backups included.
 * Only those that are offered are served.
 */
function isOfReleases(path: string): boolean {
  const slash = path.indexOf("/");
  return slash < 0
    ? /^firmw?are_.+\.bin$/i.test(path.replace(PUT_ASIDE, ""))
    : /^v?[0-9][\w.+-]*$/i.test(path.slice(0, slash));
}

/** Differs between a file and its changed self, without reading it. */
function stampOf(stat: fs.Stats): string {
  return `${stat.size} ${stat.mtimeMs} ${stat.ctimeMs} ${stat.ino} ${stat.dev} ${stat.mode}`;
}

/** Whether an absolute path, links resolved, is below a directory. */
function isInside(path: string, directory: string): boolean {
  return path.startsWith(directory === "/" ? "/" : `${directory}/`);
}

/** @throws {OTAError} when the file of a key is below a root, links resolved */
function refuseInside(root: string, key: string): void {
  if (!isInside(fs.realpathSync(key), root)) return;
  throw new OTAError(`the key ${key} lies in the root, which is served: move it away`, 2);
}

// ──── Hashing ───────────────────────────────────────────────────────────────────────────────────
// Each file is read once for both hashes: SHA-1 for boards, SHA-256 for devices that ask for it.
// Large amounts are hashed by workers on several cores, so that requests are answered meanwhile.

/** Size and hashes of a file's content. */
export interface FileHashes {
  size: number;
  /** Lowercase hex. */
  sha1: string;
  /** Lowercase hex. */
  sha256: string;
}

/** A file's hashes, or the system error, in a form that can be posted between threads. */
type Hashed = FileHashes | { code: string | undefined; message: string };

/** Read size, in bytes. */
const PIECE = 256 * 1024;

/** Hashes a file. Workers are given its source text, so it must not use anything outside itself. */
function hashFile(
  file: string,
  piece: Uint8Array,
  {
    openSync,
    readSync,
    closeSync,
    constants,
  }: Pick<typeof fs, "openSync" | "readSync" | "closeSync" | "constants">,
): Hashed {
  const sha1 = new Bun.CryptoHasher("sha1");
  const sha256 = new Bun.CryptoHasher("sha256");
  try {
    // O_NONBLOCK: it may have become a pipe since the snapshot, and opening one would block.
    const fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
    try {
      let size = 0;
      for (let read; (read = readSync(fd, piece)) > 0; size += read) {
        const bytes = piece.subarray(0, read);
        sha1.update(bytes);
        sha256.update(bytes);
      }
      return { size, sha1: sha1.digest("hex"), sha256: sha256.digest("hex") };
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    return { code, message };
  }
}

/** The worker's script: it receives lists of files and posts their hashes. */
const HASH_WORKER = `
import * as fs from "node:fs";
const hashFile = ${hashFile};
const piece = new Uint8Array(${PIECE});
onmessage = ({ data }) => postMessage(data.map((file) => hashFile(file, piece, fs)));
`;

/** Fewer bytes than this are hashed on the calling thread: starting a worker takes as long. */
const MIN_WORK = 2 * 1024 * 1024;
const MAX_WORKERS = Math.min(4, navigator.hardwareConcurrency);
/** Files in one message to a worker, at most. */
const BATCH = 64;

/** Hashes files, in workers where they are large or many. */
class Hasher {
  #workers: Worker[] = [];
  #source = "";
  readonly #slicer = new TimeSlicer();

  /**
   * @param bytes their total size, roughly
   * @returns in the order of the files
   */
  async hash(files: readonly string[], bytes: number): Promise<Hashed[]> {
    if (bytes < MIN_WORK) return this.#hashHere(files);
    const count = Math.min(MAX_WORKERS, files.length);
    const batch = Math.min(BATCH, Math.ceil(files.length / count));
    const starts = Array.from({ length: Math.ceil(files.length / batch) }, (_, i) => i * batch);
    const idle = this.#start(count);
    const hashed: Hashed[] = [];
    await new Pool(count).each(starts, async (start) => {
      const some = files.slice(start, start + batch);
      const worker = idle.pop();
      // A failed worker is not replaced: its share is hashed on the calling thread.
      const found = worker && (await this.#ask(worker, some).catch(() => undefined));
      if (found) idle.push(worker!);
      for (const [i, item] of (found ?? (await this.#hashHere(some))).entries()) {
        hashed[start + i] = item;
      }
    });
    return hashed;
  }

  /** Hashes files on the calling thread, in slices. */
  async #hashHere(files: readonly string[]): Promise<Hashed[]> {
    const piece = new Uint8Array(files.length > 0 ? PIECE : 0);
    const hashed: Hashed[] = [];
    await this.#slicer.each(files, (file) => hashed.push(hashFile(file, piece, fs)));
    return hashed;
  }

  #start(count: number): Worker[] {
    this.#source ||= URL.createObjectURL(new Blob([HASH_WORKER], { type: "text/javascript" }));
    while (this.#workers.length < count) this.#workers.push(new Worker(this.#source));
    return this.#workers.slice(0, count);
  }

  #ask(worker: Worker, files: readonly string[]): Promise<Hashed[]> {
    const { promise, resolve, reject } = Promise.withResolvers<Hashed[]>();
    worker.onmessage = ({ data }: MessageEvent<Hashed[]>) => resolve(data);
    worker.onerror = reject;
    worker.addEventListener("close", reject, { once: true });
    worker.postMessage(files);
    return promise.finally(() => worker.removeEventListener("close", reject));
  }

  /** Ends the workers; they are started again when needed. */
  rest(): void {
    for (const worker of this.#workers) worker.terminate();
    this.#workers = [];
    if (this.#source) URL.revokeObjectURL(this.#source);
    this.#source = "";
  }
}

// ──── Settling copies ─────────────────────────────────────────────────────────────────────────────
// Nothing tells when a copy of many files into the root has ended. So a version or an image counts
// once nothing in it has changed for a second; until then its last settled state is offered. Only a
// rename publishes atomically.

/** A file that was read and hashed. */
export interface IndexedFile extends FileHashes {
  /** Absolute, links resolved. */
  file: string;
  /** `stampOf` the file when it was hashed. */
  stamp: string;
  /** Strong, quoted. */
  etag: string;
  /** Whether its owner may run it. */
  executable: boolean;
}

/** What one name below the root stands for now, and what of it is ignored. */
interface Settled<T> {
  item?: T | undefined;
  ignored: Ignored[];
}

/** Decides, for each name below a root, when a change has settled; keeps the last settled item. */
class Settler<T> {
  /** Settled items, with the stamp of the snapshot that they were made from. */
  #known = new Map<string, { stamp: string; item: T }>();
  /** Names that are changing, and when the last change was seen. */
  #unsettled = new Map<string, { stamp: string; since: number }>();
  /** The files hashed last, by name and path. */
  #hashed = new Map<string, SortedMap<IndexedFile>>();
  /** The wall clock's offset from the monotonic clock, and when it was last stepped. */
  #clock = { ahead: Date.now() - performance.now(), stepped: -Infinity };
  readonly #hasher = new Hasher();

  /** @param quiet milliseconds without a change before something counts */
  constructor(
    private readonly quiet: number,
    private readonly slicer: TimeSlicer,
  ) {}

  /** Names that are changing: not offered yet, or offered in their last settled state. */
  get unsettled(): string[] {
    return [...this.#unsettled.keys()];
  }

  /** Milliseconds until the next unsettled name may have settled. */
  get nextScan(): number {
    const since = [...this.#unsettled.values()].map((unsettled) => unsettled.since);
    return Math.max(20, Math.min(...since) + this.quiet - performance.now() + 5);
  }

  /** Begins a scan: detects a step of the wall clock since the last one. */
  begin(): void {
    const now = performance.now();
    const ahead = Date.now() - now;
    const isStep = Math.abs(ahead - this.#clock.ahead) > this.quiet / 2;
    this.#clock = { ahead, stepped: isStep ? now : this.#clock.stepped };
  }

  /** Ends a scan: forgets all other names. */
  end(names: ReadonlySet<string>): void {
    for (const known of [this.#known, this.#unsettled, this.#hashed]) {
      for (const name of known.keys()) if (!names.has(name)) known.delete(name);
    }
  }

  /** Ends the hashing workers. */
  rest(): void {
    this.#hasher.rest();
  }

  /**
   * Returns the item for a version or an image: a new one once it has settled, until then the last
   * one.
   *
   * @param takeSnapshot of its files
   * @param make makes the item of its hashed files
   */
  async settle(
    name: string,
    takeSnapshot: () => Promise<Snapshot>,
    make: (files: SortedMap<IndexedFile>) => T | Promise<T>,
  ): Promise<Settled<T>> {
    const snapshot = await takeSnapshot();
    const { ignored } = snapshot;
    const giveUp = (reason: string): Settled<T> => {
      this.#known.delete(name);
      this.#unsettled.delete(name);
      return { ignored: [...ignored, { path: name, reason }] };
    };
    if (snapshot.problem) return giveUp(snapshot.problem);
    const known = this.#known.get(name);
    if (known?.stamp === snapshot.stamp) {
      this.#unsettled.delete(name);
      return { item: known.item, ignored };
    }
    const unsettled = this.#unsettled.get(name);
    const since = unsettled?.stamp === snapshot.stamp ? unsettled.since : performance.now();
    if (this.#isQuiet(since, snapshot.changed)) {
      const files = await this.#hash(name, snapshot.files);
      if (typeof files === "string") return giveUp(files);
      if (files && (await takeSnapshot()).stamp === snapshot.stamp) {
        const item = await make(files);
        this.#known.set(name, { stamp: snapshot.stamp, item });
        this.#unsettled.delete(name);
        return { item, ignored };
      }
    }
    this.#unsettled.set(name, { stamp: snapshot.stamp, since });
    return { item: known?.item, ignored };
  }

  /**
   * Whether a name has settled. Files with old time stamps have settled at once, unless the wall
   * clock was just stepped: then the name must stay unchanged for the quiet time.
   *
   * @param since when it was first seen as it is, by the monotonic clock
   * @param changed the newest time stamp of its files, by the wall clock
   */
  #isQuiet(since: number, changed: number): boolean {
    const now = performance.now();
    if (now - since >= this.quiet) return true;
    return now - this.#clock.stepped >= this.quiet && Date.now() - changed >= this.quiet;
  }

  /** @returns `undefined` when a file vanished meanwhile; a text says which file cannot be read */
  async #hash(
    name: string,
    found: readonly SnapshotFile[],
  ): Promise<SortedMap<IndexedFile> | string | undefined> {
    const { slicer } = this;
    const old = this.#hashed.get(name);
    const unchanged = ({ path, file, stamp }: SnapshotFile): IndexedFile | undefined => {
      const before = old?.get(path);
      return before?.stamp === stamp && before.file === file ? before : undefined;
    };
    const sorted = await slicer.sort(found, (a, b) => compareCodePoints(a.path, b.path));
    const stale: string[] = [];
    let bytes = 0;
    await slicer.each(sorted, (seen) => {
      if (unchanged(seen)) return;
      stale.push(seen.file);
      bytes += seen.size;
    });
    const hashed = await slicer.pause(this.#hasher.hash(stale, bytes));
    const files = new SortedMap<IndexedFile>();
    const failed: Extract<Hashed, { message: string }>[] = [];
    let next = 0;
    await slicer.each(sorted, (seen) => {
      const { path, file, executable, stamp } = seen;
      const before = unchanged(seen);
      const hashes = before ?? hashed[next++]!;
      if (before) files.append(path, before);
      else if ("message" in hashes) failed.push(hashes);
      else {
        const etag = `"${hashes.sha256.slice(0, 32)}"`;
        files.append(path, { ...hashes, file, etag, executable, stamp });
      }
    });
    this.#hashed.set(name, files);
    const unreadable = failed.find(({ code }) => !saysMissing(code));
    if (unreadable) return `unreadable: ${unreadable.message}`;
    return failed.length > 0 ? undefined : files;
  }
}

// ──── Index ─────────────────────────────────────────────────────────────────────────────────────
// What a root offers, to be looked up by name, version or path. A scan makes a new index, which
// then never changes.

/** One version: a directory below the root, the whole file system of a device. */
export interface Release {
  /** The directory's name: `1.0.1`. */
  name: string;
  version: LooseVersion;
  /** Path on the device, without a leading slash → content. */
  files: SortedMap<IndexedFile>;
  /** The directories that these are in, without a leading slash. */
  directories: ReadonlySet<string>;
  /** `releaseDigest` of the files. */
  digest: string;
  /** Unique in this process; a version whose content changes gets a new one. */
  id: number;
}

/** One firmware image: a file `firmware_VERSION.bin` below the root. */
export interface FirmwareImage extends IndexedFile {
  /** The VERSION in the file's name. */
  name: string;
  version: LooseVersion;
  /** The file's name, as in URLs. */
  path: string;
}

/** The directory that a root's path resolves to. */
interface Place {
  /** Absolute, links resolved. */
  root: string;
  /** Identifies the directory: its path, device and inode. */
  id: string;
}

function placeOf(path: string): Place {
  const root = fs.realpathSync(path);
  const { dev, ino } = fs.statSync(root);
  return { root, id: `${root} ${dev} ${ino}` };
}

/** A path on the device, and its content. */
type Entry = readonly [path: string, file: IndexedFile];

/**
 * What brings a device from one release to another, sorted by path.
 *
 * @param extras whether a change of the executable bit alone counts: boards have none, and must not
 *   fetch a file for it
 */
function changesBetween(
  from: Release | undefined,
  to: Release | undefined,
  extras: boolean,
): { removed: string[]; added: Entry[]; changed: Entry[] } {
  const [old, files] = [from?.files, [...(to?.files ?? [])]];
  const differ = (a: IndexedFile, b: IndexedFile) =>
    a.sha256 !== b.sha256 || (extras && a.executable !== b.executable);
  return {
    removed: to && old ? [...old.keys()].filter((path) => !to.files.has(path)) : [],
    added: files.filter(([path]) => !old?.has(path)),
    changed: files.filter(([path, file]) => old?.has(path) && differ(old.get(path)!, file)),
  };
}

/** The results of `digestBetween`, for as long as a release is there. */
const digests = new WeakMap<Release, Map<string, string>>();

/** `stepsDigest` of the manifest between two releases. @param from absent: nothing */
function digestBetween(from: Release | undefined, to: Release, full = false): string {
  let known = digests.get(to);
  if (!known) digests.set(to, (known = new Map()));
  const key = `${from?.id} ${full}`;
  let digest = known.get(key);
  if (digest === undefined) {
    const { removed, added, changed } = changesBetween(from, to, true);
    const list = (entries: readonly Entry[]) =>
      entries.map(([path, { sha256 }]) => ({ dst_path: `/${path}`, sha256 }));
    digest = stepsDigest({ delete: removed, full, new: list(added), update: list(changed) });
    known.set(key, digest);
  }
  return digest;
}

/** The content of a file `signed_V.json`. */
interface SignedRelease {
  /** Differs when the file does. */
  stamp: string;
  /** Globs of files that it was signed without; whoever serves it leaves them out, too. */
  ignore: readonly string[];
  /** Path → SHA-256 when it was signed; the steps prove it. */
  files: ReadonlyMap<string, string>;
  /** By `from`. */
  steps: ReadonlyMap<string, SignedStep>;
}

interface SignedStep {
  step: Step;
  envelope: Envelope;
  /** Differs from that of every other step, and of this one signed anew. */
  id: string;
}

/** The directory of a model. */
interface ModelPlace {
  name: string;
  /** Absolute, links resolved. */
  real: string;
}

/** What a scan found. */
class Index {
  /** In the order of their versions, oldest first. */
  readonly versions: Release[] = [];
  /** In the order of their versions, oldest first. */
  readonly firmware: FirmwareImage[] = [];
  readonly ignored: Ignored[] = [];
  /** What would be offered if it were signed, and why it is not. */
  readonly held: Ignored[] = [];
  /** Older versions that are not signed as they are, and signatures of versions that are gone. */
  readonly unsigned: Ignored[] = [];
  /** Real path → name, of every entry that is named like a version or an image. */
  readonly places = new Map<string, string>();
  /** Name in lower case → the directory of a model. */
  readonly models = new Map<string, ModelPlace>();
  /** Real paths of directories that would be those of models, if their names were not taken. */
  readonly twins = new Set<string>();
  readonly #byName = new Map<string, Release>();
  readonly #byVersion = new Map<string, Release>();
  readonly #images = new Map<string, FirmwareImage>();
  /** Release → the steps to it, if it is as it was signed. */
  readonly signed = new Map<Release, SignedRelease>();

  constructor(
    readonly place: Place,
    readonly reader: RootReader,
  ) {}

  add(item: Release | FirmwareImage): void {
    if ("path" in item) {
      this.firmware.push(item);
      this.#images.set(item.path, item);
    } else {
      this.versions.push(item);
      this.#byName.set(item.name, item);
      this.#byVersion.set(item.version.key, item);
    }
  }

  /** Sorts by version, once everything is added. */
  sort(): void {
    for (const items of [this.versions, this.firmware]) {
      items.sort((a, b) => a.version.compare(b.version));
    }
  }

  /**
   * The step to a version, if it was signed and is still what a manifest would say.
   *
   * @param has the release that `from` names
   */
  step(from: string, to: Release, has?: Release): SignedStep | undefined {
    const found = this.signed.get(to)?.steps.get(from);
    if (!found || !has) return found;
    return digestBetween(has, to) === found.step.steps ? found : undefined;
  }

  /** Takes the highest version, or image, back out. */
  hold(kind: "versions" | "firmware", reason: string): void {
    const item = this[kind].pop()!;
    if ("path" in item) this.#images.delete(item.path);
    else {
      this.#byName.delete(item.name);
      this.#byVersion.delete(item.version.key);
    }
    this.held.push({ path: "path" in item ? item.path : item.name, reason });
  }

  /** The version that is equal to `name` in the order of versions: `1.00.0` finds `1.0.0`. */
  find(name: string): Release | undefined {
    return this.#byName.get(name) ?? this.#byVersion.get(new LooseVersion(name).key);
  }

  /** The file of a version, or the image, at a path below the root. */
  at(path: string): IndexedFile | undefined {
    const slash = path.indexOf("/");
    if (slash < 0) return this.#images.get(path);
    return this.#byName.get(path.slice(0, slash))?.files.get(path.slice(slash + 1));
  }
}

// ──── Signed releases ─────────────────────────────────────────────────────────────────────────────
// `signed_V.json` holds the steps to version V, as `sign` makes them at home. In a root that has any
// such file, nothing is offered above the newest version that is as it was signed.

/** The step to the full list. All steps to a version share its firmware, model and times. */
function fullStep({ steps }: SignedRelease): Step {
  return steps.get(ANY)!.step;
}

/** The version that `signed_V.json` is for. */
function signedVersion(name: string): string | undefined {
  const version = /^signed_(.+)\.json$/.exec(name)?.[1];
  return version !== undefined && isReleaseName(version) ? version : undefined;
}

/**
 * Reads a file `signed_V.json`.
 *
 * @throws {OTAError} when it cannot be read, or is malformed
 */
function readSigned(file: string, version: string): SignedRelease {
  const stat = fs.statSync(file);
  const stamp = stampOf(stat);
  // Not a pipe, which would block.
  if (!stat.isFile()) malformed("not a file");
  if (stat.size > MAX_MANIFEST_BYTES) malformed(`more than ${MAX_MANIFEST_BYTES} bytes`);
  const fields = asObject(parseJSON(fs.readFileSync(file, "utf8")), "the file");
  const files = new Map(
    Object.entries(asObject(fields.files, "files")).map(([path, digest]) => {
      return [path, asDigest(digest, path, 64)] as const;
    }),
  );
  const ignore = asList(fields.ignore ?? [], "ignore", asText);
  const envelopes = asList(fields.steps, "steps", asEnvelope);
  const steps = new Map(
    envelopes.map((envelope, i) => {
      const step = stepIn(envelope);
      if (step.to !== version) malformed(`steps[${i}]: to ${step.to}, not ${version}`);
      return [step.from, { step, envelope, id: `${stamp} ${i}` }] as const;
    }),
  );
  const all = [...files].map(([path, sha256]) => ({ dst_path: `/${path}`, sha256 }));
  const lists = { delete: [], new: all, update: [] };
  const proof = { "": stepsDigest(lists), [ANY]: stepsDigest({ ...lists, full: true }) };
  for (const [from, digest] of Object.entries(proof)) {
    if (steps.get(from)?.step.steps !== digest) malformed(`no step from "${from}" to these files`);
  }
  return { stamp, ignore, files, steps };
}

/** The content of a file `signed_V.json`, or what is wrong with it. */
function tryToRead(file: string, version: string): SignedRelease | string {
  try {
    return readSigned(file, version);
  } catch (error) {
    return `is signed in ${basename(file)}, which cannot be used: ${errorText(error)}`;
  }
}

/** What has changed since it was signed; `undefined` when nothing has. */
async function changedSinceSigned(
  signed: SignedRelease,
  release: Release,
  images: readonly FirmwareImage[],
  slicer: TimeSlicer,
): Promise<string | undefined> {
  const { files } = signed;
  let changed: string | undefined;
  await slicer.each(files, ([path, digest]) => {
    if (release.files.get(path)?.sha256 !== digest) changed ??= path;
  });
  await slicer.each(release.files.keys(), (path) => {
    if (!files.has(path)) changed ??= path;
  });
  if (changed !== undefined) return `was changed since it was signed: ${changed}`;
  const { firmware } = fullStep(signed);
  if (!firmware || images.some((image) => image.sha256 === firmware.sha256)) return undefined;
  return `was signed with firmware ${firmware.version}, which is not here as it was`;
}

/** The files `signed_V.json` of one root. */
class SignedReleases {
  /** By name; read again when they change. */
  #files = new Map<string, { stamp: string; content: SignedRelease | string }>();
  /** What `changedSinceSigned` found, by what it depends on. */
  #checked = new Map<string, string | undefined>();

  constructor(private readonly slicer: TimeSlicer) {}

  /** Globs of the files that releases were signed without. */
  get ignore(): string[] {
    return [...this.#files.values()].flatMap(({ content }) =>
      typeof content === "string" ? [] : content.ignore,
    );
  }

  /** Adds what is signed to an index, and holds back what is above the newest version of these. */
  async apply(index: Index): Promise<void> {
    const [example] = this.#files.keys();
    if (example === undefined) return;
    const images = index.firmware.map(({ sha256 }) => sha256).join();
    const checked = new Map<string, string | undefined>();
    const problems = new Map<Release, string>();
    for (const release of index.versions) {
      const unsigned = `is not signed, as others are (${example})`;
      const { content = unsigned } = this.#files.get(`signed_${release.name}.json`) ?? {};
      if (typeof content === "string") {
        problems.set(release, content);
        continue;
      }
      const key = `${release.id} ${content.stamp} ${images}`;
      const change = this.#checked.has(key)
        ? this.#checked.get(key)
        : await changedSinceSigned(content, release, index.firmware, this.slicer);
      checked.set(key, change);
      if (change) problems.set(release, change);
      else index.signed.set(release, content);
    }
    this.#checked = checked;
    for (let release; (release = index.versions.at(-1)) && !index.signed.has(release);) {
      index.hold("versions", problems.get(release)!);
      problems.delete(release);
    }
    for (const [{ name }, reason] of problems) index.unsigned.push({ path: name, reason });
    const there = new Set(index.places.values());
    for (const name of this.#files.keys()) {
      if (there.has(signedVersion(name)!)) continue;
      index.unsigned.push({ path: name, reason: "is of a version that is not here" });
    }
    const newest = index.versions.at(-1);
    const firmware = newest && fullStep(index.signed.get(newest)!).firmware;
    for (let image; (image = index.firmware.at(-1)) && image.sha256 !== firmware?.sha256;) {
      index.hold("firmware", "is not signed with the newest version");
    }
  }

  /** Reads those of the files in a root that have changed. */
  read(names: readonly string[], root: string): void {
    const before = this.#files;
    this.#files = new Map();
    for (const name of names) {
      const version = signedVersion(name);
      if (version === undefined) continue;
      let stamp = "";
      ignoreErrors(() => (stamp = stampOf(fs.statSync(`${root}/${name}`))));
      const known = before.get(name);
      const isSame = known?.stamp === stamp;
      const content = isSame ? known.content : tryToRead(`${root}/${name}`, version);
      this.#files.set(name, { stamp, content });
    }
  }
}

// ──── Models ──────────────────────────────────────────────────────────────────────────────────────
// Boards of several kinds may be served from one root. A directory directly below it that is no
// version and holds versions or images is the root of a model, by its name. Models do not nest.

/**
 * Milliseconds after which the time stamps of a directory tell of every change: two changes may come
 * within one tick of the clock that files are stamped with.
 */
const STAMP_TICK = 1000;

/** Finds the directories of models, scan after scan. */
class ModelFinder {
  /** Real path → whether the directory holds releases, valid while its stamp stays the same. */
  #known = new Map<string, { stamp: string; holds: boolean }>();
  #before = this.#known;

  constructor(private readonly slicer: TimeSlicer) {}

  /** Begins a scan: forgets directories that the last one did not meet. */
  begin(): void {
    this.#before = this.#known;
    this.#known = new Map();
  }

  /**
   * Adds a directory to an index, if it is that of a model.
   *
   * @param entry the directory, links resolved
   * @returns why it is none
   */
  async consider(
    name: string,
    { real, stat }: { real: string; stat: fs.Stats },
    index: Index,
  ): Promise<string | undefined> {
    const noVersion = `no version: a name is ${RELEASE_NAME_RULE}`;
    // `/-/` is the server's own, and a version that was put aside is no model.
    if (name === "-" || isOfReleases(`${name}/`)) return noVersion;
    try {
      const holds = await this.#holdsReleases(real, stat);
      if (!holds) return `${noVersion}; no model: it holds neither versions nor images`;
    } catch (error) {
      if (isBug(error)) throw error;
      const known = this.#before.get(real);
      // A model that cannot be read just now stays as it was: its devices must not get others' files.
      if (!known?.holds || isMissing(error)) return `unreadable: ${errorText(error)}`;
      this.#known.set(real, known);
    }
    if (isOfReleases(`${relative(index.place.root, real)}/`)) return "a link into a version";
    const key = name.toLowerCase();
    const first = index.models.get(key);
    if (!first) index.models.set(key, { name, real });
    else index.twins.add(real);
    return first && `the same model as ${first.name}, which counts`;
  }

  async #holdsReleases(directory: string, stat: fs.Stats): Promise<boolean> {
    const stamp = stampOf(stat);
    const known = this.#before.get(directory);
    let holds = known?.holds === true;
    if (known?.stamp !== stamp) {
      const reading = fs.promises.readdir(directory, { withFileTypes: true });
      const items = await this.slicer.pause(reading);
      holds = false;
      // A link counts by its name: where it leads may change without a trace in this directory.
      await this.slicer.each(items, (item) => {
        holds ||= isReleaseName(item.name)
          ? !item.isFile()
          : firmwareVersion(item.name) !== undefined && !item.isDirectory();
      });
    }
    const isSure = Date.now() - stat.mtimeMs > STAMP_TICK;
    this.#known.set(directory, { stamp: isSure ? stamp : "", holds });
    return holds;
  }
}

// ──── Scan ──────────────────────────────────────────────────────────────────────────────────────
// Makes the index. This takes time; requests that come meanwhile are answered from the one before.

/** Makes an item of its files. */
type Make = (files: SortedMap<IndexedFile>) => Release | FirmwareImage | Promise<Release>;

let releasesMade = 0;

/** Scans one root repeatedly; files that did not change are not read again. */
class Scanner {
  readonly #slicer = new TimeSlicer();
  readonly #latest: LooseVersion | undefined;
  readonly settler: Settler<Release | FirmwareImage>;
  readonly signed = new SignedReleases(this.#slicer);
  readonly #models: ModelFinder | undefined;

  /** @param hasModels whether directories in it may be the roots of models */
  constructor(
    private readonly path: string,
    private readonly options: ReleasesOptions,
    hasModels: boolean,
  ) {
    this.#models = hasModels ? new ModelFinder(this.#slicer) : undefined;
    this.#latest = options.latest === undefined ? undefined : new LooseVersion(options.latest);
    this.settler = new Settler((options.quiet ?? 1) * 1000, this.#slicer);
  }

  /** An index of nothing, before the first scan. */
  empty(place = placeOf(this.path)): Index {
    const globs = [...(this.options.ignore ?? []), ...this.signed.ignore];
    const ignore = globs.map((pattern) => new Bun.Glob(pattern));
    const { secrets = [] } = this.options;
    return new Index(place, new RootReader(place.root, ignore, secrets, this.#slicer));
  }

  /**
   * Reads the root.
   *
   * @param path where it is now
   * @returns the index, and the CPU time of this thread, in milliseconds
   * @throws when the root cannot be read
   */
  async scan(path = this.path): Promise<{ index: Index; milliseconds: number }> {
    try {
      await this.#slicer.pause();
      const busy = this.#slicer.busy;
      this.settler.begin();
      this.#models?.begin();
      const place = placeOf(path);
      const names = await this.#slicer.pause(fs.promises.readdir(place.root));
      names.sort(compareCodePoints);
      this.signed.read(names, place.root);
      const index = this.empty(place);
      for (const name of names) {
        if (this.#slicer.isDue) await this.#slicer.pause();
        await this.#consider(name, index);
      }
      this.settler.end(new Set(names));
      index.sort();
      if (!this.options.ignoreSigned) await this.signed.apply(index);
      await this.#slicer.pause();
      return { index, milliseconds: this.#slicer.busy - busy };
    } finally {
      this.settler.rest();
    }
  }

  /** Adds one entry of the root to an index. */
  async #consider(name: string, index: Index): Promise<void> {
    const skip = (reason: string) => void index.ignored.push({ path: name, reason });
    const { reader, versions, firmware, places } = index;
    const entry = reader.resolve(name);
    if (typeof entry === "string") return skip(entry);
    const isDirectory = entry.stat.isDirectory();
    if (isOfReleases(isDirectory ? `${name}/` : name) && !places.has(entry.real)) {
      places.set(entry.real, name);
    }
    const settle = async (snapshot: () => Promise<Snapshot>, make: Make): Promise<void> => {
      const { item, ignored } = await this.settler.settle(name, snapshot, make);
      index.ignored.push(...ignored);
      if (item) index.add(item);
    };
    if (isDirectory) {
      if (!isReleaseName(name)) {
        const reason = this.#models
          ? await this.#models.consider(name, entry, index)
          : `no version: a name is ${RELEASE_NAME_RULE}`;
        return reason === undefined ? undefined : skip(reason);
      }
      if (!this.#counts(name, versions, skip)) return;
      const snapshot = () => reader.snapshotVersion(name, entry.real);
      return settle(snapshot, (files) => this.#makeRelease(name, files));
    }
    if (signedVersion(name) !== undefined) return;
    const text = firmwareVersion(name);
    if (text === undefined) return skip("neither a version nor a firmware_VERSION.bin");
    if (!this.#counts(text, firmware, skip)) return;
    const snapshot = () => reader.snapshotImage(name, entry.real);
    const version = new LooseVersion(text);
    await settle(snapshot, (files) => ({ ...files.get(name)!, name: text, version, path: name }));
  }

  async #makeRelease(name: string, files: SortedMap<IndexedFile>): Promise<Release> {
    const directories = new Set<string>();
    const hasher = new Bun.CryptoHasher("sha256");
    await this.#slicer.each(files, ([path, file]) => {
      hasher.update(releaseLine(path, file.sha256));
      for (const directory of ancestors(path)) {
        if (directories.has(directory)) break;
        directories.add(directory);
      }
    });
    const [version, digest] = [new LooseVersion(name), hasher.digest("hex")];
    return { name, version, files, directories, digest, id: ++releasesMade };
  }

  /** Whether a version counts, given those before it in code point order. */
  #counts(
    name: string,
    others: readonly { name: string; version: LooseVersion }[],
    skip: (reason: string) => void,
  ): boolean {
    const version = new LooseVersion(name);
    const twin = others.find((other) => other.version.compare(version) === 0);
    if (twin) skip(`the same version as ${twin.name}, which counts`);
    const held = this.#latest !== undefined && this.#latest.compare(name) < 0;
    if (held) skip(`above --latest ${this.#latest}`);
    return !twin && !held;
  }
}

// ──── Files beside releases ───────────────────────────────────────────────────────────────────────
// Files beside versions and images are served, as in Pycom's OTA tutorial, except private keys and
// dot entries. Files of a version are served only as such, whatever path or link leads to them.

/** A file below the root that may be served. */
export interface ServedFile {
  /** Absolute, links resolved. */
  file: string;
  /** `stampOf` the file when it was found. */
  stamp: string;
  size: number;
  /** Of versions and images: what is sent must have this content. */
  sha256?: string;
  /** Strong, quoted. */
  etag: string;
}

/** Files in a directory beside the releases are counted up to this. */
const MAX_COUNTED = 1000;
/** The most files of which it is remembered whether they hold a private key. */
const MAX_KEYS_KNOWN = 4096;

/** The files of a root beside its versions and images. */
class OtherFiles {
  /** Path → whether it holds a private key, valid while its stamp stays the same. */
  readonly #keys = new Map<string, { stamp: string; isKey: boolean }>();

  /** @param isServed whether there are any */
  constructor(private readonly isServed: boolean) {}

  /** The file at a path below the root; `undefined` when it is not served. */
  at(path: string, index: Index): ServedFile | undefined {
    // `/-/` is the server's own.
    if (/^-\/|(^|\/)(\.{0,2})(\/|$)|\0/.test(path)) return undefined;
    if (!this.isServed || isOfReleases(path)) return undefined;
    const found = index.reader.resolve(path);
    if (typeof found === "string" || !found.stat.isFile()) return undefined;
    // Nor through a link to a dot entry, or out of the root and in again.
    const real = relative(index.place.root, found.real);
    if (real.startsWith(".")) return undefined;
    // A link may lead into a version, and a version may be a link.
    for (const at of [found.real, ...ancestors(found.real)]) {
      const name = index.places.get(at);
      if (name !== undefined) return index.at(name + found.real.slice(at.length));
    }
    const stamp = stampOf(found.stat);
    if (isOfReleases(real) || this.#isKey(found.real, stamp)) return undefined;
    const etag = `"${sha256(stamp).slice(0, 32)}"`;
    return { file: found.real, stamp, size: found.stat.size, etag };
  }

  #isKey(file: string, stamp: string): boolean {
    const known = this.#keys.get(file);
    if (known?.stamp === stamp) return known.isKey;
    const isKey = holdsPrivateKey(file);
    if (this.#keys.size >= MAX_KEYS_KNOWN) this.#keys.clear();
    this.#keys.set(file, { stamp, isKey });
    return isKey;
  }

  /**
   * Lists them for the operator: files in the root, and directories (with a slash at the end) with
   * the number of files in them, counted up to a thousand.
   */
  async list(index: Index): Promise<{ path: string; files: number }[]> {
    const slicer = new TimeSlicer();
    const { root } = index.place;
    const read = (directory: string) =>
      slicer.pause(fs.promises.readdir(`${root}/${directory}`, { withFileTypes: true }));
    const count = async (directory: string, files: number): Promise<number> => {
      for (const item of await read(directory).catch(() => [])) {
        if (files > MAX_COUNTED) break;
        if (slicer.isDue) await slicer.pause();
        const path = directory + item.name;
        if (item.isDirectory()) files = await count(`${path}/`, files);
        else if (this.at(path, index)) files++;
      }
      return files;
    };
    const found: { path: string; files: number }[] = [];
    if (!this.isServed) return found;
    const items = await read("");
    for (const item of items.sort((a, b) => compareCodePoints(a.name, b.name))) {
      const path = item.isDirectory() ? `${item.name}/` : item.name;
      if (path === "-/" || path.startsWith(".") || isOfReleases(path)) continue;
      // The files of a model are listed as its own.
      if (index.models.get(item.name.toLowerCase())?.name === item.name) continue;
      const files = item.isDirectory() ? await count(path, 0) : this.at(path, index) ? 1 : 0;
      if (files > 0) found.push({ path, files });
    }
    return found;
  }
}

/** Whether a file holds a private key in PEM; an unreadable one counts as such. */
function holdsPrivateKey(file: string): boolean {
  try {
    // O_NONBLOCK: it may be a pipe by now.
    const fd = fs.openSync(file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
    try {
      // Certificates may stand before it.
      const head = Buffer.alloc(64 * 1024);
      const text = head.toString("latin1", 0, fs.readSync(fd, head));
      return /-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----/.test(text);
    } finally {
      fs.closeSync(fd);
    }
  } catch {
    return true;
  }
}

// ──── Decide ────────────────────────────────────────────────────────────────────────────────────
// What a device gets. Files and firmware are decided separately: each is the highest version that
// is above what the device has. Nothing is ever a downgrade.

/** What a device gets. */
interface Decision {
  /** The release that it gets; absent: firmware alone. */
  target: Release | undefined;
  /** The release that it has, where its files are known. */
  has: Release | undefined;
  /** Whether its files are other than those of the release it names. */
  full: boolean;
  image: FirmwareImage | undefined;
  /** The version that it is on afterwards. */
  version: string;
  /** The version that it named, as it is echoed. */
  previous: string;
  /** Its `base`, echoed when a `reqid` was sent and the `base` is right. */
  base: string | undefined;
  /** The step as it was signed at home, if it was asked for. */
  signed: SignedStep | undefined;
}

/** A SHA-256 in a query; anything malformed counts as absent. */
function digestIn(text: string | undefined): string | undefined {
  return text !== undefined && /^[0-9a-f]{64}$/i.test(text) ? text.toLowerCase() : undefined;
}

/** The newest version and image that a device may have; `undefined`: none. */
interface NewestItems {
  version: Release | undefined;
  image: FirmwareImage | undefined;
}

/** The newest of an index up to a version: what there was before anything above it. */
function itemsUpTo(
  { versions, firmware }: Pick<ReleaseRoot, "versions" | "firmware">,
  ceiling: LooseVersion,
): NewestItems {
  const isBelow = (one: { version: LooseVersion }) => one.version.compare(ceiling) <= 0;
  return { version: versions.findLast(isBelow), image: firmware.findLast(isBelow) };
}

/**
 * Decides what a device gets.
 *
 * @param query what the device said of itself; any text is allowed in any parameter
 * @param may the newest that it may have; absent: all that is offered
 * @returns `null` when there is nothing for it
 */
function decide(index: Index, query: ManifestQuery, may?: NewestItems): Decision | null {
  const { versions, firmware } = index;
  const nothing = { has: undefined, full: false, image: undefined, base: undefined };
  if (query.list !== undefined) {
    // All of a version, for a device that has to learn what it consists of.
    const target = index.find(query.list);
    if (!target) return null;
    const signed = query.signed === "1" ? index.step("", target) : undefined;
    return { target, ...nothing, version: target.name, previous: target.name, signed };
  }
  const current = query.current_ver ?? "";
  const known = index.find(current);
  const device = known?.version ?? new LooseVersion(current);
  const base = digestIn(query.base);
  const newest = may ? may.version : versions.at(-1);
  const order = newest?.version.compare(device) ?? 0;
  // A step leads only from a release that was there when it was signed.
  const asksForStep = query.signed === "1" && newest && index.signed.has(newest);
  const isForeign =
    asksForStep === true &&
    current !== "" &&
    (!known || index.step(known.name, newest, known) === undefined);
  const full = (base !== undefined && base !== known?.digest) || (isForeign && order > 0);
  // A device on the newest version may have other files than that version has now.
  const target = order > 0 || (full && newest && newest === known) ? newest : undefined;
  const image = imageFor(query, device, may ? may.image : firmware.at(-1));
  const previous = current || "0";
  const bound = query.reqid !== undefined && !full ? base : undefined;
  const asked = { previous, base: bound };
  if (target) {
    const has = full ? undefined : known;
    const from = full ? ANY : (known?.name ?? "");
    const signed = asksForStep ? index.step(from, target, has) : undefined;
    return { target, has, full, image, version: target.name, signed, ...asked };
  }
  if (asksForStep && newest === known) {
    // Proof that nothing newer was signed; with it, firmware.
    const signed = index.step(newest.name, newest, newest);
    if (signed || image) {
      return {
        target: newest,
        has: newest,
        full: false,
        image,
        version: previous,
        signed,
        ...asked,
      };
    }
  }
  // A device that does not say which firmware it runs would flash the same image forever, or skip
  // the files of that version: it gets firmware alone only from a root without versions.
  const mayFlash = query.firmware_ver !== undefined || versions.length === 0;
  if (!image || !mayFlash) return null;
  const version = query.firmware_ver === undefined ? image.name : previous;
  return { target, ...nothing, image, version, signed: undefined, ...asked };
}

/** The image, if it is above what runs, or is the version that runs with other content. */
function imageFor(
  query: ManifestQuery,
  device: LooseVersion,
  image: FirmwareImage | undefined,
): FirmwareImage | undefined {
  const order = image?.version.compare(query.firmware_ver ?? device) ?? 0;
  const runs = query.firmware_ver === undefined ? undefined : digestIn(query.firmware_sha256);
  const isOther = order === 0 && runs !== undefined && runs !== image?.sha256;
  return order > 0 || isOther ? image : undefined;
}

// ──── Compose ─────────────────────────────────────────────────────────────────────────────────────
// Makes the manifest of a decision. What does not depend on the single device is made once.

/** What a manifest depends on beside the decision. */
interface ManifestForm {
  /** Whether SHA-256, sizes and modes are included. */
  extras: boolean;
  /** What URLs begin with: `http://HOST`, without a slash at the end. */
  base: string;
  /** What URLs end with: `?token=…`. */
  suffix: string;
  /** What `brief=1` asked for. */
  brief?: BriefForm;
}

/** Contents that a manifest carries itself. */
interface InlineContents {
  /** By path below the root: `1.0.1/flash/main.py`. */
  contents: ReadonlyMap<string, InlineContent>;
  /** The same for the same ones in manifests of the same decision. */
  key: string;
}

/** The form of a brief manifest. */
interface BriefForm extends InlineContents {
  /**
   * Whether URLs are included: where they do not follow from the path, with `--url`, or a token in
   * them.
   */
  hasURLs: boolean;
}

/** An entry or firmware as it is sent: a brief one may have no URL. */
type Sent<T extends { URL: string }> = Omit<T, "URL"> & { URL?: string };

/** See `ManifestForm`. A signed step is about SHA-256, and a brief manifest has nothing else. */
function formOf(
  { hash, signed, brief }: ManifestQuery,
  base: string,
  suffix: string,
): ManifestForm {
  return { extras: hash === "sha256" || signed === "1" || brief === "1", base, suffix };
}

/**
 * The brief form of another.
 *
 * @param hasURLs whether URLs are needed in any case
 */
function briefForm(
  form: ManifestForm,
  decision: Decision | null,
  inline: InlineContents,
  hasURLs = false,
): ManifestForm {
  const image = decision?.image;
  const isUsual = image === undefined || image.path === imageName(image.name);
  const brief = { ...inline, hasURLs: hasURLs || !isUsual };
  // Without URLs it is the same for all, whatever the address by which they reach the server.
  return { ...form, base: brief.hasURLs ? form.base : "", brief };
}

/** What a manifest says of the content at a path below the root, in two parts: see `Manifest`. */
function contentFields(
  path: string,
  file: FileHashes,
  { extras, base, suffix, brief }: ManifestForm,
) {
  const URL = `${base}/${encodePath(path)}${suffix}`;
  const { sha1: hash, sha256, size } = file;
  if (!brief) return { link: { URL }, hashes: { hash, ...(extras && { sha256, size }) } };
  const { text, content, coding } = brief.contents.get(path) ?? {};
  return {
    link: {
      ...(brief.hasURLs && { URL }),
      ...(coding !== undefined && { coding }),
      ...(content !== undefined && { content }),
    },
    // In base64 it takes fewer bytes among contents in base64, once the manifest is coded.
    hashes: {
      sha256: Buffer.from(sha256, "hex").toString("base64"),
      size,
      ...(text !== undefined && { text }),
    },
  };
}

/** The fields of a manifest before and after those that echo the request. */
function composeManifest(
  { target, has, full, image, version, signed }: Decision,
  form: ManifestForm,
) {
  const { extras } = form;
  const entry = ([path, file]: readonly [string, IndexedFile]): Sent<ManifestEntry> => {
    const { link, hashes } = contentFields(`${target!.name}/${path}`, file, form);
    return {
      ...link,
      dst_path: `/${path}`,
      ...(extras && file.executable && { executable: true as const }),
      ...hashes,
    };
  };
  const { removed, added, changed } = changesBetween(has, target, extras);
  const named = image && contentFields(image.path, image, form);
  const firmware: Sent<ManifestFirmware> | undefined = named && {
    ...named.link,
    ...named.hashes,
    ...(extras && { version: image.name }),
  };
  return {
    head: {
      delete: removed,
      ...(firmware && { firmware }),
      ...(full && { full: true as const }),
      new: added.map(entry),
    },
    tail: {
      ...(signed && { signed: signed.envelope }),
      update: changed.map(entry),
      version,
    },
  };
}

/** The most that is kept of manifests, in bytes. */
const MANIFEST_BUDGET = 32 * 1024 * 1024;

/** A manifest as JSON, in two parts; what is echoed from the request goes between them. */
interface ComposedManifest {
  head: string;
  tail: string;
}

/** The manifest of a device that has the newest. */
const NOTHING_NEWER: ComposedManifest = { head: "", tail: "null" };

/** Composes and caches manifests. */
class Composer {
  readonly #composed = new Cache<ComposedManifest>(MANIFEST_BUDGET);

  /** @returns the same object for as long as it is cached */
  compose(decision: Decision | null, form: ManifestForm): ComposedManifest {
    if (!decision) return NOTHING_NEWER;
    const { has, target, image, full, version, signed } = decision;
    const { extras, base, suffix, brief } = form;
    // A release or an image that changes has another id or hash.
    const what = `${has?.id}\n${target?.id}\n${image?.path} ${image?.sha256}\n${full}\n${version}\n${signed?.id}`;
    const key = `${what}\n${extras}\n${base}\n${suffix}\n${brief?.hasURLs}\n${brief?.key}`;
    const known = this.#composed.get(key);
    if (known) return known;
    const { head, tail } = composeManifest(decision, form);
    const made: ComposedManifest = {
      head: `${JSON.stringify(head).slice(1, -1)},`,
      tail: JSON.stringify(tail).slice(1),
    };
    // Counted with the responses that a server makes of it: one plain, and coded ones.
    this.#composed.set(key, made, 3 * (made.head.length + made.tail.length));
    return made;
  }
}

/** The complete JSON of a manifest. */
function fillIn(
  { head, tail }: ComposedManifest,
  decision: Decision | null,
  reqid: string | undefined,
): string {
  if (!decision) return tail;
  const { base, previous } = decision;
  const first = base ? `{"base":"${base}",` : "{";
  const id = reqid === undefined ? "" : `"request_id":${JSON.stringify(reqid)},`;
  return `${first}${head}"previous_version":${JSON.stringify(previous)},${id}${tail}`;
}

// ──── One root ────────────────────────────────────────────────────────────────────────────────────
// A root with its current index: the whole release root, or that of a model in it. All rules of a
// root hold in each on its own.

/** What the roots of all models share, so that there is one bound to the memory they take. */
interface SharedCaches {
  composer: Composer;
  others: OtherFiles;
}

/** The versions and images for one kind of device. */
export class ReleaseRoot {
  /** Names whose content the last scan found to differ from when it was last offered. */
  altered: readonly string[] = [];
  /** Duration of the last scan, in seconds. */
  scanSeconds = 0;
  /** CPU time of the last scan on this thread, in milliseconds. */
  scanTime = 0;

  protected index: Index;
  readonly #scanner: Scanner;
  /** Kind and version → digest when last offered. */
  #offered = new Map<string, string>();

  /**
   * @param path absolute; where it leads may change
   * @param model the name of the model that it is for; empty: it is the whole release root
   */
  constructor(
    readonly path: string,
    options: ReleasesOptions,
    protected readonly shared: SharedCaches,
    readonly model = "",
  ) {
    this.#scanner = new Scanner(path, options, model === "");
    this.index = this.#scanner.empty();
  }

  /** What stands before the paths of its content in URLs: `/lopy4`, or nothing. */
  get urlPath(): string {
    return this.model === "" ? "" : `/${encodeURIComponent(this.model)}`;
  }

  /** The directory that was scanned last: absolute, links resolved. */
  get root(): string {
    return this.index.place.root;
  }

  /** Its identity. */
  get place(): string {
    return this.index.place.id;
  }

  /** In the order of their versions, oldest first. */
  get versions(): readonly Release[] {
    return this.index.versions;
  }

  /** In the order of their versions, oldest first. */
  get firmware(): readonly FirmwareImage[] {
    return this.index.firmware;
  }

  get ignored(): readonly Ignored[] {
    return this.index.ignored;
  }

  /** What is not offered since it is not signed as it is. */
  get held(): readonly Ignored[] {
    return this.index.held;
  }

  /** Older versions that are not signed as they are, and signatures of versions that are gone. */
  get unsigned(): readonly Ignored[] {
    return this.index.unsigned;
  }

  /** See `Settler.unsettled`. */
  get unsettled(): string[] {
    return this.#scanner.settler.unsettled;
  }

  /** See `Settler.nextScan`. */
  get nextScan(): number {
    return this.#scanner.settler.nextScan;
  }

  /**
   * Reads the root again; what did not change is not hashed again. Not for several callers at once.
   *
   * @param path where it is now
   * @returns whether anything is different now
   * @throws when the root cannot be read; then everything stays as it was
   */
  async read(path = this.path): Promise<boolean> {
    const started = performance.now();
    const { index, milliseconds } = await this.#scanner.scan(path);
    // Unchanged items stay the same objects.
    const before = [...this.versions, ...this.firmware];
    const after = [...index.versions, ...index.firmware];
    const heldNow = (one: Index) => JSON.stringify([one.held, one.unsigned]);
    const different =
      after.length !== before.length ||
      after.some((item, i) => item !== before[i]) ||
      heldNow(index) !== heldNow(this.index);
    this.index = index;
    this.altered = different ? this.#alter() : [];
    this.scanSeconds = (performance.now() - started) / 1000;
    this.scanTime = milliseconds;
    return different;
  }

  /** Offers nothing any more. */
  forget(): void {
    this.#scanner.settler.end(new Set());
    this.index = this.#scanner.empty(this.index.place);
  }

  /**
   * Records the digests on offer; returns the names whose content differs from when last offered.
   */
  #alter(): string[] {
    const altered: string[] = [];
    const note = (key: string, content: string, name: string) => {
      if ((this.#offered.get(key) ?? content) !== content) altered.push(name);
      this.#offered.set(key, content);
    };
    for (const { version, digest, name } of this.versions) note(version.key, digest, name);
    for (const image of this.firmware) note(`f${image.version.key}`, image.sha256, image.path);
    return altered;
  }

  /** The version that is equal to `name` in the order of versions: `1.00.0` finds `1.0.0`. */
  find(name: string): Release | undefined {
    return this.index.find(name);
  }

  /** The content of a version or an image that is offered. @param path below the root */
  offered(path: string): IndexedFile | undefined {
    return this.index.at(path);
  }

  /** See `OtherFiles.at`. */
  besideAt(path: string): ServedFile | undefined {
    return this.shared.others.at(path, this.index);
  }

  /** See `OtherFiles.list`. */
  beside(): Promise<{ path: string; files: number }[]> {
    return this.shared.others.list(this.index);
  }

  /**
   * Finds the older content that a device names as its dictionary: the same path in another
   * version, or another image. Nothing else is used.
   *
   * @param path of the content, below the root
   * @param sha256 of what the device has
   */
  predecessor(path: string, sha256: string): IndexedFile | undefined {
    const below = path.indexOf("/") + 1;
    const others =
      below === 0 ? this.firmware : this.versions.map(({ files }) => files.get(path.slice(below)));
    return others.find((file) => file?.sha256 === sha256);
  }

  /** See the function of that name. */
  decide(query: ManifestQuery, may?: NewestItems): Decision | null {
    return decide(this.index, query, may);
  }

  /** Whether a release is as it was signed. */
  isSigned(release: Release): boolean {
    return this.index.signed.has(release);
  }

  /** Globs of the files that releases were signed without. */
  get signedIgnore(): readonly string[] {
    return this.#scanner.signed.ignore;
  }

  /** See `Composer`. */
  compose(decision: Decision | null, form: ManifestForm): ComposedManifest {
    return this.shared.composer.compose(decision, form);
  }

  /**
   * What a device needs to reach the newest release.
   *
   * @param query what the device said of itself; any text is allowed in any parameter
   * @param base what URLs begin with: `http://HOST`, without a slash at the end
   * @param suffix what URLs end with: `?token=…`
   * @returns the manifest, or `null` when there is nothing newer
   */
  manifestFor(query: ManifestQuery, base: string, suffix = ""): Manifest | null {
    const decision = this.decide(query);
    if (!decision) return null;
    const form = formOf(query, base + this.urlPath, suffix);
    const { head, tail } = composeManifest(decision, form);
    // Such a form is not brief: everything has its URL.
    return {
      ...(decision.base && { base: decision.base }),
      ...head,
      previous_version: decision.previous,
      ...(query.reqid !== undefined && { request_id: query.reqid }),
      ...tail,
    } as Manifest;
  }

  /** `manifestFor` as compact JSON. */
  manifestJSON(query: ManifestQuery, base: string, suffix = ""): string {
    const decision = this.decide(query);
    const form = formOf(query, base + this.urlPath, suffix);
    return fillIn(this.compose(decision, form), decision, query.reqid);
  }
}

// ──── Roots of models ─────────────────────────────────────────────────────────────────────────────
// The roots of the models in a release root, as they come and go.

/** What a scan made of the root of a model. */
interface ScannedModel {
  root: ReleaseRoot;
  different: boolean;
}

/** The models in one release root. */
class ModelRoots {
  /** By name in lower case. */
  #models: ReadonlyMap<string, ReleaseRoot> = new Map();
  /** Those that scans do not find any more, and since when. */
  #missing = new Map<string, number>();
  /** How long they must be missing, in milliseconds. */
  readonly #quiet: number;

  /** @param path of the release root */
  constructor(
    private readonly path: string,
    private readonly options: ReleasesOptions,
    private readonly shared: SharedCaches,
  ) {
    this.#quiet = (options.quiet ?? 1) * 1000;
  }

  get size(): number {
    return this.#models.size;
  }

  /** In the order of their names. */
  get all(): readonly ReleaseRoot[] {
    return [...this.#models.values()];
  }

  /** The root of a model, in whatever case its name is written. */
  named(name: string): ReleaseRoot | undefined {
    return this.#models.get(name.toLowerCase());
  }

  /** See `Settler.unsettled`. */
  get unsettled(): string[] {
    const names = this.all.flatMap(({ model, unsettled }) => {
      return unsettled.map((name) => `${model}/${name}`);
    });
    return [...names, ...[...this.#missing.keys()].map((name) => this.named(name)!.model)];
  }

  /** See `Settler.nextScan`. */
  get nextScan(): number {
    const gone = Math.min(...this.#missing.values()) + this.#quiet - performance.now() + 5;
    return Math.min(Math.max(20, gone), ...this.all.map(({ nextScan }) => nextScan));
  }

  /** Reads the models that a scan of the release root has found. */
  async scan(found: ReadonlyMap<string, ModelPlace>): Promise<ScannedModel[]> {
    const scanned: ScannedModel[] = [];
    const models = new Map<string, ReleaseRoot>();
    for (const [key, { name, real }] of found) {
      const known = this.#models.get(key);
      const isKnown = known?.model === name;
      try {
        const root = isKnown ? known : this.#make(name);
        models.set(key, root);
        // One that cannot be read stays as it was.
        const different = await root.read(real).catch(refuseBugs);
        scanned.push({ root, different: different === true || !isKnown });
      } catch (error) {
        refuseBugs(error);
      }
    }
    scanned.push(...this.#miss(models));
    this.#models = new Map([...models].sort(([a], [b]) => compareCodePoints(a, b)));
    return scanned;
  }

  /**
   * Keeps models that are missing for now: while one is exchanged for another by two renames, its
   * devices must not get the files of others. So it counts, as it was, until nothing has been found in
   * its place for the quiet time.
   *
   * @param models gets what still counts
   * @returns what is gone
   */
  #miss(models: Map<string, ReleaseRoot>): ScannedModel[] {
    const gone: ScannedModel[] = [];
    const missing = new Map<string, number>();
    const now = performance.now();
    for (const [key, root] of this.#models) {
      if (models.has(key)) continue;
      const since = this.#missing.get(key) ?? now;
      if (now - since < this.#quiet) {
        missing.set(key, since);
        models.set(key, root);
      } else {
        root.forget();
        gone.push({ root, different: true });
      }
    }
    this.#missing = missing;
    return gone;
  }

  #make(name: string): ReleaseRoot {
    return new ReleaseRoot(`${this.path}/${name}`, this.options, this.shared, name);
  }
}

// ──── Releases ──────────────────────────────────────────────────────────────────────────────────
// The interface of this part: a release root, with the models in it.

/**
 * A release root: the versions and images of its own, and the roots of models in it.
 *
 * @example
 * const releases = await Releases.open("examples/smart-meter");
 * releases.manifestFor({ current_ver: "1.0.0" }, "http://10.0.0.1:8000");
 */
export class Releases extends ReleaseRoot {
  /** The roots that the last scan found to be different, among them those of models that went. */
  changed: readonly ReleaseRoot[] = [];
  readonly #models: ModelRoots;
  /** Real path → the root whose directory it is; `undefined`: nothing in it is served. */
  #places: ReadonlyMap<string, ReleaseRoot | undefined> = new Map();
  #scanning: Promise<boolean> = Promise.resolve(false);

  private constructor(path: string, options: ReleasesOptions) {
    const others = new OtherFiles(options.onlyReleases !== true);
    const shared = { composer: new Composer(), others };
    super(resolve(path), options, shared);
    this.#models = new ModelRoots(this.path, options, shared);
  }

  /**
   * Reads a release root, and waits briefly for what is changing just now.
   *
   * @param root the directory that holds the versions
   * @throws {OTAError} when the root is missing, no directory, or cannot be read
   */
  static async open(root: string, options: ReleasesOptions = {}): Promise<Releases> {
    try {
      fs.readdirSync(root);
      const releases = new Releases(root, options);
      await releases.scan();
      const patience = performance.now() + 2000 * (options.quiet ?? 1);
      while (releases.unsettled.length > 0 && performance.now() < patience) {
        await Bun.sleep(releases.nextScan);
        await releases.scan();
      }
      return releases;
    } catch (error) {
      if (isBug(error)) throw error;
      const found = { ENOENT: "does not exist", ENOTDIR: "is not a directory" };
      const why = found[errorCode(error) as keyof typeof found] ?? errorText(error);
      throw new OTAError(`the root ${root} ${why}; --root names a directory of releases`, 2);
    }
  }

  /** Whether the root's path no longer resolves to the directory that was scanned last. */
  get isElsewhere(): boolean {
    try {
      return placeOf(this.path).id !== this.place;
    } catch {
      return true;
    }
  }

  /** The root of a model, in whatever case its name is written; `null`: the root itself. */
  rootOf(model: string | null): ReleaseRoot | undefined {
    return model === null ? this : this.#models.named(model);
  }

  /** The root itself and those of models, in the order of their names. */
  get roots(): readonly ReleaseRoot[] {
    return [this, ...this.#models.all];
  }

  /** Names in all roots: see `Settler.unsettled`. */
  override get unsettled(): string[] {
    return [...super.unsettled, ...this.#models.unsettled];
  }

  /** Of all roots: see `Settler.nextScan`. */
  override get nextScan(): number {
    return Math.min(super.nextScan, this.#models.nextScan);
  }

  /**
   * Reads all roots again; what did not change is not hashed again.
   *
   * @returns whether anything is different now
   * @throws when the root cannot be read; then everything stays as it was
   */
  scan(): Promise<boolean> {
    // Serialized: a scan in progress may already have passed the change that this one is for.
    const scan = this.#scanning.then(() => this.#scan());
    this.#scanning = scan.catch(() => false);
    return scan;
  }

  async #scan(): Promise<boolean> {
    const started = performance.now();
    const changed: ReleaseRoot[] = (await this.read()) ? [this] : [];
    const altered = [...this.altered];
    let { scanTime } = this;
    for (const { root, different } of await this.#models.scan(this.index.models)) {
      scanTime += root.scanTime;
      if (!different) continue;
      changed.push(root);
      altered.push(...root.altered.map((name) => `${root.model}/${name}`));
    }
    this.#places = this.#findPlaces();
    this.changed = changed;
    this.altered = altered;
    this.scanTime = scanTime;
    this.scanSeconds = (performance.now() - started) / 1000;
    return changed.length > 0;
  }

  #findPlaces(): ReadonlyMap<string, ReleaseRoot | undefined> {
    const { twins } = this.index;
    const places = new Map<string, ReleaseRoot | undefined>();
    if (this.#models.size + twins.size === 0) return places;
    for (const root of this.roots) if (!places.has(root.root)) places.set(root.root, root);
    for (const real of twins) if (!places.has(real)) places.set(real, undefined);
    return places;
  }

  /**
   * Finds the root for a device: that of the model below whose path it asks, else that of the model
   * that it names. Whoever names no model that is here gets the versions of the root itself.
   *
   * @param pathname of its request, percent-encoded
   */
  forDevice({ model = "", sysname = "" }: ManifestQuery, pathname = "/"): ReleaseRoot {
    if (this.#models.size === 0) return this;
    const { root = this } = this.rootAt(pathname) ?? {};
    if (root !== this) return root;
    return this.#models.named(model) ?? this.#models.named(sysname) ?? this;
  }

  /** Whether a path, percent-encoded, is that of the manifests of the root or of a model. */
  isManifest(pathname: string): boolean {
    if (pathname === "/manifest.json") return true;
    const isLike = this.#models.size > 0 && pathname.endsWith("/manifest.json");
    return isLike && this.rootAt(pathname)?.path === "manifest.json";
  }

  /**
   * Finds the root for the path of a request, and the path below that.
   *
   * @param pathname percent-encoded, with its leading slash
   * @returns `undefined` when it is malformed
   */
  rootAt(pathname: string): { root: ReleaseRoot; path: string } | undefined {
    let path = pathname.slice(1);
    try {
      if (path.includes("%")) path = decodeURIComponent(path);
    } catch {
      return undefined;
    }
    const slash = this.#models.size === 0 ? -1 : path.indexOf("/");
    const name = path.slice(0, Math.max(0, slash));
    const root = this.#models.named(name);
    return root?.model === name ? { root, path: path.slice(slash + 1) } : { root: this, path };
  }

  /**
   * Finds the file for the path of a request.
   *
   * @param pathname percent-encoded, with its leading slash
   * @returns `undefined` for what is not served: versions and images that are not offered,
   *   directories, dot entries at the top level of a root, links that leave it, private keys
   */
  locate(pathname: string): ServedFile | undefined {
    const at = this.rootAt(pathname);
    if (!at) return undefined;
    const { root, path } = at;
    const offered = root.offered(path);
    if (offered) return offered;
    const found = root.besideAt(path);
    if (!found || this.#places.size === 0) return found;
    // A link may lead into another root, where not all is offered.
    const place = ancestors(found.file).find((above) => this.#places.has(above));
    const other = place === undefined ? root : this.#places.get(place);
    if (other === root) return found;
    const below = found.file.slice(place!.length + 1);
    return other?.offered(below) ?? other?.besideAt(below);
  }

  /** Files of all roots: see `OtherFiles.list`. */
  override async beside(): Promise<{ path: string; files: number }[]> {
    const found = await super.beside();
    for (const root of this.#models.all) {
      const files = await root.beside();
      found.push(...files.map((file) => ({ ...file, path: `${root.model}/${file.path}` })));
    }
    return found;
  }

  /** See `ReleaseRoot.manifestFor`; of the root for this device. */
  override manifestFor(query: ManifestQuery, base: string, suffix = ""): Manifest | null {
    const root = this.forDevice(query);
    if (root !== this) return root.manifestFor(query, base, suffix);
    return super.manifestFor(query, base, suffix);
  }

  /** See `ReleaseRoot.manifestJSON`; of the root for this device. */
  override manifestJSON(query: ManifestQuery, base: string, suffix = ""): string {
    const root = this.forDevice(query);
    if (root !== this) return root.manifestJSON(query, base, suffix);
    return super.manifestJSON(query, base, suffix);
  }
}

// ──── Signing ─────────────────────────────────────────────────────────────────────────────────────
// Signing releases, at home: all steps to a version go into one file beside it.

/**
 * Makes the steps to a version: from itself and each older one, from nothing, and to the full list.
 *
 * @param image the one that belongs to the version
 * @param about what the steps share
 */
function makeSteps(
  releases: Releases,
  to: Release,
  image: FirmwareImage | undefined,
  about: Pick<Step, "expires" | "issued" | "model">,
): Step[] {
  const firmware = image ? { sha256: image.sha256, size: image.size, version: image.name } : null;
  const olds = releases.versions.filter(({ version }) => version.compare(to.version) <= 0);
  const digests: [from: string, digest: string][] = [
    ["", digestBetween(undefined, to)],
    [ANY, digestBetween(undefined, to, true)],
    ...olds.map((old): [string, string] => [old.name, digestBetween(old, to)]),
  ];
  const { digest: release, name } = to;
  const { expires, issued, model } = about;
  // In the order of the payload.
  return digests.map(([from, steps]) => {
    return { expires, firmware, from, issued, model, release, steps, to: name };
  });
}

/** How to sign a version. What is not given stays as it was signed before. */
export interface SignOptions {
  /** The firmware that belongs to it; at first the newest (for an older version: of the same name). */
  firmware?: string | undefined;
  /** The kind of board that it is for; at first, all. */
  model?: string | undefined;
  /** Seconds until it expires; at first, never. */
  expires?: number | undefined;
}

/** What came of signing a version. */
export interface Signed {
  /** How many steps lead to it. */
  steps: number;
  /** How many keys have signed them. */
  signatures: number;
  /** What is other than it was signed before: then older signatures are gone. */
  changed: string[];
}

/** ISO 8601 in whole seconds, as people write it. */
const isoTime = (milliseconds: number) => new Date(milliseconds).toISOString().replace(/\.\d+/, "");

/** A release root at home, where its versions are signed. */
export class SigningRoot {
  readonly #known = new Map<Release, SignedRelease | string | undefined>();

  private constructor(
    private readonly releases: Releases,
    private readonly ignore: readonly string[],
  ) {}

  /**
   * @param ignore globs of files to leave out, beside those that were left out before
   * @throws {OTAError} exit code 2 when the root cannot be read
   */
  static async open(root: string, ignore: readonly string[] = []): Promise<SigningRoot> {
    const options = { quiet: 0, ignoreSigned: true, ignore };
    return new SigningRoot(await Releases.open(root, options), ignore);
  }

  get versions(): string[] {
    return this.releases.versions.map(({ name }) => name);
  }

  /** The models in it, each of which is a root to sign of its own. */
  get models(): string[] {
    return this.releases.roots.slice(1).map(({ model }) => model);
  }

  #find(name: string): Release {
    const found = this.releases.find(name);
    if (found) return found;
    const names = this.versions.join(", ") || "none";
    throw new OTAError(`${this.releases.root} has no version ${name}; there are: ${names}`, 2);
  }

  #file({ name }: Release): string {
    return `${this.releases.root}/signed_${name}.json`;
  }

  /** What is signed of a version, read once; a text says why it cannot be used. */
  #read(release: Release): SignedRelease | string | undefined {
    if (!this.#known.has(release)) {
      const file = this.#file(release);
      this.#known.set(release, fs.existsSync(file) ? tryToRead(file, release.name) : undefined);
    }
    return this.#known.get(release);
  }

  #issuedOf(release: Release): string | undefined {
    const signed = this.#read(release);
    return typeof signed === "object" ? fullStep(signed).issued : undefined;
  }

  /** Now, but not before older versions, nor after newer ones: devices refuse to go back in time. */
  #issueTime(to: Release): string {
    let time = Date.now();
    const { versions } = this.releases;
    for (const one of versions) {
      const issued = one === to ? undefined : this.#issuedOf(one);
      if (issued === undefined) continue;
      const isOlder = one.version.compare(to.version) < 0;
      time = isOlder ? Math.max(time, Date.parse(issued)) : Math.min(time, Date.parse(issued));
    }
    return isoTime(time);
  }

  /** The image that belongs to a version. @param before the step as it was signed before, if any */
  #imageFor(to: Release, { firmware }: SignOptions, before?: Step): FirmwareImage | undefined {
    const { firmware: images, versions, root } = this.releases;
    const named = (name: string) => images.find(({ version }) => version.compare(name) === 0);
    if (firmware !== undefined) {
      const image = named(firmware);
      if (image) return image;
      throw new OTAError(`${root} has no firmware ${firmware}`, 2);
    }
    if (before) return before.firmware ? named(before.firmware.version) : undefined;
    return to === versions.at(-1) ? images.at(-1) : named(to.name);
  }

  /**
   * Signs a version: writes `signed_V.json` into the root, or adds a signature to what is signed there.
   *
   * @param key private
   * @throws {OTAError} exit code 2 when there is no such version or firmware
   */
  sign(name: string, key: KeyObject, options: SignOptions = {}): Signed {
    const to = this.#find(name);
    const old = this.#read(to);
    const signed = typeof old === "object" ? old : undefined;
    const before = signed && fullStep(signed);
    const lasts = before?.expires ? Date.parse(before.expires) - Date.parse(before.issued) : null;
    const { model = before?.model ?? null, expires } = options;
    const lifetime = expires === undefined ? lasts : expires * 1000;
    const issued = this.#issueTime(to);
    const steps = makeSteps(this.releases, to, this.#imageFor(to, options, before), {
      expires: lifetime === null ? null : isoTime(Date.parse(issued) + lifetime),
      issued,
      model,
    });
    const changed = signed ? this.#changes(signed, steps) : typeof old === "string" ? [old] : [];
    const isOver = before?.expires != null && Date.parse(before.expires) <= Date.now();
    if (signed && (lifetime !== lasts || isOver)) changed.push("its expiry");
    const isSame = signed !== undefined && changed.length === 0;
    const envelopes = isSame
      ? [...signed.steps.values()].map(({ envelope }) => envelope)
      : steps.map(sealStep);
    for (const envelope of envelopes) signEnvelope(envelope, key);
    const files = Object.fromEntries([...to.files].map(([path, { sha256 }]) => [path, sha256]));
    const ignore = [...new Set([...this.ignore, ...this.releases.signedIgnore])];
    const json = { files, ...(ignore.length > 0 && { ignore }), steps: envelopes };
    replaceFile(this.#file(to), `${JSON.stringify(json)}\n`);
    this.#known.delete(to);
    return { steps: steps.length, signatures: envelopes[0]!.signatures.length, changed };
  }

  /** What differs between the steps that were signed and those that would be. */
  #changes(signed: SignedRelease, now: readonly Step[]): string[] {
    const old = signed.steps;
    const [before, after] = [fullStep(signed), now.find(({ from }) => from === ANY)!];
    const changes: string[] = [];
    const key = ({ from, steps, release }: Step) => `${from} ${steps} ${release}`;
    const keys = new Set([...old.values()].map(({ step }) => key(step)));
    if (keys.size !== now.length || !now.every((step) => keys.has(key(step)))) {
      changes.push(before.release === after.release ? "the versions beside it" : "its files");
    }
    if (before.firmware?.sha256 !== after.firmware?.sha256) changes.push("its firmware");
    if (before.model !== after.model) changes.push("its model");
    return changes;
  }

  /**
   * Checks what is signed of a version.
   *
   * @param keys public; each must have signed every step
   * @returns the number of steps, and what is missing or wrong, one line each
   */
  async check(
    name: string,
    keys: readonly KeyObject[],
  ): Promise<{ steps: number; wrong: string[] }> {
    const to = this.#find(name);
    const signed = this.#read(to);
    if (!signed) return { steps: 0, wrong: [`there is no ${basename(this.#file(to))}`] };
    if (typeof signed === "string") return { steps: 0, wrong: [`it ${signed}`] };
    const { firmware } = this.releases;
    const change = await changedSinceSigned(signed, to, firmware, new TimeSlicer());
    if (change) return { steps: 0, wrong: [`it ${change}`] };
    const { issued } = fullStep(signed);
    const steps = makeSteps(this.releases, to, undefined, { expires: null, issued, model: null });
    const wrong = steps.flatMap((step) => checkStepFile(signed, step, keys));
    if (Date.parse(issued) > Date.now()) wrong.push(`it was issued in the future, at ${issued}`);
    const later = this.releases.versions.find((one) => {
      const other = one.version.compare(to.version) < 0 ? this.#issuedOf(one) : undefined;
      return other !== undefined && Date.parse(other) > Date.parse(issued);
    });
    if (later) wrong.push(`it was issued before ${later.name}: devices on that refuse it`);
    return { steps: steps.length, wrong };
  }
}

/** What is wrong with one signed step. @param now as it would be signed */
function checkStepFile(signed: SignedRelease, now: Step, keys: readonly KeyObject[]): string[] {
  const { from, steps, release } = now;
  const name = `the step from ${{ "": "nothing", [ANY]: "any version" }[from] ?? from}`;
  const one = signed.steps.get(from);
  if (!one) return [`${name} is missing`];
  if (one.step.steps !== steps || one.step.release !== release) return [`${name} has changed`];
  const signers = signersOf(one.envelope, keys);
  const absent = keys.filter((_, i) => !signers.has(i)).map(rawPublicKey);
  const wrong = absent.map((key) => `${name} is not signed by ${key}`);
  const { expires } = one.step;
  if (expires && Date.parse(expires) < Date.now()) wrong.push(`${name} expired at ${expires}`);
  return wrong;
}

/** Replaces a file as a whole, durably. */
function replaceFile(file: string, text: string): void {
  const draft = `${dirname(file)}/.${basename(file)}.${process.pid}.new`;
  const sync = (path: string, flags: string, write: (fd: number) => void) => {
    const fd = fs.openSync(path, flags);
    try {
      write(fd);
      fs.fsyncSync(fd);
    } finally {
      fs.closeSync(fd);
    }
  };
  try {
    sync(draft, "w", (fd) => fs.writeFileSync(fd, text));
    fs.renameSync(draft, file);
    sync(dirname(file), "r", () => {});
  } catch (error) {
    ignoreErrors(() => fs.unlinkSync(draft));
    throw error;
  }
}

// ──── Watch ─────────────────────────────────────────────────────────────────────────────────────
// Scans a root again when it changes. The system reports changes in directories that it watches. It
// does not report that the root's path resolves elsewhere, nor changes for which no watches are
// left.

/** Milliseconds from the first event to the scan, so that a copy of many files causes one scan. */
const GATHER = 200;
/** Milliseconds between two checks of where the root's path resolves to. */
const GLANCE = 500;
/** The least milliseconds between two scans without an event. */
const IDLE = { watched: 60_000, unwatched: 1000 };
/**
 * The pause after a scan, as a multiple of its CPU time on this thread. Scans then cost less than 2 %
 * of a core, reading directories and garbage collection on other threads included.
 */
const REST = 240;

/** Callbacks of a watch. */
interface WatchEvents {
  /** Called after a scan that found something different. */
  changed: () => void;
  /** Called with one line when changes may be noticed late. */
  warn?: ((line: string) => void) | undefined;
  /** A file directly in the root whose changes do not count, nor those of files beginning so. */
  ownFile?: string | undefined;
}

/** Scans a root whenever files change, until disposed. */
class RootWatch implements Disposable {
  #timer: Timer | undefined;
  #due = Infinity;
  #watcher: fs.FSWatcher | undefined;
  /** The directory that is watched. */
  #watched = "";
  /** Why not all of it is watched. */
  #blindness: unknown;
  #isTold = false;
  #isScanning = false;
  #isClosed = false;
  readonly #glancing: Timer;

  constructor(
    private readonly releases: Releases,
    private readonly events: WatchEvents,
  ) {
    this.#listen();
    this.#glancing = setInterval(() => {
      if (!this.#isScanning && releases.isElsewhere) this.#plan(0);
    }, GLANCE);
  }

  /** Requests a scan, for instance when content differs from the index. */
  readonly soon = (): void => this.#plan(GATHER + 2 * this.releases.scanTime);

  /** Watches the directory that the root resolves to now. */
  #listen(): void {
    this.#watcher?.close();
    this.#watched = this.releases.place;
    this.#blindness = undefined;
    try {
      this.#watcher = fs.watch(this.releases.root, { recursive: true }, (_, name) => {
        const { ownFile } = this.events;
        if (ownFile === undefined || !name?.startsWith(ownFile)) this.soon();
      });
      this.#watcher.on("error", (error) => this.#goBlind(error));
    } catch (error) {
      this.#goBlind(error);
    }
    // Changes since the last scan were not reported: scan once more.
    this.#plan(GATHER);
  }

  /** Falls back to polling: not every directory could be watched. */
  #goBlind(error: unknown): void {
    if (this.#blindness !== undefined || this.#isClosed) return;
    this.#blindness = error;
    this.#isTold = false;
    this.#plan(GATHER);
  }

  /** Warns, once it is known how long a scan takes. */
  #tell(): void {
    if (this.#blindness === undefined || this.#isTold) return;
    this.#isTold = true;
    const isFull = errorCode(this.#blindness) === "ENOSPC";
    this.events.warn?.(
      `changes may show late: the root is scanned every ${Math.ceil(this.#idle / 1000)} s, as ` +
        `not all of it can be watched (${errorText(this.#blindness)})` +
        (isFull ? "; raise fs.inotify.max_user_watches" : ""),
    );
  }

  get #idle(): number {
    const least = this.#blindness === undefined ? IDLE.watched : IDLE.unwatched;
    return Math.max(least, REST * this.releases.scanTime);
  }

  #plan(milliseconds: number): void {
    const at = performance.now() + milliseconds;
    if (this.#isClosed || at >= this.#due) return;
    clearTimeout(this.#timer);
    this.#due = at;
    this.#timer = setTimeout(() => void this.#scan(), milliseconds);
  }

  async #scan(): Promise<void> {
    this.#due = Infinity;
    if (this.#isScanning) return this.#plan(GATHER);
    this.#isScanning = true;
    // A root that is missing now may come back.
    const different = await this.releases.scan().catch(() => false);
    this.#isScanning = false;
    if (this.#isClosed) return;
    if (different) this.events.changed();
    this.#tell();
    if (this.releases.place !== this.#watched) this.#listen();
    this.#plan(this.releases.unsettled.length > 0 ? this.releases.nextScan : this.#idle);
  }

  [Symbol.dispose](): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    clearInterval(this.#glancing);
    this.#watcher?.close();
  }
}

// ──── Lint ──────────────────────────────────────────────────────────────────────────────────────
// Warnings for the owner of a release root, one line each.

/** A warning, and the release that it is about, if it is about one that is offered. */
interface RootWarning {
  of?: string;
  text: string;
}

/** What may surprise in a root, whatever device asks. */
export function rootWarnings(releases: ReleaseRoot): string[] {
  return findWarnings(releases).map(({ text }) => text);
}

/** `rootWarnings`, with what each is about. */
function findWarnings(releases: ReleaseRoot): RootWarning[] {
  const found: RootWarning[] = [];
  const add = (text: string, of?: string) => found.push({ text, ...(of !== undefined && { of }) });
  for (const { path, reason } of releases.held) add(`${path} is not offered: it ${reason}`);
  for (const { path, reason } of releases.unsigned) add(`${path} ${reason}`);
  const hasModels = releases instanceof Releases && releases.roots.length > 1;
  const { versions, firmware, held } = releases;
  if (versions.length + firmware.length + held.length === 0 && !hasModels) {
    add(
      `no release in ${releases.root}: put each version of the devices' files in a directory named ` +
        `by its version (1.0.0/flash/main.py), firmware beside it as firmware_1.0.0.bin`,
    );
  }
  for (const { path, name } of releases.firmware) {
    if (path.startsWith("firmare_")) add(`${path}: spelled firmware_ elsewhere`, name);
  }
  const names = [...new Set([...releases.versions, ...releases.firmware].map(({ name }) => name))];
  for (const name of names) {
    const released = /^(.*?\d)[.+_-]?(?:a|alpha|b|beta|c|rc|dev|pre|preview)[.+_-]?\d*$/i.exec(
      name,
    );
    if (released) {
      add(
        `${name} sorts after ${released[1]}: a device on ${name} never takes ${released[1]}`,
        name,
      );
    }
  }
  const [withV, without] = [names.filter((n) => /^v/i.test(n)), names.filter((n) => /^\d/.test(n))];
  if (withV.length > 0 && without.length > 0) {
    add(
      `${withV[0]} sorts after every name without a v (${without.at(-1)}): use one spelling`,
      withV[0],
    );
  }
  return found;
}

/** `boardWarnings` for devices on each version. */
export async function allBoardWarnings(releases: ReleaseRoot): Promise<string[]> {
  const { versions, firmware } = releases;
  const newest = { version: versions.at(-1), image: firmware.at(-1) };
  const steps = await warningsOfSteps(releases, newest);
  return steps.flatMap(({ from, lines }) => lines.map((line) => `from ${from}: ${line}`));
}

/** What boards with Pycom's original library cannot do on the way from each version to the newest. */
async function warningsOfSteps(
  { versions }: ReleaseRoot,
  { version: newest, image }: NewestItems,
): Promise<{ from: string; lines: string[] }[]> {
  const slicer = new TimeSlicer();
  const found: { from: string; lines: string[] }[] = [];
  for (const from of versions) {
    if (!newest || from === newest) break;
    const flashes = image !== undefined && image.version.compare(from.version) > 0;
    let deletes = false;
    if (flashes) {
      await slicer.each(from.files.keys(), (path) => (deletes ||= !newest.files.has(path)));
    }
    found.push({ from: from.name, lines: stepWarnings(from, newest, deletes && flashes) });
    if (slicer.isDue) await slicer.pause();
  }
  return found;
}

/** What boards with Pycom's original library cannot do with a manifest. */
export function boardWarnings(releases: ReleaseRoot, manifest: Manifest | null): string[] {
  const has = manifest?.previous_version && releases.find(manifest.previous_version);
  const target = manifest && releases.find(manifest.version);
  if (!has || !target) return [];
  return stepWarnings(has, target, manifest.delete.length > 0 && manifest.firmware !== undefined);
}

function stepWarnings(from: Release, to: Release, deletesAndFlashes: boolean): string[] {
  const added = [...to.directories].filter((path) => !from.directories.has(path));
  const found = added.map((directory) => {
    return (
      `${to.name} adds the directory ${directory}; boards with Pycom's library cannot ` +
      `create directories: keep its files in directories that they have`
    );
  });
  if (deletesAndFlashes) {
    found.push(
      `${to.name} deletes files and ships firmware; a board with Pycom's library that ` +
        `is cut off while flashing fails on every later try: delete in a release of its own`,
    );
  }
  return found;
}

// ════ IV Server ══════════════════════════════════════════════════════════════════════════════════
// A request is answered from memory: a decision of part III, and content that is cached in the forms
// that clients accept. What takes time (hashing, coding) is done once, beside the requests, within
// bounds: no client can make the server use more memory or CPU time than these.

// ──── Encoding ────────────────────────────────────────────────────────────────────────────────────
// Encodes content once for all devices, off the event loop, within a budget of CPU time and memory.

/**
 * Level for what is sent only once, and for long manifests: JSON that is mostly hashes becomes 5 %
 * larger than with level 19, in 1 % of the time.
 */
const FAST = 1;
/**
 * Manifests longer than this are encoded fast, since clients choose how many different ones there
 * are.
 */
const LONG_MANIFEST = 16 * 1024;

/** Content to encode, or a dictionary; read when its turn comes. */
interface Source {
  /** SHA-256. */
  key: string;
  size: number;
  /** `undefined` when the file has changed. */
  read: () => Promise<Blob | undefined>;
}

/** Encoded content. */
interface Coded {
  encoding: Coding;
  content: Blob;
  /** A hash of the encoded bytes: another version of an encoder may produce others. */
  tag: string;
}

/**
 * Probe level: if 9 does not shrink content (images, archives), 19 will not, at 30 times the cost.
 * Levels below 4 find nothing in machine code.
 */
const PROBE = 9;
/** Content shorter than this is encoded without a probe. */
const MIN_PROBED = 4096;
/**
 * A delta of at most this part of the content is good; of content longer than `MAX_BROTLI`, of which
 * a whole coding takes longer, and gains less, one of at most the other.
 */
const [GOOD_DELTA, FAIR_DELTA] = [1 / 8, 1 / 2];
/** Content shorter than this is not worth a `Content-Encoding` header. */
const MIN_CODED = 64;
/** Size of the cache of encoded content, in bytes. */
const CODED_BUDGET = 32 * 1024 * 1024;
/** Contents encoded at once: level 19 takes tens of MiB for each. */
const MAX_CODING = 2;
/** Bytes that may be queued for encoding; beyond that, content is sent plain. */
const MAX_WAITING = 32 * 1024 * 1024;
/** Budget for encoding: seconds of CPU time a minute, and how many minutes of it accumulate. */
const CODING = { seconds: 15, saved: 4 };

/** A token bucket of time spent encoding. */
class TokenBucket {
  #left: number;
  #at = performance.now();
  readonly #most: number;

  /** @param seconds a minute */
  constructor(private readonly seconds: number) {
    this.#most = this.#left = CODING.saved * seconds * 1000;
  }

  get isSpent(): boolean {
    const now = performance.now();
    this.#left = Math.min(this.#most, this.#left + ((now - this.#at) * this.seconds) / 60);
    this.#at = now;
    return this.#left <= 0;
  }

  /** @param milliseconds of work; may exceed what is left */
  spend(milliseconds: number): void {
    this.#left -= milliseconds;
  }
}

/** Encodes content, and caches the results. */
class Encoder {
  readonly #done = new Cache<Coded>(CODED_BUDGET);
  /** Contents that encoding does not shrink. */
  readonly #useless = new Cache<true>(CODED_BUDGET / 16);
  readonly #running = new SingleFlight<Coded | null | undefined>();
  #waiting = 0;
  readonly #pool = new Pool(MAX_CODING);

  /** @param budget when it is spent, only cached results are used */
  constructor(private readonly budget?: TokenBucket) {}

  get isSpent(): boolean {
    return this.budget?.isSpent ?? false;
  }

  /**
   * Encodes content.
   *
   * @returns `null` when the result would not be smaller, or it failed; `undefined` when that is not
   *   known, since the budget is spent
   */
  encode(
    encoding: Coding,
    content: Source,
    dictionary?: Source,
  ): Coded | Promise<Coded | null | undefined> | null | undefined {
    const name = `${encoding} ${content.key} ${dictionary?.key}`;
    const done = this.#done.get(name);
    if (done) return done;
    if (this.#useless.get(name)) return null;
    const needs = content.size + (dictionary?.size ?? 0);
    const isTooMuch = this.#waiting + needs > MAX_WAITING || this.budget?.isSpent;
    if (isTooMuch && !this.#running.has(name)) return undefined;
    return this.#running.run(name, async () => {
      this.#waiting += needs;
      try {
        const coded = await this.#pool.run(() => this.#make(encoding, content, dictionary));
        if (coded) this.#done.set(name, coded, coded.content.size);
        else if (coded === null) this.#useless.set(name, true, 0);
        return coded;
      } catch {
        // Another time it would fail as well: it is not worth waiting for.
        return null;
      } finally {
        this.#waiting -= needs;
      }
    });
  }

  /** See `encode`. */
  async #make(
    encoding: Coding,
    content: Source,
    dictionary?: Source,
  ): Promise<Coded | null | undefined> {
    if (this.budget?.isSpent) return undefined;
    const bytes = await (await content.read())?.bytes();
    const old = await (await dictionary?.read())?.bytes();
    const started = performance.now();
    try {
      if (!bytes || (dictionary && !old)) return undefined;
      const codec = CODINGS[encoding];
      const coded = codec.needsDictionary
        ? old && (await codec.encode(bytes, old, `${dictionary!.key} ${content.key}`))
        : await encodeWell(encoding, codec, bytes);
      if (!coded || coded.byteLength >= content.size) return null;
      const tag = Bun.hash(coded).toString(16).padStart(16, "0");
      return { encoding, content: intoBlob(coded), tag };
    } finally {
      this.budget?.spend(performance.now() - started);
      for (const used of [bytes, old]) if (used) release(used);
    }
  }

  /**
   * Finds the smallest form of content that the client accepts: of all codings that need its
   * dictionary, and of the preferred one that needs none. The latter is not tried where a delta is
   * good: so small a part of the content that it would hardly gain anything.
   *
   * @param old the client's dictionary
   */
  async smallest(
    accepted: ReadonlySet<Coding>,
    content: Source,
    old?: Source,
  ): Promise<SmallestForm> {
    if (!isCoded(content.size)) return { isFinal: true };
    const useOld = old && old.size > 0 && old.size <= MAX_CODED;
    const names = useOld ? withDictionary(accepted) : [];
    const forms = await Promise.all(names.map((name) => this.encode(name, content, old)));
    const delta = smallestOf(forms);
    const part = content.size <= MAX_BROTLI ? GOOD_DELTA : FAIR_DELTA;
    if (!delta || delta.content.size > content.size * part) {
      const encoding = bestWithoutDictionary(accepted, content.size);
      forms.push(encoding ? await this.encode(encoding, content) : null);
    }
    return { coded: smallestOf(forms), isFinal: !forms.includes(undefined) };
  }
}

/** The smallest form of content. */
interface SmallestForm {
  /** Absent: plain. */
  coded?: Coded | undefined;
  /** Whether there can be no smaller one another time, when the server is less busy. */
  isFinal: boolean;
}

function smallestOf(forms: readonly (Coded | null | undefined)[]): Coded | undefined {
  const [smallest] = forms
    .filter((form) => form != null)
    .sort((a, b) => a.content.size - b.content.size);
  return smallest;
}

/** Whether content of that size is encoded at all. */
function isCoded(size: number): boolean {
  return size >= MIN_CODED && size <= MAX_CODED;
}

/**
 * Encodes content without a dictionary, after a cheap probe where the full effort may be in vain.
 */
async function encodeWell(
  encoding: Coding,
  { encode }: PlainCodec,
  content: Uint8Array,
): Promise<Uint8Array> {
  const size = content.byteLength;
  const hasLevels = encoding === "br" || encoding === "zstd";
  if (hasLevels && size >= MIN_PROBED && size <= MAX_BEST) {
    const probe = await encode(content, PROBE);
    if (probe.byteLength >= size) return probe;
    release(probe);
  }
  return encode(content);
}

// ──── Responses and headers ───────────────────────────────────────────────────────────────────────
// HTTP responses. Two promises to deployed boards shape them. A board reads 100 bytes at a time and
// finds the end of the header only inside one such piece: so the header of every 200 to a GET is
// padded to a multiple of 100 bytes. (Such a board never sends `Accept-Encoding`: who does sends for
// fewer bytes, and gets no padding.) And it reads until the connection closes, as Bun does after a
// response to HTTP/1.0.

/** A response before it becomes Bun's; it may be cached and sent many times. */
interface Answer {
  status: number;
  headers: Record<string, string>;
  /** A blob: Bun would copy other bytes for every response. */
  body: Blob | null;
  /** Of the body. */
  size: number;
  /** The content of which the body is all or a part. */
  content?: Blob;
  /** The open file that the content is sent from; absent: it is in memory. */
  fd?: number;
  /** How the body is coded, and the bytes that this saves. */
  coding?: { encoding: Coding; saved: number };
  /** Status and headers, padded and not, made when first sent. */
  padded?: { status: number; headers: Headers };
  bare?: { status: number; headers: Headers };
}

/** How long a cache may keep content before it revalidates, in seconds. */
const MAX_AGE = 60;

const types = new Map<string, string>();

/** The media type of a file, by its extension. */
function typeOf(file: string): string {
  const ending = extname(file);
  const known = types.get(ending) ?? Bun.file(file).type;
  types.set(ending, known);
  return known;
}

/**
 * The answer with the whole content of a file.
 *
 * @param etag strong, quoted, of these bytes
 */
function wholeAnswer(file: ServedFile, content: Blob, etag: string, encoding?: Coding): Answer {
  const headers: Record<string, string> = {
    "Content-Type": typeOf(file.file),
    // Without it, nginx as a cache answers no Range from what it keeps.
    "Accept-Ranges": "bytes",
    ETag: etag,
    "Cache-Control": `max-age=${MAX_AGE}`,
    Vary: "Accept-Encoding, Available-Dictionary",
  };
  const whole: Answer = { status: 200, headers, body: content, size: content.size, content };
  if (!encoding) return whole;
  headers["Content-Encoding"] = encoding;
  return { ...whole, coding: { encoding, saved: file.size - content.size } };
}

/** Applies `If-None-Match`, `Range` and `If-Range` to the answer with the whole content. */
function select(request: Request, whole: Answer): Answer {
  const { headers: asked } = request;
  const etag = whole.headers["ETag"]!;
  if (matches(asked.get("if-none-match"), etag)) {
    const { "Content-Type": _, "Content-Disposition": __, ...headers } = whole.headers;
    return { status: 304, headers, body: null, size: 0 };
  }
  const wanted = request.method === "GET" ? asked.get("range") : null;
  if (wanted === null || ![null, etag].includes(asked.get("if-range"))) return whole;
  const range = parseRange(wanted, whole.size);
  if (range === undefined) return whole;
  if (range === "unsatisfiable") {
    return plain(416, `it has only ${whole.size} bytes`, {
      "Content-Range": `bytes */${whole.size}`,
    });
  }
  const { start, end } = range;
  const { padded: _, bare: __, ...part } = whole;
  const headers = { ...part.headers, "Content-Range": `bytes ${start}-${end - 1}/${whole.size}` };
  if (part.coding) part.coding = { ...part.coding, saved: 0 };
  return { ...part, status: 206, headers, body: part.body!.slice(start, end), size: end - start };
}

/** Whether an `If-None-Match` names the tag (RFC 9110, 13.1.2: weakly compared). */
function matches(condition: string | null, etag: string): boolean {
  if (condition === null) return false;
  if (condition.trim() === "*") return true;
  // A tag may have commas in it (RFC 9110, 8.8.3).
  const next = /[\t ,]*(?:W\/)?("[^"]*")[\t ]*(?=,|$)/y;
  for (let found = next.exec(condition); found; found = next.exec(condition)) {
    if (found[1] === etag) return true;
  }
  return false;
}

/**
 * Reads a `Range` of one part (RFC 9110, 14.1.2).
 *
 * @returns `end` is exclusive; `undefined` when the header is to be ignored: none, not bytes,
 *   malformed, or several parts
 */
export function parseRange(
  header: string | null,
  size: number,
): { start: number; end: number } | "unsatisfiable" | undefined {
  const found = /^bytes=\s*(\d*)-(\d*)\s*$/i.exec(header ?? "");
  if (!found || (found[1] === "" && found[2] === "")) return undefined;
  if (found[1] === "") {
    const length = Math.min(Number(found[2]), size);
    return length === 0 ? "unsatisfiable" : { start: size - length, end: size };
  }
  const start = Number(found[1]);
  const last = found[2] === "" ? Infinity : Number(found[2]);
  if (last < start) return undefined;
  return start >= size ? "unsatisfiable" : { start, end: Math.min(last + 1, size) };
}

/** A short text for people. */
function plain(status: number, message: string, headers: Record<string, string> = {}): Answer {
  const answer = content("text/plain", new Blob([`${message}\n`]));
  return { ...answer, status, headers: { ...answer.headers, ...headers } };
}

function content(type: string, body: Blob): Answer {
  return { status: 200, headers: { "Content-Type": type }, body, size: body.size };
}

/** What a header block must be a multiple of: the size of the pieces in which boards read. */
const HEADER_PIECE = 100;

function toResponse(request: Request, answer: Answer): Response {
  const { status, headers, size } = answer;
  if (request.method === "HEAD") {
    // In a 304 it would have to be the length of the content.
    const length = status !== 304 && { "Content-Length": `${size}` };
    return new Response(null, { status, headers: { ...headers, ...length } });
  }
  if (status !== 200 || answer.coding || request.headers.has("accept-encoding")) {
    answer.bare ??= { status, headers: new Headers(headers) };
    return new Response(answer.body, answer.bare);
  }
  if (!answer.padded) {
    answer.padded = { status, headers: new Headers(headers) };
    answer.padded.headers.set("X-Pad", padding(headers, size));
  }
  return new Response(answer.body, answer.padded);
}

/**
 * The value of `X-Pad` that makes a 200's header block end on a multiple of 100 bytes, given the
 * other headers. Bun itself adds the status line, `Date` and `Content-Length`.
 */
function padding(headers: Record<string, string>, size: number): string {
  let length =
    "HTTP/1.1 200 OK\r\n".length +
    "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n".length +
    `Content-Length: ${size}\r\n`.length +
    "X-Pad: \r\n\r\n".length;
  for (const name in headers) length += name.length + headers[name]!.length + ": \r\n".length;
  // At least one character, since an empty header could be left out.
  return "-".repeat(HEADER_PIECE - (length % HEADER_PIECE));
}

// ──── Log and metrics ─────────────────────────────────────────────────────────────────────────────
// Each request becomes one event once it has ended. The log and the metrics are made from these
// events.

/** One request, and how it ended. */
interface Contact {
  method: string;
  /** Percent-encoded, without query and without the path of `--url`. */
  path: string;
  query: ManifestQuery;
  /** Address of the other end of the connection; `-` where it is not known. */
  peer: string;
  /** Address of the client: the peer, or what a trusted proxy says. */
  address: string;
  status: number;
  /** Bytes of the body; `undefined` when the connection ended before all of it was sent. */
  sent: number | undefined;
  /** Until the body was sent. */
  milliseconds: number;
  coding?: Answer["coding"];
  /**
   * Of a GET of a manifest: labels of the releases that the device is on and gets, and the model
   * whose root these are in.
   */
  offer?: { from: string; to: string; model: string };
  /** Of a request for a manifest. */
  asked?: {
    /** The model whose root answers; empty: the root itself. */
    model: string;
    /** Whether the root has the version that it names; looked up only where it could matter. */
    isKnown: boolean;
    /** What a GET is offered. */
    offer: Offered | null;
  };
}

/** A release on offer. */
interface Offered {
  /** `null`: firmware alone. */
  version: string | null;
  firmware: string | null;
}

/**
 * Escapes text from the network for the log: printable ASCII without spaces, at most 64 characters.
 */
function printable(text: string): string {
  if (text.length <= 64 && !/[^!-~]/.test(text)) return text;
  const escape = (character: string) => `\\u{${character.codePointAt(0)!.toString(16)}}`;
  return text
    .slice(0, 64)
    .replace(/[^!-~]/gu, escape)
    .slice(0, 64);
}

/**
 * The log line of a contact: time, address, device, method, path, status, bytes, milliseconds;
 * then, if any, the coding, the model and the version that the device reports as failed.
 */
function logLine(contact: Contact): string {
  const { method, path, query, address, status, sent, milliseconds, coding, offer } = contact;
  const device = query.devid || query.wmac;
  const id = device ? ` device=${printable(device)}` : "";
  const coded = coding ? ` coding=${coding.encoding.replace(" ", "")}` : "";
  const model = offer?.model ? ` model=${printable(offer.model)}` : "";
  const failed = query.failed ? ` failed=${printable(query.failed)}` : "";
  const tenths = Math.round(milliseconds * 10);
  const taken = `${Math.trunc(tenths / 10)}.${tenths % 10}ms${sent === undefined ? " aborted" : ""}`;
  const what = `${printable(method)} ${printable(path)} ${status} ${sent ?? "-"}`;
  return `${timeStamp()} ${address}${id} ${what} ${taken}${coded}${model}${failed}`;
}

const clock = { at: 0, text: "" };

/** The time in ISO 8601, formatted once a millisecond. */
function timeStamp(): string {
  const now = Date.now();
  if (now !== clock.at) Object.assign(clock, { at: now, text: new Date(now).toISOString() });
  return clock.text;
}

const COUNTERS = {
  ota_requests_total: "Requests by status",
  ota_sent_bytes_total: "Bytes of bodies that were sent whole",
  ota_aborted_total: "Bodies of which the connection ended before they were sent whole",
  ota_saved_bytes_total: "Bytes of bodies that coding made unnecessary",
  ota_manifests_total: "Manifests by the version a device has and the one it gets",
  ota_failures_total: "Manifests asked for by devices that report a version as failed",
  ota_changed_total: "Versions and images that changed after they were offered",
};

/** The label of what concerns a model, as in Prometheus' text format. */
function modelLabel(model: string): string {
  return `model="${model.replace(/["\\]/g, "\\$&").replaceAll("\n", "\\n")}"`;
}

/** What a server has done, as Prometheus reads it (text format 0.0.4). */
class Metrics {
  /** Name → labels → value; a number stands for the label `status`. */
  readonly #counts = new Map(
    Object.keys(COUNTERS).map((name) => [name, new Map<string | number, number>()]),
  );

  constructor(private readonly releases: Releases) {
    // A counter must exist at 0 before its first event, so that an alert can see the step.
    this.add("ota_changed_total", "", 0);
  }

  /**
   * Adds to a counter.
   *
   * @param labels as in Prometheus' text format, `version="1.0.1"`; or a status
   */
  add(name: keyof typeof COUNTERS, labels: string | number = "", amount = 1): void {
    const counts = this.#counts.get(name)!;
    counts.set(labels, (counts.get(labels) ?? 0) + amount);
  }

  /** Counts a contact. */
  count({ status, sent, coding, offer, query, path }: Contact): void {
    this.add("ota_requests_total", status);
    if (sent === undefined) this.add("ota_aborted_total");
    else this.add("ota_sent_bytes_total", "", sent);
    if (coding && sent) this.add("ota_saved_bytes_total", "", coding.saved);
    if (!offer) return;
    const model = offer.model && `,${modelLabel(offer.model)}`;
    // A list is no update.
    if (query.list === undefined) {
      this.add("ota_manifests_total", `from="${offer.from}",to="${offer.to}"${model}`);
    }
    if (!query.failed) return;
    const failed = this.label(query.failed, this.releases.forDevice(query, path));
    this.add("ota_failures_total", `version="${failed}"${model}`);
  }

  /**
   * The label for a version that a device named: one of its root's, or `other`, so that clients
   * cannot create labels without bound.
   */
  label(version: string | undefined, root: ReleaseRoot): string {
    if (version === undefined || version === "" || version === "0") return "none";
    const image = () => root.firmware.find((known) => known.version.compare(version) === 0);
    return root.find(version)?.name ?? image()?.name ?? "other";
  }

  /** All metrics; the gauges are read off the releases. */
  text(): string {
    const { roots, scanSeconds } = this.releases;
    const ofRoots = (name: string, items: "versions" | "firmware") =>
      roots.map(({ model, [items]: { length } }) => {
        return `${name}${model && `{${modelLabel(model)}}`} ${length}`;
      });
    const gauges: [name: string, help: string, values: string[]][] = [
      ["ota_releases", "Versions offered", ofRoots("ota_releases", "versions")],
      ["ota_firmware", "Firmware images offered", ofRoots("ota_firmware", "firmware")],
      ["ota_scan_seconds", "Duration of the last scan", [`ota_scan_seconds ${scanSeconds}`]],
      ["ota_build_info", "The version of ota.ts", [`ota_build_info{version="${TOOL_VERSION}"} 1`]],
    ];
    const lines = gauges.flatMap(([name, help, values]) => {
      return [`# HELP ${name} ${help}`, `# TYPE ${name} gauge`, ...values];
    });
    for (const [name, help] of Object.entries(COUNTERS)) {
      lines.push(`# HELP ${name} ${help}`, `# TYPE ${name} counter`);
      for (const [key, value] of this.#counts.get(name)!) {
        const labels = typeof key === "number" ? `status="${key}"` : key;
        lines.push(labels ? `${name}{${labels}} ${value}` : `${name} ${value}`);
      }
    }
    return `${lines.join("\n")}\n`;
  }
}

// ──── Bodies in flight ────────────────────────────────────────────────────────────────────────────
// Large bodies in flight to clients that may be slow. Bun sends a body but does not report when it
// has been sent; until then its content takes memory, or its file must stay open. Files are opened
// only if they are unchanged, and never pipes: opening one would block.

/** Bodies up to this size fit into socket buffers and are not tracked. */
const SMALL_BODY = 64 * 1024;
/** Bytes of content in memory that may be in flight; beyond that, content is sent from disk. */
const MAX_SENDING = 32 * 1024 * 1024;

/** A large body in flight. */
interface InFlightBody {
  request: Request;
  server: Bun.Server<undefined>;
  /** The content, held in memory until it is sent. */
  held: Blob;
  /** The open file that it is sent from instead. */
  fd: number | undefined;
  /** Called when the system has taken all of it, or the connection has closed. */
  ended: (isWhole: boolean) => void;
}

/** All large bodies in flight. */
class InFlight {
  /** Added since the last poll. */
  #fresh: InFlightBody[] = [];
  /** Still in flight at the last poll. */
  #slow: InFlightBody[] = [];
  /** Ended; whether whole or aborted is known after the next turn of the event loop. */
  readonly #over: InFlightBody[] = [];
  #timer: Timer | undefined;
  /** Content in memory → how many responses are sending it. */
  readonly #held = new Map<Blob, number>();
  #bytes = 0;
  /** Bytes of content that is being read into memory. */
  reading = 0;

  /** Whether content in memory may be sent in one more response. */
  hasRoomFor(content: Blob): boolean {
    return this.#held.has(content) || this.hasRoom(content.size);
  }

  /** Whether so many more bytes may be in memory. */
  hasRoom(size: number): boolean {
    const taken = this.#bytes + this.reading;
    return taken === 0 || taken + size <= MAX_SENDING;
  }

  /** Tracks a body. Must be called before the response is returned to Bun. */
  add(body: InFlightBody): void {
    const { request, held, fd } = body;
    // In Bun, a signal that is first read after the abort does not show it.
    void request.signal;
    if (fd === undefined) this.#count(held, 1);
    if (this.#fresh.push(body) === 1) setImmediate(() => this.#look());
  }

  #count(content: Blob, change: 1 | -1): void {
    const before = this.#held.get(content) ?? 0;
    const after = before + change;
    if (after === 0) this.#held.delete(content);
    else this.#held.set(content, after);
    if (Math.min(before, after) === 0) this.#bytes += change * content.size;
  }

  /** Most bodies have been sent by the first check. */
  #look(): void {
    const fresh = this.#fresh;
    this.#fresh = [];
    const slow = fresh.filter((body) => !this.#isThrough(body));
    for (const body of slow) this.#slow.push(body);
    this.#poll();
  }

  /** Polls the others; the more there are, the less often. */
  #poll(): void {
    if (this.#slow.length === 0) return;
    this.#timer ??= setTimeout(
      () => {
        this.#timer = undefined;
        this.#slow = this.#slow.filter((body) => !this.#isThrough(body));
        this.#poll();
      },
      Math.min(1000, 20 + this.#slow.length / 5),
    );
  }

  /** Whether a body has ended: Bun forgets the address of a request when it is done with it. */
  #isThrough(body: InFlightBody): boolean {
    if (body.server.requestIP(body.request) !== null) return false;
    // Whether it was aborted, its signal shows only after the next turn of the event loop.
    if (this.#over.push(body) === 1) setImmediate(() => setImmediate(() => this.#finish()));
    return true;
  }

  #finish(): void {
    for (const body of this.#over.splice(0)) {
      this.#end(body, !body.request.signal.aborted);
    }
  }

  #end({ held, fd, ended }: InFlightBody, isWhole: boolean): void {
    if (fd === undefined) this.#count(held, -1);
    else fs.closeSync(fd);
    ended(isWhole);
  }

  /** Ends all bodies, once no server sends any more. */
  close(): void {
    clearTimeout(this.#timer);
    const all = [...this.#fresh, ...this.#slow];
    this.#fresh = this.#slow = [];
    for (const body of all) if (!this.#isThrough(body)) this.#end(body, false);
    this.#finish();
  }
}

/** Opens a regular file for reading; throws when it is anything else. */
function openFile(file: string): number {
  const { O_RDONLY, O_NONBLOCK, O_NOFOLLOW } = fs.constants;
  const isFile = (stat: fs.Stats) => {
    if (!stat.isFile()) throw new Error(`${file} is not a file`);
  };
  isFile(fs.lstatSync(file));
  // It may have been replaced meanwhile: opening a pipe would block, a link could lead elsewhere.
  const fd = fs.openSync(file, O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
  try {
    isFile(fs.fstatSync(fd));
    return fd;
  } catch (error) {
    fs.closeSync(fd);
    throw error;
  }
}

/** Opens a file if it is unchanged since it was found. */
function openFound({ file, stamp }: ServedFile): number | undefined {
  let fd: number;
  try {
    fd = openFile(file);
  } catch {
    return undefined;
  }
  if (stampOf(fs.fstatSync(fd)) === stamp) return fd;
  fs.closeSync(fd);
  return undefined;
}

/** Reads the first bytes of a file off the event loop. */
async function readFile(file: string, size: number): Promise<Uint8Array> {
  const fd = openFile(file);
  try {
    return await Bun.file(fd).slice(0, size).bytes();
  } finally {
    fs.closeSync(fd);
  }
}

// ──── File answers ────────────────────────────────────────────────────────────────────────────────
// Answers with the content of a file, in the smallest form that the client accepts: encoded, plain
// from memory, or plain from disk.

/**
 * Content up to this is read, verified and cached before it is sent; larger content is sent from
 * disk.
 */
const MAX_KEPT = 4 * 1024 * 1024;
/** Size of the cache of plain content, in bytes. */
const CONTENT_BUDGET = 32 * 1024 * 1024;

/** Answers with the content of files. */
class Contents {
  /** Whole answers by SHA-256 and media type. */
  readonly #kept = new Cache<Answer>(CONTENT_BUDGET);
  readonly #reading = new SingleFlight<Blob | undefined>();

  /** @param mismatch is called when content on disk differs from the index */
  constructor(
    private readonly releases: Releases,
    private readonly encoder: Encoder,
    private readonly inFlight: InFlight,
    private readonly mismatch: () => void,
  ) {}

  answer(request: Request, path: string, file: ServedFile): Answer | Promise<Answer> {
    const accepted = acceptedCodings(request.headers.get("accept-encoding"));
    if (accepted.size === 0 || file.sha256 === undefined || !isCoded(file.size)) {
      return this.#plain(request, file);
    }
    const named =
      withDictionary(accepted).length > 0
        ? availableDictionary(request.headers.get("available-dictionary"))
        : undefined;
    const at = named === undefined ? undefined : this.releases.rootAt(path);
    const old = at?.root.predecessor(at.path, named!);
    const sources = [file, old].map((found) => found && this.#source(found, found.sha256!));
    return this.encoder.smallest(accepted, sources[0]!, sources[1]).then(({ coded }) => {
      if (!coded || !this.inFlight.hasRoomFor(coded.content)) return this.#plain(request, file);
      const { encoding, content, tag } = coded;
      const etag = `"${tag}-${encoding.replace(", ", "+")}"`;
      return select(request, wholeAnswer(file, content, etag, encoding));
    });
  }

  /** The plain content: from memory, or from disk. */
  #plain(request: Request, file: ServedFile): Answer | Promise<Answer> {
    const { sha256: key, size } = file;
    if (key === undefined || size > MAX_KEPT) return this.#fromDisk(request, file);
    const kept = this.#kept.get(nameOf(key, file));
    if (kept) {
      const hasRoom = size <= SMALL_BODY || this.inFlight.hasRoomFor(kept.content!);
      return hasRoom ? select(request, kept) : this.#fromDisk(request, file);
    }
    if (!this.#reading.has(key) && !this.inFlight.hasRoom(size)) {
      return this.#fromDisk(request, file);
    }
    return this.#read(file, key).then((content) => {
      if (!content) return this.#changing();
      return select(request, wholeAnswer(file, content, file.etag));
    });
  }

  /** The plain content of a file that is unchanged since it was found. */
  #fromDisk(request: Request, file: ServedFile): Answer {
    const fd = openFound(file);
    if (fd === undefined) return this.#changing();
    // By name: for a slice of a descriptor Bun sends the length of the whole file. A slice even of
    // the whole: else Bun would answer Range by itself, without regard to If-Range.
    const content = Bun.file(`/dev/fd/${fd}`).slice(0, file.size);
    const whole: Answer = { ...wholeAnswer(file, content, file.etag), fd };
    // Else Bun adds one with the file's name.
    whole.headers["Content-Disposition"] = "inline";
    const answer = select(request, whole);
    if (request.method === "HEAD" || answer.fd === undefined) fs.closeSync(fd);
    return answer;
  }

  /** The content of a version's file, or of an image. */
  source(file: IndexedFile): Source {
    return this.#source(file, file.sha256);
  }

  #source(file: ServedFile, key: string): Source {
    const kept = () => this.#kept.get(nameOf(key, file))?.content;
    return { key, size: file.size, read: async () => kept() ?? (await this.#read(file, key)) };
  }

  /** The answer while content on disk differs from the index. */
  #changing(): Answer {
    this.mismatch();
    return plain(503, "changing just now", { "Retry-After": "2" });
  }

  /** Reads and verifies content; `undefined` when it differs from the index. */
  #read(file: ServedFile, key: string): Promise<Blob | undefined> {
    return this.#reading.run(key, async () => {
      const { size } = file;
      this.inFlight.reading += size;
      try {
        // One byte more shows that it has grown.
        const bytes = await readFile(file.file, size + 1);
        if (bytes.byteLength !== size || sha256(bytes) !== key) return undefined;
        const content = intoBlob(bytes);
        const whole = wholeAnswer(file, content, file.etag);
        if (size <= MAX_KEPT) this.#kept.set(nameOf(key, file), whole, size);
        return content;
      } catch {
        return undefined;
      } finally {
        this.inFlight.reading -= size;
      }
    });
  }
}

/** The key of cached content: the same bytes may be sent with different media types. */
function nameOf(key: string, { file }: ServedFile): string {
  return `${key} ${typeOf(file)}`;
}

/** 503 for a large request while slow clients hold all memory for sending. */
function busy(): Answer {
  return plain(503, "too much is on its way just now", { "Retry-After": "5" });
}

// ──── Certificates and proxies ───────────────────────────────────────────────────────────────────
// What stands between server and client: TLS certificates, which are renewed while it runs, and
// proxies whose headers are trusted.

/** Interval at which the files of a certificate are checked, in milliseconds. */
const CERTIFICATE_POLL = 2000;

/**
 * Watches the files of a certificate, however they are replaced: by a copy, a rename, a switched
 * link.
 *
 * @param renewed is called with each new certificate
 * @param failed is called once for each change that leaves unusable files
 */
function watchCertificate(
  files: Certificate,
  renewed: (certificate: Certificate) => void,
  failed: (error: unknown) => void,
): Disposable {
  const look = () => {
    const stat = (file: string) => fs.statSync(file, { throwIfNoEntry: false });
    return [files.cert, files.key].map((file) => {
      const found = stat(file);
      return found && stampOf(found);
    });
  };
  let known = look().join();
  let complained = "";
  const timer = setInterval(() => {
    const seen = look().join();
    if (seen === known) return;
    try {
      renewed(readServerCertificate(files));
      known = seen;
    } catch (error) {
      // Certificate and key are replaced one after the other.
      if (complained === seen) failed(error);
      if (complained === seen) known = seen;
      complained = seen;
    }
  }, CERTIFICATE_POLL);
  return { [Symbol.dispose]: () => clearInterval(timer) };
}

/** The proxies whose `X-Forwarded-` headers count. */
class Proxies {
  readonly #trusted = new BlockList();

  /** @throws {OTAError} when one is neither an address nor a network such as `10.0.0.0/8` */
  constructor(addresses: readonly string[]) {
    for (const text of addresses) {
      const [address = "", bits] = text.split("/");
      const family = isIP(address);
      const most = family === 6 ? 128 : 32;
      const prefix = bits === undefined ? most : /^\d{1,3}$/.test(bits) ? Number(bits) : Infinity;
      if (family === 0 || prefix > most) {
        const found = JSON.stringify(text);
        throw new OTAError(
          `--trust-proxy expects an address or a network (10.0.0.0/8), found ${found}`,
          2,
        );
      }
      this.#trusted.addSubnet(address, prefix, family === 6 ? "ipv6" : "ipv4");
    }
  }

  /** @param address an IPv4 address without `::ffff:` */
  trusts(address: string): boolean {
    const family = isIP(address);
    return family !== 0 && this.#trusted.check(address, family === 6 ? "ipv6" : "ipv4");
  }

  /** The client's address: the last one in the chain that is not a trusted proxy. */
  client(headers: Headers, peer: string): string {
    const chain = (headers.get("x-forwarded-for") ?? "").split(",").map((item) => item.trim());
    let client = peer;
    while (this.trusts(client)) {
      const before = plainAddress(chain.pop() ?? "");
      if (isIP(before) === 0) break;
      client = before.toLowerCase();
    }
    return client;
  }
}

/** Strips `::ffff:` from an IPv4-mapped IPv6 address. */
function plainAddress(address: string): string {
  return address.startsWith("::") ? address.replace(/^::ffff:(?=\d+\.)/i, "") : address;
}

/** The last value of a header that proxies append to. */
function lastOf(headers: Headers, name: string): string | undefined {
  return headers.get(name)?.split(",").at(-1)?.trim();
}

/** What a proxy says of how it was asked. */
function forwardedScheme(headers: Headers): "http" | "https" | undefined {
  const scheme = lastOf(headers, "x-forwarded-proto")?.toLowerCase();
  return scheme === "http" || scheme === "https" ? scheme : undefined;
}

// ──── Request checks ──────────────────────────────────────────────────────────────────────────────
// The options of a server, and the checks that apply to every request.

/** Where time comes from. */
export interface FleetClock {
  /** Milliseconds since 1970; may jump. */
  now(): number;
  /** Milliseconds since some moment; never jumps. */
  elapsed(): number;
}

/** What `serve` needs; every field has the default of the command line. */
export interface ServeOptions extends ReleasesOptions {
  /** The release root; the current directory. */
  root?: string;
  /** 0 picks a free one; 8000. */
  port?: number;
  /** The address to listen on; 0.0.0.0, all of IPv4. */
  host?: string;
  /** What URLs in manifests begin with, instead of the request's `Host`: a CDN, a TLS proxy. */
  url?: string;
  /** File of the Ed25519 private key that signs manifests. */
  sign?: string;
  /** Required of every request, in `Authorization: Bearer` or as `token=`. */
  token?: string;
  /** Certificate for HTTPS; read again when the files change. */
  tls?: Certificate;
  /** Proxies whose `X-Forwarded-Proto` and `-For` count: addresses, and networks (`10.0.0.0/8`). */
  trustProxy?: readonly string[];
  /** CPU time for encoding content, in seconds a minute; 15. Beyond that, content is sent plain. */
  coding?: number;
  /** Called with one line for each request. */
  log?: (line: string) => void;
  /**
   * Where the fleet is kept: the path of a SQLite file, or `postgres://…`; `false`, which is the
   * default here, for none.
   */
  fleet?: string | false;
  /** Silence after an offer that is usual for every device, in seconds; 3600. */
  silent?: number;
  /** Where the time of the fleet comes from; see `FleetOptions`. */
  clock?: FleetClock;
  /** Milliseconds between two writes to the fleet's store; 1000. */
  tick?: number;
  /** Opens the fleet's interface; absent: one that is made at random, and kept with the fleet. */
  adminToken?: string | undefined;
  /** Whether each version that appears starts a rollout of its own. */
  staged?: boolean | undefined;
  /** An address that is sent JSON when a rollout halts, pauses or is done. */
  notify?: string | undefined;
  /** Called when a version or an image came, changed or went. */
  changed?: (releases: Releases) => void;
  /** Called with one line for the owner of the root. */
  warn?: (line: string) => void;
}

/** What a server accepts of a request. Bun itself refuses headers of more than 16 KiB with 431. */
export const LIMITS = {
  /** Characters of the path and the query. */
  target: 4096,
  /** Characters of the query. */
  query: 2048,
  /** Characters of `current_ver`, which may have no control characters. */
  version: 128,
  /** Seconds without a byte either way before a connection is closed. */
  idle: 60,
};

const METHODS = "GET, HEAD";

/** Checks a `--url`: absolute http(s), without query; drops slashes at the end. */
function baseURL(given: string): string {
  const url = parseHttpURL(given);
  if (!url || url.search || url.hash) {
    const found = JSON.stringify(given);
    throw new OTAError(`--url expects an http(s) address without a query, found ${found}`, 2);
  }
  return url.href.replace(/\/+$/, "");
}

/** A request target, parsed. */
interface RequestTarget {
  path: string;
  query: ManifestQuery;
  /** Of path and query. */
  length: number;
}

/**
 * Parses a request target. It may be relative (HTTP/1.0 without a Host), so `new URL` will not do.
 *
 * @param prefix the path of `--url`, with a slash at both ends, which is dropped
 */
function parseTarget(url: string, prefix: string): RequestTarget {
  const start = url.startsWith("/") ? 0 : Math.max(0, url.indexOf("/", url.indexOf("//") + 2));
  const length = url.length - start;
  const mark = url.indexOf("?", start);
  let path = mark < 0 ? url.slice(start) : url.slice(start, mark);
  if (prefix !== "/" && path.startsWith(prefix)) path = path.slice(prefix.length - 1);
  const search = mark < 0 ? "" : url.slice(mark + 1);
  if (search.length > LIMITS.query) return { path, query: {}, length: Infinity };
  return { path, query: search === "" ? {} : parseQuery(search), length };
}

function refuseLong({ length }: RequestTarget): Answer | undefined {
  return length > LIMITS.target ? plain(414, "the address is too long") : undefined;
}

/** Refuses a request that is wrong whatever it asks for. */
function refuseRequest(
  { method, headers }: Request,
  target: RequestTarget,
  token: string | undefined,
): Answer | undefined {
  const tooLong = refuseLong(target);
  if (tooLong) return tooLong;
  if (token !== undefined && !isSameSecret(givenToken(headers, target.query), token)) {
    return plain(401, "a token is needed", { "WWW-Authenticate": "Bearer" });
  }
  if (method !== "GET" && method !== "HEAD") {
    return plain(405, `only ${METHODS}`, { Allow: METHODS });
  }
  if (hasBody(headers)) return plain(413, "a request has no body here", { Connection: "close" });
  return undefined;
}

function hasBody(headers: Headers): boolean {
  return Number(headers.get("content-length") ?? 0) > 0 || headers.has("transfer-encoding");
}

/** The token of a request, `""` for none. */
function givenToken(headers: Headers, query: ManifestQuery): string {
  return bearerOf(headers) ?? query.token ?? "";
}

/** The token in `Authorization`. */
function bearerOf(headers: Headers): string | undefined {
  return /^Bearer +(.+)$/i.exec(headers.get("authorization") ?? "")?.[1];
}

/** Whether a Host header holds a name or address with an optional port, and nothing else. */
function isHost(host: string): boolean {
  return /^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(:[0-9]{1,5})?$/.test(host);
}

// ──── Contents in manifests ───────────────────────────────────────────────────────────────────────
// Finds and codes the small contents that a manifest carries itself, for clients that ask with
// `brief=1`. That happens beside the request, within the encoder's budget, and once for all devices
// that have the same and accept the same.

/** What a manifest carries itself, in bytes. */
const INLINE = {
  /** Each content, coded, is below this. */
  coded: 1024,
  /** Text up to this goes in as it is; without an older file, longer content is not even tried. */
  text: 4096,
  /** All contents together, as they are in the JSON. */
  total: 16 * 1024,
  /** What is read and coded for that: nobody waits for it longer than a fraction of a second. */
  work: 512 * 1024,
};
/** Size of the cache of such contents, in bytes. */
const INLINE_BUDGET = 4 * 1024 * 1024;

const NOT_INLINE: InlineContents = { contents: new Map(), key: "" };

/** What a device has, where it has proved that. */
interface Proven {
  release: Release | undefined;
  image: IndexedFile | undefined;
}

/** Finds the contents for manifests, and caches them. */
class Inliner {
  readonly #known = new Cache<InlineContents>(INLINE_BUDGET);
  readonly #running = new SingleFlight<InlineContents>();

  constructor(
    private readonly encoder: Encoder,
    private readonly source: (file: IndexedFile) => Source,
  ) {}

  /**
   * Finds what the manifest of a decision is to carry.
   *
   * @param root that decided
   * @param accepted the codings that the device accepts
   */
  contentsFor(
    root: ReleaseRoot,
    decision: Decision,
    query: ManifestQuery,
    accepted: ReadonlySet<Coding>,
  ): InlineContents | Promise<InlineContents> {
    const { target, has: from, image, full } = decision;
    // `decide` has compared it with that of `from`.
    const release = digestIn(query.base) === undefined ? undefined : from;
    const hasNothing = (query.current_ver ?? "") === "";
    // Others may have most of what is listed: that would be sent in vain.
    if (full || query.list !== undefined || (!release && !hasNothing)) return NOT_INLINE;
    const runs = digestIn(query.firmware_sha256) ?? "";
    const old = image && root.predecessor(image.path, runs);
    const has = { release, image: old };
    const codings = [...accepted].sort().join();
    const key = `${release?.id} ${target?.id} ${image?.sha256} ${old?.sha256} ${codings}`;
    const known = this.#known.get(key);
    if (known) return known;
    if (this.encoder.isSpent) return NOT_INLINE;
    return this.#running.run(key, async () => {
      const { contents, size, isFinal } = await this.#collect(decision, has, accepted);
      // Another time there may be more: then nobody keeps a manifest with less.
      if (!isFinal) return NOT_INLINE;
      const found = { contents, key };
      this.#known.set(key, found, size);
      return found;
    });
  }

  async #collect(
    { target, image }: Decision,
    has: Proven,
    accepted: ReadonlySet<Coding>,
  ): Promise<{ contents: Map<string, InlineContent>; size: number; isFinal: boolean }> {
    const old = has.release?.files;
    // What a device has under another path, it copies.
    const here = new Set([...(old?.values() ?? [])].map(({ sha256 }) => sha256));
    const { added, changed } = changesBetween(has.release, target, true);
    const wanted = [...added, ...changed].map(([path, file]) => {
      return { path: `${target!.name}/${path}`, file, old: old?.get(path) };
    });
    if (image) wanted.push({ path: image.path, file: image, old: has.image });
    const contents = new Map<string, InlineContent>();
    let [room, work] = [INLINE.total, INLINE.work];
    let isAllFinal = true;
    for (const { path, file, old } of wanted) {
      // A device needs nobody for what is empty.
      if (file.size === 0 || here.has(file.sha256)) continue;
      here.add(file.sha256);
      const dictionary = old && old.size <= MAX_INLINE ? old : undefined;
      const cost = file.size + (dictionary?.size ?? 0);
      if (cost > work || file.size > (dictionary ? MAX_INLINE : INLINE.text)) continue;
      work -= cost;
      const { inline, isFinal } = await this.#make(file, dictionary, accepted);
      isAllFinal &&= isFinal;
      const length = inline ? JSON.stringify(inline).length : 0;
      if (!inline || length > room) continue;
      contents.set(path, inline);
      room -= length;
    }
    return { contents, size: INLINE.total - room, isFinal: isAllFinal };
  }

  /** Absent: it is too long. */
  async #make(
    file: IndexedFile,
    old: IndexedFile | undefined,
    accepted: ReadonlySet<Coding>,
  ): Promise<{ inline: InlineContent | undefined; isFinal: boolean }> {
    const plain = this.source(file);
    const smallest = await this.encoder.smallest(accepted, plain, old && this.source(old));
    return { inline: await this.#inline(plain, smallest.coded), isFinal: smallest.isFinal };
  }

  /** @returns `undefined` when it is too long */
  async #inline(plain: Source, coded: Coded | undefined): Promise<InlineContent | undefined> {
    if ((coded?.content ?? plain).size >= INLINE.coded) return undefined;
    const isDelta = coded && CODINGS[coded.encoding].needsDictionary;
    if (coded && (isDelta || plain.size > INLINE.text)) {
      return toInline(await coded.content.bytes(), coded.encoding);
    }
    const bytes = await (await plain.read())?.bytes();
    if (!bytes) return undefined;
    const text = textToInline(bytes);
    if (text || !coded) return text ?? toInline(bytes, "identity");
    return toInline(await coded.content.bytes(), coded.encoding);
  }
}

// ──── Manifest answers ──────────────────────────────────────────────────────────────────────────
// Answers with manifests. Devices that ask in the same words share one answer; what is echoed or
// signed for a single device is made for it alone.

/**
 * How a manifest is coded. Only who asks for a brief one gets brotli: others choose by their `Host`
 * how many different ones there are, and in long ones hashes are most of what is left.
 *
 * @param isShared whether it is kept, for all devices that ask the same
 */
function manifestCoding(
  accepted: ReadonlySet<Coding>,
  size: number,
  isBrief: boolean,
  isShared: boolean,
) {
  const isLong = size > (isBrief ? LONG_MANIFEST + INLINE.total : LONG_MANIFEST);
  const coding = bestWithoutDictionary(accepted, isBrief && !isLong ? size : Infinity);
  return { coding, level: isShared && !isLong ? undefined : FAST };
}

/** Encodes a manifest; `undefined` when it is better sent plain. */
async function encodeManifest(
  json: Uint8Array,
  coding: PlainCoding | undefined,
  level: number | undefined,
): Promise<Uint8Array | undefined> {
  if (!coding || json.byteLength < MIN_CODED) return undefined;
  try {
    const coded = await CODINGS[coding].encode(json, level);
    return coded.byteLength < json.byteLength ? coded : undefined;
  } catch {
    return undefined;
  }
}

/** Cached answers with one manifest. */
type ManifestAnswers = { [encoding in Encoding]?: Answer | Promise<Answer> };

/** Answers with manifests. */
class Manifests {
  readonly #answers = new WeakMap<ComposedManifest, ManifestAnswers>();
  readonly #key: KeyObject | undefined;
  readonly #base: string | undefined;
  readonly #scheme: string;
  /** Whether the warning about an untrusted proxy was given. */
  #hasHinted = false;

  constructor(
    private readonly releases: Releases,
    private readonly options: ServeOptions,
    private readonly proxies: Proxies,
    private readonly inFlight: InFlight,
    private readonly inliner: Inliner,
    private readonly newestFor?: Extension["newestFor"],
  ) {
    this.#base = options.url === undefined ? undefined : baseURL(options.url);
    this.#scheme = options.tls ? "https" : "http";
    this.#key = options.sign === undefined ? undefined : readKey(options.sign, "private");
  }

  /** @param contact gets what is offered */
  answer({ headers }: Request, contact: Contact, metrics: Metrics): Answer | Promise<Answer> {
    const { query, method } = contact;
    const { current_ver = "", reqid = "", token } = query;
    if (current_ver.length > LIMITS.version || hasControls(current_ver)) {
      return plain(400, `current_ver: at most ${LIMITS.version} characters, none of them controls`);
    }
    if (hasControls(reqid)) return plain(400, "reqid: no control characters");
    const base = this.#base ?? this.#askedBase(headers, contact.peer);
    if (base instanceof Error) return plain(400, base.message);
    // A board can send nothing with a download but its URL.
    const withToken = token !== undefined && this.options.token !== undefined;
    const suffix = withToken ? `?token=${encodeURIComponent(token)}` : "";
    const root = this.releases.forDevice(query, contact.path);
    const decision = root.decide(query, this.newestFor?.(contact, root));
    const target = decision?.target !== decision?.has ? decision?.target : undefined;
    const to = target?.name ?? (decision?.image ? "firmware" : "none");
    const { model } = root;
    // A HEAD is a report: it says what a GET would get, and offers nothing.
    if (method === "GET") contact.offer = { from: metrics.label(current_ver, root), to, model };
    const isKnown = query.sysname === undefined || root.find(current_ver) !== undefined;
    contact.asked = { model, isKnown, offer: offeredBy(target, decision?.image) };
    const form = formOf(query, base + root.urlPath, suffix);
    const accepted = acceptedCodings(headers.get("accept-encoding"));
    if (query.brief !== "1" || !decision) return this.#compose(decision, query, form, accepted);
    const answer = (inline: InlineContents) => {
      // What follows from a path does so below the address that was asked.
      const isElsewhere = model !== "" && contact.path === "/manifest.json";
      const hasURLs = this.#base !== undefined || suffix !== "" || isElsewhere;
      const short = briefForm(form, decision, inline, hasURLs);
      return this.#compose(decision, query, short, accepted);
    };
    const inline = this.inliner.contentsFor(root, decision, query, accepted);
    return inline instanceof Promise ? inline.then(answer) : answer(inline);
  }

  #compose(
    decision: Decision | null,
    query: ManifestQuery,
    form: ManifestForm,
    accepted: ReadonlySet<Coding>,
  ): Answer | Promise<Answer> {
    const composed = this.releases.compose(decision, form);
    const size = composed.head.length + composed.tail.length;
    // Most devices have no version, or name it exactly as its directory is named.
    const usual = query.list === undefined ? (decision?.has?.name ?? "0") : decision?.version;
    const isCommon = !decision || decision.previous === usual;
    const isBrief = form.brief !== undefined;
    if (query.reqid === undefined && isCommon) {
      let kept = this.#answers.get(composed);
      if (!kept) this.#answers.set(composed, (kept = {}));
      const { coding, level } = manifestCoding(accepted, size, isBrief, true);
      const json = () => fillIn(composed, decision, undefined);
      return (kept[coding ?? "identity"] ??= this.#encode(json(), "", coding, level));
    }
    if (size > SMALL_BODY && !this.inFlight.hasRoom(size)) return busy();
    // The text and its blob are garbage once the response has been sent.
    discard(2 * size);
    const { coding, level } = manifestCoding(accepted, size, isBrief, false);
    return this.#encode(fillIn(composed, decision, query.reqid), query.reqid ?? "", coding, level);
  }

  /** What URLs begin with, given the Host that was asked for; an error is for the client. */
  #askedBase(headers: Headers, peer: string): string | Error {
    const said = forwardedScheme(headers);
    const isTrusted = said !== undefined && this.proxies.trusts(peer);
    const host = headers.get("host");
    // URLs would begin with http, and bypass the proxy or lead nowhere.
    const isIgnored = said === "https" && !isTrusted && this.#scheme === "http";
    const remedy = `serve --trust-proxy ${peer}, or --url https://…`;
    if (isIgnored && !this.#hasHinted) {
      this.#hasHinted = true;
      const what = `${peer} says X-Forwarded-Proto: https, and is not trusted`;
      this.options.warn?.(`${what}: URLs in manifests begin with http; if it is yours, ${remedy}`);
    }
    if (host === null || !isHost(host)) {
      const hint = isIgnored
        ? `; is there a proxy in between? It must pass Host on; ${remedy}`
        : "";
      return new Error(`a manifest needs the Host header: its URLs begin with it${hint}`);
    }
    return `${isTrusted ? said : this.#scheme}://${host}`;
  }

  #encode(
    json: string,
    reqid: string,
    coding: PlainCoding | undefined,
    level: number | undefined,
  ): Answer | Promise<Answer> {
    const bytes = utf8(json);
    const plain = content("application/json", new Blob([bytes]));
    plain.headers["Cache-Control"] = "no-store";
    if (this.#key) plain.headers[SIGNATURE_HEADER] = signManifest(bytes, reqid, this.#key);
    if (!coding) return plain;
    return encodeManifest(bytes, coding, level).then((coded) => {
      if (!coded) return plain;
      const body = intoBlob(coded);
      const headers = { ...plain.headers, "Content-Encoding": coding };
      const saved = plain.size - body.size;
      return { ...content("", body), headers, coding: { encoding: coding, saved } };
    });
  }
}

function offeredBy(target: Release | undefined, image: FirmwareImage | undefined): Offered | null {
  if (!target && !image) return null;
  return { version: target?.name ?? null, firmware: image?.name ?? null };
}

// ──── Request handling ────────────────────────────────────────────────────────────────────────────
// From a request to a response, and to a contact once it has ended.

/** Handles requests for one path. */
type Route = (request: Request, contact: Contact) => Answer | Promise<Answer>;

/** What the parts below add to a server. */
interface Extension extends AsyncDisposable {
  /** Called with each contact. */
  note(contact: Contact): void;
  /** The newest that the device of a contact may have; `undefined`: all that is offered. */
  readonly newestFor: (contact: Contact, root: ReleaseRoot) => NewestItems | undefined;
  /** Answers for all paths below `/-/` but the server's own, with a secret of its own. */
  readonly answer: Route;
  /** A file directly in the root that it writes; with others whose names begin so. */
  readonly ownFile: string | undefined;
  /**
   * Lines of Prometheus' text format.
   *
   * @param label see `Metrics.label`
   */
  metrics(label: (version: string) => string): Promise<readonly string[]>;
}

/** Answers requests. */
class Service {
  /** Called when content on disk differs from the index. */
  onMismatch: () => void = () => {};

  /** The path of `--url`, with a slash at both ends: requests may come with it. */
  readonly #prefix: string;
  readonly #metrics: Metrics;
  readonly #inFlight = new InFlight();
  readonly #contents: Contents;
  readonly #proxies: Proxies;
  /** Paths that are no files of the root; those below `/-/` are reserved. */
  readonly #routes: ReadonlyMap<string, Route>;
  /** Called with each contact. */
  readonly #listeners: ((contact: Contact) => void)[] = [];

  constructor(
    readonly releases: Releases,
    readonly options: ServeOptions,
    private readonly extension?: Extension,
  ) {
    const { url, log, coding = CODING.seconds, trustProxy = [] } = options;
    this.#prefix = `${url ? new URL(baseURL(url)).pathname.replace(/\/$/, "") : ""}/`;
    this.#proxies = new Proxies(trustProxy);
    const encoder = new Encoder(new TokenBucket(coding));
    this.#contents = new Contents(releases, encoder, this.#inFlight, () => this.onMismatch());
    const metrics = new Metrics(releases);
    this.#metrics = metrics;
    this.#listeners.push((contact) => metrics.count(contact));
    if (log) this.#listeners.push((contact) => log(logLine(contact)));
    if (extension) this.#listeners.push((contact) => extension.note(contact));
    const inliner = new Inliner(encoder, (file) => this.#contents.source(file));
    const { newestFor } = extension ?? {};
    const manifests = new Manifests(
      ...([releases, options, this.#proxies, this.#inFlight, inliner, newestFor] as const),
    );
    this.#routes = new Map<string, Route>([
      ["/manifest.json", (request, contact) => manifests.answer(request, contact, metrics)],
      ["/-/health", () => this.#health()],
      ["/-/metrics", () => this.#metricsAnswer()],
    ]);
  }

  /** Counts and warns of releases that changed after they were offered. */
  noteAltered(names: readonly string[]): void {
    this.#metrics.add("ota_changed_total", "", names.length);
    for (const name of names) {
      this.options.warn?.(
        `${name} changed after it was offered: devices on it will get what differs ` +
          `(boards with Pycom's library will not)`,
      );
    }
  }

  /** To be called when no server sends any more. */
  close(): void {
    this.#inFlight.close();
  }

  respond(request: Request, server: Bun.Server<undefined>): Response | Promise<Response> {
    const started = performance.now();
    const target = parseTarget(request.url, this.#prefix);
    const peer = plainAddress(server.requestIP(request)?.address ?? "-");
    const { path, query } = target;
    const { method } = request;
    const { trustProxy } = this.options;
    const address = trustProxy?.length ? this.#proxies.client(request.headers, peer) : peer;
    // A single literal is the fastest: this is made for every request.
    const contact: Contact = {
      method,
      path,
      query,
      peer,
      address,
      status: 0,
      sent: undefined,
      milliseconds: 0,
    };
    const finish = (answer: Answer): Response => {
      const { status, body, coding, content, fd } = answer;
      const isHead = method === "HEAD";
      const size = isHead ? 0 : answer.size;
      const ended = (isWhole: boolean) => {
        contact.status = status;
        contact.sent = isWhole ? size : undefined;
        contact.coding = coding;
        contact.milliseconds = performance.now() - started;
        for (const listener of this.#listeners) listener(contact);
      };
      const isFromDisk = fd !== undefined && !isHead;
      if (body && (size > SMALL_BODY || isFromDisk)) {
        const held = content ?? body;
        this.#inFlight.add({ request, server, held, fd, ended });
      } else ended(true);
      return toResponse(request, answer);
    };
    const answer = this.#answer(request, target, contact);
    return answer instanceof Promise ? answer.then(finish) : finish(answer);
  }

  #answer(request: Request, target: RequestTarget, contact: Contact): Answer | Promise<Answer> {
    const { path } = target;
    const route = this.#routes.get(this.releases.isManifest(path) ? "/manifest.json" : path);
    if (!route && this.extension && path.startsWith("/-/")) {
      return refuseLong(target) ?? this.extension.answer(request, contact);
    }
    const refused = refuseRequest(request, target, this.options.token);
    if (refused) return refused;
    if (route) return route(request, contact);
    const found = this.releases.locate(path);
    return found ? this.#contents.answer(request, path, found) : plain(404, "not found");
  }

  #metricsAnswer(): Answer | Promise<Answer> {
    const metrics = this.#metrics;
    const answer = (more: readonly string[]) => {
      const lines = more.map((line) => `${line}\n`).join("");
      return content("text/plain; version=0.0.4", new Blob([metrics.text() + lines]));
    };
    if (!this.extension) return answer([]);
    // Devices of all models are counted together.
    const label = (version: string) => {
      const labels = this.releases.roots.map((root) => metrics.label(version, root));
      return labels.find((one) => one !== "other") ?? "other";
    };
    return this.extension.metrics(label).then(answer);
  }

  #health(): Answer {
    let isEmpty = true;
    for (const { path, model, versions, firmware } of this.releases.roots) {
      try {
        fs.readdirSync(path);
      } catch (error) {
        // A model may go.
        if (model !== "" && isMissing(error)) continue;
        const which = model === "" ? "the root" : `the root of the model ${model}`;
        return plain(503, `${which} cannot be read: ${errorText(error)}`);
      }
      isEmpty &&= versions.length + firmware.length === 0;
    }
    return isEmpty ? plain(503, "the root has no version") : plain(200, "ok");
  }
}

// ──── Air costs ──────────────────────────────────────────────────────────────────────────────────
// What a release costs on the air, before anybody has fetched it.

/** Payload of one LoRa downlink at a medium data rate, in bytes. */
const LORA_BYTES = 200;

/** The devices that costs are shown for: `client`, and a board with the library of the examples. */
const AIR_DEVICES = [
  { name: "client", accepted: new Set(codings(true)), isBrief: true },
  {
    name: "board",
    accepted: new Set<Coding>(["ota-patch, deflate", "deflate"]),
    isBrief: false,
  },
];

/** What something costs on the air, in bytes, and how it is sent. */
interface AirCost {
  name: string;
  /** Of the content itself; absent where that is not the same for all devices. */
  plain?: number;
  size: number;
  how: string;
}

/**
 * What a manifest and its content cost on the air.
 *
 * @param may the newest that the device may have; absent: all that is offered
 */
async function airCosts(
  releases: ReleaseRoot,
  ver: string | undefined,
  base: string,
  encoder: Encoder,
  { accepted, isBrief }: (typeof AIR_DEVICES)[number],
  may?: NewestItems,
): Promise<AirCost[]> {
  const costs: AirCost[] = [];
  const sourceOf = ({ sha256: key, size, file }: IndexedFile): Source => {
    return { key, size, read: async () => Bun.file(file) };
  };
  const has = releases.find(ver ?? "");
  const oldImage = releases.firmware.find(({ version }) => version.compare(ver ?? "") === 0);
  const query = { current_ver: ver, base: has?.digest, firmware_sha256: oldImage?.sha256 };
  const decision = releases.decide(query, may);
  const inliner = new Inliner(encoder, sourceOf);
  const mayInline = decision && isBrief;
  const inline = mayInline
    ? await inliner.contentsFor(releases, decision, query, accepted)
    : NOT_INLINE;
  const plainForm = { extras: true, base: base + releases.urlPath, suffix: "" };
  const form = isBrief ? briefForm(plainForm, decision, inline) : plainForm;
  const json = utf8(fillIn(releases.compose(decision, form), decision, undefined));
  // Boards take manifests as they are.
  const forManifest = isBrief ? accepted : NO_CODINGS;
  const { coding, level } = manifestCoding(forManifest, json.byteLength, isBrief, true);
  const coded = await encodeManifest(json, coding, level);
  const size = (coded ?? json).byteLength;
  costs.push({ name: "manifest.json", size, how: coded ? coding! : "plain" });

  // Content that the device has under another path, or already fetches, costs nothing.
  const here = new Set([...(has?.files.values() ?? [])].map(({ sha256 }) => sha256));
  const add = async (at: string, name: string, file: IndexedFile, old?: IndexedFile) => {
    if (here.has(file.sha256)) return;
    here.add(file.sha256);
    if (inline.contents.has(at)) {
      return costs.push({ name, plain: file.size, size: 0, how: "in the manifest" });
    }
    const { coded: form } = await encoder.smallest(accepted, sourceOf(file), old && sourceOf(old));
    const size = form?.content.size ?? file.size;
    return costs.push({ name, plain: file.size, size, how: form?.encoding ?? "plain" });
  };
  const { target, image } = decision ?? {};
  const { added, changed } = changesBetween(decision?.has, target, true);
  for (const [path, file] of [...added, ...changed]) {
    await add(`${target!.name}/${path}`, path, file, has?.files.get(path));
  }
  if (image) await add(image.path, image.path, image, oldImage);
  return costs;
}

// ──── Listening ───────────────────────────────────────────────────────────────────────────────────
// A release root, a service and a port, from start to stop.

/** A server that is listening. */
export interface OTAServer extends AsyncDisposable {
  readonly url: URL;
  readonly releases: Releases;
  /** Ends when running responses have ended. */
  stop(): Promise<void>;
}

/**
 * See `serve`.
 *
 * @param releases the opened root
 * @param extension is disposed of when the server stops
 */
function serveReleases(
  releases: Releases,
  options: ServeOptions,
  extension?: Extension,
): OTAServer {
  const { port = 8000, host = "0.0.0.0", tls } = options;
  const service = new Service(releases, options, extension);
  let certificate = tls && readServerCertificate(tls);
  let server: Bun.Server<undefined>;
  try {
    server = listen(service, host, port, certificate);
  } catch (error) {
    if (errorCode(error) === "EADDRINUSE") {
      const what = `port ${port} on ${host} is in use`;
      throw new OTAError(`${what}; stop what uses it, or choose another with --port`);
    }
    const hint = tls ? "--host, --port, --tls-cert and --tls-key" : "--host and --port";
    throw new OTAError(`cannot listen on ${host}:${port}: ${errorText(error)}; see ${hint}`);
  }
  const { url } = server;
  const changed = () => {
    service.noteAltered(releases.altered);
    options.changed?.(releases);
  };
  const { warn } = options;
  const watch = new RootWatch(releases, { changed, warn, ownFile: extension?.ownFile });
  service.onMismatch = watch.soon;
  /** Servers that no longer listen, but may still be sending. */
  const former = new Set<Bun.Server<undefined>>();
  const renew = (renewed: Certificate) => {
    // Bun cannot exchange a certificate: another server takes the port.
    const old = server;
    former.add(old);
    void old.stop().then(() => former.delete(old));
    const takeOver = (one: Certificate | undefined) => listen(service, host, Number(url.port), one);
    try {
      server = takeOver(renewed);
    } catch (error) {
      server = takeOver(certificate);
      throw error;
    }
    certificate = renewed;
    warn?.(`the certificate in ${tls!.cert} is new, and in use`);
  };
  const complain = (error: unknown) => {
    warn?.(`the certificate stays the one before: ${errorText(error)}`);
  };
  const renewal = tls && watchCertificate(tls, renew, complain);
  const stop = async (force = false) => {
    watch[Symbol.dispose]();
    renewal?.[Symbol.dispose]();
    await Promise.all([server, ...former].map((one) => one.stop(force)));
    service.close();
    await extension?.[Symbol.asyncDispose]();
  };
  return { url, releases, stop, [Symbol.asyncDispose]: () => stop(true) };
}

function listen(
  service: Service,
  hostname: string,
  port: number,
  certificate: Certificate | undefined,
): Bun.Server<undefined> {
  return Bun.serve({
    port,
    hostname,
    development: false,
    // Bun's default would share a port that is in use.
    reusePort: false,
    idleTimeout: LIMITS.idle,
    ...(certificate && { tls: certificate }),
    fetch: (request, server) => service.respond(request, server),
  });
}

// ════ V Fleet ════════════════════════════════════════════════════════════════════════════════════
// Who is on what, and what happened to whom. A request only adds to a map in memory; a thread of its
// own, which alone touches the database, writes that map once a second. A database that is slow,
// locked, full or away therefore costs no request anything.

// ──── Device reports ──────────────────────────────────────────────────────────────────────────────
// What a device says of itself by asking for a manifest. All of it comes from strangers: a text that
// is too long or has control characters counts as not said.

/** What a device said of itself, and what it was answered. */
interface DeviceReport {
  /** In lower case; `ip:ADDRESS` for a device that does not say who it is. */
  id: string;
  /** When, by the server's clock. */
  at: number;
  /** The same by a clock that never jumps: see `FleetClock`. */
  elapsed: number;
  /** How many equal ones in a row this stands for. */
  count: number;
  model: string | null;
  /** `null` for none, `undefined` when it did not say. */
  version: string | null | undefined;
  firmware: string | null | undefined;
  /** The release that it says has failed. */
  failed: string | null;
  address: string;
  /** What it was offered, `null` for nothing; absent: it did not ask. */
  offer?: Offered | null;
}

/** Begins the ids of devices that do not say who they are. */
const BY_ADDRESS = "ip:";
/** Characters of an id, a version and the like. */
const MAX_TEXT = 128;

/** The text, if it is one that we keep. */
function saidText(text: string | undefined): string | null {
  if (text === undefined || text === "" || text.length > MAX_TEXT) return null;
  if (hasControls(text) || !text.isWellFormed()) return null;
  // A copy: as a part of the URL it would keep all of that in memory while the store is away.
  return Buffer.from(text).toString();
}

/** The id by which a device is known: the same board by two libraries is one device. */
function deviceId({ devid, wmac }: ManifestQuery, address: string): string {
  const id = saidText((devid || wmac)?.toLowerCase());
  return id === null || id.startsWith(BY_ADDRESS) ? `${BY_ADDRESS}${address}` : id;
}

/** What a contact says of a device; `undefined` for one that says nothing. */
function reportOf(contact: Contact, at: number, elapsed: number): DeviceReport | undefined {
  const { query, address, status, asked } = contact;
  // Lists are for devices that learn what they have; errors are no answers.
  if (!asked || status >= 400 || query.list !== undefined) return undefined;
  const isGet = contact.method === "GET";
  const current = query.current_ver === "0" ? "" : query.current_ver;
  let version = saidText(current) ?? (isGet || current !== undefined ? null : undefined);
  let firmware = query.firmware_ver === undefined ? undefined : saidText(query.firmware_ver);
  // Pybytes' boards send their firmware as their version.
  if (version && !asked.isKnown && query.sysname !== undefined && firmware === undefined) {
    [version, firmware] = [undefined, version];
  }
  return {
    id: deviceId(query, address),
    at,
    elapsed,
    count: 1,
    model: asked.model || (saidText(query.model) ?? saidText(query.sysname)),
    version,
    firmware,
    failed: saidText(query.failed),
    address,
    // What was not sent whole was not offered.
    ...(isGet && contact.sent !== undefined && { offer: asked.offer }),
  };
}

/** Whether two reports say the same, so that a count is enough. */
function saysTheSame(a: DeviceReport, b: DeviceReport): boolean {
  return (
    a.version === b.version &&
    a.firmware === b.firmware &&
    a.model === b.model &&
    a.failed === b.failed &&
    a.offer?.version === b.offer?.version &&
    a.offer?.firmware === b.offer?.firmware &&
    (a.offer === null) === (b.offer === null)
  );
}

/** Reports of one device that wait at most; the oldest of them go first. */
const MAX_OF_ONE = 8;

/** Reports that are written in one transaction. */
interface ReportBatch {
  /** Tells it from the others of its server: what is written twice counts once. */
  number: number;
  reports: readonly DeviceReport[];
}

/** Reports that wait to be written, by device. */
class WaitingReports {
  readonly #reports = new Map<string, DeviceReport[]>();
  #batch: ReportBatch | undefined;
  #batches = 0;
  /** How many wait. */
  size = 0;
  /** How many went before they were written. */
  dropped = 0;

  /** @param limit of reports that wait */
  constructor(private readonly limit: number) {}

  /** Adds one, which is newer than those that wait. */
  add(report: DeviceReport): void {
    const waiting = this.#reports.get(report.id);
    const last = waiting?.at(-1);
    if (!waiting || !last) this.#reports.set(report.id, [report]);
    else if (saysTheSame(last, report)) {
      const count = last.count + report.count;
      waiting[waiting.length - 1] = { ...report, count };
      return;
    } else waiting.push(report);
    this.size++;
    if (waiting && waiting.length > MAX_OF_ONE) this.#drop(waiting.shift());
    while (this.size > this.limit && this.#reports.size > 0) this.#dropOldest();
  }

  #dropOldest(): void {
    const [id, waiting] = this.#reports.entries().next().value!;
    this.#drop(waiting.shift());
    if (waiting.length === 0) this.#reports.delete(id);
  }

  #drop(report: DeviceReport | undefined): void {
    if (report === undefined) return;
    this.size--;
    this.dropped += report.count;
  }

  /**
   * The batch to write: those of some devices, oldest first. Until `written` it is the same one,
   * and none of it is dropped: it may be in the store although nobody said so.
   */
  batch(limit: number): ReportBatch {
    if (this.#batch) return this.#batch;
    const reports: DeviceReport[] = [];
    for (const [id, waiting] of this.#reports) {
      if (reports.length + waiting.length > limit && reports.length > 0) break;
      reports.push(...waiting);
      this.#reports.delete(id);
    }
    return (this.#batch = { number: ++this.#batches, reports });
  }

  /** Says that the batch is in the store. */
  written(): void {
    this.size -= this.#batch?.reports.length ?? 0;
    this.#batch = undefined;
  }
}

// ──── Device records ──────────────────────────────────────────────────────────────────────────────
// What is kept of a device, and how a report changes it: pure functions. Time passes twice here. What
// people see is the clock's, which may jump. Silence and intervals are counted in time that a server
// of this fleet was up: else a server that runs ten minutes a day would take every device for silent.

/** What is kept of a device: a row of `ota_devices`, but for what the operator gave it. */
interface DeviceRecord {
  id: string;
  model: string | null;
  version: string | null;
  firmware: string | null;
  address: string | null;
  first_seen: number;
  last_seen: number;
  /** Reports so far. */
  seen: number;
  /** Up-time of the fleet when it was last heard. */
  seen_up: number;
  /** The last intervals between two visits, in up-time: milliseconds with commas. */
  intervals: string;
  /** Silence that is usual for it: three times the median of `intervals`. */
  patience: number;
  /** The release that it was offered and is not on. */
  offered: string | null;
  offered_firmware: string | null;
  offered_at: number | null;
  /** How many times. */
  offers: number;
  /** What is known of that offer. */
  standing: Standing;
  /** The release that failed, as it says or as we see. */
  failed: string | null;
  /** Events so far. */
  events: number;
  /** `cohortOf` it. */
  cohort: string;
}

/**
 * `said` and `seen` both mean that a release failed: the device says so; or it went back to an older
 * version, or does not come on the one that it is offered. `offered`: the last that was heard of it
 * was that it was offered one.
 */
type Standing = "none" | "offered" | "said" | "seen";

/** What happened to a device. */
export interface FleetEvent {
  /** By the clock of the server that noticed. */
  at: number;
  kind: "first seen" | "offered" | "updated" | "failed" | "rolled back" | "back after silence";
  from: string | null;
  to: string | null;
}

/** When a report is applied. */
interface Moment {
  /** Up-time of the fleet when the report was made. */
  up: number;
  /** Silence that is usual for every device, in milliseconds. */
  silent: number;
}

/** So many offers of one release, and a device is not on it: it does not get there. */
const MAX_OFFERS = 3;
/** Reports within this time, in milliseconds, are one visit. */
const VISIT = 60_000;
const MAX_INTERVALS = 5;

/** Keys of versions: a fleet has few, and asks for them with each report. */
const versionKeys = new Map<string, string>();

/**
 * A text that sorts, byte by byte, as `LooseVersion` does; `""` for none.
 *
 * @param text without control characters: one ends each string, so that `a` sorts before `ab`
 */
function versionKey(text: string | null): string {
  if (text === null) return "";
  const known = versionKeys.get(text);
  if (known !== undefined) return known;
  const keyOf = (part: bigint | string) => {
    if (typeof part === "string") return `2${part}\u0001`;
    const digits = String(part);
    return `1${String(digits.length).padStart(3, "0")}${digits}`;
  };
  const key = new LooseVersion(text).parts.map(keyOf).join("");
  // Strangers may make up any number of them.
  if (versionKeys.size >= 1000) versionKeys.clear();
  versionKeys.set(text, key);
  return key;
}

/** Whether two texts name the same release. */
function isSameRelease(a: string | null, b: string | null): boolean {
  return a !== null && b !== null && versionKey(a) === versionKey(b);
}

/** A release in words: firmware alone is `firmware 1.0.1`. */
function releaseText(offer: Offered | null): string | null {
  if (!offer) return null;
  return offer.version ?? (offer.firmware === null ? null : `firmware ${offer.firmware}`);
}

/** What a state depends on. Devices that are alike in it are a cohort, and are counted by it. */
type Cohort = Pick<DeviceRecord, "model" | "version" | "firmware" | "standing">;

/** A text that only devices which are alike have in common. */
function cohortOf({ model, version, firmware, standing }: Cohort): string {
  const text = JSON.stringify([model, version, firmware, standing]);
  return new Bun.CryptoHasher("sha256").update(text).digest("base64url").slice(0, 16);
}

/** A device of which nothing is known yet. */
function strangerOf({ id, at }: DeviceReport, up: number): DeviceRecord {
  return {
    ...{ id, model: null, version: null, firmware: null, address: null },
    ...{ first_seen: at, last_seen: at, seen: 0, seen_up: up, intervals: "", patience: 0 },
    ...{ offered: null, offered_firmware: null, offered_at: null, offers: 0 },
    ...{ standing: "none", failed: null, events: 0, cohort: "" },
  };
}

/** Where a device went since the last report, if it did. */
interface Movement {
  kind: "updated" | "rolled back";
  from: string | null;
  to: string | null;
}

/** How a device moved between two reports: by its version, else by its firmware. */
function movementOf(known: DeviceRecord, record: DeviceRecord): Movement | undefined {
  const kindOf = (from: string | null, to: string | null): Movement["kind"] | undefined => {
    const [before, after] = [versionKey(from), versionKey(to)];
    return after === before ? undefined : after > before ? "updated" : "rolled back";
  };
  const { version, firmware } = record;
  const kind = kindOf(known.version, version);
  if (kind) return { kind, from: known.version, to: version };
  // A device that did not tell its firmware before has not moved.
  if (known.firmware === null || firmware === null) return undefined;
  const flashed = kindOf(known.firmware, firmware);
  const words = (image: string) => `firmware ${image}`;
  return flashed && { kind: flashed, from: words(known.firmware), to: words(firmware) };
}

// ──── Offers and failures ─────────────────────────────────────────────────────────────────────────
// What became of the releases that a device was offered.

/** The release that a device was offered and is not on. */
function offerOf({ offered, offered_firmware }: DeviceRecord): Offered | null {
  if (offered === null && offered_firmware === null) return null;
  return { version: offered, firmware: offered_firmware };
}

function isSameOffer(a: Offered | null, b: Offered | null): boolean {
  return versionKey(releaseText(a)) === versionKey(releaseText(b));
}

/** Whether a device is on a release that it was offered, or on a later one. */
function isOn({ version, firmware }: DeviceRecord, offer: Offered): boolean {
  if (offer.version !== null) return versionKey(version) >= versionKey(offer.version);
  return versionKey(firmware) >= versionKey(offer.firmware);
}

/** The offer that stands after a report. */
function offerAfter(
  known: DeviceRecord,
  record: DeviceRecord,
  report: DeviceReport,
): Pick<DeviceRecord, "offered" | "offered_firmware" | "offered_at" | "offers"> {
  const none = { offered: null, offered_firmware: null, offered_at: null, offers: 0 };
  const before = offerOf(known);
  // A report that asks for nothing is offered nothing: what stood stands until it is on it.
  const offer = report.offer === undefined ? before : report.offer;
  if (offer === null || isOn(record, offer)) return none;
  const isSame = isSameOffer(offer, before);
  return {
    offered: offer.version,
    offered_firmware: offer.firmware,
    offered_at: isSame ? known.offered_at : report.at,
    offers: (isSame ? known.offers : 0) + (report.offer ? report.count : 0),
  };
}

function hasFailed({ standing }: DeviceRecord): boolean {
  return standing === "said" || standing === "seen";
}

/**
 * The release that failed on a device, if one has: it stands as long as that release is on offer, or
 * until the device is on another version.
 *
 * @param moved where it went since the last report
 */
function failureAfter(
  known: DeviceRecord,
  record: DeviceRecord,
  report: DeviceReport,
  moved: Movement | undefined,
): { release: string | null; standing: "said" | "seen" } | undefined {
  const offer = offerOf(record);
  const asksAndGetsNothing = report.offer !== undefined && offer === null;
  if (moved?.kind === "rolled back") return { release: moved.from, standing: "seen" };
  const { failed } = report;
  const isOffered = (release: string | null) =>
    offer !== null &&
    (isSameRelease(release, offer.version) ||
      isSameRelease(release, offer.firmware) ||
      release === releaseText(offer));
  if (failed !== null && !asksAndGetsNothing && !isSameRelease(failed, record.version)) {
    if (offer === null || isOffered(failed)) return { release: failed, standing: "said" };
  }
  if (offer && record.offers >= MAX_OFFERS) {
    return { release: releaseText(offer), standing: "seen" };
  }
  if (!hasFailed(known) || moved || asksAndGetsNothing) return undefined;
  // It asks, and no longer says so.
  if (report.offer !== undefined && known.standing === "said") return undefined;
  if (report.offer !== undefined && !isOffered(known.failed)) return undefined;
  return { release: known.failed, standing: known.standing as "said" | "seen" };
}

/** The intervals between visits, with one more. */
function intervalsAfter(
  { intervals, patience }: DeviceRecord,
  interval: number,
): Pick<DeviceRecord, "intervals" | "patience"> {
  if (interval < VISIT) return { intervals, patience };
  const earlier = intervals === "" ? [] : intervals.split(",").map(Number);
  const last = [...earlier, Math.round(interval)].slice(-MAX_INTERVALS);
  const median = last.toSorted((a, b) => a - b)[last.length >> 1]!;
  return { intervals: last.join(), patience: 3 * median };
}

/**
 * Applies a report to what is kept of a device.
 *
 * @param before absent: it was never heard of
 * @returns what is kept from now on, and what has happened
 */
function applyReport(
  before: DeviceRecord | undefined,
  report: DeviceReport,
  { up, silent }: Moment,
): { record: DeviceRecord; events: FleetEvent[] } {
  const { at } = report;
  const known = before ?? strangerOf(report, up);
  const record = { ...known, ...saidOf(known, report) };
  // Devices that share an address would seem to go up and down.
  const isProof = !record.id.startsWith(BY_ADDRESS);
  const events: FleetEvent[] = [];
  const happened = (kind: FleetEvent["kind"], from: string | null, to: string | null) => {
    if (isProof || kind === "first seen") events.push({ at, kind, from, to });
  };
  if (!before) happened("first seen", null, record.version);
  const silence = Math.max(0, up - known.seen_up);
  if (known.standing === "offered" && silence > Math.max(silent, known.patience)) {
    happened("back after silence", known.version, record.version);
  }
  const moved = before && isProof ? movementOf(known, record) : undefined;
  if (moved) happened(moved.kind, moved.from, moved.to);
  Object.assign(record, offerAfter(known, record, report));
  const offer = offerOf(record);
  if (report.offer && offer && !isSameOffer(offer, offerOf(known))) {
    happened("offered", record.version, releaseText(offer));
  }
  const failure = isProof ? failureAfter(known, record, report, moved) : undefined;
  record.standing = failure?.standing ?? (report.offer && offer ? "offered" : "none");
  record.failed = failure?.release ?? report.failed;
  const isNew = !hasFailed(known) || !isSameRelease(known.failed, record.failed);
  if (failure && isNew && moved?.kind !== "rolled back") {
    happened("failed", record.version, failure.release);
  }
  if (before) Object.assign(record, intervalsAfter(known, silence / report.count));
  record.seen_up = Math.max(known.seen_up, up);
  record.events += events.length;
  record.cohort = cohortOf(record);
  return { record, events };
}

/** What a report itself tells. */
function saidOf(known: DeviceRecord, report: DeviceReport): Partial<DeviceRecord> {
  const version = report.version === undefined ? known.version : report.version;
  const firmware = report.firmware === undefined ? known.firmware : report.firmware;
  return {
    ...{ version, firmware, model: report.model ?? known.model },
    address: report.address,
    // As the clock says, even when that has jumped back: what was said last is what counts.
    last_seen: report.at,
    first_seen: Math.min(known.first_seen, report.at),
    seen: known.seen + report.count,
  };
}

// ──── Windows ────────────────────────────────────────────────────────────────────────────────────
// When something may begin: `Mon-Fri 01:00-04:00 Europe/Berlin`. Days and times are those of a clock
// on the wall there: where clocks are put forward, the hour that there is not is left out, and where
// they are put back, the hour that comes twice counts twice.

/** A window as an operator wrote it, read. */
export interface TimeWindow {
  /** It is open in any of them. */
  readonly spans: readonly TimeSpan[];
}

/** A time of day, on some days. */
export interface TimeSpan {
  /** Those on which it begins; 0 is Monday. */
  readonly days: ReadonlySet<number>;
  /** Minutes since midnight; `to` is not part of it, and is on the day after where it is not later. */
  readonly from: number;
  readonly to: number;
  /** As IANA names it. */
  readonly zone: string;
}

const DAY_NAMES = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];
const MINUTES_A_DAY = 24 * 60;
/** Characters of a window. */
const MAX_WINDOW = 256;

/**
 * Reads a window: times, with days before and a zone behind where that matters, as in `Mon-Fri
 * 01:00-04:00 Europe/Berlin`. There may be several, with a comma or `;` between them. Without days it
 * is every day, and without a zone UTC.
 *
 * @throws {OTAError} exit code 2 when the text is no window, or may mean more than one
 */
export function parseWindow(text: string): TimeWindow {
  const refuse = (why: string): never => {
    const found = text.slice(0, MAX_WINDOW).split(/\s+/).map(printable).join(" ");
    const what = `a window is like 'Mon-Fri 01:00-04:00 Europe/Berlin', found '${found}'`;
    throw new OTAError(`${what}: ${why}`, 2);
  };
  if (text.length > MAX_WINDOW) refuse(`it has at most ${MAX_WINDOW} characters`);
  const spans: { days: number[]; from: number; to: number; zone?: string }[] = [];
  let days: number[] = [];
  for (const piece of text.replaceAll(/\s*[-–]\s*/g, "-").split(/([,;])/)) {
    if (piece === ";" && days.length > 0) break;
    if (piece === "," || piece === ";") continue;
    const words = piece.split(/\s+/).filter((word) => word !== "");
    if (words.length === 0) refuse("a time is missing");
    let span: (typeof spans)[number] | undefined;
    for (const word of words) {
      const [named, times] = [daysOf(word), timesOf(word)];
      if (!span && named) days.push(...named);
      else if (!span && times) spans.push((span = { days, ...times }));
      else if (!span) refuse(`${printable(word)} is neither a day nor a time such as 01:00-04:00`);
      else if (named || times || span.zone) refuse(`before ${printable(word)}, a comma is missing`);
      else if (!isZone(word)) refuse(`${printable(word)} is no time zone such as Europe/Berlin`);
      else span.zone = word;
    }
    if (span) days = [];
  }
  if (days.length > 0) refuse("days need a time, such as 01:00-04:00");
  // What the others mean cannot be guessed, but for a zone at the end: that is said of all.
  if (new Set(spans.map((span) => span.days.length > 0)).size > 1) {
    refuse("say the days of each time (Mon-Sun is every day)");
  }
  const zones = spans.flatMap(({ zone }) => zone ?? []);
  const isOfAll = zones.length === spans.length || (zones.length === 1 && spans.at(-1)?.zone);
  if (zones.length > 0 && !isOfAll) refuse("say the zone once, at the end, or behind each time");
  return {
    spans: spans.map(({ days: of, from, to, zone = zones[0] ?? "UTC" }) => {
      return { days: new Set(of.length > 0 ? of : DAY_NAMES.keys()), from, to, zone };
    }),
  };
}

/** The days that a word names: `Mon`, `Monday`, `Fri-Mon`; `undefined` for another word. */
function daysOf(word: string): number[] | undefined {
  const ends = word.toLowerCase().split("-");
  const found = ends.map((end) => DAY_NAMES.findIndex((name) => name.startsWith(end)));
  if (found.some((day, i) => day < 0 || ends[i]!.length < 3) || found.length > 2) return undefined;
  const [first = 0, last = first] = found;
  return Array.from({ length: ((last - first + 7) % 7) + 1 }, (_, i) => (first + i) % 7);
}

/** The minutes of `01:00-04:00`; `undefined` for what is none, or nothing. */
function timesOf(word: string): { from: number; to: number } | undefined {
  const [, h1, m1, h2, m2] = /^(\d\d?):([0-5]\d)-(\d\d?):([0-5]\d)$/.exec(word) ?? [];
  const [from, to] = [Number(h1) * 60 + Number(m1), Number(h2) * 60 + Number(m2)];
  return from < MINUTES_A_DAY && to <= MINUTES_A_DAY && from !== to ? { from, to } : undefined;
}

/** Zone → what tells its time: these are slow to make, and an operator has few. */
const zoneClocks = new Map<string, Intl.DateTimeFormat>();

/** @throws {RangeError} when there is no such zone */
function clockOf(zone: string): Intl.DateTimeFormat {
  const known = zoneClocks.get(zone);
  if (known) return known;
  const clock = new Intl.DateTimeFormat("en-US", {
    ...{ timeZone: zone, weekday: "long", hour: "2-digit", minute: "2-digit", hourCycle: "h23" },
  });
  if (zoneClocks.size >= 1000) zoneClocks.clear();
  zoneClocks.set(zone, clock);
  return clock;
}

function isZone(text: string): boolean {
  try {
    clockOf(text);
    return true;
  } catch {
    return false;
  }
}

/** Whether a window is open at a moment, in milliseconds since 1970. */
export function isOpen({ spans }: TimeWindow, at: number): boolean {
  return spans.some(({ days, from, to, zone }) => {
    const parts = clockOf(zone).formatToParts(at);
    const [weekday = "", hour, minute] = (["weekday", "hour", "minute"] as const).map(
      (type) => parts.find((part) => part.type === type)?.value,
    );
    const day = DAY_NAMES.indexOf(weekday.toLowerCase());
    const now = Number(hour) * 60 + Number(minute);
    if (from < to) return days.has(day) && now >= from && now < to;
    // Over midnight: the end is on the day after the one that it is of.
    return (days.has(day) && now >= from) || (days.has((day + 6) % 7) && now < to);
  });
}

/** A window as it is shown: with its zone. */
function windowText(window: string): string {
  const isUTC = parseWindow(window).spans.every(({ zone }) => zone === "UTC");
  return isUTC && !/utc/i.test(window) ? `${window} UTC` : window;
}

// ──── Fleet answers ───────────────────────────────────────────────────────────────────────────────
// What a fleet can be asked, and what it answers; the API has the same field names.

/** What a device is, seen from its releases. */
export type DeviceState = "current" | "behind" | "offered" | "silent" | "failed";

/** All states, the best first. */
export const DEVICE_STATES = ["current", "behind", "offered", "silent", "failed"] as const;

/** A device of a fleet. Times are in milliseconds, by the clock of the server that heard it. */
export interface FleetDevice {
  id: string;
  /** What the operator calls it. */
  name: string | null;
  model: string | null;
  version: string | null;
  firmware: string | null;
  state: DeviceState;
  /** The release that it was offered and is not on. */
  offered: string | null;
  /** The release that failed, as it says or as the server sees. */
  failed: string | null;
  address: string | null;
  first_seen: number;
  last_seen: number;
  /** What the operator noted. */
  labels: Record<string, string>;
}

/** How a device stands in a rollout: see `Rollout` and its numbers. */
export interface DeviceRollout {
  version: string;
  model: string | null;
  state: RolloutState;
  standing: "offered" | "proven" | "failed" | "silent" | "acknowledged";
}

/** A device, and what happened to it. */
export interface DeviceDetails extends FleetDevice {
  /** The oldest first. */
  history: FleetEvent[];
  /** The rollouts that it was offered, the one that was begun last first. */
  rollouts: DeviceRollout[];
}

/** How many devices there are, by version, state and model. */
export interface FleetSummary {
  devices: number;
  /** The most frequent ones; `none` for devices without one, `other` for the rest. */
  versions: Record<string, number>;
  states: Record<DeviceState, number>;
  models: Record<string, number>;
  /**
   * When the last one of those that are `offered` will be silent, if none of them is heard of until
   * then, and a server runs all the time; `null` when none will be.
   */
  silent_at: number | null;
}

/** How many devices were on which version. */
export interface FleetSample {
  /** By the clock. */
  at: number;
  /** As in `FleetSummary`. */
  versions: Record<string, number>;
}

/** How long a chart of versions goes back. */
export type FleetSpan = "hour" | "day" | "week" | "year";

/** Devices that need a person, and have something in common. */
export interface FleetCluster {
  state: "failed" | "silent";
  /** The version that they are on: what failed or is not heard of came after it. */
  version: string | null;
  model: string | null;
  devices: number;
}

/** Devices of the same model that are on the same version and firmware. */
export interface FleetGroup {
  model: string | null;
  version: string | null;
  firmware: string | null;
  devices: number;
}

/** What a page shows of a fleet at one look. */
export interface FleetOverview {
  summary: FleetSummary;
  /** The largest first, at most 2,000. */
  groups: FleetGroup[];
  /** The largest first. */
  clusters: FleetCluster[];
  /** The oldest first. */
  samples: FleetSample[];
  /** As far back as these go at most. */
  span: FleetSpan;
  /** How many were last heard within each of `SEEN_WITHIN`, and not within the one before. */
  seen: number[];
}

/** Which devices to list; what is absent does not matter. */
export interface DeviceFilter {
  state?: DeviceState;
  version?: string;
  model?: string;
  label?: [key: string, value: string];
  /** A part of the id, name, model or address; letters' case aside. */
  q?: string;
  /** At most 1,000; 100. */
  limit?: number;
  /** The id after which to begin. */
  after?: string;
}

/** A page of devices, and the `after` of the next page; `null`: there is none. */
export interface DevicePage {
  devices: FleetDevice[];
  next: string | null;
}

/** The newest release that a device may have; `null` where there is none. */
export interface NewestRelease {
  version: string | null;
  firmware: string | null;
}

/** The newest releases that devices may have. */
export interface NewestReleases extends NewestRelease {
  /** Those of models with a root of their own, by its name. */
  models?: Record<string, NewestRelease>;
}

/** What servers leave in the store, so that commands see the states that they see. */
export interface FleetServed {
  /** When a server last wrote to the store. */
  written: number;
  /** As the server had them whose releases changed last. */
  newest: NewestReleases;
  /** See `FleetOptions`; in milliseconds. */
  silent: number;
}

// ──── Rollouts ────────────────────────────────────────────────────────────────────────────────────
// A release that goes to a few devices, then to more: never to more that are unproven than are proven
// good already. What can be asked for, and what is answered; the API has the same field names.

/** How far a rollout may go, and how fast. */
export interface RolloutOptions {
  version: string;
  /** The model whose root has the version; `null`: the root's own. */
  model: string | null;
  /** Devices that may be unproven while fewer than that are proven; 1. */
  first: number;
  /** Seconds that a device must be on the version before it is proven; 0. */
  soak: number;
  /** Silence that is bad, in seconds; 3600. */
  silent: number;
  /** The fraction of devices that may go bad; 0.05. */
  tolerance: number;
  /** Fractions of the eligible devices at which it waits for `resume`, ascending. */
  pauseAt: readonly number[];
  /** Labels that a device must have; or its `model`, or the `version` that it is on. */
  only: readonly (readonly [key: string, value: string])[];
  /** When devices may be offered it: see `parseWindow`; `null` for always. */
  window: string | null;
}

/** What holds where nothing is said. */
export const ROLLOUT_DEFAULTS: Omit<RolloutOptions, "version" | "model"> = {
  ...{ first: 1, soak: 0, silent: 3600, tolerance: 0.05 },
  ...{ pauseAt: [0.05, 0.5], only: [], window: null },
};

/**
 * `waiting`: the version is not in the root yet. `paused`: nobody new is offered it. `halted`, and
 * `aborted` for good: nobody who is not on it. `done`: it is a release like any other; but where a
 * rollout was only for some devices, the others do not get it before another one says so.
 */
export type RolloutState = "waiting" | "running" | "paused" | "halted" | "done" | "aborted";

/** What somebody saw of a rollout before deciding what to do with it. */
export interface SeenRollout {
  id: string;
  /** `changed` and `went_bad` of it. */
  changed: number;
  wentBad: number;
}

/** What an operator can do with a rollout. */
export type RolloutAction = "pause" | "resume" | "advance" | "abort";

/** A device that a rollout did not do well on. */
export interface BadDevice {
  id: string;
  standing: "failed" | "silent";
  /** What the operator calls it, what it is, and what it is on. */
  name: string | null;
  model: string | null;
  version: string | null;
  firmware: string | null;
}

/** A rollout. Times are in milliseconds since 1970, durations in seconds. */
export interface Rollout {
  id: string;
  version: string;
  model: string | null;
  state: RolloutState;
  /** Why it is in this state, in words and numbers. */
  reason: string | null;
  first: number;
  soak: number;
  silent: number;
  tolerance: number;
  pause_at: number[];
  only: [key: string, value: string][];
  window: string | null;
  /** Devices that are on it, for long enough. */
  proven: number;
  /** Devices that were offered it, and of which neither good nor bad is known yet. */
  offered: number;
  /** Bad ones, until they are acknowledged. */
  failed: number;
  silent_devices: number;
  /** Bad ones that `resume` has acknowledged. */
  acknowledged: number;
  /** All devices that it is for: those that were known when it began, heard in the last 30 days. */
  eligible: number;
  /** The bad ones, those that were heard last first, at most ten. */
  bad: BadDevice[];
  /** How often a device went bad so far, whatever became of it since. */
  went_bad: number;
  /** Whether the operator has opened it to all of its devices at once. */
  advanced: boolean;
  created: number;
  /** When the state last changed. */
  changed: number;
}

/** Devices that a rollout would reach, by what they are and are on. */
export interface RolloutTarget {
  model: string | null;
  version: string | null;
  /** Of those that tell no version. */
  firmware: string | null;
  devices: number;
}

/** A version, and the model that it is for: `1.0.2`, `1.0.2 of lopy4`. */
function rolloutName({ version, model }: Pick<Rollout, "version" | "model">): string {
  return model === null ? version : `${version} of ${model}`;
}

/** How a rollout stands, in one line: `1.0.2 halted: 2 of 9 are silent`. */
export function rolloutText(rollout: Rollout): string {
  const { state, reason } = rollout;
  return `${rolloutName(rollout)} ${state}${reason === null ? "" : `: ${reason}`}`;
}

/** What `serve --staged` knows a version by. */
function stagedKey({ version, model }: Pick<RolloutOptions, "version" | "model">): string {
  return `${asciiLower(model ?? "")} ${versionKey(version)}`;
}

function asPair(value: unknown, name: string): [string, string] {
  const pair = asList(value, name, asText);
  return pair.length === 2 ? [pair[0]!, pair[1]!] : malformed(`${name}: not a key and a value`);
}

/** A device that was not heard for so long, in milliseconds, is not waited for. */
const ROLLOUT_MEMORY = 30 * 24 * 3600_000;

/** Conditions of a rollout at most. */
const MAX_ONLY = 64;

/** A fraction as it is typed: `5%`. */
function typedShare(fraction: number): string {
  return `${Number((100 * fraction).toPrecision(6))}%`;
}

/** @throws {OTAError} exit code 2 when no rollout can be like that */
function checkRollout(options: RolloutOptions): void {
  const { version, model, first, soak, silent, tolerance, pauseAt, only, window } = options;
  const expect = (isRight: boolean, what: string, found: unknown) => {
    if (isRight) return;
    const text = printable((JSON.stringify(found) ?? "nothing").replaceAll('"', ""));
    throw new OTAError(`a rollout expects ${what}, found ${text}`, 2);
  };
  const isName = isReleaseName(version);
  expect(isName, `a version as its directory is named (${RELEASE_NAME_RULE})`, version);
  expect(model === null || saidText(model) !== null, "the name of a model", model);
  expect(Number.isSafeInteger(first) && first >= 1, "--first as a whole number from 1", first);
  expect(soak >= 0 && soak <= 1e9, "--soak as a time", soak);
  expect(silent > 0 && silent <= 1e9, "--silent as a time above 0", silent);
  const isShare = tolerance > 0 && tolerance < 1;
  expect(isShare, "--tolerance between 0 % (0) and 100 % (1)", tolerance);
  const isStep = (at: number, i: number) => at > (pauseAt[i - 1] ?? 0) && at < 1;
  const steps = "--pause-at as up to 16 percentages that ascend, between 0 % (0) and 100 % (1)";
  expect(pauseAt.length <= 16 && pauseAt.every(isStep), steps, pauseAt.map(typedShare));
  const isPair = (pair: readonly [string, string]) => pair.every((text) => saidText(text) !== null);
  expect(only.length <= MAX_ONLY && only.every(isPair), `up to ${MAX_ONLY} --only KEY=VALUE`, only);
  if (window !== null) parseWindow(window);
}

// ──── Typed rollouts ─────────────────────────────────────────────────────────────────────────────
// A rollout as it is typed: as options of the command, or into the form of the page.

/** What is typed; where nothing is, the default holds. */
interface RolloutTexts {
  first?: string | undefined;
  soak?: string | undefined;
  silent?: string | undefined;
  tolerance?: string | undefined;
  "pause-at"?: string | undefined;
  only?: readonly string[] | undefined;
  window?: string | undefined;
}

/** A label or another condition as it is typed, `KEY=VALUE`; `undefined`: it is none. */
function typedCondition(text: string): [key: string, value: string] | undefined {
  const [, key, value] = /^([^=]+)=(.+)$/s.exec(text) ?? [];
  return key !== undefined && value !== undefined ? [key, value] : undefined;
}

function parseFirst(text: string): number {
  if (/^\d{1,9}$/.test(text)) return Number(text);
  throw new OTAError(`--first expects a number of devices, found ${text || '""'}`, 2);
}

/** Reads `5%` as a fraction. */
function parseShare(name: string, text: string): number {
  const [, amount] = /^(\d{1,3}(?:\.\d{1,6})?) ?%$/.exec(text.trim()) ?? [];
  if (amount !== undefined && Number(amount) <= 100) return Number(amount) / 100;
  throw new OTAError(`--${name} expects a percentage such as 5%, found ${text.trim() || '""'}`, 2);
}

/** Reads `5%,50%` as fractions. */
function parseShares(text: string): number[] {
  if (text === "none") return [];
  return text
    .split(",")
    .map((one) => parseShare("pause-at", one))
    .toSorted((a, b) => a - b);
}

function parseOnly(text: string): [key: string, value: string] {
  const condition = typedCondition(text);
  if (condition) return condition;
  const what = "K=V: a label, model=M or version=V";
  throw new OTAError(`--only expects ${what}, found ${text}`, 2);
}

/** Reads what is typed. @throws {OTAError} exit code 2: which option is wrong, and how */
function typedRollout(version: string, model: string | null, texts: RolloutTexts): RolloutOptions {
  const { first, soak, silent, tolerance, "pause-at": pauses, only, window } = texts;
  const options: RolloutOptions = {
    ...ROLLOUT_DEFAULTS,
    ...{ version, model },
    ...(first !== undefined && { first: parseFirst(first) }),
    ...(soak !== undefined && { soak: /^0[smhd]?$/.test(soak) ? 0 : parseDuration("soak", soak) }),
    ...(silent !== undefined && { silent: parseDuration("silent", silent) }),
    ...(tolerance !== undefined && { tolerance: parseShare("tolerance", tolerance) }),
    ...(pauses !== undefined && { pauseAt: parseShares(pauses) }),
    ...(only && { only: only.map((text) => parseOnly(text)) }),
    ...(window !== undefined && { window }),
  };
  checkRollout(options);
  return options;
}

/** A duration as it is typed: `90s`, `10m`, `1h`. */
function typedDuration(seconds: number): string {
  const units = ["d", "h", "m"] as const;
  const unit = units.find((one) => seconds > 0 && seconds % SECONDS[one] === 0) ?? "s";
  return `${seconds / SECONDS[unit]}${unit}`;
}

// ──── Rollout rules ───────────────────────────────────────────────────────────────────────────────
// How far a rollout is, and what that proves: pure functions. Neither here nor in the two sections
// below anything knows a store, a socket or a clock.

/**
 * What is known of a device that was offered the version of a rollout. `way`: nothing yet, or it is
 * on the version, but not for long enough. `acknowledged`: it was bad, and the operator said to go on.
 * `outside`: it proves nothing, and is not missed: it was not known when the rollout began, the
 * operator forgot it, it went on to a later version, or had the content that has changed since.
 */
type RolloutStanding = "way" | "proven" | "failed" | "silent" | "acknowledged" | "outside";

/** How far a rollout is. Up-times and what is counted in them are in milliseconds. */
interface RolloutProgress extends Record<RolloutStanding, number> {
  /** See `Rollout`; and those of them that are neither proven nor acknowledged. */
  eligible: number;
  left: number;
  /** Devices that it would be for if they had not got the version elsewhere. */
  others: number;
  /** Devices that were known when it began, whether it is for them or not. */
  known: number;
  /** The usual interval between two visits of a device. */
  interval: number;
  /** When these were counted; -1: never. */
  counted: number;
  /** Devices with numbers below it may have a free place; and since when it is so. */
  share: number;
  shared: number;
  /** How long the fleet was heard while this ran; and up to when that is counted. */
  clock: number;
  clocked: number;
  /** Whether all devices outside are overdue as well: the clock stands. */
  isQuiet: boolean;
  /** How many may have had a place when the wave that goes is complete: see `waveAfter`. */
  most: number;
  /** How many of `pauseAt` are behind. */
  pauses: number;
  /** Whether it is for everyone at once. */
  isOpen: boolean;
  /** Whether it was halted because the content has changed. */
  isOther: boolean;
  /** Whether no device was known when it began: then all count. */
  isFirst: boolean;
  /** How often a device's standing was written: tells servers what is new. */
  seq: number;
  /** See `Rollout.went_bad`. */
  wentBad: number;
}

function newProgress(up: number, isFirst: boolean): RolloutProgress {
  return {
    ...{ way: 0, proven: 0, failed: 0, silent: 0, acknowledged: 0, outside: 0 },
    ...{
      eligible: 0,
      left: 0,
      others: 0,
      known: 0,
      interval: 0,
      counted: -1,
      share: 0,
      shared: up,
    },
    ...{ clock: 0, clocked: up, isQuiet: false, most: 0, pauses: 0, seq: 0, wentBad: 0 },
    ...{ isOpen: false, isOther: false, isFirst },
  };
}

/**
 * The chance that of `n` devices at least `k` are bad when each is with the chance `p`: the tail of a
 * binomial distribution, summed exactly.
 */
export function binomialTail(k: number, n: number, p: number): number {
  if (k <= 0) return 1;
  if (k > n) return 0;
  // From the side on which terms only get smaller: on the other one the first may be too small.
  if (k <= n * p) return 1 - binomialTail(n - k + 1, n, 1 - p);
  // The first term in logarithms: the factorials are beyond what a number holds.
  let log = (n - k) * Math.log1p(-p) + k * Math.log(p);
  const chosen = Math.min(k, n - k);
  for (let i = 1; i <= chosen; i++) log += Math.log((n - chosen + i) / i);
  let term = Math.exp(log);
  let sum = 0;
  for (let i = k; i <= n && term > sum * 1e-17; i++) {
    sum += term;
    term *= ((n - i) / (i + 1)) * (p / (1 - p));
  }
  return Math.min(1, sum);
}

/** Below this chance, what is seen is not within the tolerance. */
const SIGNIFICANCE = 0.01;
/** Below this one it may well not be: those that were not heard yet are worth waiting for. */
const SUSPICION = 0.5;
/** The confidence of what is said of a rollout. */
const CONFIDENCE = 0.95;

/** Places of a rollout that is open: more than there are devices. */
const ALL_PLACES = Number.MAX_SAFE_INTEGER;

/**
 * The number of a device in a rollout, from 0 to below 1. Each rollout has another order, so that it
 * is not always the same devices that go first.
 */
export function rolloutNumber(rollout: string, device: string): number {
  const text = `ota-rollout-1\0${rollout}\0${device}`;
  const digest = new Bun.CryptoHasher("sha256").update(text).digest();
  // The first 53 bits: as many as a number has.
  return (digest.readUInt32BE(0) * 2 ** 21 + (digest.readUInt32BE(4) >>> 11)) / 2 ** 53;
}

/** Whether a number is among some that ascend. */
function hasNumber(numbers: Float64Array, number: number): boolean {
  let [from, to] = [0, numbers.length];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (numbers[middle]! < number) from = middle + 1;
    else to = middle;
  }
  return numbers[from] === number;
}

// ──── Rollout waves ──────────────────────────────────────────────────────────────────────────────
// Who is next. Devices go in waves, each at most as large as what is proven.

/** How many devices were offered it and are not proven. */
function unproven({ way, failed, silent }: RolloutProgress): number {
  return way + failed + silent;
}

/** How many more may be, for the sake of those that are proven. */
function placesLeft({ first }: RolloutOptions, progress: RolloutProgress): number {
  return Math.max(first, progress.proven) - unproven(progress);
}

/** How many devices have had a place. */
function placesTaken(progress: RolloutProgress): number {
  return progress.proven + unproven(progress) + progress.acknowledged;
}

/**
 * Whether it would be doubtful if all that are on their way were bad. Those that are well say so soon,
 * and would open it to ever more before anybody misses the others.
 */
function areManyUnheard({ tolerance }: RolloutOptions, progress: RolloutProgress): boolean {
  const bad = unproven(progress);
  if (progress.way === 0 || bad < 2) return false;
  return binomialTail(bad, progress.proven + bad, tolerance) < SUSPICION;
}

/**
 * How many devices may go at once for the sake of those that are bad: twice as many as would all have
 * to be bad for a halt, until the numbers prove that fewer fail than the tolerance allows.
 */
function cautiousWave({ tolerance }: RolloutOptions, progress: RolloutProgress): number {
  const bad = progress.failed + progress.silent;
  const known = progress.proven + bad;
  const isWithin = 1 - binomialTail(bad + 1, known, tolerance) < 1 - CONFIDENCE;
  if (bad === 0 || isWithin) return ALL_PLACES;
  const isDoubtful = (more: number) =>
    binomialTail(bad + more, known + more, tolerance) < SIGNIFICANCE;
  let [low, high] = [0, 1];
  while (!isDoubtful(high)) [low, high] = [high, 2 * high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (isDoubtful(middle)) high = middle;
    else low = middle;
  }
  return 2 * high;
}

/**
 * How many may have had a place from now on. Devices go in waves, each at most as large as what is
 * proven: the next one goes when enough of the last have been heard.
 */
function waveAfter(options: RolloutOptions, progress: RolloutProgress): number {
  const { way, most } = progress;
  const taken = placesTaken(progress);
  const isOver = way === 0 || (taken >= most && !areManyUnheard(options, progress));
  const wave = isOver ? placesLeft(options, progress) : most - taken;
  // So many may be unproven in any case.
  const least = options.first - unproven(progress);
  return taken + Math.max(0, least, Math.min(wave, cautiousWave(options, progress)));
}

/** How many more devices may be offered it now. */
function freePlaces(options: RolloutOptions, progress: RolloutProgress): number {
  const { isOpen, most, pauses, eligible } = progress;
  if (isOpen) return ALL_PLACES;
  const taken = placesTaken(progress);
  const free = Math.min(placesLeft(options, progress), most - taken);
  const pause = options.pauseAt[pauses];
  if (pause === undefined) return Math.max(0, free);
  return Math.max(0, Math.min(free, pauseDevices(pause, eligible) - taken));
}

/** How many devices have it when a rollout pauses. */
function pauseDevices(pause: number, eligible: number): number {
  return Math.max(1, Math.ceil(pause * eligible));
}

/**
 * The share after some time: twice the free places over the eligible devices, beyond those that have
 * had a place; and twice that with every usual interval that leaves a place free.
 */
function shareAfter(
  options: RolloutOptions,
  progress: RolloutProgress,
  up: number,
): Pick<RolloutProgress, "share" | "shared"> {
  const { share, shared, interval, eligible } = progress;
  if (progress.isOpen) return { share: 1, shared };
  const free = freePlaces(options, progress);
  if (free === 0) return { share, shared: up };
  const taken = placesTaken(progress);
  const least = eligible === 0 ? 1 : Math.min(1, (taken + 2 * free) / eligible);
  const doublings = interval > 0 ? Math.max(0, Math.floor((up - shared) / interval)) : 0;
  const doubled = Math.min(1, Math.max(share, doublings > 0 ? least : 0) * 2 ** doublings);
  return { share: Math.max(least, doubled), shared: shared + doublings * interval };
}

// ──── Rollout ends ───────────────────────────────────────────────────────────────────────────────
// When a rollout halts, pauses or stands still, and why: in words and numbers.

const percent = (fraction: number) => `${Number((100 * fraction).toPrecision(3))} %`;

/** Why a rollout has to be halted, in words and numbers; `undefined`: it need not be. */
function haltReason(options: RolloutOptions, progress: RolloutProgress): string | undefined {
  const { way, proven, failed, silent, isOpen } = progress;
  const bad = failed + silent;
  if (bad === 0) return undefined;
  const kinds = [failed > 0 && `${failed} failed`, silent > 0 && `${silent} silent`];
  const kind = kinds.filter(Boolean).join(", ");
  if (proven === 0) return `${counted(bad, "device")} bad (${kind}), and none is proven`;
  const chance = binomialTail(bad, proven + bad, options.tolerance);
  if (bad >= 2 && chance < SIGNIFICANCE) {
    const share = `${bad} of ${proven + bad} devices bad (${kind})`;
    const tolerance = `more than a tolerance of ${percent(options.tolerance)} explains`;
    return `${share}: ${tolerance} (a chance of ${percent(chance)})`;
  }
  const places = Math.max(options.first, proven);
  if (!isOpen && way === 0 && bad >= places) {
    const place = `${places === 1 ? "the only place" : `all ${places} places`}`;
    return `${counted(bad, "device")} bad (${kind}) in ${place} beside ${proven} proven`;
  }
  return undefined;
}

/** Why nobody new is offered it, although it runs. */
function heldReason(options: RolloutOptions, progress: RolloutProgress): string | null {
  const { way, proven, failed, silent, left, share } = progress;
  const bad = failed + silent;
  if (bad > 0 && left === bad) return "held: only bad devices are left; resume acknowledges them";
  if (progress.isQuiet) return "held: the fleet is quiet";
  if (way + proven + bad === 0 && share > 0 && share < 1) {
    return `none of the first ${percent(share)} of the devices has asked yet`;
  }
  const isWaveComplete = placesTaken(progress) >= progress.most;
  if (progress.isOpen || !isWaveComplete || !areManyUnheard(options, progress)) return null;
  return `held: ${counted(way, "device")} on the way must be heard first`;
}

/** Why a rollout has to wait for the operator. */
function pauseReason({ pauseAt }: RolloutOptions, progress: RolloutProgress): string | undefined {
  const { way, proven, failed, silent, acknowledged, eligible, pauses, isOpen } = progress;
  const pause = pauseAt[pauses];
  if (pause === undefined || isOpen || way > 0 || eligible === 0) return undefined;
  if (placesTaken(progress) < pauseDevices(pause, eligible)) return undefined;
  const bad = failed + silent + acknowledged;
  return `at ${percent(pause)}: ${proven} of ${eligible} proven, ${bad === 0 ? "none" : bad} bad`;
}

// ──── Store schema ────────────────────────────────────────────────────────────────────────────────
// The tables, and opening a database with them: a SQLite file or a PostgreSQL. One text of SQL serves
// both: TEXT, BIGINT, and what both understand. Whoever changes the tables adds to `SCHEMAS`.

/** A row as a database gives it: PostgreSQL's BIGINT is a text. */
type SQLRow = Record<string, string | number | null>;

/** What SQL is sent to: a database that is open, or a transaction. */
class Connection {
  constructor(
    private readonly sql: Bun.SQL,
    private readonly isSQLite: boolean,
  ) {}

  /** Sends SQL with `$1`, `$2`, … for the values. */
  async query(text: string, values: readonly unknown[] = []): Promise<SQLRow[]> {
    // To SQLite, $2 is the second parameter that it meets, whatever it is called; ?2 is as we mean
    // it. Nothing that we send has a $ elsewhere.
    const numbered = this.isSQLite ? text.replaceAll("$", "?") : text;
    return (await this.sql.unsafe(numbered, [...values])) as SQLRow[];
  }

  /**
   * Runs a transaction. Each that writes begins with `lock`; then none overlaps another one, and it
   * reads what the one before it wrote.
   */
  transaction<T>(work: (tx: Connection) => Promise<T>): Promise<T> {
    return this.sql.begin((tx) => work(new Connection(tx, this.isSQLite)));
  }

  /** For how long SQLite waits for others, in milliseconds. */
  async waitFor(milliseconds: number): Promise<void> {
    if (this.isSQLite) await this.query(`PRAGMA busy_timeout = ${milliseconds}`);
  }

  /** Waits until no other transaction writes. */
  async lock(): Promise<void> {
    await this.query("UPDATE ota_meta SET value = value WHERE name = 'lock'");
  }

  async close(seconds = 0): Promise<void> {
    await this.sql.close({ timeout: seconds });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** Rows in one statement at most, and in a power of two: see `chunks`. */
const CHUNK_ROWS = 256;

/**
 * Items for statements of some rows each. A database keeps each statement that it has met, so there
 * are few lengths: powers of two.
 */
function* chunks<T>(items: readonly T[]): Generator<T[]> {
  let size = CHUNK_ROWS;
  for (let at = 0; at < items.length; at += size) {
    while (size > items.length - at) size /= 2;
    yield items.slice(at, at + size);
  }
}

/** Those that were made so far: there are few, some of them long. */
const madePlaceholders = new Map<string, string>();

/** Placeholders for rows of a statement: `($1, $2), ($3, $4)`. */
function placeholders(rows: number, columns: number): string {
  const key = `${rows} ${columns}`;
  const made = madePlaceholders.get(key);
  if (made !== undefined) return made;
  const row = (i: number) =>
    `(${Array.from({ length: columns }, (_, k) => `$${i * columns + k + 1}`).join(", ")})`;
  const text = Array.from({ length: rows }, (_, i) => row(i)).join(", ");
  madePlaceholders.set(key, text);
  return text;
}

/**
 * What brings a store from each schema to the next one; the first makes schema 1.
 *
 * `ota_meta` has the schema's number, the store's own name (`source`), its up-time, how many events
 * it has made, which batch each server wrote last (`batch SERVER`), and settings. Its row `lock` is
 * what writers wait for: each transaction that writes begins by updating it, and so reads what the
 * one before it wrote, on both databases.
 *
 * Its `rollouts` and `labels` count what servers have to read again, `lease` and `wanted` are about
 * who gives places of rollouts away.
 *
 * `ota_cohorts` counts devices: see `Cohort`. There are some dozens of them however many devices
 * there are, so that what is counted or sought by state, version or model begins there.
 */
const SCHEMAS: readonly string[][] = [
  [
    `CREATE TABLE ota_devices (
      id TEXT NOT NULL PRIMARY KEY, name TEXT, name_at BIGINT NOT NULL DEFAULT 0, model TEXT,
      version TEXT, firmware TEXT, address TEXT, first_seen BIGINT NOT NULL,
      last_seen BIGINT NOT NULL, seen BIGINT NOT NULL, seen_up BIGINT NOT NULL,
      intervals TEXT NOT NULL, patience BIGINT NOT NULL, offered TEXT, offered_firmware TEXT,
      offered_at BIGINT, offers BIGINT NOT NULL, standing TEXT NOT NULL, failed TEXT,
      events BIGINT NOT NULL, cohort TEXT NOT NULL)`,
    // With all that tells which of those that were offered a release are silent.
    "CREATE INDEX ota_devices_cohort ON ota_devices (cohort, id, seen_up, patience)",
    "CREATE INDEX ota_devices_once ON ota_devices (seen_up) WHERE seen = 1 AND name IS NULL",
    `CREATE TABLE ota_cohorts (
      id TEXT NOT NULL PRIMARY KEY, model TEXT, version TEXT, version_key TEXT NOT NULL,
      firmware TEXT, firmware_key TEXT NOT NULL, standing TEXT NOT NULL, devices BIGINT NOT NULL)`,
    `CREATE TABLE ota_labels (
      device TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, at BIGINT NOT NULL,
      PRIMARY KEY (device, key))`,
    "CREATE INDEX ota_labels_value ON ota_labels (key, value, device)",
    // Known by source and number; the device stands in front to find its history.
    `CREATE TABLE ota_events (
      device TEXT NOT NULL, source TEXT NOT NULL, number BIGINT NOT NULL, at BIGINT NOT NULL,
      kind TEXT NOT NULL, from_ TEXT, to_ TEXT, PRIMARY KEY (device, source, number))`,
  ],
  [
    // Options and progress as JSON: only this tool reads them, and never seeks by them.
    `CREATE TABLE ota_rollouts (
      id TEXT NOT NULL PRIMARY KEY, version TEXT NOT NULL, model TEXT, state TEXT NOT NULL,
      reason TEXT, options TEXT NOT NULL, digest TEXT, created BIGINT NOT NULL,
      changed BIGINT NOT NULL, progress TEXT NOT NULL)`,
    `CREATE TABLE ota_rollout_devices (
      rollout TEXT NOT NULL, device TEXT NOT NULL, standing TEXT NOT NULL,
      offered_up BIGINT NOT NULL, on_up BIGINT, heard BIGINT NOT NULL, known BIGINT NOT NULL,
      seq BIGINT NOT NULL, PRIMARY KEY (rollout, device))`,
    "CREATE INDEX ota_rollout_devices_heard ON ota_rollout_devices (rollout, standing, heard)",
    "CREATE INDEX ota_rollout_devices_seq ON ota_rollout_devices (rollout, seq)",
  ],
  [
    // How many devices were on which version: see `SAMPLING`.
    `CREATE TABLE ota_samples (
      step BIGINT NOT NULL, at BIGINT NOT NULL, version TEXT NOT NULL, devices BIGINT NOT NULL,
      PRIMARY KEY (step, at, version))`,
  ],
  [
    // With all that is counted over all devices: their rows are four times as large.
    "DROP INDEX ota_devices_cohort",
    `CREATE INDEX ota_devices_cohort ON ota_devices
      (cohort, id, seen_up, patience, last_seen, first_seen)`,
  ],
];

// ──── Store opening ───────────────────────────────────────────────────────────────────────────────
// From what `--fleet` names to a database whose tables are there, and are of this tool.

/** Where a fleet is kept. */
interface StorePlace {
  /** Absent: PostgreSQL. */
  file?: string;
  /** In messages: without a password. */
  name: string;
  url: string;
}

/** Reads what `--fleet` names: `postgres://…`, or the path of a SQLite file. */
function storePlace(url: string): StorePlace {
  const what = "--fleet expects the path of a SQLite file, or postgres://USER@HOST/DATABASE";
  if (/^postgres(ql)?:/.test(url)) {
    const { protocol, host, pathname } = URL.parse(url) ?? {};
    // There may be a password in it: it is not shown.
    const why = "; in a name or password, characters such as / and @ are written %2F and %40";
    if (!host || !url.includes("://"))
      throw new OTAError(`${what}, found another address${why}`, 2);
    return { url, name: `${protocol}//${host}${pathname}` };
  }
  if (/^\w+:\/\//.test(url)) {
    throw new OTAError(`${what}, found ${url.replace(/\/\/.*@/, "//")}`, 2);
  }
  const file = url === ":memory:" ? url : resolve(url);
  return { url, file, name: file };
}

/** How long a database may take for one statement, and to be connected to, in milliseconds. */
const STORE_PATIENCE = 5000;

/**
 * What may be done to a store. `make`: what is missing is made. `keep`: it has to be there; one of an
 * older tool is brought up. `read`: it has to be there, and stays as it is.
 */
type StoreAccess = "make" | "keep" | "read";

function connect({ file, url }: StorePlace, access: StoreAccess): Connection {
  if (file !== undefined) {
    // The operator's token is in it: nobody else may read it. What SQLite adds takes after it.
    if (access === "make" && file !== ":memory:") {
      ignoreErrors(() => fs.closeSync(fs.openSync(file, "a", 0o600)));
    }
    const may =
      access === "read" ? { readonly: true } : { readwrite: true, create: access === "make" };
    return new Connection(new Bun.SQL({ adapter: "sqlite", filename: file, ...may }), true);
  }
  const sql = new Bun.SQL(url, {
    max: 2,
    connectionTimeout: STORE_PATIENCE / 1000,
    // A server that has vanished must not hold the lock, nor one that hangs a server.
    connection: {
      lock_timeout: `${STORE_PATIENCE}`,
      idle_in_transaction_session_timeout: `${STORE_PATIENCE}`,
      // A plan made while a table was empty would read all of it for ever.
      plan_cache_mode: "force_custom_plan",
      // To start processes for a question takes as long as to answer it.
      max_parallel_workers_per_gather: "0",
    },
  });
  return new Connection(sql, false);
}

/** SQLite's errors that a file itself causes, and that no waiting cures. */
const USELESS_FILE = /^SQLITE_(NOTADB|CORRUPT|CANTOPEN|READONLY|PERM|AUTH|IOERR|FULL)/;

/** Whether an error means that this file cannot be used, now or later. */
function isUseless(error: unknown): boolean {
  const code = errorCode(error) ?? "";
  return USELESS_FILE.test(code);
}

/**
 * Connects to a store and, where it may, brings its tables up to date.
 *
 * @throws {OTAError} exit code 1 when a newer tool made it, or it is not there and has to be; else
 *   what the database throws
 */
async function openStore(place: StorePlace, access: StoreAccess): Promise<Connection> {
  const { file, name } = place;
  const isHere = file === undefined || file === ":memory:" || fs.existsSync(file);
  if (!isHere && access !== "make") throw noFleet(name);
  try {
    return await openTables(place, access);
  } catch (error) {
    const isLocked = /^SQLITE_(CANTOPEN|READONLY)/.test(errorCode(error) ?? "");
    if (!isLocked || access === "make" || fs.existsSync(`${file}-wal`)) throw error;
    return await openCopy(place, file!);
  }
}

/** Opens a copy: a medium that is read-only has no place for what readers share. */
async function openCopy(place: StorePlace, file: string): Promise<Connection> {
  const directory = fs.mkdtempSync(resolve(tmpdir(), "ota-fleet-"));
  try {
    const copy = resolve(directory, "fleet.db");
    fs.copyFileSync(file, copy);
    return await openTables({ ...place, file: copy }, "read");
  } finally {
    // It stays until it is closed.
    fs.rmSync(directory, { recursive: true, force: true });
  }
}

async function openTables(place: StorePlace, access: StoreAccess): Promise<Connection> {
  const { file, name } = place;
  const db = connect(place, access);
  try {
    if (file !== undefined) {
      await db.waitFor(1000);
      // So that commands can read and write beside a server. A kill loses nothing of it.
      if (access === "make") await db.query("PRAGMA journal_mode = WAL");
      await db.query("PRAGMA synchronous = NORMAL");
    }
    const schema = await schemaOf(db, place);
    if (schema === 0 && access === "keep") throw noFleet(name);
    if (schema === 0 && access === "read") throw new Error("it has no fleet");
    if (schema < SCHEMAS.length && access === "read") {
      throw new OTAError(`${name} is of an older ota.ts: ota.ts fleet --fleet FILE brings it up`);
    }
    if (schema < SCHEMAS.length) await bringUp(db, place);
    return db;
  } catch (error) {
    await db.close().catch(() => {});
    throw error;
  }
}

function noFleet(name: string): OTAError {
  const remedy = "ota.ts serve makes it; --root DIR or --fleet URL names another one";
  return new OTAError(`there is no fleet in ${name}: ${remedy}`);
}

/** The number of a store's schema, 0 for a new one. */
async function schemaOf(db: Connection, { name }: StorePlace): Promise<number> {
  const rows = await db.query("SELECT value FROM ota_meta WHERE name = 'schema'").catch((error) => {
    if (/no such table|does not exist/.test(errorText(error))) return [];
    throw error;
  });
  const schema = Number(rows[0]?.["value"] ?? 0);
  if (schema <= SCHEMAS.length) return schema;
  throw new OTAError(
    `the fleet in ${name} was written by a newer ota.ts (schema ${schema}, this one knows ` +
      `${SCHEMAS.length}): upgrade this one, or name another store with --fleet`,
  );
}

async function bringUp(db: Connection, place: StorePlace): Promise<void> {
  // By bytes in PostgreSQL, too, whatever its locale is: SQLite sorts so.
  const asHere = (text: string) =>
    place.file === undefined ? text.replaceAll(" TEXT", ' TEXT COLLATE "C"') : text;
  await db.transaction(async (tx) => {
    // Two servers at once would both find no table, and one of them fail. Any number does.
    if (place.file === undefined) await tx.query("SELECT pg_advisory_xact_lock(1869898100)");
    const meta = "CREATE TABLE IF NOT EXISTS ota_meta (name TEXT NOT NULL PRIMARY KEY, value TEXT)";
    await tx.query(asHere(meta));
    // Each event has it twice in a file: 96 bits are enough.
    const source = Buffer.from(crypto.getRandomValues(new Uint8Array(12))).toString("base64url");
    for (const [name, value] of Object.entries({ lock: "", schema: "0", source })) {
      const text = "INSERT INTO ota_meta VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
      await tx.query(text, [name, value]);
    }
    await tx.lock();
    for (const statements of SCHEMAS.slice(await schemaOf(tx, place))) {
      for (const text of statements) await tx.query(asHere(text));
    }
    await setMeta(tx, { schema: String(SCHEMAS.length) });
  });
}

/** Runs a transaction that no other one that writes overlaps. */
function locked<T>(db: Connection, work: (tx: Connection) => Promise<T>): Promise<T> {
  return db.transaction(async (tx) => {
    await tx.lock();
    return await work(tx);
  });
}

async function setMeta(tx: Connection, values: Record<string, string>): Promise<void> {
  const entries = Object.entries(values);
  await tx.query(
    `INSERT INTO ota_meta VALUES ${placeholders(entries.length, 2)} ` +
      "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    entries.flat(),
  );
}

/** Changes a value, unless it is another one by now. @returns whether it did */
async function swapMeta(
  tx: Connection,
  name: string,
  from: string | undefined,
  to: string,
): Promise<boolean> {
  const [row] = await tx.query("SELECT value FROM ota_meta WHERE name = $1", [name]);
  if ((row && String(row["value"])) !== from) return false;
  await setMeta(tx, { [name]: to });
  return true;
}

/** Counts up what servers read again when it is another number. */
async function bumpMeta(tx: Connection, name: "rollouts" | "labels"): Promise<void> {
  await tx.query(
    `INSERT INTO ota_meta VALUES ($1, '1') ON CONFLICT (name)
      DO UPDATE SET value = CAST(CAST(ota_meta.value AS BIGINT) + 1 AS TEXT)`,
    [name],
  );
}

/** What tells a file from one that takes its place. */
function fileIdentity({ file }: StorePlace): string | undefined {
  if (file === undefined || file === ":memory:") return undefined;
  const found = fs.statSync(file, { throwIfNoEntry: false });
  return found && `${found.dev} ${found.ino}`;
}

// ──── Store writes ─────────────────────────────────────────────────────────────────────────────────
// Writing: reports become rows and events, all of a second in one transaction.

const RECORD_COLUMNS = [
  ...(["id", "model", "version", "firmware", "address", "first_seen", "last_seen"] as const),
  ...(["seen", "seen_up", "intervals", "patience", "offered", "offered_firmware"] as const),
  ...(["offered_at", "offers", "standing", "failed", "events", "cohort"] as const),
] satisfies (keyof DeviceRecord)[];

/** A row as a record: numbers are numbers. */
function recordOf(row: SQLRow): DeviceRecord {
  const number = (name: keyof DeviceRecord) => Number(row[name]);
  return {
    ...(row as unknown as DeviceRecord),
    first_seen: number("first_seen"),
    last_seen: number("last_seen"),
    seen: number("seen"),
    seen_up: number("seen_up"),
    patience: number("patience"),
    offers: number("offers"),
    events: number("events"),
    offered_at: row["offered_at"] === null ? null : number("offered_at"),
  };
}

/** What `ota_meta` says of the store itself. */
async function readMeta(db: Connection) {
  const rows = await db.query("SELECT name, value FROM ota_meta WHERE name NOT LIKE 'setting %'");
  const meta = new Map(rows.map(({ name, value }) => [String(name), String(value)]));
  const number = (name: string) => Number(meta.get(name) ?? 0);
  /** For each server: the number of its last batch, and the up-time then. */
  const batches = new Map<string, [number: number, up: number]>();
  for (const [name, value] of meta) {
    const [last = 0, up = 0] = value.split(" ").map(Number);
    if (name.startsWith("batch ")) batches.set(name.slice("batch ".length), [last, up]);
  }
  const [up, events, sampled] = [number("up"), number("events"), number("sampled")];
  return { source: meta.get("source")!, up, events, sampled, batches };
}

type StoreMeta = Awaited<ReturnType<typeof readMeta>>;

/** How many devices come to cohorts and leave them, in one transaction. */
class CohortChanges {
  readonly #changes = new Map<string, { of: Cohort; devices: number }>();

  add(of: Cohort & { cohort: string }, devices: 1 | -1): void {
    const known = this.#changes.get(of.cohort);
    if (known) known.devices += devices;
    else this.#changes.set(of.cohort, { of, devices });
  }

  async write(tx: Connection): Promise<void> {
    const changes = [...this.#changes].filter(([, { devices }]) => devices !== 0);
    for (const some of chunks(changes)) {
      const values = some.flatMap(([id, { of, devices }]) => {
        const { model, version, firmware, standing } = of;
        const keyed = [version, versionKey(version), firmware, versionKey(firmware)];
        return [id, model, ...keyed, standing, devices];
      });
      await tx.query(
        `INSERT INTO ota_cohorts VALUES ${placeholders(some.length, 8)}
          ON CONFLICT (id) DO UPDATE SET devices = ota_cohorts.devices + excluded.devices`,
        values,
      );
    }
    const left = changes.filter(([, { devices }]) => devices < 0).map(([id]) => id);
    for (const some of chunks(left)) {
      const list = placeholders(1, some.length);
      await tx.query(`DELETE FROM ota_cohorts WHERE id IN ${list} AND devices <= 0`, some);
    }
  }
}

/** The rows of those devices that have one. */
async function readRows(tx: Connection, ids: readonly string[]): Promise<SQLRow[]> {
  const rows: SQLRow[] = [];
  for (const some of chunks(ids)) {
    const text = `SELECT * FROM ota_devices WHERE id IN ${placeholders(1, some.length)}`;
    for (const row of await tx.query(text, some)) rows.push(row);
  }
  return rows;
}

/** @param before what was kept of those that are known already, by their ids */
async function writeRecords(
  tx: Connection,
  records: readonly DeviceRecord[],
  before: ReadonlyMap<string, DeviceRecord>,
): Promise<void> {
  const sets = RECORD_COLUMNS.slice(1).map((name) => `${name} = excluded.${name}`);
  for (const some of chunks(records)) {
    const values = some.flatMap((record) => {
      return RECORD_COLUMNS.map((name) => {
        const value = record[name];
        return typeof value === "number" ? Math.round(value) : value;
      });
    });
    await tx.query(
      `INSERT INTO ota_devices (${RECORD_COLUMNS.join(", ")})
        VALUES ${placeholders(some.length, RECORD_COLUMNS.length)}
        ON CONFLICT (id) DO UPDATE SET ${sets.join(", ")}`,
      values,
    );
  }
  const changes = new CohortChanges();
  for (const record of records) {
    const known = before.get(record.id);
    if (known) changes.add(known, -1);
    changes.add(record, 1);
  }
  await changes.write(tx);
}

/** @param last the number of the last event of this source */
async function writeEvents(
  tx: Connection,
  source: string,
  last: number,
  events: readonly [device: string, event: FleetEvent][],
): Promise<void> {
  let number = last;
  for (const some of chunks(events)) {
    const values = some.flatMap(([device, { at, kind, from, to }]) => {
      return [device, source, ++number, at, kind, from, to];
    });
    await tx.query(`INSERT INTO ota_events VALUES ${placeholders(some.length, 7)}`, values);
  }
}

// ──── Store limits ─────────────────────────────────────────────────────────────────────────────────
// What goes when there is too much of it: the oldest events of a device, and devices.

/** Devices beyond this number go: first those that were seen once and never again. */
const MAX_DEVICES = 1_000_000;
/** Events of one device that are kept: the last ones, and at times some more. */
const MAX_HISTORY = 1000;
/** How many more. */
const SPARE_HISTORY = 100;
/** Drops the oldest events of a device, when some have come since the last time. */
async function trimHistory(tx: Connection, { id, events }: DeviceRecord, before: number) {
  const rounds = (count: number) => Math.floor((count - MAX_HISTORY) / SPARE_HISTORY);
  if (events <= MAX_HISTORY || rounds(events) === rounds(before)) return;
  await tx.query(
    `DELETE FROM ota_events WHERE device = $1 AND at < (SELECT at FROM ota_events
      WHERE device = $1 ORDER BY at DESC LIMIT 1 OFFSET ${MAX_HISTORY - 1})`,
    [id],
  );
}

// ──── Forgetting ──────────────────────────────────────────────────────────────────────────────────
// What is removed from a store: devices beyond a number, and those that the operator forgets.

/**
 * Forgets devices beyond a number: first those seen once, long ago; then those seen least often, the
 * last to come first, so that made-up ones go before those of years; last of all those that the
 * operator has named or labelled.
 */
async function evict(tx: Connection, maxDevices: number): Promise<void> {
  const [row] = await tx.query("SELECT SUM(devices) AS n FROM ota_cohorts");
  const excess = Number(row!["n"]) - maxDevices;
  if (excess <= 0) return;
  // Some more, so that this is not done in every transaction.
  let wanted = excess + Math.floor(maxDevices / 100);
  const isUnknown = `name IS NULL AND NOT EXISTS
    (SELECT 1 FROM ota_labels WHERE device = ota_devices.id AND value <> '')`;
  const steps = [
    `WHERE seen = 1 AND ${isUnknown} ORDER BY seen_up`,
    `WHERE ${isUnknown} ORDER BY seen, first_seen DESC`,
    "ORDER BY seen_up",
  ];
  for (const which of steps) {
    const text = `SELECT id FROM ota_devices ${which} LIMIT ${wanted}`;
    const ids = (await tx.query(text)).map(({ id }) => String(id));
    await removeDevices(tx, ids);
    wanted -= ids.length;
    if (wanted <= 0) break;
  }
}

/** @returns how many there were */
async function removeDevices(tx: Connection, ids: readonly string[]): Promise<number> {
  const changes = new CohortChanges();
  let removed = 0;
  for (const some of chunks(ids)) {
    const list = placeholders(1, some.length);
    await tx.query(`DELETE FROM ota_labels WHERE device IN ${list}`, some);
    await tx.query(`DELETE FROM ota_events WHERE device IN ${list}`, some);
    const over = "SELECT id FROM ota_rollouts WHERE state IN ('done', 'aborted')";
    const old = `DELETE FROM ota_rollout_devices WHERE device IN ${list} AND rollout IN (${over})`;
    await tx.query(old, some);
    const text = `DELETE FROM ota_devices WHERE id IN ${list} RETURNING *`;
    const rows = await tx.query(text, some);
    for (const row of rows) changes.add(recordOf(row), -1);
    removed += rows.length;
  }
  if (removed > 0) await bumpMeta(tx, "labels");
  await changes.write(tx);
  return removed;
}

// ──── Store reads ───────────────────────────────────────────────────────────────────────────────
// Reading. States are computed in SQL and never stored: what is newest and how long is silent can
// change at any time.

/** What states depend on, beside the records. */
interface StateBasis {
  newest: NewestReleases;
  /** The fleet's up-time. */
  up: number;
  silent: number;
}

/** Versions and models in a summary at most. */
const MAX_GROUPS = 100;
/** Devices on a page at most. */
const MAX_PAGE = 1000;

/** The values of a statement; `$` adds one and returns its placeholder. */
class SQLValues {
  readonly all: unknown[] = [];
  readonly $ = (value: string | number): string => `$${this.all.push(value)}`;
}

/** SQL for the state of a cohort: `offered` may be `silent`, which depends on the device. */
function cohortStateSQL({ newest }: StateBasis, { $ }: SQLValues): string {
  const keyFor = (of: (one: NewestRelease) => string | null) => {
    const models = Object.entries(newest.models ?? {});
    const all = $(versionKey(of(newest)));
    if (models.length === 0) return all;
    const cases = models.map(([name, one]) => {
      return `WHEN ${$(asciiLower(name))} THEN ${$(versionKey(of(one)))}`;
    });
    return `CASE LOWER(ota_cohorts.model) ${cases.join(" ")} ELSE ${all} END`;
  };
  const version = keyFor((one) => one.version);
  const firmware = keyFor((one) => one.firmware);
  // Of a board that only tells its firmware, only that counts.
  const isCurrent =
    `(version_key >= ${version} OR ` +
    `(ota_cohorts.version IS NULL AND firmware_key <> '' AND ${firmware} <> ''))` +
    ` AND (firmware_key = '' OR firmware_key >= ${firmware})`;
  return (
    `CASE WHEN ota_cohorts.standing IN ('said', 'seen') THEN 'failed' ` +
    `WHEN ota_cohorts.standing = 'offered' THEN 'offered' ` +
    `WHEN ${isCurrent} THEN 'current' ELSE 'behind' END`
  );
}

/** SQL for whether a device that was offered a release is silent. */
function silentSQL({ up, silent }: StateBasis, { $ }: SQLValues): string {
  const usual = $(silent);
  return (
    `(${$(Math.round(up))} - seen_up > CASE WHEN patience > ${usual} THEN patience ` +
    `ELSE ${usual} END AND ota_devices.id NOT LIKE '${BY_ADDRESS}%')`
  );
}

/** SQL that selects devices with their states. */
function devicesSQL(basis: StateBasis, values: SQLValues): string {
  const state = cohortStateSQL(basis, values);
  const isSilent = `ota_cohorts.standing = 'offered' AND ${silentSQL(basis, values)}`;
  return (
    `SELECT ota_devices.*, CASE WHEN ${isSilent} THEN 'silent' ELSE ${state} END AS state ` +
    "FROM ota_devices JOIN ota_cohorts ON ota_cohorts.id = ota_devices.cohort"
  );
}

/** Of devices that were offered a release: how many are silent, and when all others will be. */
async function readSilence(
  db: Connection,
  basis: StateBasis,
): Promise<{ silent: number; until: number | null }> {
  const values = new SQLValues();
  const isSilent = silentSQL(basis, values);
  const usual = values.$(basis.silent);
  const [row] = await db.query(
    `SELECT SUM(CASE WHEN ${isSilent} THEN 1 ELSE 0 END) AS n,
        MAX(CASE WHEN ${isSilent} OR id LIKE '${BY_ADDRESS}%' THEN NULL ELSE
          seen_up + CASE WHEN patience > ${usual} THEN patience ELSE ${usual} END END) AS until
      FROM ota_devices WHERE cohort IN
        (SELECT ota_cohorts.id FROM ota_cohorts WHERE ota_cohorts.standing = 'offered')`,
    values.all,
  );
  const { n, until } = row!;
  return { silent: Number(n), until: until === null ? null : Number(until) };
}

/** A summary as the store knows it: `silent_at` is in the fleet's up-time. */
async function summarize(db: Connection, basis: StateBasis): Promise<FleetSummary> {
  const values = new SQLValues();
  const state = cohortStateSQL(basis, values);
  const states = Object.fromEntries(
    DEVICE_STATES.map((name) => [name, 0]),
  ) as FleetSummary["states"];
  const byState = `SELECT ${state} AS name, SUM(devices) AS n FROM ota_cohorts GROUP BY 1`;
  for (const { name, n } of await db.query(byState, values.all)) {
    states[name as DeviceState] = Number(n);
  }
  const devices = Object.values(states).reduce((sum, count) => sum + count, 0);
  let silent_at: number | null = null;
  if (states.offered > 0) {
    const { silent, until } = await readSilence(db, basis);
    // Some may have come between the two.
    states.silent = Math.min(states.offered, silent);
    states.offered -= states.silent;
    silent_at = until;
  }
  const versions = await countGroups(db, "version", devices, MAX_GROUPS);
  const models = await countGroups(db, "model", devices, MAX_GROUPS);
  return { devices, versions, states, models, silent_at };
}

/**
 * How many devices are of which version or model: the most frequent ones, `none` for those without
 * one, and the rest as `other`.
 *
 * @param devices all there are
 */
async function countGroups(
  db: Connection,
  column: "version" | "model",
  devices: number,
  most: number,
): Promise<Record<string, number>> {
  const text =
    `SELECT ${column} AS name, SUM(devices) AS n FROM ota_cohorts ` +
    `GROUP BY ${column} ORDER BY n DESC, name LIMIT ${most}`;
  const groups = await db.query(text);
  const counts = new Map<string, number>();
  // A device may say that its version is "none" or "other".
  const add = (name: string, n: number) => counts.set(name, (counts.get(name) ?? 0) + n);
  let rest = devices;
  for (const { name, n } of groups) {
    add(String(name ?? "none"), Number(n));
    rest -= Number(n);
  }
  if (rest > 0) add("other", rest);
  return Object.fromEntries(counts);
}

// ──── Store lists ────────────────────────────────────────────────────────────────────────────────
// Reading devices: those that a filter takes, or one with its history.

/** SQL for which cohorts a filter takes; empty: all. */
function cohortsSQL(
  { state, version, model }: DeviceFilter,
  basis: StateBasis,
  values: SQLValues,
): string {
  const { $ } = values;
  const where: string[] = [];
  if (state !== undefined) {
    const isOfCohort = state === "silent" ? "offered" : state;
    where.push(`${cohortStateSQL(basis, values)} = ${$(isOfCohort)}`);
  }
  if (version !== undefined) where.push(`version_key = ${$(versionKey(version))}`);
  if (model !== undefined) where.push(`LOWER(model) = ${$(asciiLower(model))}`);
  return where.length > 0 ? `WHERE ${where.join(" AND ")}` : "";
}

/** Cohorts that a filter takes. */
interface Among {
  /** Absent: they are too many to be named. */
  cohorts: string[] | undefined;
  /** Devices in them. */
  devices: number;
}

/** A filter, and what a database need not find out for each device. */
interface StoreFilter extends DeviceFilter {
  among?: Among;
  /** Whether no model has `q` in it: the cohort is the last thing in a row. */
  isNoModel?: boolean;
}

/** SQL for which devices a filter takes. */
function filterSQL(filter: StoreFilter, basis: StateBasis, values: SQLValues): string {
  const { $ } = values;
  const { state, label, q, after } = filter;
  const where: string[] = [];
  const named = filter.among?.cohorts;
  const cohorts = named ? "" : cohortsSQL(filter, basis, values);
  if (named) where.push(`cohort IN (${cohortList(named).map($).join(", ")})`);
  else if (cohorts !== "") where.push(`cohort IN (SELECT id FROM ota_cohorts ${cohorts})`);
  if (state === "silent") where.push(silentSQL(basis, values));
  if (state === "offered") where.push(`NOT ${silentSQL(basis, values)}`);
  if (label !== undefined) {
    const [key, value] = [$(label[0]), $(label[1])];
    where.push(`id IN (SELECT device FROM ota_labels WHERE key = ${key} AND value = ${value})`);
  }
  if (q !== undefined && q !== "") where.push(searchSQL(filter, values));
  if (after !== undefined) where.push(`id > ${$(after)}`);
  return where.length > 0 ? `WHERE ${where.join(" AND ")}` : "";
}

/** Cohorts in a power of two, with some that there are not: see `chunks`. */
function cohortList(ids: readonly string[]): string[] {
  const length = 2 ** Math.ceil(Math.log2(ids.length));
  return Array.from({ length }, (_, i) => ids[i] ?? "");
}

/** SQL for whether a column, in lower case, has a text in it. */
function partSQL(column: string, text: string, { $ }: SQLValues): string {
  return `${column} LIKE ${$(`%${text.replace(/[\\%_]/g, "\\$&")}%`)} ESCAPE '\\'`;
}

const modelSQL = (q: string, values: SQLValues) => partSQL("LOWER(model)", asciiLower(q), values);

/** SQL for whether a device has a text in its id, name, model or address. */
function searchSQL({ q = "", isNoModel }: StoreFilter, values: SQLValues): string {
  const any = ["id", "address"].map((column) => partSQL(column, q.toLowerCase(), values));
  any.push(partSQL("LOWER(name)", asciiLower(q), values));
  if (!isNoModel) {
    any.push(`cohort IN (SELECT id FROM ota_cohorts WHERE ${modelSQL(q, values)})`);
  }
  return `(${any.join(" OR ")})`;
}

/** Finds out whether a search is about a model, once instead of for each device. */
async function withModels<F extends DeviceFilter>(
  db: Connection,
  filter: F,
): Promise<F & StoreFilter> {
  if (!filter.q) return filter;
  const values = new SQLValues();
  const text = `SELECT id FROM ota_cohorts WHERE ${modelSQL(filter.q, values)} LIMIT 1`;
  return { ...filter, isNoModel: (await db.query(text, values.all)).length === 0 };
}

/** Devices that are read together, and not in the order of their ids, at most. */
const FEW = 5000;

/**
 * SQL for devices that are then put in the order of their ids. PostgreSQL would go through the whole
 * fleet in that order, for the first ones that are right, even where few are: a limit, which is never
 * reached, keeps it from that.
 */
function fewSQL(where: string, { among }: StoreFilter): string {
  if (!among || among.devices > FEW) return `ota_devices ${where}`;
  return `(SELECT id FROM ota_devices ${where} LIMIT ${2 * FEW}) AS few`;
}

/** A filter for no more devices than a page may have. */
interface PageFilter extends StoreFilter {
  limit: number;
}

function bounded({ limit = 100, ...filter }: DeviceFilter): PageFilter {
  return { ...filter, limit: Math.min(Math.max(1, limit), MAX_PAGE) };
}

/** Lists devices in the order of their ids. */
async function listDevices(
  db: Connection,
  { limit, ...filter }: PageFilter,
  basis: StateBasis,
): Promise<DevicePage> {
  const values = new SQLValues();
  const select = devicesSQL(basis, values);
  // The ids first, of which an index has all that is needed; then only the rows of this page.
  const where = filterSQL(filter, basis, values);
  const ids = `SELECT id FROM ${fewSQL(where, filter)} ORDER BY id LIMIT ${limit + 1}`;
  const text = `${select} WHERE ota_devices.id IN (${ids}) ORDER BY ota_devices.id`;
  const rows = await db.query(text, values.all);
  const page = rows.slice(0, limit);
  const labels = await labelsOf(
    db,
    page.map(({ id }) => String(id)),
  );
  const devices = page.map((row) => deviceOf(row, labels));
  return { devices, next: rows.length > limit ? devices.at(-1)!.id : null };
}

/** The labels of devices, by id. A label that is empty was removed. */
async function labelsOf(
  db: Connection,
  ids: readonly string[],
): Promise<Map<string, Record<string, string>>> {
  const found = new Map<string, [key: string, value: string][]>();
  for (const some of chunks(ids)) {
    const list = placeholders(1, some.length);
    const text =
      `SELECT device, key, value FROM ota_labels WHERE device IN ${list} AND value <> '' ` +
      "ORDER BY device, key";
    for (const { device, key, value } of await db.query(text, some)) {
      const known = found.get(String(device));
      if (known) known.push([String(key), String(value)]);
      else found.set(String(device), [[String(key), String(value)]]);
    }
  }
  // An operator may call a label `__proto__`, which an assignment would lose.
  return new Map([...found].map(([id, labels]) => [id, Object.fromEntries(labels)]));
}

function deviceOf(row: SQLRow, labels: Map<string, Record<string, string>>): FleetDevice {
  const record = recordOf(row);
  const { id, model, version, firmware, failed, address, first_seen, last_seen } = record;
  return {
    ...{ id, name: row["name"] as string | null, model, version, firmware },
    ...{ state: row["state"] as DeviceState, offered: releaseText(offerOf(record)) },
    ...{ failed, address, first_seen, last_seen, labels: { ...labels.get(id) } },
  };
}

/** One device with its history, oldest first. */
async function findDevice(
  db: Connection,
  id: string,
  basis: StateBasis,
): Promise<DeviceDetails | undefined> {
  const values = new SQLValues();
  const text = `${devicesSQL(basis, values)} WHERE ota_devices.id = ${values.$(id)}`;
  const [row] = await db.query(text, values.all);
  if (!row) return undefined;
  const device = deviceOf(row, await labelsOf(db, [id]));
  const events = await db.query(
    `SELECT * FROM ota_events WHERE device = $1 ORDER BY at DESC LIMIT ${MAX_HISTORY}`,
    [id],
  );
  return { ...device, history: historyOf(events), rollouts: await rolloutsOfDevice(db, id) };
}

/** Rollouts that are told of a device at most. */
const MAX_TAKEN_PART = 20;

async function rolloutsOfDevice(db: Connection, id: string): Promise<DeviceRollout[]> {
  const rows = await db.query(
    `SELECT r.version, r.model, r.state,
        CASE d.standing WHEN 'way' THEN 'offered' ELSE d.standing END AS standing
      FROM ota_rollouts r JOIN ota_rollout_devices d ON d.rollout = r.id AND d.device = $1
      WHERE d.standing <> 'outside' ORDER BY r.created DESC, r.id LIMIT ${MAX_TAKEN_PART}`,
    [id],
  );
  return rows as unknown as DeviceRollout[];
}

/**
 * Puts events in order: of one source by their numbers, since its clock may have jumped back; of
 * several by their times as far as that allows.
 */
function historyOf(rows: readonly SQLRow[]): FleetEvent[] {
  const bySource = Map.groupBy(rows, ({ source }) => source);
  const queues = [...bySource.values()].map((events) => {
    return events.toSorted((a, b) => Number(a["number"]) - Number(b["number"]));
  });
  const history: FleetEvent[] = [];
  while (history.length < rows.length) {
    const waiting = queues.filter((queue) => queue.length > 0);
    const first = waiting.reduce((a, b) => (Number(b[0]!["at"]) < Number(a[0]!["at"]) ? b : a));
    const { at, kind, from_, to_ } = first.shift()!;
    history.push({
      at: Number(at),
      kind: kind as FleetEvent["kind"],
      from: from_ as string | null,
      to: to_ as string | null,
    });
  }
  return history;
}

// ──── Fleet trends ────────────────────────────────────────────────────────────────────────────────
// What a page shows beyond states. Versions over time are counted as time goes, since a history of
// millions of events cannot be read for each look; what is counted and listed else is bounded, or goes
// through an index or once through the devices.

/**
 * How often versions are counted for a chart that goes so far back, in milliseconds: each has its own
 * rows, some hundred at most, so that none depends on whether a server ran at a certain minute.
 */
const SAMPLING: Record<FleetSpan, { length: number; step: number }> = {
  hour: { length: 3600_000, step: 60_000 },
  day: { length: 86_400_000, step: 600_000 },
  week: { length: 7 * 86_400_000, step: 3600_000 },
  year: { length: 366 * 86_400_000, step: 86_400_000 },
};
/** Versions in a sample at most; the others are one. */
const MAX_SAMPLED = 8;
/** Limits of the histogram of when devices were last heard, in milliseconds. */
export const SEEN_WITHIN = [
  ...[60_000, 600_000, 3600_000, 6 * 3600_000, 86_400_000],
  ...[7 * 86_400_000, 30 * 86_400_000, Infinity],
];
/** Clusters of failures at most, and groups of devices. */
const MAX_CLUSTERS = 12;
const MAX_LISTED_GROUPS = 2000;

/** Counts the versions for all spans whose time has come. @param last when that was done last */
async function sampleVersions(tx: Connection, at: number, last: number): Promise<void> {
  const due = Object.values(SAMPLING).filter(({ step }) => {
    return Math.floor(at / step) !== Math.floor(last / step);
  });
  if (due.length === 0) return;
  const [all] = await tx.query("SELECT SUM(devices) AS n FROM ota_cohorts");
  const devices = Number(all?.["n"] ?? 0);
  if (devices === 0) return;
  const versions = await countGroups(tx, "version", devices, MAX_SAMPLED);
  for (const { step, length } of due) {
    for (const [version, count] of Object.entries(versions)) {
      // A clock that was set back may come here again.
      const text = "INSERT INTO ota_samples VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
      await tx.query(text, [step, at, version, count]);
    }
    await tx.query("DELETE FROM ota_samples WHERE step = $1 AND at < $2", [step, at - length]);
  }
  await setMeta(tx, { sampled: `${at}` });
}

/** @param wanted absent: one that has all there is, but no more than a week */
async function readSamples(
  db: Connection,
  now: number,
  wanted?: FleetSpan,
): Promise<{ span: FleetSpan; samples: FleetSample[] }> {
  const [oldest] = await db.query("SELECT MIN(at) AS at FROM ota_samples");
  const age = now - Number(oldest?.["at"] ?? now);
  const span =
    wanted ?? (age < SAMPLING.hour.length ? "hour" : age < SAMPLING.day.length ? "day" : "week");
  const { length, step } = SAMPLING[span];
  const text =
    "SELECT at, version, devices FROM ota_samples WHERE step = $1 AND at >= $2 AND at <= $3 ORDER BY at";
  const rows = await db.query(text, [step, now - length, now]);
  const samples = [...Map.groupBy(rows, ({ at }) => Number(at))].map(([at, all]) => ({
    at,
    versions: Object.fromEntries(all.map(({ version, devices }) => [version, Number(devices)])),
  }));
  return { span, samples };
}

/** Where devices fail or fall silent: by the version that they are on and model, the most first. */
async function readClusters(db: Connection, basis: StateBasis): Promise<FleetCluster[]> {
  const values = new SQLValues();
  const silent =
    `SELECT cohort, COUNT(*) AS devices FROM ota_devices WHERE ${silentSQL(basis, values)} AND cohort IN ` +
    "(SELECT ota_cohorts.id FROM ota_cohorts WHERE ota_cohorts.standing = 'offered') GROUP BY cohort";
  const text =
    "SELECT state, version, model, SUM(n) AS n FROM (" +
    "SELECT 'failed' AS state, version, model, devices AS n FROM ota_cohorts " +
    "WHERE standing IN ('said', 'seen') UNION ALL " +
    "SELECT 'silent', version, model, found.devices FROM ota_cohorts " +
    `JOIN (${silent}) AS found ON found.cohort = ota_cohorts.id) AS parts ` +
    `GROUP BY state, version, model ORDER BY n DESC, state, version, model LIMIT ${MAX_CLUSTERS}`;
  const rows = await db.query(text, values.all);
  return rows.map(({ state, version, model, n }) => ({
    state: state as FleetCluster["state"],
    version: version as string | null,
    model: model as string | null,
    devices: Number(n),
  }));
}

/** See `FleetOverview`. */
async function readGroups(db: Connection): Promise<FleetGroup[]> {
  const rows = await db.query(
    `SELECT model, version, firmware, SUM(devices) AS n FROM ota_cohorts
      GROUP BY model, version, firmware ORDER BY n DESC, model, version, firmware LIMIT ${MAX_LISTED_GROUPS}`,
  );
  return rows.map(({ model, version, firmware, n }) => ({
    model: model as string | null,
    version: version as string | null,
    firmware: firmware as string | null,
    devices: Number(n),
  }));
}

/** How many devices were last heard when: see `FleetOverview`. */
async function countSeen(db: Connection, now: number): Promise<number[]> {
  const values = new SQLValues();
  // Sums cost half of what groups do. A clock that was set back: what lies ahead is now.
  const sums = SEEN_WITHIN.slice(0, -1).map((within, i) => {
    return `SUM(CASE WHEN last_seen >= ${values.$(now - within)} THEN 1 ELSE 0 END) AS n${i}`;
  });
  const text = `SELECT ${sums.join(", ")}, COUNT(*) AS n${sums.length} FROM ota_devices`;
  const [row] = await db.query(text, values.all);
  const within = SEEN_WITHIN.map((_, i) => Number(row![`n${i}`] ?? 0));
  return within.map((count, i) => count - (within[i - 1] ?? 0));
}

// ──── Urgent devices ─────────────────────────────────────────────────────────────────────────────
// The list that a person looks at: what needs one first, then in the order of their ids.

/** The cursor of a list that begins with what needs a person: `STATE:ID`, the last one before. */
function urgentCursor(after: string | undefined): { first: number; id: string } | undefined {
  const [, state, id] = /^([a-z]+):(.*)$/s.exec(after ?? "") ?? [];
  const first = URGENCY.indexOf(state as DeviceState);
  return first < 0 ? undefined : { first, id: id! };
}

/** The states, what needs a person first. */
const URGENCY: readonly DeviceState[] = DEVICE_STATES.toReversed();

/** Devices of a state, as a list goes through them. */
interface UrgentPart {
  state: DeviceState;
  /** The id after which it begins. */
  after?: string;
  /** A database that is told their cohorts finds them sooner. */
  among: Among;
}

/** Cohorts that are named in a statement at most. */
const NAMED_COHORTS = 500;

/** The states that a list goes through, but for those that no device is in. */
async function urgentParts(
  db: Connection,
  { state, after, ...filter }: DeviceFilter,
  basis: StateBasis,
): Promise<UrgentPart[]> {
  const cursor = urgentCursor(after);
  const values = new SQLValues();
  const text =
    `SELECT id, ${cohortStateSQL(basis, values)} AS state, devices FROM ota_cohorts ` +
    cohortsSQL(filter, basis, values);
  const byState = Map.groupBy(await db.query(text, values.all), (row) => row["state"]);
  return URGENCY.flatMap((one, rank) => {
    if (rank < (cursor?.first ?? 0) || (state !== undefined && state !== one)) return [];
    const found = byState.get(one === "silent" ? "offered" : one) ?? [];
    if (found.length === 0) return [];
    const cohorts = found.length > NAMED_COHORTS ? undefined : found.map(({ id }) => String(id));
    const devices = found.reduce((sum, row) => sum + Number(row["devices"]), 0);
    const begin = rank === cursor?.first && { after: cursor.id };
    return [{ state: one, ...begin, among: { cohorts, devices } }];
  });
}

/** What a search found: the ids of a page, and the cursor of the next one. */
interface FoundIds {
  ids: string[];
  next: string | null;
}

/** Lists devices; `after` is a cursor. @param ids of those that `searchUrgent` found */
async function listUrgent(
  db: Connection,
  { limit, ...filter }: PageFilter,
  basis: StateBasis,
  ids?: FoundIds,
): Promise<DevicePage> {
  if (ids) return { devices: await devicesOf(db, ids.ids, basis), next: ids.next };
  const found: FleetDevice[] = [];
  const { after: _, ...same } = filter;
  for (const part of await urgentParts(db, filter, basis)) {
    if (found.length > limit) break;
    const page = { ...same, ...part, limit: limit + 1 - found.length };
    found.push(...(await listDevices(db, page, basis)).devices);
  }
  const devices = found.slice(0, limit);
  const last = devices.at(-1);
  return { devices, next: found.length > limit && last ? `${last.state}:${last.id}` : null };
}

/** Finds a page of the devices with a text in them. */
async function searchUrgent(
  db: Connection,
  { limit, ...filter }: PageFilter,
  basis: StateBasis,
): Promise<FoundIds> {
  const most = await withModels(db, { ...filter, limit: limit + 1 });
  const found = (await searchFirst(db, most, basis)) ?? (await searchAll(db, most, basis));
  const page = found.slice(0, limit);
  const last = page.at(-1);
  const next = found.length > limit && last ? `${last.state}:${last.id}` : null;
  return { ids: page.map(({ id }) => id), next };
}

/** A device that a search found. */
interface FoundDevice {
  id: string;
  state: DeviceState;
}

/** Devices of a state that a search looks at before it looks at all. */
const LOOKED_AT = 1000;

/**
 * Looks at the first devices alone, where what many have in them is found at once.
 *
 * @returns `undefined`: these are not enough to tell
 */
async function searchFirst(
  db: Connection,
  { limit, ...search }: PageFilter,
  basis: StateBasis,
): Promise<FoundDevice[] | undefined> {
  const found: FoundDevice[] = [];
  const { q: _, after: __, ...same } = search;
  for (const part of await urgentParts(db, search, basis)) {
    const values = new SQLValues();
    const where = filterSQL({ ...same, ...part }, basis, values);
    const first = `SELECT id FROM ${fewSQL(where, part)} ORDER BY id LIMIT ${LOOKED_AT}`;
    // That limit, too, keeps a database from looking at others before.
    const looked =
      `SELECT ota_devices.id, name, address, cohort FROM (${first}) AS first ` +
      `JOIN ota_devices ON ota_devices.id = first.id LIMIT ${LOOKED_AT}`;
    const text =
      `SELECT id FROM (${looked}) AS looked WHERE ${searchSQL(search, values)} ` +
      `ORDER BY id LIMIT ${limit - found.length}`;
    for (const { id } of await db.query(text, values.all)) {
      found.push({ id: String(id), state: part.state });
    }
    if (found.length === limit) return found;
    if (part.among.devices > LOOKED_AT) return undefined;
  }
  return found;
}

/** Looks at all devices in one pass, whatever is found. */
async function searchAll(
  db: Connection,
  { limit, after, ...filter }: PageFilter,
  basis: StateBasis,
): Promise<FoundDevice[]> {
  const values = new SQLValues();
  const { $ } = values;
  const state = cohortStateSQL(basis, values);
  const ranks = URGENCY.map((name, rank) => `WHEN '${name}' THEN ${rank}`).join(" ");
  // Once for each cohort, not for each device.
  const cohorts =
    `SELECT cohort_id, CASE state ${ranks} END AS rank, state FROM ` +
    `(SELECT ota_cohorts.id AS cohort_id, ${state} AS state FROM ota_cohorts) AS stated`;
  // The table as it lies: in the order of its index, each row would be looked up on its own.
  const where = filterSQL(filter, basis, values);
  const isSilent = `state = 'offered' AND ${silentSQL(basis, values)}`;
  const ranked =
    `SELECT id, CASE WHEN ${isSilent} THEN ${URGENCY.indexOf("silent")} ELSE rank END AS rank ` +
    `FROM (SELECT id, cohort, seen_up, patience FROM ota_devices ${where}) AS ota_devices JOIN cohorts ON cohort_id = cohort`;
  const cursor = urgentCursor(after);
  const begin = cursor && [$(cursor.first), $(cursor.id)];
  const isAfter = begin
    ? `WHERE rank > ${begin[0]} OR (rank = ${begin[0]} AND id > ${begin[1]})`
    : "";
  const text =
    `WITH cohorts AS MATERIALIZED (${cohorts}) SELECT id, rank FROM (${ranked}) AS ranked ${isAfter} ` +
    `ORDER BY rank, id LIMIT ${limit}`;
  const rows = await db.query(text, values.all);
  return rows.map(({ id, rank }) => ({ id: String(id), state: URGENCY[Number(rank)]! }));
}

/** Devices by their ids, in this order. */
async function devicesOf(
  db: Connection,
  ids: readonly string[],
  basis: StateBasis,
): Promise<FleetDevice[]> {
  const values = new SQLValues();
  const select = devicesSQL(basis, values);
  const list = ids.map((id) => values.$(id)).join(", ");
  if (ids.length === 0) return [];
  const rows = await db.query(`${select} WHERE ota_devices.id IN (${list})`, values.all);
  const labels = await labelsOf(db, ids);
  const found = new Map(rows.map((row) => [String(row["id"]), deviceOf(row, labels)]));
  return ids.flatMap((id) => found.get(id) ?? []);
}

// ──── Rollout records ─────────────────────────────────────────────────────────────────────────────
// Rollouts and the devices that were offered them, as they are in the store.

/** A row of `ota_rollouts`. */
interface RolloutRecord {
  id: string;
  state: RolloutState;
  reason: string | null;
  options: RolloutOptions;
  /** `rolloutDigest` of the release that it is bound to; `null`: none yet. */
  digest: string | null;
  created: number;
  changed: number;
  progress: RolloutProgress;
}

/** A row of `ota_rollout_devices`. */
interface RolloutDevice {
  device: string;
  standing: RolloutStanding;
  /** Up-time when it was offered, and when it was first heard on the version. */
  offered_up: number;
  on_up: number | null;
  /** The rollout's clock when it was last heard. */
  heard: number;
  /** Whether it was known before the rollout. */
  known: boolean;
}

/** States in which a rollout can still go on. */
const isGoing = (state: RolloutState) => state !== "done" && state !== "aborted";

function rolloutRecordOf(row: SQLRow): RolloutRecord {
  return {
    id: String(row["id"]),
    state: row["state"] as RolloutState,
    reason: row["reason"] as string | null,
    options: parseJSON(String(row["options"])) as unknown as RolloutOptions,
    digest: row["digest"] as string | null,
    created: Number(row["created"]),
    changed: Number(row["changed"]),
    // Who wrote it may not have counted that yet.
    progress: {
      wentBad: 0,
      ...asObject(parseJSON(String(row["progress"])), "progress"),
    } as unknown as RolloutProgress,
  };
}

/** All rollouts, newest first. */
async function readRollouts(db: Connection): Promise<RolloutRecord[]> {
  const rows = await db.query("SELECT * FROM ota_rollouts ORDER BY created DESC, id");
  return rows.map(rolloutRecordOf);
}

const rolloutKey = ({ version, model }: RolloutOptions) =>
  JSON.stringify([versionKey(version), model === null ? null : asciiLower(model)]);

/** Of each version and model the rollout that was begun last: the one that counts. */
function lastRollouts(records: readonly RolloutRecord[]): RolloutRecord[] {
  const last = new Map<string, RolloutRecord>();
  for (const record of records) {
    const key = rolloutKey(record.options);
    if (!last.has(key)) last.set(key, record);
  }
  return [...last.values()];
}

async function writeRollout(tx: Connection, record: RolloutRecord): Promise<void> {
  const { id, state, reason, options, digest, created, changed, progress } = record;
  const { version, model } = options;
  const texts = [JSON.stringify(options), digest, created, changed, JSON.stringify(progress)];
  await tx.query(
    `INSERT INTO ota_rollouts
      (id, version, model, state, reason, options, digest, created, changed, progress)
      VALUES ${placeholders(1, 10)} ON CONFLICT (id) DO UPDATE SET state = excluded.state,
      reason = excluded.reason, options = excluded.options, digest = excluded.digest,
      changed = excluded.changed, progress = excluded.progress`,
    [id, version, model, state, reason, ...texts],
  );
}

/** Lets all servers know that a rollout is another one now. */
async function bumpRollouts(tx: Connection): Promise<void> {
  await bumpMeta(tx, "rollouts");
}

/** What `bumpRollouts` counts; 0: there has never been a rollout. */
async function readRevision(db: Connection): Promise<number> {
  const [row] = await db.query("SELECT value FROM ota_meta WHERE name = 'rollouts'");
  return Number(row?.["value"] ?? 0);
}

function rolloutDeviceOf(row: SQLRow): RolloutDevice {
  return {
    device: String(row["device"]),
    standing: row["standing"] as RolloutStanding,
    offered_up: Number(row["offered_up"]),
    on_up: row["on_up"] === null ? null : Number(row["on_up"]),
    heard: Number(row["heard"]),
    known: Number(row["known"]) === 1,
  };
}

/** The rows of those of some devices that were offered a rollout. */
async function readRolloutDevices(
  db: Connection,
  rollout: string,
  ids: readonly string[],
): Promise<Map<string, RolloutDevice>> {
  const found = new Map<string, RolloutDevice>();
  for (const some of chunks(ids)) {
    const list = some.map((_, i) => `$${i + 2}`).join(", ");
    const text = `SELECT * FROM ota_rollout_devices WHERE rollout = $1 AND device IN (${list})`;
    for (const row of await db.query(text, [rollout, ...some])) {
      found.set(String(row["device"]), rolloutDeviceOf(row));
    }
  }
  return found;
}

/** Writes rows, and counts them. @param before how they stood, by device; absent: they are new */
async function writeRolloutDevices(
  tx: Connection,
  { id, progress }: RolloutRecord,
  rows: readonly RolloutDevice[],
  before: ReadonlyMap<string, RolloutStanding>,
): Promise<void> {
  const isBad = (one?: RolloutStanding) => one === "failed" || one === "silent";
  for (const { device, standing } of rows) {
    const stood = before.get(device);
    if (stood) progress[stood]--;
    progress[standing]++;
    if (isBad(standing) && !isBad(stood)) progress.wentBad++;
  }
  for (const some of chunks(rows)) {
    const values = some.flatMap(({ device, standing, offered_up, on_up, heard, known }) => {
      const times = [Math.round(offered_up), on_up && Math.round(on_up), Math.round(heard)];
      return [id, device, standing, ...times, known ? 1 : 0, ++progress.seq];
    });
    await tx.query(
      `INSERT INTO ota_rollout_devices
        (rollout, device, standing, offered_up, on_up, heard, known, seq)
        VALUES ${placeholders(some.length, 8)} ON CONFLICT (rollout, device) DO UPDATE SET
        standing = excluded.standing, on_up = excluded.on_up, heard = excluded.heard,
        known = excluded.known, seq = excluded.seq`,
      values,
    );
  }
}

/** Bad devices of a rollout that are named at most. */
const MAX_BAD = 10;

async function readBadDevices(
  db: Connection,
  { id, progress }: RolloutRecord,
): Promise<BadDevice[]> {
  if (progress.failed + progress.silent === 0) return [];
  const rows = await db.query(
    `SELECT r.device AS id, r.standing, d.name, d.model, d.version, d.firmware
      FROM ota_rollout_devices r
      LEFT JOIN ota_devices d ON d.id = r.device
      WHERE r.rollout = $1 AND r.standing IN ('failed', 'silent')
      ORDER BY r.heard DESC, r.device LIMIT ${MAX_BAD}`,
    [id],
  );
  return rows as unknown as BadDevice[];
}

/** A rollout as it is answered. */
async function rolloutOf(db: Connection, record: RolloutRecord): Promise<Rollout> {
  const { id, state, reason, options, progress, ...times } = record;
  const { version, model, first, soak, silent, tolerance, pauseAt, only, window } = options;
  const { way, proven, failed, silent: silentDevices, acknowledged, eligible } = progress;
  return {
    ...{ id, version, model, state, reason, first, soak, silent, tolerance },
    ...{ pause_at: [...pauseAt], only: only.map(([key, value]) => [key, value]), window },
    ...{ proven, offered: way, failed, silent_devices: silentDevices, acknowledged, eligible },
    ...{ bad: await readBadDevices(db, record), went_bad: progress.wentBad },
    advanced: progress.isOpen,
    ...{ created: times.created, changed: times.changed },
  };
}

// ──── Eligible devices ────────────────────────────────────────────────────────────────────────────
// Which devices a rollout is for, and how many are left.

/** Conditions of SQL for the devices `d`, their cohorts `c` and rows `r` of a rollout. */
interface EligibleSQL {
  /** Whether it is for the device, whatever that is on: by the device alone, and by its cohort. */
  isFor: string;
  isForCohort: string;
  /** Whether the device is below the version, as far as it is not offered yet. */
  isBelow: string;
  from: () => string;
}

/** How long the devices `d` may be silent, in up-time. */
function usualSilence({ silent }: RolloutOptions): string {
  return `CASE WHEN d.patience > 0 THEN d.patience ELSE ${1000 * silent} END`;
}

/** Whether devices `d` were known before a rollout. */
function knownSQL({ created, progress }: Pick<RolloutRecord, "created" | "progress">): string {
  const isOne = `d.id NOT LIKE '${BY_ADDRESS}%'`;
  return progress.isFirst ? isOne : `${isOne} AND d.first_seen <= ${Math.round(created)}`;
}

/** @param models names of those with a root of their own */
function eligibleSQL(
  record: Omit<RolloutRecord, "state" | "reason" | "changed">,
  { $ }: SQLValues,
  models: readonly string[],
  at: number,
): EligibleSQL {
  const { id, options, digest } = record;
  const { version, model, only } = options;
  const isFor = [knownSQL(record)];
  // A clock that was put right, or a server that was off for a month, forgets nobody.
  const usual = usualSilence(options);
  const up = "(SELECT CAST(value AS BIGINT) FROM ota_meta WHERE name = 'up')";
  isFor.push(`(d.last_seen > ${Math.round(at - ROLLOUT_MEMORY)} OR d.seen_up >= ${up} - ${usual})`);
  const isForCohort = ["TRUE"];
  if (model !== null) isForCohort.push(`LOWER(c.model) = ${$(asciiLower(model))}`);
  else if (models.length > 0) {
    const names = models.map((name) => $(asciiLower(name))).join(", ");
    isForCohort.push(`(c.model IS NULL OR LOWER(c.model) NOT IN (${names}))`);
  }
  const isBelow = [
    `c.${isFirmwareOnly(digest) ? "firmware" : "version"}_key < ${$(versionKey(version))}`,
  ];
  for (const [key, values] of valuesByKey(only)) {
    const list = (text: (value: string) => string) => values.map((one) => $(text(one))).join(", ");
    if (key === "model") isForCohort.push(`LOWER(c.model) IN (${list(asciiLower)})`);
    else if (key === "version") isBelow.push(`c.version_key IN (${list(versionKey)})`);
    else {
      const of = `key = ${$(key)} AND value IN (${list(String)})`;
      isFor.push(`d.id IN (SELECT device FROM ota_labels WHERE ${of})`);
    }
  }
  const rows = () => `ota_rollout_devices r ON r.rollout = ${$(id)} AND r.device = d.id`;
  return {
    isFor: isFor.join(" AND "),
    isForCohort: isForCohort.join(" AND "),
    isBelow: isBelow.join(" AND "),
    from: () => `ota_devices d JOIN ota_cohorts c ON c.id = d.cohort LEFT JOIN ${rows()}`,
  };
}

/** Of one key, either value will do; of several keys, all must be right. */
function valuesByKey(only: RolloutOptions["only"]): Map<string, string[]> {
  const values = new Map<string, string[]>();
  for (const [key, value] of only) values.set(key, [...(values.get(key) ?? []), value]);
  return values;
}

/** Whether a device meets the conditions of a rollout. @param hasLabel what is known of its labels */
function meets(
  only: RolloutOptions["only"],
  { model, version }: Pick<FleetDevice, "model" | "version">,
  hasLabel: (key: string, value: string) => boolean,
): boolean {
  if (only.length === 0) return true;
  return [...valuesByKey(only)].every(([key, values]) => {
    return values.some((value) => {
      if (key === "model") return model !== null && asciiLower(model) === asciiLower(value);
      if (key === "version") return isSameRelease(version, value);
      return hasLabel(key, value);
    });
  });
}

/**
 * What a rollout is bound to: the content of the version's files and of its image, in the root of its
 * model; `null`: it is not there.
 */
function rolloutDigest(
  { version, model }: Pick<RolloutOptions, "version" | "model">,
  releases: Releases | undefined,
): string | null {
  const root = releases?.rootOf(model);
  const files = root?.find(version)?.digest;
  const image = root?.firmware.find((one) => one.version.compare(version) === 0)?.sha256;
  return files || image ? `${files ?? ""}+${image ?? ""}` : null;
}

function isFirmwareOnly(digest: string | null): boolean {
  return digest?.startsWith("+") === true;
}

/** Counts the devices that a rollout is for, and those of them that it has not come to an end with. */
async function countEligible(
  db: Connection,
  record: RolloutRecord,
  models: readonly string[],
  at: number,
): Promise<Pick<RolloutProgress, "eligible" | "left" | "others" | "known">> {
  const values = new SQLValues();
  const { isFor, isForCohort, isBelow, from } = eligibleSQL(record, values, models, at);
  const standing = (...names: RolloutStanding[]) => {
    return `r.standing IN (${names.map((name) => `'${name}'`).join(", ")})`;
  };
  const isNext = `(r.device IS NULL AND ${isBelow})`;
  const isLeft = `${isNext} OR ${standing("way", "failed", "silent")}`;
  const sum = (what: string) => `SUM(CASE WHEN ${what} THEN 1 ELSE 0 END)`;
  const [row] = await db.query(
    `SELECT COUNT(*) AS found, ${sum(isLeft)} AS remaining,
        ${sum(`${isLeft} OR ${standing("proven", "acknowledged")}`)} AS eligible
      FROM ${from()} WHERE ${isFor} AND ${isForCohort}`,
    values.all,
  );
  const [all] = await db.query(`SELECT COUNT(*) AS n FROM ota_devices d WHERE ${knownSQL(record)}`);
  const [found, eligible] = [Number(row!["found"]), Number(row!["eligible"] ?? 0)];
  const left = Number(row!["remaining"] ?? 0);
  return { eligible, left, others: found - eligible, known: Number(all!["n"]) };
}

/** The numbers in a rollout of the devices that were known when it began, ascending. */
async function knownNumbers(db: Connection, record: RolloutRecord): Promise<Float64Array> {
  const rows = await db.query(`SELECT d.id AS id FROM ota_devices d WHERE ${knownSQL(record)}`);
  return Float64Array.from(rows, ({ id }) => rolloutNumber(record.id, String(id))).sort();
}

/** Devices that are asked for what is usual at most. */
const SAMPLE = 1000;

/** The usual interval between two visits of a device: a median of medians; 0: not known. */
async function usualInterval(db: Connection): Promise<number> {
  const text = `SELECT patience FROM ota_devices WHERE patience > 0 LIMIT ${SAMPLE}`;
  const found = (await db.query(text)).map(({ patience }) => Number(patience) / 3);
  return found.toSorted((a, b) => a - b)[found.length >> 1] ?? 0;
}

/**
 * The devices that a rollout would reach that has not begun yet, by what they are and are on; most
 * first.
 */
async function countTargets(
  db: Connection,
  options: RolloutOptions,
  models: readonly string[],
  at: number,
): Promise<RolloutTarget[]> {
  const values = new SQLValues();
  // As if it were the first one: whatever there is now is known before it.
  const record = { id: "", options, digest: null, created: at, progress: newProgress(0, true) };
  const { isFor, isForCohort, isBelow } = eligibleSQL(record, values, models, at);
  // By cohort first: devices are many, and an index has all that this needs of them.
  const rows = await db.query(
    `SELECT c.model AS model, c.version AS version,
        CASE WHEN c.version IS NULL THEN c.firmware END AS firmware, SUM(d.n) AS n FROM
        (SELECT d.cohort AS cohort, COUNT(*) AS n FROM ota_devices d WHERE ${isFor}
          GROUP BY d.cohort) d
        JOIN ota_cohorts c ON c.id = d.cohort WHERE ${isForCohort} AND ${isBelow}
      GROUP BY 1, 2, 3 ORDER BY n DESC, model, version, firmware`,
    values.all,
  );
  return rows.map(({ model, version, firmware, n }) => ({
    model: model as string | null,
    version: version as string | null,
    firmware: firmware as string | null,
    devices: Number(n),
  }));
}

// ──── Rollout commands ────────────────────────────────────────────────────────────────────────────
// What an operator does with rollouts: only rows change; servers act on them within two seconds.

/** Names of the models with a root of their own, as the servers left them in the store. */
async function servedModels(db: Connection): Promise<string[]> {
  const text = "SELECT value FROM ota_meta WHERE name = 'setting served'";
  const served = parseJSON(String((await db.query(text))[0]?.["value"] ?? ""));
  const newest = isObject(served) ? served["newest"] : undefined;
  const models = isObject(newest) ? newest["models"] : undefined;
  return isObject(models) ? Object.keys(models) : [];
}

/** A rollout that nobody has begun yet. */
async function newRollout(
  db: Connection,
  options: RolloutOptions,
  at: number,
): Promise<RolloutRecord> {
  const { up } = await readMeta(db);
  const text = `SELECT MAX(first_seen) AS last FROM ota_devices WHERE id NOT LIKE '${BY_ADDRESS}%'`;
  const last = (await db.query(text))[0]?.["last"] ?? null;
  const id = randomBytes(12).toString("base64url");
  const progress = newProgress(up, last === null);
  // By a clock that is behind, no device would be known yet.
  const created = Math.max(Math.round(at), Number(last ?? 0));
  const times = { created, changed: Math.round(at) };
  return { id, state: "waiting", reason: null, options, digest: null, ...times, progress };
}

/** Begins a rollout. @throws {OTAError} where one of that version is not over */
async function beginRollout(tx: Connection, options: RolloutOptions, at: number): Promise<Rollout> {
  const key = rolloutKey(options);
  const others = (await readRollouts(tx)).filter((one) => rolloutKey(one.options) === key);
  const going = others.find(({ state }) => isGoing(state));
  if (going) {
    const what = `a rollout of ${going.options.version} is ${going.state} already`;
    throw new OTAError(`${what}: resume or abort it`);
  }
  const record = await newRollout(tx, options, at);
  // The one that was begun last counts: clocks may have jumped.
  record.created = Math.max(record.created, ...others.map(({ created }) => created + 1));
  const models = await servedModels(tx);
  Object.assign(record.progress, await countEligible(tx, record, models, at));
  await writeRollout(tx, record);
  await bumpRollouts(tx);
  return await rolloutOf(tx, record);
}

/** From which states an action leads on. */
const ACTIONS: Record<RolloutAction, readonly RolloutState[]> = {
  pause: ["waiting", "running"],
  resume: ["running", "paused", "halted"],
  advance: ["waiting", "running", "paused"],
  abort: ["waiting", "running", "paused", "halted"],
};

/** @throws {OTAError} where the state of a rollout does not allow it */
function checkAction(version: string, state: RolloutState, action: RolloutAction): void {
  if (ACTIONS[action].includes(state)) return;
  const from = ACTIONS[action].join(", ");
  throw new OTAError(
    `the rollout of ${version} is ${state}: ${action} is for those that are ${from}`,
  );
}

/** @throws {OTAError} where a rollout is not what the operator saw any more */
function checkSeen(
  { id, state, changed, options, progress }: RolloutRecord,
  action: RolloutAction,
  seen: SeenRollout,
) {
  const { version } = options;
  if (id !== seen.id) {
    throw new OTAError(`another rollout of ${version} was begun since: look at it first`);
  }
  // What stops it may be done in haste.
  if (action === "pause" || action === "abort") return;
  if (changed !== seen.changed) {
    throw new OTAError(`the rollout of ${version} came to be ${state} since: look at it first`);
  }
  const more = progress.wentBad - seen.wentBad;
  if (more <= 0) return;
  throw new OTAError(
    `${counted(more, "more device")} went bad on ${version} since: look at it first`,
  );
}

/** Does what the operator says. @returns `undefined` when there is no such rollout */
async function actOnRollout(
  tx: Connection,
  { version, model }: Pick<RolloutOptions, "version" | "model">,
  action: RolloutAction,
  at: number,
  seen?: SeenRollout,
): Promise<Rollout | undefined> {
  const key = rolloutKey({ version, model } as RolloutOptions);
  const record = (await readRollouts(tx)).find((one) => rolloutKey(one.options) === key);
  if (!record) return undefined;
  if (seen) checkSeen(record, action, seen);
  const { state } = record;
  checkAction(version, state, action);
  const { progress } = record;
  if (action === "pause") Object.assign(record, { state: "paused", reason: "by the operator" });
  if (action === "abort") Object.assign(record, { state: "aborted", reason: "by the operator" });
  if (action === "resume") await resumeRollout(tx, record);
  if (action === "advance") {
    Object.assign(progress, { isOpen: true, share: 1 });
    Object.assign(record, { state: state === "paused" ? "running" : state, reason: null });
  }
  if (record.state !== state) record.changed = Math.round(at);
  await writeRollout(tx, record);
  await bumpRollouts(tx);
  return await rolloutOf(tx, record);
}

/** Lets all devices that stand so stand in another way. */
async function restand(
  tx: Connection,
  record: RolloutRecord,
  from: readonly RolloutStanding[],
  standing: RolloutStanding,
): Promise<void> {
  const list = from.map((one) => `'${one}'`).join(", ");
  const text = `SELECT * FROM ota_rollout_devices WHERE rollout = $1 AND standing IN (${list})`;
  const rows = (await tx.query(text, [record.id])).map(rolloutDeviceOf);
  const before = new Map(rows.map((row) => [row.device, row.standing]));
  const after = rows.map((row) => ({ ...row, standing }));
  await writeRolloutDevices(tx, record, after, before);
}

/** Goes on: what is bad so far counts no more; and other content has to be proven anew. */
async function resumeRollout(tx: Connection, record: RolloutRecord): Promise<void> {
  const { options, progress } = record;
  await restand(tx, record, ["failed", "silent"], "acknowledged");
  if (progress.isOther) {
    await restand(tx, record, ["proven"], "outside");
    record.digest = null;
    progress.counted = -1;
  }
  // Who had opened it to everyone did not know that it would halt.
  if (record.state === "halted") Object.assign(progress, { isOpen: false, share: 0 });
  const isBegun = record.digest !== null || progress.isOther;
  Object.assign(record, { state: isBegun ? "running" : "waiting", reason: null });
  progress.isOther = false;
  // Steps of a small fleet may be one and the same.
  const { proven, acknowledged, eligible } = progress;
  const isBehind = (pause: number) => pauseDevices(pause, eligible) <= proven + acknowledged;
  while (isBehind(options.pauseAt[progress.pauses] ?? Infinity)) progress.pauses++;
}

// ──── Rollout silence ─────────────────────────────────────────────────────────────────────────────
// Devices that say nothing, which is what a release that kills them looks like; and how many there
// are. Both are looked for now and then: they cost more than what a report changes.

/** What servers say and ask of rollouts when they write. */
interface RolloutSaid {
  /** Devices that were given a place since the last time. */
  placed: readonly (readonly [rollout: string, device: string])[];
  /** `rolloutDigest` of the versions of rollouts in the root; absent: it has none. */
  digests: Record<string, string>;
}

/** What changes rollouts in a transaction. */
interface RolloutMoment extends RolloutSaid {
  up: number;
  /** By the clock, when the servers say so. */
  at: number;
  /** Devices that were heard, as they were before and as they are now. */
  before: ReadonlyMap<string, DeviceRecord>;
  after: ReadonlyMap<string, DeviceRecord>;
}

/** How often silence is looked for, as a part of what is silent; and at most, in milliseconds. */
const SILENCE_LOOKS = { parts: 60, most: 60_000 };
/** How often devices are counted, in milliseconds; and which part of the time that takes at most. */
const COUNTING = { every: 60_000, part: 0.01 };

/** How long the last count took in this thread, in milliseconds. */
let countingTook = 0;

/** How often silence is looked for, in milliseconds. */
function lookEvery({ options }: RolloutRecord): number {
  return Math.min((1000 * options.silent) / SILENCE_LOOKS.parts, SILENCE_LOOKS.most);
}

/** Lets the clock of a rollout go on, unless the fleet is quiet; and finds who is silent by it. */
async function lookForSilence(
  tx: Connection,
  record: RolloutRecord,
  moment: RolloutMoment,
): Promise<void> {
  const { id, options, progress } = record;
  const { up } = moment;
  const passed = up - progress.clocked;
  if (passed < lookEvery(record)) return;
  progress.clocked = up;
  progress.isQuiet = await isFleetQuiet(tx, record, moment);
  if (!progress.isQuiet) progress.clock += passed;
  if (progress.way === 0) return;
  const since = Math.round(progress.clock - 1000 * options.silent);
  const rows = await tx.query(
    `SELECT r.*, d.id AS there FROM ota_rollout_devices r LEFT JOIN ota_devices d ON d.id = r.device
      WHERE r.rollout = $1 AND r.standing = 'way' AND r.heard < ${since}
        AND (d.id IS NULL OR r.heard < ${Math.round(progress.clock)} - d.patience)`,
    [id],
  );
  const before = new Map(rows.map((row) => [String(row["device"]), "way" as const]));
  const written = rows.map((row) => {
    const device = rolloutDeviceOf(row);
    // Of one that the operator has forgotten nothing is expected.
    const isAwaited = device.known && row["there"] !== null;
    return { ...device, standing: isAwaited ? ("silent" as const) : ("outside" as const) };
  });
  await writeRolloutDevices(tx, record, written, before);
}

/** Whether every device that the version cannot have killed just now is overdue. */
async function isFleetQuiet(
  tx: Connection,
  record: RolloutRecord,
  { up, at }: RolloutMoment,
): Promise<boolean> {
  const { id, options } = record;
  const others =
    `ota_devices d WHERE ${knownSQL(record)} AND NOT EXISTS (SELECT 1 FROM ` +
    "ota_rollout_devices r WHERE r.rollout = $1 AND r.device = d.id AND r.standing <> 'proven')";
  const heard = `d.seen_up >= ${Math.round(up)} - ${usualSilence(options)}`;
  if ((await tx.query(`SELECT 1 FROM ${others} AND ${heard} LIMIT 1`, [id])).length > 0) {
    return false;
  }
  // Where there is nobody else, silence is all that can be heard.
  const lately = `d.last_seen > ${Math.round(at - ROLLOUT_MEMORY)}`;
  return (await tx.query(`SELECT 1 FROM ${others} AND ${lately} LIMIT 1`, [id])).length > 0;
}

/** Counts whom a rollout is for, now and then; and when it seems to have come to its end. */
async function countDevices(
  tx: Connection,
  record: RolloutRecord,
  up: number,
  at: number,
): Promise<void> {
  const { progress } = record;
  const { counted, proven, acknowledged, eligible } = progress;
  const rest = countingTook / COUNTING.part;
  const isAtEnd = proven + acknowledged >= eligible && progress.left > 0;
  const every = isAtEnd ? rest : Math.max(COUNTING.every, rest);
  if (counted >= 0 && up - counted < every) return;
  const started = performance.now();
  Object.assign(progress, await countEligible(tx, record, await servedModels(tx), at));
  progress.interval = (await usualInterval(tx)) || 1000 * record.options.silent;
  progress.counted = up;
  countingTook = performance.now() - started;
}

// ──── Rollout progress ────────────────────────────────────────────────────────────────────────────
// How rollouts go on: in the transaction that writes reports, one after the other. Since no two such
// transactions overlap, each finds what the one before it left, and several servers agree.

/** What became of a rollout. */
interface RolloutChange {
  rollout: Rollout;
  /** Whether it is in another state. */
  isStep: boolean;
}

/** Lets all rollouts go on. @returns those of whose change servers have to know */
async function advanceRollouts(
  tx: Connection,
  records: readonly RolloutRecord[],
  moment: RolloutMoment,
): Promise<RolloutChange[]> {
  const changes: RolloutChange[] = [];
  for (const record of records) {
    if (!isGoing(record.state)) continue;
    const before = JSON.stringify(record);
    const { state, reason } = record;
    await settleDevices(tx, record, moment);
    if (record.state === "waiting" || record.state === "running" || record.state === "paused") {
      await advanceRollout(tx, record, moment);
    }
    if (record.state !== state) record.changed = Math.round(moment.at);
    if (JSON.stringify(record) === before) continue;
    await writeRollout(tx, record);
    if (record.state === state && record.reason === reason) continue;
    changes.push({ rollout: await rolloutOf(tx, record), isStep: record.state !== state });
  }
  return changes;
}

/** What a rollout is about, as a device has it. */
function versionOn({ digest }: RolloutRecord, { version, firmware }: DeviceRecord): string | null {
  return isFirmwareOnly(digest) ? firmware : version;
}

/** Whether a device is on the version of a rollout, or on a later one. */
function isOnRollout(record: RolloutRecord, device: DeviceRecord): boolean {
  return versionKey(versionOn(record, device)) >= versionKey(record.options.version);
}

/** Whether it is this release that failed on a device. */
function failsRollout({ options: { version } }: RolloutRecord, device: DeviceRecord): boolean {
  if (!hasFailed(device) || device.failed === null) return false;
  return isSameRelease(device.failed.replace(/^firmware /, ""), version);
}

/** Whether it failed only because the device asked for it again and again, and at once. */
function isInHaste({ standing, offers }: DeviceRecord, { offered_up }: RolloutDevice, up: number) {
  return standing === "seen" && offers >= MAX_OFFERS && up - offered_up < VISIT;
}

/** Whether what was heard of a device may change how it stands. */
function concernsRollout(
  record: RolloutRecord,
  before: DeviceRecord | undefined,
  after: DeviceRecord,
): boolean {
  const wasOn = before !== undefined && isOnRollout(record, before);
  if (isOnRollout(record, after)) return !wasOn || record.options.soak > 0;
  const isOffered = isSameRelease(after.offered ?? after.offered_firmware, record.options.version);
  return wasOn || isOffered || failsRollout(record, after);
}

/** How a device stands after it was heard. */
function standingAfter(
  row: RolloutDevice,
  device: DeviceRecord,
  record: RolloutRecord,
  up: number,
): Pick<RolloutDevice, "standing" | "on_up"> {
  const { standing } = row;
  if (standing === "outside") return row;
  if (isOnRollout(record, device)) {
    const on_up = row.on_up ?? up;
    // A later version proves nothing of this one.
    const isSame = isSameRelease(versionOn(record, device), record.options.version);
    if (!isSame && standing !== "proven") return { standing: "outside", on_up };
    const isProven = standing === "proven" || up - on_up >= 1000 * record.options.soak;
    if (isProven) return { standing: row.known ? "proven" : "outside", on_up };
    return { standing: "way", on_up };
  }
  // What has failed stays so when it is offered no more, and the device no longer speaks of it.
  if (standing === "acknowledged" || standing === "failed") return { standing, on_up: null };
  if (failsRollout(record, device) && !isInHaste(device, row, up)) {
    return { standing: row.known ? "failed" : "outside", on_up: null };
  }
  return { standing: "way", on_up: null };
}

/** Takes down who was given a place, and what was heard of those who have one. */
async function settleDevices(
  tx: Connection,
  record: RolloutRecord,
  { placed, before, after, up }: RolloutMoment,
): Promise<void> {
  const { id, progress, created } = record;
  const fresh = new Set(placed.filter(([rollout]) => rollout === id).map(([, device]) => device));
  const heard = [...after.values()]
    .filter((device) => concernsRollout(record, before.get(device.id), device))
    .map((device) => device.id);
  const ids = [...new Set([...fresh, ...heard])];
  if (ids.length === 0) return;
  const rows = await readRolloutDevices(tx, id, ids);
  const stood = new Map([...rows].map(([device, { standing }]) => [device, standing]));
  const unheard = [...fresh].filter((device) => !after.has(device));
  const others = unheard.length === 0 ? [] : await readRows(tx, unheard);
  const known = new Map(others.map((row) => [String(row["id"]), recordOf(row)]));
  const clock = progress.clock + Math.min(Math.max(0, up - progress.clocked), lookEvery(record));
  const written: RolloutDevice[] = [];
  for (const device of ids) {
    const heardOf = after.get(device) ?? known.get(device);
    const isKnown = progress.isFirst || (heardOf !== undefined && heardOf.first_seen <= created);
    const row = rows.get(device) ?? newRolloutDevice(device, isKnown, up, clock);
    // Who is on it without a place has got it elsewhere, and proves nothing.
    if (!rows.has(device) && !fresh.has(device)) continue;
    const now = heardOf ? standingAfter(row, heardOf, record, up) : row;
    const next = { ...row, ...now, heard: after.has(device) ? clock : row.heard };
    if (!rows.has(device) || !Bun.deepEquals(next, row)) written.push(next);
  }
  await writeRolloutDevices(tx, record, written, stood);
}

function newRolloutDevice(
  device: string,
  known: boolean,
  up: number,
  heard: number,
): RolloutDevice {
  return { device, standing: "way", offered_up: up, on_up: null, heard, known };
}

/** From one state to the next. */
async function advanceRollout(
  tx: Connection,
  record: RolloutRecord,
  moment: RolloutMoment,
): Promise<void> {
  const { id, options, progress } = record;
  const { up, at } = moment;
  const set = (state: RolloutState, reason: string | null) => {
    Object.assign(record, { state, reason });
  };
  const digest = moment.digests[id];
  if (digest !== undefined && record.digest !== null && digest !== record.digest) {
    progress.isOther = true;
    return set("halted", `${options.version} is no longer what it was: its content has changed`);
  }
  if (digest !== undefined) {
    record.digest = digest;
    if (record.state === "waiting") {
      set("running", null);
      // Its time begins now.
      Object.assign(progress, { clocked: up, shared: up, counted: -1 });
    }
  }
  if (record.digest === null) return;
  await lookForSilence(tx, record, moment);
  await countDevices(tx, record, up, at);
  const halt = haltReason(options, progress);
  if (halt !== undefined) return set("halted", halt);
  if (progress.left === 0 && (progress.eligible > 0 || isForNobody(record))) {
    return set("done", `nobody is left: ${counted(progress.proven, "device")} proven`);
  }
  progress.most = waveAfter(options, progress);
  if (record.state === "paused") return;
  const pause = pauseReason(options, progress);
  if (pause !== undefined) return set("paused", pause);
  const { window } = options;
  const isClosed = window !== null && !isOpen(parseWindow(window), at);
  record.reason = isClosed
    ? `held: it is not ${windowText(window)}`
    : heldReason(options, progress);
  // A time in which nobody may ask lets nobody in later.
  if (isClosed) progress.shared = up;
  Object.assign(progress, shareAfter(options, progress, up));
}

/**
 * Whether all devices of a fleet have a version already. Conditions may come to hold for somebody; and
 * where nobody was heard for long, nobody is known to have it.
 */
function isForNobody({ options, progress }: RolloutRecord): boolean {
  return progress.eligible === 0 && progress.others > 0 && options.only.length === 0;
}

// ──── Rollout places ──────────────────────────────────────────────────────────────────────────────
// What servers have to know to admit devices. Only one server at a time gives places away: the one
// that has the lease. Each write renews it. A server uses it for five seconds after it began the
// write that renewed it; another one may take it when it saw it unchanged for thirty seconds of its
// own time. In between, the first has had 25 seconds to write whom it gave a place: so all places are
// counted before others are given, unless a server is cut off from the store or killed. A server that
// was, has given away at most what it had for the second before.

/** What a server knows of a rollout, should the store lose it. */
type KnownRollout = Pick<RolloutRecord, "id" | "state" | "options" | "digest" | "created">;

/** What a server asks when it writes. */
interface RolloutAsk extends RolloutSaid {
  known: readonly KnownRollout[];
  /** What it has read already; `-1`: nothing. */
  revision: number;
  labels: string;
  /** By rollout: the last change of a device that it knows; and `RolloutView.known`. */
  seqs: Record<string, number>;
  counts: Record<string, number>;
  /** Whether it wants to give places away. */
  wants: boolean;
  /** The lease of another server that it saw unchanged for long enough. */
  expired: string | null;
}

/** A rollout, as servers need it. */
interface RolloutView extends KnownRollout {
  share: number;
  /** How many more devices may be offered it; 0 without the lease. */
  free: number;
  seq: number;
  /** How many devices were known when it began; and their numbers, if there are others than before. */
  known: number;
  numbers?: Float64Array;
  /** Devices that were offered it, and whether they still may; since the `seq` that was asked. */
  changed: [device: string, isOffered: boolean][];
}

/** What a server is told after it wrote. */
interface RolloutNews {
  revision: number;
  views: RolloutView[];
  /** Rollouts that are in another state by this write. */
  steps: Rollout[];
  /** Devices by `KEY=VALUE`, those that matter to rollouts; absent: as before. */
  labelled?: Record<string, string[]>;
  /** Tells whether these have changed. */
  labels: string;
  lease: string;
  isMine: boolean;
  /** Whether another server wants the lease. */
  isWanted: boolean;
}

/** What a server is told while there has never been a rollout. */
const NO_ROLLOUTS: RolloutNews = {
  ...{ revision: 0, views: [], steps: [], labels: "" },
  ...{ lease: "", isMine: false, isWanted: false },
};

/** The label of devices that go first. */
const CANARY = "canary=yes";

/** Keys of `only` that are no labels. */
const isLabelKey = (key: string) => key !== "model" && key !== "version";

/** Whether a rollout that is `record` still keeps devices from its version. */
function isBarring({ state, options }: RolloutRecord): boolean {
  return state !== "done" || options.only.length > 0;
}

/** Takes, keeps or gives up the lease. @param meta what stands in the store */
async function leaseFor(
  tx: Connection,
  server: string,
  { wants, expired }: RolloutAsk,
  meta: ReadonlyMap<string, string>,
): Promise<Pick<RolloutNews, "lease" | "isMine" | "isWanted">> {
  const [lease, wanted] = [meta.get("lease") ?? "", meta.get("wanted") ?? ""];
  const [holder = "", nth = "0"] = lease.split(" ");
  const isMine = holder === server;
  if (!wants) {
    if (isMine) await setMeta(tx, { lease: "" });
    return { lease: isMine ? "" : lease, isMine: false, isWanted: false };
  }
  if (!isMine && holder !== "" && lease !== expired) {
    if (wanted !== server) await setMeta(tx, { wanted: server });
    return { lease, isMine: false, isWanted: false };
  }
  const renewed = `${server} ${Number(nth) + 1}`;
  await setMeta(tx, { lease: renewed, ...(wanted === server && { wanted: "" }) });
  return { lease: renewed, isMine: true, isWanted: wanted !== "" && wanted !== server };
}

/** What a server that writes has to know of rollouts. */
async function rolloutNews(
  tx: Connection,
  records: readonly RolloutRecord[],
  server: string,
  ask: RolloutAsk,
): Promise<Omit<RolloutNews, "steps">> {
  const names = "'rollouts', 'labels', 'lease', 'wanted'";
  const rows = await tx.query(`SELECT name, value FROM ota_meta WHERE name IN (${names})`);
  const meta = new Map(rows.map(({ name, value }) => [String(name), String(value)]));
  const barring = lastRollouts(records).filter(isBarring);
  const lease = await leaseFor(tx, server, ask, meta);
  const views: RolloutView[] = [];
  for (const record of barring) {
    const { id, state, options, digest, created, progress } = record;
    const { share, seq, known, isFirst } = progress;
    const free = lease.isMine && state === "running" ? freePlaces(options, progress) : 0;
    const changed = isGoing(state) ? await changedDevices(tx, id, ask.seqs[id] ?? 0, seq) : [];
    const isOld = !isGoing(state) || isFirst || ask.counts[id] === known;
    views.push({
      ...{ id, state, options, digest, created, share, free, seq, changed, known },
      ...(!isOld && { numbers: await knownNumbers(tx, record) }),
    });
  }
  const pairs = new Set([CANARY]);
  for (const { options } of views) {
    for (const [key, value] of options.only) if (isLabelKey(key)) pairs.add(`${key}=${value}`);
  }
  const labels =
    views.length > 0 ? JSON.stringify([Number(meta.get("labels") ?? 0), ...pairs]) : "";
  return {
    ...{ revision: Number(meta.get("rollouts") ?? 0), views, labels, ...lease },
    ...(labels !== ask.labels && { labelled: await devicesByLabel(tx, pairs) }),
  };
}

async function changedDevices(
  tx: Connection,
  rollout: string,
  since: number,
  seq: number,
): Promise<RolloutView["changed"]> {
  if (since >= seq) return [];
  const rows = await tx.query(
    `SELECT device, standing FROM ota_rollout_devices WHERE rollout = $1 AND seq > ${since}`,
    [rollout],
  );
  const isOffered = (standing: unknown) => standing !== "proven" && standing !== "outside";
  return rows.map(({ device, standing }) => [String(device), isOffered(standing)]);
}

async function devicesByLabel(
  tx: Connection,
  pairs: ReadonlySet<string>,
): Promise<Record<string, string[]>> {
  const found: Record<string, string[]> = {};
  for (const pair of pairs) {
    const [, key, value] = /^([^=]*)=(.*)$/s.exec(pair)!;
    const text = "SELECT device FROM ota_labels WHERE key = $1 AND value = $2";
    found[pair] = (await tx.query(text, [key, value])).map(({ device }) => String(device));
  }
  return found;
}

// ──── Merging ───────────────────────────────────────────────────────────────────────────────
// What another van has seen. Of two reports of a device the newer counts, of two names or labels the
// one given last; events add up, and are the same ones by source and number: twice is as good as
// once, and the order of merging does not matter.

/** What operators give a device. */
interface GivenName {
  name: string | null;
  name_at: number;
}

type MergedRecord = DeviceRecord & GivenName;

function mergedOf(row: SQLRow): MergedRecord {
  return { ...recordOf(row), name: row["name"] as string | null, name_at: Number(row["name_at"]) };
}

/** The later of two; of two at the same time, either, but always the same one. */
function laterOf<T>(a: T, b: T, at: (one: T) => number, text: (one: T) => string): T {
  const order = at(a) - at(b) || compareCodePoints(text(a), text(b));
  return order >= 0 ? a : b;
}

/** What two stores know of a device. */
function mergeRecords(mine: MergedRecord | undefined, theirs: MergedRecord): MergedRecord {
  if (!mine) return theirs;
  // What is said of one report, whoever heard it.
  const reported = ({ name, name_at, seen_up, first_seen, seen, events, ...rest }: MergedRecord) =>
    rest;
  const later = laterOf(
    mine,
    theirs,
    ({ last_seen }) => last_seen,
    (one) => JSON.stringify(reported(one)),
  );
  const named = laterOf(
    mine,
    theirs,
    ({ name_at }) => name_at,
    ({ name }) => name ?? "",
  );
  return {
    ...later,
    first_seen: Math.min(mine.first_seen, theirs.first_seen),
    // Adding would count the same reports twice.
    seen: Math.max(mine.seen, theirs.seen),
    events: Math.max(mine.events, theirs.events),
    ...{ name: named.name, name_at: named.name_at },
  };
}

/** What a merge did. */
export interface FleetMerge {
  /** Devices that were not known. */
  added: number;
  /** Known devices of which more is known now. */
  updated: number;
  /** Known devices that were heard of later here than there. */
  newer: number;
  /** Events that were not known. */
  events: number;
  /** Rows that are not as this tool writes them, and were left out. */
  refused: number;
  /** Whether one store began as a copy of the other: what both noted since counts once. */
  isCopy: boolean;
}

/** Columns with numbers; all others have texts. */
const NUMBER_COLUMNS = new Set([
  ...["first_seen", "last_seen", "seen", "seen_up", "patience", "offered_at", "offers", "events"],
  ...["name_at", "number", "at", "offered_up", "on_up", "heard", "known", "seq"],
]);
/** Those with up-times, which are below 0 where a fleet was merged that had run for longer. */
const UP_COLUMNS = new Set(["seen_up", "offered_up", "on_up"]);
const STANDINGS: readonly unknown[] = ["none", "offered", "said", "seen"] satisfies Standing[];
/** What a date can be at most, in milliseconds; counts are smaller. */
const MAX_TIME = 8.64e15;

/** Whether it is a time or a count as this tool writes them. */
function isTime(value: unknown, least = 0): boolean {
  const number = Number(value);
  return Number.isSafeInteger(number) && number >= least && number <= MAX_TIME;
}

/**
 * Whether a row of another store, about a device, is as this tool writes it: the file comes from
 * somewhere.
 *
 * @param standings those that there are in its table
 */
function isSound(row: SQLRow, standings = STANDINGS): boolean {
  const isRight = ([column, value]: [string, string | number | null]) => {
    if (value === null) return true;
    if (NUMBER_COLUMNS.has(column)) return isTime(value, UP_COLUMNS.has(column) ? -MAX_TIME : 0);
    const isText = typeof value === "string" && value.length <= 2 * MAX_TEXT;
    if (!isText || hasControls(value) || !value.isWellFormed()) return false;
    return column !== "intervals" || /^(\d+(,\d+){0,4})?$/.test(value);
  };
  const id = row["id"] ?? row["device"];
  const isKnownStanding = row["standing"] === undefined || standings.includes(row["standing"]);
  return (
    typeof id === "string" &&
    id === id.toLowerCase() &&
    isKnownStanding &&
    Object.entries(row).every(isRight)
  );
}

/** Some rows of another store. */
interface TheirRows {
  rows: SQLRow[];
  /** How many more were read, and are left out. */
  refused: number;
}

/** Rows of another store that are sound, in the order of their key, some at a time. */
async function* rowsOf(
  db: Connection,
  table: string,
  keys: readonly string[],
  isRight: (row: SQLRow) => boolean = isSound,
): AsyncGenerator<TheirRows> {
  const order = keys.join(", ");
  for (let last: SQLRow | undefined; ;) {
    const values = last ? keys.map((key) => last![key]) : [];
    const after = last ? `WHERE (${order}) > ${placeholders(1, keys.length)}` : "";
    const text = `SELECT * FROM ${table} ${after} ORDER BY ${order} LIMIT 1000`;
    const read = await db.query(text, values);
    if (read.length === 0) return;
    const rows = read.filter((row, i) => {
      // There may be two of what there should be one of.
      const isFirst = i === 0 || keys.some((key) => row[key] !== read[i - 1]![key]);
      return isFirst && isRight(row);
    });
    yield { rows, refused: read.length - rows.length };
    last = read.at(-1);
  }
}

/**
 * Merges devices.
 *
 * @param theirUp the up-time of their fleet
 */
async function mergeDevices(
  tx: Connection,
  rows: readonly SQLRow[],
  theirUp: number,
): Promise<Pick<FleetMerge, "added" | "updated" | "newer">> {
  const ids = rows.map(({ id }) => String(id));
  const mine = new Map((await readRows(tx, ids)).map((row) => [String(row["id"]), mergedOf(row)]));
  const changed: MergedRecord[] = [];
  const { up } = await readMeta(tx);
  let [updated, newer] = [0, 0];
  for (const row of rows) {
    const theirs = mergedOf(row);
    const known = mine.get(theirs.id);
    const isNewer = known && known.last_seen > theirs.last_seen;
    if (isNewer) newer++;
    // None was heard later than now: it would be deaf to what it says until then.
    const seen_up = Math.min(up, theirs.seen_up + up - theirUp);
    const record = mergeRecords(known, { ...theirs, seen_up });
    record.cohort = cohortOf(record);
    if (known && Bun.deepEquals(record, known)) continue;
    changed.push(record);
    if (known && !isNewer) updated++;
  }
  await writeRecords(tx, changed, mine);
  for (const { id, name, name_at } of changed.filter(({ name_at }) => name_at > 0)) {
    const text = "UPDATE ota_devices SET name = $1, name_at = $2 WHERE id = $3";
    await tx.query(text, [name, name_at, id]);
  }
  return { added: rows.length - mine.size, updated, newer };
}

/** Merges labels. */
async function mergeLabels(tx: Connection, rows: readonly SQLRow[]): Promise<void> {
  for (const some of chunks(rows)) {
    const values = some.flatMap(({ device, key, value, at }) => [device, key, value, Number(at)]);
    await tx.query(
      `INSERT INTO ota_labels (device, key, value, at) VALUES ${placeholders(some.length, 4)}
        ON CONFLICT (device, key) DO UPDATE SET value = excluded.value, at = excluded.at
        WHERE excluded.at > ota_labels.at
          OR (excluded.at = ota_labels.at AND excluded.value > ota_labels.value)`,
      values,
    );
  }
  await bumpMeta(tx, "labels");
}

/** Merges events. @returns how many are new */
async function mergeEvents(tx: Connection, rows: readonly SQLRow[]): Promise<number> {
  let added = 0;
  for (const some of chunks(rows)) {
    const values = some.flatMap(({ device, source, number, at, kind, from_, to_ }) => {
      return [device, source, Number(number), Number(at), kind, from_, to_];
    });
    const text =
      `INSERT INTO ota_events VALUES ${placeholders(some.length, 7)} ` +
      "ON CONFLICT (device, source, number) DO NOTHING RETURNING number";
    added += (await tx.query(text, values)).length;
  }
  return added;
}

/**
 * Opens the store that is to be merged; it may be in use, and stays as it is.
 *
 * @throws {OTAError} when there is none
 */
async function openOther(file: string): Promise<Connection> {
  if (!fs.existsSync(file)) throw new OTAError(`there is no ${file} to merge`);
  const place = storePlace(file);
  let db: Connection | undefined;
  try {
    db = await openStore(place, "read");
    const { up } = await readMeta(db);
    if (!isTime(up)) throw new Error("its up-time is no time");
    return db;
  } catch (error) {
    await db?.close();
    if (error instanceof OTAError) throw error;
    const what = `expected the SQLite file of another fleet, found ${file}`;
    throw new OTAError(`${what} (${errorText(error)})`, 1, { cause: error });
  }
}

// ──── Rollout merging ─────────────────────────────────────────────────────────────────────────────
// Rollouts of another store: of one version and model there is one, wherever it was begun. A halt
// anywhere wins, and devices add up.

/** What wins over what, whoever did it last. */
const HALTS: readonly RolloutState[] = ["halted", "aborted"];

/** What is known best of a device by two stores: the last wins. */
const ROLLOUT_STANDINGS: readonly RolloutStanding[] = [
  ...(["outside", "way", "silent", "acknowledged", "failed", "proven"] as const),
];

const ROLLOUT_STATES: readonly unknown[] = [
  ...(["waiting", "running", "paused", "halted", "done", "aborted"] satisfies RolloutState[]),
];
/** Characters of a reason. */
const MAX_REASON = 1024;

/** Options as a store has them. @throws {OTAError} when no rollout can be like that */
function asRolloutOptions(value: unknown): RolloutOptions {
  const given = asObject(value, "options");
  const textOrNull = (name: string) => (given[name] === null ? null : asText(given[name], name));
  const options: RolloutOptions = {
    version: asText(given["version"], "version"),
    model: textOrNull("model"),
    first: asNumber(given["first"], "first"),
    soak: asNumber(given["soak"], "soak"),
    silent: asNumber(given["silent"], "silent"),
    tolerance: asNumber(given["tolerance"], "tolerance"),
    pauseAt: asList(given["pauseAt"], "pauseAt", asNumber),
    only: asList(given["only"], "only", asPair),
    window: textOrNull("window"),
  };
  checkRollout(options);
  return options;
}

/** A rollout of another store, with as much of its progress as is merged. @throws {OTAError} */
function asRollout(row: SQLRow): RolloutRecord {
  const record = rolloutRecordOf(row);
  const { id, state, reason, digest, created, changed } = record;
  const expect = (isRight: boolean, name: string) => {
    if (!isRight) malformed(name);
  };
  expect(/^[\w-]{16}$/.test(id), "id");
  expect(ROLLOUT_STATES.includes(state), "state");
  const isText = typeof reason === "string" && reason.length <= MAX_REASON;
  expect(reason === null || (isText && !hasControls(reason) && reason.isWellFormed()), "reason");
  const isDigest = typeof digest === "string" && /^([0-9a-f]{64})?\+([0-9a-f]{64})?$/.test(digest);
  expect(digest === null || (isDigest && digest !== "+"), "digest");
  expect(isTime(created) && isTime(changed), "times");
  const options = asRolloutOptions(record.options);
  const { isOpen, isFirst, pauses, eligible } = asObject(record.progress, "progress");
  const counts = [asNumber(pauses, "pauses"), asNumber(eligible, "eligible")] as const;
  expect(isTime(counts[0]) && counts[0] <= options.pauseAt.length, "pauses");
  expect(isTime(counts[1]), "eligible");
  const progress = newProgress(0, asFlag(isFirst, "isFirst"));
  Object.assign(progress, { isOpen: asFlag(isOpen, "isOpen"), pauses, eligible });
  return { ...record, options, progress };
}

/** The same; `undefined` for one that is not as this tool writes them. */
function soundRollout(row: SQLRow): RolloutRecord | undefined {
  try {
    return asRollout(row);
  } catch (error) {
    if (error instanceof OTAError) return undefined;
    throw error;
  }
}

/** Merges the rollouts themselves. @returns for each of theirs the one of ours that it is */
async function mergeRollouts(
  tx: Connection,
  others: readonly RolloutRecord[],
): Promise<Map<string, RolloutRecord>> {
  const merged = new Map<string, RolloutRecord>();
  const { up } = await readMeta(tx);
  const mine = await readRollouts(tx);
  // Oldest first: of one version the one that was begun last counts in the end.
  for (const theirs of others.toReversed()) {
    const key = rolloutKey(theirs.options);
    const same = mine.find(({ id }) => id === theirs.id);
    // One and the same rollout has one version.
    if (same && rolloutKey(same.options) !== key) continue;
    const known = same ?? mine.find(({ options }) => rolloutKey(options) === key);
    const one = known ? mergeRollout(known, theirs, same !== undefined) : adopted(theirs, up);
    if (!known) mine.unshift(one);
    merged.set(theirs.id, one);
    await writeRollout(tx, one);
  }
  if (merged.size > 0) await bumpRollouts(tx);
  return merged;
}

/** A rollout that was not known here: its devices are counted as they come. */
function adopted(theirs: RolloutRecord, up: number): RolloutRecord {
  const { isOpen, isFirst, pauses, eligible } = theirs.progress;
  const progress = { ...newProgress(up, isFirst), isOpen, pauses, eligible };
  return { ...theirs, progress };
}

function mergeRollout(mine: RolloutRecord, theirs: RolloutRecord, isSame: boolean): RolloutRecord {
  const order = HALTS.indexOf(theirs.state) - HALTS.indexOf(mine.state);
  // Whether it is done, each store sees by the devices that it knows.
  const isLater = isSame && isGoing(theirs.state) && theirs.changed > mine.changed;
  if (order > 0 || (order === 0 && isLater && theirs.state !== "waiting")) {
    const reason = order > 0 ? `elsewhere: ${theirs.reason ?? theirs.state}` : theirs.reason;
    Object.assign(mine, { state: theirs.state, reason, changed: theirs.changed });
  }
  if (isSame) {
    mine.digest ??= theirs.digest;
    mine.progress.isOpen ||= theirs.progress.isOpen;
    mine.progress.pauses = Math.max(mine.progress.pauses, theirs.progress.pauses);
  }
  return mine;
}

/**
 * Merges devices that were offered rollouts.
 *
 * @param theirUp the up-time of their fleet
 */
async function mergeRolloutDevices(
  tx: Connection,
  rows: readonly SQLRow[],
  ours: ReadonlyMap<string, string>,
  theirUp: number,
): Promise<void> {
  const { up } = await readMeta(tx);
  const shifted = (time: number) => Math.min(up, time + up - theirUp);
  const records = new Map((await readRollouts(tx)).map((record) => [record.id, record]));
  for (const [rollout, some] of Map.groupBy(rows, (row) => String(row["rollout"]))) {
    const record = records.get(ours.get(rollout) ?? "");
    if (!record) continue;
    const ids = some.map(({ device }) => String(device));
    const mine = await readRolloutDevices(tx, record.id, ids);
    const stood = new Map([...mine].map(([device, { standing }]) => [device, standing]));
    const devices = await readRows(tx, ids);
    const known = new Map(devices.map((row) => [String(row["id"]), recordOf(row)]));
    const written: RolloutDevice[] = [];
    for (const row of some.map(rolloutDeviceOf)) {
      const on_up = row.on_up === null ? null : shifted(row.on_up);
      const theirs = { ...row, on_up, offered_up: shifted(row.offered_up) };
      const merged = mergeRolloutDevice(mine.get(row.device), theirs, record);
      const device = known.get(row.device);
      // The devices are merged already, and say best how it stands.
      const says = device && (isOnRollout(record, device) || failsRollout(record, device));
      const now = says ? standingAfter(merged, device, record, on_up ?? theirs.offered_up) : merged;
      const next = { ...merged, ...now };
      if (!Bun.deepEquals(next, mine.get(row.device))) written.push(next);
    }
    await writeRolloutDevices(tx, record, written, stood);
    await writeRollout(tx, record);
  }
}

function mergeRolloutDevice(
  mine: RolloutDevice | undefined,
  theirs: RolloutDevice,
  { progress }: RolloutRecord,
): RolloutDevice {
  if (!mine) return { ...theirs, heard: progress.clock };
  const isBetter =
    ROLLOUT_STANDINGS.indexOf(theirs.standing) > ROLLOUT_STANDINGS.indexOf(mine.standing);
  return {
    ...mine,
    known: mine.known || theirs.known,
    ...(isBetter && { standing: theirs.standing }),
  };
}

/** Adds what another store knows, some rows at a time: a server writes in between. */
async function mergeStore(
  db: Connection,
  other: Connection,
  maxDevices: number,
): Promise<FleetMerge> {
  const theirs = await readMeta(other);
  const isCopy = theirs.source === (await readMeta(db)).source;
  const total = { added: 0, updated: 0, newer: 0, events: 0, refused: 0, isCopy };
  for await (const { rows, refused } of rowsOf(other, "ota_devices", ["id"])) {
    const found = await locked(db, (tx) => mergeDevices(tx, rows, theirs.up));
    for (const name of ["added", "updated", "newer"] as const) total[name] += found[name];
    total.refused += refused;
  }
  for await (const { rows, refused } of rowsOf(other, "ota_labels", ["device", "key"])) {
    await locked(db, (tx) => mergeLabels(tx, rows));
    total.refused += refused;
  }
  const ofEvents = ["device", "source", "number"];
  for await (const { rows, refused } of rowsOf(other, "ota_events", ofEvents)) {
    total.events += await locked(db, (tx) => mergeEvents(tx, rows));
    total.refused += refused;
  }
  const ours = new Map<string, string>();
  const all = await other.query("SELECT * FROM ota_rollouts ORDER BY created DESC, id");
  const rollouts = all.map(soundRollout).filter((one) => one !== undefined);
  for (const [id, record] of await locked(db, (tx) => mergeRollouts(tx, rollouts))) {
    ours.set(id, record.id);
  }
  total.refused += all.length - ours.size;
  const isOurs = (row: SQLRow) =>
    ours.has(String(row["rollout"])) && isSound(row, ROLLOUT_STANDINGS);
  const ofRollouts = ["rollout", "device"];
  for await (const { rows, refused } of rowsOf(other, "ota_rollout_devices", ofRollouts, isOurs)) {
    await locked(db, (tx) => mergeRolloutDevices(tx, rows, ours, theirs.up));
    total.refused += refused;
  }
  // Last, since what goes takes its labels and events with it.
  await locked(db, (tx) => evict(tx, maxDevices));
  return total;
}

// ──── Names and labels ────────────────────────────────────────────────────────────────────────────
// What the operator notes of devices.

/** A change by the operator; `null` removes. */
export interface DeviceEdit {
  name?: string | null;
  labels?: Record<string, string | null>;
}

/** Labels of one device at most. */
const MAX_LABELS = 64;

/** @throws {OTAError} exit code 2 when a text is none that we keep */
function checkEdit({ name, labels = {} }: DeviceEdit): void {
  const rule = `at most ${MAX_TEXT} characters, and no control characters`;
  if (name && saidText(name) === null) throw new OTAError(`a name has ${rule}`, 2);
  const entries = Object.entries(labels);
  if (entries.length > MAX_LABELS) throw new OTAError(`at most ${MAX_LABELS} labels`, 2);
  for (const [key, value] of entries) {
    if (saidText(key) === null || key.includes("=")) {
      throw new OTAError(`a label's key has 1 character or more, ${rule}, and no "="`, 2);
    }
    if (value && saidText(value) === null) throw new OTAError(`the label ${key} has ${rule}`, 2);
  }
}

/** Changes what the operator noted of a device. @returns whether the device is known */
async function editDevice(
  tx: Connection,
  id: string,
  { name, labels = {} }: DeviceEdit,
  at: number,
): Promise<boolean> {
  const [known] = await tx.query("SELECT id FROM ota_devices WHERE id = $1", [id]);
  if (!known) return false;
  if (name !== undefined) {
    const text = "UPDATE ota_devices SET name = $1, name_at = $2 WHERE id = $3";
    await tx.query(text, [name || null, at, id]);
  }
  for (const [key, value] of Object.entries(labels)) {
    // A label that was removed stays, empty: a merge must not bring it back.
    await tx.query(
      `INSERT INTO ota_labels (device, key, value, at) VALUES ($1, $2, $3, $4)
        ON CONFLICT (device, key) DO UPDATE SET value = excluded.value, at = excluded.at`,
      [id, key, value ?? "", at],
    );
  }
  if (Object.keys(labels).length > 0) await bumpMeta(tx, "labels");
  await boundLabels(tx, id, Object.values(labels).some(Boolean));
  return true;
}

/** Keeps the latest of the labels that were removed, and bounds the others when some are `set`. */
async function boundLabels(tx: Connection, id: string, isSet: boolean): Promise<void> {
  await tx.query(
    `DELETE FROM ota_labels WHERE device = $1 AND value = '' AND key NOT IN (SELECT key FROM ota_labels
      WHERE device = $1 AND value = '' ORDER BY at DESC, key LIMIT ${MAX_LABELS})`,
    [id],
  );
  const text = "SELECT COUNT(*) AS n FROM ota_labels WHERE device = $1 AND value <> ''";
  const [row] = await tx.query(text, [id]);
  if (isSet && Number(row!["n"]) > MAX_LABELS) {
    throw new OTAError(`a device has at most ${MAX_LABELS} labels; remove some first`, 2);
  }
}

// ──── Store batches ────────────────────────────────────────────────────────────────────────────────
// A write: what was reported since the last one, and what follows from it, in one transaction.

/**
 * Servers behind one address hear the same device, and write in any order. What one of them heard is
 * late when another one, that wrote within this time, heard the device since: in milliseconds.
 */
const TOGETHER = 120_000;
/** For how much up-time it is known what a server wrote last, in milliseconds. */
const BATCH_MEMORY = 24 * 3600_000;

/** By how much up-times of servers that run at the same time may differ, in milliseconds. */
const LATE = 1000;

/** What a write is told beside the reports. */
interface WriteMoment {
  /** Who writes; tells its batches from those of others. */
  server: string;
  /** Milliseconds that the server was up since `since`. */
  gained: number;
  /** The fleet's up-time then; `null` when it is not known. */
  since: number | null;
  /** See `FleetClock`. */
  elapsed: number;
  /** See `Moment`. */
  silent: number;
  /** By the clock; absent when no server writes. */
  at?: number;
  /** The fleet's up-time when the server began. */
  opened: number;
  /** Settings that are new, by name. */
  settings: Record<string, string>;
  /** Those that are put back where the store has lost them: it may be another one by now. */
  lasting: Record<string, string>;
  /** Absent: it does not serve. */
  rollouts?: RolloutAsk;
}

/** What a write comes back with. */
interface WriteResult {
  /** The up-time of the fleet, in milliseconds. */
  up: number;
  /** Where it was asked for. */
  news?: RolloutNews;
}

const settingRows = (settings: Record<string, string>) =>
  Object.fromEntries(Object.entries(settings).map(([name, value]) => [`setting ${name}`, value]));

/** Adds the settings that are not there. */
async function keepSettings(tx: Connection, settings: Record<string, string>): Promise<void> {
  const text = "INSERT INTO ota_meta VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
  for (const row of Object.entries(settingRows(settings))) await tx.query(text, row);
}

/**
 * Puts back the rollouts that the store has lost. Who has the version is lost with them: those that
 * went on are halted, until the operator says so.
 */
async function keepRollouts(
  tx: Connection,
  known: readonly KnownRollout[],
  up: number,
  at: number,
): Promise<void> {
  const there = new Set((await readRollouts(tx)).map(({ id }) => id));
  const lost = known.filter(({ id }) => !there.has(id));
  for (const one of lost) {
    const { state, options } = one;
    const { progress, ...record } = await newRollout(tx, options, at);
    const wentOn = state !== "waiting" && isGoing(state);
    const reason = `the fleet's store is another one: who has ${options.version} is not known`;
    await writeRollout(tx, {
      ...{ ...record, ...one, progress: newProgress(up, progress.isFirst) },
      ...(wentOn && { state: "halted", reason }),
    });
  }
  if (lost.length > 0) await bumpRollouts(tx);
}

/** Devices that were heard, as they were and as they are. */
type Heard = Pick<RolloutMoment, "before" | "after">;

const NOTHING_HEARD: Heard & { events: number } = {
  events: 0,
  before: new Map(),
  after: new Map(),
};

/**
 * The reports without those that are late: see `TOGETHER`. That is told by the clock, which servers
 * have in common. Where only one writes, the order is right anyway, and the clock may jump.
 *
 * @param before what is kept of those devices
 */
function withoutLate(
  reports: readonly DeviceReport[],
  before: ReadonlyMap<string, DeviceRecord>,
  now: Pick<WriteMoment, "server" | "opened"> & Pick<StoreMeta, "up" | "batches">,
): readonly DeviceReport[] {
  // What wrote before this server began may be its own last run.
  const since = Math.max(now.up - TOGETHER, now.opened);
  const hasOthers = [...now.batches].some(([one, [, then]]) => one !== now.server && then > since);
  if (!hasOthers) return reports;
  return reports.filter(({ id, at }) => {
    const ahead = (before.get(id)?.last_seen ?? 0) - at;
    return ahead <= 0 || ahead >= TOGETHER;
  });
}

/** Applies reports to the devices that they are of. */
async function applyReports(
  tx: Connection,
  reports: readonly DeviceReport[],
  now: WriteMoment & StoreMeta,
): Promise<Heard & { events: number }> {
  const rows = await readRows(tx, [...new Set(reports.map(({ id }) => id))]);
  const before = new Map(rows.map((row) => [String(row["id"]), recordOf(row)]));
  const records = new Map<string, DeviceRecord>();
  const events: [string, FleetEvent][] = [];
  for (const report of withoutLate(reports, before, now)) {
    const { id, elapsed } = report;
    const then = { up: now.up - Math.max(0, now.elapsed - elapsed), silent: now.silent };
    const known = records.get(id) ?? before.get(id);
    if (known && then.up < known.seen_up - LATE) {
      // Another server has heard it since: it would seem to go back.
      records.set(id, { ...known, seen: known.seen + report.count });
      continue;
    }
    const after = applyReport(known, report, then);
    records.set(id, after.record);
    for (const event of after.events) events.push([id, event]);
  }
  await writeRecords(tx, [...records.values()], before);
  await writeEvents(tx, now.source, now.events, events);
  for (const [id, record] of records) {
    await trimHistory(tx, record, before.get(id)?.events ?? 0);
  }
  return { events: events.length, before, after: records };
}

/** Lets rollouts go on by what was heard, if there are any. */
async function writeRollouts(
  tx: Connection,
  { rollouts: ask, up, at, before, after, server }: WriteMoment & Heard & { up: number },
): Promise<RolloutNews | undefined> {
  // Most fleets have none: there is nothing to read or to tell then.
  if ((await readRevision(tx)) === 0) return ask && NO_ROLLOUTS;
  const records = await readRollouts(tx);
  let changes: RolloutChange[] = [];
  if (records.some(({ state }) => isGoing(state))) {
    const { placed = [], digests = {} } = ask ?? {};
    const moment = { placed, digests, up, at: at ?? Date.now(), before, after };
    changes = await advanceRollouts(tx, records, moment);
    if (changes.length > 0) await bumpRollouts(tx);
  }
  const steps = changes.filter(({ isStep }) => isStep).map(({ rollout }) => rollout);
  return ask && { ...(await rolloutNews(tx, records, server, ask)), steps };
}

/**
 * Applies reports, and lets the fleet's up-time go on. A batch that is in the store already changes
 * nothing: a write may be done although no answer came.
 *
 * Rollouts go on in the same transaction, by what was reported.
 *
 * @param isKnown whether the store has all that lasts
 */
async function writeBatch(
  tx: Connection,
  { number, reports }: ReportBatch,
  moment: WriteMoment,
  isKnown: boolean,
): Promise<WriteResult> {
  const { gained, since, server, at, settings } = moment;
  const meta = await readMeta(tx);
  // Servers that run at the same time do not add up: each one only knows how long it ran.
  const up = Math.round(since === null ? meta.up + gained : Math.max(meta.up, since + gained));
  const [last] = meta.batches.get(server) ?? [0];
  const isNew = reports.length > 0 && number > last;
  const now = { ...moment, ...meta, up };
  if (!isKnown) {
    await keepSettings(tx, moment.lasting);
    await keepRollouts(tx, moment.rollouts?.known ?? [], up, at ?? Date.now());
  }
  const { events, ...heard } = isNew ? await applyReports(tx, reports, now) : NOTHING_HEARD;
  await setMeta(tx, {
    ...{ up: `${up}`, events: `${meta.events + events}` },
    ...(isNew && { [`batch ${server}`]: `${number} ${up}` }),
    ...(at !== undefined && { "setting written": `${at}` }),
    ...settingRows(settings),
  });
  if (at !== undefined) await sampleVersions(tx, at, meta.sampled);
  for (const [other, [, then]] of meta.batches) {
    if (up - then < BATCH_MEMORY || other === server) continue;
    await tx.query("DELETE FROM ota_meta WHERE name = $1", [`batch ${other}`]);
  }
  const news = await writeRollouts(tx, { ...moment, up, ...heard });
  return { up, ...(news && { news }) };
}

// ──── Fleet store ─────────────────────────────────────────────────────────────────────────────────
// A database that is open, and what can be asked of it.

/** What is read of a store when it is opened. */
interface StoreGlance {
  /** The fleet's up-time. */
  up: number;
  served: FleetServed | undefined;
  /** See `readRevision`. */
  revision: number;
}

async function glance(db: Connection): Promise<StoreGlance> {
  const { up } = await readMeta(db);
  const revision = await readRevision(db);
  const text =
    "SELECT name, value FROM ota_meta WHERE name IN ('setting served', 'setting written')";
  const rows = await db.query(text);
  const values = Object.fromEntries(rows.map(({ name, value }) => [name, value]));
  const served = parseJSON(String(values["setting served"] ?? ""));
  if (!isObject(served)) return { up, revision, served: undefined };
  const { newest, silent } = served as unknown as FleetServed;
  return { up, revision, served: { written: Number(values["setting written"]), newest, silent } };
}

/** The fleet in a database that is open. */
class FleetStore {
  readonly #identity: string | undefined;
  /** Whether it has what lasts: see `WriteMoment`. */
  #isKnown = false;

  private constructor(
    private readonly place: StorePlace,
    private readonly db: Connection,
    private readonly maxDevices: number,
  ) {
    this.#identity = fileIdentity(place);
  }

  /** See `openStore`. */
  static async open(
    url: string,
    access: StoreAccess,
    maxDevices = MAX_DEVICES,
  ): Promise<FleetStore> {
    const place = storePlace(url);
    return new FleetStore(place, await openStore(place, access), maxDevices);
  }

  /** Whether its file was removed or replaced: what is written to it then is lost. */
  get isGone(): boolean {
    return fileIdentity(this.place) !== this.#identity;
  }

  async close(): Promise<void> {
    await this.db.close(1);
  }

  /** Runs a transaction that no other one that writes overlaps. */
  #transaction<T>(work: (tx: Connection) => Promise<T>): Promise<T> {
    return locked(this.db, work);
  }

  /** See `writeBatch`. */
  async write(batch: ReportBatch, moment: WriteMoment): Promise<WriteResult> {
    const result = await this.#transaction(async (tx) => {
      const written = await writeBatch(tx, batch, moment, this.#isKnown);
      if (batch.reports.length > 0) await evict(tx, this.maxDevices);
      return written;
    });
    this.#isKnown = true;
    return result;
  }

  async rolloutRevision(): Promise<number> {
    return await readRevision(this.db);
  }

  /** See `Fleet.rollouts`; this and what follows. */
  async rollouts(): Promise<Rollout[]> {
    const rollouts: Rollout[] = [];
    for (const record of await readRollouts(this.db)) {
      rollouts.push(await rolloutOf(this.db, record));
    }
    return rollouts;
  }

  async startRollout(options: RolloutOptions, at: number): Promise<Rollout> {
    return await this.#transaction((tx) => beginRollout(tx, options, at));
  }

  async changeRollout(
    which: Pick<RolloutOptions, "version" | "model">,
    action: RolloutAction,
    at: number,
    seen?: SeenRollout,
  ): Promise<Rollout | undefined> {
    return await this.#transaction((tx) => actOnRollout(tx, which, action, at, seen));
  }

  async rolloutTargets(options: RolloutOptions, at: number): Promise<RolloutTarget[]> {
    return await countTargets(this.db, options, await servedModels(this.db), at);
  }

  /** Sees to it that the store can be written. */
  async ready(): Promise<StoreGlance> {
    return await this.#transaction((tx) => glance(tx));
  }

  /** The same without waiting for those who write. */
  async look(): Promise<StoreGlance> {
    return await glance(this.db);
  }

  /** See `Fleet.summary`; this and what follows. */
  async summary(basis: StateBasis): Promise<FleetSummary> {
    return await summarize(this.db, basis);
  }

  async devices(filter: DeviceFilter, basis: StateBasis) {
    return await listDevices(this.db, await withModels(this.db, bounded(filter)), basis);
  }

  async urgent(filter: DeviceFilter, basis: StateBasis, found?: FoundIds) {
    return await listUrgent(this.db, bounded(filter), basis, found);
  }

  async search(filter: DeviceFilter, basis: StateBasis) {
    return await searchUrgent(this.db, bounded(filter), basis);
  }

  async overview(basis: StateBasis, now: number, span: FleetSpan | undefined) {
    const summary = await summarize(this.db, basis);
    const clusters = await readClusters(this.db, basis);
    const groups = await readGroups(this.db);
    return { summary, clusters, groups, ...(await readSamples(this.db, now, span)) };
  }

  async seen(now: number): Promise<number[]> {
    return await countSeen(this.db, now);
  }

  async device(id: string, basis: StateBasis) {
    return await findDevice(this.db, id, basis);
  }

  async edit(id: string, change: DeviceEdit, at: number): Promise<boolean> {
    return await this.#transaction((tx) => editDevice(tx, id, change, at));
  }

  async forget(id: string): Promise<boolean> {
    return await this.#transaction(async (tx) => (await removeDevices(tx, [id])) > 0);
  }

  async merge(file: string): Promise<FleetMerge> {
    if (fileIdentity(storePlace(file)) === this.#identity && this.#identity !== undefined) {
      throw new OTAError(`${file} is the fleet itself: there is nothing to merge`);
    }
    const other = await openOther(file);
    try {
      // Nobody else waits for this connection: the server beside it may take its time.
      await this.db.waitFor(STORE_PATIENCE);
      return await mergeStore(this.db, other, this.maxDevices);
    } finally {
      await other.close();
    }
  }

  async setting(name: string): Promise<string | undefined> {
    const text = "SELECT value FROM ota_meta WHERE name = $1";
    const [row] = await this.db.query(text, [`setting ${name}`]);
    return row ? String(row["value"]) : undefined;
  }

  async setSetting(name: string, value: string): Promise<void> {
    await this.#transaction((tx) => setMeta(tx, { [`setting ${name}`]: value }));
  }

  async swapSetting(name: string, from: string | undefined, to: string): Promise<boolean> {
    return await this.#transaction((tx) => swapMeta(tx, `setting ${name}`, from, to));
  }

  async settingOr(name: string, value: string): Promise<string> {
    return await this.#transaction(async (tx) => {
      await keepSettings(tx, { [name]: value });
      const [row] = await tx.query("SELECT value FROM ota_meta WHERE name = $1", [
        `setting ${name}`,
      ]);
      return String(row!["value"]);
    });
  }
}

// ──── Store thread ────────────────────────────────────────────────────────────────────────────────
// The database is used in a thread of its own: SQLite blocks the thread that calls it, for as long as
// the disk takes. A thread that hangs is ended, and another one takes its place.

/** Marks the thread of a fleet, to this file in it. */
const FLEET_WORKER = "ota.ts: fleet";

/** What can be asked of the thread. */
type StoreCalls = {
  [
    name in
      | "write"
      | "ready"
      | "look"
      | "summary"
      | "overview"
      | "seen"
      | "devices"
      | "urgent"
      | "search"
      | "device"
      | "edit"
      | "forget"
      | "merge"
      | "setting"
      | "setSetting"
      | "swapSetting"
      | "settingOr"
      | "rolloutRevision"
      | "rollouts"
      | "startRollout"
      | "changeRollout"
      | "rolloutTargets"
      | "close"
  ]: FleetStore[name];
};

/** A call on its way to the thread. */
interface StoreRequest {
  nth: number;
  name: keyof StoreCalls;
  args: unknown[];
}

/** What comes back. Errors lose what is ours on their way between threads. */
interface StoreReply {
  nth: number;
  result?: unknown;
  error?: { message: string; code: string | undefined; exitCode: 1 | 2 | 3 | undefined };
}

/** What the thread of a fleet is started with. */
interface StoreSettings {
  kind: typeof FLEET_WORKER;
  url: string;
  access: StoreAccess;
  maxDevices: number;
}

/** An error of the database, with its code. */
class StoreError extends Error {
  override name = "StoreError";
  constructor(
    message: string,
    readonly code: string | undefined,
  ) {
    super(message);
  }
}

/** The code of the error that one call is answered with when the file of a store is another one. */
const GONE = "GONE";

/** The end of the thread that the server uses. */
class StoreThread {
  readonly #port: { postMessage(request: StoreRequest): void };
  readonly #stop: () => void;
  readonly #calls = new Map<number, PromiseWithResolvers<unknown>>();
  #nth = 0;
  isEnded = false;

  constructor(settings: StoreSettings) {
    const settle = (reply: StoreReply) => this.#settle(reply);
    if (!canRunWorkers) {
      // Then it is this thread, too.
      const { port1, port2 } = new threads.MessageChannel();
      serveStore(port2, settings);
      this.#port = port1.on("message", settle);
      this.#stop = () => port1.close();
      return;
    }
    const worker = new threads.Worker(new URL(import.meta.url), { workerData: settings });
    worker.on("message", settle);
    worker.on("error", (error) => this.end(errorText(error)));
    worker.on("exit", () => this.end("the thread of the fleet has ended"));
    this.#port = worker;
    this.#stop = () => void worker.terminate().catch(() => {});
  }

  #settle({ nth, result, error }: StoreReply): void {
    const call = this.#calls.get(nth);
    this.#calls.delete(nth);
    if (!error) call?.resolve(result);
    else if (error.exitCode) call?.reject(new OTAError(error.message, error.exitCode));
    else call?.reject(new StoreError(error.message, error.code));
  }

  /** @param patience after which the thread counts as hanging, in milliseconds */
  async call<N extends keyof StoreCalls>(
    patience: number,
    name: N,
    ...args: Parameters<StoreCalls[N]>
  ): Promise<Awaited<ReturnType<StoreCalls[N]>>> {
    const nth = ++this.#nth;
    const call = Promise.withResolvers<unknown>();
    this.#calls.set(nth, call);
    const late = `no answer within ${Math.round(patience / 1000)} s`;
    const timer = setTimeout(() => this.end(late), patience);
    if (this.isEnded) this.end("the thread of the fleet has ended");
    else this.#port.postMessage({ nth, name, args });
    try {
      return (await call.promise) as Awaited<ReturnType<StoreCalls[N]>>;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends the thread, whatever it does; a transaction that it is in is undone. */
  end(why = "the fleet is closed"): void {
    this.isEnded = true;
    for (const call of this.#calls.values()) call.reject(new StoreError(why, "ENDED"));
    this.#calls.clear();
    this.#stop();
  }
}

/** As nice(1) has it: beside the server, a quarter to a third of a processor that is busy. */
const STORE_NICENESS = 5;

/** What the thread does. A connection that failed is made anew for the next call. */
function serveStore(port: threads.MessagePort, settings: StoreSettings): void {
  const { url, access, maxDevices } = settings;
  // Requests come first where there are more threads than processors. Linux has this for a thread.
  if (process.platform === "linux" && canRunWorkers) {
    ignoreErrors(() => setPriority(STORE_NICENESS));
  }
  let store: Promise<FleetStore> | undefined;
  const answer = async ({ nth, name, args }: StoreRequest): Promise<StoreReply> => {
    const opened = (store ??= FleetStore.open(url, access, maxDevices));
    try {
      const one = await opened;
      if (one.isGone) throw new StoreError("its file was removed or replaced", GONE);
      const call = one[name] as (...args: unknown[]) => Promise<unknown>;
      return { nth, result: await call.apply(one, args) };
    } catch (error) {
      // What is kept in memory is gone when its connection is.
      if (!(error instanceof OTAError) && url !== ":memory:" && store === opened) {
        store = undefined;
        void opened.then((one) => one.close()).catch(() => {});
      }
      const exitCode = error instanceof OTAError ? error.exitCode : undefined;
      return { nth, error: { message: errorText(error), code: errorCode(error), exitCode } };
    }
  };
  port.on("message", (request: StoreRequest) => {
    void answer(request).then((reply) => port.postMessage(reply));
  });
  port.on("close", () => void store?.then((one) => one.close()).catch(() => {}));
}

// ──── Fleet options ───────────────────────────────────────────────────────────────────────────────
// What a fleet is opened with, and its limits.

/** What `Fleet.open` needs. */
export interface FleetOptions {
  /** The path of a SQLite file, `:memory:`, or `postgres://…`. */
  url: string;
  /**
   * Whether this is a server: its time counts as up-time, and a store that is away is waited for; a
   * file that cannot be used is left alone, and the fleet kept in memory. Else all that is an error.
   */
  serving?: boolean;
  /** Whether the store has to be there already; else it is made. */
  existing?: boolean;
  /** Silence after an offer that is usual, in seconds; as its servers say, else 3600. */
  silent?: number;
  /** The newest releases; absent: as its servers say, else every device is on the newest. */
  newest?: () => NewestReleases;
  /** What its rollouts are of; absent: they do not go on by this server. */
  releases?: () => Releases;
  /** Whether versions need a rollout to be offered; `Admission.staged` are those that do not. */
  staged?: boolean;
  /** Called with one line for the operator; and with one for the log. */
  warn?: (line: string) => void;
  log?: (line: string) => void;
  clock?: FleetClock;
  /** Milliseconds between two writes; 1000. With 0, only `flush` writes. */
  tick?: number;
  /** Reports that wait in memory at most; 100,000. */
  maxWaiting?: number;
  /** Devices at most; 1,000,000. */
  maxDevices?: number;
}

/** Limits of what waits, and for how long. */
const FLEET = {
  silent: 3600,
  tick: 1000,
  waiting: 100_000,
  /** Reports in one transaction. */
  batch: 10_000,
  /** Milliseconds between two tries while the store is away, at most. */
  pause: 60_000,
  /** Milliseconds between two writes of the up-time when nothing else is written. */
  idle: 60_000,
  /** Milliseconds for a write, a read, a merge; and for the last write. */
  write: 15_000,
  read: 5000,
  merge: 600_000,
  last: 2000,
  /** Milliseconds for which a summary is as good as new. */
  summary: 1000,
  /** The same for a count of when more than a few devices were heard, and for what a search finds. */
  few: 10_000,
  seen: 15_000,
  search: 10_000,
  /** Answers that are kept for so long at most. */
  answers: 100,
};

/** Whether a store is a file that has something in it. */
function isStoreThere(url: string): boolean {
  const { file } = storePlace(url);
  try {
    return file !== undefined && fs.statSync(file).size > 0;
  } catch (error) {
    return !isMissing(error);
  }
}

// ──── Place lease ──────────────────────────────────────────────────────────────────────────────────
// Whether this server gives places of rollouts away: see "Rollout places".

/** How long a lease counts after it was asked for, and until others may take it, in milliseconds. */
const LEASE = { counts: 5000, expires: 30_000 };
/** How long a server that nobody asks keeps a lease that another one wants, in milliseconds. */
const LEASE_IDLE = 10_000;

/** The lease, as a server knows it. */
class PlaceLease {
  #text = "";
  /** When this text was first seen. */
  #seen = 0;
  #until = -Infinity;
  #isMine = false;
  #isWanted = false;
  /** When a device last asked for a place. */
  #asked = -Infinity;

  constructor(private readonly clock: FleetClock) {}

  /** What to ask the store for. @param canUse whether there is something to give away */
  ask(canUse: boolean): Pick<RolloutAsk, "wants" | "expired"> {
    const now = this.clock.elapsed();
    const isIdle = this.#isWanted && now - this.#asked > LEASE_IDLE;
    const wants = canUse && !isIdle;
    // It is given up before anyone can hear of it.
    if (!wants) this.#until = -Infinity;
    const isOver = this.#text !== "" && !this.#isMine && now - this.#seen >= LEASE.expires;
    return { wants, expired: isOver ? this.#text : null };
  }

  /** @param asked when it was asked for, by `FleetClock.elapsed` */
  hear({ lease, isMine, isWanted }: Omit<RolloutNews, "views">, wants: boolean, asked: number) {
    if (lease !== this.#text) this.#seen = this.clock.elapsed();
    this.#text = lease;
    this.#until = isMine && wants ? asked + LEASE.counts : -Infinity;
    this.#isMine = isMine;
    this.#isWanted = isWanted;
  }

  get isHeld(): boolean {
    return this.clock.elapsed() < this.#until;
  }

  /** Says that a device asks for a place. */
  use(): void {
    this.#asked = this.clock.elapsed();
  }
}

// ──── Admission ───────────────────────────────────────────────────────────────────────────────────
// Whether a device that asks may have a version: a look at what is in memory. What that is comes with
// each write to the store; while the store is away, what was known last stands.

/** A rollout in memory. */
interface AdmittingRollout extends RolloutView {
  /** Devices that were offered it and are not proven. */
  offered: Set<string>;
  opening: TimeWindow | undefined;
}

/** A device that asks. */
interface Asking {
  id: string;
  /** The model whose root it asks; empty for the root itself. */
  of: string;
  model: string | undefined;
  query: ManifestQuery;
  /** Whether it can be given a place: what only reports gets nothing. */
  isGet: boolean;
}

/** The rollouts of a server. */
class Admission {
  /** Whether it is known which rollouts there are. */
  isRead = false;
  /** Whether the store that has them cannot be used. */
  isBlind = false;
  /** Whether this server stops: it gives no places away any more. */
  isOver = false;
  /** Keys of the versions that need no rollout; as long as that is not known, all do. */
  staged: ReadonlySet<string> | undefined;
  /** See `RolloutNews`; -1: never read. */
  revision = -1;
  #labels = "";
  #labelled = new Map<string, Set<string>>();
  #rollouts = new Map<string, AdmittingRollout>();
  /** By the model whose root it is, in lower case, and `versionKey`. */
  #byVersion = new Map<string, Map<string, AdmittingRollout>>();
  /** Given a place, and not in the store yet. */
  #placed: [rollout: string, device: string][] = [];
  readonly #lease: PlaceLease;

  /**
   * @param releases those of the server, to see what it has
   * @param isStaged see `VersionStaging`
   */
  constructor(
    private readonly clock: FleetClock,
    private readonly releases: (() => Releases) | undefined,
    readonly isStaged: boolean,
  ) {
    this.#lease = new PlaceLease(clock);
  }

  /** Whether a version is offered to nobody, since it needs a rollout and has none. */
  isHeld(release: Pick<RolloutOptions, "version" | "model">): boolean {
    if (!this.isStaged) return false;
    const rollouts = this.#byVersion.get((release.model ?? "").toLowerCase());
    if (rollouts?.has(versionKey(release.version))) return false;
    return this.staged?.has(stagedKey(release)) !== true;
  }

  /** Whether each second changes something, although no device reports. */
  get isActive(): boolean {
    return [...this.#rollouts.values()].some(({ state, options }) => {
      return (
        state === "running" ||
        (state === "waiting" && rolloutDigest(options, this.releases?.()) !== null)
      );
    });
  }

  /** Says that there has never been a rollout. */
  begin(): void {
    this.isRead = true;
    this.revision = 0;
  }

  /** What to say and to ask with the next write. */
  ask(): RolloutAsk {
    const digests: Record<string, string> = {};
    const seqs: Record<string, number> = {};
    const counts: Record<string, number> = {};
    const known: KnownRollout[] = [];
    for (const rollout of this.#rollouts.values()) {
      const { id, state, options, digest, created } = rollout;
      seqs[id] = rollout.seq;
      if (rollout.numbers) counts[id] = rollout.known;
      known.push({ id, state, options, digest, created });
      const found = rolloutDigest(options, this.releases?.());
      if (found !== null) digests[id] = found;
    }
    const read = { revision: this.revision, labels: this.#labels, seqs, counts };
    const lease = this.#lease.ask(this.isActive && !this.isOver);
    return { placed: [...this.#placed], digests, known, ...read, ...lease };
  }

  /** @param asked when it was asked, by `FleetClock.elapsed` */
  hear({ views, ...news }: RolloutNews, { placed, wants }: RolloutAsk, asked: number): void {
    this.isRead = true;
    this.revision = news.revision;
    this.#labels = news.labels;
    if (news.labelled) {
      const sets = Object.entries(news.labelled).map(
        ([pair, ids]) => [pair, new Set(ids)] as const,
      );
      this.#labelled = new Map(sets);
    }
    this.#placed = this.#placed.slice(placed.length);
    const before = this.#rollouts;
    this.#rollouts = new Map(views.map((view) => [view.id, this.#admitting(view, before)]));
    this.#byVersion = new Map();
    for (const rollout of this.#rollouts.values()) {
      const { version, model } = rollout.options;
      const of = model?.toLowerCase() ?? "";
      const known = this.#byVersion.get(of) ?? new Map<string, AdmittingRollout>();
      this.#byVersion.set(of, known.set(versionKey(version), rollout));
    }
    this.#lease.hear(news, wants, asked);
  }

  #admitting(view: RolloutView, before: ReadonlyMap<string, AdmittingRollout>): AdmittingRollout {
    const earlier = before.get(view.id);
    // A store that is behind is another one: all that it knows is new.
    const isBehind = earlier !== undefined && view.seq < earlier.seq;
    const known = isBehind ? undefined : earlier;
    const seq = isBehind ? 0 : view.seq;
    const offered = known?.offered ?? new Set<string>();
    for (const [device, isOffered] of view.changed) {
      if (isOffered) offered.add(device);
      else offered.delete(device);
    }
    // Those that were given a place since the store was asked are not counted in it.
    const placed = this.#placed.filter(([rollout]) => rollout === view.id);
    for (const [, device] of placed) offered.add(device);
    const free = Math.max(0, view.free - placed.length);
    const { window } = view.options;
    const isSame = known?.options.window === window;
    const opening = window === null ? undefined : parseWindow(window);
    const numbers = view.numbers ?? earlier?.numbers;
    return {
      ...{ ...view, seq, changed: [], offered, free, opening: isSame ? known.opening : opening },
      ...(numbers && { numbers }),
    };
  }

  /** Whether a rollout counts on a device: one that was first heard since gets it at its end. */
  knows(rollout: string, device: string): boolean {
    const numbers = this.#rollouts.get(rollout)?.numbers;
    return numbers === undefined || hasNumber(numbers, rolloutNumber(rollout, device));
  }

  /**
   * The newest version and image that a device may have. A place is taken by asking.
   *
   * @returns `undefined`: all that is offered
   */
  newestFor(
    query: ManifestQuery,
    address: string,
    root: ReleaseRoot,
    isGet: boolean,
  ): NewestItems | undefined {
    const isKnown = this.isRead && !this.isBlind && !this.isStaged;
    if (isKnown && this.#byVersion.size === 0) return undefined;
    const rollouts = this.#byVersion.get(root.model.toLowerCase());
    if (isKnown && !rollouts) return undefined;
    const id = deviceId(query, address);
    const model = root.model || (query.model ?? query.sysname);
    const asking = { id, of: root.model, model, query, isGet };
    const current = query.current_ver ?? "";
    // What decides below asks for files first: who may have these may have the image as well.
    const version = this.#newest(root.versions, rollouts, current, asking);
    const flashed = query.firmware_ver ?? current;
    // Who does not say what it runs is not flashed for the image alone: no place is given for it.
    const mayFlash = query.firmware_ver !== undefined || root.versions.length === 0;
    const image = this.#newest(root.firmware, rollouts, flashed, {
      ...asking,
      isGet: isGet && mayFlash,
    });
    return { version, image };
  }

  #newest<T extends { name: string; version: LooseVersion }>(
    items: readonly T[],
    rollouts: ReadonlyMap<string, AdmittingRollout> | undefined,
    current: string,
    asking: Asking,
  ): T | undefined {
    return items.findLast(({ name, version }) => {
      // What it has it keeps, and older ones are of no interest to it.
      if (version.compare(current) <= 0) return true;
      // Any version may be one that was halted: until that is known, devices stay as they are.
      if (!this.isRead || this.isBlind) return false;
      const rollout = rollouts?.get(versionKey(name));
      if (rollout) return this.#admits(rollout, asking);
      return !this.isHeld({ version: name, model: asking.of });
    });
  }

  /** Whether a device that is not on the version of a rollout may have it. */
  #admits(rollout: AdmittingRollout, asking: Asking): boolean {
    const { id, state, options, digest, offered, opening, share } = rollout;
    if (state === "done") return this.#isFor(rollout, asking);
    if (state !== "running" && state !== "paused") return false;
    if (asking.id.startsWith(BY_ADDRESS)) return false;
    const isOffered = offered.has(asking.id);
    if (!isOffered && (state === "paused" || !asking.isGet)) return false;
    // Nobody gets what it is not about.
    if (digest === null || digest !== rolloutDigest(options, this.releases?.())) return false;
    if (isOffered) return true;
    if (opening && !isOpen(opening, this.clock.now())) return false;
    if (!this.#isFor(rollout, asking)) return false;
    const { isHeld } = this.#lease;
    if (isHeld && rollout.free === 0) {
      this.#lease.use();
      return false;
    }
    const number = rolloutNumber(id, asking.id);
    // New ones, and ids that somebody made up, get it when it is done.
    if (rollout.numbers && !hasNumber(rollout.numbers, number)) return false;
    if (share < 1 && number >= share && !this.#has(CANARY, asking.id)) return false;
    this.#lease.use();
    if (!isHeld) return false;
    rollout.free--;
    offered.add(asking.id);
    this.#placed.push([id, asking.id]);
    return true;
  }

  #has(pair: string, device: string): boolean {
    return this.#labelled.get(pair)?.has(device) === true;
  }

  #isFor({ options }: AdmittingRollout, { id, model, query }: Asking): boolean {
    const device = { model: model ?? null, version: query.current_ver ?? null };
    return meets(options.only, device, (key, value) => this.#has(`${key}=${value}`, id));
  }
}

// ──── Fleet writer ────────────────────────────────────────────────────────────────────────────────
// Reports from memory to the store, once a second, and what happens when it is away.

/** Writes reports, and calls the thread for others. */
class FleetWriter {
  readonly waiting: WaitingReports;
  readonly admission: Admission;
  readonly silent: number;
  readonly clock: FleetClock;
  /** In messages. */
  name: string;
  readonly #options: FleetOptions;
  readonly #server = crypto.randomUUID();
  readonly #opened: number;
  #settings: StoreSettings;
  #thread: StoreThread;
  /** The fleet's up-time, and `elapsed` then. */
  #base: { up: number; elapsed: number } | undefined;
  #lastWrite: number;
  #writing: Promise<void> = Promise.resolve();
  /** Tries in a row that failed. */
  #failures = 0;
  #timer: Timer | undefined;
  /** The newest releases, as the store has them from us. */
  #told = "";
  /** The fleet's up-time when this server began. */
  #upAtFirst = 0;
  /** See `WriteMoment`. */
  readonly lasting: Record<string, string> = {};
  /** As it was when the store was opened. */
  served: FleetServed | undefined;
  isClosed = false;

  constructor(options: FleetOptions) {
    const { url, clock, silent = FLEET.silent } = options;
    const { maxWaiting = FLEET.waiting, maxDevices = MAX_DEVICES, existing = false } = options;
    this.#options = options;
    this.clock = clock ?? { now: () => Date.now(), elapsed: () => performance.now() };
    this.silent = 1000 * silent;
    this.waiting = new WaitingReports(maxWaiting);
    this.admission = new Admission(this.clock, options.releases, options.staged === true);
    this.#opened = this.#lastWrite = this.clock.elapsed();
    this.name = storePlace(url).name;
    const access = existing ? "keep" : "make";
    this.#settings = { kind: FLEET_WORKER, url, access, maxDevices };
    this.#thread = new StoreThread(this.#settings);
  }

  /** Opens the store: see `Fleet.open`. */
  async open(): Promise<void> {
    const { serving = false, warn } = this.#options;
    try {
      await this.#ready();
    } catch (error) {
      if (error instanceof OTAError) throw error;
      const why = `the fleet's store ${this.name} cannot be used (${errorText(error)})`;
      if (!serving) throw new OTAError(`${why}; --fleet names another one`, 1, { cause: error });
      if (isUseless(error)) {
        warn?.(`${why}: it is left alone, and devices are forgotten when this server stops`);
        this.#thread.end();
        // A fleet that was kept there may have had rollouts.
        this.admission.isBlind = isStoreThere(this.#settings.url);
        this.#settings = { ...this.#settings, url: ":memory:" };
        this.name = "memory";
        await this.#ready();
      } else {
        this.#failures = 1;
        warn?.(`${why}: devices are kept in memory until it can`);
      }
    }
    this.#plan();
  }

  async #ready(): Promise<void> {
    const how = this.#options.existing ? "look" : "ready";
    const { up, served, revision } = await this.call(FLEET.read, how);
    if (!this.#base) this.#upAtFirst = up;
    this.#base ??= { up, elapsed: this.#opened };
    this.served = served;
    // The first device that asks must not get what a rollout keeps from it.
    if (revision === 0) this.admission.begin();
    else if (this.#options.serving) await this.#write();
  }

  /** The fleet's up-time, as far as is known here. */
  get up(): number {
    return (this.#base?.up ?? 0) + this.#gained(this.clock.elapsed());
  }

  /** For how long this server was up since the store last knew. */
  #gained(elapsed: number): number {
    if (!this.#options.serving) return 0;
    return Math.max(0, elapsed - (this.#base?.elapsed ?? this.#opened));
  }

  /**
   * Calls the thread, or one that takes its place.
   *
   * @param patience in milliseconds, after which the thread is ended
   */
  async call<N extends keyof StoreCalls>(
    patience: number,
    name: N,
    ...args: Parameters<StoreCalls[N]>
  ): Promise<Awaited<ReturnType<StoreCalls[N]>>> {
    if (this.#thread.isEnded && !this.isClosed) this.#thread = new StoreThread(this.#settings);
    try {
      return await this.#thread.call(patience, name, ...args);
    } catch (error) {
      // The next call makes it anew, and nobody after this one hears of it.
      if (errorCode(error) === GONE) this.#fail(error);
      throw error;
    }
  }

  /** Writes all that waits. Rejects when that is not possible now. */
  async flush(): Promise<void> {
    do {
      const write = this.#writing.then(() => this.#write());
      this.#writing = write.catch(() => {});
      await write;
    } while (this.waiting.size > 0);
  }

  async #write(): Promise<void> {
    if (this.waiting.size === 0 && !this.#options.serving) return;
    const batch = this.waiting.batch(FLEET.batch);
    const elapsed = this.clock.elapsed();
    const { silent } = this;
    const { serving, newest } = this.#options;
    const told = JSON.stringify(newest?.() ?? "");
    if (serving && newest) this.lasting["served"] = JSON.stringify({ newest: newest(), silent });
    const { served = "" } = this.lasting;
    const rollouts = serving ? this.admission.ask() : undefined;
    const { up, news } = await this.call(FLEET.write, "write", batch, {
      server: this.#server,
      gained: this.#gained(elapsed),
      since: this.#base?.up ?? null,
      ...{ elapsed, silent },
      ...(serving && { at: this.clock.now() }),
      opened: this.#upAtFirst,
      // Of servers that differ, the one whose releases changed last is right.
      settings: served && told !== this.#told ? { served } : {},
      lasting: this.lasting,
      ...(rollouts && { rollouts }),
    });
    if (rollouts && news) {
      this.admission.hear(news, rollouts, elapsed);
      for (const rollout of news.steps) this.#tellStep(rollout);
    }
    this.#told = told;
    this.waiting.written();
    this.#base = { up, elapsed };
    this.#lastWrite = elapsed;
  }

  /** A halt is worth a warning; of several servers, the one that took the step says it. */
  #tellStep(rollout: Rollout): void {
    const text = rolloutText(rollout);
    if (rollout.state === "halted") this.#options.warn?.(`the rollout of ${text}`);
    else this.#options.log?.(`rollout  ${text}`);
  }

  #plan(): void {
    const { tick = FLEET.tick } = this.#options;
    if (tick === 0 || this.isClosed) return;
    const pause = Math.min(tick * 2 ** this.#failures, Math.max(tick, FLEET.pause));
    this.#timer = setTimeout(() => void this.#tick(), pause);
  }

  async #tick(): Promise<void> {
    const { warn, serving, newest } = this.#options;
    const isLongAgo = this.clock.elapsed() - this.#lastWrite >= FLEET.idle;
    const isTold = this.#told === JSON.stringify(newest?.() ?? "");
    const isDue = serving && (isLongAgo || !isTold || this.admission.isActive);
    try {
      const mustWrite = this.waiting.size > 0 || isDue || this.#failures > 0;
      // That look may fail, too.
      if (mustWrite || (await this.#areRolloutsOther()) || this.#failures > 0) await this.flush();
      if (this.#failures > 0) {
        const { dropped } = this.waiting;
        const lost = dropped > 0 ? `; ${dropped} reports were lost so far` : "";
        warn?.(`the fleet's store ${this.name} is written again${lost}`);
      }
      this.#failures = 0;
    } catch (error) {
      if (errorCode(error) !== GONE) this.#fail(error);
    }
    this.#plan();
  }

  /** Counts a failure, and says the first one. */
  #fail(error: unknown): void {
    if (this.#failures++ > 0 || this.isClosed) return;
    const { warn, maxWaiting = FLEET.waiting } = this.#options;
    const what = `the fleet's store ${this.name} cannot be written (${errorText(error)})`;
    warn?.(`${what}: up to ${maxWaiting} reports wait in memory until it can`);
  }

  /** Whether somebody did something with rollouts since they were read. */
  async #areRolloutsOther(): Promise<boolean> {
    if (!this.#options.serving) return false;
    // A store that is away is written when there is something to write, and that is said then.
    const revision = await this.call(FLEET.read, "rolloutRevision").catch(() => undefined);
    return revision !== undefined && revision !== this.admission.revision;
  }

  async #finish(): Promise<void> {
    this.admission.isOver = true;
    await this.flush();
    // A SQLite file is then whole without its `-wal`, and can be carried to another fleet.
    if (this.#base) await this.call(FLEET.last, "close");
  }

  /** Writes what waits, once, within two seconds; and ends. */
  async close(): Promise<void> {
    if (this.isClosed) return;
    this.isClosed = true;
    clearTimeout(this.#timer);
    const late = Promise.withResolvers<void>();
    const timer = setTimeout(late.resolve, FLEET.last);
    await Promise.race([this.#finish().catch(() => {}), late.promise]);
    clearTimeout(timer);
    const { size } = this.waiting;
    if (size > 0) this.#options.warn?.(`${size} reports of the fleet could not be written`);
    this.#thread.end();
  }
}

// ──── Fleet questions ────────────────────────────────────────────────────────────────────────────
// How the thread is asked for somebody who waits, and what need not be asked again.

/** Calls the thread, and again while another process writes. @throws {OTAError} exit code 1 */
async function askStore<N extends keyof StoreCalls>(
  writer: FleetWriter,
  name: N,
  ...args: Parameters<StoreCalls[N]>
): Promise<Awaited<ReturnType<StoreCalls[N]>>> {
  const patience = name === "merge" ? FLEET.merge : FLEET.read;
  const end = performance.now() + FLEET.read;
  for (;;) {
    try {
      return await writer.call(patience, name, ...args);
    } catch (error) {
      if (error instanceof OTAError) throw error;
      // SQLite waits for a second only.
      const isBusy = errorCode(error)?.startsWith("SQLITE_BUSY");
      if (isBusy && name !== "merge" && performance.now() < end) continue;
      const what = `the fleet's store ${writer.name} does not answer (${errorText(error)})`;
      const remedy = isUseless(error) ? "" : "; try again";
      throw new OTAError(what + remedy, 1, { cause: error });
    }
  }
}

/** Answers that are as good as new for a while, however many ask. */
class RecentAnswers {
  readonly #answers = new Map<string, { at: number; of: Promise<unknown> }>();

  constructor(private readonly clock: FleetClock) {}

  /** An answer that was given lately, or a new one. @param patience in milliseconds */
  async get<T>(name: string, patience: number, ask: () => Promise<T>): Promise<T> {
    const at = this.clock.elapsed();
    const known = this.#answers.get(name);
    if (known && at - known.at < patience) return (await known.of) as T;
    const asked = { at, of: ask() };
    // The oldest stands first.
    this.#answers.delete(name);
    this.#answers.set(name, asked);
    const [oldest] = this.#answers.keys();
    if (this.#answers.size > FLEET.answers) this.#answers.delete(oldest!);
    asked.of.catch(() => {
      if (this.#answers.get(name) === asked) this.#answers.delete(name);
    });
    return await asked.of;
  }

  /** Something has changed that whoever did it wants to see. */
  forget(): void {
    this.#answers.clear();
  }
}

/** A summary of the store, with its time by the clock. */
function timed(
  summary: FleetSummary,
  { up, clock, served }: FleetWriter,
  { serving }: FleetOptions,
): FleetSummary {
  // Beside a server, what is known of the time is what it wrote last.
  const now = serving ? clock.now() : (served?.written ?? clock.now());
  const { silent_at: until } = summary;
  return { ...summary, silent_at: until === null ? null : Math.round(now + until - up) };
}

// ──── Fleet ───────────────────────────────────────────────────────────────────────────────────────
// What the server and the commands use.

/**
 * The devices of a server, or of several on one PostgreSQL.
 *
 * @example
 * await using fleet = await Fleet.open({ url: ".fleet.db" });
 * console.log(await fleet.summary());
 */
export class Fleet implements AsyncDisposable {
  readonly #options: FleetOptions;
  readonly #writer: FleetWriter;
  readonly #recent: RecentAnswers;

  private constructor(options: FleetOptions) {
    this.#options = options;
    this.#writer = new FleetWriter(options);
    this.#recent = new RecentAnswers(this.#writer.clock);
  }

  /**
   * Opens a fleet.
   *
   * @throws {OTAError} exit code 1 when a newer tool wrote the store or, unless `serving`, when it
   *   cannot be used; 2 when `url` is wrong
   */
  static async open(options: FleetOptions): Promise<Fleet> {
    const fleet = new Fleet(options);
    try {
      await fleet.#writer.open();
      return fleet;
    } catch (error) {
      await fleet[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** In words, without a password: a path, an address, or `memory`. */
  get place(): string {
    return this.#writer.name;
  }

  /** What servers had left in the store when it was opened; `undefined` when none has served yet. */
  get served(): FleetServed | undefined {
    return this.#writer.served;
  }

  /** By the fleet's clock, in milliseconds since 1970. */
  get now(): number {
    return this.#writer.clock.now();
  }

  /** How many reports went before they could be written. */
  get dropped(): number {
    return this.#writer.waiting.dropped;
  }

  /** Takes down what a contact says of a device. Never throws; written within a second. */
  note(contact: Contact): void {
    try {
      const { clock, waiting, isClosed } = this.#writer;
      const report = isClosed ? undefined : reportOf(contact, clock.now(), clock.elapsed());
      if (report) waiting.add(report);
    } catch (error) {
      this.#options.warn?.(`the fleet missed a report: ${errorText(error)}`);
    }
  }

  /** Writes what waits. Rejects when that is not possible now. */
  async flush(): Promise<void> {
    await this.#writer.flush();
  }

  /** What states depend on now. */
  get #basis(): StateBasis {
    const { up, served, silent } = this.#writer;
    const newest = this.#options.newest?.() ?? served?.newest ?? { version: null, firmware: null };
    return { newest, up, silent: this.#options.silent ? silent : (served?.silent ?? silent) };
  }

  /** See `askStore`. */
  #ask<N extends keyof StoreCalls>(name: N, ...args: Parameters<StoreCalls[N]>) {
    return askStore(this.#writer, name, ...args);
  }

  /** Counts the devices; up to a second old. */
  async summary(): Promise<FleetSummary> {
    const summary = this.#recent.get("summary", FLEET.summary, () => {
      return this.#ask("summary", this.#basis);
    });
    return timed(await summary, this.#writer, this.#options);
  }

  /**
   * What a page shows at one look; up to a second old, but for `seen` of many devices, up to 15.
   *
   * @param span absent: one that has all there is, but no more than a week
   */
  async overview(span?: FleetSpan): Promise<FleetOverview> {
    const { now } = this;
    const found = await this.#recent.get(`overview ${span}`, FLEET.summary, () => {
      return this.#ask("overview", this.#basis, now, span);
    });
    const patience = found.summary.devices > FLEET.few ? FLEET.seen : FLEET.summary;
    const seen = await this.#recent.get("seen", patience, () => this.#ask("seen", now));
    return { ...found, summary: timed(found.summary, this.#writer, this.#options), seen };
  }

  /**
   * Lists devices: what needs a person first, then in the order of their ids; `after` is no id.
   * Which ones a search finds is up to ten seconds old.
   */
  async urgent(filter: DeviceFilter = {}): Promise<DevicePage> {
    if (!filter.q) return await this.#ask("urgent", filter, this.#basis);
    const search = `search ${JSON.stringify(filter)}`;
    const found = await this.#recent.get(search, FLEET.search, () => {
      return this.#ask("search", filter, this.#basis);
    });
    return await this.#ask("urgent", filter, this.#basis, found);
  }

  /** Lists devices in the order of their ids. */
  async devices(filter: DeviceFilter = {}): Promise<DevicePage> {
    return await this.#ask("devices", filter, this.#basis);
  }

  /** A device and what happened to it; `undefined` when it is not known. */
  async device(id: string): Promise<DeviceDetails | undefined> {
    return await this.#ask("device", id, this.#basis);
  }

  /**
   * Names and labels a device; `null` removes.
   *
   * @returns whether the device is known
   * @throws {OTAError} exit code 2 when a text is too long or has control characters
   */
  async edit(id: string, change: DeviceEdit): Promise<boolean> {
    checkEdit(change);
    const edited = this.#ask("edit", id, change, this.now);
    return await edited.finally(() => this.#recent.forget());
  }

  /** Forgets a device and its history. @returns whether it was known */
  async forget(id: string): Promise<boolean> {
    return await this.#ask("forget", id);
  }

  /**
   * Adds what another SQLite store knows.
   *
   * @throws {OTAError} when the file is no store, a newer tool's, or this one
   */
  async merge(file: string): Promise<FleetMerge> {
    return await this.#ask("merge", resolve(file));
  }

  /**
   * The newest version and image that a device may have by the rollouts of the fleet; by asking, it
   * gets a place if there is one for it.
   *
   * @returns `undefined`: all that is offered
   */
  newestFor(
    contact: Pick<Contact, "query" | "address" | "method">,
    root: ReleaseRoot,
  ): NewestItems | undefined {
    const { query, address, method } = contact;
    return this.#writer.admission.newestFor(query, address, root, method === "GET");
  }

  /** What this server knows of rollouts. */
  get admission(): Admission {
    return this.#writer.admission;
  }

  /** All rollouts, the one that was begun last first. */
  async rollouts(): Promise<Rollout[]> {
    return await this.#ask("rollouts");
  }

  /**
   * Begins a rollout, before or after its version is in the root.
   *
   * @throws {OTAError} exit code 1 where one of that version and model is not over; 2 where no
   *   rollout can be like that
   */
  async startRollout(options: RolloutOptions): Promise<Rollout> {
    checkRollout(options);
    return await this.#ask("startRollout", options, this.now);
  }

  /**
   * Does something with the rollout of a version that was begun last.
   *
   * @param seen what the operator saw of it; absent: that does not matter
   * @returns the rollout after that; `undefined` when there is none
   * @throws {OTAError} exit code 1 where its state does not allow it, or it is not what was seen
   */
  async changeRollout(
    version: string,
    model: string | null,
    action: RolloutAction,
    seen?: SeenRollout,
  ): Promise<Rollout | undefined> {
    const at = this.now;
    return await this.#ask("changeRollout", { version, model }, action, at, seen);
  }

  /** The devices that a rollout would reach, by model and by the version they are on; most first. */
  async rolloutTargets(options: RolloutOptions): Promise<RolloutTarget[]> {
    checkRollout(options);
    return await this.#ask("rolloutTargets", options, this.now);
  }

  /** What was kept under a name; for all servers of the fleet. */
  async setting(name: string): Promise<string | undefined> {
    return await this.#ask("setting", name);
  }

  async setSetting(name: string, value: string): Promise<void> {
    await this.#ask("setSetting", name, value);
  }

  /** Changes what is kept under a name, unless another server was first. @returns whether it did */
  async swapSetting(name: string, from: string | undefined, to: string): Promise<boolean> {
    return await this.#ask("swapSetting", name, from, to);
  }

  /**
   * What is kept under a name: this value, unless another server was first. A server puts it back
   * where the store has lost it.
   */
  async settingOr(name: string, value: string): Promise<string> {
    const kept = await this.#ask("settingOr", name, value);
    this.#writer.lasting[name] = kept;
    return kept;
  }

  /** Writes what waits, within two seconds, and ends. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writer.close();
  }
}

// ──── Fleet words ────────────────────────────────────────────────────────────────────────────────
// What is said of devices to people, on a terminal and on the page. It comes from strangers, or from
// the file of another van.

/** What a terminal might obey, or not show: controls, directions, separators of lines. */
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** Text for people: as it is, but for what a terminal might obey, and for what nobody sees. */
function shown(text: string): string {
  return text.replace(UNSEEN, (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`);
}

/** The end of a minute that has begun: nothing that is to come by then comes before. */
function wholeMinute(at: number): number {
  return 60_000 * Math.ceil(at / 60_000);
}

/** How long ago something was: `2 min ago`. */
function agoText(at: number, now: number): string {
  const seconds = Math.round(Math.abs(now - at) / 1000);
  const [unit, size] =
    seconds < 60 ? ["s", 1] : seconds < 3600 ? ["min", 60] : seconds < 172_800 ? ["h", 3600] : [];
  const amount = unit
    ? `${Math.floor(seconds / size!)} ${unit}`
    : `${Math.floor(seconds / 86_400)} days`;
  if (seconds < 1) return "just now";
  // By the clock of another server, or one that was set back.
  return at > now ? `in ${amount}` : `${amount} ago`;
}

/** A time that a machine reads, and people can. */
function isoText(at: number): string {
  const date = new Date(at);
  return Number.isNaN(date.getTime()) ? "" : date.toISOString();
}

/** What a device is on; a board may only tell its firmware. */
function versionText({ version, firmware }: Pick<FleetDevice, "version" | "firmware">): string {
  return shown(version ?? (firmware === null ? "-" : `firmware ${firmware}`));
}

/** The same in a sentence. */
function onText(device: Pick<FleetDevice, "version" | "firmware">): string {
  return device.version === null && device.firmware === null ? "no version" : versionText(device);
}

/** What is the matter with a device: what failed, what it was offered. */
function matterText({ state, failed, offered }: FleetDevice): string {
  if (state === "failed") return failed === null ? "" : `${shown(failed)} failed`;
  return offered === null ? "" : `offered ${shown(offered)}`;
}

/** What a device of a state is, or what happened to it. */
const STATE_WORDS: Record<DeviceState, string> = {
  failed: "a release failed on it, or it does not get onto it",
  silent: "offered a release, and not heard of since for unusually long",
  offered: "offered a release, and not heard of since",
  behind: "on an older release, and not offered the newest one yet",
  current: "on the newest release that it may have",
};

// ──── Admin answers ──────────────────────────────────────────────────────────────────────────────
// What is answered to an operator: never kept, and never taken for anything else.

/** Limits of access. */
const ADMIN = {
  /** Seconds for which a cookie is good. */
  session: 30 * 86_400,
  /** Milliseconds that a wrong token costs. */
  wrong: 1000,
  /** Wrong tokens that one address, and all together, may be waiting for. */
  fromOne: 4,
  fromAll: 1000,
  /** Milliseconds between two tries to read the token, at first and at most. */
  retry: 500,
  pause: 30_000,
  /** Bytes of a body; and of a form, which percent-encodes all. */
  body: 64 * 1024,
  form: 256 * 1024,
  /** Fewer characters are guessed. */
  strong: 12,
};

/** What every answer to an operator says: it is for him, now, and is what it says that it is. */
const ADMIN_HEADERS = {
  "Cache-Control": "no-store",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
};

/** The setting that holds the token that was made at random. */
const TOKEN_SETTING = "admin token";

function jsonAnswer(status: number, value: unknown, headers: Record<string, string> = {}): Answer {
  const answer = content("application/json", new Blob([`${JSON.stringify(value)}\n`]));
  return { ...answer, status, headers: { ...answer.headers, ...ADMIN_HEADERS, ...headers } };
}

/** A short text: for programs as JSON, for people as it is. */
function adminText(
  { path }: Contact,
  status: number,
  message: string,
  headers: Record<string, string> = {},
): Answer {
  if (path.startsWith("/-/api")) return jsonAnswer(status, { error: message }, headers);
  return plain(status, message, { ...ADMIN_HEADERS, ...headers });
}

// ──── Admin access ───────────────────────────────────────────────────────────────────────────────
// Who may see and change the fleet: whoever has the admin token, or a cookie that was made with it.
// A cookie holds no token, only proof that its browser had it; nothing is kept for it here, so that
// all servers of a fleet accept it, also after a restart. Browsers send it by themselves, whatever
// page they are on: a change by cookie must come from a page of this server.

/** The token of a server, for who prints it. */
export interface AdminToken {
  /** Whether it is known; until then, nobody gets in. */
  readonly isKnown: boolean;
  /** Resolves once it is. */
  readonly known: Promise<void>;
  /** The token, if it was made at random; who chose one knows it. */
  readonly made: string | undefined;
}

/** Lets requests in. */
class AdminAccess implements AdminToken, Disposable {
  made: string | undefined;
  readonly #known = Promise.withResolvers<void>();
  readonly #proxies: Proxies;
  readonly #scheme: string;
  readonly #base: URL | undefined;
  #token: string | undefined;
  #timer: Timer | undefined;
  #isClosed = false;
  /** Address → its wrong tokens of the last second. */
  readonly #wrong = new Map<string, number>();
  #wrongs = 0;

  /** @throws {OTAError} exit code 2 when the options have a token that cannot be one */
  constructor({ adminToken, token, url, tls, trustProxy = [], warn }: ServeOptions) {
    this.#proxies = new Proxies(trustProxy);
    this.#scheme = tls ? "https" : "http";
    this.#base = url === undefined ? undefined : new URL(baseURL(url));
    if (adminToken === undefined) return;
    if (!/^[!-~]+$/.test(adminToken)) {
      throw new OTAError("--admin-token expects printable ASCII without spaces", 2);
    }
    if (adminToken === token) {
      const why = "every device has that one";
      throw new OTAError(`--admin-token must not be the --token of the devices: ${why}`, 2);
    }
    if (adminToken.length < ADMIN.strong) {
      warn?.(`the admin token has only ${adminToken.length} characters: it can be guessed`);
    }
    this.#token = adminToken;
    this.#known.resolve();
  }

  get isKnown(): boolean {
    return this.#token !== undefined;
  }

  get known(): Promise<void> {
    return this.#known.promise;
  }

  /**
   * Finds the token, or makes one that all servers of the fleet have. While the store does not
   * answer, it is tried again.
   */
  async open(fleet: Fleet, pause = ADMIN.retry): Promise<void> {
    if (this.#token !== undefined || this.#isClosed) return;
    try {
      const made = await fleet.settingOr(TOKEN_SETTING, randomBytes(24).toString("base64url"));
      this.#token = this.made = made;
      this.#known.resolve();
    } catch {
      if (this.#isClosed) return;
      const next = Math.min(2 * pause, ADMIN.pause);
      this.#timer = setTimeout(() => void this.open(fleet, next), pause);
    }
  }

  /**
   * Answers a request that may not see what it asks for, or not do what it wants.
   *
   * @param isForm whether a change has to pass `hasProof`, too
   */
  check(
    request: Request,
    contact: Contact,
    isForm = false,
  ): Promise<Answer | undefined> | Answer | undefined {
    // Nobody is out for good because the store is away.
    if (this.#token === undefined) return this.#refuse(contact, 503);
    const given = bearerOf(request.headers);
    if (given !== undefined) return this.#try(given, contact);
    if (this.#session(request.headers) === undefined) return this.#refuse(contact);
    const { method } = request;
    if (method === "GET" || method === "HEAD" || isForm) return undefined;
    const origin = request.headers.get("origin");
    if (this.#isOurs(request.headers, contact.peer)) return undefined;
    const found = origin === null ? "no Origin" : `Origin: ${printable(origin)}`;
    const proxy = "behind a proxy, serve needs --trust-proxy or --url";
    const what = `a change by cookie must come from a page of this server, found ${found}`;
    return adminText(contact, 403, `${what} (${proxy})`);
  }

  /** Whether a page of this server sent a request. */
  #isOurs(headers: Headers, peer: string): boolean {
    const origin = headers.get("origin");
    return origin !== null && this.#origins(headers, peer).includes(origin);
  }

  /**
   * What the forms of our pages have in them: browsers that are to send no referrer send
   * `Origin: null` with a form, and no other page can read this. A form stays good when its user
   * signs in anew. Nothing without a cookie.
   */
  formProof(headers: Headers): string {
    return this.#session(headers) === undefined ? "" : this.#proof("form");
  }

  /** Whether a form is of a page of ours, or sent with the token itself, which `check` has seen. */
  hasProof({ headers }: Request, { peer }: Contact, given = ""): boolean {
    if (bearerOf(headers) !== undefined || this.#isOurs(headers, peer)) return true;
    return this.formProof(headers) !== "" && isSameSecret(given, this.#proof("form"));
  }

  /** Whether a form is of a page of ours, whether or not its sender is still signed in. */
  isOurForm({ headers }: Request, { peer }: Contact, given = ""): boolean {
    // Only a browser can say so.
    if (headers.get("sec-fetch-site") === "same-origin") return true;
    if (this.#token === undefined) return false;
    return this.#isOurs(headers, peer) || isSameSecret(given, this.#proof("form"));
  }

  /** What devices begin their requests with, as far as is known here. */
  baseFor(headers: Headers, peer: string): string {
    const [asked] = this.#origins(headers, peer);
    return this.#base?.href.replace(/\/$/, "") ?? asked ?? "http://SERVER";
  }

  /** Takes a browser's cookie away. */
  get noCookie(): string {
    return `${this.#cookieName}=; Max-Age=0; HttpOnly; SameSite=Strict`;
  }

  /** Answers who shows the token, by the link that `serve` prints or by the form: with a cookie. */
  async enter({ headers }: Request, contact: Contact, token: string): Promise<Answer> {
    const refused = await this.#try(token, contact);
    if (refused) return refused;
    const expires = Math.floor(Date.now() / 1000) + ADMIN.session;
    const cookie = [
      `${this.#cookieName}=${expires}.${this.#proof(`session ${expires}`)}`,
      `Max-Age=${ADMIN.session}`,
      "HttpOnly",
      "SameSite=Strict",
      ...(this.#isSecure(headers, contact.peer) ? ["Secure"] : []),
    ];
    // No Path, and a relative Location: only the browser knows what a proxy puts before `/-/`.
    return plain(303, "see /-/", {
      ...ADMIN_HEADERS,
      Location: "./",
      "Set-Cookie": cookie.join("; "),
    });
  }

  #refuse(contact: Contact, status: 401 | 429 | 503 = 401): Answer {
    if (status === 503)
      return adminText(contact, 503, "the fleet's store does not answer: try again");
    if (status === 429) {
      return adminText(contact, 429, "too many wrong tokens: try again", { "Retry-After": "1" });
    }
    const link = "open the link with /-/?token=... that serve prints at its start";
    const how = `${link} (and reload, if another page led here), or send Authorization: Bearer`;
    return adminText(contact, 401, `this needs the admin token: ${how}`, {
      "WWW-Authenticate": "Bearer",
    });
  }

  /**
   * Refuses a wrong token, after a second. Who hangs up before does not try any faster: until then,
   * few more tokens from the same address are looked at. So there is little to remember, too.
   */
  async #try(given: string, contact: Contact): Promise<Answer | undefined> {
    if (this.#token === undefined) return this.#refuse(contact, 503);
    const { address } = contact;
    const wrong = this.#wrong.get(address) ?? 0;
    if (wrong >= ADMIN.fromOne || this.#wrongs >= ADMIN.fromAll) return this.#refuse(contact, 429);
    if (isSameSecret(given, this.#token)) return undefined;
    this.#count(address, 1);
    await Bun.sleep(ADMIN.wrong);
    this.#count(address, -1);
    return this.#refuse(contact);
  }

  #count(address: string, change: 1 | -1): void {
    this.#wrongs += change;
    const count = (this.#wrong.get(address) ?? 0) + change;
    if (count > 0) this.#wrong.set(address, count);
    else this.#wrong.delete(address);
  }

  /** What only who has the token can make. */
  #proof(of: string): string {
    return createHmac("sha256", this.#token!).update(`ota.ts ${of}`).digest("base64url");
  }

  /** Browsers send cookies to all ports of a host: servers with other tokens use other names. */
  get #cookieName(): string {
    return `ota-${this.#proof("cookie").slice(0, 8)}`;
  }

  /** Until when the cookie of a browser is good; `undefined`: it has none that is. */
  #session(headers: Headers): string | undefined {
    if (this.#token === undefined) return undefined;
    const begin = `${this.#cookieName}=`;
    const cookies = (headers.get("cookie") ?? "").split(";").map((one) => one.trim());
    const [, expires, proof] =
      cookies
        .filter((one) => one.startsWith(begin))
        .map((one) => /^(\d{1,12})\.(.+)$/.exec(one.slice(begin.length)))
        .find((found) => found !== null) ?? [];
    if (expires === undefined || proof === undefined) return undefined;
    const isGood = isSameSecret(proof, this.#proof(`session ${expires}`));
    return isGood && Number(expires) * 1000 > Date.now() ? expires : undefined;
  }

  /**
   * The origins that a browser may have for this server: of the address that it asked, which a
   * trusted proxy may know better, and of `--url`.
   */
  #origins(headers: Headers, peer: string): string[] {
    const isTrusted = this.#proxies.trusts(peer);
    const scheme = (isTrusted ? forwardedScheme(headers) : undefined) ?? this.#scheme;
    const forwarded = isTrusted ? lastOf(headers, "x-forwarded-host") : undefined;
    const host = forwarded ?? headers.get("host") ?? "";
    const asked = isHost(host) ? parseHttpURL(`${scheme}://${host}`) : undefined;
    return [asked, this.#base].filter((url) => url !== undefined).map(({ origin }) => origin);
  }

  /** Whether the browser asks by HTTPS. */
  #isSecure(headers: Headers, peer: string): boolean {
    const [asked, base] = this.#origins(headers, peer);
    // A proxy that is not trusted, but known: it asks for the host of `--url`.
    return [asked, base].some((origin) => {
      return origin?.startsWith("https:") && new URL(origin).host === new URL(asked!).host;
    });
  }

  [Symbol.dispose](): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
  }
}

// ──── Fleet requests ──────────────────────────────────────────────────────────────────────────────
// What an operator's requests say. Everything in them is checked before the store sees it: what is
// wrong with a request is never the server's failure.

/** @throws {OTAError} exit code 2: a request is wrong, and how */
function refuseInput(message: string): never {
  throw new OTAError(message, 2);
}

/**
 * Reads the parameters of a request.
 *
 * @throws {OTAError} exit code 2 when there is one that is unknown, there twice, or malformed
 */
function readParameters<Name extends string>(
  { url }: Pick<Request, "url">,
  names: readonly Name[],
): { [name in Name]?: string } {
  const mark = url.indexOf("?");
  const search = mark < 0 ? "" : url.slice(mark + 1);
  const found = new Map<string, string>();
  for (const pair of search.split("&")) {
    if (pair === "") continue;
    const at = pair.indexOf("=");
    const name = decodeParameter(at < 0 ? pair : pair.slice(0, at)) as Name;
    const value = at < 0 ? "" : decodeParameter(pair.slice(at + 1));
    if (!names.includes(name)) {
      const known = names.length === 0 ? "there are none here" : `known are ${names.join(", ")}`;
      refuseInput(`unknown parameter ${printable(name)}: ${known}`);
    }
    if (found.has(name)) refuseInput(`${name}: once at most`);
    // A label is two texts.
    for (const text of name === "label" ? value.split(/=(.*)/s) : [value]) {
      if (text === "" || saidText(text) !== null) continue;
      refuseInput(`${name}: at most ${MAX_TEXT} characters, and no control characters`);
    }
    found.set(name, value);
  }
  return Object.fromEntries(found) as { [name in Name]?: string };
}

function decodeParameter(text: string): string {
  try {
    return decodeURIComponent(text.replaceAll("+", " "));
  } catch {
    return refuseInput(`${printable(text)}: expected UTF-8 in percent-encoding`);
  }
}

/** Which devices a request wants. @throws {OTAError} exit code 2 */
function readFilter(request: Pick<Request, "url">): DeviceFilter {
  const names = ["state", "version", "model", "label", "q", "limit", "after"] as const;
  const { state, label, limit, ...texts } = readParameters(request, names);
  const known = DEVICE_STATES.find((name) => name === state);
  if (state !== undefined && !known) refuseInput(`state: one of ${DEVICE_STATES.join(", ")}`);
  if (limit !== undefined && !(/^\d{1,4}$/.test(limit) && +limit >= 1 && +limit <= MAX_PAGE)) {
    refuseInput(`limit: a whole number from 1 to ${MAX_PAGE}`);
  }
  const pair = label === undefined ? undefined : typedCondition(label);
  if (label !== undefined && !pair) refuseInput("label: expected KEY=VALUE");
  return {
    ...texts,
    ...(known && { state: known }),
    ...(pair && { label: pair }),
    ...(limit !== undefined && { limit: Number(limit) }),
  };
}

/** The object that a body is. @throws {OTAError} exit code 1 or 2 when it is none */
function readObject(body: Uint8Array): Record<string, unknown> {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(body);
  } catch {
    return refuseInput("the body: expected UTF-8");
  }
  return asObject(parseJSON(text), "the body");
}

/** A change of a device. @throws {OTAError} exit code 1 or 2 when it is none */
function readEdit(body: Uint8Array): DeviceEdit {
  const edit = readObject(body);
  const asGiven = (value: unknown, name: string) => (value === null ? null : asText(value, name));
  for (const field of Object.keys(edit)) {
    if (field !== "name" && field !== "labels") refuseInput(`unknown field ${printable(field)}`);
  }
  const { name, labels: given = {} } = edit;
  const labels = Object.entries(asObject(given, "labels")).map(([key, value]) => {
    return [key, asGiven(value, `labels.${printable(key)}`)] as const;
  });
  return {
    ...(name !== undefined && { name: asGiven(name, "name") }),
    labels: Object.fromEntries(labels),
  };
}

/** Reads a body; `undefined` when it is longer than that. Rejects when not all of it comes. */
async function readBody({ headers, body }: Request, most: number): Promise<Uint8Array | undefined> {
  if (Number(headers.get("content-length") ?? 0) > most) return undefined;
  const pieces: Uint8Array[] = [];
  let size = 0;
  for await (const piece of body ?? []) {
    size += piece.byteLength;
    if (size > most) return undefined;
    pieces.push(piece);
  }
  return Buffer.concat(pieces);
}

// ──── Rollout words ──────────────────────────────────────────────────────────────────────────────
// A rollout in words: which one is meant, how it stands, and what its numbers prove.

/**
 * The largest share of devices that a release may fail on, given what is known of some of them: the
 * one-sided upper bound of Clopper and Pearson, which is exact.
 *
 * @param bad how many of them it has failed on
 * @param known of how many it is known
 */
export function failureBound(bad: number, known: number, confidence = CONFIDENCE): number {
  if (bad >= known) return 1;
  let [low, high] = [bad / known, 1];
  for (let step = 0; step < 60; step++) {
    const share = (low + high) / 2;
    if (1 - binomialTail(bad + 1, known, share) > 1 - confidence) low = share;
    else high = share;
  }
  return high;
}

/** A share as a percentage of two digits that is not smaller: `14 %`, `0.3 %`. */
function percentAbove(share: number): string {
  const unit = 10 ** (Math.floor(Math.log10(share * 100)) - 1);
  return `${Number((Math.ceil((share * 100) / unit - 1e-9) * unit).toPrecision(2))} %`;
}

/** How many devices a release did not do well on: to acknowledge that does not undo it. */
function badOf({ failed, silent_devices, acknowledged }: Rollout): number {
  return failed + silent_devices + acknowledged;
}

/**
 * What the numbers of a rollout prove: `20 proven, none bad: fewer than 14 % fail, with 95 %
 * confidence`.
 */
export function rolloutProof(rollout: Rollout): string {
  const { proven } = rollout;
  const bad = badOf(rollout);
  const numbers = `${proven || "none"} proven, ${bad || "none"} bad`;
  if (proven === 0) return `${numbers}: ${bad === 0 ? "nothing is known yet" : "all may fail"}`;
  const share = percentAbove(failureBound(bad, proven + bad));
  return `${numbers}: fewer than ${share} fail, with ${100 * CONFIDENCE} % confidence`;
}

/** Names the rollout of the root itself, where models have some as well. */
const ROOT_MODEL = "-";

/**
 * The rollout that is meant by a version and, where that is not enough, a model: the newest one.
 *
 * @throws {OTAError} exit code 2 when there are several
 */
function meantRollout(
  rollouts: readonly Rollout[],
  version: string,
  model: string | null,
): Rollout | undefined {
  const named = rollouts.filter((one) => isSameRelease(one.version, version));
  const running = named.filter(({ state }) => isGoing(state));
  // Names of models have no case.
  const isOf = (one: Rollout) => (one.model ?? ROOT_MODEL).toLowerCase() === model?.toLowerCase();
  if (model !== null) return running.find(isOf) ?? named.find(isOf);
  const some = running.length > 0 ? running : named;
  const models = [...new Set(some.map((one) => one.model ?? `${ROOT_MODEL} for the root's own`))];
  if (models.length < 2) return some[0];
  throw new OTAError(`several rollouts of ${version}: name the model (${models.join(", ")})`, 2);
}

/** What became of a device in a rollout. */
const STANDING_WORDS: Record<DeviceRollout["standing"], string> = {
  offered: "was offered it",
  proven: "proven on it",
  failed: "it failed here",
  silent: "silent since it was offered",
  acknowledged: "bad before it was resumed",
};

/** What became of a device in a rollout, in one line: `1.0.2 (halted): it failed here`. */
function takenPartText(rollout: DeviceRollout): string {
  const { state, standing } = rollout;
  return `${rolloutName(rollout)} (${state}): ${STANDING_WORDS[standing]}`;
}

/** How many bad ones the operator has not acknowledged. */
function openBadOf({ failed, silent_devices }: Rollout): number {
  return failed + silent_devices;
}

/** How many bad devices of a rollout are not among those that it names. */
function unnamedBad(rollout: Rollout): number {
  return Math.max(0, openBadOf(rollout) - rollout.bad.length);
}

// ──── Rollout API ────────────────────────────────────────────────────────────────────────────────
// Rollouts over HTTP.

const ROLLOUTS_PATH = "/-/api/rollouts";

/**
 * What a rollout is to be like. The fields are those of a `Rollout`; of those that are absent or
 * `null`, the defaults.
 *
 * @throws {OTAError} exit code 1 or 2 when the body does not say
 */
function readRollout(body: Uint8Array): { options: RolloutOptions; isDry: boolean } {
  const given = readObject(body);
  const left = new Set(Object.keys(given));
  const field = <T>(name: string, as: (value: unknown, name: string) => T): T | undefined => {
    left.delete(name);
    const value = given[name] ?? undefined;
    return value === undefined ? undefined : as(value, name);
  };
  const defaults = ROLLOUT_DEFAULTS;
  const pairs = (value: unknown, name: string) => asList(value, name, asPair);
  const numbers = (value: unknown, name: string) => asList(value, name, asNumber);
  const options: RolloutOptions = {
    version: field("version", asText) ?? refuseInput("version: there must be one"),
    model: field("model", asText) ?? null,
    first: field("first", asNumber) ?? defaults.first,
    soak: field("soak", asNumber) ?? defaults.soak,
    silent: field("silent", asNumber) ?? defaults.silent,
    tolerance: field("tolerance", asNumber) ?? defaults.tolerance,
    pauseAt: field("pause_at", numbers) ?? defaults.pauseAt,
    only: field("only", pairs) ?? defaults.only,
    window: field("window", asText) ?? defaults.window,
  };
  const isDry = field("dry_run", asFlag) ?? false;
  for (const name of left) refuseInput(`unknown field ${printable(name)}`);
  return { options: { ...options, pauseAt: options.pauseAt.toSorted((a, b) => a - b) }, isDry };
}

const ROLLOUT_ACTIONS = Object.keys(ACTIONS) as RolloutAction[];

/**
 * Whether a change was refused by how things stand, such as by what another operator did before. What
 * the store said itself has no cause; but it may be no store of ours any more, and then nothing is
 * possible.
 */
async function isConflict(error: OTAError, fleet: Fleet): Promise<boolean> {
  if (error instanceof FormatError || error.exitCode !== 1 || error.cause !== undefined)
    return false;
  return await fleet.rollouts().then(
    () => true,
    () => false,
  );
}

/** Answers for the paths of rollouts. */
class RolloutAPI {
  constructor(private readonly fleet: Fleet) {}

  /** What can be done with a path; `undefined`: nothing. */
  methods(path: string): string | undefined {
    if (path === ROLLOUTS_PATH) return "GET, HEAD, POST";
    return this.#partsOf(path) && "POST";
  }

  async answer(request: Request, contact: Contact): Promise<Answer> {
    const parts = this.#partsOf(contact.path);
    try {
      if (parts) return await this.#change(request, contact, parts);
      readParameters(request, []);
      if (contact.method === "POST") return await this.#start(request, contact);
      return jsonAnswer(200, { rollouts: await this.fleet.rollouts() });
    } catch (error) {
      if (!(error instanceof OTAError) || !(await isConflict(error, this.fleet))) throw error;
      return adminText(contact, 409, error.message);
    }
  }

  /** The version and the action that a path names. */
  #partsOf(path: string): [version: string, action: string] | undefined {
    const [, version, action] = /^\/-\/api\/rollouts\/([^/]+)\/([^/]+)$/.exec(path) ?? [];
    return version === undefined ? undefined : [version, action!];
  }

  async #start(request: Request, contact: Contact): Promise<Answer> {
    const body = await readBody(request, ADMIN.body).catch(() =>
      refuseInput("the body was cut off"),
    );
    if (!body) {
      const what = `a body has at most ${ADMIN.body} bytes`;
      return adminText(contact, 413, what, { Connection: "close" });
    }
    const { options, isDry } = readRollout(body);
    if (isDry) return jsonAnswer(200, { targets: await this.fleet.rolloutTargets(options) });
    return jsonAnswer(201, await this.fleet.startRollout(options));
  }

  async #change(
    request: Request,
    contact: Contact,
    [encoded, word]: [string, string],
  ): Promise<Answer> {
    if (hasBody(request.headers)) {
      return adminText(contact, 413, "an action has no body", { Connection: "close" });
    }
    const { model = null } = readParameters(request, ["model"]);
    const action = ROLLOUT_ACTIONS.find((name) => name === word);
    const actions = ROLLOUT_ACTIONS.join(", ");
    if (!action) return adminText(contact, 404, `no action ${printable(word)}, but ${actions}`);
    const version = decodeParameter(encoded.replaceAll("+", "%2B"));
    const of = model === null ? "" : ` of ${printable(model)}`;
    const unknown = `no rollout of ${printable(version)}${of}`;
    if (!isReleaseName(version)) return adminText(contact, 404, unknown);
    const meant = meantRollout(await this.fleet.rollouts(), version, model);
    const rollout = meant && (await this.fleet.changeRollout(version, meant.model, action));
    return rollout ? jsonAnswer(200, rollout) : adminText(contact, 404, unknown);
  }
}

// ──── Fleet API ───────────────────────────────────────────────────────────────────────────────────
// The fleet over HTTP, below `/-/api`, in JSON.

/** A release, as the fleet's interface lists it. */
interface ListedRelease {
  /** Of a model with a root of its own; absent for the releases of the root. */
  model?: string;
  /** `null`: firmware alone. */
  version: string | null;
  /** Of the version. */
  files: number;
  /** Of these and the image. */
  bytes: number;
  /** The image of the same version. */
  firmware: string | null;
}

/** A version whose content changes is another object: its size is added up once. */
const versionBytes = new WeakMap<Release, number>();

function bytesOf(release: Release): number {
  const known = versionBytes.get(release);
  if (known !== undefined) return known;
  const bytes = [...release.files.values()].reduce((sum, { size }) => sum + size, 0);
  versionBytes.set(release, bytes);
  return bytes;
}

/** The releases on offer: of each root, in the order of their versions. */
function listReleases({ roots }: { roots: readonly ReleaseRoot[] }): ListedRelease[] {
  return roots.flatMap(({ model, versions, firmware }) => {
    const both = versions.map((release) => {
      const image = firmware.find(({ version }) => version.compare(release.version) === 0);
      return { release, image, order: release.version };
    });
    const alone = firmware
      .filter((image) => both.every((one) => one.image !== image))
      .map((image) => ({ release: undefined, image, order: image.version }));
    const ordered = [...both, ...alone].toSorted((a, b) => a.order.compare(b.order));
    return ordered.map(({ release, image }) => ({
      ...(model !== "" && { model }),
      version: release?.name ?? null,
      files: release?.files.size ?? 0,
      bytes: (release ? bytesOf(release) : 0) + (image?.size ?? 0),
      firmware: image?.name ?? null,
    }));
  });
}

/** Answers for the paths of the fleet. */
class FleetAPI {
  readonly #rollouts: RolloutAPI;

  constructor(
    private readonly fleet: Fleet,
    private readonly releases: Releases,
    private readonly access: AdminAccess,
  ) {
    this.#rollouts = new RolloutAPI(fleet);
  }

  async answer(request: Request, contact: Contact): Promise<Answer> {
    const { path, method } = contact;
    const refused = await this.access.check(request, contact);
    if (refused) return refused;
    const methods = this.#methods(path);
    if (!methods) return adminText(contact, 404, "not found");
    if (!methods.split(", ").includes(method)) {
      return adminText(contact, 405, `only ${methods}`, { Allow: methods });
    }
    if (method !== "POST" && hasBody(request.headers)) {
      return adminText(contact, 413, "only a POST has a body", { Connection: "close" });
    }
    try {
      return await this.#answer(request, contact);
    } catch (error) {
      if (!(error instanceof OTAError)) throw error;
      const isWrong = error instanceof FormatError || error.exitCode === 2;
      return adminText(contact, isWrong ? 400 : 503, error.message);
    }
  }

  /** What can be done with a path; `undefined`: nothing. */
  #methods(path: string): string | undefined {
    if (/^\/-\/api\/devices\/[^/]*$/.test(path)) return "GET, HEAD, POST, DELETE";
    if (path.startsWith(ROLLOUTS_PATH)) return this.#rollouts.methods(path);
    return ["/-/api/fleet", "/-/api/devices"].includes(path) ? METHODS : undefined;
  }

  async #answer(request: Request, contact: Contact): Promise<Answer> {
    const { path } = contact;
    if (path === "/-/api/devices") {
      return jsonAnswer(200, await this.fleet.devices(readFilter(request)));
    }
    if (path.startsWith("/-/api/devices/")) return await this.#device(request, contact);
    if (path.startsWith(ROLLOUTS_PATH)) return await this.#rollouts.answer(request, contact);
    readParameters(request, []);
    const summary = await this.fleet.summary();
    return jsonAnswer(200, { ...summary, releases: listReleases(this.releases) });
  }

  async #device(request: Request, contact: Contact): Promise<Answer> {
    const id = this.#idOf(request, contact.path);
    // The store need not be asked for what is no id.
    const isId = saidText(id) !== null;
    const unknown = () => adminText(contact, 404, `no device ${printable(id)}`);
    if (contact.method === "DELETE") {
      const isGone = isId && (await this.fleet.forget(id));
      return isGone ? jsonAnswer(200, { forgotten: id }) : unknown();
    }
    if (contact.method === "POST") {
      const body = await readBody(request, ADMIN.body).catch(() =>
        refuseInput("the body was cut off"),
      );
      if (!body) {
        const what = `a body has at most ${ADMIN.body} bytes`;
        return adminText(contact, 413, what, { Connection: "close" });
      }
      const edit = readEdit(body);
      if (!isId || !(await this.fleet.edit(id, edit))) return unknown();
    }
    const device = isId ? await this.fleet.device(id) : undefined;
    return device ? jsonAnswer(200, device) : unknown();
  }

  /** The id of the device that a request is about. */
  #idOf(request: Request, path: string): string {
    const part = path.slice("/-/api/devices/".length);
    // Clients take `.` and `..` out of paths, even percent-encoded: such ids must be parameters.
    const { id = "" } = part === "" ? readParameters(request, ["id"]) : {};
    if (part !== "") readParameters(request, []);
    else if (id === "") refuseInput("expected /-/api/devices/ID");
    try {
      return (id || decodeURIComponent(part)).toLowerCase();
    } catch {
      return refuseInput("the id: expected UTF-8 in percent-encoding");
    }
  }
}

// ──── Rollout notices ────────────────────────────────────────────────────────────────────────────
// Tells a program of the operator's when a rollout halts, pauses or is done: `serve --notify`. What
// is told is noted in the store: of several servers one tells it, and what that one could not tell,
// another one can. There is one notice of each rollout at most, about what it is now.

/** Limits of notices, in milliseconds. */
const NOTICE = {
  /** Between two looks at the rollouts. */
  look: 2000,
  /** Before the second try, and between two tries at most. */
  pause: 2000,
  most: 300_000,
  /** For how long it is tried. */
  patience: 3600_000,
  /** For an answer. */
  answer: 10_000,
  /** After which others tell what a server was about to tell. */
  lease: 30_000,
};

/** States that are told. */
const TOLD_STATES: readonly RolloutState[] = ["halted", "paused", "done"];

/** How the notice of a rollout stands, as it is in the store. */
interface NoticeRecord {
  /** `changed` of the rollout that it is about. */
  of: number;
  /** When it was tried first, how often since, and when it may be tried again. */
  since: number;
  tries: number;
  next: number;
  /** Told, or given up. */
  isOver: boolean;
}

/** Tells of rollouts, one notice after the other; never in the way of anything else. */
class Notifier implements AsyncDisposable {
  readonly #url: URL;
  readonly #stop = new AbortController();
  #timer: Timer | undefined;
  #look: Promise<void> = Promise.resolve();
  readonly #made = Date.now();
  /** When some server of the fleet first was to tell. */
  #begun: number | undefined;
  /** Rollouts that nothing more is to be told of, as they are. */
  readonly #over = new Map<string, number>();
  /** Notices that failed, and were warned of. */
  readonly #warned = new Set<string>();

  /** @throws {OTAError} exit code 2 when the address is none */
  constructor(
    private readonly fleet: Fleet,
    url: string,
    private readonly warn: (line: string) => void = () => {},
  ) {
    this.#url = noticeURL(url);
    this.#plan();
  }

  /** Where it tells, without what may be secret. */
  get #name(): string {
    return this.#url.origin;
  }

  #plan(): void {
    if (this.#stop.signal.aborted) return;
    this.#timer = setTimeout(() => {
      // A store that is away is looked at again.
      this.#look = this.#lookAround().catch(() => {});
      void this.#look.then(() => this.#plan());
    }, NOTICE.look);
  }

  async #lookAround(): Promise<void> {
    // What had happened before anybody was to be told is no news.
    this.#begun ??= Number(await this.fleet.settingOr("notices since", `${this.#made}`));
    const rollouts = await this.fleet.rollouts();
    const told = rollouts.filter(({ id, state, changed }) => {
      return TOLD_STATES.includes(state) && this.#over.get(id) !== changed;
    });
    for (const rollout of told) {
      if (this.#stop.signal.aborted) return;
      if (rollout.changed < this.#begun - NOTICE.look) this.#over.set(rollout.id, rollout.changed);
      else await this.#tell(rollout);
    }
  }

  /** Tells of a rollout, if that is due and no other server does. */
  async #tell(rollout: Rollout): Promise<void> {
    const { id, changed } = rollout;
    const name = `notice ${id}`;
    const text = await this.fleet.setting(name);
    const found = parseJSON(text ?? "") as NoticeRecord | undefined;
    const known = found?.of === changed ? found : undefined;
    if (known?.isOver) return void this.#over.set(id, changed);
    const now = Date.now();
    if (known && now < known.next && known.next <= now + NOTICE.most) return;
    const { since = now, tries = 0 } = known ?? {};
    const claim = { of: changed, since, tries: tries + 1, next: now + NOTICE.lease, isOver: false };
    const claimed = JSON.stringify(claim);
    if (!(await this.fleet.swapSetting(name, text, claimed))) return;
    const why = await this.#send(rollout);
    if (this.#stop.signal.aborted && why !== undefined) {
      // Whoever is next need not wait.
      claim.next = 0;
    } else if (why !== undefined) this.#fail(rollout, claim, why);
    else claim.isOver = true;
    await this.fleet.swapSetting(name, claimed, JSON.stringify(claim));
  }

  /** Plans the next try, or gives up. */
  #fail(rollout: Rollout, claim: NoticeRecord, why: string): void {
    const now = Date.now();
    const what = `${this.#name} could not be told that ${rolloutText(rollout)} (${why})`;
    claim.isOver = now - claim.since >= NOTICE.patience;
    claim.next = now + Math.min(NOTICE.pause * 2 ** (claim.tries - 1), NOTICE.most);
    const key = `${rollout.id} ${rollout.changed}`;
    if (claim.isOver) this.warn(`${what}: given up after an hour`);
    else if (!this.#warned.has(key)) this.warn(`${what}: tried again for an hour`);
    this.#warned.add(key);
  }

  /** @returns why it could not be told; `undefined`: it was */
  async #send(rollout: Rollout): Promise<string | undefined> {
    const { state: event } = rollout;
    const body = JSON.stringify({ event, text: rolloutText(rollout), rollout });
    const signal = AbortSignal.any([this.#stop.signal, AbortSignal.timeout(NOTICE.answer)]);
    try {
      const response = await fetch(this.#url, {
        ...{ method: "POST", body, signal },
        headers: { "Content-Type": "application/json", "User-Agent": `ota.ts/${TOOL_VERSION}` },
        // It is this address that the operator trusts, and no other.
        redirect: "manual",
      });
      await response.body?.cancel();
      return response.ok ? undefined : `it answered ${response.status}`;
    } catch (error) {
      return errorText(error);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearTimeout(this.#timer);
    this.#stop.abort(new OTAError("the server stops"));
    await this.#look;
  }
}

/** @throws {OTAError} exit code 2 when nobody can be told there */
function noticeURL(text: string): URL {
  const url = parseHttpURL(text);
  if (url) return url;
  throw new OTAError(`--notify expects an http(s) address, found ${printable(text)}`, 2);
}

// ──── Staged versions ────────────────────────────────────────────────────────────────────────────
// `serve --staged`: a version that appears starts a rollout of its own, and goes to nobody before it
// has one. The versions that were there when a fleet was first served so stay as they were.

/** Milliseconds between two looks at what there is. */
const STAGING_LOOK = 1000;

/** Starts rollouts of versions that have none. */
class VersionStaging implements AsyncDisposable {
  #timer: Timer | undefined;
  #look: Promise<void> = Promise.resolve();
  #isClosed = false;

  /** @param log is told of each rollout that begins */
  constructor(
    private readonly fleet: Fleet,
    private readonly releases: Releases,
    private readonly log: (line: string) => void = () => {},
  ) {}

  /** Looks around now, and from then on. */
  async open(): Promise<void> {
    // While the store is away, nobody gets what is new.
    this.#look = this.#lookAround().catch(() => {});
    await this.#look;
    if (!this.#isClosed) this.#timer = setTimeout(() => void this.open(), STAGING_LOOK);
  }

  async #lookAround(): Promise<void> {
    const { fleet } = this;
    const here = this.releases.roots.flatMap(({ model, versions, firmware }) => {
      const names = new Set([...versions, ...firmware].map(({ name }) => name));
      return [...names].map((version) => ({ version, model: model === "" ? null : model }));
    });
    if (!fleet.admission.staged) {
      const keys = JSON.stringify(here.map(stagedKey));
      const kept = await fleet.settingOr("staged since", keys);
      fleet.admission.staged = new Set(JSON.parse(kept));
    }
    const fresh = here.filter((one) => fleet.admission.isHeld(one));
    if (fresh.length === 0) return;
    const rollouts = await fleet.rollouts();
    for (const one of fresh) {
      const key = stagedKey(one);
      // One that has just begun is not known to those who answer devices yet.
      if (rollouts.some((rollout) => stagedKey(rollout) === key) || this.#isClosed) continue;
      const rollout = await fleet.startRollout({ ...ROLLOUT_DEFAULTS, ...one });
      const of = one.model === null ? "" : ` of ${printable(one.model)}`;
      this.log(`staged   ${printable(rollout.version)}${of}: a rollout of it began`);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    await this.#look;
  }
}

// ════ VI Page ════════════════════════════════════════════════════════════════════════════════════
// What an operator looks at: the fleet in a browser, on a laptop or on a phone in a van. Every view is
// HTML made here, from what programs are answered, too; buttons are forms. It works whole without
// JavaScript: one short script only brings the newest. Links are relative, since only the browser
// knows what a proxy puts before `/-/`. At the end, the server: with its fleet, its API and its page.

// ──── HTML templates ──────────────────────────────────────────────────────────────────────────────
// HTML from templates. What is put into one is escaped, unless it was made by one.

/** HTML that was made by a template. */
class Markup {
  constructor(readonly text: string) {}
}

/** What can be put into a template; what is not there takes no place. */
type Piece = Markup | string | number | null | undefined | false | readonly Piece[];

/** What stands between the pieces of a template, without its indentation, which nobody sees. */
const templateParts = new WeakMap<TemplateStringsArray, string[]>();

/** HTML; whatever is put into it is text, but for HTML that a template made. */
function html(strings: TemplateStringsArray, ...pieces: Piece[]): Markup {
  let parts = templateParts.get(strings);
  if (!parts) {
    parts = strings.map((part) => part.replace(/\n\s+/g, "\n"));
    templateParts.set(strings, parts);
  }
  let text = parts[0]!;
  for (const [i, piece] of pieces.entries()) text += markupOf(piece) + parts[i + 1]!;
  return new Markup(text);
}

function markupOf(piece: Piece): string {
  if (piece === null || piece === undefined || piece === false) return "";
  if (piece instanceof Markup) return piece.text;
  if (Array.isArray(piece)) return piece.map(markupOf).join("");
  return Bun.escapeHTML(`${piece as string | number}`);
}

/**
 * A text by a stranger: it may be written from right to left, and have characters that nobody sees
 * or that turn the text around them.
 */
function said(text: string): Markup {
  return html`<bdi>${shown(text)}</bdi>`;
}

/** Text for people where there is little room: what is long is cut. */
function cutText(text: string, most: number): string {
  const characters = [...shown(text)];
  return characters.length <= most ? shown(text) : `${characters.slice(0, most - 1).join("")}…`;
}

/** A text by a stranger where there is little room. */
function cut(text: string, most: number): Markup {
  return html`<bdi>${cutText(text, most)}</bdi>`;
}

/** The same, and whole on hover. */
function brief(text: string, most = 24): Markup {
  const whole = shown(text);
  return whole.length <= most ? said(text) : html`<span title="${whole}">${cut(text, most)}</span>`;
}

/** A number with commas. */
function grouped(count: number): string {
  return count.toLocaleString("en-US");
}

/** `3,000 devices`, `1 device`. */
function many(count: number, noun: string): string {
  return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A duration in words: `90 s`, `2 h`. */
function durationText(seconds: number): string {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800
    ? `${Math.round(seconds / 3600)} h`
    : `${Math.round(seconds / 86_400)} days`;
}

function percentText(fraction: number): string {
  return `${Number((100 * fraction).toFixed(1))} %`;
}

/** `2026-01-31 12:00:00 UTC`. */
function exactTime(iso: string): string {
  return iso.replace("T", " ").replace(/\..*/, " UTC");
}

/** How long ago; the exact time, in the browser's zone if it can, on hover. */
function agoTime(at: number, now: number): Markup {
  const iso = isoText(at);
  return html`<time datetime="${iso}" title="${exactTime(iso)}">${agoText(at, now)}</time>`;
}

/** The time of day, with its date unless it is today's; the script writes it in the browser's zone. */
function clockTime(at: number, now: number): Markup {
  const iso = isoText(at);
  const time = iso.slice(11, 16);
  const text =
    iso.slice(0, 10) === isoText(now).slice(0, 10) ? time : `${iso.slice(0, 10)} ${time}`;
  return html`<time datetime="${iso}" data-clock title="${exactTime(iso)}">${text} UTC</time>`;
}

/** What marks a state beside its colour: a shape. */
const SHAPES = {
  current: "M6 1.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 1 0 0-9z",
  offered: "M6 1V9.6M2.2 6.2L6 10L9.8 6.2",
  behind: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  silent: "M6 1.8L10.8 10.2H1.2z",
  failed: "M2 2L10 10M10 2L2 10",
  paused: "M4 2V10M8 2V10",
} as const;

type Shape = keyof typeof SHAPES;

/** A shape and its colour; what it means stands beside it. */
function mark(shape: Shape): Markup {
  return html`<svg class="mark is-${shape}" viewBox="0 0 12 12" aria-hidden="true">
    <path d="${SHAPES[shape]}" />
  </svg>`;
}

/** A state: its shape and its word. */
function stateTag(state: Shape, word: string = state): Markup {
  return html`<span class="state is-${state}">${mark(state)} ${word}</span>`;
}

/** A field that is sent and not seen. */
function hidden(name: string, value: string): Markup {
  return html`<input type="hidden" name="${name}" value="${value}" />`;
}

/** One of several choices. */
function option(value: string, text: string, chosen: string | undefined): Markup {
  return html`<option value="${value}" ${value === (chosen ?? "") ? html` selected` : ""}>
    ${text}
  </option>`;
}

// ──── Page frame ──────────────────────────────────────────────────────────────────────────────────
// What all views have in common.

/** What a view is made with. */
interface PageView {
  /** From this path to `/-/`: `./` or `../`. */
  up: string;
  /** Changes with style and script. */
  assets: string;
  now: number;
  /** What a form that changes something has to prove: that it is of a page of ours. */
  proof: string;
}

/** The fields of a form, or the parameters of a view: those that are not empty. */
type FormFields = Map<string, string>;

/** A view, and how it is answered. */
interface Page {
  status?: number;
  title: string;
  /** Which entry of the navigation it is. */
  at?: "fleet" | "devices";
  /** Whether the script brings the newest. */
  isLive?: boolean;
  main: Markup;
}

/** A form that changes something. */
function changeForm(
  { proof }: PageView,
  action: string,
  content: Piece,
  { className, key }: { className?: string; key?: string } = {},
): Markup {
  const marks = [className && html` class="${className}"`, key && html` data-key="${key}"`];
  return html`<form method="post" action="${action}" ${marks}>
    ${hidden("proof", proof)}${content}
  </form>`;
}

/** What a link to the page of a device is. */
function deviceLink({ up }: PageView, id: string): string {
  // Browsers take `.` and `..` out of paths, even percent-encoded.
  if (id === "." || id === "..") return `${up}devices/?id=${id}`;
  return `${up}devices/${encodeURIComponent(id)}`;
}

/** A link to the devices that a filter takes. */
function devicesLink({ up }: PageView, filter: Record<string, string | null | undefined>): string {
  const parameters = Object.entries(filter).filter(([, value]) => value);
  const search = parameters.map(([name, value]) => `${name}=${encodeURIComponent(value!)}`);
  return `${up}devices${search.length > 0 ? `?${search.join("&")}` : ""}`;
}

/** The whole document. */
function documentOf(view: PageView, page: Page, place: string, isIn = true): string {
  const { up, now, assets } = view;
  const entry = (at: Page["at"], href: string, text: string) =>
    html`<a href="${href}" ${page.at === at && html` aria-current="page"`}>${text}</a>`;
  const nav = html`<nav aria-label="Views">
    ${entry("fleet", up, "Fleet")}${entry("devices", `${up}devices`, "Devices")}
  </nav>`;
  const signOut = changeForm(view, `${up}sign-out`, html`<button class="quiet">Sign out</button>`);
  const where = html` · the fleet in ${said(place)} · as of ${clockTime(now, now)}`;
  const body = html`<a class="skip" href="#main">Skip to the content</a>
    <header>
      <a class="brand" href="${up}">ota<span>.ts</span></a
      >${isIn && [nav, signOut]}
    </header>
    <p id="lost" role="status" hidden></p>
    <main id="main" tabindex="-1" ${page.isLive && html` data-live`} ${!isIn && html` data-out`}>
      ${page.main}
    </main>
    <footer>
      <p>ota.ts ${TOOL_VERSION}${isIn && where}</p>
      ${isIn && programsLine(up)}
    </footer>`;
  return html`<!doctype html>
    <html lang="en">
      <head>
        <meta charset="utf-8" />
        <title>${shown(page.title)} · ota.ts</title>
        <meta name="viewport" content="width=device-width, initial-scale=1" />
        <meta name="color-scheme" content="light dark" />
        <link rel="stylesheet" href="${up}page.css?${assets}" />
        <link rel="icon" href="${up}page.svg" />
        <script src="${up}page.js?${assets}" defer></script>
      </head>
      <body>
        ${body}
      </body>
    </html> `.text;
}

function programsLine(up: string): Markup {
  const paths = ["api/fleet", "api/devices", "health", "metrics"];
  const links = paths.map((path) => html` <a href="${up}${path}">/-/${path}</a>`);
  return html`<p>For programs:${links}</p>`;
}

/** The head of a column: of text, of numbers, or one that is only read aloud. */
function columnHead(name: Piece, kind: "text" | "numbers" | "unseen" = "text"): Markup {
  if (kind === "unseen") return html`<th scope="col"><span class="unseen">${name}</span></th>`;
  return html`<th scope="col" ${kind === "numbers" && html`class="n"`}>${name}</th>`;
}

/** A table, which alone scrolls sideways where it is too wide. */
function wideTable(className: string, heads: readonly Markup[], rows: readonly Markup[]): Markup {
  return html`<div class="wide">
    <table class="${className}">
      <thead>
        <tr>
          ${heads}
        </tr>
      </thead>
      <tbody>
        ${rows}
      </tbody>
    </table>
  </div>`;
}

/** What is wrong with what was asked for, and the status of an answer that says so. */
interface Problem {
  status: number;
  text: string;
}

/** Says what is wrong with what was typed. */
function problemText(text: string): Markup {
  return html`<p class="problem" role="alert">${mark("failed")} ${said(text)}</p>`;
}

/** Says what is the matter, and what to do about it. */
function problemPage(status: number, title: string, ...lines: Piece[]): Page {
  const paragraphs = lines.map((line) => html`<p>${line}</p>`);
  return {
    status,
    title,
    main: html`<section class="lead">
      <h1>${mark("failed")} ${title}</h1>
      ${paragraphs}
    </section>`,
  };
}

function noRolloutPage({ up }: PageView): Page {
  const next = html`<a href="${up}">The fleet</a>`;
  return problemPage(404, "There is no such rollout any more", next);
}

/** What somebody wanted who has to sign in first. */
interface Wanted {
  /** The view to see then: below `/-/`. */
  to?: string | undefined;
  /** Whether it was to change something. */
  isChange?: boolean;
  /** What was typed, and is not saved; with the proof that it was typed into a form of ours. */
  typed?: string | undefined;
  proof?: string | undefined;
}

/** What was typed, for whoever has to type it again. */
function typedText(typed: string | undefined): Markup | undefined {
  if (typed === undefined) return undefined;
  const lines = typed.split(/\r?\n/).map(shown);
  return html`<section>
    <p>What you typed was not saved:</p>
    <pre>${lines.join("\n")}</pre>
  </section>`;
}

/** What everybody sees while the token is not known. */
function awayPage({ isChange, typed }: Wanted): Page {
  const title = "The fleet's store does not answer";
  const next = "Nobody can sign in until it does. Devices are served meanwhile.";
  const page = problemPage(503, title, isChange ? `Nothing was changed. ${next}` : next);
  return { ...page, isLive: !isChange, main: html`${page.main}${typedText(typed)}` };
}

/** What somebody sees who has not shown the token. */
function signInPage(up: string, wanted: Wanted, problem?: string): Page {
  const { to, isChange, typed, proof } = wanted;
  return {
    status: 401,
    title: "Sign in",
    main: html`<section class="sign-in">
      <h1>Sign in</h1>
      ${problem !== undefined && problemText(problem)}
      ${isChange && html`<p>Nothing was changed, since you are not signed in.</p>`}${typedText(typed)}
      <form method="post" action="${up}sign-in">
        ${to !== undefined && hidden("to", to)}
        ${typed !== undefined && [hidden("typed", typed), hidden("proof", proof ?? "")]}
        <label for="token">Admin token</label>
        <input
          id="token"
          name="token"
          type="password"
          autocomplete="current-password"
          required
          autofocus
        />
        <button class="main">Sign in</button>
      </form>
      <p class="hint">
        This page needs the admin token. The server prints a link with it when it starts, unless you
        gave it one with <code>--admin-token</code>. (If a link from another page led here, and you
        have signed in before: reload.)
      </p>
    </section>`,
  };
}

// ──── Charts ──────────────────────────────────────────────────────────────────────────────────────
// Charts in SVG. Each has its numbers beside it or in a table, for those who cannot see it. Colour is
// for states alone: versions differ by how dark they are, and stand in the legend as in the chart.

/** Versions in a chart at most; the others are one. */
const CHARTED = 6;

/** Points along a chart, as SVG has them. */
function points(pairs: readonly (readonly [number, number])[]): string {
  return pairs.map(([x, y]) => `${Number(x.toFixed(1))},${Number(y.toFixed(2))}`).join(" ");
}

/** The versions of a chart, newest first: the most frequent ones of all times in it. */
function chartedVersions(samples: readonly FleetSample[]): string[] {
  const most = new Map<string, number>();
  for (const { versions } of samples) {
    for (const [name, count] of Object.entries(versions)) {
      most.set(name, Math.max(most.get(name) ?? 0, count));
    }
  }
  const named = [...most].filter(([name]) => name !== "other");
  const chosen = named.toSorted(([, a], [, b]) => b - a).slice(0, CHARTED);
  const keyOf = (name: string) => (name === "none" ? "" : versionKey(name));
  return chosen.map(([name]) => name).sort((a, b) => compareCodePoints(keyOf(b), keyOf(a)));
}

/** How many devices are on a version: versions may be called as what every object has. */
function devicesAt({ versions }: FleetSample, name: string): number {
  return Object.hasOwn(versions, name) ? versions[name]! : 0;
}

/** What a version of a chart is called. */
function seriesName(name: string): Markup {
  if (name === "none") return html`no version`;
  return name === "other" ? html`others` : brief(name);
}

const SPAN_WORDS: Record<FleetSpan, string> = {
  hour: "the last hour",
  day: "the last day",
  week: "the last week",
  year: "the last year",
};

/** The areas of a chart, one above the other, the last one at the bottom. */
function stackedAreas(
  samples: readonly FleetSample[],
  series: readonly string[],
  countOf: (sample: FleetSample, name: string) => number,
  { begin, now, most }: { begin: number; now: number; most: number },
): Markup[] {
  const x = (at: number) => (1000 * (at - begin)) / (now - begin);
  const y = (count: number) => 100 - (100 * count) / most;
  const below = samples.map(() => 0);
  return series.toReversed().map((name) => {
    const edge = () => samples.map(({ at }, i) => [x(at), y(below[i]!)] as const);
    const lower = edge();
    for (const [i, sample] of samples.entries()) below[i]! += countOf(sample, name);
    const outline = points([...edge(), ...lower.toReversed()]);
    return html`<polygon class="tone-${toneOf(name, series)}" points="${outline}" />`;
  });
}

/** How dark a version is in a chart. */
function toneOf(name: string, series: readonly string[]): number {
  return name === "other" ? CHARTED : series.indexOf(name);
}

/** How many devices were on which version, over time. */
function versionsChart(view: PageView, overview: FleetOverview): Markup {
  const { summary, span } = overview;
  const { now } = view;
  const samples = [
    ...overview.samples.filter(({ at }) => at < now),
    { at: now, versions: summary.versions },
  ];
  const names = chartedVersions(samples);
  const rest = (sample: FleetSample) => {
    const all = Object.values(sample.versions).reduce((sum, count) => sum + count, 0);
    return all - names.reduce((sum, name) => sum + devicesAt(sample, name), 0);
  };
  const series = samples.some((sample) => rest(sample) > 0) ? [...names, "other"] : names;
  const countOf = (sample: FleetSample, name: string) =>
    name === "other" ? rest(sample) : devicesAt(sample, name);
  const totals = samples.map((sample) =>
    series.reduce((sum, name) => sum + countOf(sample, name), 0),
  );
  const most = Math.max(1, ...totals);
  // The whole width, also while the fleet is younger than that.
  const begin = Math.min(samples[0]!.at, now - SAMPLING.hour.step);
  const areas = stackedAreas(samples, series, countOf, { begin, now, most });
  const legend = series.map((name) => {
    const count = countOf(samples.at(-1)!, name);
    return html`<li>
      <svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">
        <rect class="tone-${toneOf(name, series)}" width="10" height="10" />
      </svg>
      ${seriesName(name)} <b>${grouped(count)}</b>
    </li>`;
  });
  return html`<figure class="chart">
      <div class="plot">
        <span class="top">${grouped(most)}</span>
        <svg
          viewBox="0 0 1000 100"
          preserveAspectRatio="none"
          role="img"
          aria-label="Devices by version over ${SPAN_WORDS[span]}; the table below has the numbers"
        >
          ${areas}${[25, 50, 75].map((at) => html`<line class="grid" x1="0" x2="1000" y1="${at}" y2="${at}" />`)}
        </svg>
        <div class="axis">
          ${clockTime(begin, now)}${clockTime((begin + now) / 2, now)}<span>now</span>
        </div>
      </div>
      <ul class="legend">
        ${legend}
      </ul>
    </figure>
    ${samplesTable(view, samples, series, countOf)}`;
}

/** The numbers of that chart, not too many of them. */
function samplesTable(
  { now }: PageView,
  samples: readonly FleetSample[],
  series: readonly string[],
  countOf: (sample: FleetSample, name: string) => number,
): Markup {
  const stride = Math.ceil(samples.length / 12);
  const some = samples.toReversed().filter((_, i) => i % stride === 0);
  const heads = series.map((name) => columnHead(seriesName(name), "numbers"));
  const rows = some.map((sample) => {
    return html`<tr>
      <th scope="row">${clockTime(sample.at, now)}</th>
      ${series.map((name) => html`<td class="n">${grouped(countOf(sample, name))}</td>`)}
    </tr>`;
  });
  return html`<details id="versions-table">
    <summary>As a table</summary>
    ${wideTable("", [columnHead("Time"), ...heads], rows)}
  </details>`;
}

/** The heads of a number of devices, and of its bar. */
const BAR_HEADS = [columnHead("Devices", "numbers"), columnHead("Bar", "unseen")];

/** A bar in a table, beside the number that it shows. */
function bar(count: number, most: number, shape?: Shape): Markup {
  const width = count === 0 ? 0 : Math.max(0.7, (100 * count) / Math.max(1, most));
  const tone = shape ? `is-${shape}` : "tone-2";
  return html`<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
    <rect class="${tone}" width="${Number(width.toFixed(1))}" height="10" />
  </svg>`;
}

const SEEN_WORDS = ["1 min", "10 min", "1 h", "6 h", "1 day", "7 days", "30 days"];

/** When devices were last heard. */
function seenChart(seen: readonly number[]): Markup {
  const most = Math.max(...seen);
  const rows = seen.map((count, i) => {
    const words = SEEN_WORDS[i];
    const when = words === undefined ? "longer ago" : `within ${words}`;
    return html`<tr>
      <th scope="row">${when}</th>
      <td class="n">${grouped(count)}</td>
      <td class="fill">${bar(count, most)}</td>
    </tr>`;
  });
  return html`<table class="bars">
    <thead class="unseen">
      <tr>
        <th scope="col">Last seen</th>
        <th scope="col">Devices</th>
        <th scope="col">Bar</th>
      </tr>
    </thead>
    <tbody>
      ${rows}
    </tbody>
  </table>`;
}

/** Where devices fail or fall silent. */
function clustersChart(view: PageView, { clusters, summary }: FleetOverview): Markup {
  if (clusters.length === 0)
    return html`<p class="hint">No device that is offered a release has failed or is silent.</p>`;
  const most = Math.max(...clusters.map(({ devices }) => devices));
  const rows = clusters.map(({ state, version, model, devices }) => {
    const from = version === null ? html`no version` : brief(version);
    const link =
      version === null || model === null ? undefined : devicesLink(view, { state, version, model });
    return html`<tr>
      <td>${stateTag(state)}</td>
      <td>${link === undefined ? from : html`<a href="${link}">${from}</a>`}</td>
      <td>${model === null ? "–" : brief(model)}</td>
      <td class="n">${grouped(devices)}</td>
      <td class="fill">${bar(devices, most, state)}</td>
    </tr>`;
  });
  const heads = ["State", "Came from", "Model"].map((name) => columnHead(name));
  const { failed, silent } = summary.states;
  const rest = failed + silent - clusters.reduce((sum, { devices }) => sum + devices, 0);
  return html`${wideTable("bars", [...heads, ...BAR_HEADS], rows)}
  ${rest > 0 && html`<p class="hint">and ${many(rest, "device")} in smaller groups</p>`}`;
}

// ──── Costs on the page ──────────────────────────────────────────────────────────────────────────
// What a step costs on the air, worked out once, beside everything else.

/** What a step costs, for each kind of `AIR_DEVICES`, in bytes. */
type StepCost = { name: string; bytes: number }[];

/** What nobody has looked at for so long is not worked out, in milliseconds. */
const COSTS_WANTED = 10_000;

/** Bytes of memory for costs: some thousand steps. */
const MAX_COSTS = 4 << 20;

/** Costs of steps. */
class AirCosts {
  readonly #encoder = new Encoder();
  readonly #known = new Cache<StepCost>(MAX_COSTS);
  readonly #waiting = new Map<string, { asked: number; measure: () => Promise<StepCost> }>();
  #isBusy = false;

  /**
   * @param from what devices are on
   * @param to what they may have at most
   * @returns `undefined` while it is worked out
   */
  of(root: ReleaseRoot, from: string, to: NewestItems): StepCost | undefined {
    const here = root.find(from)?.id ?? from;
    const image = root.firmware.find(({ version }) => version.compare(from) === 0)?.sha256;
    const key = JSON.stringify([root.model, here, image, to.version?.id, to.image?.sha256]);
    const known = this.#known.get(key);
    if (known) return known;
    const asked = performance.now();
    const waiting = this.#waiting.get(key);
    if (waiting) waiting.asked = asked;
    else this.#waiting.set(key, { asked, measure: () => this.#measure(root, from, to) });
    if (!this.#isBusy) void this.#work();
    return undefined;
  }

  async #measure(root: ReleaseRoot, from: string, to: NewestItems): Promise<StepCost> {
    const costs: StepCost = [];
    for (const device of AIR_DEVICES) {
      const parts = await airCosts(root, from, "http://10.0.0.1:8000", this.#encoder, device, to);
      costs.push({ name: device.name, bytes: parts.reduce((sum, { size }) => sum + size, 0) });
    }
    return costs;
  }

  /** One at a time: requests of devices come first. */
  async #work(): Promise<void> {
    this.#isBusy = true;
    for (let next; (next = this.#waiting.entries().next().value);) {
      const [key, { asked, measure }] = next;
      // What cannot be read now is tried again when somebody looks again.
      if (performance.now() - asked < COSTS_WANTED) {
        await measure().then(
          (cost) => this.#known.set(key, cost, 64 * cost.length),
          () => {},
        );
      }
      this.#waiting.delete(key);
    }
    this.#isBusy = false;
  }
}

/** A step's costs in words. */
function costText(cost: StepCost | undefined): Markup {
  if (!cost) return html`<span class="hint">being worked out</span>`;
  const parts = cost.map(({ name, bytes }) => {
    const messages = Math.ceil(bytes / LORA_BYTES);
    return html`${name} ${formatBytes(bytes)}
      <span class="hint" title="LoRa messages of ${LORA_BYTES} bytes"
        >(${grouped(messages)} msg)</span
      >`;
  });
  return html`${parts.map((part, i) => [i > 0 && " · ", part])}`;
}

// ──── Fleet glance ───────────────────────────────────────────────────────────────────────────────
// What the first view is made from, and what follows from that for more than one part of it.

/** What the first view is made from. */
interface FleetGlance {
  releases: Releases;
  rollouts: readonly Rollout[];
  /** Whether a new version gets a rollout by itself. */
  isStaged: boolean;
  /** The devices of each root. */
  groups: ReadonlyMap<ReleaseRoot, readonly FleetGroup[]>;
  /** Absent: the store does not answer, for this reason. */
  overview: FleetOverview | undefined;
  problem: string | undefined;
  costs: AirCosts;
  /** What devices begin their requests with. */
  base: string;
  /** The model whose releases are shown alone, and the id of the rollout that is. */
  model: string | undefined;
  rollout: string | undefined;
}

function hasReleases({ roots }: Releases): boolean {
  return roots.some(({ versions, firmware }) => versions.length + firmware.length > 0);
}

/** Whether what a rollout is about is among the releases. */
function isAmong(releases: Releases, which: Pick<Rollout, "version" | "model">): boolean {
  return rolloutDigest(which, releases) !== null;
}

/** Whether a rollout is of a release of a root; names of models have no case. */
function isOfRelease({ version, model }: Rollout, root: ReleaseRoot, name: string): boolean {
  return asciiLower(model ?? "") === asciiLower(root.model) && isSameRelease(version, name);
}

/** The newest version and the newest image of a root, if devices that it is for are below it. */
function missedReleases({ groups }: FleetGlance, root: ReleaseRoot): string[] {
  const own = groups.get(root) ?? [];
  const isMissed = (name: string, on: (group: FleetGroup) => string | null) => {
    const newest = new LooseVersion(name);
    return own.some((group) => newest.compare(on(group) ?? "") > 0);
  };
  const [version, image] = [root.versions.at(-1)?.name, root.firmware.at(-1)?.name];
  const missed = new Set<string>();
  // Of what only tells its firmware, that counts.
  if (version && isMissed(version, (one) => one.version ?? one.firmware)) missed.add(version);
  if (image && isMissed(image, (one) => one.firmware ?? one.version)) missed.add(image);
  return [...missed];
}

/** Why devices that are behind are not offered the newest release, although no rollout goes on. */
function heldBack(glance: FleetGlance): Markup | undefined {
  const reasons = glance.releases.roots.flatMap((root) => {
    return missedReleases(glance, root).flatMap((name) => {
      return heldBackText(glance.rollouts.find((one) => isOfRelease(one, root, name))) ?? [];
    });
  });
  return reasons.length === 0 ? undefined : html`${reasons.slice(0, 3)}`;
}

function heldBackText(last: Rollout | undefined): Markup | undefined {
  if (!last) return undefined;
  const name = said(rolloutName(last));
  const next = "Start another rollout of it, or publish a later version. ";
  if (last.state === "aborted") {
    return html`${name} was aborted: nobody is offered it any more. ${next}`;
  }
  if (last.state !== "done" || last.only.length === 0) return undefined;
  const only = brief(last.only.map((pair) => pair.join("=")).join(" "), 80);
  return html`${name} went to some devices alone (${only}), and is offered to no others. ${next}`;
}

// ──── Rollouts on the page ────────────────────────────────────────────────────────────────────────
// A rollout as a bar, what can be done with it, and the form that starts one.

const ROLLOUT_SHAPES: Record<RolloutState, Shape> = {
  waiting: "behind",
  running: "offered",
  paused: "paused",
  halted: "failed",
  done: "current",
  aborted: "failed",
};

/** The parts of a rollout, in the order of its bar. */
function rolloutParts(rollout: Rollout): { shape: Shape; word: string; count: number }[] {
  const { proven, offered, failed, silent_devices: silent, acknowledged, eligible } = rollout;
  const toCome = Math.max(0, eligible - proven - offered - failed - silent - acknowledged);
  return [
    { shape: "current", word: "proven", count: proven },
    { shape: "offered", word: "on their way", count: offered },
    { shape: "failed", word: "failed", count: failed },
    { shape: "silent", word: "silent", count: silent },
    ...(acknowledged > 0
      ? [{ shape: "paused" as const, word: "bad before it was resumed", count: acknowledged }]
      : []),
    { shape: "behind", word: "still to come", count: toCome },
  ];
}

function rolloutBar(rollout: Rollout): Markup {
  const parts = rolloutParts(rollout);
  const whole = Math.max(
    1,
    parts.reduce((sum, { count }) => sum + count, 0),
  );
  let x = 0;
  const rects = parts.map(({ shape, count }, i) => {
    // A single one is seen, however many there are; the last takes what is left.
    const width =
      i === parts.length - 1 ? 1000 - x : Math.max(count > 0 ? 6 : 0, (985 * count) / whole);
    const rect = html`<rect
      class="is-${shape}"
      x="${Number(x.toFixed(1))}"
      width="${Number(Math.max(0, width).toFixed(1))}"
      height="10"
    />`;
    x += width;
    return rect;
  });
  const legend = parts.map(({ shape, word, count }) => {
    return html`<li${count === 0 && html` class="none"`}>${mark(shape)} <b>${grouped(count)}</b> ${word}</li>`;
  });
  return html`<svg
      class="progress"
      viewBox="0 0 1000 10"
      preserveAspectRatio="none"
      aria-hidden="true"
    >
      ${rects}
    </svg>
    <ul class="legend">
      ${legend}
    </ul>`;
}

/** The rules that a rollout goes by, in words. */
function rolloutRules(rollout: Rollout): string {
  const { first, soak, silent, tolerance, window, only, advanced, pause_at: pauses } = rollout;
  const rules = [
    advanced
      ? "open to all of its devices at once"
      : `first ${grouped(first)}, then as many again as are proven`,
    soak > 0 ? `proven after ${durationText(soak)} on it` : "proven once on it",
    `silent after ${durationText(silent)}`,
    `halts when one is bad and none proven, or more are than ${percentText(tolerance)} explains`,
  ];
  if (pauses.length > 0) rules.push(`pauses at ${pauses.map(percentText).join(", ")}`);
  if (only.length > 0)
    rules.push(`only ${only.map(([key, value]) => `${key}=${value}`).join(" ")}`);
  if (window !== null) rules.push(`offers within ${windowText(window)}`);
  return rules.join(" · ");
}

/** What can be done with a rollout now. */
function actionsOf(rollout: Rollout): RolloutAction[] {
  const { state, advanced } = rollout;
  // One that runs is resumed for the sake of bad devices only.
  const isIdle = state === "running" && openBadOf(rollout) === 0;
  const isVain: Partial<Record<RolloutAction, boolean>> = { resume: isIdle, advance: advanced };
  return ROLLOUT_ACTIONS.filter((action) => ACTIONS[action].includes(state) && !isVain[action]);
}

const ACTION_WORDS: Record<RolloutAction, string> = {
  pause: "Pause",
  resume: "Resume",
  advance: "Advance…",
  abort: "Abort…",
};

/** What comes of an action that asks first. */
const ACTION_EFFECTS: Partial<Record<RolloutAction, string>> = {
  advance:
    "It then goes at once to every device that it is for (within its window, if it has one), " +
    "whether or not those before have proven it.",
  abort: "It then goes to no device any more, for good. Devices that are on it stay on it.",
};

/** Which rollout a form is about, and what was seen of it. */
function seenFields({ id, changed, went_bad }: Rollout): Markup[] {
  return [hidden("id", id), hidden("changed", `${changed}`), hidden("went-bad", `${went_bad}`)];
}

function rolloutButtons(view: PageView, rollout: Rollout): Markup {
  const buttons = actionsOf(rollout).map((action) => {
    const button = html`${seenFields(rollout)}<button name="action" value="${action}">
        ${ACTION_WORDS[action]}<span class="unseen"> ${rolloutName(rollout)}</span>
      </button>`;
    const path = `${view.up}rollouts/change`;
    if (!ACTION_EFFECTS[action]) return changeForm(view, path, button, { key: action });
    return html`<form action="${path}" data-key="${action}">${button}</form>`;
  });
  return html`<div class="buttons">${buttons}</div>`;
}

/** The bad devices of a rollout, each a link. @param most of them at most */
function badList(view: PageView, rollout: Rollout, most: number): Markup | undefined {
  const { bad } = rollout;
  if (bad.length === 0) return undefined;
  const items = bad.slice(0, most).map((device) => {
    const { id, standing, name, model } = device;
    const what = [model !== null && cut(model, 24), html`on ${cut(onText(device), 24)}`];
    return html`<li>
      ${stateTag(standing)} <a href="${deviceLink(view, id)}">${cut(name ?? id, 40)}</a>
      <span class="hint">${what[0] && [what[0], ", "]}${what[1]}</span>
    </li>`;
  });
  const more = unnamedBad(rollout) + bad.length - items.length;
  return html`<ul class="bad" aria-label="Bad devices">
    ${items}${more > 0 && html`<li class="hint">and ${grouped(more)} more</li>`}
  </ul>`;
}

/** @param bad devices that are named at most */
function rolloutItem(
  view: PageView,
  { releases }: FleetGlance,
  rollout: Rollout,
  bad: number,
): Markup {
  const { state, reason, changed, id } = rollout;
  const isGone = state !== "waiting" && !isAmong(releases, rollout);
  return html`<article class="rollout" data-key="rollout-${id}">
    <h3>
      ${said(rolloutName(rollout))} ${stateTag(ROLLOUT_SHAPES[state], state)}
      <span class="hint">since ${clockTime(changed, view.now)}</span>
    </h3>
    ${rolloutBar(rollout)} ${reason !== null && html`<p class="reason">${said(reason)}</p>`}
    ${isGone && html`<p class="reason">It is not among the releases any more: nobody is offered it.</p>`}
    ${badList(view, rollout, bad)}
    <p>${rolloutProof(rollout)}.</p>
    <p class="hint">${cut(rolloutRules(rollout), 500)}</p>
    ${rolloutButtons(view, rollout)}
  </article>`;
}

/** What happens while no rollout is under way. */
function withoutRollout(glance: FleetGlance): Markup | string {
  if (glance.isStaged) return "A new version gets one by itself.";
  if (!hasReleases(glance.releases)) return "Once there is a release, one can be started there.";
  const next = "To go step by step, start one at a release below.";
  return heldBack(glance) ?? `Devices get the newest release when they next ask. ${next}`;
}

/** Rollouts that go on, and are shown whole or in a line at most: what needs a person first. */
const ROLLOUT_CARDS = 8;
const ROLLOUT_LINES = 60;
const ROLLOUT_URGENCY = ["halted", "paused", "troubled", "running", "waiting"];

/** All rollouts: those that go on, and the last ones that are over. */
function rolloutsSection(view: PageView, glance: FleetGlance): Markup {
  const { rollouts } = glance;
  const urgency = (one: Rollout) => {
    const isTroubled = one.state === "running" && openBadOf(one) > 0;
    return ROLLOUT_URGENCY.indexOf(isTroubled ? "troubled" : one.state);
  };
  const open = rollouts
    .filter(({ state }) => isGoing(state))
    .toSorted((a, b) => urgency(a) - urgency(b));
  const chosen = rollouts.find(({ id }) => id === glance.rollout);
  const cards = chosen ? [chosen] : open.slice(0, ROLLOUT_CARDS);
  const over = rollouts.filter(({ state }) => !isGoing(state)).slice(0, 5);
  const others = open.filter((one) => !cards.includes(one)).slice(0, ROLLOUT_LINES);
  const lines = chosen ? [] : [...others, ...over];
  const more = open.length - cards.length - others.length;
  const bad = cards.length > 3 ? 3 : MAX_BAD;
  const none = html`<p class="hint">No rollout is under way. ${withoutRollout(glance)}</p>`;
  return html`<section aria-labelledby="rollouts">
    <h2 id="rollouts">Rollouts</h2>
    ${cards.length > 0 ? cards.map((one) => rolloutItem(view, glance, one, bad)) : none}
    ${
      lines.length > 0 &&
      html`<ul class="past">
        ${lines.map((one) => rolloutLine(view, one))}
      </ul>`
    }
    ${!chosen && more > 0 && html`<p class="hint">and ${many(more, "rollout")} more: <code>ota.ts rollout</code></p>`}
    ${chosen && html`<p><a href="${view.up}">All rollouts</a></p>`}
  </section>`;
}

/** A rollout that is over, or one of many. */
function rolloutLine(view: PageView, rollout: Rollout): Markup {
  const { state, changed, proven, eligible, id } = rollout;
  const bad = badOf(rollout);
  return html`<li data-key="rollout-${id}">
    <a href="${view.up}?rollout=${id}">${said(rolloutName(rollout))}</a>
    ${stateTag(ROLLOUT_SHAPES[state], state)}
    <span class="hint"
      >${clockTime(changed, view.now)}, ${grouped(proven)} of ${grouped(eligible)}
      proven${bad > 0 && `, ${grouped(bad)} bad`}</span
    >
    ${badList(view, rollout, 3)}
  </li>`;
}

// ──── Rollout forms ──────────────────────────────────────────────────────────────────────────────
// What asks before a rollout is changed, and what starts one: it shows who will be hit before it begins.

/** Asks before a rollout is advanced or aborted. */
function askPage(view: PageView, rollout: Rollout, action: RolloutAction): Page {
  const word = ACTION_WORDS[action].replace("…", "");
  const fields = [...seenFields(rollout), hidden("action", action)];
  const buttons = html`${fields}<button class="main">${word} it</button>
    <a class="button" href="${view.up}">Leave it as it is</a>`;
  return {
    title: `${word} ${rollout.version}?`,
    at: "fleet",
    main: html`<section class="lead">
        <h1>${word} the rollout of ${said(rolloutName(rollout))}?</h1>
        <p>${ACTION_EFFECTS[action] ?? ""}</p>
      </section>
      <section>
        ${rolloutBar(rollout)}
        ${changeForm(view, `${view.up}rollouts/change`, html`<div class="buttons">${buttons}</div>`)}
      </section>`,
  };
}

/** A rollout as the form has it: texts, as they were typed. */
type RolloutFields = Partial<
  Record<(typeof ROLLOUT_FIELDS)[number]["name"] | "version" | "model", string>
>;

const ROLLOUT_FIELDS = [
  {
    name: "first",
    label: "First devices",
    value: `${ROLLOUT_DEFAULTS.first}`,
    hint: "then as many again as are proven",
  },
  {
    name: "soak",
    label: "Soak",
    value: typedDuration(ROLLOUT_DEFAULTS.soak),
    hint: "on the release before it counts as proven, such as 10m",
  },
  {
    name: "silent",
    label: "Silent after",
    value: typedDuration(ROLLOUT_DEFAULTS.silent),
    hint: "without a word since the offer",
  },
  {
    name: "tolerance",
    label: "Tolerance",
    value: typedShare(ROLLOUT_DEFAULTS.tolerance),
    hint: "of its devices; more bad ones than that explains halt it",
  },
  {
    name: "pause-at",
    label: "Pause at",
    value: ROLLOUT_DEFAULTS.pauseAt.map(typedShare).join(", "),
    hint: "of the devices; empty: nowhere",
  },
  {
    name: "only",
    label: "Only",
    value: "",
    hint: "KEY=VALUE: a label, model or version; separated by commas",
  },
  {
    name: "window",
    label: "Window",
    value: "",
    hint: "when it is offered: 22:00-06:00 Europe/Berlin; without a zone, UTC",
  },
] as const;

/** Who will be hit, before it begins. */
function targetsTable(targets: readonly RolloutTarget[]): Markup {
  const all = targets.reduce((sum, { devices }) => sum + devices, 0);
  if (all === 0) {
    return html`<p class="hint">
      No device would get it: none that it is for was heard in the last 30 days and is on an older
      version.
    </p>`;
  }
  const rows = targets.slice(0, 20).map((target) => {
    const { model, devices } = target;
    return html`<tr>
      <td>${model === null ? "no model" : brief(model)}</td>
      <td>${brief(onText(target))}</td>
      <td class="n">${grouped(devices)}</td>
      <td class="fill">${bar(devices, all)}</td>
    </tr>`;
  });
  return html`<p class="total"><b>${many(all, "device")}</b> would get it.</p>
    ${wideTable("bars", [columnHead("Model"), columnHead("On version"), ...BAR_HEADS], rows)}
    ${targets.length > 20 && html`<p class="hint">and ${grouped(targets.length - 20)} more groups</p>`}`;
}

/** The form that starts a rollout; it can be sent to see who will be hit, and to begin. */
function startPage(
  view: PageView,
  fields: RolloutFields,
  targets: Markup,
  { isThere, problem }: { isThere: boolean; problem?: Problem | undefined },
): Page {
  const { version = "", model = "" } = fields;
  const inputs = ROLLOUT_FIELDS.map(({ name, label, value, hint }) => {
    return html`<div class="field">
      <label for="${name}">${label}</label
      ><input
        id="${name}"
        name="${name}"
        value="${fields[name] ?? value}"
        autocomplete="off"
        aria-describedby="${name}-hint"
      /><span class="hint" id="${name}-hint">${hint}</span>
    </div>`;
  });
  const action = `${view.up}rollouts`;
  return {
    ...(problem && { status: problem.status }),
    title: `Roll out ${version}`,
    at: "fleet",
    main: html`<section class="lead">
        <h1>Roll out ${said(rolloutName({ version, model: model || null }))}</h1>
        ${!isThere && html`<p>It is not among the releases: its rollout waits until it is.</p>`}
        ${problem && problemText(problem.text)}
      </section>
      <form class="columns" action="${action}/new">
        <section aria-labelledby="how">
          <h2 id="how">How</h2>
          ${hidden("version", version)}${hidden("model", model)}
          <div class="fields">${inputs}</div>
        </section>
        <section aria-labelledby="who">
          <h2 id="who">Who will be hit</h2>
          ${targets}
          <div class="buttons">
            <button>Look again</button>
            <button
              class="main"
              formmethod="post"
              formaction="${action}"
              name="proof"
              value="${view.proof}"
            >
              Start the rollout
            </button>
          </div>
        </section>
      </form>`,
  };
}

// ──── Releases on the page ────────────────────────────────────────────────────────────────────────
// The releases of each root: what they are, what is wrong with them, and what they cost on the air.

/** Versions that costs are shown from at most: for the newest release, and for others. */
const COSTED = { newest: 10, others: 3 };
/** Releases that are listed at most, the newest first: of a root, of all together, and of each. */
const LISTED = { root: 20, all: 40, least: 3 };
/** Roots of models that are shown at most; others one by one. */
const SHOWN_ROOTS = 12;
/** Warnings that are listed at most, for each release. */
const WARNED = 5;

/** What `manifest` warns of, as far as it was found. */
interface FoundWarnings {
  /** What a root was when they were looked for. */
  of: string;
  /** About no release that is offered. */
  others: string[];
  releases: Map<string, string[]>;
}

/** What the releases of a root are shown with. */
interface RootGlance extends FleetGlance {
  root: ReleaseRoot;
  /** How many of its releases are listed. */
  listed: number;
  /** How many devices that it is for are on which of its releases, the most first. */
  on: Map<string, number>;
  warnings: FoundWarnings;
}

/** Warnings of a root are looked for once for what is in it. */
const foundWarnings = new WeakMap<readonly Release[], FoundWarnings>();

function warningsOf(root: ReleaseRoot): FoundWarnings {
  const own = findWarnings(root);
  const of = JSON.stringify(own);
  const known = foundWarnings.get(root.versions);
  if (known?.of === of) return known;
  const byRelease = Map.groupBy(own, ({ of: release }) => release);
  const texts = [...byRelease].map(([name, all]) => [name, all.map(({ text }) => text)] as const);
  const releases = new Map(
    texts.flatMap(([name, all]) => (name === undefined ? [] : [[name, all]])),
  );
  const others = texts.find(([name]) => name === undefined)?.[1] ?? [];
  const found: FoundWarnings = { of, others, releases };
  foundWarnings.set(root.versions, found);
  // Files are many: what concerns boards comes a moment later.
  void findStepWarnings(root, found).catch(() => {});
  return found;
}

/** Adds what boards cannot do on their way to each release that is listed. */
async function findStepWarnings(root: ReleaseRoot, { releases }: FoundWarnings): Promise<void> {
  for (const { name, version } of root.versions.slice(-LISTED.root).toReversed()) {
    const steps = await warningsOfSteps(root, itemsUpTo(root, version));
    const froms = new Map<string, string[]>();
    for (const { from, lines } of steps) {
      for (const line of lines) froms.set(line, [...(froms.get(line) ?? []), from]);
    }
    const texts = [...froms].map(([line, all]) => {
      const more = all.length > 3 ? ` and ${all.length - 3} more` : "";
      return `from ${all.slice(-3).join(", ")}${more}: ${line}`;
    });
    if (texts.length > 0) releases.set(name, [...(releases.get(name) ?? []), ...texts]);
  }
}

function warningsList(lines: readonly string[], key: string): Markup | undefined {
  if (lines.length === 0) return undefined;
  const rest = lines.length - WARNED;
  return html`<details class="warnings" data-key="${key}">
    <summary>${mark("silent")} ${many(lines.length, "warning")}</summary>
    <ul>
      ${lines.slice(0, WARNED).map((line) => html`<li>${said(line)}</li>`)}
      ${rest > 0 && html`<li class="hint">and ${grouped(rest)} more</li>`}
    </ul>
  </details>`;
}

/** See `RootGlance`. What only tells its firmware is on the release of that version. */
function devicesOn(root: ReleaseRoot, { groups }: FleetGlance): RootGlance["on"] {
  const counts = new Map<string, number>();
  for (const { version, firmware, devices } of groups.get(root) ?? []) {
    const name = version ?? firmware ?? "";
    const isThere = ({ version: one }: FirmwareImage) => one.compare(name) === 0;
    const known = root.find(name) ?? root.firmware.find(isThere);
    if (known) counts.set(known.name, (counts.get(known.name) ?? 0) + devices);
  }
  return new Map([...counts].sort(([, a], [, b]) => b - a));
}

/** What a release costs from where devices are. */
function costsList(
  { root, on, costs }: RootGlance,
  name: string,
  most: number,
): Markup | undefined {
  const target = new LooseVersion(name);
  const from = [...on].filter(([one]) => target.compare(one) > 0);
  if (from.length === 0) return undefined;
  const to = itemsUpTo(root, target);
  const rows = from.slice(0, most).map(([one, count]) => {
    return html`<li>
      from ${said(one)} <span class="hint">(${many(count, "device")})</span>:
      ${costText(costs.of(root, one, to))}
    </li>`;
  });
  const rest = from.slice(most).reduce((sum, [, count]) => sum + count, 0);
  return html`<ul class="costs">
    ${rows} ${rest > 0 && html`<li class="hint">and from others (${many(rest, "device")})</li>`}
  </ul>`;
}

function signatureText(root: ReleaseRoot, version: string | null): Markup {
  const release = version === null ? undefined : root.find(version);
  if (release && root.isSigned(release)) return html`${mark("current")} signed`;
  return html`<span class="hint">not signed</span>`;
}

/** The form that starts a rollout, unless one of that version is going on. */
function rolloutStart(
  { up }: PageView,
  { root, overview, rollouts }: RootGlance,
  name: string,
): Markup | undefined {
  const { model } = root;
  const isGoingOn = rollouts.some((one) => {
    return isGoing(one.state) && isOfRelease(one, root, name);
  });
  if (!overview || isGoingOn) return undefined;
  return html`<form action="${up}rollouts/new">
    ${hidden("version", name)}${hidden("model", model)}<button>
      Roll out…<span class="unseen"> ${rolloutName({ version: name, model: model || null })}</span>
    </button>
  </form>`;
}

/** How many devices are on a release; beyond what groups there are room for, at least so many. */
function countText({ overview }: FleetGlance, count: number): string {
  if (!overview) return "–";
  return `${overview.groups.length < MAX_LISTED_GROUPS ? "" : "≥ "}${grouped(count)}`;
}

function releaseRow(
  view: PageView,
  glance: RootGlance,
  { version, files, bytes, firmware }: ListedRelease,
  isNewest: boolean,
): Markup {
  const { root, on } = glance;
  const name = version ?? firmware!;
  const what = [
    version !== null && many(files, "file"),
    version !== null && firmware !== null && " and firmware",
    ` ${formatBytes(bytes)}`,
  ];
  const costs = costsList(glance, name, isNewest ? COSTED.newest : COSTED.others);
  const warnings = warningsList(glance.warnings.releases.get(name) ?? [], "warnings");
  const folded =
    costs &&
    html`<details data-key="costs">
      <summary>On the air</summary>
      ${costs}
    </details>`;
  return html`<tr data-key="release-${name}">
      <th scope="row">
        ${version === null && "firmware "}${brief(name)}${isNewest && html` <span class="tag">newest</span>`}
      </th>
      <td>${what}</td>
      <td>${signatureText(root, version)}</td>
      <td class="n">${countText(glance, on.get(name) ?? 0)}</td>
      <td>${rolloutStart(view, glance, name)}</td>
    </tr>
    ${
      (costs ?? warnings) &&
      html`<tr class="more">
        <td colspan="5">${isNewest ? costs : folded}${warnings}</td>
      </tr>`
    }`;
}

function releasesSection(view: PageView, glance: RootGlance): Markup {
  const { root, listed: most } = glance;
  const listed = listReleases({ roots: [root] }).toReversed();
  const { others } = glance.warnings;
  if (listed.length + others.length === 0) return html``;
  const id = `releases-${encodeURIComponent(root.model)}`;
  const rows = listed.slice(0, most).map((one, i) => releaseRow(view, glance, one, i === 0));
  const heads = [
    ...["Version", "Content", "Signature"].map((name) => columnHead(name)),
    ...[columnHead("Devices", "numbers"), columnHead("Rollout", "unseen")],
  ];
  const rest = listed.length - most;
  return html`<section aria-labelledby="${id}">
    <h2 id="${id}"><span>Releases${root.model !== "" && html` for ${said(root.model)}`}</span></h2>
    ${rows.length > 0 && wideTable("releases", heads, rows)}
    ${rest > 0 && html`<p class="hint">and ${grouped(rest)} older ones</p>`}
    ${warningsList(others, `${id}-warnings`)}
  </section>`;
}

/** The releases of all roots, or of one. */
function releasesSections(view: PageView, glance: FleetGlance): Markup {
  const { model } = glance;
  const roots = glance.releases.roots.filter((root) => model === undefined || root.model === model);
  const shown = roots.slice(0, SHOWN_ROOTS);
  const share = Math.floor(LISTED.all / Math.max(1, shown.length));
  const listed = Math.min(LISTED.root, Math.max(LISTED.least, share));
  const sections = shown.map((root) => {
    const on = devicesOn(root, glance);
    return releasesSection(view, { ...glance, root, listed, on, warnings: warningsOf(root) });
  });
  const links = roots.slice(SHOWN_ROOTS).map((root) => {
    return html` <a href="${view.up}?model=${encodeURIComponent(root.model)}"
      >${brief(root.model)}</a
    >`;
  });
  const all = model !== undefined && html`<p><a href="${view.up}">Releases for all models</a></p>`;
  return html`${sections}${all}${links.length > 0 && html`<p class="hint">Releases for${links}</p>`}`;
}

// ──── Fleet view ──────────────────────────────────────────────────────────────────────────────────
// The first view: how things stand, in one sentence; and what stands behind it.

/** How things stand. */
interface FleetStanding {
  shape: Shape;
  sentence: Markup;
  /** What to do next. */
  next?: Markup;
}

/** How things stand: the most urgent alone. */
function standingOf(view: PageView, glance: FleetGlance): FleetStanding {
  const { releases, overview, problem, rollouts, base } = glance;
  if (!overview) {
    const next = html`${said(problem ?? "")}. Devices are served meanwhile, and what they say is
    kept until it answers.`;
    return { shape: "failed", sentence: html`The fleet's store does not answer`, next };
  }
  const { devices } = overview.summary;
  const halted = rollouts.find(({ state }) => state === "halted");
  if (halted) return haltedStanding(view, halted, glance);
  const moving = movingStanding(view, glance, overview);
  if (moving) return moving;
  if (!hasReleases(releases)) {
    const next = html`Put the files of each version into a directory named by it, such as
      <code>1.0.0/flash/main.py</code>, in <code>${said(releases.root)}</code>: it is offered as
      soon as it has settled, without a restart.`;
    return {
      shape: "behind",
      sentence: html`There is no release ${devices > 0 ? "any more" : "yet"}`,
      next,
    };
  }
  if (devices === 0) {
    const next = html`Let one ask for <code>${base}/manifest.json</code>; with a directory as a
      device: <code>bun ota.ts client --server ${base} --root ./device</code>. It shows up here
      within two seconds.`;
    return { shape: "behind", sentence: html`No device has asked yet`, next };
  }
  return settledStanding(view, glance, overview);
}

function haltedStanding(
  { now }: PageView,
  rollout: Rollout,
  { rollouts, overview }: FleetGlance,
): FleetStanding {
  const { reason, changed, bad } = rollout;
  const name = said(rolloutName(rollout));
  return {
    shape: "failed",
    sentence: html`Halted at ${clockTime(changed, now)}:
    ${name}${reason !== null && html`, ${said(reason)}`}`,
    next: html`It waits for you: ${bad.length > 0 && "look at its devices below, then "}resume or
    abort it. ${othersText(rollout, rollouts)} ${overview && leavingMarkup(overview.summary, now)}`,
  };
}

/** That other rollouts wait for the operator as well. */
function othersText(one: Rollout, rollouts: readonly Rollout[]): Markup | undefined {
  const waiting = rollouts.filter(({ state }) => state === "halted" || state === "paused");
  const others = waiting.filter(({ id }) => id !== one.id).length;
  if (others === 0) return undefined;
  return html`${many(others, "other rollout")} ${others === 1 ? "waits" : "wait"} for you, too. `;
}

/** Whether the van may leave: what still goes on, and until when that is not known to be bad. */
function leavingMarkup({ states: { offered }, silent_at }: FleetSummary, now: number): Markup {
  if (offered === 0) return html`May I leave? Yes: no board is installing.`;
  const boards = html`${many(offered, "board")} ${offered === 1 ? "is" : "are"} still installing`;
  const until =
    silent_at !== null &&
    html`; ${offered > 1 ? "the last one" : "it"} counts as silent at
    ${clockTime(wholeMinute(silent_at), now)}`;
  return html`May I leave? ${boards}${until}.`;
}

/** While a rollout goes on. */
function movingStanding(
  { now }: PageView,
  { rollouts, releases }: FleetGlance,
  { summary }: FleetOverview,
): FleetStanding | undefined {
  const paused = rollouts.find(({ state }) => state === "paused");
  const running = rollouts.filter(({ state }) => state === "running");
  const troubled = running.find((one) => openBadOf(one) > 0);
  const waiting = rollouts.find(({ state }) => state === "waiting");
  const one = paused ?? troubled ?? running[0] ?? waiting;
  if (!one) return undefined;
  const { proven, eligible, changed, reason } = one;
  const name = said(rolloutName(one));
  const done = html`${grouped(proven)} of ${many(eligible, "device")} proven`;
  const leave = leavingMarkup(summary, now);
  if (one !== waiting && !isAmong(releases, one)) {
    const sentence = html`${name} is not among the releases any more: ${done}`;
    const next = html`Its rollout stands still until it is back: abort it, or put it back. ${leave}`;
    return { shape: "silent", sentence, next };
  }
  if (one === paused) {
    return {
      shape: "paused",
      sentence: html`Paused at ${clockTime(changed, now)}: ${name}, ${done}`,
      next: html`It goes on when you resume it. ${othersText(one, rollouts)}${leave}`,
    };
  }
  if (one === waiting) {
    const sentence = isAmong(releases, one)
      ? html`The rollout of ${name} is about to begin`
      : html`The rollout of ${name} waits until that is among the releases`;
    return { shape: "behind", sentence, next: leave };
  }
  return {
    shape: one === troubled ? "silent" : "offered",
    sentence: html`${name} is on its way: ${done}${reason !== null && html`; ${said(reason)}`}`,
    next: leave,
  };
}

/** While no rollout needs or has anybody's attention. */
function settledStanding(
  view: PageView,
  glance: FleetGlance,
  { summary }: FleetOverview,
): FleetStanding {
  const { devices, states, versions } = summary;
  const { failed, silent, offered, behind } = states;
  const leave = offered > 0 && leavingMarkup(summary, view.now);
  if (failed + silent > 0) {
    const state = failed > 0 ? "failed" : "silent";
    const parts = [
      failed > 0 && html`${grouped(failed)} failed`,
      failed > 0 && silent > 0 && html`, `,
      silent > 0 && html`${grouped(silent)} ${silent === 1 ? "is" : "are"} silent`,
    ];
    const look = html`<a href="${devicesLink(view, { state })}">Look at them</a> first.`;
    const sentence = html`${parts}, of ${many(devices, "device")}`;
    return { shape: state, sentence, next: html`${look} ${leave}` };
  }
  if (leave) {
    const next = html`What was offered a release has not come back on it yet.`;
    return { shape: "offered", sentence: leave, next };
  }
  if (behind > 0) {
    const is = behind === 1 ? "is" : "are";
    const which =
      devices === 1 ? "The one device" : `${grouped(behind)} of ${grouped(devices)} devices`;
    const next = heldBack(glance) ?? html`What there is for them they get at their next visit.`;
    return { shape: "behind", sentence: html`${which} ${is} on an older release`, next };
  }
  const [only, ...others] = Object.keys(versions);
  const where =
    only !== undefined && others.length === 0 && only !== "none"
      ? said(only)
      : html`the newest release that they may have`;
  const all = devices === 1 ? "The one device is" : `All ${many(devices, "device")} are`;
  return { shape: "current", sentence: html`${all} on ${where}` };
}

function standingSection(view: PageView, glance: FleetGlance): Markup {
  const { shape, sentence, next } = standingOf(view, glance);
  const { summary } = glance.overview ?? {};
  const bad = glance.rollouts
    .filter(({ state }) => isGoing(state))
    .reduce((sum, one) => sum + openBadOf(one), 0);
  const inRollouts =
    bad > 0 &&
    html`<li>
      <a href="#rollouts">${mark("failed")} <b>${grouped(bad)}</b> bad in rollouts</a>
    </li>`;
  const counts =
    summary &&
    summary.devices > 0 &&
    URGENCY.map((state) => {
      const count = summary.states[state];
      return html`<li>
        <a
          href="${devicesLink(view, { state })}"
          ${count === 0 && html` class="none"`}
          title="${STATE_WORDS[state]}"
          >${mark(state)} <b>${grouped(count)}</b> ${state}</a
        >
      </li>`;
    });
  return html`<section class="lead">
    <h1>${mark(shape)} ${sentence}</h1>
    ${next && html`<p>${next}</p>`}
    ${
      counts &&
      html`<ul class="counts" aria-label="Devices by state">
        ${counts}${inRollouts}
      </ul>`
    }
  </section>`;
}

function spanLinks({ up }: PageView, { span }: FleetOverview): Markup {
  const links = (Object.keys(SAMPLING) as FleetSpan[]).map((name) => {
    return html`<a href="${up}?span=${name}" ${name === span && html` aria-current="true"`}
      >${name}</a
    >`;
  });
  return html`<span class="spans" role="group" aria-label="How far back">${links}</span>`;
}

function fleetPage(view: PageView, glance: FleetGlance): Page {
  const { overview } = glance;
  const hasDevices = overview && overview.summary.devices > 0;
  const charts =
    hasDevices &&
    html`<section aria-labelledby="versions">
        <h2 id="versions">Versions over time ${spanLinks(view, overview)}</h2>
        ${versionsChart(view, overview)}
      </section>
      <div class="columns">
        <section aria-labelledby="clusters">
          <h2 id="clusters">Where devices fail or fall silent</h2>
          ${clustersChart(view, overview)}
        </section>
        <section aria-labelledby="seen">
          <h2 id="seen">Last seen</h2>
          ${seenChart(overview.seen)}
        </section>
      </div>`;
  return {
    ...(!overview && { status: 503 }),
    title: "Fleet",
    at: "fleet",
    isLive: true,
    main: html`${standingSection(view, glance)} ${overview && rolloutsSection(view, glance)}
    ${charts} ${releasesSections(view, glance)}`,
  };
}

// ──── Device list ────────────────────────────────────────────────────────────────────────────────
// The devices: what needs a person first.

/** Devices on a page. */
const LISTED_DEVICES = 50;

function deviceItem(view: PageView, device: FleetDevice): Markup {
  const { id, name, model, state, last_seen, labels } = device;
  const matter = matterText(device);
  const label = Object.entries(labels).map(
    ([key, value]) => html` <span class="tag">${cut(`${key}=${value}`, 24)}</span>`,
  );
  return html`<li data-key="device-${Bun.hash(id).toString(36)}">
    <a href="${deviceLink(view, id)}"
      >${stateTag(state)}
      <span class="who"
        ><b>${cut(name ?? id, 40)}</b
        >${name !== null && html` <span class="hint">${cut(id, 40)}</span>`}</span
      >
      <span class="model">${model !== null && cut(model, 24)}</span>
      <span class="version"
        >${cut(versionText(device), 24)}${matter !== "" && html` <span class="hint">${cut(matter, 40)}</span>`}</span
      >
      <span class="when">${agoTime(last_seen, view.now)}</span
      >${label.length > 0 && html`<span class="labels">${label.slice(0, 4)}${label.length > 4 && html` <span class="hint">and ${label.length - 4} more</span>`}</span>`}</a
    >
  </li>`;
}

function filterForm(
  { up }: PageView,
  typed: FormFields,
  { versions, models }: FleetSummary,
): Markup {
  const namesOf = (counts: Record<string, number>, chosen: string | undefined) => {
    const names = Object.keys(counts).filter((name) => name !== "none" && name !== "other");
    return chosen === undefined || names.includes(chosen) ? names : [chosen, ...names];
  };
  const choice = (name: "state" | "version" | "model", all: readonly string[]) => {
    return html`<label
      ><span class="unseen">${name}</span
      ><select name="${name}">
        ${option("", `any ${name}`, typed.get(name))}${all.map((one) => option(one, cutText(one, 40), typed.get(name)))}
      </select></label
    >`;
  };
  const newestFirst = namesOf(versions, typed.get("version")).sort((a, b) =>
    compareCodePoints(versionKey(b), versionKey(a)),
  );
  return html`<form class="filter" role="search" action="${up}devices">
    <label class="grow"
      ><span class="unseen">Search in ids, names, models and addresses</span
      ><input
        type="search"
        name="q"
        value="${typed.get("q") ?? ""}"
        placeholder="id, name, model or address"
    /></label>
    ${choice("state", URGENCY)}${choice("version", newestFirst)}${choice("model", namesOf(models, typed.get("model")))}
    <label
      ><span class="unseen">Label, as key=value</span
      ><input name="label" value="${typed.get("label") ?? ""}" placeholder="label=value" size="12"
    /></label>
    <button>Search</button>
  </form>`;
}

/** What a list says that has nothing in it. */
function nothingListed({ up }: PageView, devices: number): Markup {
  if (devices > 0) {
    return html`<p class="empty">
      No device is like that. <a href="${up}devices">Show all ${grouped(devices)}</a>
    </p>`;
  }
  return html`<p class="empty">
    No device has asked yet. Let one ask for a manifest: it shows up here within two seconds.
    <a href="${up}">How to begin</a>
  </p>`;
}

/** What is listed; or what is wrong with the filter. */
type DeviceListing = { filter: DeviceFilter; page: DevicePage } | { problem: string };

function devicesPage(
  view: PageView,
  typed: FormFields,
  summary: FleetSummary,
  listing: DeviceListing,
): Page {
  const frame = (title: Piece, content: Piece) =>
    html`<section>
      <h1 class="plain">${title}</h1>
      ${filterForm(view, typed, summary)}${content}
    </section>`;
  const page = { title: "Devices", at: "devices", isLive: true } as const;
  if ("problem" in listing) {
    return {
      ...page,
      status: 400,
      isLive: false,
      main: frame("Devices", problemText(listing.problem)),
    };
  }
  const { devices, next } = listing.page;
  const { state, version, model, label, q, after } = listing.filter;
  const same = { state, version, model, label: label?.join("="), q };
  const isAll = !version && !model && !label && !q;
  const count = isAll ? many(state ? summary.states[state] : summary.devices, "device") : "Devices";
  const more = html`<nav class="pages" aria-label="Pages">
    ${after !== undefined && html`<a class="button" href="${devicesLink(view, same)}">From the beginning</a>`}${next !== null && html`<a class="button" rel="next" href="${devicesLink(view, { ...same, after: next })}">Next ${LISTED_DEVICES}</a>`}
  </nav>`;
  const list =
    devices.length > 0
      ? html`<ul class="devices">
          ${devices.map((device) => deviceItem(view, device))}
        </ul>`
      : nothingListed(view, summary.devices);
  const title = html`${count}${state !== undefined && isAll && html` ${state}`}`;
  return { ...page, main: frame(title, [list, more]) };
}

// ──── Device view ────────────────────────────────────────────────────────────────────────────────
// One device: what is known of it, what it is called, and what happened to it.

/** Events that are shown of a device. */
const SHOWN_EVENTS = 100;

/** What a decision gives a device, in words. */
function decisionText({ target, image }: Decision): Markup {
  const files = target && html`the files of ${said(target.name)}`;
  return html`${files}${target && image && " and "}${image && html`firmware ${said(image.name)}`}`;
}

/** Why a device may not have the newest version yet. */
function heldText(
  device: FleetDevice,
  version: string,
  rollout: Rollout | undefined,
  fleet: Fleet,
  now: number,
): Markup {
  const newest = html`${said(version)} is the newest`;
  if (!rollout) return html`${newest}, and needs a rollout to be offered.`;
  const { state, reason, only, window } = rollout;
  const why = reason !== null && html`: ${said(reason)}`;
  if (device.id.startsWith(BY_ADDRESS)) {
    return html`${newest}; a device that does not say who it is takes no part in rollouts.`;
  }
  if (!meets(only, device, (key, value) => device.labels[key] === value)) {
    const pairs = only.map(([key, value]) => `${key}=${value}`).join(", ");
    return html`${newest}; its rollout is only for ${said(pairs)}.`;
  }
  if (state !== "running") return html`${newest}; its rollout is ${state}${why}.`;
  if (!fleet.admission.knows(rollout.id, device.id)) {
    return html`${newest}; its rollout began before this device was heard, which gets it at the end.`;
  }
  if (window !== null && !isOpen(parseWindow(window), now)) {
    return html`${newest}; its rollout offers it within ${said(windowText(window))}.`;
  }
  return html`${newest}; its rollout has not come to this device yet${why}.`;
}

/** What a device would be offered now, and why. */
function offerText(
  { now: at }: PageView,
  device: FleetDevice,
  releases: Releases,
  fleet: Fleet,
  rollouts: readonly Rollout[],
): Markup {
  const { id, version, firmware, model } = device;
  const root = releases.forDevice({ model: model ?? "" });
  const newest = root.versions.at(-1) ?? root.firmware.at(-1);
  if (!newest) return html`Nothing: there is no release for it.`;
  const query = {
    ...{ devid: id, current_ver: version ?? "", ...(model !== null && { model }) },
    ...(firmware !== null && { firmware_ver: firmware }),
  };
  // What only reports takes no place.
  const asking = { query, address: device.address ?? "", method: "HEAD" };
  const all = root.decide(query);
  if (!all) {
    return html`Nothing: it has the newest that it may have, ${said(newest.name)}.`;
  }
  const now = root.decide(query, fleet.newestFor(asking, root));
  const isAll = now?.target === all.target && now?.image === all.image;
  // What is held back, if anything is.
  const isHeld = now?.target !== all.target;
  const { name } = ((isAll || isHeld ? all.target : undefined) ?? all.image ?? all.target)!;
  if (isAll) {
    const again = isSameRelease(device.failed, name) && " It has failed on this device before.";
    return html`${decisionText(all)}: it is on ${said(onText(device))}, and ${said(name)} is the
    newest.${again}`;
  }
  const rollout = rollouts.find((one) => isOfRelease(one, root, name));
  return html`${now ? html`${decisionText(now)}.` : "Nothing."}
  ${heldText(device, name, rollout, fleet, at)}`;
}

const EVENT_SHAPES: Record<FleetEvent["kind"], Shape> = {
  "first seen": "behind",
  offered: "offered",
  updated: "current",
  failed: "failed",
  "rolled back": "failed",
  "back after silence": "behind",
};

function eventItem({ now }: PageView, { at, kind, from, to }: FleetEvent): Markup {
  const step =
    from !== null && to !== null && from !== to
      ? html`${said(from)} → ${said(to)}`
      : html`${(to ?? from) !== null && said((to ?? from)!)}`;
  return html`<li>
    ${clockTime(at, now)}
    <span class="state is-${EVENT_SHAPES[kind]}">${mark(EVENT_SHAPES[kind])} ${kind}</span>
    <span>${step}</span>
  </li>`;
}

/** A form about a device that was not saved. */
interface DeviceTrial extends Problem {
  /** What stands in it. */
  name: string;
  labels: string;
  /** What it showed when it was filled in; absent: how things are now. */
  seen?: { name: string; labels: string };
}

/** The labels of a device as they are typed: one a line. */
function labelLines({ labels }: FleetDevice): string[] {
  return Object.entries(labels).map(([key, value]) => `${key}=${value}`);
}

/** Stands for a text in a form, however long that is. */
function textMark(text: string): string {
  return sha256(text).slice(0, 12);
}

/** Marks what a form shows of labels: of each its key, and its line without spaces around it. */
function labelMarks(device: FleetDevice): string {
  const keys = Object.keys(device.labels);
  const marks = labelLines(device).map((line, i) => [textMark(keys[i]!), textMark(line.trim())]);
  return marks.map((mark) => mark.join(".")).join(" ");
}

function editForm(view: PageView, device: FleetDevice, typed?: DeviceTrial): Markup {
  const { id, name } = device;
  const lines = labelLines(device);
  const seen = typed?.seen ?? { name: name ?? "", labels: labelMarks(device) };
  const fields = html`${hidden("seen-name", seen.name)}${hidden("seen-labels", seen.labels)}
    <div class="field">
      <label for="name">Name</label
      ><input
        id="name"
        name="name"
        value="${typed?.name ?? name ?? ""}"
        maxlength="${MAX_TEXT}"
        autocomplete="off"
      />
    </div>
    <div class="field">
      <label for="labels">Labels</label
      ><textarea
        id="labels"
        name="labels"
        rows="${Math.min(12, Math.max(3, lines.length + 1))}"
        spellcheck="false"
        aria-describedby="labels-hint"
      >
${typed?.labels ?? lines.join("\n")}</textarea
      ><span class="hint" id="labels-hint">one a line, as key=value</span>
    </div>
    <div class="buttons"><button class="main">Save</button></div>`;
  return changeForm(view, deviceLink(view, id), fields, { className: "fields" });
}

function devicePage(
  view: PageView,
  device: DeviceDetails,
  offer: Markup,
  trial?: DeviceTrial,
): Page {
  const { id, name, model, state, offered, failed, address, history, rollouts } = device;
  const { first_seen, last_seen } = device;
  const { now } = view;
  const facts: [string, Piece][] = [
    ["Id", said(id)],
    ["Model", model === null ? "not said" : said(model)],
    ["Version", said(versionText(device))],
    ["Firmware", device.firmware === null ? "not said" : said(device.firmware)],
    ["Offered", offered === null ? "nothing" : said(offered)],
    ["Failed", failed === null ? "nothing" : said(failed)],
    ["Address", address === null ? "–" : said(address)],
    ["Last seen", agoTime(last_seen, now)],
    ["First seen", agoTime(first_seen, now)],
    ...rollouts.map((one): [string, Piece] => ["Rollout", said(takenPartText(one))]),
    ["Would be offered now", offer],
  ];
  const events = history.slice(-SHOWN_EVENTS).toReversed();
  const older = history.length - events.length;
  return {
    ...(trial && { status: trial.status }),
    title: name ?? id,
    at: "devices",
    isLive: trial === undefined,
    main: html`<section class="lead">
        <h1>${said(name ?? id)} ${stateTag(state)}</h1>
        <p>${STATE_WORDS[state].replace(/^./, (letter) => letter.toUpperCase())}.</p>
      </section>
      <div class="columns even">
        <section aria-labelledby="known">
          <h2 id="known">What is known of it</h2>
          <dl>
            ${facts.map(
              ([term, text]) =>
                html`<dt>${term}</dt>
                  <dd>${text}</dd>`,
            )}
          </dl>
        </section>
        <section aria-labelledby="given">
          <h2 id="given">What you call it</h2>
          ${trial && problemText(trial.text)}${editForm(view, device, trial)}
        </section>
      </div>
      <section aria-labelledby="history">
        <h2 id="history">What happened to it</h2>
        <ol class="timeline">
          ${events.map((event) => eventItem(view, event))}
        </ol>
        ${older > 0 && html`<p class="hint">and ${grouped(older)} earlier: <a href="${view.up}api/devices/${encodeURIComponent(id)}">all, in JSON</a></p>`}
      </section>`,
  };
}

// ──── Style ───────────────────────────────────────────────────────────────────────────────────────
// One sheet for all views. Colours are for states, and the same few greys for all else.

const PAGE_COLOURS = String.raw`
:root { color-scheme: light dark; --paper: #fcfcfb; --raised: #ffffff; --ink: #1c1e21; --soft: #5a6068;
  --line: #dfe1e4; --good: #1b7a46; --way: #2263c4; --warn: #8f5e00; --bad: #b8261d;
  --idle: #767c85; --t0: #2f3a48; --t1: #5f6f83; --t2: #8b9bae; --t3: #b0bccb; --t4: #cdd6e0;
  --t5: #e1e7ed; --t6: #f0f2f5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --raised: #1b1f23; --ink: #e4e7ea; --soft: #9ca4ae; --line: #2f353b;
    --good: #4cc583; --way: #6ea8fb; --warn: #e0ac3f; --bad: #f4776b; --idle: #7f8791;
    --t0: #d3dbe4; --t1: #9aa8b8; --t2: #6f7f91; --t3: #536272; --t4: #3f4b58; --t5: #313b46;
    --t6: #262e37; }
}
`;

const PAGE_STYLE = String.raw`${PAGE_COLOURS}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1.25rem 2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
a { color: inherit; text-decoration: underline var(--idle) 1px; text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
header a, .counts a, .spans a, .devices a, .button { text-decoration: none; }
header a:hover, .counts a:hover, .spans a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; border-radius: 2px; }
main:focus { outline: none; }
[hidden], .skip:not(:focus), .unseen { position: absolute; width: 1px; height: 1px; margin: -1px;
  overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none; }
header { display: flex; align-items: baseline; gap: 1.25rem; padding: .7rem 0; border-bottom: 1px solid var(--line); }
header nav { display: flex; gap: 1rem; flex: 1; }
nav a[aria-current] { color: var(--ink); font-weight: 600; border-bottom: 2px solid var(--ink); }
.brand { font-weight: 700; color: var(--ink); }
.brand span { color: var(--soft); font-weight: 400; }
h1 { font-size: 1.5rem; line-height: 1.25; font-weight: 600; margin: 0; letter-spacing: -.01em; text-wrap: pretty; }
h1.plain { margin-bottom: .75rem; }
h2 { font-size: .8125rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; display: flex; gap: 1rem;
  align-items: baseline; justify-content: space-between; }
h3 { font-size: 1rem; margin: 0 0 .4rem; font-weight: 600; }
h3 .state { margin-left: .4rem; }
p { margin: .3rem 0; max-width: 46rem; }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--t6); padding: .1em .3em; border-radius: 3px; }
ul, ol { list-style: none; margin: 0; padding: 0; }
section { margin: 1.4rem 0 0; min-width: 0; }
.lead { margin-top: 1.5rem; }
.hint, .lead p, footer, .axis, .top { color: var(--soft); }
.hint, footer, .axis, .top, .tag { font-size: .8125rem; font-weight: 400; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .6rem; display: flex; flex-wrap: wrap; gap: .2rem 2rem; }
#lost, .problem { color: var(--bad); }
#lost { border: 1px solid; border-radius: 4px; padding: .4rem .75rem; max-width: none; }
.mark { width: .72em; height: .72em; fill: currentColor; stroke: currentColor; stroke-width: 1.4; overflow: visible;
  flex: none; vertical-align: -.02em; margin-right: .1em; }
.mark.is-behind, .mark.is-silent, .mark.is-offered, .mark.is-failed, .mark.is-paused { fill: none; }
.mark.is-offered, .mark.is-failed, .mark.is-paused { stroke-width: 2.2; }
.mark.is-silent { stroke-width: 1.8; }
.is-current { color: var(--good); } .is-offered { color: var(--way); } .is-silent { color: var(--warn); }
.is-failed { color: var(--bad); } .is-behind, .is-paused { color: var(--soft); }
rect.is-current { fill: var(--good); } rect.is-offered { fill: var(--way); } rect.is-silent { fill: var(--warn); }
rect.is-failed { fill: var(--bad); } rect.is-behind { fill: var(--t4); } rect.is-paused { fill: var(--t1); }
.state { white-space: nowrap; font-weight: 500; font-size: .875rem; }
.tag { border: 1px solid var(--line); border-radius: 3px; padding: 0 .35em; color: var(--soft); }
.counts, .legend { display: flex; flex-wrap: wrap; gap: .2rem 1.25rem; margin: .6rem 0 0; }
.legend { font-size: .875rem; gap: .1rem 1.1rem; margin-top: .35rem; }
.legend b, .counts b { font-weight: 600; }
.none { color: var(--soft); }
.none .mark { color: var(--idle); }
.columns { display: grid; grid-template-columns: 3fr 2fr; gap: 0 2.5rem; }
.columns.even { grid-template-columns: 1fr 1fr; }
.rollout { border: 1px solid var(--line); border-radius: 6px; background: var(--raised); padding: .8rem 1rem; margin-bottom: .6rem; }
.progress { display: block; width: 100%; height: 14px; border-radius: 3px; }
.progress rect { stroke: var(--raised); stroke-width: 2; vector-effect: non-scaling-stroke; }
.reason { font-weight: 500; }
.bad li { padding: .1rem 0; }
pre { white-space: pre-wrap; background: var(--t6); border-radius: 3px; padding: .4rem .6rem; margin: .3rem 0; }
.past li { padding: .15rem 0; }
.buttons, .pages { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .7rem; align-items: center; }
button, .button { font: inherit; font-size: .875rem; line-height: 1.4; color: var(--ink); background: var(--raised);
  border: 1px solid var(--idle); border-radius: 4px; padding: .25rem .75rem; cursor: pointer; }
button:hover, .button:hover { border-color: var(--ink); text-decoration: none; }
button.main { background: var(--ink); color: var(--paper); border-color: var(--ink); }
button.quiet { border: 0; background: none; color: var(--soft); padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; padding: .28rem .75rem .28rem 0; font-weight: 400; vertical-align: baseline; }
thead th { color: var(--soft); font-size: .8125rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.bars tbody tr { border-top: 0; }
.bars tbody th { white-space: nowrap; width: 1%; }
.bars td, .bars tbody th { padding-top: .12rem; padding-bottom: .12rem; }
.n { text-align: right; }
td.n { width: 1%; white-space: nowrap; }
.bars td { white-space: nowrap; width: 1%; }
.bars td.fill { width: auto; min-width: 3rem; padding-right: 0; }
.bar { display: block; width: 100%; height: .7rem; }
.bar rect.tone-2 { fill: var(--t2); }
.wide { overflow-x: auto; position: relative; }
.releases th[scope=row] { font-weight: 600; white-space: nowrap; }
.releases td:last-child { text-align: right; padding-right: 0; }
tr.more { border-top: 0; }
tr.more td { padding-top: 0; text-align: left !important; }
.costs { font-size: .8125rem; }
figure { margin: 0; }
.plot { position: relative; }
.plot svg { display: block; width: 100%; height: 150px; background: var(--raised); border: 1px solid var(--line);
  border-radius: 3px; }
.top { position: absolute; top: 2px; left: 4px; background: var(--paper); border-radius: 3px; padding: 0 .3em; line-height: 1.3; }
.axis { display: flex; justify-content: space-between; margin-top: .1rem; }
.grid { stroke: var(--paper); stroke-opacity: .45; stroke-dasharray: 2 4; vector-effect: non-scaling-stroke; }
polygon { stroke: var(--paper); stroke-width: 1; vector-effect: non-scaling-stroke; }
.tone-0 { fill: var(--t0); } .tone-1 { fill: var(--t1); } .tone-2 { fill: var(--t2); } .tone-3 { fill: var(--t3); }
.tone-4 { fill: var(--t4); } .tone-5 { fill: var(--t5); } .tone-6 { fill: var(--t6); }
.swatch { width: .75em; height: .75em; vertical-align: -.05em; border: 1px solid var(--idle); }
.spans { display: flex; gap: .75rem; font-weight: 400; }
.spans a[aria-current] { color: var(--ink); font-weight: 600; text-decoration: underline; }
summary { cursor: pointer; font-size: .8125rem; color: var(--soft); margin-top: .35rem; }
.more details { margin-bottom: .2rem; }
.warnings li { font-size: .875rem; padding: .15rem 0; color: var(--ink); }
input, select, textarea { font: inherit; font-size: .9375rem; color: var(--ink); background: var(--raised);
  border: 1px solid var(--idle); border-radius: 4px; padding: .25rem .5rem; max-width: 100%; }
::placeholder { color: var(--soft); opacity: 1; }
.filter { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .75rem; }
.filter .grow { flex: 1 1 14rem; }
.filter .grow input { width: 100%; }
.filter label { min-width: 0; max-width: 100%; }
.filter select { max-width: 11rem; }
.devices a { display: grid; grid-template-columns: 6rem minmax(0, 3fr) minmax(0, 1.3fr) minmax(0, 2.4fr) 7rem;
  gap: 0 1rem; padding: .3rem 0; border-top: 1px solid var(--line); color: inherit; align-items: baseline; font-size: .875rem; }
.devices a:hover { background: var(--t6); text-decoration: none; }
.devices b { font-weight: 600; }
.when { text-align: right; color: var(--soft); }
.labels { grid-column: 2 / -1; }
.empty { border: 1px dashed var(--idle); border-radius: 6px; padding: 1rem; max-width: none; }
.field { margin-bottom: .6rem; }
.field label { display: block; font-size: .8125rem; color: var(--soft); }
.field input, .field textarea { width: 100%; display: block; }
.field .hint { display: block; }
form.columns .fields { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
.timeline li { display: grid; grid-template-columns: 10rem 11rem 1fr; gap: 0 1rem; padding: .25rem 0; border-top: 1px solid var(--line); font-size: .875rem; }
.sign-in { max-width: 24rem; margin: 12vh auto 0; }
.sign-in h1 { margin-bottom: .75rem; }
.sign-in label { display: block; font-size: .875rem; color: var(--soft); }
.sign-in input { width: 100%; margin: .2rem 0 .6rem; padding: .4rem .6rem; }
@media (max-width: 52rem) {
  body { padding: 0 .9rem 1.5rem; }
  header { gap: .9rem; }
  h1 { font-size: 1.25rem; }
  .columns, .columns.even { grid-template-columns: 1fr; }
  .devices a { grid-template-columns: 5.3rem 1fr auto; gap: 0 .5rem; }
  .devices .who { grid-column: 2; } .devices .when { grid-column: 3; grid-row: 1; }
  .devices .version, .devices .labels { grid-column: 2 / -1; }
  .devices .model { grid-column: 2 / -1; }
  .devices .model:empty { display: none; }
  .timeline li { grid-template-columns: 7.2rem 1fr; }
  .timeline li > :last-child { grid-column: 2; }
  .releases thead { display: none; }
  .releases tr { display: flex; flex-wrap: wrap; gap: 0 .75rem; align-items: baseline; padding: .4rem 0; }
  .releases tr.more { padding: 0 0 .5rem; }
  .releases td, .releases th { padding: 0; width: auto; }
  .releases td.n::after { content: " on it"; color: var(--soft); }
  .releases td:last-child { margin-left: auto; }
  .releases tr.more td { margin: 0; }
  #versions-table th { white-space: normal; }
  .bars td:not(.n, .fill) { width: auto; min-width: 3.6rem; white-space: normal; }
  .bars td.fill { min-width: 1.5rem; }
  .bars th, .bars td { padding-right: .5rem; }
  dl { grid-template-columns: 7.5rem 1fr; }
  .filter select { max-width: 100%; }
}
@media (prefers-reduced-motion: no-preference) { .progress rect, .bar rect { transition: width .4s, x .4s; } }
@media (forced-colors: active) { polygon, rect { forced-color-adjust: none; } }
`;

/** The mark of the page in a browser's tab. */
const PAGE_ICON = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="6" fill="none" stroke="#2263c4" stroke-width="3" stroke-dasharray="28 10" transform="rotate(-60 8 8)"/><path d="M11 1l4 3-4.5 2.5z" fill="#2263c4"/></svg>`;

// ──── Script ──────────────────────────────────────────────────────────────────────────────────────
// The one script: it writes times in the browser's zone, and brings the newest every two seconds while
// somebody looks. What is there is changed into what is new, element by element: so what has the focus,
// is open, scrolled or typed stays.

const PAGE_SCRIPT = String.raw`"use strict";
(() => {
  const EVERY = 2000;
  const main = document.getElementById("main");
  const lost = document.getElementById("lost");
  const full = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
  const time = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const date = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });

  // In the zone of this browser.
  const localize = (root) => {
    const now = new Date();
    for (const element of root.querySelectorAll("time")) {
      const at = new Date(element.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      element.title = full.format(at);
      if (!("clock" in element.dataset)) continue;
      const year = at.getFullYear() === now.getFullYear() ? "" : " " + at.getFullYear();
      const day = at.toDateString() === now.toDateString() ? "" : date.format(at) + year + " ";
      element.textContent = day + time.format(at);
    }
  };

  const keyOf = (node) => {
    if (node.nodeType !== 1) return "";
    // A form's own properties may be fields of it.
    const key = node.getAttribute("id") || node.getAttribute("data-key");
    return key || (node.nodeName === "OPTION" ? "option " + node.value : "");
  };
  const isField = ({ nodeName }) => nodeName === "INPUT" || nodeName === "TEXTAREA";
  const isChanged = (field) =>
    field.nodeName === "SELECT"
      ? [...field.options].some((one) => one.selected !== one.defaultSelected)
      : field.value !== field.defaultValue;
  const isTyped = (root) => [...root.querySelectorAll("input, textarea, select")].some(isChanged);
  const isLike = (a, b) => a.nodeName === b.nodeName && keyOf(a) === keyOf(b);

  const change = (old, now) => {
    if (old.nodeType !== 1) {
      if (old.data !== now.data) old.data = now.data;
      return;
    }
    for (const { name } of [...old.attributes]) {
      // Who has opened something keeps it open.
      if (!now.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
    }
    for (const { name, value } of now.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    // What is being typed stays with what the form showed; a menu that is open would close.
    if (old.nodeName === "FORM" && isTyped(old)) return;
    if (old.nodeName === "SELECT" && old === document.activeElement) return;
    changeChildren(old, now);
    // What was ever typed into keeps its value else.
    if (isField(old) && old.value !== old.defaultValue) old.value = old.defaultValue;
    if (old.nodeName === "OPTION") old.selected = old.defaultSelected;
  };

  const changeChildren = (old, now) => {
    const keyed = new Map([...old.children].filter(keyOf).map((child) => [keyOf(child), child]));
    let at = old.firstChild;
    for (const child of [...now.childNodes]) {
      const key = keyOf(child);
      const found = key ? keyed.get(key) : at && isLike(at, child) ? at : undefined;
      if (!found || found.nodeName !== child.nodeName) {
        old.insertBefore(child, at);
        continue;
      }
      if (found === at) at = at.nextSibling;
      else old.insertBefore(found, at);
      change(found, child);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  };

  const show = (text) => {
    const found = new DOMParser().parseFromString(text, "text/html");
    const newest = found.getElementById("main");
    if (!newest) throw new Error("no page");
    localize(found);
    const focus = document.activeElement;
    change(main, newest);
    if (focus !== document.activeElement && focus.isConnected) focus.focus({ preventScroll: true });
    document.title = found.title;
    const [foot, newFoot] = [document, found].map((one) => one.querySelector("footer"));
    if (foot && newFoot) change(foot, newFoot);
  };

  const tell = (text) => {
    lost.textContent = text;
    lost.hidden = false;
  };

  let timer;
  let isAsking = false;
  let since = "";
  const bring = async () => {
    clearTimeout(timer);
    if (document.hidden || isAsking) return;
    isAsking = true;
    try {
      const signal = AbortSignal.timeout(10_000);
      const answer = await fetch(location.href, { cache: "no-store", signal });
      const text = await answer.text();
      since = "";
      if (answer.ok || !isTyped(main)) {
        if (answer.status === 401) return location.reload();
        // There is more to it than what it shows to those who are out.
        if (answer.ok && "out" in main.dataset) return location.replace(answer.url);
        show(text);
        lost.hidden = true;
      } else if (answer.status === 401) {
        tell("You are signed out. Sign in in another tab, then go on here.");
      } else tell("The server answers " + answer.status + ": what you typed is still here.");
    } catch {
      since ||= time.format(new Date());
      tell("No answer from the server since " + since + ": this is how things stood then.");
    } finally {
      isAsking = false;
    }
    timer = setTimeout(bring, EVERY);
  };

  localize(document);
  if ("live" in main.dataset) {
    timer = setTimeout(bring, EVERY);
    document.addEventListener("visibilitychange", bring);
  }
})();
`;

/** Changes with style and script, so that browsers may keep them. */
const PAGE_VERSION = sha256(PAGE_STYLE + PAGE_SCRIPT).slice(0, 12);

// ──── Page files ─────────────────────────────────────────────────────────────────────────────────
// What is the same for everybody: style, script and icon; and what a browser may do with a page.

/** What a browser may do with a page: load style, script and icon from here, and send forms here. */
const PAGE_POLICY = [
  "default-src 'none'",
  ...["script-src", "style-src", "img-src", "connect-src", "form-action"].map(
    (name) => `${name} 'self'`,
  ),
  ...["base-uri 'none'", "frame-ancestors 'none'"],
].join("; ");

/** What is the same for everybody, and needs no token. */
const PAGE_FILES: Record<string, () => Answer> = {
  "/-/page.css": () => pageFile("text/css; charset=utf-8", PAGE_STYLE),
  "/-/page.js": () => pageFile("text/javascript; charset=utf-8", PAGE_SCRIPT),
  "/-/page.svg": () => pageFile("image/svg+xml", PAGE_ICON),
};

function pageFile(type: string, text: string): Answer {
  const answer = content(type, new Blob([text]));
  const headers = { ...answer.headers, ...ADMIN_HEADERS, "Cache-Control": "max-age=86400" };
  return { ...answer, headers };
}

// ──── Form fields ────────────────────────────────────────────────────────────────────────────────
// What forms say, as it was typed.

function formFields(text: string): FormFields {
  const fields: FormFields = new Map();
  for (const [name, value] of new URLSearchParams(text)) if (value !== "") fields.set(name, value);
  return fields;
}

/** The parameters of a view, which a form may have sent. @throws {OTAError} exit code 2 */
function viewFields(request: Request, names: readonly string[]): FormFields {
  const given = Object.entries(readParameters(request, names)) as [string, string][];
  return new Map(given.filter(([, value]) => value !== ""));
}

/** What the form of the list has, and where a page of it begins. */
const FILTER_FIELDS = ["state", "version", "model", "label", "q", "after"];

/** Which devices a form asks for: as `readFilter`, but what is empty does not matter. */
function formFilter(typed: FormFields): DeviceFilter {
  return readFilter({ url: `/?${new URLSearchParams([...typed])}` });
}

/** The lines of a field, without the spaces around them. */
function linesOf(text = ""): Set<string> {
  const lines = text.split(/\r?\n/).map((line) => line.trim());
  return new Set(lines.filter((line) => line !== ""));
}

/** A label as it was typed. @throws {OTAError} exit code 2 when it is none */
function typedLabel(line: string): [key: string, value: string] {
  const at = line.indexOf("=");
  const [key, value] = [line.slice(0, at).trim(), line.slice(at + 1).trim()];
  if (at < 1 || key === "" || value === "")
    refuseInput(`expected a label as key=value, found ${shown(line)}`);
  return [key, value];
}

/** What was typed about a device. */
interface TypedEdit {
  edit: DeviceEdit;
  /** What somebody else has made of the same meanwhile, in words. */
  conflicts: string[];
  /** How it would then be, as it is typed. */
  name: string;
  labels: string;
}

/**
 * The labels as they were typed, but for those lines that the form showed.
 *
 * @param kept marks of the keys of these
 * @throws {OTAError} exit code 2 when a line is no label, or two are of one key
 */
function typedLabels(lines: Iterable<string>, kept: ReadonlySet<string>): Map<string, string> {
  const labels = new Map<string, string>();
  for (const line of lines) {
    const [key, value] = typedLabel(line);
    if (labels.has(key) || kept.has(textMark(key)))
      refuseInput(`the label ${shown(key)}: once at most`);
    labels.set(key, value);
  }
  return labels;
}

/**
 * What is to become of labels: what was typed, as far as it is not what the form showed. So what
 * others have changed meanwhile stays.
 *
 * @param before `labelMarks` of the form
 * @throws {OTAError} see `typedLabels`
 */
function mergeTyped(
  now: Record<string, string>,
  before: string,
  text: string,
): { labels: Map<string, string | null>; conflicts: string[] } {
  const marks = before.split(" ").map((mark) => mark.split(".") as [key: string, line: string]);
  const shownLabels = new Map(marks);
  const typed = linesOf(text);
  const isShown = new Set([...typed].map(textMark)).intersection(new Set(shownLabels.values()));
  const kept = new Set(marks.filter(([, line]) => isShown.has(line)).map(([key]) => key));
  const lines = [...typed].filter((line) => !isShown.has(textMark(line)));
  const wanted = typedLabels(lines, kept);
  const labels = new Map<string, string | null>(wanted);
  const conflicts: string[] = [];
  for (const [key, value] of Object.entries(now)) {
    const line = shownLabels.get(textMark(key));
    if (line === undefined ? !wanted.has(key) : kept.has(textMark(key))) continue;
    if (!wanted.has(key)) labels.set(key, null);
    const isSame = line === textMark(`${key}=${value}`.trim()) || wanted.get(key) === value;
    if (!isSame) conflicts.push(`the label ${key}: somebody else made it ${value}`);
  }
  for (const key of wanted.keys()) {
    const isGone = !Object.hasOwn(now, key) && shownLabels.has(textMark(key));
    if (isGone) conflicts.push(`the label ${key}: somebody else removed it`);
  }
  return { labels, conflicts };
}

/** What is to be changed in a device. @throws {OTAError} see `typedLabels` */
function typedEdit(fields: FormFields, device: FleetDevice): TypedEdit {
  const [before, text] = [fields.get("seen-labels") ?? "", fields.get("labels") ?? ""];
  const { labels, conflicts } = mergeTyped(device.labels, before, text);
  const shownName = fields.get("seen-name")?.trim() ?? "";
  const name = fields.get("name")?.trim() ?? "";
  const known = device.name ?? "";
  const isNamed = name !== shownName;
  if (isNamed && known.trim() !== shownName && known !== name) {
    const what = known === "" ? "removed it" : `made it ${known}`;
    conflicts.unshift(`the name: somebody else ${what}`);
  }
  const merged = new Map(Object.entries(device.labels));
  for (const [key, value] of labels) {
    if (value === null) merged.delete(key);
    else merged.set(key, value);
  }
  return {
    edit: { ...(isNamed && { name: name || null }), labels: Object.fromEntries(labels) },
    conflicts,
    name: isNamed ? name : known,
    labels: [...merged].map(([key, value]) => `${key}=${value}`).join("\n"),
  };
}

/** A rollout as it was typed into the form. @throws {OTAError} exit code 2 when a field is wrong */
function formRollout(fields: FormFields): RolloutOptions {
  const typed = (name: string) => fields.get(name)?.trim();
  const only = typed("only")?.split(",") ?? [];
  const texts = ROLLOUT_FIELDS.map(({ name }) => [name, typed(name)] as const);
  const version = fields.get("version") ?? refuseInput("which version?");
  try {
    return typedRollout(version, fields.get("model") ?? null, {
      ...Object.fromEntries(texts),
      // What is emptied is not the default.
      "pause-at": typed("pause-at") ?? "none",
      only: only.map((text) => text.trim().replace(/\s*=\s*/, "=")).filter(Boolean),
    });
  } catch (error) {
    if (!(error instanceof OTAError)) throw error;
    // As the form calls them.
    const labels = new Map<string, string>(ROLLOUT_FIELDS.map(({ name, label }) => [name, label]));
    return refuseInput(
      error.message.replace(/--([a-z-]+)/g, (_, name) => labels.get(name) ?? name),
    );
  }
}

// ──── Page views ──────────────────────────────────────────────────────────────────────────────────
// Which view a path has, from what the fleet answers now.

/** From a path to `/-/`. */
function upFrom(path: string): string {
  return path.split("/").length > 3 ? "../" : "./";
}

/** What an error is for who asked. @throws what is no `OTAError` */
async function problemOf(error: unknown, fleet: Fleet): Promise<Problem> {
  if (!(error instanceof OTAError)) throw error;
  const isWrong = error instanceof FormatError || error.exitCode === 2;
  const status = isWrong ? 400 : (await isConflict(error, fleet)) ? 409 : 503;
  return { status, text: error.message };
}

const SEEN_NUMBERS = ["changed", "went-bad"];

/** What is asked of a rollout. @throws {OTAError} exit code 2 */
function actionOf(fields: FormFields): { action: RolloutAction; seen: SeenRollout } {
  const action = ROLLOUT_ACTIONS.find((name) => name === fields.get("action"));
  const id = fields.get("id");
  const [changed, wentBad] = SEEN_NUMBERS.map((name) => Number(fields.get(name) ?? NaN));
  if (!action || id === undefined || !Number.isInteger(changed) || !Number.isInteger(wentBad)) {
    return refuseInput("which rollout, and what to do with it?");
  }
  return { action, seen: { id, changed: changed!, wentBad: wentBad! } };
}

/** Whether a person asks, and not a program: it says that it reads HTML. */
function isBrowser({ headers }: Request): boolean {
  return headers.get("accept")?.includes("text/html") === true;
}

/** Whether a text is a view below `/-/`, and no more than that. */
function isPlace(text: string): boolean {
  const isView = /^(devices(\/[^/?#\\]*)?|rollouts\/(new|change))?(\?[^#\\]*)?$/.test(text);
  const isHarmless = /^[!-~]*$/.test(text) && !text.includes("/..") && !text.includes("token=");
  return isView && isHarmless && text.length <= 4000;
}

/** What somebody wanted who sent a form. */
function wantedBy(path: string, fields: FormFields): Wanted {
  const proof = fields.get("proof");
  const given = [...fields].filter(([name]) => name !== "proof" && !name.startsWith("seen-"));
  const isChange = true;
  if (path === "/-/rollouts") {
    return { isChange, to: `rollouts/new?${new URLSearchParams(given)}` };
  }
  if (!path.startsWith("/-/devices/")) return { isChange };
  const typed = given.map(([name, value]) => `${name}: ${value}`).join("\n");
  return { isChange, to: path.slice("/-/".length), typed, proof };
}

/** The id of the device that a request is about. @throws {OTAError} exit code 2 */
function idOf(request: Request, path: string): string {
  const part = path.slice("/-/devices/".length);
  const given = viewFields(request, part === "" ? ["id"] : []).get("id") ?? "";
  // In a path, a plus is a plus.
  return (part === "" ? given : decodeParameter(part.replaceAll("+", "%2B"))).toLowerCase();
}

/** Makes the views. */
class PageViews {
  readonly #costs = new AirCosts();

  constructor(
    private readonly fleet: Fleet,
    private readonly releases: Releases,
    private readonly access: AdminAccess,
  ) {}

  /** The view of a path. */
  async of(request: Request, contact: Contact, view: PageView): Promise<Page> {
    const { path } = contact;
    if (path === "/-/") return await this.#fleetView(request, contact, view);
    if (path === "/-/devices") {
      return await this.#devicesView(view, viewFields(request, FILTER_FIELDS));
    }
    if (path === "/-/rollouts/new") {
      const names = ["version", "model", ...ROLLOUT_FIELDS.map(({ name }) => name)];
      return await this.start(view, viewFields(request, names));
    }
    if (path === "/-/rollouts/change") {
      return await this.#askView(view, viewFields(request, ["id", ...SEEN_NUMBERS, "action"]));
    }
    return await this.device(view, idOf(request, path));
  }

  async #devicesView(view: PageView, typed: FormFields): Promise<Page> {
    let filter: DeviceFilter;
    try {
      filter = formFilter(typed);
    } catch (error) {
      const { text } = await problemOf(error, this.fleet);
      return devicesPage(view, typed, await this.fleet.summary(), { problem: text });
    }
    const [summary, page] = await Promise.all([
      this.fleet.summary(),
      this.fleet.urgent({ ...filter, limit: LISTED_DEVICES }),
    ]);
    return devicesPage(view, typed, summary, { filter, page });
  }

  async #fleetView(request: Request, contact: Contact, view: PageView): Promise<Page> {
    const fields = viewFields(request, ["span", "model", "rollout"]);
    const span = fields.get("span") as FleetSpan | undefined;
    const known = span !== undefined && Object.hasOwn(SAMPLING, span) ? span : undefined;
    const glance: FleetGlance = {
      ...{ releases: this.releases, rollouts: [], overview: undefined, problem: undefined },
      ...{ costs: this.#costs, isStaged: this.fleet.admission.isStaged },
      base: this.access.baseFor(request.headers, contact.peer),
      ...{ groups: new Map(), model: fields.get("model"), rollout: fields.get("rollout") },
    };
    try {
      const [overview, rollouts] = await Promise.all([
        this.fleet.overview(known),
        this.fleet.rollouts(),
      ]);
      const groups = Map.groupBy(overview.groups, ({ model }) => {
        return this.releases.forDevice({ model: model ?? "" });
      });
      return fleetPage(view, { ...glance, overview, rollouts, groups });
    } catch (error) {
      if (!(error instanceof OTAError)) throw error;
      return fleetPage(view, { ...glance, problem: error.message });
    }
  }

  /** A device. @param trial what was typed, and what is wrong with it */
  async device(view: PageView, id: string, trial?: DeviceTrial): Promise<Page> {
    const device = saidText(id) === null ? undefined : await this.fleet.device(id);
    if (!device)
      return problemPage(
        404,
        `No device ${shown(printable(id))}`,
        html`<a href="${view.up}devices">All devices</a>`,
      );
    const rollouts = await this.fleet.rollouts();
    return devicePage(
      view,
      device,
      offerText(view, device, this.releases, this.fleet, rollouts),
      trial,
    );
  }

  /** The form that starts a rollout. @param problem what is wrong with what was typed */
  async start(view: PageView, fields: FormFields, problem?: Problem): Promise<Page> {
    const given = Object.fromEntries(fields) as RolloutFields;
    if (given.version === undefined) refuseInput("which version?");
    // Emptied is not the same as not asked for yet.
    if (ROLLOUT_FIELDS.some(({ name }) => fields.has(name))) given["pause-at"] ??= "";
    const { version, model = null } = given;
    const isThere = isAmong(this.releases, { version: version!, model });
    try {
      const targets = await this.fleet.rolloutTargets(formRollout(fields));
      return startPage(view, given, targetsTable(targets), { isThere, problem });
    } catch (error) {
      const found = problem ?? (await problemOf(error, this.fleet));
      const unknown = html`<p class="hint">It cannot be told yet.</p>`;
      return startPage(view, given, unknown, { isThere, problem: found });
    }
  }

  async #askView(view: PageView, fields: FormFields): Promise<Page> {
    const { action, seen } = actionOf(fields);
    if (!ACTION_EFFECTS[action]) refuseInput(`${action} does not ask`);
    const rollout = (await this.fleet.rollouts()).find(({ id }) => id === seen.id);
    if (!rollout) return noRolloutPage(view);
    checkAction(rollout.version, rollout.state, action);
    return askPage(view, rollout, action);
  }
}

// ──── Page requests ──────────────────────────────────────────────────────────────────────────────
// The paths below `/-/` but for those of the API: views, and the forms on them.

/** How a form is answered: with the view to see next, or with a page. */
type Next = { see: string; cookie?: string } | Page;

/** Answers for the page's paths. */
class FleetPage {
  readonly #views: PageViews;

  constructor(
    private readonly fleet: Fleet,
    releases: Releases,
    private readonly access: AdminAccess,
  ) {
    this.#views = new PageViews(fleet, releases, access);
  }

  async answer(request: Request, contact: Contact): Promise<Answer> {
    const { path, method, query } = contact;
    const isReading = method === "GET" || method === "HEAD";
    if (isReading && Object.hasOwn(PAGE_FILES, path)) return PAGE_FILES[path]!();
    if (path === "/-/" && query.token !== undefined && isReading) {
      return await this.#enter(request, contact, query.token);
    }
    const methods = this.#methods(path);
    if (path === "/-/sign-in" && method === "POST") {
      const fields = (await this.#form(request)) ?? new Map<string, string>();
      const [to, typed, proof] = ["to", "typed", "proof"].map((name) => fields.get(name));
      const isOurs = this.access.isOurForm(request, contact, proof);
      const wanted = { to, ...(isOurs && typed !== undefined && { typed, proof }) };
      return await this.#enter(request, contact, fields.get("token")?.trim() ?? "", wanted);
    }
    // The forms of a page prove in their bodies that they are of a page of ours.
    const refused = await this.access.check(request, contact, methods?.includes("POST"));
    if (refused) return await this.#refuse(request, contact, refused, methods);
    const up = upFrom(path);
    const view: PageView = {
      ...{ up, assets: PAGE_VERSION, now: this.fleet.now },
      proof: this.access.formProof(request.headers),
    };
    if (!methods) {
      if (!isBrowser(request)) return adminText(contact, 404, "not found");
      const next = html`<a href="${up}">The fleet</a>`;
      return this.#document(view, problemPage(404, "There is no such page", next));
    }
    // Reloading what a form was sent to.
    if (isReading && methods === "POST") return plain(303, "see /-/", this.#see(up));
    if (!methods.split(", ").includes(method)) {
      return adminText(contact, 405, `only ${methods}`, { Allow: methods });
    }
    if (isReading && hasBody(request.headers)) {
      return adminText(contact, 413, "only a POST has a body", { Connection: "close" });
    }
    const next = await this.#next(request, contact, view, isReading);
    if (!("see" in next)) return this.#document(view, next);
    return plain(303, `see ${next.see}`, this.#see(next.see, next.cookie));
  }

  #see(place: string, cookie?: string): Record<string, string> {
    return { ...ADMIN_HEADERS, Location: place, ...(cookie && { "Set-Cookie": cookie }) };
  }

  /** Somebody shows a token. */
  async #enter(
    request: Request,
    contact: Contact,
    token: string,
    { to, ...typed }: Wanted = {},
  ): Promise<Answer> {
    const answer = await this.access.enter(request, contact, token);
    const place = to !== undefined && isPlace(to) ? to : undefined;
    if (answer.status === 303 && place !== undefined) {
      return { ...answer, headers: { ...answer.headers, Location: `./${place}` } };
    }
    const problem =
      answer.status === 429
        ? "Too many wrong tokens: try again in a second"
        : "That is not the token of this server";
    return this.#signIn(answer, contact, { to: place, ...typed }, problem);
  }

  /** A refusal, as somebody with a browser sees it. */
  async #refuse(
    request: Request,
    contact: Contact,
    refused: Answer,
    methods: string | undefined,
  ): Promise<Answer> {
    const { method, path } = contact;
    if (!methods && !isBrowser(request)) return refused;
    if (method === "GET" || method === "HEAD") {
      const { pathname, search } = new URL(request.url);
      const to = pathname.slice("/-/".length) + search;
      return this.#signIn(refused, contact, methods && isPlace(to) ? { to } : {});
    }
    if (method !== "POST" || !methods?.includes("POST")) return refused;
    const fields = await this.#form(request);
    // Another site cannot have its texts shown here.
    const isOurs = fields && this.access.isOurForm(request, contact, fields.get("proof"));
    return this.#signIn(refused, contact, isOurs ? wantedBy(path, fields) : { isChange: true });
  }

  /** The sign-in page in the place of a refusal; other answers as they are. */
  #signIn(answer: Answer, { path }: Contact, wanted: Wanted, problem?: string): Answer {
    const { status } = answer;
    if (status !== 401 && status !== 429 && status !== 503) return answer;
    const up = upFrom(path);
    const page = status === 503 ? awayPage(wanted) : signInPage(up, wanted, problem);
    const view = { up, assets: PAGE_VERSION, now: this.fleet.now, proof: "" };
    const made = this.#document(view, { ...page, status }, false);
    return { ...made, headers: { ...answer.headers, ...made.headers } };
  }

  #document(view: PageView, page: Page, isIn = true): Answer {
    const text = documentOf(view, page, this.fleet.place, isIn);
    const answer = content("text/html; charset=utf-8", new Blob([text]));
    const headers = { ...answer.headers, ...ADMIN_HEADERS, "Content-Security-Policy": PAGE_POLICY };
    return { ...answer, status: page.status ?? 200, headers };
  }

  /** What can be done with a path; `undefined`: nothing. */
  #methods(path: string): string | undefined {
    const forms = ["/-/sign-out", "/-/sign-in", "/-/rollouts"];
    if (forms.includes(path)) return "POST";
    if (path === "/-/rollouts/change" || /^\/-\/devices\/[^/]*$/.test(path))
      return "GET, HEAD, POST";
    return ["/-/", "/-/devices", "/-/rollouts/new"].includes(path) ? METHODS : undefined;
  }

  /** The fields of a form that was sent; `undefined`: it is too long. */
  async #form(request: Request): Promise<FormFields | undefined> {
    const body = await readBody(request, ADMIN.form).catch(() => new Uint8Array());
    return body && formFields(new TextDecoder().decode(body));
  }

  async #next(
    request: Request,
    contact: Contact,
    view: PageView,
    isReading: boolean,
  ): Promise<Next> {
    let typed: Markup | undefined;
    const { path } = contact;
    const { up } = view;
    try {
      if (isReading) return await this.#views.of(request, contact, view);
      const fields = await this.#form(request);
      const again = html`<a href="${up}">Look again</a>, and try it there.`;
      if (!fields) {
        return problemPage(413, "That is too long", `A form has up to ${ADMIN.form} bytes.`, again);
      }
      if (!this.access.hasProof(request, contact, fields.get("proof"))) {
        return problemPage(403, "That form was not of a page of this server", again);
      }
      typed = typedText(wantedBy(path, fields).typed);
      return await this.#change(request, contact, view, fields);
    } catch (error) {
      const { status, text } = await problemOf(error, this.fleet);
      const title = status === 400 ? "That cannot be done" : "That is not possible now";
      const isOfDevices = path.startsWith("/-/devices");
      const [place, name] = isOfDevices ? ["devices", "All devices"] : ["", "The fleet"];
      const next = html`<a href="${up}${place}">${name}</a>`;
      const page = problemPage(status, title, said(text), next);
      // A store that is away comes back.
      const isLive = isReading && status === 503;
      return { ...page, main: html`${page.main}${typed}`, isLive };
    }
  }

  async #change(
    request: Request,
    contact: Contact,
    view: PageView,
    fields: FormFields,
  ): Promise<Next> {
    const { up } = view;
    const { path } = contact;
    if (path === "/-/sign-out") return { see: up, cookie: this.access.noCookie };
    if (path === "/-/rollouts") {
      try {
        await this.fleet.startRollout(formRollout(fields));
      } catch (error) {
        return await this.#views.start(view, fields, await problemOf(error, this.fleet));
      }
      await this.#hearOfRollouts();
      return { see: up };
    }
    if (path === "/-/rollouts/change") {
      const { action, seen } = actionOf(fields);
      const rollout = (await this.fleet.rollouts()).find(({ id }) => id === seen.id);
      if (!rollout) return noRolloutPage(view);
      await this.fleet.changeRollout(rollout.version, rollout.model, action, seen);
      await this.#hearOfRollouts();
      return { see: up };
    }
    return await this.#edit(view, idOf(request, path), fields);
  }

  /** Devices that ask from now on get what the operator wants: this server hears of it at once. */
  async #hearOfRollouts(): Promise<void> {
    // It will be told again, and the store has it.
    await this.fleet.flush().catch(() => {});
  }

  async #edit(view: PageView, id: string, fields: FormFields): Promise<Next> {
    const device = saidText(id) === null ? undefined : await this.fleet.device(id);
    if (!device) return await this.#views.device(view, id);
    try {
      const { edit, conflicts, ...merged } = typedEdit(fields, device);
      if (conflicts.length > 0) {
        const text = `${conflicts.join("; ")}. What you typed stands below: save it, or change it`;
        return await this.#views.device(view, id, { status: 409, text, ...merged });
      }
      await this.fleet.edit(id, edit);
    } catch (error) {
      const problem = await problemOf(error, this.fleet);
      if (problem.status === 503) throw error;
      const field = (one: string) => fields.get(one) ?? "";
      const seen = { name: field("seen-name"), labels: field("seen-labels") };
      const typed = { name: field("name"), labels: field("labels"), seen };
      return await this.#views.device(view, id, { ...problem, ...typed });
    }
    return { see: deviceLink(view, id) };
  }
}

// ──── Serving ─────────────────────────────────────────────────────────────────────────────────────
// A server, with its fleet and its page if it has them.

/** A server, and its fleet. */
export interface FleetServer extends OTAServer {
  /** Absent: it takes nothing down. */
  readonly fleet: Fleet | undefined;
  /** Who may see and change it. */
  readonly admin: AdminToken | undefined;
}

/**
 * Serves a release root, and keeps up with it.
 *
 * @throws {OTAError} exit code 1 when the address cannot be listened on, 2 when the root or an
 *   option is wrong
 */
export async function serve(options: ServeOptions = {}): Promise<FleetServer> {
  const { root = ".", tls, fleet: url = false } = options;
  const secrets = [options.sign, tls?.key].filter((file) => file !== undefined);
  const releases = await Releases.open(root, { ...options, secrets });
  for (const secret of secrets) {
    if (fs.existsSync(secret)) refuseInside(releases.root, secret);
  }
  const { silent, warn, clock, tick, notify } = options;
  if (url === false) {
    if (options.staged || notify !== undefined) {
      throw new OTAError("--staged and --notify need a fleet", 2);
    }
    return { ...serveReleases(releases, options), fleet: undefined, admin: undefined };
  }
  const access = new AdminAccess(options);
  const ownFile = ownFileOf(url, releases.root);
  if (notify !== undefined) noticeURL(notify);
  const parts = new AsyncDisposableStack();
  const fleet = await Fleet.open({
    ...{ url, serving: true, ...(silent && { silent }), ...(warn && { warn }) },
    ...(options.log && { log: options.log }),
    ...{ ...(clock && { clock }), ...(tick !== undefined && { tick }) },
    newest: () => newestOf(releases),
    releases: () => releases,
    staged: options.staged === true,
  });
  parts.use(fleet);
  parts.use(access);
  const api = new FleetAPI(fleet, releases, access);
  const page = new FleetPage(fleet, releases, access);
  const answer: Route = (request, contact) => {
    return (contact.path.startsWith("/-/api") ? api : page).answer(request, contact);
  };
  try {
    const extension = fleetExtension(fleet, ownFile, answer, parts);
    const server = serveReleases(releases, options, extension);
    if (notify !== undefined) parts.use(new Notifier(fleet, notify, warn));
    if (options.staged) {
      const staging = parts.use(new VersionStaging(fleet, releases, options.log));
      void staging.open();
    }
    // Devices are served meanwhile: a store that is away takes its time.
    await access.open(fleet);
    return { ...server, fleet, admin: access };
  } catch (error) {
    await parts.disposeAsync();
    throw error;
  }
}

/** The newest releases that are offered. */
function newestOf({ roots }: Releases): NewestReleases {
  const newest = roots.map(({ model, versions, firmware }) => {
    const [version, image] = [versions.at(-1), firmware.at(-1)];
    return [model, { version: version?.name ?? null, firmware: image?.name ?? null }] as const;
  });
  const { "": own, ...models } = Object.fromEntries(newest);
  return { ...own!, models };
}

/**
 * The name of the fleet's file, if it is directly in the root.
 *
 * @throws {OTAError} exit code 2 when the server would serve it
 */
function ownFileOf(url: string, root: string): string | undefined {
  const { file } = storePlace(url);
  if (file === undefined || file === ":memory:" || !fs.existsSync(dirname(file))) return undefined;
  const path = relative(root, resolve(fs.realpathSync(dirname(file)), basename(file)));
  if (path.startsWith("../") || path.startsWith("/")) return undefined;
  if (path.startsWith(".") && !path.includes("/")) return path;
  const remedy = `name it .${basename(file)} directly in the root, or keep it elsewhere`;
  throw new OTAError(`the fleet ${file} is inside the root, and would be served: ${remedy}`, 2);
}

/**
 * What a fleet adds to its server.
 *
 * @param parts are disposed of with it
 */
function fleetExtension(
  fleet: Fleet,
  ownFile: string | undefined,
  answer: Route,
  parts: AsyncDisposableStack,
): Extension {
  return {
    ...{ ownFile, answer },
    note: (contact) => fleet.note(contact),
    newestFor: (contact, root) => fleet.newestFor(contact, root),
    metrics: (label) => fleetMetrics(fleet, label),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** Metrics of a fleet; of devices none while its store does not answer. */
async function fleetMetrics(fleet: Fleet, label: (version: string) => string): Promise<string[]> {
  const lines = [
    "# HELP ota_fleet_dropped_total Reports of devices that were lost before they were written",
    "# TYPE ota_fleet_dropped_total counter",
    `ota_fleet_dropped_total ${fleet.dropped}`,
  ];
  const summary = await fleet.summary().catch(() => undefined);
  if (!summary) return lines;
  lines.push("# HELP ota_devices Devices by state", "# TYPE ota_devices gauge");
  for (const state of DEVICE_STATES) {
    lines.push(`ota_devices{state="${state}"} ${summary.states[state]}`);
  }
  const versions = new Map<string, number>();
  for (const [version, count] of Object.entries(summary.versions)) {
    const name = version === "none" ? version : label(version);
    versions.set(name, (versions.get(name) ?? 0) + count);
  }
  lines.push(
    "# HELP ota_devices_by_version Devices by the version that they are on",
    "# TYPE ota_devices_by_version gauge",
  );
  for (const [name, count] of versions) {
    lines.push(`ota_devices_by_version{version="${name}"} ${count}`);
  }
  return lines;
}

// ════ VII Device disk ════════════════════════════════════════════════════════════════════════════
// The files of a device, and what it remembers of them below `.ota`. `Journal` changes them as one
// transaction: after a crash at any point they are the old release or the new one. Nothing here
// talks to a network.

// ──── Disk ──────────────────────────────────────────────────────────────────────────────────────
// What a device asks of its file system: few operations, each with one effect. Nothing is durable
// until `sync` says so. The journal does everything through this interface, so that whoever keeps
// a device's files elsewhere can, and so that every crash can be tried.

/** What `Disk.stat` tells of a path; links are not followed. */
export interface DiskStat {
  kind: "file" | "directory" | "link" | "other";
  size: number;
  /** The file system it is on. */
  device: number;
  /** Permission bits. */
  mode: number;
  /** Who owns it, where that is known. */
  owner?: { uid: number; gid: number };
  /** The same as long as nobody wrote to the file: its size, time of change and inode. */
  stamp: string;
}

/**
 * The files of a device. All paths are below its root, `/`-separated; `""` is the root itself.
 * Failures throw errors with a `code`, as those of `node:fs` have.
 */
export interface Disk {
  /** Makes the root and what is above it, durably, where it is not there. */
  makeRoot(): Promise<void>;
  /** `undefined` when nothing is there, or what is above it is not a directory. */
  stat(path: string): DiskStat | undefined;
  list(path: string): string[];
  /** Up to `length` bytes from `offset`; fewer at the end of the file. */
  read(path: string, offset: number, length: number): Uint8Array;
  /** Makes the file hold `data`, whatever it held. */
  write(path: string, data: Uint8Array): void;
  /** Adds to the end of the file, which is made when it is not there. */
  append(path: string, data: Uint8Array): void;
  /** Makes a hard link; throws where the file system has none. */
  link(from: string, to: string): void;
  /** Another file with the same content and mode. */
  copy(from: string, to: string): void;
  /** Moves a file or directory; a file at `to` is replaced, and is at no moment missing. */
  rename(from: string, to: string): void;
  unlink(path: string): void;
  mkdir(path: string): void;
  rmdir(path: string): void;
  /** Gives a file or a directory its permission bits and, as far as we may, its owner. */
  chmod(path: string, mode: number, owner?: { uid: number; gid: number }): void;
  /** Whether entries can be made in a directory. */
  writable(path: string): boolean;
  /**
   * Takes an exclusive lock that dies with the process, or returns `undefined` when another
   * process has it.
   */
  lock(path: string): Disposable | undefined;
  /** Bytes free for us on the file system of a path. */
  free(path: string): number;
  /**
   * What is mounted below the root: other file systems, and files and directories of the same one
   * (`mount --bind`), which `DiskStat.device` does not tell. Nothing can be renamed over them or
   * out of them.
   */
  mounts(): Set<string>;
  /**
   * Resolves when what was done to this file's content, or this directory's entries, is durable.
   */
  sync(path: string): Promise<void>;
}

/**
 * The disk of a device whose files are in a directory of this machine.
 *
 * @param root absolute, links resolved
 */
export function fileSystem(root: string): Disk {
  const at = (path: string) => (path === "" ? root : `${root}/${path}`);
  return {
    makeRoot: () => makeDirectory(root),
    stat: (path) => statFile(at(path)),
    list: (path) => fs.readdirSync(at(path)),
    read: (path, offset, length) => readAt(at(path), offset, length),
    write: (path, data) => fs.writeFileSync(at(path), data),
    append: (path, data) => fs.appendFileSync(at(path), data),
    link: (from, to) => fs.linkSync(at(from), at(to)),
    copy: (from, to) => fs.copyFileSync(at(from), at(to)),
    rename: (from, to) => fs.renameSync(at(from), at(to)),
    unlink: (path) => fs.unlinkSync(at(path)),
    mkdir: (path) => void fs.mkdirSync(at(path)),
    rmdir: (path) => fs.rmdirSync(at(path)),
    chmod(path, mode, owner) {
      // Before the mode, of which it clears bits. Only root may.
      if (owner) ignoreErrors(() => fs.chownSync(at(path), owner.uid, owner.gid));
      fs.chmodSync(at(path), mode);
    },
    writable(path) {
      try {
        fs.accessSync(at(path), fs.constants.W_OK | fs.constants.X_OK);
        return true;
      } catch {
        return false;
      }
    },
    lock: (path) => lockFile(at(path)),
    free(path) {
      const { bavail, bsize } = fs.statfsSync(at(path));
      return bavail * bsize;
    },
    mounts: () => mountPoints(root),
    sync: (path) => syncFile(at(path)),
  };
}

async function makeDirectory(path: string): Promise<void> {
  const kind = statFile(path)?.kind;
  if (kind === "directory") return;
  if (kind) throw Object.assign(new Error(`${path} is not a directory`), { code: "ENOTDIR" });
  const above = dirname(path);
  await makeDirectory(above);
  fs.mkdirSync(path);
  await syncFile(above);
}

function statFile(path: string): DiskStat | undefined {
  try {
    const stat = fs.lstatSync(path);
    const { size, dev: device, uid, gid } = stat;
    const kind = stat.isFile()
      ? "file"
      : stat.isDirectory()
        ? "directory"
        : stat.isSymbolicLink()
          ? "link"
          : "other";
    const stamp = `${size} ${stat.mtimeMs} ${stat.ino}`;
    return { kind, size, device, mode: stat.mode & 0o7777, owner: { uid, gid }, stamp };
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw error;
  }
}

function readAt(path: string, offset: number, length: number): Uint8Array {
  const fd = fs.openSync(path, "r");
  try {
    const piece = new Uint8Array(length);
    return piece.subarray(0, fs.readSync(fd, piece, 0, length, offset));
  } finally {
    fs.closeSync(fd);
  }
}

function lockFile(path: string): Disposable | undefined {
  // SQLite's lock is the kernel's; there is never anything in this database. Its journal is kept in
  // memory, since a full disk has no room for a file.
  if (fs.existsSync(path) && fs.statSync(path).size > 0) fs.truncateSync(path);
  const database = new Database(path, { create: true, readwrite: true });
  try {
    database.run("PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE");
    return { [Symbol.dispose]: () => database.close() };
  } catch (error) {
    database.close();
    if (errorCode(error)?.startsWith("SQLITE_BUSY")) return undefined;
    throw error;
  }
}

async function syncFile(path: string): Promise<void> {
  const file = await fs.promises.open(path, "r");
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}

/**
 * What is mounted below a directory, as paths below it. Empty where the system does not tell.
 *
 * @param root absolute, links resolved
 */
export function mountPoints(root: string): Set<string> {
  const below = root.endsWith("/") ? root : `${root}/`;
  let table = "";
  // Not Linux, or no /proc: empty.
  ignoreErrors(() => (table = fs.readFileSync("/proc/self/mountinfo", "utf8")));
  const points = table.split("\n").map((line) => {
    const escaped = line.split(" ")[4] ?? "";
    return escaped.replace(/\\([0-7]{3})/g, (_, octal) => String.fromCharCode(parseInt(octal, 8)));
  });
  return new Set(points.filter((at) => at.startsWith(below)).map((at) => at.slice(below.length)));
}

/** Unlinks or removes something that may be gone already. */
function ifThere(remove: () => void): void {
  try {
    remove();
  } catch (error) {
    if (!isMissing(error)) throw error;
  }
}

// ──── Files ──────────────────────────────────────────────────────────────────────────────────────
// Reading a device's files. Symbolic links are never followed.

/** The whole of a small file, or `undefined` when it is not there. */
function readText(disk: Disk, path: string): string | undefined {
  const stat = disk.stat(path);
  if (stat?.kind !== "file") return undefined;
  return new TextDecoder().decode(disk.read(path, 0, stat.size));
}

/** Replaces a small file as a whole: whatever happens, it has its old or its new text. */
async function replaceText(disk: Disk, path: string, text: string): Promise<void> {
  disk.write(`${path}.new`, utf8(text));
  await disk.sync(`${path}.new`);
  disk.rename(`${path}.new`, path);
}

/** @returns whether both names share one content, so that there is nothing to make durable */
function linkOrCopy(disk: Disk, from: string, to: string): boolean {
  try {
    disk.link(from, to);
    return true;
  } catch (error) {
    // FAT has no links, and some systems forbid them.
    if (!["EPERM", "ENOTSUP", "ENOSYS", "EMLINK"].includes(errorCode(error) ?? "")) throw error;
    disk.copy(from, to);
    return false;
  }
}

/** The active firmware. */
export interface ActiveFirmware {
  version: string;
  slot: 0 | 1;
}

/** The image of a firmware slot. */
function slotPath(slot: 0 | 1): string {
  return `${OTA_DIR}/ota_${slot}.bin`;
}

/** Whether a path is that of a firmware slot. */
function isSlot(path: string): boolean {
  return path === slotPath(0) || path === slotPath(1);
}

/** A device's files, to be read. */
export class Files {
  /** @param root what messages call the device's root */
  constructor(
    readonly root: string,
    readonly disk: Disk,
  ) {}

  /** The firmware that runs, as otadata says; `null` when none was ever flashed. */
  get firmware(): ActiveFirmware | null {
    const otadata = parseJSON(readText(this.disk, `${OTA_DIR}/otadata`) ?? "");
    if (!isObject(otadata) || typeof otadata.version !== "string") return null;
    return { version: otadata.version, slot: otadata.slot === 1 ? 1 : 0 };
  }

  stat(path: string): DiskStat | undefined {
    return this.disk.stat(path);
  }

  isFile(path: string): boolean {
    return this.stat(path)?.kind === "file";
  }

  isDirectory(path: string): boolean {
    return this.stat(path)?.kind === "directory";
  }

  readPieces(path: string, take: (piece: Uint8Array) => void): void {
    const length = 256 * 1024;
    for (let offset = 0, piece; ; offset += piece.length) {
      piece = this.disk.read(path, offset, length);
      take(piece);
      if (piece.length < length) return;
    }
  }

  /** The lowercase hex digest of a file's content. */
  digest(path: string, algorithm: "sha1" | "sha256" = "sha256"): string {
    const hasher = new Bun.CryptoHasher(algorithm);
    this.readPieces(path, (piece) => hasher.update(piece));
    return hasher.digest("hex");
  }

  /** Whether a file is there and has the content of that key (SHA-256 or SHA-1) and size. */
  hasContent(path: string, key: string, size?: number): boolean {
    const stat = this.stat(path);
    if (stat?.kind !== "file" || (size !== undefined && stat.size !== size)) return false;
    return this.digest(path, algorithmOf(key)) === key;
  }

  /** The bytes of a file, or `undefined` when it is not there, empty, or larger than `limit`. */
  readWhole(path: string, limit: number): Uint8Array | undefined {
    const stat = this.stat(path);
    if (stat?.kind !== "file" || stat.size === 0 || stat.size > limit) return undefined;
    return this.disk.read(path, 0, stat.size);
  }

  /** A file as a dictionary; `undefined` for none, or one that is empty or larger than `limit`. */
  dictionary(path: string, limit: number): Dictionary | undefined {
    const stat = this.stat(path);
    if (stat?.kind !== "file" || stat.size === 0 || stat.size > limit) return undefined;
    const read: ReadOld = (from, length) => this.disk.read(path, from, length);
    return { size: stat.size, sha256: this.digest(path), read };
  }
}

// ──── Preflight ──────────────────────────────────────────────────────────────────────────────────
// What would make a change fail half way is found before anything is fetched for it.

/** @throws {OTAError} naming the first path that is a symbolic link, or goes through one */
function refuseLinks(files: Files, paths: readonly string[]): void {
  for (const path of new Set([...paths, ...paths.flatMap(ancestors)])) {
    if (files.stat(path)?.kind !== "link") continue;
    throw new OTAError(`${path} below ${files.root} is a symbolic link; updates never follow one`);
  }
}

/**
 * Checks that files can be placed and removed.
 *
 * @param put paths that will hold new files
 * @param remove paths that will be deleted
 * @throws {OTAError} naming the first path that cannot be changed, and why
 */
export function preflight(files: Files, put: Iterable<string>, remove: Iterable<string>): void {
  const { disk, root } = files;
  const written = [...put];
  const removed = new Set(remove);
  const device = disk.stat(OTA_DIR)!.device;
  const stop = (path: string, why: string): never => {
    throw new OTAError(`cannot change ${path} below ${root}: ${why}; nothing was changed`);
  };
  const checkDirectory = (path: string) => {
    const stat = disk.stat(path);
    if (!stat || (stat.kind === "file" && removed.has(path))) return;
    if (stat.kind !== "directory") stop(path, "it is in the way of a directory");
    if (stat.device !== device) {
      stop(path, `it is on another file system than ${OTA_DIR}, so it could not be taken back`);
    }
    if (!disk.writable(path)) stop(path, "no permission to write there");
  };
  const directories = new Set([...written, ...removed].flatMap(ancestors));
  directories.forEach(checkDirectory);
  const touched = [...written, ...removed, ...directories, OTA_DIR];
  const mounts = disk.mounts();
  for (const path of touched.filter((path) => mounts.has(path))) {
    stop(path, "something is mounted there, and cannot be replaced; mount the whole root instead");
  }
  if (!disk.writable("")) stop("anything", "no permission to write there");
  for (const path of removed) if (!files.isFile(path)) stop(path, "it is not a regular file");
  for (const path of written) {
    const kind = disk.stat(path)?.kind;
    if (kind === "other") stop(path, "it is not a regular file");
    const other = kind === "directory" && firstOther(files, path, removed);
    if (other) stop(path, `it is a directory that holds ${other}, which is not the updater's`);
  }
}

/** A file in a directory that a change does not remove. */
function firstOther(
  files: Files,
  directory: string,
  removed: ReadonlySet<string>,
): string | undefined {
  for (const name of files.disk.list(directory)) {
    const path = `${directory}/${name}`;
    const other = files.isDirectory(path) ? firstOther(files, path, removed) : path;
    if (other && !removed.has(other)) return other;
  }
  return undefined;
}

// ──── Staging ────────────────────────────────────────────────────────────────────────────────────
// New content, kept in `.ota/staged` until a change puts it in its place. It is named by its key,
// the hash that it was asked for with: SHA-256, or SHA-1 where the server sends no other.

const STAGED = `${OTA_DIR}/staged`;

/** Content that was received in part. It outlives the process and can be resumed. */
class PartialDownload {
  size: number;
  /** The tag it was sent with; without one it cannot be resumed. */
  etag: string | undefined;
  encoding: Encoding;
  readonly path: string;
  readonly #sidecar: string;

  constructor(
    private readonly disk: Disk,
    key: string,
  ) {
    this.path = `${STAGED}/${key}.part`;
    this.#sidecar = `${this.path}.sent`;
    this.size = disk.stat(this.path)?.size ?? 0;
    const sent = parseJSON(readText(disk, this.#sidecar) ?? "");
    const { etag, encoding } = (isObject(sent) ? sent : {}) as Partial<PartialDownload>;
    this.etag = etag;
    this.encoding = encoding ?? "identity";
  }

  /** Starts over from the first byte. */
  start(etag?: string, encoding: Encoding = "identity"): void {
    // Removed first: the tag of an earlier download does not belong to this one.
    ifThere(() => this.disk.unlink(this.#sidecar));
    this.disk.write(this.path, new Uint8Array());
    if (etag !== undefined)
      this.disk.write(this.#sidecar, utf8(JSON.stringify({ etag, encoding })));
    Object.assign(this, { size: 0, etag, encoding });
  }

  append(bytes: Uint8Array): void {
    this.disk.append(this.path, bytes);
    this.size += bytes.byteLength;
  }

  drop(): void {
    ifThere(() => this.disk.unlink(this.path));
    ifThere(() => this.disk.unlink(this.#sidecar));
    this.size = 0;
  }

  /** Turns it into staged content; the caller has verified it. */
  async finish(): Promise<void> {
    await this.disk.sync(this.path);
    this.disk.rename(this.path, this.path.replace(/\.part$/, ""));
    if (this.disk.stat(this.#sidecar)) this.disk.unlink(this.#sidecar);
  }
}

export class Staging {
  /** Key → SHA-256 of content that is known by its SHA-1. */
  readonly #sha256 = new Map<string, string>();

  constructor(private readonly files: Files) {}

  path(key: string): string {
    return `${STAGED}/${key}`;
  }

  /** Whether the content is there, complete and verified. */
  has(key: string): boolean {
    return this.files.stat(this.path(key)) !== undefined;
  }

  partial(key: string): PartialDownload {
    return new PartialDownload(this.files.disk, key);
  }

  /** Stages generated content, and returns its key. */
  async add(bytes: Uint8Array): Promise<string> {
    const key = sha256(bytes);
    const partial = this.partial(key);
    this.files.disk.write(partial.path, bytes);
    await partial.finish();
    return key;
  }

  /** Stages content that another file of the device has, and returns whether it does. */
  async addCopy(key: string, path: string): Promise<boolean> {
    if (!this.files.hasContent(path, key)) return false;
    const partial = this.partial(key);
    partial.drop(); // One of an earlier try may be there, and read-only.
    this.files.disk.copy(path, partial.path);
    const isWhole = this.files.hasContent(partial.path, key);
    if (isWhole) await partial.finish();
    else partial.drop();
    return isWhole;
  }

  /** The SHA-256 of staged content, whatever hash it was asked for with. */
  sha256(key: string): string {
    if (algorithmOf(key) === "sha256") return key;
    const known = this.#sha256.get(key) ?? this.files.digest(this.path(key));
    this.#sha256.set(key, known);
    return known;
  }

  /** Drops what an update staged and did not use. */
  clear(): void {
    const { disk } = this.files;
    ignoreErrors(() => disk.list(STAGED).forEach((name) => disk.unlink(this.path(name))));
  }

  /** Bytes that it takes to back files up: none where they can be linked. */
  backupBytes(paths: readonly string[]): number {
    const { disk } = this.files;
    const probes = [`${STAGED}/probe.1`, `${STAGED}/probe.2`] as const;
    const remove = (path: string) => ifThere(() => disk.unlink(path));
    remove(probes[1]);
    disk.write(probes[0], new Uint8Array());
    const isFree = linkOrCopy(disk, ...probes);
    probes.forEach(remove);
    return isFree ? 0 : paths.reduce((sum, path) => sum + (disk.stat(path)?.size ?? 0), 0);
  }
}

// ──── State format ────────────────────────────────────────────────────────────────────────────────
// What a device remembers, as JSON in `.ota`: what is installed, what failed, and the transactions
// that changed the tree, each with its rollback plan.

/** What is installed on a device. */
export interface Installed {
  version: string;
  /** What it was updated from; `null` when it had nothing. */
  previous_version: string | null;
  /** Path → SHA-256, of every file that came from a release. */
  files: Record<string, string>;
  /** Those that the release makes executable. */
  executable?: string[];
  /**
   * Path → `DiskStat.stamp` of a file when it had that SHA-256: it is not hashed again while that
   * stays the same. Without stamps the record may lack files, and is completed (see `adopt`).
   */
  stamps?: Record<string, string>;
  /** Another version that `flash/OTA_VERSION.py` named, and whose files were looked for. */
  alsoNamed?: string;
  /** The same of the active firmware image. */
  image?: { sha256: string; stamp: string };
  /** When the latest step was issued that was signed at home. */
  issued?: string;
}

/** A release that failed and was rolled back. */
export interface FailedRelease {
  version: string;
  /** `targetDigest` of its files. */
  digest: string;
  /** The key of the firmware image that came with it. */
  image?: string;
  /** The firmware's version, where firmware was all that was new. */
  firmware?: string;
}

/** Releases that are remembered as failed, at the most. */
const FAILED_KEPT = 16;

/** Whether two failures are of the same files with the same firmware. */
function isSameFailure(a: FailedRelease, b: Pick<FailedRelease, "digest" | "image">): boolean {
  return a.digest === b.digest && a.image === b.image;
}

function withFailure(failed: readonly FailedRelease[], one: FailedRelease): FailedRelease[] {
  return [...failed.filter((other) => !isSameFailure(other, one)), one].slice(-FAILED_KEPT);
}

/** What a person is told of a failed release: `1.0.1`, `firmware 1.0.1`. */
function failedName({ version, firmware }: FailedRelease): string {
  return firmware === undefined ? version : `firmware ${firmware}`;
}

/** A command that decides whether a release on trial is good. */
export interface Check {
  /** For `sh -c`. */
  command: string;
  /** Seconds. */
  timeout: number;
}

/** One direction of a transaction; its steps are run in this order. */
interface Steps {
  unlink: string[];
  rmdir: string[];
  mkdir: string[];
  place: [from: string, to: string][];
  /** Directories that are to be as they were. */
  modes?: Record<string, Pick<DiskStat, "mode" | "owner">>;
}

/** How to go back from a release, and what is remembered of that release then. */
interface RollbackPlan {
  /** What was recorded before. */
  before: State;
  failed: FailedRelease;
  back: Steps;
  /** Path → SHA-256 of what `back` places there, where that is known. ota.ts 0.1.0 wrote none. */
  restored?: Record<string, string>;
  /** Path → SHA-256 of what was placed: how changes by the application are noticed. */
  placed: Record<string, string>;
}

/** A change of the tree. It is written once and never changed. */
interface Transaction extends RollbackPlan {
  format: number;
  id: string;
  to: Installed;
  forward: Steps;
  /** Files of the application that made way: where they were, and where they are. */
  displaced: [path: string, now: string][];
  check: Check | null;
  restart: string | null;
  /** The damaged records, as they were set aside, in whose place this brings a good one. */
  repairs: string[];
  /** Of a repair: the plan for the release before the one that it repaired, if any. */
  release?: RollbackPlan | null;
}

/** The rollback plan of the installed release; none for a repair of one that had none. */
function rollbackPlanOf(transaction: Transaction): RollbackPlan | undefined {
  const { release = transaction } = transaction;
  return release ?? undefined;
}

/** The content of state.json. */
export interface State {
  format: number;
  installed: Installed | null;
  failed: FailedRelease[];
  /** The id of the transaction that brought what is installed, while it can be taken back. */
  journal: string | null;
  /** How often the check of a release on trial was started; `null`: not on trial. */
  trial: { starts: number } | null;
  /** A restart command that is still to be run. */
  restart: string | null;
}

/** 0.1.0 wrote format 1, which is read as well. */
const FORMAT = 2;
const isFormat = (format: unknown) => format === FORMAT || format === 1;
const EMPTY: State = {
  format: FORMAT,
  installed: null,
  failed: [],
  journal: null,
  trial: null,
  restart: null,
};

function asInstalled(value: unknown, name: string): Installed {
  const { version, files, issued } = asObject(value, name);
  asText(version, `${name}.version`);
  asObject(files, `${name}.files`);
  if (issued !== undefined) asTime(issued, `${name}.issued`);
  return value as Installed;
}

function asState(value: unknown, name = "the state"): State {
  const { format, installed, failed, trial } = asObject(value, name);
  if (!isFormat(format)) malformed(`${name}: not of format ${FORMAT}`);
  if (installed !== null) asInstalled(installed, "installed");
  asList(failed, "failed", (one, at) => asText(asObject(one, at).version, `${at}.version`));
  if (trial !== null) asObject(trial, "trial");
  return value as State;
}

function asSteps(value: unknown, name: string): Steps {
  const steps = asObject(value, name);
  for (const kind of ["unlink", "rmdir", "mkdir", "place"]) {
    asList(steps[kind], `${name}.${kind}`, (one) => one);
  }
  return value as Steps;
}

function asTransaction(value: unknown): Transaction {
  const { format, id, before, to, placed, forward, back } = asObject(value, "the transaction");
  if (!isFormat(format)) malformed(`the transaction: not of format ${FORMAT}`);
  asText(id, "id");
  asState(before, "before");
  asInstalled(to, "to");
  asObject(placed, "placed");
  asSteps(forward, "forward");
  asSteps(back, "back");
  return upgrade(value as Transaction);
}

/** A transaction as ota.ts 0.1.0 wrote it lacks what came later. */
function upgrade(transaction: Transaction): Transaction {
  const { digest = "" } = transaction as { digest?: string };
  const failed = { version: transaction.to.version, digest };
  return { ...{ failed, displaced: [] }, ...transaction };
}

// ──── State files ─────────────────────────────────────────────────────────────────────────────────
// The files in which state and transactions are kept. What was under way when a process died is
// seen by their names:
//
//   commit.json, and state.json does not name it   a commit was under way: go forward
//   commit.json, and state.json names it           it is done, and maybe on trial
//   journal.json                                   the release before can be gone back to
//   undo.json (commit.json, renamed)               a commit failed: go back
//   rollback.json (either, renamed)                the release is bad: go back
//
// So a commit that fails, and a release that fails its check, leave the older rollback plan as it
// was. Undo and rollback are two names, not one: only a rollback remembers the release as failed,
// the state can be the same before both, and a full disk has room for a rename and nothing more. A
// record that makes no sense is set aside and never overwritten.

/** A file of a transaction, without `.json`. */
type RecordName = "commit" | "undo" | "journal" | "rollback";
/** Why a transaction is taken back. */
type Reversal = "undo" | "rollback";

const RECORD_NAMES: readonly RecordName[] = ["commit", "undo", "journal", "rollback"];
const recordPath = (name: RecordName | "state") => `${OTA_DIR}/${name}.json`;

class Records {
  state: State = EMPTY;
  /** A change that is under way, or on trial. */
  commit: Transaction | undefined;
  /** The change that brought the release which stands. */
  done: Transaction | undefined;
  /** Paths of records that were set aside. */
  damaged: readonly string[] = [];
  /** Whether rollback.json is left from a rollback that has finished. */
  isRollbackOver = false;
  readonly #disk: Disk;

  constructor(private readonly files: Files) {
    this.#disk = files.disk;
  }

  /**
   * Reads all records.
   *
   * @throws {OTAError} when a newer version of this tool wrote one
   */
  load(): void {
    const names = this.#disk.list(OTA_DIR).filter((name) => name.endsWith(".corrupt"));
    this.damaged = names.map((name) => `${OTA_DIR}/${name}`);
    const state = this.#read("state", asState);
    if (state) this.state = state;
    const undo = this.#read("undo", asTransaction);
    const rollback = this.#read("rollback", asTransaction);
    this.commit = undo ?? this.#read("commit", asTransaction);
    this.done = this.#read("journal", asTransaction);
    if (rollback?.id === this.state.journal) {
      if (this.state.trial) this.commit = rollback;
      else this.done = rollback;
    } else if (rollback) {
      this.isRollbackOver = true;
    } else if (!this.commit && this.done && isCommitOf010(this.done, this.state)) {
      this.#rename("journal", "commit");
      this.commit = this.done;
      this.done = undefined;
    }
    // A state is written before the first transaction: it was lost, and what it said is not known.
    const isStateLost = !state && (this.commit ?? this.done)?.restored !== undefined;
    if (isStateLost && this.damaged.length === 0) this.setAsideTransactions();
  }

  /** Back from a change that is under way or on trial; else to the release before. */
  get rollbackPlan(): RollbackPlan | undefined {
    if (this.commit) return this.commit;
    return this.done?.id === this.state.journal ? rollbackPlanOf(this.done) : undefined;
  }

  /** What was interrupted. */
  get unfinished(): "commit" | Reversal | undefined {
    const reversal = (["undo", "rollback"] as const).find((name) => this.#has(name));
    const isCut = this.commit !== undefined && this.commit.id !== this.state.journal;
    return reversal ?? (isCut ? "commit" : undefined);
  }

  #read<T>(name: RecordName | "state", as: (json: unknown) => T): T | undefined {
    const path = recordPath(name);
    const text = readText(this.#disk, path);
    if (text === undefined) return undefined;
    const json = parseJSON(text);
    const format = isObject(json) ? json.format : undefined;
    if (typeof format === "number" && format > FORMAT) {
      throw new OTAError(
        `${this.files.root}/${path} has format ${format}, and this ota.ts (${TOOL_VERSION}) knows ` +
          `up to ${FORMAT}: use the newer ota.ts that wrote it`,
      );
    }
    const record = wellFormed(as, json);
    if (!record) this.#setAside(name);
    return record;
  }

  /** Keeps a record that cannot be used. */
  #setAside(name: RecordName | "state"): void {
    const kept = `${recordPath(name)}.${crypto.randomUUID()}.corrupt`;
    this.#disk.rename(recordPath(name), kept);
    this.damaged = [...this.damaged, kept];
  }

  setAsideTransactions(): void {
    for (const name of RECORD_NAMES) if (this.#has(name)) this.#setAside(name);
    this.commit = this.done = undefined;
  }

  /** Deletes the damaged records that were set aside, once there is a good one again. */
  dropDamaged(): void {
    for (const path of this.damaged) ignoreErrors(() => this.#disk.unlink(path));
    this.damaged = [];
  }

  /** Deletes damaged records in whose place there is a good one. Durable after `sync`. */
  dropRepaired(paths: readonly string[]): void {
    for (const path of paths) ifThere(() => this.#disk.unlink(path));
    this.damaged = this.damaged.filter((path) => !paths.includes(path));
  }

  /** Resolves when the state is durable, and with it all changes of names before. */
  async write(state: State): Promise<void> {
    const text = JSON.stringify({ ...state, format: FORMAT });
    await replaceText(this.#disk, recordPath("state"), text);
    this.state = state; // Whether or not that can be made durable.
    await this.sync();
  }

  /** Writes a transaction. It is durable after `sync`. */
  async begin(transaction: Transaction): Promise<void> {
    // Distinguishes a lost state from one that was never written.
    if (!this.#disk.stat(recordPath("state"))) await this.write(this.state);
    await replaceText(this.#disk, recordPath("commit"), JSON.stringify(transaction));
    this.commit = transaction;
  }

  /** Marks the commit as done. Not durable at once: the next `open` would do it again. */
  settle(): void {
    if (!this.commit) return;
    this.#rename("commit", "journal");
    this.done = this.commit;
    this.commit = undefined;
  }

  /** Marks durably that the commit under way, or the installed release, is being taken back. */
  async beginReversal(why: Reversal): Promise<void> {
    if (!this.#has(why)) this.#rename(this.commit ? "commit" : "journal", why);
    await this.sync();
  }

  /** Marks durably that this is done. */
  async endReversal(why: Reversal): Promise<void> {
    this.#remove(why);
    await this.sync();
    if (!this.commit) this.done = undefined;
    this.commit = undefined;
  }

  /** Removes finished transactions, which no record names. */
  dropEnded(): void {
    if (this.isRollbackOver) this.#remove("rollback");
    const name = this.commit?.before.journal ?? this.state.journal;
    if (!this.done || this.done.id === name) return;
    this.#remove("journal");
    this.done = undefined;
  }

  /** Removes all transactions, durably. */
  async forgetTransactions(): Promise<void> {
    for (const name of RECORD_NAMES) this.#remove(name);
    await this.sync();
    this.commit = this.done = undefined;
  }

  sync(): Promise<void> {
    return this.#disk.sync(OTA_DIR);
  }

  #has(name: RecordName): boolean {
    return this.#disk.stat(recordPath(name)) !== undefined;
  }

  #rename(from: RecordName, to: RecordName): void {
    this.#disk.rename(recordPath(from), recordPath(to));
  }

  #remove(name: RecordName): void {
    ifThere(() => this.#disk.unlink(recordPath(name)));
  }
}

/** Whether a journal.json is a commit under way: ota.ts 0.1.0 had one name for both. */
function isCommitOf010({ id, restored }: Transaction, { journal }: State): boolean {
  return restored === undefined && id !== journal;
}

/**
 * Reads the recorded state without a lock, and so without finishing anything.
 *
 * @throws {OTAError} when it is damaged, or of a newer version of this tool
 */
export function peekState({ root, disk }: Files): State {
  const path = recordPath("state");
  const text = readText(disk, path);
  if (text === undefined) return EMPTY;
  const state = wellFormed(asState, parseJSON(text));
  if (state) return state;
  throw new OTAError(`${root}/${path} is damaged, or of a newer ota.ts than ${TOOL_VERSION}`);
}

/** Whether `Journal.open` would find nothing to finish. */
function isSettled(files: Files): boolean {
  const read = (name: RecordName) => parseJSON(readText(files.disk, recordPath(name)) ?? "");
  if (read("undo") || read("rollback")) return false;
  const latest = wellFormed(asTransaction, read("commit") ?? read("journal"));
  return !latest || latest.id === peekState(files).journal;
}

// ──── Inventory ──────────────────────────────────────────────────────────────────────────────────
// What a device really has, beside what is recorded of it: files are edited, deleted and damaged by
// others, and records are lost or put back.

/** How a file differs from its record. */
export interface Difference {
  path: string;
  found: "missing" | "changed" | "not executable" | "no regular file";
}

/** What is really there of a release. */
export interface Inventory {
  /** The record, with the stamps of what was hashed just now; absent: nothing is recorded. */
  installed?: Installed;
  /** Path → SHA-256 of what is there of the record's paths; not of what has lost its mode. */
  files: Map<string, string>;
  /** SHA-256 of the active firmware image, as of nothing when it is gone; absent: there is none. */
  image?: string;
  differences: Difference[];
  /** Whether the record has other stamps now. */
  isNewer: boolean;
}

/**
 * Compares a record with what is there.
 *
 * @param thorough whether files are hashed although they look as they did when they were recorded
 */
export function takeInventory(
  files: Files,
  recorded: Installed | null,
  thorough = false,
): Inventory {
  const found: Inventory = { files: new Map(), differences: [], isNewer: false };
  if (recorded) found.installed = { ...recorded, stamps: { ...recorded.stamps } };
  for (const path of Object.keys(recorded?.files ?? {})) checkFile(files, path, found, thorough);
  checkFirmware(files, found, thorough);
  return found;
}

function checkFile(files: Files, path: string, found: Inventory, thorough: boolean): void {
  const { files: recorded, stamps = {}, executable = [] } = found.installed!;
  const differ = (how: Difference["found"]) => void found.differences.push({ path, found: how });
  const stat = files.stat(path);
  if (stat?.kind !== "file") return differ(stat ? "no regular file" : "missing");
  const isSame = !thorough && stamps[path] === stat.stamp;
  const digest = isSame ? recorded[path]! : files.digest(path);
  if (digest !== recorded[path]) differ("changed");
  else if (!isExecutable(stat) && executable.includes(path)) return differ("not executable");
  else if (stamps[path] !== stat.stamp) {
    stamps[path] = stat.stamp;
    found.isNewer = true;
  }
  found.files.set(path, digest);
}

function checkFirmware(files: Files, found: Inventory, thorough: boolean): void {
  const active = files.firmware;
  if (!active) return;
  const path = slotPath(active.slot);
  const stat = files.stat(path);
  if (stat?.kind !== "file") {
    found.image = sha256("");
    found.differences.push({ path, found: "missing" });
    return;
  }
  const { stamp } = stat;
  const { installed } = found;
  const known = installed?.image;
  const isSame = !thorough && known?.stamp === stamp;
  found.image = isSame ? known.sha256 : files.digest(path);
  if (known && found.image !== known.sha256) found.differences.push({ path, found: "changed" });
  else if (installed && known?.stamp !== stamp) {
    installed.image = { sha256: found.image, stamp };
    found.isNewer = true;
  }
}

/** Whether the owner may run a file. */
function isExecutable({ mode }: Pick<DiskStat, "mode">): boolean {
  return (mode & 0o100) !== 0;
}

/**
 * Makes or completes the record of a device that says which release it is on: what of that release
 * is really there, whatever its content is now.
 *
 * @param list the manifest of all files of that release
 * @param recorded what is recorded already
 */
function adopt(
  files: Files,
  version: string,
  list: Manifest,
  recorded: Installed | null,
): Installed {
  const adopted = {
    ...{ version, previous_version: null, ...recorded },
    files: { ...recorded?.files },
    stamps: { ...recorded?.stamps },
  };
  const runs = new Set(recorded?.executable);
  for (const { dst_path, executable } of list.new) {
    const path = dst_path.slice(1);
    const stat = files.stat(path);
    if (stat?.kind !== "file") continue;
    adopted.files[path] = files.digest(path);
    adopted.stamps[path] = stat.stamp;
    // A file without the bit here differs from the release, and is repaired.
    if (executable) runs.add(path);
  }
  return { ...adopted, executable: [...runs] };
}

// ──── Change preparation ──────────────────────────────────────────────────────────────────────────
// Works out the steps of a change and of its rollback. All content that they need, old and new, is
// in place and durable before the first of them is run.

/** What an update changes. Contents are named by the keys under which they were staged. */
export interface Change {
  /** What the device is on, where there is no record of it. */
  from?: Installed;
  /** The record; files that are put may be known by their SHA-1 there. */
  installed: Installed;
  /** What is remembered of the release, should it fail. */
  failure: FailedRelease;
  /** Path → staged key. */
  put: Map<string, string>;
  remove: string[];
  /** Those of `put` where the application has a file: it is moved aside and kept. */
  displace: string[];
  firmware?: { key: string; version: string };
  /** Puts the release on trial. */
  check?: Check;
  /** Must be run whenever the tree has changed. */
  restart?: string;
  /** Repairs the installed release: the rollback still leads to the release before it. */
  repair?: boolean;
}

/** Syncs at once. */
const SYNCS = 16;

/** The directory that keeps the content which a change replaces. */
function backupPath(id: string): string {
  return `${OTA_DIR}/backup-${id}`;
}

/** Builds most of a `Transaction`: its public fields. */
class Preparation {
  readonly id = crypto.randomUUID();
  readonly to: Installed;
  readonly forward: Steps = { unlink: [], rmdir: [], mkdir: [], place: [] };
  readonly back: Steps = { unlink: [], rmdir: [], mkdir: [], place: [], modes: {} };
  readonly placed: Record<string, string> = {};
  readonly restored: Record<string, string> = {};
  readonly displaced: [path: string, now: string][] = [];
  readonly #files: Files;
  readonly #staging: Staging;
  readonly #before: Installed | null;
  readonly #unsynced: string[] = [];
  readonly #runs: ReadonlySet<string>;
  readonly #ran: ReadonlySet<string>;

  /** @param before what is recorded of the tree */
  constructor(files: Files, staging: Staging, before: Installed | null, to: Installed) {
    this.#files = files;
    this.#staging = staging;
    this.#before = before;
    this.to = { ...to, files: { ...to.files }, stamps: { ...to.stamps } };
    [this.#runs, this.#ran] = [new Set(to.executable), new Set(before?.executable)];
  }

  async run(change: Change): Promise<void> {
    const { disk } = this.#files;
    disk.mkdir(backupPath(this.id));
    const put = new Map(change.put);
    if (change.firmware) {
      const slot = this.#files.firmware?.slot === 0 ? 1 : 0;
      const active: ActiveFirmware = { version: change.firmware.version, slot };
      put.set(slotPath(slot), change.firmware.key);
      const otadata = utf8(`${JSON.stringify(active)}\n`);
      put.set(`${OTA_DIR}/otadata`, await this.#staging.add(otadata));
    }
    this.forward.unlink.push(...change.remove);
    for (const path of change.remove) this.#backUp(path);
    for (const path of change.displace) this.#displace(path);
    const used = new Set<string>();
    for (const [path, key] of put) {
      this.#place(path, key, used.has(key));
      used.add(key);
    }
    this.#planDirectories([...put.keys()], change.remove);
    await new Pool(SYNCS).each(this.#unsynced, (path) => disk.sync(path));
    await new Pool(SYNCS).each([STAGED, backupPath(this.id), OTA_DIR], (path) => disk.sync(path));
  }

  /** Keeps the content of a file for the rollback. */
  #backUp(path: string): void {
    const backup = `${backupPath(this.id)}/${this.back.place.length}`;
    if (!linkOrCopy(this.#files.disk, path, backup)) this.#unsynced.push(backup);
    this.back.place.push([backup, path]);
    // Not hashed: an inactive slot can be large, and nothing runs it.
    if (isSlot(path)) return;
    const before = this.#before;
    const isKnown = before?.stamps?.[path] === this.#files.stat(path)!.stamp;
    // A file that cannot be read can still be hard-linked.
    ignoreErrors(() => {
      this.restored[path] = isKnown ? before!.files[path]! : this.#files.digest(path);
    });
  }

  /** Keeps a copy of an application's file that makes way; the rollback removes it again. */
  #displace(path: string): void {
    const name = `${this.forward.place.length}`;
    const source = `${backupPath(this.id)}/displaced-${name}`;
    const now = `${OTA_DIR}/displaced-${this.id}-${name}`;
    if (!linkOrCopy(this.#files.disk, path, source)) this.#unsynced.push(source);
    this.forward.place.push([source, now]);
    this.back.unlink.push(now);
    this.placed[now] = this.#files.digest(path);
    this.displaced.push([path, now]);
  }

  /**
   * Gets staged content ready for its place: with its mode and owner.
   *
   * @param isUsed whether it goes to another place, too: changing one must not change the other
   */
  #place(path: string, key: string, isUsed: boolean): void {
    const { disk } = this.#files;
    let source = this.#staging.path(key);
    if (isUsed) {
      const original = source;
      source += `.${this.forward.place.length}`;
      // One of an earlier try may be there, and read-only.
      ifThere(() => disk.unlink(source));
      disk.copy(original, source);
      this.#unsynced.push(source);
    }
    this.forward.place.push([source, path]);
    const old = this.#files.stat(path);
    const file = old?.kind === "file" ? old : undefined;
    if (file) this.#backUp(path);
    else this.back.unlink.push(path);
    let mode = file?.mode ?? 0o644;
    // Execute permission for everyone who may read it; a bit that the owner set stays.
    if (this.#runs.has(path)) mode |= (mode & 0o444) >> 2;
    else if (this.#ran.has(path)) mode &= ~0o111;
    disk.chmod(source, mode, file?.owner);
    const digest = this.#staging.sha256(key);
    const { stamp } = this.#files.stat(source)!;
    this.placed[path] = digest;
    if (Object.hasOwn(this.to.files, path)) {
      this.to.files[path] = digest;
      this.to.stamps![path] = stamp;
    }
    if (isSlot(path)) this.to.image = { sha256: digest, stamp };
  }

  /** Directories that come, and those that go, emptied or replaced by a file. */
  #planDirectories(put: readonly string[], remove: readonly string[]): void {
    const needed = new Set(put.flatMap(ancestors));
    const made = [...needed].filter((path) => !this.#files.isDirectory(path)).sort();
    const emptied = remove.flatMap(ancestors).filter((path) => path.includes("/"));
    const replaced = put.flatMap((path) => this.#directoriesIn(path));
    const gone = [...new Set([...emptied, ...replaced])].filter((path) => !needed.has(path)).sort();
    this.forward.mkdir = made;
    this.back.rmdir = made.toReversed();
    this.forward.rmdir = gone.toReversed();
    this.back.mkdir = gone;
    for (const path of gone) {
      const directory = this.#files.stat(path);
      if (!directory) continue;
      this.back.modes![path] = { mode: directory.mode, owner: directory.owner };
    }
  }

  /** A directory, and those below it. */
  #directoriesIn(path: string): string[] {
    if (!this.#files.isDirectory(path)) return [];
    const names = this.#files.disk.list(path);
    return [path, ...names.flatMap((name) => this.#directoriesIn(`${path}/${name}`))];
  }
}

// ──── Apply and sync ──────────────────────────────────────────────────────────────────────────────
// Changes the files of a device by steps that can each be repeated.

class Tree {
  /** Files and directories that were moved aside: not part of any release, never deleted. */
  displaced: [path: string, now: string][] = [];
  readonly #disk: Disk;

  constructor(private readonly files: Files) {
    this.#disk = files.disk;
  }

  /**
   * Finds what steps need and is gone. A step whose source is gone was run before only if the
   * target has the content that it brings.
   *
   * @param contents path → SHA-256 of what is placed there, where that is known
   */
  findLost({ place }: Steps, contents: Readonly<Record<string, string>> = {}): string[] {
    const lost = place.filter(([from, to]) => {
      if (this.files.stat(from)) return false;
      const key = contents[to];
      return key ? !this.files.hasContent(to, key) : !this.files.isFile(to);
    });
    return lost.map(([from, to]) => `${from} (for ${to})`);
  }

  /** Runs steps of which any may have been run before; afterwards all are durable. */
  async run({ unlink, rmdir, mkdir, place, modes = {} }: Steps): Promise<void> {
    for (const path of unlink) {
      if (!this.files.isDirectory(path)) ifThere(() => this.#disk.unlink(path));
    }
    for (const path of rmdir) this.#rmdir(path);
    for (const path of mkdir) this.#mkdir(path);
    for (const [from, to] of place) this.#move(from, to);
    // Modes last: nothing can be placed in a read-only directory.
    for (const [path, { mode, owner }] of Object.entries(modes)) {
      this.#disk.chmod(path, mode, owner);
    }
    const paths = [...unlink, ...rmdir, ...mkdir, ...place.flat()];
    const directories = new Set(paths.map((path) => ancestors(path)[0] ?? ""));
    await new Pool(SYNCS).each(directories, async (path) => {
      if (this.files.isDirectory(path)) await this.#disk.sync(path);
    });
  }

  #rmdir(path: string): void {
    try {
      this.#disk.rmdir(path);
    } catch (error) {
      const fine = ["ENOENT", "ENOTDIR", "ENOTEMPTY", "EEXIST", "EBUSY"];
      if (!fine.includes(errorCode(error) ?? "")) throw error;
    }
  }

  #mkdir(path: string): void {
    const kind = this.files.stat(path)?.kind;
    if (kind === "directory") return;
    if (kind) this.#displace(path);
    // The application may have removed what was above it.
    else for (const above of ancestors(path).reverse()) this.#mkdir(above);
    this.#disk.mkdir(path);
  }

  #move(from: string, to: string): void {
    try {
      this.#disk.rename(from, to);
    } catch (error) {
      if (!this.files.stat(from)) return; // It was moved before; see `findLost`.
      // The application removed the directory meanwhile, or made one with the file's name.
      for (const above of ancestors(to).reverse()) this.#mkdir(above);
      if (this.files.isDirectory(to)) this.#displace(to);
      else if (!isMissing(error)) throw error;
      this.#disk.rename(from, to);
    }
  }

  /** Moves aside what is in the way of a release and belongs to none. */
  #displace(path: string): void {
    const now = `${OTA_DIR}/displaced-${crypto.randomUUID()}`;
    this.#disk.rename(path, now);
    this.displaced.push([path, now]);
  }

  /** Deletes all backups but these. */
  dropBackups(needed: ReadonlySet<string>): void {
    ignoreErrors(() => {
      for (const name of this.#disk.list(OTA_DIR)) {
        const path = `${OTA_DIR}/${name}`;
        if (!name.startsWith("backup-") || needed.has(path)) continue;
        for (const file of this.#disk.list(path)) this.#disk.unlink(`${path}/${file}`);
        this.#disk.rmdir(path);
      }
    });
  }
}

// ──── Repairs ────────────────────────────────────────────────────────────────────────────────────
// A repair puts the release right that stands, and is none itself: its rollback leads to the
// release before.

/**
 * Joins the rollback plans of a repair and of the release that it repairs.
 *
 * @param plan of that release, if there is one
 * @returns the plan for going back to the release before
 */
function beforeRepair(repair: Transaction, plan: RollbackPlan | undefined): RollbackPlan | null {
  if (!plan) return null;
  const { back, placed, restored } = plan;
  const covered = new Set([...back.unlink, ...back.place.map(([, to]) => to)]);
  // For files that the update left alone, the record also says what the release before had.
  const { files: old = {}, executable } = repair.before.installed ?? {};
  const isFirmware = (path: string) => path.startsWith(`${OTA_DIR}/ota`);
  const ran = new Set(executable);
  const runs = new Set(repair.to.executable);
  // Repairing files or firmware that the update left alone repairs the release before as well.
  const isOurs = (path: string) => {
    const isRight = repair.placed[path] === old[path] && runs.has(path) === ran.has(path);
    if (covered.has(path) || (path in old && isRight)) return false;
    return !isFirmware(path) || covered.has(`${OTA_DIR}/otadata`);
  };
  const unlink = repair.back.unlink.filter((path) => isOurs(path) && !(path in old));
  const place = repair.back.place.filter(([, path]) => {
    return isOurs(path) && (!(path in old) || repair.restored?.[path] === old[path]);
  });
  // Of the directories that the repair removed, what is placed needs some, and others are in its
  // way.
  const needed = new Set(place.flatMap(([, path]) => ancestors(path)));
  const made = repair.back.mkdir.filter((path) => needed.has(path));
  const mkdir = [...new Set([...back.mkdir, ...made])].sort();
  const modes = Object.entries({ ...repair.back.modes, ...back.modes });
  return {
    ...plan,
    // When it is rolled back, the release that failed is the one there now.
    failed: { ...plan.failed, digest: repair.failed.digest },
    back: {
      unlink: [...back.unlink, ...unlink],
      rmdir: [...new Set([...back.rmdir, ...repair.back.rmdir])].sort().reverse(),
      mkdir,
      place: [...back.place, ...place],
      modes: Object.fromEntries(modes.filter(([path]) => mkdir.includes(path))),
    },
    restored: { ...repair.restored, ...restored },
    placed: { ...placed, ...repair.placed },
  };
}

// ──── Transactions ───────────────────────────────────────────────────────────────────────────────
// Runs a transaction to one of its two ends, also after an interruption. Before the tree is
// touched, the new content is staged, the old content has a second name in `.ota/backup-ID`, and
// the transaction itself is durable; then come steps of which each can be repeated. So whenever the
// process or the power dies, the next process finds out what was under way (see State files) and
// finishes it. All this needs of the file system is that a rename is atomic.

class Transactions {
  readonly records: Records;
  readonly tree: Tree;
  /** What an interrupted change needs and no longer finds. */
  lost: string[] = [];

  constructor(
    private readonly files: Files,
    private readonly staging: Staging,
  ) {
    this.records = new Records(files);
    this.tree = new Tree(files);
  }

  /** Finishes what was interrupted, and returns whether anything was. */
  async recover(): Promise<boolean> {
    const { records } = this;
    records.load();
    const { commit, done, state } = records;
    const { repairs = [] } = commit ?? done ?? {};
    if (!records.damaged.every((path) => repairs.includes(path))) return false;
    // What was cut off may not have made durable what we found.
    if (commit || done || records.isRollbackOver) await records.sync();
    records.dropEnded();
    const { unfinished } = records;
    if (!unfinished) {
      if (!state.trial) records.settle();
      this.cleanUp();
      return false;
    }
    const isWhole = () => this.tree.findLost(commit!.forward, commit!.placed).length === 0;
    if (unfinished === "commit" && isWhole()) await this.#goForward(commit!);
    else {
      const { back, restored } = commit ?? rollbackPlanOf(done!)!;
      this.lost = this.tree.findLost(back, restored);
      // Where going back cannot be done, only a repair helps.
      if (this.lost.length > 0) records.setAsideTransactions();
      else await this.goBack(unfinished === "commit" ? "undo" : unfinished);
    }
    return true;
  }

  /** Makes a prepared change. When that fails, goes back and throws what the disk threw. */
  async run(transaction: Transaction): Promise<void> {
    if (this.records.damaged.length > 0) await this.records.forgetTransactions();
    await this.records.begin(transaction);
    try {
      await this.records.sync();
      await this.#goForward(transaction);
    } catch (error) {
      await this.goBack("undo").catch((second) => {
        const both = `${errorText(error)}; going back failed as well: ${errorText(second)}`;
        throw new OTAError(`${both}; the next command does what is left`);
      });
      throw error;
    }
  }

  async #goForward({ id, to, forward, check, restart, displaced }: Transaction): Promise<void> {
    const { records } = this;
    await this.tree.run(forward);
    await records.write({
      ...records.state,
      installed: to,
      journal: id,
      trial: check ? { starts: 0 } : null,
      failed: check ? records.state.failed : this.failuresAfter(to),
      restart,
    });
    this.tree.displaced.push(...displaced);
    if (!check) records.settle();
    this.cleanUp();
    this.staging.clear();
  }

  /** Takes back a commit that failed (`undo`), or a release that is bad (`rollback`). */
  async goBack(why: Reversal): Promise<void> {
    const { records } = this;
    const { commit, done, state } = records;
    const transaction = (commit ?? done)!;
    const plan = commit ?? rollbackPlanOf(transaction)!;
    const isInstalled = state.journal === transaction.id;
    // The sync of the mark makes this durable, before a state that names another transaction can
    // be: then a damaged record that is still there would count again.
    if (isInstalled && why === "rollback") records.dropRepaired(transaction.repairs);
    await records.beginReversal(why);
    const lost = this.tree.findLost(plan.back, plan.restored);
    if (lost.length > 0) throw new OTAError(`${lost.join(", ")} is gone`);
    await this.tree.run(plan.back);
    if (isInstalled) {
      const { installed, journal } = plan.before;
      const after: State = {
        ...{ ...state, installed, trial: null, restart: transaction.restart },
        failed: withFailure(state.failed, plan.failed),
        journal: commit ? journal : null,
      };
      await records.write(why === "undo" ? plan.before : after);
    }
    await records.endReversal(why);
    this.dropBackups();
  }

  /** The failures that still count once this is installed. */
  failuresAfter(installed: Installed | null): FailedRelease[] {
    const current = installed?.version ?? "";
    const active = this.files.firmware?.version ?? "";
    return this.records.state.failed.filter(({ version, firmware }) => {
      return firmware === undefined
        ? new LooseVersion(version).compare(current) > 0
        : new LooseVersion(firmware).compare(active) > 0;
    });
  }

  /** Deletes what nothing needs once there is a good record. Staged content is for the next try. */
  cleanUp(): void {
    this.records.dropDamaged();
    this.dropBackups();
  }

  dropBackups(): void {
    const { commit, done } = this.records;
    const needed = new Set<string>();
    for (const one of [commit, done]) {
      if (one) needed.add(backupPath(one.id));
      for (const [from] of one?.release?.back.place ?? []) needed.add(dirname(from));
    }
    this.tree.dropBackups(needed);
  }
}

// ──── Journal ────────────────────────────────────────────────────────────────────────────────────
// An open device: its files, its state, and every change that can be made to them. Whatever fails
// or is interrupted, the device is on the old release or on the new one.

function noRoot(root: string, why: string): string {
  return `cannot use ${root} as a device's root: ${why}`;
}

/** The device root cannot be written. */
export class UnwritableError extends OTAError {
  override name = "UnwritableError";
}

/** Another process has the device root open. */
export class BusyError extends OTAError {
  override name = "BusyError";
}

/** Makes the updater's own directories, durably. */
async function makeDirectories({ root, disk }: Files): Promise<void> {
  try {
    await disk.makeRoot();
    for (const path of [OTA_DIR, STAGED]) {
      if (disk.stat(path)?.kind === "directory") continue;
      disk.mkdir(path);
      await disk.sync(ancestors(path)[0] ?? "");
    }
  } catch (error) {
    const isFile = ["ENOTDIR", "EEXIST"].includes(errorCode(error) ?? "");
    const why = isFile ? "it is not a directory" : errorText(error);
    throw new OTAError(noRoot(root, why), 1, { cause: error });
  }
  for (const path of ["", OTA_DIR, STAGED]) {
    if (disk.writable(path)) continue;
    const at = path === "" ? root : `${root}/${path}`;
    throw new UnwritableError(`cannot write in ${at}: no permission, or it is read-only`);
  }
}

/** An open device. Only one process at a time can open it. */
export class Journal implements Disposable {
  readonly staging: Staging;
  /** Whether opening it finished a commit or a rollback that had been interrupted. */
  recovered = false;
  readonly #transactions: Transactions;
  readonly #records: Records;

  private constructor(
    readonly files: Files,
    private readonly lock: Disposable,
  ) {
    this.staging = new Staging(files);
    this.#transactions = new Transactions(files, this.staging);
    this.#records = this.#transactions.records;
  }

  /**
   * Opens and locks a device, whose root is created if need be, and finishes what was interrupted.
   *
   * @throws {OTAError} when another process has it open, it cannot be written, or `.ota` was
   *   written by a newer version of this tool
   */
  static async open(files: Files): Promise<Journal> {
    await makeDirectories(files);
    const lock = files.disk.lock(`${OTA_DIR}/lock`);
    if (!lock) {
      throw new BusyError(
        `${files.root} is in use by another ota.ts; wait until it ends, or end it`,
      );
    }
    const journal = new Journal(files, lock);
    try {
      journal.recovered = await journal.#transactions.recover();
      return journal;
    } catch (error) {
      journal[Symbol.dispose]();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    this.lock[Symbol.dispose]();
  }

  get state(): State {
    return this.#records.state;
  }

  /** What was installed last, as far as any record says: also while the state is damaged. */
  get lastInstalled(): Installed | null {
    const { state, commit, done } = this.#records;
    return state.installed ?? commit?.to ?? done?.to ?? null;
  }

  /** Damaged records, as they were set aside; only a repair makes a new one. */
  get damaged(): readonly string[] {
    return this.#records.damaged;
  }

  /** @throws {OTAError} when what is installed is not known, until a repair */
  refuseDamage(): void {
    if (this.damaged.length === 0) return;
    const { lost } = this.#transactions;
    const gone = lost.length > 0 ? `, and ${lost.join(", ")} is gone` : "";
    throw new OTAError(
      `the record of what is installed was damaged; it is kept as ${this.damaged.join(", ")}${gone}.\n` +
        "Nothing is done until there is a new one: run client with --repair",
    );
  }

  /** The check that a release on trial came with, if any. */
  get recordedCheck(): Check | undefined {
    return this.#records.commit?.check ?? undefined;
  }

  /** Whether `rollBack` can go back to a release before this one. */
  get canRollBack(): boolean {
    return this.#records.rollbackPlan !== undefined;
  }

  /** What was moved aside since this was last asked: where it was, and where it is. */
  takeDisplaced(): [path: string, now: string][] {
    return this.#transactions.tree.displaced.splice(0);
  }

  /** Files that the application changed since the commit and that `rollBack` would overwrite. */
  changedSinceCommit(): string[] {
    if (!this.#records.rollbackPlan) return [];
    const { back, placed } = this.#records.rollbackPlan;
    const atRisk = [...back.unlink, ...back.place.map(([, to]) => to)];
    return atRisk.filter((path) => {
      if (path.startsWith(`${OTA_DIR}/`) || !this.files.isFile(path)) return false;
      return this.files.digest(path) !== placed[path];
    });
  }

  /**
   * Makes a change, all of whose content is staged. When it fails, everything is as it was, the
   * older rollback plan included; when it is interrupted, the next `open` finishes it.
   *
   * @throws whatever the disk threw, after going back
   */
  async commit(change: Change): Promise<void> {
    const installed = this.state.installed ?? change.from ?? null;
    const preparation = new Preparation(this.files, this.staging, installed, change.installed);
    await preparation.run(change);
    const transaction: Transaction = {
      ...{ ...preparation, format: FORMAT, failed: change.failure },
      before: { ...this.state, installed },
      check: change.check ?? null,
      restart: change.restart ?? null,
      repairs: [...this.damaged],
    };
    if (change.repair) transaction.release = beforeRepair(transaction, this.#records.rollbackPlan);
    await this.#transactions.run(transaction);
  }

  /**
   * Records what is installed where no file needs to change. On a device whose record is damaged
   * this is a repair; one that is cut off leaves it damaged.
   */
  async record(installed: Installed): Promise<void> {
    const { damaged } = this;
    // What came before another version is not what an earlier transaction goes back to.
    const isOther = installed.version !== this.state.installed?.version;
    const journal = isOther || damaged.length > 0 ? null : this.state.journal;
    await this.#records.write({ ...this.state, installed, journal });
    if (damaged.length > 0) {
      // In this order: the next `open` would finish what was under way before the damage, and put
      // another release over this one, as soon as the damage no longer stops it.
      await this.#records.forgetTransactions();
      this.#records.dropRepaired(damaged);
      await this.#records.sync();
    } else this.#records.dropEnded();
    this.#transactions.cleanUp();
    this.staging.clear();
  }

  /** Completes or refreshes the record of the release that stands. */
  async remember(installed: Installed): Promise<void> {
    await this.#records.write({ ...this.state, installed });
  }

  /** Notes durably that a check is about to be started. */
  async countStart(): Promise<void> {
    const starts = (this.state.trial?.starts ?? 0) + 1;
    await this.#records.write({ ...this.state, trial: { starts } });
  }

  /** Confirms the release on trial. Failures of it and of older releases are forgotten. */
  async confirm(): Promise<void> {
    await this.#endTrial(this.#transactions.failuresAfter(this.state.installed));
  }

  async #endTrial(failed: FailedRelease[]): Promise<void> {
    await this.#records.write({ ...this.state, trial: null, failed });
    this.#records.settle();
    this.#transactions.dropBackups();
  }

  /** Records that the pending restart command was run. */
  async restarted(): Promise<void> {
    if (this.state.restart !== null) await this.#records.write({ ...this.state, restart: null });
  }

  /**
   * Takes the device back to the release before, once, and remembers this one as failed.
   *
   * @throws {OTAError} when there is nothing to go back to, or not all of it is there any more;
   *   then nothing was done
   */
  async rollBack(): Promise<void> {
    const plan = this.#records.rollbackPlan;
    if (!plan) throw new OTAError(`${this.files.root} has no previous release to go back to`);
    const lost = this.#transactions.tree.findLost(plan.back, plan.restored);
    if (lost.length === 0) return this.#transactions.goBack("rollback");
    // A bad release that cannot be rolled back must not block the next one.
    if (this.state.trial) await this.#endTrial(withFailure(this.state.failed, plan.failed));
    const release = plan.before.installed?.version ?? "0";
    throw new OTAError(
      `cannot go back to ${release}: ${lost.join(", ")} is gone.\n` +
        "Nothing was changed; client brings the newest release",
    );
  }
}

// ════ VIII Update ════════════════════════════════════════════════════════════════════════════════
// How a device gets to another release: it finds out what it has (Device survey), asks for a
// manifest (Manifest client), plans the change (Target release, Plan and space), stages and
// verifies all content (Receiving and retries, Fetching content), commits it (part VI), and lets
// the health check decide. Until the commit nothing but `.ota` is touched; a failure at any point
// leaves the device as it was. `OTA` (Device) is these steps in order.

// ──── Update options ──────────────────────────────────────────────────────────────────────────────
// Options, events and outcomes of an update.

/** Progress events of an update. */
export type OTAEvent =
  | { kind: "note"; text: string }
  /** How many bytes of this update's content are here, and of how many; `NaN` if not known. */
  | { kind: "progress"; received: number; total: number }
  /** One content is complete and verified. */
  | { kind: "fetched"; path: string; size: number };

/** The network traffic of an update. */
export interface Traffic {
  /** Bytes of all bodies as received. */
  received: number;
  /** Bytes of the content that the tree lacked. */
  content: number;
  /** Contents that were found on the device under another path, or already staged. */
  reused: number;
}

/** How an update ended. */
export interface Outcome {
  result: "updated" | "repaired" | "up to date" | "rolled back" | "not tried";
  /** The release that the device was on; `"0"` for none. */
  from: string;
  /** The release that was offered, or that is installed. */
  to: string;
  /** The same for firmware, when it changed. */
  firmware?: { from: string; to: string };
  /** What it cost, when something was fetched. */
  traffic?: Traffic;
}

/** How a command is run on a device. */
export interface CommandOptions {
  /** The directory to run it in: the device's root. */
  cwd: string;
  /** Variables of its environment, beside those of this process. */
  env: Record<string, string>;
  /** Seconds after which it is no longer waited for. */
  timeout: number;
  /** Whether to end it, with its whole process group, when it is late or fails; else it goes on. */
  kill: boolean;
  signal: AbortSignal;
}

/** Options of `rollBack`, `status` and `OTA`. */
export interface DeviceOptions {
  /** The device's files, when they are not a directory of this machine; `root` only names them. */
  disk?: Disk;
  /**
   * Runs the check and the restart command, for `sh -c`; a shell of this machine does by default.
   * Resolves to the exit code, or `undefined` when that did not come in time; throws the reason of
   * the signal when that aborts.
   */
  run?: (command: string, options: CommandOptions) => Promise<number | undefined>;
  /** Decides whether a new release is good; without one, every release is. */
  check?: Check;
  /** A command for `sh -c`, run whenever the tree has changed. */
  restart?: string;
  /** Called with each event. */
  report?: (event: OTAEvent) => void;
  /** Ends everything. */
  signal?: AbortSignal;
}

/** Options of a device; every field but `root` has the default of the command line. */
export interface OTAOptions extends DeviceOptions {
  /** The directory that is the device's file system. */
  root: string;
  /** The release it is on, until it has a record of its own. */
  ver?: string;
  /** A name for this device, instead of the one kept in `.ota`. */
  id?: string;
  /** Downloads at once; 4. */
  jobs?: number;
  /** Seconds without a byte after which a transfer is given up and tried again; 30. */
  timeout?: number;
  /**
   * A transfer below this rate in bytes a second, over so many seconds, is stalled; 10 over 300.
   */
  slowest?: { rate: number; seconds: number };
  /** Hashes every file of the release, even those that look unchanged. */
  checkFiles?: boolean;
  /** Asks for the full list, hashes everything, fetches what differs, and makes a new record. */
  repair?: boolean;
  /** Tries a release even if it failed before. */
  retry?: boolean;
  /** Ed25519 public keys, one of which must have signed the manifest, or its step. */
  verify?: readonly KeyObject[];
  /** How many of these keys must have signed the step; 1. */
  threshold?: number;
  /** The kind of board: it asks for the versions of that model; steps for others are refused. */
  model?: string;
}

function note({ report }: DeviceOptions, text: string): void {
  report?.({ kind: "note", text });
}

/** The files of a device; its root need not be there. */
function filesOf(root: string, { disk }: DeviceOptions): Files {
  if (disk) return new Files(root, disk);
  const real = fs.existsSync(root) ? fs.realpathSync(root) : resolve(root);
  return new Files(real, fileSystem(real));
}

/** @throws {OTAError} when its root is not there */
function existingFiles(root: string, options: DeviceOptions): Files {
  const files = filesOf(root, options);
  if (files.stat("")) return files;
  throw new OTAError(noRoot(files.root, "nothing is there; see --root"));
}

// ──── Time-outs ───────────────────────────────────────────────────────────────────────────────────
// A command or a peer may never answer: every wait has a limit.

/** The longest timer in milliseconds (2^31 - 1, 24 days): one with more fires at once. */
const MAX_TIMER = 2 ** 31 - 1;
/** A signal that never aborts. */
const NEVER = new AbortController().signal;

/**
 * Waits for a promise, up to a time limit.
 *
 * @returns what it resolves to; `undefined` when it has not after so many seconds
 * @throws what it rejects with; the reason of the signal, when that aborts first
 */
async function within<T>(
  seconds: number,
  promise: Promise<T>,
  signal: AbortSignal,
): Promise<T | undefined> {
  const { promise: ended, resolve, reject } = Promise.withResolvers<T | undefined>();
  const stop = () => reject(signal.reason);
  const timer = setTimeout(() => resolve(undefined), Math.min(seconds * 1000, MAX_TIMER));
  signal.addEventListener("abort", stop);
  if (signal.aborted) stop();
  promise.then(resolve, reject);
  try {
    return await ended;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
  }
}

/** Resolves after some seconds; throws the reason of the signal, when that aborts first. */
async function sleep(seconds: number, signal: AbortSignal): Promise<void> {
  await within(seconds, new Promise(() => {}), signal);
}

/** Runs a command in a shell of this machine. What it prints goes to stderr. */
async function runShell(command: string, options: CommandOptions): Promise<number | undefined> {
  const { cwd, env, timeout, kill, signal } = options;
  const child = Bun.spawn(["sh", "-c", command], {
    ...{ cwd, env: { ...process.env, ...env } },
    stdio: ["ignore", 2, 2],
    detached: true,
  });
  let code: number | undefined;
  try {
    return (code = await within(timeout, child.exited, signal));
  } finally {
    child.unref();
    // There may be nothing left of it.
    if (kill && code !== 0) ignoreErrors(() => process.kill(-child.pid, "SIGKILL"));
  }
}

// ──── Health check ───────────────────────────────────────────────────────────────────────────────
// Decides whether a release stays. A release with a check is on trial until the check succeeds. If
// the check fails, hangs, or was started three times without ending (as when the release kills the
// device), the device is rolled back.

const MAX_STARTS = 3;
/** Seconds after which a restart command is no longer waited for. */
const RESTART_TIMEOUT = 60;

class HealthCheck {
  constructor(
    private readonly journal: Journal,
    private readonly options: DeviceOptions,
  ) {
    this.#reportDisplaced();
  }

  /**
   * Finishes what an earlier run left: a pending restart, a release on trial.
   *
   * @returns the outcome, when that release was bad
   */
  async resume(): Promise<Outcome | undefined> {
    const { recordedCheck, state } = this.journal;
    if (!state.trial) {
      await this.settle();
      return undefined;
    }
    const { version } = state.installed!;
    const good = await this.start(this.options.check ?? recordedCheck);
    return good ? undefined : this.#rolledBack(version);
  }

  /** Runs a pending restart, also where opening the journal has changed the tree. */
  async settle(): Promise<void> {
    if (this.journal.recovered || this.journal.state.restart !== null) await this.#restart();
  }

  /**
   * Tries the release that was just committed, and rolls it back when it is bad.
   *
   * @returns whether it stays
   */
  async start(check: Check | undefined): Promise<boolean> {
    this.#reportDisplaced();
    await this.#restart();
    const { trial, installed } = this.journal.state;
    if (!trial) return true;
    if (trial.starts >= MAX_STARTS) {
      const often = `was started ${MAX_STARTS} times and never ended`;
      note(this.options, `the check of ${installed!.version} ${often}`);
    } else {
      await this.journal.countStart();
      if (!check || (await this.#passes(check, installed!))) {
        await this.journal.confirm();
        return true;
      }
    }
    await this.#takeBack();
    return false;
  }

  /**
   * Rolls back to the previous release by hand.
   *
   * @param force even if the application has changed files since
   * @throws {OTAError} when there is nothing to go back to, or files were changed
   */
  async rollBack(force: boolean): Promise<Outcome> {
    const { installed } = this.journal.state;
    const changed = force ? [] : this.journal.changedSinceCommit();
    if (changed.length > 0) {
      throw new OTAError(
        `changed since ${installed?.version} was installed: ${changed.join(", ")}.\n` +
          "Nothing was done; rollback --force overwrites such files",
      );
    }
    await this.#takeBack();
    return this.#rolledBack(installed!.version);
  }

  /** The outcome of a rollback. @param to the release that was rolled back */
  #rolledBack(to: string): Outcome {
    const { files, state } = this.journal;
    const outcome: Outcome = { result: "rolled back", from: state.installed?.version ?? "0", to };
    const flashed = state.failed.at(-1)?.firmware;
    if (flashed === undefined) return outcome;
    return { ...outcome, firmware: { from: files.firmware?.version ?? "0", to: flashed } };
  }

  async #takeBack(): Promise<void> {
    await this.journal.rollBack();
    this.#reportDisplaced();
    await this.#restart();
  }

  async #passes({ command, timeout }: Check, { version }: Installed): Promise<boolean> {
    const code = await this.#run(command, timeout, true);
    if (code === 0) return true;
    const why = code === undefined ? `did not end within ${timeout} s` : `ended with code ${code}`;
    note(this.options, `${version} is bad: its check ${why}`);
    return false;
  }

  /** Runs the restart command, if there is one: the tree has changed. */
  async #restart(): Promise<void> {
    const command = this.options.restart ?? this.journal.state.restart;
    if (command) {
      const code = await this.#run(command, RESTART_TIMEOUT, false);
      const late = `did not end within ${RESTART_TIMEOUT} s; it is left running`;
      const how = code === undefined ? late : `ended with code ${code}`;
      if (code !== 0) note(this.options, `the restart command ${how}`);
    }
    await this.journal.restarted();
  }

  async #run(command: string, timeout: number, kill: boolean): Promise<number | undefined> {
    const { run = runShell, signal = NEVER } = this.options;
    const { files, state } = this.journal;
    const env = {
      OTA_VERSION: state.installed?.version ?? "0",
      OTA_PREVIOUS_VERSION: state.installed?.previous_version ?? "0",
    };
    try {
      return await run(command, { cwd: files.root, env, timeout, kill, signal });
    } catch (error) {
      if (!signal.aborted) throw error;
      const what = `interrupted; the device is on ${env.OTA_VERSION}`;
      const next = state.trial
        ? "on trial: the next client starts its check again"
        : "and its restart command is run by the next client";
      throw new OTAError(`${what}, ${next}`, 1, { cause: error });
    }
  }

  #reportDisplaced(): void {
    for (const [path, now] of this.journal.takeDisplaced()) {
      note(
        this.options,
        `${path} was not part of a release and was in its way: it is kept as ${now}`,
      );
    }
  }
}

/**
 * Rolls a device back to the previous release, once, and remembers the other as failed.
 *
 * @param root the device's root
 * @param force even if the application has changed files that this overwrites
 * @throws {OTAError} when there is nothing to go back to, or files were changed
 */
export async function rollBack(
  root: string,
  force = false,
  options: DeviceOptions = {},
): Promise<Outcome> {
  using journal = await Journal.open(existingFiles(root, options));
  journal.refuseDamage();
  return new HealthCheck(journal, options).rollBack(force);
}

// ──── Status ─────────────────────────────────────────────────────────────────────────────────────
// Reports what a device is on, without a server. At boot, before the application starts, it
// finishes what a reset has interrupted.

/** The result of `status`. */
export interface Status {
  version: string | null;
  previous_version: string | null;
  /** The active image, its path below the root. */
  firmware: { version: string; file: string } | null;
  /** Whether the release is on trial. */
  pending: boolean;
  /** Releases that failed and are not tried again. */
  failed: string[];
  /** How the files differ from their record; only with `examine`. */
  differs?: Difference[];
  /** Present while another process works on the device. */
  busy?: true;
}

/** Options of `status`. */
export interface StatusOptions extends DeviceOptions {
  /** Hashes every file and reports which differ from their record. */
  examine?: boolean;
}

/**
 * Reports what a device is on. An interrupted commit or rollback is finished first, unless another
 * process has the device open: then the record is reported.
 *
 * @param root the device's root; it is not created
 * @throws {OTAError} when there is no such directory, or the record is damaged, or of a newer
 *   version of this tool
 */
export async function status(root: string, options: StatusOptions = {}): Promise<Status> {
  const files = existingFiles(root, options);
  const describe = ({ installed, trial, failed }: State): Status => {
    const { firmware } = files;
    const version = installed?.version ?? versionFromFile(files) ?? null;
    return {
      ...{ version, previous_version: installed?.previous_version ?? null },
      firmware: firmware && { version: firmware.version, file: slotPath(firmware.slot) },
      ...{ pending: trial !== null, failed: failed.map(failedName) },
      ...(options.examine && { differs: takeInventory(files, installed, true).differences }),
    };
  };
  if (files.isFile("")) throw new OTAError(noRoot(files.root, "it is not a directory"));
  if (!files.stat(OTA_DIR)) return describe(EMPTY);
  let journal: Journal;
  try {
    journal = await Journal.open(files);
  } catch (error) {
    if (error instanceof BusyError) return { ...describe(peekState(files)), busy: true };
    if (error instanceof UnwritableError && isSettled(files)) return describe(peekState(files));
    throw error;
  }
  using open = journal;
  open.refuseDamage();
  await new HealthCheck(open, options).settle();
  return describe(open.state);
}

/** The version in `flash/OTA_VERSION.py`, if it is there and is one. */
function versionFromFile({ disk }: Files): string | undefined {
  const text = readText(disk, VERSION_FILE) ?? "";
  const version = /^\s*VERSION\s*=\s*(['"])(.*?)\1/m.exec(text)?.[2];
  return version !== undefined && isReleaseName(version) ? version : undefined;
}

// ──── Target release ──────────────────────────────────────────────────────────────────────────────
// The release that a device will have after a manifest, given what it has now.

/**
 * The record of the release that a device will have. Until files are in place, some may be known by
 * their SHA-1 only, and have no stamp.
 */
type Target = Omit<Installed, "previous_version">;

interface Listed extends Omit<ManifestEntry, "dst_path"> {
  path: string;
  key: string;
}

function listedFiles({ new: added, update }: Manifest): Listed[] {
  return [...added, ...update].map((entry) => {
    return { ...entry, path: entry.dst_path.slice(1), key: keyOf(entry) };
  });
}

/** The hash by which content is known: `parseManifest` lets nothing through that has none. */
function keyOf({ sha256, hash = "" }: ManifestEntry | ManifestFirmware): string {
  return sha256 ?? hash;
}

/**
 * Works out what a device will have after a manifest.
 *
 * @param recorded what it has
 * @param full whether the manifest lists the whole release
 */
export function targetOf(
  manifest: Manifest,
  recorded: Installed | undefined,
  full: boolean,
): Target {
  const files = new Map(full ? [] : Object.entries(recorded?.files ?? {}));
  for (const path of manifest.delete) files.delete(path);
  const executable = new Set(recorded?.executable?.filter((path) => files.has(path)));
  for (const { path, key, sha256, executable: runs } of listedFiles(manifest)) {
    files.set(path, key);
    if (runs) executable.add(path);
    // A server that sends no SHA-256 sends no modes either.
    else if (sha256 !== undefined) executable.delete(path);
  }
  const stamps = Object.entries(recorded?.stamps ?? {}).filter(([path]) => files.has(path));
  return {
    version: manifest.version,
    files: Object.fromEntries(files),
    executable: [...executable],
    stamps: Object.fromEntries(stamps),
    image: recorded?.image,
  };
}

/**
 * The digest by which a failed release is recognized. It does not depend on what the device had,
 * nor on whether the list was full.
 */
export function targetDigest({ version, files, executable = [] }: Target): string {
  return sha256(JSON.stringify([version, Object.entries(files).sort(), executable.toSorted()]));
}

function failureOf(
  target: Target,
  { firmware }: Manifest,
  active: ActiveFirmware | null,
  step: Step | undefined,
): FailedRelease {
  // What is not signed (modes, spellings of the version) must not make it another release.
  const digest = step
    ? sha256(JSON.stringify({ ...step, from: "", steps: "" }))
    : targetDigest(target);
  const failure: FailedRelease = { version: target.version, digest };
  // The same version repairs the active image and is not new.
  if (!firmware || firmware.version === active?.version) return failure;
  return { ...failure, image: keyOf(firmware) };
}

// ──── Plan and space ──────────────────────────────────────────────────────────────────────────────
// Plans an update, and checks before anything is fetched that it can be completed.

interface Download {
  /** SHA-256, or SHA-1 where the server does not send that. */
  key: string;
  url: string;
  /** Its destination, for messages. */
  path: string;
  size: number | undefined;
  /** Files on the device that may have the same content. */
  localCopies: readonly string[];
  /** The file that it replaces: the dictionary for a delta. */
  old?: string;
  /** The content, where the manifest carries it. */
  inline?: InlineContent;
}

interface Plan extends Pick<Change, "put" | "remove" | "displace" | "firmware"> {
  target: Target;
  downloads: Download[];
}

/**
 * Compares what a manifest lists with what is there.
 *
 * @param target `targetOf` it; stamps of files that are already in place are added
 * @param has what is really there of the installed release
 * @param full whether installed files that the manifest lacks are deleted
 * @throws {OTAError} naming the first path that cannot be changed, and why
 */
async function makePlan(
  journal: Journal,
  manifest: Manifest,
  target: Target,
  has: Inventory,
  full: boolean,
): Promise<Plan> {
  const { files } = journal;
  const old = has.installed?.files ?? {};
  const [runs, ran] = [new Set(target.executable), new Set(has.installed?.executable)];
  const entries = listedFiles(manifest);
  const listed = new Set(entries.map(({ path }) => path));
  const gone = full ? Object.keys(old).filter((path) => !listed.has(path)) : [];
  const remove = [...new Set([...manifest.delete, ...gone])];
  refuseLinks(files, [...listed, ...remove]);
  const plan: Plan = {
    ...{ target, put: new Map(), displace: [], downloads: [] },
    remove: remove.filter((path) => files.isFile(path)),
  };
  const updated = new Set(manifest.update.map(({ dst_path }) => dst_path.slice(1)));
  for (const entry of entries) {
    const { path, key, sha256 } = entry;
    const stat = files.stat(path);
    const file = stat?.kind === "file" ? stat : undefined;
    const isHere = hasContent(files, entry, has);
    if (isHere) {
      target.files[path] = sha256 ?? files.digest(path);
      const isRight = runs.has(path) ? isExecutable(file!) : !ran.has(path);
      if (isRight) {
        target.stamps![path] = file!.stamp;
        continue;
      }
    }
    plan.put.set(path, key);
    if (file && !(path in old) && !updated.has(path) && !isHere) plan.displace.push(path);
  }
  planDownloads(files, plan, entries, old);
  planFirmware(files, plan, manifest);
  await planVersionFile(journal, plan);
  preflight(files, plan.put.keys(), plan.remove);
  checkSpace(journal, plan);
  return plan;
}

/** Whether a path already has its listed content. */
function hasContent(files: Files, { path, key, size }: Listed, has: Inventory): boolean {
  const known = has.files.get(path);
  if (known !== undefined && algorithmOf(key) === "sha256") return known === key;
  return files.hasContent(path, key, size);
}

/** The content that an entry or firmware carries. */
function inlineIn({ text, content, coding }: InlineContent): Pick<Download, "inline"> {
  if (text !== undefined) return { inline: { text } };
  if (content === undefined) return {};
  return { inline: coding === undefined ? { content } : { content, coding } };
}

/** Finds what must be fetched, and files on the device that may have the same content. */
function planDownloads(
  files: Files,
  plan: Plan,
  entries: readonly Listed[],
  old: Readonly<Record<string, string>>,
): void {
  const wanted = new Map<string, Download>();
  for (const entry of entries) {
    const { path, key, URL: url, size } = entry;
    if (!plan.put.has(path) || wanted.has(key)) continue;
    const item: Download = { key, url, path, size, localCopies: [], ...inlineIn(entry) };
    wanted.set(key, files.isFile(path) ? { ...item, old: path } : item);
  }
  const paths = new Map<string, string[]>();
  const note = (path: string, sha256: string) => {
    paths.set(sha256, [...(paths.get(sha256) ?? []), path]);
  };
  for (const [path, sha256] of Object.entries(old)) note(path, sha256);
  for (const [path, key] of Object.entries(plan.target.files)) {
    if (!plan.put.has(path)) note(path, key);
  }
  if (wanted.size > 0) {
    // Without a record, hash what is there.
    const changing = [...plan.remove, ...plan.put.keys()].filter((path) => !(path in old));
    for (const path of changing.filter((path) => files.isFile(path))) {
      note(path, files.digest(path));
    }
  }
  for (const item of wanted.values()) item.localCopies = paths.get(item.key) ?? [];
  plan.downloads = [...wanted.values()];
}

function planFirmware(files: Files, plan: Plan, { firmware }: Manifest): void {
  if (!firmware) return;
  const key = keyOf(firmware);
  const { URL: url, size } = firmware;
  const active = files.firmware && slotPath(files.firmware.slot);
  plan.firmware = { key, version: firmware.version! };
  const inline = inlineIn(firmware);
  const image = { key, url, path: basename(url), size, localCopies: [], ...inline };
  const others = plan.downloads.filter((item) => item.key !== key);
  plan.downloads = [...others, active ? { ...image, old: active } : image];
}

/**
 * Adds `flash/OTA_VERSION.py` to a plan, on devices that have `flash`; removes it when a release
 * has a file of that name.
 */
async function planVersionFile({ files, staging }: Journal, plan: Plan): Promise<void> {
  if (Object.hasOwn(plan.target.files, "flash")) {
    if (files.isFile(VERSION_FILE)) plan.remove.push(VERSION_FILE);
    return;
  }
  const hasFlash = [...plan.put.keys()].some((path) => path.startsWith("flash/"));
  if (!hasFlash && !files.isDirectory("flash")) return;
  refuseLinks(files, [VERSION_FILE]);
  const bytes = utf8(`VERSION = '${plan.target.version}'\n`);
  if (files.hasContent(VERSION_FILE, sha256(bytes), bytes.byteLength)) return;
  plan.put.set(VERSION_FILE, await staging.add(bytes));
}

/** @throws {OTAError} with both numbers, when a plan needs more space than is free */
function checkSpace({ files, staging }: Journal, plan: Plan): void {
  const { put, remove, target, downloads } = plan;
  const sizes = new Map(downloads.map(({ key, size }) => [key, size ?? 0]));
  let needed = staging.backupBytes([...put.keys(), ...remove]);
  for (const [key, size] of sizes) {
    if (!staging.has(key)) needed += Math.max(0, size - staging.partial(key).size);
  }
  const once = new Set<string>();
  for (const key of put.values()) {
    // The same content in two places is stored twice.
    if (once.has(key)) needed += sizes.get(key) ?? 0;
    once.add(key);
  }
  // The journal, the record, and the directories: some 200 bytes a file, and a margin.
  needed += 64 * 1024 + 200 * (put.size + remove.length + Object.keys(target.files).length);
  const free = files.disk.free(OTA_DIR);
  if (needed > free) {
    throw new OTAError(
      `not enough space in ${files.root}: this update needs ${needed} bytes, and ${free} are ` +
        "free; nothing was fetched",
    );
  }
}

// ──── Receiving and retries ───────────────────────────────────────────────────────────────────────
// Receives bytes from a peer that may be slow, silent, cut off or lying. Everything is bounded in
// time and size, and tried again where that can help.

/** What `getData` is asked for, beside the path. */
export interface TransferRequest {
  /** Where to begin, if the content still has the tag `etag`; else at 0. */
  offset?: number;
  etag?: string;
  /** Codings that can be decoded; absent: none. */
  accept?: readonly Encoding[];
  /** SHA-256 of content that the device has, as a dictionary for a delta. */
  dictionary?: Uint8Array;
  signal: AbortSignal;
}

/** What `getData` returns. */
export interface TransferResponse {
  body: ReadableStream<Uint8Array>;
  /** Where in the encoded content the body begins: the requested offset, or 0. */
  offset: number;
  /** Size of the whole encoded content, offset included; absent when unknown. */
  total?: number;
  /** A strong tag of the content, for resuming; absent when there is none. */
  etag?: string;
  encoding: Encoding;
  headers: Headers;
}

/**
 * A transfer that failed.
 *
 * @param retry whether another try may succeed
 * @param pause seconds that the server asks to wait before it
 */
export class TransferError extends OTAError {
  override name = "TransferError";
  constructor(
    message: string,
    readonly retry: boolean,
    readonly pause = 0,
  ) {
    super(message);
  }
}

/** Content is complete but not what the manifest says: a newer manifest may say otherwise. */
class ContentError extends TransferError {
  override name = "ContentError";
}

/** Content does not decode to what it should be: the plain content may be right. */
class CodingError extends TransferError {
  override name = "CodingError";
}

const TRIES = 5;
/** Slower than this many bytes a second over so many seconds counts as stalled. */
const SLOWEST = { rate: 10, seconds: 300 };

class Receiver {
  /** Bytes of all bodies so far, as they came. */
  received = 0;
  readonly signal: AbortSignal;

  constructor(
    private readonly getData: (path: string, want: TransferRequest) => Promise<TransferResponse>,
    private readonly options: OTAOptions,
  ) {
    this.signal = options.signal ?? NEVER;
  }

  /**
   * Receives one body.
   *
   * @param begin is called with the head, and returns the consumer of the body
   */
  async receive(
    path: string,
    want: TransferRequest,
    begin: (data: TransferResponse) => (piece: Uint8Array) => void,
  ): Promise<TransferResponse> {
    const stalled = new AbortController();
    const signal = AbortSignal.any([stalled.signal, want.signal]);
    const [name] = path.split("?", 1) as [string];
    let cancel = async (_: unknown) => {};
    try {
      const getting = this.getData(path, { ...want, signal });
      cancel = async (reason) => (await getting).body.cancel(reason);
      const data = await this.#wait(name, getting, signal);
      const reader = data.body.getReader();
      cancel = (reason) => reader.cancel(reason);
      if (data.encoding !== "identity" && !want.accept?.includes(data.encoding)) {
        throw new TransferError(`${name} came coded as ${data.encoding}, unasked`, true);
      }
      const take = begin(data);
      const isSlow = slownessWatch(this.options.slowest);
      for (;;) {
        const { done, value } = await this.#wait(name, reader.read(), signal);
        if (done) return data;
        this.received += value.byteLength;
        if (isSlow(value.byteLength)) throw new TransferError(`${name} comes too slowly`, true);
        take(value);
      }
    } catch (error) {
      stalled.abort(error);
      cancel(error).catch(() => {});
      throw error;
    }
  }

  /** Waits for the peer, within the time limit; turns its errors into `TransferError`. */
  async #wait<T extends object>(
    name: string,
    promise: Promise<T>,
    signal: AbortSignal,
  ): Promise<T> {
    const { timeout = 30 } = this.options;
    try {
      const got = await within(timeout, promise, signal);
      if (got) return got;
    } catch (error) {
      // Broken connections give system errors, and `fetch` TypeErrors with a code.
      const isMistake = error instanceof TypeError && errorCode(error) === undefined;
      if (error instanceof OTAError || signal.aborted || isMistake) throw error;
      throw new TransferError(`${name}: ${errorText(error)}`, true);
    }
    throw new TransferError(`${name}: nothing came for ${timeout} s`, true);
  }

  /** Tries up to five times, with growing pauses. */
  async withRetries<T>(task: () => Promise<T>, signal = this.signal): Promise<T> {
    for (let [tries, wrong] = [1, 0]; ; tries++) {
      try {
        return await task();
      } catch (error) {
        signal.throwIfAborted();
        if (!(error instanceof TransferError) || !error.retry) throw error;
        // The same wrong content twice is not a transmission error.
        if (error instanceof ContentError && (++wrong === 2 || tries === TRIES)) throw error;
        if (tries === TRIES) throw new OTAError(`${error.message}; gave up after ${TRIES} tries`);
        const pause = Math.max(error.pause, 0.25 * 2 ** tries * (0.75 + Math.random() / 2));
        note(this.options, `${error.message}; trying again in ${pause.toFixed(1)} s`);
        await sleep(pause, signal);
      }
    }
  }
}

/**
 * Watches the rate at which a body comes.
 *
 * @returns a function to be called with received bytes; returns whether they come too slowly
 */
function slownessWatch({ rate, seconds } = SLOWEST): (bytes: number) => boolean {
  let since = performance.now();
  let received = 0;
  return (bytes) => {
    received += bytes;
    if (performance.now() - since < seconds * 1000) return false;
    const isSlow = received < seconds * rate;
    since = performance.now();
    received = 0;
    return isSlow;
  };
}

// ──── Download attempts ──────────────────────────────────────────────────────────────────────────
// One attempt to fetch one content: what is asked for, and whether what comes is right. What was
// received before is not received again.

/** Content shorter than this is not resumed. */
const MIN_RESUMED = 16 * 1024;
/** Limit for content without a known size, in bytes. */
const MAX_UNSIZED_BYTES = 64 * 1024 * 1024;

/** One attempt to fetch one content; checks that it is what was requested. */
class Attempt {
  /** Bytes received, those of earlier attempts included. */
  received = 0;
  readonly want: Omit<TransferRequest, "signal">;
  readonly #hasher: Bun.CryptoHasher;
  /** The maximum size. */
  readonly #limit: number;
  readonly #dictionary: Dictionary | undefined;
  /** Bytes to expect, if known. */
  #total: number | undefined;

  /**
   * @param partial what earlier attempts received
   * @param isPlain whether it must not be encoded
   * @param progress is called with bytes as they are received
   */
  constructor(
    private readonly files: Files,
    private readonly item: Download,
    private readonly partial: PartialDownload,
    isPlain: boolean,
    private readonly progress: (bytes: number) => void,
  ) {
    const { key, size, old } = item;
    this.#hasher = new Bun.CryptoHasher(algorithmOf(key));
    this.#limit = size ?? MAX_UNSIZED_BYTES;
    this.#total = size;
    const codable = !isPlain && size !== undefined && size <= MAX_CODED;
    const dictionary = codable && old ? files.dictionary(old, MAX_CODED) : undefined;
    this.#dictionary = dictionary;
    const { size: offset, etag } = partial;
    this.want = {
      ...(offset > 0 && etag && { offset, etag }),
      ...(codable && { accept: codings(dictionary !== undefined) }),
      ...(dictionary && { dictionary: Buffer.from(dictionary.sha256, "hex") }),
    };
  }

  /** Uses what earlier attempts received, if that is complete. */
  takeAll(): boolean {
    const { size } = this.item;
    if (size === 0) this.partial.start();
    else if (this.partial.size === size && this.partial.encoding === "identity") this.#resume();
    else return false;
    return true;
  }

  #resume(): void {
    this.#count(this.partial.size);
    this.files.readPieces(this.partial.path, (piece) => this.#hasher.update(piece));
  }

  /**
   * Checks the head of a response.
   *
   * @returns the consumer of its body
   * @throws {TransferError} when it is not what was requested
   */
  begin({ encoding, offset, total, etag }: TransferResponse): (piece: Uint8Array) => void {
    const { path, size } = this.item;
    if (encoding === "identity" && size !== undefined && (total ?? size) < size) {
      this.#refuse(`${path} has ${total} bytes, and ${size} were expected`);
    }
    const isRest = offset > 0 && offset === this.want.offset && encoding === this.partial.encoding;
    if (isRest) this.#resume();
    else if (offset === 0) {
      // For small content, the sidecar file costs more than starting again.
      this.partial.start(this.#limit < MIN_RESUMED ? undefined : etag, encoding);
    } else {
      this.partial.drop();
      throw new TransferError(`${path}: other bytes came than were asked for`, true);
    }
    if (encoding !== "identity") this.#total = total;
    return (piece) => this.#take(piece);
  }

  #take(piece: Uint8Array): void {
    this.#count(piece.byteLength);
    // Encoding may enlarge small content a little.
    if (this.received > this.#limit + (this.partial.encoding === "identity" ? 0 : 1024)) {
      this.#refuse(`${this.item.path} is longer than the ${this.#limit} bytes expected`);
    }
    this.#hasher.update(piece);
    this.partial.append(piece);
  }

  #count(bytes: number): void {
    this.received += bytes;
    this.progress(bytes);
  }

  #refuse(why: string): never {
    this.partial.drop();
    throw new ContentError(why, true);
  }

  /**
   * Verifies the content and stages it.
   *
   * @param signal ends decoding; its reason is thrown
   * @throws {TransferError} when it is incomplete or wrong
   */
  async finish(signal: AbortSignal): Promise<void> {
    const { key, path } = this.item;
    if (this.#total !== undefined && this.received < this.#total) {
      const found = `${this.received} of ${this.#total} bytes`;
      throw new TransferError(`${path} was cut off after ${found}`, true);
    }
    if (this.partial.encoding === "identity") {
      const found = this.#hasher.digest("hex");
      if (found !== key) this.#refuse(`${path} does not verify: expected ${key}, found ${found}`);
    } else {
      await this.#decode(signal);
      this.#count(this.#limit - this.received);
    }
    await this.partial.finish();
  }

  /** Replaces encoded content by the decoded content. */
  async #decode(signal: AbortSignal): Promise<void> {
    const { key, path } = this.item;
    const { encoding } = this.partial;
    try {
      const coded = this.files.readWhole(this.partial.path, MAX_CODED)!;
      const hasher = new Bun.CryptoHasher(algorithmOf(key));
      this.partial.start();
      const pieces = decodeContent(encoding, coded, this.#limit, this.#dictionary);
      await new TimeSlicer().each(pieces, (piece) => {
        signal.throwIfAborted();
        hasher.update(piece);
        this.partial.append(piece);
      });
      const found = hasher.digest("hex");
      if (found !== key) throw new Error(`expected ${key}, found ${found}`);
    } catch (error) {
      signal.throwIfAborted();
      // A full disk is not a decoding error.
      if (["ENOSPC", "EIO", "EDQUOT", "EROFS"].includes(errorCode(error) ?? "")) throw error;
      this.partial.drop();
      throw new CodingError(`${path} does not decode from ${encoding}: ${errorText(error)}`, false);
    }
  }
}

// ──── Fetching content ───────────────────────────────────────────────────────────────────────────
// Stages all content of a plan at the least cost in bytes: from the device itself, else out of the
// manifest, else as a delta, else encoded, else plain.

class Fetcher {
  readonly #traffic = { content: 0, reused: 0 };
  /** Keys of content that was not on the device at first. */
  readonly #fetched = new Set<string>();
  #progress = (_: number) => {};
  readonly #slicer = new TimeSlicer();

  constructor(
    private readonly journal: Journal,
    private readonly receiver: Receiver,
    private readonly options: OTAOptions,
  ) {}

  /**
   * Stages all content of a plan.
   *
   * @throws {TransferError} when content cannot be had as the manifest describes it
   */
  async fetchAll({ downloads }: Plan): Promise<Traffic> {
    const total = downloads.reduce((sum, { size }) => sum + (size ?? NaN), 0);
    let received = 0;
    this.#progress = (bytes) => {
      received += bytes;
      this.options.report?.({ kind: "progress", received, total });
    };
    Object.assign(this.#traffic, { content: 0, reused: 0 });
    await new Pool(this.options.jobs ?? 4).each(downloads, (item, failed) => {
      return this.#fetch(item, AbortSignal.any([failed, this.receiver.signal]));
    });
    return { ...this.#traffic, received: this.receiver.received };
  }

  async #fetch(item: Download, signal: AbortSignal): Promise<void> {
    const { key, path, size } = item;
    const { files, staging } = this.journal;
    this.#traffic.content += size ?? 0;
    if (await this.#isHere(item)) {
      if (!this.#fetched.has(key)) this.#traffic.reused++;
      return this.#progress(size ?? 0);
    }
    this.#fetched.add(key);
    const get = (isPlain: boolean) => {
      return this.receiver.withRetries(() => this.#fetchOnce(item, isPlain, signal), signal);
    };
    try {
      if (this.#slicer.isDue) await this.#slicer.pause();
      signal.throwIfAborted();
      if (!(await this.#takeInline(item))) await get(false);
    } catch (error) {
      if (!(error instanceof CodingError)) throw error;
      note(this.options, `${error.message}; fetching it plain`);
      await get(true);
    }
    const staged = size ?? files.stat(staging.path(key))!.size;
    if (size === undefined) this.#traffic.content += staged;
    this.options.report?.({ kind: "fetched", path, size: staged });
  }

  /** Whether content is staged, or can be staged from another file of the device. */
  async #isHere({ key, localCopies }: Download): Promise<boolean> {
    const { staging } = this.journal;
    if (staging.has(key)) return true;
    for (const path of localCopies) if (await staging.addCopy(key, path)) return true;
    return false;
  }

  /** Stages content that came in the manifest, and returns whether it was there and is right. */
  async #takeInline({ inline, path, key, size = Infinity, old }: Download): Promise<boolean> {
    if (!inline || size > MAX_INLINE) return false;
    const { files, staging } = this.journal;
    let content: Uint8Array;
    try {
      const dictionary = old === undefined ? undefined : files.dictionary(old, MAX_INLINE);
      content = fromInline(inline, size, dictionary);
      const found = sha256(content);
      if (found !== key) throw new Error(`expected ${key}, found ${found}`);
    } catch (error) {
      const why = `${path} is not right in the manifest: ${errorText(error)}`;
      note(this.options, `${why}; fetching it`);
      return false;
    }
    await staging.add(content);
    this.#progress(size);
    return true;
  }

  async #fetchOnce(item: Download, isPlain: boolean, signal: AbortSignal): Promise<void> {
    const { files, staging } = this.journal;
    const partial = staging.partial(item.key);
    const attempt = new Attempt(files, item, partial, isPlain, this.#progress);
    try {
      if (!attempt.takeAll()) {
        const want = { ...attempt.want, signal };
        await this.receiver.receive(item.url, want, (data) => attempt.begin(data));
      }
      await attempt.finish(signal);
    } catch (error) {
      this.#progress(-attempt.received);
      throw error;
    }
  }
}

// ──── Verification ────────────────────────────────────────────────────────────────────────────────
// Whether a manifest comes from whom the device trusts. Either its step was signed at home, or the
// answer was signed by the server for this very request.

/** Whom a device trusts. */
export interface Trust {
  /** Ed25519 public keys. */
  keys: readonly KeyObject[];
  /** How many of them must have signed a step; 1. */
  threshold?: number | undefined;
}

/** @param signature what there is of one */
function refuseUnsigned(manifest: Manifest | null | undefined, signature: unknown): never {
  if (signature) refuse("none of the keys given signed it");
  const what = manifest === null ? "nothing newer, it says, but that" : "it";
  return refuse(`${what} is not signed, and --verify was given`);
}

/**
 * The step of a manifest, if enough of the trusted keys signed it.
 *
 * @param query as it was sent
 * @throws {OTAError} when it is not for this device, or not what the manifest says
 */
function stepBy(
  { keys, threshold = 1 }: Trust,
  manifest: Manifest | null,
  query: ManifestQuery,
): Step | undefined {
  const signers = manifest?.signed ? signersOf(manifest.signed, keys).size : 0;
  if (signers < threshold) {
    if (threshold === 1) return undefined;
    refuse(`${signers} of the keys given signed it, and --threshold is ${threshold}`);
  }
  try {
    const step = stepIn(manifest!.signed!);
    checkStep(manifest!, step, query);
    return step;
  } catch (error) {
    if (error instanceof FormatError) refuse(`signed: ${error.message}`);
    throw error;
  }
}

/** @throws {OTAError} when a step is not for this device, or not what the manifest says */
function checkStep(manifest: Manifest, step: Step, query: ManifestQuery): void {
  const { version, firmware, full } = manifest;
  const isSame = (a: string, b: string) => new LooseVersion(a).compare(b) === 0;
  const asked = query.list === undefined ? (query.current_ver ?? "") : "";
  if (full ? step.from !== ANY : step.from === ANY || !isSame(step.from, asked)) {
    refuse(
      `its step is from ${step.from || "nothing"}, and this device is on ${asked || "nothing"}`,
    );
  }
  // As it was signed; a device that stays where it is may name its version in its own way.
  if (version !== step.to && !(isSame(step.to, asked) && version === asked)) {
    refuse(`its step is to ${step.to}, and not to ${version}`);
  }
  if (query.model !== undefined && step.model !== query.model) {
    refuse(`its step is for ${step.model ?? "no model"}, and this device is a ${query.model}`);
  }
  if (stepsDigest(manifest) !== step.steps) refuse("its files are not those of its step");
  const signed = step.firmware;
  if (!firmware) {
    // Whoever carries a step must not leave its firmware out.
    if (!signed || query.list !== undefined) return;
    const order = new LooseVersion(signed.version).compare(query.firmware_ver ?? "");
    if (order > 0) refuse(`the firmware ${signed.version} of its step is missing`);
    return;
  }
  const { sha256, size } = firmware;
  if (signed?.sha256 !== sha256 || signed?.size !== size || signed?.version !== firmware.version) {
    refuse(`its firmware ${firmware.version} is not that of its step`);
  }
  checkNewer(firmware, query);
}

/**
 * Checks that a manifest ends in the release that was signed.
 *
 * @param has what is really there: files that the manifest does not list stay as they are
 */
function checkTarget(target: Target, manifest: Manifest, has: Inventory, step: Step): void {
  const listed = new Set(listedFiles(manifest).map(({ path }) => path));
  const files = Object.entries(target.files).map(([path, key]) => {
    return [path, listed.has(path) ? key : (has.files.get(path) ?? "")] as const;
  });
  if (releaseDigest(files) === step.release) return;
  refuse(`from what is here it does not lead to ${step.to} as it was signed`);
}

/** A clock that says less than this is wrong: when this version of the tool was made. */
const TOOL_DATE = "2026-11-27T00:00:00Z";

/**
 * Checks the times of a step.
 *
 * @param latest when the newest step that this device has seen was issued
 * @throws {OTAError} when the step has expired, or is older than what is installed
 */
function checkTimes(
  { issued, expires, to }: Step,
  latest: string | undefined,
  options: DeviceOptions,
): void {
  const time = Date.parse;
  if (latest !== undefined && time(issued) < time(latest)) {
    refuse(`its step was issued at ${issued}, before the one that is installed (${latest})`);
  }
  if (expires === null) return;
  const now = Date.now();
  if (now < Math.max(time(TOOL_DATE), time(issued))) {
    const found = new Date(now).toISOString();
    note(options, `the clock is wrong (${found}): whether ${to} expired is not checked`);
  } else if (time(expires) < now) refuse(`its step expired at ${expires}`);
}

/** @throws {OTAError} when an answer that its server signed is to another question than was asked */
function checkAnswer(manifest: Manifest, query: ManifestQuery): void {
  const { request_id, previous_version, firmware } = manifest;
  if (request_id !== query.reqid) refuse("its request_id is not the one that was sent");
  const from = (query.list ?? query.current_ver) || "0";
  // A list names the version as the server does.
  const isFor =
    query.list === undefined
      ? previous_version === from
      : new LooseVersion(previous_version ?? "").compare(from) === 0;
  if (!isFor) {
    refuse(`it is for a device on ${previous_version}, and this one is on ${from}`);
  }
  // Otherwise the diff may start from other files than ours, and give a mix that was never
  // released.
  const hasLists = manifest.delete.length + manifest.new.length + manifest.update.length > 0;
  if (hasLists && query.base && !manifest.full && manifest.base !== query.base) {
    refuse(
      `it is not for what this device has of ${from}: base was lost on the way, or not echoed`,
    );
  }
  if (firmware) checkNewer(firmware, query);
  const contents = [...manifest.new, ...manifest.update, ...(firmware ? [firmware] : [])];
  const bare = contents.find(({ sha256 }) => sha256 === undefined);
  if (bare) refuse(`${bare.URL} has no sha256`);
}

/** @throws {OTAError} unless firmware is newer than what runs, or puts that right */
function checkNewer(
  { version, sha256 }: ManifestFirmware,
  { firmware_ver = "", firmware_sha256 }: ManifestQuery,
): void {
  const order = new LooseVersion(version!).compare(firmware_ver);
  const isRepair = firmware_sha256 !== undefined && firmware_sha256 !== sha256;
  if (order > 0 || (order === 0 && isRepair)) return;
  refuse(`its firmware ${version} is not newer than the active one, ${firmware_ver}`);
}

// ──── Manifest client ─────────────────────────────────────────────────────────────────────────────
// Getting a manifest: whole, and from whom the device trusts.

/** The path of a manifest, with its query. */
function manifestPath(query: ManifestQuery): string {
  const search = Object.entries(query).map(([name, value]) => {
    return `${name}=${encodeURIComponent(value!)}`;
  });
  return `/manifest.json?${search.join("&")}`;
}

class ManifestClient {
  /**
   * @param trust absent: anybody
   * @param isBrief whether to ask for brief ones
   */
  constructor(
    private readonly receiver: Receiver,
    private readonly trust: Trust | undefined,
    private readonly isBrief: boolean,
  ) {}

  /**
   * Asks for a manifest.
   *
   * @param atLeast the version of the device: an older manifest is refused
   * @returns `null` when the server has nothing; the step that was signed at home, if any
   * @throws {OTAError} when what comes is not a manifest, or is not signed as it must be
   */
  async ask(
    asked: ManifestQuery,
    atLeast?: string,
  ): Promise<{ manifest: Manifest | null; step?: Step | undefined }> {
    const { trust, isBrief } = this;
    const query = {
      ...asked,
      ...(isBrief && { brief: "1" }),
      ...(trust && { reqid: crypto.randomUUID(), signed: "1" }),
    };
    const path = manifestPath(query);
    // Contents in a manifest may be coded with what the device has; those in a list are not wanted.
    const accept = codings(isBrief && asked.list === undefined);
    const { body, headers } = await this.receiver.withRetries(() => this.#read(path, accept));
    if (!trust) return { manifest: parseManifest(body, atLeast) };
    const signature = headers.get(SIGNATURE_HEADER);
    const isSigned = signature !== null && isSignedBy(trust.keys, signature, body, query.reqid!);
    let manifest: Manifest | null;
    try {
      manifest = parseManifest(body);
    } catch (error) {
      // What strangers sent is not worth a closer look.
      if (isSigned) throw error;
      refuseUnsigned(undefined, signature);
    }
    const step = stepBy(trust, manifest, query);
    if (!step && !isSigned) refuseUnsigned(manifest, signature ?? manifest?.signed);
    if (manifest && atLeast !== undefined) refuseOlder(manifest, atLeast);
    if (manifest && !step) checkAnswer(manifest, query);
    return { manifest, step };
  }

  /** Receives a whole manifest, within the size limit. */
  async #read(path: string, accept: Coding[]): Promise<{ body: Uint8Array; headers: Headers }> {
    const pieces: Uint8Array[] = [];
    let size = 0;
    const tooLong = `the manifest is longer than ${MAX_MANIFEST_BYTES} bytes`;
    const want = { accept, signal: this.receiver.signal };
    const { headers, encoding } = await this.receiver.receive(path, want, () => (piece) => {
      size += piece.byteLength;
      if (size > MAX_MANIFEST_BYTES) throw new TransferError(tooLong, false);
      pieces.push(piece);
    });
    try {
      const body = decodeContent(encoding, Buffer.concat(pieces), MAX_MANIFEST_BYTES);
      return { body: Buffer.concat([...body]), headers };
    } catch (error) {
      throw new TransferError(`the manifest does not decode: ${errorText(error)}`, true);
    }
  }
}

// ──── Device survey ───────────────────────────────────────────────────────────────────────────────
// Finds out what a device has, and makes the query for the server from it.

class Survey {
  /** The release the device is on; `""` when it has nothing. */
  readonly current: string;
  readonly #files: Files;

  constructor(
    private readonly journal: Journal,
    private readonly options: OTAOptions,
  ) {
    this.#files = journal.files;
    this.current = this.#currentVersion();
  }

  #currentVersion(): string {
    const { ver } = this.options;
    const recorded = this.journal.state.installed?.version ?? versionFromFile(this.#files);
    if (recorded !== undefined) {
      if (ver !== undefined && ver !== recorded) {
        note(
          this.options,
          `the device is on ${recorded} by its own record; --ver ${ver} is not used`,
        );
      }
      return recorded;
    }
    const isEmpty = () => this.#files.disk.list("").every((name) => name === OTA_DIR);
    if (ver !== undefined && isEmpty()) {
      const { root } = this.#files;
      note(this.options, `${root} is empty: everything is fetched, whatever --ver ${ver} says`);
      return "";
    }
    return ver ?? "";
  }

  /** Finds out what the device really has; completes its record with the server's help. */
  async take(manifests: ManifestClient): Promise<Inventory> {
    const { repair, checkFiles = repair } = this.options;
    const { installed } = this.journal.state;
    let has = takeInventory(this.#files, installed, checkFiles);
    // An old `.ota` may have been restored: files of the release that was installed since count,
    // too.
    const named = versionFromFile(this.#files);
    const isOther =
      named !== undefined && named !== installed?.version && named !== installed?.alsoNamed;
    const unknown = !installed?.stamps ? this.current : isOther ? named : "";
    const list = unknown === "" ? null : await this.#askForList(manifests, unknown);
    if (list) {
      const adopted = adopt(this.#files, this.current, list, installed);
      has = takeInventory(this.#files, isOther ? { ...adopted, alsoNamed: named } : adopted);
      this.#noteDifferences(list, has);
    }
    const isBetter = list !== null || has.isNewer;
    if (isBetter && this.journal.damaged.length === 0) await this.journal.remember(has.installed!);
    return has;
  }

  /** The list of a release's files, if the server has it and sends SHA-256. */
  async #askForList(manifests: ManifestClient, version: string): Promise<Manifest | null> {
    const query: ManifestQuery = {
      ...{ list: version, hash: "sha256", devid: await this.#id() },
      ...(this.options.model !== undefined && { model: this.options.model }),
    };
    let list: Manifest | null;
    try {
      list = (await manifests.ask(query)).manifest;
    } catch (error) {
      // Without a list that can be trusted, the full list of the update will do.
      if (!this.options.verify || !(error instanceof RefusedError)) throw error;
      note(this.options, `what ${version} consists of is not known: ${error.message}`);
      return null;
    }
    // A server that knows no `list` answers with its newest release.
    const isKnown = list?.new.every(({ sha256 }) => sha256 !== undefined);
    if (!list || !isKnown || new LooseVersion(list.version).compare(version) !== 0) {
      note(this.options, `the server does not have ${version}: what it consists of is not known`);
      return null;
    }
    return list;
  }

  /** Reports how the device differs from the release that it claims. */
  #noteDifferences(list: Manifest, { files }: Inventory): void {
    const other = listedFiles(list).filter(({ path, sha256 }) => files.get(path) !== sha256);
    if (other.length === 0) return;
    const some = other.slice(0, 3).map(({ path }) => path);
    const paths = `${some.join(", ")}${other.length > some.length ? ", …" : ""}`;
    const count = `${other.length} of the ${list.new.length} files of ${list.version}`;
    note(this.options, `${count} are missing here or have other content: ${paths}`);
  }

  /** What the device is, and what it is on: all that a report says. */
  async standing(): Promise<ManifestQuery> {
    const failed = this.journal.state.failed.at(-1);
    const { model } = this.options;
    return {
      current_ver: this.current,
      firmware_ver: this.#files.firmware?.version ?? "",
      devid: await this.#id(),
      ...(model !== undefined && { model }),
      ...(failed && { failed: failed.firmware ?? failed.version }),
    };
  }

  /** What the device asks for an update with. */
  async query(has: Inventory): Promise<ManifestQuery> {
    const query: ManifestQuery = {
      ...(await this.standing()),
      ...(has.image !== undefined && { firmware_sha256: has.image }),
      hash: "sha256",
    };
    // Without a version the answer is the full list.
    if (this.options.repair) delete query.current_ver;
    else if (has.installed) query.base = releaseDigest(has.files);
    // A signed step is proved by the whole release that it ends in: it must not add to unknown files.
    else if (this.options.verify && this.current !== "") query.base = releaseDigest([]);
    return query;
  }

  /** The name of the device; by default a random one, which is kept. */
  async #id(): Promise<string> {
    if (this.options.id !== undefined) return this.options.id;
    const { disk } = this.#files;
    const path = `${OTA_DIR}/id`;
    const known = readText(disk, path)?.trim() ?? "";
    // Printable and without spaces.
    if (/^[!-~]{1,128}$/.test(known)) return known;
    const made = crypto.randomUUID();
    await replaceText(disk, path, `${made}\n`);
    await disk.sync(OTA_DIR);
    return made;
  }
}

// ──── Device ─────────────────────────────────────────────────────────────────────────────────────
// The workflow of an update. It knows no transport: another one extends `OTA` with `connect` and
// `getData`, and inherits everything else.

/** What a commit needs, once all content is staged. */
interface Staged {
  plan: Plan;
  has: Inventory;
  failure: FailedRelease;
  traffic: Traffic;
  /** When the step was signed at home, if it was. */
  issued: string | undefined;
}

/** Whether a manifest changes nothing on a device: a step from its release to itself. */
function isEmpty(manifest: Manifest, current: string): boolean {
  const { delete: gone, new: added, update, firmware, full, version } = manifest;
  const isSame = new LooseVersion(version).compare(current) === 0;
  return isSame && gone.length + added.length + update.length === 0 && !firmware && !full;
}

/**
 * A device. One `update` is one transaction:
 *
 *  1. Open the journal, which finishes what was interrupted; a release on trial is tried.
 *  2. Survey what the device really has; at first contact, ask what its release consists of.
 *  3. Ask for a manifest, saying what the device has. `null`: there is nothing to do.
 *  4. Stage: fetch what is not there, by hash, with retries and resume. The tree is untouched.
 *  5. Commit: the journal makes the change whole or not at all.
 *  6. Try: the check decides. Good: confirmed. Bad: back to the release before, and this one is
 *     remembered and not tried again until a different one is offered.
 *  7. Report what the device is on now, where the transport can. That fails without consequence.
 *
 * A transport implements `connect` and `getData`, `disconnect` where there is something to end,
 * `report` where the server is to know at once, and throws `TransferError` when it fails.
 */
export abstract class OTA {
  readonly root: string;
  /**
   * Whether to ask for brief manifests (`brief=1`). `getData` is then given paths below the server's
   * address, such as `/1.0.1/flash/main.py`, where it would be given URLs.
   */
  protected readonly isBrief: boolean = false;
  protected readonly options: Readonly<OTAOptions>;
  readonly #files: Files;

  constructor(options: OTAOptions) {
    this.options = options;
    this.#files = filesOf(options.root, options);
    this.root = this.#files.root;
  }

  /**
   * Gets ready to carry bytes: joins the network, opens the port. An update connects once to fetch,
   * and once more to report: in between the application restarts, which may need the line itself.
   *
   * @throws {TransferError}
   */
  abstract connect(): Promise<void>;

  /** Undoes `connect`, once everything is fetched or reported, or that has failed. */
  async disconnect(): Promise<void> {}

  /**
   * Gets the content at a path: that of the manifest, with its query, or a URL from the manifest.
   * Only moves bytes: `OTA` decodes, verifies, retries and resumes.
   *
   * @throws {TransferError} when it fails; the returned body may fail, too
   */
  abstract getData(path: string, want: TransferRequest): Promise<TransferResponse>;

  /**
   * Tells the server what the device is on, right after an update or a rollback: over HTTP by a
   * `HEAD`. It is tried once. Without this method the server learns it from the next request.
   *
   * @param path that of the manifest, with its query; nothing is to be got from there
   * @param signal aborts when it is no longer waited for
   * @throws {TransferError}
   */
  report?(path: string, signal: AbortSignal): Promise<void>;

  /**
   * Brings the device to the newest release.
   *
   * @throws {OTAError} when it failed for any reason; the device is as it was
   */
  async update(): Promise<Outcome> {
    using journal = await Journal.open(this.#files);
    const trial = new HealthCheck(journal, this.options);
    if (!this.options.repair) journal.refuseDamage();
    const bad = await trial.resume();
    if (bad) {
      await this.#tell(journal);
      return bad;
    }

    const survey = new Survey(journal, this.options);
    await this.connect();
    let staged: Staged | Outcome;
    try {
      staged = await this.#stage(journal, survey);
    } finally {
      await this.disconnect();
    }
    const outcome =
      "result" in staged ? staged : await this.#commit(journal, trial, staged, survey.current);
    // Where nothing changed the request said it all; but one for a repair does not name the version.
    const isSaid = ["up to date", "not tried"].includes(outcome.result) && !this.options.repair;
    if (!isSaid) await this.#tell(journal);
    return outcome;
  }

  /**
   * Reports what the device is on now, if the transport can. The update is over and stands: whatever
   * goes wrong here, bugs included, is a note.
   */
  async #tell(journal: Journal): Promise<void> {
    if (!this.report) return;
    // What `--ver` says was for the time before the update.
    const { ver: _, ...options } = this.options;
    const { timeout = 30, signal = NEVER } = options;
    const over = new AbortController();
    try {
      signal.throwIfAborted();
      const path = manifestPath(await new Survey(journal, options).standing());
      await this.connect();
      try {
        const telling = this.report(path, AbortSignal.any([signal, over.signal]));
        const told = telling.then(() => true);
        if (!(await within(timeout, told, signal)))
          throw new TransferError(`nothing came for ${timeout} s`, false);
      } finally {
        over.abort();
        await this.disconnect();
      }
    } catch (error) {
      const why = signal.aborted ? "interrupted" : errorText(error);
      note(options, `the server may not know yet what this device is on: ${why}`);
    }
  }

  /** Asks for a manifest, and stages all content that it needs. */
  async #stage(journal: Journal, survey: Survey): Promise<Staged | Outcome> {
    const { repair = false, retry, verify } = this.options;
    const get = (path: string, want: TransferRequest) => this.getData(path, want);
    const receiver = new Receiver(get, this.options);
    const fetcher = new Fetcher(journal, receiver, this.options);
    const trust = verify && { keys: verify, threshold: this.options.threshold };
    // For a repair the whole release is listed, most of which is there.
    const manifests = new ManifestClient(receiver, trust, this.isBrief && !repair);
    const from = survey.current || "0";
    const has = await survey.take(manifests);
    for (let isFirst = true; ; isFirst = false) {
      const query = await survey.query(has);
      const last = verify && journal.lastInstalled?.version;
      const { manifest, step } = await manifests.ask(query, survey.current || last || undefined);
      const { installed } = journal.state;
      if (step) checkTimes(step, journal.lastInstalled?.issued, this.options);
      if (!manifest || (step && isEmpty(manifest, survey.current))) {
        if (step && installed && step.issued !== installed.issued) {
          await journal.remember({ ...installed, issued: step.issued });
        }
        if (journal.damaged.length === 0) return { result: "up to date", from, to: from };
        throw new OTAError("the server has no release to repair from: the record stays damaged");
      }
      const full = manifest.full ?? repair;
      const target = targetOf(manifest, has.installed, full);
      if (step) checkTarget(target, manifest, has, step);
      const active = this.#files.firmware;
      const failure = failureOf(target, manifest, active, step);
      const failed = journal.state.failed.find((one) => isSameFailure(one, failure));
      if (failed && !retry) {
        const to = failed.firmware;
        const firmware = to && { from: active?.version ?? "0", to };
        return { result: "not tried", from, to: target.version, ...(firmware && { firmware }) };
      }
      const plan = await makePlan(journal, manifest, target, has, full);
      try {
        const traffic = await fetcher.fetchAll(plan);
        return { plan, has, failure, traffic, issued: step?.issued };
      } catch (error) {
        // On a full disk, what was staged must not block the next try.
        if (["ENOSPC", "EDQUOT"].includes(errorCode(error) ?? "")) journal.staging.clear();
        // The release may have changed since the manifest was made.
        if (!isFirst || !(error instanceof TransferError)) throw error;
        note(this.options, `${error.message}; asking for a new manifest`);
      }
    }
  }

  /** Commits what was staged, and tries the release. */
  async #commit(
    journal: Journal,
    trial: HealthCheck,
    { plan, has, failure, traffic, issued }: Staged,
    current: string,
  ): Promise<Outcome> {
    const { check, restart } = this.options;
    const { put, remove, firmware, target } = plan;
    const { version } = target;
    const before = has.installed;
    const isSame = version === current;
    const installed: Installed = {
      ...target,
      previous_version: (isSame && before?.previous_version) || current || null,
    };
    const latest = issued ?? before?.issued;
    if (latest !== undefined) installed.issued = latest;
    const outcome: Outcome = { result: "updated", from: current || "0", to: version, traffic };
    if (put.size + remove.length === 0 && !firmware) {
      await journal.record(installed);
      return isSame ? { ...outcome, result: "up to date" } : outcome;
    }
    if (firmware) {
      outcome.firmware = { from: this.#files.firmware?.version ?? "0", to: firmware.version };
    }
    const repair = isSame && failure.image === undefined && journal.damaged.length === 0;
    if (repair) outcome.result = "repaired";
    else if (isSame && firmware) failure.firmware = firmware.version;
    const from =
      before ?? (current ? { version: current, previous_version: null, files: {} } : undefined);
    await journal.commit({ ...plan, from, installed, failure, check, restart, repair });
    const good = await trial.start(check);
    return good ? outcome : { ...outcome, result: "rolled back" };
  }
}

// ════ IX Transports ══════════════════════════════════════════════════════════════════════════════
// How bytes reach a device: over HTTP, or from a directory. Another transport is a class in a file
// of its own; see `examples/lora-transport.ts`.

// ──── HTTP ────────────────────────────────────────────────────────────────────────────────────────
// Requests over HTTP: tokens, redirects, ranges.

const MAX_REDIRECTS = 5;

/** Options that only `HttpOTA` has. */
export interface HttpOptions extends OTAOptions {
  /** Sent as `Authorization: Bearer`, to the origin of the server only. */
  token?: string;
  /** File of a certificate authority to trust beside the system's, PEM. */
  ca?: string;
}

/** A device that updates over HTTP: the `WiFiOTA` of Pycom's OTA tutorial, for anything with IP. */
export class HttpOTA extends OTA {
  protected override readonly isBrief: boolean = true;
  readonly #server: URL;
  readonly #token: string | undefined;
  readonly #tls: { ca: string } | undefined;

  /**
   * @param server the address of the server, such as `http://192.168.4.1:8000`
   * @throws {OTAError} when that is no http(s) address, or `ca` has no certificate
   */
  constructor(server: string | URL, options: HttpOptions) {
    super(options);
    const url = parseHttpURL(String(server));
    if (!url) {
      throw new OTAError(`expected an http(s) address of a server, found ${server}`, 2);
    }
    this.#server = url;
    this.#token = options.token;
    this.#tls = options.ca === undefined ? undefined : { ca: readCertificates(options.ca).pem };
  }

  /** Nothing to do: connections are made as they are needed. */
  override async connect(): Promise<void> {}

  /** A `HEAD` of the manifest. */
  override async report(path: string, signal: AbortSignal): Promise<void> {
    const response = await this.#get(this.#locate(path), { signal }, "HEAD");
    if (!response.ok) throw await refusal(response);
  }

  /** A path is looked for below the server's address, as with `--url http://cdn/fleet`. */
  #locate(path: string): URL {
    return new URL(path.startsWith("/") ? this.#server.href.replace(/\/+$/, "") + path : path);
  }

  override async getData(path: string, want: TransferRequest): Promise<TransferResponse> {
    const response = await this.#get(this.#locate(path), want);
    const { status, headers } = response;
    if (status === 416 && want.offset) {
      // The content is now shorter than what was received of it.
      await response.body?.cancel();
      const { offset: _, etag: __, ...whole } = want;
      return this.getData(path, whole);
    }
    if (status !== 200 && status !== 206) throw await refusal(response);
    const encoding = encodingOf(headers.get("content-encoding"));
    if (encoding === undefined) {
      await response.body?.cancel();
      const found = headers.get("content-encoding");
      throw new TransferError(`content came coded as ${found}, which nobody asked for`, true);
    }
    const range = /^bytes (\d+)-\d+\/(\d+)$/.exec(headers.get("content-range") ?? "");
    const length = headers.get("content-length");
    return {
      body: response.body ?? new Blob([]).stream(),
      offset: status === 206 ? Number(range?.[1] ?? NaN) : 0,
      total: status === 206 ? Number(range?.[2]) : length === null ? undefined : Number(length),
      etag: strongTag(headers.get("etag")),
      encoding,
      headers,
    };
  }

  /** Follows a few redirects, all to the same origin. */
  async #get(url: URL, want: TransferRequest, method = "GET"): Promise<Response> {
    const headers: Record<string, string> = {
      // Else Bun offers every coding that it knows.
      "Accept-Encoding": acceptEncoding(want.accept ?? ["identity"]),
      "User-Agent": `ota.ts/${TOOL_VERSION}`,
    };
    if (this.#token !== undefined && url.origin === this.#server.origin) {
      headers["Authorization"] = `Bearer ${this.#token}`;
    }
    if (want.dictionary) {
      headers["Available-Dictionary"] = `:${Buffer.from(want.dictionary).toString("base64")}:`;
    }
    if (want.offset && want.etag) {
      headers["Range"] = `bytes=${want.offset}-`;
      headers["If-Range"] = want.etag;
    }
    let at = url;
    for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
      let response: Response;
      try {
        response = await fetch(at, {
          method,
          headers,
          signal: want.signal,
          redirect: "manual",
          decompress: false,
          ...(this.#tls && { tls: this.#tls }),
        });
      } catch (error) {
        want.signal.throwIfAborted();
        throw new TransferError(`cannot reach ${at.origin}: ${errorText(error)}`, true);
      }
      if (![301, 302, 303, 307, 308].includes(response.status)) return response;
      await response.body?.cancel();
      const next = URL.parse(response.headers.get("location") ?? "", at.href);
      if (next?.origin !== url.origin) {
        throw new TransferError(`${at} redirects to another server, which is not followed`, false);
      }
      at = next;
    }
    throw new TransferError(`${url} redirects more than ${MAX_REDIRECTS} times`, false);
  }
}

/** The error that a response is which has not what was asked for. */
async function refusal({ url, status, headers, body }: Response): Promise<TransferError> {
  await body?.cancel();
  const again = status >= 500 || [408, 416, 425, 429].includes(status);
  const pause = Math.min(Number(headers.get("retry-after")) || 0, 60);
  const { origin, pathname } = new URL(url);
  const why = status === 401 ? ": it requires a token, see --token" : "";
  return new TransferError(`${origin}${pathname} answered ${status}${why}`, again, pause);
}

/** A tag with which a transfer can be resumed: present, and not weak. */
function strongTag(etag: string | null): string | undefined {
  return etag?.startsWith('"') ? etag : undefined;
}

// ──── Directory ───────────────────────────────────────────────────────────────────────────────────
// Reads a directory of releases as a server would.

/** A device that updates from a directory of releases: a USB stick, an SD card. */
export class DirectoryOTA extends OTA {
  #releases: Releases | undefined;

  /**
   * @param from the directory of releases, as `serve` takes it
   */
  constructor(
    private readonly from: string,
    options: OTAOptions,
  ) {
    super(options);
  }

  /** @throws {TransferError} when the directory cannot be read: the stick may not be plugged in */
  override async connect(): Promise<void> {
    if (!fs.statSync(this.from, { throwIfNoEntry: false })?.isDirectory()) {
      throw new TransferError(`${this.from} (--from) is not a directory, or not there`, false);
    }
    try {
      if (this.#releases) await this.#releases.scan();
      else this.#releases = await Releases.open(this.from, { quiet: 0 });
    } catch (error) {
      throw new TransferError(`cannot read ${this.from} (--from): ${errorText(error)}`, false);
    }
  }

  override async getData(
    path: string,
    { offset = 0, etag }: TransferRequest,
  ): Promise<TransferResponse> {
    const { pathname, search, origin } = new URL(path, "http://localhost");
    const headers = new Headers();
    if (pathname === "/manifest.json") {
      const json = this.#releases!.manifestJSON(parseQuery(search.slice(1)), origin);
      return { body: new Blob([json]).stream(), offset: 0, encoding: "identity", headers };
    }
    const found = this.#releases!.locate(pathname);
    if (!found) throw new TransferError(`${this.from} has no ${percentDecode(pathname)}`, false);
    if (!isReal(found)) throw new TransferError(`${found.file} is not there any more`, true);
    const start = etag === found.etag ? offset : 0;
    return {
      body: Bun.file(found.file).slice(start).stream(),
      offset: start,
      total: found.size,
      etag: found.etag,
      encoding: "identity",
      headers,
    };
  }
}

/** Whether a file is still where it was found, with the same size and not behind a new link. */
function isReal({ file, size }: ServedFile): boolean {
  try {
    return fs.realpathSync(file) === file && fs.statSync(file).size === size;
  } catch {
    return false;
  }
}

// ════ X Command line ═════════════════════════════════════════════════════════════════════════════
// Options, output and commands. A command only calls what the parts above export, so a program can
// do whatever the command line does.

// ──── Options ────────────────────────────────────────────────────────────────────────────────────
// One table of options; reading them, help and hints are derived from it.

/**
 * An option. Its name is the key in `OPTIONS`; a command stands before it where the option means
 * something else for other commands.
 */
interface OptionSpec {
  type: "string" | "boolean";
  /** The placeholder of its value in the help. */
  value?: string;
  multiple?: true;
  help: string;
}

const OPTIONS = {
  root: { type: "string", value: "DIR", help: "the directory of releases, or of the device" },
  port: { type: "string", value: "N", help: "the port; 0 picks a free one (8000)" },
  host: { type: "string", value: "ADDR", help: "the address to listen on (0.0.0.0)" },
  url: { type: "string", value: "BASE", help: "what URLs begin with, instead of the Host" },
  ignore: {
    type: "string",
    value: "GLOB",
    multiple: true,
    help: "leave such files out: *.md, flash/tests/**; may be repeated",
  },
  latest: { type: "string", value: "V", help: "offer nothing above this version" },
  "only-releases": { type: "boolean", help: "serve nothing but versions and images" },
  sign: { type: "string", value: "FILE", help: "sign manifests with this key (see keygen)" },
  token: { type: "string", value: "T", help: "the secret that requests must carry (or OTA_TOKEN)" },
  "trust-proxy": {
    type: "string",
    value: "ADDR",
    multiple: true,
    help: "believe X-Forwarded-… from this address or network; may be repeated",
  },
  "tls-cert": { type: "string", value: "FILE", help: "the certificate for HTTPS, PEM" },
  "tls-key": { type: "string", value: "FILE", help: "the key of that certificate, PEM" },
  fleet: { type: "string", value: "URL", help: "keep devices in this SQLite file or postgres://…" },
  "no-fleet": { type: "boolean", help: "keep nothing of devices" },
  silent: { type: "string", value: "DURATION", help: "after an offer, when silence tells (1h)" },
  "fleet --root": { type: "string", value: "DIR", help: "the root of its server (.)" },
  "fleet --fleet": {
    type: "string",
    value: "URL",
    help: "the fleet: a SQLite file or postgres://… (ROOT/.fleet.db)",
  },
  staged: { type: "boolean", help: "start a rollout of each version that appears" },
  notify: { type: "string", value: "URL", help: "tell it when a rollout halts, pauses or is done" },
  "rollout --root": { type: "string", value: "DIR", help: "the directory of releases (.)" },
  "rollout --fleet": {
    type: "string",
    value: "URL",
    help: "the fleet: a SQLite file or postgres://… (ROOT/.fleet.db)",
  },
  first: { type: "string", value: "N", help: "devices that may get it before one is proven (1)" },
  soak: { type: "string", value: "DURATION", help: "on it for so long, a device is proven (0s)" },
  "rollout --silent": {
    type: "string",
    value: "DURATION",
    help: "after being offered it, when silence tells (1h)",
  },
  tolerance: { type: "string", value: "PERCENT", help: "the share that may fail (5%)" },
  "pause-at": {
    type: "string",
    value: "LIST",
    help: "wait for resume at such shares, or at none (5%,50%)",
  },
  only: {
    type: "string",
    value: "K=V",
    multiple: true,
    help: "those with this label, model=M or version=V; may be repeated",
  },
  window: { type: "string", value: "TEXT", help: "when: 'Mon-Fri 01:00-04:00 Europe/Berlin'" },
  "dry-run": { type: "boolean", help: "show who will get it and what that costs, and end" },
  yes: { type: "boolean", help: "do not ask" },
  "rollout --model": { type: "string", value: "M", help: "the model whose root has it" },
  state: { type: "string", value: "S", help: "those in this state" },
  "list --version": { type: "string", value: "V", help: "those on this version" },
  "list --model": { type: "string", value: "M", help: "those of this model" },
  label: { type: "string", value: "K=V", help: "those with this label" },
  csv: { type: "boolean", help: "print CSV, for a spreadsheet" },
  "admin-token": {
    type: "string",
    value: "T",
    help: "opens the fleet's interface (or OTA_ADMIN_TOKEN)",
  },
  ca: { type: "string", value: "FILE", help: "trust this certificate authority, PEM" },
  verify: {
    type: "string",
    value: "FILE",
    multiple: true,
    help: "refuse manifests not signed with this key; may be repeated",
  },
  out: { type: "string", value: "NAME", help: "write NAME.key and NAME.pub" },
  ver: { type: "string", value: "V", help: "the release a device is on" },
  server: { type: "string", value: "URL", help: "the server (http://127.0.0.1:8000)" },
  from: { type: "string", value: "DIR", help: "a directory of releases instead of a server" },
  id: { type: "string", value: "ID", help: "a name for this device (a random one, kept)" },
  every: { type: "string", value: "DURATION", help: "keep asking: 30s, 10m, 1h" },
  jobs: { type: "string", value: "N", help: "downloads at once (4)" },
  timeout: { type: "string", value: "SECONDS", help: "when to give up a silent transfer (30)" },
  check: { type: "string", value: "CMD", help: "decides whether a new release is good" },
  "status --check": { type: "boolean", help: "hash all files and list those that differ" },
  "check-timeout": { type: "string", value: "SECONDS", help: "how long a check may take (60)" },
  restart: { type: "string", value: "CMD", help: "run whenever the files have changed" },
  "check-files": { type: "boolean", help: "hash all files, even those that look unchanged" },
  repair: { type: "boolean", help: "ask for the full list, fetch what differs" },
  retry: { type: "boolean", help: "try a release even if it failed before" },
  force: { type: "boolean", help: "overwrite files that the application has changed" },
  json: { type: "boolean", help: "print JSON" },
  cost: { type: "boolean", help: "show instead what each file costs on the air" },
  key: { type: "string", value: "FILE", help: "sign with this private key (see keygen)" },
  firmware: { type: "string", value: "V", help: "the firmware that belongs to it (the newest)" },
  model: { type: "string", value: "M", help: "the kind of board" },
  threshold: { type: "string", value: "N", help: "how many of the keys must have signed (1)" },
  expires: { type: "string", value: "DURATION", help: "when it is no longer accepted: 365d, 12h" },
  "sign --check": {
    type: "string",
    value: "PUB",
    multiple: true,
    help: "verify with this public key instead; may be repeated",
  },
  help: { type: "boolean", help: "show this help" },
  version: { type: "boolean", help: "show the version of ota.ts" },
} as const satisfies Record<string, OptionSpec>;

type OptionName = keyof typeof OPTIONS;
/** The options that were given. */
type Given = {
  [name in OptionName]?: (typeof OPTIONS)[name] extends { type: "boolean" }
    ? boolean
    : (typeof OPTIONS)[name] extends { multiple: true }
      ? string[]
      : string;
};

// ──── Reading options ────────────────────────────────────────────────────────────────────────────
// What stands on a command line, read by the table.

/**
 * Reads what stands after the name of a command: options, and words that are none.
 *
 * @throws {OTAError} when an option is unknown, lacks its value, or has one too many
 */
function parseOptions(
  name: string,
  allowed: readonly OptionName[],
  args: readonly string[],
): { given: Given; words: string[] } {
  const own = new Set(allowed.map((option) => flagOf(option)));
  const general = (["help", "version"] as const).filter((option) => !own.has(option));
  const names: readonly OptionName[] = [...allowed, ...general];
  const options = Object.fromEntries(names.map((option) => [flagOf(option), OPTIONS[option]]));
  const long = args.map((arg) => (arg === "-h" ? "--help" : arg));
  const { values, tokens } = parseArgs({ args: long, options, strict: false, tokens: true });
  const words: string[] = [];
  for (const token of tokens) {
    if (token.kind === "positional") words.push(token.value);
    if (token.kind !== "option") continue;
    const isKnown = Object.hasOwn(options, token.name);
    const spec = isKnown ? (options[token.name] as OptionSpec) : undefined;
    if (!spec) {
      const flags = names.map((option) => `--${flagOf(option)}`);
      const found = token.rawName;
      throw new OTAError(`${name} has no option ${found}${hint(found, flags)}`, 2);
    }
    if (spec.type === "string" && (token.value === undefined || token.value === "")) {
      throw new OTAError(`--${token.name} needs a value: --${token.name} ${spec.value}`, 2);
    }
    if (spec.type === "boolean" && token.value !== undefined) {
      throw new OTAError(`--${token.name} takes no value, found ${token.value}`, 2);
    }
  }
  const given = Object.fromEntries(
    names.map((option) => [option, values[flagOf(option)]]),
  ) as Given;
  return { given, words };
}

/** The index of the first argument that is no option, nor the value of one; -1 for none. */
function firstWord(allowed: readonly OptionName[], args: readonly string[]): number {
  const isValued = (arg: string) =>
    allowed.some((option) => `--${flagOf(option)}` === arg && OPTIONS[option].type === "string");
  return args.findIndex((arg, i) => !arg.startsWith("-") && !isValued(args[i - 1] ?? ""));
}

/** @throws {OTAError} when words are missing, or too many: `takes` names them, as the help does */
function checkWords(name: string, takes: string, words: readonly string[]): void {
  const wanted = takes === "" ? [] : takes.split(" ");
  const missing = wanted[words.length]?.replace("...", "");
  if (missing !== undefined) throw new OTAError(`${name} needs ${missing}: ${name} ${takes}`, 2);
  const extra = takes.endsWith("...") ? undefined : words[wanted.length];
  if (extra === undefined) return;
  const what = takes === "" ? "no argument" : `${takes} (quoted, if there are spaces), and no`;
  throw new OTAError(`${name} takes ${what} ${extra}; see ${name} --help`, 2);
}

/** The name of an option without command and dashes: `check` of `status --check`. */
function flagOf(option: OptionName): string {
  return option.split("--").at(-1)!;
}

/** `; did you mean X?` for the closest candidate, if one is close. */
function hint(found: string, candidates: readonly string[]): string {
  const near = candidates
    .map((candidate) => ({ candidate, distance: editDistance(found, candidate) }))
    .sort((a, b) => a.distance - b.distance)[0];
  return near && near.distance <= 2 ? `; did you mean ${near.candidate}?` : "";
}

/** The Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replaced, row[j]! + 1, next[j - 1]! + 1));
    }
    row = next;
  }
  return row[b.length]!;
}

function numberOption(
  given: Given,
  name: "port" | "jobs" | "timeout" | "check-timeout" | "threshold",
) {
  const text = given[name];
  if (text === undefined) return undefined;
  const limits = {
    port: [0, 65535],
    jobs: [1, 64],
    timeout: [1, 3600],
    "check-timeout": [1, 86400],
    threshold: [1, 64],
  };
  const [low, high] = limits[name] as [number, number];
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  if (value >= low && value <= high) return value;
  throw new OTAError(`--${name} expects a whole number from ${low} to ${high}, found ${text}`, 2);
}

/** The release that an option names; `undefined` when it is not given. */
function releaseOption(given: Given, name: "ver" | "latest" | "firmware"): string | undefined {
  const text = given[name];
  if (text === undefined || isReleaseName(text)) return text;
  throw new OTAError(`--${name} expects a release name (${RELEASE_NAME_RULE}), found ${text}`, 2);
}

/** A signal that aborts on SIGINT or SIGTERM. */
function interruption(reason: string): AbortSignal {
  const interrupted = new AbortController();
  const abort = () => interrupted.abort(new OTAError(reason));
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, abort);
  return interrupted.signal;
}

// ──── Output ──────────────────────────────────────────────────────────────────────────────────────
// Results go to stdout, everything else to stderr. Output that cannot be written never stops the
// work: for a result there is a message, and exit code 1 if the result was all that was asked for.
// (To Bun, a stream that is closed from the start is /dev/null.)

/** Writes a part of a result to stdout. */
async function put(text: string): Promise<"written" | "closed" | "failed"> {
  const error = await new Promise<Error | null | undefined>((done) => {
    process.stdout.write(text, done);
  });
  if (!error) return "written";
  // The reader closed the pipe on purpose, as `head` does.
  if (errorCode(error) === "EPIPE") return "closed";
  tell(`ota.ts: cannot write to stdout: ${error.message}`);
  return "failed";
}

/**
 * Prints a result.
 *
 * @returns the exit code of a command that only prints: 1 when that failed
 */
async function say(text: string): Promise<0 | 1> {
  return (await put(`${text}\n`)) === "failed" ? 1 : 0;
}

/** Prints a line on stderr. (`console.error` would colour it red on a terminal.) */
function tell(text: string): void {
  process.stderr.write(`${text}\n`);
}

function outcomeLine({ result, from, to, firmware }: Outcome): string {
  const isFirmware = firmware !== undefined && from === to;
  const what = isFirmware ? `firmware ${firmware.to}` : to;
  if (result === "rolled back") {
    return `rolled back ${what} -> ${isFirmware ? firmware.from : from}`;
  }
  if (result === "not tried") {
    return `not tried ${what}: it failed before (--retry tries it); on ${from}`;
  }
  if (result === "up to date") return `up to date ${to}`;
  const flashed = firmware ? ` (firmware ${firmware.from} -> ${firmware.to})` : "";
  return result === "repaired" ? `repaired ${to}${flashed}` : `updated ${from} -> ${to}${flashed}`;
}

function trafficLine({ received, content, reused }: Traffic): string {
  const ratio = content > 0 ? ` (${((100 * received) / content).toFixed(1)} %)` : "";
  const files = reused === 1 ? "1 file" : `${reused} files`;
  return `received ${received} bytes for ${content} bytes of content${ratio}, ${files} reused`;
}

function exitCode({ result }: Outcome): number {
  return result === "rolled back" || result === "not tried" ? 3 : 0;
}

/** Shows progress on stderr: a bar on a terminal, else a line for each file. */
function progressWatcher(): { report: (event: OTAEvent) => void; end: () => void } {
  const terminal = process.stderr.isTTY;
  const started = performance.now();
  let drawn = 0;
  const clear = () => {
    if (drawn > 0) process.stderr.write("\r\x1b[K");
    drawn = 0;
  };
  const report = (event: OTAEvent) => {
    if (event.kind === "note") {
      clear();
      tell(`ota.ts: ${event.text}`);
    } else if (event.kind === "fetched" && !terminal) {
      tell(`fetched ${event.path} (${formatBytes(event.size)})`);
    } else if (event.kind === "progress" && terminal && performance.now() - drawn > 100) {
      drawn = performance.now();
      process.stderr.write(`\r\x1b[K${progressBar(event.received, event.total, drawn - started)}`);
    }
  };
  return { report, end: clear };
}

function progressBar(received: number, total: number, milliseconds: number): string {
  const rate = received / (milliseconds / 1000);
  const speed = `${formatBytes(received)}, ${formatBytes(Math.round(rate))}/s`;
  if (!(total > 0)) return speed;
  const width = 24;
  const done = Math.min(width, Math.max(0, Math.round((width * received) / total)));
  const left = rate > 0 ? Math.ceil((total - received) / rate) : 0;
  return `[${"#".repeat(done).padEnd(width)}] ${speed}, ${left} s left`;
}

// ──── Costs ──────────────────────────────────────────────────────────────────────────────────────
// What a release costs on the air, in lines: `manifest --cost`.

/**
 * What a manifest and its content cost on the air, for each kind of device.
 *
 * @param ver the release that the device is on, with the firmware of that name, if there is any
 * @param base what URLs begin with
 */
async function costLines(
  releases: ReleaseRoot,
  ver: string | undefined,
  base: string,
): Promise<string[]> {
  const encoder = new Encoder();
  const costs: AirCost[][] = [];
  for (const device of AIR_DEVICES)
    costs.push(await airCosts(releases, ver, base, encoder, device));
  const row = (sizes: readonly (number | string)[], text: string) =>
    `${sizes.map((size) => `${size}`.padStart(10)).join("")} ${text}`;
  const lines = costs[0]!.map(({ name, plain }, index) => {
    const each = costs.map((items) => items[index]!);
    const how = [...new Set(each.map((item) => item.how))].join(" / ");
    return row(
      each.map(({ size }) => size),
      `${name}${plain === undefined ? "" : ` of ${plain}`}: ${how}`,
    );
  });
  const totals = costs.map((items) => items.reduce((sum, { size }) => sum + size, 0));
  const messages = totals.map((total) => Math.ceil(total / LORA_BYTES)).join(" and ");
  return [
    row(
      AIR_DEVICES.map(({ name }) => name),
      "",
    ).trimEnd(),
    ...lines,
    row(totals, `bytes in all: ${messages} LoRa messages of ${LORA_BYTES}`),
  ];
}

// ──── Server commands ─────────────────────────────────────────────────────────────────────────────
// The command `serve`.

/** Characters of log lines that are buffered; the buffer is also written every 100 ms. */
const LOG_BUFFER = 64 * 1024;

async function runServe(given: Given): Promise<number> {
  const out = Bun.stdout.writer();
  // Bun's writer would make a system call for each line.
  let lines = "";
  const flush = async () => {
    const text = lines;
    lines = "";
    try {
      await out.write(text);
      await out.flush();
    } catch {
      // A log that cannot be written, as on a full disk, must not end the server.
    }
  };
  const log = (line: string) => {
    lines += `${line}\n`;
    if (lines.length > LOG_BUFFER) void flush();
  };
  const { root, host, url, ignore, sign } = given;
  const latest = releaseOption(given, "latest");
  const [cert, key] = [given["tls-cert"], given["tls-key"]];
  if ((cert === undefined) !== (key === undefined)) {
    throw new OTAError("--tls-cert and --tls-key go together", 2);
  }
  const server = await serve({
    ...{ root, host, url, ignore, latest, sign, log },
    onlyReleases: given["only-releases"],
    warn: (line) => tell(`warning: ${line}`),
    port: numberOption(given, "port"),
    token: tokenOption(given),
    ...(cert && key && { tls: { cert, key } }),
    trustProxy: given["trust-proxy"],
    ...fleetOptions(given),
    changed: (releases) => {
      for (const root of releases.changed) log(changeLine(releases, root));
      void warn(releases);
    },
  });
  const flushing = setInterval(flush, 100);
  const stopped = new Promise((done) => {
    interruption("stopped").addEventListener("abort", done, { once: true });
  });
  for await (const line of describeServer(server, given)) log(line);
  const { admin } = server;
  if (admin && !admin.isKnown) void admin.known.then(() => log(adminLine(server, given)));
  await warn(server.releases);
  await flush();
  await stopped;
  // A second Ctrl-C exits at once.
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(0));
  await server.stop();
  clearInterval(flushing);
  await flush();
  return 0;
}

async function warn(releases: Releases): Promise<void> {
  for (const root of releases.roots) {
    const lines = [...rootWarnings(root), ...(await allBoardWarnings(root))];
    for (const line of lines) tell(`warning: ${ofModel(root)}${line}`);
  }
}

/** What stands before a line about a root: nothing, or the model that it is for. */
function ofModel({ model }: ReleaseRoot): string {
  return model === "" ? "" : `model ${printable(model)}: `;
}

/** What a root offers since it has changed, in one line. */
function changeLine(releases: Releases, root: ReleaseRoot): string {
  const names = root.versions.map(({ name }) => name).join(" ") || "no version";
  return `now      ${ofModel(root)}${releases.roots.includes(root) ? names : "gone"}`;
}

/** The token. Other users can read a process's command line, but not its environment. */
function tokenOption(given: Given): string | undefined {
  return given.token ?? (process.env.OTA_TOKEN || undefined);
}

/** Where `serve` keeps its fleet: by default in the root, in a file that is never served. */
function fleetOptions(
  given: Given,
): Pick<ServeOptions, "fleet" | "silent" | "adminToken" | "staged" | "notify"> {
  const { fleet, root = ".", "no-fleet": none, silent, "admin-token": adminToken } = given;
  const { staged, notify } = given;
  const ofFleet = { fleet, "admin-token": adminToken, staged, notify };
  for (const [name, value] of Object.entries(ofFleet)) {
    if (none && value !== undefined)
      throw new OTAError(`--${name} and --no-fleet exclude each other`, 2);
  }
  return {
    fleet: !none && (fleet ?? resolve(root, ".fleet.db")),
    adminToken: adminToken ?? (process.env.OTA_ADMIN_TOKEN || undefined),
    ...{ staged, notify },
    ...(silent !== undefined && { silent: parseDuration("silent", silent) }),
  };
}

/** The address of a server on this machine. */
function ownAddress(url: URL, { host }: Given): string {
  const isAny = host === undefined || host === "0.0.0.0" || host === "::";
  return isAny ? `${url.protocol}//127.0.0.1:${url.port}` : url.origin;
}

/** Where the fleet is to be seen; with the token, if nobody else knows it. */
function adminLine({ url, admin }: FleetServer, given: Given): string {
  const page = `fleet    ${ownAddress(url, given)}/-/`;
  if (admin?.made !== undefined) return `${page}?token=${admin.made}`;
  return admin?.isKnown
    ? `${page}?token=... (with the admin token)`
    : `${page} (its token follows when the store answers)`;
}

/** The lines that `serve` prints once it listens. */
async function* describeServer(server: FleetServer, given: Given): AsyncGenerator<string> {
  const { url, releases, fleet } = server;
  const own = ownAddress(url, given);
  const address = given.url ?? own;
  yield `ota.ts ${TOOL_VERSION} serves ${releases.root} at ${own}`;
  for (const root of releases.roots) {
    if (root.model !== "") yield `model    ${printable(root.model)}, at ${address}${root.urlPath}`;
    yield* describeRoot(root, fleet && basename(fleet.place));
  }
  const beside = (await releases.beside()).map(({ path, files }) => {
    if (!path.endsWith("/")) return printable(path);
    const count = files > MAX_COUNTED ? `more than ${MAX_COUNTED}` : files;
    return `${printable(path)} (${count} ${files === 1 ? "file" : "files"})`;
  });
  const others = beside.length > MAX_SHOWN ? `, and ${beside.length - MAX_SHOWN} more` : "";
  if (beside.length > 0) yield `also served: ${beside.slice(0, MAX_SHOWN).join(", ")}${others}`;
  for (const name of releases.unsettled) {
    yield `changing ${printable(name)}: counts once quiet for a second`;
  }
  if (server.admin) yield adminLine(server, given);
  const some = releases.roots.find(({ versions, firmware }) => versions[0] ?? firmware[0]);
  const { urlPath, versions, firmware } = some ?? releases;
  const oldest = versions[0]?.name ?? firmware[0]?.name ?? "1.0.0";
  yield `try      curl '${address}${urlPath}/manifest.json?current_ver=${oldest}'`;
}

/** The most lines about what is ignored in a root, and names of files beside releases. */
const MAX_SHOWN = 20;

/** What was found in a root, and what is ignored. */
function* describeRoot(
  { versions, firmware, ignored: all }: ReleaseRoot,
  ownFile: string | undefined,
): Generator<string> {
  for (const { name, files } of versions) {
    const bytes = [...files.values()].reduce((sum, { size }) => sum + size, 0);
    yield `version  ${name.padEnd(12)} ${files.size} files, ${formatBytes(bytes)}`;
  }
  for (const { name, path, size } of firmware) {
    yield `firmware ${name.padEnd(12)} ${path}, ${formatBytes(size)}`;
  }
  const ignored = all.filter(({ path }) => !ownFile || !path.startsWith(ownFile));
  for (const { path, reason } of ignored.slice(0, MAX_SHOWN)) {
    yield `ignored  ${printable(path)}: ${reason}`;
  }
  const more = ignored.length - MAX_SHOWN;
  if (more > 0) yield `ignored  and ${more} more`;
}

// ──── Release commands ────────────────────────────────────────────────────────────────────────────
// The commands `manifest`, `keygen` and `sign`.

async function runManifest(given: Given): Promise<number> {
  const { root = ".", ignore } = given;
  const latest = releaseOption(given, "latest");
  const base = baseURL(given.url ?? "http://127.0.0.1:8000");
  const releases = await Releases.open(root, { ignore, latest, quiet: 0 });
  const asked = releases.forDevice({ model: given.model });
  // --ver may be any text: boards may send any.
  const manifest = asked.manifestFor({ current_ver: given.ver }, base);
  const surprises = [...rootWarnings(asked), ...boardWarnings(asked, manifest)];
  for (const line of surprises) tell(`warning: ${ofModel(asked)}${line}`);
  if (given.cost) return say((await costLines(asked, given.ver, base)).join("\n"));
  return say(JSON.stringify(manifest, null, 2));
}

async function runKeygen(given: Given): Promise<number> {
  const { out } = given;
  if (out === undefined) throw new OTAError("keygen needs --out NAME", 2);
  const { key, pub } = makeKeys();
  const taken = [`${out}.key`, `${out}.pub`].find((file) => fs.existsSync(file));
  if (taken) {
    throw new OTAError(`${taken} already exists, and a key is never overwritten: move it away`);
  }
  fs.writeFileSync(`${out}.key`, key, { mode: 0o600, flag: "wx" });
  fs.writeFileSync(`${out}.pub`, pub, { flag: "wx" });
  const raw = rawPublicKey(createPublicKey(pub));
  await say(
    `wrote ${out}.key (keep it secret) and ${out}.pub (for client --verify; for boards: ${raw})`,
  );
  return 0;
}

async function runSign(given: Given): Promise<number> {
  const { root: path = ".", key, model, expires, ignore } = given;
  const ver = releaseOption(given, "ver");
  const firmware = releaseOption(given, "firmware");
  const checked = given["sign --check"];
  if (checked && [key, model, expires, firmware].some((value) => value !== undefined)) {
    throw new OTAError("sign --check goes with --root, --ver and --ignore alone", 2);
  }
  if (firmware !== undefined && ver === undefined) {
    throw new OTAError("--firmware belongs to one version: it needs --ver V", 2);
  }
  const keys = checked?.map((file) => readKey(file, "public"));
  if (!keys && key === undefined) throw new OTAError("sign needs --key FILE, or --check PUB", 2);
  const secret = keys ? undefined : readKey(key!, "private");
  const root = await SigningRoot.open(path, ignore);
  if (secret) refuseInside(fs.realpathSync(path), key!);
  if (root.models.length > 0) {
    const models = root.models.map((name) => printable(name)).join(", ");
    tell(`models are signed by themselves (--root ${path}/NAME --model NAME): ${models}`);
  }
  // A device at first contact asks what the release that it is on consists of: all are signed.
  const versions = ver === undefined ? root.versions : [ver];
  if (keys) return checkSigned(root, versions, keys, checked!);
  const lifetime = expires === undefined ? undefined : parseDuration("expires", expires);
  for (const version of versions) {
    const done = root.sign(version, secret!, { firmware, model, expires: lifetime });
    if (done.changed.length > 0) {
      const what = done.changed.join(", ");
      tell(`${version} is not what was signed before (${what}): signed anew, by this key alone`);
    }
    const count = `${done.signatures} ${done.signatures === 1 ? "signature" : "signatures"}`;
    await say(`signed ${version}: ${done.steps} steps, ${count}`);
  }
  return 0;
}

async function checkSigned(
  root: SigningRoot,
  versions: readonly string[],
  keys: readonly KeyObject[],
  files: readonly string[],
): Promise<number> {
  for (const [i, key] of keys.entries()) await say(`${files[i]}, for boards: ${rawPublicKey(key)}`);
  let code = 0;
  for (const version of versions) {
    const { steps, wrong } = await root.check(version, keys);
    for (const line of wrong) tell(`${version}: ${line}`);
    if (wrong.length > 0) code = 1;
    else {
      const by = keys.length === 1 ? "this key" : "these keys";
      await say(`${version} is signed by ${by}: ${steps} steps`);
    }
  }
  return code;
}

// ──── Device commands ─────────────────────────────────────────────────────────────────────────────
// The commands `client`, `rollback` and `status`.

async function runClient(given: Given): Promise<number> {
  const { server = "http://127.0.0.1:8000", every } = given;
  const ver = releaseOption(given, "ver");
  const pause = every === undefined ? undefined : parseDuration("every", every);
  const { check: command } = given;
  const checkTimeout = numberOption(given, "check-timeout") ?? 60;
  const signal = interruption("interrupted; the device is as it was");
  const watcher = progressWatcher();
  const { id, repair, retry, restart, from } = given;
  if (from !== undefined && given.server !== undefined) {
    throw new OTAError("--from and --server do not go together", 2);
  }
  const { verify = [] } = given;
  const threshold = numberOption(given, "threshold") ?? 1;
  if (threshold > Math.max(1, verify.length)) {
    throw new OTAError(
      `--threshold ${threshold} needs as many --verify, found ${verify.length}`,
      2,
    );
  }
  const options: HttpOptions = {
    ...{ root: given.root ?? "device", ver, id, repair, retry, restart, signal },
    ...{ token: tokenOption(given), ca: given.ca },
    verify: given.verify?.map((file) => readKey(file, "public")),
    ...{ threshold, model: given.model },
    checkFiles: given["check-files"],
    jobs: numberOption(given, "jobs"),
    timeout: numberOption(given, "timeout"),
    ...(command && { check: { command, timeout: checkTimeout } }),
    report: watcher.report,
  };
  const device =
    from === undefined ? new HttpOTA(server, options) : new DirectoryOTA(from, options);
  const once = async () => {
    const outcome = await device.update().finally(watcher.end);
    if (outcome.traffic) tell(trafficLine(outcome.traffic));
    // The exit code is the update's, even if its result cannot be printed.
    await say(outcomeLine(outcome));
    return exitCode(outcome);
  };
  if (pause === undefined) return once();
  await poll(once, { pause, signal, failed: (error) => tell(`ota.ts: ${errorText(error)}`) });
  return 0;
}

/**
 * The longest that failures make a device wait, in seconds, unless it was to wait longer anyway.
 */
const MAX_BACKOFF = 3600;

/** Options of `poll`. */
export interface Polling {
  /**
   * Seconds from one run to the next, spread by a tenth so that devices do not come all at once.
   */
  pause: number;
  /** Ends the loop. */
  signal: AbortSignal;
  /** Called with each failure. */
  failed: (error: unknown) => void;
  /** Waits some seconds, and rejects when the signal aborts. */
  sleep?: (seconds: number, signal: AbortSignal) => Promise<unknown>;
}

/**
 * Runs a task again and again until the signal aborts. After a failure it waits twice as long,
 * after the next four times; and not above an hour, except where the pause itself is longer.
 *
 * @throws what time does not mend: wrong usage, and bugs
 */
export async function poll(
  task: () => Promise<unknown>,
  { pause, signal, failed, sleep: wait = sleep }: Polling,
): Promise<void> {
  for (let failures = 0; ;) {
    try {
      await task();
      failures = 0;
    } catch (error) {
      if (signal.aborted) return;
      if (isBug(error) || (error instanceof OTAError && error.exitCode === 2)) throw error;
      failed(error);
      failures++;
    }
    const longer = Math.min(pause * 2 ** Math.min(failures, 2), Math.max(pause, MAX_BACKOFF));
    // A longer pause is spread downwards only, so that it stays below its limit.
    const spread = longer > pause ? 0.8 : 0.9;
    try {
      await wait(longer * (spread + 0.2 * Math.random()), signal);
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
  }
}

async function runRollback(given: Given): Promise<number> {
  const watcher = progressWatcher();
  const options = { restart: given.restart, report: watcher.report };
  await say(outcomeLine(await rollBack(given.root ?? "device", given.force, options)));
  return 0;
}

async function runStatus(given: Given): Promise<number> {
  const root = given.root ?? "device";
  const examine = given["status --check"];
  const found = await status(root, { report: progressWatcher().report, examine });
  const differing = found.differs && found.differs.length > 0;
  if (given.json) return (await say(JSON.stringify(found, null, 2))) || (differing ? 1 : 0);
  const differs = found.differs?.map((one) => `${one.path} (${one.found})`);
  const lines = Object.entries({ ...found, ...(differs && { differs }) }).map(([name, value]) => {
    const list = Array.isArray(value) ? value.join(", ") || "none" : value;
    const firmware =
      name === "firmware" && value ? `${found.firmware!.version} (${found.firmware!.file})` : list;
    return `${`${name}:`.padEnd(18)}${firmware ?? "none"}`;
  });
  return (await say(lines.join("\n"))) || (differing ? 1 : 0);
}

// ──── Fleet tables ────────────────────────────────────────────────────────────────────────────────
// Devices in lines: for people, as JSON, as CSV. Nothing of what is said of them may steer a terminal,
// or be run by a spreadsheet.

/** JSON for a terminal: the same value, with escapes for what a terminal might obey. */
function safeJSON(value: unknown, indent?: number): string {
  const escape = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value, null, indent).replace(UNSEEN, (character) => {
    return character === "\n" ? character : character.replaceAll(/[^]/g, escape);
  });
}

/** Text of at most so many columns. */
function fit(text: string, columns: number): string {
  if (Bun.stringWidth(text) <= columns) return text;
  let short = "";
  for (const character of text) {
    if (Bun.stringWidth(short + character) >= columns) break;
    short += character;
  }
  return `${short}…`;
}

/** Text with spaces up to so many columns. */
function pad(text: string, columns: number): string {
  return text + " ".repeat(Math.max(0, columns - Bun.stringWidth(text)));
}

/** Lines with columns that align. */
class Table {
  readonly #widths: number[] = [];

  /** Formats rows; columns are at least as wide as in the rows before. */
  lines(rows: readonly (readonly string[])[]): string[] {
    for (const row of rows) {
      for (const [i, cell] of row.entries()) {
        this.#widths[i] = Math.max(this.#widths[i] ?? 0, Bun.stringWidth(cell));
      }
    }
    return rows.map((row) => {
      return row
        .map((cell, i) => pad(cell, this.#widths[i]!))
        .join("  ")
        .trimEnd();
    });
  }
}

function labelsText({ labels }: FleetDevice, separator: string): string {
  return Object.entries(labels)
    .map(([key, value]) => shown(`${key}=${value}`))
    .join(separator);
}

/** The line of a device in a list. */
function deviceRow(device: FleetDevice, now: number): string[] {
  const { id, name, model, state, last_seen } = device;
  const notes = [matterText(device), labelsText(device, " ")].filter((text) => text !== "");
  const known = [shown(id), shown(name ?? "-"), shown(model ?? "-"), versionText(device)];
  return [...known, state, agoText(last_seen, now), notes.join(", ")];
}

const DEVICE_COLUMNS = ["ID", "NAME", "MODEL", "VERSION", "STATE", "SEEN", ""];

const CSV_COLUMNS = [
  ...(["id", "name", "model", "version", "firmware", "state", "offered", "failed"] as const),
  ...(["address", "first_seen", "last_seen", "labels"] as const),
];

/** A line of CSV, as RFC 4180 has it. */
function csvLine(cells: readonly string[]): string {
  const quoted = cells.map((cell) => {
    // A spreadsheet would run it; some split at semicolons, too.
    const harmless = shown(cell).replace(/(^|[;,])(\s*[=+\-@＝＋－＠])/g, "$1'$2");
    return /[",;]/.test(harmless) ? `"${harmless.replaceAll('"', '""')}"` : harmless;
  });
  return `${quoted.join()}\r\n`;
}

function csvCells(device: FleetDevice): string[] {
  return CSV_COLUMNS.map((column) => {
    if (column === "labels") return labelsText(device, "; ");
    const value = device[column];
    return typeof value === "number" ? isoText(value) : (value ?? "");
  });
}

/** Pages of devices in one of three forms, as parts of a text. */
async function* deviceTexts(
  pages: AsyncIterable<FleetDevice[]>,
  form: "table" | "json" | "csv",
): AsyncGenerator<string> {
  const table = new Table();
  const heads = { json: '{"devices":[', csv: csvLine(CSV_COLUMNS), table: "" };
  yield heads[form];
  let isFirst = true;
  for await (const devices of pages) {
    const now = Date.now();
    if (form === "csv") yield devices.map((device) => csvLine(csvCells(device))).join("");
    else if (form === "json") {
      const lines = devices.map((device) => safeJSON(device));
      yield `${isFirst ? "" : ","}\n${lines.join(",\n")}`;
    } else {
      const rows = devices.map((device) => deviceRow(device, now));
      const lines = table.lines([...(isFirst ? [DEVICE_COLUMNS] : []), ...rows]);
      yield `${lines.join("\n")}\n`;
    }
    isFirst = false;
  }
  if (form === "json") yield '\n],"next":null}\n';
}

// ──── Fleet summary ───────────────────────────────────────────────────────────────────────────────
// How a fleet stands, on one screen.

/** Columns of a screen. */
const SCREEN = 80;
/** Devices, versions and models that a summary shows at most: it fits 24 lines. */
const IN_SUMMARY = { devices: 3, versions: 4, models: 4 };

/** How a fleet stands: the most urgent first. */
async function* summaryLines(
  fleet: Fleet,
  summary: FleetSummary,
  where: string,
): AsyncGenerator<string> {
  const { devices, states, versions, models } = summary;
  const now = Date.now();
  const { served } = fleet;
  const written = served ? `, written ${agoText(served.written, now)}` : "";
  yield `${counted(devices, "device")}${written}, in ${shown(fleet.place)}`;
  yield `newest: ${served ? newestText(served.newest) : "not known, since no server has told yet"}`;
  if (devices === 0) return yield "no device has asked yet";
  yield leavingText(summary, served, now);
  yield "";
  const digits = String(devices).length;
  for (const state of DEVICE_STATES.toReversed()) {
    const count = states[state];
    yield `${state.padEnd(8)} ${String(count).padStart(digits)}  ${STATE_WORDS[state]}`;
    if (count === 0 || (state !== "failed" && state !== "silent")) continue;
    const some = await fleet.devices({ state, limit: IN_SUMMARY.devices });
    const cells = (device: FleetDevice) => {
      const { id, name, last_seen } = device;
      const texts = [fit(shown(id), 20), fit(shown(name ?? "-"), 16), fit(versionText(device), 12)];
      return ["", ...texts, fit(matterText(device), 16), agoText(last_seen, now)];
    };
    yield* new Table().lines(some.devices.map(cells));
    const more = count - some.devices.length;
    if (more <= 0) continue;
    const line = `  and ${more} more: ota.ts fleet list --state ${state}`;
    // A command that is cut off would be none.
    yield Bun.stringWidth(line + where) <= SCREEN ? line + where : line;
  }
  yield "";
  yield* versionLines(versions, digits);
  const names = Object.entries(models).sort(([, a], [, b]) => b - a);
  if (names.length < 2) return;
  const shownModels = names.slice(0, IN_SUMMARY.models).map(([name, count]) => {
    return `${fit(shown(name), 16)} ${count}`;
  });
  const rest = names.length - shownModels.length;
  yield `models: ${shownModels.join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}

/** A server that wrote nothing for so long, in milliseconds, does not run. */
const SERVER_GONE = 3 * FLEET.idle;

/** Whether the van may leave: what is still going on, and until when that is not known to be bad. */
function leavingText(
  { states: { offered }, silent_at }: FleetSummary,
  served: FleetServed | undefined,
  now: number,
): string {
  if (offered === 0) return "no board is installing: you may leave";
  const what = `${counted(offered, "board")} ${offered === 1 ? "is" : "are"} still installing`;
  if (silent_at === null) return what;
  const last = offered === 1 ? "" : "the last one ";
  const isRunning = served !== undefined && now - served.written < SERVER_GONE;
  if (!isRunning) return `${what} (silence counts only while a server runs)`;
  return `${what}, ${last}silent at ${timeText(silent_at, now)}`;
}

/** A time as the clock on the wall has it; with the date, unless that is today. */
function timeText(at: number, now: number): string {
  const wall = new Date(wholeMinute(at));
  const time = wall.toTimeString().slice(0, 5);
  if (wall.toDateString() === new Date(now).toDateString()) return time;
  const day = [wall.getFullYear(), wall.getMonth() + 1, wall.getDate()];
  return `${day.map((part) => String(part).padStart(2, "0")).join("-")} ${time}`;
}

function newestText({ models = {}, ...own }: NewestReleases): string {
  const text = ({ version, firmware }: NewestRelease) => {
    const image = firmware === null ? [] : [`firmware ${firmware}`];
    return [...(version === null ? [] : [version]), ...image].join(", ") || "none";
  };
  const others = Object.entries(models).map(([name, one]) => `; ${name}: ${text(one)}`);
  return shown(text(own) + others.join(""));
}

/** How many are on which version: the newest, and those that most are on; newest first. */
function* versionLines(versions: Record<string, number>, digits: number): Generator<string> {
  const { none, other = 0, ...named } = versions;
  const all = Object.entries(named).sort(([a], [b]) => (versionKey(a) < versionKey(b) ? 1 : -1));
  if (none !== undefined) all.push(["no version", none]);
  const [newest, ...older] = all;
  const frequent = older.toSorted(([, a], [, b]) => b - a).slice(0, IN_SUMMARY.versions - 2);
  const chosen = all.length <= IN_SUMMARY.versions ? all : [newest, ...frequent];
  const most = Math.max(...chosen.map((one) => one![1]));
  let rest = other + all.reduce((sum, [, count]) => sum + count, 0);
  for (const one of all.filter((each) => chosen.includes(each))) {
    const [name, count] = one;
    const bar = "#".repeat(Math.max(1, Math.round((30 * count) / most)));
    yield `${pad(fit(shown(name), 20), 20)} ${String(count).padStart(digits)}  ${bar}`;
    rest -= count;
  }
  if (rest > 0) yield `${pad("other versions", 20)} ${String(rest).padStart(digits)}`;
}

// ──── Fleet commands ──────────────────────────────────────────────────────────────────────────────
// `fleet` and its commands. They use the store itself, beside whatever server writes it, and know
// the newest releases from that.

/** The store that the options name. */
function fleetURL(given: Given): string {
  const { "fleet --fleet": url, "fleet --root": root } = given;
  if (url !== undefined && root !== undefined) {
    throw new OTAError("--fleet and --root exclude each other: DIR means DIR/.fleet.db", 2);
  }
  return url ?? resolve(root ?? ".", ".fleet.db");
}

/** Runs a command on a fleet that is there. */
async function withFleet(
  given: Given,
  command: (fleet: Fleet) => Promise<number>,
): Promise<number> {
  await using fleet = await Fleet.open({ url: fleetURL(given), existing: true });
  return await command(fleet);
}

/** The same options again, in a command that we tell of. */
function sameFleet({ "fleet --fleet": url, "fleet --root": root }: Given): string {
  if (url !== undefined) return ` --fleet ${storePlace(url).name}`;
  return root === undefined ? "" : ` --root ${root}`;
}

function runFleet(given: Given): Promise<number> {
  return withFleet(given, async (fleet) => {
    const summary = await fleet.summary();
    if (given.json) return say(safeJSON({ ...summary, ...fleet.served }, 2));
    const lines = await Array.fromAsync(summaryLines(fleet, summary, sameFleet(given)));
    return say(lines.map((line) => fit(line, SCREEN)).join("\n"));
  });
}

function runFleetList(given: Given): Promise<number> {
  const { state, "list --version": version, "list --model": model, label, json, csv } = given;
  if (json && csv) throw new OTAError("--json and --csv exclude each other", 2);
  const filter: DeviceFilter = {
    limit: MAX_PAGE,
    ...(state !== undefined && { state: stateOption(state) }),
    ...(version !== undefined && { version }),
    ...(model !== undefined && { model }),
    ...(label !== undefined && { label: labelOf(label) }),
  };
  return withFleet(given, async (fleet) => {
    const form = json ? "json" : csv ? "csv" : "table";
    let isEmpty = true;
    for await (const text of deviceTexts(devicePages(fleet, filter), form)) {
      if (text === "") continue;
      isEmpty = false;
      const done = await put(text);
      if (done !== "written") return done === "closed" ? 0 : 1;
    }
    if (isEmpty) tell("no such device");
    return 0;
  });
}

function stateOption(text: string): DeviceState {
  const state = DEVICE_STATES.find((one) => one === text);
  if (state) return state;
  const states = DEVICE_STATES.join(", ");
  throw new OTAError(
    `--state expects one of ${states}, found ${text}${hint(text, DEVICE_STATES)}`,
    2,
  );
}

/** Reads `K=V`; K begins nowhere else. */
function labelOf(text: string): [key: string, value: string] {
  const [, key, value] = /^([^=]+)=(.*)$/s.exec(text) ?? [];
  if (key !== undefined && value !== undefined) return [key, value];
  throw new OTAError(`a label is K=V, found ${text}`, 2);
}

/** All devices that match, a page at a time: there may be a million. */
async function* devicePages(fleet: Fleet, filter: DeviceFilter): AsyncGenerator<FleetDevice[]> {
  for (let after: string | null | undefined; after !== null;) {
    const page = await fleet.devices({ ...filter, ...(after !== undefined && { after }) });
    if (page.devices.length > 0) yield page.devices;
    after = page.next;
  }
}

/**
 * The device that a person means: by its id, else by its name, else by how its id begins.
 *
 * @param isWhole whether the beginning of an id is too little
 * @throws {OTAError} when there is none, or more than one
 */
async function meantDevice(fleet: Fleet, text: string, isWhole = false) {
  const id = text.toLowerCase();
  const exact = (await fleet.device(text)) ?? (await fleet.device(id));
  if (exact) return exact;
  const named: string[] = [];
  const begun: string[] = [];
  for await (const page of devicePages(fleet, { q: text, limit: MAX_PAGE })) {
    for (const device of page) {
      if (device.name?.toLowerCase() === id) named.push(device.id);
      if (!isWhole && text !== "" && device.id.startsWith(id)) begun.push(device.id);
    }
  }
  const found = named.length > 0 ? named : begun;
  const [only] = found;
  const device = found.length === 1 ? await fleet.device(only!) : undefined;
  if (device) return device;
  const what = shown(text) || '""';
  if (found.length < 2) throw new OTAError(`no device ${what} in ${fleet.place}; see fleet list`);
  const some = found.slice(0, 5).map((one) => shown(one));
  const more = found.length > some.length ? ` and ${found.length - some.length} more` : "";
  throw new OTAError(`${what} may be ${some.join(", ")}${more}: which one?`);
}

function runFleetShow(given: Given, [id = ""]: readonly string[]): Promise<number> {
  return withFleet(given, async (fleet) => {
    const device = await meantDevice(fleet, id);
    return say(given.json ? safeJSON(device, 2) : deviceLines(device).join("\n"));
  });
}

/** All that is known of a device. */
function deviceLines(device: DeviceDetails): string[] {
  const now = Date.now();
  const { name, model, version, firmware, state, offered, failed, address } = device;
  const time = (at: number) => `${isoText(at)} (${agoText(at, now)})`;
  const known = Object.entries({
    ...{ id: device.id, name, model, version, firmware },
    state: `${state}: ${STATE_WORDS[state]}`,
    ...{ offered, failed, address },
    "first seen": time(device.first_seen),
    "last seen": time(device.last_seen),
    labels: labelsText(device, " ") || null,
    ...(device.rollouts.length > 0 && {
      rollouts: device.rollouts.map(takenPartText).join("; "),
    }),
  });
  const events = device.history.map(({ at, kind, from, to }) => {
    const way = from === null || kind === "first seen" ? (to ?? "") : `${from} -> ${to ?? "none"}`;
    return [isoText(at), kind, shown(way)];
  });
  const facts = known.map(([key, value]) => [`${key}:`, shown(value ?? "-")]);
  return [...new Table().lines(facts), "", ...new Table().lines(events)];
}

function runFleetName(given: Given, [id = "", text = ""]: readonly string[]): Promise<number> {
  return withFleet(given, async (fleet) => {
    const device = await meantDevice(fleet, id);
    await fleet.edit(device.id, { name: text || null });
    return say(`${shown(device.id)} ${text ? `is called ${shown(text)}` : "has no name"}`);
  });
}

function runFleetLabel(given: Given, [id = "", ...texts]: readonly string[]): Promise<number> {
  const changes = texts.map((text) => labelOf(text));
  return withFleet(given, async (fleet) => {
    const device = await meantDevice(fleet, id);
    const labels = Object.fromEntries(changes.map(([key, value]) => [key, value || null]));
    await fleet.edit(device.id, { labels });
    const now = (await fleet.device(device.id)) ?? device;
    return say(`${shown(device.id)} has ${labelsText(now, " ") || "no label"}`);
  });
}

function runFleetForget(given: Given, [id = ""]: readonly string[]): Promise<number> {
  return withFleet(given, async (fleet) => {
    const device = await meantDevice(fleet, id, true);
    await fleet.forget(device.id);
    const name = device.name === null ? "" : ` (${shown(device.name)})`;
    const events = counted(device.history.length, "event");
    return say(`forgot ${shown(device.id)}${name} and ${events}; it is back when it asks again`);
  });
}

async function runFleetMerge(given: Given, [file = ""]: readonly string[]): Promise<number> {
  const url = fleetURL(given);
  // Before a store is made for it.
  await (await openOther(file)).close();
  await using fleet = await Fleet.open({ url });
  const { added, updated, newer, events, refused, isCopy } = await fleet.merge(file);
  if (isCopy) {
    tell(`${file} began as a copy of this fleet: events that both noted since count once`);
  }
  if (refused > 0) {
    tell(`${counted(refused, "row")} of ${file} left out: not as ota.ts writes them`);
  }
  const changes = updated > 0 ? `; ${updated} brought up to date` : "";
  const rest = newer > 0 ? `; ${newer} ${newer === 1 ? "was" : "were"} newer here` : "";
  return say(`${counted(added, "device")}, ${counted(events, "event")} added${changes}${rest}`);
}

// ──── Rollout options ────────────────────────────────────────────────────────────────────────────
// What is said of a rollout on the command line.

/** The store, and the root whose releases it is about, if that is known. */
function rolloutPlace({ "rollout --fleet": url, "rollout --root": dir }: Given): {
  url: string;
  root: string | undefined;
} {
  if (url === undefined) return { url: resolve(dir ?? ".", ".fleet.db"), root: dir ?? "." };
  const { file } = storePlace(url);
  // As `serve` keeps it by default.
  const isInRoot = file !== undefined && basename(file) === ".fleet.db";
  return { url, root: dir ?? (isInRoot ? dirname(resolve(file)) : undefined) };
}

/** The same options again, in a command that we tell of. */
function sameRollouts({ "rollout --fleet": url, "rollout --root": root }: Given): string {
  const place = url === undefined ? "" : ` --fleet ${storePlace(url).name}`;
  return root === undefined ? place : `${place} --root ${root}`;
}

/** What `rollout start` is told. @throws {OTAError} exit code 2 when an option is wrong */
function rolloutOptions(given: Given, version: string): RolloutOptions {
  if (!isReleaseName(version)) {
    throw new OTAError(`VERSION is a release name (${RELEASE_NAME_RULE}), found ${version}`, 2);
  }
  const { first, soak, "rollout --silent": silent, tolerance, only, window } = given;
  const { "rollout --model": model = null, "pause-at": pauses } = given;
  const texts = { first, soak, silent, tolerance, only, window, "pause-at": pauses };
  return typedRollout(version, model, texts);
}

/**
 * Asks whether to go on.
 *
 * @throws {OTAError} exit code 2 when there is nobody to ask, and `--yes` was not given
 */
function confirmed(given: Given, name: string, question: string): boolean {
  if (given.yes) return true;
  if (process.stdin.isTTY && process.stdout.isTTY) return confirm(`${question} Go on?`);
  throw new OTAError(`${question} rollout ${name} needs --yes where it cannot ask`, 2);
}

// ──── Rollout command ────────────────────────────────────────────────────────────────────────────
// `rollout` and its commands. They only write to the store: every server on it acts on that.

/** Steps whose costs are shown: each takes the time of its coding. */
const MAX_STEPS = 20;

/** Milliseconds within which servers act on what stands in the store. */
const SERVERS_KNOW = 2000;

/** Waits until servers act on what was written: what the operator does next may depend on it. */
async function untilServersKnow({ served }: Fleet): Promise<void> {
  if (served && Date.now() - served.written < SERVER_GONE) await Bun.sleep(SERVERS_KNOW);
}

/** Runs a command on a fleet that is there. */
async function withRollouts(
  given: Given,
  command: (fleet: Fleet) => Promise<number>,
): Promise<number> {
  await using fleet = await Fleet.open({ url: rolloutPlace(given).url, existing: true });
  return await command(fleet);
}

function runRollout(given: Given): Promise<number> {
  return withRollouts(given, async (fleet) => {
    const rollouts = await fleet.rollouts();
    if (given.json) return say(safeJSON({ rollouts }, 2));
    if (rollouts.length > 0) return say(rolloutLines(rollouts).join("\n"));
    tell("no rollout yet: a version goes to everyone, unless a server is --staged");
    return 0;
  });
}

/** A line for each rollout. */
function rolloutLines(rollouts: readonly Rollout[]): string[] {
  const rows = rollouts.map((rollout) => {
    const { state, reason, proven, offered, eligible } = rollout;
    const rest = Math.max(0, eligible - proven - offered - badOf(rollout));
    const why = reason === null ? "" : `${reason}; `;
    const counts = `${rolloutProof(rollout)}; ${offered} on the way; ${rest} to come`;
    return [rolloutName(rollout), state, why + counts + badText(rollout)].map(shown);
  });
  return new Table().lines(rows);
}

/** Which devices are bad: `; silent: meter-7, meter-9 and 2 more`. */
function badText(rollout: Rollout): string {
  const { bad } = rollout;
  const byStanding = Object.entries(Object.groupBy(bad, ({ standing }) => standing));
  const texts = byStanding.map(([standing, some]) => {
    return `; ${standing}: ${some.map(({ id }) => id).join(", ")}`;
  });
  const more = unnamedBad(rollout);
  return texts.join("") + (more > 0 ? ` and ${more} more` : "");
}

function runRolloutStart(given: Given, [version = ""]: readonly string[]): Promise<number> {
  const options = rolloutOptions(given, version);
  return withRollouts(given, async (fleet) => {
    const lines = await planLines(fleet, options, rolloutPlace(given).root);
    const printed = await say(lines.map(shown).join("\n"));
    if (given["dry-run"]) return printed;
    const begun = await fleet.startRollout(options);
    await untilServersKnow(fleet);
    const rollout = (await fleet.rollouts()).find(({ id }) => id === begun.id) ?? begun;
    const how = `ota.ts rollout${sameRollouts(given)} shows how it goes`;
    await say(shown(`${rolloutText(rollout)}; ${how}`));
    return 0;
  });
}

/** Who will be hit by a rollout, and what that costs on the air. */
async function planLines(
  fleet: Fleet,
  options: RolloutOptions,
  root: string | undefined,
): Promise<string[]> {
  const { first } = options;
  const targets = await fleet.rolloutTargets(options);
  const total = targets.reduce((sum, { devices }) => sum + devices, 0);
  const name = rolloutName(options);
  if (total === 0) return [`${name} goes to no device that is known`];
  const cost = await stepCosts(options, root);
  const rows = [];
  for (const target of targets.slice(0, MAX_STEPS)) {
    const { model, version, firmware, devices } = target;
    const costs = (await cost?.(model, version ?? firmware)) ?? [];
    rows.push([model ?? "-", versionText(target), `${devices}`, ...costs.map(formatBytes)]);
  }
  const rest = targets.slice(MAX_STEPS).reduce((sum, { devices }) => sum + devices, 0);
  const heads = AIR_DEVICES.map((device) => device.name.toUpperCase());
  const unknown =
    root === undefined
      ? "what it costs on the air is not known: --root DIR names the releases"
      : `${name} is not in ${root} yet: what it costs on the air is not known`;
  return [
    `${name} goes to ${counted(total, "device")}: ${first} at first, then never more unproven than proven`,
    ...new Table().lines([["MODEL", "ON", "DEVICES", ...(cost ? heads : [])], ...rows]),
    ...(rest > 0 ? [`and ${rest} more`] : []),
    ...(cost ? [] : [unknown]),
  ];
}

/**
 * What a step to a version costs on the air, for each kind of device; `undefined` when that version
 * is not there.
 */
async function stepCosts({ version, model: own }: RolloutOptions, root: string | undefined) {
  if (root === undefined) return undefined;
  const releases = await Releases.open(root, { latest: version, quiet: 0 });
  const key = versionKey(version);
  const has = ({ versions, firmware }: ReleaseRoot) =>
    [...versions, ...firmware].some(({ name }) => versionKey(name) === key);
  if (!has(releases.forDevice({ model: own ?? undefined }))) return undefined;
  const encoder = new Encoder();
  return async (model: string | null, from: string | null): Promise<number[]> => {
    const asked = releases.forDevice({ model: model ?? undefined });
    const sums: number[] = [];
    for (const device of AIR_DEVICES) {
      const base = "http://127.0.0.1:8000";
      const costs = await airCosts(asked, from ?? undefined, base, encoder, device);
      sums.push(costs.reduce((sum, { size }) => sum + size, 0));
    }
    return sums;
  };
}

/** What will be, before it is. */
const ROLLOUT_QUESTIONS: Partial<Record<RolloutAction, (rollout: Rollout) => string>> = {
  advance: (rollout) => `${shown(rolloutName(rollout))} then goes to everyone at once.`,
  abort: (rollout) => `${shown(rolloutName(rollout))} then goes to nobody any more, for good.`,
};

/** The command that does something to a rollout. */
function rolloutChange(action: RolloutAction): Command["run"] {
  return (given, [version = ""]) =>
    withRollouts(given, async (fleet) => {
      const meant = meantRollout(await fleet.rollouts(), version, given["rollout --model"] ?? null);
      const name = rolloutName({ version, model: given["rollout --model"] ?? null });
      const where = `ota.ts rollout${sameRollouts(given)} lists those that there are`;
      const missing = () => new OTAError(`no rollout of ${name} in ${fleet.place}; ${where}`);
      if (!meant) throw missing();
      const question = ROLLOUT_QUESTIONS[action]?.(meant);
      if (question !== undefined && !confirmed(given, action, question)) {
        tell("nothing was changed");
        return 1;
      }
      const rollout = await fleet.changeRollout(meant.version, meant.model, action);
      if (!rollout) throw missing();
      await untilServersKnow(fleet);
      return say(shown(rolloutText(rollout)));
    });
}

// ──── Commands ───────────────────────────────────────────────────────────────────────────────────
// The table of commands.

interface Command {
  summary: string;
  /** What it takes besides options: `ID TEXT`, `ID K=V...`; absent: nothing. */
  takes?: string;
  options: readonly OptionName[];
  /** Further help: defaults, limits, exit codes. */
  notes: string;
  /** Commands of its own, named after it. */
  commands?: Record<string, Command>;
  run: (given: Given, words: readonly string[]) => number | Promise<number>;
}

const EXIT_CODES = `Exit codes: 0 updated, or nothing newer; 1 failed, and the device is as it was;
2 usage; 3 the release failed its check (now, or before and was not tried again).`;

/** Options of every command of a fleet. */
const FLEET_PLACE = ["fleet --root", "fleet --fleet"] as const;
const FLEET_NOTES =
  "The root is the current directory by default. Exit codes: 0; 1 failed; 2 usage.";
const MEANT = "ID may also be the name of a device";

const FLEET_COMMANDS: Record<string, Command> = {
  list: {
    summary: "a line for each device",
    options: [
      ...FLEET_PLACE,
      ...(["state", "list --version", "list --model", "label", "json", "csv"] as const),
    ],
    notes: `States: ${DEVICE_STATES.join(", ")}.\n${FLEET_NOTES}`,
    run: runFleetList,
  },
  show: {
    summary: "one device, and what happened to it",
    takes: "ID",
    options: [...FLEET_PLACE, "json"],
    notes: `${MEANT}, or the beginning of one id alone.\n${FLEET_NOTES}`,
    run: runFleetShow,
  },
  name: {
    summary: "call it TEXT; an empty TEXT takes its name away",
    takes: "ID TEXT",
    options: FLEET_PLACE,
    notes: `${MEANT}, or the beginning of one id alone.\n${FLEET_NOTES}`,
    run: runFleetName,
  },
  label: {
    summary: "note K=V on it; K= removes",
    takes: "ID K=V...",
    options: FLEET_PLACE,
    notes: `${MEANT}, or the beginning of one id alone.\n${FLEET_NOTES}`,
    run: runFleetLabel,
  },
  forget: {
    summary: "forget it and its history, until it asks again",
    takes: "ID",
    options: FLEET_PLACE,
    notes: `${MEANT}.\n${FLEET_NOTES}`,
    run: runFleetForget,
  },
  merge: {
    summary: "add what the SQLite file of another server knows",
    takes: "FILE",
    options: FLEET_PLACE,
    notes: `FILE stays as it is. Twice is as good as once.\n${FLEET_NOTES}`,
    run: runFleetMerge,
  },
};

/** Options of every command of rollouts. */
const ROLLOUT_PLACE = ["rollout --root", "rollout --fleet"] as const;
const ROLLOUT_NOTES =
  "The root is the current directory by default; its fleet is ROOT/.fleet.db, unless --fleet says\n" +
  "otherwise. Exit codes: 0; 1 failed; 2 usage.";

/** A command that does something to a rollout. */
function changeCommand(action: RolloutAction, summary: string): Command {
  const asks = action in ROLLOUT_QUESTIONS;
  return {
    summary,
    takes: "VERSION",
    options: [...ROLLOUT_PLACE, "rollout --model", ...(asks ? (["yes"] as const) : [])],
    notes: `${asks ? "It asks before, unless --yes.\n" : ""}${ROLLOUT_NOTES}`,
    run: rolloutChange(action),
  };
}

const ROLLOUT_COMMANDS: Record<string, Command> = {
  start: {
    summary: "let VERSION out, device by device",
    takes: "VERSION",
    options: [
      ...ROLLOUT_PLACE,
      ...(["rollout --model", "first", "soak", "rollout --silent", "tolerance"] as const),
      ...(["pause-at", "only", "window", "dry-run"] as const),
    ],
    notes: `VERSION need not be in the root yet.\n${ROLLOUT_NOTES}`,
    run: runRolloutStart,
  },
  pause: changeCommand("pause", "offer it to nobody new, until resume"),
  resume: changeCommand("resume", "go on; what was bad so far is accepted"),
  advance: changeCommand("advance", "let everyone have it at once"),
  abort: changeCommand("abort", "stop it for good; a later version passes it by"),
};

const COMMANDS: Record<string, Command> = {
  serve: {
    summary: "serve a directory of releases to devices",
    options: [
      ...(["root", "port", "host", "url", "ignore", "latest", "only-releases"] as const),
      ...(["sign", "token", "tls-cert", "tls-key", "trust-proxy"] as const),
      ...(["fleet", "no-fleet", "silent", "admin-token", "staged", "notify"] as const),
    ],
    notes:
      "The root is the current directory by default. On Ctrl-C, running responses are finished.\n" +
      `Limits: ${LIMITS.target} characters of path and query, ${LIMITS.query} of them in the query, ` +
      `${LIMITS.version} in\ncurrent_ver; no request bodies (but 64 KiB for the fleet's interface); ${LIMITS.idle} s without a byte.`,
    run: runServe,
  },
  fleet: {
    summary: "show who is on what, and what happened to whom",
    options: [...FLEET_PLACE, "json"],
    notes: FLEET_NOTES,
    commands: FLEET_COMMANDS,
    run: runFleet,
  },
  rollout: {
    summary: "let a version out slowly, and show how that goes",
    options: [...ROLLOUT_PLACE, "json"],
    notes: ROLLOUT_NOTES,
    commands: ROLLOUT_COMMANDS,
    run: runRollout,
  },
  client: {
    summary: "be a device: fetch, verify, apply, and roll back a bad release",
    options: [
      ...(["ver", "root", "server", "from", "id", "every", "jobs", "timeout"] as const),
      ...(["check", "check-timeout", "restart", "check-files", "repair", "retry"] as const),
      ...(["verify", "threshold", "model", "token", "ca"] as const),
    ],
    notes: `The root is ./device by default. The last line on stdout says how it ended.\n${EXIT_CODES}`,
    run: runClient,
  },
  rollback: {
    summary: "take a device back to its previous release",
    options: ["root", "restart", "force"],
    notes: "The root is ./device by default. The release it leaves is not installed again.",
    run: runRollback,
  },
  status: {
    summary: "show what a device is on; finish an update that was cut off",
    options: ["root", "json", "status --check"],
    notes:
      "The root is ./device by default. Run it at boot, before the application.\n" +
      "Exit codes: 0; 1 failed, or --check found that something differs; 2 usage.",
    run: runStatus,
  },
  manifest: {
    summary: "show what the server would answer, with warnings",
    options: ["ver", "model", "root", "url", "ignore", "latest", "cost"],
    notes: "The root is the current directory by default. Warnings go to stderr.",
    run: runManifest,
  },
  sign: {
    summary: "sign a release at home: the steps to it, for any server to carry",
    options: ["key", "root", "ver", "firmware", "model", "expires", "ignore", "sign --check"],
    notes:
      "The root is the current directory by default. Writes signed_V.json there; a second key adds\n" +
      "its signatures. Exit codes: 0; 1 failed, or --check found something missing; 2 usage.",
    run: runSign,
  },
  keygen: {
    summary: "make a key pair for signing",
    options: ["out"],
    notes:
      "NAME.key stays at home (sign), or with a server away from its root (serve --sign).\n" +
      "NAME.pub goes to the devices.",
    run: runKeygen,
  },
};

// ──── Help and main ──────────────────────────────────────────────────────────────────────────────
// Finding a command, its help, and `main`.

/** The help of the tool. */
function help(): string {
  const names = Object.entries(COMMANDS).map(([n, { summary }]) => `  ${n.padEnd(10)} ${summary}`);
  return (
    `ota.ts ${TOOL_VERSION}: over-the-air updates, both ends\n\n` +
    `Usage: bun ota.ts COMMAND [options]\n\n${names.join("\n")}\n\n` +
    "bun ota.ts COMMAND --help shows the options of a command."
  );
}

/** The help of a command, with all options of its own commands. */
function helpOf({ name, command }: Pick<CommandLine, "name" | "command">): string {
  const { takes = "", summary, notes, options, commands = {} } = command;
  const lines = [...options, ...optionsBelow(command), "help" as const].map((option) => {
    const spec: OptionSpec = OPTIONS[option];
    const users = Object.entries(commands).filter(([, one]) => one.options.includes(option));
    const only = options.includes(option) ? "" : `${users.map(([user]) => user).join(", ")}: `;
    const text = option === "help" ? spec.help : `${only}${spec.help}`;
    return `  ${`--${flagOf(option)} ${spec.value ?? ""}`.padEnd(26)} ${text}`;
  });
  const own = Object.entries(commands).map(([sub, one]) => {
    return `  ${`${name} ${sub} ${one.takes ?? ""}`.padEnd(26)} ${one.summary}\n`;
  });
  const usage = `bun ota.ts ${name}${takes && ` ${takes}`}: ${summary}\n\n`;
  const list = own.length > 0 ? `${own.join("")}\n` : "";
  return `${usage}${list}${lines.join("\n")}\n\n${notes}`;
}

/** The options that only commands of a command have. */
function optionsBelow({ options, commands = {} }: Command): OptionName[] {
  const all = new Set(Object.values(commands).flatMap((one) => one.options));
  return [...all].filter((option) => !options.includes(option));
}

/** A command line, its command found. */
interface CommandLine {
  /** `fleet list`. */
  name: string;
  command: Command;
  /** What stands around the name. */
  args: string[];
}

/** @throws {OTAError} when there is no such command */
function commandLine([name = "", ...args]: readonly string[]): CommandLine {
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (!command) {
    throw new OTAError(`no command ${name}${hint(name, Object.keys(COMMANDS))}; see --help`, 2);
  }
  const { commands } = command;
  const at = commands ? firstWord([...command.options, ...optionsBelow(command)], args) : -1;
  if (!commands) return { name, command, args };
  if (at < 0) {
    const stray = optionsBelow(command).find((option) => args.includes(`--${flagOf(option)}`));
    if (stray === undefined || flagOf(stray) === "version") return { name, command, args };
    const [owner] = Object.entries(commands).find(([, one]) => one.options.includes(stray))!;
    throw new OTAError(`${name} has no option --${flagOf(stray)}, but ${name} ${owner} has`, 2);
  }
  const [word = ""] = args.splice(at, 1);
  const sub = Object.hasOwn(commands, word) ? commands[word] : undefined;
  if (sub) return { name: `${name} ${word}`, command: sub, args };
  const near = hint(word, Object.keys(commands));
  throw new OTAError(`${name} has no command ${word}${near}; see ${name} --help`, 2);
}

/**
 * Runs the command line.
 *
 * @param args without the names of Bun and of this file
 * @returns the exit code
 */
export async function main(args: readonly string[]): Promise<number> {
  try {
    const [first, ...rest] = args;
    if (first === undefined) {
      tell(help());
      return 2;
    }
    if (first === "--version") return await say(`ota.ts ${TOOL_VERSION}`);
    if (first === "--help" || first === "-h" || first === "help") {
      const isCommand = Object.hasOwn(COMMANDS, rest[0] ?? "");
      return await say(isCommand ? helpOf(commandLine(rest)) : help());
    }
    const { name, command, args: own } = commandLine(args);
    const { given, words } = parseOptions(name, command.options, own);
    if (given.help) return await say(helpOf({ name, command }));
    if (given.version && words.length === 0) return await say(`ota.ts ${TOOL_VERSION}`);
    checkWords(name, command.takes ?? "", words);
    return await command.run(given, words);
  } catch (error) {
    if (isBug(error)) throw error;
    tell(`ota.ts: ${errorText(error)}`);
    return error instanceof OTAError ? error.exitCode : 1;
  }
}

if (!threads.isMainThread && threads.workerData === PATCH_WORKER) {
  servePatches(threads.parentPort!);
} else if (!threads.isMainThread && threads.workerData?.kind === FLEET_WORKER) {
  serveStore(threads.parentPort!, threads.workerData);
} else if (import.meta.main) {
  // Write errors are handled where they matter; an unhandled one would end the process.
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
  process.exitCode = await main(process.argv.slice(2));
}
