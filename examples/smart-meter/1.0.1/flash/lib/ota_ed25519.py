# Verifies Ed25519 signatures, written after RFC 8032, with SHA-512, which boards
# lack. ota_trust.py uses this, and nothing here is in memory but then.
#
# Only public things are computed with, so nothing has to take the same time.
# Points are (x, y, z, e, h), which stand for x/z, y/z and xy/z = e * h / z: most of
# them need no e * h. The formulas are those of Hisil, Wong, Carter and Dawson.

try:
    import ubinascii as binascii
except ImportError:
    import binascii

import ota_boot

M = (1 << 64) - 1
TWICE = (1 << 64) + 1
P = (1 << 255) - 19
L = (1 << 252) + 27742317777372353535851937790883648493
D = 0x52036CEE2B6FFE738CC740797779E89800700A4D4141D8AB75EB4DCA135978A3
I = 0x2B8324804FC1DF0B2B4D00993DFBD7A72F431806AD2FE478C4EE1B274A0EA0B0  # its square is -1
BASE_X = 0x216936D3CD6E53FEC0A4E231FDD6DC5C692CC7609525A7B2C9562D608F25D51A
BASE_Y = int.from_bytes(b"\x58" + b"\x66" * 31, "little")
# The constants of SHA-512, 64 bits each of the roots of primes: eight square roots,
# where it begins, and 80 cube roots, one for each round.
TABLE = (
    "agnmZ/O8yQi7Z66FhMqnOzxu83L+lPgrpU/1Ol8dNvFRDlJ/reaC0ZsFaIwrPmwfH4PZq/tBvWtb"
    "4M0ZE34heUKKL5jXKK4icTdEkSPvZc21wPvP7E07L+m126WBidu8OVbCW/NItThZ8RHxtgXQGZI/"
    "gqSvGU+bqxxe1dptgRjYB6qYowMCQhKDWwFFcG++JDGFvk7ksoxVDH3D1f+04nK+XXTye4lvgN6x"
    "/jsWlrGb3AanJccSNcGb8XTPaSaU5JtpwZ7xStLvvkeGOE8l4w/BncaLjNW1JAyhzHesnGUt6Sxv"
    "WSsCdUp0hKpupuSDXLCp3L1B+9R2+YjagxFTtZg+UVLuZt+rqDHGbS20MhCwAyfImPshP79Zf8e+"
    "7w7kxuAL8z2oj8LVp5FHkwqnJQbKY1HgA4JvFCkpZwoObnAntwqFRtIv/C4bIThcJskmTSxt/FrE"
    "Ku1TOA0TnZWz32UKc1SLr2PedmoKuzx3sqiBwskuR+2u5pJyLIUUgjU7or/ooUzxA2SoGmZLvEIw"
    "AcJLi3DQ+JeRx2xRowZUvjDRkugZ1u9SGNaZBiRVZakQ9A41hVdxICoQaqBwMrvRuBmkwRa40tDI"
    "HjdsCFFBq1MnSHdM347rmTSwvLXhm0ioORwMs8XJWmNO2KpK40GKy1ucyk93Y+NzaC5v89ayuKN0"
    "j4LuXe+y/HilY29DFy9ghMh4FKHwq3KMxwIIGmQ57JC+//ojYx4opFBs696Cvem++aP3ssZ5FcZx"
    "ePLjclMryic+zuomYZzRhrjHIcDCB+rafdbN4Ose9X1Pf+5u0XgG8GeqchdvugpjfcWiyJimET+Y"
    "BL75Da4bcQs1ExxHGyjbd/UjBH2EMsqre0DHJJM8nr4KFcm+vEMdZ8ScEA1MTMXUvss+QrZZfymc"
    "/GV+Kl/Lb6s61vrsbEQZjEpHWBc="
)


def mixed(x, m, n, o, turn):
    # x turned right by m and by n, and turned or shifted by o; what is above 64 bits
    # is for the caller to cut off.
    y = x * TWICE
    return y >> m ^ y >> n ^ (y if turn else x) >> o


def words(data):
    return [int.from_bytes(data[i : i + 8], "big") for i in range(0, len(data), 8)]


def compress(state, block, table):
    w = words(block)
    a, b, c, d, e, f, g, h = state
    for i in range(80):
        if not i & 7:
            ota_boot.alive()
        now = w[i & 15]
        if i > 15:
            now += mixed(w[i - 15 & 15], 1, 8, 7, False) + w[i - 7 & 15]
            now = now + mixed(w[i - 2 & 15], 19, 61, 6, False) & M
            w[i & 15] = now
        t = h + mixed(e, 14, 18, 41, True) + (g ^ e & (f ^ g)) + now
        t += int.from_bytes(table[i * 8 + 64 : i * 8 + 72], "big")
        h, g, f, e = g, f, e, d + t & M
        t += mixed(a, 28, 34, 39, True) + (a & b ^ c & (a ^ b))
        d, c, b, a = c, b, a, t & M
    return [x + y & M for x, y in zip(state, (a, b, c, d, e, f, g, h))]


def sha512(data):
    table = binascii.a2b_base64(TABLE)
    state = words(table[:64])
    size = len(data)
    data += b"\x80" + bytes(-(size + 17) % 128) + (size * 8).to_bytes(16, "big")
    for at in range(0, len(data), 128):
        state = compress(state, data[at : at + 128], table)
    return b"".join([x.to_bytes(8, "big") for x in state])


def squared(x, n):
    for i in range(n):
        if not i & 15:
            ota_boot.alive()
        x = x * x % P
    return x


def tower(x):
    # x to the power 2**250 - 1, by the bits of 250.
    y = x
    n = 1
    for bit in (1, 1, 1, 1, 0, 1, 0):
        y = y * squared(y, n) % P
        n += n
        if bit:
            y = y * y % P * x % P
            n += 1
    return y


def decode(data):
    # The point that 32 bytes stand for; None where they stand for none, or for one
    # that has a shorter name.
    y = int.from_bytes(data, "little")
    odd = y >> 255
    y &= (1 << 255) - 1
    u = (y * y - 1) % P
    v = (D * (y * y % P) + 1) % P
    w = v * v * v % P * u % P
    t = w * v % P * (v * v * v % P) % P
    x = w * squared(tower(t), 2) % P * t % P
    square = v * (x * x % P) % P
    if square != u:
        x = x * I % P
    if y >= P or square not in (u, P - u) or odd and not x:
        return None
    if x & 1 != odd:
        x = P - x
    return x, y, 1, x, y


def encode(point):
    x, y, z = point[:3]
    # 1 / z, as z to the power P - 2.
    z = squared(tower(z), 5) * squared(z, 3) % P * squared(z, 1) % P * z % P
    return (y * z % P | (x * z % P & 1) << 255).to_bytes(32, "little")


def twice(point):
    x, y, z = point[:3]
    a = x * x
    b = y * y
    h = (a + b) % P
    g = (a - b) % P
    a = x + y
    e = (h - a * a) % P
    f = (2 * z * z + g) % P
    return e * f % P, g * h % P, f * g % P, e, h


def ready(point):
    # A point in the form in which it is added.
    x, y, z, e, h = point
    return (y - x) % P, (y + x) % P, e * h % P * 2 * D % P, 2 * z


def plus(point, other):
    x, y, z, e, h = point
    a = (y - x) * other[0]
    b = (y + x) * other[1]
    c = e * h % P * other[2]
    d = z * other[3]
    e = (b - a) % P
    f = (d - c) % P
    g = (d + c) % P
    h = (b + a) % P
    return e * f % P, g * h % P, f * g % P, e, h


def small(point):
    # Is its order 1, 2, 4 or 8?
    return twice(twice(point))[0] == 0


def sum_of(s, k, other):
    # s times the base point and k times another one, bit by bit of both.
    base = BASE_X, BASE_Y, 1, BASE_X, BASE_Y
    table = None, ready(base), ready(other), ready(plus(base, ready(other)))
    point = 0, 1, 1, 0, 1
    for n in range(252, -1, -1):
        if not n & 3:
            ota_boot.alive()
        point = twice(point)
        at = s >> n & 1 | (k >> n & 1) << 1
        if at:
            point = plus(point, table[at])
    return point


def verify(key, signature, message):
    # RFC 8032, 5.1.7, without the factor 8, as OpenSSL does it; and neither the key
    # nor the signature may have a point of small order.
    s = int.from_bytes(signature[32:], "little")
    if len(key) != 32 or len(signature) != 64 or s >= L:
        return False
    k = int.from_bytes(sha512(signature[:32] + key + message), "little") % L
    point = decode(key)
    if not point or small(point):
        return False
    x, y = point[:2]
    point = sum_of(s, k, (P - x, y, 1, P - x, y))
    return encode(point) == signature[:32] and not small(point)
