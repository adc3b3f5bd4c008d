/**
 * Stands between a device and a real server, as a proxy, a bad line or an attacker does: passes on
 * what is asked, can change what is answered, and keeps both.
 */

import type { Socket } from "node:net";
import { Double, head, type Asked } from "./double.ts";
import { parseResponse, rawRequest, type ParsedResponse } from "./raw.ts";

/** A request that was passed on, and what the server answered. */
export interface Passed {
  asked: Asked;
  answer: ParsedResponse;
}

/** What it does beside passing on. */
export interface Meddling {
  /** Changes the headers that the server gets to see. */
  ask?: (headers: Headers, asked: Asked) => void;
  /** Answers in its own way, and says so by `true`. */
  answer?: (passed: Passed, connection: Socket) => boolean | Promise<boolean>;
}

/** A go-between on a port of its own. */
export class Between implements AsyncDisposable {
  /** What went by, without `reports`. */
  readonly passed: Passed[] = [];
  /**
   * What devices said that they are on, after an update or a rollback: `HEAD` of the manifest. It is
   * answered as the server does: nothing is got by it that would be worth a change.
   */
  readonly reports: Passed[] = [];

  private constructor(
    /** Where it passes on to; exchange it for another server. */
    public server: string,
    /** Exchange it to change what it does. */
    public meddling: Meddling,
    private readonly double: Double,
  ) {}

  static async start(server: { url: string }, meddling: Meddling = {}): Promise<Between> {
    const double = await Double.start(() => {});
    const between = new Between(server.url, meddling, double);
    double.reply = double.report = (asked, connection) => between.#pass(asked, connection);
    return between;
  }

  get url(): string {
    return this.double.url;
  }

  /** What went by for a path below the server's root. */
  of(path: string): Passed[] {
    return this.passed.filter(({ asked }) => asked.path === path);
  }

  /** What went by of content: everything but manifests. */
  get content(): Passed[] {
    return this.passed.filter(({ asked }) => asked.path !== "/manifest.json");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.double[Symbol.asyncDispose]();
  }

  async #pass(asked: Asked, connection: Socket): Promise<void> {
    const headers = new Headers(asked.headers);
    this.meddling.ask?.(headers, asked);
    headers.set("connection", "close");
    const lines = [...headers].map(([name, value]) => `${name}: ${value}\r\n`);
    const request = `${asked.method} ${asked.target} HTTP/1.1\r\n${lines.join("")}\r\n`;
    const { bytes } = await rawRequest(this.server, request).catch(() => {
      return { bytes: new Uint8Array() };
    });
    // The server has gone, maybe in the middle of the header: so do we.
    if (!Buffer.from(bytes).includes("\r\n\r\n")) return void connection.destroy();
    const passed = { asked, answer: parseResponse(bytes) };
    if (asked.method === "HEAD") {
      this.reports.push(passed);
      return void connection.end(bytes);
    }
    this.passed.push(passed);
    if (!(await this.meddling.answer?.(passed, connection))) connection.end(bytes);
  }
}

/** The codings that a device said it takes, in order. */
export function codingsOf({ asked }: Passed): string[] {
  return (asked.headers.get("accept-encoding") ?? "")
    .split(/\s*,\s*/)
    .filter((name) => name !== "");
}

/** Answers with the header as it was and another body, of its own length. */
export function answerOther({ answer }: Passed, connection: Socket, body: Uint8Array): true {
  connection.write(headOf(answer, { "content-length": String(body.byteLength) }));
  connection.end(body);
  return true;
}

/**
 * Answers with the first bytes of the body, and no more: the line breaks.
 *
 * @param arrived waits until the device has them; what it has not taken by then is lost to it
 */
export async function cutOff(
  { answer }: Passed,
  connection: Socket,
  bytes: number,
  arrived?: () => Promise<void>,
): Promise<true> {
  connection.write(headOf(answer));
  connection.write(answer.body.subarray(0, bytes));
  await arrived?.();
  connection.end();
  return true;
}

/** The header of an answer, with some fields changed, and an empty one left out. */
export function headOf(
  { status, headers }: ParsedResponse,
  changes: Record<string, string> = {},
): string {
  const fields = new Headers(headers);
  for (const [name, value] of Object.entries(changes)) fields.set(name, value);
  fields.delete("connection");
  const kept = [...fields].filter(([, value]) => value !== "");
  return head(status, Object.fromEntries(kept));
}
