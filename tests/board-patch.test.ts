/**
 * What a board gets in another form than it has in the end: patches of its files and of its
 * firmware, and compressed content. On a real MicroPython, over real sockets, from a real server.
 */

import {
  afterAll,
  afterEach,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test";
import { join } from "node:path";
import * as zlib from "node:zlib";
import { encodePatch } from "../ota.ts";
import { Board, type Kind, type Start } from "./board/board.ts";
import { CONFIRM, example, ROLLBACK, Root, runs, UPDATE, Van } from "./board/fleet.ts";
import { ARCHITECTURES, espImage, oldContent, program } from "./board/machine-code.ts";
import vectors from "./fixtures/ota-patch.json";
import { copy, hop, number, signed, start } from "./helpers/patch.ts";
import { ALL, Random, seeded } from "./helpers/random.ts";
import type { Tree } from "./helpers/temp.ts";

setDefaultTimeout(600_000);

const SEED = seeded("board-patch");
const LIBRARY = join(example, "1.0.0/flash/lib");

const noise = (size: number, seed = 7): Uint8Array => {
  const random = new Random(seed);
  return Uint8Array.from({ length: size }, () => random.below(256));
};
const bytes = (text: string) => new TextEncoder().encode(text);
const hex = (content: Uint8Array) => Buffer.from(content).toString("hex");
const join2 = (...parts: Uint8Array[]) => new Uint8Array(Buffer.concat(parts));
/** As a board asks for it. */
const deflated = (content: Uint8Array) =>
  new Uint8Array(zlib.deflateSync(content, { level: 9, memLevel: 9, windowBits: 10 }));

/** Two versions of firmware for an ESP32, as large as its slots in these tests allow. */
const image = (more: readonly number[], chip = 0) => {
  const code = program(chip === 0 ? 3 : 4, 11, more);
  const data = join2(bytes(hex(noise(9_000))), bytes(`version ${more.length}`.padEnd(40, "\0")));
  return espImage([[0x3f400020, data], [0x400d0020, code]], chip); // prettier-ignore
};
const OLD_IMAGE = image([]);
const NEW_IMAGE = image([40, 80]);
const TEXT = Array.from({ length: 300 }, (_, n) => `def function_${n}():\n    return ${n}\n`);
const OLD_TEXT = TEXT.join("");
const NEW_TEXT = TEXT.with(100, "def another():\n    return 100\n").join("");

/** Contents that differ in every way, by their names: old, and new. */
function pairs(): Record<string, readonly [Uint8Array, Uint8Array]> {
  const random = new Random(SEED);
  const some = noise(6000, SEED);
  const near = Uint8Array.from({ length: 5000 }, () => (random.chance(0.02) ? 1 : 0));
  const blocks = Array.from({ length: 12 }, (_, n) => some.subarray(500 * n, 500 * n + 500));
  const pointers = (first: number, second: number) =>
    Uint8Array.from({ length: 6000 }, (_, at) => {
      const address = 0x20000000 + ((at >> 2) * 52_361) % 40_000; // prettier-ignore
      return ((address + (address % 40_000 < 20_000 ? first : second)) >>> (8 * (at & 3))) & 255;
    });
  const programs = ([2, 3, 4] as const).map((architecture) => [
    `${ARCHITECTURES[architecture]}.bin`,
    [program(architecture, SEED), program(architecture, SEED, [40, 80])] as const,
  ]);
  return {
    "text.txt": [bytes(OLD_TEXT), bytes(NEW_TEXT)],
    "from-nothing.bin": [new Uint8Array(), some],
    "to-nothing.bin": [some, new Uint8Array()],
    "one-byte.bin": [Uint8Array.of(1), Uint8Array.of(2)],
    "one-changed.bin": [some, some.with(3000, some[3000]! ^ 1)],
    "reversed.bin": [some, some.toReversed()],
    "shuffled.bin": [some, join2(...random.some(blocks, 6).toReversed(), ...blocks)],
    "noise.bin": [some, noise(5000, SEED + 1)],
    "near-zeros.bin": [near, near.map((byte, at) => (at % 911 === 0 ? 7 : byte))],
    "pointers.bin": [pointers(0, 0), pointers(16, 4096)],
    ...Object.fromEntries(programs),
  };
}

let root: Root;
/** All of them, and one with a text and firmware only. */
let all: Van;
let van: Van;
/** The heads of requests and of answers, and how long the bodies of the latter were. */
const heads: string[] = [];
const answers: { line: string; coding: string; length: number }[] = [];

beforeAll(async () => {
  const tree = (which: 0 | 1): Tree =>
    Object.fromEntries(Object.entries(pairs()).map(([name, pair]) => [`flash/${name}`, pair[which]]));
  root = new Root()
    .release("1.0.0", { "flash/main.py": "1\n", ...tree(0) })
    .release("1.0.1", { "flash/main.py": "1\n", ...tree(1), "flash/added.txt": NEW_TEXT });
  await Bun.write(join(root.path, "firmware_1.0.0.bin"), OLD_IMAGE);
  await Bun.write(join(root.path, "firmware_1.0.1.bin"), NEW_IMAGE);
  all = await Van.open(root.path);
  const small = new Root()
    .release("1.0.0", { "flash/main.py": "1\n", "flash/text.txt": OLD_TEXT })
    .release("1.0.1", { "flash/main.py": "1\n", "flash/text.txt": NEW_TEXT, "flash/added.txt": NEW_TEXT });
  await Bun.write(join(small.path, "firmware_1.0.0.bin"), OLD_IMAGE);
  await Bun.write(join(small.path, "firmware_1.0.1.bin"), NEW_IMAGE);
  van = await Van.open(small.path);
}); // prettier-ignore
afterEach(() => {
  van.link.weather = {};
  van.link.rewrite = undefined;
});
afterAll(async () => {
  await all[Symbol.asyncDispose]();
  await van[Symbol.asyncDispose]();
  Root.removeAll();
});

/**
 * Notes what is asked and answered, and may change answers.
 *
 * @param change of a whole answer; `only` says of which
 */
function listen(link = van.link, only = /^$/, change = (answer: Uint8Array) => answer): void {
  heads.length = answers.length = 0;
  link.rewrite = (head) => {
    heads.push(head);
    return head;
  };
  link.weather = {
    answer: (answer) => {
      const line = heads.at(-1)!.split("\r\n")[0]!;
      const changed = only.test(line) ? change(answer) : answer;
      const text = Buffer.from(changed).toString("latin1");
      const end = text.indexOf("\r\n\r\n");
      const coding = /\r\nContent-Encoding: ([^\r]*)/i.exec(text.slice(0, end))?.[1] ?? "";
      answers.push({ line, coding, length: changed.length - end - 4 });
      return changed;
    },
  };
}

/** The head of a request, or what was answered, for a file. */
const asked = (name: string) => heads.filter((head) => head.split(" ")[1]!.endsWith(name));
const codingsOf = (name: string) =>
  answers.filter(({ line }) => line.includes(`${name} `)).map(({ coding }) => coding);

/** A board with the old release and the old firmware. */
async function boardOf(kind: Kind, on = van, firmware = OLD_IMAGE): Promise<Board> {
  const board = await on.board(kind, "1.0.0");
  if (kind === "esp32") board.write("/hw/ota_0", firmware);
  return board;
}

async function done(board: Board, start: Start, on = van, firmware = NEW_IMAGE): Promise<void> {
  expect([start.end, start.error], start.output.join("\n")).toEqual(["reset", ""]);
  expect((await board.settle(CONFIRM)).join("\n")).toContain("OTA: 1.0.1 is confirmed");
  expect(board.tree()).toEqual(await on.tree(board.kind, "1.0.1"));
  if (board.kind !== "rp2") expect(runs(board, firmware)).toBe(true);
  const left = [...board.files.keys()].filter((path) => /\.ota\/.*\.[pntd]$|\.ota\/image$/.test(path));
  expect(left).toEqual([]);
} // prettier-ignore

const DICTIONARY = /\r\nAvailable-Dictionary: :([^:]*):\r\n/;
const sha256 = (content: Uint8Array) =>
  new Bun.CryptoHasher("sha256").update(content).digest("base64");

describe("an update", () => {
  test.each(["esp32", "pycom", "rp2"] as const)("of files and firmware by patches: byte for byte (%s)", async (kind) => {
    const board = await boardOf(kind, all);
    listen(all.link);
    await done(board, await board.start(UPDATE), all);
    for (const [name, [old]] of Object.entries(pairs())) {
      // Nothing needs no request.
      if (name === "to-nothing.bin") continue;
      expect(asked(name)[0]!, name).toContain("\r\nAccept-Encoding: ota-patch, deflate\r\n");
      expect(DICTIONARY.exec(asked(name)[0]!)![1], name).toBe(sha256(old));
    }
    for (const name of ["text.txt", "one-changed.bin", "shuffled.bin", "near-zeros.bin", "pointers.bin", "Thumb-2.bin", "Xtensa.bin", "RISC-V.bin"])
      expect([name, ...codingsOf(name)]).toEqual([name, "ota-patch, deflate"]);
    for (const name of ["reversed.bin", "noise.bin", "one-byte.bin"])
      expect([name, ...codingsOf(name)]).toEqual([name, ""]);
    // What is not there yet comes compressed.
    expect(asked("added.txt")[0]!).toContain("\r\nAccept-Encoding: deflate\r\n");
    expect(codingsOf("added.txt")).toEqual(["deflate"]);
    // Firmware, too, where what runs cannot be read.
    if (kind !== "rp2")
      expect(codingsOf("firmware_1.0.1.bin")).toEqual([kind === "esp32" ? "ota-patch, deflate" : "deflate"]);
    if (kind === "esp32") expect(DICTIONARY.exec(asked("firmware_1.0.1.bin")[0]!)![1]).toBe(sha256(OLD_IMAGE));
    // A manifest is not content.
    expect(heads.filter((head) => head.includes("/manifest.json") && DICTIONARY.test(head))).toEqual([]);
    for (const { line, length, coding } of answers) if (coding.startsWith("ota-patch")) expect([line, length < 4000]).toEqual([line, true]);
  }); // prettier-ignore

  test("of firmware for an ESP32-C3", async () => {
    const pair = [image([], 5), image([30, 90], 5)] as const;
    const own = new Root().release("1.0.0", { "flash/main.py": "1\n" });
    own.release("1.0.1", { "flash/main.py": "2\n" });
    await Bun.write(join(own.path, "firmware_1.0.0.bin"), pair[0]);
    await Bun.write(join(own.path, "firmware_1.0.1.bin"), pair[1]);
    await using other = await Van.open(own.path);
    const board = await boardOf("esp32", other, pair[0]);
    listen(other.link);
    await done(board, await board.start(UPDATE), other, pair[1]);
    expect(codingsOf("firmware_1.0.1.bin")).toEqual(["ota-patch, deflate"]);
  });

  const odd: [string, Uint8Array, string][] = [
    ["of which the server has another one", image([10]), "deflate"],
    ["without its SHA-256", espImage([[0x400d0020, noise(5000)]], 0, false), "deflate"],
    ["that is none", bytes("\xe9 the firmware from the factory"), "deflate"],
    ["that does not end", Uint8Array.of(...OLD_IMAGE.subarray(0, 28), 255, 255, 255, 255, ...noise(99)), "deflate"],
    ["with a segment too many", OLD_IMAGE.with(1, 3), "deflate"],
    ["that is erased", new Uint8Array(65536).fill(0xff), "deflate"],
    ["with what follows it in its slot", join2(OLD_IMAGE, noise(500)), "ota-patch, deflate"],
  ]; // prettier-ignore
  test.each(odd)("of firmware %s", async (_name, firmware, coding) => {
    const board = await boardOf("esp32", van, firmware);
    listen();
    await done(board, await board.start(UPDATE));
    expect(codingsOf("firmware_1.0.1.bin")).toEqual([coding]);
  });

  describe("of firmware without a header of an ESP32", () => {
    // (The tests' bootloader wants the first byte of one.)
    const raw = (more: readonly number[]) => join2(Uint8Array.of(0xe9, 200), program(2, 11, more));
    const [first, second, third] = [raw([]), raw([40, 80]), raw([20, 60])];
    const open = async (...firmware: [string, Uint8Array][]) => {
      const own = new Root();
      for (const [version, content] of firmware) {
        own.release(version, { "flash/main.py": `${version}\n` });
        await Bun.write(join(own.path, `firmware_${version}.bin`), content);
      }
      return await Van.open(own.path);
    };
    const RECORD = "/.ota/firmware";
    const record = (image: Uint8Array) =>
      `${image.length} ${new Bun.CryptoHasher("sha256").update(image).digest("hex")}`;
    let earlier: Van;
    let later: Van;
    beforeAll(async () => {
      earlier = await open(["1.0.0", OLD_IMAGE], ["1.0.1", first]);
      later = await open(["1.0.1", first], ["1.0.2", second]);
    });
    afterAll(async () => {
      await earlier[Symbol.asyncDispose]();
      await later[Symbol.asyncDispose]();
    });
    /** A board that has installed the first of them over the air, and asks for the second now. */
    async function installed(): Promise<Board> {
      const old = await boardOf("esp32", earlier);
      await done(old, await old.start(UPDATE), earlier, first);
      expect(old.read(RECORD)).toBe(record(first));
      listen(later.link);
      return moved(old, later);
    }
    function moved(board: Board, to: Van): Board {
      const other = new Board("esp32", to.link);
      other.files = board.files;
      other.directories = board.directories;
      return other;
    }
    async function updated(board: Board, from = later): Promise<void> {
      const start = await board.start(UPDATE);
      expect([start.end, start.error], start.output.join("\n")).toEqual(["reset", ""]);
      await board.settle(CONFIRM);
      expect(board.tree()).toEqual(await from.tree("esp32", "1.0.2"));
      expect(runs(board, second)).toBe(true);
    }

    test("by what the update before has noted; a rollback notes that again", async () => {
      const board = await installed();
      await updated(board);
      expect(codingsOf("firmware_1.0.2.bin")).toEqual(["ota-patch, deflate"]);
      expect(DICTIONARY.exec(asked("firmware_1.0.2.bin")[0]!)![1]).toBe(sha256(first));
      expect(board.read(RECORD)).toBe(record(second));
      expect((await board.start(ROLLBACK)).end).toBe("reset");
      await board.settle();
      expect(runs(board, first)).toBe(true);
      expect(board.read(RECORD)).toBe(record(first));
      await using other = await open(["1.0.1", first], ["1.0.3", third]);
      const own = moved(board, other);
      listen(other.link);
      expect((await own.start(UPDATE)).end).toBe("reset");
      await own.settle(CONFIRM);
      expect(runs(own, third)).toBe(true);
      expect(codingsOf("firmware_1.0.3.bin")).toEqual(["ota-patch, deflate"]);
    });

    test("that was not confirmed: the note is that of what runs again", async () => {
      const board = await installed();
      expect((await board.start(UPDATE)).end).toBe("reset");
      expect(board.read(RECORD)).toBe(record(second));
      for (let n = 0; n < 6; n++) await board.start();
      expect(runs(board, first)).toBe(true);
      expect(board.read(RECORD)).toBe(record(first));
    });

    test("that an update leaves alone: the note stays", async () => {
      const board = await installed();
      const own = new Root().release("1.0.2", { "flash/main.py": "2\n" });
      await Bun.write(join(own.path, "firmware_1.0.1.bin"), first);
      await using files = await Van.open(own.path);
      const mine = moved(board, files);
      expect((await mine.start(UPDATE)).end).toBe("reset");
      await mine.settle(CONFIRM);
      expect(mine.read(RECORD)).toBe(record(first));
    });

    test.each([
      ["nothing", undefined],
      ["an empty file", ""],
      ["words", "nothing that counts"],
      ["no number", `x ${record(first)}`.replace(/ \d+/, "")],
      ["less than nothing", `-${record(first)}`],
      ["another size", record(first).replace(/^\d+/, "100")],
      ["more than there is room for", record(first).replace(/^\d+/, "99999999")],
      ["nothing at all, and its hash", record(new Uint8Array())],
      ["another hash", record(second)],
      ["bytes that are no text", "\xff\xfe\xfd"],
    ])("with a note that says %s: compressed", async (_name, note) => {
      const board = await installed();
      board.files.delete(RECORD);
      if (note !== undefined) board.files.set(RECORD, new Uint8Array(Buffer.from(note, "latin1")));
      await updated(board);
      expect(codingsOf("firmware_1.0.2.bin")).toEqual(["deflate"]);
      expect(board.read(RECORD)).toBe(record(second));
    });

    test("over a cable since: what runs counts", async () => {
      const board = await installed();
      board.write(`/hw/${board.otadata()["running"]}`, third);
      await updated(board);
      expect(codingsOf("firmware_1.0.2.bin")).toEqual(["deflate"]);
      // One with a header is known by that.
      await using other = await open(["1.0.1", OLD_IMAGE], ["1.0.2", second]);
      const known = moved(await installed(), other);
      known.write(`/hw/${known.otadata()["running"]}`, OLD_IMAGE);
      listen(other.link);
      await updated(known, other);
      expect(DICTIONARY.exec(asked("firmware_1.0.2.bin")[0]!)![1]).toBe(sha256(OLD_IMAGE));
    });
  });

  test("of a file that is not as it was: its content, compressed", async () => {
    const board = await boardOf("rp2");
    board.write("/text.txt", `${OLD_TEXT}edited`);
    listen();
    await done(board, await board.start(UPDATE));
    expect(DICTIONARY.exec(asked("text.txt")[0]!)![1]).toBe(sha256(bytes(`${OLD_TEXT}edited`)));
    expect(codingsOf("text.txt")).toEqual(["deflate"]);
  });
});

/** Python that decodes patches: `made(old, patch, most)` is the new content, or an error as text. */
const DECODES = `
import binascii, hashlib, ota_patch
class Bytes:
    def __init__(self, data):
        self.data = data
        self.at = 0
    def readinto(self, view):
        n = min(len(view), len(self.data) - self.at)
        view[:n] = self.data[self.at : self.at + n]
        self.at += n
        return n
def made(old, patch, most, step=None):
    def read(at, view):
        assert 0 <= at and at + len(view) <= len(old), "beyond the old content"
        view[:] = old[at : at + len(view)]
    new = bytearray()
    def write(piece):
        assert len(piece) > 0 and len(new) + len(piece) <= most, "beyond the new content"
        new.extend(piece)
    try:
        one = ota_patch.Patch(Bytes(patch), read, len(old), write)
        one.run(one.header(most, hashlib.sha256(old).digest(), None))
    except ValueError as e:
        return str(e)
    return bytes(new)
`;

describe("the decoder", () => {
  test("does what the reference does, for bytes in every odd place (all architectures)", async () => {
    const board = await van.board("rp2", "1.0.0");
    vectors.forEach(({ architecture, size, seed, patch }, n) => {
      board.write(`/v/${n}.old`, oldContent(architecture, size, seed));
      board.write(`/v/${n}.patch`, new Uint8Array(Buffer.from(patch, "base64")));
    });
    const { output, error } = await board.start(`${DECODES}
for n in range(${vectors.length}):
    old = open("/v/%d.old" % n, "rb").read()
    patch = open("/v/%d.patch" % n, "rb").read()
    new = made(old, patch, 100000)
    # The hash stands before the body.
    at = 5
    for _ in range(2):
        while patch[at] > 127:
            at += 1
        at += 1
    print(new if isinstance(new, str) else hashlib.sha256(new).digest() == patch[at + 32 : at + 64])
`);
    expect(error).toBe("");
    vectors.forEach(({ architecture, size }, n) =>
      expect([ARCHITECTURES[architecture], size, output[n]]).toEqual([ARCHITECTURES[architecture], size, "True"]));
  }); // prettier-ignore

  test("makes the same of the committed patches as a client does", async () => {
    const home = join(import.meta.dir, "fixtures/patches");
    const board = await van.board("rp2", "1.0.0");
    const names = [...new Bun.Glob("*.patch").scanSync(home)].map((name) => name.slice(0, -6));
    for (const name of names) {
      for (const kind of ["old", "patch"]) {
        board.write(`/v/${name}.${kind}`, await Bun.file(join(home, `${name}.${kind}`)).bytes());
      }
    }
    const { output, error } = await board.start(`${DECODES}
for name in ${JSON.stringify(names)}:
    new = made(open("/v/%s.old" % name, "rb").read(), open("/v/%s.patch" % name, "rb").read(), 100000)
    print(new if isinstance(new, str) else binascii.hexlify(hashlib.sha256(new).digest()).decode())
`);
    expect(error).toBe("");
    for (const [n, name] of names.entries()) {
      const content = await Bun.file(join(home, `${name}.new`)).bytes();
      const hash = new Bun.CryptoHasher("sha256").update(content).digest("hex");
      expect([name, output[n]]).toEqual([name, hash]);
    }
  }); // prettier-ignore

  test("makes what the encoder meant, for programs of any seed", async () => {
    const board = await van.board("rp2", "1.0.0");
    const random = new Random(SEED);
    const cases = Array.from({ length: 12 }, (_, n) => {
      const [architecture, seed] = [([2, 3, 4] as const)[n % 3]!, random.below(2 ** 31)];
      const more = random.some([10, 30, 50, 70, 90], 1 + random.below(4));
      // A copy of it elsewhere is moved by another amount.
      const padding = noise(random.below(9), seed);
      const [old, now] = [program(architecture, seed), join2(padding, program(architecture, seed, more))];
      board.write(`/v/${n}.old`, old);
      board.write(`/v/${n}.patch`, encodePatch(old, now)!);
      return { name: `seed ${SEED}: ${ARCHITECTURES[architecture]} ${seed} ${more}`, now };
    });
    const { output, error } = await board.start(`${DECODES}
for n in range(${cases.length}):
    new = made(open("/v/%d.old" % n, "rb").read(), open("/v/%d.patch" % n, "rb").read(), 100000)
    print(new if isinstance(new, str) else binascii.hexlify(hashlib.sha256(new).digest()).decode())
`);
    expect(error).toBe("");
    cases.forEach(({ name, now }, n) =>
      expect([name, output[n]]).toEqual([name, new Bun.CryptoHasher("sha256").update(now).digest("hex")]));
  }); // prettier-ignore

  test("refuses a patch that is cut, goes on, or is spoilt; or what it makes is as long as it should be", async () => {
    const board = await van.board("rp2", "1.0.0");
    const old = program(3, 5).subarray(0, 1200);
    const now = join2(program(3, 5, [2]).subarray(0, 1190), Uint8Array.of(1, 2, 3));
    const patch = encodePatch(old, now)!;
    board.write("/old", old);
    board.write("/new", now);
    board.write("/patch", patch);
    const { output, error } = await board.start(`${DECODES}
old = open("/old", "rb").read()
new = open("/new", "rb").read()
patch = open("/patch", "rb").read()
print(made(old, patch, len(new)) == new, made(old, patch, len(new) - 1), made(old[1:], patch, len(new)))
for n in range(len(patch)):
    assert isinstance(made(old, patch[:n], len(new)), str), n
print(made(old, patch + b"x", len(new)))
refused = wrong = 0
for n in range(len(patch)):
    for bits in (1, 128):
        spoilt = bytearray(patch)
        spoilt[n] ^= bits
        found = made(old, spoilt, len(new))
        if isinstance(found, str):
            refused += 1
        else:
            wrong += found != new
print(refused, wrong, 2 * len(patch))
`);
    expect(error).toBe("");
    expect(output.slice(0, 2)).toEqual([
      "True the patch has a number out of range the patch has a number out of range",
      "the patch goes on after its end",
    ]);
    const [refused = 0, wrong = 0, all = 0] = output[2]!.split(" ").map(Number);
    // What is spoilt in hashes and numbers is seen at once, the rest by the hash of what it makes.
    expect(refused).toBeGreaterThan(all / 4);
    // (But for that hash itself, which is not looked at here.)
    expect(refused + wrong).toBeGreaterThan((all - 64) * 0.9);
  }); // prettier-ignore

  test("refuses what is out of bounds, and tables that are too large", async () => {
    const old = noise(100);
    const board = await van.board("rp2", "1.0.0");
    board.write("/old", old);
    const head = (body: number[]) =>
      hex(Uint8Array.of(0x89, 0x4f, 0x54, 0x50, 1, 100, 50, ...Buffer.from(sha256(old), "base64"), ...new Uint8Array(32), ...body));
    const patches: [string, string][] = [
      [head([5]), "is of a newer kind"],
      [head([1, ...number(4097)]), "has a number out of range"],
      [head([2, 65]), "has a number out of range"],
      [head([2, 1, 90, 20]), "has a number out of range"],
      [head([1, 2, ...number(2 ** 32 - 1), 0, 1, 0]), "has a number out of range"],
      [head([1, 1, 0, ...number(2 ** 32 + 2)]), "has a number out of range"],
      [head([0, ...Array(9).fill(128), 0]), "has a number out of range"],
      [head([0, 51]), "has a number out of range"],
      [head([0, 0, ...number(200)]), "copies from beyond the old content"],
      [head([0, 0, 1]), "copies from beyond the old content"],
      [head([0, 0, ...number(198), 8]), "has a number out of range"],
      [head([0, 0, ...number(198), 7]), "copies too much"],
      [head([0, 0, 0, 7]), "does not end where it should"],
      [head([0, ...copy(0, 0)]), "copies nothing"],
    ];
    const { output, error } = await board.start(`${DECODES}
old = open("/old", "rb").read()
for text in ${JSON.stringify(patches.map(([patch]) => patch))}:
    found = made(old, binascii.unhexlify(text), 50)
    print(found if isinstance(found, str) else "made")
`);
    expect(error).toBe("");
    patches.forEach(([patch, why], n) => expect([patch, output[n]]).toEqual([patch, `the patch ${why}`]));
  }); // prettier-ignore

  /** The head of a patch of 100 bytes that makes 50, with one table. */
  const withTable = (entries: readonly (readonly [number, number])[], old: Uint8Array) => {
    let before = 0;
    const table = entries.flatMap(([at, add]) => {
      const step = at - before;
      before = at;
      return [...number(step), ...signed(add)];
    });
    const hash = Buffer.from(sha256(old), "base64");
    return Uint8Array.of(0x89, 0x4f, 0x54, 0x50, 1, 100, 50, ...hash, ...new Uint8Array(32), 1, ...number(entries.length), ...table);
  }; // prettier-ignore
  /** Prints what is made of a table: its entries, and whether anything moves. */
  const HEADER = `${DECODES}
def header(patch, old):
    one = ota_patch.Patch(Bytes(patch), None, len(old), None)
    one.header(50, hashlib.sha256(old).digest(), None)
    return one
`;

  test("predicts no more blocks than a patch may, and no copy of nothing", async () => {
    const board = await van.board("rp2", "1.0.0");
    const old = noise(5000, 3);
    // The rest is inserted.
    const hops = (count: number) => {
      const rest = 3000 - count;
      return Uint8Array.from([...start(old, 3000), ...hop(count), ...number(rest), ...new Uint8Array(rest)]);
    };
    const most = 64 + (5000 + 3000) / 64;
    const patches = [hops(most), hops(most + 1), Uint8Array.from([...start(old, 3000), ...copy(0, 0)])];
    board.write("/old", old);
    patches.forEach((patch, n) => board.write(`/v/${n}`, patch));
    const { output, error } = await board.start(`${DECODES}
old = open("/old", "rb").read()
for n in range(${patches.length}):
    new = made(old, open("/v/%d" % n, "rb").read(), 3000)
    print(new if isinstance(new, str) else len(new))
`);
    expect([error, ...output]).toEqual(["", "3000", "the patch copies from too many places", "the patch copies nothing"]);
  }); // prettier-ignore

  test("reads tables of any addresses", async () => {
    const random = new Random(SEED);
    const old = noise(100);
    const edges = [0, 1, 0xffff, 0x10000, 0x3fffffff, 0x40000000, 0x7fffffff, 0x80000000, 0xfffeffff, 0xffffffff];
    const adds = [0, 1, -1, 0x7fff, 0x8000, -0x8000, 0xffff, -0x10000, 0x10000, 0x3fffffff, 0x40000000, -0x40000001, 0x7fffffff, -0x80000000, 0x80000000];
    const tables = [
      edges.map((at, n) => [at, adds[n]!] as const),
      edges.map((at, n) => [at, adds.at(-n - 1)!] as const),
      [[0x400d0000, 0]] as const,
      [] as const,
      ...Array.from({ length: 40 }, () => {
        const places = Array.from({ length: random.below(30) }, () => random.below(2 ** 32));
        return places.sort((a, b) => a - b).map((at) => [at, random.below(2 ** 32) - 2 ** 31] as const);
      }),
    ];
    const board = await van.board("rp2", "1.0.0");
    board.write("/old", old);
    tables.forEach((table, n) => board.write(`/v/${n}`, withTable(table, old)));
    const { output, error } = await board.start(`${HEADER}
old = open("/old", "rb").read()
for n in range(${tables.length}):
    one = header(open("/v/%d" % n, "rb").read(), old)
    print(binascii.hexlify(one.absolute[8:]).decode(), binascii.hexlify(one.first).decode(), one.moves)
`);
    expect(error).toBe("");
    tables.forEach((table, n) => {
      const bytes = new DataView(new ArrayBuffer(8 * table.length));
      const first = new Uint8Array(256);
      table.forEach(([at, add], k) => {
        bytes.setUint32(8 * k, at, true);
        bytes.setUint32(8 * k + 4, add, true);
        const end = table[k + 1]?.[0] ?? 0xffffffff;
        if (add !== 0) first.fill(1, at >>> 24, (end >>> 24) + 1);
      });
      const moves = table.some(([, add]) => add !== 0) ? "True" : "False";
      expect(`${n} ${output[n]}`).toBe(`${n} ${hex(new Uint8Array(bytes.buffer))} ${hex(first)} ${moves}`);
    });
  }); // prettier-ignore

  test("makes no garbage of large addresses, and takes no table that leaves no room", async () => {
    const board = await van.board("rp2", "1.0.0");
    const old = noise(100);
    const many = (count: number) =>
      Array.from({ length: count }, (_, n) => [0x400d0000 + 300 * n, -0x10000 - n] as const);
    board.write("/old", old);
    board.write("/some", withTable(many(1300), old));
    board.write("/most", withTable(many(4096), old));
    const { output, error, heap } = await board.start(
      `${HEADER}
import gc
old = open("/old", "rb").read()
class File(Bytes):
    def __init__(self, path):
        self.file = open(path, "rb")
    def readinto(self, view):
        return self.file.readinto(view)
Bytes = lambda path: File(path)
one = header("/some", old)
print(one.absolute[0] | one.absolute[1] << 8, one.moves)
one = None
gc.collect()
try:
    header("/most", old)
except MemoryError:
    print("no room")
`,
      { heap: 64 * 1024 },
    );
    expect([error, ...output]).toEqual(["", "1300 True", "no room"]);
    // The table has 10 KB.
    expect(heap!.taken).toBeLessThan(36 * 1024);
  });

  test("its modules for addresses are plain Python without their decorators", async () => {
    for (const name of ["fields", "riscv", "thumb", "xtensa"]) {
      const text = await Bun.file(join(LIBRARY, `ota_${name}.py`)).text();
      // What a build without machine code leaves out is told by the first letter of a line.
      const kept = text.split("\n").filter((line) => !/^[#f@]/.test(line));
      for (const line of kept) expect(line).toMatch(/^(|def .*|    .*|\) -> int:)$/);
      const functions = text.match(/^def /gm) ?? [];
      expect([...(text.match(/^@.*/gm) ?? [])]).toEqual(functions.map(() => "@micropython.viper"));
    }
  });
});

describe("what cannot be decoded is asked for as it is, once", () => {
  const replace = (from: RegExp, to: string) => (answer: Uint8Array) =>
    new Uint8Array(Buffer.from(Buffer.from(answer).toString("latin1").replace(from, to), "latin1"));
  const inBody = (at: number, change: (byte: number) => number) => (answer: Uint8Array) => {
    const end = Buffer.from(answer).indexOf("\r\n\r\n") + 4;
    return answer.map((byte, n) => (n === end + at ? change(byte) : byte));
  };
  /** Puts another body, or a header, into an answer. */
  const withBody =
    (body: Uint8Array, coding = "ota-patch, deflate") =>
    (answer: Uint8Array) => {
      const text = Buffer.from(answer).toString("latin1");
      const head = text.slice(0, text.indexOf("\r\n\r\n"));
      const changed = head
        .replace(/(\r\nContent-Length: )\d+/i, `$1${body.length}`)
        .replace(/(\r\nContent-Encoding: )[^\r]*/i, `$1${coding}`);
      return join2(bytes(`${changed}\r\n\r\n`), body);
    };
  const patch = encodePatch(bytes(OLD_TEXT), bytes(NEW_TEXT))!;
  const large = noise(70_000);

  const spoilt: [string, (answer: Uint8Array) => Uint8Array][] = [
    ["a patch that is none", withBody(deflated(noise(300)))],
    ["a patch that is not compressed", withBody(patch)],
    [
      "a patch with another window than fits",
      withBody(new Uint8Array(zlib.deflateSync(patch)).with(0, 0xf8)),
    ],
    [
      "a patch of something else",
      withBody(deflated(encodePatch(bytes(NEW_TEXT), bytes(OLD_TEXT))!)),
    ],
    [
      "a patch that makes something else",
      withBody(deflated(encodePatch(bytes(OLD_TEXT), bytes(`${OLD_TEXT}x`))!)),
    ],
    ["a patch whose end is missing", withBody(deflated(patch.subarray(0, -1)))],
    ["a patch that goes on", withBody(deflated(join2(patch, Uint8Array.of(0))))],
    ["a compressed patch whose end is missing", withBody(deflated(patch).subarray(0, -5))],
    [
      "a compressed patch that something follows",
      withBody(join2(deflated(patch), Uint8Array.of(0))),
    ],
    [
      "a patch with a spoilt byte in what it inserts",
      withBody(deflated(patch.with(-20, patch.at(-20)! ^ 1))),
    ],
    ["a patch that is longer than what it makes", withBody(noise(30_000))],
    ["nothing", withBody(new Uint8Array())],
    ["a coding that is none", replace(/(?<=Content-Encoding: )[^\r]*/i, "br")],
    ["a patch alone", withBody(patch, "ota-patch")],
    ["codings in another order", replace(/(?<=Content-Encoding: )[^\r]*/i, "deflate, ota-patch")],
    ["compressed content that is none", withBody(noise(300), "deflate")],
    ["compressed content that is too long", withBody(deflated(bytes(`${NEW_TEXT}x`)), "deflate")],
    [
      "compressed content that something follows",
      withBody(join2(deflated(bytes(NEW_TEXT)), Uint8Array.of(0)), "deflate"),
    ],
    ["zeros without an end", withBody(deflated(new Uint8Array(3_000_000)), "deflate")],
    ["other content", withBody(deflated(bytes(OLD_TEXT)), "deflate")],
    ["more than anybody could need", withBody(large, "deflate")],
    ["a spoilt byte", inBody(20, (byte) => byte ^ 1)],
  ];
  test.each(spoilt)("%s", async (_name, change) => {
    const board = await boardOf("rp2");
    let first = true;
    listen(van.link, /text\.txt/, (answer) => {
      if (!first) return answer;
      first = false;
      return change(answer);
    });
    const start = await board.start(UPDATE);
    await done(board, start);
    expect(start.output.join("\n").match(/text\.txt: .*, trying again/g)).toHaveLength(1);
    expect(asked("text.txt").map((head) => head.includes("Accept-Encoding"))).toEqual([true, false]);
  }); // prettier-ignore

  test("what is for everybody need not be said: identity, and names in other letters", async () => {
    for (const [coding, found] of [["Ota-Patch ,DEFLATE", "Ota-Patch ,DEFLATE"], ["identity", ""]] as const) {
      const board = await boardOf("rp2");
      const plain = coding === "identity";
      listen(van.link, /text\.txt/, (answer) => {
        const text = Buffer.from(answer).toString("latin1");
        return plain
          ? withBody(bytes(NEW_TEXT), coding)(answer)
          : new Uint8Array(Buffer.from(text.replace(/(Content-Encoding: )[^\r]*/i, `$1${coding}`), "latin1"));
      });
      const start = await board.start(UPDATE);
      await done(board, start);
      expect(start.output.join("\n")).not.toContain("trying again");
      if (found) expect(codingsOf("text.txt")).toEqual([found]);
    }
  }); // prettier-ignore

  test.each([
    ["a patch", (answer: Uint8Array) => withBody(deflated(noise(300)))(answer)],
    ["compressed content", (answer: Uint8Array) => withBody(noise(300), "deflate")(answer)],
    ["other firmware", (answer: Uint8Array) => withBody(deflated(OLD_IMAGE), "deflate")(answer)],
  ])("firmware: %s", async (_name, change) => {
    const board = await boardOf("esp32");
    let first = true;
    listen(van.link, /firmware_1/, (answer) => {
      const now = first ? change(answer) : answer;
      first = false;
      return now;
    });
    const start = await board.start(UPDATE);
    await done(board, start);
    expect(start.output.join("\n").match(/firmware_1.0.1.bin: .*, trying again/g)).toHaveLength(1);
    expect(codingsOf("firmware_1.0.1.bin").at(-1)).toBe("");
  });

  test.each([
    ["the decoder", `class Full:\n    @staticmethod\n    def apply(part):\n        raise MemoryError\n`, "ota_patch"],
    ["what reads it", `class Full:\n    @staticmethod\n    def receive(part, coding, pieces):\n        raise MemoryError\n`, "ota_coding"],
  ])("there is no room for %s", async (_name, code, name) => {
    for (const kind of ["esp32", "rp2"] as const) {
      const board = await boardOf(kind);
      listen();
      const full = `import sys\n${code}\nsys.modules["${name}"] = Full\n`;
      const start = await board.start(full + UPDATE);
      await done(board, start);
      expect(start.output.join("\n")).toContain("MemoryError");
      const [, tried = ""] = /OTA: (\S+): .*MemoryError.*, trying again/.exec(start.output.join("\n"))!;
      expect(asked(tried).map((head) => head.includes("Accept-Encoding"))).toEqual([true, false]);
    }
  }); // prettier-ignore

  test.each([
    ["a table", `import ota_reader\ndef none(size):\n    if size >= 256:\n        raise MemoryError\n    return usual(size)\nusual = bytearray\nota_reader.bytearray = none\n`],
    ["what finds addresses", `import ota_patch\ndef none(*_):\n    raise MemoryError\nota_patch.execute = none\n`],
    ["a block, when firmware is written already", `
import ota_patch
usual = ota_patch.Patch.block
count = 0
def third(self):
    global count
    count += 1
    if count > 3:
        raise MemoryError
    usual(self)
ota_patch.Patch.block = third
`],
  ])("there is no room for %s", async (_name, code) => {
    const board = await boardOf("esp32");
    board.files.set("/text.txt", bytes(NEW_TEXT)); // the firmware alone comes as a patch
    listen();
    const start = await board.start(code + UPDATE);
    await done(board, start);
    expect(start.output.join("\n")).toMatch(/firmware_1\.0\.1\.bin: its patch is of no use: MemoryError.*, trying again/);
    expect(codingsOf("firmware_1.0.1.bin")).toEqual(["ota-patch, deflate", ""]);
  }); // prettier-ignore

  test("there is no module for an architecture", async () => {
    const board = await boardOf("esp32");
    const start = await board.start(
      `import sys\nclass Empty: pass\nsys.modules["ota_xtensa"] = Empty\n${UPDATE}`,
    );
    expect(start.output.join("\n")).toContain("its patch is of no use: KeyError");
    await done(board, start);
  });
});

describe("a cut, and a reset", () => {
  test("of a patch: it is asked for once more, then what it makes", async () => {
    const board = await boardOf("esp32");
    listen();
    van.link.weather = { ...van.link.weather, only: /firmware_1/, cutAfter: 450 };
    const start = await board.start(UPDATE);
    expect(start.error).toContain("the connection was cut");
    expect(asked("firmware_1.0.1.bin").map((head) => DICTIONARY.test(head))).toEqual([true, true, false]);
    listen();
    await done(board, await board.start(UPDATE));
    expect(codingsOf("firmware_1.0.1.bin")).toEqual(["ota-patch, deflate"]);
  }); // prettier-ignore

  test("of compressed content: what it makes goes on where it is cut then", async () => {
    const files = { "flash/big.txt": TEXT.map((line, n) => line + hex(noise(90, n))).join("") };
    const own = new Root().release("1.0.0", { "flash/main.py": "1\n" });
    own.release("1.0.1", { "flash/main.py": "1\n", ...files });
    await using other = await Van.open(own.path);
    const board = await other.board("rp2", "1.0.0");
    listen(other.link);
    other.link.weather = { ...other.link.weather, only: /big/, cutAfter: 21_000 };
    const start = await board.start(UPDATE);
    expect(asked("big.txt").map((head) => head.includes("Accept-Encoding"))).toEqual([true, false, false]);
    expect(asked("big.txt").map((head) => head.includes("Range: bytes="))).toEqual([false, false, true]);
    // The next update goes on, too, and so asks for no coding.
    expect(start.error).toContain("the connection was cut");
    listen(other.link);
    await done(board, await board.start(UPDATE), other);
    expect(asked("big.txt").map((head) => head.includes("Accept-Encoding"))).toEqual([false]);
  }); // prettier-ignore

  test("at any moment: what comes out is right", async () => {
    const board = await boardOf("esp32");
    const { operations } = await board.copy().start(UPDATE);
    const random = new Random(SEED);
    const is = (name: RegExp) => operations.flatMap((words, n) => (name.test(words) ? [n] : []));
    // As a patch comes, between that and its use, and while it is used.
    const patches = [...is(/\.d( |$)/), ...is(/write \/hw/)];
    expect(patches.length).toBeGreaterThan(60);
    for (const at of random.some([...operations.keys()].filter((n) => patches.includes(n) || random.chance(0.1)), ALL ? Infinity : 10)) {
      const where = `seed ${SEED}, before operation ${at}: ${operations[at]}`;
      const mine = board.copy();
      expect((await mine.start(UPDATE, { cutAt: at, torn: random.below(4) })).end, where).toBe("cut");
      const output = await mine.settle(CONFIRM);
      if (!output.includes("version: 1.0.1")) {
        const start = await mine.start(UPDATE);
        expect([start.end, start.error], where).toEqual(["reset", ""]);
        await mine.settle(CONFIRM);
      }
      expect(mine.tree(), where).toEqual(await van.tree("esp32", "1.0.1"));
      expect(runs(mine, NEW_IMAGE), where).toBe(true);
    }
  }); // prettier-ignore

  test("no room for a patch in flash: firmware needs none", async () => {
    const board = await boardOf("esp32");
    let start = await board.copy().start(UPDATE);
    const at = start.operations.findIndex((words) => words.includes("/.ota/image.d"));
    const mine = board.copy();
    await mine.start(UPDATE, { cutAt: at });
    mine.capacity = [...mine.files].reduce((sum, [path, { length }]) => sum + (path.startsWith("/hw/") ? 0 : length), 0) + 3500;
    // The manifest, which is there meanwhile, takes that room in part.
    listen();
    start = await mine.start(`import ota_coding\nreal = ota_coding.receive\n` + UPDATE);
    mine.capacity = Infinity;
    await done(mine, start);
  }); // prettier-ignore
});

describe("a build", () => {
  /** Python after which a build has, or has not, what decompresses. */
  const without = (more: string) => `
import builtins
usual = builtins.__import__
def found(name, *rest):
    if name == "deflate":
        raise ImportError("no module named 'deflate'")
${more}    return usual(name, *rest)
builtins.__import__ = found
`;

  test("that cannot decompress asks for nothing", async () => {
    for (const kind of ["esp32", "rp2"] as const) {
      const board = await boardOf(kind);
      listen();
      await done(board, await board.start(without("") + UPDATE));
      expect(heads.filter((head) => /Accept-Encoding|Available-Dictionary/.test(head))).toEqual([]);
      expect(heads.length).toBeGreaterThan(2);
    }
  });

  test("from before MicroPython 1.21 does it by uzlib", async () => {
    const board = await boardOf("esp32");
    listen();
    const uzlib = `
import deflate, sys
class uzlib:
    @staticmethod
    def DecompIO(stream, wbits=0):
        return deflate.DeflateIO(stream, deflate.ZLIB)
sys.modules["uzlib"] = uzlib
deflate = deflate
`;
    await done(board, await board.start(uzlib + without("") + UPDATE));
    expect(codingsOf("firmware_1.0.1.bin")).toEqual(["ota-patch, deflate"]);
    expect(codingsOf("text.txt")).toEqual(["ota-patch, deflate"]);
    expect(codingsOf("added.txt")).toEqual(["deflate"]);
  });

  test("with another transport gets everything as it is", async () => {
    const board = await boardOf("rp2");
    listen();
    const own = UPDATE.replace(
      "ota = ",
      `
class Own(WiFiOTA):
    http = False
    def get(self, path, take):
        WiFiOTA.get(self, path, take)
ota = `,
    ).replace('WiFiOTA("', 'Own("');
    await done(board, await board.start(own));
    expect(heads.filter((head) => head.includes("Accept-Encoding"))).toEqual([]);
  });
});

test("64 KB of heap are enough for 100 files and firmware, by patches", async () => {
  const lines = (n: number) => `VALUE = ${n}\n`.repeat(60);
  const old: Tree = {};
  const now: Tree = { "flash/main.py": "2\n" };
  for (let n = 0; n < 99; n++) {
    const path = `flash/lib/some/package/module_number_${n}.py`;
    if (n % 3 > 0) old[path] = `${lines(n)}${hex(noise(200, n))}`;
    now[path] = `NEW = 1\n${lines(n)}${hex(noise(200, n))}`;
  }
  const own = new Root()
    .release("1.0.0", { "flash/main.py": "1\n", ...old })
    .release("1.0.1", now);
  await Bun.write(join(own.path, "firmware_1.0.0.bin"), OLD_IMAGE);
  await Bun.write(join(own.path, "firmware_1.0.1.bin"), NEW_IMAGE);
  await using other = await Van.open(own.path);
  const board = await boardOf("esp32", other);
  listen(other.link);
  const start = await board.start(UPDATE, { heap: 64 * 1024 });
  expect(start.error + start.output.filter((line) => !line.includes("getting")).join("\n")).toBe(
    "OTA: 1.0.0 -> 1.0.1\nOTA: 1.0.1 is installed",
  );
  const { live, taken } = start.heap!;
  console.log(`  at most ${live} bytes alive, ${taken} with garbage, of 65536`);
  expect(live).toBeLessThan(44 * 1024);
  await done(board, start, other);
  expect(codingsOf("firmware_1.0.1.bin")).toEqual(["ota-patch, deflate"]);
  expect(answers.filter(({ coding }) => coding === "ota-patch, deflate").length).toBeGreaterThan(60);
}); // prettier-ignore
