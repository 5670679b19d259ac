"""The plain loop: one model, one client after the other, averaged in place.

It is as lean as a loop with autograd can be: no messages or checks, all rows in one tensor, their
order drawn before the clock starts, sums in float32, and no attention mask, for no row is padded.
"""

import torch

from benchmarks.pace import Pace, serve
from benchmarks.plain import copy_into, train, trained_of, wrapped
from benchmarks.work import Work


def run(work: Work, pace: Pace) -> None:
    """Train until ``pace`` has had enough."""
    model = wrapped(work.model, work.noise)
    trained = trained_of(model)
    start = {name: p.detach().clone() for name, p in trained.items()}
    for cohort in work.plan:
        pace.start()
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for batches in cohort:
            copy_into(trained, start)
            train(work, model, trained, batches)
            for name, value in total.items():
                value += trained[name].detach()
        before, start = start, {name: value / len(cohort) for name, value in total.items()}
        pace.stop(before, start)


if __name__ == "__main__":
    serve(run)
