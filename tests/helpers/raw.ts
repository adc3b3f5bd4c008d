/**
 * HTTP below `fetch`: bytes out, bytes in, and whether the server closed the connection. For
 * tests of requests that no HTTP client would send, and of what a client would hide.
 */

import { connect, createServer } from "node:net";

/** What came back on one connection. */
export interface RawResponse {
  /** Everything the server sent. */
  bytes: Uint8Array;
  /** Whether the server closed the connection before the time was up. */
  closed: boolean;
  /** Why it closed, when that was not an orderly close: `ECONNRESET` and its like. */
  error?: string;
}

/** What `rawRequest` can be told. */
export interface RawOptions {
  /** How long to wait for the server to close, in milliseconds (60,000). */
  timeoutMs?: number;
  /** Close our sending side after the request, as a client that has nothing more to say. */
  halfClose?: boolean;
}

/**
 * Send bytes to a server as they are and take all that it answers, until it closes the connection
 * or the time is up, whichever is first.
 *
 * @param server Its URL; only host and port count.
 * @param data What to send; a text is sent as UTF-8. Nothing is added to it.
 * @throws {Error} When no connection can be made.
 */
export function rawRequest(
  server: URL | string,
  data: string | Uint8Array,
  { timeoutMs = 300_000, halfClose = false }: RawOptions = {},
): Promise<RawResponse> {
  const { host, port } = addressOf(server);
  return new Promise((resolve, reject) => {
    const chunks: Uint8Array[] = [];
    let connected = false;
    const socket = connect({ host, port });
    const finish = (closed: boolean, error?: string): void => {
      clearTimeout(timer);
      socket.destroy();
      const bytes = new Uint8Array(Buffer.concat(chunks));
      resolve(error === undefined ? { bytes, closed } : { bytes, closed, error });
    };
    const timer = setTimeout(() => {
      if (connected) return finish(false);
      socket.destroy();
      reject(new Error(`no connection to ${host}:${port} within ${timeoutMs} ms`));
    }, timeoutMs);
    socket.on("connect", () => {
      connected = true;
      if (halfClose) socket.end(data);
      else socket.write(data);
    });
    socket.on("data", (chunk: Uint8Array) => chunks.push(chunk));
    socket.on("end", () => finish(true));
    socket.on("close", () => finish(true));
    socket.on("error", (error: NodeJS.ErrnoException) => {
      if (connected) return finish(true, error.code ?? error.message);
      clearTimeout(timer);
      reject(error);
    });
  });
}

/** Host and port of a server as a socket wants them, from its URL. */
export function addressOf(server: URL | string): { host: string; port: number } {
  const url = new URL(server);
  return {
    host: url.hostname.replace(/^\[(.*)\]$/, "$1"),
    port: Number(url.port || (url.protocol === "https:" ? 443 : 80)),
  };
}

/** A response taken apart. */
export interface ParsedResponse {
  status: number;
  headers: Headers;
  /** Bytes up to the body: status line, headers and the blank line. */
  headerLength: number;
  /** Everything after the header, as it is: still chunked if it was, further responses included. */
  body: Uint8Array;
}

/**
 * Take the first response in some bytes apart, strictly: lines end in CR LF, every header line has
 * a name and a colon.
 *
 * @throws {Error} When the bytes do not begin with an HTTP/1 response; the message shows them.
 */
export function parseResponse(bytes: Uint8Array): ParsedResponse {
  const text = Buffer.from(bytes).toString("latin1");
  const end = text.indexOf("\r\n\r\n");
  const [statusLine = "", ...lines] = text.slice(0, Math.max(end, 0)).split("\r\n");
  const status = /^HTTP\/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?$/.exec(statusLine)?.[1];
  if (status === undefined)
    throw new Error(`expected an HTTP/1 response, found ${JSON.stringify(text.slice(0, 200))}`);
  const headers = new Headers();
  for (const line of lines) {
    const [, name, value] = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*)$/.exec(line) ?? [];
    if (name === undefined || value === undefined)
      throw new Error(`expected a header line, found ${JSON.stringify(line)}`);
    headers.append(name, value);
  }
  const headerLength = end + 4;
  return { status: Number(status), headers, headerLength, body: bytes.slice(headerLength) };
}

/** How a request is sent. */
export interface Sent {
  method?: string;
  version?: "1.0" | "1.1";
  /** `null` sends none; else `device.test` is the default. */
  host?: string | null;
  /** By name, or lines as they are. */
  headers?: Record<string, string> | readonly string[];
}

/** One request on a connection of its own, its answer taken apart; the target is sent as it is. */
export async function sendRequest(
  server: { url: URL | string } | string,
  target: string,
  { method = "GET", version = "1.1", host = "device.test", headers = {} }: Sent = {},
): Promise<ParsedResponse> {
  const fields = Object.entries(headers).map(([name, value]) => `${name}: ${value}`);
  const lines = [
    `${method} ${target} HTTP/${version}`,
    ...(host === null ? [] : [`Host: ${host}`]),
    ...(version === "1.1" ? ["Connection: close"] : []),
    ...(Array.isArray(headers) ? headers : fields),
  ];
  const url = typeof server === "string" ? server : server.url;
  const { bytes, closed, error } = await rawRequest(url, `${lines.join("\r\n")}\r\n\r\n`);
  if (!closed || error !== undefined) {
    throw new Error(`${method} ${target}: ${error ?? "the connection was not closed"}`);
  }
  return parseResponse(bytes);
}

/**
 * A port that nobody has just now, for a program that cannot pick one, and for one that goes and
 * comes back. It is none of those that the system hands out: among thousands of connections, one
 * would soon have it.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 12_000 + Math.floor(Math.random() * 20_000);
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const server = createServer();
    server.once("error", () => resolve(false));
    server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
    if (await promise) return port;
  }
}
