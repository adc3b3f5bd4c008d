/**
 * Whatever is killed, full, forbidden, broken or damaged: the real command, real kills at random
 * times and at exact system calls, and real faults of file systems. The device is on the old
 * release or on the new one, whole, and says which.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  chownSync,
  copyFileSync,
  cpSync,
  readFileSync,
  rmSync,
  statfsSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { status } from "../ota.ts";
import { Double, head, manifestOf, offering, send } from "./helpers/double.ts";
import { Mount } from "./helpers/mount.ts";
import { ALL, Random, seeded } from "./helpers/random.ts";
import { asTree, layTree, otaFiles, readTree, sizesIn, Temp, type Tree } from "./helpers/temp.ts";
import {
  callsOf,
  eventually,
  injecting,
  need,
  ota,
  OTA_TS,
  run,
  Tool,
  type Ended,
  type Ran,
  type ToolOptions,
} from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const V1: Tree = {
  "flash/main.py": "print('one')\n",
  "flash/old/only.py": "OLD = 1\n",
  "flash/turn": "a file\n",
  "flash/re/turn.py": "a directory\n",
  "sd/same": "same\n",
  "sd/logo.bin": Buffer.alloc(5000, "1"),
};
const V2: Tree = {
  "flash/main.py": "print('two')\n",
  "flash/new/er.py": "NEW = 1\n",
  "flash/turn/ed.py": "a directory\n",
  "flash/re": "a file\n",
  "sd/same": "same\n",
  "sd/logo.bin": Buffer.alloc(6000, "2"),
};
const OWN: Tree = { "flash/data.txt": "the application's", top: "the application's, too" };
const IMAGE_1 = Buffer.alloc(3000, 0xe9);
const IMAGE_2 = Buffer.alloc(3000, 0xea);
const TREE_1 = asTree({ ...V1, ...OWN, "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n" });
const TREE_2 = asTree({ ...V2, ...OWN, "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" });

/** Releases and a device on 1.0.0, made once; every test works on a copy of the device. */
const fleet = new Temp();
let server: Served;

beforeAll(async () => {
  layTree(fleet.at("releases/1.0.0"), V1);
  layTree(fleet.at("releases"), { "firmware_1.0.0.bin": IMAGE_1 });
  {
    await using first = await Served.start(fleet.at("releases"));
    const args = ["client", "--root", fleet.at("device"), "--server", first.url];
    const { last, stderr } = await run(args);
    if (last !== "updated 0 -> 1.0.0 (firmware 0 -> 1.0.0)") throw new Error(`${last}\n${stderr}`);
  }
  layTree(fleet.at("device"), OWN);
  layTree(fleet.at("releases/1.0.1"), V2);
  layTree(fleet.at("releases"), { "firmware_1.0.1.bin": IMAGE_2 });
  server = await Served.start(fleet.at("releases"));
});

afterAll(async () => {
  await server[Symbol.asyncDispose]();
  fleet[Symbol.dispose]();
});

/** A device on 1.0.0. */
class Device extends Temp {
  constructor(readonly root = "") {
    super();
    this.root ||= this.at("device");
    cpSync(fleet.at("device"), this.root, { recursive: true });
  }

  args(more: readonly string[] = [], from: { url: string } = server): string[] {
    return ["client", "--root", this.root, "--server", from.url, "--timeout", "60", ...more];
  }

  client(more: readonly string[] = []): Promise<Ran> {
    return run(this.args(more));
  }

  /** A client as a process, to which something happens. */
  process(more: readonly string[], options: ToolOptions): Promise<Ended> {
    return ota(this.args(more), options);
  }

  /** What status says; the firmware that it names has the right content. */
  async status(): Promise<{ version: string; firmware: { version: string } | null }> {
    const { version, firmware, ...more } = await status(this.root);
    if (version === null || firmware === null) throw new Error("it has no record");
    const image = readFileSync(`${this.root}/${firmware.file}`);
    expect(firmware.version).toBe(version);
    expect(image.equals(version === "1.0.0" ? IMAGE_1 : IMAGE_2)).toBe(true);
    return { ...more, version, firmware };
  }

  /** Whether the device is whole, as status (which recovers it) says. */
  async expectWhole(): Promise<string> {
    const { version } = await this.status();
    expect(["1.0.0", "1.0.1"]).toContain(version);
    expect(readTree(this.root)).toEqual(version === "1.0.0" ? TREE_1 : TREE_2);
    return version;
  }

  expectOn1(): void {
    expect(readTree(this.root)).toEqual(TREE_1);
  }

  /** Whether it is on 1.0.0 and a client brings it to 1.0.1. */
  async expectNextSucceeds(...more: string[]): Promise<void> {
    expect(await this.expectWhole()).toBe("1.0.0");
    await this.expectReachesNew(...more);
  }

  async expectReachesNew(...more: string[]): Promise<void> {
    const { code, stderr } = await this.client(more);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    expect(await this.expectWhole()).toBe("1.0.1");
    expect(otaFiles(this.root).filter((name) => /backup|rollback|corrupt/.test(name))).toHaveLength(
      1,
    );
  }
}

/** Every path holds what the old or the new release has there. */
function expectEachOldOrNew(root: string): void {
  const found = readTree(root);
  const mixed = Object.keys({ ...TREE_1, ...TREE_2, ...found }).filter((path) => {
    return ![TREE_1[path], TREE_2[path]].includes(found[path]);
  });
  // A path that turns from a file to a directory, or back, is neither for a moment.
  const turning = /^flash\/(turn|re)\b/;
  expect(mixed.filter((path) => !turning.test(path) || found[path] !== undefined)).toEqual([]);
  for (const path of Object.keys(OWN)) expect(found[path]).toBe(TREE_1[path]!);
}

/** Does a task for every item, a few at a time. */
async function forEach<T>(items: Iterable<T>, task: (item: T) => Promise<void>): Promise<void> {
  const queue = [...items].values();
  const worker = async () => {
    for (const item of queue) await task(item);
  };
  await Promise.all([worker(), worker()]);
}

/** Each run tries others; to repeat one, set SEED, and OTA_ALL for all of every sweep. */
const SEED = seeded("faults");
const random = new Random(SEED);

/** Some of many, in their order. */
function some<T>(items: readonly T[], count: number): T[] {
  return ALL ? [...items] : random.some(items, count);
}

/** Says where in a sweep something went wrong. */
async function at(where: string, task: () => Promise<void>): Promise<void> {
  try {
    await task();
  } catch (error) {
    console.error(`at ${where} (SEED=${SEED}):`);
    throw error;
  }
}

describe.concurrent("killed", () => {
  test("at every rename, link, unlink, mkdir, rmdir and fsync of an update that fails its check", async () => {
    const trying = ["--check", "false"];
    const calls = ["rename", "link", "unlink", "mkdir", "rmdir"];
    using sample = new Device();
    const made = await callsOf(sample.args(trying), calls, 3);
    const points = calls.flatMap((call) => {
      const count = made.filter((line) => line.includes(` ${call}(`)).length;
      expect(count).toBeGreaterThan(1);
      const all = Array.from({ length: count }, (_, i) => [call, i + 1] as const);
      return some(all, 2);
    });
    // These are made by other threads, of which each counts its own.
    const syncs = Array.from({ length: 20 }, (_, i) => ["fsync", i + 1] as const);
    points.push(...some(syncs, 1));
    const ends = { "1.0.0": 0, "1.0.1": 0 };
    let missed = 0;
    await forEach(points, ([call, n]) =>
      at(`${call} ${n}`, async () => {
        using device = new Device();
        const prefix = injecting(call, `signal=SIGKILL:when=${n}`);
        const { signal } = await device.process(trying, { prefix });
        if (signal !== "SIGKILL") missed++;
        expectEachOldOrNew(device.root);
        const version = await device.expectWhole();
        ends[version as keyof typeof ends]++;
        await device.expectReachesNew("--retry", "--check", "true");
      }),
    );
    console.log(
      `SEED=${SEED}: killed at ${points.length - missed} system calls: ` +
        `${ends["1.0.0"]} times on the old release, ${ends["1.0.1"]} times on the new one`,
    );
    // Only of the last of fsync, and of what is left out when threads are faster, is there none.
    expect(missed).toBeLessThan(points.length / 3);
    // Few points may happen to be all on one side.
    if (ALL) expect(Math.min(...Object.values(ends))).toBeGreaterThan(5);
  });

  test("at random times", async () => {
    const started = performance.now();
    {
      using device = new Device();
      await device.process(["--check", "false"], {});
    }
    const usual = performance.now() - started;
    const delays = Array.from({ length: 3 }, () => random.next() * usual * 1.3);
    await forEach(delays, (delay) =>
      at(`${delay.toFixed(1)} ms`, async () => {
        using device = new Device();
        await using tool = new Tool(device.args(["--check", "false"]));
        await Bun.sleep(delay);
        tool.kill("SIGKILL");
        await tool.ended;
        expectEachOldOrNew(device.root);
        await device.expectWhole();
        await device.expectReachesNew("--retry", "--check", "true");
      }),
    );
  });

  test("again and again, during recovery too", async () => {
    using device = new Device();
    const trying = ["--check", "false"];
    for (const n of [9, 3, 2, 1]) {
      const prefix = injecting("rename", `signal=SIGKILL:when=${n}`);
      await device.process(trying, { prefix });
      expectEachOldOrNew(device.root);
    }
    await device.expectWhole();
    await device.expectReachesNew("--retry", "--check", "true");
  });

  test("while rolling back by hand", async () => {
    for (const n of [1, 2, 5]) {
      using device = new Device();
      expect((await device.client()).code).toBe(0);
      const prefix = injecting("rename", `signal=SIGKILL:when=${n}`);
      const { signal } = await ota(["rollback", "--root", device.root], { prefix });
      expect(signal).toBe("SIGKILL");
      expectEachOldOrNew(device.root);
      const version = await device.expectWhole();
      // Once it has begun, it is done.
      expect(version).toBe(n === 1 ? "1.0.1" : "1.0.0");
    }
  });
});

describe.concurrent("system calls that fail", () => {
  const faults = [
    ["rename", "EIO", 20],
    ["fsync", "EIO", 16],
    ["link", "ENOSPC", 9],
    ["mkdir", "ENOSPC", 4],
    ["unlink", "EIO", 12],
  ] as const;
  for (const [call, error, most] of faults) {
    test(`${call}: ${error}`, async () => {
      let failures = 0;
      const all = Array.from({ length: most }, (_, i) => i + 1);
      const points = [1, ...some(all.slice(1), 1)];
      await forEach(points, (n) =>
        at(`${call} ${n}`, async () => {
          using device = new Device();
          const prefix = injecting(call, `error=${error}:when=${n}`);
          const { code, stdout, stderr } = await device.process([], { prefix });
          if (code === 0) return void expect(await device.expectWhole()).toBe("1.0.1");
          failures++;
          expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
          expect(stderr).toMatch(new RegExp(`^ota\\.ts: .*${error}`, "m"));
          // Several threads may meet the fault: also the one that goes back.
          if (!stderr.includes("going back failed as well")) device.expectOn1();
          await device.expectNextSucceeds();
        }),
      );
      expect(failures).toBeGreaterThan(0);
    });
  }
});

describe.concurrent("two at once", () => {
  test("the second one is told, ends with 1, and status says busy", async () => {
    using device = new Device();
    const offer = { version: "1.0.1", put: { "flash/main.py": Buffer.alloc(1000, "two") } };
    const held = Promise.withResolvers<void>();
    await using slow = await Double.start(async (asked, connection) => {
      if (asked.path !== "/manifest.json") await held.promise;
      await offering(offer, () => slow.url)(asked, connection);
    });
    await using first = new Tool(device.args([], slow));
    await eventually("a download", () => slow.asked.length > 1);
    for (const command of [device.args(), ["rollback", "--root", device.root]]) {
      const { code, stdout, stderr } = await ota(command);
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(stderr).toContain(`${device.root} is in use by another ota.ts`);
    }
    expect(await device.status()).toMatchObject({ version: "1.0.0", busy: true });
    const { code, stdout } = await run(["status", "--root", device.root]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^busy: +true$/m);
    held.resolve();
    expect((await first.ended).last).toBe("updated 1.0.0 -> 1.0.1");
    // The lock goes with the process.
    expect(Object.keys(await device.status().catch(() => ({})))).not.toContain("busy");
  });

  test("a process that was killed keeps nobody out", async () => {
    using device = new Device();
    await using slow = await Double.start((asked, connection) => {
      if (asked.path !== "/manifest.json") return; // Never.
      const offer = { version: "1.0.1", put: { "flash/main.py": "two" } };
      send(connection, JSON.stringify(manifestOf(offer, slow.url)));
    });
    {
      await using tool = new Tool(device.args([], slow));
      await eventually("a download", () => slow.asked.length > 1);
      tool.kill("SIGKILL");
      await tool.ended;
    }
    await device.expectNextSucceeds();
  });
});

describe.concurrent("no space", () => {
  test("is found before anything is fetched, and both numbers are told", async () => {
    using temp = new Temp();
    using _ = new Mount(temp.at("mount"), "size=400k");
    using device = new Device(temp.at("mount/device"));
    const big = Buffer.alloc(500_000, "x");
    await using full = await Double.start((asked, connection) => {
      const offer = { version: "1.0.1", put: { "sd/big.bin": big } };
      return offering(offer, () => full.url)(asked, connection);
    });
    const { code, stdout, stderr } = await run(device.args([], full));
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    const [, needed, free] = /needs (\d+) bytes, and (\d+) are free/.exec(stderr) ?? [];
    expect(Number(needed)).toBeGreaterThan(500_000);
    expect(Number(free)).toBeWithin(1, 400 * 1024);
    expect(full.asked.map(({ path }) => path)).toEqual(["/manifest.json"]);
    await device.expectNextSucceeds();
  });

  test("while staging, where the server tells no sizes", async () => {
    using temp = new Temp();
    using _ = new Mount(temp.at("mount"), "size=400k");
    using device = new Device(temp.at("mount/device"));
    await using full = await Double.start((asked, connection) => {
      const put = { "sd/big.bin": Buffer.alloc(500_000, "x"), "flash/main.py": "two" };
      return offering({ version: "1.0.1", put, plain: true }, () => full.url)(asked, connection);
    });
    const { code, stdout, stderr } = await run(device.args([], full));
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain("ENOSPC");
    device.expectOn1();
    // What was staged of it does not stay in the way.
    await device.expectNextSucceeds();
  });

  test("while committing, at whatever point it ends", async () => {
    // So many that the journal and the record need several pages.
    const many = Array.from({ length: 80 }, (_, i) => [`sd/many/${i}`, `${i}`] as const);
    let failures = 0;
    for (const pages of [0, ...some([1, 9, 40], 1)]) {
      using temp = new Temp();
      using mount = new Mount(temp.at("mount"), "size=2m");
      using device = new Device(temp.at("mount/device"));
      const last = Buffer.alloc(9000, "last");
      const put = { ...V2, ...Object.fromEntries(many), "sd/last.bin": last };
      const filler = temp.at("mount/filler");
      await using full = await Double.start(async (asked, connection) => {
        if (asked.path !== "/content/sd/last.bin") {
          const remove = ["flash/old/only.py", "flash/turn", "flash/re/turn.py"];
          return offering({ version: "1.0.1", put, remove }, () => full.url)(asked, connection);
        }
        // All else is staged; the disk fills up but for some pages, then comes the last byte.
        connection.write(head(200, { "Content-Length": last.length }));
        connection.write(last.subarray(0, -1));
        await eventually("all but a byte is here", () => {
          return stagedSizes(device.root).filter((size) => size === last.length - 1).length === 1;
        });
        writeFileSync(filler, Buffer.alloc(statfsSync(mount.path).bavail * 4096));
        truncateSync(filler, statSync(filler).size - pages * 4096);
        connection.end(last.subarray(-1));
      });
      const { code, stderr } = await run(device.args(["--jobs", "1"], full));
      if (code === 0) {
        expect((await Bun.file(`${device.root}/flash/main.py`).text()).trim()).toBe("print('two')");
        continue;
      }
      failures++;
      expect(code).toBe(1);
      expect(stderr).toContain("ENOSPC");
      device.expectOn1();
      rmSync(filler);
      await device.expectNextSucceeds();
    }
    expect(failures).toBeWithin(1, 4);
  });
});

function stagedSizes(root: string): number[] {
  return Object.values(sizesIn(`${root}/.ota/staged`));
}

describe.concurrent("no permission", () => {
  const NOBODY = 65534;

  /** Runs a command as a user who owns the device and is not root. */
  async function asNobody(device: Device, args: string[]): Promise<Ended> {
    const as = [need("setpriv"), `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups"];
    chmodSync(device.path, 0o755);
    const script = device.at("ota.ts");
    copyFileSync(OTA_TS, script);
    // Bun may be where only root can go.
    let bun = process.execPath;
    if (Bun.spawnSync([...as, bun, "--version"]).exitCode !== 0) {
      bun = device.at("bun");
      copyFileSync(process.execPath, bun);
      chmodSync(bun, 0o755);
    }
    return ota(args, { prefix: as, bun, script, cwd: device.path });
  }

  function giveAway(device: Device): void {
    const { exitCode } = Bun.spawnSync(["chown", "-R", `${NOBODY}:${NOBODY}`, device.root]);
    if (exitCode !== 0) throw new Error("this test needs to give files to another user, as root");
  }

  test("to write in a directory: found before anything is fetched, and named", async () => {
    using device = new Device();
    giveAway(device);
    chownSync(`${device.root}/sd`, 0, 0);
    chmodSync(`${device.root}/sd`, 0o755);
    await using own = await Served.start(fleet.at("releases"));
    const { code, stdout, stderr } = await asNobody(device, device.args([], own));
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(/sd below .*no permission/);
    device.expectOn1();
    expect(own.requests.map(({ path }) => path)).toEqual(["/manifest.json"]);
    chownSync(`${device.root}/sd`, NOBODY, NOBODY);
    const next = await asNobody(device, device.args());
    expect({ code: next.code, last: next.last }).toEqual({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)",
    });
    expect(readTree(device.root)).toEqual(TREE_2);
  });

  test("to write in the root at all", async () => {
    using device = new Device();
    giveAway(device);
    for (const command of [device.args(), ["rollback", "--root", device.root]]) {
      chmodSync(`${device.root}/.ota`, 0o555);
      const { code, stdout, stderr } = await asNobody(device, command);
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(stderr).toMatch(/^ota\.ts: .*permission/im);
      expect(stderr).not.toContain("fetched");
      expect(stderr).not.toMatch(/^ +at /m);
    }
    device.expectOn1();
    chmodSync(`${device.root}/.ota`, 0o755);
    expect((await asNobody(device, device.args())).code).toBe(0);
    expect(readTree(device.root)).toEqual(TREE_2);
  });
});

describe.concurrent("a root that cannot be used", () => {
  test("is on a file system that is read-only", async () => {
    using temp = new Temp();
    using mount = new Mount(temp.at("mount"), "size=4m");
    using device = new Device(temp.at("mount/device"));
    mount.remount("ro");
    const { code, stdout, stderr } = await device.client();
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain(device.root);
    expect(stderr).toMatch(/read-only/i);
    device.expectOn1();
    // What it is on can be told all the same.
    expect(await device.status()).toMatchObject({ version: "1.0.0" });
    mount.remount("rw");
    await device.expectNextSucceeds();
  });

  test("and was never used, on a file system that is read-only", async () => {
    using temp = new Temp();
    using mount = new Mount(temp.at("mount"), "size=4m");
    mount.remount("ro");
    const root = temp.at("mount/device");
    const { code, stderr } = await run(["client", "--root", root, "--server", server.url]);
    expect(code).toBe(1);
    expect(stderr).toStartWith(`ota.ts: cannot use ${root} as a device's root: `);
    expect(stderr).toMatch(/EROFS|read-only/i);
  });

  test("is a file", async () => {
    using temp = new Temp({ root: "a file" });
    const root = temp.at("root");
    for (const command of ["client", "rollback", "status"]) {
      const { code, stdout, stderr } = await run([command, "--root", root]);
      expect({ command, code, stdout }).toEqual({ command, code: 1, stdout: "" });
      expect(stderr).toBe(`ota.ts: cannot use ${root} as a device's root: it is not a directory\n`);
    }
    expect(readFileSync(root, "utf8")).toBe("a file");
  });

  test("has a directory on another file system: refused before anything is fetched, and named", async () => {
    using device = new Device();
    using _ = new Mount(`${device.root}/sd`, "size=1m");
    layTree(`${device.root}/sd`, { same: "same\n", "logo.bin": V1["sd/logo.bin"]! });
    await using own = await Served.start(fleet.at("releases"));
    const { code, stdout, stderr } = await run(device.args([], own));
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(/cannot change sd below .*another file system/);
    device.expectOn1();
    expect(own.requests.map(({ path }) => path)).toEqual(["/manifest.json"]);
  });
});

describe.concurrent("records of the updater", () => {
  test("of a newer version of the tool are left alone, with a word of what to do", async () => {
    for (const name of ["state.json", "journal.json"]) {
      using device = new Device();
      const path = `${device.root}/.ota/${name}`;
      const record = JSON.stringify({ ...JSON.parse(readFileSync(path, "utf8")), format: 3 });
      writeFileSync(path, record);
      for (const command of [
        device.args(),
        device.args(["--repair"]),
        ["status", "--root", device.root],
        ["rollback", "--root", device.root],
      ]) {
        const { code, stdout, stderr } = await run(command);
        expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
        expect(stderr).toContain(`${path} has format 3`);
        expect(stderr).toContain("use the newer ota.ts");
      }
      expect(readFileSync(path, "utf8")).toBe(record);
      device.expectOn1();
    }
  });

  const damages = {
    "cut off": (text: string) => text.slice(0, text.length / 2),
    empty: () => "",
    zeros: (text: string) => "\0".repeat(text.length),
    "JSON of another kind": () => '{"format":1,"installed":[]}',
  };
  for (const name of ["state.json", "journal.json"]) {
    for (const [kind, damage] of Object.entries(damages)) {
      test(`that are damaged (${name}, ${kind}) are set aside, and nothing is done before --repair`, async () => {
        using device = new Device();
        const path = `${device.root}/.ota/${name}`;
        const damaged = damage(readFileSync(path, "utf8"));
        writeFileSync(path, damaged);
        let aside: string[] = [];
        for (let time = 0; time < 2; time++) {
          for (const command of [device.args(), ["status", "--root", device.root]]) {
            const { code, stdout, stderr } = await run(command);
            expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
            expect(stderr).toContain("--repair");
            aside = otaFiles(device.root).filter((file) => file.startsWith(`${name}.`));
            expect(aside).toHaveLength(1);
            expect(stderr).toContain(aside[0]!);
          }
        }
        expect(readFileSync(`${device.root}/.ota/${aside[0]}`, "utf8")).toBe(damaged);
        device.expectOn1();
        const rollback = await run(["rollback", "--root", device.root]);
        expect(rollback.code).toBe(1);
        device.expectOn1();

        await using old = await Served.start(fleet.at("releases"), { latest: "1.0.0" });
        layTree(device.root, { "flash/main.py": "scribbled" });
        const { code, last } = await run(device.args(["--repair"], old));
        expect(code).toBe(0);
        expect(last).toContain("1.0.0");
        device.expectOn1();
        expect(otaFiles(device.root).filter((file) => file.includes("corrupt"))).toEqual([]);
        await device.expectReachesNew();
      });
    }
  }

  test("that are damaged in the middle of a commit: --repair makes the release whole", async () => {
    using device = new Device();
    using sample = new Device();
    const calls = await callsOf(sample.args(), ["rename"]);
    const nth = calls.findIndex((call) => call.includes("commit.json")) + 3;
    const prefix = injecting("rename", `signal=SIGKILL:when=${nth}`);
    expect((await device.process([], { prefix })).signal).toBe("SIGKILL");
    expect(readTree(device.root)).not.toEqual(TREE_1);
    truncateSync(`${device.root}/.ota/commit.json`, 100);
    expect((await device.client()).code).toBe(1);
    expect((await device.client(["--repair"])).code).toBe(0);
    const found = readTree(device.root);
    for (const [file, content] of Object.entries(TREE_2)) expect(found[file]).toBe(content);
    expect((await device.client()).last).toBe("up to date 1.0.1");
  });
});
