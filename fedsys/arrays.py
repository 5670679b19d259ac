"""Arrays in transit: one that keeps its tensor, and a reader that trusts no bytes."""

import math
import re
import struct
from functools import cached_property
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

_NUMPY = "numpy.ndarray"  # Flower's name for the bytes of np.save
_MAGIC = b"\x93NUMPY"
# Of each version of the format: how the length of its header is written, and where the header is.
_VERSIONS = {b"\x01\x00": ("<H", 10), b"\x02\x00": ("<I", 12), b"\x03\x00": ("<I", 12)}
_HEADER = re.compile(
    rb"\{'descr': '([<|=][biuf]\d{1,2})', 'fortran_order': (False|True), "
    rb"'shape': \(([\d, ]*)\), \}[ ]*\n"
)


class TensorArray(Array):
    """A Flower Array that keeps its tensor and serialises it only when someone asks.

    The tensor never changes. ``numpy()`` returns a copy, so no reader can change it for another.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Keep ``tensor``, which nobody may change from now on."""
        # Past Array.__setattr__, whose bookkeeping is for arrays that change.
        self.__dict__["tensor"] = tensor.detach()

    def __reduce__(self) -> tuple[type["TensorArray"], tuple[Tensor]]:
        """Copy and pickle by the tensor alone; what is cached beside it cannot be pickled."""
        return TensorArray, (self.tensor,)

    @property
    def tensor(self) -> Tensor:
        """The tensor, shared with whoever made the array."""
        tensor: Tensor = self.__dict__["tensor"]
        return tensor

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype's name, the same in torch and NumPy."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape."""
        return tuple(self.tensor.shape)

    @property
    def stype(self) -> str:  # type: ignore[override]
        """The form of ``data``."""
        return _NUMPY

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes of ``np.save``, as Flower's own arrays carry them."""
        return self.plain.data

    @cached_property
    def plain(self) -> Array:
        """The same array as Flower's own, which is what travels and is rebuilt at the other end."""
        buffer = BytesIO()
        np.save(buffer, self.tensor.cpu().numpy(), allow_pickle=False)
        return Array(self.dtype, self.shape, self.stype, buffer.getvalue())

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy as a NumPy array."""
        return self.tensor.cpu().numpy().copy()

    def slice_array(self):  # type: ignore[no-untyped-def]  # a private type of Flower
        """Return the chunks of ``data`` as Flower cuts them."""
        return self.plain.slice_array()

    def deflate(self) -> bytes:
        """Return the object's bytes, under the name of Flower's class."""
        return self.plain.deflate()


def tensor_of(array: Array | Tensor) -> Tensor:
    """Return an array's tensor, or the tensor that stands for one.

    Raises ``ValueError`` when its bytes are not those of ``np.save``, hold objects, or do not have
    the dtype and the shape they claim.
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, TensorArray):
        return array.tensor
    try:
        # Copied, because torch warns of read-only memory.
        return torch.from_numpy(_read(array).copy())
    except (TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"an array cannot be decoded: {error}") from error


def _read(array: Array) -> NDArray[np.generic]:
    """Return a view of the array's bytes.

    np.load would allocate what a header claims before it looks how many bytes there are, open
    zip archives, and evaluate the header as Python.
    """
    data = array.data
    known = array.stype == _NUMPY and isinstance(data, bytes) and data[:6] == _MAGIC
    if not known or data[6:8] not in _VERSIONS or len(data) < 12:
        raise ValueError("an array cannot be decoded: it is not in the format of np.save")
    width, start = _VERSIONS[data[6:8]]
    end = start + struct.unpack_from(width, data, 8)[0]
    header = _HEADER.fullmatch(data[start:end])
    if header is None:
        raise ValueError("an array cannot be decoded: its header holds more than plain numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(length) for length in header[3].split(b",") if length.strip())
    if array.dtype != dtype.name or tuple(array.shape) != shape:
        raise ValueError("an array cannot be decoded: its header contradicts its dtype or shape")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(
            f"an array cannot be decoded: {len(data) - end} bytes are not {shape} of {dtype.name}"
        )
    if not math.prod(shape):
        return np.empty(shape, dtype)
    flat = np.frombuffer(data, dtype, offset=end)
    return flat.reshape(shape, order="F" if header[2] == b"True" else "C")


def array_bytes(array: Array | Tensor) -> int:
    """Return how many bytes the numbers of ``array`` take when serialised."""
    if isinstance(array, Tensor):
        return _npy_bytes(array)
    if isinstance(array, TensorArray):
        return _npy_bytes(array.tensor)
    return len(array.data)


def _npy_bytes(tensor: Tensor) -> int:
    # np.save pads its header to 128 bytes, for shapes of up to some four dimensions.
    return 128 + tensor.numel() * tensor.element_size()
