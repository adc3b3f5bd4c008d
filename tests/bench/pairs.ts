/** Pairs of firmware images, old and new: those that npm has, and those of a directory. */

import * as fs from "node:fs";
import { fetchPackage, readZipped } from "./packages.ts";

/** Firmware before and after an update. */
export interface Pair {
  name: string;
  old: Uint8Array;
  new: Uint8Array;
}

/** Hubs of LEGO, with MicroPython: STM32F413, STM32L431, STM32F030. */
const HUBS = ["primehub", "technichub", "movehub"] as const;

/**
 * Fetches what npm has: Pybricks 7.27 and 7.28, and MicroPython itself, compiled to WebAssembly,
 * 1.26 and 1.27. What cannot be had is left out, and said.
 */
export async function npmPairs(): Promise<Pair[]> {
  const found: Pair[] = [];
  for (const fetchThem of [hubPairs, wasmPair]) {
    try {
      found.push(...(await fetchThem()));
    } catch (error) {
      console.log(`air: left out, since its content cannot be had: ${String(error)}`);
    }
  }
  return found;
}

async function hubPairs(): Promise<Pair[]> {
  const before = await fetchPackage("@pybricks/firmware", "7.27.0");
  const after = await fetchPackage("@pybricks/firmware", "7.28.0");
  const image = (from: string, hub: string) =>
    readZipped(`${from}/build/${hub}.zip`, "firmware-base.bin");
  return HUBS.map((hub) => ({ name: hub, old: image(before, hub), new: image(after, hub) }));
}

async function wasmPair(): Promise<Pair[]> {
  const image = async (version: string) => {
    const found = await fetchPackage("@micropython/micropython-webassembly-pyscript", version);
    return new Uint8Array(fs.readFileSync(`${found}/micropython.wasm`));
  };
  return [{ name: "wasm", old: await image("1.26.0"), new: await image("1.27.0") }];
}

/**
 * Reads the pairs of a directory: `NAME.old` and `NAME.new`; other files do not matter.
 *
 * @throws {Error} when there are none, one is without the other, or one is empty
 */
export function readPairs(directory: string): Pair[] {
  const names = fs.readdirSync(directory).filter((name) => /.\.(old|new)$/.test(name));
  for (const name of names) {
    const other = name.replace(/old$|new$/, (end) => (end === "old" ? "new" : "old"));
    if (!names.includes(other)) throw new Error(`${directory} has ${name} and no ${other}`);
  }
  if (names.length === 0) throw new Error(`${directory} has no pairs: NAME.old and NAME.new`);
  const read = (name: string) => {
    const bytes = new Uint8Array(fs.readFileSync(`${directory}/${name}`));
    if (bytes.byteLength === 0) throw new Error(`${directory}/${name} is empty`);
    return bytes;
  };
  return names
    .filter((name) => name.endsWith(".old"))
    .map((name) => name.slice(0, -".old".length))
    .sort()
    .map((name) => ({ name, old: read(`${name}.old`), new: read(`${name}.new`) }));
}
