/** A year in the field, compressed. `SEED=7 bun test tests/soak.test.ts` repeats one. */

import { expect, test } from "bun:test";
import { seeded } from "./helpers/random.ts";
import { soak } from "./soak/soak.ts";

/** About 20 s on two cores; a number of steps, so that a slow machine tests the same. */
const STEPS = 300;

test("releases, kills, faults, damage, rollbacks: every promise is kept", async () => {
  // The same one each time: `bun run soak` goes on to others.
  const seed = seeded("soak", 1);
  const done = await soak({ seed, steps: STEPS });
  expect(Object.values(done).reduce((sum, count) => sum + count, 0)).toBe(STEPS);
}, 600_000); // A busy machine may take its time.
