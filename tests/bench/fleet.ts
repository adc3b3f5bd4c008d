/**
 * Many devices at once, all played by this process: as deployed boards do it, each request is a
 * connection of its own, HTTP/1.0, read until the server closes.
 */

import * as fs from "node:fs";
import { Postgres } from "../helpers/postgres.ts";
import {
  cpuOf,
  inRounds,
  mebibytes,
  median,
  memoryOf,
  milliseconds,
  percentile,
  ratio,
  scratch,
  serve,
  table,
  whole,
  type Effort,
  type Serving,
} from "./harness.ts";
import { noise, writeFiles } from "./trees.ts";

const DEVICES = 10_000;
const UPDATING = 1_000;
const FILES = 10;
const BYTES = 4096;
/** Milliseconds that a device waits for an answer. */
const PATIENCE = 30_000;

export async function benchFleet({ quick, rounds }: Effort): Promise<void> {
  const root = scratch("fleet/releases");
  for (const [version, seed] of [
    ["1.0.0", 0],
    ["1.0.1", 100],
  ] as const) {
    const files = Array.from({ length: FILES }, (_, i) => {
      return [`flash/file_${i}.bin`, noise(BYTES, seed + i)] as const;
    });
    writeFiles(`${root}/${version}`, files);
  }
  await using server = await serve(root);
  const waking = await wakeTogether(server);
  const steady = await pollSteadily(server, quick ? 5 : 15);
  const header = ["", "count", "p50", "p99", "max", "errors"];
  const rows = [...waking.rows(), ...steady.rows()];
  table(
    `A fleet: ${whole(DEVICES)} devices poll, and ${whole(UPDATING)} of them update at once ` +
      `(${FILES} files of ${BYTES} B each), a connection for each request`,
    header,
    rows,
  );
  for (const [what, count] of [...waking.errors, ...steady.errors]) {
    console.log(`ERROR: ${what}: ${count} times`);
  }
  const { peak, resident } = memoryOf(server.pid);
  console.log(
    `\nAll awake at once, at most ${whole(openAtOnce())} connections open: done in ` +
      `${waking.seconds.toFixed(1)} s, ${whole(waking.count / waking.seconds)} connections a ` +
      `second, ${((waking.cpu / waking.count) * 1e6).toFixed(0)} µs of the server's CPU for each.\n` +
      `${whole(waking.overflows)} times a connection found the queue of new connections full, ` +
      `which costs a device a second (then it knocks again).\n` +
      `The server's memory: peak ${mebibytes(peak)}, now ${mebibytes(resident)}.`,
  );
  await compareStores(root, 2 * rounds);
}

/** Connections at once where rates are compared: the queue never gets full, which costs a second. */
const ABREAST = 500;

/** What it costs to take down who asks: the same devices, with a fleet and without one. */
async function compareStores(root: string, rounds: number): Promise<void> {
  await using postgres = await Postgres.start([]);
  const stores: [name: string, options: () => Promise<string[]>][] = [
    ["without a fleet", async () => ["--no-fleet"]],
    ["SQLite", async () => ["--fleet", `${scratch("fleet")}/${crypto.randomUUID()}.db`]],
    ["PostgreSQL", async () => ["--fleet", await postgres.database()]],
  ];
  // All are devices never met, and then all are known.
  const found = stores.map(() => ({
    met: [] as number[],
    known: [] as number[],
    cpu: [] as number[],
  }));
  const measure = stores.map(([, options], i) => async () => {
    await using server = await serve(root, ...(await options()));
    const before = cpuOf(server.pid);
    for (const rates of [found[i]!.met, found[i]!.known]) {
      const wave = await wakeTogether(server, 0, ABREAST);
      if (wave.errors.size > 0) throw new Error([...wave.errors.keys()].join("\n"));
      rates.push(wave.count / wave.seconds);
      // What was written beside the wave is part of it; what is left is not part of the next.
      await Bun.sleep(1500);
    }
    found[i]!.cpu.push(((cpuOf(server.pid) - before) / (2 * DEVICES)) * 1e6);
  });
  await inRounds(rounds, measure);
  const [none] = found;
  const rows = stores.map(([name], i) => [
    name,
    whole(median(found[i]!.met)),
    ratio(found[i]!.met, none!.met),
    whole(median(found[i]!.known)),
    ratio(found[i]!.known, none!.known),
    `${median(found[i]!.cpu).toFixed(0)} µs`,
  ]);
  table(
    `${whole(DEVICES)} devices ask, ${ABREAST} at once, a connection each: connections a second, and the ` +
      "ratio to a server that takes nothing down",
    ["", "never met", "ratio (range)", "known", "ratio (range)", "CPU for each"],
    rows,
  );
}

/** What was seen of one wave of requests. */
class Wave {
  readonly errors = new Map<string, number>();
  seconds = 0;
  cpu = 0;
  overflows = 0;
  readonly #latencies = new Map<string, number[]>();
  readonly #failures = new Map<string, number>();

  constructor(readonly name: string) {}

  /** Runs a task and notes how long it took from `since`; whether it went well. */
  async time(what: string, task: () => Promise<void>, since = performance.now()): Promise<boolean> {
    const latencies = this.#latencies.get(what) ?? [];
    this.#latencies.set(what, latencies);
    try {
      await task();
      latencies.push(performance.now() - since);
      return true;
    } catch (error) {
      const text = `${this.name}, ${what}: ${error instanceof Error ? error.message : error}`;
      this.errors.set(text, (this.errors.get(text) ?? 0) + 1);
      this.#failures.set(what, (this.#failures.get(what) ?? 0) + 1);
      return false;
    }
  }

  /** Of requests; whole updates are made of those. */
  get count(): number {
    const counts = [...this.#latencies].map(([what, { length }]) => (what === UPDATE ? 0 : length));
    return counts.reduce((sum, count) => sum + count, 0);
  }

  rows(): string[][] {
    return [...this.#latencies].map(([what, latencies]) => [
      `${this.name}: ${what}`,
      whole(latencies.length),
      ...[50, 99, 100].map((percent) => milliseconds(percentile(latencies, percent))),
      whole(this.#failures.get(what) ?? 0),
    ]);
  }
}

const POLL = "a poll";
const FILE = "a file";
const UPDATE = "a whole update";

/** Everybody asks in the same moment: the power is back. */
async function wakeTogether(
  server: Serving,
  updating = UPDATING,
  abreast = openAtOnce(),
): Promise<Wave> {
  const wave = new Wave("all at once");
  const gate = new Gate(abreast);
  const before = cpuOf(server.pid);
  const overflows = overflowsOfQueues();
  const started = performance.now();
  const devices = Array.from({ length: DEVICES }, (_, i) => {
    const isOld = updating > 0 && i % (DEVICES / updating) === 0;
    return isOld ? update(wave, gate, server, i) : poll(wave, gate, server, i, "1.0.1");
  });
  await Promise.all(devices);
  wave.seconds = (performance.now() - started) / 1000;
  wave.cpu = cpuOf(server.pid) - before;
  wave.overflows = overflowsOfQueues() - overflows;
  return wave;
}

/** Everybody asks once in ten seconds, each at a time of its own, while some update. */
async function pollSteadily(server: Serving, seconds: number): Promise<Wave> {
  const wave = new Wave("1,000 polls/s");
  const gate = new Gate(openAtOnce());
  const running: Promise<unknown>[] = [];
  const started = performance.now();
  let updating = false;
  for (let sent = 0; sent < (DEVICES / 10) * seconds;) {
    const due = ((performance.now() - started) / 1000) * (DEVICES / 10);
    for (; sent < due; sent++) {
      // From when it was due, not from when this process came to it.
      const since = started + (sent / (DEVICES / 10)) * 1000;
      running.push(poll(wave, gate, server, sent % DEVICES, "1.0.1", since));
    }
    if (!updating && performance.now() - started > 1000) {
      updating = true;
      for (let i = 0; i < UPDATING; i++) running.push(update(wave, gate, server, i));
    }
    await Bun.sleep(2);
  }
  await Promise.all(running);
  return wave;
}

function manifestPath(device: number, version: string): string {
  return `/manifest.json?current_ver=${version}&devid=meter-${device}`;
}

async function poll(
  wave: Wave,
  gate: Gate,
  server: Serving,
  device: number,
  version: string,
  since?: number,
): Promise<void> {
  await gate.pass(() => {
    const ask = async () => {
      const body = await get(server.port, manifestPath(device, version));
      if (body.toString() !== "null") throw new Error("not the manifest expected");
    };
    return wave.time(POLL, ask, since);
  });
}

/** Asks, then fetches one file after the other, and checks what came. */
async function update(wave: Wave, gate: Gate, server: Serving, device: number): Promise<void> {
  await wave.time(UPDATE, async () => {
    let manifest = { update: [] as { URL: string; hash: string }[] };
    const asked = await gate.pass(() =>
      wave.time(POLL, async () => {
        const body = await get(server.port, manifestPath(device, "1.0.0"));
        manifest = JSON.parse(body.toString()) as typeof manifest;
        if (manifest.update.length !== FILES) throw new Error("not the manifest expected");
      }),
    );
    if (!asked) throw new Error("no manifest");
    for (const { URL: url, hash } of manifest.update) {
      const fetched = await gate.pass(() =>
        wave.time(FILE, async () => {
          const body = await get(server.port, new URL(url).pathname);
          const found = new Bun.CryptoHasher("sha1").update(body).digest("hex");
          if (found !== hash) throw new Error("not the content expected");
        }),
      );
      if (!fetched) throw new Error("a file did not come");
    }
  });
}

/** One request on a connection of its own; the body of a 200. */
function get(port: number, path: string): Promise<Buffer> {
  const pieces: Uint8Array[] = [];
  return new Promise((done, fail) => {
    const timer = setTimeout(() => fail(new Error(`nothing within ${PATIENCE} ms`)), PATIENCE);
    const end = (error?: Error) => {
      clearTimeout(timer);
      if (error) return fail(error);
      const bytes = Buffer.concat(pieces);
      const blank = bytes.indexOf("\r\n\r\n");
      const status = bytes.toString("latin1", 9, 12);
      if (blank < 0 || status !== "200") return fail(new Error(`answered ${status || "nothing"}`));
      done(bytes.subarray(blank + 4));
    };
    Bun.connect({
      hostname: "127.0.0.1",
      port,
      socket: {
        open: (socket) => {
          socket.write(`GET ${path} HTTP/1.0\r\nHost: 127.0.0.1:${port}\r\n\r\n`);
        },
        data: (_, piece) => void pieces.push(new Uint8Array(piece)),
        end: (socket) => {
          socket.end();
        },
        close: () => end(),
        error: (_, error) => end(error),
        connectError: (_, error) => end(error),
      },
    }).catch((error: unknown) => end(error instanceof Error ? error : new Error(String(error))));
  });
}

/** How many connections this process may have open: one file each here, and one in the server. */
function openAtOnce(): number {
  const limits = fs.readFileSync("/proc/self/limits", "utf8");
  const files = Number(/^Max open files\s+(\d+)/m.exec(limits)?.[1] ?? 1024);
  const [low = 0, high = 0] = fs
    .readFileSync("/proc/sys/net/ipv4/ip_local_port_range", "utf8")
    .split("\t")
    .map(Number);
  return Math.max(100, Math.min(DEVICES, files - 500, high - low - 5000));
}

/** How often on this machine a new connection found the queue of a listening socket full. */
function overflowsOfQueues(): number {
  const [names = [], values = []] = fs
    .readFileSync("/proc/net/netstat", "utf8")
    .split("\n")
    .map((line) => line.split(" "));
  return Number(values[names.indexOf("ListenOverflows")] ?? NaN);
}

/** Lets a number of tasks run at once; the others wait in order. */
class Gate {
  readonly #waiting: (() => void)[] = [];

  constructor(private free: number) {}

  async pass<T>(task: () => Promise<T>): Promise<T> {
    if (this.free > 0) this.free--;
    else await new Promise<void>((go) => this.#waiting.push(go));
    try {
      return await task();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.free++;
    }
  }
}
