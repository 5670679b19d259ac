"""A picture of a partition: who holds how many rows, and of which classes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsys.data.examples import Dataset
from fedsys.data.shards import Shards

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 100  # clients
_MOST_COLOURS = 20  # classes
_MOST_COUNTED = 10_000  # clients whose labels are counted


def plot_partition(path: Path, shards: Shards, dataset: Dataset) -> None:
    """Write a PNG with the rows of each client, by class where there are classes.

    Up to 100 clients are drawn as bars; more as a map of classes and a histogram of sizes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sizes = shards.sizes().numpy()
    counts = _label_counts(shards, dataset)
    if len(sizes) <= _MOST_BARS and (counts is None or counts.shape[1] <= _MOST_COLOURS):
        figure = _bars(shards, sizes, counts, dataset.label_names)
    elif counts is not None:
        figure = _map(sizes, counts, dataset.label_names)
    else:
        figure = _figure(9, 4)
        _histogram(figure.add_subplot(), sizes)
    figure.suptitle(_title(sizes), fontsize=12)
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    figure.savefig(path, format="png")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _title(sizes: NDArray[np.int64]) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    each = f"{low:,} each" if low == high else f"{low:,} to {high:,} each"
    return f"{len(sizes):,} clients, {int(sizes.sum()):,} training rows, {each}"


def _label_counts(shards: Shards, dataset: Dataset) -> NDArray[np.int64] | None:
    """Return rows by client and class, (N, C), or None where that cannot be counted."""
    if dataset.train.labels is None or not dataset.num_classes or len(shards) > _MOST_COUNTED:
        return None
    labels, classes = dataset.train.labels.numpy(), dataset.num_classes
    rows = (shards.rows(client).numpy() for client in range(len(shards)))
    return np.stack([np.bincount(labels[part], minlength=classes) for part in rows])


def _bars(
    shards: Shards, sizes: NDArray[np.int64], counts: NDArray[np.int64] | None, names: list[str]
) -> "Figure":
    clients = np.arange(len(sizes))
    figure = _figure(9, max(3.6, 1.6 + max(0.14, min(0.3, 6 / len(sizes))) * len(sizes)))
    axes = figure.add_subplot()
    if counts is None:
        axes.barh(clients, sizes, height=0.85, color="#4c78a8")
    else:
        _stack(axes, counts, names)
    small = 6.5 if len(sizes) > 40 else 9
    axes.set_yticks(
        clients, [_short(shards.name(client)) for client in range(len(sizes))], fontsize=small
    )
    axes.set_ylim(len(sizes) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * max(1, int(sizes.max())))
    _label(axes, "training rows", "client")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _stack(axes: "Axes", counts: NDArray[np.int64], names: list[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10" if counts.shape[1] <= 10 else "tab20"]
    left = np.zeros(len(counts), dtype=np.int64)
    for label, column in enumerate(counts.T):
        axes.barh(
            np.arange(len(counts)),
            column,
            left=left,
            height=0.85,
            color=colours(label),
            edgecolor="white",
            linewidth=0.4,
            label=_short(names[label]),
        )
        left += column
    axes.legend(title="class", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _map(sizes: NDArray[np.int64], counts: NDArray[np.int64], names: list[str]) -> "Figure":
    figure = _figure(11, 6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    share = counts / np.maximum(sizes, 1)[:, None]
    image = left.imshow(
        share, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0, vmax=share.max()
    )
    figure.colorbar(image, ax=left, label="share of the client's rows")
    if len(names) <= 2 * _MOST_COLOURS:
        longest = max(map(len, names))
        turn = 60 if longest * len(names) > 50 else 0
        left.set_xticks(range(len(names)), [_short(name) for name in names], rotation=turn)
    _label(left, "class", "client")
    _histogram(right, sizes)
    return figure


def _histogram(axes: "Axes", sizes: NDArray[np.int64]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    low, high = int(sizes.min()), int(sizes.max())
    edges: NDArray[Any] = np.linspace(low, high, 41)
    if high - low <= 150:
        edges = np.arange(low, high + 2) - 0.5
        axes.set_xlim(edges[0] - 2, edges[-1] + 2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif high > 50 * max(1, low):
        edges = np.concatenate([[0] if low == 0 else [], np.geomspace(max(1, low), high, 41)])
        axes.set_xscale("symlog", linthresh=1)
    axes.hist(sizes, bins=edges.tolist(), color="#4c78a8", edgecolor="white", linewidth=0.4)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "training rows of a client", "clients")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "\N{HORIZONTAL ELLIPSIS}"
