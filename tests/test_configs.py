"""Every YAML composes and builds; every refusal names the key, the value and what is allowed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsys.compose import FOLDER, compose, examine, groups
from fedsys.config import Experiment, build, configure
from fedsys.errors import ConfigError

OPTIONS = [(group, option) for group, options in groups().items() for option in options]
CLASSIFIER = ["model=hf_classifier", "data.text=sentence", "data.label=label"]
POINT = ["model=point", "partition=contiguous"]
# What an option cannot do without; {folder} holds the files.
NEEDED = {
    ("adapter", "full"): ["strategy=fedavg"],
    ("adapter", "lora"): ["strategy=fedavg"],
    ("adapter", "ffa"): ["strategy=fedavg"],
    ("adapter", "lora_xs"): ["strategy=fedavg"],
    ("adapter", "supermask"): ["strategy=frl"],
    ("attack", "reverse_rank"): ["strategy=frl"],
    ("compression", "topk_econtrol"): ["strategy=fedavg", "strategy.weighting=uniform"],
    ("participation", "trace"): ["participation.path={folder}/a.csv"],
    ("data", "text"): ["data.path={folder}/a.csv", *CLASSIFIER],
    ("data", "image"): ["data.path={folder}/a.npz"],
    ("data", "hf"): ["data.path=glue", *CLASSIFIER],
    ("model", "hf_classifier"): ["data=text", "data.path={folder}/a.csv", *CLASSIFIER],
    ("model", "hf_causal"): [
        "data=text",
        "data.path={folder}/a.csv",
        "data.text=sentence",
        "model.config={{model_type: llama}}",
        "model.tokenizer_name={folder}/tokenizer.json",
    ],
    ("data", "random_tokens"): ["model=hf_classifier"],
    ("data", "quadratic"): [*POINT, "data.targets=[[0],[3],[9]]", "num_clients=3"],
    ("data", "least_squares"): POINT,
    ("model", "point"): ["data=least_squares", *POINT],
    ("partition", "natural"): ["partition.column=label"],
    ("partition", "on_devices"): [
        "engine=deployment",
        "data=text",
        "data.path={folder}/a.csv",
        "data.classes=[0,1]",
        *CLASSIFIER,
    ],
    ("privacy", "sample"): ["privacy.epsilon=3"],
    ("privacy", "client"): ["privacy.epsilon=3", "strategy.weighting=uniform"],
    ("experiment", "fed_sb_gaussians_private"): ["privacy.epsilon=3"],
    ("experiment", "nli_private"): ["data.path={folder}/a.csv", "privacy.epsilon=3"],
    ("experiment", "sst2_audit"): ["data.path={folder}/a.csv", "privacy.epsilon=3"],
    ("experiment", "sst2_fed_sb"): ["data.path={folder}/a.csv"],
    ("experiment", "sst2_fed_sb_econtrol"): ["data.path={folder}/a.csv"],
    ("experiment", "sst2_fed_sb_uncompressed"): ["data.path={folder}/a.csv"],
    ("experiment", "sst2_frl"): ["data.path={folder}/a.csv"],
    ("experiment", "cifar10_fedau"): ["data.path={folder}/a.npz"],
    ("experiment", "cifar10_fedavg"): ["data.path={folder}/a.npz"],
    ("experiment", "shakespeare"): [
        "data.path={folder}/a.csv",
        "model.tokenizer_name={folder}/tokenizer.json",
    ],
    ("experiment", "gsm8k"): [
        "data.path={folder}/a.csv",
        "model.tokenizer_name={folder}/tokenizer.json",
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (tmp_path / "a.npz").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configure(overrides)
    return caught.value.problems


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(group: str, option: str, folder: Path) -> None:
    extra = [text.format(folder=folder) for text in NEEDED.get((group, option), [])]
    experiment = configure([f"{group}={option}", *extra])
    assert isinstance(experiment, Experiment)
    assert group == "experiment" or group in experiment.resolved


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_default_stands_in_the_yaml(group: str, option: str) -> None:
    node = OmegaConf.load(FOLDER / group / f"{option}.yaml")
    assert group == "experiment" or "_target_" in node


def test_the_default_is_fed_sb_on_rotated_digits() -> None:
    experiment = configure([])
    assert type(experiment.strategy).__name__ == "FedSB"
    assert type(experiment.adapter).__name__ == "LoRASB"
    assert experiment.data.rotate == 90
    assert experiment.privacy is None


@pytest.mark.parametrize(
    ("overrides", "adapter"),
    [
        ([], "LoRASB"),
        (["strategy=fedavg"], "Full"),
        (["strategy=fedit"], "LoRA"),
        (["strategy=ffa_lora"], "FFA"),
        (["adapter=lora", "strategy=fedavg"], "LoRA"),
        (["strategy=fedprox", "adapter=lora_xs"], "LoRAXS"),
        (["experiment=bench_w1"], "Full"),
        (["experiment=bench_w1", "strategy=fed_sb"], "LoRASB"),
        (["experiment=bench_w1", "adapter=lora"], "LoRA"),
    ],
)
def test_a_strategy_implies_its_adapter_unless_one_is_chosen(
    overrides: list[str], adapter: str
) -> None:
    assert type(configure(overrides).adapter).__name__ == adapter


def test_an_experiment_sets_root_keys_and_overrides_beat_it() -> None:
    assert configure(["experiment=bench_w1"]).num_clients == 1000
    assert configure(["experiment=bench_w1", "num_clients=200"]).num_clients == 200
    assert configure(["experiment=bench_w1", "experiment=null"]).num_clients == 100


def test_a_resolved_configuration_builds_the_same_experiment() -> None:
    experiment = configure(["strategy=fedadam", "client.lr=1e-3", "seed=${rounds}", "rounds=7"])
    assert experiment.seed == 7
    again = build(experiment.resolved, experiment.overrides)
    assert again == experiment


REFUSALS = {
    "rouns=3": "rouns=3: no such key; did you mean rounds?",
    "strategy.cutof=20": "strategy.cutof=20: no such key in strategy=fed_sb",
    "strategy.mu=1": "strategy.mu=1: no such key in strategy=fed_sb; strategy=fedprox has it",
    "strategy=fedagv": "strategy=fedagv: no such option...did you mean strategy=fedavg?",
    "experiment=nothing_like_it": "no such option; experiment is ",
    "client=null": "client=null: no such option; client is default",
    "lr=0.1": "lr=0.1: no such key; did you mean client.lr?",
    "client.lrr=1": "did you mean client.lr?",
    "evaluate.evry=1": "did you mean evaluate.every?",
    "+new.key=1": "new.key=1: no such key",
    "+strategy.seed=1": "strategy.seed=1: no such key in strategy=fed_sb",
    "zzz=1": "zzz=1: no such key; `fedsys run --help` lists them",
    "tracker.url=x": "tracker.url=x: no such key in tracker=none; it has no keys",
    "evaluate=3": "evaluate=3: has keys of its own; set evaluate.every, evaluate.clients and",
    "client={lr: 1}": "client: write client.key=value for each key",
    "rounds=[1,2": "rounds=[1,2: ...quotes",
    "rounds": "rounds: write key=value",
    "=3": "=3: write key=value",
    "rounds=1,2": "rounds=1,2: a run takes one value; write a list as rounds=[a,b]",
    "~rounds": "~rounds: keys cannot be removed",
    "~tracker": "write tracker=none",
    "+experiment=bench_w1": "experiment is there already; write it without the +",
    "strategy@other=fedavg": "without @",
    "hydra.verbose=true": "no settings of Hydra's own",
    "rounds=0": "rounds=0: must be at least 1",
    "rounds=many": "rounds=many: must be a whole number",
    "rounds=2.5": "rounds=2.5: must be a whole number",
    "rounds=null": "rounds=null: must be a whole number",
    "rounds=${nothing}": "rounds: ...nothing",
    "rounds=???": "rounds: must be given",
    "num_clients=-1": "num_clients=-1: must be at least 1",
    "seed=-1": "seed=-1: must be at least 0",
    "timeout=inf": "timeout=inf: must be a positive number of seconds",
    "device=gpu": "device=gpu: must be auto, cpu, cuda, cuda:N or mps",
    "dtype=float16": "dtype=float16: must be float32, bfloat16 or float64",
    "on_client_error=ignore": "on_client_error=ignore: must be skip or fail",
    "allow=my_module": "allow=my_module: must be a list, each a text",
    "allow=[1x]": "must be a list of names of modules",
    "evaluate.every=-1": "evaluate.every=-1: must be at least 0",
    "evaluate.clients=1": "evaluate.clients=1: must be true or false",
    "checkpoint.keep=0": "checkpoint.keep=0: must be at least 1",
    "client.lr=fast": "client.lr=fast: must be a number",
    "client.lr=nan": "client.lr=nan: must be a number",
    "client.lr=-1": "client.lr must be positive, got -1",
    "client.optimizer=sdg": "client.optimizer=sdg: must be sgd, adam or adamw",
    "client.steps=x": "client.steps=x: must be a whole number or null",
    "participation.cohort=101": "participation.cohort=101: must be at most num_clients=100",
    "data=text": "data.path: must be given",
    "data.rotate=17": "data.rotate is in degrees, a multiple of 90, got 17",
    "adapter=full": "strategy=fed_sb with adapter=full: ...needs adapter=lora_sb",
    "adapter.init=public": "adapter.init=public needs data.public_fraction above 0",
    "model=hf_classifier": "data=digits with model=hf_classifier: images need model=mlp",
    "strategy._target_=os.system": "only classes of fedsys, strategies and clients may be named",
    "strategy._target_=fedsys.no.Class": "No module named 'fedsys.no'",
    "strategy._target_=strategies.FedAv": "strategies has no such class; did you mean FedAvg?",
    "strategy._target_=fedsys.strategy.log": "fedsys.strategy has no such class",
    "strategy._target_=fedsys.data.Digits": "cannot be used as strategy",
    "strategy._target_=fedsys.errors.ConfigError": "must be a dataclass",
    "strategy._target_=null": "strategy: must name a class",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusal(override: str) -> None:
    (line,) = problems(override)
    parts = [re.escape(part) for part in REFUSALS[override].split("...")]
    assert re.search(".*".join(parts), line)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["strategy=fedit", "adapter=ffa"], "strategy=fedit with adapter=ffa: .*adapter=lora$"),
        (["strategy=ffa_lora", "adapter=lora"], "strategy=ffa_lora with adapter=lora: "),
        (["strategy=fedavg", "dtype=bfloat16"], "dtype=bfloat16 is for the frozen base"),
        (
            ["data=text", "data.path={folder}/a.csv", "data.text=sentence"],
            "data=text with model=mlp: text needs model=hf_classifier",
        ),
        (
            ["data=text", "data.path={folder}/a.csv", "data.text=t", "model=hf_classifier"],
            "model=hf_classifier needs data.label",
        ),
        (
            [
                *["data=text", "data.path={folder}/a.csv", "data.text=t", "data.label=l"],
                *["model=hf_causal", "model.config={{model_type: llama}}"],
                "model.tokenizer_name={folder}/tokenizer.json",
            ],
            "data.label=l with model=hf_causal: a causal model continues text",
        ),
        (
            ["data=text", "data.path={folder}/no.csv", *CLASSIFIER],
            "data.path: there is no file .*no.csv",
        ),
    ],
)
def test_refused_combination(overrides: list[str], reason: str, folder: Path) -> None:
    (line,) = problems(*(text.format(folder=folder) for text in overrides))
    assert re.search(reason, line)


UNIFORM = ["strategy=fedavg", "strategy.weighting=uniform"]
CAUSAL = [text for text in NEEDED["model", "hf_causal"] if not text.startswith("model=")]
# Each is refused, in one line that this is found in.
CONFLICTS = [
    # adapters
    (
        ["strategy=fedex_lora", "adapter=ffa"],
        "strategy=fedex_lora with adapter=ffa: it averages the factors B and A of LoRA;"
        " it needs adapter=lora",
    ),
    (["strategy=flora", "adapter=full"], "strategy=flora with adapter=full: it stacks the factors"),
    (
        ["strategy=frl", "adapter=lora"],
        "strategy=frl with adapter=lora: it votes on rankings of frozen random weights;"
        " it needs adapter=supermask",
    ),
    (
        ["strategy=fedavg", "adapter=supermask"],
        "strategy=fedavg with adapter=supermask: the mean of scores is no ranking;"
        " it needs strategy=frl",
    ),
    (
        ["strategy=fedavg", "adapter=lora_sb"],
        "strategy=fedavg with adapter.init=client_sum: only strategy=fed_sb runs",
    ),
    (
        ["strategy=flora", "dtype=bfloat16"],
        "strategy=flora with dtype=bfloat16: the base moves by less than bfloat16 can hold",
    ),
    # compression
    (
        ["strategy=econtrol", "compression=none"],
        "strategy=econtrol needs a compression with compression.feedback=econtrol",
    ),
    (
        ["strategy=econtrol", "compression=topk"],
        "strategy=econtrol with compression=topk: it needs compression.feedback=econtrol, got ec",
    ),
    (
        ["strategy=frl", "compression=sign"],
        "strategy=frl with compression=sign: rankings are packed",
    ),
    (
        ["strategy=flora", "compression=int8"],
        "strategy=flora with compression=int8: factors that begin afresh each round have no change",
    ),
    *(
        (
            [f"strategy={strategy}", "compression=topk", "compression.feedback=ef21"],
            f"strategy={strategy} with compression.feedback=ef21: the server's h is the mean over"
            " all clients with fixed, equal weights; compression.feedback=ec composes",
        )
        for strategy in ("fedau", "average_all", "known_prob", "mifa", "fedvarp")
    ),
    (
        ["strategy=fedex_lora", "strategy.weighting=uniform", "compression=topk_econtrol"],
        "strategy=fedex_lora with compression.feedback=econtrol: the mean of all h_n stands in for"
        " the updates that the residual is of; compression.feedback=ec composes",
    ),
    (
        ["strategy=fedadam", "compression=topk_econtrol"],
        "strategy=fedadam with compression.feedback=econtrol: .*; set strategy.weighting=uniform",
    ),
    (
        ["strategy=fedex_lora", "defence=trimmed_mean"],
        "strategy=fedex_lora with defence=trimmed_mean: it leaves one update, of which there is",
    ),
    (
        [*UNIFORM, "compression=sign", "compression.feedback=ef21m", "defence=median"],
        "defence=median with compression.feedback=ef21m: what the defence changes or leaves out",
    ),
    # attacks and defences
    (
        ["strategy=frl", "attack=scale"],
        "strategy=frl with attack=scale: clients send rankings; attack=reverse_rank or label_flip",
    ),
    (
        ["strategy=fedavg", "attack=reverse_rank"],
        "strategy=fedavg with attack=reverse_rank: it reverses rankings, which only strategy=frl",
    ),
    (
        ["strategy=flora", "attack=alie"],
        "strategy=flora with attack=alie: clients send factors, not a change; .*attack=label_flip",
    ),
    (
        [*CAUSAL, "model=hf_causal", "strategy=fedavg", "attack=label_flip"],
        "attack=label_flip with model=hf_causal: no labels to flip",
    ),
    (
        ["data=least_squares", *POINT, "attack=label_flip"],
        "attack=label_flip with data=least_squares: its labels are vectors to hit, not classes",
    ),
    (
        ["data=quadratic", *NEEDED["data", "quadratic"], "attack=label_flip"],
        "attack=label_flip with data=quadratic: its labels are vectors to hit, not classes",
    ),
    (
        ["strategy=frl", "defence=trimmed_mean"],
        "strategy=frl with defence=trimmed_mean: a ranking bounds each vote already",
    ),
    (
        ["strategy=flora", "defence=norm_clip"],
        "strategy=flora with defence=norm_clip: factors of different clients cannot be compared",
    ),
    (
        ["strategy=mifa", "defence=krum"],
        "strategy=mifa with defence=krum: it weighs each client by itself, which needs every"
        " update; defence=norm_clip composes",
    ),
    # ranges
    (["attack=scale", "attack.fraction=1"], r"fraction of malicious clients is in \[0, 1\), got 1"),
    (["attack=gaussian", "attack.factor=0"], "factor is a standard deviation above 0, got 0"),
    (
        ["strategy=frl", "attack=reverse_rank", "attack.fraction=0.5"],
        "honest_majority needs a fraction of malicious clients below 0.5, got 0.5",
    ),
    (["attack=min_max", "attack.perturbation=odd"], "perturbation=odd: must be unit, sign or std"),
    (["defence=krum", "defence.selected=0"], "selected counts updates and is at least 1, got 0"),
    (["defence=norm_clip", "defence.clipping_norm=0"], "clipping_norm must be positive, got 0"),
    (["compression=randk", "compression.ratio=0"], r"ratio must be in \(0, 1\], got 0"),
    (["compression=sign", "compression.eta=2"], r"eta must be in \[0, 1\], got 2"),
    (["compression=int8", "compression.feedback=ef"], "feedback=ef: must be none, ec, ef21, ef21m"),
    (["strategy=frl", "strategy.send=0"], r"send is a fraction in \(0, 1\], got 0"),
    (["strategy=flora", "strategy.ranks=[4,0]"], r"ranks are at least 1, got \[4, 0\]"),
    (["participation=markov", "participation.activation=0"], "activation is a probability in"),
]


@pytest.mark.parametrize(
    ("overrides", "reason"), CONFLICTS, ids=[" ".join(overrides) for overrides, _ in CONFLICTS]
)
def test_refused_method(overrides: list[str], reason: str, folder: Path) -> None:
    (line,) = problems(*(text.format(folder=folder) for text in overrides))
    assert re.search(reason, line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=fedau", "compression=topk", "attack=scale", "defence=norm_clip"],
        ["strategy=mifa", "compression=int8", "attack=label_flip"],
        ["strategy=fedadam", "strategy.weighting=uniform", "compression=topk_econtrol"],
        ["strategy=econtrol", "adapter=lora", "participation=markov", "attack=sign_flip"],
        ["strategy=fed_sb", "compression=sign", "compression.feedback=ef21"],
        ["strategy=fedex_lora", "compression=topk", "defence=multi_krum", "attack=alie"],
        ["strategy=flora", "attack=label_flip", "participation=bernoulli"],
        ["strategy=frl", "attack=label_flip", "strategy.send=0.5"],
        ["strategy=frl", "attack=reverse_rank", "adapter.rank=4"],
        ["strategy=fedprox", "adapter=lora_xs", "compression=randk", "defence=multi_krum"],
    ],
    ids=" ".join,
)
def test_what_composes(overrides: list[str]) -> None:
    assert isinstance(configure(overrides), Experiment)


def test_all_problems_are_told_at_once() -> None:
    found = "\n".join(
        problems(
            *["strategy.cutof=20", "rouns=3", "strategy=fedagv", "rounds=0", "client.lr=-1"],
            *["client.batch_size=0", "client.optimizer=sdg", "participation.cohort=500"],
        )
    )
    for text in (
        "strategy.cutof=20: no such key in strategy=fedavg",
        "rouns=3: ",
        "strategy=fedagv: ",
        "rounds=0: ",
        "client.lr must be positive",
        "client.batch_size must be at least 1",
        "client.optimizer=sdg: ",
        "participation.cohort=500: ",
    ):
        assert text in found
    assert found.count("\n") == 7


def test_a_folder_that_is_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (line,) = problems(f"out={tmp_path}")
    assert "new or empty folder" in line
    assert f"fedsys resume {tmp_path}" in line


def test_a_new_run_never_shares_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = configure([]).out
    first.mkdir(parents=True)
    assert configure([]).out != first


def test_unknown_keys_of_a_saved_configuration_are_refused() -> None:
    saved = configure([]).resolved
    saved["rouns"] = 3
    saved["client"]["lrr"] = 3
    with pytest.raises(ConfigError) as caught:
        build(saved)
    assert len(caught.value.problems) == 2


def test_a_misspelt_key_costs_no_heavy_import() -> None:
    code = (
        "import sys\nfrom fedsys.config import configure\n"
        "try: configure(['rouns=3'])\nexcept ValueError: pass\n"
        "print({'torch', 'flwr', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_no_text_breaks_the_composition(text: str) -> None:
    assert OmegaConf.is_dict(examine([text]).config)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A class of the user's in the current directory, and what names it."""
    (tmp_path / "users_own.py").write_text(
        "from dataclasses import dataclass\n"
        "from strategies.fedavg import FedAvg\n\n\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(FedAvg):\n"
        "    sharpness: int = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    return ["strategy._target_=users_own.Mine", "allow=[users_own]", "adapter=lora"]


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_class_of_the_users(mine: list[str], plus: str) -> None:
    strategy = configure([*mine, f"{plus}strategy.sharpness=5"]).strategy
    assert (type(strategy).__name__, strategy.sharpness) == ("Mine", 5)  # type: ignore[attr-defined]


def test_a_class_of_the_users_is_rebuilt_from_the_saved_configuration(mine: list[str]) -> None:
    experiment = configure([*mine, "strategy.sharpness=5"])
    assert build(experiment.resolved).strategy == experiment.strategy


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("strategy.sharpnes=5", "Mine has no such field; did you mean sharpness"),
        ("strategy.sharpness=high", "strategy.sharpness=high: must be a whole number"),
        ("strategy.seed=5", "Mine has no such field"),
        ("allow=[]", r"allow your own with allow=\[users_own\]"),
    ],
)
def test_a_class_of_the_users_is_checked_as_well(
    mine: list[str], override: str, reason: str
) -> None:
    (line,) = problems(*mine, override)
    assert re.search(reason, line)


def test_compose_raises_what_it_found() -> None:
    with pytest.raises(ConfigError, match="did you mean rounds"):
        compose(["rouns=3"])
