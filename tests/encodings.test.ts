/**
 * No byte on the air that the device already has: what the server codes and for whom, what a device
 * makes of it, over real sockets, and what happens where the line breaks, or someone meddles. Lines
 * are cut at random: set SEED to repeat a run.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import * as zlib from "node:zlib";
import { HttpOTA, MAX_CODED, OTAError, type OTAEvent, type ServeOptions } from "../ota.ts";
import { answerOther, Between, codingsOf, cutOff, headOf, type Passed } from "./helpers/between.ts";
import { boardUpdate } from "./helpers/board.ts";
import { edited, noise, program } from "./helpers/content.ts";
import { Double, head, offering, send } from "./helpers/double.ts";
import { Random } from "./helpers/random.ts";
import { parseResponse, rawRequest, type ParsedResponse } from "./helpers/raw.ts";
import { bytesOf } from "./helpers/temp.ts";
import {
  asTree,
  eventually,
  layTree,
  need,
  ota,
  OTA_TS,
  readTree,
  Served,
  sha256,
  Temp,
  Tool,
  type Ended,
  type ToolOptions,
  type Tree,
} from "./helpers/tool.ts";

setDefaultTimeout(30_000);

const SEED = Number(Bun.env.SEED ?? Math.floor(Math.random() * 2 ** 32));
console.log(`encodings: SEED=${SEED}`);

// ── A release, and the one after it. ──

const APP_1 = program(60_000, 1);
const APP_2 = edited(APP_1, 2);
/** What the server knows, and no device would name for this. */
const OTHER = program(5_000, 3);
const IMAGE_1 = program(150_000, 4);
const IMAGE_2 = edited(IMAGE_1, 5, 20);
const PHOTO = noise(20_000, 6);
const SOURCE = "def measure():\n    return read(0x10)\n".repeat(40);

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

/** A release root `releases` and room for a device `device`. */
class Fleet extends Temp {
  readonly releases = this.at("releases");
  readonly root = this.at("device");

  constructor(versions: Record<string, Tree> = { "1.0.0": V1, "1.0.1": V2 }, more: Tree = IMAGES) {
    super();
    layTree(this.releases, more);
    for (const [name, files] of Object.entries(versions)) layTree(this.at("releases", name), files);
  }

  client(server: { url: string }, args: string[] = [], options: ToolOptions = {}): Promise<Ended> {
    return ota(["client", "--root", this.root, "--server", server.url, ...args], options);
  }

  /** Brings the device to an older release, as the server had it once. */
  async provision(version: string): Promise<void> {
    await using server = await Served.start(this.releases, { latest: version });
    await new HttpOTA(server.url, { root: this.root }).update();
  }
}

// ── Requests below `fetch`, and what they bring. ──

const ALL = "dcz, zstd, gzip";

/** The header that names content that a device has. */
const has = (content: string | Uint8Array) => ({
  "Available-Dictionary": `:${Buffer.from(sha256(content), "hex").toString("base64")}:`,
});

interface Sent {
  method?: string;
  version?: "1.0" | "1.1";
}

async function get(
  server: { url: string },
  path: string,
  headers: Record<string, string> = {},
  { method = "GET", version = "1.1" }: Sent = {},
): Promise<ParsedResponse> {
  const lines = Object.entries({
    Host: "device.test",
    ...(version === "1.1" && { Connection: "close" }),
    ...headers,
  }).map(([name, value]) => `${name}: ${value}\r\n`);
  const request = `${method} ${path} HTTP/${version}\r\n${lines.join("")}\r\n`;
  const { bytes, closed, error } = await rawRequest(server.url, request, { timeoutMs: 20_000 });
  if (!closed || error !== undefined) throw new Error(`${path}: ${error ?? "not closed"}`);
  return parseResponse(bytes);
}

const coding = ({ headers }: ParsedResponse) => headers.get("content-encoding") ?? "identity";

/** The content of a body, by a decoder that is not the tool's. */
function decoded(response: ParsedResponse, old?: Uint8Array): Uint8Array {
  const { body } = response;
  switch (coding(response)) {
    case "gzip":
      return bytesOf(zlib.gunzipSync(body));
    case "zstd":
      return bytesOf(zlib.zstdDecompressSync(body));
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
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /, "").split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

/** The one server for all that only asks; nothing in its root changes. */
let fleet: Fleet;
let server: Served;
beforeAll(async () => {
  fleet = new Fleet();
  server = await Served.start(fleet.releases);
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
  fleet[Symbol.dispose]();
});

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
    using strange = new Fleet(
      { "1.0.0": { "flash/app.bin": old }, "1.0.1": { "flash/app.bin": APP_2 } },
      {},
    );
    await strange.provision("1.0.0");
    await using server = await Served.start(strange.releases);
    const { code, stderr } = await strange.client(server);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.not.stringContaining("ota.ts:") });
    expect(bytesOf(readFileSync(`${strange.root}/flash/app.bin`))).toEqual(APP_2);
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
    ["br, deflate", knows, "identity"],
    ["gzipped, x-zstd", knows, "identity"],
    // The best of what is accepted.
    ["gzip", knows, "gzip"],
    ["zstd", knows, "zstd"],
    ["gzip, zstd", knows, "zstd"],
    ["gzip, deflate, br, zstd", {}, "zstd"],
    ["dcz", knows, "dcz"],
    ["gzip, zstd, dcz", knows, "dcz"],
    ["DCZ", knows, "dcz"],
    ["gzip;q=0.1,dcz;q=0.001", knows, "dcz"],
    // q=0 is no.
    ["dcz;q=0, zstd, gzip", knows, "zstd"],
    ["dcz;q=0.000, zstd ; q=0, gzip", knows, "gzip"],
    ["gzip;q=0", knows, "identity"],
    ["dcz;q=0, zstd;Q=0.0, gzip;q=0.", knows, "identity"],
    // A dictionary that there is not.
    ["dcz", {}, "identity"],
    [ALL, {}, "zstd"],
    [ALL, has("what nobody has ever released"), "zstd"],
    ["dcz", has("what nobody has ever released"), "identity"],
    [ALL, { "Available-Dictionary": "" }, "zstd"],
    [ALL, { "Available-Dictionary": sha256(APP_1) }, "zstd"],
    [ALL, { "Available-Dictionary": knows["Available-Dictionary"].slice(1, -1) }, "zstd"],
    [ALL, { "Available-Dictionary": "::" }, "zstd"],
    [ALL, { "Available-Dictionary": `:${"A".repeat(4000)}:` }, "zstd"],
    [ALL, { "Available-Dictionary": ":../../../etc/passwd:" }, "zstd"],
  ];
  for (const [accepted, dictionary, got] of cases) {
    const shown = Object.values(dictionary)[0]?.slice(0, 20) ?? "none";
    test(`Accept-Encoding: ${accepted}, dictionary ${shown}: ${got}`, async () => {
      const headers = { ...(accepted !== undefined && { "Accept-Encoding": accepted }) };
      const response = await get(server, APP, { ...headers, ...dictionary });
      expect([coding(response), misaligned(response)]).toEqual([got, []]);
      expect(decoded(response, APP_1)).toEqual(APP_2);
    });
  }

  test("a dictionary that the server does not know costs nothing: the same bytes", async () => {
    const ask = (more: Record<string, string>) => get(server, APP, { "Accept-Encoding": ALL, ...more });
    const [without, unknown] = [await ask({}), await ask(has("unknown"))];
    expect(unknown.body).toEqual(without.body);
    const stable = ({ headers }: ParsedResponse) => [...headers].filter(([name]) => name !== "date");
    expect(stable(unknown)).toEqual(stable(without));
  });

  test("a delta that would not be smaller: without the old content", async () => {
    const useless = { "Accept-Encoding": ALL, ...has(PHOTO) };
    expect(coding(await get(server, APP, useless))).toBe("zstd");
    const noCodingHelps = await get(server, "/1.0.1/flash/photo.jpg", { ...useless, ...has(APP_1) });
    expect([coding(noCodingHelps), noCodingHelps.body]).toEqual(["identity", PHOTO]);
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

  test("8 MiB are coded; more is not, and is no dictionary either", async () => {
    expect(MAX_CODED).toBe(8 * 1024 * 1024);
    const most = new Uint8Array(MAX_CODED).fill(7);
    const over = new Uint8Array(MAX_CODED + 1).fill(7);
    const small = new Uint8Array(100_000).fill(7);
    using large = new Fleet({ "1.0.0": { most, over, small } }, {});
    await using server = await Served.start(large.releases);
    const ask = (name: string, old: Uint8Array) =>
      get(server, `/1.0.0/${name}`, { "Accept-Encoding": ALL, ...has(old) });
    const answers = await Promise.all([
      ask("most", small),
      ask("over", small),
      ask("small", over),
      ask("small", most),
    ]);
    const codings = answers.map(coding);
    expect(codings.map((name) => name === "identity")).toEqual([false, true, false, false]);
    expect(codings[2]).toBe("zstd");
    for (const [i, old] of [small, small, over, most].entries()) {
      const expected = [most, over, small, small][i]!;
      expect(sha256(decoded(answers[i]!, old))).toBe(sha256(expected));
    }
  });

  test("a file that belongs to no version is sent as it is", async () => {
    using odd = new Fleet(undefined, { "notes.txt": "note\n".repeat(100) });
    await using server = await Served.start(odd.releases);
    expect(coding(await get(server, "/notes.txt", { "Accept-Encoding": ALL }))).toBe("identity");
  });
});

describe("each form of a content is a representation of its own", () => {
  const forms: [name: string, headers: Record<string, string>, old?: Uint8Array][] = [
    ["identity", {}],
    ["gzip", { "Accept-Encoding": "gzip" }],
    ["zstd", { "Accept-Encoding": "zstd" }],
    ["dcz", { "Accept-Encoding": "dcz", ...has(APP_1) }, APP_1],
    ["dcz", { "Accept-Encoding": "dcz", ...has(APP_2) }, APP_2],
  ];
  const tagOf = async (headers: Record<string, string>) =>
    (await get(server, APP, headers)).headers.get("etag")!;

  test("with a strong tag of its own, always the same, and Vary", async () => {
    const tags = [];
    for (const [name, headers] of forms) {
      const [first, again] = [await get(server, APP, headers), await get(server, APP, headers)];
      expect([coding(first), again.body]).toEqual([name, first.body]);
      expect(again.headers.get("etag")).toBe(first.headers.get("etag"));
      expect(first.headers.get("vary")).toBe("Accept-Encoding, Available-Dictionary");
      tags.push(first.headers.get("etag")!);
    }
    expect(tags.filter((tag) => !/^"[!#-~]+"$/.test(tag))).toEqual([]);
    expect(new Set(tags).size).toBe(forms.length);
    const other = (await get(server, "/1.0.0/flash/app.bin")).headers.get("etag")!;
    expect(tags).not.toContain(other);
  });

  for (const [i, [name, headers, old]] of forms.entries()) {
    const title = i === 4 ? "dcz, with another dictionary" : name;
    test(`${title}: If-None-Match, Range and If-Range are about it alone`, async () => {
      const whole = await get(server, APP, headers);
      const tag = whole.headers.get("etag")!;
      const size = whole.body.length;
      const ask = (more: Record<string, string>) => get(server, APP, { ...headers, ...more });

      const same = await ask({ "If-None-Match": tag });
      expect([same.status, same.body.length, same.headers.get("etag")]).toEqual([304, 0, tag]);
      expect(same.headers.get("vary")).toBe("Accept-Encoding, Available-Dictionary");

      for (const [from, to] of [
        [0, 9],
        [30, 59],
        [size - 5, size - 1],
      ] as const) {
        const part = await ask({ Range: `bytes=${from}-${to}` });
        expect([part.status, coding(part)]).toEqual([206, name]);
        expect(part.headers.get("content-range")).toBe(`bytes ${from}-${to}/${size}`);
        expect(part.headers.get("etag")).toBe(tag);
        expect(part.headers.get("vary")).toBe("Accept-Encoding, Available-Dictionary");
        expect(part.body).toEqual(whole.body.slice(from, to + 1));
      }
      const behind = await ask({ Range: `bytes=${size}-` });
      expect([behind.status, behind.headers.get("content-range")]).toEqual([416, `bytes */${size}`]);

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
      for (const field of ["content-length", "content-encoding", "content-type", "etag", "vary"]) {
        expect([field, only.headers.get(field)]).toEqual([field, got.headers.get(field)]);
      }
    });
  }
});

describe("a deployed board", () => {
  test("gets plain bytes, aligned, while everybody else gets coded ones", async () => {
    using fleet = new Fleet();
    await using server = await Served.start(fleet.releases);
    await fleet.provision("1.0.0");
    expect((await fleet.client(server)).code).toBe(0);
    const had = new Map(Object.entries(V1).map(([path, content]) => [path, bytesOf(content)]));
    const board = await boardUpdate(server.url, "1.0.0", had);
    const files = Object.entries(V2).map(([path, content]) => [path, bytesOf(content)] as const);
    expect(board.version).toBe("1.0.1");
    expect([...board.files].sort()).toEqual(files.sort());
    expect(board.firmware).toEqual(IMAGE_2);
    const codings = server.lines.map((line) => / coding=(\S+)/.exec(line)?.[1]);
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

  test("would find the end of the header of coded answers, too", async () => {
    const paths = [
      "/manifest.json",
      "/manifest.json?current_ver=1.0.0&hash=sha256",
      "/firmware_1.0.1.bin",
      ...Object.keys(V2).map((path) => `/1.0.1/${path}`),
    ];
    for (const path of paths) {
      for (const accepted of ["gzip", "zstd", ALL]) {
        for (const version of ["1.0", "1.1"] as const) {
          const headers = { "Accept-Encoding": accepted, ...has(APP_1) };
          const response = await get(server, path, headers, { version });
          expect([path, accepted, misaligned(response)]).toEqual([path, accepted, []]);
        }
      }
    }
  });
});

describe("work is done once", () => {
  // Long enough that it tells on the clock of the processor, which ticks a hundred times a second.
  const [OLD_A, OLD_B] = [program(1_200_000, 7), program(1_200_000, 8)];
  const [NEW_A, NEW_B] = [edited(OLD_A, 9, 40), edited(OLD_B, 10, 40)];

  test("a hundred ask at once: as much work as for one, and the same bytes", async () => {
    using fleet = new Fleet({ "1.0.0": { a: OLD_A, b: OLD_B }, "1.0.1": { a: NEW_A, b: NEW_B } }, {});
    await using process = new Tool(["serve", "--root", fleet.releases, "--port", "0"]);
    const [, url = ""] = await process.until(/ at (http:\S+)\n/);
    const server = { url, pid: process.pid };
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
    // A hundred answers are some work as well, but not a second encoding.
    expect(one).toBeGreaterThan(0.1);
    expect(hundred).toBeLessThan(1.6 * one + 0.3);

    const again = await cost(async () => {
      for (let i = 0; i < 20; i++) await ask("b", OLD_B);
    });
    expect(again).toBeLessThan(one / 2);
  });

  test("beside everything else: others are answered meanwhile", async () => {
    using fleet = new Fleet({ "1.0.0": { a: OLD_A }, "1.0.1": { a: NEW_A } }, {});
    await using server = await Served.start(fleet.releases);
    let done = false;
    const slow = get(server, "/1.0.1/a", { "Accept-Encoding": ALL, ...has(OLD_A) }).then((got) => {
      done = true;
      return got;
    });
    let meanwhile = 0;
    while (!done) {
      expect((await get(server, "/-/health")).status).toBe(200);
      meanwhile++;
    }
    expect(coding(await slow)).toBe("dcz");
    expect(meanwhile).toBeGreaterThan(5);
  });
});
