/**
 * Content of the kinds that releases have: what shrinks, what does not, and what changed a little;
 * and its hashes.
 */

import { Random } from "./random.ts";

/** Bytes that no coding makes smaller. */
export function noise(size: number, seed: number): Uint8Array {
  const random = new Random(seed);
  const words = new Uint32Array(Math.ceil(size / 4)).map(() => random.below(2 ** 32));
  return new Uint8Array(words.buffer).slice(0, size);
}

/** Bytes of which a coding leaves about a half, as of machine code. */
export function program(size: number, seed: number): Uint8Array {
  const random = new Random(seed);
  const words = Array.from({ length: 4000 }, () => noise(4, random.below(2 ** 32)));
  const bytes = new Uint8Array(size);
  for (let at = 0; at + 4 <= size; at += 4) bytes.set(random.pick(words), at);
  return bytes;
}

/** The same with a few bytes changed, and some put in between, as of the next build. */
export function edited(content: Uint8Array, seed: number, changes = 4): Uint8Array {
  const random = new Random(seed);
  let bytes = Buffer.from(content);
  for (let change = 0; change < changes; change++) {
    const at = random.below(bytes.length);
    const put = noise(1 + random.below(20), random.below(2 ** 32));
    const rest = bytes.subarray(at + (random.chance(0.5) ? put.length : 0));
    bytes = Buffer.concat([bytes.subarray(0, at), put, rest]);
  }
  return new Uint8Array(bytes);
}

export function sha1(content: string | Uint8Array): string {
  return new Bun.CryptoHasher("sha1").update(content).digest("hex");
}

export function sha256(content: string | Uint8Array): string {
  return new Bun.CryptoHasher("sha256").update(content).digest("hex");
}
