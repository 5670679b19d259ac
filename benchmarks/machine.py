"""What the machine can do at most, measured in the same run."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from fedsys.run_folder import environment

SIZE = 2048  # of the square matrices
PRODUCTS = 7


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    gflops: dict[str, float]  # of a matrix product, by dtype
    threads: int
    environment: dict[str, Any]


def measure_machine(threads: int) -> Machine:
    """Measure matrix products in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_machine, threads).result()


def _machine(threads: int) -> Machine:
    torch.set_num_threads(threads)
    gflops = {name: _gflops(getattr(torch, name), threads) for name in ("float32", "bfloat16")}
    return Machine(gflops, threads, environment())


def _gflops(dtype: torch.dtype, threads: int) -> float:
    """Return the best of a few products, in 10^9 operations a second of ``threads`` processors.

    By CPU time, as are the rounds that are held against it: on a busy machine the time that passes
    says little of the processor.
    """
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        began = time.process_time()
        a @ b
        seconds.append(time.process_time() - began)
    return 2e-9 * SIZE**3 * threads / min(seconds)
