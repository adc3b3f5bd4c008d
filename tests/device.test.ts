/**
 * The device, as its user meets it: the client command, a root on disk, a server on a socket. What
 * an update changes, what it leaves alone, what it asks and what it says.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, symlinkSync } from "node:fs";
import type { Socket } from "node:net";
import {
  type CommandOptions,
  OTA,
  releaseDigest,
  rollBack,
  status,
  TransferError,
  type TransferRequest,
  type TransferResponse,
} from "../ota.ts";
import { Between } from "./helpers/between.ts";
import { sha1, sha256 } from "./helpers/content.ts";
import { Double, head, manifestOf, offering, send } from "./helpers/double.ts";
import { MemoryDisk } from "./helpers/memory-disk.ts";
import { freePort } from "./helpers/raw.ts";
import { asTree, layTree, otaFiles, readTree, type Tree } from "./helpers/temp.ts";
import { eventually, ota, OTA_TS, run, Tool } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const V1: Tree = {
  "flash/boot.py": "import main\n",
  "flash/main.py": "print('one')\n",
  "flash/lib/old.py": "OLD = 1\n",
  "flash/lib/same.py": "SAME = 1\n",
  "flash/gone/only.py": "ONLY = 1\n",
  "sd/logo.bin": new Uint8Array([0, 1, 2, 253, 254, 255]),
  "sd/empty": "",
};
const V2: Tree = {
  "flash/boot.py": "import main\n",
  "flash/main.py": "print('two')\n",
  "flash/lib/same.py": "SAME = 1\n",
  "flash/lib/new lib #1.py": "NEW = 1\n",
  "flash/deep/er/ä.py": "DEEP = 1\n",
  "sd/logo.bin": new Uint8Array([0, 1, 2, 3, 13, 10, 13, 10, 255]),
  "sd/empty": "",
};
const VERSION_1 = { "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n" };
const VERSION_2 = { "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" };
const IMAGE_1 = Buffer.alloc(3000, 0xe9);
const IMAGE_2 = Buffer.alloc(5000, 0xea);
const IMAGE_3 = Buffer.alloc(4000, 0xeb);

const BOTH = { "1.0.0": V1, "1.0.1": V2 };

describe.concurrent("the version that a device is on", () => {
  test("is --ver, where there is no record", async () => {
    await using world = await World.with(BOTH, { device: V1 });
    const { code, stdout } = await world.client(["--ver", "1.0.0"]);
    expect({ code, stdout }).toEqual({ code: 0, stdout: "updated 1.0.0 -> 1.0.1\n" });
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("is nothing without a record and --ver: all is fetched over what is there", async () => {
    await using world = await World.with(BOTH, { device: { ...V1, "flash/mine.txt": "mine" } });
    const { code, last } = await world.client();
    expect({ code, last }).toEqual({ code: 0, last: "updated 0 -> 1.0.1" });
    // What was there and is unknown stays.
    expect(world.tree()).toEqual(asTree({ ...V1, ...V2, ...VERSION_2, "flash/mine.txt": "mine" }));
  });

  test("is the one in flash/OTA_VERSION.py before --ver, and a note says so", async () => {
    await using world = await World.with(BOTH, {
      device: { ...V1, "flash/OTA_VERSION.py": 'VERSION = "1.0.0"\n' },
    });
    const { stdout, stderr } = await world.client(["--ver", "0.9"]);
    expect(stdout).toBe("updated 1.0.0 -> 1.0.1\n");
    expect(stderr).toContain("the device is on 1.0.0 by its own record; --ver 0.9 is not used");
  });

  test("needs no note when --ver agrees", async () => {
    await using world = await World.with(BOTH, { device: { ...V1, ...VERSION_1 } });
    const { stdout, stderr } = await world.client(["--ver", "1.0.0"]);
    expect(stdout).toBe("updated 1.0.0 -> 1.0.1\n");
    expect(stderr).not.toContain("--ver");
  });

  test("is not what makes no sense in flash/OTA_VERSION.py", async () => {
    await using world = await World.with(BOTH, {
      device: { ...V1, "flash/OTA_VERSION.py": "VERSION = '../../etc'\n" },
    });
    const { stdout } = await world.client(["--ver", "1.0.0"]);
    expect(stdout).toBe("updated 1.0.0 -> 1.0.1\n");
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("is the updater's own record before all others", async () => {
    await using world = await World.with(BOTH);
    expect((await world.client()).last).toBe("updated 0 -> 1.0.1");
    layTree(world.root, { "flash/OTA_VERSION.py": "VERSION = '0.0.1'\n" });
    const { code, last, stderr } = await world.client(["--ver", "0.5"]);
    expect({ code, last }).toEqual({ code: 0, last: "up to date 1.0.1" });
    expect(stderr).toContain("on 1.0.1 by its own record; --ver 0.5 is not used");
  });
});

describe.concurrent("an empty device is provisioned whole", () => {
  for (const state of ["absent", "empty"]) {
    test(`${state}, with a note where --ver says otherwise`, async () => {
      await using world = new World(BOTH);
      if (state === "empty") mkdirSync(world.root);
      await world.serve();
      const { code, stdout, stderr } = await world.client(["--ver", "1.0.0"]);
      expect({ code, stdout }).toEqual({ code: 0, stdout: "updated 0 -> 1.0.1\n" });
      expect(stderr).toContain("everything is fetched, whatever --ver 1.0.0 says");
      expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    });
  }

  test("./device is where, and port 8000 of this machine is whom to ask, by default", async () => {
    await using world = await World.with(BOTH);
    const { last } = await ota(["client", "--server", world.url], { cwd: world.path });
    expect(last).toBe("updated 0 -> 1.0.1");
    expect(readTree(world.at("device"))).toEqual(asTree({ ...V2, ...VERSION_2 }));
    const { stdout } = await ota(["client", "--help"]);
    expect(stdout).toContain("http://127.0.0.1:8000");
  });

  test("a root may be reached through a symbolic link", async () => {
    await using world = new World(BOTH);
    mkdirSync(world.at("real"));
    symlinkSync(world.at("real"), world.root);
    await world.serve();
    expect((await world.client()).code).toBe(0);
    expect(readTree(world.at("real"))).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });
});

describe.concurrent("an update", () => {
  test("fetches each changed content once, and nothing that is there already", async () => {
    await using world = await World.with(
      {
        "1.0.0": V1,
        "1.0.1": { ...V2, "sd/twin": V2["flash/main.py"]! },
      },
      { device: { ...V1, "sd/logo.bin": V2["sd/logo.bin"]! } },
    );
    expect((await world.client(["--ver", "1.0.0"])).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2, "sd/twin": V2["flash/main.py"]! }));
    const sent = world.sent.map(decodeURIComponent);
    expect(sent.filter((path) => /main\.py|twin/.test(path))).toHaveLength(1);
    expect(sent.filter((path) => !/main\.py|twin/.test(path))).toEqual([
      "/1.0.1/flash/deep/er/ä.py",
      "/1.0.1/flash/lib/new lib #1.py",
    ]);
    // Two files, not two names of one: a change to one leaves the other.
    expect(statSync(world.at("device/sd/twin")).nlink).toBe(1);
    expect(statSync(world.at("device/sd/twin")).ino).not.toBe(
      statSync(world.at("device/flash/main.py")).ino,
    );
  });

  test("touches the tree only when everything is here and verified", async () => {
    using world = new World(BOTH);
    const before: Tree = { "flash/main.py": "one", "flash/old.py": "old" };
    layTree(world.root, before);
    const late = Buffer.alloc(100_000, "late");
    const offer = {
      version: "1.0.1",
      put: { "flash/main.py": "two", "flash/new.py": "new", "sd/late.bin": late },
      remove: ["flash/old.py"],
      firmware: ["firmware_1.0.1.bin", IMAGE_2] as const,
    };
    const held = Promise.withResolvers<void>();
    await using server = await Double.start(async (asked, connection) => {
      if (asked.path === "/content/sd/late.bin") await held.promise;
      await offering(offer, () => server.url)(asked, connection);
    });
    await using tool = new Tool(world.args(["--ver", "1.0.0"], server));
    await tool.until(/fetched flash\/main\.py/, "stderr");
    await tool.until(/fetched flash\/new\.py/, "stderr");
    await tool.until(/fetched firmware_1\.0\.1\.bin/, "stderr");
    expect(world.tree()).toEqual(asTree(before));
    expect(otaFiles(world.root)).not.toContain("otadata");
    expect(readFileSync(world.at("device/.ota/staged", sha256("two")), "utf8")).toBe("two");
    held.resolve();
    expect((await tool.ended).last).toBe("updated 1.0.0 -> 1.0.1 (firmware 0 -> 1.0.1)");
    expect(world.tree()).toEqual(asTree({ ...offer.put, ...VERSION_2 }));
    expect(readFileSync(world.at("device/.ota/ota_0.bin"))).toEqual(IMAGE_2);
  });

  test("downloads --jobs at once, four without it", async () => {
    const put = Object.fromEntries(Array.from({ length: 9 }, (_, i) => [`f${i}`, `content ${i}`]));
    const offer = { version: "1.0.1", put };
    for (const [jobs, args] of [
      [4, []],
      [2, ["--jobs", "2"]],
    ] as const) {
      using world = new World();
      const waiting: (() => void)[] = [];
      let most = 0;
      await using server = await Double.start(async (asked, connection) => {
        if (asked.path !== "/manifest.json") {
          const { promise, resolve } = Promise.withResolvers<void>();
          waiting.push(resolve);
          most = Math.max(most, waiting.length);
          // As soon as all that can come at once are here; the last may be fewer.
          const rest = 9 - server.asked.length + 1;
          if (waiting.length === jobs || rest === 0) {
            await Bun.sleep(30);
            for (const go of waiting.splice(0)) go();
          }
          await promise;
        }
        await offering(offer, () => server.url)(asked, connection);
      });
      expect((await world.client([...args], server)).code).toBe(0);
      expect(most).toBe(jobs);
    }
  });

  test("finds what is to be deleted gone already", async () => {
    await using world = new World(BOTH, { device: V1 });
    rmSync(world.at("device/flash/lib/old.py"));
    rmSync(world.at("device/flash/gone"), { recursive: true });
    await world.serve();
    expect((await world.client(["--ver", "1.0.0"])).last).toBe("updated 1.0.0 -> 1.0.1");
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("leaves alone what the application made", async () => {
    await using world = new World(BOTH);
    const own: Tree = {
      "data.db": "rows",
      "flash/settings.json": "{}",
      "flash/gone/cache": "kept, and its directory with it",
      "sd/log/1.txt": "log",
      "empty/": "",
    };
    layTree(world.root, { ...V1, ...own });
    const inode = statSync(world.at("device/data.db")).ino;
    await world.serve();
    expect((await world.client(["--ver", "1.0.0"])).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2, ...own }));
    expect(statSync(world.at("device/data.db")).ino).toBe(inode);
  });

  test("fails before it begins where a file would replace a directory with an application's file", async () => {
    await using world = new World({ "1.0.0": V1, "1.0.1": { ...V2, "flash/gone": "now a file" } });
    const before: Tree = { ...V1, "flash/gone/cache/data.db": "rows" };
    layTree(world.root, before);
    await world.serve();
    const { code, stdout, stderr } = await world.client(["--ver", "1.0.0"]);
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain("flash/gone/cache/data.db");
    expect(world.tree()).toEqual(asTree(before));
    expect(world.sent).toEqual([]);
    // Its owner moves it away, and the update can be made.
    rmSync(world.at("device/flash/gone/cache"), { recursive: true });
    expect((await world.client(["--ver", "1.0.0"])).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2, "flash/gone": "now a file" }));
  });

  test("fails before it begins where an application's file is in the way of a directory", async () => {
    await using world = new World(BOTH);
    const before: Tree = { ...V1, "flash/deep": "the application's" };
    layTree(world.root, before);
    await world.serve();
    const { code, stderr } = await world.client(["--ver", "1.0.0"]);
    expect(code).toBe(1);
    expect(stderr).toContain("flash/deep");
    expect(world.tree()).toEqual(asTree(before));
    expect(world.sent).toEqual([]);
  });

  test("makes directories of files and files of directories, and back", async () => {
    const files: Tree = { "flash/a": "file", "flash/b/x.py": "x", "flash/b/c/y.py": "y", top: "t" };
    const turned: Tree = {
      "flash/a/x.py": "x",
      "flash/a/c/z.py": "z",
      "flash/b": "f",
      "top/t": "t",
    };
    await using world = new World({ "1.0.0": files, "1.0.1": turned, "1.0.2": files });
    for (const [version, expected] of [
      ["1.0.0", files],
      ["1.0.1", turned],
      ["1.0.2", files],
    ] as const) {
      await world.serve({ latest: version });
      const { code, stderr } = await world.client();
      expect({ code, stderr: stderr.replace(/^(fetched|received) .*\n/gm, "") }).toEqual({
        code: 0,
        stderr: "",
      });
      const own = { "flash/OTA_VERSION.py": `VERSION = '${version}'\n` };
      expect(world.tree()).toEqual(asTree({ ...expected, ...own }));
    }
    expect((await world.run("rollback")).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...turned, ...VERSION_2 }));
  });

  test("removes directories that it emptied, but none at the top", async () => {
    await using world = await World.with(
      {
        "1.0.0": { "flash/a": "a", "sd/x/y/z.txt": "z", "cert/ca/root.pem": "pem" },
        "1.0.1": { "flash/a": "a" },
      },
      {
        device: {
          ...{ "flash/a": "a", "sd/x/y/z.txt": "z", "cert/ca/root.pem": "pem" },
          "sd/mine/": "",
        },
      },
    );
    expect((await world.client(["--ver", "1.0.0"])).code).toBe(0);
    expect(world.tree()).toEqual(
      asTree({ "flash/a": "a", ...VERSION_2, "sd/mine/": "", "cert/": "" }),
    );
  });

  test("that changes nothing is no transaction", async () => {
    const files: Tree = { "etc/app.conf": "a=1\n" };
    await using world = new World({ "1.0.0": files, "1.0.1": files }, { device: files });
    const inode = statSync(world.at("device/etc/app.conf")).ino;
    await world.serve();
    const { code, last } = await world.client(["--ver", "1.0.0"]);
    expect({ code, last }).toEqual({ code: 0, last: "updated 1.0.0 -> 1.0.1" });
    expect(otaFiles(world.root).filter((name) => /journal|backup/.test(name))).toEqual([]);
    expect(statSync(world.at("device/etc/app.conf")).ino).toBe(inode);
    expect(await world.status()).toMatchObject({ version: "1.0.1", previous_version: "1.0.0" });
    const { code: back, stderr } = await world.run("rollback");
    expect(back).toBe(1);
    expect(stderr).toContain("no previous release to go back to");
  });

  test("that changes nothing does not leave an older release to go back to", async () => {
    const files: Tree = { "etc/app.conf": "a=2\n" };
    await using world = new World({
      "1.0.0": { "etc/app.conf": "a=1\n" },
      "1.0.1": files,
      "1.0.2": files,
    });
    for (const latest of ["1.0.0", "1.0.1", "1.0.2"]) {
      await world.serve({ latest });
      expect((await world.client()).code).toBe(0);
    }
    // From 1.0.2 "the previous release" is 1.0.1, and both have the same files.
    const { last } = await world.run("rollback");
    expect(last).not.toBe("rolled back 1.0.2 -> 1.0.0");
    expect(world.tree()).toEqual(asTree(files));
  });

  test("keeps flash/OTA_VERSION.py where there is a flash, and only there", async () => {
    await using world = await World.with(
      { "1.0.0": { "etc/app.conf": "1" }, "1.0.1": { "etc/app.conf": "2" } },
      { latest: "1.0.0" },
    );
    expect((await world.client()).last).toBe("updated 0 -> 1.0.0");
    expect(world.tree()).toEqual(asTree({ "etc/app.conf": "1" }));
    mkdirSync(world.at("device/flash"));
    await using newer = await Served.start(world.releases);
    expect((await world.client([], newer)).last).toBe("updated 1.0.0 -> 1.0.1");
    expect(world.tree()).toEqual(asTree({ "etc/app.conf": "2", ...VERSION_2 }));
  });

  test("refuses to write through symbolic links", async () => {
    for (const [link, target] of [
      ["flash/lib", "lib"],
      ["flash/main.py", "main.py"],
      ["sd", "."],
    ] as const) {
      await using world = new World(BOTH);
      layTree(world.at("outside"), { "lib/old.py": "outside", "main.py": "outside" });
      const { "flash/main.py": _, ...rest } = V1;
      const kept = Object.entries(rest).filter(([path]) => !path.startsWith(`${link}/`));
      layTree(world.root, Object.fromEntries(kept));
      symlinkSync(world.at("outside", target), world.at("device", link));
      const before = { device: world.tree(), outside: readTree(world.at("outside")) };
      await world.serve();
      const { code, stderr } = await world.client(["--ver", "1.0.0"]);
      expect(code).toBe(1);
      expect(stderr).toContain(`${link} below`);
      expect(stderr).toContain("symbolic link");
      expect(world.tree()).toEqual(before.device);
      expect(readTree(world.at("outside"))).toEqual(before.outside);
      expect(world.sent).toEqual([]);
    }
  });

  test("refuses a manifest that leaves the root, and touches nothing", async () => {
    using world = new World();
    const before: Tree = { "flash/main.py": "one" };
    layTree(world.root, before);
    world.write({ victim: "outside" });
    for (const path of ["../victim", "flash/../../victim", ".ota/state.json", ".OTA./x", "a//b"]) {
      await using server = await Double.start((_, connection) => {
        const manifest = manifestOf({ version: "1.0.1", put: { [path]: "evil" } }, server.url);
        send(connection, JSON.stringify(manifest));
      });
      const { code, stderr } = await world.client(["--ver", "1.0.0"], server);
      expect(code).toBe(1);
      expect(stderr).toContain("refused the manifest");
      expect(server.asked).toHaveLength(1);
    }
    expect(world.tree()).toEqual(asTree(before));
    expect(readFileSync(world.at("victim"), "utf8")).toBe("outside");
  });

  test("refuses a release older than its own", async () => {
    using world = new World({}, { device: { ...V2, ...VERSION_2 } });
    const offer = { version: "1.0.0", put: { "flash/main.py": "one" } };
    await using server = await Double.start((asked, connection) =>
      offering(offer, () => server.url)(asked, connection),
    );
    const { code, stderr } = await world.client([], server);
    expect(code).toBe(1);
    expect(stderr).toContain("version 1.0.0, older than the device's 1.0.1");
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });
});

describe.concurrent("--repair", () => {
  test("fetches what differs and nothing else", async () => {
    await using world = await World.with(BOTH);
    await world.client();
    const own: Tree = { "flash/data.txt": "the application's" };
    layTree(world.root, { ...own, "flash/main.py": "scribbled", "sd/logo.bin": "scribbled" });
    rmSync(world.at("device/flash/deep"), { recursive: true });
    world.server.lines.length = 0;
    const { code, last } = await world.client(["--repair"]);
    expect({ code, last }).toEqual({ code: 0, last: "repaired 1.0.1" });
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2, ...own }));
    expect(world.sent.map(decodeURIComponent)).toEqual([
      "/1.0.1/flash/deep/er/ä.py",
      "/1.0.1/flash/main.py",
      "/1.0.1/sd/logo.bin",
    ]);
  });

  test("removes what was installed and is in the release no more", async () => {
    await using world = await World.with(BOTH);
    await world.client();
    rmSync(world.at("releases/1.0.1/flash/deep"), { recursive: true });
    layTree(world.root, { "flash/deep/mine": "the application's" });
    await world.serve();
    expect((await world.client(["--repair"])).code).toBe(0);
    const { "flash/deep/er/ä.py": _, ...rest } = V2;
    expect(world.tree()).toEqual(
      asTree({ ...rest, ...VERSION_2, "flash/deep/mine": "the application's" }),
    );
  });

  test("brings a device forward, too", async () => {
    await using world = await World.with(BOTH, { latest: "1.0.0" });
    await world.client();
    layTree(world.root, { "flash/boot.py": "scribbled" });
    await world.serve();
    expect((await world.client(["--repair"])).last).toBe("updated 1.0.0 -> 1.0.1");
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    expect(await world.status()).toMatchObject({ version: "1.0.1", previous_version: "1.0.0" });
  });

  test("of a device that is right is no transaction", async () => {
    await using world = await World.with(BOTH);
    await world.client();
    const { ino } = statSync(world.at("device/.ota/journal.json"));
    world.server.lines.length = 0;
    const { code, last } = await world.client(["--repair"]);
    expect({ code, last }).toEqual({ code: 0, last: "up to date 1.0.1" });
    expect(world.sent).toEqual([]);
    expect(statSync(world.at("device/.ota/journal.json")).ino).toBe(ino);
  });

  test("makes a record of what was never recorded", async () => {
    await using world = await World.with(BOTH, { device: { ...V2, ...VERSION_2 } });
    expect((await world.client(["--repair"])).last).toBe("up to date 1.0.1");
    expect(world.sent).toEqual([]);
    const state = JSON.parse(readFileSync(world.at("device/.ota/state.json"), "utf8"));
    expect(Object.keys(state.installed.files).sort()).toEqual(Object.keys(V2).sort());
  });

  test("finds nothing to do where the server has nothing", async () => {
    await using world = new World({}, { device: { ...V1, ...VERSION_1 } });
    mkdirSync(world.releases, { recursive: true });
    await world.serve();
    const { code, last } = await world.client(["--repair"]);
    expect({ code, last }).toEqual({ code: 0, last: "up to date 1.0.0" });
    expect(world.tree()).toEqual(asTree({ ...V1, ...VERSION_1 }));
  });
});

describe.concurrent("what a device tells the server", () => {
  test("hash, firmware_ver always, base once it has a record, and the same devid each time", async () => {
    await using world = new World({ "1.0.1": V2 }, { beside: { "firmware_1.0.1.bin": IMAGE_2 } });
    await using behind = await Served.start(world.releases);
    await using server = await Double.start(async (asked, connection) => {
      const answer = await fetch(`${behind.url}${asked.target}`);
      send(connection, await answer.bytes(), { status: answer.status });
    });
    expect((await world.client([], server)).last).toBe("updated 0 -> 1.0.1 (firmware 0 -> 1.0.1)");
    expect((await world.client([], server)).last).toBe("up to date 1.0.1");
    expect((await world.client(["--id", "meter 7&x=1"], server)).last).toBe("up to date 1.0.1");
    expect((await world.client(["--repair"], server)).last).toBe("up to date 1.0.1");
    const asked = server.askedFor("/manifest.json").map(({ query }) => Object.fromEntries(query));
    const devid = asked[0]?.devid ?? "";
    expect(devid).toMatch(/^[0-9a-f-]{36}$/);
    const files = Object.entries(V2).map(([path, content]) => [path, sha256(content)] as const);
    const image = { firmware_ver: "1.0.1", firmware_sha256: sha256(IMAGE_2) };
    const known = { hash: "sha256", ...image };
    const base = releaseDigest(files);
    expect(asked).toEqual([
      { current_ver: "", hash: "sha256", firmware_ver: "", devid, brief: "1" },
      { ...known, current_ver: "1.0.1", base, devid, brief: "1" },
      { ...known, current_ver: "1.0.1", base, devid: "meter 7&x=1", brief: "1" },
      // Most of what is listed for a repair is there.
      { ...known, devid },
    ]);
  });

  test("so that a release that was edited on the server is noticed when the next one comes", async () => {
    await using world = await World.with(BOTH, { latest: "1.0.0" });
    await world.client();
    // 1.0.0 was changed after it was shipped: a difference from it would leave `old.py` behind.
    rmSync(world.at("releases/1.0.0/flash/lib/old.py"));
    layTree(world.releases, { "1.0.0/flash/main.py": "print('two')\n" });
    await world.serve();
    expect((await world.client()).last).toBe("updated 1.0.0 -> 1.0.1");
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });
});

describe.concurrent("a report", () => {
  const offer = { version: "1.0.1", put: { "flash/main.py": "two" } };
  const done = { code: 0, stdout: "updated 0 -> 1.0.1\n" };
  const unsure = "ota.ts: the server may not know yet what this device is on: ";
  /** The notes on stderr. */
  const notes = (stderr: string) => stderr.match(/^ota\.ts: .*$/gm) ?? [];

  test("follows an update: which device, and what it is on now", async () => {
    await using world = await World.with(BOTH, {
      ...{ beside: { "firmware_1.0.1.bin": IMAGE_2 }, on: "1.0.0", token: "open sesame" },
    });
    await using between = await Between.start(world);
    const named = ["--id", "meter 7&x=1", "--model", "lopy 4", "--token", "open sesame"];
    const { code, stderr } = await world.client(named, between);
    expect({ code, notes: notes(stderr) }).toEqual({ code: 0, notes: [] });
    expect(between.reports).toHaveLength(1);
    const [{ asked, answer }] = between.reports as [(typeof between.reports)[0]];
    expect([asked.method, asked.path, answer.status]).toEqual(["HEAD", "/manifest.json", 200]);
    expect(asked.headers.get("authorization")).toBe("Bearer open sesame");
    expect(Object.fromEntries(asked.query)).toEqual({
      ...{ current_ver: "1.0.1", firmware_ver: "1.0.1", devid: "meter 7&x=1", model: "lopy 4" },
    });
    expect(world.server.requests.at(-1)).toMatchObject({ method: "HEAD", status: 200 });
  });

  test("is made once all is in its place, under the name that the device asked by", async () => {
    using world = new World({}, { device: V1 });
    await using server = await Double.start((asked, connection) => {
      return offering(offer, () => server.url)(asked, connection);
    });
    const trees: Record<string, string>[] = [];
    server.report = (_, connection) => {
      trees.push(world.tree());
      connection.end(head(200));
    };
    const { last } = await world.client(["--ver", "1.0.0", "--check", "true"], server);
    expect(last).toBe("updated 1.0.0 -> 1.0.1");
    expect(trees).toEqual([asTree({ ...V1, "flash/main.py": "two", ...VERSION_2 })]);
    const devid = server.asked[0]?.query.get("devid") ?? "";
    expect(devid).not.toBe("");
    expect(server.reports.map(({ query }) => Object.fromEntries(query))).toEqual([
      { current_ver: "1.0.1", firmware_ver: "", devid },
    ]);
  });

  test("follows an update of firmware alone, and one that changes no file", async () => {
    const files: Tree = { "flash/main.py": "main" };
    await using world = await World.with(
      { "1.0.0": files, "1.0.1": files },
      { beside: { "firmware_1.0.0.bin": IMAGE_1 }, on: "1.0.0" },
    );
    await using between = await Between.start(world);
    const said = () => between.reports.at(-1)?.asked.query;
    expect((await world.client([], between)).last).toBe("updated 1.0.0 -> 1.0.1");
    expect([said()?.get("current_ver"), said()?.get("firmware_ver")]).toEqual(["1.0.1", "1.0.0"]);
    layTree(world.releases, { "firmware_1.0.1.bin": IMAGE_2 });
    between.server = (await world.serve()).url;
    expect((await world.client([], between)).last).toEndWith("(firmware 1.0.0 -> 1.0.1)");
    expect([said()?.get("current_ver"), said()?.get("firmware_ver")]).toEqual(["1.0.1", "1.0.1"]);
    expect(between.reports).toHaveLength(2);
  });

  test("is not made by a device that is up to date, that failed, or does not try", async () => {
    await using world = await World.with(BOTH, { on: "1.0.0" });
    await using between = await Between.start(world);
    // Files in the way: it fails before anything is fetched.
    layTree(world.root, { "flash/deep": "the application's" });
    expect((await world.client([], between)).code).toBe(1);
    rmSync(world.at("device/flash/deep"));
    expect((await world.client(["--check", "false"], between)).code).toBe(3);
    expect(between.reports.splice(0)).toHaveLength(1);
    expect((await world.client([], between)).last).toStartWith("not tried 1.0.1");
    between.server = (await world.serve({ latest: "1.0.0" })).url;
    expect((await world.client([], between)).last).toBe("up to date 1.0.0");
    expect(between.reports).toEqual([]);
  });

  test("follows every repair, since who asks for one does not say what it is on", async () => {
    await using world = await World.with(BOTH, { on: "1.0.1" });
    await using between = await Between.start(world);
    expect((await world.client(["--repair"], between)).last).toBe("up to date 1.0.1");
    layTree(world.root, { "flash/main.py": "scribbled" });
    expect((await world.client(["--repair"], between)).last).toBe("repaired 1.0.1");
    const asked = between.of("/manifest.json").map(({ asked }) => asked.query.get("current_ver"));
    expect(asked).toEqual([null, null]);
    const said = between.reports.map(({ asked }) => asked.query.get("current_ver"));
    expect(said).toEqual(["1.0.1", "1.0.1"]);
  });

  test("that is refused changes nothing: one note says so", async () => {
    for (const [status, why] of [
      [401, " answered 401: it requires a token, see --token"],
      [404, " answered 404"],
      // As a plain file server may.
      [405, " answered 405"],
      [500, " answered 500"],
    ] as const) {
      using world = new World();
      await using server = await Double.start((asked, connection) => {
        return offering(offer, () => server.url)(asked, connection);
      });
      server.report = (_, connection) => void connection.end(head(status));
      const { code, stdout, stderr } = await world.client([], server);
      expect({ code, stdout }).toEqual(done);
      expect(notes(stderr)).toEqual([`${unsure}${server.url}/manifest.json${why}`]);
      // It is tried once; and what was refused once is not owed.
      expect((await world.client([], server)).last).toBe("up to date 1.0.1");
      expect(server.reports).toHaveLength(1);
    }
  });

  test("that fails or is never answered changes nothing: one note says so", async () => {
    for (const [report, why, args] of [
      [(_: unknown, connection: Socket) => void connection.destroy(), /cannot reach http:/, []],
      [(_: unknown, connection: Socket) => void connection.end("lorem"), /cannot reach http:/, []],
      [() => {}, /nothing came for 1 s$/, ["--timeout", "1"]],
    ] as const) {
      using world = new World();
      await using server = await Double.start((asked, connection) => {
        return offering(offer, () => server.url)(asked, connection);
      });
      server.report = report;
      const { code, stdout, stderr } = await world.process([...args], server);
      expect({ code, stdout }).toEqual(done);
      // A second may be too short for a busy machine elsewhere, too.
      const ours = notes(stderr).filter((line) => line.startsWith(unsure));
      expect(ours).toEqual([expect.stringMatching(why)]);
      expect(server.reports).toHaveLength(1);
      expect(await world.status()).toMatchObject({ version: "1.0.1", pending: false });
    }
  });

  test("that is interrupted changes nothing: the device is not as it was", async () => {
    using world = new World();
    await using server = await Double.start((asked, connection) => {
      return offering(offer, () => server.url)(asked, connection);
    });
    server.report = () => {};
    await using tool = new Tool(world.args([], server));
    await eventually("a report", () => server.reports.length > 0);
    tool.kill("SIGINT");
    const { code, stdout, stderr } = await tool.ended;
    expect({ code, stdout }).toEqual(done);
    expect(notes(stderr)).toEqual([`${unsure}interrupted`]);
  });

  test("is made once by a device that keeps asking, also where it failed", async () => {
    using world = new World();
    await using server = await Double.start((asked, connection) => {
      return offering(offer, () => server.url)(asked, connection);
    });
    server.report = (_, connection) => void connection.end(head(405));
    await using tool = new Tool(world.args(["--every", "1s"], server));
    await tool.until(/^updated 0 -> 1\.0\.1\n(up to date 1\.0\.1\n){2}/);
    tool.kill("SIGINT");
    expect((await tool.ended).code).toBe(0);
    expect(server.reports).toHaveLength(1);
  });

  test("is not made to a directory", async () => {
    using world = new World(BOTH);
    const from = ["--from", world.releases];
    const { code, stdout, stderr } = await run(["client", "--root", world.root, ...from]);
    expect({ code, stdout, notes: notes(stderr) }).toEqual({ ...done, notes: [] });
  });
});

describe.concurrent("a server like Pycom's own", () => {
  const pycom = (double: () => Double, files: Record<string, Uint8Array>) => {
    return (asked: Parameters<Double["reply"]>[0], connection: Parameters<Double["reply"]>[1]) => {
      const content = files[decodeURIComponent(asked.path)];
      if (content) {
        // As Python's http.server of old: HTTP/1.0, no tag.
        connection.write(`HTTP/1.0 200 OK\r\nContent-Length: ${content.length}\r\n\r\n`);
        return void connection.end(content);
      }
      const { url } = double();
      const hash = (path: string) => sha1(files[path]!);
      const entry = (path: string, slash: string) => ({
        URL: `${url}${path}`,
        dst_path: `${slash}${path.slice("/1.0.1/".length)}`,
        hash: hash(path),
      });
      const manifest = {
        delete: ["flash/lib/old.py"],
        firmware: { URL: `${url}/firmware_1.0.1.bin`, hash: hash("/firmware_1.0.1.bin") },
        new: [entry("/1.0.1/flash/lib/new.py", "/")],
        update: [entry("/1.0.1/flash/main.py", "")],
        version: "1.0.1",
      };
      const isNewer = asked.query.get("current_ver") === "1.0.0";
      send(connection, JSON.stringify(isNewer ? manifest : null));
    };
  };
  const files = {
    "/1.0.1/flash/lib/new.py": Buffer.from("NEW = 1\n"),
    "/1.0.1/flash/main.py": Buffer.alloc(100_000, "print('two')\n"),
    "/firmware_1.0.1.bin": IMAGE_2,
  };

  test("is enough: SHA-1, no sizes, either spelling of a path", async () => {
    using world = new World({}, { device: V1 });
    await using server = await Double.start(pycom(() => server, files));
    const { code, last } = await world.client(["--ver", "1.0.0"], server);
    expect({ code, last }).toEqual({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1 (firmware 0 -> 1.0.1)",
    });
    const { "flash/lib/old.py": _, ...rest } = V1;
    const after: Tree = {
      ...{ ...rest, ...VERSION_2 },
      "flash/lib/new.py": files["/1.0.1/flash/lib/new.py"],
      "flash/main.py": files["/1.0.1/flash/main.py"],
    };
    expect(world.tree()).toEqual(asTree(after));
    expect(await world.status()).toMatchObject({
      version: "1.0.1",
      firmware: { version: "1.0.1", file: ".ota/ota_0.bin" },
    });
    expect((await world.client([], server)).last).toBe("up to date 1.0.1");
    expect((await world.run("rollback")).code).toBe(0);
    expect(world.tree()).toEqual(asTree(V1));
  });
});

describe.concurrent("firmware", () => {
  test("goes to the slots in turn, and status names the active one", async () => {
    const version: Tree = { "flash/main.py": "main" };
    await using world = new World(
      { "1.0.1": version },
      {
        beside: {
          "firmware_1.0.1.bin": IMAGE_1,
          "firmware_1.0.2.bin": IMAGE_2,
          "firmware_1.0.10.bin": IMAGE_3,
        },
      },
    );
    const slot = (n: 0 | 1) => readFileSync(world.at(`device/.ota/ota_${n}.bin`));
    const state = async (firmware: string, file: string) => {
      expect(await world.status()).toMatchObject({
        version: "1.0.1",
        firmware: { version: firmware, file },
      });
    };
    await world.serve({ latest: "1.0.1" });
    expect((await world.client()).last).toBe("updated 0 -> 1.0.1 (firmware 0 -> 1.0.1)");
    expect(slot(0)).toEqual(IMAGE_1);
    expect(existsSync(world.at("device/.ota/ota_1.bin"))).toBe(false);
    await state("1.0.1", ".ota/ota_0.bin");
    await world.serve({ latest: "1.0.2" });
    const { code, last } = await world.client();
    expect({ code, last }).toEqual({
      code: 0,
      last: "updated 1.0.1 -> 1.0.1 (firmware 1.0.1 -> 1.0.2)",
    });
    expect(slot(0)).toEqual(IMAGE_1);
    expect(slot(1)).toEqual(IMAGE_2);
    await state("1.0.2", ".ota/ota_1.bin");
    await world.serve();
    expect((await world.client()).last).toEndWith("(firmware 1.0.2 -> 1.0.10)");
    expect(slot(0)).toEqual(IMAGE_3);
    expect(slot(1)).toEqual(IMAGE_2);
    await state("1.0.10", ".ota/ota_0.bin");
    expect((await world.client()).last).toBe("up to date 1.0.1");
    expect(world.sent).toEqual(["/firmware_1.0.10.bin"]);
    expect(world.tree()).toEqual(asTree({ ...version, ...VERSION_2 }));
  });

  test("of a device without files is an update of its own", async () => {
    await using world = await World.with(
      {},
      { beside: { "firmware_2.0.bin": IMAGE_1 }, device: { "etc/mine": "mine" } },
    );
    const { code, last } = await world.client();
    expect(code).toBe(0);
    expect(last).toEndWith("(firmware 0 -> 2.0)");
    expect(world.tree()).toEqual(asTree({ "etc/mine": "mine" }));
    expect(readFileSync(world.at("device/.ota/ota_0.bin"))).toEqual(IMAGE_1);
    expect((await world.client()).last).toStartWith("up to date");
    // It is so small that it came in the manifest.
    expect(world.sent).toEqual([]);
  });
});

describe.concurrent("--every", () => {
  test("keeps asking, through a server that goes away and comes back", async () => {
    await using world = new World(BOTH);
    const options = { latest: "1.0.0", port: await freePort() };
    const first = await Served.start(world.releases, options);
    await using tool = new Tool(world.args(["--every", "1s"], first));
    try {
      await tool.until(/^updated 0 -> 1\.0\.0\n/);
      await tool.until(/^up to date 1\.0\.0\n/m);
    } finally {
      await first[Symbol.asyncDispose]();
    }
    await tool.until(/cannot reach http:\/\/127\.0\.0\.1/, "stderr");
    await using _ = await Served.start(world.releases, { port: first.port });
    await tool.until(/^updated 1\.0\.0 -> 1\.0\.1\n/m);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    tool.kill("SIGTERM");
    expect((await tool.ended).code).toBe(0);
  });

  test("waits about as long as it says, and longer while there is no answer", async () => {
    using world = new World();
    const times: number[] = [];
    await using server = await Double.start((_, connection) => {
      times.push(performance.now());
      send(connection, "null", { status: times.length < 3 ? 200 : 404 });
    });
    await using tool = new Tool(world.args(["--every", "1s"], server));
    await eventually("four requests", () => times.length >= 4);
    tool.kill("SIGINT");
    const { code, stdout, stderr } = await tool.ended;
    expect({ code, stdout }).toEqual({ code: 0, stdout: "up to date 0\nup to date 0\n" });
    expect(stderr).toContain("answered 404");
    const [first = NaN, second = NaN, third = NaN] = times.slice(1).map((at, i) => at - times[i]!);
    // A second less a tenth at least, and after a failure twice a second less two; how much it is
    // at most is seen where `poll` is tested, without a clock.
    for (const gap of [first, second]) expect(gap).toBeGreaterThan(890);
    expect(third).toBeGreaterThan(1590);
  });

  test("can be longer than a timer lasts", async () => {
    using world = new World();
    await using server = await Double.start((_, connection) => send(connection, "null"));
    await using tool = new Tool(world.args(["--every", "700h"], server));
    await tool.until(/^up to date 0\n/);
    // A timer that overflows fires at once.
    await Promise.race([Bun.sleep(500), tool.until(/(up to date 0\n){2}/)]);
    expect(tool.stdout).toBe("up to date 0\n");
    tool.kill("SIGINT");
    expect((await tool.ended).code).toBe(0);
  });
});

describe.concurrent("an interrupt during a download", () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    test(`${signal}: exit code 1, and the device is as it was`, async () => {
      using world = new World({}, { device: V1 });
      const offer = { version: "1.0.1", put: { "flash/main.py": Buffer.alloc(50_000, "two") } };
      await using server = await Double.start((asked, connection) => {
        if (asked.path === "/manifest.json") {
          return offering(offer, () => server.url)(asked, connection);
        }
        connection.write("HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\nonly a beginning");
      });
      await using tool = new Tool(world.args(["--ver", "1.0.0"], server));
      await eventually("a download", () => server.askedFor("/content/flash/main.py").length > 0);
      tool.kill(signal);
      const { code, stdout, stderr } = await tool.ended;
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(stderr).toEndWith("ota.ts: interrupted; the device is as it was\n");
      expect(world.tree()).toEqual(asTree(V1));
      server.reply = offering(offer, () => server.url);
      expect((await world.client(["--ver", "1.0.0"], server)).code).toBe(0);
    });
  }
});

describe.concurrent("what a person sees", () => {
  test("a line a file on stderr, and one line on stdout", async () => {
    await using world = await World.with(BOTH, { device: V1 });
    const { stdout, stderr } = await world.process(["--ver", "1.0.0"]);
    expect(stdout).toBe("updated 1.0.0 -> 1.0.1\n");
    const lines = stderr.trimEnd().split("\n");
    expect(lines.filter((line) => line.startsWith("fetched ")).sort()).toEqual([
      "fetched flash/deep/er/ä.py (9 B)",
      "fetched flash/lib/new lib #1.py (8 B)",
      "fetched flash/main.py (13 B)",
      "fetched sd/logo.bin (9 B)",
    ]);
  });

  test("a bar on a terminal", async () => {
    using world = new World();
    const content = Buffer.alloc(400_000, "x");
    const offer = { version: "1.0.1", put: { "flash/main.py": content } };
    let seen = "";
    const bar = /\[#+ *\] [0-9.]+ [KM]?B, [0-9.]+ [KM]?B\/s, \d+ s left/;
    await using server = await Double.start(async (asked, connection) => {
      if (asked.path === "/manifest.json") {
        return offering(offer, () => server.url)(asked, connection);
      }
      connection.write(head(200, { "Content-Length": content.length }));
      // A little at a time, until the bar was seen.
      let sent = 0;
      while (!bar.test(seen) && !connection.destroyed) {
        const size = sent < 300_000 ? 2000 : 1;
        connection.write(content.subarray(sent, (sent += size)));
        await Bun.sleep(10);
      }
      connection.end(content.subarray(sent));
    });
    await using terminal = new Bun.Terminal({
      cols: 100,
      rows: 24,
      data: (_, piece) => void (seen += Buffer.from(piece).toString()),
    });
    const args = ["client", "--root", world.root, "--server", server.url];
    await using child = Bun.spawn([process.execPath, OTA_TS, ...args], { terminal });
    expect(await child.exited).toBe(0);
    await eventually("the last line", () => seen.includes("updated 0 -> 1.0.1"));
    expect(seen).toMatch(bar);
    expect(seen).not.toContain("fetched");
  });

  test("status, as text and as JSON", async () => {
    await using world = new World(BOTH, { beside: { "firmware_1.0.1.bin": IMAGE_2 }, device: V1 });
    expect(await world.status()).toEqual({
      ...{ version: null, previous_version: null, firmware: null, pending: false, failed: [] },
    });
    expect(existsSync(world.at("device/.ota"))).toBe(false);
    await world.serve();
    await world.client(["--ver", "1.0.0"]);
    expect(await world.status()).toEqual({
      version: "1.0.1",
      previous_version: "1.0.0",
      firmware: { version: "1.0.1", file: ".ota/ota_0.bin" },
      pending: false,
      failed: [],
    });
    const { code, stdout } = await world.run("status");
    expect(code).toBe(0);
    expect(stdout).toBe(
      "version:          1.0.1\n" +
        "previous_version: 1.0.0\n" +
        "firmware:         1.0.1 (.ota/ota_0.bin)\n" +
        "pending:          false\n" +
        "failed:           none\n",
    );
  });

  test("status of a device that was never updated reads its flash/OTA_VERSION.py", async () => {
    using world = new World(BOTH, { device: { ...V1, ...VERSION_1 } });
    expect(await world.status()).toMatchObject({ version: "1.0.0", previous_version: null });
    expect(world.tree()).toEqual(asTree({ ...V1, ...VERSION_1 }));
    expect(existsSync(world.at("device/.ota"))).toBe(false);
  });

  test("exit code 1 and the reason, when it failed", async () => {
    using world = new World({}, { device: V1 });
    await using server = await Double.start((_, connection) => {
      send(connection, "nothing here", { status: 404 });
    });
    const { code, stdout, stderr } = await world.process(["--ver", "1.0.0"], server);
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(/^ota\.ts: http:\/\/127.* answered 404\n$/m);
    expect(world.tree()).toEqual(asTree(V1));
  });
});

/** Carries contents by their path, and a manifest. */
class ShelfOTA extends OTA {
  readonly shelf = new Map<string, Uint8Array | string>();

  override async connect(): Promise<void> {}

  override async getData(path: string, _: TransferRequest): Promise<TransferResponse> {
    const { pathname, searchParams } = new URL(path, "shelf://");
    const found = searchParams.has("list") ? "null" : this.shelf.get(pathname);
    if (found === undefined) throw new TransferError(`there is no ${pathname}`, false);
    const body = new Blob([found]).stream();
    return { body, offset: 0, encoding: "identity", headers: new Headers() };
  }
}

test("a disk and a runner of one's own: nothing else of this machine is touched", async () => {
  const disk = new MemoryDisk();
  for (const path of ["flash", "flash/lib", "sd"]) disk.mkdir(path);
  disk.write("flash/main.py", Buffer.from("one"));
  disk.write("flash/lib/old.py", Buffer.from("old"));
  const ran: [command: string, options: Partial<CommandOptions>][] = [];
  const codes: (number | undefined)[] = [];
  const options = {
    ...{ root: "/no/such/place", disk, ver: "1.0.0", id: "memory" },
    ...{ check: { command: "self-test", timeout: 7 }, restart: "restart" },
    run: async (command: string, { signal: _, ...how }: CommandOptions) => {
      ran.push([command, how]);
      return codes.shift();
    },
  };
  const ota = new ShelfOTA(options);
  const put = { "flash/main.py": "two", "sd/new": "new" };
  const offer = { version: "1.0.1", put, remove: ["flash/lib/old.py"] };
  const manifest = manifestOf(offer, "http://a.shelf");
  for (const [path, content] of Object.entries(put)) ota.shelf.set(`/content/${path}`, content);
  ota.shelf.set("/manifest.json", JSON.stringify(manifest));

  const tree = () => {
    const files = [...disk.walk("")].filter(([path, { kind }]) => {
      return kind === "file" && !path.startsWith(".ota/");
    });
    return Object.fromEntries(
      files.map(([path, { data }]) => [path, Buffer.from(data).toString()]),
    );
  };
  const before = { "flash/lib/old.py": "old", "flash/main.py": "one" };
  const how = { cwd: "/no/such/place" };
  const env = { OTA_VERSION: "1.0.1", OTA_PREVIOUS_VERSION: "1.0.0" };
  // Its check does not end in time: back to the release before.
  codes.push(0, undefined, 0);
  expect(await ota.update()).toMatchObject({ result: "rolled back", from: "1.0.0", to: "1.0.1" });
  expect(tree()).toEqual(before);
  expect(ran).toEqual([
    ["restart", { ...how, env, timeout: 60, kill: false }],
    ["self-test", { ...how, env, timeout: 7, kill: true }],
    [
      "restart",
      {
        ...how,
        env: { OTA_VERSION: "1.0.0", OTA_PREVIOUS_VERSION: "0" },
        timeout: 60,
        kill: false,
      },
    ],
  ]);
  expect(await status(options.root, options)).toMatchObject({
    ...{ version: "1.0.0", pending: false, failed: ["1.0.1"] },
  });

  codes.push(0, 0);
  const again = Object.assign(new ShelfOTA({ ...options, retry: true }), { shelf: ota.shelf });
  expect(await again.update()).toMatchObject({ result: "updated", from: "1.0.0", to: "1.0.1" });
  expect(tree()).toEqual({ ...put, ...VERSION_2 });
  expect(await status(options.root, { disk })).toMatchObject({ version: "1.0.1", failed: [] });

  codes.push(0);
  expect(await rollBack(options.root, false, options)).toMatchObject({ result: "rolled back" });
  expect(tree()).toEqual(before);
  expect(existsSync("/no")).toBe(false);
});
