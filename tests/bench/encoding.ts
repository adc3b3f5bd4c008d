/** What making a delta takes: time and memory, for small and large content and for the worst. */

import * as fs from "node:fs";
import { Random } from "../helpers/random.ts";
import type { Spent } from "./encode.ts";
import { inRounds, median, mebibytes, OTA, run, scratch, table, whole } from "./harness.ts";
import type { Pair } from "./pairs.ts";
import { dczSize } from "./patches.ts";
import { freshNoise } from "./trees.ts";

const MEBIBYTE = 2 ** 20;
/** Of the large contents, and of an image as ESP32s have it. */
const LARGE = 4 * MEBIBYTE;
const MIDDLE = 1_750_000;

/** `nothing` is what the process takes without encoding. */
const CODINGS = ["nothing", "dcz", "patch"] as const;
type Measured = Record<(typeof CODINGS)[number], Spent[]>;

/**
 * Encodes some of the pairs and some made ones, each time in a fresh process.
 *
 * @param pairs all that there are, the small ones first
 */
export async function benchEncoding(pairs: readonly Pair[], rounds: number): Promise<void> {
  const rows: string[][] = [];
  let isAbsent = false;
  for (const pair of [...(await someOf(pairs)), ...madePairs(pairs)]) {
    const measured = await measure(pair, rounds);
    isAbsent ||= measured.patch.some((spent) => spent.isAbsent);
    const size = pair.new.byteLength;
    rows.push([pair.name, whole(size), ...cells(measured, "dcz"), ...cells(measured, "patch")]);
  }
  const columns = (coding: string) => [coding, "ms", "CPU ms", "memory"];
  table(
    "Encoding, each in a fresh process: bytes of the result, medians of time and of CPU time, and " +
      "how much more memory the process has had at most than one that only reads both images",
    ["", "new image", ...columns("dcz"), ...columns("ota-patch")],
    rows,
  );
  if (isAbsent) console.log("\nota-patch: ota.ts does not export encodePatch (yet)");
}

/** The first pair, and the hardest of the size that ESP32s have; made where there is none. */
async function someOf(pairs: readonly Pair[]): Promise<Pair[]> {
  const first = pairs.slice(0, 1);
  let hardest = pairs.length > 0 ? [joined(pairs, MIDDLE)] : [];
  let most = 0;
  for (const pair of pairs.filter(({ new: image }) => image.byteLength > MIDDLE / 2)) {
    const size = await dczSize(pair.old, pair.new);
    if (size > most) [hardest, most] = [[pair], size];
  }
  return [...first, ...hardest];
}

/** Old and new of 4 MiB: an image of that size, and what a coding may find hard. */
function madePairs(pairs: readonly Pair[]): Pair[] {
  return [
    ...(pairs.length > 0 ? [joined(pairs, LARGE)] : []),
    { name: "noise, nothing in common", old: freshNoise(LARGE, 1), new: freshNoise(LARGE, 2) },
    { name: "zeros, a byte in 1,000 not", old: nearZeros(3), new: nearZeros(4) },
  ];
}

/**
 * Images one after the other up to that size; where they do not reach it, from the beginning again,
 * with other bytes.
 */
function joined(pairs: readonly Pair[], size: number): Pair {
  const join = (which: "old" | "new") => {
    const pieces: Uint8Array[] = [];
    for (let turn = 0, sum = 0; sum < size && pairs.length > 0; turn++) {
      for (const pair of pairs) {
        pieces.push(pair[which].map((byte) => byte ^ turn));
        sum += pair[which].byteLength;
      }
    }
    return new Uint8Array(Buffer.concat(pieces).subarray(0, size));
  };
  return { name: "firmware, joined", old: join("old"), new: join("new") };
}

function nearZeros(seed: number): Uint8Array {
  const random = new Random(seed);
  const bytes = new Uint8Array(LARGE);
  for (let count = LARGE / 1000; count > 0; count--) bytes[random.below(LARGE)] = random.below(256);
  return bytes;
}

async function measure(pair: Pair, rounds: number): Promise<Measured> {
  const home = scratch("air/encoding");
  const [old, changed] = [`${home}/old`, `${home}/new`];
  fs.writeFileSync(old, pair.old);
  fs.writeFileSync(changed, pair.new);
  const measured: Measured = { nothing: [], dcz: [], patch: [] };
  const script = `${import.meta.dirname}/encode.ts`;
  const competitors = CODINGS.map((coding) => async () => {
    if (measured[coding].at(-1)?.isAbsent) return;
    const command = [process.execPath, script, coding, old, changed, "--ota", OTA];
    const { stdout } = await run(command);
    measured[coding].push(JSON.parse(stdout) as Spent);
  });
  await inRounds(rounds, competitors);
  return measured;
}

/** Size, time, CPU time and memory. */
function cells(measured: Measured, coding: "dcz" | "patch"): string[] {
  const spent = measured[coding];
  if (spent.some(({ isAbsent }) => isAbsent)) return ["–", "–", "–", "–"];
  const of = (all: Spent[], field: "wall" | "cpu" | "peak") => median(all.map((one) => one[field]));
  const grown = of(spent, "peak") - of(measured.nothing, "peak");
  const size = spent[0]?.size;
  return [
    size === undefined ? "none" : whole(size),
    whole(of(spent, "wall")),
    whole(of(spent, "cpu")),
    mebibytes(Math.max(0, grown)),
  ];
}
