/** A device that updates, beside the tools that one would otherwise bring files to it with. */

import * as fs from "node:fs";
import {
  clientCommand,
  inRounds,
  median,
  mebibytes,
  memoryOf,
  missing,
  ratio,
  remove,
  run,
  scratch,
  serve,
  settle,
  table,
  whole,
  type Effort,
} from "./harness.ts";
import { rsyncDaemon } from "./peers.ts";
import { noise, writeFiles, writeLargeNoise } from "./trees.ts";

export async function benchDevice(effort: Effort): Promise<void> {
  const absent = missing("device", ["rsync", "curl", "strace", "/usr/bin/time"]);
  const isThere = (tool: string) => !absent.includes(tool);
  if (!isThere("rsync") || !isThere("curl")) return;
  await benchManyFiles(effort, isThere);
  remove(scratch("device"));
  await benchFirmware(effort, isThere);
  remove(scratch("device"));
}

type IsThere = (tool: string) => boolean;

/** One way to bring a device from the old release to the new one. */
interface Way {
  name: string;
  /** Where each round begins: a directory that is copied, or none for an empty one. */
  from?: string;
  /** Files that are going to be replaced: only these are copied, the others get a second name. */
  replaced?: readonly string[];
  command: (device: string) => string[];
  /** Whether the device has the new release when it is done, else why not. */
  check: (device: string) => Promise<void>;
  seconds: number[];
  /** Seconds of CPU, without those of the server. */
  cpus: number[];
  /** Bytes. */
  peaks: number[];
  syncs?: number;
}

// ── 1,000 of 10,000 files ──

const FILES = 10_000;
const CHANGED = 1_000;
const BYTES = 4096;

async function benchManyFiles({ rounds }: Effort, isThere: IsThere): Promise<void> {
  const home = scratch("device");
  const root = `${home}/releases`;
  await makeReleases(root);
  const changed = await paths(`${root}/1.0.1`, (i) => isChanged(i));

  // The device as it was left by the update before: files, and the record of them.
  const pristine = `${home}/pristine`;
  await run(["cp", "-a", `${root}/1.0.0`, pristine]);
  fs.mkdirSync(`${home}/old`);
  fs.renameSync(`${root}/1.0.1`, `${home}/1.0.1`);
  {
    await using server = await serve(root);
    await run(clientCommand(pristine, server.origin));
  }
  fs.renameSync(`${home}/1.0.1`, `${root}/1.0.1`);

  await using server = await serve(root);
  await using daemon = await rsyncDaemon(root);
  const config = `${home}/curl`;
  const urls = changed.map((path, i) => `url = "${server.origin}/1.0.1/${path}"\noutput = "${i}"`);
  fs.writeFileSync(config, urls.join("\n"));

  const sameTree = async (device: string) => {
    await run(["diff", "-rq", "-x", ".ota", "-x", "OTA_VERSION.py", `${root}/1.0.1`, device]);
  };
  const allFetched = async (device: string) => {
    if (fs.readdirSync(device).length !== CHANGED) throw new Error("curl did not fetch all");
  };
  const source = `rsync://127.0.0.1:${daemon.port}/root/1.0.1/`;
  const curl = ["curl", "-s", "--fail", "--parallel", "--config", config];
  const way = (name: string, more: Pick<Way, "from" | "command" | "check">): Way => {
    return { name, ...more, replaced: changed, seconds: [], cpus: [], peaks: [] };
  };
  const ways = [
    way("ota.ts client", {
      from: pristine,
      command: (device) => clientCommand(device, server.origin),
      check: sameTree,
    }),
    way("rsync -a", {
      from: `${root}/1.0.0`,
      command: (device) => ["rsync", "-a", "--delete", source, `${device}/`],
      check: sameTree,
    }),
    way("rsync -a --fsync", {
      from: `${root}/1.0.0`,
      command: (device) => ["rsync", "-a", "--delete", "--fsync", source, `${device}/`],
      check: sameTree,
    }),
    way("curl --parallel, files only", { command: () => curl, check: allFetched }),
  ];
  await compete(ways, rounds, isThere);
  report(
    `A device updates ${whole(CHANGED)} of ${whole(FILES)} files (${BYTES} B each) over loopback; ` +
      `median of ${rounds} rounds; ${fileSystemOf(home)}`,
    ways,
  );
}

function isChanged(i: number): boolean {
  return i % (FILES / CHANGED) === 0;
}

function pathOf(i: number): string {
  return `flash/${Math.floor(i / 100)}/file_${i}.bin`;
}

/** Two releases; what did not change has the same time, as rsync needs it to see so. */
async function makeReleases(root: string): Promise<void> {
  const old = new Date("2026-01-01T00:00:00Z");
  const later = new Date("2026-02-01T00:00:00Z");
  for (let i = 0; i < FILES; i++) {
    for (const version of ["1.0.0", "1.0.1"]) {
      const isNew = version === "1.0.1" && isChanged(i);
      writeFiles(`${root}/${version}`, [[pathOf(i), noise(BYTES, isNew ? FILES + i : i)]]);
      const time = isNew ? later : old;
      fs.utimesSync(`${root}/${version}/${pathOf(i)}`, time, time);
    }
    if (i % 200 === 0) await Bun.sleep(0); // For Ctrl-C.
  }
}

async function paths(directory: string, wanted: (i: number) => boolean): Promise<string[]> {
  const found = Array.from({ length: FILES }, (_, i) => i)
    .filter(wanted)
    .map(pathOf);
  const lost = found.find((path) => !fs.existsSync(`${directory}/${path}`));
  if (lost) throw new Error(`${lost} is not there`);
  return found;
}

// ── One large image ──

const IMAGE_BYTES = 2 ** 30;

async function benchFirmware({ quick }: Effort, isThere: IsThere): Promise<void> {
  const rounds = quick ? 2 : 3;
  const home = scratch("device");
  const root = `${home}/releases`;
  writeFiles(`${root}/1.0.0`, [["flash/main.py", "print('meter')\n"]]);
  await writeLargeNoise(`${root}/firmware_2.0.0.bin`, IMAGE_BYTES);
  await using server = await serve(root);
  const before = memoryOf(server.pid).peak;

  const url = `${server.origin}/firmware_2.0.0.bin`;
  const same = (file: string) => async (device: string) => {
    await run(["cmp", `${root}/firmware_2.0.0.bin`, `${device}/${file}`]);
  };
  const curl = ["curl", "-s", "--fail", "-o", "image", url];
  const shell = `${curl.join(" ")} && sync image && sha256sum image`;
  const ways: Way[] = [
    {
      name: "ota.ts client (verified, synced)",
      from: `${root}/1.0.0`,
      command: (device) => clientCommand(device, server.origin, "--ver", "1.0.0"),
      check: same(".ota/ota_0.bin"),
      seconds: [],
      cpus: [],
      peaks: [],
    },
    {
      name: "curl -o",
      command: () => curl,
      check: same("image"),
      seconds: [],
      cpus: [],
      peaks: [],
    },
    {
      name: "curl -o, sync, sha256sum",
      command: () => ["sh", "-c", shell],
      check: same("image"),
      seconds: [],
      cpus: [],
      peaks: [],
    },
  ];
  await compete(ways, rounds, isThere);
  report(
    `A device flashes an image of ${mebibytes(IMAGE_BYTES)} over loopback; median of ${rounds} ` +
      `rounds; ${fileSystemOf(home)}`,
    ways,
    IMAGE_BYTES,
  );
  const grown = [before, memoryOf(server.pid).peak].map(mebibytes);
  console.log(`\nThe server's peak memory: ${grown[0]} at the start, ${grown[1]} after all that.`);
}

// ── Measuring ──

async function compete(ways: Way[], rounds: number, isThere: IsThere): Promise<void> {
  const device = `${scratch("device")}/device`;
  const fresh = async ({ from, replaced = [] }: Way) => {
    remove(device);
    if (from === undefined) fs.mkdirSync(device);
    else await run(["cp", "-al", from, device]);
    for (const path of from === undefined ? [] : replaced) {
      fs.unlinkSync(`${device}/${path}`);
      fs.copyFileSync(`${from}/${path}`, `${device}/${path}`);
      const { atime, mtime } = fs.statSync(`${from}/${path}`);
      fs.utimesSync(`${device}/${path}`, atime, mtime);
    }
    await settle();
  };
  const memory = `${scratch("device")}/memory`;
  const weigh = isThere("/usr/bin/time") ? ["/usr/bin/time", "-f", "%M", "-o", memory] : [];
  const measures = ways.map((way) => async () => {
    await fresh(way);
    const { seconds, cpu } = await run([...weigh, ...way.command(device)], device);
    await way.check(device);
    way.seconds.push(seconds);
    way.cpus.push(cpu);
    way.peaks.push(weigh.length > 0 ? Number(fs.readFileSync(memory, "utf8")) * 1024 : NaN);
  });
  await inRounds(rounds, measures);
  // System calls are counted apart, since that takes time; what only downloads makes none of these.
  for (const way of isThere("strace") ? ways.filter(({ from }) => from !== undefined) : []) {
    await fresh(way);
    way.syncs = await countSyncs(way.command(device), device);
  }
  remove(device);
}

async function countSyncs(command: string[], cwd: string): Promise<number> {
  const log = `${scratch("device")}/syscalls`;
  const calls = "trace=fsync,fdatasync,sync,syncfs,sync_file_range,msync";
  await run(["strace", "-f", "--seccomp-bpf", "-c", "-o", log, "-e", calls, ...command], cwd);
  const lines = fs.readFileSync(log, "utf8").matchAll(/^ *[\d.]+ +[\d.]+ +\d+ +(\d+) .*sync/gm);
  return [...lines].reduce((sum, [, count]) => sum + Number(count), 0);
}

function report(title: string, ways: Way[], bytes?: number): void {
  const ours = ways[0]!;
  const rows = ways.map((way) => {
    const { name, seconds, cpus, peaks, syncs } = way;
    const cpu = `${median(cpus).toFixed(2)} s`;
    const rate = bytes === undefined ? [] : [whole(bytes / 1e6 / median(seconds))];
    const beside = way === ours ? "" : ratio(ours.seconds, seconds);
    const time = `${median(seconds).toFixed(2)} s`;
    return [name, time, ...rate, beside, cpu, whole(syncs ?? NaN), mebibytes(Math.max(...peaks))];
  });
  const rate = bytes === undefined ? [] : ["MB/s"];
  table(title, ["", "time", ...rate, "ota.ts / this", "CPU", "syncs", "peak memory"], rows);
}

/** What kind of file system a path is on: syncing to memory is not syncing. */
function fileSystemOf(path: string): string {
  const mounts = fs.readFileSync("/proc/mounts", "utf8").trim().split("\n");
  const above = mounts
    .map((line) => line.split(" "))
    .filter(([, at = ""]) => path.startsWith(at === "/" ? "/" : `${at}/`))
    .sort((a, b) => (b[1]?.length ?? 0) - (a[1]?.length ?? 0));
  return `on ${above[0]?.[2] ?? "an unknown file system"}`;
}
