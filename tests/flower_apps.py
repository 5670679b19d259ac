"""A Flower app whose ServerApp writes a run folder and needs no client: what it does is asked."""

from fedsys.deployment.bundle import KEYS, Bundle, _zipped

_PROJECT = """\
[project]
name = "tiny"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "tiny:app"
clientapp = "tiny:client"

[tool.flwr.app.config]
"""

_CODE = """\
import json, os, time
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ServerApp()
client = ClientApp()


@app.main()
def main(grid, context):
    plan, out = json.loads(context.run_config["hydra-json"]), Path(context.run_config["out"])
    print("a tiny run", context.run_config["run"], flush=True)
    if plan.get("raises"):
        raise RuntimeError(plan["raises"])
    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    (out / f"began-at-{done}").write_text(str(os.getpid()))
    for number in range(done, plan["rounds"] + 1):
        with log.open("a") as file:
            file.write(json.dumps({"round": number, "reasons": []}) + "\\n")
        if number == plan.get("dies") and done == 0:
            os.kill(os.getpid(), 9)
        time.sleep(plan.get("seconds", 0))
    summary = {"status": "completed", "rounds": plan["rounds"], "reason": None}
    (out / "summary.json.partial").write_text(json.dumps(summary))
    (out / "summary.json.partial").rename(out / "summary.json")
"""


def tiny() -> Bundle:
    """Return the bundle; its plan is what the key hydra-json says."""
    project = _PROJECT + "".join(f'{key} = ""\n' for key in KEYS)
    sources = {"pyproject.toml": project.encode(), "tiny.py": _CODE.encode()}
    return Bundle(_zipped(sources))
