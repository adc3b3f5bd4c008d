/**
 * No byte on the air that the device already has: what the server codes and for whom, what a device
 * makes of it, over real sockets, and what happens where the line breaks, or someone meddles. Lines
 * are cut at random: set SEED to repeat a run.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  cpSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import type { Socket } from "node:net";
import * as zlib from "node:zlib";
import { HttpOTA, MAX_CODED, OTAError, type OTAEvent, type Manifest } from "../ota.ts";
import { answerOther, Between, codingsOf, cutOff, headOf, type Passed } from "./helpers/between.ts";
import { boardUpdate } from "./helpers/board.ts";
import { edited, noise, program, sha256 } from "./helpers/content.ts";
import { Double, offering, send } from "./helpers/double.ts";
import { apply } from "./helpers/patch.ts";
import { Random, seeded } from "./helpers/random.ts";
import { sendRequest, type ParsedResponse, type Sent } from "./helpers/raw.ts";
import { asTree, bytesOf, readTree, Temp, type Tree } from "./helpers/temp.ts";
import { eventually, need, OTA_TS, run, Serving, Tool } from "./helpers/tool.ts";
import { PATIENT, Served, World, type WorldOptions } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SEED = seeded("encodings");

// ── A release, and the one after it. ──

/** Too long to be carried in a manifest. */
const APP_1 = program(100_000, 1);
const APP_2 = edited(APP_1, 2);
/** What the server knows, and no device would name for this. */
const OTHER = program(5_000, 3);
const IMAGE_1 = program(150_000, 4);
const IMAGE_2 = edited(IMAGE_1, 5, 20);
const PHOTO = noise(20_000, 6);
/** Too long for that when it is new; what changes in it is not. */
const SOURCE = Array.from({ length: 200 }, (_, i) => {
  const name = sha256(`${i}`);
  return `def measure_${name.slice(0, 6)}():\n    return read(0x${name.slice(6, 14)})\n`;
}).join("");

const V1: Tree = {
  "flash/app.bin": APP_1,
  "flash/main.py": SOURCE,
  "flash/other.bin": OTHER,
  "flash/short.py": "X = 1\n",
};
const V2: Tree = {
  "flash/app.bin": APP_2,
  "flash/main.py": `${SOURCE}print(measure())\n`,
  "flash/other.bin": OTHER,
  "flash/short.py": "X = 2\n",
  "flash/new.py": SOURCE.replaceAll("measure", "count"),
  "flash/photo.jpg": PHOTO,
  "flash/empty": "",
};
const IMAGES: Tree = { "firmware_1.0.0.bin": IMAGE_1, "firmware_1.0.1.bin": IMAGE_2 };
const VERSION_2 = { "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" };

const BOTH = { "1.0.0": V1, "1.0.1": V2 };
/** The two with their firmware. */
const served = (more: WorldOptions = {}) => World.with(BOTH, { beside: IMAGES, ...more });

// ── Requests below `fetch`, and what they bring. ──

const ALL = "dcz, br, zstd, gzip";

/** The header that names content that a device has. */
const has = (content: string | Uint8Array) => ({
  "Available-Dictionary": `:${Buffer.from(sha256(content), "hex").toString("base64")}:`,
});

const get = (
  server: { url: string },
  path: string,
  headers: Record<string, string> = {},
  how: Sent = {},
): Promise<ParsedResponse> => sendRequest(server, path, { ...how, headers });

const coding = ({ headers }: ParsedResponse) => headers.get("content-encoding") ?? "identity";

/** The content of a body, by a decoder that is not the tool's. */
function decoded(response: ParsedResponse, old?: Uint8Array): Uint8Array {
  const { body } = response;
  switch (coding(response)) {
    case "gzip":
      return bytesOf(zlib.gunzipSync(body));
    case "br":
      return bytesOf(zlib.brotliDecompressSync(body));
    case "zstd":
      return bytesOf(zlib.zstdDecompressSync(body));
    case "deflate":
      return bytesOf(zlib.inflateSync(body));
    case "ota-patch, br":
    case "ota-patch, deflate": {
      const inflate = coding(response) === "ota-patch, br" ? "brotliDecompressSync" : "inflateSync";
      return apply(zlib[inflate](body), old!, 2 ** 24).content;
    }
    case "dcz":
      return bytesOf(zlib.zstdDecompressSync(body.subarray(40), { dictionary: Buffer.from(old!) }));
    default:
      return body;
  }
}

/** What is wrong with a 200 for a board that reads pieces of 100 bytes; empty when nothing is. */
function misaligned({ status, headers, headerLength, body }: ParsedResponse): string[] {
  return [
    status !== 200 && `status ${status}`,
    headerLength % 100 !== 0 && `a header of ${headerLength} bytes`,
    headerLength > 500 && `a header of ${headerLength} bytes, more than 500`,
    headers.get("content-length") !== String(body.length) && `a length that is not ${body.length}`,
  ].filter((line) => line !== false);
}

/** The processor time that a process has used so far, in seconds. */
function cpuOf(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8")
    .replace(/^.*\) /, "")
    .split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

/** The one server for all that only asks, nothing in its root changes; and a device on 1.0.0. */
let server: World;
beforeAll(async () => {
  server = await served({ on: "1.0.0" });
});
afterAll(() => server[Symbol.asyncDispose]());

/** A device that is on 1.0.0 as that one is. */
function another(): World {
  const world = new World();
  cpSync(server.root, world.root, { recursive: true });
  return world;
}

const APP = "/1.0.1/flash/app.bin";

describe("a delta is one of RFC 9842", () => {
  const cases: [title: string, path: string, old: Uint8Array, content: Uint8Array][] = [
    ["a file and the one before", APP, APP_1, APP_2],
    ["a firmware image and the one before", "/firmware_1.0.1.bin", IMAGE_1, IMAGE_2],
    ["an older file with a newer one", "/1.0.0/flash/app.bin", APP_2, APP_1],
    ["a file that is the same", APP, APP_2, APP_2],
  ];
  for (const [title, path, old, content] of cases) {
    test(`${title}: 40 bytes of header, then a frame that others decode`, async () => {
      const response = await get(server, path, { "Accept-Encoding": ALL, ...has(old) });
      const { status, headers, body } = response;
      expect([status, coding(response)]).toEqual([200, "dcz"]);
      expect(headers.get("content-length")).toBe(String(body.length));
      expect(Buffer.from(body.subarray(0, 40)).toString("hex")).toBe(
        `5e2a4d1820000000${sha256(old)}`,
      );
      expect(Buffer.from(body.subarray(40, 44)).toString("hex")).toBe("28b52ffd");
      // Bit 5 of the next byte: one segment, as long as the content. Else a window follows.
      const [descriptor = 0, window = 0] = body.subarray(44, 46);
      expect((descriptor & 0x20) > 0 || window >> 3 <= 23 - 10).toBe(true);
      expect(decoded(response, old)).toEqual(content);
      expect(() => zlib.zstdDecompressSync(body.subarray(40))).toThrow();

      using temp = new Temp();
      writeFileSync(temp.at("old"), old);
      // The first 40 bytes are a frame to be skipped, so that the body is a file of zstd as it is.
      writeFileSync(temp.at("new.zst"), body);
      const command = [need("zstd"), "-d", "-D", temp.at("old"), temp.at("new.zst"), "-o"];
      const { exitCode, stderr } = Bun.spawnSync([...command, temp.at("new")]);
      expect([exitCode, stderr.toString()]).toEqual([0, expect.any(String)]);
      expect(bytesOf(readFileSync(temp.at("new")))).toEqual(content);
    });
  }

  test("has the size of the change, not of the file", async () => {
    for (const [path, old, size] of [
      [APP, APP_1, APP_2.length],
      ["/firmware_1.0.1.bin", IMAGE_1, IMAGE_2.length],
    ] as const) {
      const delta = await get(server, path, { "Accept-Encoding": ALL, ...has(old) });
      const whole = await get(server, path, { "Accept-Encoding": "zstd" });
      expect(delta.body.length).toBeLessThan(whole.body.length / 10);
      expect(whole.body.length).toBeLessThan(size);
    }
  });

  test("old content that looks like a dictionary of zstd's own is no problem", async () => {
    const old = Buffer.concat([Buffer.from("37a430ec", "hex"), APP_1]);
    await using world = await World.with(
      {
        "1.0.0": { "flash/app.bin": old },
        "1.0.1": { "flash/app.bin": APP_2 },
      },
      { on: "1.0.0" },
    );
    const { code, stderr } = await world.client();
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.not.stringContaining("ota.ts:") });
    expect(bytesOf(readFileSync(`${world.root}/flash/app.bin`))).toEqual(APP_2);
  });
});

describe("who gets what", () => {
  const knows = has(APP_1);
  const cases: [accepted: string | undefined, dictionary: Record<string, string>, got: string][] = [
    // No coding for who does not ask.
    [undefined, {}, "identity"],
    [undefined, knows, "identity"],
    ["", knows, "identity"],
    ["identity", knows, "identity"],
    ["*", knows, "identity"],
    ["compress, x-gzip", knows, "identity"],
    ["gzipped, x-zstd", knows, "identity"],
    // The best of what is accepted.
    ["gzip", knows, "gzip"],
    ["zstd", knows, "zstd"],
    ["gzip, zstd", knows, "zstd"],
    ["gzip, deflate, br, zstd", {}, "br"],
    ["br", knows, "br"],
    ["dcz", knows, "dcz"],
    ["gzip, zstd, dcz", knows, "dcz"],
    ["DCZ", knows, "dcz"],
    ["gzip;q=0.1,dcz;q=0.001", knows, "dcz"],
    // q=0 is no.
    ["dcz;q=0, zstd, gzip", knows, "zstd"],
    ["br;q=0, zstd, gzip", {}, "zstd"],
    ["dcz;q=0.000, zstd ; q=0, gzip", knows, "gzip"],
    ["gzip;q=0", knows, "identity"],
    ["dcz;q=0, zstd;Q=0.0, gzip;q=0.", knows, "identity"],
    // A dictionary that there is not.
    ["dcz", {}, "identity"],
    [ALL, {}, "br"],
    [ALL, has("what nobody has ever released"), "br"],
    ["dcz", has("what nobody has ever released"), "identity"],
    [ALL, { "Available-Dictionary": "" }, "br"],
    [ALL, { "Available-Dictionary": sha256(APP_1) }, "br"],
    [ALL, { "Available-Dictionary": knows["Available-Dictionary"].slice(1, -1) }, "br"],
    [ALL, { "Available-Dictionary": "::" }, "br"],
    [ALL, { "Available-Dictionary": `:${"A".repeat(4000)}:` }, "br"],
    [ALL, { "Available-Dictionary": ":../../../etc/passwd:" }, "br"],
  ];
  for (const [accepted, dictionary, got] of cases) {
    const shown = Object.values(dictionary)[0]?.slice(0, 20) ?? "none";
    test(`Accept-Encoding: ${accepted}, dictionary ${shown}: ${got}`, async () => {
      const headers = { ...(accepted !== undefined && { "Accept-Encoding": accepted }) };
      const response = await get(server, APP, { ...headers, ...dictionary });
      expect([response.status, coding(response)]).toEqual([200, got]);
      // Padding is for boards, which accept no codings.
      if (accepted === undefined) expect(misaligned(response)).toEqual([]);
      else expect(response.headers.has("x-pad")).toBe(false);
      expect(decoded(response, APP_1)).toEqual(APP_2);
    });
  }

  test("a dictionary that the server does not know costs nothing: the same bytes", async () => {
    const ask = (more: Record<string, string>) =>
      get(server, APP, { "Accept-Encoding": ALL, ...more });
    const [without, unknown] = [await ask({}), await ask(has("unknown"))];
    expect(unknown.body).toEqual(without.body);
    const stable = ({ headers }: ParsedResponse) =>
      [...headers].filter(([name]) => name !== "date");
    expect(stable(unknown)).toEqual(stable(without));
  });

  test("a delta that would not be smaller: without the old content", async () => {
    const useless = { "Accept-Encoding": ALL, ...has(PHOTO) };
    const response = await get(server, "/1.0.1/flash/main.py", useless);
    expect([coding(response), decoded(response)]).toEqual(["br", bytesOf(V2["flash/main.py"]!)]);
    const noCodingHelps = await get(server, "/1.0.1/flash/photo.jpg", {
      ...useless,
      ...has(APP_1),
    });
    expect([coding(noCodingHelps), noCodingHelps.body]).toEqual(["identity", PHOTO]);
  });

  test("a delta of less than half, but more than the content coded by itself: the latter", async () => {
    const random = new Random(1);
    const lines = Array.from({ length: 3000 }, (_, i) => `x${i} = read(${random.below(10_000)})\n`);
    const [old, content] = [noise(1000, 1), bytesOf(lines.join(""))];
    await using world = await World.with({ "1.0.0": { a: old }, "1.0.1": { a: content } });
    const ask = (accepted: string) =>
      get(world, "/1.0.1/a", { "Accept-Encoding": accepted, ...has(old) });
    const [delta, whole] = [await ask("dcz"), await ask("br")];
    expect([coding(delta), coding(whole)]).toEqual(["dcz", "br"]);
    expect(delta.body.length).toBeLessThan(content.length / 2);
    expect(whole.body.length).toBeLessThan(delta.body.length);
    for (const accepted of ["dcz, br", ALL, `ota-patch, ${ALL}`]) {
      const { headers, body } = await ask(accepted);
      expect([accepted, headers.get("content-encoding")]).toEqual([accepted, "br"]);
      expect(body).toEqual(whole.body);
    }
  });

  test("what no coding makes smaller goes plain: noise, a few bytes, nothing at all", async () => {
    for (const name of ["photo.jpg", "short.py", "empty"]) {
      for (const accepted of [ALL, "zstd", "gzip", "dcz"]) {
        const headers = { "Accept-Encoding": accepted, ...has(APP_1) };
        const response = await get(server, `/1.0.1/flash/${name}`, headers);
        expect([name, accepted, coding(response)]).toEqual([name, accepted, "identity"]);
        expect(response.body).toEqual(bytesOf(V2[`flash/${name}`]!));
      }
    }
  });

  test("a delta only against what a device may have there: the path before it, another image", async () => {
    const ask = async (path: string, old: Uint8Array | string) => {
      return coding(await get(server, path, { "Accept-Encoding": ALL, ...has(old) }));
    };
    expect(await ask(APP, APP_1)).toBe("dcz");
    expect(await ask("/1.0.0/flash/app.bin", APP_2)).toBe("dcz");
    expect(await ask("/1.0.1/flash/%61pp.bin", APP_1)).toBe("dcz");
    expect(await ask("/firmware_1.0.1.bin", IMAGE_1)).toBe("dcz");
    // Content that the server has, but not in that place. (Of long content br is not worth its time.)
    expect(await ask(APP, IMAGE_1)).toBe("br");
    expect(await ask(APP, OTHER)).toBe("br");
    expect(await ask("/firmware_1.0.1.bin", APP_1)).toBe("zstd");
    expect(await ask("/1.0.1/flash/new.py", SOURCE)).toBe("br");
  });

  test("8 MiB are coded; more is not, and is no dictionary either", async () => {
    expect(MAX_CODED).toBe(8 * 1024 * 1024);
    const most = new Uint8Array(MAX_CODED).fill(7);
    const over = new Uint8Array(MAX_CODED + 1).fill(7);
    const small = new Uint8Array(100_000).fill(7);
    // Each has been at each of the paths.
    const versions = [
      { most, over, small },
      { most: small, over: small, small: over },
      { most, over, small: most },
    ];
    const trees = versions.map((tree, i) => [`1.0.${i}`, tree] as const);
    await using world = await World.with(Object.fromEntries(trees));
    const ask = (name: string, old: Uint8Array) =>
      get(world, `/1.0.0/${name}`, { "Accept-Encoding": ALL, ...has(old) });
    const answers = await Promise.all([
      ask("most", small),
      ask("over", small),
      ask("small", over),
      ask("small", most),
    ]);
    const codings = answers.map(coding);
    expect(codings.map((name) => name === "identity")).toEqual([false, true, false, false]);
    expect(codings[2]).toBe("br");
    for (const [i, old] of [small, small, over, most].entries()) {
      const expected = [most, over, small, small][i]!;
      expect(sha256(decoded(answers[i]!, old))).toBe(sha256(expected));
    }
  });

  test("a file that belongs to no version is sent as it is", async () => {
    await using world = await World.with(BOTH, { beside: { "notes.txt": "note\n".repeat(100) } });
    expect(coding(await get(world, "/notes.txt", { "Accept-Encoding": ALL }))).toBe("identity");
  });
});

describe("each form of a content is a representation of its own", () => {
  const forms: [name: string, headers: Record<string, string>, old?: Uint8Array][] = [
    ["identity", {}],
    ["gzip", { "Accept-Encoding": "gzip" }],
    ["zstd", { "Accept-Encoding": "zstd" }],
    ["br", { "Accept-Encoding": "br" }],
    ["dcz", { "Accept-Encoding": "dcz", ...has(APP_1) }, APP_1],
    ["dcz", { "Accept-Encoding": "dcz", ...has(APP_2) }, APP_2],
    ["deflate", { "Accept-Encoding": "deflate" }],
    ["ota-patch, br", { "Accept-Encoding": "ota-patch, br", ...has(APP_1) }, APP_1],
    ["ota-patch, deflate", { "Accept-Encoding": "ota-patch, deflate", ...has(APP_1) }, APP_1],
  ];
  const VARY = "Accept-Encoding, Available-Dictionary";
  const tagOf = async (headers: Record<string, string>) =>
    (await get(server, APP, headers)).headers.get("etag")!;

  test("with a strong tag of its own, always the same, and Vary", async () => {
    const tags = [];
    for (const [name, headers] of forms) {
      const [first, again] = [await get(server, APP, headers), await get(server, APP, headers)];
      expect([coding(first), again.body]).toEqual([name, first.body]);
      expect(again.headers.get("etag")).toBe(first.headers.get("etag"));
      expect(first.headers.get("vary")).toBe(VARY);
      tags.push(first.headers.get("etag")!);
    }
    expect(tags.filter((tag) => !/^"[!#-~]+"$/.test(tag))).toEqual([]);
    expect(new Set(tags).size).toBe(forms.length);
    const other = (await get(server, "/1.0.0/flash/app.bin")).headers.get("etag")!;
    expect(tags).not.toContain(other);
  });

  test("a coded one's tag is of its very bytes, whatever version of a coder made them", async () => {
    for (const [name, headers] of forms.slice(1)) {
      const { headers: got, body } = await get(server, APP, headers);
      const hash = Bun.hash(body).toString(16).padStart(16, "0");
      expect(got.get("etag")).toBe(`"${hash}-${name.replace(", ", "+")}"`);
    }
  });

  for (const [i, [name, headers, old]] of forms.entries()) {
    const title = i === 5 ? "dcz, with another dictionary" : name;
    test(`${title}: If-None-Match, Range and If-Range are about it alone`, async () => {
      const whole = await get(server, APP, headers);
      const tag = whole.headers.get("etag")!;
      const size = whole.body.length;
      const ask = (more: Record<string, string>) => get(server, APP, { ...headers, ...more });

      const known = [tag, `W/${tag}`, "*", `"a, b", ,W/"c",\t${tag} , "d"`, `"W/",W/${tag}`];
      for (const names of known) {
        for (const method of ["GET", "HEAD"]) {
          const same = await get(server, APP, { ...headers, "If-None-Match": names }, { method });
          expect([names, same.status, same.body.length]).toEqual([names, 304, 0]);
          for (const [field, value] of [
            ["etag", tag],
            ["vary", VARY],
            ["cache-control", "max-age=60"],
          ] as const) {
            expect([field, same.headers.get(field)]).toEqual([field, value]);
          }
        }
      }
      const bare = tag.slice(1, -1);
      const unknown = [
        bare,
        `"${bare}`,
        `w/${tag}`,
        `"x${tag}`,
        `"a b" ${tag}`,
        `"${bare}, x"`,
        "",
      ];
      for (const names of unknown) {
        const { status } = await ask({ "If-None-Match": names });
        expect([names, status]).toEqual([names, 200]);
      }

      for (const [from, to] of [
        [0, 9],
        [15, 29],
        [size - 5, size - 1],
      ] as const) {
        const part = await ask({ Range: `bytes=${from}-${to}` });
        expect([part.status, coding(part)]).toEqual([206, name]);
        expect(part.headers.get("content-range")).toBe(`bytes ${from}-${to}/${size}`);
        expect(part.headers.get("etag")).toBe(tag);
        expect(part.headers.get("vary")).toBe(VARY);
        expect(part.body).toEqual(whole.body.slice(from, to + 1));
      }
      const behind = await ask({ Range: `bytes=${size}-` });
      expect([behind.status, behind.headers.get("content-range")]).toEqual([
        416,
        `bytes */${size}`,
      ]);

      const rest = await ask({ Range: "bytes=50-", "If-Range": tag });
      expect([rest.status, rest.body]).toEqual([206, whole.body.slice(50)]);

      for (const [, others] of forms.filter((_, j) => j !== i)) {
        const theirs = await tagOf(others);
        expect((await ask({ "If-None-Match": theirs })).status).toBe(200);
        const again = await ask({ Range: "bytes=50-", "If-Range": theirs });
        expect([again.status, coding(again)]).toEqual([200, name]);
        expect(decoded(again, old)).toEqual(APP_2);
      }
    });

    test(`${title}: HEAD is the header of the GET`, async () => {
      const [got, only] = [
        await get(server, APP, headers),
        await get(server, APP, headers, { method: "HEAD" }),
      ];
      expect([only.status, only.body.length]).toEqual([200, 0]);
      for (const field of [
        ...["content-length", "content-encoding", "content-type", "accept-ranges"],
        ...["etag", "vary", "cache-control"],
      ]) {
        expect([field, only.headers.get(field)]).toEqual([field, got.headers.get(field)]);
      }
    });
  }
});

describe("a deployed board", () => {
  test("gets plain bytes, aligned, while everybody else gets coded ones", async () => {
    await using world = await served({ on: "1.0.0" });
    expect((await world.client()).code).toBe(0);
    const had = new Map(Object.entries(V1).map(([path, content]) => [path, bytesOf(content)]));
    const board = await boardUpdate(world.url, "1.0.0", had);
    const files = Object.entries(V2).map(
      ([path, content]) => [path, bytesOf(content)] as [string, Uint8Array],
    );
    expect(board.version).toBe("1.0.1");
    expect([...board.files].sort()).toEqual(files.toSorted());
    expect(board.firmware).toEqual(IMAGE_2);
    const images = () => world.sent.filter((path) => path.startsWith("/firmware_"));
    await eventually("both images are logged", () => images().length >= 2);
    const codings = world.server.lines.map((line) => / coding=(\S+)/.exec(line)?.[1]);
    // The client's first, and then none.
    expect(codings.slice(0, 4).filter(Boolean).length).toBeGreaterThan(0);
    expect(codings.slice(-(Object.keys(V2).length + 1)).filter(Boolean)).toEqual([]);
  });

  test("HTTP/1.0 without Accept-Encoding: nothing is coded, whatever else is in the request", async () => {
    for (const path of [APP, "/firmware_1.0.1.bin", "/manifest.json?current_ver=1.0.0"]) {
      const coded = await get(server, path, { "Accept-Encoding": ALL });
      expect(coding(coded)).not.toBe("identity");
      const response = await get(server, path, has(APP_1), { version: "1.0" });
      expect([coding(response), misaligned(response)]).toEqual(["identity", []]);
    }
  });
});

describe("work is done once", () => {
  // So long that to encode it is far more work than to answer, whatever else the machine does.
  const [OLD_A, OLD_B] = [program(800_000, 7), program(800_000, 8)];
  const [NEW_A, NEW_B] = [edited(OLD_A, 9, 40), edited(OLD_B, 10, 40)];

  test("a hundred ask at once: as much work as for one, and the same bytes", async () => {
    using world = new World({ "1.0.0": { a: OLD_A, b: OLD_B }, "1.0.1": { a: NEW_A, b: NEW_B } });
    await using server = await Serving.start(["--root", world.releases]);
    const ask = (name: string, old: Uint8Array) =>
      get(server, `/1.0.1/${name}`, { "Accept-Encoding": ALL, ...has(old) });
    const cost = async (task: () => Promise<void>): Promise<number> => {
      const before = cpuOf(server.pid);
      await task();
      return cpuOf(server.pid) - before;
    };
    const one = await cost(async () => void (await ask("a", OLD_A)));
    let answers: ParsedResponse[] = [];
    const hundred = await cost(async () => {
      answers = await Promise.all(Array.from({ length: 100 }, () => ask("b", OLD_B)));
    });
    expect(answers.map(coding).filter((name) => name !== "dcz")).toEqual([]);
    expect(new Set(answers.map(({ body }) => sha256(body))).size).toBe(1);
    expect(bytesOf(decoded(answers[0]!, OLD_B))).toEqual(NEW_B);
    // A hundred answers are some work as well, but not a hundred encodings, nor twenty.
    expect(hundred).toBeLessThan(20 * one);

    const again = await cost(async () => {
      for (let i = 0; i < 20; i++) await ask("b", OLD_B);
    });
    expect(again).toBeLessThan(5 * one);
  });

  test("content is not coded by itself where a delta is good", async () => {
    await using world = new World(BOTH, { beside: IMAGES });
    // What there is to spend is spent by the first that is coded.
    await world.serve({ coding: 1e-6 });
    const ask = (headers: Record<string, string>) => get(world, APP, headers);
    const delta = await ask({ "Accept-Encoding": ALL, ...has(APP_1) });
    expect([coding(delta), decoded(delta, APP_1)]).toEqual(["dcz", APP_2]);
    const whole = await ask({ "Accept-Encoding": "zstd" });
    expect([coding(whole), whole.body]).toEqual(["identity", APP_2]);
  });

  test("no longer than there is time for: then plain, but what is made is given out", async () => {
    await using world = await served({ coding: 1e-6 });
    const ask = async (path: string, headers: Record<string, string>) => {
      return get(world, path, { "Accept-Encoding": ALL, ...headers });
    };
    const first = await ask("/firmware_1.0.1.bin", has(IMAGE_1));
    const again = await ask("/firmware_1.0.1.bin", has(IMAGE_1));
    expect([coding(first), again.body]).toEqual(["dcz", first.body]);
    for (const headers of [has(APP_1), {}]) {
      const { status, headers: got, body } = await ask(APP, headers);
      expect([status, got.get("content-encoding"), body]).toEqual([200, null, APP_2]);
    }
    // None at all is an answer, too.
    await using never = await Served.start(world.releases, { coding: 0 });
    expect(coding(await get(never, APP, { "Accept-Encoding": ALL }))).toBe("identity");
  });

  test("beside everything else: others are answered meanwhile", async () => {
    await using world = await World.with({ "1.0.0": { a: OLD_A }, "1.0.1": { a: NEW_A } });
    let done = false;
    const slow = get(world, "/1.0.1/a", { "Accept-Encoding": ALL, ...has(OLD_A) }).then((got) => {
      done = true;
      return got;
    });
    let meanwhile = 0;
    while (!done) {
      expect((await get(world, "/-/health")).status).toBe(200);
      meanwhile++;
    }
    expect(coding(await slow)).toBe("dcz");
    expect(meanwhile).toBeGreaterThan(5);
  });
});

describe("a manifest", () => {
  const path = "/manifest.json?current_ver=1.0.0&hash=sha256";

  test("is coded for who takes that, and says the same", async () => {
    const plain = await get(server, path);
    expect(JSON.parse(new TextDecoder().decode(plain.body)).version).toBe("1.0.1");
    for (const [accepted, got] of [
      ["gzip", "gzip"],
      ["zstd", "zstd"],
      [ALL, "zstd"],
      ["zstd;q=0, gzip", "gzip"],
      ["gzip;q=0", "identity"],
      ["dcz", "identity"],
    ] as const) {
      const response = await get(server, path, { "Accept-Encoding": accepted, ...has(APP_1) });
      expect([accepted, coding(response)]).toEqual([accepted, got]);
      expect(decoded(response)).toEqual(plain.body);
      if (got !== "identity") expect(response.body.length).toBeLessThan(plain.body.length * 0.7);
    }
  });

  test("with a request id, too: one that is made for this request alone", async () => {
    for (const id of ["a", "b", "a"]) {
      const plain = await get(server, `${path}&reqid=${id}`);
      const coded = await get(server, `${path}&reqid=${id}`, { "Accept-Encoding": "zstd" });
      expect([coding(coded), decoded(coded)]).toEqual(["zstd", plain.body]);
      expect(JSON.parse(new TextDecoder().decode(plain.body)).request_id).toBe(id);
    }
  });

  test("null is plain, and nothing is in one that was not asked for", async () => {
    const none = await get(server, "/manifest.json?current_ver=1.0.1", { "Accept-Encoding": ALL });
    expect([coding(none), new TextDecoder().decode(none.body)]).toEqual(["identity", "null"]);
    const { body } = await get(server, "/manifest.json?current_ver=1.0.0");
    const manifest = JSON.parse(new TextDecoder().decode(body));
    const names = ["delete", "firmware", "new", "previous_version", "update", "version"];
    expect(Object.keys(manifest)).toEqual(names);
    for (const entry of [...manifest.new, ...manifest.update]) {
      expect(Object.keys(entry)).toEqual(["URL", "dst_path", "hash"]);
    }
    expect(Object.keys(manifest.firmware)).toEqual(["URL", "hash"]);
  });

  test("that is signed is signed as it is before it is coded", async () => {
    await using world = new World(BOTH, { beside: IMAGES });
    const keys = world.at("keys");
    expect((await run(["keygen", "--out", keys])).code).toBe(0);
    await world.serve({ sign: `${keys}.key` });
    await using between = await Between.start(world);
    const { code, last } = await world.client(["--verify", `${keys}.pub`], between);
    expect([code, last]).toEqual([0, "updated 0 -> 1.0.1 (firmware 0 -> 1.0.1)"]);
    expect(coding(between.of("/manifest.json")[0]!.answer)).toBe("br");
  });
});

describe("a device", () => {
  test("offers what it has for files that change and for firmware, and receives the change", async () => {
    using world = another();
    await using between = await Between.start(server);
    const { code, last } = await world.client([], between);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)"]);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    expect(bytesOf(readFileSync(`${world.root}/.ota/ota_1.bin`))).toEqual(IMAGE_2);

    const offered = between.content.map(({ asked, answer }) => {
      return [asked.path, asked.headers.get("available-dictionary"), coding(answer)];
    });
    const name = (content: string | Uint8Array) => has(content)["Available-Dictionary"];
    expect(offered.sort()).toEqual([
      // What is small came in the manifest.
      ["/1.0.1/flash/app.bin", name(APP_1), "dcz"],
      ["/1.0.1/flash/new.py", null, "br"],
      ["/1.0.1/flash/photo.jpg", null, "identity"],
      ["/firmware_1.0.1.bin", name(IMAGE_1), "dcz"],
    ]);
    const bytes = new Map(
      between.content.map(({ asked, answer }) => [asked.path, answer.body.length]),
    );
    expect(bytes.get(APP)).toBeLessThan(1500);
    expect(bytes.get("/firmware_1.0.1.bin")).toBeLessThan(2500);
  });

  test("offers the file as it is on the device, whoever changed it", async () => {
    await using world = await World.with(BOTH, { beside: IMAGES, on: "1.0.0" });
    const own = "# my own\n".repeat(50);
    // So the server lists all, and the manifest carries nothing.
    writeFileSync(`${world.root}/flash/main.py`, own);
    writeFileSync(`${world.root}/flash/app.bin`, "");
    await using between = await Between.start(world);
    expect((await world.client([], between)).code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    const [main, app] = ["main.py", "app.bin"].map(
      (name) => between.of(`/1.0.1/flash/${name}`)[0]!,
    );
    const offered = main!.asked.headers.get("available-dictionary");
    expect([offered, coding(main!.answer)]).toEqual([has(own)["Available-Dictionary"], "br"]);
    // Of nothing there is no delta.
    expect(app!.asked.headers.has("available-dictionary")).toBe(false);
  });

  test("asks for content above 8 MiB plain, and offers no old content above it", async () => {
    const big = new Uint8Array(MAX_CODED + 1).fill(9);
    const old: Tree = { shrinks: big, grows: "small\n".repeat(50), stays: program(1000, 11) };
    const now: Tree = { shrinks: SOURCE, grows: big.map(() => 8), stays: program(9000, 12) };
    await using world = await World.with({ "1.0.0": old, "1.0.1": now }, { on: "1.0.0" });
    await using between = await Between.start(world);
    await new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
    expect(world.tree()).toEqual(asTree(now));
    const asked = between.content.map((passed) => [
      passed.asked.path,
      codingsOf(passed).includes("zstd"),
      passed.asked.headers.has("available-dictionary"),
      coding(passed.answer),
    ]);
    expect(asked.sort()).toEqual([
      ["/1.0.1/grows", false, false, "identity"],
      ["/1.0.1/shrinks", true, false, "br"],
      ["/1.0.1/stays", true, true, expect.any(String)],
    ]);
  });

  test("gets on with a server that codes nothing, and with one that codes what grows by it", async () => {
    // As web servers do that were told to code everything.
    const put = { "flash/photo.jpg": PHOTO, "flash/one": "1", "flash/main.py": SOURCE };
    for (const codes of [false, true]) {
      using world = new World();
      const offer = { version: "1.0.1", put };
      await using double: Double = await Double.start((asked, connection) => {
        const plain = !codes || !asked.headers.get("accept-encoding")?.includes("gzip");
        const content = put[asked.path.replace("/content/", "") as keyof typeof put];
        if (plain || content === undefined)
          return offering(offer, () => double.url)(asked, connection);
        send(connection, zlib.gzipSync(content), { headers: { "Content-Encoding": "gzip" } });
      });
      const { code, stderr } = await world.client([], double);
      expect({ codes, code, stderr }).toEqual({ codes, code: 0, stderr: expect.any(String) });
      expect(world.tree()).toMatchObject(asTree(put));
    }
  });
});

// ── Someone meddles. ──

/** A frame of zstd that says for each four bytes "128 KiB of zeros": some ten thousand times more. */
function bomb(blocks: number): Buffer {
  const frame = Buffer.alloc(4 + 2 + 4 * blocks);
  frame.writeUInt32LE(0xfd2fb528, 0);
  frame[5] = (23 - 10) << 3; // The window: 8 MiB.
  for (let i = 0; i < blocks; i++) {
    const isLast = i === blocks - 1 ? 1 : 0;
    frame.writeUIntLE(((128 * 1024) << 3) | (1 << 1) | isLast, 6 + 4 * i, 3);
  }
  return frame;
}

/** Members of gzip one after the other, 16 MiB of zeros each. */
function gzipBomb(members: number): Buffer {
  const member = zlib.gzipSync(Buffer.alloc(16 * 1024 * 1024));
  return Buffer.concat(Array.from({ length: members }, () => member));
}

describe("what does not decode, or to something else", () => {
  const header = (old: Uint8Array) => Buffer.from(`5e2a4d1820000000${sha256(old)}`, "hex");
  const frame = (content: Uint8Array, old: Uint8Array) =>
    zlib.zstdCompressSync(content, { dictionary: Buffer.from(old) });
  type Tamper = (body: Uint8Array, old: Uint8Array, content: Uint8Array) => Uint8Array;
  const flip = (at: number): Tamper => {
    return (body) =>
      body.map((byte, i) => (i === Math.floor(at * body.length) ? byte ^ 0x10 : byte));
  };
  const kinds: Record<string, Tamper> = {
    "a bit in the header": flip(0.001),
    "a bit in the hash of the dictionary": (body) =>
      body.map((byte, i) => (i === 20 ? byte ^ 1 : byte)),
    "a bit in the middle": flip(0.5),
    "a bit at the end": flip(0.999),
    "cut short": (body) => body.subarray(0, body.length / 2),
    "nothing but the header": (body) => body.subarray(0, 40),
    "less than the header": (body) => body.subarray(0, 13),
    nothing: () => new Uint8Array(),
    "no delta at all": (_, __, content) => content.slice(0, 900),
    "a delta for other content": (_, old) => Buffer.concat([header(old), frame(OTHER, old)]),
    "one of the same length": (_, old, content) =>
      Buffer.concat([header(old), frame(content.toReversed(), old)]),
    "made with another dictionary": (_, old, content) =>
      Buffer.concat([header(old), frame(content, content)]),
    "for another dictionary": (_, __, content) =>
      Buffer.concat([header(OTHER), frame(content, OTHER)]),
    "a bomb": (_, old) => Buffer.concat([header(old), bomb(2500)]),
  };
  const names = Object.keys(kinds);
  const before = names.map((_, i) => program(70_000, 100 + i));
  const after = before.map((content, i) => edited(content, 200 + i));
  const tree = (contents: Uint8Array[]): Tree =>
    Object.fromEntries(contents.map((content, i) => [`flash/${i}.bin`, content]));

  test("a delta like that is fetched again plain, once, and nothing else is", async () => {
    const [first, second] = [
      { ...V1, ...tree(before) },
      { ...V2, ...tree(after) },
    ];
    await using world = await World.with({ "1.0.0": first, "1.0.1": second }, { on: "1.0.0" });
    await using between = await Between.start(world, {
      answer: (passed, connection) => {
        const [, number] = /\/(\d+)\.bin$/.exec(passed.asked.path) ?? [];
        if (number === undefined || coding(passed.answer) !== "dcz") return false;
        const i = Number(number);
        const { body } = passed.answer;
        return answerOther(passed, connection, kinds[names[i]!]!(body, before[i]!, after[i]!));
      },
    });
    const { code, stderr } = await world.client([], between);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.any(String) });
    expect(world.tree()).toEqual(asTree({ ...second, ...VERSION_2 }));
    for (const [i, name] of names.entries()) {
      const tries = between.of(`/1.0.1/flash/${i}.bin`);
      const how = tries.map(({ asked, answer }) => [
        coding(answer),
        asked.headers.get("accept-encoding") ?? "",
        asked.headers.has("available-dictionary") || asked.headers.has("range"),
      ]);
      expect([name, how]).toEqual([
        name,
        [
          ["dcz", expect.stringContaining("dcz"), true],
          ["identity", expect.not.stringMatching(/gzip|zstd|br|dcz/), false],
        ],
      ]);
      expect(stderr).toMatch(new RegExp(`/?flash/${i}\\.bin .*plain`));
    }
    for (const path of ["app.bin", "new.py", "photo.jpg"]) {
      expect([path, between.of(`/1.0.1/flash/${path}`).length]).toEqual([path, 1]);
    }
    const manifests = between.of("/manifest.json").length;
    expect(manifests).toBe(1);
  });

  test("so are gzip, zstd and br", async () => {
    using world = new World();
    for (const only of ["gzip", "zstd", "br"]) {
      const root = world.at(`device-${only}`);
      await using between = await Between.start(server, {
        ask: (headers) => {
          const asks = headers.get("accept-encoding")?.includes(only);
          headers.set("accept-encoding", asks ? only : "identity");
        },
        answer: (passed, connection) => {
          const { answer } = passed;
          if (passed.asked.path === "/manifest.json" || coding(answer) === "identity") return false;
          return answerOther(passed, connection, flip(0.5)(answer.body, PHOTO, PHOTO));
        },
      });
      await new HttpOTA(between.url, { timeout: PATIENT, root }).update();
      expect(readTree(root)).toEqual(asTree({ ...V2, ...VERSION_2 }));
      const app = between.of(APP).map(({ answer }) => coding(answer));
      expect(app).toEqual([only, "identity"]);
    }
  });

  test("a plain file that is wrong as well ends it, and the device is as it was", async () => {
    using world = another();
    const was = world.tree();
    await using between = await Between.start(server, {
      answer: (passed, connection) =>
        passed.asked.path === APP &&
        answerOther(passed, connection, passed.answer.body.toReversed()),
    });
    const update = new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
    expect(await update.catch((error: unknown) => error)).toBeInstanceOf(OTAError);
    expect(world.tree()).toEqual(was);
  });

  test("a bomb takes no more memory than the file that was promised", async () => {
    using temp = new Temp();
    const content = program(400_000, 12);
    const peak: Record<string, number> = {};
    const fast = { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 1 } };
    const br = zlib.brotliCompressSync(Buffer.alloc(256 * 1024 * 1024), fast);
    const bombs = { br, zstd: bomb(90_000), gzip: gzipBomb(16), none: undefined };
    for (const [name, body] of Object.entries(bombs)) {
      const offer = { version: "1.0.1", put: { "flash/app.bin": content } };
      await using double: Double = await Double.start((asked, connection) => {
        const accepts = asked.headers.get("accept-encoding")?.includes(name);
        const isIt = asked.path.startsWith("/content/") && accepts;
        if (!body || !isIt) return offering(offer, () => double.url)(asked, connection);
        send(connection, body, { headers: { "Content-Encoding": name } });
      });
      const root = temp.at(name);
      const command = [
        process.execPath,
        OTA_TS,
        "client",
        "--timeout",
        `${PATIENT}`,
        "--root",
        root,
        "--server",
        double.url,
      ];
      const child = Bun.spawn(command, { stdio: ["ignore", "ignore", "pipe"] });
      const stderr = await child.stderr.text();
      expect([name, await child.exited, stderr]).toEqual([name, 0, expect.any(String)]);
      expect(stderr.includes("plain")).toBe(body !== undefined);
      expect(readTree(root)).toMatchObject(asTree({ "flash/app.bin": content }));
      peak[name] = child.resourceUsage()!.maxRSS;
    }
    expect(Math.max(bombs.zstd.length, bombs.gzip.length)).toBeLessThan(content.length);
    for (const name of ["br", "zstd", "gzip"])
      expect(peak[name]).toBeLessThan(peak.none! + 60_000_000);
  });
});

// ── The line breaks. ──

describe.concurrent("a transfer that breaks at nine tenths", () => {
  const CODINGS = ["identity", "gzip", "zstd", "br", "dcz", "ota-patch, br"] as const;

  const most = ({ answer }: Passed) => Math.floor(answer.body.length * 0.9);

  /** What is received is kept there until all is here. */
  const partOf = (root: string) => `${root}/.ota/staged/${sha256(APP_2)}.part`;

  /** Cuts one answer for the file at nine tenths, once they have arrived. */
  const cut = (root: string, passed: Passed, connection: Socket) => {
    const part = partOf(root);
    const arrived = () =>
      eventually(`nine tenths of ${part}`, () => {
        return connection.destroyed || sizeOf(part) === most(passed);
      });
    return cutOff(passed, connection, most(passed), arrived);
  };

  const sizeOf = (file: string) => statSync(file, { throwIfNoEntry: false })?.size ?? 0;

  /** Lets the server see one coding only, and cuts the first answer. */
  const start = (server: { url: string }, root: string, only: string) =>
    Between.start(server, {
      ask: (headers) => headers.set("accept-encoding", only),
      answer: (passed, connection) =>
        passed.asked.path === APP && passed.asked.before === 0 && cut(root, passed, connection),
    });

  test("continues, whatever it is coded as: only the rest comes", async () => {
    await Promise.all(
      CODINGS.map(async (only) => {
        using world = another();
        await using between = await start(server, world.root, only);
        await new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
        expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
        const [first, second, ...more] = between.of(APP);
        const { length } = first!.answer.body;
        const got = most(first!);
        expect([only, coding(first!.answer), more.length]).toEqual([only, only, 0]);
        expect(second!.asked.headers.get("range")).toBe(`bytes=${got}-`);
        expect(second!.asked.headers.get("if-range")).toBe(first!.answer.headers.get("etag"));
        expect([second!.answer.status, second!.answer.body.length]).toEqual([206, length - got]);
      }),
    );
  });

  test("continues after the device was cut off from power, too", async () => {
    await Promise.all(
      CODINGS.map(async (only) => {
        using world = another();
        const was = world.tree();
        await using between = await start(server, world.root, only);
        const args = world.args([], between);
        const { answer } = between.meddling;
        between.meddling.answer = (passed, connection) => {
          if (passed.asked.path !== APP) return false;
          connection.write(headOf(passed.answer));
          connection.write(passed.answer.body.subarray(0, most(passed)));
          return true; // The rest never comes.
        };
        let got = 0;
        {
          await using tool = new Tool(args);
          const part = partOf(world.root);
          await eventually(`nine tenths of ${part}`, () => {
            const [first] = between.of(APP);
            return first !== undefined && sizeOf(part) === most(first);
          });
          got = sizeOf(part);
          tool.kill();
          await tool.ended;
        }
        between.meddling.answer = answer;
        expect(world.tree()).toEqual(was);
        const { code, stderr } = await run(args);
        expect({ only, code, stderr }).toEqual({ only, code: 0, stderr: expect.any(String) });
        expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
        const [, second] = between.of(APP);
        expect([only, second!.asked.headers.get("range")]).toEqual([only, `bytes=${got}-`]);
        expect([only, second!.answer.status]).toEqual([only, 206]);
        expect(between.of(APP).length).toBe(2);
      }),
    );
  });

  test("starts over where the other side now has another form of it", async () => {
    const changes: [first: string, then: string][] = [
      ["dcz", "ota-patch, br"],
      ["ota-patch, br", "br"],
      ["br", "zstd"],
      ["zstd", "gzip"],
      ["gzip", "identity"],
      ["identity", "dcz"],
    ];
    await Promise.all(
      changes.map(async ([first, then]) => {
        using world = another();
        await using between = await start(server, world.root, first);
        const { ask } = between.meddling;
        between.meddling.ask = (headers, asked) => {
          if (asked.path === APP && asked.before > 0) headers.set("accept-encoding", then);
          else ask!(headers, asked);
        };
        await new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
        expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
        const answers = between.of(APP).map(({ answer }) => [answer.status, coding(answer)]);
        expect(answers).toEqual([
          [200, first],
          [200, then],
        ]);
      }),
    );
  });

  test("plain, after a delta that was wrong: continues as well", async () => {
    using world = another();
    await using between = await Between.start(server, {
      answer: (passed, connection) => {
        const { body } = passed.answer;
        if (passed.asked.path !== APP || passed.asked.before > 1) return false;
        if (passed.asked.before === 1) return cut(world.root, passed, connection);
        return answerOther(passed, connection, body.toReversed());
      },
    });
    await new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
    const rest = APP_2.length - Math.floor(APP_2.length * 0.9);
    const last = between.of(APP).at(-1)!.answer;
    expect([between.of(APP).length, last.status, last.body.length]).toEqual([3, 206, rest]);
  });

  test("is no dead end where every byte had come, but not the end of it", async () => {
    // As through a proxy that sends in chunks: the device cannot know that there is nothing more.
    await Promise.all(
      CODINGS.map(async (only) => {
        using world = another();
        let whole = 0;
        await using between = await Between.start(server, {
          ask: (headers) => headers.set("accept-encoding", only),
          answer: ({ asked, answer }, connection) => {
            if (asked.path !== APP || asked.before > 0) return false;
            const chunked = { "content-length": "", "transfer-encoding": "chunked" };
            whole = answer.body.length;
            connection.write(`${headOf(answer, chunked)}${whole.toString(16)}\r\n`);
            connection.write(Buffer.concat([answer.body, Buffer.from("\r\n")]));
            return true;
          },
        });
        const args = world.args([], between);
        const part = partOf(world.root);
        {
          await using tool = new Tool(args);
          await eventually(`all of ${part}`, () => whole > 0 && sizeOf(part) === whole);
          tool.kill();
          await tool.ended;
        }
        const { code, stderr } = await run(args);
        expect({ only, code, stderr }).toEqual({ only, code: 0, stderr: expect.any(String) });
        expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
      }),
    );
  });

  test("is no dead end where the other side gives the rest of something else", async () => {
    using world = another();
    await using between = await start(server, world.root, "dcz");
    const { ask } = between.meddling;
    // A cache that knows no If-Range, and has it plain.
    between.meddling.ask = (headers, asked) => {
      ask!(headers, asked);
      if (asked.path !== APP || asked.before === 0) return;
      headers.delete("if-range");
      headers.set("accept-encoding", "identity");
    };
    await new HttpOTA(between.url, { timeout: PATIENT, root: world.root }).update();
    expect(world.tree()).toEqual(asTree({ ...V2, ...VERSION_2 }));
  });
});

test.concurrent(
  "lines that break anywhere, any number of times: the new release whole, or the old one",
  async () => {
    const random = new Random(SEED);
    const now = { ...V2, ...VERSION_2 };
    const devices = Array.from({ length: 20 }, (_, i) => i);
    const codings = ["identity", "gzip", "zstd", "br", "dcz", "ota-patch, br", ALL, ALL];
    using world = another();
    const was = world.tree();
    let updated = 0;
    await Promise.all(
      devices.map(async (i) => {
        const root = world.at(`device-${i}`);
        cpSync(world.root, root, { recursive: true });
        // Each device has luck of its own, whatever order things happen in.
        const luck = new Random(random.below(2 ** 32));
        const breaks = luck.next() * 0.35;
        const fickle = luck.chance(0.3);
        const fixed = luck.pick(codings);
        await using between = await Between.start(server, {
          ask: (headers) => {
            const only = fickle ? luck.pick(codings) : fixed;
            const asks = headers.get("accept-encoding") !== "identity";
            if (asks) headers.set("accept-encoding", only);
          },
          answer: (passed, connection) => {
            const { body, headerLength } = passed.answer;
            if (!luck.chance(breaks)) return false;
            if (luck.chance(0.1)) {
              connection.resetAndDestroy();
              return true;
            }
            if (luck.chance(0.2)) {
              const header = headOf(passed.answer).slice(0, luck.below(headerLength));
              connection.end(header);
              return true;
            }
            return cutOff(passed, connection, luck.below(body.length + 1));
          },
        });
        const events: OTAEvent[] = [];
        const report = (event: OTAEvent) => void events.push(event);
        const end = await new HttpOTA(between.url, { timeout: PATIENT, root, report })
          .update()
          .catch((error: unknown) => {
            if (!(error instanceof OTAError)) throw error;
            return error;
          });
        const failed = end instanceof OTAError;
        if (!failed) updated++;
        expect([i, readTree(root)]).toEqual([i, failed ? was : asTree(now)]);
        // Given a good line, it gets there.
        between.meddling = {};
        if (failed) await new HttpOTA(between.url, { timeout: PATIENT, root }).update();
        expect([i, readTree(root)]).toEqual([i, asTree(now)]);
        expect(readdirSync(`${root}/.ota/staged`)).toEqual([]);
      }),
    );
    expect(updated).toBeGreaterThan(0);
  },
);

describe("content that the device has already", () => {
  const LIB = program(300_000, 13);
  const [LEFT, RIGHT] = [program(9_000, 14), program(9_000, 15)];
  const old: Tree = {
    "flash/lib.bin": LIB,
    "flash/left.bin": LEFT,
    "flash/right.bin": RIGHT,
    "flash/main.py": SOURCE,
    "flash/keep.py": V1["flash/short.py"]!,
  };
  const now: Tree = {
    "flash/deep/er/library.bin": LIB, // Moved and renamed.
    "flash/left.bin": RIGHT, // Swapped.
    "flash/right.bin": LEFT,
    "flash/main.py": SOURCE,
    "flash/copy of main.py": SOURCE, // Copied.
    "flash/keep.py": V1["flash/short.py"]!,
  };
  const VERSIONS = { "1.0.0": old, "1.0.1": now };

  test("is taken from there: moved, renamed, copied, swapped; nothing is fetched", async () => {
    await using world = await World.with(VERSIONS, { on: "1.0.0" });
    await using between = await Between.start(world);
    const { code, stderr } = await world.client([], between);
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringMatching(/ 4 files reused\n$/),
    });
    expect(world.tree()).toEqual(asTree({ ...now, ...VERSION_2 }));
    expect(between.content).toEqual([]);
    const [manifest] = between.of("/manifest.json");
    expect(manifest!.answer.body.length + manifest!.answer.headerLength).toBeLessThan(2000);
    // A copy is a file of its own.
    appendFileSync(`${world.root}/flash/copy of main.py`, "# mine\n");
    expect(readFileSync(`${world.root}/flash/main.py`, "utf8")).toBe(SOURCE);
  });

  test("also by a device that never updated before, from the files that its version has", async () => {
    await using world = await World.with(VERSIONS, { device: old });
    await using between = await Between.start(world);
    const { code, last } = await world.client(["--ver", "1.0.0"], between);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1"]);
    expect(world.tree()).toEqual(asTree({ ...now, ...VERSION_2 }));
    // Of the file that stays where it is, the device cannot know what it was copied to.
    const fetched = between.content.map(({ asked }) => asked.path);
    expect(fetched.filter((path) => !path.includes("copy"))).toEqual([]);
  });

  test("unless the application has changed it meanwhile", async () => {
    await using world = await World.with(VERSIONS, { on: "1.0.0" });
    appendFileSync(`${world.root}/flash/lib.bin`, "changed");
    appendFileSync(`${world.root}/flash/left.bin`, "changed");
    const { code } = await world.client();
    expect(code).toBe(0);
    expect(world.tree()).toEqual(asTree({ ...now, ...VERSION_2 }));
    await eventually("all is logged", () => world.sent.length >= 2);
    expect(world.sent).toEqual(["/1.0.1/flash/deep/er/library.bin", "/1.0.1/flash/right.bin"]);
  });

  test("is found even if one of two files that had it was changed", async () => {
    const twice = { "flash/a.bin": LEFT, "flash/b.bin": LEFT };
    for (const changed of Object.keys(twice)) {
      await using world = await World.with(
        { "1.0.0": twice, "1.0.1": { ...twice, "flash/c.bin": LEFT } },
        { on: "1.0.0" },
      );
      appendFileSync(`${world.root}/${changed}`, "changed");
      const { code } = await world.client();
      expect([changed, code, world.sent]).toEqual([changed, 0, []]);
      expect(bytesOf(readFileSync(`${world.root}/flash/c.bin`))).toEqual(LEFT);
    }
  });

  test("under two new names is fetched once, and becomes two files", async () => {
    // The one is fetched, the other comes in the manifest.
    for (const [content, fetched] of [
      [SOURCE, 1],
      ["print('short')\n", 0],
    ] as const) {
      const twins = { "flash/a.py": content, "flash/lib/b.py": content, "sd/c.py": content };
      await using world = await World.with({ "1.0.0": twins });
      const { code } = await world.client();
      expect([code, world.sent.length]).toEqual([0, fetched]);
      const paths = Object.keys(twins).map((path) => `${world.root}/${path}`);
      expect(new Set(paths.map((path) => statSync(path).ino)).size).toBe(3);
      writeFileSync(paths[0]!, "edited\n");
      for (const path of paths.slice(1)) expect(readFileSync(path, "utf8")).toBe(content);
    }
  });

  test("staged before it was cut off is not fetched again", async () => {
    using world = another();
    await using between = await Between.start(server, {
      answer: ({ asked }) => asked.path === "/firmware_1.0.1.bin", // And is silent.
    });
    const args = ["--jobs", "1"];
    {
      const all = world.args(args, between);
      await using tool = new Tool(all);
      await eventually("firmware is asked for", () => between.of("/firmware_1.0.1.bin").length > 0);
      tool.kill();
      await tool.ended;
    }
    const before = between.content.length;
    between.meddling = {};
    const { code, stderr } = await world.client(args, between);
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringMatching(/, 6 files reused\n$/),
    });
    const since = between.content.slice(before).map(({ asked }) => asked.path);
    expect([before > 3, since]).toEqual([true, ["/firmware_1.0.1.bin"]]);
  });
});

describe("what is seen of it", () => {
  const LINE =
    /^received (\d+) bytes for (\d+) bytes of content(?: \((\d+\.\d) %\))?, (\d+) files? reused$/;
  const traffic = (stderr: string): number[] => {
    const lines = stderr.trimEnd().split("\n");
    const found = LINE.exec(lines.at(-1) ?? "");
    if (!found) throw new Error(`expected bytes in the last line of ${JSON.stringify(stderr)}`);
    return found.slice(1).map(Number);
  };
  const sizeOf = (tree: Tree, ...paths: string[]) =>
    paths.reduce((sum, path) => sum + Buffer.from(tree[path]!).length, 0);

  test("client: bytes received, bytes of content, ratio, files reused, before its last line", async () => {
    const second: Tree = { ...V2, "flash/old main.py": SOURCE };
    await using world = await World.with(
      { "1.0.0": V1, "1.0.1": second },
      { beside: IMAGES, on: "1.0.0" },
    );
    await using between = await Between.start(world);
    const { code, stderr, last } = await world.client([], between);
    expect([code, last]).toEqual([0, "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)"]);
    const [received, content, ratio, reused] = traffic(stderr);
    const bodies = between.passed.reduce((sum, { answer }) => sum + answer.body.length, 0);
    const changed = [
      "app.bin",
      "main.py",
      "short.py",
      "new.py",
      "photo.jpg",
      "empty",
      "old main.py",
    ];
    const needed = sizeOf(second, ...changed.map((name) => `flash/${name}`)) + IMAGE_2.length;
    expect([received, content, reused]).toEqual([bodies, needed, 1]);
    expect(ratio).toBeCloseTo((100 * bodies) / needed, 1);

    const again = await world.client([], between);
    expect([again.last, again.stderr]).toEqual(["up to date 1.0.1", ""]);
  });

  test("a release that changes while it is fetched is counted once", async () => {
    using world = another();
    // What the first manifest promises is not what comes.
    await using between = await Between.start(server, {
      answer: (passed, connection) =>
        between.of("/manifest.json").length === 1 &&
        passed.asked.path === "/1.0.1/flash/photo.jpg" &&
        answerOther(passed, connection, PHOTO.toReversed()),
    });
    const { code, stderr } = await world.client(["--jobs", "1"], between);
    expect([code, between.of("/manifest.json").length]).toEqual([0, 2]);
    const [received, content, , reused] = traffic(stderr);
    const bodies = between.passed.reduce((sum, { answer }) => sum + answer.body.length, 0);
    const changed = ["app.bin", "main.py", "short.py", "new.py", "photo.jpg", "empty"];
    const needed = sizeOf(V2, ...changed.map((name) => `flash/${name}`)) + IMAGE_2.length;
    expect([received, content, reused]).toEqual([bodies, needed, 0]);
  });

  test("serve: the coding and the bytes sent in its log, and what was saved in its metrics", async () => {
    await using world = await served();
    const MAIN = "/1.0.1/flash/main.py";
    const asks: [path: string, headers: Record<string, string>, Sent?][] = [
      [MAIN, {}],
      [MAIN, { "Accept-Encoding": "gzip" }],
      [MAIN, { "Accept-Encoding": "zstd" }],
      [MAIN, { "Accept-Encoding": ALL, ...has(SOURCE) }],
      ["/1.0.1/flash/photo.jpg", { "Accept-Encoding": ALL, ...has(SOURCE) }],
      ["/manifest.json?current_ver=1.0.0", { "Accept-Encoding": "zstd" }],
      [MAIN, { "Accept-Encoding": "zstd" }, { method: "HEAD" }],
    ];
    let [sent, saved] = [0, 0];
    const manifest = (await get(world, "/manifest.json?current_ver=1.0.0")).body.length;
    sent += manifest;
    for (const [path, headers, how] of asks) {
      const answer = await get(world, path, headers, how);
      const isHead = how?.method === "HEAD";
      const whole =
        { [MAIN]: bytesOf(V2["flash/main.py"]!).length, "/1.0.1/flash/photo.jpg": PHOTO.length }[
          path
        ] ?? manifest;
      sent += answer.body.length;
      // Of a body that was not sent, nothing was saved.
      if (!isHead) saved += whole - answer.body.length;
      const line = world.server.lines.at(-1)!;
      const logged = / coding=(\S+)/.exec(line)?.[1] ?? "identity";
      expect([line, logged]).toEqual([line, coding(answer)]);
      expect(line).toContain(` ${path.split("?")[0]} 200 ${answer.body.length} `);
    }
    const metrics = new TextDecoder().decode((await get(world, "/-/metrics")).body);
    const counter = (name: string) =>
      Number(new RegExp(`^${name} (\\d+)$`, "m").exec(metrics)?.[1]);
    expect(counter("ota_sent_bytes_total")).toBe(sent);
    expect(counter("ota_saved_bytes_total")).toBe(saved);
    expect(metrics).toContain("# TYPE ota_saved_bytes_total counter");
  });
});

describe("manifest --cost", () => {
  /** Bytes by what they are for, the sum and the messages, as it prints them. */
  async function costOf({ releases }: World, args: string[]) {
    const { code, stdout, stderr } = await run(["manifest", "--cost", "--root", releases, ...args]);
    if (code !== 0) throw new Error(stderr);
    const [head, ...lines] = stdout.trimEnd().split("\n");
    expect(head!.trim().split(/ +/)).toEqual(["client", "board"]);
    const [, client, board, messages, boardMessages] =
      /^ *(\d+) +(\d+) bytes in all: (\d+) and (\d+) LoRa messages of 200$/.exec(lines.pop()!)!;
    const files = lines.map((line) => {
      const [, bytes, forBoard, name] = /^ *(\d+) +(\d+) (.+?)(?: of \d+)?: \S/.exec(line)!;
      return [name!, { client: Number(bytes), board: Number(forBoard) }] as const;
    });
    return {
      files: new Map(files),
      sum: Number(client),
      messages: Number(messages),
      board: { sum: Number(board), messages: Number(boardMessages) },
    };
  }

  /** What a device then receives, by the same names. */
  const received = ({ passed }: Between) =>
    new Map(
      passed.map(({ asked, answer }) => {
        const path = decodeURIComponent(asked.path.slice(1)).replace("1.0.1/", "");
        return [path, answer.body.length] as const;
      }),
    );

  const SOURCE_2 = `${SOURCE}# two\n`;
  const moved: Record<string, [old: Tree, now: Tree]> = {
    "changed and new files": [V1, V2],
    "moved and copied ones": [
      { ...V1, "flash/lib.bin": OTHER },
      { ...V1, "flash/main.py": SOURCE_2, "flash/lib/lib.bin": OTHER, "flash/app 2.bin": APP_1 },
    ],
    "the same content under two names": [
      V1,
      { ...V1, "flash/x.py": SOURCE_2, "flash/y.py": SOURCE_2 },
    ],
  };
  for (const [title, [old, now]] of Object.entries(moved)) {
    for (const ver of ["1.0.0", undefined]) {
      test(`${title}, ${ver ? "on 1.0.0" : "on an empty device"}: what a client receives`, async () => {
        await using world = await World.with(
          { "1.0.0": old, "1.0.1": now },
          { beside: IMAGES, on: ver },
        );
        await using between = await Between.start(world);
        const at = ["--url", between.url, ...(ver ? ["--ver", ver] : [])];
        const cost = await costOf(world, at);
        const { code, stderr } = await world.client([], between);
        expect({ code, stderr }).toEqual({ code: 0, stderr: expect.any(String) });
        const air = received(between);
        const sum = [...air.values()].reduce((total, bytes) => total + bytes, 0);
        const costly = [...cost.files].flatMap(([name, { client }]) => {
          return client > 0 ? [[name, client] as const] : [];
        });
        // Which of two names it is asked for by does not matter.
        const byName = (items: Iterable<readonly [string, number]>) =>
          [...items].map(([name, bytes]) => [name.replace(/[xy]\.py$/, "twin"), bytes]).sort();
        expect(byName(costly)).toEqual(byName(air));
        expect([cost.sum, cost.messages]).toEqual([sum, Math.ceil(sum / 200)]);
        expect(stderr).toContain(`received ${sum} bytes for `);
      });
    }
  }

  test("what a board receives: no contents in the manifest, patches, deflate", async () => {
    const [old, now] = moved["changed and new files"]!;
    await using world = await World.with({ "1.0.0": old, "1.0.1": now }, { beside: IMAGES });
    const cost = await costOf(world, ["--url", world.url, "--ver", "1.0.0"]);
    const bytesOfBody = async (path: string, headers: Record<string, string>) => {
      const response = await fetch(`${world.url}${path}`, { headers, decompress: false });
      expect(response.status).toBe(200);
      return (await response.bytes()).length;
    };
    const accept = { "Accept-Encoding": "ota-patch, deflate" };
    const ask = "/manifest.json?current_ver=1.0.0&hash=sha256";
    const manifest = (await (await fetch(`${world.url}${ask}`)).json()) as Manifest;
    const air = new Map([["manifest.json", await bytesOfBody(ask, {})]]);
    for (const { URL: url, dst_path } of [...manifest.new, ...manifest.update]) {
      const path = dst_path.slice(1);
      const known = old[path] === undefined ? {} : has(bytesOf(old[path]));
      const { pathname } = new URL(url);
      air.set(path, await bytesOfBody(pathname, { ...accept, ...known }));
    }
    const image = new URL(manifest.firmware!.URL).pathname;
    const runs = has(bytesOf(IMAGES["firmware_1.0.0.bin"]!));
    air.set(image.slice(1), await bytesOfBody(image, { ...accept, ...runs }));
    const sum = [...air.values()].reduce((total, bytes) => total + bytes, 0);
    expect([...cost.files].map(([name, { board }]) => [name, board]).sort()).toEqual(
      [...air].sort(),
    );
    expect(cost.board).toEqual({ sum, messages: Math.ceil(sum / 200) });
  });

  test("nothing newer costs the answer", async () => {
    expect(await costOf(server, ["--ver", "1.0.1"])).toMatchObject({ sum: 4, messages: 1 });
  });
});
