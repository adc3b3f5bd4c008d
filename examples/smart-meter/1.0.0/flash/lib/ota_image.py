# Which image runs, on an ESP32: ota_part.py uses this when it asks for another one.

import ota_boot


def size(read, room):
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


def running(slot):
    # Its SHA-256, its size, and what reads it; "" where that cannot be read.
    try:
        from esp32 import Partition

        part = Partition(Partition.RUNNING)

        def read(at, view):
            ota_boot.alive()
            part.readblocks(at >> 12, view, at & 4095)

        length = size(read, part.info()[3])
        return slot.digest("sha256", length, part) if length else "", length, read
    except (ImportError, OSError, TypeError):
        return "", 0, None
