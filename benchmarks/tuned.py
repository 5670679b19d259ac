"""The loop for W1 with all that can be left out: no autograd, no modules, no optimizer.

One client after the other, as in ``loop``; the gradient of the perceptron is written by hand and
the step is part of the product. What fedsys takes beyond it is the price of messages, checks and
autograd where clients are tiny, less what the stacking brings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pace import Pace, serve
from benchmarks.plain import trained_of
from benchmarks.work import Work

Perceptron = list[Tensor]  # (hidden, in), (hidden,), (classes, hidden), (classes,)


@torch.inference_mode()
def run(work: Work, pace: Pace) -> None:
    """Train a perceptron with one hidden layer until ``pace`` has had enough."""
    trained = trained_of(work.model)
    start = [p.detach().clone() for p in trained.values()]
    targets = F.one_hot(work.labels).float()
    for cohort in work.plan:
        pace.start()
        total = [torch.zeros_like(value) for value in start]
        for batches in cohort:
            model = [value.clone() for value in start]
            pairs = zip(work.inputs[batches], targets[batches], strict=True)
            for x, target in pairs:
                step(model, x, target, work.lr)
            for value, mine in zip(total, model, strict=True):
                value += mine
        before, start = start, [value / len(cohort) for value in total]
        pace.stop(dict(zip(trained, before, strict=True)), dict(zip(trained, start, strict=True)))


def step(model: Perceptron, x: Tensor, target: Tensor, lr: float) -> None:
    """Take one step of SGD on the mean cross-entropy of ``x`` (b, in), ``target`` (b, classes)."""
    weight1, bias1, weight2, bias2 = model
    hidden = torch.addmm(bias1, x, weight1.T).relu_()
    logits = torch.addmm(bias2, hidden, weight2.T)
    move = (torch.softmax(logits, 1) - target).mul_(-lr / len(x))  # -lr d loss / d logits
    below = (move @ weight2).mul_(hidden > 0)
    weight2.addmm_(move.T, hidden)
    bias2.add_(move.sum(0))
    weight1.addmm_(below.T, x)
    bias1.add_(below.sum(0))


if __name__ == "__main__":
    serve(run)
