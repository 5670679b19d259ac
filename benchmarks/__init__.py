"""How fast a round is, against the plain PyTorch loop on the same work.

W1 is many tiny clients (``experiment=bench_w1``), W2 adapters on MiniLM (``experiment=bench_w2``).
Both engines start from the same weights and see the same rows in the same order; that their
updates agree is checked before anything is timed. Each engine is a process of its own, so that it
has its own peak of memory, and they take turns: what else the machine does hits both alike, and a
ratio is that of neighbours.
"""

import os

# Both are read when the libraries are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
