"""How to load an export, as its README.md says it."""

from torch import nn

from fedsys.exports.layout import ADAPTER, CAUSAL, CLASSIFIER, ENCODER, HEAD, WHOLE, task
from fedsys.models.huggingface import Logits, MeanPooled

_AUTO = {
    CLASSIFIER: "AutoModelForSequenceClassification",
    CAUSAL: "AutoModelForCausalLM",
    ENCODER: "AutoModel",
}
_HEAD_LINES = [
    "",
    "# The classifier takes the mean of the last hidden states over the real tokens.",
    "from safetensors.torch import load_file",
    f'head = load_file(FOLDER + "/{HEAD}")',
    "hidden = model(**batch).last_hidden_state",
    'mask = batch["attention_mask"].unsqueeze(-1)',
    "pooled = (hidden * mask).sum(1) / mask.sum(1)",
    'logits = pooled @ head["classifier.weight"].T + head["classifier.bias"]',
]


def readme(model: nn.Module, base_name: str | None, *, adapter: bool) -> str:
    """Return the README.md of an export of ``model``."""
    lines = ["# Adapter" if adapter else "# Model", "", "Trained and exported by fedsys.", ""]
    if not isinstance(model, Logits):
        what = ADAPTER if adapter else WHOLE
        return "\n".join(
            [*lines, f"`fedsys.exports.read_export(model, folder)` reads `{what}`.", ""]
        )
    auto = _AUTO[task(model) or ENCODER]
    config = model.backbone.config
    options = ""
    if auto == _AUTO[CLASSIFIER]:
        options += f", num_labels={config.num_labels}"
    if auto != _AUTO[CAUSAL]:  # where padding begins, the models look for this id
        options += f", pad_token_id={config.pad_token_id}"
    base = repr(base_name) if base_name else "BASE"
    lines += ["```python", f"from transformers import {auto}", ""]
    if adapter:
        lines += [
            "from peft import PeftModel",
            f"base = {auto}.from_pretrained({base}{options})",
            "model = PeftModel.from_pretrained(base, FOLDER).eval()",
        ]
    else:
        lines += [f"model = {auto}.from_pretrained(FOLDER).eval()"]
    if isinstance(model, MeanPooled):
        lines += _HEAD_LINES
    return "\n".join([*lines, "```", ""])
