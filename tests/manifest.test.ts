/**
 * What a device takes for a manifest, and what it refuses before anything is touched; and the two
 * digests. Random manifests follow the chosen ones: set SEED to repeat a run.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { posix, win32 } from "node:path";
import type { Manifest } from "../ota.ts";
import {
  MAX_MANIFEST_BYTES,
  OTAError,
  parseManifest,
  releaseDigest,
  targetDigest,
  targetOf,
} from "../ota.ts";
import { Random, seeded } from "./helpers/random.ts";

setDefaultTimeout(600_000);

const SEED = seeded("manifest");

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Fields = { [key: string]: Json };

const SHA1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
const OTHER_SHA1 = "2fd4e1c67a2d28fced849ee1bb76e7391b93eb12";
const SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const HOST = "http://10.0.0.1:8000";

const entry = (path: string, more: Fields = {}): Fields => ({
  URL: `${HOST}/1.0.1${path.startsWith("/") ? "" : "/"}${path}`,
  dst_path: path,
  hash: SHA1,
  ...more,
});

/** A manifest that is right, with some fields changed; `undefined` leaves one out. */
function manifest(changes: { [key: string]: Json | undefined } = {}): string {
  return JSON.stringify({ delete: [], new: [], update: [], version: "1.0.1", ...changes });
}

function accepted(body: string | Uint8Array, current?: string): Manifest {
  const parsed = parseManifest(body, current);
  if (parsed === null) throw new Error("expected a manifest, found null");
  return parsed;
}

/** The text of the refusal. */
function refusal(body: string | Uint8Array, current?: string): string {
  let parsed: Manifest | null;
  try {
    parsed = parseManifest(body, current);
  } catch (error) {
    if (error instanceof OTAError) return error.message;
    throw error;
  }
  throw new Error(`expected a refusal, found ${JSON.stringify(parsed)}`);
}

describe("a device accepts", () => {
  test("null: there is nothing newer", () => {
    expect(parseManifest("null")).toBeNull();
    expect(parseManifest(" null\n", "1.0.0")).toBeNull();
    expect(parseManifest(new TextEncoder().encode("null"))).toBeNull();
  });

  test("what Pycom's server sends: no size, no previous_version, firmware without a version", () => {
    const body = `{"delete": ["flash/old.py"],
      "firmware": {"URL": "http://192.168.1.140:8000/firmware_1.0.1b.bin", "hash": "${OTHER_SHA1}"},
      "new": [{"URL": "http://192.168.1.140:8000/1.0.1/flash/lib/new lib.py",
               "dst_path": "/flash/lib/new lib.py", "hash": "${SHA1}"}],
      "update": [{"URL": "http://192.168.1.140:8000/1.0.1/flash/main.py",
                  "dst_path": "flash/main.py", "hash": "${SHA1.toUpperCase()}"}],
      "version": "1.0.1"}`;
    expect(parseManifest(body, "1.0.0")).toEqual({
      delete: ["flash/old.py"],
      firmware: {
        URL: "http://192.168.1.140:8000/firmware_1.0.1b.bin",
        hash: OTHER_SHA1,
        version: "1.0.1b",
      },
      new: [
        {
          URL: "http://192.168.1.140:8000/1.0.1/flash/lib/new%20lib.py",
          dst_path: "/flash/lib/new lib.py",
          hash: SHA1,
        },
      ],
      update: [
        {
          URL: "http://192.168.1.140:8000/1.0.1/flash/main.py",
          dst_path: "/flash/main.py",
          hash: SHA1,
        },
      ],
      version: "1.0.1",
    });
  });

  test("all that our server adds", () => {
    const sent: Manifest = {
      base: SHA256,
      delete: ["sd/a", "sd/b c"],
      firmware: {
        URL: `${HOST}/firmware_2.bin`,
        hash: SHA1,
        sha256: SHA256,
        size: 0,
        version: "2",
      },
      full: true,
      new: [
        {
          URL: "https://cdn/1.0.1/sd/%F0%9F%9A%80",
          dst_path: "/sd/\u{1f680}",
          executable: true,
          hash: SHA1,
          sha256: SHA256,
          size: 0,
        },
      ],
      previous_version: "what the device said \u{1f680}",
      request_id: "7",
      update: [],
      version: "1.0.1",
    };
    expect(parseManifest(JSON.stringify(sent))).toEqual(sent);
    expect(parseManifest(new TextEncoder().encode(JSON.stringify(sent)))).toEqual(sent);
  });

  test("entries without SHA-1 and URL, which then follows from the path; contents in them", () => {
    const base64 = Buffer.from(SHA256, "hex").toString("base64");
    const body = manifest({
      firmware: { sha256: base64, size: 7, version: "2.0+b", content: "AAAA", coding: "new" },
      new: [{ dst_path: "/flash/a b/é.py", sha256: base64, size: 3, text: "é\n" }],
      update: [{ dst_path: "main.py", sha256: SHA256, size: 0, executable: true }],
    });
    expect(accepted(body)).toMatchObject({
      firmware: {
        URL: "/firmware_2.0%2Bb.bin",
        ...{ sha256: SHA256, size: 7, version: "2.0+b", content: "AAAA", coding: "new" },
      },
      new: [
        {
          URL: "/1.0.1/flash/a%20b/%C3%A9.py",
          ...{ dst_path: "/flash/a b/é.py", sha256: SHA256, size: 3, text: "é\n" },
        },
      ],
      update: [{ URL: "/1.0.1/main.py", dst_path: "/main.py", sha256: SHA256, executable: true }],
    });
  });

  test("fields that it does not know, and drops them", () => {
    const body = manifest({
      new: [entry("/a", { mode: 0o755 })],
      target_version: "9",
      constructor: {},
    });
    const parsed = accepted(body);
    expect(Object.keys(parsed).sort()).toEqual(["delete", "new", "update", "version"]);
    expect(Object.keys(parsed.new[0]!).sort()).toEqual(["URL", "dst_path", "hash"]);
  });

  test("its own version, also in another spelling: firmware alone is such a manifest", () => {
    expect(accepted(manifest(), "1.0.1").version).toBe("1.0.1");
    expect(accepted(manifest({ version: "1.00.1" }), "1.0.1").version).toBe("1.00.1");
    expect(accepted(manifest({ version: "0" }), "").version).toBe("0");
  });

  test("the version of firmware from its name, in both spellings and percent-encoded", () => {
    const version = (file: string) =>
      accepted(manifest({ firmware: { URL: `${HOST}/x/${file}`, hash: SHA1 } })).firmware?.version;
    expect(version("firmware_1.0.1.bin")).toBe("1.0.1");
    expect(version("firmare_v2.bin")).toBe("v2");
    expect(version("firmware_1.0.1%2Bbuild.bin?token=1#x")).toBe("1.0.1+build");
  });

  test("the version that is sent with firmware, before that in its name", () => {
    const firmware = { URL: `${HOST}/firmware_1.bin`, hash: SHA1, version: "3" };
    expect(accepted(manifest({ firmware })).firmware?.version).toBe("3");
    const cdn = { URL: "https://cdn/blob/77", hash: SHA1, version: "3" };
    expect(accepted(manifest({ firmware: cdn })).firmware?.version).toBe("3");
  });

  test("a file that becomes a directory, and a directory that becomes a file", () => {
    const toDirectory = accepted(manifest({ delete: ["lib"], new: [entry("/lib/a.py")] }));
    expect(toDirectory.delete).toEqual(["lib"]);
    expect(toDirectory.new[0]!.dst_path).toBe("/lib/a.py");
    const toFile = accepted(manifest({ delete: ["lib/x/a.py"], new: [entry("/lib")] }));
    expect(toFile.delete).toEqual(["lib/x/a.py"]);
    expect(toFile.new[0]!.dst_path).toBe("/lib");
  });

  test("names that only look bad", () => {
    const good = [
      "..a",
      "a..",
      "...",
      "a/.ota",
      ".otax",
      "ota",
      ".otadata/x",
      "a b",
      " ",
      "%2e%2e",
    ];
    good.push("flash/~", "a:b", "\u{1f680}", "e\u0301", "-", "--root", ".hidden", "x".repeat(255));
    for (const path of good) {
      expect(accepted(manifest({ new: [entry(path)] })).new[0]!.dst_path).toBe(`/${path}`);
      expect(accepted(manifest({ delete: [path] })).delete).toEqual([path]);
    }
    expect(accepted(manifest({ new: [entry("a"), entry("a.py"), entry("b/a")] })).new).toHaveLength(
      3,
    );
  });

  test("exactly 64 MiB of JSON", () => {
    expect(MAX_MANIFEST_BYTES).toBe(64 * 1024 * 1024);
    const body = new Uint8Array(MAX_MANIFEST_BYTES).fill(0x20);
    body.set(new TextEncoder().encode("null"));
    expect(parseManifest(body)).toBeNull();
  });

  test("flash/OTA_VERSION.py, which it writes itself, and drops it from every list", () => {
    const own = "flash/OTA_VERSION.py";
    const kept = entry("/flash/OTA_VERSION.pyc");
    expect(accepted(manifest({ new: [entry(`/${own}`), kept] })).new).toHaveLength(1);
    expect(accepted(manifest({ update: [entry(own), kept] })).update).toHaveLength(1);
    expect(accepted(manifest({ delete: [own, "x"] })).delete).toEqual(["x"]);
    expect(accepted(manifest({ new: [entry("/sd/OTA_VERSION.py")] })).new).toHaveLength(1);
  });
});

describe("a device refuses", () => {
  test("an empty body", () => {
    expect(refusal("")).toContain("empty body");
    expect(refusal(new Uint8Array())).toContain("empty body");
  });

  test("more than 64 MiB, counted in bytes", () => {
    const body = new Uint8Array(MAX_MANIFEST_BYTES + 1).fill(0x20);
    body.set(new TextEncoder().encode("null"));
    expect(refusal(body)).toContain(`${MAX_MANIFEST_BYTES + 1} bytes`);
    // Two bytes each: half as many characters.
    expect(refusal(`"${"\u00e9".repeat(MAX_MANIFEST_BYTES / 2)}"`)).toContain("bytes");
  });

  test("what is no JSON: a page of an access point, half a manifest, a depth without end", () => {
    const whole = manifest({ new: [entry("/a")] });
    const deep = "[".repeat(3_000_000);
    for (const body of ["<html>", " ", "{", "nul", whole.slice(0, -1), `${whole}x`, deep]) {
      expect(refusal(body)).toContain("not JSON");
    }
  });

  test("JSON that is no object", () => {
    for (const body of ["[]", "1", '"1.0.1"', "true", "[null]"]) {
      expect(refusal(body)).toContain("not a JSON object");
    }
  });

  const bad: Json[] = [null, false, 0, 1.5, "", "text", [], [1], {}, { length: 1 }];
  const isText = (value: Json) => typeof value === "string";
  const wrongTypes: [string, (value: Json) => string, (value: Json) => boolean][] = [
    ["delete", (value) => manifest({ delete: value }), (v) => Array.isArray(v) && !v.length],
    ["new", (value) => manifest({ new: value }), (v) => Array.isArray(v) && !v.length],
    ["update", (value) => manifest({ update: value }), (v) => Array.isArray(v) && !v.length],
    ["version", (value) => manifest({ version: value }), () => false],
    ["firmware", (value) => manifest({ firmware: value }), () => false],
    ["full", (value) => manifest({ full: value }), (v) => v === false],
    ["previous_version", (value) => manifest({ previous_version: value }), isText],
    ["request_id", (value) => manifest({ request_id: value }), isText],
    ["base", (value) => manifest({ base: value }), () => false],
    ["delete[0]", (value) => manifest({ delete: [value] }), (v) => v === "text"],
    ["new[0]", (value) => manifest({ new: [value] }), () => false],
    ["update[0]", (value) => manifest({ update: [value] }), () => false],
    ["new[0].URL", (v) => manifest({ new: [entry("/a", { URL: v })] }), () => false],
    [
      "new[0].dst_path",
      (v) => manifest({ new: [entry("/", { dst_path: v })] }),
      (v) => v === "text",
    ],
    ["new[0].hash", (v) => manifest({ new: [entry("/a", { hash: v })] }), () => false],
    ["new[0].sha256", (v) => manifest({ new: [entry("/a", { sha256: v })] }), () => false],
    ["new[0].size", (v) => manifest({ new: [entry("/a", { size: v })] }), (v) => v === 0],
    [
      "new[0].executable",
      (v) => manifest({ new: [entry("/a", { executable: v })] }),
      (v) => v === false,
    ],
    [
      "firmware.version",
      (v) => manifest({ firmware: { URL: `${HOST}/firmware_1.bin`, hash: SHA1, version: v } }),
      () => false,
    ],
  ];
  for (const [name, make, isFine] of wrongTypes) {
    test(`a wrong type of ${name}`, () => {
      for (const value of bad) {
        if (isFine(value)) expect(accepted(make(value)).version).toBe("1.0.1");
        else expect(refusal(make(value))).toContain(name.replace(/\[0\].*|\..*/, ""));
      }
    });
  }

  for (const name of ["delete", "new", "update", "version"]) {
    test(`a manifest without ${name}`, () => {
      expect(refusal(manifest({ [name]: undefined }))).toContain(name);
    });
  }

  const outside = {
    "leaves the root": [
      "..",
      "../x",
      "a/../../x",
      "a/..",
      "flash/../../../etc/passwd",
      "./..",
      "../",
    ],
    "is not normal": [".", "./a", "a/.", "a/./b", "a//b", "a/", "//a", "///etc/passwd", "a/b/"],
    "is a path of Windows": ["..\\x", "a\\..\\..\\x", "\\x", "C:\\x", "a\\b", "\\\\host\\share"],
    "has a control character": [
      "a\0b",
      "a\u0000/../x",
      "a\nb",
      "\r",
      "a\tb",
      "a\u007f",
      "\u001b[2J",
    ],
    "is empty": ["", "/"],
    "is longer than a file system takes": ["x".repeat(256), "\u00e9".repeat(128), "a/".repeat(600)],
  };
  for (const [what, paths] of Object.entries(outside)) {
    test(`a path that ${what}`, () => {
      for (const path of paths) {
        const shown = JSON.stringify(path.replace(/^\//, ""));
        expect(refusal(manifest({ new: [entry(path)] }))).toContain(shown);
        expect(refusal(manifest({ update: [entry(path)] }))).toContain(shown);
        expect(refusal(manifest({ new: [entry(`/${path}`)] }))).toContain("new[0].dst_path");
        expect(refusal(manifest({ delete: [path] }))).toContain("delete[0]");
      }
    });
  }

  test("an absolute path to delete", () => {
    expect(refusal(manifest({ delete: ["/flash/main.py"] }))).toContain("delete[0]");
    expect(refusal(manifest({ delete: ["/etc/passwd"] }))).toContain("delete[0]");
  });

  test("the updater's own files, in any case and with what FAT drops", () => {
    const own = [
      ".ota",
      ".ota/state.json",
      ".OTA/x",
      ".oTa",
      ".ota.",
      ".ota...",
      ".ota ",
      ".Ota. ./x",
    ];
    for (const path of own) {
      expect(refusal(manifest({ new: [entry(path)] }))).toContain("enters .ota");
      expect(refusal(manifest({ update: [entry(`/${path}`)] }))).toContain("enters .ota");
      expect(refusal(manifest({ delete: [path] }))).toContain("enters .ota");
    }
  });

  test("half a surrogate pair: on disk all of them are the same name", () => {
    for (const path of ["a\ud800", "\udc00", "x/\ud83d/y"]) {
      refusal(manifest({ new: [entry(path)] }));
      refusal(manifest({ delete: [path] }));
    }
  });

  test("a path that is listed twice, with or without the slash", () => {
    const cases: Fields[] = [
      { new: [entry("/a"), entry("/a")] },
      { new: [entry("/a"), entry("a")] },
      { update: [entry("/a"), entry("/a", { hash: OTHER_SHA1 })] },
      { new: [entry("/a")], update: [entry("a")] },
    ];
    for (const lists of cases) expect(refusal(manifest(lists))).toContain("/a is listed twice");
  });

  test("a file below another file", () => {
    const cases: Fields[] = [
      { new: [entry("/a"), entry("/a/b")] },
      { new: [entry("/a/b/c"), entry("a")] },
      { update: [entry("/a/b")], new: [entry("/a")] },
      { update: [entry("/a/b"), entry("a/b/c/d")] },
    ];
    for (const lists of cases) expect(refusal(manifest(lists))).toContain("is below");
  });

  test("a path that is both deleted and written", () => {
    expect(refusal(manifest({ delete: ["a/b"], new: [entry("/a/b")] }))).toContain("a/b is both");
    expect(refusal(manifest({ delete: ["x", "a"], update: [entry("a")] }))).toContain("a is both");
  });

  test("a hash that is no hash", () => {
    const hashes = [
      SHA1.slice(1),
      `${SHA1}0`,
      `${SHA1.slice(1)}g`,
      ` ${SHA1}`,
      `${SHA1}\n`,
      SHA256,
    ];
    for (const hash of hashes) {
      expect(refusal(manifest({ new: [entry("/a", { hash })] }))).toContain("new[0].hash");
      const firmware = { URL: `${HOST}/firmware_1.bin`, hash };
      expect(refusal(manifest({ firmware }))).toContain("firmware.hash");
    }
    for (const sha256 of [SHA1, SHA256.slice(1), `${SHA256}0`, `${SHA256.slice(1)}g`]) {
      expect(refusal(manifest({ update: [entry("/a", { sha256 })] }))).toContain("sha256");
      const firmware = { URL: `${HOST}/firmware_1.bin`, hash: SHA1, sha256 };
      expect(refusal(manifest({ firmware }))).toContain("sha256");
    }
  });

  test("an entry without SHA-1 or URL that cannot do without", () => {
    const whole: Fields = { dst_path: "/a", sha256: SHA256, size: 1 };
    const { sha256: _, ...unhashed } = whole;
    const { size: __, ...unsized } = whole;
    for (const item of [unhashed, unsized]) {
      expect(refusal(manifest({ new: [item] }))).toContain("new[0].URL");
      expect(refusal(manifest({ new: [{ ...item, URL: `${HOST}/a` }] }))).toContain("new[0].hash");
    }
    const { dst_path: ___, ...unversioned } = whole;
    expect(refusal(manifest({ firmware: unversioned }))).toContain("firmware: no version");
  });

  test("content that is no text, and a SHA-256 that is none in base64 either", () => {
    const whole: Fields = { dst_path: "/a", sha256: SHA256, size: 1 };
    for (const name of ["text", "content", "coding"]) {
      for (const value of [null, 7, false, [], {}]) {
        const body = manifest({ update: [{ ...whole, [name]: value }] });
        expect(refusal(body)).toContain(`update[0].${name}: not a string`);
      }
    }
    const base64 = Buffer.from(SHA256, "hex").toString("base64");
    const wrong = [base64.slice(0, -1), `${base64}=`, ` ${base64}`, base64.replace("4", "!"), ""];
    for (const sha256 of wrong) {
      expect(refusal(manifest({ new: [{ ...whole, sha256 }] }))).toContain("new[0].sha256");
    }
  });

  test("a size that no file has", () => {
    for (const size of [-1, 0.5, 2 ** 53, 1e300, "1", true]) {
      expect(refusal(manifest({ new: [entry("/a", { size })] }))).toContain("new[0].size");
    }
  });

  test("a version that is no release name: it is written into Python source", () => {
    const versions = [
      "",
      "x",
      "1'",
      '1"',
      "1\\",
      "1\n",
      "1 ",
      " 1",
      "../1",
      "1/2",
      "\u0661",
      "1\u0661",
    ];
    versions.push("1.bak", "1.0.TMP", "-1", ".1", "vv1", "1'\nimport os#", "1".repeat(129));
    for (const version of versions) {
      expect(refusal(manifest({ version }))).toContain("version");
      const firmware = { URL: `${HOST}/firmware_1.bin`, hash: SHA1, version };
      expect(refusal(manifest({ firmware }))).toContain("firmware");
    }
  });

  test("firmware of which no version can be known", () => {
    for (const file of ["appimg.bin", "firmware_.bin", "firmware_x.bin", "firmware_1.img", ""]) {
      const firmware = { URL: `${HOST}/${file}`, hash: SHA1 };
      expect(refusal(manifest({ firmware }))).toContain("firmware: no version");
    }
  });

  test("a version that is older than its own", () => {
    expect(refusal(manifest({ version: "1.0.9" }), "1.0.10")).toContain(
      "older than the device's 1.0.10",
    );
    expect(refusal(manifest({ version: "1.0" }), "1.0.0")).toContain("older");
    expect(refusal(manifest({ version: "2.0.0" }), "v1.0.0")).toContain("older");
  });

  test("an address that is not http(s)", () => {
    const urls = [
      "ftp://h/a",
      "file:///etc/passwd",
      "javascript:1",
      "data:,x",
      "/1.0.1/a",
      "a",
      "",
    ];
    urls.push("http://", "https:", "//host/a", "http://a b/", "http://h:99999/", "httpx://h/");
    for (const URL of urls) {
      expect(refusal(manifest({ new: [entry("/a", { URL })] }))).toContain("new[0].URL");
      const firmware = { URL, hash: SHA1, version: "1" };
      expect(refusal(manifest({ firmware }))).toContain("firmware.URL");
    }
  });

  test("with an error of exit code 1 that says what was found", () => {
    const shown = () => parseManifest(manifest({ delete: ["../x"] }));
    expect(shown).toThrow(OTAError);
    expect(shown).toThrow('refused the manifest: delete[0]: the path "../x" has a part ".."');
    expect(new OTAError("").exitCode).toBe(1);
  });
});

/** Values that a hostile or broken server might put anywhere. */
const NASTY: readonly Json[] = [
  ...[null, true, false, 0, -1, 0.5, 1e308, 2 ** 53, "", " ", "null", [], {}, [[]], { a: {} }],
  ...["..", "../x", "/..", "a/../../b", "./", "//", "\\..\\x", "C:\\x", "\0", "a\0b", "\ud800"],
  ...[".ota", "/.OTA/x", ".ota./", "flash/OTA_VERSION.py", "a", "a/b", "a/b/c", "/a", "b", "b/c"],
  ...["1.0.1", "v2", "1'", "1.bak", SHA1, SHA256, `${HOST}/firmware_2.bin`, "file:///etc/passwd"],
  ...["__proto__", "constructor", "toString", "x".repeat(300), "\u{1f680}", "%2e%2e/x"],
];

function randomManifest(random: Random): Fields {
  const path = () =>
    Array.from({ length: 1 + random.below(3) }, () => random.pick(["a", "b", "c"]));
  const list = () =>
    Array.from({ length: random.below(4) }, () => {
      const slash = random.pick(["", "/"]);
      return entry(slash + path().join("/"), random.chance(0.5) ? { sha256: SHA256, size: 1 } : {});
    });
  const firmware = { URL: `${HOST}/firmware_2.bin`, hash: SHA1 };
  return {
    delete: Array.from({ length: random.below(3) }, () => path().join("/")),
    ...(random.chance(0.5) && { firmware }),
    ...(random.chance(0.3) && { full: true }),
    ...(random.chance(0.3) && {
      signed: { payload: "e30=", payloadType: "x", signatures: [{ keyid: "k", sig: "AA==" }] },
    }),
    new: list(),
    update: list(),
    version: random.pick(["1.0.1", "2", "v3"]),
  };
}

/** Replaces, drops, adds or doubles something somewhere. */
function mutated(value: Json, random: Random): Json {
  if (typeof value !== "object" || value === null || random.chance(0.1)) return random.pick(NASTY);
  if (Array.isArray(value)) {
    const at = random.below(value.length + 1);
    const here = value[at];
    if (here === undefined) return [...value, random.pick(NASTY)];
    const choice = random.below(4);
    const instead = choice === 0 ? [] : choice === 1 ? [here, here] : [mutated(here, random)];
    return value.toSpliced(at, 1, ...instead);
  }
  const keys = Object.keys(value);
  const key = keys.length === 0 || random.chance(0.05) ? "constructor" : random.pick(keys);
  const { [key]: here = null, ...rest } = value;
  return random.chance(0.1) ? rest : { ...rest, [key]: mutated(here, random) };
}

/** JSON text with a few bytes changed, dropped or added. */
function scratched(text: string, random: Random): Uint8Array {
  const bytes = [...new TextEncoder().encode(text)];
  for (let times = 1 + random.below(3); times > 0; times--) {
    const added = random.chance(0.7) ? [random.chance(0.5) ? random.below(256) : 0x2e] : [];
    bytes.splice(random.below(bytes.length), random.below(2), ...added);
  }
  return new Uint8Array(bytes);
}

test("random manifests: refused with an OTAError, or no path in them leaves the root", () => {
  const random = new Random(SEED);
  let taken = 0;
  let refused = 0;
  for (let run = 0; run < 20_000; run++) {
    let json: Json = randomManifest(random);
    for (let times = random.below(3); times > 0; times--) json = mutated(json, random);
    const text = JSON.stringify(json);
    const body = random.chance(0.3) ? scratched(text, random) : text;
    let parsed: Manifest | null;
    try {
      parsed = parseManifest(body, random.pick(["", "1.0.0", "1.0.1"]));
    } catch (error) {
      if (!(error instanceof OTAError)) throw new Error(`run ${run}: ${text}`, { cause: error });
      refused++;
      continue;
    }
    if (parsed === null) continue;
    taken++;
    const wrong = problems(parsed);
    if (wrong.length > 0) throw new Error(`run ${run}: ${text} gives ${wrong.join(", ")}`);
  }
  // Both outcomes are common, else this would show nothing.
  expect(taken).toBeGreaterThan(2000);
  expect(refused).toBeGreaterThan(2000);
});

/** What is wrong with a manifest that was let through, found in another way than `ota.ts` does. */
function problems(parsed: Manifest): string[] {
  const found: string[] = [];
  const entries = [...parsed.new, ...parsed.update];
  const written = entries.map(({ dst_path }) => dst_path);
  if (written.some((path) => !path.startsWith("/"))) found.push("a dst_path without a slash");
  for (const path of [...parsed.delete, ...written.map((path) => path.slice(1))]) {
    const shown = JSON.stringify(path);
    if (posix.resolve("/device", path) !== `/device/${path}`) found.push(`${shown} leaves`);
    const windows = win32.join("C:\\device", path);
    if (windows !== `C:\\device\\${path.replaceAll("/", "\\")}`) found.push(`${shown} leaves`);
    if (/^\.ota[. ]*(\/|$)/i.test(path)) found.push(`${shown} is the updater's`);
    if (path === "flash/OTA_VERSION.py") found.push(`${shown} is the device's`);
    if ([...path].some((character) => character < " ")) found.push(`${shown} has a control`);
    if (!path.isWellFormed()) found.push(`${shown} is no text`);
  }
  if (new Set(written).size < written.length) found.push("a path twice");
  for (const path of written) {
    if (parsed.delete.includes(path.slice(1))) found.push(`${path} deleted, too`);
    if (written.some((other) => other.startsWith(`${path}/`))) found.push(`files below ${path}`);
  }
  for (const { URL, hash, sha256 } of [...entries, ...(parsed.firmware ? [parsed.firmware] : [])]) {
    // A path below the server's address stands for a URL that was left out.
    if (!/^(https?:\/)?\/[^/]/.test(URL)) found.push(`address ${URL}`);
    if (hash !== undefined && !/^[0-9a-f]{40}$/.test(hash)) found.push(`hash ${hash}`);
    if (sha256 !== undefined && !/^[0-9a-f]{64}$/.test(sha256)) found.push(`sha256 ${sha256}`);
  }
  const versions = [parsed.version, ...(parsed.firmware ? [parsed.firmware.version ?? ""] : [])];
  for (const version of versions) {
    if (!/^[vV]?[0-9][0-9A-Za-z.+_-]*$/.test(version)) found.push(`version ${version}`);
  }
  return found;
}

describe("the digest of a release", () => {
  /*
   * Made with coreutils. Each row is a path and `printf CONTENT | sha256sum`; then, with LC_ALL=C:
   *
   *     sort -t"$TAB" -k1,1 rows | while IFS="$TAB" read -r path hash
   *     do printf '%s\0%s\n' "$path" "$hash"; done | sha256sum
   */
  const rows: [string, string][] = [
    ["flash/main.py", "cc42155088fca5730758db72b2a5bca33112a941dfaa2d43098ec422ce4ea213"],
    ["flash/lib/\u{1f680}.py", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"],
    ["flash/lib/\ufb01.py", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"],
    ["flash/lib.py", "a1fce4363854ff888cff4b8e7875d600c2682390412a8cf79b37d0b11148b0fa"],
    ["sd/a b.txt", "594e519ae499312b29433b7dd8a97ff068defcba9755b6d5d00e84c524d67b06"],
  ];
  const DIGEST = "c3717ff98810eca13018ea6ec6ef55ec55081998d5751e779717b40b3fe98ce7";

  test("is what sha256sum makes of the sorted lines, U+FB01 before U+1F680", () => {
    expect(releaseDigest(rows)).toBe(DIGEST);
  });

  test("does not depend on the order in which files are given, nor on what gives them", () => {
    expect(releaseDigest(rows.toReversed())).toBe(DIGEST);
    expect(releaseDigest(new Map(rows))).toBe(DIGEST);
    expect(rows[0]![0]).toBe("flash/main.py");
  });

  test("of no file at all is that of nothing", () => {
    expect(releaseDigest([])).toBe(SHA256);
  });

  test("changes with every path and every content", () => {
    const digests = rows.flatMap(([path, hash], i) => [
      releaseDigest(rows.toSpliced(i, 1)),
      releaseDigest(rows.with(i, [`${path}x`, hash])),
      releaseDigest(rows.with(i, [path, SHA256.replace("e", "f")])),
    ]);
    expect(new Set([...digests, DIGEST]).size).toBe(digests.length + 1);
  });
});

describe("the digest of what a manifest brings", () => {
  const file = (dst_path: string, hash = SHA1) => ({
    URL: `${HOST}/1.0.1${dst_path}`,
    dst_path,
    hash,
  });
  const base: Manifest = {
    delete: ["x", "y"],
    firmware: { URL: `${HOST}/firmware_2.bin`, hash: SHA1, version: "2" },
    new: [file("/a"), file("/b")],
    previous_version: "1.0.0",
    request_id: "1",
    update: [file("/c")],
    version: "1.0.1",
  };
  const recorded = {
    version: "1.0.0",
    previous_version: null,
    files: { x: SHA256, y: SHA256, z: SHA256, c: SHA256 },
  };
  const digestOf = (manifest: Manifest) =>
    targetDigest(targetOf(manifest, recorded, manifest.full ?? false));

  test("does not depend on addresses, request ids, nor the order of lists", () => {
    const moved = (item: Manifest["new"][number]) => ({
      ...item,
      URL: `https://cdn${item.dst_path}?t=9`,
    });
    const again: Manifest = {
      ...base,
      delete: ["y", "x"],
      firmware: { ...base.firmware!, URL: "https://cdn/firmware_2.bin?t=9" },
      new: base.new.map(moved).toReversed(),
      request_id: "2",
      update: base.update.map(moved),
    };
    expect(digestOf(again)).toBe(digestOf(base));
    const { request_id: _, ...without } = base;
    expect(digestOf(without)).toBe(digestOf(base));
  });

  test("is the same of a full list, and whatever the device has", () => {
    const full: Manifest = {
      ...{ delete: [], update: [], full: true, version: "1.0.1", firmware: base.firmware! },
      new: [...base.new, ...base.update, { ...file("/z"), sha256: SHA256 }],
    };
    expect(digestOf(full)).toBe(digestOf(base));
    expect(targetDigest(targetOf(full, undefined, true))).toBe(digestOf(base));
  });

  test("changes with the version, any path, any content, any mode and any deletion", () => {
    const others: Manifest[] = [
      { ...base, version: "1.0.2" },
      { ...base, delete: ["x"] },
      { ...base, delete: ["x", "z"] },
      { ...base, new: [file("/a"), file("/d")] },
      { ...base, new: [file("/a"), file("/b", OTHER_SHA1)] },
      { ...base, new: [file("/a")] },
      { ...base, update: [file("/c", OTHER_SHA1)] },
      { ...base, update: [{ ...file("/c"), sha256: SHA256 }] },
      { ...base, update: [{ ...file("/c"), executable: true }] },
    ];
    const digests = [base, ...others].map(digestOf);
    expect(new Set(digests).size).toBe(digests.length);
    expect(digests[0]).toMatch(/^[0-9a-f]{64}$/);
  });
});
