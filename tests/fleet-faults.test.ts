/** The fleet's store when it is away, locked, full, corrupt, removed or too new; and kills. */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import * as fs from "node:fs";
import { Fleet } from "../ota.ts";
import { failureOf, FleetWorld, HOUR, Stores } from "./helpers/fleet.ts";
import { Mount } from "./helpers/mount.ts";
import { Temp } from "./helpers/temp.ts";
import { Serving, until } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

const { sqlite, postgresql, temp } = stores;

describe.each(stores.each)("a store in %s", (_, { place, query, lock }) => {
  test.concurrent("that is locked is written when it is free again", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url, { tick: 1 });
    const held = await lock(url);
    world.say("a", "1.0.0", { to: "1.0.1" });
    await world.warned(/cannot be written .*: up to 100000 reports wait in memory/);
    world.say("a", "1.0.1");
    await held.release();
    await world.warned(/is written again$/);
    expect(world.warnings).toHaveLength(2);
    expect((await world.look("a")).state).toBe("current");
  });

  test("that a newer ota.ts wrote is refused", async () => {
    const url = await place();
    await using _ = await FleetWorld.open(url);
    await query(url, "UPDATE ota_meta SET value = '99' WHERE name = 'schema'");
    const failed = await failureOf(Fleet.open({ url, serving: true }));
    expect(failed).toMatch(/was written by a newer ota\.ts \(schema 99, this one knows \d+\)/);
  });

  test("that was not made to its end is brought up, and keeps its name", async () => {
    const url = await place();
    await query(url, "CREATE TABLE ota_meta (name TEXT NOT NULL PRIMARY KEY, value TEXT)");
    await query(url, "INSERT INTO ota_meta VALUES ('schema', '0'), ('source', 'mine')");
    await using world = await FleetWorld.open(url);
    world.say("a", "1.0.0");
    await world.fleet.flush();
    expect(await query(url, "SELECT source FROM ota_events")).toEqual([{ source: "mine" }]);
  });

  test("does not remember servers for ever", async () => {
    const url = await place();
    for (let server = 0; server < 3; server++) {
      await using world = await FleetWorld.open(url);
      world.say("a", "1.0.0");
      await world.fleet.flush();
      world.pass(25 * HOUR);
      world.say("a", "1.0.1");
      await world.fleet.flush();
    }
    const rows = await query(url, "SELECT name FROM ota_meta WHERE name LIKE 'batch %'");
    expect(rows).toHaveLength(1);
  });

  test("that several open for the first time at once is made once", async () => {
    const url = await place();
    const worlds = await Promise.all([1, 2, 3].map(() => FleetWorld.open(url)));
    for (const [i, world] of worlds.entries()) world.say(`m${i}`, "1.0.0");
    await Promise.all(worlds.map(({ fleet }) => fleet.flush()));
    expect((await worlds[0]!.summary()).devices).toBe(3);
    for (const world of worlds) await world[Symbol.asyncDispose]();
  });

  test("that is away for long costs the oldest reports, which are counted", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url, { maxWaiting: 50 });
    for (let i = 0; i < 120; i++) world.say(`m${String(i).padStart(3, "0")}`, "1.0.0");
    expect(world.fleet.dropped).toBe(70);
    await world.fleet.flush();
    const { devices } = await world.fleet.devices();
    expect(devices.map(({ id }) => id).slice(0, 2)).toEqual(["m070", "m071"]);
    // A device that never says the same twice does not push out the others.
    for (let i = 0; i < 1000; i++) world.say("noisy", `1.0.${i}`);
    world.say("quiet", "1.0.0");
    await world.fleet.flush();
    expect(world.fleet.dropped).toBe(70 + 992);
    expect(await world.fleet.device("quiet")).toBeDefined();
  });

  test("is read while nobody can write it", async () => {
    const url = await place();
    await using world = await FleetWorld.open(url);
    world.say("a", "1.0.0");
    await world.fleet.flush();
    const held = await lock(url);
    expect((await world.fleet.device("a"))?.version).toBe("1.0.0");
    await held.release();
  });
});

describe("PostgreSQL", () => {
  test("that stops and comes back is written again by itself", async () => {
    const url = await postgresql.place();
    await using world = await FleetWorld.open(url, { tick: 1 });
    world.say("a", "1.0.0", { to: "1.0.1" });
    await until("a device", () => world.fleet.device("a"), Boolean);
    await stores.postgres.stop();
    try {
      world.say("a", "1.0.1");
      await world.warned(/cannot be written/);
      expect(await failureOf(world.fleet.device("a"))).toContain("does not answer");
      // Who opens it meanwhile waits for it, too.
      await using other = await FleetWorld.open(url, { tick: 1 });
      expect(other.warnings[0]).toContain("devices are kept in memory until it can");
      other.say("b", "1.0.0");
      await stores.postgres.resume();
      await world.warned(/is written again/);
      await other.warned(/is written again/);
      await until(
        "both devices",
        () => other.everything(),
        (all) => all.length === 2,
      );
      expect((await world.look("a")).state).toBe("current");
    } finally {
      await stores.postgres.resume();
    }
  });

  test("on a full disk is written when there is room again", async () => {
    await using small = await stores.postgres.small("32m");
    const { path } = small.mount;
    await using world = await FleetWorld.open(small.url, { tick: 1 });
    world.say("first", "1.0.0");
    await world.fleet.flush();
    const { bavail, bsize } = fs.statfsSync(path);
    fs.writeFileSync(`${path}/other`, Buffer.alloc(bavail * bsize - 200_000));
    for (let i = 0; i < 5000; i++) world.say(`meter-${i}`, "1.0.0", { to: "1.0.1" });
    await world.warned(/cannot be written .*No space left/);
    // It may be read, unless PostgreSQL itself has stopped over it.
    const read = world.fleet.device("first").then((device) => device?.version);
    const found = await read.catch((error: Error) => error.message);
    expect(found).toMatch(/^1\.0\.0$|does not answer \(.*\); try again$/);
    small.mount.remount("size=64m");
    await world.warned(/is written again$/);
    await world.fleet.flush();
    expect((await world.summary()).devices).toBe(5001);
  });

  test("that many servers open at once is made once, and none of them complains", async () => {
    const url = await postgresql.place();
    const servers = Array.from({ length: 6 }, () => FleetWorld.open(url));
    for (const world of await Promise.all(servers)) {
      expect(world.warnings).toEqual([]);
      await world[Symbol.asyncDispose]();
    }
  });

  test("that lacks one of its tables costs the fleet, not the server", async () => {
    const url = await postgresql.place();
    await using world = await FleetWorld.open(url, { tick: 1 });
    await postgresql.query(url, "ALTER TABLE ota_cohorts RENAME TO lost");
    world.say("a", "1.0.0");
    await world.warned(/cannot be written .*ota_cohorts.*: up to 100000 reports wait in memory/);
    await postgresql.query(url, "ALTER TABLE lost RENAME TO ota_cohorts");
    await world.warned(/is written again$/);
    expect((await world.look("a")).state).toBe("behind");
  });

  test("whose answer to a COMMIT is lost counts nothing twice", async () => {
    const url = new URL(await postgresql.place());
    using proxy = new LossyProxy(Number(url.port));
    url.port = `${proxy.port}`;
    await using world = await FleetWorld.open(url.href);
    world.say("a", "1.0.0", { to: "1.0.1" });
    await world.fleet.flush();
    world.say("a", "1.0.0", { to: "1.0.1" });
    proxy.losesNext = true;
    expect(await failureOf(world.fleet.flush())).not.toBe("");
    expect(proxy.losesNext).toBe(false);
    world.say("b", "1.0.0");
    // A third offer would be one too many.
    expect(await world.look("a")).toEqual({
      state: "offered",
      history: ["first seen null -> 1.0.0", "offered 1.0.0 -> 1.0.1"],
    });
    expect((await world.look("b")).state).toBe("behind");
  });
});

/** Stands before a PostgreSQL, and can cut a connection just when a transaction is done. */
class LossyProxy implements Disposable {
  losesNext = false;
  readonly #server: Bun.TCPSocketListener<undefined>;

  constructor(port: number) {
    const proxy = this;
    const others = new WeakMap<object, Promise<Bun.Socket<undefined>>>();
    const committing = new WeakSet<object>();
    this.#server = Bun.listen<undefined>({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open(client) {
          const data = (_: unknown, bytes: Uint8Array) => {
            if (committing.has(client) && Buffer.from(bytes).includes("COMMIT")) {
              proxy.losesNext = false;
              client.terminate();
            } else client.write(bytes);
          };
          const close = () => void client.end();
          others.set(client, Bun.connect({ hostname: "127.0.0.1", port, socket: { data, close } }));
        },
        async data(client, bytes) {
          if (proxy.losesNext && Buffer.from(bytes).includes("COMMIT")) committing.add(client);
          (await others.get(client))?.write(bytes);
        },
        async close(client) {
          (await others.get(client))?.end();
        },
      },
    });
  }

  get port(): number {
    return this.#server.port;
  }

  [Symbol.dispose](): void {
    this.#server.stop(true);
  }
}

describe("a SQLite file", () => {
  test("on a full disk is written when there is room again", async () => {
    using own = new Temp();
    using mount = new Mount(own.at("small"), "size=512k");
    await using world = await FleetWorld.open(`${mount.path}/fleet.db`, { tick: 1 });
    fs.writeFileSync(`${mount.path}/other`, Buffer.alloc(100_000));
    for (let i = 0; i < 5000; i++) world.say(`meter-${i}`, "1.0.0", { to: "1.0.1" });
    await world.warned(/cannot be written .*full/);
    mount.remount("size=64m");
    await world.warned(/is written again$/);
    await world.fleet.flush();
    expect((await world.summary()).devices).toBe(5000);
  });

  test("that is none is left alone, and the fleet kept in memory", async () => {
    const url = await sqlite.place();
    const text = "somebody's diary, which is no database at all\n".repeat(50);
    fs.writeFileSync(url, text);
    await using world = await FleetWorld.open(url);
    expect(world.warnings.join()).toContain("it is left alone, and devices are forgotten when");
    world.say("a", "1.0.0");
    expect((await world.look("a")).state).toBe("behind");
    expect(fs.readFileSync(url, "utf8")).toBe(text);
    // A command does nothing with it.
    expect(await failureOf(Fleet.open({ url }))).toContain("--fleet names another one");
  });

  test("in a directory that is not there is none to wait for", async () => {
    await using world = await FleetWorld.open(temp.at("no/such/fleet.db"));
    expect(world.fleet.place).toBe("memory");
    expect(world.warnings).toHaveLength(1);
  });

  test.each([
    ["all but its head", 4096, "is left alone, and devices are forgotten"],
    ["its second half", 300_000, "cannot be written .*: up to 100000 reports wait"],
  ])("in which %s is damaged costs the fleet, not the server", async (_, from, warning) => {
    const url = await sqlite.place();
    {
      await using world = await FleetWorld.open(url);
      for (let i = 0; i < 3000; i++) world.say(`m${i}`, "1.0.0");
      await world.fleet.flush();
    }
    const bytes = fs.readFileSync(url);
    expect(bytes.length).toBeGreaterThan(2 * from);
    fs.writeFileSync(url, bytes.fill("damaged ", from));
    await using world = await FleetWorld.open(url, { tick: 1 });
    for (let i = 0; i < 3000; i++) world.say(`m${i}`, "1.0.1");
    await world.warned(new RegExp(warning));
  });

  test("is whole when it is closed: it can be carried away alone", async () => {
    const url = await sqlite.place();
    {
      await using world = await FleetWorld.open(url);
      world.say("a", "1.0.0");
    }
    expect(fs.existsSync(`${url}-wal`)).toBe(false);
    await using other = await FleetWorld.open(await sqlite.place());
    expect(await other.fleet.merge(url)).toMatchObject({ added: 1, events: 1 });
  });

  test("that is removed while a server runs is made anew, and that is said", async () => {
    const url = await sqlite.place();
    await using world = await FleetWorld.open(url, { tick: 1 });
    world.say("a", "1.0.0");
    expect(await world.fleet.settingOr("a secret", "of all servers")).toBe("of all servers");
    await until("a device", () => world.fleet.device("a"), Boolean);
    for (const end of ["", "-wal", "-shm"]) fs.rmSync(url + end, { force: true });
    world.say("b", "1.0.0");
    await world.warned(/cannot be written \(its file was removed or replaced\)/);
    await world.warned(/is written again/);
    await using other = await FleetWorld.open(url);
    expect((await other.everything()).map((device) => device!.id)).toEqual(["b"]);
    // A command still knows what is newest, and another server has the same secret.
    await using command = await Fleet.open({ url, existing: true });
    expect((await command.summary()).states.behind).toBe(1);
    expect(await command.settingOr("a secret", "of one")).toBe("of all servers");
  });

  test("that is removed while nothing is to be written is missed all the same", async () => {
    const url = await sqlite.place();
    await using world = await FleetWorld.open(url, { tick: 1 });
    fs.rmSync(url);
    await world.warned(/cannot be written \(its file was removed or replaced\)/);
    await world.warned(/is written again/);
    expect(fs.existsSync(url)).toBe(true);
  });

  test("that is removed is missed by whoever asks first", async () => {
    const url = await sqlite.place();
    await using world = await FleetWorld.open(url);
    fs.rmSync(url);
    expect(await failureOf(world.fleet.device("a"))).toContain("its file was removed or replaced");
    expect(world.warnings.join()).toContain("its file was removed or replaced");
    expect(await world.fleet.device("a")).toBeUndefined();
  });
});

describe.each(stores.each)("a server with its fleet in %s", (_, { place, lock }) => {
  const RELEASES = { "1.0.0/flash/main.py": "one", "1.0.1/flash/main.py": "two" };

  const ask = async (server: Serving, devid: string, version: string) => {
    const answer = await fetch(`${server.url}/manifest.json?devid=${devid}&current_ver=${version}`);
    await answer.body?.cancel();
    expect(answer.status).toBe(200);
  };

  test.concurrent("loses by kill -9 at most the last second", async () => {
    using root = new Temp(RELEASES);
    const fleet = await place();
    const args = ["--root", root.path, "--fleet", fleet];
    {
      await using server = await Serving.start(args);
      for (let i = 0; i < 50; i++) await ask(server, `m${i}`, "1.0.0");
      await using reader = await Fleet.open({ url: fleet });
      await until("the last device", () => reader.device("m49"), Boolean);
      await ask(server, "late", "1.0.0");
      server.kill("SIGKILL");
      await server.ended;
    }
    await using server = await Serving.start(args);
    await ask(server, "m7", "1.0.1");
    await using reader = await Fleet.open({ url: fleet });
    const device = await until(
      "an update",
      () => reader.device("m7"),
      (found) => found?.version === "1.0.1",
    );
    expect(device!.history.map(({ kind }) => kind)).toEqual(["first seen", "offered", "updated"]);
    const { devices } = await reader.summary();
    expect(devices).toBeWithin(50, 52);
  });

  test.concurrent("writes what waits when it is stopped", async () => {
    using root = new Temp(RELEASES);
    const fleet = await place();
    await using server = await Serving.start(["--root", root.path, "--fleet", fleet]);
    await ask(server, "last", "1.0.0");
    server.kill("SIGTERM");
    expect((await server.ended).code).toBe(0);
    await using reader = await Fleet.open({ url: fleet });
    expect(await reader.device("last")).toBeDefined();
  });

  test.concurrent("answers, and stops, while its store hangs", async () => {
    using root = new Temp(RELEASES);
    const fleet = await place();
    await using server = await Serving.start(["--root", root.path, "--fleet", fleet]);
    const held = await lock(fleet);
    for (let i = 0; i < 20; i++) await ask(server, `m${i}`, "1.0.0");
    server.kill("SIGTERM");
    const { code, stderr } = await server.ended;
    expect(code).toBe(0);
    expect(stderr).toContain("20 reports of the fleet could not be written");
    await held.release();
  });
});

describe("a server whose PostgreSQL takes connections and never answers", () => {
  test.concurrent("starts, answers and stops", async () => {
    using root = new Temp({ "1.0.0/flash/main.py": "one" });
    using mute = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data: () => {} } });
    const fleet = `postgres://somebody:secret@127.0.0.1:${mute.port}/fleet`;
    await using server = await Serving.start(["--root", root.path, "--fleet", fleet]);
    expect(server.stderr).toContain("devices are kept in memory until it can");
    expect(server.stderr).not.toContain("secret");
    const { status } = await fetch(`${server.url}/manifest.json?devid=a&current_ver=1.0.0`);
    expect(status).toBe(200);
    server.kill("SIGTERM");
    expect((await server.ended).code).toBe(0);
  });
});
