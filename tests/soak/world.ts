/** A root of releases, its servers, and the devices that live off them. */

import * as fs from "node:fs";
import {
  DirectoryOTA,
  HttpOTA,
  OTAError,
  rollBack,
  serve,
  status,
  VERSION_FILE,
  type HttpOptions,
  type OTAServer,
  type TransferRequest,
} from "../../ota.ts";
import { sha256 } from "../helpers/content.ts";
import { Random } from "../helpers/random.ts";
import { Temp } from "../helpers/temp.ts";
import { ota, type Ended as Exit } from "../helpers/tool.ts";
import { Cache, hurried, troubled, type Trouble } from "./between.ts";
import { adopted, type Image, type Model, type Offered } from "./model.ts";
import { Gardener, readTree, writeFile, writeTree, type File, type Tree } from "./releases.ts";

/** Where a device gets releases from: a server, one whose URLs name a cache, a cache, a stick. */
export const WAYS = ["server", "url", "cache", "stick"] as const;

/** How a command ended. */
export interface Ended {
  /** What it said of itself, as `Outcome.result` has it; absent: it failed. */
  result?: string;
  error?: unknown;
  notes: string[];
  /** What it asked for, where it ran in this process. */
  asked: string[];
}

/** How to run a client. */
export interface Run {
  retry?: boolean;
  repair?: boolean;
  /** Another address than that of its server. */
  url?: string;
  /** As a process of its own. */
  process?: boolean;
  trouble?: Trouble;
  /** Pauses between tries are short. */
  hurry?: boolean;
  /** Called when content is asked for, for the first time. */
  onContent?: () => void;
}

/** A device: a directory, and how it is run. */
export class Device {
  /** What its unit file says. */
  ver: string | undefined;
  /** An old copy of `.ota`, with what was true then. */
  copy: { path: string; model: Model } | undefined;
  model: Model;

  constructor(
    readonly name: string,
    readonly root: string,
    readonly way: (typeof WAYS)[number],
    /** Puts releases on trial. */
    readonly check: boolean,
  ) {
    this.model = this.nothing();
  }

  /** A device that knows nothing of itself. */
  nothing(): Model {
    const empty: Tree = new Map();
    return {
      ...{
        version: null,
        release: empty,
        tree: empty,
        firmware: null,
        offer: "",
        isRecorded: false,
      },
      ...{
        backs: [],
        mayRefuse: true,
        isUnclear: false,
        isMixed: false,
        failed: new Set<string>(),
        since: new Set<string>(),
      },
    };
  }
}

export class World implements AsyncDisposable {
  readonly temp = new Temp();
  /** What devices and servers are told: a link, for roots are switched. */
  readonly root = this.temp.at("releases");
  /** Oldest first. */
  versions = new Map<string, Tree>();
  images: Image[] = [];
  readonly devices: Device[] = [];
  readonly garden: Gardener;
  readonly servers: OTAServer[] = [];
  /** Statuses that no server may answer, as their logs have them. */
  readonly errors: string[] = [];
  readonly #cache = new Cache(() => this.servers[0]!.url.origin);
  /** Seconds since 1970, for what applications write: it is always later. */
  readonly clock = { now: Math.floor(Date.now() / 1000) };
  #count = 0;

  constructor(
    readonly random: Random,
    readonly without: ReadonlySet<string>,
    readonly log: (line: string) => void,
  ) {
    this.garden = new Gardener(random, without);
  }

  static async start(...given: ConstructorParameters<typeof World>): Promise<World> {
    const world = new World(...given);
    fs.mkdirSync(world.temp.at("root-0"));
    fs.symlinkSync("root-0", world.root);
    world.publish();
    const watch = (line: string) =>
      void (/ 5\d\d \d+ [\d.]+ms/.test(line) && world.errors.push(line));
    for (const url of [undefined, world.#cache.url]) {
      const where = { root: world.root, host: "127.0.0.1", port: 0 };
      world.servers.push(await serve({ ...where, quiet: 0, log: watch, ...(url && { url }) }));
    }
    return world;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const server of this.servers) await server[Symbol.asyncDispose]();
    await this.#cache[Symbol.asyncDispose]();
    this.temp[Symbol.dispose]();
  }

  get offered(): Offered {
    const [version, tree] = [...this.versions].at(-1) ?? [];
    return { newest: version && tree ? { version, tree } : undefined, image: this.images.at(-1) };
  }

  name(prefix: string): string {
    return `${prefix}${this.#count++}`;
  }

  /** A version appears at once, or, when a part is asked for, begins to be copied. */
  publish(part = 1): { version: string; tree: Tree } {
    const version = this.name("1.0.");
    const before = this.offered.newest?.tree ?? new Map<string, File>();
    const isBad = !this.without.has("bad") && this.random.chance(0.2);
    const tree = this.garden.next(before, isBad);
    const some = new Map([...tree].slice(0, Math.ceil(tree.size * part)));
    writeTree(`${this.root}/.${version}`, some);
    fs.renameSync(`${this.root}/.${version}`, `${this.root}/${version}`);
    this.versions.set(version, some);
    return { version, tree };
  }

  /** What a version consists of is changed in its place. */
  rewrite(version: string, tree: Tree): void {
    writeTree(`${this.root}/${version}`, tree);
    this.versions.set(version, tree);
  }

  withdraw(version: string): void {
    fs.rmSync(`${this.root}/${version}`, { recursive: true });
    this.versions.delete(version);
  }

  /** Another directory takes the place of the root: by a switched link, or by its name. */
  switchRoot(): void {
    const old = fs.realpathSync(this.root);
    const made = this.temp.at(this.name("root-"));
    fs.cpSync(old, made, { recursive: true });
    if (this.random.chance(0.5)) {
      fs.symlinkSync(made, `${this.root}.new`);
      fs.renameSync(`${this.root}.new`, this.root);
    } else {
      fs.renameSync(old, this.temp.at(this.name("old-")));
      fs.renameSync(made, old);
    }
  }

  publishImage(): void {
    const file = this.garden.file();
    const version = this.name("1.0.");
    writeFile(this.root, `.image`, { ...file, executable: false });
    fs.renameSync(`${this.root}/.image`, `${this.root}/firmware_${version}.bin`);
    this.images.push({ version, hash: file.hash });
  }

  /** Waits until the servers offer what is there; caches do not know of it before. */
  async look(): Promise<void> {
    for (const { releases } of this.servers) {
      for (let tries = 0; tries < 50; tries++) {
        await releases.scan();
        if (releases.unsettled.length === 0) break;
        await Bun.sleep(2);
      }
    }
    this.#cache.expire();
  }

  /** Where devices ask. */
  url(way: Device["way"]): string {
    return way === "cache" ? this.#cache.url : this.servers[way === "url" ? 1 : 0]!.url.origin;
  }

  get checkCommand(): string {
    return this.without.has("executable") ? "sh ./selftest.sh" : "./selftest.sh";
  }

  /** Arguments of `bun ota.ts client` for a device. */
  clientArgs(device: Device, { retry, repair, url }: Run = {}): string[] {
    const from = device.way === "stick" && url === undefined;
    const args = ["client", "--root", device.root, "--id", device.name];
    args.push(...(from ? ["--from", this.root] : ["--server", url ?? this.url(device.way)]));
    if (device.ver !== undefined) args.push("--ver", device.ver);
    if (device.check) args.push("--check", this.checkCommand);
    return [...args, ...(retry ? ["--retry"] : []), ...(repair ? ["--repair"] : [])];
  }

  /** Runs a device's client once. */
  async update(device: Device, run: Run = {}): Promise<Ended> {
    if (run.process) return asEnded(await ota(this.clientArgs(device, run)), 3);
    const ended: Ended = { notes: [], asked: [] };
    const options: HttpOptions = {
      ...{ root: device.root, id: device.name, retry: run.retry, repair: run.repair },
      ...(device.ver !== undefined && { ver: device.ver }),
      ...(device.check && { check: { command: this.checkCommand, timeout: 60 } }),
      ...(run.trouble && { disk: troubled(device.root, run.trouble) }),
      report: (event) => event.kind === "note" && ended.notes.push(event.text),
    };
    const isStick = device.way === "stick" && run.url === undefined;
    const client = isStick
      ? new DirectoryOTA(this.root, options)
      : new HttpOTA(run.url ?? this.url(device.way), options);
    const get = client.getData.bind(client);
    client.getData = (path: string, want: TransferRequest) => {
      ended.asked.push(path);
      if (!path.startsWith("/manifest.json")) {
        run.onContent?.();
        run.onContent = undefined;
      }
      return get(path, want);
    };
    const update = () => (run.hurry ? hurried(() => client.update()) : client.update());
    return this.#caught(ended, async () => {
      return (await update()).result;
    });
  }

  /** Runs `rollback` on a device. */
  async rollBack(
    { root }: Device,
    run: { force?: boolean; process?: boolean; trouble?: Trouble } = {},
  ): Promise<Ended> {
    const flags = run.force ? ["--force"] : [];
    if (run.process) return asEnded(await ota(["rollback", "--root", root, ...flags]), 0);
    const options = run.trouble && { disk: troubled(root, run.trouble) };
    return this.#caught({ notes: [], asked: [] }, async () => {
      return (await rollBack(root, run.force, options)).result;
    });
  }

  async #caught(ended: Ended, task: () => Promise<string>): Promise<Ended> {
    try {
      ended.result = await task();
    } catch (error) {
      ended.error = error;
    }
    return ended;
  }

  /** A device as its disk and `status` have it. */
  async see({ root }: Device, trouble?: Trouble) {
    const options = trouble && { disk: troubled(root, trouble) };
    const { version, firmware, pending } = await status(root, options);
    const slot = `${root}/${firmware?.file}`;
    const hash = fs.existsSync(slot) ? sha256(fs.readFileSync(slot)) : "no file";
    const image = firmware && { ...firmware, hash };
    const record = `${root}/.ota/state.json`;
    const isRecorded =
      fs.existsSync(record) && !!JSON.parse(fs.readFileSync(record, "utf8")).installed;
    return { tree: readTree(root), version, firmware: image, pending, isRecorded };
  }

  /** What a device is once its record is gone: what it claims; all other files are its own. */
  forgotten(device: Device): Model {
    const { ver, root } = device;
    const isEmpty = fs.readdirSync(root).every((name) => name === ".ota");
    const version = writtenVersion(root) ?? (isEmpty ? null : (ver ?? null));
    const tree = readTree(root);
    const release = adopted(this.versions.get(version ?? ""), tree);
    return { ...device.nothing(), tree, version, release };
  }

  /** What a device knows of itself when it next asks: at first contact, what the server says. */
  known(device: Device): Model {
    const { model, root } = device;
    if (!model.isRecorded) {
      const { version, release } = this.forgotten(device);
      return { ...model, version, release };
    }
    const written = writtenVersion(root);
    if (!model.isUnclear || !written || written === model.version) return model;
    // The record is an old one. What the device says beside it counts, too.
    const release = adopted(this.versions.get(written), model.tree);
    return { ...model, release: new Map([...model.release, ...release]) };
  }
}

/**
 * What a process said, as the library would have.
 *
 * @param rolledBack the exit code with which it says that it rolled back
 */
function asEnded({ code, last, stderr }: Exit, rolledBack: number): Ended {
  const result = /^(updated|repaired|up to date|rolled back|not tried)/.exec(last)?.[1];
  const codes = { "rolled back": rolledBack, "not tried": 3, "": 1 };
  const expected = codes[(result ?? "") as keyof typeof codes] ?? 0;
  const isRight = code === expected && !/^ +at .*:\d+/m.test(stderr);
  const what = `exit code ${code} with "${last}" (expected ${expected}): ${stderr}`;
  const ended = { notes: stderr.split("\n"), asked: [] };
  if (!isRight) return { ...ended, error: new TypeError(what) };
  return result ? { ...ended, result } : { ...ended, error: new OTAError(stderr) };
}

/** The version that a device has for its own code. */
function writtenVersion(root: string): string | undefined {
  const file = `${root}/${VERSION_FILE}`;
  return fs.existsSync(file) ? /'(.*)'/.exec(fs.readFileSync(file, "utf8"))?.[1] : undefined;
}
