"""The policy of a device: every limit refuses; a file that is not understood permits nothing."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from fedsys.config import build, compose
from fedsys.deployment.policy import Facts, Policy, PolicyError, level_of
from fedsys.deployment.told import GENERAL, told
from fedsys.errors import ConfigError, PrivacyBudgetExceeded
from fedsys.privacy.accounting import Release, epsilon

CODE = "0123456789abcdef" * 4
TEXT = f"""\
# What may run here.
code: [{CODE}]
strategies: [FedSB, FedAU] # or any
adapters: any
privacy: sample
max_epsilon: 3.0
max_delta: 1.0e-5
max_clipping_norm: 1.0
max_bytes: 10000000
min_examples: 50
evaluate: false
max_rounds: null
"""
KEYS = [line.partition(":")[0] for line in TEXT.splitlines()[1:]]
FILES = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FEW = settings(max_examples=30, deadline=None)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(written(tmp_path_factory.mktemp("policy"), TEXT))


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """A run that the policy permits, as a server composes it."""
    overrides = ["privacy=sample", "privacy.epsilon=3", "privacy.delta=1e-6", "rounds=10"]
    return build(compose(overrides)).resolved


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return settings with other values, ``a__b`` for key b of group a."""
    tree = deepcopy(tree)
    for name, value in changes.items():
        group, _, key = name.partition("__")
        if key:
            tree[group][key] = value
        else:
            tree[group] = value
    return tree


# ---- the file


def test_a_file_is_read_as_it_is_written(policy: Policy) -> None:
    assert policy.code == (CODE,)
    assert policy.strategies == ("FedSB", "FedAU")
    assert policy.adapters == "any"
    assert (policy.max_epsilon, policy.max_delta, policy.max_rounds) == (3.0, 1e-5, None)
    assert policy.evaluate is False


def test_an_error_is_one_of_the_configuration_and_tells_all_problems(tmp_path: Path) -> None:
    text = TEXT.replace("max_bytes: 10000000", "max_bites: 1").replace("50", "many")
    with pytest.raises(ConfigError) as caught:
        Policy.load(written(tmp_path, text.replace("max_epsilon: 3.0", "max_epsilon: -1")))
    told = "\n".join(caught.value.problems)
    for part in ("max_bites", "did you mean max_bytes", "max_bytes: must be given"):
        assert part in told
    assert "min_examples=many" in told
    assert "max_epsilon must be above 0" in told


@pytest.mark.parametrize("key", KEYS)
def test_every_key_must_be_given(key: str, tmp_path: Path) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(f"{key}:")]
    with pytest.raises(PolicyError, match=f"{key}: must be given"):
        Policy.load(written(tmp_path, "\n".join(lines) + "\n"))


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_not_null(key: str, tmp_path: Path) -> None:
    lines = [f"{key}:" if line.startswith(f"{key}:") else line for line in TEXT.splitlines()]
    with pytest.raises(PolicyError, match=f"{key}: has no value"):
        Policy.load(written(tmp_path, "\n".join(lines) + "\n"))


@pytest.mark.parametrize("key", KEYS)
def test_no_key_comes_twice(key: str, tmp_path: Path) -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith(f"{key}:"))
    with pytest.raises(PolicyError):
        Policy.load(written(tmp_path, f"{TEXT}{line}\n"))


def test_every_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    for end in range(len(TEXT)):
        with pytest.raises(PolicyError):
            Policy.load(written(tmp_path, TEXT[:end]))


VALUES = [
    "null", "~", "true", "no", "''", "nan", ".nan", "inf", ".inf", "-.inf", "-1", "0", "1e999",
    "[]", "{}", "[null]", "[1, 2]", "any", "none", "client", "*x", "&x 1", "!!python/none x",
    "${oc.env:HOME}", "???", "'3.0'", "3.0", "50", "1_000", "0x10", "2001-01-01", "{a: 1}", "|",
    "[FedSB, '*']", "\u00e9", "3.0.0", "1:30", "\t1", "@",
]  # fmt: skip


@FILES
@given(key=st.sampled_from(KEYS), value=st.sampled_from(VALUES))
@example(key="evaluate", value="true")
@example(key="privacy", value="none")
def test_a_value_is_what_it_says_or_the_file_is_refused(
    key: str, value: str, tmp_path: Path
) -> None:
    lines = [f"{key}: {value}" if k.startswith(f"{key}:") else k for k in TEXT.splitlines()]
    _believed_or_refused(tmp_path, "\n".join(lines) + "\n")


@FILES
@given(data=st.data())
def test_a_file_with_any_change_is_what_it_says_or_is_refused(
    data: st.DataObject, tmp_path: Path
) -> None:
    raw = TEXT.encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 30)))
    into = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b" ", b": ", b"- "])))
    _believed_or_refused(tmp_path, raw[:start] + into + raw[end:])


def _believed_or_refused(folder: Path, text: str | bytes) -> None:
    try:
        found = Policy.load(written(folder, text))
    except PolicyError:
        return
    said = yaml.safe_load(text)
    assert set(said) == set(KEYS)
    for key, value in said.items():
        held = getattr(found, key)
        if isinstance(value, list):
            assert held == tuple(map(str, value))
        elif isinstance(held, float):
            assert held == float(str(value).replace("_", ""))
        else:
            assert held == value
            assert (held is None) == (value is None)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"a\n", b"\xff\xfe\n", b"a: [\n", b"- 1\n"]
)
def test_what_is_no_policy_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        Policy.load(written(tmp_path, content))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(PolicyError, match="cannot be read"):
            Policy.load(path)
    with pytest.raises(PolicyError, match="longer than"):
        Policy.load(written(tmp_path, "#" * 70000 + "\n" + TEXT))


def test_privacy_needs_its_limits_and_no_metrics(policy: Policy) -> None:
    for name in ("max_epsilon", "max_delta", "max_clipping_norm"):
        with pytest.raises(PolicyError, match=f"{name} must be given"):
            replace(policy, **{name: None})
        assert getattr(replace(policy, privacy="none", **{name: None}), name) is None
    for level in ("sample", "client"):
        with pytest.raises(PolicyError, match="evaluate=true"):
            replace(policy, privacy=level, evaluate=True)
    assert replace(policy, privacy="none", evaluate=True).evaluate


# ---- of a run


def test_what_is_within_all_limits_may_run(policy: Policy, composed: dict[str, Any]) -> None:
    assert policy.of_run(CODE, composed) == []


TIGHTENINGS = {
    "code": ((), "the code"),
    "strategies": (("FedAU",), "strategy FedSB"),
    "adapters": (("LoRA",), "adapter LoRASB"),
    "max_epsilon": (2.9, "privacy.epsilon"),
    "max_delta": (0.9e-6, "privacy.delta"),
    "max_clipping_norm": (0.9, "privacy.clipping_norm"),
    "max_rounds": (9, "rounds"),
}


@pytest.mark.parametrize("key", TIGHTENINGS)
def test_every_tightening_refuses(key: str, policy: Policy, composed: dict[str, Any]) -> None:
    value, words = TIGHTENINGS[key]
    (reason,) = replace(policy, **{key: value}).of_run(CODE, composed)
    assert words in reason


REFUSED: list[dict[str, Any]] = [
    {"strategy___target_": "my.FedSB"},
    {"strategy___target_": "strategies.fedavg.FedAvg"},
    {"strategy": None},
    {"adapter__init": "client_sum"},
    {"adapter__init": "else"},
    {"privacy__reproducible": True},
    {"privacy__reproducible": None},
    {"privacy__allow_unprotected_initialisation": True},
    {"privacy__epsilon": math.inf},
    {"privacy__epsilon": math.nan},
    {"privacy__epsilon": 0},
    {"privacy__epsilon": -1},
    {"privacy__epsilon": True},
    {"privacy__epsilon": "1"},
    {"privacy__epsilon": None},
    {"privacy__delta": 1e-4},
    {"privacy__delta": 0},
    {"privacy__delta": "tiny"},
    {"privacy__clipping_norm": None},
    {"privacy__clipping_norm": math.inf},
    {"privacy__quantile": 0.5},
    {"privacy": {"_target_": None}},
    {"privacy": None},
    {"privacy___target_": "fedsys.privacy.client_level.ClientPrivacy"},
    {"privacy___target_": "my.SamplePrivacy"},
    {"evaluate__clients": True},
    {"evaluate__clients": None},
    {"evaluate": {}},
    {"allow": ["os"]},
    {"allow": "os"},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_may_not_run(
    changes: dict[str, Any], policy: Policy, composed: dict[str, Any]
) -> None:
    assert policy.of_run(CODE, changed(composed, **changes)) != []


@pytest.mark.parametrize("rounds", [11, None, "3", True, 2.5e9, math.nan, -1])
def test_rounds_must_be_known_and_few(
    rounds: Any, policy: Policy, composed: dict[str, Any]
) -> None:
    few = replace(policy, max_rounds=10)
    assert few.of_run(CODE, composed) == []
    assert few.of_run(CODE, changed(composed, rounds=rounds)) != []


def test_settings_that_say_nothing_are_refused(policy: Policy) -> None:
    open_to_all = replace(policy, strategies="any", privacy="none")
    assert open_to_all.of_run(CODE, {}) != []
    assert open_to_all.of_run("", {}) != []


@FEW
@given(
    target=st.floats(0.1, 10),
    delta=st.floats(1e-9, 1e-3),
    norm=st.floats(0.1, 10),
    limits=st.tuples(st.floats(0.1, 10), st.floats(1e-9, 1e-3), st.floats(0.1, 10)),
)
def test_a_budget_may_run_if_and_only_if_it_is_within_the_limits(
    target: float,
    delta: float,
    norm: float,
    limits: tuple[float, float, float],
    policy: Policy,
    composed: dict[str, Any],
) -> None:
    names = ("max_epsilon", "max_delta", "max_clipping_norm")
    limited = replace(policy, **dict(zip(names, limits, strict=True)))
    asked = changed(
        composed, privacy__epsilon=target, privacy__delta=delta, privacy__clipping_norm=norm
    )
    within = all(a <= b for a, b in zip((target, delta, norm), limits, strict=True))
    assert (limited.of_run(CODE, asked) == []) == within


def test_noise_without_a_target_is_judged_by_what_is_spent(
    policy: Policy, composed: dict[str, Any]
) -> None:
    asked = changed(composed, privacy__epsilon=None, privacy__noise_multiplier=0.8)
    assert policy.of_run(CODE, asked) == []
    for noise in (0, 0.01, math.inf, math.nan, None, "1"):
        asked = changed(composed, privacy__epsilon=None, privacy__noise_multiplier=noise)
        assert policy.of_run(CODE, asked) != []


def test_levels_are_in_order(policy: Policy, composed: dict[str, Any]) -> None:
    client = changed(
        composed,
        privacy___target_="fedsys.privacy.client_level.ClientPrivacy",
        privacy__quantile=None,
    )
    runs = {"none": changed(composed, privacy={"_target_": None}), "client": client}
    runs["sample"] = composed
    order = list(runs)
    for required in order:
        limited = replace(policy, privacy=required)
        for promised, run in runs.items():
            assert level_of(run) == promised
            allowed = order.index(promised) >= order.index(required)
            assert (limited.of_run(CODE, run) == []) == allowed


def test_classes_of_others_are_named_in_full(policy: Policy, composed: dict[str, Any]) -> None:
    own = changed(composed, strategy___target_="my_module.sub.FedSB", allow=["my_module"])
    assert len(policy.of_run(CODE, own)) == 2
    full = replace(policy, strategies=("my_module.sub.FedSB",))
    assert full.of_run(CODE, own) == []
    # Modules in the bundle are known by its hash.
    assert replace(policy, strategies="any").of_run(CODE, own, ["my_module"]) == []
    assert replace(policy, strategies="any").of_run(CODE, own, ["my"]) != []


# ---- of a reply

SPENT = (Release(2.0, 0.05, 100),)
REPLY = Facts(
    kind="train",
    level="sample",
    size=1000,
    arrays=True,
    num_examples=50,
    spent=SPENT,
    entered=SPENT,
    clipping_norm=1.0,
)


def test_a_reply_within_all_limits_may_leave(policy: Policy) -> None:
    assert policy.of_reply(REPLY) == []


REPLIES: list[tuple[dict[str, Any], str]] = [
    ({"size": 10_000_001}, "bytes"),
    ({"num_examples": 49}, "fewer than 50"),
    ({"num_examples": None}, "fewer than 50"),
    ({"spent": None}, "ledger"),
    ({"entered": None}, "ledger"),
    ({"spent": (Release(0.0, 1.0, 1),)}, "epsilon"),
    ({"entered": (Release(1.0, 1.0, 30),)}, "epsilon"),
    ({"clipping_norm": None}, "clipped"),
    ({"clipping_norm": 1.1}, "clipped"),
    ({"metrics": frozenset({"train_loss"})}, "train_loss"),
    ({"unknown": ("rows",)}, "rows"),
    ({"level": "client"}, "required"),
    ({"level": "none"}, "required"),
    ({"kind": "evaluate"}, "evaluate"),
    ({"kind": "query.whoami"}, "arrays"),
    ({"kind": "other"}, "other"),
    ({"kind": ""}, "may not be answered"),
]


@pytest.mark.parametrize(("changes", "words"), REPLIES, ids=str)
def test_what_may_not_leave(changes: dict[str, Any], words: str, policy: Policy) -> None:
    reasons = policy.of_reply(replace(REPLY, **changes))
    assert any(words in reason for reason in reasons)


def test_a_reason_does_not_count_the_rows(policy: Policy) -> None:
    (reason,) = policy.of_reply(replace(REPLY, num_examples=37))
    assert "37" not in reason


@FEW
@given(z=st.floats(0.4, 4), steps=st.integers(1, 400), limit=st.floats(0.2, 12))
def test_spending_is_judged_by_the_accountant_at_the_policys_delta(
    z: float, steps: int, limit: float, policy: Policy
) -> None:
    spent = (Release(z, 0.05, steps),)
    figure = epsilon(spent, 1e-5)
    assume(abs(figure - limit) > 1e-9)
    limited = replace(policy, max_epsilon=limit)
    assert limited.affords(spent) == (figure <= limit)
    # A smaller delta is a stricter promise.
    if not limited.affords(spent):
        assert not replace(limited, max_delta=1e-9).affords(spent)


def test_roll_calls_and_keys_hold_no_rows(policy: Policy) -> None:
    empty = replace(REPLY, arrays=False, num_examples=None, spent=None, entered=None)
    who = replace(empty, kind="query.whoami", metrics=frozenset({"partition-id"}))
    assert policy.of_reply(who) == []
    assert policy.of_reply(replace(who, metrics=frozenset({"mean-age"}))) != []
    assert policy.of_reply(replace(empty, kind="train.secagg_keys")) == []
    assert policy.of_reply(replace(empty, kind="train", metrics=frozenset({"partition-id"}))) != []


def test_where_no_privacy_is_required_metrics_may_leave(policy: Policy) -> None:
    free = replace(policy, privacy="none")
    plain = replace(
        REPLY, level="none", metrics=frozenset({"train_loss"}), spent=None, entered=None
    )
    assert free.of_reply(plain) == []
    assert free.of_reply(replace(plain, kind="evaluate")) != []
    assert replace(free, evaluate=True).of_reply(replace(plain, kind="evaluate")) == []
    # A server that protects its clients gets what it protects.
    assert replace(policy, privacy="client").of_reply(replace(plain, level="client")) == []


# ---- why a client failed


@given(st.text())
def test_of_private_rows_nothing_is_told(text: str) -> None:
    said = told(f"ValueError: row {text} of patient Q", private=True)
    assert said == GENERAL or "Q" not in said
    assert len(said) <= 200


@given(st.text(max_size=2000))
def test_a_reason_is_one_short_line(text: str) -> None:
    said = told(text, private=False)
    assert said
    assert len(said) <= 200
    assert len(said.splitlines()) == 1


def test_a_spent_budget_is_told_without_a_name() -> None:
    error = PrivacyBudgetExceeded("notes.csv#Ada Lovelace", 3.25, 3.0)
    said = told(f"{type(error).__name__}: {error}", private=True)
    assert said.startswith("PrivacyBudgetExceeded")
    assert "3.25" in said
    assert "Ada" not in said


def test_known_refusals_are_told() -> None:
    known = "<class 'RuntimeError'>:<'the client failed, and does not say why'>"
    assert told(known, private=True) == "the client failed, and does not say why"
    assert told("Secret. ClientApp stopped responding.", True) == "ClientApp stopped responding."
    assert told(None, private=True) == GENERAL
