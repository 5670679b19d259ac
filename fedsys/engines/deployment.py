"""The deployed engine: Flower's SuperLink here, and a SuperNode on each device."""

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsys.config import Experiment
    from fedsys.console import Observer
    from fedsys.experiment import RunResult

HOME = Path("fedsys-server")  # where a server is kept unless told otherwise


@dataclass(frozen=True)
class Deployment:
    """Settings of the deployed engine."""

    home: Path = HOME  # keys, enrolled devices, database and log of the server
    host: str = "127.0.0.1"  # the address to listen at
    port: int = 8443
    insecure: bool = False  # neither TLS nor keys of devices; loopback addresses only
    min_clients: int | None = None  # connected before a round may start; None: all
    patience: float = 600.0  # seconds to wait for them
    keep: bool = False  # leave the SuperLink running after the run
    threads: int | None = None  # CPU threads of torch at the server; None: one a core

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("host must be an address, such as 127.0.0.1 or 0.0.0.0")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")
        if not 0 < self.patience < float("inf"):
            raise ValueError(f"patience must be a positive number of seconds, got {self.patience}")
        for name, value in (("min_clients", self.min_clients), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.insecure and not loopback(self.host):
            raise ValueError(
                f"insecure is for loopback addresses only, got host={self.host}; without TLS"
                " anybody on the way reads the updates and sends their own"
            )

    def run(self, experiment: "Experiment", observer: "Observer") -> "RunResult":
        """Run ``experiment`` on the devices that are enrolled in the server home."""
        from fedsys.deployment.serve import deploy

        return deploy(experiment, observer)


def loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
