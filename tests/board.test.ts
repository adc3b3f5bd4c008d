// The board's side, examples/smart-meter/*/flash, on a real MicroPython against a real server.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { LooseVersion } from "../ota.ts";
import { Board, type Kind } from "./board/board.ts";
import {
  CONFIRM,
  example,
  random,
  ROLLBACK,
  Root,
  runs,
  UPDATE,
  update,
  Van,
} from "./board/fleet.ts";
import { Link } from "./board/link.ts";
import { binaries } from "./board/make-firmware.ts";
import { ALL, seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const kinds: Kind[] = ["esp32", "pycom", "rp2"];
/** Set OTA_ALL for a reset at every operation; else each run takes others of them. */
const SEED = seeded("board");
const isTried = (at: number, oneOf: number) => ALL || (at + SEED) % oneOf === 0;
const UPDATE_COMMAND = new Uint8Array([1, 2, 3]);
/** What the application made, and no update may touch. */
const OWN = { "/sd/pulses.cnt": "4711" };

/**
 * A board as a reset leaves it that comes before each file operation of a start. Some are cut in
 * earnest: then it is as it was seen to be.
 */
async function resetsOf(board: Board, code: string) {
  const states: Board[] = [];
  const watch = (before: Board) => void states.push(before);
  const { operations } = await board.copy().start(code, { watch });
  for (let at = 0; at < operations.length; at++) {
    if (!isTried(at, 16)) continue;
    const cut = board.copy();
    const { end } = await cut.start(code, { cutAt: at, torn: at });
    expect([operations[at], end]).toEqual([operations[at]!, "cut"]);
    expect([operations[at], cut.files]).toEqual([operations[at]!, states[at]!.files]);
    expect([operations[at], cut.directories]).toEqual([operations[at]!, states[at]!.directories]);
  }
  return { states, operations };
}

let van: Van;
beforeAll(async () => {
  van = await Van.open(example);
});
afterAll(async () => {
  await van[Symbol.asyncDispose]();
  Root.removeAll();
});

describe("the example", () => {
  test("its binary files are those that the documented command makes", async () => {
    for (const [path, bytes] of binaries()) {
      expect(await Bun.file(join(example, path)).bytes()).toEqual(new Uint8Array(bytes));
    }
  });

  test("what recovers is the same in both releases", async () => {
    for (const name of ["boot.py", "lib/ota_boot.py"]) {
      const [old, now] = ["1.0.0", "1.0.1"].map((v) => Bun.file(join(example, v, "flash", name)));
      expect(await now!.text()).toBe(await old!.text());
    }
  });

  test("every Python file compiles on MicroPython, and needs no syntax that Pycom's lacks", async () => {
    for (const version of ["1.0.0", "1.0.1"]) {
      const board = await van.board("esp32", version);
      const names = [...board.files.keys()].filter((path) => path.endsWith(".py"));
      expect(names.length).toBeGreaterThan(9);
      const { error } = await board.start(
        // This build makes no machine code.
        `for name in ${JSON.stringify(names)}: compile(open(name).read().replace("@micropython.viper", ""), name, "exec")`,
        { boot: false },
      );
      expect(error).toBe("");
      for (const name of names) expect(board.read(name)).not.toMatch(/\bf["']|:=|\bmatch .*:$/m);
    }
  });
});

describe.each(kinds)("an update on a board of kind %s", (kind) => {
  test("text, binary files, deletes, firmware; then back", async () => {
    const board = await van.board(kind, "1.0.0", OWN);
    const old = board.tree();
    van.link.requests.length = 0;
    const [first, second] = await update(board);
    expect(first!.error).toBe("");
    expect(first!.end).toBe("reset");
    expect(board.tree()).toEqual(await van.tree(kind, "1.0.1", OWN));
    expect(second!.output).toContain("version: 1.0.1");
    expect(second!.output).toContain("OTA: 1.0.1 is confirmed");
    expect(van.link.requests[0]).toMatch(/^GET \/manifest\.json\?hash=sha256&current_ver=1\.0\.0/);
    const image = await van.firmware("1.0.1");
    if (kind !== "rp2") expect(runs(board, image)).toBe(true);
    if (kind === "esp32") expect(board.otadata().ota_1).toBe("valid");
    else if (kind === "rp2") expect(first!.output.join()).toContain("takes no firmware");

    // It has what there is.
    expect((await board.start(UPDATE)).output).toContain("update: False");

    expect((await board.start(ROLLBACK)).end).toBe("reset");
    await board.settle();
    expect(board.tree()).toEqual(old);
    if (kind !== "rp2") expect(runs(board, image)).toBe(false);
    // The firmware that is back stays, whatever the bootloader thinks of it.
    for (let i = 0; i < 3; i++) expect(await board.settle()).toEqual([]);
    if (kind !== "rp2") expect(runs(board, image)).toBe(false);

    // What was taken back is not installed again by itself.
    expect((await board.start(UPDATE)).output).toContain("OTA: 1.0.1 failed here before");
    expect(van.link.requests.at(-1)).toContain("&failed=1.0.1");
    expect(board.tree()).toEqual(old);
    expect((await board.start(ROLLBACK)).error).toContain("no release to go back to");
  });

  test("a reset at every file operation: the old release or the new one", async () => {
    const start = await van.board(kind, "1.0.0", OWN);
    const trees = {
      old: JSON.stringify(start.tree()),
      new: JSON.stringify(await van.tree(kind, "1.0.1", OWN)),
    };
    const image = await van.firmware("1.0.1");
    const { states, operations } = await resetsOf(start, UPDATE);
    expect(operations.length).toBeGreaterThan(70);
    const commit = operations.findIndex((words) => words.endsWith("/.ota/state"));
    const seen = { old: 0, new: 0 };
    let resets = 0;
    for (let at = 0; at < operations.length; at++) {
      // While it stages there is less to go wrong.
      if (at < commit - 4 && !isTried(at, 8)) continue;
      const where = `${kind}, reset before operation ${at}: ${operations[at]}`;
      const board = states[at]!;
      resets++;
      const after = resets % 5 === 0 ? board.copy() : undefined;
      await board.settle();
      const tree = JSON.stringify(board.tree());
      const now = tree === trees.new ? "new" : "old";
      if (now === "old") expect(board.tree(), where).toEqual(start.tree());
      seen[now]++;
      // Pycom's switch cannot be repeated: there, old files may find the new firmware.
      if (kind === "esp32") expect(runs(board, image), where).toBe(now === "new");
      if (!after) continue;
      // Whatever happened, the next try gets there.
      let output = await after.settle(CONFIRM);
      if (!output.includes("version: 1.0.1")) {
        expect((await after.start(UPDATE)).end, where).toBe("reset");
        output = await after.settle(CONFIRM);
      }
      expect(output, where).toContain("OTA: 1.0.1 is confirmed");
      expect(JSON.stringify(after.tree()), where).toBe(trees.new);
    }
    console.log(`  ${kind}: ${resets} resets, ${seen.old} times old, ${seen.new} times new`);
    expect(seen.old).toBeGreaterThan(10);
    expect(seen.new).toBeGreaterThan(10);
  });

  test("a reset at every file operation of going back", async () => {
    const start = await van.board(kind, "1.0.0", OWN);
    const old = start.tree();
    await update(start);
    const now = JSON.stringify(start.tree());
    const image = await van.firmware("1.0.1");
    const { states, operations } = await resetsOf(start, ROLLBACK);
    expect(operations.length).toBeGreaterThan(20);
    for (let at = 0; at < operations.length; at++) {
      if (!isTried(at, 3)) continue;
      const where = `${kind}, reset before operation ${at}: ${operations[at]}`;
      const board = states[at]!;
      await board.settle();
      const went = JSON.stringify(board.tree()) !== now;
      if (went) expect(board.tree(), where).toEqual(old);
      if (kind !== "rp2") expect(runs(board, image), where).toBe(!went);
    }
  });

  test("resets during recovery", async () => {
    const next = random(SEED);
    const start = await van.board(kind, "1.0.0", OWN);
    const trees = [start.tree(), await van.tree(kind, "1.0.1", OWN)].map((tree) =>
      JSON.stringify(tree),
    );
    const { states, operations } = await resetsOf(start, UPDATE);
    const commit = operations.findIndex((words) => words.endsWith("/.ota/state")) + 1;
    let resets = 0;
    for (let round = 0; round < 12; round++) {
      const at = commit + next(operations.length - commit);
      const board = states[at]!.copy();
      let where = `seed ${SEED}, round ${round}, ${operations[at]}`;
      for (let again = 0; again < 4; again++) {
        const { end, operations: done } = await board.start("", { cutAt: next(12), torn: next(4) });
        where += `; ${end} before ${done.length}`;
        if (end === "cut") resets++;
      }
      await board.settle();
      expect(trees, where).toContain(JSON.stringify(board.tree()));
    }
    expect(resets).toBeGreaterThan(3);
  });
});

describe("a release that does not work", () => {
  test.each(kinds)("three starts without confirm(), then it is taken back: %s", async (kind) => {
    const board = await van.board(kind, "1.0.0", OWN);
    const old = board.tree();
    await board.start(UPDATE);
    const now = await van.tree(kind, "1.0.1", OWN);
    // The ESP32's own bootloader takes new firmware back at the second start.
    const starts = kind === "esp32" ? 1 : 3;
    for (let i = 0; i < starts; i++) {
      await board.settle();
      expect(board.tree()).toEqual(now);
    }
    const output = await board.settle();
    expect(output.join("\n")).toContain("OTA: 1.0.1 is taken back");
    expect(board.tree()).toEqual(old);
    if (kind !== "rp2") expect(runs(board, await van.firmware("1.0.1"))).toBe(false);
    for (let i = 0; i < 5; i++) expect(await board.settle()).toEqual([]);
  });

  test("files alone get three starts on an ESP32, too; then another release is tried", async () => {
    const root = new Root()
      .release("1.0.0", { "flash/main.py": "print('old')\n" })
      .release("1.0.1", { "flash/main.py": "raise ValueError\n" });
    await using own = await Van.open(root.path);
    const board = await own.board("esp32", "1.0.0");
    const old = board.tree();
    await board.start(UPDATE);
    for (let i = 0; i < 3; i++) {
      expect((await board.start(`execfile("/main.py")`)).error).toContain("ValueError");
    }
    expect((await board.start(`execfile("/main.py")`)).output.at(-1)).toBe("old");
    expect(board.tree()).toEqual(old);
    expect((await board.start(UPDATE)).output).toContain("update: False");

    root.release("1.0.2", { "flash/main.py": "print('new')\n" });
    await using later = await Van.open(root.path);
    const again = board.copy();
    Object.assign(again, { link: later.link });
    expect((await again.start(UPDATE)).end).toBe("reset");
    expect((await again.start(`execfile("/main.py")`)).output).toEqual(["new"]);
    expect(later.link.requests[0]).toContain("failed=1.0.1");
  });

  test("an image that the bootloader refuses: the old files, at once", async () => {
    const root = new Root()
      .release("1.0.0", { "flash/main.py": "1\n" })
      .release("1.0.1", { "flash/main.py": "2\n" });
    await Bun.write(join(root.path, "firmware_1.0.1.bin"), "not an image");
    await using own = await Van.open(root.path);
    const board = await own.board("esp32", "1.0.0");
    const old = board.tree();
    const { error } = await board.start(UPDATE);
    expect(error).toContain("VALIDATE_FAILED");
    expect(board.tree()).toEqual(old);
    expect(board.otadata().boot).toBe("ota_0");
    expect(await board.settle()).toEqual([]);
  });

  test("update() waits for the trial, and for a boot.py that recovers", async () => {
    const board = await van.board("rp2", "1.0.0");
    expect((await board.start(UPDATE, { boot: false })).error).toContain("boot.py must call");
    await board.start(UPDATE);
    expect((await board.start(UPDATE)).error).toContain("1.0.1 is on trial");
  });

  test("a disk too full to count starts: taken back", async () => {
    const board = await van.board("rp2", "1.0.0");
    const old = board.tree();
    await board.start(UPDATE);
    board.capacity = 1;
    await board.start();
    board.capacity = Infinity;
    expect(board.tree()).toEqual(old);
  });
});

describe("a bad network", () => {
  const broken = async (kind: Kind, weather: Link["weather"]) => {
    const board = await van.board(kind, "1.0.0", OWN);
    const old = board.tree();
    van.link.weather = weather;
    van.link.requests.length = 0;
    const result = await board.start(UPDATE);
    van.link.weather = {};
    return { board, old, result };
  };
  /** After it failed: nothing has changed, and on a good network the update works. */
  const harmless = async ({ board, old }: { board: Board; old: Record<string, string> }) => {
    expect(board.tree()).toEqual(old);
    expect(await board.settle()).toEqual([]);
    van.link.requests.length = 0;
    const [again] = await update(board);
    expect(again!.end).toBe("reset");
    expect(board.tree()).toEqual(await van.tree(board.kind, "1.0.1", OWN));
  };

  test.each([
    ["a byte at a time", () => 1],
    ["two bytes at a time", () => 2],
    ["99 and 101 in turn", (total: number) => (total % 2 === 0 ? 99 : 101)],
    ["up to 300, at random", random(7).bind(null, 300)],
  ] as [string, (total: number) => number][])("however it cuts: %s", async (_name, size) => {
    const { board, result } = await broken("esp32", { piece: (total) => Math.max(1, size(total)) });
    expect(result.error).toBe("");
    expect(board.tree()).toEqual(await van.tree("esp32", "1.0.1", OWN));
  });

  test.each([
    ["a file", /uplink/],
    ["a binary file", /logo/],
    ["the firmware", /firmware_1/],
  ])("a bad hash of %s, for good: old", async (_name, only) => {
    const spoil = (bytes: Uint8Array, total: number) =>
      total > 0 && bytes.length > 0 ? bytes.with(0, bytes[0]! ^ 1) : bytes;
    // The first piece is the head of the response.
    const head = (total: number) => (total === 0 ? 300 : 512);
    const run = await broken("esp32", { only, spoil, piece: head });
    expect(run.result.error).toContain("its hash is wrong");
    const tries = van.link.requests.filter((line) => only.test(line) && !/manifest/.test(line));
    expect(tries.length).toBe(3);
    expect(run.board.otadata().boot).toBe("ota_0");
    await harmless(run);
  });

  test("a bad hash once: fetched again", async () => {
    let spoiled = 0;
    const spoil = (bytes: Uint8Array, total: number) =>
      total === 300 && spoiled++ === 0 ? bytes.with(0, bytes[0]! ^ 1) : bytes;
    const run = await broken("rp2", {
      only: /main\.py/,
      spoil,
      piece: (total) => (total === 0 ? 300 : 512),
    });
    expect(spoiled).toBeGreaterThan(0);
    expect(run.result.end).toBe("reset");
    expect(run.board.tree()).toEqual(await van.tree("rp2", "1.0.1", OWN));
  });

  test.each([
    ["within the head", /meter\.py/, 150],
    ["within a file", /meter\.py/, 600],
    ["within the manifest", /manifest/, 1000],
    ["at once", /./, 0],
    ["within the firmware", /firmware_1/, 2500],
  ])("a connection cut %s: old, and what was staged is used", async (name, only, cutAfter) => {
    const run = await broken("esp32", { only, cutAfter });
    expect(run.result.error).toContain("cut");
    const before = new Set(van.link.requests);
    await harmless(run);
    if (name !== "within the firmware") return;
    for (const line of van.link.requests) {
      expect(before.has(line) && !/manifest|firmware/.test(line), line).toBe(false);
    }
  });

  test.each([
    ["from the start", 0],
    ["within a file", 700],
  ])("a server that goes silent %s: old", async (_name, silentAfter) => {
    const run = await broken("pycom", { silentAfter });
    expect(run.result.error).toContain("110");
    await harmless(run);
  });

  test("no server", async () => {
    const board = await van.board("rp2", "1.0.0");
    const nobody = new Link(1);
    Object.assign(board, { link: nobody });
    const old = board.tree();
    expect((await board.start(UPDATE)).end).toBe("error");
    expect(board.tree()).toEqual(old);
    nobody.stop();
  });

  test("the head of a response, cut at every place and in every accent", async () => {
    const heads: [string, string | null][] = [
      ["HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", "5"],
      ["HTTP/1.1 200 OK\r\nX: \r\ncontent-length:5\r\n\r\n", "5"],
      ["HTTP/1.1 200\nCONTENT-LENGTH:   5\n\n", "5"],
      ["HTTP/1.0 200 OK\r\nX-Pad: " + "-".repeat(400) + "\r\n\r\n", "None"],
      ["HTTP/1.1 404 Not Found\r\n\r\n", null],
      ["HTTP/1.1 500\r\n\r\n", null],
      ["SSH-2.0-OpenSSH\r\n\r\n", null],
      ["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", null],
      ["HTTP/1.1 200 OK\r\n" + "A: b\r\n".repeat(2000) + "\r\n", null],
    ];
    const board = await van.board("rp2", "1.0.0");
    const { output, error } = await board.start(`
import ota_http
def tell(text, size):
    head = ota_http.Head()
    data = text.encode() + b"\\r\\n\\r\\nbody"
    at = 0
    while at < len(data):
        try:
            n = head.feed(data[at:at + size])
        except OSError as e:
            return "OSError"
        if n >= 0:
            return (head.length, data[at + n:] == b"\\r\\n\\r\\nbody")
        at += size
for text in ${JSON.stringify(heads.map(([text]) => text))}:
    sizes = range(1, 120) if len(text) < 300 else (1, 7, 100, 512)
    print(set([tell(text, size) for size in sizes]))
`);
    expect(error).toBe("");
    expect(output).toEqual(
      heads.map(([, length]) => (length === null ? "{'OSError'}" : `{(${length}, True)}`)),
    );
  });

  test("SHA-1 serves where the server has nothing else, if the board can", async () => {
    van.link.rewrite = (request) => request.replace("hash=sha256", "x=");
    const board = await van.board("rp2", "1.0.0");
    expect((await board.start(UPDATE)).error).toContain("this board has no SHA-1");
    const { end, error } = await board.start(
      `import sys, with_sha1\nsys.modules["uhashlib"] = with_sha1\n${UPDATE}`,
    );
    van.link.rewrite = undefined;
    expect(error).toBe("");
    expect(end).toBe("reset");
    expect(board.tree()).toEqual(await van.tree("rp2", "1.0.1"));
  });
});

describe("a full disk", () => {
  test.each(kinds)(
    "at every size of the rest: old, then new once there is room (%s)",
    async (kind) => {
      const start = await van.board(kind, "1.0.0", OWN);
      const used = [...start.files]
        .filter(([path]) => !path.startsWith("/hw/"))
        .reduce((sum, [, content]) => sum + content.length, 0);
      const now = await van.tree(kind, "1.0.1", OWN);
      let full = 0;
      for (let rest = 0; rest < 12_000; rest += 1100) {
        const board = start.copy();
        board.capacity = used + rest;
        const { end, output, error } = await board.start(UPDATE);
        if (end === "reset") {
          await board.settle();
          expect(board.tree()).toEqual(now);
          break;
        }
        expect(output.join("\n") + error).toMatch(/the disk is full|OSError: 28/);
        full++;
        expect(await board.settle()).toEqual([]);
        expect(board.tree()).toEqual(start.tree());
        board.capacity = Infinity;
        expect((await board.start(UPDATE)).end).toBe("reset");
        await board.settle();
        expect(board.tree()).toEqual(now);
      }
      expect(full).toBeGreaterThan(3);
    },
  );
});

describe("what an update must not do", () => {
  test("change or delete what recovers", async () => {
    const root = new Root()
      .release("1.0.0", { "flash/main.py": "1\n" })
      .release("1.0.1", { "flash/main.py": "2\n", "flash/boot.py": "print('hello')\n" });
    await using own = await Van.open(root.path);
    for (const kind of ["rp2", "pycom"] as const) {
      const board = await own.board(kind, "1.0.0");
      const old = board.tree();
      const { error, output } = await board.start(UPDATE);
      expect(error).toMatch(/boot\.py can be changed over a cable only/);
      expect(output).toEqual([]);
      expect(board.tree()).toEqual(old);
    }
  });

  test("a full list that leaves them as they are is fine", async () => {
    const board = await van.board("rp2", "1.0.0");
    board.files.delete("/OTA_VERSION.py");
    expect((await update(board))[0]!.end).toBe("reset");
    const now = await van.tree("rp2", "1.0.1");
    // Without a version nothing is deleted.
    for (const path of ["/lib/average.py", "/sd/selftest.txt"]) {
      now[path] = (await van.tree("rp2", "1.0.0"))[path]!;
    }
    expect(board.tree()).toEqual(
      Object.fromEntries(Object.entries(now).sort(([a], [b]) => (a < b ? -1 : 1))),
    );
  });
});

describe("files and directories", () => {
  const root = new Root()
    .release("1.0.0", {
      "flash/lib/shape": "a file\n",
      "flash/lib/nest/one.py": "1\n",
      "flash/lib/nest/deep/two.py": "2\n",
      "flash/main.py": "1\n",
      "flash/empty": "",
      "sd/größe.txt": "old",
    })
    .release("1.0.1", {
      "flash/lib/shape/square.py": "a module\n",
      "flash/lib/shape/round/circle.py": "a module\n",
      "flash/lib/nest": "a file\n",
      "flash/main.py": "2\n",
      "flash/new empty": "",
      "sd/größe.txt": "new",
      "sd/100% of #1?.txt": "a name\n",
    });

  test.each(["esp32", "pycom"] as Kind[])(
    "change into each other, at every reset (%s)",
    async (kind) => {
      await using own = await Van.open(root.path);
      const start = await own.board(kind, "1.0.0", OWN);
      const trees = [start.tree(), await own.tree(kind, "1.0.1", OWN)];
      const { states, operations } = await resetsOf(start, UPDATE);
      const whole = start.copy();
      await whole.start(UPDATE);
      await whole.settle();
      expect(whole.tree()).toEqual(trees[1]!);
      expect(whole.directories.has(`${whole.home}/lib/nest`)).toBe(false);
      const commit = operations.findIndex((words) => words.endsWith("/.ota/state"));
      for (let at = commit; at < operations.length; at++) {
        if (!isTried(at, 3)) continue;
        const board = states[at]!;
        await board.settle();
        expect(trees, `before ${operations[at]}`).toContainEqual(board.tree());
      }
      expect((await whole.start(ROLLBACK)).end).toBe("reset");
      await whole.settle();
      expect(whole.tree()).toEqual(trees[0]!);
      expect(whole.directories.has(`${whole.home}/lib/shape`)).toBe(false);
    },
  );

  test("a file of the application in the way is named, and stays", async () => {
    await using own = await Van.open(root.path);
    const extra = { "/lib/nest/deep/mine.txt": "mine" };
    const board = await own.board("rp2", "1.0.0", extra);
    const old = board.tree();
    expect((await board.start(UPDATE)).error).toContain("/lib/nest/deep/mine.txt is in the way");
    expect(board.tree()).toEqual(old);
  });
});

describe("a manifest", () => {
  const sha = "0".repeat(64);
  const entry = (path: string, more: object = {}) => ({
    URL: "http://h/x",
    dst_path: path,
    hash: sha.slice(24),
    sha256: sha,
    ...more,
  });
  const manifest = (more: object) =>
    JSON.stringify({
      delete: [],
      new: [],
      update: [],
      version: "1.0.1",
      previous_version: "1.0.0",
      ...more,
    });
  /** What check() says to each of these, on a board of that kind. */
  const check = async (kind: Kind, texts: string[]) => {
    const board = await van.board(kind, "1.0.0");
    texts.forEach((text, i) => board.write(`/tmp-${i}`, text));
    const home = kind === "pycom" ? "/flash" : "";
    const { output, error } = await board.start(`
import os, ota_check
os.mkdir("${home}/.ota")
for i in range(${texts.length}):
    os.rename("/tmp-%d" % i, "${home}/.ota/manifest")
    try:
        offer = ota_check.check("1.0.0")
        print(offer and offer[0])
    except ValueError as e:
        print("no", repr(e))
    os.remove("${home}/.ota/manifest")
`);
    expect(error).toBe("");
    return output;
  };

  test("good ones, however they are written", async () => {
    const texts = [
      "null",
      " null\n",
      manifest({}),
      manifest({
        new: [entry("/flash/a.py"), entry("sd/größe/€.txt")],
        delete: ["flash/b.py", "sd/x"],
      }),
      JSON.stringify(
        JSON.parse(manifest({ update: [entry('/flash/a]}\\"{[,.py'.replace(/["\\]/g, ""))] })),
        null,
        2,
      ),
      manifest({
        request_id: "1",
        full: false,
        extra: [[1, { a: [2, 3] }], "x,]}"],
        more: { a: [1, { b: 2 }] },
      }),
      manifest({
        firmware: { URL: "http://h/firmware_1.bin", hash: sha.slice(24), sha256: sha, size: 9 },
      }),
      manifest({ delete: ["flash/lib/x"], new: [entry("/flash/lib/x/y.py", { size: 0 })] }),
    ];
    for (const kind of ["rp2", "pycom"] as const) {
      expect(await check(kind, texts)).toEqual([
        "None",
        "None",
        ...texts.slice(2).map(() => "1.0.1"),
      ]);
    }
  });

  test("bad ones are refused before anything is done", async () => {
    const paths = [
      "", "/", "..", "/flash/../x", "/flash//x", "/flash/./x", "/flash", "/flash/", "/sd", "/flash/a/../../x",
      "/flash/.ota/state", "/sd/.OTA/x", "/flash/x.", "/flash/x ", "/flash/a\\b", "/flash/a\tb", "/flash/a\nb",
      "/flash/" + "x".repeat(200), 7, null,
    ]; // prettier-ignore
    const texts = [
      "",
      "[]",
      "[null]",
      "{}",
      '{"version":"1.0.1",null:1}',
      '{"version":"1.0.1",7:1}',
      'x{"version":"1.0.1"}',
      "7",
      "nul",
      '{"version":"1.0.1"',
      manifest({}).slice(0, -2),
      manifest({}) + "x",
      manifest({ version: undefined }),
      manifest({ version: "1.0.1'\nimport os" }),
      manifest({ version: "latest" }),
      manifest({ version: 7 }),
      manifest({ version: "0.9" }),
      manifest({ new: [7] }),
      manifest({ new: ["/flash/x"] }),
      manifest({ delete: [entry("/flash/x")] }),
      manifest({ new: [entry("/flash/x"), entry("flash/x")] }),
      manifest({ new: [entry("/flash/x")], update: [entry("/flash/x")] }),
      manifest({ new: [entry("/flash/x"), entry("/flash/x/y")] }),
      manifest({ new: [entry("/flash/x/y")], update: [entry("/flash/x")] }),
      manifest({ new: [entry("/flash/x")], delete: ["flash/x"] }),
      manifest({ new: [entry("/flash/x", { sha256: "0" })] }),
      manifest({ new: [entry("/flash/x", { sha256: undefined, hash: undefined })] }),
      manifest({ new: [entry("/flash/x", { size: "9" })] }),
      manifest({ new: [entry("/flash/x", { URL: "ftp://h/x" })] }),
      manifest({ new: [entry("/flash/x", { URL: "http://h/x y" })] }),
      manifest({ new: [entry("/flash/x", { URL: "http://h" })] }),
      manifest({ firmware: "http://h/firmware_1.bin" }),
      manifest({ firmware: { URL: "http://h/firmware_1.bin" } }),
      manifest({ new: [entry("/flash/x", { more: "x".repeat(2000) })] }),
      ...paths.map((path) => manifest({ new: [entry(path as string)] })),
      ...paths.map((path) => manifest({ delete: [path] })),
    ];
    for (const kind of ["rp2", "pycom"] as const) {
      const output = await check(kind, texts);
      output.forEach((line, i) => expect(line, `${kind}: ${texts[i]}`).toStartWith("no "));
      expect(output.length).toBe(texts.length);
    }
    expect((await check("pycom", [manifest({ new: [entry("/main.py")] })]))[0]).toContain(
      "neither in",
    );
  });

  test("versions are ordered as the server orders them", async () => {
    const next = random(SEED);
    const alphabet = ["0", "1", "2", "10", "007", ".", ".", "a", "rc", "B", "-", "_", "+", "v"];
    const word = () =>
      "1" + Array.from({ length: next(6) }, () => alphabet[next(alphabet.length)]!).join("");
    const pairs = Array.from({ length: 300 }, () => [word(), word()] as const);
    const board = await van.board("rp2", "1.0.0");
    const { output } = await board.start(`
from ota_check import order
for a, b in ${JSON.stringify(pairs)
      .replaceAll('["', '("')
      .replaceAll('"]', '")')
      .replace(/^\[|\]$/g, "[")
      .replace(/\[$/, "]")}:
    print((order(a) > order(b)) - (order(a) < order(b)))
`);
    const sign = pairs.map(([a, b]) => String(Math.sign(new LooseVersion(a).compare(b))));
    pairs.forEach(([a, b], i) => expect(output[i], `seed ${SEED}: ${a} ${b}`).toBe(sign[i]!));
  });
});

test("64 KB of heap are enough for 100 files and firmware", async () => {
  const root = new Root().release("1.0.0", { "flash/main.py": "1\n" });
  const files: Record<string, string> = { "flash/main.py": "2\n" };
  for (let i = 0; i < 99; i++) {
    files[`flash/lib/some/package/module_number_${i}.py`] = `VALUE = ${i}\n`.repeat(60);
  }
  root.release("1.0.1", files);
  await Bun.write(
    join(root.path, "firmware_1.0.1.bin"),
    Bun.file(join(example, "firmware_1.0.1.bin")),
  );
  await using own = await Van.open(root.path);
  for (const kind of ["esp32", "pycom"] as const) {
    const board = await own.board(kind, "1.0.0");
    const { end, error, output, heap } = await board.start(UPDATE, { heap: 64 * 1024 });
    expect(error + output.filter((line) => !line.includes("getting")).join("\n")).toBe(
      "OTA: 1.0.0 -> 1.0.1\nOTA: 1.0.1 is installed",
    );
    expect(end).toBe("reset");
    console.log(
      `  ${kind}: at most ${heap!.live} bytes alive, ${heap!.taken} with garbage, of 65536`,
    );
    expect(heap!.collections).toBeGreaterThan(200);
    expect(heap!.live).toBeLessThan(44 * 1024);
    const confirmed = await board.start(CONFIRM, { heap: 64 * 1024 });
    expect(confirmed.error + confirmed.output.join()).toContain("OTA: 1.0.1 is confirmed");
    expect(board.tree()).toEqual(await own.tree(kind, "1.0.1"));
  }
});

test.each(kinds)(
  "the whole story of main.py: it reports, is updated, and stays (%s)",
  async (kind) => {
    const board = await van.board(kind, "1.0.0");
    board.joins = 3000;
    const run = () => board.start(`execfile("${board.home}/main.py")`);
    // Two uplinks, then the downlink that asks for the update.
    board.downlinks = [...Array.from({ length: 12 }, () => new Uint8Array(0)), UPDATE_COMMAND];
    board.uplinksLeft = 3;
    const before = await run();
    expect([before.end, before.error], before.output.join("\n")).toEqual(["reset", ""]);
    expect(board.uplinks.map((bytes) => Buffer.from(bytes).toString("hex"))).toEqual([
      "040506000000030000",
      "040506000000030000",
    ]);
    board.uplinksLeft = 4;
    const after = await run();
    expect([after.end, after.error]).toEqual(["done", ""]);
    expect(board.uplinks.length).toBe(4);
    expect(board.uplinks[2]!.length).toBe(11);
    // Only what counts pulses on this board gets there: three litres a start.
    expect([...board.uplinks[2]!.slice(3, 7)]).toEqual([0, 0, 0, 6]);
    expect(after.output).toContain("OTA: 1.0.1 is confirmed");
    for (const start of [before, after]) {
      expect(start.output.join("\n")).not.toMatch(/meter: stopped|no uplink/);
      expect(start.hungry).toBeLessThan(5000);
    }
    const version = `${board.home}/OTA_VERSION.py`;
    expect(board.read(version)).toBe("VERSION = '1.0.1'\n");
    board.uplinksLeft = 5;
    for (let i = 0; i < 5; i++) await board.settle();
    expect(board.read(version)).toBe("VERSION = '1.0.1'\n");
  },
);
