/** Updates, and what carries them to a device: all bytes are counted, both ways. */

import * as fs from "node:fs";
import type { Told } from "./board.ts";
import { clientCommand, cpuOf, put, remove, run, scratch, serve } from "./harness.ts";
import type { Change } from "./patches.ts";
import { rsyncDaemon } from "./peers.ts";
import { countingProxy, type Traffic } from "./proxy.ts";
import { writeFiles } from "./trees.ts";

/** Path → content. */
export type Files = ReadonlyMap<string, string | Uint8Array>;

/** One update: what the device has, and what it is to have. */
export interface Update {
  name: string;
  old: Files;
  new: Files;
  /** Firmware images. */
  firmware?: [old: Uint8Array, new: Uint8Array];
}

/** What an update has cost. */
export interface Cost extends Traffic {
  /** Seconds of the server's CPU. */
  cpu: number;
}

const [OLD, NEW] = ["1.0.0", "1.0.1"] as const;
/** Bytes of a board's slot, unless an image is larger. */
const SLOT = 2 * 1024 * 1024;
/** Seconds that a board may take for an update. */
const PATIENCE = 300;

/** The contents that an update changes. */
export function changes(update: Update): Change[] {
  const bytes = (data: string | Uint8Array) =>
    typeof data === "string" ? new TextEncoder().encode(data) : data;
  const found: Change[] = [...update.new].flatMap(([path, data]) => {
    const old = update.old.get(path);
    if (old !== undefined && Buffer.compare(bytes(old), bytes(data)) === 0) return [];
    return [{ ...(old !== undefined && { old: bytes(old) }), new: bytes(data) }];
  });
  const [old, image] = update.firmware ?? [];
  return old && image ? [...found, { old, new: image }] : found;
}

/** Something that updates itself from a server on a port; where its releases are. */
type Updater<Result> = (port: number, root: string) => Promise<Result>;

/**
 * Installs the old release on a device, and counts what the update to the new one costs. Firmware
 * comes over the air both times, so that the device knows what it runs.
 */
async function overTheAir<Result>(
  update: Update,
  updater: Updater<Result>,
): Promise<Cost & { result: Result }> {
  const root = `${scratch("air")}/releases`;
  remove(root);
  const release = (version: string, files: Files, image: Uint8Array | undefined) => {
    writeFiles(`${root}/${version}`, files);
    if (image) put(`${root}/firmware_${version}.bin`, image);
  };
  release(OLD, update.old, update.firmware?.[0]);
  {
    await using server = await serve(root);
    await updater(server.port, root);
  }
  release(NEW, update.new, update.firmware?.[1]);
  await using server = await serve(root);
  await using proxy = await countingProxy(server.port);
  const before = cpuOf(server.pid);
  const result = await updater(proxy.port, root);
  return { ...proxy.traffic, cpu: cpuOf(server.pid) - before, result };
}

/** Updates with `bun ota.ts client`. */
export async function updateClient(update: Update): Promise<Cost> {
  const device = `${scratch("air")}/device`;
  remove(device);
  const cost = await overTheAir(update, async (port, root) => {
    const origin = `http://127.0.0.1:${port}`;
    await run(clientCommand(device, origin, "--id", "meter-0042"));
    return root;
  });
  const root = cost.result;
  await run(["diff", "-r", "-x", ".ota", "-x", "OTA_VERSION.py", `${root}/${NEW}`, device]);
  if (update.firmware) {
    await run(["cmp", `${root}/firmware_${NEW}.bin`, `${device}/.ota/ota_1.bin`]);
  }
  return cost;
}

/** Makes a directory a board with these files, as after the installation over a cable. */
function makeBoard(directory: string, files: Files): void {
  fs.mkdirSync(`${directory}/sd`, { recursive: true });
  const paths = [...files].map(([path, data]) => [path.replace(/^flash\//, ""), data] as const);
  writeFiles(directory, [...paths, ["OTA_VERSION.py", `VERSION = '${OLD}'\n`]]);
}

/**
 * Updates the firmware of a board; the files of the update are those of its library and
 * application.
 *
 * @throws {Error} when its new slot is not the image, byte for byte
 */
export async function updateBoard(update: Update): Promise<Cost & Told> {
  const [old, image] = update.firmware ?? [];
  if (!old || !image) throw new Error(`${update.name} has no firmware`);
  const directory = `${scratch("air")}/board`;
  remove(directory);
  makeBoard(directory, update.old);
  const largest = Math.max(SLOT, old.byteLength, image.byteLength);
  const slot = Math.ceil(largest / 65536) * 65536;
  const script = `${import.meta.dirname}/board.ts`;
  const { result, ...cost } = await overTheAir(update, async (port) => {
    const command = [process.execPath, script, directory, `${port}`, `${slot}`];
    const { stdout } = await run(["timeout", `${PATIENCE}`, ...command]);
    return JSON.parse(stdout) as Told;
  });
  const flashed = fs.readFileSync(`${directory}/hw/${result.running}.bin`);
  if (!flashed.subarray(0, image.byteLength).equals(image)) {
    throw new Error(`${result.running} is not the new image\n${result.output.join("\n")}`);
  }
  return { ...cost, ...result };
}

/** Updates with an rsync daemon. */
export async function updateWithRsync(update: Update, options: string[]): Promise<Traffic> {
  const home = scratch("air/rsync");
  remove(home);
  const tree = (name: string, files: Files, time: Date) => {
    writeFiles(`${home}/${name}`, files);
    for (const path of fs.readdirSync(`${home}/${name}`, { recursive: true, encoding: "utf8" })) {
      const data = files.get(path);
      const isSame = data !== undefined && update.old.get(path) === data;
      const at = isSame ? new Date("2026-01-01T00:00:00Z") : time;
      fs.utimesSync(`${home}/${name}/${path}`, at, at);
    }
  };
  tree("new", update.new, new Date("2026-02-01T00:00:00Z"));
  tree("device", update.old, new Date("2026-01-01T00:00:00Z"));
  await using daemon = await rsyncDaemon(`${home}/new`);
  await using proxy = await countingProxy(daemon.port);
  const source = `rsync://127.0.0.1:${proxy.port}/root/`;
  await run(["rsync", "-az", "--delete", ...options, source, `${home}/device/`]);
  await run(["diff", "-r", `${home}/new`, `${home}/device`]);
  return { ...proxy.traffic };
}
