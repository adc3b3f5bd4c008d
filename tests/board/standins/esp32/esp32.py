# Stands in for esp32 on a board with two firmware slots. The test is the
# bootloader: between two starts it reads what is written here.

import garbage
import json
import os

SIZE = 65536
ERASED = b"\xff" * 512


def _read():
    with open("/hw/otadata") as f:
        return json.load(f)


def _write(data):
    with open("/hw/otadata.new", "w") as f:
        f.write(json.dumps(data))
    os.rename("/hw/otadata.new", "/hw/otadata")


class Partition:
    BOOT = 0
    RUNNING = 1

    def __init__(self, name):
        self.name = _read()["running"] if name == Partition.RUNNING else name
        self.path = "/hw/" + self.name
        os.stat(self.path)

    def info(self):
        return (0, 16, 0x10000, SIZE, self.name, False)

    def get_next_update(self):
        return Partition("ota_1" if self.name == "ota_0" else "ota_0")

    def readblocks(self, n, buf, offset=0):
        # With a heap of a fixed size garbage is collected at such moments only.
        garbage.collect()
        with open(self.path, "rb") as f:
            f.seek(n * 4096 + offset)
            f.readinto(buf)

    def ioctl(self, what, n):
        # Erases a block.
        assert what == 6 and self.name != _read()["running"]
        with open(self.path, "r+b") as f:
            f.seek(n * 4096)
            for _ in range(8):
                f.write(ERASED)

    def writeblocks(self, n, buf, offset):
        # Flash only loses bits.
        assert len(buf) % 16 == 0 and self.name != _read()["running"]
        with open(self.path, "r+b") as f:
            f.seek(n * 4096 + offset)
            assert f.read(len(buf)) == ERASED[: len(buf)], "this is not erased"
            f.seek(n * 4096 + offset)
            f.write(buf)

    def set_boot(self):
        with open(self.path, "rb") as f:
            if f.read(1) != b"\xe9":
                raise OSError(-5379, "ESP_ERR_OTA_VALIDATE_FAILED")
        data = _read()
        data["boot"] = self.name
        if data["running"] != self.name:
            data[self.name] = "new"
        _write(data)

    @classmethod
    def mark_app_valid_cancel_rollback(cls):
        data = _read()
        data[data["running"]] = "valid"
        _write(data)
