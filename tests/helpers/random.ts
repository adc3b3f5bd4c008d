/** Whether every point of every sweep is tried; else each run tries some, chosen by its seed. */
export const ALL = Bun.env.OTA_ALL !== undefined;

/**
 * The seed of a file's run, which is printed. Set SEED to repeat a run.
 *
 * @param usual for those that are the same each time
 */
export function seeded(name: string, usual = Math.floor(Math.random() * 2 ** 32)): number {
  const seed = Number(Bun.env.SEED ?? usual);
  console.log(`${name}: SEED=${seed}`);
  return seed;
}

/** Random numbers that can be repeated: the same seed gives the same numbers. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** A number from 0 to below 1 (mulberry32). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let mixed = this.#state;
    mixed = Math.imul(mixed ^ (mixed >>> 15), mixed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  }

  /** An integer from 0 to below `end`. */
  below(end: number): number {
    return Math.floor(this.next() * end);
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.below(items.length)];
    if (item === undefined) throw new Error("nothing to pick from");
    return item;
  }

  /** Some of many, in their order. */
  some<T>(items: readonly T[], count: number): T[] {
    const left = new Set(items.keys());
    while (left.size > count) left.delete(this.pick([...left]));
    return [...left].map((i) => items[i]!);
  }

  chance(probability: number): boolean {
    return this.next() < probability;
  }
}
