/** What happens in a year: the kinds of steps. */

import * as fs from "node:fs";
import { eventually, injecting, Serving, Tool } from "../helpers/tool.ts";
import { Line } from "./between.ts";
import * as checks from "./checks.ts";
import * as model from "./model.ts";
import { areAtOdds, readTree, removeFile, writeFile, writeTree } from "./releases.ts";
import { Device, WAYS, type Run, type World } from "./world.ts";

const anyDevice = ({ random, devices }: World): Device => random.pick(devices);

/** What a run of `client` does now, undisturbed. */
function expect(world: World, device: Device, retry = false): model.Expected {
  device.model = world.known(device);
  return undisturbed(world, device, retry);
}

/** The same, where what the device knows has been told. */
function undisturbed(world: World, device: Device, retry = false): model.Expected {
  return model.afterUpdate(device.model, world.offered, { ...device, ...world, retry });
}

/** Runs `client` undisturbed. */
export async function poll(world: World, device: Device, run: Run = {}): Promise<void> {
  const expected = expect(world, device, run.retry);
  // A repair from a server that has only older releases may be refused.
  const { newest } = world.offered;
  const isBehind = run.repair && model.isNewer(device.model.version ?? "0", newest!.version);
  if (isBehind) expected.mayFail = true;
  const ended = await world.update(device, run);
  await checks.settle(world, device, expected, ended);
  if (ended.result === undefined && !isBehind) {
    // The application's files are in the way of directories, or the reverse: its owner moves them.
    for (const path of model.inTheWay(device.model, newest!.tree)) {
      removeFile(device.root, path);
    }
    device.model = { ...device.model, tree: readTree(device.root) };
    return poll(world, device, run);
  }
  await checks.checkPoll(world, device);
}

/** Something ended `client` or `rollback`: the next command puts right what it left. */
async function recover(
  world: World,
  device: Device,
  next: readonly model.Model[],
  then?: () => Promise<void>,
): Promise<void> {
  const { random } = world;
  const models = [...next, device.model];
  const halfDone = () => checks.checkHalfDone(device, readTree(device.root), models);
  halfDone();
  while (random.chance(0.3)) {
    const trouble = { kind: "kill" as const, at: 1 + random.below(60) };
    await world.see(device, trouble).catch(() => {});
    halfDone();
  }
  const seen = await world.see(device);
  device.model = checks.isOneOf("recovered", device, seen, models);
  const isAsBefore = !next.includes(device.model);
  const expected = expect(world, device);
  if (isAsBefore && expected.isGood && then) return then();
  if (seen.pending && !isAsBefore) {
    // Its check is started again.
    const isGood = model.isGoodOn(device.model, world);
    const back = isGood ? [] : model.afterFailure(models.at(-1)!, device.model.offer);
    const trial = { ...expected, endings: back, results: ["rolled back"] };
    await checks.settle(world, device, isGood ? expected : trial, await world.update(device));
  } else {
    // The check may have ended badly before the end came.
    if (!expected.isGood) expected.results.push("not tried");
    await checks.settle(world, device, expected, await world.update(device));
  }
  await checks.checkPoll(world, device);
}

/** Few operations more often than many: an update has some hundred. */
function someOperation({ random }: World): number {
  return 1 + random.below(2 ** (3 + random.below(8)));
}

/** Goes back by hand. */
async function goBack(world: World, device: Device, run: Parameters<World["rollBack"]>[1]) {
  const now = device.model;
  if (model.isRollbackUnclear(now)) return;
  const changed = model.changedSince(now);
  const backs = model.afterRollback(now);
  const ended = await world.rollBack(device, run);
  checks.checkError(device, ended);
  // A damaged slot counts as a file that was changed.
  const { version, hash } = now.firmware ?? {};
  if (world.images.some((image) => image.version === version && image.hash !== hash)) {
    changed.push("the firmware");
  }
  const mayRefuse = backs.length === 0 || now.mayRefuse || (changed.length > 0 && !run?.force);
  const isRefused = ended.result === undefined;
  if (isRefused ? !mayRefuse : backs.length === 0) {
    const back = backs[0] ? (backs[0].version ?? "nothing") : "a refusal";
    const expected = `${back} after rollback (changed: ${changed})`;
    throw new checks.Broken("way back", device, expected, ended.result ?? String(ended.error));
  }
  const seen = await world.see(device);
  const what = `tree after ${isRefused ? "a refused" : "a"} rollback`;
  device.model = checks.isOneOf(what, device, seen, isRefused ? [now] : backs);
  checks.checkRecord(device);
  await checks.checkPoll(world, device);
}

/** The application changes its own files: paths that no release has now, but one may have later. */
function changeOwn(world: World, device: Device): void {
  const { random, garden } = world;
  if (world.without.has("own")) return;
  const now = device.model;
  const taken = [now, ...now.backs].flatMap(({ release, tree }) => [
    ...release.keys(),
    ...tree.keys(),
  ]);
  const own = [...now.tree.keys()].filter((path) => !now.release.has(path));
  for (let i = random.below(3); i >= 0; i--) {
    const path = random.chance(0.4) && own.length > 0 ? random.pick(own) : garden.path();
    const isFree = !now.release.has(path) && !taken.some((other) => areAtOdds(other, path));
    const isThere = fs.existsSync(`${device.root}/${path}`);
    if (!isFree || (isThere && !own.includes(path))) continue;
    if (isThere && random.chance(0.5)) removeFile(device.root, path);
    else writeFile(device.root, path, garden.file());
    taken.push(path);
  }
  device.model = { ...now, tree: readTree(device.root) };
}

/** Files of the release are edited, cut, deleted, made executable or not. */
function damage({ random, garden, without, clock }: World, device: Device): void {
  const paths = [...device.model.release.keys()].filter((path) => device.model.tree.has(path));
  for (let i = random.below(3); i >= 0 && paths.length > 0; i--) {
    const path = random.pick(paths);
    const at = `${device.root}/${path}`;
    const file = device.model.release.get(path)!;
    const kind = random.below(5);
    if (kind === 0) removeFile(device.root, path);
    else if (kind === 1) fs.truncateSync(at, Math.floor(file.content.length / 2));
    else if (kind === 2) writeFile(device.root, path, { ...file, content: garden.file().content });
    else if (kind === 3 && !without.has("executable"))
      fs.chmodSync(at, file.executable ? 0o644 : 0o755);
    else writeFile(device.root, path, garden.edited(file));
    // It is some time later.
    if (fs.existsSync(at)) fs.utimesSync(at, clock.now, clock.now++);
    else paths.splice(paths.indexOf(path), 1);
  }
  device.model = { ...device.model, tree: readTree(device.root) };
}

/** A device is brought along: with its release's tree, or one like it, or without. */
async function bringAlong(world: World, device: Device): Promise<void> {
  const { random } = world;
  const version = random.pick([...world.versions.keys()]);
  const kind = world.without.has("ver") ? 0 : random.below(4);
  fs.mkdirSync(device.root, { recursive: true });
  if (kind > 0) device.ver = version;
  if (kind > 1) writeTree(device.root, world.versions.get(version)!);
  if (kind > 1 && random.chance(0.3) && fs.existsSync(`${device.root}/flash/`)) {
    fs.writeFileSync(`${device.root}/flash/OTA_VERSION.py`, `VERSION = '${version}'\n`);
  }
  device.model = world.forgotten(device);
  if (kind === 3) damage(world, device);
  if (random.chance(0.5)) changeOwn(world, device);
  device.model = world.forgotten(device);
}

/** Puts a new device in the place of one that is there. */
export async function exchange(world: World, place: number): Promise<void> {
  const name = world.name("device-");
  const isOnTrial = world.random.chance(0.5);
  const device = new Device(name, world.temp.at(name), WAYS[place % WAYS.length]!, isOnTrial);
  const old = world.devices[place];
  if (old) fs.rmSync(old.root, { recursive: true });
  world.devices[place] = device;
  await bringAlong(world, device);
}

async function changed(world: World): Promise<void> {
  await world.look();
  await checks.checkServers(world);
}

/** A kind of step, and how often it comes beside the others. */
type Kind = [weight: number, run: (world: World) => Promise<void>];

export const KINDS: Record<string, Kind> = {
  // ── What the owner of the releases does. ──
  publish: [
    8,
    async (world) => {
      world.publish();
      if (world.random.chance(0.2)) world.publishImage();
      await changed(world);
    },
  ],
  image: [2, async (world) => (world.publishImage(), changed(world))],
  "slow-copy": [
    2,
    async (world) => {
      const { version, tree } = world.publish(world.random.next());
      await changed(world);
      await poll(world, anyDevice(world));
      world.rewrite(version, tree);
      await changed(world);
    },
  ],
  rewrite: [
    3,
    async (world) => {
      const { random, versions } = world;
      const { version } = random.chance(0.7)
        ? world.offered.newest!
        : { version: random.pick([...versions.keys()]) };
      world.rewrite(version, world.garden.next(versions.get(version)!, random.chance(0.2)));
      await changed(world);
    },
  ],
  withdraw: [
    1,
    async (world) => {
      const names = [...world.versions.keys()];
      const version = world.random.chance(0.5) ? names[0]! : names.at(-1)!;
      if (names.length > 2) world.withdraw(version);
      await changed(world);
    },
  ],
  clock: [
    1,
    async (world) => {
      const real = Date.now;
      const jump = (world.random.chance(0.5) ? -1 : 1) * 3_600_000;
      Date.now = () => real() + jump;
      try {
        world.publish();
        await changed(world);
      } finally {
        Date.now = real;
      }
    },
  ],
  switch: [
    1,
    async (world) => {
      world.switchRoot();
      world.publish();
      const { version } = world.offered.newest!;
      const isSeen = () => world.servers.every(({ releases }) => releases.find(version));
      if (world.random.chance(0.3)) await eventually(`servers offer ${version}`, isSeen);
      await changed(world);
    },
  ],
  "changed-meanwhile": [
    2,
    async (world) => {
      const device = anyDevice(world);
      const { version, tree } = world.offered.newest!;
      const first = expect(world, device);
      const edit = () => world.rewrite(version, world.garden.next(tree, false));
      await world.update(device, { hurry: true, onContent: edit });
      for (const [path, { hash }] of tree) {
        const now = world.versions.get(version)!.get(path)?.hash;
        const url = `${world.url("server")}/${version}/${encodeURIComponent(path)}`;
        if (now) await checks.checkContent(url.replaceAll("%2F", "/"), [hash, now, ""]);
      }
      world.errors.splice(0);
      await changed(world);
      const second = undisturbed(world, device);
      await recover(
        world,
        device,
        [first.next, second.next].filter((next) => next !== undefined),
      );
    },
  ],

  // ── What devices do. ──
  poll: [14, async (world) => poll(world, anyDevice(world))],
  "poll-all": [
    2,
    async (world) => {
      for (const device of world.devices) await poll(world, device);
    },
  ],
  retry: [2, async (world) => poll(world, anyDevice(world), { retry: true })],
  repair: [2, async (world) => poll(world, anyDevice(world), { repair: true })],
  cut: [
    16,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      await world.update(device, { trouble: { kind: "kill", at: someOperation(world) } });
      await recover(world, device, next ? [next] : []);
    },
  ],
  fault: [
    8,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      const kind = world.random.pick(["ENOSPC", "EIO"] as const);
      const ended = await world.update(device, { trouble: { kind, at: someOperation(world) } });
      checks.checkError(device, ended);
      // The way back is what it was.
      const then = world.random.chance(0.5) ? () => goBack(world, device, {}) : undefined;
      await recover(world, device, next ? [next] : [], then);
    },
  ],
  "bad-line": [
    4,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      const breaks = Array.from({ length: world.random.below(8) }, () => someOperation(world) * 40);
      await using line = await Line.start(world.url("server"), breaks);
      await world.update(device, { url: line.url, hurry: true });
      await recover(world, device, next ? [next] : []);
    },
  ],
  rollback: [
    6,
    async (world) => goBack(world, anyDevice(world), { force: world.random.chance(0.3) }),
  ],
  "cut-rollback": [
    3,
    async (world) => {
      const device = anyDevice(world);
      if (model.isRollbackUnclear(device.model)) return;
      const backs = model.afterRollback(device.model);
      await world.rollBack(device, { trouble: { kind: "kill", at: someOperation(world) } });
      await recover(world, device, backs);
    },
  ],

  // ── What happens to devices. ──
  own: [8, async (world) => changeOwn(world, anyDevice(world))],
  damage: [8, async (world) => damage(world, anyDevice(world))],
  slot: [
    2,
    async (world) => {
      const device = anyDevice(world);
      const { firmware } = await world.see(device);
      if (!firmware) return;
      fs.writeFileSync(`${device.root}/${firmware.file}`, "damaged");
      const { hash } = (await world.see(device)).firmware!;
      device.model = { ...device.model, firmware: { version: firmware.version, hash } };
    },
  ],
  "lost-backups": [
    2,
    async (world) => {
      const device = anyDevice(world);
      for (const path of new Bun.Glob(".ota/backup-*/*").scanSync({
        cwd: device.root,
        dot: true,
      })) {
        if (world.random.chance(0.7)) fs.unlinkSync(`${device.root}/${path}`);
      }
      device.model = { ...device.model, mayRefuse: true };
      await goBack(world, device, {});
    },
  ],
  "lost-ota": [
    2,
    async (world) => {
      const device = anyDevice(world);
      fs.rmSync(`${device.root}/.ota`, { recursive: true, force: true });
      device.model = world.forgotten(device);
    },
  ],
  "old-ota": [
    3,
    async (world) => {
      const device = anyDevice(world);
      const at = `${device.root}/.ota`;
      const { copy } = device;
      if (copy) {
        fs.rmSync(at, { recursive: true, force: true });
        fs.cpSync(copy.path, at, { recursive: true });
        device.model = { ...copy.model, tree: device.model.tree, isUnclear: true };
      }
      device.copy = undefined;
      if (copy || !fs.existsSync(at)) return;
      device.copy = { path: world.temp.at(world.name("copy-")), model: device.model };
      fs.cpSync(at, device.copy.path, { recursive: true });
    },
  ],
  "bad-record": [
    1,
    async (world) => {
      const device = anyDevice(world);
      const record = `${device.root}/.ota/state.json`;
      const { firmware } = device.model;
      const forgotten = { ...world.forgotten(device), firmware, isUnclear: true };
      const after = expect(
        world,
        Object.assign(Object.create(device), { model: forgotten }) as Device,
      );
      if (!fs.existsSync(record) || !after.isGood || after.mayFail) return;
      // Nor does it repair from what is older: the record stays damaged.
      const { newest } = world.offered;
      if (!newest || model.isNewer(forgotten.version ?? "0", newest.version)) return;
      fs.truncateSync(record, fs.statSync(record).size >> 1);
      const { result } = await world.update(device);
      if (result) throw new checks.Broken("bad record", device, "a refusal", result);
      device.model = forgotten;
      await poll(world, device, { repair: true });
      // Back is where nothing was recorded.
      device.model = { ...device.model, isUnclear: true };
    },
  ],
  "new-device": [2, async (world) => exchange(world, world.random.below(world.devices.length))],

  // ── The same as processes of their own, which cost a tenth of a second each. ──
  process: [1, async (world) => poll(world, anyDevice(world), { process: true })],
  "process-rollback": [0.5, async (world) => goBack(world, anyDevice(world), { process: true })],
  kill: [
    1.5,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      await using tool = new Tool(world.clientArgs(device));
      const timer = setTimeout(() => tool.kill(), 60 + world.random.below(200));
      await tool.ended;
      clearTimeout(timer);
      await recover(world, device, next ? [next] : []);
    },
  ],
  "kill-at-call": [
    0.7,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      const call = world.random.pick(["rename", "link", "unlink", "fsync", "mkdir"]);
      const prefix = injecting(call, `signal=KILL:when=${1 + world.random.below(12)}`);
      await using tool = new Tool(world.clientArgs(device), { prefix });
      await tool.ended;
      await recover(world, device, next ? [next] : []);
    },
  ],
  "serve-killed": [
    0.5,
    async (world) => {
      const device = anyDevice(world);
      const { next } = expect(world, device);
      await using served = await Serving.start(["--root", world.root, "--host", "127.0.0.1"]);
      const wait = world.random.below(20);
      const onContent = () => void setTimeout(() => void served[Symbol.asyncDispose](), wait);
      await world.update(device, { url: served.url, hurry: true, onContent });
      await recover(world, device, next ? [next] : []);
    },
  ],
};
