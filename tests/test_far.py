"""Clients of other processes, each of which has only just started, train as those of this one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from clients.frozen import Frozen, FrozenStore
from fedsys import experiment as experiments
from fedsys import far
from fedsys.config import Experiment
from fedsys.console import Silent
from fedsys.engines.local import LocalGrid
from fedsys.errors import RunError
from fedsys.experiment import run_experiment, run_federation
from fedsys.far import FarClients, Place
from fedsys.federation import assemble
from fedsys.params import digest
from fedsys.privacy.ledger import read
from tests.runs import Scattered, comparable, experiment_of, federation_of, same

RUN = "c0ffee"
SMALL = ("adapter.rank=4",)  # no layer holds more
THREE = ("num_clients=3", "rounds=3", "checkpoint.every=1", "participation.cohort=2")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_report", "_describe_partition", "_describe_participation"):
        monkeypatch.setattr(experiments, name, lambda *_: None)


def alone(context: Context, experiment: Experiment, home: Path) -> Place:
    """Return the place of a device, whose process has loaded nothing yet."""
    far._federation.cache_clear()
    own = home / str(context.node_config["partition-id"])
    return Place(RUN, own / "runs" / RUN, own / "ledger")


def run_elsewhere(experiment: Experiment, home: Path, clients: FarClients | None = None) -> Any:
    settings = json.dumps(experiment.resolved, default=str)
    clients = clients or FarClients(lambda _: settings, lambda c: alone(c, experiment, home))
    nodes = {40 - n * 7: n for n in range(experiment.num_clients)}  # not in order of clients
    grid = Scattered(clients.app(), nodes)
    return run_federation(assemble(experiment), grid, {}, Silent(), engine="ray", run=RUN)


@pytest.mark.parametrize(
    "overrides",
    [
        SMALL,
        (*SMALL, "adapter.init=seeded_random"),
        ("strategy=fedau", "participation=bernoulli", "participation.rate=0.7"),
        ("strategy=frl",),
        ("strategy=econtrol", "compression=topk_econtrol"),
        ("strategy=fedex_lora", "adapter.rank=2"),
        ("strategy=mifa", "adapter=full"),
        (*SMALL, "secagg=true", "participation.cohort=3"),
        (*SMALL, "privacy=sample", "privacy.epsilon=5", "privacy.reproducible=true"),
    ],
    ids=" ".join,
)
def test_a_process_a_message_trains_to_the_same_bits(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    experiment = experiment_of(
        *THREE[: 3 if "participation=bernoulli" in overrides else 4], *overrides
    )
    here = run_experiment(replace(experiment, out=tmp_path / "here"))
    there = run_elsewhere(replace(experiment, out=tmp_path / "there"), tmp_path / "homes")
    assert same(here.params, there.params)
    assert comparable(here.metrics) == comparable(there.metrics)
    assert there.summary["engine"] == "ray"


def test_every_private_client_keeps_a_ledger_of_its_own(tmp_path: Path) -> None:
    overrides = (*SMALL, "privacy=sample", "privacy.epsilon=5", "participation.cohort=3")
    experiment = replace(experiment_of(*THREE, *overrides), out=tmp_path / "run")
    result = run_elsewhere(experiment, tmp_path / "homes")
    for client in range(3):
        entries = read(tmp_path / "homes" / str(client) / "ledger")
        assert {entry.round for entry in entries} == {1, 2, 3}
        assert {entry.run for entry in entries} == {RUN}
    assert not (experiment.out / "ledger").exists()
    assert 4.9 < result.summary["epsilon"] <= 5


def test_a_client_that_lost_its_disk_is_sent_the_factors_again(tmp_path: Path) -> None:
    experiment = replace(
        experiment_of("num_clients=2", "participation.cohort=2", "rounds=4", *SMALL),
        out=tmp_path / "run",
    )
    settings, lost = json.dumps(experiment.resolved, default=str), list[int]()

    def place(context: Context) -> Place:
        lost.append(int(context.node_config["partition-id"]))
        # Client 1 has a new disk for its third message, which is that of round 2.
        fresh = lost.count(1) >= 3 and lost[-1] == 1
        return alone(context, experiment, tmp_path / ("new" if fresh else "old"))

    result = run_elsewhere(experiment, tmp_path, FarClients(lambda _: settings, place))
    assert [line["failures"] for line in result.metrics] == [0, 0, 1, 0, 0]
    assert "frozen factors" in result.metrics[2]["reasons"][0]


def test_a_device_has_one_budget_whatever_a_run_calls_its_rows(tmp_path: Path) -> None:
    overrides = (*SMALL, "privacy=sample", "privacy.epsilon=5", "participation.cohort=3")
    for number, words in enumerate([(), ("seed=1", "partition=contiguous")]):
        experiment = replace(experiment_of(*THREE, *overrides, *words), out=tmp_path / str(number))
        settings = json.dumps(experiment.resolved, default=str)

        def place(context: Context, experiment: Experiment = experiment) -> Place:
            own = alone(context, experiment, tmp_path / "homes")
            return replace(own, owner="this device")

        clients = FarClients(lambda _, settings=settings: settings, place)  # type: ignore[misc]
        if number == 0:
            run_elsewhere(experiment, tmp_path, clients)
        else:
            with pytest.raises(RunError, match="PrivacyBudgetExceeded"):
                run_elsewhere(experiment, tmp_path, clients)
    entries = read(tmp_path / "homes" / "0" / "ledger")
    assert {entry.client for entry in entries} == {"this device"}


@pytest.mark.parametrize("basis", ["./../../outside", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_a_basis_names_no_file_elsewhere(tmp_path: Path, basis: str) -> None:
    site = federation_of(tmp_path, *SMALL).site
    site.frozen = FrozenStore(tmp_path / "frozen")
    content = RecordDict({"config": ConfigRecord({"basis": basis}), "base": ArrayRecord()})
    with pytest.raises(ValueError, match="a basis is a digest"):
        site.load(content)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_roll_call_loads_nothing() -> None:
    def refuse(_: Context) -> Any:
        raise AssertionError("asked for settings or a place")

    grid = LocalGrid(FarClients(refuse, refuse).app(), 5)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 6, "query.whoami")])
    assert reply.content["metrics"]["partition-id"] == 4


def test_frozen_tensors_come_back_to_the_bit_and_old_ones_go(tmp_path: Path) -> None:
    store = FrozenStore(tmp_path / "frozen")
    assert store.get("a") is None
    assert store.newest() is None
    tensors = [{"w": torch.randn(3, 4), "v": torch.randn(2, dtype=torch.float64)} for _ in "abc"]
    for name, kept in zip("abc", tensors, strict=True):
        store.put(Frozen(name, name == "c", kept))
    assert store.get("a") is None, "two are kept"
    for name, kept in zip("bc", tensors[1:], strict=True):
        found = store.get(name)
        assert found is not None
        assert digest(found.tensors) == digest(kept)
        assert found.is_base == (name == "c")
    newest = store.newest()
    assert newest is not None
    assert newest.basis == "c"


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    store = FrozenStore(tmp_path)
    store.put(Frozen("a", False, {"w": torch.ones(3)}))
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.get("a") is None


class Forbidding(Scattered):
    """Two of three devices do not take part, and say so."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        refusal = Error(5, "policy: privacy is sample at least, and the run has none")
        for message, reply in zip(messages, super().send_and_receive(messages), strict=True):
            refused = message.metadata.dst_node_id > 26
            yield Message(refusal, reply_to=message) if refused else reply


def test_devices_whose_policy_forbids_the_run_end_it_at_once(tmp_path: Path) -> None:
    experiment = replace(experiment_of(*THREE, *SMALL), out=tmp_path / "run")
    settings = json.dumps(experiment.resolved, default=str)
    clients = FarClients(lambda _: settings, lambda c: alone(c, experiment, tmp_path))
    grid = Forbidding(clients.app(), {40 - n * 7: n for n in range(3)})
    with pytest.raises(RunError, match="3 clients needed 1 take part; 2 of them: policy: privacy"):
        run_federation(assemble(experiment), grid, {}, Silent(), engine="ray", run=RUN)
