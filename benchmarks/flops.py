"""How many floating point operations a round needs."""

import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import Work


def flop_of_round(work: Work) -> int:
    """Return the operations of a round's matrix products, forward and backward.

    One step of the plain model is run and its products are counted as autograd asks for them, two
    operations for each multiplication and addition. A frozen layer is counted forward and, where
    something below it is trained, for the gradient of its input; never for that of its weight.
    Attention counts as its two products and their gradients. What is not a product of matrices
    (activations, norms, the optimizer, clipping) is left out.
    """
    batch = work.plan[0, 0, 0]
    _attention_as_products(work)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(work.model(work.inputs[batch]), work.labels[batch]).backward()
    steps: int = work.plan[0].shape[:2].numel()
    return steps * int(counter.get_total_flops())


def _attention_as_products(work: Work) -> None:
    # A fused kernel computes the scores again in its backward, and not every one is counted.
    backbone = getattr(work.model, "backbone", None)
    if backbone is not None:
        backbone.set_attn_implementation("eager")
