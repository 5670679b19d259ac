"""Hugging Face models, unchanged inside a thin module that returns their logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedsys.models import hub
from fedsys.models.tokenizer import load_tokenizer
from fedsys.seeds import forked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedsys.data import Dataset


class Logits(nn.Module):
    """A Hugging Face model called with a batch's tensors that returns its logits.

    ``backbone`` is the model as transformers built it; the name of a parameter here is ``prefix``
    and its name there.
    """

    prefix: ClassVar[str] = "backbone."

    def __init__(
        self,
        backbone: "PreTrainedModel",
        attention: str,
        heads: tuple[str, ...] = (),
        prefix_cache_mb: int = 0,
    ) -> None:
        """Wrap ``backbone``; ``attention`` is what the user asked for, ``heads`` are full names."""
        super().__init__()
        self.prefix_cache_mb = prefix_cache_mb
        self.backbone = backbone
        self.attention = attention
        self.heads = heads

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits of shape (rows, classes), or (rows, length, vocabulary)."""
        return self.backbone(**inputs).logits  # type: ignore[no-any-return]


class MeanPooled(Logits):
    """An encoder and a linear ``classifier`` on the mean of its last hidden states."""

    def __init__(
        self, backbone: "PreTrainedModel", attention: str, classes: int, prefix_cache_mb: int = 0
    ) -> None:
        """Wrap ``backbone`` and draw the classifier from torch's global generator."""
        super().__init__(backbone, attention, ("classifier",), prefix_cache_mb)
        self.classifier = nn.Linear(backbone.config.get_text_config().hidden_size, classes)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits of shape (rows, classes); padding has no part in the mean."""
        hidden = self.backbone(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        # A row without tokens only fills a batch up; its mean is zero.
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.classifier(pooled)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class _HuggingFace:
    """What both tasks share: where weights and tokenizer come from, and how the model runs."""

    name: str | None = None  # folder, hub id, or "minilm"
    revision: str | None = None  # of the hub id
    config: dict[str, Any] | None = None  # model_type and sizes of a model with random weights
    tokenizer_name: str | None = None  # folder, hub id or tokenizer.json; None: that of the model
    attention: str = "auto"  # or a name transformers knows: sdpa, eager, fedsys_bmm, ...
    gradient_checkpointing: bool = False
    prefix_cache_mb: int = 1024  # memory for what frozen blocks below the adapters make of rows

    pads: ClassVar[bool] = True  # whether the model itself looks for padding, by its id

    def __post_init__(self) -> None:
        """Refuse a model from two places, and one without a vocabulary."""
        if self.name is not None and self.config is not None:
            raise ValueError(
                f"name and config exclude each other, got name={self.name}: "
                "set name=null to build a model with random weights from config"
            )
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config must name a model_type, such as bert, llama or gpt2")
        if self.config is not None and self.tokenizer_name is None:
            raise ValueError("config needs tokenizer_name: a folder, hub id or tokenizer.json")
        if self.prefix_cache_mb < 0:
            raise ValueError(f"prefix_cache_mb must not be negative, got {self.prefix_cache_mb}")

    def check(self) -> list[str]:
        """Return what is missing, without loading any weights."""
        if self.name is None and self.config is None:
            return ["model.name: a folder or hub id is needed (or model.config)"]
        return [
            f"model.{key}: {problem}"
            for key, place in (("name", self.name), ("tokenizer_name", self.tokenizer_name))
            if place is not None
            and (problem := hub.problem(place, self.revision, weights=key == "name"))
        ]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the tokenizer, with a padding token."""
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name, None, "model.tokenizer_name")
        return load_tokenizer(self._name(), self.revision, "model.name")

    def _name(self) -> str:
        if self.name is None:
            raise ValueError(self.check()[0])
        return self.name

    def _configuration(self) -> "PreTrainedConfig":
        """Return the model's configuration, with the tokenizer's ids and without dropout."""
        tokenizer = self.tokenizer()
        if self.config is None:
            config, needed = hub.configuration(self._name(), self.revision), tokenizer.pad_token_id
        else:
            config, needed = hub.fresh_configuration(self.config, tokenizer), len(tokenizer) - 1
        text = config.get_text_config()
        if needed >= text.vocab_size:
            raise ValueError(
                f"model.tokenizer_name: the tokenizer gives token ids up to {needed}, and the "
                f"model has a vocabulary of {text.vocab_size}; "
                "take a tokenizer that fits and has a padding token"
            )
        if self.pads:
            config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
        _drop_nothing(config)
        config.use_cache = False
        return config

    def _load(self, auto: Any, config: "PreTrainedConfig") -> tuple["PreTrainedModel", set[str]]:
        """Return the model of class ``auto`` and the names of its untrained parameters."""
        attention = None if self.attention == "auto" else self.attention
        if self.config is None:
            model, untrained = hub.model(auto, self._name(), self.revision, config, attention)
        else:
            model = hub.fresh_model(auto, config, attention)
            body = {id(parameter) for parameter in model.base_model.parameters()}
            untrained = {name for name, p in model.named_parameters() if id(p) not in body}
        for module in model.modules():
            if isinstance(module, _DropoutNd):  # a rate that is in no configuration
                module.p = 0.0
        if self.gradient_checkpointing:
            # The older name is the one that older versions of transformers know.
            enable = getattr(model, "activation_checkpointing_enable", None)
            enable = enable or model.gradient_checkpointing_enable
            # Not the re-entrant kind, which passes no gradient on from a frozen embedding.
            enable({"use_reentrant": False})
        return model.train(), untrained


@dataclass(frozen=True, kw_only=True)
class HFClassifier(_HuggingFace):
    """A pretrained encoder or decoder with a head for the classes of the data."""

    pooling: str = "head"  # transformers' own head; "mean": a linear layer on the mean token

    def __post_init__(self) -> None:
        """Refuse a pooling that does not exist."""
        super().__post_init__()
        if self.pooling not in ("head", "mean"):
            raise ValueError(f"pooling must be head or mean, got {self.pooling}")

    def build(self, dataset: "Dataset", seed: int) -> nn.Module:
        """Return the model with ``dataset.num_classes`` outputs."""
        if dataset.num_classes is None:
            raise ValueError("model=hf_classifier needs data with classes, and these have none")
        config = self._configuration()
        config.num_labels = dataset.num_classes
        with forked(seed, "model"):
            if self.pooling == "mean":
                return self._mean(config, dataset.num_classes)
            return self._head(config)

    def _head(self, config: "PreTrainedConfig") -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model, untrained = self._load(AutoModelForSequenceClassification, config)
        owners = dict.fromkeys(
            Logits.prefix + name.rpartition(".")[0]
            for name, _ in model.named_parameters()
            if name in untrained
        )
        return Logits(model, self.attention, tuple(owners), self.prefix_cache_mb)

    def _mean(self, config: "PreTrainedConfig", classes: int) -> nn.Module:
        from transformers import AutoModel

        model, _ = self._load(AutoModel, config)
        if getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)  # its parameters would get no gradient
        return MeanPooled(model, self.attention, classes, self.prefix_cache_mb)


@dataclass(frozen=True, kw_only=True)
class HFCausal(_HuggingFace):
    """A decoder that predicts the next token at every position."""

    # The attention mask says what padding is. An id would keep the embedding of that token from
    # learning, and it may be the token that ends a text.
    pads: ClassVar[bool] = False

    def build(self, dataset: "Dataset", seed: int) -> nn.Module:
        """Return the model; its logits are (rows, length, vocabulary), not shifted."""
        from transformers import AutoModelForCausalLM

        if dataset.num_classes is not None:
            raise ValueError("model=hf_causal predicts tokens, and the data have class labels")
        with forked(seed, "model"):
            model, untrained = self._load(AutoModelForCausalLM, self._configuration())
        if untrained and self.config is None:
            raise ValueError(
                f"model.name: {self.name} lacks weights that a causal model needs, such as "
                f"{min(untrained)}; is it an encoder?"
            )
        return Logits(model, self.attention, prefix_cache_mb=self.prefix_cache_mb)


def _drop_nothing(config: "PreTrainedConfig") -> None:
    """Set every dropout rate to zero: clients that share a pass would share its random draws."""
    for name, value in config.to_dict().items():
        # Such as attention_dropout, resid_pdrop and layerdrop.
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _drop_nothing(part)
