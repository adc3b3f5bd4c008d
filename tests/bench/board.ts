/**
 * A board that updates itself, in a process of its own, since it blocks its thread while it waits:
 * MicroPython with the library of the example, on an ESP32 as the tests have it but with firmware
 * slots of real size.
 *
 *     bun tests/bench/board.ts DIR PORT SLOT
 *
 * `DIR` is what the board has in its flash, before and after, its slots as `hw/NAME.bin`; `PORT` is the server's; `SLOT` is the
 * size of a slot in bytes. Prints a `Told` as JSON.
 */

import * as fs from "node:fs";
import { Board, type Start } from "../board/board.ts";
import { CONFIRM, UPDATE } from "../board/fleet.ts";
import { Link } from "../board/link.ts";
import { filesBelow } from "../helpers/temp.ts";

/** What a board that has updated itself says. */
export interface Told {
  /** The slot that runs now. */
  running: string;
  /** From the start that updates to its reset. */
  seconds: number;
  /** Bytes of its heap, and the most that were alive of them. */
  heap: number;
  live: number;
  output: string[];
}

/**
 * Bytes of heap: what the tests find enough, what the code of `chip.py` takes, and garbage. This build
 * scans for addresses in plain Python, and there no garbage is collected before a block is done.
 */
const HEAP = 64 * 1024 + 4096 + 64 * 1024;

/** The chip comes before `boot.py`, as it does on a real board. */
const boot = (slot: number) =>
  `import esp32\nesp32.SIZE = ${slot}\nimport chip\nexecfile("/boot.py")\n`;

/** The board in a directory; slots that are not there yet are erased. */
function loadBoard(directory: string, link: Link, slot: number): Board {
  const board = new Board("esp32", link);
  board.directories.add("/sd");
  for (const name of board.slots()) {
    // What the bootloader of the tests looks at, and what the chip reads and writes.
    board.write(`/hw/${name}`, Uint8Array.of(0xe9));
    board.write(`/hw/${name}.bin`, new Uint8Array(slot).fill(0xff));
  }
  for (const [path, content] of filesBelow(directory)) board.write(`/${path}`, content);
  board.write("/chip.py", fs.readFileSync(`${import.meta.dirname}/chip.py`));
  return board;
}

function saveBoard(board: Board, directory: string): void {
  fs.rmSync(directory, { recursive: true });
  for (const path of board.directories) fs.mkdirSync(`${directory}${path}`, { recursive: true });
  for (const [path, content] of board.files) fs.writeFileSync(`${directory}${path}`, content);
}

/** @throws {Error} with what the board printed, unless it ended like that */
function expectEnd(start: Start, end: Start["end"]): void {
  if (start.end === end) return;
  throw new Error(`the board: ${start.end}\n${[...start.output, start.error].join("\n")}`);
}

/** Updates the board, starts what it has got then, and confirms it. */
async function update(board: Board, slot: number): Promise<Told> {
  const options = { heap: HEAP, boot: false };
  const started = performance.now();
  const updated = await board.start(boot(slot) + UPDATE, options);
  const seconds = (performance.now() - started) / 1000;
  expectEnd(updated, "reset");
  const confirmed = await board.start(boot(slot) + CONFIRM, options);
  expectEnd(confirmed, "done");
  return {
    running: board.otadata()["running"] ?? "",
    seconds,
    heap: HEAP,
    live: updated.heap?.live ?? NaN,
    output: [...updated.output, ...confirmed.output],
  };
}

const [directory = "", port, slot] = process.argv.slice(2);
const link = new Link(Number(port));
const board = loadBoard(directory, link, Number(slot));
const told = await update(board, Number(slot));
link.stop();
saveBoard(board, directory);
console.log(JSON.stringify(told));
