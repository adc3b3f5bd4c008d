/**
 * What is on its way: to clients that are slow, that go away, or that ask for what is no file. What
 * it costs meanwhile, and what log and metrics say of it at its end.
 */

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, renameSync, rmSync, symlinkSync, utimesSync, writeFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { serve } from "../ota.ts";
import { noise, sha256 } from "./helpers/content.ts";
import { certify } from "./helpers/pki.ts";
import { memoryOf, openFiles } from "./helpers/process.ts";
import {
  addressOf,
  parseResponse,
  rawRequest,
  sendRequest,
  type ParsedResponse,
} from "./helpers/raw.ts";
import { layTree, Temp } from "./helpers/temp.ts";
import { eventually, need, Serving, until } from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const MEBIBYTE = 2 ** 20;
/** More than the buffers of both ends hold. */
const LARGE = 24 * MEBIBYTE;
/** What is kept in memory at most, of one content. */
const MAX_KEPT = 4 * MEBIBYTE;

const sockets: Socket[] = [];
afterEach(() => {
  for (const socket of sockets.splice(0)) socket.destroy();
});

/** A client that has asked for something, takes its beginning, and no more until it is told to. */
class Client {
  readonly socket: Socket;
  readonly received: Uint8Array[] = [];
  /** Resolves when the header has come. */
  readonly begun: Promise<void>;
  #isReading = false;

  constructor(server: { url: string }, path: string, more = "") {
    this.socket = connect(addressOf(server.url));
    sockets.push(this.socket);
    this.socket.on("error", () => {});
    this.socket.write(`GET ${path} HTTP/1.1\r\nHost: a\r\n${more}\r\n`);
    this.begun = new Promise((done) => {
      this.socket.on("data", (piece: Uint8Array) => {
        this.received.push(piece);
        if (this.#isReading || !Buffer.concat(this.received).includes("\r\n\r\n")) return;
        this.socket.pause();
        done();
      });
    });
  }

  /** Takes the rest: as much as was promised. (At a close, Bun's `connect` may lose the last of it.) */
  async rest(): Promise<ParsedResponse> {
    this.#isReading = true;
    const { headers, headerLength } = parseResponse(Buffer.concat(this.received));
    const size = headerLength + Number(headers.get("content-length"));
    const whole = new Promise<void>((done, fail) => {
      const look = () => this.socket.bytesRead >= size && done();
      this.socket.on("data", look);
      this.socket.once("close", () => fail(new Error(`closed after ${this.socket.bytesRead}`)));
    });
    this.socket.resume();
    await whole;
    return parseResponse(Buffer.concat(this.received));
  }
}

const get = (server: { url: string }, path: string, headers: Record<string, string> = {}) =>
  sendRequest(server, path, { headers });

const makePipe = (path: string) => Bun.spawnSync([need("mkfifo"), path]);

async function metric(server: { url: string }, name: string): Promise<number> {
  const text = await (await fetch(`${server.url}/-/metrics`)).text();
  return Number(new RegExp(`^${name} (\\d+)$`, "m").exec(text)?.[1] ?? 0);
}

describe("log and metrics tell of a body at its end", () => {
  const files = {
    "from disk": ["1.0.0/large", Buffer.alloc(LARGE, "d")],
    "of a file beside the versions": ["large.bin", Buffer.alloc(LARGE, "b")],
  } as const;
  for (const [what, [path, content]] of Object.entries(files)) {
    test(`${what}: not before a slow client has it`, async () => {
      using temp = new Temp({ [path]: content, "1.0.0/small": "small" });
      await using server = await Served.start(temp.path);
      const client = new Client(server, `/${path}`);
      await client.begun;
      await get(server, "/1.0.0/small");
      await eventually("the small one is logged", () => server.lines.length >= 1);
      expect(server.lines.filter((line) => line.includes("large"))).toEqual([]);
      expect(await metric(server, "ota_sent_bytes_total")).toBe(5);
      expect((await client.rest()).body.length).toBe(LARGE);
      await eventually("it is logged", () => server.lines.some((line) => line.includes("large")));
      const line = server.lines.find((line) => line.includes("large"));
      expect(line).toMatch(new RegExp(`GET /${path} 200 ${LARGE} [0-9.]+ms$`));
      expect(await metric(server, "ota_sent_bytes_total")).toBeGreaterThan(LARGE);
      expect(await metric(server, "ota_aborted_total")).toBe(0);
    });

    test(`${what}: a client that goes away in the middle was not sent it`, async () => {
      using temp = new Temp({ [path]: content, "1.0.0/small": "small" });
      await using server = await Served.start(temp.path);
      const client = new Client(server, `/${path}`, "Range: bytes=1-\r\n");
      await client.begun;
      client.socket.destroy();
      await eventually("it is logged", () => server.lines.some((line) => line.includes("large")));
      const line = server.lines.find((line) => line.includes("large"));
      expect(line).toMatch(new RegExp(`GET /${path} 206 - [0-9.]+ms aborted$`));
      expect(await metric(server, "ota_aborted_total")).toBe(1);
      expect(await metric(server, "ota_sent_bytes_total")).toBeLessThan(LARGE);
    });
  }

  test("a server that is stopped sends what is on its way, and logs it", async () => {
    using temp = new Temp({ "1.0.0/large": Buffer.alloc(LARGE) });
    const lines: string[] = [];
    const log = (line: string) => void lines.push(line);
    const options = { root: temp.path, port: 0, host: "127.0.0.1", quiet: 0, log };
    const server = await serve(options);
    const client = new Client({ url: server.url.origin }, "/1.0.0/large");
    await client.begun;
    const stopped = server.stop();
    expect((await client.rest()).body.length).toBe(LARGE);
    await stopped;
    expect(lines).toHaveLength(1);
    expect(lines[0]).toMatch(new RegExp(` 200 ${LARGE} [0-9.]+ms$`));
  });

  test("what is on its way when the server is stopped at once was not sent", async () => {
    using temp = new Temp({ "1.0.0/large": Buffer.alloc(LARGE) });
    const server = await Served.start(temp.path);
    await new Client(server, "/1.0.0/large").begun;
    await server[Symbol.asyncDispose]();
    expect(server.lines).toHaveLength(1);
    expect(server.lines[0]).toMatch(/GET \/1.0.0\/large 200 - [0-9.]+ms aborted$/);
  });

  test("whatever is asked for, and however it ends, no file stays open", async () => {
    using temp = new Temp({ "1.0.0/large": Buffer.alloc(LARGE), "notes.txt": "notes" });
    await using server = await Serving.start(["--root", temp.path, "--host", "127.0.0.1"]);
    const { headers } = await get(server, "/notes.txt");
    const before = openFiles(server.pid);
    for (const path of ["/1.0.0/large", "/notes.txt"]) {
      await get(server, path);
      await get(server, path, { "If-None-Match": "*" });
      await get(server, path, { Range: "bytes=99999999-" });
      await get(server, path, { Range: "bytes=1-3", "If-Range": headers.get("etag")! });
      await rawRequest(server.url, `HEAD ${path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n`);
      const client = new Client(server, path);
      await client.begun;
      client.socket.destroy();
    }
    await eventually("all are closed", () => openFiles(server.pid) <= before);
  });
});

describe("from disk and from memory, the same is sent", () => {
  for (const secure of [false, true]) {
    test(`parts of files of all sizes, ${secure ? "HTTPS" : "HTTP"}`, async () => {
      using temp = new Temp();
      const sizes = [1, 1000, 65_536, 65_537, 300_000, MAX_KEPT, MAX_KEPT + 1];
      const content = new Map(sizes.map((size) => [`f${size}`, noise(size, size)]));
      layTree(temp.at("root/1.0.0"), Object.fromEntries(content));
      const { ca, ...tls } = certify(temp.path, "IP:127.0.0.1");
      await using server = await Served.start(temp.at("root"), secure ? { tls } : {});
      const url = secure ? server.url.replace("http:", "https:") : server.url;
      for (const [name, bytes] of content) {
        const size = bytes.length;
        for (const [start, end] of [
          [0, size],
          [0, 1],
          [size - 1, size],
          [size >> 2, (size >> 1) + 1],
        ] as const) {
          const headers = { Range: `bytes=${start}-${end - 1}`, "Accept-Encoding": "identity" };
          const options = { headers, ...(secure && { tls: { ca: Bun.file(ca) } }) };
          const response = await fetch(`${url}/1.0.0/${name}`, options);
          const body = await response.bytes();
          expect([name, response.status, body.length]).toEqual([name, 206, end - start]);
          expect(response.headers.get("content-length")).toBe(`${end - start}`);
          expect(response.headers.get("content-range")).toBe(`bytes ${start}-${end - 1}/${size}`);
          expect(sha256(body)).toBe(sha256(bytes.subarray(start, end)));
        }
      }
    });
  }
});

describe("what is no file any more", () => {
  for (const size of [1000, MAX_KEPT + 1]) {
    test(`a pipe in place of ${size} bytes: 503, until the file is back; a stop is a stop`, async () => {
      using temp = new Temp();
      const content = Buffer.alloc(size, "x");
      layTree(temp.at("1.0.0"), { f: content, other: "other" });
      // No look finds out before the request does.
      await using server = await Served.start(temp.path, { quiet: 1 });
      rmSync(temp.at("1.0.0/f"));
      makePipe(temp.at("1.0.0/f"));
      const answer = await get(server, "/1.0.0/f");
      expect([503, 404]).toContain(answer.status);
      expect((await get(server, "/1.0.0/other")).status).toBe(200);
      rmSync(temp.at("1.0.0/f"));
      writeFileSync(temp.at("1.0.0/f"), content);
      const back = () => get(server, "/1.0.0/f");
      const { body } = await until("the file is back", back, ({ status }) => status === 200, 10);
      expect(body.length).toBe(size);
      makePipe(temp.at("pipe"));
      expect((await get(server, "/pipe")).status).toBe(404);
    });

    test(`a link in place of ${size} bytes leads nowhere`, async () => {
      using temp = new Temp();
      const secret = Buffer.alloc(size, "s");
      temp.write({ "root/1.0.0/f": Buffer.alloc(size, "x"), secret });
      await using server = await Served.start(temp.at("root"), { quiet: 1 });
      rmSync(temp.at("root/1.0.0/f"));
      symlinkSync(temp.at("secret"), temp.at("root/1.0.0/f"));
      const { status, body } = await get(server, "/1.0.0/f");
      expect([503, 404]).toContain(status);
      expect(Buffer.from(body).toString()).not.toContain("ssss");
      // Nor where a directory above it is one.
      mkdirSync(temp.at("elsewhere"));
      writeFileSync(temp.at("elsewhere/f"), secret);
      renameSync(temp.at("root/1.0.0"), temp.at("old"));
      symlinkSync(temp.at("elsewhere"), temp.at("root/1.0.0"));
      const behind = await get(server, "/1.0.0/f");
      expect([503, 404]).toContain(behind.status);
    });
  }

  test("a large file with other content of the same length and time is not sent as the one before", async () => {
    using temp = new Temp();
    const path = temp.at("1.0.0/f");
    layTree(temp.at("1.0.0"), { f: Buffer.alloc(MAX_KEPT + 1, "x") });
    utimesSync(path, 1e9, 1e9);
    await using server = await Served.start(temp.path, { quiet: 1 });
    const { status, headers } = await get(server, "/1.0.0/f");
    expect(status).toBe(200);
    writeFileSync(path, Buffer.alloc(MAX_KEPT + 1, "y"));
    utimesSync(path, 1e9, 1e9);
    const changed = await get(server, "/1.0.0/f");
    if (changed.status === 200) expect(changed.headers.get("etag")).not.toBe(headers.get("etag"));
    else expect(changed.status).toBe(503);
  });
});

describe.skipIf(process.platform !== "linux")("clients that do not read take no memory", () => {
  const crowds = [
    { what: "24, of 24 files too large to be kept", files: 24, size: 6 * MEBIBYTE, most: 100 },
    { what: "40, of 40 files that could be kept", files: 40, size: MAX_KEPT - 1, most: 120 },
  ];
  for (const { what, files, size, most } of crowds) {
    test(what, async () => {
      using temp = new Temp();
      const names = Array.from({ length: files }, (_, i) => `f${i}`);
      const content = (name: string) => Buffer.alloc(size, `${name}.`);
      mkdirSync(temp.at("1.0.0"));
      for (const name of names) writeFileSync(temp.at("1.0.0", name), content(name));
      await using server = await Serving.start(["--root", temp.path, "--host", "127.0.0.1"]);
      const clients = names.map((name) => new Client(server, `/1.0.0/${name}`));
      await Promise.all(clients.map(({ begun }) => begun));
      expect(memoryOf(server.pid) / MEBIBYTE).toBeLessThan(most);
      // Whoever then reads gets all of it, as it is: the first from memory, the last from disk.
      for (const i of [0, files - 1]) {
        const { status, body } = await clients[i]!.rest();
        expect([status, sha256(body)]).toEqual([200, sha256(content(names[i]!))]);
      }
    });
  }
});
