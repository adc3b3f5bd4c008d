/**
 * Servers that misbehave, transfers that are cut off and go on, and transports of one's own.
 * Whatever a server does, a device ends in time, and on a whole release.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import type { Socket } from "node:net";
import { gzipSync } from "node:zlib";
import {
  OTA,
  type OTAOptions,
  TransferError,
  type TransferRequest,
  type TransferResponse,
} from "../ota.ts";
import { noise, sha256 } from "./helpers/content.ts";
import {
  Double,
  head,
  manifestOf,
  offering,
  send,
  sendContent,
  type Asked,
  type Offer,
} from "./helpers/double.ts";
import { asTree, layTree, sizesIn, type Tree } from "./helpers/temp.ts";
import { eventually, run, Tool, type Ran } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

/** Does not compress, so that all of it is on the wire. */
const CONTENT = Buffer.from(noise(200_000, 1));
const BEFORE: Tree = { "flash/main.py": "one", "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n" };
const OFFER: Offer = { version: "1.0.1", put: { "flash/main.py": CONTENT, "sd/small": "small" } };
const AFTER = asTree({ ...OFFER.put, "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" });
const BIG = "/content/flash/main.py";
const MANIFEST = "/manifest.json";

/** A device on 1.0.0. */
class Device extends World {
  constructor() {
    super({}, { device: BEFORE });
  }

  /** Whether nothing has changed, and all is well once the server is. */
  async expectUnharmed(server: Double): Promise<void> {
    expect(this.tree()).toEqual(asTree(BEFORE));
    server.reply = offering(OFFER, () => server.url);
    const { code, last, stderr } = await this.client([], server);
    expect({ code, last, stderr: code === 0 ? "" : stderr }).toEqual({
      ...{ code: 0, last: "updated 1.0.0 -> 1.0.1", stderr: "" },
    });
    expect(this.tree()).toEqual(AFTER);
  }

  /** The sizes of what is staged, by name. */
  staged(): Record<string, number> {
    return sizesIn(this.at("device/.ota/staged"));
  }
}

type Misbehave = (connection: Socket, asked: Asked) => void | Promise<void>;

/** A server that is good but for what it does where a path is asked for. */
function doubleThat(path: string, misbehave: Misbehave): Promise<Double> {
  const starting = Double.start((asked, connection) => {
    if (asked.path === path) return misbehave(connection, asked);
    return starting.then((double) => offering(OFFER, () => double.url)(asked, connection));
  });
  return starting;
}

/** Writes for as long as somebody reads. */
function writeForEver(connection: Socket, piece: Uint8Array): void {
  const more = (): void => {
    while (!connection.destroyed && connection.write(piece));
  };
  connection.on("drain", more);
  more();
}

const chunked = { "Transfer-Encoding": "chunked" };
const chunk = (bytes: Uint8Array): Buffer =>
  Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from("\r\n")]);
const whole = { "Content-Length": CONTENT.length };
const half = CONTENT.subarray(0, 100_000);
/** 128 MiB of nothing, in fewer bytes than the content has. */
const BOMB = gzipSync(Buffer.alloc(128 * 1024 * 1024), { level: 9 });

/** Three seconds, where silence is to be met; else enough for a busy machine. */
function patience(says: RegExp): string[] {
  return says.source.includes("nothing came for 3 s") ? ["--timeout", "3"] : [];
}

describe("content that", () => {
  const TRIES = 5;
  const cases: Record<
    string,
    { does: Misbehave; says: RegExp; tries?: number; bytes?: number; memory?: number }
  > = {
    "never comes: the connection is closed": {
      does: (connection) => void connection.end(),
      says: /cannot reach .*gave up after 5 tries/,
    },
    "never comes: silence": { does: () => {}, says: /nothing came for 3 s; gave up/ },
    "never comes: a head, and silence": {
      does: (connection) => void connection.write(head(200, whole)),
      says: /nothing came for 3 s; gave up/,
    },
    "is no HTTP": {
      does: (connection) => void connection.end("lorem ipsum\r\n\r\n"),
      says: /gave up after 5 tries/,
    },
    "stops in the middle, in silence": {
      does: (connection) => {
        connection.write(head(200, whole));
        connection.write(half);
      },
      says: /nothing came for 3 s; gave up/,
      bytes: CONTENT.length,
    },
    "stops in the middle, and the connection is closed": {
      does: (connection) => {
        connection.write(head(200, whole));
        connection.end(half);
      },
      says: /gave up after 5 tries/,
      bytes: CONTENT.length,
    },
    "stops in the middle, and the connection is reset": {
      does: async (connection) => {
        connection.write(head(200, whole));
        connection.write(half);
        await Bun.sleep(30);
        connection.resetAndDestroy();
      },
      says: /gave up after 5 tries/,
      bytes: CONTENT.length,
    },
    "stops in the middle of a chunk": {
      does: (connection) => {
        connection.write(head(200, chunked));
        connection.end(chunk(half).subarray(0, 5000));
      },
      says: /gave up after 5 tries/,
    },
    "comes a byte a minute": {
      does: (connection) => {
        connection.write(head(200, whole));
        connection.write(CONTENT.subarray(0, 1));
      },
      says: /nothing came for 3 s; gave up/,
    },
    "is shorter than the manifest says": {
      does: (connection) => send(connection, half),
      says: /has 100000 bytes, and 200000 were expected\n/,
    },
    "is longer than the manifest says": {
      does: (connection) => send(connection, Buffer.concat([CONTENT, Buffer.from("x")])),
      says: /longer than the 200000 bytes expected\n$/,
      tries: 4,
      bytes: CONTENT.length,
    },
    "never ends": {
      does: (connection) => {
        connection.write(head(200));
        writeForEver(connection, CONTENT);
      },
      says: /longer than the 200000 bytes expected\n$/,
      tries: 4,
      bytes: CONTENT.length,
    },
    "never ends, in chunks": {
      does: (connection) => {
        connection.write(head(200, chunked));
        writeForEver(connection, chunk(CONTENT));
      },
      says: /longer than the 200000 bytes expected\n$/,
      tries: 4,
      bytes: CONTENT.length,
    },
    // Twice from one manifest and twice from the next: no accident of the way here.
    "is another": {
      does: (connection) => send(connection, noise(CONTENT.length, 2)),
      says: /does not verify/,
      tries: 4,
    },
    "is gone": {
      does: (connection) => send(connection, "no", { status: 404 }),
      says: /answered 404/,
      tries: 2,
    },
    "is a server's error": {
      does: (connection) => send(connection, "no", { status: 500 }),
      says: /answered 500; gave up/,
    },
    "is a part that nobody asked for": {
      does: (connection) => {
        const headers = { "Content-Range": `bytes 100000-199999/${CONTENT.length}` };
        send(connection, CONTENT.subarray(100_000), { status: 206, headers });
      },
      says: /gave up after 5 tries/,
    },
    "is a bomb": {
      does: (connection) => send(connection, BOMB, { headers: { "Content-Encoding": "gzip" } }),
      says: /ota\.ts: .*(gave up|decode|unasked)/,
      // Coded, and then plain, which it is not either.
      tries: 10,
      memory: 300 * 1024 * 1024,
    },
    "is coded as nobody asked": {
      does: (connection) => send(connection, CONTENT, { headers: { "Content-Encoding": "xz" } }),
      says: /coded as xz, which nobody asked for; gave up/,
    },
  };
  for (const [name, { does, says, tries = TRIES, bytes, memory }] of Object.entries(cases)) {
    test.concurrent(name, async () => {
      using device = new Device();
      await using server = await doubleThat(BIG, does);
      // Of a process the memory can be told.
      const ended: Ran & { memory?: number } =
        memory === undefined
          ? await device.client(patience(says), server)
          : await device.process(patience(says), server, { isMeasured: true });
      const { code, stdout, stderr } = ended;
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(stderr).toMatch(says);
      const asked = server.askedFor(BIG).length;
      expect(asked).toBeGreaterThan(1);
      expect(asked).toBeLessThanOrEqual(tries);
      const kept = Object.values(device.staged()).reduce((sum, size) => sum + size, 0);
      expect(kept).toBeLessThan((bytes ?? CONTENT.length) + 2000);
      if (memory !== undefined) expect(ended.memory).toBeWithin(1, memory);
      await device.expectUnharmed(server);
    });
  }

  test.concurrent("comes slowly, but comes, is waited for", async () => {
    using device = new Device();
    const slow = "x".repeat(40);
    const offer = { version: "1.0.1", put: { "flash/main.py": slow } };
    await using server = await Double.start(async (asked, connection) => {
      if (asked.path === MANIFEST) return offering(offer, () => server.url)(asked, connection);
      connection.write(head(200, { "Content-Length": slow.length }));
      for (const byte of slow) {
        connection.write(byte);
        await Bun.sleep(50);
      }
      connection.end();
    });
    const { code } = await device.client([], server);
    expect(code).toBe(0);
    expect(server.askedFor(BIG)).toHaveLength(1);
  });

  test.concurrent("is cut off time and again comes in the end, every byte of it once", async () => {
    using device = new Device();
    let sent = 0;
    const tag = `"${sha256(CONTENT)}"`;
    await using server = await doubleThat(BIG, async (connection, asked) => {
      const from = Number(/^bytes=(\d+)-$/.exec(asked.headers.get("range") ?? "")?.[1] ?? 0);
      if (from > 0) expect(asked.headers.get("if-range")).toBe(tag);
      const rest = CONTENT.subarray(from);
      const piece = rest.subarray(0, 60_000);
      sent += piece.length;
      const range = { "Content-Range": `bytes ${from}-${CONTENT.length - 1}/${CONTENT.length}` };
      const headers = { "Content-Length": rest.length, ETag: tag, ...(from > 0 && range) };
      connection.write(head(from > 0 ? 206 : 200, headers));
      if (piece.length === rest.length) return void connection.end(piece);
      connection.write(piece);
      await eventually("the piece is here", () => {
        return (device.staged()[`${sha256(CONTENT)}.part`] ?? 0) >= from + piece.length;
      });
      connection.end();
    });
    const { code, stderr } = await device.client([], server);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    expect(device.tree()).toEqual(AFTER);
    expect(server.askedFor(BIG)).toHaveLength(4);
    expect(sent).toBe(CONTENT.length);
  });

  for (const failures of [0, 3, 4]) {
    test.concurrent(
      `changed since the manifest is asked for anew, after ${failures} failures`,
      async () => {
        using device = new Device();
        const later: Offer = {
          version: "1.0.1",
          put: { "flash/main.py": Buffer.from(noise(200_000, 3)), "sd/small": "small" },
        };
        let manifests = 0;
        await using server = await Double.start((asked, connection) => {
          if (asked.path === MANIFEST) manifests++;
          if (asked.path === BIG && asked.before < failures) {
            return send(connection, "changing just now", { status: 503 });
          }
          const offer = asked.path === MANIFEST && manifests === 1 ? OFFER : later;
          return offering(offer, () => server.url)(asked, connection);
        });
        const { code, last } = await device.client([], server);
        expect({ code, last }).toEqual({ code: 0, last: "updated 1.0.0 -> 1.0.1" });
        expect(device.tree()).toEqual({ ...AFTER, ...asTree(later.put) });
        expect(manifests).toBe(2);
      },
    );
  }
});

describe("a manifest that", () => {
  const cases: Record<string, { does: Misbehave; says: RegExp; tries?: number }> = {
    "never comes": { does: () => {}, says: /nothing came for 3 s; gave up/ },
    "is not finished": {
      does: (connection) => {
        connection.write(head(200, chunked));
        connection.write(chunk(Buffer.from('{"delete":[')));
      },
      says: /nothing came for 3 s; gave up/,
    },
    "is cut off": {
      does: (connection) => {
        connection.write(head(200, { "Content-Length": 1000 }));
        connection.end('{"delete":[');
      },
      says: /gave up after 5 tries/,
    },
    "never ends": {
      does: (connection) => {
        connection.write(head(200));
        writeForEver(connection, Buffer.alloc(100_000, " "));
      },
      says: /the manifest is longer than 67108864 bytes/,
      tries: 1,
    },
    "is a bomb": {
      does: (connection) => send(connection, BOMB, { headers: { "Content-Encoding": "gzip" } }),
      says: /ota\.ts: .*manifest.*(decode|longer)/,
    },
    "is empty": {
      does: (connection) => send(connection, ""),
      says: /refused the manifest: an empty body/,
      tries: 1,
    },
    "is a page of a hotel's network": {
      does: (connection) => send(connection, "<html>Please log in</html>"),
      says: /refused the manifest: not JSON/,
      tries: 1,
    },
    "is not to be had": {
      does: (connection) => send(connection, "no", { status: 403 }),
      says: /answered 403\n/,
      tries: 1,
    },
  };
  for (const [name, { does, says, tries = 5 }] of Object.entries(cases)) {
    test.concurrent(name, async () => {
      using device = new Device();
      await using server = await doubleThat(MANIFEST, does);
      const { code, stdout, stderr, memory } = await device.process(patience(says), server, {
        isMeasured: true,
      });
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(stderr).toMatch(says);
      expect(server.asked.map(({ path }) => path)).toEqual(Array<string>(tries).fill(MANIFEST));
      expect(memory).toBeLessThan(512 * 1024 * 1024);
      await device.expectUnharmed(server);
    });
  }

  test.concurrent("is to be had later is asked for later", async () => {
    using device = new Device();
    let isLater = false;
    await using server = await Double.start((asked, connection) => {
      if (asked.before > 0 || asked.path !== MANIFEST) {
        expect(isLater).toBe(true);
        return offering(OFFER, () => server.url)(asked, connection);
      }
      // Begun before the answer goes, so that it ends before the two seconds do.
      setTimeout(() => (isLater = true), 1900);
      send(connection, "busy", { status: 503, headers: { "Retry-After": 2 } });
    });
    const { code, stderr } = await device.client([], server);
    expect(code).toBe(0);
    expect(stderr).toContain("answered 503; trying again in 2.0 s");
    expect(isLater).toBe(true);
  });

  test.concurrent("nobody is there to give: exit code 1 after five tries", async () => {
    using device = new Device();
    // Where nothing listens; a port that was just left free may be taken by another test.
    const { code, stderr } = await device.client([], { url: "http://127.0.0.1:1" });
    expect(code).toBe(1);
    expect(stderr).toContain("cannot reach http://127.0.0.1:1");
    expect(stderr.match(/trying again in/g)).toHaveLength(4);
    expect(stderr).toContain("gave up after 5 tries");
    expect(device.tree()).toEqual(asTree(BEFORE));
  });
});

describe("redirects", () => {
  const redirect = (connection: Socket, location: string): void =>
    send(connection, "", { status: 302, headers: { Location: location } });

  /** Sends whoever asks for anything on, so many times. */
  async function redirecting(times: number): Promise<Double> {
    const starting = Double.start(async (asked, connection) => {
      const { url } = await starting;
      const done = Number(/^\/r(\d+)\//.exec(asked.path)?.[1] ?? 0);
      const path = asked.path.replace(/^\/r\d+/, "");
      const query = asked.target.split("?")[1];
      if (done < times) {
        return redirect(connection, `/r${done + 1}${path}${query ? `?${query}` : ""}`);
      }
      return offering(OFFER, () => url)({ ...asked, path }, connection);
    });
    return starting;
  }

  test.concurrent("within the server are followed, five of them", async () => {
    using device = new Device();
    await using server = await redirecting(5);
    const { code, stderr } = await device.client([], server);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    expect(device.tree()).toEqual(AFTER);
  });

  test.concurrent("are not followed a sixth time", async () => {
    using device = new Device();
    await using server = await redirecting(6);
    const { code, stderr } = await device.client([], server);
    expect(code).toBe(1);
    expect(stderr).toContain("redirects more than 5 times");
    expect(server.asked).toHaveLength(6);
    await device.expectUnharmed(server);
  });

  test.concurrent("to itself for ever end", async () => {
    using device = new Device();
    await using server = await doubleThat(BIG, (connection) => redirect(connection, BIG));
    const { code, stderr } = await device.client([], server);
    expect(code).toBe(1);
    expect(stderr).toContain("redirects more than 5 times");
    await device.expectUnharmed(server);
  });

  for (const what of [MANIFEST, BIG]) {
    test.concurrent(`to elsewhere are not followed (${what})`, async () => {
      await using other = await Double.start((_, connection) => send(connection, CONTENT));
      const { port } = other;
      for (const location of [
        `${other.url}/evil`,
        `//127.0.0.1:${port}/evil`,
        `http://localhost:${port}/evil`,
        "file:///etc/passwd",
        "data:,evil",
        "",
      ]) {
        using device = new Device();
        await using server = await doubleThat(what, (connection) => redirect(connection, location));
        const { code, stderr } = await device.client([], server);
        expect({ location, code }).toEqual({ location, code: 1 });
        // Without a place to go to it is the place itself, time and again.
        expect(stderr).toMatch(location === "" ? /redirects/ : /redirects to another server/);
        await device.expectUnharmed(server);
      }
      expect(other.asked).toEqual([]);
    });
  }
});

/** What is said of every update, and of a release that the server does not have. */
const USUAL = /^(fetched|received|ota.ts: the server does not have|.*: it is kept as) .*\n/gm;

async function expectSuccess(device: Device, server: { url: string }): Promise<void> {
  const { code, stderr } = await device.client([], server);
  expect({ code, stderr: stderr.replace(USUAL, "") }).toEqual({
    code: 0,
    stderr: "",
  });
}

describe("a device that was killed while it fetched", () => {
  /** Kills a client when it has received half of the content. */
  async function killedHalfWay(device: Device, headers: Record<string, string>): Promise<void> {
    await using server = await doubleThat(BIG, (connection) => {
      connection.write(head(200, { ...whole, ...headers }));
      connection.write(half);
    });
    await using tool = new Tool(device.args([], server));
    await eventually("half of it is here, and all else", () => {
      const { length } = half;
      const sizes = device.staged();
      return sizes[`${sha256(CONTENT)}.part`] === length && sizes[sha256("small")] === 5;
    });
    tool.kill("SIGKILL");
    await tool.ended;
    expect(device.tree()).toEqual(asTree(BEFORE));
  }

  const TAG = `"${sha256(CONTENT).slice(0, 16)}"`;

  test.concurrent("fetches only what is missing", async () => {
    using device = new Device();
    await killedHalfWay(device, { ETag: TAG });
    await using server = await Double.start((asked, connection) =>
      offering(OFFER, () => server.url)(asked, connection),
    );
    await expectSuccess(device, server);
    expect(device.tree()).toEqual(AFTER);
    // Of what was whole nothing is asked for.
    expect(server.asked.map(({ path }) => path)).toEqual([MANIFEST, BIG]);
    const { headers } = server.asked[1]!;
    expect(headers.get("range")).toBe("bytes=100000-");
    expect(headers.get("if-range")).toBe(TAG);
  });

  test.concurrent("and from the real server, too: its log has the bytes", async () => {
    using device = new Device();
    layTree(device.at("releases/1.0.1"), OFFER.put);
    await using server = await Served.start(device.at("releases"));
    const { headers } = await fetch(`${server.url}/1.0.1/flash/main.py`, { method: "HEAD" });
    await killedHalfWay(device, { ETag: headers.get("etag")! });
    server.lines.length = 0;
    await expectSuccess(device, server);
    expect(device.tree()).toEqual(AFTER);
    const logged = () => server.requests.filter(({ path }) => path !== MANIFEST);
    await eventually("it is logged", () => logged().length > 0);
    expect(logged().map(({ path, status, bytes }) => [path, status, bytes])).toEqual([
      ["/1.0.1/flash/main.py", 206, 100_000],
    ]);
  });

  test.concurrent("starts over when it has another tag", async () => {
    using device = new Device();
    await killedHalfWay(device, { ETag: '"of long ago"' });
    await using server = await Double.start((asked, connection) =>
      offering(OFFER, () => server.url)(asked, connection),
    );
    await expectSuccess(device, server);
    expect(device.tree()).toEqual(AFTER);
    expect(server.askedFor(BIG)).toHaveLength(1);
    expect(server.askedFor(BIG)[0]!.headers.get("if-range")).toBe('"of long ago"');
  });

  for (const [kind, headers] of Object.entries<Record<string, string>>({
    none: {},
    weak: { ETag: `W/${TAG}` },
  })) {
    test.concurrent(`starts over when its tag was ${kind}`, async () => {
      using device = new Device();
      await killedHalfWay(device, headers);
      await using server = await Double.start((asked, connection) =>
        offering(OFFER, () => server.url)(asked, connection),
      );
      await expectSuccess(device, server);
      expect(device.tree()).toEqual(AFTER);
      expect(server.askedFor(BIG).map(({ headers: sent }) => sent.get("range"))).toEqual([null]);
    });
  }

  test.concurrent("starts over when what is sent does not continue what it has", async () => {
    for (const start of [100_000, 50_000]) {
      using device = new Device();
      await killedHalfWay(device, { ETag: TAG });
      await using server = await doubleThat(BIG, (connection, asked) => {
        if (!asked.headers.has("range")) return sendContent(asked, connection, CONTENT);
        // A server that does not know If-Range, or not Range.
        const rest = noise(CONTENT.length - start, 4);
        const range = `bytes ${start}-${CONTENT.length - 1}/${CONTENT.length}`;
        send(connection, rest, { status: 206, headers: { ETag: TAG, "Content-Range": range } });
      });
      const { code, stderr } = await device.client([], server);
      expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
      expect(device.tree()).toEqual(AFTER);
      expect(server.askedFor(BIG)).toHaveLength(2);
    }
  });

  const text = "text ".repeat(2000);
  for (const [kind, plain, bytes, coding] of [
    ["coded", false, gzipSync(text), { "Content-Encoding": "gzip" }],
    ["of a size that nobody told", true, Buffer.from(text), {}],
  ] as const) {
    test.concurrent(`when all was here but the end of it (${kind})`, async () => {
      using device = new Device();
      const offer = { version: "1.0.1", put: { "flash/main.py": text }, plain };
      await using server = await Double.start((asked, connection) => {
        if (asked.path === MANIFEST) return offering(offer, () => server.url)(asked, connection);
        // All of the content, in chunks, but no last chunk.
        const tag = `"${sha256(bytes).slice(0, 16)}"`;
        connection.write(head(200, { ...chunked, ETag: tag, ...coding }));
        connection.write(chunk(bytes));
      });
      {
        await using tool = new Tool(device.args([], server));
        await eventually("all of it is here", () => {
          return Object.values(device.staged()).includes(bytes.length);
        });
        tool.kill("SIGKILL");
        await tool.ended;
      }
      server.reply = (asked, connection) => {
        if (asked.path === MANIFEST) return offering(offer, () => server.url)(asked, connection);
        sendContent(asked, connection, bytes, coding);
      };
      const { code, stderr } = await device.client([], server);
      expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
      expect(readFileSync(device.at("device/flash/main.py"), "utf8")).toBe(text);
    });
  }
});

/** A transport as somebody would write it for a bus, a modem, a test: what is sent is in a map. */
class MapOTA extends OTA {
  connected = 0;
  readonly asked: string[] = [];
  readonly contents = new Map<string, Uint8Array>();

  override async connect(): Promise<void> {
    this.connected++;
  }

  override async getData(path: string, { offset = 0 }: TransferRequest): Promise<TransferResponse> {
    const { pathname, searchParams } = new URL(path, "map://");
    const headers = new Headers();
    if (searchParams.has("list")) {
      return { body: new Blob(["null"]).stream(), offset: 0, encoding: "identity", headers };
    }
    this.asked.push(`${pathname} ${offset}`);
    const content = this.contents.get(pathname);
    if (!content) throw new TransferError(`there is no ${pathname}`, false);
    const body = new Blob([content.slice(offset)]).stream();
    return { body, offset, etag: '"1"', encoding: "identity", headers };
  }
}

/** One that reports. What is done with it is in `steps`. */
class TellingOTA extends MapOTA {
  readonly steps: string[] = [];
  readonly notes: string[] = [];
  /** What becomes of reports, if it is not well. */
  telling: (signal: AbortSignal) => void | Promise<void> = () => {};
  /** The step that fails. */
  failing = "";

  constructor(options: OTAOptions) {
    super({
      ...options,
      report: (event) => void (event.kind === "note" && this.notes.push(event.text)),
    });
  }

  #step(name: string): void {
    this.steps.push(name);
    if (this.steps.join(" ") === this.failing) throw new TransferError(`no ${name}`, true);
  }

  override async connect(): Promise<void> {
    this.#step("connect");
  }

  override async disconnect(): Promise<void> {
    this.#step("disconnect");
  }

  override async report(path: string, signal: AbortSignal): Promise<void> {
    const { pathname, searchParams } = new URL(path, "map://");
    this.#step(`${pathname} ${searchParams.get("current_ver")}`);
    await this.telling(signal);
  }
}

/** One that knows how to fail. */
class ShakyOTA extends MapOTA {
  override async getData(path: string, want: TransferRequest): Promise<TransferResponse> {
    const data = await super.getData(path, want);
    if (this.asked.length % 2 === 1 || path.includes("list=")) return data;
    if (this.asked.length % 4 === 0) throw new TransferError("the line is bad", true);
    // Half of it, and an error of some library.
    const bytes = await new Response(data.body).bytes();
    let isFirst = true;
    const body = new ReadableStream<Uint8Array>({
      pull(controller) {
        if (isFirst) controller.enqueue(bytes.subarray(0, bytes.length / 2));
        else controller.error(new Error("hung up"));
        isFirst = false;
      },
    });
    return { ...data, body };
  }
}

/** One whose content comes a byte at a time. */
class DrippingOTA extends MapOTA {
  override async getData(path: string, want: TransferRequest): Promise<TransferResponse> {
    const data = await super.getData(path, want);
    if (path.startsWith(MANIFEST)) return data;
    const bytes = [...(await new Response(data.body).bytes())];
    const body = new ReadableStream<Uint8Array>({
      async pull(controller) {
        await Bun.sleep(10);
        const byte = bytes.shift();
        if (byte === undefined) controller.close();
        else controller.enqueue(Uint8Array.of(byte));
      },
    });
    return { ...data, body };
  }
}

describe("a transport of one's own", () => {
  function fill(transport: MapOTA, offer: Offer): void {
    const manifest = JSON.stringify(manifestOf(offer, "http://any.where"));
    transport.contents.set(MANIFEST, Buffer.from(manifest));
    for (const [path, content] of Object.entries(offer.put)) {
      transport.contents.set(`/content/${path}`, Buffer.from(content));
    }
  }

  test.concurrent("needs two methods, and has everything else", async () => {
    using device = new Device();
    const transport = new MapOTA({ root: device.root });
    fill(transport, OFFER);
    expect(await transport.update()).toMatchObject({
      ...{ result: "updated", from: "1.0.0", to: "1.0.1" },
    });
    expect(device.tree()).toEqual(AFTER);
    expect(transport.connected).toBe(1);
    transport.contents.set(MANIFEST, Buffer.from("null"));
    expect(await transport.update()).toMatchObject({ result: "up to date", to: "1.0.1" });
    expect(transport.asked.toSorted()).toEqual([
      ...[
        "/content/flash/main.py 0",
        "/content/sd/small 0",
        "/manifest.json 0",
        "/manifest.json 0",
      ],
    ]);
  });

  const STEPS = ["connect", "disconnect", "connect", "/manifest.json 1.0.1", "disconnect"];
  const UNSURE = "the server may not know yet what this device is on: ";

  test.concurrent("may report, on a connection of its own after restart and check", async () => {
    using device = new Device();
    const transport: TellingOTA = new TellingOTA({
      root: device.root,
      ...{ restart: "restart", check: { command: "check", timeout: 9 } },
      run: async (command) => {
        transport.steps.push(command);
        return 0;
      },
    });
    fill(transport, OFFER);
    expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
    expect(transport.steps).toEqual([
      ...["connect", "disconnect", "restart", "check"],
      ...["connect", "/manifest.json 1.0.1", "disconnect"],
    ]);
    transport.contents.set(MANIFEST, Buffer.from("null"));
    transport.steps.length = 0;
    expect(await transport.update()).toMatchObject({ result: "up to date" });
    expect(transport.steps).toEqual(["connect", "disconnect"]);
    expect(transport.notes.filter((text) => text.startsWith(UNSURE))).toEqual([]);
  });

  test.concurrent(
    "may fail at any step of a report: the update stands, and a note says so",
    async () => {
      for (const last of [2, 3, 4]) {
        using device = new Device();
        const transport = new TellingOTA({ root: device.root });
        fill(transport, OFFER);
        transport.failing = STEPS.slice(0, last + 1).join(" ");
        expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
        expect(transport.notes.at(-1)).toBe(`${UNSURE}no ${STEPS[last]}`);
        // What was connected is disconnected.
        expect(transport.steps).toEqual(last === 2 ? STEPS.slice(0, 3) : STEPS);
        expect(device.tree()).toEqual(AFTER);
      }
    },
  );

  test.concurrent("may have a report that is wrong, or never ends: it is left alone", async () => {
    for (const [telling, why] of [
      [() => Promise.reject(new RangeError("a mistake in it")), "a mistake in it"],
      [() => new Promise<void>(() => {}), "nothing came for 1 s"],
    ] as const) {
      using device = new Device();
      const transport = new TellingOTA({ root: device.root, timeout: 1 });
      fill(transport, OFFER);
      let told: AbortSignal | undefined;
      transport.telling = (signal) => {
        told = signal;
        return telling();
      };
      expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
      expect(transport.notes.at(-1)).toBe(UNSURE + why);
      expect(transport.steps).toEqual(STEPS);
      expect(told?.aborted).toBe(true);
    }
  });

  test.concurrent("whose report is interrupted has updated", async () => {
    using device = new Device();
    const interrupt = new AbortController();
    const transport = new TellingOTA({ root: device.root, signal: interrupt.signal });
    fill(transport, OFFER);
    transport.telling = async (signal) => {
      const { promise, reject } = Promise.withResolvers<void>();
      signal.addEventListener("abort", () => reject(signal.reason));
      interrupt.abort(new Error("the device is as it was"));
      await promise;
    };
    expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
    expect(transport.notes.at(-1)).toBe(`${UNSURE}interrupted`);
    expect(transport.steps).toEqual(STEPS);
  });

  test.concurrent("is tried again where it fails, and goes on where it stopped", async () => {
    using device = new Device();
    const transport = new ShakyOTA({ root: device.root, jobs: 1 });
    fill(transport, { version: "1.0.1", put: { "flash/main.py": CONTENT } });
    expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
    expect(readFileSync(device.at("device/flash/main.py"))).toEqual(CONTENT);
    expect(transport.asked).toEqual([
      ...["/manifest.json 0", "/content/flash/main.py 0", "/content/flash/main.py 100000"],
    ]);
  });

  test.concurrent("that has not what was promised leaves the device as it was", async () => {
    using device = new Device();
    const transport = new MapOTA({ root: device.root });
    fill(transport, OFFER);
    transport.contents.delete(BIG);
    await expect(transport.update()).rejects.toThrow("there is no /content/flash/main.py");
    expect(device.tree()).toEqual(asTree(BEFORE));
    fill(transport, OFFER);
    expect(await transport.update()).toMatchObject({ result: "updated" });
    expect(device.tree()).toEqual(AFTER);
  });

  test.concurrent("is verified like any other", async () => {
    using device = new Device();
    const transport = new MapOTA({ root: device.root });
    fill(transport, OFFER);
    transport.contents.set(BIG, noise(CONTENT.length, 5));
    await expect(transport.update()).rejects.toThrow("does not verify");
    expect(device.tree()).toEqual(asTree(BEFORE));
  });

  test.concurrent("that brings a few bytes now and then has stalled", async () => {
    for (const [slowest, isStalled] of [
      [{ rate: 1000, seconds: 0.1 }, true],
      [{ rate: 10, seconds: 0.1 }, false],
      [undefined, false],
    ] as const) {
      using device = new Device();
      const transport = new DrippingOTA({ root: device.root, ...(slowest && { slowest }) });
      fill(transport, {
        version: "1.0.1",
        put: { "flash/main.py": "drip".repeat(isStalled ? 500 : 10) },
      });
      if (!isStalled) {
        expect(await transport.update()).toMatchObject({ result: "updated", to: "1.0.1" });
        continue;
      }
      await expect(transport.update()).rejects.toThrow(/slow.*gave up after 5 tries/);
      expect(device.tree()).toEqual(asTree(BEFORE));
    }
  });
});

describe("--from, a directory instead of a server", () => {
  test.concurrent("updates a device", async () => {
    using device = new Device();
    layTree(device.at("stick/1.0.0"), { "flash/main.py": "one" });
    layTree(device.at("stick/1.0.1"), OFFER.put);
    const args = ["client", "--root", device.root, "--from", device.at("stick")];
    const { code, last } = await run(args);
    expect({ code, last }).toEqual({ code: 0, last: "updated 1.0.0 -> 1.0.1" });
    expect(device.tree()).toEqual(AFTER);
    expect((await run(args)).last).toBe("up to date 1.0.1");
  });

  test.concurrent("says so when the directory is not there", async () => {
    using device = new Device();
    const args = ["client", "--root", device.root, "--from", device.at("nowhere")];
    const { code, stdout, stderr } = await run(args);
    expect([1, 2]).toContain(code!);
    expect(stdout).toBe("");
    expect(stderr).toContain(device.at("nowhere"));
    expect(device.tree()).toEqual(asTree(BEFORE));
  });
});
