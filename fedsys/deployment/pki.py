"""Keys and certificates: how devices know the server, and how the server knows them.

ca.crt ca.key          the authority of one server home, made once, valid for ten years
server.crt server.key  what the server shows, signed by the authority, renewed where needed
device.key device.pub  what a device shows; OpenSSH's format, since Flower reads no other

All keys made here are on the curve P-384. Certificates are PEM and keep to RFC 5280, so that the
strict checks of newer Pythons accept them too. A private key is never in a file that others may
read, and every file appears whole, by one rename.
"""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsys.errors import ConfigError, RunError

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_TEN_YEARS = timedelta(days=3653)
_RENEWED = timedelta(days=30)  # before the end
_BACKDATED = timedelta(days=1)  # the clock of a device may be behind
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the server calls itself
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # those of OpenSSH, all known to Flower
_LOCK = ".keys.lock"
_PATIENCE = 10.0  # seconds to wait for another process; what it does takes milliseconds


def create_authority(home: Path) -> Path:
    """Return ``ca.crt`` of ``home``; authority and folder are made if there is none.

    An authority is never made anew: all devices would have to be enrolled again. Where only
    ``ca.key`` is missing, because it is kept elsewhere, the authority stands.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / "ca.crt"
    with locked(home / _LOCK):
        if not path.exists():
            key = _made_key(home / "ca.key")
            # Its name is of one authority only: of two with one name, a mix-up is hard to see.
            name = _name(f"fedsys authority {secrets.token_hex(4)}")
            made = _signed(name, key, name, key, now() + _TEN_YEARS)
            write_file(path, made.public_bytes(Encoding.PEM))
    return path


def server_certificate(home: Path, hosts: Sequence[str], days: int = 365) -> bool:
    """See to it that ``server.crt`` serves ``hosts``; return whether it was made anew.

    ``hosts`` are DNS names and addresses by which devices call the server; addresses that only say
    where it listens (0.0.0.0) are left out. This machine's own names, and the hosts of the last
    certificate, are always in it. It is renewed when a host is missing, when it ends within 30
    days, or when another key or authority has taken the place of its own; ``server.key`` stays. A
    server that runs shows the old one until it is restarted.

    Raises ``ConfigError`` for a host that is no name, and for files that cannot be used.
    """
    if days < 1:
        raise ValueError(f"days must be at least 1, got {days}")
    if problems := [problem for host in hosts if (problem := host_problem(host))]:
        raise ConfigError(problems)
    authority = read_certificate(create_authority(home))
    with locked(home / _LOCK):
        path, key = home / "server.crt", _made_key(home / "server.key")
        names, end = _names([*_LOOPBACK, *hosts]), now() + timedelta(days=days)
        if path.exists():
            old = read_certificate(path)
            if names <= _named(old) and _stands(old, authority, key):
                return False
            names |= _named(old)
        made = _signed(
            _name("fedsys server"),
            key,
            authority.subject,
            signer := _signer(home, authority),
            min(end, authority.not_valid_after_utc),
            x509.SubjectAlternativeName(sorted(names, key=repr)),
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
        )
        write_file(path, made.public_bytes(Encoding.PEM))
    return True


def device_key() -> tuple[bytes, str]:
    """Return a new private key, as OpenSSH writes it, and the line of its public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    nobody = serialization.NoEncryption()  # a device starts without anybody to type a password
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, nobody), _line(key.public_key())


def public_line(path: Path) -> str:
    """Return the line of a public key, without comment; raises ``ConfigError`` if it is none."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return _line(key)
    raise ConfigError(
        [
            f"{path}: no public ECDSA key of OpenSSH is there, and Flower takes no other; "
            'on the device, `ssh-keygen -t ecdsa -b 384 -N "" -f device.key` makes device.key.pub'
        ]
    )


def expiry(path: Path) -> datetime:
    """Return when the certificate at ``path`` ends, in UTC; raises ``ConfigError``."""
    return read_certificate(path).not_valid_after_utc


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate at ``path``; raises ``ConfigError`` if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise ConfigError([f"{path}: no certificate can be read; put back the right one"]) from None


def host_problem(host: str) -> str | None:
    """Return why a certificate cannot name ``host``, if it cannot."""
    try:
        address = str(ip_address(host))
    except ValueError:
        labels = host.split(".")
        good = len(host) <= 253 and all(map(_LABEL.fullmatch, labels))
        if good and not labels[-1].isdigit():  # else meant as an address
            return None
        return f"{host!r}: is no host; write a DNS name or an IP address, without port"
    return f"{host}: write the address without %" if "%" in address else None


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write ``path`` whole or not at all; nobody whom ``mode`` keeps out ever sees a byte."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``; raises ``RunError`` when another process keeps it for long."""
    deadline = time.monotonic() + _PATIENCE
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    held = f"another process has held {path} for {_PATIENCE:.0f} s"
                    raise RunError(f"{held}; end it and repeat") from None
            time.sleep(0.02)
        yield


def now() -> datetime:
    """Return the time of this machine, in UTC."""
    return datetime.now(UTC)


# ---- keys


def _made_key(path: Path) -> PrivateKey:
    """Return the private key at ``path``; it is made if there is none."""
    if not path.exists():
        key, nobody = ec.generate_private_key(ec.SECP384R1()), serialization.NoEncryption()
        write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, nobody), 0o600)
    return _read_key(path)


def _read_key(path: Path) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: has a password
        key = None
    if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        return key
    what = "no EC or RSA key without password can be read"
    raise ConfigError([f"{path}: {what}; put back the right one"])


def _signer(home: Path, authority: x509.Certificate) -> PrivateKey:
    """Return the key of the authority, if what it signs is going to be trusted."""
    key, end = _read_key(home / "ca.key"), authority.not_valid_after_utc
    if key.public_key() != authority.public_key():
        raise ConfigError([f"{home / 'ca.key'}: is not the key of ca.crt; put back the right one"])
    if end <= now():
        again = "enrol the devices again, in a new server home"
        raise ConfigError([f"{home / 'ca.crt'}: ended on {end:%Y-%m-%d}; {again}"])
    return key


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


# ---- certificates


def _signed(
    subject: x509.Name,
    key: PrivateKey,
    issuer: x509.Name,
    signer: PrivateKey,
    end: datetime,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    """Return a certificate of ``key``; it is an authority's if it is its own issuer."""
    ca = subject == issuer
    signs = (not ca, False, False, False, False, ca, ca, False, False)  # itself; others and lists
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    number, start = x509.random_serial_number(), now() - _BACKDATED
    draft = x509.CertificateBuilder(issuer, subject, key.public_key(), number, start, end)
    draft = draft.add_extension(x509.BasicConstraints(ca, 0 if ca else None), critical=True)
    draft = draft.add_extension(x509.KeyUsage(*signs), critical=True)
    for extension in (own, *extensions):
        draft = draft.add_extension(extension, critical=False)
    return draft.sign(signer, hashes.SHA384())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _names(hosts: Sequence[str]) -> set[x509.GeneralName]:
    names: set[x509.GeneralName] = set()
    for host in hosts:
        try:
            address = ip_address(host)
        except ValueError:
            names.add(x509.DNSName(host.lower()))
        else:
            names |= set() if address.is_unspecified else {x509.IPAddress(address)}
    return names


def _named(certificate: x509.Certificate) -> set[x509.GeneralName]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    return set(found.value)


def _stands(certificate: x509.Certificate, authority: x509.Certificate, key: PrivateKey) -> bool:
    """Return whether the certificate is the key's, the authority's, and good for a while."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    lasts = certificate.not_valid_after_utc - now() > _RENEWED
    return lasts and certificate.public_key() == key.public_key()
