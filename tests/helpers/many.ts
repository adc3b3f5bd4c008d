/**
 * Runs several command lines in one process, where a process for each would cost too much time: their
 * JSON is the only argument. After each, its exit code goes to stderr between two NULs.
 */

import { main } from "../../ota.ts";

// As where the command is the main module: see the end of ota.ts.
for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
for (const args of JSON.parse(process.argv[2]!) as string[][]) {
  const code = await main(args);
  process.stderr.write(`\0${code}\0`);
}
