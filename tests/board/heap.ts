// A heap like a board's, for MicroPython in WebAssembly.
//
// There, the heap grows when it is full, and garbage is collected only between two calls from
// JavaScript: the collector cannot see WebAssembly's own stack. On a board the heap has a fixed
// size, and is collected when it is full. Here the heap is kept from growing, and collected at
// moments that the test chooses: inside a file operation that Python called, where everything that
// lives is reachable from MicroPython's own stack of Python frames. A board collects more often
// than that, so what fits here fits there.
import { loadMicroPython, type MicroPython } from "@micropython/micropython-webassembly-pyscript";

type Options = Parameters<typeof loadMicroPython>[0];

let latest: WebAssembly.Memory | undefined;
let compiled: WebAssembly.Module | undefined;

/** As loadMicroPython(); compiles it once only, and remembers its memory for the functions below. */
export async function load(options: Options): Promise<MicroPython> {
  const original = WebAssembly.instantiate;
  const wrapped = async (bytes: ArrayBuffer, imports: Bun.WebAssembly.Imports) => {
    compiled ??= await WebAssembly.compile(bytes);
    const instance = new WebAssembly.Instance(compiled, imports);
    latest = instance.exports.memory as WebAssembly.Memory;
    return { instance, module: compiled };
  };
  WebAssembly.instantiate = wrapped as typeof original;
  try {
    return await loadMicroPython(options);
  } finally {
    WebAssembly.instantiate = original;
  }
}

/** Where the interpreter counts how deep calls from JavaScript are nested; it collects at 0. */
let depthAt: number | undefined;

async function findDepth(): Promise<number> {
  const mp = await load({ heapsize: 64 * 1024 });
  const memory = latest!;
  const look = () => new Int32Array(memory.buffer.slice(0));
  const seen: Int32Array[] = [];
  const code = "f = open('/dev/probe', 'wb')\nf.write(b'x')\nf.close()";
  const id = mp.FS.makedev(64, 0);
  mp.FS.registerDevice(id, {
    write: (_stream, _buffer, _offset, length) => {
      seen.push(look());
      if (seen.length < 3) mp.runPython(code);
      return length;
    },
  });
  mp.FS.mkdev("/dev/probe", 0o666, id);
  mp.runPython("0");
  const before = look();
  mp.runPython(code);
  const found: number[] = [];
  for (let i = 0; i < before.length; i++) {
    if (before[i] === 0 && seen.every((words, depth) => words[i] === depth + 1)) found.push(i);
  }
  if (found.length !== 1) throw new Error(`found ${found.length} places for the depth of calls`);
  return found[0]!;
}

const MEMO = `
import gc
def _memo(gc=gc):
    f = open("/dev/memo", "wb")
    f.write(b"%d" % gc.mem_alloc())
    f.close()
    gc.collect()
`;

const OUTSIDE = 8 * 1024;

export class OutOfMemory extends Error {
  override name = "OutOfMemory";
}

export class FixedHeap {
  /** The most bytes that were alive after a collection. */
  live = 0;
  /** The most bytes that were taken before one, garbage and all. */
  taken = 0;
  collections = 0;
  /** Bytes that do not count: the heap is larger by that. */
  fixed = 0;
  #mp: MicroPython;
  #memory: WebAssembly.Memory;
  #reserve = 0;
  #frozen = false;
  #grow = WebAssembly.Memory.prototype.grow;
  #memo = 0;

  /**
   * Loads an interpreter that has `heapsize` bytes and no more. A part of them stays outside the
   * heap, since here even listing a directory takes memory from there.
   */
  static async load(options: Options & { heapsize: number }): Promise<[MicroPython, FixedHeap]> {
    depthAt ??= await findDepth();
    // What Emscripten does when it gets no memory is to say so on the console, from where the call
    // of Python can be left: MicroPython itself hangs when its heap is full to the last byte.
    const error = console.error;
    let heap: FixedHeap | undefined;
    console.error = () => {
      if (heap && heap.#frozen) throw new OutOfMemory("the heap is full");
    };
    try {
      const mp = await load({ ...options, heapsize: options.heapsize - OUTSIDE });
      heap = new FixedHeap(mp);
      return [mp, heap];
    } finally {
      console.error = error;
    }
  }

  private constructor(mp: MicroPython) {
    this.#mp = mp;
    this.#memory = latest!;
    const id = mp.FS.makedev(63, 0);
    mp.FS.registerDevice(id, {
      write: (_stream, buffer, offset, length) => {
        this.#memo = Number(Buffer.from(buffer.slice(offset, offset + length)).toString());
        return length;
      },
    });
    mp.FS.mkdev("/dev/memo", 0o666, id);
    mp.runPython(MEMO);
  }

  /** Takes all memory outside the heap away. */
  freeze(): void {
    this.#reserve = this.#mp._module._malloc(256);
    const outside = this.#mp._module._malloc(OUTSIDE);
    WebAssembly.Memory.prototype.grow = () => {
      throw new RangeError("this heap does not grow");
    };
    for (let size = 1 << 26; size >= 32;) if (this.#mp._module._malloc(size) === 0) size >>= 1;
    this.#mp._module._free(outside);
    this.#frozen = true;
  }

  thaw(): void {
    this.#frozen = false;
    WebAssembly.Memory.prototype.grow = this.#grow;
  }

  /** Collects garbage, now, in the middle of a call from Python. */
  collect(): void {
    const words = new Int32Array(this.#memory.buffer);
    const depth = words[depthAt!]!;
    this.#mp._module._free(this.#reserve);
    this.#mp.runPython("_memo()");
    const taken = this.#memo;
    words[depthAt!] = 0;
    this.#mp.runPython("_memo()");
    this.#mp.runPython("_memo()");
    words[depthAt!] = depth;
    this.#reserve = this.#mp._module._malloc(256);
    this.live = Math.max(this.live, this.#memo - this.fixed);
    this.taken = Math.max(this.taken, taken - this.fixed);
    this.collections++;
  }
}
