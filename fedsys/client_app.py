"""Flower's entry point at a client; its settings are those of ``fedsys.server_app``."""

import json
from functools import cache

from flwr.app import Context

from clients import CohortApp, Site
from fedsys.errors import ConfigError
from fedsys.federation import assemble
from fedsys.protection import protect_clients
from fedsys.server_app import experiment_of


def _site(context: Context) -> Site:
    return _load(json.dumps(dict(context.run_config), sort_keys=True))


@cache
def _load(settings: str) -> Site:
    # A process may serve many messages: the data and the model are loaded once.
    experiment = experiment_of(json.loads(settings))
    if experiment.privacy is not None and experiment.privacy.ledger is None:
        # A run folder is new in every process: what was spent would be forgotten with it.
        raise ConfigError(["privacy.ledger: a client far from the server must name its folder"])
    federation = assemble(experiment)
    protect_clients(federation)  # until the process ends
    return federation.site


app = CohortApp(_site)
