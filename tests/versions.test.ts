/**
 * LooseVersion against the original. `fixtures/loose-versions.json` holds pairs of texts with
 * the result of `cmp(LooseVersion(a), LooseVersion(b))` in CPython 2.7.18 (distutils.version,
 * unicode texts, sys.maxunicode 1114111), where a number sorts before every string. It was
 * made, and can be made again byte for byte, with
 *
 *     python2.7 tests/fixtures/loose-versions.py > tests/fixtures/loose-versions.json
 *
 * Its pairs in which no number meets a string (1406 of 1740; the others raise TypeError there)
 * were checked against CPython 3.11.7 and 3.8.18 with the LooseVersion that setuptools keeps:
 *
 *     python3 tests/fixtures/loose-versions.py --check tests/fixtures/loose-versions.json
 *
 * Digits other than ASCII ones are not in the table: Python's int() makes numbers of them, we
 * do not. That rule, and what no table can show, is tested below it, on random texts; set SEED
 * to repeat a run.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { LooseVersion } from "../ota.ts";
import { Random, seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const table: Record<string, [a: string, b: string, expected: number][]> = await Bun.file(
  new URL("fixtures/loose-versions.json", import.meta.url),
).json();

const compare = (a: string, b: string): number =>
  Math.sign(new LooseVersion(a).compare(new LooseVersion(b)));

/** One line for each pair that does not come out as expected, in either direction. */
function wrongPairs(pairs: [string, string, number][]): string[] {
  return pairs.flatMap(([a, b, expected]) =>
    [
      { a, b, expected },
      { a: b, b: a, expected: -expected || 0 },
    ]
      .map((pair) => ({ ...pair, got: compare(pair.a, pair.b) || 0 }))
      .filter(({ expected, got }) => got !== expected)
      .map(({ a, b, expected, got }) => `${JSON.stringify([a, b])}: ${expected}, got ${got}`),
  );
}

describe("as CPython 2.7 compares", () => {
  for (const [title, pairs] of Object.entries(table)) {
    test(`${title} (${pairs.length} pairs)`, () => {
      expect(wrongPairs(pairs)).toEqual([]);
    });
  }

  test("the table is whole", () => {
    const pairs = Object.values(table).flat();
    expect(pairs.length).toBe(1740);
    expect(new Set(pairs.map(([, , expected]) => expected))).toEqual(new Set([-1, 0, 1]));
  });

  test("a number sorts before every string", () => {
    expect(compare("13.0.1", "13.0-beta3")).toBe(-1);
    expect(compare("0.3.1@v0.3.1", "0.3@v0.3")).toBe(-1);
  });
});

describe("beyond the table", () => {
  test("only ASCII digits make a number", () => {
    // Arabic-Indic three, mathematical bold zero and fullwidth one are strings here: after every
    // number, and different from it.
    for (const digit of ["\u0663", "\u{1d7ce}", "\uff11"]) {
      expect(compare(`1.${digit}`, "1.99")).toBe(1);
      expect(compare(`1.${digit}`, "1.z")).toBe(1);
      expect(compare(`1.${digit}`, `1.${digit}`)).toBe(0);
    }
    expect(compare("1.\u0663", "1.\u0662")).toBe(1);
    expect(compare("1.\u0663\u0663", "1.\u0663.\u0663")).toBe(1);
    // Nor do they part a string, or belong to a number.
    expect(compare("1.-\u0663", "1.-.\u0663")).toBe(1);
    expect(compare("1\u0663", "1.\u0663")).toBe(0);
  });

  test("numbers and texts far longer than any release", () => {
    const nines = "9".repeat(100_000);
    expect(compare(`1.${nines}`, `1.1${"0".repeat(100_000)}`)).toBe(-1);
    expect(compare(`1.${nines}`, `1.0000${nines}`)).toBe(0);
    expect(compare(`1.${nines}`, "1.a")).toBe(-1);
    expect(compare("1.".repeat(50_000), `${"1.".repeat(50_000)}0`)).toBe(-1);
    expect(compare("-".repeat(100_000), `${"-".repeat(99_999)}+`)).toBe(1);
  });

  test("a version is not changed by being compared", () => {
    const version = new LooseVersion("1.10rc2");
    for (const other of ["", "1.9", "1.10rc10", "x"]) {
      const first = version.compare(other);
      expect(version.compare(other)).toBe(first);
    }
    expect(version.toString()).toBe("1.10rc2");
  });
});

describe("on random texts", () => {
  const random = new Random(seeded("versions"));

  // Few and small pieces, so that equal parts, equal versions and common prefixes are frequent.
  const pieces = [
    ..."0012.....aAbzZv-_+@~ \n\0",
    ...[
      "00",
      "01",
      "10",
      "rc",
      "beta",
      "ab",
      "ba",
      "18446744073709551616",
      "018446744073709551616",
    ],
    ...["\u00e9", "\u0663", "\ud7ff", "\ue000", "\uffff", "\u{10000}", "\u{1f600}", "\u{10ffff}"],
  ];
  const randomText = (): string =>
    Array.from({ length: random.below(8) }, () => pieces[random.below(pieces.length)]).join("");

  /** A copy in random order (Fisher and Yates). */
  function shuffled<T>(list: readonly T[]): T[] {
    const copy = [...list];
    for (let last = copy.length - 1; last > 0; last--) {
      const [item] = copy.splice(random.below(last + 1), 1);
      copy.push(item as T);
    }
    return copy;
  }

  const texts = Array.from({ length: 160 }, randomText);
  const versions = texts.map((text) => new LooseVersion(text));
  const order = versions.map((a) => versions.map((b) => a.compare(b)));
  const at = (a: number, b: number): number => order[a]?.[b] ?? Number.NaN;
  const show = (...indexes: number[]): string => JSON.stringify(indexes.map((i) => texts[i]));

  test("total: every two have a result, and each equals itself", () => {
    const wrong: string[] = [];
    for (let a = 0; a < texts.length; a++) {
      if (at(a, a) !== 0) wrong.push(show(a, a));
      for (let b = 0; b < texts.length; b++) if (Number.isNaN(at(a, b))) wrong.push(show(a, b));
    }
    expect(wrong).toEqual([]);
  });

  test("antisymmetric", () => {
    const wrong: string[] = [];
    for (let a = 0; a < texts.length; a++)
      for (let b = 0; b < a; b++)
        if (Math.sign(at(a, b)) + Math.sign(at(b, a)) !== 0) wrong.push(show(a, b));
    expect(wrong).toEqual([]);
  });

  test("transitive", () => {
    const wrong: string[] = [];
    for (let a = 0; a < texts.length; a++)
      for (let b = 0; b < texts.length; b++) {
        if (at(a, b) > 0) continue;
        for (let c = 0; c < texts.length; c++) {
          if (at(b, c) > 0) continue;
          // a ≤ b ≤ c: a ≤ c, and a < c where either of the two is less.
          const less = at(a, b) < 0 || at(b, c) < 0;
          if (less ? at(a, c) >= 0 : at(a, c) !== 0) wrong.push(show(a, b, c));
        }
      }
    expect(wrong.slice(0, 10)).toEqual([]);
  });

  test("sorted lists do not depend on the order they came in", () => {
    const sorted = [...versions].sort((a, b) => a.compare(b));
    for (let round = 0; round < 50; round++) {
      const again = shuffled(versions).sort((a, b) => a.compare(b));
      const wrong = again.flatMap((version, i) =>
        version.compare(sorted[i] ?? "") === 0 ? [] : [JSON.stringify(version.toString())],
      );
      expect(wrong).toEqual([]);
    }
  });

  test("toString returns the text given", () => {
    expect(versions.map(String)).toEqual(texts);
  });

  test("comparing with a text is comparing with its version", () => {
    const wrong: string[] = [];
    versions.forEach((version, a) =>
      texts.forEach((text, b) => {
        if (Math.sign(version.compare(text)) !== Math.sign(at(a, b))) wrong.push(show(a, b));
      }),
    );
    expect(wrong).toEqual([]);
  });

  test("the texts hold enough equal, less and greater pairs to tell", () => {
    const results = order.flat().map(Math.sign);
    const count = (wanted: number): number => results.filter((result) => result === wanted).length;
    expect(count(0)).toBeGreaterThan(texts.length);
    expect(count(-1)).toBeGreaterThan(1000);
    expect(count(1)).toBeGreaterThan(1000);
  });
});
