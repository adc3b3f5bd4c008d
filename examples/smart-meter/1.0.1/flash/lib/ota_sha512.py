# SHA-512, which boards lack, written after FIPS 180-4. ota_trust.py uses this, and
# it is in memory no longer than for that.

try:
    import ubinascii as binascii
except ImportError:
    import binascii

import ota_boot

M = (1 << 64) - 1
TWICE = (1 << 64) + 1
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
    ota_boot.alive()
    w = words(block)
    a, b, c, d, e, f, g, h = state
    for i in range(80):
        if not i & 3:
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
    ota_boot.alive()
    table = binascii.a2b_base64(TABLE)
    state = words(table[:64])
    size = len(data)
    data += b"\x80" + bytes(-(size + 17) % 128) + (size * 8).to_bytes(16, "big")
    for at in range(0, len(data), 128):
        state = compress(state, data[at : at + 128], table)
    return b"".join([x.to_bytes(8, "big") for x in state])
