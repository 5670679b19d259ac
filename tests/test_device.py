"""A device's folder: read whole, or refused with all that is wrong."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsys.deployment.device import Device, Settings, split
from fedsys.deployment.node import environment
from fedsys.errors import ConfigError

TEXT = """\
name: ward-3
number: 2
server: 192.168.1.2:8443
devices: 5
data: null
threads: 2
memory_mb: 2000
seconds: 3600
port: 0
"""
KEYS = [line.partition(":")[0] for line in TEXT.splitlines()]


def folder(path: Path, text: str | bytes = TEXT, keys: bool = True, **changes: str) -> Path:
    if isinstance(text, str):
        lines = [line for line in text.splitlines() if line.partition(":")[0] not in changes]
        text = "\n".join([*lines, *(f"{k}: {v}" for k, v in changes.items())]) + "\n"
        text = text.encode()
    path.mkdir(parents=True, exist_ok=True)
    (path / "device.yaml").write_bytes(text)
    if keys:
        (path / "device.key").touch()
        (path / "ca.crt").touch()
    return path


def test_what_a_device_keeps_lies_in_its_folder(tmp_path: Path) -> None:
    found = environment(Device.load(folder(tmp_path)))
    assert found["FEDSYS_CACHE"] == str(tmp_path / "state" / "cache")
    assert found["FLWR_HOME"] == str(tmp_path / "state" / "flwr")


def test_a_folder_is_read_as_it_is_written(tmp_path: Path) -> None:
    device = Device.load(folder(tmp_path))
    assert device.settings == Settings(
        name="ward-3",
        number=2,
        server="192.168.1.2:8443",
        devices=5,
        data=None,
        threads=2,
        memory_mb=2000.0,
        seconds=3600.0,
        port=0,
    )
    assert device.secure
    assert device.state == tmp_path / "state"
    assert device.node_config == {
        "partition-id": 2,
        "num-partitions": 5,
        "home": str(tmp_path / "state"),
    }


def test_paths_are_absolute_and_below_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "device", devices="null", data="rows.csv")
    (tmp_path / "device" / "rows.csv").touch()
    monkeypatch.chdir(tmp_path)
    device = Device.load(Path("device"))
    assert device.node_config["data"] == str(tmp_path / "device" / "rows.csv")
    assert Path(str(device.node_config["home"])).is_absolute()
    assert "num-partitions" not in device.node_config


def test_rows_elsewhere_are_found_by_an_absolute_path(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.touch()
    assert Device.load(folder(tmp_path / "device", data=str(rows))).data == str(rows)


BAD = {
    "name": ["''", "a/b", "..", "a b", "x" * 80, "[a]"],
    "number": ["-1", "5", "1.5", "two", "null", "true"],
    "server": ["here", "here:0", "here:65536", ":8443", "https://a:1", "a:b:1", "a:\uff11"],
    "devices": ["0", "-1", "2", "many"],
    "data": ["''", "no/such/file", "3.5"],
    "threads": ["0", "-1", "1.5", "all"],
    "memory_mb": ["0", "-1", "100", "1GB", ".nan"],
    "seconds": ["0", "-1", ".inf", ".nan", "null", "1h"],
    "port": ["-1", "65536", "null", "http"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_what_cannot_be_is_refused(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=key):
        Device.load(folder(tmp_path, **{key: value}))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_must_be_given(key: str, tmp_path: Path) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(f"{key}:")]
    with pytest.raises(ConfigError, match=f"{key}: must be given"):
        Device.load(folder(tmp_path, "\n".join(lines) + "\n"))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Device.load(folder(tmp_path, name="a/b", port="-1", seconds="soon", sekonds="1"))
    assert len(caught.value.problems) == 4


def test_keys_come_together(tmp_path: Path) -> None:
    for name in ("device.key", "ca.crt"):
        path = folder(tmp_path / name)
        (path / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            Device.load(path)


def test_without_keys_a_device_speaks_to_its_own_machine_only(tmp_path: Path) -> None:
    for number, host in enumerate(("127.0.0.1", "localhost", "[::1]")):
        device = Device.load(folder(tmp_path / str(number), keys=False, server=f'"{host}:8443"'))
        assert not device.secure
    for number, host in enumerate(("192.168.1.2", "example.org", "127.evil.org")):
        with pytest.raises(ConfigError, match="own machine"):
            Device.load(folder(tmp_path / f"far{number}", keys=False, server=f"{host}:8443"))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedsys enrol"):
        Device.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"device\.yaml"):
        Device.load(tmp_path)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_with_any_change_is_what_it_says_or_is_refused(
    data: st.DataObject, tmp_path: Path
) -> None:
    raw = TEXT.encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 20)))
    text = raw[:start] + data.draw(st.binary(max_size=4)) + raw[end:]
    try:
        found = Device.load(folder(tmp_path, text)).settings
    except ConfigError:
        return
    said = yaml.safe_load(text)
    assert set(said) == set(KEYS)
    for key, value in said.items():
        held = getattr(found, key)
        assert held == (str(value) if isinstance(held, str) else value)


def test_addresses_of_both_kinds_are_split() -> None:
    assert split("fl.example.org:8443") == ("fl.example.org", 8443)
    assert split("[2001:db8::1]:80") == ("2001:db8::1", 80)
    for address in ("::1:80", "a", "a:", "a:0", "[a]", "[::1:80", "a :1"):
        with pytest.raises(ValueError, match="host:port"):
            split(address)


def test_seconds_are_finite() -> None:
    known = {"name": "a", "number": 0, "server": "a:1", "devices": None, "data": None}
    known |= {"threads": None, "memory_mb": None, "port": 0}
    with pytest.raises(ConfigError, match="seconds"):
        Settings(**known, seconds=math.inf)
