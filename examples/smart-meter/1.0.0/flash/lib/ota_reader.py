# Reads a patch: its numbers, and its head with the tables. See ota_patch.py.

MAGIC = b"\x89OTP\x01"
MOST_RANGES = 64
MOST_ENTRIES = 4096


def refuse(why):
    raise ValueError("the patch " + why)


class Reader:
    # stream: where it is read from; size: how much there is of the old content.

    def __init__(self, stream, size):
        self.stream = stream
        self.size = size
        self.input = memoryview(bytearray(128))
        self.at = self.end = 0  # what is in there

    def fill(self):
        if self.at == self.end:
            self.at = 0
            self.end = self.stream.readinto(self.input)
            self.left -= self.end
            if not self.end or self.left < 0:
                refuse("does not end where it should")

    def byte(self):
        if self.at == self.end:
            self.fill()
        self.at += 1
        return self.input[self.at - 1]

    def take(self, most):
        # Some of the next bytes.
        self.fill()
        at = self.at
        self.at = min(self.end, at + most)
        return self.input[at : self.at]

    def number(self, most):
        value = shift = 0
        while True:
            c = self.byte()
            value |= (c & 127) << shift
            if value > most or shift > 42:
                refuse("has a number out of range")
            if c < 128:
                return value
            shift += 7

    def signed(self, most):
        n = self.number(2 * most + 1)
        return -(n >> 1) - 1 if n & 1 else n >> 1

    def expect(self, bytes, what):
        for c in bytes:
            if self.byte() != c:
                refuse("is " + what)

    def header(self, new, old_hash, new_hash):
        # Checks what it is for; new is the most that new content may have.
        self.left = 2 * new + 65536  # no patch needs more
        self.expect(MAGIC, "none of version 1")
        if self.number(self.size) != self.size:
            refuse("is for other content")
        self.new = self.number(new)
        self.expect(old_hash, "for other content")
        if new_hash:
            self.expect(new_hash, "for other new content")
        else:
            for _ in range(32):
                self.byte()
        kind = self.byte()
        if kind > 4:
            refuse("is of a newer kind")
        self.code = []
        end = 0
        for _ in range(self.number(MOST_RANGES) if kind > 1 else 0):
            end += self.number(self.size - end)
            self.code.append(end)
            end += self.number(self.size - end)
            self.code.append(end)
        # Of the highest byte of an address: may it move?
        self.first = bytearray(256)
        self.absolute, self.moves = self.table(self.first) if kind else (None, False)
        self.relative, self.moves_code = self.table(None) if kind > 1 else (None, False)
        return kind

    def table(self, first):
        # See ota_fields.py. Also returns whether it moves anything.
        count = self.number(MOST_ENTRIES)
        table = bytearray(8 * count + 8)
        table[0] = count & 255
        table[1] = count >> 8
        at = add = 0
        moves = False
        for k in range(8, len(table), 8):
            before = at
            at += self.number(0xFFFFFFFF - at)
            if first and add:
                for n in range(before >> 24, (at >> 24) + 1):
                    first[n] = 1
            add = self.signed(0x80000000)
            moves = moves or add != 0
            for n in range(4):
                table[k + n] = at >> 8 * n & 255
                table[k + 4 + n] = add >> 8 * n & 255
        if first and add:
            for n in range(at >> 24, 256):
                first[n] = 1
        return table, moves
