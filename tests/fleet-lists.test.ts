/**
 * Lists and searches of a fleet, page by page, beside a filter over all devices. Set SEED to repeat
 * a run.
 */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { DEVICE_STATES, type DeviceFilter, type DevicePage, type FleetDevice } from "../ota.ts";
import { FleetWorld, HOUR, Stores } from "./helpers/fleet.ts";
import { Random, seeded } from "./helpers/random.ts";

const SEED = seeded("fleet-lists");
setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

const MODELS = ["FiPy", "LoPy4", "Wi_Py %2"];
const VERSIONS = ["1.0.0", "1.0.1", "1.0.2", "1.0.3"];
/** More than are looked at first, and than are put in order by themselves. */
const DEVICES = 6500;
/** More versions than cohorts are named. */
const RARE = 600;

/** Fills a store; the same seed fills each one alike. @returns all that is in it */
async function fill(world: FleetWorld, random: Random): Promise<FleetDevice[]> {
  world.newest = { version: VERSIONS.at(-1)!, firmware: null };
  const ids = new Set<string>();
  const say = (i: number, version: string, share: number) => {
    // Now and then one that has no id.
    const isNamed = !random.chance(0.01);
    const id = `${random.pick(["a", "b", "dé"])}${random.below(2 ** 24).toString(16)}`;
    if (isNamed) ids.add(id);
    const address = `10.${share}.${i >> 8}.${i & 255}`;
    const query = { ...(random.chance(0.95) && { sysname: random.pick(MODELS) }) };
    const to = random.chance(share / 10) ? world.newest.version : null;
    const failed = to !== null && random.chance(0.3) ? { failed: to } : undefined;
    world.say(isNamed ? id : "", version, { to, address, query: { ...query, ...failed } });
  };
  for (let i = 0; i < RARE; i++) say(i, `0.${i % 7}.${i}`, 0);
  for (let i = 0; i < DEVICES / 10; i++) say(i, random.pick(VERSIONS.slice(0, -1)), 9);
  await world.fleet.flush();
  world.pass(2 * HOUR);
  for (let i = 0; i < DEVICES; i++) {
    say(i, random.chance(0.85) ? VERSIONS.at(-1)! : random.pick(VERSIONS), 1);
  }
  await world.fleet.flush();
  for (const [i, id] of random.some([...ids], 60).entries()) {
    const labels = { site: random.pick(["north", "south"]), row: `${i}` };
    await world.fleet.edit(id, { name: `${random.pick(["Mill", "PUMP É"])} ${i}`, labels });
  }
  return await everyPage((after) => world.fleet.devices({ limit: 1000, ...after }), Infinity);
}

/** The devices of some pages, from the first one on. */
async function everyPage(
  page: (after: { after?: string }) => Promise<DevicePage>,
  most: number,
  first?: string,
): Promise<FleetDevice[]> {
  const found: FleetDevice[] = [];
  for (let after = first, pages = 0; pages < most; pages++) {
    const { devices, next } = await page(after === undefined ? {} : { after });
    found.push(...devices);
    if (next === null) break;
    after = next;
  }
  return found;
}

const lower = (text: string) => text.replace(/[A-Z]/g, (letter) => letter.toLowerCase());

/** Whether a filter takes a device. */
function takes({ state, version, model, label, q }: DeviceFilter, device: FleetDevice): boolean {
  // Of a name, other letters than A to Z are as they are written.
  const has = (texts: (string | null)[], part: string) => {
    return texts.some((text) => lower(text ?? "").includes(part));
  };
  return (
    (state === undefined || device.state === state) &&
    (version === undefined || device.version === version) &&
    (model === undefined || lower(device.model ?? "") === lower(model)) &&
    (label === undefined || device.labels[label[0]] === label[1]) &&
    (q === undefined ||
      has([device.id, device.address], q.toLowerCase()) ||
      has([device.name, device.model], lower(q)))
  );
}

/** A part of what some device says, in any case; or what none does. */
function searchOf(random: Random, devices: readonly FleetDevice[]): string {
  const { id, address, name, model } = random.pick(devices);
  const text = random.pick([id, address, name, model, "10.1.", "none such"]) ?? "%";
  const begin = random.below(text.length);
  const part = text.slice(begin, begin + 1 + random.below(text.length - begin));
  return random.chance(0.3) ? part.replace(/[a-z]/g, (letter) => letter.toUpperCase()) : part;
}

function filterOf(random: Random, devices: readonly FleetDevice[]): DeviceFilter {
  const { version, model } = random.pick(devices);
  return {
    ...(random.chance(0.3) && { state: random.pick(DEVICE_STATES) }),
    ...(random.chance(0.2) && version !== null && { version }),
    ...(random.chance(0.2) && model !== null && { model: random.pick([model, lower(model)]) }),
    ...(random.chance(0.1) && { label: ["site", random.pick(["north", "west"])] as const }),
    ...(random.chance(0.6) && { q: searchOf(random, devices) }),
  } as DeviceFilter;
}

describe.each(stores.each)("lists in %s", (_, { place }) => {
  test("are what a filter takes of all devices, from anywhere on", async () => {
    const random = new Random(SEED);
    await using world = await FleetWorld.open(await place(), { silent: 3600 });
    const { fleet } = world;
    const all = await fill(world, random);
    expect(all.length).toBeGreaterThan(DEVICES);
    expect(new Set(all.map(({ state }) => state)).size).toBe(DEVICE_STATES.length);
    const rankOf = ({ state }: Pick<FleetDevice, "state">) => -DEVICE_STATES.indexOf(state);
    for (let round = 0; round < 120; round++) {
      const filter = filterOf(random, all);
      const limit = random.pick([1, 7, 50, 1000]);
      const from = random.chance(0.5) ? random.pick(all) : undefined;
      const state = random.chance(0.8) ? from?.state : random.pick(DEVICE_STATES);
      const taken = all.filter((device) => takes(filter, device));
      const ids = (devices: readonly FleetDevice[]) => {
        return devices.slice(0, 3 * limit).map(({ id }) => id);
      };
      const byId = await everyPage(
        (after) => fleet.devices({ ...filter, limit, ...after }),
        3,
        from?.id,
      );
      expect([filter, from?.id, ids(byId)]).toEqual([
        ...[filter, from?.id],
        ids(taken.filter(({ id }) => !from || id > from.id)),
      ]);
      const cursor = from && `${state}:${from.id}`;
      const urgent = await everyPage(
        (after) => fleet.urgent({ ...filter, limit, ...after }),
        3,
        cursor,
      );
      const isAfter = (device: FleetDevice) => {
        if (!from) return true;
        const ahead = rankOf(device) - rankOf({ state: state! });
        return ahead > 0 || (ahead === 0 && device.id > from.id);
      };
      const sorted = taken.filter(isAfter).toSorted((a, b) => {
        return rankOf(a) - rankOf(b) || (a.id < b.id ? -1 : 1);
      });
      expect([filter, cursor, ids(urgent)]).toEqual([filter, cursor, ids(sorted)]);
    }
  });
});
