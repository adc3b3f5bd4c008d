# Checks that a step from one release to the next is what was signed at home, by one
# of the keys in config.VERIFY: ota_update.py loads this where there are keys, and
# does nothing before it is done. What is signed is a DSSE envelope in the manifest;
# it holds a digest of the manifest's lists, so whoever carries them can change none.

import gc
import sys
import time

try:
    import ubinascii as binascii
    import uhashlib as hashlib
    import ujson as json
except ImportError:
    import binascii
    import hashlib
    import json

from ota_boot import HOME
from ota_common import hexdigest
from ota_manifest import entries

TYPE = "application/vnd.ota-step+json"
# When what is installed was signed. An update replaces it like any other file, so
# a rollback brings the old one back.
ISSUED = HOME + "/.ota/issued"


def refused(why):
    raise ValueError("manifest: not trusted: " + why)


class Lists:
    # What a manifest says, and the digest of its lists: one pass, one open hash.

    def __init__(self):
        self.hash = hashlib.sha256()
        self.signed = self.version = self.firmware = None
        self.full = False
        self.count = 0

    def read(self):
        try:
            for key, item in entries():
                self.take(key, item)
        finally:
            self.steps = hexdigest(self.hash)

    def take(self, key, item):
        if key in ("new", "update"):
            self.file(key[0].upper(), item)
        elif key == "delete":
            self.line("D", item, "\n")
        elif key == "full" and item is True:
            self.full = True
            self.hash.update(b"F\n")
        elif key in ("signed", "version", "firmware"):
            setattr(self, key, item)

    def file(self, what, item):
        want = item.get("sha256") if isinstance(item, dict) else None
        if not isinstance(want, str):
            refused("an entry without SHA-256")
        self.line(what, item.get("dst_path"), "\0%s\n" % want)

    def line(self, what, path, end):
        if not isinstance(path, str):
            refused("a path is missing")
        self.count += 1
        path = path[1:] if path[:1] == "/" else path
        self.hash.update(("%s %s%s" % (what, path, end)).encode())


def opened(envelope, keys):
    # The payload of an envelope that one of the keys has signed.
    try:
        payload = binascii.a2b_base64(envelope["payload"])
        signatures = [binascii.a2b_base64(one["sig"]) for one in envelope["signatures"]]
        kind = envelope["payloadType"]
        keys = [binascii.unhexlify(key) for key in ([keys] if isinstance(keys, str) else keys)]
    except (KeyError, TypeError, ValueError):
        refused("no signed step, or a bad key in config.VERIFY")
    if kind != TYPE:
        refused("what is signed is no step")
    message = ("DSSEv1 %d %s %d " % (len(TYPE), TYPE, len(payload))).encode() + payload
    if not signed_by_one(keys, signatures, message):
        refused("no signature of a key in config.VERIFY")
    return payload


def signed_by_one(keys, signatures, message):
    tries = hashed(keys, signatures, message)
    # One module after the other: there is hardly room for both.
    sys.modules.pop("ota_sha512")
    gc.collect()
    from ota_ed25519 import verify

    for key, signature, digest in tries:
        if verify(key, signature, digest):
            return True
    return False


def hashed(keys, signatures, message):
    from ota_sha512 import sha512

    return [(key, s, sha512(s[:32] + key + message)) for s in signatures for key in keys]


def moment(text):
    # A time in UTC as text, in whole seconds, so that it compares as times do.
    if isinstance(text, str) and text[-1:] == "Z":
        text = text[:19]
        if "".join(["0" if "0" <= c <= "9" else c for c in text]) == "0000-00-00T00:00:00":
            return text
    refused("a time is not what it should be")


def last_issued():
    try:
        with open(ISSUED) as f:
            text = f.read(19)
    except (OSError, ValueError):
        return ""
    # What the flash has spoilt must not refuse all updates for ever.
    return text if text[:2] == "20" else ""


def in_time(step):
    # Checks when it was signed, and until when it counts; returns the former.
    issued = moment(step.get("issued"))
    last = last_issued()
    if issued < last:
        refused("signed at %s, before what is installed" % issued)
    if step.get("expires") is None:
        return issued
    expires = moment(step["expires"])
    clock = time.gmtime() if hasattr(time, "gmtime") else time.localtime()
    now = "%04d-%02d-%02dT%02d:%02d:%02d" % tuple(clock[:6])
    if now < "2026" or now < issued:
        print("OTA: the clock is not set: whether this has expired is not known")
    elif now > expires:
        refused("expired at " + expires)
    return issued


def same_firmware(found, signed, running):
    # Is it the firmware that was signed? Without any, what runs must do. running is
    # None on a board that takes none.
    if found is not None:
        for key in ("version", "sha256", "size"):
            if not isinstance(found, dict) or not signed or found.get(key) != signed[key]:
                refused("other firmware was signed")
    elif signed and running is not None:
        from ota_check import order

        if order(running) < order(signed["version"]):
            refused("the firmware that belongs to it is missing")


def check(keys, model, current, running):
    # Raises a ValueError unless the manifest is a step from current that was signed
    # for this model. Returns when it was signed; None if it leads to nothing newer.
    found = Lists()
    found.read()
    step = json.loads(opened(found.signed, keys).decode())
    try:
        if step["from"] != ("*" if found.full else current) or step["to"] != found.version:
            refused("it leads from %s to %s" % (step["from"] or "nothing", step["to"]))
        if model and step["model"] != model:
            refused("it is for the model %s" % step["model"])
        if step["steps"] != found.steps:
            refused("its lists are not those that were signed")
        same_firmware(found.firmware, step["firmware"], running)
        issued = in_time(step)
    except (KeyError, TypeError, AttributeError):
        refused("the step is not what it should be")
    if not found.count and found.firmware is None and found.version == current:
        return None
    return issued
