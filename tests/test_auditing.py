"""Audits of whole runs: what is kept of them, what is found in it, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clients.private
import fedsys
from fedsys.attacks import SignFlip
from fedsys.auditing import audit_run
from fedsys.console import Silent
from fedsys.data import LeastSquares, Quadratic
from fedsys.errors import ConfigError, RunError
from fedsys.experiment import restored, saved_experiment
from fedsys.federation import assemble
from fedsys.main import main
from fedsys.params import Layout, Params, norm
from fedsys.privacy import client_conflicts, sample_conflicts
from fedsys.privacy.canary_clients import CanaryClients
from fedsys.privacy.client_level import ClientPrivacy
from fedsys.privacy.observed import Observed
from fedsys.update import Update
from strategies import FRL, FedExLoRA, FLoRA
from tests.runs import experiment_of
from tests.test_client_level import privacy as client_privacy

# A canary is in 6.4 of the 25 lots of its client, on average.
ROWS = (
    "num_clients=20",
    "rounds=4",
    "participation.cohort=20",
    "adapter.init=seeded_random",
    "client.optimizer=sgd",
    "client.lr=0.5",
    "client.batch_size=16",
    "client.steps=8",
    "privacy=sample",
    "privacy.canaries=200",
    "privacy.allow_unprotected_initialisation=true",  # the base has seen the clients' digits
    "data.public_fraction=0",
    "privacy.delta=1e-5",
    "privacy.reproducible=true",
    "evaluate.every=0",
    "engine.threads=1",
)
# 10 clients and 500 canaries, all in every round: three steps of the Gaussian mechanism.
CLIENTS = (
    "num_clients=10",
    "rounds=3",
    "participation.cohort=null",
    "strategy=fedavg",
    "strategy.weighting=uniform",
    "client.optimizer=sgd",
    "client.lr=0.1",
    "client.steps=1",
    "privacy=client",
    "privacy.canaries=500",
    "data.public_fraction=0.1",
    "privacy.delta=1e-5",
    "privacy.reproducible=true",
    "evaluate.every=0",
    "engine.threads=1",
)
SAID = {
    "claimed", "measured", "method", "confidence", "canaries", "guesses", "correct", "delta",
}  # fmt: skip


def run(out: Path, settings: tuple[str, ...], *more: str, observer: Any = None) -> Path:
    return fedsys.run([*settings, f"out={out}", *more], observer).folder


def audited(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Return the exit code of ``fedsys audit``, what it wrote and what it showed."""
    code = main(["audit", str(folder)])
    said = json.loads((folder / "audit.json").read_text())
    assert json.loads((folder / "summary.json").read_text())["audit"] == said
    return code, said, capsys.readouterr().out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "audit").iterdir()}


def silent(totals: Tensor, stds: Any, streams: Any) -> Tensor:
    """Return what ``noised_rows`` would, had somebody forgotten the noise."""
    return totals.double()


# ---- Rows


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_partition", "plot_participation"):
        monkeypatch.setattr(fedsys.experiment, name, lambda *_: None)


@pytest.fixture(scope="module")
def noiseless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("rows") / "out", ROWS, "privacy.epsilon=inf")


def test_without_noise_the_canaries_are_found(
    noiseless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, shown = audited(noiseless, capsys)
    assert said.keys() == SAID
    assert (said["claimed"], said["canaries"], said["guesses"]) == ("inf", 200, 100)
    assert said["measured"] > 2
    assert code == 0
    assert "not refuted" in shown


def test_a_run_whose_noise_was_forgotten_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clients.private, "noised_rows", silent)
    folder = run(tmp_path / "out", ROWS, "privacy.epsilon=1")
    code, said, shown = audited(folder, capsys)
    assert 0 < said["claimed"] <= 1 < 2 < said["measured"]
    assert code == 1
    assert "the claim is refuted" in shown


def test_with_noise_the_bound_is_below_the_claim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = audited(run(tmp_path / "out", ROWS, "privacy.epsilon=3"), capsys)
    assert 2.9 < said["claimed"] <= 3
    assert said["measured"] <= said["claimed"]
    assert code == 0


def test_what_is_kept_of_a_round_is_what_the_server_averaged(noiseless: Path) -> None:
    federation, last = restored(saved_experiment(noiseless))
    pack = federation.model.layout.pack
    place = federation.model.initial
    assert sorted(files(noiseless)) == [f"round_{t:06d}.safetensors" for t in range(1, 5)]
    for round in range(1, 5):
        kept = load_file(noiseless / "audit" / f"round_{round:06d}.safetensors")
        assert kept["moves"].dtype == torch.float32
        assert kept["moves"].shape == (20, len(place))
        assert kept["clients"].tolist() == list(range(20))
        assert torch.allclose(kept["start"], place, atol=1e-6)
        place = kept["start"] + kept["moves"].mean(0)
        assert kept["moves"].any()
    assert torch.allclose(pack(last.params), place, atol=1e-6)


def test_everything_sees_the_planted_rows(noiseless: Path) -> None:
    federation = assemble(saved_experiment(noiseless))
    planted = federation.planted
    assert planted is not None
    out = planted.rows[~planted.coins]
    site = federation.site
    assert site.examples is planted.dataset.train
    assert not any(torch.isin(site.shards.rows(n), out).any() for n in range(20))
    told = json.loads((noiseless / "partition.json").read_text())
    assert told["examples"]["total"] == planted.shards.sizes().sum() == 1438 - len(out)


class Interrupting(Silent):
    """Stops a run in round 4, as Ctrl-C does."""

    def round(self, record: Any, total: int) -> None:
        if record["round"] == 4:
            raise KeyboardInterrupt


def test_a_resumed_run_has_kept_the_same(tmp_path: Path) -> None:
    settings = (*ROWS, "num_clients=4", "participation.cohort=null", "rounds=5", "client.steps=1")
    settings += ("data.limit=200", "model.pretrained=false", "privacy.canaries=40")
    settings += ("privacy.noise_multiplier=1", "checkpoint.every=2")
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", settings, observer=Interrupting())
    parts = tmp_path / "parts"
    assert len(files(parts)) == 3  # of which the checkpoint knows 2
    torn = parts / "audit" / "round_000003.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(RunError, match="resume"):
        audit_run(parts)
    fedsys.resume(parts)
    assert files(parts) == files(whole)
    assert audit_run(parts) == audit_run(whole)


def test_a_run_without_canaries_cannot_be_audited(tmp_path: Path) -> None:
    experiment = experiment_of()
    (tmp_path / "config.yaml").write_text(json.dumps({**experiment.resolved, "out": "/nowhere"}))
    with pytest.raises(ConfigError, match=r"privacy\.canaries=200"):
        audit_run(tmp_path)
    assert main(["audit", str(tmp_path / "elsewhere")]) == 2


# ---- What is kept


LAYOUT = Layout.of({"w": torch.zeros(2), "b": torch.zeros(1)})


def params(*numbers: float) -> Params:
    return LAYOUT.unpack(torch.tensor(numbers))


def keep(folder: Path, rounds: dict[int, dict[int, Params]]) -> Observed:
    observed = Observed(folder, LAYOUT)
    for round, deltas in rounds.items():
        updates = [Update(n, delta, 1) for n, delta in deltas.items()]
        assert list(observed.watch(params(round, 0, 0), iter(updates))) == updates
        observed.write(round)
    return observed


def test_what_was_watched_is_read_again(tmp_path: Path) -> None:
    first = {0: params(1, 2, 3), 7: params(4, 5, 6)}
    observed = keep(tmp_path, {1: first, 2: {}, 3: {7: params(0, 0, 1)}})
    assert len(list(tmp_path.iterdir())) == 2  # nothing of a round without updates, nothing partial
    seen, last = observed.read({1: [0, 7], 2: [], 3: [7]})
    assert seen.start.tolist() == [1, 0, 0]
    assert {n: move.tolist() for n, move in seen.moves.items()} == {0: [1, 2, 3], 7: [4, 5, 6]}
    assert last.moves[7].tolist() == [0, 0, 1]
    observed.keep(1)
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.safetensors"]


def test_a_round_watched_twice_is_that_of_the_second_time(tmp_path: Path) -> None:
    observed = Observed(tmp_path, LAYOUT)
    list(observed.watch(params(0, 0, 0), iter([Update(1, params(1, 1, 1), 1)])))
    list(observed.watch(params(0, 0, 0), iter([Update(2, params(2, 2, 2), 1)])))
    observed.write(1)
    (seen,) = observed.read({1: [2]})
    assert seen.moves.keys() == {2}


def delete(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "attended", "message"),
    [
        (delete, [3], "sent in round 1 cannot be read"),
        (tear, [3], "sent in round 1 cannot be read"),
        (nothing, [3, 4], "not of the clients that took part"),
    ],
)
def test_a_round_that_is_not_whole_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], attended: list[int], message: str
) -> None:
    observed = keep(tmp_path, {1: {3: params(1, 2, 3)}})
    spoil(tmp_path / "round_000001.safetensors")
    with pytest.raises(RunError, match=message):
        list(observed.read({1: attended}))


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file, and no folder")
    with pytest.raises(RunError, match="cannot be written"):
        keep(tmp_path / "audit", {1: {3: params(1, 2, 3)}})


# ---- Clients


def canaries(**changed: Any) -> CanaryClients:
    settings = {"count": 50, "rate": 0.5, "clipping_norm": 2.0, "seed": 0}
    return CanaryClients(**{**settings, **changed})


SHAPES = {"w": torch.zeros(40, 50), "b": torch.zeros(48, dtype=torch.float64)}


def test_directions_are_of_norm_1_and_nearly_orthogonal() -> None:
    planted = canaries()
    found = [planted.direction(n, SHAPES) for n in range(50)]
    flat = torch.stack([torch.cat([v.flatten() for v in each.values()]) for each in found])
    products = flat @ flat.T
    assert torch.allclose(products.diagonal(), torch.ones(50, dtype=torch.float64))
    # A cosine of random directions has variance 1 / d: here 1,225 of them.
    others = products[~torch.eye(50, dtype=torch.bool)]
    assert others.square().mean().item() == pytest.approx(1 / 2048, rel=0.2)
    assert flat.mean().abs().item() < 4 / math.sqrt(50) / 2048


def test_each_sends_the_most_it_may_in_the_rounds_that_its_coin_says() -> None:
    planted = canaries()
    rounds = range(1, 101)
    counts = torch.tensor([n for t in rounds for n in planted.present(t)]).bincount(minlength=50)
    assert counts.sum().item() == pytest.approx(2500, abs=4 * math.sqrt(1250))
    assert counts.min() > 20
    sent = list(planted.updates(SHAPES, 1))
    assert [-1 - update.client for update in sent] == planted.present(1)
    assert all(norm(update.delta) == pytest.approx(2.0) for update in sent)
    assert canaries(rate=1.0).present(1) == list(range(50))


def test_cosines_are_of_those_that_took_part() -> None:
    planted = canaries(rate=0.02)
    moved = {n: 3 * value for n, value in planted.direction(planted.present(1)[0], SHAPES).items()}
    there = sorted({*planted.present(1), *planted.present(2)})
    assert 0 < len(there) < 50
    found = planted.cosines(moved, 2)
    assert len(found) == len(there)
    assert found[there.index(planted.present(1)[0])].item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not moved"):
        planted.cosines(SHAPES, 2)


def test_they_count_as_clients_of_the_cohort(tmp_path: Path) -> None:
    account = assemble(
        experiment_of(*CLIENTS[2:], "privacy.epsilon=inf", "checkpoint.every=1")
    ).strategy.account
    account.enter.ledger = SimpleNamespace(append=lambda entries: None, find=lambda *release: False)
    moved, _, costs = account.merge([], SHAPES, {}, range(5), 1)
    total = [account.canaries.direction(n, SHAPES) for n in range(500)]
    assert account.expected_cohort == 505
    for name, value in moved.items():
        expected = torch.stack([each[name] for each in total]).sum(0) / 505
        assert torch.allclose(value, expected, atol=1e-12)
    assert costs.keys() == set(range(5))


def test_the_estimate_of_the_gaussian_mechanism_is_near_its_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "out", CLIENTS, "privacy.epsilon=3")
    code, said, shown = audited(folder, capsys)
    assert said.keys() == SAID
    # Of 500 cosines the std is known to 3 %, and as much, either way, is a fifth of this epsilon.
    assert said["measured"] == pytest.approx(said["claimed"], rel=0.3)
    assert (said["confidence"], said["canaries"], code) == (None, 500, 0)
    assert "no bound" in shown


@pytest.mark.slow
def test_without_noise_the_estimate_says_so_and_counts_from_the_first_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # R begins at the singular values here, far from 0.
    more = ("adapter=lora_sb", "adapter.init=public", "adapter.start=singular")
    more += ("strategy=fed_sb", "data.public_fraction=0.1", "privacy.canaries=20")
    folder = run(tmp_path / "out", CLIENTS, *more, "privacy.epsilon=inf", "adapter.init_lr=1")
    code, said, _ = audited(folder, capsys)
    assert said["measured"] > 5
    assert code == 0


# ---- Refusals


def sample_reasons(**parts: Any) -> list[str]:
    allowed = {
        "privacy": SimpleNamespace(canaries=200, allow_unprotected_initialisation=False),
        "client": None,
        "evaluate": None,
        "adapter": None,
        "strategy": None,
        "data": None,
        "partition": None,
        "participation": None,
        "attack": None,
        "secagg": None,
        "checkpoint": SimpleNamespace(every=1),
    }
    return sample_conflicts.refusals(SimpleNamespace(**{**allowed, **parts}))


QUADRATIC = Quadratic.__new__(Quadratic)
LEAST_SQUARES = LeastSquares.__new__(LeastSquares)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"strategy": FRL()}, "strategy=frl: clients send rankings"),
        ({"strategy": FedExLoRA()}, "strategy=fedex_lora: the frozen base moves"),
        ({"strategy": FLoRA()}, "strategy=flora: the frozen base moves"),
        ({"data": QUADRATIC}, "data=quadratic: its rows have vectors to hit"),
        ({"data": LEAST_SQUARES}, "data=least_squares: its rows have vectors to hit"),
        ({"attack": SignFlip(fraction=0.2, factor=1.0)}, "an attack: epsilon is a promise"),
        ({"secagg": object()}, "secagg=true: the audit reads what each client sends"),
        ({"checkpoint": SimpleNamespace(every=0)}, "checkpoint.every=0: the audit starts from"),
    ],
)
def test_what_would_make_the_audit_meaningless_is_refused(parts: Any, words: str) -> None:
    assert sample_reasons() == []
    (reason,) = sample_reasons(**parts)
    assert reason.startswith(f"privacy.canaries=200 with {words}")
    off = SimpleNamespace(canaries=None, allow_unprotected_initialisation=False)
    assert sample_reasons(**parts, privacy=off) == []


def test_canary_clients_need_checkpoints() -> None:
    experiment = SimpleNamespace(
        privacy=client_privacy(canaries=20),
        checkpoint=SimpleNamespace(every=0),
        num_clients=100,
        **dict.fromkeys(
            ["strategy", "adapter", "participation", "compression", "defence", "secagg", "evaluate"]
        ),
        on_client_error="skip",
    )
    (reason,) = client_conflicts.refusals(experiment, lambda group: group)
    assert "checkpoint.every=0" in reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"canaries": 1}, "at least 2"),
        ({"canaries": 5, "quantile": 0.5}, "quantile=null"),
        (
            {"canaries": 5, "clipping_norm": math.inf, "epsilon": math.inf},
            "finite privacy.clipping_norm",
        ),
    ],
)
def test_canary_clients_without_a_length_are_refused(changed: Any, words: str) -> None:
    if changed.get("epsilon"):
        changed = {**changed, "noise_multiplier": None}
    with pytest.raises(ValueError, match=words):
        client_privacy(**changed)
    assert isinstance(client_privacy(canaries=5), ClientPrivacy)


def test_too_many_or_no_canaries_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"privacy.*canaries must be at least 1"):
        experiment_of(*ROWS, "privacy.canaries=0", "privacy.epsilon=3")
    small = ("participation.cohort=5", "privacy.epsilon=3", "checkpoint.every=1")
    experiment = experiment_of(*ROWS[3:], *small)
    with pytest.raises(ConfigError, match=r"privacy\.canaries=200 is too many"):
        assemble(experiment)
