# Reads the manifest of an update, entry by entry, and what is in an entry.
# ota_check.py and ota_update.py use this; nothing here changes a file.

try:
    import uhashlib as hashlib
    import ujson as json
except ImportError:
    import hashlib
    import json

import ota_boot
from ota_boot import CARD, HOME, store
from ota_common import PIECE, hexdigest

LONGEST_ENTRY = 1024
LONGEST_SIGNED = 3072  # of a step with its signatures
LONGEST_PATH = 160
LONGEST_VERSION = 128
LARGEST = 0x3FFFFFFF  # of files and images, in bytes

MANIFEST = HOME + "/.ota/manifest"
LISTS = ("delete", "new", "update")


def release_name(text):
    # An optional v, a digit, then digits, letters and . + _ -
    if not isinstance(text, str) or len(text) > LONGEST_VERSION:
        return False
    if text[:1] in ("v", "V"):
        text = text[1:]
    for c in text:
        if not ("0" <= c <= "9" or "a" <= c <= "z" or "A" <= c <= "Z" or c in ".+_-"):
            return False
    return "0" <= text[:1] <= "9"


def local(path):
    # Where a path of a manifest is on this board. Refuses what leads elsewhere.
    if not isinstance(path, str) or not 0 < len(path) <= LONGEST_PATH:
        raise ValueError("manifest: a path is missing or too long")
    names = (path[1:] if path[0] == "/" else path).split("/")
    for name in names:
        # FAT ignores case, and dots and blanks at the end of a name.
        if not name or name[-1] in ". " or name.lower() == ".ota":
            raise ValueError("manifest: path not allowed: " + path)
        for c in name:
            # Of UTF-8, MicroPython takes halves of pairs and letters that are
            # written longer than they need to be, a slash for one.
            n = ord(c)
            if n < 32 or c in '\\:"*<>|\x7f' or 0xD7FF < n < 0xE000 or chr(n) != c:
                raise ValueError("manifest: path not allowed: " + path)
    if names[0] == "flash":
        names[0] = HOME
    elif HOME and names[0] != CARD[1:]:
        raise ValueError("manifest: neither in /flash nor in /sd: " + path)
    else:
        names[0] = "/" + names[0]
    path = "/".join(names)
    if path in ("", HOME, CARD):
        raise ValueError("manifest: path not allowed: /flash or /sd itself")
    return path


def expected(item):
    # The digest that a manifest promises, and its sort.
    for key, sort, length in (("sha256", "sha256", 64), ("hash", "sha1", 40)):
        text = item.get(key)
        if text is not None:
            if not isinstance(text, str) or len(text) != length:
                raise ValueError("manifest: bad " + key)
            if not hasattr(hashlib, sort):
                raise ValueError("the server sends no SHA-256, and this board has no SHA-1")
            return text, sort
    raise ValueError("manifest: no hash")


def request_path(item):
    # The path of a URL: a board asks the server that it was given.
    if not isinstance(item, dict):
        raise ValueError("manifest: an entry is no object")
    url = item.get("URL")
    if not isinstance(url, str) or url[:7] != "http://" and url[:8] != "https://":
        raise ValueError("manifest: a URL that is not http")
    for c in url:
        if not 32 < ord(c) < 127:
            raise ValueError("manifest: bad URL")
    at = url.find("/", 8)
    if at < 0:
        raise ValueError("manifest: a URL without a path")
    return url[at:]


def size(item):
    # How many bytes a manifest promises, at most.
    n = item.get("size")
    if n is None:
        return LARGEST
    if type(n) is not int or not 0 <= n <= LARGEST:
        raise ValueError("manifest: bad size")
    return n


class Text:
    # JSON in flash, of which no more than an entry and a piece is in memory.

    def __init__(self, f):
        self.file = f
        self.buffer = memoryview(bytearray(PIECE))
        self.piece = b""
        self.at = 0  # what is before that is done with

    def more(self):
        ota_boot.alive()
        n = self.file.readinto(self.buffer)
        self.piece = self.piece[self.at :] + bytes(self.buffer[:n])
        self.at = 0
        return n > 0

    def next(self):
        # The next byte that is no blank, as a number; -1 at the end.
        while True:
            while self.at < len(self.piece):
                c = self.piece[self.at]
                if c > 32:
                    return c
                self.at += 1
            if not self.more():
                return -1

    def skip(self, c):
        # Goes on behind c, if that is next.
        if self.next() != c:
            return False
        self.at += 1
        return True

    def must(self, done):
        if not done:
            raise ValueError("manifest: no JSON")

    def value(self, most=LONGEST_ENTRY):
        # Reads a value. No beginning of an object, a list or a text is one itself:
        # it ends at the first mark for an end that makes it whole.
        ends = {0x7B: b"}", 0x5B: b"]", 0x22: b'"'}.get(self.next())
        if not ends:
            return self.word()
        length = 1
        while True:
            end = self.piece.find(ends, self.at + length)
            length = (len(self.piece) if end < 0 else end + 1) - self.at
            if length > most:
                raise ValueError("manifest: an entry is too long, or no JSON")
            if end < 0:
                self.must(self.more())
                continue
            try:
                value = json.loads(self.piece[self.at : end + 1].decode())
            except ValueError:
                continue
            self.at = end + 1
            return value

    def word(self):
        # A number, true, false or null.
        word = b""
        while self.next() > 0 and len(word) < 40:
            c = self.piece[self.at : self.at + 1]
            if c in b",]}:":
                break
            word += c
            self.at += 1
        return json.loads(word.decode())


def entries():
    # Reads the manifest from flash: yields (key, value), and for a list (key, thing)
    # for each thing in it; lists that nobody here knows are left out. The manifest
    # "null", which says that there is nothing newer, yields (None, None).
    with open(MANIFEST, "rb") as f:
        text = Text(f)
        if not text.skip(0x7B):  # {
            text.must(text.value() is None)
            yield None, None
        else:
            while not text.skip(0x7D):  # }
                key = text.value()
                text.must(isinstance(key, str) and text.skip(0x3A))  # :
                listed = text.skip(0x5B)  # [
                if listed != (key in LISTS) and (key in LISTS or key in ("firmware", "version")):
                    raise ValueError("manifest: %s is not what it should be" % key)
                if not listed:
                    yield key, text.value(LONGEST_SIGNED if key == "signed" else LONGEST_ENTRY)
                while listed and not text.skip(0x5D):  # ]
                    item = text.value()
                    if key in LISTS:
                        yield key, item
                    text.must(text.skip(0x2C) or text.next() == 0x5D)  # ,
                text.must(text.skip(0x2C) or text.next() == 0x7D)
        text.must(text.next() < 0)


def base_of(path, want, part):
    # Where the new and the old content of a path are kept, less the ending.
    return store(path, part) + "/" + hexdigest(hashlib.sha256((path + want).encode()))[:12]
