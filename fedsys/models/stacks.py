"""Models that are a stack of equal blocks, such as the layers of a transformer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Stack = nn.ModuleList | nn.Sequential


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks of ``model`` by name: two or more modules of one class, bottom first.

    A stack within a block of another, such as experts, is none of the model's.
    """
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        inside = name.startswith(tuple(f"{outer}." for outer in found))
        if len({type(block) for block in module}) == 1 and not inside:
            found[name] = module
    return found


def lower(model: nn.Module, stack: Stack, cut: int, inputs: Mapping[str, Tensor]) -> Any:
    """Run ``model`` up to block number ``cut`` of its ``stack``, and return what the last gave.

    Raises ``RuntimeError`` when the model does not come to that block.
    """

    def stop(block: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    hook = stack[cut - 1].register_forward_hook(stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.output
    finally:
        hook.remove()
    raise RuntimeError("the model does not run its blocks")


@contextmanager
def replaced(stack: Stack, cut: int, output: Any) -> Iterator[None]:
    """Let every block below number ``cut`` return ``output`` without doing anything."""
    blocks = list(stack)[:cut]
    try:
        for place, block in enumerate(blocks):
            stack[place] = _Done(block, output)
        yield
    finally:
        for place, block in enumerate(blocks):
            stack[place] = block


class _Done(nn.Module):
    """Stands for a block in all but its work."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.block = block
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        # Some models ask each block which of several masks it takes.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _Reached(Exception):
    """The last block has returned ``output``."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
