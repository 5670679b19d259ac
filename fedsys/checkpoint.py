"""Checkpoints of a run: safetensors and JSON, written atomically, checked when read.

A checkpoint is a folder ``round_000010`` that appears by one rename. Its JSON holds a hash of all
it says and of its tensors, and the digest of the frozen factors, which are written once beside the
checkpoints. A torn or altered file is noticed and the checkpoint before it is used.
"""

import base64
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsys.arrays import TensorArray
from fedsys.errors import RunError
from fedsys.params import Params, digest
from fedsys.privacy.release import Release
from fedsys.secagg.rounds import SECAGG
from fedsys.snapshot import Snapshot

log = logging.getLogger(__name__)

ClientStates = dict[int, RecordDict]
_TENSORS, _META, _FROZEN = "tensors.safetensors", "checkpoint.json", "frozen.safetensors"
_RECORDS = {"metrics": MetricRecord, "config": ConfigRecord}


class Checkpoints:
    """The last ``keep`` checkpoints below ``folder``."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Touch nothing yet."""
        self.folder = folder
        self.keep = keep
        self._basis: str | None = None  # digest of the factors on disk, once known

    def save_frozen(self, frozen: Params) -> None:
        """Write the factors, once a run; without any there is no file."""
        self._basis = digest(frozen) if frozen else ""
        if frozen:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / (_FROZEN + ".partial")
            _write_tensors(partial, frozen)
            partial.replace(self.folder / _FROZEN)

    def save(self, snapshot: Snapshot, clients: ClientStates) -> None:
        """Write ``snapshot`` and the clients' memories.

        Raises ``OSError`` when it cannot; the checkpoints before it are then as they were.
        """
        if self._basis is None:
            self.save_frozen(snapshot.frozen)
        tensors = _tensors_of(snapshot)
        meta = {
            "round": snapshot.round,
            "params": list(snapshot.params),
            "memory": list(snapshot.memory),
            "base": list(snapshot.base),
            "moves": list(snapshot.moves),
            "shield": list(snapshot.shield),
            "version": snapshot.version,
            "basis": snapshot.basis,
            "nodes": snapshot.nodes,
            "spent": {str(c): [astuple(r) for r in spent] for c, spent in snapshot.spent.items()},
            "ledger": snapshot.anchor,
            "frozen": self._basis,
            "clients": {str(c): _pack_records(state, tensors) for c, state in clients.items()},
        }
        partial = self.folder / f".partial_{snapshot.round:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _write_tensors(partial / _TENSORS, tensors)
            meta["sha256"] = _seal(meta, partial / _TENSORS)
            _write_bytes(partial / _META, json.dumps(meta).encode())
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
            raise
        final = self.folder / f"round_{snapshot.round:06d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, like: Snapshot) -> tuple[Snapshot, ClientStates] | None:
        """Return the newest whole checkpoint in the structure of ``like``, or None.

        A damaged one is passed over for the one before it, with a warning; when all are damaged
        ``RunError`` is raised.
        """
        found = self._folders()
        for folder in reversed(found):
            try:
                return self._read(folder, like)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint %s is damaged (%s); trying the one before", folder, error)
        if found:
            raise RunError(f"no checkpoint below {self.folder} can be read; start the run again")
        return None

    def rounds(self) -> list[int]:
        """Return the rounds of the checkpoints kept, in rising order."""
        return [_round_of(folder) for folder in self._folders()]

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if re.fullmatch(r"round_\d{6,}", p.name)]
        return sorted(found, key=_round_of)

    def _read(self, folder: Path, like: Snapshot) -> tuple[Snapshot, ClientStates]:
        meta = json.loads((folder / _META).read_bytes())
        if meta.pop("sha256") != _seal(meta, folder / _TENSORS):
            raise ValueError("it does not match its hash")
        tensors = _read_tensors(folder / _TENSORS)
        params = {name: tensors[f"params/{name}"] for name in meta["params"]}
        for name, value in like.params.items():
            if params[name].shape != value.shape or params[name].dtype != value.dtype:
                raise ValueError(f"{name} is not that of this model")
        frozen = _read_tensors(self.folder / _FROZEN) if meta["frozen"] else {}
        if meta["frozen"] and digest(frozen) != meta["frozen"]:
            raise ValueError(f"{_FROZEN} is not the file it was made with")
        self._basis = meta["frozen"]
        snapshot = replace(
            like,
            round=meta["round"],
            params=params,
            state=_tree("state", like.state, tensors),
            participation=_tree("participation", like.participation, tensors),
            memory={name: tensors[f"memory/{name}"] for name in meta["memory"]},
            frozen=frozen,
            base={name: tensors[f"base/{name}"] for name in meta["base"]},
            moves={name: tensors[f"moves/{name}"] for name in meta["moves"]},
            shield={name: tensors[f"shield/{name}"] for name in meta["shield"]},
            version=meta["version"],
            basis=meta["basis"],
            informed=dict(tensors["informed"].tolist()),
            accepted=dict(tensors["accepted"].tolist()),
            nodes=meta["nodes"],
            spent={int(c): tuple(Release(*r) for r in s) for c, s in meta["spent"].items()},
            anchor=meta["ledger"],
        )
        clients = {int(c): _unpack_records(r, tensors) for c, r in meta["clients"].items()}
        return snapshot, clients


def _round_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round_"))


def _tensors_of(snapshot: Snapshot) -> Params:
    tensors = {
        f"{part}/{name}": value
        for part in ("params", "memory", "base", "moves", "shield")
        for name, value in getattr(snapshot, part).items()
    }
    tensors |= _leaves("state", snapshot.state)
    tensors |= _leaves("participation", snapshot.participation)
    for name, rounds in (("informed", snapshot.informed), ("accepted", snapshot.accepted)):
        pairs = torch.tensor(sorted(rounds.items()), dtype=torch.int64)
        tensors[name] = pairs.reshape(-1, 2)
    return tensors


def _leaves(prefix: str, tree: Any) -> Params:
    leaves = pytree.tree_leaves(tree)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{prefix} must be a tree of tensors to be written to a checkpoint")
    return {f"{prefix}/{index}": leaf for index, leaf in enumerate(leaves)}


def _tree(prefix: str, like: Any, tensors: Params) -> Any:
    leaves, spec = pytree.tree_flatten(like)
    if sum(name.startswith(f"{prefix}/") for name in tensors) != len(leaves):
        raise ValueError(f"its {prefix} has another structure")
    return pytree.tree_unflatten([tensors[f"{prefix}/{i}"] for i in range(len(leaves))], spec)


def _pack_records(content: RecordDict, tensors: Params) -> dict[str, Any]:
    """Return the records as JSON; what an array holds goes to ``tensors`` under a new name."""
    packed: dict[str, Any] = {}
    for name, record in content.items():
        if name == SECAGG:  # secrets of one round, which is over
            continue
        if isinstance(record, ArrayRecord):
            packed[name] = ["arrays", {k: _pack_array(a, tensors) for k, a in record.items()}]
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            packed[name] = [kind, {key: _pack_value(value) for key, value in record.items()}]
    return packed


def _unpack_records(packed: dict[str, Any], tensors: Params) -> RecordDict:
    content = RecordDict()
    for name, (kind, values) in packed.items():
        if kind == "arrays":
            content[name] = record = ArrayRecord()
            for key, value in values.items():
                record[key] = _unpack_array(value, tensors)
        else:
            values = {key: _unpack_value(value) for key, value in values.items()}
            content[name] = _RECORDS[kind](values)
    return content


def _pack_array(array: Array, tensors: Params) -> list[Any]:
    """Keep a tensor as a tensor, and an array of anybody else's byte for byte."""
    place = f"array/{len(tensors)}"
    if isinstance(array, TensorArray):
        tensors[place] = array.tensor
        return [place]
    tensors[place] = torch.frombuffer(bytearray(array.data) or bytearray(1), dtype=torch.uint8)
    return [place, len(array.data), array.dtype, list(array.shape), array.stype]


def _unpack_array(packed: list[Any], tensors: Params) -> Array:
    place, *rest = packed
    if not rest:
        return TensorArray(tensors[place])
    size, dtype, shape, stype = rest
    return Array(dtype, tuple(shape), stype, tensors[place].numpy().tobytes()[:size])


def _pack_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    return [_pack_value(item) for item in value] if isinstance(value, list) else value


def _unpack_value(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"])
    return [_unpack_value(item) for item in value] if isinstance(value, list) else value


def _write_tensors(path: Path, tensors: Params) -> None:
    # safetensors refuses tensors that share memory, as views of one packed vector do.
    own = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    try:
        save_file(own, path)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> Params:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _seal(meta: dict[str, Any], tensors: Path) -> str:
    """Return the hash of what a checkpoint says and of its tensors."""
    with tensors.open("rb") as file:
        state = hashlib.file_digest(file, "sha256")
    state.update(json.dumps(meta, sort_keys=True).encode())
    return state.hexdigest()
