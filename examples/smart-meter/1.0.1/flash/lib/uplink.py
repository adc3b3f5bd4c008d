# The radio: one small uplink, then the two receive windows that LoRaWAN opens
# after it. Written for the LoRa class of Pycom's boards.

import socket
import struct
import time

try:
    import ubinascii as binascii
except ImportError:
    import binascii

from network import LoRa

HELLO = b"\x04\x05\x06"  # opens every uplink of a meter
UPDATE_COMMAND = b"\x01\x02\x03"  # the downlink that asks for an update


class Uplink:
    def __init__(self, region, app_eui, app_key):
        self.lora = LoRa(mode=LoRa.LORAWAN, region=getattr(LoRa, region))
        self.keys = (binascii.unhexlify(app_eui), binascii.unhexlify(app_key))
        self.socket = None

    def alive(self):
        pass  # called while it waits, for a watchdog

    def join(self):
        self.lora.join(activation=LoRa.OTAA, auth=self.keys, timeout=0)
        while not self.lora.has_joined():
            time.sleep(1)
            self.alive()
        self.socket = socket.socket(socket.AF_LORA, socket.SOCK_RAW)
        self.socket.setsockopt(socket.SOL_LORA, socket.SO_DR, 5)

    def send(self, count, used, leak):
        """Sends one reading; returns the downlink that came back, or b""."""
        if self.socket is None:
            self.join()
        self.socket.setblocking(True)
        self.socket.settimeout(10)
        try:
            self.socket.send(HELLO + struct.pack(">IHH", count, used, leak))
            return self.socket.recv(16)
        except OSError:  # no downlink within the receive windows
            return b""
