/**
 * `ota_ed25519.py` and `ota_sha512.py` on MicroPython: the vectors of RFC 8032, signatures of OpenSSL, and what looks
 * like a signature and is none, after the cases of Wycheproof.
 */

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createHash, createPrivateKey, createPublicKey, verify } from "node:crypto";
import { generateKeyPairSync, sign, type KeyObject } from "node:crypto";
import { join } from "node:path";
import { Board } from "./board/board.ts";
import { example } from "./board/fleet.ts";
import { Link } from "./board/link.ts";
import { Random, seeded } from "./helpers/random.ts";
import vectors from "./fixtures/rfc8032.json";

setDefaultTimeout(600_000);

const SEED = seeded("board-ed25519");
const ALL = process.env.OTA_ALL !== undefined;
const random = new Random(SEED);

const nobody = new Link(1);
afterAll(() => nobody.stop());

interface Signed {
  key: Uint8Array;
  signature: Uint8Array;
  message: Uint8Array;
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");
const unhex = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, "hex"));

/** Ed25519 as a whole: the library has it in two parts, which are loaded one after the other. */
const VERIFY = `
import binascii, ota_ed25519, ota_sha512
def verify(key, signature, message):
    digest = ota_sha512.sha512(signature[:32] + key + message)
    return ota_ed25519.verify(key, signature, digest)
`;

/** Runs Python on a board that has the library and `lines` in a file; returns what it prints. */
async function run(lines: string[], code: string, heap?: number) {
  const board = new Board("rp2", nobody);
  for (const name of ["ota_boot", "ota_ed25519", "ota_sha512"]) {
    const file = Bun.file(join(example, `1.0.0/flash/lib/${name}.py`));
    board.write(`/lib/${name}.py`, await file.text());
  }
  board.write("/lines", lines.join("\n"));
  const result = await board.start(`${VERIFY}\n${code}`, {
    boot: false,
    ...(heap !== undefined && { heap }),
  });
  expect(result.error).toBe("");
  return result;
}

/** What the board says to each signature. */
async function verdicts(all: Signed[]): Promise<boolean[]> {
  const lines = all.map((one) => [one.key, one.signature, one.message].map(hex).join(","));
  const { output } = await run(
    lines,
    `
with open("/lines") as f:
    for line in f:
        print(verify(*[binascii.unhexlify(part) for part in line.strip().split(",")]))
`,
  );
  expect(output).toHaveLength(all.length);
  return output.map((line) => line === "True");
}

/** What OpenSSL says to it. */
function opensslSays({ key, signature, message }: Signed): boolean {
  const x = Buffer.from(key).toString("base64url");
  try {
    const publicKey = createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x }, format: "jwk" });
    return verify(null, message, publicKey, signature);
  } catch {
    return false;
  }
}

const rawKey = (key: KeyObject): Uint8Array =>
  new Uint8Array(
    Buffer.from(createPublicKey(key.export({ type: "pkcs8", format: "pem" })).export({ format: "jwk" }).x!, "base64url"),
  ); // prettier-ignore

function signed(message: Uint8Array): Signed {
  const { privateKey } = generateKeyPairSync("ed25519");
  const signature = new Uint8Array(sign(null, message, privateKey));
  return { key: rawKey(privateKey), signature, message };
}

const bytes = (length: number): Uint8Array => Uint8Array.from({ length }, () => random.below(256));
const flipped = (data: Uint8Array, bit: number): Uint8Array =>
  data.with(bit >> 3, data[bit >> 3]! ^ (1 << (bit & 7)));

// Numbers as Ed25519 writes them.
const P = 2n ** 255n - 19n;
const L = 2n ** 252n + 27742317777372353535851937790883648493n;
const number = (data: Uint8Array): bigint => BigInt(`0x${hex(data.toReversed())}`);
const little = (n: bigint): Uint8Array => unhex(n.toString(16).padStart(64, "0")).toReversed();
const join2 = (a: Uint8Array, b: Uint8Array): Uint8Array => new Uint8Array(Buffer.concat([a, b]));
const challenge = ({ key, signature, message }: Signed): bigint => {
  const hash = createHash("sha512").update(signature.subarray(0, 32)).update(key).update(message);
  return number(new Uint8Array(hash.digest())) % L;
};

/** A key, and the number that it is. */
function newKey(): { privateKey: KeyObject; scalar: bigint } {
  const seed = bytes(32);
  const der = join2(unhex("302e020100300506032b657004220420"), seed);
  const privateKey = createPrivateKey({ key: Buffer.from(der), format: "der", type: "pkcs8" });
  const scalar = new Uint8Array(createHash("sha512").update(seed).digest()).slice(0, 32);
  scalar[0]! &= 248;
  scalar[31] = (scalar[31]! & 127) | 64;
  return { privateKey, scalar: number(scalar) };
}

/** Each point whose order is 1, 2, 4 or 8, in every way to write it. */
const SMALL: Uint8Array[] = (() => {
  const eighth = number(unhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"));
  const ys = [0n, 1n, P - 1n, P, P + 1n, eighth, P - eighth];
  return ys.flatMap((y) => [little(y), little(y | (1n << 255n))]);
})();
const IDENTITY = little(1n);

describe("SHA-512", () => {
  test("of every length up to 300 bytes is that of Bun", async () => {
    const data = bytes(300);
    const { output } = await run(
      [hex(data)],
      `
data = binascii.unhexlify(open("/lines").read())
for n in range(301):
    print(binascii.hexlify(ota_sha512.sha512(data[:n])).decode())
`,
    );
    const expected = Array.from({ length: 301 }, (_, n) =>
      new Bun.CryptoHasher("sha512").update(data.subarray(0, n)).digest("hex"),
    );
    expect(output, `seed ${SEED}`).toEqual(expected);
  });
});

describe("a signature", () => {
  const rfc = vectors.map(({ key, signature, message }) => ({
    key: unhex(key),
    signature: unhex(signature),
    message: unhex(message),
  }));

  test("of RFC 8032, section 7.1, is good", async () => {
    expect(rfc.map(({ message }) => message.length)).toEqual([0, 1, 2, 1023, 64]);
    expect(rfc.map(opensslSays)).toEqual(rfc.map(() => true));
    expect(await verdicts(rfc)).toEqual(rfc.map(() => true));
  });

  test("of OpenSSL is good, and what is spoilt in it is not", async () => {
    const count = ALL ? 500 : 60;
    const good = Array.from({ length: count }, () => signed(bytes(random.below(400))));
    const bad = good.map((one): Signed => {
      const parts = (["key", "signature", "message"] as const).filter((of) => one[of].length > 0);
      const part = random.pick(parts);
      return { ...one, [part]: flipped(one[part], random.below(8 * one[part].length)) };
    });
    const said = await verdicts([...good, ...bad]);
    console.log(`  seed ${SEED}: ${count} good and ${count} bad signatures`);
    for (const [i, is] of said.entries()) {
      const one = i < count ? good[i]! : bad[i - count]!;
      expect(is, `seed ${SEED}: ${[one.key, one.signature, one.message].map(hex)}`).toBe(i < count);
    }
  });

  test("with any bit flipped is bad", async () => {
    const one = rfc[2]!;
    const bad = (["key", "signature", "message"] as const).flatMap((part) =>
      Array.from(one[part].keys())
        .flatMap((at) => [0, 1, 2, 3, 4, 5, 6, 7].map((bit) => at * 8 + bit))
        .filter(() => ALL || random.chance(0.1))
        .map((bit) => ({ ...one, [part]: flipped(one[part], bit) })),
    );
    expect(bad.length).toBeGreaterThan(30);
    expect(await verdicts(bad), `seed ${SEED}`).toEqual(bad.map(() => false));
  });

  test("or a key of another length is bad", async () => {
    const one = rfc[1]!;
    const lengths = [0, 1, 31, 32, 33, 63, 65, 96, 128];
    const long = join2(one.signature, one.signature);
    const bad = [
      ...lengths.map((length) => ({ ...one, signature: long.slice(0, length) })),
      ...[0, 31, 33, 64].map((length) => ({ ...one, key: join2(one.key, one.key).slice(0, length) })),
    ]; // prettier-ignore
    expect(await verdicts(bad)).toEqual(bad.map(() => false));
  });

  test("whose S is not below L is bad", async () => {
    const bad = rfc.flatMap((one) => {
      const [r, s] = [one.signature.slice(0, 32), number(one.signature.slice(32))];
      const more = [L, 2n * L, 8n * L, 14n * L, 1n << 255n].map((add) => s + add);
      return more.map((n) => ({ ...one, signature: join2(r, little(n)) }));
    });
    expect(await verdicts(bad)).toEqual(bad.map(() => false));
  });

  test("by a key of small order is bad, also where the equation holds", async () => {
    const bad = SMALL.map((key): Signed => {
      // R is S times the base point: good if the challenge is a multiple of 8.
      const { privateKey, scalar } = newKey();
      const signature = join2(rawKey(privateKey), little(scalar % L));
      for (let n = 0; ; n++) {
        const one = { key, signature, message: unhex(n.toString(16).padStart(8, "0")) };
        if (challenge(one) % 8n === 0n) return one;
      }
    });
    expect(bad.map(opensslSays)).toContain(true);
    expect(await verdicts(bad)).toEqual(bad.map(() => false));
  });

  test("with an R of small order is bad, also by who has the key", async () => {
    const { privateKey, scalar } = newKey();
    const bad = SMALL.map((r): Signed => {
      const one = { key: rawKey(privateKey), signature: r, message: unhex("00") };
      const s = (challenge(one) * scalar) % L;
      return { ...one, signature: join2(r, little(s)) };
    });
    // OpenSSL takes the one whose R is 0.
    expect(bad.filter(opensslSays)).toHaveLength(1);
    expect(await verdicts(bad), `seed ${SEED}`).toEqual(bad.map(() => false));
  });

  test("points have one name each: y below P, and no sign for an x that is 0", async () => {
    const names: [Uint8Array, boolean | undefined][] = [
      [IDENTITY, true],
      [little(P - 1n), true],
      [little(0n), true],
      ...[1n, P - 1n].map((y): [Uint8Array, boolean] => [little(y | (1n << 255n)), false]),
      ...Array.from({ length: 19 }, (_, i): [Uint8Array, boolean] => [little(P + BigInt(i)), false]),
      ...Array.from({ length: 19 }, (_, i): [Uint8Array, boolean] => [
        little((P + BigInt(i)) | (1n << 255n)),
        false,
      ]),
      ...rfc.map(({ key }): [Uint8Array, boolean] => [key, true]),
      // Half of all numbers are no point.
      ...Array.from({ length: 40 }, (): [Uint8Array, undefined] => [
        little(number(bytes(32)) % P),
        undefined,
      ]),
    ]; // prettier-ignore
    const { output } = await run(
      names.map(([name]) => hex(name)),
      `
with open("/lines") as f:
    for line in f:
        name = binascii.unhexlify(line.strip())
        point = ota_ed25519.decode(name)
        print(point and ota_ed25519.encode(point) == name)
`,
    );
    let points = 0;
    for (const [i, [name, is]] of names.entries()) {
      if (is === undefined) points += output[i] === "True" ? 1 : 0;
      expect(output[i], `seed ${SEED}: ${hex(name)}`).toBeOneOf(
        is === undefined ? ["True", "None"] : [is ? "True" : "None"],
      );
    }
    expect(points).toBeWithin(5, 36);
  });
});

test("takes little: milliseconds here, and bytes of heap", async () => {
  // As long as what is signed for a step.
  const message = bytes(420);
  const line = (one: Signed) => [one.key, one.signature, one.message].map(hex).join(",");
  const code = (calls: string) => `
import ota_boot
def collect():
    with open("/dev/collect", "wb") as f:
        f.write(b"x")
with open("/lines") as f:
    parts = [binascii.unhexlify(part) for part in f.readline().strip().split(",")]
ota_boot.alive = collect
collect()
collect()
${calls}
`;
  const heapOf = async (calls: string) => {
    const { heap, output } = await run([line(signed(message))], code(calls), 64 * 1024);
    return [heap!.live, output.join()] as const;
  };
  const [before] = await heapOf("");
  const [most, output] = await heapOf("print(verify(*parts))");
  expect(output).toBe("True");

  const many = Array.from({ length: 20 }, () => signed(message));
  const time = async (all: Signed[]) => {
    const start = performance.now();
    await verdicts(all);
    return performance.now() - start;
  };
  await time(many);
  const took = (await time(many)) - (await time([]));
  const each = (took / many.length).toFixed(1);
  console.log(
    `  ${each} ms each; ${before} bytes of heap with the code, ${most - before} more to verify`,
  );
  expect(most - before).toBeLessThan(8 * 1024);
});
