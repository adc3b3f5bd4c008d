/**
 * Brief manifests, as `client` asks for them: without what follows from the rest, and with small
 * contents in them. What they say is taken apart by other decoders than the tool's; random releases
 * follow the chosen ones: set SEED to repeat a run.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { createPublicKey } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import * as zlib from "node:zlib";
import { HttpOTA, makeKeys, releaseDigest, type OTAEvent } from "../ota.ts";
import { answerOther, Between } from "./helpers/between.ts";
import { edited, noise, program, sha256 } from "./helpers/content.ts";
import { Double, manifestOf, sendContent } from "./helpers/double.ts";
import { Random, seeded } from "./helpers/random.ts";
import { sendRequest, type ParsedResponse } from "./helpers/raw.ts";
import { asTree, bytesOf, readTree, Temp, type Tree } from "./helpers/temp.ts";
import { run, until } from "./helpers/tool.ts";
import { PATIENT, World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SEED = seeded("brief");

const ALL = "dcz, br, zstd, gzip";
const APP = program(20_000, 1);
const PAGE = Array.from({ length: 150 }, (_, i) => `x${i} = read(${(i * i) % 97})\n`).join("");
const V1: Tree = {
  "flash/app.bin": APP,
  "flash/main.py": PAGE,
  "flash/old.py": "OLD = 1\n",
  "sd/moved.bin": noise(300, 2),
};
const V2: Tree = {
  "flash/app.bin": edited(APP, 3),
  "flash/main.py": `${PAGE}print(x1)\n`,
  "flash/new é%.py": "\ufeffprint('neu – \u{1f680}')\n",
  "flash/empty": "",
  "flash/photo.jpg": noise(2_000, 4),
  "flash/icon": noise(200, 5),
  "sd/elsewhere.bin": V1["sd/moved.bin"]!,
};
const VERSION_2 = { "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" };
const BOTH = { "1.0.0": V1, "1.0.1": V2 };

/** The digest by which a device says what it has. */
const baseOf = (tree: Tree): string =>
  releaseDigest(Object.entries(tree).map(([path, content]) => [path, sha256(content)] as const));

/** What stands in a manifest as it was sent. */
interface SentEntry {
  URL?: string;
  dst_path: string;
  hash?: string;
  sha256: string;
  size: number;
  text?: string;
  content?: string;
  coding?: string;
}
interface SentManifest {
  new: SentEntry[];
  update: SentEntry[];
  firmware?: SentEntry & { version: string };
  version: string;
}

/** A body as it was before it was coded. */
function plain({ headers, body }: ParsedResponse): string {
  const decoders: Record<string, (bytes: Uint8Array) => Buffer> = {
    identity: (bytes) => Buffer.from(bytes),
    gzip: (bytes) => zlib.gunzipSync(bytes),
    zstd: (bytes) => zlib.zstdDecompressSync(bytes),
    br: (bytes) => zlib.brotliDecompressSync(bytes),
  };
  return decoders[headers.get("content-encoding") ?? "identity"]!(body).toString();
}

async function ask(
  { url }: { url: string },
  query: Record<string, string>,
  accepted = ALL,
  host?: string,
): Promise<SentManifest> {
  const headers = { "Accept-Encoding": accepted };
  const target = `/manifest.json?${new URLSearchParams(query)}`;
  const answer = await sendRequest({ url }, target, { headers, ...(host && { host }) });
  if (answer.status !== 200) throw new Error(`${target} was answered with ${answer.status}`);
  return JSON.parse(plain(answer)) as SentManifest;
}

/** The content that an entry carries; `undefined` for none. @param old what the device has there */
function carried(
  { text, content, coding }: SentEntry,
  old?: string | Uint8Array,
): Uint8Array | undefined {
  if (text !== undefined) return Buffer.from(text);
  if (content === undefined) return undefined;
  const bytes = Buffer.from(content, "base64");
  if (coding === "dcz") return zlib.zstdDecompressSync(bytes, { dictionary: Buffer.from(old!) });
  if (coding === "br") return zlib.brotliDecompressSync(bytes);
  if (coding === "zstd") return zlib.zstdDecompressSync(bytes);
  return coding === "gzip" ? zlib.gunzipSync(bytes) : bytes;
}

/** The paths of entries that carry their content, sorted. */
const carrying = ({ new: added, update }: SentManifest): string[] => {
  const full = [...added, ...update].filter((entry) => carried(entry, APP) !== undefined);
  return full.map(({ dst_path }) => dst_path).sort();
};

const proven = { current_ver: "1.0.0", base: baseOf(V1), brief: "1" };

describe("a brief manifest", () => {
  test("has neither SHA-1 nor URLs, and small contents, each as it is or coded as accepted", async () => {
    await using world = await World.with(BOTH);
    for (const accepted of ["dcz", "dcz, br", "dcz, zstd", "dcz, gzip", ALL, "br", "gzip", ""]) {
      const manifest = await ask(world, proven, accepted);
      for (const entry of [...manifest.new, ...manifest.update]) {
        const path = entry.dst_path.slice(1);
        const content = bytesOf(V2[path]!);
        const hash = Buffer.from(sha256(content), "hex").toString("base64");
        expect([entry.URL, entry.hash, entry.sha256, entry.size]).toEqual([
          ...[undefined, undefined, hash, content.length],
        ]);
        const found = carried(entry, V1[path]);
        if (found) expect([path, bytesOf(found)]).toEqual([path, content]);
        if (entry.coding) expect(accepted).toContain(entry.coding);
      }
      // A delta only for who can apply it; never what it has elsewhere, nor what is long.
      const changed = accepted.includes("dcz") ? ["/flash/app.bin", "/flash/main.py"] : [];
      const short = ["/flash/icon", "/flash/new é%.py"];
      const coded = accepted === "" ? [] : ["/flash/main.py"];
      const expected = [...new Set([...changed, ...short, ...coded])].sort();
      expect([accepted, carrying(manifest)]).toEqual([accepted, expected]);
    }
  });

  test("carries contents for a device that has nothing, or proves what it has, and for no other", async () => {
    await using world = await World.with(BOTH);
    const small = ["/flash/icon", "/flash/main.py", "/flash/new é%.py", "/sd/elsewhere.bin"];
    const cases: [query: Record<string, string>, carries: string[]][] = [
      [{}, small],
      [{ current_ver: "" }, small],
      [
        { current_ver: "1.0.0", base: baseOf(V1).toUpperCase() },
        ["/flash/app.bin", "/flash/icon", "/flash/main.py", "/flash/new é%.py"],
      ],
      // It may be anything that it has.
      [{ current_ver: "1.0.0" }, []],
      [{ current_ver: "1.0.0", base: "no digest" }, []],
      [{ current_ver: "1.0.0", base: baseOf({ ...V1, "flash/main.py": "mine" }) }, []],
      [{ current_ver: "0.9", base: baseOf(V1) }, []],
      [{ current_ver: "0.9" }, []],
      [{ base: baseOf(V1) }, []],
      // What it asks for is no content.
      [{ list: "1.0.0" }, []],
      [{ list: "1.0.1", base: baseOf(V1), current_ver: "1.0.0" }, []],
    ];
    for (const [query, carries] of cases) {
      const manifest = await ask(world, { ...query, brief: "1" });
      expect([query, manifest.new.length > 0, carrying(manifest)]).toEqual([query, true, carries]);
    }
    const nothing = await sendRequest(world, "/manifest.json?current_ver=1.0.1&brief=1");
    expect(plain(nothing)).toBe("null");
  });

  test("who does not ask for it sees no difference, not even after others did", async () => {
    const beside = { "firmware_1.0.1.bin": noise(500, 6) };
    await using world = await World.with(BOTH, { beside });
    const queries = [
      "",
      "current_ver=1.0.0",
      `current_ver=1.0.0&hash=sha256&base=${baseOf(V1)}`,
      "list=1.0.0&hash=sha256",
      "current_ver=1.0.0&hash=sha256&reqid=7",
    ];
    const answers = async (more: string) => {
      const found: [string, string, string][] = [];
      for (const query of queries) {
        for (const accepted of ["identity", "gzip", ALL]) {
          const headers = { "Accept-Encoding": accepted };
          const answer = await sendRequest(world, `/manifest.json?${query}${more}`, { headers });
          const bytes = Buffer.from(answer.body).toString("hex");
          found.push([query, answer.headers.get("content-encoding") ?? "identity", bytes]);
        }
      }
      return found;
    };
    const before = await answers("");
    const brief = await answers("&brief=1");
    expect(await answers("")).toEqual(before);
    // Any other value is none.
    expect(await answers("&brief=0")).toEqual(before);
    brief.forEach((one, i) => expect(one[2]).not.toBe(before[i]![2]));
    const first = JSON.parse(Buffer.from(before[3]![2], "hex").toString()) as SentManifest;
    for (const entry of [...first.new, ...first.update]) {
      expect(Object.keys(entry)).toEqual(["URL", "dst_path", "hash"]);
    }
    expect(Object.keys(first.firmware!)).toEqual(["URL", "hash"]);
    // Nor is it coded otherwise than before there were brief ones.
    expect(new Set(before.map(([, coding]) => coding))).toEqual(
      new Set(["identity", "gzip", "zstd"]),
    );
  });

  test("has URLs where they do not follow from the path", async () => {
    const cases: [options: object, beside: Tree, starts: string, ends: string][] = [
      [{ url: "https://cdn.example/fleet" }, {}, "https://cdn.example/fleet/1.0.1/flash/", ""],
      [{ token: "secret" }, {}, "http://device.test/1.0.1/flash/", "?token=secret"],
      [{}, { "firmare_1.0.1.bin": "image" }, "http://device.test/1.0.1/flash/", ""],
    ];
    for (const [options, beside, starts, ends] of cases) {
      await using world = await World.with(BOTH, { ...options, beside });
      const { firmware, update } = await ask(world, { ...proven, token: "secret" });
      expect(update[0]!.URL).toStartWith(starts);
      expect(update[0]!.URL).toEndWith(ends);
      expect(firmware?.URL).toBe(
        "firmare_1.0.1.bin" in beside ? "http://device.test/firmare_1.0.1.bin" : undefined,
      );
    }
  });

  test("is the same whatever the address by which it is asked for", async () => {
    await using world = await World.with(BOTH);
    const [one, other] = ["one.test", "other.test:8000"].map((host) =>
      ask(world, proven, ALL, host),
    );
    expect(await one).toEqual(await other!);
  });

  test("carries firmware against the image that runs, if the server knows it", async () => {
    const [old, now] = [program(30_000, 7), edited(program(30_000, 7), 8)];
    const beside = { "firmware_1.0.0.bin": old, "firmware_1.0.1.bin": now };
    await using world = await World.with(BOTH, { beside });
    const query = { ...proven, firmware_ver: "1.0.0" };
    for (const [runs, isCarried] of [
      [sha256(old), true],
      [sha256("another"), false],
      ["", false],
    ] as const) {
      const { firmware } = await ask(world, { ...query, firmware_sha256: runs });
      const found = carried(firmware!, old);
      expect(found && bytesOf(found)).toEqual(isCarried ? now : undefined);
      expect([firmware!.version, firmware!.URL]).toEqual(["1.0.1", undefined]);
    }
  });

  test("does not grow without limit: who needs 2,000 small files fetches most of them", async () => {
    const many = Object.fromEntries(
      Array.from({ length: 2000 }, (_, i) => [`flash/${i}`, noise(90, i)] as const),
    );
    await using world = await World.with({ "1.0.1": many });
    const manifest = await ask(world, { brief: "1" });
    const contents = manifest.new.filter(({ content }) => content !== undefined);
    expect(contents.length).toBeGreaterThan(50);
    expect(JSON.stringify(contents.map(({ content }) => content)).length).toBeLessThan(17_000);
    const { code } = await world.client(["--jobs", "16"]);
    expect([code, world.tree()]).toEqual([0, asTree({ ...many, ...VERSION_2 })]);
    expect(world.sent.length).toBe(2000 - contents.length);
  });

  test("goes without contents once no more may be coded; the device fetches them", async () => {
    // Enough for one.
    await using world = await World.with(BOTH, { on: "1.0.0", coding: 1e-6 });
    for (const _ of [1, 2]) expect(carrying(await ask(world, proven))).toEqual([]);
    const { code, last } = await world.client();
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1"]);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    expect(world.sent).toContain("/1.0.1/flash/main.py");
  });

  test("carries what the release has now, after it was edited", async () => {
    await using world = await World.with(BOTH);
    const iconOf = (manifest: SentManifest) =>
      manifest.new.find(({ dst_path }) => dst_path === "/flash/icon")!;
    expect(carried(iconOf(await ask(world, proven)))).toEqual(Buffer.from(noise(200, 5)));
    writeFileSync(world.at("releases/1.0.1/flash/icon"), "an icon in words");
    const now = () => ask(world, proven).then(iconOf);
    const { text } = await until("the edit is there", now, ({ size }) => size === 16);
    expect(text).toBe("an icon in words");
  });
});

describe("a device", () => {
  test("that knows what it has makes one request for a small update", async () => {
    const small = { "1.0.0": V1, "1.0.1": { ...V1, "flash/main.py": V2["flash/main.py"]! } };
    await using world = await World.with(small, { on: "1.0.0" });
    await using between = await Between.start(world);
    const { code, last, stderr } = await world.client(["--id", "meter"], between);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1"]);
    expect(world.tree()).toEqual(asTree({ ...small["1.0.1"], ...VERSION_2 }));
    const [{ asked, answer }, ...more] = between.passed as [(typeof between.passed)[0]];
    expect([more, asked.query.get("brief")]).toEqual([[], "1"]);
    const size = bytesOf(V2["flash/main.py"]!).length;
    expect(stderr).toContain(`received ${answer.body.length} bytes for ${size} bytes of content`);
    // One change of a line, all headers included.
    expect(answer.headerLength + answer.body.length).toBeLessThan(450);
    expect((await world.run("rollback")).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...V1, "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n" }));
  });

  test("finds contents without URLs below the address of its server, with a path of its own", async () => {
    await using world = await World.with(BOTH, { on: "1.0.0" });
    const paths: string[] = [];
    const proxy = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: ({ url, headers }) => {
        const { pathname, search } = new URL(url);
        paths.push(pathname);
        if (!pathname.startsWith("/fleet/")) return new Response("lost", { status: 404 });
        return fetch(world.url + pathname.slice("/fleet".length) + search, {
          headers: { "Accept-Encoding": headers.get("accept-encoding")! },
          decompress: false,
        });
      },
    });
    try {
      const server = `http://127.0.0.1:${proxy.port}/fleet/`;
      await new HttpOTA(server, { root: world.root, timeout: PATIENT }).update();
    } finally {
      await proxy.stop(true);
    }
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    expect(paths).toContain("/fleet/1.0.1/flash/photo.jpg");
  });

  test("asks for no brief manifest to repair: most of what is listed is there", async () => {
    await using world = await World.with(BOTH, { on: "1.0.1" });
    writeFileSync(`${world.root}/flash/icon`, "damaged");
    await using between = await Between.start(world);
    expect((await world.client(["--repair"], between)).last).toBe("repaired 1.0.1");
    expect(between.of("/manifest.json").map(({ asked }) => asked.query.has("brief"))).toEqual([
      false,
    ]);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });

  test("takes what is signed at home, and what the server signs, with contents in it", async () => {
    const { key, pub } = makeKeys();
    using temp = new Temp({ key });
    const verify = [createPublicKey(pub)];
    for (const how of ["step", "answer"]) {
      await using world = await World.with(BOTH, { on: "1.0.0" });
      if (how === "step") {
        const signing = await run(["sign", "--root", world.releases, "--key", temp.at("key")]);
        expect(signing.code).toBe(0);
      }
      await world.serve(how === "answer" ? { sign: temp.at("key") } : {});
      await using between = await Between.start(world);
      const options = { root: world.root, timeout: PATIENT, verify };
      expect(await new HttpOTA(between.url, options).update()).toMatchObject({ result: "updated" });
      expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
      expect([how, ...between.content.map(({ asked }) => asked.path)]).toEqual([
        ...[how, "/1.0.1/flash/photo.jpg"],
      ]);
    }
  });

  test("does not take from a stranger what its step does not name, whoever carries it", async () => {
    const { key, pub } = makeKeys();
    await using world = await World.with(BOTH, { on: "1.0.0" });
    world.write({ key, pub });
    await run(["sign", "--root", world.releases, "--key", world.at("key")]);
    await world.serve();
    const evil = Buffer.from("print('evil')\n");
    await using between = await Between.start(world, {
      ask: (headers) => headers.set("accept-encoding", "identity"),
      answer: (passed, connection) => {
        if (passed.asked.path !== "/manifest.json") return false;
        const manifest = JSON.parse(Buffer.from(passed.answer.body).toString()) as SentManifest;
        const hash = new Bun.CryptoHasher("sha256").update(evil).digest("base64");
        const other = { sha256: hash, size: evil.length, text: String(evil) };
        Object.assign(
          manifest.new.find(({ dst_path }) => dst_path === "/flash/icon")!,
          other,
        );
        return answerOther(passed, connection, Buffer.from(JSON.stringify(manifest)));
      },
    });
    const was = world.tree();
    const { code, stderr } = await world.client(["--verify", world.at("pub")], between);
    expect([code, stderr]).toEqual([1, expect.stringContaining("not those of its step")]);
    expect(world.tree()).toEqual(was);
  });
});

describe("content in a manifest that is not what it should be is fetched, once, and nothing else is", () => {
  /** A frame of zstd that says for each four bytes "128 KiB of zeros". */
  const bomb = Buffer.concat([
    Buffer.from("28b52ffd0068", "hex"),
    ...Array.from({ length: 2000 }, (_, i) => {
      const block = Buffer.alloc(4);
      block.writeUIntLE(((128 * 1024) << 3) | (1 << 1) | (i === 1999 ? 1 : 0), 0, 3);
      return block;
    }),
  ]).toString("base64");
  const delta = (now: Uint8Array, old: Uint8Array) =>
    zlib.zstdCompressSync(now, { dictionary: Buffer.from(old) }).toString("base64");
  const kinds: Record<string, (now: Uint8Array, old: Uint8Array) => object> = {
    "other text": () => ({ text: "other" }),
    "other text of the same length": (now) => ({ text: "x".repeat(now.length) }),
    "text that is longer": (now) => ({ text: "x".repeat(now.length + 1) }),
    "half a surrogate pair": () => ({ text: "\ud800" }),
    "no base64": () => ({ content: "!!!!", coding: "zstd" }),
    "base64 with something between": (now) => {
      return { content: `${Buffer.from(now).toString("base64")} ` };
    },
    "other content": () => ({ content: btoa("other") }),
    nothing: () => ({ content: "" }),
    "a coding that nobody knows": (now) => {
      return { content: Buffer.from(now).toString("base64"), coding: "rot13" };
    },
    "a coding that is no coding": (now) => {
      return { content: Buffer.from(now).toString("base64"), coding: "__proto__" };
    },
    "not coded as it says": (now) => ({
      ...{ content: Buffer.from(now).toString("base64"), coding: "br" },
    }),
    "a delta against something else": (now) => ({ content: delta(now, now), coding: "dcz" }),
    "a delta to something else": (_, old) => ({ content: delta(APP, old), coding: "dcz" }),
    "a delta with a bit turned": (now, old) => {
      const bytes = Buffer.from(delta(now, old), "base64");
      bytes[bytes.length >> 1]! ^= 4;
      return { content: bytes.toString("base64"), coding: "dcz" };
    },
    "a bomb": () => ({ content: bomb, coding: "zstd" }),
    "a long one": () => ({ content: "A".repeat(1_000_000), coding: "zstd" }),
    "a coding of nothing": () => ({ coding: "zstd" }),
  };
  const names = Object.keys(kinds);
  const before = names.map((_, i) => program(5_000, 100 + i));
  const after = before.map((content, i) => edited(content, 200 + i));
  const tree = (contents: Uint8Array[]): Tree =>
    Object.fromEntries(contents.map((content, i) => [`flash/${i}.bin`, content]));

  /** A server whose manifest is changed on its way. */
  const withManifest = (world: World, change: (manifest: SentManifest) => void) =>
    Between.start(world, {
      ask: (headers, { path }) => {
        // So that the manifest itself comes plain.
        if (path === "/manifest.json") headers.set("accept-encoding", "dcz");
      },
      answer: (passed, connection) => {
        if (passed.asked.path !== "/manifest.json") return false;
        const manifest = JSON.parse(Buffer.from(passed.answer.body).toString()) as SentManifest;
        change(manifest);
        return answerOther(passed, connection, Buffer.from(JSON.stringify(manifest)));
      },
    });

  test("every kind of that", async () => {
    const [first, second] = [
      { ...V1, ...tree(before) },
      { ...V2, ...tree(after) },
    ];
    await using world = await World.with({ "1.0.0": first, "1.0.1": second }, { on: "1.0.0" });
    await using between = await withManifest(world, (manifest) => {
      for (const entry of manifest.update) {
        const [, number] = /\/(\d+)\.bin$/.exec(entry.dst_path) ?? [];
        if (number === undefined) continue;
        delete entry.content;
        delete entry.coding;
        const i = Number(number);
        Object.assign(entry, kinds[names[i]!]!(after[i]!, before[i]!));
      }
    });
    const { code, stderr } = await world.client([], between);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.any(String) });
    expect(world.tree()).toEqual(asTree({ ...second, ...VERSION_2 }));
    const fetched = between.content.map(({ asked }) => asked.path);
    const expected = names.map((_, i) => `/1.0.1/flash/${i}.bin`);
    expect(fetched.toSorted()).toEqual([...expected, "/1.0.1/flash/photo.jpg"].sort());
    for (const [i, name] of names.entries()) {
      // A coding without content is none, and nothing to speak of.
      const says = stderr.includes(`flash/${i}.bin is not right in the manifest: `);
      expect([name, says]).toEqual([name, name !== "a coding of nothing"]);
      // Without an attempt to decode it.
      const long = ["text that is longer", "a delta to something else", "a long one"];
      const isLong = stderr.includes(`flash/${i}.bin is not right in the manifest: it is longer`);
      expect([name, isLong]).toEqual([name, long.includes(name)]);
    }
    expect(between.of("/manifest.json").length).toBe(1);
  });

  test("content above 64 KiB is fetched: what is in a manifest costs a device little work", async () => {
    const zeros = { "flash/short.bin": Buffer.alloc(65536), "flash/long.bin": Buffer.alloc(65537) };
    await using world = await World.with(
      { "1.0.0": V1, "1.0.1": { ...V1, ...zeros } },
      { on: "1.0.0" },
    );
    await using between = await withManifest(world, (manifest) => {
      for (const entry of manifest.new) {
        const content = zeros[entry.dst_path.slice(1) as keyof typeof zeros];
        const coded = zlib.brotliCompressSync(content).toString("base64");
        Object.assign(entry, { content: coded, coding: "br" });
      }
    });
    const { code, stderr } = await world.client([], between);
    expect([code, stderr]).toEqual([0, expect.not.stringContaining("not right")]);
    expect(world.tree()).toEqual(asTree({ ...V1, ...zeros, ...VERSION_2 }));
    expect(between.content.map(({ asked }) => asked.path)).toEqual(["/1.0.1/flash/long.bin"]);
  });

  test("also where the device has changed the old file since it asked", async () => {
    await using world = await World.with(BOTH, { on: "1.0.0" });
    await using between = await Between.start(world, {
      answer: () => {
        writeFileSync(`${world.root}/flash/main.py`, "edited just now\n");
        between.meddling = {};
        return false;
      },
    });
    const events: OTAEvent[] = [];
    const report = (event: OTAEvent) => void events.push(event);
    await new HttpOTA(between.url, { root: world.root, timeout: PATIENT, report }).update();
    expect(readFileSync(`${world.root}/flash/main.py`, "utf8")).toBe(String(V2["flash/main.py"]));
    expect(between.of("/1.0.1/flash/main.py").length).toBe(1);
  });

  test("from a server whose content is wrong as well: it ends, and the device is as it was", async () => {
    const put = { "flash/main.py": "print('right')\n" };
    const manifest = { ...manifestOf({ version: "1.0.1", put }, "http://double.test") };
    const [entry] = manifest["new"] as [SentEntry];
    delete entry.URL;
    delete entry.hash;
    entry.text = "print('wrong')\n";
    await using double = await Double.start((asked, connection) => {
      const isManifest = asked.path === "/manifest.json";
      const body = isManifest ? JSON.stringify(manifest) : "print('wrong')\n";
      sendContent(asked, connection, Buffer.from(body));
    });
    using world = new World({}, { device: V1 });
    const { code, stderr } = await world.client([], double);
    expect([code, stderr]).toEqual([1, expect.stringContaining("flash/main.py does not verify")]);
    expect(world.tree()).toEqual(asTree(V1));
    expect(double.askedFor("/1.0.1/flash/main.py").length).toBeGreaterThan(0);
  });
});

test("random releases, whatever a device accepts: one brief manifest leads from each to the next", async () => {
  const random = new Random(SEED);
  const content = () => {
    const size = random.pick([0, 1, 50, 63, 64, 500, 1023, 1024, 3000, 4096, 4097, 20_000, 70_000]);
    const kind = random.below(3);
    if (kind === 0) return noise(size, random.below(2 ** 32));
    if (kind === 1) return program(size, random.below(2 ** 32));
    return Buffer.from("print('\u00fc', \"\\\\\")\r\n\0".repeat(size).slice(0, size));
  };
  await Promise.all(
    Array.from({ length: 12 }, async () => {
      const paths = Array.from({ length: 12 }, (_, i) => `flash/d${i % 3}/${i} +&#.py`);
      const old = Object.fromEntries(random.some(paths, 9).map((path) => [path, content()]));
      const now: Tree = {};
      for (const path of random.some(paths, 9)) {
        const had = old[path];
        const copied = random.pick(Object.values(old));
        const changed = had && had.length > 0 ? edited(had, random.below(2 ** 32)) : content();
        now[path] = random.pick([had ?? content(), copied, changed, changed, content()]);
      }
      const accepted = random.pick([ALL, "dcz", "br", "zstd, dcz", "gzip", "identity"]);
      await using world = await World.with({ "1.0.0": old, "1.0.1": now }, { on: "1.0.0" });
      await using between = await Between.start(world, {
        ask: (headers) => headers.set("accept-encoding", accepted),
      });
      const options = { root: world.root, timeout: PATIENT };
      await new HttpOTA(between.url, options).update();
      expect(readTree(world.root)).toEqual(asTree({ ...now, ...VERSION_2 }));
      // Nothing that it carried was fetched, too.
      const [manifest] = between.of("/manifest.json");
      if (!manifest) throw new Error("nobody asked for a manifest");
      const { new: added, update } = JSON.parse(plain(manifest.answer)) as SentManifest;
      for (const entry of [...added, ...update]) {
        const path = entry.dst_path.slice(1);
        const found = carried(entry, old[path]);
        if (!found) continue;
        expect(bytesOf(found)).toEqual(bytesOf(now[path]!));
        const url = `/1.0.1/${path.split("/").map(encodeURIComponent).join("/")}`;
        expect(between.of(url)).toEqual([]);
      }
    }),
  );
});
