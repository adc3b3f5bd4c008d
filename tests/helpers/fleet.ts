/** Fleets whose time passes when told to, and the places to keep them. */

import { Database } from "bun:sqlite";
import { Fleet, type FleetOptions, type NewestReleases } from "../../ota.ts";
import { Postgres } from "./postgres.ts";
import { Temp } from "./temp.ts";

export const HOUR = 3600_000;

/** What a device asks with, and what it is offered. */
export interface Saying {
  method?: "GET" | "HEAD";
  to?: string | null;
  firmware?: string | null;
  query?: Record<string, string>;
  address?: string;
  isKnown?: boolean;
}

/** A fleet whose time passes when told to. */
export class FleetWorld implements AsyncDisposable {
  now = 1_700_000_000_000;
  elapsed = 0;
  newest: NewestReleases = { version: "1.0.1", firmware: null };
  readonly warnings: string[] = [];
  readonly #watchers = new Set<() => void>();

  private constructor(public fleet: Fleet) {}

  static async open(url: string, options: Partial<FleetOptions> = {}): Promise<FleetWorld> {
    const world = new FleetWorld(undefined as unknown as Fleet);
    world.fleet = await Fleet.open({
      ...{ url, serving: true, tick: 0, newest: () => world.newest },
      clock: { now: () => world.now, elapsed: () => world.elapsed },
      warn: (line) => {
        world.warnings.push(line);
        for (const watcher of world.#watchers) watcher();
      },
      ...options,
    });
    return world;
  }

  pass(milliseconds: number): void {
    this.now += milliseconds;
    this.elapsed += milliseconds;
  }

  /** A request of a device, as the server tells of it. */
  say(devid: string, version: string, saying: Saying = {}): void {
    const { method = "GET", to = null, firmware = null, query = {}, isKnown = true } = saying;
    const address = saying.address ?? "10.0.0.1";
    this.fleet.note({
      ...{ method, path: "/manifest.json", peer: address, address, status: 200, sent: 1 },
      query: { ...(devid && { devid }), current_ver: version, ...query },
      milliseconds: 1,
      asked: { model: "", isKnown, offer: to || firmware ? { version: to, firmware } : null },
    });
  }

  /** The state of a device, and what happened to it. */
  async look(id: string): Promise<{ state: string; history: string[] }> {
    await this.fleet.flush();
    const device = await this.fleet.device(id);
    const history = device!.history.map(({ kind, from, to }) => `${kind} ${from} -> ${to}`);
    return { state: device!.state, history };
  }

  /** Waits for a warning. */
  async warned(pattern: RegExp): Promise<void> {
    while (!this.warnings.some((line) => pattern.test(line))) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#watchers.add(resolve);
      await promise;
      this.#watchers.delete(resolve);
    }
  }

  /** The summary as it is now, not as it was within the last second. */
  async summary() {
    this.pass(1000);
    return await this.fleet.summary();
  }

  /** All that can be read of it. */
  async everything() {
    const { devices } = await this.fleet.devices({ limit: 1000 });
    return await Promise.all(devices.map(({ id }) => this.fleet.device(id)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fleet[Symbol.asyncDispose]();
  }
}

/** What a call fails with. (`expect().rejects` waits without hearing the thread of the fleet.) */
export async function failureOf(call: Promise<unknown>): Promise<string> {
  try {
    await call;
  } catch (error) {
    return String(error);
  }
  throw new Error("it was expected to fail, and has not");
}

/** Somebody who has a store locked. */
export interface Lock {
  release(): Promise<void>;
}

/** A kind of store, and what can be done to it from outside. */
export interface StoreKind {
  name: string;
  /** A new place to keep a fleet. */
  place(): Promise<string>;
  query(url: string, text: string): Promise<Record<string, unknown>[]>;
  lock(url: string): Promise<Lock>;
}

/** Where the fleets of one test file are kept, which goes when it ends. */
export class Stores implements AsyncDisposable {
  readonly temp = new Temp();

  private constructor(private readonly server?: Postgres) {}

  static async start(): Promise<Stores> {
    return new Stores(await Postgres.start());
  }

  /** Without PostgreSQL. */
  static ofSQLite(): Stores {
    return new Stores();
  }

  get postgres(): Postgres {
    if (!this.server) throw new Error("there is no PostgreSQL");
    return this.server;
  }

  readonly sqlite: StoreKind = {
    name: "SQLite",
    place: async () => this.temp.at(`${crypto.randomUUID()}.db`),
    query: async (url, text) => {
      using db = new Database(url, { create: true });
      return db.query(text).all() as Record<string, unknown>[];
    },
    lock: async (url) => {
      const db = new Database(url);
      db.run("BEGIN IMMEDIATE");
      return { release: async () => db.close() };
    },
  };

  readonly postgresql: StoreKind = {
    name: "PostgreSQL",
    place: () => this.postgres.database(),
    query: (url, text) => this.postgres.query(url, text),
    lock: async (url) => {
      const sql = new Bun.SQL(url, { max: 1 });
      await sql.unsafe("BEGIN");
      await sql.unsafe("UPDATE ota_meta SET value = value WHERE name = 'lock'");
      return { release: () => sql.close({ timeout: 0 }) };
    },
  };

  /** For `describe.each`. */
  get each(): [name: string, kind: StoreKind][] {
    return [this.sqlite, this.postgresql].map((kind) => [kind.name, kind]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server?.[Symbol.asyncDispose]();
    this.temp[Symbol.dispose]();
  }
}
