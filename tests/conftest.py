import os

# Before any test imports torch, transformers or Flower.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# The same examples at every run, so that a change is judged by what it changed. For new ones:
# HYPOTHESIS_PROFILE=default make test.
settings.register_profile("fedsys", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fedsys"))
