/** The bytes that an update costs on the air, both ways, everything included. */

import * as fs from "node:fs";
import {
  clientCommand,
  cpuOf,
  missing,
  put,
  remove,
  run,
  scratch,
  serve,
  table,
  whole,
  type Effort,
} from "./harness.ts";
import { fetchPackage, readZipped } from "./packages.ts";
import { rsyncDaemon } from "./peers.ts";
import { countingProxy, type Traffic } from "./proxy.ts";
import { noise, sources, withFixes, writeFiles } from "./trees.ts";

type Files = ReadonlyMap<string, string | Uint8Array>;

/** One update: what the device has, and what it is to have. */
interface Update {
  name: string;
  /** The versions of the two releases. */
  versions: [old: string, new: string];
  old: Files;
  new: Files;
  /** Firmware images, of those versions. */
  firmware?: [old: Uint8Array, new: Uint8Array];
}

export async function benchAir(_: Effort): Promise<void> {
  const absent = missing("air", ["rsync", "xdelta3", "bsdiff"]);
  const rows: string[][] = [];
  const notes: string[] = [];
  for (const make of [firmwareUpdate, wasmUpdate, sourcesUpdate, renameUpdate]) {
    let update: Update;
    try {
      update = await make();
    } catch (error) {
      console.log(`air: left out, since its content cannot be had: ${String(error)}`);
      continue;
    }
    const ours = await updateWithOTA(update);
    const has = (tool: string) => !absent.includes(tool);
    const rsync = has("rsync") ? await updateWithRsync(update, []) : undefined;
    const xdelta = has("xdelta3") ? await patchBytes(update, xdelta3) : NaN;
    const bsdiffed = has("bsdiff") ? await patchBytes(update, bsdiff) : NaN;
    const total = ours.up + ours.down;
    rows.push([
      update.name,
      whole(changedBytes(update)),
      whole(zstdBytes(update)),
      whole(total),
      whole(rsync ? rsync.up + rsync.down : NaN),
      whole(xdelta),
      whole(bsdiffed),
      Number.isFinite(xdelta) ? (total / xdelta).toFixed(2) : "–",
      Number.isFinite(bsdiffed) ? (total / bsdiffed).toFixed(2) : "–",
    ]);
    notes.push(
      `${update.name}: ota.ts sent ${whole(ours.up)} B up and ${whole(ours.down)} B down over ` +
        `${ours.connections} connections, with ${(ours.cpu * 1000).toFixed(0)} ms of the server's CPU`,
    );
    if (update.name.startsWith("renamed") && has("rsync")) {
      const { up, down } = await updateWithRsync(update, ["--fuzzy", "--delete-after"]);
      notes.push(
        `${update.name}: rsync -z --fuzzy, which looks for similar names: ${whole(up + down)} B`,
      );
    }
    remove(scratch("air"));
  }
  const peers = ["rsync -z", "xdelta3 -9", "bsdiff", "/ xdelta3", "/ bsdiff"];
  table(
    "Bytes of one update on the air. ota.ts and rsync: all of it, both ways. zstd -19, xdelta3, " +
      "bsdiff: the patches alone, without a way to carry them",
    ["", "whole", "zstd -19", "ota.ts", ...peers],
    rows,
  );
  if (notes.length > 0) console.log(`\n${notes.join("\n")}`);
}

// ── What is updated ──

/** The firmware of a LEGO Prime Hub (STM32F413, MicroPython), of two consecutive releases. */
async function firmwareUpdate(): Promise<Update> {
  const versions: [string, string] = ["7.27.0", "7.28.0"];
  const image = async (version: string) => {
    const found = await fetchPackage("@pybricks/firmware", version);
    return readZipped(`${found}/build/primehub.zip`, "firmware-base.bin");
  };
  const firmware: [Uint8Array, Uint8Array] = [await image(versions[0]), await image(versions[1])];
  const files = new Map([["flash/main.py", "print('hub')\n"]]);
  return { name: "firmware, Pybricks 7.27 to 7.28", versions, old: files, new: files, firmware };
}

/** MicroPython itself, compiled to WebAssembly. */
async function wasmUpdate(): Promise<Update> {
  const versions: [string, string] = ["1.26.0", "1.27.0"];
  const files = async (version: string) => {
    const found = await fetchPackage("@micropython/micropython-webassembly-pyscript", version);
    const wasm = new Uint8Array(fs.readFileSync(`${found}/micropython.wasm`));
    return new Map([["flash/micropython.wasm", wasm]]);
  };
  const [old, changed] = [await files(versions[0]), await files(versions[1])];
  return { name: "WebAssembly, MicroPython 1.26 to 1.27", versions, old, new: changed };
}

async function sourcesUpdate(): Promise<Update> {
  const old = sources(200);
  return { name: "5 of 200 sources", versions: ["1.0.0", "1.0.1"], old, new: withFixes(old, 5) };
}

async function renameUpdate(): Promise<Update> {
  const main = ["flash/main.py", "print('meter')\n"] as const;
  const data = noise(300_000, 7);
  const old = new Map<string, string | Uint8Array>([main, ["flash/table.bin", data]]);
  const changed = new Map<string, string | Uint8Array>([main, ["flash/tariffs.bin", data]]);
  return { name: "renamed file of 300 KB", versions: ["1.0.0", "1.0.1"], old, new: changed };
}

/** The contents that changed, old and new; without an old one where the path is new. */
function changes(update: Update): { old?: Uint8Array; new: Uint8Array }[] {
  const bytes = (data: string | Uint8Array) =>
    typeof data === "string" ? new TextEncoder().encode(data) : data;
  const found = [...update.new].flatMap(([path, data]) => {
    const old = update.old.get(path);
    if (old !== undefined && Buffer.compare(bytes(old), bytes(data)) === 0) return [];
    return [{ ...(old !== undefined && { old: bytes(old) }), new: bytes(data) }];
  });
  const [old, image] = update.firmware ?? [];
  return old && image ? [...found, { old, new: image }] : found;
}

function changedBytes(update: Update): number {
  return changes(update).reduce((sum, change) => sum + change.new.byteLength, 0);
}

// ── How it gets there ──

async function updateWithOTA(update: Update): Promise<Traffic & { cpu: number }> {
  const home = scratch("air");
  const [root, device] = [`${home}/releases`, `${home}/device`];
  const [oldVersion, newVersion] = update.versions;
  const release = (version: string, files: Files, image: Uint8Array | undefined) => {
    // Firmware alone changes the files' version, too, as a build does.
    writeFiles(`${root}/${version}`, files);
    if (image) put(`${root}/firmware_${version}.bin`, image);
  };
  release(oldVersion, update.old, update.firmware?.[0]);
  {
    await using server = await serve(root);
    await run(clientCommand(device, server.origin, "--id", "meter-0042"));
  }
  release(newVersion, update.new, update.firmware?.[1]);
  await using server = await serve(root);
  await using proxy = await countingProxy(server.port);
  const before = cpuOf(server.pid);
  const origin = `http://127.0.0.1:${proxy.port}`;
  const { stdout } = await run(clientCommand(device, origin, "--id", "meter-0042"));
  if (!stdout.includes(`updated ${oldVersion} -> ${newVersion}`)) throw new Error(stdout);
  const ignored = ["-x", ".ota", "-x", "OTA_VERSION.py"];
  await run(["diff", "-r", ...ignored, `${root}/${newVersion}`, device]);
  if (update.firmware) {
    await run(["cmp", `${root}/firmware_${newVersion}.bin`, `${device}/.ota/ota_1.bin`]);
  }
  return { ...proxy.traffic, cpu: cpuOf(server.pid) - before };
}

async function updateWithRsync(update: Update, options: string[]): Promise<Traffic> {
  const home = scratch("air/rsync");
  remove(home);
  const tree = (name: string, files: Files, image: Uint8Array | undefined, time: Date) => {
    writeFiles(`${home}/${name}`, files);
    if (image) put(`${home}/${name}/firmware.bin`, image);
    for (const path of fs.readdirSync(`${home}/${name}`, { recursive: true, encoding: "utf8" })) {
      const data = files.get(path);
      const isSame = data !== undefined && update.old.get(path) === data;
      const at = isSame ? new Date("2026-01-01T00:00:00Z") : time;
      fs.utimesSync(`${home}/${name}/${path}`, at, at);
    }
  };
  tree("new", update.new, update.firmware?.[1], new Date("2026-02-01T00:00:00Z"));
  tree("device", update.old, update.firmware?.[0], new Date("2026-01-01T00:00:00Z"));
  await using daemon = await rsyncDaemon(`${home}/new`);
  await using proxy = await countingProxy(daemon.port);
  const source = `rsync://127.0.0.1:${proxy.port}/root/`;
  await run(["rsync", "-az", "--delete", ...options, source, `${home}/device/`]);
  await run(["diff", "-r", `${home}/new`, `${home}/device`]);
  return { ...proxy.traffic };
}

type Differ = (old: string, changed: string, patch: string) => string[];
const xdelta3: Differ = (old, changed, patch) => ["xdelta3", "-e", "-9", "-s", old, changed, patch];
const bsdiff: Differ = (old, changed, patch) => ["bsdiff", old, changed, patch];

/** The sum of the patches; NaN when there is content that has no old one. */
async function patchBytes(update: Update, differ: Differ): Promise<number> {
  const home = scratch("air/patches");
  let sum = 0;
  for (const change of changes(update)) {
    if (!change.old) return NaN;
    const [old, changed, patch] = [`${home}/old`, `${home}/new`, `${home}/patch`];
    fs.writeFileSync(old, change.old);
    fs.writeFileSync(changed, change.new);
    fs.rmSync(patch, { force: true });
    await run(differ(old, changed, patch));
    sum += fs.statSync(patch).size;
  }
  return sum;
}

function zstdBytes(update: Update): number {
  const sizes = changes(update).map((change) => {
    return Bun.zstdCompressSync(change.new, { level: 19 }).byteLength;
  });
  return sizes.reduce((sum, size) => sum + size, 0);
}
