/** What is kept of devices, on both stores: states, history, what people ask and change. */

import { Database } from "bun:sqlite";
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import type { DeviceState } from "../ota.ts";
import { failureOf, FleetWorld, HOUR, Stores } from "./helpers/fleet.ts";
import { Random, seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

describe.each(stores.each)("states and events in %s", (_, { place }) => {
  test("a device that is offered a release, and is on it later", async () => {
    await using world = await FleetWorld.open(await place());
    world.say("A1", "1.0.0", { to: "1.0.1" });
    const first = ["first seen null -> 1.0.0", "offered 1.0.0 -> 1.0.1"];
    expect(await world.look("a1")).toEqual({ state: "offered", history: first });
    world.pass(HOUR / 2);
    world.say("a1", "1.0.1", { method: "HEAD" });
    const history = [...first, "updated 1.0.0 -> 1.0.1"];
    expect(await world.look("a1")).toEqual({ state: "current", history });
    world.newest = { version: "1.0.10", firmware: null };
    expect((await world.look("a1")).state).toBe("behind");
  });

  test("a release that fails, as the device says", async () => {
    await using world = await FleetWorld.open(await place());
    world.say("a", "1.0.0", { to: "1.0.1" });
    world.say("a", "1.0.0", { method: "HEAD", query: { failed: "1.0.1" } });
    world.say("a", "1.0.0", { to: "1.0.1", query: { failed: "1.0.1" } });
    const found = await world.look("a");
    expect(found.state).toBe("failed");
    expect(found.history.slice(2)).toEqual(["failed 1.0.0 -> 1.0.1"]);
    world.say("a", "1.0.0", { to: "1.0.2", query: { failed: "1.0.1" } });
    expect((await world.look("a")).state).toBe("offered");
    // Withdrawn: it is on the newest that it may have.
    world.newest = { version: "1.0.0", firmware: null };
    world.say("a", "1.0.0", { query: { failed: "1.0.1" } });
    expect((await world.look("a")).state).toBe("current");
  });

  test("a device that goes back to an older version, and stays there", async () => {
    await using world = await FleetWorld.open(await place());
    world.say("a", "1.0.1");
    world.say("a", "1.0.0", { to: "1.0.1" });
    expect((await world.look("a")).state).toBe("failed");
    world.say("a", "1.0.0", { to: "1.0.1" });
    expect(await world.look("a")).toEqual({
      state: "failed",
      history: ["first seen null -> 1.0.1", "rolled back 1.0.1 -> 1.0.0", "offered 1.0.0 -> 1.0.1"],
    });
    world.say("a", "1.0.1");
    expect((await world.look("a")).state).toBe("current");
  });

  test("the same release offered three times", async () => {
    await using world = await FleetWorld.open(await place());
    const states: string[] = [];
    for (let time = 0; time < 3; time++) {
      world.say("a", "1.0.0", { to: "1.0.1" });
      states.push((await world.look("a")).state);
    }
    expect(states).toEqual(["offered", "offered", "failed"]);
    world.say("a", "1.0.0", { to: "1.0.2" });
    expect((await world.look("a")).state).toBe("offered");
  });

  test("silence counts while a server is up", async () => {
    const url = await place();
    {
      await using world = await FleetWorld.open(url);
      world.say("a", "1.0.0", { to: "1.0.1" });
      world.pass(HOUR / 2);
      expect((await world.look("a")).state).toBe("offered");
    }
    await using world = await FleetWorld.open(url);
    world.now += 100 * HOUR;
    expect((await world.look("a")).state).toBe("offered");
    world.pass(HOUR / 2 + 1);
    expect((await world.look("a")).state).toBe("silent");
    world.say("a", "1.0.1");
    const { state, history } = await world.look("a");
    expect(state).toBe("current");
    expect(history.slice(2)).toEqual([
      "back after silence 1.0.0 -> 1.0.1",
      "updated 1.0.0 -> 1.0.1",
    ]);
  });

  test("a device that is usually silent for long may be", async () => {
    await using world = await FleetWorld.open(await place());
    for (let day = 0; day < 3; day++) {
      world.say("a", "1.0.0");
      world.pass(24 * HOUR);
    }
    world.say("a", "1.0.0", { to: "1.0.1" });
    world.pass(71 * HOUR);
    expect((await world.look("a")).state).toBe("offered");
    world.pass(2 * HOUR);
    expect((await world.look("a")).state).toBe("silent");
  });

  test("a device without a name proves nothing", async () => {
    await using world = await FleetWorld.open(await place());
    for (const version of ["1.0.0", "1.0.1", "1.0.0", "1.0.0"]) {
      world.say("", version, { to: version === "1.0.0" ? "1.0.1" : null });
    }
    world.pass(99 * HOUR);
    const history = ["first seen null -> 1.0.0"];
    expect(await world.look("ip:10.0.0.1")).toEqual({ state: "offered", history });
  });

  test("firmware alone, and boards that tell it as their version", async () => {
    await using world = await FleetWorld.open(await place());
    world.newest = { version: null, firmware: "1.20.3" };
    const pybytes = { query: { sysname: "FiPy" }, isKnown: false };
    world.say("a", "1.20.2", { ...pybytes, firmware: "1.20.3" });
    expect(await world.fleet.flush().then(() => world.fleet.device("a"))).toMatchObject({
      ...{ version: null, firmware: "1.20.2", model: "FiPy" },
      ...{ state: "offered", offered: "firmware 1.20.3" },
    });
    world.say("a", "1.20.3", pybytes);
    const { state, history } = await world.look("a");
    expect([state, history.at(-1)]).toEqual([
      "current",
      "updated firmware 1.20.2 -> firmware 1.20.3",
    ]);
  });
});

/** What a device is expected to be: said again, without a store, batches and counts by cohort. */
class Device {
  history: string[] = [];
  #version: string | null = null;
  #offered: string | null = null;
  #offers = 0;
  #standing: "none" | "offered" | "said" | "seen" = "none";
  #failed: string | null = null;
  #heard = 0;
  #intervals: number[] = [];

  constructor(private readonly silent: number) {}

  get version(): string {
    return this.#version ?? "none";
  }

  #usual(): number {
    const median = this.#intervals.toSorted((a, b) => a - b)[this.#intervals.length >> 1] ?? 0;
    return Math.max(this.silent, 3 * median);
  }

  /** @param offer what it was offered, `null` for nothing; absent: it only reports */
  hear(now: number, version: string, offer?: string | null, failed?: string): void {
    const from = this.#version;
    const wasFailed = this.#hasFailed() && this.#failed;
    if (from === null) this.history.push(`first seen null -> ${version}`);
    else {
      if (this.state(version, now) === "silent") {
        this.history.push(`back after silence ${from} -> ${version}`);
      }
      if (now - this.#heard >= 60_000) this.#intervals.push(now - this.#heard);
      this.#intervals = this.#intervals.slice(-5);
      if (version > from) this.history.push(`updated ${from} -> ${version}`);
      if (version < from) this.history.push(`rolled back ${from} -> ${version}`);
    }
    this.#version = version;
    this.#heard = now;
    this.#offer(version, offer);
    this.#fail(from ?? version, version, offer, failed);
    const isNew = this.#hasFailed() && this.#failed !== wasFailed;
    if (isNew && !(from !== null && version < from)) {
      this.history.push(`failed ${version} -> ${this.#failed}`);
    }
  }

  #offer(version: string, offer: string | null | undefined): void {
    const stands = offer === undefined ? this.#offered : offer;
    if (stands === null || stands <= version) [this.#offered, this.#offers] = [null, 0];
    else {
      if (stands !== this.#offered) {
        this.history.push(`offered ${version} -> ${stands}`);
        this.#offers = 0;
      }
      this.#offered = stands;
      if (offer) this.#offers++;
    }
  }

  #fail(from: string, version: string, offer?: string | null, failed?: string): void {
    const set = (standing: "none" | "offered" | "said" | "seen", release: string | null) => {
      [this.#standing, this.#failed] = [standing, release];
    };
    if (version < from) set("seen", from);
    else if (failed && offer === failed) set("said", failed);
    else if (this.#offered && this.#offers >= 3) set("seen", this.#offered);
    else if (!this.#hasFailed() || version !== from || offer === null) {
      set(offer && this.#offered ? "offered" : "none", failed ?? null);
    } else if (offer !== undefined && (this.#standing === "said" || this.#failed !== offer)) {
      set("offered", failed ?? null);
    }
  }

  #hasFailed(): boolean {
    return this.#standing === "said" || this.#standing === "seen";
  }

  state(newest: string, now: number): DeviceState {
    if (this.#hasFailed()) return "failed";
    if (this.#standing === "offered") {
      return now - this.#heard > this.#usual() ? "silent" : "offered";
    }
    return this.version >= newest ? "current" : "behind";
  }
}

const SEED = seeded("fleet");

describe.each(stores.each)("random reports in %s", (_, { place }) => {
  test("make the states, histories, pages and counts that are expected", async () => {
    const random = new Random(SEED);
    const silent = 3600;
    await using world = await FleetWorld.open(await place(), { silent });
    const devices = new Map<string, Device>();
    const versions = ["1.0.1", "1.0.2", "1.0.3", "1.0.4", "1.0.5"];
    for (let moment = 0; moment < 60; moment++) {
      if (random.chance(0.1)) world.newest = { version: random.pick(versions), firmware: null };
      const newest = world.newest.version!;
      for (let n = random.below(8); n > 0; n--) {
        const id = `meter-${random.below(9)}`;
        const known = devices.get(id);
        const version = known && random.chance(0.7) ? known.version : random.pick(versions);
        const device = known ?? new Device(1000 * silent);
        devices.set(id, device);
        // Of one device at one moment, a report first and then a question: never twice the same.
        if (random.chance(0.3)) {
          world.say(id, version, { method: "HEAD" });
          device.hear(world.elapsed, version);
        }
        const to = newest > version ? newest : null;
        const failed = to && random.chance(0.2) ? to : undefined;
        world.say(id, version, { to, query: failed ? { failed } : {} });
        device.hear(world.elapsed, version, to, failed);
        await world.fleet.flush();
      }
      world.pass(random.pick([1000, 60_000, HOUR / 2, 5 * HOUR]));
    }
    const ids = [...devices.keys()].sort();
    for (const id of ids) {
      const device = devices.get(id)!;
      const state = device.state(world.newest.version!, world.elapsed);
      expect(await world.look(id)).toEqual({ state, history: device.history });
    }
    const summary = await world.summary();
    const stateOf = (id: string) => devices.get(id)!.state(world.newest.version!, world.elapsed);
    for (const state of ["current", "behind", "offered", "silent", "failed"] as const) {
      const expected = ids.filter((id) => stateOf(id) === state);
      const page = await world.fleet.devices({ state });
      expect(page.devices.map(({ id }) => id)).toEqual(expected);
      expect(summary.states[state]).toBe(expected.length);
    }
    const counts = Map.groupBy(ids, (id) => devices.get(id)!.version);
    expect(summary.versions).toEqual(
      Object.fromEntries([...counts].map(([version, { length }]) => [version, length])),
    );
  });
});

describe.each(stores.each)("what people ask and change in %s", (_, { place, query }) => {
  test("pages go on where the last one ended, and filters go together", async () => {
    await using world = await FleetWorld.open(await place());
    for (let i = 0; i < 7; i++) {
      const query = { model: i < 5 ? "FiPy" : "LoPy4" };
      world.say(`m${i}`, i % 2 ? "1.0.1" : "1.0.0", { query, address: `10.0.0.${i}` });
    }
    await world.fleet.flush();
    const ids = async (filter: Parameters<typeof world.fleet.devices>[0]) => {
      const { devices, next } = await world.fleet.devices(filter);
      return [...devices.map(({ id }) => id), next];
    };
    expect(await ids({ limit: 4 })).toEqual(["m0", "m1", "m2", "m3", "m3"]);
    expect(await ids({ limit: 4, after: "m3" })).toEqual(["m4", "m5", "m6", null]);
    expect(await ids({ state: "behind", model: "fipy" })).toEqual(["m0", "m2", "m4", null]);
    expect(await ids({ state: "current", version: "1.00.1" })).toEqual(["m1", "m3", "m5", null]);
    expect(await ids({ q: "0.0.6" })).toEqual(["m6", null]);
    expect(await ids({ q: "%" })).toEqual([null]);
    expect(await ids({ state: "failed" })).toEqual([null]);
    expect(await world.summary()).toEqual({
      devices: 7,
      versions: { "1.0.0": 4, "1.0.1": 3 },
      states: { current: 3, behind: 4, offered: 0, silent: 0, failed: 0 },
      models: { FiPy: 5, LoPy4: 2 },
      silent_at: null,
    });
  });

  test("each model has a newest release of its own", async () => {
    await using world = await FleetWorld.open(await place());
    world.newest.models = { FiPy: { version: "2.0.0", firmware: null } };
    world.say("a", "1.0.1", { query: { model: "fipy" } });
    world.say("b", "1.0.1", { query: { model: "LoPy4" } });
    expect([(await world.look("a")).state, (await world.look("b")).state]).toEqual([
      "behind",
      "current",
    ]);
  });

  test("a device is named, labelled and forgotten", async () => {
    await using world = await FleetWorld.open(await place());
    world.say("a", "1.0.0");
    await world.fleet.flush();
    const { fleet } = world;
    expect(await fleet.edit("nobody", { name: "x" })).toBe(false);
    expect(await fleet.edit("a", { name: "Pump ♥", labels: { site: "north", van: "2" } })).toBe(
      true,
    );
    await fleet.edit("a", { labels: { van: null } });
    expect(await fleet.device("a")).toMatchObject({ name: "Pump ♥", labels: { site: "north" } });
    const labelled = async (key: string, value: string) =>
      (await fleet.devices({ label: [key, value] })).devices.length;
    expect([await labelled("site", "north"), await labelled("van", "2")]).toEqual([1, 0]);
    expect(await failureOf(fleet.edit("a", { name: "two\nlines" }))).toContain(
      "no control characters",
    );
    expect([await fleet.forget("a"), await fleet.forget("a")]).toEqual([true, false]);
    expect(await fleet.device("a")).toBeUndefined();
    expect(await world.summary()).toMatchObject({ devices: 0, versions: {} });
  });

  test("a clock that jumps back changes no order, and nobody is silent by it", async () => {
    await using world = await FleetWorld.open(await place());
    world.say("a", "1.0.0", { to: "1.0.1" });
    await world.fleet.flush();
    world.now -= 1000 * HOUR;
    world.say("a", "1.0.1");
    const { state, history } = await world.look("a");
    expect(state).toBe("current");
    expect(history.at(-1)).toBe("updated 1.0.0 -> 1.0.1");
    expect((await world.fleet.device("a"))!.last_seen).toBe(world.now);
    world.now += 5000 * HOUR;
    world.say("a", "1.0.0", { to: "1.0.2" });
    world.say("b", "1.0.0", { to: "1.0.1" });
    expect((await world.look("b")).state).toBe("offered");
  });

  test("ids made up by a stranger do not displace devices that come back", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url, { maxDevices: 1000 });
    const meters = Array.from({ length: 20 }, (_, i) => `meter-${i}`);
    for (let visit = 0; visit < 2; visit++) {
      for (const id of meters) world.say(id, "1.0.1");
      await world.fleet.flush();
      world.pass(HOUR);
    }
    for (let i = 0; i < 10_000; i++) {
      world.say(`made-up-${i}`, `9.${i % 500}`);
      if (i % 2000 === 1999) await world.fleet.flush();
    }
    const { devices } = await world.summary();
    expect(devices).toBeWithin(900, 1001);
    for (const id of meters) expect((await world.fleet.device(id))?.version).toBe("1.0.1");
    const rows = async (table: string) =>
      Number((await query(url, `SELECT COUNT(*) AS n FROM ${table}`))[0]!["n"]);
    expect(await rows("ota_devices")).toBe(devices);
    expect(await rows("ota_events")).toBe(devices);
    // The last are those that came last.
    expect(await world.fleet.device("made-up-9999")).toBeDefined();
    expect(await world.fleet.device("made-up-0")).toBeUndefined();
  });

  test("nor when each is made up twice, and never what the operator has named or labelled", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url, { maxDevices: 100 });
    const meters = Array.from({ length: 20 }, (_, i) => `meter-${i}`);
    for (const id of [...meters, "named", "labelled"]) world.say(id, "1.0.1");
    await world.fleet.flush();
    await world.fleet.edit("named", { name: "Pump" });
    await world.fleet.edit("labelled", { labels: { place: "roof" } });
    for (let visit = 0; visit < 4; visit++) {
      world.pass(HOUR);
      for (const id of meters) world.say(id, "1.0.1");
      await world.fleet.flush();
    }
    for (let i = 0; i < 300; i++) {
      world.pass(1);
      for (const _ of [1, 2]) world.say(`made-up-${i}`, "9.0");
      if (i % 50 === 49) await world.fleet.flush();
    }
    expect((await world.summary()).devices).toBeWithin(90, 101);
    for (const id of [...meters, "named", "labelled"]) {
      expect([id, (await world.fleet.device(id))?.version]).toEqual([id, "1.0.1"]);
    }
  });

  test("a server that starts again with a clock that was set back believes its devices", async () => {
    const url = await place();
    {
      await using before = await FleetWorld.open(url);
      before.say("a", "1.0.0", { to: "1.0.1" });
      await before.fleet.flush();
    }
    await using world = await FleetWorld.open(url);
    world.now -= 60_000;
    world.say("a", "1.0.1", { method: "HEAD" });
    expect((await world.look("a")).state).toBe("current");
  });

  test("devices that say that they are on none, or on other, are counted with those", async () => {
    await using world = await FleetWorld.open(await place());
    for (const [id, version] of [
      ["a", "none"],
      ["b", ""],
      ["c", "other"],
      ["d", "1.0.1"],
    ] as const) {
      world.say(id, version);
    }
    await world.fleet.flush();
    expect((await world.summary()).versions).toEqual({ none: 2, other: 1, "1.0.1": 1 });
  });

  test("of a device that goes up and down for ever the last events are kept", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url);
    for (let i = 0; i < 1400; i++) {
      world.say("a", i % 2 ? "1.0.1" : "1.0.0");
      world.pass(1);
      if (i % 8 === 7) await world.fleet.flush();
    }
    const device = await world.fleet.device("a");
    expect(device!.history).toHaveLength(1000);
    expect(device!.history.at(-1)!.at).toBe(world.now - 1);
    const [row] = await query(url, "SELECT COUNT(*) AS n FROM ota_events");
    expect(Number(row!["n"])).toBeWithin(1000, 1101);
  });
});

describe("several servers on one PostgreSQL", () => {
  test("what one saw, the other tells", async () => {
    const url = await stores.postgresql.place();
    await using one = await FleetWorld.open(url);
    await using other = await FleetWorld.open(url);
    one.say("a", "1.0.0", { to: "1.0.1" });
    await one.fleet.flush();
    expect((await other.look("a")).state).toBe("offered");
    other.say("a", "1.0.1", { method: "HEAD" });
    await other.fleet.flush();
    expect(await one.look("a")).toEqual({
      state: "current",
      history: ["first seen null -> 1.0.0", "offered 1.0.0 -> 1.0.1", "updated 1.0.0 -> 1.0.1"],
    });
    expect(await one.summary()).toEqual(await other.summary());
  });

  test("what one heard first and writes last changes nothing", async () => {
    const url = await stores.postgresql.place();
    await using one = await FleetWorld.open(url);
    await using other = await FleetWorld.open(url);
    for (const world of [one, other]) {
      world.say("elsewhere", "1.0.0");
      await world.fleet.flush();
    }
    // A load balancer gives its request to the one, and its report to the other.
    one.say("a", "1.0.0", { to: "1.0.1" });
    one.say("b", "1.0.0", { to: "1.0.1" });
    other.pass(500);
    other.say("a", "1.0.1", { method: "HEAD" });
    await other.fleet.flush();
    await one.fleet.flush();
    expect((await other.look("a")).state).toBe("current");
    expect((await other.look("b")).state).toBe("offered");
    // A clock that is behind by more is one that was set, and its server is believed.
    one.now -= 24 * HOUR;
    one.say("a", "1.0.2");
    expect((await one.look("a")).history.at(-1)).toBe("updated 1.0.1 -> 1.0.2");
  });

  test("what one heard before it was cut off for long sends no device back", async () => {
    const url = await stores.postgresql.place();
    await using one = await FleetWorld.open(url);
    await using other = await FleetWorld.open(url);
    one.say("a", "1.0.0", { to: "1.0.1" });
    one.say("b", "1.0.0", { to: "1.0.1" });
    for (const world of [one, other]) world.pass(HOUR);
    other.say("a", "1.0.1");
    await other.fleet.flush();
    for (const world of [one, other]) world.pass(HOUR);
    await one.fleet.flush();
    expect(await one.look("a")).toEqual({
      state: "current",
      history: ["first seen null -> 1.0.1"],
    });
    expect((await one.look("b")).history.at(-1)).toBe("offered 1.0.0 -> 1.0.1");
  });

  test("both write at once, and each report counts once", async () => {
    const url = await stores.postgresql.place();
    await using one = await FleetWorld.open(url);
    await using other = await FleetWorld.open(url);
    for (let round = 0; round < 5; round++) {
      for (let i = 0; i < 300; i++) {
        one.say(`shared-${i}`, "1.0.0", { to: "1.0.1" });
        other.say(`shared-${i}`, "1.0.0");
        other.say(`other-${round}-${i}`, "1.0.1");
      }
      await Promise.all([one.fleet.flush(), other.fleet.flush()]);
    }
    const { devices, versions } = await one.summary();
    expect({ devices, versions }).toEqual({
      devices: 300 + 1500,
      versions: { "1.0.0": 300, "1.0.1": 1500 },
    });
    const { history } = (await one.fleet.device("shared-7"))!;
    expect(history.filter(({ kind }) => kind === "first seen")).toHaveLength(1);
  });

  test("their time does not add up: an hour for both is an hour", async () => {
    const url = await stores.postgresql.place();
    await using one = await FleetWorld.open(url);
    await using other = await FleetWorld.open(url);
    one.say("a", "1.0.0", { to: "1.0.1" });
    await one.fleet.flush();
    for (const world of [one, other]) {
      world.pass(0.9 * HOUR);
      await world.fleet.flush();
    }
    expect((await one.look("a")).state).toBe("offered");
    one.pass(0.2 * HOUR);
    expect((await one.look("a")).state).toBe("silent");
  });
});

describe("merging", () => {
  test("rows that no fleet writes are left out, and the others are merged", async () => {
    const url = await stores.sqlite.place();
    {
      await using van = await FleetWorld.open(url);
      for (const id of ["a", "b", "c", "d", "e"]) van.say(id, "1.0.0");
      await van.fleet.flush();
      await van.fleet.edit("a", { labels: { place: "roof" } });
    }
    {
      using file = new Database(url);
      file.run("UPDATE ota_devices SET id = 'B' WHERE id = 'b'");
      file.run("UPDATE ota_devices SET last_seen = 'noon' WHERE id = 'c'");
      file.run("UPDATE ota_devices SET standing = 'proven', cohort = 'x' WHERE id = 'd'");
      file.run("UPDATE ota_devices SET cohort = 'x' WHERE id = 'e'");
      file.run("UPDATE ota_events SET to_ = 'a' || char(27) || '[2J' WHERE device = 'a'");
      file.run("INSERT INTO ota_labels VALUES ('a', 'long', ?, 1)", ["x".repeat(100_000)]);
    }
    for (const store of [stores.sqlite, stores.postgresql]) {
      await using world = await FleetWorld.open(await store.place());
      expect(await world.fleet.merge(url)).toMatchObject({ added: 2, refused: 5 });
      const { devices } = await world.fleet.devices();
      expect(devices.map(({ id, labels }) => [id, labels])).toEqual([
        ["a", { place: "roof" }],
        ["e", {}],
      ]);
      expect((await world.summary()).versions).toEqual({ "1.0.0": 2 });
    }
  });

  test.each([
    ["was heard later than there has been time for", "seen_up = 9007199254740991 / 2", 0],
    ["was heard in intervals that are none", "intervals = '1e999,NaN'", 1],
    ["was heard less often than never", "seen = -1", 1],
    ["was heard when there are no dates", "last_seen = 9007199254740991", 1],
  ])("a device that %s is heard as ever", async (_, change, refused) => {
    const url = await van(0, (world) => world.say("a", "1.0.0", { to: "1.0.1" }));
    await stores.sqlite.query(url, `UPDATE ota_devices SET ${change}`);
    for (const store of [stores.sqlite, stores.postgresql]) {
      await using world = await FleetWorld.open(await store.place());
      expect((await world.fleet.merge(url)).refused).toBe(refused);
      for (let visit = 0; visit < 3; visit++) {
        world.pass(HOUR);
        world.say("a", "1.0.1");
        await world.fleet.flush();
      }
      expect((await world.look("a")).state).toBe("current");
    }
  });

  /** A van: a store of its own, in which some devices have been met. */
  async function van(start: number, says: (world: FleetWorld) => void | Promise<void>) {
    const url = await stores.sqlite.place();
    await using world = await FleetWorld.open(url);
    world.now += start;
    await says(world);
    await world.fleet.flush();
    return url;
  }

  const first = () =>
    van(0, async (world) => {
      world.say("only-first", "1.0.0");
      world.say("both", "1.0.0", { to: "1.0.1" });
      await world.fleet.flush();
      await world.fleet.edit("both", { name: "Old name", labels: { site: "north", door: "3" } });
    });
  const second = () =>
    van(HOUR, async (world) => {
      world.say("both", "1.0.1");
      world.say("only-second", "1.0.1");
      await world.fleet.flush();
      world.pass(HOUR);
      await world.fleet.edit("both", { name: "New name", labels: { door: null } });
    });

  test.each(stores.each)("into %s: the newer report counts, and events add up", async (_, kind) => {
    const files = [await first(), await second()];
    const found: unknown[] = [];
    for (const order of [files, files.toReversed()]) {
      await using world = await FleetWorld.open(await kind.place());
      for (const file of order) await world.fleet.merge(file);
      const merged = await world.everything();
      for (const file of order) {
        // Twice is as good as once.
        expect(await world.fleet.merge(file)).toMatchObject({ added: 0, updated: 0, events: 0 });
      }
      expect(await world.everything()).toEqual(merged);
      expect((await world.summary()).devices).toBe(3);
      found.push(merged);
    }
    expect(found[0]).toEqual(found[1]);
    const [both] = found[0] as Awaited<ReturnType<FleetWorld["everything"]>>;
    expect(both).toMatchObject({
      ...{ id: "both", name: "New name", version: "1.0.1", state: "current" },
      labels: { site: "north" },
    });
    expect(both!.history.map(({ kind }) => kind)).toEqual(["first seen", "offered", "first seen"]);
  });

  test("random fleets, in any order and twice, become the same", async () => {
    const random = new Random(SEED);
    const files: string[] = [];
    for (let n = 0; n < 3; n++) {
      const file = await van(n * 1000, async (world) => {
        for (let i = 0; i < 60; i++) {
          const version = random.pick(["1.0.0", "1.0.1", "1.0.2"]);
          world.say(`m${random.below(12)}`, version, { to: random.pick([null, "1.0.3"]) });
          world.pass(random.below(100_000));
          if (random.chance(0.3)) await world.fleet.flush();
        }
      });
      files.push(file);
    }
    const found: unknown[] = [];
    for (const order of [files, files.toReversed(), random.some(files, 2).concat(files)]) {
      await using world = await FleetWorld.open(await stores.sqlite.place());
      for (const file of order) await world.fleet.merge(file);
      found.push((await world.everything()).map((device) => ({ ...device, state: "" })));
    }
    expect(found[1]).toEqual(found[0]);
    expect(found[2]).toEqual(found[0]);
  });

  test("what is no fleet is refused, and left as it is", async () => {
    await using world = await FleetWorld.open(await stores.sqlite.place());
    const photos = await stores.sqlite.place();
    await stores.sqlite.query(photos, "CREATE TABLE photos (name TEXT)");
    const failed = await failureOf(world.fleet.merge(photos));
    expect(failed).toContain("expected the SQLite file of another fleet");
    const tables = await stores.sqlite.query(photos, "SELECT name FROM sqlite_master");
    expect(tables).toEqual([{ name: "photos" }]);
    stores.temp.write({
      "text.db": "no database at all, but a text that is long enough\n".repeat(9),
    });
    const text = await failureOf(world.fleet.merge(stores.temp.at("text.db")));
    expect(text).toContain("expected the SQLite file of another fleet");
    expect(await failureOf(world.fleet.merge(stores.temp.at("none.db")))).toContain("there is no");
  });
});
