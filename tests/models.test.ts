/**
 * Several models in one root: a directory that holds versions or images is the root of a model, with
 * all rules of a root on its own. Real directories and sockets, the real client, the double of a
 * board. Set SEED to repeat a run.
 */

import { describe, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import * as fs from "node:fs";
import { makeKeys, parseManifest, Releases, type Manifest, type ReleasesOptions } from "../ota.ts";
import { boardUpdate } from "./helpers/board.ts";
import { program, sha256 } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import { asTree, bytesOf, filesBelow, Temp, type Tree } from "./helpers/temp.ts";
import { run, Serving, until } from "./helpers/tool.ts";
import { Served, World, type WorldOptions } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SEED = seeded("models");

const main = (text: string): Tree => ({ "flash/main.py": `print('${text}')\n` });
const IMAGE = program(3000, 1);
const NEWER = program(3000, 2);

/** Versions of the root itself, and of two models. */
const RELEASES: Record<string, Tree> = {
  "1.0.0": main("root 1.0.0"),
  "1.0.1": main("root 1.0.1"),
  "lopy4/1.0.0": main("lopy4 1.0.0"),
  "lopy4/1.0.2": main("lopy4 1.0.2"),
  "FiPy/3.0": main("fipy 3.0"),
};
const BESIDE: Tree = { "lopy4/firmware_1.0.2.bin": IMAGE, "lopy4/readme.txt": "for the LoPy4\n" };

const served = (options: WorldOptions = {}): Promise<World> =>
  World.with(RELEASES, { beside: BESIDE, ...options });

const open = (root: string, options: ReleasesOptions = {}): Promise<Releases> =>
  Releases.open(root, { quiet: 0, ...options });

/** What is offered in each root: model → names. */
const found = ({ roots }: Releases): Record<string, string[]> =>
  Object.fromEntries(roots.map(({ model, versions }) => [model, versions.map(({ name }) => name)]));

/** The reasons for which entries of a root are ignored. */
const ignored = (releases: Releases): Record<string, string> =>
  Object.fromEntries(releases.ignored.map(({ path, reason }) => [path, reason]));

async function manifest(server: { url: string }, target: string): Promise<Manifest | null> {
  const response = await fetch(server.url + target);
  expect([target, response.status]).toEqual([target, 200]);
  return parseManifest(await response.bytes());
}

async function statusOf(server: { url: string }, path: string): Promise<number> {
  const response = await fetch(server.url + path);
  await response.bytes();
  return response.status;
}

describe("a model", () => {
  test("is a directory below the root that is no version and holds versions or images", async () => {
    using temp = new Temp({
      "1.0.0/flash/main.py": "",
      "lopy4/1.0.1/flash/main.py": "",
      "FiPy/firmware_2.0.bin": "",
      "with space/V3/x": "",
      "\u00e9\u{1f680}/1/x": "",
      "lopy4.old/0.9/x": "",
      "notes/1.0.0/x": "",
      "empty/": "",
      "texts/a.txt": "",
      "texts/1.0.0": "a file, no version",
      "images/firmware_1.0.0.bin/x": "a directory, no image",
      "aside/1.0.1.bak/x": "",
      "deep/lopy4/1.0.0/x": "",
      "1.0.1.bak/2.0/x": "",
      "-/1.0.0/x": "",
      ".hidden/1.0.0/x": "",
    });
    const releases = await open(temp.path);
    expect(found(releases)).toEqual({
      "": ["1.0.0"],
      FiPy: [],
      lopy4: ["1.0.1"],
      "lopy4.old": ["0.9"],
      notes: ["1.0.0"],
      "with space": ["V3"],
      "\u00e9\u{1f680}": ["1"],
    });
    expect(releases.forDevice({ model: "fipy" }).firmware.map(({ name }) => name)).toEqual(["2.0"]);
    const reasons = ignored(releases);
    for (const name of ["empty", "texts", "images", "aside", "deep"]) {
      expect(reasons[name]).toEndWith("; no model: it holds neither versions nor images");
    }
    for (const name of ["1.0.1.bak", "-"]) expect(reasons[name]).toStartWith("no version: a name");
    expect(reasons[".hidden"]).toBe("its name begins with a dot");
    expect(Object.keys(reasons)).toHaveLength(8);
  });

  test("does not nest: in a model, such a directory is as it was", async () => {
    await using server = await served({ beside: { ...BESIDE, "lopy4/sub/9.9/x": "x" } });
    const releases = await open(server.releases);
    expect(Object.keys(found(releases))).toEqual(["", "FiPy", "lopy4"]);
    const { ignored } = releases.forDevice({ model: "lopy4" });
    expect(ignored.map(({ path }) => path)).toEqual(["readme.txt", "sub"]);
    expect(await statusOf(server, "/lopy4/sub/9.9/x")).toBe(200);
    expect(await statusOf(server, "/lopy4/sub/manifest.json")).toBe(404);
  });

  test("of two names that differ by case, the first counts, and nothing of the other", async () => {
    await using server = await World.with({ "LoPy4/1.0": main("a"), "lopy4/2.0": main("b") });
    server.link("releases/way", "lopy4/2.0/flash/main.py");
    const releases = await open(server.releases);
    expect(found(releases)).toEqual({ "": [], LoPy4: ["1.0"] });
    expect(ignored(releases)["lopy4"]).toBe("the same model as LoPy4, which counts");
    await server.serve();
    const paths = ["/LoPy4/1.0/flash/main.py", "/lopy4/2.0/flash/main.py", "/way"];
    paths.push("/LoPy4/manifest.json", "/lopy4/manifest.json");
    const statuses = await Promise.all(paths.map((path) => statusOf(server, path)));
    expect(statuses).toEqual([200, 404, 404, 200, 404]);
    expect((await manifest(server, "/manifest.json?model=LOPY4"))?.version).toBe("1.0");
  });

  test("may be a link below the root, to a dot entry, too; not out of it, nor into a version", async () => {
    using temp = new Temp({
      "root/.builds/3/2.0/flash/main.py": "new\n",
      "root/1.0.0/flash/7/x": "",
      "root/fipy/1.0/x": "old\n",
      "outside/1.0/x": "",
    });
    temp.link("root/lopy4", ".builds/3");
    temp.link("root/wipy", "fipy");
    temp.link("root/away", "../outside");
    temp.link("root/inner", "1.0.0/flash");
    temp.link("root/self", ".");
    temp.link("root/current", "fipy/1.0");
    temp.link("root/fipy/1.0.bak", "1.0");
    const releases = await open(temp.at("root"));
    expect(found(releases)).toEqual({
      "": ["1.0.0"],
      fipy: ["1.0"],
      lopy4: ["2.0"],
      wipy: ["1.0"],
    });
    const reasons = ignored(releases);
    expect(reasons["away"]).toBe("a link that leaves the root");
    expect(reasons["self"]).toBe("a link that leaves the root");
    expect(reasons["inner"]).toBe("a link into a version");
    // By whatever link, what is served is what the model offers.
    const file = releases.locate("/fipy/1.0/x");
    expect(file?.sha256).toBe(sha256("old\n"));
    expect(releases.locate("/current/x")).toBe(file!);
    expect(releases.locate("/wipy/1.0/x")?.sha256).toBe(sha256("old\n"));
    expect(releases.locate("/lopy4/2.0/flash/main.py")?.sha256).toBe(sha256("new\n"));
    const held = await open(temp.at("root"), { latest: "0.9" });
    for (const path of ["fipy/1.0/x", "wipy/1.0/x", "current/x", "lopy4/2.0/flash/main.py"]) {
      expect([path, held.locate(`/${path}`)]).toEqual([path, undefined]);
    }
  });
});

describe("who gets which root", () => {
  test("by the path, else by model=, else by sysname=, in any case; else the root's own", async () => {
    await using server = await served();
    const version = async (target: string) => (await manifest(server, target))?.version;
    for (const [target, expected] of [
      ["/manifest.json", "1.0.1"],
      ["/manifest.json?model=", "1.0.1"],
      ["/manifest.json?model=esp32&sysname=esp32", "1.0.1"],
      ["/manifest.json?model=lopy4", "1.0.2"],
      ["/manifest.json?model=LOPY4", "1.0.2"],
      ["/manifest.json?model=lo%70y4", "1.0.2"],
      ["/manifest.json?sysname=LoPy4", "1.0.2"],
      ["/manifest.json?sysname=fipy", "3.0"],
      ["/manifest.json?model=fipy&sysname=LoPy4", "3.0"],
      ["/manifest.json?sysname=LoPy4&model=fipy", "3.0"],
      // No such model, but the other one is here.
      ["/manifest.json?model=meter&sysname=LoPy4", "1.0.2"],
      ["/manifest.json?model=lopy4/1.0.2", "1.0.1"],
      ["/manifest.json?model=..", "1.0.1"],
      ["/lopy4/manifest.json", "1.0.2"],
      ["/lopy4/manifest.json?model=fipy&sysname=fipy", "1.0.2"],
      ["/FiPy/manifest.json", "3.0"],
    ] as const) {
      expect([target, await version(target)]).toEqual([target, expected]);
    }
    // A path is a path: letters count.
    for (const path of ["/fipy/manifest.json", "/esp32/manifest.json", "/1.0.0/manifest.json"]) {
      expect(await statusOf(server, path)).toBe(404);
    }
  });

  test("a device of a model never gets others' versions, even if its model offers nothing", async () => {
    await using server = await served({ latest: "1.0.1" });
    expect(await manifest(server, "/manifest.json?model=fipy")).toBeNull();
    expect(await manifest(server, "/manifest.json?model=fipy&current_ver=1.0.0")).toBeNull();
    expect((await manifest(server, "/manifest.json?model=lopy4"))?.version).toBe("1.0.0");
  });

  test("URLs lead below the model's path, with --url and a token, too", async () => {
    await using server = await served();
    const urls = (given: Manifest | null) => [
      ...given!.new.map(({ URL }) => URL),
      given!.firmware?.URL,
    ];
    const below = (base: string) => [
      `${base}/lopy4/1.0.2/flash/main.py`,
      `${base}/lopy4/firmware_1.0.2.bin`,
    ];
    const asked = ["/manifest.json?model=lopy4", "/lopy4/manifest.json"];
    for (const target of asked) {
      expect(urls(await manifest(server, target))).toEqual(below(server.url));
    }
    await server.serve({ url: "https://cdn.test/fleet/" });
    for (const target of [...asked, "/fleet/lopy4/manifest.json"]) {
      expect(urls(await manifest(server, target))).toEqual(below("https://cdn.test/fleet"));
    }
    expect(await statusOf(server, "/fleet/lopy4/1.0.2/flash/main.py")).toBe(200);
    await server.serve({ token: "t" });
    const found = urls(await manifest(server, "/manifest.json?sysname=lopy4&token=t"));
    expect(found).toEqual(below(server.url).map((url) => `${url}?token=t`));
    expect(await statusOf(server, "/lopy4/manifest.json")).toBe(401);
    expect(await statusOf(server, "/lopy4/1.0.2/flash/main.py")).toBe(401);
  });

  test("a brief manifest leaves URLs out where they follow from the address that was asked", async () => {
    const large = program(20_000, 3);
    const V1: Tree = { "flash/a.bin": large };
    await using server = await World.with({ "lopy4/1.0": V1, "a b/1.0": V1 });
    const text = async (target: string) => {
      const response = await fetch(`${server.url}${target}`);
      return (await response.json()) as { new: { URL?: string }[] };
    };
    expect((await text("/lopy4/manifest.json?brief=1")).new[0]!.URL).toBeUndefined();
    const named = await text("/manifest.json?brief=1&model=lopy4");
    expect(named.new[0]!.URL).toBe(`${server.url}/lopy4/1.0/flash/a.bin`);
    const spaced = await text("/manifest.json?brief=1&model=a%20b");
    expect(spaced.new[0]!.URL).toBe(`${server.url}/a%20b/1.0/flash/a.bin`);
  });
});

// ── As a root of its own ──

/** Random releases in a root and in models, and all that is asked of them. */
class Models {
  static readonly NAMES = ["lopy4", "Fi Py", "\u00e9", "notes"];
  readonly temp = new Temp();
  readonly root = this.temp.at("root");

  constructor(readonly random: Random) {
    for (const model of ["", ...Models.NAMES]) this.#fill(model);
  }

  /** Adds some of what may be in a root. */
  #fill(model: string): void {
    const { random } = this;
    const at = (path: string) => `root/${model === "" ? "" : `${model}/`}${path}`;
    const line = () => `${"the same line again\n".repeat(random.below(40))}${random.next()}\n`;
    const versions = random.some(["1.0.0", "1.00.0", "1.0.1", "v1", "2.0rc1", "1.0.2.bak"], 4);
    for (const version of versions) {
      const paths = ["flash/main.py", "flash/b c.py", "sd/\u00fc", "flash/OTA_VERSION.py", "x.md"];
      for (const path of random.some(paths, 1 + random.below(5))) {
        this.temp.write({ [at(`${version}/${path}`)]: line() });
      }
    }
    const images = ["firmware_1.0.1.bin", "firmare_1.0.2.bin", "firmware_9.bin", "firmware_x.bin"];
    for (const image of random.some(images, random.below(4))) {
      this.temp.write({ [at(image)]: program(2000 + random.below(500), random.below(99)) });
    }
    // Not what would be a model in a root, and is none in a model.
    const others = ["readme.txt", "sub/notes", ".hidden", "sub/deep/x", "1.0.1.old/x"];
    for (const other of random.some(others, random.below(5))) {
      this.temp.write({ [at(other)]: line() });
    }
    if (random.chance(0.5)) this.temp.link(at("1.0.7"), "sub");
    if (random.chance(0.5)) this.temp.link(at("1.0.8"), "../1.0.0");
    if (random.chance(0.5)) this.temp.link(at("way"), "1.0.1/flash/main.py");
  }

  query(hashes: readonly string[]): string {
    const { random } = this;
    const some: Record<string, readonly string[]> = {
      current_ver: ["", "1.0.0", "1.00.0", "1.0.1", "v1", "9", "x"],
      firmware_ver: ["", "1.0.0", "1.0.1", "8"],
      firmware_sha256: hashes,
      base: hashes,
      hash: ["sha256"],
      list: ["1.0.0", "7"],
      reqid: ["r1"],
      failed: ["1.0.1"],
    };
    return Object.entries(some)
      .filter(([name]) => random.chance(name === "list" ? 0.1 : 0.5))
      .map(([name, values]) => `${name}=${encodeURIComponent(random.pick(values))}`)
      .join("&");
  }
}

describe("all rules of a root hold in a model on its own", () => {
  const optionsOf = (random: Random): ReleasesOptions => ({
    ...(random.chance(0.5) && { latest: random.pick(["1.0.0", "1.0.1", "2"]) }),
    ...(random.chance(0.5) && { ignore: ["*.md"] }),
    ...(random.chance(0.3) && { onlyReleases: true }),
  });

  for (let round = 0; round < 8; round++) {
    test(`it answers as a server with that root alone would: round ${round}`, async () => {
      const random = new Random(SEED + round);
      const models = new Models(random);
      using _ = models.temp;
      const options = optionsOf(random);
      await using together = await Served.start(models.root, options);
      const hashes = [...filesBelow(models.root).values()].map((content) => sha256(content));
      for (const name of Models.NAMES) {
        const directory = `${models.root}/${name}`;
        await using alone = await Served.start(directory, options);
        const path = `/${encodeURIComponent(name)}`;
        const get = async (
          server: Served,
          target: string,
          headers: Record<string, string> = {},
        ) => {
          const response = await fetch(server.url + target, { headers, decompress: false });
          const tag = [response.headers.get("etag"), response.headers.get("content-encoding")];
          return { status: response.status, tag, body: await response.bytes() };
        };
        const textOf = async (server: Served, target: string) => {
          return Buffer.from((await get(server, target)).body).toString();
        };
        const moved = (text: string) => text.replaceAll(`${together.url}${path}/`, `${alone.url}/`);
        for (let times = 0; times < 25; times++) {
          const query = models.query(hashes);
          const expected = await textOf(alone, `/manifest.json?${query}`);
          const by = random.pick(["model", "sysname"]);
          const named = `${by}=${encodeURIComponent(name.toUpperCase())}`;
          for (const target of [
            `${path}/manifest.json?${query}`,
            `/manifest.json?${query}&${named}`,
          ]) {
            const found = await textOf(together, target);
            expect([target, moved(found)]).toEqual([target, expected]);
          }
          const brief = await textOf(alone, `/manifest.json?brief=1&${query}`);
          const found = await textOf(together, `${path}/manifest.json?brief=1&${query}`);
          expect([query, moved(found)]).toEqual([query, brief]);
        }
        const paths = fs.readdirSync(directory, { recursive: true, encoding: "utf8" });
        for (const file of [...paths, "none", "1.0.8/flash/main.py", "1.0.7/notes"]) {
          const target = `/${file.split("/").map(encodeURIComponent).join("/")}`;
          const dictionary = Buffer.from(random.pick(hashes), "hex").toString("base64");
          const cases: Record<string, string>[] = [
            {},
            { Range: "bytes=3-9" },
            { "Accept-Encoding": "dcz, gzip", "Available-Dictionary": `:${dictionary}:` },
          ];
          for (const headers of cases) {
            const found = await get(together, path + target, headers);
            expect([target, found]).toEqual([target, await get(alone, target, headers)]);
          }
        }
      }
    });
  }

  test("what comes from memory is what a fresh start would say, through any history", async () => {
    const random = new Random(SEED);
    const models = new Models(random);
    using temp = models.temp;
    const options = { ...optionsOf(random), quiet: 0 };
    const lasting = await Releases.open(models.root, options);
    let size = 0;
    const change = () => {
      const dir = () => temp.at("root", random.pick(["", ...Models.NAMES, "lopy4", "LoPy4"]));
      const item = random.pick(["1.0.0", "1.0.1", "1.0.3", "sub/1.0", "firmware_1.0.1.bin", ""]);
      const [path, other] = [`${dir()}/${item}`, `${dir()}/${item}`];
      const isTop = fs.existsSync(path) && fs.realpathSync(path) === fs.realpathSync(models.root);
      const write = () => {
        const file = item.endsWith(".bin") ? path : `${path}/flash/main.py`;
        fs.mkdirSync(file.slice(0, file.lastIndexOf("/")), { recursive: true });
        fs.writeFileSync(file, "x".repeat(++size));
      };
      const remove = () => isTop || fs.rmSync(path, { recursive: true, force: true });
      const move = () => {
        if (!isTop && fs.existsSync(path) && !fs.existsSync(other)) fs.renameSync(path, other);
      };
      try {
        random.pick([write, write, remove, move])();
      } catch (error) {
        // Into itself, or below what is a file.
        if (!/EINVAL|ENOTDIR|EEXIST|ENOENT|EISDIR/.test(String(error))) throw error;
      }
    };
    const seen = new Set<string>();
    for (let round = 0; round < 80; round++) {
      for (let times = random.below(4); times >= 0; times--) change();
      await lasting.scan();
      const fresh = await Releases.open(models.root, options);
      const state = JSON.stringify(found(fresh));
      expect([round, JSON.stringify(found(lasting))]).toEqual([round, state]);
      expect(lasting.ignored).toEqual(fresh.ignored);
      expect(lasting.unsettled).toEqual([]);
      seen.add(state);
      const files = fs.readdirSync(models.root, { recursive: true, encoding: "utf8" });
      for (const file of files) {
        const target = `/${file.split("/").map(encodeURIComponent).join("/")}`;
        const [a, b] = [lasting, fresh].map((one) => one.locate(target)?.etag);
        expect([round, file, a]).toEqual([round, file, b]);
      }
      for (const name of ["", ...Models.NAMES, "LOPY4"]) {
        const query = { model: name, current_ver: random.pick(["", "1.0.0", "1.0.1"]) };
        const [a, b] = [lasting, fresh].map((one) => one.manifestJSON(query, "http://h"));
        expect([round, name, a]).toEqual([round, name, b]);
      }
    }
    expect(seen.size).toBeGreaterThan(10);
  });

  test("signed releases: each directory that has signatures offers only what is signed", async () => {
    await using server = new World(RELEASES, { beside: BESIDE, device: RELEASES["lopy4/1.0.0"] });
    const { key, pub } = makeKeys();
    server.write({ "home.key": key, "home.pub": pub });
    const lopy4 = `${server.releases}/lopy4`;
    const sign = (root: string, args: string[] = []) =>
      run(["sign", "--root", root, "--key", server.at("home.key"), ...args]);
    const own = await sign(server.releases);
    expect(own.stdout).toBe(
      "signed 1.0.0: 3 steps, 1 signature\nsigned 1.0.1: 4 steps, 1 signature\n",
    );
    expect(own.stderr).toBe(
      `models are signed by themselves (--root ${server.releases}/NAME --model NAME): FiPy, lopy4\n`,
    );
    expect(fs.readdirSync(lopy4).filter((name) => name.startsWith("signed"))).toEqual([]);
    expect((await sign(lopy4, ["--model", "lopy4"])).stderr).toBe("");
    expect((await run(["sign", "--root", lopy4, "--check", server.at("home.pub")])).code).toBe(0);

    server.release("lopy4/1.0.3", main("not signed"));
    server.release("1.0.3", main("not signed"));
    await server.serve();
    const version = async (model: string) => {
      return (await manifest(server, `/manifest.json?model=${model}`))?.version;
    };
    expect([await version("lopy4"), await version("none"), await version("fipy")]).toEqual([
      "1.0.2",
      "1.0.1",
      "3.0",
    ]);
    expect(await statusOf(server, "/lopy4/1.0.3/flash/main.py")).toBe(404);
    const verify = ["--verify", server.at("home.pub"), "--model", "lopy4"];
    const { code, last } = await server.client(["--ver", "1.0.0", ...verify]);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.2 (firmware 0 -> 1.0.2)"]);
    // A model without signatures offers all; who verifies refuses it.
    const fipy = await server.client(["--verify", server.at("home.pub"), "--model", "fipy"]);
    expect([fipy.code, fipy.stderr]).toEqual([1, expect.stringContaining("it is not signed")]);
  });

  test("of what links reach, what leaves the model's directory is left out", async () => {
    using temp = new Temp({ "lopy4/1.0/a": "", "shared/b": "", "out/c": "" });
    temp.link("lopy4/1.0/b", "../../shared/b");
    temp.link("lopy4/1.0/inside", "a");
    temp.link("lopy4/2.0", "../fipy/2.0");
    const { ignored, versions } = (await open(temp.path)).forDevice({ model: "lopy4" });
    expect(ignored).toEqual([
      { path: "1.0/b", reason: "a link that leaves the root" },
      { path: "2.0", reason: "a broken link" },
    ]);
    expect([...versions[0]!.files.keys()]).toEqual(["a", "inside"]);
  });

  test("keys are not served, wherever they lie", async () => {
    await using server = await served();
    const { key } = makeKeys();
    server.write({ "releases/lopy4/my.key": key, "releases/lopy4/.env": "", "tls.key": key });
    expect(await statusOf(server, "/lopy4/my.key")).toBe(404);
    expect(await statusOf(server, "/lopy4/.env")).toBe(404);
    expect(await statusOf(server, "/lopy4/-/health")).toBe(404);
    expect(await statusOf(server, "/lopy4/readme.txt")).toBe(200);
    server.write({ "releases/lopy4/1.0.2/server.key": key });
    const inside = server.at("releases/lopy4/1.0.2/server.key");
    const refused = Served.start(server.releases, { sign: inside });
    expect(refused).rejects.toThrow("lies in the root");
    await refused.catch(() => {});
    // Of a version it is no content, if it is the key of this server by another name.
    fs.linkSync(inside, server.at("own.key"));
    await server.serve({ sign: server.at("own.key") });
    expect(await statusOf(server, "/lopy4/1.0.2/server.key")).toBe(404);
  });
});

// ── While it is served ──

describe("while it is served", () => {
  const SOON = 30;
  const version = async (server: { url: string }, model: string) =>
    (await manifest(server, `/manifest.json?model=${model}`))?.version ?? "none";
  const becomes = (server: { url: string }, model: string, expected: string) =>
    until(
      `${model} is on ${expected}`,
      () => version(server, model),
      (one) => one === expected,
      SOON,
    );

  test("a model comes, changes, and goes; and then its devices get the root's own", async () => {
    await using server = await served({ quiet: 0.2 });
    expect(await version(server, "esp32")).toBe("1.0.1");
    server.release("esp32/5.0", main("esp32"));
    await becomes(server, "esp32", "5.0");
    server.release("esp32/5.1", main("esp32, new"));
    await becomes(server, "esp32", "5.1");
    server.write({ "releases/esp32/firmware_6.bin": NEWER });
    await until(
      "there is firmware",
      () => manifest(server, "/esp32/manifest.json"),
      (one) => one?.firmware !== undefined,
      SOON,
    );
    server.remove("releases/esp32");
    await becomes(server, "esp32", "1.0.1");
    expect(await statusOf(server, "/esp32/manifest.json")).toBe(404);
  });

  test("a rename publishes a whole model, and a version in it, at once or not at all", async () => {
    await using server = await served({ quiet: 0.2 });
    const many = Object.fromEntries(
      Array.from({ length: 200 }, (_, i) => [`flash/${i}.py`, `${i}`]),
    );
    server.release(".esp32/5.0", many);
    server.release("lopy4/.2.0", many);
    expect(await statusOf(server, "/lopy4/.2.0/flash/1.py")).toBe(404);
    fs.renameSync(server.at("releases/.esp32"), server.at("releases/esp32"));
    fs.renameSync(server.at("releases/lopy4/.2.0"), server.at("releases/lopy4/2.0"));
    const counts = new Set<number>();
    for (const model of ["esp32", "lopy4"]) {
      await until(
        `${model} is there`,
        async () => {
          const found = await manifest(server, `/manifest.json?model=${model}`);
          counts.add(found?.new.length ?? 0);
          return found?.new.length;
        },
        (count) => count === 200,
        SOON,
      );
    }
    // Before: one file each, of the root and of lopy4; nothing while the new model settles.
    expect([...counts].filter((count) => ![0, 1, 200].includes(count))).toEqual([]);
  });

  test("exchanged by two renames: its devices never get the root's own versions", async () => {
    using temp = new Temp({ "1.0/x": "", "lopy4/1.0/a": "", ".new/2.0/a": "" });
    const releases = await Releases.open(temp.path, { quiet: 0.5 });
    const newest = () => {
      const root = releases.forDevice({ model: "lopy4" });
      return [root.model, ...root.versions.map(({ name }) => name)];
    };
    fs.renameSync(temp.at("lopy4"), temp.at(".old"));
    expect(await releases.scan()).toBe(false);
    expect(releases.unsettled).toEqual(["lopy4"]);
    expect(releases.nextScan).toBeLessThan(1000);
    expect(newest()).toEqual(["lopy4", "1.0"]);
    // Its content is not there: the answer is to ask again, as while a version is exchanged.
    expect(releases.locate("/lopy4/1.0/a")).toBeDefined();
    fs.renameSync(temp.at(".new"), temp.at("lopy4"));
    await until(
      "the new one is there",
      () => releases.scan().then(newest),
      (found) => found.join() === "lopy4,2.0",
    );
    // And one that is gone for good.
    temp.remove("lopy4/2.0");
    await releases.scan();
    expect(newest()).toEqual(["lopy4", "2.0"]);
    await until(
      "it is gone",
      () => releases.scan().then(newest),
      (found) => found.join() === ",1.0",
    );
    expect(releases.unsettled).toEqual([]);
    expect(releases.nextScan).toBe(Infinity);
  });

  test("one that cannot be read just now stays as it was, and the others are read", async () => {
    using temp = new Temp({ "1.0/x": "", "fipy/1.0/a": "", "lopy4/1.0/a": "" });
    const releases = await open(temp.path);
    const { readdir } = fs.promises;
    const failing = async (path: string, ...more: unknown[]) => {
      if (path.endsWith("/lopy4")) throw Object.assign(new Error("EIO: bad disk"), { code: "EIO" });
      return (readdir as (...args: unknown[]) => Promise<unknown>)(path, ...more);
    };
    temp.write({ "fipy/2.0/a": "", "lopy4/2.0/a": "" });
    const before = { "": ["1.0"], fipy: ["1.0"], lopy4: ["1.0"] };
    expect(found(releases)).toEqual(before);
    const spy = spyOn(fs.promises, "readdir").mockImplementation(failing as typeof readdir);
    try {
      await releases.scan();
      expect(found(releases)).toEqual({ ...before, fipy: ["1.0", "2.0"] });
      // Who starts now cannot know that it is one.
      const fresh = await open(temp.path);
      expect(Object.keys(found(fresh))).toEqual(["", "fipy"]);
      expect(ignored(fresh)["lopy4"]).toBe("unreadable: EIO: bad disk");
    } finally {
      spy.mockRestore();
    }
    await releases.scan();
    expect(found(releases)["lopy4"]).toEqual(["1.0", "2.0"]);
  });

  test("a link to a model that is switched", async () => {
    await using server = await World.with(
      { ".builds/1/1.0": main("one"), ".builds/2/2.0": main("two") },
      { quiet: 0.2 },
    );
    server.link("releases/lopy4", ".builds/1");
    await becomes(server, "lopy4", "1.0");
    server.link("releases/.next", ".builds/2");
    fs.renameSync(server.at("releases/.next"), server.at("releases/lopy4"));
    await becomes(server, "lopy4", "2.0");
  });

  test("what was altered after it was offered is counted and told, by model", async () => {
    const warnings: string[] = [];
    const warn = (line: string) => void warnings.push(line);
    await using server = await served({ warn });
    server.release("lopy4/1.0.2", { "flash/main.py": "print('edited')\n" });
    const counted = async () => {
      const text = await (await fetch(`${server.url}/-/metrics`)).text();
      return /^ota_changed_total (\d+)$/m.exec(text)?.[1];
    };
    await until("it is counted", counted, (count) => count === "1", SOON);
    expect(warnings.join("\n")).toStartWith("lopy4/1.0.2 changed after it was offered");
  });
});

// ── Devices ──

describe("devices", () => {
  const V1 = RELEASES["lopy4/1.0.0"]!;
  const AFTER = asTree({
    ...RELEASES["lopy4/1.0.2"],
    "flash/OTA_VERSION.py": "VERSION = '1.0.2'\n",
  });

  test("client --model, with a list of what it has; and --server with the model's path", async () => {
    for (const how of ["--model", "--server"]) {
      await using server = await served({ device: V1 });
      const from = how === "--server" ? { url: `${server.url}/lopy4` } : server;
      const args = how === "--model" ? ["--model", "LoPy4"] : [];
      const { code, last, stderr } = await server.client(["--ver", "1.0.0", ...args], from);
      expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.2 (firmware 0 -> 1.0.2)"]);
      expect(stderr).not.toContain("missing here or have other content");
      expect(server.tree()).toEqual(AFTER);
      const again = await server.client(args, from);
      expect([again.code, again.last]).toEqual([0, "up to date 1.0.2"]);
      // Firmware is too large to come inside the manifest.
      expect(server.sent).toContain("/lopy4/firmware_1.0.2.bin");
    }
  });

  test("client --from: a stick with several models", async () => {
    await using world = new World(RELEASES, { beside: BESIDE, device: V1 });
    const args = ["client", "--root", world.root, "--from", world.releases, "--ver", "1.0.0"];
    const { code, last } = await run([...args, "--model", "lopy4"]);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.2 (firmware 0 -> 1.0.2)"]);
    expect(world.tree()).toEqual(AFTER);
  });

  test("content is coded with what the device has in its model's root", async () => {
    const old = program(30_000, 5);
    const edited = Buffer.concat([old, Buffer.from("more")]);
    await using server = await World.with({
      "1.0": { a: "x" },
      "lopy4/1.0": { "flash/app.mpy": old },
      "lopy4/2.0": { "flash/app.mpy": edited },
    });
    const dictionary = Buffer.from(sha256(old), "hex").toString("base64");
    const headers = { "Accept-Encoding": "dcz", "Available-Dictionary": `:${dictionary}:` };
    const response = await fetch(`${server.url}/lopy4/2.0/flash/app.mpy`, {
      headers,
      decompress: false,
    });
    expect(response.headers.get("content-encoding")).toBe("dcz");
    expect((await response.bytes()).byteLength).toBeLessThan(200);
  });

  test("a board with Pycom's library gets its model's versions by its sysname", async () => {
    await using server = await served();
    const files = new Map(Object.entries(V1).map(([path, text]) => [path, bytesOf(text)] as const));
    const more = "&devid=240ac400c8fe&wmac=240AC400C8FE&sysname=LoPy4&token=&fwtype=pycom";
    const after = await boardUpdate(server.url, "1.0.0", files, more);
    expect([after.version, after.firmware]).toEqual(["1.0.2", bytesOf(IMAGE)]);
    expect(after.files.get("flash/main.py")).toEqual(bytesOf("print('lopy4 1.0.2')\n"));
    const other = await boardUpdate(server.url, "1.0.0", files, "&sysname=WiPy");
    expect(other.files.get("flash/main.py")).toEqual(bytesOf("print('root 1.0.1')\n"));
  });
});

// ── What people see ──

describe("what people see", () => {
  const TREE: Tree = {
    "lopy4/1.0.0/flash/main.py": "one\n",
    "lopy4/1.0.1rc1/flash/new/main.py": "two\n",
    "lopy4/firmware_1.0.1.bin": IMAGE,
    "lopy4/plan.txt": "plan\n",
    "a b/2.0/x": "x\n",
    "texts/notes.txt": "notes\n",
  };

  test("serve prints what it found for each, and warns of each", async () => {
    using temp = new Temp(TREE);
    await using tool = await Serving.start(["--root", temp.path, "--host", "127.0.0.1"]);
    const lines = tool.startup.trimEnd().split("\n").slice(1);
    expect(lines).toEqual([
      expect.stringMatching(/^ignored +texts: no version.*; no model: it holds neither/),
      `model    a\\u{20}b, at ${tool.url}/a%20b`,
      "version  2.0          1 files, 2 B",
      `model    lopy4, at ${tool.url}/lopy4`,
      "version  1.0.0        1 files, 4 B",
      "version  1.0.1rc1     1 files, 4 B",
      "firmware 1.0.1        firmware_1.0.1.bin, 3.0 KB",
      "ignored  plan.txt: neither a version nor a firmware_VERSION.bin",
      "also served: texts/ (1 file), lopy4/plan.txt",
      expect.stringMatching(/^fleet +http:\S+\/-\/\?token=[\w-]{32}$/),
      `try      curl '${tool.url}/a%20b/manifest.json?current_ver=2.0'`,
    ] as string[]);
    await tool.until(/boards with Pycom's library cannot/, "stderr");
    expect(tool.stderr).toContain("warning: model lopy4: 1.0.1rc1 sorts after 1.0.1: ");
    expect(tool.stderr).toContain("warning: model lopy4: from 1.0.0: 1.0.1rc1 adds the directory");
    expect(tool.stderr).not.toContain("no release in");
    temp.write({ "1.0.0/x": "", "lopy4/1.0.2/x": "" });
    await tool.until(/^now +1\.0\.0\n/m);
    await tool.until(/^now +model lopy4: 1\.0\.0 1\.0\.1rc1 1\.0\.2\n/m);
    temp.remove("a b");
    await tool.until(/^now +model a\\u\{20\}b: gone\n/m);
  });

  test("manifest --model, with warnings and --cost, is for devices of that model", async () => {
    using temp = new Temp({ ...TREE, "1.0.0/x": "", "2.0.0/y": "" });
    const args = ["manifest", "--root", temp.path, "--ver", "1.0.0"];
    const { stdout, stderr } = await run([...args, "--model", "LOPY4"]);
    const found = JSON.parse(stdout) as Manifest;
    expect(found.new.map(({ URL }) => URL)).toEqual([
      "http://127.0.0.1:8000/lopy4/1.0.1rc1/flash/new/main.py",
    ]);
    expect(stderr).toContain("warning: model lopy4: 1.0.1rc1 adds the directory flash/new");
    const cost = await run([...args, "--model", "lopy4", "--cost"]);
    expect(cost.stdout).toContain("flash/new/main.py");
    const own = JSON.parse((await run([...args, "--model", "none"])).stdout) as Manifest;
    expect(own.version).toBe("2.0.0");
  });

  test("the log names the model of who asks for a manifest", async () => {
    await using server = await served();
    await manifest(server, "/manifest.json?sysname=LoPy4&failed=1.0.2&devid=d1");
    await manifest(server, "/FiPy/manifest.json");
    await manifest(server, "/manifest.json?model=none");
    const ends = server.server.lines.map((line) => line.replace(/^.* GET/, "GET"));
    const time = String.raw`\d+\.\dms`;
    expect(ends).toEqual([
      expect.stringMatching(
        new RegExp(`^GET /manifest.json 200 \\d+ ${time}.* model=lopy4 failed=1.0.2$`),
      ),
      expect.stringMatching(new RegExp(`^GET /FiPy/manifest.json 200 \\d+ ${time}.* model=FiPy$`)),
      expect.stringMatching(new RegExp(`^GET /manifest.json 200 \\d+ ${time}(?!.*model)`)),
    ] as string[]);
  });

  test("metrics have a label for models, and no more lines than there are releases", async () => {
    const odd = 'a"\\b';
    await using server = await served({ beside: { ...BESIDE, [`${odd}/1.0/x`]: "" } });
    for (const target of [
      "/manifest.json?current_ver=1.0.0",
      "/manifest.json?current_ver=1.0.0&model=lopy4&failed=1.0.2",
      "/lopy4/manifest.json?current_ver=1.0.1&failed=1.0.1",
      "/manifest.json?model=strange&current_ver=7",
      `/manifest.json?model=${encodeURIComponent(odd)}`,
    ]) {
      await manifest(server, target);
    }
    const text = await (await fetch(`${server.url}/-/metrics`)).text();
    const lines = text.split("\n").filter((line) => /^ota_(rel|fir|man|fai)/.test(line));
    expect(lines).toEqual([
      "ota_releases 2",
      'ota_releases{model="a\\"\\\\b"} 1',
      'ota_releases{model="FiPy"} 1',
      'ota_releases{model="lopy4"} 2',
      "ota_firmware 0",
      'ota_firmware{model="a\\"\\\\b"} 0',
      'ota_firmware{model="FiPy"} 0',
      'ota_firmware{model="lopy4"} 1',
      'ota_manifests_total{from="1.0.0",to="1.0.1"} 1',
      'ota_manifests_total{from="1.0.0",to="1.0.2",model="lopy4"} 1',
      'ota_manifests_total{from="other",to="1.0.2",model="lopy4"} 1',
      'ota_manifests_total{from="other",to="none"} 1',
      'ota_manifests_total{from="none",to="1.0",model="a\\"\\\\b"} 1',
      'ota_failures_total{version="1.0.2",model="lopy4"} 1',
      'ota_failures_total{version="other",model="lopy4"} 1',
    ]);
  });

  test("healthy with a version in any model", async () => {
    await using server = await World.with({ "lopy4/1.0": main("m") });
    expect(await statusOf(server, "/-/health")).toBe(200);
    server.remove("releases/lopy4/1.0");
    const status = () => statusOf(server, "/-/health");
    await until("it is not well", status, (one) => one === 503, 30);
  });
});
