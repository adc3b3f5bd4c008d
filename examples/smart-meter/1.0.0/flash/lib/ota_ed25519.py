# Verifies Ed25519 signatures, written after RFC 8032. ota_trust.py uses this, and
# it is in memory no longer than for that.
#
# Only public things are computed with, so nothing has to take the same time.
# Points are (x, y, z, e, h), which stand for x/z, y/z and xy/z = e * h / z: most of
# them need no e * h. The formulas are those of Hisil, Wong, Carter and Dawson.

import ota_boot

P = (1 << 255) - 19
L = (1 << 252) + 27742317777372353535851937790883648493
D = 0x52036CEE2B6FFE738CC740797779E89800700A4D4141D8AB75EB4DCA135978A3
I = 0x2B8324804FC1DF0B2B4D00993DFBD7A72F431806AD2FE478C4EE1B274A0EA0B0  # its square is -1
BASE_X = 0x216936D3CD6E53FEC0A4E231FDD6DC5C692CC7609525A7B2C9562D608F25D51A
BASE_Y = int.from_bytes(b"\x58" + b"\x66" * 31, "little")


def squared(x, n):
    for i in range(n):
        if not i & 7:
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
        if not n & 1:
            ota_boot.alive()
        point = twice(point)
        at = s >> n & 1 | (k >> n & 1) << 1
        if at:
            point = plus(point, table[at])
    return point


def verify(key, signature, digest):
    # RFC 8032, 5.1.7, without the factor 8, as OpenSSL does it; and neither the key
    # nor the signature may have a point of small order. digest is the SHA-512 of R,
    # which is the first half of the signature, key and message.
    s = int.from_bytes(signature[32:], "little")
    if len(key) != 32 or len(signature) != 64 or s >= L:
        return False
    k = int.from_bytes(digest, "little") % L
    point = decode(key)
    if not point or small(point):
        return False
    x, y = point[:2]
    point = sum_of(s, k, (P - x, y, 1, P - x, y))
    return encode(point) == signature[:32] and not small(point)
