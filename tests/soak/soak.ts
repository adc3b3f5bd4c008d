/**
 * A year in the field, compressed: an owner who publishes, devices of different character, and what
 * goes wrong. After every step a model, which knows only what was promised, says what must be true.
 */

import { Random } from "../helpers/random.ts";
import { exchange, KINDS } from "./steps.ts";
import { World } from "./world.ts";

export interface SoakOptions {
  /** The same seed makes the same steps; what a kill at a random time hits is not ours. */
  seed: number;
  /** How many; without it, until the time is over. */
  steps?: number;
  seconds?: number;
  /** Kinds of steps, and of what trees have, to leave out: see `KINDS` and `Gardener`. */
  without?: readonly string[];
  /** Told of every step. */
  log?: (line: string) => void;
}

const DEVICES = 6;

/**
 * Lets a year pass.
 *
 * @returns how many steps there were of each kind
 * @throws {Error} saying which check found what, with the seed and the step
 */
export async function soak(options: SoakOptions): Promise<Record<string, number>> {
  const { seed, steps = Infinity, seconds = Infinity, log = () => {} } = options;
  const without = new Set(options.without);
  const random = new Random(seed);
  const kinds = Object.entries(KINDS).filter(([name]) => !without.has(name));
  const total = kinds.reduce((sum, [, [weight]]) => sum + weight, 0);
  const done: Record<string, number> = {};
  await using world = await World.start(random, without, log);
  for (let place = 0; place < DEVICES; place++) await exchange(world, place);
  const end = performance.now() + seconds * 1000;
  for (let step = 1; step <= steps && performance.now() < end; step++) {
    let at = random.next() * total;
    const [name, [, run]] = kinds.find(([, [weight]]) => (at -= weight) < 0) ?? kinds[0]!;
    log(`${step} ${name}`);
    try {
      await run(world);
    } catch (error) {
      throw new Error(`seed ${seed}, step ${step} (${name}): ${(error as Error).message}`, {
        cause: error,
      });
    }
    done[name] = (done[name] ?? 0) + 1;
  }
  return done;
}
