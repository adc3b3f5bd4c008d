# Checks the manifest of an update, whole, before anything is done. ota_update.py
# uses this, and needs it no more then; nothing here changes a file.

try:
    import ubinascii as binascii
    import uhashlib as hashlib
    import uos as os
except ImportError:
    import binascii
    import hashlib
    import os

from ota_boot import HOME, kind, parent
from ota_common import digest
from ota_manifest import (
    LISTS,
    base_of,
    entries,
    expected,
    local,
    release_name,
    request_path,
    size,
)


def order(version):
    # The parts of a version, as a list that compares as versions do: numbers by
    # value and before words; words of small letters apart from what is left.
    parts = []
    part = ""
    last = "."
    for c in version + ".":
        sort = "0" if "0" <= c <= "9" else "a" if "a" <= c <= "z" else c if c == "." else "-"
        if sort != last and part:
            parts.append((0, int(part), "") if last == "0" else (1, 0, part))
            part = ""
        last = sort
        if c != ".":
            part += c
    return parts


def recovers(path):
    # Is it boot.py or ota_boot.py, or what Python would import in its place?
    names = path[len(HOME) + 1 :].lower().split("/")
    if len(names) == 1 and names[0].split(".")[0] == "boot":
        return True
    for name in names:
        if name.split(".")[0] == "ota_boot":
            return True
    return False


def number(text):
    # Stands for a text in a set, where the text itself would take too much room.
    h = hashlib.sha256(text.encode()).digest()
    return (h[0] & 31) << 24 | h[1] << 16 | h[2] << 8 | h[3]


class Offer:
    # What a manifest says, checked: without its lists, of which there are digests
    # only, in so few bits that two of them may be equal. Where that matters, the
    # manifest is read once more.

    def __init__(self):
        self.version = self.firmware = None
        self.wanted = set()  # the contents, to tell what is staged for them
        self.mark = b""  # the same for the same offer
        self.files = set()
        self.folders = set()
        self.deletes = set()
        self.blocked = set()  # paths of things that must be deleted first

    def sign(self, text):
        self.mark = hashlib.sha256(self.mark + text.encode()).digest()

    def image(self, item):
        request_path(item)
        size(item)
        if not release_name(item.get("version", "0")):
            raise ValueError("manifest: firmware with a bad version")
        self.sign(expected(item)[0])
        self.firmware = item

    def delete(self, path):
        if recovers(path):
            raise ValueError("%s can be deleted over a cable only" % path)
        self.sign(path)
        n = number(path)
        self.deletes.add(n)
        if n in self.files and listed(path, "new", "update"):
            raise ValueError("manifest: deleted and new: " + path)

    def file(self, item):
        request_path(item)
        size(item)
        path = local(item.get("dst_path"))
        want, sort = expected(item)
        if recovers(path) and digest(path, sort) != want:
            raise ValueError("%s can be changed over a cable only" % path)
        n = number(path)
        if n in self.files and listed(path, "new", "update") > 1:
            raise ValueError("manifest: twice: " + path)
        if n in self.deletes and listed(path, "delete"):
            raise ValueError("manifest: deleted and new: " + path)
        if n in self.folders and listed(path + "/", "new", "update"):
            raise ValueError("manifest: both a file and a directory: " + path)
        self.files.add(n)
        if kind(path) == 2:
            self.blocked.add(path)
        self.folder(parent(path))
        self.wanted.add(int(base_of(path, want, "a")[-12:-5], 16))
        self.sign(path + want)

    def folder(self, path):
        while path:
            n = number(path)
            if n in self.folders:
                return  # and what it is in, too
            self.folders.add(n)
            if n in self.files and listed(path, "new", "update"):
                raise ValueError("manifest: both a file and a directory: " + path)
            if kind(path) == 1:
                self.blocked.add(path)
            path = parent(path)

    def unblock(self, path):
        # What is where a file or a directory must be goes, or is in the way.
        names = os.listdir(path) if kind(path) == 2 else ()
        for name in names:
            self.unblock(path + "/" + name)
        if not names and number(path) not in self.deletes:
            raise ValueError("%s is in the way of this update" % path)


def check(current):
    # Reads the whole manifest, in one pass, before anything is done: raises a
    # ValueError for what is not right in it. Returns version, firmware, mark and
    # wanted of an Offer, or None: the rest of it takes room.
    offer = Offer()
    for key, item in entries():
        if key is None:
            return None
        if key == "version":
            offer.version = item
        elif key == "firmware":
            offer.image(item)
        elif key == "delete":
            offer.delete(local(item))
        elif key in LISTS:
            offer.file(item)
    if not release_name(offer.version):
        raise ValueError("manifest: no version, or a bad one")
    if order(offer.version) < order(current):
        raise ValueError("manifest: %s is older than %s" % (offer.version, current))
    for path in offer.blocked:
        offer.unblock(path)
    mark = binascii.hexlify(offer.mark).decode()[:16]
    return offer.version, offer.firmware, mark, offer.wanted


def listed(path, *keys):
    # How often a path is in those lists; with a slash at its end, what is below it.
    count = 0
    for key, item in entries():
        if key in keys:
            other = local(item if key == "delete" else item["dst_path"])
            if other == path or path[-1] == "/" and other[: len(path)] == path:
                count += 1
    return count
