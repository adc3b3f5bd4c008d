# Stages an update: asks for the manifest, gets what is new in it, and writes the
# plan that ota_boot.py carries out. OTA.update() uses this, and loads it only then.

import gc
import sys

try:
    import uos as os
except ImportError:
    import os

import ota_boot
from OTA import setting
from ota_boot import CARD, HOME, VERSION_FILE, kind
from ota_common import FIRMWARE, digest, remove, tries
from ota_manifest import (
    MANIFEST,
    base_of,
    entries,
    expected,
    local,
    release_name,
    request_path,
    size,
)

LONGEST_MANIFEST = 256 * 1024


def limited(ota, take, most):
    left = most

    def piece(data):
        nonlocal left
        ota.alive()
        left -= len(data)
        if left < 0:
            raise OSError("more than the promised %d bytes" % most)
        take(data)

    return piece


def stage(ota, state):
    # Puts all files in place; returns the state that ota_boot.install() works from
    # and what ota_image.py needs to know of firmware, or None instead of these.
    try:
        return prepare(ota, state)
    finally:
        gc.collect()  # closes the manifest where reading it was left off
        remove(MANIFEST)


def prepare(ota, state):
    gc.collect()
    current = ota.version()
    if not release_name(current):
        current = ""
    other = find_slot()
    keys = setting("VERIFY")
    ask(ota, state, current, other, keys)
    issued = trust(keys, current, state.get("firmware", "") if other else None) if keys else ""
    offer = None if issued is None else check(current)
    gc.collect()
    if not offer:
        print("OTA: nothing newer than", current)
        return None, None
    version, firmware, mark, wanted = offer
    if version == state.get("failed") and mark == state.get("mark"):
        print("OTA: %s failed here before" % version)
        return None, None
    print("OTA: %s -> %s" % (current, version))
    new = {
        "phase": "apply",
        "set": "b" if state.get("set") == "a" else "a",
        "version": version,
        "mark": mark,
        "firmware": state.get("firmware"),
        "firmware_before": state.get("firmware"),
    }
    ota_boot.sweep(
        # What is staged stays, for an update that was cut short is tried again.
        lambda part, name: (
            part == state.get("set")
            or name[-2:] in (".n", ".p", ".t")
            and int(name[:7], 16) in wanted
        )
    )
    changes = write_plan(ota, new, issued, firmware if other else None, other)
    if firmware and other:
        path = request_path(firmware)
        return new, (other, firmware_name(firmware, path), path, expected(firmware), size(firmware))
    if firmware:
        print("OTA: this board takes no firmware over the air")
    if not changes:
        print("OTA: everything is as in", version)
        return None, None
    return new, None


def check(current):
    # Its code is gone from memory when it is done.
    import ota_check

    try:
        return ota_check.check(current)
    finally:
        sys.modules.pop("ota_check", None)


def trust(keys, current, running):
    # The same: what verifies signatures is large, and used once. For as long, what
    # gets files makes room.
    sys.modules.pop("ota_http", None)
    gc.collect()
    import ota_trust

    try:
        return ota_trust.check(keys, setting("MODEL"), current, running)
    finally:
        for name in ("ota_trust", "ota_sha512", "ota_ed25519"):
            sys.modules.pop(name, None)
        gc.collect()


def find_slot():
    # None on a board whose firmware does not change over the air.
    try:
        from ota_slot import Slot

        return Slot()
    except (ImportError, AttributeError, OSError):
        return None


def ask(ota, state, current, other, keys):
    import ota_query

    firmware = state.get("firmware", "") if other else None
    path = "/manifest.json?hash=sha256" + ("&signed=1&" if keys else "&")
    path += ota_query.query(ota, current, firmware, state.get("failed"))
    del ota_query, sys.modules["ota_query"]
    ota_boot.makedirs(MANIFEST)
    tries(path, lambda: get_manifest(ota, path))


def get_manifest(ota, path):
    with open(MANIFEST, "wb") as f:
        ota.get(path, limited(ota, f.write, LONGEST_MANIFEST))


def write_plan(ota, new, issued, firmware, slot):
    # Writes the plan and stages what it needs; returns the number of steps.
    plan = ota_boot.plan(new)
    ota_boot.makedirs(plan)
    count = 0
    with open(plan, "w") as f:
        for key, item in entries():
            if key == "delete":
                path = local(item)
                if kind(path) == 1 and path != VERSION_FILE:
                    base = base_of(path, "", new["set"])
                    ota_boot.makedirs(base)
                    f.write("D\t%s\t%s\n" % (path, base))
                    count += 1
            elif key == "new" or key == "update":
                path = local(item["dst_path"])
                want, sort = expected(item)
                have = path != VERSION_FILE and digest(path, sort)
                if path != VERSION_FILE and have != want:
                    base = base_of(path, want, new["set"])
                    get_file(ota, item, path, base, have)
                    f.write("%s\t%s\t%s\n" % ("R" if kind(path) == 1 else "A", path, base))
                    count += 1
        if new["version"] not in (ota.version(), "0"):
            record(f, new, VERSION_FILE, "VERSION = '%s'\n" % new["version"])
            count += 1
        if issued and (count or firmware):
            record(f, new, HOME + "/.ota/issued", issued)
        want, sort = expected(firmware) if firmware else ("", "")
        if sort == "sha256" and slot.part:  # else nobody can read what runs
            record(f, new, FIRMWARE, "%d %s" % (size(firmware), want))
        f.write("end\n")
    return count


def record(plan, new, path, text):
    # A file of the updater's own, which comes and goes with the release.
    base = base_of(path, "", new["set"])
    with open(base + ".n", "w") as f:
        f.write(text)
    plan.write("%s\t%s\t%s\n" % ("R" if kind(path) else "A", path, base))


def get_file(ota, item, path, base, have):
    want, sort = expected(item)
    if digest(base + ".n", sort) == want:
        return  # staged by an update that was cut short
    print("OTA: getting", path)
    if HOME and path.startswith(CARD) and not kind(CARD):
        raise OSError("no card at " + CARD)
    ota_boot.makedirs(base)
    url = request_path(item)
    from ota_part import Part

    part = Part(base, want, sort, size(item), path, have if sort == "sha256" else "")
    tries(url, lambda: part.receive(ota, url))
    ota_boot.move(base + ".p", base + ".n")
    remove(base + ".t")


def firmware_name(item, path):
    name = path.split("?")[0]
    name = name[name.rfind("_") + 1 : -4]
    return item.get("version") or (name if release_name(name) else "")
