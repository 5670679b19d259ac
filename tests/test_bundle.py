import hashlib
import subprocess
import sys
import zipfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.config_utils import get_fab_metadata
from flwr.cli.install import install_from_fab
from flwr.common.config import get_fab_config

from fedsys.deployment import bundle as module
from fedsys.deployment.bundle import KEYS, bundle
from fedsys.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules of a user's own, where ``fedsys serve`` is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_rule.py").write_text("ETA = 1.0\n")
    package = tmp_path / "own_parts" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "deep.py").write_text("DEEP = True\n")
    (package / "notes.txt").write_text("not code")
    (package.parent / "old-draft.py").write_text("no module has such a name")
    return tmp_path


def files(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_names_the_apps_and_holds_none_of_their_code() -> None:
    made = bundle()
    assert list(files(made.content)) == ["pyproject.toml", ".info/CONTENT"]
    app = get_fab_config(made.content)["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "fedsys.server_app:app",
        "clientapp": "fedsys.client_app:app",
    }
    assert app["config"] == dict.fromkeys(KEYS, "")
    assert get_fab_metadata(made.content) == ("fedsys/fedsys", version("fedsys"))


def test_flower_installs_it(tmp_path: Path, here: Path) -> None:
    installed = install_from_fab(bundle(["own_parts"]).content, tmp_path / "home", skip_prompt=True)
    assert (installed / "own_parts" / "inner" / "deep.py").read_text() == "DEEP = True\n"


def test_its_hash_is_that_of_its_bytes_and_the_same_in_another_process() -> None:
    made = bundle()
    assert made.hash == hashlib.sha256(made.content).hexdigest()
    asked = "from fedsys.deployment.bundle import bundle; print(bundle().hash)"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == made.hash


def test_another_version_has_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle().hash
    monkeypatch.setattr(module, "version", lambda _: "99.0.0")
    assert bundle().hash != before


def test_nothing_is_compressed_for_zlib_is_not_the_same_everywhere(here: Path) -> None:
    with zipfile.ZipFile(BytesIO(bundle(["own_rule", "own_parts"]).content)) as archive:
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.create_system == 3
            assert entry.date_time[0] == 2024


def test_modules_of_the_users_own_come_whole_and_alone(here: Path) -> None:
    (here / "unasked.py").write_text("")
    assert {*files(bundle(["own_parts.inner.deep", "own_rule"]).content)} == {
        "pyproject.toml",
        "own_parts/__init__.py",
        "own_parts/inner/deep.py",
        "own_rule.py",
        ".info/CONTENT",
    }


def test_bytes_depend_on_what_files_say_only(here: Path, tmp_path_factory, monkeypatch) -> None:
    made = bundle(["own_rule", "own_parts"])
    assert bundle(["own_parts", "own_rule", "own_rule"]) == made
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "own_rule.py").write_text("ETA = 1.0\n")
    assert bundle(["own_rule"]) == bundle(["own_rule"])
    alone = bundle(["own_rule"])
    sys.path[:] = [place for place in sys.path if place != str(here)]
    monkeypatch.chdir(other)
    assert bundle(["own_rule"]) == alone
    (other / "own_rule.py").write_text("ETA = 2.0\n")
    assert bundle(["own_rule"]).hash != alone.hash


@pytest.mark.parametrize(
    "name", ["numpy", "json", "sys", "fedsys.strategy", "strategies", "clients"]
)
def test_what_every_device_has_installed_stays_out(name: str) -> None:
    assert bundle([name]) == bundle()


def test_a_module_that_is_not_there_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"no_such_rule.*no such module"):
        bundle(["no_such_rule"])


def test_what_flower_would_not_send_is_refused(here: Path) -> None:
    (here / "own_rule.py").write_text("#" * 11_000_000)
    with pytest.raises(ConfigError, match="at most 10,485,760"):
        bundle(["own_rule"])
