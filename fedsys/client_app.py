"""Flower's entry point at a client; its settings are those of ``fedsys.server_app``."""

import json
from functools import cache

from flwr.app import Context

from clients import CohortApp, Site
from fedsys.federation import assemble
from fedsys.protection import protect_clients
from fedsys.server_app import experiment_of


def _site(context: Context) -> Site:
    return _load(json.dumps(dict(context.run_config), sort_keys=True))


@cache
def _load(settings: str) -> Site:
    # A process may serve many messages: the data and the model are loaded once.
    federation = assemble(experiment_of(json.loads(settings)))
    protect_clients(federation)  # until the process ends
    return federation.site


app = CohortApp(_site)
