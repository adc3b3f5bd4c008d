/**
 * How a board gets bytes: it goes on inside a file and inside firmware after a cut and after a reset,
 * sends its token in a header, finds a server by its name, and speaks HTTPS. All over real sockets.
 */

import {
  afterAll,
  afterEach,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test";
import { join } from "node:path";
import { type Board, type Kind, type Start } from "./board/board.ts";
import { CONFIRM, random, Root, runs, UPDATE, Van } from "./board/fleet.ts";
import { seeded } from "./helpers/random.ts";
import { certify, type Certified } from "./helpers/pki.ts";
import { Temp } from "./helpers/temp.ts";

setDefaultTimeout(600_000);

const SEED = seeded("board-transfer");
const ALL = process.env.OTA_ALL !== undefined;
const kinds: Kind[] = ["esp32", "pycom", "rp2"];
const KEEP = 8192;
const KEEP_IMAGE = 32768;

const noise = (size: number, first: number): Uint8Array => {
  const next = random(size);
  return Uint8Array.from({ length: size }, (_, i) => (i === 0 ? first : next(256)));
};
const BIG = noise(50_000, 0x41);
const IMAGE = noise(60_000, 0xe9);

let root: Root;
let van: Van;
/** The heads of all requests. */
let heads: string[] = [];
beforeAll(async () => {
  root = new Root()
    .release("1.0.0", { "flash/main.py": "1\n" })
    .release("1.0.1", { "flash/main.py": "2\n", "flash/big.bin": BIG });
  await Bun.write(join(root.path, "firmware_1.0.1.bin"), IMAGE);
  van = await Van.open(root.path);
});
afterEach(() => {
  van.link.weather = {};
  van.link.rewrite = undefined;
});
afterAll(async () => {
  await van[Symbol.asyncDispose]();
  Root.removeAll();
});

/** Notes the heads of requests, and may change them. */
function listen(link = van.link, change = (head: string) => head): void {
  heads = [];
  link.rewrite = (head) => {
    heads.push(head);
    return change(head);
  };
}

const of = (name: RegExp) => heads.filter((head) => name.test(head.split("\r\n")[0]!));
/** Where each request for a file begins. */
const from = (name: RegExp) =>
  of(name).map((head) => Number(/\r\nRange: bytes=(\d+)-\r\n/.exec(head)?.[1] ?? 0));

async function done(board: Board, start: Start): Promise<void> {
  expect([start.end, start.error]).toEqual(["reset", ""]);
  expect((await board.settle(CONFIRM)).join("\n")).toContain("OTA: 1.0.1 is confirmed");
  expect(board.tree()).toEqual(await van.tree(board.kind, "1.0.1"));
  if (board.kind !== "rp2") expect(runs(board, IMAGE)).toBe(true);
  expect(leftovers(board)).toEqual([]);
}
const leftovers = (board: Board) =>
  [...board.files.keys()].filter((path) => /\.ota\/.*\.[pt]$|\.ota\/image$/.test(path));

describe("a cut in the middle of a file", () => {
  test.each(kinds)("goes on where it was, in the same update (%s)", async (kind) => {
    const board = await van.board(kind, "1.0.0");
    listen();
    van.link.weather = { only: /big\.bin/, cutAfter: 20_000 };
    const start = await board.start(UPDATE);
    const [first, second, third] = from(/big\.bin/);
    expect(first).toBe(0);
    expect(second).toBeWithin(19_000, 20_000);
    expect(third).toBeWithin(38_000, 40_000);
    for (const head of of(/big\.bin/).slice(1)) expect(head).toMatch(/\r\nIf-Range: "[^"]+"\r\n/);
    for (const head of of(/main\.py|manifest/)) expect(head).not.toContain("Range");
    await done(board, start);
  });

  test("before it was worth it starts anew", async () => {
    const board = await van.board("rp2", "1.0.0");
    listen();
    van.link.weather = { only: /big\.bin/, cutAfter: KEEP };
    const { end, error } = await board.start(UPDATE);
    expect([end, error]).toEqual(["error", expect.stringContaining("the connection was cut")]);
    expect(from(/big\.bin/)).toEqual([0, 0, 0]);
    expect(leftovers(board)).toEqual([]);
  });

  test("goes on in the next update, after all tries of this one", async () => {
    const board = await van.board("rp2", "1.0.0");
    listen();
    van.link.weather = { only: /big\.bin/, cutAfter: 10_000 };
    expect((await board.start(UPDATE)).end).toBe("error");
    const reached = from(/big\.bin/).at(-1)!;
    expect(reached).toBeGreaterThan(15_000);
    await board.settle();
    listen();
    van.link.weather = {};
    const start = await board.start(UPDATE);
    expect(from(/big\.bin/)).toHaveLength(1);
    expect(from(/big\.bin/)[0]).toBeGreaterThan(reached);
    await done(board, start);
  });
});

describe("a reset in the middle", () => {
  test.each(kinds)("at any moment: what is there is used, and what comes out is right (%s)", async (kind) => {
    const board = await van.board(kind, "1.0.0");
    const { operations } = await board.copy().start(UPDATE);
    const writes = operations.flatMap((words, i) => (/write .*\.p /.test(words) ? [i] : []));
    expect(writes.length).toBeGreaterThan(90);
    const next = random(SEED);
    let resumed = 0;
    for (const at of writes.filter(() => ALL || next(100) < 12)) {
      const where = `seed ${SEED}, ${kind}: before operation ${at}`;
      const mine = board.copy();
      expect((await mine.start(UPDATE, { cutAt: at, torn: next(4) })).end, where).toBe("cut");
      await mine.settle();
      listen();
      const start = await mine.start(UPDATE);
      const places = from(/big\.bin/);
      // Content that a reset has spoilt is found by its hash, and got once more.
      expect(places.length, where).toBeLessThanOrEqual(2);
      if (places[0]! > 0) resumed++;
      await done(mine, start);
    }
    console.log(`  ${kind}, seed ${SEED}: ${resumed} times it went on`);
    expect(resumed).toBeGreaterThan(0);
  }); // prettier-ignore

  test.each(["esp32", "pycom"] as const)("of firmware: an ESP32 goes on at a block (%s)", async (kind) => {
    const board = await van.board(kind, "1.0.0");
    const { operations } = await board.copy().start(UPDATE);
    const writes = operations.flatMap((words, i) => (/write \/hw\/.* 512/.test(words) ? [i] : []));
    expect(writes.length).toBeGreaterThan(12);
    for (const at of [writes[3]!, writes.at(-2)!]) {
      const mine = board.copy();
      expect((await mine.start(UPDATE, { cutAt: at })).end).toBe("cut");
      await mine.settle();
      listen();
      const start = await mine.start(UPDATE);
      const goesOn = kind === "esp32" && at !== writes[3];
      expect(from(/firmware_1/)).toEqual([goesOn ? KEEP_IMAGE : 0]);
      // And files that came before it are not asked for again.
      expect(of(/big\.bin/)).toEqual([]);
      await done(mine, start);
    }
  }); // prettier-ignore

  test("of firmware that a reset has spoilt: the hash says so, and it starts anew", async () => {
    const board = await van.board("esp32", "1.0.0");
    const { operations } = await board.copy().start(UPDATE);
    const at = operations.findLastIndex((words) => /write \/hw\/.* 512/.test(words));
    await board.start(UPDATE, { cutAt: at });
    const slot = board.files.get("/hw/ota_1")!;
    board.files.set("/hw/ota_1", slot.with(100, slot[100]! ^ 1));
    listen();
    const start = await board.start(UPDATE);
    expect(from(/firmware_1/)).toEqual([KEEP_IMAGE, 0]);
    await done(board, start);
  });
});

describe("what was kept", () => {
  /** A board that has the beginning of the big file. */
  const begun = async (): Promise<Board> => {
    const board = await van.board("rp2", "1.0.0");
    van.link.weather = { only: /big\.bin/, cutAfter: 12_000 };
    await board.start(UPDATE);
    van.link.weather = {};
    expect(leftovers(board)).toHaveLength(2);
    return board;
  };
  const part = (board: Board, end: string) => leftovers(board).find((path) => path.endsWith(end))!;

  test("and is not the beginning is found by the hash", async () => {
    const board = await begun();
    const content = board.files.get(part(board, ".p"))!;
    board.write(part(board, ".p"), content.with(7, content[7]! ^ 1));
    listen();
    const start = await board.start(UPDATE);
    expect(start.output.join("\n")).toContain("its hash is wrong, trying again");
    expect(from(/big\.bin/)).toEqual([content.length, 0]);
    await done(board, start);
  });

  test.each([
    ["another one", (tag: string) => tag.replace(/^".../, '"xyz')],
    ["half of one", (tag: string) => tag.slice(0, tag.length >> 1)],
    ["nothing", () => ""],
    ["no text", () => new Uint8Array([0xff, 0xfe])],
  ] as [string, (tag: string) => string | Uint8Array][])("and has a tag that is %s starts anew", async (_name, change) => {
    const board = await begun();
    const at = part(board, ".t");
    board.write(at, change(board.read(at)!));
    listen();
    const start = await board.start(UPDATE);
    // The server sends it all.
    expect(start.output.join("\n")).not.toContain("trying again");
    expect(of(/big\.bin/)).toHaveLength(1);
    await done(board, start);
  }); // prettier-ignore

  test("is whole: nothing is asked for", async () => {
    const board = await begun();
    board.write(part(board, ".p"), BIG);
    listen();
    const start = await board.start(UPDATE);
    expect(of(/big\.bin/)).toEqual([]);
    await done(board, start);
  });

  test("is longer than the file, or is gone: it starts anew", async () => {
    for (const content of [new Uint8Array(BIG.length + 1), undefined]) {
      const board = await begun();
      if (content) board.write(part(board, ".p"), content);
      else board.files.delete(part(board, ".p"));
      listen();
      const start = await board.start(UPDATE);
      expect(from(/big\.bin/)).toEqual([0]);
      expect(start.output.join("\n")).not.toContain("trying again");
      await done(board, start);
    }
  });

  /** Changes the head of what the server answers to a range. */
  const answers = (change: (head: string) => string) => {
    let first = true;
    van.link.weather = {
      only: /big\.bin/,
      piece: (total) => (total === 0 ? 8192 : 512),
      spoil: (bytes, total) => {
        if (total > 0 || !first) return bytes;
        first = false;
        const text = Buffer.from(bytes).toString("latin1");
        const end = text.indexOf("\r\n\r\n");
        return Buffer.from(change(text.slice(0, end)) + text.slice(end), "latin1");
      },
    };
  };

  test.each([
    ["another tag", (head: string) => head.replace(/(?<=\r\nETag: ").../i, "xyz")],
    ["another place", (head: string) => head.replace(/(?<=Content-Range: bytes )\d/i, "9")],
    ["no place", (head: string) => head.replace(/Content-Range/i, "X-Content-Range")],
    ["no tag that is text", (head: string) => head.replace(/(?<=\r\nETag: ").../i, "x\xffz")],
  ])("and a server that answers with %s: right in the end", async (name, change) => {
    const board = await begun();
    listen();
    answers((head) => {
      const changed = change(head);
      expect(changed).not.toBe(head);
      return changed;
    });
    const start = await board.start(UPDATE);
    const anew = !name.startsWith("no tag");
    expect(start.output.join("\n").includes("the server has another file now")).toBe(anew);
    expect(from(/big\.bin/).slice(1)).toEqual(anew ? [0] : []);
    await done(board, start);
  });

  test("and a server that has less: 416, and it starts anew", async () => {
    const board = await begun();
    let first = true;
    listen(van.link, (head) => {
      const isFirst = first && head.includes("Range: ");
      if (isFirst) first = false;
      return isFirst ? head.replace(/bytes=\d+/, "bytes=99999999").replace(/If-Range.*\r\n/, "") : head;
    });
    const start = await board.start(UPDATE);
    expect(start.output.join("\n")).toContain("the server has another file now");
    await done(board, start);
  }); // prettier-ignore

  test("goes where the disk is full, and where another release is offered", async () => {
    const full = await van.board("rp2", "1.0.0");
    const used = [...full.files.values()].reduce((sum, { length }) => sum + length, 0);
    full.capacity = used + 30_000;
    expect((await full.start(UPDATE)).error).toContain("28");
    expect(leftovers(full)).toEqual([]);

    const board = await begun();
    const later = new Root()
      .release("1.0.0", { "flash/main.py": "1\n" })
      .release("1.0.2", { "flash/main.py": "3\n" });
    await using other = await Van.open(later.path);
    Object.assign(board, { link: other.link });
    expect((await board.start(UPDATE)).end).toBe("reset");
    expect(leftovers(board)).toEqual([]);
  });

  test.each([
    ["weak", 'W/"x"'],
    ["no text", '"\xff"'],
    ["without its end", '"x'],
    ["none", ""],
  ])("is nothing where the tag is %s", async (_name, tag) => {
    const board = await van.board("rp2", "1.0.0");
    listen();
    let count = 0;
    van.link.weather = {
      only: /big\.bin/,
      cutAfter: 12_000,
      piece: (total) => (total === 0 ? 8192 : 512),
      spoil: (bytes, total) => {
        if (total > 0) return bytes;
        count++;
        const text = Buffer.from(bytes).toString("latin1");
        return Buffer.from(text.replace(/(?<=\r\nETag: ).*/i, tag), "latin1");
      },
    };
    expect((await board.start(UPDATE)).end).toBe("error");
    expect([count, from(/big\.bin/)]).toEqual([3, [0, 0, 0]]);
    expect(leftovers(board)).toEqual([]);
  });
});

test("however the head of a part is spoilt: an OSError, or the place that was asked for", async () => {
  const next = random(SEED);
  const good =
    'HTTP/1.0 206 Partial Content\r\nETag: "abc"\r\nContent-Range: bytes 40-43/44\r\nContent-Length: 4\r\n\r\nbody';
  const all = Array.from({ length: 600 }, (_, i) => {
    const bytes = Buffer.from(good);
    for (let n = i === 0 ? 0 : 1 + next(4); n > 0; n--)
      bytes[next(bytes.length)] =
        next(2) === 0 ? next(256) : Buffer.from('"\r\n:-/0149 ')[next(12)]!;
    return bytes;
  });
  const board = await van.board("rp2", "1.0.0");
  board.write("/heads", all.map((bytes) => bytes.toString("hex")).join("\n"));
  const { output, error } = await board.start(`
import binascii, ota_http
class Told:
    def __init__(self, data):
        self.data = data
    def send(self, data):
        return len(data)
    def recv(self, most):
        piece = self.data[:7]
        self.data = self.data[7:]
        return piece
    def close(self):
        pass
class Part:
    at = 40
    tag = '"abc"'
    def begin(self, at, tag):
        self.began = (at, tag)
with open("/heads") as f:
    for line in f:
        data = binascii.unhexlify(line.strip())
        ota_http.connected = lambda address: Told(data)
        part = Part()
        try:
            ota_http.get("127.0.0.1", 1, "/", lambda piece: None, part=part)
            print("body", part.began)
        except OSError:
            print("OSError")
        except Exception as e:
            print("raised", repr(e))
`);
  expect(error).toBe("");
  expect(output[0]).toBe(`body (40, '"abc"')`);
  for (const [i, line] of output.entries())
    expect(line, `seed ${SEED}: ${all[i]}`).toMatch(/^(OSError$|body \((40, '"abc"'|0, ))/);
  expect(output.filter((line) => line === "OSError").length).toBeGreaterThan(30);
});

test("a range of a manifest, which nobody asked for, is no manifest", async () => {
  const board = await van.board("rp2", "1.0.0");
  van.link.weather = {
    only: /manifest/,
    spoil: (bytes, total) => {
      const text = Buffer.from(bytes).toString("latin1");
      return total > 0 ? bytes : Buffer.from(text.replace(" 200 ", " 206 "), "latin1");
    },
  };
  expect((await board.start(UPDATE)).error).toContain("the server sends a part");
});

test("a transport that knows neither parts nor headers goes on as before", async () => {
  const board = await van.board("rp2", "1.0.0");
  const code = `
import ota_http
from OTA import OTA
class Own(OTA):
    token = "s3cret"
    def connect(self):
        import network
        wlan = network.WLAN(network.STA_IF)
        wlan.active(True)
        wlan.connect("x", "y")
    def get(self, path, take):
        ota_http.get("127.0.0.1", 8000, path, take)
ota = Own()
ota.connect()
print("update:", ota.update())
`;
  listen();
  const start = await board.start(code);
  expect(of(/manifest/)[0]).toContain("&token=s3cret");
  expect(heads.join("\n")).not.toMatch(/Range|Authorization/);
  await done(board, start);
});

test.each(kinds)("the token is in a header, and in no address (%s)", async (kind) => {
  await using own = await Van.open(root.path, ["--token", "s3cret+&="]);
  const board = await own.board(kind, "1.0.0");
  listen(own.link);
  const start = await board.start(UPDATE.replace("8000)", `8000, "s3cret+&=")`));
  expect(heads.length).toBeGreaterThan(2);
  for (const head of heads) expect(head).toContain("\r\nAuthorization: Bearer s3cret+&=\r\n");
  expect(own.link.requests.join("\n")).not.toMatch(/s3cret|token/);
  await done(board, start);
});

describe("a name", () => {
  test("of a server is looked up, and sent", async () => {
    const board = await van.board("rp2", "1.0.0");
    listen();
    const start = await board.start(UPDATE.replace("127.0.0.1", "van.test"));
    for (const head of heads) expect(head).toContain("\r\nHost: van.test:8000\r\n");
    await done(board, start);
  });

  test("that nobody knows is an error of the network, tried again", async () => {
    const board = await van.board("rp2", "1.0.0");
    const { end, error, output } = await board.start(UPDATE.replace("127.0.0.1", "nobody.test"));
    expect([end, error]).toEqual(["error", expect.stringContaining("OSError: -2")]);
    expect(output.filter((line) => line.includes("trying again"))).toHaveLength(2);
  });
});

describe("HTTPS", () => {
  const temp = new Temp();
  let tls: Certified;
  let secure: Van;
  beforeAll(async () => {
    tls = certify(temp.path, "DNS:van.test");
    const options = ["--tls-cert", tls.cert, "--tls-key", tls.key, "--token", "s3cret"];
    secure = await Van.open(root.path, options);
  });
  afterAll(async () => {
    await secure[Symbol.asyncDispose]();
    temp[Symbol.dispose]();
  });

  const der = async (file: string): Promise<Uint8Array> => {
    const base64 = (await Bun.file(file).text()).replaceAll(/-----.*?-----|\s/g, "");
    return new Uint8Array(Buffer.from(base64, "base64"));
  };
  const code = UPDATE.replace("127.0.0.1", "van.test").replace("8000)", `8000, "s3cret")`);
  const board = async (kind: Kind, ca: Uint8Array): Promise<Board> => {
    const mine = await secure.board(kind, "1.0.0");
    const pem = `-----BEGIN CERTIFICATE-----\n${Buffer.from(ca).toString("base64")}\n-----END CERTIFICATE-----\n`;
    mine.write(`${mine.home}/ca`, kind === "pycom" ? pem : ca);
    mine.write(`${mine.home}/config.py`, `CA = "${mine.home}/ca"\n`);
    return mine;
  };

  test.each(kinds)("with config.CA everything comes over TLS, and goes on after a cut (%s)", async (kind) => {
    const mine = await board(kind, await der(tls.ca));
    listen(secure.link);
    secure.link.weather = { only: /big\.bin/, cutAfter: 20_000, late: (total) => (total % 4096 < 512 ? 1 : 0) };
    const start = await mine.start(code);
    secure.link.weather = {};
    expect([start.end, start.error]).toEqual(["reset", ""]);
    expect(from(/big\.bin/)).toHaveLength(3);
    expect(from(/big\.bin/)[1]).toBeGreaterThan(0);
    for (const head of heads) expect(head).toContain("\r\nAuthorization: Bearer s3cret\r\n");
    expect((await mine.settle(CONFIRM)).join("\n")).toContain("OTA: 1.0.1 is confirmed");
    expect(Buffer.from(mine.files.get(`${mine.home}/big.bin`)!).equals(BIG)).toBe(true);
  }); // prettier-ignore

  test("a server of another authority, or of another name, gets no request", async () => {
    using other = new Temp();
    const foreign = certify(other.path, "DNS:van.test");
    for (const [ca, name] of [
      [await der(foreign.ca), "van.test"],
      [await der(tls.ca), "other.test"],
      [await der(tls.ca), "127.0.0.1"],
    ] as const) {
      const mine = await board("rp2", ca);
      const old = mine.tree();
      listen(secure.link);
      const { end, error } = await mine.start(code.replace("van.test", name));
      expect([end, error]).toEqual(["error", expect.stringContaining("OSError")]);
      expect(heads).toEqual([]);
      expect(mine.tree()).toEqual(old);
    }
  });

  test("a server without TLS, and one that goes silent, are errors of the network", async () => {
    const mine = await board("rp2", await der(tls.ca));
    Object.assign(mine, { link: van.link });
    expect((await mine.copy().start(code)).error).toContain("OSError");
    Object.assign(mine, { link: secure.link });
    secure.link.weather = { silentAfter: 700 };
    const { error, hungry } = await mine.start(`import machine
from OTA import OTA
dog = machine.WDT(timeout=8000)
OTA.alive = lambda self: dog.feed()
${code}`);
    secure.link.weather = {};
    expect(error).toContain("ETIMEDOUT");
    expect(hungry).toBeLessThan(5000);
  });

  test("a build without TLS, or a file that is not there, says so", async () => {
    const mine = await board("rp2", await der(tls.ca));
    const without = "import machine, network, socket, time, sys\nsys.path.remove('/stand')\n";
    expect((await mine.start(without + code)).error).toContain("this firmware has no TLS");
    mine.files.delete("/ca");
    expect((await mine.start(code)).error).toContain("OSError: 44");
  });
});
