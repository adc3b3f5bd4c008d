// What the tests of the board share: a server, boards with a release on them, and what they say.
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { Board, type Kind, type Options, type Start } from "./board.ts";
import { Link } from "./link.ts";

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
  ...["OTA", "ota_check", "ota_ed25519", "ota_http", "ota_manifest"],
  ...["ota_part", "ota_sha512", "ota_slot", "ota_trust", "ota_update"],
].map((name) => `lib/${name}.py`);

/** A release root of the test's own, made of files in text. */
export class Root {
  readonly path = mkdtempSync(join(tmpdir(), "ota-board-"));
  static #all: Root[] = [];

  constructor() {
    Root.#all.push(this);
  }

  static removeAll(): void {
    for (const { path } of Root.#all.splice(0)) rmSync(path, { recursive: true });
  }

  /** Adds files; those that an update needs on the board come from the example. */
  release(version: string, files: Record<string, string | Uint8Array>): this {
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

  add(version: string, files: Record<string, string | Uint8Array>): this {
    for (const [name, content] of Object.entries(files)) {
      const to = join(this.path, version, name);
      mkdirSync(dirname(to), { recursive: true });
      writeFileSync(to, content);
    }
    return this;
  }

  remove(path: string): this {
    rmSync(join(this.path, path), { recursive: true });
    return this;
  }
}

/** `bun ota.ts serve` on a release root, and the network to it. */
export class Van implements AsyncDisposable {
  private constructor(
    readonly root: string,
    readonly link: Link,
    readonly process: Bun.Subprocess,
  ) {}

  static async open(root: string, more: string[] = []): Promise<Van> {
    const tool = join(import.meta.dir, "../../ota.ts");
    const process = Bun.spawn(
      [globalThis.process.execPath, tool, "serve", "--root", root, "--port", "0", ...more],
      {
        stdin: "ignore",
        stdout: "pipe",
        stderr: "ignore",
      },
    );
    let said = "";
    const decoder = new TextDecoder();
    const reader = process.stdout.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      said += decoder.decode(value, { stream: true });
      const url = /https?:\/\/[\w.[\]:]+?:(\d+)/.exec(said);
      if (url) {
        // What it prints from here on must not fill the pipe.
        void (async () => {
          while (!(await reader.read()).done);
        })();
        return new Van(root, new Link(Number(url[1])), process);
      }
      if (done) throw new Error(`serve did not start:\n${said}`);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.link.stop();
    this.process.kill();
    await this.process.exited;
  }

  /** The files of a release as they are on a board of that kind, with OTA_VERSION.py. */
  async release(kind: Kind, version: string): Promise<Map<string, Uint8Array>> {
    const home = kind === "pycom" ? "/flash" : "";
    const files = new Map<string, Uint8Array>();
    const at = join(this.root, version);
    for (const name of new Bun.Glob("**").scanSync({ cwd: at, dot: true })) {
      const path = `/${name}`.replace(/^\/flash/, home);
      files.set(path, new Uint8Array(await Bun.file(join(at, name)).arrayBuffer()));
    }
    files.set(`${home}/OTA_VERSION.py`, new TextEncoder().encode(`VERSION = '${version}'\n`));
    return files;
  }

  /** The tree of a board that has this release, and files of the application. */
  async tree(
    kind: Kind,
    version: string,
    extra: Record<string, string> = {},
  ): Promise<Record<string, string>> {
    const board = new Board(kind, this.link);
    for (const [path, content] of await this.release(kind, version)) board.write(path, content);
    for (const [path, content] of Object.entries(extra)) board.write(path, content);
    return board.tree();
  }

  /** A board with this release on it, as after the first installation over a cable. */
  async board(kind: Kind, version: string, extra: Record<string, string> = {}): Promise<Board> {
    const board = new Board(kind, this.link);
    board.directories.add("/sd");
    for (const [path, content] of await this.release(kind, version)) board.write(path, content);
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

/** Numbers from a seed, the same each time. */
export function random(seed: number): (below: number) => number {
  let state = seed | 1;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}
