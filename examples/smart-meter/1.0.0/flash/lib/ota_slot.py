# Writes firmware into the slot that does not run, on an ESP32 or a Pycom board.
# OTA.py uses this; ota_boot.py switches between the slots.

try:
    import uhashlib as hashlib
except ImportError:
    import hashlib

import ota_boot
from ota_common import PIECE, hexdigest

BLOCK = 4096  # bytes that are erased at a time


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
        self.hash = self.piece = None

    def buffer(self):
        # Not before it is needed: there is little room while a manifest is checked.
        if not self.piece:
            self.piece = bytearray(PIECE)
            self.view = memoryview(self.piece)

    def start(self, sort, at=0):
        # A slot that can be read is hashed when it is written, and can be written
        # from any whole block on.
        self.buffer()
        self.hash = None if self.part else getattr(hashlib, sort)()
        self.fill = 0
        self.at = at // BLOCK * BLOCK
        if not self.part:
            self.pycom.ota_start()

    def write(self, piece):
        piece = memoryview(piece)
        while len(piece):
            n = min(len(piece), PIECE - self.fill)
            self.view[self.fill : self.fill + n] = piece[:n]
            self.fill += n
            piece = piece[n:]
            if self.fill == PIECE:
                self.flush()

    def flush(self):
        ota_boot.alive()
        data = self.view[: self.fill]
        if not self.part:
            self.hash.update(data)
            self.pycom.ota_write(data)
        elif self.at >= self.room:
            raise ValueError("the firmware is larger than its slot")
        else:
            for i in range(self.fill, PIECE):
                self.piece[i] = 0xFF
            block = self.at // BLOCK
            if self.at % BLOCK == 0:
                self.part.ioctl(6, block)  # erases it
            self.part.writeblocks(block, self.piece, self.at % BLOCK)
        self.at += self.fill
        self.fill = 0

    def written(self):
        # In whole blocks.
        return self.at // BLOCK * BLOCK

    def finish(self, sort):
        # The digest of what was written.
        size = self.at + self.fill
        if self.fill:
            self.flush()
        return self.digest(sort, size) if self.part else self.stop()

    def stop(self):
        # Ends what start() began: Pycom's boards have one hash at a time.
        h = self.hash
        self.hash = None
        return hexdigest(h) if h else ""

    def digest(self, sort, size, part=None):
        # The digest of what is in the slot, or in part; "" where that cannot be read.
        if not self.part or size > self.room:
            return ""
        self.buffer()
        h = getattr(hashlib, sort)()
        try:
            for at in range(0, size, PIECE):
                ota_boot.alive()
                (part or self.part).readblocks(at // BLOCK, self.piece, at % BLOCK)
                h.update(self.view[: min(PIECE, size - at)])
        finally:
            text = hexdigest(h)
        return text

    def switch(self, name):
        if self.part:
            self.part.set_boot()
        else:
            self.pycom.ota_finish()
