# Gets firmware into its slot. OTA.py uses this, when what reads a manifest has gone.
#
#   .ota/image    how much is in the slot, the hash of it all, and the tag (ETag)
#   .ota/image.d  a patch that it is made of
#
# Only on an ESP32 it can go on in the middle, and be made of a patch.

import ota_boot
from ota_boot import HOME
from ota_common import FIRMWARE, remove, tries
from ota_part import Part

KEEP = 32768  # bytes: so often it is noted how much is in the slot
IMAGE = HOME + "/.ota/image"


def image_size(read, room):
    # Of an image (ESP-IDF, "App Image Format"); 0 for anything else.
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


def installed():
    # The size and the SHA-256 of what an update has installed; 0 where none has.
    try:
        with open(FIRMWARE) as f:
            length, want = f.read(80).split()
        return max(0, int(length)), want
    except (OSError, ValueError):
        return 0, ""


def running(slot):
    # Its SHA-256, its size, and what reads it; "" where that cannot be read.
    try:
        from esp32 import Partition

        part = Partition(Partition.RUNNING)

        def read(at, view):
            ota_boot.alive()
            part.readblocks(at >> 12, view, at & 4095)

        length, want = installed()
        found = slot.digest("sha256", length, part) if length else ""
        if not found or found != want:
            length = image_size(read, part.info()[3])
            found = slot.digest("sha256", length, part) if length else ""
        return found, length, read
    except (ImportError, OSError, TypeError):
        return "", 0, None


class Image(Part):
    # Firmware in its slot.

    def __init__(self, slot, want, sort, most):
        self.slot = slot
        self.tags = IMAGE
        self.delta = IMAGE + ".d"
        self.want = want
        self.sort = sort
        self.most = most
        self.have = None

    def receive(self, ota, url):
        try:
            self.rest(ota, url)
            found = self.slot.finish(self.sort)
            remove(IMAGE)
            remove(self.delta)  # where a reset has left one
            if found != self.want:
                raise OSError("its hash is wrong")
        finally:
            self.slot.stop()

    def look(self):
        if self.have is None:  # it takes seconds
            self.have, self.size, self.read = running(self.slot)

    def old(self):
        return self.size, self.read, lambda: None

    def find(self):
        with open(IMAGE) as f:
            at, want, tag = f.read().split(" ", 2)
        if self.slot.part and want == self.want:
            self.at = int(at)
            self.tag = tag

    def open(self):
        self.slot.stop()
        self.slot.start(self.sort, self.at)

    def put(self, piece):
        self.slot.write(piece)
        at = self.slot.written()
        if self.tag and self.slot.part and at - self.safe >= KEEP:
            with open(IMAGE, "w") as f:
                f.write("%d %s %s" % (at, self.want, self.tag))
            self.safe = at


def get_firmware(ota, state, new, firmware):
    # Puts firmware into its slot, and returns the function that switches to it.
    other, new["firmware"], path, (want, sort), most = firmware
    new["slot"] = other.name
    new["slot_before"] = ota_boot.slot()
    if other.digest(sort, most) == want:
        return other.switch  # written by an update that was cut short
    if state.get("slot"):
        # The other slot holds what rollback() would start: that ends here.
        for key in ("set", "slot", "slot_before", "phase", "starts"):
            state.pop(key, None)
        ota_boot.save(state)
    print("OTA: getting firmware", new["firmware"])
    image = Image(other, want, sort, most)
    tries(path, lambda: image.receive(ota, path))
    return other.switch
