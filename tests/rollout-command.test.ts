/** `rollout` as its operator types it, beside a server that acts on it; and what `serve` has for it. */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { renameSync } from "node:fs";
import { failureBound, type Rollout, rolloutProof } from "../ota.ts";
import { Stores } from "./helpers/fleet.ts";
import { layFleet } from "./helpers/laid-fleet.ts";
import { layTree, Temp } from "./helpers/temp.ts";
import { eventually, OTA_TS, run, Serving, until } from "./helpers/tool.ts";
import { before, HOUR, publish, RELEASES, Van } from "./helpers/van.ts";

setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

describe("what the numbers prove", () => {
  const words = (proven: number, failed = 0, silent_devices = 0, acknowledged = 0) =>
    rolloutProof({ proven, failed, silent_devices, acknowledged } as Rollout);

  test("is the exact bound of Clopper and Pearson", () => {
    // With none bad there is a formula; the others are from tables.
    for (const n of [1, 20, 59, 1000]) expect(failureBound(0, n)).toBeCloseTo(1 - 0.05 ** (1 / n));
    expect(failureBound(1, 20)).toBeCloseTo(0.2161, 4);
    expect(failureBound(2, 20)).toBeCloseTo(0.2826, 4);
    expect(failureBound(10, 100)).toBeCloseTo(0.1637, 4);
    expect(failureBound(20, 20)).toBe(1);
  });

  test("is said in words", () => {
    expect(words(20)).toBe("20 proven, none bad: fewer than 14 % fail, with 95 % confidence");
    expect(words(18, 1, 1)).toBe("18 proven, 2 bad: fewer than 29 % fail, with 95 % confidence");
    expect(words(1000)).toBe("1000 proven, none bad: fewer than 0.3 % fail, with 95 % confidence");
    expect(words(1)).toBe("1 proven, none bad: fewer than 95 % fail, with 95 % confidence");
    expect(words(0)).toBe("none proven, none bad: nothing is known yet");
    expect(words(0, 0, 1)).toBe("none proven, 1 bad: all may fail");
  });

  test("counts those that were acknowledged: they failed", () => {
    expect(words(19, 0, 0, 1)).toBe("19 proven, 1 bad: fewer than 22 % fail, with 95 % confidence");
  });
});

describe.concurrent("rollout start", () => {
  test("says who will get it, and what that costs on the air", async () => {
    using temp = new Temp(RELEASES);
    await layFleet(temp.at(".fleet.db"), [
      { id: "a", query: { model: "LoPy4" } },
      { id: "b", query: { model: "LoPy4" } },
      { id: "c", version: "0.9", query: { model: "FiPy" } },
      { id: "d", version: "1.0.1" },
    ]);
    const { code, stdout, stderr } = await run(["rollout", "start", "1.0.1", "--root", temp.path]);
    expect([code, stderr]).toEqual([0, ""]);
    const [head, columns, ...rows] = stdout.trimEnd().split("\n");
    expect(head).toBe("1.0.1 goes to 3 devices: 1 at first, then never more unproven than proven");
    expect(columns).toBe("MODEL  ON     DEVICES  CLIENT  BOARD");
    expect(rows[0]).toMatch(/^LoPy4 {2}1\.0\.0 {2}2 {8}\d+ B +\d/);
    expect(rows[1]).toMatch(/^FiPy {3}0\.9 {4}1 {8}\d+ B +\d/);
    expect(rows[2]).toBe(`1.0.1 waiting; ota.ts rollout --root ${temp.path} shows how it goes`);
    // As `manifest --cost` has it.
    const cost = await run(["manifest", "--ver", "1.0.0", "--cost", "--root", temp.path]);
    const [, client, board] = /^ *(\d+) +(\d+) bytes in all/m.exec(cost.stdout)!;
    expect(Number(board)).toBeGreaterThan(Number(client));
    expect(rows[0]).toContain(`${client} B`);
  });

  test("with --dry-run says so, and starts nothing", async () => {
    using temp = new Temp(RELEASES);
    await layFleet(temp.at(".fleet.db"), [{ id: "a" }, { id: "b", version: "0.9" }]);
    const start = ["rollout", "start", "1.0.1", "--root", temp.path, "--dry-run"];
    const { code, stdout } = await run(start);
    expect([code, stdout]).toEqual([0, expect.stringContaining("1.0.1 goes to 2 devices")]);
    const only = await run([...start, "--only", "version=0.9"]);
    expect(only.stdout).toContain("1.0.1 goes to 1 device: 1 at first");
    const nobody = await run([...start, "--only", "site=nowhere"]);
    expect(nobody.stdout).toBe("1.0.1 goes to no device that is known\n");
    const { stdout: list, stderr } = await run(["rollout", "--root", temp.path]);
    expect([list, stderr]).toEqual([
      "",
      "no rollout yet: a version goes to everyone, unless a server is --staged\n",
    ]);
  });

  test("waits for a version that is not there yet", async () => {
    using temp = new Temp({ "1.0.0/main.py": "one\n" });
    await layFleet(temp.at(".fleet.db"), [{ id: "a" }]);
    const { code, stdout } = await run(["rollout", "start", "1.0.1", "--root", temp.path]);
    expect(code).toBe(0);
    expect(stdout).toContain(`1.0.1 is not in ${temp.path} yet`);
    expect(stdout).toContain("1.0.1 waiting");
  });

  test("of a fleet elsewhere: --root names the releases", async () => {
    using temp = new Temp({ "root/1.0.1/main.py": "two\n" });
    const url = temp.at("fleet.db");
    await layFleet(url, [{ id: "a" }]);
    const start = ["rollout", "start", "1.0.1", "--dry-run", "--fleet", url];
    const { stdout } = await run(start);
    expect(stdout).toContain("what it costs on the air is not known: --root DIR");
    const { stdout: known } = await run([...start, "--root", temp.at("root")]);
    expect(known).toMatch(/CLIENT {2}BOARD\n- +1\.0\.0 +1 +\d+ B +\d+ B\n$/);
  });

  test("takes all that can be said of one", async () => {
    await using van = await Van.start({}, { ...RELEASES, "lopy4/1.0.1/a": "1" });
    const window = "Mon-Fri 01:00-04:00 Europe/Berlin";
    const said = ["--first", "3", "--soak", "10m", "--silent", "2h", "--tolerance", "2.5%"];
    const more = ["--only", "site=mine", "--only", "model=LoPy4", "--window", window];
    await van.rollout("start", "1.0.1", "--pause-at", "50%,5%", ...said, ...more);
    expect(await van.list()).toMatchObject([
      {
        ...{ version: "1.0.1", model: null, first: 3, soak: 600, silent: 7200, tolerance: 0.025 },
        ...{ pause_at: [0.05, 0.5], window },
        only: [
          ["site", "mine"],
          ["model", "LoPy4"],
        ],
      },
    ]);
    await van.rollout("start", "1.0.1", "--model", "lopy4", "--pause-at", "none", "--soak", "0s");
    expect((await van.list())[0]).toMatchObject({ model: "lopy4", pause_at: [], soak: 0 });
    // Of two models, which one?
    const { code, stderr } = await van.rollout("abort", "1.0.1", "--yes");
    expect(code).toBe(2);
    expect(stderr).toContain("name the model (lopy4, - for the root's own)");
    const aborted = await van.rollout("abort", "1.0.1", "--model", "LOPY4", "--yes");
    expect([aborted.code, aborted.stdout]).toEqual([
      0,
      "1.0.1 of lopy4 aborted: by the operator\n",
    ]);
    await van.rollout("start", "1.0.1", "--model", "lopy4");
    const own = await van.rollout("pause", "1.0.1", "--model", "-");
    expect([own.code, own.stdout]).toEqual([0, "1.0.1 paused: by the operator\n"]);
  });

  test.each([
    [["--first", "x"], "--first expects a number of devices, found x"],
    [["--first", "0"], "--first as a whole number from 1, found 0"],
    [["--soak", "soon"], "--soak expects a duration such as 30s, 10m or 1h, found soon"],
    [["--silent", "0s"], "--silent expects a duration"],
    [["--tolerance", "5"], "--tolerance expects a percentage such as 5%, found 5"],
    [["--tolerance", "100%"], "--tolerance between 0 % (0) and 100 % (1), found 1"],
    [["--pause-at", "5%,"], "--pause-at expects a percentage such as 5%"],
    [["--pause-at", "5%,5%"], "--pause-at as up to 16 percentages that ascend"],
    [["--only", "site"], "--only expects K=V: a label, model=M or version=V, found site"],
    [["--window", "Mo 1-4"], "a window is like 'Mon-Fri 01:00-04:00 Europe/Berlin'"],
    [["--stop"], "rollout start has no option --stop"],
  ])("%p: 2, and what was expected", async (args, message) => {
    const { code, stdout, stderr } = await run(["rollout", "start", "1.0.1", ...args]);
    expect([code, stdout, stderr]).toEqual([2, "", expect.stringContaining(message)]);
  });

  test("of what is no version, or of a fleet that is not there", async () => {
    using temp = new Temp();
    const wrong = await run(["rollout", "start", "latest", "--root", temp.path]);
    expect([wrong.code, wrong.stderr]).toEqual([
      2,
      expect.stringMatching(/VERSION is a release name .*, found latest\n$/),
    ]);
    const none = await run(["rollout", "start", "1.0.1", "--root", temp.path]);
    expect([none.code, none.stderr]).toEqual([1, expect.stringContaining("no fleet")]);
  });
});

describe.concurrent("a rollout beside its server", () => {
  test("is listed as it goes on: offered, proven, failed", async () => {
    await using van = await before({}, "a", "b");
    await van.rollout("start", "1.0.1", "--pause-at", "none");
    publish(van);
    const { stdout: first } = await van.rollout();
    expect(first).toMatch(/^1\.0\.1 {2}\w+ {2}none proven, none bad: nothing is known yet; /);
    await van.offered("a", "1.0.1");
    expect(await van.ask("b", "1.0.0")).toBe("none");
    // A server tells the store within a second.
    const lists = (line: string) =>
      until(
        "the list",
        async () => (await van.rollout()).stdout,
        (found) => found === `1.0.1  running  ${line}\n`,
      );
    await lists("none proven, none bad: nothing is known yet; 1 on the way; 1 to come");
    await van.ask("a", "1.0.1");
    await van.offered("b", "1.0.1");
    const proof = "1 proven, none bad: fewer than 95 % fail, with 95 % confidence";
    await lists(`${proof}; 1 on the way; 0 to come`);
    await van.ask("b", "1.0.1");
    await van.state("done");
    expect((await van.rollout()).stdout).toMatch(
      /^1\.0\.1 {2}done {2}nobody is left: 2 devices proven; 2 proven, none bad: /,
    );
  });

  test("is waited for until its servers act on it", async () => {
    await using van = await before({}, "a");
    publish(van);
    await eventually("1.0.1 is served", () => van.server.releases.versions.length === 2);
    const { stdout } = await van.rollout("start", "1.0.1");
    expect(stdout).toContain("\n1.0.1 running; ");
  });

  test("halts, and says why; resume acknowledges what was bad", async () => {
    await using van = await before({}, "a", "b");
    await van.rollout("start", "1.0.1", "--pause-at", "none");
    publish(van);
    await van.offered("a", "1.0.1");
    await van.ask("a", "1.0.0", { failed: "1.0.1" });
    const { reason } = await van.state("halted");
    const { stdout } = await van.rollout();
    expect(stdout).toContain(
      `1.0.1  halted  ${reason}; none proven, 1 bad: all may fail; 0 on the way; 1 to come; failed: a\n`,
    );
    const known = await run(["fleet", "show", "a", "--fleet", van.at(".fleet.db")]);
    expect(known.stdout).toMatch(/^rollouts: +1\.0\.1 \(halted\): it failed here$/m);
    expect(
      (await run(["fleet", "show", "b", "--fleet", van.at(".fleet.db")])).stdout,
    ).not.toContain("rollouts:");
    const resumed = await van.rollout("resume", "1.0.1");
    expect([resumed.code, resumed.stdout]).toEqual([0, "1.0.1 running\n"]);
    van.pass();
    await van.offered("b", "1.0.1");
  });

  test("is paused, resumed, advanced, aborted; what cannot be is said", async () => {
    await using van = await before({}, "a", "b", "c");
    const there = await van.rollout("start", "1.0.1", "--pause-at", "none");
    expect(there.code).toBe(0);
    publish(van);
    await van.state("running");
    const again = await van.rollout("start", "1.00.1");
    expect([again.code, again.stderr]).toEqual([1, expect.stringContaining("is running already")]);
    const paused = await van.rollout("pause", "1.0.1");
    expect([paused.code, paused.stdout]).toEqual([0, "1.0.1 paused: by the operator\n"]);
    const twice = await van.rollout("pause", "1.0.1");
    expect([twice.code, twice.stderr]).toEqual([
      1,
      expect.stringContaining(
        "the rollout of 1.0.1 is paused: pause is for those that are waiting, running",
      ),
    ]);
    expect((await van.rollout("resume", "1.0.1")).stdout).toStartWith("1.0.1 running");
    // Nobody is there to be asked.
    const asked = await van.rollout("advance", "1.0.1");
    expect([asked.code, asked.stdout]).toEqual([2, ""]);
    expect(asked.stderr).toContain("1.0.1 then goes to everyone at once. rollout advance needs");
    const advanced = await van.rollout("advance", "1.0.1", "--yes");
    expect([advanced.code, advanced.stdout]).toEqual([0, "1.0.1 running\n"]);
    for (const id of ["a", "b", "c"]) await van.offered(id, "1.0.1");
    const aborted = await van.rollout("abort", "1.0.1", "--yes");
    expect([aborted.code, aborted.stdout]).toEqual([0, "1.0.1 aborted: by the operator\n"]);
    await eventually(
      "it is offered to nobody",
      async () => (await van.ask("a", "1.0.0")) === "none",
    );
    const unknown = await van.rollout("pause", "1.0.2");
    expect([unknown.code, unknown.stderr]).toEqual([
      1,
      expect.stringMatching(/no rollout of 1\.0\.2 in .*; ota\.ts rollout --root .* lists those/),
    ]);
  });

  test("on a terminal, is asked about before it is aborted", async () => {
    await using van = await before({}, "a");
    await van.rollout("start", "1.0.1");
    /** Types an answer to the question; how it ends. */
    const answering = async (answer: string) => {
      let shown = "";
      let isAnswered = false;
      const args = ["rollout", "abort", "1.0.1", "--root", van.path];
      const child = Bun.spawn([process.execPath, OTA_TS, ...args], {
        env: { ...process.env, NO_COLOR: "1" },
        terminal: {
          data: (terminal, data) => {
            shown += Buffer.from(data).toString();
            if (isAnswered || !shown.includes("[y/N]")) return;
            isAnswered = true;
            terminal.write(`${answer}\n`);
          },
        },
      });
      return { code: await child.exited, shown };
    };
    const no = await answering("n");
    expect(no.shown).toContain("1.0.1 then goes to nobody any more, for good. Go on?");
    expect([no.code, (await van.list())[0]!.state]).toEqual([1, "waiting"]);
    const yes = await answering("y");
    expect([yes.code, (await van.list())[0]!.state]).toEqual([0, "aborted"]);
  });
});

describe.concurrent("serve --staged", () => {
  test("starts a rollout of what appears, and nobody gets it before", async () => {
    using temp = new Temp({ "1.0.0/main.py": "one\n", "1.0.1/main.py": "two\n" });
    const args = ["--root", temp.path, "--host", "127.0.0.1", "--staged"];
    const ask = async (url: string, id: string, version: string) => {
      const answer = await fetch(`${url}/manifest.json?devid=${id}&current_ver=${version}`);
      return ((await answer.json()) as { version: string } | null)?.version ?? "none";
    };
    const rollouts = async () => {
      const { stdout } = await run(["rollout", "--root", temp.path, "--json"]);
      return (JSON.parse(stdout) as { rollouts: Rollout[] }).rollouts;
    };
    {
      await using server = await Serving.start(args);
      // What is there at the first start goes to everyone, as soon as it is known to be that.
      await eventually("1.0.1", async () => (await ask(server.url, "a", "1.0.0")) === "1.0.1");
      for (const id of ["b", "c", "d"]) await ask(server.url, id, "1.0.1");
      await eventually("they are written", async () => {
        const { stdout } = await run(["fleet", "--root", temp.path, "--json"]);
        return (JSON.parse(stdout) as { devices: number }).devices === 4;
      });
      // It may be that nobody's number is low enough for minutes: a canary needs none.
      await run(["fleet", "label", "b", "canary=yes", "--root", temp.path]);
      layTree(temp.at(".new"), { "main.py": "three\n" });
      renameSync(temp.at(".new"), temp.at("1.0.2"));
      await server.until(/^staged {3}1\.0\.2: a rollout of it began$/m);
      const offered = new Set<string>();
      await eventually("one is offered it", async () => {
        for (const id of ["b", "c", "d"]) {
          if ((await ask(server.url, id, "1.0.1")) === "1.0.2") offered.add(id);
        }
        return offered.size > 0;
      });
      expect(offered.size).toBe(1);
      expect(await rollouts()).toMatchObject([
        { version: "1.0.2", first: 1, pause_at: [0.05, 0.5] },
      ]);
    }
    // What appears while it is off is new as well; what was there, is not.
    layTree(temp.path, { "1.0.3/main.py": "four\n" });
    await using server = await Serving.start(args);
    await eventually("1.0.3 has a rollout", async () => (await rollouts()).length === 2);
    expect((await rollouts()).map(({ version }) => version)).toEqual(["1.0.3", "1.0.2"]);
    expect(await ask(server.url, "new", "1.0.0")).toBe("1.0.1");
  });

  test("waits for resume at 5 % and at 50 %", async () => {
    await using van = await before({ staged: true }, "a", "b", "c", "d");
    publish(van);
    for (const [id, step, hours] of [
      ["a", "at 5 %: 1 of 4 proven, none bad", 2],
      ["b", "at 50 %: 2 of 4 proven, none bad", 8],
    ] as const) {
      await van.offered(id, "1.0.1");
      await van.ask(id, "1.0.1");
      expect((await van.state("paused")).reason).toBe(step);
      expect(await van.ask("c", "1.0.0")).toBe("none");
      await van.rollout("resume", "1.0.1");
      // The first time that passes is their usual interval.
      van.pass(hours);
    }
    for (const id of ["c", "d"]) await van.offered(id, "1.0.1");
  });

  test("leaves a version alone that has a rollout already", async () => {
    await using van = await before({ staged: true }, "a");
    await van.rollout("start", "1.0.1", "--pause-at", "none", "--first", "2");
    publish(van);
    layTree(van.path, { "1.0.2/main.py": "three\n" });
    await until(
      "both",
      () => van.list(),
      (all) => all.length === 2,
    );
    expect((await van.list()).map(({ version, first }) => [version, first])).toEqual([
      ["1.0.2", 1],
      ["1.0.1", 2],
    ]);
    await until(
      "it runs",
      () => van.list(),
      (all) => all.every(({ state }) => state === "running"),
    );
  });

  test("and --notify need a fleet", async () => {
    using temp = new Temp(RELEASES);
    for (const option of [["--staged"], ["--notify", "http://127.0.0.1/"]]) {
      const { code, stderr } = await run(["serve", "--root", temp.path, "--no-fleet", ...option]);
      expect([code, stderr]).toEqual([
        2,
        `ota.ts: ${option[0]} and --no-fleet exclude each other\n`,
      ]);
    }
    const wrong = await run(["serve", "--root", temp.path, "--notify", "ftp://a/"]);
    expect([wrong.code, wrong.stderr]).toEqual([
      2,
      "ota.ts: --notify expects an http(s) address, found ftp://a/\n",
    ]);
  });
});

describe.each(stores.each)(
  "serve --staged on several servers, with their fleet in %s",
  (_, { place }) => {
    test("one of them starts the rollout, and all of them keep to it", async () => {
      const options = { staged: true, fleet: await place() };
      await using van = await before(options, "a", "b");
      for (let others = 0; others < 2; others++) await van.serve(options);
      publish(van);
      await van.state("running");
      expect(await van.list()).toHaveLength(1);
      await van.offered("a", "1.0.1");
      /** What they offer to a device. */
      const asked = async (devid: string) => {
        const query = new URLSearchParams({ devid, current_ver: "1.0.0" });
        return await Promise.all(
          van.servers.map(async ({ url }) => {
            const answer = await fetch(new URL(`/manifest.json?${query}`, url));
            return ((await answer.json()) as { version: string } | null)?.version ?? "none";
          }),
        );
      };
      // Each write tells a server what the others did.
      for (const { fleet } of van.servers) await fleet!.flush();
      expect(await asked("b")).toEqual(["none", "none", "none"]);
      expect(await asked("a")).toEqual(["1.0.1", "1.0.1", "1.0.1"]);
      const staged = van.log.filter((line) => line.startsWith("staged"));
      expect(staged).toEqual(["staged   1.0.1: a rollout of it began"]);
      // One that comes later knows what is not new.
      await van.serve(options);
      expect(await van.list()).toHaveLength(1);
    });
  },
);

describe.concurrent("may I leave?", () => {
  const leaving = async (...said: Parameters<typeof layFleet>[1][number][]) => {
    using temp = new Temp();
    await layFleet(temp.at("fleet.db"), said);
    const { stdout } = await run(["fleet", "--fleet", temp.at("fleet.db")]);
    return stdout.split("\n")[2]!;
  };
  /** When a device that was offered something a while ago will be silent. */
  const clock = (ago: number) => {
    const at = new Date(Math.ceil((Date.now() - ago + HOUR) / 60_000) * 60_000);
    return at.toTimeString().slice(0, 5);
  };

  test("while boards are installing: how many, and when the last of them will be silent", async () => {
    const one = await leaving({ id: "a", ago: HOUR / 2, to: "1.0.1" });
    expect(one).toMatch(/^1 board is still installing, silent at (\d+-\d\d-\d\d )?\d\d:\d\d$/);
    const [expected, found] = [clock(HOUR / 2), one.slice(-5)];
    // The minute may have passed since.
    expect([expected, clock(HOUR / 2 + 60_000)]).toContain(found);
    const two = await leaving(
      { id: "a", ago: HOUR / 2, to: "1.0.1" },
      { id: "b", ago: HOUR / 4, to: "1.0.1" },
      { id: "c", ago: 3 * HOUR, to: "1.0.1" },
      { id: "d", ago: HOUR / 8 },
    );
    expect(two).toMatch(/^2 boards are still installing, the last one silent at /);
    expect([clock(HOUR / 4), clock(HOUR / 4 + 60_000)]).toContain(two.slice(-5));
  });

  test("when none is", async () => {
    expect(await leaving({ id: "a", version: "1.0.1" })).toBe(
      "no board is installing: you may leave",
    );
    // What is silent is not waited for.
    expect(await leaving({ id: "a", ago: 5 * HOUR, to: "1.0.1" })).toBe(
      "no board is installing: you may leave",
    );
  });
});
