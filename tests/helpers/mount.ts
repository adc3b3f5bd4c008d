/** A file system of its own, of some size, below a temporary directory. Only root can do that. */

import { mkdirSync } from "node:fs";
import { need } from "./tool.ts";

/** A file system in memory, which goes when the test ends. */
export class Mount implements Disposable {
  /** @param options as mount(8) has them for tmpfs: `size=400k` */
  constructor(
    readonly path: string,
    options: string,
  ) {
    mkdirSync(path, { recursive: true });
    this.#run([need("mount"), "-t", "tmpfs", "-o", options, "tmpfs", path]);
  }

  remount(options: string): void {
    this.#run([need("mount"), "-o", `remount,${options}`, this.path]);
  }

  [Symbol.dispose](): void {
    this.#run([need("umount"), "-l", this.path]);
  }

  #run(command: string[]): void {
    const { exitCode, stderr } = Bun.spawnSync(command, { stderr: "pipe" });
    if (exitCode !== 0) {
      throw new Error(`this test needs to mount file systems, as root: ${stderr.toString()}`);
    }
  }
}
