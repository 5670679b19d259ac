"""The Flower App Bundle that is submitted: what is to run, by name, and nothing of fedsys itself.

A device runs the fedsys that its operator has installed. The bundle only names the two apps and
the keys of a run's configuration, so that its hash, by which an operator lets code run, is one and
the same for all runs of a version. Modules of the user's own are added where a run needs them.

The bytes are written here rather than by ``flwr build``: that compresses, and what zlib makes of
the same text differs between its versions.
"""

import hashlib
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path, PurePosixPath

from fedsys.errors import ConfigError

KEYS = ("hydra-json", "overrides", "out", "run", "cwd")  # of the configuration of a run
LIMIT = 10 * 2**20  # bytes that Flower takes
_DATE = (2024, 10, 1, 0, 0, 0)  # as Flower dates all files of a bundle
_PROJECT = "pyproject.toml"
_MANIFEST = ".info/CONTENT"
_INSTALLED = ("fedsys", "strategies", "clients", "configs")

_TEXT = """\
[project]
name = "fedsys"
version = "{version}"
dependencies = []

[tool.flwr.app]
publisher = "fedsys"

[tool.flwr.app.components]
serverapp = "fedsys.server_app:app"
clientapp = "fedsys.client_app:app"

[tool.flwr.app.config]
"""


@dataclass(frozen=True)
class Bundle:
    """The bytes of a bundle."""

    content: bytes

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the bytes, in hexadecimal; policies of devices name it."""
        return hashlib.sha256(self.content).hexdigest()


def bundle(modules: Sequence[str] = ()) -> Bundle:
    """Return the bundle of this version of fedsys, with the user's own ``modules``.

    A module comes with all of its top-level package. One that is installed is left out: operators
    of devices install it themselves. Raises ``ConfigError`` for a module that is not there, and
    when Flower would not take so large a bundle.
    """
    project = _TEXT.format(version=_version()) + "".join(f'{key} = ""\n' for key in KEYS)
    files = {_PROJECT: project.encode()}
    for name in dict.fromkeys(module.partition(".")[0] for module in modules):
        files |= _sources(name)
    content = _zipped(files)
    if len(content) > LIMIT:
        raise ConfigError(
            [f"allow: modules of {len(content):,} bytes; Flower sends at most {LIMIT:,}"]
        )
    return Bundle(content)


def _version() -> str:
    try:
        return version("fedsys")
    except PackageNotFoundError:
        raise ConfigError(
            ["fedsys is not installed, as deployment needs it: pip install ."]
        ) from None


def _sources(name: str) -> dict[str, bytes]:
    """Return the .py files of a top-level module or package by their path in the bundle."""
    if name in _INSTALLED:
        return {}
    spec = _found(name)
    if spec is None:
        raise ConfigError([f"allow=[{name}]: there is no such module in {Path.cwd()}"])
    origins = [*(spec.submodule_search_locations or ())]
    if not origins and spec.origin in (None, "built-in", "frozen"):
        return {}
    places = [Path(place) for place in origins or [str(spec.origin)]]
    if any(place.is_relative_to(root) for place in places for root in _site()):
        return {}
    return {
        str(PurePosixPath(path.relative_to(place.parent))): path.read_bytes()
        for place in places
        for path in (place.rglob("*.py") if place.is_dir() else [place])
        if all(part.isidentifier() for part in path.relative_to(place.parent).with_suffix("").parts)
    }


def _found(name: str) -> ModuleSpec | None:
    """Find a module where the configuration does: in what is installed, then in this folder."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return find_spec(name)
    except ValueError:  # loaded by something that left no spec
        return None


def _site() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[key]) for key in ("purelib", "platlib", "stdlib", "platstdlib")]


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """Return the same bytes for the same files, on every machine."""
    order = [_PROJECT, *sorted(set(files) - {_PROJECT})]
    manifest = [f"{n},{hashlib.sha256(files[n]).hexdigest()},{len(files[n]) * 8}" for n in order]
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in order:
            archive.writestr(_entry(name), files[name])
        archive.writestr(_entry(_MANIFEST), "\n".join(manifest).encode())
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system = 3  # Unix, wherever it is written
    entry.external_attr = 0o644 << 16
    return entry
