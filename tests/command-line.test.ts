/** The command line: help, hints, and what it refuses before it does anything. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { OTAError, poll, TOOL_VERSION, TransferError } from "../ota.ts";
import { Double, send } from "./helpers/double.ts";
import { certify, openssl } from "./helpers/pki.ts";
import { layTree, Temp, type Tree } from "./helpers/temp.ts";
import { ota, run, Tool, type ToolOptions } from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

setDefaultTimeout(600_000);

/** Every option of every command. */
const COMMANDS: Record<string, string[]> = {
  serve: [
    ...[
      "root",
      "port",
      "host",
      "url",
      "ignore",
      "latest",
      "only-releases",
      "sign",
      "token",
      "tls-cert",
      "tls-key",
      "trust-proxy",
      "fleet",
      "no-fleet",
      "silent",
      "admin-token",
      "staged",
      "notify",
    ],
  ],
  fleet: [...["root", "fleet", "json", "state", "version", "model", "label", "csv"]],
  rollout: [
    ...["root", "fleet", "json", "model", "first", "soak", "silent", "tolerance", "pause-at"],
    ...["only", "window", "dry-run", "yes"],
  ],
  client: [
    ...["ver", "root", "server", "from", "id", "every", "jobs", "timeout", "check"],
    ...["check-timeout", "restart", "check-files", "repair", "retry", "verify"],
    ...["threshold", "model", "token", "ca"],
  ],
  rollback: ["root", "restart", "force"],
  status: ["root", "json", "check"],
  manifest: ["ver", "model", "root", "url", "ignore", "latest", "cost"],
  sign: ["key", "root", "ver", "firmware", "model", "expires", "ignore", "check"],
  keygen: ["out"],
};

/** Runs command lines one after the other in one process, and tells how each ended. */
async function many(lines: readonly string[][], options: ToolOptions) {
  const script = join(import.meta.dir, "helpers/many.ts");
  const { code, stdout, stderr } = await ota([JSON.stringify(lines)], { ...options, script });
  const parts = stderr.split("\0");
  if (code !== 0 || parts.length !== 2 * lines.length + 1) throw new Error(stderr);
  const ends = lines.map((args, i) => {
    return { args, code: Number(parts[2 * i + 1]), stderr: parts[2 * i]! };
  });
  return { ends, stdout };
}

/**
 * Runs command lines that must be refused, in one process that can leave nothing behind: what it
 * refuses, it refuses before it does anything.
 *
 * @returns what each said on stderr
 */
async function refused(...lines: string[][]): Promise<string[]> {
  using temp = new Temp();
  const { ends, stdout } = await many(lines, { cwd: temp.path });
  expect(stdout).toBe("");
  for (const { args, code, stderr } of ends) {
    expect({ args, code, stderr }).toEqual({
      args,
      code: 2,
      stderr: expect.stringMatching(ONE_LINE),
    });
  }
  expect(readdirSync(temp.path)).toEqual([]);
  return ends.map(({ stderr }) => stderr);
}

const ONE_LINE = /^ota\.ts: .*\n$/;

describe.concurrent("--help", () => {
  test("of the tool names every command", async () => {
    const found = await Promise.all([["--help"], ["-h"], ["help"]].map(run));
    for (const { code, stdout, stderr } of found) {
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
      const listed = [...stdout.matchAll(/^  (\w+) {2,}\S/gm)].map(([, name]) => name);
      expect(listed).toEqual(Object.keys(COMMANDS));
      expect(stdout).toContain("bun ota.ts COMMAND --help");
    }
  });

  for (const [name, options] of Object.entries(COMMANDS)) {
    test(`of ${name} lists every option`, async () => {
      const found = await Promise.all(
        [
          [name, "--help"],
          ["help", name],
        ].map(run),
      );
      for (const { code, stdout, stderr } of found) {
        expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
        expect(stdout).toStartWith(`bun ota.ts ${name}: `);
        const listed = [...stdout.matchAll(/^  --([a-z-]+)( [A-Z=]+)? +\S/gm)].map(([, o]) => o);
        expect(listed.toSorted()).toEqual([...options, "help"].sort());
        for (const line of stdout.split("\n")) expect(line.length).toBeLessThanOrEqual(100);
      }
    });
  }

  test("of a command of a command has its own options", async () => {
    const found = await Promise.all(
      [
        ["fleet", "list", "--help"],
        ["fleet", "--help", "list"],
        ["help", "fleet", "list"],
      ].map(run),
    );
    for (const { code, stdout } of found) {
      expect([code, stdout]).toEqual([0, expect.stringMatching(/^bun ota\.ts fleet list: /)]);
      expect(stdout).toContain("--state S");
    }
    const { stdout } = await run(["fleet", "forget", "--help"]);
    expect(stdout).toStartWith("bun ota.ts fleet forget ID: ");
    expect(stdout).not.toContain("--state");
    const all = (await run(["fleet", "--help"])).stdout;
    for (const name of ["list", "show ID", "name ID TEXT", "label ID K=V...", "forget ID"]) {
      expect(all).toContain(`\n  fleet ${name} `);
    }
    expect(all).toContain("\n  fleet merge FILE ");
  });

  test("of client says what the exit codes mean", async () => {
    const { stdout } = await run(["client", "--help"]);
    for (const code of [0, 1, 2, 3]) expect(stdout).toMatch(new RegExp(`\\b${code} \\w+`));
  });

  test("wins over whatever else is there, and does nothing", async () => {
    using temp = new Temp();
    const args = ["client", "--root", temp.at("device"), "--help"];
    const { code, stdout } = await run(args);
    expect(code).toBe(0);
    expect(stdout).toContain("--check-timeout");
    expect(existsSync(temp.at("device"))).toBe(false);
  });

  test("is what one gets, on stderr, for nothing", async () => {
    const { code, stdout, stderr } = await ota([]);
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toContain("Usage: bun ota.ts COMMAND");
  });
});

test("--version, of the tool and of every command", async () => {
  const all = [["--version"], ...Object.keys(COMMANDS).map((name) => [name, "--version"])];
  const found = await Promise.all(all.map(run));
  for (const { code, stdout, stderr } of found) {
    expect({ code, stdout, stderr }).toEqual({
      ...{ code: 0, stdout: `ota.ts ${TOOL_VERSION}\n`, stderr: "" },
    });
  }
});

describe.concurrent("what is not understood", () => {
  test("a command: the nearest one is named", async () => {
    const meant = { sever: "serve", cleint: "client", state: "status", rolback: "rollback" };
    const near = await refused(...Object.keys(meant).map((typed) => [typed]));
    Object.entries(meant).forEach(([typed, command], i) => {
      expect(near[i]).toContain(`no command ${typed}; did you mean ${command}?`);
    });
    const far = ["frobnicate", "constructor", "toString", "__proto__"];
    const said = await refused(...far.map((typed) => [typed]));
    expect(said).toEqual(far.map((typed) => `ota.ts: no command ${typed}; see --help\n`));
  });

  test("a command of a command", async () => {
    const [near, far, elsewhere, missing, extra, half] = await refused(
      ["fleet", "lst"],
      ["fleet", "--root", "x", "constructor"],
      ["fleet", "--state", "silent"],
      ["fleet", "name", "a"],
      ["fleet", "show", "a", "b"],
      ["fleet", "label", "a"],
    );
    expect(near).toContain("fleet has no command lst; did you mean list?; see fleet --help");
    expect(far).toContain("fleet has no command constructor; see fleet --help");
    expect(elsewhere).toContain("fleet has no option --state, but fleet list has");
    expect(missing).toContain("fleet name needs TEXT: fleet name ID TEXT");
    expect(extra).toContain("fleet show takes ID (quoted, if there are spaces), and no b;");
    expect(half).toContain("fleet label needs K=V: fleet label ID K=V...");
  });

  test("what a fleet's commands expect", async () => {
    const [state, label, both, forms, label2, ...urls] = await refused(
      ["fleet", "list", "--state", "silnt"],
      ["fleet", "list", "--label", "site"],
      ["fleet", "--root", ".", "--fleet", "x.db"],
      ["fleet", "list", "--json", "--csv"],
      ["fleet", "label", "a", "=x"],
      ["fleet", "--fleet", "mysql://me:secret@host/x"],
      ["fleet", "--fleet", "postgres://me:sec/ret@host/x"],
      ["fleet", "--fleet", "postgres:/me:secret@host/x"],
      ["serve", "--fleet", "postgres://me:secret@host:nowhere/x"],
    );
    expect(state).toContain("expects one of current, behind, offered, silent, failed, found silnt");
    expect(state).toContain("did you mean silent?");
    expect(label).toContain("a label is K=V, found site");
    expect(both).toContain("--fleet and --root exclude each other");
    expect(forms).toContain("--json and --csv exclude each other");
    expect(label2).toContain("a label is K=V, found =x");
    for (const url of urls) {
      expect(url).toContain("--fleet expects");
      expect(url).not.toMatch(/secret|sec\/ret/);
    }
  });

  test("an option: the nearest one is named", async () => {
    const near = [
      ["client", "--rot", "--root"],
      ["client", "--sever", "--server"],
      ["client", "--chekc", "--check"],
      ["serve", "--pot", "--port"],
      ["status", "--jsn", "--json"],
      ["rollback", "--froce", "--force"],
    ] as const;
    const said = await refused(...near.map(([command, typed]) => [command, typed, "x"]));
    near.forEach(([command, typed, meant], i) => {
      expect(said[i]).toContain(`${command} has no option ${typed}; did you mean ${meant}?`);
    });
    const far = ["--frobnicate", "--constructor", "--toString", "--__proto__=1"];
    expect(await refused(...far.map((typed) => ["client", typed]))).toEqual(
      far.map((typed) => `ota.ts: client has no option ${typed.split("=")[0]}\n`),
    );
  });

  test("an option of another command", async () => {
    const said = await refused(
      ["client", "--port", "8000"],
      ["serve", "--repair"],
      ["status", "--ver", "1.0.0"],
    );
    ["--port", "--repair", "--ver"].forEach((option, i) => {
      expect(said[i]).toContain(`no option ${option}`);
    });
  });

  test("an argument that is no option", async () => {
    const [client, status] = await refused(["client", "1.0.0"], ["status", "device"]);
    expect(client).toContain("client takes no argument 1.0.0");
    expect(status).toContain("status takes no argument device");
  });

  test("a value that is missing, for every option that needs one", async () => {
    const flags = new Set([
      "repair",
      "retry",
      "force",
      "json",
      "csv",
      "cost",
      "only-releases",
      "no-fleet",
      "check-files",
      "staged",
      "dry-run",
      "yes",
    ]);
    const isFlag = (command: string, name: string) =>
      flags.has(name) || (command === "status" && name === "check");
    const all = Object.entries(COMMANDS).flatMap(([command, options]) => {
      const named = options.filter((name) => !isFlag(command, name));
      return named.map((name) => [command, name] as const);
    });
    // Of their commands, these have all their options.
    const whole: Record<string, string> = { fleet: "list", rollout: "start" };
    const words = (command: string) => [command, whole[command] ?? []].flat();
    for (const end of ["", "="]) {
      const said = await refused(
        ...all.map(([command, name]) => [...words(command), `--${name}${end}`]),
      );
      all.forEach(([, name], i) => expect(said[i]).toContain(`--${name} needs a value`));
    }
  });

  test("a value for an option that takes none", async () => {
    const [repair, json] = await refused(["client", "--repair=yes"], ["status", "--json=1"]);
    expect(repair).toContain("--repair takes no value");
    expect(json).toContain("--json takes no value");
  });

  test("numbers", async () => {
    for (const [command, name, values] of [
      ["serve", "port", ["x", "-1", "65536", "80.5", "1e3", "0x50", " 80"]],
      ["client", "jobs", ["0", "65", "four", "1.5"]],
      ["client", "timeout", ["0", "3601", "1s"]],
      ["client", "check-timeout", ["0", "86401", "soon"]],
    ] as const) {
      const said = await refused(...values.map((value) => [command, `--${name}=${value}`]));
      values.forEach((value, i) => {
        expect(said[i]).toMatch(new RegExp(`--${name} expects a whole number from \\d+ to \\d+`));
        expect(said[i]).toContain(value);
      });
    }
  });

  test("durations", async () => {
    const values = ["0", "0s", "10x", "m", "-5s", "1.5h", "1h30m", "ten"];
    const said = await refused(...values.map((value) => ["client", `--every=${value}`]));
    const expected = "--every expects a duration such as 30s, 10m or 1h, found ";
    values.forEach((value, i) => expect(said[i]).toContain(expected + value));
  });

  test("a release name", async () => {
    const values = ["../1.0.0", "latest", "1.0.0'", "1.0.0.bak"];
    const said = await refused(...values.map((value) => ["client", "--ver", value]));
    values.forEach((value, i) => {
      expect(said[i]).toContain("--ver expects a release name");
      expect(said[i]).toContain(value);
    });
  });

  test("a release name for --latest, before the root is looked at", async () => {
    const values = ["banana", "../1.0.0", "1.0.0.bak", "=1.0.0"];
    for (const command of ["serve", "manifest"]) {
      const said = await refused(
        ...values.map((value) => [command, "--root", "nowhere", `--latest=${value}`]),
      );
      values.forEach((value, i) => {
        expect(said[i]).toContain("--latest expects a release name");
        expect(said[i]).toContain(`found ${value}`);
      });
    }
  });

  test("a certificate and its key", async () => {
    using temp = new Temp();
    layTree(temp.at("releases"), { "1.0.0/main.py": "" });
    const one = certify(temp.path, "IP:127.0.0.1");
    temp.write({ "text.pem": "no certificate\n" });
    const text = temp.at("text.pem");
    const locked = temp.at("locked.key");
    openssl(["pkey", "-in", one.key, "-aes256", "-passout", "pass:secret", "-out", locked]);
    const pem = readFileSync(one.cert, "utf8");
    const damaged = temp.at("damaged.pem");
    writeFileSync(damaged, pem.replace(/(?<=BEGIN CERTIFICATE-----\n.{20}).{4}/, "????"));
    const badChain = temp.at("bad-chain.pem");
    writeFileSync(badChain, pem + readFileSync(damaged, "utf8"));
    const lateOwn = temp.at("late-own.pem");
    writeFileSync(lateOwn, readFileSync(one.ca, "utf8") + pem);
    const pairs = [
      [text, one.key, `cannot use ${text}: expected a certificate in PEM, found none`],
      [one.key, one.key, `cannot use ${one.key}: expected a certificate in PEM, found none`],
      [damaged, one.key, `cannot use ${damaged}: expected a certificate in PEM, found a damaged`],
      [badChain, one.key, `cannot use ${badChain}: expected a certificate in PEM, found a damaged`],
      [one.cert, text, `cannot use ${text}: expected a private key in PEM, found none`],
      [one.cert, one.cert, `cannot use ${one.cert}: expected a private key in PEM, found none`],
      [
        one.cert,
        locked,
        `cannot use ${locked}: expected a private key in PEM, found one with a pa`,
      ],
      [one.cert, temp.at("ca.key"), `${temp.at("ca.key")} is not the key of ${one.cert}`],
      [lateOwn, one.key, `${one.key} is not the key of ${lateOwn}`],
      [temp.at("none"), one.key, `cannot read ${temp.at("none")}: ENOENT`],
      [one.cert, temp.path, `cannot read ${temp.path}: EISDIR`],
    ] as const;
    const root = ["--root", temp.at("releases"), "--port", "0", "--host", "127.0.0.1"];
    const serving = await refused(
      ...pairs.map(([cert, key]) => ["serve", ...root, "--tls-cert", cert, "--tls-key", key]),
    );
    pairs.forEach(([, , expected], i) => expect(serving[i]).toContain(expected));
    const authorities = [text, damaged, badChain, one.key, temp.at("none"), temp.path];
    const server = ["--server", "https://127.0.0.1:1", "--root", "device"];
    const asking = await refused(...authorities.map((ca) => ["client", ...server, "--ca", ca]));
    authorities.forEach((ca, i) => expect(asking[i]).toContain(ca));
  });

  test("an address of a server", async () => {
    const values = ["127.0.0.1:8000", "ftp://host", "http://", "file:///etc"];
    const said = await refused(...values.map((value) => ["client", "--server", value]));
    values.forEach((value, i) => {
      expect(said[i]).toContain("expected an http(s) address of a server");
      expect(said[i]).toContain(value);
    });
  });

  test("a root of releases that is not there", async () => {
    const commands = ["serve", "manifest"];
    for (const text of await refused(
      ...commands.map((command) => [command, "--root", "nowhere"]),
    )) {
      expect(text).toContain("nowhere does not exist");
      expect(text).toContain("--root");
    }
  });
});

describe.concurrent("a device that is not there", () => {
  for (const command of ["status", "rollback"]) {
    test(`${command} says so`, async () => {
      using temp = new Temp();
      const { code, stdout, stderr } = await run([command, "--root", temp.at("typo")]);
      expect({ code, stdout, stderr }).toEqual({
        ...{ code: 1, stdout: "" },
        stderr: `ota.ts: cannot use ${temp.at("typo")} as a device's root: nothing is there; see --root\n`,
      });
      expect(readdirSync(temp.path)).toEqual([]);
    });
  }

  test("status of a directory that never was a device tells what it can", async () => {
    using temp = new Temp();
    const { code, stdout } = await run(["status", "--root", temp.path]);
    expect(code).toBe(0);
    expect(stdout).toStartWith("version:          none\n");
    expect(readdirSync(temp.path)).toEqual([]);
  });
});

/** Ways in which a process's output can be lost; each is a script for what goes before a command. */
const LOST: Record<string, (fd: 1 | 2, temp: Temp) => string> = {
  "closed from the start": (fd) => `exec "$@" ${fd}>&-`,
  "on a full disk": (fd) => `exec "$@" ${fd}>/dev/full`,
  // The reader has gone before the command begins.
  "read by nobody": (fd, temp) =>
    `rm -f ${temp.at("pipe")}; mkfifo ${temp.at("pipe")}; exec 8<>${temp.at("pipe")} 9>${temp.at("pipe")} 8<&-; ` +
    `exec "$@" ${fd}>&9 9>&-`,
};

describe.concurrent("what cannot be printed", () => {
  const RELEASES: Tree = { "1.0.0/main.py": "one\n", "1.0.1/main.py": "two\n" };
  const LINES = 40_000;

  /** A release root and a device on 1.0.0. */
  async function prepare(temp: Temp): Promise<Served> {
    layTree(temp.at("releases"), RELEASES);
    layTree(temp.at("device"), { "main.py": "one\n" });
    return Served.start(temp.at("releases"));
  }

  for (const [how, script] of Object.entries(LOST)) {
    /** Runs a command with one of its outputs lost. */
    const losing = (args: string[], fd: 1 | 2, temp: Temp) =>
      ota(args, { cwd: temp.path, prefix: ["sh", "-c", script(fd, temp), "sh"] });
    const isFull = how === "on a full disk";

    test(`stdout ${how}: a client's exit code is of the update`, async () => {
      using temp = new Temp();
      await using server = await prepare(temp);
      const client = ["client", "--root", "device", "--server", server.url, "--ver", "1.0.0"];
      for (const [args, code, content] of [
        [[...client, "--check", "false"], 3, "one\n"],
        [client, 3, "one\n"],
        [[...client, "--retry"], 0, "two\n"],
        [client, 0, "two\n"],
        [["rollback", "--root", "device"], 0, "one\n"],
      ] as const) {
        const ended = await losing([...args], 1, temp);
        const { stdout, stderr } = ended;
        const isTold = /^ota\.ts: cannot write to stdout: ENOSPC[^\n]*\n$/m.test(stderr);
        const found = { args, code: ended.code, stdout, isTold };
        expect(found).toEqual({ args, code, stdout: "", isTold: isFull });
        expect(stderr).not.toMatch(/^ +at /m);
        expect(readFileSync(temp.at("device/main.py"), "utf8")).toBe(content);
      }
    });

    test(`stdout ${how}: what does nothing but print fails only where that was wanted`, async () => {
      using temp = new Temp();
      await using _ = await prepare(temp);
      const printing = [
        ["--help"],
        ["client", "--help"],
        ["--version"],
        ["manifest", "--root", "releases"],
        ["manifest", "--root", "releases", "--cost"],
        ["status", "--root", "device"],
        ["status", "--root", "device", "--json"],
      ];
      const lost = { cwd: temp.path, prefix: ["sh", "-c", script(1, temp), "sh"] };
      const { ends, stdout } = await many([...printing, ["keygen", "--out", "fleet"]], lost);
      expect(stdout).toBe("");
      const keygen = ends.pop()!;
      for (const { args, code, stderr } of ends) {
        expect({ args, code }).toEqual({ args, code: isFull ? 1 : 0 });
        if (isFull) expect(stderr).toMatch(/^ota\.ts: cannot write to stdout: ENOSPC[^\n]*\n$/);
        else expect(stderr).toBe("");
      }
      // Of a process it is the exit code, too.
      expect((await losing(["--version"], 1, temp)).code).toBe(isFull ? 1 : 0);
      expect(keygen.code).toBe(0);
      expect(existsSync(temp.at("fleet.key"))).toBe(true);
    });

    test(`stderr ${how}: it is as if it were not`, async () => {
      using temp = new Temp();
      await using server = await prepare(temp);
      const client = ["client", "--root", "device", "--server", server.url, "--ver", "1.0.0"];
      for (const [args, code, stdout] of [
        [[], 2, ""],
        [["bogus"], 2, ""],
        [["status", "--root", "typo"], 1, ""],
        [client, 0, "updated 1.0.0 -> 1.0.1\n"],
        [client, 0, "up to date 1.0.1\n"],
        [["rollback", "--root", "device"], 0, "rolled back 1.0.1 -> 1.0.0\n"],
      ] as const) {
        const ended = await losing([...args], 2, temp);
        expect({ args, code: ended.code, stdout: ended.stdout, stderr: ended.stderr }).toEqual({
          ...{ args, code, stdout, stderr: "" },
        });
      }
    });

    test(`stderr ${how}: serve serves, whatever it has to warn of`, async () => {
      using temp = new Temp();
      // The order of these surprises, and it warns of that.
      layTree(temp.at("releases"), { "v1.0.0/main.py": "one\n", "1.0.1/main.py": "two\n" });
      const args = ["serve", "--root", "releases", "--port", "0", "--host", "127.0.0.1"];
      const options = { cwd: temp.path, prefix: ["sh", "-c", script(2, temp), "sh"] };
      await using tool = new Tool(args, options);
      const [, url] = await tool.until(/ at (http:\S+)\n[^]*^try .*\n/m);
      expect((await fetch(`${url}/1.0.1/main.py`)).status).toBe(200);
      tool.kill("SIGTERM");
      expect((await tool.ended).code).toBe(0);
    });
  }

  test("a reader that stops half way, as `head` does, is no failure", async () => {
    using temp = new Temp();
    const files = Array.from({ length: LINES / 40 }, (_, i) => [`1.0.0/file${i}.py`, `${i}`]);
    layTree(temp.at("releases"), Object.fromEntries(files));
    // More than a pipe holds; the exit code goes to stderr, since the pipeline's is the reader's.
    const script = '{ "$@"; echo "code $?" >&2; } | head -n 1';
    const args = ["manifest", "--root", "releases"];
    const prefix = ["sh", "-c", script, "sh"];
    const { stdout, stderr } = await ota(args, { cwd: temp.path, prefix });
    expect({ stdout, stderr }).toEqual({ stdout: "{\n", stderr: "code 0\n" });
  });
});

describe("poll", () => {
  /** Runs it with tasks that end as told, and without waiting; returns what it would have waited. */
  async function waits(ends: readonly (Error | "good")[], pause: number): Promise<number[]> {
    const stop = new AbortController();
    const waited: number[] = [];
    const failures: unknown[] = [];
    let runs = 0;
    const task = async () => {
      const end = ends[runs++]!;
      if (end !== "good") throw end;
    };
    const sleep = async (seconds: number, signal: AbortSignal) => {
      waited.push(seconds);
      if (waited.length < ends.length) return;
      stop.abort(new OTAError("stopped"));
      signal.throwIfAborted();
    };
    const failed = (error: unknown) => void failures.push(error);
    await poll(task, { pause, signal: stop.signal, failed, sleep });
    expect(failures).toEqual(ends.filter((end) => end !== "good"));
    return waited;
  }

  const lost = new TransferError("cannot reach it", true);
  const full = Object.assign(new Error("ENOSPC: no space left"), { code: "ENOSPC" });

  test("waits about the interval, four times as long at most, and the interval again", async () => {
    const ends = ["good", lost, full, lost, lost, lost, "good", "good", lost] as const;
    for (let round = 0; round < 200; round++) {
      const found = await waits(ends, 10);
      const [low, high] = [
        [9, 16, 32, 32, 32, 32, 9, 9, 16],
        [11, 20, 40, 40, 40, 40, 11, 11, 20],
      ] as const;
      found.forEach((seconds, i) => {
        expect(seconds).toBeGreaterThanOrEqual(low[i]!);
        expect(seconds).toBeLessThanOrEqual(high[i]!);
      });
      // Not all devices at once.
      expect(new Set(found).size).toBe(found.length);
    }
  });

  test("waits an hour at most, unless the interval is longer", async () => {
    const many = Array.from({ length: 20 }, () => lost);
    expect(Math.max(...(await waits(many, 1700)))).toBeLessThanOrEqual(3600);
    expect(Math.max(...(await waits(many, 1700)))).toBeGreaterThan(2880 - 1);
    const day = await waits(many, 86_400);
    expect(Math.min(...day)).toBeGreaterThanOrEqual(0.9 * 86_400);
    expect(Math.max(...day)).toBeLessThanOrEqual(1.1 * 86_400);
  });

  test("what time does not mend ends it: a bug, wrong usage", async () => {
    const mistake = Object.assign(new TypeError("expected a string"), {
      code: "ERR_INVALID_ARG_TYPE",
    });
    for (const error of [
      ...[new TypeError("undefined is not a function"), new RangeError("x"), new Error("a bug")],
      ...[mistake, new OTAError("usage", 2)],
    ]) {
      await expect(waits(["good", lost, error, "good"], 10)).rejects.toBe(error);
    }
  });

  test("what fails because it was stopped is no failure", async () => {
    const stop = new AbortController();
    const failed = () => expect.unreachable();
    const task = async () => {
      stop.abort(new OTAError("stopped"));
      throw new TypeError("cut off");
    };
    await poll(task, { pause: 1, signal: stop.signal, failed });
  });

  test("on the command line a bug shows with its stack, and ends the process", async () => {
    using temp = new Temp();
    const bug = temp.at("bug.ts");
    writeFileSync(
      bug,
      `const broken = async () => ({ get status() { throw new TypeError("here is a bug"); } });
      globalThis.fetch = broken as unknown as typeof fetch;`,
    );
    await using server = await Double.start((_, connection) => send(connection, "null"));
    const args = ["client", "--root", temp.at("device"), "--server", server.url, "--every", "1h"];
    const { code, stdout, stderr } = await ota(args, { env: { BUN_OPTIONS: `--preload=${bug}` } });
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain("TypeError: here is a bug");
    expect(stderr).toMatch(/^ +at .*ota\.ts:\d+/m);
  });
});
