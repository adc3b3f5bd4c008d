/**
 * Whether a release stays: checks, restarts, what is remembered of a release that failed, and the
 * way back by hand. The command is a process of its own where it is killed.
 */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, existsSync, readFileSync, rmSync } from "node:fs";
import type { Socket } from "node:net";
import type { ServeOptions } from "../ota.ts";
import { Between } from "./helpers/between.ts";
import { Double, head, manifestOf, offering, send } from "./helpers/double.ts";
import { asTree, existing, layTree, type Tree } from "./helpers/temp.ts";
import { callsOf, eventually, injecting, ota, quoted, Tool, type Ran } from "./helpers/tool.ts";
import { World } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const V1: Tree = {
  "flash/main.py": "print('one')\n",
  "flash/old/only.py": "OLD = 1\n",
  "flash/turn": "a file\n",
  "sd/same": "same\n",
};
const V2: Tree = {
  "flash/main.py": "print('two')\n",
  "flash/new/er/mod.py": "NEW = 1\n",
  "flash/turn/ed.py": "a directory\n",
  "sd/same": "same\n",
};
const V3: Tree = { ...V2, "flash/main.py": "print('three')\n" };
const IMAGE_1 = Buffer.alloc(3000, 0xe9);
const IMAGE_2 = Buffer.alloc(3000, 0xea);
const own = (version: string): Tree => ({
  "flash/OTA_VERSION.py": `VERSION = '${version}'\n`,
});
const TREE_1 = asTree({ ...V1, ...own("1.0.0") });
const TREE_2 = asTree({ ...V2, ...own("1.0.1") });

let first: Device;
beforeAll(async () => {
  first = new Device({ "1.0.0": V1 }, { beside: { "firmware_1.0.0.bin": IMAGE_1 } });
  await first.provision("1.0.0");
  first.release("1.0.1", V2);
  layTree(first.releases, { "firmware_1.0.1.bin": IMAGE_2 });
});
afterAll(() => first[Symbol.dispose]());

/** A device that is on 1.0.0 with its firmware, by the updater's own record; 1.0.1 is out. */
class Device extends World {
  /** Where commands write what they do: `$LOG` in them. */
  readonly log = this.at("log");

  static async on1(options: ServeOptions = {}): Promise<Device> {
    const device = new Device();
    cpSync(first.path, device.path, { recursive: true });
    await device.serve(options);
    return device;
  }

  override args(args: readonly string[] = [], from: { url: string } = this): string[] {
    return super.args(this.#named(args), from);
  }

  override run(command: string, args: readonly string[] = []): Promise<Ran> {
    return super.run(command, this.#named(args));
  }

  #named(args: readonly string[]): string[] {
    return args.map((arg) => arg.replaceAll("$LOG", this.log));
  }

  /** The lines that commands wrote, which are forgotten. */
  logged(): string[] {
    const text = existing(() => readFileSync(this.log, "utf8"));
    rmSync(this.log, { force: true });
    return text?.trimEnd().split("\n") ?? [];
  }

  /** Whether all of release 1.0.0 is here, and the firmware and records say so. */
  async expectOn1(failed: string[] = []): Promise<void> {
    expect(this.tree()).toEqual(TREE_1);
    expect(await this.status()).toEqual({
      version: "1.0.0",
      previous_version: null,
      firmware: { version: "1.0.0", file: ".ota/ota_0.bin" },
      pending: false,
      failed,
    });
    expect(readFileSync(this.at("device/.ota/ota_0.bin"))).toEqual(IMAGE_1);
    expect(existsSync(this.at("device/.ota/ota_1.bin"))).toBe(false);
  }

  async expectOn2(more: Record<string, unknown> = {}): Promise<void> {
    expect(this.tree()).toEqual(TREE_2);
    expect(await this.status()).toEqual({
      version: "1.0.1",
      previous_version: "1.0.0",
      firmware: { version: "1.0.1", file: ".ota/ota_1.bin" },
      pending: false,
      failed: [],
      ...more,
    });
    expect(readFileSync(this.at("device/.ota/ota_0.bin"))).toEqual(IMAGE_1);
    expect(readFileSync(this.at("device/.ota/ota_1.bin"))).toEqual(IMAGE_2);
  }
}

/** Whether a process is there and is no zombie. */
function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}

describe.concurrent("--check", () => {
  test("runs in the root, of the new release, and is told both versions", async () => {
    await using device = await Device.on1();
    const check =
      'test -f flash/new/er/mod.py && pwd > "$LOG" && ' +
      'echo "$OTA_VERSION $OTA_PREVIOUS_VERSION" >> "$LOG" && echo said && echo told >&2';
    const { code, stdout, stderr } = await device.process(["--check", check]);
    expect({ code, stdout }).toEqual({
      code: 0,
      stdout: "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)\n",
    });
    expect(device.logged()).toEqual([device.root, "1.0.1 1.0.0"]);
    expect(stderr).toContain("said\n");
    expect(stderr).toContain("told\n");
    await device.expectOn2();
  });

  test("is given 0 as the previous version of a device that had none", async () => {
    await using device = await Device.on1({ latest: "1.0.0" });
    rmSync(device.root, { recursive: true });
    const check = 'echo "$OTA_VERSION $OTA_PREVIOUS_VERSION" >> "$LOG"';
    expect((await device.client(["--check", check])).code).toBe(0);
    expect(device.logged()).toEqual(["1.0.0 0"]);
  });

  test("that fails takes everything back: files, directories, firmware, records", async () => {
    await using device = await Device.on1();
    const { code, stdout, stderr } = await device.client(["--check", "exit 7"]);
    expect({ code, stdout }).toEqual({ code: 3, stdout: "rolled back 1.0.1 -> 1.0.0\n" });
    expect(stderr).toContain("1.0.1 is bad: its check ended with code 7");
    await device.expectOn1(["1.0.1"]);
  });

  test("that fails on a new device leaves it as empty as it was", async () => {
    await using device = await Device.on1();
    rmSync(device.root, { recursive: true });
    const { code, last } = await device.client(["--check", "false"]);
    expect({ code, last }).toEqual({ code: 3, last: "rolled back 1.0.1 -> 0" });
    expect(Object.keys(device.tree()).filter((path) => !path.endsWith("/"))).toEqual([]);
    expect(await device.status()).toMatchObject({ version: null, firmware: null });
  });

  test("that hangs is late, and its whole process group ends", async () => {
    await using device = await Device.on1();
    // A child, a child that is left behind, and one that ignores every polite signal.
    const check =
      "exec >/dev/null 2>&1; sleep 1000 & echo $! >> \"$LOG\"; (trap '' TERM INT HUP; " +
      'sleep 1000 & echo $! >> "$LOG"; wait) & echo $! >> "$LOG"; echo $$ >> "$LOG"; wait';
    // Time enough for all of them to begin, on a busy machine, too.
    const args = ["--check", check, "--check-timeout", "5"];
    const { code, last, stderr } = await device.client(args);
    expect({ code, last }).toEqual({ code: 3, last: "rolled back 1.0.1 -> 1.0.0" });
    expect(stderr).toContain("its check did not end within 5 s");
    const pids = device.logged().map(Number);
    expect(pids).toHaveLength(4);
    await eventually("all of the check is gone", () => !pids.some(isAlive));
    await device.expectOn1(["1.0.1"]);
  });

  test("is started three times, and a release that kills the device each time goes back", async () => {
    await using device = await Device.on1();
    const check = 'exec >/dev/null 2>&1; echo "$$" >> "$LOG"; exec sleep 1000';
    const checks: number[] = [];
    try {
      for (let start = 1; start <= 3; start++) {
        // Only the first says which check: the journal knows.
        const args = device.args(start === 1 ? ["--check", check] : []);
        await using tool = new Tool(args);
        await eventually("its id is written", () => {
          return existing(() => readFileSync(device.log, "utf8"))?.endsWith("\n") ?? false;
        });
        checks.push(...device.logged().map(Number));
        expect(checks).toHaveLength(start);
        tool.kill("SIGKILL");
        expect((await tool.ended).signal).toBe("SIGKILL");
        const state = JSON.parse(readFileSync(device.at("device/.ota/state.json"), "utf8"));
        expect(state.trial).toEqual({ starts: start });
        // Neither status nor time decides.
        await device.expectOn2({ pending: true });
      }
      device.server.lines.length = 0;
      const { code, last, stderr } = await device.client();
      expect({ code, last }).toEqual({ code: 3, last: "rolled back 1.0.1 -> 1.0.0" });
      expect(stderr).toContain("started 3 times and never ended");
      expect(device.logged()).toEqual([]);
      // It asks for nothing, and reports.
      expect(device.server.requests).toMatchObject([
        { method: "HEAD", path: "/manifest.json", failed: "1.0.1" },
      ]);
      await device.expectOn1(["1.0.1"]);
    } finally {
      for (const pid of checks) if (isAlive(pid)) process.kill(pid, "SIGKILL");
    }
  });

  test("of an earlier run is ended before anything is asked, by the check given now", async () => {
    await using device = await Device.on1();
    {
      // `$PPID` is the client.
      const args = ["--check", 'kill -KILL "$PPID"'];
      const { signal } = await device.process(args);
      expect(signal).toBe("SIGKILL");
    }
    await device.expectOn2({ pending: true });
    const { code, last } = await device.client(["--check", 'echo now > "$LOG"']);
    expect({ code, last }).toEqual({ code: 0, last: "up to date 1.0.1" });
    expect(device.logged()).toEqual(["now"]);
    await device.expectOn2();
  });

  test("that an interrupt ends leaves the release on trial, and says so", async () => {
    await using device = await Device.on1();
    const check = 'exec >/dev/null 2>&1; echo "$$" > "$LOG"; exec sleep 1000';
    await using tool = new Tool(device.args(["--check", check]));
    await eventually("its id is written", () => {
      return existing(() => readFileSync(device.log, "utf8"))?.endsWith("\n") ?? false;
    });
    const [pid = 0] = device.logged().map(Number);
    tool.kill("SIGINT");
    const { code, stdout, stderr } = await tool.ended;
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).not.toContain("the device is as it was");
    await eventually("the check is gone", () => !isAlive(pid));
    await device.expectOn2({ pending: true });
    expect((await device.client(["--check", "true"])).last).toBe("up to date 1.0.1");
    await device.expectOn2();
  });

  test("without it an update is confirmed at once", async () => {
    await using device = await Device.on1();
    expect((await device.client()).code).toBe(0);
    await device.expectOn2();
  });
});

describe.concurrent("a release that failed", () => {
  test("is not fetched again, wherever it comes from; --retry tries it", async () => {
    await using device = await Device.on1();
    expect((await device.client(["--check", "false"])).code).toBe(3);
    const first = device.server.requests.find(({ path }) => path === "/manifest.json");
    expect(first?.failed).toBeUndefined();
    // Another port is another address for everything in the manifest.
    await device.serve();
    for (const check of ["true", "false"]) {
      const { code, stdout } = await device.client(["--check", check]);
      expect(code).toBe(3);
      expect(stdout).toMatch(/^not tried 1\.0\.1: it failed before .*--retry.* on 1\.0\.0\n$/);
    }
    expect(device.sent).toEqual([]);
    // The server hears of it.
    expect(device.server.requests.map(({ failed }) => failed)).toEqual(["1.0.1", "1.0.1"]);
    await device.expectOn1(["1.0.1"]);

    const { code, last } = await device.client(["--check", "true", "--retry"]);
    expect({ code, last }).toEqual({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)",
    });
    await device.expectOn2();
  });

  test("is tried again once its content is another", async () => {
    await using device = await Device.on1();
    expect((await device.client(["--check", "false"])).code).toBe(3);
    layTree(device.at("releases/1.0.1"), { "flash/main.py": "print('two, mended')\n" });
    await device.serve();
    const { code, last } = await device.client(["--check", "grep -q mended flash/main.py"]);
    expect({ code, last }).toEqual({
      code: 0,
      last: "updated 1.0.0 -> 1.0.1 (firmware 1.0.0 -> 1.0.1)",
    });
    expect(await device.status()).toMatchObject({ version: "1.0.1", failed: [] });
  });

  test("does not keep the next one away, and is forgotten when that one stands", async () => {
    await using device = await Device.on1();
    expect((await device.client(["--check", "false"])).code).toBe(3);
    layTree(device.at("releases/1.0.2"), V3);
    await device.serve();
    const { last } = await device.client(["--check", "true"]);
    expect(last).toBe("updated 1.0.0 -> 1.0.2 (firmware 1.0.0 -> 1.0.1)");
    expect(device.tree()).toEqual(asTree({ ...V3, ...own("1.0.2") }));
    expect(await device.status()).toMatchObject({
      version: "1.0.2",
      previous_version: "1.0.0",
      failed: [],
    });
    expect((await device.client()).last).toBe("up to date 1.0.2");
    expect(device.server.requests.at(-1)?.failed).toBeUndefined();
  });
});

describe.concurrent("a report", () => {
  /** What was reported: each time the version, the firmware, and what failed. */
  const reported = ({ reports }: Between) => {
    return reports.map(({ asked: { query } }) => {
      return [query.get("current_ver"), query.get("firmware_ver"), query.get("failed")];
    });
  };

  test("follows a rollback, after the last restart: what it is on again, and what failed", async () => {
    await using device = await Device.on1();
    await using between = await Between.start(device);
    const args = ["--check", "false", "--restart", 'echo "restart $OTA_VERSION" >> "$LOG"'];
    const heard: string[][] = [];
    between.meddling = {
      ask: (_, { method }) => void (method === "HEAD" && heard.push(device.logged())),
    };
    expect((await device.client(args, between)).code).toBe(3);
    expect(reported(between)).toEqual([["1.0.0", "1.0.0", "1.0.1"]]);
    expect(heard).toEqual([["restart 1.0.1", "restart 1.0.0"]]);
    // It is the device that asked.
    const [asked] = between.of("/manifest.json");
    const [report] = between.reports;
    expect(report?.asked.query.get("devid")).toBe(asked!.asked.query.get("devid"));
  });

  test("of firmware that failed alone names it", async () => {
    await using device = await Device.on1();
    rmSync(device.at("releases/1.0.1"), { recursive: true });
    await device.serve();
    await using between = await Between.start(device);
    expect((await device.client(["--check", "false"], between)).code).toBe(3);
    expect(reported(between)).toEqual([["1.0.0", "1.0.0", "1.0.1"]]);
  });

  test("of a new device that went back says that it is on nothing, whatever --ver says", async () => {
    await using device = await Device.on1();
    rmSync(device.root, { recursive: true });
    await using between = await Between.start(device);
    // Its application writes something.
    const args = ["--ver", "0.5", "--restart", "echo > flash/log", "--check", "false"];
    expect((await device.client(args, between)).last).toBe("rolled back 1.0.1 -> 0");
    expect(reported(between)).toEqual([["", "", "1.0.1"]]);
  });

  test("follows a rollback at the next start, which asks for nothing", async () => {
    await using device = await Device.on1();
    await using between = await Between.start(device);
    const killed = await device.process(["--check", 'kill -KILL "$PPID"'], between);
    expect(killed.signal).toBe("SIGKILL");
    expect(between.reports).toEqual([]);
    between.passed.length = 0;
    const { code, last } = await device.client(["--check", "false"], between);
    expect({ code, last }).toEqual({ code: 3, last: "rolled back 1.0.1 -> 1.0.0" });
    expect(reported(between)).toEqual([["1.0.0", "1.0.0", "1.0.1"]]);
    expect(between.passed).toEqual([]);
  });

  test("is not needed where the next start confirms a release: its request says so", async () => {
    await using device = await Device.on1();
    await using between = await Between.start(device);
    await device.process(["--check", 'kill -KILL "$PPID"'], between);
    between.passed.length = 0;
    expect((await device.client(["--check", "true"], between)).last).toBe("up to date 1.0.1");
    const asked = between.passed.map(({ asked }) => asked.query.get("current_ver"));
    expect(asked).toEqual(["1.0.1"]);
    expect(between.reports).toEqual([]);
  });

  test("that fails changes nothing about a rollback: one note says so", async () => {
    for (const [report, why, args] of [
      [(connection: Socket) => void connection.end(head(405)), "answered 405", []],
      [() => {}, "nothing came for 1 s", ["--timeout", "1"]],
    ] as const) {
      for (const isLater of [false, true]) {
        await using device = await Device.on1();
        const offer = { version: "1.0.1", put: { "flash/main.py": "print('two')\n" } };
        await using server = await Double.start((asked, connection) => {
          return offering(offer, () => server.url)(asked, connection);
        });
        server.report = (_, connection) => report(connection);
        if (isLater) await device.process(["--check", 'kill -KILL "$PPID"'], server);
        const failing = ["--check", "exit 7", ...args];
        const { code, stdout, stderr } = await device.process(failing, server);
        expect({ code, stdout }).toEqual({ code: 3, stdout: "rolled back 1.0.1 -> 1.0.0\n" });
        expect(stderr.match(/^ota\.ts: .*$/gm)?.at(-1)).toEndWith(why);
        expect(stderr.match(/may not know yet what this device is on/g)).toHaveLength(1);
        expect(server.reports).toHaveLength(1);
        await device.expectOn1(["1.0.1"]);
      }
    }
  });

  test("is not made by rollback and status, which know no server", async () => {
    await using device = await Device.on1();
    await device.client();
    device.server.lines.length = 0;
    expect((await device.run("rollback")).code).toBe(0);
    expect((await device.run("status")).code).toBe(0);
    expect(device.server.requests).toEqual([]);
  });
});

describe.concurrent("--restart", () => {
  const restart = 'echo "restart $OTA_VERSION" >> "$LOG"';
  const check = (then: string) => `echo "check $OTA_VERSION" >> "$LOG"; ${then}`;

  test("runs after the commit, before the check", async () => {
    await using device = await Device.on1();
    const args = ["--restart", restart, "--check", check("true")];
    expect((await device.client(args)).code).toBe(0);
    expect(device.logged()).toEqual(["restart 1.0.1", "check 1.0.1"]);
    // Nothing has changed, and nothing is restarted.
    expect((await device.client(args)).last).toBe("up to date 1.0.1");
    expect(device.logged()).toEqual([]);
  });

  test("runs again after the way back", async () => {
    await using device = await Device.on1();
    const args = ["--restart", restart, "--check", check("false")];
    expect((await device.client(args)).code).toBe(3);
    expect(device.logged()).toEqual(["restart 1.0.1", "check 1.0.1", "restart 1.0.0"]);
  });

  test("runs without a check, too, and does not decide anything", async () => {
    await using device = await Device.on1();
    const { code, stderr } = await device.client(["--restart", `${restart}; exit 5`]);
    expect(code).toBe(0);
    expect(stderr).toContain("the restart command ended with code 5");
    expect(device.logged()).toEqual(["restart 1.0.1"]);
    await device.expectOn2();
  });

  test("is owed when it was killed before it ended: status runs it at boot", async () => {
    await using device = await Device.on1();
    const dies = `test -e ${quoted(device.at("dead"))} || { : > ${quoted(device.at("dead"))}; kill -KILL "$PPID"; exit; }; ${restart}`;
    const args = ["--restart", dies, "--check", check("true")];
    expect((await device.process(args)).signal).toBe("SIGKILL");
    expect(device.logged()).toEqual([]);
    expect((await device.run("status")).code).toBe(0);
    expect(device.logged()).toEqual(["restart 1.0.1"]);
    // And once.
    expect((await device.run("status")).code).toBe(0);
    await device.expectOn2({ pending: true });
    expect(device.logged()).toEqual([]);
    expect((await device.client()).last).toBe("up to date 1.0.1");
    expect(device.logged().filter((line) => line.startsWith("check"))).toEqual(["check 1.0.1"]);
    await device.expectOn2();
  });

  test("is owed after a commit that was cut off and is ended by status", async () => {
    await using device = await Device.on1();
    // Killed as state.json is about to name the new release.
    const args = device.args(["--restart", restart]);
    cpSync(device.root, device.at("copy"), { recursive: true });
    const calls = await callsOf(args.with(2, device.at("copy")), ["rename"]);
    device.logged();
    // Both are copies, which have other inodes: that is noted first.
    expect(calls[0]).toContain("state.json.new");
    const nth = 2 + calls.slice(1).findIndex((call) => call.includes("state.json.new"));
    expect(nth).toBeGreaterThan(1);
    const killed = await ota(args, {
      prefix: injecting("rename", `signal=SIGKILL:when=${nth}`),
    });
    expect(killed.signal).toBe("SIGKILL");
    expect(existsSync(device.at("device/.ota/state.json.new"))).toBe(true);
    expect(device.logged()).toEqual([]);
    expect((await device.run("status")).code).toBe(0);
    expect(device.logged()).toEqual(["restart 1.0.1"]);
    await device.expectOn2();
  });

  test("runs after a rollback by hand, as given then or before", async () => {
    for (const args of [[], ["--restart", 'echo "other $OTA_VERSION" >> "$LOG"']]) {
      await using device = await Device.on1();
      expect((await device.client(["--restart", restart])).code).toBe(0);
      device.logged();
      expect((await device.run("rollback", args)).code).toBe(0);
      expect(device.logged()).toEqual([args.length > 0 ? "other 1.0.0" : "restart 1.0.0"]);
    }
  });
});

describe.concurrent("rollback by hand", () => {
  test("refuses while the record is damaged, and leaves everything as it is", async () => {
    await using device = await Device.on1();
    await device.serve();
    await device.client();
    device.write({ "device/.ota/state.json": "{" });
    const before = device.tree();
    const { code, stderr } = await device.run("rollback");
    expect({ code, tree: device.tree() }).toEqual({ code: 1, tree: before });
    expect(stderr).toContain("run client with --repair");
    expect((await device.client(["--repair"])).code).toBe(0);
  });

  test("goes back byte for byte, once, also later, firmware too", async () => {
    await using device = await Device.on1();
    layTree(device.root, { "flash/data.txt": "the application's", "sd/log/1": "log" });
    await device.serve();
    expect((await device.client()).code).toBe(0);
    // Polls and looks in between change nothing.
    for (let day = 0; day < 2; day++) {
      expect((await device.client()).last).toBe("up to date 1.0.1");
      await device.status();
    }
    layTree(device.root, { "sd/log/2": "later" });
    const { code, stdout } = await device.run("rollback");
    expect({ code, stdout }).toEqual({ code: 0, stdout: "rolled back 1.0.1 -> 1.0.0\n" });
    const apps = { "flash/data.txt": "the application's", "sd/log/1": "log", "sd/log/2": "later" };
    expect(device.tree()).toEqual(asTree({ ...V1, ...own("1.0.0"), ...apps }));
    for (const path of Object.keys(apps)) rmSync(device.at("device", path));
    rmSync(device.at("device/sd/log"), { recursive: true });
    await device.expectOn1(["1.0.1"]);

    const again = await device.run("rollback");
    expect(again.code).toBe(1);
    expect(again.stdout).toBe("");
    expect(again.stderr).toContain("no previous release to go back to");
    await device.expectOn1(["1.0.1"]);
  });

  test("is not undone by the next poll", async () => {
    await using device = await Device.on1();
    await device.client();
    await device.run("rollback");
    device.server.lines.length = 0;
    const { code, last } = await device.client();
    expect(code).toBe(3);
    expect(last).toStartWith("not tried 1.0.1");
    expect(device.sent).toEqual([]);
    expect(device.server.requests.map(({ failed }) => failed)).toEqual(["1.0.1"]);
    await device.expectOn1(["1.0.1"]);
    expect((await device.client(["--retry"])).code).toBe(0);
    await device.expectOn2();
  });

  test("asks for --force where the application changed what it would overwrite", async () => {
    await using device = await Device.on1();
    await device.client();
    const changed: Tree = {
      "flash/main.py": "print('patched in the field')\n",
      "flash/new/er/mod.py": "PATCHED = 1\n",
      "flash/data.txt": "no part of any release",
    };
    layTree(device.root, changed);
    const before = device.tree();
    const refused = await device.run("rollback");
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("flash/main.py");
    expect(refused.stderr).toContain("flash/new/er/mod.py");
    expect(refused.stderr).not.toContain("data.txt");
    expect(refused.stderr).toContain("--force");
    expect(device.tree()).toEqual(before);
    expect(await device.status()).toMatchObject({ version: "1.0.1", failed: [] });

    const { code, last } = await device.run("rollback", ["--force"]);
    expect({ code, last }).toEqual({ code: 0, last: "rolled back 1.0.1 -> 1.0.0" });
    rmSync(device.at("device/flash/data.txt"));
    await device.expectOn1(["1.0.1"]);
  });

  test("asks for --force where the application made a file that the release had deleted", async () => {
    await using device = await Device.on1();
    await device.client();
    layTree(device.root, { "flash/old/only.py": "the application's own" });
    const before = device.tree();
    const refused = await device.run("rollback");
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("flash/old/only.py");
    expect(device.tree()).toEqual(before);
    expect((await device.run("rollback", ["--force"])).code).toBe(0);
    await device.expectOn1(["1.0.1"]);
  });

  test("takes a release on trial back", async () => {
    await using device = await Device.on1();
    expect((await device.process(["--check", 'kill -KILL "$PPID"'])).signal).toBe("SIGKILL");
    await device.expectOn2({ pending: true });
    const { code, last } = await device.run("rollback");
    expect({ code, last }).toEqual({ code: 0, last: "rolled back 1.0.1 -> 1.0.0" });
    await device.expectOn1(["1.0.1"]);
    expect((await device.client()).code).toBe(3);
  });

  test("takes a first installation back to nothing", async () => {
    await using device = await Device.on1();
    const { code, last } = await device.run("rollback");
    expect({ code, last }).toEqual({ code: 0, last: "rolled back 1.0.0 -> 0" });
    expect(Object.keys(device.tree()).filter((path) => !path.endsWith("/"))).toEqual([]);
    expect(await device.status()).toMatchObject({ version: null, firmware: null });
  });

  test("of a device that was never updated says that there is nothing to go back to", async () => {
    using device = new Device();
    layTree(device.root, V1);
    const { code, stdout, stderr } = await device.run("rollback");
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain("no previous release to go back to");
    expect(device.tree()).toEqual(asTree(V1));
  });

  test("is possible until the next update, from which it goes back one release", async () => {
    await using device = await Device.on1();
    await device.client();
    layTree(device.at("releases/1.0.2"), V3);
    await device.serve();
    expect((await device.client()).last).toBe("updated 1.0.1 -> 1.0.2");
    const { code, last } = await device.run("rollback");
    expect({ code, last }).toEqual({ code: 0, last: "rolled back 1.0.2 -> 1.0.1" });
    await device.expectOn2({ failed: ["1.0.2"], previous_version: "1.0.0" });
    expect((await device.run("rollback")).code).toBe(1);
  });

  test("stays possible when the next update fails before it is durable", async () => {
    await using device = await Device.on1();
    await device.client();
    {
      const offer = { version: "1.0.2", put: { "flash/main.py": "print('three')" } };
      await using server = await Double.start((asked, connection) => {
        if (asked.path !== "/manifest.json") return send(connection, "gone", { status: 404 });
        send(connection, JSON.stringify(manifestOf(offer, server.url)));
      });
      expect((await device.client([], server)).code).toBe(1);
      expect(server.askedFor("/content/flash/main.py")).not.toEqual([]);
    }
    const { last } = await device.run("rollback");
    expect(last).toBe("rolled back 1.0.1 -> 1.0.0");
    await device.expectOn1(["1.0.1"]);
  });
});
