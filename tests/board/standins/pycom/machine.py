# Stands in for machine on a Pycom board: a LoPy4, or a WiPy 3.

from board import WDT, Card, pulses, reset, take, unique_id


class SD(Card):
    def __init__(self):
        take(("P4", "P8", "P23"), "the SD card")


class Pin:
    IN = 1
    PULL_UP = 2
    IRQ_FALLING = 2

    def __init__(self, id, mode=3, pull=None, alt=-1):
        # P0 and P1 are the console, P2 and P12 choose how the board starts, P5 to P7 are LoRa's;
        # P13 to P18 have no pull-up.
        if id not in ("P3", "P4", "P8", "P9", "P10", "P11", "P19", "P20", "P21", "P22", "P23"):
            raise ValueError("invalid argument(s) value")
        take((id,), "Pin")

    def callback(self, trigger, handler=None, arg=None):
        pulses(handler, self if arg is None else arg)
