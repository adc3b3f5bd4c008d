/**
 * Makes the README's screenshot: `bun tests/screenshots.ts`. A fleet of 312 devices, as it would be
 * after a day, in the middle of a rollout.
 */

import { resolve } from "node:path";
import { Fleet, Releases, serve, type NewestReleases } from "../ota.ts";
import { Browser, endBrowser } from "./helpers/browser.ts";
import { Temp } from "./helpers/temp.ts";

const PICTURE = resolve(import.meta.dir, "../examples/page.webp");
const HOUR = 3600_000;
const DEVICES = 312;
const MODELS = ["meter", "meter", "gateway"];

const text = (line: string, lines: number) => `${line}\n`.repeat(lines);
const files = (version: string) => ({
  [`${version}/flash/main.py`]: `VERSION = "${version}"\n${text("print(read())", 300)}`,
  [`${version}/flash/lib/meter.py`]: text("pulses += 1", 500),
});
using temp = new Temp();
const tree = { ...files("1.4.0"), ...files("1.4.1"), ...files("1.5.0") };
for (const [path, content] of Object.entries(tree)) temp.write({ [`root/${path}`]: content });

const releases = await Releases.open(temp.at("root"), { quiet: 0 });

/** A day of a fleet, by a clock of its own. */
class Day implements AsyncDisposable {
  now: number;
  readonly versions: string[] = Array.from({ length: DEVICES }, (_, i) =>
    i % 9 === 0 ? "1.4.0" : "1.4.1",
  );
  /** What devices were offered, until they ask again. */
  readonly offered = new Map<number, string>();
  isBegun = false;
  readonly newest: NewestReleases = { version: "1.5.0", firmware: null };
  private constructor(
    readonly end: number,
    readonly fleet: () => Fleet,
  ) {
    this.now = end - 26 * HOUR;
  }

  static async open(url: string): Promise<Day> {
    let fleet!: Fleet;
    const day = new Day(Date.now(), () => fleet);
    const clock = { now: () => day.now, elapsed: () => day.now };
    const newest = () => day.newest;
    fleet = await Fleet.open({
      url,
      serving: true,
      tick: 0,
      newest,
      clock,
      releases: () => releases,
    });
    return day;
  }

  /** A device asks, once it has done what it was offered before. */
  ask(i: number, isBad: boolean): void {
    const id = `24a160${((i * 7919) % 65_536).toString(16).padStart(6, "0")}`;
    const address = `10.0.${i >> 8}.${i & 255}`;
    const offered = this.offered.get(i);
    if (offered !== undefined && !isBad) this.versions[i] = offered;
    const current_ver = this.versions[i]!;
    const failed = isBad && offered !== undefined ? { failed: offered } : {};
    const query = { devid: id, current_ver, ...failed };
    const newest = this.fleet().newestFor({ query, address, method: "GET" }, releases);
    const name = newest === undefined ? "1.5.0" : (newest.version?.name ?? current_ver);
    const to = this.isBegun && name === "1.5.0" && current_ver !== name ? name : null;
    if (to === null) this.offered.delete(i);
    else this.offered.set(i, to);
    this.fleet().note({
      ...{ method: "GET", path: "/manifest.json", peer: address, address, query },
      ...{ status: 200, sent: 1, milliseconds: 1 },
      asked: {
        ...{ model: MODELS[i % MODELS.length]!, isKnown: true },
        offer: to === null ? null : { version: to, firmware: null },
      },
    });
  }

  async pass(ago: number): Promise<void> {
    this.now = this.end - ago;
    await this.fleet().flush();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fleet()[Symbol.asyncDispose]();
  }
}

{
  await using day = await Day.open(temp.at("fleet.db"));
  const rollout = { version: "1.5.0", model: null, first: 5, soak: 600, silent: 3600 };
  for (let ago = 24 * HOUR; ago >= 0; ago -= HOUR / 4) {
    await day.pass(ago);
    if (ago === 4 * HOUR) {
      await day.fleet().startRollout({
        ...{ ...rollout, tolerance: 0.1, pauseAt: [0.75], only: [], window: null },
      });
      day.isBegun = true;
      // Before it is known here, it would keep nobody from anything.
      await day.fleet().flush();
      await day.fleet().flush();
    }
    for (let i = 0; i < DEVICES; i++) {
      if (day.versions[i] === "1.4.0" && ago < (24 * HOUR * i) / DEVICES) day.versions[i] = "1.4.1";
      // Some went silent a while ago, or do not come up on the new release.
      if (i % 61 === 3 && ago < 3 * HOUR) continue;
      day.ask(i, i % 40 === 7);
    }
    await day.fleet().flush();
  }
}

const options = { root: temp.at("root"), port: 0, host: "127.0.0.1", quiet: 0 };
const token = crypto.randomUUID();
await using server = await serve({ ...options, adminToken: token, fleet: temp.at("fleet.db") });
// Ended after its tab.
await using _ = { [Symbol.asyncDispose]: endBrowser };
using browser = await Browser.open({ width: 1000, height: 800, zone: "Europe/Berlin" });
await browser.go(`${server.url.origin}/-/?token=${token}`);
// What a step costs on the air is worked out once somebody looks.
await browser.until(".costs", /client .*board/);
const picture = await browser.picture("webp", 82, 1000);
await Bun.write(PICTURE, picture);
console.log(`${PICTURE}: ${picture.byteLength} bytes`);
