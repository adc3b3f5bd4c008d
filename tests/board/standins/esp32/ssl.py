# Stands in for ssl on a board of MicroPython's own.

from secure import CERT_REQUIRED, PROTOCOL_TLS_CLIENT, SSLContext
