/** Basics: the sorted map that holds a version's files. Set SEED to repeat a run. */

import { describe, expect, test } from "bun:test";
import { compareCodePoints, SortedMap } from "../ota.ts";
import { Random, seeded } from "./helpers/random.ts";

const SEED = seeded("basics");

describe("a sorted map", () => {
  test("says the same as a Map, for a few keys and for tens of thousands", () => {
    const random = new Random(SEED);
    for (const count of [0, 1, 2, 4095, 4096, 4097, 30_000]) {
      const keys = new Set<string>();
      while (keys.size < count) {
        // U+FFFD sorts before U+1F600 by code point, and after it by UTF-16 unit.
        const start = random.pick(["flash/", "sd/", "\ufffd", "\u{1f600}"]);
        keys.add(`${start}${random.below(1e9)}`);
      }
      const sorted = [...keys].sort(compareCodePoints);
      const expected = new Map(sorted.map((key, i) => [key, i]));
      const map = new SortedMap<number>();
      for (const [key, value] of expected) map.append(key, value);

      expect(map.size).toBe(count);
      expect([...map.keys()]).toEqual(sorted);
      expect([...map.values()]).toEqual([...expected.values()]);
      expect([...map]).toEqual([...expected]);
      for (const key of sorted) {
        const other = `${key}0`;
        if (map.get(key) !== expected.get(key)) throw new Error(`${key}: ${map.get(key)}`);
        if (map.has(other) !== expected.has(other)) throw new Error(`${other}: ${map.has(other)}`);
      }
      for (const other of ["", "a", "zzz", "\u{10ffff}"]) expect(map.has(other)).toBe(false);
    }
  });
});
