"""Flower's entry point at a client; its settings are those of ``fedsys.server_app``."""

import re
from pathlib import Path

from flwr.app import Context

from fedsys.far import FarClients, Place
from fedsys.server_app import composed

_RUN = re.compile(r"[0-9a-f]{1,64}")  # it becomes the name of a folder


def place_of(context: Context) -> Place:
    """Return where the client of ``context`` keeps things: below ``home`` of its node's settings.

    Raises ``ValueError`` where the server names a run as no run is named.
    """
    run = str(context.run_config.get("run", "")) or f"{context.run_id:x}"
    if not _RUN.fullmatch(run):
        raise ValueError(f"the server calls its run {run!r:.80}")
    node = context.node_config
    home = node.get("home") or Path.home() / ".fedsys" / f"client-{node['partition-id']}"
    data = str(node["data"]) if "data" in node else None
    # One name for all that is ever spent: what a run calls the rows is up to the server.
    owner = f"client-{node['partition-id']}"
    return Place(run, Path(str(home)) / "runs" / run, Path(str(home)) / "ledger", data, owner)


app = FarClients(lambda context: composed(context.run_config), place_of).app()
