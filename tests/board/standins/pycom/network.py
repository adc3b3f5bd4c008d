# Stands in for network on a LoPy4: it starts as an access point.

import setting
import time


class WLAN:
    STA = 1
    AP = 2
    WPA2 = 3

    on = True
    mode = AP
    joined = ""
    since = 0

    def __init__(self, mode=None):
        if mode is not None:
            WLAN.on = True
            WLAN.mode = mode

    def connect(self, ssid, auth=None, timeout=None):
        assert WLAN.on and WLAN.mode == WLAN.STA
        assert auth[0] == WLAN.WPA2 and len(auth) == 2
        WLAN.joined = ssid
        WLAN.since = time.ticks_ms()

    def isconnected(self):
        return WLAN.joined != "" and time.ticks_ms() - WLAN.since >= setting.JOIN_MS

    def deinit(self):
        WLAN.on = False
        WLAN.joined = ""


class LoRa:
    LORAWAN = 1
    OTAA = 2
    EU868 = 5

    def __init__(self, mode, region):
        assert (mode, region) == (1, 5)

    def join(self, activation, auth, timeout):
        assert len(auth[0]) == 8 and len(auth[1]) == 16

    def has_joined(self):
        return True
