/**
 * Patches written by hand, and applied as a device does: by another hand than ota.ts writes them, and
 * so that also what no encoder would write can be tried.
 */

import { applyPatch } from "../../ota.ts";
import { sha256 } from "./content.ts";

/** An unsigned LEB128. */
export function number(value: number | bigint): number[] {
  const bytes = [];
  let left = BigInt(value);
  for (; left >= 128n; left >>= 7n) bytes.push(Number(left & 127n) | 128);
  return [...bytes, Number(left)];
}

/** A signed one. */
export function signed(value: number): number[] {
  return number(value < 0 ? -2 * value - 1 : 2 * value);
}

/** A table: from which address on what is added. */
export type Table = readonly (readonly [from: number, add: number])[];

function table(entries: Table): number[] {
  const from = (k: number) => entries[k]?.[0] ?? 0;
  const bytes = entries.flatMap(([at, add], k) => [...number(at - from(k - 1)), ...signed(add)]);
  return [...number(entries.length), ...bytes];
}

/** What is predicted. */
export interface Predicted {
  architecture: 0 | 1 | 2 | 3 | 4;
  code?: readonly (readonly [start: number, end: number])[];
  absolute?: Table;
  relative?: Table;
}

/** The header, and the tables. */
export function start(
  old: Uint8Array,
  newSize: number | bigint,
  { architecture, code = [], absolute = [], relative = [] }: Predicted = { architecture: 0 },
): number[] {
  const end = (k: number) => code[k]?.[1] ?? 0;
  const ranges = code.flatMap(([from, to], k) => [
    ...number(from - end(k - 1)),
    ...number(to - from),
  ]);
  return [
    ...[0x89, 0x4f, 0x54, 0x50, 1],
    ...number(old.length),
    ...number(newSize),
    ...Buffer.from(sha256(old), "hex"),
    ...new Uint8Array(32),
    architecture,
    ...(architecture > 1 ? [...number(code.length), ...ranges] : []),
    ...(architecture > 0 ? table(absolute) : []),
    ...(architecture > 1 ? table(relative) : []),
  ];
}

/** A segment without inserted bytes: `length` bytes are copied as predicted. */
export function copy(seek: number, length: number): number[] {
  return [0, ...signed(seek), ...number(length * 4)];
}

/** Copies one byte from each of two blocks in turn, so that each is predicted anew. */
export function hop(count: number): number[] {
  const seek = (k: number) => (k === 0 ? 0 : k % 2 ? 2000 : -2002);
  return Array.from({ length: count }, (_, k) => copy(seek(k), 1)).flat();
}

/** What a device does with a patch. */
export interface Applied {
  content: Uint8Array;
  /** How many pieces it came in. */
  pieces: number;
  /** How many bytes of old content were read, some of them often. */
  read: number;
}

/**
 * Applies a patch; also throws when it reads beyond the old content, or makes more than the limit.
 */
export function apply(patch: Uint8Array, old: Uint8Array, limit = 2 ** 23): Applied {
  let read = 0;
  const dictionary = {
    size: old.length,
    sha256: sha256(old),
    read: (from: number, length: number) => {
      if (!(from >= 0 && length >= 0 && from + length <= old.length)) {
        throw new TypeError(`it reads ${length} bytes at ${from} of ${old.length}`);
      }
      read += length;
      return old.subarray(from, from + length);
    },
  };
  const pieces: Uint8Array[] = [];
  let size = 0;
  for (const piece of applyPatch(patch, limit, dictionary)) {
    pieces.push(piece);
    size += piece.length;
    if (size > limit) throw new TypeError(`it makes ${size} bytes, and the limit is ${limit}`);
  }
  return { content: new Uint8Array(Buffer.concat(pieces)), pieces: pieces.length, read };
}

/** What a device makes of a patch that someone meddled with: content, or why it has none. */
export function received(
  patch: Uint8Array,
  old: Uint8Array,
  content: Uint8Array,
): "right" | "another hash" | `refused: ${string}` {
  try {
    const made = apply(patch, old, content.length).content;
    return sha256(made) === sha256(content) ? "right" : "another hash";
  } catch (error) {
    // Anything but an `Error` itself is a fault in the decoder, or was thrown by `apply`.
    if (!(error instanceof Error) || error.constructor !== Error) throw error;
    return `refused: ${error.message}`;
  }
}
