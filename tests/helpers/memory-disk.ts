/**
 * A file system in memory that can be killed, cut from its power and made to fail at any operation.
 *
 * It behaves as Linux does, errors included: directories, files with permission bits and several
 * names, devices, a limited number of bytes, and file systems without hard links. Whoever uses it
 * is not root.
 *
 * What is durable is tracked as pessimistically as the promises of POSIX and the habits of ext4 and
 * XFS allow:
 *
 * - A file's content is durable after `sync` of the file, and nothing else makes it so.
 * - A change of directory entries (create, link, rename, unlink, mkdir, rmdir) waits until one of
 *   the directories it touches is synced. That also makes durable what the change needs: earlier
 *   changes of the same entries, and the directories it stands in. `sync` of a directory makes its
 *   own creation durable.
 * - A rename happens whole or not at all. A change of mode waits for a `sync` of the file or of a
 *   directory that holds it, or for a later rename of the file.
 * - `powerCut` loses all, an unrelated choice of, everything after some point of, or one thing of
 *   what waits.
 */

import { constants } from "node:os";
import type { Disk, DiskStat } from "../../ota.ts";
import type { Random } from "./random.ts";

/** Thrown by every operation of a disk whose process has died. */
export class Crash extends Error {
  override name = "Crash";
}

/** What becomes of changes that wait to be durable when the power is cut. */
export type PowerCut =
  /** All are lost. */
  | "drop"
  /** Those after some moment are lost, as with a journal that keeps the order. */
  | "prefix"
  /** Any may be lost. */
  | "subset"
  /** One is lost, and what needs it: shows whether another should have waited for it. */
  | "one";

/** The name of an operation, as in `Disk`. */
export type OperationName = Exclude<keyof Disk, "makeRoot" | "free" | "mounts">;

/** One operation that was done. */
export interface Operation {
  name: OperationName;
  path: string;
}

/** Something that goes wrong. */
export interface Fault {
  /** The number of the operation, counted from 1, that fails first. */
  at: number;
  code: "EIO" | "ENOSPC" | "EACCES" | "EROFS";
  /** Whether every later operation that can fail so fails, too. */
  lasting: boolean;
}

interface Inode {
  readonly number: number;
  readonly kind: "file" | "directory" | "link";
  readonly device: number;
  mode: number;
  /** A file's content. It is replaced and never changed, so copies of a disk share it. */
  data: Uint8Array;
  /** The content at the latest `sync`. */
  synced: Uint8Array | undefined;
  /** How much of `data` was also there at the latest `sync`, and cannot be lost. */
  certain: number;
  entries: Map<string, number>;
}

interface Entry {
  directory: number;
  name: string;
}

/** A change that waits to be durable. */
interface Pending {
  kind: "enter" | "leave" | "move" | "mode";
  inode: number;
  from?: Entry;
  to?: Entry;
  mode?: number;
}

/** Directory entries and modes, as they are after a power cut. */
interface Image {
  directories: Map<number, Map<string, number>>;
  modes: Map<number, number>;
}

let times = 0;
const timeByContent = new WeakMap<Uint8Array, number>();

/** A time of writing: another one for each content that was ever written. */
function timeOf(data: Uint8Array): number {
  const time = timeByContent.get(data) ?? ++times;
  timeByContent.set(data, time);
  return time;
}

const ROOT = 1;
const EMPTY = new Uint8Array();
const FILE_MODE = 0o644;
const DIRECTORY_MODE = 0o755;

/** Operations that change nothing, so that there is nothing new to see after a crash at them. */
const READING: readonly OperationName[] = ["stat", "list", "read", "writable"];
/** Operations that need room. A rename needs none. */
const GROWING: readonly OperationName[] = ["write", "append", "link", "copy", "mkdir"];
/** Operations that a read-only file system or missing permissions stop. */
const CHANGING: readonly OperationName[] = [...GROWING, "rename", "unlink", "rmdir", "chmod"];

function failure(code: string, call: string, path: string): Error {
  const errno: Record<string, number> = constants.errno;
  return Object.assign(new Error(`${code}: ${call} '${path}'`), {
    code,
    errno: -(errno[code] ?? 0),
    syscall: call,
    path,
  });
}

/** What `MemoryDisk` can be told. */
export interface MemoryDiskOptions {
  /** Whether files can have several names (true). FAT cannot. */
  links?: boolean;
  /** How many bytes all files together can hold (no limit). */
  capacity?: number;
}

/** See the top of this file. */
export class MemoryDisk implements Disk {
  /** Operations that were done, in order, `stat` and its like left out. */
  log: Operation[] = [];
  /** How many operations were begun that change something or make it durable. */
  changes = 0;
  /** How many operations of any kind were begun. */
  operations = 0;
  /** Whether the process has died. */
  isDead = false;
  /** How often `fault` has struck. */
  strikes = 0;
  fault: Fault | undefined;
  capacity: number;
  /** Whether operations count and can go wrong: not while somebody else does something. */
  isWatching = true;

  readonly #links: boolean;
  #crashAt: { change: number; torn: boolean } | undefined;
  #inodes = new Map<number, Inode>();
  #next = ROOT + 1;
  #durable: Image = { directories: new Map(), modes: new Map() };
  #pending: Pending[] = [];
  #locks = new Set<string>();

  constructor({ links = true, capacity = Infinity }: MemoryDiskOptions = {}) {
    this.#links = links;
    this.capacity = capacity;
    this.#inodes.set(ROOT, {
      number: ROOT,
      kind: "directory",
      device: 1,
      mode: DIRECTORY_MODE,
      data: EMPTY,
      synced: undefined,
      certain: 0,
      entries: new Map(),
    });
    this.#durable.directories.set(ROOT, new Map());
    this.#durable.modes.set(ROOT, DIRECTORY_MODE);
  }

  // ── What tests do to it. ──

  /**
   * Makes the process die when it begins its n-th change from now on. A change is an operation that
   * changes something or makes it durable; to die after the n-th is to die at the one that follows.
   *
   * @param torn let a write, append or copy be done by half
   */
  crashAt(change: number, torn = false): void {
    this.#crashAt = { change: this.changes + change, torn };
  }

  /** Makes everything durable, as if it had all happened long ago. */
  settle(): void {
    for (const change of this.#pending) apply(this.#durable, change, this.#inodes);
    this.#pending = [];
    for (const inode of this.#inodes.values()) settleContent(inode);
  }

  /** A copy that shares nothing with this disk: same content, same things not yet durable. */
  clone(): MemoryDisk {
    const copy = new MemoryDisk({ links: this.#links, capacity: this.capacity });
    copy.#next = this.#next;
    copy.#inodes = new Map(
      [...this.#inodes].map(([number, inode]) => {
        return [number, { ...inode, entries: new Map(inode.entries) }];
      }),
    );
    copy.#durable = copyImage(this.#durable);
    copy.#pending = [...this.#pending];
    return copy;
  }

  /** What a new process finds when the one before was killed: nothing is lost but its lock. */
  kill(): MemoryDisk {
    return this.clone();
  }

  /** What is found when the power comes back. */
  powerCut(how: PowerCut, random: Random): MemoryDisk {
    const end = this.#pending.length;
    const some = how === "prefix" ? random.below(end + 1) : how === "one" ? random.below(end) : 0;
    const chance = how === "subset" ? random.pick([0.1, 0.3, 0.5, 0.7, 0.9]) : 0;
    const survives = {
      drop: () => false,
      prefix: (i: number) => i < some,
      subset: () => random.next() < chance,
      one: (i: number) => i !== some,
    }[how];
    return this.#cut(survives, (inode) => {
      return how === "drop" ? (inode.synced ?? EMPTY) : contentAfterCut(inode, random);
    });
  }

  /** What is found after each power cut that loses one change; or none, and what was not synced. */
  *cutsOfOne(): Generator<MemoryDisk> {
    for (let lost = 0; lost <= this.#pending.length; lost++) {
      yield this.#cut(
        (i) => i !== lost,
        ({ synced }) => synced ?? EMPTY,
      );
    }
  }

  /**
   * @param survives whether a change that waits becomes durable
   * @param contentOf what a file has then
   */
  #cut(survives: (i: number) => boolean, contentOf: (inode: Inode) => Uint8Array): MemoryDisk {
    const image = copyImage(this.#durable);
    for (const [i, change] of this.#pending.entries()) {
      if (survives(i)) apply(image, change, this.#inodes);
    }
    const copy = new MemoryDisk({ links: this.#links, capacity: this.capacity });
    copy.#next = this.#next;
    copy.#durable = image;
    copy.#inodes = new Map();
    const reach = (number: number): void => {
      const inode = this.#inodes.get(number)!;
      const data = contentOf(inode);
      const certain = data.length;
      const mode = image.modes.get(number)!;
      const entries = new Map(image.directories.get(number));
      copy.#inodes.set(number, { ...inode, mode, data, synced: data, certain, entries });
      for (const child of entries.values()) if (!copy.#inodes.has(child)) reach(child);
    };
    reach(ROOT);
    return copy;
  }

  /** Makes a directory that is another file system. */
  mount(path: string): void {
    const { parent, name } = this.#above("mkdir", path);
    this.#create("directory", parent, name, DIRECTORY_MODE, this.#next);
  }

  /** Makes a symbolic link. It leads nowhere. */
  symlink(path: string): void {
    const { parent, name } = this.#above("symlink", path);
    this.#create("link", parent, name, 0o777, parent.device);
  }

  /** Every path below a directory, sorted: what it is and, for a file, its mode and content. */
  walk(path: string): Map<string, { kind: Inode["kind"]; mode: number; data: Uint8Array }> {
    const found = new Map<string, { kind: Inode["kind"]; mode: number; data: Uint8Array }>();
    const visit = (inode: Inode, prefix: string): void => {
      for (const name of [...inode.entries.keys()].sort()) {
        const child = this.#inodes.get(inode.entries.get(name)!)!;
        found.set(prefix + name, child);
        if (child.kind === "directory") visit(child, `${prefix}${name}/`);
      }
    };
    const top = this.#find(path);
    if (top) visit(top, "");
    return found;
  }

  /** How many names a file has. */
  names(path: string): number {
    const number = this.#at("stat", path).number;
    const entries = [...this.#inodes.values()].flatMap((inode) => [...inode.entries.values()]);
    return entries.filter((entry) => entry === number).length;
  }

  // ── The interface. ──

  async makeRoot(): Promise<void> {}

  mounts(): Set<string> {
    return new Set();
  }

  stat(path: string): DiskStat | undefined {
    this.#begin("stat", path);
    const inode = this.#find(path);
    if (!inode) return undefined;
    const { kind, mode, device, data, number } = inode;
    const size = kind === "file" ? data.length : 4096;
    return { kind, mode, device, size, stamp: `${number} ${timeOf(data)}` };
  }

  list(path: string): string[] {
    this.#begin("list", path);
    const inode = this.#at("scandir", path);
    if (inode.kind !== "directory") throw failure("ENOTDIR", "scandir", path);
    return [...inode.entries.keys()];
  }

  read(path: string, offset: number, length: number): Uint8Array {
    this.#begin("read", path);
    const inode = this.#file("open", path);
    if (!(inode.mode & 0o400)) throw failure("EACCES", "open", path);
    return inode.data.slice(offset, offset + length);
  }

  write(path: string, data: Uint8Array): void {
    const torn = this.#begin("write", path);
    this.#fill(path, () => data.slice(), torn);
  }

  append(path: string, data: Uint8Array): void {
    const torn = this.#begin("append", path);
    const old = this.#find(path)?.data ?? EMPTY;
    this.#fill(path, () => Uint8Array.from(Buffer.concat([old, data])), torn, old.length);
  }

  link(from: string, to: string): void {
    this.#begin("link", from);
    const source = this.#above("link", from);
    const inode = this.#at("link", from);
    const { parent, name } = this.#above("link", to);
    if (parent.entries.has(name)) throw failure("EEXIST", "link", to);
    if (parent.device !== inode.device) throw failure("EXDEV", "link", to);
    if (!this.#links || inode.kind === "directory") throw failure("EPERM", "link", from);
    this.#checkWritable("link", parent, to);
    parent.entries.set(name, inode.number);
    this.#pending.push({
      kind: "enter",
      inode: inode.number,
      from: { directory: source.parent.number, name: source.name },
      to: { directory: parent.number, name },
    });
  }

  copy(from: string, to: string): void {
    const torn = this.#begin("copy", from);
    const { kind, data, mode } = this.#at("copyfile", from);
    if (kind !== "file") throw failure("ENOTSUP", "copyfile", from);
    if (!(mode & 0o400)) throw failure("EACCES", "copyfile", from);
    this.#fill(to, () => data, torn);
    this.#setMode(this.#at("copyfile", to), mode);
  }

  rename(from: string, to: string): void {
    this.#begin("rename", from);
    const source = this.#above("rename", from);
    const target = this.#above("rename", to);
    const inode = this.#at("rename", from);
    const old = this.#inodes.get(target.parent.entries.get(target.name) ?? 0);
    if (target.parent.device !== inode.device) throw failure("EXDEV", "rename", to);
    if (to.startsWith(`${from}/`)) throw failure("EINVAL", "rename", to);
    if (from.startsWith(`${to}/`)) throw failure("ENOTEMPTY", "rename", to);
    this.#checkWritable("rename", source.parent, from);
    this.#checkWritable("rename", target.parent, to);
    if (old === inode) return; // Two names of one file: both stay.
    if (inode.kind === "directory") {
      if (old && old.kind !== "directory") throw failure("ENOTDIR", "rename", to);
      if (old && old.entries.size > 0) throw failure("ENOTEMPTY", "rename", to);
    } else if (old?.kind === "directory") throw failure("EISDIR", "rename", to);
    source.parent.entries.delete(source.name);
    target.parent.entries.set(target.name, inode.number);
    this.#pending.push({
      kind: "move",
      inode: inode.number,
      from: { directory: source.parent.number, name: source.name },
      to: { directory: target.parent.number, name: target.name },
    });
  }

  unlink(path: string): void {
    this.#begin("unlink", path);
    const inode = this.#at("unlink", path);
    if (inode.kind === "directory") throw failure("EISDIR", "unlink", path);
    this.#leave("unlink", path, inode);
  }

  mkdir(path: string): void {
    this.#begin("mkdir", path);
    const { parent, name } = this.#above("mkdir", path);
    if (parent.entries.has(name)) throw failure("EEXIST", "mkdir", path);
    this.#checkWritable("mkdir", parent, path);
    this.#create("directory", parent, name, DIRECTORY_MODE, parent.device);
  }

  rmdir(path: string): void {
    this.#begin("rmdir", path);
    const inode = this.#at("rmdir", path);
    if (inode.kind !== "directory") throw failure("ENOTDIR", "rmdir", path);
    if (inode.entries.size > 0) throw failure("ENOTEMPTY", "rmdir", path);
    this.#leave("rmdir", path, inode);
  }

  chmod(path: string, mode: number): void {
    this.#begin("chmod", path);
    this.#setMode(this.#at("chmod", path), mode);
  }

  writable(path: string): boolean {
    this.#begin("writable", path);
    return ((this.#find(path)?.mode ?? 0) & 0o300) === 0o300;
  }

  lock(path: string): Disposable | undefined {
    this.#begin("lock", path);
    if (!this.#find(path)) this.#fill(path, () => EMPTY, undefined);
    if (this.#locks.has(path)) return undefined;
    this.#locks.add(path);
    return { [Symbol.dispose]: () => void this.#locks.delete(path) };
  }

  free(_path: string): number {
    return this.capacity - this.#used();
  }

  async sync(path: string): Promise<void> {
    const inode = this.#find(path);
    await undefined; // So that whoever does not wait for it is found out.
    this.#begin("sync", path);
    if (!inode) throw failure("ENOENT", "open", path);
    if (inode.kind === "file" && !(inode.mode & 0o400)) throw failure("EACCES", "open", path);
    const { number } = inode;
    if (inode.kind === "directory") {
      const here = new Set(inode.entries.values());
      this.#settle(({ kind, from, to, inode }) => {
        if (kind === "mode") return inode === number || here.has(inode);
        const isHere = to?.directory === number || (kind !== "enter" && from?.directory === number);
        return isHere || (inode === number && kind !== "leave");
      });
    } else {
      settleContent(inode);
      this.#settle((change) => change.kind === "mode" && change.inode === number);
    }
  }

  // ── How it works. ──

  /** Makes changes durable, and all that they need. */
  #settle(isChosen: (change: Pending) => boolean): void {
    const chosen = new Set<Pending>();
    const choose = (at: number): void => {
      const change = this.#pending[at]!;
      if (chosen.has(change)) return;
      chosen.add(change);
      for (let i = at - 1; i >= 0; i--) if (needs(change, this.#pending[i]!)) choose(i);
    };
    for (const [i, change] of this.#pending.entries()) if (isChosen(change)) choose(i);
    for (const change of this.#pending) {
      if (chosen.has(change) && !apply(this.#durable, change, this.#inodes)) {
        throw new Error(`MemoryDisk lost track of ${JSON.stringify(change)}`);
      }
    }
    this.#pending = this.#pending.filter((change) => !chosen.has(change));
  }

  /**
   * Counts an operation, and lets go wrong what is to go wrong.
   *
   * @returns what to throw when the operation is done by half, if it is to be
   */
  #begin(name: OperationName, path: string): Error | undefined {
    if (!this.isWatching) return undefined;
    if (this.isDead) throw new Crash(`${name} ${path} after the process died`);
    this.operations++;
    const isChange = !READING.includes(name);
    if (isChange) {
      this.changes++;
      this.log.push({ name, path });
    }
    const isWriting = name === "write" || name === "append" || name === "copy";
    if (isChange && this.#crashAt?.change === this.changes) {
      this.isDead = true;
      const crash = new Crash(`at ${name} ${path}`);
      if (this.#crashAt.torn && isWriting) return crash;
      throw crash;
    }
    const { fault } = this;
    if (fault && this.operations >= fault.at && canFail(name, fault.code)) {
      if (fault.lasting || this.strikes === 0) {
        this.strikes++;
        const error = failure(fault.code, name, path);
        if (fault.code === "ENOSPC" && isWriting) return error;
        throw error;
      }
    }
    return undefined;
  }

  /** Gives a file its content, or the first half of what is new, and then throws. */
  #fill(path: string, content: () => Uint8Array, torn: Error | undefined, keeps = 0): void {
    const { parent, name } = this.#above("open", path);
    let inode = this.#inodes.get(parent.entries.get(name) ?? 0);
    if (inode?.kind === "directory") throw failure("EISDIR", "open", path);
    if (inode && !(inode.mode & 0o200)) throw failure("EACCES", "open", path);
    if (!inode) {
      this.#checkWritable("open", parent, path);
      inode = this.#create("file", parent, name, FILE_MODE, parent.device);
    }
    const whole = content();
    const others = this.#used() - inode.data.length;
    let room = this.capacity - others;
    if (torn) room = Math.min(room, keeps + Math.floor((whole.length - keeps) / 2));
    inode.certain = Math.min(inode.certain, keeps);
    inode.data = whole.length > room ? whole.slice(0, Math.max(0, room)) : whole;
    if (torn) throw torn;
    if (whole.length > room) throw failure("ENOSPC", "write", path);
  }

  #create(kind: Inode["kind"], parent: Inode, name: string, mode: number, device: number): Inode {
    const number = this.#next++;
    const inode: Inode = {
      number,
      kind,
      device,
      mode,
      data: EMPTY,
      synced: undefined,
      certain: 0,
      entries: new Map(),
    };
    this.#inodes.set(number, inode);
    parent.entries.set(name, number);
    const to = { directory: parent.number, name };
    this.#pending.push({ kind: "enter", inode: number, to, mode });
    return inode;
  }

  #leave(call: string, path: string, inode: Inode): void {
    const { parent, name } = this.#above(call, path);
    this.#checkWritable(call, parent, path);
    parent.entries.delete(name);
    const from = { directory: parent.number, name };
    this.#pending.push({ kind: "leave", inode: inode.number, from });
  }

  #setMode(inode: Inode, mode: number): void {
    if (inode.mode === mode) return;
    inode.mode = mode;
    this.#pending.push({ kind: "mode", inode: inode.number, mode });
  }

  #checkWritable(call: string, directory: Inode, path: string): void {
    if ((directory.mode & 0o300) !== 0o300) throw failure("EACCES", call, path);
  }

  #used(): number {
    if (this.capacity === Infinity) return 0;
    const named = new Set<number>();
    for (const { entries } of this.#inodes.values()) entries.values().forEach((n) => named.add(n));
    return named.values().reduce((sum, number) => sum + this.#inodes.get(number)!.data.length, 0);
  }

  #walk(call: string, parts: readonly string[], path: string): Inode {
    let inode = this.#inodes.get(ROOT)!;
    for (const part of parts) {
      if (inode.kind !== "directory") throw failure("ENOTDIR", call, path);
      const next = inode.entries.get(part);
      if (next === undefined) throw failure("ENOENT", call, path);
      inode = this.#inodes.get(next)!;
    }
    return inode;
  }

  #at(call: string, path: string): Inode {
    return this.#walk(call, split(path), path);
  }

  #find(path: string): Inode | undefined {
    let inode = this.#inodes.get(ROOT);
    for (const part of split(path)) {
      inode = this.#inodes.get(inode?.entries.get(part) ?? 0);
      if (!inode) return undefined;
    }
    return inode;
  }

  #file(call: string, path: string): Inode {
    const inode = this.#at(call, path);
    if (inode.kind === "directory") throw failure("EISDIR", call, path);
    return inode;
  }

  #above(call: string, path: string): { parent: Inode; name: string } {
    const parts = split(path);
    const name = parts.at(-1);
    if (name === undefined) throw failure("EBUSY", call, path);
    const parent = this.#walk(call, parts.slice(0, -1), path);
    if (parent.kind !== "directory") throw failure("ENOTDIR", call, path);
    return { parent, name };
  }
}

/** The same few paths are asked for again and again. */
const partsOf = new Map<string, readonly string[]>();

function split(path: string): readonly string[] {
  let parts = partsOf.get(path);
  if (!parts) {
    if (path.startsWith("/")) throw new Error(`no path below the root: ${path}`);
    parts = path.split("/").filter((part) => part !== "");
    partsOf.set(path, parts);
  }
  return parts;
}

function canFail(name: OperationName, code: Fault["code"]): boolean {
  if (code === "EIO") return name !== "writable";
  return (code === "ENOSPC" ? GROWING : CHANGING).includes(name);
}

function copyImage({ directories, modes }: Image): Image {
  const copies = [...directories].map(([number, entries]) => [number, new Map(entries)] as const);
  return { directories: new Map(copies), modes: new Map(modes) };
}

/** Does a change to an image, when that has what the change needs. */
function apply(image: Image, change: Pending, inodes: ReadonlyMap<number, Inode>): boolean {
  const { kind, inode, from, to, mode } = change;
  const isDirectory = inodes.get(inode)!.kind === "directory";
  const source = from && image.directories.get(from.directory);
  const target = to && image.directories.get(to.directory);
  const isThere = source?.get(from!.name) === inode;
  if (kind === "mode") {
    if (!image.modes.has(inode)) return false;
    image.modes.set(inode, mode!);
  } else if (kind === "enter") {
    if (!target || target.has(to.name) || (from && !isThere)) return false;
    target.set(to.name, inode);
    if (!from) image.modes.set(inode, mode!);
    if (isDirectory) image.directories.set(inode, new Map());
  } else if (kind === "leave") {
    if (!isThere || (isDirectory && image.directories.get(inode)!.size > 0)) return false;
    source!.delete(from!.name);
    if (isDirectory) image.directories.delete(inode);
  } else {
    if (!isThere || !target) return false;
    const old = target.get(to.name);
    const oldEntries = old === undefined ? undefined : image.directories.get(old);
    if (old !== undefined && isDirectory !== (oldEntries !== undefined)) return false;
    if (oldEntries && oldEntries.size > 0) return false;
    if (oldEntries) image.directories.delete(old!);
    source!.delete(from!.name);
    target.set(to.name, inode);
  }
  return true;
}

/** Whether a change cannot be durable without an earlier one. (Asked so often that it makes nothing.) */
function needs({ kind, inode, from, to }: Pending, earlier: Pending): boolean {
  const sharesEntry =
    isSame(from, earlier.from) ||
    isSame(from, earlier.to) ||
    isSame(to, earlier.from) ||
    isSame(to, earlier.to);
  // A directory must be there before something is in it, and empty before it goes.
  const standsIn = from?.directory === earlier.inode || to?.directory === earlier.inode;
  const empties =
    kind === "leave" && (earlier.from?.directory === inode || earlier.to?.directory === inode);
  const isModeOf = (kind === "mode" || earlier.kind === "mode") && earlier.inode === inode;
  return sharesEntry || standsIn || empties || isModeOf;
}

function isSame(one: Pending["from"], other: Pending["from"]): boolean {
  return (
    one !== undefined &&
    other !== undefined &&
    one.directory === other.directory &&
    one.name === other.name
  );
}

function settleContent(inode: Inode): void {
  inode.synced = inode.data;
  inode.certain = inode.data.length;
}

/** The content of a file of which part was never synced. */
function contentAfterCut(inode: Inode, random: Random): Uint8Array {
  const { data, synced, certain } = inode;
  if (data === synced) return data;
  const length = certain + random.below(data.length - certain + 1);
  const zeros = new Uint8Array(data.length);
  zeros.set(data.subarray(0, length));
  return random.pick([data, data.slice(0, certain), data.slice(0, length), zeros, synced ?? EMPTY]);
}
