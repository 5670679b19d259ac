"""Clients in other processes than the server's: on devices, and on Ray.

They are told of the run by its composed configuration, and load data and model themselves. What
they remember is on disk, since the next message may meet another process.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from clients import CohortApp, Site
from clients.frozen import FrozenStore
from clients.site import partition_of
from clients.store import DiskStore
from fedsys.compose import TARGET
from fedsys.config import build
from fedsys.federation import Federation, assemble
from fedsys.protection import protect_clients


@dataclass(frozen=True)
class Place:
    """Where a client keeps things, and which rows are its own."""

    run: str  # the run's id
    folder: Path  # of the run: memories, replies, what is frozen
    ledger: Path  # of all runs
    data: str | None = None  # a file of its own, for partition=on_devices
    owner: str | None = None  # in the ledger, whatever a run calls the rows; None: by the run


class FarClients:
    """The clients that a process answers for, one message at a time."""

    def __init__(
        self,
        settings: Callable[[Context], str],
        place: Callable[[Context], Place],
    ) -> None:
        """Load nothing yet; ``settings(context)`` is the composed configuration as JSON."""
        self._settings = settings
        self._place = place
        self._current: Site | None = None

    def app(self) -> CohortApp:
        """Return the ClientApp."""
        return CohortApp(self._site, mods=[self._answer])

    def _site(self, _: Context) -> Site:
        if self._current is None:
            raise RuntimeError("no message is being answered")
        return self._current

    def _answer(
        self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Hold the client's ledger while it answers; a roll call needs neither data nor model."""
        if message.metadata.message_type.startswith("query"):
            return call_next(message, context)
        place = self._place(context)
        number = 0 if place.data is None else partition_of(context)
        federation = _federation(self._settings(context), place.data, number)
        site = self._current = federation.site
        site.owner_name = place.owner
        site.store = DiskStore(place.folder / "clients")
        site.frozen = FrozenStore(place.folder / "frozen")
        with protect_clients(federation, place.run, place.folder, place.ledger) or nullcontext():
            return call_next(message, context)


@lru_cache(maxsize=2)
def _federation(settings: str, data: str | None, number: int) -> Federation:
    tree = json.loads(settings)
    if tree["engine"][TARGET].endswith(".Deployment"):  # how many is up to the device
        tree["engine"]["threads"] = None
    if tree["participation"][TARGET].endswith(".Trace"):  # a file of the server's
        tree["participation"] = {TARGET: "fedsys.participation.Uniform", "cohort": 1}
    if tree["partition"][TARGET].endswith(".OnDevices"):
        _settle(tree, data, number)
    return assemble(build(tree))


def _settle(tree: dict[str, Any], data: str | None, number: int) -> None:
    """Make the settings those of a device with rows of its own, all of which train."""
    if data is None:
        raise ValueError(
            "this device has no data of its own: name a file in device.yaml, data: ..."
        )
    tree["partition"]["client"] = number
    tree["data"] |= {"path": data, "eval_path": data, "eval_limit": 1, "public_fraction": 0.0}
    if tree["adapter"].get("init") == "public":  # from the server's rows, which sends what is made
        tree["adapter"]["init"] = "seeded_random"
