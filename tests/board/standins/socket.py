# Stands in for socket: real TCP, or LoRa, through devices of the test.

import network

AF_INET = 2
AF_LORA = 5
SOCK_STREAM = 1
SOCK_RAW = 3
SOL_LORA = 1
SO_DR = 2


def getaddrinfo(host, port):
    return [(2, 1, 0, "", (host, port))]


def socket(family=AF_INET, kind=SOCK_STREAM):
    return _Lora() if family == AF_LORA else _Tcp()


class _Tcp:
    def __init__(self):
        self.timeout = None
        self.stream = None
        self.left = 0

    def settimeout(self, seconds):
        self.timeout = seconds

    def connect(self, address):
        assert self.timeout, "a socket without a timeout can wait for ever"
        assert network.WLAN.joined, "WiFi is off"
        self.stream = open("/dev/tcp", "r+b")
        self.stream.write("%s %d\n" % address)

    def send(self, data):
        n = min(len(data), 40)  # a real one may take less than it is given
        self.stream.write(data[:n])
        return n

    def recv(self, most):
        # The device hands out pieces: two bytes of length, then the piece.
        if self.left == 0:
            head = self.stream.read(2)
            self.left = head[0] << 8 | head[1]
            if self.left == 0xFFFF:
                self.left = 0
                raise OSError(110)  # ETIMEDOUT
        data = self.stream.read(min(most, self.left)) if self.left else b""
        self.left -= len(data)
        return data

    def close(self):
        if self.stream:
            self.stream.close()


class _Lora:
    def setsockopt(self, level, option, value):
        pass

    def setblocking(self, on):
        pass

    def settimeout(self, seconds):
        pass

    def send(self, data):
        assert not network.WLAN.on, "WiFi is on"
        with open("/dev/lora", "wb") as f:
            f.write(data)

    def recv(self, most):
        with open("/dev/lora", "rb") as f:
            data = f.read(most)
        if not data:
            raise OSError(110)
        return data
