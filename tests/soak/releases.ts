/** Random trees: releases that grow out of each other, and what applications write beside them. */

import * as fs from "node:fs";
import { dirname } from "node:path";
import { ancestors, VERSION_FILE } from "../../ota.ts";
import { edited, noise, sha256 } from "../helpers/content.ts";
import { Random } from "../helpers/random.ts";

/** Content, and whether its owner may run it. */
export interface File {
  content: Uint8Array;
  hash: string;
  executable: boolean;
}

/** Path → file. */
export type Tree = ReadonlyMap<string, File>;

export function asFile(content: string | Uint8Array, executable = false): File {
  const bytes = Buffer.from(content);
  return { content: bytes, hash: sha256(bytes), executable };
}

export function isSame(a: File | undefined, b: File | undefined): boolean {
  return a?.hash === b?.hash && a?.executable === b?.executable;
}

/** Where two trees differ. */
export function differences(a: Tree, b: Tree): string[] {
  return [...new Set([...a.keys(), ...b.keys()])]
    .filter((path) => !isSame(a.get(path), b.get(path)))
    .sort();
}

/** Whether one of two paths would have to be a directory for the other to be a file. */
export function areAtOdds(a: string, b: string): boolean {
  return a.startsWith(`${b}/`) || b.startsWith(`${a}/`);
}

/** All files of a device or a version; the updater's own are none. */
export function readTree(root: string): Map<string, File> {
  const tree = new Map<string, File>();
  const walk = (prefix: string) => {
    for (const item of fs.readdirSync(`${root}/${prefix}`, { withFileTypes: true })) {
      const path = prefix + item.name;
      if (path === ".ota" || path === VERSION_FILE) continue;
      if (item.isDirectory()) walk(`${path}/`);
      else {
        const isExecutable = (fs.lstatSync(`${root}/${path}`).mode & 0o100) !== 0;
        tree.set(path, asFile(fs.readFileSync(`${root}/${path}`), isExecutable));
      }
    }
  };
  walk("");
  return tree;
}

export function writeFile(root: string, path: string, { content, executable }: File): void {
  fs.mkdirSync(dirname(`${root}/${path}`), { recursive: true });
  fs.writeFileSync(`${root}/${path}`, content);
  fs.chmodSync(`${root}/${path}`, executable ? 0o755 : 0o644);
}

/** Removes a file, and the directories that it leaves empty. */
export function removeFile(root: string, path: string): void {
  fs.rmSync(`${root}/${path}`, { force: true });
  for (const above of ancestors(path)) {
    if (fs.existsSync(`${root}/${above}`) && fs.readdirSync(`${root}/${above}`).length === 0) {
      fs.rmdirSync(`${root}/${above}`);
    }
  }
}

/** Makes a directory hold exactly a tree, file by file, as a copy by hand does. */
export function writeTree(root: string, tree: Tree): void {
  fs.mkdirSync(root, { recursive: true });
  for (const path of readTree(root).keys()) if (!tree.has(path)) removeFile(root, path);
  for (const [path, file] of tree) writeFile(root, path, file);
}

/** The check of every release that has one on trial: README's own. */
export const SELFTEST = "selftest.sh";

/** Few names, so that files turn into directories and applications meet releases. */
const NAMES = ["flash", "lib", "sd", "a.py", "b", "data.bin", "ü ber.txt", "tool", "main.py"];

/** Makes trees. */
export class Gardener {
  #count = 0;

  /** @param without what no tree has: `executable`, `types` (that change), `flash-file` */
  constructor(
    private readonly random: Random,
    private readonly without: ReadonlySet<string>,
  ) {}

  path(): string {
    const parts = Array.from({ length: 1 + this.random.below(3) }, () => this.random.pick(NAMES));
    return parts.join("/") === VERSION_FILE ? "lib" : parts.join("/");
  }

  /** A file whose content no other has, but for some that are equal on purpose. */
  file(): File {
    const kind = this.random.below(12);
    const isExecutable = !this.without.has("executable") && this.random.chance(0.15);
    const bytes = noise(kind < 2 ? 20_000 + this.random.below(60_000) : 10, this.#count);
    if (kind < 2) return asFile(bytes, isExecutable);
    if (kind === 2) return asFile(this.random.chance(0.5) ? "" : "the same", isExecutable);
    return asFile(`# ${this.#count++}\n`.repeat(1 + this.random.below(200)), isExecutable);
  }

  /** The same file after some work on it. */
  edited({ content, executable }: File): File {
    const flips = !this.without.has("executable") && this.random.chance(0.2);
    if (flips && this.random.chance(0.5)) return asFile(content, !executable);
    const bytes = content.length > 0 ? edited(content, this.#count++, 2) : `${this.#count++}`;
    return asFile(bytes, executable !== flips);
  }

  /** Puts a file in a tree: what is in its way goes. Small trees only, and never below `.ota`. */
  #put(tree: Map<string, File>, path: string, file: File): void {
    const inTheWay = [...tree.keys()].filter((other) => areAtOdds(other, path));
    if (inTheWay.length > 0 && this.without.has("types")) return;
    if (path === "flash" && this.without.has("flash-file")) return;
    for (const other of inTheWay) tree.delete(other);
    tree.set(path, file);
  }

  /** A release that follows another one, and differs from it. */
  next(tree: Tree, isBad: boolean): Tree {
    const made = new Map(tree);
    const some = (share: number) => [...made.keys()].filter(() => this.random.chance(share));
    for (const path of some(0.15)) made.delete(path);
    for (const path of some(0.25)) made.set(path, this.edited(made.get(path)!));
    for (let i = this.random.below(5) + (made.size < 8 ? 4 : 0); i > 0; i--) {
      this.#put(made, this.path(), this.file());
    }
    const [from, ...others] = some(0.5);
    // A file that moves, or is there twice.
    if (from !== undefined) this.#put(made, this.path(), made.get(from)!);
    if (others.length > 5) made.delete(others[0]!);
    made.set(SELFTEST, this.selftest(isBad));
    return made;
  }

  selftest(isBad: boolean): File {
    const text = `#!/bin/sh\n# ${this.#count++}\nexit ${isBad ? 1 : 0}\n`;
    return asFile(text, !this.without.has("executable"));
  }
}

/** Whether a check ends well on a tree. */
export function passes(tree: Tree, without: ReadonlySet<string>): boolean {
  const file = tree.get(SELFTEST);
  const runs = file !== undefined && (file.executable || without.has("executable"));
  return runs && Buffer.from(file.content).toString().endsWith("exit 0\n");
}
