# Reads a patch: its numbers, and its head with the tables. See ota_patch.py.

import gc

MAGIC = b"\x89OTP\x01"
MOST_RANGES = 64
MOST_ENTRIES = 4096
CODE = 8192  # bytes of heap for what comes after a table


def refuse(why):
    raise ValueError("the patch " + why)


def put(table, at, high, low):
    table[at] = low & 255
    table[at + 1] = low >> 8
    table[at + 2] = high & 255
    table[at + 3] = high >> 8


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

    def halves(self):
        # Reads a number of 33 bits, as what is above the low 16 of them and those: large
        # numbers take room each time they are touched, and a table is full of them.
        low = high = shift = 0
        while True:
            c = self.byte()
            if shift < 16:
                low |= (c & 127) << shift
            else:
                high |= (c & 127) << shift - 16
            if high > 0x1FFFF or shift > 42:
                refuse("has a number out of range")
            if c < 128:
                self.low = low & 0xFFFF
                return high | low >> 16
            shift += 7

    def expect(self, bytes, what):
        for c in bytes:
            if self.byte() != c:
                refuse("is " + what)

    def header(self, new, old_hash, new_hash):
        # Checks what it is for; new is the most that new content may have.
        self.left = 2 * new + 98304  # no patch is longer
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
        gc.collect()
        if gc.mem_free() < 8 * count + CODE:
            raise MemoryError
        table = bytearray(8 * count + 8)
        table[0] = count & 255
        table[1] = count >> 8
        low = high = 0  # the halves of an address
        add = moves = False
        for k in range(8, len(table), 8):
            before = high >> 8
            high += self.halves()
            low += self.low
            high += low >> 16
            low &= 0xFFFF
            if high > 0xFFFF:
                refuse("has a number out of range")
            if first and add:
                for n in range(before, (high >> 8) + 1):
                    first[n] = 1
            put(table, k, high, low)
            # What is added is signed: its lowest bit says whether all others are to be
            # turned over.
            above = self.halves()
            if above > 0xFFFF and (above > 0x10000 or self.low > 1):
                refuse("has a number out of range")
            add = above + self.low > 0
            moves = moves or add
            turn = 0xFFFF * (self.low & 1)
            put(table, k + 4, above >> 1 ^ turn, ((above & 1) << 15 | self.low >> 1) ^ turn)
        if first and add:
            for n in range(high >> 8, 256):
                first[n] = 1
        return table, moves
