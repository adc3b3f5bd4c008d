/**
 * The double of a deployed board (helpers/board.ts) and the raw client under it (helpers/raw.ts),
 * proved against a TCP server made by hand: other tests lean on them.
 */

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createServer, type Server, type Socket } from "node:net";
import { boardGet, boardUpdate, readAsBoard } from "./helpers/board.ts";
import { parseResponse, rawRequest } from "./helpers/raw.ts";

setDefaultTimeout(600_000);

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const text = (data: Uint8Array): string => new TextDecoder().decode(data);
const join = (...parts: Uint8Array[]): Uint8Array => new Uint8Array(Buffer.concat(parts));
const sha1 = (data: Uint8Array): string => new Bun.CryptoHasher("sha1").update(data).digest("hex");

/** 1000 bytes, none of them text: 0x80 to 0xff, over and over. */
const binary = Uint8Array.from({ length: 1000 }, (_, i) => 128 + (i % 128));

/** A response whose status line, headers and blank line have exactly `length` bytes. */
function response(length: number, body: Uint8Array, status = "200 OK"): Uint8Array {
  const start = `HTTP/1.0 ${status}\r\nX-Pad: `;
  return join(bytes(`${start.padEnd(length - 4, "x")}\r\n\r\n`), body);
}

let servers: Server[] = [];
let sockets: Socket[] = [];

afterEach(() => {
  for (const socket of sockets) socket.destroy();
  for (const server of servers) server.close();
  servers = [];
  sockets = [];
});

/** A server on a free port that hands the first bytes of each connection to `answer`. */
async function listen(answer: (socket: Socket, request: string) => void): Promise<string> {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.push(socket);
    socket.on("error", () => {});
    socket.once("data", (data: Uint8Array) => answer(socket, text(data)));
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  if (address === null || typeof address === "string") throw new Error("expected a TCP port");
  return `http://127.0.0.1:${address.port}`;
}

const always = (stream: Uint8Array): Promise<string> => listen((socket) => void socket.end(stream));

describe("boardGet", () => {
  test("sends HTTP/1.0 with a Host header, and nothing else", async () => {
    let got = "";
    const server = await listen((socket, request) => {
      got = request;
      socket.end(response(100, bytes("content")));
    });
    const { header, body, raised } = await boardGet(server, "/1.0.1/flash/a%20b.py?x=1");
    const host = new URL(server).host;
    expect(got).toBe(`GET /1.0.1/flash/a%20b.py?x=1 HTTP/1.0\r\nHost: ${host}\r\n\r\n`);
    expect(header).toStartWith("HTTP/1.0 200 OK\r\nX-Pad: xxx");
    expect(header).toHaveLength(96);
    expect(text(body)).toBe("content");
    expect(raised).toBeUndefined();
  });

  for (const length of [100, 200, 500]) {
    test(`a header of ${length} bytes: a binary body arrives whole`, async () => {
      const { body, raised } = await boardGet(await always(response(length, binary)), "/x");
      expect(raised).toBeUndefined();
      expect(body).toEqual(binary);
    });
  }

  test("a header of 160 bytes: a binary body makes it raise", async () => {
    const got = await boardGet(await always(response(160, binary)), "/x");
    expect(got.raised).toBe("UnicodeError");
    expect(got.body).toHaveLength(0);
    expect(got.header).toHaveLength(156);
  });

  test("a header of 160 bytes: text in the shared piece loses what follows a blank line", async () => {
    const body = bytes(`one\r\n\r\ntwo${"-".repeat(30)}three`);
    const got = await boardGet(await always(response(160, body)), "/x");
    expect(got.raised).toBeUndefined();
    expect(text(got.body)).toBe("onethree");
  });

  test("a header of 160 bytes: plain text arrives whole", async () => {
    const body = bytes("text without blank lines\n".repeat(20));
    expect((await boardGet(await always(response(160, body)), "/x")).body).toEqual(body);
  });

  for (const length of [101, 102, 103, 301]) {
    test(`a header of ${length} bytes, its end in two pieces: the file is empty`, async () => {
      const got = await boardGet(await always(response(length, bytes("content"))), "/x");
      expect(got).toEqual({ header: "", body: new Uint8Array() });
    });
  }

  test("a blank line in a later piece passes for the end of a header that was missed", async () => {
    const body = bytes(`${"a".repeat(150)}\r\n\r\nrest`);
    expect(text((await boardGet(await always(response(102, body)), "/x")).body)).toBe("rest");
  });

  test("a letter that the piece cuts in two makes it raise", async () => {
    const whole = bytes(`${"a".repeat(38)}\u00e9`);
    const cut = bytes(`${"a".repeat(39)}\u00e9`);
    expect((await boardGet(await always(response(160, whole)), "/x")).body).toEqual(whole);
    expect((await boardGet(await always(response(160, cut)), "/x")).raised).toBe("UnicodeError");
  });

  test("a byte order mark is content", async () => {
    const body = bytes("\ufeffprint()");
    expect((await boardGet(await always(response(160, body)), "/x")).body).toEqual(body);
  });

  test("the status is ignored: an error's text is content", async () => {
    const got = await boardGet(await always(response(160, bytes("no"), "404 Not Found")), "/x");
    expect(text(got.body)).toBe("no");
  });

  test("an empty body, and no response at all", async () => {
    expect((await boardGet(await always(response(100, bytes(""))), "/x")).body).toHaveLength(0);
    expect(await boardGet(await always(bytes("")), "/x")).toEqual({
      header: "",
      body: new Uint8Array(),
    });
  });

  test("pieces do not depend on how the bytes happen to arrive", async () => {
    const server = await listen(async (socket) => {
      for (const part of [response(200, binary).slice(0, 130), response(200, binary).slice(130)]) {
        socket.write(part);
        await Bun.sleep(20);
      }
      socket.end();
    });
    expect((await boardGet(server, "/x")).body).toEqual(binary);
  });

  test("other pieces: the network decides what shares a piece", async () => {
    const server = await always(response(200, binary));
    // 198 + 2: the header's end is in two pieces. 150 + 100: header and body share one.
    expect((await boardGet(server, "/x", { pieces: [100, 98, 2] })).body).toHaveLength(0);
    expect((await boardGet(server, "/x", { pieces: [50] })).raised).toBe("UnicodeError");
    expect((await boardGet(server, "/x", { pieces: [60, 60, 80, 1, 7] })).body).toEqual(binary);
    for (const size of [0, 101, 1.5])
      expect(() => readAsBoard(binary, [size])).toThrow("a piece has 1 to 100 bytes");
  });

  test("a server that does not close is an error", async () => {
    const server = await listen((socket) => void socket.write(response(100, binary)));
    await expect(boardGet(server, "/x", { timeoutMs: 100 })).rejects.toThrow("did not close");
  });
});

describe("boardUpdate", () => {
  const oldMain = bytes("print('old')");
  const newMain = bytes("print('new')");
  const asset = binary.slice(0, 333);
  const board = (): Map<string, Uint8Array> =>
    new Map([
      ["flash/main.py", oldMain],
      ["flash/lib/gone.py", bytes("gone")],
      ["flash/log.txt", bytes("of the application")],
    ]);

  /** One release, 1.0.1, with parts of its manifest replaced. */
  async function release(changes: Record<string, unknown> | null = {}): Promise<string> {
    const manifest = changes && {
      delete: ["flash/lib/gone.py"],
      firmware: { URL: "http://elsewhere.example/firmware_1.0.1.bin", hash: "not compared" },
      new: [
        {
          URL: "http://elsewhere.example:1/1.0.1/flash/lib/an%20asset.bin",
          dst_path: "/flash/lib/an asset.bin",
          hash: sha1(asset),
        },
      ],
      previous_version: "1.0.0",
      update: [
        {
          URL: "https://elsewhere.example/1.0.1/flash/main.py",
          dst_path: "/flash/main.py",
          hash: sha1(newMain),
        },
      ],
      version: "1.0.1",
      ...changes,
    };
    const contents = new Map([
      ["/manifest.json?current_ver=1.0.0", bytes(JSON.stringify(manifest))],
      ["/1.0.1/flash/lib/an%20asset.bin", asset],
      ["/1.0.1/flash/main.py", newMain],
      ["/firmware_1.0.1.bin", binary],
    ]);
    return listen((socket, request) => {
      const content = contents.get(request.split(" ")[1] ?? "");
      socket.end(response(100, content ?? bytes("no"), content ? "200 OK" : "404 Not Found"));
    });
  }

  const entry = (path: string, changes: Record<string, unknown> = {}): unknown => ({
    URL: "http://h/1.0.1/flash/main.py",
    dst_path: path,
    hash: sha1(newMain),
    ...changes,
  });

  test("replaces, adds, deletes, flashes, records the version", async () => {
    const before = board();
    const after = await boardUpdate(await release(), "1.0.0", before);
    expect(after).toEqual({
      version: "1.0.1",
      firmware: binary,
      files: new Map([
        ["flash/main.py", newMain],
        ["flash/lib/an asset.bin", asset],
        ["flash/log.txt", bytes("of the application")],
      ]),
    });
    expect(before).toEqual(board());
  });

  test("null is no update", async () => {
    const after = await boardUpdate(await release(null), "1.0.0", board());
    expect(after).toEqual({ version: "1.0.0", files: board() });
  });

  test("without firmware there is none", async () => {
    const after = await boardUpdate(await release({ firmware: undefined }), "1.0.0", board());
    expect(after.version).toBe("1.0.1");
    expect(after).not.toHaveProperty("firmware");
  });

  test("firmware that is not there is flashed all the same: an error's text", async () => {
    const firmware = { URL: "http://h/firmware_9.bin", hash: sha1(binary) };
    const after = await boardUpdate(await release({ firmware }), "1.0.0", board());
    expect(after.firmware).toEqual(bytes("no"));
  });

  test("an empty board has the directory flash", async () => {
    const changes = { delete: [], update: [], new: [entry("/flash/main.py")] };
    const after = await boardUpdate(await release(changes), "1.0.0", new Map());
    expect([...after.files.keys()]).toEqual(["flash/main.py"]);
  });

  const failures: [title: string, changes: Record<string, unknown>, message: string][] = [
    ["a wrong hash", { new: [entry("/flash/x", { hash: "0" })] }, "expected SHA-1 0, found"],
    ["a file that the server lacks", { new: [entry("/flash/x", { URL: "http://h/y" })] }, "SHA-1"],
    ["a new directory", { new: [entry("/flash/lib/net/x")] }, "no directory for /flash/lib/net/x"],
    ["a delete of what is not there", { delete: ["flash/no.py"] }, "no file flash/no.py"],
    ["a delete with a slash in front", { delete: ["/flash/main.py"] }, "without a slash"],
    ["an update of what is not there", { update: [entry("/flash/no.py")] }, "no file flash/no.py"],
    ["a path without a slash", { new: [entry("flash/x")] }, "expected a path from the root"],
    ["no list of deletes", { delete: undefined }, "expected a list at delete"],
    ["no version", { version: undefined }, "expected a text at version"],
  ];
  for (const [title, changes, message] of failures) {
    test(`raises on ${title}`, async () => {
      const server = await release(changes);
      await expect(boardUpdate(server, "1.0.0", board())).rejects.toThrow(message);
    });
  }

  for (const [title, stream] of [
    ["lost in an unaligned header", response(102, bytes("null"))],
    ["behind a byte order mark", response(100, bytes("\ufeffnull"))],
  ] as const) {
    test(`raises where the manifest is ${title}`, async () => {
      const server = await always(stream);
      await expect(boardUpdate(server, "1.0.0", board())).rejects.toThrow("JSON");
    });
  }
});

describe("rawRequest", () => {
  test("sends bytes as they are", async () => {
    const server = await listen((socket, request) => void socket.end(request));
    const got = await rawRequest(server, "\u00e9 \r\n\0");
    expect(got).toEqual({ bytes: bytes("\u00e9 \r\n\0"), closed: true });
    expect((await rawRequest(server, bytes("x"))).bytes).toEqual(bytes("x"));
  });

  test("tells a connection that stays open", async () => {
    const server = await listen((socket) => void socket.write("so far"));
    const got = await rawRequest(server, "x", { timeoutMs: 3000 });
    expect(got).toEqual({ bytes: bytes("so far"), closed: false });
  });

  test("closes its sending side only when asked to", async () => {
    const server = await listen((socket) => {
      socket.write("a");
      socket.on("end", () => void socket.end("b"));
    });
    const halfClosed = await rawRequest(server, "x", { halfClose: true });
    expect(halfClosed).toEqual({ bytes: bytes("ab"), closed: true });
    const open = await rawRequest(server, "x", { timeoutMs: 3000 });
    expect(open).toEqual({ bytes: bytes("a"), closed: false });
  });

  test("a reset is a close, with its reason", async () => {
    const server = await listen((socket) => void socket.resetAndDestroy());
    const got = await rawRequest(server, "x");
    expect(got).toEqual({ bytes: new Uint8Array(), closed: true, error: "ECONNRESET" });
  });

  test("a large response arrives whole", async () => {
    const large = new Uint8Array(5_000_000).map((_, i) => i % 251);
    const got = await rawRequest(await always(large), "x");
    expect(sha1(got.bytes)).toBe(sha1(large));
  });

  test("no connection is an error", async () => {
    const server = await always(bytes(""));
    const closed = new Promise((resolve) => servers.pop()?.close(resolve));
    await closed;
    await expect(rawRequest(server, "x")).rejects.toThrow();
  });
});

describe("parseResponse", () => {
  test("takes a response apart", () => {
    const header =
      "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-1/9\r\nX-A: 1\r\nx-a:2\r\n";
    const got = parseResponse(join(bytes(`${header}\r\n`), binary));
    expect(got.status).toBe(206);
    expect(got.headers.get("content-range")).toBe("bytes 0-1/9");
    expect(got.headers.get("x-a")).toBe("1, 2");
    expect(got.headerLength).toBe(header.length + 2);
    expect(got.body).toEqual(binary);
  });

  test("without headers", () => {
    const got = parseResponse(bytes("HTTP/1.0 200 OK\r\n\r\n"));
    expect([got.status, got.headerLength, got.body.length]).toEqual([200, 19, 0]);
  });

  for (const wrong of ["", "HTTP/1.1 200 OK\r\n", "HTTP/2 200\r\n\r\n", "hello\r\n\r\n"]) {
    test(`refuses ${JSON.stringify(wrong)}`, () => {
      expect(() => parseResponse(bytes(wrong))).toThrow("expected an HTTP/1 response");
    });
  }

  for (const line of ["no colon", "A b: 1", ": 1", "A: 1\nB: 2"]) {
    test(`refuses the header line ${JSON.stringify(line)}`, () => {
      expect(() => parseResponse(bytes(`HTTP/1.1 200 OK\r\n${line}\r\n\r\n`))).toThrow(
        "header line",
      );
    });
  }
});
