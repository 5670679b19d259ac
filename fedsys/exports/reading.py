"""Reading an export back, without PEFT, and checking that it is the model that was trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsys.adapters.lowrank import LowRank, is_transposed, weight_of
from fedsys.data.examples import Batch
from fedsys.errors import RunError
from fedsys.exports.layout import ADAPTER, ADAPTER_CONFIG, HEAD, PEFT_PREFIX, WHOLE, prefix_of
from fedsys.exports.staging import MARK
from fedsys.models import hub
from fedsys.models.huggingface import Logits
from fedsys.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest difference of two logits, as a share of the largest logit.
TOLERANCE = 1e-4
_COARSE = {"bfloat16": 0.15, "float16": 0.02}  # rounding alone gives MiniLM 0.035 in bfloat16

Shapes = dict[str, torch.Size]


def check_export(
    fresh_model: nn.Module,
    folder: Path,
    model_logits: Tensor,
    batch: Batch,
    tolerance: float | None = None,
) -> None:
    """Raise ``RunError`` unless the export in ``folder`` gives ``model_logits`` on ``batch``.

    ``fresh_model`` is the base model as it was before its adapters were attached, and is changed in
    place. ``tolerance`` is relative to the largest logit; None: 1e-4, or 0.02 and 0.15 where either
    model has a base in float16 and bfloat16.
    """
    read_export(fresh_model, folder)
    if tolerance is None:
        trained = _read_json(folder / MARK, "dtype")["dtype"]
        dtypes = {str(p.dtype).removeprefix("torch.") for p in fresh_model.parameters()}
        tolerance = max(_COARSE.get(dtype, TOLERANCE) for dtype in {trained, *dtypes})
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = fresh_model(**inputs)
    if logits.shape != model_logits.shape:
        raise RunError(
            f"the model in {folder} has logits of shape {tuple(logits.shape)}, "
            f"and the trained one of shape {tuple(model_logits.shape)}"
        )
    found, expected = logits.double().cpu(), model_logits.detach().double().cpu()
    if found.dim() == 3 and "attention_mask" in inputs:
        real = inputs["attention_mask"].bool().cpu()
        found, expected = found[real], expected[real]
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= tolerance * scale:  # also where one is not finite
        raise RunError(
            f"the model in {folder} is not the one that was trained: their logits differ by up to "
            f"{difference:.3g}, where {tolerance * scale:.3g} is allowed"
        )


def read_export(model: nn.Module, folder: Path) -> None:
    """Put the export in ``folder`` into the fresh base ``model``, in place.

    An adapter becomes plain LoRA beside the base's layers; a whole model replaces every weight.
    Raises ``RunError`` naming each tensor that is missing, unexpected or of another shape.
    """
    prefix = prefix_of(model)
    shapes = {n: t.shape for n, t in model.state_dict().items() if not n.startswith(prefix)}
    core = model.backbone if isinstance(model, Logits) else model
    if (folder / ADAPTER_CONFIG).is_file():
        _read_lora(core, folder)
    elif isinstance(model, Logits):
        _read_pretrained(model.backbone, folder)
    else:
        expected = {name: tensor.shape for name, tensor in core.state_dict().items()}
        core.load_state_dict(_read(folder / WHOLE, expected))
    if shapes or (prefix and (folder / HEAD).exists()):
        model.load_state_dict(_read(folder / HEAD, shapes), strict=False)


def _read_lora(core: nn.Module, folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    config = _read_json(path, "target_modules", "modules_to_save", "r", "lora_alpha")
    targets, saved, rank = config["target_modules"], config["modules_to_save"] or [], config["r"]
    modules = dict(core.named_modules())
    linear = {n for n, m in modules.items() if type(m) is nn.Linear or is_transposed(m)}
    for name in (*(set(targets) - linear), *(set(saved) - modules.keys())):
        raise RunError(f"{path} names {name}, and the model has no such layer")
    shapes: Shapes = {}
    for name in targets:
        out, inside = weight_of(modules[name]).shape
        shapes[f"{name}.lora_A.weight"] = torch.Size((rank, inside))
        shapes[f"{name}.lora_B.weight"] = torch.Size((out, rank))
    for name in saved:
        shapes |= {f"{name}.{n}": t.shape for n, t in modules[name].state_dict().items()}
    found = _read(folder / ADAPTER, {PEFT_PREFIX + name: shape for name, shape in shapes.items()})
    for name in targets:
        layer = LowRank(modules[name], rank, config["lora_alpha"] / rank, middle=False)
        for factor, module in (("A", layer.A), ("B", layer.B)):
            weight = found.pop(f"{PEFT_PREFIX}{name}.lora_{factor}.weight")
            # Not in the dtype of the base, which may be coarser.
            module.weight = nn.Parameter(weight.to(weight_of(layer.base).device), False)
        core.set_submodule(name, layer)
    core.load_state_dict({n.removeprefix(PEFT_PREFIX): t for n, t in found.items()}, strict=False)


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return the object in ``path``, which must have ``keys``."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise RunError(f"{path} must be an object with {', '.join(keys)}")
    return found


def _read_pretrained(backbone: "PreTrainedModel", folder: Path) -> None:
    kind: Any = type(backbone)
    try:
        with hub._quiet():
            found, info = kind.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be read: {error}") from error
    expected = backbone.state_dict()
    state = {name: tensor for name, tensor in found.state_dict().items() if name in expected}
    absent = expected.keys() - state.keys() | expected.keys() & info["missing_keys"]
    resized = [name for name, *_ in info["mismatched_keys"]]
    resized += [n for n, tensor in state.items() if tensor.shape != expected[n].shape]
    _refuse(folder, absent - set(resized), info["unexpected_keys"], set(resized))
    backbone.load_state_dict(state)


def _read(path: Path, expected: Shapes) -> Params:
    """Return the tensors in ``path``, which must have exactly these names and shapes."""
    try:
        found: Params = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    common = expected.keys() & found.keys()
    resized = {name for name in common if found[name].shape != expected[name]}
    _refuse(path, expected.keys() - found.keys(), found.keys() - expected.keys(), resized)
    return found


def _refuse(path: Path, missing: set[str], unexpected: set[str], resized: set[str]) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": resized}
    wrong = [f"{name} is {kind}" for kind, names in kinds.items() for name in sorted(names)]
    if wrong:
        more = f" and {len(wrong) - 5} more are wrong" if len(wrong) > 5 else ""
        raise RunError(f"{path} does not fit the model: {'; '.join(wrong[:5])}{more}")
