# Stands in for MicroPython's machine: a reset ends this interpreter.

import time


def _power(how):
    with open("/dev/power", "wb") as f:
        f.write(how)


def reset():
    _power("reset")


def unique_id():
    return b"\x24\x0a\xc4\x00\x00\x01"


class WDT:
    def __init__(self, timeout):
        assert timeout >= 1000
        self.timeout = timeout
        self.fed = time.now

    def feed(self):
        assert time.now - self.fed <= self.timeout, "the watchdog bit"
        self.fed = time.now


class Pin:
    IN = 0
    PULL_UP = 1
    IRQ_FALLING = 2

    def __init__(self, pin, mode, pull):
        pass

    def irq(self, handler, trigger):
        for _ in range(3):  # three litres at once
            handler(self)
