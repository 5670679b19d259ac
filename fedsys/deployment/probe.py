"""Why a device cannot speak to its server, found out by a handshake and nothing else."""

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedsys.deployment.device import split

_PATIENCE = 10.0  # seconds
# OpenSSL's words for what is wrong with a certificate: x509_vfy.h.
_EXPIRED, _NOT_YET = 10, 9
_HOST, _ADDRESS = 62, 64
_UNKNOWN_ISSUER = (2, 7, 18, 19, 20, 21)


@dataclass(frozen=True)
class Trouble:
    """Why there is no connection."""

    reason: str
    heals: bool = True  # whether it can pass without anybody at the device


def probe(server: str, authority: Path | None, patience: float = _PATIENCE) -> Trouble | None:
    """Return why ``server`` (host:port) cannot be spoken to; None when it can.

    ``authority`` is the certificate the device trusts; None where it speaks without TLS.
    """
    host, port = split(server)
    try:
        with socket.create_connection((host, port), timeout=patience) as line:
            if authority is None:
                return _in_the_clear(line, server)
            return _shaken(line, server, host, authority)
    except socket.gaierror as error:
        return Trouble(f"the name {host} of the server is not known here: {error.strerror}")
    except TimeoutError:
        return Trouble(f"nothing at {server} answers within {patience:g} seconds")
    except ConnectionRefusedError:
        return Trouble(f"nothing listens at {server}; is the server running?")
    except OSError as error:
        return Trouble(f"{server} cannot be reached: {error.strerror or error}")


def _shaken(line: socket.socket, server: str, host: str, authority: Path) -> Trouble | None:
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        return Trouble(f"{authority} is no certificate: {error}", heals=False)
    try:
        with context.wrap_socket(line, server_hostname=host):
            return None
    except ssl.SSLCertVerificationError as error:
        return _distrusted(error, server, host, authority)
    except ssl.SSLEOFError:
        return Trouble(f"{server} takes a connection and ends it; is the server behind it running?")
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            return Trouble(f"{server} does not speak TLS, without which this device does not speak")
        return Trouble(f"{server} and this device find no common TLS: {error.reason}")


def _distrusted(
    error: ssl.SSLCertVerificationError, server: str, host: str, authority: Path
) -> Trouble:
    if error.verify_code in _UNKNOWN_ISSUER:
        return Trouble(
            f"the certificate of {server} is not from the authority that this device trusts"
            f" ({authority.name}); either it is another server, or its authority was made anew:"
            " enrol the device again"
        )
    if error.verify_code in (_HOST, _ADDRESS):
        return Trouble(
            f"the certificate of {server} is not for the name {host}; enrol a device at the server"
            " by this address, and restart the server"
        )
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return Trouble(
            f"the certificate of {server} is not valid by the clock of this device:"
            f" {error.verify_message}"
        )
    return Trouble(f"the certificate of {server} is refused: {error.verify_message}")


def _in_the_clear(line: socket.socket, server: str) -> Trouble | None:
    """Return whether the server asks for TLS, of which a device without keys knows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told to it
    try:
        with context.wrap_socket(line):
            return Trouble(f"{server} asks for TLS, and this device was enrolled without keys")
    except (ssl.SSLError, OSError):
        return None
