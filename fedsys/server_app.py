"""Flower's entry point at the server: ``flwr run .`` runs a federation as any Flower app.

The run configuration says which: ``overrides="strategy=fedavg rounds=10"`` as after ``fedsys run``,
or ``hydra-json``, a whole composed configuration of them. ``run`` is the id of the run, ``out`` its
folder and ``cwd`` where relative paths begin, where the one that submits it has chosen them.
"""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp
from omegaconf import OmegaConf

from fedsys.config import build, compose
from fedsys.console import Silent

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train over whatever clients ``grid`` connects."""
    # The client's half of the app reads the settings with this module, and needs no server.
    from fedsys.experiment import run_federation
    from fedsys.federation import assemble

    settings = context.run_config
    if cwd := str(settings.get("cwd", "")):
        os.chdir(cwd)
    typed = shlex.split(str(settings.get("overrides", "")))
    experiment = build(json.loads(composed(settings)), typed)
    if out := str(settings.get("out", "")):
        experiment = replace(experiment, out=Path(out))
    run = str(settings.get("run", "")) or f"{context.run_id:x}"
    run_federation(assemble(experiment), grid, {}, Silent(), engine="deployment", run=run)


def composed(settings: UserConfig) -> str:
    """Return the composed configuration that a run configuration gives; raises ``ConfigError``."""
    if given := str(settings.get("hydra-json", "")):
        return given
    # Not configure: every process of the run builds it, and the folder exists after the first.
    config = compose(shlex.split(str(settings.get("overrides", ""))))
    return json.dumps(OmegaConf.to_container(config))
