/**
 * Who may change a device, and who may ask for what: keys and signatures, tokens, HTTPS. Real
 * sockets and processes; openssl stands for whoever has other tools than ours; a double of the
 * server says what an attacker would like a device to believe.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createPrivateKey, createPublicKey, sign, type KeyObject } from "node:crypto";
import { chmodSync, existsSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { HttpOTA, makeKeys, OTAError, serve, signManifest } from "../ota.ts";
import { boardGet } from "./helpers/board.ts";
import { sha1, sha256 } from "./helpers/content.ts";
import { Double, manifestOf, send, sendContent, type Asked, type Reply } from "./helpers/double.ts";
import { certify, openssl, type Certified } from "./helpers/pki.ts";
import { parseResponse, rawRequest } from "./helpers/raw.ts";
import { asTree, layTree, Temp, type Tree } from "./helpers/temp.ts";
import { need, run, Serving, Tool } from "./helpers/tool.ts";
import { Served, World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const V1: Tree = { "flash/main.py": "print('one')\n" };
const V2: Tree = { "flash/main.py": "print('two')\n", "flash/lib.py": "LIB = 2\n" };
const IMAGE = Buffer.alloc(2000, 0xe9);
const own = (version: string): Tree => ({ "flash/OTA_VERSION.py": `VERSION = '${version}'\n` });
const TREE_2 = asTree({ ...V2, ...own("1.0.1") });

/** A directory with releases, a device on 1.0.0, and keys `ours` and `other`. */
class Place extends World {
  constructor() {
    super({ "1.0.0": V1, "1.0.1": V2 }, { device: V1 });
    for (const name of ["ours", "other"]) {
      const { key, pub } = makeKeys();
      this.write({ [`${name}.key`]: key, [`${name}.pub`]: pub });
    }
  }

  private(name = "ours"): KeyObject {
    return createPrivateKey(readFileSync(this.at(`${name}.key`)));
  }

  public(name = "ours"): KeyObject {
    return createPublicKey(readFileSync(this.at(`${name}.pub`)));
  }

  override args(args: readonly string[] = [], from: { url: string } = this): string[] {
    return super.args(["--ver", "1.0.0", ...args], from);
  }
}

const LOCAL = ["--host", "127.0.0.1"];
const mode = (file: string) => (statSync(file).mode & 0o777).toString(8);

describe.concurrent("keygen", () => {
  test("writes a key that is its owner's alone, and a public one", async () => {
    using temp = new Temp();
    const { code, stdout, stderr } = await run(["keygen", "--out", temp.at("fleet")]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toContain("fleet.key");
    expect(mode(temp.at("fleet.key"))).toBe("600");
    expect(mode(temp.at("fleet.pub"))).toBe("644");
    expect(stdout).not.toContain("PRIVATE");
  });

  test("openssl reads both, and they belong together", async () => {
    using temp = new Temp();
    await run(["keygen", "--out", temp.at("fleet")]);
    const key = openssl(["pkey", "-in", temp.at("fleet.key"), "-noout", "-text"]);
    expect(key).toMatchObject({ code: 0, stdout: expect.stringContaining("ED25519 Private-Key") });
    const pub = openssl(["pkey", "-pubin", "-in", temp.at("fleet.pub"), "-noout", "-text"]);
    expect(pub).toMatchObject({ code: 0, stdout: expect.stringContaining("ED25519 Public-Key") });
    const derived = openssl(["pkey", "-in", temp.at("fleet.key"), "-pubout"]);
    expect(derived.stdout).toBe(readFileSync(temp.at("fleet.pub"), "utf8"));
  });

  test("makes another key each time", async () => {
    expect(makeKeys().key).not.toBe(makeKeys().key);
  });

  for (const there of ["key", "pub"] as const) {
    test(`with a .${there} there already: exit code 1, both stay as they were`, async () => {
      using temp = new Temp();
      const taken = temp.at(`fleet.${there}`);
      writeFileSync(taken, "precious");
      const { code, stderr } = await run(["keygen", "--out", temp.at("fleet")]);
      expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringContaining(taken) });
      expect(readFileSync(taken, "utf8")).toBe("precious");
      // Half a pair is no use, and would be in the way of the next try.
      expect(existsSync(temp.at(there === "key" ? "fleet.pub" : "fleet.key"))).toBe(false);
    });
  }

  test("without a name, or where nothing can be written: one line, no key", async () => {
    using temp = new Temp();
    expect(await run(["keygen"])).toMatchObject({ code: 2, stdout: "" });
    const nowhere = await run(["keygen", "--out", temp.at("none/fleet")]);
    expect(nowhere).toMatchObject({ code: 1, stdout: "" });
    expect(nowhere.stderr).toMatch(/^ota\.ts: [^\n]*none\/fleet[^\n]*\n$/);
  });
});

describe.concurrent("serve --sign", () => {
  /** Whether openssl finds that a key signed these bytes. */
  function opensslVerifies(temp: Temp, pub: string, bytes: string, signature: string): boolean {
    writeFileSync(temp.at("bytes"), bytes);
    writeFileSync(temp.at("signature"), Buffer.from(signature, "base64"));
    const files = ["-inkey", pub, "-in", temp.at("bytes"), "-sigfile", temp.at("signature")];
    return openssl(["pkeyutl", "-verify", "-pubin", "-rawin", ...files]).code === 0;
  }

  for (const [what, query, reqid] of [
    ["an update", "current_ver=1.0.0&reqid=r%201&hash=sha256", "r 1"],
    ["an update without a request id", "current_ver=1.0.0", ""],
    ["null", "current_ver=1.0.1&reqid=42", "42"],
    ["null without a request id", "current_ver=1.0.1", ""],
    ["a request id of any kind", `reqid=${encodeURIComponent('a"\\\u{1f680}')}`, 'a"\\\u{1f680}'],
  ] as const) {
    test(`openssl verifies the signature of ${what}`, async () => {
      await using place = new Place();
      const server = await place.serve({ sign: place.at("ours.key") });
      const response = await fetch(`${server.url}/manifest.json?${query}`);
      const signature = response.headers.get("x-ota-signature") ?? "";
      const body = await response.text();
      expect(body === "null").toBe(what.startsWith("null"));
      expect(Buffer.from(signature, "base64").length).toBe(64);
      const bytes = `ota-manifest-1\n${reqid}\n${body}`;
      const pub = place.at("ours.pub");
      expect(opensslVerifies(place, pub, bytes, signature)).toBe(true);
      expect(opensslVerifies(place, pub, `${bytes} `, signature)).toBe(false);
      expect(opensslVerifies(place, place.at("other.pub"), bytes, signature)).toBe(false);
    });
  }

  test("the signature is over the JSON, however it is coded for the way", async () => {
    await using place = new Place();
    const server = await place.serve({ sign: place.at("ours.key") });
    for (const encoding of ["identity", "gzip", "zstd"]) {
      const url = `${server.url}/manifest.json?current_ver=1.0.0&hash=sha256&reqid=7`;
      const headers = { "Accept-Encoding": encoding };
      const response = await fetch(url, { headers, decompress: false });
      expect(response.headers.get("content-encoding") ?? "identity").toBe(encoding);
      const bytes = new Uint8Array(await response.arrayBuffer());
      const plain = { identity: () => bytes, gzip: Bun.gunzipSync, zstd: Bun.zstdDecompressSync };
      const json = Buffer.from(plain[encoding as keyof typeof plain](bytes)).toString();
      const signature = response.headers.get("x-ota-signature")!;
      const signed = `ota-manifest-1\n7\n${json}`;
      expect(opensslVerifies(place, place.at("ours.pub"), signed, signature)).toBe(true);
    }
  });

  test("HEAD has the signature, other answers have none", async () => {
    await using place = new Place();
    const server = await place.serve({ sign: place.at("ours.key") });
    const head = await fetch(`${server.url}/manifest.json`, { method: "HEAD" });
    expect(head.headers.get("x-ota-signature")).toMatch(/^[A-Za-z0-9+/]{86}==$/);
    const file = await fetch(`${server.url}/1.0.1/flash/main.py`);
    expect(file.headers.has("x-ota-signature")).toBe(false);
  });

  test("uses a key that openssl made, and a device verifies it with openssl's public key", async () => {
    await using place = new Place();
    const [key, pub] = [place.at("made.key"), place.at("made.pub")];
    expect(openssl(["genpkey", "-algorithm", "ed25519", "-out", key]).code).toBe(0);
    expect(openssl(["pkey", "-in", key, "-pubout", "-out", pub]).code).toBe(0);
    await using server = await Serving.start(["--root", place.releases, "--sign", key, ...LOCAL]);
    expect(await place.client(["--verify", pub], server)).toMatchObject({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1",
    });
    expect(place.tree()).toEqual(TREE_2);
  });

  for (const [what, make] of [
    ["a public key", (place: Place) => place.at("ours.pub")],
    ["a key of another kind", (place: Place) => certify(place.path, "IP:127.0.0.1").key],
    ["no key", (place: Place) => place.at("releases/1.0.0/flash/main.py")],
    ["a file that is missing", (place: Place) => place.at("missing.key")],
  ] as const) {
    test(`does not start with ${what}: exit code 2, one line that names it`, async () => {
      await using place = new Place();
      const file = make(place);
      const ended = await run(["serve", "--root", place.releases, "--port", "0", "--sign", file]);
      expect(ended).toMatchObject({ code: 2, stdout: "" });
      expect(ended.stderr).toMatch(/^ota\.ts: [^\n]*\n$/);
      expect(ended.stderr).toContain(file);
    });
  }
});

describe.concurrent("a key inside the root that is served", () => {
  const cases: [what: string, lay: (place: Place) => { root?: string; key: string }][] = [
    ["at its top", (place) => ({ key: place.at("releases/sign.key") })],
    ["in a version", (place) => ({ key: place.at("releases/1.0.1/sign.key") })],
    ["under a name that is not served", (place) => ({ key: place.at("releases/.sign.key") })],
    [
      "by a way around",
      (place) => ({ key: place.at("releases/1.0.0/../../releases/1.0.1/sign.key") }),
    ],
    [
      "behind a link from outside",
      (place) => {
        symlinkSync(place.at("releases/1.0.1/sign.key"), place.at("link.key"));
        return { key: place.at("link.key") };
      },
    ],
    [
      "behind a link to a directory",
      (place) => {
        symlinkSync(place.at("releases/1.0.1"), place.at("keys"));
        return { key: place.at("keys/sign.key") };
      },
    ],
    [
      "with a root that is a link",
      (place) => {
        symlinkSync(place.releases, place.at("root"));
        return { root: place.at("root"), key: place.at("releases/sign.key") };
      },
    ],
  ];

  for (const [what, lay] of cases) {
    test(`${what}: the server does not start, for HTTPS neither`, async () => {
      await using place = new Place();
      for (const file of ["sign.key", ".sign.key", "1.0.1/sign.key"]) {
        layTree(place.releases, { [file]: readFileSync(place.at("ours.key")) });
      }
      const { root = place.releases, key } = lay(place);
      const listen = { root, port: 0, host: "127.0.0.1", quiet: 0 };
      for (const options of [{ sign: key }, { tls: { cert: place.at("ours.pub"), key } }]) {
        const error = await serve({ ...listen, ...options }).then(
          (server) => server.stop().then(() => undefined),
          (thrown: unknown) => thrown,
        );
        expect(error).toBeInstanceOf(OTAError);
        expect(error).toMatchObject({ exitCode: 2, message: expect.stringContaining(key) });
      }
    });
  }

  test("on the command line: exit code 2, and it says to move it", async () => {
    await using place = new Place();
    layTree(place.releases, { "sign.key": readFileSync(place.at("ours.key")) });
    const key = place.at("releases/sign.key");
    const ended = await run(["serve", "--root", place.releases, "--port", "0", "--sign", key]);
    expect(ended).toMatchObject({ code: 2, stdout: "" });
    expect(ended.stderr).toContain("move it away");
  });

  test("a link inside the root to a key outside is no way to read it", async () => {
    await using place = new Place();
    symlinkSync(place.at("ours.key"), place.at("releases/sign.key"));
    symlinkSync(place.at("ours.key"), place.at("releases/1.0.1/sign.key"));
    const server = await place.serve({ sign: place.at("ours.key") });
    for (const path of ["/sign.key", "/1.0.1/sign.key", "/../ours.key"]) {
      const { bytes } = await rawRequest(server.url, `GET ${path} HTTP/1.0\r\nHost: a\r\n\r\n`);
      expect(parseResponse(bytes).status).toBe(404);
      expect(Buffer.from(bytes).toString()).not.toContain("PRIVATE");
    }
    const manifest = await (await fetch(`${server.url}/manifest.json`)).text();
    expect(manifest).not.toContain("sign.key");
  });
});

// ── A device that verifies ──

/** What a double of a signing server does differently from a good one. */
interface Lie {
  /** Changes the manifest, before it is signed. */
  manifest?: (fields: Record<string, unknown>, asked: Asked) => unknown;
  /** The key that signs. */
  key?: "ours" | "other";
  /** What is signed, if not what should be. */
  signed?: (body: string, reqid: string) => { body: string; reqid: string };
  /** The header; `undefined` sends none. */
  signature?: (right: string, body: string, place: Place) => string | undefined;
  /** Changes the body, after it is signed. */
  body?: (body: string) => string;
}

/** A server that has 1.0.1 and firmware 1.0.1, and signs what it says. */
function signing(place: Place, lie: Lie, url: () => string): Reply {
  return (asked, connection) => {
    if (asked.path !== "/manifest.json") {
      const path = decodeURIComponent(asked.path).replace(/^\/content\//, "");
      const content = path === "/firmware_1.0.1.bin" ? IMAGE : V2[path];
      if (content === undefined) return send(connection, "not found", { status: 404 });
      return sendContent(asked, connection, Buffer.from(content));
    }
    const reqid = asked.query.get("reqid") ?? "";
    const offer = { version: "1.0.1", put: V2, firmware: ["firmware_1.0.1.bin", IMAGE] as const };
    const fields = {
      ...manifestOf(offer, url()),
      previous_version: asked.query.get("current_ver") || "0",
      request_id: reqid,
      ...(asked.query.has("base") && { base: asked.query.get("base") }),
    };
    const told = lie.manifest ? lie.manifest(fields, asked) : fields;
    const body = JSON.stringify(asked.query.has("list") ? null : told);
    const what = lie.signed?.(body, reqid) ?? { body, reqid };
    const right = signManifest(what.body, what.reqid, place.private(lie.key));
    const signature = lie.signature ? lie.signature(right, body, place) : right;
    const headers: Record<string, string> = {};
    if (signature !== undefined) headers["X-OTA-Signature"] = signature;
    send(connection, lie.body?.(body) ?? body, { headers });
  };
}

/** Changes one entry of the list that has any. */
function inEntries(fields: Record<string, unknown>, change: (entry: object) => object) {
  const list = fields.new as object[];
  return {
    ...fields,
    new: list.map((entry, i) => (i === list.length - 1 ? change(entry) : entry)),
  };
}

const without = (fields: object, name: string): Record<string, unknown> =>
  Object.fromEntries(Object.entries(fields).filter(([key]) => key !== name));

describe.concurrent("client --verify", () => {
  /** Updates the device of a place, as a library: `undefined` when that went well. */
  async function update(place: Place, lie: Lie, ver = "1.0.0"): Promise<unknown> {
    await using double = await Double.start(() => {});
    double.reply = signing(place, lie, () => double.url);
    double.list = signing(place, {}, () => double.url);
    const device = new HttpOTA(double.url, {
      root: place.root,
      ver,
      verify: [place.public()],
    });
    const error = await device.update().then(
      () => undefined,
      (thrown: unknown) => thrown,
    );
    // What is refused is refused at once, before anything is fetched.
    if (error) expect(double.asked.map(({ path }) => path)).toEqual(["/manifest.json"]);
    return error;
  }

  test("takes what is signed for this very request", async () => {
    await using place = new Place();
    expect(await update(place, {})).toBeUndefined();
    expect(place.tree()).toEqual(TREE_2);
    expect(readFileSync(`${place.root}/.ota/ota_0.bin`)).toEqual(IMAGE);
  });

  const refused: [what: string, lie: Lie, because: RegExp][] = [
    ["no signature", { signature: () => undefined }, /not signed/],
    ["an empty signature", { signature: () => "" }, /not signed/],
    ["a signature by another key", { key: "other" }, /none of the keys/],
    [
      "a signature with one bit changed",
      {
        signature: (right) => {
          const bytes = Buffer.from(right, "base64");
          bytes[40]! ^= 1;
          return bytes.toString("base64");
        },
      },
      /none of the keys/,
    ],
    [
      "a signature cut short",
      { signature: (right) => Buffer.from(right, "base64").subarray(0, 63).toString("base64") },
      /none of the keys/,
    ],
    [
      "a signature that goes on",
      { signature: (right) => Buffer.from(`${atob(right)}x`, "latin1").toString("base64") },
      /none of the keys/,
    ],
    ["a signature that is no base64", { signature: () => "%%%" }, /none of the keys/],
    [
      "a signature of the bare body",
      {
        signature: (_, body, place) =>
          sign(null, Buffer.from(body), place.private()).toString("base64"),
      },
      /none of the keys/,
    ],
    [
      "a signature for another request",
      { signed: (body) => ({ body, reqid: "another" }) },
      /none of the keys/,
    ],
    ["a signature for no request", { signed: (body) => ({ body, reqid: "" }) }, /none of the keys/],
    [
      "a body that was changed afterwards",
      { body: (body) => body.replace(sha256(V2["flash/lib.py"]!), sha256("evil")) },
      /none of the keys/,
    ],
    ["a body with one space more", { body: (body) => `${body} ` }, /none of the keys/],
    [
      "what is no JSON, and it does not even try to read it unsigned",
      { body: () => "{".repeat(1000), signature: () => undefined },
      /not signed/,
    ],
    ["null, unsigned", { manifest: () => null, signature: () => undefined }, /not signed/],
    [
      "null, signed for another request",
      { manifest: () => null, signed: (body) => ({ body, reqid: "another" }) },
      /none of the keys/,
    ],
    ["null, signed by another key", { manifest: () => null, key: "other" }, /none of the keys/],
    ["null, where something else was signed", { body: () => "null" }, /none of the keys/],
    ["another request_id", { manifest: (m) => ({ ...m, request_id: "another" }) }, /request_id/],
    ["no request_id", { manifest: (m) => without(m, "request_id") }, /request_id/],
    [
      "another previous_version",
      { manifest: (m) => ({ ...m, previous_version: "0.9" }) },
      /a device on 0\.9, and this one is on 1\.0\.0/,
    ],
    [
      "the same previous_version in another spelling",
      { manifest: (m) => ({ ...m, previous_version: "1.00.0" }) },
      /a device on 1\.00\.0/,
    ],
    ["no previous_version", { manifest: (m) => without(m, "previous_version") }, /a device on/],
    [
      "a version older than its own",
      { manifest: (m) => ({ ...m, version: "0.9.9" }) },
      /0\.9\.9, older than the device's 1\.0\.0/,
    ],
    [
      "an entry without sha256",
      { manifest: (m) => inEntries(m, (entry) => without(entry, "sha256")) },
      /no sha256/,
    ],
    [
      "an entry to update without sha256",
      {
        manifest: (m) => ({
          ...m,
          new: [],
          update: (m.new as object[]).map((entry) => without(entry, "sha256")),
        }),
      },
      /no sha256/,
    ],
    [
      "firmware without sha256",
      { manifest: (m) => ({ ...m, firmware: without(m.firmware as object, "sha256") }) },
      /no sha256/,
    ],
    [
      "a path outside of the root, whoever signed it",
      { manifest: (m) => inEntries(m, (entry) => ({ ...entry, dst_path: "/../evil" })) },
      /path/,
    ],
  ];

  for (const [what, lie, because] of refused) {
    test(`refuses ${what}`, async () => {
      await using place = new Place();
      const error = await update(place, lie);
      expect(error).toBeInstanceOf(OTAError);
      expect(error).toMatchObject({ exitCode: 1, message: expect.stringMatching(because) });
      expect(place.tree()).toEqual(asTree(V1));
    });
  }

  for (const [what, version] of [
    ["the one it runs", "1.0.1"],
    ["an older one", "1.0.0"],
    ["the same in another spelling", "1.00.1"],
  ] as const) {
    test(`refuses firmware that is not newer: ${what}`, async () => {
      await using place = new Place();
      expect(await update(place, {})).toBeUndefined();
      const manifest: Lie["manifest"] = (m) => ({
        ...m,
        firmware: { ...(m.firmware as object), version },
        version: "1.0.2",
      });
      const error = await update(place, { manifest }, "1.0.1");
      expect(error).toBeInstanceOf(OTAError);
      expect(error).toMatchObject({ message: expect.stringContaining(`firmware ${version}`) });
      expect(place.tree()).toEqual(TREE_2);
    });
  }

  test("refuses a version older than the recorded one, whatever --ver says", async () => {
    await using place = new Place();
    expect(await update(place, {})).toBeUndefined();
    const older: Lie = { manifest: (m) => without({ ...m, version: "1.0.0" }, "firmware") };
    expect(await update(place, older, "0.1")).toMatchObject({
      message: expect.stringContaining("older than the device's 1.0.1"),
    });
    expect(place.tree()).toEqual(TREE_2);
  });

  test("sends a random reqid each time, and none without --verify", async () => {
    await using place = new Place();
    await using double = await Double.start((_, connection) => send(connection, "null"));
    const ask = (verify?: KeyObject[]) =>
      new HttpOTA(double.url, { root: place.root, ...(verify && { verify }) })
        .update()
        .catch(() => {});
    await ask([place.public()]);
    await ask([place.public()]);
    await ask();
    const [first, second, third] = double.asked.map(({ query }) => query.get("reqid"));
    expect(first).toMatch(/^[0-9a-f-]{32,}$/);
    expect(second).toMatch(/^[0-9a-f-]{32,}$/);
    expect(second).not.toBe(first);
    expect(third).toBeNull();
  });

  test("content that is right by SHA-1 and wrong by SHA-256 is refused", async () => {
    await using place = new Place();
    const forged = Buffer.from("print('evil')\n");
    // As if somebody had found another content with the same SHA-1.
    const manifest: Lie["manifest"] = (m) =>
      without(
        inEntries(m, (entry) => ({ ...entry, hash: sha1(forged), size: forged.length })),
        "firmware",
      );
    await using double = await Double.start(() => {});
    const honest = signing(place, { manifest }, () => double.url);
    double.list = honest;
    double.reply = (asked, connection) =>
      asked.path === "/manifest.json"
        ? honest(asked, connection)
        : sendContent(asked, connection, forged);
    const ended = await place.client(["--verify", place.at("ours.pub")], double);
    expect(ended).toMatchObject({ code: 1, stdout: "" });
    expect(ended.stderr).toContain("does not verify");
    expect(place.tree()).toEqual(asTree(V1));
  });

  test("an old answer of the real server, signed and all, is refused when it is replayed", async () => {
    await using place = new Place();
    const server = await place.serve({ sign: place.at("ours.key") });
    // Somebody on the way who keeps what he hears.
    const kept: { body: string; signature: string }[] = [];
    await using double = await Double.start(async (asked, connection) => {
      const response = await fetch(server.url + asked.target);
      const signature = response.headers.get("x-ota-signature") ?? "";
      const body = await response.text();
      if (asked.path === "/manifest.json") kept.push({ body, signature });
      send(connection, body, { headers: { "X-OTA-Signature": signature } });
    });
    double.list = double.reply;
    const verify = ["--verify", place.at("ours.pub")];
    // Through him all is well: what 1.0.0 consists of, an update, and null.
    expect((await place.client(verify, double)).last).toBe("updated 1.0.0 -> 1.0.1");
    expect((await place.client(verify, double)).last).toBe("up to date 1.0.1");
    expect(kept.map(({ body }) => body === "null")).toEqual([false, false, true]);
    // Then comes 1.0.2, and he repeats himself.
    layTree(`${place.releases}/1.0.2`, V1);
    for (const { body, signature } of kept) {
      double.reply = (_, connection) =>
        send(connection, body, { headers: { "X-OTA-Signature": signature } });
      const ended = await place.client(verify, double);
      expect(ended).toMatchObject({ code: 1, stdout: "" });
      expect(ended.stderr).toContain("none of the keys");
    }
    expect(place.tree()).toEqual(TREE_2);
  });

  test("a diff for what the device does not have is refused: somebody took its base away", async () => {
    await using place = new Place();
    const server = await place.serve({ sign: place.at("ours.key") });
    let behind = server.url;
    let isHonest = true;
    await using double = await Double.start(async (asked, connection) => {
      const target = isHonest ? asked.target : asked.target.replace(/&base=[0-9a-f]+/, "");
      const response = await fetch(behind + target);
      const signature = response.headers.get("x-ota-signature") ?? "";
      send(connection, await response.text(), { headers: { "X-OTA-Signature": signature } });
    });
    double.list = double.reply;
    const verify = ["--verify", place.at("ours.pub")];
    expect((await place.client(verify, double)).last).toBe("updated 1.0.0 -> 1.0.1");
    // What 1.0.2 has in common with 1.0.1 is not in a diff.
    layTree(`${place.releases}/1.0.2`, { ...V2, "flash/added.py": "added\n" });
    await using newer = await Served.start(place.releases, { sign: place.at("ours.key") });
    behind = newer.url;
    const [path] = Object.keys(V2);
    layTree(place.root, { [path!]: "scribbled" });
    const before = place.tree();
    isHonest = false;
    const refused = await place.client(verify, double);
    expect(refused).toMatchObject({ code: 1, stdout: "" });
    expect(refused.stderr).toContain("base was lost on the way");
    expect(place.tree()).toEqual(before);
    isHonest = true;
    expect((await place.client(verify, double)).last).toBe("updated 1.0.1 -> 1.0.2");
    expect(place.tree()[path!]).toEqual(asTree(V2)[path!]!);
  });

  test("several times: a key is exchanged without a device that is left behind", async () => {
    await using place = new Place();
    const both = ["--verify", place.at("ours.pub"), "--verify", place.at("other.pub")];
    await using before = await Served.start(place.releases, { sign: place.at("ours.key") });
    expect((await place.client(both, before)).last).toBe("updated 1.0.0 -> 1.0.1");
    layTree(`${place.releases}/1.0.2`, V1);
    await using after = await Served.start(place.releases, { sign: place.at("other.key") });
    const late = await place.client(["--verify", place.at("ours.pub")], after);
    expect(late).toMatchObject({ code: 1, stdout: "" });
    expect((await place.client(both, after)).last).toBe("updated 1.0.1 -> 1.0.2");
  });

  test("a server that does not sign is of no use; exit code 1, and it says why", async () => {
    await using place = new Place();
    const server = await place.serve();
    const ended = await place.client(["--verify", place.at("ours.pub")], server);
    expect(ended).toMatchObject({ code: 1, stdout: "" });
    expect(ended.stderr).toContain("it is not signed");
    expect(place.tree()).toEqual(asTree(V1));
    expect(server.sent).toEqual([]);
  });

  test("a key that is none, or missing: exit code 2, and nobody is asked", async () => {
    await using place = new Place();
    const server = await place.serve();
    for (const file of [place.at("device/flash/main.py"), place.at("missing.pub")]) {
      const ended = await place.client(["--verify", file], server);
      expect(ended).toMatchObject({ code: 2, stdout: "" });
      expect(ended.stderr).toContain(file);
    }
    expect(server.requests).toEqual([]);
  });

  test("goes with --repair", async () => {
    await using place = new Place();
    const server = await place.serve({ sign: place.at("ours.key") });
    const verify = ["--verify", place.at("ours.pub")];
    expect((await place.client(verify, server)).code).toBe(0);
    layTree(place.root, { "flash/lib.py": "spoilt\n" });
    expect((await place.client([...verify, "--repair"], server)).code).toBe(0);
    expect(place.tree()).toEqual(TREE_2);
  });
});

// ── Tokens ──

const TOKEN = "s3cret+/=&%\u00e9 7";
const QUERY_TOKEN = encodeURIComponent(TOKEN);
const PLAIN_TOKEN = "s3cret-7f2";

describe.concurrent("serve --token", () => {
  let place: Place;
  let server: Served;

  beforeAll(async () => {
    place = new Place();
    layTree(place.releases, { "firmware_1.0.1.bin": IMAGE, "notes.txt": "notes" });
    server = await place.serve({ token: PLAIN_TOKEN });
  });

  afterAll(() => place?.[Symbol.asyncDispose]());

  const paths = [
    ...["/manifest.json", "/manifest.json?current_ver=1.0.0", "/manifest.json?current_ver=%00"],
    ...["/1.0.1/flash/main.py", "/firmware_1.0.1.bin", "/notes.txt", "/none", "/", "/.env"],
    ...["/-/health", "/-/metrics", "/-/none", "/%zz", "/1.0.1/", "/../ours.key"],
  ];
  const wrong: [what: string, headers: Record<string, string>, query: string][] = [
    ["none", {}, ""],
    ["an empty one", { Authorization: "Bearer " }, "token="],
    ["a wrong one in the header", { Authorization: "Bearer wrong" }, ""],
    ["a wrong one in the query", {}, "token=wrong"],
    ["the beginning of it", { Authorization: `Bearer ${PLAIN_TOKEN.slice(0, -1)}` }, ""],
    ["it and more", {}, `token=${PLAIN_TOKEN}0`],
    ["it in capitals", {}, `token=${PLAIN_TOKEN.toUpperCase()}`],
    ["it in another scheme", { Authorization: `Basic ${btoa(`:${PLAIN_TOKEN}`)}` }, ""],
    ["it without a scheme", { Authorization: PLAIN_TOKEN }, ""],
    ["it under another name", { Cookie: `token=${PLAIN_TOKEN}` }, `Token=${PLAIN_TOKEN}`],
    ["a wrong one first", {}, `token=wrong&token=${PLAIN_TOKEN}`],
  ];

  for (const [what, headers, query] of wrong) {
    test(`${what}: everything is 401, whatever is asked for and how`, async () => {
      for (const path of paths) {
        for (const method of ["GET", "HEAD", "POST", "OPTIONS"]) {
          const target = `${path}${query && (path.includes("?") ? "&" : "?")}${query}`;
          const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
          const request = `${method} ${target} HTTP/1.0\r\nHost: a\r\n${lines.join("")}\r\n`;
          const { bytes } = await rawRequest(server.url, request);
          const response = parseResponse(bytes);
          expect([method, target, response.status]).toEqual([method, target, 401]);
          expect(response.headers.get("www-authenticate")).toBe("Bearer");
          // Nothing tells what is there and what is not.
          const body = Buffer.from(response.body).toString();
          expect(body).toBe(method === "HEAD" ? "" : "a token is needed\n");
        }
      }
    });
  }

  test("the right one in the header or the query: everything is as without a token", async () => {
    await using open = await Served.start(place.releases);
    for (const path of paths.filter((path) => path !== "/-/metrics")) {
      const expected = await fetch(open.url + path);
      const inHeader = await fetch(server.url + path, {
        headers: { Authorization: `Bearer ${PLAIN_TOKEN}` },
      });
      const lower = await fetch(server.url + path, {
        headers: { Authorization: `bearer ${PLAIN_TOKEN}` },
      });
      const query = `${path.includes("?") ? "&" : "?"}token=${PLAIN_TOKEN}`;
      const inQuery = await fetch(server.url + path + query);
      for (const response of [inHeader, lower, inQuery]) {
        expect([path, response.status]).toEqual([path, expected.status]);
      }
    }
  });

  test("one with characters of every kind can be sent both ways", async () => {
    // A header has only Latin-1, so the é goes by the query alone.
    await using odd = await Served.start(place.releases, { token: TOKEN });
    expect((await fetch(`${odd.url}/notes.txt?token=${QUERY_TOKEN}`)).status).toBe(200);
    const manifest = await fetch(`${odd.url}/manifest.json?token=${QUERY_TOKEN}`);
    const { firmware } = (await manifest.json()) as { firmware: { URL: string } };
    expect((await fetch(firmware.URL)).status).toBe(200);
    await using plus = await Served.start(place.releases, { token: "a+b/c==" });
    expect((await fetch(`${plus.url}/notes.txt?token=a+b/c==`)).status).toBe(200);
    const headers = { Authorization: "Bearer a+b/c==" };
    expect((await fetch(`${plus.url}/notes.txt`, { headers })).status).toBe(200);
  });

  test("asked for in the header, a manifest does not have it in its URLs", async () => {
    const headers = { Authorization: `Bearer ${PLAIN_TOKEN}` };
    const text = await (await fetch(`${server.url}/manifest.json`, { headers })).text();
    expect(text).toContain("/1.0.1/flash/main.py");
    expect(text).not.toContain(PLAIN_TOKEN);
    expect(text).not.toContain("token");
  });

  test("asked for with token=, as boards do: it is in every URL, and a board gets all of it", async () => {
    const asked = `/manifest.json?current_ver=1.0.0&token=${PLAIN_TOKEN}`;
    const { body } = await boardGet(server.url, asked);
    const manifest = JSON.parse(Buffer.from(body).toString()) as {
      firmware: { URL: string; hash: string };
      new: { URL: string; hash: string }[];
      update: { URL: string; hash: string }[];
    };
    const entries = [manifest.firmware, ...manifest.new, ...manifest.update];
    expect(entries.length).toBe(3);
    for (const { URL: url, hash } of entries) {
      expect(url).toEndWith(`?token=${PLAIN_TOKEN}`);
      const path = `/${url.split("/").slice(3).join("/")}`;
      expect(sha1((await boardGet(server.url, path)).body)).toBe(hash);
    }
  });

  test("a server without a token repeats nobody's", async () => {
    await using open = await Served.start(place.releases);
    const text = await (await fetch(`${open.url}/manifest.json?token=mine`)).text();
    expect(text).not.toContain("mine");
  });

  test("OTA_TOKEN is as good, --token goes before it, and neither is ever printed", async () => {
    const env = { OTA_TOKEN: "from-the-environment" };
    const root = ["--root", place.releases];
    const both = [
      [root, "from-the-environment", "not-this-one"],
      [[...root, "--token", PLAIN_TOKEN], PLAIN_TOKEN, "from-the-environment"],
    ] as const;
    for (const [args, token, wrongOne] of both) {
      await using process = await Serving.start([...args, ...LOCAL], { env });
      const status = async (path: string, headers: Record<string, string> = {}) =>
        (await fetch(process.url + path, { headers })).status;
      expect(await status("/notes.txt")).toBe(401);
      expect(await status(`/notes.txt?token=${wrongOne}`)).toBe(401);
      expect(await status(`/notes.txt?token=${token}`)).toBe(200);
      expect(await status("/notes.txt", { Authorization: `Bearer ${token}` })).toBe(200);
      expect(await status(`/none?a=b&token=${token}&devid=meter`)).toBe(404);
      expect(await status(`/manifest.json?token=${token}&current_ver=1.0.0&failed=1`)).toBe(200);
      const absolute = `GET http://a/notes.txt?token=${token} HTTP/1.0\r\nHost: a\r\n\r\n`;
      expect(parseResponse((await rawRequest(process.url, absolute)).bytes).status).toBe(200);
      const text = await (await fetch(`${process.url}/-/metrics?token=${token}`)).text();
      process.kill("SIGTERM");
      const { stdout, stderr, code } = await process.ended;
      expect(code).toBe(0);
      expect(stdout).toContain("/notes.txt 401");
      for (const printed of [stdout, stderr, text]) {
        expect(printed).not.toContain(token);
        expect(printed).not.toContain(wrongOne);
      }
    }
  });
});

describe.concurrent("client --token", () => {
  test("updates from a server that wants it; without it, exit code 1 and a hint", async () => {
    await using place = new Place();
    const server = await place.serve({ token: PLAIN_TOKEN });
    const none = await place.client([], server);
    expect(none).toMatchObject({ code: 1, stdout: "" });
    expect(none.stderr).toContain("--token");
    const wrong = await place.client(["--token", "wrong"], server);
    expect(wrong).toMatchObject({ code: 1, stdout: "" });
    expect(wrong.stderr).not.toContain("wrong");
    expect(place.tree()).toEqual(asTree(V1));
    const right = await place.client(["--token", PLAIN_TOKEN], server);
    expect(right).toMatchObject({ code: 0, last: "updated 1.0.0 -> 1.0.1" });
    expect(place.tree()).toEqual(TREE_2);
    expect(right.stdout + right.stderr).not.toContain(PLAIN_TOKEN);
  });

  test("comes from OTA_TOKEN, too; --token goes before it", async () => {
    await using place = new Place();
    const server = await place.serve({ token: PLAIN_TOKEN });
    const env = { OTA_TOKEN: "another" };
    expect((await place.process([], server, { env })).code).toBe(1);
    expect((await place.process(["--token", PLAIN_TOKEN], server, { env })).code).toBe(0);
    expect((await place.process([], server, { env: { OTA_TOKEN: PLAIN_TOKEN } })).code).toBe(0);
  });

  test("goes to the origin of --server and nowhere else: not to a CDN on another port", async () => {
    await using place = new Place();
    await using cdn = await Double.start(() => {});
    await using origin = await Double.start(() => {});
    // One file comes from the server itself, the other one from the CDN.
    const reply: (own: Double) => Reply = () => (asked, connection) => {
      const path = asked.path.slice("/content/".length);
      if (asked.path !== "/manifest.json") return send(connection, V2[path] ?? "");
      const here = manifestOf({ version: "1.0.1", put: V2 }, origin.url);
      const there = manifestOf({ version: "1.0.1", put: V2 }, cdn.url);
      const [first] = here.new as object[];
      const [, second] = there.new as object[];
      send(connection, JSON.stringify({ ...here, new: [first, second] }));
    };
    [origin.reply, cdn.reply] = [reply(origin), reply(cdn)];
    const ended = await place.client(["--token", PLAIN_TOKEN], origin);
    expect(ended.last).toBe("updated 1.0.0 -> 1.0.1");
    expect(origin.asked.map(({ headers }) => headers.get("authorization"))).toEqual([
      `Bearer ${PLAIN_TOKEN}`,
      `Bearer ${PLAIN_TOKEN}`,
    ]);
    expect(cdn.asked.map(({ path }) => path)).toEqual(["/content/flash/lib.py"]);
    for (const { headers, target } of cdn.asked) {
      expect(headers.get("authorization")).toBeNull();
      expect([...headers.values(), target].join()).not.toContain(PLAIN_TOKEN);
    }
  });

  test("a real server with --url elsewhere: the CDN gets no token", async () => {
    await using place = new Place();
    await using cdn = await Double.start((asked, connection) => {
      send(connection, V2[asked.path.slice("/fleet/1.0.1/".length)] ?? "");
    });
    const server = await place.serve({ token: PLAIN_TOKEN, url: `${cdn.url}/fleet` });
    /** Of small files: content that came in a manifest would not be fetched. */
    class Fetching extends HttpOTA {
      protected override readonly isBrief = false;
    }
    const options = { root: place.at("device"), ver: "1.0.0", token: PLAIN_TOKEN };
    const ended = await new Fetching(server.url, options).update();
    expect(ended).toMatchObject({ result: "updated", from: "1.0.0", to: "1.0.1" });
    expect(cdn.asked.length).toBe(2);
    for (const { headers, target } of cdn.asked) {
      expect([...headers.values(), target].join()).not.toContain(PLAIN_TOKEN);
    }
    expect(place.tree()).toEqual(TREE_2);
  });

  for (const status of [301, 302, 303, 307, 308]) {
    test(`follows a ${status} on the same origin with it, and none to another`, async () => {
      await using place = new Place();
      await using thief = await Double.start((_, connection) => send(connection, "null"));
      await using origin = await Double.start((asked, connection) => {
        if (asked.path === "/moved.json") return send(connection, "null");
        const Location = asked.query.has("away") ? thief.url : `/moved.json?${asked.query}`;
        send(connection, "", { status, headers: { Location } });
      });
      const device = { root: place.root, ver: "1.0.0", token: PLAIN_TOKEN };
      expect(await new HttpOTA(origin.url, device).update()).toMatchObject({
        result: "up to date",
      });
      expect(origin.asked.map(({ headers }) => headers.get("authorization"))).toEqual([
        `Bearer ${PLAIN_TOKEN}`,
        `Bearer ${PLAIN_TOKEN}`,
      ]);

      for (const to of [`${thief.url}/x`, thief.url.replace("http:", ""), "ftp://127.0.0.1/"]) {
        origin.reply = (_, connection) =>
          send(connection, "", { status, headers: { Location: to } });
        const error = await new HttpOTA(origin.url, device).update().catch((e: unknown) => e);
        expect(error).toBeInstanceOf(OTAError);
        expect(String(error)).toContain("redirects to another server");
        expect(String(error)).not.toContain(PLAIN_TOKEN);
      }
      expect(thief.asked).toEqual([]);
    });
  }

  test("does not go round in circles", async () => {
    await using place = new Place();
    await using origin = await Double.start((_, connection) =>
      send(connection, "", { status: 302, headers: { Location: "/manifest.json" } }),
    );
    const error = await new HttpOTA(origin.url, { root: place.root })
      .update()
      .catch((e: unknown) => e);
    expect(String(error)).toContain("redirects more than");
    expect(origin.asked.length).toBeLessThan(10);
  });
});

// ── HTTPS ──

describe.concurrent("serve --tls-cert --tls-key", () => {
  let place: Place;
  let good: Certified;
  let server: Serving;

  beforeAll(async () => {
    place = new Place();
    good = certify(place.path, "IP:127.0.0.1,DNS:localhost");
    const files = ["--tls-cert", good.cert, "--tls-key", good.key];
    const access = ["--token", PLAIN_TOKEN, "--sign", place.at("ours.key")];
    server = await Serving.start(["--root", place.releases, ...files, ...access, ...LOCAL]);
  });

  afterAll(async () => {
    await server?.[Symbol.asyncDispose]();
    place?.[Symbol.dispose]();
  });

  /** Runs curl to its end. */
  async function curl(args: readonly string[]) {
    const child = Bun.spawn([need("curl"), "-sS", ...args], { stderr: "pipe" });
    const [stdout, code] = await Promise.all([child.stdout.text(), child.exited]);
    return { stdout, code };
  }

  test("says https in its first lines and in the URLs of manifests", async () => {
    expect(server.url).toStartWith("https://127.0.0.1:");
    const url = `${server.url}/manifest.json?token=${PLAIN_TOKEN}`;
    const { stdout } = await curl(["--cacert", good.ca, url]);
    const { new: files } = JSON.parse(stdout) as { new: { URL: string }[] };
    for (const { URL: link } of files) expect(link).toStartWith(`${server.url}/1.0.1/`);
  });

  test("says https also when it listens on every address", async () => {
    const files = ["--tls-cert", good.cert, "--tls-key", good.key];
    await using tool = new Tool(["serve", "--port", "0", "--root", place.releases, ...files]);
    const [, first, tried] = await tool.until(/ at (\S+)\n[^]*^try +curl '(.*)'$/m);
    expect(first).toMatch(/^https:\/\/127\.0\.0\.1:\d+$/);
    expect(tried).toStartWith(`${first}/manifest.json`);
  });

  test("curl trusts it by the authority, and not without", async () => {
    const url = `${server.url}/1.0.1/flash/main.py?token=${PLAIN_TOKEN}`;
    const trusted = await curl(["--cacert", good.ca, url]);
    expect(trusted).toEqual({ code: 0, stdout: String(V2["flash/main.py"]) });
    expect((await curl([url])).code).toBe(60);
  });

  test("client --ca updates through it, signed and with a token", async () => {
    using mine = new Place();
    const access = ["--token", PLAIN_TOKEN, "--verify", place.at("ours.pub")];
    const ended = await mine.client(["--ca", good.ca, ...access], server);
    expect(ended).toMatchObject({ code: 0, last: "updated 1.0.0 -> 1.0.1" });
    expect(mine.tree()).toEqual(TREE_2);
  });

  /** What a client makes of a server that it should not trust: it says so, and has got nothing. */
  async function expectDistrust(url: string, args: readonly string[]): Promise<void> {
    using mine = new Place();
    await using tool = new Tool(mine.args(args, { url }));
    await tool.until(/cannot reach https:[^\n]*(certificate|CERT)/i, "stderr");
    tool.kill("SIGTERM");
    expect(await tool.ended).toMatchObject({ code: 1, stdout: "" });
    expect(mine.tree()).toEqual(asTree(V1));
  }

  test("a client without --ca does not trust it", async () => {
    await expectDistrust(server.url, ["--token", PLAIN_TOKEN]);
  });

  test("a client with another authority does not trust it", async () => {
    using other = new Temp();
    const { ca } = certify(other.path, "IP:127.0.0.1");
    await expectDistrust(server.url, ["--token", PLAIN_TOKEN, "--ca", ca]);
  });

  test("a client does not trust a certificate for another name", async () => {
    using other = new Temp();
    const { ca, cert, key } = certify(other.path, "DNS:ota.test");
    await using named = await Served.start(place.releases, { tls: { cert, key } });
    await expectDistrust(named.url.replace("http:", "https:"), ["--ca", ca]);
    expect(named.requests).toEqual([]);
  });

  test("plain HTTP to its port gets nothing", async () => {
    const request = `GET /1.0.1/flash/main.py?token=${PLAIN_TOKEN} HTTP/1.0\r\nHost: a\r\n\r\n`;
    const { bytes } = await rawRequest(server.url.replace("https:", "http:"), request);
    expect(Buffer.from(bytes).toString()).not.toContain("print");
  });

  test("files that are missing or no certificate, or only one of them: one line that says so", async () => {
    using mine = new Place();
    const none = mine.at("missing.pem");
    const text = mine.at("device/flash/main.py");
    for (const [args, codes] of [
      [["--tls-cert", good.cert], [2]],
      [["--tls-key", good.key], [2]],
      [
        ["--tls-cert", good.cert, "--tls-key", none],
        [1, 2],
      ],
      [
        ["--tls-cert", none, "--tls-key", good.key],
        [1, 2],
      ],
      [
        ["--tls-cert", text, "--tls-key", good.key],
        [1, 2],
      ],
    ] as const) {
      const root = ["--root", mine.releases, "--port", "0", "--host", "127.0.0.1"];
      const ended = await run(["serve", ...root, ...args]);
      expect(codes as readonly (number | null)[]).toContain(ended.code);
      expect(ended.stdout).toBe("");
      expect(ended.stderr).toMatch(/^ota\.ts: [^\n]*\n$/);
    }
  });

  test("a --ca that cannot be read: exit code 2", async () => {
    using mine = new Place();
    const ended = await mine.client(["--ca", mine.at("missing.pem")], server);
    expect(ended).toMatchObject({ code: 2, stdout: "" });
  });
});

test("a key that others may read is still used: whose it is is not for us to say", async () => {
  await using place = new Place();
  chmodSync(place.at("ours.key"), 0o644);
  const server = await place.serve({ sign: place.at("ours.key") });
  expect((await place.client(["--verify", place.at("ours.pub")], server)).code).toBe(0);
});
