/**
 * The command as its user runs it: a process of its own, with files and sockets, that can be waited
 * for, interrupted and killed.
 */

import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { lstatSync, readFileSync, readlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { serve, type OTAServer, type ServeOptions } from "../../ota.ts";

/** The file under test. */
export const OTA_TS = resolve(import.meta.dir, "../../ota.ts");

/** How a process ended. */
export interface Ended {
  /** `null` when a signal ended it. */
  code: number | null;
  signal: string | null;
  stdout: string;
  stderr: string;
  /** The last line of stdout, which says how a client ended. */
  last: string;
  /** The most memory that it had, in bytes. */
  memory: number;
}

/** What a process is started with. */
export interface ToolOptions {
  cwd?: string;
  /** Added to the environment. */
  env?: Record<string, string>;
  /** What stands in front of the command: `strace` and its options, `setpriv` and the like. */
  prefix?: readonly string[];
  /** Another copy of the file under test. */
  script?: string;
  /** Another copy of Bun. */
  bun?: string;
}

/**
 * The most memory that a process has had, in bytes; 0 when it has ended. (`resourceUsage` counts
 * what its parent had when it was forked.)
 */
function peakOf(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    return Number(/^VmHWM:\s*(\d+) kB/m.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}

/** `bun ota.ts` with some arguments, running. */
export class Tool implements AsyncDisposable {
  readonly #child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly #texts = { stdout: "", stderr: "" };
  readonly #watchers = new Set<() => void>();
  /** Resolves when it has ended, and all that it wrote is here. */
  readonly ended: Promise<Ended>;
  #isOver = false;

  constructor(args: readonly string[], options: ToolOptions = {}) {
    const { cwd, env, prefix = [], script = OTA_TS, bun = process.execPath } = options;
    this.#child = Bun.spawn([...prefix, bun, script, ...args], {
      ...(cwd !== undefined && { cwd }),
      env: { ...process.env, NO_COLOR: "1", ...env },
      stdio: ["ignore", "pipe", "pipe"],
      // A group of its own: what is killed first may leave what it started.
      detached: true,
    });
    const texts = (["stdout", "stderr"] as const).map((name) => this.#follow(name));
    const { pid } = this.#child;
    let memory = 0;
    const sampler = setInterval(() => (memory = Math.max(memory, peakOf(pid))), 10);
    this.ended = Promise.all([this.#child.exited, ...texts]).then(() => {
      this.#isOver = true;
      for (const watcher of this.#watchers) watcher();
      const { exitCode, signalCode } = this.#child;
      const { stdout, stderr } = this.#texts;
      const last = stdout.trimEnd().split("\n").at(-1) ?? "";
      const signal = signalCode === null ? null : String(signalCode);
      clearInterval(sampler);
      return { code: exitCode, signal, stdout, stderr, last, memory };
    });
  }

  get pid(): number {
    return this.#child.pid;
  }

  get stdout(): string {
    return this.#texts.stdout;
  }

  get stderr(): string {
    return this.#texts.stderr;
  }

  /** Waits until stdout (or stderr) has text that matches. */
  async until(pattern: RegExp, name: "stdout" | "stderr" = "stdout"): Promise<RegExpExecArray> {
    for (;;) {
      const found = pattern.exec(this.#texts[name]);
      if (found) return found;
      if (this.#isOver) {
        throw new Error(`ended before ${pattern} was on ${name}:\n${JSON.stringify(this.#texts)}`);
      }
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#watchers.add(resolve);
      await promise;
      this.#watchers.delete(resolve);
    }
  }

  kill(signal: NodeJS.Signals = "SIGKILL"): void {
    this.#child.kill(signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      process.kill(-this.pid, "SIGKILL");
    } catch {
      // It has ended, and all that it started.
    }
    await this.#child.exited;
  }

  async #follow(name: "stdout" | "stderr"): Promise<void> {
    const decoder = new TextDecoder();
    for await (const piece of this.#child[name]) {
      this.#texts[name] += decoder.decode(piece, { stream: true });
      for (const watcher of this.#watchers) watcher();
    }
  }
}

/** Runs `bun ota.ts` with some arguments to its end. */
export async function ota(args: readonly string[], options: ToolOptions = {}): Promise<Ended> {
  await using tool = new Tool(args, options);
  return await tool.ended;
}

/** A directory that goes away, whatever is in it. */
export class Temp implements Disposable {
  readonly path = mkdtempSync(join(tmpdir(), "ota-test-"));

  /** A path in it. */
  at(...parts: string[]): string {
    return join(this.path, ...parts);
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** Files by path; a path that ends with a slash is an empty directory. */
export type Tree = Record<string, string | Uint8Array>;

/** Writes files below a directory, which is made. */
export function layTree(root: string, files: Tree): void {
  mkdirSync(root, { recursive: true });
  for (const [path, content] of Object.entries(files)) {
    if (path.endsWith("/")) mkdirSync(join(root, path), { recursive: true });
    else {
      mkdirSync(dirname(join(root, path)), { recursive: true });
      writeFileSync(join(root, path), content);
    }
  }
}

/**
 * All below a directory but `.ota`: path → content (for long content its hash), with directories as
 * `path/` and links as `-> target`.
 */
export function readTree(root: string): Record<string, string> {
  const found: Record<string, string> = {};
  const walk = (directory: string): void => {
    for (const name of readdirSync(join(root, directory)).sort()) {
      const path = directory === "" ? name : `${directory}/${name}`;
      if (path === ".ota") continue;
      const at = join(root, path);
      const stat = lstatSync(at);
      if (stat.isDirectory()) {
        found[`${path}/`] = "";
        walk(path);
      } else if (stat.isSymbolicLink()) found[path] = `-> ${readlinkSync(at)}`;
      else found[path] = shown(readFileSync(at));
    }
  };
  walk("");
  return found;
}

/** What `readTree` finds where these files are, parent directories added. */
export function asTree(files: Tree): Record<string, string> {
  const expected: Record<string, string> = {};
  for (const [path, content] of Object.entries(files)) {
    const parts = path.replace(/\/$/, "").split("/").slice(0, -1);
    parts.forEach((_, i) => (expected[`${parts.slice(0, i + 1).join("/")}/`] = ""));
    expected[path] = shown(Buffer.from(content));
  }
  return expected;
}

function shown(content: Uint8Array): string {
  return content.length > 400
    ? `${content.length} bytes, SHA-256 ${sha256(content)}`
    : Buffer.from(content).toString("latin1");
}

/** The sizes of the files in a directory, by name, while others make and remove them. */
export function sizesIn(directory: string): Record<string, number> {
  const names = existing(() => readdirSync(directory)) ?? [];
  const sizes = names.map((name) => [name, existing(() => lstatSync(join(directory, name)).size)]);
  return Object.fromEntries(sizes.filter(([, size]) => size !== undefined));
}

/** What a look finds; `undefined` where nothing is, or is any more. */
export function existing<T>(look: () => T): T | undefined {
  try {
    return look();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** What is in `.ota` below a root: names of files and directories. */
export function otaFiles(root: string): string[] {
  return readdirSync(join(root, ".ota")).sort();
}

export function sha1(content: string | Uint8Array): string {
  return new Bun.CryptoHasher("sha1").update(content).digest("hex");
}

export function sha256(content: string | Uint8Array): string {
  return new Bun.CryptoHasher("sha256").update(content).digest("hex");
}

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

/** What a test needs that is no part of this repository; a machine without it fails the test. */
export function need(program: string): string {
  const found = Bun.which(program);
  if (found === null) {
    throw new Error(`this test needs ${program}, and it is not installed (apt-get install it)`);
  }
  return found;
}

/** What to put before a command so that a system call of one name goes wrong: see strace(1). */
export function injecting(call: string, fault: string): string[] {
  // With --seccomp-bpf, strace injects errors but no signals.
  const options = ["-f", "-qq", "-o", "/dev/null", "-e", `trace=${call}`];
  return [need("strace"), ...options, "-e", `inject=${call}:${fault}`];
}

/** Runs a command to its end and tells which of these system calls its first thread made. */
export async function callsOf(
  args: readonly string[],
  calls: readonly string[],
  expectedCode = 0,
): Promise<string[]> {
  using temp = new Temp();
  const options = ["-f", "--seccomp-bpf", "-qq", "-s", "300", "-o", temp.at("calls")];
  const prefix = [need("strace"), ...options, "-e", `trace=${calls.join(",")}`];
  const { code, stderr } = await ota(args, { prefix });
  if (code !== expectedCode) throw new Error(`ended with code ${code}: ${stderr}`);
  const lines = readFileSync(temp.at("calls"), "utf8").trimEnd().split("\n");
  const first = lines[0]?.split(" ")[0];
  return lines.filter((line) => line.startsWith(`${first} `) && /^\d+ +\w+\(/.test(line));
}

/** A command for `sh -c`'s single quotes. */
export function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/**
 * Waits for something that no event tells of, looking often.
 *
 * @param seconds after which it hangs; a busy machine takes long, and that is no failure
 */
export async function eventually(what: string, isSo: () => boolean, seconds = 300): Promise<void> {
  const end = performance.now() + seconds * 1000;
  while (!isSo()) {
    if (performance.now() > end) throw new Error(`not within ${seconds} s: ${what}`);
    await Bun.sleep(5);
  }
}
