"""How fast a round is, beside other engines on the same work.

W1 is many tiny clients (``experiment=bench_w1``), W2 adapters on MiniLM (``experiment=bench_w2``),
W3 the same with sample-level privacy. All engines start from the same weights; in W1 and W2 they
see the same rows in the same order, and that their updates of round 1 agree is checked before
anything is timed. In W3 fedsys draws Poisson lots, of the size that the others' batches have.
Each engine is a process of its own, a peer's in an environment of its own (``make bench-env``), and
they take turns: what else the machine does hits all alike, and a ratio is that of neighbours.

What a peer's process imports from here (``on_pfl``, ``on_flower``, ``work``, ``pace``, ``plain``)
needs neither fedsys nor Hydra: it is handed its work in a file.
"""

import os

# All are read when the libraries are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
