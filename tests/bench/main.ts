/**
 * Benchmarks of ota.ts beside real peers, run in turn on the same machine:
 *
 *     bun run bench                    # everything but `rollout`, some minutes
 *     bun run bench server air         # parts of it
 *     bun run bench --quick            # fewer and shorter rounds
 *     bun run bench --ota FILE         # another ota.ts than the one here: before and after
 *     bun run bench air --pairs DIR    # with more firmware: NAME.old and NAME.new
 *     bun run bench rollout            # some hours; RUNS=20 for fewer runs, ONLY="kills 20" for a row
 *
 * What counts are the ratios, each the median of several rounds, with the range they lay in. All
 * traffic is on loopback; only `air` fetches four public packages, from the npm registry.
 */

import * as fs from "node:fs";
import { cpus, loadavg } from "node:os";
import { benchAir } from "./air.ts";
import { benchDevice } from "./device.ts";
import { benchFleet } from "./fleet.ts";
import { OTA, PAIRS, type Effort } from "./harness.ts";
import { readPairs } from "./pairs.ts";
import { benchPage } from "./page.ts";
import { benchRollout } from "./rollout.ts";
import { benchScale } from "./scale.ts";
import { benchServer } from "./server.ts";
import { benchSlow } from "./slow.ts";
import { benchStart } from "./start.ts";

const PARTS: Record<string, (effort: Effort) => Promise<void>> = {
  server: benchServer,
  start: benchStart,
  device: benchDevice,
  air: benchAir,
  fleet: benchFleet,
  scale: benchScale,
  page: benchPage,
  slow: benchSlow,
  rollout: benchRollout,
};

/** Takes too long to be run unless it is named. */
const ONLY_NAMED = ["rollout"];

const WITH_VALUE = ["--ota", "--pairs"];

/** Says how it is used, and ends. */
function usage(problem: string): never {
  console.error(`bench: ${problem}`);
  process.exit(2);
}

/** The names of the parts on the command line, which is checked. */
function chosenParts(given: readonly string[]): string[] {
  const names: string[] = [];
  for (let i = 0; i < given.length; i++) {
    const word = given[i]!;
    if (WITH_VALUE.includes(word)) {
      if (++i === given.length) usage(`${word} wants a value`);
    } else if (Object.hasOwn(PARTS, word)) names.push(word);
    else if (word !== "--quick") {
      const all = [...Object.keys(PARTS), "--quick", "--ota FILE", "--pairs DIR"];
      usage(`no ${word}; there are ${all.join(", ")}`);
    }
  }
  return names;
}

const given = process.argv.slice(2);
const quick = given.includes("--quick");
const names = chosenParts(given);
try {
  if (PAIRS !== undefined) readPairs(PAIRS);
} catch (error) {
  usage(`--pairs: ${error instanceof Error ? error.message : String(error)}`);
}
if (process.platform !== "linux") {
  usage("needs Linux: it reads /proc, and its peers are Debian's packages");
}

const [processor] = cpus();
const digest = new Bun.CryptoHasher("sha256").update(fs.readFileSync(OTA)).digest("hex");
console.log(
  `ota.ts ${digest.slice(0, 12)}, Bun ${Bun.version}, ${cpus().length} × ${processor?.model}, ` +
    `load ${loadavg()[0]?.toFixed(1)}${quick ? ", --quick: not for quoting" : ""}`,
);
for (const [name, bench] of Object.entries(PARTS)) {
  if (names.length > 0 ? !names.includes(name) : ONLY_NAMED.includes(name)) continue;
  const started = performance.now();
  try {
    await bench({ quick, rounds: quick ? 2 : 5 });
  } catch (error) {
    process.exitCode = 1;
    console.error(`bench: ${name} failed: ${error instanceof Error ? error.stack : error}`);
  }
  console.error(`\n(${name}: ${((performance.now() - started) / 1000).toFixed(0)} s)`);
}
process.exit();
