"""Attention written as two matrix products, for bfloat16 on the CPU.

There the backward of torch's ``scaled_dot_product_attention`` costs more than all else in a model.
transformers looks attention up by name, so models need no change; the function that builds the mask
is looked up by the same name and must be registered too, or padding is attended to.
"""

from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "fedsys_bmm"


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Return softmax(scaling * query key^T + mask) value.

    Tensors are (rows, heads, length, dim), the mask broadcasts to (rows, heads, length, length) and
    is either boolean, true where a position may be attended to, or added to the scores.
    """
    scores = torch.matmul(query * scaling, key.transpose(-2, -1))
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: a row that is padding throughout would come out as NaN.
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + bias.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1), value)


def choose_attention(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Switch a model built with ``attention="auto"`` to what is fastest for dtype and device.

    To be called after the model was cast and moved; models of other kinds are left alone.
    """
    if getattr(model, "attention", None) != "auto":
        return
    slow = dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    wanted = {"sdpa": ATTENTION} if slow else {ATTENTION: "sdpa"}
    register()
    backbone: Any = model.get_submodule("backbone")
    # Some models cannot be run with sdpa, and for the same reason not with ours.
    current = backbone.config._attn_implementation
    backbone.set_attn_implementation(wanted.get(current, current))


def register() -> None:
    """Make ``fedsys_bmm`` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Do what transformers asks of an attention function; the result is (rows, length, heads, dim).

    Dropout is not supported, nor are variants that change the scores.
    """
    variants = ("position_bias", "softcap", "s_aux")
    unsupported = [name for name in variants if kwargs.get(name) is not None]
    if dropout or unsupported:
        what = " and ".join(unsupported or ["dropout"])
        raise ValueError(f"attention={ATTENTION} has no {what}: set model.attention to eager")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    length, seen = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and length > 1:
        # As for sdpa, no mask stands for the plain causal one.
        attention_mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(
            seen - length
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
