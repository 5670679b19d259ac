"""What each client holds: a manifest to check a run against, and a picture."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsys.data.examples import Dataset
from fedsys.data.shards import Shards

MOST_LISTED = 10_000  # clients; a manifest of more holds the summary only


def write_manifest(path: Path, shards: Shards, dataset: Dataset, seed: int) -> None:
    """Write the data's fingerprint and, for each client, its row count and a hash of its rows."""
    sizes = shards.sizes()
    content: dict[str, Any] = {
        "seed": seed,
        "dataset": dataset.fingerprint(),
        "training_rows": len(dataset.train),
        "evaluation_rows": len(dataset.evaluation),
        "public_rows": 0 if dataset.public is None else len(dataset.public),
        "num_clients": len(shards),
        "examples": {
            "total": int(sizes.sum()),
            "smallest": int(sizes.min()),
            "mean": round(sizes.double().mean().item(), 3),
            "largest": int(sizes.max()),
        },
    }
    if len(shards) <= MOST_LISTED:
        content["clients"] = list(_clients(shards, content["dataset"]))
    else:
        content["note"] = f"summary only: clients are listed up to {MOST_LISTED} of them"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def client_hash(shards: Shards, client: int, fingerprint: str) -> str:
    """Return the SHA-256 of the data's fingerprint and the rows of ``client``, in hexadecimal."""
    rows = shards.rows(client).contiguous().numpy().astype("<i8")
    return hashlib.sha256(fingerprint.encode() + rows.tobytes()).hexdigest()


def _clients(shards: Shards, fingerprint: str) -> Iterator[dict[str, Any]]:
    for client in range(len(shards)):
        yield {
            "client": client,
            "name": shards.name(client),
            "examples": shards.size(client),
            "sha256": client_hash(shards, client, fingerprint),
        }
