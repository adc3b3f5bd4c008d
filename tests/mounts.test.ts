/** What is mounted within a device's root: nothing can be renamed over it, so it is found first. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mountPoints } from "../ota.ts";
import { Temp } from "./helpers/temp.ts";
import { need } from "./helpers/tool.ts";
import { World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

/** A file or directory that stands at another place, too. Only root can do that. */
class BindMount implements Disposable {
  constructor(
    what: string,
    private readonly at: string,
  ) {
    this.#run([need("mount"), "--bind", what, at]);
  }

  [Symbol.dispose](): void {
    this.#run([need("umount"), "-l", this.at]);
  }

  #run(command: string[]): void {
    const { exitCode, stderr } = Bun.spawnSync(command, { stderr: "pipe" });
    if (exitCode !== 0) throw new Error(`this test needs to mount, as root: ${stderr.toString()}`);
  }
}

const ONE = { "flash/main.py": "one\n", "flash/lib/a b\\c.py": "one\n", "flash/lib/same.py": "" };
const TWO = { "flash/main.py": "two\n", "flash/lib/a b\\c.py": "two\n", "flash/lib/same.py": "" };

describe("what is mounted within a root", () => {
  test("is listed by its path below it, whatever is in its name", () => {
    using temp = new Temp({ "a/b\\c d\te\n/f": "", "a/g": "", "a\u00e4/h": "" });
    expect(mountPoints(temp.path)).toEqual(new Set());
    using _ = new BindMount(temp.at("a/g"), temp.at("a/b\\c d\te\n/f"));
    using __ = new BindMount(temp.at("a"), temp.at("a\u00e4"));
    expect(mountPoints(temp.path)).toEqual(new Set(["a/b\\c d\te\n/f", "a\u00e4"]));
    expect(mountPoints(temp.at("a"))).toEqual(new Set(["b\\c d\te\n/f"]));
    expect(mountPoints(temp.at("a\u00e4"))).toEqual(new Set());
    expect([...mountPoints("/")]).toContain("proc");
  });

  for (const [what, at, named] of [
    ["a file that changes", "flash/main.py", "flash/main.py"],
    ["a file that is deleted", "flash/lib/old.py", "flash/lib/old.py"],
    ["a directory of files that change", "flash/lib", "flash/lib"],
    ["the directory of the updater's own files", ".ota", ".ota"],
  ] as const) {
    test(`${what}: it is refused before anything is fetched`, async () => {
      const versions = { "1.0.0": { ...ONE, "flash/lib/old.py": "old\n" }, "1.0.1": TWO };
      await using world = await World.with(versions, { on: "1.0.0" });
      const before = world.tree();
      {
        using _ = new BindMount(`${world.root}/${at}`, `${world.root}/${at}`);
        const { code, stdout, stderr } = await world.client();
        expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
        expect(stderr).toMatch(/^ota\.ts: [^\n]*\n$/);
        expect(stderr).toContain(
          `cannot change ${named} below ${world.root}: something is mounted there`,
        );
        expect(world.sent).toEqual([]);
        expect(world.tree()).toEqual(before);
      }
      expect((await world.client()).last).toBe("updated 1.0.0 -> 1.0.1");
    });
  }

  test("and is no business of an update is left alone", async () => {
    const versions = {
      "1.0.0": { "flash/main.py": "one\n" },
      "1.0.1": { "flash/main.py": "two\n" },
    };
    const device = { "flash/main.py": "one\n", "flash/data.db": "", "data/x": "" };
    await using world = await World.with(versions, { device });
    const mounted = ["device/flash/data.db", "device/data", "device"].map((path) => world.at(path));
    using mounts = new DisposableStack();
    for (const path of mounted) mounts.use(new BindMount(path, path));
    expect((await world.client(["--ver", "1.0.0"])).last).toBe("updated 1.0.0 -> 1.0.1");
  });
});
