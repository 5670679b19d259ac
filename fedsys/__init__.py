"""fedsys: fine-tune one model across many clients that never share their data.

import fedsys

result = fedsys.run(["strategy=fed_sb", "num_clients=100"])
result.summary["final"]["eval_accuracy"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsys.errors import ClientFailure, ConfigError, DataError, RunError
    from fedsys.experiment import RunResult, export, resume, run
    from fedsys.params import Params
    from fedsys.strategy import Strategy
    from fedsys.update import Update

__all__ = [
    "ClientFailure",
    "ConfigError",
    "DataError",
    "Params",
    "RunError",
    "RunResult",
    "Strategy",
    "Update",
    "export",
    "resume",
    "run",
]

_HOME = {
    "ClientFailure": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Params": "params",
    "RunError": "errors",
    "RunResult": "experiment",
    "Strategy": "strategy",
    "Update": "update",
    "export": "experiment",
    "resume": "experiment",
    "run": "experiment",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a mistake in a configuration is told before torch is loaded.
    if name not in _HOME:
        raise AttributeError(f"module 'fedsys' has no attribute {name!r}")
    return getattr(import_module(f"fedsys.{_HOME[name]}"), name)
