"""How a node's life ended, and what that says to whoever is at the device."""

import time
from dataclasses import dataclass
from pathlib import Path

from fedsys.deployment.probe import Trouble

_BAD_FOLDER = 2  # the node's own exit code
_CONNECTION = 305  # Flower's: the server did not let the node in
_NOT_ACCEPTED = 2004  # its reason: the server does not know the key, or holds the node still

# Flower's other exit codes, in words, and whether they can pass without anybody at the device.
_WORDS: dict[int, Trouble] = {
    302: Trouble("device.key is no key that Flower can use", heals=False),
    303: Trouble("a device with a key speaks by TLS only", heals=False),
    600: Trouble("the server's address in device.yaml cannot be used", heals=False),
    603: Trouble("ca.crt and a connection without TLS do not go together", heals=False),
    606: Trouble("the versions of Flower here and at the server do not go together"),
}


@dataclass
class Ending:
    """What was heard of a node until it ended."""

    known: bool = False  # whether the server has let the device in before
    connected: float | None = None  # when
    code: int | None = None  # of its process
    flowers: int | None = None  # code, if it said one
    api: int | None = None  # code of the server's answer, if there was one
    text: str = ""

    @property
    def lasted(self) -> float:
        """For how many seconds it was connected."""
        return 0.0 if self.connected is None else time.monotonic() - self.connected

    @property
    def refused(self) -> bool:
        """Whether the server refused the device's key."""
        return self.api == _NOT_ACCEPTED

    @staticmethod
    def unknown() -> Trouble:
        """Return the trouble of a device that is refused for longer than it could be held."""
        return Trouble(
            "the server does not know the key of this device: enrol it there, or ask whether it was"
            " revoked",
            heals=False,
        )

    def trouble(self, log: Path) -> Trouble:
        """Return why it ended; ``log`` says more."""
        if self.code == _BAD_FOLDER:
            return Trouble("the device's folder cannot be used", heals=False)
        if self.refused:
            if self.known:
                return Trouble("the server still holds this device's former connection")
            return Trouble(
                "the server does not know the key of this device, or still holds a former"
                " connection, for a minute"
            )
        if self.flowers in _WORDS:
            return _WORDS[self.flowers]
        if self.flowers == _CONNECTION:
            return Trouble(f"the server does not let this device in: {self.text:.200}")
        if self.code is not None and self.code < 0:
            return Trouble(f"the node was killed by signal {-self.code}")
        if self.connected is not None:
            return Trouble("the connection to the server was lost")
        return Trouble(f"the node ended with code {self.code}; see {log}")
