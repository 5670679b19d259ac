"""Checkpoints of a run: safetensors and JSON, written atomically, checked when read.

A checkpoint is a folder ``round_000010`` that appears by one rename. Its JSON holds the hash of its
tensors, so that a torn or altered file is noticed and the checkpoint before it is used.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsys.errors import RunError
from fedsys.messages import TensorArray, tensor_of
from fedsys.params import Params
from fedsys.snapshot import Snapshot

log = logging.getLogger(__name__)

ClientStates = dict[int, RecordDict]
_TENSORS, _META, _FROZEN = "tensors.safetensors", "checkpoint.json", "frozen.safetensors"


class Checkpoints:
    """The last ``keep`` checkpoints below ``folder``."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save_frozen(self, frozen: Params) -> None:
        """Write the factors, once a run; without any there is no file."""
        if frozen:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / (_FROZEN + ".partial")
            _write_tensors(partial, frozen)
            partial.replace(self.folder / _FROZEN)

    def save(self, snapshot: Snapshot, clients: ClientStates) -> None:
        """Write ``snapshot`` and the clients' memories; raises ``OSError`` when it cannot."""
        tensors: Params = {f"params/{name}": value for name, value in snapshot.params.items()}
        tensors |= _leaves("state", snapshot.state)
        tensors |= _leaves("participation", snapshot.participation)
        tensors["informed"] = torch.tensor(sorted(snapshot.informed), dtype=torch.int64)
        values: dict[str, Any] = {}
        for client, state in clients.items():
            _split_records(f"client/{client}", state, tensors, values)
        partial = self.folder / f".partial_{snapshot.round:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tensors(partial / _TENSORS, tensors)
        meta = {"round": snapshot.round, "sha256": _hash(partial / _TENSORS), "values": values}
        _write_bytes(partial / _META, json.dumps(meta).encode())
        final = self.folder / f"round_{snapshot.round:06d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._rounds()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, like: Snapshot) -> tuple[Snapshot, ClientStates] | None:
        """Return the newest whole checkpoint in the structure of ``like``, or None.

        A damaged one is passed over for the one before it, with a warning; when all are damaged
        ``RunError`` is raised.
        """
        found = self._rounds()
        for folder in reversed(found):
            try:
                return self._read(folder, like)
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is damaged (%s); trying the one before", folder, error)
        if found:
            raise RunError(f"no checkpoint below {self.folder} can be read; start the run again")
        return None

    def _rounds(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if re.fullmatch(r"round_\d{6,}", p.name))

    def _read(self, folder: Path, like: Snapshot) -> tuple[Snapshot, ClientStates]:
        meta = json.loads((folder / _META).read_bytes())
        if _hash(folder / _TENSORS) != meta["sha256"]:
            raise ValueError("its tensors do not match their hash")
        tensors = _read_tensors(folder / _TENSORS)
        frozen = self.folder / _FROZEN
        snapshot = replace(
            like,
            round=meta["round"],
            params={name: tensors[f"params/{name}"] for name in like.params},
            state=_tree("state", like.state, tensors),
            participation=_tree("participation", like.participation, tensors),
            frozen=_read_tensors(frozen) if frozen.exists() else {},
            informed=set(tensors["informed"].tolist()),
        )
        return snapshot, _join_records(tensors, meta["values"])


def _leaves(prefix: str, tree: Any) -> Params:
    leaves = pytree.tree_leaves(tree)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{prefix} must be a tree of tensors to be written to a checkpoint")
    return {f"{prefix}/{index}": leaf for index, leaf in enumerate(leaves)}


def _tree(prefix: str, like: Any, tensors: Params) -> Any:
    leaves, spec = pytree.tree_flatten(like)
    return pytree.tree_unflatten([tensors[f"{prefix}/{i}"] for i in range(len(leaves))], spec)


def _split_records(
    prefix: str, content: RecordDict, tensors: Params, values: dict[str, Any]
) -> None:
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            values[f"{prefix}/{name}"] = ["arrays", list(record)]
            for key, array in record.items():
                tensors[f"{prefix}/{name}/{key}"] = tensor_of(array)
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            values[f"{prefix}/{name}"] = [kind, dict(record)]


def _join_records(tensors: Params, values: dict[str, Any]) -> ClientStates:
    states: ClientStates = {}
    for path, (kind, value) in values.items():
        _, client, name = path.split("/", 2)
        state = states.setdefault(int(client), RecordDict())
        if kind == "arrays":
            record = ArrayRecord()
            for key in value:
                record[key] = TensorArray(tensors[f"{path}/{key}"])
            state[name] = record
        else:
            state[name] = MetricRecord(value) if kind == "metrics" else ConfigRecord(value)
    return states


def _write_tensors(path: Path, tensors: Params) -> None:
    # safetensors refuses tensors that share memory, as views of one packed vector do.
    save_file({name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> Params:
    try:
        return dict(load_file(path))
    except Exception as error:
        # safetensors raises its own type, which is no subclass of ValueError.
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
