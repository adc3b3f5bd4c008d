/** `bun run soak --minutes 60 --seed 7`: the soak test for as long as one likes. */

import { parseArgs } from "node:util";
import { soak } from "./soak.ts";

const { values } = parseArgs({
  options: {
    minutes: { type: "string", default: "1" },
    steps: { type: "string" },
    seed: { type: "string", default: String(Date.now() % 1_000_000) },
    without: { type: "string", default: "" },
    verbose: { type: "boolean", default: false },
  },
});
const without = values.without.split(",").filter((name) => name !== "");
const end = performance.now() + Number(values.minutes) * 60_000;
// A world of its own for each seed, so that roots do not grow for ever and any of them can be tried again.
for (let seed = Number(values.seed); performance.now() < end; seed++) {
  const started = performance.now();
  const steps = Number(values.steps ?? 1000);
  const seconds = (end - started) / 1000;
  const log = values.verbose ? (line: string) => console.error(line) : undefined;
  try {
    const done = await soak({ seed, steps, seconds, without, log });
    const kinds = Object.entries(done).map(([name, count]) => `${count} ${name}`);
    console.log(
      `seed ${seed}: ${((performance.now() - started) / 1000).toFixed(1)} s, ${kinds.join(", ")}`,
    );
  } catch (error) {
    console.error(error instanceof Error ? error.message : error);
    process.exitCode = 1;
    break;
  }
}
