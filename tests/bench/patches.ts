/** The sizes of patches that others make. */

import * as fs from "node:fs";
import { promisify } from "node:util";
import * as zlib from "node:zlib";
import { missing, run, scratch } from "./harness.ts";

/** Content that changes; without an old one where it is new. */
export interface Change {
  old?: Uint8Array;
  new: Uint8Array;
}

type Differ = (old: string, changed: string, patch: string) => string[];

/** The tools, each by the command that makes a patch. */
const DIFFERS = {
  bsdiff: (old, changed, patch) => ["bsdiff", old, changed, patch],
  xdelta3: (old, changed, patch) => ["xdelta3", "-e", "-9", "-s", old, changed, patch],
  zstd: (old, changed, patch) => {
    return ["zstd", "-q", "-19", "--long", `--patch-from=${old}`, changed, "-o", patch];
  },
} satisfies Record<string, Differ>;

/** The name of a tool that makes patches. */
export type Tool = keyof typeof DIFFERS;

const absent = new Set<string>();

/** Says which tools are missing; their sizes will be NaN. */
export function findTools(): void {
  for (const tool of missing("air", Object.keys(DIFFERS))) absent.add(tool);
}

/** The sum of a tool's patches; NaN without the tool, and when there is content without an old one. */
export async function patchBytes(tool: Tool, changes: readonly Change[]): Promise<number> {
  if (absent.has(tool)) return NaN;
  const home = scratch("air/patches");
  const [old, changed, patch] = [`${home}/old`, `${home}/new`, `${home}/patch`];
  let sum = 0;
  for (const change of changes) {
    if (!change.old) return NaN;
    fs.writeFileSync(old, change.old);
    fs.writeFileSync(changed, change.new);
    fs.rmSync(patch, { force: true });
    await run(DIFFERS[tool](old, changed, patch));
    sum += fs.statSync(patch).size;
  }
  return sum;
}

/** Up to this size ota.ts has zstd do its best. */
const MAX_BEST = 2 * 1024 * 1024;
/** Magic number and the dictionary's SHA-256. */
const DCZ_HEADER = 40;

const zstdAsync = promisify(zlib.zstdCompress);

/** The size of a body coded as `dcz`, with the parameters that ota.ts has for it. */
export async function dczSize(old: Uint8Array, content: Uint8Array): Promise<number> {
  const window = Math.ceil(Math.log2(content.byteLength + old.byteLength + 1));
  const params = {
    [zlib.constants.ZSTD_c_compressionLevel]: content.byteLength <= MAX_BEST ? 19 : 12,
    [zlib.constants.ZSTD_c_windowLog]: Math.min(23, Math.max(10, window)),
  };
  const frame = await zstdAsync(content, { params, dictionary: Buffer.from(old) });
  return DCZ_HEADER + frame.byteLength;
}

/** The sum of the bodies coded as `dcz`; NaN when there is content without an old one. */
export async function dczBytes(changes: readonly Change[]): Promise<number> {
  let sum = 0;
  for (const change of changes) {
    sum += change.old ? await dczSize(change.old, change.new) : NaN;
  }
  return sum;
}
