/**
 * What a large fleet costs its store, in SQLite and in a PostgreSQL from Debian: what people ask of
 * it, what a second of reports costs to write, and how large it gets. All through the class that
 * the server uses; its clock is ours, so that no answer comes from a cache.
 */

import { Database } from "bun:sqlite";
import * as fs from "node:fs";
import type { Fleet, FleetDevice } from "../../ota.ts";
import { Postgres } from "../helpers/postgres.ts";
import {
  median,
  milliseconds,
  OTA,
  percentile,
  scratch,
  table,
  whole,
  type Effort,
} from "./harness.ts";

/** Devices, and versions that each of them went through. */
const DEVICES = 100_000;
export const VERSIONS = 10;
/** Devices that report within a second. */
const REPORTING = 10_000;
const HOUR = 3600_000;

export async function benchScale({ quick }: Effort): Promise<void> {
  const devices = quick ? DEVICES / 10 : DEVICES;
  await using postgres = await Postgres.start([]);
  const stores: Store[] = [sqliteStore(), await postgresStore(postgres)];
  const columns: string[][] = [];
  for (const store of stores) {
    const large = await LargeFleet.fill(store, devices);
    await store.settle();
    const reads = await large.reads(quick ? 50 : 300);
    const writes = await large.writes(quick ? 3 : 10);
    await large.end();
    columns.push([...reads, ...writes, ...(await store.bytes()).map(whole)]);
  }
  const rows = ROWS.map((name, i) => [name, ...columns.map((column) => column[i] ?? "–")]);
  table(
    `A store of ${whole(devices)} devices and ${whole(devices * VERSIONS)} events, asked through ` +
      "the thread that has it open: p50, p99 (max)",
    ["", ...stores.map(({ name }) => name)],
    rows,
  );
}

const PAGES = ["current", "behind", "offered", "silent", "failed"] as const;

const ROWS = [
  "the summary",
  ...PAGES.map((state) => `100 devices that are ${state}`),
  "100 devices on one version",
  "a device and its history",
  "the same, beside a write a second: the summary",
  `written: ${whole(REPORTING)} devices that ask again`,
  `written: ${whole(REPORTING)} devices, an event each`,
  `written: ${whole(REPORTING)} devices never met`,
  "bytes for a device",
  "bytes for an event",
];

/** A place for a large fleet. */
export interface Store {
  name: string;
  url: string;
  /** Bytes for a device and for an event with its indexes, once what is free is given back. */
  bytes: () => Promise<[device: number, event: number]>;
  /** What a database does by itself within a minute of so many changes. */
  settle: () => Promise<unknown>;
}

export function sqliteStore(): Store {
  const url = `${scratch("scale")}/fleet.db`;
  const bytes = async (): Promise<[number, number]> => {
    const copy = `${url}-copy`;
    {
      using db = new Database(url);
      db.run(`VACUUM INTO '${copy}'`);
    }
    const all = fs.statSync(copy).size;
    using db = new Database(copy);
    const count = (table: string) => `(SELECT COUNT(*) FROM ${table})`;
    const text = `SELECT ${count("ota_devices")} AS devices, ${count("ota_events")} AS events`;
    const counts = db.query(text).get() as { devices: number; events: number };
    db.run("DELETE FROM ota_events");
    db.run("VACUUM");
    const devices = fs.statSync(copy).size;
    return [devices / counts.devices, (all - devices) / counts.events];
  };
  return { name: "SQLite", url, bytes, settle: async () => {} };
}

export async function postgresStore(postgres: Postgres): Promise<Store> {
  const url = await postgres.database();
  const bytesOf = async (table: string) => {
    await postgres.query(url, `VACUUM FULL ANALYZE ${table}`);
    const text = `SELECT pg_total_relation_size('${table}') / COUNT(*) AS n FROM ${table}`;
    return Number((await postgres.query(url, text))[0]!["n"]);
  };
  const bytes = async (): Promise<[number, number]> => {
    return [await bytesOf("ota_devices"), await bytesOf("ota_events")];
  };
  // Autovacuum.
  const settle = () => postgres.query(url, "VACUUM ANALYZE");
  return { name: "PostgreSQL", url, bytes, settle };
}

/** A fleet of many devices, whose time passes when told to. */
export class LargeFleet {
  #now: number;
  #elapsed = 0;
  #fleet!: Fleet;

  private constructor(
    private readonly store: Store,
    private readonly devices: number,
    end: number,
  ) {
    const rounds = VERSIONS + 3;
    this.#now = end - rounds * (HOUR + (1000 * devices) / REPORTING) - 5 * HOUR;
  }

  /** Fills a store with what happens within a day. @param end what its clock shows then */
  static async fill(store: Store, devices: number, end = 1_700_000_000_000): Promise<LargeFleet> {
    const large = new LargeFleet(store, devices, end);
    const { Fleet } = (await import(OTA)) as typeof import("../../ota.ts");
    large.#fleet = await Fleet.open({
      ...{ url: store.url, serving: true, tick: 0 },
      newest: () => ({ version: `1.0.${VERSIONS}`, firmware: null }),
      clock: { now: () => large.#now, elapsed: () => large.#elapsed },
    });
    await large.#all((i) => large.#say(i, 1));
    // Nine of ten events: each is an update. Some do not get the last one.
    const isLate = (i: number) => i % 10 === 9 || i % 100 < 3 || i % 100 > 97 || i % 100 === 50;
    for (let version = 2; version <= VERSIONS; version++) {
      const last = (i: number) => (isLate(i) ? Math.min(version, VERSIONS - 1) : version);
      await large.#all((i) => large.#say(i, last(i)));
    }
    // Of a hundred devices, three are silent, two wait for what they were offered, one has failed.
    await large.#all((i) => i % 100 < 3 && large.#say(i, VERSIONS - 1, VERSIONS));
    large.#pass(5 * HOUR);
    await large.#all((i) => i % 100 > 97 && large.#say(i, VERSIONS - 1, VERSIONS));
    await large.#all((i) => i % 100 === 50 && large.#say(i, VERSIONS - 1, VERSIONS, VERSIONS));
    return large;
  }

  async end(): Promise<void> {
    await this.#fleet[Symbol.asyncDispose]();
  }

  #pass(milliseconds: number): void {
    this.#now += milliseconds;
    this.#elapsed += milliseconds;
  }

  #say(device: number, version: number, offered?: number, failed?: number): void {
    const name = (n: number) => `1.0.${n}`;
    const address = `10.1.${(device >> 8) & 255}.${device & 255}`;
    this.#fleet.note({
      ...{ method: "GET", path: "/manifest.json", peer: address, address, status: 200, sent: 1 },
      query: {
        devid: `30aea4${device.toString(16).padStart(6, "0")}`,
        ...{ sysname: device % 3 ? "FiPy" : "LoPy4", firmware_ver: "1.20.2" },
        current_ver: name(version),
        ...(failed && { failed: name(failed) }),
      },
      milliseconds: 1,
      asked: {
        ...{ model: "", isKnown: true },
        offer: offered ? { version: name(offered), firmware: null } : null,
      },
    });
  }

  /** Every device, a second's worth at a time. */
  async #all(say: (device: number) => unknown): Promise<void> {
    for (let i = 0; i < this.devices; i++) {
      say(i);
      if ((i + 1) % REPORTING === 0) {
        this.#pass(1000);
        await this.#fleet.flush();
      }
    }
    await this.store.settle();
    this.#pass(HOUR);
  }

  async #time(rounds: number, task: (round: number) => Promise<unknown>): Promise<string> {
    const times: number[] = [];
    for (let round = 0; round < rounds; round++) {
      this.#pass(1000);
      const started = performance.now();
      await task(round);
      times.push(performance.now() - started);
    }
    const [p50, p99, max] = [50, 99, 100].map((n) => milliseconds(percentile(times, n)));
    return `${p50}, ${p99} (${max})`;
  }

  /** What people ask. */
  async reads(rounds: number): Promise<string[]> {
    const fleet = this.#fleet;
    const found: string[] = [await this.#time(rounds, () => fleet.summary())];
    for (const state of PAGES) {
      let last: FleetDevice | undefined;
      const page = async () => {
        const { devices } = await fleet.devices({ state, ...(last && { after: last.id }) });
        if (devices.length === 0 && !last) throw new Error(`no device is ${state}`);
        last = devices.at(-1);
      };
      found.push(await this.#time(rounds, page));
    }
    const version = `1.0.${VERSIONS - 1}`;
    found.push(await this.#time(rounds, () => fleet.devices({ version })));
    const one = async (round: number) => {
      const device = (round * 7919) % this.devices;
      const known = await fleet.device(`30aea4${device.toString(16).padStart(6, "0")}`);
      if ((known?.history.length ?? 0) < VERSIONS - 1) throw new Error("not the history expected");
    };
    found.push(await this.#time(rounds, one));
    const busy = async (round: number) => {
      for (let i = 0; i < 200; i++) this.#say((round * 200 + i * 499) % this.devices, VERSIONS);
      await fleet.flush();
      return await fleet.summary();
    };
    found.push(await this.#time(Math.ceil(rounds / 5), busy));
    return found;
  }

  /** A second of reports. */
  async writes(rounds: number): Promise<string[]> {
    const found: string[] = [];
    let version = VERSIONS;
    for (const first of [0, 0, this.devices]) {
      const times: number[] = [];
      for (let round = 0; round < rounds; round++) {
        this.#pass(2 * HOUR);
        if (found.length === 1) version++;
        for (let i = 0; i < REPORTING; i++) {
          const device = first > 0 ? first + round * REPORTING + i : i * (this.devices / REPORTING);
          this.#say(device, version);
        }
        const started = performance.now();
        await this.#fleet.flush();
        times.push(performance.now() - started);
      }
      found.push(`${milliseconds(median(times))} (${milliseconds(Math.max(...times))})`);
    }
    return found;
  }
}
