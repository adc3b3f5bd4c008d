/**
 * Rollouts, simulated: 10,000 devices that poll every ten minutes, a clock of their own, and releases
 * that kill some of the boards. Ours goes through the real code and a SQLite file; beside it the rules
 * of others, of which nothing but the rule is needed.
 */

import * as fs from "node:fs";
import { Random } from "../helpers/random.ts";
import { OTA, remove, scratch, table, whole, type Effort } from "./harness.ts";
import { writeFiles } from "./trees.ts";

const { Fleet, Releases, ROLLOUT_DEFAULTS } = (await import(OTA)) as typeof import("../../ota.ts");
type Fleet = import("../../ota.ts").Fleet;

const DEVICES = 10_000;
/** Seconds between two polls of a device, give or take a tenth. */
const INTERVAL = 600;
/** Of all devices at any time, for two hours on average. */
const OFFLINE = 0.02;
const OFFLINE_SECONDS = 2 * 3600;
/** The chance that a device that polls is away from then on. */
const LEAVES = (OFFLINE / (1 - OFFLINE)) * (INTERVAL / OFFLINE_SECONDS);
/** Seconds after which a run ends, whatever it is at. */
const LONGEST = 12 * 3600;
/** Devices outside the rollout that are written whenever they poll: the fleet is heard by them. */
const WITNESSES = 100;
/** Seconds after which a board says that it is on a release, or that this failed. */
const SAYS = 60;
/** Parts of the boards for which a release is bad. */
const RATES = [1, 0.5, 0.2, 0.1, 0.05, 0.01];

/** What a release does to a board that installs it. */
type Fate = "good" | "dies" | "fails";

/** Who may have a release, by what was heard. */
interface Rule extends AsyncDisposable {
  /** Whether a device that polls is given the release. */
  gives(device: number, now: number): boolean;
  /** What is heard of a device: that it is on the release, or that this failed, or just that it polls. */
  hears(device: number, what: "on" | "failed" | "polls", now: number): void;
  /** A second has passed. */
  second(now: number): Promise<void>;
  readonly isHalted: boolean;
}

/** How a run ended. */
interface Ran {
  /** Boards that were killed, or had to go back. */
  lost: number;
  isHalted: boolean;
  /** Until all devices that poll have it; `undefined`: never. */
  hours: number | undefined;
}

/**
 * Runs a release through a fleet, until it is halted or everybody has it.
 *
 * @param says seconds after which a board says how an update ended; 0: when it polls next
 */
async function simulate(rule: Rule, fate: () => Fate, random: Random, says: number): Promise<Ran> {
  /** Second → devices that poll then. */
  const polls = new Map<number, number[]>();
  const plan = (device: number, at: number) => {
    const second = Math.ceil(at);
    const known = polls.get(second);
    if (known) known.push(device);
    else polls.set(second, [device]);
  };
  const sayings = new Map<number, [device: number, what: "on" | "failed"][]>();
  const away = () => -Math.log(1 - random.next()) * OFFLINE_SECONDS;
  const states = new Array<"old" | "new" | "failed">(DEVICES).fill("old");
  const isAway = new Uint8Array(DEVICES);
  /** Devices that poll and do not have it. */
  let behind = DEVICES;
  let lost = 0;
  for (let device = 0; device < DEVICES; device++) {
    isAway[device] = random.chance(OFFLINE) ? 1 : 0;
    if (isAway[device]) behind--;
    plan(device, isAway[device] ? away() : random.next() * INTERVAL);
  }
  for (let now = 0; now < LONGEST; now++) {
    for (const device of polls.get(now) ?? []) {
      const state = states[device]!;
      if (isAway[device]) {
        isAway[device] = 0;
        if (state === "old") behind++;
      } else if (random.chance(LEAVES)) {
        isAway[device] = 1;
        if (state === "old") behind--;
        plan(device, now + away());
        continue;
      }
      if (state === "old" && rule.gives(device, now)) {
        const becomes = fate();
        behind--;
        if (becomes !== "good") lost++;
        if (becomes === "dies") continue;
        states[device] = becomes === "good" ? "new" : "failed";
        if (says > 0) {
          // Not a poll: those go on as ever.
          const kinds = { new: "on", failed: "failed" } as const;
          const second = now + says;
          sayings.set(second, [
            ...(sayings.get(second) ?? []),
            [device, kinds[states[device] as "new"]],
          ]);
        }
      } else rule.hears(device, state === "old" ? "polls" : state === "new" ? "on" : "failed", now);
      plan(device, now + INTERVAL * (0.9 + 0.2 * random.next()));
    }
    for (const [device, what] of sayings.get(now) ?? []) rule.hears(device, what, now);
    sayings.delete(now);
    polls.delete(now);
    await rule.second(now);
    if (rule.isHalted) return { lost, isHalted: true, hours: undefined };
    if (behind === 0) return { lost, isHalted: false, hours: now / 3600 };
  }
  return { lost, isHalted: false, hours: undefined };
}

// ── Ours ──

/** What ours has in every run: a root, and a store whose devices are known. */
class Ground {
  readonly #fleet = `${scratch("rollout")}/known.db`;
  /** The fleet's time when the devices are known, in seconds. */
  #now = 0;

  private constructor(readonly releases: import("../../ota.ts").Releases) {}

  static async make(): Promise<Ground> {
    const root = scratch("rollout/root");
    for (const version of ["1.0.0", "1.0.1"]) {
      writeFiles(`${root}/${version}`, [["main.py", new TextEncoder().encode(version)]]);
    }
    const ground = new Ground(await Releases.open(root, { quiet: 0 }));
    const fleet = await ground.#open(ground.#fleet, () => ground.#now);
    for (let round = 0; round < 3; round++) {
      ground.#now += INTERVAL;
      for (let device = 0; device < DEVICES; device++) fleet.note(contactOf(device, "1.0.0"));
      await fleet.flush();
    }
    await fleet[Symbol.asyncDispose]();
    return ground;
  }

  async #open(url: string, now: () => number): Promise<Fleet> {
    return await Fleet.open({
      ...{ url, serving: true, tick: 0, releases: () => this.releases },
      clock: { now: () => 1.7e12 + 1000 * now(), elapsed: () => 1000 * now() },
    });
  }

  /** A rollout of 1.0.1 in a store of its own. */
  async rule(): Promise<Rule> {
    const file = `${scratch("rollout")}/${crypto.randomUUID()}.db`;
    fs.copyFileSync(this.#fleet, file);
    let seconds = this.#now;
    const fleet = await this.#open(file, () => seconds);
    const model = null;
    await fleet.startRollout({ ...ROLLOUT_DEFAULTS, version: "1.0.1", model, pauseAt: [] });
    for (let i = 0; i < 3; i++) {
      seconds++;
      await fleet.flush();
    }
    return new Ours(this, fleet, file, (now) => (seconds = this.#now + 3 + now));
  }
}

/** A contact of a device, as a server has it. */
function contactOf(device: number, version: string, more: { to?: string; failed?: string } = {}) {
  const { to, failed } = more;
  return {
    ...{ method: to === undefined ? "HEAD" : "GET", path: "/manifest.json", peer: "10.0.0.1" },
    ...{ address: "10.0.0.1", status: 200, sent: 1, milliseconds: 1 },
    query: { devid: `board-${device}`, current_ver: version, ...(failed && { failed }) },
    asked: { model: "", isKnown: true, offer: to ? { version: to, firmware: null } : null },
  };
}

class Ours implements Rule {
  isHalted = false;
  #noted = 0;
  #last = 0;
  readonly #given = new Set<number>();
  readonly #proven = new Set<number>();

  constructor(
    private readonly ground: Ground,
    private readonly fleet: Fleet,
    private readonly file: string,
    private readonly tell: (now: number) => void,
  ) {}

  gives(device: number): boolean {
    const { fleet, ground } = this;
    const contact = { ...contactOf(device, "1.0.0"), method: "GET" };
    const isGiven = fleet.newestFor(contact, ground.releases)?.version?.name === "1.0.1";
    if (isGiven) {
      this.#given.add(device);
      this.#note(contactOf(device, "1.0.0", { to: "1.0.1" }));
    } else if (device < WITNESSES) this.#note(contactOf(device, "1.0.0"));
    return isGiven;
  }

  hears(device: number, what: "on" | "failed" | "polls"): void {
    if (what === "on" && !this.#proven.has(device)) {
      this.#proven.add(device);
      this.#note(contactOf(device, "1.0.1"));
    }
    if (what === "failed") this.#note(contactOf(device, "1.0.0", { failed: "1.0.1" }));
  }

  #note(contact: ReturnType<typeof contactOf>): void {
    this.fleet.note(contact);
    this.#noted++;
  }

  async second(now: number): Promise<void> {
    this.tell(now);
    // A server writes each second; only what changes is written here, and at times nothing.
    const wait = this.#proven.size > 1000 ? 5 : 1;
    if (now - this.#last < (this.#noted > 0 ? wait : 4)) return;
    await this.fleet.flush();
    [this.#last, this.#noted] = [now, 0];
    if (now % 60 >= 5 && this.#given.size > 20) return;
    const [rollout] = await this.fleet.rollouts();
    this.isHalted = rollout!.state === "halted";
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fleet[Symbol.asyncDispose]();
    for (const end of ["", "-wal", "-shm"]) remove(this.file + end);
  }
}

// ── The rules of others ──

/** Counts what was heard of some devices. */
class Heard {
  readonly given = new Set<number>();
  readonly on = new Set<number>();
  readonly failed = new Set<number>();

  hears(device: number, what: "on" | "failed" | "polls"): void {
    if (what === "on") this.on.add(device);
    if (what === "failed") this.failed.add(device);
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/** Groups of 1, 9 and 90 %: the next one begins when 80 % of one succeeded; 10 % errors stop it. */
class HawkBit extends Heard implements Rule {
  isHalted = false;
  #group = 0;
  readonly #ends = [0.01, 0.1, 1].map((end) => end * DEVICES);

  gives(device: number): boolean {
    if (this.isHalted || device >= this.#ends[this.#group]!) return false;
    this.given.add(device);
    return true;
  }

  async second(now: number): Promise<void> {
    if (now % 10 !== 0) return;
    const [from, to] = [this.#ends[this.#group - 1] ?? 0, this.#ends[this.#group]!];
    const count = (ids: Set<number>) => [...ids].filter((id) => id >= from && id < to).length;
    if (count(this.failed) >= 0.1 * (to - from)) this.isHalted = true;
    else if (count(this.on) >= 0.8 * (to - from) && this.#group < 2) this.#group++;
  }
}

/** Everyone at once, until 10 % of at least 20 notified devices failed; no report is no failure. */
class AWS extends Heard implements Rule {
  gives(device: number): boolean {
    this.given.add(device);
    return true;
  }

  get isHalted(): boolean {
    const { size } = this.given;
    return size >= 20 && this.failed.size >= 0.1 * size;
  }

  async second(): Promise<void> {}
}

/** 1, 10, 50 and 100 %, each an hour after the other; stopped at a step by 10 % failures. */
class Percentages extends Heard implements Rule {
  isHalted = false;
  #share = 0.01;

  gives(device: number): boolean {
    if (device >= this.#share * DEVICES) return false;
    this.given.add(device);
    return true;
  }

  async second(now: number): Promise<void> {
    if (now === 0 || now % 3600 !== 0) return;
    if (this.failed.size >= 0.1 * (this.on.size + this.failed.size) && this.failed.size > 0) {
      this.isHalted = true;
    } else this.#share = [0.01, 0.1, 0.5][now / 3600] ?? 1;
  }
}

// ── The table ──

export async function benchRollout({ quick }: Effort): Promise<void> {
  const runs = Number(Bun.env["RUNS"] ?? (quick ? 3 : 200));
  const ground = await Ground.make();
  const rules: [name: string, make: () => Rule | Promise<Rule>, runs: number][] = [
    ["ota.ts", () => ground.rule(), runs],
    ["hawkBit", () => new HawkBit(), Math.min(runs, 20)],
    ["AWS", () => new AWS(), Math.min(runs, 20)],
    ["percentages", () => new Percentages(), Math.min(runs, 20)],
  ];
  const releases: [name: string, bad: Fate, rate: number, says?: number][] = [
    ...RATES.map((rate) => [`kills ${100 * rate} %`, "dies", rate] as [string, Fate, number]),
    ...RATES.map((rate) => [`fails on ${100 * rate} %`, "fails", rate] as [string, Fate, number]),
    ["good", "good", 0],
    ["good, and boards say so at the next poll", "good", 0, 0],
  ];
  const only = Bun.env["ONLY"];
  const rows: string[][] = [];
  for (const [what, bad, rate, says = SAYS] of releases) {
    if (only && !what.startsWith(only)) continue;
    for (const [name, make, times] of rules) {
      const ran: Ran[] = [];
      // Where it goes to everyone, runs take long and hardly differ.
      const most = rate > 0 && rate <= ROLLOUT_DEFAULTS.tolerance ? Math.ceil(times / 4) : times;
      for (let run = 0; run < most; run++) {
        const random = new Random(1000 * run + Math.round(100 * rate));
        await using rule = await make();
        ran.push(await simulate(rule, () => (random.chance(rate) ? bad : "good"), random, says));
      }
      rows.push([what, name, ...summaryOf(ran)]);
      console.error(rows.at(-1)!.join("  "));
    }
  }
  table(
    `A rollout to ${whole(DEVICES)} devices that poll every ${INTERVAL / 60} minutes, ` +
      `${100 * OFFLINE} % of them offline: boards that were lost, or had to go back`,
    ["the release", "by the rule of", "lost on average", "at worst", "halted", "hours for all"],
    rows,
  );
}

function summaryOf(ran: readonly Ran[]): string[] {
  const lost = ran.map((one) => one.lost);
  const mean = lost.reduce((sum, count) => sum + count, 0) / ran.length;
  const halted = ran.filter(({ isHalted }) => isHalted).length;
  const hours = ran.flatMap((one) => one.hours ?? []);
  const longest = hours.length > 0 ? `${Math.max(...hours).toFixed(1)}` : "";
  const average = hours.reduce((sum, count) => sum + count, 0) / hours.length;
  return [
    mean < 100 ? mean.toFixed(1) : whole(mean),
    whole(Math.max(...lost)),
    `${halted} of ${ran.length}`,
    hours.length > 0 ? `${average.toFixed(1)} (at most ${longest})` : "never",
  ];
}
