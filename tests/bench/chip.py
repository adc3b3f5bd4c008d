# The firmware slots of an ESP32 as large as real ones, in place of the small ones of the tests:
# erased flash reads as 0xff, and a block is erased before it is written. board.ts loads this.

import gc

import esp32

BLOCK = 4096
ERASED = b"\xff" * 512


class Partition(esp32.Partition):
    # The file at self.path stays what the tests' bootloader looks at: one byte is enough for it.

    def readblocks(self, n, buf, offset=0):
        gc.collect()
        with open(self.path + ".bin", "rb") as f:
            f.seek(n * BLOCK + offset)
            if f.readinto(buf) != len(buf):
                raise OSError(-258, "ESP_ERR_INVALID_ARG")

    def ioctl(self, what, n):
        assert what == 6, "no order but to erase is used"
        assert self.name != Partition(Partition.RUNNING).name, "this slot runs"
        with open(self.path + ".bin", "r+b") as f:
            f.seek(n * BLOCK)
            for _ in range(BLOCK // len(ERASED)):
                f.write(ERASED)

    def writeblocks(self, n, buf, offset=None):
        gc.collect()
        assert self.name != Partition(Partition.RUNNING).name, "this slot runs"
        at = n * BLOCK + (offset or 0)
        if at + len(buf) > esp32.SIZE:
            raise OSError(-258, "ESP_ERR_INVALID_ARG")
        with open(self.path + ".bin", "r+b") as f:
            if offset is None:
                assert len(buf) % BLOCK == 0, "blocks are erased whole"
            else:
                f.seek(at)
                assert f.read(len(buf)) == b"\xff" * len(buf), "this is not erased"
            f.seek(at)
            f.write(buf)


esp32.Partition = Partition
