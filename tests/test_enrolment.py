"""Enrolment: numbers that are never given twice, and folders with all that a device needs."""

import json
import logging
import os
import stat
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsys.deployment import enrolment
from fedsys.deployment.device import Device
from fedsys.deployment.enrolment import Enrolled, enrol, enrolled, revoke
from fedsys.deployment.pki import device_key, read_certificate, write_file
from fedsys.deployment.policy import Policy
from fedsys.errors import ConfigError

SERVER = "fl.example.org:8443"
CODE = ["0" * 64, "123456789abcdef0" * 4]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "server"


def refused(match: str | None = None, **changes: object) -> list[str]:
    """Return the problems of an enrolment that must be refused."""
    with pytest.raises(ConfigError, match=match) as reason:
        enrol(**changes)
    return reason.value.problems


def read(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path))


def every(folder: Path) -> dict[str, bytes]:
    """Return the files below ``folder`` but locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ---- the folder


def test_a_folder_has_all_that_a_device_needs(home: Path, tmp_path: Path) -> None:
    folder = enrol("clinic-a", home, SERVER, folder=tmp_path / "deep" / "a", data="/srv/rows.csv")
    assert folder == tmp_path / "deep" / "a"
    assert set(every(folder)) == {
        "README.md", "ca.crt", "device.key", "device.pub", "device.yaml", "policy.yaml",
    }  # fmt: skip
    assert read(folder / "device.yaml") == {
        "name": "clinic-a",
        "number": 0,
        "server": SERVER,
        "devices": None,
        "data": "/srv/rows.csv",
        "threads": None,
        "memory_mb": None,
        "seconds": 3600,
        "port": 0,
    }
    assert (folder / "ca.crt").read_bytes() == (home / "ca.crt").read_bytes()
    assert (home / "devices" / "clinic-a.pub").read_bytes() == (folder / "device.pub").read_bytes()
    assert (folder / "device.pub").read_text().split()[2:] == ["clinic-a"]
    assert stat.S_IMODE((folder / "device.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(tmp_path.rglob("*.partial"))


def test_flower_takes_the_key_of_the_folder_and_registers_its_other_half(
    home: Path, tmp_path: Path
) -> None:
    folder = enrol("a", home, SERVER, folder=tmp_path / "a")
    asked = Namespace(
        auth_supernode_private_key=str(folder / "device.key"), auth_supernode_public_key=None
    )
    loaded = _try_setup_client_authentication(asked)
    assert loaded is not None
    assert try_load_public_key(home / "devices" / "a.pub") == public_key_to_bytes(loaded[1])


def test_the_server_has_a_certificate_for_the_address(home: Path, tmp_path: Path) -> None:
    enrol("a", home, SERVER, folder=tmp_path / "a")
    enrol("b", home, "[2001:db8::1]:8443", folder=tmp_path / "b")
    certificate = read_certificate(home / "server.crt")
    shown = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "fl.example.org" in shown.get_values_for_type(x509.DNSName)
    assert ip_address("2001:db8::1") in shown.get_values_for_type(x509.IPAddress)


def test_the_folder_is_called_as_the_device_unless_told_otherwise(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert enrol("clinic-a", home, SERVER) == tmp_path / "clinic-a"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert enrol("b", home, SERVER, folder=Path()) == tmp_path / "empty"
    assert (tmp_path / "empty" / "device.key").is_file()


def test_the_policy_is_strict(home: Path, tmp_path: Path) -> None:
    folder = enrol("a", home, SERVER, folder=tmp_path / "a")
    policy = read(folder / "policy.yaml")
    assert policy == {
        "code": [],  # nothing runs before the operator says what
        "strategies": "any",
        "adapters": "any",
        "privacy": "sample",
        "max_epsilon": 8.0,
        "max_delta": 1e-5,
        "max_clipping_norm": 1.0,
        "max_bytes": 10_000_000,
        "min_examples": 50,
        "evaluate": False,
        "max_rounds": None,
    }
    assert type(policy["max_delta"]) is float
    other = enrol("b", home, SERVER, folder=tmp_path / "b", code=CODE)
    assert read(other / "policy.yaml") == policy | {"code": CODE}


def test_a_hash_of_digits_alone_stays_text(home: Path, tmp_path: Path) -> None:
    code = ["1" * 64, "1" * 62 + "e1", "0" * 64]
    folder = enrol("123", home, SERVER, folder=tmp_path / "a", code=code)
    assert read(folder / "policy.yaml")["code"] == code
    assert read(folder / "device.yaml")["name"] == "123"


@pytest.mark.parametrize("data", ["C:\\rows", 'a "b": c # d', "yes", "1e3", "~", "Bücher/日本 😀"])
def test_a_path_of_data_is_kept_as_it_is(home: Path, tmp_path: Path, data: str) -> None:
    folder = enrol("a", home, SERVER, folder=tmp_path / "a", data=data)
    assert read(folder / "device.yaml")["data"] == data


@pytest.mark.parametrize("insecure", [False, True])
def test_the_device_understands_what_enrolment_wrote(
    home: Path, tmp_path: Path, insecure: bool
) -> None:
    address = "localhost:8443" if insecure else "[2001:db8::1]:8443"
    for name in "ab":
        folder = tmp_path / name
        enrol(name, home, address, folder=folder, data="../rows", insecure=insecure, code=CODE)
    (tmp_path / "rows").mkdir()
    device = Device.load(folder)
    assert device.settings.server == address
    assert device.node_config["partition-id"] == 1
    assert Path(device.node_config["data"]).samefile(tmp_path / "rows")
    assert device.secure is not insecure
    policy = Policy.load(device.policy)
    assert policy.code == tuple(CODE)
    assert policy.privacy == "sample"
    assert not policy.evaluate


# ---- numbers


def test_numbers_are_given_in_order_and_never_again(home: Path, tmp_path: Path) -> None:
    for name in "abc":
        enrol(name, home, SERVER, folder=tmp_path / name)
    revoke("c", home)
    enrol("d", home, SERVER, folder=tmp_path / "d")
    assert {name: entry.number for name, entry in enrolled(home).items()} == {
        "a": 0, "b": 1, "c": 2, "d": 3,
    }  # fmt: skip
    assert read(tmp_path / "d" / "device.yaml")["number"] == 3


def test_the_time_of_enrolment_is_kept(home: Path, tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    enrol("a", home, SERVER, folder=tmp_path / "a")
    assert before <= datetime.fromisoformat(enrolled(home)["a"].registered) <= datetime.now(UTC)
    assert enrolled(home)["a"].revoked is None


def test_the_key_is_known_as_openssh_shows_it(home: Path, tmp_path: Path) -> None:
    folder = enrol("a", home, SERVER, folder=tmp_path / "a")
    try:
        shown = subprocess.run(
            ["ssh-keygen", "-l", "-f", folder / "device.pub"], capture_output=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("OpenSSH is not installed")
    assert shown.stdout.decode().split()[1] == enrolled(home)["a"].key


def test_devices_enrolled_at_once_have_different_numbers(home: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedsys.deployment.enrolment import enrol;"
        "[enrol(f'{sys.argv[1]}{n}', Path('server'), 'localhost:8443') for n in range(3)]"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in "abc"]
    assert [process.wait(60) for process in started] == [0] * 3
    known = enrolled(home)
    assert sorted(entry.number for entry in known.values()) == list(range(9))
    for name, entry in known.items():
        assert read(tmp_path / name / "device.yaml")["number"] == entry.number
        shown = (home / "devices" / f"{name}.pub").read_text()
        assert (tmp_path / name / "device.pub").read_text() == shown
        assert (tmp_path / name / "ca.crt").read_bytes() == (home / "ca.crt").read_bytes()


# ---- who may not be enrolled


@pytest.mark.parametrize(
    "name",
    ["", "a b", "../a", "a/b", ".", "..", "a.b", "-a", "_a", "é", "a" * 41, "a\n", "a\0"],
)
def test_a_name_is_of_letters_and_digits(home: Path, tmp_path: Path, name: str) -> None:
    refused("is no name of a device", name=name, home=home, address=SERVER, folder=tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "0", "clinic-A_1", "a" * 40])
def test_a_good_name_is_taken(home: Path, tmp_path: Path, name: str) -> None:
    enrol(name, home, SERVER, folder=tmp_path / "a")
    assert list(enrolled(home)) == [name]


@pytest.mark.parametrize(
    "address",
    ["", "fl.example.org", "fl.example.org:", ":8443", "fl.example.org:0", "fl.example.org:65536",
     "fl.example.org:+1", "fl.example.org:8443/x", "https://fl.example.org:8443", "::1:8443",
     "[fl.example.org]:8443", "fl.example.org:٨", "a b:8443", "300.1.1.1:8443", "0.0.0.0:8443",
     "[::]:8443", "[::1:8443", "x:" + "9" * 5000],
)  # fmt: skip
def test_an_address_is_host_and_port(home: Path, tmp_path: Path, address: str) -> None:
    problems = refused(name="a", home=home, address=address, folder=tmp_path / "a")
    assert len(problems) == 1
    assert "write HOST:PORT" in problems[0] or "no device can call" in problems[0]
    assert not list(tmp_path.iterdir())


def test_all_problems_are_told_at_once(home: Path, tmp_path: Path) -> None:
    problems = refused(
        name="a b", home=home, address="nowhere", folder=tmp_path, data="\n", code=["A" * 64, "0"]
    )
    assert len(problems) == 5
    assert not list(tmp_path.iterdir())


def test_a_name_is_not_enrolled_twice(home: Path, tmp_path: Path) -> None:
    enrol("clinic-a", home, SERVER, folder=tmp_path / "a")
    before = every(tmp_path)
    for name in ("clinic-a", "CLINIC-A"):
        (problem,) = refused(name=name, home=home, address=SERVER, folder=tmp_path / "b")
        assert "clinic-a: is enrolled already, as number 0" in problem
        assert "`fedsys enrol clinic-a --revoke`" in problem
        assert "-2" in problem
    assert every(tmp_path) == before


def test_a_name_that_was_revoked_does_not_come_back(home: Path, tmp_path: Path) -> None:
    enrol("a" * 40, home, SERVER, folder=tmp_path / "a")
    revoke("a" * 40, home)
    (problem,) = refused(name="a" * 40, home=home, address=SERVER, folder=tmp_path / "b")
    proposed = problem.rpartition(" ")[2]
    enrol(proposed, home, SERVER, folder=tmp_path / "b")


def test_a_folder_that_holds_something_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = every(tmp_path)
    for name in ("full", "file", "link"):
        refused("exists; remove it", name="a", home=home, address=SERVER, folder=tmp_path / name)
    assert every(tmp_path) == before
    assert not home.exists()


def test_a_damaged_list_of_devices_gives_no_numbers(home: Path, tmp_path: Path) -> None:
    enrol("a", home, SERVER, folder=tmp_path / "a")
    whole = (home / "devices.json").read_text()
    for text in (whole[:-5], "[]", '{"a": {}}', '{"a": {"number": 0, "other": 1}}', "1", ""):
        (home / "devices.json").write_text(text)
        refused(r"devices\.json: is no list", name="b", home=home, address=SERVER,
                folder=tmp_path / "b")  # fmt: skip
        with pytest.raises(ConfigError, match=r"devices\.json: is no list"):
            revoke("a", home)
    assert not (tmp_path / "b").exists()


# ---- without keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "[::1]", "localhost", "LOCALHOST"])
def test_a_device_of_this_machine_may_do_without_keys(
    home: Path, tmp_path: Path, host: str
) -> None:
    folder = enrol("a", home, f"{host}:8443", folder=tmp_path / "a", insecure=True)
    assert set(every(folder)) == {"README.md", "device.yaml", "policy.yaml"}
    assert set(every(home)) == {"devices.json"}
    assert enrolled(home)["a"].key is None
    enrol("b", home, f"{host}:8443", folder=tmp_path / "b", insecure=True)
    assert [entry.number for entry in enrolled(home).values()] == [0, 1]


@pytest.mark.parametrize(
    "address", [SERVER, "192.0.2.1:8443", "128.0.0.1:80", "[2001:db8::1]:8443", "localhost.x:80"]
)
def test_nobody_else_may(home: Path, tmp_path: Path, address: str) -> None:
    refused("may do without keys", name="a", home=home, address=address, folder=tmp_path / "a",
            insecure=True)  # fmt: skip
    assert not list(tmp_path.iterdir())


# ---- a key of the device's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.pub").write_text(f"{device_key()[1]} me@device\n")
    return tmp_path / "own.pub"


def test_a_private_key_that_was_made_on_the_device_stays_there(
    home: Path, tmp_path: Path, own: Path
) -> None:
    folder = enrol("a", home, SERVER, folder=tmp_path / "a", public_key=own)
    assert "device.key" not in every(folder)
    assert not any(b"OPENSSH PRIVATE" in content for content in every(tmp_path).values())
    registered = (home / "devices" / "a.pub").read_text().split()
    assert registered == [*own.read_text().split()[:2], "a"]
    assert (folder / "device.pub").read_text().split() == registered
    assert "device.key" in (folder / "README.md").read_text()


def test_a_key_is_of_one_device_only_even_if_that_was_revoked(
    home: Path, tmp_path: Path, own: Path
) -> None:
    enrol("a", home, SERVER, folder=tmp_path / "a", public_key=own)
    wanted = {"name": "b", "home": home, "address": SERVER, "folder": tmp_path / "b"}
    refused("a has this key", **wanted, public_key=own)
    revoke("a", home)
    refused("a has this key", **wanted, public_key=own)
    assert list(enrolled(home)) == ["a"]


def test_what_is_no_key_for_flower_is_refused(home: Path, tmp_path: Path, own: Path) -> None:
    wanted = {"name": "a", "home": home, "address": SERVER, "folder": tmp_path / "a"}
    public = rsa.generate_private_key(65537, 2048).public_key()
    own.write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    refused("ssh-keygen -t ecdsa", **wanted, public_key=own)
    local = wanted | {"address": "localhost:1"}
    refused("has no public key; leave it out", **local, insecure=True, public_key=own)
    assert not home.exists()


# ---- revoking


def test_a_revoked_device_is_no_longer_registered(home: Path, tmp_path: Path) -> None:
    for name in "ab":
        enrol(name, home, SERVER, folder=tmp_path / name)
    revoke("a", home)
    assert [path.name for path in (home / "devices").iterdir()] == ["b.pub"]
    first = enrolled(home)["a"]
    assert first.number == 0
    assert first.revoked is not None
    assert enrolled(home)["b"].revoked is None
    revoke("a", home)
    assert enrolled(home)["a"] == first


def test_who_was_never_enrolled_cannot_be_revoked(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no server home"):
        revoke("a", home)
    assert not home.exists()
    enrol("clinic-a", home, SERVER, folder=tmp_path / "a")
    with pytest.raises(ConfigError, match="did you mean clinic-a"):
        revoke("clinic-b", home)
    with pytest.raises(ConfigError, match="no such device"):
        revoke("../ca", home)
    assert (home / "ca.crt").exists()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=12))
def test_who_may_join_is_who_was_enrolled_and_not_revoked(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bool]]
) -> None:
    base = tmp_path_factory.mktemp("steps")
    numbers: dict[str, int] = {}
    joined = set()
    for place, (name, enrols) in enumerate(steps):
        try:
            if enrols:
                enrol(name, base / "home", "localhost:1", folder=base / str(place))
                assert name not in numbers
                numbers[name] = len(numbers)
                joined.add(name)
            else:
                revoke(name, base / "home")
                assert name in numbers
                joined.discard(name)
        except ConfigError:
            assert (name in numbers) is enrols
    assert {name: entry.number for name, entry in enrolled(base / "home").items()} == numbers
    assert {path.stem for path in (base / "home").glob("devices/*.pub")} == joined
    active = {name for name, e in enrolled(base / "home").items() if e.revoked is None}
    assert active == joined


# ---- faults


@pytest.mark.parametrize("file", ["device.key", "b.pub", "devices.json", "policy.yaml"])
def test_an_enrolment_that_fails_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    enrol("a", home, SERVER, folder=tmp_path / "a")
    before = every(tmp_path)

    def failing(path: Path, content: bytes, mode: int = 0o644) -> None:
        if path.name == file:
            raise OSError("No space left on device")
        write_file(path, content, mode)

    with monkeypatch.context() as patch:
        patch.setattr(enrolment, "write_file", failing)
        with pytest.raises(OSError, match="No space"):
            enrol("b", home, SERVER, folder=tmp_path / "b")
    assert every(tmp_path) == before
    assert not list(tmp_path.rglob("*.partial"))
    enrol("b", home, SERVER, folder=tmp_path / "b")
    assert enrolled(home)["b"].number == 1


def test_a_folder_that_fills_up_meanwhile_is_left_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def racing(path: Path, content: bytes, mode: int = 0o644) -> None:
        write_file(path, content, mode)
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "mine.txt").write_text("mine")

    monkeypatch.setattr(enrolment, "write_file", racing)
    with pytest.raises(OSError, match="not empty"):
        enrol("a", home, SERVER, folder=tmp_path / "a")
    assert every(tmp_path / "a") == {"mine.txt": b"mine"}
    assert enrolled(home) == {}
    assert not list((home / "devices").iterdir())


def test_a_server_that_runs_is_to_be_restarted_for_a_new_name(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    enrol("a", home, SERVER, folder=tmp_path / "a")
    (home / "superlink.json").write_text("{}")
    enrol("b", home, SERVER, folder=tmp_path / "b")
    assert not caplog.records
    enrol("c", home, "other.example.org:8443", folder=tmp_path / "c")
    assert "other.example.org" in caplog.text
    assert "--stop" in caplog.text


def test_the_list_of_devices_is_json(home: Path, tmp_path: Path) -> None:
    enrol("a", home, SERVER, folder=tmp_path / "a")
    found = json.loads((home / "devices.json").read_text())
    assert Enrolled(**found["a"]) == enrolled(home)["a"]
    assert os.access(home / "devices.json", os.R_OK)
