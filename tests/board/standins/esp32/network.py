# Stands in for network on an ESP32 and on a Pico W.

import setting
import time

STA_IF = 0


class WLAN:
    on = False
    joined = ""
    since = 0

    def __init__(self, interface):
        assert interface == STA_IF

    def active(self, on=None):
        if on is None:
            return WLAN.on
        WLAN.on = on

    def connect(self, ssid, password):
        assert WLAN.on
        WLAN.joined = ssid
        WLAN.since = time.ticks_ms()

    def disconnect(self):
        WLAN.joined = ""

    def isconnected(self):
        return WLAN.joined != "" and time.ticks_ms() - WLAN.since >= setting.JOIN_MS
