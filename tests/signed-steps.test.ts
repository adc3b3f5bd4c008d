/**
 * Steps that are signed at home: made by `sign`, carried by any server or directory, verified by the
 * device. Real files, sockets and the real server; a man in the middle edits what it says; openssl
 * stands for whoever has other tools than ours.
 */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { createPrivateKey, createPublicKey, sign, type KeyObject } from "node:crypto";
import { spawnSync } from "node:child_process";
import {
  cpSync,
  existsSync,
  readdirSync,
  readFileSync,
  rmSync,
  statfsSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { makeKeys, Releases, STEP_TYPE, type Envelope, type Manifest, type Step } from "../ota.ts";
import { preAuth } from "./board/desk.ts";
import { sha256 } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import { openssl } from "./helpers/pki.ts";
import { asTree, type Tree } from "./helpers/temp.ts";
import { need, run, until, type Ran } from "./helpers/tool.ts";
import { World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const V0: Tree = { "flash/main.py": "print('nought')\n", "flash/old.py": "OLD = 1\n" };
const V1: Tree = { "flash/main.py": "print('one')\n", "flash/old.py": "OLD = 1\n" };
const V2: Tree = { "flash/main.py": "print('two')\n", "flash/lib.py": "LIB = 2\n" };
const IMAGE = Buffer.alloc(3000, 0xe9);
const own = (version: string): Tree => ({ "flash/OTA_VERSION.py": `VERSION = '${version}'\n` });
const TREE_1 = asTree(V1);
const TREE_2 = asTree({ ...V2, ...own("1.0.1") });

/** Releases 0.9.0 to 1.0.1 that the key `home` has signed, a device on 1.0.0, and other keys. */
class Home extends World {
  constructor(versions: Record<string, Tree> = { "0.9.0": V0, "1.0.0": V1, "1.0.1": V2 }) {
    super(versions, { device: V1, beside: { "firmware_1.0.1.bin": IMAGE } });
    for (const name of ["home", "second", "stranger"]) {
      const { key, pub } = makeKeys();
      this.write({ [`${name}.key`]: key, [`${name}.pub`]: pub });
    }
  }

  static async signed(): Promise<Home> {
    const home = new Home();
    await home.sign();
    await home.serve();
    return home;
  }

  /** One whose releases are on a disk of 128 KiB. */
  static async onSmallDisk(): Promise<SmallHome> {
    return new SmallHome();
  }

  private(name = "home"): KeyObject {
    return createPrivateKey(readFileSync(this.at(`${name}.key`)));
  }

  sign(args: readonly string[] = [], name = "home"): Promise<Ran> {
    return run(["sign", "--root", this.releases, "--key", this.at(`${name}.key`), ...args]);
  }

  check(names: readonly string[] = ["home"], args: readonly string[] = []): Promise<Ran> {
    const keys = names.flatMap((name) => ["--check", this.at(`${name}.pub`)]);
    return run(["sign", "--root", this.releases, ...keys, ...args]);
  }

  file(version = "1.0.1"): string {
    return this.at("releases", `signed_${version}.json`);
  }

  /** The steps to a version, as they are in its file. */
  envelopes(version = "1.0.1"): Map<string, Envelope> {
    const { steps } = JSON.parse(readFileSync(this.file(version), "utf8")) as { steps: Envelope[] };
    return new Map(steps.map((envelope) => [stepOf(envelope).from, envelope]));
  }

  /** Runs a client that trusts some keys. */
  device(
    from: { url: string } = this,
    names: readonly string[] = ["home"],
    args: readonly string[] = [],
  ): Promise<Ran> {
    const keys = names.flatMap((name) => ["--verify", this.at(`${name}.pub`)]);
    return this.client(["--ver", "1.0.0", ...keys, ...args], from);
  }

  /** What a device said that must have refused a manifest, and is as it was. */
  async refuses(from: { url: string }, args: readonly string[] = []): Promise<string> {
    const before = this.tree();
    const { code, stderr } = await this.device(from, ["home"], args);
    expect({ code, tree: this.tree() }).toEqual({ code: 1, tree: before });
    return stderr;
  }

  get issued(): string | undefined {
    return JSON.parse(readFileSync(this.at("device/.ota/state.json"), "utf8")).installed?.issued;
  }
}

class SmallHome extends Home {
  constructor() {
    super({});
    const options = ["-t", "tmpfs", "-o", "size=128k", "tmpfs", this.releases];
    const { status, stderr } = spawnSync(need("mount"), options, { encoding: "utf8" });
    if (status !== 0) throw new Error(`mount: ${stderr}`);
    for (const [version, files] of Object.entries({ "1.0.0": V1, "1.0.1": V2 })) {
      this.release(version, files);
    }
  }

  get free(): number {
    const { bavail, bsize } = statfsSync(this.releases);
    return bavail * bsize;
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    spawnSync("umount", [this.releases]);
    await super[Symbol.asyncDispose]();
  }
}

const stepOf = ({ payload }: Envelope): Step =>
  JSON.parse(Buffer.from(payload, "base64").toString());

const pae = (payload: Buffer) => preAuth(STEP_TYPE, payload);

/** An envelope with another payload, signed by these keys. */
function seal(step: object, ...keys: KeyObject[]): Envelope {
  const payload = Buffer.from(JSON.stringify(step));
  return {
    payload: payload.toString("base64"),
    payloadType: STEP_TYPE,
    signatures: keys.map((key) => ({
      keyid: "",
      sig: sign(null, pae(payload), key).toString("base64"),
    })),
  };
}

/** A man in the middle, who may change each manifest, and take parameters out of the query. */
function between(
  home: Home,
  edit: (manifest: Manifest, url: URL) => unknown,
  without: readonly string[] = [],
) {
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: async (request) => {
      const url = new URL(request.url);
      for (const name of without) url.searchParams.delete(name);
      const target = home.url + url.pathname + url.search;
      const headers = { ...Object.fromEntries(request.headers), "accept-encoding": "identity" };
      const answer = await fetch(target, { headers });
      if (url.pathname !== "/manifest.json") return answer;
      return Response.json((edit((await answer.json()) as Manifest, url) as object) ?? null);
    },
  });
  return { url: `http://127.0.0.1:${server.port}`, [Symbol.asyncDispose]: () => server.stop(true) };
}

/** One that changes only what brings the device forward, not the list of what it has. */
const changing = (home: Home, edit: (manifest: Manifest) => unknown) =>
  between(home, (manifest, url) => (url.searchParams.has("list") ? manifest : edit(manifest)));

/** One that exchanges the step. */
const resigning = (home: Home, change: Partial<Step>, ...keys: KeyObject[]) =>
  changing(home, (manifest) => ({
    ...manifest,
    signed: seal({ ...stepOf(manifest.signed!), ...change }, ...keys),
  }));

describe("sign", () => {
  test("signs what brings a device to each version: from each other, from nothing, from any", async () => {
    await using home = new Home();
    const { code, stdout } = await home.sign();
    expect({ code, stdout }).toEqual({
      code: 0,
      stdout:
        "signed 0.9.0: 3 steps, 1 signature\nsigned 1.0.0: 4 steps, 1 signature\n" +
        "signed 1.0.1: 5 steps, 1 signature\n",
    });
    expect([...home.envelopes().keys()].sort()).toEqual(["", "*", "0.9.0", "1.0.0", "1.0.1"]);
    expect(existsSync(home.at("releases/.signed_1.0.1.json.new"))).toBe(false);
  });

  test("the payload is compact JSON with sorted keys, and says what is in the manifest", async () => {
    await using home = new Home();
    await home.sign(["--ver", "1.0.1", "--model", "lopy4", "--expires", "365d"]);
    const payload = Buffer.from(home.envelopes().get("1.0.0")!.payload, "base64").toString();
    const step = JSON.parse(payload) as Step;
    expect(payload).toBe(JSON.stringify(step));
    expect(Object.keys(step)).toEqual(Object.keys(step).sort());
    const lines = [
      "D flash/old.py\n",
      `N flash/lib.py\0${sha256(V2["flash/lib.py"]!)}\n`,
      `U flash/main.py\0${sha256(V2["flash/main.py"]!)}\n`,
    ];
    expect(step).toEqual({
      expires: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/) as unknown as string,
      firmware: { sha256: sha256(IMAGE), size: IMAGE.length, version: "1.0.1" },
      from: "1.0.0",
      issued: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/) as unknown as string,
      model: "lopy4",
      release: (await Releases.open(home.releases, { quiet: 0 })).find("1.0.1")!.digest,
      steps: sha256(lines.join("")),
      to: "1.0.1",
    });
    expect(Date.parse(step.expires!) - Date.parse(step.issued)).toBe(365 * 86_400_000);
    const all = Object.entries(V2).map(([path, text]) => `N ${path}\0${sha256(text)}\n`);
    const full = stepOf(home.envelopes().get("*")!);
    expect(full.steps).toBe(sha256(`F\n${all.sort().join("")}`));
    expect(stepOf(home.envelopes().get("1.0.1")!).steps).toBe(sha256(""));
  });

  test("openssl verifies it", async () => {
    await using home = new Home();
    await home.sign();
    for (const { payload, signatures } of home.envelopes().values()) {
      writeFileSync(home.at("signed"), pae(Buffer.from(payload, "base64")));
      writeFileSync(home.at("sig"), Buffer.from(signatures[0]!.sig, "base64"));
      const key = ["-pubin", "-inkey", home.at("home.pub"), "-sigfile", home.at("sig")];
      const found = openssl(["pkeyutl", "-verify", "-rawin", "-in", home.at("signed"), ...key]);
      expect(found.stdout).toContain("Signature Verified Successfully");
    }
  });

  test("a second key signs the same payloads; the same key again changes nothing", async () => {
    await using home = new Home();
    await home.sign();
    const first = home.envelopes();
    expect((await home.sign([], "second")).stdout).toContain("1.0.1: 5 steps, 2 signatures");
    const second = home.envelopes();
    for (const [from, { payload }] of first) expect(second.get(from)!.payload).toBe(payload);
    const text = readFileSync(home.file(), "utf8");
    await home.sign([], "second");
    expect(readFileSync(home.file(), "utf8")).toBe(text);
    expect((await home.check(["home", "second"])).code).toBe(0);
  });

  test("after an edit of the release it starts anew, and says so", async () => {
    await using home = new Home();
    await home.sign();
    home.release("1.0.1", { "flash/main.py": "print('2')\n" });
    const { stderr } = await home.sign([], "second");
    expect(stderr).toBe(
      "1.0.1 is not what was signed before (its files): signed anew, by this key alone\n",
    );
    expect((await home.check(["second"], ["--ver", "1.0.1"])).code).toBe(0);
    const { code, stderr: missing } = await home.check(["home"], ["--ver", "1.0.1"]);
    expect({ code, missing }).toEqual({
      code: 1,
      missing: expect.stringContaining("1.0.1: the step from nothing is not signed by ") as string,
    });
  });

  test("--check says what changed, and what is missing", async () => {
    await using home = new Home();
    const check = async () => (await home.check(["home"], ["--ver", "1.0.1"])).stderr;
    expect(await check()).toBe("1.0.1: there is no signed_1.0.1.json\n");
    await home.sign();
    home.release("1.0.1", { "flash/new.py": "" });
    expect(await check()).toBe("1.0.1: it was changed since it was signed: flash/new.py\n");
    rmSync(home.at("releases/1.0.1/flash/new.py"));
    home.release("0.9.5", V0);
    expect(await check()).toBe("1.0.1: the step from 0.9.5 is missing\n");
    home.write({ "releases/firmware_1.0.1.bin": "other" });
    expect(await check()).toContain("firmware 1.0.1, which is not here as it was");
  });

  test("two people who sign by the same command sign the same; what is not given stays", async () => {
    await using home = new Home();
    const args = ["--ver", "1.0.1", "--expires", "365d", "--model", "lopy4"];
    await home.sign(args);
    expect((await home.sign(args, "second")).stdout).toContain("2 signatures");
    expect(await home.sign(["--ver", "1.0.1"], "stranger")).toMatchObject({
      stderr: "",
      stdout: "signed 1.0.1: 5 steps, 3 signatures\n",
    });
    const { model, expires } = stepOf(home.envelopes().get("1.0.0")!);
    expect({ model, expires }).toEqual({ model: "lopy4", expires: expect.any(String) as string });
    // A newer image beside it is not what belongs to it.
    home.write({ "releases/firmware_1.0.2.bin": "newer" });
    expect((await home.sign(["--ver", "1.0.1"])).stderr).toBe("");
    const other = await home.sign(["--ver", "1.0.1", "--firmware", "1.0.2", "--expires", "1d"]);
    expect(other.stderr).toContain("(its firmware, its expiry): signed anew, by this key alone");
  });

  test("what has expired is signed anew by the same command", async () => {
    await using home = new Home();
    await home.sign(["--ver", "1.0.1", "--expires", "1d"]);
    const file = JSON.parse(readFileSync(home.file(), "utf8")) as { steps: Envelope[] };
    const times = { issued: "2026-11-01T00:00:00Z", expires: "2026-11-02T00:00:00Z" };
    const old = (envelope: Envelope) => seal({ ...stepOf(envelope), ...times }, home.private());
    writeFileSync(home.file(), JSON.stringify({ ...file, steps: file.steps.map(old) }));
    expect((await home.check(["home"], ["--ver", "1.0.1"])).stderr).toContain("expired at 2026");
    const { stderr } = await home.sign(["--ver", "1.0.1", "--expires", "1d"]);
    expect(stderr).toContain("(its expiry): signed anew");
    expect((await home.check(["home"], ["--ver", "1.0.1"])).code).toBe(0);
  });

  test("a version that is signed late is not issued after a newer one", async () => {
    await using home = new Home();
    await home.sign(["--ver", "1.0.1"]);
    const issued = (version: string) => stepOf(home.envelopes(version).get("*")!).issued;
    const file = JSON.parse(readFileSync(home.file(), "utf8")) as { steps: Envelope[] };
    const past = (envelope: Envelope) =>
      seal({ ...stepOf(envelope), issued: "2026-11-01T00:00:00Z" }, home.private());
    writeFileSync(home.file(), JSON.stringify({ ...file, steps: file.steps.map(past) }));
    await home.sign(["--ver", "1.0.0"]);
    expect(issued("1.0.0")).toBe(issued("1.0.1"));
    expect((await home.check(["home"], ["--ver", "1.0.1"])).code).toBe(0);
    const future = (envelope: Envelope) =>
      seal({ ...stepOf(envelope), issued: "2099-01-01T00:00:00Z" }, home.private());
    const old = JSON.parse(readFileSync(home.file("1.0.0"), "utf8")) as { steps: Envelope[] };
    writeFileSync(home.file("1.0.0"), JSON.stringify({ ...old, steps: old.steps.map(future) }));
    expect((await home.check()).stderr).toContain("1.0.0: it was issued in the future, at 2099");
    expect((await home.check()).stderr).toContain("1.0.1: it was issued before 1.0.0: devices on");
  });

  test("--ignore: what was left out is left out by whoever serves it", async () => {
    await using home = new Home();
    home.release("1.0.1", { "NOTES.md": "internal" });
    await home.sign(["--ignore", "*.md"]);
    const releases = await Releases.open(home.releases, { quiet: 0 });
    expect(releases.held).toEqual([]);
    expect([...releases.find("1.0.1")!.files.keys()]).toEqual(Object.keys(V2).sort());
    expect((await home.check()).code).toBe(0);
    // Nor does it have to be said again.
    expect((await home.sign()).stderr).toBe("");
    expect((await run(["manifest", "--root", home.releases, "--ignore", "*.md"])).stderr).toBe("");
  });

  test("a disk that is full leaves what was signed before", async () => {
    await using home = await Home.onSmallDisk();
    await home.sign();
    const before = readFileSync(home.file(), "utf8");
    home.write({ "releases/filler": Buffer.alloc(home.free - 2048) });
    const { code, stderr } = await home.sign([], "second");
    expect({ code, stderr }).toEqual({
      code: 1,
      stderr: expect.stringContaining("ENOSPC") as string,
    });
    expect(readFileSync(home.file(), "utf8")).toBe(before);
    expect(readdirSync(home.releases).filter((name) => name.startsWith("."))).toEqual([]);
  });

  test("refuses a key inside the root, a version that is not there, and a public key", async () => {
    await using home = new Home();
    cpSync(home.at("home.key"), home.at("releases/home.key"));
    const inside = await run([
      "sign",
      "--root",
      home.releases,
      "--key",
      home.at("releases/home.key"),
    ]);
    expect(inside).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("move it away") as string,
    });
    expect((await home.sign(["--ver", "7.0.0"])).stderr).toContain("has no version 7.0.0");
    expect((await home.sign(["--ver", "1.0.1", "--firmware", "7"])).stderr).toContain(
      "has no firmware 7",
    );
    const both = ["--check", home.at("home.pub"), "--key", home.at("home.key")];
    expect((await run(["sign", "--root", home.releases, ...both])).code).toBe(2);
    const pub = await run(["sign", "--root", home.releases, "--key", home.at("home.pub")]);
    expect(pub).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("private key") as string,
    });
    expect(existsSync(home.file())).toBe(false);
  });
});

describe("a root with signed releases", () => {
  const offered = async (home: Home) => {
    const releases = await Releases.open(home.releases, { quiet: 0 });
    return {
      newest: releases.versions.at(-1)?.name,
      held: releases.held.map(({ path, reason }) => `${path} ${reason}`),
    };
  };

  test("a version that is changed, not signed, or badly signed is not offered; the one below is", async () => {
    await using home = new Home();
    await home.sign();
    expect(await offered(home)).toEqual({ newest: "1.0.1", held: [] });
    const image = "firmware_1.0.1.bin is not signed with the newest version";
    home.release("1.0.1", { "flash/main.py": "print('evil')\n" });
    expect(await offered(home)).toEqual({
      newest: "1.0.0",
      held: ["1.0.1 was changed since it was signed: flash/main.py", image],
    });
    home.release("1.0.1", V2);
    const text = readFileSync(home.file(), "utf8");
    for (const [broken, why] of [
      ["{", "the file: not a JSON object"],
      [text.replace('"flash/lib.py"', '"flash/evil.py"'), 'no step from "" to these files'],
      [text.replaceAll("vnd.ota-step", "vnd.other"), "payloadType: not application/vnd.ota-step"],
      [JSON.stringify({ files: {}, steps: [] }), 'no step from "" to these files'],
    ] as const) {
      writeFileSync(home.file(), broken);
      const { newest, held } = await offered(home);
      expect({ newest, held: held[0] }).toEqual({
        newest: "1.0.0",
        held: expect.stringContaining(why) as string,
      });
    }
    rmSync(home.file());
    expect((await offered(home)).held).toEqual([
      "1.0.1 is not signed, as others are (signed_0.9.0.json)",
      image,
    ]);
  });

  test("what cannot be read holds its version back, and nothing else", async () => {
    await using home = new Home();
    await home.sign();
    rmSync(home.file());
    symlinkSync("signed_1.0.1.json", home.file());
    expect((await offered(home)).held[0]).toContain("ELOOP");
    rmSync(home.file());
    spawnSync("mkfifo", [home.file()]);
    expect((await offered(home)).held[0]).toContain("not a file");
    rmSync(home.file());
    writeFileSync(home.file(), "");
    truncateSync(home.file(), 65 * 1024 * 1024);
    expect((await offered(home)).held[0]).toContain("more than 67108864 bytes");
  });

  test("older versions that are not signed, and signatures of versions that are gone, are told", async () => {
    await using home = new Home();
    await home.sign();
    rmSync(home.file("0.9.0"));
    cpSync(home.file(), home.file("0.8.0"));
    const held = await run(["manifest", "--root", home.releases, "--latest", "1.0.0"]);
    expect(held.stderr).not.toContain("signed_1.0.1.json");
    const { stderr } = await run(["manifest", "--root", home.releases]);
    expect(stderr).toContain("warning: 0.9.0 is not signed, as others are (signed_0.8.0.json)\n");
    expect(stderr).toContain("warning: signed_0.8.0.json is of a version that is not here\n");
  });

  test("manifest and serve say why", async () => {
    await using home = new Home();
    await home.sign();
    home.release("1.0.1", { "flash/main.py": "print('evil')\n" });
    const { stderr, stdout } = await run(["manifest", "--root", home.releases, "--ver", "0.9.0"]);
    expect(stderr).toContain(
      "warning: 1.0.1 is not offered: it was changed since it was signed: flash/main.py\n",
    );
    expect((JSON.parse(stdout) as Manifest).version).toBe("1.0.0");
  });

  test("while it is served: a new version is offered once it is signed", async () => {
    await using home = await Home.signed();
    home.release("1.0.2", V1);
    const newest = async () => {
      const answer = await fetch(`${home.url}/manifest.json`);
      return ((await answer.json()) as Manifest).version;
    };
    expect(await newest()).toBe("1.0.1");
    await home.sign(["--ver", "1.0.2"]);
    expect(await until("1.0.2 shows", newest, (version) => version === "1.0.2")).toBe("1.0.2");
  });

  test("who does not ask for steps sees no difference", async () => {
    await using plain = new Home();
    await using home = new Home();
    await home.sign();
    const [with_, without] = await Promise.all(
      [home, plain].map(({ releases }) => Releases.open(releases, { quiet: 0 })),
    );
    for (const current_ver of ["", "0.9.0", "1.0.0", "1.0.1", "0.5", "2.0"]) {
      for (const hash of [undefined, "sha256"]) {
        const query = { current_ver, ...(hash && { hash }) };
        expect(with_!.manifestJSON(query, "http://a")).toBe(
          without!.manifestJSON(query, "http://a"),
        );
      }
    }
  });

  test("who asks gets the step for what it is on; who is up to date, one from there to there", async () => {
    await using home = new Home();
    await home.sign();
    const releases = await Releases.open(home.releases, { quiet: 0 });
    const ask = (query: Record<string, string>) => {
      const manifest = releases.manifestFor({ ...query, signed: "1" }, "http://a");
      const step = manifest?.signed && stepOf(manifest.signed);
      return [step?.from, step?.to, manifest?.full, manifest?.previous_version];
    };
    expect(ask({ current_ver: "1.0.0" })).toEqual(["1.0.0", "1.0.1", undefined, "1.0.0"]);
    expect(ask({ current_ver: "1.0.1" })).toEqual(["1.0.1", "1.0.1", undefined, "1.0.1"]);
    expect(releases.manifestFor({ current_ver: "1.0.1", signed: "0" }, "http://a")).toBeNull();
    expect(ask({})).toEqual(["", "1.0.1", undefined, "0"]);
    // Of these no step was signed: they get the full list.
    expect(ask({ current_ver: "0.5" })).toEqual(["*", "1.0.1", true, "0.5"]);
    expect(ask({ current_ver: "1.0.0", base: "0".repeat(64) })).toEqual([
      "*",
      "1.0.1",
      true,
      "1.0.0",
    ]);
    home.release("1.0.0", { "flash/extra.py": "" });
    await releases.scan();
    expect(ask({ current_ver: "1.0.0" })).toEqual(["*", "1.0.1", true, "1.0.0"]);
    expect(ask({ list: "1.0.1" })).toEqual(["", "1.0.1", undefined, "1.0.1"]);
    expect(ask({ current_ver: "2.0" })).toEqual([undefined, undefined, undefined, undefined]);
  });
});

describe("a device that trusts a key", () => {
  test("is updated from a server without any key, and remembers when that was issued", async () => {
    await using home = await Home.signed();
    const { code, last } = await home.device();
    expect({ code, last }).toEqual({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1 (firmware 0 -> 1.0.1)",
    });
    expect(home.tree()).toEqual(TREE_2);
    expect(home.issued).toBe(stepOf(home.envelopes().get("1.0.0")!).issued);
    expect((await home.device()).last).toBe("up to date 1.0.1");
    const sent = home.sent.length;
    // Deleted by somebody: brought back by a signed full list.
    rmSync(home.at("device/flash/lib.py"));
    expect((await home.device()).last).toBe("repaired 1.0.1");
    expect({ tree: home.tree(), sent: home.sent.length }).toEqual({ tree: TREE_2, sent: sent + 1 });
  });

  test("is updated from a directory: a stick found in the street is safe", async () => {
    await using home = new Home();
    const from = (root: string) => {
      const keys = ["--verify", home.at("home.pub"), "--ver", "1.0.0"];
      return run(["client", "--root", home.root, "--from", root, ...keys]);
    };
    const unsigned = await from(home.releases);
    expect(unsigned).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("it is not signed, and --verify was given") as string,
    });
    expect(home.tree()).toEqual(TREE_1);
    await home.sign([], "stranger");
    expect((await from(home.releases)).stderr).toContain("none of the keys given signed it");
    for (const version of ["0.9.0", "1.0.0", "1.0.1"]) rmSync(home.file(version));
    await home.sign();
    expect((await from(home.releases)).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
  });

  test("a device with nothing, one on a version that is unknown, and a repair", async () => {
    await using home = await Home.signed();
    rmSync(home.root, { recursive: true });
    const keys = ["--verify", home.at("home.pub")];
    expect((await home.client(keys)).last).toBe("updated 0 -> 1.0.1 (firmware 0 -> 1.0.1)");
    expect((await home.client([...keys, "--repair"])).last).toBe("up to date 1.0.1");
    rmSync(home.root, { recursive: true });
    home.write({ "device/flash/main.py": "print('old')\n" });
    expect((await home.client([...keys, "--ver", "0.5"])).last).toBe(
      "updated 0.5 -> 1.0.1 (firmware 0 -> 1.0.1)",
    );
    expect(home.tree()).toEqual(asTree({ ...V2, ...own("1.0.1") }));
  });

  test("refuses what nobody signed: a manifest, null, an empty list", async () => {
    await using home = await Home.signed();
    for (const edit of [
      ({ signed: _, ...manifest }: Manifest) => manifest,
      () => null,
      ({ signed: _, ...manifest }: Manifest) => ({ ...manifest, delete: [], new: [], update: [] }),
    ]) {
      await using middle = between(home, edit);
      expect(await home.refuses(middle)).toContain("is not signed, and --verify was given");
    }
  });

  test("refuses every field of the payload that was changed", async () => {
    await using home = await Home.signed();
    const step = stepOf(home.envelopes().get("1.0.0")!);
    const changes: Partial<Record<keyof Step, unknown>>[] = [
      { expires: "2099-01-01T00:00:00Z" },
      { firmware: null },
      { from: "0.9.0" },
      { issued: "2099-01-01T00:00:00Z" },
      { model: "lopy4" },
      { release: "0".repeat(64) },
      { steps: "0".repeat(64) },
      { to: "1.0.2" },
    ];
    expect(changes.flatMap((change) => Object.keys(change)).sort()).toEqual(Object.keys(step));
    for (const change of changes) {
      // The old signature, and one of a key that nobody trusts.
      await using old = changing(home, (manifest) => {
        const { payload } = seal({ ...step, ...change });
        return { ...manifest, signed: { ...manifest.signed!, payload } };
      });
      expect(await home.refuses(old)).toContain("none of the keys given signed it");
      await using other = resigning(home, change as Partial<Step>, home.private("stranger"));
      expect(await home.refuses(other)).toContain("none of the keys given signed it");
    }
  });

  test("refuses an envelope that is damaged, of another type, or without a signature", async () => {
    await using home = await Home.signed();
    const { signatures } = home.envelopes().get("1.0.0")!;
    const bad = Buffer.from(signatures[0]!.sig, "base64");
    bad[5]! ^= 1;
    for (const change of [
      { payloadType: "application/vnd.in-toto+json" },
      { signatures: [] },
      { signatures: [{ keyid: "", sig: bad.toString("base64") }] },
      { signatures: [{ keyid: signatures[0]!.keyid, sig: "" }] },
      { payload: "" },
    ]) {
      await using middle = changing(home, (manifest) => {
        return { ...manifest, signed: { ...manifest.signed!, ...change } };
      });
      expect(await home.refuses(middle)).toContain("none of the keys given signed it");
    }
    for (const signed of [1, "x", {}, { payload: 1 }]) {
      await using middle = changing(home, (manifest) => ({ ...manifest, signed }));
      expect(await home.refuses(middle)).toContain("it is not signed, and --verify was given");
    }
  });

  test("refuses a signed step that is not for this device, or not for this manifest", async () => {
    await using home = await Home.signed();
    const key = home.private();
    const cases: [change: Partial<Step> | Record<string, unknown>, why: string][] = [
      [{ from: "0.9.0" }, "its step is from 0.9.0, and this device is on 1.0.0"],
      [{ from: "" }, "its step is from nothing, and this device is on 1.0.0"],
      [{ from: "*" }, "its step is from *"],
      [{ to: "1.0.2" }, "its step is to 1.0.2, and not to 1.0.1"],
      [{ steps: "0".repeat(64) }, "its files are not those of its step"],
      [{ release: "0".repeat(64) }, "it does not lead to 1.0.1 as it was signed"],
      [{ firmware: null }, "its firmware 1.0.1 is not that of its step"],
      [
        { firmware: { sha256: sha256("x"), size: 3000, version: "1.0.1" } },
        "its firmware 1.0.1 is",
      ],
      [{ firmware: { sha256: sha256(IMAGE), size: 1, version: "1.0.1" } }, "its firmware 1.0.1 is"],
      [{ firmware: { sha256: sha256(IMAGE), size: 3000, version: "2" } }, "its firmware 1.0.1 is"],
      [{ expires: "2026-01-01T00:00:00Z" }, "its step expired at 2026-01-01T00:00:00Z"],
      [{ expires: "soon" }, "signed: expires: not a time in UTC"],
      [{ issued: 5 }, "signed: issued: not a string"],
      [{ firmware: {} }, "signed: firmware.sha256: not a string"],
    ];
    for (const [change, why] of cases) {
      await using middle = resigning(home, change as Partial<Step>, key);
      expect(await home.refuses(middle)).toContain(why);
    }
  });

  test("refuses lists that were changed", async () => {
    await using home = await Home.signed();
    const other = { sha256: sha256("x") };
    const edits: ((manifest: Manifest) => unknown)[] = [
      (manifest) => ({ ...manifest, delete: [] }),
      (manifest) => ({ ...manifest, delete: [...manifest.delete, "flash/boot.py"] }),
      (manifest) => ({ ...manifest, new: [] }),
      (manifest) => ({ ...manifest, new: manifest.update, update: manifest.new }),
      (manifest) => ({ ...manifest, update: [{ ...manifest.update[0], ...other }] }),
      (manifest) => ({ ...manifest, new: [{ ...manifest.new[0], dst_path: "/flash/boot.py" }] }),
      (manifest) => ({ ...manifest, full: true }),
      (manifest) => ({ ...manifest, version: "1.0.2" }),
      ({ firmware, ...manifest }) => ({ ...manifest, firmware: { ...firmware, ...other } }),
      ({ firmware, ...manifest }) => ({ ...manifest, firmware: { ...firmware, version: "1.0.2" } }),
      ({ firmware: _, ...manifest }) => manifest,
    ];
    for (const [i, edit] of edits.entries()) {
      await using middle = changing(home, edit);
      expect([i, await home.refuses(middle)]).toEqual([
        i,
        expect.stringMatching(/refused the man/),
      ]);
    }
  });

  test("somebody took its base away: no mix of two releases", async () => {
    await using home = new Home();
    for (const version of ["1.0.0", "1.0.1"]) home.release(version, { "flash/keep.py": "same\n" });
    await home.sign();
    await home.serve();
    home.write({ "device/flash/keep.py": "edited\n" });
    // The server then answers with what leads from 1.0.0, and that has been signed.
    await using middle = between(home, (manifest) => manifest, ["base"]);
    expect(await home.refuses(middle)).toContain("it does not lead to 1.0.1 as it was signed");
    expect((await home.device()).code).toBe(0);
    expect(home.tree()["flash/keep.py"]).toBe(asTree({ a: "same\n" })["a"]!);
  });

  test("nor of what was edited since, and is in no list", async () => {
    await using home = new Home();
    for (const version of ["1.0.0", "1.0.1"]) home.release(version, { "flash/keep.py": "same\n" });
    await home.sign();
    await home.serve();
    await home.device();
    home.release("1.0.2", { ...V2, "flash/keep.py": "same\n", "flash/new.py": "" });
    await home.sign(["--ver", "1.0.2"]);
    await home.serve();
    home.write({ "device/flash/keep.py": "edited\n" });
    await using middle = between(home, (manifest) => manifest, ["base"]);
    expect(await home.refuses(middle)).toContain("it does not lead to 1.0.2 as it was signed");
    expect((await home.device()).last).toBe("updated 1.0.1 -> 1.0.2");
    expect(home.tree()["flash/keep.py"]).toBe(asTree({ a: "same\n" })["a"]!);
  });

  test("many signatures, or a long payload, are no work for it", async () => {
    await using home = await Home.signed();
    const { signatures } = home.envelopes().get("1.0.0")!;
    for (const change of [
      { signatures: Array.from({ length: 100_000 }, () => signatures[0]!) },
      { payload: "A".repeat(1_000_000) },
    ]) {
      await using middle = changing(home, (manifest) => {
        return { ...manifest, signed: { ...manifest.signed!, ...change } };
      });
      expect(await home.refuses(middle)).toContain("it is not signed, and --verify was given");
    }
  });

  test("a release that failed is known again, however its version is spelled on the way", async () => {
    await using home = await Home.signed();
    expect((await home.device(home, ["home"], ["--check", "false"])).code).toBe(3);
    for (const version of ["1.00.1", "1.0.1.", "1..0.1"]) {
      await using middle = changing(home, (manifest) => ({ ...manifest, version }));
      expect(await home.refuses(middle)).toContain(`its step is to 1.0.1, and not to ${version}`);
    }
    await using modes = changing(home, (manifest) => ({
      ...manifest,
      new: manifest.new.map((entry) => ({ ...entry, executable: true })),
    }));
    expect((await home.device(modes, ["home"], ["--check", "false"])).last).toContain("not tried");
    // Signed anew, it is another try.
    await home.sign(["--ver", "1.0.1", "--model", "lopy4"]);
    await home.serve();
    expect((await home.device()).last).toBe("updated 1.0.0 -> 1.0.1 (firmware 0 -> 1.0.1)");
  });

  test("--repair of a damaged record does not lead to an older release", async () => {
    await using home = await Home.signed();
    await home.device();
    rmSync(home.at("device/flash/OTA_VERSION.py"));
    home.write({ "device/.ota/state.json": "{" });
    await using old = new Home({ "1.0.0": V1 });
    for (const name of ["home.key", "home.pub"]) cpSync(home.at(name), old.at(name));
    rmSync(old.at("releases/firmware_1.0.1.bin"));
    await old.sign();
    await old.serve();
    const keys = ["--verify", home.at("home.pub"), "--repair"];
    const refused = await home.client(keys, old);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("older than the device's 1.0.1") as string,
    });
    expect((await home.client(keys)).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
  });

  test("a release with the same content is a release, too", async () => {
    await using home = await Home.signed();
    await home.device();
    home.release("1.0.2", V2);
    await home.sign();
    await home.serve();
    expect((await home.device()).last).toBe("updated 1.0.1 -> 1.0.2");
    expect((await home.device()).last).toBe("up to date 1.0.2");
  });

  test("first contact on a release that others have signed, or nobody", async () => {
    for (const [names, args] of [
      [["second"], []],
      [
        ["home", "second"],
        ["--threshold", "2"],
      ],
    ] as const) {
      await using home = new Home();
      await home.sign(["--ver", "1.0.0"]);
      await home.sign(["--ver", "1.0.1"], "second");
      if (names.length > 1) await home.sign(["--ver", "1.0.1"]);
      await home.serve();
      const { last, stderr } = await home.device(home, names, args);
      expect(last).toBe("updated 1.0.0 -> 1.0.1 (firmware 0 -> 1.0.1)");
      expect(stderr).toContain("what 1.0.0 consists of is not known: refused the manifest");
    }
  });

  test("a step that was issued before the one that is installed is refused, whatever it is to", async () => {
    await using home = await Home.signed();
    await home.device();
    const before = stepOf(home.envelopes().get("1.0.1")!);
    await using older = resigning(home, { issued: "2026-01-01T00:00:00Z" }, home.private());
    expect(await home.refuses(older)).toContain(
      "issued at 2026-01-01T00:00:00Z, before the one that",
    );
    // The time of a newer one is remembered, although nothing changes.
    await using newer = resigning(home, { issued: "2098-01-01T00:00:00Z" }, home.private());
    expect((await home.device(newer)).last).toBe("up to date 1.0.1");
    expect(home.issued).toBe("2098-01-01T00:00:00Z");
    expect(await home.refuses(home)).toContain(`issued at ${before.issued}, before the one`);
  });

  test("while the clock is behind what was seen, expiry is not checked, and that is said", async () => {
    await using home = await Home.signed();
    await home.device();
    const key = home.private();
    const times = { issued: "2098-01-01T00:00:00Z", expires: "2098-02-01T00:00:00Z" };
    await using first = resigning(home, times, key);
    expect((await home.device(first)).code).toBe(0);
    await using second = resigning(home, { ...times, expires: "2026-01-01T00:00:00Z" }, key);
    const { code, stderr } = await home.device(second);
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringContaining("whether 1.0.1 expired is not checked") as string,
    });
  });

  test("--model: a step for another model, or for none, is refused", async () => {
    await using home = await Home.signed();
    expect(await home.refuses(home, ["--model", "lopy4"])).toContain("is for no model, and");
    await home.sign(["--model", "wipy"]);
    await home.serve();
    expect(await home.refuses(home, ["--model", "lopy4"])).toContain("its step is for wipy, and");
    await home.sign(["--model", "lopy4"]);
    await home.serve();
    expect((await home.device(home, ["home"], ["--model", "lopy4"])).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
  });

  test("--threshold: so many different keys, each of which counts once", async () => {
    await using home = await Home.signed();
    const both = ["home", "second"];
    const ask = (from: { url: string }, keys = both) =>
      home.device(from, keys, ["--threshold", "2"]);
    expect((await ask(home)).stderr).toContain(
      "1 of the keys given signed it, and --threshold is 2",
    );
    await using twice = resigning(home, {}, home.private(), home.private());
    expect((await ask(twice)).stderr).toContain("1 of the keys given signed it");
    expect((await ask(home, ["home", "home"])).stderr).toContain("1 of the keys given signed it");
    await using strange = resigning(home, {}, home.private(), home.private("stranger"));
    expect((await ask(strange)).stderr).toContain("1 of the keys given signed it");
    expect(home.tree()).toEqual(TREE_1);
    await home.sign([], "second");
    await home.serve();
    expect((await ask(home)).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
    const one = await home.device(home, ["home"], ["--threshold", "2"]);
    expect(one).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("as many --verify") as string,
    });
  });

  test("takes envelopes that openssl has signed", async () => {
    await using home = new Home();
    await home.sign([], "stranger");
    for (const version of ["0.9.0", "1.0.0", "1.0.1"]) {
      const { files } = JSON.parse(readFileSync(home.file(version), "utf8")) as { files: object };
      const steps = [...home.envelopes(version).values()].map((envelope) => {
        writeFileSync(home.at("signed"), pae(Buffer.from(envelope.payload, "base64")));
        const key = ["-inkey", home.at("home.key"), "-out", home.at("sig")];
        openssl(["pkeyutl", "-sign", "-rawin", "-in", home.at("signed"), ...key]);
        const sig = readFileSync(home.at("sig")).toString("base64");
        return { ...envelope, signatures: [{ keyid: "openssl", sig }] };
      });
      writeFileSync(home.file(version), JSON.stringify({ files, steps }));
    }
    await home.serve();
    expect((await home.device()).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
  });

  test("firmware of one release with files of another is refused", async () => {
    await using home = await Home.signed();
    await home.device();
    home.release("1.0.2", V1);
    home.write({ "releases/firmware_1.0.2.bin": Buffer.alloc(2000, 1) });
    await home.sign(["--ver", "1.0.2"]);
    await home.serve();
    const manifest = (current_ver: string) =>
      fetch(
        `${home.url}/manifest.json?signed=1&hash=sha256&firmware_ver=1.0.1&current_ver=${current_ver}`,
      ).then((answer) => answer.json() as Promise<Manifest>);
    const next = await manifest("1.0.1");
    // Firmware of 1.0.2 with the step that stays on 1.0.1.
    const stay = home.envelopes("1.0.1").get("1.0.1")!;
    await using mix = changing(home, () => {
      const { firmware } = next;
      return { ...next, delete: [], new: [], update: [], version: "1.0.1", firmware, signed: stay };
    });
    expect(await home.refuses(mix)).toContain("its firmware 1.0.2 is not that of its step");
    expect((await home.device()).last).toBe("updated 1.0.1 -> 1.0.2 (firmware 1.0.1 -> 1.0.2)");
  });

  test("a release that fails its check is rolled back, and so is what was issued", async () => {
    await using home = await Home.signed();
    await home.device();
    const { issued } = home;
    home.release("1.0.2", V1);
    await home.sign(["--ver", "1.0.2"]);
    await home.serve();
    const failed = await home.device(home, ["home"], ["--check", "false"]);
    expect({ code: failed.code, tree: home.tree(), issued: home.issued }).toEqual({
      code: 3,
      tree: TREE_2,
      issued,
    });
  });

  test("an answer that the server signed will do as well", async () => {
    await using home = new Home();
    await home.serve({ sign: home.at("home.key") });
    expect((await home.device()).code).toBe(0);
    expect(home.tree()).toEqual(TREE_2);
    expect(home.issued).toBeUndefined();
  });
});

test("keygen and sign --check print the public key as boards are given it", async () => {
  await using home = new Home();
  const { stdout } = await run(["keygen", "--out", home.at("fleet")]);
  const { x } = createPublicKey(readFileSync(home.at("fleet.pub"))).export({ format: "jwk" });
  const raw = Buffer.from(x!, "base64url").toString("hex");
  expect(stdout).toContain(`for boards: ${raw}`);
  const check = await run(["sign", "--root", home.releases, "--check", home.at("fleet.pub")]);
  expect(check.stdout).toContain(raw);
});

describe("whatever is in a signed file, or in a step", () => {
  const SEED = seeded("signed-steps");
  const NASTY = [null, "", "*", -1, 1e99, true, [], {}, "\u0000", "1.0.1", "2026-13-01T00:00:00Z"];

  /** Bytes with a few of them changed, dropped or doubled. */
  function scratched(text: string, random: Random): Buffer {
    const bytes = [...Buffer.from(text)];
    for (let times = 1 + random.below(3); times > 0; times--) {
      const added = random.chance(0.5) ? [random.below(256)] : [];
      bytes.splice(random.below(bytes.length), random.below(3), ...added);
    }
    return Buffer.from(bytes);
  }

  test("the root can be read; the version is offered as it was signed, or not at all", async () => {
    const random = new Random(SEED);
    await using home = new Home();
    await home.sign();
    const good = readFileSync(home.file(), "utf8");
    for (let run = 0; run < 150; run++) {
      const text = scratched(good, random);
      writeFileSync(home.file(), text);
      const releases = await Releases.open(home.releases, { quiet: 0 });
      const isOffered = releases.find("1.0.1") !== undefined;
      if (isOffered === releases.held.some(({ path }) => path === "1.0.1")) {
        throw new Error(`run ${run}: ${text.toString("latin1")}`);
      }
      const manifest = releases.manifestFor({ current_ver: "1.0.0", signed: "1" }, "http://a");
      if (manifest?.signed) JSON.parse(JSON.stringify(manifest));
    }
  });

  test("a step with any field in any form is refused, although its key is trusted", async () => {
    const random = new Random(SEED);
    await using home = await Home.signed();
    const step = stepOf(home.envelopes().get("1.0.0")!) as unknown as Record<string, unknown>;
    for (let run = 0; run < 60; run++) {
      const field = random.pick(Object.keys(step));
      const value = random.pick(NASTY);
      // These mean what they say: never, no model, this very version.
      if (["expires", "model"].includes(field) && value === null) continue;
      if (field === "model" && typeof value === "string") continue;
      if (step[field] === value) continue;
      const { [field]: _, ...without } = step;
      const changed = random.chance(0.2) ? without : { ...step, [field]: value };
      await using middle = changing(home, (manifest) => {
        return { ...manifest, signed: seal(changed, home.private()) };
      });
      const stderr = await home.refuses(middle);
      if (!stderr.includes("refused the manifest")) throw new Error(`run ${run}: ${stderr}`);
    }
  });
});
