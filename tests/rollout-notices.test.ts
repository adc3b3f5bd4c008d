/** `serve --notify`: a program of the operator's is told what becomes of rollouts. */

import {
  afterAll,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  setSystemTime,
  test,
} from "bun:test";
import type { Rollout } from "../ota.ts";
import { Stores } from "./helpers/fleet.ts";
import { eventually, Serving } from "./helpers/tool.ts";
import { before, HOUR, publish } from "./helpers/van.ts";

setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

/** What is told of rollouts. */
interface Notice {
  event: string;
  text: string;
  rollout: Rollout;
}

/** Whoever is to be told, and what he answers. */
class Listener implements Disposable {
  readonly notices: Notice[] = [];
  readonly others: string[] = [];
  /** A status, where to go instead, or `never`. */
  answers: (number | string)[] = [];
  readonly #server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: async (request) => {
      const { pathname } = new URL(request.url);
      if (pathname !== "/hook" || request.method !== "POST") {
        this.others.push(`${request.method} ${pathname}`);
        return new Response("");
      }
      this.notices.push((await request.json()) as Notice);
      const answer = this.answers.shift() ?? 200;
      if (typeof answer === "number") return new Response("", { status: answer });
      if (answer === "never") return await new Promise<Response>(() => {});
      return new Response("", { status: 307, headers: { Location: answer } });
    },
  });

  get url(): string {
    return `${this.#server.url}hook`;
  }

  [Symbol.dispose](): void {
    void this.#server.stop(true);
  }
}

/** Lets time pass that nobody waits for. */
function pass(milliseconds: number): void {
  setSystemTime(new Date(Date.now() + milliseconds));
}

describe("serve --notify", () => {
  test.concurrent.each(stores.each)(
    "tells when a rollout pauses, halts and is done, once each, whatever servers there are (in %s)",
    async (_, { place }) => {
      using listener = new Listener();
      const notify = listener.url;
      await using van = await before({ notify, fleet: await place() }, "a", "b");
      await van.serve({ notify });
      await van.rollout("start", "1.0.1", "--pause-at", "none");
      publish(van);
      await van.state("running");
      const told = (count: number) =>
        eventually(`${count} notices`, () => listener.notices.length >= count);
      await van.rollout("pause", "1.0.1");
      await told(1);
      await van.rollout("resume", "1.0.1");
      await van.offered("a", "1.0.1");
      await van.ask("a", "1.0.0", { failed: "1.0.1" });
      await van.state("halted");
      await told(2);
      await van.rollout("resume", "1.0.1");
      van.pass();
      await van.offered("b", "1.0.1");
      await van.ask("b", "1.0.1");
      await van.ask("a", "1.0.1");
      await van.state("done");
      await told(3);
      expect(listener.notices.map(({ event }) => event)).toEqual(["paused", "halted", "done"]);
      expect(listener.notices[0]!.text).toBe("1.0.1 paused: by the operator");
      expect(listener.notices[1]!.rollout).toMatchObject({ version: "1.0.1", failed: 1 });
      expect(van.warnings.filter((line) => line.includes("told"))).toEqual([]);
    },
  );

  test.concurrent(
    "tries again when that fails, follows nobody elsewhere, and warns once",
    async () => {
      using listener = new Listener();
      listener.answers = [500, listener.url.replace("hook", "elsewhere")];
      await using van = await before({ notify: listener.url }, "a");
      await van.rollout("start", "1.0.1");
      publish(van);
      await van.state("running");
      await van.rollout("pause", "1.0.1");
      await eventually("three tries", () => listener.notices.length === 3);
      expect(new Set(listener.notices.map(({ text }) => text)).size).toBe(1);
      expect(listener.others).toEqual([]);
      const warnings = van.warnings.filter((line) => line.includes("could not be told"));
      const { origin } = new URL(listener.url);
      expect(warnings).toEqual([
        `${origin} could not be told that 1.0.1 paused: by the operator (it answered 500): ` +
          "tried again for an hour",
      ]);
    },
  );

  test.concurrent("what one that stops was about to tell, another one tells at once", async () => {
    using listener = new Listener();
    const notify = listener.url;
    await using van = await before({ notify }, "a");
    await van.rollout("start", "1.0.1");
    publish(van);
    await van.state("running");
    listener.answers = ["never"];
    await van.rollout("pause", "1.0.1");
    await eventually("a notice", () => listener.notices.length === 1);
    await van.serve({ notify });
    await van.servers.shift()![Symbol.asyncDispose]();
    await eventually("another one", () => listener.notices.length === 2);
  });
});

describe.concurrent("serve --notify, later", () => {
  // (A hook is what keeps these apart from those above, which must not hear of another date.)
  beforeAll(() => void setSystemTime());
  afterAll(() => void setSystemTime());

  test.each(stores.each)(
    "what one that is killed was about to tell, another one tells (in %s)",
    async (_, { place }) => {
      using listener = new Listener();
      const [notify, fleet] = [listener.url, await place()];
      await using van = await before({ fleet }, "a");
      await van.rollout("start", "1.0.1");
      publish(van);
      await van.state("running");
      const args = ["--root", van.path, "--fleet", fleet, "--notify", notify];
      // The first one is told, and cannot say so.
      listener.answers = ["never"];
      await using first = await Serving.start(args);
      await van.offered("a", "1.0.1");
      await van.ask("a", "1.0.0", { failed: "1.0.1" });
      await eventually("a notice", () => listener.notices.length === 1);
      first.kill("SIGKILL");
      await first.ended;
      await van.serve({ notify });
      pass(60_000);
      await eventually("another one", () => listener.notices.length === 2);
      expect(listener.notices.map(({ text }) => text)).toEqual([
        ...Array(2).fill("1.0.1 halted: 1 device bad (1 failed), and none is proven"),
      ]);
      expect(van.warnings.filter((line) => line.includes("told"))).toEqual([]);
    },
  );

  test("holds up nobody, and gives up after an hour", async () => {
    // It takes connections, and answers nothing.
    using silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    const notify = `http://127.0.0.1:${silent.port}/secret`;
    await using van = await before({ notify }, "a");
    await van.rollout("start", "1.0.1");
    publish(van);
    await van.state("running");
    await van.rollout("pause", "1.0.1");
    const warned = (pattern: RegExp) =>
      eventually(`${pattern}`, () => van.warnings.some((line) => pattern.test(line)));
    // Devices are answered meanwhile.
    await van.ask("z", "1.0.0");
    await warned(/could not be told that 1\.0\.1 paused.*tried again for an hour$/);
    // A connection that is refused fails as well, and at once.
    silent.stop(true);
    pass(HOUR);
    await warned(/could not be told that 1\.0\.1 paused.*given up after an hour$/);
    expect(van.warnings.join("\n")).not.toContain("secret");
  });
});
