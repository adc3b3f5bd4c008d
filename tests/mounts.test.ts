/** What is mounted within a device's root: nothing can be renamed over it, so it is found first. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mountPoints } from "../ota.ts";
import { layTree, readTree, Temp } from "./helpers/temp.ts";
import { need, ota } from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

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
    using temp = new Temp();
    layTree(temp.path, { "a/b\\c d\te\n/f": "", "a/g": "", "a\u00e4/h": "" });
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
      using temp = new Temp();
      layTree(temp.at("releases/1.0.0"), { ...ONE, "flash/lib/old.py": "old\n" });
      layTree(temp.at("releases/1.0.1"), TWO);
      const root = temp.at("device");
      {
        await using first = await Served.start(temp.at("releases"), { latest: "1.0.0" });
        const { code } = await ota(["client", "--root", root, "--server", first.url]);
        expect(code).toBe(0);
      }
      const before = readTree(root);
      await using server = await Served.start(temp.at("releases"));
      const client = ["client", "--root", root, "--server", server.url];
      {
        using _ = new BindMount(`${root}/${at}`, `${root}/${at}`);
        const { code, stdout, stderr } = await ota(client);
        expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
        expect(stderr).toMatch(/^ota\.ts: [^\n]*\n$/);
        expect(stderr).toContain(
          `cannot change ${named} below ${root}: something is mounted there`,
        );
        expect(server.sent).toEqual([]);
        expect(readTree(root)).toEqual(before);
      }
      expect((await ota(client)).last).toBe("updated 1.0.0 -> 1.0.1");
    });
  }

  test("and is no business of an update is left alone", async () => {
    using temp = new Temp();
    layTree(temp.at("releases"), {
      "1.0.0/flash/main.py": "one\n",
      "1.0.1/flash/main.py": "two\n",
    });
    layTree(temp.at("device"), { "flash/main.py": "one\n", "flash/data.db": "", "data/x": "" });
    await using server = await Served.start(temp.at("releases"));
    using _ = new BindMount(temp.at("device/flash/data.db"), temp.at("device/flash/data.db"));
    using __ = new BindMount(temp.at("device/data"), temp.at("device/data"));
    using ___ = new BindMount(temp.at("device"), temp.at("device"));
    const args = ["client", "--root", temp.at("device"), "--server", server.url, "--ver", "1.0.0"];
    expect((await ota(args)).last).toBe("updated 1.0.0 -> 1.0.1");
  });
});
