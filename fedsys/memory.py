"""How much memory a training pass takes, and how much there is to take."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container: memory.max, memory.current, memory.stat
_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory")


def available(device: torch.device) -> int | None:
    """Return how many bytes can be had on ``device``; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min(_limits(), default=None) if device.type == "cpu" else None


def _limits() -> Iterator[int]:
    """Yield what this machine has left, and what its container has."""
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        yield int(fields["MemAvailable"].split()[0]) * 1024
    try:
        most = (_GROUP / "memory.max").read_text().strip()
        if most != "max":
            counts = dict(
                line.split() for line in (_GROUP / "memory.stat").read_text().splitlines()
            )
            files = int(counts["active_file"]) + int(counts["inactive_file"])  # dropped on demand
            yield int(most) - int((_GROUP / "memory.current").read_text()) + files
    except OSError:  # no container, or one of another kind
        return


def kept(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that a forward pass on ``inputs`` keeps for its backward pass.

    Parameters are not counted, nor is what several operations keep together counted twice.
    """
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # else an address would be given to the next tensor

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(value)
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        output = model(**inputs)
    del output
    return sum(sizes.values())


def is_shortage(error: BaseException | None) -> bool:
    """Return whether ``error``, or what it came from, says that memory was not enough."""
    if error is None:
        return False
    said = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _SHORTAGES)
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return said or known or is_shortage(error.__cause__)
