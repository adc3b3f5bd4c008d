# Settings of this meter. Each meter has the same file; what differs between
# meters (their keys) comes from the radio module itself.

# The pulse output of the water meter closes this pin to ground, once a litre.
PULSE_PIN = 13
LITRES_PER_PULSE = 1

# The application's own file: updates leave it alone.
COUNT_FILE = "pulses.cnt"

# One uplink every 15 minutes.
UPLINK_SECONDS = 900
WATCHDOG_SECONDS = 120

LORA_REGION = "EU868"
LORA_APP_EUI = "70b3d54990000000"
LORA_APP_KEY = "00000000000000000000000000000000"

# The network of the service van, and the update server in it.
WIFI_SSID = "meter-service"
WIFI_PASSWORD = "change this password"
SERVER_IP = "192.168.4.2"
SERVER_PORT = 8000
