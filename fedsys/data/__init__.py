"""Data: sources that load rows, and partitions that divide them among clients."""

from fedsys.data.digits import Digits
from fedsys.data.examples import Batch, Dataset, Examples, TensorExamples, TokenExamples
from fedsys.data.gaussians import Gaussians
from fedsys.data.hub import Hub
from fedsys.data.images import Images
from fedsys.data.manifest import write_manifest
from fedsys.data.partition import (
    IID,
    Bootstrap,
    Contiguous,
    DirichletFedAU,
    DirichletFRL,
    Natural,
    OnDevices,
    Partition,
)
from fedsys.data.picture import plot_partition
from fedsys.data.quadratic import LeastSquares, Quadratic
from fedsys.data.shards import Shards
from fedsys.data.synthetic import RandomTokens
from fedsys.data.text import Text

__all__ = [
    "IID",
    "Batch",
    "Bootstrap",
    "Contiguous",
    "Dataset",
    "Digits",
    "DirichletFRL",
    "DirichletFedAU",
    "Examples",
    "Gaussians",
    "Hub",
    "Images",
    "LeastSquares",
    "Natural",
    "OnDevices",
    "Partition",
    "Quadratic",
    "RandomTokens",
    "Shards",
    "TensorExamples",
    "Text",
    "TokenExamples",
    "plot_partition",
    "write_manifest",
]
