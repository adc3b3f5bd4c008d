# What a board says of itself when it asks for a manifest or reports what it is on.

try:
    import ubinascii as binascii
except ImportError:
    import binascii

from OTA import setting


def query(ota, version, firmware, failed):
    # As parameters of a query. None is not said; an empty firmware is: there is none.
    said = ""
    for key, value in (
        ("current_ver", version or None),
        ("firmware_ver", firmware),
        ("failed", failed),
        ("model", setting("MODEL") or None),
        ("token", None if ota.bearer() else ota.token or None),
    ):
        if value is not None:
            said += "&%s=%s" % (key, quoted(value))
    try:
        import machine

        said += "&devid=" + binascii.hexlify(machine.unique_id()).decode()
    except (ImportError, AttributeError):
        pass
    return said[1:]


def quoted(text):
    # As a value in a query.
    quoted = ""
    for c in text.encode():
        plain = c < 128 and (chr(c).isdigit() or chr(c).isalpha() or chr(c) in "-._~")
        quoted += chr(c) if plain else "%%%02X" % c
    return quoted
