# Makes new content of old content and a patch: `ota-patch`, version 1, as it is written
# down in ota.ts. ota_part.py loads this when a patch has come. Old content is read where
# it lies, a block at a time, new content is written in pieces, and a patch that says
# more than there is, or less, is refused with a ValueError.

import gc
import sys

try:
    import ubinascii as binascii
except ImportError:
    import binascii

import ota_boot
from ota_part import inflater
from ota_reader import Reader, refuse

BLOCK = 1024  # old content is predicted in such pieces,
MARGIN = 64  # for which so much of their neighbours is needed
CODE = {2: "ota_thumb", 3: "ota_xtensa", 4: "ota_riscv"}
SCANS = {}


def load(name, shared):
    # Adds the functions of a module, as machine code where this build makes that.
    try:
        module = __import__(name)
        for key in dir(module):
            shared[key] = getattr(module, key)
    except Exception:
        shared["ptr8"] = lambda o: o
        for folder in sys.path:
            path = (folder + "/" if folder else "") + name + ".py"
            if ota_boot.kind(path) == 1:
                return interpret(path, shared)
        raise


def interpret(path, shared):
    # Without comments, imports and decorators; one function at a time takes less room.
    lines = []
    with open(path) as f:
        for line in f:
            if line[0] not in "#@" and not line.startswith("from "):
                if line.strip()[:1] != "#":
                    lines.append(line)
            elif lines:
                execute(lines, shared)
    execute(lines, shared)


def execute(lines, shared):
    text = "".join(lines)
    lines.clear()
    gc.collect()
    exec(text, shared)
    gc.collect()


def scans(kind):
    # The functions that find the addresses for an architecture.
    if kind not in SCANS:
        SCANS.clear()
        shared = {}
        load("ota_fields", shared)
        if kind > 1:
            load(CODE[kind], shared)
        SCANS[kind] = shared
    return SCANS[kind]


def apply(part):
    # Makes what a Part of ota_part.py wants of the patch that it has got.
    size, read, close = part.old()
    try:
        with open(part.delta, "rb") as f:
            patch = Patch(inflater()(f), read, size, part.write)
            new = binascii.unhexlify(part.want) if part.sort == "sha256" else None
            patch.run(patch.header(part.most, binascii.unhexlify(part.have), new))
            if f.read(1):
                refuse("is followed by something")
    finally:
        close()


class Patch(Reader):
    # old(at, view): reads old content; write(piece): takes new content.

    def __init__(self, stream, old, size, write):
        Reader.__init__(self, stream, size)
        self.old = old
        self.write = write
        self.done = 0  # bytes of new content
        self.window = bytearray(MARGIN + BLOCK + MARGIN + 8)
        self.view = memoryview(self.window)

    def run(self, kind):
        gc.collect()
        self.scans = scans(kind) if self.moves or kind > 1 else None
        place = 0
        self.blocks = 64 + (self.size + self.new >> 6)  # that copies may take
        while self.done < self.new:
            left = self.number(self.new - self.done)
            while left:
                piece = self.take(left)
                left -= len(piece)
                self.put(piece)
            if self.done < self.new:
                place += self.signed(self.size)
                if not 0 <= place < self.size:
                    refuse("copies from beyond the old content")
                copied = self.copy(place)
                if not copied:
                    refuse("copies nothing")
                place += copied
        if self.at != self.end or self.stream.readinto(self.input):
            refuse("goes on after its end")

    def put(self, piece):
        self.done += len(piece)
        self.write(piece)

    def copy(self, place):
        # Returns how many bytes it made. The window has the block where the copy is,
        # and what of it is to be written: [from, pos).
        self.shift = self.done - place
        most = left = min(self.new - self.done, self.size - place)
        self.next = place
        self.begin = self.pos = self.stop = 0
        while True:
            n = self.number(4 * left + 3)
            adds = n & 3
            n >>= 2
            left -= n + adds
            if left < 0:
                refuse("copies too much")
            while n > self.stop - self.pos:
                n -= self.stop - self.pos
                self.block()
            self.pos += n
            if not adds:
                break
            for n in range(adds):
                if self.pos == self.stop:
                    self.block()
                self.window[self.pos] = self.window[self.pos] + self.byte() & 255
                self.pos += 1
        if self.pos > self.begin:
            self.put(self.view[self.begin : self.pos])
        return most - left

    def block(self):
        # Goes on to the next block.
        if not self.blocks:
            refuse("copies from too many places")
        self.blocks -= 1
        if self.stop > self.begin:
            self.put(self.view[self.begin : self.stop])
        ota_boot.alive()
        start = self.next & -BLOCK
        base = max(0, start - MARGIN)
        end = min(self.size, start + BLOCK)
        size = min(self.size, end + MARGIN) - base
        self.old(base, self.view[:size])
        self.begin = self.pos = self.next - base
        self.stop = end - base
        self.next = end
        if self.moves or self.relative and (self.moves_code or self.shift):
            self.predict(base, size)

    def predict(self, base, size):
        code = self.code
        at = i = 0
        while at < self.stop:
            while i < len(code) and code[i + 1] <= at + base:
                i += 2
            to = code[i] - base if i < len(code) else self.stop
            if to <= at:
                end = code[i + 1] - base
                at = self.scans["scan"](
                    self.window,
                    at,
                    min(end, self.stop),
                    end,
                    size,
                    base,
                    self.shift,
                    self.first,
                    self.absolute,
                    self.relative,
                )
            else:
                to = min(to, self.stop)
                at = self.scans["words"](self.window, at, to, size, self.first, self.absolute)
