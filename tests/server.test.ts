/**
 * The server over real sockets, mostly raw ones: what is on the wire to the byte, since deployed
 * boards depend on it, and what no HTTP client would send. As a library, and as the process that a
 * person starts and stops. Random requests follow the chosen ones: set SEED to repeat a run.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import * as fs from "node:fs";
import { connect } from "node:net";
import { fileURLToPath } from "node:url";
import type { OTAServer, ServeOptions } from "../ota.ts";
import { makeKeys, OTAError, parseManifest, parseRange, serve } from "../ota.ts";
import { boardGet, boardUpdate } from "./helpers/board.ts";
import { sha1 } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import {
  addressOf,
  freePort,
  parseResponse,
  rawRequest,
  sendRequest as send,
  type ParsedResponse,
  type Sent,
} from "./helpers/raw.ts";
import { bytesOf, filesBelow, Temp, type Tree } from "./helpers/temp.ts";
import { ota, OTA_TS, run, Serving } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const SEED = seeded("server");

const EXAMPLE = fileURLToPath(new URL("../examples/smart-meter", import.meta.url));
const SECRET = "this lies outside of the root";

const text = (data: Uint8Array): string => new TextDecoder().decode(data);

/** Bytes that are no text, among them blank lines, as boards stumble over them. */
const binary = (size: number): Uint8Array =>
  new Uint8Array(size).map((_, i) => [0x80, 0x0d, 0x0a, 0x0d, 0x0a, i % 256, 0xff][i % 7]!);

/** A server for a test, on a free port of this computer. */
async function listen(root: Temp | string, options: ServeOptions = {}): Promise<OTAServer> {
  const path = typeof root === "string" ? root : root.path;
  return serve({ root: path, port: 0, host: "127.0.0.1", quiet: 0, ...options });
}

const status = async (server: OTAServer | string, target: string, sent: Sent = {}) =>
  (await send(server, target, sent)).status;

// ── Header blocks that boards can read. ──

/** What is wrong with a 200 to a GET for a board; empty when nothing is. */
function misaligned({ status, headers, headerLength, body }: ParsedResponse): string[] {
  const wrong: string[] = [];
  if (status !== 200) wrong.push(`status ${status}`);
  if (headerLength % 100 !== 0) wrong.push(`a header of ${headerLength} bytes`);
  if (headerLength > 500) wrong.push(`a header of ${headerLength} bytes, more than 500`);
  if (!headers.get("x-pad")) wrong.push("no X-Pad");
  if (headers.has("transfer-encoding")) wrong.push("Transfer-Encoding");
  if (headers.get("content-length") !== `${body.length}`) {
    wrong.push(`Content-Length ${headers.get("content-length")} of ${body.length}`);
  }
  return wrong;
}

describe("every 200 to a GET ends its header on a multiple of 100 bytes, at most 500", () => {
  const sizes = [0, 1, 9, 10, 99, 100, 101, 999, 1000, 4096, 65_536, 1_000_000, 5_000_000];
  const long = "n".repeat(200);
  const names = [
    ...["a.py", "a.bin", "a.html", "a.js", "a.json", "a.css", "a.png", "a.svg", "a.txt", "a.wasm"],
    ...["a.mpy", "a.tar.gz", "a.md", "a.xml", "a.mp3", "a.pdf", "a", ".a", "a b", "a#b", "a?b"],
    ...["100%", "\u00e9.txt", "\u{1f680}".repeat(40), `${long}.py`, `${long}/${long}/${long}.json`],
    ...['a"b', "a;b", "a\u00a0b", "a\u202eb.html", "a=b&c"],
  ];
  const content = binary(1234);
  let root: Temp;
  let server: OTAServer;
  let signed: OTAServer;

  beforeAll(async () => {
    root = new Temp({ "firmware_1.0.1.bin": binary(7000), "1.0.0/a.py": "" });
    // Content of a version is sent from memory, other files from disk.
    for (const directory of ["1.0.1", "other"]) {
      for (const size of sizes) root.write({ [`${directory}/${size}`]: binary(size) });
      for (const name of names) root.write({ [`${directory}/${name}`]: content });
    }
    using keys = new Temp({ key: makeKeys().key });
    server = await listen(root);
    signed = await listen(root, { sign: keys.at("key") });
  });

  afterAll(async () => {
    await server?.stop();
    await signed?.stop();
    root?.[Symbol.dispose]();
  });

  const path = (...parts: string[]) =>
    `/${parts
      .flatMap((part) => part.split("/"))
      .map(encodeURIComponent)
      .join("/")}`;

  for (const directory of ["1.0.1", "other"]) {
    const where = directory === "other" ? "disk" : "memory";
    for (const version of ["1.0", "1.1"] as const) {
      test(`bodies of 0 bytes to 5 MB from ${where}, HTTP/${version}, the first time and again`, async () => {
        for (const size of [...sizes, ...sizes]) {
          const response = await send(server, `/${directory}/${size}`, { version });
          expect([size, ...misaligned(response)]).toEqual([size]);
          expect(Buffer.from(response.body).equals(binary(size))).toBe(true);
        }
      });

      test(`names of every kind from ${where}, HTTP/${version}`, async () => {
        for (const name of names) {
          const response = await send(server, path(directory, name), { version });
          expect([name, ...misaligned(response)]).toEqual([name]);
          expect(Buffer.from(response.body).equals(content)).toBe(true);
        }
      });
    }
  }

  test("firmware, and content of a version that is too large for memory", async () => {
    using large = new Temp({ "1/large.bin": "" });
    fs.truncateSync(large.at("1/large.bin"), 17 * 1024 * 1024);
    await using other = await listen(large);
    const response = await send(other, "/1/large.bin", { version: "1.0" });
    expect(misaligned(response)).toEqual([]);
    expect(response.body).toHaveLength(17 * 1024 * 1024);
    expect(misaligned(await send(server, "/firmware_1.0.1.bin", { version: "1.0" }))).toEqual([]);
  });

  test("manifests, whatever the length of Host, null included, and signed ones", async () => {
    for (const url of [server, signed]) {
      for (let length = 1; length <= 253; length += 7) {
        const host = "h".repeat(length);
        for (const version of ["1.0", "1.1"] as const) {
          const response = await send(url, "/manifest.json?current_ver=1.0.0", { host, version });
          expect([host, ...misaligned(response)]).toEqual([host]);
          expect(text(response.body)).toContain(`"http://${host}/1.0.1/`);
        }
      }
      const nothing = await send(url, "/manifest.json?current_ver=9", { version: "1.0" });
      expect(misaligned(nothing)).toEqual([]);
      expect(text(nothing.body)).toBe("null");
    }
  });

  test("what the server says of itself", async () => {
    for (const target of ["/-/health", "/-/metrics"]) {
      expect(misaligned(await send(server, target, { version: "1.0" }))).toEqual([]);
    }
  });

  test("whatever else a client sends", async () => {
    const all: Record<string, string>[] = [
      { Connection: "keep-alive" },
      { Range: "bytes=4-2" },
      { Range: "bytes=0-1", "If-Range": '"other"' },
      { "If-None-Match": '"other"' },
      { "If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT" },
      { Expect: "nothing", Upgrade: "websocket", Origin: "http://a", Cookie: "a=b" },
    ];
    for (const headers of all) {
      for (const target of ["/1.0.1/1000", "/other/1000", "/manifest.json"]) {
        const response = await send(server, target, { version: "1.0", headers });
        expect([target, headers, ...misaligned(response)]).toEqual([target, headers]);
      }
    }
  });

  test("who sends Accept-Encoding is no board, and gets no padding; the next one does", async () => {
    for (const accepted of ["gzip, deflate, br, zstd", "identity", ""]) {
      for (const target of ["/1.0.1/1000", "/other/1000", "/manifest.json", "/-/health"]) {
        const headers = { "Accept-Encoding": accepted };
        const response = await send(server, target, { version: "1.0", headers });
        expect([target, response.status, response.headers.get("x-pad")]).toEqual([
          target,
          200,
          null,
        ]);
        expect(misaligned(await send(server, target, { version: "1.0" }))).toEqual([]);
      }
    }
  });

  test("HTTP/1.0: the server closes, whether or not the client would rather not", async () => {
    for (const connection of ["close", "keep-alive"]) {
      for (const target of ["/1.0.1/1000", "/other/1000", "/manifest.json", "/missing"]) {
        // `send` throws when the connection is not closed.
        const headers = { Connection: connection };
        const response = await send(server, target, { version: "1.0", headers });
        expect(response.status).toBe(target === "/missing" ? 404 : 200);
      }
    }
  });

  test("HTTP/1.1: the connection stays open for more", async () => {
    const request = "GET /1.0.1/10 HTTP/1.1\r\nHost: a\r\n\r\n";
    const last = "GET /1.0.1/10 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    const { bytes, closed } = await rawRequest(server.url, request + request + last);
    expect(closed).toBe(true);
    expect(text(bytes).match(/HTTP\/1\.1 200 OK/g)).toHaveLength(3);
    const first = parseResponse(bytes);
    expect(first.headerLength % 100).toBe(0);
  });

  test("a board gets every file whole, and a plain server's files it does not", async () => {
    for (const directory of ["1.0.1", "other"]) {
      for (const size of sizes) {
        const got = await boardGet(server.url, `/${directory}/${size}`);
        expect(got.raised).toBeUndefined();
        expect(Buffer.from(got.body).equals(binary(size))).toBe(true);
      }
    }
    const plain = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: () => new Response(binary(1000).slice()),
    });
    try {
      const got = await boardGet(plain.url, "/x");
      expect(got.raised ?? got.body.length).not.toBe(1000);
    } finally {
      await plain.stop(true);
    }
  });
});

describe("a deployed board", () => {
  /** The files of a version as a board has them. */
  const filesOf = (root: string, version: string) => filesBelow(`${root}/${version}`);
  const sorted = (files: ReadonlyMap<string, Uint8Array>) =>
    new Map([...files].sort(([a], [b]) => (a < b ? -1 : 1)));

  test("updates with the example: files, and firmware", async () => {
    await using server = await listen(EXAMPLE);
    const after = await boardUpdate(server.url, "1.0.0", filesOf(EXAMPLE, "1.0.0"));
    expect(after.version).toBe("1.0.1");
    expect(after.files).toEqual(filesOf(EXAMPLE, "1.0.1"));
    expect(after.firmware).toEqual(bytesOf(fs.readFileSync(`${EXAMPLE}/firmware_1.0.1.bin`)));
    // And then has nothing more to do.
    expect(await boardUpdate(server.url, after.version, after.files)).toEqual({
      version: "1.0.1",
      files: after.files,
    });
  });

  test("updates with binary assets, empty files, odd names and large firmware", async () => {
    using root = new Temp({
      "1/flash/main.py": "one",
      "1/flash/logo.bin": binary(500),
      "1/flash/old.py": "",
      "1/sd/x": "",
      "2/flash/main.py": "two",
      "2/flash/logo.bin": binary(123_456),
      "2/flash/empty": "",
      "2/sd/x": "\r\n\r\n",
      "2/sd/\u{1f680} #?%+.bin": binary(100),
      "2/sd/lines": "\r\n\r\n".repeat(99),
      "firmware_2.bin": binary(2_000_000),
    });
    await using server = await listen(root);
    const after = await boardUpdate(server.url, "1", filesOf(root.path, "1"));
    expect(sorted(after.files)).toEqual(sorted(filesOf(root.path, "2")));
    expect(sha1(after.firmware ?? "")).toBe(sha1(binary(2_000_000)));
    expect(after.version).toBe("2");
  });

  test("updates when URLs name another server with a path of its own", async () => {
    using root = new Temp({
      "1/flash/a": "1",
      "2/flash/a": binary(999),
      "firmware_2.bin": binary(5),
    });
    for (const url of [
      "https://cdn.example/fleet/7",
      "http://cdn.example:8080/",
      "http://cdn/1/",
    ]) {
      await using server = await listen(root, { url });
      const after = await boardUpdate(server.url, "1", filesOf(root.path, "1"));
      expect(after.files).toEqual(filesOf(root.path, "2"));
      expect(after.firmware).toEqual(binary(5));
    }
  });
});

// ── Manifests. ──

describe("GET /manifest.json", () => {
  const tree: Tree = { "1.0.0/a": "1", "1.0.1/a b": "2", "firmware_1.0.1.bin": "3" };

  test("compact JSON with the Host that was asked, never to be cached", async () => {
    using root = new Temp(tree);
    await using server = await listen(root);
    const target = "/manifest.json?current_ver=1.0.0&reqid=7&unknown=x";
    const { status, headers, body } = await send(server, target, { host: "10.0.0.1:8000" });
    expect(status).toBe(200);
    expect(headers.get("content-type")).toBe("application/json");
    expect(headers.get("cache-control")).toBe("no-store");
    expect(text(body)).toBe(
      '{"delete":["a"],' +
        `"firmware":{"URL":"http://10.0.0.1:8000/firmware_1.0.1.bin","hash":"${sha1("3")}"},` +
        `"new":[{"URL":"http://10.0.0.1:8000/1.0.1/a%20b","dst_path":"/a b","hash":"${sha1("2")}"}],` +
        '"previous_version":"1.0.0","request_id":"7","update":[],"version":"1.0.1"}',
    );
  });

  test("null for a device that is up to date, or newer than the server", async () => {
    using root = new Temp(tree);
    await using server = await listen(root);
    for (const version of ["1.0.1", "1.00.1", "1.0.2", "9", "x", "%F0%9F%9A%80"]) {
      const { status, body } = await send(server, `/manifest.json?current_ver=${version}`);
      expect([status, text(body)]).toEqual([200, "null"]);
    }
  });

  test("every URL in it leads to the content that it promises", async () => {
    using root = new Temp({
      "1.0+b/a b": "1",
      "1.0+b/#?%&=": "2",
      "1.0+b/\u{1f680}/\u00e9": "3",
      "1.0+b/%41": "4",
      "1.0+b/e": "",
      "1.0+b/.env": "5",
      "1.0+b/..x": "6",
      "1.0+b/...": "7",
      "firmware_1.0+b.bin": "8",
    });
    await using server = await listen(root);
    const manifest = parseManifest(await (await fetch(`${server.url}manifest.json`)).bytes());
    const all = [...manifest!.new, manifest!.firmware!];
    expect(all).toHaveLength(9);
    for (const { URL: url, hash } of all) {
      const response = await fetch(url);
      expect([url, response.status, sha1(await response.bytes())]).toEqual([url, 200, hash!]);
    }
  });

  test("a Host that is missing or is none: 400, since URLs would repeat it", async () => {
    using root = new Temp(tree);
    await using server = await listen(root);
    const odd = [
      "a/b",
      "a b",
      "a@b",
      "a?b",
      "a#b",
      'a"b',
      "<a>",
      "a:b",
      "a:",
      "a,b",
      ":80",
      "",
      "a\\b",
    ];
    odd.push(
      "\u00e9",
      "a'b",
      "http://a",
      "a:123456",
      "%61",
      "[::1",
      "a{b}",
      "a\tb",
      "a;b",
      "a&b",
      "a=b",
    );
    for (const version of ["1.0", "1.1"] as const) {
      for (const host of odd) {
        const { status, body } = await send(server, "/manifest.json", { host, version });
        expect([host, status]).toEqual([host, 400]);
        expect(text(body)).not.toContain("http:");
      }
      expect(await status(server, "/manifest.json", { host: null, version })).toBe(400);
    }
    expect(await status(server, "/manifest.json", { headers: { Host: "other" } })).toBe(400);
  });

  test("hosts that there are", async () => {
    using root = new Temp(tree);
    await using server = await listen(root);
    for (const host of [
      "a",
      "a.b",
      "a_b-c.local:80",
      "10.0.0.1:65535",
      "[::1]:8000",
      "[fe80::1]",
      "A",
    ]) {
      const { status, body } = await send(server, "/manifest.json", { host });
      expect(status).toBe(200);
      expect(parseManifest(body)?.new[0]?.URL).toStartWith(
        `http://${host.toLowerCase()}`.replace(/:80$/, ""),
      );
      expect(text(body)).toContain(`"http://${host}/1.0.1/`);
    }
  });

  test("--url stands in front instead of the Host, which may then be missing", async () => {
    using root = new Temp(tree);
    await using server = await listen(root, { url: "https://cdn.example/fleet/" });
    for (const host of ["a", "a/b", null]) {
      const { status, body } = await send(server, "/manifest.json", { host, version: "1.0" });
      expect(status).toBe(200);
      expect(text(body)).toContain('"https://cdn.example/fleet/1.0.1/a%20b"');
      expect(text(body)).toContain('"https://cdn.example/fleet/firmware_1.0.1.bin"');
    }
  });

  test("below the path of --url stands the same as below /", async () => {
    using root = new Temp({ ...tree, "fleet.txt": "f" });
    await using server = await listen(root, { url: "https://cdn.example/fleet/7" });
    for (const prefix of ["", "/fleet/7"]) {
      expect(text((await send(server, `${prefix}/1.0.1/a%20b`)).body)).toBe("2");
      expect(await status(server, `${prefix}/manifest.json`)).toBe(200);
      expect(await status(server, `${prefix}/firmware_1.0.1.bin`)).toBe(200);
      expect(await status(server, `${prefix}/missing`)).toBe(404);
      expect(await status(server, `${prefix}/`)).toBe(404);
      expect(await status(server, `${prefix}/../../1.0.0`, { version: "1.0", host: null })).toBe(
        404,
      );
    }
    for (const target of ["/fleet/1.0.1/a%20b", "/fleet/71.0.1/a%20b", "/fleet/7fleet.txt"]) {
      expect(await status(server, target)).toBe(404);
    }
  });

  test("a --url that is none is a usage error", async () => {
    using root = new Temp(tree);
    for (const url of ["", "cdn.example", "ftp://cdn", "http://cdn/?a", "http://cdn/#a", "/x"]) {
      const refused = await listen(root, { url }).catch((error: unknown) => error);
      expect(refused).toBeInstanceOf(OTAError);
      expect(refused).toHaveProperty("exitCode", 2);
    }
  });

  test("--latest and --ignore hold back", async () => {
    using root = new Temp({ ...tree, "1.0.0/a.md": "" });
    await using server = await listen(root, { latest: "1.0.0", ignore: ["*.md"] });
    const { body } = await send(server, "/manifest.json");
    expect(parseManifest(body)).toMatchObject({ version: "1.0.0", new: [{ dst_path: "/a" }] });
    expect(parseManifest(body)).not.toContainKey("firmware");
    expect(text((await send(server, "/manifest.json?current_ver=1.0.1")).body)).toBe("null");
  });

  test("HEAD: the header of the GET, and nothing else", async () => {
    using root = new Temp(tree);
    await using server = await listen(root);
    const get = await send(server, "/manifest.json");
    const head = await send(server, "/manifest.json", { method: "HEAD" });
    expect([head.status, head.body.length]).toEqual([200, 0]);
    for (const name of ["content-length", "content-type", "cache-control"]) {
      expect(head.headers.get(name)).toBe(get.headers.get(name));
    }
  });
});

// ── Files. ──

describe("what is sent again and again", () => {
  test("the same content under several names goes with the type of each", async () => {
    using root = new Temp({ "1/a.html": "same", "1/b.txt": "same", "1/c.json": "same" });
    await using server = await listen(root);
    const types = { "a.html": "text/html", "b.txt": "text/plain", "c.json": "application/json" };
    for (const name of ["a.html", "b.txt", "a.html", "c.json", "c.json", "b.txt"] as const) {
      const response = await send(server, `/1/${name}`);
      expect(response.headers.get("content-type")).toStartWith(types[name]);
      expect([text(response.body), misaligned(response)]).toEqual(["same", []]);
    }
  });

  test("one way of asking leaves nothing behind for the next", async () => {
    using root = new Temp({ "1/f.txt": "0123456789".repeat(50), "2/f.txt": "two" });
    using keys = new Temp({ key: makeKeys().key });
    await using server = await listen(root, { sign: keys.at("key") });
    const random = new Random(SEED);
    const ways: [name: string, target: string, sent: Sent][] = [
      ["plain", "/1/f.txt", {}],
      ["coded", "/1/f.txt", { headers: { "Accept-Encoding": "zstd" } }],
      ["head", "/1/f.txt", { method: "HEAD" }],
      ["part", "/1/f.txt", { headers: { Range: "bytes=3-5" } }],
      ["beyond", "/1/f.txt", { headers: { Range: "bytes=999-" } }],
      ["1.0", "/1/f.txt", { version: "1.0" }],
      ["manifest", "/manifest.json?current_ver=1", {}],
      [
        "coded manifest",
        "/manifest.json?current_ver=1",
        { headers: { "Accept-Encoding": "gzip" } },
      ],
      ["head of it", "/manifest.json?current_ver=1", { method: "HEAD" }],
      ["from another host", "/manifest.json?current_ver=1", { host: "other.test" }],
      ["with an id", "/manifest.json?current_ver=1&reqid=7", {}],
      ["null", "/manifest.json?current_ver=2", {}],
      ["null with an id", "/manifest.json?current_ver=2&reqid=7", {}],
    ];
    /** The whole answer, but for the clock. */
    const ask = async (target: string, sent: Sent) => {
      const { status, headers, body } = await send(server, target, sent);
      headers.delete("date");
      return { status, headers: [...headers].sort(), body: text(body) };
    };
    const first = new Map<string, Awaited<ReturnType<typeof ask>>>();
    for (const [name, target, sent] of ways) first.set(name, await ask(target, sent));
    expect(new Set([...first.values()].map((answer) => JSON.stringify(answer))).size).toBe(
      ways.length - 1, // HTTP/1.0 gets the same as 1.1.
    );
    for (let i = 0; i < 200; i++) {
      const [name, target, sent] = random.pick(ways);
      expect([name, await ask(target, sent)]).toEqual([name, first.get(name)!]);
    }
  });
});

describe("a file below the root", () => {
  const CONTENT = "0123456789";
  /** In a version, from memory; beside it, from disk. */
  const FILES = ["/1/f.txt", "/f.txt"];
  let root: Temp;
  let server: OTAServer;

  beforeAll(async () => {
    root = new Temp({ "1/f.txt": CONTENT, "f.txt": CONTENT, "1/empty": "", empty: "" });
    server = await listen(root);
  });

  afterAll(async () => {
    await server?.stop();
    root?.[Symbol.dispose]();
  });

  for (const target of FILES) {
    describe(target, () => {
      const get = (headers: Record<string, string> = {}, method = "GET") =>
        send(server, target, { headers, method });
      const tag = async () => (await get()).headers.get("etag") ?? "no tag";

      test("GET: its content, a strong tag, its type", async () => {
        const { status, headers, body } = await get();
        expect([status, text(body)]).toEqual([200, CONTENT]);
        expect(headers.get("etag")).toMatch(/^"[!-~]+"$/);
        expect(headers.get("content-type")).toStartWith("text/plain");
        expect(await tag()).toBe(headers.get("etag")!);
      });

      test("without a Host, in HTTP/1.0", async () => {
        const response = await send(server, target, { version: "1.0", host: null });
        expect([response.status, text(response.body)]).toEqual([200, CONTENT]);
      });

      test("HEAD: the header of the GET, and nothing else", async () => {
        const [full, head] = [await get(), await get({}, "HEAD")];
        expect([head.status, head.body.length]).toEqual([200, 0]);
        for (const name of ["content-length", "content-type", "etag"]) {
          expect(head.headers.get(name)).toBe(full.headers.get(name));
        }
      });

      const parts: [range: string, start: number, end: number][] = [
        ["bytes=0-0", 0, 0],
        ["bytes=2-4", 2, 4],
        ["bytes=5-", 5, 9],
        ["bytes=0-", 0, 9],
        ["bytes=9-9", 9, 9],
        ["bytes=-3", 7, 9],
        ["bytes=-99", 0, 9],
        ["bytes=8-99", 8, 9],
        ["bytes=8-99999999999999999999999999", 8, 9],
        ["Bytes=2-4", 2, 4],
      ];
      for (const [range, start, end] of parts) {
        test(`Range: ${range}: 206 with bytes ${start} to ${end}`, async () => {
          const { status, headers, body } = await get({ Range: range });
          expect([status, text(body)]).toEqual([206, CONTENT.slice(start, end + 1)]);
          expect(headers.get("content-range")).toBe(`bytes ${start}-${end}/10`);
          expect(headers.get("content-length")).toBe(`${end - start + 1}`);
          expect(headers.get("etag")).toBe(await tag());
        });
      }

      test("a Range that begins behind the end: 416 with the size", async () => {
        for (const range of [
          "bytes=10-",
          "bytes=10-10",
          "bytes=99-100",
          "bytes=-0",
          "bytes=1".padEnd(40, "0") + "-",
        ]) {
          const { status, headers, body } = await get({ Range: range });
          expect([range, status]).toEqual([range, 416]);
          expect(headers.get("content-range")).toBe("bytes */10");
          expect(headers.get("content-type")).toStartWith("text/plain");
          expect(text(body)).not.toContain(CONTENT);
        }
      });

      test("a Range that is none, or of several parts, does not count", async () => {
        const ranges = [
          "bytes=4-2",
          "bytes=a-b",
          "lines=0-1",
          "bytes=0-1,3-4",
          "bytes=",
          "bytes=-",
          "0-1",
        ];
        ranges.push(
          "bytes=0-1-2",
          "bytes=--1",
          "bytes=0x1-2",
          "bytes 0-1",
          "bytes=1.5-2",
          "bytes=-1-",
        );
        for (const range of ranges) {
          const { status, body } = await get({ Range: range });
          expect([range, status, text(body)]).toEqual([range, 200, CONTENT]);
        }
      });

      test("If-Range: a part while the tag is the same, else the whole", async () => {
        const part = async (condition: string) =>
          text((await get({ Range: "bytes=2-4", "If-Range": condition })).body);
        const current = await tag();
        expect(await part(current)).toBe("234");
        for (const other of [
          '"other"',
          `W/${current}`,
          current.slice(1, -1),
          "Thu, 01 Jan 2099 00:00:00 GMT",
        ]) {
          expect(await part(other)).toBe(CONTENT);
        }
        expect((await get({ Range: "bytes=99-", "If-Range": '"other"' })).status).toBe(200);
        expect((await get({ "If-Range": current })).status).toBe(200);
      });

      test("If-None-Match: 304 without content when the tag is there, weak or in a list", async () => {
        const current = await tag();
        const same = [current, `W/${current}`, `"a", ${current}`, `"a",W/${current} , "b"`, "*"];
        for (const method of ["GET", "HEAD"]) {
          for (const condition of same) {
            const headers = { "If-None-Match": condition };
            const response = await get(headers, method);
            expect([condition, response.status, response.body.length]).toEqual([condition, 304, 0]);
            expect(response.headers.get("etag")).toBe(current);
            // Were there a length, it would have to be that of the content.
            expect([null, "10"]).toContain(response.headers.get("content-length"));
          }
          for (const condition of ['"other"', current.slice(1, -1), `"x${current.slice(1)}`, ""]) {
            expect((await get({ "If-None-Match": condition }, method)).status).toBe(200);
          }
        }
        expect((await get({ "If-None-Match": current, Range: "bytes=99-" })).status).toBe(304);
      });

      test("HEAD does not know Range", async () => {
        for (const range of ["bytes=0-1", "bytes=99-"]) {
          const { status, headers } = await get({ Range: range }, "HEAD");
          expect([status, headers.get("content-length")]).toEqual([200, "10"]);
          expect(headers.has("content-range")).toBe(false);
        }
      });

      test("any other method: 405 with those that there are", async () => {
        for (const method of ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"]) {
          const { status, headers, body } = await get({}, method);
          expect([method, status, headers.get("allow")]).toEqual([method, 405, "GET, HEAD"]);
          expect(headers.get("content-type")).toStartWith("text/plain");
          expect(text(body).length).toBeLessThan(100);
        }
        const post = await fetch(new URL(target, server.url), { method: "POST", body: "hello" });
        expect([post.status, post.headers.get("allow")]).toEqual([405, "GET, HEAD"]);
        expect(await (await fetch(new URL(target, server.url))).text()).toBe(CONTENT);
      });
    });
  }

  test("an empty one: 200 without content, and no part can be had of it", async () => {
    for (const target of ["/1/empty", "/empty"]) {
      const { status, headers, body } = await send(server, target);
      expect([status, headers.get("content-length"), body.length]).toEqual([200, "0", 0]);
      for (const range of ["bytes=0-", "bytes=0-0", "bytes=-1"]) {
        const part = await send(server, target, { headers: { Range: range } });
        expect([part.status, part.headers.get("content-range")]).toEqual([416, "bytes */0"]);
        expect(text(part.body)).not.toContain("-1");
      }
    }
  });

  test("another content has another tag, the same content of a version the same", async () => {
    using other = new Temp({ "1/a": "one", "2/a": "two", "3/a": "one", x: "one" });
    await using changing = await listen(other);
    const tag = async (target: string) => (await send(changing, target)).headers.get("etag");
    expect(await tag("/1/a")).toBe(await tag("/3/a"));
    expect(await tag("/1/a")).not.toBe(await tag("/2/a"));
    const before = await tag("/x");
    other.write({ x: "longer" });
    expect(await tag("/x")).not.toBe(before);
  });

  test("an absolute target, as proxies send it, is the same as its path", async () => {
    for (const version of ["1.0", "1.1"] as const) {
      const response = await send(server, "http://elsewhere.test:99/1/f.txt", { version });
      expect([response.status, text(response.body)]).toEqual([200, CONTENT]);
    }
    const manifest = await send(server, "http://elsewhere.test:99/manifest.json", { host: "a" });
    expect(manifest.status).toBe(200);
    expect(text(manifest.body)).toContain('"http://a/1/f.txt"');
  });

  test("a query changes nothing, whatever is in it", async () => {
    for (const query of [
      "?",
      "?x",
      "?a=b&c=%zz",
      "?x=http://h/y",
      "?//",
      "?%00",
      "?../..",
      "?/1/empty",
    ]) {
      for (const host of ["a", null]) {
        const { body } = await send(server, `/1/f.txt${query}`, { host, version: "1.0" });
        expect(text(body)).toBe(CONTENT);
      }
    }
  });
});

test("parseRange reads what a client may ask of a size", () => {
  expect(parseRange(null, 10)).toBeUndefined();
  expect(parseRange("bytes=2-4", 10)).toEqual({ start: 2, end: 5 });
  expect(parseRange("bytes=-4", 10)).toEqual({ start: 6, end: 10 });
  expect(parseRange("bytes=4-", 10)).toEqual({ start: 4, end: 10 });
  expect(parseRange("bytes=10-", 10)).toBe("unsatisfiable");
  expect(parseRange("bytes=0-", 0)).toBe("unsatisfiable");
});

describe("not served", () => {
  let outside: Temp;
  let root: string;
  let server: OTAServer;

  beforeAll(async () => {
    outside = new Temp({
      "secret.txt": SECRET,
      "root-neighbour/secret.txt": SECRET,
      "root/1.0.0/flash/main.py": "main",
      "root/1.0.0/.env": "content",
      "root/.git/config": SECRET,
      "root/.env": SECRET,
      "root/-/key": SECRET,
      "root/...": SECRET,
      "root/notes.txt": "notes",
    });
    root = outside.at("root");
    outside.link("root/out", "../secret.txt");
    outside.link("root/absolute", outside.at("secret.txt"));
    outside.link("root/above", "..");
    outside.link("root/1.0.0/out", "../../secret.txt");
    outside.link("root/1.0.0/neighbour", "../../root-neighbour");
    outside.link("root/loop", "loop");
    outside.link("root/broken", "nowhere");
    outside.link("root/inside", "1.0.0/flash");
    server = await listen(root);
  });

  afterAll(async () => {
    await server?.stop();
    outside?.[Symbol.dispose]();
  });

  /** Whether a target gives nothing away, asked in three ways. */
  async function expectNothing(target: string, statuses = [400, 404]): Promise<void> {
    for (const sent of [{ version: "1.0", host: null }, { version: "1.0" }, {}] as const) {
      const { version = "1.1" } = sent;
      const host = "host" in sent ? "" : "Host: a\r\n";
      const request = `GET ${target} HTTP/${version}\r\n${host}Connection: close\r\n\r\n`;
      const { bytes } = await rawRequest(server.url, request);
      const answer = text(bytes);
      expect([target, answer.includes(SECRET)]).toEqual([target, false]);
      // Bun itself closes without an answer where a target is none.
      if (bytes.length > 0) expect([target, ...statuses]).toContain(parseResponse(bytes).status);
    }
  }

  test("what is not there, with a short plain text", async () => {
    for (const target of [
      "/missing",
      "/1.0.0/flash/main.pyc",
      "/1.0.0/flash/main.py/x",
      "/1.0.1/x",
    ]) {
      const { status, headers, body } = await send(server, target);
      expect([status, text(body)]).toEqual([404, "not found\n"]);
      expect(headers.get("content-type")).toStartWith("text/plain");
    }
    await expectNothing(`/${"x".repeat(300)}`);
    await expectNothing(`/${"x/".repeat(1500)}`);
  });

  test("directories: there is no listing", async () => {
    const targets = [
      "/",
      "/1.0.0",
      "/1.0.0/",
      "/1.0.0/flash",
      "/1.0.0/flash/",
      "/inside",
      "/.",
      "/-",
    ];
    for (const target of [...targets, "", "?", "/?C=M", "//", "/1.0.0//", "/index.html"]) {
      await expectNothing(target);
    }
    await expectNothing("/1.0.0/flash/main.py/");
  });

  test("dot entries at the top level; but those of a version are content", async () => {
    for (const target of ["/.git/config", "/.env", "/%2egit/config", "/%2Eenv", "/1.0.0/../.env"]) {
      await expectNothing(target);
    }
    for (const target of [
      "/./.env",
      "//.env",
      "/%2e/.env",
      "/1.0.0/%2e%2e/.env",
      "/.git%2fconfig",
    ]) {
      await expectNothing(target);
    }
    expect(text((await send(server, "/1.0.0/.env")).body)).toBe("content");
  });

  test("anything outside of the root, in any spelling", async () => {
    const absolute = outside.at("secret.txt");
    const targets = [
      ...["/../secret.txt", "/../../secret.txt", "/1.0.0/../../secret.txt", "/./../secret.txt"],
      ...["/%2e%2e/secret.txt", "/%2E%2E/secret.txt", "/.%2e/secret.txt", "/%2e./secret.txt"],
      ...[
        "/..%2fsecret.txt",
        "/..%2Fsecret.txt",
        "/%2e%2e%2fsecret.txt",
        "/1.0.0/..%2f..%2fsecret.txt",
      ],
      ...["/..\\secret.txt", "/..%5csecret.txt", "/%2e%2e%5Csecret.txt", "\\..\\secret.txt"],
      ...[
        "/%252e%252e/secret.txt",
        "/..%252fsecret.txt",
        "/..%c0%afsecret.txt",
        "/%c0%ae%c0%ae/secret.txt",
      ],
      ...[
        "/..%00/secret.txt",
        "/%00/../../secret.txt",
        "/notes.txt%00/../../secret.txt",
        "/..;/secret.txt",
      ],
      ...[
        "/.../../secret.txt",
        "/..../secret.txt",
        "/..//secret.txt",
        "//../secret.txt",
        "/1.0.0/..//../secret.txt",
      ],
      ...[
        absolute,
        `/${absolute}`,
        `//${absolute}`,
        `/%2f${absolute.slice(1)}`,
        `file://${absolute}`,
      ],
      ...[
        `/file://${absolute}`,
        "../secret.txt",
        "secret.txt/../../secret.txt",
        "http://a/../secret.txt",
      ],
      ...[
        "http://a/%2e%2e/secret.txt",
        "/http://a/../../../../secret.txt",
        "/?/../secret.txt",
        "/#/../secret.txt",
      ],
      ...[
        "/../root-neighbour/secret.txt",
        "/-neighbour/secret.txt",
        "/../root/../secret.txt",
        "/%2e%2e%2f",
      ],
      ...[
        "/1.0.0/flash/main.py/../../../../secret.txt",
        "/inside/../../secret.txt",
        "/etc/passwd",
        "//etc/passwd",
      ],
    ];
    for (const target of targets) await expectNothing(target);
  });

  test("links that leave the root, however they do it, are broken or go in circles", async () => {
    for (const target of [
      "/out",
      "/absolute",
      "/above/secret.txt",
      "/1.0.0/out",
      "/loop",
      "/broken",
    ]) {
      await expectNothing(target);
    }
    await expectNothing("/1.0.0/neighbour/secret.txt");
    // Nor a way out and in again.
    await expectNothing("/above/root/.env");
    await expectNothing("/above/secret.txt/");
    expect(text((await send(server, "/inside/main.py")).body)).toBe("main");
  });

  test("what lies in a directory named -: /-/ is reserved for the server", async () => {
    for (const target of [
      "/-/key",
      "/%2d/key",
      "/%2D/key",
      "/-%2fkey",
      "/%2d%2fkey",
      "/1.0.0/../-/key",
    ]) {
      await expectNothing(target);
    }
  });

  test("what cannot be decoded", async () => {
    for (const target of ["/%", "/%zz", "/%2", "/1.0.0/%ff", "/%e2%82", "/1.0.0/flash/main.py%"]) {
      await expectNothing(target);
    }
  });

  test("a pipe, and nobody waits for it", async () => {
    expect(Bun.spawnSync(["mkfifo", `${root}/pipe`]).exitCode).toBe(0);
    await expectNothing("/pipe");
    fs.unlinkSync(`${root}/pipe`);
  });

  test("the other files are, so that all of this shows something", async () => {
    expect(text((await send(server, "/notes.txt")).body)).toBe("notes");
    expect(text((await send(server, "/1.0.0/flash/main.py")).body)).toBe("main");
    expect(text((await send(server, "/1.0.0%2fflash/m%61in.py")).body)).toBe("main");
    const { body } = await send(server, "/1.0.0/../notes.txt", { version: "1.0" });
    expect(["notes", "not found\n"]).toContain(text(body));
  });
});

// ── The log. ──

describe("a log that cannot be written is no reason to serve no more", () => {
  for (const [what, shell] of [
    ["a full disk", 'exec "$@" > /dev/full'],
    ["a reader that has gone", 'exec "$@" > >(read -r line)'],
  ] as const) {
    test(what, async () => {
      using root = new Temp({ "1/f.txt": "one" });
      const port = await freePort();
      const args = ["serve", "--root", root.path, "--host", "127.0.0.1", "--port", `${port}`];
      const command = ["bash", "-c", shell, "bash", process.execPath, OTA_TS, ...args];
      await using child = Bun.spawn(command, { stdio: ["ignore", "ignore", "pipe"] });
      const url = `http://127.0.0.1:${port}/1/f.txt`;
      const get = () => fetch(url).then(({ status }) => status);
      while ((await get().catch(() => 0)) === 0) await Bun.sleep(10); // Until it listens.
      for (let i = 0; i < 3; i++) {
        expect(await get()).toBe(200);
        await Bun.sleep(150); // Longer than lines wait to be written.
      }
      child.kill("SIGINT");
      expect(await child.stderr.text()).toBe("");
      expect(await child.exited).toBe(0);
    });
  }
});

describe("the log has a line a request", () => {
  const WHEN = "\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{3}Z";

  /** What is logged for a request, without time and duration, which must be well formed. */
  async function logged(target: string, sent: Sent = {}): Promise<string> {
    using root = new Temp({ "1/a.py": "12345", "firmware_2.bin": "" });
    const lines: string[] = [];
    await using server = await listen(root, { log: (line) => lines.push(line) });
    await send(server, target, sent);
    expect(lines).toHaveLength(1);
    const line = lines[0]!;
    const [, before, after] = new RegExp(`^${WHEN} (.*) \\d+\\.\\dms(.*)$`).exec(line) ?? [];
    if (before === undefined) throw new Error(`expected a log line, found ${JSON.stringify(line)}`);
    return before + after;
  }

  test("address, method, path, status, bytes", async () => {
    expect(await logged("/1/a.py")).toBe("127.0.0.1 GET /1/a.py 200 5");
    expect(await logged("/1/a.py", { headers: { Range: "bytes=1-2" } })).toBe(
      "127.0.0.1 GET /1/a.py 206 2",
    );
    expect(await logged("/1/a.py", { method: "HEAD" })).toBe("127.0.0.1 HEAD /1/a.py 200 0");
    expect(await logged("/1/a.py", { headers: { "If-None-Match": "*" } })).toBe(
      "127.0.0.1 GET /1/a.py 304 0",
    );
    expect(await logged("/x", { version: "1.0", host: null })).toBe("127.0.0.1 GET /x 404 10");
    expect(await logged("/manifest.json?current_ver=9")).toBe("127.0.0.1 GET /manifest.json 200 4");
    expect(await logged("/1/a.py", { method: "DELETE" })).toStartWith(
      "127.0.0.1 DELETE /1/a.py 405 ",
    );
  });

  test("the device, by devid or else wmac, and what failed on it", async () => {
    const manifest = "/manifest.json?current_ver=9";
    expect(await logged(`${manifest}&devid=meter-7`)).toBe(
      "127.0.0.1 device=meter-7 GET /manifest.json 200 4",
    );
    expect(await logged(`${manifest}&wmac=a1%3Ab2`)).toBe(
      "127.0.0.1 device=a1:b2 GET /manifest.json 200 4",
    );
    expect(await logged(`${manifest}&wmac=a1&devid=7`)).toContain(" device=7 ");
    expect(await logged(`${manifest}&wmac=a1&devid=`)).toContain(" device=a1 ");
    expect(await logged(`${manifest}&devid=`)).toBe("127.0.0.1 GET /manifest.json 200 4");
    expect(await logged(`${manifest}&failed=1.0.1&devid=7`)).toBe(
      "127.0.0.1 device=7 GET /manifest.json 200 4 failed=1.0.1",
    );
    expect(await logged(`/1/a.py?devid=7`)).toBe("127.0.0.1 device=7 GET /1/a.py 200 5");
  });

  test("what else is in a query is not in the log", async () => {
    expect(await logged("/1/a.py?token=hunter2&x=y")).toBe("127.0.0.1 GET /1/a.py 200 5");
  });

  test("one line, whatever a device sends: escaped, and cut at 64 characters", async () => {
    const device = async (id: string) =>
      / device=(.*) GET /.exec(await logged(`/1/a.py?devid=${encodeURIComponent(id)}`))?.[1];
    expect(await device("a\nb\r\u2028c")).toBe("a\\u{a}b\\u{d}\\u{2028}c");
    expect(await device("\u001b[2J")).toBe("\\u{1b}[2J");
    expect(await device("a b\u00a0\u00e9\u{1f680}\0")).toBe(
      "a\\u{20}b\\u{a0}\\u{e9}\\u{1f680}\\u{0}",
    );
    expect(await device("7 GET /x 200 0")).not.toContain(" ");
    expect(await device("x".repeat(64))).toBe("x".repeat(64));
    expect(await device("x".repeat(65))).toBe("x".repeat(64));
    expect(await device("x".repeat(1000))).toBe("x".repeat(64));
    expect(await device("\u{1f680}".repeat(100))).toHaveLength(64);
    expect(await device(`${"x".repeat(63)}\u{1f680}`)).toHaveLength(64);
    const failed = await logged(`/1/a.py?failed=${"%0a".repeat(200)}`);
    expect(/ failed=(.*)$/.exec(failed)?.[1]).toHaveLength(64);
    expect(failed).not.toContain("\n");
    const path = / GET (\S*) 404 /.exec(await logged(`/${"y".repeat(200)}`))?.[1];
    expect(path).toBe(`/${"y".repeat(63)}`);
  });
});

// ── As a process. ──

/** A download that takes its first bytes and then waits for `resume`. */
async function slowDownload(url: string, target: string) {
  const socket = connect(addressOf(url));
  let received = 0;
  const begun = Promise.withResolvers<void>();
  const ended = Promise.withResolvers<void>();
  socket.on("data", (chunk: Uint8Array) => {
    if (received === 0) socket.pause();
    received += chunk.length;
    begun.resolve();
  });
  for (const promise of [begun, ended]) socket.on("error", promise.reject);
  socket.on("close", () => ended.resolve());
  socket.write(`GET ${target} HTTP/1.0\r\nHost: a\r\n\r\n`);
  await begun.promise;
  return {
    received: () => received,
    resume: async () => {
      socket.resume();
      await ended.promise;
    },
  };
}

/** Waits until a server takes no more connections. */
async function refusesConnections(url: string): Promise<void> {
  for (;;) {
    const connected = await new Promise<boolean>((resolve) => {
      const socket = connect(addressOf(url));
      socket.on("connect", () => (socket.destroy(), resolve(true)));
      socket.on("error", () => resolve(false));
    });
    if (!connected) return;
  }
}

describe.concurrent("bun ota.ts serve", () => {
  test("says what it serves once it listens, and how to look at it", async () => {
    using root = new Temp({
      "1.0.9/flash/main.py": "12345",
      "1.0.10/flash/main.py": "x".repeat(1500),
      "1.0.10/flash/lib/a.py": "",
      "1.0.10/flash/.DS_Store": "",
      "firmware_1.0.10.bin": "x".repeat(2_000_000),
      "python3-venv/x": "",
      "1.0.9.bak/x": "",
      "odd\nname\u001b": "",
    });
    await using server = await Serving.start(["--root", root.path]);
    expect(server.url).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);
    const lines = server.startup.trimEnd().split("\n");
    expect(lines[0]).toMatch(/^ota\.ts \d+\.\d+\.\d+ serves /);
    expect(lines[0]).toEndWith(` serves ${root.path} at ${server.url}`);
    expect(lines.slice(1, 4)).toEqual([
      "version  1.0.9        1 files, 5 B",
      "version  1.0.10       2 files, 1.5 KB",
      "firmware 1.0.10       firmware_1.0.10.bin, 2.0 MB",
    ]);
    const ignored = lines.filter((line) => line.startsWith("ignored  "));
    expect(ignored).toHaveLength(4);
    for (const [name, why] of [
      ["python3-venv", "no version"],
      ["1.0.9.bak", "no version"],
      ["1.0.10/flash/.DS_Store", "never content"],
      ["odd\\u{a}name\\u{1b}", "neither"],
    ] as const) {
      expect(
        ignored.filter((line) => line.startsWith(`ignored  ${name}: `) && line.includes(why)),
      ).toHaveLength(1);
    }
    expect(lines.at(-1)).toBe(`try      curl '${server.url}/manifest.json?current_ver=1.0.9'`);
    // And that works.
    const target = /'(.*)'/.exec(lines.at(-1)!)![1]!;
    const headers = { "Accept-Encoding": "identity" };
    expect(parseManifest(await (await fetch(target, { headers })).bytes())?.version).toBe("1.0.10");
    server.kill("SIGTERM");
    const { code, stdout, stderr } = await server.ended;
    expect([code, stderr]).toEqual([0, expect.stringContaining("adds the directory flash/lib")]);
    expect(stdout.slice(server.startup.length)).toMatch(
      /^\S+Z 127\.0\.0\.1 GET \/manifest\.json 200 \d+ \d+\.\dms\n$/,
    );
  });

  test("serves the current directory by default, and warns of what may surprise", async () => {
    using root = new Temp({ "1.0.0/a": "", "1.0.0rc1/a": "", "v1.0.0/a": "" });
    await using server = await Serving.start([], { cwd: root.path });
    expect(server.startup).toContain(` serves ${root.path} at `);
    server.kill("SIGINT");
    const { code, stderr } = await server.ended;
    expect(code).toBe(0);
    expect(stderr).toContain("warning: 1.0.0rc1 sorts after 1.0.0");
    expect(stderr).toContain("warning: v1.0.0 sorts after every name without a v");
  });

  test("starts without a version, and says what to put there", async () => {
    using root = new Temp();
    await using server = await Serving.start(["--root", root.path]);
    expect(await (await fetch(`${server.url}/manifest.json`)).text()).toBe("null");
    server.kill("SIGTERM");
    const { code, stderr } = await server.ended;
    expect(code).toBe(0);
    expect(stderr).toMatch(/^warning: no release in .*1\.0\.0\/flash\/main\.py.*\n$/);
  });

  test("--url, --latest and --ignore, which may be repeated", async () => {
    using root = new Temp({ "1/a": "", "1/b.md": "", "1/c.tmp": "", "2/a": "" });
    const args = ["--url", "https://cdn.example/x", "--latest", "1", "--ignore", "*.md"];
    await using server = await Serving.start([...args, "--ignore=*.tmp", "--root", root.path]);
    expect(server.startup).toContain("version  1            1 files");
    expect(server.startup).toContain("ignored  2: above --latest 1");
    expect(server.startup).toContain("curl 'https://cdn.example/x/manifest.json?current_ver=1'");
    const manifest = parseManifest(await (await fetch(`${server.url}/x/manifest.json`)).bytes());
    expect(manifest?.new.map(({ URL }) => URL)).toEqual(["https://cdn.example/x/1/a"]);
  });

  test.skipIf(process.platform !== "linux")(
    "listens on all addresses by default, and on one with --host",
    async () => {
      using root = new Temp({ "1/a": "" });
      await using all = await Serving.start([], { cwd: root.path });
      await using one = await Serving.start(["--host", "127.0.0.1"], { cwd: root.path });
      const elsewhere = (url: string) => fetch(url.replace("127.0.0.1", "127.0.0.2"));
      expect((await elsewhere(`${all.url}/1/a`)).status).toBe(200);
      expect((await fetch(`${one.url}/1/a`)).status).toBe(200);
      await expect(elsewhere(`${one.url}/1/a`)).rejects.toThrow();
    },
  );

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    test(`${signal}: takes no more connections, finishes a running download, exits with 0`, async () => {
      const SIZE = 40_000_000;
      using root = new Temp({ "1/a": "", big: "" });
      // A hole: nothing to write, nothing to hash.
      fs.truncateSync(root.at("big"), SIZE);
      await using server = await Serving.start([], { cwd: root.path });
      const download = await slowDownload(server.url, "/big");
      server.kill(signal);
      await refusesConnections(server.url);
      expect(download.received()).toBeLessThan(SIZE / 2);
      await download.resume();
      expect(download.received()).toBeGreaterThan(SIZE);
      expect((download.received() - SIZE) % 100).toBe(0);
      const { code, stdout } = await server.ended;
      expect(code).toBe(0);
      expect(stdout).toContain(` GET /big 200 ${SIZE} `);
    });
  }

  test("SIGTERM does not wait for a connection on which nothing runs", async () => {
    using root = new Temp({ "1/a": "content" });
    await using server = await Serving.start([], { cwd: root.path });
    const socket = connect(addressOf(server.url));
    try {
      const answered = Promise.withResolvers<void>();
      socket.on("data", () => answered.resolve());
      socket.on("error", answered.reject);
      socket.write("GET /1/a HTTP/1.1\r\nHost: a\r\n\r\n");
      await answered.promise;
      server.kill("SIGTERM");
      expect((await server.ended).code).toBe(0);
    } finally {
      socket.destroy();
    }
  });

  test("a port in use: one line that names it, exit code 1", async () => {
    using root = new Temp({ "1/a": "" });
    await using server = await listen(root);
    const port = `${server.url.port}`;
    const args = ["serve", "--port", port, "--host", "127.0.0.1"];
    const { code, stdout, stderr } = await ota(args, { cwd: root.path });
    expect([code, stdout]).toEqual([1, ""]);
    expect(stderr).toMatch(/^ota\.ts: port \d+ .*in use.*--port.*\n$/);
    expect(stderr).toContain(port);
    // All addresses: among them is the one in use.
    expect((await ota(["serve", "--port", port], { cwd: root.path })).code).toBe(1);
    const refused = await listen(root, { port: Number(port) }).catch((error: unknown) => error);
    expect(refused).toBeInstanceOf(OTAError);
    expect(refused).toHaveProperty("exitCode", 1);
  });

  test("usage errors: one line with what to do, exit code 2", async () => {
    using root = new Temp({ file: "" });
    const cases: [string[], RegExp][] = [
      [["--root", root.at("missing")], /missing does not exist; --root/],
      [["--root", root.at("file")], /file is not a directory; --root/],
      [["--rot", "x"], /no option --rot; did you mean --root\?/],
      [["--prt=1"], /no option --prt; did you mean --port\?/],
      [["--ver", "1"], /no option --ver/],
      [["--port"], /--port needs a value: --port N/],
      [["--port", "http"], /--port expects a whole number from 0 to 65535, found http/],
      [["--port", "65536"], /--port expects a whole number/],
      [["--port", "-1"], /--port/],
      [["--url", "cdn.example"], /--url expects an http\(s\) address/],
      [["releases"], /takes no argument releases/],
    ];
    const ends = await Promise.all(
      cases.map(([args]) => ota(["serve", "--port", "0", ...args], { cwd: root.path })),
    );
    for (const [i, { code, stdout, stderr }] of ends.entries()) {
      expect([cases[i]![0], code, stdout]).toEqual([cases[i]![0], 2, ""]);
      expect(stderr).toMatch(/^ota\.ts: .*\n$/);
      expect(stderr).toMatch(cases[i]![1]);
    }
  });

  test("no command, one that there is not, help and version", async () => {
    const [none, wrong, help, serveHelp, version] = await Promise.all(
      [[], ["sevre"], ["--help"], ["serve", "--help"], ["--version"]].map((args) => run(args)),
    );
    expect(none).toMatchObject({ code: 2, stdout: "" });
    expect(none!.stderr).toContain("serve");
    expect(wrong).toMatchObject({ code: 2, stdout: "" });
    expect(wrong!.stderr).toContain("no command sevre; did you mean serve?");
    expect(help).toMatchObject({ code: 0, stderr: "" });
    expect(help!.stdout).toContain("manifest");
    expect(serveHelp).toMatchObject({ code: 0, stderr: "" });
    for (const option of ["root", "port", "host", "url", "ignore", "latest"]) {
      expect(serveHelp!.stdout).toContain(`--${option} `);
    }
    expect(serveHelp!.stdout).toContain("(8000)");
    expect(serveHelp!.stdout).toContain("(0.0.0.0)");
    expect(version).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/^ota\.ts \d+\.\d+\.\d+\n$/),
    });
  });
});
