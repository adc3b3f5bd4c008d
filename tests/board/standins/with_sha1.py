# Stands in for uhashlib on a board that has SHA-1 as well.

from hashes import One, sha256


def _turn(x, n):
    return (x << n | x >> (32 - n)) & 0xFFFFFFFF


class _Sha1:
    def __init__(self):
        self.data = bytearray()

    def update(self, piece):
        self.data.extend(piece)

    def digest(self):
        size = len(self.data) * 8
        data = self.data + b"\x80"
        data += bytes((56 - len(data)) % 64)
        data += size.to_bytes(8, "big")
        h = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0]
        for at in range(0, len(data), 64):
            w = [int.from_bytes(data[at + i : at + i + 4], "big") for i in range(0, 64, 4)]
            for i in range(16, 80):
                w.append(_turn(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1))
            a, b, c, d, e = h
            for i in range(80):
                if i < 20:
                    f, k = b & c | ~b & d, 0x5A827999
                elif i < 40:
                    f, k = b ^ c ^ d, 0x6ED9EBA1
                elif i < 60:
                    f, k = b & c | b & d | c & d, 0x8F1BBCDC
                else:
                    f, k = b ^ c ^ d, 0xCA62C1D6
                a, b, c, d, e = (_turn(a, 5) + f + e + k + w[i]) & 0xFFFFFFFF, a, _turn(b, 30), c, d
            h = [(x + y) & 0xFFFFFFFF for x, y in zip(h, (a, b, c, d, e))]
        return b"".join([x.to_bytes(4, "big") for x in h])


class sha1(One):
    def make(self):
        self.hash = _Sha1()
