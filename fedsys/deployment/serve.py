"""From nothing to a finished run: a SuperLink, its devices, and a ServerApp that is followed.

The run is Flower's: its ServerApp trains and writes the run folder, in a process of its own. What
happens here can end at any time without harm to it, and is the same when it begins again.
"""

import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedsys.console import Observer, Silent
from fedsys.deployment.bundle import Bundle, bundle
from fedsys.deployment.control import RunStatus
from fedsys.deployment.following import Followed, Metrics, failures, finished
from fedsys.deployment.superlink import Devices, SuperLink
from fedsys.engines.deployment import Deployment
from fedsys.errors import ConfigError, RunError
from fedsys.locks import hold
from fedsys.run_folder import id_of, new_run_id

if TYPE_CHECKING:
    from fedsys.config import Experiment
    from fedsys.experiment import RunResult
    from fedsys.params import Params

log = logging.getLogger(__name__)

ATTEMPTS = 4  # a run is submitted again when its ServerApp was killed
_LOOK = 0.5  # seconds between two looks into the run folder
_ASK = 3.0  # seconds between two questions to the SuperLink
_SAY = 30.0  # seconds between two lines that say the same
_SILENCE = 120.0  # seconds that a SuperLink may take to come back
_GRACE = 60.0  # seconds beyond its own deadlines that a ServerApp is given
_LINES = 20  # of the log of a ServerApp that failed


@dataclass(frozen=True)
class Served:
    """What a served run leaves behind, as ``fedsys.RunResult``."""

    folder: Path
    summary: Metrics
    metrics: list[Metrics]
    experiment: "Experiment"

    @property
    def params(self) -> "Params":
        """Return the global model's trainable tensors, read from the last checkpoint."""
        from fedsys.experiment import restored

        return restored(self.experiment)[1].params


def serve(experiment: "Experiment", observer: Observer | None = None) -> "RunResult":
    """Run ``experiment`` on the devices of its server home; ``observer`` is shown how it goes.

    Of a run that is complete, only the result is shown. Raises ``ConfigError`` when the server
    cannot be started as asked, ``Busy`` when another process serves the run, and ``RunError`` when
    the run cannot go on.
    """
    told: Observer = observer or Silent()
    told.started(experiment)
    return deploy(experiment, told)


def deploy(experiment: "Experiment", told: Observer) -> "RunResult":
    """Do what ``serve`` does, for an observer that knows what has started."""
    engine = experiment.engine
    if not isinstance(engine, Deployment):
        raise ConfigError(["engine: only engine=deployment is served; others run by `fedsys run`"])
    if (known := finished(experiment.out, experiment.rounds)) is not None:
        return _shown(experiment, known, told)
    experiment.out.mkdir(parents=True, exist_ok=True)
    with hold(experiment.out / ".served.lock", f"another process serves {experiment.out}"):
        summary = _served(experiment, engine, told)
    return _shown(experiment, summary, told)


def _served(experiment: "Experiment", engine: Deployment, told: Observer) -> Metrics:
    """Run ``experiment`` on the SuperLink of its home, and return its summary."""
    app = bundle(experiment.allow)
    link = SuperLink(engine.home, engine.host, engine.port, engine.insecure)
    told.phase("starting the SuperLink")
    link.start()
    try:
        return _Run(experiment, engine, link, app, told).complete()
    finally:
        _leave(link, engine.keep)


def _shown(experiment: "Experiment", summary: Metrics, told: Observer) -> "RunResult":
    """Show the result of a run that is complete, and return it."""
    served = Served(experiment.out, summary, Followed(experiment.out).lines(), experiment)
    told.finished(served)
    return cast("RunResult", served)


class _Run:
    """One run, submitted as often as its ServerApp is killed."""

    def __init__(
        self,
        experiment: "Experiment",
        engine: Deployment,
        link: SuperLink,
        app: Bundle,
        told: Observer,
    ) -> None:
        self.experiment, self.engine, self.link, self.app = experiment, engine, link, app
        self.told = told
        self.folder = Followed(experiment.out)
        self._settings = {
            "hydra-json": json.dumps(experiment.resolved),
            "overrides": shlex.join(experiment.overrides),
            "cwd": str(Path.cwd()),
            "out": str(experiment.out.absolute()),
            "run": id_of(experiment.out) or new_run_id(),
        }
        self._said: tuple[str, float] = ("", 0.0)

    def complete(self) -> Metrics:
        """Submit and follow the run until it is complete; return its summary."""
        for attempt in range(1, ATTEMPTS + 1):
            self.folder = Followed(self.experiment.out)
            run = self._under_way() or self._submit()
            try:
                status = self._follow(run)
            except BaseException:
                self._end(run)
                raise
            summary = self.folder.summary()
            if summary is not None and summary["status"] == "completed":
                return summary
            if not _killed(status, summary):
                raise RunError(self._reason(run, status, summary))
            log.warning("the ServerApp was killed (%d of %d times)", attempt, ATTEMPTS)
        raise RunError(
            f"the ServerApp was killed {ATTEMPTS} times; is there enough memory? What it has done"
            f" is kept in {self.experiment.out}"
        )

    def _submit(self) -> int:
        self.told.phase(f"submitting the bundle {self.app.hash}")
        return self.link.submit(self.app, self._settings)

    def _under_way(self) -> int | None:
        """Return the run in this folder that an earlier ``serve`` has left; None if none is."""
        out = self._settings["out"]
        found = [run for run, folder in self.link.unfinished().items() if folder == out]
        if found:
            self.told.phase("the run is under way; following it")
        return found[0] if found else None

    def _follow(self, run: int) -> RunStatus:
        """Show the run until Flower says that it is over."""
        answered = asked = time.monotonic()
        deadline = answered + self.engine.patience + _GRACE
        while True:
            self._show()
            time.sleep(_LOOK)
            now = time.monotonic()
            if now < asked + _ASK:
                continue
            asked = now
            for kind in self.link.watch():
                log.warning("the %s had died and was started again", kind)
            try:
                status, devices = self.link.status(run), self.link.register()
            except OSError as error:
                if now > answered + _SILENCE:
                    raise RunError(
                        f"the SuperLink has not answered for {_SILENCE:.0f} s: {error}"
                    ) from error
                continue
            answered = now
            if status.finished:
                self._show()
                return status
            if not self.folder.moved:
                self._wait(status, devices, deadline - now)

    def _show(self) -> None:
        for line in self.folder.rounds():
            for client, reason in failures(line):
                self.told.failure(client, reason)
            self.told.round(line, self.experiment.rounds)

    def _wait(self, status: RunStatus, devices: Devices, left: float) -> None:
        """Say what is waited for; raises ``RunError`` when that takes too long.

        The ServerApp has deadlines of its own, and says more: this one is for when it does not.
        """
        needed = self.experiment.num_clients
        needed = min(self.engine.min_clients or needed, needed)
        short = devices.connected < needed
        text = f"{devices.connected} of the {needed} devices needed are connected"
        if left <= 0 and (short or status.status != "running"):
            raise RunError(f"{text} after {self.engine.patience:.0f} s; {_advice(devices, needed)}")
        if short:
            state = f"{text} to {self.link.address}; {_advice(devices, needed)}"
        elif status.status == "running":
            state = "all devices needed are connected; preparing the first round"
        else:
            state = "starting the ServerApp"
        self._say(state, f" (giving up in {max(0.0, left - _GRACE):.0f} s)" if short else "")

    def _say(self, state: str, more: str) -> None:
        now = time.monotonic()
        if state != self._said[0] or (more and now > self._said[1] + _SAY):
            self.told.phase(state + more)
            self._said = state, now

    def _end(self, run: int) -> None:
        """End the run, whose follower gives up; it can be gone on with from its checkpoint."""
        try:
            self.link.stop_run(run)
        except (OSError, RunError) as error:
            log.warning("the run may still be under way: %s", error)

    def _reason(self, run: int, status: RunStatus, summary: Mapping[str, Any] | None) -> str:
        if status.sub_status == "stopped":
            return "it was stopped from elsewhere"
        if summary is not None:
            return str(summary["reason"])
        try:
            written = self.link.log(run).strip().splitlines()
        except (OSError, RunError) as error:
            written = [f"(its log cannot be read: {error})"]
        return "\n".join([status.details, "the end of the ServerApp's log:", *written[-_LINES:]])


def _killed(status: RunStatus, summary: Mapping[str, Any] | None) -> bool:
    """Return whether the ServerApp ended by no decision of its own or of a user's."""
    if status.sub_status == "stopped":
        return False
    if summary is None:
        return status.lost
    # A signal, such as the one it gets when superexec, its parent, was killed.
    return str(summary["reason"]).startswith(("SystemExit", "KeyboardInterrupt"))


def _advice(devices: Devices, needed: int) -> str:
    if devices.enrolled is not None and devices.enrolled < needed:
        return f"{devices.enrolled} are enrolled: fedsys enrol NAME"
    return "on the others: fedsys join FOLDER"


def _leave(link: SuperLink, keep: bool) -> None:
    """End the SuperLink, unless it is to be kept or somebody else's run is on it."""
    try:
        others = 0 if keep else len(link.unfinished())
    except (OSError, RunError) as error:
        log.warning("the SuperLink is left running, since it does not say who needs it: %s", error)
        return
    if others:
        log.warning("%d other runs are under way: the SuperLink is left running", others)
    elif not keep:
        link.stop()
