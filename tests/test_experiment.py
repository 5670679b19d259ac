"""Whole runs as a user starts them, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import clients.cohort
import fedsys
from fedsys.checkpoint import Checkpoints
from fedsys.chunks import chunk_size
from fedsys.federation import assemble

SMALL = ["num_clients=10", "rounds=3", "client.epochs=1", "engine.threads=1", "data.limit=400"]
METRICS = {
    "round", "clients", "failures", "train_loss", "eval_loss", "eval_accuracy", "bytes_up",
    "bytes_down", "seconds", "epsilon",
}  # fmt: skip
SUMMARY = {
    "status", "final", "best", "rounds", "bytes_up", "bytes_down", "bytes_init", "seconds",
    "seconds_per_round", "peak_memory_mb", "trainable_parameters", "epsilon", "delta", "seed",
    "engine", "client_updates_per_second",
}  # fmt: skip


def start(out: Path, *overrides: str) -> fedsys.RunResult:
    return fedsys.run([*SMALL, f"out={out}", *overrides])


def same_bits(a: fedsys.Params, b: fedsys.Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> fedsys.RunResult:
    return start(tmp_path_factory.mktemp("run") / "out")


def test_a_run_learns(finished: fedsys.RunResult) -> None:
    before, after = finished.metrics[0], finished.metrics[-1]
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert finished.summary["final"]["eval_accuracy"] == after["eval_accuracy"]


def test_a_run_folder_holds_what_it_should(finished: fedsys.RunResult) -> None:
    names = {path.name for path in finished.folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml", "overrides.yaml", "env.json", "metrics.jsonl", "summary.json",
        "checkpoints", "adapter", "partition.json", "partition.png", "participation.jsonl",
        "participation.png", "report.html",
    }  # fmt: skip
    text = (finished.folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert lines[1].keys() >= METRICS
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["status"] == "completed"
    assert summary["bytes_up"] == sum(line["bytes_up"] for line in lines)


def test_bytes_follow_the_formula(finished: fedsys.RunResult) -> None:
    # Two layers of rank 16 are adapted: R of 16 x 16 each, in float32, from each of 10 clients.
    payload = 4 * 2 * 16 * 16
    for line in finished.metrics[1:]:
        assert payload <= line["bytes_up"] / 10 <= payload + 1200  # Flower's framing
        assert payload <= line["bytes_down"] / 10 <= payload + 1200
    shapes = [(128, 64), (128, 128)]
    up = 10 * 4 * sum(m * n for m, n in shapes)
    factors = 10 * 4 * sum(16 * (m + n) for m, n in shapes)
    down = 10 * payload  # phase 0 sends x_0, and the factors follow at first contact
    assert up + factors + down <= finished.summary["bytes_init"] <= 1.1 * (up + factors + down)


def test_the_same_seed_gives_the_same_bits(finished: fedsys.RunResult, tmp_path: Path) -> None:
    again = start(tmp_path / "again")
    assert same_bits(again.params, finished.params)
    assert not same_bits(start(tmp_path / "other", "seed=1").params, finished.params)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_agree(finished: fedsys.RunResult, tmp_path: Path, chunk: int) -> None:
    other = start(tmp_path / "other", f"engine.chunk={chunk}")
    for name, value in finished.params.items():
        gap = (other.params[name] - value).norm() / value.norm()
        assert gap < 1e-3  # Adam turns rounding into steps of lr where a gradient is near zero


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    slow = ["rounds=40", "participation.cohort=4", "strategy=fedadam", "adapter=full"]
    whole = start(tmp_path / "whole", *slow)
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "fedsys", "run", *SMALL, *slow, f"out={out}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "round_000005").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = len((out / "metrics.jsonl").read_text().splitlines()) - 1
    assert killed_at < 40
    resumed = fedsys.resume(out)
    assert same_bits(resumed.params, whole.params)
    assert [line["round"] for line in resumed.metrics] == list(range(41))
    for name in ("train_loss", "eval_loss", "bytes_up", "clients"):
        assert [r[name] for r in resumed.metrics] == [r[name] for r in whole.metrics]


def test_a_damaged_checkpoint_costs_a_round(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = start(out)
    last = out / "checkpoints" / "round_000003" / "tensors.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"\0")
    assert same_bits(fedsys.resume(out).params, whole.params)


def test_resuming_a_finished_run_changes_nothing(finished: fedsys.RunResult) -> None:
    again = fedsys.resume(finished.folder)
    assert same_bits(again.params, finished.params)
    assert again.metrics == finished.metrics


def test_a_folder_in_use_is_refused(finished: fedsys.RunResult) -> None:
    with pytest.raises(fedsys.ConfigError, match="resume"):
        start(finished.folder)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.init=seeded_random"],
        ["adapter.init=public", "data.public_fraction=0.1"],
        ["adapter.gradient=sign", "adapter.start=singular", "adapter.init_lr=0.001"],
        ["adapter.init_examples=5"],
        ["strategy=fedit"],
        ["strategy=ffa_lora"],
        ["strategy=fedprox", "adapter=lora_xs"],
        ["strategy=fedavg", "model=cnn", "model.width=8"],
        ["participation=bernoulli", "participation.rate=0.3"],
        ["client.schedule=cosine", "client.warmup=0.2", "client.round_schedule=linear"],
    ],
    ids=" ".join,
)
def test_settings_that_train(tmp_path: Path, overrides: list[str]) -> None:
    result = start(tmp_path / "run", *overrides)
    assert result.metrics[-1]["eval_loss"] < result.metrics[0]["eval_loss"]
    assert result.summary["failures"] == 0


def test_only_gradient_sums_cost_a_first_phase(tmp_path: Path) -> None:
    free = start(tmp_path / "free", "adapter.init=seeded_random")
    assert free.summary["bytes_init"] == 0
    public = start(tmp_path / "public", "adapter.init=public", "data.public_fraction=0.1")
    factors = 10 * 4 * 16 * (64 + 128 + 128 + 128)
    assert factors <= public.summary["bytes_init"] <= 1.1 * factors


def test_clients_are_evaluated_on_their_own_data(tmp_path: Path) -> None:
    line = start(tmp_path / "run", "evaluate.clients=true").metrics[-1]
    assert 0 <= line["clients_accuracy_worst_decile"] <= line["clients_accuracy"] <= 1


def test_a_client_without_a_usable_label_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = fedsys.config.configure([*SMALL, f"out={tmp_path / 'run'}", "strategy=fedavg"])
    federation = assemble(experiment)
    spoiled = federation.shards.rows(3)
    federation.dataset.train.labels[spoiled] = 10**6
    monkeypatch.setattr("fedsys.experiment._describe_partition", lambda _: None)
    monkeypatch.setattr("fedsys.experiment.assemble", lambda *_: federation)
    result = fedsys.experiment.run_experiment(experiment)
    assert [line["failures"] for line in result.metrics[1:]] == [1, 1, 1]
    assert all("client 3" in line["reasons"][0] for line in result.metrics[1:])
    assert all(torch.isfinite(value).all() for value in result.params.values())


def test_a_checkpoint_restores_what_the_run_had(finished: fedsys.RunResult) -> None:
    federation = assemble(finished.experiment)
    found = Checkpoints(finished.folder / "checkpoints").load(federation.first_snapshot())
    assert found is not None
    assert same_bits(found[0].params, finished.params)
    assert found[0].informed == dict.fromkeys(range(10), 0)
    factors = load_file(finished.folder / "checkpoints" / "frozen.safetensors")
    assert same_bits(found[0].frozen, factors)


@pytest.mark.parametrize("merged", [False, True])
def test_export(finished: fedsys.RunResult, tmp_path: Path, merged: bool) -> None:
    folder = fedsys.export(finished.folder, tmp_path / "export", merged)
    weights = "model.safetensors" if merged else "adapter_model.safetensors"
    tensors = load_file(folder / weights)
    if merged:
        base = assemble(finished.experiment).model.model.fc1.base.weight
        factors = load_file(finished.folder / "checkpoints" / "frozen.safetensors")
        b, a = factors["fc1.B.weight"], factors["fc1.A.weight"]
        update = b @ finished.params["fc1.R.weight"] @ a
        torch.testing.assert_close(tensors["fc1.weight"], base + update)
    else:
        assert any(name.endswith("fc1.lora_A.weight") for name in tensors)


def test_the_chunk_follows_the_size_of_the_work(tmp_path: Path) -> None:
    many = ["num_clients=40", f"out={tmp_path / 'a'}"]
    small = fedsys.config.configure([*SMALL, *many, "client.batch_size=8"])
    large = fedsys.config.configure([*SMALL, *many, "client.batch_size=128"])
    assert chunk_size(assemble(small)) == 40  # all at once
    assert chunk_size(assemble(large)) == 20  # 4096 // 128 = 32 would leave 8 over


def test_the_chunk_follows_the_mean_length(tmp_path: Path) -> None:
    rows = [f"{'a ' * length},{row % 2}" for row in range(64) for length in (4, 52)]
    words = [*small_texts(tmp_path, rows), "num_clients=100", "client.batch_size=4"]
    # 4096 / (4 * 28) = 36, and 100 by 36 are 34, 33, 33; by the longest, 52, they would be 17
    assert chunk_size(assemble(fedsys.config.configure(words))) == 34


def test_where_memory_is_short_fewer_clients_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, "num_clients=40", "client.batch_size=8", f"out={tmp_path / 'a'}"]
    federation = assemble(fedsys.config.configure(overrides))
    chunks = []
    for power in range(30, -1, -1):
        monkeypatch.setattr(fedsys.chunks, "available", lambda _, free=2**power: free)
        chunks.append(chunk_size(federation))
    assert chunks == sorted(chunks, reverse=True)
    assert {40, 20, 1} <= set(chunks)  # even ones, and one at least


def test_a_resumed_run_keeps_its_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(fedsys.experiment, "chunk_size", lambda _: 2)
    fedsys.run([*SMALL, f"out={out}"])
    monkeypatch.setattr(fedsys.experiment, "chunk_size", lambda _: 1)
    used = []
    grid = fedsys.experiment.LocalGrid

    def noted(*args, chunk, **kwargs):
        used.append(chunk)
        return grid(*args, chunk=chunk, **kwargs)

    monkeypatch.setattr(fedsys.experiment, "LocalGrid", noted)
    fedsys.resume(out)
    assert used == [2]


def small_texts(folder: Path, rows: list[str]) -> list[str]:
    """Return the settings of a tiny model on ``rows`` of words and a label."""
    tokens = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "rows.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    return [
        *SMALL, f"out={folder / 'out'}", "data=text", "model=hf_classifier",
        f"data.path={folder / 'rows.csv'}", "data.text=sentence",
        "data.label=label", "data.limit=null", "model.name=null",
        "model.config={model_type: bert, hidden_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2, intermediate_size: 16}",
        f"model.tokenizer_name={folder / 'tokenizer.json'}", "adapter.rank=4",
    ]  # fmt: skip


def test_batches_of_one_length_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    gather = clients.cohort.gather

    def watched(*args: Any) -> Any:
        batch = gather(*args)
        seen.append((batch["attention_mask"].numel(), int(batch["attention_mask"].sum())))
        return batch

    monkeypatch.setattr("clients.cohort.gather", watched)
    words = [
        *small_texts(tmp_path, [f"{'a ' * (1 + row % 16)},{row % 2}" for row in range(256)]),
        "num_clients=4", "rounds=1", "client.batch_size=8", "client.group_by_length=true",
        "engine.chunk=4",
    ]  # fmt: skip
    result = fedsys.run(words)
    assert result.summary["failures"] == 0
    padded, real = map(sum, zip(*seen, strict=True))
    assert padded < 1.5 * real  # batches drawn at random have nearly twice the tokens
