/**
 * Who stands at the door: proxies whose word counts, or does not, and certificates that are renewed
 * while the server runs.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { copyFileSync, mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { connect as connectTLS } from "node:tls";
import { OTAError, parseManifest, serve } from "../ota.ts";
import { certify } from "./helpers/pki.ts";
import { parseResponse, rawRequest } from "./helpers/raw.ts";
import { layTree, Temp } from "./helpers/temp.ts";
import { eventually, ota, Tool } from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const TREE = { "1.0.0/flash/main.py": "one", "1.0.1/flash/main.py": "two" };
const MANIFEST = "/manifest.json?current_ver=1.0.0";

describe("X-Forwarded-Proto and -For", () => {
  /** What a request gets, with which URLs, and what is logged and noticed of it. */
  async function asked(
    trustProxy: readonly string[],
    headers: Record<string, string>,
    { host = "127.0.0.1", url = undefined as string | undefined } = {},
  ) {
    using temp = new Temp(TREE);
    const warnings: string[] = [];
    const warn = (line: string) => void warnings.push(line);
    const options = { trustProxy, warn, host, ...(url !== undefined && { url }) };
    await using server = await Served.start(temp.path, options);
    const text = Object.entries(headers)
      .map(([name, value]) => `${name}: ${value}\r\n`)
      .join("");
    const request = `GET ${MANIFEST} HTTP/1.0\r\n${text}\r\n`;
    const { bytes } = await rawRequest(server.url, request);
    await rawRequest(server.url, request);
    const { status, body } = parseResponse(bytes);
    const [item] = status === 200 ? parseManifest(body)!.update : [];
    return {
      status,
      text: new TextDecoder().decode(body),
      url: item?.URL,
      address: server.lines[0]!.split(" ")[1],
      warnings,
    };
  }
  const path = "/1.0.1/flash/main.py";
  const headers = {
    Host: "ota.test",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-For": "203.0.113.7",
  };

  for (const trusted of ["127.0.0.1", "127.0.0.0/8", "0.0.0.0/0"]) {
    test(`from a proxy within ${trusted}: its scheme in URLs, its client in the log`, async () => {
      const found = await asked(["10.1.2.3", trusted], headers);
      expect(found).toMatchObject({ url: `https://ota.test${path}`, address: "203.0.113.7" });
      expect(found.warnings).toEqual([]);
    });
  }

  test("from a proxy that is reached by IPv6, or by an IPv4 address written so", async () => {
    const found = await asked(["127.0.0.1"], headers, { host: "::" });
    expect(found).toMatchObject({ url: `https://ota.test${path}`, address: "203.0.113.7" });
  });

  test("from anybody else they count for nothing, and one line says so", async () => {
    for (const trusted of [[], ["10.0.0.0/8", "::1", "127.0.0.2"]]) {
      const found = await asked(trusted, headers);
      expect(found).toMatchObject({ url: `http://ota.test${path}`, address: "127.0.0.1" });
      expect(found.warnings).toHaveLength(1);
      expect(found.warnings[0]).toContain("--trust-proxy 127.0.0.1");
    }
  });

  test("with --url there is nothing to say", async () => {
    const found = await asked([], headers, { url: "https://cdn.test" });
    expect(found).toMatchObject({ url: `https://cdn.test${path}`, warnings: [] });
  });

  test("without Host: the 400 says what to do, where there seems to be a proxy", async () => {
    const without = { "X-Forwarded-Proto": "https" };
    for (const asking of [without, { ...without, Host: "a b" }]) {
      const found = await asked([], asking);
      expect([found.status, found.text]).toEqual([400, expect.stringContaining("--trust-proxy")]);
    }
    const plain = await asked([], { Host: "a/b" });
    expect([plain.status, plain.text.includes("proxy")]).toEqual([400, false]);
    expect(plain.warnings).toEqual([]);
  });

  test("of a chain of addresses, the last that is not trusted itself; what is none, is none", async () => {
    const addressFor = async (list: string, trusted = ["127.0.0.1", "10.0.0.0/8"]) => {
      return (await asked(trusted, { ...headers, "X-Forwarded-For": list })).address;
    };
    expect(await addressFor("198.51.100.1, 203.0.113.7, 10.0.0.9")).toBe("203.0.113.7");
    expect(await addressFor("evil, 203.0.113.7")).toBe("203.0.113.7");
    expect(await addressFor("203.0.113.7, evil, 10.0.0.9")).toBe("10.0.0.9");
    expect(await addressFor("10.0.0.1, 10.0.0.2")).toBe("10.0.0.1");
    expect(await addressFor("")).toBe("127.0.0.1");
    expect(await addressFor("2001:db8::7")).toBe("2001:db8::7");
    expect(await addressFor("203.0.113.7 GET /x 200 0")).toBe("127.0.0.1");
  });

  test("a scheme that is none counts for nothing", async () => {
    for (const said of ["ftp", "", "javascript", "https://"]) {
      const found = await asked(["127.0.0.1"], { ...headers, "X-Forwarded-Proto": said });
      expect(found.url).toBe(`http://ota.test${path}`);
    }
    const found = await asked(["127.0.0.1"], { ...headers, "X-Forwarded-Proto": "http, HTTPS" });
    expect(found.url).toBe(`https://ota.test${path}`);
  });

  test("what is no address is a usage error", async () => {
    for (const text of [
      "proxy.test",
      "10.0.0.0/33",
      "10.0.0.0/",
      "::1/129",
      "10.0.0/8",
      "",
      "/8",
    ]) {
      const error = await serve({ root: ".", port: 0, trustProxy: [text] }).catch(
        (thrown) => thrown,
      );
      expect(error).toBeInstanceOf(OTAError);
      expect(error).toMatchObject({
        exitCode: 2,
        message: expect.stringContaining("--trust-proxy"),
      });
    }
    const ended = await ota(["serve", "--port", "0", "--trust-proxy", "all"]);
    expect([ended.code, ended.stdout]).toEqual([2, ""]);
    expect(ended.stderr).toMatch(/^ota\.ts: [^\n]*--trust-proxy[^\n]*\n$/);
  });

  test("on the command line, several times", async () => {
    using temp = new Temp(TREE);
    const place = ["--root", temp.path, "--port", "0", "--host", "127.0.0.1"];
    const proxies = ["--trust-proxy", "10.0.0.0/8", "--trust-proxy", "127.0.0.1"];
    await using tool = new Tool(["serve", ...place, ...proxies]);
    const [, url = ""] = await tool.until(/ at (http:\S+)\n/);
    const manifest = await (await fetch(url + MANIFEST, { headers })).text();
    expect(manifest).toContain(`"https://`);
    await tool.until(/ 203\.0\.113\.7 GET \/manifest\.json 200 /);
  });
});

describe.concurrent("a certificate that is renewed", () => {
  /** Two of the same authority's making each, and a server with the first. */
  class Renewal extends Temp {
    readonly first = this.#make("first");
    readonly second = this.#make("second");
    readonly files = { cert: this.at("live.pem"), key: this.at("live.key") };
    readonly warnings: string[] = [];

    #make(name: string) {
      mkdirSync(this.at(name));
      return certify(this.at(name), "IP:127.0.0.1");
    }

    async serve(): Promise<Served> {
      layTree(this.at("root"), TREE);
      const warn = (line: string) => void this.warnings.push(line);
      return Served.start(this.at("root"), { tls: this.files, warn });
    }
  }

  /** Whether who trusts this authority only is answered. */
  async function isTrusted({ port }: Served, ca: string): Promise<boolean> {
    const options = { tls: { ca: Bun.file(ca) }, keepalive: false };
    return fetch(`https://127.0.0.1:${port}/1.0.1/flash/main.py`, options).then(
      async (response) => (await response.text()) === "two",
      () => false,
    );
  }

  /** Waits until it is, and looks whether it was answered all the time by the one or the other. */
  async function untilTrusted(server: Served, ca: string, before: string): Promise<void> {
    const look = async () => {
      const isNew = await isTrusted(server, ca);
      const either = isNew || (await isTrusted(server, before)) || (await isTrusted(server, ca));
      expect(either).toBe(true);
      return isNew;
    };
    await eventually("the new certificate is in use", look, 20);
    expect(await isTrusted(server, before)).toBe(false);
  }

  for (const [how, put] of Object.entries({
    "by a copy": (renewal: Renewal, { cert, key }: { cert: string; key: string }) => {
      copyFileSync(cert, renewal.files.cert);
      copyFileSync(key, renewal.files.key);
    },
    "by links that are switched": (renewal: Renewal, { cert, key }) => {
      for (const [to, at] of [
        [cert, renewal.files.cert],
        [key, renewal.files.key],
      ] as const) {
        rmSync(`${at}.new`, { force: true });
        symlinkSync(to, `${at}.new`);
        renameSync(`${at}.new`, at);
      }
    },
  } satisfies Record<string, (renewal: Renewal, files: { cert: string; key: string }) => void>)) {
    test(`${how}: without a restart, and whoever is connected stays so`, async () => {
      using renewal = new Renewal();
      put(renewal, renewal.first);
      await using server = await renewal.serve();
      expect(await isTrusted(server, renewal.first.ca)).toBe(true);
      expect(await isTrusted(server, renewal.second.ca)).toBe(false);
      // A connection in the middle of a request.
      let received = "";
      const ca = await Bun.file(renewal.first.ca).text();
      const socket = connectTLS({ host: "127.0.0.1", port: server.port, ca });
      socket.on("data", (piece: Buffer) => (received += piece.toString()));
      socket.on("error", () => {});
      socket.write("GET /1.0.0/flash/main.py HTTP/1.1\r\nHost: a\r\n");

      put(renewal, renewal.second);
      await untilTrusted(server, renewal.second.ca, renewal.first.ca);
      expect(renewal.warnings).toEqual([expect.stringContaining("is new, and in use")]);
      socket.write("Connection: close\r\n\r\n");
      await eventually("the old connection is answered", () => received.endsWith("one"));
      socket.destroy();

      // And again.
      put(renewal, renewal.first);
      await untilTrusted(server, renewal.first.ca, renewal.second.ca);
    });
  }

  test("files that do not fit or are none: said once, and the one before stays", async () => {
    using renewal = new Renewal();
    copyFileSync(renewal.first.cert, renewal.files.cert);
    copyFileSync(renewal.first.key, renewal.files.key);
    await using server = await renewal.serve();
    copyFileSync(renewal.second.cert, renewal.files.cert);
    await eventually("it is said", () => renewal.warnings.length > 0);
    expect(renewal.warnings[0]).toContain("is not the key of");
    expect(await isTrusted(server, renewal.first.ca)).toBe(true);
    writeFileSync(renewal.files.cert, "nothing of the kind");
    await eventually("it is said", () => renewal.warnings.length > 1);
    expect(renewal.warnings[1]).toContain("expected a certificate");
    rmSync(renewal.files.cert);
    await eventually("it is said", () => renewal.warnings.length > 2);
    expect(await isTrusted(server, renewal.first.ca)).toBe(true);
    copyFileSync(renewal.second.cert, renewal.files.cert);
    copyFileSync(renewal.second.key, renewal.files.key);
    await untilTrusted(server, renewal.second.ca, renewal.first.ca);
    expect(renewal.warnings).toHaveLength(4);
  });
});
