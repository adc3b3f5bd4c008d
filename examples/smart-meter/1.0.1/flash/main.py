# A water meter: counts pulses, reports them and a suspected leak four times an
# hour over LoRa, or over WiFi on boards without, and keeps WiFi off otherwise. The
# downlink 01 02 03 makes it join the service van's network and fetch the newest
# release.

import time

import machine

import config
from leak import LeakWatch
from meter import PulseMeter
from OTA import WiFiOTA
from uplink import UPDATE_COMMAND, uplink


def update(ota, meter):
    meter.save()
    try:
        ota.connect()
        ota.update()  # resets the board when a release was installed
    except Exception as e:
        print("meter: no update:", e)
    finally:
        ota.disconnect()


def main():
    # A release that hangs is reset, and so taken back if it was never confirmed.
    dog = machine.WDT(timeout=config.WATCHDOG_SECONDS * 1000)
    meter = PulseMeter(config.PULSE_PIN, config.COUNT_FILE)
    leak = LeakWatch()
    ota = WiFiOTA(
        config.WIFI_SSID,
        config.WIFI_PASSWORD,
        config.SERVER_IP,
        config.SERVER_PORT,
        config.TOKEN,
    )
    ota.alive = dog.feed
    radio = uplink(config, ota)
    ota.disconnect()  # some boards start with WiFi on
    while True:
        before = meter.count
        for _ in range(config.UPLINK_SECONDS):
            time.sleep(1)
            dog.feed()
        used = (meter.count - before) * config.LITRES_PER_PULSE
        command = radio.send(meter.count, used, leak.add(used))
        meter.save()
        # Counting and the radio work: this release may stay. Without this call
        # boot.py goes back to the one before after three starts.
        ota.confirm()
        if command == UPDATE_COMMAND:
            update(ota, meter)


if __name__ == "__main__":
    try:
        main()
    except Exception as e:
        print("meter: stopped:", e)
        time.sleep(3)
        machine.reset()
