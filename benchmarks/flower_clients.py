"""The ClientApp of Flower's simulation; each of Ray's actors reads the work once."""

import os
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from benchmarks.plain import copy_into, train, trained_of, wrapped
from benchmarks.work import Work

WORK = "FEDSYS_BENCHMARK_WORK"  # the variable that names the file

app = ClientApp()


@cache
def loaded() -> tuple[Work, nn.Module]:
    """Return the work and its model, ready to be trained."""
    torch.set_num_threads(1)
    work = Work.load(os.environ[WORK])
    return work, wrapped(work.model, work.noise)


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Train as the client in the place that the server names."""
    work, model = loaded()
    trained = trained_of(model)
    copy_into(trained, message.content.array_records["arrays"].to_torch_state_dict())
    whose: Any = message.content.config_records["config"]
    batches = work.plan[whose["round"], whose["place"]]
    train(work, model, trained, batches)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: p.detach() for name, p in trained.items()}),
            "metrics": MetricRecord({"num-examples": batches.numel()}),
        }
    )
    return Message(content=content, reply_to=message)
