/**
 * Firmware as compilers make it: functions that call each other and refer to data by its address, so
 * that all of that changes when one function grows. Only as true as a patch needs: the instructions
 * that hold addresses are what the manuals say, and the others have plausible first bytes.
 */

import { noise } from "./content.ts";
import { Random } from "./random.ts";

/** A kind of processor. */
export type Chip = "thumb" | "xtensa" | "riscv";

export const CHIPS: readonly Chip[] = ["thumb", "xtensa", "riscv"];

/** What a function consists of: instructions, a call of a function, or the address of some data. */
type Item = { bytes: Uint8Array } | { call: number } | { data: number };

/** A program before it is linked. */
export interface Program {
  chip: Chip;
  functions: Item[][];
  data: Uint8Array[];
}

/** Where a program is loaded: code, and data. */
const LOADED: Record<Chip, { code: number; data: number }> = {
  thumb: { code: 0x08000000, data: 0x20000000 },
  xtensa: { code: 0x400d0020, data: 0x3f400020 },
  riscv: { code: 0x42000020, data: 0x3c090020 },
};

/** Some instructions without addresses. */
function filler(chip: Chip, random: Random): Item {
  const bytes: number[] = [];
  for (let left = 2 + random.below(12); left > 0; left--) {
    if (chip === "thumb") bytes.push(random.below(256), random.below(0xe0));
    else if (chip === "xtensa" && random.chance(0.5)) {
      bytes.push(random.pick([0x0d, 0x1d, 0x38, 0x49, 0x8a]), random.below(256));
    } else if (chip === "xtensa") {
      bytes.push(random.pick([0x22, 0x60, 0xc2, 0x17]), random.below(256), random.below(256));
    } else if (random.chance(0.5)) bytes.push(random.pick([0x01, 0x22, 0x85]), random.below(256));
    else bytes.push(random.pick([0x33, 0x63, 0x13]), ...noise(3, random.below(2 ** 32)));
  }
  return { bytes: Uint8Array.from(bytes) };
}

function newFunction(chip: Chip, functions: number, data: number, random: Random): Item[] {
  const items: Item[] = [];
  for (let left = 2 + random.below(6); left > 0; left--) {
    items.push(filler(chip, random));
    items.push(
      random.chance(0.6) ? { call: random.below(functions) } : { data: random.below(data) },
    );
  }
  items.push(filler(chip, random));
  return items;
}

/** A program of so many functions. */
export function program(chip: Chip, functions: number, seed: number): Program {
  const random = new Random(seed);
  const count = Math.ceil(functions / 2);
  return {
    chip,
    functions: Array.from({ length: functions }, () => {
      return newFunction(chip, functions, count, random);
    }),
    data: Array.from({ length: count }, () => noise(4 * (1 + random.below(12)), random.below(9e9))),
  };
}

/** The next release: some functions grow, and some data does. */
export function revised({ chip, functions, data }: Program, edits: number, seed: number): Program {
  const random = new Random(seed);
  const next = { chip, functions: functions.map((items) => [...items]), data: [...data] };
  for (let edit = 0; edit < edits; edit++) {
    const items = random.pick(next.functions);
    items.splice(random.below(items.length), 0, filler(chip, random));
    if (random.chance(0.7)) continue;
    const at = random.below(data.length);
    next.data[at] = Buffer.concat([next.data[at]!, noise(4 + 4 * random.below(9), edit)]);
  }
  return next;
}

/** The size of an item in code. */
function sizeOf(item: Item, chip: Chip): number {
  if ("bytes" in item) return item.bytes.length;
  if (chip === "riscv") return "call" in item ? 4 : 8;
  return chip === "xtensa" ? 3 : "call" in item ? 4 : 2;
}

const align = (at: number) => (at + 3) & ~3;

/** Where data begins in memory, each item. */
function placeData({ chip, data }: Program): number[] {
  let end = LOADED[chip].data;
  return data.map((bytes) => (end += bytes.length) - bytes.length);
}

/** Links a program: code, with the addresses of data beside each function; then data. */
export function linked(program: Program): Uint8Array {
  const { chip, functions, data } = program;
  const dataAt = placeData(program);
  const entry = chip === "xtensa" ? 3 : 0;
  const sizes = functions.map((items) => {
    return entry + items.reduce((sum, item) => sum + sizeOf(item, chip), 0);
  });
  /** The words beside a function, in RISC-V none. */
  const words = functions.map((items) =>
    items.flatMap((item) => ("data" in item && chip !== "riscv" ? [dataAt[item.data]!] : [])),
  );
  const starts: number[] = [];
  let end = 0;
  for (const [k, size] of sizes.entries()) {
    const pool = 4 * words[k]!.length;
    starts.push(chip === "xtensa" ? end + pool : end);
    end = align(end + (chip === "xtensa" ? pool : 0) + size) + (chip === "thumb" ? pool : 0);
  }
  const image = Buffer.alloc(end);
  for (const [k, items] of functions.entries()) {
    let at = starts[k]!;
    let word = chip === "xtensa" ? at - 4 * words[k]!.length : align(at + sizes[k]!);
    words[k]!.forEach((address, i) => image.writeUInt32LE(address, word + 4 * i));
    if (chip === "xtensa") image.set([0x36, 0x41, 0x00], at);
    at += entry;
    for (const item of items) {
      if ("bytes" in item) image.set(item.bytes, at);
      else if ("call" in item) putCall(chip, image, at, starts[item.call]!);
      else if (chip === "riscv") putAddress(image, at, dataAt[item.data]!);
      else if (chip === "thumb") image.set([0, 0x48], at);
      else {
        putLiteral(image, at, word);
        word += 4;
      }
      at += sizeOf(item, chip);
    }
  }
  return new Uint8Array(Buffer.concat([image, ...data]));
}

/** BL, CALL8, or JAL with the return address in `ra`. */
function putCall(chip: Chip, image: Buffer, at: number, target: number): void {
  if (chip === "thumb") {
    const offset = target - at - 4;
    const sign = offset < 0 ? 1 : 0;
    const [first, second] = [(offset >> 23) & 1, (offset >> 22) & 1].map((bit) => 1 ^ bit ^ sign);
    image.writeUInt16LE(0xf000 | (sign << 10) | ((offset >> 12) & 0x3ff), at);
    image.writeUInt16LE(
      0xd000 | (first! << 13) | (second! << 11) | ((offset >> 1) & 0x7ff),
      at + 2,
    );
  } else if (chip === "xtensa") {
    const offset = (target - (at & ~3) - 4) >> 2;
    image.writeUIntLE(((offset & 0x3ffff) << 6) | 0x25, at, 3);
  } else {
    const offset = target - at;
    const low = (((offset >> 1) & 0x3ff) << 21) | (((offset >> 11) & 1) << 20);
    const high = (((offset >> 20) & 1) << 31) | (((offset >> 12) & 0xff) << 12);
    image.writeInt32LE(low | high | (1 << 7) | 0x6f, at);
  }
}

/** L32R of a literal before it. */
function putLiteral(image: Buffer, at: number, literal: number): void {
  const offset = (literal - ((at + 3) & ~3)) >> 2;
  image.writeUIntLE(((offset & 0xffff) << 8) | 0x81, at, 3);
}

/** LUI and ADDI. */
function putAddress(image: Buffer, at: number, address: number): void {
  image.writeInt32LE(((address + 0x800) & ~0xfff) | (10 << 7) | 0x37, at);
  image.writeInt32LE((address << 20) | (10 << 15) | (10 << 7) | 0x13, at + 4);
}

/** An image as Espressif's chips load it: a header, and the segments for data and code. */
export function espImage(chip: "xtensa" | "riscv", segments: Uint8Array[]): Uint8Array {
  const { code, data } = LOADED[chip];
  const header = Buffer.alloc(24);
  header.set([0xe9, segments.length, 2, 0x20]);
  header.writeUInt32LE(code + 0x1234, 4);
  header.writeUInt16LE(chip === "xtensa" ? 0 : 5, 12);
  const parts = segments.flatMap((bytes, k) => {
    const head = Buffer.alloc(8);
    head.writeUInt32LE(k % 2 === 0 ? code : data, 0);
    head.writeUInt32LE(bytes.length, 4);
    return [head, bytes];
  });
  return new Uint8Array(Buffer.concat([header, ...parts]));
}
