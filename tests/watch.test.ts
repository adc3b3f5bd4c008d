/**
 * A server that keeps up with its root: real directories that are changed as people and programs
 * change them, while devices ask. What is said from memory is compared with what a fresh server
 * would say. Set SEED to repeat a run.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { heapStats } from "bun:jsc";
import * as fs from "node:fs";
import { dirname } from "node:path";
import {
  HttpOTA,
  OTAError,
  parseManifest,
  Releases,
  releaseDigest,
  type TransferResponse,
  type Manifest,
  type ManifestQuery,
  type TransferRequest,
} from "../ota.ts";
import { sha256 } from "./helpers/content.ts";
import { Double, manifestOf, send, sendContent } from "./helpers/double.ts";
import { Random, seeded } from "./helpers/random.ts";
import { asTree, layTree, readTree, Temp, type Tree } from "./helpers/temp.ts";
import { eventually, injecting, need, quoted, Serving, until } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

const SEED = seeded("watch");

/**
 * Seconds within which a change shows on a busy machine, too; on an idle one it is two. Well below
 * the minute after which a server looks at everything anyway.
 */
const SOON = 30;
// Tests wait for the clock here, so many run at once: one may take long.
setDefaultTimeout(600_000);

const V1: Tree = { "flash/main.py": "one\n", "flash/lib/a.py": "a\n", "sd/data": "data\n" };
const V2: Tree = { ...V1, "flash/main.py": "two\n" };

const BOTH = { "1.0.0": V1, "1.0.1": V2 };

/** A server that does not take anything for complete before a quiet second, as the command. */
const live = (quiet = 1, device?: Tree): Promise<World> =>
  World.with(BOTH, { quiet, ...(device && { device }) });

/**
 * Seconds that are quiet where something is to be seen before they are over: more than the busiest
 * machine needs for that.
 */
const LONG = 5;

async function ask(server: { url: string }, current = "1.0.0"): Promise<Manifest | null> {
  const url = `${server.url}/manifest.json?current_ver=${current}&hash=sha256`;
  const response = await fetch(url);
  return parseManifest(await response.bytes());
}

/** What a device with nothing would be on: the version, and path → SHA-256. */
async function whole(server: { url: string }): Promise<[string, Record<string, string>]> {
  const manifest = await ask(server, "");
  const files = manifest?.new.map(({ dst_path, sha256 }) => [dst_path.slice(1), sha256!]) ?? [];
  return [manifest?.version ?? "none", Object.fromEntries(files) as Record<string, string>];
}

const hashes = (files: Tree): Record<string, string> =>
  Object.fromEntries(Object.entries(files).map(([path, content]) => [path, sha256(content)]));

/** Asks until the answer is right, but not for long. */
const soon = <T>(what: string, get: () => Promise<T>, isRight: (found: T) => boolean) =>
  until(what, get, isRight, SOON);

/** Waits until a version with these files is the newest, whole. */
function untilNewest(server: { url: string }, version: string, files: Tree): Promise<unknown> {
  const expected = [version, hashes(files)];
  const isRight = (found: unknown) => Bun.deepEquals(found, expected);
  return soon(`${version} is the newest`, () => whole(server), isRight);
}

// ── From memory, and fresh ──

/** Random releases, changed again and again; sizes differ, so that no clock has to. */
class Gardener {
  #size = 0;

  constructor(
    readonly root: string,
    readonly random: Random,
  ) {}

  /** One change of the kind that people make. */
  change(): void {
    const { random } = this;
    const version = `${this.root}/1.${random.below(3)}.${random.below(3)}`;
    const file = `${version}/flash/${random.pick(["a.py", "b c.py", "lib/d.py", "\u00e9"])}`;
    const image = `${this.root}/firmware_1.${random.below(3)}.0.bin`;
    random.pick([
      () => this.#write(file),
      () => this.#write(file),
      () => this.#write(image),
      () => fs.rmSync(file, { force: true }),
      () => fs.rmSync(image, { force: true }),
      () => fs.rmSync(version, { recursive: true, force: true }),
      () => {
        const other = `${this.root}/1.${random.below(3)}.${random.below(3)}`;
        if (fs.existsSync(version) && !fs.existsSync(other)) fs.renameSync(version, other);
      },
      () => {
        const other = `${this.root}/1.${random.below(3)}.${random.below(3)}`;
        if (version === other || !fs.existsSync(version)) return;
        fs.cpSync(version, other, { recursive: true });
      },
    ])();
  }

  query(releases: Releases): ManifestQuery {
    const { random } = this;
    const digests = releases.versions.map(({ digest }) => digest);
    const some: Record<string, readonly string[]> = {
      current_ver: ["", "0", "9", "x", 'q"\u{1f680}', "1.00.0", "1.0.0", "1.1.1", "1.2.0", "1.2"],
      firmware_ver: ["", "1.0.0", "1.1.0", "1.2.0", "7"],
      base: ["", "x", sha256("x"), ...digests],
      firmware_sha256: [sha256("x"), ...releases.firmware.map((image) => image.sha256)],
      hash: ["sha256", "sha1"],
      reqid: ["", "7", '"\\\n'],
    };
    const chosen = Object.entries(some).filter(() => random.chance(0.5));
    const list = random.chance(0.1) && { list: random.pick(["1.0.0", "1.1.1", "1.02.0", "7"]) };
    return {
      ...Object.fromEntries(chosen.map(([name, values]) => [name, random.pick(values)])),
      ...list,
    };
  }

  #write(file: string): void {
    fs.mkdirSync(dirname(file), { recursive: true });
    fs.writeFileSync(file, "x".repeat(++this.#size));
  }
}

test("what comes from memory is what a fresh start would say, through any history of changes", async () => {
  using temp = new Temp();
  layTree(temp.at("root"), { "1.0.0/flash/a.py": "", "firmware_1.0.0.bin": "" });
  const random = new Random(SEED);
  const gardener = new Gardener(temp.at("root"), random);
  const lasting = await Releases.open(temp.at("root"), { quiet: 0 });
  const seen = new Set<string>();
  for (let round = 0; round < 60; round++) {
    for (let times = random.below(4); times >= 0; times--) gardener.change();
    await lasting.scan();
    const fresh = await Releases.open(temp.at("root"), { quiet: 0 });
    for (let times = 0; times < 40; times++) {
      const query = gardener.query(fresh);
      const base = random.pick(["http://a", "http://b:1", "https://cdn.test/fleet"]);
      const suffix = random.pick(["", "?token=t"]);
      const text = lasting.manifestJSON(query, base, suffix);
      // Twice: made, and remembered.
      for (const found of [text, lasting.manifestJSON(query, base, suffix)]) {
        const expected = JSON.stringify(fresh.manifestFor(query, base, suffix));
        if (found === expected) continue;
        throw new Error(`round ${round}, ${JSON.stringify(query)}: ${found}, fresh: ${expected}`);
      }
      seen.add(text);
    }
  }
  expect(seen.size).toBeGreaterThan(500);
});

describe("memory is bounded, whatever is asked", () => {
  /** What is reachable, in MB. */
  const held = () => {
    Bun.gc(true);
    return heapStats().heapSize / 1e6;
  };

  // A release that only deletes has a manifest of two lines, in which no host stands.
  for (const [what, newest] of [
    ["a release that adds files", { ...V1, "flash/b.py": "b\n" }],
    ["a release that only deletes", { "flash/main.py": "one\n" }],
  ] as const) {
    test(`random hosts and versions, and ${what}`, async () => {
      await using world = new World(BOTH);
      world.release("2.0.0", newest);
      const releases = await Releases.open(world.releases, { quiet: 0 });
      const random = new Random(SEED);
      const request = (i: number) => {
        // A header may have 16 KiB.
        const host = `http://${i}`.padEnd(8000, "h");
        const current_ver = random.chance(0.5) ? "1.0.0" : `${random.next()}`.padEnd(128, "0");
        releases.manifestJSON({ current_ver, hash: "sha256" }, host);
      };
      const before = held();
      // All of them would be 240 MB and more.
      for (let i = 0; i < 30_000; i++) request(i);
      expect(held() - before).toBeLessThan(80);
      expect(releases.versions.length).toBe(3);
    });
  }

  test("one manifest is made for a version however many ask, and one for all unknown versions", async () => {
    await using world = new World(BOTH);
    const releases = await Releases.open(world.releases, { quiet: 0 });
    // Making one takes the files of a release; remembering does not.
    let made = 0;
    const release = releases.versions.at(-1)!;
    const { files } = release;
    Object.defineProperty(release, "files", { get: () => (made++, files) });
    const askAll = () => {
      for (let i = 0; i < 1000; i++) {
        releases.manifestJSON({ current_ver: "1.0.0", reqid: `${i}`, devid: `${i}` }, "http://a");
        releases.manifestJSON({ current_ver: `0.${i}` }, "http://a");
      }
    };
    askAll();
    const once = made;
    expect(once).toBeGreaterThan(0);
    expect(once).toBeLessThan(50);
    askAll();
    expect(made).toBe(once);
  });
});

// ── A root that changes ──

describe.concurrent("while it serves, a change shows within two seconds", () => {
  /** One change after the other; each is awaited. */
  async function expectShown(
    change: (world: World) => void | Promise<void>,
    version: string,
    files: Tree,
    prepare?: (world: World) => void,
  ): Promise<void> {
    await using world = new World(BOTH);
    prepare?.(world);
    const server = await world.serve({ quiet: 1 });
    await whole(server);
    await change(world);
    await untilNewest(server, version, files);
    // And it is the content that is served.
    for (const [path, content] of Object.entries(files)) {
      const response = await fetch(`${server.url}/${version}/${encodeURI(path)}`);
      expect([path, response.status]).toEqual([path, 200]);
      expect(sha256(await response.bytes())).toBe(sha256(content));
    }
  }

  const V3: Tree = { "flash/main.py": "three\n", "flash/new/deep/er/x.py": "x\n", "flash/e": "" };

  test("a new version", () => expectShown((world) => world.release("1.0.2", V3), "1.0.2", V3));

  test("a new version, moved in from elsewhere, and an edit deep in it", async () => {
    await using world = await live();
    layTree(world.at("build"), V3);
    fs.renameSync(world.at("build"), world.at("releases/1.0.2"));
    await untilNewest(world, "1.0.2", V3);
    const mended = { ...V3, "flash/new/deep/er/x.py": "mended\n" };
    layTree(world.at("releases/1.0.2"), { "flash/new/deep/er/x.py": "mended\n" });
    await untilNewest(world, "1.0.2", mended);
    const more = { ...mended, "flash/new/deep/er/and/more": "more\n" };
    layTree(world.at("releases/1.0.2"), { "flash/new/deep/er/and/more": "more\n" });
    await untilNewest(world, "1.0.2", more);
  });

  test("an edit", () => {
    const edit = (world: World) => world.release("1.0.1", { "flash/lib/a.py": "edited\n" });
    return expectShown(edit, "1.0.1", { ...V2, "flash/lib/a.py": "edited\n" });
  });

  test("an edit that keeps the size, with the time of the file put back", () => {
    const edit = (world: World) => {
      const file = world.at("releases/1.0.1/flash/main.py");
      const { atime, mtime } = fs.statSync(file);
      fs.writeFileSync(file, "tWo\n");
      fs.utimesSync(file, atime, mtime);
    };
    return expectShown(edit, "1.0.1", { ...V2, "flash/main.py": "tWo\n" });
  });

  test("an edit as editors make it: another file, renamed over", () => {
    const edit = (world: World) => {
      const file = world.at("releases/1.0.1/flash/main.py");
      const { atime, mtime } = fs.statSync(file);
      world.write({ new: "tWo\n" });
      fs.utimesSync(world.at("new"), atime, mtime);
      fs.renameSync(world.at("new"), file);
    };
    return expectShown(edit, "1.0.1", { ...V2, "flash/main.py": "tWo\n" });
  });

  test("a file that goes, and one that comes", () => {
    const { "sd/data": _, ...rest } = V2;
    const edit = (world: World) => {
      fs.rmSync(world.at("releases/1.0.1/sd/data"));
      world.release("1.0.1", { "flash/\u00e9 \u{1f680}.py": "new\n" });
    };
    return expectShown(edit, "1.0.1", { ...rest, "flash/\u00e9 \u{1f680}.py": "new\n" });
  });

  test("an edit of the release that a device comes from", async () => {
    await using world = await live();
    expect((await ask(world))?.update.map(({ dst_path }) => dst_path)).toEqual(["/flash/main.py"]);
    world.release("1.0.0", { "flash/lib/a.py": "other\n" });
    const isRight = (manifest: Manifest | null) => manifest?.update.length === 2;
    await soon("both are to be updated", () => ask(world), isRight);
  });

  test("a removal: the release before is the newest again, and what was in it is gone", async () => {
    await using world = await live();
    expect((await ask(world))?.version).toBe("1.0.1");
    fs.rmSync(world.at("releases/1.0.1"), { recursive: true });
    await untilNewest(world, "1.0.0", V1);
    expect(await ask(world)).toBeNull();
    expect((await fetch(`${world.url}/1.0.1/flash/main.py`)).status).toBe(404);
  });

  test("firmware: new, changed, gone", async () => {
    await using world = await live();
    const hash = async () => (await ask(world))?.firmware?.sha256;
    expect(await hash()).toBeUndefined();
    for (const image of ["one", "another"]) {
      layTree(world.releases, { "firmware_1.0.1.bin": image });
      await soon(`the image ${image}`, hash, (found) => found === sha256(image));
      const response = await fetch(`${world.url}/firmware_1.0.1.bin`);
      expect(await response.text()).toBe(image);
    }
    fs.rmSync(world.at("releases/firmware_1.0.1.bin"));
    await soon("no image", hash, (found) => found === undefined);
    expect((await fetch(`${world.url}/firmware_1.0.1.bin`)).status).toBe(404);
  });

  test("a version that is a link, pointed elsewhere", () => {
    const prepare = (world: World) => {
      world.release(".builds/a", V2);
      world.release(".builds/b", V3);
      fs.symlinkSync(".builds/a", world.at("releases/1.0.2"));
    };
    const change = (world: World) => {
      fs.symlinkSync(".builds/b", world.at("releases/.next"));
      fs.renameSync(world.at("releases/.next"), world.at("releases/1.0.2"));
    };
    return expectShown(change, "1.0.2", V3, prepare);
  });

  test("the first version of an empty root, and the last one going", async () => {
    using temp = new Temp();
    fs.mkdirSync(temp.at("root"));
    await using server = await Served.start(temp.at("root"), { quiet: 1 });
    const health = async () => (await fetch(`${server.url}/-/health`)).status;
    expect([await ask(server), await health()]).toEqual([null, 503]);
    layTree(temp.at("root/1.0.0"), V1);
    await untilNewest(server, "1.0.0", V1);
    expect(await health()).toBe(200);
    fs.rmSync(temp.at("root/1.0.0"), { recursive: true });
    await soon(
      "nothing",
      () => whole(server),
      ([version]) => version === "none",
    );
    expect(await health()).toBe(503);
  });

  test("a copy that ended just while the server started", async () => {
    await using world = new World(BOTH);
    const started = performance.now();
    const starting = world.serve({ quiet: 1 });
    // The server waits for about two seconds for a root that is not quiet, and then begins.
    const file = world.at("releases/1.0.1/flash/main.py");
    while (performance.now() - started < 1950) {
      fs.appendFileSync(file, "more\n");
      await Bun.sleep(20);
    }
    const server = await starting;
    await untilNewest(server, "1.0.1", { ...V2, "flash/main.py": fs.readFileSync(file) });
  });

  for (const [call, fault] of [
    ["inotify_init1", "error=EMFILE"],
    ["inotify_add_watch", "error=ENOSPC"],
    // All but the root and one directory.
    ["inotify_add_watch", "error=ENOSPC:when=3+"],
  ] as const) {
    test(`where the system does not tell of changes: ${call}, ${fault}`, async () => {
      await using world = new World(BOTH);
      const args = ["--root", world.releases, "--host", "127.0.0.1"];
      await using tool = await Serving.start(args, { prefix: injecting(call, fault) });
      const { url } = tool;
      const code = fault.split("=")[1]!.split(":")[0];
      const expected = `^warning: changes may show late: the root is scanned every \\d+ s.*${code}`;
      await tool.until(new RegExp(expected, "m"), "stderr");
      world.release("1.0.2", V3);
      await untilNewest({ url }, "1.0.2", V3);
      world.release("1.0.2", { "flash/main.py": "mended\n" });
      await untilNewest({ url }, "1.0.2", { ...V3, "flash/main.py": "mended\n" });
      world.release("1.0.1", { "flash/new/main.py": "more\n" });
      fs.rmSync(world.at("releases/1.0.2"), { recursive: true });
      await untilNewest({ url }, "1.0.1", { ...V2, "flash/new/main.py": "more\n" });
      // Once, however much is not watched.
      expect(tool.stderr.match(/may show late/g)).toHaveLength(1);
    });
  }
});

describe.concurrent("the root is what its path names now", () => {
  const other: Tree = { "flash/main.py": "other\n" };

  /** A server for `root` below a directory; its lines are kept. */
  const serving = (path: string): Promise<Served> => Served.start(path, { quiet: 1 });

  /** Expects that whatever is shown of a root comes from this one, later changes included. */
  async function expectFollowed(server: Served, real: string): Promise<void> {
    await untilNewest(server, "1.0.2", other);
    expect((await fetch(`${server.url}/1.0.1/flash/main.py`)).status).toBe(404);
    expect(await (await fetch(`${server.url}/notes.txt`)).text()).toBe(real);
    // It is this one that is watched from now on.
    layTree(real, { "1.0.3/flash/main.py": "later\n" });
    await untilNewest(server, "1.0.3", { "flash/main.py": "later\n" });
    expect(await (await fetch(`${server.url}/1.0.3/flash/main.py`)).text()).toBe("later\n");
    expect((await fetch(`${server.url}/-/health`)).status).toBe(200);
  }

  const layOther = (real: string, at = real): void =>
    layTree(at, { "1.0.2/flash/main.py": "other\n", "notes.txt": real });

  test("when it is replaced by a rename", async () => {
    await using world = new World(BOTH);
    layOther(world.releases, world.at("next"));
    await using server = await serving(world.releases);
    expect((await whole(server))[0]).toBe("1.0.1");
    fs.renameSync(world.releases, world.at("before"));
    fs.renameSync(world.at("next"), world.releases);
    await expectFollowed(server, world.releases);
  });

  test("when it is a link, and is switched; and back", async () => {
    await using world = new World(BOTH);
    layOther(world.at("next"));
    fs.symlinkSync("releases", world.at("current"));
    await using server = await serving(world.at("current"));
    expect((await whole(server))[0]).toBe("1.0.1");
    const pointTo = (target: string) => {
      fs.symlinkSync(target, world.at("new"));
      fs.renameSync(world.at("new"), world.at("current"));
    };
    pointTo("next");
    await expectFollowed(server, world.at("next"));
    pointTo("releases");
    await untilNewest(server, "1.0.1", V2);
  });

  test("when a directory above it is a link that is switched", async () => {
    await using world = new World(BOTH);
    layTree(world.at("b"), { "releases/1.0.2/flash/main.py": "other\n" });
    layTree(world.at("b"), { "releases/notes.txt": world.at("b/releases") });
    layTree(world.at("a"), { "releases/1.0.1/flash/main.py": "two\n" });
    fs.symlinkSync("a", world.at("disk"));
    await using server = await serving(world.at("disk/releases"));
    fs.rmSync(world.at("disk"));
    fs.symlinkSync("b", world.at("disk"));
    await expectFollowed(server, world.at("b/releases"));
  });

  test("when it is away for a while: what was offered stands, and it is found again", async () => {
    await using world = new World(BOTH);
    await using server = await serving(world.releases);
    fs.renameSync(world.releases, world.at("away"));
    const health = async () => (await fetch(`${server.url}/-/health`)).status;
    await soon("health says so", health, (status) => status === 503);
    expect((await whole(server))[0]).toBe("1.0.1");
    layOther(world.releases);
    await expectFollowed(server, world.releases);
  });

  test("where the system does not tell of changes", async () => {
    await using world = new World(BOTH);
    layOther(world.at("next"));
    fs.symlinkSync("releases", world.at("current"));
    const args = ["--root", world.at("current"), "--host", "127.0.0.1"];
    const prefix = injecting("inotify_init1", "error=EMFILE");
    await using tool = await Serving.start(args, { prefix });
    const { url } = tool;
    fs.rmSync(world.at("current"));
    fs.symlinkSync("next", world.at("current"));
    await untilNewest({ url }, "1.0.2", other);
  });
});

// ── What was offered already ──

describe.concurrent("what changes under a version that devices are on", () => {
  const part: Tree = { "flash/0.py": "0\n" };
  const all: Tree = Object.fromEntries(
    Array.from({ length: 12 }, (_, i) => [`flash/${i}.py`, `${i}\n`]),
  );
  const digestOf = (files: Tree) => releaseDigest(Object.entries(hashes(files)));

  /** What a device gets that says what it really has: `null`, or paths, and whether it is all. */
  async function offered(url: string, query: string): Promise<[string[], boolean] | null> {
    const response = await fetch(`${url}/manifest.json?hash=sha256&${query}`);
    expect(response.status).toBe(200);
    const manifest = (await response.json()) as Manifest | null;
    const files = [...(manifest?.new ?? []), ...(manifest?.update ?? [])];
    return manifest && [files.map(({ dst_path }) => dst_path.slice(1)), manifest.full === true];
  }

  const changedOf = async (url: string): Promise<number> => {
    const text = await (await fetch(`${url}/-/metrics`)).text();
    return Number(/^ota_changed_total (\d+)$/m.exec(text)?.[1] ?? NaN);
  };

  test("a copy that pauses for long: devices on its first state get the whole; it is said and counted", async () => {
    await using world = new World(BOTH);
    const args = ["--root", world.releases, "--host", "127.0.0.1"];
    await using tool = await Serving.start(args);
    const { url } = tool;
    world.release("1.0.2", part);
    await untilNewest({ url }, "1.0.2", part);
    const device = `current_ver=1.0.2&base=${digestOf(part)}`;
    expect(await offered(url, device)).toBeNull();
    expect(await changedOf(url)).toBe(0);
    world.release("1.0.2", all);
    await untilNewest({ url }, "1.0.2", all);
    const paths = Object.keys(all).sort();
    expect(await offered(url, device)).toEqual([paths, true]);
    expect(await offered(url, `current_ver=1.0.2&base=${digestOf(all)}`)).toBeNull();
    // A board with Pycom's library cannot say what it has.
    expect(await offered(url, "current_ver=1.0.2")).toBeNull();
    await tool.until(/^warning: 1\.0\.2 changed after it was offered: .*$/m, "stderr");
    expect(await changedOf(url)).toBe(1);
    // Another time, in a version that is not the newest.
    world.release("1.0.1", { "flash/main.py": "edited\n" });
    await tool.until(/^warning: 1\.0\.1 changed after it was offered: .*$/m, "stderr");
    expect(await changedOf(url)).toBe(2);
    expect(await offered(url, `current_ver=1.0.1&base=${digestOf(V2)}`)).toEqual([paths, true]);
  });

  test("firmware that changes under its name is offered to who runs the other", async () => {
    await using world = new World(BOTH);
    layTree(world.releases, { "firmware_1.0.0.bin": "one" });
    const server = await world.serve({ quiet: 1 });
    const runs = `current_ver=1.0.1&firmware_ver=1.0.0&firmware_sha256=${sha256("one")}`;
    expect(await offered(server.url, runs)).toBeNull();
    layTree(world.releases, { "firmware_1.0.0.bin": "another" });
    await soon(
      "the other image",
      () => offered(server.url, runs),
      (found) => found !== null,
    );
    expect(await changedOf(server.url)).toBe(1);
    const now = runs.replace(sha256("one"), sha256("another"));
    expect(await offered(server.url, now)).toBeNull();
  });

  test("not: a version that is touched, changes its modes, goes and comes back, or is new", async () => {
    await using world = new World(BOTH);
    const warnings: string[] = [];
    let changes = 0;
    const server = await world.serve({
      quiet: 0.2,
      warn: (line) => void warnings.push(line),
      changed: () => void changes++,
    });
    const file = world.at("releases/1.0.1/flash/main.py");
    const after = async (change: () => void): Promise<void> => {
      const before = changes;
      change();
      await eventually("the change is noticed", () => changes > before, SOON);
    };
    await after(() => fs.utimesSync(file, 1, 1));
    await after(() => fs.chmodSync(file, 0o755));
    await after(() => fs.renameSync(world.at("releases/1.0.1"), world.at("releases/.away")));
    await after(() => fs.renameSync(world.at("releases/.away"), world.at("releases/1.0.1")));
    await after(() => world.release("1.0.2", V1));
    expect([warnings, await changedOf(server.url)]).toEqual([[], 0]);
    // Gone, and another one under its name.
    await after(() => fs.rmSync(world.at("releases/1.0.2"), { recursive: true }));
    await after(() => world.release("1.0.2", V2));
    expect(warnings.map((line) => line.split(":")[0])).toEqual([
      "1.0.2 changed after it was offered",
    ]);
    expect(await changedOf(server.url)).toBe(1);
  });
});

test.concurrent(
  "serve says what else it serves; with --only-releases it serves nothing else",
  async () => {
    await using world = new World(BOTH);
    layTree(world.releases, {
      "notes/a.txt": "a",
      "notes/b/c.txt": "c",
      "notes/x y": "odd",
      "notes/key.pem": "-----BEGIN EC PRIVATE KEY-----\n",
      "plan.txt": "plan",
      "1.0.0/secret.key": "secret",
      "1.0.3/flash/main.py": "held back",
    });
    const args = ["--root", world.releases, "--host", "127.0.0.1"];
    args.push("--ignore", "*.key", "--latest", "1.0.1");
    const statuses = async (url: string) => {
      const asked = ["notes/a.txt", "plan.txt", "1.0.1/flash/main.py", "notes/key.pem"];
      asked.push("1.0.0/secret.key", "1.0.3/flash/main.py");
      return Promise.all(asked.map(async (path) => (await fetch(`${url}/${path}`)).status));
    };
    await using open = await Serving.start(args);
    expect(open.startup).toMatch(/^also served: notes\/ \(3 files\), plan\.txt$/m);
    expect(await statuses(open.url)).toEqual([200, 200, 200, 404, 404, 404]);
    await using strict = await Serving.start([...args, "--only-releases"]);
    expect(strict.startup).not.toContain("also served");
    expect(await statuses(strict.url)).toEqual([404, 404, 200, 404, 404, 404]);
  },
);

test.concurrent("what did not change is not read again", async () => {
  await using world = new World(BOTH);
  const many = Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`flash/${i}`, `${i}`]));
  world.release("1.0.1", many);
  layTree(world.releases, { "firmware_1.0.0.bin": "image" });
  const options = ["-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", "trace=open,openat,openat2"];
  const prefix = [need("strace"), ...options, "-o", world.at("calls")];
  const args = ["--root", world.releases, "--host", "127.0.0.1", "--no-fleet"];
  await using tool = await Serving.start(args, { prefix });
  const { url } = tool;

  let told = 0;
  /** The files below the root that were opened to be read since the last time, sorted. */
  const read = (): string[] => {
    const lines = fs.readFileSync(world.at("calls"), "utf8").split("\n");
    const news = lines.slice(told, -1);
    told = lines.length - 1;
    return news
      .filter((line) => !/O_DIRECTORY|O_PATH/.test(line))
      .flatMap((line) => new RegExp(`"${world.releases}/([^"]+)"`).exec(line)?.[1] ?? [])
      .sort();
  };
  const below = (version: string, files: Tree) => Object.keys(files).map((f) => `${version}/${f}`);
  const all = [...below("1.0.0", V1), ...below("1.0.1", { ...V2, ...many }), "firmware_1.0.0.bin"];
  await eventually("every file is read once at the start", () => told > 0 || read().length > 0);
  told = 0;
  expect(read()).toEqual(all.sort());

  // A new version: its files, once each, and no other.
  const added: Tree = { "flash/main.py": "x\n", "flash/other.py": "y\n" };
  world.release("1.0.2", added);
  await untilNewest({ url }, "1.0.2", added);
  expect(read()).toEqual(below("1.0.2", added));

  // An edit: the file that was edited.
  world.release("1.0.2", { "flash/other.py": "z\n" });
  const edited = { ...added, "flash/other.py": "z\n" };
  await untilNewest({ url }, "1.0.2", edited);
  expect(read()).toEqual(["1.0.2/flash/other.py"]);

  // New firmware: the image.
  layTree(world.releases, { "firmware_1.0.2.bin": "new image" });
  const firmware = async () => (await ask({ url }))?.firmware?.sha256;
  await soon("the image", firmware, (found) => found === sha256("new image"));
  expect(read()).toEqual(["firmware_1.0.2.bin"]);

  // A removal, and another name for a version: nothing.
  fs.rmSync(world.at("releases/1.0.2"), { recursive: true });
  await untilNewest({ url }, "1.0.1", { ...V2, ...many });
  expect(read()).toEqual([]);

  // Nor for manifests, however many.
  for (let i = 0; i < 50; i++) await ask({ url }, `${i}`);
  expect(read()).toEqual([]);
});

// ── The quiet second ──

describe.concurrent("a version counts after one quiet second", () => {
  /** Watches what is offered, until told to stop: every newest version with its files. */
  function observe(server: { url: string }) {
    const seen: [string, Record<string, string>][] = [];
    let stopped = false;
    const look = async () => {
      const found = await whole(server);
      if (!Bun.deepEquals(found, seen.at(-1))) seen.push(found);
    };
    const watching = (async () => {
      for (; !stopped; await Bun.sleep(5)) await look();
    })();
    return async () => {
      stopped = true;
      await watching;
      await look();
      return seen;
    };
  }

  /** Writes files in pieces with pauses, as somebody else: we may be busy for longer than that. */
  async function writeSlowly(files: Record<string, readonly string[]>): Promise<void> {
    const lines = Object.entries(files).flatMap(([file, pieces]) => [
      `mkdir -p ${quoted(dirname(file))}`,
      `: > ${quoted(file)}`,
      ...pieces.map((piece) => `printf %s ${quoted(piece)} >> ${quoted(file)}; sleep 0.3`),
    ]);
    const script = lines.join("; ");
    const code = await Bun.spawn(["sh", "-ec", script]).exited;
    if (code !== 0) throw new Error(`${script}: exit code ${code}`);
  }

  test("a copy that takes longer is not offered before it is whole", async () => {
    await using world = await live(LONG);
    const stop = observe(world);
    const files: Tree = { "flash/a.py": "abcd", "flash/b/c.py": "ef", "flash/main.py": "gh" };
    await writeSlowly({
      [world.at("releases/1.0.2/flash/a.py")]: ["a", "b", "", "c", "d"],
      [world.at("releases/1.0.2/flash/b/c.py")]: ["e", "f"],
      [world.at("releases/1.0.2/flash/main.py")]: ["g", "h"],
    });
    await untilNewest(world, "1.0.2", files);
    expect(await stop()).toEqual([
      ["1.0.1", hashes(V2)],
      ["1.0.2", hashes(files)],
    ]);
  });

  test("firmware that takes longer, too", async () => {
    await using world = await live(LONG);
    const offered = new Set<string | undefined>();
    const firmware = async () => {
      const found = (await ask(world))?.firmware?.sha256;
      offered.add(found);
      return found;
    };
    const pieces = ["first ", "second ", "third ", "fourth ", "fifth ", "sixth"];
    const right = sha256(pieces.join(""));
    const writing = writeSlowly({ [world.at("releases/firmware_1.0.1.bin")]: pieces });
    await soon("the whole image", firmware, (found) => found === right);
    await writing;
    expect([...offered]).toEqual([undefined, right]);
  });

  test("the last good one stands during an edit, and no other bytes are sent", async () => {
    await using world = await live(LONG);
    const [kept, other] = ["flash/main.py", "flash/lib/a.py"];
    const get = async (path: string) => {
      const response = await fetch(`${world.url}/1.0.1/${path}`);
      return { response, text: await response.text() };
    };
    // The one was sent before, and is in memory; the other one was never asked for.
    expect((await get(kept)).text).toBe("two\n");
    const stop = observe(world);
    const pieces = ["an edit ", "that ", "takes ", "all ", "its ", "time\n"];
    const writing = Promise.all([
      writeSlowly({ [world.at("releases", `1.0.1/${kept}`)]: pieces }),
      writeSlowly({ [world.at("releases", `1.0.1/${other}`)]: pieces }),
    ]);
    await eventually("the edit has begun", () =>
      [kept, other].every(
        (path) => fs.statSync(world.at("releases", `1.0.1/${path}`)).size > "two\n".length,
      ),
    );
    let isOver = false;
    void writing.then(() => (isOver = true));
    const answers = new Set<string>();
    while (!isOver) {
      expect((await get(kept)).text).toBe("two\n");
      const { response, text } = await get(other);
      answers.add(`${response.status} ${response.headers.get("retry-after")} ${text}`);
      await Bun.sleep(20);
    }
    expect([...answers]).toEqual(["503 2 changing just now\n"]);
    const edited = { ...V2, [kept!]: pieces.join(""), [other!]: pieces.join("") };
    await untilNewest(world, "1.0.1", edited);
    expect((await get(kept)).text).toBe(pieces.join(""));
    expect((await get(other)).text).toBe(pieces.join(""));
    expect(await stop()).toEqual([
      ["1.0.1", hashes(V2)],
      ["1.0.1", hashes(edited)],
    ]);
  });

  test("a removal that takes long does not offer what is left", async () => {
    await using world = new World(BOTH);
    const many = Object.fromEntries(Array.from({ length: 6 }, (_, i) => [`flash/${i}`, `${i}`]));
    world.release("1.0.2", many);
    const server = await world.serve({ quiet: LONG });
    const stop = observe(server);
    const removals = Object.keys(many).map(
      (path) => `rm ${quoted(world.at("releases", `1.0.2/${path}`))}`,
    );
    await Bun.spawn(["sh", "-ec", removals.join("; sleep 0.3; ")]).exited;
    fs.rmSync(world.at("releases/1.0.2"), { recursive: true });
    await untilNewest(server, "1.0.1", V2);
    expect(await stop()).toEqual([
      ["1.0.2", hashes(many)],
      ["1.0.1", hashes(V2)],
    ]);
  });

  test("the command waits for a fresh root, says what is changing, and what came of it", async () => {
    await using world = new World(BOTH);
    // Without a process for each pause, which may take longer to start than a second.
    const script =
      "mkdir 1.0.2; exec 3<> <(:); i=0; while echo > 1.0.2/$((i += 1)); do read -t 0.1 -u 3; done";
    await using writer = Bun.spawn(["bash", "-c", script], { cwd: world.releases });
    await using tool = await Serving.start(["--root", world.releases, "--host", "127.0.0.1"]);
    const { startup, url } = tool;
    expect(startup).toMatch(/^version +1\.0\.0 /m);
    expect(startup).toMatch(/^version +1\.0\.1 /m);
    expect(startup).not.toMatch(/^version +1\.0\.2 /m);
    expect(startup).toMatch(/^changing +1\.0\.2\b/m);
    expect((await whole({ url }))[0]).toBe("1.0.1");
    writer.kill("SIGKILL");
    await writer.exited;
    const isNow = () => /^now +1\.0\.0 1\.0\.1 1\.0\.2$/m.test(tool.stdout);
    await eventually("it says that 1.0.2 counts", isNow, SOON);
  });
});

describe.concurrent("a rename publishes at once or not at all", () => {
  const many = Object.fromEntries(
    Array.from({ length: 200 }, (_, i) => [`flash/${i % 7}/${i}.py`, `${i}\n`]),
  );

  /** Runs commands as a person would, in the root. */
  async function shell(world: World, script: string): Promise<void> {
    const child = Bun.spawn(["sh", "-ec", script], { cwd: world.releases, stderr: "pipe" });
    const [code, errors] = await Promise.all([child.exited, child.stderr.text()]);
    if (code !== 0) throw new Error(`${script}: ${errors}`);
  }

  test("cp -r build .1.0.2 && mv .1.0.2 1.0.2", async () => {
    await using world = new World(BOTH);
    layTree(world.at("build"), many);
    const server = await world.serve({ quiet: 1 });
    const seen: [string, number][] = [];
    let stopped = false;
    const look = async () => {
      const [version, files] = await whole(server);
      const last = seen.at(-1);
      const count = Object.keys(files).length;
      if (last?.[0] !== version || last[1] !== count) seen.push([version, count]);
    };
    const watching = (async () => {
      for (; !stopped; await Bun.sleep(1)) await look();
    })();
    await shell(world, "cp -r ../build .1.0.2");
    // Long enough for anything else to count.
    await Bun.sleep(1600);
    expect((await whole(server))[0]).toBe("1.0.1");
    expect((await fetch(`${server.url}/.1.0.2/flash/0/0.py`)).status).toBe(404);
    await shell(world, "mv .1.0.2 1.0.2");
    await untilNewest(server, "1.0.2", many);
    // And back out of sight.
    await shell(world, "mv 1.0.2 .1.0.2");
    await untilNewest(server, "1.0.1", V2);
    stopped = true;
    await watching;
    await look();
    expect(seen).toEqual([
      ["1.0.1", 3],
      ["1.0.2", 200],
      ["1.0.1", 3],
    ]);
  });

  test("a version that is exchanged for another one, by two renames", async () => {
    await using world = new World(BOTH);
    world.release(".new", many);
    const server = await world.serve({ quiet: 1 });
    const counts = new Set<string>();
    const get = async () => {
      const found = await whole(server);
      counts.add(`${found[0]} ${Object.keys(found[1]).length}`);
      return found;
    };
    await get();
    await shell(world, "mv 1.0.1 .old; mv .new 1.0.1");
    await soon("the other one", get, ([, files]) => Object.keys(files).length === 200);
    // Between the renames there is no 1.0.1, and a look may see that.
    expect([...counts].filter((count) => count !== "1.0.0 3")).toEqual(["1.0.1 3", "1.0.1 200"]);
  });
});

// ── Content that is not what was indexed ──

describe.concurrent("content that is other than indexed is not sent", () => {
  test("503 with Retry-After, for every way to ask; and it is looked at again at once", async () => {
    await using world = new World(BOTH);
    // Nothing tells of a change that is made through another name of the file.
    fs.linkSync(world.at("releases/1.0.1/flash/main.py"), world.at("elsewhere"));
    const server = await world.serve({ quiet: LONG });
    fs.writeFileSync(world.at("elsewhere"), "evil\n");
    const url = `${server.url}/1.0.1/flash/main.py`;
    const ways: RequestInit[] = [
      {},
      { headers: { "Accept-Encoding": "identity" } },
      { headers: { "Accept-Encoding": "gzip, zstd" } },
      { headers: { Range: "bytes=0-1" } },
      { method: "HEAD" },
    ];
    const answers = await Promise.all(ways.map((init) => fetch(url, init)));
    for (const response of answers) {
      expect(response.status).toBe(503);
      expect(Number(response.headers.get("retry-after"))).toBeGreaterThan(0);
      expect(response.headers.get("cache-control") ?? "").not.toContain("max-age");
      expect(response.headers.get("etag")).toBeNull();
      expect(await response.text()).not.toContain("evil");
    }
    // It was asked for, and so is looked at again: it counts as an edit like any other.
    await untilNewest(server, "1.0.1", { ...V2, "flash/main.py": "evil\n" });
    expect(await (await fetch(url)).text()).toBe("evil\n");
  });

  for (const [size, what] of [
    [16 * 1024 * 1024, "16 MiB, the most that is checked"],
    [3, "a few bytes"],
  ] as const) {
    test(`of ${what}: longer, shorter, gone`, async () => {
      const content = Buffer.alloc(size, "a");
      const changes: ((file: string) => void)[] = [
        (file) => fs.writeFileSync(file, Buffer.alloc(size, "b")),
        (file) => fs.appendFileSync(file, "more"),
        (file) => fs.truncateSync(file, size - 1),
        (file) => fs.rmSync(file),
      ];
      const expectRefused = async (change: (file: string) => void) => {
        await using world = new World(BOTH);
        const file = world.at("releases/firmware_1.0.1.bin");
        fs.writeFileSync(file, content);
        const server = await world.serve({ quiet: LONG });
        const before = await ask(server);
        change(file);
        const response = await fetch(before!.firmware!.URL);
        await response.body?.cancel();
        expect([503, 404]).toContain(response.status);
      };
      await Promise.all(changes.map(expectRefused));
    });
  }

  test("a file that has grown without bound is not read to its end", async () => {
    await using world = new World(BOTH);
    fs.linkSync(world.at("releases/1.0.1/flash/main.py"), world.at("elsewhere"));
    const args = ["--root", world.releases, "--host", "127.0.0.1"];
    await using tool = await Serving.start(args, { isMeasured: true });
    const { url } = tool;
    fs.truncateSync(world.at("elsewhere"), 1.5 * 2 ** 30);
    const response = await fetch(`${url}/1.0.1/flash/main.py`);
    await response.body?.cancel();
    expect(response.status).toBe(503);
    // It asked for another look; hashing what is there now goes on in pieces.
    tool.kill("SIGKILL");
    expect((await tool.ended).memory).toBeLessThan(500 * 2 ** 20);
  });

  test("larger content: what went or became shorter is no error of the server", async () => {
    await using world = new World(BOTH);
    const size = 17 * 1024 * 1024;
    const file = world.at("releases/firmware_1.0.1.bin");
    for (const change of [() => fs.truncateSync(file, 1000), () => fs.rmSync(file)]) {
      fs.writeFileSync(file, Buffer.alloc(size, "a"));
      const server = await world.serve({ quiet: LONG });
      const before = await ask(server);
      expect(before?.firmware?.size).toBe(size);
      change();
      for (const method of ["GET", "HEAD"]) {
        const response = await fetch(before!.firmware!.URL, { method });
        await response.body?.cancel();
        expect([404, 503]).toContain(response.status);
      }
    }
  });
});

describe.concurrent("a device that gets other content than its manifest says", () => {
  const put: Tree = { "flash/main.py": "right\n", "flash/other.py": "other\n" };
  const device = (temp: Temp, url: string) =>
    new HttpOTA(url, { root: temp.at("device"), ver: "1.0.0", jobs: 1 });

  /** Answers with a manifest that does not fit the content for the first `wrong` times. */
  async function serveWrong(wrong: number, text: string): Promise<Double> {
    const double = await Double.start(() => {});
    double.reply = (asked, connection) => {
      if (asked.path === "/manifest.json") {
        const isWrong = asked.before < wrong;
        const listed = isWrong ? { ...put, "flash/main.py": `${text}${asked.before}\n` } : put;
        const offer = { version: "1.0.1", put: listed };
        return send(connection, JSON.stringify(manifestOf(offer, double.url)));
      }
      const content = put[asked.path.slice("/content/".length)]!;
      sendContent(asked, connection, Buffer.from(content));
    };
    return double;
  }

  for (const [what, text] of [
    ["content as long as listed", "wron"],
    ["longer content than listed", "w"],
    ["shorter content than listed", "quite wrong "],
  ] as const) {
    test(`${what}: asks for a new manifest once, and goes on with what it has`, async () => {
      using temp = new Temp();
      layTree(temp.at("device"), V1);
      await using double = await serveWrong(1, text);
      expect((await device(temp, double.url).update()).result).toBe("updated");
      expect(double.askedFor("/manifest.json").length).toBe(2);
      expect(double.askedFor("/content/flash/other.py").length).toBe(1);
      expect(readTree(temp.at("device"))).toMatchObject(asTree(put));
    });

    test(`${what}: gives up when a new manifest does not help, and is as it was`, async () => {
      using temp = new Temp();
      layTree(temp.at("device"), V1);
      await using double = await serveWrong(Infinity, text);
      const error = await device(temp, double.url)
        .update()
        .catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(OTAError);
      expect(String(error)).toContain("flash/main.py");
      expect(double.askedFor("/manifest.json").length).toBe(2);
      expect(readTree(temp.at("device"))).toEqual(asTree(V1));
    });
  }

  /** A device in whose way a person edits the release, right after it has its manifest. */
  class Unlucky extends HttpOTA {
    // What came in a manifest is what it says, whatever happens then.
    protected override readonly isBrief = false;
    edit: (() => void) | undefined;

    override async getData(path: string, want: TransferRequest): Promise<TransferResponse> {
      if (!path.startsWith("/manifest.json")) {
        this.edit?.();
        this.edit = undefined;
      }
      return super.getData(path, want);
    }
  }

  for (const [what, content] of [
    ["longer", "edited meanwhile\n"],
    ["shorter", "e\n"],
    ["other, as long", "tWo\n"],
  ] as const) {
    test(`while a file becomes ${what} on the server: it ends up on the edited release`, async () => {
      await using world = await live(3, V1);
      const unlucky = new Unlucky(world.url, { root: world.root, ver: "1.0.0" });
      unlucky.edit = () => world.release("1.0.1", { "flash/main.py": content });
      expect((await unlucky.update()).result).toBe("updated");
      const edited = { ...V2, "flash/main.py": content };
      expect(world.tree()).toMatchObject(asTree(edited));
      // What 1.0.0 consists of, what is new, twice, and the report.
      const asked = world.server.requests.filter(({ path }) => path === "/manifest.json");
      expect(asked.map(({ method }) => method)).toEqual(["GET", "GET", "GET", "HEAD"]);
      expect(world.server.requests.map(({ status }) => status)).toContain(503);
    });
  }

  test("while the release is withdrawn on the server: it stays as it is", async () => {
    await using world = await World.with(BOTH, { device: V1 });
    const unlucky = new Unlucky(world.url, { root: world.root, ver: "1.0.0" });
    unlucky.edit = () => fs.rmSync(world.at("releases/1.0.1"), { recursive: true });
    const outcome = await unlucky.update().catch((thrown: unknown) => thrown);
    if (outcome instanceof Error) expect(String(outcome)).toContain("1.0.1");
    else expect(outcome).toMatchObject({ result: "up to date", to: "1.0.0" });
    expect(world.tree()).toEqual(asTree(V1));
  });

  test("cut off after the last byte of coded content: the next try goes on from there", async () => {
    await using world = new World(BOTH);
    const long = "print('the same line again')\n".repeat(500);
    world.release("1.0.1", { "flash/main.py": long });
    layTree(world.root, V1);
    const server = await world.serve();
    const options = { root: world.root, ver: "1.0.0" };
    /** A way on which the end of the first answer with content never comes. */
    class Cut extends HttpOTA {
      protected override readonly isBrief = false;
      readonly power = new AbortController();

      override async getData(path: string, want: TransferRequest): Promise<TransferResponse> {
        const data = await super.getData(path, want);
        if (!path.includes("main.py")) return data;
        expect(data.encoding).not.toBe("identity");
        const bytes = await new Response(data.body).bytes();
        const pull = async (controller: ReadableStreamDefaultController<Uint8Array>) => {
          controller.enqueue(bytes);
          // All of it is on the disk now; then the power goes.
          await Bun.sleep(50);
          this.power.abort(new Error("the power went"));
        };
        return { ...data, body: new ReadableStream({ pull }, { highWaterMark: 0 }) };
      }
    }
    const power = new AbortController();
    const cut = new Cut(server.url, { ...options, signal: power.signal });
    cut.power.signal.addEventListener("abort", () => power.abort(cut.power.signal.reason));
    expect(String(await cut.update().catch((error: unknown) => error))).toContain("power");
    expect(world.tree()).toEqual(asTree(V1));
    expect((await new HttpOTA(server.url, options).update()).result).toBe("updated");
    expect(world.tree()).toMatchObject(asTree({ ...V2, "flash/main.py": long }));
  });
});
