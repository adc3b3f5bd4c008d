# Gets a file. What is there of one that was cut short is kept, so that the next try,
# or the next start, goes on from there. ota_update.py uses this, and ota_image.py.
#
#   base.p   the beginning of a file
#   base.t   the tag (ETag) of what that is the beginning of
#   base.d   a patch that the file is made of, see ota_patch.py
#
# There is a tag only where the server gave one and enough was received to be worth
# it. A reset may leave anything in base.p or the slot: the hash decides in the end.

import gc
import sys

try:
    import ubinascii as binascii
    import uos as os
except ImportError:
    import binascii
    import os

import ota_boot
from ota_boot import kind
from ota_common import digest, remove

KEEP = 8192  # bytes of a file: so often, what was received is made safe
ROOM = 32768  # bytes of heap that are enough to make content of a patch, and its code


def inflater():
    # What decompresses a stream; None on a build that cannot.
    try:
        import deflate

        return lambda stream: deflate.DeflateIO(stream, deflate.ZLIB)
    except ImportError:
        pass
    try:
        from uzlib import DecompIO  # before MicroPython 1.21

        return DecompIO
    except ImportError:
        return None


class Part:
    chances = 2  # that patches have

    def __init__(self, base, want, sort, most, there="", have=""):
        self.there = there  # the file that this replaces,
        self.have = have  # and its SHA-256, "" if that is not known
        self.path = base + ".p"
        self.delta = base + ".d"
        self.tags = base + ".t"
        self.want = want
        self.sort = sort
        self.most = most
        self.file = None

    def receive(self, ota, url):
        try:
            self.rest(ota, url)
            self.close()
        except OSError as e:
            # The next try goes on; on a full disk there is none.
            self.close()
            if not kind(self.tags) or e.args and e.args[0] == 28:
                self.drop()
            raise
        if digest(self.path, self.sort) != self.want:
            self.drop()
            raise OSError("its hash is wrong")

    def rest(self, ota, url):
        # Gets what is missing.
        self.at = 0
        self.tag = ""
        try:
            self.find()
        except (OSError, ValueError):
            pass
        if not self.tag or self.at > self.most:
            self.at = 0
        if not ota.http:
            self.begin(0, "")
            ota.get(url, self.write)
        elif self.at < self.most:
            self.headers = "" if self.at or self.chances < 1 else self.codings()
            self.came = False
            ota.get(url, self.write, self)
            if self.came:
                self.patched()
        else:
            self.begin(self.at, self.tag)

    def codings(self):
        # What a request says of codings.
        try:
            if not inflater():
                return ""
            self.look()
        except (ImportError, MemoryError):
            return ""
        if not self.have:
            return "Accept-Encoding: deflate\r\n"
        name = binascii.b2a_base64(binascii.unhexlify(self.have)).decode().strip()
        return (
            "Accept-Encoding: ota-patch, deflate\r\n"
            + "Available-Dictionary: :%s:\r\n" % name
        )

    def coded(self, coding, pieces):
        # What comes is coded; pieces yields it.
        try:
            import ota_coding

            ota_coding.receive(self, coding, pieces)
        except (ImportError, MemoryError, ValueError) as e:
            self.chances = 0
            raise OSError("cannot be decoded: %r" % e)
        finally:
            sys.modules.pop("ota_coding", None)
            if not self.came:
                remove(self.delta)

    def patched(self):
        # Makes what is wanted of a patch.
        gc.collect()
        away = ()
        if gc.mem_free() < ROOM:
            # What gets files gives way, and then this does: there is not room for both.
            away = ("ota_patch", "ota_reader")
            sys.modules.pop("ota_http", None)
            gc.collect()
        try:
            import ota_patch

            gc.collect()
            self.begin(0, "")
            ota_patch.apply(self)
        except Exception as e:
            self.chances = 0
            away = ("ota_patch", "ota_reader")
            raise OSError("its patch is of no use: %r" % e)
        finally:
            for name in away:
                sys.modules.pop(name, None)
            remove(self.delta)

    def begin(self, at, tag):
        # What comes next belongs at `at`: where this part ends, or at the beginning.
        if not at:
            remove(self.tags)
        self.safe = self.at = at
        self.tag = tag
        self.open()

    def write(self, piece):
        ota_boot.alive()
        self.at += len(piece)
        if self.at > self.most:
            raise OSError("more than the promised %d bytes" % self.most)
        self.put(piece)

    # What is different for firmware:

    def look(self):
        pass  # what there is is known

    def old(self):
        # The size of old content, what reads it, and what ends that.
        f = open(self.there, "rb")

        def read(at, view):
            f.seek(at)
            if f.readinto(view) != len(view):
                raise ValueError("the old content is shorter now")

        return os.stat(self.there)[6], read, f.close

    def find(self):
        with open(self.tags) as f:
            self.tag = f.read()
        self.at = os.stat(self.path)[6]

    def open(self):
        self.close()
        self.file = open(self.path, "ab" if self.at else "wb")

    def put(self, piece):
        self.file.write(piece)
        if self.tag and self.at - self.safe >= KEEP:
            self.file.flush()
            if not self.safe:
                with open(self.tags, "w") as f:
                    f.write(self.tag)
            self.safe = self.at

    def close(self):
        if self.file:
            self.file.close()

    def drop(self):
        remove(self.tags)
        remove(self.path)
