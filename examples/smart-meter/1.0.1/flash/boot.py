# Runs first at every start. It mounts the SD card, then lets ota_boot finish or
# undo an update that a reset cut short. Updates over the air never replace this
# file nor lib/ota_boot.py: what recovers is not part of what can break.
# To change them, use a cable.

try:
    import uos as os
except ImportError:
    import os


def mount_sd():
    import machine

    if hasattr(machine, "SDCard"):  # MicroPython on the ESP32
        os.mount(machine.SDCard(), "/sd")
    elif hasattr(machine, "SD"):  # Pycom
        os.mount(machine.SD(), "/sd")


try:
    mount_sd()
except Exception as e:
    # No card: /sd is then a directory of the internal flash.
    print("boot: no SD card:", e)

try:
    import ota_boot

    ota_boot.boot()
except Exception as e:
    print("boot: recovery failed:", e)
