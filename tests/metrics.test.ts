/**
 * What a server tells those who watch it: numbers in Prometheus's format, and whether it is well. Set
 * SEED to repeat a run.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, renameSync, rmSync } from "node:fs";
import { TOOL_VERSION } from "../ota.ts";
import { Random, seeded } from "./helpers/random.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { eventually, until } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const SEED = seeded("metrics");

const TREE: Tree = {
  "1.0.0/flash/main.py": `${"a line that is there again and again\n".repeat(100)}# one\n`,
  "1.0.1/flash/main.py": `${"a line that is there again and again\n".repeat(100)}# two\n`,
  "1.0.1/flash/lib/a b.py": "x",
  "firmware_1.0.1.bin": Buffer.alloc(5000, 0x80),
  "notes.txt": "notes",
};

/** Prometheus's text format, strictly: sample → value; every one has its type and help before it. */
function readMetrics(text: string): Map<string, number> {
  const samples = new Map<string, number>();
  const helped = new Set<string>();
  const typed = new Set<string>();
  expect(text).toEndWith("\n");
  for (const line of text.trimEnd().split("\n")) {
    const help = /^# HELP ([a-z_]+) \S.*$/.exec(line)?.[1];
    const type = /^# TYPE ([a-z_]+) (?:counter|gauge)$/.exec(line)?.[1];
    if (help) {
      expect(helped.has(help)).toBe(false);
      helped.add(help);
    } else if (type) {
      expect(typed.has(type)).toBe(false);
      typed.add(type);
    } else {
      const label = '[a-z_]+="[^"\\\\\\n]*"';
      const sample = new RegExp(
        `^([a-z_]+)(\\{${label}(?:,${label})*\\})? (\\d+(?:\\.\\d+)?(?:e-?\\d+)?)$`,
      );
      const [, name = "", labels = "", value] = sample.exec(line) ?? [];
      expect([line, name !== ""]).toEqual([line, true]);
      expect([line, helped.has(name) && typed.has(name)]).toEqual([line, true]);
      expect([line, samples.has(name + labels)]).toEqual([line, false]);
      samples.set(name + labels, Number(value));
    }
  }
  return samples;
}

describe("/-/metrics", () => {
  /** A server in this process, and what it tells. */
  class Watched extends World {
    async metrics(): Promise<Map<string, number>> {
      const response = await fetch(`${this.url}/-/metrics`);
      expect(response.headers.get("content-type")).toBe("text/plain; version=0.0.4");
      return readMetrics(await response.text());
    }
  }
  const watched = () => Watched.with({}, { beside: TREE });

  test("tells of the releases, the scan and the build", async () => {
    const started = performance.now();
    await using server = await watched();
    const metrics = await server.metrics();
    expect(metrics.get("ota_releases")).toBe(2);
    expect(metrics.get("ota_firmware")).toBe(1);
    expect(metrics.get("ota_scan_seconds")).toBeGreaterThan(0);
    // It is a part of what has passed since, in seconds.
    const passed = (performance.now() - started) / 1000;
    expect(metrics.get("ota_scan_seconds")).toBeLessThan(passed);
    expect(metrics.get(`ota_build_info{version="${TOOL_VERSION}"}`)).toBe(1);
    server.remove("releases/1.0.0");
    const releases = async () => (await server.metrics()).get("ota_releases");
    await until("there is one release", releases, (count) => count === 1, 60);
  });

  test("counts requests by status, and the bytes of bodies", async () => {
    await using server = await watched();
    const count = async (target: string, init: RequestInit = {}) => {
      const response = await fetch(server.url + target, {
        ...init,
        headers: { "Accept-Encoding": "identity", ...init.headers },
      });
      return (await response.bytes()).length;
    };
    const before = await server.metrics();
    const own = before.get("ota_sent_bytes_total") ?? 0;
    let bytes = 0;
    bytes += await count("/notes.txt");
    bytes += await count("/1.0.1/flash/main.py");
    bytes += await count("/1.0.1/flash/main.py", { headers: { Range: "bytes=0-9" } });
    bytes += await count("/1.0.1/flash/main.py", { method: "HEAD" });
    bytes += await count("/none");
    bytes += await count("/notes.txt", { method: "DELETE" });
    bytes += await count("/manifest.json?current_ver=%00");
    bytes += await count("/manifest.json");
    const after = await server.metrics();
    const status = (code: number) => after.get(`ota_requests_total{status="${code}"}`);
    // Four, and what asked for the numbers before.
    expect([200, 206, 400, 404, 405].map(status)).toEqual([5, 1, 1, 1, 1]);
    const first = after.get("ota_sent_bytes_total")! - own;
    // The first text of numbers was sent after it was made.
    expect(first - bytes).toBeGreaterThan(500);
    expect(first - bytes).toBeLessThan(5000);
  });

  test("counts the bytes that coding saves", async () => {
    await using server = await watched();
    const headers = { "Accept-Encoding": "gzip" };
    const url = `${server.url}/1.0.1/flash/main.py`;
    const response = await fetch(url, { headers, decompress: false });
    const { length } = await response.bytes();
    const saved = String(TREE["1.0.1/flash/main.py"]).length - length;
    expect(saved).toBeGreaterThan(0);
    expect((await server.metrics()).get("ota_saved_bytes_total")).toBe(saved);
  });

  test("counts manifests by from and to, and failures by version", async () => {
    await using server = await watched();
    const get = (query: string) => fetch(`${server.url}/manifest.json?${query}`);
    await get("current_ver=1.0.0");
    await get("current_ver=1.00.0&failed=1.0.1");
    await get("current_ver=1.0.1");
    await get("");
    await get("current_ver=");
    await get("current_ver=0.7&failed=9.9");
    await get("current_ver=1.0.1&firmware_ver=1.0.0");
    const metrics = await server.metrics();
    const manifests = (from: string, to: string) =>
      metrics.get(`ota_manifests_total{from="${from}",to="${to}"}`);
    expect(manifests("1.0.0", "1.0.1")).toBe(2);
    expect(manifests("1.0.1", "none")).toBe(1);
    expect(manifests("1.0.1", "firmware")).toBe(1);
    expect(manifests("none", "1.0.1")).toBe(2);
    expect(manifests("other", "1.0.1")).toBe(1);
    expect(metrics.get('ota_failures_total{version="1.0.1"}')).toBe(1);
    expect(metrics.get('ota_failures_total{version="other"}')).toBe(1);
  });

  test("has as many lines as there are releases, whatever is asked", async () => {
    await using server = await watched();
    const random = new Random(SEED);
    const odd = ['"', "\\", "\n", "}", "{", ",", "=", " ", "\u{1f680}", "1", ".", "a"];
    const word = () =>
      Array.from({ length: 1 + random.below(20) }, () => random.pick(odd)).join("");
    const some = () => encodeURIComponent(random.chance(0.5) ? word() : `${random.next()}`);
    const ask = async () => {
      const query = `current_ver=${some()}&failed=${some()}&firmware_ver=${some()}&${some()}=1`;
      const method = random.pick(["GET", "HEAD", "PUT", "OPTIONS"]);
      const path = random.pick([`/manifest.json?${query}`, `/${some()}`, "/notes.txt"]);
      await (await fetch(server.url + path, { method })).body?.cancel();
    };
    for (let i = 0; i < 40; i++) await Promise.all(Array.from({ length: 25 }, ask));
    const metrics = await server.metrics();
    expect(metrics.size).toBeLessThan(40);
    const values = [...metrics.keys()].flatMap((key) =>
      [...key.matchAll(/(?:from|to|version)="([^"]*)"/g)].map(([, value]) => value!),
    );
    const known = ["1.0.0", "1.0.1", "firmware", "none", "other", TOOL_VERSION];
    expect(values.filter((value) => !known.includes(value))).toEqual([]);
  });
});

describe("/-/health", () => {
  test("200 with a version or an image; 503 with the reason without, and without a root", async () => {
    using temp = new Temp();
    mkdirSync(temp.at("root"));
    await using server = await Served.start(temp.at("root"));
    const health = async () => {
      const response = await fetch(`${server.url}/-/health`);
      return [response.status, await response.text()] as const;
    };
    const settles = (status: number) =>
      eventually(`health is ${status}`, async () => (await health())[0] === status, 60);
    expect(await health()).toEqual([503, "the root has no version\n"]);
    layTree(temp.at("root"), { "1.0.0/a": "a" });
    await settles(200);
    renameSync(temp.at("root"), temp.at("away"));
    expect(await health()).toEqual([503, expect.stringContaining("cannot be read")]);
    renameSync(temp.at("away"), temp.at("root"));
    expect((await health())[0]).toBe(200);
    rmSync(temp.at("root/1.0.0"), { recursive: true });
    layTree(temp.at("root"), { "firmware_1.0.0.bin": "image" });
    await settles(200);
  });

  test("behind the token when there is one, as are the metrics", async () => {
    await using server = await World.with({}, { beside: TREE, token: "T" });
    for (const path of ["/-/health", "/-/metrics"]) {
      expect((await fetch(server.url + path)).status).toBe(401);
      expect((await fetch(`${server.url + path}?token=T`)).status).toBe(200);
    }
  });
});
