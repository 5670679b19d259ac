"""The images and the composition: judged by linters, and by what they say of fedsys.

They are not built here, which needs a network and Docker.
"""

import argparse
import fnmatch
import http.server
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from omegaconf import OmegaConf

from fedsys.compose import compose
from fedsys.config import configure
from fedsys.deployment.bundle import bundle
from fedsys.deployment.enrolment import enrol
from fedsys.deployment.pki import create_authority, server_certificate
from fedsys.deployment.policy import Policy
from fedsys.engines.deployment import Deployment
from fedsys.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOME = "/home/fedsys/server"


class Instruction(NamedTuple):
    """A line of a Dockerfile, its continuations joined."""

    stage: str
    name: str
    rest: str


def instructions() -> list[Instruction]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    stage, found = "", []
    for line in (line.strip() for line in text.splitlines()):
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stage = rest.rpartition(" AS ")[2]
            found.append(Instruction(stage, name, rest.strip()))
    return found


def only(name: str, stage: str) -> str:
    (rest,) = [i.rest for i in instructions() if (i.name, i.stage) == (name, stage)]
    return rest


def words(name: str, stage: str) -> list[str]:
    """Return an instruction in its exec form, which needs no shell and gets signals."""
    return list(yaml.safe_load(only(name, stage)))


def copied() -> list[str]:
    """Return what the build takes from the repository."""
    lines = [shlex.split(i.rest) for i in instructions() if i.name == "COPY"]
    return [source for line in lines if line[0][:2] != "--" for source in line[:-1]]


@pytest.fixture(scope="module")
def composition() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def clients(composition: dict[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in composition["services"].items() if name != "server"}


def parsed(line: list[str]) -> argparse.Namespace:
    """Return what fedsys makes of a command line; a wrong one is an error."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    VERBS[line[0]].arguments(parser)
    return parser.parse_intermixed_args(line[1:])


def served(composition: dict[str, Any]) -> list[str]:
    verb, *overrides = composition["services"]["server"]["command"]
    assert verb == "serve"
    return overrides


# ---- linters


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def clean(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    clean(tool("hadolint"), "--no-color", DEPLOY / "Dockerfile")


def test_the_composition_keeps_to_the_specification() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    clean(tool("check-jsonschema"), *schema, DEPLOY / "compose.yaml")


# ---- what is built


def test_what_is_copied_is_there_and_in_the_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [line for line in ignored if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == set(copied())
    for source in copied():
        assert (ROOT / source).exists()


def test_every_package_and_every_file_of_the_project_is_copied() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for pattern in packages:
        assert fnmatch.filter(copied(), pattern)
    metadata = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    assert {"pyproject.toml", "constraints.txt", *metadata} <= set(copied())


@pytest.mark.slow
def test_what_is_copied_installs_with_its_configuration(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for source in copied():
        found = ROOT / source
        if found.is_dir():
            shutil.copytree(found, context / source)
        else:
            shutil.copy(found, context)
    wheel = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    clean(sys.executable, *wheel, "-w", tmp_path, context)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    for package in (ROOT / name for name in ("fedsys", "strategies", "clients", "configs")):
        for path in [*package.rglob("*.py"), *package.rglob("*.yaml")]:
            assert str(path.relative_to(ROOT)) in names


def test_torch_is_the_one_that_was_tested() -> None:
    (torch,) = [i.rest for i in instructions() if i.rest.startswith("TORCH=")]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={torch.removeprefix('TORCH=')}" in constraints


def test_the_python_is_one_that_the_project_supports() -> None:
    (python,) = [i.rest for i in instructions() if i.rest.startswith("PYTHON=")]
    assert PROJECT["project"]["requires-python"] == f">={python.removeprefix('PYTHON=')}"


def test_extras_are_those_of_the_project() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (named,) = re.findall(r"# Of fedsys, without brackets: (\w+)", text)
    assert named in PROJECT["project"]["optional-dependencies"]


def test_nothing_runs_as_root() -> None:
    users = {i.stage: i.rest for i in instructions() if i.name == "USER"}
    assert users == {"base": "$UID"}
    after = [i.name for i in instructions() if i.stage in ("server", "client")]
    assert "USER" not in after
    stages = [i.rest for i in instructions() if i.name == "FROM"]
    assert stages[-2:] == ["base AS server", "base AS client"]


# ---- what is run


def test_the_entry_point_is_a_command_of_the_project() -> None:
    (command,) = words("ENTRYPOINT", "base")
    assert command in PROJECT["project"]["scripts"]


@pytest.mark.parametrize("stage", ["server", "client"])
def test_what_an_image_runs_is_understood(stage: str) -> None:
    parsed(words("CMD", stage))


def test_the_server_of_the_image_listens_where_the_image_says() -> None:
    settings = configure([*words("CMD", "server")[1:], "engine=deployment"]).engine
    assert isinstance(settings, Deployment)
    assert str(settings.home) == HOME
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == only("EXPOSE", "server")


def test_the_run_of_the_composition_is_understood(composition: dict[str, Any]) -> None:
    overrides = served(composition)
    parsed(["serve", *overrides])
    experiment = configure([*overrides, "engine=deployment"])
    assert experiment.num_clients == len(clients(composition))
    assert isinstance(experiment.engine, Deployment)
    assert str(experiment.engine.home) == HOME
    assert experiment.engine.host == "0.0.0.0"
    assert str(experiment.engine.port) == only("EXPOSE", "server")
    mounted = mounts(composition["services"]["server"])
    assert str(experiment.out.parent) in mounted.values()
    assert HOME in mounted.values()


def test_the_clients_of_the_composition_may_take_part(
    composition: dict[str, Any], tmp_path: Path
) -> None:
    app = bundle().hash
    folder = enrol("a", tmp_path / "home", "server:8443", folder=tmp_path / "a", code=[app])
    policy = Policy.load(folder / "policy.yaml")
    settings = OmegaConf.to_container(
        compose([*served(composition), "engine=deployment"]), resolve=True
    )
    assert isinstance(settings, dict)
    assert policy.of_run(app, settings) == []
    without = {name: value for name, value in settings.items() if name != "privacy"}
    assert policy.of_run(app, without)


def test_the_commands_that_are_explained_are_understood(composition: dict[str, Any]) -> None:
    lines = (DEPLOY / "compose.yaml").read_text().replace("\\\n#", "").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    (line,) = [line for line in comments if " server " in line and "run --rm" in line]
    command = shlex.split(line.partition(" server ")[2].replace("$name", "clinic-a"))
    assert command[:2] == ["enrol", "clinic-a"]
    parsed(command)
    port = Deployment().port
    assert f"server:{port}" in command  # by which the clients call it
    (names,) = [line for line in comments if line.startswith("for name in")]
    assert names == f"for name in {' '.join(clients(composition))}; do"


# ---- what is mounted and published


def mounts(service: dict[str, Any]) -> dict[str, str]:
    return {text.partition(":")[0]: text.partition(":")[2] for text in service["volumes"]}


def test_every_client_has_a_folder_of_its_own(composition: dict[str, Any]) -> None:
    (place,) = words("CMD", "client")[1:]
    for name, service in clients(composition).items():
        assert mounts(service) == {f"./devices/{name}": place}
        assert service["build"]["target"] == "client"
        assert service["depends_on"] == {"server": {"condition": "service_healthy"}}
        assert "command" not in service


def test_volumes_are_declared_and_begin_as_the_users_own(composition: dict[str, Any]) -> None:
    server = composition["services"]["server"]
    assert set(mounts(server)) == set(composition["volumes"])
    made = only("RUN", "server").split()
    folder = only("WORKDIR", "base")
    for place in mounts(server).values():
        assert place.startswith(f"{folder}/")
        assert place.removeprefix(f"{folder}/") in made
    assert server["build"]["target"] == "server"


def test_the_port_is_published_to_this_machine_only_unless_asked(
    composition: dict[str, Any],
) -> None:
    port = only("EXPOSE", "server")
    (published,) = composition["services"]["server"]["ports"]
    assert published == f"${{FEDSYS_LISTEN:-127.0.0.1}}:{port}:{port}"
    assert not any("ports" in service for service in clients(composition).values())


def test_services_come_back_and_gain_no_rights(composition: dict[str, Any]) -> None:
    for name, service in composition["services"].items():
        assert service["restart"] == ("on-failure:3" if name == "server" else "unless-stopped")
        assert service["init"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")


def test_arguments_of_the_build_exist(composition: dict[str, Any]) -> None:
    known = {i.rest.partition("=")[0] for i in instructions() if i.name == "ARG"}
    for service in composition["services"].values():
        assert set(service["build"]["args"]) <= known
        context = (DEPLOY / service["build"]["context"]).resolve()
        assert context == ROOT
        assert context / service["build"]["dockerfile"] == DEPLOY / "Dockerfile"


# ---- health


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers as a SuperLink does, at one path only."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def check(home: Path, port: int) -> int:
    """Run the health check of the image for another home and port; return its exit code."""
    command = words_of_health()
    script = command[2].replace(HOME, str(home)).replace(":8443", f":{port}")
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode


def words_of_health() -> list[str]:
    command: list[str] = yaml.safe_load(only("HEALTHCHECK", "server").partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    return command


def test_the_health_check_asks_the_server_of_its_own_home(tmp_path: Path) -> None:
    server_certificate(tmp_path / "home", [])
    create_authority(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "home" / "server.crt", tmp_path / "home" / "server.key")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # a caller that does not trust it goes away
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        port = server.server_address[1]
        try:
            assert check(tmp_path / "home", port) == 0
            assert check(tmp_path / "other", port) != 0
            assert check(tmp_path / "none", port) != 0
        finally:
            server.shutdown()
    assert check(tmp_path / "home", port) != 0


def test_the_health_check_is_at_the_port_and_the_home_of_the_server() -> None:
    script = words_of_health()[2]
    assert f"https://localhost:{only('EXPOSE', 'server')}/health" in script
    assert f"{HOME}/ca.crt" in script
