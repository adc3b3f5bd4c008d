/**
 * The fleet over HTTP: who gets in, what is answered, and what strangers can do. Through sockets, to
 * a server in this process. Set SEED to repeat a run.
 */

import { Database } from "bun:sqlite";
import {
  afterAll,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  setSystemTime,
  test,
} from "bun:test";
import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { createServer, type Server as TCPServer, type Socket } from "node:net";
import {
  serve,
  type DeviceDetails,
  type FleetDevice,
  type FleetServer,
  type ServeOptions,
} from "../ota.ts";
import { certify } from "./helpers/pki.ts";
import { Postgres } from "./helpers/postgres.ts";
import { Random, seeded } from "./helpers/random.ts";
import { parseResponse, rawRequest } from "./helpers/raw.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { run, Serving, until } from "./helpers/tool.ts";

const SEED = seeded("fleet-api");
setDefaultTimeout(600_000);

const TOKEN = "a-token-of-24-characters";
const BEARER = { Authorization: `Bearer ${TOKEN}` };
const TREE: Tree = {
  "1.0.0/flash/main.py": "one\n",
  "1.0.1/flash/main.py": "two\n",
  "1.0.1/flash/lib/a.py": "a",
  "firmware_1.0.1.bin": Buffer.alloc(3000, 0x80),
  "firmware_1.0.2.bin": Buffer.alloc(2000, 0x80),
};

interface Asked {
  method?: string;
  headers?: Record<string, string>;
  body?: string | Uint8Array;
  /** Instead of a `Content-Length`: the body in pieces of so many bytes. */
  pieces?: number;
}

interface Answered {
  status: number;
  headers: Headers;
  text: string;
  /** Of JSON. */
  json: () => Json;
}

/** What tests look into; what is not there is `undefined`. */
type Json = { [name: string]: Json } & Json[] & string;

/** A server, its root and its fleet. */
class Fleeted extends Temp implements AsyncDisposable {
  server!: FleetServer;
  readonly log: string[] = [];
  readonly warnings: string[] = [];

  static async start(options: ServeOptions = {}, tree: Tree = TREE): Promise<Fleeted> {
    const one = new Fleeted();
    layTree(one.at("root"), tree);
    try {
      await one.serve(options);
    } catch (error) {
      one[Symbol.dispose]();
      throw error;
    }
    return one;
  }

  /** Serves it, in the place of the server before. */
  async serve(options: ServeOptions = {}): Promise<void> {
    await this.server?.[Symbol.asyncDispose]();
    this.server = await serve({
      ...{ root: this.at("root"), port: 0, host: "127.0.0.1", quiet: 0, adminToken: TOKEN },
      ...{ fleet: this.at("fleet.db"), log: (line: string) => void this.log.push(line) },
      warn: (line) => void this.warnings.push(line),
      ...options,
    });
  }

  get url(): string {
    return this.server.url.origin;
  }

  /** One request as it stands; with the admin token, unless headers are given. */
  async ask(target: string, asked: Asked = {}): Promise<Answered> {
    return await send(this.url, target, asked);
  }

  /** A device asks for a manifest, and the store knows. */
  async visit(...queries: Record<string, string>[]): Promise<void> {
    for (let at = 0; at < queries.length; at += 50) {
      const some = queries.slice(at, at + 50).map(async (query) => {
        const parameters = Object.entries({ current_ver: "1.0.0", ...query });
        // Not as forms have it: to devices, a plus is a plus.
        const search = parameters.map(([name, value]) => `${name}=${encodeURIComponent(value)}`);
        const response = await fetch(`${this.url}/manifest.json?${search.join("&")}`);
        expect(response.status).toBe(200);
        await response.bytes();
      });
      await Promise.all(some);
    }
    await this.server.fleet!.flush();
  }

  /** The ids on a page. */
  async list(search: string): Promise<string[]> {
    const { status, json } = await this.ask(`/-/api/devices?${search}`);
    expect([search, status]).toEqual([search, 200]);
    return json()["devices"]!.map(({ id }) => id as string);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server[Symbol.asyncDispose]();
    this[Symbol.dispose]();
  }
}

async function send(url: string, target: string, asked: Asked = {}): Promise<Answered> {
  const { method = "GET", headers = BEARER, body, pieces } = asked;
  const bytes = Buffer.from(body ?? "");
  const fields = { Host: new URL(url).host, Connection: "close", ...headers } as Record<
    string,
    string
  >;
  if (pieces !== undefined) fields["Transfer-Encoding"] = "chunked";
  else if (body !== undefined) fields["Content-Length"] = `${bytes.length}`;
  const lines = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`);
  const parts: Uint8Array[] = [
    Buffer.from(`${method} ${target} HTTP/1.1\r\n${lines.join("")}\r\n`),
  ];
  if (pieces === undefined) parts.push(bytes);
  else {
    for (let at = 0; at < bytes.length; at += pieces) {
      const piece = bytes.subarray(at, at + pieces);
      parts.push(Buffer.from(`${piece.length.toString(16)}\r\n`), piece, Buffer.from("\r\n"));
    }
    parts.push(Buffer.from("0\r\n\r\n"));
  }
  const raw = await rawRequest(url, Buffer.concat(parts));
  const { status, headers: found, body: content } = parseResponse(raw.bytes);
  const text = Buffer.from(content).toString();
  return { status, headers: found, text, json: () => JSON.parse(text) as Json };
}

/** The cookie that the link gives. */
async function cookieOf({ url }: { url: string }, headers = {}, token = TOKEN): Promise<string> {
  const { status, headers: found } = await send(url, `/-/?token=${token}`, { headers });
  expect(status).toBe(303);
  return found.get("set-cookie")!.split(";")[0]!;
}

const DEVICE = "/-/api/devices/a";
const API = ["/-/api/fleet", "/-/api/devices", DEVICE] as const;
const json = (value: unknown) => ({ method: "POST", body: JSON.stringify(value) });

/** What can be asked of rollouts: the first two only read. */
const ASKED_OF_ROLLOUTS: [target: string, asked: Asked][] = [
  ["/-/api/rollouts", {}],
  ["/-/api/rollouts", json({ version: "1.0.1", dry_run: true })],
  ["/-/api/rollouts", json({ version: "1.0.1" })],
  ["/-/api/rollouts/1.0.9/abort", { method: "POST" }],
];

describe("who gets in", () => {
  let fleet: Fleeted;
  beforeAll(async () => {
    fleet = await Fleeted.start({ token: "of-the-devices" });
    await fetch(`${fleet.url}/manifest.json?devid=a&current_ver=1.0.0&token=of-the-devices`);
    await fleet.server.fleet!.flush();
  });
  afterAll(() => fleet[Symbol.asyncDispose]());

  test("nobody without a token, to anything below /-/ that there is or is not", async () => {
    const paths = [
      ...API,
      "/-/",
      "/-/api",
      "/-/api/",
      "/-/x",
      "/-/health/",
      "/-/metrics/x",
      "/-//",
    ];
    for (const path of [...paths, "/-/api/devices/?id=a", "/-/page.htm", "/-/health%20"]) {
      for (const method of ["GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS"]) {
        const { status, headers, text } = await fleet.ask(path, { method, headers: {} });
        expect([method, path, status]).toEqual([method, path, 401]);
        expect(headers.get("www-authenticate")).toBe("Bearer");
        if (method === "GET") expect(text).toContain("needs the admin token");
      }
    }
  });

  test("not with what is almost the token, nor with the devices'", async () => {
    const wrong = ["of-the-devices", TOKEN.slice(1), `${TOKEN}x`, TOKEN.toUpperCase(), "\u00e9"];
    const attempts: Asked[] = [
      ...wrong.map((token) => ({ headers: { Authorization: `Bearer ${token}` } })),
      { headers: { Authorization: `Basic ${btoa(`admin:${TOKEN}`)}` } },
      { headers: { Authorization: TOKEN } },
      { headers: { Cookie: `token=${TOKEN}; ota=${TOKEN}` } },
    ];
    for (const attempt of attempts) {
      const { status } = await fleet.ask("/-/api/fleet", attempt);
      expect([attempt, status]).toEqual([attempt, 401]);
    }
    for (const token of ["of-the-devices", "", "x"]) {
      const { status, headers } = await fleet.ask(`/-/?token=${token}`, { headers: {} });
      expect([status, headers.get("set-cookie")]).toEqual([401, null]);
    }
    // Addresses end up in logs: only the link has the token there.
    for (const path of API) {
      expect((await fleet.ask(`${path}?token=${TOKEN}`, { headers: {} })).status).toBe(401);
    }
    expect((await fleet.ask(`/-/?token=${TOKEN}`, { headers: {}, method: "POST" })).status).toBe(
      401,
    );
  });

  test("with the token, which opens nothing else", async () => {
    for (const path of [...API, "/-/"]) {
      expect([path, (await fleet.ask(path)).status]).toEqual([path, 200]);
      const lower = await fleet.ask(path, { headers: { authorization: `bearer  ${TOKEN}` } });
      expect([path, lower.status]).toEqual([path, 200]);
    }
    for (const path of ["/-/health", "/-/metrics", "/manifest.json", "/1.0.0/flash/main.py"]) {
      expect([path, (await fleet.ask(path)).status]).toEqual([path, 401]);
      const { status } = await fleet.ask(`${path}?token=of-the-devices`, { headers: {} });
      expect([path, status]).toEqual([path, 200]);
    }
  });

  test("a browser by the link: a cookie, and no token in the address", async () => {
    for (const method of ["GET", "HEAD"]) {
      const { status, headers } = await fleet.ask(`/-/?token=${TOKEN}`, { headers: {}, method });
      expect([status, headers.get("location")]).toEqual([303, "./"]);
      const [value, ...attributes] = headers.get("set-cookie")!.split("; ");
      expect(attributes).toEqual(["Max-Age=2592000", "HttpOnly", "SameSite=Strict"]);
      expect(value).not.toContain(TOKEN);
      expect(headers.get("referrer-policy")).toBe("no-referrer");
      for (const path of [...API, "/-/"]) {
        const cookie = { headers: { Cookie: `theme=dark; ${value}; x=y` } };
        expect([path, (await fleet.ask(path, cookie)).status]).toEqual([path, 200]);
      }
    }
  });

  test("the cookie is good for thirty days, for all servers of the fleet", async () => {
    await using one = await Fleeted.start({ adminToken: undefined });
    const made = one.server.admin!.made!;
    const Cookie = await cookieOf(one, {}, made);
    const statusOf = async (cookie: string) =>
      (await one.ask("/-/api/fleet", { headers: { Cookie: cookie } })).status;
    expect(await statusOf(Cookie)).toBe(200);
    const [name = "", value = ""] = Cookie.split("=");
    const [expires, proof = ""] = value.split(".");
    const forged = [`${Number(expires) + 1}.${proof}`, `${expires}.${proof.slice(1)}`, `.${proof}`];
    for (const other of [...forged, "", `${expires}.`, `${expires}`, made]) {
      expect([other, await statusOf(`${name}=${other}`)]).toEqual([other, 401]);
      // The last of several is no better than the first.
      expect(await statusOf(`${name}=${other}; ${name}=${other}`)).toBe(401);
    }
    await one.serve({ adminToken: undefined });
    expect(one.server.admin!.made).toBe(made);
    expect(await statusOf(Cookie)).toBe(200);
    try {
      setSystemTime(Date.now() + (30 * 86_400 - 60) * 1000);
      expect(await statusOf(Cookie)).toBe(200);
      setSystemTime(Date.now() + 120_000);
      expect(await statusOf(Cookie)).toBe(401);
    } finally {
      setSystemTime();
    }
    // With another token, the name is another one: a browser sends it to all ports of a host.
    await one.serve({ adminToken: TOKEN });
    expect(await statusOf(Cookie)).toBe(401);
    expect((await cookieOf(one)).split("=")[0]).not.toBe(name);
  });

  test("a change: with the token from anywhere, by cookie only from a page of this server", async () => {
    const Cookie = await cookieOf(fleet);
    const host = new URL(fleet.url).host;
    const origins: [origin: string | undefined, isSame: boolean][] = [
      [undefined, false],
      ["null", false],
      ["", false],
      [fleet.url, true],
      [`https://${host}`, false],
      ["http://127.0.0.1", false],
      [`http://127.0.0.1:${Number(fleet.server.url.port) + 1}`, false],
      [`http://localhost:${fleet.server.url.port}`, false],
      ["http://evil.example", false],
      [`${fleet.url}.evil.example`, false],
      [`${fleet.url}/`, false],
    ];
    for (const [origin, isSame] of origins) {
      const from: Record<string, string> = origin === undefined ? {} : { Origin: origin };
      const changes = [{ ...json({ name: "x" }) }, { method: "DELETE" }];
      for (const [i, change] of changes.entries()) {
        const path = i === 0 ? DEVICE : "/-/api/devices/none";
        const at = (headers: Record<string, string>) => fleet.ask(path, { ...change, headers });
        const done = i === 0 ? 200 : 404;
        const byToken = await at({ ...BEARER, ...from });
        expect([origin, change.method, byToken.status]).toEqual([origin, change.method, done]);
        const byCookie = await at({ Cookie, ...from });
        expect([origin, byCookie.status]).toEqual([origin, isSame ? done : 403]);
        if (!isSame) expect(byCookie.json()["error"]).toContain("--trust-proxy");
        expect((await at(from)).status).toBe(401);
      }
      // Reading needs none.
      const read = await fleet.ask(DEVICE, { headers: { Cookie, ...from } });
      expect([origin, read.status]).toEqual([origin, 200]);
    }
  });

  test("nothing that changes anything answers to a GET", async () => {
    const before = (await fleet.ask(DEVICE)).text;
    for (const search of ["name=x", "method=DELETE", "_method=POST", 'labels={"a":"b"}']) {
      expect((await fleet.ask(`${DEVICE}?${search}`)).status).toBe(400);
    }
    const override = { ...BEARER, "X-HTTP-Method-Override": "DELETE" };
    expect((await fleet.ask(DEVICE, { headers: override })).text).toBe(before);
    const body = await fleet.ask(DEVICE, { body: '{"name":"x"}' });
    expect(body.status).toBe(413);
    expect((await fleet.ask(DEVICE)).text).toBe(before);
  });

  test("--no-fleet: as if there were no such thing", async () => {
    await using none = await Fleeted.start({ fleet: false });
    expect(none.server.admin).toBeUndefined();
    for (const path of [...API, "/-/", `/-/?token=${TOKEN}`, "/-/x"]) {
      for (const headers of [BEARER, {}]) {
        expect([path, (await none.ask(path, { headers })).status]).toEqual([path, 404]);
      }
      expect((await none.ask(path, json({}))).status).toBe(405);
    }
    expect((await none.ask("/-/health")).status).toBe(200);
  });
});

describe("behind a proxy", () => {
  /** Whether a change by cookie is accepted, and whether the cookie is for HTTPS alone. */
  async function accepts(one: Fleeted, headers: Record<string, string>, Origin: string) {
    const link = await one.ask(`/-/?token=${TOKEN}`, { headers });
    const set = link.headers.get("set-cookie")!;
    const Cookie = set.split(";")[0]!;
    const change = { method: "DELETE", headers: { ...headers, Cookie, Origin } };
    const { status } = await one.ask("/-/api/devices/none", change);
    expect([403, 404]).toContain(status);
    return [status === 404, set.endsWith("; Secure")];
  }
  const forwarded = { "X-Forwarded-Proto": "https", "X-Forwarded-Host": "ota.example" };

  test("that is not trusted, what it says does not count", async () => {
    await using one = await Fleeted.start();
    expect(await accepts(one, forwarded, "https://ota.example")).toEqual([false, false]);
    expect(await accepts(one, forwarded, one.url)).toEqual([true, false]);
    const host = { ...forwarded, Host: "ota.example" };
    expect(await accepts(one, host, "https://ota.example")).toEqual([false, false]);
  });

  test("that is trusted, the origin is what it says", async () => {
    await using one = await Fleeted.start({ trustProxy: ["127.0.0.1"] });
    expect(await accepts(one, forwarded, "https://ota.example")).toEqual([true, true]);
    expect(await accepts(one, forwarded, "http://ota.example")).toEqual([false, true]);
    expect(await accepts(one, forwarded, one.url)).toEqual([false, true]);
    const passed = { "X-Forwarded-Proto": "https", Host: "ota.example:443" };
    expect(await accepts(one, passed, "https://ota.example")).toEqual([true, true]);
    // The last proxy is the one that is trusted.
    const chain = { "X-Forwarded-Proto": "http, https", "X-Forwarded-Host": "evil, ota.example" };
    expect(await accepts(one, chain, "https://ota.example")).toEqual([true, true]);
    expect(await accepts(one, {}, one.url)).toEqual([true, false]);
    for (const host of ["a b", "a/b", "a@b", "", "?"]) {
      const odd = { "X-Forwarded-Proto": "https", "X-Forwarded-Host": host };
      expect((await accepts(one, odd, `https://${host}`))[0]).toBe(false);
    }
  });

  test("that --url names: it is the origin as well", async () => {
    await using one = await Fleeted.start({ url: "https://ota.example/updates/" });
    const host = { Host: "ota.example" };
    expect(await accepts(one, host, "https://ota.example")).toEqual([true, true]);
    expect(await accepts(one, {}, "https://ota.example")).toEqual([true, false]);
    expect(await accepts(one, {}, one.url)).toEqual([true, false]);
    expect(await accepts(one, host, "https://evil.example")).toEqual([false, true]);
    // Below its path as well; where a cookie is good for is up to the browser.
    for (const path of ["/updates/-/", "/updates/-/api/fleet", "/-/api/fleet"]) {
      expect([path, (await one.ask(path)).status]).toEqual([path, 200]);
      expect((await one.ask(path, { headers: {} })).status).toBe(401);
    }
    const { headers } = await one.ask(`/updates/-/?token=${TOKEN}`);
    expect(headers.get("location")).toBe("./");
    expect(headers.get("set-cookie")).not.toContain("Path");
  });

  test("HTTPS of its own", async () => {
    using temp = new Temp();
    const { ca, cert, key } = certify(temp.path, "IP:127.0.0.1");
    await using one = await Fleeted.start({ tls: { cert, key } });
    const tls = { ca: await Bun.file(ca).text() };
    const link = await fetch(`${one.url}/-/?token=${TOKEN}`, { tls, redirect: "manual" });
    const set = link.headers.get("set-cookie")!;
    expect(set).toEndWith("; HttpOnly; SameSite=Strict; Secure");
    for (const [Origin, status] of [
      [one.url, 404],
      [one.url.replace("https", "http"), 403],
    ] as const) {
      const headers = { Cookie: set.split(";")[0]!, Origin };
      const change = { tls, method: "DELETE", headers };
      expect((await fetch(`${one.url}/-/api/devices/none`, change)).status).toBe(status);
    }
  });
});

describe("wrong tokens", () => {
  const wrong = { headers: { Authorization: "Bearer wrong" } };

  test("cost a second each, and few are looked at in that time", async () => {
    await using one = await Fleeted.start({ trustProxy: ["127.0.0.1"] });
    const Cookie = await cookieOf(one);
    const started = performance.now();
    const times = async (asked: Asked, target = "/-/api/fleet") => {
      const { status } = await one.ask(target, asked);
      return [status, performance.now() - started] as const;
    };
    const flood = Array.from({ length: 30 }, (_, i) => {
      return i % 2 ? times(wrong) : times({ headers: {} }, "/-/?token=wrong");
    });
    // Those that are refused at once are there first.
    const busy = await Promise.any(
      flood.map(async (one) => {
        const [status] = await one;
        if (status !== 429) throw new Error(`${status}`);
      }),
    );
    expect(busy).toBeUndefined();
    expect((await one.ask("/-/api/fleet")).status).toBe(429);
    expect((await one.ask("/-/api/fleet", { headers: { Cookie } })).status).toBe(200);
    expect((await one.ask("/-/api/fleet", { headers: {} })).status).toBe(401);
    const elsewhere = { ...BEARER, "X-Forwarded-For": "10.9.9.9" };
    expect((await one.ask("/-/api/fleet", { headers: elsewhere })).status).toBe(200);
    const ended = await Promise.all(flood);
    const slow = ended.filter(([status]) => status === 401);
    expect([slow.length, ended.length - slow.length]).toEqual([4, 26]);
    for (const [, took] of slow) expect(took).toBeGreaterThan(990);
    expect((await one.ask("/-/api/fleet")).status).toBe(200);
  });

  test("of many addresses: a thousand in a second, and no more is kept in mind", async () => {
    await using one = await Fleeted.start({ trustProxy: ["127.0.0.1"] });
    const Cookie = await cookieOf(one);
    const lines = "GET /-/api/fleet HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer wrong\r\n";
    const hangUp = (i: number) => {
      const text = `${lines}X-Forwarded-For: 10.0.${i >> 8}.${i & 255}\r\n\r\n`;
      return rawRequest(one.url, text, { halfClose: true });
    };
    const statusOf = async (headers: Record<string, string>) =>
      (await one.ask("/-/api/fleet", { headers })).status;
    const statusAfter = async () => {
      await Promise.all(Array.from({ length: 1010 }, (_, i) => hangUp(i)));
      return [await statusOf(BEARER), await statusOf({ Cookie })];
    };
    const [, byCookie] = await until("too many", statusAfter, ([found]) => found === 429, 60);
    expect(byCookie).toBe(200);
    await until(
      "they are over",
      () => statusOf(BEARER),
      (status) => status === 200,
      20,
    );
  });

  test("hanging up does not make it faster", async () => {
    await using one = await Fleeted.start();
    const text = "GET /-/api/fleet HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer wrong\r\n\r\n";
    const statusAfter = async () => {
      const hangUp = () => rawRequest(one.url, text, { halfClose: true });
      for (const { bytes } of await Promise.all([1, 2, 3, 4].map(hangUp))) {
        expect(bytes).toHaveLength(0);
      }
      return (await one.ask("/-/api/fleet")).status;
    };
    await until("four are counted", statusAfter, (status) => status === 429, 60);
    await until(
      "they are over",
      () => one.ask("/-/api/fleet"),
      ({ status }) => status === 200,
      20,
    );
  });
});

describe("answers", () => {
  let fleet: Fleeted;
  beforeAll(async () => {
    fleet = await Fleeted.start({}, { ...TREE, "lopy4/2.0/a": "12345" });
    await fleet.visit(
      { devid: "M-1", current_ver: "1.0.1", model: "Wipy" },
      { devid: "m-2", current_ver: "1.0.0" },
      { devid: "m-3", current_ver: "1.0.0", failed: "1.0.1" },
      { devid: "m-4", current_ver: "2.0", model: "LoPy4" },
      { devid: "100%_sure", current_ver: "0.9" },
      { devid: "__proto__", current_ver: "__proto__", model: "__proto__" },
      { devid: "constructor", current_ver: "toString", model: "hasOwnProperty" },
      { current_ver: "1.0.0" },
    );
    await fleet.ask(
      "/-/api/devices/m-1",
      json({ name: "The Cellar", labels: { site: "Pau", a: "b=c" } }),
    );
    await fleet.ask("/-/api/devices/m-2", json({ labels: { site: "Pau" } }));
  });
  afterAll(() => fleet[Symbol.asyncDispose]());

  test("the whole fleet, and the releases on offer", async () => {
    const { status, json } = await fleet.ask("/-/api/fleet");
    const found = json();
    expect(status).toBe(200);
    expect(found["devices"] as unknown).toBe(8);
    const { versions, states, models, releases } = found as unknown as Record<string, object>;
    expect(Object.entries(versions!).toSorted()).toEqual([
      ...([
        ["0.9", 1],
        ["1.0.0", 3],
        ["1.0.1", 1],
        ["2.0", 1],
        ["__proto__", 1],
      ] as const),
      ["toString", 1],
    ] as [string, number][]);
    expect(Object.values(states!).reduce((a, b) => a + b)).toBe(8);
    expect(Object.keys(states!)).toEqual(["current", "behind", "offered", "silent", "failed"]);
    expect(Object.entries(models!).toSorted()).toEqual([
      ["Wipy", 1],
      ["__proto__", 1],
      ["hasOwnProperty", 1],
      ["lopy4", 1],
      ["none", 4],
    ]);
    expect(releases).toEqual([
      { version: "1.0.0", files: 1, bytes: 4, firmware: null },
      { version: "1.0.1", files: 2, bytes: 3005, firmware: "1.0.1" },
      { version: null, files: 0, bytes: 2000, firmware: "1.0.2" },
      { model: "lopy4", version: "2.0", files: 1, bytes: 5, firmware: null },
    ]);
  });

  test("a device, and what happened to it", async () => {
    const before = Date.now() - 600_000;
    const { json } = await fleet.ask("/-/api/devices/m-1");
    const details = json() as unknown as DeviceDetails;
    const { history, rollouts, first_seen, last_seen, ...rest } = details;
    expect(rollouts).toEqual([]);
    expect(rest as object).toEqual({
      ...{ id: "m-1", name: "The Cellar", model: "Wipy", version: "1.0.1", firmware: null },
      ...{ state: "current", offered: null, failed: null, address: "127.0.0.1" },
      labels: { a: "b=c", site: "Pau" },
    });
    for (const time of [first_seen, last_seen]) {
      expect(time).toBeGreaterThan(before);
      expect(time).toBeLessThanOrEqual(Date.now());
    }
    expect(history as object[]).toEqual([
      { at: first_seen, kind: "first seen", from: null, to: "1.0.1" },
    ]);
    const other = (await fleet.ask("/-/api/devices/m-2")).json();
    expect([other["state"], other["offered"]] as string[]).toEqual(["offered", "1.0.1"]);
    const [, offer] = other["history"]!;
    const at = other["last_seen"]!;
    expect(offer as object).toEqual({ at, kind: "offered", from: "1.0.0", to: "1.0.1" });
    // A page has the same without history, whatever case the id is asked in.
    const [listed] = (await fleet.ask("/-/api/devices?q=m-1")).json()["devices"]!;
    expect(listed as object).toEqual({ ...rest, first_seen, last_seen });
    expect((await fleet.ask("/-/api/devices/M-1")).text).toBe(
      (await fleet.ask("/-/api/devices/m-1")).text,
    );
  });

  test("each parameter, and several at once", async () => {
    const all = await fleet.list("");
    expect(all).toHaveLength(8);
    expect(all).toEqual([...all].sort());
    const cases: Record<string, string[]> = {
      "state=failed": ["m-3"],
      "version=1.0.1": ["m-1"],
      "version=1.00.1": ["m-1"],
      "version=__proto__": ["__proto__"],
      "model=WIPY": ["m-1"],
      "model=lopy4": ["m-4"],
      "label=site=Pau": ["m-1", "m-2"],
      "label=site%3DPau": ["m-1", "m-2"],
      "label=a=b%3Dc": ["m-1"],
      "label=a=b": [],
      "label=site=pau": [],
      "q=cellar": ["m-1"],
      "q=THE+CELLAR": ["m-1"],
      "q=%25_": ["100%_sure"],
      "q=wipy": ["m-1"],
      "q=ip:": ["ip:127.0.0.1"],
      "q='": [],
      "q=%5C": [],
      "q=": all,
      "limit=2": all.slice(0, 2),
      "after=m-2": ["m-3", "m-4"],
      "after=zzz": [],
      "label=site=Pau&version=1.0.0": ["m-2"],
      "state=failed&version=1.0.1": [],
      "q=m-&limit=1&after=m-2&state=failed": ["m-3"],
      "&&q=m-2&": ["m-2"],
    };
    for (const [search, ids] of Object.entries(cases)) {
      expect([search, await fleet.list(search)]).toEqual([search, ids]);
    }
    for (const state of ["current", "behind", "offered", "silent"]) {
      const { json } = await fleet.ask(`/-/api/devices?state=${state}`);
      expect(json()["devices"]!.every((device) => device["state"]! === state)).toBe(true);
    }
  });

  test("a parameter that is wrong: 400, and why", async () => {
    const long = "x".repeat(129);
    const cases: Record<string, RegExp> = {
      "sate=failed": /unknown parameter sate: known are state, .*after/,
      "__proto__=x": /unknown parameter __proto__/,
      token: /unknown parameter token/,
      "state=": /state: one of current, behind/,
      "state=Failed": /state: one of/,
      "state=failed&state=current": /state: once/,
      "limit=0": /limit: a whole number from 1 to 1000/,
      "limit=1001": /limit/,
      "limit=-1": /limit/,
      "limit=1e3": /limit/,
      "limit=1.5": /limit/,
      "limit=": /limit/,
      "limit=99999999999999999999": /limit/,
      "label=site": /KEY=VALUE/,
      "label==x": /KEY=VALUE/,
      "label=site=": /KEY=VALUE/,
      [`label=${long}=x`]: /label: at most 128/,
      [`q=${long}`]: /q: at most 128/,
      [`version=${long}`]: /version: at most 128/,
      "after=%00": /after: .*control/,
      "model=a%0Ab": /model: .*control/,
      "version=%zz": /percent/,
      "q=%ff": /UTF-8/,
    };
    for (const [search, why] of Object.entries(cases)) {
      const { status, json } = await fleet.ask(`/-/api/devices?${search}`);
      expect([search, status]).toEqual([search, 400]);
      expect(json()["error"]).toMatch(why);
    }
    for (const path of ["/-/api/fleet", DEVICE, "/-/"]) {
      expect([path, (await fleet.ask(`${path}?x=1`)).status]).toEqual([path, 400]);
    }
    expect((await fleet.ask("/-/api/devices/?id=a&id=b")).status).toBe(400);
    expect((await fleet.ask("/-/api/devices/")).status).toBe(400);
    expect((await fleet.ask("/-/api/devices/%zz")).status).toBe(400);
    expect((await fleet.ask(`/-/api/devices?q=${"x".repeat(2047)}`)).status).toBe(414);
  });

  test("what there is not: 404; other methods: 405, and which there are", async () => {
    const none = [
      "/-/api",
      "/-/api/",
      "/-/api/fleet/",
      "/-/api/devices/a/b",
      "/-/x",
      "/-/API/fleet",
    ];
    for (const path of none) {
      expect([path, (await fleet.ask(path)).status]).toEqual([path, 404]);
    }
    for (const id of [
      "none",
      "x".repeat(500),
      "%00",
      "%0a",
      "ip%3A10.0.0.9",
      "%F0%9F%98%80",
      "m%2D1x",
    ]) {
      for (const asked of [{}, json({ name: "x" }), { method: "DELETE" }, { method: "HEAD" }]) {
        const { status } = await fleet.ask(`/-/api/devices/${id}`, asked);
        expect([id, asked, status]).toEqual([id, asked, 404]);
      }
    }
    const allowed: Record<string, string> = {
      "/-/": "GET, HEAD",
      "/-/api/fleet": "GET, HEAD",
      "/-/api/devices": "GET, HEAD",
      "/-/api/devices/m-1": "GET, HEAD, POST, DELETE",
    };
    for (const [path, methods] of Object.entries(allowed)) {
      for (const method of ["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE"]) {
        if (methods.includes(method)) continue;
        const { status, headers } = await fleet.ask(path, { method });
        expect([path, method, status, headers.get("allow")]).toEqual([path, method, 405, methods]);
      }
    }
  });

  test("HEAD is GET without the body, and every answer says what it is", async () => {
    const targets = [...API, "/-/api/devices/m-1", "/-/", "/-/api/devices?state=x", "/-/api/none"];
    for (const target of [...targets, "/-/none"]) {
      for (const headers of [BEARER, {}]) {
        const get = await fleet.ask(target, { headers });
        const head = await fleet.ask(target, { headers, method: "HEAD" });
        expect([target, head.status, head.text]).toEqual([target, get.status, ""]);
        const lengthOf = (one: Answered) => one.headers.get("content-length");
        // The page may have changed in between: costs are worked out once somebody looks.
        if (target !== "/-/") expect([target, lengthOf(head)]).toEqual([target, lengthOf(get)]);
        for (const one of [get, head]) {
          const kind = target === "/-/" ? "text/html; charset=utf-8" : "text/plain";
          const type = target.startsWith("/-/api") ? "application/json" : kind;
          expect([target, one.headers.get("content-type")]).toEqual([target, type]);
          expect(one.headers.get("x-content-type-options")).toBe("nosniff");
          expect(one.headers.get("cache-control")).toBe("no-store");
          expect(one.headers.get("access-control-allow-origin")).toBeNull();
        }
        if (target.startsWith("/-/api")) get.json();
      }
    }
    const { text } = await fleet.ask("/-/");
    for (const path of ["/-/api/fleet", "/-/api/devices", "/-/health"])
      expect(text).toContain(path);
  });
});

test("pages of 2,500 devices: each once, in order, whatever the size of a page", async () => {
  await using fleet = await Fleeted.start();
  const ids = Array.from({ length: 2500 }, (_, i) => `d${(i * 7919) % 2500}`);
  await fleet.visit(...ids.map((devid) => ({ devid })));
  const sorted = ids.toSorted();
  for (const [search, size] of [
    ["limit=1000", 1000],
    ["", 100],
    ["limit=7&q=d1", 7],
    ["limit=500&state=offered", 500],
  ] as const) {
    const found: string[] = [];
    for (let after = ""; ;) {
      const target = `/-/api/devices?${search}${after && `&after=${encodeURIComponent(after)}`}`;
      const { devices, next } = (await fleet.ask(target)).json();
      found.push(...devices!.map(({ id }) => id as string));
      if (next === null) break;
      expect(devices).toHaveLength(size);
      expect(next as string).toBe(found.at(-1)!);
      after = next as string;
    }
    const wanted = search.includes("q=") ? sorted.filter((id) => id.includes("d1")) : sorted;
    expect([search, found]).toEqual([search, wanted]);
  }
});

test("ids of all sorts of characters are found, changed and forgotten", async () => {
  await using fleet = await Fleeted.start();
  const random = new Random(SEED);
  const odd = [
    ...[
      ".",
      "..",
      "...",
      "/",
      "//",
      "../..",
      "./",
      "a/../b",
      "%",
      "%2e",
      "%2F",
      "%00",
      "%zz",
      "a%",
    ],
    ...[
      "?",
      "#",
      "?id=x",
      "&",
      "a&b=c",
      "=",
      "+",
      " ",
      "a b",
      "\\",
      "'",
      '"',
      "'; --",
      "`",
      "<img>",
    ],
    ...[
      "$1",
      "?1",
      "{}",
      "[]",
      ":",
      "ip",
      "é",
      "e\u0301",
      "\u00a0",
      "\u200b",
      "\ufeff",
      "日本",
      "😀",
    ],
    ...["__proto__", "constructor", "null", "undefined", "true", "0", "-1", "x".repeat(128)],
    ...["\u{1f600}".repeat(64), "devices", "id", "_", "*", "%25", "~", "@", ";", ",", "|", "^"],
  ];
  const letters = [..."ab/.%?#&=+ \\'\"<>$:;~éß日😀\u2028_*-"];
  for (let i = 0; i < 150; i++) {
    const length = 1 + random.below(12);
    odd.push(Array.from({ length }, () => random.pick(letters)).join(""));
  }
  const ids = [...new Set(odd.map((id) => id.toLowerCase()))];
  await fleet.visit(...ids.map((devid) => ({ devid })));
  const listed = await fleet.list("limit=1000");
  expect(listed.toSorted()).toEqual(ids.toSorted());
  for (const id of ids) {
    // As a browser or a program would write it: neither `.` nor `..` can be in a path.
    const isPart = id !== "." && id !== "..";
    const encoded = encodeURIComponent(id);
    const targets = [
      ...(isPart ? [`/-/api/devices/${encoded}`] : []),
      `/-/api/devices/?id=${encoded}`,
    ];
    for (const target of targets) {
      const found = await fetch(fleet.url + target, { headers: BEARER });
      const { id: same } = (await found.json()) as { id: string };
      expect([id, found.status, same]).toEqual([id, 200, id]);
    }
    const edited = await fleet.ask(
      targets[0]!,
      json({ name: id, labels: { k: id, __proto__x: id } }),
    );
    expect([id, edited.json()["name"] as string]).toEqual([id, id]);
    expect([id, (await fleet.list(`label=k=${encoded}`)).includes(id)]).toEqual([id, true]);
    expect([id, (await fleet.list(`q=${encoded}&limit=1000`)).includes(id)]).toEqual([id, true]);
  }
  for (const id of ids.filter((one) => !one.startsWith("."))) {
    const gone = await fleet.ask(`/-/api/devices/${encodeURIComponent(id)}`, { method: "DELETE" });
    expect([id, gone.status, gone.json()["forgotten"] as string]).toEqual([id, 200, id]);
  }
  expect((await fleet.list("limit=1000")).every((id) => id.startsWith("."))).toBe(true);
});

describe("a change", () => {
  let fleet: Fleeted;
  beforeAll(async () => {
    fleet = await Fleeted.start();
    await fleet.visit({ devid: "a" });
  });
  afterAll(() => fleet[Symbol.asyncDispose]());
  const post = (body: string | Uint8Array, more: Asked = {}) =>
    fleet.ask(DEVICE, { method: "POST", body, ...more });

  test("names and labels, and takes both away; what is not mentioned stays", async () => {
    const change = async (edit: unknown) => {
      const { status, json: found } = await fleet.ask(DEVICE, json(edit));
      expect([edit, status]).toEqual([edit, 200]);
      const { name, labels } = found() as unknown as FleetDevice;
      // What it answers is what is there.
      expect((await fleet.ask(DEVICE)).json() as object).toEqual(found() as object);
      return [name, labels];
    };
    expect(await change({})).toEqual([null, {}]);
    expect(await change({ name: "x", labels: { a: "1", b: "2" } })).toEqual([
      "x",
      { a: "1", b: "2" },
    ]);
    expect(await change({ labels: { a: null, c: "3" } })).toEqual(["x", { b: "2", c: "3" }]);
    expect(await change({ name: "y" })).toEqual(["y", { b: "2", c: "3" }]);
    expect(await change({ labels: { b: "", c: null } })).toEqual(["y", {}]);
    expect(await change({ name: "" })).toEqual([null, {}]);
    expect(await change({ name: "z" })).toEqual(["z", {}]);
    expect(await change({ name: null, labels: {} })).toEqual([null, {}]);
  });

  test("labels with the names of a prototype", async () => {
    const labels = '{"__proto__":"p","constructor":"c","toString":"t","hasOwnProperty":"h"}';
    const { status, text } = await post(`{"labels":${labels}}`);
    expect(status).toBe(200);
    for (const label of ["__proto__=p", "constructor=c", "toString=t", "hasOwnProperty=h"]) {
      expect([label, await fleet.list(`label=${label}`)]).toEqual([label, ["a"]]);
      const [key, value] = label.split("=");
      expect(text).toContain(`"${key}":"${value}"`);
    }
    expect((await post('{"labels":{"__proto__":null}}')).text).not.toContain("__proto__");
    expect(await fleet.list("label=__proto__=p")).toEqual([]);
    const gone = await post('{"labels":{"constructor":null,"toString":null,"hasOwnProperty":""}}');
    expect(gone.json()["labels"] as object).toEqual({});
  });

  test("texts of 128 characters, and one more", async () => {
    const [longest, longer] = ["x".repeat(128), "x".repeat(129)];
    const edit = { name: longest, labels: { [longest]: longest } };
    expect((await fleet.ask(DEVICE, json(edit))).json() as object).toMatchObject(edit);
    expect(await fleet.list(`label=${longest}=${longest}`)).toEqual(["a"]);
    for (const wrong of [
      ...[{ name: longer }, { labels: { [longer]: "x" } }, { labels: { x: longer } }],
      ...[
        { name: "a\nb" },
        { name: "\u0000" },
        { labels: { "a\u0007": "x" } },
        { labels: { "": "x" } },
      ],
      ...[{ labels: { x: "\u009f" } }, { labels: { "a=b": "x" } }],
    ]) {
      const { status, json: found } = await fleet.ask(DEVICE, json(wrong));
      expect([wrong, status]).toEqual([wrong, 400]);
      expect(found()["error"]).toMatch(/128 characters, and no control/);
    }
    for (const text of [
      '{"name":"\\ud800"}',
      '{"labels":{"\\udc00":"x"}}',
      '{"labels":{"x":"\\ud800"}}',
    ]) {
      expect([text, (await post(text)).status]).toEqual([text, 400]);
    }
  });

  test("as many labels as there may be, and one more", async () => {
    await fleet.visit({ devid: "many" });
    const at = (from: number, count: number) => {
      const labels = Array.from({ length: count }, (_, i) => [`l${from + i}`, "x"]);
      return fleet.ask("/-/api/devices/many", json({ labels: Object.fromEntries(labels) }));
    };
    expect((await at(0, 64)).status).toBe(200);
    for (const wrong of [await at(0, 65), await at(64, 1)]) {
      expect([wrong.status, wrong.json()["error"]]).toEqual([
        400,
        expect.stringContaining("64 labels"),
      ] as never);
    }
    expect(Object.keys((await at(0, 1)).json()["labels"]!)).toHaveLength(64);
    // Those that were removed take no room.
    const removed = Object.fromEntries(Array.from({ length: 64 }, (_, i) => [`l${i}`, null]));
    expect((await fleet.ask("/-/api/devices/many", json({ labels: removed }))).status).toBe(200);
    expect(Object.keys((await at(100, 64)).json()["labels"]!)).toHaveLength(64);
  });

  test("what is no change: 400, and why", async () => {
    const cases: [body: string, why: RegExp][] = [
      ["", /the body: not a JSON object/],
      ["{", /the body/],
      ["null", /the body/],
      ["[]", /the body/],
      ['"x"', /the body/],
      ["{}{}", /the body/],
      ["{'name':'x'}", /the body/],
      ["name=x", /the body/],
      ['{"name":1}', /name: not a string/],
      ['{"name":{}}', /name/],
      ['{"name":true}', /name/],
      ['{"labels":null}', /labels: not a JSON object/],
      ['{"labels":[]}', /labels: not a JSON object/],
      ['{"labels":"a=b"}', /labels/],
      ['{"labels":{"a":1}}', /labels\.a: not a string/],
      ['{"labels":{"a":{}}}', /labels\.a/],
      ['{"labels":{"a":["x"]}}', /labels\.a/],
      ['{"Name":"x"}', /unknown field Name/],
      ['{"name":"x","id":"b"}', /unknown field id/],
      ['{"__proto__":{"name":"x"}}', /unknown field __proto__/],
      ["[".repeat(65_536), /the body/],
      [`${"[".repeat(30_000)}${"]".repeat(30_000)}`, /the body/],
      [`{"labels":${'{"a":'.repeat(10_000)}1${"}".repeat(10_001)}`, /labels\.a: not a string/],
      [`{"${"x".repeat(60_000)}":1}`, /unknown field x+/],
    ];
    const before = (await fleet.ask(DEVICE)).text;
    for (const [body, why] of cases) {
      const { status, json: found, text } = await post(body);
      expect([body.slice(0, 50), status]).toEqual([body.slice(0, 50), 400]);
      expect(found()["error"]).toMatch(why);
      expect(text.length).toBeLessThan(300);
    }
    const { status, json: found } = await post(Buffer.from('{"name":"\xff"}', "latin1"));
    expect([status, found()["error"]]).toEqual([400, expect.stringContaining("UTF-8")] as never);
    expect((await fleet.ask(DEVICE, { method: "POST" })).status).toBe(400);
    expect((await fleet.ask(DEVICE)).text).toBe(before);
  });

  test("a body of 64 KiB, and a byte more; with a length and without", async () => {
    const most = 64 * 1024;
    const ofSize = (size: number) => '{"name":"big"}'.padEnd(size);
    for (const pieces of [undefined, 1000, most, 200_000]) {
      const longest = await post(ofSize(most), { ...(pieces && { pieces }) });
      expect([pieces, longest.status]).toEqual([pieces, 200]);
      const longer = await post(ofSize(most + 1), { ...(pieces && { pieces }) });
      expect([pieces, longer.status]).toEqual([pieces, 413]);
      expect(longer.json()["error"]).toContain("65536 bytes");
      expect(longer.headers.get("connection")).toBe("close");
    }
    expect((await post('{"name":"small"}', { pieces: 1 })).json()["name"] as string).toBe("small");
    // What is said to be longer is not waited for, nor is the body of a stranger.
    const length = { "Content-Length": "10000000" };
    const announced = { method: "POST", headers: { ...BEARER, ...length } };
    expect((await fleet.ask(DEVICE, announced)).status).toBe(413);
    expect((await post(ofSize(most + 1), { headers: {} })).status).toBe(401);
  });

  test("bodies are taken there and nowhere else", async () => {
    const there = [
      { method: "DELETE", body: "{}" },
      { method: "DELETE", body: "{}", pieces: 1 },
      { method: "GET", body: "{}" },
    ];
    for (const asked of there) expect((await fleet.ask(DEVICE, asked)).status).toBe(413);
    for (const path of ["/-/api/fleet", "/-/api/devices", "/-/"]) {
      expect((await fleet.ask(path, { method: "POST", body: "{}" })).status).toBe(405);
      expect((await fleet.ask(path, { body: "{}" })).status).toBe(413);
    }
    for (const path of ["/manifest.json", "/1.0.0/flash/main.py", "/-/health", "/none"]) {
      expect((await fleet.ask(path, { method: "POST", body: "{}" })).status).toBe(405);
      expect((await fleet.ask(path, { body: "{}" })).status).toBe(413);
    }
    expect((await fleet.ask(DEVICE)).status).toBe(200);
  });

  test("a body that is cut off changes nothing, and nothing is left behind", async () => {
    const before = (await fleet.ask(DEVICE)).text;
    const head = `POST ${DEVICE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer ${TOKEN}\r\n`;
    const lines = fleet.log.length;
    for (const text of [
      `${head}Content-Length: 100\r\n\r\n{"name":"cut"}`,
      `${head}Transfer-Encoding: chunked\r\n\r\n3\r\n{"n`,
    ]) {
      await rawRequest(fleet.url, text, { halfClose: true });
    }
    await until(
      "both are logged",
      () => fleet.log.length,
      (count) => count >= lines + 2,
      30,
    );
    expect((await fleet.ask(DEVICE)).text).toBe(before);
  });
});

describe("rollouts", () => {
  let fleet: Fleeted;
  beforeAll(async () => {
    fleet = await Fleeted.start({}, { ...TREE, "lopy4/1.0.1/a": "12345" });
    await fleet.visit({ devid: "a" }, { devid: "b" }, { devid: "c", current_ver: "1.0.1" });
  });
  afterAll(() => fleet[Symbol.asyncDispose]());

  const ROLLOUTS = "/-/api/rollouts";
  const start = (options: object) => fleet.ask(ROLLOUTS, json(options));
  const act = (path: string) => fleet.ask(`${ROLLOUTS}/${path}`, { method: "POST" });

  test("are for who has the token, and a change by cookie comes from a page of this server", async () => {
    const Cookie = await cookieOf(fleet);
    for (const path of [ROLLOUTS, `${ROLLOUTS}/1.0.1/abort`]) {
      for (const method of ["GET", "POST"]) {
        const { status } = await fleet.ask(path, { method, headers: {} });
        expect([path, method, status]).toEqual([path, method, 401]);
      }
      const elsewhere = { Cookie, Origin: "http://evil.example" };
      const { status } = await fleet.ask(path, { method: "POST", headers: elsewhere });
      expect([path, status]).toEqual([path, 403]);
      const here = await fleet.ask(path, {
        method: "POST",
        headers: { Cookie, Origin: fleet.url },
      });
      expect([401, 403]).not.toContain(here.status);
    }
    expect((await fleet.ask(ROLLOUTS, { headers: { Cookie } })).json() as unknown).toEqual({
      rollouts: [],
    } as unknown);
  });

  test("one is tried, started, paused, resumed, advanced and aborted", async () => {
    const tried = await start({ version: "1.0.1", dry_run: true });
    expect([tried.status, tried.json() as unknown]).toEqual([
      200,
      { targets: [{ model: null, version: "1.0.0", firmware: null, devices: 2 }] },
    ]);
    const window = "Mon-Sun 00:00-24:00";
    const only = [["site", "Pau"]];
    const said = { first: 2, soak: 5, silent: 60, tolerance: 0.1, pause_at: [0.5, 0.1] };
    const started = await start({ version: "1.0.1", ...said, only, window });
    expect(started.status).toBe(201);
    const found = started.json() as unknown as Record<string, unknown>;
    expect(found).toMatchObject({ ...said, pause_at: [0.1, 0.5], only, window, model: null });
    expect(found).toMatchObject({ version: "1.0.1", state: "waiting", proven: 0, eligible: 0 });
    expect(Object.keys(found)).toEqual(
      expect.arrayContaining(["id", "reason", "offered", "failed", "silent_devices", "created"]),
    );
    const again = await start({ version: "1.0.1" });
    expect([again.status, again.json()["error"]]).toEqual([
      409,
      expect.stringMatching(/a rollout of 1\.0\.1 is \w+ already/),
    ]);
    await until(
      "it runs",
      async () => (await fleet.ask(ROLLOUTS)).json()["rollouts"]![0]!["state"] as string,
      (state) => state === "running",
    );
    for (const [action, state] of [
      ["pause", "paused"],
      ["resume", "running"],
      ["advance", "running"],
      ["abort", "aborted"],
    ]) {
      const { status, json } = await act(`1.0.1/${action}`);
      expect([action, status, json()["state"]]).toEqual([action, 200, state]);
    }
    const late = await act("1.0.1/pause");
    expect([late.status, late.json()["error"]]).toEqual([
      409,
      expect.stringContaining("the rollout of 1.0.1 is aborted"),
    ]);
  });

  test("of models with a root of their own are named by it", async () => {
    expect((await start({ version: "1.0.2" })).status).toBe(201);
    expect((await start({ version: "1.0.2", model: "lopy4" })).status).toBe(201);
    const { status, json } = await act("1.0.2/abort");
    expect([status, json()["error"]]).toEqual([400, expect.stringContaining("name the model")]);
    const one = await act("1.0.2/abort?model=LOPY4");
    expect([one.status, `${one.json()["model"]}`]).toEqual([200, "lopy4"]);
    // There is only one left.
    const other = await act("1.0.2/abort");
    expect([other.status, `${other.json()["model"]}`]).toEqual([200, "null"]);
  });

  test("what is wrong: 400, and why; what there is not: 404; other methods: 405", async () => {
    const version = "1.0.9";
    const wrong: [body: unknown, why: RegExp][] = [
      [{}, /version: there must be one/],
      [[], /the body: not a JSON object/],
      ["x", /the body: not a JSON object/],
      [{ version: 1 }, /version: not a string/],
      [{ version: "latest" }, /a version as its directory is named .*found latest/],
      [{ version: "1.0.9\n" }, /a version as its directory is named/],
      [{ version, frist: 1 }, /unknown field frist/],
      [JSON.parse(`{"version":"1.0.9","__proto__":{}}`), /unknown field __proto__/],
      [{ version, first: 0 }, /--first as a whole number from 1, found 0/],
      [{ version, first: "1" }, /first: not a number/],
      [{ version, first: 1e300 }, /--first as a whole number/],
      [{ version, soak: -1 }, /--soak/],
      [{ version, silent: 0 }, /--silent/],
      [{ version, tolerance: 5 }, /--tolerance between 0 % \(0\) and 100 % \(1\)/],
      [{ version, pause_at: [1] }, /--pause-at/],
      [{ version, pause_at: 0.5 }, /pause_at: not a list/],
      [{ version, pause_at: [0.5, 0.5] }, /--pause-at/],
      [{ version, only: { site: "Pau" } }, /only: not a list/],
      [{ version, only: [["site"]] }, /only\[0\]: not a key and a value/],
      [{ version, only: [["site", ""]] }, /--only KEY=VALUE/],
      [{ version, only: Array(65).fill(["a", "b"]) }, /up to 64 --only/],
      [{ version, window: "soon" }, /a window is like/],
      [{ version, window: "Mon 01:00-02:00 Nowhere/Else" }, /no time zone/],
      [{ version, model: "\u0000" }, /the name of a model/],
      [{ version, dry_run: 1 }, /dry_run: not a boolean/],
    ];
    for (const [body, why] of wrong) {
      const { status, json: found } = await start(body as object);
      expect([body, status]).toEqual([body, 400]);
      expect(found()["error"]).toMatch(why);
    }
    for (const body of ["", "{", "\u{1f600}", Buffer.from([0xff, 0x7b])]) {
      expect((await fleet.ask(ROLLOUTS, { method: "POST", body })).status).toBe(400);
    }
    const large = await fleet.ask(ROLLOUTS, { method: "POST", body: " ".repeat(65 * 1024) });
    expect(large.status).toBe(413);
    for (const path of ["1.0.9/pause", "x/pause", "%00/pause", "1.0.9/stop", "1.0.9"]) {
      expect([path, (await act(path)).status]).toEqual([path, 404]);
    }
    for (const path of ["1.0.1/pause?x=1", "1.0.1/pause?model=%00", "%zz/pause"]) {
      expect([path, (await act(path)).status]).toEqual([path, 400]);
    }
    expect((await fleet.ask(`${ROLLOUTS}?state=running`)).status).toBe(400);
    const read = await fleet.ask(`${ROLLOUTS}/1.0.1/abort`);
    expect([read.status, read.headers.get("allow")]).toEqual([405, "POST"]);
    const gone = await fleet.ask(ROLLOUTS, { method: "DELETE" });
    expect([gone.status, gone.headers.get("allow")]).toEqual([405, "GET, HEAD, POST"]);
    const body = await fleet.ask(`${ROLLOUTS}/1.0.1/abort`, { method: "POST", body: "{}" });
    expect(body.status).toBe(413);
    // Nothing of all that has started one.
    const { rollouts } = (await fleet.ask(ROLLOUTS)).json() as unknown as { rollouts: Json[] };
    expect(rollouts!.filter((one) => one["version"] === version)).toEqual([]);
  });
});

describe("two servers on one store", () => {
  test("a SQLite file: what one is told, the other tells", async () => {
    using place = new Temp();
    await tellEachOther(place.at("fleet.db"));
  });

  test("PostgreSQL: what one is told, the other tells", async () => {
    await using postgres = await Postgres.start();
    await tellEachOther(await postgres.database());
  });
});

/** Whatever one of two servers is told, the other one tells within two seconds. */
async function tellEachOther(fleet: string): Promise<void> {
  await using one = await Fleeted.start({ fleet });
  await using other = await Fleeted.start({ fleet });
  // The device asks the one; the other hears of it without being told.
  await fetch(`${one.url}/manifest.json?devid=a&current_ver=1.0.0`);
  const asked = performance.now();
  const seen = () => other.ask(DEVICE);
  await until("the device is known", seen, ({ status }) => status === 200, 30);
  expect(performance.now() - asked).toBeLessThan(2000);
  for (const [from, to, name] of [
    [one, other, "first"],
    [other, one, "second"],
  ] as const) {
    expect((await from.ask(DEVICE, json({ name, labels: { by: name } }))).status).toBe(200);
    const told = performance.now();
    const look = async () => (await to.ask(DEVICE)).json()["name"] as string;
    await until("it has that name", look, (found) => found === name, 30);
    expect(performance.now() - told).toBeLessThan(2000);
    expect(await to.list(`label=by=${name}`)).toEqual(["a"]);
  }
  await other.ask(DEVICE, { method: "DELETE" });
  const gone = performance.now();
  const count = async () => (await one.ask("/-/api/fleet")).json()["devices"] as unknown;
  await until("it is forgotten", count, (devices) => devices === 0, 30);
  expect(performance.now() - gone).toBeLessThan(2000);
  expect((await one.ask(DEVICE)).status).toBe(404);
}

test("servers that start at the same time on a new store have one token", async () => {
  using temp = new Temp();
  const fleet = temp.at("fleet.db");
  const servers = await Promise.all(
    Array.from({ length: 4 }, () => Fleeted.start({ fleet, adminToken: undefined })),
  );
  try {
    const tokens = servers.map(({ server }) => server.admin!.made);
    expect(new Set(tokens).size).toBe(1);
    expect(tokens[0]).toMatch(/^[\w-]{32}$/);
  } finally {
    for (const one of servers) await one[Symbol.asyncDispose]();
  }
});

describe("/-/metrics", () => {
  /** The samples of a name, by their label. */
  const samples = async ({ url }: Fleeted, name: string) => {
    const text = await (await fetch(`${url}/-/metrics`)).text();
    const found = text.matchAll(new RegExp(`^${name}\\{\\w+="(.*)"\\} (\\d+)$`, "gm"));
    return Object.fromEntries([...found].map(([, label, count]) => [label!, Number(count)]));
  };

  test("counts devices by state, and by version: those on offer, and others", async () => {
    await using one = await Fleeted.start({}, { ...TREE, "lopy4/2.0.0/flash/main.py": "three\n" });
    const made = Array.from({ length: 300 }, (_, i) => ({
      ...{ devid: `made-up-${i}`, current_ver: `7.${i}"} 1\\` },
    }));
    await one.visit(
      { devid: "a" },
      { devid: "b", current_ver: "1.00.0" },
      { devid: "c", current_ver: "1.0.1" },
      { devid: "d", current_ver: "2.0.0", model: "LoPy4" },
      { devid: "e", current_ver: "" },
      ...made,
    );
    const states = await samples(one, "ota_devices");
    expect(Object.keys(states)).toEqual(["current", "behind", "offered", "silent", "failed"]);
    expect(Object.values(states).reduce((a, b) => a + b)).toBe(305);
    const versions = await samples(one, "ota_devices_by_version");
    const { none, other, ...known } = versions;
    expect([none, none! + other!]).toEqual([1, 305 - Object.values(known).reduce((a, b) => a + b)]);
    for (const version of Object.keys(known))
      expect(["1.0.0", "1.0.1", "2.0.0"]).toContain(version);
    expect(known["1.0.0"]).toBeGreaterThan(0);
  });

  test("tells of the rest while the store is away", async () => {
    await using one = await Fleeted.start({ fleet: "postgres://nobody@127.0.0.1:1/none" });
    const text = await (await fetch(`${one.url}/-/metrics`)).text();
    expect(text).toContain("\nota_releases 2\n");
    expect(text).toContain("\nota_fleet_dropped_total 0\n");
    expect(text).not.toContain("ota_devices");
  });
});

test("a fleet's file in the root is no content, and writing it starts no scan", async () => {
  await using one = await Fleeted.start();
  await one.serve({ fleet: one.at("root/.fleet.db") });
  const scan = async () => {
    const text = await (await fetch(`${one.url}/-/metrics`)).text();
    return /^ota_scan_seconds (.*)$/m.exec(text)![1]!;
  };
  // There is one more after the start.
  let [last, before] = ["", await scan()];
  while (last !== before) {
    await Bun.sleep(1000);
    [last, before] = [before, await scan()];
  }
  for (let i = 0; i < 5; i++) {
    await one.visit({ devid: `m${i}` });
    await Bun.sleep(300);
  }
  // The time that the last scan took is the same number only if there was none since.
  expect(await scan()).toBe(before);
  for (const name of [".fleet.db", ".fleet.db-wal", ".fleet.db-shm"]) {
    expect((await fetch(`${one.url}/${name}`)).status).toBe(404);
  }
  writeFileSync(one.at("root/1.0.1/flash/main.py"), "two, edited\n");
  await until("a change of content is seen", scan, (now) => now !== before, 30);
});

describe("a store that is away", () => {
  /** PostgreSQL that is there, and says nothing; or is not there. */
  async function silent(): Promise<{ url: string; server: TCPServer; close: () => void }> {
    const sockets = new Set<Socket>();
    const server = createServer((socket) => {
      sockets.add(socket);
      socket.on("error", () => {});
    });
    await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
    const { port } = server.address() as { port: number };
    const close = () => {
      for (const socket of sockets) socket.destroy();
      server.close();
    };
    return { url: `postgres://nobody@127.0.0.1:${port}/none`, server, close };
  }

  test("503 and why, to who has the token; everybody else is answered as ever", async () => {
    const { url, close } = await silent();
    close();
    await using fleet = await Fleeted.start({ fleet: url });
    for (const target of [...API, "/-/api/devices/?id=x"]) {
      const { status, json: found, headers } = await fleet.ask(target);
      expect([target, status]).toEqual([target, 503]);
      expect(found()["error"]).toContain("127.0.0.1");
      expect(headers.get("cache-control")).toBe("no-store");
      expect((await fleet.ask(target, { headers: {} })).status).toBe(401);
    }
    for (const asked of [json({ name: "x" }), { method: "DELETE" }]) {
      expect((await fleet.ask(DEVICE, asked)).status).toBe(503);
    }
    for (const [target, asked] of ASKED_OF_ROLLOUTS) {
      const { status, json: found } = await fleet.ask(target, asked);
      expect([target, status]).toEqual([target, 503]);
      expect(found()["error"]).toContain("127.0.0.1");
    }
    // What is wrong with a request is so without a store.
    expect((await fleet.ask("/-/api/devices?limit=0")).status).toBe(400);
    expect((await fleet.ask("/-/api/rollouts?limit=1")).status).toBe(400);
    expect((await fleet.ask("/-/api/rollouts", json({ version: "new" }))).status).toBe(400);
    expect((await fleet.ask("/-/api/rollouts/1.0.1/stop", { method: "POST" })).status).toBe(404);
    expect((await fleet.ask(DEVICE, json([]))).status).toBe(400);
    expect((await fleet.ask("/-/api/fleet", json({}))).status).toBe(405);
    expect((await fleet.ask("/-/")).status).toBe(503);
    const { status } = await fleet.ask("/manifest.json?current_ver=1.0.0&devid=a", { headers: {} });
    expect(status).toBe(200);
  });

  test("a slow one holds up nobody but who asked it", async () => {
    await using fleet = await Fleeted.start();
    const { url, close } = await silent();
    // It starts in the time that a connection may take; devices are served meanwhile.
    await using slow = await Fleeted.start({ fleet: url });
    const waiting = slow.ask("/-/api/devices");
    let isOver = false;
    void waiting.then(() => (isOver = true));
    const ask = async ({ url: at }: { url: string }) => {
      const started = performance.now();
      for (let i = 0; i < 100; i++) {
        const { status } = await fetch(`${at}/manifest.json?current_ver=1.0.0&devid=d${i}`);
        expect(status).toBe(200);
      }
      return performance.now() - started;
    };
    const [alone, beside] = [await ask(fleet), await ask(slow)];
    expect(isOver).toBe(false);
    expect(beside).toBeLessThan(Math.max(1000, 10 * alone));
    expect((await waiting).status).toBe(503);
    close();
  });

  test.concurrent(
    "that takes connections and says nothing: rollouts are 503 as well, in the end",
    async () => {
      const { url, close } = await silent();
      await using fleet = await Fleeted.start({ fleet: url });
      const answers = ASKED_OF_ROLLOUTS.map(([target, asked]) => fleet.ask(target, asked));
      for (const { status, json: found } of await Promise.all(answers)) {
        expect([status, found()["error"]]).toEqual([
          503,
          expect.stringContaining("does not answer"),
        ] as never);
      }
      close();
    },
  );

  test.concurrent(
    "at the start: nobody gets in until it tells the token, then who has it does",
    async () => {
      using temp = new Temp();
      const file = temp.at("fleet.db");
      {
        await using first = await Fleeted.start({ fleet: file });
        await first.visit({ devid: "a" });
      }
      const db = new Database(file);
      db.run("BEGIN IMMEDIATE");
      await using fleet = await Fleeted.start({ fleet: file, adminToken: undefined });
      const { admin } = fleet.server;
      expect([admin!.isKnown, admin!.made]).toEqual([false, undefined]);
      expect((await fleet.ask("/-/api/fleet")).status).toBe(503);
      expect((await fleet.ask(`/-/?token=${TOKEN}`, { headers: {} })).status).toBe(503);
      // Nobody can tell whether a cookie is good.
      for (const Cookie of ["", "ota-x=1.x"]) {
        expect((await fleet.ask("/-/api/fleet", { headers: { Cookie } })).status).toBe(503);
      }
      db.run("ROLLBACK");
      db.close();
      await admin!.known;
      const headers = { Authorization: `Bearer ${admin!.made}` };
      expect((await fleet.ask(DEVICE, { headers })).status).toBe(200);
    },
  );

  test.concurrent("locked: it can be read, and a change is 503", async () => {
    await using fleet = await Fleeted.start();
    await fleet.visit({ devid: "a" });
    const db = new Database(fleet.at("fleet.db"));
    db.run("BEGIN IMMEDIATE");
    expect((await fleet.ask(DEVICE)).status).toBe(200);
    const { status, json: found } = await fleet.ask(DEVICE, json({ name: "x" }));
    expect([status, found()["error"]]).toEqual([
      503,
      expect.stringContaining("try again"),
    ] as never);
    db.run("ROLLBACK");
    db.close();
    expect((await fleet.ask(DEVICE, json({ name: "x" }))).status).toBe(200);
  });

  test.concurrent("locked: rollouts are listed, and none is started or changed", async () => {
    await using fleet = await Fleeted.start();
    expect((await fleet.ask("/-/api/rollouts", json({ version: "1.0.9" }))).status).toBe(201);
    const db = new Database(fleet.at("fleet.db"));
    db.run("BEGIN IMMEDIATE");
    const answers = await Promise.all(
      ASKED_OF_ROLLOUTS.map(([target, asked]) => fleet.ask(target, asked)),
    );
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 503, 503]);
    db.run("ROLLBACK");
    db.close();
    const { status, json: found } = await fleet.ask("/-/api/rollouts/1.0.9/abort", {
      method: "POST",
    });
    expect([status, `${found()["state"]}`]).toEqual([200, "aborted"]);
  });

  test("that a newer ota.ts has taken over: 503, not 409", async () => {
    await using fleet = await Fleeted.start();
    const db = new Database(fleet.at("fleet.db"));
    // The server connects to it anew once it has failed.
    db.run("ALTER TABLE ota_rollouts RENAME TO ota_rollouts_of_99");
    db.run("UPDATE ota_meta SET value = '99' WHERE name = 'schema'");
    db.close();
    for (const [target, asked] of [...ASKED_OF_ROLLOUTS, ...ASKED_OF_ROLLOUTS]) {
      expect([target, (await fleet.ask(target, asked)).status]).toEqual([target, 503]);
    }
  });
});

describe("bun ota.ts serve", () => {
  test("prints a link with the token that it made, the same at each start, and never logs it", async () => {
    using temp = new Temp(TREE);
    const args = ["--root", temp.path, "--host", "127.0.0.1"];
    const links: string[] = [];
    for (let time = 0; time < 2; time++) {
      await using serving = await Serving.start(args);
      const [, link = "", token = ""] = /^fleet +(http:\S+\/-\/\?token=(\S+))$/m.exec(
        serving.startup,
      )!;
      expect(link).toStartWith(`${serving.url}/-/?token=`);
      links.push(token);
      const opened = await fetch(link, { redirect: "manual" });
      const Cookie = opened.headers.get("set-cookie")!.split(";")[0]!;
      expect(new URL(opened.headers.get("location")!, link).href).toBe(`${serving.url}/-/`);
      expect((await fetch(`${serving.url}/-/`, { headers: { Cookie } })).status).toBe(200);
      const bearer = { headers: { Authorization: `Bearer ${token}` } };
      expect((await fetch(`${serving.url}/-/api/fleet`, bearer)).status).toBe(200);
      await fetch(`${serving.url}/-/api/fleet?token=${token}`, bearer);
      const metrics = await (await fetch(`${serving.url}/-/metrics`)).text();
      serving.kill("SIGTERM");
      const { stdout, stderr } = await serving.ended;
      expect(stdout).toMatch(/ GET \/-\/ 303 /);
      expect(stdout).toMatch(/ GET \/-\/api\/fleet 400 /);
      for (const text of [stdout.slice(serving.startup.length), stderr, metrics]) {
        expect(text).not.toContain(token);
        expect(text).not.toContain(Cookie.split("=")[1]!);
      }
    }
    expect(links[0]).toBe(links[1]!);
    // A file that others can read would tell it.
    expect((await Bun.file(`${temp.path}/.fleet.db`).stat()).mode & 0o077).toBe(0);
  });

  test("does not print the token that it is given", async () => {
    using temp = new Temp(TREE);
    const args = ["--root", temp.path, "--host", "127.0.0.1"];
    for (const [more, env] of [
      [["--admin-token", TOKEN], {}],
      [[], { OTA_ADMIN_TOKEN: TOKEN }],
      [["--admin-token", TOKEN], { OTA_ADMIN_TOKEN: "another-of-16-ch" }],
    ] as const) {
      await using serving = await Serving.start([...args, ...more], { env });
      expect(serving.startup).toMatch(
        /^fleet +http:\S+\/-\/\?token=\.\.\. \(with the admin token\)$/m,
      );
      expect((await fetch(`${serving.url}/-/api/fleet`, { headers: BEARER })).status).toBe(200);
      serving.kill("SIGTERM");
      const { stdout, stderr } = await serving.ended;
      expect(stdout + stderr).not.toContain(TOKEN);
    }
    // Nor does it keep it.
    copyFileSync(`${temp.path}/.fleet.db`, temp.at("copy"));
    expect(Buffer.from(await Bun.file(temp.at("copy")).bytes()).includes(TOKEN)).toBe(false);
  });

  test("refuses a token that cannot be one, and warns of a short one", async () => {
    using temp = new Temp(TREE);
    const args = ["serve", "--root", temp.path, "--port", "0"];
    for (const [more, why] of [
      [["--admin-token", "a b"], "without spaces"],
      [["--admin-token", "é"], "ASCII"],
      [["--admin-token", TOKEN, "--token", TOKEN], "--token of the devices"],
      [["--admin-token", TOKEN, "--no-fleet"], "exclude each other"],
    ] as const) {
      const { code, stderr } = await run([...args, ...more]);
      expect([more, code]).toEqual([more, 2]);
      expect(stderr).toContain(why);
      expect(stderr).not.toContain(TOKEN);
    }
    await using fleet = await Fleeted.start({ adminToken: "short" });
    expect(fleet.warnings.join()).toContain("only 5 characters");
  });

  test("without a fleet, the variable does not matter", async () => {
    using temp = new Temp(TREE);
    mkdirSync(temp.at("x"));
    writeFileSync(temp.at("x/y"), "");
    const args = ["--root", temp.path, "--host", "127.0.0.1", "--no-fleet"];
    await using serving = await Serving.start(args, { env: { OTA_ADMIN_TOKEN: TOKEN } });
    expect(serving.startup).not.toContain("fleet ");
    expect((await fetch(`${serving.url}/-/`, { headers: BEARER })).status).toBe(404);
  });
});
