/**
 * A board with config.VERIFY: it installs what was signed at home for exactly this step, and refuses
 * everything else before it touches anything.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync } from "node:fs";
import { join } from "node:path";
import { LooseVersion, Releases } from "../ota.ts";
import { type Board, type Kind, type Options, type Start } from "./board/board.ts";
import {
  Desk,
  ISSUED,
  preAuth,
  seal,
  Signer,
  STEP,
  stepOf,
  stepsOf,
  trusting,
} from "./board/desk.ts";
import { type Loose } from "./board/desk.ts";
import { CONFIRM, example, Root, ROLLBACK, runs, UPDATE, Van } from "./board/fleet.ts";
import { openssl } from "./helpers/pki.ts";
import { Random, seeded } from "./helpers/random.ts";
import { Temp } from "./helpers/temp.ts";
import { run } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const SEED = seeded("board-trust");
const kinds: Kind[] = ["esp32", "pycom", "rp2"];
const [home, other] = [new Signer(), new Signer()];
const OLD = "1.0.0";
const SAFE = "2020-01-01T00:00:00Z";

const desks: Desk[] = [];
const open = async (root: string, signers = [home]) => {
  const desk = await Desk.open(root, signers);
  desks.push(desk);
  return desk;
};

let root: Root;
let desk: Desk;
beforeAll(async () => {
  root = new Root()
    .release("1.0.0", { "flash/main.py": "1\n", "flash/gone.py": "x\n", "sd/tariff.txt": "1" })
    .release("1.0.1", { "flash/main.py": "2\n", "flash/lib/new.py": "x\n", "sd/tariff.txt": "2" });
  for (const version of ["1.0.0", "1.0.1"])
    await Bun.write(
      join(root.path, `firmware_${version}.bin`),
      Bun.file(join(example, `firmware_${version}.bin`)),
    );
  desk = await open(root.path);
});
afterAll(() => {
  for (const one of desks) one.stop();
  Root.removeAll();
});

/** The board must refuse this answer, with these words, and nothing on it may change. */
async function refuses(
  board: Board,
  answer: Desk["answer"],
  words: RegExp,
  options: Options = {},
): Promise<void> {
  const mine = board.link as Desk;
  const [before, usual] = [board.tree(), mine.answer];
  const state = board.read(`${board.home}/.ota/state`);
  const asked = mine.requests.length;
  mine.answer = answer;
  const copy = board.copy();
  const { end, error, operations } = await copy.start(UPDATE, options);
  mine.answer = usual;
  expect([end, error]).toEqual(["error", expect.stringMatching(words)]);
  expect(error).toContain("ValueError");
  expect(copy.tree()).toEqual(before);
  expect(copy.read(`${board.home}/.ota/state`)).toBe(state!);
  // It asked for the manifest, and wrote nothing else.
  expect(mine.requests.slice(asked)).toHaveLength(1);
  const touched = operations.filter((words) => !/\/\.ota(\/manifest( \d+)?)?$/.test(words));
  expect(touched).toEqual([]);
}

/** Runs an update from a server that answers so, and starts what it installed. */
async function installs(board: Board, answer?: Desk["answer"]): Promise<Start> {
  const mine = board.link as Desk;
  const usual = mine.answer;
  if (answer) mine.answer = answer;
  const result = await board.start(UPDATE);
  mine.answer = usual;
  expect([result.end, result.error]).toEqual(["reset", ""]);
  expect((await board.settle(CONFIRM)).join("\n")).toContain("is confirmed");
  return result;
}

const issued = (board: Board) => board.read(`${board.home}/.ota/issued`);
const map = (value: Loose, change: (copy: Loose) => void): Loose => {
  const copy = structuredClone(value);
  change(copy);
  return copy;
};
/** Answers with a changed manifest around the envelope of the right one. */
const mixed =
  (change: (manifest: Loose) => void): Desk["answer"] =>
  (manifest, from) =>
    map(desk.signed(manifest, from, [home]), change);
/** Answers with a step that the right key has signed, but is another one. */
const signing =
  (more: Loose, signers = [home]): Desk["answer"] =>
  (manifest, from) =>
    desk.signed(manifest, from, signers, more);

test.each(kinds)("what `sign` wrote, from the real server, on a board of kind %s", async (kind) => {
  const mine = new Root();
  cpSync(root.path, mine.path, { recursive: true });
  const pem = home.key.export({ type: "pkcs8", format: "pem" });
  using keys = new Temp({ "home.key": pem });
  const key = keys.at("home.key");
  expect((await run(["sign", "--root", mine.path, "--key", key])).stderr).toBe("");
  await using van = await Van.open(mine.path);
  const config = kind === "pycom" ? "/flash/config.py" : "/config.py";
  const stranger = await van.board(kind, OLD, { [config]: trusting([other]) });
  const before = stranger.tree();
  const refused = await stranger.start(UPDATE);
  expect([refused.end, stranger.tree()]).toEqual(["error", before]);
  const board = await van.board(kind, OLD, { [config]: trusting([home]) });
  const { end, error } = await board.start(UPDATE);
  expect([end, error]).toEqual(["reset", ""]);
  expect((await board.settle(CONFIRM)).join("\n")).toContain("is confirmed");
  expect((await board.start(UPDATE)).output).toContain("OTA: nothing newer than 1.0.1");
});

describe.each(kinds)("a signed release on a board of kind %s", (kind) => {
  test("is installed, and proved to be the newest; back, and again", async () => {
    const board = await desk.board(kind, OLD, trusting([home]));
    const old = board.tree();
    desk.requests.length = 0;
    await installs(board);
    expect(desk.requests[0]).toStartWith(
      "GET /manifest.json?hash=sha256&signed=1&current_ver=1.0.0",
    );
    const now = desk.tree(kind, "1.0.1");
    for (const [path, content] of now) expect(board.files.get(path), path).toEqual(content);
    if (kind !== "rp2")
      expect(runs(board, await Bun.file(join(root.path, "firmware_1.0.1.bin")).bytes())).toBe(true);
    expect(issued(board)).toBe(ISSUED.slice(0, 19));

    const current = await board.start(UPDATE);
    expect(current.output).toContain("OTA: nothing newer than 1.0.1");
    expect(current.output).toContain("update: False");
    await refuses(board, () => null, /no signed step/);
    await refuses(board, (manifest) => manifest ?? { delete: [], new: [], update: [], version: "1.0.1" }, /no signed step/); // prettier-ignore

    expect((await board.start(ROLLBACK)).end).toBe("reset");
    await board.settle();
    expect(board.tree()).toEqual(old);
    expect(issued(board)).toBeUndefined();
    expect((await board.start(UPDATE)).output).toContain("OTA: 1.0.1 failed here before");
  });

  test("unsigned is refused", async () => {
    const board = await desk.board(kind, OLD, trusting([home]));
    await refuses(board, (manifest) => manifest, /no signed step/);
    await refuses(board, () => null, /no signed step/);
  });
});

describe("the envelope", () => {
  let board: Board;
  beforeAll(async () => {
    board = await desk.board("rp2", OLD, trusting([home]));
  });
  const enveloped = (change: (envelope: Loose) => unknown) =>
    mixed((manifest) => {
      const result = change(manifest.signed);
      if (result !== undefined && result !== manifest.signed) manifest.signed = result;
    });

  test.each([
    ["another type", (it: Loose) => (it.payloadType = "application/vnd.in-toto+json")],
    ["no type", (it: Loose) => delete it.payloadType],
    ["a type that is none", (it: Loose) => (it.payloadType = 7)],
    ["no payload", (it: Loose) => delete it.payload],
    ["an empty payload", (it: Loose) => (it.payload = "")],
    ["a payload that is no base64", (it: Loose) => (it.payload = "§")],
    ["a payload that is no text", (it: Loose) => (it.payload = [1])],
    ["no signatures", (it: Loose) => delete it.signatures],
    ["none of them", (it: Loose) => (it.signatures = [])],
    ["signatures that are no list", (it: Loose) => (it.signatures = 7)],
    ["a signature that is no object", (it: Loose) => (it.signatures = ["x"])],
    ["an empty signature", (it: Loose) => (it.signatures[0].sig = "")],
    ["a signature that is no text", (it: Loose) => (it.signatures[0].sig = null)],
    ["half a signature", (it: Loose) => (it.signatures[0].sig = it.signatures[0].sig.slice(0, 44))],
    ["the signature of a wrong key", (it: Loose) => {
      it.signatures = [other.sign(STEP, Buffer.from(it.payload, "base64"))];
    }],
    ["the right key's, of the payload alone", (it: Loose) => {
      const sig = home.sign("", Buffer.from(it.payload, "base64"));
      it.signatures = [sig];
    }],
  ] as [string, (it: Loose) => unknown][])("with %s is refused", async (_name, change) => {
    const spoilt = enveloped((envelope) => {
      change(envelope);
    });
    await refuses(board, spoilt, /no signed step|no signature|is no step/);
  }); // prettier-ignore

  test.each([["nothing", null], ["a text", "x"], ["a list", [1]], ["a number", 7], ["empty", {}]])(
    "that is %s is refused",
    (_name, value) => refuses(board, mixed((manifest) => void (manifest.signed = value)), /no signed step/),
  ); // prettier-ignore

  test("of another type is refused, however well it is signed", async () => {
    const type = "application/vnd.in-toto+json";
    const answer: Desk["answer"] = (manifest, from) => ({
      ...desk.signed(manifest, from, [home]),
      signed: seal(stepOf(manifest!, from), [home], type),
    });
    await refuses(board, answer, /is no step/);
    const lies: Desk["answer"] = (manifest, from) =>
      map(answer(manifest, from) as Loose, (it) => (it.signed.payloadType = STEP));
    await refuses(board, lies, /no signature of a key/);
  });

  test("with a good signature among others is taken, whatever it calls the key", async () => {
    for (const signers of [
      [other, home],
      [home, other],
      [other, other, home],
    ]) {
      const answer: Desk["answer"] = (manifest, from) =>
        map(desk.signed(manifest, from, signers), (it) => {
          for (const one of it.signed.signatures) one.keyid = "not a name";
          delete it.signed.signatures.at(-1).keyid;
        });
      const mine = board.copy();
      await installs(mine, answer);
    }
  });

  test("with the signatures of twelve people is taken; with those of thirty it is too long", async () => {
    const people = (count: number): Desk["answer"] => (manifest, from) =>
      desk.signed(manifest, from, [...Array.from({ length: count - 1 }, () => other), home]); // prettier-ignore
    await installs(board.copy(), people(12));
    await refuses(board, people(30), /an entry is too long/);
  });

  test("made by openssl is taken", async () => {
    using temp = new Temp();
    const at = (name: string) => temp.at(name);
    const run = (...args: string[]) => expect(openssl(args).code, args.join(" ")).toBe(0);
    run("genpkey", "-algorithm", "ed25519", "-out", at("key"));
    run("pkey", "-in", at("key"), "-pubout", "-outform", "DER", "-out", at("pub"));
    const raw = Buffer.from((await Bun.file(at("pub")).bytes()).slice(-32)).toString("hex");
    const mine = await desk.board("rp2", OLD, `VERIFY = ("${raw}",)\n`);
    const manifest = desk.releases.manifestFor({ current_ver: OLD, hash: "sha256" }, "http://h")!;
    const step = stepOf(manifest, OLD);
    const envelope = seal(step, []);
    await Bun.write(at("pae"), preAuth(STEP, Buffer.from(envelope.payload, "base64")));
    run("pkeyutl", "-sign", "-rawin", "-inkey", at("key"), "-in", at("pae"), "-out", at("sig"));
    const sig = Buffer.from(await Bun.file(at("sig")).bytes()).toString("base64");
    envelope.signatures = [{ keyid: "", sig }];
    await installs(mine, (given, from) => ({ ...desk.signed(given, from, []), signed: envelope }));
  });

  test("is wanted by a config.VERIFY that forgot its comma, and refused by one that is no key", async () => {
    await installs(await desk.board("rp2", OLD, `VERIFY = "${home.hex}"\n`));
    for (const verify of [`("x",)`, `("${home.hex.slice(2)}",)`, `(7,)`, `7`]) {
      const mine = await desk.board("rp2", OLD, `VERIFY = ${verify}\n`);
      await refuses(mine, desk.answer, /not trusted/);
    }
  });
});

describe("the step", () => {
  let board: Board;
  beforeAll(async () => {
    board = await desk.board("esp32", OLD, trusting([home]));
  });

  const payload = (change: (text: string) => string): Desk["answer"] =>
    mixed(({ signed }) => {
      const text = Buffer.from(signed.payload, "base64").toString();
      const changed = change(text);
      expect(changed).not.toBe(text);
      signed.payload = Buffer.from(changed).toString("base64");
    });
  const image = { sha256: "0".repeat(64), size: 1, version: "1.0.1" };

  test.each([
    ["expires", "2099-01-01T00:00:00Z"],
    ["firmware", null],
    ["from", "1.0.1"],
    ["issued", "2026-12-24T08:00:00Z"],
    ["model", "lopy4"],
    ["steps", "0".repeat(64)],
    ["to", "1.0.2"],
    ["more", 1],
  ])("with another %s than was signed is refused", async (key, value) => {
    await refuses(
      board,
      payload((text) => JSON.stringify({ ...JSON.parse(text), [key]: value })),
      /no signature of a key/,
    );
  });

  test("with any byte changed, or one more, is refused", async () => {
    const random = new Random(SEED);
    for (let i = 0; i < 12; i++) {
      await refuses(
        board,
        mixed(({ signed }) => {
          const bytes = Buffer.from(signed.payload, "base64");
          bytes[random.below(bytes.length)]! ^= 1 << random.below(8);
          signed.payload = Buffer.from(i > 0 ? bytes : [...bytes, 32]).toString("base64");
        }),
        /no signature of a key/,
      );
    }
  });

  test.each([
    ["another FROM", { from: "0.9" }, /leads from 0.9 to 1.0.1/],
    ["FROM nothing", { from: "" }, /leads from nothing to 1.0.1/],
    ["FROM any, without a full list", { from: "*" }, /leads from \* to 1.0.1/],
    ["no FROM", { from: undefined }, /not what it should be/],
    ["a FROM that is no text", { from: 1 }, /leads from 1 to/],
    ["another TO", { to: "1.0.2" }, /leads from 1.0.0 to 1.0.2/],
    ["no TO", { to: undefined }, /not what it should be/],
    ["other steps", { steps: "0".repeat(64) }, /lists are not/],
    ["no steps", { steps: undefined }, /not what it should be/],
    ["other firmware", { firmware: image }, /other firmware/],
    ["no firmware", { firmware: null }, /other firmware/],
    ["firmware left out", { firmware: undefined }, /not what it should be/],
    ["firmware that is no object", { firmware: "x" }, /not what it should be/],
    ["firmware without anything", { firmware: { a: 1 } }, /not what it should be/],
    ["no time", { issued: undefined }, /a time is not/],
    ["a time that is none", { issued: "yesterday" }, /a time is not/],
    ["a time in another zone", { issued: "2026-11-24T08:00:00+01:00" }, /a time is not/],
    ["an end that is none", { expires: 7 }, /a time is not/],
    ["an end in another form", { expires: "2027-11-24" }, /a time is not/],
  ] as [string, Loose, RegExp][])("signed, with %s, is refused", async (_name, more, words) => {
    await refuses(board, signing(more), words);
  });

  test.each([[[1]], ["x"], [7], [null], [true]])(
    "signed, that is %j, is refused",
    async (value) => {
      const answer: Desk["answer"] = (manifest, from) => ({
        ...desk.signed(manifest, from, [home]),
        signed: seal(value, [home]),
      });
      await refuses(board, answer, /not what it should be/);
    },
  );

  test("for firmware of another version, digest or size is refused", async () => {
    for (const [key, value] of Object.entries({ version: "1.0.2", sha256: "0".repeat(64), size: 7 })) {
      await refuses(board, mixed((it) => void (it.firmware[key] = value)), /other firmware/);
      await refuses(board, mixed((it) => void delete it.firmware[key]), /other firmware/);
    }
    await refuses(board, mixed((it) => void (it.firmware = "x")), /other firmware/);
  }); // prettier-ignore

  test("without the firmware that belongs to it is refused where the board takes firmware", async () => {
    const without = mixed((it) => void delete it.firmware);
    await refuses(board, without, /firmware that belongs to it is missing/);
    await installs(await desk.board("rp2", OLD, trusting([home])), without);
  });

  test("is for a model: another one, or none, is refused", async () => {
    const mine = await desk.board("rp2", OLD, trusting([home], `MODEL = "lopy4"\n`));
    await refuses(mine, signing({ model: "fipy" }), /model fipy/);
    await refuses(mine, signing({ model: null }), /model None/);
    await refuses(mine, signing({ model: undefined }), /not what it should be/);
    await installs(mine, signing({ model: "lopy4" }));
    expect(desk.requests.find((line) => line.includes("model"))).toContain("&model=lopy4");
    // A board that was given none takes what is for any.
    await installs(await desk.board("rp2", OLD, trusting([home])), signing({ model: "lopy4" }));
  });
});

describe("the lists", () => {
  let board: Board;
  beforeAll(async () => {
    board = await desk.board("rp2", OLD, trusting([home]));
  });
  const entry = { URL: "http://desk/x", dst_path: "/flash/evil.py", sha256: "0".repeat(64) };

  test.each([
    ["another digest", (it: Loose) => (it.update[0].sha256 = "0".repeat(64))],
    ["no digest", (it: Loose) => delete it.update[0].sha256],
    ["a digest that is none", (it: Loose) => (it.new[0].sha256 = 7)],
    ["another path", (it: Loose) => (it.new[0].dst_path += "x")],
    ["a path that is none", (it: Loose) => (it.new[0].dst_path = 7)],
    ["a path with two slashes", (it: Loose) => (it.new[0].dst_path = `/${it.new[0].dst_path}`)],
    ["an entry more", (it: Loose) => it.new.push(entry)],
    ["an entry that is none", (it: Loose) => it.new.push("x")],
    ["an entry twice", (it: Loose) => it.update.push(it.update[0])],
    ["an entry less", (it: Loose) => it.update.pop()],
    ["an entry in the other list", (it: Loose) => it.new.push(it.update.pop())],
    ["another order", (it: Loose) => it.update.reverse()],
    ["a delete more", (it: Loose) => it.delete.push("flash/config.py")],
    ["a delete less", (it: Loose) => it.delete.pop()],
    ["a delete that is none", (it: Loose) => it.delete.push(7)],
    ["nothing in them", (it: Loose) => Object.assign(it, { delete: [], new: [], update: [] })],
    ["a full list", (it: Loose) => (it.full = true)],
    ["another version", (it: Loose) => (it.version = "1.0.2")],
    ["no version", (it: Loose) => delete it.version],
  ] as [string, (it: Loose) => unknown][])("with %s are refused", async (_name, change) => {
    const answer = mixed((manifest) => {
      const before = JSON.stringify(manifest);
      change(manifest);
      expect(JSON.stringify(manifest)).not.toBe(before);
    });
    await refuses(board, answer, /not trusted/);
  });

  test("in another order of the keys, or a second time, are refused", async () => {
    const text = (change: (manifest: Loose) => string): Desk["answer"] => (manifest, from) => ({
      toJSON: undefined,
      ...JSON.parse(change(desk.signed(manifest, from, [home]))),
    }); // prettier-ignore
    const turned = text(({ update, ...rest }) => JSON.stringify({ update, ...rest }));
    await refuses(board, turned, /lists are not/);
  });

  test("that are full are taken with a step from any", async () => {
    const full: Desk["answer"] = (manifest, from) =>
      desk.signed({ ...manifest, delete: [], full: true }, from, [home]);
    await installs(board.copy(), full);
    await refuses(board, (manifest, from) => map(full(manifest, from) as Loose, (it) => (it.full = false)), /leads from/); // prettier-ignore
  });

  test("for a board that has nothing lead from nothing", async () => {
    const mine = board.copy();
    mine.files.delete("/OTA_VERSION.py");
    await refuses(mine, signing({ from: OLD }), /leads from 1.0.0/);
    await installs(mine);
  });

  test("of one release with firmware of another are refused", async () => {
    const two = new Root().release("1.0.0", { "flash/main.py": "1\n" });
    two.release("1.0.1", { "flash/main.py": "2\n" });
    two.release("1.0.2", { "flash/main.py": "3\n" });
    for (const version of ["1.0.1", "1.0.2"])
      await Bun.write(
        join(two.path, `firmware_${version}.bin`),
        Buffer.from(`\xe9 firmware ${version}`, "latin1"),
      );
    const newest = await open(two.path);
    const older = await Releases.open(two.path, {
      quiet: 0,
      latest: new LooseVersion("1.0.1").text,
    });
    const mine = await newest.board("esp32", OLD, trusting([home]));
    const before = older.manifestFor({ current_ver: OLD, hash: "sha256" }, "http://desk") as Loose;
    expect([before.version, before.firmware.version]).toEqual(["1.0.1", "1.0.1"]);
    const [first, second] = [before, newest.releases.manifestFor({ current_ver: OLD, hash: "sha256" }, "http://desk") as Loose].map((it) => newest.signed(it, OLD, [home])); // prettier-ignore
    await refuses(mine, () => ({ ...first, firmware: second!.firmware }), /other firmware/);
    await refuses(mine, () => ({ ...second, firmware: first!.firmware }), /other firmware/);
    await refuses(mine, () => ({ ...second, signed: first!.signed }), /leads from 1.0.0 to 1.0.1/);
    await refuses(mine, () => ({ ...second, signed: first!.signed, version: "1.0.1" }), /lists are not/); // prettier-ignore
    // To choose among those that were signed is left to who carries them.
    newest.answer = () => first;
    await installs(mine);
  });
});

describe("time", () => {
  test("an older signature than that of what is installed is refused", async () => {
    const three = new Root();
    for (const n of [0, 1, 2]) three.release(`1.0.${n}`, { "flash/main.py": `${n}\n` });
    const first = await Releases.open(three.path, { quiet: 0, latest: "1.0.1" });
    const mine = await open(three.path);
    const all = mine.releases;
    mine.releases = first;
    const board = await mine.board("rp2", OLD, trusting([home]));
    const at = (time: string): Desk["answer"] => (manifest, from) =>
      mine.signed(manifest, from, [home], { issued: time }); // prettier-ignore
    mine.answer = at("2026-11-24T08:00:00Z");
    await installs(board);
    mine.releases = all;
    await refuses(board, at("2026-11-24T07:59:59Z"), /before what is installed/);
    // The same second will do, and what was taken back counts no more.
    mine.answer = at("2026-11-24T08:00:00Z");
    await installs(board.copy());
    mine.answer = at("2026-12-01T00:00:00Z");
    await board.start(UPDATE);
    expect(issued(board)).toBe("2026-12-01T00:00:00");
    for (let i = 0; i < 4; i++) await board.settle();
    expect(board.read("/OTA_VERSION.py")).toContain("1.0.1");
    expect(issued(board)).toBe("2026-11-24T08:00:00");
    await refuses(board, at("2026-11-24T07:59:59Z"), /before what is installed/);
  });

  test("a record of it that the flash has spoilt refuses nothing for ever", async () => {
    for (const spoilt of ["", "\u{10ffff}", "zzzz-zz-zz", "20"]) {
      const board = await desk.board("rp2", OLD, trusting([home]));
      board.write("/.ota/issued", spoilt);
      await installs(board);
      expect(issued(board)).toBe(ISSUED.slice(0, 19));
    }
    const board = await desk.board("rp2", OLD, trusting([home]));
    board.write("/.ota/issued", new Uint8Array([0xff, 0xfe]));
    await installs(board);
  });

  const EXPIRES = { expires: "2027-11-24T00:00:00Z" };

  test("what has expired is refused by a clock that is set", async () => {
    const board = await desk.board("rp2", OLD, trusting([home]));
    board.now = "2027-11-24T00:00:01Z";
    await refuses(board, signing(EXPIRES), /expired at 2027-11-24/);
    board.now = "2027-11-24T00:00:00Z";
    await installs(board, signing(EXPIRES));
    // To be told that there is nothing newer counts no longer, either.
    board.now = "2027-11-25T00:00:00Z";
    await refuses(board, signing(EXPIRES), /expired at 2027-11-24/);
  });

  test.each([
    ["before 2026", "2025-12-31T23:59:59Z"],
    ["never set", "2000-01-01T00:00:00Z"],
    ["before the signature", "2026-11-24T07:59:59Z"],
  ])("a clock that is %s does not say, and the board says so", async (_name, now) => {
    const board = await desk.board("rp2", OLD, trusting([home]));
    board.now = now;
    const { output } = await installs(board, signing({ expires: SAFE }));
    expect(output.join("\n")).toContain("whether this has expired is not known");
  });

  test("a reset at any moment: the time belongs to the release", async () => {
    const start = await desk.board("rp2", OLD, trusting([home]));
    const { operations } = await start.copy().start(UPDATE);
    const seen = new Set<string>();
    for (let at = 0; at < operations.length; at += process.env.OTA_ALL === undefined ? 3 : 1) {
      const board = start.copy();
      expect((await board.start(UPDATE, { cutAt: at, torn: at })).end).toBe("cut");
      await board.settle();
      const version = board.read("/OTA_VERSION.py")!.split("'")[1]!;
      expect([version, issued(board)], operations[at]).toEqual(
        version === OLD ? [OLD, undefined] : ["1.0.1", ISSUED.slice(0, 19)],
      );
      seen.add(version);
    }
    expect(seen.size).toBe(2);
  });
});

test("keys are rotated by a release", async () => {
  const three = new Root();
  three.release("1.0.0", { "flash/config.py": trusting([home]) });
  three.release("1.0.1", { "flash/config.py": trusting([other]) });
  three.release("1.0.2", { "flash/config.py": trusting([other]), "flash/main.py": "3\n" });
  const mine = await open(three.path);
  const all = mine.releases;
  mine.releases = await Releases.open(three.path, { quiet: 0, latest: "1.0.1" });
  const board = await mine.board("rp2", OLD, trusting([home]));
  const by = (signer: Signer): Desk["answer"] => (manifest, from) =>
    mine.signed(manifest, from, [signer]); // prettier-ignore
  await refuses(board, by(other), /no signature of a key/);
  await installs(board);
  mine.releases = all;
  await refuses(board, by(home), /no signature of a key/);
  mine.answer = by(other);
  await installs(board);
  expect(board.read("/OTA_VERSION.py")).toContain("1.0.2");
  // Back is back to the key, too.
  expect((await board.start(ROLLBACK)).end).toBe("reset");
  await board.settle();
  expect(board.read("/config.py")).toContain(other.hex);
});

test("a board without keys asks for no signature, and takes what it is given", async () => {
  const board = await desk.board("rp2", OLD, "VERIFY = ()\n");
  desk.requests.length = 0;
  const { operations } = await installs(board, (manifest) => manifest);
  expect(desk.requests[0]).not.toContain("signed");
  expect(operations.join("\n")).not.toMatch(/issued|ota_trust/);
  expect(issued(board)).toBeUndefined();
});

test("a config.py that cannot be loaded does not stand for none", async () => {
  const board = await desk.board("rp2", OLD, `import nothing\n${trusting([home])}`);
  const old = board.tree();
  const { error } = await board.start(UPDATE);
  expect(error).toContain("OSError: config.py cannot be loaded");
  expect(board.tree()).toEqual(old);
});

test("however a signed manifest is spoilt: refused, and nothing else is raised", async () => {
  const random = new Random(SEED);
  const board = await desk.board("esp32", OLD, trusting([home]));
  const good = JSON.stringify(
    desk.signed(desk.releases.manifestFor({ current_ver: OLD, firmware_ver: "", hash: "sha256" }, "http://desk"), OLD, [home]),
  ); // prettier-ignore
  const odd = [null, true, -1, 2 ** 60, "", "x", "\n", [], {}, [[]], { a: 1 }, "\ud800", "1.0.0"];
  const bend = (value: unknown): unknown => {
    if (typeof value !== "object" || value === null || random.chance(0.15)) return random.pick(odd);
    if (Array.isArray(value)) {
      const at = random.below(value.length + 1);
      return value.toSpliced(at, random.below(2), bend(value[at]));
    }
    const key = random.pick([...Object.keys(value), "signed"]);
    const { [key]: old, ...rest } = value as Loose;
    return random.chance(0.2) ? rest : { ...rest, [key]: bend(old) };
  };
  const bodies = Array.from({ length: 150 }, (_, i) => {
    if (i === 0) return Buffer.from(good);
    if (i % 2 === 0) return Buffer.from(JSON.stringify(bend(JSON.parse(good))));
    const bytes = Buffer.from(good);
    const [from, to] = [good.indexOf('"signed"'), good.indexOf('"update"')];
    for (let n = 1 + random.below(3); n > 0; n--) {
      bytes[from + random.below(to - from)] = random.pick([...Buffer.from('{}[]",:\\ a0='), 255]);
    }
    return bytes;
  });
  board.write("/bodies", bodies.map((body) => body.toString("hex")).join("\n"));
  const { output, error } = await board.start(`
import binascii, ota_boot, ota_manifest, ota_update
shown = print
def print(*words): pass
ota_boot.makedirs(ota_manifest.MANIFEST)
with open("/bodies") as f:
    for line in f:
        with open(ota_manifest.MANIFEST, "wb") as m:
            m.write(binascii.unhexlify(line.strip()))
        try:
            ota_update.trust(("${home.hex}",), "1.0.0", "")
            shown("trusted")
        except ValueError as e:
            shown("ValueError")
        except Exception as e:
            shown("raised", repr(e))
`);
  expect(error).toBe("");
  /** What a signature is about. */
  const signedPart = (body: Uint8Array) => {
    const it = JSON.parse(new TextDecoder().decode(body)) as Loose;
    const { sha256, size, version } = it.firmware;
    return [it.version, stepsOf(it), sha256, size, version, it.signed.payload];
  };
  expect(output[0]).toBe("trusted");
  let trusted = 0;
  for (const [i, line] of output.entries()) {
    const where = `seed ${SEED}: ${bodies[i]}`;
    expect(line, where).toBeOneOf(["trusted", "ValueError"]);
    if (line === "trusted") trusted++;
    if (line === "trusted" && i % 2 === 0)
      expect(signedPart(bodies[i]!), where).toEqual(signedPart(bodies[0]!));
  }
  console.log(`  seed ${SEED}: ${trusted} of ${output.length} trusted`);
});

test("64 KB of heap are enough for 100 files, firmware and a signature", async () => {
  const large = new Root().release("1.0.0", { "flash/main.py": "1\n" });
  const files: Record<string, string> = { "flash/main.py": "2\n" };
  for (let i = 0; i < 99; i++) {
    files[`flash/lib/some/package/module_number_${i}.py`] = `VALUE = ${i}\n`.repeat(60);
  }
  large.release("1.0.1", files);
  const image = Bun.file(join(example, "firmware_1.0.1.bin"));
  await Bun.write(join(large.path, "firmware_1.0.1.bin"), image);
  const signers = [new Signer(), home];
  const mine = await open(large.path, signers);
  // What collects garbage is a watchdog's feeder: nothing else is called while it computes.
  const feeding = UPDATE.replace("ota.connect()", `
def fed():
    global count
    count += 1
    with open("/dev/collect", "wb") as f:
        f.write(b"x")
count = 0
ota.alive = fed
ota.connect()`);
  for (const kind of ["esp32", "pycom"] as const) {
    const board = await mine.board(kind, OLD, trusting([other, home]));
    const { end, error, output, heap, passes } = await board.start(feeding, { heap: 64 * 1024 });
    expect(error + output.filter((line) => !line.includes("getting")).join("\n")).toBe(
      "OTA: 1.0.0 -> 1.0.1\nOTA: 1.0.1 is installed",
    );
    expect([end, passes]).toEqual(["reset", 3]);
    console.log(
      `  ${kind}: at most ${heap!.live} bytes alive, ${heap!.taken} with garbage, of 65536`,
    );
    expect(heap!.live).toBeLessThan(44 * 1024);
  }
}); // prettier-ignore
