/** `fleet` as its operator types it, beside a server that writes the same store. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { Database } from "bun:sqlite";
import * as fs from "node:fs";
import { type FleetDevice, type FleetServer, serve, type ServeOptions } from "../ota.ts";
import { layFleet } from "./helpers/laid-fleet.ts";
import { Postgres } from "./helpers/postgres.ts";
import { Temp, type Tree } from "./helpers/temp.ts";
import { OTA_TS, type Ran, run, until } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const HOUR = 3600_000;
const RELEASES = { "1.0.0/main.py": "1\n", "1.0.1/main.py": "2\n" };

/** What a device says of itself, beside its id and version. */
type Saying = Record<string, string>;

/** A server with its releases, and whoever asks it. */
class Van extends Temp implements AsyncDisposable {
  server!: FleetServer;

  static async start(options: ServeOptions = {}, releases: Tree = RELEASES): Promise<Van> {
    const van = new Van(releases);
    await van.serve(options);
    return van;
  }

  async serve(options: ServeOptions = {}): Promise<void> {
    const fleet = this.at(".fleet.db");
    this.server = await serve({
      ...{ root: this.path, port: 0, host: "127.0.0.1", quiet: 0, fleet },
      ...options,
    });
  }

  /** A device asks; what it said is written when this returns. */
  async ask(devid: string, version: string, saying: Saying = {}, method = "GET"): Promise<void> {
    const query = new URLSearchParams({ devid, current_ver: version, ...saying });
    await fetch(new URL(`/manifest.json?${query}`, this.server.url), { method });
    await this.server.fleet!.flush();
  }

  /** Runs a command on its fleet. */
  fleet(...args: string[]): Promise<Ran> {
    return run(["fleet", ...args, "--root", this.path]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server.stop();
    this[Symbol.dispose]();
  }
}

const lines = ({ stdout }: Ran) => stdout.trimEnd().split("\n");

/** The devices of `list --json`, by id. */
async function devicesOf(van: Van): Promise<Record<string, FleetDevice>> {
  const { stdout } = await van.fleet("list", "--json");
  const { devices } = JSON.parse(stdout) as { devices: FleetDevice[] };
  return Object.fromEntries(devices.map((device) => [device.id, device]));
}

/** Cells of CSV, as RFC 4180 has it. */
function parseCSV(text: string): string[][] {
  return text
    .split("\r\n")
    .slice(0, -1)
    .map((line) => {
      return [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^",]*))/g)].map(
        ([, quoted, plain]) => quoted?.replaceAll('""', '"') ?? plain!,
      );
    });
}

describe.concurrent("a summary", () => {
  test("says what is newest, and how many are in which state, the worst first", async () => {
    await using van = await Van.start();
    await van.ask("A1", "1.0.1", { model: "lopy4" });
    await van.ask("a2", "1.0.0", { model: "lopy4" });
    await van.ask("a3", "1.0.0", { failed: "1.0.1", model: "fipy" });
    const { code, stdout, stderr } = await van.fleet();
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toMatch(/^3 devices, written .*, in .*\.fleet\.db\nnewest: 1\.0\.1\n/);
    const states = [...stdout.matchAll(/^(\w+) +(\d+)  \w+/gm)].map(([, name, n]) => [name, n]);
    expect(states).toEqual([
      ["failed", "1"],
      ["silent", "0"],
      ["offered", "1"],
      ["behind", "0"],
      ["current", "1"],
    ]);
    // The failed one by name, with what failed.
    expect(stdout).toMatch(/^ +a3 +- +1\.0\.0 +1\.0\.1 failed +\S/m);
    expect(stdout).toMatch(/^1\.0\.1 +1 +#+\n1\.0\.0 +2 +#+\n/m);
    expect(stdout).toContain("models: lopy4 2, fipy 1");
    const json = JSON.parse((await van.fleet("--json")).stdout);
    expect(json).toMatchObject({ devices: 3, versions: { "1.0.0": 2, "1.0.1": 1 } });
    expect(json).toMatchObject({ states: { failed: 1, current: 1 }, newest: { version: "1.0.1" } });
    expect(json.written).toBeGreaterThan(0);
  });

  test("knows the newest as the server offers it", async () => {
    await using van = await Van.start({ latest: "1.0.0" });
    await van.ask("a", "1.0.0");
    expect((await devicesOf(van))["a"]).toMatchObject({ state: "current" });
    expect((await van.fleet()).stdout).toContain("newest: 1.0.0\n");
    // Another server of the same fleet, and another newest.
    await van.server.stop();
    await van.serve();
    await van.server.fleet!.flush();
    expect((await devicesOf(van))["a"]).toMatchObject({ state: "behind" });
    expect((await van.fleet()).stdout).toContain("newest: 1.0.1\n");
  });

  test("knows how long its server takes for silence, and the newest of each model", async () => {
    const releases = { ...RELEASES, "lopy4/2.0/main.py": "x\n" };
    await using van = await Van.start({ silent: 1 / 1e6 }, releases);
    await van.ask("a", "1.0.0");
    await van.ask("b", "2.0", { model: "lopy4" });
    await until(
      "silence",
      () => devicesOf(van),
      ({ a }) => a?.state === "silent",
    );
    expect((await devicesOf(van))["b"]).toMatchObject({ state: "current" });
    const { stdout } = await van.fleet();
    expect(stdout).toContain("newest: 1.0.1; lopy4: 2.0\n");
    expect(stdout).toMatch(/^silent +1 .*\n +a +- +1\.0\.0 +offered 1\.0\.1 +/m);
  });

  test("fits a screen, whatever there is", async () => {
    using temp = new Temp();
    const long = "x".repeat(120);
    const many = Array.from({ length: 60 }, (_, i) => ({
      id: `${long}${i}`,
      version: i % 3 ? "1.0.0" : `0.${i}.${long.slice(0, 100)}`,
      query: { model: `${long}${i % 9}`, ...(i % 2 && { failed: "1.0.1" }) } as Saying,
      ago: 100 * HOUR,
      to: "1.0.1",
    }));
    await layFleet(temp.at("fleet.db"), [...many, { id: "last", version: "1.0.1", ago: 0 }]);
    const shown = lines(await run(["fleet", "--fleet", temp.at("fleet.db")]));
    expect(shown.length).toBeLessThanOrEqual(23);
    for (const line of shown) expect(Bun.stringWidth(line)).toBeLessThanOrEqual(80);
    // What is left out, and how to see it.
    for (const [state, more] of [
      ["failed", 27],
      ["silent", 27],
    ]) {
      const line = `  and ${more} more: ota.ts fleet list --state ${state}`;
      expect(shown).toContainEqual(expect.stringContaining(line));
    }
    expect(shown).toContainEqual(expect.stringMatching(/^other versions +\d+$/));
    expect(shown.at(-1)).toMatch(/^models: .* and \d+ more$|…$/);
  });

  test("of a fleet that no device has met", async () => {
    await using van = await Van.start();
    await van.server.fleet!.flush();
    const { code, stdout } = await van.fleet();
    expect(code).toBe(0);
    expect(stdout).toMatch(/^0 devices, .*\nnewest: 1\.0\.1\nno device has asked yet\n$/);
  });
});

describe.concurrent("a list", () => {
  async function small(): Promise<Temp & { list: (...args: string[]) => Promise<Ran> }> {
    const temp = new Temp();
    const url = temp.at("fleet.db");
    await layFleet(url, [
      { id: "a", ago: 40 * 24 * HOUR, to: "1.0.1" },
      { id: "bb-long-one", version: "1.0.1", query: { model: "LoPy4" }, ago: 5 * HOUR },
      { id: "c", query: { failed: "1.0.1" }, ago: 3.5 * HOUR, to: "1.0.1" },
    ]);
    const list = (...args: string[]) => run(["fleet", "list", ...args, "--fleet", url]);
    await run(["fleet", "name", "c", "Küche 東京", "--fleet", url]);
    await run(["fleet", "label", "c", "site=mine", "room=1", "--fleet", url]);
    return Object.assign(temp, { list });
  }

  test("is a table that aligns, with times as people say them", async () => {
    using fleet = await small();
    const { code, stdout, stderr } = await fleet.list();
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toBe(
      [
        "ID           NAME        MODEL  VERSION  STATE    SEEN",
        "a            -           -      1.0.0    silent   40 days ago  offered 1.0.1",
        "bb-long-one  -           LoPy4  1.0.1    current  5 h ago",
        "c            Küche 東京  -      1.0.0    failed   3 h ago      1.0.1 failed, room=1 site=mine",
        "",
      ].join("\n"),
    );
  });

  test("of those that one asks for", async () => {
    using fleet = await small();
    const ids = async (...args: string[]) => {
      return lines(await fleet.list(...args, "--csv"))
        .slice(1)
        .map((line) => line.split(",")[0]);
    };
    expect(await ids("--state", "failed")).toEqual(["c"]);
    expect(await ids("--version", "1.0.1")).toEqual(["bb-long-one"]);
    expect(await ids("--model", "lopy4")).toEqual(["bb-long-one"]);
    expect(await ids("--label", "site=mine")).toEqual(["c"]);
    expect(await ids("--label", "site=other")).toEqual([]);
    expect(await ids("--state", "failed", "--version", "1.0.1")).toEqual([]);
    const { code, stdout, stderr } = await fleet.list("--version", "9");
    expect([code, stdout, stderr]).toEqual([0, "", "no such device\n"]);
    expect(JSON.parse((await fleet.list("--version", "9", "--json")).stdout)).toEqual({
      ...{ devices: [], next: null },
    });
  });

  test("as JSON, and as CSV with a header and ISO times", async () => {
    using fleet = await small();
    const { devices } = JSON.parse((await fleet.list("--json")).stdout);
    expect(devices).toHaveLength(3);
    expect(devices[2]).toEqual({
      ...{ id: "c", name: "Küche 東京", model: null, version: "1.0.0", firmware: null },
      ...{ state: "failed", offered: "1.0.1", failed: "1.0.1", address: "10.0.0.1" },
      ...{ first_seen: expect.any(Number), last_seen: devices[2].first_seen },
      labels: { room: "1", site: "mine" },
    });
    const [header, ...rows] = parseCSV((await fleet.list("--csv")).stdout);
    const time = new Date(devices[2].last_seen).toISOString();
    expect(header!.slice(0, 4)).toEqual(["id", "name", "model", "version"]);
    expect(rows[2]).toEqual([
      ...["c", "Küche 東京", "", "1.0.0", "", "failed", "1.0.1", "1.0.1", "10.0.0.1"],
      ...[time, time, "room=1; site=mine"],
    ]);
  });

  test("of many: a page at a time, and a reader may stop half way", async () => {
    using temp = new Temp();
    const url = temp.at("fleet.db");
    const ids = Array.from({ length: 2500 }, (_, i) => `device-${String(i).padStart(5, "0")}`);
    await layFleet(
      url,
      ids.map((id) => ({ id })),
    );
    const json = await run(["fleet", "list", "--json", "--fleet", url]);
    expect(JSON.parse(json.stdout).devices.map(({ id }: FleetDevice) => id)).toEqual(ids);
    const table = lines(await run(["fleet", "list", "--fleet", url]));
    expect(table.slice(1).map((line) => line.split(" ")[0])).toEqual(ids);
    const pipe = '"$0" "$1" fleet list --fleet "$2"; echo "code $?" >&2';
    const args = ["-c", `{ ${pipe}; } | head -n 2`, process.execPath, OTA_TS, url];
    const child = Bun.spawnSync(["sh", ...args]);
    expect([child.stdout.toString(), child.stderr.toString()]).toEqual([
      `${table.slice(0, 2).join("\n")}\n`,
      "code 0\n",
    ]);
  });
});

describe.concurrent("what strangers say", () => {
  /** A store that holds what no server would have taken: another van's file may. */
  async function hostile(temp: Temp): Promise<string> {
    const url = temp.at("fleet.db");
    const query = { model: "=HYPERLINK(1)", failed: "\u202eevil" };
    await layFleet(url, [{ id: "=1+1", version: "@sum", query }, { id: "ab" }]);
    const db = new Database(url);
    db.run("UPDATE ota_devices SET name = ?, model = ? WHERE id = 'ab'", [
      'a"b\x1b[2J\x9b31m\r\nx\u2028',
      "-1,2;=3",
    ]);
    db.run("UPDATE ota_events SET to_ = ? WHERE device = 'ab'", ["\x1b]0;title\x07"]);
    db.run("INSERT INTO ota_labels VALUES ('ab', ?, ?, 1)", ["+k\x1b", "v\x00"]);
    db.close();
    return url;
  }

  test("does not steer the terminal", async () => {
    using temp = new Temp();
    const url = await hostile(temp);
    for (const args of [
      [],
      ["--json"],
      ["list"],
      ["list", "--json"],
      ["list", "--csv"],
      ["show", "ab"],
      ["show", "ab", "--json"],
      ["show", "=1+1"],
      ["show", "none\x1b"],
      ["label", "ab", "a=b"],
      ["forget", "ab"],
    ]) {
      const { stdout, stderr } = await run(["fleet", ...args, "--fleet", url]);
      expect(stdout + stderr).not.toBe("");
      const text = (stdout + stderr).replaceAll(/\r?\n/g, "");
      expect([args, text]).toEqual([
        args,
        expect.not.stringMatching(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u),
      ]);
    }
  });

  test("is as it was in JSON, and harmless to a spreadsheet", async () => {
    using temp = new Temp();
    const url = await hostile(temp);
    const { devices } = JSON.parse((await run(["fleet", "list", "--json", "--fleet", url])).stdout);
    expect(devices[1].name).toBe('a"b\x1b[2J\x9b31m\r\nx\u2028');
    const { stdout } = await run(["fleet", "list", "--csv", "--fleet", url]);
    const [, first, second] = parseCSV(stdout);
    expect(first!.slice(0, 4)).toEqual(["'=1+1", "", "'=HYPERLINK(1)", "'@sum"]);
    expect(second!.slice(0, 3)).toEqual([
      ...["ab", 'a"b\\u{1b}[2J\\u{9b}31m\\u{d}\\u{a}x\\u{2028}', "'-1,2;'=3"],
    ]);
    for (const cell of stdout.split(/[,;\n]/)) expect(cell).not.toMatch(/^["\s]*[=+\-@]/);
  });
});

describe.concurrent("one device", () => {
  test("by id, name, or the beginning of its id", async () => {
    await using van = await Van.start();
    for (const id of ["240ac4a1", "240ac4b2", "c"]) await van.ask(id, "1.0.0");
    await van.fleet("name", "240AC4A1", "c");
    await van.fleet("name", "240ac4b2", "Roof");
    const id = async (text: string) => {
      const { code, stdout, stderr } = await van.fleet("show", text);
      return code === 0 ? /^id: +(\S+)$/m.exec(stdout)![1] : [code, stderr];
    };
    expect(await id("240ac4a1")).toBe("240ac4a1");
    expect(await id("240AC4A1")).toBe("240ac4a1");
    expect(await id("roof")).toBe("240ac4b2");
    expect(await id("240ac4b")).toBe("240ac4b2");
    // An id goes before a name.
    expect(await id("c")).toBe("c");
    expect(await id("240")).toEqual([1, "ota.ts: 240 may be 240ac4a1, 240ac4b2: which one?\n"]);
    const [code, said] = (await id("d\x1b")) as [number, string];
    expect(code).toBe(1);
    expect(said).toMatch(/^ota\.ts: no device d\\u\{1b\} in .*\.fleet\.db; see fleet list\n$/);
  });

  test("with its history", async () => {
    await using van = await Van.start();
    await van.ask("a", "1.0.0");
    await van.ask("a", "1.0.1", {}, "HEAD");
    await van.ask("a", "1.0.0", {}, "HEAD");
    const { stdout } = await van.fleet("show", "a");
    expect(stdout).toMatch(/^state: +failed: .*$/m);
    const [, history = ""] = stdout.trimEnd().split("\n\n");
    expect(history.split("\n").map((line) => line.replace(/^\S+Z +/, ""))).toEqual([
      "first seen   1.0.0",
      "offered      1.0.0 -> 1.0.1",
      "updated      1.0.0 -> 1.0.1",
      "rolled back  1.0.1 -> 1.0.0",
    ]);
    const json = JSON.parse((await van.fleet("show", "a", "--json")).stdout);
    expect(json.history.map(({ kind }: { kind: string }) => kind)).toEqual([
      ...["first seen", "offered", "updated", "rolled back"],
    ]);
  });

  test("has a name and labels that the server tells, too", async () => {
    await using van = await Van.start();
    await van.ask("a", "1.0.0");
    expect((await van.fleet("name", "a", "cellar left")).stdout).toBe("a is called cellar left\n");
    expect((await van.fleet("label", "cellar left", "site=mine", "x=a=b")).stdout).toBe(
      "a has site=mine x=a=b\n",
    );
    const told = await van.server.fleet!.device("a");
    expect(told).toMatchObject({ name: "cellar left", labels: { site: "mine", x: "a=b" } });
    expect((await van.fleet("label", "a", "x=", "y=1")).stdout).toBe("a has site=mine y=1\n");
    expect((await van.fleet("name", "a", "")).stdout).toBe("a has no name\n");
    expect((await van.fleet("label", "a", "site=", "y=")).stdout).toBe("a has no label\n");
    const long = await van.fleet("name", "a", "x".repeat(200));
    expect([long.code, long.stderr]).toEqual([2, expect.stringContaining("128 characters")]);
  });

  test("is forgotten when it is named whole, until it asks again", async () => {
    await using van = await Van.start();
    await van.ask("abc", "1.0.0");
    await van.fleet("name", "abc", "cellar");
    expect((await van.fleet("forget", "ab")).code).toBe(1);
    const { code, stdout } = await van.fleet("forget", "ABC");
    expect([code, stdout]).toEqual([
      ...[0, "forgot abc (cellar) and 2 events; it is back when it asks again\n"],
    ]);
    expect((await van.fleet("show", "abc")).code).toBe(1);
    await van.ask("abc", "1.0.1");
    expect((await van.fleet("list")).stdout).toMatch(/^abc +- +- +1\.0\.1 +current/m);
  });
});

describe.concurrent("a store", () => {
  const COMMANDS = [
    ...[[], ["list"], ["show", "a"], ["name", "a", "b"], ["label", "a", "b=c"], ["forget", "a"]],
  ];

  test("that is not there: what to do, and none is made", async () => {
    using temp = new Temp();
    for (const args of COMMANDS) {
      const { code, stdout, stderr } = await run(["fleet", ...args, "--root", temp.path]);
      expect([code, stdout]).toEqual([1, ""]);
      expect(stderr).toBe(
        `ota.ts: there is no fleet in ${temp.at(".fleet.db")}: ota.ts serve makes it; ` +
          "--root DIR or --fleet URL names another one\n",
      );
    }
    expect(fs.readdirSync(temp.path)).toEqual([]);
  });

  test("that is none, or of a newer tool, is left alone", async () => {
    using temp = new Temp({ text: "no database\n" });
    for (const [name, statement] of [
      ["other", "CREATE TABLE other (a)"],
      ["newer", "CREATE TABLE ota_meta AS SELECT 'schema' AS name, '99' AS value"],
    ] as const) {
      const db = new Database(temp.at(name), { create: true });
      db.run(statement);
      db.close();
    }
    const names = ["newer", "other", "text"];
    const before = names.map((name) => fs.readFileSync(temp.at(name)));
    for (const args of COMMANDS) {
      const [newer, other, text] = await Promise.all(
        names.map((name) => run(["fleet", ...args, "--fleet", temp.at(name)])),
      );
      expect([newer!.code, other!.code, text!.code]).toEqual([1, 1, 1]);
      expect(newer!.stderr).toContain("written by a newer ota.ts (schema 99");
      expect(other!.stderr).toContain("there is no fleet in");
      expect(text!.stderr).toContain("file is not a database");
    }
    expect(names.map((name) => fs.readFileSync(temp.at(name)))).toEqual(before);
    expect(fs.readdirSync(temp.path)).toEqual(names);
  });

  test("that somebody else writes: reading does not wait, writing does", async () => {
    await using van = await Van.start();
    await van.ask("a", "1.0.0");
    const db = new Database(van.at(".fleet.db"));
    db.run("BEGIN IMMEDIATE");
    const naming = van.fleet("name", "a", "cellar");
    expect((await van.fleet("list")).stdout).toMatch(/^a +- /m);
    expect((await van.fleet()).stdout).toStartWith("1 device,");
    db.run("ROLLBACK");
    db.close();
    expect(await naming).toMatchObject({ code: 0, stdout: "a is called cellar\n" });
  });

  test("is one file when its server has stopped", async () => {
    using van = await Van.start();
    await van.ask("a", "1.0.0");
    await van.server.stop();
    expect(fs.readdirSync(van.path).filter((name) => name.startsWith("."))).toEqual([".fleet.db"]);
    expect((await van.fleet("list")).stdout).toMatch(/^a +- /m);
    expect(fs.readdirSync(van.path).filter((name) => name.startsWith("."))).toEqual([".fleet.db"]);
  });

  test("on a medium that is read-only", async () => {
    using temp = new Temp();
    await layFleet(temp.at("fleet.db"), [{ id: "a" }]);
    fs.mkdirSync(temp.at("stick"));
    fs.copyFileSync(temp.at("fleet.db"), temp.at("stick/fleet ?#%.db"));
    // Root could write anywhere: by somebody who could not.
    const user = process.getuid?.() === 0 ? ["setpriv", "--reuid=65534", "--clear-groups"] : [];
    fs.chmodSync(temp.path, 0o755);
    fs.chmodSync(temp.at("stick/fleet ?#%.db"), 0o444);
    fs.chmodSync(temp.at("stick"), 0o555);
    const command = [process.execPath, OTA_TS, "fleet", "list", "--fleet"];
    const { stdout, stderr } = Bun.spawnSync([...user, ...command, temp.at("stick/fleet ?#%.db")]);
    fs.chmodSync(temp.at("stick"), 0o755);
    expect([stdout.toString(), stderr.toString()]).toEqual([expect.stringMatching(/^a +- /m), ""]);
    expect(fs.readdirSync(temp.at("stick"))).toEqual(["fleet ?#%.db"]);
  });
});

describe.concurrent("merge", () => {
  test("adds what another van knows, once, beside two servers that run", async () => {
    await using van = await Van.start();
    await using office = await Van.start();
    await office.ask("both", "1.0.0");
    await van.ask("both", "1.0.1");
    await van.ask("new", "1.0.0");
    await van.fleet("name", "new", "cellar");
    await office.ask("newer", "1.0.0");
    await van.ask("newer", "1.0.0");
    await office.ask("newer", "1.0.1");
    const before = fs.readFileSync(van.at(".fleet.db"));
    const first = await office.fleet("merge", van.at(".fleet.db"));
    expect(first).toMatchObject({ code: 0, stderr: "" });
    expect(first.stdout).toBe("1 device, 5 events added; 1 brought up to date; 1 was newer here\n");
    expect(fs.readFileSync(van.at(".fleet.db"))).toEqual(before);
    const devices = await devicesOf(office);
    expect(devices["both"]!.version).toBe("1.0.1");
    expect(devices["new"]!.name).toBe("cellar");
    expect(devices["newer"]!.version).toBe("1.0.1");
    const again = await office.fleet("merge", van.at(".fleet.db"));
    expect(again.stdout).toBe("0 devices, 0 events added; 1 was newer here\n");
    expect(await devicesOf(office)).toEqual(devices);
    // Both servers go on.
    await van.ask("new", "1.0.1");
    await office.ask("new", "1.0.1");
    expect((await devicesOf(van))["new"]!.state).toBe("current");
  });

  test("into a store that is made for it", async () => {
    using temp = new Temp({ text: "no database\n" });
    await layFleet(temp.at("van.db"), [{ id: "a" }]);
    const bad = await run(["fleet", "merge", temp.at("text"), "--fleet", temp.at("all.db")]);
    expect([bad.code, fs.existsSync(temp.at("all.db"))]).toEqual([1, false]);
    const { stdout } = await run([
      "fleet",
      "merge",
      temp.at("van.db"),
      "--fleet",
      temp.at("all.db"),
    ]);
    expect(stdout).toBe("1 device, 1 event added\n");
    const shown = await run(["fleet", "--fleet", temp.at("all.db")]);
    expect(shown.stdout).toContain("newest: not known, since no server has told yet\n");
  });

  test("refuses what is no other fleet", async () => {
    using temp = new Temp({ text: "no database\n" });
    const mine = temp.at("mine.db");
    await layFleet(mine, [{ id: "a" }]);
    temp.link("link.db", mine);
    for (const [name, statement] of [
      ["other.db", "CREATE TABLE other (a)"],
      ["newer.db", "CREATE TABLE ota_meta AS SELECT 'schema' AS name, '99' AS value"],
    ] as const) {
      const db = new Database(temp.at(name), { create: true });
      db.run(statement);
      db.close();
    }
    const said = async (name: string) => {
      const { code, stdout, stderr } = await run([
        "fleet",
        "merge",
        temp.at(name),
        "--fleet",
        mine,
      ]);
      expect([name, code, stdout]).toEqual([name, 1, ""]);
      return stderr;
    };
    expect(await said("mine.db")).toContain("is the fleet itself");
    expect(await said("link.db")).toContain("is the fleet itself");
    expect(await said("text")).toContain("expected the SQLite file of another fleet");
    expect(await said("other.db")).toContain("expected the SQLite file of another fleet");
    expect(await said("newer.db")).toContain("written by a newer ota.ts");
    expect(await said("nothing.db")).toContain("there is no ");
  });

  test("says so when one began as a copy of the other", async () => {
    using temp = new Temp();
    await layFleet(temp.at("a.db"), [{ id: "a" }]);
    fs.copyFileSync(temp.at("a.db"), temp.at("b.db"));
    const { code, stderr } = await run([
      "fleet",
      "merge",
      temp.at("b.db"),
      "--fleet",
      temp.at("a.db"),
    ]);
    expect([code, stderr]).toEqual([0, expect.stringContaining("began as a copy of this fleet")]);
  });
});

describe("PostgreSQL", () => {
  let postgres: Postgres;
  beforeAll(async () => {
    postgres = await Postgres.start();
  });
  afterAll(() => postgres?.[Symbol.asyncDispose]());

  test("is read and written beside its servers", async () => {
    const url = await postgres.database();
    const fleet = (...args: string[]) => run(["fleet", ...args, "--fleet", url]);
    const none = await fleet();
    expect([none.code, none.stderr]).toEqual([1, expect.stringContaining("there is no fleet in")]);
    expect(await postgres.query(url, "SELECT * FROM pg_tables WHERE tablename ~ 'ota'")).toEqual(
      [],
    );
    await using van = await Van.start({ fleet: url });
    await using other = await Van.start({ fleet: url });
    await van.ask("a", "1.0.0");
    await other.ask("b", "1.0.1");
    expect((await fleet()).stdout).toMatch(/^2 devices, written .*\nnewest: 1\.0\.1\n/);
    await fleet("name", "b", "roof");
    await fleet("label", "roof", "site=mine");
    expect((await fleet("list", "--label", "site=mine")).stdout).toMatch(/^b +roof +- +1\.0\.1/m);
    await using away = await Van.start();
    await away.ask("c", "1.0.0");
    const merged = await fleet("merge", away.at(".fleet.db"));
    expect([merged.stdout, merged.stderr]).toEqual(["1 device, 2 events added\n", ""]);
    expect((await fleet("forget", "a")).stdout).toStartWith("forgot a and 2 events");
    const ids = lines(await fleet("list")).map((line) => line.split(" ")[0]);
    expect(ids).toEqual(["ID", "b", "c"]);
  });
});
