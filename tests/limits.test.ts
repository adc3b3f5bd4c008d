/**
 * A server in a hostile network: what it refuses, and how little an idle or slow or mad client costs.
 * Raw sockets against processes, whose memory and open files are looked at from outside. Set SEED to
 * repeat a run.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { symlinkSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { LIMITS, makeKeys, parseManifest } from "../ota.ts";
import { sha256 } from "./helpers/content.ts";
import { memoryOf, openFiles } from "./helpers/process.ts";
import { ALL, Random, seeded } from "./helpers/random.ts";
import { addressOf, sendRequest, type ParsedResponse, type Sent } from "./helpers/raw.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { eventually, OTA_TS, run, Tool } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

const SEED = seeded("limits");
setDefaultTimeout(600_000);

const MB = 1e6;
const SECRET = "this lies outside of the root";
/** A program that coding makes smaller, and an older one makes smaller still. */
const TEXT = Array.from({ length: 100 }, (_, i) => `${sha256(`${i}`)} = ${i}\n`).join("");
const TREE: Tree = {
  "1.0.0/flash/main.py": `${TEXT}# one\n`,
  "1.0.1/flash/main.py": `${TEXT}# two\n`,
  "1.0.1/flash/lib/a b.py": "x",
  "firmware_1.0.1.bin": Buffer.alloc(5000, 0x80),
  "notes.txt": "notes",
};

/** A server as a process of its own. */
class Server extends Temp implements AsyncDisposable {
  url = "";
  tool!: Tool;

  static async start(
    tree: Tree = TREE,
    options: { args?: (at: Temp) => readonly string[]; idle?: number } = {},
  ): Promise<Server> {
    const server = new Server();
    layTree(server.at("root"), tree);
    // As a library: a root that is known to be complete, and another number of seconds.
    const script = server.at("serve.ts");
    const { idle = LIMITS.idle } = options;
    await Bun.write(
      script,
      `import { LIMITS, serve } from ${JSON.stringify(OTA_TS)};
LIMITS.idle = ${idle};
const [root, ...rest] = process.argv.slice(2);
const [sign, token] = rest.map((text) => text || undefined);
const server = await serve({ root, port: 0, host: "127.0.0.1", quiet: 0, sign, token });
console.log("listens at " + server.url.origin);
`,
    );
    const args = [server.at("root"), ...(options.args?.(server) ?? [])];
    server.tool = new Tool(args, { script });
    try {
      const [, url = ""] = await server.tool.until(/^listens at (.*)$/m);
      server.url = url;
    } catch (error) {
      await server[Symbol.asyncDispose]();
      throw error;
    }
    return server;
  }

  get openFiles(): number {
    return openFiles(this.tool.pid);
  }

  get memory(): number {
    return memoryOf(this.tool.pid);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.tool[Symbol.asyncDispose]();
    this[Symbol.dispose]();
  }
}

/** As a board asks, with more lines. */
const ask = (
  server: { url: string },
  target: string,
  headers: readonly string[] = [],
  how: Sent = {},
) => sendRequest(server, target, { version: "1.0", headers, ...how });

const statusOf = async (...args: Parameters<typeof ask>) => (await ask(...args)).status;

/** A connection that has sent something; what comes back is counted, and may be left unread. */
function open(
  server: { url: string },
  text: string | Uint8Array,
): Promise<{ socket: Socket; received: () => string; closed: Promise<number> }> {
  const { promise, resolve, reject } = Promise.withResolvers<{
    socket: Socket;
    received: () => string;
    closed: Promise<number>;
  }>();
  let received = "";
  const over = Promise.withResolvers<number>();
  // From before it is there: it may be a while until a busy machine tells us.
  const since = performance.now();
  const socket = connect(addressOf(server.url), () => {
    if (text.length > 0) socket.write(text);
    socket.on("data", (piece: Uint8Array) => (received += Buffer.from(piece).toString("latin1")));
    socket.on("close", () => over.resolve((performance.now() - since) / 1000));
    resolve({ socket, received: () => received, closed: over.promise });
  });
  socket.on("error", reject);
  return promise;
}

// What takes long is begun first, and looked at last.

let waiting: Server;
/** Connections that stop in the middle of something: how many seconds they lasted. */
const lasted: Record<string, Promise<number>> = {};
/** Bun counts in ticks of 4 seconds, so it may be up to 4 less. */
const IDLE = 16;
/** A connection on which all was said, to a server that waits for a minute as by default. */
let patient: Server;
let kept: { socket: Socket; closed: Promise<number> };
/** Whether that was still there when all others had gone. */
let isKept: Promise<boolean>;
let steady: Promise<number>;
// More than the buffers of both ends hold, so that the server has to wait for a slow reader.
const size = 140e6;

/** Reads some of a body every second and a half, for longer than a silent client may be there. */
async function readSteadily(): Promise<number> {
  const { socket, closed } = await open(waiting, "");
  let [got, ration] = [0, 8e6];
  socket.on("data", (piece: Uint8Array) => {
    got += piece.length;
    if (got >= ration) socket.pause();
  });
  socket.write("GET /large HTTP/1.0\r\nHost: a\r\n\r\n");
  for (; ration < 112e6; ration += 8e6) {
    socket.resume();
    await eventually("a ration", () => got >= ration);
    await Bun.sleep(1500);
  }
  ration = Infinity;
  socket.resume();
  await closed;
  return got;
}

beforeAll(async () => {
  // The number of seconds is another one here, so that nobody has to wait for a minute.
  waiting = await Server.start({ ...TREE, large: Buffer.alloc(size, "x") }, { idle: IDLE });
  patient = await Server.start();
  const stops: Record<string, string> = {
    "before a byte": "",
    "in the first line": "GET /notes.t",
    "in the headers": "GET /notes.txt HTTP/1.1\r\nHost: a\r\nX-Slow: ",
    "after an answer": "GET /notes.txt HTTP/1.1\r\nHost: a\r\n\r\n",
    "in the next request": "GET /notes.txt HTTP/1.1\r\nHost: a\r\n\r\nGET /n",
  };
  for (const [where, text] of Object.entries(stops)) {
    lasted[where] = (await open(waiting, text)).closed;
  }
  kept = await open(patient, stops["after an answer"]!);
  isKept = Promise.all(Object.values(lasted)).then(() => !kept.socket.destroyed);
  steady = readSteadily();
  steady.catch(() => {}); // It is awaited below.
});
afterAll(async () => {
  kept?.socket.destroy();
  await waiting?.[Symbol.asyncDispose]();
  await patient?.[Symbol.asyncDispose]();
});

describe("each limit", () => {
  let server: Server;
  beforeAll(async () => {
    server = await Server.start();
  });
  afterAll(async () => {
    await server?.[Symbol.asyncDispose]();
  });

  test("is a number in serve --help", async () => {
    const { stdout } = await run(["serve", "--help"]);
    for (const number of Object.values(LIMITS))
      expect(stdout).toMatch(new RegExp(`\\b${number}\\b`));
    expect(stdout).toContain("no request bodies");
  });

  test("of path and query: a character more is 414", async () => {
    const longest = `/${"a".repeat(LIMITS.target - 1)}`;
    expect(await statusOf(server, longest)).toBe(404);
    expect(await statusOf(server, `${longest}a`)).toBe(414);
    const query = `?${"q".repeat(LIMITS.query - 1)}`;
    const path = `/${"a".repeat(LIMITS.target - 1 - query.length)}`;
    expect(await statusOf(server, path + query)).toBe(404);
    expect(await statusOf(server, `${path}a${query}`)).toBe(414);
    expect(await statusOf(server, `${longest}a`, [], { method: "HEAD" })).toBe(414);
  });

  test("of the query: a character more is 414", async () => {
    const query = `current_ver=1.0.0&x=`;
    const longest = `/manifest.json?${query.padEnd(LIMITS.query, "x")}`;
    const { status, body } = await ask(server, longest);
    expect(status).toBe(200);
    expect(JSON.parse(Buffer.from(body).toString())).toMatchObject({ previous_version: "1.0.0" });
    expect(await statusOf(server, `${longest}x`)).toBe(414);
  });

  test("of current_ver: a character more, or a control character, is 400", async () => {
    const at = (version: string) => statusOf(server, `/manifest.json?current_ver=${version}`);
    expect(await at("1".repeat(LIMITS.version))).toBe(200);
    expect(await at("1".repeat(LIMITS.version + 1))).toBe(400);
    expect(await at("%31".repeat(LIMITS.version))).toBe(200);
    for (const control of ["%00", "%0a", "%0D", "%1b", "%1f", "%7f", "%c2%80", "%c2%9f"]) {
      expect([control, await at(`1.0${control}`)]).toEqual([control, 400]);
    }
    // What is no control character goes, and what does not decode stays as it is.
    for (const odd of ["%20", "%c2%a0", "%f0%9f%9a%80", "%zz", "%ff"]) {
      expect([odd, await at(`1.0${odd}`)]).toEqual([odd, 200]);
    }
  });

  test("of headers, which is Bun's: 431", async () => {
    expect(await statusOf(server, "/notes.txt", [`X: ${"x".repeat(8000)}`])).toBe(200);
    expect(await statusOf(server, "/notes.txt", [`X: ${"x".repeat(20_000)}`])).toBe(431);
  });

  test("a body: 413, and the connection is closed", async () => {
    for (const method of ["GET", "HEAD"]) {
      for (const target of ["/notes.txt", "/manifest.json", "/none"]) {
        for (const headers of [["Content-Length: 5"], ["Transfer-Encoding: chunked"]]) {
          const options = { method, version: "1.1" } as const;
          const { status, headers: answered } = await ask(server, target, headers, options);
          expect([method, target, status]).toEqual([method, target, 413]);
          expect(answered.get("connection")).toBe("close");
        }
      }
    }
    expect(await statusOf(server, "/notes.txt", ["Content-Length: 0"])).toBe(200);
  });

  test("a body of a method that there is not: 405 or 413, and none of it is kept", async () => {
    const before = server.memory;
    const piece = Buffer.alloc(1 << 20, "x");
    for (const method of ["POST", "PUT", "PATCH", "DELETE"]) {
      for (const length of [100e6, 10e9]) {
        const head = `${method} /notes.txt HTTP/1.1\r\nHost: a\r\nContent-Length: ${length}\r\n\r\n`;
        const { socket, received, closed } = await open(server, head);
        let isOver = false;
        void closed.then(() => (isOver = true));
        // The answer comes before the body does.
        await eventually("an answer", () => isOver || received().includes("\r\n\r\n"));
        const status = /^HTTP\/1\.1 (\d+)/.exec(received())?.[1];
        expect([method, ["405", "413"].includes(status ?? "")]).toEqual([method, true]);
        socket.on("error", () => {}); // It may close while we write.
        for (let sent = 0; sent < 50e6 && !isOver; sent += piece.length) {
          if (socket.write(piece)) continue;
          const drained = new Promise((resolve) => socket.once("drain", resolve));
          // It may never read on: that is as good as refusing.
          await Promise.race([drained, closed, Bun.sleep(500)]);
          if (socket.writableNeedDrain) break;
        }
        socket.destroy();
      }
    }
    await eventually("the memory is back", () => server.memory - before < 30 * MB);
    expect(await statusOf(server, "/notes.txt")).toBe(200);
  });
});

describe("a client that does nothing costs a socket", () => {
  const unfinished = [
    "",
    "G",
    "GET /manifest.json?current_ver=1.0.0 HTTP/1.1\r\n",
    "GET /1.0.1/flash/main.py HTTP/1.1\r\nHost: a\r\nX: ",
  ];

  test("300 connections that never finish a request do not delay an honest one", async () => {
    await using attacked = await Server.start();
    const files = attacked.openFiles;
    const held = await Promise.all(
      Array.from({ length: 300 }, (_, i) => open(attacked, unfinished[i % unfinished.length]!)),
    );
    // And they go on, a byte at a time.
    const dripping = setInterval(() => {
      for (const { socket } of held) if (socket.writable) socket.write("x");
    }, 50);
    try {
      await eventually("all are connected", () => attacked.openFiles - files >= 300);
      // It is answered while they are there, of which none has had its turn.
      for (let i = 0; i < 5; i++) {
        for (const target of ["/manifest.json?current_ver=1.0.0", "/1.0.1/flash/main.py"]) {
          expect(await statusOf(attacked, target)).toBe(200);
        }
      }
      expect(held.filter(({ socket, received }) => socket.destroyed || received() !== "")).toEqual(
        [],
      );
      expect(attacked.openFiles - files).toBeGreaterThanOrEqual(300);
    } finally {
      clearInterval(dripping);
      for (const { socket } of held) socket.destroy();
    }
    await eventually("all files are closed again", () => attacked.openFiles <= files + 2);
  });

  test("100 that ask for a large file and read nothing take no memory", async () => {
    const size = 8 * 1024 * 1024;
    const large = { "1.0.0/large": Buffer.alloc(size, "x"), "large.bin": Buffer.alloc(size, "y") };
    await using slow = await Server.start({ ...TREE, ...large });
    for (const target of ["/1.0.0/large", "/large.bin"]) {
      expect((await ask(slow, target)).body.length).toBe(size);
      const before = slow.memory;
      const request = `GET ${target} HTTP/1.1\r\nHost: a\r\n\r\n`;
      const held = await Promise.all(
        Array.from({ length: 100 }, async () => {
          const connection = await open(slow, request);
          connection.socket.pause();
          return connection;
        }),
      );
      expect(await statusOf(slow, "/notes.txt")).toBe(200);
      let most = 0;
      for (let looks = 0; looks < 30; looks++) {
        most = Math.max(most, slow.memory - before);
        await Bun.sleep(10);
      }
      // It would be 800 MB if each had a copy.
      expect([target, most < 150 * MB]).toEqual([target, true]);
      // One that then reads gets all of it.
      const { socket, received } = held[0]!;
      socket.resume();
      await eventually("all of it", () => received().length > size);
      for (const connection of held) connection.socket.destroy();
    }
  });
});

// ── Random requests ──

const TARGETS = [
  ...["/manifest.json?current_ver=1.0.0", "/manifest.json", "/1.0.1/flash/main.py", "/notes.txt"],
  ...["/firmware_1.0.1.bin", "/1.0.1/flash/lib/a%20b.py", "/large.bin", "/-/health", "/-/metrics"],
  ...["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/out", "/outdir/secret.txt"],
  ...[
    "/1.0.1/out",
    "/.hidden",
    "/.env",
    "/1.0.1/",
    "/1.0.1",
    "/%zz",
    "*",
    "/",
    "//",
    "/-/",
    "/%00",
  ],
  ...["http://a/1.0.1/flash/main.py", "http://a/../secret.txt", "a/../../secret.txt", "\\..\\x"],
  "/manifest.json?current_ver=%F0%9F%9A%80&reqid=1&devid=x&hash=sha256&firmware_ver=&base=x&failed=1",
];
const HEADERS = [
  ...["Range: bytes=0-1", "Range: bytes=-1", "Range: bytes=99-", "Range: bytes=1-0,2-3"],
  ...["Range: bytes=,", 'If-Range: "x"\r\nRange: bytes=1-', "Host: ../secret.txt"],
  ...["Range: bytes=99999999999999999999-", "If-None-Match: *", 'If-Range: "x"', "Accept: */*"],
  ...["Accept-Encoding: gzip, zstd, dcz", "Accept-Encoding: br;q=1, *", "Host: ", "Host: a/../b"],
  `Available-Dictionary: :${Buffer.alloc(32).toString("base64")}:`,
  ...["Available-Dictionary: :x:", "Upgrade: websocket", "Upgrade: h2c", "Expect: 100-continue"],
  ...["Content-Length: 0", "Content-Length: 5", "Content-Length: -1", "Content-Length: 1, 2"],
  ...["Transfer-Encoding: chunked", "Transfer-Encoding: x", "Authorization: Bearer x", ": x", "X"],
  ...["\tX: y", "X: \u{1f680}", "Connection: keep-alive", "Connection: upgrade", "Cookie: a"],
];
const BITS = [
  ...["..", "/", "%2e", "%2f", "%5c", "%00", "\0", "\r\n", "\n", "\r", " ", "\t", "?", "#", "&"],
  ...["=", "\\", "\xff", "\xc0\xaf", "A", "%", ":", "\r\n\r\n", "GET / HTTP/1.1\r\n", "//"],
];

/** The text with some characters added, changed, doubled or gone. */
function mutated(from: string, random: Random): string {
  let text = from;
  for (let times = 1 + random.below(4); times > 0; times--) {
    const at = random.below(text.length + 1);
    const to = Math.min(text.length, at + random.below(12));
    const bits = random.chance(0.6) ? random.pick(BITS) : String.fromCharCode(random.below(256));
    text = random.pick([
      () => text.slice(0, at) + bits + text.slice(at),
      () => text.slice(0, at) + bits + text.slice(at + 1),
      () => text.slice(0, at) + text.slice(to),
      () => text.slice(0, to) + text.slice(at),
      () => text.slice(0, at) + bits.repeat(random.below(50)) + text.slice(at),
    ])();
  }
  return text;
}

/** A request that is right, or nearly, or not at all. */
function randomRequest(random: Random): Uint8Array {
  if (random.chance(0.05)) {
    return Uint8Array.from({ length: 1 + random.below(300) }, () => random.below(256));
  }
  const one = () => {
    const usual = random.chance(0.85);
    const method = random.pick(
      usual ? ["GET", "GET", "HEAD"] : ["POST", "PUT", "OPTIONS", "CONNECT", "get", "X", ""],
    );
    const version = random.pick(random.chance(0.95) ? ["1.0", "1.1"] : ["0.9", "2.0", "1.10", "x"]);
    const target = random.pick(TARGETS);
    const path = random.chance(0.5) ? target : mutated(target, random);
    const lines = [`${method} ${path} HTTP/${version}`];
    if (random.chance(0.9)) lines.push("Host: device.test");
    while (random.chance(0.5)) lines.push(random.pick(HEADERS));
    return lines.join("\r\n");
  };
  const pipelined = Array.from({ length: random.chance(0.1) ? 3 : 0 }, () => `${one()}\r\n\r\n`);
  const text = `${pipelined.join("")}${one()}\r\nConnection: close\r\n\r\n`;
  return Buffer.from(random.chance(0.7) ? text : mutated(text, random), "latin1");
}

/** Sends bytes and takes what comes, until the server closes or has been silent for a while. */
function exchange(server: { url: string }, data: Uint8Array, silence = 60): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  let answer = "";
  const socket = connect(addressOf(server.url), () => socket.write(data));
  const end = () => {
    clearTimeout(timer);
    socket.destroy();
    resolve(answer);
  };
  let timer = setTimeout(end, 5000);
  socket.on("data", (piece: Uint8Array) => {
    answer += Buffer.from(piece).toString("latin1");
    clearTimeout(timer);
    timer = setTimeout(end, silence);
  });
  socket.on("close", end);
  socket.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code === "ECONNRESET" || error.code === "EPIPE") return end();
    clearTimeout(timer);
    reject(error);
  });
  return promise;
}

/** Each run sends others. */
const REQUESTS = ALL ? 10_000 : 5000;

describe(`${REQUESTS} random requests`, () => {
  for (const [what, args] of [
    ["", () => []],
    [", to a server that signs", (at: Temp) => [at.at("key")]],
  ] as const) {
    test(`no 5xx, no byte from outside, no crash; files and memory are back${what}`, async () => {
      const random = new Random(SEED);
      const large = { "large.bin": Buffer.alloc(100_000, "z") };
      const files: Tree = { ...TREE, ...large, ".hidden": SECRET, ".env": SECRET };
      await using fuzzed = await Server.start(files, {
        args: (at) => {
          at.write({ "secret.txt": SECRET, key: makeKeys().key });
          symlinkSync("../secret.txt", at.at("root/out"));
          symlinkSync("..", at.at("root/outdir"));
          symlinkSync("../../secret.txt", at.at("root/1.0.1/out"));
          return args(at);
        },
      });

      const statuses: Record<string, number> = {};
      const wrong: string[] = [];
      let silent = 0;
      const run = async (count: number) => {
        let left = count;
        const worker = async () => {
          while (left-- > 0) {
            const request = randomRequest(random);
            // An end that never came: nothing will be answered, and we go.
            const ends = Buffer.from(request).includes("\r\n\r\n");
            const data = ends ? request : Buffer.concat([request, Buffer.from("\r\n\r\n")]);
            const answer = await exchange(fuzzed, data);
            const shown = () => JSON.stringify(Buffer.from(data).toString("latin1"));
            if (answer === "") silent++;
            if (answer.includes(SECRET) || answer.includes("PRIVATE")) {
              wrong.push(`${shown()} gives a secret away`);
            }
            for (const [, status] of answer.matchAll(/HTTP\/1\.[01] (\d{3}) /g)) {
              statuses[status!] = (statuses[status!] ?? 0) + 1;
              // 505 is Bun's own, for a version of HTTP that there is not.
              if (status!.startsWith("5") && status !== "505") wrong.push(`${shown()}: ${status}`);
            }
          }
        };
        await Promise.all(Array.from({ length: 48 }, worker));
      };
      // What is needed once is there after some hundreds.
      await run(REQUESTS / 5);
      await eventually("connections end", () => fuzzed.openFiles < 40);
      const before = { files: fuzzed.openFiles, memory: fuzzed.memory };
      await run(REQUESTS);

      expect(wrong).toEqual([]);
      // Many were answered in every way, else this would show nothing.
      for (const status of ["200", "400", "404", "405"]) {
        expect([status, (statuses[status] ?? 0) > 50]).toEqual([status, true]);
      }
      expect(silent).toBeLessThan(REQUESTS / 4);
      expect(fuzzed.tool.stderr).toBe("");
      expect(Buffer.from((await ask(fuzzed, "/notes.txt")).body).toString()).toBe("notes");
      expect(parseManifest((await ask(fuzzed, "/manifest.json")).body)?.version).toBe("1.0.1");
      await eventually("open files are back", () => fuzzed.openFiles <= before.files + 3);
      await eventually("memory is back", () => fuzzed.memory < before.memory + 40 * MB);
    });
  }
});

test("memory stays where it is for ever new versions, hosts and paths", async () => {
  await using server = await Server.start();
  const random = new Random(SEED);
  const request = (i: number) => {
    const host = `${i}.${"h".repeat(random.below(2000))}`;
    const version = `${random.next()}`.padEnd(LIMITS.version, "9");
    const target = random.pick([
      `/manifest.json?current_ver=${version}&hash=sha256`,
      `/manifest.json?current_ver=1.0.0&devid=${i}&failed=${i}&firmware_ver=${i}`,
      `/${i}/${"p".repeat(random.below(1000))}`,
      `/1.0.1/flash/main.py?${i}`,
    ]);
    const coding = random.pick(["", "Accept-Encoding: gzip\r\n", "Accept-Encoding: zstd, dcz\r\n"]);
    return `GET ${target} HTTP/1.1\r\nHost: ${host}\r\n${coding}Connection: close\r\n\r\n`;
  };
  const run = async (from: number, count: number) => {
    let next = from;
    const worker = async () => {
      while (next < from + count) {
        const { socket, received, closed } = await open(server, request(next++));
        socket.on("error", () => {});
        await closed;
        expect(received()).toMatch(/^HTTP\/1\.1 (200|404) /);
      }
    };
    await Promise.all(Array.from({ length: 32 }, worker));
  };
  await run(0, 3000);
  const before = server.memory;
  await run(1e6, 10_000);
  await eventually("memory is where it was", () => server.memory - before < 60 * MB);
});

// ── What deployed boards rely on ──

describe("a 200 to who sends no Accept-Encoding ends its header on a multiple of 100 bytes", () => {
  const large = Buffer.alloc(17 * 1024 * 1024, "large ");
  const token = "a-token";

  /** With padding to 100 bytes for boards, or with none. */
  function expectSent(what: string, isPadded: boolean, response: ParsedResponse) {
    const { status, headers, headerLength, body } = response;
    const found = { what, status, isPadded: headers.has("x-pad"), long: headerLength > 500 };
    expect(found).toEqual({ what, status: 200, isPadded, long: false });
    if (isPadded) expect([what, headerLength % 100]).toEqual([what, 0]);
    expect([what, headers.get("content-length")]).toEqual([what, `${body.length}`]);
    expect(headers.has("transfer-encoding")).toBe(false);
  }

  test("with signatures, tokens and codings; from memory, and from disk", async () => {
    using temp = new Temp();
    const tree = { ...TREE, "1.0.1/flash/large": large, "firmware_1.0.2.bin": large };
    layTree(temp.at("root"), { ...tree, "other.bin": large.subarray(0, 3_000_000) });
    temp.write({ key: makeKeys().key });
    await using server = await Served.start(temp.at("root"), { sign: temp.at("key"), token });
    const dictionary = Buffer.from(sha256(TREE["1.0.0/flash/main.py"]!), "hex").toString("base64");
    const codings: Record<string, readonly string[]> = {
      identity: [],
      gzip: ["Accept-Encoding: gzip"],
      zstd: ["Accept-Encoding: gzip, zstd"],
      dcz: ["Accept-Encoding: dcz, zstd", `Available-Dictionary: :${dictionary}:`],
    };
    const coded = new Set<string>();
    const bearer = `Authorization: Bearer ${token}`;
    const paths = ["/1.0.1/flash/main.py", "/1.0.1/flash/lib/a%20b.py", "/notes.txt", "/-/health"];
    for (const version of ["1.0", "1.1"] as const) {
      for (const [coding, headers] of Object.entries(codings)) {
        const isPadded = coding === "identity";
        for (const path of [...paths, "/-/metrics", "/other.bin"]) {
          for (const again of [1, 2]) {
            const inHeader = await ask(server, path, [bearer, ...headers], { version });
            expectSent(`${path}, ${coding}, ${version}, ${again}`, isPadded, inHeader);
            coded.add(inHeader.headers.get("content-encoding") ?? "identity");
          }
          const inQuery = await ask(server, `${path}?token=${token}`, headers, { version });
          expectSent(`${path} with token=, ${coding}, ${version}`, isPadded, inQuery);
        }
        // Manifests of every length.
        for (let length = 0; length < 12; length++) {
          const query = `current_ver=1.0.0&hash=sha256&token=${token}&reqid=${"r".repeat(length)}`;
          const answer = await ask(server, `/manifest.json?${query}`, headers, { version });
          expectSent(`a manifest, reqid of ${length}, ${coding}, ${version}`, isPadded, answer);
          expect(answer.headers.get("x-ota-signature")).toMatch(/^[A-Za-z0-9+/]{86}==$/);
        }
        const nothing = `/manifest.json?current_ver=9&token=${token}`;
        const none = await ask(server, nothing, headers, { version });
        expectSent(`null, ${coding}, ${version}`, isPadded, none);
        expect(Buffer.from(none.body).toString()).toBe("null");
      }
    }
    expect([...coded].sort()).toEqual(["dcz", "gzip", "identity", "zstd"]);
  });

  test("content too large for memory", async () => {
    const beside = { "1.0.1/flash/large": large, "firmware_1.0.2.bin": large };
    await using server = await World.with({}, { beside, token });
    for (const headers of [[], ["Accept-Encoding: gzip, zstd"]]) {
      for (const path of ["/1.0.1/flash/large", "/firmware_1.0.2.bin"]) {
        const answer = await ask(server, `${path}?token=${token}`, headers);
        expectSent(path, headers.length === 0, answer);
        expect(sha256(answer.body)).toBe(sha256(large));
      }
    }
  });
});

// ── What was begun first ──

describe("a client that is silent, and one that is slow", () => {
  test("one that reads slowly but steadily is not cut off", async () => {
    expect(await steady).toBeGreaterThan(size);
  });

  test(`the connection is closed ${IDLE} seconds after the last byte, within Bun's precision`, async () => {
    const seconds = await Promise.all(
      Object.entries(lasted).map(async ([where, closed]) => [where, await closed] as const),
    );
    for (const [where, lasts] of seconds) {
      // Before the first whole request Bun itself waits for 10.
      expect([where, lasts > Math.min(IDLE, 10) - 4.5]).toEqual([where, true]);
    }
    // On a machine on which seconds take longer, a minute does as well.
    expect(await isKept).toBe(true);
    expect(await statusOf(waiting, "/notes.txt")).toBe(200);
  });
});
