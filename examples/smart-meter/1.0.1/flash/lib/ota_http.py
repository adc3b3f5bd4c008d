# Gets a file over HTTP, in small pieces. WiFiOTA uses this; so can any transport
# that has sockets.

try:
    import usocket as socket
except ImportError:
    import socket

PIECE = 512  # bytes that are in memory at a time
TIMEOUT = 20  # seconds that the server may be silent


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


def get(ip, port, path, take):
    # Calls take(piece) for every piece of the body.
    s = socket.socket()
    try:
        s.settimeout(TIMEOUT)
        s.connect(socket.getaddrinfo(ip, port)[0][-1])
        request = "GET %s HTTP/1.0\r\nHost: %s:%d\r\n\r\n" % (path, ip, port)
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
