/**
 * Content that patches are made for: bytes that look like machine code and addresses in every odd
 * place, and programs of which two versions differ as two builds of one source do.
 */

import { createHash } from "node:crypto";
import { Random } from "../helpers/random.ts";

export { Random };

/** As in a patch: 0 predicts nothing, 1 words, 2 Thumb-2, 3 Xtensa, 4 RISC-V. */
export type Architecture = 0 | 1 | 2 | 3 | 4;
export const ARCHITECTURES = ["nothing", "words", "Thumb-2", "Xtensa", "RISC-V"] as const;

/** Bytes of which many are instructions with addresses, whole ones and cut ones. */
export function oldContent(architecture: number, size: number, seed: number): Uint8Array {
  const random = new Random(seed);
  const below = (end: number) => random.below(end);
  const bytes = Uint8Array.from({ length: size }, () => below(256));
  const set = (at: number, keep: number, bits: number) => {
    if (at < size) bytes[at] = (bytes[at]! & keep) | bits;
  };
  for (let n = size >> 2; n > 0; n--) {
    const at = below(size);
    const kind = below(10);
    if (kind === 0) {
      const word = random.pick([0x3f400000, 0x400d0000, 0x08000000, 0, 0xfffff000, 0x7ffff000]);
      for (let k = 0, value = word + below(0x2000); k < 4; k++) set((at & ~3) + k, 0, (value >>> (8 * k)) & 255);
    } else if (architecture === 2) {
      if (kind < 5) {
        set(at + 1, 7, 0xf0);
        set(at + 3, 0x2f, 0xd0);
      } else if (kind < 9) set(at, 0x7f, 0);
    } else if (architecture === 3) {
      if (kind < 8) set(at, 0xf0, kind < 4 ? 5 : 1);
      else {
        set((at | 3) + 1, 0, 0x36);
        set((at | 3) + 2, 0xf0, 1);
      }
    } else if (architecture === 4) {
      if (kind < 3) set(at & ~1, 0x80, 0x6f);
      else pairAt(at & ~1, random, set);
    }
  }
  return bytes;
} // prettier-ignore

/** An AUIPC or LUI, and what may complete it. */
function pairAt(
  at: number,
  random: Random,
  set: (at: number, keep: number, bits: number) => void,
): void {
  const register = random.pick([1, 2, 5, 10]);
  set(at, 0, random.pick([0x37, 0x17]) | ((register & 1) << 7));
  set(at + 1, 0xf0, register >> 1);
  let next = at + 4;
  for (let between = random.below(4); between > 0; between--) {
    const isLong = random.chance(0.5);
    set(next, 0x80, isLong ? random.pick([0x33, 0x23, 0x63, 0x13]) : random.pick([0, 1, 2]));
    next += isLong ? 4 : 2;
  }
  for (const _ of [1, 2]) {
    set(next, 0x80, random.pick([0x03, 0x07, 0x13, 0x23, 0x27, 0x67]));
    set(next + 1, random.chance(0.7) ? 0x0f : 0x7f, (register & 1) << 7);
    set(next + 2, 0xf0, register >> 1);
    next += 4;
  }
}

/** What a function of a program does, one after the other. */
type Operation =
  | { do: "other"; bytes: readonly number[] }
  | { do: "call"; target: number }
  | { do: "load"; target: number };

/** Where the code of programs is loaded. */
const LOADED = 0x400d0000;

/**
 * A program: functions that call each other, and behind them a table of pointers to them.
 *
 * @param architecture 2 or more
 * @param more functions that only this version has, by the one that they stand before
 */
export function program(architecture: Architecture, seed: number, more: readonly number[] = []): Uint8Array {
  const random = new Random(seed);
  const count = 120;
  const functions = Array.from({ length: count }, () => operations(architecture, random, count));
  const order = [...functions.keys()];
  for (const before of more) order.splice(order.indexOf(before), 0, -before);
  const extra = (id: number) => operations(architecture, new Random(seed + id), count);
  const bodies = order.map((id) => functions[id] ?? extra(id));
  const starts: number[] = [];
  const at = new Map<number, number>();
  let end = 4 * count;
  bodies.forEach((body, k) => {
    starts.push(end);
    at.set(order[k]!, end);
    const size = body.reduce((sum, one) => sum + sizeOf(architecture, one), architecture === 3 ? 3 : 0);
    end = (end + size + 3) & ~3;
  });
  const bytes = new Uint8Array(end + 4 * count);
  const view = new DataView(bytes.buffer);
  // Xtensa loads from what stands before the code.
  for (const table of [0, end]) {
    for (let id = 0; id < count; id++) view.setUint32(table + 4 * id, LOADED + at.get(id)!, true);
  }
  bodies.forEach((body, k) => {
    let here = starts[k]!;
    const put = (code: readonly number[]) => {
      bytes.set(code, here);
      here += code.length;
    };
    if (architecture === 3) put([0x36, 0x41, 0]);
    for (const one of body) put(assemble(architecture, one, here, at));
  });
  return bytes;
} // prettier-ignore

function operations(architecture: Architecture, random: Random, count: number): Operation[] {
  return Array.from({ length: 8 + random.below(30) }, (): Operation => {
    if (random.chance(0.2)) return { do: "call", target: random.below(count) };
    if (random.chance(0.1)) return { do: "load", target: random.below(count) };
    const byte = () => random.below(256);
    if (architecture === 2) return { do: "other", bytes: [byte(), random.below(0xe8)] };
    if (architecture === 4) return { do: "other", bytes: [0x33, byte() & 0x8f, byte(), byte() & 1] };
    const isShort = random.chance(0.4);
    if (isShort) return { do: "other", bytes: [(byte() & 0xf0) | (8 + random.below(6)), byte()] };
    return { do: "other", bytes: [byte() & 0xf0, byte(), byte()] };
  }); // prettier-ignore
}

function sizeOf(architecture: Architecture, operation: Operation): number {
  if (operation.do === "other") return operation.bytes.length;
  if (operation.do === "call") return architecture === 3 ? 3 : 4;
  return architecture === 3 ? 3 : architecture === 4 ? 8 : 2;
}

const little = (value: number, size: number) =>
  Array.from({ length: size }, (_, k) => (value >>> (8 * k)) & 255);

function assemble(
  architecture: Architecture,
  operation: Operation,
  here: number,
  at: ReadonlyMap<number, number>,
): readonly number[] {
  if (operation.do === "other") return operation.bytes;
  const target = at.get(operation.target)!;
  const isCall = operation.do === "call";
  if (architecture === 3) {
    // CALL8, and L32R of the pointer to it.
    if (isCall) return little(0x25 | (((target - (here & ~3) - 4) >> 2) << 6), 3);
    return little(0x21 | (((4 * operation.target - ((here + 3) & ~3)) >> 2) << 8), 3);
  }
  if (architecture === 2) {
    if (!isCall) return [operation.target, 0x48];
    const offset = target - here - 4;
    const sign = offset < 0 ? 1 : 0;
    const bits = (~((offset >> 23) ^ sign) & 1) << 13 | (~((offset >> 22) ^ sign) & 1) << 11; // prettier-ignore
    const first = 0xf000 | (sign << 10) | ((offset >> 12) & 0x3ff);
    return [...little(first, 2), ...little(0xd000 | bits | ((offset >> 1) & 0x7ff), 2)];
  }
  const offset = target - here;
  if (isCall) {
    // JAL ra.
    const low = ((offset & 0x800) << 9) | ((offset & 0x7fe) << 20);
    return little(0xef | low | (offset & 0xff000) | (offset & 0x80000000), 4);
  }
  // LUI and ADDI of a pointer, or AUIPC and a load from there.
  const isRelative = operation.target % 2 === 0;
  const value = isRelative ? offset : LOADED + target;
  const upper = ((value + 0x800) & ~0xfff) | (10 << 7) | (isRelative ? 0x17 : 0x37);
  const lower = (value << 20) | (10 << 15) | (10 << 7) | (isRelative ? 0x2003 : 0x13);
  return [...little(upper, 4), ...little(lower, 4)];
}

/**
 * An image for an ESP32 (ESP-IDF, "App Image Format").
 *
 * @param segments where each is loaded, and what it is
 * @param chip 0 is an ESP32, 5 an ESP32-C3
 */
export function espImage(segments: readonly (readonly [address: number, content: Uint8Array])[], chip: number, hasDigest = true): Uint8Array {
  const header = new Uint8Array(24);
  header.set([0xe9, segments.length, 2, 0x20]);
  header[12] = chip;
  header[23] = hasDigest ? 1 : 0;
  const parts: Uint8Array[] = [header];
  for (const [address, content] of segments) {
    parts.push(Uint8Array.from([...little(address, 4), ...little(content.length, 4)]), content);
  }
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  parts.push(new Uint8Array((length | 15) + 1 - length));
  const image = Buffer.concat(parts);
  const digest = createHash("sha256").update(image).digest();
  return new Uint8Array(hasDigest ? Buffer.concat([image, digest]) : image);
} // prettier-ignore
