// What the tests of the board share: a server, boards with a release on them, and what they say.
import { cpSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { Board, type Kind, type Options, type Start } from "./board.ts";
import { Link } from "./link.ts";
import { filesBelow, layTree, Temp, type Tree } from "../helpers/temp.ts";
import { Serving } from "../helpers/tool.ts";

export const example = join(import.meta.dir, "../../examples/smart-meter");

/** What an application does to be updated, as it is written in main.py. */
export const UPDATE = `
from OTA import WiFiOTA
ota = WiFiOTA("meter-service", "secret", "127.0.0.1", 8000)
ota.connect()
print("update:", ota.update())
`;
export const CONFIRM = `
from OTA import WiFiOTA
ota = WiFiOTA("meter-service", "secret", "127.0.0.1", 8000)
ota.confirm()
print("version:", ota.version())
`;
export const ROLLBACK = `
from OTA import WiFiOTA
WiFiOTA("meter-service", "secret", "127.0.0.1", 8000).rollback()
`;

/** The library, but for what recovers. */
const LIBRARY = [
  ...[
    "OTA",
    "ota_check",
    "ota_coding",
    "ota_common",
    "ota_ed25519",
    "ota_fields",
    "ota_http",
    "ota_image",
  ],
  ...[
    "ota_manifest",
    "ota_part",
    "ota_patch",
    "ota_query",
    "ota_reader",
    "ota_riscv",
    "ota_sha512",
    "ota_slot",
  ],
  ...["ota_thumb", "ota_trust", "ota_update", "ota_xtensa"],
].map((name) => `lib/${name}.py`);

/** A release root of the test's own, made of files in text. */
export class Root extends Temp {
  static #all: Root[] = [];

  constructor() {
    super();
    Root.#all.push(this);
  }

  static removeAll(): void {
    for (const root of Root.#all.splice(0)) root[Symbol.dispose]();
  }

  /** Adds files; those that an update needs on the board come from the example. */
  release(version: string, files: Tree): this {
    for (const name of ["boot.py", "lib/ota_boot.py"]) {
      const to = join(this.path, version, "flash", name);
      mkdirSync(dirname(to), { recursive: true });
      cpSync(join(example, "1.0.0/flash", name), to);
    }
    for (const file of LIBRARY) {
      cpSync(join(example, "1.0.0/flash", file), join(this.path, version, "flash", file));
    }
    return this.add(version, files);
  }

  add(version: string, files: Tree): this {
    layTree(join(this.path, version), files);
    return this;
  }
}

/** The files of a release as they are on a board of that kind, with OTA_VERSION.py. */
export function releaseOn(kind: Kind, root: string, version: string): Map<string, Uint8Array> {
  const home = kind === "pycom" ? "/flash" : "";
  const files = new Map<string, Uint8Array>();
  for (const [name, content] of filesBelow(join(root, version))) {
    files.set(`/${name}`.replace(/^\/flash/, home), content);
  }
  return files.set(`${home}/OTA_VERSION.py`, Buffer.from(`VERSION = '${version}'\n`));
}

/** `bun ota.ts serve` on a release root, and the network to it. */
export class Van implements AsyncDisposable {
  private constructor(
    readonly root: string,
    readonly link: Link,
    readonly process: Serving,
  ) {}

  static async open(root: string, more: string[] = []): Promise<Van> {
    // The example is not to remember the boards of earlier tests.
    const fleet = more.includes("--fleet") ? [] : ["--no-fleet"];
    const process = await Serving.start(["--root", root, ...fleet, ...more]);
    return new Van(root, new Link(Number(new URL(process.url).port)), process);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.link.stop();
    await this.process[Symbol.asyncDispose]();
  }

  /** The tree of a board that has this release, and files of the application. */
  async tree(
    kind: Kind,
    version: string,
    extra: Record<string, string> = {},
  ): Promise<Record<string, string>> {
    const board = new Board(kind, this.link);
    for (const [path, content] of releaseOn(kind, this.root, version)) board.write(path, content);
    for (const [path, content] of Object.entries(extra)) board.write(path, content);
    return board.tree();
  }

  /** A board with this release on it, as after the first installation over a cable. */
  async board(kind: Kind, version: string, extra: Record<string, string> = {}): Promise<Board> {
    const board = new Board(kind, this.link);
    board.directories.add("/sd");
    for (const [path, content] of releaseOn(kind, this.root, version)) board.write(path, content);
    for (const [path, content] of Object.entries(extra)) board.write(path, content);
    return board;
  }

  async firmware(version: string): Promise<Uint8Array> {
    return new Uint8Array(await Bun.file(join(this.root, `firmware_${version}.bin`)).arrayBuffer());
  }
}

/** Does the running firmware begin with these bytes? */
export function runs(board: Board, firmware: Uint8Array): boolean {
  return Buffer.from(firmware).equals(Buffer.from(board.firmware().slice(0, firmware.length)));
}

/** Updates, starts the new release and confirms it; returns all that was printed. */
export async function update(board: Board, options: Options = {}): Promise<Start[]> {
  return [await board.start(UPDATE, options), await board.start(CONFIRM)];
}

/** Numbers from a seed, as those from which the usual samples of states were chosen. */
export function random(seed: number): (below: number) => number {
  let state = seed | 1;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}
