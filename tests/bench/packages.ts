/** Files out of packages of the npm registry, which are fetched and not kept. */

import * as fs from "node:fs";
import { inflateRawSync } from "node:zlib";
import { run, scratch } from "./harness.ts";

/**
 * Fetches a package.
 *
 * @returns the directory that holds its files
 * @throws {Error} when the registry cannot be reached
 */
export async function fetchPackage(name: string, version: string): Promise<string> {
  const home = scratch(`packages/${name.replace("/", "_")}-${version}`);
  const { stdout } = await run(["npm", "pack", "--silent", `${name}@${version}`], home);
  const archive = stdout.trim().split("\n").at(-1) ?? "";
  await run(["tar", "-xzf", archive], home);
  return `${home}/package`;
}

/**
 * Reads one file of a ZIP archive.
 *
 * @throws {Error} when it is not there
 */
export function readZipped(archive: string, wanted: string): Uint8Array {
  const bytes = fs.readFileSync(archive);
  const end = bytes.lastIndexOf("PK\x05\x06");
  for (let at = bytes.readUInt32LE(end + 16); bytes.readUInt32LE(at) === 0x02014b50;) {
    const length = bytes.readUInt16LE(at + 28);
    const name = bytes.toString("utf8", at + 46, at + 46 + length);
    if (name === wanted) {
      const local = bytes.readUInt32LE(at + 42);
      const start = local + 30 + bytes.readUInt16LE(local + 26) + bytes.readUInt16LE(local + 28);
      const content = bytes.subarray(start, start + bytes.readUInt32LE(at + 20));
      return bytes.readUInt16LE(at + 10) === 0 ? content : inflateRawSync(content);
    }
    at += 46 + length + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
  }
  throw new Error(`${archive} has no ${wanted}`);
}
