# Counts the pulses of the meter and keeps the count across resets.

import time

import machine

# A reed contact bounces for a few milliseconds; real pulses are at least
# 100 ms apart, even with every tap open.
BOUNCE_MS = 40


class PulseMeter:
    def __init__(self, pin, path):
        self.path = path
        self.count = self.load()
        self.last = time.ticks_ms()
        self.pin = machine.Pin(pin, mode=machine.Pin.IN, pull=machine.Pin.PULL_UP)
        if hasattr(self.pin, "irq"):
            self.pin.irq(handler=self.pulse, trigger=machine.Pin.IRQ_FALLING)
        else:  # Pycom
            self.pin.callback(machine.Pin.IRQ_FALLING, self.pulse)

    def pulse(self, pin):
        now = time.ticks_ms()
        if time.ticks_diff(now, self.last) >= BOUNCE_MS:
            self.count += 1
        self.last = now

    def load(self):
        try:
            with open(self.path) as f:
                return int(f.read())
        except (OSError, ValueError):
            return 0

    def save(self):
        with open(self.path, "w") as f:
            f.write(str(self.count))
