# Stands in for gc with a heap of a fixed size: there, it is the test that collects.

import gc
from gc import mem_alloc


def mem_free():
    # Without what this build believes that it could add to its heap.
    return gc.mem_free() - 0x8000000


def collect():
    with open("/dev/collect", "wb") as f:
        f.write(b"x")
