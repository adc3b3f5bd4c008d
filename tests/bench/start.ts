/**
 * A server with much to serve: how long until it answers, what it holds after many requests, and
 * what it costs while nobody asks.
 */

import * as fs from "node:fs";
import { Random } from "../helpers/random.ts";
import {
  freePort,
  inRounds,
  median,
  mebibytes,
  memoryOf,
  missing,
  put,
  ratio,
  run,
  scratch,
  serveCommand,
  settle,
  start,
  table,
  until,
  whole,
  wholeCpuOf,
  type Effort,
} from "./harness.ts";
import { noise } from "./trees.ts";

const VERSIONS = 10;
const FILES = 2_000; // In each.
const BYTES = 2 ** 30;
const REQUESTS = 100_000;
/** Seconds after which no more requests are made, on a machine that has other things to do. */
const REQUESTS_TIME = 120;

/** What one competitor took, in all rounds. */
interface Times {
  seconds: number[];
  cpus: number[];
}

export async function benchStart({ rounds, quick }: Effort): Promise<void> {
  if (missing("start", ["sha1sum", "sha256sum"]).length > 0) return;
  const root = scratch("start/releases");
  const paths = await makeRoot(root);
  await settle();

  const list = `${scratch("start")}/list`;
  fs.writeFileSync(list, paths.map((path) => `${root}/${path}\0`).join(""));
  const sum = (tool: string) => async () =>
    run(["sh", "-c", `xargs -0 ${tool} < '${list}' > '${list}.${tool}'`]);
  const ota: Times = { seconds: [], cpus: [] };
  const one: Times = { seconds: [], cpus: [] };
  const two: Times = { seconds: [], cpus: [] };
  const note = async (times: Times, task: () => Promise<{ seconds: number; cpu: number }>) => {
    const { seconds, cpu } = await task();
    times.seconds.push(seconds);
    times.cpus.push(cpu);
  };
  const [sha1, sha256] = [sum("sha1sum"), sum("sha256sum")];
  await sha1(); // The page cache is warm from here on.
  await inRounds(rounds, [
    () => note(ota, () => timeToFirstManifest(root)),
    () => note(one, sha1),
    () => note(two, sha256),
  ]);
  const row = (name: string, times: Times) => [
    name,
    `${median(times.seconds).toFixed(2)} s`,
    times === ota ? "" : ratio(ota.seconds, times.seconds),
    `${median(times.cpus).toFixed(2)} s`,
    times === ota ? "" : ratio(ota.cpus, times.cpus),
  ];
  table(
    `Start on ${whole(paths.length)} files, ${mebibytes(BYTES)}, to the first manifest; ` +
      `median of ${rounds} rounds, warm page cache`,
    ["", "time", "ota.ts / this", "CPU", "ota.ts / this"],
    [row("ota.ts serve (SHA-1 and SHA-256)", ota), row("sha1sum", one), row("sha256sum", two)],
  );
  await weighRunning(root, paths, quick ? 5 : 15);
}

async function makeRoot(root: string): Promise<string[]> {
  const random = new Random(4);
  const mean = BYTES / (VERSIONS * FILES);
  const paths: string[] = [];
  for (let left = BYTES, i = 0; i < VERSIONS * FILES; i++) {
    const last = i === VERSIONS * FILES - 1;
    const size = last ? left : Math.min(left, Math.round(mean * (0.02 + 1.96 * random.next())));
    left -= size;
    const path = `1.${Math.floor(i / FILES)}.0/flash/${i % 40}/part_${i % FILES}.bin`;
    put(`${root}/${path}`, noise(size, i));
    paths.push(path);
    if (i % 500 === 0) await Bun.sleep(0); // For Ctrl-C.
  }
  return paths;
}

const FIRST = "/manifest.json?current_ver=1.8.0";

/** Whether a server answers with the manifest of the whole newest release. */
async function answersWhole(origin: string): Promise<boolean> {
  const response = await fetch(origin + FIRST);
  const text = await response.text();
  if (response.status !== 200) return false;
  const { version, update } = JSON.parse(text) as { version: string; update: unknown[] };
  return version === `1.${VERSIONS - 1}.0` && update.length === FILES;
}

async function timeToFirstManifest(root: string): Promise<{ seconds: number; cpu: number }> {
  const port = await freePort();
  const started = performance.now();
  await using server = start(serveCommand(root, port));
  await until(server, () => answersWhole(`http://127.0.0.1:${port}`));
  return { seconds: (performance.now() - started) / 1000, cpu: wholeCpuOf(server.pid) };
}

async function weighRunning(root: string, paths: string[], window: number): Promise<void> {
  const port = await freePort();
  const origin = `http://127.0.0.1:${port}`;
  await using server = start(serveCommand(root, port));
  await until(server, () => answersWhole(origin));
  const fresh = memoryOf(server.pid);
  const idle = async () => {
    await Bun.sleep(3000); // What a start or a load leaves to do.
    const before = wholeCpuOf(server.pid);
    await Bun.sleep(window * 1000);
    return ((wholeCpuOf(server.pid) - before) / window) * 100;
  };
  const idleFresh = await idle();
  const started = performance.now();
  const { wrong, count } = await mixedRequests(origin, paths);
  const seconds = (performance.now() - started) / 1000;
  const after = memoryOf(server.pid);
  const idleAfter = await idle();
  const later = memoryOf(server.pid);
  const row = (name: string, memory: typeof fresh, cpu?: number) => [
    name,
    mebibytes(memory.resident),
    mebibytes(memory.anonymous),
    mebibytes(memory.peak),
    cpu === undefined ? "" : `${cpu.toFixed(2)} %`,
  ];
  table(
    `Memory with that root, and CPU of one core while idle, over ${window} s`,
    ["", "resident", "of it anonymous", "peak so far", "idle CPU"],
    [
      row("after the start", fresh, idleFresh),
      row(`after ${whole(count)} mixed requests`, after),
      row("when they have rested", later, idleAfter),
    ],
  );
  const verdict = wrong.size === 0 ? "every one answered as it should be" : "NOT ALL WELL:";
  console.log(`\n${whole(count)} mixed requests in ${seconds.toFixed(0)} s, ${verdict}`);
  for (const [what, count] of wrong) console.log(`${what}: ${count} times`);
}

/** @returns what was answered otherwise than it should be, and how often; and how many were asked */
async function mixedRequests(
  origin: string,
  paths: string[],
): Promise<{ wrong: Map<string, number>; count: number }> {
  const random = new Random(5);
  const wrong = new Map<string, number>();
  const end = performance.now() + REQUESTS_TIME * 1000;
  let count = 0;
  const one = async () => {
    const path = `/${random.pick(paths)}`;
    const dice = random.next();
    const [what, target, status, init]: [string, string, number, RequestInit?] =
      dice < 0.3
        ? ["a poll", `/manifest.json?current_ver=1.${VERSIONS - 1}.0&devid=${count}`, 200]
        : dice < 0.35
          ? ["a manifest", `/manifest.json?current_ver=1.${random.below(VERSIONS)}.0`, 200]
          : dice < 0.4
            ? [
                "an unknown version of an unknown host",
                `/manifest.json?current_ver=${random.next()}`,
                200,
                { headers: { Host: `h${random.below(1e9)}.example` } },
              ]
            : dice < 0.7
              ? ["a file", path, 200]
              : dice < 0.8
                ? ["nothing", `/${random.next()}/${random.next()}`, 404]
                : dice < 0.9
                  ? ["a range", path, 206, { headers: { Range: "bytes=0-99" } }]
                  : ["a head", path, 200, { method: "HEAD" }];
    const response = await fetch(origin + target, init);
    await response.arrayBuffer();
    if (response.status === status) return;
    const found = `${what} answered ${response.status}`;
    wrong.set(found, (wrong.get(found) ?? 0) + 1);
  };
  const worker = async () => {
    while (count < REQUESTS && performance.now() < end) {
      count++;
      await one();
    }
  };
  await Promise.all(Array.from({ length: 16 }, worker));
  return { wrong, count };
}
