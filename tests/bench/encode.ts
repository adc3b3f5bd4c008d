/**
 * Encodes one content in a process of its own, so that its memory can be told:
 *
 *     bun tests/bench/encode.ts CODING OLD NEW [--ota FILE]
 *
 * `CODING` is `nothing`, `dcz` or `patch`. Prints a `Spent` as JSON.
 */

import * as fs from "node:fs";
import { memoryOf, OTA } from "./harness.ts";
import { dczSize } from "./patches.ts";

/** What encoding took. */
export interface Spent {
  /** Milliseconds on the clock and of CPU, without the start of the process. */
  wall: number;
  cpu: number;
  /** The most memory that the process has had, in bytes. */
  peak: number;
  /** Of the result; absent where there is none. */
  size?: number;
  /** Whether ota.ts has no such coding. */
  isAbsent?: boolean;
}

/** Returns the size of the result. */
type Encode = (old: Uint8Array, content: Uint8Array) => Promise<number | undefined>;

/** What ota.ts exports, when it does. */
type EncodePatch = (
  old: Uint8Array,
  content: Uint8Array,
) => Promise<Uint8Array | undefined> | Uint8Array | undefined;

const ota = (await import(OTA)) as { encodePatch?: EncodePatch };

const ENCODERS: Record<string, Encode | undefined> = {
  nothing: async () => undefined,
  dcz: dczSize,
  patch: ota.encodePatch && (async (...both) => (await ota.encodePatch?.(...both))?.byteLength),
};

const [coding = "", oldPath = "", newPath = ""] = process.argv.slice(2);
const [old, content] = [fs.readFileSync(oldPath), fs.readFileSync(newPath)];
const encode = ENCODERS[coding];
const [started, cpu] = [performance.now(), process.cpuUsage()];
const size = await encode?.(old, content);
const wall = performance.now() - started;
const used = process.cpuUsage(cpu);
const spent: Spent = {
  wall,
  cpu: (used.user + used.system) / 1000,
  peak: memoryOf(process.pid).peak,
  ...(size !== undefined && { size }),
  ...(!encode && { isAbsent: true }),
};
console.log(JSON.stringify(spent));
