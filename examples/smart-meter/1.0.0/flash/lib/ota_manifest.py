# Reads the manifest of an update: what is in it, and that it is what it should
# be. OTA.py uses this; nothing here changes a file.

try:
    import ubinascii as binascii
    import uhashlib as hashlib
    import ujson as json
except ImportError:
    import binascii
    import hashlib
    import json

from ota_boot import CARD, HOME, kind, parent, store

PIECE = 512  # bytes that are in memory at a time
LONGEST_ENTRY = 1024
LONGEST_PATH = 160

MANIFEST = HOME + "/.ota/manifest"


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


def entries():
    # Reads a manifest from flash, one entry at a time: yields (key, value), and
    # for a list (key, thing) for each thing in it. The manifest "null", which
    # says that there is nothing newer, yields (None, None).
    text = bytearray()
    key = None
    depth = 0  # 1: in the manifest, 2: in one of its values; -1: behind its end
    listed = quoted = escaped = False
    piece = bytearray(PIECE)
    with open(MANIFEST, "rb") as f:
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
                        if c != 0x7B or text:
                            raise ValueError("manifest: no object")
                        keep = False
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
                    if not isinstance(key, str):
                        raise ValueError("manifest: a key that is no text")
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


def check(current):
    # Reads the whole manifest before anything is done: raises a ValueError for
    # what is not right in it; returns what it says, without its lists.
    offer = {"wanted": set()}
    paths = set()
    mark = hashlib.sha256()
    for key, item in entries():
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
            request_path(item)
            path = local(item.get("dst_path"))
            want, sort = expected(item)
            if not isinstance(item.get("size", 0), int):
                raise ValueError("manifest: bad size")
            if recovers(path) and digest(path, sort) != want:
                raise ValueError("%s can be changed over a cable only" % path)
            n = number(path)
            if n in paths and listed(path, "new", "update") > 1:
                raise ValueError("manifest: twice: " + path)
            paths.add(n)
            offer["wanted"].add(int(base_of(path, want, "a")[-12:-5], 16))
            mark.update((path + want).encode())
        elif key is None:
            return None
    for key, item in entries():
        if key == "delete":
            path = local(item)
            if number(path) in paths and listed(path, "new", "update"):
                raise ValueError("manifest: deleted and new: " + path)
        elif key == "new" or key == "update":
            path = parent(local(item["dst_path"]))
            while path:
                if number(path) in paths and listed(path, "new", "update"):
                    raise ValueError("manifest: both a file and a directory: " + path)
                path = parent(path)
    version = offer.get("version")
    if not release_name(version):
        raise ValueError("manifest: no version, or a bad one")
    if order(version) < order(current):
        raise ValueError("manifest: %s is older than %s" % (version, current))
    offer["mark"] = hexdigest(mark)[:16]
    return offer


def listed(path, *keys):
    # How often a path is in those lists.
    count = 0
    for key, item in entries():
        if key in keys and local(item if key == "delete" else item["dst_path"]) == path:
            count += 1
    return count


def base_of(path, want, part):
    # Where the new and the old content of a path are kept, less the ending.
    return store(path, part) + "/" + hexdigest(hashlib.sha256((path + want).encode()))[:12]
