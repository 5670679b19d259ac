"""Flower's entry point at the server: ``flwr run .`` runs a federation as any Flower app.

The run configuration says which: ``overrides="strategy=fedavg rounds=10"`` as after ``fedsys run``,
or ``hydra-json``, a whole composed configuration.
"""

import json
import shlex

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedsys.config import Experiment, build, compose
from fedsys.console import Silent
from fedsys.experiment import run_federation
from fedsys.federation import assemble

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train over whatever clients ``grid`` connects."""
    experiment = experiment_of(context.run_config)
    run_federation(assemble(experiment), grid, {}, Silent(), engine="flower")


def experiment_of(settings: UserConfig) -> Experiment:
    """Return the experiment a run configuration describes; raises ``ConfigError``."""
    composed = str(settings.get("hydra-json", ""))
    if composed:
        return build(json.loads(composed))
    # Not configure: every process of the run builds it, and the folder exists after the first.
    return build(compose(shlex.split(str(settings.get("overrides", "")))))
