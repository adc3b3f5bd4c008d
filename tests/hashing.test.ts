/**
 * How content is hashed: what is found, by whom, and what is left behind. Little content is hashed
 * by the thread that answers requests, much of it by others. Random sizes follow the chosen ones:
 * set SEED to repeat a run.
 */

import { expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { Releases } from "../ota.ts";
import { noise } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { eventually, need, Tool } from "./helpers/tool.ts";

const SEED = seeded("hashing");
setDefaultTimeout(600_000);

/** Files are read in pieces of this. */
const PIECE = 256 * 1024;
const EDGES = [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE];

/** A tree with a file of each size. */
const ofSizes = (sizes: readonly number[]): Tree =>
  Object.fromEntries(sizes.map((size, i) => [`flash/${i}`, noise(size, SEED + i)]));

const random = new Random(SEED);
const LITTLE = ofSizes(EDGES.slice(0, 4));
/** More files than are handed out at once, and some of them large. */
const MUCH = ofSizes([
  ...EDGES,
  3_000_000,
  ...Array.from({ length: 300 }, () => random.below(random.pick([10, 1000, 30_000]))),
]);

for (const [what, tree] of Object.entries({ "a little": LITTLE, "a lot": MUCH })) {
  test(`${what}: each file has the size and the hashes that others find`, async () => {
    using temp = new Temp();
    layTree(temp.at("root/1.0.0"), tree);
    const { versions, ignored } = await Releases.open(temp.at("root"), { quiet: 0 });
    expect(ignored).toEqual([]);
    const found = [...versions[0]!.files].map(([path, { size, sha1, sha256, etag }]) => {
      expect(etag).toBe(`"${sha256.slice(0, 32)}"`);
      return [path, size, sha1, sha256];
    });
    const expected = Object.entries(tree).map(([path, content]) => {
      const hex = (algorithm: string) => createHash(algorithm).update(content).digest("hex");
      return [path, content.length, hex("sha1"), hex("sha256")];
    });
    expect(found).toEqual(expected.sort(([a], [b]) => (a! < b! ? -1 : 1)));
  });
}

/** `bun ota.ts serve` under strace, which sees how files are opened, and may let that fail. */
function serving(root: string, ...strace: string[]): Tool {
  const args = ["serve", "--root", root, "--port", "0", "--host", "127.0.0.1"];
  const options = ["-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", "trace=openat"];
  return new Tool(args, { prefix: [need("strace"), ...options, ...strace] });
}

/** The thread of each opening of a file of a version, in their order. */
function openersOf(calls: string, version: string): string[] {
  const lines = fs.readFileSync(calls, "utf8").split("\n");
  const opened = lines.filter((line) => line.includes(`/root/${version}/flash/`));
  return opened.map((line) => line.split(" ")[0]!);
}

test("much is read by other threads than the one that answers; they end with the work", async () => {
  using temp = new Temp();
  layTree(temp.at("root/1.0.0"), LITTLE);
  layTree(temp.at("root/1.0.1"), MUCH);
  await using tool = serving(temp.at("root"), "-o", temp.at("calls"));
  await tool.until(/^try .*$/m);
  const [first, ...more] = new Set(openersOf(temp.at("calls"), "1.0.0"));
  expect([first, more]).toEqual([expect.any(String), []]);
  const others = new Set(openersOf(temp.at("calls"), "1.0.1"));
  expect(others.size).toBeGreaterThan(0);
  expect(others).not.toContain(first);
  await eventually("they have ended", () => {
    return [...others].every((thread) => !fs.existsSync(`/proc/${first}/task/${thread}`));
  });
});

test("a few large files are shared among the threads", async () => {
  using temp = new Temp();
  layTree(temp.at("root/1.0.0"), ofSizes([1, 2, 3, 4].map((i) => i * 1_000_000)));
  await using tool = serving(temp.at("root"), "-o", temp.at("calls"));
  await tool.until(/^try .*$/m);
  const openers = openersOf(temp.at("calls"), "1.0.0");
  expect(openers.length).toBe(4);
  expect(new Set(openers).size).toBeGreaterThan(navigator.hardwareConcurrency > 1 ? 1 : 0);
});

for (const [what, tree] of Object.entries({ "a little": LITTLE, "a lot": MUCH })) {
  test(`${what}, of which a file cannot be read: the version is not offered, and it is said why`, async () => {
    using temp = new Temp();
    layTree(temp.at("root/1.0.0"), { "flash/main.py": "one\n" });
    layTree(temp.at("root/1.0.1"), tree);
    const bad = temp.at("root/1.0.1/flash/2");
    const fault = ["-P", fs.realpathSync(bad), "-e", "inject=openat:error=EIO"];
    await using tool = serving(temp.at("root"), "-o", "/dev/null", ...fault);
    await tool.until(/^try .*$/m);
    expect(tool.stdout).toMatch(/^version +1\.0\.0 .*$/m);
    expect(tool.stdout).not.toMatch(/^version +1\.0\.1 .*$/m);
    expect(tool.stdout).toMatch(/^ignored +1\.0\.1: unreadable: .*EIO.*$/m);
  });
}
