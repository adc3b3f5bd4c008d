# Content that comes in another form than it has in the end: compressed, or as a patch
# of what is on the board. ota_part.py asks for that, and loads this when it comes. Of
# what cannot be decoded, the next try asks for the content itself.

import io

from ota_part import inflater


class Body(io.IOBase):
    # The body of a response as a stream.

    def __init__(self, pieces, most):
        self.pieces = limited(pieces, most)
        self.piece = b""
        self.at = 0

    def readinto(self, buffer):
        # One byte: decompressors ask for no more at a time.
        if self.at == len(self.piece):
            try:
                self.piece = next(self.pieces)
            except StopIteration:
                return 0
            self.at = 0
        buffer[0] = self.piece[self.at]
        self.at += 1
        return 1


def limited(pieces, most):
    # What is coded is no longer than what it is made of, or not much.
    most += 1024
    for piece in pieces:
        most -= len(piece)
        if most < 0:
            raise ValueError("it does not end")
        yield piece


def receive(part, coding, pieces):
    # Decompresses a body, or keeps a patch for ota_patch.py: until it is whole, and
    # there is more room. Raises an OSError for all that is wrong with it.
    name = coding.decode().lower().replace(" ", "")
    if name == "ota-patch,deflate":
        # One that was cut off is worth another try.
        part.chances -= 1
        try:
            with open(part.delta, "wb") as f:
                for piece in limited(pieces, part.most):
                    f.write(piece)
        except OSError as e:
            if not e.args or e.args[0] != 28:
                raise
            # On a full disk there may be room without it.
            part.chances = 0
            raise OSError("no room for a patch")
        part.came = True
    elif name == "deflate":
        # What comes as it is can go on where it was cut.
        part.chances = 0
        part.begin(0, "")
        body = Body(pieces, part.most)
        try:
            inflate(part, body)
        except (ValueError, EOFError, MemoryError) as e:
            raise OSError("cannot be decompressed: %r" % e)
    else:
        part.chances = 0
        raise OSError("the server sends a coding that nobody asked for")


def inflate(part, body):
    stream = inflater()(body)
    piece = memoryview(bytearray(256))
    n = 1
    while n:
        n = stream.readinto(piece)
        part.write(piece[:n])
    if body.readinto(bytearray(1)):
        raise ValueError("it goes on after its end")
