/**
 * What a release root holds and what a device gets from it, in real directories; and
 * `bun ota.ts manifest` as a process. Random trees follow the chosen ones: set SEED to repeat a run.
 */

import {
  afterEach,
  describe,
  expect,
  mock,
  setDefaultTimeout,
  setSystemTime,
  spyOn,
  test,
} from "bun:test";
import * as fs from "node:fs";
import { dirname } from "node:path";
import type { Manifest, ManifestQuery, ReleasesOptions } from "../ota.ts";
import {
  allBoardWarnings,
  boardWarnings,
  OTAError,
  parseManifest,
  parseQuery,
  Releases,
  releaseDigest,
  rootWarnings,
} from "../ota.ts";
import { sha1, sha256 } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import { bytesOf, filesBelow, Temp, type Tree } from "./helpers/temp.ts";
import { ota, run } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const SEED = seeded("releases");

const HOST = "http://10.0.0.1:8000";

const versionNames = (releases: Releases) => releases.versions.map(({ name }) => name);
const firmwareFiles = (releases: Releases) => releases.firmware.map(({ path }) => path);
const ignoredReason = (releases: Releases, path: string) =>
  releases.ignored.find((item) => item.path === path)?.reason;

/** The files of the highest version: its paths. */
const paths = (releases: Releases) => [...(releases.versions.at(-1)?.files.keys() ?? [])];

/** Reads a root of which nobody changes anything meanwhile. */
const open = (root: Temp, options: ReleasesOptions = {}): Promise<Releases> =>
  Releases.open(root.path, { quiet: 0, ...options });

async function manifestFor(root: Temp | Releases, query: ManifestQuery = {}): Promise<Manifest> {
  const releases = root instanceof Releases ? root : await open(root);
  const manifest = releases.manifestFor(query, HOST);
  if (manifest === null)
    throw new Error(`expected a manifest, found null for ${Bun.inspect(query)}`);
  return manifest;
}

/** A manifest in short: `+` new, `~` update, `-` delete, `!` firmware, then the version. */
async function brief(root: Temp | Releases, query: ManifestQuery = {}): Promise<string> {
  const releases = root instanceof Releases ? root : await open(root);
  const manifest = releases.manifestFor(query, HOST);
  if (manifest === null) return "null";
  return [
    ...manifest.new.map(({ dst_path }) => `+${dst_path}`),
    ...manifest.update.map(({ dst_path }) => `~${dst_path}`),
    ...manifest.delete.map((path) => `-${path}`),
    ...(manifest.firmware ? [`!${manifest.firmware.URL.slice(HOST.length + 1)}`] : []),
    ...(manifest.full ? ["full"] : []),
    manifest.version,
  ].join(" ");
}

/** Versions with a file each. */
const versions = (...names: string[]): Tree =>
  Object.fromEntries(names.map((name) => [`${name}/flash/main.py`, name]));

describe("what is a version", () => {
  test("a directory with the name of a release, in the order of versions", async () => {
    const names = ["1.0.10", "1.0.9", "0", "v2", "V3.0.0-rc_1+b", "1.0.9b", "10", "9"];
    using root = new Temp(versions(...names));
    expect(versionNames(await open(root))).toEqual(
      // Numbers before letters, upper case before lower case.
      ["0", "1.0.9", "1.0.9b", "1.0.10", "9", "10", "V3.0.0-rc_1+b", "v2"],
    );
  });

  test("not: any other directory, and the reason is told", async () => {
    const names = [
      "python3-venv",
      "latest",
      "vv1",
      "1.0 beta",
      "1.0.1~",
      "1@2",
      "-1",
      "releases-1",
    ];
    names.push("\u0661.0", "1.0.\u00e9", "x1.0", "_1");
    using root = new Temp(versions("1.0.0", ...names));
    const releases = await open(root);
    expect(versionNames(releases)).toEqual(["1.0.0"]);
    expect(releases.ignored.map(({ path }) => path).sort()).toEqual([...names].sort());
    for (const name of names) expect(ignoredReason(releases, name)).toContain("no version");
  });

  test("not: what a person or an editor keeps beside it, in any case", async () => {
    const names = ["bak", "old", "orig", "tmp", "part", "swp", "BAK", "Old", "tMp"].map(
      (ending) => `1.0.1.${ending}`,
    );
    using root = new Temp(versions("1.0.0", "1.0.1bak", ...names));
    const releases = await open(root);
    expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1bak"]);
    for (const name of names) expect(ignoredReason(releases, name)).toContain("no version");
  });

  test("not: a file, a dot entry, a name that is not UTF-8", async () => {
    using root = new Temp({
      "1.0.0": "a file",
      ".git/HEAD": "",
      ".env": "",
      "notes.txt": "",
    });
    fs.mkdirSync(Buffer.concat([Buffer.from(`${root.path}/2.0`), Buffer.of(0xff)]));
    const releases = await open(root);
    expect(versionNames(releases)).toEqual([]);
    expect(ignoredReason(releases, "1.0.0")).toContain("neither a version nor a firmware");
    expect(ignoredReason(releases, "notes.txt")).toContain("neither a version nor a firmware");
    expect(ignoredReason(releases, ".git")).toContain("dot");
    expect(ignoredReason(releases, ".env")).toContain("dot");
    expect(ignoredReason(releases, "2.0\ufffd")).toContain("not UTF-8");
  });

  test("of two equal names the first by code point counts", async () => {
    using root = new Temp(versions("1.0.0", "1.00.0", "1..0.0", "01.0.0"));
    const releases = await open(root);
    expect(versionNames(releases)).toEqual(["01.0.0"]);
    for (const name of ["1.0.0", "1.00.0", "1..0.0"]) {
      expect(ignoredReason(releases, name)).toBe("the same version as 01.0.0, which counts");
    }
    root.remove("01.0.0");
    expect(versionNames(await open(root))).toEqual(["1..0.0"]);
  });

  test("a name that is no number twice is none of these: 1.0 is not 1.0.0", async () => {
    using root = new Temp(versions("1.0.0", "1.0", "1"));
    expect(versionNames(await open(root))).toEqual(["1", "1.0", "1.0.0"]);
  });

  test("an empty directory, too: a release without files", async () => {
    using root = new Temp({ ...versions("1.0.0"), "1.0.1/": "" });
    expect(await brief(root, { current_ver: "1.0.0" })).toBe("-flash/main.py 1.0.1");
  });

  test("a missing root, and one that is a file, are usage errors that name it", async () => {
    using root = new Temp({ file: "" });
    for (const [path, why] of [
      ["missing", "does not exist"],
      ["file", "is not a directory"],
    ] as const) {
      try {
        await Releases.open(root.at(path));
        throw new Error("expected an OTAError");
      } catch (error) {
        expect(error).toBeInstanceOf(OTAError);
        expect(error).toHaveProperty("exitCode", 2);
        expect(error).toHaveProperty("message", expect.stringContaining(`${root.at(path)} ${why}`));
      }
    }
  });

  test("a root that is a link is the directory behind it", async () => {
    using root = new Temp(versions("real/1.0.0"));
    root.link("link", "real");
    const releases = await Releases.open(root.at("link"), { quiet: 0 });
    expect(versionNames(releases)).toEqual(["1.0.0"]);
    expect(releases.root).toBe(root.at("real"));
  });
});

describe("what is a firmware image", () => {
  test("a file firmware_VERSION.bin, and firmare_VERSION.bin with a warning", async () => {
    using root = new Temp({
      "firmware_1.0.1.bin": "\xe9one",
      "firmare_1.0.2.bin": "\xe9two",
      "firmware_v3-rc.1+x.bin": "\xe9three",
    });
    const releases = await open(root);
    expect(firmwareFiles(releases)).toEqual([
      "firmware_1.0.1.bin",
      "firmare_1.0.2.bin",
      "firmware_v3-rc.1+x.bin",
    ]);
    expect(releases.firmware.map(({ name }) => name)).toEqual(["1.0.1", "1.0.2", "v3-rc.1+x"]);
    const spelling = rootWarnings(releases).filter((line) => line.includes("firmare_"));
    expect(spelling).toEqual(["firmare_1.0.2.bin: spelled firmware_ elsewhere"]);
  });

  test("not: other names, other endings, directories", async () => {
    const names = ["firmware.bin", "firmware_.bin", "firmware_x.bin", "firmware_1.0.1.img"];
    names.push(
      "Firmware_1.bin",
      "firmware_1.bin.sig",
      "firmware_1.0.1.bak.bin",
      "firmware_1 2.bin",
    );
    names.push("xfirmware_1.bin", "firmware-1.bin", "appimg.bin", "firmware_1.BIN");
    using root = new Temp(Object.fromEntries(names.map((name) => [name, "\xe9"])));
    root.write({ "firmware_1.0.0.bin/x": "" });
    const releases = await open(root);
    expect(firmwareFiles(releases)).toEqual([]);
    for (const name of names) expect(ignoredReason(releases, name)).toContain("neither");
    expect(ignoredReason(releases, "firmware_1.0.0.bin")).toContain("no version");
  });

  test("of two with equal versions one counts, and the other is ignored with that reason", async () => {
    using root = new Temp({ "firmware_1.0.0.bin": "a", "firmware_1.00.0.bin": "b" });
    const releases = await open(root);
    expect(firmwareFiles(releases)).toEqual(["firmware_1.0.0.bin"]);
    expect(ignoredReason(releases, "firmware_1.00.0.bin")).toContain("the same version");
  });

  test("the highest one really is the highest, not the last one listed", async () => {
    using root = new Temp({
      "firmware_1.0.10.bin": "ten",
      "firmware_1.0.9.bin": "nine",
      "firmware_1.0.2.bin": "two",
    });
    expect(firmwareFiles(await open(root)).at(-1)).toBe("firmware_1.0.10.bin");
    expect((await manifestFor(root)).firmware).toEqual({
      URL: `${HOST}/firmware_1.0.10.bin`,
      hash: sha1("ten"),
    });
  });
});

describe("what a device gets", () => {
  test("the highest version, also when it sorts first as text", async () => {
    using root = new Temp(versions("1.0.10", "1.0.9", "1.0.2"));
    expect(await brief(root, { current_ver: "1.0.2" })).toBe("~/flash/main.py 1.0.10");
    expect(await brief(root, { current_ver: "1.0.9" })).toBe("~/flash/main.py 1.0.10");
  });

  test("what is new, what changed, what is gone; and nothing of what is the same", async () => {
    using root = new Temp({
      "1.0.0/flash/main.py": "one",
      "1.0.0/flash/same.py": "same",
      "1.0.0/flash/old.py": "old",
      "1.0.0/sd/gone/a": "a",
      "1.0.1/flash/main.py": "two",
      "1.0.1/flash/same.py": "same",
      "1.0.1/flash/lib/new.py": "new",
    });
    expect(await manifestFor(root, { current_ver: "1.0.0" })).toEqual({
      delete: ["flash/old.py", "sd/gone/a"],
      new: [
        {
          URL: `${HOST}/1.0.1/flash/lib/new.py`,
          dst_path: "/flash/lib/new.py",
          hash: sha1("new"),
        },
      ],
      previous_version: "1.0.0",
      update: [
        { URL: `${HOST}/1.0.1/flash/main.py`, dst_path: "/flash/main.py", hash: sha1("two") },
      ],
      version: "1.0.1",
    });
  });

  test("from any version that is there, straight to the highest", async () => {
    using root = new Temp({
      "1/a": "1",
      "1/b": "1",
      "2/a": "2",
      "2/c": "2",
      "3/a": "1",
      "3/c": "3",
    });
    expect(await brief(root, { current_ver: "1" })).toBe("+/c -b 3");
    expect(await brief(root, { current_ver: "2" })).toBe("~/a ~/c 3");
  });

  test("null when it is on the highest version, whatever the spelling", async () => {
    using root = new Temp(versions("1.0.0", "1.0.1"));
    for (const current_ver of ["1.0.1", "1.00.1", "01.0.1", "1..0.1", "1.0.1."]) {
      expect(await brief(root, { current_ver })).toBe("null");
    }
  });

  test("null when it is newer than the server: never a downgrade", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.1"), "firmware_1.0.1.bin": "" });
    for (const current_ver of ["1.0.2", "2", "1.0.1.0", "1.0.1rc1", "v0", "x", "1.0.1\u{1f680}"]) {
      expect(await brief(root, { current_ver })).toBe("null");
    }
  });

  test("one device may have less than what is offered, of files and firmware each", async () => {
    using root = new Temp({
      ...versions("1.0.0", "1.0.1", "1.0.2"),
      "firmware_1.0.1.bin": "",
      "firmware_1.0.2.bin": "x",
    });
    const releases = await open(root);
    const decide = (current_ver: string, version?: string, image = version) => {
      const may =
        version === undefined
          ? undefined
          : {
              version: releases.find(version),
              image: releases.firmware.find(({ name }) => name === image),
            };
      const decision = releases.decide({ current_ver, firmware_ver: "" }, may);
      return [decision?.target?.name, decision?.image?.name];
    };
    expect(decide("1.0.0")).toEqual(["1.0.2", "1.0.2"]);
    expect(decide("1.0.0", "1.0.1")).toEqual(["1.0.1", "1.0.1"]);
    expect(decide("1.0.0", "1.0.2", "1.0.1")).toEqual(["1.0.2", "1.0.1"]);
    expect(decide("1.0.1", "1.0.1")).toEqual([undefined, "1.0.1"]);
    expect(decide("1.0.2", "1.0.0")).toEqual([undefined, undefined]);
    expect(decide("1.0.0", "none")).toEqual([undefined, undefined]);
  });

  test("1.00.0 is 1.0.0: it gets the difference, and its version back as it was sent", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.1"), "1.0.0/old": "" });
    const manifest = await manifestFor(root, { current_ver: "1.00.0" });
    expect(manifest.previous_version).toBe("1.00.0");
    expect(manifest.delete).toEqual(["old"]);
    expect(manifest.new).toEqual([]);
    expect(manifest.update).toHaveLength(1);
  });

  test("from a version that is not there: everything is new, nothing is deleted", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.2"), "1.0.0/old": "" });
    for (const current_ver of ["1.0.1", "0", "1.0.0a", "1"]) {
      const manifest = await manifestFor(root, { current_ver });
      expect(manifest.previous_version).toBe(current_ver);
      expect(await brief(root, { current_ver })).toBe("+/flash/main.py 1.0.2");
    }
  });

  test("without a version, or with an empty one: everything, from version 0", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.1"), "1.0.0/old": "" });
    for (const query of [{}, { current_ver: "" }]) {
      expect((await manifestFor(root, query)).previous_version).toBe("0");
      expect(await brief(root, query)).toBe("+/flash/main.py 1.0.1");
    }
  });

  test("whatever it sends as its version, that is never a path", async () => {
    using root = new Temp({ ...versions("1.0.0"), "secret/flash/main.py": "" });
    for (const current_ver of ["../secret", "0/../secret", "/etc", "0\0", "0/%2e%2e", "1.0.0/.."]) {
      const manifest = (await open(root)).manifestFor({ current_ver }, HOST);
      if (manifest) expect(await brief(root, { current_ver })).toBe("+/flash/main.py 1.0.0");
      if (manifest) expect(manifest.previous_version).toBe(current_ver);
    }
    // These sort below 1.0.0, so that the loop above has shown something.
    expect(await brief(root, { current_ver: "0/../secret" })).not.toBe("null");
  });

  test("from an empty root: null", async () => {
    using root = new Temp();
    for (const query of [{}, { current_ver: "1" }, { firmware_ver: "" }, { base: "x" }]) {
      expect(await brief(root, query)).toBe("null");
    }
  });
});

describe("firmware", () => {
  const both: Tree = {
    ...versions("1.0.0", "1.0.1"),
    "firmware_1.0.0.bin": "a",
    "firmware_1.0.2.bin": "b",
  };

  test("is decided apart from files, by current_ver when the device does not say its own", async () => {
    using root = new Temp(both);
    expect(await brief(root, { current_ver: "1.0.0" })).toBe(
      "~/flash/main.py !firmware_1.0.2.bin 1.0.1",
    );
    root.remove("firmware_1.0.2.bin");
    // The image is not higher than what the device has: files alone.
    expect(await brief(root, { current_ver: "1.0.0" })).toBe("~/flash/main.py 1.0.1");
    expect(await brief(root, { current_ver: "0.9" })).toBe(
      "+/flash/main.py !firmware_1.0.0.bin 1.0.1",
    );
    expect(await brief(root)).toBe("+/flash/main.py !firmware_1.0.0.bin 1.0.1");
  });

  test("is decided by firmware_ver when the device sends it", async () => {
    using root = new Temp(both);
    const files = { current_ver: "1.0.0" };
    const offered = "~/flash/main.py !firmware_1.0.2.bin 1.0.1";
    expect(await brief(root, { ...files, firmware_ver: "1.0.1" })).toBe(offered);
    expect(await brief(root, { ...files, firmware_ver: "1.0.2" })).toBe("~/flash/main.py 1.0.1");
    expect(await brief(root, { ...files, firmware_ver: "1.00.2" })).toBe("~/flash/main.py 1.0.1");
    expect(await brief(root, { ...files, firmware_ver: "9" })).toBe("~/flash/main.py 1.0.1");
    // Sent empty: it has none.
    expect(await brief(root, { ...files, firmware_ver: "" })).toBe(offered);
  });

  test("alone goes to a device that sends firmware_ver, which stays on its version", async () => {
    using root = new Temp(both);
    const alone = "!firmware_1.0.2.bin 1.0.1";
    expect(await brief(root, { current_ver: "1.0.1", firmware_ver: "1.0.0" })).toBe(alone);
    expect(await brief(root, { current_ver: "1.0.1", firmware_ver: "" })).toBe(alone);
    expect(await brief(root, { current_ver: "1.00.1", firmware_ver: "" })).toEndWith(" 1.00.1");
    expect(await brief(root, { current_ver: "7", firmware_ver: "" })).toBe("!firmware_1.0.2.bin 7");
    expect(await brief(root, { current_ver: "1.0.1", firmware_ver: "1.0.2" })).toBe("null");
    const manifest = await manifestFor(root, { current_ver: "1.0.1", firmware_ver: "" });
    expect(manifest).toEqual({
      delete: [],
      firmware: { URL: `${HOST}/firmware_1.0.2.bin`, hash: sha1("b") },
      new: [],
      previous_version: "1.0.1",
      update: [],
      version: "1.0.1",
    });
  });

  test("alone does not go to a device that does not send firmware_ver, while there are versions", async () => {
    using root = new Temp(both);
    expect(await brief(root, { current_ver: "1.0.1" })).toBe("null");
    expect(await brief(root, { current_ver: "1.00.1" })).toBe("null");
  });

  test("alone goes to every device from a root without versions", async () => {
    using root = new Temp({ "firmware_1.0.2.bin": "b", "firmware_1.0.10.bin": "c" });
    expect(await brief(root)).toBe("!firmware_1.0.10.bin 1.0.10");
    expect(await brief(root, { current_ver: "1.0.2" })).toBe("!firmware_1.0.10.bin 1.0.10");
    expect((await manifestFor(root, { current_ver: "1.0.2" })).previous_version).toBe("1.0.2");
    // The version is then the device's own, so that it stops.
    expect(await brief(root, { current_ver: "1.0.10" })).toBe("null");
    expect(await brief(root, { current_ver: "1.0.2", firmware_ver: "1.0.2" })).toEndWith(" 1.0.2");
    expect(await brief(root, { firmware_ver: "" })).toBe("!firmware_1.0.10.bin 0");
    expect(await brief(root, { current_ver: "", firmware_ver: "" })).toEndWith(" 0");
    expect(await brief(root, { firmware_ver: "1.0.10" })).toBe("null");
  });
});

describe("extras, for a device that asks", () => {
  const tree: Tree = {
    ...versions("1.0.0"),
    "1.0.1/flash/main.py": "two!",
    "firmware_1.0.1.bin": "\xe9",
  };

  test("hash=sha256: sha256 and size of every file, and the version of firmware", async () => {
    using root = new Temp(tree);
    const manifest = await manifestFor(root, { current_ver: "1.0.0", hash: "sha256" });
    const image = bytesOf("\xe9");
    expect(manifest.firmware).toEqual({
      URL: `${HOST}/firmware_1.0.1.bin`,
      hash: sha1(image),
      sha256: sha256(image),
      size: image.length,
      version: "1.0.1",
    });
    expect(manifest.update).toEqual([
      {
        URL: `${HOST}/1.0.1/flash/main.py`,
        dst_path: "/flash/main.py",
        hash: sha1("two!"),
        sha256: sha256("two!"),
        size: 4,
      },
    ]);
  });

  test("anything else: none of them", async () => {
    using root = new Temp(tree);
    for (const hash of [undefined, "", "sha1", "md5", "sha512"]) {
      const text = JSON.stringify(await manifestFor(root, { hash }));
      expect(text).not.toContain("sha256");
      expect(text).not.toContain("size");
      expect(Object.keys((await manifestFor(root, { hash })).firmware!)).toEqual(["URL", "hash"]);
    }
  });

  test("reqid comes back as request_id, also an empty one; without it there is none", async () => {
    using root = new Temp(tree);
    expect((await manifestFor(root, { reqid: "17 \u00e9" })).request_id).toBe("17 \u00e9");
    expect((await manifestFor(root, { reqid: "" })).request_id).toBe("");
    expect(await manifestFor(root)).not.toContainKey("request_id");
  });

  test("other parameters change nothing", async () => {
    using root = new Temp(tree);
    const query = parseQuery(
      "current_ver=1.0.0&wmac=a&sysname=b&devid=c&token=d&ota_slot=1&fwtype=pybytes&protocol=1&" +
        "failed=1.0.1&__proto__=x&constructor=y&=z&&x",
    );
    expect(await manifestFor(root, query)).toEqual(
      await manifestFor(root, { current_ver: "1.0.0" }),
    );
  });

  test("a query is decoded, a + stays a +, and of two the first counts", () => {
    const query = parseQuery("current_ver=1.0%2e1+b%20c&current_ver=2&hash&base=%zz&reqid=x=y&a=b");
    const expected = { current_ver: "1.0.1+b c", hash: "", base: "%zz", reqid: "x=y" };
    expect({ ...query }).toEqual(expected);
  });
});

describe("base: what the device really has", () => {
  const tree: Tree = {
    "1.0.0/a": "a",
    "1.0.0/b": "b",
    "1.0.0/gone": "",
    "1.0.1/a": "a",
    "1.0.1/b": "B",
    "firmware_2.bin": "",
  };
  const right = releaseDigest(
    ["a", "b", "gone"].map((name) => [name, sha256(name === "gone" ? "" : name)]),
  );

  test("the digest of the server's version: the difference", async () => {
    using root = new Temp(tree);
    const query = { current_ver: "1.0.0", firmware_ver: "2", base: right };
    expect(await brief(root, query)).toBe("~/b -gone 1.0.1");
    expect(await manifestFor(root, query)).not.toContainKey("full");
    expect((await open(root)).find("1.00.0")?.digest).toBe(right);
  });

  test("another one: the full list, nothing deleted, and full is true", async () => {
    using root = new Temp(tree);
    for (const base of [sha256("x"), sha256("x").toUpperCase()]) {
      const query = { current_ver: "1.0.0", firmware_ver: "2", base };
      expect(await brief(root, query)).toBe("+/a +/b full 1.0.1");
      expect((await manifestFor(root, query)).full).toBe(true);
      expect((await manifestFor(root, query)).previous_version).toBe("1.0.0");
    }
  });

  test("of a version that is gone, edited, or not named: the full list", async () => {
    using root = new Temp(tree);
    const full = "+/a +/b full 1.0.1";
    expect(await brief(root, { current_ver: "0.9", firmware_ver: "2", base: right })).toBe(full);
    expect(await brief(root, { firmware_ver: "2", base: right })).toBe(full);
    root.write({ "1.0.0/a": "edited" });
    expect(await brief(root, { current_ver: "1.0.0", firmware_ver: "2", base: right })).toBe(full);
  });

  test("what is no digest is as if it were not sent: a full list each time would not end it", async () => {
    using root = new Temp(tree);
    for (const base of ["", "x", right.slice(1), `${right}0`, `${right.slice(1)}g`]) {
      const query = { current_ver: "1.0.0", firmware_ver: "2", base };
      expect(await brief(root, query)).toBe("~/b -gone 1.0.1");
      expect(await brief(root, { ...query, current_ver: "1.0.1" })).toBe("null");
    }
  });

  test("other than the newest, on which it says to be: the full list, again until it is right", async () => {
    using root = new Temp(tree);
    const newest = releaseDigest(["a", "B"].map((text) => [text.toLowerCase(), sha256(text)]));
    const query = { current_ver: "1.0.1", firmware_ver: "2" };
    expect(await brief(root, { ...query, base: newest })).toBe("null");
    for (const current_ver of ["1.0.1", "1.00.1"]) {
      const wrong = { ...query, current_ver, base: right };
      expect(await brief(root, wrong)).toBe("+/a +/b full 1.0.1");
      expect((await manifestFor(root, wrong)).previous_version).toBe(current_ver);
    }
    // Firmware goes with it, by the rules of firmware.
    expect(await brief(root, { ...query, firmware_ver: "1", base: right })).toBe(
      "+/a +/b !firmware_2.bin full 1.0.1",
    );
    expect(await brief(root, { ...query, firmware_ver: "1", base: newest })).toBe(
      "!firmware_2.bin 1.0.1",
    );
    // What was edited is what a device gets that has the state before.
    root.write({ "1.0.1/b": "edited" });
    expect(await brief(root, { ...query, base: newest })).toBe("+/a +/b full 1.0.1");
  });

  test("of a version above all that is there: null, never a way back", async () => {
    using root = new Temp(tree);
    const query = { current_ver: "1.0.2", firmware_ver: "2", base: right };
    expect(await brief(root, query)).toBe("null");
    const releases = await open(root, { latest: "1.0.0" });
    expect(await brief(releases, { ...query, current_ver: "1.0.1" })).toBe("null");
  });

  test("comes back with reqid, in lower case and first, where the lists are made for it", async () => {
    using root = new Temp(tree);
    const query = { current_ver: "1.0.0", firmware_ver: "2", reqid: "7" };
    const manifest = await manifestFor(root, { ...query, base: right.toUpperCase() });
    expect(Object.entries(manifest)[0]).toEqual(["base", right]);
    expect(await manifestFor(root, { ...query, reqid: "", base: right })).toHaveProperty("base");
    const alone = { ...query, firmware_ver: "1", current_ver: "1.0.1" };
    const base = (await open(root)).find("1.0.1")!.digest;
    expect(await manifestFor(root, { ...alone, base })).toMatchObject({ base, new: [] });
    for (const other of [
      { ...query, base: sha256("x") },
      { ...query, base: "x" },
      { ...query, reqid: undefined, base: right },
      { ...query, current_ver: "0.9", base: right },
      { ...query, list: "1.0.0", base: right },
      query,
    ]) {
      expect(await manifestFor(root, other)).not.toContainKey("base");
    }
  });
});

describe("firmware_sha256: the image that it really runs", () => {
  const tree: Tree = { "1/a": "", "2/a": "2", "firmware_1.bin": "one", "firmware_2.bin": "two" };
  const runs = { current_ver: "2", firmware_ver: "2" };

  test("other than the image of that version: it is offered, alone or with files", async () => {
    using root = new Temp(tree);
    for (const firmware_sha256 of [sha256("damaged"), sha256("one").toUpperCase()]) {
      expect(await brief(root, { ...runs, firmware_sha256 })).toBe("!firmware_2.bin 2");
      const behind = { ...runs, current_ver: "1", firmware_ver: "2.", firmware_sha256 };
      expect(await brief(root, behind)).toBe("~/a !firmware_2.bin 2");
    }
  });

  test("the same: not offered; nor when it is no digest or says nothing", async () => {
    using root = new Temp(tree);
    const right = sha256("two");
    for (const said of [right, right.toUpperCase(), "", "x", right.slice(1), `${right}0`]) {
      expect(await brief(root, { ...runs, firmware_sha256: said })).toBe("null");
    }
  });

  test("of other firmware than the highest, or of none: decided by the version alone", async () => {
    using root = new Temp(tree);
    const firmware_sha256 = sha256("damaged");
    expect(await brief(root, { ...runs, firmware_ver: "3", firmware_sha256 })).toBe("null");
    expect(await brief(root, { ...runs, firmware_ver: "1", firmware_sha256 })).toBe(
      "!firmware_2.bin 2",
    );
    // A board that never says what it runs would flash it for ever.
    expect(await brief(root, { current_ver: "2", firmware_sha256 })).toBe("null");
  });
});

describe("list: what a version consists of", () => {
  const tree: Tree = { ...versions("1.0.0", "1.0.1"), "1.0.0/b": "b", "firmware_9.bin": "" };

  test("all of its files as new, nothing else, whatever else the device says", async () => {
    using root = new Temp(tree);
    const entry = (path: string, content: string) => ({
      ...{ URL: `${HOST}/1.0.0/${path}`, dst_path: `/${path}` },
      ...{ hash: sha1(content), sha256: sha256(content), size: content.length },
    });
    const expected = {
      delete: [],
      new: [entry("b", "b"), entry("flash/main.py", "1.0.0")],
      previous_version: "1.0.0",
      request_id: "7",
      update: [],
      version: "1.0.0",
    };
    const extras = { hash: "sha256", reqid: "7" };
    for (const more of [
      {},
      { current_ver: "1.0.0", base: sha256("x"), firmware_ver: "" },
      { current_ver: "9", firmware_ver: "9", firmware_sha256: sha256("x") },
    ]) {
      for (const list of ["1.0.0", "1.00.0"]) {
        expect(await manifestFor(root, { ...extras, ...more, list })).toEqual(expected);
      }
    }
    expect(parseManifest(JSON.stringify(expected))?.new).toHaveLength(2);
    expect(await brief(root, { list: "1.0.1" })).toBe("+/flash/main.py 1.0.1");
    expect(JSON.stringify(await manifestFor(root, { list: "1.0.0" }))).not.toContain("sha256");
  });

  test("of a version that is not there, or held back: null", async () => {
    using root = new Temp(tree);
    for (const list of ["", "0", "1.0.2", "../1.0.0", "9"]) {
      expect(await brief(root, { list, current_ver: "1.0.0" })).toBe("null");
    }
    expect(await brief(await open(root, { latest: "1.0.0" }), { list: "1.0.1" })).toBe("null");
  });
});

describe("executable", () => {
  const tree: Tree = { "1/run.sh": "#!", "1/a": "a", "2/run.sh": "#!", "2/a": "a", "2/new": "" };
  const layRoot = () => {
    const root = new Temp(tree);
    fs.chmodSync(root.at("1/run.sh"), 0o711);
    for (const path of ["2/run.sh", "2/new"]) fs.chmodSync(root.at(path), 0o744);
    // Not its owner.
    fs.chmodSync(root.at("2/a"), 0o655);
    return root;
  };

  test("is said with hash=sha256 where the owner may run the file, and only there", async () => {
    await using root = layRoot();
    const manifest = await manifestFor(root, { hash: "sha256" });
    const said = manifest.new.map(({ dst_path, executable }) => [dst_path, executable]);
    expect(said).toEqual([
      ["/a", undefined],
      ["/new", true],
      ["/run.sh", true],
    ]);
    expect(manifest.new[0]).not.toContainKey("executable");
    expect(JSON.stringify(manifest)).toBe(JSON.stringify(sortKeys(manifest)));
    expect(JSON.stringify(await manifestFor(root))).not.toContain("executable");
  });

  test("alone changed from one version to the next: an update, but not for boards", async () => {
    await using root = layRoot();
    expect(await brief(root, { current_ver: "1", hash: "sha256" })).toBe("+/new 2");
    fs.chmodSync(root.at("1/run.sh"), 0o600);
    expect(await brief(root, { current_ver: "1", hash: "sha256" })).toBe("+/new ~/run.sh 2");
    expect(await brief(root, { current_ver: "1" })).toBe("+/new 2");
  });

  test("changed while it serves is noticed; the digest of the release stays", async () => {
    await using root = layRoot();
    const releases = await open(root);
    const { digest } = releases.find("2")!;
    fs.chmodSync(root.at("2/run.sh"), 0o644);
    expect(await releases.scan()).toBe(true);
    expect(await brief(releases, { current_ver: "1", hash: "sha256" })).toBe("+/new ~/run.sh 2");
    expect(releases.find("2")!.digest).toBe(digest);
  });
});

describe("the form of a manifest", () => {
  test("keys and lists are sorted, lists are there when empty, firmware only when offered", async () => {
    const names = ["z", "a", "B", "lib/a", "lib.py", "\u{1f680}", "\ufb01", "10", "9"];
    using root = new Temp({
      ...Object.fromEntries(names.map((name) => [`1/old/${name}`, ""])),
      ...Object.fromEntries(names.map((name) => [`1/same/${name}`, "1"])),
      ...Object.fromEntries(names.map((name) => [`2/same/${name}`, "2"])),
      ...Object.fromEntries(names.map((name) => [`2/new/${name}`, ""])),
      "firmware_2.bin": "",
    });
    const query = { current_ver: "1", hash: "sha256", reqid: "1" };
    const manifest = await manifestFor(root, query);
    expect(JSON.stringify(manifest)).toBe(JSON.stringify(sortKeys(manifest)));
    for (const base of [sha256("x"), (await open(root)).find("1")!.digest]) {
      const bound = await manifestFor(root, { ...query, base });
      expect(JSON.stringify(bound)).toBe(JSON.stringify(sortKeys(bound)));
    }
    // By code point: the UTF-8 bytes of U+FB01 come before those of U+1F680.
    const sorted = ["10", "9", "B", "a", "lib.py", "lib/a", "z", "\ufb01", "\u{1f680}"];
    expect(manifest.delete).toEqual(sorted.map((name) => `old/${name}`));
    expect(manifest.new.map((item) => item.dst_path)).toEqual(sorted.map((name) => `/new/${name}`));
    expect(manifest.update.map((item) => item.dst_path)).toEqual(
      sorted.map((name) => `/same/${name}`),
    );
    const empty = await manifestFor(root, { current_ver: "2", firmware_ver: "1" });
    expect(empty).toMatchObject({ delete: [], new: [], update: [] });
    expect(await manifestFor(root, { current_ver: "1", firmware_ver: "2" })).not.toContainKey(
      "firmware",
    );
  });

  test("URLs are percent-encoded, part by part; paths are not", async () => {
    const names: Record<string, string> = {
      "a b.py": "a%20b.py",
      "a#b": "a%23b",
      "a?b=c&d": "a%3Fb%3Dc%26d",
      "100%": "100%25",
      "%41": "%2541",
      "a+b": "a%2Bb",
      "\u00e9": "%C3%A9",
      "\u{1f680}": "%F0%9F%9A%80",
      "q\"'<>": "q%22'%3C%3E",
      "%2e%2e": "%252e%252e",
      "-;,@:$": "-%3B%2C%40%3A%24",
    };
    using root = new Temp(
      Object.fromEntries(Object.keys(names).map((name) => [`1.0+b/a dir/${name}`, name])),
    );
    const manifest = await manifestFor(root);
    expect(manifest.new.map(({ URL, dst_path }) => [dst_path, URL]).sort()).toEqual(
      Object.entries(names)
        .map(([name, encoded]) => [`/a dir/${name}`, `${HOST}/1.0%2Bb/a%20dir/${encoded}`])
        .sort(),
    );
    // A device gets the same out of it.
    expect(parseManifest(JSON.stringify(manifest))?.new).toEqual(manifest.new);
  });

  test("URLs begin with the base that is given", async () => {
    using root = new Temp({ ...versions("1"), "firmware_1.bin": "" });
    const manifest = (await open(root)).manifestFor({}, "https://cdn.example/fleet/7");
    expect(manifest?.new[0]?.URL).toBe("https://cdn.example/fleet/7/1/flash/main.py");
    expect(manifest?.firmware?.URL).toBe("https://cdn.example/fleet/7/firmware_1.bin");
  });
});

test("random queries: the text that is served is the compact JSON of the manifest", async () => {
  const random = new Random(SEED);
  using root = new Temp({
    ...versions("1.0.0", "1.0.1"),
    "1.0.0/gone": "",
    "1.0.1/new \u{1f680}": "",
    // What looks like the JSON around it.
    '1.0.1/"URL":"x': "",
    '1.0.1/sub/","URL":"': "",
    "firmware_1.0.1.bin": "",
  });
  const releases = await open(root);
  const some: Record<string, readonly string[]> = {
    current_ver: ["", "1.00.0", "1.0.0", "1.0.1", "1.0.0a", "2", 'x"\\\n\u{1f680}', "0"],
    firmware_ver: ["", "1.0.0", "1.0.1"],
    base: ["", "x", sha256("x"), ...releases.versions.map(({ digest }) => digest)],
    firmware_sha256: ["x", sha256("x"), releases.firmware[0]!.sha256],
    hash: ["sha256", "sha1"],
    reqid: ["", "7", '"\\\n\u{1f680}'],
  };
  const seen = new Set<string>();
  for (let run = 0; run < 1000; run++) {
    const chosen = Object.entries(some).filter(() => random.chance(0.6));
    const list = random.chance(0.1) && { list: random.pick(["1.0.0", "1.00.1", "2"]) };
    const query: ManifestQuery = {
      ...Object.fromEntries(chosen.map(([name, values]) => [name, random.pick(values)])),
      ...list,
    };
    const host = random.pick(["http://a", "http://b:1", "http://c/$&/$1", 'http://d/"URL":"\\']);
    const suffix = random.pick(["", "?token=t"]);
    const text = releases.manifestJSON(query, host, suffix);
    if (text !== JSON.stringify(releases.manifestFor(query, host, suffix))) {
      throw new Error(`run ${run}: ${JSON.stringify(query)} gives ${text}`);
    }
    seen.add(text);
  }
  expect(seen.size).toBeGreaterThan(50);
});

/** A copy with all keys in order of code points. */
function sortKeys(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sortKeys);
  if (typeof value !== "object" || value === null) return value;
  const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
  return Object.fromEntries(entries.map(([key, item]) => [key, sortKeys(item)]));
}

describe("what is content of a version", () => {
  test("nested directories, empty files, large files, dot files, odd names", async () => {
    const large = new Uint8Array(1_000_000).map((_, i) => i * 7);
    using root = new Temp({
      "1/a/b/c/d/e/f": "deep",
      "1/empty": "",
      "1/large": large,
      "1/.config/x": "",
      "1/flash/.env": "",
      "1/1.0.0/x": "",
      "1/firmware_1.bin": "",
      "1/x.bak": "",
      "1/manifest.json": "",
      "1/empty-directory/": "",
    });
    const files = (await open(root)).versions[0]!.files;
    expect([...files.keys()]).toEqual([
      ...[".config/x", "1.0.0/x", "a/b/c/d/e/f", "empty", "firmware_1.bin", "flash/.env"],
      ...["large", "manifest.json", "x.bak"],
    ]);
    expect(files.get("empty")).toMatchObject({ size: 0, sha1: sha1(""), sha256: sha256("") });
    expect(files.get("large")).toMatchObject({
      size: 1e6,
      sha1: sha1(large),
      sha256: sha256(large),
    });
  });

  test("not: what computers leave behind, wherever, and what the device writes itself", async () => {
    using root = new Temp({
      "1/.DS_Store": "",
      "1/flash/.DS_Store": "",
      "1/flash/lib/Thumbs.db": "",
      "1/pymakr.conf": "",
      "1/flash/pymakr.conf": "",
      "1/flash/__pycache__/a.pyc": "",
      "1/flash/OTA_VERSION.py": "VERSION = '1'",
      "1/sd/OTA_VERSION.py": "",
      "1/flash/main.py": "",
      "1/flash/lib/OTA_VERSION.py": "",
      "1/flash/x.DS_Store": "",
      "1/OTA_VERSION.py": "",
    });
    const releases = await open(root);
    expect(paths(releases)).toEqual([
      ...["OTA_VERSION.py", "flash/lib/OTA_VERSION.py", "flash/main.py", "flash/x.DS_Store"],
      "sd/OTA_VERSION.py",
    ]);
    expect(ignoredReason(releases, "1/flash/OTA_VERSION.py")).toContain("device writes it");
    for (const path of [".DS_Store", "flash/lib/Thumbs.db", "pymakr.conf", "flash/__pycache__"]) {
      expect(ignoredReason(releases, `1/${path}`)).toBe("never content");
    }
  });

  test("not: names that no device would take, in a version that else counts", async () => {
    using root = new Temp({
      "1/.ota/state": "",
      "1/.OTA./x": "",
      "1/a\\b": "",
      "1/a\nb": "",
      "1/fine": "",
      "1/x/.ota": "",
    });
    const releases = await open(root);
    expect(paths(releases)).toEqual(["fine", "x/.ota"]);
    expect(ignoredReason(releases, "1/.ota")).toContain("enters .ota");
    expect(ignoredReason(releases, "1/.OTA.")).toContain("enters .ota");
    expect(ignoredReason(releases, "1/a\\b")).toContain("backslash");
    expect(ignoredReason(releases, "1/a\nb")).toContain("control");
    expect(parseManifest(JSON.stringify(await manifestFor(root)))?.new).toHaveLength(2);
  });

  test("not: a file whose name is not UTF-8", async () => {
    using root = new Temp({ "1/flash/main.py": "" });
    fs.writeFileSync(Buffer.concat([Buffer.from(root.at("1/flash/a")), Buffer.of(0xff)]), "");
    const releases = await open(root);
    expect(paths(releases)).toEqual(["flash/main.py"]);
    expect(ignoredReason(releases, "1/flash/a\ufffd")).toContain("not UTF-8");
  });

  test("not: a directory whose name is not UTF-8, and the root can still be read", async () => {
    using root = new Temp({ "1/flash/main.py": "" });
    fs.mkdirSync(Buffer.concat([Buffer.from(root.at("1/flash/a")), Buffer.of(0xff)]));
    const releases = await open(root);
    expect(paths(releases)).toEqual(["flash/main.py"]);
    expect(ignoredReason(releases, "1/flash/a\ufffd")).toContain("not UTF-8");
  });

  test("not: a pipe, and nobody waits for it", async () => {
    using root = new Temp({ "1/flash/main.py": "" });
    expect(Bun.spawnSync(["mkfifo", root.at("1/flash/pipe"), root.at("2")]).exitCode).toBe(0);
    const releases = await open(root);
    expect(paths(releases)).toEqual(["flash/main.py"]);
    expect(ignoredReason(releases, "1/flash/pipe")).toContain("neither a file nor a directory");
    expect(ignoredReason(releases, "2")).toContain("neither a file nor a directory");
  });

  test("--ignore: names without a slash, paths in the version with one", async () => {
    using root = new Temp({
      "1/README.md": "",
      "1/flash/notes.md": "",
      "1/flash/main.py": "",
      "1/flash/tests/a.py": "",
      "1/flash/tests/b/c.py": "",
      "1/sd/tests/a.py": "",
      "1/x/cache/y/z": "",
      "1/a.tmp": "",
    });
    const left = async (...ignore: string[]) => paths(await open(root, { ignore }));
    expect(await left()).toHaveLength(8);
    expect(await left("*.md")).not.toContain("README.md");
    expect(await left("*.md")).not.toContain("flash/notes.md");
    expect(await left("*.md")).toHaveLength(6);
    expect(await left("flash/tests/**")).toEqual(
      (await left()).filter((path) => !path.startsWith("flash/tests")),
    );
    expect(await left("tests")).toEqual((await left()).filter((path) => !path.includes("tests/")));
    expect(await left("cache", "*.{md,tmp}")).toEqual([
      ...["flash/main.py", "flash/tests/a.py", "flash/tests/b/c.py", "sd/tests/a.py"],
    ]);
    expect(await left("flash/*.md")).toContain("README.md");
    expect(await left("flash/*.md")).not.toContain("flash/notes.md");
    const releases = await open(root, { ignore: ["*.md"] });
    expect(ignoredReason(releases, "1/flash/notes.md")).toBe("--ignore");
  });

  test("what is ignored in the new version is deleted, as it is no content any more", async () => {
    using root = new Temp({ "1/a.md": "", "1/b": "", "2/a.md": "", "2/b": "" });
    const releases = await open(root, { ignore: ["2/*", "a.md"] });
    expect(await brief(releases, { current_ver: "1" })).toBe("2");
    root.write({ "1/OTA_VERSION.py": "", "1/.DS_Store": "" });
    expect(await brief(root, { current_ver: "1" })).toBe("-OTA_VERSION.py 2");
  });
});

describe("a path that changes its kind", () => {
  test("from file to directory and back", async () => {
    using root = new Temp({
      "1/lib": "a file",
      "1/conf/a": "",
      "1/conf/b/c": "",
      "2/lib/a": "",
      "2/lib/b/c": "",
      "2/conf": "x",
    });
    const manifest = await manifestFor(root, { current_ver: "1" });
    expect(manifest.delete).toEqual(["conf/a", "conf/b/c", "lib"]);
    expect(manifest.new.map((item) => item.dst_path)).toEqual(["/conf", "/lib/a", "/lib/b/c"]);
    expect(manifest.update).toEqual([]);
    // A device takes it.
    expect(parseManifest(JSON.stringify(manifest), "1")?.new).toHaveLength(3);
  });
});

describe("symbolic links", () => {
  test("inside the root are followed: files, directories, versions, firmware", async () => {
    using root = new Temp({
      "shared/lib/a.py": "a",
      "1.0.0/flash/main.py": "m",
      image: "i",
    });
    root.link("1.0.0/flash/again.py", "main.py");
    root.link("1.0.0/flash/lib", "../../shared/lib");
    root.link("1.0.1", "1.0.0");
    root.link("firmware_1.0.0.bin", "image");
    const releases = await open(root);
    const expected = ["flash/again.py", "flash/lib/a.py", "flash/main.py"];
    for (const version of releases.versions) expect([...version.files.keys()]).toEqual(expected);
    expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1"]);
    expect(releases.firmware[0]?.sha1).toBe(sha1("i"));
    expect(releases.find("1.0.0")?.files.get("flash/lib/a.py")?.sha1).toBe(sha1("a"));
  });

  test("to a version that is kept in a dot directory of the root, as `current` often is", async () => {
    using root = new Temp({
      ".store/7/flash/main.py": "m",
      ".store/7/flash/lib/a.py": "a",
    });
    root.link("1.0.1", ".store/7");
    const releases = await open(root);
    expect(versionNames(releases)).toEqual(["1.0.1"]);
    // A version that lost its files on the way would make devices delete theirs.
    expect(paths(releases)).toEqual(["flash/lib/a.py", "flash/main.py"]);
  });

  test("inside such a version, too", async () => {
    using root = new Temp({ ".store/7/flash/main.py": "m", ".store/lib/a.py": "a" });
    root.link("1.0.1", ".store/7");
    root.link("1.0.1/flash/boot.py", "main.py");
    root.link("1.0.1/flash/lib", "../../lib");
    expect(paths(await open(root))).toEqual([
      ...["flash/boot.py", "flash/lib/a.py", "flash/main.py"],
    ]);
  });

  test("that break later take their version with them", async () => {
    using root = new Temp({ ...versions("1.0.0"), "store/flash/main.py": "m" });
    root.link("1.0.1", "store");
    const releases = await open(root);
    expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1"]);
    expect(releases.locate("/1.0.1/flash/main.py")?.size).toBe(1);
    root.remove("store");
    expect(await releases.scan()).toBe(true);
    expect(versionNames(releases)).toEqual(["1.0.0"]);
    expect(releases.find("1.0.1")).toBeUndefined();
    expect(releases.locate("/1.0.1/flash/main.py")).toBeUndefined();
    expect(await releases.scan()).toBe(false);
  });

  test("that leave the root are never followed, however they do it", async () => {
    using outside = new Temp({ "secret/flash/main.py": "secret", file: "secret" });
    using root = new Temp({ "1/flash/main.py": "" });
    root.link("1/absolute", outside.at("file"));
    root.link("1/directory", outside.at("secret"));
    root.link("1/relative", `../../${outside.path.split("/").at(-1)}/file`);
    root.link("1/hop", "flash/hop");
    root.link("1/flash/hop", outside.at("file"));
    root.link("2", outside.at("secret"));
    root.link("firmware_3.bin", outside.at("file"));
    // A neighbour whose path begins with the same text.
    fs.mkdirSync(`${root.path}-neighbour`);
    try {
      root.link("1/neighbour", `${root.path}-neighbour`);
      root.link("3", `${root.path}-neighbour`);
      const releases = await open(root);
      expect(paths(releases)).toEqual(["flash/main.py"]);
      expect(versionNames(releases)).toEqual(["1"]);
      expect(firmwareFiles(releases)).toEqual([]);
      for (const path of ["absolute", "directory", "relative", "hop", "flash/hop", "neighbour"]) {
        expect(ignoredReason(releases, `1/${path}`)).toBe("a link that leaves the root");
      }
      for (const path of ["2", "3", "firmware_3.bin"]) {
        expect(ignoredReason(releases, path)).toBe("a link that leaves the root");
      }
    } finally {
      fs.rmdirSync(`${root.path}-neighbour`);
    }
  });

  test("that are broken or go round in circles are ignored, and nothing hangs", async () => {
    using root = new Temp({ "1/flash/main.py": "", "2/x/main.py": "" });
    root.link("1/broken", "nowhere");
    root.link("1/self", "self");
    root.link("1/ping", "pong");
    root.link("1/pong", "ping");
    root.link("1/flash/up", "..");
    root.link("1/flash/here", ".");
    root.link("1/other", "../2");
    root.link("2/other", "../1");
    root.link("3", "missing");
    const releases = await open(root);
    expect([...releases.find("1")!.files.keys()]).toEqual(["flash/main.py", "other/x/main.py"]);
    expect([...releases.find("2")!.files.keys()]).toEqual(["other/flash/main.py", "x/main.py"]);
    expect(ignoredReason(releases, "1/broken")).toBe("a broken link");
    expect(ignoredReason(releases, "3")).toBe("a broken link");
    expect(ignoredReason(releases, "1/flash/up")).toBe("a link to a directory above it");
    expect(ignoredReason(releases, "1/flash/here")).toBe("a link to a directory above it");
    for (const path of ["1/self", "1/ping", "1/pong"]) {
      expect(ignoredReason(releases, path)).toContain("ELOOP");
    }
  });
});

describe("--latest", () => {
  const tree: Tree = {
    ...versions("1.0.0", "1.0.1", "1.0.10"),
    "firmware_1.0.1.bin": "",
    "firmware_1.0.10.bin": "",
  };

  test("caps versions and firmware alike, and says so", async () => {
    using root = new Temp(tree);
    const releases = await open(root, { latest: "1.0.1" });
    expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1"]);
    expect(firmwareFiles(releases)).toEqual(["firmware_1.0.1.bin"]);
    expect(ignoredReason(releases, "1.0.10")).toBe("above --latest 1.0.1");
    expect(ignoredReason(releases, "firmware_1.0.10.bin")).toBe("above --latest 1.0.1");
    expect(await brief(releases, { current_ver: "1.0.0" })).toBe(
      "~/flash/main.py !firmware_1.0.1.bin 1.0.1",
    );
  });

  test("gives devices that are already above it null", async () => {
    using root = new Temp(tree);
    const releases = await open(root, { latest: "1.0.1" });
    expect(await brief(releases, { current_ver: "1.0.10" })).toBe("null");
    expect(await brief(releases, { current_ver: "1.0.10", firmware_ver: "1.0.10" })).toBe("null");
  });

  test("need not be a version that is there, and counts in any spelling", async () => {
    using root = new Temp(tree);
    expect(versionNames(await open(root, { latest: "1.0.5" }))).toEqual(["1.0.0", "1.0.1"]);
    expect(versionNames(await open(root, { latest: "1.00.1" }))).toHaveLength(2);
    expect(versionNames(await open(root, { latest: "0.1" }))).toEqual([]);
    expect(versionNames(await open(root, { latest: "9" }))).toHaveLength(3);
  });
});

describe("what is served", () => {
  const KEY = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----\n";
  const served = (releases: Releases, ...asked: string[]) =>
    asked.filter((path) => releases.locate(`/${path}`) !== undefined);

  test("of a version, what is offered; nothing that is ignored, in whatever spelling", async () => {
    using root = new Temp({
      "1.0.0/flash/main.py": "m",
      "1.0.0/flash/OTA_VERSION.py": "",
      "1.0.0/flash/__pycache__/a.pyc": "",
      "1.0.0/.git/config": "",
      "1.0.0/secret.key": "",
      "1.0.0/.DS_Store": "",
    });
    const releases = await open(root, { ignore: [".git", "*.key"] });
    const asked = ["flash/main.py", "flash/OTA_VERSION.py", "flash/__pycache__/a.pyc"];
    asked.push(".git/config", "secret.key", ".DS_Store", "", "flash", "flash/new.py");
    // What came since the last look is not offered yet.
    root.write({ "1.0.0/flash/new.py": "" });
    const all = asked.map((path) => `1.0.0/${path}`);
    expect(served(releases, ...all)).toEqual(["1.0.0/flash/main.py"]);
    expect(served(releases, "1.0.0/%2egit/config", "1%2E0.0/secret%2ekey")).toEqual([]);
    expect(served(releases, "1%2E0.0/flash/main%2Epy")).toHaveLength(1);
  });

  test("not: versions and images that are held back, twins, put aside, unreadable, or new", async () => {
    using root = new Temp({
      ...versions("1.0.0", "1.00.0", "1.0.1", "1.0.0.bak", "v1.0.1.OLD", "2_x.tmp"),
      "firmware_1.0.0.bin": "a",
      "firmware_1.0.1.bin": "b",
      "firmware_1.0.0.bin.bak": "c",
      "firmware_1.0.0.old.bin": "d",
      "firmare_x.bin": "e",
    });
    const releases = await open(root, { latest: "1.0.0" });
    root.write({ ...versions("0.9"), "firmware_0.9.bin": "" });
    const inVersions = ["0.9", "1.0.0", "1.00.0", "1.0.1", "1.0.0.bak", "v1.0.1.OLD", "2_x.tmp"];
    const asked = inVersions.map((name) => `${name}/flash/main.py`);
    asked.push(...fs.readdirSync(root.path).filter((name) => name.startsWith("firm")));
    expect(served(releases, ...asked)).toEqual(["1.0.0/flash/main.py", "firmware_1.0.0.bin"]);
  });

  test("through links, too, only what is offered, and as content of its version", async () => {
    using root = new Temp({
      "1.0.0/flash/main.py": "m",
      "1.0.0/secret.key": "",
      "builds/b7/flash/main.py": "7",
      "builds/b7/secret.key": "",
      "builds/b8/flash/main.py": "8",
      "builds/image": "i",
      "builds/notes": "n",
      ".store/1/flash/main.py": "s",
    });
    root.link("current", "1.0.0");
    root.link("key", "1.0.0/secret.key");
    root.link("main.py", "1.0.0/flash/main.py");
    root.link("1.0.1", "builds/b7");
    root.link("1.0.2", "builds/b8");
    root.link("firmware_1.0.2.bin", "builds/image");
    root.link("0.9", ".store/1");
    const releases = await open(root, { ignore: ["*.key"], latest: "1.0.1" });
    const file = (path: string) => releases.find(path.split("/")[0]!)!.files.get("flash/main.py");
    for (const [path, name] of Object.entries({
      "current/flash/main.py": "1.0.0",
      "main.py": "1.0.0",
      "builds/b7/flash/main.py": "1.0.1",
      "0.9/flash/main.py": "0.9",
    })) {
      expect(releases.locate(`/${path}`)).toBe(file(name)!);
    }
    const asked = ["current/secret.key", "key", "1.0.1/secret.key", "builds/b7/secret.key"];
    asked.push("1.0.2/flash/main.py", "builds/b8/flash/main.py", "firmware_1.0.2.bin");
    asked.push("builds/image", ".store/1/flash/main.py");
    expect(served(releases, ...asked, "builds/notes")).toEqual(["builds/notes"]);
  });

  test("of other files, none that holds a private key", async () => {
    const preamble = "Bag Attributes\n".repeat(1000);
    const keys: Tree = {
      "tls.pem": `-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n${KEY}`,
      "notes/rsa": KEY.replaceAll("PRIVATE", "RSA PRIVATE"),
      "notes/ec.txt": `${preamble}${KEY.replaceAll("PRIVATE", "EC PRIVATE")}`,
      "notes/id_ed25519": KEY.replaceAll("PRIVATE", "OPENSSH PRIVATE"),
      "sealed.key": KEY.replaceAll("PRIVATE", "ENCRYPTED PRIVATE"),
      "secring.asc": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n",
    };
    using root = new Temp({
      ...keys,
      ...versions("1.0.0"),
      "fleet.pub": KEY.replaceAll("PRIVATE", "PUBLIC"),
      "notes/about.md": "a PRIVATE KEY is kept at home",
      // A device's own: it is content like the rest.
      "1.0.0/flash/device.pem": KEY,
    });
    root.link("notes/link", "../sealed.key");
    const releases = await open(root);
    const asked = [...Object.keys(keys), "notes/link", "fleet.pub", "notes/about.md"];
    asked.push("1.0.0/flash/device.pem");
    expect(served(releases, ...asked)).toEqual(asked.slice(-3));
    // A file that becomes one, and back.
    root.write({ "fleet.pub": KEY });
    expect(served(releases, "fleet.pub")).toEqual([]);
    root.write({ "fleet.pub": "public again" });
    expect(served(releases, "fleet.pub")).toEqual(["fleet.pub"]);
  });

  test("never a key of the server, wherever it turns up", async () => {
    using root = new Temp(versions("1.0.0", "1.0.1"));
    using home = new Temp({ "fleet.key": "no PEM at all" });
    fs.linkSync(home.at("fleet.key"), root.at("1.0.1/flash/key"));
    fs.linkSync(home.at("fleet.key"), root.at("firmware_2.bin"));
    const releases = await open(root, { secrets: [home.at("fleet.key"), home.at("missing")] });
    expect(paths(releases)).toEqual(["flash/main.py"]);
    expect(firmwareFiles(releases)).toEqual([]);
    expect(ignoredReason(releases, "1.0.1/flash/key")).toBe("a key of this server");
    expect(ignoredReason(releases, "firmware_2.bin")).toBe("a key of this server");
    expect(served(releases, "1.0.1/flash/key", "firmware_2.bin")).toEqual([]);
  });

  test("beside versions and images: counted by directory, with what is not served left out", async () => {
    const many = Object.fromEntries(Array.from({ length: 1002 }, (_, i) => [`many/${i}`, ""]));
    using root = new Temp({
      ...{ ...versions("1.0.0", "1.0.0.bak"), ...many },
      ...{ "firmware_1.0.0.bin": "", ".git/config": "", ".env": "", "-/x": "" },
      ...{ "notes/a": "", "notes/b/c": "", "notes/b/.d": "", "notes/key": KEY },
      ...{ "plan.txt": "", "tls.pem": KEY, "keys/tls.pem": KEY, "empty/": "" },
      "2024.pdf": "",
    });
    root.link("current", "1.0.0");
    root.link("plan", "plan.txt");
    root.link("notes/up", "..");
    expect(await (await open(root)).beside()).toEqual([
      { path: "2024.pdf", files: 1 },
      { path: "many/", files: 1001 },
      { path: "notes/", files: 3 },
      { path: "plan", files: 1 },
      { path: "plan.txt", files: 1 },
    ]);
    const releases = await open(root, { onlyReleases: true });
    expect(await releases.beside()).toEqual([]);
    const asked = ["plan.txt", "notes/a", "current/flash/main.py", "1.0.0/flash/main.py"];
    expect(served(releases, ...asked, "firmware_1.0.0.bin")).toEqual([
      ...["1.0.0/flash/main.py", "firmware_1.0.0.bin"],
    ]);
  });
});

describe("the clock on the wall", () => {
  const HOUR = 3_600_000;
  afterEach(() => {
    setSystemTime();
  });

  for (const [what, set] of [
    ["is behind the times of all files", -HOUR],
    ["is right", 0],
    ["is ahead of the times of all files", HOUR],
  ] as const) {
    test(`${what}: at the start all counts`, async () => {
      using root = new Temp({ ...versions("1.0.0"), "firmware_1.0.0.bin": "" });
      if (set !== 0) setSystemTime(Date.now() + set);
      const releases = await open(root, { quiet: 0.2 });
      expect([versionNames(releases), firmwareFiles(releases)]).toEqual([
        ["1.0.0"],
        ["firmware_1.0.0.bin"],
      ]);
    });
  }

  /** Scans until nothing is unsettled, as who keeps up with a root does. */
  async function settle(releases: Releases): Promise<void> {
    while (releases.unsettled.length > 0) {
      await Bun.sleep(releases.nextScan);
      await releases.scan();
    }
  }

  for (const step of [-24 * HOUR, -HOUR, HOUR]) {
    test(`is set by ${step / HOUR} h while it serves: what changes counts when it is quiet`, async () => {
      using root = new Temp(versions("1.0.0"));
      const releases = await open(root, { quiet: 0.2 });
      setSystemTime(Date.now() + step);
      root.write(versions("1.0.1"));
      // Nobody can know yet whether more of it comes; by the clock it is old when that is ahead.
      await releases.scan();
      expect(releases.unsettled).toEqual(["1.0.1"]);
      await settle(releases);
      expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1"]);
      // In the middle of a change, back again.
      root.write({ "1.0.1/flash/more.py": "more" });
      await releases.scan();
      setSystemTime();
      await settle(releases);
      expect(paths(releases)).toEqual(["flash/main.py", "flash/more.py"]);
    });
  }

  test("is as it was: what nobody has touched for long counts at the first look", async () => {
    using root = new Temp({ ...versions("1.0.0"), ".build/flash/main.py": "b" });
    const releases = await open(root, { quiet: 0.2 });
    await Bun.sleep(250);
    root.link("1.0.1", ".build");
    await releases.scan();
    expect(versionNames(releases)).toEqual(["1.0.0", "1.0.1"]);
  });
});

describe("long work lets others go first", () => {
  afterEach(() => {
    mock.restore();
  });

  /** Runs work while time passes only as it is asked for: a millisecond each time. */
  async function turnsOf(work: () => Promise<unknown>): Promise<number> {
    let now = performance.now();
    spyOn(performance, "now").mockImplementation(() => (now += 1));
    let turns = 0;
    let isOver = false;
    const count = () => {
      turns++;
      if (!isOver) setImmediate(count);
    };
    setImmediate(count);
    await work();
    isOver = true;
    mock.restore();
    return turns;
  }

  const FILES = 2000;
  /** As many pauses as it takes for ten files at most between two of them. */
  const ENOUGH = FILES / 10;
  const many = (version: string, text: string): Tree =>
    Object.fromEntries(Array.from({ length: FILES }, (_, i) => [`${version}/lib/${i}`, text]));

  test("a scan that finds much, one that finds nothing new, and the warnings", async () => {
    using root = new Temp({ ...many("1.0.0", "1"), "1.0.1/x": "" });
    root.write(many("1.0.1", "2"));
    root.write({ "firmware_1.0.1.bin": "" });
    const opened = Promise.withResolvers<Releases>();
    expect(await turnsOf(async () => opened.resolve(await open(root)))).toBeGreaterThan(2 * ENOUGH);
    const releases = await opened.promise;
    expect(releases.find("1.0.1")!.files.size).toBe(FILES + 1);
    expect(await turnsOf(() => releases.scan())).toBeGreaterThan(2 * ENOUGH);
    expect(await turnsOf(() => allBoardWarnings(releases))).toBeGreaterThan(ENOUGH);
    // Content that is hashed, and sorted, and put together to a release.
    root.write(many("1.0.2", "3"));
    expect(await turnsOf(() => releases.scan())).toBeGreaterThan(6 * ENOUGH);
    expect([...releases.find("1.0.2")!.files.keys()]).toEqual(
      Array.from({ length: FILES }, (_, i) => `lib/${i}`).sort(),
    );
  });

  test("counting what is served beside the releases", async () => {
    using root = new Temp(
      Object.fromEntries(Array.from({ length: 800 }, (_, i) => [`a/${i}`, ""])),
    );
    const releases = await open(root);
    expect(await turnsOf(() => releases.beside())).toBeGreaterThan(80);
  });
});

describe("what may surprise the owner of a root", () => {
  const warnings = async (tree: Tree): Promise<string[]> => {
    using root = new Temp(tree);
    return rootWarnings(await open(root));
  };

  test("nothing in a root without surprises", async () => {
    const tree = { ...versions("1.0.0", "1.0.1", "1.0.10"), "firmware_1.0.1.bin": "" };
    expect(await warnings(tree)).toEqual([]);
  });

  test("a root without releases, and what to put there", async () => {
    using root = new Temp({ "notes/x": "" });
    const lines = rootWarnings(await open(root));
    expect(lines).toHaveLength(1);
    expect(lines[0]).toContain(root.path);
    expect(lines[0]).toContain("1.0.0/flash/main.py");
    expect(lines[0]).toContain("firmware_1.0.0.bin");
  });

  test("a candidate sorts after the release that it was for", async () => {
    for (const name of [
      "1.0.1rc1",
      "1.0.1-beta",
      "1.0.1.dev3",
      "1.0.1a",
      "1.0.1_pre.2",
      "1.0.1RC2",
    ]) {
      const lines = await warnings(versions("1.0.0", "1.0.1", name));
      expect(lines).toHaveLength(1);
      expect(lines[0]).toStartWith(`${name} sorts after 1.0.1:`);
      // And so it does.
      using root = new Temp(versions("1.0.0", "1.0.1", name));
      expect(versionNames(await open(root)).at(-1)).toBe(name);
    }
    expect(await warnings({ "firmware_1.0.1rc1.bin": "" })).toHaveLength(1);
    expect(await warnings(versions("1.0.1-prod", "1.0.0abc", "1.0.0+build"))).toEqual([]);
  });

  test("a name with a v sorts after every name without", async () => {
    const lines = await warnings(versions("1.0.0", "v0.9", "2.0.0"));
    expect(lines).toHaveLength(1);
    expect(lines[0]).toContain("v0.9 sorts after every name without a v");
    expect(await warnings(versions("v1.0.0", "v2.0.0"))).toEqual([]);
    expect(await warnings({ ...versions("1.0.0"), "firmware_v1.0.0.bin": "" })).toHaveLength(1);
  });
});

describe("what boards with Pycom's library cannot do", () => {
  const warnings = async (tree: Tree, query: ManifestQuery): Promise<string[]> => {
    using root = new Temp(tree);
    const releases = await open(root);
    return boardWarnings(releases, releases.manifestFor(query, HOST));
  };

  test("create a directory: every one that a release adds is named", async () => {
    const lines = await warnings(
      {
        "1/flash/lib/a": "",
        "2/flash/lib/a": "",
        "2/flash/lib/b": "",
        "2/flash/net/x/c": "",
        "2/d": "",
      },
      { current_ver: "1" },
    );
    expect(lines).toHaveLength(2);
    expect(lines.join("\n")).toContain("2 adds the directory flash/net;");
    expect(lines.join("\n")).toContain("2 adds the directory flash/net/x;");
  });

  test("survive a cut between deleting and flashing", async () => {
    const tree: Tree = { "1/a": "", "1/b": "", "2/a": "", "firmware_2.bin": "" };
    const lines = await warnings(tree, { current_ver: "1" });
    expect(lines).toHaveLength(1);
    expect(lines[0]).toContain("2 deletes files and ships firmware");
    expect(await warnings(tree, { current_ver: "1", firmware_ver: "2" })).toEqual([]);
    expect(await warnings({ ...tree, "2/b": "" }, { current_ver: "1" })).toEqual([]);
  });

  test("nothing is said of a device that has nothing, or is up to date", async () => {
    const tree: Tree = { "1/a": "", "2/x/b": "", "firmware_2.bin": "" };
    expect(await warnings(tree, {})).toEqual([]);
    expect(await warnings(tree, { current_ver: "2" })).toEqual([]);
    expect(await warnings(tree, { current_ver: "1.5" })).toEqual([]);
    expect(await warnings(tree, { current_ver: "1" })).toHaveLength(2);
  });

  test("all of it, for devices on each version", async () => {
    using root = new Temp({ "1/a": "", "2/a": "", "2/x/b": "", "3/a": "", "3/x/b": "" });
    const lines = await allBoardWarnings(await open(root));
    expect(lines).toHaveLength(1);
    expect(lines[0]).toStartWith("from 1: 3 adds the directory x;");
  });
});

describe("bun ota.ts manifest", () => {
  test("prints what the server would answer, indented; exit code 0", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.1"), "firmware_1.0.1.bin": "x" });
    const { code, stdout, stderr } = await run(["manifest", "--ver", "1.0.0", "--root", root.path]);
    const expected = (await open(root)).manifestFor(
      { current_ver: "1.0.0" },
      "http://127.0.0.1:8000",
    );
    expect(stdout).toBe(`${JSON.stringify(expected, null, 2)}\n`);
    expect(stderr).toBe("");
    expect(code).toBe(0);
  });

  test("--url, --latest, --ignore; the current directory is the root; null when nothing is newer", async () => {
    using root = new Temp({ ...versions("1.0.0", "1.0.1"), "1.0.0/a.md": "" });
    const args = ["--url", "https://cdn.example/x/", "--latest", "1.0.0", "--ignore", "*.md"];
    const first = await ota(["manifest", ...args], { cwd: root.path });
    const manifest: unknown = JSON.parse(first.stdout);
    expect(manifest).toEqual({
      delete: [],
      new: [
        {
          URL: "https://cdn.example/x/1.0.0/flash/main.py",
          dst_path: "/flash/main.py",
          hash: sha1("1.0.0"),
        },
      ],
      previous_version: "0",
      update: [],
      version: "1.0.0",
    });
    const second = await ota(["manifest", "--ver=1.0.1"], { cwd: root.path });
    expect(second).toMatchObject({ code: 0, stdout: "null\n", stderr: "" });
  });

  test("warns on stderr of all that may surprise, and still prints", async () => {
    using root = new Temp({
      ...versions("1.0.0", "1.0.1rc1"),
      "1.0.0/old": "",
      "1.0.1rc1/net/a": "",
      "firmare_v1.bin": "",
    });
    const { code, stdout, stderr } = await ota(["manifest", "--ver", "1.0.0"], { cwd: root.path });
    expect(code).toBe(0);
    const manifest = parseManifest(stdout);
    expect(manifest?.version).toBe("1.0.1rc1");
    const lines = stderr.trimEnd().split("\n");
    expect(lines).toHaveLength(5);
    for (const line of lines) expect(line).toStartWith("warning: ");
    for (const what of [
      "firmare_v1.bin: spelled",
      "1.0.1rc1 sorts after 1.0.1",
      "sorts after every name without a v",
      "adds the directory net",
      "deletes files and ships firmware",
    ]) {
      expect(stderr).toContain(what);
    }
  });

  test("an empty root: null, and a warning that says what to put there", async () => {
    using root = new Temp();
    const { code, stdout, stderr } = await run(["manifest", "--root", root.path]);
    expect([code, stdout]).toEqual([0, "null\n"]);
    expect(stderr).toStartWith("warning: no release in");
  });

  test("usage errors: one line on stderr, nothing on stdout, exit code 2", async () => {
    using root = new Temp();
    const cases: [string[], string][] = [
      [["--root", root.at("missing")], "does not exist"],
      [["--url", "ftp://x"], "--url expects an http(s) address"],
      [["--url", "http://x/?q"], "--url expects an http(s) address"],
      [["--rot", "x"], "did you mean --root?"],
      [["--port", "1"], "no option --port"],
      [["--ver"], "--ver needs a value"],
      [["1.0.0"], "takes no argument 1.0.0"],
    ];
    const ends = await Promise.all(
      cases.map(([args]) => ota(["manifest", ...args], { cwd: root.path })),
    );
    for (const [i, { code, stdout, stderr }] of ends.entries()) {
      expect([code, stdout]).toEqual([2, ""]);
      expect(stderr).toContain(cases[i]![1]);
      expect(stderr).toMatch(/^ota\.ts: .*\n$/);
    }
  });
});

// ── Random trees: the manifest between two of them makes one from the other. ──

const PARTS = ["a", "b c.py", "#?%", "\u{1f680}", "\ufb01", ".x", "%41"];

/** A few files with random paths, among which no file is below another; some are as before. */
function randomTree(random: Random, before = new Map<string, Uint8Array>()): typeof before {
  // Few contents, so that some stay the same.
  const content = () => bytesOf(random.pick(["", "one", "two", "\0\r\n\r\n\xff"]));
  const kept = [...before].filter(() => random.chance(0.6));
  const tree = new Map(kept.map(([path, old]) => [path, random.chance(0.5) ? content() : old]));
  for (let files = random.below(6); files > 0; files--) {
    const length = 1 + random.below(3);
    const path = Array.from({ length }, () => random.pick(PARTS)).join("/");
    const clashes = (other: string) =>
      other === path || other.startsWith(`${path}/`) || path.startsWith(`${other}/`);
    if (![...tree.keys()].some(clashes)) tree.set(path, content());
  }
  return tree;
}

/** Does to a directory what a manifest says, strictly: what is new is not there, and so on. */
function apply(manifest: Manifest, device: string, served: string): void {
  for (const path of manifest.delete) fs.unlinkSync(`${device}/${path}`);
  // A directory that is left empty may stand where a file comes.
  for (const path of manifest.delete) {
    let directory = dirname(`${device}/${path}`);
    for (; directory !== device && fs.existsSync(directory); directory = dirname(directory)) {
      if (fs.readdirSync(directory).length > 0) break;
      fs.rmdirSync(directory);
    }
  }
  for (const list of ["new", "update"] as const) {
    for (const { URL: url, dst_path, hash, sha256: hash256, size } of manifest[list]) {
      const content = fs.readFileSync(served + decodeURIComponent(new URL(url).pathname));
      if (sha1(content) !== hash || sha256(content) !== hash256 || content.length !== size) {
        throw new Error(`${url} is not what the manifest says`);
      }
      const file = device + dst_path;
      if (fs.existsSync(file) !== (list === "update")) throw new Error(`${dst_path}: not ${list}`);
      if (list === "update" && content.equals(fs.readFileSync(file))) {
        throw new Error(`${dst_path} is the same already`);
      }
      fs.mkdirSync(dirname(file), { recursive: true });
      fs.writeFileSync(file, content);
    }
  }
}

test("random trees: the manifest from A to B makes B from A, and all of B from nothing", async () => {
  const random = new Random(SEED);
  const totals = { delete: 0, new: 0, update: 0 };
  for (let run = 0; run < 100; run++) {
    const before = randomTree(random);
    const after = randomTree(random, before);
    using root = new Temp({ "1.0.0/": "", "1.0.1/": "" });
    using device = new Temp();
    for (const [path, content] of before) root.write({ [`1.0.0/${path}`]: content });
    for (const [path, content] of after) root.write({ [`1.0.1/${path}`]: content });
    device.write(Object.fromEntries(before));
    const releases = await open(root);
    const base = releaseDigest([...before].map(([path, content]) => [path, sha256(content)]));
    const check = (manifest: Manifest, directory: string): void => {
      // As a device reads it: what the server makes must pass.
      const read = parseManifest(JSON.stringify(manifest), "1.0.0");
      if (read === null) throw new Error("expected a manifest");
      apply(read, directory, root.path);
      expect(filesBelow(directory)).toEqual(
        new Map([...after].sort(([a], [b]) => (a < b ? -1 : 1))),
      );
    };
    try {
      const difference = await manifestFor(releases, {
        current_ver: "1.0.0",
        hash: "sha256",
        base,
      });
      check(difference, device.path);
      for (const list of ["delete", "new", "update"] as const)
        totals[list] += difference[list].length;
      using blank = new Temp();
      check(await manifestFor(releases, { current_ver: "0.1", hash: "sha256" }), blank.path);
    } catch (error) {
      throw new Error(
        `run ${run}: ${Bun.inspect([...before.keys()])} to ${Bun.inspect([...after.keys()])}`,
        {
          cause: error,
        },
      );
    }
  }
  // Every kind of change was there.
  for (const total of Object.values(totals)) expect(total).toBeGreaterThan(10);
});
