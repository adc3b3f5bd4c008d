/** Directories that are there for one test, and trees of files in them. */

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

/** In memory where there is such a place: removing directories from a busy disk is slow. */
const BASE = Bun.env.TMPDIR ?? (fs.existsSync("/dev/shm") ? "/dev/shm" : tmpdir());

/** Path → content. A path that ends in a slash is an empty directory. */
export type Tree = Record<string, string | Uint8Array>;

/** A directory that goes when the test ends: `await using root = new TempDir({ ... })`. */
export class TempDir implements AsyncDisposable {
  /** Absolute, links resolved. */
  readonly path: string;

  constructor(tree: Tree = {}) {
    this.path = fs.realpathSync(fs.mkdtempSync(join(BASE, "ota-test-")));
    this.write(tree);
  }

  /** The absolute path of something in it. */
  at(path: string): string {
    return `${this.path}/${path}`;
  }

  /** Adds files and replaces them; directories are made as needed. */
  write(tree: Tree): void {
    for (const [path, content] of Object.entries(tree)) {
      const file = this.at(path);
      fs.mkdirSync(path.endsWith("/") ? file : dirname(file), { recursive: true });
      if (!path.endsWith("/")) fs.writeFileSync(file, content);
    }
  }

  /** Makes a symbolic link at `path`; `target` is stored as it is. */
  link(path: string, target: string): void {
    fs.mkdirSync(dirname(this.at(path)), { recursive: true });
    fs.symlinkSync(target, this.at(path));
  }

  /** Removes a file or a directory with all that is in it. */
  remove(path: string): void {
    fs.rmSync(this.at(path), { recursive: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    fs.rmSync(this.path, { recursive: true, force: true });
  }
}

/** All files below a directory: path → content. */
export function readTree(directory: string): Map<string, Uint8Array> {
  const files = fs
    .readdirSync(directory, { recursive: true, withFileTypes: true })
    .filter((item) => item.isFile())
    .map((item) => join(item.parentPath, item.name));
  return new Map(
    files.sort().map((file) => [file.slice(directory.length + 1), bytesOf(fs.readFileSync(file))]),
  );
}

/** A Buffer as the Uint8Array that `expect` finds equal to another one. */
export function bytesOf(data: Uint8Array | string): Uint8Array {
  return typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
}
