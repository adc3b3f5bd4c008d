# What the stand-ins for machine have in common: the power switch, the watchdog, and pins that
# only one thing can use.


def _power(how):
    with open("/dev/power", "wb") as f:
        f.write(how)


def reset():
    _power("reset")


def unique_id():
    return b"\x24\x0a\xc4\x00\x00\x01"


def _dog(words):
    with open("/dev/dog", "wb") as f:
        f.write(words)


class WDT:
    longest = 0x7FFFFFFF

    def __init__(self, id=0, timeout=5000):
        if not 0 < timeout <= self.longest:
            raise ValueError("WDT timeout too long")
        _dog("%d" % timeout)

    def feed(self):
        _dog("feed")


taken = {}  # pin -> who uses it


def take(pins, who):
    for pin in pins:
        if taken.get(pin, who) != who:
            raise RuntimeError("pin %s is used by %s and %s" % (pin, taken[pin], who))
        taken[pin] = who


def pulses(handler, pin):
    # Three litres, 100 ms apart, and the bouncing of the contact.
    import time

    for _ in range(3):
        time.sleep_ms(100)
        handler(pin)


class Card:
    # What a board mounts at /sd.
    pass
