/**
 * A root of releases, the real server that serves it, and a device that updates from it:
 *
 *     await using world = await World.with({ "1.0.0": V1, "1.0.1": V2 }, { device: V1 });
 *     const { code, last } = await world.client(["--ver", "1.0.0"]);
 *     expect(world.tree()).toEqual(asTree(V2));
 */

import {
  HttpOTA,
  serve,
  status,
  type OTAServer,
  type ServeOptions,
  type Status,
} from "../../ota.ts";
import { layTree, readTree, Temp, type Tree } from "./temp.ts";
import { ota, run, type Ended, type Ran, type ToolOptions } from "./tool.ts";

/** Seconds of silence that a busy machine may need; what is silent for good is given less. */
export const PATIENT = 300;

/** What was asked of a `Served`. */
export interface Logged {
  device: string | undefined;
  method: string;
  path: string;
  status: number;
  /** NaN when the connection ended before. */
  bytes: number;
  failed: string | undefined;
}

/** The real server, in this process, on a port of its own; its log is kept. */
export class Served implements AsyncDisposable {
  readonly #server: OTAServer;

  private constructor(
    server: OTAServer,
    readonly lines: string[],
  ) {
    this.#server = server;
  }

  static async start(root: string, options: ServeOptions = {}): Promise<Served> {
    const lines: string[] = [];
    const log = (line: string) => void lines.push(line);
    const server = await serve({ root, port: 0, host: "127.0.0.1", quiet: 0, log, ...options });
    return new Served(server, lines);
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  get port(): number {
    return Number(this.#server.url.port);
  }

  /** The names of the versions that it offers. */
  get releases(): string[] {
    return this.#server.releases.versions.map(({ name }) => name);
  }

  get requests(): Logged[] {
    return this.lines.map((line) => {
      const found = /^\S+ \S+ (?:device=(\S+) )?(\S+) (\S+) (\d+) (\d+|-) \S+ms(.*)$/.exec(line);
      if (!found) throw new Error(`no line of a server's log: ${line}`);
      const [, device, method = "", path = "", status, bytes, rest = ""] = found;
      const failed = / failed=(\S+)/.exec(rest)?.[1];
      return { device, method, path, status: Number(status), bytes: Number(bytes), failed };
    });
  }

  /** The paths of content that was sent, sorted. */
  get sent(): string[] {
    const content = this.requests.filter(({ path }) => path !== "/manifest.json");
    return content.map(({ path }) => path).sort();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server[Symbol.asyncDispose]();
  }
}

/** What is in a world beside releases. */
export interface WorldOptions extends ServeOptions {
  /** Beside the versions in the root: firmware images, and what else is served. */
  beside?: Tree;
  /** What is on the device; without it there is no directory for it. */
  device?: Tree;
  /** The release to which the device was brought before. */
  on?: string | undefined;
}

/** A directory with a release root `releases`, room for a device `device`, and maybe a server. */
export class World extends Temp implements AsyncDisposable {
  readonly releases = this.at("releases");
  readonly root = this.at("device");
  #server: Served | undefined;

  constructor(versions: Record<string, Tree> = {}, { beside = {}, device }: WorldOptions = {}) {
    super();
    layTree(this.releases, beside);
    for (const [name, files] of Object.entries(versions)) this.release(name, files);
    if (device) layTree(this.root, device);
  }

  /** A world that is served. */
  static async with<W extends World>(
    this: new (versions: Record<string, Tree>, options: WorldOptions) => W,
    versions: Record<string, Tree>,
    options: WorldOptions = {},
  ): Promise<W> {
    const { beside: _, device: __, on, ...serving } = options;
    const world = new this(versions, options);
    try {
      if (on !== undefined) await world.provision(on);
      await world.serve(serving);
    } catch (error) {
      world[Symbol.dispose]();
      throw error;
    }
    return world;
  }

  /** Serves the root as it is now, in the place of what served it before. */
  async serve(options: ServeOptions = {}): Promise<Served> {
    await this.#server?.[Symbol.asyncDispose]();
    return (this.#server = await Served.start(this.releases, options));
  }

  get server(): Served {
    if (!this.#server) throw new Error("nothing serves this world");
    return this.#server;
  }

  get url(): string {
    return this.server.url;
  }

  /** The paths of content that was sent, sorted. */
  get sent(): string[] {
    return this.server.sent;
  }

  /** Adds files to a version. */
  release(version: string, files: Tree): void {
    layTree(this.at("releases", version), files);
  }

  /** Brings the device to a release, as the server had it once. */
  async provision(version: string): Promise<void> {
    await using server = await Served.start(this.releases, { latest: version });
    await new HttpOTA(server.url, { root: this.root, timeout: PATIENT }).update();
  }

  /** The arguments of a client for the device. */
  args(args: readonly string[] = [], from: { url: string } = this): string[] {
    const patient = ["--timeout", `${PATIENT}`];
    return ["client", "--root", this.root, "--server", from.url, ...patient, ...args];
  }

  /** Runs a client for the device to its end, in this process. */
  client(args: readonly string[] = [], from: { url: string } = this): Promise<Ran> {
    return run(this.args(args, from));
  }

  /** The same as a process. */
  process(
    args: readonly string[] = [],
    from: { url: string } = this,
    options: ToolOptions = {},
  ): Promise<Ended> {
    return ota(this.args(args, from), options);
  }

  /** Runs another command for the device, in this process. */
  run(command: string, args: readonly string[] = []): Promise<Ran> {
    return run([command, "--root", this.root, ...args]);
  }

  status(): Promise<Status> {
    return status(this.root);
  }

  /** All on the device but what the updater keeps: see `readTree`. */
  tree(): Record<string, string> {
    return readTree(this.root);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server?.[Symbol.asyncDispose]();
    this[Symbol.dispose]();
  }
}
