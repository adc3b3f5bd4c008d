/** A server with a fleet of its own, devices that ask it, and `rollout` as its operator types it. */

import { spyOn } from "bun:test";
import { AsyncLocalStorage } from "node:async_hooks";
import { renameSync } from "node:fs";
import { type FleetServer, type Rollout, serve, type ServeOptions } from "../../ota.ts";
import { layTree, Temp, type Tree } from "./temp.ts";
import { type Ran, run, until } from "./tool.ts";

export const HOUR = 3600_000;
export const RELEASES: Tree = {
  "1.0.0/main.py": "one\n",
  "1.0.1/main.py": "two\n".repeat(100),
  "1.0.1/lib.py": "x".repeat(500),
};

/**
 * Whose command runs. A command waits for two seconds, within which the servers of its fleet write
 * twice, and act on what it wrote; those of a van do that at once, and its commands wait for it.
 */
const commands = new AsyncLocalStorage<Van>();
const sleep = Bun.sleep.bind(Bun);
spyOn(Bun, "sleep").mockImplementation(async (time) => {
  const van = commands.getStore();
  if (!van) return await sleep(time);
  for (let times = 0; times < 2; times++) await van.flush();
});

/** A server with its releases, and whoever asks it. */
export class Van extends Temp implements AsyncDisposable {
  servers: FleetServer[] = [];
  readonly warnings: string[] = [];
  readonly log: string[] = [];
  /** Where the fleet is, if it is not in the root. */
  fleet: string | undefined;
  /** Milliseconds of up-time that nobody waited for. */
  #passed = 0;

  /** Lets so much time pass that more devices may go than went before. */
  pass(hours = 2): void {
    this.#passed += hours * HOUR;
  }

  static async start(options: ServeOptions = {}, releases: Tree = RELEASES): Promise<Van> {
    const van = new Van(releases);
    if (typeof options.fleet === "string") van.fleet = options.fleet;
    await van.serve(options);
    return van;
  }

  get server(): FleetServer {
    return this.servers[0]!;
  }

  /** One more server on the same fleet. */
  async serve(options: ServeOptions = {}): Promise<void> {
    const server = await serve({
      ...{ root: this.path, port: 0, host: "127.0.0.1", quiet: 0 },
      fleet: this.fleet ?? this.at(".fleet.db"),
      warn: (line) => void this.warnings.push(line),
      log: (line) => void this.log.push(line),
      clock: { now: () => Date.now(), elapsed: () => performance.now() + this.#passed },
      ...options,
    });
    this.servers.push(server);
  }

  /** A device asks; what it is offered. */
  async ask(devid: string, version: string, saying: Record<string, string> = {}) {
    const query = new URLSearchParams({ devid, current_ver: version, ...saying });
    const answer = await fetch(new URL(`/manifest.json?${query}`, this.server.url));
    const manifest = (await answer.json()) as { version: string } | null;
    await this.flush();
    return manifest?.version ?? "none";
  }

  /** Devices that need no number: they are first in any rollout. */
  async canaries(...ids: string[]): Promise<void> {
    for (const id of ids) {
      await this.ask(id, "1.0.0", { failed: "1.0.1", model: "LoPy4" });
      await this.server.fleet!.edit(id, { labels: { canary: "yes" } });
    }
  }

  /** A device asks until it is offered a version. */
  async offered(devid: string, to: string): Promise<void> {
    await until(
      `${devid} is offered ${to}`,
      () => this.ask(devid, "1.0.0"),
      (found) => found === to,
    );
  }

  /** Its servers write, and act on what they hear from the store, as they do each second. */
  async flush(): Promise<void> {
    await Promise.all(this.servers.map(({ fleet }) => fleet!.flush()));
  }

  rollout(...args: string[]): Promise<Ran> {
    const elsewhere = this.fleet === undefined ? [] : ["--fleet", this.fleet];
    const command = ["rollout", ...args, "--root", this.path, ...elsewhere];
    return commands.run(this, () => run(command));
  }

  async list(): Promise<Rollout[]> {
    const { rollouts } = JSON.parse((await this.rollout("--json")).stdout) as {
      rollouts: Rollout[];
    };
    return rollouts;
  }

  /** Waits for the newest rollout to be in a state. */
  async state(state: string): Promise<Rollout> {
    const newest = async () => {
      await this.flush();
      return (await this.server.fleet!.rollouts())[0];
    };
    await until(`the rollout is ${state}`, newest, (rollout) => rollout?.state === state);
    return (await this.list())[0]!;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const server of this.servers) await server[Symbol.asyncDispose]();
    this[Symbol.dispose]();
  }
}

/** A root without 1.0.1, whose devices are all on 1.0.0. */
export async function before(options: ServeOptions = {}, ...ids: string[]): Promise<Van> {
  const van = await Van.start(options, { "1.0.0/main.py": "one\n" });
  await van.canaries(...ids);
  return van;
}

/** 1.0.1 comes, whole from the start. */
export function publish(van: Van): void {
  layTree(van.at(".new"), { "main.py": "two\n" });
  renameSync(van.at(".new"), van.at("1.0.1"));
}
