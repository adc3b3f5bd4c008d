// What a board tells its server in confirm(): that it is on a new release, or back on the old one.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import type { Kind } from "./board/board.ts";
import { CONFIRM, example, Root, ROLLBACK, UPDATE, Van } from "./board/fleet.ts";

setDefaultTimeout(120_000);

const kinds: Kind[] = ["esp32", "pycom", "rp2"];
/** confirm() of an application that has joined its network before. */
const ONLINE = CONFIRM.replace(
  "ota.confirm()",
  `import machine
dog = machine.WDT(timeout=8000)
ota.alive = dog.feed
ota.connect()
ota.confirm()`,
);

/** What the fleet's interface tells of the only device. */
interface Told {
  version: string;
  firmware: string | null;
  state: string;
  failed: string | null;
  history: { kind: string; from: string | null; to: string | null }[];
}

let van: Van;

beforeAll(async () => {
  van = await Van.open(example, [
    "--fleet",
    new Root().at("fleet.db"),
    "--admin-token",
    "token-of-these-tests",
  ]);
});
afterAll(async () => {
  await van[Symbol.asyncDispose]();
  Root.removeAll();
});

/** The requests since the last call, without the files. */
function asked(): string[] {
  const lines = van.link.requests.splice(0);
  return lines.filter((line) => line.includes("/manifest.json"));
}

describe.each(kinds)("a board of kind %s", (kind) => {
  test("tells in confirm() that it is updated, once", async () => {
    const board = await van.board(kind, "1.0.0");
    await board.start(UPDATE);
    asked();
    const { output, error } = await board.start(ONLINE);
    expect(error).toBe("");
    expect(output).toContain("OTA: 1.0.1 is confirmed");
    const [report, ...more] = asked();
    expect(more).toEqual([]);
    expect(report).toStartWith("HEAD /manifest.json?current_ver=1.0.1&");
    // A Pico takes no firmware over the air.
    expect(report!.includes("&firmware_ver=1.0.1")).toBe(kind !== "rp2");
    expect(report).toMatch(/&devid=[0-9a-f]+ HTTP\/1\.0$/);
    await board.start(ONLINE);
    expect(asked()).toEqual([]);
  });

  test("without a network, the next update() tells", async () => {
    const board = await van.board(kind, "1.0.0");
    await board.start(UPDATE);
    asked();
    expect((await board.start(CONFIRM)).output).toContain("OTA: 1.0.1 is confirmed");
    expect(asked()).toEqual([]);
    expect((await board.start(UPDATE)).output).toContain("update: False");
    expect(asked()).toEqual([
      expect.stringContaining("GET /manifest.json?hash=sha256&current_ver=1.0.1"),
    ]);
  });

  test("tells that a release was taken back, once", async () => {
    const board = await van.board(kind, "1.0.0");
    await board.start(UPDATE);
    await board.start(CONFIRM);
    expect((await board.start(ROLLBACK)).end).toBe("reset");
    await board.settle();
    asked();
    const tree = board.tree();
    await board.start(CONFIRM);
    expect(asked()).toEqual([]);
    await board.start(ONLINE);
    await board.start(ONLINE);
    expect(asked()).toEqual([
      expect.stringMatching(/^HEAD .*\?current_ver=1\.0\.0&.*failed=1\.0\.1/),
    ]);
    expect(board.tree()).toEqual(tree);
    // It is not tried again by itself for all that.
    expect((await board.start(UPDATE)).output).toContain("OTA: 1.0.1 failed here before");
  });

  test("a report that fails changes nothing", async () => {
    for (const weather of [
      { deaf: 100 },
      { cutAfter: 10 },
      { silentAfter: 0 },
      { answer: () => new TextEncoder().encode("HTTP/1.1 500 Oh\r\n\r\n") },
      { answer: () => new TextEncoder().encode("what?\r\n\r\n") },
    ]) {
      const board = await van.board(kind, "1.0.0");
      await board.start(UPDATE);
      const good = board.copy();
      await good.start(CONFIRM);
      van.link.weather = weather;
      const { output, error, hungry } = await board.start(ONLINE);
      van.link.weather = {};
      expect(error).toBe("");
      expect(output).toContain("OTA: 1.0.1 is confirmed");
      expect(output.join("\n")).toContain("OTA: the server was not told: ");
      expect(output).toContain("version: 1.0.1");
      expect(hungry).toBeLessThan(5000);
      expect(board.files).toEqual(good.files);
    }
  });
});

test("what is left of a report's code is gone from memory", async () => {
  const board = await van.board("esp32", "1.0.0");
  await board.start(UPDATE);
  const { output } = await board.start(
    `${ONLINE}\nimport sys\nprint([name for name in sys.modules if name.startswith("ota_")])`,
  );
  expect(output).toContain("['ota_boot']");
});

test("a report needs half the heap of an update", async () => {
  const board = await van.board("esp32", "1.0.0");
  await board.start(UPDATE);
  asked();
  const { error, heap } = await board.start(ONLINE, { heap: 64 * 1024 });
  expect(error).toBe("");
  expect(asked()).toHaveLength(1);
  expect(heap!.taken).toBeLessThan(32 * 1024);
});

test("a heap that is full: confirmed all the same", async () => {
  const board = await van.board("esp32", "1.0.0");
  await board.start(UPDATE);
  asked();
  const { error, output } = await board.start(`
import sys
class Full:
    def query(*said):
        raise MemoryError("no room")
sys.modules["ota_query"] = Full
${ONLINE}`);
  expect(error).toBe("");
  expect(output).toContain("OTA: 1.0.1 is confirmed");
  expect(output).toContain("OTA: the server was not told: no room");
  expect(asked()).toEqual([]);
});

test("code that cannot be loaded: confirmed all the same", async () => {
  const board = await van.board("esp32", "1.0.0");
  await board.start(UPDATE);
  asked();
  const { error, output } = await board.start(`
import sys
sys.modules["ota_query"] = None
import builtins
load = builtins.__import__
def without(name, *more):
    if name == "ota_query":
        raise MemoryError("no room for code")
    return load(name, *more)
builtins.__import__ = without
${ONLINE}`);
  expect(error).toBe("");
  expect(output).toContain("OTA: 1.0.1 is confirmed");
  expect(output).toContain("OTA: the server was not told: no room for code");
  expect(asked()).toEqual([]);
});

test("the fleet hears of it", async () => {
  const board = await van.board("esp32", "1.0.0");
  await board.start(UPDATE);
  await board.start(ONLINE);
  const id = /devid=([0-9a-f]+)/.exec(asked().at(-1)!)![1]!;
  const look = async (): Promise<Told> => {
    const headers = { Authorization: "Bearer token-of-these-tests" };
    const url = `http://127.0.0.1:${van.link.port}/-/api/devices/${id}`;
    return (await (await fetch(url, { headers })).json()) as Told;
  };
  const until = async (state: string, version: string): Promise<Told> => {
    for (;;) {
      const told = await look();
      if (told.state === state && told.version === version) return told;
      await Bun.sleep(50);
    }
  };
  await until("current", "1.0.1");
  await board.start(ROLLBACK);
  await board.settle();
  await board.start(ONLINE);
  const { failed, history } = await until("failed", "1.0.0");
  expect(failed).toBe("1.0.1");
  expect(history.at(-1)).toMatchObject({ kind: "rolled back", from: "1.0.1", to: "1.0.0" });
});
