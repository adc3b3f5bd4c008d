/**
 * What reaches a board from outside: manifests, heads of responses, a token, a server that takes its
 * time while a watchdog waits. `update()` raises OSError or ValueError and nothing else, and no step
 * takes longer than 5 s without `alive()`.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { type Kind } from "./board/board.ts";
import { CONFIRM, example, random, Root, ROLLBACK, runs, UPDATE, Van } from "./board/fleet.ts";
import { seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const SEED = seeded("board-inputs", 20250612);
const kinds: Kind[] = ["esp32", "pycom", "rp2"];

let van: Van;
beforeAll(async () => {
  van = await Van.open(example);
});
afterAll(async () => {
  await van[Symbol.asyncDispose]();
  Root.removeAll();
});

const hex = (bytes: Uint8Array | string): string => Buffer.from(bytes).toString("hex");
const CONTENT = "x\n";
const sha256 = new Bun.CryptoHasher("sha256").update(CONTENT).digest("hex");
const sha1 = new Bun.CryptoHasher("sha1").update(CONTENT).digest("hex");
const entry = (path: string, more: object = {}) => ({
  URL: "http://h/x",
  dst_path: path,
  hash: sha1,
  sha256,
  size: 2,
  ...more,
});
const manifest = (more: object = {}): Record<string, unknown> => ({
  delete: ["flash/lib/average.py"],
  new: [entry("/flash/lib/new.py"), entry("/sd/run.sh", { executable: true })],
  update: [entry("/flash/main.py")],
  firmware: {
    URL: "http://h/firmware_1.0.1.bin",
    hash: sha1,
    sha256,
    size: 2,
    version: "1.0.1",
  },
  base: "0".repeat(64),
  version: "1.0.1",
  previous_version: "1.0.0",
  ...more,
});

/** What staging makes of each manifest; "staged" means that the state file holds what it should. */
async function stage(kind: Kind, bodies: (Uint8Array | string)[]): Promise<string[]> {
  const board = await van.board(kind, "1.0.0");
  const before = board.tree();
  const lines = bodies.map((body) => hex(body) || "-").join("\n");
  board.write("/.ota/bodies", lines);
  const { output, error } = await board.start(`
import binascii, os, ota_boot, ota_common, ota_update
from OTA import OTA

class Told(OTA):
    def get(self, path, take):
        body = self.body if path.startswith("/manifest.json") else b"${"x\\n"}"
        for at in range(0, len(body), 100):
            take(body[at : at + 100])

def same(new):
    ota_boot.save(new)
    try:
        return ota_boot.load() == {k: new[k] for k in new if new[k]}
    finally:
        os.remove(ota_boot.STATE)

shown = print
def print(*words): pass
ota_common.print = ota_update.print = print
ota_boot.print = print
ota = Told()
with open("/.ota/bodies") as f:
    for line in f:
        ota.body = binascii.unhexlify(line.strip().replace("-", ""))
        try:
            new, firmware = ota_update.stage(ota, {})
            shown("nothing" if not new else "staged" if same(new) else "a state of another kind")
        except (OSError, ValueError) as e:
            shown("OSError" if isinstance(e, OSError) else "ValueError", repr(e))
        except Exception as e:
            shown("raised", repr(e))
`);
  expect(error).toBe("");
  board.files.delete("/.ota/bodies");
  expect(board.tree()).toEqual(before);
  expect(output).toHaveLength(bodies.length);
  return output;
}

describe("a manifest", () => {
  test("with what newer servers say besides is taken", async () => {
    for (const kind of kinds)
      expect(await stage(kind, [JSON.stringify(manifest())])).toEqual(["staged"]);
  });

  test("that would write lines into the state file, or has another shape, is refused", async () => {
    const image = (version: unknown) =>
      manifest({ firmware: { ...(manifest().firmware as object), version } });
    const bad = [
      image("1.0.1\nphase=x"),
      image("1.0.1\n"),
      image(["1.0.1"]),
      image(7),
      image(""),
      image("x".repeat(200)),
      manifest({ firmware: { ...(manifest().firmware as object), size: "2" } }),
      manifest({ version: ["1.0.1"] }),
      manifest({ version: "1.0.1\nphase=x" }),
      manifest({ version: "1".repeat(129) }),
      manifest({ version: "vv1" }),
      manifest({ new: entry("/flash/lib/new.py") }),
      manifest({ delete: "flash/main.py" }),
      manifest({ delete: null }),
      manifest({ firmware: [manifest().firmware] }),
      manifest({ new: [entry("/flash/x", { size: true })] }),
      manifest({ new: [entry("/flash/x", { size: -1 })] }),
      manifest({ new: [entry("/flash/x", { size: 2 ** 40 })] }),
      manifest({ new: [entry("/flash/\ud800")] }),
    ];
    const texts: (string | Uint8Array)[] = bad.map((one) => JSON.stringify(one));
    // A slash, written longer than it needs to be.
    const long = Buffer.from(
      JSON.stringify(manifest({ new: [entry("/flash/..~~sd/x")] })),
      "latin1",
    );
    long.set([0xc0, 0xaf], long.indexOf("~~"));
    texts.push(long);
    const output = await stage("esp32", texts);
    output.forEach((line, i) => expect(line, hex(texts[i]!)).toStartWith("ValueError"));
    const longest = `1${"0".repeat(127)}`;
    expect(await stage("esp32", [JSON.stringify(manifest({ version: longest }))])).toEqual([
      "staged",
    ]);
  });

  test("however it is spoilt: an OSError, a ValueError, or an update", async () => {
    const next = random(SEED);
    const pick = <T>(list: readonly T[]): T => list[next(list.length)]!;
    const odd = [
      null, true, -1, 0, 1e300, 2 ** 60, "", "x", "1.0.2", "\n", "a\nphase=undo", "/", "..", "\ud800", "€",
      [], {}, [[]], ["1.0.1"], { URL: 1 }, [null], "flash/main.py", "/flash/main.py", "http://h/?x", [entry("/flash/main.py")],
    ] as const; // prettier-ignore
    /** The same value with one part of it replaced, left out or doubled. */
    const bend = (value: unknown): unknown => {
      if (typeof value !== "object" || value === null || next(6) === 0) return pick(odd);
      if (Array.isArray(value)) {
        if (next(4) === 0) return [...value, ...value];
        const at = next(value.length + 1);
        return value.toSpliced(at, next(2), bend(value[at]));
      }
      const key = pick([...Object.keys(value), pick(["size", "hash", "x"])]);
      const { [key]: old, ...rest } = value as Record<string, unknown>;
      return next(5) === 0 ? rest : { ...rest, [key]: bend(old) };
    };
    const tear = (text: string): Uint8Array => {
      const bytes = Buffer.from(text);
      for (let n = 1 + next(3); n > 0; n--) {
        const at = next(bytes.length);
        if (next(2) === 0) bytes[at] = next(256);
        else bytes[at] = Buffer.from(pick([...'{}[]",:\\ nt0-']))[0]!;
      }
      return next(8) === 0 ? bytes.subarray(0, next(bytes.length)) : bytes;
    };
    const bodies = Array.from({ length: 300 }, (_, i) => {
      const text = JSON.stringify(i % 3 > 0 ? bend(manifest()) : manifest());
      return i % 3 === 1 ? Buffer.from(text) : tear(text);
    });
    const seen = { nothing: 0, staged: 0, OSError: 0, ValueError: 0 };
    for (const kind of ["esp32", "pycom"] as const) {
      const output = await stage(kind, bodies);
      output.forEach((line, i) => {
        const sort = line.split(" ")[0] as keyof typeof seen;
        expect(Object.keys(seen), `seed ${SEED}, ${kind}: ${line}: ${hex(bodies[i]!)}`).toContain(
          sort,
        );
        seen[sort]++;
      });
    }
    console.log(`  seed ${SEED}: ${JSON.stringify(seen)}`);
    expect(Math.min(seen.staged, seen.OSError, seen.ValueError)).toBeGreaterThan(10);
  });

  test.each([100, 1000])("of %i files is read twice", async (count) => {
    const root = new Root().release("1.0.0", { "flash/main.py": "1\n" });
    const files: Record<string, string> = { "flash/main.py": "2\n" };
    for (let i = 1; i < count; i++) files[`flash/lib/some/package/module_${i}.py`] = "1\n";
    root.release("1.0.1", files);
    await using own = await Van.open(root.path);
    const board = await own.board("rp2", "1.0.0");
    // Those are on the board: what takes time is to read the manifest.
    for (const path of Object.keys(files))
      if (path !== "flash/main.py") board.write(path.slice(5), "1\n");
    const { end, error, passes } = await board.start(UPDATE);
    expect([end, error, passes]).toEqual(["reset", "", 2]);
  });
});

describe("the head of a response", () => {
  test("however it is spoilt: an OSError, or a body", async () => {
    const next = random(SEED);
    const good =
      "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\nX: \r\n\r\nbody";
    const heads = [
      ...["x", "-4", "4x", "", "4 4", "1_0", "99999999999999999999", "+4", "0x4", "\xb2"].map(
        (length) => Buffer.from(good.replace("4\r", `${length}\r`), "latin1"),
      ),
      Buffer.from("HTTP/1.0 2\xff0 OK\r\n\r\n", "latin1"),
      Buffer.from("HTTP/1.0 404 \xff\xfe\r\n\r\n", "latin1"),
      ...Array.from({ length: 1500 }, () => {
        const bytes = Buffer.from(good);
        for (let n = 1 + next(4); n > 0; n--) bytes[next(bytes.length)] = next(256);
        return next(6) === 0 ? bytes.subarray(0, next(bytes.length)) : bytes;
      }),
    ];
    const board = await van.board("rp2", "1.0.0");
    board.write("/heads", heads.map((bytes) => hex(bytes) || "-").join("\n"));
    const { output, error } = await board.start(`
import binascii, ota_http

class Told:
    def __init__(self, data, size):
        self.data = data
        self.size = size
    def send(self, data):
        return len(data)
    def recv(self, most):
        piece = self.data[: self.size]
        self.data = self.data[self.size :]
        return piece
    def close(self):
        pass

size = 0
with open("/heads") as f:
    for line in f:
        size = size % 70 + 1
        data = binascii.unhexlify(line.strip().replace("-", ""))
        ota_http.connected = lambda address: Told(data, size)
        try:
            body = []
            ota_http.get("h", 1, "/", body.append)
            print("body")
        except OSError:
            print("OSError")
        except Exception as e:
            print("raised", repr(e))
`);
    expect(error).toBe("");
    output.forEach((line, i) =>
      expect(["body", "OSError"], `seed ${SEED}: ${line}: ${hex(heads[i]!)}`).toContain(line),
    );
    expect(output.slice(0, 12)).toEqual(Array.from({ length: 12 }, () => "OSError"));
    expect(output.filter((line) => line === "body").length).toBeGreaterThan(100);
  });

  test("a length that is none is asked for again", async () => {
    let spoilt = 0;
    const spoil = (bytes: Uint8Array, total: number) => {
      if (total > 0 || spoilt++ > 0) return bytes;
      const text = Buffer.from(bytes).toString("latin1");
      return Buffer.from(text.replace(/(?<=Content-Length: )\d/i, "x"), "latin1");
    };
    const board = await van.board("rp2", "1.0.0");
    van.link.requests.length = 0;
    van.link.weather = { only: /manifest/, spoil };
    const { end, error, output } = await board.start(UPDATE);
    van.link.weather = {};
    expect([end, error]).toEqual(["reset", ""]);
    expect(output.join("\n")).toContain("no length that is one, trying again");
    expect(van.link.requests.filter((line) => line.includes("manifest"))).toHaveLength(2);
  });
});

describe("a token", () => {
  const token = "s3cret +&=%ü/?#";
  const withToken = (text: string) => UPDATE.replace("8000)", `8000, ${JSON.stringify(text)})`);

  test.each(kinds)(
    "that `serve --token` wants is sent, for the manifest and for files (%s)",
    async (kind) => {
      await using own = await Van.open(example, ["--token", token]);
      const board = await own.board(kind, "1.0.0");
      const old = board.tree();
      for (const wrong of ["", "another"]) {
        const { error } = await board.start(withToken(wrong));
        expect(error).toContain("401: it wants a token, or another one");
        expect(board.tree()).toEqual(old);
      }
      const { end, error, output } = await board.start(withToken(token));
      expect([end, error]).toEqual(["reset", ""]);
      expect(output.join("\n")).not.toContain("s3cret");
      expect((await board.settle(CONFIRM)).join("\n")).toContain("OTA: 1.0.1 is confirmed");
      expect(board.tree()).toEqual(await own.tree(kind, "1.0.1"));
      if (kind !== "rp2") expect(runs(board, await own.firmware("1.0.1"))).toBe(true);
      // So it is in config.py of the example, too.
      expect(board.read(`${board.home}/main.py`)).toContain("config.TOKEN,");
    },
  );
});

describe("one hash at a time", () => {
  test("is what the stand-in for uhashlib allows; all tests of boards run with it", async () => {
    const board = await van.board("pycom", "1.0.0");
    const { output, error } = await board.start(`
import uhashlib
print(uhashlib.sha256(b"x").digest() == uhashlib.sha256(b"x").digest())
open = uhashlib.sha256()
uhashlib.sha256()
`);
    expect(output).toEqual(["True"]);
    expect(error).toContain("hash_busy");
  });
});

describe("a watchdog", () => {
  const LIMIT = 5000;
  const armed = (code: string, feed = true) => `
import machine
from OTA import OTA
dog = machine.WDT(timeout=8000)
${feed ? "OTA.alive = lambda self: dog.feed()" : ""}
${code}
dog.feed()
`;

  test("is fed on a slow board, on a slow network, at every step", async () => {
    for (const kind of kinds) {
      const board = await van.board(kind, "1.0.0");
      // A picture that takes a while to hash.
      board.write("/sd/photo.raw", new Uint8Array(300_000));
      board.slow = true;
      board.joins = 15_000;
      van.link.weather = { late: (total) => (total % 2048 < 512 ? 3 : 0), deaf: 2 };
      const first = await board.start(armed(UPDATE));
      van.link.weather = {};
      expect([first.end, first.error]).toEqual(["reset", ""]);
      const second = await board.start(armed(CONFIRM));
      expect([second.end, second.error]).toEqual(["done", ""]);
      expect(second.output).toContain("OTA: 1.0.1 is confirmed");
      const third = await board.start(armed(ROLLBACK));
      expect([third.end, third.error]).toEqual(["reset", ""]);
      const hungry = [first, second, third].map((start) => start.hungry);
      console.log(`  ${kind}: at most ${hungry.map((ms) => ms / 1000).join(", ")} s`);
      expect(Math.max(...hungry)).toBeLessThanOrEqual(LIMIT);
    }
  });

  test("is fed while a manifest and what is on the board are checked", async () => {
    const root = new Root().release("1.0.0", { "flash/main.py": "1\n" });
    const files: Record<string, string> = { "flash/main.py": "2\n" };
    for (let i = 0; i < 300; i++) files[`flash/lib/module_${i}.py`] = `${i}\n`;
    root.release("1.0.1", { ...files, "flash/image.raw": "\0".repeat(200_000) });
    await using own = await Van.open(root.path);
    const board = await own.board("rp2", "1.0.0");
    for (const [path, text] of Object.entries(files))
      if (path !== "flash/main.py") board.write(path.slice(5), text);
    board.write("/image.raw", "\0".repeat(200_000));
    board.slow = true;
    const { end, error, hungry } = await board.start(armed(UPDATE));
    expect([end, error]).toEqual(["reset", ""]);
    expect(hungry).toBeLessThanOrEqual(LIMIT);
  });

  test.each([
    ["from the start", { silentAfter: 0 }],
    ["within a file", { silentAfter: 700 }],
    ["and does not even refuse", { deaf: 99 }],
  ])("is fed while a server is silent, %s", async (_name, weather) => {
    const board = await van.board("rp2", "1.0.0");
    const old = board.tree();
    van.link.weather = weather;
    const { end, error, hungry } = await board.start(armed(UPDATE));
    van.link.weather = {};
    expect(end).toBe("error");
    expect(error).toContain("110");
    expect(hungry).toBeLessThanOrEqual(LIMIT);
    expect(board.tree()).toEqual(old);
  });

  test("bites where it is not fed", async () => {
    const board = await van.board("rp2", "1.0.0");
    board.slow = true;
    expect((await board.start(armed(UPDATE, false))).end).toBe("bitten");
  });

  test("of an RP2040 takes no more than 8,388 ms, and the example asks for less", async () => {
    const board = await van.board("rp2", "1.0.0");
    const { output } = await board.start(`
import config, machine
machine.WDT(timeout=config.WATCHDOG_SECONDS * 1000)
try:
    machine.WDT(timeout=120000)
except ValueError as e:
    print(e)
`);
    expect(output).toEqual(["WDT timeout too long"]);
  });
});
