/**
 * The command as its user runs it: a process of its own, with files and sockets, that can be waited
 * for, interrupted and killed; or in this process, where that makes no difference to it.
 */

import { AsyncLocalStorage } from "node:async_hooks";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { main } from "../../ota.ts";
import { Temp } from "./temp.ts";

/** The file under test. */
export const OTA_TS = resolve(import.meta.dir, "../../ota.ts");

/** How a command ended. */
export interface Ran {
  /** `null` when a signal ended it. */
  code: number | null;
  stdout: string;
  stderr: string;
  /** The last line of stdout, which says how a client ended. */
  last: string;
}

/** How a process ended. */
export interface Ended extends Ran {
  signal: string | null;
  /** The most memory that it had, in bytes; NaN unless it was measured. */
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
  /** Whether its memory is measured. To look at it so often takes more than many a process does. */
  isMeasured?: boolean;
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
    const { isMeasured = false } = options;
    this.#child = Bun.spawn([...prefix, bun, script, ...args], {
      ...(cwd !== undefined && { cwd }),
      env: { ...process.env, NO_COLOR: "1", ...env },
      stdio: ["ignore", "pipe", "pipe"],
      // A group of its own: what is killed first may leave what it started.
      detached: true,
    });
    const texts = (["stdout", "stderr"] as const).map((name) => this.#follow(name));
    const { pid } = this.#child;
    let memory = isMeasured ? 0 : NaN;
    const measure = () => (memory = Math.max(memory, peakOf(pid)));
    const sampler = isMeasured ? setInterval(measure, 10) : undefined;
    this.ended = Promise.all([this.#child.exited, ...texts]).then(() => {
      this.#isOver = true;
      for (const watcher of this.#watchers) watcher();
      const { exitCode, signalCode } = this.#child;
      const { stdout, stderr } = this.#texts;
      const signal = signalCode === null ? null : String(signalCode);
      clearInterval(sampler);
      return { code: exitCode, signal, stdout, stderr, last: lastLine(stdout), memory };
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

function lastLine(text: string): string {
  return text.trimEnd().split("\n").at(-1) ?? "";
}

/** Runs `bun ota.ts` with some arguments to its end, as a process. */
export async function ota(args: readonly string[], options: ToolOptions = {}): Promise<Ended> {
  await using tool = new Tool(args, options);
  return await tool.ended;
}

/** `bun ota.ts serve` that listens, on a free port. */
export class Serving extends Tool {
  url = "";
  /** What it printed until it listened. */
  startup = "";

  /**
   * Starts it, and waits until it has printed all that it says at the start.
   *
   * @throws {Error} with what it printed, when it ends before that
   */
  static async start(args: readonly string[], options: ToolOptions = {}): Promise<Serving> {
    const serving = new this(["serve", "--port", "0", ...args], options);
    try {
      // The line with `curl` is the last one.
      const found = await serving.until(/^.* at (https?:\S+)\n[^]*^try .*\n/m);
      [serving.startup, serving.url = ""] = found;
    } catch (error) {
      await serving[Symbol.asyncDispose]();
      throw error;
    }
    return serving;
  }
}

/** Where a command that runs in this process writes to; what is outside of one goes its usual way. */
const outputs = new AsyncLocalStorage<{ stdout: string; stderr: string; serves: () => void }>();
for (const name of ["stdout", "stderr"] as const) {
  const stream = process[name];
  const { isTTY } = stream;
  const write = stream.write.bind(stream) as (...args: unknown[]) => boolean;
  const caught = (...args: unknown[]): boolean => {
    const output = outputs.getStore();
    if (!output) return write(...args);
    output[name] += String(args[0]);
    if (/^try /m.test(output.stdout)) output.serves();
    const done = args.at(-1);
    if (typeof done === "function") done();
    return true;
  };
  Object.assign(stream, { write: caught });
  const get = () => isTTY && !outputs.getStore();
  Object.defineProperty(stream, "isTTY", { get, configurable: true });
}
// Each client listens for signals, as if the process were its own.
process.setMaxListeners(0);
let running = 0;
const SIGNALS = ["SIGINT", "SIGTERM"] as const;

/**
 * Runs a command line in this process: the same code in a tenth of the time, for all that needs no
 * environment, working directory, signal or memory of its own.
 *
 * @throws {Error} when it serves: that would never end
 */
export async function run(args: readonly string[]): Promise<Ran> {
  const { promise, reject } = Promise.withResolvers<never>();
  const serves = () => reject(new Error(`${args.join(" ")} was expected to end, and serves`));
  const output = { stdout: "", stderr: "", serves };
  running++;
  try {
    const code = await Promise.race([promise, outputs.run(output, () => main(args))]);
    const { stdout, stderr } = output;
    return { code, stdout, stderr, last: lastLine(stdout) };
  } finally {
    // A person can end the tests again.
    if (--running === 0) for (const name of SIGNALS) process.removeAllListeners(name);
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
 * Looks often at what no event tells of, until it is right; and says what it was at last, if not.
 *
 * @param seconds after which it hangs; a busy machine takes long, and that is no failure
 */
export async function until<T>(
  what: string,
  look: () => T | Promise<T>,
  isRight: (found: T) => boolean,
  seconds = 300,
): Promise<T> {
  const end = performance.now() + seconds * 1000;
  for (;;) {
    const found = await look();
    if (isRight(found)) return found;
    if (performance.now() > end) {
      throw new Error(`not within ${seconds} s: ${what}; at last ${Bun.inspect(found)}`);
    }
    await Bun.sleep(5);
  }
}

/** The same of something that is so or is not. */
export async function eventually(
  what: string,
  isSo: () => boolean | Promise<boolean>,
  seconds?: number,
): Promise<void> {
  await until(what, isSo, Boolean, seconds);
}
