# Stands in for pycom on a board whose firmware has bootmgr(). The slots are
# "Factory" and "ota_0".

import json
import os

FACTORY = 0
OTA_0 = 1

_started = None


def _read():
    with open("/hw/otadata") as f:
        return json.load(f)


def _boot(name):
    data = _read()
    data["boot"] = name
    with open("/hw/otadata.new", "w") as f:
        f.write(json.dumps(data))
    os.rename("/hw/otadata.new", "/hw/otadata")


def bootmgr(boot_partition=None):
    if boot_partition is None:
        return (_read()["boot"], "FAT", "SafeBoot: False", "Status: Ready")
    _boot("Factory" if boot_partition == FACTORY else "ota_0")


def _other():
    return "ota_0" if _read()["running"] == "Factory" else "Factory"


def ota_start():
    global _started
    _started = _other()
    with open("/hw/" + _started, "wb"):
        pass


def ota_write(data):
    assert len(data) <= 4096
    with open("/hw/" + _started, "ab") as f:
        f.write(data)


def ota_finish():
    assert _started
    _boot(_started)
