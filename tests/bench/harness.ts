/**
 * What every benchmark needs: a temp directory that goes away, processes that end, numbers from
 * `/proc`, medians and tables. Nothing here knows what is measured.
 */

import * as fs from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, resolve } from "node:path";

/** How much to measure. */
export interface Effort {
  /** Fewer and shorter rounds: whether it runs, not what it is worth. */
  quick: boolean;
  /** Rounds of what takes seconds; each starts with another of the competitors. */
  rounds: number;
}

/** What follows an option on the command line. */
function optionValue(name: string): string | undefined {
  return process.argv[process.argv.indexOf(name) + 1 || -1];
}

/** The ota.ts that is measured: the one beside these files, unless `--ota FILE` names another. */
export const OTA = resolve(optionValue("--ota") ?? `${import.meta.dirname}/../../ota.ts`);

/** The directory of more pairs of firmware images, where `--pairs DIR` names one. */
export const PAIRS = optionValue("--pairs");

// ── The temp directory and the processes, which both end with this process ──

const children = new Map<number, Bun.Subprocess>();
let directory: string | undefined;

/** A directory of that name, below one that is removed when this process ends. */
export function scratch(name: string): string {
  if (directory === undefined) {
    directory = fs.mkdtempSync(`${tmpdir()}/ota-bench-`);
    process.once("exit", cleanUp);
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
      // Not once: the terminal and `bun run` both pass it on, and a second one must not cut this off.
      process.on(signal, () => {
        console.error(`bench: interrupted; removing ${directory}`);
        process.exit(130);
      });
    }
  }
  const path = `${directory}/${name}`;
  fs.mkdirSync(path, { recursive: true });
  return path;
}

export function remove(path: string): void {
  fs.rmSync(path, { recursive: true, force: true });
}

function cleanUp(): void {
  for (const pid of children.keys()) endGroup(pid, "SIGKILL");
  for (let tries = 0; directory !== undefined && tries < 20; tries++) {
    try {
      remove(directory);
      return;
    } catch {
      Bun.sleepSync(50); // A process that was just ended has made one more file.
    }
  }
}

function endGroup(pid: number, signal: "SIGTERM" | "SIGKILL"): void {
  try {
    process.kill(-pid, signal);
  } catch {
    // It has ended.
  }
}

/** What a command that ended has to say. */
export interface Ended {
  stdout: string;
  stderr: string;
  /** From the start of the process to its end. */
  seconds: number;
  /** Seconds of CPU that it and its children used: what a busy machine changes least. */
  cpu: number;
}

/**
 * Runs a command to its end.
 *
 * @throws {Error} with what it printed, when its exit code is not 0
 */
export async function run(command: string[], cwd?: string): Promise<Ended> {
  const started = performance.now();
  const child = Bun.spawn(command, {
    ...(cwd !== undefined && { cwd }),
    stdio: ["ignore", "pipe", "pipe"],
    // A process group of its own, so that what it starts ends with it.
    detached: true,
  });
  children.set(child.pid, child);
  const output = Promise.all([child.stdout.text(), child.stderr.text()]);
  const code = await child.exited;
  const seconds = (performance.now() - started) / 1000;
  const [stdout, stderr] = await output;
  const cpu = Number(child.resourceUsage()?.cpuTime.total ?? NaN) / 1e6;
  children.delete(child.pid);
  if (code !== 0) {
    throw new Error(`${command.join(" ")}: exit code ${code}\n${stderr}${stdout}`.slice(0, 2000));
  }
  return { stdout, stderr, seconds, cpu };
}

/** A process that runs until it is stopped. */
export interface Service extends AsyncDisposable {
  readonly pid: number;
  /** Whether it has ended by itself; what it said then. */
  readonly failure: () => string | undefined;
}

/** Starts a process; its stdout goes to /dev/null. */
export function start(command: string[], cwd?: string): Service {
  const log = `${scratch("logs")}/${crypto.randomUUID()}`;
  const child = Bun.spawn(command, {
    ...(cwd !== undefined && { cwd }),
    stdio: ["ignore", "ignore", Bun.file(log)],
    detached: true,
  });
  children.set(child.pid, child);
  return {
    pid: child.pid,
    failure: () => {
      if (child.exitCode === null && child.signalCode === null) return undefined;
      return `${command.join(" ")}: ended\n${fs.readFileSync(log, "utf8").slice(0, 2000)}`;
    },
    async [Symbol.asyncDispose]() {
      endGroup(child.pid, "SIGTERM");
      const late = setTimeout(() => endGroup(child.pid, "SIGKILL"), 5000);
      await child.exited;
      clearTimeout(late);
      children.delete(child.pid);
    },
  };
}

/** Waits until a service does what it should; nothing else may run then. */
export async function until(
  service: Service,
  isReady: () => Promise<boolean>,
  pause = 2,
): Promise<void> {
  for (const end = performance.now() + 120_000; performance.now() < end;) {
    const ready = await isReady().catch(() => false);
    if (ready) return;
    const failure = service.failure();
    if (failure !== undefined) throw new Error(failure);
    await Bun.sleep(pause);
  }
  throw new Error("a server did not get ready within two minutes");
}

/** A port that was free a moment ago. */
export function freePort(): Promise<number> {
  return new Promise((done, fail) => {
    const server = createServer().once("error", fail);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      server.close(() => done(typeof address === "object" && address ? address.port : 0));
    });
  });
}

/** `bun ota.ts serve`, listening. */
export interface Serving extends Service {
  readonly port: number;
  readonly origin: string;
}

/** Serves a release root with a process of its own, as a user would, its log going to /dev/null. */
export async function serve(root: string, ...options: string[]): Promise<Serving> {
  const port = await freePort();
  const service = start(serveCommand(root, port, ...options));
  await until(service, async () => (await fetch(`http://127.0.0.1:${port}/manifest.json`)).ok);
  return { ...service, port, origin: `http://127.0.0.1:${port}` };
}

export function serveCommand(root: string, port: number, ...options: string[]): string[] {
  const where = ["--root", root, "--host", "127.0.0.1", "--port", `${port}`];
  return [process.execPath, OTA, "serve", ...where, ...options];
}

export function clientCommand(root: string, origin: string, ...options: string[]): string[] {
  return [process.execPath, OTA, "client", "--root", root, "--server", origin, ...options];
}

/** Lets what was written so far reach the disk, so that nobody waits for somebody else's bytes. */
export async function settle(): Promise<void> {
  await run(["sync"]);
}

// ── Tools ──

/** Debian's package, where it has not the tool's name. */
const PACKAGES: Record<string, string> = { nginx: "nginx-light", "/usr/bin/time": "time" };

/** Which of these tools are not there; says so. */
export function missing(part: string, tools: readonly string[]): string[] {
  const absent = tools.filter((tool) => which(tool) === null);
  for (const tool of absent) {
    const name = PACKAGES[tool] ?? tool;
    console.log(`${part}: ${tool} is missing (Debian: apt-get install ${name})`);
  }
  return absent;
}

/** Where a tool is; nginx stands where only root looks. */
export function which(tool: string): string | null {
  return Bun.which(tool, { PATH: `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin` });
}

// ── What the kernel knows of a process ──

/** Bytes of memory: resident now, of that not backed by files, and the most ever. */
export function memoryOf(pid: number): { resident: number; anonymous: number; peak: number } {
  const status = fs.readFileSync(`/proc/${pid}/status`, "utf8");
  const field = (name: string) =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(status)?.[1] ?? NaN) * 1024;
  return { resident: field("VmRSS"), anonymous: field("RssAnon"), peak: field("VmHWM") };
}

/** Seconds of CPU that a process has used, in threads that have ended, too; to the hundredth. */
export function wholeCpuOf(pid: number): number {
  const text = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
  // After the name, which may have anything in it: utime and stime are the 12th and the 13th.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

/** Seconds of CPU that the threads and children a process now has have used, to the nanosecond. */
export function cpuOf(pid: number): number {
  let nanoseconds = 0;
  for (const task of fs.readdirSync(`/proc/${pid}/task`)) {
    try {
      const text = fs.readFileSync(`/proc/${pid}/task/${task}/schedstat`, "utf8");
      nanoseconds += Number(text.split(" ")[0]);
      const below = fs.readFileSync(`/proc/${pid}/task/${task}/children`, "utf8");
      for (const child of below.trim().split(" ")) {
        if (child !== "") nanoseconds += cpuOf(Number(child)) * 1e9;
      }
    } catch {
      // A thread that has just ended.
    }
  }
  return nanoseconds / 1e9;
}

// ── Numbers and tables ──

export function median(values: readonly number[]): number {
  return percentile(values, 50);
}

/** By linear interpolation between the two nearest. */
export function percentile(values: readonly number[], percent: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  const at = ((sorted.length - 1) * percent) / 100;
  const low = sorted[Math.floor(at)] ?? NaN;
  const high = sorted[Math.ceil(at)] ?? NaN;
  return low + (high - low) * (at - Math.floor(at));
}

/** The ratios of two competitors, round by round: the median, and between which it lay. */
export function ratio(ours: readonly number[], theirs: readonly number[]): string {
  const ratios = ours.map((value, i) => value / (theirs[i] ?? NaN));
  const spread = `${Math.min(...ratios).toFixed(2)}–${Math.max(...ratios).toFixed(2)}`;
  return `${median(ratios).toFixed(2)} (${spread})`;
}

/** Thousands apart: `12,345`. */
export function whole(value: number): string {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "–";
}

export function mebibytes(bytes: number): string {
  return Number.isFinite(bytes) ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : "–";
}

export function milliseconds(value: number): string {
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

/** Prints a table that is Markdown, too. */
export function table(title: string, header: string[], rows: string[][]): void {
  const widths = header.map((head, i) =>
    Math.max(head.length, ...rows.map((row) => (row[i] ?? "").length)),
  );
  const line = (cells: string[]) => {
    const padded = cells.map((cell, i) => {
      const width = widths[i] ?? 0;
      return i === 0 ? cell.padEnd(width) : cell.padStart(width);
    });
    return `| ${padded.join(" | ")} |`;
  };
  const rule = widths.map((width, i) =>
    i === 0 ? "-".repeat(width) : `${"-".repeat(width - 1)}:`,
  );
  console.log(`\n${title}\n\n${[header, rule, ...rows].map(line).join("\n")}`);
}

/** Runs all competitors in every round, each time beginning with another one. */
export async function inRounds(
  rounds: number,
  competitors: readonly ((round: number) => Promise<void>)[],
): Promise<void> {
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < competitors.length; i++) {
      await competitors[(round + i) % competitors.length]!(round);
    }
  }
}

/** Writes a file, and the directories above it. */
export function put(path: string, data: Uint8Array | string): void {
  fs.mkdirSync(dirname(path), { recursive: true });
  fs.writeFileSync(path, data);
}
