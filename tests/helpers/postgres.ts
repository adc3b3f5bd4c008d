/** Debian's PostgreSQL as a process of one test file, on a port of its own, forgetful and fast. */

import * as fs from "node:fs";
import { createServer } from "node:net";
import { Mount } from "./mount.ts";
import { Temp } from "./temp.ts";
import { eventually, need } from "./tool.ts";

/** A database on a file system of its own. */
export interface SmallDatabase extends AsyncDisposable {
  readonly url: string;
  readonly mount: Mount;
}

/** A PostgreSQL that can be stopped, started again, and made to hang. */
export class Postgres implements AsyncDisposable {
  readonly #temp = new Temp();
  #server: Bun.Subprocess | undefined;
  #port = 0;
  #databases = 0;

  private constructor(private readonly settings: readonly string[]) {}

  /** @param settings of the server, `NAME=VALUE`; by default nothing outlives the machine's end */
  static async start(settings: readonly string[] = ["fsync=off"]): Promise<Postgres> {
    const postgres = new Postgres(settings);
    try {
      const data = postgres.#temp.at("data");
      fs.mkdirSync(data, { mode: 0o700 });
      if (isRoot()) {
        const [user, group] = [idOf("-u"), idOf("-g")];
        for (const path of [postgres.#temp.path, data]) fs.chownSync(path, user, group);
      }
      const options = ["--no-sync", "--auth=trust", "--encoding=UTF8", "--username=postgres"];
      // Not by bytes, as a database that somebody has made for us may be.
      const locale = ["--locale-provider=icu", "--icu-locale=en", "--locale=C.UTF-8"];
      const command = as([program("initdb"), ...options, ...locale, "-D", data]);
      const { exitCode, stderr } = Bun.spawnSync(command, { cwd: data });
      if (exitCode !== 0) throw new Error(`initdb failed: ${stderr.toString()}`);
      await postgres.resume();
      return postgres;
    } catch (error) {
      await postgres[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Makes an empty database. @returns its URL */
  async database(): Promise<string> {
    const name = `fleet_${++this.#databases}`;
    await using sql = new Bun.SQL(this.#url("postgres"), { max: 1 });
    // Files that are copied need no log.
    await sql.unsafe(`CREATE DATABASE ${name} TEMPLATE template0 STRATEGY FILE_COPY`);
    return this.#url(name);
  }

  /** Makes an empty database on a file system of its own, which can get full. */
  async small(size: string): Promise<SmallDatabase> {
    const name = `small_${++this.#databases}`;
    const owner = isRoot() ? `,uid=${idOf("-u")},gid=${idOf("-g")}` : "";
    const mount = new Mount(this.#temp.at(name), `size=${size},mode=700${owner}`);
    const sql = new Bun.SQL(this.#url("postgres"), { max: 1 });
    const end = async () => {
      await sql.unsafe(`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
      await sql.unsafe(`DROP TABLESPACE IF EXISTS ${name}`);
      await sql.close();
      mount[Symbol.dispose]();
    };
    try {
      await sql.unsafe(`CREATE TABLESPACE ${name} LOCATION '${mount.path}'`);
      await sql.unsafe(`CREATE DATABASE ${name} TEMPLATE template0 TABLESPACE ${name}`);
      return { url: this.#url(name), mount, [Symbol.asyncDispose]: end };
    } catch (error) {
      await end();
      throw error;
    }
  }

  /** Of the process that has all others of it as children. */
  get pid(): number | undefined {
    return this.#server?.pid;
  }

  #url(database: string): string {
    return `postgres://postgres@127.0.0.1:${this.#port}/${database}`;
  }

  /** Starts the server, at its old port if it has been stopped. */
  async resume(): Promise<void> {
    this.#port ||= await freePort();
    const log = this.#temp.at("log");
    const settings = [`port=${this.#port}`, "listen_addresses=127.0.0.1", ...this.settings];
    settings.push(`unix_socket_directories=${this.#temp.path}`);
    const options = settings.flatMap((setting) => ["-c", setting]);
    const command = as([program("postgres"), "-D", this.#temp.at("data"), ...options]);
    const stderr = fs.openSync(log, "a");
    const server = Bun.spawn(command, { cwd: "/", stdio: ["ignore", "ignore", stderr] });
    fs.closeSync(stderr);
    this.#server = server;
    await eventually("PostgreSQL answers", async () => {
      if (server.exitCode !== null) throw new Error(fs.readFileSync(log, "utf8"));
      const sql = new Bun.SQL(this.#url("postgres"), { max: 1 });
      return await sql.unsafe("SELECT 1").then(
        () => sql.close().then(() => true),
        () => false,
      );
    });
  }

  /** Stops it at once, in the middle of whatever it does; what was committed stays. */
  async stop(): Promise<void> {
    this.#server?.kill("SIGQUIT");
    await this.#server?.exited;
  }

  /** Runs a statement in a database of this server. */
  async query(url: string, text: string): Promise<Record<string, unknown>[]> {
    await using sql = new Bun.SQL(url, { max: 1 });
    return (await sql.unsafe(text)) as Record<string, unknown>[];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
    this.#temp[Symbol.dispose]();
  }
}

const isRoot = () => process.getuid?.() === 0;

function idOf(what: "-u" | "-g"): number {
  const { stdout } = Bun.spawnSync(["id", what, "postgres"]);
  return Number(stdout.toString());
}

/** Adds what makes a command run as the user of Debian's package: root may not run PostgreSQL. */
function as(command: string[]): string[] {
  // It ends with us, however we end.
  const options = ["--pdeathsig=QUIT"];
  if (isRoot()) options.push("--reuid=postgres", "--regid=postgres", "--init-groups");
  return [need("setpriv"), ...options, "--", ...command];
}

/** Debian has its programs below a directory for each version. */
function program(name: string): string {
  const [newest] = [...new Bun.Glob("/usr/lib/postgresql/*/bin").scanSync({ onlyFiles: false })]
    .filter((directory) => fs.existsSync(`${directory}/${name}`))
    .toSorted((a, b) => b.localeCompare(a, "en", { numeric: true }));
  return newest ? `${newest}/${name}` : need(name);
}

function freePort(): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  const server = createServer().once("error", reject);
  server.listen(0, "127.0.0.1", () => {
    const address = server.address();
    server.close(() => resolve(typeof address === "object" && address ? address.port : 0));
  });
  return promise;
}
