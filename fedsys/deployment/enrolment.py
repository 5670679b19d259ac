"""Enrolment: a device gets a number, a key and a folder, and the server's home its public key.

HOME/devices.json      who was ever enrolled: number, time, key, and when it was revoked
HOME/devices/NAME.pub  the public key of each device that may join, in one line of OpenSSH
FOLDER/                what goes to the device: device.yaml policy.yaml ca.crt device.key device.pub

A device that makes its key itself shows its public key only: then no private key is ever here.
"""

import json
import logging
import os
import re
import secrets
import shutil
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from fedsys.deployment.pki import (
    create_authority,
    device_key,
    host_problem,
    locked,
    now,
    public_line,
    server_certificate,
    write_file,
)
from fedsys.engines.deployment import loopback
from fedsys.errors import ConfigError
from fedsys.known import suggestion

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_HASH = re.compile(r"[0-9a-f]{64}")

_DEVICE = """\
# Which device this is, and which server it serves. `fedsys join` reads it.
name: {name}
number: {number} # of this device, from 0; another is another client
server: {server}
devices: null # into how many parts the data are split; null: as the server says
data: {data} # this device's own rows, a path from this folder; null: its part of the run's data
threads: null # of the processor, for training; null: all
memory_mb: null # the most that training may take; null: no limit
seconds: 3600 # the longest that one message of the server may take
port: 0 # on which training speaks to the client, on this machine only; 0: any that is free
"""

_POLICY = """\
# What the operator of this device allows. It is checked on the device, before code of the server
# runs and before anything leaves. What is not allowed is refused, and the server is told why.
# Without this file, or with a mistake in it, nothing runs.

# SHA-256 of the bundles of code that may run; `fedsys serve` names that of a run.
code:{code}

strategies: any # or names of classes, such as [FedSB, FedAU]
adapters: any # or names of classes, such as [LoRASB]

# The least protection: sample (each row of this device, by noise added here), client (this device
# as a whole, by noise that the server is trusted to add) or none.
privacy: sample
max_epsilon: 8.0 # all that may ever be spent on the rows of this device, over all runs,
max_delta: 1.0e-05 # at this delta, which is to be well below one in the number of rows
max_clipping_norm: 1.0 # of one row's gradient

max_bytes: 10000000 # of one reply
min_examples: 50 # with fewer rows this device does not take part
evaluate: false # whether loss and accuracy on the rows of this device may leave
max_rounds: null # of one run; null: any number
"""

_README = """\
Device {name}: copy this folder to it, look through policy.yaml, then run there
`fedsys join FOLDER` with the folder's name.{keys}
"""
_KEPT = " device.key lets anybody be this device: keep no copy elsewhere."
_OWN = """
Before that, put the private key that belongs to device.pub into the folder, as device.key:
`install -m 600 YOUR_KEY FOLDER/device.key`."""


@dataclass(frozen=True)
class Enrolled:
    """What the server's home knows of a device."""

    number: int  # its partition-id, in order of enrolment; never given again
    registered: str  # when, in UTC, ISO 8601
    key: str | None = None  # as `ssh-keygen -l` shows it; None: it joins without a key
    revoked: str | None = None  # when, if it was


def enrol(
    name: str,
    home: Path,
    address: str,
    *,
    folder: Path | None = None,
    data: Path | str | None = None,
    insecure: bool = False,
    public_key: Path | None = None,
    code: Sequence[str] = (),
) -> Path:
    """Enrol a device at the server of ``home`` and return its folder, ./``name`` by default.

    ``address`` is HOST:PORT as the device calls the server. ``data`` is where the device has its
    own rows; ``code`` are the hashes of the bundles that its policy begins with. With
    ``public_key`` the device keeps its private key to itself. ``insecure`` does without keys and
    certificates, on this machine only.

    Raises ``ConfigError`` with all reasons why not; then nothing was enrolled.
    """
    place = Path(os.path.abspath(name if folder is None else folder))
    host, problems = _host(address)
    problems += _problems(name, place, data, code)
    if insecure and not problems and not loopback(host):
        problems.append(f"{address}: only 127.0.0.1, ::1 and localhost may do without keys")
    if insecure and public_key is not None:
        problems.append(f"{public_key}: a device without keys has no public key; leave it out")
    if problems:
        raise ConfigError(problems)
    private, line = b"", ""
    if not insecure:
        private, line = device_key() if public_key is None else (b"", public_line(public_key))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(home / ".devices.lock"):
        known = enrolled(home)
        entry = _entry(name, known, line)
        files = {
            "device.yaml": _device(name, entry.number, address, data),
            "policy.yaml": _policy(code),
            "README.md": _README.format(name=name, keys=_KEPT if private else _OWN if line else ""),
        }
        if line:
            files |= {"device.pub": f"{line} {name}\n", "ca.crt": _certified(home, host)}
        _write(name, home, place, files, private, known | {name: entry})
    return place


def revoke(name: str, home: Path) -> None:
    """Let a device join no more; its name and number stay taken. Raises ``ConfigError``."""
    if not home.is_dir():
        raise ConfigError([f"{home}: is no server home; `fedsys enrol` makes one"])
    with locked(home / ".devices.lock"):
        known = enrolled(home)
        if name not in known:
            raise ConfigError([f"{name}: no such device{suggestion(name, list(known))}"])
        (home / "devices" / f"{name}.pub").unlink(missing_ok=True)
        if known[name].revoked is None:
            _keep(home, known | {name: replace(known[name], revoked=_time())})


def enrolled(home: Path) -> dict[str, Enrolled]:
    """Return the devices ever enrolled, by name, in order; raises ``ConfigError``."""
    path = home / "devices.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: Enrolled(**entry) for name, entry in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            [f"{path}: is no list of devices; put back a copy, it says which numbers are taken"]
        ) from None


# ---- checks


def _problems(name: str, place: Path, data: Path | str | None, code: Sequence[str]) -> list[str]:
    problems = []
    if not _NAME.fullmatch(name):
        what = "letters, digits, - and _, at most 40, the first a letter or a digit"
        problems.append(f"{name!r}: is no name of a device; a name is {what}")
    elif place.is_symlink() or (place.exists() and not place.is_dir()) or _filled(place):
        problems.append(f"{place}: exists; remove it or name another folder")
    if data is not None and not (str(data).strip() and str(data).isprintable()):
        problems.append(f"{str(data)!r}: is no path of data on the device; leave it out for none")
    wrong = [text for text in code if not _HASH.fullmatch(text)]
    problems += [f"{text!r}: is no SHA-256 of code; it has 64 digits 0-9a-f" for text in wrong]
    return problems


def _filled(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _host(address: str) -> tuple[str, list[str]]:
    """Return the host of ``address``, and what is wrong with the address."""
    named, _, port = address.rpartition(":")
    bracketed = named.startswith("[") and named.endswith("]")
    host = named[1:-1] if bracketed else named
    number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
    if not 0 < number < 65536 or bracketed != (":" in host) or host_problem(host):
        such = "such as fl.example.org:8443 or [2001:db8::1]:8443"
        return host, [f"{address!r}: is no address of a server; write HOST:PORT, {such}"]
    if host in ("0.0.0.0", "::"):
        return host, [f"{address}: no device can call {host}; write the server's name or address"]
    return host, []


def _entry(name: str, known: Mapping[str, Enrolled], line: str) -> Enrolled:
    """Return the entry of a new device; raises ``ConfigError`` where it is not new."""
    other = f"{name[:38]}-2"
    # Names become files, and some file systems do not tell A from a.
    for taken in (n for n in known if n.casefold() == name.casefold()):
        if known[taken].revoked:
            raise ConfigError([f"{taken}: was revoked; enrol it by another name, such as {other}"])
        lost = f"if that is lost, `fedsys enrol {taken} --revoke`, then enrol it as {other}"
        raise ConfigError(
            [
                f"{taken}: is enrolled already, as number {known[taken].number}; "
                f"its folder was made then; {lost}"
            ]
        )
    key = _fingerprint(line) if line else None
    # Flower takes a key once and for all: not even that of a revoked device may come back.
    for holder in (n for n, entry in known.items() if key and entry.key == key):
        raise ConfigError([f"{name}: {holder} has this key; make another one on the device"])
    number = 1 + max((entry.number for entry in known.values()), default=-1)
    return Enrolled(number, _time(), key)


# ---- files


def _device(name: str, number: int, address: str, data: Path | str | None) -> str:
    rows = "null" if data is None else json.dumps(str(data), ensure_ascii=False)
    return _DEVICE.format(
        name=json.dumps(name), number=number, server=json.dumps(address), data=rows
    )


def _policy(code: Sequence[str]) -> str:
    hashes = "".join(f'\n  - "{text}"' for text in code)
    return _POLICY.format(code=hashes or " []")


def _certified(home: Path, host: str) -> str:
    """Return ``ca.crt``; there is an authority and a certificate for ``host`` afterwards."""
    authority = create_authority(home)
    if server_certificate(home, [host]) and (home / "superlink.json").exists():
        again = f"`fedsys serve --stop {home}`, then serve again"
        log.warning(
            "devices can call %s once the server shows its new certificate: %s", host, again
        )
    return authority.read_text(encoding="ascii")


def _write(
    name: str,
    home: Path,
    place: Path,
    files: Mapping[str, str],
    private: bytes,
    known: Mapping[str, Enrolled],
) -> None:
    """Write the device's folder and what the home knows of it: all of it, or nothing."""
    public = home / "devices" / f"{name}.pub"
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    made = partial
    try:
        partial.mkdir(mode=0o700, parents=True)
        for file, text in files.items():
            write_file(partial / file, text.encode())
        if private:
            write_file(partial / "device.key", private, 0o600)
        if "device.pub" in files:
            public.parent.mkdir(exist_ok=True)
            write_file(public, files["device.pub"].encode())
        made = partial.rename(place)
        _keep(home, known)
    except BaseException:
        public.unlink(missing_ok=True)
        shutil.rmtree(made, ignore_errors=True)
        raise


def _keep(home: Path, known: Mapping[str, Enrolled]) -> None:
    text = json.dumps({name: asdict(entry) for name, entry in known.items()}, indent=2)
    write_file(home / "devices.json", f"{text}\n".encode())


def _fingerprint(line: str) -> str:
    digest = sha256(b64decode(line.split()[1])).digest()
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def _time() -> str:
    return now().isoformat(timespec="seconds")
