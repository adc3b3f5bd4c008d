# Updates this board over the air: its files and, where the board can, its
# firmware. OTA knows what an update is, WiFiOTA how to get bytes over WiFi; for
# another way write a class with the same three methods as WiFiOTA has.
#
#     from OTA import WiFiOTA
#
#     ota = WiFiOTA("network", "password", "192.168.4.2", 8000)
#     ota.confirm()      # this release works; without it, it is gone after 3 starts
#     ota.connect()
#     ota.update()       # resets the board if there was something newer
#
# An update is staged whole in .ota and checked there before anything changes.
# Then ota_boot.py, which updates never replace, renames it into place in steps
# that a reset may cut anywhere. Nothing is ever in memory whole.

import gc
import time

try:
    import ubinascii as binascii
    import uos as os
except ImportError:
    import binascii
    import os

import ota_boot
import ota_http
from ota_boot import CARD, HOME, kind
from ota_manifest import (
    MANIFEST,
    base_of,
    check,
    digest,
    entries,
    expected,
    listed,
    local,
    release_name,
    request_path,
)

TRIES = 3  # for each file
WAIT = 20  # seconds for the WiFi network
LONGEST_MANIFEST = 256 * 1024

VERSION_FILE = HOME + "/OTA_VERSION.py"


def limited(take, most):
    left = most

    def piece(data):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError("more than the promised %d bytes" % most)
        take(data)

    return piece


class OTA:
    # For a transport to write. What goes wrong is an OSError, and tried again.

    def connect(self):
        raise NotImplementedError

    def disconnect(self):
        raise NotImplementedError

    def get(self, path, take):
        # Calls take(piece) for every piece of what the server has at path.
        raise NotImplementedError

    # For an application to call.

    def version(self):
        # The release on this board, "" if that is not known.
        try:
            with open(VERSION_FILE) as f:
                parts = f.read(200).replace('"', "'").split("'")
        except OSError:
            return ""
        return parts[1] if len(parts) > 2 and release_name(parts[1]) else ""

    def update(self):
        # Installs what the server has that is newer, and resets the board.
        # Returns False when there is nothing; after an error nothing has changed.
        if ota_boot.FORMAT != 1:
            raise OSError("this OTA.py needs another ota_boot.py: install that over a cable")
        if not ota_boot.ran:
            raise OSError("boot.py must call ota_boot.boot(): what would recover this update?")
        state = ota_boot.load()
        if state.get("phase"):
            raise OSError("%s is on trial: confirm() it first" % state["version"])
        try:
            new, switch = self._stage(state)
        finally:
            if kind(MANIFEST):
                os.remove(MANIFEST)
        if not new:
            return False
        ota_boot.save(new)
        ota_boot.install(new, switch)
        print("OTA: %s is installed" % new["version"])
        ota_boot.reset()
        return True

    def confirm(self):
        # This release works and stays. Costs little when it was said before.
        state = ota_boot.load()
        if state.get("phase") != "trial":
            return
        if state.get("slot"):
            ota_boot.mark_valid()
        for key in ("phase", "starts", "seen"):
            state.pop(key, None)
        ota_boot.save(state)
        ota_boot.sweep(lambda part, name: part == state["set"])
        print("OTA: %s is confirmed" % state["version"])

    def rollback(self):
        # Goes back to the release before this one, and resets the board.
        state = ota_boot.load()
        if not state.get("set"):
            raise OSError("there is no release to go back to")
        ota_boot.back(state, "rollback()")
        ota_boot.reset()

    # The steps of update().

    def _stage(self, state):
        # Puts everything in place; returns the state that ota_boot.install() works
        # from and the function that switches the firmware, or None and None.
        gc.collect()
        other = self._slot()
        self._ask(state, other)
        offer = check(self.version())
        if not offer:
            print("OTA: nothing newer than", self.version())
            return None, None
        version = offer["version"]
        if version == state.get("failed") and offer["mark"] == state.get("mark"):
            print("OTA: %s failed here before" % version)
            return None, None
        print("OTA: %s -> %s" % (self.version(), version))
        new = {
            "phase": "apply",
            "set": "b" if state.get("set") == "a" else "a",
            "version": version,
            "mark": offer["mark"],
            "firmware": state.get("firmware"),
            "firmware_before": state.get("firmware"),
        }
        wanted = offer["wanted"]
        ota_boot.sweep(
            # What is staged stays, for an update that was cut short is tried again.
            lambda part, name: (
                part == state.get("set") or name[-2:] == ".n" and int(name[:7], 16) in wanted
            )
        )
        changes = self._plan(new)
        firmware = offer.get("firmware")
        if firmware and other:
            self._firmware(state, new, firmware, other)
            return new, other.switch
        if firmware:
            print("OTA: this board takes no firmware over the air")
        if not changes:
            print("OTA: everything is as in", version)
            return None, None
        return new, None

    def _slot(self):
        # None on a board whose firmware does not change over the air.
        try:
            from ota_slot import Slot

            return Slot()
        except (ImportError, AttributeError, OSError):
            return None

    def _ask(self, state, other):
        query = "/manifest.json?hash=sha256"
        for key, value in (
            ("current_ver", self.version() or None),
            ("firmware_ver", state.get("firmware", "") if other else None),
            ("failed", state.get("failed")),
        ):
            if value is not None:
                query += "&%s=%s" % (key, value.replace("+", "%2B"))
        try:
            import machine

            query += "&devid=" + binascii.hexlify(machine.unique_id()).decode()
        except (ImportError, AttributeError):
            pass
        ota_boot.makedirs(MANIFEST)
        self._fetch(query, MANIFEST, LONGEST_MANIFEST)

    def _plan(self, new):
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
                    self._in_the_way(local(item["dst_path"]))
            for key, item in entries():
                if key == "new" or key == "update":
                    path = local(item["dst_path"])
                    want, sort = expected(item)
                    if path != VERSION_FILE and digest(path, sort) != want:
                        base = base_of(path, want, new["set"])
                        self._file(item, path, base)
                        f.write("%s\t%s\t%s\n" % ("R" if kind(path) == 1 else "A", path, base))
                        count += 1
            if new["version"] not in (self.version(), "0"):
                base = base_of(VERSION_FILE, "", new["set"])
                with open(base + ".n", "w") as v:
                    v.write("VERSION = '%s'\n" % new["version"])
                f.write("%s\t%s\t%s\n" % ("R" if kind(VERSION_FILE) else "A", VERSION_FILE, base))
                count += 1
            f.write("end\n")
        return count

    def _in_the_way(self, path):
        # A file where path needs a directory, or the other way round, must be one
        # that this update deletes.
        at = path.find("/", 1)
        while at > 0:
            if kind(path[:at]) == 1 and not listed(path[:at], "delete"):
                raise ValueError("%s needs a directory at %s, a file" % (path, path[:at]))
            at = path.find("/", at + 1)
        if kind(path) == 2:
            for name in os.listdir(path) or (".",):
                self._deleted(path + "/" + name)

    def _deleted(self, path):
        if kind(path) == 2 and path[-2:] != "/.":
            for name in os.listdir(path) or (".",):
                self._deleted(path + "/" + name)
        elif not listed(path, "delete"):
            raise ValueError("%s is in the way of this update" % path)

    def _file(self, item, path, base):
        want, sort = expected(item)
        if digest(base + ".n", sort) == want:
            return  # staged by an update that was cut short
        print("OTA: getting", path)
        if HOME and path.startswith(CARD) and not kind(CARD):
            raise OSError("no card at " + CARD)
        ota_boot.makedirs(base)
        most = item.get("size", 0x3FFFFFFF)
        self._fetch(request_path(item), base + ".p", most, want, sort)
        ota_boot.move(base + ".p", base + ".n")

    def _fetch(self, path, to, most, want=None, sort=None):
        for n in range(TRIES):
            try:
                gc.collect()
                with open(to, "wb") as f:
                    self.get(path, limited(f.write, most))
                if want and digest(to, sort) != want:
                    raise OSError("its hash is wrong")
                return
            except OSError as e:
                if kind(to):
                    os.remove(to)
                self._again(n, path, e)

    def _again(self, n, path, e):
        # Waits before the next try, or gives up; a full disk stays full.
        if e.args[0] == 28 or n + 1 == TRIES:
            print("OTA: %s: %s" % (path, "the disk is full" if e.args[0] == 28 else e))
            raise e
        print("OTA: %s: %s, trying again" % (path, e))
        time.sleep(1 << n)

    def _firmware(self, state, new, item, other):
        want, sort = expected(item)
        path = request_path(item)
        name = path[path.rfind("_") + 1 : -4]
        new["firmware"] = item.get("version") or (name if release_name(name) else "")
        new["slot"] = other.name
        new["slot_before"] = ota_boot.slot()
        size = item.get("size")
        if size and other.digest(sort, size) == want:
            return  # written by an update that was cut short
        if state.get("slot"):
            # The other slot holds what rollback() would start: that ends here.
            for key in ("set", "slot", "slot_before"):
                state.pop(key, None)
            ota_boot.save(state)
        print("OTA: getting firmware", new["firmware"])
        for n in range(TRIES):
            try:
                gc.collect()
                other.start(sort)
                self.get(path, limited(other.write, size or 0x3FFFFFFF))
                if other.finish(sort) != want:
                    raise OSError("its hash is wrong")
                return
            except OSError as e:
                self._again(n, path, e)


class WiFiOTA(OTA):
    def __init__(self, ssid, password, ip, port):
        self.ssid = ssid
        self.password = password
        self.ip = ip
        self.port = port
        self.wlan = None

    def connect(self):
        try:
            import network
        except ImportError:
            return  # a computer, which has its network
        if hasattr(network, "STA_IF"):
            self.wlan = network.WLAN(network.STA_IF)
            self.wlan.active(True)
            if not self.wlan.isconnected():
                self.wlan.connect(self.ssid, self.password)
        else:  # Pycom
            self.wlan = network.WLAN(mode=network.WLAN.STA)
            if not self.wlan.isconnected():
                self.wlan.connect(self.ssid, auth=(network.WLAN.WPA2, self.password))
        for _ in range(WAIT * 10):
            if self.wlan.isconnected():
                return
            time.sleep(0.1)
        raise OSError("no WiFi network %s" % self.ssid)

    def disconnect(self):
        # Switches WiFi off.
        try:
            import network
        except ImportError:
            return
        if hasattr(network, "STA_IF"):
            self.wlan = network.WLAN(network.STA_IF)
            if self.wlan.active():
                self.wlan.disconnect()
                self.wlan.active(False)
        else:
            network.WLAN().deinit()

    def get(self, path, take):
        ota_http.get(self.ip, self.port, path, take)
