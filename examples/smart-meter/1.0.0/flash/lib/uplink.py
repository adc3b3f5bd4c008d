# The radio: one small uplink, then the wait for a downlink. Pycom's LoPy4 and FiPy
# have LoRa, and LoRaWAN opens two receive windows after each uplink. Other boards
# send the same bytes in a datagram over WiFi, which is off but for that.

import socket
import struct
import time

try:
    import ubinascii as binascii
except ImportError:
    import binascii

HELLO = b"\x04\x05\x06"  # opens every uplink of a meter
UPDATE_COMMAND = b"\x01\x02\x03"  # the downlink that asks for an update
WAIT = 10  # seconds for a downlink


def uplink(config, ota):
    try:
        from network import LoRa
    except ImportError:
        return WiFiUplink(config, ota)
    return LoRaUplink(LoRa, config, ota)


def reading(count, flow):
    return HELLO + struct.pack(">IH", count, flow)


def downlink(s, alive):
    # What comes back, or b"". The socket does not wait: the watchdog would not.
    for _ in range(WAIT):
        time.sleep(1)
        alive()
        try:
            data = s.recv(16)
        except OSError:
            continue  # nothing yet
        if data:
            return data
    return b""


class LoRaUplink:
    def __init__(self, LoRa, config, ota):
        region = getattr(LoRa, config.LORA_REGION)
        self.lora = LoRa(mode=LoRa.LORAWAN, region=region)
        self.keys = (
            binascii.unhexlify(config.LORA_APP_EUI),
            binascii.unhexlify(config.LORA_APP_KEY),
        )
        self.activation = LoRa.OTAA
        self.ota = ota
        self.socket = None

    def join(self):
        self.lora.join(activation=self.activation, auth=self.keys, timeout=0)
        while not self.lora.has_joined():
            time.sleep(1)
            self.ota.alive()
        self.socket = socket.socket(socket.AF_LORA, socket.SOCK_RAW)
        self.socket.setsockopt(socket.SOL_LORA, socket.SO_DR, 5)
        self.socket.setblocking(False)

    def send(self, *numbers):
        """Sends one reading; returns the downlink that came back, or b""."""
        if self.socket is None:
            self.join()
        try:
            self.socket.send(reading(*numbers))
        except OSError:  # the radio may not send so soon again
            return b""
        return downlink(self.socket, self.ota.alive)


class WiFiUplink:
    def __init__(self, config, ota):
        self.address = (config.COLLECTOR_IP, config.COLLECTOR_PORT)
        self.ota = ota

    def send(self, *numbers):
        """Sends one reading; returns the downlink that came back, or b""."""
        try:
            self.ota.connect()
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                s.setblocking(False)
                s.sendto(reading(*numbers), self.address)
                return downlink(s, self.ota.alive)
            finally:
                s.close()
        except OSError as e:
            print("meter: no uplink:", e)
            return b""
        finally:
            self.ota.disconnect()
