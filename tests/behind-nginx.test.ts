/**
 * A caching proxy in front, as a fleet's operator would have it: Debian's nginx, with real devices
 * behind it.
 */

import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, rmSync } from "node:fs";
import { createPublicKey } from "node:crypto";
import { HttpOTA, makeKeys } from "../ota.ts";
import { boardGet } from "./helpers/board.ts";
import { noise, sha256 } from "./helpers/content.ts";
import { Nginx } from "./helpers/nginx.ts";
import { freePort } from "./helpers/raw.ts";
import { asTree, layTree, readTree, type Tree } from "./helpers/temp.ts";
import { eventually, until } from "./helpers/tool.ts";
import { World, type Logged } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SOME = "a line of the program of a meter, again and again\n";
const same = (size: number, seed: number) => Buffer.alloc(size, `${SOME}${seed}`);
const own = (version: string): Tree => ({
  "flash/OTA_VERSION.py": `VERSION = '${version}'\n`,
});

const V1: Tree = {
  "flash/main.py": same(3000, 1),
  "flash/lib/meter.py": same(9000, 1),
  "flash/gone.py": "gone = True\n",
};
const V2: Tree = {
  "flash/main.py": same(3000, 2),
  "flash/lib/meter.py": same(9000, 2),
  "flash/lib/a new one.py": same(5000, 3),
  "flash/empty": "",
  "sd/tones.bin": noise(300_000, 1),
};
const IMAGE = noise(400_000, 2);

interface Setup {
  sign?: string;
  /** Bytes after which the line to nginx breaks. */
  breaksAfter?: number;
  /** Where it caches, nginx makes a `GET` of a `HEAD`: manifests are a location without a cache. */
  passesReports?: boolean;
}

/** A world with nginx in front, which is where the URLs of its server lead. */
async function withNginx(cache: string, options: Setup = {}) {
  const { sign, breaksAfter, passesReports } = options;
  const port = await freePort();
  const line = new BreakingLine(port, breaksAfter ?? Infinity);
  const url = breaksAfter ? line.url : `http://127.0.0.1:${port}`;
  const beside = { "firmware_1.0.1.bin": IMAGE };
  const world = new World({ "1.0.0": V1, "1.0.1": V2 }, { beside });
  if (sign) world.write({ "sign.key": sign });
  const server = await world.serve({ url, ...(sign && { sign: world.at("sign.key") }) });
  const manifests = `location ~ /manifest\\.json$ { proxy_pass ${server.url}; }`;
  const nginx = await Nginx.caching(server.url, port, cache, passesReports ? manifests : "");
  return {
    ...{ world, server, nginx, line },
    async [Symbol.asyncDispose]() {
      await line[Symbol.asyncDispose]();
      await nginx[Symbol.asyncDispose]();
      await world[Symbol.asyncDispose]();
    },
  };
}

/** What was sent of content, by path; what cost nothing (a 304) is left out. */
function sentContent(requests: readonly Logged[]): Record<string, Logged[]> {
  const content = requests.filter(({ path, status }) => path !== "/manifest.json" && status < 300);
  return Object.groupBy(content, ({ path }) => path) as Record<string, Logged[]>;
}

const DEVICES = 50;
const LOCK = "proxy_cache_lock on; proxy_cache_lock_timeout 120s; proxy_cache_lock_age 120s;";

test.concurrent(
  "50 devices update at once through it, and the server sends each file's bytes once",
  async () => {
    const { key, pub } = makeKeys();
    await using setup = await withNginx(LOCK, { sign: key, passesReports: true });
    const { server, nginx, world } = setup;
    const roots = Array.from({ length: DEVICES }, (_, i) => world.at(`device-${i}`));
    for (const root of roots) layTree(root, V1);

    const update = async (root: string) => {
      const verify = [createPublicKey(pub)];
      return new HttpOTA(nginx.url, { root, ver: "1.0.0", verify, timeout: 120 }).update();
    };
    const outcomes = await Promise.all(roots.map(update));

    for (const outcome of outcomes) {
      expect(outcome).toMatchObject({ result: "updated", from: "1.0.0", to: "1.0.1" });
      expect(outcome.firmware?.to).toBe("1.0.1");
    }
    const expected = asTree({ ...V2, ...own("1.0.1") });
    for (const root of roots) {
      expect(readTree(root)).toEqual(expected);
      expect(sha256(await Bun.file(`${root}/.ota/ota_0.bin`).bytes())).toBe(sha256(IMAGE));
    }

    // Large content is logged when all of it has gone.
    const isLogged = (path: string) => server.requests.some((request) => request.path === path);
    const large = ["/1.0.1/sd/tones.bin", "/firmware_1.0.1.bin"];
    await eventually("it is logged", () => large.every(isLogged));
    const manifests = server.requests.filter(({ path }) => path === "/manifest.json");
    // What 1.0.0 consists of, and what is new; and what they are on then.
    expect(manifests.filter(({ method }) => method === "GET").length).toBe(2 * DEVICES);
    expect(manifests.filter(({ method }) => method === "HEAD").length).toBe(DEVICES);
    const sent = sentContent(server.requests);
    const times = Object.fromEntries(
      Object.entries(sent).map(([path, list]) => [path, list.map(({ status }) => status)]),
    );
    // The empty one needs no bytes, and what is small came in the manifest.
    expect(times).toEqual({
      "/1.0.1/flash/lib/a%20new%20one.py": [200],
      "/1.0.1/sd/tones.bin": [200],
      "/firmware_1.0.1.bin": [200],
    });
    expect(nginx.errors).toBe("");
  },
);

test.concurrent(
  "devices that come from different releases and boards share it, and all get what is theirs",
  async () => {
    await using setup = await withNginx(LOCK);
    const { server, nginx, world } = setup;
    const kinds: Record<string, Tree> = {
      "1.0.0": V1,
      "": {},
      "0.9": { "flash/main.py": "old\n" },
    };
    const update = async (ver: string, i: number) => {
      const root = world.at(`device-${ver}-${i}`);
      mkdirSync(root);
      layTree(root, kinds[ver]!);
      const outcome = await new HttpOTA(nginx.url, { root, ...(ver && { ver }) }).update();
      expect(outcome).toMatchObject({ result: "updated", to: "1.0.1" });
      expect(readTree(root)).toEqual(asTree({ ...V2, ...own("1.0.1") }));
    };
    const board = async () => {
      // A board knows no coding.
      const { body } = await boardGet(server.url, "/1.0.1/sd/tones.bin");
      expect(sha256(body)).toBe(sha256(V2["sd/tones.bin"]!));
    };
    const devices = Object.keys(kinds).flatMap((ver) => [0, 1, 2].map((i) => update(ver, i)));
    await Promise.all([...devices, board(), board()]);
    // Each form of a content is a response of its own: plain, coded, and against each old content.
    for (const [path, list] of Object.entries(sentContent(server.requests))) {
      expect([path, list.length <= 6]).toEqual([path, true]);
    }
  },
);

test.concurrent(
  "a manifest is never kept: a new release shows at once to devices behind it",
  async () => {
    await using setup = await withNginx(LOCK);
    const { nginx, world, server } = setup;
    const ask = async () => {
      const response = await fetch(`${nginx.url}/manifest.json?current_ver=1.0.0`);
      expect(response.headers.get("cache-control")).toBe("no-store");
      expect(response.headers.get("x-cache")).toBe("MISS");
      return ((await response.json()) as { version: string }).version;
    };
    expect([await ask(), await ask()]).toEqual(["1.0.1", "1.0.1"]);
    world.release("1.0.2", V2);
    await until("1.0.2 shows", ask, (version) => version === "1.0.2", 30);
    expect(server.requests.length).toBeGreaterThanOrEqual(3);
  },
);

test.concurrent(
  "content is kept as long as it says, then asked for again with its tag: no bytes",
  async () => {
    // Some seconds instead of the minute that the server grants, so that nobody has to wait for it;
    // in which a busy machine can ask again, too.
    const short = "proxy_ignore_headers Cache-Control; proxy_cache_valid 200 5s;";
    await using setup = await withNginx(`${LOCK} ${short} proxy_cache_revalidate on;`);
    const { nginx, server, world } = setup;
    const path = "/1.0.1/flash/main.py";
    const get = async () => {
      const response = await fetch(nginx.url + path, {
        headers: { "Accept-Encoding": "identity" },
      });
      const body = await response.bytes();
      return {
        cache: response.headers.get("x-cache"),
        status: response.status,
        hash: sha256(body),
      };
    };
    const hash = sha256(V2["flash/main.py"]!);
    expect(await get()).toEqual({ cache: "MISS", status: 200, hash });
    expect(await get()).toEqual({ cache: "HIT", status: 200, hash });
    const last = await until("it is asked for again", get, ({ cache }) => cache !== "HIT", 30);
    expect(last).toEqual({ cache: "REVALIDATED", status: 200, hash });
    const asked = server.requests.filter((request) => request.path === path);
    expect(asked.map(({ status, bytes }) => [status, bytes])).toEqual([
      [200, 3000],
      [304, 0],
    ]);

    // And what has changed comes anew.
    rmSync(world.at("releases/1.0.1/flash/main.py"));
    world.release("1.0.1", { "flash/main.py": "print('mended')\n" });
    const mended = sha256("print('mended')\n");
    const either = async () => {
      const got = (await get()).hash;
      expect([hash, mended]).toContain(got);
      return got;
    };
    await until("it is mended", either, (got) => got === mended, 30);
  },
);

test.concurrent(
  "what content says of its keeping: nginx keeps it as it is, without being told to",
  async () => {
    await using setup = await withNginx("");
    const { nginx, server } = setup;
    for (const path of ["/1.0.1/sd/tones.bin", "/firmware_1.0.1.bin"]) {
      const first = await fetch(nginx.url + path);
      const content = await first.bytes(); // It is kept once it is whole.
      const again = await fetch(nginx.url + path);
      expect([first.headers.get("x-cache"), again.headers.get("x-cache")]).toEqual(["MISS", "HIT"]);
      expect(again.headers.get("etag")).toMatch(/^"[^"]+"$/);
      expect(again.headers.get("etag")).toBe(first.headers.get("etag"));
      const seconds = Number(/^max-age=(\d+)$/.exec(again.headers.get("cache-control") ?? "")?.[1]);
      expect(seconds).toBeGreaterThan(0);
      expect(seconds).toBeLessThanOrEqual(300);
      expect(sha256(await again.bytes())).toBe(sha256(content));
    }
    // Refusals are not content: nothing is kept of them.
    await fetch(`${nginx.url}/1.0.1/none`);
    await fetch(`${nginx.url}/1.0.1/none`);
    expect(server.requests.filter(({ path }) => path === "/1.0.1/none").length).toBe(2);
  },
);

/** Passes bytes on both ways, and breaks every connection after so many from behind. */
class BreakingLine implements AsyncDisposable {
  readonly #listener: Bun.TCPSocketListener<Ends>;
  /** How many connections it has broken. */
  broken = 0;

  constructor(
    readonly to: number,
    readonly most: number,
  ) {
    this.#listener = Bun.listen<Ends>({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open: (client) => {
          client.data = { behind: this.#connect(client), left: this.most, waiting: [] };
        },
        data: async ({ data }, piece) => void (await data.behind).write(piece),
        drain: (client) => void flush(client),
        close: async ({ data }) => (await data.behind).terminate(),
        error() {},
      },
    });
  }

  get url(): string {
    return `http://127.0.0.1:${this.#listener.port}`;
  }

  #connect(client: Bun.Socket<Ends>): Promise<Bun.Socket> {
    return Bun.connect({
      hostname: "127.0.0.1",
      port: this.to,
      socket: {
        data: (behind, piece) => {
          const { data } = client;
          const passed = piece.subarray(0, data.left);
          data.left -= passed.length;
          data.waiting.push(Uint8Array.from(passed));
          // No more than the client takes: what it does not get must not have been sent.
          if (flush(client) > 0) behind.pause();
          if (data.left > 0) return;
          this.broken++;
          behind.terminate();
        },
        close: () => void (client.data.waiting.length === 0 && client.end()),
        error() {},
      },
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.stop(true);
  }
}

interface Ends {
  behind: Promise<Bun.Socket>;
  /** Bytes until it breaks. */
  left: number;
  waiting: Uint8Array[];
}

/** Writes what waits for the client, and ends it after the last byte; returns how much is left. */
function flush(client: Bun.Socket<Ends>): number {
  const { data } = client;
  for (let first; (first = data.waiting[0]);) {
    const written = client.write(first);
    if (written < first.length) {
      data.waiting[0] = first.subarray(Math.max(0, written));
      return data.waiting.length;
    }
    data.waiting.shift();
  }
  if (data.left === 0) client.end();
  else void data.behind.then((behind) => behind.resume());
  return 0;
}

test.concurrent(
  "30 MB arrive through it over a line that breaks every 8 MB: what came is not sent again",
  async () => {
    // A busy machine may take longer than the minute for which content is fresh.
    const kept = "proxy_ignore_headers Cache-Control; proxy_cache_valid 200 1h;";
    await using setup = await withNginx(`${LOCK} ${kept}`, { breaksAfter: 8_000_000 });
    const { server, nginx, line, world } = setup;
    const large = noise(30_000_000, 3);
    rmSync(world.at("releases/1.0.1"), { recursive: true });
    rmSync(world.at("releases/firmware_1.0.1.bin"));
    world.release("1.0.2", { "sd/large.bin": large });
    await eventually("it is offered", () => server.releases.includes("1.0.2"));
    const root = world.at("device");
    layTree(root, V1);
    const outcome = await new HttpOTA(line.url, { root, ver: "1.0.0", jobs: 1 }).update();
    expect(outcome).toMatchObject({ result: "updated", to: "1.0.2" });
    expect(readTree(root)).toEqual(asTree({ "sd/large.bin": large, ...own("1.0.2") }));
    expect(line.broken).toBe(3);
    // And a part is what was asked for.
    const part = await fetch(`${nginx.url}/1.0.2/sd/large.bin`, {
      headers: { Range: "bytes=1000-1999", "Accept-Encoding": "identity" },
    });
    expect([part.status, part.headers.get("x-cache")]).toEqual([206, "HIT"]);
    expect(sha256(await part.bytes())).toBe(sha256(large.subarray(1000, 2000)));
    // The server has sent it once, whole.
    await eventually("it is logged", () => {
      return server.requests.some(({ path }) => path === "/1.0.2/sd/large.bin");
    });
    const sent = server.requests.filter(({ path }) => path === "/1.0.2/sd/large.bin");
    expect(sent.map(({ status, bytes }) => [status, bytes])).toEqual([[200, large.length]]);
  },
);
