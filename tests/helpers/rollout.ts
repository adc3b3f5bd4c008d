/** Servers with a rollout, whose time passes when told to, and whose devices are played here. */

import {
  serve,
  ROLLOUT_DEFAULTS,
  type FleetServer,
  type Rollout,
  type RolloutOptions,
} from "../../ota.ts";
import { HOUR } from "./fleet.ts";
import { Temp } from "./temp.ts";

/** A time that passes when told to. */
export class Time {
  now = 1_700_000_000_000;
  elapsed = 0;

  readonly clock = { now: () => this.now, elapsed: () => this.elapsed };

  pass(milliseconds: number): void {
    this.now += milliseconds;
    this.elapsed += milliseconds;
  }
}

/** How often devices ask. */
export const INTERVAL = HOUR / 6;

/** What devices are served. */
export const TREE = {
  "1.0.0/flash/main.py": "one",
  "1.0.1/flash/main.py": "two",
  "firmware_1.0.1.bin": "image",
};

/** A server on a free port, and devices that ask it over real sockets. */
export class RolloutWorld implements AsyncDisposable {
  /** Device → the version that it is on. */
  readonly devices = new Map<string, string>();

  private constructor(
    readonly time: Time,
    readonly root: Temp,
    readonly server: FleetServer,
    readonly warnings: readonly string[],
    private readonly isOwner: boolean,
  ) {}

  /**
   * Starts a server whose devices are known: they have asked three times.
   *
   * @param beside another server on the same store, whose root and time it shares
   */
  static async open(
    url: string,
    devices = 0,
    {
      tree = TREE,
      beside,
      ...more
    }: { tree?: Record<string, string>; beside?: RolloutWorld; time?: Time } = {},
  ): Promise<RolloutWorld> {
    const time = beside?.time ?? more.time ?? new Time();
    const root = beside?.root ?? new Temp(tree);
    const warnings: string[] = [];
    const server = await serve({
      ...{ root: root.path, port: 0, host: "127.0.0.1", fleet: url, quiet: 0 },
      ...{ clock: time.clock, tick: 0 },
      warn: (line) => void warnings.push(line),
    });
    const world = new RolloutWorld(time, root, server, warnings, !beside);
    for (let i = 0; i < devices; i++) world.devices.set(`m${String(i).padStart(3, "0")}`, "1.0.0");
    for (let round = 0; round < 3 && devices > 0; round++) {
      world.time.pass(INTERVAL);
      for (const id of world.devices.keys()) await world.report(id);
      await world.flush();
    }
    return world;
  }

  get fleet() {
    return this.server.fleet!;
  }

  /** Writes, as each second does. */
  async flush(): Promise<void> {
    await this.fleet.flush();
  }

  /** Starts the rollout of 1.0.1, without pauses, and lets the server hear of it. */
  async start(options: Partial<RolloutOptions> = {}): Promise<Rollout> {
    const usual = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null, pauseAt: [] };
    const rollout = await this.fleet.startRollout({ ...usual, ...options });
    await this.second(3);
    return rollout;
  }

  /** Lets a second pass, with the write that belongs to it. */
  async second(times = 1): Promise<void> {
    for (let i = 0; i < times; i++) {
      this.time.pass(1000);
      await this.flush();
    }
  }

  async rollout(version = "1.0.1"): Promise<Rollout> {
    return (await this.fleet.rollouts()).find((one) => one.version === version)!;
  }

  /** Asks for a device; what it is offered: `none`, a version. */
  async ask(id: string, more: Record<string, string> = {}): Promise<string> {
    const current_ver = this.devices.get(id) ?? "1.0.0";
    const query = new URLSearchParams({ ...(id && { devid: id }), current_ver, ...more });
    const answer = await fetch(`${this.server.url}manifest.json?${query}`);
    const manifest = (await answer.json()) as { version: string } | null;
    return manifest?.version ?? "none";
  }

  /** A report without asking. */
  async report(id: string, more: Record<string, string> = {}): Promise<void> {
    const current_ver = this.devices.get(id) ?? "1.0.0";
    const query = new URLSearchParams({ devid: id, current_ver, ...more });
    await fetch(`${this.server.url}manifest.json?${query}`, { method: "HEAD" });
  }

  /** All that are below a version ask, in some order. @returns those that were offered it */
  async askAll(version = "1.0.1"): Promise<string[]> {
    const offered: string[] = [];
    // Four intervals are enough for the share to reach everyone in small fleets.
    for (let interval = 0; interval < 7; interval++) {
      for (const [id, on] of this.devices) {
        if (on === version) continue;
        if (offered.includes(id)) {
          await this.report(id);
          continue;
        }
        if ((await this.ask(id)) === version) offered.push(id);
      }
      this.time.pass(INTERVAL);
      await this.flush();
      await this.second();
    }
    return offered;
  }

  /** Makes all devices canaries: they need no number, so that whoever asks first is first. */
  async allowAll(): Promise<void> {
    for (const id of this.devices.keys()) {
      await this.fleet.edit(id, { labels: { canary: "yes" } });
    }
  }

  /**
   * All that are below 1.0.1 ask once; those that get it say at once that they are well, but for the
   * first `dead`. @returns those that got it
   */
  async round(dead = 0): Promise<string[]> {
    const offered: string[] = [];
    for (const [id, on] of this.devices) {
      if (on === "1.0.0" && (await this.ask(id)) === "1.0.1") offered.push(id);
    }
    await this.proveAll(offered.slice(dead));
    return offered;
  }

  /** Some hours in which devices report each interval, but for those that are silent. */
  async live(hours: number, silent: readonly string[] = []): Promise<void> {
    for (let left = (hours * HOUR) / INTERVAL; left > 0; left--) {
      this.time.pass(INTERVAL);
      for (const id of this.devices.keys()) if (!silent.includes(id)) await this.report(id);
      await this.flush();
    }
  }

  /** Goes on with the rollout, all well, until so many have it. */
  async proveUntil(count: number): Promise<void> {
    while ((await this.rollout()).proven < count) await this.proveAll(await this.askAll());
  }

  /** They say that it failed. */
  async fail(ids: readonly string[], version = "1.0.1"): Promise<void> {
    for (const id of ids) await this.report(id, { failed: version });
    await this.second();
  }

  /** They come up on the version. */
  async proveAll(ids: readonly string[], version = "1.0.1"): Promise<void> {
    for (const id of ids) {
      this.devices.set(id, version);
      await this.report(id);
    }
    await this.flush();
    // Whom it is for is counted less often where that takes long, as on a busy machine.
    this.time.pass(60_000);
    await this.flush();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server[Symbol.asyncDispose]();
    if (this.isOwner) this.root[Symbol.dispose]();
  }
}
