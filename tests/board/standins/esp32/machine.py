# Stands in for machine on an ESP32.

from board import WDT, Card, pulses, reset, take, unique_id


class SDCard(Card):
    def __init__(self):
        # Slot 1: CLK, CMD, DAT0 to DAT3.
        take((14, 15, 2, 4, 12, 13), "the SD card")


class Pin:
    IN = 1
    PULL_UP = 2
    IRQ_FALLING = 2

    def __init__(self, id, mode=-1, pull=-1):
        # 6 to 11 are the flash; 34 to 39 have no pull-up; 0, 2, 5, 12 and 15 choose how the chip
        # starts; 1 and 3 are the console.
        if id not in (4, 13, 14, 16, 17, 18, 19, 21, 22, 23, 25, 26, 27, 32, 33):
            raise ValueError("invalid pin")
        take((id,), "Pin")

    def irq(self, handler=None, trigger=6, wake=None):
        pulses(handler, self)
