# Stands in for network: the WiFi of an ESP32 and the LoRa of a Pycom board.

STA_IF = 0


class WLAN:
    on = False
    joined = ""

    def __init__(self, interface):
        pass

    def active(self, on=None):
        if on is None:
            return WLAN.on
        WLAN.on = on

    def connect(self, ssid, password):
        assert WLAN.on
        WLAN.joined = ssid

    def disconnect(self):
        WLAN.joined = ""

    def isconnected(self):
        return WLAN.joined != ""


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
