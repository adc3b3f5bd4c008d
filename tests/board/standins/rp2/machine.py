# Stands in for machine on an RP2040, in a Pico W.

from board import WDT as _WDT
from board import pulses, reset, take, unique_id


class WDT(_WDT):
    longest = 8388


class Pin:
    IN = 0
    PULL_UP = 1
    IRQ_FALLING = 4

    def __init__(self, id, mode=-1, pull=-1):
        # 23, 24, 25 and 29 go to the radio; 0 and 1 may be the console.
        if id not in range(2, 23) and id not in (26, 27, 28):
            raise ValueError("invalid pin")
        take((id,), "Pin")

    def irq(self, handler=None, trigger=12, hard=False):
        pulses(handler, self)
