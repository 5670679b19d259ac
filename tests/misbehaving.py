"""Clients that do wrong when a test tells them to: a run names this module by ``allow``.

In round N a client reads the word in the file N of the folder ``$MISBEHAVE``, if there is one:

nothing, raise, hang, die   it does so instead of training
wait                        it trains once the file has gone
hold                        it trains at once, and answers once the file has gone

``N.there`` says that it has come to where it does so.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients import LocalTraining
from clients.app import CohortApp, round_of

FOLDER = os.environ.get("MISBEHAVE")


@dataclass(frozen=True)
class Training(LocalTraining):
    """Training as any other: a run that names it has this module imported."""


def misbehaving(train: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Return ``CohortApp.train_cohort`` with what ``folder`` says."""

    def train_cohort(self: CohortApp, messages: list[Any], contexts: list[Any]) -> Any:
        file = folder / str(round_of(messages[0]))
        word = file.read_text() if file.exists() else ""
        replies = train(self, messages, contexts) if word == "hold" else [None]
        if word not in ("wait", "hold"):
            file.unlink(missing_ok=True)
        file.with_suffix(".there").touch()
        match word:
            case "nothing":
                return [None]
            case "raise":
                raise RuntimeError("the rows have gone")
            case "hang":
                time.sleep(3600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        while file.exists():
            time.sleep(0.05)
        return replies if word == "hold" else train(self, messages, contexts)

    return train_cohort


if FOLDER is not None:
    CohortApp.train_cohort = misbehaving(CohortApp.train_cohort, Path(FOLDER))  # type: ignore[method-assign]
