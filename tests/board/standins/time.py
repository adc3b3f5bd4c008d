# Stands in for time: nobody waits, but the board's clock goes on, and its watchdog looks at it.


def _pass(milliseconds):
    with open("/dev/clock", "wb") as f:
        f.write("%d" % milliseconds)


def sleep(seconds):
    _pass(seconds * 1000)


def sleep_ms(milliseconds):
    _pass(milliseconds)


def ticks_ms():
    with open("/dev/clock", "rb") as f:
        return int(f.read(16))


def ticks_diff(a, b):
    return a - b


def gmtime():
    # The real-time clock: not set, but where the test has set it.
    import setting

    return setting.NOW + (0, 1)
