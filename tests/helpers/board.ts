/**
 * A double of a deployed board: what the MicroPython library of Pycom's OTA tutorial does with a
 * connection and with a manifest, its weaknesses included. A server that this double can update
 * from can update the boards; a nicer reader would prove nothing.
 *
 * Left out: the copies that the board keeps of replaced and deleted files (`.bak`, `.bak_del`),
 * its five attempts at each file, and `flash/OTA_VERSION.py`, which it writes at the end. Stricter
 * than the board in one thing: MicroPython lets overlong UTF-8, surrogates and code points beyond
 * U+10FFFF pass, this does not.
 */

import { addressOf, rawRequest } from "./raw.ts";

/** How much the board asks its socket for at a time. */
const PIECE = 100;

const BLANK_LINE = "\r\n\r\n";

/** What a board makes of a response. */
export interface BoardResponse {
  /** The text before the first blank line; empty when the board never saw the header's end. */
  header: string;
  /** What it takes for the content. Empty when it never saw the header's end, or raised. */
  body: Uint8Array;
  /** The error that the board raised, when it did. */
  raised?: string;
}

/** What `boardGet` can be told. */
export interface BoardOptions {
  /**
   * The sizes in which the network delivers the first bytes, each 1 to 100; what follows comes in
   * pieces of 100. Without it all pieces are of 100 bytes, but for the last.
   */
  pieces?: number[];
  /** How long the server may take to answer and close, in milliseconds (60,000). */
  timeoutMs?: number;
}

/**
 * GET a path as the board does: HTTP/1.0, a Host header and nothing else, read until the server
 * closes.
 *
 * @param path Sent as it is; a missing slash in front is added.
 * @throws {Error} When the server cannot be reached, resets the connection, or does not close it in
 * time: a board would fail or wait for ever.
 */
export async function boardGet(
  server: URL | string,
  path: string,
  { pieces = [], timeoutMs = 60_000 }: BoardOptions = {},
): Promise<BoardResponse> {
  const { host, port } = addressOf(server);
  const target = path.startsWith("/") ? path : `/${path}`;
  const request = `GET ${target} HTTP/1.0\r\nHost: ${host}:${port}\r\n\r\n`;
  const { bytes, closed, error } = await rawRequest(server, request, { timeoutMs });
  if (!closed) throw new Error(`GET ${target}: the server did not close within ${timeoutMs} ms`);
  if (error !== undefined) throw new Error(`GET ${target}: ${error}`);
  return readAsBoard(bytes, pieces);
}

/**
 * What a board makes of the bytes of a connection: it looks for the blank line in each piece alone;
 * the piece that has it is decoded and split at blank lines, of which the second part is kept; the
 * pieces after that are content.
 *
 * @param sizes As `BoardOptions.pieces`.
 * @throws {RangeError} When a size is not one that the board's `recv(100)` can return.
 */
export function readAsBoard(stream: Uint8Array, sizes: number[] = []): BoardResponse {
  const content: Uint8Array[] = [];
  let header: string | undefined;
  let nth = 0;
  for (let start = 0; start < stream.length;) {
    const size = sizes[nth++] ?? PIECE;
    if (!Number.isInteger(size) || size < 1 || size > PIECE)
      throw new RangeError(`a piece has 1 to ${PIECE} bytes, not ${size}`);
    const piece = stream.subarray(start, start + size);
    if (header !== undefined) {
      content.push(piece);
    } else {
      const end = Buffer.from(piece).indexOf(BLANK_LINE);
      if (end !== -1) {
        header = Buffer.from(stream.subarray(0, start + end)).toString("latin1");
        try {
          const text = new TextDecoder("utf-8", { fatal: true }).decode(piece);
          content.push(new TextEncoder().encode(text.split(BLANK_LINE)[1]));
        } catch {
          return { header, body: new Uint8Array(), raised: "UnicodeError" };
        }
      }
    }
    start += size;
  }
  return { header: header ?? "", body: new Uint8Array(Buffer.concat(content)) };
}

/** What a board is after an update. */
export interface BoardState {
  /** The version that it has recorded. */
  version: string;
  /** The firmware that it has flashed, checked or not. */
  firmware?: Uint8Array;
  /** Its files, as path without a slash in front → content. */
  files: Map<string, Uint8Array>;
}

/**
 * Update as the board does, from one manifest: fetch all files and compare their SHA-1; put them in
 * place and delete; fetch firmware, with nothing compared; record the version.
 *
 * Directories are those that the given files are in, and `flash`, where a board's file system is
 * mounted; none is ever made.
 *
 * @param currentVer The version that the board has recorded, sent as it is.
 * @param files Its files, as path without a slash in front → content; not changed.
 * @param more What it says of itself after that: `&sysname=LoPy4`.
 * @returns The board after the update, or as it was when the manifest is `null`.
 * @throws {Error} Where the board raises, and where the manifest is not what a board can use.
 */
export async function boardUpdate(
  server: URL | string,
  currentVer: string,
  files: ReadonlyMap<string, Uint8Array>,
  more = "",
): Promise<BoardState> {
  const get = async (path: string): Promise<Uint8Array> => {
    const { body, raised } = await boardGet(server, path);
    if (raised !== undefined) throw new Error(`GET ${path}: the board raises ${raised}`);
    return body;
  };

  const after = new Map(files);
  const text = await get(`/manifest.json?current_ver=${currentVer}${more}`);
  const manifest = readManifest(
    new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(text),
  );
  if (manifest === null) return { version: currentVer, files: after };

  const directories = new Set([...files.keys()].flatMap(directoriesOf)).add("").add("flash");
  const staged = new Map<string, Uint8Array>();
  for (const entry of [...manifest.new, ...manifest.update]) {
    const path = withoutSlash(entry.dst_path);
    const directory = path.slice(0, Math.max(path.lastIndexOf("/"), 0));
    if (!directories.has(directory))
      throw new Error(`ENOENT: no directory for ${entry.dst_path}; a board makes none`);
    const content = await get(pathOf(entry.URL));
    const hash = new Bun.CryptoHasher("sha1").update(content).digest("hex");
    if (hash !== entry.hash)
      throw new Error(`${entry.URL}: expected SHA-1 ${entry.hash}, found ${hash}`);
    staged.set(path, content);
  }

  const remove = (path: string): void => {
    if (!after.delete(path)) throw new Error(`ENOENT: no file ${path} to move away`);
  };
  for (const entry of manifest.update) remove(withoutSlash(entry.dst_path));
  for (const [path, content] of staged) after.set(path, content);
  for (const path of manifest.delete) remove(path);

  const state: BoardState = { version: manifest.version, files: after };
  if (manifest.firmware) state.firmware = await get(pathOf(manifest.firmware.URL));
  return state;
}

interface BoardFile {
  URL: string;
  dst_path: string;
  hash: string;
}

interface BoardManifest {
  delete: string[];
  firmware?: { URL: string };
  new: BoardFile[];
  update: BoardFile[];
  version: string;
}

/** The fields that the board reads, or `null` for no update; a missing one raises there too. */
function readManifest(json: string): BoardManifest | null {
  const data: unknown = JSON.parse(json);
  if (data === null) return null;
  const file = (entry: unknown): BoardFile => ({
    URL: textAt(entry, "URL"),
    dst_path: textAt(entry, "dst_path"),
    hash: textAt(entry, "hash"),
  });
  const manifest: BoardManifest = {
    delete: listAt(data, "delete").map((path) => {
      // The board puts a slash in front of it.
      if (typeof path !== "string" || path.startsWith("/"))
        throw new Error(`expected a path without a slash in front, found ${JSON.stringify(path)}`);
      return path;
    }),
    new: listAt(data, "new").map(file),
    update: listAt(data, "update").map(file),
    version: textAt(data, "version"),
  };
  const firmware = at(data, "firmware");
  if (firmware !== undefined) manifest.firmware = { URL: textAt(firmware, "URL") };
  return manifest;
}

function at(data: unknown, key: string): unknown {
  if (typeof data !== "object" || data === null)
    throw new TypeError(`expected an object with ${key}, found ${JSON.stringify(data)}`);
  return (data as Record<string, unknown>)[key];
}

function textAt(data: unknown, key: string): string {
  const value = at(data, key);
  if (typeof value !== "string")
    throw new TypeError(`expected a text at ${key}, found ${JSON.stringify(value)}`);
  return value;
}

function listAt(data: unknown, key: string): unknown[] {
  const value = at(data, key);
  if (!Array.isArray(value))
    throw new TypeError(`expected a list at ${key}, found ${JSON.stringify(value)}`);
  return value;
}

/** `/flash/main.py` as the key of a file. A path without the slash is relative on a board. */
function withoutSlash(path: string): string {
  if (!/^\/[^/]/.test(path)) throw new Error(`expected a path from the root, found ${path}`);
  return path.slice(1);
}

/** What the board keeps of a URL: all that follows the third slash. */
function pathOf(url: string): string {
  return `/${url.split("/").slice(3).join("/")}`;
}

/** `a/b/c.py` is in `a` and `a/b`. */
function directoriesOf(path: string): string[] {
  const parts = path.split("/").slice(0, -1);
  return parts.map((_, i) => parts.slice(0, i + 1).join("/"));
}
