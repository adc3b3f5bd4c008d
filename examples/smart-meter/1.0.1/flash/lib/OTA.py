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
    import uhashlib as hashlib
    import ujson as json
    import uos as os
    import usocket as socket
except ImportError:
    import binascii
    import hashlib
    import json
    import os
    import socket

import ota_boot
from ota_boot import CARD, HOME, kind

PIECE = 512  # bytes that are in memory at a time
BLOCK = 4096  # bytes of firmware that are written at a time
TRIES = 3  # for each file
TIMEOUT = 20  # seconds that the server may be silent
LONGEST_MANIFEST = 256 * 1024
LONGEST_ENTRY = 1024
LONGEST_PATH = 160

MANIFEST = HOME + "/.ota/manifest"
VERSION_FILE = HOME + "/OTA_VERSION.py"


# ---- Versions and paths


def release_name(text):
    if not isinstance(text, str) or not 0 < len(text) <= 64:
        return False
    for c in text:
        if not ("0" <= c <= "9" or "a" <= c.lower() <= "z" or c in ".+_-"):
            return False
    return "0" <= text.lstrip("vV")[:1] <= "9" and text[1:2] not in ("v", "V")


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
            if ord(c) < 32 or c in '\\:"*<>|\x7f':
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


def recovers(path):
    # Is it boot.py or ota_boot.py, or what Python would import in its place?
    names = path[len(HOME) + 1 :].lower().split("/")
    if len(names) == 1 and names[0].split(".")[0] == "boot":
        return True
    for name in names:
        if name.split(".")[0] == "ota_boot":
            return True
    return False


# ---- Hashes


def hexdigest(h):
    return binascii.hexlify(h.digest()).decode()


def digest(path, sort):
    # Of a file as it is in flash; "" without one.
    if kind(path) != 1:
        return ""
    h = getattr(hashlib, sort)()
    piece = bytearray(PIECE)
    view = memoryview(piece)
    with open(path, "rb") as f:
        while True:
            n = f.readinto(piece)
            if not n:
                return hexdigest(h)
            h.update(view[:n])


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


def number(text):
    # Stands for a text in a set, where the text itself would take too much room.
    h = hashlib.sha256(text.encode()).digest()
    return (h[0] & 31) << 24 | h[1] << 16 | h[2] << 8 | h[3]


# ---- The manifest


def request_path(item):
    # The path of a URL: a board asks the server that it was given.
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


def entries(path):
    # Reads a manifest from flash, one entry at a time: yields (key, value), and
    # for a list (key, thing) for each thing in it. The manifest "null", which
    # says that there is nothing newer, yields (None, None).
    text = bytearray()
    key = None
    depth = 0  # 1: in the manifest, 2: in one of its values; -1: behind its end
    listed = quoted = escaped = False
    piece = bytearray(PIECE)
    with open(path, "rb") as f:
        while True:
            n = f.readinto(piece)
            if not n:
                break
            for i in range(n):
                c = piece[i]
                keep = True
                done = False
                if quoted:
                    if escaped:
                        escaped = False
                    elif c == 0x5C:
                        escaped = True
                    elif c == 0x22:
                        quoted = False
                elif c == 0x22:
                    quoted = True
                elif c <= 0x20:
                    keep = False
                elif c == 0x7B or c == 0x5B:  # { [
                    depth += 1
                    if depth == 1:
                        keep = c != 0x7B
                    elif depth == 2 and c == 0x5B:
                        listed = True
                        keep = False
                elif c == 0x7D or c == 0x5D:  # } ]
                    depth -= 1
                    done = depth == 0 or depth == 1 and listed
                elif c == 0x2C:  # ,
                    done = depth == (2 if listed else 1)
                elif c == 0x3A and depth == 1:  # :
                    key = json.loads(text.decode())
                    text = bytearray()
                    keep = False
                if done:
                    if text:
                        yield key, json.loads(text.decode())
                        text = bytearray()
                    if depth == 1:
                        listed = False
                    elif depth == 0:
                        depth = -1
                elif keep:
                    if depth < 0 or len(text) > LONGEST_ENTRY:
                        raise ValueError("manifest: an entry is too long, or no JSON")
                    text.append(c)
    if depth == 0 and text == b"null":
        yield None, None
    elif depth != -1:
        raise ValueError("manifest: no object, or cut short")


def limited(take, most):
    left = most

    def piece(data):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError("more than the promised %d bytes" % most)
        take(data)

    return piece


# ---- Firmware


class Slot:
    # The firmware slot that does not run now.

    def __init__(self):
        try:
            from esp32 import Partition

            self.part = Partition(Partition.RUNNING).get_next_update()
            self.name = self.part.info()[4]
            self.room = self.part.info()[3]
        except ImportError:
            import pycom

            self.part = None
            self.pycom = pycom
            self.name = "unknown"  # firmware from before pycom.bootmgr()
            if hasattr(pycom, "bootmgr"):
                first = pycom.bootmgr()[0].lower() == "factory"
                self.name = "ota_0" if first else "Factory"
        self.block = bytearray(BLOCK)
        self.view = memoryview(self.block)

    def start(self, sort):
        self.hash = getattr(hashlib, sort)()
        self.fill = self.count = 0
        if not self.part:
            self.pycom.ota_start()

    def write(self, piece):
        piece = memoryview(piece)
        while len(piece):
            n = min(len(piece), BLOCK - self.fill)
            self.view[self.fill : self.fill + n] = piece[:n]
            self.fill += n
            piece = piece[n:]
            if self.fill == BLOCK:
                self.flush()

    def flush(self):
        data = self.view[: self.fill]
        self.hash.update(data)
        if not self.part:
            self.pycom.ota_write(data)
        elif (self.count + 1) * BLOCK > self.room:
            raise ValueError("the firmware is larger than its slot")
        else:
            for i in range(self.fill, BLOCK):
                self.block[i] = 0xFF
            self.part.writeblocks(self.count, self.block)
        self.count += 1
        self.fill = 0

    def finish(self, sort):
        # The digest of what was written.
        size = self.count * BLOCK + self.fill
        if self.fill:
            self.flush()
        return self.digest(sort, size) if self.part else hexdigest(self.hash)

    def digest(self, sort, size):
        # The digest of what is in the slot, as far as a board can read that.
        h = getattr(hashlib, sort)()
        if self.part and size <= self.room:
            for n in range((size + BLOCK - 1) // BLOCK):
                self.part.readblocks(n, self.block)
                h.update(self.view[: min(BLOCK, size - n * BLOCK)])
        return hexdigest(h)

    def switch(self, name):
        if self.part:
            self.part.set_boot()
        else:
            self.pycom.ota_finish()


def slot():
    # None on a board whose firmware does not change over the air.
    try:
        return Slot()
    except (ImportError, AttributeError, OSError):
        return None


# ---- The update


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
        other = slot()
        self._ask(state, other)
        offer = self._check()
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

    def _check(self):
        # Reads the whole manifest before anything is done: raises a ValueError for
        # what is not right in it; returns what it says, without its lists.
        offer = {"wanted": set()}
        paths = set()
        mark = hashlib.sha256()
        for key, item in entries(MANIFEST):
            if key == "version":
                offer[key] = item
            elif key == "firmware":
                offer[key] = item
                request_path(item)
                mark.update(expected(item)[0].encode())
            elif key == "delete":
                path = local(item)
                if recovers(path):
                    raise ValueError("%s can be deleted over a cable only" % path)
                mark.update(path.encode())
            elif key == "new" or key == "update":
                path = local(item.get("dst_path"))
                want, sort = expected(item)
                request_path(item)
                if not isinstance(item.get("size", 0), int):
                    raise ValueError("manifest: bad size")
                if recovers(path) and digest(path, sort) != want:
                    raise ValueError("%s can be changed over a cable only" % path)
                n = number(path)
                if n in paths and self._listed(path, "new", "update") > 1:
                    raise ValueError("manifest: twice: " + path)
                paths.add(n)
                offer["wanted"].add(int(self._base(path, want, "a")[-12:-5], 16))
                mark.update((path + want).encode())
            elif key is None:
                return None
        for key, item in entries(MANIFEST):
            if key == "delete":
                path = local(item)
                if number(path) in paths and self._listed(path, "new", "update"):
                    raise ValueError("manifest: deleted and new: " + path)
            elif key == "new" or key == "update":
                path = ota_boot.parent(local(item["dst_path"]))
                while path:
                    if number(path) in paths and self._listed(path, "new", "update"):
                        raise ValueError("manifest: both a file and a directory: " + path)
                    path = ota_boot.parent(path)
        version = offer.get("version")
        if not release_name(version):
            raise ValueError("manifest: no version, or a bad one")
        if order(version) < order(self.version()):
            raise ValueError("manifest: %s is older than %s" % (version, self.version()))
        offer["mark"] = hexdigest(mark)[:16]
        return offer

    def _listed(self, path, *keys):
        # How often a path is in those lists.
        count = 0
        for key, item in entries(MANIFEST):
            if key in keys and local(item if key == "delete" else item["dst_path"]) == path:
                count += 1
        return count

    def _base(self, path, want, part):
        # Where the new and the old content of a path are kept, less the ending.
        return ota_boot.store(path, part) + "/" + hexdigest(hashlib.sha256((path + want).encode()))[:12]

    def _plan(self, new):
        # Writes the plan and stages what it needs; returns the number of steps.
        plan = ota_boot.plan(new)
        ota_boot.makedirs(plan)
        count = 0
        with open(plan, "w") as f:
            for key, item in entries(MANIFEST):
                if key == "delete":
                    path = local(item)
                    if kind(path) == 1 and path != VERSION_FILE:
                        base = self._base(path, "", new["set"])
                        ota_boot.makedirs(base)
                        f.write("D\t%s\t%s\n" % (path, base))
                        count += 1
                elif key == "new" or key == "update":
                    self._in_the_way(local(item["dst_path"]))
            for key, item in entries(MANIFEST):
                if key == "new" or key == "update":
                    path = local(item["dst_path"])
                    want, sort = expected(item)
                    if path != VERSION_FILE and digest(path, sort) != want:
                        base = self._base(path, want, new["set"])
                        self._file(item, path, base)
                        f.write("%s\t%s\t%s\n" % ("R" if kind(path) == 1 else "A", path, base))
                        count += 1
            if new["version"] not in (self.version(), "0"):
                base = self._base(VERSION_FILE, "", new["set"])
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
            if kind(path[:at]) == 1 and not self._listed(path[:at], "delete"):
                raise ValueError("%s needs a directory at %s, a file" % (path, path[:at]))
            at = path.find("/", at + 1)
        if kind(path) == 2:
            for name in os.listdir(path) or (".",):
                self._deleted(path + "/" + name)

    def _deleted(self, path):
        if kind(path) == 2 and path[-2:] != "/.":
            for name in os.listdir(path) or (".",):
                self._deleted(path + "/" + name)
        elif not self._listed(path, "delete"):
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


# ---- The transport


class Head:
    # The head of an HTTP response, whatever pieces it comes in.

    def __init__(self):
        self.line = bytearray()
        self.size = 0
        self.status = self.length = None

    def feed(self, piece):
        # Returns where in piece the body begins, or -1 if that is still to come.
        for at in range(len(piece)):
            c = piece[at]
            if c != 10:
                if len(self.line) < 200:
                    self.line.append(c)
                continue
            line = bytes(self.line).strip()
            self.line = bytearray()
            if self.status is None:
                self.status = line
                words = line.split(b" ")
                if line[:7] != b"HTTP/1." or len(words) < 2:
                    raise OSError("no HTTP server")
                if words[1] != b"200":
                    raise OSError("the server says " + line[9:].decode())
            elif not line:
                return at + 1
            else:
                colon = line.find(b":")
                name = line[:colon].lower()
                if name == b"content-length":
                    self.length = int(line[colon + 1 :])
                elif name == b"transfer-encoding":
                    raise OSError("the server answers in chunks")
        self.size += len(piece)
        if self.size > 8192:
            raise OSError("the head of the response does not end")
        return -1


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
        for _ in range(TIMEOUT * 10):
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
        s = socket.socket()
        try:
            s.settimeout(TIMEOUT)
            s.connect(socket.getaddrinfo(self.ip, self.port)[0][-1])
            request = "GET %s HTTP/1.0\r\nHost: %s:%d\r\n\r\n" % (path, self.ip, self.port)
            request = request.encode()
            while request:
                request = request[s.send(request) :]
            head = Head()
            left = None
            while left is None or left > 0:
                piece = s.recv(PIECE)
                if not piece:
                    break
                if left is None:
                    at = head.feed(piece)
                    if at < 0:
                        continue
                    piece = piece[at:]
                    left = 0x3FFFFFFF if head.length is None else head.length
                take(piece[:left])
                left -= len(piece)
            if left is None or left > 0 and head.length is not None:
                raise OSError("the connection was cut")
        finally:
            s.close()
