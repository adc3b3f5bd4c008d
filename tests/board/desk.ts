// A server that signs, without a network: it answers a board's requests in this thread, with what
// `Releases` says and an envelope made by hand around it.
import {
  createHash,
  createPublicKey,
  generateKeyPairSync,
  sign,
  type KeyObject,
} from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Releases } from "../../ota.ts";
import { Board, type Kind } from "./board.ts";
import { releaseOn } from "./fleet.ts";
import { Link } from "./link.ts";

/** What a manifest is in the hands of a test, which may make anything of it. */
// oxlint-disable-next-line typescript/no-explicit-any
export type Loose = Record<string, any>;

export const STEP = "application/vnd.ota-step+json";
export const ISSUED = "2026-11-24T08:00:00Z";

/** A key for signing, and its public half as config.VERIFY has it. */
export class Signer {
  readonly key: KeyObject = generateKeyPairSync("ed25519").privateKey;
  readonly hex: string;

  constructor() {
    const pem = this.key.export({ type: "pkcs8", format: "pem" });
    const { x } = createPublicKey(pem).export({ format: "jwk" });
    this.hex = Buffer.from(x!, "base64url").toString("hex");
  }

  sign(type: string, payload: Uint8Array): Loose {
    const sig = sign(null, preAuth(type, payload), this.key).toString("base64");
    return { keyid: this.hex.slice(0, 16), sig };
  }
}

/** What DSSE signs. */
export function preAuth(type: string, payload: Uint8Array): Uint8Array {
  const head = `DSSEv1 ${Buffer.byteLength(type)} ${type} ${payload.length} `;
  return Buffer.concat([Buffer.from(head), payload]);
}

/** The digest of the lists of a manifest. */
export function stepsOf(manifest: Loose): string {
  const hash = createHash("sha256");
  for (const path of manifest.delete) hash.update(`D ${path}\n`);
  if (manifest.full) hash.update("F\n");
  for (const [list, letter] of [
    ["new", "N"],
    ["update", "U"],
  ] as const)
    // prettier-ignore
    for (const { dst_path, sha256 } of manifest[list])
      hash.update(`${letter} ${dst_path.replace(/^\//, "")}\0${sha256}\n`);
  return hash.digest("hex");
}

/** The step that a manifest is, for a device on `from`. */
export function stepOf(manifest: Loose, from: string, more: Loose = {}): Loose {
  const { sha256, size, version } = manifest.firmware ?? {};
  return {
    expires: null,
    firmware: manifest.firmware ? { sha256, size, version } : null,
    from: manifest.full ? "*" : from,
    issued: ISSUED,
    model: null,
    steps: stepsOf(manifest),
    to: manifest.version,
    ...more,
  };
}

/** The envelope around a step. */
export function seal(step: unknown, signers: readonly Signer[], type = STEP): Loose {
  const payload = Buffer.from(JSON.stringify(step));
  return {
    payload: payload.toString("base64"),
    payloadType: type,
    signatures: signers.map((signer) => signer.sign(type, payload)),
  };
}

export class Desk extends Link {
  /** What the server does with a manifest, before it goes out. */
  answer: (manifest: Loose | null, from: string) => unknown;
  #reply: Uint8Array = new Uint8Array(0);
  #head = "";

  constructor(
    readonly root: string,
    public releases: Releases,
    signers: readonly Signer[],
  ) {
    super(1);
    this.answer = (manifest, from) => this.signed(manifest, from, signers);
  }

  static async open(root: string, signers: readonly Signer[]): Promise<Desk> {
    return new Desk(root, await Releases.open(root, { quiet: 0 }), signers);
  }

  /** The manifest with the envelope that belongs to it; for `null`, the step to where one is. */
  signed(manifest: Loose | null, from: string, signers: readonly Signer[], more?: Loose): Loose {
    const whole = manifest ?? { delete: [], new: [], update: [], version: from };
    const signed = seal(stepOf(whole, from, more), signers);
    // Keys are sorted on the wire.
    const entries = Object.entries({ ...whole, signed });
    return Object.fromEntries(entries.sort(([a], [b]) => (a < b ? -1 : 1)));
  }

  override open(): boolean {
    this.#head = "";
    return true;
  }

  override send(bytes: Uint8Array): void {
    this.#head += new TextDecoder().decode(bytes);
    if (!this.#head.endsWith("\r\n\r\n")) return;
    const line = this.#head.split("\r\n")[0]!;
    this.requests.push(line);
    const url = new URL(line.split(" ")[1]!, "http://desk");
    const body = url.pathname === "/manifest.json" ? this.#manifest(url) : this.#file(url);
    const head = `HTTP/1.0 200 OK\r\nContent-Length: ${body.length}\r\n\r\n`;
    this.#reply = Buffer.concat([Buffer.from(head), body]);
  }

  #manifest({ searchParams }: URL): Uint8Array {
    const query = Object.fromEntries(searchParams);
    const manifest = this.releases.manifestFor(query, "http://desk") as Loose | null;
    return Buffer.from(JSON.stringify(this.answer(manifest, query.current_ver ?? "")));
  }

  #file({ pathname }: URL): Uint8Array {
    return readFileSync(join(this.root, decodeURIComponent(pathname)));
  }

  override receive(): Uint8Array {
    const piece = this.#reply.slice(0, 512);
    this.#reply = this.#reply.slice(512);
    return new Uint8Array(piece);
  }

  override close(): void {}

  /** A board with a release on it, as after the first installation over a cable. */
  async board(kind: Kind, version: string, config: string): Promise<Board> {
    const board = new Board(kind, this);
    board.directories.add("/sd");
    for (const [path, content] of this.tree(kind, version)) board.write(path, content);
    board.write(`${board.home}/config.py`, config);
    return board;
  }

  /** See `releaseOn`. */
  tree(kind: Kind, version: string): Map<string, Uint8Array> {
    return releaseOn(kind, this.root, version);
  }
}

/** config.py of a board that trusts these keys. */
export const trusting = (signers: readonly Signer[], more = ""): string =>
  `VERIFY = (${signers.map(({ hex }) => `"${hex}", `).join("")})\n${more}`;
