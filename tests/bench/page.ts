/**
 * What the page costs with a large fleet, in SQLite and in a PostgreSQL from Debian: each view, from
 * its request to the last byte of its HTML, with no answer from a cache; and ten tabs that stay open.
 */

import { Postgres } from "../helpers/postgres.ts";
import {
  cpuOf,
  milliseconds,
  OTA,
  percentile,
  scratch,
  serve,
  table,
  whole,
  type Effort,
} from "./harness.ts";
import { LargeFleet, postgresStore, sqliteStore, VERSIONS, type Store } from "./scale.ts";
import { noise, writeFiles } from "./trees.ts";

const DEVICES = 100_000;
/** Tabs that are open at once, and how often each asks, in milliseconds. */
const TABS = 10;
const EVERY = 2000;

export async function benchPage({ quick }: Effort): Promise<void> {
  const devices = quick ? DEVICES / 10 : DEVICES;
  const root = scratch("page/releases");
  for (let version = 1; version <= VERSIONS; version++) {
    const files = Array.from({ length: 10 }, (_, i) => {
      return [`flash/file_${i}.bin`, noise(4096, version + i)] as const;
    });
    writeFiles(`${root}/1.0.${version}`, files);
  }
  await using postgres = await Postgres.start([]);
  const stores = [sqliteStore(), await postgresStore(postgres)];
  const looks: Look[][] = [];
  const costs: string[][] = [];
  for (const store of stores) {
    await (await LargeFleet.fill(store, devices, Date.now())).end();
    await store.settle();
    looks.push(await lookAtAll(root, store, quick ? 20 : 200));
    const pid = store.name === "PostgreSQL" ? postgres.pid : undefined;
    costs.push(await keepOpen(root, store, quick ? 10 : 20, pid));
  }
  const columns = stores.map(({ name }) => name);
  table(
    `The page with ${whole(devices)} devices and ${whole(devices * VERSIONS)} events, from the ` +
      "request to the end of its HTML, no answer from a cache: p50, p99 (max)",
    ["", ...columns, "HTML"],
    looks[0]!.map(({ name, bytes }, i) => [
      ...[name, ...looks.map((all) => all[i]!.times)],
      `${(bytes / 1000).toFixed(1)} kB`,
    ]),
  );
  table(
    `${TABS} tabs that stay open, each asking every ${EVERY / 1000} seconds: CPU that the server and its ` +
      "database use for them, of one core",
    ["", ...columns],
    OPEN.map(([name], i) => [name, ...costs.map((all) => all[i]!)]),
  );
}

/** A view, and how it is asked for in each round. */
type View = [name: string, path: (round: number, rollout: string) => string];

const idOf = (device: number) => `30aea4${device.toString(16).padStart(6, "0")}`;
const NEWEST = `1.0.${VERSIONS}`;

const VIEWS: View[] = [
  ["Fleet, a first look", () => "?span=day"],
  ["Fleet, every two seconds", () => ""],
  ["Fleet, a year", () => "?span=year"],
  ["Devices", () => "devices"],
  ["Devices that are current", () => "devices?state=current"],
  ["Devices on one version", () => `devices?version=1.0.${VERSIONS - 1}`],
  ["Devices of one model", () => "devices?model=FiPy"],
  ["Devices with a label", () => "devices?label=site%3Dnorth"],
  ["Devices, another page", (round) => `devices?after=current%3A${idOf(round * 997)}`],
  ["A search that finds all: ids", () => "devices?q=30aea4"],
  ["A search that finds all: addresses", () => "devices?q=10.1."],
  ["A search that finds some", (round) => `devices?q=a40${(round % 16).toString(16)}`],
  ["A search that finds one", (round) => `devices?q=${idOf(round * 499)}`],
  ["A search that finds none", (round) => `devices?q=none${round}`],
  ["A search by state and version", () => `devices?q=30&state=current&version=${NEWEST}`],
  ["A device", (round) => `devices/${idOf(round * 499)}`],
  ["A rollout's form", () => `rollouts/new?version=${NEWEST}`],
  ["A rollout's form, one model", () => `rollouts/new?version=${NEWEST}&only=model%3DFiPy`],
  ["A rollout's form, one label", () => `rollouts/new?version=${NEWEST}&only=site%3Dnorth`],
  [
    "Abort a rollout?",
    (_, rollout) => `rollouts/change?id=${rollout}&changed=0&went-bad=0&action=abort`,
  ],
];

/** What was measured of a view. */
interface Look {
  name: string;
  times: string;
  bytes: number;
}

/** Asks for each view often, by a server of this process whose time passes when told to. */
async function lookAtAll(root: string, store: Store, rounds: number): Promise<Look[]> {
  const ota = (await import(OTA)) as typeof import("../../ota.ts");
  let skipped = 0;
  const token = crypto.randomUUID();
  await using server = await ota.serve({
    ...{ root, port: 0, host: "127.0.0.1", fleet: store.url, adminToken: token, tick: 0 },
    clock: { now: () => Date.now(), elapsed: () => performance.now() + skipped },
  });
  const fleet = server.fleet!;
  for (let i = 0; i < 200; i++) {
    await fleet.edit(idOf(i * 499), { name: `Meter ${i}`, labels: { site: "north", row: `${i}` } });
  }
  const rollout = { ...ota.ROLLOUT_DEFAULTS, version: NEWEST, model: null };
  const { id } = await fleet.startRollout(rollout);
  for (let i = 0; i < 3; i++) await fleet.flush();
  const ask = browser(server.url.origin, token);
  const looks: Look[] = [];
  for (const [name, path] of VIEWS) {
    const times: number[] = [];
    let bytes = 0;
    for (let round = -3; round < rounds; round++) {
      // What is as good as new for a while is not, so much later.
      skipped += name === "Fleet, every two seconds" ? EVERY : 60_000;
      const started = performance.now();
      const text = await ask(path(Math.max(0, round), id));
      if (round >= 0) times.push(performance.now() - started);
      bytes = Math.max(bytes, Buffer.byteLength(text));
    }
    const [p50, p99, max] = [50, 99, 100].map((n) => milliseconds(percentile(times, n)));
    looks.push({ name, times: `${p50}, ${p99} (${max})`, bytes });
  }
  return looks;
}

/** Asks for views as somebody who has signed in. */
function browser(origin: string, token: string): (path: string) => Promise<string> {
  let cookie: string | undefined;
  return async (path) => {
    cookie ??= (await fetch(`${origin}/-/?token=${token}`, { redirect: "manual" })).headers
      .get("set-cookie")!
      .split(";")[0]!;
    const answer = await fetch(`${origin}/-/${path}`, { headers: { Cookie: cookie } });
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return await answer.text();
  };
}

const OPEN: [name: string, path: (tab: number) => string][] = [
  ["Fleet", () => ""],
  ["Devices", () => "devices"],
  ["A search that finds all", () => "devices?q=30aea4"],
  ["Ten searches that differ", (tab) => `devices?q=a40${tab.toString(16)}`],
  ["A device", (tab) => `devices/${idOf(tab * 499)}`],
];

/** The CPU of a server, and of its database, for ten tabs. */
async function keepOpen(
  root: string,
  store: Store,
  seconds: number,
  database: number | undefined,
): Promise<string[]> {
  const token = crypto.randomUUID();
  await using server = await serve(root, "--fleet", store.url, "--admin-token", token);
  const used = () => cpuOf(server.pid) + (database === undefined ? 0 : cpuOf(database));
  const ask = browser(server.origin, token);
  await ask("");
  const during = async (path?: (tab: number) => string): Promise<number> => {
    const before = used();
    const started = performance.now();
    const tabs = Array.from({ length: path ? TABS : 0 }, async (_, tab) => {
      await Bun.sleep((tab * EVERY) / TABS);
      while (performance.now() - started < 1000 * seconds - EVERY) {
        await ask(path!(tab));
        await Bun.sleep(EVERY);
      }
    });
    await Promise.all([...tabs, Bun.sleep(1000 * seconds)]);
    return (used() - before) / ((performance.now() - started) / 1000);
  };
  const idle = await during();
  const costs: string[] = [];
  for (const [, path] of OPEN) costs.push(`${(100 * ((await during(path)) - idle)).toFixed(1)} %`);
  return costs;
}
