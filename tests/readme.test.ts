/**
 * README.md says what is so: its commands run and print what it shows, its code compiles, its
 * options and files are there. Commands are run as they stand, but with this Bun, on a free port,
 * and in a directory that has what a clone of the repository has.
 */

import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import {
  LIMITS,
  MAX_CODED,
  MAX_MANIFEST_BYTES,
  parseManifest,
  Releases,
  type Rollout,
  serve,
} from "../ota.ts";
import { layFleet, type Said } from "./helpers/laid-fleet.ts";
import { INTERVAL, Time } from "./helpers/rollout.ts";
import { asTree, layTree, readTree, Temp } from "./helpers/temp.ts";
import { ota, OTA_TS, Tool } from "./helpers/tool.ts";

setDefaultTimeout(600_000);

const REPOSITORY = dirname(OTA_TS);
const README = readFileSync(`${REPOSITORY}/README.md`, "utf8");

interface Block {
  language: string;
  text: string;
}

const BLOCKS: Block[] = [...README.matchAll(/^```(\w*)\n(.*?)^```$/gms)].map(
  ([, language = "", text = ""]) => ({ language, text }),
);

/** README without its blocks of code. */
const PROSE = README.replaceAll(/^```\w*\n.*?^```$/gms, "");

/** The one block that has a text in it. */
function blockWith(text: string): Block {
  const found = BLOCKS.filter((block) => block.text.includes(text));
  if (found.length !== 1) throw new Error(`${found.length} blocks have ${JSON.stringify(text)}`);
  return found[0]!;
}

/** The block behind another one: what it prints. */
function outputOf(block: Block): string[] {
  return BLOCKS[BLOCKS.indexOf(block) + 1]!.text.trimEnd().split("\n");
}

/** The section under a heading of some depth, without the heading. */
function section(marks: string, heading: string): string {
  const deepest = marks.length;
  const start = PROSE.indexOf(`\n${marks} ${heading}\n`);
  if (start < 0) throw new Error(`no section ${heading}`);
  const rest = PROSE.slice(start + marks.length + heading.length + 3);
  return rest.split(new RegExp(`^#{1,${deepest}} `, "m"))[0]!;
}

/** The commands of a session in a terminal, each with the lines that it prints. */
function stepsOf(session: Block): { typed: string; answer: string[] }[] {
  return session.text
    .split(/^\$ /m)
    .slice(1)
    .map((step) => {
      const [typed = "", ...answer] = step.trimEnd().split("\n");
      return { typed, answer };
    });
}

/** A directory in which commands of README find what they name. */
class Clone extends Temp {
  constructor() {
    super();
    for (const name of ["ota.ts", "node_modules"]) {
      symlinkSync(`${REPOSITORY}/${name}`, this.at(name));
    }
    // A server writes its fleet there.
    cpSync(`${REPOSITORY}/examples`, this.at("examples"), { recursive: true });
  }

  /** Runs lines for a shell, with this Bun; what it shows is stderr, and then stdout. */
  run(script: string): { code: number; shown: string[] } {
    const bun = `'${process.execPath}'`;
    const lines = script.replaceAll(/\bnpx --yes bun@[\d.]+(?= )|^bun(?= )/gm, bun);
    const { exitCode, stdout, stderr } = Bun.spawnSync(["sh", "-euc", lines], {
      cwd: this.path,
      env: { ...process.env, NO_COLOR: "1" },
      stdin: "ignore",
    });
    const text = `${stderr}${stdout}`.trimEnd();
    return { code: exitCode, shown: text === "" ? [] : text.split("\n") };
  }
}

/** The fleet that README shows. */
const README_FLEET = (hour: number): Said[] => [
  ...["0001", "0002", "0003", "0004"].map((end) => {
    return { id: `240ac4a0${end}`, version: "1.0.1", ago: 30 * hour, query: { model: "LoPy4" } };
  }),
  { id: "240ac4a00007", version: "1.0.0", ago: 80 * hour, query: { model: "FiPy" }, to: "1.0.1" },
  { id: "240ac4a00008", version: "1.0.0", ago: 78 * hour, query: { model: "LoPy4" }, to: "1.0.1" },
  { id: "240ac4a00008", version: "1.0.1", ago: 77.5 * hour, method: "HEAD" },
  { id: "240ac4a00008", version: "1.0.0", ago: 76.5 * hour, method: "HEAD" },
  { id: "240ac4a00009", version: "1.0.0", ago: 5.5 * hour, query: { model: "LoPy4" } },
  { id: "240ac4a00006", version: "1.0.0", ago: 0.4 * hour, query: { model: "LoPy4" }, to: "1.0.1" },
];

/** The options that the help of a command lists. */
const optionsOf = new Map<string, Set<string>>();
beforeAll(async () => {
  const all = (await ota(["--help"])).stdout;
  const commands = [...all.matchAll(/^ {2}(\w+) +\S/gm)].map(([, name]) => name!);
  expect(commands.length).toBeGreaterThan(4);
  await Promise.all(
    commands.map(async (name) => {
      const { stdout } = await ota([name, "--help"]);
      const options = [...stdout.matchAll(/^ {2}(--[\w-]+)/gm)].map(([, option]) => option!);
      optionsOf.set(name, new Set(options));
    }),
  );
});

/** What in README are options of other programs. */
const FOREIGN = [
  "npx --yes",
  "bun build --compile ota.ts --outfile ota",
  "bun run soak --minutes 60 --seed 7",
  "--without damage,switch",
  "systemctl enable --now ota-server",
  "systemctl is-active --quiet meter",
];

describe("options", () => {
  test("every one in README is in --help", () => {
    const known = new Set([...optionsOf.values()].flatMap((options) => [...options]));
    let text = README.replaceAll(/^```ts\n.*?^```$/gms, "");
    for (const foreign of FOREIGN) {
      expect(text).toContain(foreign);
      text = text.replaceAll(foreign, "");
    }
    const found = new Set([...text.matchAll(/(?<![\w-])--[a-z][\w-]*/g)].map(([option]) => option));
    expect(found.size).toBeGreaterThan(20);
    expect([...found].filter((option) => !known.has(option))).toEqual([]);
  });

  test("every one in --help is in README", () => {
    for (const [command, options] of optionsOf) {
      const missing = [...options].filter((option) => {
        return option !== "--help" && !new RegExp(`${option}(?![\\w-])`).test(README);
      });
      expect([command, missing]).toEqual([command, []]);
    }
  });

  test("every command line has a command and options that there are", () => {
    const joined = README.replaceAll(/\\\n\s*/g, " ");
    const lines = [...joined.matchAll(/(?:ota\.ts|\.\/ota) ([a-z]+)([^\n`#|]*)/g)];
    expect(lines.length).toBeGreaterThan(8);
    for (const [line, command = "", rest = ""] of lines) {
      const known = optionsOf.get(command);
      // What is quoted is somebody else's.
      const options = rest.replaceAll(/'[^']*'/g, "").match(/(?<=\s)--[\w-]+/g) ?? [];
      expect([line, known && options.filter((option) => !known.has(option))]).toEqual([line, []]);
    }
  });

  test("each command has a table of just its options", () => {
    for (const [command, options] of optionsOf) {
      const rows = section("####", command).match(/^\| `--.*$/gm) ?? [];
      const listed = rows.flatMap((row) => row.split("|")[1]!.match(/--[\w-]+/g) ?? []);
      const known = [...options].filter((option) => option !== "--help");
      expect([command, listed.toSorted()]).toEqual([command, known.toSorted()]);
    }
  });

  test("the defaults in a table are those in --help", async () => {
    for (const command of optionsOf.keys()) {
      const { stdout } = await ota([command, "--help"]);
      for (const [, option, found] of stdout.matchAll(/^ {2}(--[\w-]+).*\((\S+)\)$/gm)) {
        const row = section("####", command)
          .split("\n")
          .find((line) => line.startsWith("|") && line.includes(`${option} `));
        expect([command, option, row]).toEqual([command, option, expect.stringContaining(found!)]);
      }
    }
  });
});

describe("code", () => {
  const blocks = BLOCKS.filter(({ language }) => language === "ts");

  test("compiles", () => {
    using clone = new Clone();
    expect(blocks.length).toBeGreaterThan(0);
    const settings = JSON.parse(readFileSync(`${REPOSITORY}/tsconfig.json`, "utf8"));
    writeFileSync(
      clone.at("tsconfig.json"),
      JSON.stringify({ ...settings, include: ["block*.ts"] }),
    );
    writeFileSync(clone.at("package.json"), JSON.stringify({ type: "module" }));
    for (const [i, { text }] of blocks.entries()) writeFileSync(clone.at(`block${i}.ts`), text);
    const child = Bun.spawnSync([process.execPath, "check"], { cwd: clone.path });
    const said = `${child.stdout}${child.stderr}`;
    expect({ said, code: child.exitCode }).toEqual({ said: expect.any(String), code: 0 });

    // And what does not compile would be found.
    writeFileSync(clone.at("block.ts"), 'import { nothing } from "./ota.ts";\nnothing();\n');
    expect(Bun.spawnSync([process.execPath, "check"], { cwd: clone.path }).exitCode).not.toBe(0);
  });

  test("the transport is the one in examples/", () => {
    const example = readFileSync(`${REPOSITORY}/examples/curl-transport.ts`, "utf8");
    const { text } = blockWith("class CurlOTA extends OTA");
    expect(text.replace('"./ota.ts"', '"../ota.ts"').trim()).toBe(example.trim());
  });

  test("the transport brings a device to the newest release", async () => {
    using clone = new Clone();
    await using server = await serveIn(clone);
    writeFileSync(clone.at("transport.ts"), blockWith("class CurlOTA extends OTA").text);
    mkdirSync(clone.at("device"));
    // Run from a copy: it must not be this one that it imports.
    const child = Bun.spawn([process.execPath, "transport.ts"], {
      cwd: clone.path,
      env: { ...process.env, SERVER: server.url },
      stdio: ["ignore", "pipe", "pipe"],
    });
    const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    expect([await child.exited, stderr]).toEqual([0, ""]);
    expect(stdout).toContain("updated");
    expect(await Bun.file(clone.at("device/flash/main.py")).text()).toBe(
      await Bun.file(`${REPOSITORY}/examples/smart-meter/1.0.1/flash/main.py`).text(),
    );
  });

  test("the manifest is what the example's server answers", async () => {
    const releases = await Releases.open(`${REPOSITORY}/examples/smart-meter`, { quiet: 0 });
    const real = releases.manifestFor({ current_ver: "1.0.0" }, "http://HOST")!;
    const { text } = blockWith('"previous_version"');
    const shown = JSON.parse(text);
    expect(Object.keys(shown)).toEqual(Object.keys(real));
    expect([shown.previous_version, shown.version]).toEqual([real.previous_version, real.version]);
    // Of the lists it shows a part.
    expect(real.delete).toEqual(expect.arrayContaining(shown.delete));
    const address = ({ URL: url, dst_path }: { URL: string; dst_path?: string }) => [url, dst_path];
    expect(address(shown.firmware)).toEqual(address(real.firmware!));
    for (const list of ["new", "update"] as const) {
      expect(real[list].map(address)).toEqual(expect.arrayContaining(shown[list].map(address)));
      for (const entry of shown[list])
        expect(Object.keys(entry)).toEqual(Object.keys(real[list][0]!));
    }
    expect(parseManifest(text.replaceAll("<sha1>", "0".repeat(40)))?.version).toBe("1.0.1");
  });
});

/** Starts the server of the quick start, on a free port. */
async function serveIn(clone: Clone): Promise<Tool & { url: string }> {
  const [, root = ""] = /ota\.ts serve --root (\S+)\n/.exec(README) ?? [];
  const tool = new Tool(["serve", "--root", root, "--port", "0"], { cwd: clone.path });
  await tool.until(/^try .*\n/m);
  const [, url = ""] = await tool.until(/ at (http:\S+)\n/);
  return Object.assign(tool, { url });
}

describe("commands", () => {
  test("the ten lines at the top print what they show", async () => {
    const demo = BLOCKS[0]!;
    expect(demo.text.trimEnd().split("\n").length).toBe(10);
    const [first, ...steps] = stepsOf(demo);
    const [, root] = /ota\.ts serve --root (\S+)\n/.exec(README)!;
    expect(first).toEqual({
      typed: `bun ota.ts serve --root ${root} >server.log 2>&1 &`,
      answer: [],
    });
    using clone = new Clone();
    await using server = await serveIn(clone);
    for (const { typed, answer } of steps) {
      const real = typed.replace(/ client /, ` client --server ${server.url} `);
      expect([typed, clone.run(real).shown]).toEqual([typed, answer]);
    }
  });

  test("the quick start, then status, rollback and client print what README shows", async () => {
    using clone = new Clone();
    await using server = await serveIn(clone);

    const served = blockWith("$ bun ota.ts serve --root examples/smart-meter\n");
    const printed = server.stdout.trimEnd().split("\n");
    const general = (line: string) =>
      line
        .replace(/ serves .*(?=\/examples\/)/, " serves …")
        .replaceAll(/http:\/\/127\.0\.0\.1:\d+/g, "http://127.0.0.1:…")
        .replace(/token=[\w-]{32}$/, "token=…");
    const [command, ...shown] = served.text.trimEnd().split("\n");
    expect(command).toBe("$ bun ota.ts serve --root examples/smart-meter");
    expect(printed.map(general)).toEqual(shown.slice(0, printed.length).map(general));

    const quick = blockWith("cp -r examples/smart-meter/1.0.0/* device");
    const { code, shown: found } = clone.run(
      quick.text.replace("client ", `client --server ${server.url} `),
    );
    expect([found, code]).toEqual([expect.any(Array), 0]);
    // Four at once: in any order. The port in the manifest has other digits.
    const bytes = /^received (\d+) bytes|\(\d+\.\d %\)/;
    const plain = (line: string) =>
      line.replace(bytes, "received … bytes").replace(/\([\d.]+ %\)/, "");
    const expected = outputOf(quick);
    expect(found.map(plain).sort()).toEqual(expected.map(plain).sort());
    expect(found.at(-1)).toBe(expected.at(-1)!);
    const received = (lines: string[]) => Number(bytes.exec(lines.at(-2)!)?.[1]);
    expect(Math.abs(received(found) - received(expected))).toBeLessThan(30);
    const release: Record<string, Uint8Array> = {};
    const from = `${REPOSITORY}/examples/smart-meter/1.0.1`;
    for (const path of Object.keys(readTree(from)).filter((name) => !name.endsWith("/"))) {
      release[path] = readFileSync(`${from}/${path}`);
    }
    const version = { "flash/OTA_VERSION.py": "VERSION = '1.0.1'\n" };
    expect(readTree(clone.at("device"))).toMatchObject(asTree({ ...release, ...version }));

    // Its log has lines like those shown.
    const logged = /^\S+Z 127\.0\.0\.1( device=\S+)? GET \S+ \d+ \d+ [\d.]+ms( coding=\w+)?$/;
    const line = await server.until(/^.* \/firmware_1\.0\.1\.bin .*$/m);
    const lines = shown.slice(printed.length);
    expect(lines.length).toBeGreaterThan(0);
    for (const each of [line[0], ...lines]) expect(each).toMatch(logged);
    const stable = (text: string) => text.replace(/^\S+/, "").replace(/ [\d.]+ms/, "");
    expect(lines.map(stable)).toContain(stable(line[0]));

    const session = blockWith("$ bun ota.ts rollback");
    const steps = stepsOf(session);
    expect(steps.length).toBe(3);
    for (const { typed, answer } of steps) {
      const real = typed.replace(/ client /, ` client --server ${server.url} `);
      expect([typed, clone.run(real).shown]).toEqual([typed, answer]);
    }
  });

  test("manifest --cost prints what README shows", () => {
    using clone = new Clone();
    const block = blockWith("manifest --root");
    expect(clone.run(block.text)).toEqual({ code: 0, shown: outputOf(block) });
  });

  test("a small fleet is shown as README shows it", async () => {
    using clone = new Clone();
    const hour = 3600_000;
    mkdirSync(clone.at("releases"));
    await layFleet(clone.at("releases/.fleet.db"), README_FLEET(hour));
    const general = (line: string) =>
      line
        .replace(/ written .*, in .*(?=\/releases\/)/, " written …, in …")
        .replace(/ silent at (\d+-\d+-\d+ )?\d\d:\d\d$/, " silent at …")
        .replaceAll(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "…");
    const steps = stepsOf(blockWith("$ bun ota.ts fleet --root releases\n"));
    expect(steps.length).toBe(5);
    for (const { typed, answer } of steps) {
      const { shown } = clone.run(typed);
      expect([typed, shown.map(general)]).toEqual([typed, answer.map(general)]);
    }
    const session = blockWith("fleet merge /media/stick/");
    await layFleet(clone.at("van.db"), [
      { id: "240ac4b00101", to: "1.0.1" },
      { id: "240ac4b00102", version: "1.0.1" },
      { id: "240ac4a00009", ago: 99 * hour },
    ]);
    const [{ typed = "", answer = [] } = {}] = stepsOf(session);
    expect(clone.run(typed.replace("/media/stick/", ""))).toEqual({ code: 0, shown: answer });
  });

  test("a rollout goes as README shows it", async () => {
    using clone = new Clone();
    // Without the fleet that whoever tried the quick start has left there.
    const filter = (path: string) => !path.includes("/.fleet.db");
    const example = `${REPOSITORY}/examples/smart-meter`;
    cpSync(example, clone.at("releases"), { recursive: true, filter });
    const steps = stepsOf(blockWith("rollout start 1.0.1 --root releases"));
    expect(steps.length).toBe(3);
    const shows = ({ typed = "", answer = [] as string[] } = {}) => {
      expect([typed, clone.run(typed).shown]).toEqual([typed, answer]);
    };
    const time = new Time();
    time.now = Date.now() - 24 * 3600_000;
    await using server = await serve({
      ...{ root: clone.at("releases"), port: 0, host: "127.0.0.1", quiet: 0, tick: 0 },
      ...{ fleet: clone.at("releases/.fleet.db"), clock: time.clock },
    });
    const fleet = server.fleet!;
    const on = new Map(Array.from({ length: 40 }, (_, i) => [`meter-${i}`, "1.0.0"]));
    /** Each device asks, or only says what it is on; and comes up on what it is offered. */
    const round = async (method: "GET" | "HEAD") => {
      for (const [i, [id, current_ver]] of [...on].entries()) {
        const model = i % 5 === 0 ? "FiPy" : "LoPy4";
        const query = new URLSearchParams({ devid: id, current_ver, model });
        const answer = await fetch(new URL(`/manifest.json?${query}`, server.url), { method });
        if (method === "HEAD") continue;
        on.set(id, ((await answer.json()) as { version: string } | null)?.version ?? current_ver);
      }
      time.pass(INTERVAL);
      await fleet.flush();
    };
    for (let visit = 0; visit < 3; visit++) await round("HEAD");
    shows(steps[0]);
    for (let second = 0; second < 3; second++) {
      time.pass(1000);
      await fleet.flush();
    }
    const stand = async (): Promise<Rollout> => (await fleet.rollouts())[0]!;
    let rollout = await stand();
    for (let visit = 0; visit < 100 && rollout.proven < 20; visit++) {
      await round("GET");
      rollout = await stand();
      // At 5 % there was nothing to see yet.
      if (rollout.state === "paused" && rollout.proven < 20) {
        await fleet.changeRollout("1.0.1", null, "resume");
      }
    }
    for (const step of steps.slice(1)) shows(step);
  });

  test("keygen, and what is done with the keys", async () => {
    using clone = new Clone();
    const [make, ...use] = blockWith("ota.ts keygen").text.trimEnd().split("\n");
    const { code, shown } = clone.run(make!);
    expect([code, shown]).toEqual([0, [expect.stringContaining("fleet.key")]]);
    expect(statSync(clone.at("fleet.key")).mode & 0o777).toBe(0o600);
    layTree(clone.at("releases"), { "1.0.0/flash/main.py": "1\n" });
    const words = (line: string) =>
      line
        .replaceAll(/^bun ota\.ts|#.*$/g, "")
        .trim()
        .split(/ +/);
    const [sign = "", client = ""] = use;
    const { path: cwd } = clone;
    const device = async (args: readonly string[], root: string) => {
      await using server = new Tool([...args, "--port", "0", "--root", "releases"], { cwd });
      const [, url = ""] = await server.until(/ at (http:\S+)\n/);
      const ended = await ota([...words(client), "--server", url, "--root", root], { cwd });
      return [ended.code, ended.last];
    };
    // Answers that a server signs, then releases that were signed at home.
    const answering = words(blockWith("serve --sign").text);
    expect(await device(["serve"], "first")).toEqual([1, ""]);
    expect(await device(answering, "first")).toEqual([0, "updated 0 -> 1.0.0"]);
    expect(clone.run(sign)).toEqual({ code: 0, shown: ["signed 1.0.0: 3 steps, 1 signature"] });
    expect(await device(["serve"], "second")).toEqual([0, "updated 0 -> 1.0.0"]);
  });

  test("publishing by a rename", async () => {
    using clone = new Clone();
    layTree(clone.path, { "build/flash/main.py": "2\n", "releases/1.0.0/flash/main.py": "1\n" });
    const { code } = clone.run(blockWith("mv releases/").text);
    const releases = await Releases.open(clone.at("releases"), { quiet: 0 });
    expect([code, releases.versions.map(({ name }) => name)]).toEqual([0, ["1.0.0", "1.0.2"]]);
  });

  test("replacing ota.ts by a rename", () => {
    using clone = new Clone();
    layTree(clone.at("opt"), { "ota.ts": "old" });
    const line = blockWith("cp ota.ts ").text.replaceAll("/opt/ota/", "opt/");
    expect(clone.run(line).code).toBe(0);
    expect(readdirSync(clone.at("opt"))).toEqual(["ota.ts"]);
    expect(readFileSync(clone.at("opt/ota.ts"))).toEqual(readFileSync(OTA_TS));
  });

  test("running a part of the tests", () => {
    const lines = [...README.matchAll(/\bbun test (\S+\.test\.ts)(?: -t '(.*?)')?/g)];
    expect(lines.length).toBeGreaterThan(2);
    for (const [, file = "", name = ""] of lines) {
      expect(readFileSync(join(REPOSITORY, file), "utf8")).toContain(name);
    }
  });

  test("a program that needs no Bun", () => {
    using clone = new Clone();
    const [build = ""] = /bun build --compile [^`]*/.exec(README) ?? [];
    expect(clone.run(`${build} >&2`).code).toBe(0);
    const { stdout, exitCode } = Bun.spawnSync([clone.at("ota"), "--version"], { env: {} });
    expect([exitCode, stdout.toString()]).toEqual([0, expect.stringMatching(/^ota\.ts \d/)]);
    const [, size] = /ota` \((\d+)\s*MB/.exec(README) ?? [];
    if (process.platform === "linux" && process.arch === "x64") {
      const megabytes = statSync(clone.at("ota")).size / 1e6;
      expect(Math.abs(megabytes - Number(size))).toBeLessThan(2);
    }
  });

  test("scripts that it names are in package.json", () => {
    const { scripts } = JSON.parse(readFileSync(`${REPOSITORY}/package.json`, "utf8"));
    const named = [...README.matchAll(/\bbun(?:@[\d.]+)? run (\w+)/g)].map(([, name]) => name!);
    expect(named).toContain("test");
    expect(named.filter((name) => !(name in scripts))).toEqual([]);
  });

  test("the version of Bun is the one that the tests run with", () => {
    // Measurements stay those of the version that they were made with.
    const [text = ""] = README.split(/^## Measurements$/m);
    const named = [...text.matchAll(/\b[Bb]un[@ ](\d[\d.]*\d)/g)].map(([, version]) => version);
    expect(named.length).toBeGreaterThan(4);
    expect([...new Set(named)]).toEqual([Bun.version]);
  });
});

/** A word in backquotes that is a name in code: `getData`, `TransferError`. */
const NAME = /`([A-Za-z]+[a-z][A-Z]\w*|[A-Z][a-z]+|[A-Z]{3,})\b[^`]*`/g;

describe("text", () => {
  test("the contents are the headings", () => {
    const headings = [...PROSE.matchAll(/^##(#?) (.*)$/gm)]
      .filter(([, , name]) => name !== "Contents")
      .map(([, deeper, name = ""]) => {
        // As GitHub makes them.
        const anchor = name
          .toLowerCase()
          .replaceAll(/[^\w\- ]/g, "")
          .replaceAll(" ", "-");
        return `${deeper ? "  " : ""}[${name}](#${anchor})`;
      });
    const links = section("##", "Contents").matchAll(/(- )?(\[[^\]]*\]\([^)]*\))/g);
    const listed = [...links].map(([, first, link]) => `${first ? "" : "  "}${link}`);
    expect(listed).toEqual(headings);
    expect(new Set(headings).size).toBe(headings.length);
  });

  test("links within it lead somewhere", () => {
    const anchors = [...section("##", "Contents").matchAll(/\]\((#[^)]*)\)/g)].map(([, at]) => at!);
    const links = [...PROSE.matchAll(/\]\((#[^)]*)\)/g)].map(([, at]) => at!);
    expect(links.length).toBeGreaterThan(anchors.length);
    expect(links.filter((at) => !anchors.includes(at))).toEqual([]);
  });

  test("the parts of ota.ts are those of its contents", () => {
    const source = readFileSync(OTA_TS, "utf8");
    const parts = [...source.matchAll(/^\/\/ ([IVX]+ +\S.*?): \S.*\.$/gm)];
    const rows = section("###", "Layout of the file").matchAll(/^\| ([IVX]+ \S.*?) +\| \S/gm);
    expect([...rows].map(([, part]) => part)).toEqual(
      parts.map(([, part]) => part!.replace(/ +/, " ")),
    );
  });

  test("names of code are those in the code", () => {
    const source = readFileSync(OTA_TS, "utf8");
    const text = section("##", "Transports") + section("##", "Development");
    const names = [...text.matchAll(NAME)].map(([, name]) => name!);
    expect(names).toEqual(expect.arrayContaining(["getData", "TransferError", "needsDictionary"]));
    expect(names.filter((name) => !new RegExp(`\\b${name}\\b`).test(source))).toEqual([]);
    const [, sectionOfCodings = ""] = /section (\w+), for both\s+ends/.exec(text) ?? [];
    expect(source).toContain(`// ──── ${sectionOfCodings} ────`);
  });

  test("files that it names are there", () => {
    const links = [...PROSE.matchAll(/\]\((?!https?:|#)([^)\s]+)\)/g)].map(([, path]) => path!);
    const named = [...PROSE.matchAll(/(?<![\w/.])(?:examples|tests)\/[\w./-]*\w/g)].map(
      ([path]) => path,
    );
    const commands = [...README.matchAll(/\bbun ((?:[\w-]+\/)*[\w-]+\.ts)/g)].map(
      ([, path]) => path!,
    );
    const paths = new Set([...links, ...named, ...commands]);
    expect(paths).toContain("examples/curl-transport.ts");
    expect([...paths].filter((path) => !existsSync(join(REPOSITORY, path)))).toEqual([]);
  });

  test("every section says something", () => {
    const sections = README.replaceAll(/<!--.*?-->/gs, "").split(/^(?=#)/m);
    const lines = README.replaceAll(/^```.*?^```$/gms, "").match(/^#.*$/gm) ?? [];
    expect(lines.length).toBeGreaterThan(5);
    const empty = sections.filter((text, i) => {
      const [heading = "", ...rest] = text.split("\n");
      const hasParts = /^(#+)/.exec(sections[i + 1] ?? "")?.[1]!.length ?? 0;
      const depth = /^(#+)/.exec(heading)?.[1]!.length ?? 0;
      return depth > 0 && rest.join("").trim() === "" && hasParts <= depth;
    });
    expect(empty).toEqual([]);
  });

  test("its limits are those of the code", () => {
    const MIB = 1024 * 1024;
    const text = README.replaceAll(/\s+/g, " ");
    expect(text).toContain(
      `${LIMITS.target} characters of path and query, ${LIMITS.query} of them in the query, ` +
        `${LIMITS.version} in \`current_ver\``,
    );
    expect(text).toContain(`no body; ${LIMITS.idle} s without a byte`);
    expect(text).toContain(`| a manifest | ${MAX_MANIFEST_BYTES / MIB} MiB of JSON |`);
    expect(text).toContain(`Deltas are made for files of up to ${MAX_CODED / MIB} MiB`);
  });
});

describe("the picture", () => {
  const [, title = "", path = ""] = /^!\[([^\]]*)\]\(([^)]*\.svg)\)$/ms.exec(README) ?? [];
  const svg = readFileSync(join(REPOSITORY, path), "utf8");

  test("is small, alone, and tells what it shows", () => {
    expect(svg.length).toBeLessThan(15_000);
    // What GitHub shows in an <img> can load nothing.
    expect(svg.replace('xmlns="http://www.w3.org/2000/svg"', "")).not.toMatch(
      /https?:|href|@import|<image|<script|<foreignObject/,
    );
    expect(svg).toMatch(/<title[^>]*>\S/);
    expect(svg).toMatch(/<desc[^>]*>\S/);
    expect(title).not.toBe("");
  });

  test("is well-formed", () => {
    const open: string[] = [];
    for (const [tag, close, name, alone] of svg.matchAll(/<(\/?)([\w-]+)[^<>]*?(\/?)>/g)) {
      if (close) expect([tag, open.pop()]).toEqual([tag, name]);
      else if (!alone) open.push(name!);
    }
    expect(open).toEqual([]);
    expect(svg).not.toMatch(/&(?!amp;|lt;|gt;|quot;)/);
  });

  test("has each of its colours twice, for light and for dark", () => {
    const [light = "", dark = ""] = svg.split("@media (prefers-color-scheme: dark)");
    const coloured = (css: string) => {
      return [...css.matchAll(/^ +([\w., ]+) \{[^}]*(?:fill|stroke): #/gm)].map(
        ([, name]) => name!,
      );
    };
    expect(coloured(light).length).toBeGreaterThan(5);
    expect(coloured(dark).toSorted()).toEqual(coloured(light).toSorted());
  });
});

/** The words of a command line as systemd splits it: by spaces, but not within quotes. */
function wordsOf(line: string): string[] {
  return [...line.matchAll(/'([^']*)'|\S+/g)].map(([word, quoted]) => quoted ?? word);
}

/** The files of systemd's units in examples/, and the commands that they start. */
const UNITS = readdirSync(join(REPOSITORY, "examples"))
  .filter((name) => name.endsWith(".service"))
  .map((name) => {
    const text = readFileSync(join(REPOSITORY, "examples", name), "utf8");
    const joined = text.replaceAll(/\\\n\s*/g, "");
    const commands = [...joined.matchAll(/^Exec\w+=(.*)$/gm)].map(([, line]) => line!);
    return { name, text, commands };
  });

describe("systemd's units", () => {
  const unit = (name: string) => UNITS.find((one) => one.name === name)!;
  /** The arguments of the command that a unit starts, its paths replaced. */
  const argumentsOf = (name: string, paths: Record<string, string>): string[] => {
    return wordsOf(unit(name).commands[0]!)
      .slice(2)
      .map((word) => paths[word] ?? word);
  };

  test("start commands that there are, with options that there are", () => {
    expect(UNITS.length).toBe(3);
    for (const { name, commands } of UNITS) {
      expect([name, commands.length]).toEqual([name, 1]);
      // systemd would replace these.
      expect([name, commands[0]]).toEqual([name, expect.not.stringMatching(/[%$"]/)]);
      const [bun, script, command = "", ...options] = wordsOf(commands[0]!);
      expect([name, bun, script]).toEqual([name, "/usr/local/bin/bun", "/opt/ota/ota.ts"]);
      const flags = options.filter((word) => word.startsWith("--"));
      const known = optionsOf.get(command);
      expect([name, known && flags.filter((flag) => !known.has(flag))]).toEqual([name, []]);
    }
  });

  test("name units that are there, and README shows lines of theirs", () => {
    const text = UNITS.map((one) => one.text).join("");
    const named = new Set(text.match(/\bota-\w+(?=\.service)/g));
    expect([...named].toSorted()).toEqual(["ota-device", "ota-recovery", "ota-server"]);
    const shown = BLOCKS.filter(({ language }) => language === "ini");
    expect(shown.length).toBe(2);
    for (const block of shown) {
      const lines = block.text.trimEnd().split("\n");
      const whole = UNITS.find((one) => lines.every((line) => one.text.split("\n").includes(line)));
      expect([lines, whole?.name]).toEqual([lines, expect.any(String)]);
    }
  });

  test("serve, recover and update", async () => {
    using temp = new Temp();
    layTree(temp.at("releases"), { "1.0.0/flash/a.py": "1\n", "1.0.1/flash/a.py": "2\n" });
    layTree(temp.at("meter"), {
      "flash/a.py": "1\n",
      "flash/OTA_VERSION.py": "VERSION = '1.0.0'\n",
    });
    const paths = {
      "/srv/releases": temp.at("releases"),
      "/var/lib/ota-server/fleet.db": temp.at("fleet.db"),
      "/srv/meter": temp.at("meter"),
    };
    const where = ["--port", "0", "--host", "127.0.0.1"];
    await using server = new Tool([...argumentsOf("ota-server.service", paths), ...where]);
    const [, url = ""] = await server.until(/ at (http:\S+)\n/);
    // It was made just now, and counts once it has been quiet for a second.
    await server.until(/^(now|version) .*1\.0\.1/m);

    const recovered = await ota(argumentsOf("ota-recovery.service", paths));
    expect([recovered.code, recovered.stdout]).toEqual([0, expect.stringContaining("1.0.0")]);

    // In systemctl's place, one that writes down what it is asked; the check does not wait.
    const bin = {
      systemctl: 'echo "$*" >>"$LOG"; test "$1" = restart || cat "$STATE"',
      sleep: ":",
    };
    mkdirSync(temp.at("bin"));
    for (const [name, script] of Object.entries(bin)) {
      writeFileSync(temp.at("bin", name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    }
    const started = (state: string) => {
      writeFileSync(temp.at("state"), `${state}\n`);
      writeFileSync(temp.at("log"), "");
      const env = {
        PATH: `${temp.at("bin")}:${process.env.PATH}`,
        LOG: temp.at("log"),
        STATE: temp.at("state"),
      };
      const device = { ...paths, "http://192.168.4.1:8000": url };
      return new Tool(argumentsOf("ota-device.service", device), { env });
    };
    const asked = () => readFileSync(temp.at("log"), "utf8").trimEnd().split("\n");
    const isMeterUp = "is-active --quiet meter";
    {
      await using device = started("active");
      expect((await device.until(/^.+\n/))[0]).toBe("updated 1.0.0 -> 1.0.1\n");
      expect(asked()).toEqual(["is-active ota-recovery", "restart meter", isMeterUp]);
    }
    {
      // At boot, where the application waits for the recovery: no restart, which would hang.
      layTree(temp.at("releases"), { "1.0.2/flash/a.py": "3\n" });
      await server.until(/^now .*1\.0\.2/m);
      await using device = started("activating");
      expect((await device.until(/^.+\n/))[0]).toBe("updated 1.0.1 -> 1.0.2\n");
      expect(asked()).toEqual(["is-active ota-recovery", isMeterUp]);
    }
  });
});
