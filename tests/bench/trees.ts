/** Release roots of given sizes, with the same content on every run. */

import * as fs from "node:fs";
import { Random } from "../helpers/random.ts";
import { put } from "./harness.ts";

const POOL_BYTES = 4 * 1024 * 1024;
let pool: Uint8Array | undefined;

/** Bytes that do not compress; other ones for every `seed`. */
export function noise(size: number, seed: number): Uint8Array {
  const random = new Random(seed);
  pool ??= freshNoise(POOL_BYTES, 1);
  if (size > POOL_BYTES / 2) throw new Error(`noise of ${size} bytes is more than there is`);
  const bytes = pool.slice(random.below(POOL_BYTES - size), POOL_BYTES).subarray(0, size);
  // No two alike, wherever in the pool they come from.
  const mark = new TextEncoder().encode(`${seed}:`);
  bytes.set(mark.subarray(0, Math.min(size, mark.length)));
  return bytes;
}

/** Bytes that do not compress, and have nothing in common with those of another seed. */
export function freshNoise(size: number, seed: number): Uint8Array {
  const random = new Random(seed);
  const words = new Uint32Array(Math.ceil(size / 4));
  for (let i = 0; i < words.length; i++) words[i] = random.below(2 ** 32);
  return new Uint8Array(words.buffer, 0, size);
}

/** A file of any size that does not compress. */
export async function writeLargeNoise(path: string, size: number): Promise<void> {
  const fd = fs.openSync(path, "w");
  for (let left = size, seed = 1; left > 0; seed++) {
    const piece = noise(Math.min(left, 1024 * 1024), seed);
    left -= fs.writeSync(fd, piece);
    if (seed % 16 === 0) await Bun.sleep(0); // For Ctrl-C.
  }
  fs.closeSync(fd);
}

/** Python as a device's sources are: a page or four each, alike and not the same. */
export function source(seed: number): string {
  const random = new Random(seed);
  const words = ["meter", "pulse", "tariff", "valve", "uplink", "phase", "probe", "relay", "frame"];
  const verbs = ["read", "send", "store", "check", "scale", "reset", "merge", "parse", "queue"];
  const name = () => `${random.pick(verbs)}_${random.pick(words)}`;
  const lines = [`"""${name()}: part ${seed} of the ${random.pick(words)} driver."""`, ""];
  lines.push("import time", "import struct", `from lib.${random.pick(words)} import ${name()}`, "");
  for (let count = 8 + random.below(24); count > 0; count--) {
    const [a, b] = [random.pick(words), random.pick(words)];
    lines.push(
      "",
      `def ${name()}_${random.below(1000)}(${a}, ${b}=None, timeout=${random.below(60)}):`,
      `    """Wait for the ${a} and return its ${b}, or None when it is late."""`,
      `    started = time.ticks_ms()`,
      `    while time.ticks_diff(time.ticks_ms(), started) < timeout * 1000:`,
      `        raw = ${a}.readfrom_mem(0x${random.below(128).toString(16)}, ${1 + random.below(8)})`,
      `        value = struct.unpack("<${random.pick(["h", "H", "i", "I"])}", raw)[0]`,
      `        if value != 0x${random.below(65536).toString(16)}:`,
      `            return value * ${random.below(1000) / 1000} + ${name()}(${b})`,
      `        time.sleep_ms(${random.below(500)})`,
      `    return None`,
    );
  }
  return `${lines.join("\n")}\n`;
}

/** A source after a small fix: two lines changed, one added. */
export function fixed(text: string): string {
  const lines = text.split("\n");
  const at = Math.floor(lines.length / 2);
  lines[at] = `${lines[at] ?? ""}  # was off by one`;
  lines[at + 3] = `${lines[at + 3] ?? ""}  # see the data sheet, 4.2`;
  lines.splice(at + 5, 0, "    gc.collect()");
  return lines.join("\n");
}

/** The paths and contents of a release of sources: path → text. */
export function sources(count: number): Map<string, string> {
  const path = (i: number) =>
    i % 4 === 0 ? `flash/part_${i}.py` : `flash/lib/${i % 10}/part_${i}.py`;
  return new Map(Array.from({ length: count }, (_, i) => [path(i), source(i)]));
}

/** The same release with the first lines of work done on some of its files. */
export function withFixes(files: ReadonlyMap<string, string>, count: number): Map<string, string> {
  const step = Math.floor(files.size / count);
  return new Map(
    [...files].map(([path, text], i) => {
      const changes = i % step === 0 && i < step * count;
      return [path, changes ? fixed(text) : text];
    }),
  );
}

/** Writes a release. */
export function writeFiles(
  directory: string,
  files: Iterable<readonly [path: string, data: string | Uint8Array]>,
): void {
  for (const [path, data] of files) put(`${directory}/${path}`, data);
}
