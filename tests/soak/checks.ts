/** What is checked after every step, each under its name. */

import * as fs from "node:fs";
import { OTAError, VERSION_FILE, type Manifest } from "../../ota.ts";
import { sha256 } from "../helpers/content.ts";
import { afterUpdate, displaced, type Expected, type Image, type Model } from "./model.ts";
import { differences, type Tree } from "./releases.ts";
import type { Device, Ended, World } from "./world.ts";

/** A promise that was not kept. */
export class Broken extends Error {
  /** @param check the name of the check */
  constructor(check: string, device: Device | undefined, expected: string, found: string) {
    const where = device ? `${device.name} (${device.way}${device.check ? ", on trial" : ""})` : "";
    super(`${check}: ${where}\n  expected ${expected}\n  found    ${found}`);
  }
}

type Seen = Awaited<ReturnType<World["see"]>>;

/** How what is on a disk differs from a tree, in a line for each file. */
function shown(expected: Tree, found: Tree): string {
  const one = (tree: Tree, path: string) => {
    const file = tree.get(path);
    const bits = file?.executable ? " executable" : "";
    return file ? `${file.content.length} bytes ${file.hash.slice(0, 8)}${bits}` : "nothing";
  };
  const lines = differences(expected, found).map((path) => {
    return `${path} is ${one(found, path)}, expected ${one(expected, path)}`;
  });
  return lines.slice(0, 8).join("\n           ") || "the right tree";
}

/** Says in what a device is not as a model, if in anything. */
function unlike({ tree, version, firmware, isRecorded }: Seen, model: Model): string | undefined {
  const shownImage = (image: Image | null) => image && `${image.version} ${image.hash.slice(0, 8)}`;
  if (differences(tree, model.tree).length > 0) return shown(model.tree, tree);
  const isKnown = isRecorded || model.isRecorded;
  if (isKnown && version !== model.version) return `status says ${version}`;
  const [found, expected] = [shownImage(firmware), shownImage(model.firmware)];
  return found === expected ? undefined : `firmware ${found}, expected ${expected}`;
}

/** The model that a device is as, of those that it may be. */
export function isOneOf(
  check: string,
  device: Device,
  seen: Seen,
  models: readonly Model[],
): Model {
  const found = models.find((model) => unlike(seen, model) === undefined);
  // At first contact a device makes a record even where nothing else comes of it.
  if (found) return seen.isRecorded && !found.isRecorded ? { ...found, isRecorded: true } : found;
  const versions = models.map(({ version, firmware }) => `${version}/${firmware?.version ?? "-"}`);
  const differ = models.map((model) => `(against ${model.version}) ${unlike(seen, model)}`);
  const which = versions.join(" or ");
  throw new Broken(
    check,
    device,
    `the device to be exactly on ${which}`,
    differ.join("\n           "),
  );
}

/** An error is for a person, or of the system; anything else is a bug. */
export function checkError(device: Device, { error }: Ended): void {
  if (error === undefined || error instanceof OTAError) return;
  if (error instanceof Error && "code" in error && typeof error.code === "string") return;
  const found = error instanceof Error ? (error.stack ?? error.message) : String(error);
  throw new Broken("no bug shows", device, "an OTAError or a system error", found);
}

/** A command has ended undisturbed: the device is what it must be, and knows it. */
export async function settle(
  world: World,
  device: Device,
  expected: Expected,
  ended: Ended,
): Promise<void> {
  const old = device.model;
  checkError(device, ended);
  const said = ended.result ?? `failed: ${String(ended.error)}`;
  world.log(`  ${device.name} on ${old.version ?? "nothing"}, offered ${expected.offer}: ${said}`);
  const isFailure = ended.result === undefined && expected.mayFail;
  if (!isFailure && !expected.results.includes(ended.result ?? "")) {
    throw new Broken("the command says how it ended", device, expected.results.join(" or "), said);
  }
  const seen = await world.see(device);
  if (seen.pending) throw new Broken("trial", device, "no trial under way", "pending: true");
  const endings = isFailure ? [old] : expected.endings;
  device.model = isOneOf(`tree after "${said}"`, device, seen, endings);
  if (device.model === expected.next) checkDisplaced(device, old, ended);
  checkRecord(device);
}

/** What the device remembers is what its release is. */
export function checkRecord(device: Device): void {
  const { version, release, tree, isRecorded } = device.model;
  const path = `${device.root}/.ota/state.json`;
  const state = fs.existsSync(path) ? JSON.parse(fs.readFileSync(path, "utf8")) : {};
  const { installed } = state as {
    installed?: { version: string; files: Record<string, unknown> };
  };
  if (!installed && !isRecorded) return;
  const broken = (what: string, found: string) => new Broken("record", device, what, found);
  if (installed?.version !== version) throw broken(`version ${version}`, `${installed?.version}`);
  for (const path of new Set([...Object.keys(installed!.files), ...release.keys()])) {
    const entry = installed!.files[path] as string | { sha256: string } | undefined;
    const hash = typeof entry === "object" ? entry.sha256 : entry;
    // Where the application has changed a file, either is true.
    if (hash === release.get(path)?.hash) continue;
    if (release.has(path) && hash === tree.get(path)?.hash) continue;
    throw broken(`${path} as ${release.get(path)?.hash ?? "none of its files"}`, hash ?? "nothing");
  }
  // Nobody has written that file before the first update.
  if (device.model.offer === "" || device.model.isUnclear) return;
  const file = `${device.root}/${VERSION_FILE}`;
  const text = fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "nothing";
  const needsNone = ![...release.keys()].some((path) => path.startsWith("flash/"));
  if (text === `VERSION = '${version}'\n` || (text === "nothing" && needsNone)) return;
  throw broken(`${VERSION_FILE} with ${version}`, text);
}

/** The application's files that had to go are kept, and it is said where. */
function checkDisplaced(device: Device, old: Model, { notes }: Ended): void {
  const files = displaced(old, device.model.release);
  if (files.length === 0) return;
  const kept = new Set<string>();
  for (const item of fs.readdirSync(`${device.root}/.ota`, {
    recursive: true,
    withFileTypes: true,
  })) {
    if (!item.isFile() || !/displaced/.test(`${item.parentPath}/${item.name}`)) continue;
    kept.add(sha256(fs.readFileSync(`${item.parentPath}/${item.name}`)));
  }
  for (const [path, { hash }] of files) {
    const isSaid = notes.some((note) => note.includes(path) && note.includes("displaced"));
    if (kept.has(hash) && isSaid) continue;
    const found = kept.has(hash) ? "not said" : "not there";
    throw new Broken("displaced", device, `${path} of the application kept, and said where`, found);
  }
}

/** The next poll costs nothing, and says what the server says. */
export async function checkPoll(world: World, device: Device): Promise<void> {
  device.model = world.known(device);
  const expected = afterUpdate(device.model, world.offered, { ...device, ...world, retry: false });
  if (!["up to date", "not tried"].includes(expected.results[0]!)) return;
  const ended = await world.update(device);
  await settle(world, device, expected, ended);
  const content = ended.asked.filter((path) => !path.startsWith("/manifest.json"));
  if (content.length > 0)
    throw new Broken("free poll", device, "no content asked", content.join(" "));
  const { version, release } = device.model;
  const theirs = world.servers[0]!.releases.find(version ?? "");
  if (!theirs || expected.results[0] !== "up to date" || release.size === 0) return;
  const base = ended.asked.map((path) => /[?&]base=(\w+)/.exec(path)?.[1]).at(-1);
  if (base !== theirs.digest) throw new Broken("base", device, theirs.digest, `${base}`);
}

/** A command was killed and nothing has put it right yet: each path has old or new content. */
export function checkHalfDone(device: Device, found: Tree, models: readonly Model[]): void {
  const paths = new Set([...found.keys(), ...models.flatMap(({ tree }) => [...tree.keys()])]);
  for (const path of paths) {
    const hash = found.get(path)?.hash;
    if (models.some(({ tree }) => tree.get(path)?.hash === hash)) continue;
    const allowed = models.map(({ tree }) => tree.get(path)?.hash ?? "nothing");
    throw new Broken("half done", device, `${path}: ${allowed.join(" or ")}`, hash ?? "nothing");
  }
}

/** Servers offer what is there, and send what they offer. */
export async function checkServers(world: World): Promise<void> {
  for (const { releases, url } of world.servers) {
    const found = releases.versions.map(({ name }) => name).join(" ");
    const expected = [...world.versions.keys()].join(" ");
    if (found !== expected) throw new Broken("offered", undefined, expected, found);
    const answer = await fetch(`${url.origin}/manifest.json?hash=sha256`);
    const manifest = (await answer.json()) as Manifest;
    const tree = world.offered.newest!.tree;
    const entries = new Map(manifest.new.map((entry) => [entry.dst_path.slice(1), entry]));
    for (const path of new Set([...entries.keys(), ...tree.keys()])) {
      const [entry, file] = [entries.get(path), tree.get(path)];
      const isRight = entry?.sha256 === file?.hash && !!entry?.executable === !!file?.executable;
      if (isRight) continue;
      throw new Broken("manifest", undefined, JSON.stringify(file?.hash), JSON.stringify(entry));
    }
    const some = world.random.pick(manifest.new);
    await checkContent(`${url.origin}${new URL(some.URL).pathname}`, [some.sha256!]);
  }
  if (world.errors.length === 0) return;
  throw new Broken("server errors", undefined, "no 5xx", world.errors.splice(0).join("\n"));
}

/** Content is what a manifest says, or the server says that it changes just now. */
export async function checkContent(url: string, hashes: readonly string[]): Promise<void> {
  const answer = await fetch(url);
  const found = sha256(await answer.bytes());
  const isChanging =
    hashes.length > 1 && answer.status === 503 && answer.headers.has("retry-after");
  if (isChanging || (answer.status === 200 && hashes.includes(found))) return;
  throw new Broken(
    "content",
    undefined,
    `${url} with ${hashes.join(" or ")}`,
    `${answer.status} ${found}`,
  );
}
