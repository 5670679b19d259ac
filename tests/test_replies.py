"""Replies that are sent again: the same bits, or none at all."""

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.replies import DiskReplies, MemoryReplies, ReplyStore, key_of

KINDS = ["memory", "disk", "durable"]


def made(kind: str, folder: Path) -> ReplyStore:
    if kind == "memory":
        return MemoryReplies()
    return DiskReplies(folder / "replies", durable=kind == "durable")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ReplyStore:
    return made(request.param, tmp_path)


def arrays_of(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    whole = torch.randn(4, 6, generator=rng)
    return {
        "z/last": whole.T[1:3],  # a view, and not contiguous
        "a": whole[0],  # of the same memory
        "half": whole.to(torch.bfloat16),
        "double": whole.double() / 3,
        "count": torch.tensor(seed),
        "none": torch.zeros(0, 3),
        "mask": whole > 0,
        "odd": torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
    }


SAID = {"num-examples": 12, "train_loss": None, "std": 0.1 + 0.2, "entries": [{"stream": "ü"}]}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(value: torch.Tensor) -> bytes:
        flat = value.clone(memory_format=torch.contiguous_format).view(-1)
        return flat.view(torch.uint8).numpy().tobytes()

    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and bits(left[n]) == bits(right[n])
        for n in left
    )


def test_a_reply_comes_back_to_the_bit(store: ReplyStore) -> None:
    store.put(3, 7, "key", arrays_of(), SAID)
    for _ in range(2):
        arrays, said = store.get(3, 7, "key")
        assert same_bits(arrays, arrays_of())
        assert said == SAID
        arrays.clear()
        said.clear()


NUMBERS = st.floats(allow_nan=False) | st.integers() | st.none() | st.text()


@pytest.mark.parametrize("kind", KINDS[:2])
@settings(max_examples=25, deadline=None)
@given(said=st.dictionaries(st.text(), NUMBERS | st.lists(NUMBERS)), values=st.lists(st.floats()))
def test_whatever_json_can_say_comes_back(kind: str, said, values) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = made(kind, Path(folder))
        arrays = {"x": torch.tensor(values, dtype=torch.float64)}
        store.put(0, 1, "key", arrays, said)
        found, back = store.get(0, 1, "key")
    assert same_bits(found, arrays)
    assert back == said


def test_another_question_has_no_answer(store: ReplyStore) -> None:
    assert store.get(3, 7, "key") is None
    store.put(3, 7, "key", arrays_of(), SAID)
    assert store.get(3, 7, "other") is None
    assert store.get(3, 8, "key") is None
    assert store.get(4, 7, "key") is None
    assert store.get(3, 7, "key") is not None


def test_the_last_reply_of_a_round_stands(store: ReplyStore) -> None:
    store.put(3, 7, "key", arrays_of(0), {})
    store.put(3, 7, "new", arrays_of(1), {})
    assert store.get(3, 7, "key") is None
    assert same_bits(store.get(3, 7, "new")[0], arrays_of(1))


def test_old_rounds_are_dropped_for_one_client(store: ReplyStore) -> None:
    for client in (0, 1):
        for round in (0, 2, 10):
            store.put(client, round, "key", arrays_of(), {})
    store.prune(0, 10)
    assert [r for r in (0, 2, 10) if store.get(0, r, "key")] == [10]
    assert [r for r in (0, 2, 10) if store.get(1, r, "key")] == [0, 2, 10]


def test_old_rounds_are_dropped_for_all(store: ReplyStore) -> None:
    for client in (0, 1):
        for round in (1, 2, 3):
            store.put(client, round, "key", arrays_of(), {})
    store.prune(None, 2)
    for client in (0, 1):
        assert [r for r in (1, 2, 3) if store.get(client, r, "key")] == [2, 3]


def test_nothing_is_left_of_what_was_dropped(tmp_path: Path) -> None:
    store = DiskReplies(tmp_path)
    store.prune(None, 5)
    for client in (0, 1):
        store.put(client, 1, "key", arrays_of(), {})
    store.prune(0, 2)
    assert (tmp_path / "1").is_dir()
    store.prune(1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_store_with_nothing_has_nothing_to_drop(tmp_path: Path) -> None:
    DiskReplies(tmp_path / "none").prune(3, 5)
    MemoryReplies().prune(3, 5)
    assert not (tmp_path / "none").exists()


def test_replies_outlive_the_process(tmp_path: Path) -> None:
    DiskReplies(tmp_path).put(3, 7, "key", arrays_of(), SAID)
    arrays, said = DiskReplies(tmp_path).get(3, 7, "key")
    assert same_bits(arrays, arrays_of())
    assert said == SAID


@pytest.mark.parametrize("places", range(0, 4000, 401))
def test_an_altered_reply_counts_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, places: int
) -> None:
    store = DiskReplies(tmp_path)
    store.put(3, 7, "key", arrays_of(), SAID)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    place = places % len(data)
    data[place] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "clients"):
        found = store.get(3, 7, "key")
    # A space that pads the header is no part of the reply.
    assert found is None or (same_bits(found[0], arrays_of()) and found[1] == SAID)
    assert (found is None) == ("cannot be used" in caplog.text)


def test_an_altered_number_counts_as_none(tmp_path: Path) -> None:
    store = DiskReplies(tmp_path)
    store.put(3, 7, "key", arrays_of(), SAID)
    (path,) = tmp_path.rglob("*.safetensors")
    good = path.read_bytes()
    for change in (
        good[:-1] + bytes([good[-1] ^ 1]),
        good.replace(b'num-examples\\": 12', b'num-examples\\": 13'),
        good[:-1],
        good[:50],
        b"",
    ):
        assert change != good
        path.write_bytes(change)
        assert store.get(3, 7, "key") is None
    path.write_bytes(good)
    assert store.get(3, 7, "key") is not None


def test_a_reply_that_cannot_be_kept_is_told_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskReplies(tmp_path)
    store.put(3, 7, "key", arrays_of(), SAID)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("clients.replies.save_file", full)
        with pytest.raises(OSError, match=r"7/3.safetensors cannot be written: No space"):
            store.put(3, 7, "new", arrays_of(1), {})
    assert store.get(3, 7, "key") is not None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


FILL = """
import sys, itertools, torch
from pathlib import Path
from clients.replies import DiskReplies
store = DiskReplies(Path(sys.argv[1]))
print("ready", flush=True)
for n in itertools.count():
    store.put(3, 7, "key", {"x": torch.full((100_000,), float(n))}, {"n": n})
"""


def test_a_killed_process_leaves_a_whole_reply_or_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not any(tmp_path.rglob("*.safetensors")):
            time.sleep(0.001)
        time.sleep(0.0213)
        os.kill(process.pid, signal.SIGKILL)
    arrays, said = DiskReplies(tmp_path).get(3, 7, "key")
    assert arrays["x"].tolist() == [said["n"]] * 100_000


def test_a_question_is_all_that_the_answer_depends_on() -> None:
    asked = ("run", 1, "start", "basis")
    assert key_of(*asked) == key_of(*asked)
    others = [("r", 1, "start", "basis"), ("run", 2, "start", "basis")]
    others += [("run", 1, "s", "basis"), ("run", 1, "start", ""), ("run", 1, "startb", "asis")]
    assert len({key_of(*asked), *(key_of(*other) for other in others)}) == 6
