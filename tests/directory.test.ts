/**
 * A device that updates from a directory of releases: a USB stick, an SD card. The same transaction
 * as over a network, so what matters most is tried again here: files, firmware, trial, a way back.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, readFileSync, renameSync, symlinkSync, writeFileSync } from "node:fs";
import {
  DirectoryOTA,
  OTAError,
  status,
  type OTAEvent,
  type OTAOptions,
  type Status,
} from "../ota.ts";
import { noise, program, sha256 } from "./helpers/content.ts";
import { asTree, layTree, readTree, Temp, type Tree } from "./helpers/temp.ts";
import { ota, run, Tool, type Ran } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const LARGE = noise(300_000, 1);
const V1: Tree = {
  "flash/boot.py": "import main\n",
  "flash/main.py": "print('one')\n",
  "flash/lib/old.py": "OLD = 1\n",
  "flash/lib/same.py": "SAME = 1\n",
  "flash/asset.bin": LARGE,
};
const V2: Tree = {
  "flash/boot.py": "import main\n",
  "flash/main.py": "print('two')\n",
  "flash/lib/same.py": "SAME = 1\n",
  "flash/lib/new lib #1 100%.py": "NEW = 1\n",
  "flash/deep/er/ä+?.py": "DEEP = 1\n",
  "flash/empty": "",
  "flash/.hidden": "hidden\n",
  "sd/asset.bin": LARGE,
};
const VERSION_1 = { "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n" };
const VERSION_2 = { "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" };
const IMAGE_1 = program(3000, 2);
const IMAGE_2 = program(5000, 3);

/** A stick with releases, and room for a device `device`. */
class Van extends Temp {
  readonly stick = this.at("stick");
  readonly root = this.at("device");

  constructor(versions: Record<string, Tree> = { "1.0.0": V1 }, more: Tree = {}) {
    super();
    this.bring(versions, more);
  }

  /** Puts releases on the stick. */
  bring(versions: Record<string, Tree>, more: Tree = {}): void {
    layTree(this.stick, more);
    for (const [name, files] of Object.entries(versions)) layTree(`${this.stick}/${name}`, files);
  }

  client(args: string[] = []): Promise<Ran> {
    return run(["client", "--root", this.root, "--from", this.stick, ...args]);
  }

  /** Updates in this process. */
  update(options: Partial<OTAOptions> = {}) {
    return new DirectoryOTA(this.stick, { root: this.root, ...options }).update();
  }

  status(): Promise<Status> {
    return status(this.root);
  }
}

describe("client --from", () => {
  test("provisions an empty device, and updates it, as a server would", async () => {
    using van = new Van({ "1.0.0": V1 }, { "firmware_1.0.0.bin": IMAGE_1 });
    const first = await van.client();
    expect([first.code, first.last]).toEqual([0, "updated 0 -> 1.0.0 (firmware 0 -> 1.0.0)"]);
    expect(readTree(van.root)).toEqual(asTree({ ...V1, ...VERSION_1 }));

    van.bring({ "1.0.1": V2 }, { "firmware_1.0.1.bin": IMAGE_2 });
    const before = readTree(van.stick);
    writeFileSync(`${van.root}/flash/log.txt`, "the application's own\n");
    const second = await van.client();
    expect([second.code, second.last]).toEqual([
      0,
      "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)",
    ]);
    const now = { ...V2, ...VERSION_2, "flash/log.txt": "the application's own\n" };
    expect(readTree(van.root)).toEqual(asTree(now));
    expect(sha256(readFileSync(`${van.root}/.ota/ota_1.bin`))).toBe(sha256(IMAGE_2));
    // The large file was moved, which nothing need be read for.
    const [, received, reused] = / (\d+) bytes for .* (\d+) files? reused\n$/.exec(
      second.stderr.replace(/^received/m, " "),
    ) ?? [second.stderr];
    expect([Number(received) < 10_000, reused]).toEqual([true, "1"]);
    expect(await van.status()).toMatchObject({ version: "1.0.1", previous_version: "1.0.0" });
    // Nothing is written to the stick.
    expect(readTree(van.stick)).toEqual(before);

    const third = await van.client();
    expect([third.code, third.last, third.stderr]).toEqual([0, "up to date 1.0.1", ""]);
  });

  test("never goes back to an older release", async () => {
    using van = new Van({ "1.0.1": V2 });
    await van.update();
    using older = new Van({ "1.0.0": V1 });
    const { code, last } = await run(["client", "--root", van.root, "--from", older.stick]);
    expect([code, last]).toEqual([0, "up to date 1.0.1"]);
    expect(readTree(van.root)).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("takes the directory from where it is run, and follows a link to it", async () => {
    using van = new Van();
    for (const from of [".", "../stick"]) {
      const root = van.at(`device ${from.length}`);
      const ended = await ota(["client", "--root", root, "--from", from], { cwd: van.stick });
      expect([ended.code, ended.last]).toEqual([0, "updated 0 -> 1.0.0"]);
      expect(readTree(root)).toEqual(asTree({ ...V1, ...VERSION_1 }));
    }
    symlinkSync(van.stick, van.at("usb"));
    const { code } = await run(["client", "--root", van.root, "--from", van.at("usb")]);
    expect([code, readTree(van.root)]).toEqual([0, asTree({ ...V1, ...VERSION_1 })]);
  });

  test("brings content larger than what would be coded, and larger than is read at once", async () => {
    const large: Tree = { "flash/a.bin": new Uint8Array(9_000_000).fill(1), "flash/b.bin": LARGE };
    using van = new Van({ "1.0.0": large }, { "firmware_1.0.0.bin": new Uint8Array(17_000_000) });
    await van.update();
    expect(readTree(van.root)).toEqual(asTree({ ...large, ...VERSION_1 }));
    expect(Bun.file(`${van.root}/.ota/ota_0.bin`).size).toBe(17_000_000);
  });

  test("--repair makes right what was damaged, and reads only that", async () => {
    using van = new Van({ "1.0.0": V1, "1.0.1": V2 });
    await van.update();
    writeFileSync(`${van.root}/flash/main.py`, "damaged\n");
    const { code, stderr } = await van.client(["--repair"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.stringContaining("flash/main.py") });
    expect(stderr).not.toContain("asset.bin");
    expect(readTree(van.root)).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });
});

describe("a check decides here as well", () => {
  const GOOD_ONE = "grep -q one flash/main.py";

  test("a bad release is taken back, remembered, and not tried again; a good one stays", async () => {
    using van = new Van({ "1.0.0": V1 }, { "firmware_1.0.0.bin": IMAGE_1 });
    await van.update();
    van.bring({ "1.0.1": V2 }, { "firmware_1.0.1.bin": IMAGE_2 });
    const bad = await van.client(["--check", GOOD_ONE]);
    expect([bad.code, bad.last]).toEqual([3, "rolled back 1.0.1 -> 1.0.0"]);
    expect(readTree(van.root)).toEqual(asTree({ ...V1, ...VERSION_1 }));
    expect(await van.status()).toMatchObject({ version: "1.0.0", firmware: { version: "1.0.0" } });

    const again = await van.client(["--check", GOOD_ONE]);
    expect([again.code, again.last]).toEqual([3, expect.stringMatching(/^not tried 1\.0\.1/)]);

    const retried = await van.client(["--check", "true", "--retry"]);
    expect([retried.code, retried.last]).toEqual([
      0,
      "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)",
    ]);
    expect(readTree(van.root)).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("rollback goes back without the stick", async () => {
    using van = new Van();
    await van.update();
    van.bring({ "1.0.1": V2 });
    await van.update();
    renameSync(van.stick, van.at("unplugged"));
    const { code, last } = await run(["rollback", "--root", van.root]);
    expect([code, last]).toEqual([0, "rolled back 1.0.1 -> 1.0.0"]);
    expect(readTree(van.root)).toEqual(asTree({ ...V1, ...VERSION_1 }));
  });
});

describe.concurrent("a stick that is", () => {
  /** Pulls it or harms it once the first file was read. */
  async function during(van: Van, harm: () => void): Promise<unknown> {
    let done = false;
    const report = (event: OTAEvent) => {
      if (event.kind !== "fetched" || done) return;
      done = true;
      harm();
    };
    return van.update({ jobs: 1, report }).catch((error: unknown) => error);
  }

  test("pulled half way leaves the device as it was; put back, it goes on", async () => {
    using van = new Van();
    await van.update();
    const was = readTree(van.root);
    van.bring({ "1.0.1": { ...V2, "sd/more.bin": noise(100_000, 4) } });
    const failure = await during(van, () => renameSync(van.stick, van.at("unplugged")));
    expect(failure).toBeInstanceOf(OTAError);
    expect(readTree(van.root)).toEqual(was);
    renameSync(van.at("unplugged"), van.stick);
    const { code, stderr } = await van.client();
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringMatching(/ [2-9] files reused/),
    });
    expect(readTree(van.root)).toEqual(
      asTree({ ...V2, "sd/more.bin": noise(100_000, 4), ...VERSION_2 }),
    );
  });

  test("failing does no harm: what is read other than it was is refused", async () => {
    const harms: ((file: string) => void)[] = [
      (file) => writeFileSync(file, "print('TWO')\n"), // As long as before.
      (file) => appendFileSync(file, "more\n"),
    ];
    await Promise.all(
      harms.map(async (harm) => {
        using van = new Van();
        await van.update();
        const was = readTree(van.root);
        van.bring({ "1.0.1": V2 });
        const file = `${van.stick}/1.0.1/flash/main.py`;
        // The first to be read is another file.
        expect(await during(van, () => harm(file))).toBeInstanceOf(OTAError);
        expect(readTree(van.root)).toEqual(was);
        writeFileSync(file, V2["flash/main.py"]!);
        await van.update();
        expect(readTree(van.root)).toEqual(asTree({ ...V2, ...VERSION_2 }));
      }),
    );
  });

  test("there while the device loses power costs nothing: the next start goes on", async () => {
    const many = Object.fromEntries(
      Array.from({ length: 60 }, (_, i) => [`sd/${i}.bin`, noise(20_000, 10 + i)]),
    );
    using van = new Van();
    await van.update();
    const was = readTree(van.root);
    van.bring({ "1.0.1": { ...V2, ...many } });
    {
      const args = ["client", "--root", van.root, "--from", van.stick, "--jobs", "1"];
      await using tool = new Tool(args);
      await tool.until(/fetched .*\n/, "stderr");
      tool.kill();
      await tool.ended;
    }
    // A busy machine may have killed it while it committed.
    expect((await run(["status", "--root", van.root])).code).toBe(0);
    expect([was, asTree({ ...V2, ...many, ...VERSION_2 })]).toContainEqual(readTree(van.root));
    const { code } = await van.client();
    expect(code).toBe(0);
    expect(readTree(van.root)).toEqual(asTree({ ...V2, ...many, ...VERSION_2 }));
  });

  test("not there: one line that names it, exit code 1, and the device is as it was", async () => {
    using van = new Van();
    await van.update();
    const was = readTree(van.root);
    const file = van.at("file");
    writeFileSync(file, "no directory");
    for (const from of [van.at("nowhere"), file]) {
      const ended = await run(["client", "--root", van.root, "--from", from]);
      expect([ended.code, ended.stdout]).toEqual([1, ""]);
      expect(ended.stderr).toMatch(/^ota\.ts: .*\n$/);
      expect(ended.stderr).toContain(from);
      // It speaks of the option that was given.
      expect(ended.stderr).not.toContain("--root");
    }
    expect(readTree(van.root)).toEqual(was);
  });

  test("empty: there is nothing newer", async () => {
    using van = new Van({}, { "notes.txt": "no release\n" });
    layTree(van.root, { "flash/main.py": "mine\n" });
    const { code, last } = await van.client(["--ver", "1.0.0"]);
    expect([code, last]).toEqual([0, "up to date 1.0.0"]);
    expect(readTree(van.root)).toEqual(asTree({ "flash/main.py": "mine\n" }));
  });

  test("plugged in later: --every waits for it", async () => {
    using van = new Van();
    renameSync(van.stick, van.at("unplugged"));
    const args = ["client", "--root", van.root, "--from", van.stick, "--every", "1s"];
    await using tool = new Tool(args);
    await tool.until(/^ota\.ts: .*\n/m, "stderr");
    renameSync(van.at("unplugged"), van.stick);
    await tool.until(/^updated 0 -> 1\.0\.0\n/m);
    tool.kill("SIGTERM");
    expect((await tool.ended).code).toBe(0);
    expect(readTree(van.root)).toEqual(asTree({ ...V1, ...VERSION_1 }));
  });
});

describe("--from does not go together with", () => {
  test("--server: one line that names both, exit code 2, and nothing happens", async () => {
    using van = new Van();
    const { code, stdout, stderr } = await van.client(["--server", "http://127.0.0.1:8000"]);
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toMatch(/^ota\.ts: .*--from.*--server.*\n$/);
    expect(await Bun.file(`${van.root}/flash/main.py`).exists()).toBe(false);
  });

  test("nothing: a directory is needed", async () => {
    using van = new Van();
    const { code, stderr } = await ota(["client", "--root", van.root, "--from"]);
    expect([code, stderr]).toEqual([2, expect.stringContaining("--from")]);
  });
});
