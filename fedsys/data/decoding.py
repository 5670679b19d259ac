"""Image files to tensors: npz archives, and parquet files with encoded images."""

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsys.data.tables import Table, no_column, read_bytes, read_table
from fedsys.errors import DataError

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Pictures:
    """A file of images: ``x`` is uint8 or float32, (n, C, H, W) or flat (n, d)."""

    x: Tensor
    labels: Sequence[Any]
    columns: dict[str, np.ndarray]
    where: Callable[[int], str]


def read_npz(path: str, label: str, keep: Sequence[str]) -> Pictures:
    """Return the arrays ``x``, ``label`` and ``keep`` of an npz archive."""
    arrays = _arrays(path, ["x", label, *keep])
    x = arrays["x"]
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(x):
            shapes = f"x has shape {x.shape} and {name} {array.shape}"
            raise DataError(f"{path}: {shapes}, expected as many rows in both")
        if name != "x" and array.ndim != 1:
            raise DataError(f"{path}: {name} has shape {array.shape}, expected one value a row")
    if len(x) == 0:
        raise DataError(f"{path}: x is empty, expected at least one row")
    labels = arrays[label]
    if labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)):
        labels = labels.astype(np.int64)
    columns = {name: arrays[name] for name in keep}
    return Pictures(
        _pixels(path, x), labels.tolist(), columns, lambda row: f"{path}, row {row + 1}"
    )


def _arrays(path: str, needed: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        archive = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array, expected an npz archive")
        if not archive.files:
            raise DataError(f"{path} holds no arrays, expected {' and '.join(needed)}")
        for name in needed:
            if name not in archive.files:
                raise no_column(path, name, archive.files)
        return {name: archive[name] for name in needed}
    except DataError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no readable npz archive: {error}") from error


def _pixels(path: str, x: NDArray[Any]) -> Tensor:
    if x.dtype.kind not in "buif":
        raise DataError(f"{path}: x has type {x.dtype}, expected numbers")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in _CHANNELS and x.shape[3] in _CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim not in (2, 4):
        shapes = "(n, H, W), (n, C, H, W), (n, H, W, C) or (n, d)"
        raise DataError(f"{path}: x has shape {x.shape}, expected {shapes}")
    dtype = np.uint8 if x.dtype == np.uint8 else np.float32
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=dtype))
    if dtype is np.float32 and not tensor.isfinite().all():
        row = int((~tensor.flatten(1).isfinite().all(1)).nonzero()[0])
        raise DataError(f"{path}, row {row + 1}: x is not finite")
    return tensor


def read_pictures(
    path: str, image: str, label: str, keep: Sequence[str], size: int | None
) -> Pictures:
    """Return a table of encoded images decoded, and resized if ``size`` is given."""
    table = read_table(path, list(dict.fromkeys([image, label, *keep])))
    arrays: list[NDArray[np.uint8]] = []
    for row, value in enumerate(table.columns[image]):
        arrays.append(_decode(value, table, row, size))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            height, width = arrays[-1].shape[:2]
            expected = "{1} x {0} as in row 1, or data.size".format(*arrays[0].shape[:2])
            raise DataError(f"{table.where(row)}: {width} x {height} pixels, expected {expected}")
    if any(array.ndim == 3 for array in arrays):
        arrays = [_coloured(array) for array in arrays]
    x = torch.from_numpy(np.stack(arrays))
    x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x[:, None]
    columns = {name: table.keys(name) for name in keep}
    return Pictures(x, table.columns[label], columns, table.where)


def _decode(value: Any, table: Table, row: int, size: int | None) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('encoded images need Pillow: pip install "fedsys[image]"') from error
    if isinstance(value, dict):  # as the datasets library stores images
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise DataError(f"{table.where(row)}: expected the bytes of an image, found {value!r:.40}")
    try:
        picture: Any = Image.open(io.BytesIO(value))
        picture.load()  # opening reads the header only
        if picture.mode not in ("L", "RGB"):
            picture = picture.convert("RGB")
        if size is not None:
            picture = picture.resize((size, size))
        return np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{table.where(row)}: the image cannot be decoded, {error}") from error


def _coloured(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
