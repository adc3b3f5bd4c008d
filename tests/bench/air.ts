/** The bytes that an update costs on the air, both ways, everything included. */

import * as fs from "node:fs";
import { filesBelow } from "../helpers/temp.ts";
import type { Told } from "./board.ts";
import { benchEncoding } from "./encoding.ts";
import { missing, PAIRS, remove, scratch, table, whole, type Effort } from "./harness.ts";
import { npmPairs, readPairs, type Pair } from "./pairs.ts";
import { dczBytes, dczSize, findTools, patchBytes } from "./patches.ts";
import { noise, sources, withFixes } from "./trees.ts";
import {
  changes,
  updateBoard,
  updateClient,
  updateWithRsync,
  type Cost,
  type Files,
  type Update,
} from "./updates.ts";

/** The library of a board, and an application; none of it changes. `--ota` does not choose it. */
const EXAMPLE = `${import.meta.dirname}/../../examples/smart-meter/1.0.1`;

/** What one update of firmware has cost; without `board` where the board has failed. */
interface Measured {
  update: Update;
  client: Cost;
  board?: Cost & Told;
}

/** Measures updates of firmware and of files, and what it takes to encode them. */
export async function benchAir({ rounds }: Effort): Promise<void> {
  findTools();
  const pairs = [...(await npmPairs()), ...(PAIRS === undefined ? [] : readPairs(PAIRS))];
  await benchFirmware(pairs);
  await benchTrees();
  await benchEncoding(pairs, rounds);
}

// ── Firmware ──

async function benchFirmware(pairs: readonly Pair[]): Promise<void> {
  if (pairs.length === 0) return;
  const rows: string[][] = [];
  const measured: Measured[] = [];
  for (const pair of pairs) {
    const update = firmwareUpdate(pair);
    const client = await updateClient(update);
    const board = await updateBoard(update).catch((error: unknown) => {
      process.exitCode = 1;
      console.error(`air: the board on ${pair.name} failed: ${String(error)}`);
      return undefined;
    });
    measured.push({ update, client, ...(board && { board }) });
    rows.push(await firmwareRow(pair, total(client), board ? total(board) : NaN));
    remove(scratch("air"));
  }
  const patches = ["bsdiff", "xdelta3 -9", "zstd patch", "dcz"];
  table(
    "Bytes of one update of firmware on the air. client and board: all of it, both ways. bsdiff, " +
      "xdelta3, zstd -19 --long --patch-from, dcz: the patches alone, without a way to carry them",
    ["", "new image", "client", "board", ...patches, "client / bsdiff", "board / bsdiff"],
    rows,
  );
  showCosts(measured);
}

/** Firmware alone changes, on a device that has the example's library and application. */
function firmwareUpdate({ name, old, new: image }: Pair): Update {
  const files: Files = filesBelow(fs.realpathSync(EXAMPLE));
  return { name, old: files, new: files, firmware: [old, image] };
}

async function firmwareRow(pair: Pair, client: number, board: number): Promise<string[]> {
  const bsdiff = await patchBytes("bsdiff", [pair]);
  return [
    pair.name,
    whole(pair.new.byteLength),
    whole(client),
    whole(board),
    whole(bsdiff),
    whole(await patchBytes("xdelta3", [pair])),
    whole(await patchBytes("zstd", [pair])),
    whole(await dczSize(pair.old, pair.new)),
    times(client, bsdiff),
    times(board, bsdiff),
  ];
}

/** The parts of the sums, and what else it took. */
function showCosts(measured: readonly Measured[]): void {
  const rows = measured.map(({ update, client, board }) => [
    update.name,
    ...cost(client),
    ...(board ? cost(board) : ["–", "–", "–", "–"]),
    board ? `${board.seconds.toFixed(1)} s` : "–",
    board ? `${whole(board.live)} of ${whole(board.heap)}` : "–",
  ]);
  const columns = (who: string) => [`${who} up`, "down", "connections", "server's CPU"];
  table(
    "The same updates in parts. The board is MicroPython in WebAssembly: its time is not that of a " +
      "real one. Of its heap, what was live at most",
    ["", ...columns("client"), ...columns("board"), "time", "heap"],
    rows,
  );
}

function cost({ up, down, connections, cpu }: Cost): string[] {
  return [whole(up), whole(down), `${connections}`, `${(cpu * 1000).toFixed(0)} ms`];
}

// ── Trees of files ──

async function benchTrees(): Promise<void> {
  const hasRsync = missing("air", ["rsync"]).length === 0;
  const rows: string[][] = [];
  const notes: string[] = [];
  for (const update of [sourcesUpdate(), renameUpdate()]) {
    const client = await updateClient(update);
    const rsync = hasRsync ? total(await updateWithRsync(update, [])) : NaN;
    const found = changes(update);
    rows.push([
      update.name,
      whole(found.reduce((sum, change) => sum + change.new.byteLength, 0)),
      whole(total(client)),
      whole(rsync),
      whole(await patchBytes("bsdiff", found)),
      whole(await patchBytes("xdelta3", found)),
      whole(await patchBytes("zstd", found)),
      whole(await dczBytes(found)),
      times(total(client), rsync),
    ]);
    const [up, down, connections, cpu] = cost(client);
    notes.push(
      `${update.name}: ${up} B up and ${down} B down over ${connections} connections, with ${cpu} ` +
        "of the server's CPU",
    );
    if (update.name.startsWith("renamed") && hasRsync) {
      const fuzzy = await updateWithRsync(update, ["--fuzzy", "--delete-after"]);
      notes.push(
        `${update.name}: rsync -z --fuzzy, which looks for similar names: ${whole(total(fuzzy))} B`,
      );
    }
    remove(scratch("air"));
  }
  const patches = ["bsdiff", "xdelta3 -9", "zstd patch", "dcz"];
  table(
    "Bytes of one update of files on the air. client and rsync: all of it, both ways",
    ["", "changed", "client", "rsync -z", ...patches, "client / rsync"],
    rows,
  );
  console.log(`\n${notes.join("\n")}`);
}

function sourcesUpdate(): Update {
  const old = sources(200);
  return { name: "5 of 200 sources", old, new: withFixes(old, 5) };
}

function renameUpdate(): Update {
  const main = ["flash/main.py", "print('meter')\n"] as const;
  const data = noise(300_000, 7);
  const old = new Map<string, string | Uint8Array>([main, ["flash/table.bin", data]]);
  const changed = new Map<string, string | Uint8Array>([main, ["flash/tariffs.bin", data]]);
  return { name: "renamed file of 300 KB", old, new: changed };
}

// ── Numbers ──

function total({ up, down }: { up: number; down: number }): number {
  return up + down;
}

function times(ours: number, theirs: number): string {
  return Number.isFinite(ours / theirs) ? (ours / theirs).toFixed(2) : "–";
}
