/**
 * The page, as programs see it and in a real browser: Debian's Chromium. The server runs in this
 * process. `SCREENSHOTS=1` keeps what the browser saw.
 */

import { Database } from "bun:sqlite";
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { rename } from "node:fs/promises";
import { resolve } from "node:path";
import {
  Fleet,
  ROLLOUT_DEFAULTS,
  type DevicePage,
  type FleetDevice,
  serve,
  type FleetServer,
  type RolloutOptions,
  type ServeOptions,
} from "../ota.ts";
import { Browser, endBrowser, type BrowserOptions } from "./helpers/browser.ts";
import { Stores } from "./helpers/fleet.ts";
import { layFleet, type Said } from "./helpers/laid-fleet.ts";
import { Time } from "./helpers/rollout.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { run, until } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const EXAMPLE = resolve(import.meta.dir, "../examples/smart-meter");
const TREE: Tree = {
  "1.0.0/flash/main.py": "one\n",
  "1.0.1/flash/main.py": "two\n",
};
/** What a device would be called by somebody who means harm. */
const EVIL = `"><img src=x onerror=document.title='owned'><script>document.title='owned'</script>`;

/** A server and who looks at it. */
class Paged extends Temp implements AsyncDisposable {
  server!: FleetServer;
  readonly token = crypto.randomUUID();
  #cookie = "";

  /** @param said what devices have said before it starts */
  static async start(
    options: ServeOptions = {},
    tree: Tree = TREE,
    said: readonly Said[] = [],
  ): Promise<Paged> {
    const paged = new Paged();
    if (said.length > 0) await layFleet(paged.at("fleet.db"), said);
    layTree(paged.at("root"), tree);
    paged.server = await serve({
      ...{ root: paged.at("root"), port: 0, host: "127.0.0.1", quiet: 0 },
      ...{ adminToken: paged.token, fleet: paged.at("fleet.db"), ...options },
    });
    return paged;
  }

  /** A server whose store has this in it already. */
  static laid(all: readonly Said[], options: ServeOptions = {}, tree: Tree = TREE) {
    return Paged.start(options, tree, all);
  }

  /** The address of a view. */
  at_(path = ""): string {
    return `${this.server.url.origin}/-/${path}`;
  }

  /** Asks as a browser that has signed in. */
  async ask(path: string, init: RequestInit = {}): Promise<Response> {
    this.#cookie ||= (await fetch(this.at_(`?token=${this.token}`), { redirect: "manual" })).headers
      .get("set-cookie")!
      .split(";")[0]!;
    const headers = { Cookie: this.#cookie, ...(init.headers as Record<string, string>) };
    return await fetch(this.at_(path), { redirect: "manual", ...init, headers });
  }

  async html(path = "", status = 200): Promise<string> {
    const response = await this.ask(path);
    expect([path, response.status]).toEqual([path, status]);
    return await response.text();
  }

  /**
   * Sends a form that is on a view, as a browser does that is to send no referrer.
   *
   * @param page the view, if it was read before
   */
  async post(
    view: string,
    path: string,
    fields: Record<string, string>,
    page?: string,
  ): Promise<Response> {
    const text = page ?? (await this.html(view));
    const hidden = text.matchAll(/name="(proof|seen-\w+)"[^>]*? value="([^"]*)"/g);
    const given = Object.fromEntries(
      [...hidden].map(([, name, value]) => [name, unescaped(value!)]),
    );
    const body = new URLSearchParams({ ...given, ...fields });
    return await this.ask(path, { method: "POST", body, headers: { Origin: "null" } });
  }

  /** Devices only report, and are offered nothing. */
  async report(...queries: Record<string, string>[]): Promise<void> {
    await this.visit(...queries.map((query) => ({ ...query, method: "HEAD" })));
  }

  /** Devices ask for a manifest, and the store knows. */
  async visit(...queries: Record<string, string>[]): Promise<void> {
    for (const { method = "GET", ...query } of queries) {
      const all = Object.entries({ current_ver: "1.0.0", ...query });
      // Not as forms have it: to devices, a plus is a plus.
      const search = all.map(([name, value]) => `${name}=${encodeURIComponent(value)}`);
      const response = await fetch(`${this.server.url.origin}/manifest.json?${search.join("&")}`, {
        method,
      });
      expect(response.status).toBe(200);
      await response.bytes();
    }
    await this.server.fleet!.flush();
  }

  /** A browser that has signed in; the newest comes ten times as often. */
  async browse(options: BrowserOptions = {}, path = ""): Promise<Browser> {
    const browser = await Browser.open(options);
    await browser.before(`const later = setTimeout;
      globalThis.setTimeout = (work, milliseconds) => later(work, milliseconds / 10);`);
    await browser.go(this.at_(`?token=${this.token}`));
    if (path !== "") await browser.go(this.at_(path));
    return browser;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server[Symbol.asyncDispose]();
    this[Symbol.dispose]();
  }
}

afterAll(endBrowser);

/** An attribute as a browser reads it. */
function unescaped(value: string): string {
  const names = { amp: "&", lt: "<", gt: ">", quot: '"', "#x27": "'" };
  return value.replace(/&(#?\w+);/g, (_, name) => names[name as keyof typeof names]);
}

/** The text of HTML, as far as a person would see it. */
function textOf(page: string): string {
  const apart = page.replace(/<\/(td|th|li|summary|button|ul|h\d|dt|dd|p)>/g, " ");
  return apart
    .replace(/<[^>]*>/g, "")
    .replace(/\s+/g, " ")
    .trim();
}

const VIEWS = ["", "devices", "devices/a", "rollouts/new?version=1.0.1"];

describe("as programs see it", () => {
  test("every view: HTML that may load nothing but from here, and is kept nowhere", async () => {
    await using paged = await Paged.start();
    await paged.visit({ devid: "a" });
    for (const view of [...VIEWS, "devices/none"]) {
      for (const method of ["GET", "HEAD"]) {
        const { status, headers } = await paged.ask(view, { method });
        expect([view, status]).toEqual([view, view.endsWith("none") ? 404 : 200]);
        expect(headers.get("content-type")).toBe("text/html; charset=utf-8");
        expect(headers.get("cache-control")).toBe("no-store");
        expect(headers.get("x-content-type-options")).toBe("nosniff");
        expect(headers.get("referrer-policy")).toBe("no-referrer");
        const policy = headers.get("content-security-policy")!.split("; ");
        expect(policy).toContain("default-src 'none'");
        expect(policy).toContain("frame-ancestors 'none'");
        for (const rule of policy) expect(rule).toMatch(/^[a-z-]+ '(self|none)'$/);
      }
      const page = await paged.html(view, view.endsWith("none") ? 404 : 200);
      // No address but relative ones, and nothing that the policy forbids.
      expect(page).not.toMatch(/(src|href|action)="(https?:|\/\/|\/)/);
      expect(page).not.toMatch(/ style="|<style| on[a-z]+="|javascript:/);
      expect(page).toStartWith("<!doctype html>");
    }
  });

  test("style, script and icon: for everybody, since they are the same for all", async () => {
    await using paged = await Paged.start();
    const page = await paged.html();
    const types = { css: "text/css", js: "text/javascript", svg: "image/svg+xml" };
    for (const [ending, type] of Object.entries(types)) {
      const [, path] = new RegExp(`"\\./(page\\.${ending}[^"]*)"`).exec(page)!;
      const response = await fetch(paged.at_(path!));
      expect(response.status).toBe(200);
      expect(response.headers.get("content-type")).toStartWith(type);
      expect(response.headers.get("x-content-type-options")).toBe("nosniff");
      expect(await response.text()).not.toMatch(/https?:(?!\/\/www\.w3\.org\/2000\/svg)/);
    }
  });

  test("without a cookie: 401 and the form to sign in; a wrong token costs a second", async () => {
    await using paged = await Paged.start();
    for (const view of VIEWS) {
      const response = await fetch(paged.at_(view));
      expect([view, response.status]).toEqual([view, 401]);
      const text = await response.text();
      expect(text).toContain(`action="${view.includes("/") ? "../" : "./"}sign-in"`);
      expect(text).not.toContain("Devices");
      expect(response.headers.get("content-security-policy")).toContain("default-src 'none'");
    }
    const signIn = (token: string) =>
      fetch(paged.at_("sign-in"), {
        ...{ method: "POST", redirect: "manual" as const },
        body: new URLSearchParams({ token }),
      });
    for (const token of ["", "wrong", `${paged.token}x`]) {
      const started = performance.now();
      const refused = await signIn(token);
      expect(performance.now() - started).toBeGreaterThan(990);
      expect([refused.status, refused.headers.get("set-cookie")]).toEqual([401, null]);
      expect(await refused.text()).toContain("That is not the token");
    }
    const entered = await signIn(paged.token);
    expect([entered.status, entered.headers.get("location")]).toEqual([303, "./"]);
    expect(entered.headers.get("set-cookie")).toMatch(/; HttpOnly; SameSite=Strict$/);
  });

  test("forms change only what a page of ours has asked for", async () => {
    await using paged = await Paged.start();
    await paged.visit({ devid: "a" });
    const nameOf = async () => (await paged.server.fleet!.device("a"))!.name;
    const body = () => new URLSearchParams({ name: "x", labels: "" });
    for (const Origin of [undefined, "null", "http://evil.example"]) {
      const headers: Record<string, string> = Origin === undefined ? {} : { Origin };
      const init = { method: "POST", body: body(), headers };
      expect((await paged.ask("devices/a", init)).status).toBe(403);
      const wrong = { ...init, body: new URLSearchParams({ name: "x", proof: "wrong" }) };
      expect((await paged.ask("devices/a", wrong)).status).toBe(403);
      expect((await paged.ask("rollouts", init)).status).toBe(403);
      expect((await paged.ask("sign-out", init)).status).toBe(403);
    }
    expect(await nameOf()).toBeNull();
    // Without a cookie, a proof is worth nothing.
    const proof = /name="proof"[^>]*? value="([^"]+)"/.exec(await paged.html("devices/a"))![1]!;
    const stranger = { method: "POST", body: new URLSearchParams({ name: "x", proof }) };
    expect((await fetch(paged.at_("devices/a"), stranger)).status).toBe(401);
    expect(await nameOf()).toBeNull();
    const saved = await paged.post("devices/a", "devices/a", { name: "x", labels: "" });
    expect([saved.status, saved.headers.get("location")]).toEqual([303, "../devices/a"]);
    expect(await nameOf()).toBe("x");
    const Origin = paged.server.url.origin;
    const fields = { "seen-name": "x", name: "y" };
    const named = { method: "POST", body: new URLSearchParams(fields), headers: { Origin } };
    expect((await paged.ask("devices/a", named)).status).toBe(303);
    const out = await paged.post("", "sign-out", {});
    expect(out.headers.get("set-cookie")).toContain("Max-Age=0");
  });

  test("labels: as they are typed; what is none is said, and stays typed", async () => {
    await using paged = await Paged.start();
    await paged.visit({ devid: "a" });
    const save = (labels: string, name = "") =>
      paged.post("devices/a", "devices/a", { name, labels });
    const labels = async () => (await paged.server.fleet!.device("a"))!.labels;
    expect((await save(" site = north \r\n\r\nkey=a=b\r\n", "Meter")).status).toBe(303);
    expect(await labels()).toEqual({ site: "north", key: "a=b" });
    expect((await save("key=c")).status).toBe(303);
    expect(await labels()).toEqual({ key: "c" });
    for (const wrong of ["north", "=x", "site=", `site=${"x".repeat(129)}`]) {
      const refused = await save(wrong, "kept");
      expect([wrong, refused.status]).toEqual([wrong, 400]);
      const page = await refused.text();
      expect(page).toContain('role="alert"');
      expect(page).toContain(`${wrong}</textarea`);
      expect(page).toContain('value="kept"');
    }
    expect(await labels()).toEqual({ key: "c" });
  });

  test("what others changed since a device was shown stays; where both changed it, that is said", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const fleet = paged.server.fleet!;
    await fleet.edit("a", {
      name: "Mill",
      labels: { site: "north", ring: "1", row: "7", " k": " v " },
    });
    const shown = await paged.html("devices/a");
    const LINES = ["ring=1", "row=7", "site=north", " k= v "];
    const save = (name: string, lines: readonly string[], page = shown) =>
      paged.post("", "devices/a", { name, labels: lines.join("\n") }, page);
    const found = async () => {
      const { name, labels } = (await fleet.device("a"))!;
      return { name, labels };
    };
    await fleet.edit("a", { name: "Old mill", labels: { canary: "yes", ring: null, row: "8" } });
    // Only what was typed: of the rest, what others have made of it.
    expect((await save("Mill", LINES.with(2, "site=south"))).status).toBe(303);
    const labels = { site: "south", canary: "yes", row: "8", " k": " v " };
    expect(await found()).toEqual({ name: "Old mill", labels });
    const both = await save("New mill", ["ring=2", "row=9", "site=east", " k= v "]);
    expect(both.status).toBe(409);
    const page = await both.text();
    for (const conflict of [
      "the name: somebody else made it Old mill",
      "the label row: somebody else made it 8",
      "the label site: somebody else made it south",
    ]) {
      expect(page).toContain(conflict);
    }
    expect(await found()).toEqual({ name: "Old mill", labels });
    // The form then has what was typed, and all that others did beside that: it can be saved as it is.
    const [, name] = /name="name"\s+value="([^"]*)"/.exec(page)!;
    const [, lines] = /<textarea[^>]*>\n([^]*?)<\/textarea/.exec(page)!;
    expect((await save(name!, lines!.split("\n"), page)).status).toBe(303);
    const merged = { site: "east", canary: "yes", row: "9", ring: "2", " k": " v " };
    expect(await found()).toEqual({ name: "New mill", labels: merged });
    // What somebody else has removed, or made of what is to be removed.
    const later = await paged.html("devices/a");
    await fleet.edit("a", { labels: { row: "10", ring: null } });
    const removed = await save("New mill", ["site=east", "canary=yes", "ring=3", " k= v "], later);
    expect(removed.status).toBe(409);
    const text = await removed.text();
    expect(text).toContain("the label row: somebody else made it 10");
    expect(text).toContain("the label ring: somebody else removed it");
    // Both have done the same: there is nothing to say.
    expect(
      (await save("New mill", ["site=east", "canary=yes", "row=10", " k= v "], later)).status,
    ).toBe(303);
    expect((await found()).labels).toEqual({ site: "east", canary: "yes", row: "10", " k": " v " });
  });

  test("after a line that is no label, what others did meanwhile still stays", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const fleet = paged.server.fleet!;
    const shown = await paged.html("devices/a");
    await fleet.edit("a", { name: "Mill", labels: { canary: "yes" } });
    const refused = await paged.post("", "devices/a", { name: "", labels: "site" }, shown);
    expect(refused.status).toBe(400);
    const page = await refused.text();
    expect(page).toContain("\nsite</textarea");
    expect((await paged.post("", "devices/a", { name: "", labels: "site=x" }, page)).status).toBe(
      303,
    );
    const { name, labels } = (await fleet.device("a"))!;
    expect({ name, labels }).toEqual({ name: "Mill", labels: { canary: "yes", site: "x" } });
    const twice = await paged.post("devices/a", "devices/a", { name: "", labels: "k=1\nk=2" });
    expect(twice.status).toBe(400);
    expect(await twice.text()).toContain("the label k: once at most");
    const beside = { name: "Mill", labels: "canary=yes\nsite=x\nsite=y" };
    const besides = await paged.post("devices/a", "devices/a", beside);
    expect([besides.status, (await fleet.device("a"))!.labels]).toEqual([
      400,
      { canary: "yes", site: "x" },
    ]);
  });

  test("64 of the longest labels can be shown and saved", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const long = (i: number) => `${"ж".repeat(118)}${String(i).padStart(10, "0")}`;
    const labels = Object.fromEntries(Array.from({ length: 64 }, (_, i) => [long(i), long(i)]));
    await paged.server.fleet!.edit("a", { labels });
    const page = await paged.html("devices/a");
    expect(Buffer.byteLength(page)).toBeLessThan(100_000);
    const [, lines] = /<textarea[^>]*>\n([^]*?)<\/textarea/.exec(page)!;
    const saved = await paged.post("", "devices/a", { name: "x", labels: lines! }, page);
    expect(saved.status).toBe(303);
    const { name, labels: kept } = (await paged.server.fleet!.device("a"))!;
    expect({ name, kept }).toEqual({ name: "x", kept: labels });
  });

  test("labels that nobody can type stay as they are, and can be removed", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const odd = { blank: "  ", " k": " v ", k: "w", a: "b=c", constructor: "x" };
    await paged.server.fleet!.edit("a", { labels: odd });
    const save = async (labels: (lines: string) => string) => {
      const page = await paged.html("devices/a");
      const [, lines] = /<textarea[^>]*>\n([^]*?)<\/textarea/.exec(page)!;
      const fields = { name: "", labels: labels(unescaped(lines!)) };
      expect((await paged.post("", "devices/a", fields, page)).status).toBe(303);
      return (await paged.server.fleet!.device("a"))!.labels;
    };
    const more = await save((lines) => `${lines}\ntoString=1`);
    expect(Object.entries(more)).toContainEqual(["toString", "1"]);
    expect(Object.keys(more)).toHaveLength(6);
    expect(await save(() => "a=b=c")).toEqual({ a: "b=c" });
    expect(await save((lines) => lines)).toEqual({ a: "b=c" });
    await paged.server.fleet!.edit("a", { labels: { " a": "b=c" } });
    expect(await save((lines) => lines)).toEqual({ a: "b=c", " a": "b=c" });
    expect(await save(() => "")).toEqual({});
  });

  test("what strangers say is text, wherever it stands", async () => {
    const evil = EVIL.slice(0, 100);
    await using paged = await Paged.start({}, { ...TREE, "1.0.2<b>/flash/main.py": "x" });
    const query = { devid: evil, model: evil, current_ver: evil, firmware_ver: evil, failed: evil };
    await paged.visit({ devid: "a" }, query, { devid: "\u202eabc" }, { devid: ".." });
    const fleet = paged.server.fleet!;
    await fleet.edit(evil.toLowerCase(), { name: evil, labels: { "<i>": "<u>" } });
    const id = encodeURIComponent(evil.toLowerCase());
    const search = `devices?q=${id}&label=${encodeURIComponent("<i>=<u>")}&version=${id}`;
    for (const view of ["", "devices", `devices/${id}`, search, "devices/?id=.."]) {
      const page = await paged.html(view);
      expect(page).not.toMatch(/<(img|script>|i>|u>)/i);
      expect(page).not.toContain("\u202e");
    }
    expect(await paged.html("devices")).toContain("\\u{202e}abc");
    expect(await paged.html("devices")).toContain('href="./devices/?id=.."');
    expect(await paged.html(`rollouts/new?version=${id}`, 400)).not.toMatch(/<img|<script>/i);
  });

  test("the list begins with what needs a person, page by page, whatever is searched", async () => {
    const said: Said[] = [];
    for (let i = 0; i < 130; i++) {
      const id = `d${String((i * 37) % 130).padStart(3, "0")}`;
      if (i % 5 === 0) said.push({ id, query: { failed: "1.0.1" }, to: "1.0.1" });
      else if (i % 5 === 1) said.push({ id, to: "1.0.1", ago: 7200_000 });
      else if (i % 5 === 2) said.push({ id, to: "1.0.1", ago: 1000 });
      else said.push({ id, version: i % 5 === 3 ? "1.0.0" : "1.0.1" });
    }
    await using paged = await Paged.laid(said);
    const ranks = ["failed", "silent", "offered", "behind", "current"];
    for (const search of ["", "q=D0", "state=offered", "version=1.0.0", "q=d&version=1.0.0"]) {
      const found: [rank: number, id: string][] = [];
      for (let next: string | undefined = `devices?${search}`; next !== undefined;) {
        const page: string = await paged.html(next);
        for (const [, id, state] of page.matchAll(/href="\.\/devices\/(\w+)"[^]*?is-(\w+)"/g)) {
          found.push([ranks.indexOf(state!), id!]);
        }
        next = /rel="next"\s+href="\.\/([^"]+)"/.exec(page)?.[1]!.replaceAll("&amp;", "&");
      }
      const sorted = found.toSorted(([a, x], [b, y]) => a - b || (x < y ? -1 : 1));
      expect([search, found]).toEqual([search, sorted]);
      const parameters = new URLSearchParams(search);
      const { devices } = await paged.server.fleet!.devices({
        ...(Object.fromEntries(parameters) as object),
        limit: 1000,
      });
      expect(found.map(([, id]) => id).sort()).toEqual(devices.map(({ id }) => id));
      expect(new Set(found.map(([, id]) => id)).size).toBe(found.length);
    }
  });

  test("a search finds the same whether many or few are like that, in either store", async () => {
    const said: Said[] = [];
    for (let i = 0; i < 5000; i++) {
      const id = `${i % 1000 === 7 ? "rare-É" : "d"}${String((i * 37) % 5000).padStart(4, "0")}`;
      const query = { sysname: i % 2500 === 9 ? "LoPy4" : "FiPy" };
      if (i % 500 === 3) said.push({ id, query: { ...query, failed: "1.0.1" }, to: "1.0.1" });
      else said.push({ id, query, version: i % 2 ? "1.0.0" : "1.0.1" });
    }
    await using stores = await Stores.start();
    for (const [, kind] of stores.each) {
      const url = await kind.place();
      await layFleet(url, said);
      const clock = { now: () => Date.now(), elapsed: () => performance.now() };
      const newest = () => ({ version: "1.0.1", firmware: null });
      await using fleet = await Fleet.open({ url, serving: true, tick: 0, newest, clock });
      await fleet.edit("d0003", { name: "The one at the MILL" });
      const all: FleetDevice[] = [];
      for (let after: string | undefined, isMore = true; isMore;) {
        const page = await fleet.devices({ limit: 1000, ...(after !== undefined && { after }) });
        all.push(...page.devices);
        isMore = page.next !== null;
        after = page.next ?? undefined;
      }
      expect(all).toHaveLength(5000);
      const ranks = ["failed", "silent", "offered", "behind", "current"];
      for (const q of [
        "D",
        "rare-é",
        "RARE",
        "mill",
        "lopy",
        "10.0.0.1",
        "no such",
        "d00%",
        "99",
      ]) {
        const has = (text: string | null) => text?.toLowerCase().includes(q.toLowerCase()) === true;
        const expected = all
          .filter(({ id, name, model, address }) => [id, name, model, address].some(has))
          .toSorted((a, b) => {
            return ranks.indexOf(a.state) - ranks.indexOf(b.state) || (a.id < b.id ? -1 : 1);
          })
          .map(({ id }) => id);
        const found: string[] = [];
        let after: string | null = "";
        for (let pages = 0; after !== null && pages < 40; pages++) {
          const page: DevicePage = await fleet.urgent({ q, limit: 50, ...(after && { after }) });
          found.push(...page.devices.map(({ id }) => id));
          after = page.next;
        }
        expect([q, found]).toEqual([q, expected.slice(0, 2000)]);
      }
      // What was just said is found at once.
      await fleet.edit("d0004", { name: "also at the mill" });
      const named = await fleet.urgent({ q: "mill", limit: 50 });
      expect(named.devices.map(({ id }) => id).sort()).toEqual(["d0003", "d0004"]);
    }
  });

  test("each emptiness says what to do next", async () => {
    await using none = await Paged.start({}, {});
    expect(await none.html()).toContain("There is no release yet");
    await using paged = await Paged.start();
    expect(await paged.html()).toContain("No device has asked yet");
    expect(await paged.html("devices")).toContain("No device has asked yet");
    // What it says does what it says.
    const [, command] = /<code>bun ota\.ts ([^<]*)<\/code>/.exec(await paged.html())!;
    const told = command!.replace("./device", paged.at("device")).split(" ");
    expect(told).toContain(paged.server.url.origin);
    expect((await run(told)).code).toBe(0);
    await paged.server.fleet!.flush();
    expect(await paged.html("devices")).toContain("1.0.1");
    await using one = await Paged.laid([{ id: "a", version: "1.0.1" }]);
    const page = await one.html();
    expect(page).toMatch(/The one device is\s+on/);
    expect(page).toContain("No rollout is under way");
    expect(await one.html("devices?q=none")).toContain("No device is like that");
  });

  test("the first view, from top to bottom", async () => {
    await using paged = await Paged.laid([{ id: "a", query: { failed: "1.0.1" }, to: "1.0.1" }]);
    const page = await paged.html();
    const headings = [...page.matchAll(/<h[12][^>]*>([^]*?)(<span class="spans"|<\/h[12]>)/g)].map(
      ([, text]) => textOf(text!),
    );
    expect(headings).toEqual([
      "1 failed, of 1 device",
      "Rollouts",
      "Versions over time",
      "Where devices fail or fall silent",
      "Last seen",
      "Releases",
    ]);
  });

  test("each release: what it is, warnings, costs from each version below, and its form", async () => {
    const tree: Tree = {
      "1.0.0/flash/main.py": "one\n",
      "1.0.1/flash/main.py": "two\n",
      "1.0.2rc1/flash/main.py": "three\n",
      "1.0.2rc1/flash/new/lib.py": "lib\n",
      "firmware_1.0.1.bin": "image",
      "firmware_1.0.3.bin": "image three",
    };
    const on = (id: string, version: string) => ({ id, version });
    const all = [on("a", "1.0.0"), on("b", "1.0.1"), on("c", "1.0.1"), on("d", "9.9.9")];
    await using paged = await Paged.laid(all, {}, tree);
    /** Name → the text of its rows. */
    const rows = async () => {
      const page = await paged.html();
      const parts = page.split(/<tr data-key="release-/).slice(1);
      return new Map(
        parts.map((part) => {
          const text = part.slice(part.indexOf(">") + 1).split("</table>")[0]!;
          return [part.slice(0, part.indexOf('"')), textOf(text)];
        }),
      );
    };
    const found = await until("all costs", rows, (some) => {
      return ![...some.values()].some((text) => text.includes("being worked out"));
    });
    expect([...found.keys()]).toEqual(["1.0.3", "1.0.2rc1", "1.0.1", "1.0.0"]);
    const cost = String.raw`client \d+ B \(\d msg\) · board \d+ B \(\d msg\)`;
    const from = `from 1\\.0\\.1 \\(2 devices\\): ${cost} from 1\\.0\\.0 \\(1 device\\): ${cost}`;
    expect(found.get("1.0.3")).toMatch(
      new RegExp(`^firmware 1\\.0\\.3 newest 11 B not signed 0 Roll out… 1\\.0\\.3 ${from}$`),
    );
    expect(found.get("1.0.2rc1")).toMatch(
      new RegExp(
        `^1\\.0\\.2rc1 2 files 10 B not signed 0 Roll out… 1\\.0\\.2rc1 On the air ${from}`,
      ),
    );
    expect(found.get("1.0.2rc1")).toContain("2 warnings 1.0.2rc1 sorts after 1.0.2");
    expect(found.get("1.0.2rc1")).toContain("from 1.0.0, 1.0.1: 1.0.2rc1 adds the directory");
    expect(found.get("1.0.1")).toMatch(/1 file and firmware 9 B not signed 2 .* from 1\.0\.0/);
    expect(found.get("1.0.0")).toBe("1.0.0 1 file 4 B not signed 1 Roll out… 1.0.0");
    // Of firmware alone, too.
    expect(await paged.html("rollouts/new?version=1.0.3")).toContain("3 devices</b> would get it");
  });

  test("why a device is offered nothing", async () => {
    await using paged = await Paged.start();
    const ON_OLD = { current_ver: "1.0.0" };
    await paged.report({ devid: "a", ...ON_OLD }, ON_OLD);
    const { fleet } = paged.server;
    const why = async (id = "a") => {
      const text = textOf(await paged.html(`devices/${id}`));
      return /Would be offered now (.*?\.) What you call it/.exec(text)![1]!;
    };
    expect(await why()).toMatch(
      /^the files of 1\.0\.1: it is on 1\.0\.0, and 1\.0\.1 is\s+the newest\.$/,
    );
    const rollout = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null };
    const begin = async (options: Partial<RolloutOptions>) => {
      await fleet!.startRollout({ ...rollout, ...options });
      await until(
        "it runs",
        async () => {
          await fleet!.flush();
          return (await fleet!.rollouts())[0]!.state === "running";
        },
        Boolean,
      );
    };
    const expectNothing = async (text: string, id?: string) => {
      expect(await why(id)).toBe(`Nothing. 1.0.1 is the newest; ${text}.`);
      await fleet!.changeRollout("1.0.1", null, "abort");
      await fleet!.flush();
    };
    await begin({ only: [["site", "north"]] });
    await expectNothing("its rollout is only for site=north");
    await begin({});
    await expectNothing(
      "a device that does not say who it is takes no part in rollouts",
      (await fleet!.devices()).devices.find(({ id }) => id !== "a")!.id,
    );
    await begin({});
    await paged.report({ devid: "b", ...ON_OLD }, ON_OLD);
    await expectNothing(
      "its rollout began before this device was heard, which gets it at the end",
      "b",
    );
    await begin({});
    await expectNothing("its rollout has not come to this device yet");
    expect(await why()).toEndWith("its rollout is aborted: by the operator.");
  });

  const ROLLOUT = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null, pauseAt: [] };

  /** A rollout of 1.0.1, and a server that knows of it. */
  async function begun(paged: Paged, options: Partial<RolloutOptions> = {}): Promise<string> {
    const fleet = paged.server.fleet!;
    const { id } = await fleet.startRollout({ ...ROLLOUT, ...options });
    const look = async () => {
      await fleet.flush();
      return (await fleet.rollouts()).find((one) => one.id === id)!.state;
    };
    await until("it runs", look, (state) => state === "running");
    return id;
  }

  /** Lets devices ask until some of them were offered 1.0.1. */
  async function placed(paged: Paged, ids: readonly string[], count: number): Promise<string[]> {
    const ask = async () => {
      await paged.visit(...ids.map((devid) => ({ devid })));
      const { devices } = await paged.server.fleet!.devices({ state: "offered" });
      return devices.map(({ id }) => id);
    };
    return await until("devices are offered it", ask, ({ length }) => length === count);
  }

  test("a button on a page that is behind is refused, and says how the rollout stands", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const fleet = paged.server.fleet!;
    const { id, changed } = await fleet.startRollout(ROLLOUT);
    await fleet.changeRollout("1.0.1", null, "abort");
    const press = async (fields: Record<string, string>) => {
      const seen = { changed: `${changed}`, "went-bad": "0" };
      const answer = await paged.post("devices/a", "rollouts/change", { ...seen, ...fields });
      return { status: answer.status, text: textOf(await answer.text()) };
    };
    const late = await press({ id, action: "pause" });
    expect(late).toMatchObject({ status: 409, text: expect.stringContaining("1.0.1 is aborted") });
    // Another one of the same version is not meant.
    await fleet.startRollout(ROLLOUT);
    const other = await press({ id, action: "abort" });
    expect(other.text).toContain("another rollout of 1.0.1 was begun since: look at it first");
    expect(other.status).toBe(409);
    expect((await fleet.rollouts())[0]!.state).not.toBe("aborted");
    // What asks first says the same; and only what is asked about can be asked for.
    const asked = await paged.html(
      `rollouts/change?id=${id}&changed=0&went-bad=0&action=advance`,
      409,
    );
    expect(textOf(asked)).toContain("the rollout of 1.0.1 is aborted");
    await paged.html("rollouts/change?id=none&changed=0&went-bad=0&action=abort", 404);
    await paged.html(`rollouts/change?id=${id}&changed=0&went-bad=0&action=resume`, 400);
    expect((await press({ id: "none", action: "abort" })).status).toBe(404);
    expect((await press({ id, action: "none" })).status).toBe(400);
    expect((await press({ id, action: "abort", "went-bad": "x" })).status).toBe(400);
  });

  test("resume acknowledges no device that its page did not show, and ends no later pause", async () => {
    await using paged = await Paged.start();
    const ids = ["a", "b", "c"];
    await paged.report(...ids.map((devid) => ({ devid })));
    const id = await begun(paged, { first: 3, tolerance: 0.9 });
    const [first, second] = await placed(paged, ids, 3);
    await paged.report({ devid: first!, failed: "1.0.1" });
    const seenOn = (page: string) => {
      const fields = page.matchAll(/name="(changed|went-bad)" value="(\d+)"/g);
      return Object.fromEntries([...fields].map(([, name, value]) => [name!, value!]));
    };
    const before = seenOn(await paged.html());
    expect(before["went-bad"]).toBe("1");
    await paged.report({ devid: second!, failed: "1.0.1" });
    const resume = (seen: Record<string, string>) =>
      paged.post("devices/a", "rollouts/change", { id, ...seen, action: "resume" });
    const refused = await resume(before);
    expect(refused.status).toBe(409);
    expect(textOf(await refused.text())).toContain("1 more device went bad on 1.0.1 since");
    const { state, acknowledged } = (await paged.server.fleet!.rollouts())[0]!;
    expect([state, acknowledged]).toEqual(["halted", 0]);
    const now = seenOn(await paged.html());
    expect((await resume(now)).status).toBe(303);
    expect((await paged.server.fleet!.rollouts())[0]!.acknowledged).toBe(2);
    expect((await resume(now)).status).toBe(409);
  });

  test("a rollout names its bad devices, also when nothing is offered any more", async () => {
    await using paged = await Paged.start();
    const ids = ["a", "b", "c", "d", "e"];
    await paged.report(...ids.map((devid) => ({ devid, model: "m" })));
    // It goes first: whose turn it is else depends on the id of the rollout.
    await paged.server.fleet!.edit("a", { name: "At the mill", labels: { canary: "yes" } });
    await begun(paged);
    const [first] = await placed(paged, ids, 1);
    await paged.report({ devid: first!, model: "m", failed: "1.0.1" });
    // What is not offered any more no longer fails on it.
    await paged.report({ devid: first!, model: "m" });
    const page = await paged.html();
    expect(page).toContain("Halted at");
    const [, list] = /<ul class="bad"[^>]*>([^]*?)<\/ul>/.exec(page)!;
    expect(textOf(list!)).toBe("failed At the mill m, on 1.0.0");
    expect(list).toContain(`href="./devices/${first}"`);
    const device = textOf(await paged.html(`devices/${first}`));
    expect(device).toContain("Rollout 1.0.1 (halted): it failed here");
    const other = ids.find((id) => id !== first)!;
    expect(textOf(await paged.html(`devices/${other}`))).not.toContain("Rollout 1.0.1");
    // Programs are told the same.
    const answer = await (await paged.ask("api/rollouts")).json();
    const named = { id: first, standing: "failed", name: "At the mill", model: "m" };
    expect(answer).toMatchObject({ rollouts: [{ bad: [{ ...named, version: "1.0.0" }] }] });
    const part = { version: "1.0.1", model: null, state: "halted", standing: "failed" };
    const known = await (await paged.ask(`api/devices/${first}`)).json();
    expect(known).toMatchObject({ rollouts: [part] });
  });

  test("a rollout that waits for bad devices alone says so in the first sentence", async () => {
    const time = new Time();
    await using paged = await Paged.start({ clock: time.clock, tick: 0 });
    const ids = ["a", "b", "c"];
    await paged.report(...ids.map((devid) => ({ devid })));
    await begun(paged, { first: 3, tolerance: 0.9 });
    const [bad, ...good] = await placed(paged, ids, 3);
    await paged.report(...good.map((devid) => ({ devid, current_ver: "1.0.1" })));
    await paged.report({ devid: bad!, failed: "1.0.1" });
    // Devices are counted once a minute.
    time.pass(60_000);
    await paged.server.fleet!.flush();
    const held = "held: only bad devices are left; resume acknowledges them";
    expect(textOf(/<h1>[^]*?<\/h1>/.exec(await paged.html())![0])).toBe(
      `1.0.1 is on its way: 2 of 3 devices proven; ${held}`,
    );
  });

  const headline = async (paged: Paged): Promise<string> => {
    return textOf(/<section class="lead">[^]*?<\/section>/.exec(await paged.html())![0]);
  };

  test("before a rollout begins, while it is open to all, and after it was aborted", async () => {
    await using paged = await Paged.start({ tick: 0 });
    const fleet = paged.server.fleet!;
    await paged.report({ devid: "a" }, { devid: "b" });
    expect(await headline(paged)).toStartWith(
      "2 of 2 devices are on an older release What there is",
    );
    await fleet.startRollout({ ...ROLLOUT, version: "1.0.2" });
    expect(await headline(paged)).toStartWith(
      "The rollout of 1.0.2 waits until that is among the releases",
    );
    await fleet.changeRollout("1.0.2", null, "abort");
    await fleet.startRollout(ROLLOUT);
    expect(await headline(paged)).toStartWith("The rollout of 1.0.1 is about to begin");
    await fleet.flush();
    await fleet.flush();
    await fleet.changeRollout("1.0.1", null, "advance");
    const page = await paged.html();
    expect(textOf(page)).toContain("open to all of its devices at once · proven once on it");
    expect(page).not.toContain('value="advance"');
    expect(await (await paged.ask("api/rollouts")).json()).toMatchObject({
      rollouts: [{ advanced: true }, { advanced: false }],
    });
    await fleet.changeRollout("1.0.1", null, "abort");
    await fleet.flush();
    const aborted = "1.0.1 was aborted: nobody is offered it any more. Start another rollout of it";
    expect(await headline(paged)).toStartWith(`2 of 2 devices are on an older release ${aborted}`);
    expect(textOf(await paged.html())).toContain(`No rollout is under way. ${aborted}`);
    await paged.visit({ devid: "a" });
    expect((await fleet.device("a"))!.offered).toBeNull();
  });

  test("what is held back, is held back from those that it is for", async () => {
    const tree: Tree = {
      ...TREE,
      "1.0.2/flash/main.py": "three\n",
      "lopy4/1.0.1/flash/main.py": "two of lopy4\n",
    };
    await using paged = await Paged.start({ tick: 0 }, tree);
    const fleet = paged.server.fleet!;
    await paged.report({ devid: "a" }, { devid: "b", sysname: "LoPy4" });
    // Names of models have no case.
    const options = { ...ROLLOUT, model: "LOPY4", only: [["site", "north"]] as const };
    await fleet.startRollout(options);
    await fleet.flush();
    const lopy = /releases-lopy4"[^]*?<\/section>/.exec(await paged.html())![0];
    expect(lopy).not.toContain("Roll out…");
    expect(await paged.html("devices/b")).toContain("its rollout is only for");
    await fleet.changeRollout("1.0.1", "LOPY4", "abort");
    const ofLopy = "1.0.1 of LOPY4 was aborted: nobody is offered it any more.";
    expect(await headline(paged)).toContain(ofLopy);
    // Of a model whose devices are all up to date, nothing need be said.
    await paged.report({ devid: "b", sysname: "LoPy4", current_ver: "1.0.1" });
    await fleet.edit("b", {});
    expect(await headline(paged)).not.toContain("aborted");
    await fleet.startRollout({ ...ROLLOUT, version: "1.0.2", only: [["version", "1.0.0"]] });
    await fleet.flush();
    await fleet.changeRollout("1.0.2", null, "advance");
    const answered = async () => {
      await paged.visit({ devid: "a" });
      return (await fleet.device("a"))!.offered;
    };
    await until("it is offered", answered, (offered) => offered === "1.0.2");
    await paged.report({ devid: "a", current_ver: "1.0.2" });
    const state = async () => {
      await fleet.flush();
      return (await fleet.rollouts())[0]!.state;
    };
    await until("it is done", state, (one) => one === "done");
    await paged.report({ devid: "c", current_ver: "1.0.1" });
    await fleet.edit("c", {});
    expect(await headline(paged)).toContain(
      "1.0.2 went to some devices alone (version=1.0.0), and is offered to no others.",
    );
    expect(await paged.html("devices/c")).toContain("its rollout is only for");
  });

  test("a newer image alone is held back, and what it is of is said", async () => {
    const tree = { ...TREE, "firmware_1.0.1.bin": "one", "firmware_1.0.2.bin": "two" };
    await using paged = await Paged.start({ tick: 0 }, tree);
    const fleet = paged.server.fleet!;
    const b = { devid: "b", current_ver: "1.0.0", firmware_ver: "1.0.0" };
    await paged.report({ devid: "a", current_ver: "1.0.1", firmware_ver: "1.0.1" }, b);
    await fleet.startRollout({ ...ROLLOUT, version: "1.0.2" });
    await fleet.changeRollout("1.0.2", null, "abort");
    await fleet.flush();
    expect(await headline(paged)).toContain("1.0.2 was aborted: nobody is offered it any more.");
    const held = "1.0.2 is the newest; its rollout is aborted";
    expect(textOf(await paged.html("devices/a"))).toContain(`Nothing. ${held}`);
    const offer = "the files of 1.0.1 and firmware 1.0.1.";
    expect(textOf(await paged.html("devices/b"))).toContain(`${offer} ${held}`);
  });

  test("an image of the version before makes a step cheaper as soon as it is there", async () => {
    const image = crypto.getRandomValues(new Uint8Array(60_000));
    const tree = { ...TREE, "firmware_1.0.1.bin": image };
    await using paged = await Paged.laid([{ id: "a" }], {}, tree);
    const cost = async () => {
      const page = textOf(await paged.html());
      return Number(/from 1\.0\.0 \(1 device\): client .*? · board ([\d.]+) KB/.exec(page)?.[1]);
    };
    expect(await until("the cost", cost, (one) => one > 0)).toBeGreaterThan(60);
    await Bun.write(paged.at("root/firmware_1.0.0.bin"), image);
    await until("another cost", cost, (one) => !(one > 60));
  });

  test("a rollout whose release was taken away says so", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    await begun(paged);
    await rename(paged.at("root/1.0.1"), paged.at("root/.gone"));
    const lead = await until(
      "the server sees it",
      () => headline(paged),
      (text) => text.includes("any more"),
    );
    expect(lead).toStartWith("1.0.1 is not among the releases any more: 0 of 1 device proven");
    expect(textOf(await paged.html())).toContain("It is not among the releases any more: nobody");
    await rename(paged.at("root/1.0.0"), paged.at("root/.gone0"));
    const sees = async () => (await paged.html()).includes("Once there is a release");
    await paged.server.fleet!.changeRollout("1.0.1", null, "abort");
    await until("the server sees that all is gone", sees, Boolean);
    expect(await headline(paged)).toStartWith("There is no release any more");
  });

  test("as long as the store is away since the start, nobody can sign in, and that is said", async () => {
    await using paged = await Paged.start({ fleet: await nobody(), adminToken: undefined! });
    for (const [path, init] of [
      ["", {}],
      ["devices/a", {}],
      ["sign-in", { method: "POST", body: new URLSearchParams({ token: "x" }) }],
      ["devices/a", { method: "POST", body: new URLSearchParams({ name: "x" }) }],
    ] as [string, RequestInit][]) {
      const answer = await fetch(paged.at_(path), { ...init, headers: { Cookie: "ota-x=1.x" } });
      expect([path, answer.status]).toEqual([path, 503]);
      const page = await answer.text();
      const isChange = path === "devices/a" && init.method === "POST";
      const next = isChange ? "Nothing was changed. Nobody can sign in" : "Nobody can sign in";
      expect(textOf(page)).toContain(`The fleet&#x27;s store does not answer ${next}`);
      expect(page.includes("data-live")).toBe(!isChange);
      expect(page).not.toContain("127.0.0.1");
    }
  });

  test("versions that are called as what every object has are counted as others are", async () => {
    await using paged = await Paged.laid([
      { id: "a", version: "1.0.0", ago: 3600_000 },
      { id: "b", version: "constructor", ago: 1000 },
      { id: "c", version: "__proto__", ago: 1000 },
    ]);
    const page = await paged.html();
    expect(page).not.toContain("NaN");
    expect(page).not.toContain("native code");
    expect(textOf(page)).toMatch(/constructor 1 .*1\.0\.0 1/);
  });

  test("with 200 rollouts the view stays small, and begins with those that wait for a person", async () => {
    const tree: Tree = {};
    for (let i = 0; i < 40; i++) tree[`model-${i}/1.0.1/flash/main.py`] = "two\n";
    const said = Array.from({ length: 40 }, (_, i) => {
      return { id: `d${i}`, query: { model: `model-${i}` } };
    });
    await using paged = await Paged.laid(said, {}, tree);
    const fleet = paged.server.fleet!;
    const only = Array.from({ length: 60 }, (_, i) => [`key-${i}`, "x".repeat(128)] as const);
    for (let i = 0; i < 200; i++) {
      await fleet.startRollout({ ...ROLLOUT, version: `1.${i}`, model: `model-${i % 40}`, only });
    }
    await fleet.changeRollout("1.7", "model-7", "pause");
    const page = await paged.html();
    expect(Buffer.byteLength(page)).toBeLessThan(100_000);
    expect(page.match(/class="rollout"/g)).toHaveLength(8);
    expect(/<h3>[^]*?<\/h3>/.exec(page)![0]).toContain("1.7 of model-7");
    expect(page).toContain("and 132 rollouts more");
    // Each that has a line has its buttons in a view of its own.
    const links = [...page.matchAll(/href="\.\/(\?rollout=[^"]+)"/g)].map(([, link]) => link!);
    expect(links).toHaveLength(60);
    const one = await paged.html(links.at(-1)!);
    expect(one.match(/class="rollout"/g)).toHaveLength(1);
    expect(one).toContain('value="abort"');
    expect(one).toContain("All rollouts");
  });

  test("lists of devices with the longest names and labels stay small", async () => {
    const odd = (i: number) => `${"ж".repeat(120)}${i}`;
    const id = (i: number) => `${"d".repeat(120)}${i}`;
    const said = Array.from({ length: 50 }, (_, i) => {
      return { id: id(i), version: odd(i), query: { model: odd(i % 3), failed: odd(i) } };
    });
    await using paged = await Paged.laid(said);
    for (let i = 0; i < 50; i++) {
      await paged.server.fleet!.edit(id(i), {
        name: odd(i),
        labels: Object.fromEntries(Array.from({ length: 8 }, (_, k) => [odd(k), odd(k)])),
      });
    }
    expect(Buffer.byteLength(await paged.html("devices"))).toBeLessThan(100_000);
    expect(Buffer.byteLength(await paged.html())).toBeLessThan(100_000);
  });

  test("a server that is staged: a new version gets a rollout by itself", async () => {
    await using paged = await Paged.start({ staged: true });
    await paged.report({ devid: "a" });
    expect(textOf(await paged.html())).toContain("A new version gets one by itself.");
  });

  test("firmware alone: on which image devices are, and that it can be rolled out", async () => {
    const tree = { "firmware_1.0.0.bin": "one", "firmware_1.0.1.bin": "two" };
    await using paged = await Paged.start({}, tree);
    await paged.report({ devid: "a", current_ver: "", firmware_ver: "1.0.0" });
    const page = textOf(await paged.html());
    expect(page).toContain("To go step by step, start one at a release below.");
    expect(page).toMatch(/firmware 1\.0\.0 3 B not signed 1 /);
    await begun(paged);
    const offered = async () => {
      await paged.visit({ devid: "a", current_ver: "", firmware_ver: "1.0.0" });
      return (await paged.server.fleet!.device("a"))!.offered;
    };
    await until("it is offered", offered, (one) => one !== null);
    await paged.report({ devid: "a", current_ver: "", firmware_ver: "1.0.0", failed: "1.0.1" });
    expect(textOf(await paged.html())).toContain("failed a on firmware 1.0.0");
    const form = textOf(await paged.html("rollouts/new?version=1.0.1"));
    expect(form).toMatch(/On version Devices Bar no model firmware 1\.0\.0 1/);
  });

  test("a rollout that is over still says how many were bad", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" }, { devid: "b" });
    await paged.server.fleet!.edit("a", { labels: { canary: "yes" } });
    await begun(paged);
    const [first] = await placed(paged, ["a", "b"], 1);
    await paged.report({ devid: first!, failed: "1.0.1" });
    await paged.server.fleet!.changeRollout("1.0.1", null, "abort");
    const [, past] = /<ul class="past">([^]*?)<\/section>/.exec(await paged.html())!;
    expect(textOf(past!)).toMatch(
      new RegExp(`^1\\.0\\.1 aborted .*, 0 of 2 proven, 1 bad failed ${first} on 1\\.0\\.0`),
    );
  });

  test("costs of all steps are worked out, and kept", async () => {
    const versions = Array.from({ length: 9 }, (_, i) => `1.0.${i}`);
    const tree = Object.fromEntries(versions.map((one) => [`${one}/flash/main.py`, `${one}\n`]));
    const said = versions.map((version) => ({ id: `on-${version}`, version }));
    await using paged = await Paged.laid(said, {}, tree);
    const page = await until(
      "no cost is missing",
      () => paged.html(),
      (text) => !text.includes("being worked out"),
    );
    // From all others to the newest one, and from three at most to each before it.
    expect(page.match(/ msg\)/g)).toHaveLength(2 * (8 + 3 + 3 + 3 + 3 + 3 + 2 + 1));
    expect(await paged.html()).not.toContain("being worked out");
  });

  test("with many models and releases a view stays small; each model has one of its own", async () => {
    const tree: Tree = {};
    const said: Said[] = [];
    for (let model = 0; model < 30; model++) {
      for (let version = 0; version < 20; version++) {
        tree[`model-${model}/1.0.${version}/flash/main.py`] = `${version}\n`;
        const query = { model: `model-${model}` };
        said.push({ id: `m${model}-${version}`, version: `1.0.${version}`, query });
      }
    }
    await using paged = await Paged.laid(said, {}, tree);
    const all = await paged.html();
    expect(Buffer.byteLength(all)).toBeLessThan(100_000);
    const links = [...all.matchAll(/href="\.\/(\?model=[^"]+)"/g)].map(([, link]) => link!);
    const shown = all.match(/aria-labelledby="releases-/g)!.length;
    expect(links.length + shown).toBe(30);
    const one = await paged.html(links[0]!);
    expect(one.match(/aria-labelledby="releases-/g)).toHaveLength(1);
    expect(one.match(/data-key="release-/g)).toHaveLength(20);
    expect(one).toContain("Releases for all models");
  });

  test("of several rollouts that wait for the operator, each is counted", async () => {
    await using paged = await Paged.laid(
      [{ id: "a" }],
      {},
      {
        ...TREE,
        "1.0.2/flash/main.py": "three\n",
        "1.0.3/flash/main.py": "four\n",
      },
    );
    for (const version of ["1.0.1", "1.0.2", "1.0.3"]) {
      await paged.server.fleet!.startRollout({ ...ROLLOUT, version });
      await paged.server.fleet!.changeRollout(version, null, "pause");
    }
    expect(await headline(paged)).toMatch(
      /^Paused at .*: 1\.0\.\d, .* 2 other rollouts wait for you, too\./,
    );
  });

  test("with models, a release counts the devices that it is for", async () => {
    const tree: Tree = {
      ...TREE,
      "lopy4/1.0.0/flash/main.py": "one\n",
      "lopy4/1.0.1/flash/main.py": "two of lopy4\n",
      "lopy4/firmware_1.0.2.bin": "image",
    };
    const lopy = { sysname: "LoPy4" };
    await using paged = await Paged.laid(
      [
        { id: "a" },
        { id: "b", query: { model: "unknown" } },
        { id: "c", version: "1.0.1" },
        { id: "d", query: lopy },
        { id: "e", version: "1.0.1", query: lopy },
        { id: "f", version: "1.0.1", query: lopy },
        { id: "g", version: "1.0.1", query: lopy },
        { id: "h", version: "", query: { ...lopy, firmware_ver: "1.0.2" } },
      ],
      {},
      tree,
    );
    const page = await paged.html();
    const numbers = page
      .split(/aria-labelledby="releases-/)
      .slice(1)
      .map((section) => {
        const rows = section.matchAll(/data-key="release-([^"]+)"[^]*?<td class="n">(\d+)<\/td>/g);
        const froms = [
          ...section.matchAll(/from <bdi>([^<]+)<\/bdi>\s*<span class="hint">\(([^)]+)/g),
        ];
        return [
          section.slice(0, section.indexOf('"')),
          Object.fromEntries([...rows].map(([, name, count]) => [name, Number(count)])),
          froms.map(([, from, count]) => `${from}: ${count}`),
        ];
      });
    expect(numbers).toEqual([
      ["", { "1.0.1": 1, "1.0.0": 2 }, ["1.0.0: 2 devices"]],
      [
        "lopy4",
        { "1.0.2": 1, "1.0.1": 3, "1.0.0": 1 },
        ["1.0.1: 3 devices", "1.0.0: 1 device", "1.0.0: 1 device"],
      ],
    ]);
  });

  test("the form of a rollout: as the command has it, and says what is wrong with what", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const start = async (fields: Record<string, string>) => {
      const all = { version: "1.0.1", model: "", "pause-at": "", ...fields };
      const answer = await paged.post("devices/a", "rollouts", all);
      return { status: answer.status, text: textOf(await answer.text()) };
    };
    for (const [fields, text] of [
      [{ soak: "soon" }, "Soak expects a duration such as 30s, 10m or 1h, found soon"],
      [{ silent: "0" }, "Silent after expects a duration such as 30s, 10m or 1h, found 0"],
      [{ tolerance: "5" }, "Tolerance expects a percentage such as 5%, found 5"],
      [{ "pause-at": "5%, all" }, "Pause at expects a percentage such as 5%, found all"],
      [{ first: "none" }, "First devices expects a number of devices, found none"],
      [{ only: "site" }, "Only expects K=V: a label, model=M or version=V, found site"],
      [{ version: "a/b" }, "a version as its directory is named"],
    ] as const) {
      const found = await start(fields);
      expect([fields, found.status]).toEqual([fields, 400]);
      expect(found.text).toContain(text);
    }
    const typed = { soak: "10m", silent: "2h", tolerance: "2.5 %", "pause-at": "50%, 5%" };
    expect((await start({ ...typed, only: "site=north, ring=1" })).status).toBe(303);
    expect((await paged.server.fleet!.rollouts())[0]).toMatchObject({
      ...{ soak: 600, silent: 7200, tolerance: 0.025, pause_at: [0.05, 0.5] },
      only: [
        ["site", "north"],
        ["ring", "1"],
      ],
    });
    const again = await start({});
    expect(again.status).toBe(409);
    expect(again.text).toContain("a rollout of 1.0.1 is");
    const form = textOf(await paged.html("rollouts/new?version=1.0.2"));
    expect(form).toContain("It is not among the releases: its rollout waits until it is.");
    expect(textOf(await paged.html("rollouts/new?version=1.0.1"))).not.toContain("not among");
    const model = textOf(await paged.html("rollouts/new?version=1.0.1&model=lopy4"));
    expect(model).toContain("It is not among the releases");
  });

  test("a form stays good when its user signs in anew, and a token is taken with spaces around", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const form = await paged.html("devices/a");
    const body = new URLSearchParams({ token: ` ${paged.token}\n` });
    const signIn = { method: "POST", body, redirect: "manual" as const };
    const cookie = (await fetch(paged.at_("sign-in"), signIn)).headers.get("set-cookie")!;
    const [, proof] = /name="proof" value="([^"]+)"/.exec(form)!;
    const saved = await fetch(paged.at_("devices/a"), {
      ...{
        method: "POST",
        redirect: "manual",
        body: new URLSearchParams({ proof: proof!, name: "x" }),
      },
      headers: { Cookie: cookie.split(";")[0]!, Origin: "null" },
    });
    expect(saved.status).toBe(303);
  });

  test("a form whose store is away: 503 and why, with what was typed", async () => {
    await using paged = await Paged.start({ fleet: await nobody() });
    const page = await paged.html("rollouts/new?version=1.0.1&soak=10m", 503);
    expect(page).toContain("does not answer");
    expect(page).toContain('value="10m"');
  });

  test("who signs in sees what was wanted; what was typed is kept, and nothing is done", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    /** What the sign-in page has in its form; and where that leads with the token. */
    const signIn = async (text: string) => {
      const found = /name="to" value="([^"]*)"/.exec(text)?.[1]!.replaceAll("&amp;", "&");
      const body = new URLSearchParams({ token: paged.token, ...(found && { to: found }) });
      const init = { method: "POST", body, redirect: "manual" as const };
      return (await fetch(paged.at_("sign-in"), init)).headers.get("location");
    };
    for (const [path, to] of [
      ["", "./"],
      ["devices?q=a%26b&state=behind", "./devices?q=a%26b&state=behind"],
      ["?span=week", "./?span=week"],
      [
        "rollouts/change?id=x&changed=0&went-bad=0&action=abort",
        "./rollouts/change?id=x&changed=0&went-bad=0&action=abort",
      ],
      ["devices/a%2Fb", "./devices/a%2Fb"],
      ["rollouts/new?version=1.0.1", "./rollouts/new?version=1.0.1"],
      ["nothing", "./"],
      ["sign-in", "./"],
    ] as const) {
      const answer = await fetch(paged.at_(path), { headers: { Accept: "text/html" } });
      expect([path, answer.status, await signIn(await answer.text())]).toEqual([path, 401, to]);
    }
    for (const to of [
      "//evil.example",
      "https://evil.example/",
      "devices\r\nX-Evil: 1",
      "devices/../../x",
      "devices\\..",
      "devices/a/b",
      "..",
      "x",
    ]) {
      const body = new URLSearchParams({ token: paged.token, to });
      const init = { method: "POST", body, redirect: "manual" as const };
      const { headers } = await fetch(paged.at_("sign-in"), init);
      expect([to, headers.get("location")]).toEqual([to, "./"]);
      expect(headers.get("x-evil")).toBeNull();
    }
    const [, proof = ""] = /name="proof" value="([^"]+)"/.exec(await paged.html("devices/a"))!;
    const post = async (path: string, fields: Record<string, string>) => {
      const answer = await fetch(paged.at_(path), {
        ...{ method: "POST", body: new URLSearchParams(fields), headers: { Origin: "null" } },
      });
      expect([path, answer.status]).toEqual([path, 401]);
      expect(answer.headers.get("content-type")).toBe("text/html; charset=utf-8");
      return await answer.text();
    };
    const rollout = await post("rollouts", { proof, version: "1.0.1", soak: "<b>" });
    expect(await signIn(rollout)).toBe("./rollouts/new?version=1.0.1&soak=%3Cb%3E");
    expect(await paged.server.fleet!.rollouts()).toEqual([]);
    const labels = "site=<i>\r\nring=1";
    const edit = await post("devices/a", { proof, name: "Mill", labels });
    expect(edit).toContain("<pre>name: Mill\nlabels: site=&lt;i&gt;\nring=1</pre>");
    expect(edit).toContain("Nothing was changed, since you are not signed in.");
    // A wrong token does not lose it.
    const again = { token: "wrong", typed: "name: Mill", proof, to: "devices/a" };
    expect(await post("sign-in", again)).toContain("<pre>name: Mill</pre>");
    // Another site cannot have its texts shown here.
    for (const wrong of ["", "x"]) {
      expect(await post("devices/a", { name: "Call 555", proof: wrong })).not.toContain("555");
      const typed = { token: "wrong", typed: "Call 555", proof: wrong };
      expect(await post("sign-in", typed)).not.toContain("555");
    }
    expect(await signIn(edit)).toBe("./devices/a");
    expect((await paged.server.fleet!.device("a"))!.name).toBeNull();
    expect(await signIn(await post("rollouts/change", { id: "x", action: "abort" }))).toBe("./");
    // Who reloads what a form was sent to.
    for (const path of ["sign-in", "sign-out", "rollouts"]) {
      const { status, headers } = await paged.ask(path);
      expect([path, status, headers.get("location")]).toEqual([path, 303, "./"]);
    }
  });

  test("a form that is too long is refused as such", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const labels = "x".repeat(262_144);
    const answer = await paged.post("devices/a", "devices/a", { name: "", labels });
    expect(answer.status).toBe(413);
    expect(textOf(await answer.text())).toContain("A form has up to 262144 bytes.");
  });

  test("a filter that is wrong stays in its form, which says what was expected", async () => {
    await using paged = await Paged.start();
    await paged.report({ devid: "a" });
    const page = await paged.html("devices?q=some&label=site", 400);
    expect(page).toContain('value="site"');
    expect(page).toContain('value="some"');
    expect(textOf(page)).toContain("label: expected KEY=VALUE");
    expect(await paged.html("devices?state=x", 400)).toContain('role="search"');
  });

  test("a path that there is not: a page for a browser, a line for a program", async () => {
    await using paged = await Paged.start();
    const program = await paged.ask("nothing");
    expect([program.status, await program.text()]).toEqual([404, "not found\n"]);
    const browser = await paged.ask("nothing", { headers: { Accept: "text/html,*/*" } });
    expect(browser.status).toBe(404);
    expect(textOf(await browser.text())).toContain("There is no such page The fleet");
  });

  test("when devices were last heard is a second old at most in a small fleet", async () => {
    const time = new Time();
    await using paged = await Paged.start({ clock: time.clock, tick: 0 });
    const heard = async () => {
      const row = /within 1 min<\/th>\s*<td class="n">(\d+)/.exec(await paged.html());
      return Number(row?.[1]);
    };
    await paged.report({ devid: "a" });
    expect(await heard()).toBe(1);
    await paged.report({ devid: "b" });
    time.pass(1000);
    expect(await heard()).toBe(2);
  });

  test("what there is not, and what is wrong", async () => {
    await using paged = await Paged.start();
    expect((await paged.ask("devices/none")).status).toBe(404);
    expect((await paged.ask("nothing")).status).toBe(404);
    for (const wrong of [
      "?x=1",
      "devices?state=x",
      "devices/%zz",
      "rollouts/new",
      "devices?q=%00",
      "devices?other=1",
    ]) {
      const { status, headers } = await paged.ask(wrong);
      expect([wrong, status]).toEqual([wrong, 400]);
      expect(headers.get("content-security-policy")).toContain("default-src 'none'");
    }
    for (const path of ["", "nothing", "sign-out", "devices/a", "page.css", "api/fleet", "%zz"]) {
      for (const method of ["GET", "POST", "PUT"]) {
        for (const answer of [
          await paged.ask(path, { method }),
          await fetch(paged.at_(path), { method, redirect: "manual" }),
        ]) {
          const { headers, status } = answer;
          const said = ["x-content-type-options", "referrer-policy"].map((name) =>
            headers.get(name),
          );
          expect([path, method, status, ...said]).toEqual([
            ...[path, method, status],
            ...["nosniff", "no-referrer"],
          ]);
        }
      }
    }
    for (const [path, allow] of [
      ["", "GET, HEAD"],
      ["rollouts", "POST"],
      ["devices/a", "GET, HEAD, POST"],
    ]) {
      const { status, headers } = await paged.ask(path!, {
        method: "PUT",
        headers: { Origin: paged.server.url.origin },
      });
      expect([path, status, headers.get("allow")]).toEqual([path, 405, allow]);
    }
  });
});

/** Nothing that the browser complained of, but answers that are errors by design. */
function expectQuiet({ complaints }: Browser, ...expected: RegExp[]): void {
  const others = complaints.filter((line) => !expected.some((pattern) => pattern.test(line)));
  expect(others).toEqual([]);
}

/** What is wider than its window, or scrolls sideways in itself. */
const WIDER = `[document.documentElement, ...document.querySelectorAll("body *")]
  .filter((element) => element.scrollWidth > element.clientWidth + 1)
  .filter((element) => element === document.documentElement ||
    /auto|scroll/.test(getComputedStyle(element).overflowX))
  .filter((element) => !element.matches("input, textarea, select"))
  .map((element) => element.outerHTML.slice(0, 200))`;

/** Texts whose contrast to what is behind them is below 4.5:1. */
const FAINT = `(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (element, colour) => {
    const [a, b] = [light(parse(colour)), light(behind(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll("[placeholder]")) {
    const ratio = contrast(element, getComputedStyle(element, "::placeholder").color);
    if (ratio < 4.5) found.push(element.placeholder + " " + ratio.toFixed(2));
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (node.data.trim() === "" || element.closest("script, [hidden]")) continue;
    const ratio = contrast(element, getComputedStyle(element).color);
    if (ratio < 4.5) found.push(node.data.trim() + " " + ratio.toFixed(2));
  }
  return found;
})()`;

/** Controls without a name, for who cannot see what stands beside them. */
const NAMELESS = `[...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a, summary")]
  .filter((element) => {
    const labels = [...(element.labels ?? [])].map((label) => label.textContent.trim()).join("");
    return (labels || element.textContent.trim() || element.getAttribute("aria-label") || "") === "";
  })
  .map((element) => element.outerHTML)`;

describe("the browser of these tests", () => {
  test("tells of scripts that fail, of what is forbidden and of what is not there", async () => {
    using other = Bun.serve({
      ...{ port: 0, hostname: "127.0.0.1" },
      routes: {
        "/": new Response(
          `<script src="/script.js"></script><script>let inline</script><img src="/none">`,
          {
            headers: {
              "Content-Type": "text/html",
              "Content-Security-Policy": "default-src 'self'",
            },
          },
        ),
        "/script.js": new Response(`console.error("said"); throw new Error("thrown")`),
      },
      fetch: () => new Response("", { status: 404 }),
    });
    using browser = await Browser.open();
    await browser.go(other.url);
    const expected = [/^said/, /thrown/, /Content Security Policy/, /status of 404/];
    await until(
      "four complaints",
      () => browser.complaints,
      (found) => expected.every((pattern) => found.some((line) => pattern.test(line))),
    );
  });

  test("what does not come fails, with what was waited for and what the page says", async () => {
    await using paged = await Paged.start();
    const problemOf = (wait: Promise<void>) => {
      return wait.then(
        () => "it came",
        (error: unknown) => String(error),
      );
    };
    for (const scripts of [true, false]) {
      using browser = await paged.browse({ scripts });
      const problem = await problemOf(browser.follow("#never"));
      expect(problem).toMatch(/#never[^]*\/-\/ says: [^]*No device has asked yet/);
      browser.patience = 1;
      expect(await problemOf(browser.until("h1", /never/))).toContain("h1 comes to match /never/");
    }
  });
});

/** Ids that stand twice, and references to none. */
const BROKEN = `(() => {
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const names = ["aria-labelledby", "aria-describedby", "for"];
  const used = names.flatMap((name) => [...document.querySelectorAll("[" + name + "]")]
    .flatMap((element) => element.getAttribute(name).split(" ")));
  return [...twice, ...used.filter((id) => !ids.includes(id))];
})()`;

/** A PostgreSQL that is not there: a port where nobody listens. */
async function nobody(): Promise<string> {
  const gone = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response() });
  const { port } = gone;
  await gone.stop(true);
  return `postgres://nobody@127.0.0.1:${port}/none`;
}

describe("in a browser", () => {
  test("sign in by the form; a wrong token is refused; out again", async () => {
    await using paged = await Paged.start();
    using browser = await Browser.open();
    await browser.go(paged.at_());
    await browser.shoot("sign-in");
    await browser.type("#token", "wrong");
    await browser.follow("button.main");
    expect(await browser.text(".problem")).toBe("That is not the token of this server");
    await browser.type("#token", paged.token);
    await browser.follow("button.main");
    expect(await browser.text("h1")).toBe("No device has asked yet");
    expect(await browser.url()).toBe(paged.at_());
    await browser.follow("header button");
    expect(await browser.text("h1")).toBe("Sign in");
    expectQuiet(browser, /status of 401/);
  });

  test("the fleet fills as devices ask, without a reload", async () => {
    await using paged = await Paged.start({ root: EXAMPLE });
    using browser = await paged.browse();
    await browser.shoot("empty");
    expect(await browser.text("h1")).toBe("No device has asked yet");
    await paged.visit({ devid: "a" });
    await browser.until("h1", /May I leave\? 1 board is still installing/);
    await paged.visit({ devid: "b", current_ver: "1.0.1", firmware_ver: "1.0.1" });
    await browser.until(".counts", /1 offered .* 1 current/);
    await paged.visit({ devid: "a", current_ver: "1.0.1", firmware_ver: "1.0.1" });
    await browser.until("h1", /All 2 devices are on 1\.0\.1/);
    await browser.until(".costs, main", /1\.0\.1 newest/);
    expectQuiet(browser);
  });

  test("what is typed, open, scrolled and focused stays while the newest comes", async () => {
    const said = Array.from({ length: 60 }, (_, i) => ({ id: `d${i}`, query: { model: "m" } }));
    await using paged = await Paged.laid(said);
    using browser = await paged.browse({}, "devices");
    await browser.type("[name=q]", "half a wo");
    await browser.ask(`scrollTo(0, 700)`);
    await paged.visit({ devid: "d30", failed: "1.0.1" }, { devid: "a-new-one" });
    await browser.until("main", /61 devices.*failed d30/);
    expect(await browser.ask(`document.activeElement.name + document.activeElement.value`)).toBe(
      "qhalf a wo",
    );
    expect(await browser.ask(`scrollY`)).toBeGreaterThan(600);
    await browser.go(paged.at_());
    await browser.press("#versions-table summary");
    expect(await browser.ask(`document.querySelector("#versions-table").open`)).toBe(true);
    await paged.visit({ devid: "b-new-one" });
    await browser.until("main", /62 devices/);
    expect(await browser.ask(`document.querySelector("#versions-table").open`)).toBe(true);
    expect(await browser.ask(`document.activeElement.textContent`)).toBe("As a table");
    expectQuiet(browser);
  });

  test("a tab that nobody sees asks for nothing until somebody does", async () => {
    await using paged = await Paged.laid([{ id: "a" }]);
    // First, since a browser that is opened begins without cookies, and all have the same.
    using hidden = await Browser.open();
    await hidden.before(`Object.defineProperty(document, "hidden", {
      get: () => !globalThis.isSeen,
    })`);
    using seen = await paged.browse();
    await hidden.go(paged.at_(`?token=${paged.token}`));
    await paged.visit({ devid: "b" });
    await seen.until("main", /2 devices/);
    expect(await hidden.text("main")).not.toContain("2 devices");
    await hidden.ask(`(globalThis.isSeen = true,
      document.dispatchEvent(new Event("visibilitychange")))`);
    await hidden.until("main", /2 devices/);
    expectQuiet(seen);
    expectQuiet(hidden);
  });

  test("search, a device and its timeline, its labels edited", async () => {
    await using paged = await Paged.laid([
      { id: "meter-7", ago: 7200_000 },
      { id: "meter-7", ago: 3600_000, to: "1.0.1" },
      { id: "meter-7", version: "1.0.1", ago: 60_000 },
      { id: "gate", ago: 1000 },
    ]);
    using browser = await paged.browse({ zone: "Asia/Kolkata" }, "devices");
    await browser.shoot("devices");
    await browser.type("[name=q]", "METER");
    await browser.follow(".filter button");
    expect(await browser.text(".devices")).toMatch(/^current meter-7 1\.0\.1 1 min ago$/);
    await browser.follow(".devices a");
    expect(await browser.text(".timeline")).toMatch(
      /updated 1\.0\.0 → 1\.0\.1 .*offered 1\.0\.0 → 1\.0\.1 .*first seen 1\.0\.0$/,
    );
    // As the browser's clock has it, and exact on hover.
    const { history } = (await paged.server.fleet!.device("meter-7"))!;
    const inIndia = new Date(history[2]!.at + 5.5 * 3600_000).toISOString().slice(11, 16);
    expect(await browser.text(".timeline li:first-child time")).toContain(inIndia);
    expect(await browser.ask(`document.querySelector(".timeline time").title`)).toMatch(
      /India|GMT\+5:30/,
    );
    await browser.type("#name", "Meter at the mill");
    await browser.type("#labels", "site=north\nring=first");
    await browser.follow("main button");
    expect(await browser.text("h1")).toBe("Meter at the mill current");
    await browser.shoot("device");
    const device = await paged.server.fleet!.device("meter-7");
    expect([device!.name, device!.labels]).toEqual([
      "Meter at the mill",
      { site: "north", ring: "first" },
    ]);
    await browser.type("#labels", "no label");
    await browser.follow("main button");
    expect(await browser.text(".problem")).toContain("expected a label as key=value");
    expectQuiet(browser, /status of 400/);
  });

  test("signed out while something is typed: it stays, and the page says so", async () => {
    await using paged = await Paged.laid([{ id: "a" }]);
    using browser = await paged.browse({}, "devices/a");
    await browser.type("#labels", "site=north");
    await browser.signOut();
    await browser.until("#lost", /You are signed out\. Sign in in another tab/);
    expect(await browser.ask(`document.querySelector("#labels").value`)).toBe("site=north");
    // Sent all the same, nothing is saved; what was typed is there, and so is the way back.
    await browser.follow("main button");
    expect(await browser.text("h1")).toBe("Sign in");
    expect(await browser.text("pre")).toContain("site=north");
    await browser.type("#token", paged.token);
    await browser.follow("button.main");
    expect(await browser.url()).toBe(paged.at_("devices/a"));
    // With nothing typed, the page asks for the token by itself.
    await browser.leave("the end of a session", () => browser.signOut());
    expect(await browser.text("h1")).toBe("Sign in");
    expectQuiet(browser, /status of 401/);
  });

  test("buttons keep the focus while the newest comes, and are those of their rollout", async () => {
    await using paged = await onExample();
    await paged.server.fleet!.startRollout({ ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null });
    using browser = await paged.browse();
    await browser.until(".rollout h3", /running/);
    await browser.focus('.rollout [value="pause"]');
    await browser.refreshed();
    expect(await browser.ask("document.activeElement.value")).toBe("pause");
    // It goes with what it does: Resume is another one.
    await paged.server.fleet!.changeRollout("1.0.1", null, "pause");
    await browser.until(".rollout h3", /paused/);
    expect(await browser.ask("document.activeElement === document.body")).toBe(true);
    const names = (await browser.accessible()).filter(({ role }) => role === "button");
    expect(names.map(({ name }) => name)).toContain("Resume 1.0.1");
  });

  test("what was typed and taken back is up to date again", async () => {
    await using paged = await Paged.laid([{ id: "a" }]);
    const fleet = paged.server.fleet!;
    await fleet.edit("a", { name: "Mill", labels: { site: "north" } });
    using browser = await paged.browse({}, "devices/a");
    await browser.type("#name", "Mill");
    await browser.type("#labels", "site=north");
    await fleet.edit("a", { name: "Old mill", labels: { site: "south", canary: "yes" } });
    await browser.until("h1", /Old mill/);
    expect(await browser.ask(`document.querySelector("#name").value`)).toBe("Old mill");
    await browser.type("#name", "Mill 2");
    await browser.follow("main button");
    const { name, labels } = (await fleet.device("a"))!;
    expect({ name, labels }).toEqual({ name: "Mill 2", labels: { site: "south", canary: "yes" } });
  });

  test("who waited for the store to sign in gets the whole page then, and no token in its address", async () => {
    await using paged = await Paged.start();
    const token = await paged.server.fleet!.settingOr("admin token", crypto.randomUUID());
    const file = paged.at("fleet.db");
    await paged.server[Symbol.asyncDispose]();
    const lock = new Database(file);
    lock.run("BEGIN IMMEDIATE");
    const options = { root: paged.at("root"), port: 0, host: "127.0.0.1", quiet: 0, fleet: file };
    paged.server = await serve(options);
    using browser = await Browser.open();
    await browser.go(paged.at_(`?token=${token}`));
    expect(await browser.text("h1")).toBe("The fleet's store does not answer");
    await browser.leave("the store's answer", async () => {
      lock.run("ROLLBACK");
      lock.close();
    });
    expect(await browser.text("header nav")).toBe("Fleet Devices");
    expect(await browser.url()).toBe(paged.at_());
    expectQuiet(browser, /status of 503/);
  });

  test("what is typed stays while the store is away, and so does what was chosen", async () => {
    const said = [
      { id: "a", query: { model: "m3" } },
      { id: "b", query: { model: "m2" } },
    ];
    // What writes would make a new file in the place of the one that is away.
    await using paged = await Paged.laid(said, { tick: 0 });
    using browser = await paged.browse({}, "devices/a");
    await browser.type("#name", "At the mill");
    const file = paged.at("fleet.db");
    await rename(file, `${file}.away`);
    await browser.until("#lost", /The server answers 503: what you typed is still here/);
    expect(await browser.ask(`document.querySelector("#name").value`)).toBe("At the mill");
    await rename(`${file}.away`, file);
    await browser.until("#lost[hidden]", /./);
    expect(await browser.ask(`document.querySelector("#name").value`)).toBe("At the mill");
    await browser.go(paged.at_("devices"));
    await browser.ask(`void (document.querySelector("[name=model]").value = "m2")`);
    await paged.report({ devid: "c", model: "m1" });
    await browser.until("main", /3 devices/);
    expect(await browser.ask(`document.querySelector("[name=model]").value`)).toBe("m2");
    // What nobody has chosen in is up to date.
    await browser.go(paged.at_("devices"));
    await paged.report({ devid: "d", model: "m0" });
    await browser.until("[name=model]", /m0/);
    expectQuiet(browser, /status of 503/);
  });

  test("times of other days and years say which", async () => {
    const hour = 3600_000;
    await using paged = await Paged.laid([
      { id: "a", ago: 500 * 24 * hour },
      { id: "a", ago: 366 * 24 * hour, to: "1.0.1" },
      { id: "a", version: "1.0.1", ago: 1000 },
    ]);
    using browser = await paged.browse({}, "devices/a");
    const { history } = (await paged.server.fleet!.device("a"))!;
    const times = await browser.ask<string[]>(
      `[...document.querySelectorAll(".timeline time")].map((one) => one.textContent)`,
    );
    expect(times[0]).toMatch(/^\d\d:\d\d$/);
    for (const [i, time] of times.slice(1).toReversed().entries()) {
      const year = new Date(history[i]!.at).getFullYear();
      expect(time).toMatch(new RegExp(`^[A-Z][a-z]+ \\d+ ${year} \\d\\d:\\d\\d$`));
    }
  });

  test("a device that is named as a script is harmless everywhere", async () => {
    const evil = EVIL.slice(0, 100);
    await using paged = await Paged.start();
    const query = { devid: evil, model: evil, current_ver: evil, firmware_ver: evil, failed: evil };
    await paged.visit(query);
    await paged.server.fleet!.edit(evil.toLowerCase(), {
      name: evil,
      labels: { [evil.replaceAll("=", "")]: evil },
    });
    using browser = await paged.browse();
    const id = encodeURIComponent(evil.toLowerCase());
    for (const view of [
      "",
      "devices",
      `devices?q=${id}`,
      `devices/${id}`,
      `devices?version=${id}`,
    ]) {
      await browser.go(paged.at_(view));
      expect(await browser.ask(`document.querySelectorAll("main img, main script").length`)).toBe(
        0,
      );
      expect(await browser.ask("document.title")).not.toBe("owned");
      // Also when the script brings it.
      await browser.refreshed();
      expect(await browser.ask(`document.querySelectorAll("main img, main script").length`)).toBe(
        0,
      );
      expect(await browser.ask("document.title")).not.toBe("owned");
    }
    expect(await browser.text("main")).toContain("<img src=x");
    expectQuiet(browser);
  });

  /** Devices that say so much and ask for nothing yet, on the example's first release. */
  const IDS = ["a", "b", "c", "d", "e"];
  const ON_FIRST = { current_ver: "1.0.0", firmware_ver: "1.0.0" };
  const ON_SECOND = { current_ver: "1.0.1", firmware_ver: "1.0.1" };

  /** A server whose devices are on the example's first release. */
  async function onExample(): Promise<Paged> {
    const paged = await Paged.start({ root: EXAMPLE });
    await paged.report(...IDS.map((devid) => ({ devid, ...ON_FIRST })));
    // It goes first: whose turn it is else depends on the name of the rollout.
    await paged.server.fleet!.edit("a", { labels: { canary: "yes" } });
    return paged;
  }

  /** Lets all devices ask until one of them was offered the release that is rolled out. */
  async function offered(paged: Paged): Promise<string> {
    const fleet = paged.server.fleet!;
    // A server hears of a rollout when it writes: before that, it keeps nobody from anything.
    await fleet.flush();
    const ask = async () => {
      await paged.visit(...IDS.map((devid) => ({ devid, ...ON_FIRST })));
      const { devices } = await fleet.devices({ state: "offered" });
      return devices.map(({ id }) => id);
    };
    const [first] = await until("a device is offered it", ask, ({ length }) => length === 1);
    return first!;
  }

  for (const scripts of [true, false]) {
    const how = scripts ? "" : ", without JavaScript";
    test(`start a rollout of the example, watch it go, pause, resume, abort${how}`, async () => {
      await using paged = await onExample();
      using browser = await paged.browse({ scripts });
      await browser.follow('[data-key="release-1.0.1"] button');
      expect(await browser.text("h1")).toBe("Roll out 1.0.1");
      expect(await browser.text(".total")).toBe("5 devices would get it.");
      await browser.shoot("rollout-form");
      // What is wrong is said, and stays typed.
      await browser.type("#tolerance", "all");
      await browser.follow("[formmethod]");
      expect(await browser.text(".problem")).toContain("Tolerance expects a percentage");
      expect(await browser.ask(`document.querySelector("#tolerance").value`)).toBe("all");
      // As with the command; emptied, it stays so.
      expect(await browser.ask(`document.querySelector("#pause-at").value`)).toBe("5%, 50%");
      await browser.type("#pause-at", "");
      await browser.type("#tolerance", "5%");
      await browser.type("#only", "version=1.0.1");
      await browser.follow("section button:not([formmethod])");
      expect(await browser.text("main")).toContain("No device would get it");
      expect(await browser.ask(`document.querySelector("#pause-at").value`)).toBe("");
      await browser.type("#only", "");
      await browser.follow("[formmethod]");
      expect(await browser.url()).toBe(paged.at_());
      await browser.until(".rollout h3", /1\.0\.1 running/);
      expect(await browser.text(".rollout .legend")).toContain("5 still to come");
      const first = await offered(paged);
      await browser.until(".rollout .legend", /0 proven 1 on their way/);
      await browser.until("h1", /1\.0\.1 is on its way: 0 of 5 devices proven/);
      await paged.visit({ devid: first, ...ON_SECOND });
      await browser.until(".rollout .legend", /1 proven/);
      await browser.shoot("rollout-running");
      await browser.follow('.rollout [value="pause"]');
      expect(await browser.text("h1")).toContain("Paused at");
      await browser.follow('.rollout [value="resume"]');
      expect(await browser.text("h1")).toContain("is on its way");
      // What cannot be undone asks first.
      await browser.follow('.rollout [value="abort"]');
      expect(await browser.text("h1")).toBe("Abort the rollout of 1.0.1?");
      await browser.shoot("rollout-abort");
      await browser.follow("a.button");
      expect(await browser.text(".rollout h3")).toContain("running");
      await browser.follow('.rollout [value="advance"]');
      expect(await browser.text("h1")).toBe("Advance the rollout of 1.0.1?");
      await browser.follow("button.main");
      expect(await browser.url()).toBe(paged.at_());
      await browser.follow('.rollout [value="abort"]');
      await browser.follow("button.main");
      await browser.until(".past", /1\.0\.1 aborted/);
      expectQuiet(browser, /status of 400/);
    });
  }

  test("a rollout that halted says why, and a device why it gets nothing", async () => {
    await using paged = await onExample();
    const only = [["version", "1.0.0"]] as const;
    await paged.server.fleet!.startRollout({
      ...{ version: "1.0.1", model: null, first: 1, soak: 0, silent: 3600, tolerance: 0.05 },
      ...{ pauseAt: [], only, window: null },
    });
    using browser = await paged.browse();
    const first = await offered(paged);
    await paged.visit({ devid: first, ...ON_FIRST, failed: "1.0.1" });
    await browser.until("h1", /Halted at \d\d:\d\d: 1\.0\.1, .*1 failed/);
    await browser.until(".rollout .legend", /1 failed/);
    await browser.until("[aria-labelledby=clusters]", /failed 1\.0\.0/);
    await browser.shoot("rollout-halted");
    await browser.follow(".bad a");
    expect(await browser.text("dl")).toContain("1.0.1 (halted): it failed here");
    const other = IDS.find((id) => id !== first)!;
    await browser.go(paged.at_(`devices/${other}`));
    expect(await browser.text("dl")).toContain(
      "Nothing. 1.0.1 is the newest; its rollout is halted:",
    );
    expectQuiet(browser);
  });

  test("without JavaScript: everything, with times in UTC", async () => {
    await using paged = await Paged.laid([{ id: "a" }, { id: "b", version: "1.0.1" }]);
    using browser = await paged.browse({ scripts: false, zone: "Asia/Kolkata" });
    expect(await browser.text("footer")).toMatch(/as of \d\d:\d\d UTC/);
    const exact = `document.querySelector("footer time").title`;
    expect(await browser.ask(exact)).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$/);
    await browser.press("#versions-table summary");
    expect(await browser.ask(`document.querySelector("#versions-table").open`)).toBe(true);
    await browser.follow("nav a:last-child");
    await browser.follow(".devices a");
    await browser.type("#name", "Meter");
    await browser.type("#labels", "site=north");
    await browser.follow("main button");
    expect(await browser.text("h1")).toBe("Meter behind");
    expect((await paged.server.fleet!.device("a"))!.labels).toEqual({ site: "north" });
    await browser.follow("header button");
    expect(await browser.text("h1")).toBe("Sign in");
    expectQuiet(browser, /status of 401/);
  });

  for (const dark of [false, true]) {
    test(`at 360 px, ${dark ? "in the dark" : "in the light"}: no scrolling sideways, all can be read`, async () => {
      const long = "x".repeat(128);
      await using paged = await Paged.laid([
        { id: long, query: { model: long, failed: "1.0.1" }, to: "1.0.1" },
        { id: "silent", query: { model: "m" }, to: "1.0.1", ago: 7200_000 },
        { id: "moving", to: "1.0.1", ago: 1000 },
        { id: "newest", version: "1.0.1" },
        { id: "odd", version: long },
      ]);
      await paged.server.fleet!.edit(long, { name: long, labels: { [long]: long, a: "b" } });
      const rollout = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null };
      const only = [["model", long]] as const;
      const { id } = await paged.server.fleet!.startRollout({ ...rollout, only });
      await using none = await Paged.start({}, {});
      await using away = await Paged.start({ fleet: await nobody() });
      using browser = await Browser.open({ width: 360, height: 740, dark });
      const check = async (what: string, place = paged.at_(what)) => {
        await browser.go(place);
        expect([what, await browser.ask(WIDER)]).toEqual([what, []]);
        expect([what, await browser.ask(FAINT)]).toEqual([what, []]);
        expect([what, await browser.ask(NAMELESS)]).toEqual([what, []]);
        expect([what, await browser.ask(BROKEN)]).toEqual([what, []]);
        const landmarks = `["header", "main", "footer", "h1"].filter((name) => !document.querySelector(name))`;
        expect([what, await browser.ask(landmarks)]).toEqual([what, []]);
        const name = what.split(/[/?]/)[0] || "fleet";
        await browser.shoot(`phone-${dark ? "dark" : "light"}-${name}`);
      };
      await check("sign-in", paged.at_());
      for (const each of [paged, none, away]) await browser.go(each.at_(`?token=${each.token}`));
      const background = await browser.ask<string>(
        `getComputedStyle(document.body).backgroundColor`,
      );
      expect(Number(/\d+/.exec(background)![0])).toBeLessThan(dark ? 60 : 256);
      await check("");
      await check("devices");
      await check(`devices/${long}`);
      await check("devices/none");
      await check("rollouts/new?version=1.0.1");
      await check(`rollouts/change?id=${id}&changed=0&went-bad=0&action=abort`);
      await check("devices?label=site");
      await check("nothing");
      await check("no release", none.at_());
      await check("no device", none.at_("devices"));
      await check("away", away.at_());
      await check("devices away", away.at_("devices"));
      expectQuiet(browser, /status of 40[014]/, /status of 503/);
    });
  }

  test("what a screen reader finds: landmarks, headings in order, and a name for everything", async () => {
    await using paged = await Paged.laid([
      { id: "a", query: { failed: "1.0.1" }, to: "1.0.1" },
      { id: "b", version: "1.0.1" },
    ]);
    const rollout = { ...ROLLOUT_DEFAULTS, version: "1.0.1", model: null };
    await paged.server.fleet!.startRollout(rollout);
    using browser = await paged.browse();
    for (const view of ["", "devices", "devices/a", "rollouts/new?version=1.0.1"]) {
      await browser.go(paged.at_(view));
      const found = await browser.accessible();
      const roles = found.map(({ role }) => role);
      for (const role of ["banner", "navigation", "main", "contentinfo"]) {
        expect([view, roles.filter((one) => one === role).length]).toEqual([
          view,
          role === "navigation" && view === "devices" ? 2 : 1,
        ]);
      }
      expect(roles.includes("search")).toBe(view === "devices");
      const levels = found.filter(({ role }) => role === "heading").map(({ level }) => level!);
      // One of the first level, and none is left out.
      const isNext = (level: number, i: number) => level <= (levels[i - 1] ?? 0) + 1;
      expect([view, levels[0], levels.every(isNext)]).toEqual([view, 1, true]);
      expect([view, levels.lastIndexOf(1)]).toEqual([view, 0]);
      const named = /^(image|img|textbox|searchbox|combobox|button|link|region|navigation)$/;
      const nameless = found.filter(({ role, name }) => named.test(role) && name.trim() === "");
      expect([view, nameless]).toEqual([view, []]);
    }
    await browser.go(paged.at_());
    const chart = (await browser.accessible()).find(({ role }) => /^ima?ge?$/.test(role));
    expect(chart?.name).toBe(
      "Devices by version over the last hour; the table below has the numbers",
    );
    await browser.press("#versions-table summary");
    const table = await browser.accessible();
    expect(table.filter(({ role }) => role === "columnheader").map(({ name }) => name)).toContain(
      "1.0.0",
    );
  });

  test("by the keyboard alone: into the content, to a device and on", async () => {
    await using paged = await Paged.laid([{ id: "a" }]);
    using browser = await paged.browse({}, "devices");
    const focused = () =>
      browser.ask<string>(`document.activeElement.innerText || document.activeElement.name`);
    await browser.key("Tab");
    expect(await focused()).toBe("Skip to the content");
    const outline = `getComputedStyle(document.activeElement).outlineStyle`;
    expect(await browser.ask(outline)).toBe("solid");
    await browser.key("Enter");
    const seen: string[] = [];
    for (let i = 0; i < 7; i++) {
      await browser.key("Tab");
      seen.push((await focused()).replace(/\s+/g, " "));
      expect(await browser.ask(outline)).toBe("solid");
    }
    expect(seen.slice(0, 6)).toEqual([
      "q",
      "any state failed silent offered behind current",
      "any version 1.0.0",
      "any model",
      "label",
      "Search",
    ]);
    expect(seen[6]!.trim()).toStartWith("behind a");
  });

  test("a store that is away says so; so does a server that is", async () => {
    const paged = await Paged.start({ fleet: await nobody() });
    using browser = await paged.browse();
    expect(await browser.text("h1")).toBe("The fleet's store does not answer");
    expect(await browser.text(".lead")).toMatch(/127\.0\.0\.1:\d+/);
    expect(await browser.text(".lead")).not.toContain("nobody");
    // What the server knows itself is there.
    expect(await browser.text(".releases")).toContain("1.0.1 newest");
    await browser.shoot("away");
    await paged[Symbol.asyncDispose]();
    await browser.until("#lost", /No answer from the server since \d\d:\d\d/);
    expect(await browser.text("h1")).toBe("The fleet's store does not answer");
    expectQuiet(browser, /status of 503|ERR_CONNECTION/);
  });
});
