/** The examples: programs that a reader runs as they are, and takes apart. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import {
  type ChannelOptions,
  Gateway,
  LoraOTA,
  type LoraOptions,
  LossyChannel,
  measure,
  type Sent,
} from "../examples/lora-transport.ts";
import {
  Gateway as MeterGateway,
  MAX_MESSAGE,
  Meter,
  packUplink,
  unpackUplink,
} from "../examples/lora-meter.ts";
import {
  type TransferResponse,
  DirectoryOTA,
  HttpOTA,
  makeKeys,
  OTAError,
  type Outcome,
  readKey,
  TransferError,
} from "../ota.ts";
import { noise } from "./helpers/content.ts";
import { Random, seeded } from "./helpers/random.ts";
import { filesBelow, Temp } from "./helpers/temp.ts";
import { eventually, Tool } from "./helpers/tool.ts";
import { Served } from "./helpers/world.ts";

setDefaultTimeout(600_000);

const EXAMPLES = join(import.meta.dir, "../examples");
const RELEASES = join(EXAMPLES, "smart-meter");

/** Runs an example to its end. */
async function run(name: string, args: string[] = []) {
  await using tool = new Tool(args, { script: join(EXAMPLES, name) });
  return await tool.ended;
}

/** What a device on a release has: its files, and the version file. */
function deviceOn(release: string, version: string): Map<string, Uint8Array> {
  const files = filesBelow(release);
  files.set("flash/OTA_VERSION.py", new TextEncoder().encode(`VERSION = '${version}'\n`));
  return new Map([...files].sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** All files of a device but the updater's own. */
function filesOf(root: string): Map<string, Uint8Array> {
  const files = [...filesBelow(root)].filter(([path]) => !path.startsWith(".ota/"));
  return new Map(files.sort(([a], [b]) => (a < b ? -1 : 1)));
}

// ──── The story ─────────────────────────────────────────────────────────────────────────────────

describe("lora-meter.ts", () => {
  test("tells the story, step by step", async () => {
    const { code, stdout, stderr } = await run("lora-meter.ts");
    expect(stderr).toBe("");
    expect(code).toBe(0);
    const steps = [
      "workshop  installs 1.0.0 ",
      "meter     starts on 1.0.0, firmware 1.0.0",
      "meter     uplink 04 05 06 31 2e 30 2e 30\n",
      "gateway   hears a meter on 1.0.0\n",
      "van       comes ",
      "meter     uplink 04 05 06 31 2e 30 2e 30\n",
      "gateway   hears a meter on 1.0.0\n",
      "gateway   wants it on 1.0.1: downlink 01 02 03\n",
      "meter     is told to update, and joins the van at http://127.0.0.1:",
      "meter     has flash/main.py, ",
      "meter     updated 1.0.0 -> 1.0.1, ",
      "meter     starts on 1.0.1, firmware 1.0.1\n",
      "meter     uplink 04 05 06 31 2e 30 2e 31\n",
      "gateway   hears a meter on 1.0.1\n",
      "The meter is on 1.0.1.\n",
    ];
    let at = 0;
    for (const step of steps) {
      const found = stdout.indexOf(step, at);
      if (found < 0) throw new Error(`${step} is not in what follows:\n${stdout.slice(at)}`);
      at = found + step.length;
    }
    expect(at).toBe(stdout.length);
    expect(stdout.match(/downlink/g)).toHaveLength(1);
  });

  test("updates from a server that is given", async () => {
    await using van = await Served.start(RELEASES);
    const { code, stdout } = await run("lora-meter.ts", [van.url]);
    expect(code).toBe(0);
    expect(stdout).toContain(`joins the van at ${van.url}`);
    expect(van.requests.map(({ path }) => path)).toContain("/manifest.json");
    expect(van.requests.every(({ status }) => status === 200)).toBe(true);
  });

  test("refuses an argument that is no address", async () => {
    const { code, stdout, stderr } = await run("lora-meter.ts", ["--help"]);
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toStartWith("usage: ");
  });

  test("a meter whose update fails is as it was, and reports on", async () => {
    using scratch = await oldMeter();
    const root = scratch.at("device");
    const before = filesOf(root);
    await using van = await Served.start(RELEASES, { token: "another" });
    const lines: string[] = [];
    using gateway = await MeterGateway.start(() => {});
    gateway.wanted = "1.0.1";
    using meter = await Meter.start(root, gateway.port, (_, line) => void lines.push(line));
    expect(await meter.report()).toBe(true);
    expect(await meter.update(van.url)).toBe(false);
    expect(lines.at(-1)).toStartWith("cannot update: ");
    expect(filesOf(root)).toEqual(before);
    expect(await meter.report()).toBe(true);
    expect(gateway.heard).toEqual(["1.0.0", "1.0.0"]);
  });

  test("a meter that is on what is wanted, or newer, is left alone", async () => {
    using scratch = await oldMeter();
    using gateway = await MeterGateway.start(() => {});
    using meter = await Meter.start(scratch.at("device"), gateway.port, () => {});
    for (const wanted of [undefined, "1.0.0", "0.9"]) {
      gateway.wanted = wanted;
      expect(await meter.report()).toBe(false);
    }
  });

  test("messages are as long as LoRa allows, and others are not understood", () => {
    expect(packUplink("1.0.0")).toEqual(Buffer.from("\x04\x05\x061.0.0"));
    expect(packUplink("1".repeat(100))).toHaveLength(MAX_MESSAGE);
    expect(unpackUplink(Buffer.from("\x04\x05\x061.0.0"))).toBe("1.0.0");
    expect(unpackUplink(Buffer.from("\x04\x05"))).toBeUndefined();
    expect(unpackUplink(Buffer.from("\x01\x02\x03"))).toBeUndefined();
  });
});

// ──── The transport ─────────────────────────────────────────────────────────────────────────────

const BAD_WEATHER: ChannelOptions = { loss: 0.3, twice: 0.15, late: 0.3 };
const SEED = seeded("examples");
const SEEDS = Array.from({ length: 4 }, (_, i) => (SEED + i) % 2 ** 32);
const FAST = { wait: 0.03, tries: 40 };
/** Seconds after which what is not here is lost, where nothing is: nobody asks again before that. */
const LONG = 30;

/** A device that was brought to 1.0.0 of a release root by an SD card. */
async function oldMeter(releases = RELEASES): Promise<Temp> {
  const scratch = new Temp();
  for (const name of ["1.0.0", "firmware_1.0.0.bin"]) {
    cpSync(join(releases, name), scratch.at(`card/${name}`), { recursive: true });
  }
  mkdirSync(scratch.at("device"));
  await new DirectoryOTA(scratch.at("card"), { root: scratch.at("device") }).update();
  return scratch;
}

/** A server, a gateway and a channel to it, with a device beside them. */
class Rig implements AsyncDisposable {
  private constructor(
    readonly server: Served,
    readonly gateway: Gateway,
    readonly channel: LossyChannel,
    readonly root: string,
  ) {}

  static async start(
    releases: string,
    root: string,
    channel: ChannelOptions = {},
    key?: string,
  ): Promise<Rig> {
    const server = await Served.start(releases, key === undefined ? {} : { sign: key });
    const gateway = await Gateway.start(new HttpOTA(server.url, { root }));
    return new Rig(server, gateway, await LossyChannel.open(gateway.port, channel), root);
  }

  device(options: Partial<LoraOptions> = {}): LoraOTA {
    return new LoraOTA(this.channel.gateway, { root: this.root, ...FAST, ...options });
  }

  async update(options: Partial<LoraOptions> = {}): Promise<Outcome> {
    const outcome = await this.device(options).update();
    for (const { messages, longest } of [this.channel.up, this.channel.down]) {
      expect(messages).toBeGreaterThan(0);
      expect(longest).toBeLessThanOrEqual(200);
    }
    return outcome;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.channel[Symbol.dispose]();
    this.gateway[Symbol.dispose]();
    await this.server[Symbol.asyncDispose]();
  }
}

async function failure(promise: Promise<unknown>): Promise<OTAError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (error instanceof OTAError) return error;
  throw new Error(`expected it to fail with a message for people, found ${String(error)}`);
}

async function read(data: TransferResponse): Promise<Uint8Array> {
  return new Uint8Array(await new Response(data.body).arrayBuffer());
}

/** A root with one release of one file that does not get smaller. */
function bigRelease(size: number, seed: number): Temp {
  return new Temp({ "1.0.0/big.bin": noise(size, seed) });
}

describe("lora-transport.ts", () => {
  test("takes the meter to the new release in a handful of messages", async () => {
    using scratch = await oldMeter();
    await using rig = await Rig.start(RELEASES, scratch.at("device"));
    const outcome = await rig.update({ wait: LONG });
    expect(outcome).toMatchObject({ result: "updated", from: "1.0.0", to: "1.0.1" });
    expect(outcome.firmware).toEqual({ from: "1.0.0", to: "1.0.1" });
    expect(filesOf(rig.root)).toEqual(deviceOn(join(RELEASES, "1.0.1"), "1.0.1"));
    // All came in the manifest, for one message up: nothing was lost.
    expect(rig.channel.up.messages).toBe(1);
    expect(rig.channel.down.messages).toBeLessThan(10);
    const requests = rig.server.requests.length;
    const { up, down } = await measure({ plain: true, wait: LONG });
    expect([requests, up.messages]).toEqual([1, 9]);
    expect(down.messages).toBeGreaterThan(3 * rig.channel.down.messages);
    expect(await rig.update()).toMatchObject({ result: "up to date", to: "1.0.1" });
  });

  test("a small change in a large file is one message", async () => {
    const old = noise(100_000, 1);
    const changed = old.with(50_000, old[50_000]! ^ 1);
    using releases = new Temp({
      "1.0.0/flash/data.bin": old,
      "1.0.1/flash/data.bin": changed,
      "firmware_1.0.0.bin": "image",
    });
    using scratch = await oldMeter(releases.path);
    await using rig = await Rig.start(releases.path, scratch.at("device"));
    await rig.update({ wait: LONG });
    expect(filesOf(rig.root)).toEqual(deviceOn(releases.at("1.0.1"), "1.0.1"));
    expect(rig.channel.up.messages).toBe(2);
    expect(rig.channel.down.messages).toBeLessThanOrEqual(4);
  });

  test.concurrent.each(SEEDS)("loss, duplication and reordering, seed %i", async (seed) => {
    using scratch = await oldMeter();
    await using rig = await Rig.start(RELEASES, scratch.at("device"), { ...BAD_WEATHER, seed });
    expect(await rig.update()).toMatchObject({ result: "updated", to: "1.0.1" });
    expect(filesOf(rig.root)).toEqual(deviceOn(join(RELEASES, "1.0.1"), "1.0.1"));
  });

  test.concurrent.each(SEEDS.slice(0, 2))(
    "content of several hundred messages, seed %i",
    async (seed) => {
      using releases = bigRelease(60_000, seed);
      using device = new Temp();
      await using rig = await Rig.start(releases.path, device.path, { ...BAD_WEATHER, seed });
      // Long enough for a busy machine: who asks too soon asks more often.
      await rig.update({ wait: 0.5 });
      expect(filesOf(rig.root)).toEqual(filesBelow(releases.at("1.0.0")));
      const { up, down } = rig.channel;
      // 311 fragments, of which 3 in 10 are lost, each time; MORE says at once what is missing.
      expect(down.messages).toBeLessThan(311 * 2);
      expect(up.messages).toBeLessThan(311 / 4);
    },
  );

  test.each([
    ["nothing is lost", {}],
    ["everything comes twice", { twice: 1 }],
    ["everything is late", { late: 1 }],
  ])("each window costs one message up when %s", async (_, channel) => {
    using releases = bigRelease(60_000, 1);
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path, channel);
    await rig.update({ wait: LONG });
    expect(filesOf(rig.root)).toEqual(filesBelow(releases.at("1.0.0")));
    // The manifest, and five windows of 64 fragments. Nor did it wait for more, as it would have
    // asked again then: what is whole is known to be.
    expect(rig.channel.up.messages).toBe(1 + 5);
    expect(rig.channel.down.messages).toBeLessThanOrEqual(4 + 312);
  });

  test("what fits in one message comes in one, without a tag", async () => {
    using releases = bigRelease(170, 1);
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    const ota = rig.device({ wait: LONG });
    await ota.connect();
    const signal = new AbortController().signal;
    const data = await ota.getData("/1.0.0/big.bin", { signal });
    expect(data).toMatchObject({ encoding: "identity", offset: 0, total: 170 });
    expect(data.etag).toBeUndefined();
    expect(await read(data)).toEqual(noise(170, 1));
    expect([rig.channel.up.messages, rig.channel.down.messages]).toEqual([1, 1]);
  });

  test("a request longer than one datagram arrives in fragments", async () => {
    const id = Buffer.from(noise(500, 2)).toString("hex");
    using device = new Temp();
    using releases = new Temp({ "1.0.0/main.py": "print(1)\n" });
    await using rig = await Rig.start(releases.path, device.path, { ...BAD_WEATHER, seed: 5 });
    expect(await rig.update({ id })).toMatchObject({ result: "updated", to: "1.0.0" });
    expect(rig.channel.up.longest).toBe(200);
    expect(rig.server.lines[0]).toContain(`device=${id.slice(0, 32)}`);
  });

  test("a signature passes, and another does not", async () => {
    const keys = makeKeys();
    using files = new Temp({ key: keys.key, pub: keys.pub, other: makeKeys().pub });
    using releases = new Temp({ "1.0.0/main.py": "print(1)\n" });
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path, BAD_WEATHER, files.at("key"));
    const other = rig.update({ verify: [readKey(files.at("other"), "public")] });
    expect((await failure(other)).message).toContain("none of the keys given signed it");
    const outcome = await rig.update({ verify: [readKey(files.at("pub"), "public")] });
    expect(outcome.result).toBe("updated");
  });

  test("one more update of the same device finds nothing newer", async () => {
    using releases = new Temp({ "1.0.0/main.py": "print(1)\n" });
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    const ota = rig.device();
    expect((await ota.update()).result).toBe("updated");
    expect((await ota.update()).result).toBe("up to date");
  });

  test("works from a directory of releases, without a server", async () => {
    using releases = new Temp({ "1.0.0/main.py": "print(1)\n" });
    using device = new Temp();
    const source = new DirectoryOTA(releases.path, { root: device.path });
    await source.connect();
    using gateway = await Gateway.start(source);
    using channel = await LossyChannel.open(gateway.port, BAD_WEATHER);
    await new LoraOTA(channel.gateway, { root: device.path, ...FAST }).update();
    expect(filesOf(device.path)).toEqual(filesBelow(releases.at("1.0.0")));
  });
});

describe("lora-transport.ts, when the channel is bad", () => {
  test("a gateway that was never heard ends in a clear error, soon", async () => {
    using scratch = await oldMeter();
    await using rig = await Rig.start(RELEASES, scratch.at("device"));
    rig.channel.isDead = true;
    const before = filesOf(rig.root);
    const error = await failure(rig.update({ wait: 0.02, tries: 10 }));
    expect(error.message).toMatch(/^the gateway at 127\.0\.0\.1:\d+ is silent: asked it 10 times/);
    expect(error.message).toEndWith("is it running, and in reach?");
    expect(filesOf(rig.root)).toEqual(before);
    await eventually("all were sent", () => rig.channel.up.messages === 10);
  });

  test("a port where nobody listens does, too", async () => {
    using device = new Temp();
    using channel = await LossyChannel.open(1);
    const gone = { address: "127.0.0.1", port: channel.gateway.port };
    channel[Symbol.dispose]();
    const ota = new LoraOTA(gone, { root: device.path, wait: 0.02, tries: 5 });
    expect((await failure(ota.update())).message).toContain("is silent");
  });

  test("silence in the middle of a body ends it, soon", async () => {
    using releases = bigRelease(60_000, 1);
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    // A second, in which a busy machine answers, too.
    const ota = rig.device({ wait: 0.1, tries: 10 });
    await ota.connect();
    const signal = new AbortController().signal;
    const data = await ota.getData("/1.0.0/big.bin", { signal });
    rig.channel.isDead = true;
    const error = await read(data).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(TransferError);
    // It was there: OTA is to try again.
    expect(error).toMatchObject({ retry: true });
  });

  test("what came before a silence is not sent again", async () => {
    using releases = bigRelease(60_000, 1);
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    let isOver = false;
    const fail = (event: { kind: string; received?: number }) => {
      // Silence, until the device has noticed.
      if (event.kind === "note") rig.channel.isDead = false;
      if (event.kind !== "progress" || event.received! < 30_000 || isOver) return;
      rig.channel.isDead = isOver = true;
    };
    await rig.update({ wait: 0.25, tries: 4, report: fail });
    expect(isOver).toBe(true);
    expect(filesOf(rig.root)).toEqual(filesBelow(releases.at("1.0.0")));
    // On a busy machine, there may be more silence than ours.
    const { path, status, bytes } = rig.server.requests.at(-1)!;
    expect([path, status]).toEqual(["/1.0.0/big.bin", 206]);
    expect(bytes).toBeLessThan(31_000);
  });

  test("an end from outside is prompt", async () => {
    using device = new Temp();
    await using rig = await Rig.start(RELEASES, device.path);
    rig.channel.isDead = true;
    // What waits for the answer waits longer than a test may take.
    const update = rig.device({ wait: 3600, signal: AbortSignal.timeout(100) }).update();
    await expect(update).rejects.toThrow();
  });

  test("what the server refuses is told as the server has it", async () => {
    using releases = new Temp({ "1.0.0/main.py": "print(1)\n" });
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    const ota = rig.device();
    await ota.connect();
    const signal = new AbortController().signal;
    const error = await failure(ota.getData("/1.0.0/none.py", { signal }));
    expect(error.message).toBe(`${rig.server.url}/1.0.0/none.py answered 404`);
    expect(error).toMatchObject({ retry: false });
  });

  test("datagrams of others do no harm", async () => {
    using releases = bigRelease(5_000, 1);
    using device = new Temp();
    await using rig = await Rig.start(releases.path, device.path);
    const random = new Random(9);
    const stranger = await Bun.udpSocket({ hostname: "127.0.0.1" });
    for (let i = 0; i < 300; i++) {
      const datagram = noise(random.below(250), random.below(2 ** 32));
      if (datagram.length > 0) datagram[0] = random.below(5);
      stranger.send(datagram, rig.gateway.port, "127.0.0.1");
      if (i % 50 === 0) await Bun.sleep(1);
    }
    stranger.close();
    await rig.update();
    expect(filesOf(rig.root)).toEqual(filesBelow(releases.at("1.0.0")));
  });
});

describe("lora-transport.ts, run", () => {
  /** The messages in a line of the table. */
  const counts = (stdout: string, title: string): number[] => {
    const line = stdout.split("\n").find((one) => one.trim().startsWith(title)) ?? "";
    return [...line.matchAll(/(?:up|down) +(\d+)/g)].map(([, count]) => Number(count));
  };

  test("tells what the update took", async () => {
    const { code, stdout, stderr } = await run("lora-transport.ts");
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toContain("updated 1.0.0 -> 1.0.1, firmware 1.0.0 -> 1.0.1");
    const [up, down] = counts(stdout, "this update");
    const [, plain] = counts(stdout, "plain");
    expect(up).toBeGreaterThan(0);
    expect(down).toBeGreaterThan(0);
    expect(down).toBeLessThan(plain!);
  });

  test("takes the loss and a seed", async () => {
    const { code, stdout } = await run("lora-transport.ts", ["--loss", "0.2", "--seed", "7"]);
    expect(code).toBe(0);
    expect(stdout).toContain("20 % are lost");
    expect(stdout).toContain("seed 7");
    const [up, down] = counts(stdout, "this update");
    const [cleanUp, cleanDown] = counts(stdout, "the same, nothing lost");
    expect(up! + down!).toBeGreaterThan(cleanUp! + cleanDown!);
  });

  test.each(["--loss=1", "--loss=x", "--seed=x", "--other"])("refuses %s", async (argument) => {
    const { code, stdout, stderr } = await run("lora-transport.ts", [argument]);
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toStartWith("usage: ");
  });
});

describe("the channel", () => {
  test("repeats its choices for a seed", async () => {
    const sizes: number[][] = [];
    for (const seed of [3, 3, 4]) {
      const got: number[] = [];
      const last = Promise.withResolvers<void>();
      const far = await Bun.udpSocket({
        hostname: "127.0.0.1",
        socket: {
          data(_, { length }) {
            if (length === 99) last.resolve();
            else got.push(length);
          },
        },
      });
      using channel = await LossyChannel.open(far.port, { loss: 0.4, seed });
      const { address, port } = channel.gateway;
      const near = await Bun.udpSocket({ hostname: "127.0.0.1" });
      for (let size = 1; size <= 40; size++) near.send(new Uint8Array(size), port, address);
      await eventually("all went through", () => channel.up.messages === 40);
      // What is sent now comes after them.
      near.send(new Uint8Array(99), far.port, "127.0.0.1");
      await last.promise;
      const up: Sent = { messages: 40, bytes: 820, longest: 40 };
      expect(channel.up).toEqual(up);
      near.close();
      far.close();
      sizes.push(got);
    }
    expect(sizes[0]).toEqual(sizes[1]!);
    expect(sizes[0]).not.toEqual(sizes[2]!);
    expect(sizes[0]!.length).toBeLessThan(40);
  });
});
