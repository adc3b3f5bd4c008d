# Counts the pulses of the meter and keeps the count across resets.

import machine


class PulseMeter:
    def __init__(self, pin, path):
        self.path = path
        self.count = self.load()
        self.pin = machine.Pin(pin, machine.Pin.IN, machine.Pin.PULL_UP)
        self.pin.irq(self.pulse, machine.Pin.IRQ_FALLING)

    def pulse(self, pin):
        self.count += 1

    def load(self):
        try:
            with open(self.path) as f:
                return int(f.read())
        except (OSError, ValueError):
            return 0

    def save(self):
        with open(self.path, "w") as f:
            f.write(str(self.count))
