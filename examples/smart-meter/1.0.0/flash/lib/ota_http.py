# Gets a file over HTTP, or over HTTPS, in small pieces. WiFiOTA uses this; so can
# any transport that has sockets.

import time

try:
    import usocket as socket
except ImportError:
    import socket

PIECE = 512  # bytes that are in memory at a time
TIMEOUT = 20  # seconds that the server may be silent
STEP = 4  # of them at a time: a watchdog wants to be fed meanwhile


class Head:
    # The head of an HTTP response, whatever pieces it comes in.

    def __init__(self):
        self.line = bytearray()
        self.size = 0
        self.status = self.length = None
        self.start = self.coding = b""
        self.tag = ""

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
                if line[:7] != b"HTTP/1." or len(words) < 2 or not words[1].isdigit():
                    raise OSError("no HTTP server")
                if words[1] == b"401":
                    raise OSError("the server says 401: it wants a token, or another one")
                if words[1] not in (b"200", b"206", b"416"):
                    raise OSError("the server says " + words[1].decode())
                self.status = words[1]
            elif not line:
                return at + 1
            else:
                colon = line.find(b":")
                name = line[:colon].lower()
                if name == b"content-length":
                    digits = line[colon + 1 :].strip()
                    if not digits.isdigit() or len(digits) > 9:
                        raise OSError("the server says no length that is one")
                    self.length = int(digits)
                elif name == b"transfer-encoding":
                    raise OSError("the server answers in chunks")
                elif name == b"etag":
                    self.tag = strong(line[colon + 1 :].strip())
                elif name == b"content-encoding":
                    self.coding = line[colon + 1 :].strip()
                elif name == b"content-range":
                    self.start = line[colon + 1 :].strip()
        self.size += len(piece)
        if self.size > 8192:
            raise OSError("the head of the response does not end")
        return -1


def strong(tag):
    # A tag that stands for each byte, as text; "" for another sort, or none at all.
    for c in tag:
        if not 32 < c < 127:
            return ""
    return tag.decode() if tag[:1] == b'"' and tag[-1:] == b'"' else ""


def silent(e):
    # Was it a time-out? (Ports number it in their own ways, and CPython names it.)
    return e.args and e.args[0] in (11, 110, 116, "timed out")


def patient(alive, step):
    # Does what may take TIMEOUT, in steps that end with a time-out each.
    for waited in range(STEP, TIMEOUT + 1, STEP):
        alive()
        try:
            return step()
        except OSError as e:
            if not silent(e) or waited == TIMEOUT:
                raise


def connected(address):
    s = socket.socket()
    try:
        s.settimeout(STEP)
        s.connect(address)
        return s
    except OSError:
        s.close()
        raise


def secured(s, host, ca):
    # TLS with a server that has a certificate for its name, of the authority in the
    # file ca: DER, but PEM on a Pycom board.
    try:
        import ssl
    except ImportError:
        raise OSError("this firmware has no TLS")
    if not hasattr(ssl, "SSLContext"):  # Pycom
        return ssl.wrap_socket(s, cert_reqs=ssl.CERT_REQUIRED, ca_certs=ca, server_hostname=host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    with open(ca, "rb") as f:
        context.load_verify_locations(cadata=f.read())
    return context.wrap_socket(s, server_hostname=host)


def received(s, alive):
    # The next piece, b"" at the end.
    if hasattr(s, "recv"):
        return patient(alive, lambda: s.recv(PIECE))
    # MicroPython's TLS has only read(), which waits for all that it is asked for,
    # unless nothing waits; a time-out in the middle would lose what it has.
    s.setblocking(False)
    for _ in range(TIMEOUT * 20):
        piece = s.read(PIECE)
        if piece is not None:
            return piece
        alive()
        time.sleep(0.05)
    raise OSError(110)  # ETIMEDOUT


def ask(s, method, host, port, path, token, part):
    request = "%s %s HTTP/1.0\r\nHost: %s:%d\r\n" % (method, path, host, port)
    if token:
        request += "Authorization: Bearer %s\r\n" % token
    if part:
        request += getattr(part, "headers", "")
    if part and part.at:
        request += "Range: bytes=%d-\r\nIf-Range: %s\r\n" % (part.at, part.tag)
    request = (request + "\r\n").encode()
    send = getattr(s, "send", None) or s.write
    while request:
        request = request[send(request) :]


def begin(part, head):
    # Where the body begins: at what was asked for, or at the beginning.
    if head.status == b"200":
        return part.begin(0, head.tag)
    same = part.at and head.status == b"206" and head.tag in ("", part.tag)
    if not same or head.start[: head.start.find(b"-")] != ("bytes %d" % part.at).encode():
        part.begin(0, "")
        raise OSError("the server has another file now")
    part.begin(part.at, part.tag)


def body(s, head, piece, alive):
    # The pieces of a body; the first one came with the head.
    left = 0x3FFFFFFF if head.length is None else head.length
    while left > 0:
        if piece:
            yield piece[:left]
            left -= len(piece)
        if left > 0:
            piece = received(s, alive)
            if not piece:
                break
    if left > 0 and head.length is not None:
        raise OSError("the connection was cut")


def get(host, port, path, take, alive=lambda: None, token="", ca="", part=None):
    # Calls take(piece) for every piece of the body, and alive() at least every
    # STEP seconds. Raises an OSError for all that the server or the network does.
    # With ca, the name of a file, it is HTTPS. part is a Part of ota_part.py. Where
    # take is None, only the head is asked for.
    address = socket.getaddrinfo(host, port)[0][-1]
    plain = s = patient(alive, lambda: connected(address))
    try:
        if ca:
            s = secured(s, host, ca)
        ask(s, "GET" if take else "HEAD", host, port, path, token, part)
        head = Head()
        at = -1
        while at < 0:
            piece = received(s, alive)
            if not piece:
                raise OSError("the connection was cut")
            at = head.feed(piece)
        if not take:
            return
        pieces = body(s, head, piece[at:], alive)
        if part and head.status == b"200" and head.coding not in (b"", b"identity"):
            return part.coded(head.coding, pieces)
        if part:
            begin(part, head)
        elif head.status != b"200":
            raise OSError("the server sends a part")
        for piece in pieces:
            take(piece)
    finally:
        s.close()
        plain.close()
