/**
 * The double of a deployed board (helpers/board.ts) stumbles where boards do. A double that read
 * better than they do would let a server pass that they cannot update from.
 */

import { describe, expect, test } from "bun:test";
import { boardGet, boardUpdate, readAsBoard } from "./helpers/board.ts";
import { sha1 } from "./helpers/content.ts";
import { Double } from "./helpers/double.ts";
import { bytesOf } from "./helpers/temp.ts";

/** 1000 bytes, none of them text: 0x80 to 0xff, over and over. */
const BINARY = Uint8Array.from({ length: 1000 }, (_, i) => 128 + (i % 128));

/** A response whose status line, headers and blank line have exactly `length` bytes. */
function response(length: number, body: string | Uint8Array, status = "200 OK"): Uint8Array {
  const start = `HTTP/1.0 ${status}\r\nX-Pad: `.padEnd(length - 4, "x");
  return bytesOf(Buffer.concat([Buffer.from(`${start}\r\n\r\n`), bytesOf(body)]));
}

describe("what a board makes of a response", () => {
  const text = "text without blank lines\n".repeat(20);
  const cases: [what: string, stream: Uint8Array, body: string | Uint8Array, pieces?: number[]][] =
    [
      ...[100, 200, 500].map((length): [string, Uint8Array, Uint8Array] => {
        return [
          `a header of ${length} bytes: all of a binary body`,
          response(length, BINARY),
          BINARY,
        ];
      }),
      ["a header of 160 bytes: all of a plain text", response(160, text), text],
      ...[101, 102, 103, 301].map((length): [string, Uint8Array, string] => {
        return [
          `a header of ${length} bytes, its end in two pieces: nothing`,
          response(length, text),
          "",
        ];
      }),
      [
        "a blank line in the piece that header and body share: what is behind it is lost",
        response(160, `one\r\n\r\ntwo${"-".repeat(30)}three`),
        "onethree",
      ],
      [
        "a header that was missed: its end is the next blank line",
        response(102, `${"a".repeat(150)}\r\n\r\nrest`),
        "rest",
      ],
      ["a byte order mark: content", response(160, "\ufeffprint()"), "\ufeffprint()"],
      ["an error: its text is content", response(160, "no", "404 Not Found"), "no"],
      ["nothing: nothing", new Uint8Array(), ""],
      // The network decides what shares a piece: 198 + 2.
      ["the end of the header in two of other pieces", response(200, BINARY), "", [100, 98, 2]],
      [
        "other pieces, but the header ends with one",
        response(200, BINARY),
        BINARY,
        [60, 60, 80, 1, 7],
      ],
    ];
  for (const [what, stream, body, pieces] of cases) {
    test(what, () => {
      const found = readAsBoard(stream, pieces);
      expect([found.raised, found.body]).toEqual([undefined, bytesOf(body)]);
    });
  }

  const raises: [what: string, stream: Uint8Array, pieces?: number[]][] = [
    ["a header of 160 bytes and a binary body", response(160, BINARY)],
    ["header and body in one of other pieces", response(200, BINARY), [50]],
    ["a letter that the piece cuts in two", response(160, `${"a".repeat(39)}\u00e9`)],
  ];
  for (const [what, stream, pieces] of raises) {
    test(`${what}: it raises`, () => {
      const found = readAsBoard(stream, pieces);
      expect([found.raised, found.body.length]).toEqual(["UnicodeError", 0]);
    });
  }

  test("it asks in HTTP/1.0 with a Host header and nothing else, and waits for the end", async () => {
    let asked = "";
    await using server = await Double.start(({ method, target, headers }, connection) => {
      asked = [method, target, ...headers.keys()].join(" ");
      if (target !== "/silent") connection.end(response(100, BINARY));
      else connection.write(response(100, BINARY));
    });
    expect((await boardGet(server.url, "/1.0.1/flash/a%20b.py?x=1")).body).toEqual(BINARY);
    expect(asked).toBe("GET /1.0.1/flash/a%20b.py?x=1 host");
    const waiting = boardGet(server.url, "/silent", { timeoutMs: 100 });
    await expect(waiting).rejects.toThrow("did not close");
  });
});

describe("an update of a board", () => {
  const before = new Map(
    Object.entries({
      "flash/main.py": "old",
      "flash/lib/gone.py": "gone",
      "flash/own.txt": "own",
    }).map(([path, content]) => [path, bytesOf(content)] as const),
  );
  const entry = (path: string, changes: Record<string, unknown> = {}) => ({
    URL: "http://elsewhere.example:1/new",
    dst_path: path,
    hash: sha1("new"),
    ...changes,
  });

  /** Updates from a server that has one release, with parts of its manifest replaced. */
  async function update(changes: Record<string, unknown> | null, header = 100, had = before) {
    const manifest = changes && {
      delete: ["flash/lib/gone.py"],
      firmware: { URL: "http://elsewhere.example/image", hash: "not compared" },
      ...{ new: [entry("/flash/lib/a b.py")], update: [entry("/flash/main.py")], version: "1.0.1" },
      ...changes,
    };
    await using server = await Double.start(({ path }, connection) => {
      const contents = {
        "/new": "new",
        "/image": BINARY,
        "/manifest.json": JSON.stringify(manifest),
      };
      const content = contents[path as keyof typeof contents];
      const length = path === "/manifest.json" ? header : 100;
      connection.end(response(length, content ?? "no", content ? "200 OK" : "404 Not Found"));
    });
    return await boardUpdate(server.url, "1.0.0", had);
  }

  test("replaces, adds, deletes, flashes, records the version; null is none", async () => {
    const files = { "flash/main.py": "new", "flash/lib/a b.py": "new", "flash/own.txt": "own" };
    const after = await update({});
    expect([after.version, after.firmware]).toEqual(["1.0.1", BINARY]);
    expect(Object.fromEntries(after.files)).toEqual(
      Object.fromEntries(Object.entries(files).map(([path, content]) => [path, bytesOf(content)])),
    );
    expect(await update(null)).toEqual({ version: "1.0.0", files: before });
  });

  test("finds the directory flash on an empty board, too", async () => {
    const changes = { delete: [], update: [], new: [entry("/flash/main.py")] };
    const { files, firmware } = await update({ ...changes, firmware: undefined }, 100, new Map());
    expect([[...files.keys()], firmware]).toEqual([["flash/main.py"], undefined]);
  });

  test("flashes whatever comes: an error's text", async () => {
    const { firmware } = await update({ firmware: { URL: "http://h/none" } });
    expect(firmware).toEqual(bytesOf("no"));
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
      await expect(update(changes)).rejects.toThrow(message);
    });
  }

  test("raises on a manifest behind a header that is not aligned", async () => {
    await expect(update({}, 102)).rejects.toThrow("JSON");
  });
});
