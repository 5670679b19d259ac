"""What a run is that a device takes part in, and how one is refused.

Private names of Flower's bundles and runs are in this file only.
"""

import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple, Self

from flwr.app import Metadata
from flwr.common.config import get_fab_config, get_fused_config_from_fab, get_metadata_from_config
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run

from fedsys.deployment.policy import Policy

log = logging.getLogger(__name__)

_LONGEST = 500  # characters of a reason, which is all that a server reads


class Refused(Exception):
    """What is asked for is not allowed; ``str`` is what the server is told."""

    def __init__(self, reasons: list[str], code: int = ErrorCode.MOD_FAILED_PRECONDITION) -> None:
        self.code = code
        super().__init__(f"policy: {'; '.join(reasons)}"[:_LONGEST])


@dataclass(frozen=True)
class Terms:
    """What a run is: its code and its settings, which stay as they were when it was let in."""

    run: str  # its id, as in the ledger
    code: str  # SHA-256
    bundled: tuple[str, ...]  # top-level modules
    settings: Mapping[str, Any]

    def reasons(self, policy: Policy) -> list[str]:
        """Return why ``policy`` does not let it run."""
        return policy.of_run(self.code, self.settings, self.bundled)


class Mark(NamedTuple):
    """What a message is to be told by."""

    message_id: str
    kind: str  # its type
    group: str  # the round

    @classmethod
    def of(cls, metadata: Metadata) -> Self:
        """Return the mark of the message that ``metadata`` is of."""
        return cls(metadata.message_id, metadata.message_type, metadata.group_id)


def terms_of(run: Run, content: bytes, code: str) -> Terms:
    """Return the terms of a run; raises ``Refused`` where it does not say what it is."""
    config = get_fab_config(content)
    if code != run.fab_hash or (run.fab_id, run.fab_version) != get_metadata_from_config(config):
        # By these names the code is stored and loaded.
        raise Refused(["the run calls its code other than the bundle does"], ErrorCode.INVALID_FAB)
    if run.primary_task_type == TaskType.AGENT_APP:
        raise Refused(["agents do not run on this device"])
    told = get_fused_config_from_fab(content, run)
    text = told.get("hydra-json")
    settings = json.loads(text) if isinstance(text, str) and text else None
    if not isinstance(settings, dict):
        raise Refused(["the run does not give its whole settings, as hydra-json"])
    with zipfile.ZipFile(BytesIO(content)) as archive:
        sources = {name for name in archive.namelist() if name.endswith(".py")}
    bundled = {name.partition("/")[0].removesuffix(".py") for name in sources}
    name = str(told.get("run", "")) or f"{run.run_id:x}"
    return Terms(name, code, tuple(sorted(bundled)), settings)


def of_rows(settings: Mapping[str, Any], own: bool) -> list[str]:
    """Return why a run may not read what it names; ``own``: the device has named its rows itself.

    Which file is read is up to the operator alone.
    """
    data, partition = settings.get("data"), settings.get("partition")
    target = str(partition.get("_target_")) if isinstance(partition, Mapping) else ""
    apart = target.rpartition(".")[2] == "OnDevices"
    if own:
        only = "this device trains on its own rows only: the run needs partition=on_devices"
        return [] if apart else [only]
    if apart:
        return ["this device has named no rows of its own: data in device.yaml"]
    files = [key for key in ("path", "eval_path") if isinstance(data, Mapping) and data.get(key)]
    return [f"the run names files of this device, as data.{key}" for key in files]


@contextmanager
def closed() -> Iterator[None]:
    """Refuse what cannot be judged."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        log.exception("a judgement failed")
        raise Refused(["it cannot be judged"]) from error
