"""The ledger: nothing forgotten, nothing counted anew, nothing altered without notice."""

import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsys.errors import LedgerError, PrivacyBudgetExceeded, RunError
from fedsys.privacy.accounting import Release, epsilon, merged
from fedsys.privacy.entries import FILE, GENESIS, entry_of, line_of
from fedsys.privacy.held_file import HeldFile
from fedsys.privacy.ledger import Head, Ledger, NewEntry, afford, read

FOLDERS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def entry(number: int = 0, **changes: object) -> NewEntry:
    known = {
        "run": "run",
        "round": number,
        "client": f"client-{number % 3}",
        "data": "digits",
        "fingerprint": "f" * 8,
        "num_examples": 100,
        "mechanism": "dp-sgd",
        "release": Release(1.25, 0.1, 10),
        "clipping_norm": 1.0,
        "target": 3.0,
        "delta": 1e-5,
        "stream": f"stream-{number}",
        "reply": f"reply-{number}",
    }
    return NewEntry(**(known | changes))


def written(folder: Path, count: int) -> bytes:
    """Return the bytes of a ledger with ``count`` entries, written one by one and by twos."""
    with Ledger(folder) as ledger:
        ledger.append([entry(0)])
        for first in range(1, count, 2):
            ledger.append([entry(n) for n in range(first, min(first + 2, count))])
    return (folder / FILE).read_bytes()


# ---- what is written is read


def test_what_was_appended_is_there_for_whoever_comes_next(tmp_path: Path) -> None:
    before = time.time()
    written(tmp_path / "deep" / "er", 5)
    entries = read(tmp_path / "deep" / "er")
    assert [e.index for e in entries] == list(range(5))
    assert entries[0].previous == GENESIS
    assert [e.previous for e in entries[1:]] == [e.hash for e in entries[:-1]]
    for number, found in enumerate(entries):
        assert before <= found.time <= time.time()
        named = {name: getattr(found, name) for name in vars(entry())}
        assert NewEntry(**named) == entry(number)


FLOATS = st.floats(min_value=1e-300, max_value=1e300)


@given(
    release=st.builds(
        Release,
        noise_multiplier=FLOATS,
        sample_rate=st.floats(0, 1, exclude_min=True),
        steps=st.integers(0, 10**9),
    ),
    clipping_norm=st.one_of(FLOATS, st.just(math.inf)),
    target=st.one_of(st.none(), FLOATS, st.just(math.inf)),
    delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    now=st.floats(0, 1e12),
    names=st.lists(st.text(st.characters(codec=None)), min_size=4, max_size=4),
)
def test_entries_come_back_to_the_bit(release, clipping_norm, target, delta, now, names):
    run, client, data, reply = names
    told = entry(
        release=release,
        clipping_norm=clipping_norm,
        target=target,
        delta=delta,
        run=run,
        client=client,
        data=data,
        reply=reply,
    )
    line, digest = line_of(told, 7, now, GENESIS)
    assert line.count(b"\n") == 1
    found = entry_of(line[:-1], 7, GENESIS)
    assert found.hash == digest
    assert found.time == now
    assert NewEntry(**{name: getattr(found, name) for name in vars(told)}) == told
    json.loads(line, parse_constant=pytest.fail)  # strict JSON, though there is infinity in it


def test_spending_is_added_up_by_client(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(
            [
                entry(0, client="a", release=Release(1.0, 0.5, 3)),
                entry(1, client="b", release=Release(1.0, 0.5, 4)),
                entry(2, client="a", release=Release(2.0, 0.5, 5)),
                entry(3, client="a", release=Release(1.0, 0.5, 6)),
            ]
        )
        assert ledger.spent("a") == merged([Release(1.0, 0.5, 9), Release(2.0, 0.5, 5)])
        assert ledger.spent("b") == (Release(1.0, 0.5, 4),)
        assert ledger.spent("nobody") == ()
        live = ledger.spent("a")
    with Ledger(tmp_path) as ledger:
        assert ledger.spent("a") == live


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": "other rows"}, {"data": "renamed"}, {"run": "second"}, {"num_examples": 7}],
)
def test_neither_other_data_nor_another_run_resets_anything(tmp_path: Path, changes) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append([entry(0)])
    with Ledger(tmp_path) as ledger:
        ledger.append([entry(1, client="client-0", **changes)])
        assert ledger.spent("client-0") == (Release(1.25, 0.1, 20),)
        assert epsilon(ledger.spent("client-0"), 1e-5) > epsilon([Release(1.25, 0.1, 10)], 1e-5)


def test_a_release_is_found_by_all_that_makes_it_one(tmp_path: Path) -> None:
    written(tmp_path, 2)
    with Ledger(tmp_path) as ledger:
        assert ledger.find("run", 1, "client-1", "reply-1")
        for other in (
            ("other", 1, "client-1", "reply-1"),
            ("run", 0, "client-1", "reply-1"),
            ("run", 1, "client-0", "reply-1"),
            ("run", 1, "client-1", "reply-0"),
        ):
            assert not ledger.find(*other)
        ledger.append([entry(2)])
        assert ledger.find("run", 2, "client-2", "reply-2")


def test_noise_is_used_once(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append([entry(0, stream="s")])
        for again in ([entry(1, stream="s")], [entry(2, stream="t"), entry(3, stream="t")]):
            with pytest.raises(LedgerError, match="was used before"):
                ledger.append(again)
        assert ledger.head.length == 1
        ledger.append([entry(4, stream="t")])  # what was refused has used nothing
    with Ledger(tmp_path) as ledger, pytest.raises(LedgerError, match="was used before"):
        ledger.append([entry(5, stream="s")])


def test_one_release_of_a_server_is_charged_to_its_whole_cohort(tmp_path: Path) -> None:
    def charges(round: int, stream: str, **changes: object) -> list[NewEntry]:
        said = {"mechanism": "client", "stream": stream, "reply": "", "round": round} | changes
        return [entry(0, client=f"{n}", **said) for n in range(3)]

    with Ledger(tmp_path) as ledger:
        ledger.append(charges(1, "s"))
        for again in (
            charges(2, "s"),
            charges(1, "s", run="other"),
            charges(2, "t", mechanism="dp-sgd"),
            [*charges(2, "t"), *charges(3, "u"), *charges(2, "t")],
        ):
            with pytest.raises(LedgerError, match="was used before"):
                ledger.append(again)
        ledger.append(charges(2, "t"))
    with Ledger(tmp_path) as ledger:
        assert ledger.head.length == 6
        assert ledger.spent("2") == (Release(1.25, 0.1, 20),)
        with pytest.raises(LedgerError, match="was used before"):
            ledger.append(charges(3, "s"))


def test_a_chain_in_which_noise_is_used_twice_is_refused(tmp_path: Path) -> None:
    data, previous = b"", GENESIS
    for number in range(2):
        told = entry(number, stream="s")
        line, previous = line_of(told, number, 0.0, previous)
        data += line
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(LedgerError, match="was used before"):
        Ledger(tmp_path)


def test_what_has_no_noise_names_no_stream(tmp_path: Path) -> None:
    clear = Release(0.0, 0.1, 10)
    with Ledger(tmp_path) as ledger:
        ledger.append([entry(n, release=clear, stream="", target=math.inf) for n in range(2)])
        assert math.isinf(epsilon(ledger.spent("client-0"), 1e-5))
    with pytest.raises(ValueError, match="must name the stream"):
        entry(0, stream="")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanism": "magic"},
        {"round": -1},
        {"num_examples": -1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"clipping_norm": 0.0},
        {"clipping_norm": math.nan},
        {"target": -1.0},
        {"target": math.nan},
        {"client": 3},
        {"round": "3"},
    ],
)
def test_an_entry_says_what_can_be(wrong) -> None:
    with pytest.raises((ValueError, TypeError)):
        entry(0, **wrong)


def test_an_empty_append_does_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append([])
        assert ledger.head == Head(0, GENESIS)
    assert (tmp_path / FILE).read_bytes() == b""


# ---- what was altered


def refused(folder: Path, data: bytes) -> None:
    (folder / FILE).write_bytes(data)
    for reader in (Ledger, read):
        with pytest.raises(LedgerError, match="cannot be believed"):
            reader(folder)
    assert (folder / FILE).read_bytes() == data, "what is refused is left as it is"


def in_memory(count: int) -> bytes:
    data, previous = b"", GENESIS
    for number in range(count):
        line, previous = line_of(entry(number), number, 1e9 + number, previous)
        data += line
    return data


GOOD = in_memory(4)


def test_the_ledger_to_be_altered_is_good(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(GOOD)
    assert len(read(tmp_path)) == 4


@FOLDERS
@given(st.data())
def test_no_byte_can_change(tmp_path: Path, data: st.DataObject) -> None:
    good = GOOD
    place = data.draw(st.integers(0, len(good) - 1))
    bits = data.draw(st.integers(1, 255))
    refused(tmp_path, good[:place] + bytes([good[place] ^ bits]) + good[place + 1 :])


def test_not_even_the_last_newline_can_change(tmp_path: Path) -> None:
    good = written(tmp_path, 3)
    for byte in b"\x00\x0b\r\t ,}0\xff":
        refused(tmp_path, good[:-1] + bytes([byte]))


def lines_of(folder: Path, count: int = 4) -> list[bytes]:
    return written(folder, count).splitlines(keepends=True)


@pytest.mark.parametrize("at", range(3))
def test_no_line_can_go_unless_it_is_the_last(tmp_path: Path, at: int) -> None:
    lines = lines_of(tmp_path)
    refused(tmp_path, b"".join(lines[:at] + lines[at + 1 :]))


@pytest.mark.parametrize("at", range(4))
def test_no_line_can_come_twice(tmp_path: Path, at: int) -> None:
    lines = lines_of(tmp_path)
    refused(tmp_path, b"".join(lines[: at + 1] + lines[at:]))


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_lines_cannot_change_places(tmp_path: Path, one: int, other: int) -> None:
    lines = lines_of(tmp_path)
    lines[one], lines[other] = lines[other], lines[one]
    refused(tmp_path, b"".join(lines))


def test_lines_of_another_ledger_do_not_fit_in(tmp_path: Path) -> None:
    with Ledger(tmp_path / "other") as ledger:
        ledger.append([entry(n, client="other") for n in range(4)])
    others = (tmp_path / "other" / FILE).read_bytes().splitlines(keepends=True)
    lines = lines_of(tmp_path)
    refused(tmp_path, b"".join([*lines[:2], others[2], *lines[3:]]))


@pytest.mark.parametrize("extra", [b"\n", b"{}\n", b"null\n", b"\x00\n", b"[" * 5000 + b"\n"])
def test_nothing_else_can_stand_in_it(tmp_path: Path, extra: bytes) -> None:
    refused(tmp_path, written(tmp_path, 2) + extra)


def test_a_chain_made_anew_must_still_hold_entries(tmp_path: Path) -> None:
    tmp_path.joinpath(FILE).touch()
    line, _ = line_of(entry(0), 3, 0.0, GENESIS)  # a whole chain, but for the place
    refused(tmp_path, line)


# ---- anchors


def test_a_truncated_tail_shows_where_the_head_was_anchored(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    with Ledger(tmp_path) as ledger:
        anchor = ledger.head
        assert anchor.length == 4
        assert Head.of(json.loads(json.dumps(anchor.as_dict()))) == anchor
        ledger.check(anchor)
    for kept in range(4):
        (tmp_path / FILE).write_bytes(b"".join(lines[:kept]))
        with Ledger(tmp_path) as ledger, pytest.raises(LedgerError, match="its end is missing"):
            ledger.check(anchor)


def test_a_ledger_goes_on_from_every_earlier_head(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        heads = [ledger.head]
        for number in range(4):
            ledger.append([entry(number)])
            heads.append(ledger.head)
            assert ledger.head.hash == read(tmp_path)[-1].hash
    with Ledger(tmp_path) as ledger:
        for head in heads:
            ledger.check(head)


def test_another_ledger_does_not_go_on_from_it(tmp_path: Path) -> None:
    written(tmp_path / "one", 3)
    with Ledger(tmp_path / "other") as other, Ledger(tmp_path / "one") as one:
        other.append([entry(n, client="else") for n in range(3)])
        with pytest.raises(LedgerError, match="another ledger"):
            other.check(one.head)


@pytest.mark.parametrize("anchor", [None, {}, [], {"length": 1}, {"length": "1", "sha256": "a"}])
def test_what_is_no_head_is_refused(anchor) -> None:
    with pytest.raises(LedgerError, match="no head"):
        Head.of(anchor)


# ---- torn writes


def test_a_torn_last_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = written(tmp_path, 3)
    two, whole = good.index(b"\n", good.index(b"\n") + 1) + 1, len(good)
    for size in (two + 1, two + 2, (two + whole) // 2, whole - 2):
        caplog.clear()
        (tmp_path / FILE).write_bytes(good[:size])
        assert len(read(tmp_path)) == 2, "reading leaves it out"
        assert (tmp_path / FILE).stat().st_size == size, "and leaves it alone"
        with caplog.at_level(logging.WARNING, "fedsys"), Ledger(tmp_path) as ledger:
            assert ledger.head.length == 2
            ledger.append([entry(2)])  # its stream is free again
        assert "entry 2 was torn" in caplog.text
        assert len(read(tmp_path)) == 3


def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path: Path) -> None:
    good = written(tmp_path, 3)
    (tmp_path / FILE).write_bytes(good[:-1])
    assert len(read(tmp_path)) == 3
    with Ledger(tmp_path) as ledger:
        assert ledger.head.length == 3
        assert (tmp_path / FILE).read_bytes() == good
        ledger.append([entry(3)])
    assert len(read(tmp_path)) == 4


def test_zeros_that_a_power_cut_left_are_cut_off(tmp_path: Path) -> None:
    good = written(tmp_path, 2)
    (tmp_path / FILE).write_bytes(good + bytes(4096))
    with Ledger(tmp_path) as ledger:
        assert ledger.head.length == 2
    assert (tmp_path / FILE).read_bytes() == good


# ---- one process at a time


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        with pytest.raises(LedgerError, match="in use by another process"):
            Ledger(tmp_path)
        ledger.append([entry(0)])
        assert len(read(tmp_path)) == 1, "reading needs no lock"
    Ledger(tmp_path).close()


def test_another_process_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path):
        done = child("Ledger(folder)", tmp_path)
        assert done.returncode == 1
        assert "in use by another process" in done.stderr


def test_a_ledger_that_is_dropped_lets_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    del ledger
    Ledger(tmp_path).close()


def test_a_ledger_that_is_refused_lets_go(tmp_path: Path) -> None:
    good = written(tmp_path, 2)
    refused(tmp_path, good + b"\n")
    (tmp_path / FILE).write_bytes(good)
    Ledger(tmp_path).close()


@pytest.mark.parametrize("how", ["grown", "cut", "gone", "replaced"])
def test_whoever_changes_it_meanwhile_is_noticed(tmp_path: Path, how: str) -> None:
    good = written(tmp_path, 3)
    path = tmp_path / FILE
    with Ledger(tmp_path) as ledger:
        if how == "grown":
            path.write_bytes(good + b"{}\n")
        elif how == "cut":
            os.truncate(path, len(good) - 5)
        else:
            path.rename(tmp_path / "away")
            if how == "replaced":
                path.write_bytes(good)
        with pytest.raises(LedgerError, match=r"changed by somebody else|has gone"):
            ledger.append([entry(3)])


def test_a_closed_ledger_takes_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append([entry(0)])
    with pytest.raises(LedgerError, match="it is closed"):
        ledger.append([entry(1)])
    assert ledger.spent("client-0") == (Release(1.25, 0.1, 10),)


# ---- trouble with the disk


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "file" / "ledger")
    with pytest.raises(LedgerError, match="cannot be read"):
        read(tmp_path / "none")
    assert issubclass(LedgerError, RunError), "so that the command line tells it in one line"


PRELUDE = """
import resource, sys
from pathlib import Path
from fedsys.privacy.ledger import Ledger, LedgerError
from tests.test_ledger import entry
folder = Path(sys.argv[1])
"""


def command(code: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", PRELUDE + code, str(folder)]


def child(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(code, folder), capture_output=True, text=True, check=False)


FULL = """
ledger = Ledger(folder)
ledger.append([entry(n) for n in range(3)])
size = ledger.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    ledger.append([entry(3), entry(4)])
except LedgerError as error:
    print(error)
assert ledger.path.stat().st_size == size
assert ledger.head.length == 3
assert not ledger.find("run", 3, "client-0", "reply-3")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.append([entry(3)])  # somebody has made room
"""


def test_a_full_disk_leaves_it_as_it_was(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = child(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing was released" in done.stdout
    assert [e.round for e in read(tmp_path)] == [0, 1, 2, 3]


def test_an_fsync_that_fails_takes_the_entry_back(tmp_path: Path, monkeypatch) -> None:
    def broken(_: int) -> None:
        raise OSError("Input/output error")

    with Ledger(tmp_path) as ledger:
        ledger.append([entry(0)])
        with monkeypatch.context() as patch:
            patch.setattr("fedsys.privacy.held_file.os.fsync", broken)
            with pytest.raises(LedgerError, match="nothing was released"):
                ledger.append([entry(1)])
        with pytest.raises(LedgerError, match="could not be taken back"):
            ledger.append([entry(1)])  # nobody knows what is on that disk
    assert len(read(tmp_path)) == 1


def test_an_interruption_takes_the_entry_back(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def interrupted(_: int) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with Ledger(tmp_path) as ledger, monkeypatch.context() as patch:
        patch.setattr("fedsys.privacy.held_file.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.append([entry(0)])
        assert ledger.head.length == 0
        ledger.append([entry(0)])
    assert len(read(tmp_path)) == 1


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    whole = os.write
    file = HeldFile(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr("fedsys.privacy.held_file.os.write", lambda f, data: whole(f, data[:3]))
        file.add(b"0123456789\n")
    assert (tmp_path / "file").read_bytes() == b"0123456789\n"
    assert file.size == 11
    file.close()


LOOP = """
import os
write, pieces = os.write, int(sys.argv[2])
os.write = lambda file, data: write(file, data[:pieces] if len(data) > 20 else data)
ledger = Ledger(folder)
number = ledger.head.length
while True:
    ledger.append([entry(n) for n in range(number, number + 5)])
    number += 5
    write(1, b"%d\\n" % number)
"""


def killed(folder: Path, seconds: float, pieces: int) -> int:
    """Append in a process that is killed; return how many entries it was told were there."""
    whole = [*command(LOOP, folder), str(pieces)]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "the process ended before it had appended anything"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
    assert process.returncode == -signal.SIGKILL
    return max([int(first), *(int(line) for line in rest[:-1] if line)])


def survived(folder: Path, moments: list[float], pieces: int) -> None:
    for seconds in moments:
        returned = killed(folder, seconds, pieces)
        with Ledger(folder) as ledger:
            # Some of an append that has not returned may be on disk.
            assert returned <= ledger.head.length <= returned + 5
            spent = [r for k in range(3) for r in ledger.spent(f"client-{k}")]
            assert sum(r.steps for r in spent) == 10 * ledger.head.length


@pytest.mark.parametrize("pieces", [97, 10**9])  # bytes a write, so as to tear lines
def test_a_killed_process_forgets_nothing_that_it_was_told_is_there(
    tmp_path: Path, pieces: int
) -> None:
    survived(tmp_path, [0.0, 0.0137], pieces)


@pytest.mark.slow
def test_many_killed_processes_forget_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    survived(tmp_path, [rng.uniform(0, 0.05) for _ in range(40)], 61)


# ---- budgets


def test_who_would_overspend_is_refused() -> None:
    spent, planned = (Release(1.0, 0.5, 20),), Release(1.0, 0.5, 1)
    after = epsilon(merged([*spent, planned]), 1e-5)
    afford("me", spent, [planned], after, 1e-5)
    afford("me", spent, [planned], None, 1e-5)
    afford("me", spent, [Release(0.0, 0.5, 1)], math.inf, 1e-5)
    with pytest.raises(PrivacyBudgetExceeded, match=r"client me .* epsilon .* target") as refusal:
        afford("me", spent, [planned], after * 0.999, 1e-5)
    assert refusal.value.epsilon == after
    assert refusal.value.target == after * 0.999
    with pytest.raises(PrivacyBudgetExceeded):
        afford("me", spent, [Release(0.0, 0.5, 1)], 1e6, 1e-5)


def test_what_is_merged_is_spent_whatever_the_order(tmp_path: Path) -> None:
    several = [entry(n, client="a", release=Release(1.0 + n % 3, 0.5, n + 1)) for n in range(7)]
    with Ledger(tmp_path / "one") as one, Ledger(tmp_path / "other") as other:
        one.append(several)
        other.append([replace(e) for e in reversed(several)])
        assert one.spent("a") == other.spent("a") == merged(e.release for e in several)
