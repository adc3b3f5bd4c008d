/**
 * ota-patch: what encodePatch makes, the decoder undoes, whatever the two contents are; a patch that
 * someone meddled with never harms; and patches that were made once can be applied for ever.
 * Contents and meddling are random: set SEED to repeat a run, and OTA_ALL to try more.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync } from "node:fs";
import * as zlib from "node:zlib";
import { encodePatch } from "../ota.ts";
import { oldContent } from "./board/machine-code.ts";
import boardVectors from "./fixtures/ota-patch.json";
import { answerOther, Between } from "./helpers/between.ts";
import { edited, noise, program as machineCode, sha256 } from "./helpers/content.ts";
import { CHIPS, espImage, linked, program, revised, type Chip } from "./helpers/firmware.ts";
import {
  apply,
  copy,
  hop,
  number,
  received,
  signed,
  start,
  type Predicted,
} from "./helpers/patch.ts";
import { ALL, Random, seeded } from "./helpers/random.ts";
import { sendRequest, type ParsedResponse } from "./helpers/raw.ts";
import { asTree, bytesOf, Temp, type Tree } from "./helpers/temp.ts";
import { OTA_TS, Serving } from "./helpers/tool.ts";
import { World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SEED = seeded("patches");

type Pair = [old: Uint8Array, content: Uint8Array];

const zeros = (size: number) => new Uint8Array(size);
const join = (...parts: (Uint8Array | readonly number[])[]) =>
  new Uint8Array(Buffer.concat(parts.map((part) => Uint8Array.from(part))));

/** Zeros, of which one byte in `one` is something else. */
function nearZeros(size: number, one: number, seed: number): Uint8Array {
  const random = new Random(seed);
  return zeros(size).map(() => (random.below(one) === 0 ? random.below(256) : 0));
}

/** The same blocks in another order. */
function shuffled(content: Uint8Array, block: number, seed: number): Uint8Array {
  const random = new Random(seed);
  const left = Array.from({ length: Math.ceil(content.length / block) }, (_, k) => k * block);
  const parts = [];
  while (left.length > 0) {
    const [at = 0] = left.splice(random.below(left.length), 1);
    parts.push(content.subarray(at, at + block));
  }
  return join(...parts);
}

/** Code for a chip, and the same once some functions have grown. */
function release(chip: Chip, functions: number, seed: number): Pair {
  const first = program(chip, functions, seed);
  return [linked(first), linked(revised(first, 6, seed + 1))];
}

/** The same in an image, with data behind it. */
function images(chip: "xtensa" | "riscv", functions: number, seed: number): Pair {
  const text = bytesOf("measured %d of %d\n".repeat(50));
  const [old, content] = release(chip, functions, seed);
  return [espImage(chip, [old, text]), espImage(chip, [content, text])];
}

/** Pointers to two tables that move by two amounts, among what does not change. */
function pointers(move: (address: number) => number): Uint8Array {
  const random = new Random(7);
  const words = Uint32Array.from({ length: 3000 }, (_, k) => {
    if (k % 3 > 0) return random.below(2 ** 32);
    return move(k % 2 === 0 ? 0x20000000 + random.below(9000) : 0x08000000 + random.below(90000));
  });
  return new Uint8Array(words.buffer);
}

/** Applies what is encoded; `undefined` when there is no patch. */
function roundTrip([old, content]: Pair): Uint8Array | undefined {
  const patch = encodePatch(old, content);
  if (!patch) return undefined;
  const { content: made, pieces } = apply(patch, old, content.length);
  if (sha256(made) !== sha256(content)) expect(made).toEqual(content);
  // It comes in pieces of 64 KiB, however small its parts are.
  expect(pieces).toBeLessThanOrEqual(Math.ceil(content.length / 65536));
  return patch;
}

const text = bytesOf("def main():\n    print('measured', sensor.read())\n".repeat(40));

describe("a round trip", () => {
  const code = machineCode(30_000, 1);
  const random = noise(20_000, 2);
  const image = images("xtensa", 40, 3);
  const put = (bytes: Uint8Array, at: number, ...values: number[]) => {
    const changed = bytes.slice();
    changed.set(values, at);
    return changed;
  };

  /** At most so many bytes of patch; `undefined`: there is none. */
  const pairs: Record<string, [...Pair, most: number | undefined]> = {
    "the same": [code, code, 90],
    "the same, and odd": [code.subarray(3), code.subarray(3), 90],
    "nothing from nothing": [zeros(0), zeros(0), 90],
    "something from nothing": [zeros(0), code, undefined],
    "nothing from something": [code, zeros(0), 90],
    "a byte from a byte": [Uint8Array.of(1), Uint8Array.of(1), 90],
    "a byte from something": [code, Uint8Array.of(1), undefined],
    "a byte that changed": [code, put(code, 17_000, code[17_000]! ^ 1), 95],
    "the first and the last byte": [code, put(put(code, 0, 255), 29_999, 254), 100],
    "a byte more in front": [code, join([7], code), 95],
    "a byte less in front": [code, code.subarray(1), 95],
    "a byte more at the end": [code, join(code, [7]), 95],
    "a byte in the middle": [code, join(code.subarray(0, 9999), [1], code.subarray(9999)), 100],
    "the second half": [code, code.subarray(15_001), 90],
    "the halves swapped": [code, join(code.subarray(15_001), code.subarray(0, 15_001)), 100],
    "twice the same": [random, join(random, random), 100],
    "once, of twice": [join(random, random), random, 100],
    reversed: [random, random.toReversed(), undefined],
    "blocks in another order": [random, shuffled(random, 512, 4), 500],
    noise: [random, noise(20_000, 5), undefined],
    "noise and zeros": [random, zeros(20_000), undefined],
    "zeros, fewer": [zeros(20_000), zeros(19_995), 90],
    "nearly zeros": [nearZeros(20_000, 40, 6), nearZeros(20_000, 40, 7), 2000],
    "all zeros and all ones": [zeros(9000), zeros(9000).fill(1), undefined],
    "a period of seven": [
      zeros(9000).map((_, k) => k % 7),
      zeros(9000).map((_, k) => (k + 3) % 7),
      110,
    ],
    "a text": [text, join(text, bytesOf("# end\n")), 100],
    edited: [code, edited(code, 8, 20), 600],
    "pointers that moved by two amounts": [
      pointers((address) => address),
      pointers((address) => address + (address >= 0x20000000 ? 0x124 : -0x38)),
      150,
    ],
    "code for Thumb": [...release("thumb", 150, 9), 450],
    "code for Xtensa": [...release("xtensa", 150, 10), 700],
    "code for RISC-V": [...release("riscv", 150, 11), 500],
    "an image for an ESP32": [...images("xtensa", 150, 12), 700],
    "an image for an ESP32-C3": [...images("riscv", 150, 13), 500],
    "an image of which the header is cut off": [image[0].subarray(0, 23), image[1], undefined],
    "an image that is cut off within a segment": [image[0].subarray(0, 5000), image[1], 9e9],
    "an image with more segments than it has": [put(image[0], 1, 16), image[1], 900],
    "an image with 255 segments": [put(image[0], 1, 255), image[1], 900],
    "an image with a segment of 4 GiB": [put(image[0], 28, 255, 255, 255, 255), image[1], 900],
    "an image with a segment of 2 GiB": [put(image[0], 28, 0, 0, 0, 128), image[1], 900],
    "an image without segments": [put(image[0], 1, 0), image[1], 2000],
    "an image of a new chip": [put(image[0], 12, 77, 77), image[1], 2000],
  };
  for (const [title, [old, content, most]] of Object.entries(pairs)) {
    test(most === undefined ? `${title}: no patch` : title, () => {
      const patch = roundTrip([old, content]);
      if (most === undefined) expect(patch).toBeUndefined();
      else expect(patch?.length).toBeLessThanOrEqual(most);
    });
  }

  test("1 MiB and a byte, and 4 MiB", () => {
    for (const size of [2 ** 20 + 1, 2 ** 22]) {
      const old = machineCode(size, 14);
      expect(roundTrip([old, edited(old, 15, 30)])?.length).toBeLessThan(2000);
    }
  });

  test("what would take too long is given up", () => {
    const two = (seed: number) => noise(2 ** 22, seed).map((byte) => byte & 1);
    expect(encodePatch(two(16), two(17))).toBeUndefined();
  });

  test("a header that says which contents it is for, by size and hash", () => {
    const [old, content] = release("thumb", 20, 18);
    const patch = Buffer.from(encodePatch(old, content)!);
    const head = [0x89, 0x4f, 0x54, 0x50, 1, ...number(old.length), ...number(content.length)];
    expect([...patch.subarray(0, head.length)]).toEqual(head);
    const hashes = patch.subarray(head.length, head.length + 64).toString("hex");
    expect(hashes).toBe(sha256(old) + sha256(content));
  });

  test("the same patch for the same contents, which are left as they were", () => {
    const [old, content] = images("riscv", 30, 19);
    const before = sha256(join(old, content));
    expect(encodePatch(old, content)).toEqual(encodePatch(old, content)!);
    expect(sha256(join(old, content))).toBe(before);
  });
});

describe("addresses", () => {
  for (const chip of CHIPS) {
    test(`${chip}: that moved are hardly sent: a fourth of what zstd makes of it`, () => {
      const [old, content] = release(chip, 300, 20);
      const patch = zlib.brotliCompressSync(roundTrip([old, content])!);
      const params = { [zlib.constants.ZSTD_c_compressionLevel]: 19 };
      const zstd = zlib.zstdCompressSync(content, { params, dictionary: Buffer.from(old) });
      expect(patch.length).toBeLessThan(zstd.length / 4 + 72);
    });
  }

  /** Code of which nearly every byte could be the start of an address, and ranges and tables. */
  function wild(random: Random): [Uint8Array, Predicted] {
    const size = 1 + random.below(4000);
    const starts = [
      0x36, 0x41, 0, 0xf0, 0xf7, 0xf8, 0x37, 0x17, 0x6f, 0x97, 0x13, 0x03, 0x23, 0x67,
    ];
    const old = zeros(size).map(() =>
      random.chance(0.4) ? random.pick(starts) : random.below(256),
    );
    const code: [number, number][] = [];
    for (let end = 0; random.chance(0.7) && end < size;) {
      const from = end + random.below(Math.min(300, size - end));
      end = Math.min(size, from + random.below(2500));
      code.push([from, end]);
    }
    const entries = () => {
      let from = 0;
      return Array.from({ length: random.below(12) }, () => {
        const add = random.pick([0, 4, -4, 2, 0x1000, random.below(2 ** 32) - 2 ** 31]);
        return [(from += random.below(random.pick([64, 4000, 2 ** 28]))), add] as const;
      });
    };
    const architecture = random.pick([1, 2, 3, 4] as const);
    const ranges = architecture > 1 ? { code, relative: entries() } : {};
    return [old, { architecture, absolute: entries(), ...ranges }];
  }

  test("a byte is predicted the same, whichever copy and block it is in", () => {
    let predicted = 0;
    for (let seed = SEED; seed < SEED + (ALL ? 5000 : 400); seed++) {
      const random = new Random(seed);
      const [old, prediction] = wild(random);
      const before = noise(random.below(200), seed);
      const whole = [...number(before.length), ...before, ...signed(0), ...number(old.length * 4)];
      const parts: number[] = [...number(before.length), ...before];
      for (let at = 0; at < old.length;) {
        const length = Math.min(old.length - at, 1 + random.below(random.pick([3, 100, 2000])));
        // The first follows what is inserted; the others insert nothing.
        parts.push(...copy(0, length).slice(at === 0 ? 1 : 0));
        at += length;
      }
      const made = [whole, parts].map((body) => {
        const head = start(old, before.length + old.length, prediction);
        return apply(Uint8Array.from([...head, ...body]), old).content;
      });
      if (Buffer.compare(made[0]!, made[1]!) !== 0)
        expect([seed, made[0]]).toEqual([seed, made[1]]);
      if (Buffer.compare(made[0]!.subarray(before.length), old) !== 0) predicted++;
    }
    expect(predicted).toBeGreaterThan(100);
  });

  test("what an encoder sees whole, a decoder sees in blocks: at every size around the blocks' ends", () => {
    for (const chip of CHIPS) {
      const [old, content] = release(chip, 24, SEED);
      const sizes = [1024, 2048].flatMap((size) =>
        [-9, -8, -4, -3, -1, 0, 1, 2, 3, 7, 8, 61, 64, 65].map((more) => size + more),
      );
      for (const size of ALL ? Array.from({ length: 2300 }, (_, k) => k) : sizes) {
        roundTrip([old.subarray(0, size), content.subarray(0, size + 5)]);
        roundTrip([old.subarray(old.length - size), content.subarray(content.length - size)]);
      }
    }
  });

  test("random releases of random firmware", () => {
    for (let seed = SEED; seed < SEED + (ALL ? 500 : 40); seed++) {
      const random = new Random(seed);
      const chip = random.pick(CHIPS);
      const first = program(chip, 5 + random.below(60), seed);
      const second = revised(first, random.below(12), seed + 1);
      const data = noise(random.below(500), seed);
      const [old, content] = [first, second].map((one, k) => {
        const code = join(noise(random.below(9), seed + k), linked(one));
        if (chip === "thumb" || random.chance(0.5)) return join(code, data);
        return espImage(chip, [code, edited(data, seed, data.length > 0 ? k : 0), code]);
      });
      roundTrip([old!, content!]);
    }
  });
});

describe("a patch that someone meddled with", () => {
  const made: [title: string, ...Pair][] = [
    ["a text", text, join(text.subarray(40), bytesOf("# end\n"))],
    ...CHIPS.map((chip): [string, ...Pair] => [chip, ...release(chip, 40, 21)]),
    ["an ESP32's image", ...images("xtensa", 40, 22)],
  ];
  for (const [title, old, content] of made) {
    const patch = encodePatch(old, content)!;

    test(`${title}: every byte changed: refused, or right, or seen by its hash`, () => {
      const random = new Random(SEED);
      const seen = new Set<string>();
      for (const at of patch.keys()) {
        const others = ALL
          ? Array.from({ length: 255 }, (_, k) => k + 1)
          : [1, 0x80, 1 + random.below(255)];
        for (const other of others) {
          const changed = patch.slice();
          changed[at]! ^= other;
          const outcome = received(changed, old, content);
          // Of the header only the hash of the new content may change: the caller knows it.
          if (at < 5 + 32) expect([at, outcome]).toEqual([at, expect.stringMatching(/^refused/)]);
          seen.add(outcome.split(":")[0]!);
        }
      }
      expect([...seen].sort()).toEqual(["another hash", "refused", "right"]);
    });

    test(`${title}: cut anywhere, or with bytes behind it: refused`, () => {
      for (const at of patch.keys()) {
        expect([at, received(patch.subarray(0, at), old, content)]).toEqual([
          at,
          expect.stringMatching(/^refused/),
        ]);
      }
      for (const more of [[0], [0, 0, 0], [255, 255], [...patch]]) {
        expect(received(join(patch, more), old, content)).toBe(
          "refused: the patch goes on after its end",
        );
      }
    });
  }

  test("one for other content, or larger than it may be: refused before anything is read", () => {
    const [old, content] = release("thumb", 20, 23);
    const patch = encodePatch(old, content)!;
    expect(() => apply(patch, old.toReversed())).toThrow("another dictionary");
    expect(() => apply(patch, old.subarray(1))).toThrow("another dictionary");
    expect(() => apply(patch, old, content.length - 1)).toThrow(
      `more than ${content.length - 1} bytes`,
    );
    expect(() => apply(old, old)).toThrow("no patch of version 1");
    expect(() => apply(zeros(0), old)).toThrow("cut off");
    const newer = patch.slice();
    newer[4] = 2;
    expect(() => apply(newer, old)).toThrow("no patch of version 1");
  });

  const old = machineCode(5000, 24);
  const body = (parts: Predicted | undefined, size: number, ...segments: number[]) =>
    Uint8Array.from([...start(old, size, parts), ...segments]);
  const none = { architecture: 0 } as const;
  const long = [...zeros(9).fill(0x80), 1];
  const head = start(old, 100, none).slice(0, -1);
  const cases: Record<string, [patch: ArrayLike<number>, why: RegExp]> = {
    "sizes that no number can hold": [
      [...head.slice(0, 5), ...number(2n ** 64n - 1n), ...number(2n ** 64n - 1n), ...head.slice(7)],
      /out of range/,
    ],
    "a new size of 8 GiB": [start(old, 2 ** 33), /out of range/],
    "a size in ten bytes": [[...head.slice(0, 5), ...long, ...head.slice(7)], /out of range/],
    "a size in ten bytes that is small": [
      [...head.slice(0, 5), ...zeros(9).fill(0x80), 0, ...head.slice(7)],
      /out of range/,
    ],
    "a size that does not end": [[...head.slice(0, 5), ...zeros(900).fill(0x80)], /out of range/],
    "an architecture to come": [[...head, 5], /newer kind/],
    "65 ranges": [[...head, 3, 65], /out of range/],
    "ranges that do not end": [[...head, 3, 64, 1, 1, 1, 1], /cut off/],
    "a range beyond the old content": [[...head, 3, 1, 0, ...number(5001)], /out of range/],
    "a range that begins beyond it": [[...head, 2, 2, 1, ...number(4999), 1, 0], /out of range/],
    "a table of 4,097": [[...head, 1, ...number(4097)], /out of range/],
    "a table that does not end": [[...head, 1, ...number(4096), 1, 1, 1, 1], /cut off/],
    "a table beyond 32 bits": [[...head, 1, 2, ...number(2 ** 32 - 1), 0, 1, 0], /out of range/],
    "33 bits to add": [[...head, 1, 1, 0, ...number(2 ** 33 + 2)], /out of range/],
    "an insert beyond the new size": [body(none, 100, ...number(101)), /out of range/],
    "an insert that is cut off": [body(none, 100, 100, 1, 2, 3), /cut off/],
    "no segments": [body(none, 100), /cut off/],
    "a copy from before the old content": [body(none, 100, 0, ...signed(-1), 4), /beyond the old/],
    "a copy from after it": [body(none, 100, 0, ...signed(5000), 4), /beyond the old/],
    "a seek in ten bytes": [body(none, 100, 0, ...long, 4), /out of range/],
    "a copy longer than the new content": [
      body(none, 100, 0, 0, ...number(101 * 4)),
      /out of range/,
    ],
    "a copy to after the old content": [
      body(none, 100, 0, ...signed(4950), ...number(51 * 4)),
      /out of range/,
    ],
    "an add after the old content": [
      body(none, 100, 0, ...signed(4950), ...number(50 * 4 + 1), 1),
      /too much/,
    ],
    "a copy of nothing": [body(none, 100, ...copy(0, 0)), /nothing/],
    "adds that are cut off": [body(none, 100, 0, 0, ...number(4 + 3), 1, 1), /cut off/],
    "more than the new content": [body(none, 100, 100, ...zeros(100), 0), /after its end/],
  };
  for (const [title, [patch, why]] of Object.entries(cases)) {
    test(`${title}: refused`, () => {
      expect(() => apply(Uint8Array.from(patch), old)).toThrow(why);
    });
  }

  test("copies back and forth, each of which predicts a block anew, are few", () => {
    const thumb: Predicted = {
      architecture: 2,
      code: [[0, 5000]],
      absolute: [[0, 4]],
      relative: [[0, 4]],
    };
    // The rest is inserted.
    const hops = (count: number) => {
      const rest = 3000 - count;
      return body(thumb, 3000, ...hop(count), ...number(rest), ...zeros(rest));
    };
    const most = 64 + (5000 + 3000) / 64;
    const { content, read } = apply(hops(most), old);
    expect(content.length).toBe(3000);
    expect(read).toBeLessThanOrEqual(most * (1024 + 128));
    expect(() => apply(hops(most + 1), old)).toThrow("from too many places");
  });

  test("what was made so far comes also where copies are short", () => {
    const long = noise(2 ** 20, 7);
    const patch = (count: number) => Uint8Array.from([...start(long, count), ...hop(count)]);
    expect(() => apply(patch(20_000), long)).toThrow("from too many places");
    const { pieces } = apply(patch(16_000), long);
    expect(pieces).toBeGreaterThan(2);
  });
});

describe("patches that were made once are applied for ever", () => {
  const home = `${import.meta.dir}/fixtures/patches`;
  const file = (name: string) => Bun.file(`${home}/${name}`).bytes();
  const names = readdirSync(home).filter((name) => name.endsWith(".patch"));

  for (const name of names) {
    test(name, async () => {
      const vector = name.replace(".patch", "");
      const [old, content, patch] = await Promise.all(
        ["old", "new", "patch"].map((kind) => file(`${vector}.${kind}`)),
      );
      expect(sha256(apply(patch!, old!).content)).toBe(sha256(content!));
    });
  }

  test("those that boards are tested with", () => {
    for (const { architecture, size, seed, patch } of boardVectors) {
      const bytes = Buffer.from(patch, "base64");
      const { content } = apply(bytes, oldContent(architecture, size, seed));
      // Each size is a number of one to three bytes; the hash of the new content ends the header.
      const hash = bytes.indexOf(Buffer.from(sha256(content), "hex"));
      expect([architecture, size, hash >= 5 + 2 + 32]).toEqual([architecture, size, true]);
    }
  });

  test("there is one for everything that is predicted", async () => {
    const kinds = new Set<number>();
    for (const name of names) {
      const patch = Buffer.from(await file(name));
      // Behind the magic number and the version, two sizes of two bytes each, and two hashes.
      kinds.add(patch[5 + 2 + 2 + 64]!);
    }
    expect([...kinds].sort()).toEqual([0, 1, 2, 3, 4]);
  });

  test("the encoder of today makes none that is larger", async () => {
    for (const name of names.filter((each) => !each.startsWith("wild-"))) {
      const vector = name.replace(".patch", "");
      const [old, content, patch] = await Promise.all(
        ["old", "new", "patch"].map((kind) => file(`${vector}.${kind}`)),
      );
      const today = roundTrip([old!, content!])!;
      expect([name, today.length <= patch!.length]).toEqual([name, true]);
    }
  });
});

describe("between server and device", () => {
  const [OLD, NEW] = release("thumb", 600, 30);
  const [OLD_IMAGE, NEW_IMAGE] = images("xtensa", 600, 31);
  const LINES = Array.from({ length: 200 }, (_, k) => `${sha256(`${k}`).slice(0, 20)} = ${k}\n`);
  const SOURCE = LINES.join("");
  const SOURCE_2 = SOURCE.replace("= 7\n", "= 8\n");
  const first: Tree = { "flash/code.bin": OLD, "flash/table.py": SOURCE };
  const second: Tree = { "flash/code.bin": NEW, "flash/table.py": SOURCE_2 };
  const beside = { "firmware_1.0.0.bin": OLD_IMAGE, "firmware_1.0.1.bin": NEW_IMAGE };
  const CODE = "/1.0.1/flash/code.bin";

  let world: World;
  beforeAll(async () => {
    world = await World.with({ "1.0.0": first, "1.0.1": second }, { beside, on: "1.0.0" });
  });
  afterAll(() => world[Symbol.asyncDispose]());

  const ask = (
    server: { url: string },
    path: string,
    accepted: string,
    old: Uint8Array | string,
  ) => {
    const hash = Buffer.from(sha256(old), "hex").toString("base64");
    const headers = { "Accept-Encoding": accepted, "Available-Dictionary": `:${hash}:` };
    return sendRequest(server, path, { headers });
  };
  const coding = ({ headers }: ParsedResponse) => headers.get("content-encoding") ?? "identity";

  test("a device gets patches, and needs a fraction of what it is without", async () => {
    await using between = await Between.start(world);
    const { code, last } = await world.client([], between);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)"]);
    expect(world.tree()).toMatchObject(asTree(second));
    for (const [path, old] of [
      [CODE, OLD],
      ["/firmware_1.0.1.bin", OLD_IMAGE],
    ] as const) {
      const [{ asked, answer } = expect.unreachable(), ...more] = between.of(path);
      expect([coding(answer), more]).toEqual(["ota-patch, br", []]);
      expect(asked.headers.get("accept-encoding")).toMatch(/^ota-patch, br\b/);
      const without = await ask(world, path, "dcz, br", old);
      expect(coding(without)).toBe("dcz");
      expect(answer.body.length).toBeLessThan(without.body.length / 3);
    }
    expect(world.server.lines.some((line) => / coding=ota-patch,br$/.test(line))).toBe(true);
  });

  const cases: [accepted: string, path: string, old: Uint8Array | string, got: string][] = [
    ["ota-patch, br", CODE, OLD, "ota-patch, br"],
    ["br, ota-patch", CODE, OLD, "ota-patch, br"],
    ["ota-patch, deflate", CODE, OLD, "ota-patch, deflate"],
    ["ota-patch, deflate, br", CODE, OLD, "ota-patch, br"],
    ["OTA-Patch;q=0.1, Deflate;q=0.2", CODE, OLD, "ota-patch, deflate"],
    // A patch alone is no coding.
    ["ota-patch", CODE, OLD, "identity"],
    ["ota-patch, gzip", CODE, OLD, "gzip"],
    ["ota-patch, br;q=0, zstd", CODE, OLD, "zstd"],
    ["ota-patch;q=0, deflate", CODE, OLD, "deflate"],
    ["ota-patch, dcz", CODE, OLD, "dcz"],
    // The smallest of what is accepted.
    ["ota-patch, br, dcz", CODE, OLD, "ota-patch, br"],
    ["ota-patch, deflate, dcz, zstd", CODE, OLD, "ota-patch, deflate"],
    ["ota-patch, br, dcz", "/1.0.1/flash/table.py", SOURCE, "dcz"],
    // Content that the server does not know, or not there.
    ["ota-patch, deflate", CODE, "unknown", "deflate"],
    ["ota-patch, br, dcz", CODE, SOURCE, "br"],
    ["ota-patch, deflate", "/1.0.0/flash/code.bin", NEW, "ota-patch, deflate"],
  ];
  for (const [accepted, path, old, got] of cases) {
    test(`${path}, Accept-Encoding: ${accepted}: ${got}`, async () => {
      const response = await ask(world, path, accepted, old);
      expect([response.status, coding(response)]).toEqual([200, got]);
    });
  }

  test("what a board asks for inflates with 1 KiB of memory to a patch that applies", async () => {
    for (const [path, old, content] of [
      [CODE, OLD, NEW],
      ["/firmware_1.0.1.bin", OLD_IMAGE, NEW_IMAGE],
    ] as const) {
      const { body } = await ask(world, path, "ota-patch, deflate", old);
      const patch = zlib.inflateSync(body, { windowBits: 10 });
      expect(sha256(apply(patch, old, content.length).content)).toBe(sha256(content));
    }
  });

  test("a wrong patch is refused, and the file fetched plain, once", async () => {
    const fast = { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 5 } };
    const compressed = (bytes: string | Uint8Array) => zlib.brotliCompressSync(bytes, fast);
    const wrong: Record<string, (old: Uint8Array, content: Uint8Array) => Uint8Array> = {
      "not compressed": (old, content) => encodePatch(old, content)!,
      "compressed, but no patch": () => compressed(SOURCE),
      "cut short": (old, content) => compressed(encodePatch(old, content)!).subarray(0, 99),
      "one whose end is missing": (old, content) =>
        compressed(encodePatch(old, content)!.subarray(0, -2)),
      "for other old content": (_, content) =>
        compressed(encodePatch(OLD, content) ?? join(start(OLD, 9))),
      "of other new content": (old, content) =>
        compressed(encodePatch(old, join(content.subarray(0, -1), [content.at(-1)! ^ 1]))!),
      "of longer content": (old, content) => compressed(encodePatch(old, join(content, [1]))!),
      "of shorter content": (old, content) => compressed(encodePatch(old, content.subarray(1))!),
      "a bomb": (old, content) => compressed(join(start(old, content.length), zeros(2 ** 24))),
    };
    const names = Object.keys(wrong);
    // Too long to be carried in a manifest.
    const more = machineCode(2 ** 16, 39);
    const pairs = names.map((_, k): Pair => {
      const [old, content] = release("thumb", 60, 40 + k);
      return [join(old, more), join(content, more)];
    });
    const tree = (which: 0 | 1): Tree =>
      Object.fromEntries(pairs.map((pair, k) => [`flash/${k}.bin`, pair[which]]));
    await using hostile = await World.with({ "1.0.0": tree(0), "1.0.1": tree(1) }, { on: "1.0.0" });
    await using between = await Between.start(hostile, {
      answer: (passed, connection) => {
        const number = Number(/\/(\d+)\.bin$/.exec(passed.asked.path)?.[1]);
        if (!(number in names) || coding(passed.answer) !== "ota-patch, br") return false;
        return answerOther(passed, connection, wrong[names[number]!]!(...pairs[number]!));
      },
    });
    const { code, stderr } = await hostile.client([], between);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.any(String) });
    expect(hostile.tree()).toMatchObject(asTree(tree(1)));
    for (const [k, name] of names.entries()) {
      const answers = between.of(`/1.0.1/flash/${k}.bin`).map(({ answer }) => coding(answer));
      expect([name, answers]).toEqual([name, ["ota-patch, br", "identity"]]);
    }
    expect(between.of("/manifest.json").length).toBe(1);
  });

  // So long that to make a patch is far more work than to answer.
  const [LONG, LONGER] = [8, 9].map((seed): Pair => {
    const old = machineCode(1_000_000, seed);
    return [old, edited(old, seed, 60)];
  }) as [Pair, Pair];

  test("a hundred ask at once for one patch; others are answered meanwhile", async () => {
    await using busy = await World.with({
      "1.0.0": { a: LONG[0], b: LONGER[0] },
      "1.0.1": { a: LONG[1], b: LONGER[1] },
    });
    let done = false;
    const asked = Array.from({ length: 100 }, () =>
      ask(busy, "/1.0.1/a", "ota-patch, deflate", LONG[0]),
    );
    const answers = Promise.all(asked).finally(() => (done = true));
    let meanwhile = 0;
    for (; !done; meanwhile++) {
      expect((await sendRequest(busy, "/-/health")).status).toBe(200);
    }
    expect(meanwhile).toBeGreaterThan(5);
    const bodies = (await answers).map(({ body }) => sha256(body));
    expect(new Set(bodies).size).toBe(1);
    expect((await answers).every((answer) => coding(answer) === "ota-patch, deflate")).toBe(true);
  });

  test("what there is time for is spent by the first patch", async () => {
    await using busy = await World.with(
      { "1.0.0": { a: OLD, b: OLD_IMAGE }, "1.0.1": { a: NEW, b: NEW_IMAGE } },
      { coding: 1e-6 },
    );
    const one = await Promise.all(
      [1, 2, 3].map(() => ask(busy, "/1.0.1/a", "ota-patch, deflate", OLD)),
    );
    expect(one.map(coding)).toEqual(Array.from(one, () => "ota-patch, deflate"));
    expect(coding(await ask(busy, "/1.0.1/b", "ota-patch, deflate", OLD_IMAGE))).toBe("identity");
    expect(coding(await ask(busy, "/1.0.1/a", "ota-patch, deflate", OLD))).toBe(
      "ota-patch, deflate",
    );
  });
});

describe.concurrent("the threads that make patches", () => {
  const pairs = [50, 51, 52].map((seed) => release("riscv", 100, seed));
  const tree = (which: 0 | 1): Tree =>
    Object.fromEntries(pairs.map((pair, k) => [`${k}`, pair[which]]));
  const ask = (url: string, k: number) => {
    const hash = Buffer.from(sha256(pairs[k]![0]), "hex").toString("base64");
    const headers = {
      "Accept-Encoding": "ota-patch, br, dcz",
      "Available-Dictionary": `:${hash}:`,
    };
    return sendRequest({ url }, `/1.0.1/${k}`, { headers });
  };
  const SERVE = "servePatches(threads.parentPort!);\n}";
  const faults: Record<string, [from: string, to: string]> = {
    "cannot start": [
      "new URL(import.meta.url), { workerData: PATCH_WORKER }",
      'new URL("file:///nowhere/ota.ts"), { workerData: PATCH_WORKER }',
    ],
    "cannot be made": [
      "new threads.Worker(new URL(import.meta.url), { workerData: PATCH_WORKER }",
      "new (null!)(new URL(import.meta.url), { workerData: PATCH_WORKER }",
    ],
    "ends at once": [SERVE, "process.exit(3);\n}"],
    "fails at once": [SERVE, 'throw new Error("out of memory");\n}'],
    "ends with a job": [SERVE, 'threads.parentPort!.on("message", () => process.exit(3));\n}'],
    "fails with a job": [
      SERVE,
      'threads.parentPort!.on("message", () => { throw new Error("a bug"); });\n}',
    ],
  };
  for (const [title, [from, to]] of Object.entries(faults)) {
    test(`one ${title}: no patch, and nothing worse`, async () => {
      using temp = new Temp({ "root/1.0.0/": "", "root/1.0.1/": "" });
      temp.write(
        Object.fromEntries(
          [0, 1].flatMap((k) =>
            Object.entries(tree(k as 0 | 1)).map(([name, bytes]) => [
              `root/1.0.${k}/${name}`,
              bytes,
            ]),
          ),
        ),
      );
      const source = await Bun.file(OTA_TS).text();
      expect(source.split(from)).toHaveLength(2);
      temp.write({ "ota.ts": source.replace(from, () => to) });
      await using server = await Serving.start(["--root", temp.at("root")], {
        script: temp.at("ota.ts"),
      });
      for (const k of pairs.keys()) {
        const { status, headers } = await ask(server.url, k);
        expect([status, headers.get("content-encoding")]).toEqual([200, "dcz"]);
      }
      server.kill("SIGTERM");
      expect(await server.ended).toMatchObject({ code: 0, stderr: "" });
    });
  }

  test("a patch is made once, for both of its compressions and for all who ask at once", async () => {
    using temp = new Temp();
    for (const k of [0, 1] as const) {
      const files = Object.entries(tree(k));
      temp.write(
        Object.fromEntries(files.map(([name, bytes]) => [`root/1.0.${k}/${name}`, bytes])),
      );
    }
    const source = await Bun.file(OTA_TS).text();
    const MADE = "port.postMessage(encodePatch(old, content));";
    expect(source.split(MADE)).toHaveLength(2);
    const note = `fs.appendFileSync(${JSON.stringify(temp.at("made"))}, "one\\n"); ${MADE}`;
    temp.write({ "ota.ts": source.replace(MADE, () => note) });
    await using server = await Serving.start(["--root", temp.at("root")], {
      script: temp.at("ota.ts"),
    });
    const askFor = async (k: number, accepted: string) => {
      const hash = Buffer.from(sha256(pairs[k]![0]), "hex").toString("base64");
      const headers = { "Accept-Encoding": accepted, "Available-Dictionary": `:${hash}:` };
      const answer = await sendRequest(server, `/1.0.1/${k}`, { headers });
      return answer.headers.get("content-encoding");
    };
    const made = async () => (await Bun.file(temp.at("made")).text()).split("\n").length - 1;
    const both = ["ota-patch, br", "ota-patch, deflate"];
    for (const accepted of both) expect(await askFor(0, accepted)).toBe(accepted);
    expect(await made()).toBe(1);
    const many = [...both, ...both, ...both];
    expect(await Promise.all(many.map((accepted) => askFor(1, accepted)))).toEqual(many);
    expect(await made()).toBe(2);
  });

  test("bundled into another program, no thread starts it again; the tool compiled makes patches", async () => {
    using temp = new Temp();
    for (const k of [0, 1] as const) {
      const files = Object.entries(tree(k));
      temp.write(
        Object.fromEntries(files.map(([name, bytes]) => [`root/1.0.${k}/${name}`, bytes])),
      );
    }
    const build = (...args: string[]) => {
      const { exitCode, stderr } = Bun.spawnSync([process.execPath, "build", ...args]);
      expect([exitCode, stderr.toString()]).toEqual([0, expect.any(String)]);
    };
    const hash = Buffer.from(sha256(pairs[0]![0]), "hex").toString("base64");
    temp.write({
      "program.ts": `
        import { appendFileSync } from "node:fs";
        import { Fleet, serve } from ${JSON.stringify(OTA_TS)};
        appendFileSync(${JSON.stringify(temp.at("started"))}, "once");
        const options = { port: 0, host: "127.0.0.1", quiet: 0, log: () => {} };
        const server = await serve({ root: ${JSON.stringify(temp.at("root"))}, ...options });
        for (const accepted of ["ota-patch, br", "ota-patch, br, dcz"]) {
          const headers = { "Accept-Encoding": accepted, "Available-Dictionary": ":${hash}:" };
          const answer = await fetch(new URL("/1.0.1/0", server.url), { headers, decompress: false });
          console.log(answer.headers.get("content-encoding"));
        }
        await server.stop();
        await using fleet = await Fleet.open({ url: ${JSON.stringify(temp.at("fleet.db"))} });
        await fleet.setSetting("kept", "by this thread");
        console.log(await fleet.setting("kept"));
      `,
    });
    build(temp.at("program.ts"), "--target=bun", "--outfile", temp.at("program.js"));
    const child = Bun.spawn([process.execPath, temp.at("program.js")], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    expect(await child.stdout.text()).toBe("br\ndcz\nby this thread\n");
    expect(await child.exited).toBe(0);
    expect(await Bun.file(temp.at("started")).text()).toBe("once");

    build("--compile", OTA_TS, "--outfile", temp.at("tool"));
    const args = ["serve", "--root", temp.at("root"), "--port", "0", "--host", "127.0.0.1"];
    const tool = Bun.spawn([temp.at("tool"), ...args], { stdio: ["ignore", "pipe", "pipe"] });
    try {
      let said = "";
      const text = new TextDecoder();
      for await (const piece of tool.stdout) {
        said += text.decode(piece);
        if (/http:\/\/127\.0\.0\.1:\d+/.test(said)) break;
      }
      const [url] = /http:\/\/127\.0\.0\.1:\d+/.exec(said)!;
      expect((await ask(url, 0)).headers.get("content-encoding")).toBe("ota-patch, br");
    } finally {
      tool.kill();
      await tool.exited;
    }
  });

  test("waiting for more, they keep neither a server nor another program from its end", async () => {
    using temp = new Temp();
    for (const k of [0, 1] as const) {
      temp.write(
        Object.fromEntries(
          Object.entries(tree(k)).map(([name, bytes]) => [`root/1.0.${k}/${name}`, bytes]),
        ),
      );
    }
    {
      await using server = await Serving.start(["--root", temp.at("root")]);
      expect((await ask(server.url, 0)).headers.get("content-encoding")).toBe("ota-patch, br");
      server.kill("SIGTERM");
      expect(await server.ended).toMatchObject({ code: 0 });
    }
    const hash = Buffer.from(sha256(pairs[0]![0]), "hex").toString("base64");
    temp.write({
      "program.ts": `
        import { serve } from ${JSON.stringify(OTA_TS)};
        const options = { port: 0, host: "127.0.0.1", quiet: 0, log: () => {} };
        const server = await serve({ root: ${JSON.stringify(temp.at("root"))}, ...options });
        const headers = { "Accept-Encoding": "ota-patch, br", "Available-Dictionary": ":${hash}:" };
        const answer = await fetch(new URL("/1.0.1/0", server.url), { headers, decompress: false });
        console.log(answer.headers.get("content-encoding"), (await answer.bytes()).length > 0);
        await server.stop();
      `,
    });
    const child = Bun.spawn([process.execPath, temp.at("program.ts")], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    expect(await child.stdout.text()).toBe("ota-patch, br true\n");
    expect(await child.exited).toBe(0);
  });
});
