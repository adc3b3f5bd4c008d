# Gets a file over HTTP, in small pieces. WiFiOTA uses this; so can any transport
# that has sockets.

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
                if words[1] != b"200":
                    raise OSError("the server says " + words[1].decode())
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
        self.size += len(piece)
        if self.size > 8192:
            raise OSError("the head of the response does not end")
        return -1


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


def get(ip, port, path, take, alive=lambda: None):
    # Calls take(piece) for every piece of the body, and alive() at least every
    # STEP seconds. Raises an OSError for all that the server or the network does.
    address = socket.getaddrinfo(ip, port)[0][-1]
    s = patient(alive, lambda: connected(address))
    try:
        request = "GET %s HTTP/1.0\r\nHost: %s:%d\r\n\r\n" % (path, ip, port)
        request = request.encode()
        while request:
            request = request[s.send(request) :]
        head = Head()
        left = None
        while left is None or left > 0:
            piece = patient(alive, lambda: s.recv(PIECE))
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
