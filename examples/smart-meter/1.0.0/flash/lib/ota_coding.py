# Content that comes in another form than it has in the end: compressed, or as a patch
# of what is on the board. ota_part.py asks for that, and what comes of it must have its
# hash like anything else. What cannot be decoded is got once more, as it is.

import gc
import io
import sys

try:
    import ubinascii as binascii
except ImportError:
    import binascii

INFLATE = None
try:
    import deflate

    def INFLATE(stream):
        return deflate.DeflateIO(stream, deflate.ZLIB)
except ImportError:
    try:
        from uzlib import DecompIO as INFLATE  # before MicroPython 1.21
    except ImportError:
        pass


class Body(io.IOBase):
    # The body of a response as a stream, of at most so many bytes. cut: the network,
    # not what came from it, was to blame.

    def __init__(self, pieces, most):
        self.pieces = pieces
        self.left = most
        self.piece = b""
        self.at = 0
        self.cut = False

    def readinto(self, buffer):
        # One byte: decompressors ask for no more at a time.
        if self.at == len(self.piece):
            try:
                self.piece = next(self.pieces)
            except StopIteration:
                return 0
            except OSError:
                self.cut = True
                raise
            self.at = 0
            self.left -= len(self.piece)
            if self.left < 0:
                raise ValueError("it does not end")
        buffer[0] = self.piece[self.at]
        self.at += 1
        return 1


def headers(part):
    # What a request says of codings.
    if not INFLATE:
        return ""
    have = part.old_hash()
    if not have:
        return "Accept-Encoding: deflate\r\n"
    name = binascii.b2a_base64(binascii.unhexlify(have)).decode().strip()
    return "Accept-Encoding: ota-patch, deflate\r\nAvailable-Dictionary: :%s:\r\n" % name


def receive(part, coding, pieces):
    # Decodes a body. Raises an OSError for all that is wrong with it, and then part
    # says whether to ask for another one.
    names = coding.decode().lower().replace(" ", "")
    chances = part.chances
    part.chances = 0
    body = Body(pieces, part.most + 1024)
    try:
        if not INFLATE or names not in ("deflate", "ota-patch,deflate"):
            raise ValueError("a coding that nobody asked for")
        if names == "deflate":
            inflate(part, INFLATE(body))
        else:
            patch(part, INFLATE(body))
        if body.readinto(bytearray(1)):
            raise ValueError("it goes on after its end")
    except Exception as e:
        sys.modules.pop("ota_patch", None)  # there may be no more room
        gc.collect()
        # A patch that was cut off is worth another try. Compressed content is not: what
        # comes as it is can go on where it was cut.
        if body.cut and names != "deflate":
            part.chances = chances - 1
        if body.cut or isinstance(e, OSError) and e.args and e.args[0] == 28:
            raise
        raise OSError("%s cannot be decoded: %r" % (names, e))


def inflate(part, stream):
    piece = memoryview(bytearray(256))
    n = 1
    while n:
        n = stream.readinto(piece)
        part.write(piece[:n])


def patch(part, stream):
    import ota_patch

    size, read, close = part.old()
    try:
        made = ota_patch.Patch(stream, read, size, part.write)
        new = binascii.unhexlify(part.want) if part.sort == "sha256" else b""
        made.header(part.most, binascii.unhexlify(part.old_hash()), new)
        made.run()
    finally:
        close()
