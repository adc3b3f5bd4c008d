/**
 * A double of a server that says and does what it is told, down to the bytes on the connection, and
 * keeps what it was asked.
 */

import { createServer, type Server, type Socket } from "node:net";
import { sha1, sha256 } from "./content.ts";
import type { Tree } from "./temp.ts";

/** One request. */
export interface Asked {
  method: string;
  /** As it was sent. */
  target: string;
  path: string;
  query: URLSearchParams;
  headers: Headers;
  /** How often this path was asked for before. */
  before: number;
}

/** What answers a request: it writes to the connection what it likes. */
export type Reply = (asked: Asked, connection: Socket) => void | Promise<void>;

/** A server on a port of its own. Every connection carries one request. */
export class Double implements AsyncDisposable {
  /** What was asked for, without `reports`. */
  readonly asked: Asked[] = [];
  /** What devices said that they are on, after an update or a rollback: `HEAD` of the manifest. */
  readonly reports: Asked[] = [];
  /** Exchange it to change how the server behaves. */
  reply: Reply;
  /** Answers who asks what its release consists of, which is not kept in `asked`: not known. */
  list: Reply = (_, connection) => send(connection, "null");
  /** Answers who reports: heard. */
  report: Reply = (_, connection) => void connection.end(head(200));
  readonly #server: Server;
  readonly #connections = new Set<Socket>();

  private constructor(reply: Reply) {
    this.reply = reply;
    this.#server = createServer((connection) => this.#accept(connection));
  }

  static async start(reply: Reply, port = 0): Promise<Double> {
    const double = new Double(reply);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    double.#server.once("error", reject);
    double.#server.listen(port, "127.0.0.1", resolve);
    await promise;
    return double;
  }

  get port(): number {
    const address = this.#server.address();
    if (address === null || typeof address === "string") throw new Error("not listening");
    return address.port;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** The requests for a path. */
  askedFor(path: string): Asked[] {
    return this.asked.filter((asked) => asked.path === path);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const connection of this.#connections) connection.destroy();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#server.close(() => resolve());
    await promise;
  }

  #accept(connection: Socket): void {
    this.#connections.add(connection);
    connection.on("close", () => this.#connections.delete(connection));
    connection.on("error", () => {}); // The client may leave when it likes.
    let head = "";
    const listen = (piece: Uint8Array): void => {
      head += Buffer.from(piece).toString("latin1");
      if (!head.includes("\r\n\r\n")) return;
      connection.off("data", listen);
      connection.resume();
      const [first = "", ...lines] = head.split("\r\n\r\n")[0]!.split("\r\n");
      const [method = "", target = ""] = first.split(" ");
      const { pathname: path, searchParams: query } = new URL(target, "http://double");
      const headers = new Headers(
        lines.map((line) => line.split(/:\s*(.*)/s, 2) as [string, string]),
      );
      const asked = { method, target, path, query, headers, before: this.askedFor(path).length };
      if (query.has("list")) return void this.list(asked, connection);
      if (method === "HEAD") {
        this.reports.push(asked);
        return void this.report(asked, connection);
      }
      this.asked.push(asked);
      void this.reply(asked, connection);
    };
    connection.on("data", listen);
  }
}

/** The head of a response, up to the body. */
export function head(status: number, headers: Record<string, string | number> = {}): string {
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
  return `HTTP/1.1 ${status} Whatever\r\nConnection: close\r\n${lines.join("")}\r\n`;
}

/** Sends a whole response. */
export function send(
  connection: Socket,
  body: string | Uint8Array,
  { status = 200, headers = {} as Record<string, string | number> } = {},
): void {
  const bytes = Buffer.from(body);
  connection.write(head(status, { "Content-Length": bytes.length, ...headers }));
  connection.end(bytes);
}

/** Sends content, or the part of it that is asked for, under a tag. */
export function sendContent(
  asked: Asked,
  connection: Socket,
  content: Uint8Array,
  more: Record<string, string> = {},
): void {
  const tag = `"${sha256(content).slice(0, 16)}"`;
  const from = Number(/^bytes=(\d+)-$/.exec(asked.headers.get("range") ?? "")?.[1] ?? 0);
  const { length } = content;
  if (from === 0 || asked.headers.get("if-range") !== tag) {
    return send(connection, content, { headers: { ETag: tag, ...more } });
  }
  if (from >= length) {
    const headers = { "Content-Range": `bytes */${length}` };
    return send(connection, "there is no more", { status: 416, headers });
  }
  const headers = { ETag: tag, "Content-Range": `bytes ${from}-${length - 1}/${length}`, ...more };
  send(connection, content.subarray(from), { status: 206, headers });
}

/** What a manifest is made of. */
export interface Offer {
  version: string;
  /** Path on the device → content. */
  put: Tree;
  remove?: readonly string[];
  /** Name of the file → content. */
  firmware?: readonly [name: string, content: Uint8Array];
  full?: true;
  /** As Pycom's own server sends it: without sizes and SHA-256. */
  plain?: boolean;
}

/** The manifest for an offer; its URLs are `/content/PATH`. */
export function manifestOf(offer: Offer, url: string): Record<string, unknown> {
  const { version, put, remove = [], firmware, full, plain = false } = offer;
  const hashes = (content: string | Uint8Array) => ({
    hash: sha1(content),
    ...(!plain && { sha256: sha256(content), size: Buffer.from(content).length }),
  });
  return {
    delete: remove,
    ...(firmware && {
      firmware: { URL: `${url}/${firmware[0]}`, ...hashes(firmware[1]) },
    }),
    ...(full && { full }),
    new: Object.entries(put).map(([path, content]) => ({
      URL: `${url}/content/${path}`,
      dst_path: `/${path}`,
      ...hashes(content),
    })),
    ...(!plain && { previous_version: "0" }),
    update: [],
    version,
  };
}

/** Answers as a good server that has this to offer does; after it, `null`. */
export function offering(offer: Offer, url: () => string): Reply {
  return (asked, connection) => {
    if (asked.path === "/manifest.json") {
      const isNewer = asked.query.get("current_ver") !== offer.version;
      return send(connection, JSON.stringify(isNewer ? manifestOf(offer, url()) : null));
    }
    const path = decodeURIComponent(asked.path.slice(1));
    const content =
      offer.firmware?.[0] === path ? offer.firmware[1] : offer.put[path.replace("content/", "")];
    if (content === undefined) return send(connection, "not found", { status: 404 });
    sendContent(asked, connection, Buffer.from(content));
  };
}
