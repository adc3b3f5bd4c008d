# Stands in for ssl on a Pycom board: it takes the name of a file, PEM, and what comes of
# wrap_socket() is a socket like others.

import binascii

from secure import start

CERT_REQUIRED = 2


def wrap_socket(sock, cert_reqs=0, ca_certs=None, server_hostname=None):
    assert cert_reqs == CERT_REQUIRED and server_hostname
    with open(ca_certs) as f:
        lines = f.read().split("\n")
    if not lines[0].startswith("-----BEGIN"):
        raise OSError(-0x2180)  # MBEDTLS_ERR_X509_INVALID_FORMAT
    der = binascii.a2b_base64("".join([line for line in lines if "-----" not in line]))
    start(server_hostname, der)
    return sock
