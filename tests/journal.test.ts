/**
 * The journal against every crash: a model test after MCUboot's simulator.
 *
 * A scenario is a list of steps, each a call of the journal or something that the application does.
 * For each step a model, which knows nothing of journals, says what the device is afterwards. Then
 * the scenario is played again and again on a disk in memory, and at each single operation the
 * process is killed or the power is cut, which loses what was not synced. A fresh journal opens what
 * is left, and is itself killed or cut off at each of its operations; the one after that must find
 * the device as it was before or after the step that was cut off, byte for byte, and from there the
 * rest of the scenario must work. The same is done with operations that fail.
 *
 * Random trees with random changes follow the scenarios. Set SEED to repeat a run.
 */

import { afterAll, describe, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import { mkdirSync, mkdtempSync, promises, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ActiveFirmware, Change, Disk, Installed } from "../ota.ts";
import {
  Files as DeviceFiles,
  fileSystem,
  Journal,
  LooseVersion,
  OTAError,
  peekState,
  preflight,
} from "../ota.ts";
import { Crash, MemoryDisk, type Fault, type PowerCut } from "./helpers/memory-disk.ts";
import { ALL, Random, seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const ROOT = "/device";
const SEED = seeded("journal");
/** Set OTA_ALL for every way a crash can end, at every operation; else each run tries others. */
const THOROUGH = ALL;
const TREES = THOROUGH ? 100 : 15;
/** The chances of what is tried in part (see `Effort`); of faults, that each is. */
const EFFORT = THOROUGH
  ? { again: 0.015, on: 0.08, faults: 0.1 }
  : { again: 0.01, on: 0.05, faults: 0.03 };
/** Milliseconds; each test takes far less on a machine that has nothing else to do. */
const TIMEOUT = 600_000;
const counts = { crashes: 0, recoveries: 0, faults: 0, trees: 0 };

// ── The model: what a device is, and what each step makes of it. ──

/** What a release has: path → content. */
type Files = Record<string, string>;

interface Release {
  version: string;
  files: Files;
  /** Its firmware image; the firmware has the version of the release. */
  firmware?: string;
}

interface UpdateOptions {
  check?: boolean;
  restart?: string;
  /** Place every file, also those that are the same. */
  whole?: boolean;
  /** Put right what is other than the release, which stays the one that it is. */
  repair?: boolean;
}

/** A device outside of `.ota`, and what can be told of the inside. */
interface World {
  /** Path → mode and content, as in `644 text`. */
  files: ReadonlyMap<string, string>;
  directories: ReadonlySet<string>;
  firmware: ActiveFirmware | null;
  slots: readonly [string | null, string | null];
  installed: Installed | null;
  starts: number | null;
  failed: readonly string[];
  restart: string | null;
  damaged: boolean;
  /** What going back needs; `null` when there is nothing to go back to. */
  undo: Undo | null;
  /** Contents of the application's files that made way for a release and are kept. */
  kept: readonly string[];
}

interface Undo {
  before: World;
  /** Paths that the update put or removed. */
  touched: ReadonlySet<string>;
  put: ReadonlySet<string>;
  made: readonly string[];
  removed: readonly string[];
  failure: string;
  restart: string | null;
  /** Of a repair: the way back to the release before, once the repair stands. */
  release?: Undo | null;
}

const EMPTY_WORLD: World = {
  files: new Map(),
  directories: new Set(),
  firmware: null,
  slots: [null, null],
  installed: null,
  starts: null,
  failed: [],
  restart: null,
  damaged: false,
  undo: null,
  kept: [],
};

const sha256 = (text: string): string => new Bun.CryptoHasher("sha256").update(text).digest("hex");
const encode = (text: string): Uint8Array => new TextEncoder().encode(text);
const decode = (bytes: Uint8Array): string => new TextDecoder().decode(bytes);

function above(path: string): string[] {
  const parts = path.split("/");
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join("/"));
}

/** What an update from what is installed to a release puts and removes. */
function difference(
  world: World,
  release: Release,
  { whole = false, repair = false }: UpdateOptions,
): { put: Map<string, string>; remove: string[]; displace: string[] } {
  const known = world.installed?.files ?? {};
  const entries = Object.entries(release.files);
  const put = entries.filter(([path, text]) => {
    if (repair) return world.files.get(path)?.replace(/^\d+ /, "") !== text;
    return whole || known[path] !== sha256(text);
  });
  const remove = Object.keys(known).filter((path) => !(path in release.files));
  const displace = put
    .map(([path]) => path)
    .filter((path) => {
      return world.files.has(path) && !(path in known);
    });
  return {
    put: new Map(put),
    remove: remove.filter((path) => world.files.has(path)),
    displace,
  };
}

function updated(world: World, release: Release, options: UpdateOptions = {}): World {
  const { put, remove, displace } = difference(world, release, options);
  const files = new Map(world.files);
  const directories = new Set(world.directories);
  const made: string[] = [];
  const removed: string[] = [];
  for (const path of remove) files.delete(path);
  // A directory that the release leaves empty goes, but for those at the top.
  const isEmpty = (directory: string): boolean => {
    const isBelow = (path: string): boolean => path.startsWith(`${directory}/`);
    return ![...files.keys(), ...directories].some(isBelow);
  };
  for (const directory of [...new Set(remove.flatMap(above))].sort().reverse()) {
    const isNeeded = [...put.keys()].some((path) => path.startsWith(`${directory}/`));
    if (isNeeded || !isEmpty(directory)) continue;
    if (!directory.includes("/")) continue;
    directories.delete(directory);
    removed.unshift(directory);
  }
  for (const path of put.keys()) {
    for (const directory of [...directories].sort().reverse()) {
      if (directory !== path && !directory.startsWith(`${path}/`)) continue;
      directories.delete(directory);
      removed.unshift(directory);
    }
  }
  for (const [path, text] of put) {
    for (const directory of above(path)) {
      if (directories.has(directory)) continue;
      directories.add(directory);
      made.push(directory);
    }
    const mode = world.files.get(path)?.split(" ", 1)[0] ?? "644";
    files.set(path, `${mode} ${text}`);
  }
  let { firmware, slots } = world;
  if (release.firmware !== undefined) {
    const slot = firmware?.slot === 0 ? 1 : 0;
    firmware = { version: release.version, slot };
    slots = slot === 0 ? [release.firmware, slots[1]] : [slots[0], release.firmware];
  }
  const installed = installedBy(world, release);
  const restart = options.restart ?? null;
  const releaseBefore = world.undo && { ...world.undo, restart };
  const undo: Undo = {
    before: world,
    touched: new Set([...put.keys(), ...remove]),
    put: new Set(put.keys()),
    made: made.reverse(),
    removed,
    failure: `${release.version} ${digestOf(release)}`,
    restart,
    ...(options.repair && { release: releaseBefore }),
  };
  return {
    files,
    directories,
    firmware,
    slots,
    installed,
    starts: options.check ? 0 : null,
    failed: options.check ? world.failed : failuresAfter(world, release.version),
    restart,
    damaged: false,
    kept: [...world.kept, ...displace.map((path) => world.files.get(path)!.replace(/^\d+ /, ""))],
    undo: options.repair && !options.check ? releaseBefore : undo,
  };
}

function installedBy(world: World, { version, files }: Release): Installed {
  const hashes = Object.entries(files).map(([path, text]) => [path, sha256(text)]);
  const { installed } = world;
  const isSame = installed?.version === version;
  const previous_version = isSame ? installed.previous_version : (installed?.version ?? null);
  return { version, previous_version, files: Object.fromEntries(hashes) };
}

const digestOf = (release: Release): string => sha256(JSON.stringify(release));

function failuresAfter(world: World, version: string): string[] {
  return world.failed.filter((failure) => {
    return new LooseVersion(failure.split(" ")[0]!).compare(version) > 0;
  });
}

/** The way back; what the application made meanwhile stays. */
function rolledBack(world: World): World {
  const { before, touched, put, made, removed, failure, restart } = world.undo!;
  const files = new Map(world.files);
  const directories = new Set(world.directories);
  for (const path of put) files.delete(path);
  const inUse = (directory: string): boolean => {
    return [...files.keys(), ...directories].some((path) => path.startsWith(`${directory}/`));
  };
  for (const directory of made) if (!inUse(directory)) directories.delete(directory);
  for (const directory of removed) directories.add(directory);
  for (const path of touched) {
    const old = before.files.get(path);
    if (old === undefined) continue;
    for (const directory of above(path)) directories.add(directory);
    files.set(path, old);
    // What the application put where a file of the old release belongs was moved aside.
    directories.delete(path);
    for (const other of [...files.keys(), ...directories]) {
      if (!other.startsWith(`${path}/`)) continue;
      files.delete(other);
      directories.delete(other);
    }
  }
  // A file of the application where a directory of the old release belongs was moved aside, too.
  for (const directory of directories) files.delete(directory);
  return {
    ...before,
    files,
    directories,
    starts: null,
    failed: [...world.failed.filter((other) => other !== failure), failure],
    restart,
    damaged: false,
    // A release on trial leaves the way back to the one before the last as it was.
    undo: world.starts === null ? null : before.undo,
  };
}

/** What can be seen of a world, as a plain object with its keys in order. */
function visible(world: World): Record<string, unknown> {
  const { files, directories, undo, kept, ...rest } = world;
  const { version, previous_version, files: hashes } = world.installed ?? {};
  return {
    ...rest,
    files: Object.fromEntries([...files].sort(([a], [b]) => (a < b ? -1 : 1))),
    directories: [...directories].sort(),
    installed: world.installed && {
      version,
      previous_version,
      files: Object.fromEntries(Object.entries(hashes ?? {}).sort(([a], [b]) => (a < b ? -1 : 1))),
    },
    canRollBack: undo !== null,
  };
}

const same = (a: unknown, b: unknown): boolean => Bun.deepEquals(a, b, true);

// ── The device: what is really there. ──

/** Looks at a device without asking the journal. */
function lookAtTree(disk: MemoryDisk): Pick<World, "files" | "directories" | "firmware" | "slots"> {
  const all = [...disk.walk("")];
  const tree = all.filter(([path]) => path !== ".ota" && !path.startsWith(".ota/"));
  const files = tree.filter(([, { kind }]) => kind === "file");
  const directories = tree.filter(([, { kind }]) => kind === "directory");
  const slot = (n: 0 | 1): string | null => {
    const image = all.find(([path]) => path === `.ota/ota_${n}.bin`)?.[1];
    return image ? decode(image.data) : null;
  };
  return {
    files: new Map(
      files.map(([path, { mode, data }]) => [path, `${mode.toString(8)} ${decode(data)}`]),
    ),
    directories: new Set(directories.map(([path]) => path)),
    firmware: new DeviceFiles(ROOT, disk).firmware,
    slots: [slot(0), slot(1)],
  };
}

function look(disk: MemoryDisk, journal: Journal): Record<string, unknown> {
  const { installed, trial, failed, restart } = journal.state;
  const world = {
    ...lookAtTree(disk),
    installed,
    starts: trial?.starts ?? null,
    failed: failed.map(({ version, digest }) => `${version} ${digest}`),
    restart,
    damaged: journal.damaged.length > 0,
    undo: null,
    kept: [],
  };
  return { ...visible(world), canRollBack: journal.canRollBack };
}

/** Opens the journal of a device. */
function open(disk: Disk, root = ROOT): Promise<Journal> {
  return Journal.open(new DeviceFiles(root, disk));
}

/** What does the steps: a device with a journal that is open. */
interface Player {
  disk: MemoryDisk;
  journal: Journal;
  world: World;
}

interface Step {
  name: string;
  do(player: Player): Promise<void> | void;
  then(world: World): World;
  /** Done by the application, not by the updater: no crash is tried in it. */
  apart?: boolean;
}

/** Gets content staged: in pieces, as from a network, or at once. */
async function stage({ staging }: Journal, text: string): Promise<string> {
  const key = sha256(text);
  if (staging.has(key)) return key;
  if (text.length % 2 === 0) return staging.add(encode(text));
  const bytes = encode(text);
  const partial = staging.partial(key);
  partial.start('"tag"');
  partial.append(bytes.subarray(0, bytes.length >> 1));
  partial.append(bytes.subarray(bytes.length >> 1));
  await partial.finish();
  return key;
}

async function update(
  { journal, world }: Player,
  release: Release,
  options: UpdateOptions,
): Promise<void> {
  const { put, remove, displace } = difference(world, release, options);
  preflight(journal.files, put.keys(), remove);
  const keys = new Map<string, string>();
  for (const [path, text] of put) keys.set(path, await stage(journal, text));
  const { firmware: image, version } = release;
  const change: Change = {
    installed: installedBy(world, release),
    failure: { version: release.version, digest: digestOf(release) },
    put: keys,
    remove,
    displace,
  };
  if (image !== undefined) change.firmware = { key: await stage(journal, image), version };
  if (options.check) change.check = { command: "true", timeout: 60 };
  if (options.restart) change.restart = options.restart;
  if (options.repair) change.repair = true;
  await journal.commit(change);
}

const steps = {
  stage: (release: Release): Step => ({
    name: `stage ${release.version}`,
    do: async ({ journal }) => {
      for (const text of Object.values(release.files)) await stage(journal, text);
    },
    then: (world) => world,
  }),
  update: (release: Release, options: UpdateOptions = {}): Step => ({
    name: `update to ${release.version}`,
    do: (player) => update(player, release, options),
    then: (world) => updated(world, release, options),
  }),
  /** A release with the same content. */
  record: (version: string): Step => ({
    name: `record ${version}`,
    do: ({ journal, world }) => journal.record(renamed(world, version)),
    // From another version, the way back that was kept does not lead to where it came from.
    then: (world) => {
      const undo = world.installed?.version === version ? world.undo : null;
      return { ...world, installed: renamed(world, version), undo };
    },
  }),
  countStart: (): Step => ({
    name: "countStart",
    do: ({ journal }) => journal.countStart(),
    then: (world) => ({ ...world, starts: (world.starts ?? 0) + 1 }),
  }),
  confirm: (): Step => ({
    name: "confirm",
    do: ({ journal }) => journal.confirm(),
    then: (world) => ({
      ...world,
      starts: null,
      undo: world.undo?.release === undefined ? world.undo : world.undo.release,
      failed: failuresAfter(world, world.installed!.version),
    }),
  }),
  restarted: (): Step => ({
    name: "restarted",
    do: ({ journal }) => journal.restarted(),
    then: (world) => ({ ...world, restart: null }),
  }),
  rollBack: (): Step => ({
    name: "rollBack",
    do: ({ journal }) => journal.rollBack(),
    then: rolledBack,
  }),
  /** Another process, later. */
  reopen: (): Step => ({
    name: "reopen",
    do: async (player) => {
      player.journal[Symbol.dispose]();
      player.journal = await open(player.disk);
    },
    then: (world) => world,
  }),
  /** The application makes files, and deletes those that are `null`; `a/b/` is a directory. */
  app: (changes: Record<string, string | null>): Step => ({
    name: `the application: ${Object.keys(changes).join(", ")}`,
    apart: true,
    do: async ({ disk }) => {
      for (const [path, text] of Object.entries(changes)) {
        appChange(disk, path, text);
      }
      const touched = Object.keys(changes).flatMap((path) => ["", path, ...above(path)]);
      for (const path of new Set(touched)) {
        if (disk.stat(path)) await disk.sync(path);
      }
    },
    then: (world) => {
      const files = new Map(world.files);
      const directories = new Set(world.directories);
      for (const [path, text] of Object.entries(changes)) {
        for (const directory of above(path)) directories.add(directory);
        if (path.endsWith("/")) {
          if (text === null) directories.delete(path.slice(0, -1));
        } else if (text === null) files.delete(path);
        else files.set(path, `${files.get(path)?.split(" ", 1)[0] ?? "644"} ${text}`);
      }
      return { ...world, files, directories };
    },
  }),
  chmod: (path: string, mode: number): Step => ({
    name: `chmod ${path}`,
    apart: true,
    do: ({ disk }) => {
      disk.chmod(path, mode);
      disk.settle();
    },
    then: (world) => {
      const text = world.files.get(path)!.replace(/^\d+/, mode.toString(8));
      return { ...world, files: new Map(world.files).set(path, text) };
    },
  }),
  /** A record is damaged, maybe while a way back was under way, and the next process finds it so. */
  damage: (record: "state.json" | "journal.json", isGoingBack = false): Step => ({
    name: `damage ${record}`,
    apart: true,
    do: async (player) => {
      const { disk } = player;
      const at = (name: string): string => `.ota/${name}`;
      player.journal[Symbol.dispose]();
      if (isGoingBack) disk.rename(at("journal.json"), at("rollback.json"));
      disk.write(at(record), encode('{"format":1,"ins'));
      player.journal = await open(disk);
      disk.settle();
    },
    then: (world) => {
      if (record === "journal.json") return { ...world, damaged: true, undo: null };
      const { files, directories, firmware, slots } = world;
      return { ...EMPTY_WORLD, files, directories, firmware, slots, damaged: true };
    },
  }),
};

function renamed(world: World, version: string): Installed {
  const { files, version: previous_version } = world.installed!;
  return { version, previous_version, files };
}

function appChange(disk: MemoryDisk, path: string, text: string | null): void {
  for (const directory of above(path)) {
    if (!disk.stat(directory)) disk.mkdir(directory);
  }
  if (path.endsWith("/")) {
    if (text === null) disk.rmdir(path);
  } else if (text === null) disk.unlink(path);
  else disk.write(path, encode(text));
}

// ── Playing a scenario, and ending it early. ──

interface Scenario {
  name: string;
  /** What the device went through before; nothing goes wrong in it. */
  before?: Step[];
  steps: Step[];
  /** What the application had in the way, and finds below `.ota` at the end. */
  displaced?: string[];
  /** Whether the last change is a repair. */
  repairs?: true;
  /** How many times more it is tried, since what can go wrong in it seldom does; 1. */
  closely?: number;
}

/** A scenario at its start, with what the model says of it. */
interface Stage {
  scenario: Scenario;
  start: MemoryDisk;
  /** The device before the first step, and after each. */
  worlds: World[];
}

/** How far a play came. */
interface Outcome {
  /** How many steps were ended. */
  progress: number;
  /** The step that was under way. */
  step: Step | undefined;
  error: unknown;
}

async function play(
  disk: MemoryDisk,
  steps: readonly Step[],
  worlds: readonly World[],
  progress = 0,
): Promise<Outcome> {
  let player: Player | undefined;
  let step: Step | undefined;
  try {
    player = { disk, journal: await open(disk), world: worlds[progress]! };
    for (; progress < steps.length; progress++) {
      step = steps[progress]!;
      player.world = worlds[progress]!;
      disk.isWatching = step.apart !== true;
      await step.do(player);
      disk.isWatching = true;
      step = undefined;
    }
    return { progress, step, error: undefined };
  } catch (error) {
    return { progress, step, error };
  } finally {
    disk.isWatching = true;
    player?.journal[Symbol.dispose]();
  }
}

async function prepare(scenario: Scenario, links: boolean): Promise<Stage> {
  const start = new MemoryDisk({ links });
  const { before = [], steps } = scenario;
  const all = [EMPTY_WORLD];
  for (const step of [...before, ...steps]) all.push(step.then(all.at(-1)!));
  const { error } = await play(start, before, all);
  if (error) throw error;
  return { scenario, start: start.clone(), worlds: all.slice(before.length) };
}

/** Says where something went wrong, so that it can be looked at. */
class Wrong extends Error {
  override name = "Wrong";
}

function wrong(where: string, message: string, found?: unknown, expected?: unknown[]): never {
  const show = (value: unknown): string => Bun.inspect(value, { depth: 6 });
  const alternatives = (expected ?? []).map((one) => `\nexpected ${show(one)}`).join("\nor");
  throw new Wrong(
    `${where}: ${message} (SEED=${SEED})${found === undefined ? "" : `\nfound ${show(found)}`}` +
      alternatives,
  );
}

/** Before recovery, a path that is in both releases holds its old or its new content. */
function checkPaths(disk: MemoryDisk, allowed: readonly World[], where: string): void {
  const { files } = lookAtTree(disk);
  const [first, ...others] = allowed;
  for (const [path, content] of first!.files) {
    const contents = [content, ...others.map((world) => world.files.get(path))];
    if (contents.includes(undefined) || contents.includes(files.get(path))) continue;
    wrong(where, `before recovery, ${path} is neither old nor new`, files.get(path), contents);
  }
}

/** What is staged under a hash has that hash. */
function checkStaged(disk: MemoryDisk, where: string): void {
  for (const [name, { data }] of disk.walk(".ota/staged")) {
    if (/^[0-9a-f]{64}$/.test(name) && sha256(decode(data)) !== name) {
      wrong(where, `${name} is staged, and is not what it says`, decode(data));
    }
  }
}

/** What the updater keeps when nothing is under way. */
function checkLeftovers(
  disk: MemoryDisk,
  world: World,
  scenario: Scenario,
  undisturbed: boolean,
): void {
  const names = disk.list(".ota");
  const backups = names.filter((name) => name.startsWith("backup-"));
  const records = names.filter((name) => {
    // A file that was never put in its place is overwritten when there is a next one.
    const isUnfinished = name.endsWith(".new") && !undisturbed;
    return /json|corrupt/.test(name) && name !== "state.json" && !isUnfinished;
  });
  const isOnTrial = world.starts !== null;
  const older = isOnTrial && world.undo?.before.undo ? ["journal.json"] : [];
  // A repair that stands keeps what leads to the release before, and its own.
  const isRepaired = scenario.repairs && !isOnTrial && world.undo !== null;
  const expected = world.undo
    ? [...(isOnTrial ? ["commit.json"] : ["journal.json"]), ...older]
    : [];
  expect({ records: records.sort(), backups: backups.length }).toEqual({
    records: expected,
    backups: expected.length + (isRepaired ? 1 : 0),
  });
  const displaced = names.filter((name) => name.startsWith("displaced-"));
  const found = displaced.flatMap((name) => {
    const path = `.ota/${name}`;
    if (disk.stat(path)?.kind === "file") return [decode(disk.read(path, 0, 1000))];
    const files = disk.walk(path).values();
    return [...files.filter(({ kind }) => kind === "file").map(({ data }) => decode(data))];
  });
  const precious = [...(scenario.displaced ?? []), ...world.kept].sort();
  if (undisturbed) {
    expect(found.sort()).toEqual(precious);
    expect(disk.list(".ota/staged")).toEqual([]);
  } else {
    // After a crash, files of a release can be in the directory that was moved aside; and what was
    // staged and not dropped in time goes with the next update.
    expect(found).toEqual(expect.arrayContaining(precious));
  }
}

/** Opens what is left, and says which of the worlds it is. */
async function recover(
  disk: MemoryDisk,
  { worlds }: Stage,
  allowed: readonly number[],
  where: string,
): Promise<number[]> {
  const journal = await open(disk);
  const found = look(disk, journal);
  journal[Symbol.dispose]();
  const expected = allowed.map((i) => visible(worlds[i]!));
  const matches = allowed.filter((_, i) => same(found, expected[i]));
  if (matches.length === 0) wrong(where, "after recovery it is something else", found, expected);
  checkStaged(disk, where);
  return matches;
}

/** Plays the rest of a scenario, and checks how it ends. */
async function playOn(
  disk: MemoryDisk,
  { scenario, worlds }: Stage,
  from: number,
  where: string,
  undisturbed = false,
): Promise<void> {
  const { error } = await play(disk, scenario.steps, worlds, from);
  if (error) wrong(where, `going on at step ${from} failed: ${Bun.inspect(error)}`);
  const journal = await open(disk);
  const found = look(disk, journal);
  const expected = visible(worlds.at(-1)!);
  if (!same(found, expected)) wrong(where, `going on at step ${from}`, found, [expected]);
  checkLeftovers(disk, worlds.at(-1)!, scenario, undisturbed);
  if (journal.recovered) wrong(where, "there was something to recover after the end");
  journal[Symbol.dispose]();
}

const HOWS = ["kill", "drop", "prefix", "subset", "subset", "one", "one"] as const;

function aftermath(disk: MemoryDisk, how: "kill" | PowerCut, random: Random): MemoryDisk {
  return how === "kill" ? disk.kill() : disk.powerCut(how, random);
}

/** How thoroughly what is left after a crash is tried: the chances that it is. */
interface Effort {
  /** That recovery is cut off, at each of its operations. */
  again: number;
  /** That the rest of the scenario is played. */
  on: number;
}

/** Recovers from a crash in every way, also when recovering is cut off. */
async function survive(
  disk: MemoryDisk,
  stage: Stage,
  allowed: readonly number[],
  where: string,
  random: Random,
  effort: Effort,
): Promise<void> {
  const worlds = allowed.map((i) => stage.worlds[i]!);
  const { closely } = stage.scenario;
  const tried = closely || THOROUGH ? HOWS : random.some(HOWS, 1);
  const ways = Array.from({ length: closely ?? 1 }, () => tried).flat();
  for (const how of ways) {
    counts.crashes++;
    const left = aftermath(disk, how, random);
    const here = `${where}, ${how}`;
    checkPaths(left, worlds, here);
    const recovered = left.clone();
    const matches = await recover(recovered, stage, allowed, here);
    for (let at = 1; at <= recovered.changes; at++) {
      if (!random.chance(effort.again)) continue;
      counts.recoveries++;
      const second = left.clone();
      second.crashAt(at, random.chance(0.5));
      await open(second).catch(() => {});
      const then = random.pick(HOWS);
      const there = `${here}; recovery at ${at}, ${then}`;
      if (!second.isDead) wrong(there, "it did not crash");
      const leftAgain = aftermath(second, then, random);
      checkPaths(leftAgain, worlds, there);
      await recover(leftAgain, stage, allowed, there);
    }
    // Where both worlds look the same there is no telling which step is next.
    if (matches.length === 1 && random.chance(effort.on)) {
      const { scenario } = stage;
      const world = stage.worlds[matches[0]!]!;
      if (world.undo) {
        const back: Scenario = { name: `${scenario.name}, then back`, steps: [steps.rollBack()] };
        const worlds = [world, rolledBack(world)];
        const then = { ...stage, scenario: back, worlds };
        await playOn(recovered.clone(), then, 0, `${here}, then back`);
      }
      await playOn(recovered, stage, matches[0]!, here);
    }
  }
}

/** Crashes at one operation of a scenario. */
async function crash(
  stage: Stage,
  at: number,
  torn: boolean,
  random: Random,
  effort: Effort,
): Promise<void> {
  const { scenario, start, worlds } = stage;
  const disk = start.clone();
  disk.crashAt(at, torn);
  const { progress, step } = await play(disk, scenario.steps, worlds);
  const where = `${scenario.name}: ${torn ? "in" : "before"} change ${at} (${step?.name ?? "open"})`;
  if (!disk.isDead) wrong(where, "it did not crash");
  const allowed = step ? [progress, progress + 1] : [progress];
  await survive(disk, stage, allowed, where, random, effort);
}

async function tryCrashes(scenario: Scenario, links: boolean, effort: Effort): Promise<void> {
  const random = new Random(SEED);
  const stage = await prepare(scenario, links);
  const { start, worlds } = stage;
  const whole = start.clone();
  await playOn(whole, stage, 0, scenario.name, true);
  const count = start.clone();
  await play(count, scenario.steps, worlds);
  for (const [i, { name }] of count.log.entries()) {
    await crash(stage, i + 1, false, random, effort);
    if (["write", "append", "copy"].includes(name)) await crash(stage, i + 1, true, random, effort);
  }
  // And after each step: what has returned is durable.
  for (let ended = 1; ended <= scenario.steps.length; ended++) {
    const disk = start.clone();
    const { error } = await play(disk, scenario.steps.slice(0, ended), worlds);
    if (error) throw error;
    const where = `${scenario.name}: after step ${ended}`;
    await survive(disk, stage, [ended], where, random, effort);
  }
}

// ── Operations that fail. ──

const FAULTS: Omit<Fault, "at">[] = [
  { code: "EIO", lasting: false },
  { code: "EIO", lasting: true },
  { code: "ENOSPC", lasting: false },
  { code: "ENOSPC", lasting: true },
  { code: "EROFS", lasting: true },
];

/** A scenario was stopped by an error, and the cause is gone: what is there, and does it go on? */
async function goOn(
  disk: MemoryDisk,
  stage: Stage,
  { progress, step, error }: Outcome,
  isOnce: boolean,
  where: string,
): Promise<void> {
  const { steps } = stage.scenario;
  if (error === undefined) return playOn(disk, stage, steps.length, where);
  if (!(error instanceof Error)) wrong(where, `it threw ${Bun.inspect(error)}`);
  const isUpdate = step?.name.startsWith("update") ?? false;
  const isStuck = error.message.includes("going back failed as well");
  if (isStuck && isOnce) wrong(where, `one fault was too much: ${error.message}`);
  const allowed = step && (!isUpdate || isStuck) ? [progress, progress + 1] : [progress];
  if (isUpdate && !isStuck) {
    const found = lookAtTree(disk);
    const { files, directories, firmware, slots } = stage.worlds[progress]!;
    const expected = { files, directories, firmware, slots };
    if (!same(found, expected)) wrong(where, "it did not go back", found, [expected]);
  } else
    checkPaths(
      disk,
      allowed.map((i) => stage.worlds[i]!),
      where,
    );
  const matches = await recover(disk, stage, allowed, where);
  if (matches.length === 1 || !step) await playOn(disk, stage, matches[0]!, where);
}

async function tryFaults(scenario: Scenario, links: boolean, effort: number): Promise<void> {
  const random = new Random(SEED);
  const stage = await prepare(scenario, links);
  const whole = stage.start.clone();
  await play(whole, scenario.steps, stage.worlds);
  // Where things seldom go wrong they are tried far more often, but not all in one run either.
  const chance = scenario.closely ? (THOROUGH ? 1 : 0.4) : effort;
  for (let at = 1; at <= whole.operations; at++) {
    for (const fault of FAULTS) {
      if (!random.chance(chance)) continue;
      const disk = stage.start.clone();
      disk.fault = { ...fault, at };
      const outcome = await play(disk, scenario.steps, stage.worlds);
      disk.fault = undefined;
      if (disk.strikes === 0) continue;
      counts.faults++;
      const when = `${fault.lasting ? "from" : "at"} operation ${at}`;
      const where = `${scenario.name}: ${fault.code} ${when} (${outcome.step?.name ?? "open"})`;
      await goOn(disk, stage, outcome, !fault.lasting, where);
    }
  }
}

/** Plays a scenario on disks of every size, from too small to large enough. */
async function tryCapacities(scenario: Scenario, links: boolean): Promise<void> {
  const stage = await prepare(scenario, links);
  const full = stage.start.clone();
  full.capacity = 1e9;
  const used = full.capacity - full.free("");
  let failures = 0;
  for (let spare = 0; ; spare += THOROUGH ? 13 : 37) {
    const disk = stage.start.clone();
    disk.capacity = used + spare;
    const outcome = await play(disk, scenario.steps, stage.worlds);
    disk.capacity = Infinity;
    counts.faults++;
    await goOn(disk, stage, outcome, false, `${scenario.name}: ${spare} bytes free`);
    if (outcome.error === undefined) break;
    failures++;
  }
  expect(failures).toBeGreaterThan(10);
}

// ── The scenarios. ──

const v1: Release = {
  version: "1.0.0",
  files: {
    "boot.py": "boot 1",
    "flash/main.py": "main 1",
    "flash/same.py": "same",
    "flash/lib/moved.py": "moved",
    "flash/lib/gone.py": "gone",
    "flash/lib/deep/er/x.py": "x",
    "sd/only.bin": "only",
  },
};

const v2: Release = {
  version: "1.0.1",
  files: {
    "boot.py": "boot 2",
    "flash/main.py": "main two",
    "flash/same.py": "same",
    "flash/moved here.py": "moved",
    "flash/new/one/y.py": "y",
    "flash/new/two.py": "two",
  },
};

const v3: Release = {
  version: "1.0.2",
  files: { "boot.py": "boot 2", "flash/main.py": "main 3", "flash/new/z.py": "z", "top/a.py": "a" },
};

const own = {
  "flash/settings.json": "{}",
  "flash/lib/log.txt": "log",
  "flash/lib/deep/empty/": "",
  "data/today.csv": "1,2,3",
  "spool/": "",
};

/** What happens to files of v2. */
const damage = { "flash/same.py": null, "flash/main.py": "damaged", "flash/new/two.py": null };

const scenarios: Scenario[] = [
  { name: "first installation", steps: [steps.stage(v1), steps.update(v1), steps.rollBack()] },
  {
    name: "add, change, delete, move; go back later",
    before: [steps.app(own), steps.update(v1)],
    steps: [
      steps.stage(v2),
      steps.update(v2),
      steps.reopen(),
      steps.app({
        "flash/new/log.txt": "of the application",
        "flash/new/more/": "",
        "flash/settings.json": "changed",
        "flash/main.py": "changed",
        "data/tomorrow.csv": "4",
      }),
      steps.rollBack(),
    ],
  },
  {
    name: "directories of the application keep nothing else",
    before: [steps.update(v1)],
    steps: [steps.update(v2), steps.rollBack(), steps.update(v3)],
  },
  {
    name: "trial that fails",
    before: [steps.app(own), steps.update(v1)],
    steps: [
      steps.update(v2, { check: true, restart: "reboot" }),
      steps.restarted(),
      steps.countStart(),
      steps.reopen(),
      steps.countStart(),
      steps.rollBack(),
      steps.restarted(),
    ],
  },
  {
    name: "trial that ends well",
    before: [steps.update(v1), steps.update(v2), steps.rollBack()],
    steps: [
      steps.update(v3, { check: true }),
      steps.countStart(),
      steps.confirm(),
      steps.reopen(),
      steps.rollBack(),
    ],
  },
  {
    name: "changes of type",
    before: [
      steps.app({ "a.own": "own", "f.own/": "" }),
      steps.update({
        version: "1",
        files: { a: "file a", "b/c/d": "d", "b/e": "e", "f/g": "file g", "f/h/i/j": "j", k: "k" },
      }),
    ],
    steps: [
      steps.update({
        version: "2",
        files: { "a/b/c": "c", "a/d": "a/d", b: "file b", "f/g/x": "x", "f/h": "file h", k: "kk" },
      }),
      steps.rollBack(),
    ],
  },
  {
    name: "changes of type, and the application is in the way back",
    before: [
      steps.app({ "own/": "" }),
      steps.update({ version: "1", files: { "a/b": "file b", c: "c", "d/e/f": "f", "d/g": "g" } }),
    ],
    steps: [
      steps.update({ version: "2", files: { "a/b/c/x": "x", "a/b/d": "d", c: "c2", "d/g": "g2" } }),
      steps.app({ "a/b/c/own": "precious", "d/e": "a file" }),
      steps.rollBack(),
    ],
    displaced: ["a file", "precious"],
  },
  {
    name: "a file where an empty directory is",
    before: [
      steps.update({ version: "1", files: { "a/x": "x", "b/y": "y", "b/z/q": "q" } }),
      steps.app({ "b/z/empty/": "" }),
    ],
    steps: [
      steps.update({ version: "2", files: { "b/y": "y" } }),
      steps.update({ version: "3", files: { "b/y": "y", a: "file a", "b/z": "file z" } }),
      steps.rollBack(),
    ],
  },
  {
    name: "the application removed what is to be put back",
    before: [steps.update(v1)],
    steps: [
      steps.update(v2),
      steps.app({
        "flash/new/one/y.py": null,
        "flash/new/one/": null,
        "flash/main.py": null,
        "boot.py": null,
        "sd/": null,
      }),
      steps.rollBack(),
    ],
  },
  {
    name: "firmware, three times",
    before: [steps.update(v1)],
    steps: [
      steps.update({ ...v1, version: "1.1", firmware: "image 1" }),
      steps.update({ ...v2, version: "1.2", firmware: "image two" }),
      steps.reopen(),
      steps.update({ ...v2, version: "1.3", firmware: "image 3" }),
      steps.rollBack(),
    ],
  },
  {
    name: "firmware, first and taken back",
    before: [steps.update(v1)],
    steps: [steps.update({ ...v2, firmware: "image 1" }, { check: true }), steps.rollBack()],
  },
  {
    name: "firmware, second and taken back",
    before: [steps.update({ ...v1, firmware: "image 1" })],
    steps: [
      steps.update({ ...v2, firmware: "image 2" }, { check: true }),
      steps.countStart(),
      steps.rollBack(),
      steps.update({ ...v3, firmware: "image 3" }),
    ],
  },
  {
    name: "one content under several names",
    before: [steps.update({ version: "1", files: { a: "one", b: "one", "c/d": "one", e: "e" } })],
    steps: [
      steps.update({
        version: "2",
        files: { a: "two", b: "two", "c/d": "one", e: "two", f: "two" },
      }),
      steps.app({ a: "changed" }),
      steps.rollBack(),
    ],
  },
  {
    name: "the same again",
    before: [steps.app(own), steps.update(v1)],
    steps: [steps.update(v1, { whole: true }), steps.update(v2), steps.update(v2, { whole: true })],
  },
  {
    name: "second update, then back",
    before: [steps.app(own), steps.update(v1)],
    steps: [steps.update(v2), steps.update(v3, { check: true }), steps.rollBack()],
  },
  {
    name: "modes",
    before: [
      steps.update({ version: "1", files: { run: "run 1", "lib/tool": "tool 1", own: "x" } }),
      steps.chmod("run", 0o755),
      steps.chmod("lib/tool", 0o500),
      steps.chmod("own", 0o400),
    ],
    steps: [
      steps.update({
        version: "2",
        files: { run: "run 2", "lib/x/tool": "tool 1", new: "run 2", own: "run 2" },
      }),
      steps.rollBack(),
    ],
  },
  {
    name: "another release with the same content",
    closely: 40,
    before: [
      steps.update(v1),
      steps.update(v2, { check: true, restart: "reboot" }),
      steps.countStart(),
      steps.confirm(),
      steps.restarted(),
    ],
    steps: [steps.record("1.0.1.1"), steps.reopen()],
  },
  {
    name: "the same release, recorded again",
    before: [steps.update(v1), steps.update(v2)],
    steps: [steps.record("1.0.1"), steps.reopen(), steps.rollBack()],
  },
  {
    name: "the application takes the place of what was taken back",
    before: [steps.update(v1), steps.update(v2)],
    steps: [
      steps.rollBack(),
      steps.app({ "flash/new/two.py": "own", "flash/lib/own.py": "own", "boot.py": "changed" }),
      steps.reopen(),
    ],
  },
  {
    name: "repair of damaged files, and back to the release before",
    before: [steps.app(own), steps.update(v1), steps.update(v2), steps.app(damage)],
    steps: [steps.update(v2, { repair: true }), steps.reopen(), steps.rollBack()],
  },
  {
    name: "repair on trial, twice",
    repairs: true,
    before: [steps.update(v1), steps.update(v2), steps.app(damage)],
    steps: [
      steps.update(v2, { repair: true, check: true, restart: "reboot" }),
      steps.rollBack(),
      steps.reopen(),
      steps.update(v2, { repair: true, check: true }),
      steps.countStart(),
      steps.confirm(),
    ],
  },
  {
    name: "a file of the application where a release adds one",
    before: [steps.app(own), steps.update(v1)],
    steps: [
      steps.app({ "flash/new/two.py": "of the application" }),
      steps.update(v2),
      steps.reopen(),
      steps.rollBack(),
      steps.update(v2, { check: true }),
      steps.confirm(),
    ],
  },
  {
    name: "repair that fails its check at once",
    closely: 6,
    before: [steps.app(own), steps.update(v1), steps.update(v2), steps.damage("state.json")],
    steps: [steps.update(v3, { whole: true, check: true }), steps.rollBack()],
  },
  {
    name: "repair that ends well, and a release after it that fails its check",
    before: [steps.app(own), steps.update(v1), steps.update(v2), steps.damage("state.json")],
    steps: [
      steps.update(v3, { whole: true, check: true }),
      steps.confirm(),
      steps.update(v1, { check: true }),
      steps.rollBack(),
      steps.rollBack(),
    ],
  },
  ...(["state.json", "journal.json", "state.json on the way back"] as const).map((what) => ({
    name: `repair of a damaged ${what}`,
    before: [
      steps.app(own),
      steps.update(v1),
      steps.update(v2),
      what === "journal.json"
        ? steps.damage("journal.json")
        : steps.damage("state.json", what !== "state.json"),
    ],
    steps: [
      steps.update({ ...v3, firmware: "image" }, { whole: true }),
      steps.reopen(),
      steps.rollBack(),
    ],
  })),
];

for (const links of [true, false]) {
  const kind = `${links ? "with" : "without"} hard links`;
  describe(`crash at every operation, ${kind}`, () => {
    for (const scenario of scenarios) {
      test(scenario.name, () => tryCrashes(scenario, links, EFFORT), TIMEOUT);
    }
  });
  describe(`an operation fails, ${kind}`, () => {
    for (const scenario of scenarios) {
      test(scenario.name, () => tryFaults(scenario, links, EFFORT.faults), TIMEOUT);
    }
    for (const scenario of scenarios.slice(0, 4)) {
      test(`full disk: ${scenario.name}`, () => tryCapacities(scenario, links), TIMEOUT);
    }
  });
}

// ── Random trees. ──

const CONTENTS = ["", "one", "two", "three", "four!", "a longer text", "another longer text"];

/** Paths of which none is in the way of another. */
function randomFiles(random: Random, from: Files): Files {
  const files: Files = {};
  const add = (path: string, text: string): void => {
    const isInTheWay = (other: string): boolean => {
      return `${other}/`.startsWith(`${path}/`) || `${path}/`.startsWith(`${other}/`);
    };
    if (!Object.keys(files).some(isInTheWay)) files[path] = text;
  };
  for (const [path, text] of Object.entries(from)) if (random.chance(0.6)) add(path, text);
  for (let n = random.below(8); n >= 0; n--) {
    const parts = Array.from({ length: 1 + random.below(4) }, () => random.pick(["a", "b", "c"]));
    add(parts.join("/"), random.pick(CONTENTS));
  }
  for (const path of Object.keys(files))
    if (random.chance(0.3)) files[path] = random.pick(CONTENTS);
  return files;
}

/** Whether an update would not have to touch what the application made. */
function isPossible(world: World, release: Release): boolean {
  const { put, remove } = difference(world, release, {});
  const stays = [...world.files.keys()].filter((path) => !remove.includes(path));
  return [...put.keys()].every((path) => {
    return stays.every((other) => {
      return !other.startsWith(`${path}/`) && !path.startsWith(`${other}/`);
    });
  });
}

function randomStep(random: Random, world: World, n: number): Step {
  if (world.undo && random.chance(0.25)) {
    const { files } = rolledBack(world);
    const isOwn = (path: string): boolean => path.includes("own");
    const isMovedAside = [...world.files.keys()].some((path) => isOwn(path) && !files.has(path));
    if (!isMovedAside) return steps.rollBack();
  }
  if (world.starts !== null) return random.pick([steps.countStart(), steps.confirm()]);
  if (random.chance(0.3)) {
    const changes: Record<string, string | null> = {};
    const directory = random.pick([...world.directories, "own"]);
    changes[`${directory}/own-${n}`] = random.pick(CONTENTS);
    if (random.chance(0.3)) changes[`${directory}/own-${n}-empty/`] = "";
    for (const path of world.files.keys()) {
      if (random.chance(0.1)) changes[path] = random.chance(0.5) ? null : "changed";
    }
    return steps.app(changes);
  }
  if (random.chance(0.1)) return steps.reopen();
  for (;;) {
    const old = world.installed?.files ?? {};
    const known = Object.keys(old).map((path) => {
      return [path, world.files.get(path)?.replace(/^\d+ /, "") ?? ""] as const;
    });
    const release: Release = {
      version: `1.${n}`,
      files: randomFiles(random, Object.fromEntries(known)),
    };
    if (random.chance(0.3)) release.firmware = `firmware ${n}`;
    if (!isPossible(world, release)) continue;
    const options: UpdateOptions = { check: random.chance(0.4) };
    if (random.chance(0.3)) options.restart = "reboot";
    return steps.update(release, options);
  }
}

function randomScenario(seed: number): Scenario {
  const random = new Random(seed);
  let world = EMPTY_WORLD;
  let n = 0;
  const some = (count: number): Step[] => {
    return Array.from({ length: count }, () => {
      const step = randomStep(random, world, n++);
      world = step.then(world);
      return step;
    });
  };
  return {
    name: `random tree (repeat it with SEED=${seed})`,
    before: some(random.below(4)),
    steps: some(2 + random.below(4)),
  };
}

test(
  "random trees, random changes, random crashes and faults",
  async () => {
    for (let seed = SEED; seed < SEED + TREES; seed++) {
      counts.trees++;
      const random = new Random(seed);
      const scenario = randomScenario(seed);
      const stage = await prepare(scenario, random.chance(0.7));
      const whole = stage.start.clone();
      const { error } = await play(whole, scenario.steps, stage.worlds);
      if (error) wrong(scenario.name, Bun.inspect(error));
      await playOn(stage.start.clone(), stage, 0, scenario.name, true);
      for (let tries = 0; tries < 8; tries++) {
        const at = 1 + random.below(whole.changes);
        await crash(stage, at, random.chance(0.3), random, { again: 0.05, on: 0.5 });
      }
      for (let tries = 0; tries < 8; tries++) {
        const disk = stage.start.clone();
        const fault = { ...random.pick(FAULTS), at: 1 + random.below(whole.operations) };
        disk.fault = fault;
        const outcome = await play(disk, scenario.steps, stage.worlds);
        disk.fault = undefined;
        if (disk.strikes === 0) continue;
        counts.faults++;
        const where = `${scenario.name}: ${Bun.inspect(fault)}`;
        await goOn(disk, stage, outcome, !fault.lasting, where);
      }
    }
    expect(counts.trees).toBeGreaterThan(10);
  },
  TIMEOUT,
);

// ── Syncs: as many as it takes, and not more. ──

/** Counts how many syncs are under way at once. */
class CountingDisk extends MemoryDisk {
  most = 0;
  #now = 0;

  override async sync(path: string): Promise<void> {
    this.most = Math.max(this.most, ++this.#now);
    await super.sync(path);
    this.#now--;
  }
}

/** The syncs of an update: path → how many. Names that are made at random are replaced. */
async function syncsOf(from: Release, to: Release, links = true) {
  const disk = new CountingDisk({ links });
  const world = updated(EMPTY_WORLD, from);
  const player = { disk, journal: await open(disk), world: EMPTY_WORLD };
  await update(player, from, {});
  disk.log = [];
  disk.most = 0;
  await update({ ...player, world }, to, {});
  const paths = disk.log.filter(({ name }) => name === "sync").map(({ path }) => path);
  const syncs = new Map<string, number>();
  for (const path of paths) {
    const short = path
      .replace(/backup-[-0-9a-f]+/, "backup")
      .replace(/[0-9a-f]{64}/, (hash) => hash.slice(0, 8));
    syncs.set(short, (syncs.get(short) ?? 0) + 1);
  }
  return { syncs: Object.fromEntries(syncs), most: disk.most };
}

const short = (text: string): string => sha256(text).slice(0, 8);

describe("syncs", () => {
  test("one for each staged file, one for each directory touched", async () => {
    const { syncs } = await syncsOf(v1, v2);
    const staged = ["boot 2", "main two", "moved", "y", "two"].map((text) => {
      return [`.ota/staged/${short(text)}.part`, 1];
    });
    expect(syncs).toEqual({
      ...Object.fromEntries(staged),
      "": 1,
      flash: 1,
      "flash/new": 1,
      "flash/new/one": 1,
      sd: 1,
      // Before the journal, with it, with the record.
      ".ota": 3,
      ".ota/backup": 1,
      ".ota/staged": 2,
      ".ota/commit.json.new": 1,
      ".ota/state.json.new": 1,
    });
  });

  test("copies, where there are no links, and firmware", async () => {
    const from = { version: "1", files: { a: "a", b: "b", "c/d": "d" }, firmware: "image 1" };
    const to = { version: "2", files: { a: "aa", b: "aa" }, firmware: "image 2" };
    const { syncs } = await syncsOf(from, to, false);
    expect(syncs).toEqual({
      [`.ota/staged/${short("aa")}.part`]: 1,
      [`.ota/staged/${short("aa")}.1`]: 1,
      [`.ota/staged/${short("image 2")}.part`]: 1,
      [`.ota/staged/${short('{"version":"2","slot":1}\n')}.part`]: 1,
      "": 1,
      c: 1,
      // Before the journal, with it, with the slots, with the record.
      ".ota": 4,
      // a, b, otadata and c/d; the inactive slot is empty.
      ".ota/backup/0": 1,
      ".ota/backup/1": 1,
      ".ota/backup/2": 1,
      ".ota/backup/3": 1,
      ".ota/backup": 1,
      ".ota/staged": 2,
      ".ota/commit.json.new": 1,
      ".ota/state.json.new": 1,
    });
  });

  test("300 files take as many more as there are files, several at once", async () => {
    const files = (text: string): Files => {
      const entries = Array.from({ length: 300 }, (_, i) => [`d${i % 50}/${i}`, `${text} ${i}`]);
      return Object.fromEntries(entries);
    };
    const { syncs, most } = await syncsOf(
      { version: "1", files: files("one") },
      { version: "2", files: files("two") },
    );
    // The root's own directory is not touched: nothing in it comes or goes.
    const total = Object.values(syncs).reduce((sum, n) => sum + n, 0);
    expect(total).toBe(300 + 50 + 8);
    expect(most).toBeWithin(2, 65);
  });
});

// ── What else the journal promises. ──

/** A journal on a new disk, with a release installed. */
async function opened(release?: Release, options?: UpdateOptions) {
  const disk = new MemoryDisk();
  const journal = await open(disk);
  const player = { disk, journal, world: EMPTY_WORLD };
  if (release) {
    await update(player, release, options ?? {});
    player.world = updated(EMPTY_WORLD, release, options);
  }
  return player;
}

describe("opening", () => {
  test("makes its directories durably", async () => {
    const { disk, journal } = await opened();
    const syncs = disk.log.filter(({ name }) => name === "sync").map(({ path }) => path);
    expect(syncs).toEqual(["", ".ota"]);
    journal[Symbol.dispose]();
    disk.log = [];
    await open(disk);
    expect(disk.log.map(({ name }) => name)).toEqual(["lock"]);
  });

  test("makes its root, and what is above it, durably", async () => {
    const top = mkdtempSync(join(tmpdir(), "journal-"));
    const sync = spyOn(promises, "open");
    try {
      const root = `${top}/a/b`;
      (await open(fileSystem(root), root))[Symbol.dispose]();
      expect(sync.mock.calls.map(([path]) => path as string)).toEqual([
        top,
        `${top}/a`,
        root,
        `${root}/.ota`,
      ]);
    } finally {
      sync.mockRestore();
      rmSync(top, { recursive: true });
    }
  });

  test("only one process has a root open; its end frees it", async () => {
    const { disk, journal } = await opened(v1);
    await expect(open(disk)).rejects.toThrow(`${ROOT} is in use by another ota.ts`);
    expect(peekState(new DeviceFiles(ROOT, disk)).installed?.version).toBe("1.0.0");
    journal[Symbol.dispose]();
    (await open(disk))[Symbol.dispose]();
    const { disk: killed } = await opened(v1);
    expect((await open(killed.kill())).state.installed?.version).toBe("1.0.0");
  });

  test("a root that is a file, or cannot be written", async () => {
    const directory = mkdtempSync(join(tmpdir(), "journal-"));
    const file = `${directory}/file`;
    writeFileSync(file, "text");
    const opening = open(fileSystem(file), file);
    await expect(opening).rejects.toThrow(
      `cannot use ${file} as a device's root: it is not a directory`,
    );
    rmSync(directory, { recursive: true });
    const disk = new MemoryDisk();
    disk.chmod("", 0o555);
    await expect(open(disk)).rejects.toThrow(OTAError);
  });

  test("records of a newer ota.ts are left alone", async () => {
    const { disk, journal } = await opened(v1);
    journal[Symbol.dispose]();
    const path = ".ota/state.json";
    disk.write(path, encode('{"format":3}'));
    await expect(open(disk)).rejects.toThrow(/format 3.*newer ota\.ts/);
    expect(decode(disk.read(path, 0, 100))).toBe('{"format":3}');
    disk.unlink(path); // The lock was given back.
    (await open(disk))[Symbol.dispose]();
  });

  test("a record that makes no sense is set aside as it was", async () => {
    for (const text of ["", "{", "[]", '{"format":1}', "\0\0\0\0", "null"]) {
      const { disk, journal } = await opened(v1);
      journal[Symbol.dispose]();
      disk.write(".ota/state.json", encode(text));
      const again = await open(disk);
      expect(again.damaged).toHaveLength(1);
      expect(decode(disk.read(again.damaged[0]!, 0, 100))).toBe(text);
      expect(again.canRollBack).toBe(false);
      expect(again.recovered).toBe(false);
    }
  });
});

describe("what a change that was cut off needs is gone", () => {
  /** A device on v1 that was killed in an update to v2, with files of it in place. */
  async function cutOff(): Promise<MemoryDisk> {
    const disk = new MemoryDisk();
    const player = { disk, journal: await open(disk), world: EMPTY_WORLD };
    await update(player, v1, {});
    player.world = updated(EMPTY_WORLD, v1);
    const placing = (path: string): boolean => disk.stat(path) !== undefined;
    for (let at = 1; ; at++) {
      const left = disk.clone();
      left.crashAt(at, false);
      const journal = await open(left).catch(() => undefined);
      if (journal) await update({ ...player, disk: left, journal }, v2, {}).catch(() => {});
      const killed = left.kill();
      const names = killed.list(".ota");
      const isPlaced = killed.stat("flash/new/one/y.py") !== undefined;
      if (names.includes("commit.json") && isPlaced) return killed;
      expect(placing("flash/main.py")).toBe(true);
    }
  }

  const remove = (disk: MemoryDisk, prefix: string): void => {
    for (const name of disk.list(".ota").filter((name) => name.startsWith(prefix))) {
      for (const file of disk.list(`.ota/${name}`)) disk.unlink(`.ota/${name}/${file}`);
    }
  };

  test("new content: it goes back", async () => {
    const disk = await cutOff();
    remove(disk, "staged");
    const journal = await open(disk);
    expect(journal.state.installed?.version).toBe("1.0.0");
    expect([...lookAtTree(disk).files].sort()).toEqual(
      Object.entries(v1.files)
        .map(([path, text]) => [path, `644 ${text}`] as [string, string])
        .sort(),
    );
    expect(journal.damaged).toEqual([]);
  });

  test("old content, too: nothing is done, and a repair helps", async () => {
    const disk = await cutOff();
    remove(disk, "staged");
    remove(disk, "backup");
    const before = lookAtTree(disk);
    const journal = await open(disk);
    expect(lookAtTree(disk)).toEqual(before);
    expect(() => journal.refuseDamage()).toThrow(/\.ota\/backup-.* is gone.*\n.*--repair/);
    await update({ disk, journal, world: EMPTY_WORLD }, v2, { whole: true });
    expect(journal.damaged).toEqual([]);
    expect(lookAtTree(disk).files.get("flash/main.py")).toBe("644 main two");
  });
});

describe("a damaged record is repaired, and the power fails", () => {
  /** What power cuts leave at each change that a task makes, and after its end. */
  async function* cuts(disk: MemoryDisk, task: (disk: MemoryDisk) => Promise<unknown>) {
    for (let at = 1, isOver = false; !isOver; at++) {
      const left = disk.clone();
      left.crashAt(at);
      await task(left).catch((error) => expect(error).toBeInstanceOf(Crash));
      isOver = !left.isDead;
      for (const found of left.cutsOfOne()) yield { found, isOver };
    }
  }

  const isCorrupt = (name: string): boolean => name.endsWith(".corrupt");

  test("twice, while the repair is taken back: the damaged record counts no more", async () => {
    const player = await opened(v1);
    await steps.damage("state.json").do(player);
    await update({ ...player, world: EMPTY_WORLD }, v3, { whole: true, check: true });
    // The first time, of what was not synced only the mark of the way back reached the disk.
    const left = player.disk.powerCut("drop", new Random(SEED));
    left.rename(".ota/commit.json", ".ota/rollback.json");
    left.settle();
    expect(left.list(".ota").filter(isCorrupt)).toHaveLength(1);
    let tried = 0;
    for await (const { found } of cuts(left, open)) {
      const { state, damaged } = await open(found);
      const { installed, trial } = state;
      const failed = state.failed.map(({ version }) => version);
      expect({ damaged, installed, trial, failed }).toEqual({
        ...{ damaged: [], installed: null, trial: null, failed: [v3.version] },
      });
      tried++;
    }
    expect(tried).toBeGreaterThan(50);
  });

  test("not that one, but a release is taken back: it still counts", async () => {
    const player = await opened(v1);
    await update(player, v2, { check: true });
    await steps.damage("journal.json").do(player);
    await player.journal.rollBack();
    expect(player.journal.state.installed?.version).toBe("1.0.0");
    expect(player.journal.damaged).toHaveLength(1);
    expect((await open(player.disk.kill())).damaged).toHaveLength(1);
  });

  test("when only a record is made: what was under way before is not done over it", async () => {
    const player = await opened(v1);
    await update(player, v2, { check: true });
    await steps.damage("state.json").do(player);
    // What is left of the trial would bring v1 back: not all of v2 is there.
    appChange(player.disk, "flash/main.py", "edited");
    player.disk.settle();
    player.journal[Symbol.dispose]();
    const { files } = lookAtTree(player.disk);
    const installed = installedBy(EMPTY_WORLD, v2);
    const record = async (disk: MemoryDisk): Promise<void> => {
      using journal = await open(disk);
      await journal.record(installed);
    };
    for await (const { found, isOver } of cuts(player.disk, record)) {
      const first = await open(found);
      const { damaged, recovered } = first;
      first[Symbol.dispose]();
      expect({ damaged: isOver && damaged.length > 0, recovered }).toEqual({
        ...{ damaged: false, recovered: false },
      });
      // Cut off, it can be done again.
      if (damaged.length > 0) await record(found);
      using journal = await open(found);
      const { state, canRollBack } = journal;
      expect({ ...state, canRollBack, damaged: journal.damaged }).toMatchObject({
        ...{ installed, journal: null, trial: null, canRollBack: false, damaged: [] },
      });
      expect(lookAtTree(found).files).toEqual(files);
      expect(found.list(".ota").filter((name) => /^backup|commit|journal/.test(name))).toEqual([]);
    }
  });
});

describe("staging", () => {
  test("a part is taken up where it ended, in another process", async () => {
    const { disk, journal } = await opened();
    const key = sha256("all of it");
    const partial = journal.staging.partial(key);
    expect(partial.size).toBe(0);
    partial.start('"tag"');
    partial.append(encode("all"));
    const { staging } = await open(disk.kill());
    const later = staging.partial(key);
    expect(later).toMatchObject({ size: 3, etag: '"tag"' });
    expect(staging.has(key)).toBe(false);
    later.append(encode(" of it"));
    await later.finish();
    expect(staging.has(key)).toBe(true);
    expect(staging.partial(key).size).toBe(0);
    const other = staging.partial(sha256("x"));
    other.start();
    other.drop();
    expect(disk.list(".ota/staged").length).toBe(2);
  });

  test("nothing outside .ota changes, and what going back needs stays", async () => {
    const player = await opened(v1, { check: true });
    const before = look(player.disk, player.journal);
    for (const text of Object.values(v2.files)) await stage(player.journal, text);
    expect(look(player.disk, player.journal)).toEqual(before);
    await player.journal.rollBack();
    expect(look(player.disk, player.journal)).toEqual(visible(rolledBack(player.world)));
    const names = player.disk.list(".ota");
    expect(names.filter((name) => name.startsWith("backup-"))).toEqual([]);
  });
});

describe("preflight", () => {
  const refusals: [name: string, make: (disk: MemoryDisk) => void, put: string[], error: RegExp][] =
    [
      ["another file system", (disk) => disk.mount("sd"), ["sd/x"], /change sd .*file system/],
      ["a link", (disk) => disk.symlink("sd"), ["sd/x"], /sd /],
      [
        "a file where a directory must be",
        (disk) => appChange(disk, "a/b", ""),
        ["a/b/c"],
        /a\/b .*way/,
      ],
      [
        "a directory with a file in it",
        (disk) => appChange(disk, "a/b/own", ""),
        ["a"],
        /a\/b\/own/,
      ],
      ["no permission", (disk) => (disk.mkdir("a"), disk.chmod("a", 0o555)), ["a/x"], /permission/],
      ["no permission at the top", (disk) => disk.chmod("", 0o555), ["x"], /permission/],
    ];
  for (const [name, make, put, error] of refusals) {
    test(name, async () => {
      const { disk, journal } = await opened(v1);
      preflight(journal.files, put, []);
      make(disk);
      expect(() => preflight(journal.files, put, [])).toThrow(error);
      expect(() => preflight(journal.files, put, [])).toThrow(OTAError);
    });
  }

  test("what is to be deleted must be a file", async () => {
    const { disk, journal } = await opened(v1);
    preflight(journal.files, [], ["boot.py"]);
    expect(() => preflight(journal.files, [], ["flash"])).toThrow(/flash .*not a regular file/);
    expect(() => preflight(journal.files, [], ["nothing"])).toThrow(/nothing .*not a regular file/);
    appChange(disk, "flash/own/", "");
  });
});

describe("going back", () => {
  test("once, and not without a release to go back to", async () => {
    const { journal } = await opened();
    await expect(journal.rollBack()).rejects.toThrow(/no previous release/);
    const player = await opened(v1);
    await player.journal.rollBack();
    await expect(player.journal.rollBack()).rejects.toThrow(/no previous release/);
  });

  test("files that would be overwritten, and that the application changed", async () => {
    const player = await opened(v1);
    await update(player, v2, {});
    const { disk, journal } = player;
    expect(journal.changedSinceCommit()).toEqual([]);
    appChange(disk, "flash/new/own", "own");
    appChange(disk, "flash/new/two.py", null);
    expect(journal.changedSinceCommit()).toEqual([]);
    appChange(disk, "flash/main.py", "changed");
    appChange(disk, "flash/new/one/y.py", "changed, too");
    appChange(disk, "sd/only.bin", "made again");
    expect(journal.changedSinceCommit().sort()).toEqual([
      "flash/main.py",
      "flash/new/one/y.py",
      "sd/only.bin",
    ]);
  });

  test("the latest 16 failures are remembered", async () => {
    const player = await opened(v1);
    for (let n = 1; n <= 18; n++) {
      const files = { ...v1.files, n: String(n) };
      await update(player, { version: `2.${n}`, files }, { check: true });
      await player.journal.rollBack();
    }
    const versions = player.journal.state.failed.map(({ version }) => version);
    expect(versions).toEqual(Array.from({ length: 16 }, (_, i) => `2.${i + 3}`));
  });

  test("old content is linked, not copied, where that is possible", async () => {
    const player = await opened(v1);
    player.disk.log = [];
    await update(player, v3, {});
    expect(player.disk.log.filter(({ name }) => name === "copy")).toEqual([]);
  });
});

// ── The disk in memory is as good as these tests: it must do what a real one does. ──

describe("the disk in memory", () => {
  test("does what this machine's file system does, errors included", () => {
    const random = new Random(SEED);
    const top = mkdtempSync(join(tmpdir(), "memory-disk-"));
    try {
      for (let round = 0; round < 30; round++) {
        const root = `${top}/${round}`;
        mkdirSync(root);
        const real = fileSystem(root);
        const memory = new MemoryDisk();
        const names = ["a", "b", "a/x", "a/y", "b/x", "a/x/1", "b/x/1", "b/x/2"];
        for (let n = 0; n < 80; n++) {
          const [path, other] = [random.pick(names), random.pick(names)];
          const text = encode(random.pick(CONTENTS));
          const mode = random.pick([0o755, 0o700]); // As root one would not notice others.
          const name = random.pick(Object.keys(attempts));
          const results = [real, memory].map((disk) => {
            return attempt(() => attempts[name]!(disk, path, other, text, mode));
          });
          if (!same(results[0], results[1])) {
            wrong(`${name} ${path} ${other}`, "differs", results[1], [results[0]]);
          }
        }
        const trees = [real, memory].map((disk) => treeOf(disk, ""));
        expect(trees[1]).toEqual(trees[0]!);
      }
    } finally {
      rmSync(top, { recursive: true, force: true });
    }
  });

  test("loses what was not synced, and nothing else", async () => {
    const random = new Random(SEED);
    const disk = new MemoryDisk();
    disk.mkdir("d");
    disk.write("d/a", encode("a"));
    await disk.sync("d/a");
    expect([...disk.powerCut("drop", random).walk("").keys()]).toEqual([]);
    await disk.sync("d"); // Its own creation, too.
    disk.write("d/b", encode("b"));
    await disk.sync("d/b");
    disk.append("d/a", encode("more"));
    expect([...disk.powerCut("drop", random).walk("").keys()]).toEqual(["d", "d/a"]);
    expect(decode(disk.powerCut("drop", random).read("d/a", 0, 9))).toBe("a");
    disk.rename("d/b", "d/a");
    await disk.sync("d");
    expect([...disk.powerCut("drop", random).walk("").keys()]).toEqual(["d", "d/a"]);
    expect(decode(disk.powerCut("drop", random).read("d/a", 0, 9))).toBe("b");
    expect([...disk.kill().walk("").keys()]).toEqual([...disk.walk("").keys()]);
  });

  test("loses any of what was not synced, in any order, but a rename wholly or not", async () => {
    const random = new Random(SEED);
    const disk = new MemoryDisk();
    for (const name of ["a", "b"]) disk.write(name, encode(name));
    disk.settle();
    disk.rename("a", "c");
    disk.unlink("b");
    disk.write("d", encode("dd"));
    const seen = (how: PowerCut): string[] => {
      const found = Array.from({ length: 300 }, () => {
        return [...disk.powerCut(how, random).walk("").keys()].join("");
      });
      return [...new Set(found)].sort();
    };
    expect(seen("drop")).toEqual(["ab"]);
    expect(seen("prefix")).toEqual(["ab", "bc", "c", "cd"]);
    // In turn: no rename, no unlink, no new file.
    expect(seen("one")).toEqual(["ad", "bcd", "c"]);
    const each = [...disk.cutsOfOne()].map((image) => [...image.walk("").keys()].join(""));
    expect(each).toEqual(["ad", "bcd", "c", "cd"]);
    expect(seen("subset")).toEqual(["a", "ab", "abd", "ad", "bc", "bcd", "c", "cd"]);
    const contents = Array.from({ length: 300 }, () => {
      const image = disk.powerCut("subset", random);
      return image.stat("d") ? decode(image.read("d", 0, 9)) : "none";
    });
    expect([...new Set(contents)].sort()).toEqual(["", "\0\0", "d", "d\0", "dd", "none"]);
  });

  test("after the process died, nothing more is done", () => {
    const disk = new MemoryDisk();
    disk.write("a", encode("four"));
    disk.crashAt(1, true);
    expect(() => disk.write("b", encode("four"))).toThrow(Crash);
    expect(() => disk.unlink("a")).toThrow(Crash);
    expect(() => disk.stat("a")).toThrow(Crash);
    expect([...disk.walk("")].map(([path, { data }]) => path + decode(data))).toEqual([
      "afour",
      "bfo",
    ]);
  });
});

type Attempt = (disk: Disk, path: string, other: string, text: Uint8Array, mode: number) => unknown;

const attempts: Record<string, Attempt> = {
  stat: (disk, path) => statOf(disk, path),
  list: (disk, path) => disk.list(path).sort(),
  read: (disk, path) => decode(disk.read(path, 1, 5)),
  write: (disk, path, _, text) => disk.write(path, text),
  append: (disk, path, _, text) => disk.append(path, text),
  link: (disk, path, other) => disk.link(path, other),
  copy: (disk, path, other) => disk.copy(path, other),
  rename: (disk, path, other) => disk.rename(path, other),
  unlink: (disk, path) => disk.unlink(path),
  mkdir: (disk, path) => disk.mkdir(path),
  rmdir: (disk, path) => disk.rmdir(path),
  chmod: (disk, path, _other, _text, mode) => disk.chmod(path, mode),
};

function statOf(disk: Disk, path: string): unknown {
  const stat = disk.stat(path);
  return stat && { kind: stat.kind, mode: stat.mode, size: stat.kind === "file" ? stat.size : 0 };
}

/** What a task returned, or the code of what it threw. */
function attempt(task: () => unknown): unknown {
  try {
    return task();
  } catch (error) {
    return error instanceof Error && "code" in error ? error.code : error;
  }
}

function treeOf(disk: Disk, path: string): unknown[] {
  return disk
    .list(path)
    .sort()
    .flatMap((name): unknown[] => {
      const at = path === "" ? name : `${path}/${name}`;
      const stat = disk.stat(at)!;
      if (stat.kind === "directory") return [name, statOf(disk, at), treeOf(disk, at)];
      return [name, statOf(disk, at), decode(disk.read(at, 0, stat.size))];
    });
}

afterAll(() => {
  console.log(
    `journal: ${counts.crashes} crashes, ${counts.recoveries} crashes in recoveries, ` +
      `${counts.faults} faults, ${counts.trees} random trees`,
  );
});
