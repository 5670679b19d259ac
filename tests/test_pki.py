"""Keys and certificates: what Flower and TLS accept, and what they refuse."""

import errno
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.args import try_obtain_root_certificates, try_obtain_server_certificates
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from fedsys.deployment import pki
from fedsys.deployment.pki import (
    create_authority,
    device_key,
    expiry,
    host_problem,
    locked,
    public_line,
    read_certificate,
    server_certificate,
    write_file,
)
from fedsys.errors import ConfigError, RunError

STRICT = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
DAY = timedelta(days=1)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    server_certificate(tmp_path / "home", ["fl.example.org"])
    return tmp_path / "home"


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Set the clock of what makes certificates, ``days`` from now."""
    then = datetime.now(UTC) + timedelta(days=days)
    monkeypatch.setattr(pki, "now", lambda: then)


def names(home: Path) -> set[str]:
    certificate = read_certificate(home / "server.crt")
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


# ---- handshakes


def handshake(home: Path, authority: Path, host: str) -> None:
    """Shake hands on loopback with a server of ``home``, as a device that calls it ``host``."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(home / "server.crt", home / "server.key")
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.verify_flags |= STRICT
    # As Flower does it: the bytes of the file, decoded as ASCII.
    calling.load_verify_locations(cadata=authority.read_bytes().decode("ascii"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=(listening, serving))
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=10) as plain,
                calling.wrap_socket(plain, server_hostname=host) as secured,
            ):
                assert secured.recv(5) == b"hello"
        finally:
            thread.join()


def answer(listening: socket.socket, serving: ssl.SSLContext) -> None:
    listening.settimeout(10)
    plain, _ = listening.accept()
    with plain:
        plain.settimeout(10)
        try:
            with serving.wrap_socket(plain, server_side=True) as secured:
                secured.sendall(b"hello")
        except OSError:  # refused; the caller sees why
            return


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "::1", "fl.example.org", "FL.Example.org"]
)
def test_a_device_that_has_the_authority_shakes_hands(home: Path, host: str) -> None:
    handshake(home, home / "ca.crt", host)


def test_another_authority_is_refused(home: Path, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(home, other, "localhost")


@pytest.mark.parametrize("host", ["fl.example.com", "127.0.0.2", "org", "x.fl.example.org"])
def test_another_host_is_refused(home: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(home, home / "ca.crt", host)


def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, -400)
    server_certificate(tmp_path, [])
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, tmp_path / "ca.crt", "localhost")
    monkeypatch.undo()
    assert server_certificate(tmp_path, [])
    handshake(tmp_path, tmp_path / "ca.crt", "localhost")


def test_a_certificate_of_the_future_is_refused_but_not_for_a_clock_that_is_a_little_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 0.9)
    server_certificate(tmp_path / "near", [])
    handshake(tmp_path / "near", tmp_path / "near" / "ca.crt", "localhost")
    at(monkeypatch, 1.1)
    server_certificate(tmp_path / "far", [])
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        handshake(tmp_path / "far", tmp_path / "far" / "ca.crt", "localhost")


def test_what_the_server_shows_cannot_sign_for_another(home: Path) -> None:
    shown, authority = read_certificate(home / "server.crt"), read_certificate(home / "ca.crt")
    for certificate, ca in ((shown, False), (authority, True)):
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert basic.critical
        assert usage.critical
        assert basic.value.ca is usage.value.key_cert_sign is ca
        assert usage.value.digital_signature is not ca


# ---- Flower's own loaders


def test_flower_takes_the_certificates(home: Path) -> None:
    paths = {
        "ssl_ca_certfile": str(home / "ca.crt"),
        "ssl_certfile": str(home / "server.crt"),
        "ssl_keyfile": str(home / "server.key"),
    }
    found = try_obtain_server_certificates(Namespace(**paths))
    assert found == tuple(Path(path).read_bytes() for path in paths.values())
    device = Namespace(root_certificates=str(home / "ca.crt"), insecure=False)
    assert try_obtain_root_certificates(device, "localhost:8000") == found[0]


def test_flower_takes_both_halves_of_a_device_key(tmp_path: Path) -> None:
    private, line = device_key()
    (tmp_path / "device.key").write_bytes(private)
    (tmp_path / "device.pub").write_text(f"{line} clinic-a\n")
    asked = Namespace(
        auth_supernode_private_key=str(tmp_path / "device.key"), auth_supernode_public_key=None
    )
    loaded = _try_setup_client_authentication(asked)
    assert loaded is not None
    assert isinstance(loaded[1].curve, ec.SECP384R1)
    assert try_load_public_key(tmp_path / "device.pub") == public_key_to_bytes(loaded[1])


def test_openssh_sees_one_key_in_both_halves(tmp_path: Path) -> None:
    private, line = device_key()
    write_file(tmp_path / "device.key", private, 0o600)
    try:
        shown = subprocess.run(
            ["ssh-keygen", "-y", "-f", tmp_path / "device.key"], capture_output=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("OpenSSH is not installed")
    assert shown.stdout.decode().split()[:2] == line.split()


def test_no_two_devices_have_one_key() -> None:
    assert len({device_key() for _ in range(3)}) == 3


# ---- keys that devices made themselves


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_public_key_is_read_without_its_comment(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    public = ec.generate_private_key(curve).public_key()
    line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "own.pub").write_bytes(line + b" me@my device\n")
    assert public_line(tmp_path / "own.pub") == line.decode()


def test_what_is_no_public_key_of_flower_is_refused_with_what_to_type(tmp_path: Path) -> None:
    of_rsa = rsa.generate_private_key(65537, 2048).public_key()
    contents = {
        "empty.pub": b"",
        "text.pub": b"\xff\xfe no key",
        "rsa.pub": of_rsa.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "private.pub": device_key()[0],
        "torn.pub": device_key()[1][:60].encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "missing.pub", "."]:
        with pytest.raises(ConfigError, match="ssh-keygen -t ecdsa") as refused:
            public_line(tmp_path / name)
        assert str(tmp_path / name) in refused.value.problems[0]


# ---- made once, renewed in time


def test_the_authority_is_made_once_and_lasts_ten_years(home: Path) -> None:
    before = {name: (home / name).read_bytes() for name in ("ca.crt", "ca.key")}
    assert create_authority(home) == home / "ca.crt"
    assert {name: (home / name).read_bytes() for name in before} == before
    assert 3650 * DAY < expiry(home / "ca.crt") - datetime.now(UTC) < 3654 * DAY


def test_no_two_authorities_have_one_name(tmp_path: Path) -> None:
    subjects = {read_certificate(create_authority(tmp_path / n)).subject for n in "abc"}
    assert len(subjects) == 3


def test_an_authority_torn_by_a_crash_is_completed_with_its_key(tmp_path: Path) -> None:
    create_authority(tmp_path)
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.crt").unlink()
    create_authority(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == key
    server_certificate(tmp_path, [])
    handshake(tmp_path, tmp_path / "ca.crt", "localhost")


def test_the_key_of_the_authority_is_needed_for_a_new_certificate_only(home: Path) -> None:
    (home / "ca.key").rename(home / "kept elsewhere")
    create_authority(home)
    assert not server_certificate(home, ["fl.example.org"])
    with pytest.raises(ConfigError, match=r"ca\.key: no EC or RSA key"):
        server_certificate(home, ["other.example.org"])
    assert not (home / "ca.key").exists()


def test_an_authority_with_an_rsa_key_of_the_users_own_signs_too(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ca.key").write_bytes(pem)
    server_certificate(tmp_path, [])
    handshake(tmp_path, tmp_path / "ca.crt", "127.0.0.1")


def test_the_certificate_names_who_is_asked_for_and_this_machine(home: Path) -> None:
    server_certificate(home, ["192.0.2.7", "2001:db8::1", "0.0.0.0", "::", "A.Example.ORG"])
    asked = {"192.0.2.7", "2001:db8::1", "a.example.org"}
    assert names(home) == asked | {"fl.example.org", "localhost", "127.0.0.1", "::1"}
    handshake(home, home / "ca.crt", "2001:db8::1")


def test_it_is_renewed_when_a_host_is_missing_and_only_then(home: Path) -> None:
    first, key = (home / "server.crt").read_bytes(), (home / "server.key").read_bytes()
    assert not server_certificate(home, ["fl.example.org", "127.0.0.1", "FL.EXAMPLE.org"])
    assert not server_certificate(home, [])
    assert (home / "server.crt").read_bytes() == first
    assert server_certificate(home, ["other.example.org"])
    assert (home / "server.crt").read_bytes() != first
    assert names(home) >= {"fl.example.org", "other.example.org"}
    assert (home / "server.key").read_bytes() == key


@pytest.mark.parametrize(("days", "renewed"), [(334, False), (336, True), (366, True)])
def test_it_is_renewed_within_thirty_days_of_its_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, days: int, renewed: bool
) -> None:
    assert 364 * DAY < expiry(home / "server.crt") - datetime.now(UTC) < 366 * DAY
    at(monkeypatch, days)
    assert server_certificate(home, []) is renewed
    left = expiry(home / "server.crt") - pki.now()
    assert left > (364 * DAY if renewed else 30 * DAY)
    assert "fl.example.org" in names(home)


def test_it_lasts_as_asked_but_never_longer_than_the_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_certificate(tmp_path, [], days=90)
    assert 89 * DAY < expiry(tmp_path / "server.crt") - datetime.now(UTC) < 91 * DAY
    at(monkeypatch, 3600)
    assert server_certificate(tmp_path, [])
    assert expiry(tmp_path / "server.crt") == expiry(tmp_path / "ca.crt")
    at(monkeypatch, 3660)
    with pytest.raises(ConfigError, match="enrol the devices again"):
        server_certificate(tmp_path, [])
    with pytest.raises(ValueError, match="days must be at least 1"):
        server_certificate(tmp_path, [], days=0)


def test_it_is_renewed_when_its_key_or_authority_is_not_its_own(home: Path, tmp_path: Path) -> None:
    server_certificate(tmp_path / "other", [])
    (tmp_path / "other" / "server.key").replace(home / "server.key")
    assert server_certificate(home, [])
    handshake(home, home / "ca.crt", "localhost")
    for name in ("ca.crt", "ca.key"):
        (tmp_path / "other" / name).replace(home / name)
    assert server_certificate(home, [])
    handshake(home, home / "ca.crt", "localhost")


def test_files_that_cannot_be_used_are_named(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_authority(other)
    (other / "ca.key").replace(home / "ca.key")
    with pytest.raises(ConfigError, match=r"is not the key of ca\.crt"):
        server_certificate(home, ["new.example.org"])
    for name in ("server.crt", "server.key", "ca.crt"):
        (home / name).write_bytes(b"-----BEGIN nothing-----")
        with pytest.raises(ConfigError, match=name):
            server_certificate(home, [])
    for unread in (home / "ca.crt", home / "missing", home):
        with pytest.raises(ConfigError, match="no certificate can be read"):
            expiry(unread)


# ---- hosts


@pytest.mark.parametrize(
    "host", ["a", "fl.example.org", "xn--bcher-kva.example", "my_server", "3com.com", "192.0.2.1"]
)
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert host_problem(host) is None


@pytest.mark.parametrize(
    "host",
    ["", ".", "a..b", "-a.b", "a-.b", "a b", "a:8000", "[::1]", "*.example.org", "bücher.example",
     "a/24", "https://a", "300.1.1.1", "1.2.3", "fe80::1%eth0", "a.", "a" * 64, "a.b" * 90, "a\n"],
)  # fmt: skip
def test_all_hosts_that_are_none_are_told_at_once(home: Path, host: str) -> None:
    before = (home / "server.crt").read_bytes()
    with pytest.raises(ConfigError) as refused:
        server_certificate(home, ["good.example.org", host, "no such host"])
    assert len(refused.value.problems) == 2
    assert (home / "server.crt").read_bytes() == before


# ---- files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_keys_are_nobody_elses_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = {}
    real = os.open

    def watched(path: Path, flags: int, mode: int = 0o777, **more: int) -> int:
        created[Path(path).name] = flags, mode
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        server_certificate(tmp_path / "home", [])
    finally:
        os.umask(before)
    keys = {name: how for name, how in created.items() if ".key." in name}
    assert len(keys) == 2
    assert all(flags & os.O_EXCL and mode == 0o600 for flags, mode in keys.values())
    home = tmp_path / "home"
    assert mode(home) == 0o700
    assert {name: mode(home / name) for name in ("ca.key", "server.key")} == {
        "ca.key": 0o600,
        "server.key": 0o600,
    }


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_lock_that_is_not_given_back_is_said_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "_PATIENCE", 0.1)
    path = tmp_path / "lock"
    with locked(path), pytest.raises(RunError, match="another process"), locked(path):
        pass
    with locked(path):
        pass


def test_processes_that_begin_at_once_agree_on_one_authority(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code = (
        "import sys; from pathlib import Path; from fedsys.deployment.pki import *;"
        "server_certificate(Path(sys.argv[1]), [sys.argv[2]])"
    )
    hosts = [f"host-{number}.example.org" for number in range(4)]
    started = [subprocess.Popen([sys.executable, "-c", code, home, host]) for host in hosts]
    assert [process.wait(60) for process in started] == [0] * 4
    assert names(home) >= set(hosts)
    for host in hosts:
        handshake(home, home / "ca.crt", host)
    key = load_pem_private_key((home / "ca.key").read_bytes(), None)
    assert key.public_key() == read_certificate(home / "ca.crt").public_key()
    assert not list(home.glob("*.partial"))


def test_an_address_is_named_as_an_address(home: Path) -> None:
    server_certificate(home, ["192.0.2.7"])
    certificate = read_certificate(home / "server.crt")
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ip_address("192.0.2.7") in found.get_values_for_type(x509.IPAddress)
    assert "192.0.2.7" not in found.get_values_for_type(x509.DNSName)
