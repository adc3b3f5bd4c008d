# Stands in for socket: real TCP through a device of the test; LoRa and datagrams through its radio.

import network
import time

AF_INET = 2
AF_LORA = 5
SOCK_STREAM = 1
SOCK_DGRAM = 2
SOCK_RAW = 3
SOL_LORA = 1
SO_DR = 2


NAMES = {name: "127.0.0.1" for name in ("h", "van.test", "other.test")}


def getaddrinfo(host, port):
    if not host.replace(".", "").isdigit():
        if host not in NAMES:
            raise OSError(-2)  # EAI_NONAME
        host = NAMES[host]
    return [(2, 1, 0, "", (host, port))]


def socket(family=AF_INET, kind=SOCK_STREAM):
    return _Lora() if family == AF_LORA else _Udp() if kind == SOCK_DGRAM else _Tcp()


def _late(seconds):
    with open("/dev/late", "wb") as f:
        f.write("%d" % seconds)


class _Tcp:
    def __init__(self):
        self.timeout = None
        self.stream = None
        self.left = 0
        self.head = bytearray(2)

    def settimeout(self, seconds):
        self.timeout = seconds

    def connect(self, address):
        assert address[0].replace(".", "").isdigit(), "a name is no address"
        assert self.timeout, "a socket without a timeout can wait for ever"
        assert network.WLAN.joined, "WiFi is off"
        try:
            self.stream = open("/dev/tcp", "r+b")
        except OSError as e:
            if e.args[0] == 110:  # nobody answers
                time.sleep(self.timeout)
            raise
        self.stream.write("%s %d\n" % address)

    def send(self, data):
        n = min(len(data), 40)  # a real one may take less than it is given
        self.stream.write(data[:n])
        return n

    def recv(self, most):
        # The device hands out pieces: two bytes of length, then the piece. A piece may need some
        # seconds, told in what would be a length; then it is asked for again.
        if self.left == 0:
            # Garbage may be collected in here: nothing must be held by C alone.
            self.stream.readinto(self.head)
            self.left = self.head[0] << 8 | self.head[1]
            if self.left >= 0xFF00:
                late = self.left - 0xFF00  # 255: for ever
                self.left = 0
                if late >= self.timeout:
                    time.sleep(self.timeout)
                    _late(self.timeout)
                    raise OSError(110)  # ETIMEDOUT
                time.sleep(late)
                _late(late)
                return self.recv(most)
        data = self.stream.read(min(most, self.left)) if self.left else b""
        self.left -= len(data)
        return data

    def poll(self, most):
        # The same without waiting: None while nothing is there.
        if self.left == 0:
            self.stream.readinto(self.head)
            self.left = self.head[0] << 8 | self.head[1]
            if self.left >= 0xFF00:
                _late(1)
                self.left = 0
                return None
        return self.recv(most) if self.left else b""

    def close(self):
        if self.stream:
            self.stream.close()


class _Radio:
    # What is sent without a connection, and what comes back.
    blocks = True

    def setblocking(self, on):
        self.blocks = on

    def send(self, data):
        with open("/dev/radio", "wb") as f:
            f.write(data)

    def recv(self, most):
        assert not self.blocks, "a board that waits for the radio feeds no watchdog"
        with open("/dev/radio", "rb") as f:
            return f.read(most)


class _Lora(_Radio):
    def setsockopt(self, level, option, value):
        pass

    def send(self, data):
        assert not network.WLAN.on, "WiFi is on"
        _Radio.send(self, data)


class _Udp(_Radio):
    def sendto(self, data, address):
        assert network.WLAN.joined, "WiFi is off"
        assert address == ("192.168.4.2", 8001)
        self.send(data)

    def recv(self, most):
        data = _Radio.recv(self, most)
        if not data:
            raise OSError(11)  # EAGAIN
        return data

    def close(self):
        pass
