/** Rollouts, in SQLite: who may have a version, and when that ends. */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import * as fs from "node:fs";
import { binomialTail, Fleet, rolloutNumber, serve } from "../ota.ts";
import { failureOf, Stores } from "./helpers/fleet.ts";
import { RolloutWorld, TREE } from "./helpers/rollout.ts";
import { testRollouts } from "./helpers/rollout-tests.ts";
import { Temp } from "./helpers/temp.ts";

setDefaultTimeout(600_000);

const stores = Stores.ofSQLite();
afterAll(() => stores[Symbol.asyncDispose]());

describe("the rules", () => {
  test("a device's number is what anyone can work out", () => {
    const digest = new Bun.CryptoHasher("sha256").update("ota-rollout-1\0r\0m1").digest("hex");
    const bits = BigInt(`0x${digest}`) >> 203n;
    expect(rolloutNumber("r", "m1")).toBe(Number(bits) / 2 ** 53);
    const numbers = Array.from({ length: 1000 }, (_, i) => rolloutNumber("r", `m${i}`));
    expect(numbers.every((number) => number >= 0 && number < 1)).toBe(true);
    expect(numbers.filter((number) => number < 0.5).length).toBeWithin(400, 600);
  });

  test("the tail of the binomial distribution is exact", () => {
    /** With fractions of whole numbers, for a chance of so many percent. */
    const exact = (k: number, n: number, percent: bigint) => {
      let [sum, choose] = [0n, 1n];
      for (let i = 0; i <= n; i++) {
        if (i >= k) sum += choose * percent ** BigInt(i) * (100n - percent) ** BigInt(n - i);
        choose = (choose * BigInt(n - i)) / BigInt(i + 1);
      }
      return Number((sum * 10n ** 30n) / 100n ** BigInt(n)) / 1e30;
    };
    for (const percent of [1n, 5n, 50n, 95n]) {
      for (const n of [1, 2, 3, 7, 20, 101, 500]) {
        for (const k of [0, 1, 2, 3, n >> 1, n - 1, n]) {
          const found = binomialTail(k, n, Number(percent) / 100);
          expect(Math.abs(found - exact(k, n, percent))).toBeLessThan(1e-12);
        }
      }
    }
    expect(binomialTail(50_000, 1_000_000, 0.05)).toBeCloseTo(0.5, 2);
    expect(binomialTail(0, 0, 0.05)).toBe(1);
    expect(binomialTail(3, 2, 0.05)).toBe(0);
  });
});

testRollouts(stores, stores.sqlite);

describe("a SQLite file that is removed while a rollout is under way", () => {
  const removed = async (state: "running" | "halted" | "aborted" | "waiting") => {
    const url = await stores.sqlite.place();
    const tree = state === "waiting" ? { "1.0.0/flash/main.py": "one" } : TREE;
    const world = await RolloutWorld.open(url, 10, { tree });
    await world.start({ first: 2, only: [["version", "1.0.0"]] });
    const first = state === "waiting" ? [] : await world.askAll();
    if (state === "halted") await world.fail(first);
    if (state === "aborted") await world.fleet.changeRollout("1.0.1", null, "abort");
    if (state === "aborted") await world.second();
    expect((await world.rollout()).state).toBe(state);
    const { id } = await world.rollout();
    for (const end of ["", "-wal", "-shm"]) fs.rmSync(url + end, { force: true });
    expect(await failureOf(world.flush())).toContain("its file was removed or replaced");
    await world.second(2);
    return { world, first, id };
  };

  test.each(["running", "halted"] as const)("when it is %s, has it halted", async (state) => {
    const { world, first, id } = await removed(state);
    await using _ = world;
    const found = await world.rollout();
    expect(found).toMatchObject({ id, state: "halted", first: 2, only: [["version", "1.0.0"]] });
    expect(found.reason).toBe("the fleet's store is another one: who has 1.0.1 is not known");
    for (const device of world.devices.keys()) expect(await world.ask(device)).toBe("none");
    // The operator says to go on: it begins anew.
    await world.fleet.changeRollout("1.0.1", null, "resume");
    await world.live(1);
    expect(await world.rollout()).toMatchObject({ state: "running", eligible: 10 });
    expect(await world.askAll()).toHaveLength(2);
    expect(first).toHaveLength(2);
  });

  test.each(["aborted", "waiting"] as const)("when it is %s, has it so", async (state) => {
    const { world, id } = await removed(state);
    await using _ = world;
    expect(await world.rollout()).toMatchObject({ id, state });
    expect(await world.ask("m001")).toBe("none");
  });
});

test("a server whose store was never read moves no device to another version", async () => {
  using root = new Temp(TREE);
  const fleet = "postgres://nobody@127.0.0.1:1/none";
  await using server = await serve({ root: root.path, port: 0, host: "127.0.0.1", fleet });
  const ask = async (query: string) =>
    (await (await fetch(`${server.url}manifest.json?${query}`)).json()) as {
      version: string;
    } | null;
  expect(await ask("devid=a&current_ver=1.0.0")).toBeNull();
  expect(await ask("devid=a&current_ver=")).toBeNull();
  expect(await ask(`devid=a&current_ver=1.0.0&base=${"0".repeat(64)}`)).toMatchObject({
    version: "1.0.0",
  });
});

test("without a fleet there are no rollouts", async () => {
  using root = new Temp(TREE);
  await using server = await serve({ root: root.path, port: 0, host: "127.0.0.1" });
  const answer = await fetch(`${server.url}manifest.json?devid=a&current_ver=1.0.0`);
  expect(await answer.json()).toMatchObject({ version: "1.0.1" });
  expect(Fleet).toBeDefined();
});
