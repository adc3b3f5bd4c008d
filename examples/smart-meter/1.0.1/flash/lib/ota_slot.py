# Writes firmware into the slot that does not run, on an ESP32 or a Pycom board.
# OTA.py uses this; ota_boot.py switches between the slots.

try:
    import uhashlib as hashlib
except ImportError:
    import hashlib

import ota_boot
from ota_manifest import hexdigest

BLOCK = 4096  # bytes that are written at a time


def image_size(read, room):
    # Of an image for an ESP32 (ESP-IDF, "App Image Format"); 0 for anything else.
    head = bytearray(24)
    read(0, head)
    if head[0] != 0xE9:
        return 0
    part = bytearray(8)
    at = 24
    for _ in range(head[1]):
        if at + 8 > room:
            return 0
        read(at, part)
        at += 8 + (part[4] | part[5] << 8 | part[6] << 16 | part[7] << 24)
    at = (at | 15) + 1 + (32 if head[23] else 0)  # a checksum, and perhaps a SHA-256
    return at if at <= room else 0


class Slot:
    # The firmware slot that does not run now.

    def __init__(self):
        try:
            from esp32 import Partition

            self.part = Partition(Partition.RUNNING).get_next_update()
            self.name = self.part.info()[4]
            self.room = self.part.info()[3]
        except ImportError:
            import pycom

            self.part = None
            self.pycom = pycom
            self.name = "unknown"  # firmware from before pycom.bootmgr()
            if hasattr(pycom, "bootmgr"):
                first = pycom.bootmgr()[0].lower() == "factory"
                self.name = "ota_0" if first else "Factory"
        self.hash = self.block = self.image = None

    def buffer(self):
        # Not before it is needed: there is little room while a manifest is checked.
        if not self.block:
            self.block = bytearray(BLOCK)
            self.view = memoryview(self.block)

    def start(self, sort, at=0):
        # A slot that can be read is hashed when it is written, and can be written
        # from any whole block on.
        self.buffer()
        self.hash = None if self.part else getattr(hashlib, sort)()
        self.fill = 0
        self.count = at // BLOCK
        if not self.part:
            self.pycom.ota_start()

    def write(self, piece):
        piece = memoryview(piece)
        while len(piece):
            n = min(len(piece), BLOCK - self.fill)
            self.view[self.fill : self.fill + n] = piece[:n]
            self.fill += n
            piece = piece[n:]
            if self.fill == BLOCK:
                self.flush()

    def flush(self):
        ota_boot.alive()
        data = self.view[: self.fill]
        if not self.part:
            self.hash.update(data)
            self.pycom.ota_write(data)
        elif (self.count + 1) * BLOCK > self.room:
            raise ValueError("the firmware is larger than its slot")
        else:
            for i in range(self.fill, BLOCK):
                self.block[i] = 0xFF
            self.part.writeblocks(self.count, self.block)
        self.count += 1
        self.fill = 0

    def written(self):
        return self.count * BLOCK

    def finish(self, sort):
        # The digest of what was written.
        size = self.written() + self.fill
        if self.fill:
            self.flush()
        return self.digest(sort, size) if self.part else self.stop()

    def stop(self):
        # Ends what start() began: Pycom's boards have one hash at a time.
        h = self.hash
        self.hash = None
        return hexdigest(h) if h else ""

    def digest(self, sort, size, part=None):
        # The digest of what is in the slot; "" where that cannot be read.
        if not self.part or size > self.room:
            return ""
        self.buffer()
        h = getattr(hashlib, sort)()
        try:
            for n in range((size + BLOCK - 1) // BLOCK):
                ota_boot.alive()
                (part or self.part).readblocks(n, self.block)
                h.update(self.view[: min(BLOCK, size - n * BLOCK)])
        finally:
            text = hexdigest(h)
        return text

    def running(self):
        # Of the image that runs: its SHA-256, its size, and what reads it; SHA-256 is
        # "" where that cannot be read.
        if not self.image:
            self.image = "", 0, None
            try:
                from esp32 import Partition

                part = Partition(Partition.RUNNING)

                def read(at, view):
                    part.readblocks(at // BLOCK, view, at % BLOCK)

                size = image_size(read, part.info()[3])
                self.image = self.digest("sha256", size, part) if size else "", size, read
            except (ImportError, OSError, TypeError):
                pass
        return self.image

    def switch(self, name):
        if self.part:
            self.part.set_boot()
        else:
            self.pycom.ota_finish()
