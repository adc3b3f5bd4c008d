/** The command line: help, hints, and what it refuses before it does anything. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync } from "node:fs";
import { TOOL_VERSION } from "../ota.ts";
import { ota, Temp, type Ended } from "./helpers/tool.ts";

setDefaultTimeout(30_000);

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
      "sign",
      "token",
      "tls-cert",
      "tls-key",
      "trust-proxy",
    ],
  ],
  client: [
    ...["ver", "root", "server", "from", "id", "every", "jobs", "timeout", "check"],
    ...["check-timeout", "restart", "repair", "retry", "verify", "token", "ca"],
  ],
  rollback: ["root", "restart", "force"],
  status: ["root", "json"],
  manifest: ["ver", "root", "url", "ignore", "latest", "cost"],
  keygen: ["out"],
};

/** Runs it where it can leave nothing behind: what it refuses, it refuses before it does anything. */
async function refused(...args: string[]): Promise<Ended> {
  using temp = new Temp();
  const ended = await ota(args, { cwd: temp.path });
  expect({ args, code: ended.code, stdout: ended.stdout }).toEqual({ args, code: 2, stdout: "" });
  expect(ended.stderr).toStartWith("ota.ts: ");
  expect(ended.stderr.trimEnd().split("\n")).toHaveLength(1);
  expect(readdirSync(temp.path)).toEqual([]);
  return ended;
}

describe.concurrent("--help", () => {
  test("of the tool names every command", async () => {
    const found = await Promise.all([["--help"], ["-h"], ["help"]].map((args) => ota(args)));
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
        ].map((args) => ota(args)),
      );
      for (const { code, stdout, stderr } of found) {
        expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
        expect(stdout).toStartWith(`bun ota.ts ${name}: `);
        const listed = [...stdout.matchAll(/^  --([a-z-]+)( [A-Z]+)? +\S/gm)].map(([, o]) => o);
        expect(listed.toSorted()).toEqual([...options, "help"].sort());
        for (const line of stdout.split("\n")) expect(line.length).toBeLessThanOrEqual(100);
      }
    });
  }

  test("of client says what the exit codes mean", async () => {
    const { stdout } = await ota(["client", "--help"]);
    for (const code of [0, 1, 2, 3]) expect(stdout).toMatch(new RegExp(`\\b${code} \\w+`));
  });

  test("wins over whatever else is there, and does nothing", async () => {
    using temp = new Temp();
    const args = ["client", "--root", temp.at("device"), "--help"];
    const { code, stdout } = await ota(args);
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
  const found = await Promise.all(all.map((args) => ota(args)));
  for (const { code, stdout, stderr } of found) {
    expect({ code, stdout, stderr }).toEqual({
      ...{ code: 0, stdout: `ota.ts ${TOOL_VERSION}\n`, stderr: "" },
    });
  }
});

describe.concurrent("what is not understood", () => {
  test("a command: the nearest one is named", async () => {
    for (const [typed, meant] of [
      ["sever", "serve"],
      ["cleint", "client"],
      ["state", "status"],
      ["rolback", "rollback"],
    ] as const) {
      const { stderr } = await refused(typed);
      expect(stderr).toContain(`no command ${typed}; did you mean ${meant}?`);
    }
    for (const typed of ["frobnicate", "constructor", "toString", "__proto__"]) {
      const { stderr } = await refused(typed);
      expect(stderr).toBe(`ota.ts: no command ${typed}; see --help\n`);
    }
  });

  test("an option: the nearest one is named", async () => {
    for (const [command, typed, meant] of [
      ["client", "--rot", "--root"],
      ["client", "--sever", "--server"],
      ["client", "--chekc", "--check"],
      ["serve", "--pot", "--port"],
      ["status", "--jsn", "--json"],
      ["rollback", "--froce", "--force"],
    ] as const) {
      const { stderr } = await refused(command, typed, "x");
      expect(stderr).toContain(`${command} has no option ${typed}; did you mean ${meant}?`);
    }
    for (const typed of ["--frobnicate", "--constructor", "--toString", "--__proto__=1"]) {
      const { stderr } = await refused("client", typed);
      expect(stderr).toBe(`ota.ts: client has no option ${typed.split("=")[0]}\n`);
    }
  });

  test("an option of another command", async () => {
    expect((await refused("client", "--port", "8000")).stderr).toContain("no option --port");
    expect((await refused("serve", "--repair")).stderr).toContain("no option --repair");
    expect((await refused("status", "--ver", "1.0.0")).stderr).toContain("no option --ver");
  });

  test("an argument that is no option", async () => {
    const { stderr } = await refused("client", "1.0.0");
    expect(stderr).toContain("client takes no argument 1.0.0");
    expect((await refused("status", "device")).stderr).toContain("takes no argument device");
  });

  test("a value that is missing, for every option that needs one", async () => {
    const flags = new Set(["repair", "retry", "force", "json", "cost"]);
    const all = Object.entries(COMMANDS).flatMap(([command, options]) => {
      return options.filter((name) => !flags.has(name)).map((name) => [command, name] as const);
    });
    await Promise.all(
      all.map(async ([command, name]) => {
        for (const args of [[`--${name}`], [`--${name}=`]]) {
          expect((await refused(command, ...args)).stderr).toContain(`--${name} needs a value`);
        }
      }),
    );
  });

  test("a value for an option that takes none", async () => {
    const { stderr } = await refused("client", "--repair=yes");
    expect(stderr).toContain("--repair takes no value");
    expect((await refused("status", "--json=1")).stderr).toContain("--json takes no value");
  });

  test("numbers", async () => {
    for (const [command, name, values] of [
      ["serve", "port", ["x", "-1", "65536", "80.5", "1e3", "0x50", " 80"]],
      ["client", "jobs", ["0", "65", "four", "1.5"]],
      ["client", "timeout", ["0", "3601", "1s"]],
      ["client", "check-timeout", ["0", "86401", "soon"]],
    ] as const) {
      for (const value of values) {
        const { stderr } = await refused(command, `--${name}=${value}`);
        expect(stderr).toMatch(new RegExp(`--${name} expects a whole number from \\d+ to \\d+`));
        expect(stderr).toContain(value);
      }
    }
  });

  test("durations", async () => {
    for (const value of ["0", "0s", "10x", "m", "-5s", "1.5h", "1h30m", "ten"]) {
      const { stderr } = await refused("client", `--every=${value}`);
      expect(stderr).toContain(`--every expects a duration such as 30s, 10m or 1h, found ${value}`);
    }
  });

  test("a release name", async () => {
    for (const value of ["../1.0.0", "latest", "1.0.0'", "1.0.0.bak"]) {
      const { stderr } = await refused("client", "--ver", value);
      expect(stderr).toContain("--ver expects a release name");
      expect(stderr).toContain(value);
    }
  });

  test("an address of a server", async () => {
    for (const value of ["127.0.0.1:8000", "ftp://host", "http://", "file:///etc"]) {
      const { stderr } = await refused("client", "--server", value);
      expect(stderr).toContain("expected an http(s) address of a server");
      expect(stderr).toContain(value);
    }
  });

  test("a root of releases that is not there", async () => {
    for (const command of ["serve", "manifest"]) {
      const { stderr } = await refused(command, "--root", "nowhere");
      expect(stderr).toContain("nowhere does not exist");
      expect(stderr).toContain("--root");
    }
  });
});
