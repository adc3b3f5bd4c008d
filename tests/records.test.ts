/**
 * What a device knows of itself is what is there: a year of edits, damage, lost and old records,
 * repairs and ways back, on real files. Releases come from a directory, so that many fit in a second.
 */

import { describe, expect, test } from "bun:test";
import * as fs from "node:fs";
import {
  DirectoryOTA,
  HttpOTA,
  type OTAOptions,
  rollBack,
  serve,
  type State,
  status,
} from "../ota.ts";
import { sha256 } from "./helpers/content.ts";
import { filesBelow, Temp, type Tree } from "./helpers/temp.ts";
import { run } from "./helpers/tool.ts";

const V1: Tree = {
  "flash/main.py": "print('one')\n",
  "flash/same.py": "same\n",
  "flash/lib/old.py": "old\n",
  "sd/data.bin": "data one\n",
};
const V2: Tree = {
  "flash/main.py": "print('two')\n",
  "flash/same.py": "same\n",
  "flash/lib/new.py": "new\n",
  "sd/data.bin": "data one\n",
};

const below = (directory: string, tree: Tree): Tree =>
  Object.fromEntries(Object.entries(tree).map(([path, text]) => [`${directory}/${path}`, text]));

/** A root of releases, a device, and what the updater said of it. */
class Field extends Temp {
  readonly notes: string[] = [];
  readonly device = this.at("device");
  readonly releases = this.at("releases");

  /** A device with these files, and releases. */
  constructor(device: Tree, releases: Record<string, Tree> = { "1.0.0": V1, "1.0.1": V2 }) {
    super({ "device/": "", "releases/": "", ...below("device", device) });
    for (const [name, tree] of Object.entries(releases)) this.release(name, tree);
  }

  release(name: string, tree: Tree): void {
    this.write(below(`releases/${name}`, tree));
  }

  /** Updates the device; 1.0.0 is what it says of itself as long as it has no record. */
  async update(options: Partial<OTAOptions> = {}): Promise<string> {
    const ota = new DirectoryOTA(this.releases, {
      ...{ root: this.device, ver: "1.0.0" },
      report: (event) => void (event.kind === "note" && this.notes.push(event.text)),
      ...options,
    });
    const { result, to, firmware } = await ota.update();
    return `${result} ${to}${firmware ? ` firmware ${firmware.to}` : ""}`;
  }

  /** What is on the device, but for what the updater keeps. */
  get tree(): Tree {
    const files = [...filesBelow(this.device)].filter(([path]) => !path.startsWith(".ota/"));
    const texts = files.map(([path, bytes]) => [path, new TextDecoder().decode(bytes)] as const);
    return Object.fromEntries(texts.filter(([path]) => path !== "flash/OTA_VERSION.py").sort());
  }

  get state(): State {
    return JSON.parse(fs.readFileSync(this.at("device/.ota/state.json"), "utf8"));
  }

  /** The device is on a release, whole and without anything else, and knows it. */
  async expectOn(version: string, tree: Tree): Promise<void> {
    expect(this.tree).toEqual(sorted(tree));
    const { installed } = this.state;
    expect(installed?.version).toBe(version);
    const files = Object.entries(tree).map(([path, text]) => [path, sha256(text)]);
    expect(sorted(installed!.files)).toEqual(sorted(Object.fromEntries(files)));
  }

  mode(path: string): number {
    return fs.statSync(this.at(`device/${path}`)).mode & 0o777;
  }
}

const sorted = <T>(record: Record<string, T>): Record<string, T> =>
  Object.fromEntries(Object.entries(record).sort(([a], [b]) => (a < b ? -1 : 1)));

describe("a device that is brought along with --ver", () => {
  test("loses what the release drops, and its record is the whole release", async () => {
    using field = new Field(V1);
    expect(await field.update()).toBe("updated 1.0.1");
    await field.expectOn("1.0.1", V2);
    expect(field.notes).toEqual([]);
    expect(await field.update()).toBe("up to date 1.0.1");
    // A directory of which the updater had recorded nothing becomes a file.
    const { "flash/lib/new.py": _, ...rest } = V2;
    field.release("1.0.2", { ...rest, "flash/lib": "a file\n" });
    expect(await field.update()).toBe("updated 1.0.2");
    await field.expectOn("1.0.2", { ...rest, "flash/lib": "a file\n" });
  });

  test("with --repair at first contact, too", async () => {
    using field = new Field({ ...V1, "flash/main.py": "scribbled\n" });
    expect(await field.update({ repair: true })).toBe("updated 1.0.1");
    await field.expectOn("1.0.1", V2);
  });

  test("and after a first release that failed its check", async () => {
    using field = new Field(V1);
    const check = { command: "false", timeout: 5 };
    expect(await field.update({ check })).toBe("rolled back 1.0.1");
    await field.expectOn("1.0.0", V1);
    expect(await field.update({ check })).toBe("not tried 1.0.1");
    field.release("1.0.2", V2);
    expect(await field.update()).toBe("updated 1.0.2");
    await field.expectOn("1.0.2", V2);
  });

  test("by a record that lacks files, as ota.ts 0.1.0 made them", async () => {
    using field = new Field(V1);
    expect(await field.update()).toBe("updated 1.0.1");
    const { state } = field;
    const { stamps: _, executable: __, image: ___, ...installed } = state.installed!;
    delete installed.files["flash/same.py"];
    delete installed.files["sd/data.bin"];
    field.write({ "device/.ota/state.json": JSON.stringify({ ...state, format: 1, installed }) });
    expect(await field.update()).toBe("up to date 1.0.1");
    await field.expectOn("1.0.1", V2);
    expect(field.state.format).toBe(2);
    field.release("1.0.2", { a: "a" });
    expect(await field.update()).toBe("updated 1.0.2");
    await field.expectOn("1.0.2", { a: "a" });
  });

  test("that is not what it says: told, and put right", async () => {
    // Its `.ota` was deleted; --ver is still in the unit file.
    using field = new Field({ ...V2, "own.txt": "own" });
    field.release("1.0.2", { ...V1, "flash/lib/new.py": "newer\n" });
    expect(await field.update()).toBe("updated 1.0.2");
    expect(field.notes).toContainEqual(
      "2 of the 4 files of 1.0.0 are missing here or have other content: " +
        "flash/lib/old.py, flash/main.py",
    );
    expect(field.tree).toEqual(sorted({ ...V1, "flash/lib/new.py": "newer\n", "own.txt": "own" }));
  });

  test("from a release that the server does not have: told, and everything is brought", async () => {
    using field = new Field({ ...V1, "flash/main.py": "0.9" }, { "1.0.1": V2 });
    expect(await field.update({ ver: "0.9" })).toBe("updated 1.0.1");
    expect(field.notes[0]).toBe("the server does not have 0.9: what it consists of is not known");
    expect(field.tree).toMatchObject(V2);
  });
});

describe("files that others changed, deleted or damaged", () => {
  const damage = (field: Field): void => {
    field.write({ "device/flash/main.py": "scribbled\n", "device/own.txt": "own" });
    field.remove("device/flash/same.py");
  };

  test("are repaired by the next update, and nothing else is fetched", async () => {
    using field = new Field(V2);
    await using server = await serve({ root: field.releases, port: 0, quiet: 0 });
    const device = new HttpOTA(server.url, { root: field.device, ver: "1.0.1" });
    expect((await device.update()).result).toBe("up to date");
    damage(field);
    const { result, traffic } = await device.update();
    expect({ result, content: traffic!.content }).toEqual({ result: "repaired", content: 18 });
    expect(field.tree).toEqual(sorted({ ...V2, "own.txt": "own" }));
    expect((await device.update()).result).toBe("up to date");
  });

  test("status --check names them, and says whether there are any by its exit code", async () => {
    using field = new Field(V2);
    await field.update({ ver: "1.0.1" });
    const check = () => run(["status", "--root", field.device, "--check"]);
    expect(await check()).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/differs: +none/),
    });
    damage(field);
    const { code, stdout } = await check();
    expect(code).toBe(1);
    expect(stdout).toMatch(/differs: +flash\/main\.py \(changed\), flash\/same\.py \(missing\)/);
    const { differs } = await status(field.device, { examine: true });
    expect(differs).toEqual([
      { path: "flash/main.py", found: "changed" },
      { path: "flash/same.py", found: "missing" },
    ]);
  });

  test("although they look unchanged: --check-files hashes them all", async () => {
    using field = new Field(V2);
    await field.update({ ver: "1.0.1" });
    const file = field.at("device/flash/main.py");
    const { atime, mtime } = fs.statSync(file);
    const fd = fs.openSync(file, "r+");
    fs.writeSync(fd, "P");
    fs.closeSync(fd);
    fs.utimesSync(file, atime, new Date(Math.trunc(mtime.getTime() / 1000) * 1000));
    // The record as it would be with such a file at its time of change.
    const { state } = field;
    const { size, mtimeMs, ino } = fs.statSync(file);
    state.installed!.stamps!["flash/main.py"] = `${size} ${mtimeMs} ${ino}`;
    field.write({ "device/.ota/state.json": JSON.stringify(state) });
    expect(await field.update()).toBe("up to date 1.0.1");
    expect(await field.update({ checkFiles: true })).toBe("repaired 1.0.1");
    await field.expectOn("1.0.1", V2);
  });

  test("and an old .ota that was put back: no mix of releases comes of it", async () => {
    using field = new Field(V1);
    field.release("1.0.1", { "flash/lib/only.py": "only in 1.0.1\n" });
    expect(await field.update({ ver: "1.0.0" })).toBe("updated 1.0.1");
    using copy = new Temp();
    // The record of 1.0.0.
    using before = new Field(V1, { "1.0.0": V1 });
    await before.update();
    fs.cpSync(before.at("device/.ota"), copy.at("ota"), { recursive: true });
    fs.rmSync(field.at("device/.ota"), { recursive: true });
    fs.cpSync(copy.at("ota"), field.at("device/.ota"), { recursive: true });
    field.release("1.0.2", { ...V1, "flash/lib/new.py": "newer\n" });
    expect(await field.update()).toBe("updated 1.0.2");
    await field.expectOn("1.0.2", { ...V1, "flash/lib/new.py": "newer\n" });
  });
});

test("an old .ota that was put back where nothing recorded differs: no file is left over", async () => {
  using field = new Field({ "flash/a": "a" }, { "1.0.0": { "flash/a": "a" } });
  await field.update();
  using copy = new Temp();
  fs.cpSync(field.at("device/.ota"), copy.at("ota"), { recursive: true });
  field.release("1.0.1", { "flash/a": "a", "flash/b": "b" });
  expect(await field.update()).toBe("updated 1.0.1");
  fs.rmSync(field.at("device/.ota"), { recursive: true });
  fs.cpSync(copy.at("ota"), field.at("device/.ota"), { recursive: true });
  field.release("1.0.2", { "flash/a": "a2" });
  expect(await field.update()).toBe("updated 1.0.2");
  await field.expectOn("1.0.2", { "flash/a": "a2" });
});

describe("content that changed under a version", () => {
  test("is delivered, deletions too, and takes nothing of the way back", async () => {
    using field = new Field(V1);
    expect(await field.update()).toBe("updated 1.0.1");
    field.remove("releases/1.0.1/flash/lib/new.py");
    field.release("1.0.1", { "flash/same.py": "same no more\n", "flash/x/added.py": "added\n" });
    expect(await field.update()).toBe("repaired 1.0.1");
    const { "flash/lib/new.py": _, ...rest } = V2;
    const changed = { ...rest, "flash/same.py": "same no more\n", "flash/x/added.py": "added\n" };
    await field.expectOn("1.0.1", changed);
    await rollBack(field.device);
    await field.expectOn("1.0.0", V1);
  });

  test("a firmware image that is damaged on the device, or replaced on the server", async () => {
    const firmware = { "firmware_1.0.1.bin": "image one" };
    using field = new Field(V1);
    field.write(below("releases", firmware));
    expect(await field.update()).toBe("updated 1.0.1 firmware 1.0.1");
    field.write({ "device/.ota/ota_0.bin": "imAge one" });
    expect((await status(field.device, { examine: true })).differs).toEqual([
      { path: ".ota/ota_0.bin", found: "changed" },
    ]);
    expect(await field.update()).toBe("repaired 1.0.1 firmware 1.0.1");
    expect(fs.readFileSync(field.at("device/.ota/ota_1.bin"), "utf8")).toBe("image one");
    expect(await field.update()).toBe("up to date 1.0.1");
    fs.rmSync(field.at("device/.ota/ota_1.bin"));
    expect(await field.update({ repair: true })).toBe("repaired 1.0.1 firmware 1.0.1");
    field.write({ "releases/firmware_1.0.1.bin": "image one, again" });
    expect(await field.update()).toBe("repaired 1.0.1 firmware 1.0.1");
    expect(await field.update()).toBe("up to date 1.0.1");
  });
});

describe("the way back", () => {
  test("with lost backups is refused before anything is done", async () => {
    using field = new Field(V1);
    await field.update();
    const [backup] = fs.readdirSync(field.at("device/.ota")).filter((n) => n.startsWith("backup"));
    field.remove(`device/.ota/${backup}`);
    const { code, stdout, stderr } = await run(["rollback", "--root", field.device]);
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(
      /^ota\.ts: cannot go back to 1\.0\.0: .*backup.*flash\/main\.py.* is gone/,
    );
    await field.expectOn("1.0.1", V2);
    expect(await field.update()).toBe("up to date 1.0.1");
  });

  test("from a repair is the one to the release before", async () => {
    using field = new Field(V1);
    await field.update();
    field.write({ "device/flash/main.py": "scribbled", "device/sd/data.bin": "scribbled" });
    expect(await field.update()).toBe("repaired 1.0.1");
    field.write({ "device/flash/lib/new.py": "scribbled" });
    expect(await field.update()).toBe("repaired 1.0.1");
    expect(await rollBack(field.device)).toMatchObject({ from: "1.0.0", to: "1.0.1" });
    await field.expectOn("1.0.0", V1);
    expect((await status(field.device)).failed).toEqual(["1.0.1"]);
    // And it is known as failed, whichever list brings it.
    field.write({ "device/flash/same.py": "scribbled" });
    expect(await field.update()).toBe("not tried 1.0.1");
  });

  test("is free after a repair of a damaged firmware slot", async () => {
    using field = new Field(V1);
    field.write({ "releases/firmware_1.0.1.bin": "image one" });
    await field.update();
    field.write({ "device/.ota/ota_0.bin": "damaged" });
    expect(await field.update()).toBe("repaired 1.0.1 firmware 1.0.1");
    expect(await rollBack(field.device)).toMatchObject({ from: "1.0.0", to: "1.0.1" });
    await field.expectOn("1.0.0", V1);
  });

  test("brings nothing of a version that changed into the release before", async () => {
    using field = new Field(V1);
    await field.update();
    // What the application deleted, a later 1.0.2 lacks at first, and then has.
    field.remove("device/flash/same.py");
    const { "flash/same.py": _, ...rest } = V2;
    field.release("1.0.2", rest);
    expect(await field.update()).toBe("updated 1.0.2");
    field.release("1.0.2", { "flash/same.py": "of a changed 1.0.2\n" });
    expect(await field.update()).toBe("repaired 1.0.2");
    await rollBack(field.device);
    expect(field.tree).toEqual(sorted(rest));
  });

  test("is none where there was none before the repair", async () => {
    using field = new Field(V2);
    await field.update({ ver: "1.0.1" });
    field.write({ "device/flash/main.py": "scribbled" });
    expect(await field.update()).toBe("repaired 1.0.1");
    await expect(rollBack(field.device)).rejects.toThrow("no previous release");
    await field.expectOn("1.0.1", V2);
  });

  test("of a repair that fails its check is to what was there", async () => {
    using field = new Field(V1);
    await field.update();
    field.write({ "device/flash/main.py": "scribbled" });
    const check = { command: "grep -q scribbled flash/main.py", timeout: 5 };
    expect(await field.update({ check })).toBe("rolled back 1.0.1");
    expect(field.tree).toEqual(sorted({ ...V2, "flash/main.py": "scribbled" }));
    await rollBack(field.device, true);
    await field.expectOn("1.0.0", V1);
  });

  test("from firmware alone names the firmware", async () => {
    using field = new Field(V2);
    await field.update({ ver: "1.0.1" });
    field.write({ "releases/firmware_1.0.2.bin": "image" });
    const check = { command: "false", timeout: 5 };
    expect(await field.update({ check })).toBe("rolled back 1.0.1 firmware 1.0.2");
    expect((await status(field.device)).failed).toEqual(["firmware 1.0.2"]);
    const args = ["--root", field.device, "--from", field.releases];
    const { code, stdout } = await run(["client", ...args]);
    expect({ code, stdout }).toEqual({
      code: 3,
      stdout: "not tried firmware 1.0.2: it failed before (--retry tries it); on 1.0.1\n",
    });
    expect(await field.update({ retry: true })).toBe("updated 1.0.1 firmware 1.0.2");
    expect((await status(field.device)).failed).toEqual([]);
  });

  test("gives directories their mode back", async () => {
    using field = new Field(V1);
    fs.chmodSync(field.at("device/flash/lib"), 0o2750);
    field.remove("releases/1.0.1/flash/lib");
    await field.update();
    expect(fs.existsSync(field.at("device/flash/lib"))).toBe(false);
    await rollBack(field.device);
    expect(fs.statSync(field.at("device/flash/lib")).mode & 0o7777).toBe(0o2750);
  });
});

describe("an application's file where a release adds one", () => {
  test("is kept, told, and given back by a rollback", async () => {
    using field = new Field({ ...V1, "flash/lib/new.py": "the application's\n" });
    expect(await field.update()).toBe("updated 1.0.1");
    await field.expectOn("1.0.1", V2);
    const [, kept] = /^flash\/lib\/new\.py .* is kept as (.+)$/.exec(field.notes.join("\n"))!;
    expect(fs.readFileSync(field.at(`device/${kept}`), "utf8")).toBe("the application's\n");
    await rollBack(field.device);
    expect(field.tree["flash/lib/new.py"]).toBe("the application's\n");
    expect(fs.existsSync(field.at(`device/${kept}`))).toBe(false);
  });

  test("of the same content makes no fuss", async () => {
    using field = new Field({ ...V1, "flash/lib/new.py": "new\n" });
    expect(await field.update()).toBe("updated 1.0.1");
    expect(field.notes).toEqual([]);
  });
});

describe("what the updater keeps", () => {
  test("does not stand in the way of a release in which flash is a file", async () => {
    using field = new Field(V1);
    await field.update();
    field.release("1.0.2", { flash: "a file\n" });
    expect(await field.update()).toBe("updated 1.0.2");
    await field.expectOn("1.0.2", { flash: "a file\n" });
    await rollBack(field.device);
    await field.expectOn("1.0.1", V2);
    const version = fs.readFileSync(field.at("device/flash/OTA_VERSION.py"), "utf8");
    expect(version).toBe("VERSION = '1.0.1'\n");
  });

  test("an id that is none is made anew", async () => {
    using field = new Field(V1);
    for (const bad of ["", "\n", "a b", "x".repeat(129), "a\u0000"]) {
      field.write({ "device/.ota/id": bad });
      field.release(`1.1.${bad.length}`, V2);
      await field.update();
      const id = fs.readFileSync(field.at("device/.ota/id"), "utf8");
      expect(id).toMatch(/^[0-9a-f-]{36}\n$/);
    }
    field.write({ "device/.ota/id": "meter-7\n" });
    await field.update();
    expect(fs.readFileSync(field.at("device/.ota/id"), "utf8")).toBe("meter-7\n");
  });

  test("a state.json that was deleted by hand replays nothing over newer files", async () => {
    using field = new Field(V1);
    await field.update();
    fs.rmSync(field.at("device/.ota/state.json"));
    const own = { "device/flash/lib/old.py": "of the application now\n" };
    field.write(own);
    const { code, stderr } = await run(["status", "--root", field.device]);
    expect(code).toBe(1);
    expect(stderr).toContain("--repair");
    expect(field.tree).toEqual(
      sorted({ ...V2, "flash/lib/old.py": own["device/flash/lib/old.py"] }),
    );
    expect(await field.update({ repair: true })).toMatch(/1\.0\.1$/);
    expect(field.tree).toMatchObject(V2);
    expect(await field.update()).toBe("up to date 1.0.1");
  });
});

describe("executable files", () => {
  const script: Tree = { "selftest.sh": "#!/bin/sh\nexit 0\n", "tool.sh": "#!/bin/sh\n" };
  const layField = () => {
    const field = new Field(V1, { "1.0.0": V1, "1.0.1": { ...V1, ...script } });
    fs.chmodSync(field.at("releases/1.0.1/selftest.sh"), 0o755);
    return field;
  };
  const check = { command: "./selftest.sh", timeout: 5 };

  test("run: a check may be a script that comes with the release", async () => {
    using field = layField();
    expect(await field.update({ check })).toBe("updated 1.0.1");
    expect(field.mode("selftest.sh") & 0o111).not.toBe(0);
    expect(field.mode("tool.sh") & 0o111).toBe(0);
  });

  test("become so, and cease to be so, with a release; nothing is fetched for it", async () => {
    using field = layField();
    await field.update();
    field.release("1.0.2", { ...V1, ...script });
    fs.chmodSync(field.at("releases/1.0.2/tool.sh"), 0o755);
    await using server = await serve({ root: field.releases, port: 0, quiet: 0 });
    const { traffic } = await new HttpOTA(server.url, { root: field.device }).update();
    expect(field.mode("selftest.sh") & 0o111).toBe(0);
    expect(field.mode("tool.sh") & 0o111).not.toBe(0);
    expect(traffic).toMatchObject({ reused: 2 });
    await rollBack(field.device);
    expect(field.mode("selftest.sh") & 0o111).not.toBe(0);
    expect(field.mode("tool.sh") & 0o111).toBe(0);
  });

  test("that lost their mode are repaired; what the owner made executable stays so", async () => {
    using field = layField();
    await field.update();
    fs.chmodSync(field.at("device/selftest.sh"), 0o600);
    fs.chmodSync(field.at("device/tool.sh"), 0o700);
    expect((await status(field.device, { examine: true })).differs).toEqual([
      { path: "selftest.sh", found: "not executable" },
    ]);
    expect(await field.update()).toBe("repaired 1.0.1");
    expect(field.mode("selftest.sh")).toBe(0o700);
    expect(field.mode("tool.sh")).toBe(0o700);
    expect(await field.update()).toBe("up to date 1.0.1");
  });

  test("are known as such from first contact on", async () => {
    using field = layField();
    field.write(below("device", script));
    fs.chmodSync(field.at("device/selftest.sh"), 0o755);
    expect(await field.update({ ver: "1.0.1" })).toBe("up to date 1.0.1");
    expect(field.state.installed?.executable).toEqual(["selftest.sh"]);
  });

  test("that are not so at first contact become so", async () => {
    using field = layField();
    field.write(below("device", script));
    field.release("1.0.2", { ...V2, ...script });
    fs.chmodSync(field.at("releases/1.0.2/selftest.sh"), 0o755);
    expect(await field.update({ ver: "1.0.1" })).toBe("updated 1.0.2");
    expect(field.mode("selftest.sh")).toBe(0o755);
  });
});
