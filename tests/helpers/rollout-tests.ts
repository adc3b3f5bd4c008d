/**
 * Rollouts, in a store of either kind: who may have a version, and when that ends. Each kind has a
 * test file, since both take long.
 */

import { beforeAll, describe, expect, test } from "bun:test";
import * as fs from "node:fs";
import {
  binomialTail,
  Fleet,
  rolloutNumber,
  ROLLOUT_DEFAULTS,
  type RolloutAction,
  type SeenRollout,
} from "../../ota.ts";
import { failureOf, HOUR, type StoreKind, type Stores } from "./fleet.ts";
import { INTERVAL, RolloutWorld, TREE } from "./rollout.ts";
import { Random, seeded } from "./random.ts";
import { Temp } from "./temp.ts";
import { eventually, Serving, until } from "./tool.ts";

const OPTIONS = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null, pauseAt: [] };

/** All tests of rollouts in stores of a kind. */
export function testRollouts(stores: Stores, kind: StoreKind): void {
  testOne(stores, kind);
  testSeveral(kind);
}

/** The tests of one rollout in stores of a kind. */
function testOne(stores: Stores, { name, place }: StoreKind): void {
  describe(`a rollout in ${name}`, () => {
    test("goes to one device, one more, two more, four more", async () => {
      await using world = await RolloutWorld.open(await place(), 40);
      await world.start();
      const offered: number[] = [];
      for (let round = 0; round < 6; round++) {
        const asked = await world.askAll();
        offered.push(asked.length);
        await world.proveAll(asked);
      }
      expect(offered).toEqual([1, 1, 2, 4, 8, 16]);
      expect(await world.rollout()).toMatchObject({ state: "running", proven: 32, offered: 0 });
      await world.proveAll(await world.askAll());
      const { state, proven, eligible, reason } = await world.rollout();
      expect([state, proven, eligible, reason]).toEqual([
        ...["done", 40, 40, "nobody is left: 40 devices proven"],
      ]);
      // From now on it is a release as ever: for new devices, and those that say no id.
      expect(await world.ask("new")).toBe("1.0.1");
      expect(await world.ask("")).toBe("1.0.1");
    });

    test("begins with as many as --first says", async () => {
      await using world = await RolloutWorld.open(await place(), 20);
      await world.start({ first: 3 });
      const first = await world.askAll();
      expect(first).toHaveLength(3);
      await world.proveAll(first.slice(0, 1));
      expect(await world.askAll()).toHaveLength(3);
    });

    test("counts a device only when it was on it for the soak, and is heard then", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start({ soak: 7200 });
      const first = await world.askAll();
      await world.proveAll(first);
      await world.live(1);
      expect(await world.rollout()).toMatchObject({ proven: 0, offered: 1 });
      await world.live(1);
      expect(await world.rollout()).toMatchObject({ proven: 1, offered: 0 });
    });

    test("halts when the first device is silent, and says so", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      const { id } = await world.start();
      const first = await world.askAll();
      expect(first).toHaveLength(1);
      await world.live(5 / 6, first);
      expect((await world.rollout()).state).toBe("running");
      await world.live(1 / 2, first);
      const found = await world.rollout();
      expect(found).toMatchObject({
        id,
        state: "halted",
        proven: 0,
        offered: 0,
        silent_devices: 1,
      });
      expect(found.reason).toBe("1 device bad (1 silent), and none is proven");
      // Nobody gets it, also not who was offered it; who is on it gets its repair.
      expect(await world.askAll()).toEqual([]);
      world.devices.set("m001", "1.0.1");
      expect(await world.ask("m001")).toBe("none");
      expect(await world.ask("m001", { base: "0".repeat(64) })).toBe("1.0.1");
    });

    test("halts when the first device says that it failed, also when it asks no more", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      await world.fail(first);
      const found = await world.rollout();
      expect(found).toMatchObject({ state: "halted", failed: 1, silent_devices: 0 });
      expect(found.reason).toBe("1 device bad (1 failed), and none is proven");
      expect(await world.ask(first[0]!)).toBe("none");
      await world.second();
      expect((await world.rollout()).failed).toBe(1);
    });

    test("names the bad devices, those heard last first, and ten at most; and devices their part", async () => {
      await using world = await RolloutWorld.open(await place(), 30);
      await world.start({ first: 30, tolerance: 0.99 });
      const ids = await world.askAll();
      expect(ids).toHaveLength(30);
      const part = async (id: string) => (await world.fleet.device(id))!.rollouts;
      const rollout = { version: "1.0.1", model: null, state: "running" } as const;
      expect(await part("m000")).toEqual([{ ...rollout, standing: "offered" }]);
      await world.proveAll(["m000", "m001"]);
      for (const id of ids.slice(-12)) {
        await world.fail([id]);
        await world.second(60);
      }
      await world.fleet.edit("m029", { name: "Mill" });
      const { bad, failed } = await world.rollout();
      expect(failed).toBe(12);
      const named = ids.slice(-10).reverse();
      expect(bad.map(({ id }) => id)).toEqual(named);
      const on = { model: null, version: "1.0.0", firmware: null };
      expect(bad[0] as object).toEqual({ id: "m029", standing: "failed", name: "Mill", ...on });
      expect(await part("m000")).toEqual([{ ...rollout, standing: "proven" }]);
      expect(await part("m029")).toEqual([{ ...rollout, standing: "failed" }]);
      // Of one that is forgotten, the id is left.
      await world.fleet.forget("m029");
      const nothing = { name: null, model: null, version: null, firmware: null };
      const unknown = { id: "m029", standing: "failed", ...nothing };
      expect((await world.rollout()).bad[0] as object).toEqual(unknown);
      await world.fleet.changeRollout("1.0.1", null, "resume");
      expect(await world.rollout()).toMatchObject({ acknowledged: 12, bad: [] });
      expect(await part("m028")).toEqual([{ ...rollout, standing: "acknowledged" }]);
    });

    test("what its operator saw counts: what is another one now, is left as it is", async () => {
      await using world = await RolloutWorld.open(await place(), 3);
      const { id } = await world.start({ first: 3, tolerance: 0.9 });
      await world.allowAll();
      await world.second(3);
      const ids = await world.askAll();
      const change = (action: RolloutAction, seen: SeenRollout) =>
        failureOf(world.fleet.changeRollout("1.0.1", null, action, seen));
      await world.proveAll(ids.slice(0, 1));
      const { changed } = await world.rollout();
      await world.fail(ids.slice(1, 2));
      for (const action of ["resume", "advance"] as const) {
        expect(await change(action, { id, changed, wentBad: 0 })).toContain(
          "1 more device went bad on 1.0.1 since: look at it first",
        );
      }
      expect(await change("abort", { id: "other", changed, wentBad: 0 })).toContain(
        "another rollout of 1.0.1 was begun since: look at it first",
      );
      expect(await world.rollout()).toMatchObject({ failed: 1, acknowledged: 0, went_bad: 1 });
      // What stops it may be done in haste.
      world.time.pass(1000);
      const seen = { id, changed, wentBad: 0 };
      const paused = await world.fleet.changeRollout("1.0.1", null, "pause", seen);
      expect(paused!.state).toBe("paused");
      expect(await change("resume", { id, changed, wentBad: 1 })).toContain(
        "the rollout of 1.0.1 came to be paused since: look at it first",
      );
      const now = { id, changed: paused!.changed, wentBad: 1 };
      const resumed = await world.fleet.changeRollout("1.0.1", null, "resume", now);
      expect(resumed).toMatchObject({ state: "running", acknowledged: 1 });
      // Once: the second of two presses finds what the first one did.
      world.time.pass(1000);
      await world.fleet.changeRollout("1.0.1", null, "pause");
      expect(await change("resume", now)).toContain("came to be paused since");
      // One that came back and another one that went bad are not the same.
      await world.proveAll(ids.slice(1, 2));
      expect(await world.rollout()).toMatchObject({ went_bad: 1 });
    });

    test("halts when a device that was proven goes back", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      await world.proveAll(first);
      expect((await world.rollout()).proven).toBe(1);
      world.devices.set(first[0]!, "1.0.0");
      await world.report(first[0]!);
      await world.second();
      expect(await world.rollout()).toMatchObject({ state: "halted", proven: 0, failed: 1 });
    });

    test("halts when no place is free because the bad ones hold them all", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      await world.proveUntil(1);
      await world.fail(await world.askAll());
      const { state, reason } = await world.rollout();
      expect(state).toBe("halted");
      expect(reason).toBe("1 device bad (1 failed) in the only place beside 1 proven");
    });

    test("halts when more are bad than the tolerance explains", async () => {
      await using world = await RolloutWorld.open(await place(), 40);
      await world.start();
      await world.proveUntil(8);
      const next = await world.askAll();
      await world.fail(next.slice(0, 2));
      expect((await world.rollout()).state).toBe("running");
      await world.fail(next.slice(2, 3));
      expect((await world.rollout()).state).toBe("running");
      await world.fail(next.slice(3, 4));
      const { state, reason } = await world.rollout();
      expect(state).toBe("halted");
      const chance = Number((100 * binomialTail(4, 12, 0.05)).toPrecision(3));
      expect(chance).toBeLessThan(1);
      expect(reason).toBe(
        "4 of 12 devices bad (4 failed): more than a tolerance of 5 % explains " +
          `(a chance of ${chance} %)`,
      );
    });

    test("holds while the whole fleet is quiet, and finds who is silent when it is back", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      for (let minute = 0; minute < 300; minute++) {
        world.time.pass(60_000);
        await world.flush();
      }
      const held = await world.rollout();
      expect([held.state, held.reason]).toEqual(["running", "held: the fleet is quiet"]);
      await world.live(1 / 3, first);
      expect((await world.rollout()).reason).toBeNull();
      await world.live(1, first);
      expect((await world.rollout()).state).toBe("halted");
    });

    test("does not take a device for silent while no server was up", async () => {
      const url = await place();
      let first: string[];
      const root = new Temp(TREE);
      {
        await using world = await RolloutWorld.open(url, 10);
        await world.start();
        first = await world.askAll();
      }
      await using world = await RolloutWorld.open(url);
      world.time.now += 1000 * HOUR;
      await world.second(3);
      expect((await world.rollout()).state).toBe("running");
      expect(await world.ask(first[0]!)).toBe("1.0.1");
      root[Symbol.dispose]();
    });

    test("waits for the devices of a wave while too many of them are not heard", async () => {
      await using world = await RolloutWorld.open(await place(), 100);
      await world.allowAll();
      await world.start();
      for (const expected of [1, 1, 2, 4, 8]) expect(await world.round()).toHaveLength(expected);
      const gone = (await world.round(6)).slice(0, 6);
      for (const id of gone) world.devices.delete(id);
      await world.live(1 / 2);
      const { state, reason } = await world.rollout();
      expect([state, reason]).toEqual([
        ...["running", "held: 6 devices on the way must be heard first"],
      ]);
      expect(await world.round()).toEqual([]);
      await world.live(1);
      expect((await world.rollout()).state).toBe("halted");
    });

    test("goes in small waves once a device is bad, until few enough are shown to be", async () => {
      await using world = await RolloutWorld.open(await place(), 300);
      await world.allowAll();
      await world.start();
      for (const expected of [1, 1, 2, 4]) expect(await world.round()).toHaveLength(expected);
      const [gone] = await world.round(1);
      world.devices.delete(gone!);
      // One may be missed: it only keeps its place, until it is silent.
      expect(await world.round()).toHaveLength(14);
      await world.live(1.5);
      expect(await world.rollout()).toMatchObject({ state: "running", silent_devices: 1 });
      // Five more bad ones would halt it: so ten go. At one of 104, fewer than 5 % are bad for certain.
      const waves: number[] = [];
      while ((await world.rollout()).proven < 250) waves.push((await world.round()).length);
      expect(waves).toEqual([10, 12, 14, 18, 20, 102, 94]);
    });

    test("is bound to the release: another content halts it, and resume takes that", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      fs.writeFileSync(world.root.at("1.0.1/flash/main.py"), "other");
      await world.server.releases.scan();
      expect(await world.ask(first[0]!)).toBe("none");
      await world.second(2);
      const { state, reason } = await world.rollout();
      expect(state).toBe("halted");
      expect(reason).toBe("1.0.1 is no longer what it was: its content has changed");
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.second(2);
      expect(await world.ask(first[0]!)).toBe("1.0.1");
    });

    test("waits until the version is in the root", async () => {
      const { "1.0.0/flash/main.py": old } = TREE;
      await using world = await RolloutWorld.open(await place(), 5, {
        tree: { "1.0.0/flash/main.py": old },
      });
      await world.start();
      expect((await world.rollout()).state).toBe("waiting");
      fs.mkdirSync(world.root.at("1.0.1/flash"), { recursive: true });
      fs.writeFileSync(world.root.at("1.0.1/flash/main.py"), "two");
      await world.server.releases.scan();
      expect(await world.ask("m001")).toBe("none");
      await world.second(2);
      expect((await world.rollout()).state).toBe("running");
      expect(await world.askAll()).toHaveLength(1);
    });

    test("waits at --pause-at for resume, when all that have it are proven or bad", async () => {
      await using world = await RolloutWorld.open(await place(), 20);
      await world.start({ pauseAt: [0.15, 0.5] });
      await world.proveAll(await world.askAll());
      await world.proveAll(await world.askAll());
      // Two places are free, and one device is left to 15 %.
      const third = await world.askAll();
      expect(third).toHaveLength(1);
      expect((await world.rollout()).state).toBe("running");
      await world.proveAll(third);
      const { state, reason } = await world.rollout();
      expect([state, reason]).toEqual(["paused", "at 15 %: 3 of 20 proven, none bad"]);
      expect(await world.askAll()).toEqual([]);
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.second(2);
      expect(await world.askAll()).toHaveLength(3);
    });

    test("paused, offers nobody new; who was offered it is offered it again", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start({ first: 2 });
      const first = await world.askAll();
      await world.fleet.changeRollout("1.0.1", null, "pause");
      await world.second(2);
      await world.proveAll(first.slice(0, 1));
      expect(await world.rollout()).toMatchObject({ state: "paused", reason: "by the operator" });
      expect(await world.ask(first[1]!)).toBe("1.0.1");
      expect(await world.askAll()).toEqual([first[1]!]);
    });

    test("resumed, counts the bad ones so far no more, and gives their places free", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const [bad] = await world.askAll();
      await world.fail([bad!]);
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.second(2);
      expect(await world.rollout()).toMatchObject({ state: "running", failed: 0 });
      const next = (await world.askAll()).filter((id) => id !== bad);
      expect(next).toHaveLength(1);
      await world.fail(next);
      expect((await world.rollout()).state).toBe("halted");
    });

    test("aborted, goes to nobody any more; a later version passes it by", async () => {
      await using world = await RolloutWorld.open(await place(), 5);
      await world.start();
      const [first] = await world.askAll();
      await world.fleet.changeRollout("1.0.1", null, "abort");
      await world.second(2);
      expect(await world.ask(first!)).toBe("none");
      const failed = await failureOf(world.fleet.changeRollout("1.0.1", null, "resume"));
      expect(failed).toContain("the rollout of 1.0.1 is aborted");
      fs.mkdirSync(world.root.at("1.0.2/flash"), { recursive: true });
      fs.writeFileSync(world.root.at("1.0.2/flash/main.py"), "three");
      await world.server.releases.scan();
      expect(await world.ask(first!)).toBe("1.0.2");
      // The image of the aborted version is no way around.
      const url = `${world.server.url}manifest.json?devid=${first}&current_ver=1.0.0&firmware_ver=1.0.0`;
      expect(await (await fetch(url)).json()).not.toHaveProperty("firmware");
    });

    test("advanced, is for everyone that says who it is", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start({ pauseAt: [0.05] });
      await world.fleet.changeRollout("1.0.1", null, "advance");
      await world.second(2);
      for (const id of world.devices.keys()) expect(await world.ask(id)).toBe("1.0.1");
      expect(await world.ask("")).toBe("none");
      await world.proveAll([...world.devices.keys()]);
      expect((await world.rollout()).state).toBe("done");
    });

    test("several at once: each device gets the newest that it may have", async () => {
      const tree = { ...TREE, "1.0.2/flash/main.py": "three" };
      await using world = await RolloutWorld.open(await place(), 10, { tree });
      await world.start();
      await world.start({ version: "1.0.2" });
      const offered = new Set<string>();
      for (let i = 0; i < 14; i++) {
        for (const id of world.devices.keys()) {
          const to = await world.ask(id);
          if (to !== "none") offered.add(`${to} ${id}`);
        }
        world.time.pass(INTERVAL);
        await world.second();
        if ((await world.rollout()).state === "halted") break;
      }
      const versions = [...offered].map((text) => text.split(" ")[0]).toSorted();
      expect(versions).toEqual(["1.0.1", "1.0.2"]);
    });

    test("is not done because the clock was put forward, nor lost when it was put back", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      await world.proveUntil(2);
      const on = [...world.devices].filter(([, version]) => version === "1.0.1");
      for (const days of [60, -200, 5000]) {
        await world.live(1 / 3);
        world.time.now += days * 24 * HOUR;
        // Somebody who has it is the first that is heard.
        for (let i = 0; i < 2; i++) {
          world.time.pass(INTERVAL / 5);
          await world.report(on[0]![0]);
          await world.second();
        }
        expect(await world.rollout()).toMatchObject({ state: "running", proven: 2, eligible: 10 });
      }
      await world.proveUntil(10);
      expect((await world.rollout()).state).toBe("done");
    });

    test("knows who was known before, also where the clock was put back before it began", async () => {
      for (const hours of [24, 1000]) {
        await using world = await RolloutWorld.open(await place(), 10);
        world.time.now -= hours * HOUR;
        expect((await world.start()).eligible).toBe(10);
        await world.fail(await world.askAll());
        expect(await world.rollout()).toMatchObject({ state: "halted", failed: 1 });
      }
    });

    test("only goes to devices that have a label, a model, a version", async () => {
      await using world = await RolloutWorld.open(await place(), 12);
      await world.report("m001", { model: "GPy" });
      world.devices.set("m002", "0.9");
      await world.ask("m002");
      await world.flush();
      await world.fleet.edit("m000", { labels: { where: "lab" } });
      await world.fleet.edit("m003", { labels: { where: "attic" } });
      for (const [only, expected] of [
        [[["where", "lab"]], ["m000"]],
        [[["model", "gpy"]], ["m001"]],
        [[["version", "0.9"]], ["m002"]],
        [
          [
            ["where", "lab"],
            ["where", "attic"],
          ],
          ["m000", "m003"],
        ],
        [
          [
            ["where", "lab"],
            ["model", "gpy"],
          ],
          [],
        ],
      ] as [[string, string][], string[]][]) {
        const targets = await world.fleet.rolloutTargets({ ...OPTIONS, only });
        expect(targets.reduce((sum, { devices }) => sum + devices, 0)).toBe(expected.length);
        await world.start({ first: 9, only });
        expect((await world.rollout()).eligible).toBe(expected.length);
        const offered: string[] = [];
        for (let i = 0; i < 8; i++) {
          for (const id of world.devices.keys()) {
            const model: Record<string, string> = id === "m001" ? { model: "GPy" } : {};
            if ((await world.ask(id, model)) === "1.0.1" && !offered.includes(id)) offered.push(id);
          }
          await world.live(1 / 6);
          if (i > 0 && offered.length === expected.length) break;
        }
        expect(offered).toEqual(expected);
        await world.fleet.changeRollout("1.0.1", null, "abort");
        await world.second();
      }
    });

    test("only for some, is not for the others when it is done", async () => {
      await using world = await RolloutWorld.open(await place(), 5);
      await world.fleet.edit("m003", { labels: { pilot: "1" } });
      await world.start({ only: [["pilot", "1"]] });
      expect(await world.askAll()).toEqual(["m003"]);
      await world.proveAll(["m003"]);
      expect((await world.rollout()).state).toBe("done");
      await world.second();
      expect(await world.ask("m001")).toBe("none");
      await world.start();
      await world.second();
      expect(await world.askAll()).toHaveLength(1);
    });

    test("a canary needs no number, but a place", async () => {
      await using world = await RolloutWorld.open(await place(), 200);
      await world.fleet.edit("m150", { labels: { canary: "yes" } });
      await world.start();
      expect(await world.ask("m150")).toBe("1.0.1");
      await world.fleet.edit("m151", { labels: { canary: "yes" } });
      await world.second();
      expect(await world.ask("m151")).toBe("none");
      await world.proveAll(["m150"]);
      await world.live(1 / 2);
      expect(await world.ask("m151")).toBe("1.0.1");
    });

    test("the first one has a number below the share, which doubles with each interval", async () => {
      await using world = await RolloutWorld.open(await place(), 60);
      const { id } = await world.start();
      let share = 2 / 60;
      for (let intervals = 0; intervals < 6; intervals++) {
        const next = [...world.devices.keys()].filter((one) => rolloutNumber(id, one) < share);
        const found: string[] = [];
        for (const one of world.devices.keys()) {
          if ((await world.ask(one)) === "1.0.1") found.push(one);
        }
        if (next.length > 0) return expect(found).toEqual(next.slice(0, 1));
        expect(found).toEqual([]);
        await world.live(1 / 6);
        share *= 2;
      }
      throw new Error("nobody was next");
    });

    test("a report, a device without an id and a window that is closed get no place", async () => {
      await using world = await RolloutWorld.open(await place(), 1);
      world.time.now = Date.UTC(2023, 10, 15, 12);
      await world.start({ window: "01:00-04:00" });
      await world.live(1);
      expect(await world.ask("m000")).toBe("none");
      world.time.now = Date.UTC(2023, 10, 16, 2);
      await world.report("m000");
      expect(await world.ask("")).toBe("none");
      expect((await world.rollout()).offered).toBe(0);
      expect(await world.ask("m000")).toBe("1.0.1");
      world.time.now = Date.UTC(2023, 10, 16, 5);
      expect(await world.ask("m000")).toBe("1.0.1");
    });

    test("devices that were not known before, or made up, get it when it is done", async () => {
      await using world = await RolloutWorld.open(await place(), 3);
      await world.start();
      for (let i = 0; i < 40; i++) {
        expect(await world.ask(`stranger-${i}`)).toBe("none");
        await world.live(1 / 6);
      }
      expect(await world.rollout()).toMatchObject({ offered: 0, eligible: 3, state: "running" });
      while ((await world.rollout()).state !== "done") await world.proveAll(await world.askAll());
      expect(await world.ask("stranger-0")).toBe("1.0.1");
    });

    test("nobody is forgotten by a server that was off for long, or a clock that jumped", async () => {
      await using world = await RolloutWorld.open(await place(), 40);
      await world.start();
      const first = await world.askAll();
      await world.proveAll(first);
      world.time.now += 400 * 24 * HOUR;
      await world.report(first[0]!);
      await world.second(3);
      expect(await world.rollout()).toMatchObject({ state: "running", eligible: 40, proven: 1 });
      // One that is not heard either for as long as the server is up is no longer waited for.
      const lost = [...world.devices.keys()].find((id) => id !== first[0])!;
      world.devices.delete(lost);
      await world.live(5);
      expect(await world.rollout()).toMatchObject({ state: "running", eligible: 39 });
    });

    test("resumed with other content, begins with one device again", async () => {
      await using world = await RolloutWorld.open(await place(), 40);
      await world.allowAll();
      await world.start();
      for (const expected of [1, 1, 2, 4]) expect(await world.round()).toHaveLength(expected);
      fs.writeFileSync(world.root.at("1.0.1/flash/main.py"), "other");
      await world.server.releases.scan();
      await world.second(2);
      expect((await world.rollout()).state).toBe("halted");
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.second(3);
      expect(await world.rollout()).toMatchObject({ state: "running", proven: 0, eligible: 32 });
      for (const expected of [1, 1, 2]) expect(await world.round()).toHaveLength(expected);
    });

    test("opened to everyone and halted, goes slowly again when it is resumed", async () => {
      await using world = await RolloutWorld.open(await place(), 40);
      await world.start();
      await world.proveAll(await world.askAll());
      await world.fleet.changeRollout("1.0.1", null, "advance");
      await world.second(2);
      const bad = [...world.devices].filter(([, on]) => on === "1.0.0").slice(0, 5);
      for (const [id] of bad) await world.ask(id);
      await world.fail(bad.map(([id]) => id));
      expect((await world.rollout()).state).toBe("halted");
      expect(world.warnings.at(-1)).toContain(
        "the rollout of 1.0.1 halted: 5 of 6 devices bad (5 failed)",
      );
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.second(2);
      const asked = (await world.askAll()).filter((id) => !bad.some(([one]) => one === id));
      expect(asked).toHaveLength(1);
    });

    test("a device that is on a later version proves nothing of this one", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      await world.proveAll(first, "1.0.2");
      expect(await world.rollout()).toMatchObject({ state: "running", proven: 0, offered: 0 });
    });

    test("a running one whose last devices are bad says so, and is done when that is resumed", async () => {
      await using world = await RolloutWorld.open(await place(), 30);
      await world.start();
      await world.proveUntil(15);
      const bad = (await world.askAll()).slice(0, 1);
      await world.fail(bad);
      await world.proveAll((await world.askAll()).filter((id) => !bad.includes(id)));
      await world.proveUntil(29);
      await world.live(1 / 6);
      const { state, reason } = await world.rollout();
      expect([state, reason]).toEqual([
        ...["running", "held: only bad devices are left; resume acknowledges them"],
      ]);
      await world.fleet.changeRollout("1.0.1", null, "resume");
      await world.live(1 / 6);
      expect((await world.rollout()).state).toBe("done");
    });

    test("a device that the operator forgets is not missed", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const first = await world.askAll();
      for (const id of first) {
        world.devices.delete(id);
        await world.fleet.forget(id);
      }
      await world.live(3);
      expect(await world.rollout()).toMatchObject({
        state: "running",
        silent_devices: 0,
        offered: 0,
      });
    });

    test("a device that asks thrice in a moment has not failed yet", async () => {
      await using world = await RolloutWorld.open(await place(), 10);
      await world.start();
      const [first] = await world.askAll();
      await world.proveAll([first!]);
      let next: string | undefined;
      for (let interval = 0; next === undefined; interval++) {
        for (const [id, on] of world.devices) {
          if (on === "1.0.0" && (await world.ask(id)) === "1.0.1") next = id;
        }
        if (next === undefined) await world.live(1 / 6);
      }
      for (let i = 0; i < 4; i++) {
        await world.ask(next);
        await world.second();
      }
      expect((await world.rollout()).failed).toBe(0);
      await world.live(1 / 6);
      await world.ask(next);
      await world.second();
      expect((await world.rollout()).failed).toBe(1);
    });

    test("a version for a model leaves others alone, and the other way round", async () => {
      const tree = { ...TREE, "lopy4/1.0.0/a": "1", "lopy4/1.0.1/a": "2", "gpy/1.0.0/a": "1" };
      await using world = await RolloutWorld.open(await place(), 0, { tree });
      for (const id of ["a", "b"]) await world.report(id, { model: "LoPy4" });
      await world.report("c");
      await world.report("d", { model: "GPy" });
      await world.second();
      expect((await world.start({ model: "LOPY4" })).eligible).toBe(2);
      expect(await world.ask("c")).toBe("1.0.1");
      const both = await Promise.all(["a", "b"].map((id) => world.ask(id, { model: "LoPy4" })));
      expect(both.toSorted()).toEqual(["1.0.1", "none"]);
      await world.second();
      expect(await failureOf(world.start({ model: "lopy4" }))).toContain("is running already");
      expect((await world.start()).eligible).toBe(1);
    });

    test("of firmware alone, counts who has flashed it", async () => {
      const tree = { "firmware_1.0.0.bin": "one", "firmware_1.0.1.bin": "two" };
      await using world = await RolloutWorld.open(await place(), 0, { tree });
      const ids = ["a", "b", "c"];
      const flashed = new Map(ids.map((id) => [id, "1.0.0"]));
      const ask = async (id: string) => {
        const query = new URLSearchParams({
          devid: id,
          current_ver: "",
          firmware_ver: flashed.get(id)!,
        });
        const answer = await fetch(`${world.server.url}manifest.json?${query}`);
        return ((await answer.json()) as { firmware?: unknown } | null)?.firmware !== undefined;
      };
      // They say what they run before there is a rollout of it.
      for (const id of ids) {
        const query = new URLSearchParams({ devid: id, current_ver: "", firmware_ver: "1.0.0" });
        await fetch(`${world.server.url}manifest.json?${query}`, { method: "HEAD" });
      }
      await world.second();
      // It may be that nobody's number is low enough yet: a canary needs none.
      await world.fleet.edit("b", { labels: { canary: "yes" } });
      await world.start();
      const first: string[] = [];
      for (const id of ids) if (await ask(id)) first.push(id);
      expect(first).toHaveLength(1);
      flashed.set(first[0]!, "1.0.1");
      await ask(first[0]!);
      await world.second();
      expect(await world.rollout()).toMatchObject({ proven: 1, eligible: 3, state: "running" });
    });

    test("goes on after fleet merge, and a halt anywhere wins", async () => {
      const other = stores.temp.at(`${crypto.randomUUID()}.db`);
      let bad: string[];
      {
        await using world = await RolloutWorld.open(other, 4);
        await world.start();
        bad = await world.askAll();
        await world.fail(bad);
        expect((await world.rollout()).state).toBe("halted");
      }
      await using world = await RolloutWorld.open(await place(), 4);
      await world.start();
      await world.proveUntil(1);
      await world.fleet.merge(other);
      await world.second();
      const { state, reason } = await world.rollout();
      expect(state).toBe("halted");
      expect(reason).toBe("elsewhere: 1 device bad (1 failed), and none is proven");
      expect(await world.askAll()).toEqual([]);
      const before = await world.rollout();
      await world.fleet.merge(other);
      expect(await world.rollout()).toEqual(before);
      // A fleet that knew nothing of it knows it then.
      await using third = await RolloutWorld.open(await place());
      await third.fleet.merge(other);
      await third.second();
      expect(await third.rollout()).toMatchObject({ state: "halted", failed: 1 });
      expect(await third.ask(bad[0]!)).toBe("none");
    });

    describe("leaves out what another store has that no rollout writes", () => {
      const sound = stores.temp.at(`${crypto.randomUUID()}.db`);
      beforeAll(async () => {
        await using world = await RolloutWorld.open(sound, 4);
        await world.start({ first: 3, only: [["version", "1.0.0"]], window: "00:00-24:00" });
        expect(await world.askAll()).toHaveLength(3);
      });
      /** A store with a rollout that three devices were offered, but for some changes. */
      const damaged = async (...changes: string[]) => {
        const file = stores.temp.at(`${crypto.randomUUID()}.db`);
        fs.copyFileSync(sound, file);
        for (const text of changes) await stores.sqlite.query(file, text);
        return file;
      };
      /** Puts a table in the place of another one that heeds none of our rules. */
      const remade = (...changes: string[]) => [
        "CREATE TABLE free AS SELECT * FROM ota_rollout_devices",
        ...changes,
        "DROP TABLE ota_rollout_devices",
        "ALTER TABLE free RENAME TO ota_rollout_devices",
      ];
      const set = (name: string, value: string) =>
        `UPDATE ota_rollouts SET options = json_set(options, '$.${name}', ${value})`;
      const progress = (name: string, value: string) =>
        `UPDATE ota_rollouts SET progress = json_set(progress, '$.${name}', ${value})`;

      test("a rollout, with its devices", async () => {
        await using world = await RolloutWorld.open(await place(), 6);
        await world.start();
        await world.proveUntil(1);
        const before = await world.rollout();
        for (const change of [
          ...[set("first", "-1"), set("first", "'1'"), set("first", "1e300"), set("soak", "-5")],
          ...[set("silent", "0"), set("tolerance", "2"), set("tolerance", "null")],
          ...[set("pauseAt", "json('[0.5,0.1]')"), set("pauseAt", "json('{}')")],
          ...[set("only", `json('[["site"]]')`), set("only", `json('[["site",""]]')`)],
          ...[set("window", "'sometimes'"), set("window", "1"), set("version", "'../x'")],
          ...[set("model", "''"), "UPDATE ota_rollouts SET options = '{\"first\": NaN}'"],
          "UPDATE ota_rollouts SET options = json_remove(options, '$.silent')",
          ...[progress("pauses", "-1"), progress("pauses", "99"), progress("pauses", "'0'")],
          ...[progress("eligible", "1e300"), progress("eligible", "-4")],
          ...[progress("isOpen", "'yes'"), "UPDATE ota_rollouts SET progress = 'null'"],
          "UPDATE ota_rollouts SET state = 'open'",
          "UPDATE ota_rollouts SET created = 'noon'",
          "UPDATE ota_rollouts SET created = 9007199254740991",
          "UPDATE ota_rollouts SET changed = -1",
          "UPDATE ota_rollouts SET digest = 'none'",
          "UPDATE ota_rollouts SET digest = '+'",
          "UPDATE ota_rollouts SET reason = 'bad' || char(27)",
          "UPDATE ota_rollouts SET id = id || '!'",
        ]) {
          const { refused } = await world.fleet.merge(await damaged(change));
          expect([change, refused]).toEqual([change, 4]);
        }
        expect(await world.rollout()).toEqual(before);
        expect(await world.fleet.rollouts()).toHaveLength(1);
        expect(await world.askAll()).toHaveLength(1);
        expect(world.warnings).toEqual([]);
      });

      test.each([
        "standing = 'dead'",
        "standing = NULL",
        "on_up = 'soon'",
        "offered_up = 1e300",
        "heard = -1",
        "device = device || char(10)",
        "device = upper(device)",
        "rollout = 'another one'",
      ])("a device of it, of which %p", async (change) => {
        const one = "WHERE device = (SELECT MIN(device) FROM free)";
        const file = await damaged(...remade(`UPDATE free SET ${change} ${one}`));
        await using world = await RolloutWorld.open(await place());
        expect((await world.fleet.merge(file)).refused).toBe(1);
        await world.second();
        expect(await world.rollout()).toMatchObject({ state: "running", offered: 2 });
      });

      test("a device that is there twice, once", async () => {
        const twice = "INSERT INTO free SELECT * FROM ota_rollout_devices";
        const file = await damaged(...remade(twice));
        await using world = await RolloutWorld.open(await place());
        expect((await world.fleet.merge(file)).refused).toBe(3);
        await world.second();
        expect(await world.rollout()).toMatchObject({ state: "running", offered: 3 });
      });

      test("times that are yet to come: what is on the version since then is since now", async () => {
        const file = await damaged(
          "UPDATE ota_rollout_devices SET on_up = 8000000000000000, offered_up = 8000000000000000",
        );
        await using world = await RolloutWorld.open(await place());
        await world.fleet.merge(file);
        const devices = await world.fleet.devices();
        for (const { id } of devices.devices) world.devices.set(id, "1.0.1");
        await world.second();
        await world.live(1 / 6);
        expect((await world.rollout()).proven).toBe(3);
      });

      test("but takes what is as it should be", async () => {
        await using world = await RolloutWorld.open(await place());
        expect((await world.fleet.merge(await damaged())).refused).toBe(0);
        expect(await world.rollout()).toMatchObject({ state: "running", offered: 3, first: 3 });
      });
    });

    test("is remembered by a server that starts again", async () => {
      const url = await place();
      const root = new Temp(TREE);
      let first: string[];
      {
        await using world = await RolloutWorld.open(url, 8);
        await world.start();
        first = await world.askAll();
      }
      await using world = await RolloutWorld.open(url);
      for (let i = 0; i < 8; i++) {
        const id = `m00${i}`;
        expect(await world.ask(id)).toBe(first.includes(id) ? "1.0.1" : "none");
      }
      root[Symbol.dispose]();
    });

    test("what cannot be, is refused", async () => {
      await using world = await RolloutWorld.open(await place());
      for (const wrong of [
        ...[{ version: "../x" }, { first: 0 }, { first: 1.5 }, { soak: -1 }, { silent: 0 }],
        ...[{ tolerance: 0 }, { tolerance: 1 }, { pauseAt: [0.5, 0.1] }, { pauseAt: [1.5] }],
        ...[{ only: [["a", ""]] as [string, string][] }, { window: "sometimes" }, { model: "" }],
      ]) {
        const failed = await failureOf(world.fleet.startRollout({ ...OPTIONS, ...wrong }));
        expect(failed).toMatch(/^OTAError: (a rollout expects|a window is) /);
      }
      expect(await world.fleet.rollouts()).toEqual([]);
      expect(await world.fleet.changeRollout("1.0.1", null, "pause")).toBeUndefined();
    });
  });
}

/** The tests of several servers on one store of a kind. */
function testSeveral({ name, place, lock }: StoreKind): void {
  describe(`several servers on one store in ${name}`, () => {
    test("never give more places away than there are, and all of them in the end", async () => {
      const random = new Random(seeded("rollouts, several servers"));
      const url = await place();
      await using one = await RolloutWorld.open(url, 60);
      await using two = await RolloutWorld.open(url, 0, { beside: one });
      const servers = [one, two];
      await one.start({ silent: 1e8 });
      const on = new Set<string>();
      const offered = new Set<string>();
      const gave = [0, 0];
      /** When a server wrote last: it always gets through to the store within twenty seconds. */
      const wrote = [0, 0];
      /** Offers that are not written yet: installing takes longer than that. */
      const fresh = servers.map(() => new Set<string>());
      const ids = [...one.devices.keys()];
      for (let step = 0; step < 4000 && on.size < ids.length; step++) {
        one.time.pass(random.below(4000) + 1);
        const which = random.below(2);
        const world = servers[which]!;
        for (const [i, server] of servers.entries()) {
          const isLate = one.time.elapsed - wrote[i]! > 16_000;
          if (!isLate && !random.chance(0.4)) continue;
          await server.flush();
          fresh[i]!.clear();
          wrote[i] = one.time.elapsed;
        }
        for (let asks = random.below(6); asks > 0; asks--) {
          const id = random.pick(ids);
          if (on.has(id)) continue;
          const isWritten = fresh.every((some) => !some.has(id));
          if (offered.has(id) && !isWritten) continue;
          // Who is offered it three times without getting there has failed.
          if (offered.has(id)) {
            world.devices.set(id, "1.0.1");
            await world.report(id);
            on.add(id);
          } else if ((await world.ask(id)) === "1.0.1" && !offered.has(id)) {
            offered.add(id);
            fresh[which]!.add(id);
            gave[which]!++;
          }
          // What the store counts as proven has been on it, so that this is the weaker bound.
          expect(offered.size - on.size).toBeLessThanOrEqual(Math.max(1, on.size));
        }
      }
      expect(on.size).toBe(ids.length);
      expect(gave.every((count) => count > 0)).toBe(true);
      one.time.pass(120_000);
      for (const world of [...servers, ...servers]) await world.second();
      expect(await one.rollout()).toMatchObject({ state: "done", proven: ids.length });
    });

    test("one that is asked takes over from one that has vanished", async () => {
      const url = await place();
      await using gone = await RolloutWorld.open(url, 10);
      await gone.start();
      const first = await gone.askAll();
      await gone.proveAll(first);
      await using world = await RolloutWorld.open(url, 0, { beside: gone });
      for (const [id, version] of gone.devices) world.devices.set(id, version);
      const asked = async () => {
        const found: string[] = [];
        for (const [id, on] of world.devices) {
          if (on === "1.0.0" && (await world.ask(id)) === "1.0.1") found.push(id);
        }
        return found;
      };
      await world.second(20);
      expect(await asked()).toEqual([]);
      await world.second(20);
      world.time.pass(6 * INTERVAL);
      await world.second();
      expect(await asked()).toHaveLength(1);
    });

    test("one that stops leaves the places to the others at once", async () => {
      const url = await place();
      const one = await RolloutWorld.open(url, 10);
      await using two = await RolloutWorld.open(url, 0, { time: one.time });
      await one.start({ first: 3 });
      expect(await one.askAll()).toHaveLength(3);
      await one[Symbol.asyncDispose]();
      two.time.pass(5 * INTERVAL);
      await two.second(2);
      for (const id of one.devices.keys()) two.devices.set(id, "1.0.0");
      expect(await two.askAll()).toHaveLength(3);
      expect((await two.rollout()).offered).toBe(3);
    });

    test("what one is told, the other does", async () => {
      const url = await place();
      await using one = await RolloutWorld.open(url, 6);
      await using two = await RolloutWorld.open(url, 0, { beside: one });
      await one.start();
      await two.second();
      const first = await one.askAll();
      await two.second();
      expect(await two.ask(first[0]!)).toBe("1.0.1");
      await two.fleet.changeRollout("1.0.1", null, "abort");
      await one.second();
      expect(await one.ask(first[0]!)).toBe("none");
    });

    test("while the store is away, what was known last stands, and nobody new is admitted", async () => {
      const url = await place();
      await using world = await RolloutWorld.open(url, 20);
      await world.start({ first: 10 });
      const ids = [...world.devices.keys()];
      let first: string | undefined;
      for (let i = 0; first === undefined; i++) {
        const id = ids[i % ids.length]!;
        if ((await world.ask(id)) === "1.0.1") first = id;
        if (i % 20 === 19) await world.live(1 / 6);
      }
      const held = await lock(url);
      world.time.pass(6000);
      for (const id of ids) expect(await world.ask(id)).toBe(id === first ? "1.0.1" : "none");
      await held.release();
      await world.second();
      expect((await world.rollout()).offered).toBe(1);
      expect((await world.askAll()).length).toBe(10);
    });

    test("kill -9 loses at most the last second", async () => {
      using root = new Temp(TREE);
      const url = await place();
      const args = ["--root", root.path, "--fleet", url];
      const ask = async (server: Serving, id: string, version = "1.0.0") => {
        const query = `devid=${id}&current_ver=${version}`;
        const answer = await fetch(`${server.url}/manifest.json?${query}`);
        return ((await answer.json()) as { version: string } | null)?.version ?? "none";
      };
      const ids = ["a", "b", "c", "d"];
      let first = "";
      {
        await using server = await Serving.start([...args]);
        for (const id of ids) await ask(server, id, "1.0.1");
        // They are known, and older than what comes now.
        for (const path of ["1.0.2/flash/main.py"]) {
          fs.mkdirSync(root.at("1.0.2/flash"), { recursive: true });
          fs.writeFileSync(root.at(path), "three");
        }
        await using fleet = await Fleet.open({ url, existing: true });
        await until("all are known", () => fleet.device("d"), Boolean);
        await fleet.edit("b", { labels: { canary: "yes" } });
        await fleet.startRollout({ ...OPTIONS, version: "1.0.2", first: 1 });
        const running = async () => (await fleet.rollouts())[0]!;
        await until("it runs", running, ({ state }) => state === "running");
        const offered = async () => {
          for (const id of first === "" ? ids : []) {
            if ((await ask(server, id, "1.0.1")) === "1.0.2") first = id;
          }
          return (await running()).offered === 1;
        };
        await eventually("one has a place", offered);
        server.kill("SIGKILL");
        await server.ended;
      }
      await using server = await Serving.start(args);
      for (const id of ids) {
        expect(await ask(server, id, "1.0.1")).toBe(id === first ? "1.0.2" : "none");
      }
    });
  });
}
