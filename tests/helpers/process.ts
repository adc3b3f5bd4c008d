/** What the system knows of a process, to see that it takes no more than it needs. */

import { readdirSync, readFileSync } from "node:fs";

/** The file descriptors that a process has open. */
export function openFiles(pid: number): number {
  return readdirSync(`/proc/${pid}/fd`).length;
}

/** The memory that a process holds, in bytes: resident, without files that it shares. */
export function memoryOf(pid: number): number {
  const text = readFileSync(`/proc/${pid}/status`, "utf8");
  const kilobytes = /^RssAnon:\s+(\d+) kB$/m.exec(text)?.[1];
  if (kilobytes === undefined) throw new Error(`no RssAnon of process ${pid}`);
  return Number(kilobytes) * 1024;
}
