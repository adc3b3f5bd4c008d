#!/usr/bin/env bun
/**
 * The story of Pycom's OTA tutorial, on a desk: a meter that reports over LoRa, a gateway that
 * tells it by a downlink that an update is due, and a van with the update server and a WiFi network
 * for meters to join.
 *
 *     bun examples/lora-meter.ts                        # with a van of its own
 *     bun examples/lora-meter.ts http://10.0.0.7:8000   # a `serve` of smart-meter that runs
 *
 * LoRa is UDP on this machine, the meter's file system is a directory below the temporary one, and
 * joining the van's network is knowing its address. The update is a real one.
 *
 * @module
 */

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  DirectoryOTA,
  HttpOTA,
  LooseVersion,
  OTAError,
  type OTAEvent,
  type Outcome,
  serve,
  status,
} from "../ota.ts";

// ──── Messages ──────────────────────────────────────────────────────────────────────────────────
// What goes over LoRa. The slowest data rate leaves 51 bytes for a message.

/** The most bytes of a message. */
export const MAX_MESSAGE = 51;

/** What every uplink begins with; the version that the meter runs follows, as text. */
export const UPLINK = Buffer.from([4, 5, 6]);

/** The downlink that tells a meter to update. */
export const UPDATE_COMMAND = Buffer.from([1, 2, 3]);

/** An uplink of a meter that runs `version`. */
export function packUplink(version: string): Uint8Array {
  return Buffer.concat([UPLINK, Buffer.from(version)]).subarray(0, MAX_MESSAGE);
}

/** The version in an uplink; `undefined` for any other message. */
export function unpackUplink(message: Uint8Array): string | undefined {
  const isUplink = UPLINK.equals(message.subarray(0, UPLINK.length));
  return isUplink ? Buffer.from(message.subarray(UPLINK.length)).toString() : undefined;
}

function hex(message: Uint8Array): string {
  return Buffer.from(message)
    .toString("hex")
    .replace(/..(?=.)/g, "$& ");
}

/** Tells one line of the story. */
export type Tell = (who: "workshop" | "meter" | "gateway" | "van", what: string) => void;

// ──── Gateway ───────────────────────────────────────────────────────────────────────────────────
// It hears meters, and may answer: a meter listens only for a moment after it has sent.

/** Hears uplinks, and tells meters that are behind to update. */
export class Gateway implements Disposable {
  /** The version that meters should be on; `undefined` as long as that is of no account. */
  wanted: string | undefined;
  /** The versions that were heard of, in their order. */
  readonly heard: string[] = [];
  readonly #tell: Tell;
  #socket: Bun.udp.Socket<"buffer"> | undefined;

  private constructor(tell: Tell) {
    this.#tell = tell;
  }

  /** Starts to listen on this machine. */
  static async start(tell: Tell): Promise<Gateway> {
    const gateway = new Gateway(tell);
    gateway.#socket = await Bun.udpSocket({
      hostname: "127.0.0.1",
      socket: {
        data: (socket, message, port, address) => {
          const downlink = gateway.#answer(message);
          if (downlink) socket.send(downlink, port, address);
        },
      },
    });
    return gateway;
  }

  get port(): number {
    return this.#socket!.port;
  }

  [Symbol.dispose](): void {
    this.#socket?.close();
  }

  /** What to send to a meter that has just sent something; mostly nothing. */
  #answer(message: Uint8Array): Uint8Array | undefined {
    const version = unpackUplink(message);
    if (version === undefined) return undefined;
    this.heard.push(version);
    this.#tell("gateway", `hears a meter on ${version}`);
    if (this.wanted === undefined) return undefined;
    if (new LooseVersion(version).compare(this.wanted) >= 0) return undefined;
    this.#tell("gateway", `wants it on ${this.wanted}: downlink ${hex(UPDATE_COMMAND)}`);
    return UPDATE_COMMAND;
  }
}

// ──── Meter ─────────────────────────────────────────────────────────────────────────────────────
// The device. From one start to the next it knows what is in its directory and nothing else.

/** Milliseconds in which a meter listens after it has sent. */
const LISTEN = 100;
/** What tries a new release on this meter: does it have a program, and is it what it says it is? */
const CHECK = `test -s flash/main.py && grep -qF "'$OTA_VERSION'" flash/OTA_VERSION.py`;

/** A meter, from one start to the next. */
export class Meter implements Disposable {
  /** The release that it runs. */
  readonly version: string;
  readonly #root: string;
  readonly #gatewayPort: number;
  readonly #tell: Tell;
  #socket: Bun.udp.Socket<"buffer"> | undefined;
  /** Takes the downlink that it listens for. */
  #hear: (downlink: Uint8Array) => void = () => {};

  private constructor(root: string, version: string, gatewayPort: number, tell: Tell) {
    this.#root = root;
    this.version = version;
    this.#gatewayPort = gatewayPort;
    this.#tell = tell;
  }

  /**
   * Starts it: ends what a power cut has left of an update, and reads the version anew.
   *
   * @param root its file system
   */
  static async start(root: string, gatewayPort: number, tell: Tell): Promise<Meter> {
    const { version, firmware } = await status(root);
    tell("meter", `starts on ${version}, firmware ${firmware?.version ?? "none"}`);
    const meter = new Meter(root, version ?? "0", gatewayPort, tell);
    meter.#socket = await Bun.udpSocket({
      hostname: "127.0.0.1",
      socket: { data: (_, downlink) => meter.#hear(downlink) },
    });
    return meter;
  }

  [Symbol.dispose](): void {
    this.#socket?.close();
  }

  /**
   * Reports, and listens for a moment.
   *
   * @returns whether an update is due
   */
  async report(): Promise<boolean> {
    const message = packUplink(this.version);
    this.#tell("meter", `uplink ${hex(message)}`);
    const { promise, resolve } = Promise.withResolvers<Uint8Array | undefined>();
    this.#hear = resolve;
    const timer = setTimeout(resolve, LISTEN);
    this.#socket!.send(message, this.#gatewayPort, "127.0.0.1");
    const downlink = await promise;
    clearTimeout(timer);
    return downlink !== undefined && UPDATE_COMMAND.equals(downlink);
  }

  /**
   * Joins the van's network and updates. When that fails, the meter is as it was, and goes on.
   *
   * @param van the address of the update server
   * @returns whether to restart, on another release
   */
  async update(van: string): Promise<boolean> {
    this.#tell("meter", `is told to update, and joins the van at ${van}`);
    const report = (event: OTAEvent) => {
      if (event.kind === "fetched") this.#tell("meter", `has ${event.path}, ${event.size} bytes`);
      if (event.kind === "note") this.#tell("meter", event.text);
    };
    const check = { command: CHECK, timeout: 10 };
    let outcome: Outcome;
    try {
      outcome = await new HttpOTA(van, { root: this.#root, check, report }).update();
    } catch (error) {
      if (!(error instanceof OTAError)) throw error;
      this.#tell("meter", `cannot update: ${error.message}`);
      return false;
    }
    const { result, from, to, traffic } = outcome;
    const cost = traffic ? `, for ${traffic.received} bytes received` : "";
    this.#tell("meter", `${result} ${from} -> ${to}${cost}`);
    return result === "updated";
  }
}

// ──── Story ─────────────────────────────────────────────────────────────────────────────────────

const RELEASES = join(import.meta.dir, "smart-meter");
const OLD = "1.0.0";
const NEW = "1.0.1";
/** Milliseconds between reports; of the meters outside, 15 minutes. */
const INTERVAL = 100;

/** What a meter is when it leaves the workshop: on the old release, installed from an SD card. */
async function makeMeter(root: string, card: string, tell: Tell): Promise<void> {
  for (const name of [OLD, `firmware_${OLD}.bin`]) {
    fs.cpSync(join(RELEASES, name), join(card, name), { recursive: true });
  }
  fs.mkdirSync(root);
  const { to } = await new DirectoryOTA(card, { root }).update();
  tell("workshop", `installs ${to} on a new meter, from an SD card`);
}

/**
 * What a meter does all its life: it reports, and updates when it is told to.
 *
 * @param reports after how many it is left alone here
 * @returns whether to restart, on another release
 */
async function run(meter: Meter, van: string, reports: number): Promise<boolean> {
  for (; reports > 0; reports--) {
    await Bun.sleep(INTERVAL);
    if ((await meter.report()) && (await meter.update(van))) return true;
  }
  return false;
}

/**
 * Lets the story happen.
 *
 * @param scratch where the meter's file system is made
 * @param van the address of the update server
 * @returns whether it ended well
 */
async function story(scratch: string, van: string, tell: Tell): Promise<boolean> {
  const root = join(scratch, "meter");
  await makeMeter(root, join(scratch, "card"), tell);
  using gateway = await Gateway.start(tell);
  {
    using meter = await Meter.start(root, gateway.port, tell);
    await run(meter, van, 1);
    tell("van", `comes to the street, with ${NEW} on board`);
    gateway.wanted = NEW;
    if (!(await run(meter, van, 3))) return false;
  }
  using meter = await Meter.start(root, gateway.port, tell);
  await run(meter, van, 1);
  return gateway.heard.at(-1) === NEW;
}

/** Tells the story, with the van given or one of its own. */
async function main(given: string | undefined): Promise<number> {
  if (given !== undefined && !/^https?:\/\//.test(given)) {
    console.error("usage: bun examples/lora-meter.ts [http://ADDRESS of a serve on smart-meter]");
    return 2;
  }
  const scratch = fs.mkdtempSync(join(tmpdir(), "lora-meter-"));
  const tell: Tell = (who, what) => console.log(`${who.padEnd(9)} ${what}`);
  try {
    await using own =
      given === undefined
        ? await serve({ root: RELEASES, host: "127.0.0.1", port: 0, quiet: 0 })
        : undefined;
    const van = given ?? own!.url.href;
    const isGood = await story(scratch, van, tell);
    console.log(isGood ? `The meter is on ${NEW}.` : `The meter is not on ${NEW}.`);
    return isGood ? 0 : 1;
  } finally {
    fs.rmSync(scratch, { recursive: true });
  }
}

if (import.meta.main) process.exitCode = await main(Bun.argv[2]);
