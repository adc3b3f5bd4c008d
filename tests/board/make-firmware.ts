// Makes the binary files of examples/smart-meter, always the same bytes:
//
//   bun tests/board/make-firmware.ts
//
// The images look like what a firmware build leaves (an ESP32 image header, code, a string
// table, padding) and are as alike as two builds of one source: 1.0.1 differs in its version, in
// one function, and in a string that got longer and so moved what follows it. The pictures are
// binary PBM, the format that a display driver reads with a dozen lines.
import { join } from "node:path";

/** Bytes that look like machine code: repeatable, repetitive in part, not compressible to nothing. */
function code(length: number, seed: number): Uint8Array {
  const out = new Uint8Array(length);
  let state = seed;
  const next = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  };
  for (let i = 0; i < length;) {
    const from = next() % (i + 1);
    if (i > 64 && next() % 3 === 0) {
      for (let n = 8 + (next() % 40), j = from; n > 0 && i < length; n--) out[i++] = out[j++]!;
    } else {
      for (let n = 4 + (next() % 12); n > 0 && i < length; n--) out[i++] = next() & 0xff;
    }
  }
  return out;
}

/** One firmware image: header, code, strings, and the code that stands behind them. */
export function firmware(version: string): Uint8Array {
  const newer = version !== "1.0.0";
  const header = new Uint8Array(32);
  header.set([0xe9, 2, 2, 0x20]); // magic byte, segments, flash mode, flash size
  header.set([0x80, 0x10, 0x08, 0x40], 4); // entry point
  const body = code(4000, 0x5eed1);
  if (newer) body.set(code(150, 0x5eed2), 1200);
  const strings = [
    `smart-meter firmware ${version}\0`,
    "no joined network\0",
    newer ? "flash sector erased, retrying twice\0" : "flash sector erased\0",
    "watchdog\0heap exhausted\0i2c timeout\0",
  ].join("");
  const text = new TextEncoder().encode(strings);
  return Buffer.concat([header, body, text, code(1900, 0x5eed3)]);
}

/** A binary PBM picture; `ink` says where it is dark. */
function picture(
  width: number,
  height: number,
  ink: (x: number, y: number) => boolean,
): Uint8Array {
  const row = width / 8;
  const bits = new Uint8Array(row * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) if (ink(x, y)) bits[y * row + (x >> 3)]! |= 0x80 >> (x & 7);
  }
  return Buffer.concat([new TextEncoder().encode(`P4\n${width} ${height}\n`), bits]);
}

/** A drop of water, its tip at (x0, y0 - 2r). */
const drop = (x0: number, y0: number, r: number) => (x: number, y: number) =>
  (x - x0) ** 2 + (y - y0) ** 2 <= r * r ||
  (y < y0 && y > y0 - 2 * r && Math.abs(x - x0) * 2.2 < y - y0 + 2 * r);

/** Every binary file of the example, by its path in the release root. */
export function binaries(): Map<string, Uint8Array> {
  const big = drop(32, 20, 9);
  const small = drop(12, 24, 5);
  const frame = (x: number, y: number) => x === 0 || y === 0 || x === 63 || y === 31;
  return new Map([
    ["firmware_1.0.0.bin", firmware("1.0.0")],
    ["firmware_1.0.1.bin", firmware("1.0.1")],
    ["1.0.0/sd/logo.pbm", picture(64, 32, (x, y) => big(x, y) || frame(x, y))],
    ["1.0.1/sd/logo.pbm", picture(64, 32, (x, y) => big(x, y) || small(x, y) || frame(x, y))],
    [
      "1.0.1/sd/leak.pbm",
      picture(32, 32, (x, y) => drop(16, 20, 7)(x, y) || (y > 28 && x % 4 < 2)),
    ],
  ]);
}

if (import.meta.main) {
  const root = join(import.meta.dir, "../../examples/smart-meter");
  for (const [path, bytes] of binaries()) {
    await Bun.write(join(root, path), bytes);
    console.log(`${path}  ${bytes.length} bytes`);
  }
}
