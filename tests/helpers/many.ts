/**
 * Runs several command lines in one process, where a process for each would cost too much time: their
 * JSON is the only argument. After each, its exit code and a NUL go to stdout, and a NUL to stderr.
 */

import { main } from "../../ota.ts";

for (const args of JSON.parse(process.argv[2]!) as string[][]) {
  process.stdout.write(`${await main(args)}\0`);
  process.stderr.write("\0");
}
