"""What a device is to the federation: ``device.yaml`` of the folder that enrolment made.

device.yaml   what stands below; paths are relative to the folder
device.key    its private key, ca.crt the authority it trusts; neither where enrolled insecurely
policy.yaml   what may run here and what may leave: ``fedsys.deployment.policy``
state/        ledger/, runs/, cache/, log/, flwr/: what it has spent, remembers and logs
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedsys.deployment import strict
from fedsys.engines.deployment import loopback
from fedsys.errors import ConfigError

FILE = "device.yaml"
_SMALLEST = 256  # MB, in which a process with Flower fits


def split(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[host]:port``; raises ``ValueError``."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", address)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise ValueError(f"{address!r:.80} is not host:port, such as 192.168.1.2:8443")
    return found[1].strip("[]"), int(found[2])


def _is_address(value: Any) -> bool:
    try:
        return bool(split(value))
    except ValueError:
        return False


_RANGES: strict.Ranges = {
    "name": (
        lambda value: re.fullmatch(r"\w[\w.-]{0,62}", value, re.ASCII) is not None,
        "must be of letters, digits, dots, dashes and underscores",
    ),
    "number": (lambda value: value >= 0, "counts from 0"),
    "server": (_is_address, "must be host:port, such as 192.168.1.2:8443"),
    "devices": (lambda value: value is None or value >= 1, "must be at least 1, or null"),
    "data": (lambda value: value != "", "must be a path, or null"),
    "threads": (lambda value: value is None or value >= 1, "must be at least 1, or null"),
    "memory_mb": (
        lambda value: value is None or value >= _SMALLEST,
        f"must be at least {_SMALLEST}, or null",
    ),
    "seconds": (lambda value: 0 < value < math.inf, "must be positive"),
    "port": (lambda value: 0 <= value <= 65535, "must be from 0, which is any, to 65535"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``device.yaml`` says."""

    name: str
    number: int  # partition-id
    server: str  # host:port
    devices: int | None  # how many partitions there are; None: the run says
    data: str | None  # the device's own rows; None: its share of the run's data
    threads: int | None  # of training; None: one a core
    memory_mb: float | None  # of a training process; None: no limit
    seconds: float  # the longest a message may take
    port: int  # on which training processes speak to the node, on this machine only; 0: any

    def __post_init__(self) -> None:
        """Check ranges; raises ``ConfigError`` with all problems."""
        problems = strict.out_of_range(vars(self), _RANGES)
        if self.devices is not None and self.number >= self.devices:
            problems.append(f"number={self.number} is not below devices={self.devices}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Device:
    """A device folder."""

    folder: Path  # absolute
    settings: Settings = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the device of ``folder``; raises ``ConfigError`` with everything that is wrong."""
        folder = folder.absolute()
        if not folder.is_dir():
            raise ConfigError([f"{folder}: no such folder; `fedsys enrol NAME` makes one"])
        if not (folder / FILE).exists():
            raise ConfigError([f"{folder}: is no device's folder, it has no {FILE}"])
        settings = strict.load(folder / FILE, Settings, _RANGES, ConfigError)
        device = cls(folder, settings)
        if problems := device._problems():
            raise ConfigError([f"{folder}: {problem}" for problem in problems])
        return device

    def _problems(self) -> list[str]:
        problems = []
        keys = ("device.key", "ca.crt")
        missing = [name for name in keys if not (self.folder / name).is_file()]
        host, _ = split(self.settings.server)
        if len(missing) == 1:
            problems.append(f"{missing[0]} is missing; copy the whole folder that enrolment made")
        elif missing and not loopback(host):
            problems.append(
                f"{' and '.join(missing)} are missing, without which a device may only speak to"
                f" its own machine, and the server is at {host}; enrol it again"
            )
        if self.data is not None and not Path(self.data).exists():
            problems.append(f"data: there is no {self.data}")
        return problems

    @property
    def secure(self) -> bool:
        """Whether the device has a key, and speaks to its server by TLS."""
        return (self.folder / "ca.crt").is_file()

    @property
    def data(self) -> str | None:
        """The absolute path of the device's own rows; None: it has none of its own."""
        data = self.settings.data
        return None if data is None else str((self.folder / data).absolute())

    @property
    def state(self) -> Path:
        """The folder of what the device remembers."""
        return self.folder / "state"

    @property
    def ledger(self) -> Path:
        """The folder of its privacy ledger."""
        return self.state / "ledger"

    @property
    def policy(self) -> Path:
        """The file of its operator's policy."""
        return self.folder / "policy.yaml"

    @property
    def node_config(self) -> dict[str, str | int]:
        """What its ClientApp is told of it."""
        told: dict[str, str | int] = {
            "partition-id": self.settings.number,
            "home": str(self.state),
        }
        if self.settings.devices is not None:
            told["num-partitions"] = self.settings.devices
        if self.data is not None:
            told["data"] = self.data
        return told
