# Settings of this meter. Each meter has the same file; what differs between
# meters (their keys) comes from the radio module itself.

# The pulse output of the water meter closes this pin to ground, once a litre: a
# pin with a pull-up that the SD card, the radio, the flash and the start of the
# chip leave alone.
try:
    import pycom

    PULSE_PIN = "P20"
except ImportError:
    try:
        import esp32

        PULSE_PIN = 33
    except ImportError:
        PULSE_PIN = 22  # RP2040
LITRES_PER_PULSE = 1

# The application's own file: updates leave it alone.
COUNT_FILE = "pulses.cnt"

# One uplink every 15 minutes.
UPLINK_SECONDS = 900
# An RP2040's watchdog waits no longer than 8.388 seconds.
WATCHDOG_SECONDS = 8

LORA_REGION = "EU868"
LORA_APP_EUI = "70b3d54990000000"
LORA_APP_KEY = "00000000000000000000000000000000"

# The network of the service van, and the update server in it.
WIFI_SSID = "meter-service"
WIFI_PASSWORD = "change this password"
SERVER_IP = "192.168.4.2"  # or a name
SERVER_PORT = 8000
TOKEN = ""  # what the server was started with: serve --token
# A file with the certificate of the server's authority: HTTPS. DER; on Pycom, PEM.
CA = ""

# The public keys that releases are signed with, 64 hex digits each, and what board
# this is, where that is signed as well. With a key, nothing else is installed.
VERIFY = ()
MODEL = ""

# Boards without LoRa send their readings here, over the same network.
COLLECTOR_IP = "192.168.4.2"
COLLECTOR_PORT = 8001
