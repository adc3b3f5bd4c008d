// A board to run the example's Python on: MicroPython compiled to WebAssembly, a flash that
// survives resets, and a power switch that can be pulled at any file operation.
//
// Each start is a new interpreter. All files are in Emscripten's memory file system, so its
// functions are the flash driver: they are counted, and at the chosen one a PowerCut is thrown,
// which leaves the interpreter for good; not one more line of Python runs. What a board would lose
// then is lost too: of a file that was open for writing nothing is certain.
import { join } from "node:path";
import {
  type FileNode,
  type FileSystem,
  type Stream,
} from "@micropython/micropython-webassembly-pyscript";
import { FixedHeap, load } from "./heap.ts";
import type { Link } from "./link.ts";

/** How a start ended: Python ran to its end, or what took the power away. */
export type End = "done" | "error" | "reset" | "cut" | "bitten";

export interface Start {
  end: End;
  /** The Python error, if there was one. */
  error: string;
  /** What was printed. */
  output: string[];
  /** The file operations, each in words. */
  operations: string[];
  /** With a fixed heap: how it was used. */
  heap?: FixedHeap;
  /** How often the manifest was read from its beginning. */
  passes: number;
  /** The longest time that the watchdog was not fed, in milliseconds of the board's clock. */
  hungry: number;
}

export interface Options {
  /** The power goes before this file operation, counted from 0. */
  cutAt?: number;
  /** Chooses what becomes of files that were open for writing then. */
  torn?: number;
  /** Bytes of heap, which then are all there is. */
  heap?: number;
  /** This file operation, counted from 0, and with `failOn` all that follow, fail: EIO. */
  failAt?: number;
  failOn?: boolean;
  /** Sees the board before each file operation, as it would be if the power went there. */
  watch?: (before: Board) => void;
}

class PowerCut {
  constructor(readonly end: End) {}
}

/** The parts of a MEMFS path that are no flash of a board. */
const NOT_FLASH = new Set(["dev", "home", "proc", "tmp", "stand", "hw"]);
const WRITES = 3; // O_WRONLY | O_RDWR
const CREATES = 64 | 512; // O_CREAT | O_TRUNC

const standins = join(import.meta.dir, "standins");

const ERRNO = { EEXIST: 20, EXDEV: 75, EIO: 5, ENOSPC: 28 /* as a board says it */ };

/** An ESP32 with two firmware slots, a LoPy4 of Pycom, a Pico W. */
export type Kind = "esp32" | "pycom" | "rp2";

/**
 * What things take on a slow board, in milliseconds: a flash that is nearly full, and Python that
 * looks at every letter of a manifest.
 */
const PACE = {
  operation: 100,
  look: 10,
  byteRead: 0.05,
  byteWritten: 0.1,
  byteOfManifest: 0.5,
};

export class Board {
  /** Path to content, below / of the board. */
  files = new Map<string, Uint8Array>();
  directories = new Set<string>();
  /** Bytes that all files together may have. */
  capacity = Infinity;
  /** LoRa: what was sent, and the downlinks that wait. */
  uplinks: Uint8Array[] = [];
  downlinks: Uint8Array[] = [];
  /** The power goes after that many uplinks, at the latest. */
  uplinksLeft = Infinity;
  /** Files take time, as `PACE` has it. */
  slow = false;
  /** How long it takes to join the WiFi network, in milliseconds. */
  joins = 0;
  /** What its clock says, ISO 8601; not set, it is 2000 as on a board that was just switched on. */
  now = "2000-01-01T00:00:00Z";
  #clock = 0;
  #dog = Infinity;
  #fed = 0;
  #hungry = 0;
  #stopped = false;

  constructor(
    readonly kind: Kind,
    readonly link: Link,
  ) {
    if (kind === "rp2") return;
    const [first, second] = this.slots();
    this.files.set("/hw/otadata", text(JSON.stringify({ boot: first, running: first })));
    this.files.set(`/hw/${first}`, text("\xe9 the firmware from the factory"));
    this.files.set(`/hw/${second}`, new Uint8Array(0));
    this.directories.add("/hw");
  }

  slots(): [string, string] {
    return this.kind === "pycom" ? ["Factory", "ota_0"] : ["ota_0", "ota_1"];
  }

  /** Where `flash/` of a release is on this board. */
  get home(): string {
    return this.kind === "pycom" ? "/flash" : "";
  }

  write(path: string, content: Uint8Array | string): void {
    this.files.set(path, typeof content === "string" ? text(content) : content);
    for (let at = path.indexOf("/", 1); at > 0; at = path.indexOf("/", at + 1)) {
      this.directories.add(path.slice(0, at));
    }
  }

  read(path: string): string | undefined {
    const content = this.files.get(path);
    return content && new TextDecoder().decode(content);
  }

  copy(): Board {
    const other = new Board(this.kind, this.link);
    other.files = new Map(this.files);
    other.directories = new Set(this.directories);
    other.capacity = this.capacity;
    other.slow = this.slow;
    other.joins = this.joins;
    other.now = this.now;
    return other;
  }

  /** Lets the board's clock go on; a watchdog that was not fed in time bites. */
  #pass(milliseconds: number): void {
    if (this.#stopped) return;
    this.#clock += milliseconds;
    this.#hungry = Math.max(this.#hungry, this.#clock - this.#fed);
    if (this.#clock - this.#fed > this.#dog) throw new PowerCut("bitten");
  }

  /** Everything but what belongs to the updater: the release, and what the application made. */
  tree(): Record<string, string> {
    const out: Record<string, string> = {};
    for (const path of [...this.files.keys()].sort()) {
      if (path.includes("/.ota/") || path.startsWith("/hw/")) continue;
      out[path] = Buffer.from(this.files.get(path)!).toString("base64");
    }
    return out;
  }

  /** The firmware that runs: its first bytes tell which one it is. */
  firmware(): Uint8Array {
    return this.files.get(`/hw/${this.otadata().running}`)!;
  }

  otadata(): Record<string, string> {
    return JSON.parse(this.read("/hw/otadata")!) as Record<string, string>;
  }

  /** What the bootloader does before Python starts. */
  #bootloader(): void {
    if (this.kind === "rp2") return;
    const data = this.otadata();
    const image = (slot: string) => this.files.get(`/hw/${slot}`)!;
    const boot = data.boot!;
    const [first, second] = this.slots();
    const other = boot === first ? second : first;
    if (this.kind === "esp32" && data[boot] === "pending") {
      // Started once and not marked valid: never again.
      data[boot] = "aborted";
      data.boot = other;
    } else if (image(boot)[0] !== 0xe9) data.boot = other;
    else if (data[boot] === "new") data[boot] = "pending";
    data.running = data.boot!;
    this.write("/hw/otadata", JSON.stringify(data));
  }

  /** Starts the board and runs `code` after `boot.py`, unless `boot` is false. */
  async start(code = "", options: Options & { boot?: boolean } = {}): Promise<Start> {
    this.#bootloader();
    this.#clock = this.#fed = this.#hungry = 0;
    this.#stopped = false;
    this.#dog = Infinity;
    const result: Start = {
      end: "done",
      error: "",
      output: [],
      operations: [],
      passes: 0,
      hungry: 0,
    };
    // What stands in for modules in C has its code in the heap: that much is added.
    const standins = options.heap ? await this.#standinBytes() : 0;
    const settings = {
      heapsize: options.heap ? options.heap + standins : 128 * 1024,
      stdout: (line: string) => {
        if (Bun.env.LOUD) console.log(line);
        result.output.push(line);
      },
      stderr: (line: string) => void result.output.push(line),
    };
    const [mp, heap] = options.heap
      ? await FixedHeap.load(settings)
      : [await load(settings), undefined];
    if (heap) heap.fixed = standins;
    result.heap = heap;
    const { FS } = mp;
    this.#load(FS);
    this.#devices(FS, heap);
    const kept = new Map(this.files);
    const open = this.#driver(FS, result, options, kept, heap);
    const job = [
      ...(options.boot !== false ? [`execfile("${this.home}/boot.py")`] : []),
      ...(heap ? [`open("/dev/collect", "wb").write(b"x")`] : []),
      code,
    ];
    FS.writeFile("/stand/job.py", job.join("\n"));
    try {
      mp.runPython(this.#setup(heap !== undefined));
      mp.runPython(heap ? FROZEN : `execfile("/stand/job.py")`);
    } catch (error) {
      if (error instanceof PowerCut) result.end = error.end;
      else {
        result.end = "error";
        result.error = String(error instanceof Error ? error.message : error);
      }
    }
    // From here on it is the test that looks at files.
    this.#stopped = true;
    heap?.thaw();
    result.hungry = this.#hungry;
    this.#save(FS, kept);
    if (result.end === "cut") this.#tear(open, options.torn ?? 0);
    return result;
  }

  /** Python that comes before everything else: the modules that stand in for a board's. */
  #setup(all: boolean): string {
    const path = this.kind === "pycom" ? ["", "/flash", "/flash/lib"] : ["", ".frozen", "/lib"];
    return [
      `import sys, os`,
      `sys.path[:] = ${JSON.stringify(["/stand", ...path])}`,
      `os.chdir(${JSON.stringify(this.home || "/")})`,
      `import files, hashes`,
      // Those that are in the heap anyway must be there before it is measured.
      ...(all ? [`import machine, network, socket, time`] : []),
      ...(all && this.kind !== "rp2" ? [`import ${this.kind}`] : []),
      // A stand-in does not come before a module that MicroPython has built in.
      `sys.modules["uos"] = files`,
      `sys.modules["uhashlib"] = hashes`,
      ...(all ? [`import garbage`, `sys.modules["gc"] = garbage`, `del garbage`] : []),
      `del sys, os, files, hashes`,
    ].join("\n");
  }

  async #standinBytes(): Promise<number> {
    const lines: string[] = [];
    const mp = await load({ heapsize: 128 * 1024, stdout: (line) => void lines.push(line) });
    this.#load(mp.FS);
    const say = () => mp.runPython("import gc\nprint(gc.mem_alloc())");
    for (const _ of [1, 2]) say();
    mp.runPython(this.#setup(true));
    for (const _ of [1, 2]) say();
    return Number(lines.at(-1)) - Number(lines[1]);
  }

  /** Starts the board until it stays up, and runs `code` then; returns all that was printed. */
  async settle(code = "", limit = 8): Promise<string[]> {
    const output: string[] = [];
    for (let i = 0; i < limit; i++) {
      const { end, output: lines, error } = await this.start(code);
      output.push(...lines, ...(error ? [error] : []));
      if (end === "done") return output;
    }
    throw new Error(`the board resets for ever:\n${output.join("\n")}`);
  }

  #load(FS: FileSystem): void {
    for (const path of [...this.directories].sort()) FS.mkdir(path);
    for (const [path, content] of this.files) FS.writeFile(path, content);
    FS.mkdir("/stand");
    for (const [name, code] of STANDINS) {
      const [of, own] = name.split("/");
      if (own === undefined || of === this.kind) FS.writeFile(`/stand/${own ?? name}`, code);
    }
    const now = this.now.match(/\d+/g)!.map(Number).join(", ");
    FS.writeFile("/stand/setting.py", `JOIN_MS = ${this.joins}\nNOW = (${now})\n`);
  }

  /** @param kept the content of files that have not changed since it was read */
  #save(FS: FileSystem, kept: ReadonlyMap<string, Uint8Array>): void {
    this.files = new Map();
    this.directories = new Set();
    // From node to node: to look each path up again takes longer.
    const walk = (directory: FileNode, at: string) => {
      for (const [name, node] of Object.entries(directory.contents as Record<string, FileNode>)) {
        if (at === "" && NOT_FLASH.has(name) && name !== "hw") continue;
        const path = `${at}/${name}`;
        if (FS.isDir(node.mode)) {
          this.directories.add(path);
          walk(node, path);
        } else this.files.set(path, kept.get(path) ?? new Uint8Array(FS.readFile(path)));
      }
    };
    walk(FS.root, "");
  }

  /** A file that was open for writing: as far as it got, half, empty, or not there at all. */
  #tear(open: Set<string>, torn: number): void {
    for (const path of open) {
      const content = this.files.get(path);
      if (!content || path.startsWith("/hw/")) continue;
      if (torn % 4 === 1) this.files.set(path, content.slice(0, content.length >> 1));
      if (torn % 4 === 2) this.files.set(path, new Uint8Array(0));
      if (torn % 4 === 3) this.files.delete(path);
    }
  }

  /**
   * Counts and disturbs what Python does to files. Returns the paths that are open for writing.
   *
   * @param kept the content of files that nothing has changed; it loses what changes
   */
  #driver(
    FS: FileSystem,
    result: Start,
    options: Options,
    kept: Map<string, Uint8Array>,
    heap: FixedHeap | undefined,
  ): Set<string> {
    const open = new Set<string>();
    const paths = new Map<Stream, string>();
    const isFlash = (path: string) => path !== "/stand" && !/^\/(dev|stand)\//.test(path);
    const step = (words: string) => {
      const nth = result.operations.length;
      if (options.watch) {
        this.#stopped = true;
        const now = this.copy();
        now.#save(FS, kept);
        for (const [path, content] of now.files) if (!open.has(path)) kept.set(path, content);
        for (const path of open) now.#tear(new Set([path]), nth);
        options.watch(now);
        this.#stopped = false;
      }
      if (nth === options.cutAt) throw new PowerCut("cut");
      result.operations.push(words);
      pass(PACE.operation);
      if (nth === options.failAt || (options.failOn && nth > (options.failAt ?? Infinity))) {
        throw new FS.ErrnoError(ERRNO.EIO);
      }
    };
    const pass = (milliseconds: number) => {
      if (this.slow) this.#pass(milliseconds);
    };
    const used = () => {
      let sum = 0;
      const walk = (at: string) => {
        for (const name of FS.readdir(at || "/")) {
          if (name === "." || name === ".." || (at === "" && NOT_FLASH.has(name))) continue;
          const stat = FS.stat(`${at}/${name}`);
          if (FS.isDir(stat.mode)) walk(`${at}/${name}`);
          else sum += stat.size;
        }
      };
      walk("");
      return sum;
    };
    const original = {
      open: FS.open,
      close: FS.close,
      read: FS.read,
      write: FS.write,
      rename: FS.rename,
      stat: FS.stat,
      unlink: FS.unlink,
      mkdir: FS.mkdir,
      rmdir: FS.rmdir,
    };
    FS.open = (path, flags, mode) => {
      const writes = typeof flags === "number" && (flags & WRITES) !== 0 && isFlash(path);
      if (writes && (Number(flags) & CREATES) !== 0) step(`create ${path}`);
      if (path.endsWith("/.ota/manifest") && !writes) result.passes++;
      const stream = original.open(path, flags, mode);
      if (writes) {
        kept.delete(path);
        open.add(path);
        paths.set(stream, path);
      }
      return stream;
    };
    FS.write = (stream, buffer, offset, length, position) => {
      const path = paths.get(stream);
      if (path !== undefined) {
        step(`write ${path} ${length}`);
        pass(length * PACE.byteWritten);
        if (
          this.capacity < Infinity &&
          !path.startsWith("/hw/") &&
          used() + length > this.capacity
        ) {
          throw new FS.ErrnoError(ERRNO.ENOSPC);
        }
      }
      return original.write(stream, buffer, offset, length, position);
    };
    FS.close = (stream) => {
      const path = paths.get(stream);
      if (path !== undefined) {
        step(`close ${path}`);
        paths.delete(stream);
        open.delete(path);
      }
      original.close(stream);
    };
    FS.read = (stream, buffer, offset, length, position) => {
      // The manifest is read piece by piece and nothing else happens meanwhile.
      const manifest = stream.path?.endsWith("/.ota/manifest");
      if (manifest) heap?.collect();
      const n = original.read(stream, buffer, offset, length, position);
      if (isFlash(stream.path ?? "")) pass(n * (manifest ? PACE.byteOfManifest : PACE.byteRead));
      return n;
    };
    let looks = 0;
    FS.stat = (path) => {
      // Not while modules are imported: what the compiler works on is not on the stack of Python.
      if (path.includes("/.ota/") && looks++ % 4 === 0) heap?.collect();
      if (isFlash(path)) pass(PACE.look);
      return original.stat(path);
    };
    FS.rename = (from, to) => {
      step(`rename ${from} ${to}`);
      const top = (path: string) =>
        path.startsWith("/sd/") ? "/sd" : path.startsWith("/hw/") ? "/hw" : "";
      if (top(from) !== top(to)) throw new FS.ErrnoError(ERRNO.EXDEV);
      // FAT, as Pycom's boards have it, does not rename over a file.
      if (this.kind === "pycom" && top(from) !== "/hw" && FS.analyzePath(to).exists) {
        throw new FS.ErrnoError(ERRNO.EEXIST);
      }
      original.rename(from, to);
      const isDirectory = !kept.delete(from);
      if (isDirectory) kept.clear();
      kept.delete(to);
    };
    FS.unlink = (path) => {
      step(`remove ${path}`);
      original.unlink(path);
      kept.delete(path);
    };
    FS.mkdir = (path, mode) => {
      step(`mkdir ${path}`);
      return original.mkdir(path, mode);
    };
    FS.rmdir = (path) => {
      step(`rmdir ${path}`);
      original.rmdir(path);
    };
    return open;
  }

  #devices(FS: FileSystem, heap: FixedHeap | undefined): void {
    let major = 64;
    const device = (path: string, ops: Parameters<FileSystem["registerDevice"]>[1]) => {
      const id = FS.makedev(major++, 0);
      FS.registerDevice(id, ops);
      FS.mkdev(path, 0o666, id);
    };
    device("/dev/freeze", {
      write: (_stream, _buffer, _offset, length) => {
        heap?.freeze();
        return length;
      },
    });
    device("/dev/collect", {
      write: (_stream, _buffer, _offset, length) => {
        heap?.collect();
        return length;
      },
    });
    device("/dev/power", {
      write: (_stream, buffer, offset) => {
        throw new PowerCut(buffer[offset] === 0x72 ? "reset" : "error");
      },
    });
    const words = (buffer: Int8Array, offset: number, length: number) =>
      Buffer.from(buffer.slice(offset, offset + length)).toString();
    /** A device that says one thing each time it is opened. */
    const answer = (say: () => Uint8Array) => {
      let said = false;
      return {
        open: () => void (said = false),
        read: (_stream: Stream, buffer: Int8Array, offset: number) => {
          if (said) return 0;
          said = true;
          const bytes = say();
          buffer.set(bytes, offset);
          return bytes.length;
        },
      };
    };
    device("/dev/clock", {
      write: (_stream, buffer, offset, length) => {
        this.#pass(Number(words(buffer, offset, length)));
        return length;
      },
      ...answer(() => Buffer.from(String(Math.trunc(this.#clock)))),
    });
    device("/dev/dog", {
      write: (_stream, buffer, offset, length) => {
        const order = words(buffer, offset, length);
        if (order !== "feed") this.#dog = Number(order);
        this.#fed = this.#clock;
        return length;
      },
    });
    device("/dev/late", {
      write: (_stream, buffer, offset, length) => {
        this.link.waited(Number(words(buffer, offset, length)));
        return length;
      },
    });
    device("/dev/tls", {
      write: (_stream, buffer, offset, length) => {
        const bytes = Buffer.from(buffer.slice(offset, offset + length));
        const end = bytes.indexOf("\n");
        const ok = this.link.secure(bytes.subarray(0, end).toString(), bytes.subarray(end + 1));
        if (!ok) throw new FS.ErrnoError(ERRNO.EIO);
        return length;
      },
    });
    device("/dev/radio", {
      write: (_stream, buffer, offset, length) => {
        this.uplinks.push(new Uint8Array(buffer.slice(offset, offset + length)));
        if (this.uplinks.length >= this.uplinksLeft) throw new PowerCut("done");
        return length;
      },
      ...answer(() => this.downlinks.shift() ?? new Uint8Array(0)),
    });
    let named = false;
    let rest: Uint8Array | undefined;
    device("/dev/tcp", {
      open: () => {
        named = false;
        rest = undefined;
        if (this.link.deaf()) throw new FS.ErrnoError(110);
        if (!this.link.open()) throw new FS.ErrnoError(111);
      },
      close: () => this.link.close(),
      write: (_stream, buffer, offset, length) => {
        // The first line names the address; this network has only one server.
        if (named) this.link.send(new Uint8Array(buffer.slice(offset, offset + length)));
        named = true;
        return length;
      },
      read: (_stream, buffer, offset, length) => {
        if (rest === undefined) {
          heap?.collect();
          const late = Math.min(this.link.late(), 0xff);
          const piece = late > 0 ? undefined : this.link.receive();
          const size = piece?.length ?? 0xff00 + late;
          buffer.set([size >> 8, size & 0xff], offset);
          if (piece && size > 0) rest = piece;
          return 2;
        }
        const now = rest.slice(0, length);
        buffer.set(now, offset);
        rest = now.length < rest.length ? rest.slice(now.length) : undefined;
        return now.length;
      },
    });
  }
}

function text(content: string): Uint8Array {
  return content.startsWith("\xe9")
    ? Buffer.from(content, "latin1")
    : new TextEncoder().encode(content);
}

/** With a fixed heap there may be no room to hand an exception to JavaScript. */
const FROZEN = `
open("/dev/freeze", "wb").write(b"x")
try:
    execfile("/stand/job.py")
except Exception as e:
    import sys
    sys.print_exception(e)
    open("/dev/power", "wb").write(b"error")
`;

const STANDINS = new Map<string, string>();
for (const name of new Bun.Glob("**/*.py").scanSync(standins)) {
  STANDINS.set(name, await Bun.file(join(standins, name)).text());
}
