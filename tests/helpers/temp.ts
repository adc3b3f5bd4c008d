/** Directories that are there for one test, and trees of files in them. */

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { sha256 } from "./content.ts";

/** In memory where there is room for it: to write and remove files on a busy disk is slow. */
const BASE = Bun.env.TMPDIR ?? (hasRoom("/dev/shm") ? "/dev/shm" : tmpdir());

/** Whether there are some GB in memory, from which programs may be run, too. */
function hasRoom(path: string): boolean {
  const mount = existing(() => fs.readFileSync("/proc/mounts", "utf8").split(`${path} `)[1]);
  if (mount === undefined || /^\S+ \S*noexec/.test(mount)) return false;
  const { bavail, bsize } = fs.statfsSync(path);
  return bavail * bsize > 4e9;
}

/** Path → content. A path that ends in a slash is an empty directory. */
export type Tree = Record<string, string | Uint8Array>;

/** A directory that goes when the test ends, whatever is in it: `using temp = new Temp()`. */
export class Temp implements Disposable {
  /** Absolute, links resolved. */
  readonly path = fs.realpathSync(fs.mkdtempSync(join(BASE, "ota-test-")));

  constructor(tree: Tree = {}) {
    this.write(tree);
  }

  /** A path in it. */
  at(...parts: string[]): string {
    return join(this.path, ...parts);
  }

  /** Adds files and replaces them; directories are made as needed. */
  write(tree: Tree): void {
    layTree(this.path, tree);
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

  [Symbol.dispose](): void {
    fs.rmSync(this.path, { recursive: true, force: true });
  }
}

/** Writes files below a directory, which is made. */
export function layTree(root: string, files: Tree): void {
  fs.mkdirSync(root, { recursive: true });
  for (const [path, content] of Object.entries(files)) {
    const file = join(root, path);
    fs.mkdirSync(path.endsWith("/") ? file : dirname(file), { recursive: true });
    if (!path.endsWith("/")) fs.writeFileSync(file, content);
  }
}

/**
 * All below a directory but `.ota`: path → content (for long content its hash), with directories as
 * `path/` and links as `-> target`.
 */
export function readTree(root: string): Record<string, string> {
  const found: Record<string, string> = {};
  const walk = (directory: string): void => {
    for (const item of fs.readdirSync(join(root, directory), { withFileTypes: true })) {
      const path = directory === "" ? item.name : `${directory}/${item.name}`;
      if (path === ".ota") continue;
      const at = join(root, path);
      if (item.isDirectory()) {
        found[`${path}/`] = "";
        walk(path);
      } else if (item.isSymbolicLink()) found[path] = `-> ${fs.readlinkSync(at)}`;
      else found[path] = shown(fs.readFileSync(at));
    }
  };
  walk("");
  return found;
}

/** What `readTree` finds where these files are, parent directories added. */
export function asTree(files: Tree): Record<string, string> {
  const expected: Record<string, string> = {};
  for (const [path, content] of Object.entries(files)) {
    const parts = path.replace(/\/$/, "").split("/").slice(0, -1);
    parts.forEach((_, i) => (expected[`${parts.slice(0, i + 1).join("/")}/`] = ""));
    expected[path] = shown(Buffer.from(content));
  }
  return expected;
}

function shown(content: Uint8Array): string {
  return content.length > 400
    ? `${content.length} bytes, SHA-256 ${sha256(content)}`
    : Buffer.from(content).toString("latin1");
}

/** The files below a directory and nothing else: path → content, sorted. */
export function filesBelow(directory: string): Map<string, Uint8Array> {
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

/** The sizes of the files in a directory, by name, while others make and remove them. */
export function sizesIn(directory: string): Record<string, number> {
  const names = existing(() => fs.readdirSync(directory)) ?? [];
  const sizes = names.flatMap((name) => {
    const size = existing(() => fs.lstatSync(join(directory, name)).size);
    return size === undefined ? [] : [[name, size] as const];
  });
  return Object.fromEntries(sizes);
}

/** What a look finds; `undefined` where nothing is, or is any more. */
export function existing<T>(look: () => T): T | undefined {
  try {
    return look();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** What is in `.ota` below a root: names of files and directories. */
export function otaFiles(root: string): string[] {
  return fs.readdirSync(join(root, ".ota")).sort();
}
