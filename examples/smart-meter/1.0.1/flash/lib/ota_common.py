# What all parts of an update use.
#
# Pycom's boards have one hash at a time: each digest here is finished before the
# next one begins.

import gc
import time

try:
    import ubinascii as binascii
    import uhashlib as hashlib
    import uos as os
except ImportError:
    import binascii
    import hashlib
    import os

import ota_boot
from ota_boot import HOME, kind

PIECE = 512  # bytes that are in memory at a time
# The size and the SHA-256 of the firmware that an update has installed. It comes and
# goes with a release, like .ota/issued. Whoever reads it looks whether that is what
# runs: firmware may have come over a cable since.
FIRMWARE = HOME + "/.ota/firmware"
TRIES = 3  # for each file


def remove(path):
    if kind(path):
        os.remove(path)


def hexdigest(h):
    return binascii.hexlify(h.digest()).decode()


def digest(path, sort):
    # Of a file as it is in flash; "" without one.
    if kind(path) != 1:
        return ""
    piece = bytearray(PIECE)
    view = memoryview(piece)
    with open(path, "rb") as f:
        h = getattr(hashlib, sort)()
        try:
            n = 1
            while n:
                ota_boot.alive()
                n = f.readinto(piece)
                h.update(view[:n])
        finally:
            text = hexdigest(h)
    return text


def tries(path, attempt):
    for n in range(TRIES):
        try:
            gc.collect()
            return attempt()
        except OSError as e:
            again(n, path, e)


def again(n, path, e):
    # Waits before the next try, or gives up; a full disk stays full.
    full = e.args and e.args[0] == 28
    path = path.split("?")[0]  # a token is nobody's business
    if full or n + 1 == TRIES:
        print("OTA: %s: %s" % (path, "the disk is full" if full else e))
        raise e
    print("OTA: %s: %s, trying again" % (path, e))
    for _ in range(1 << n):
        ota_boot.alive()
        time.sleep(1)
