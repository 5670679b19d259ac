"""The commands of a deployment: ``fedsys enrol``, ``fedsys serve``, ``fedsys join``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsys.engines.deployment import HOME, Deployment
from fedsys.errors import ConfigError


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fedsys serve``."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of `fedsys run`")
    parser.add_argument(
        "--insecure", action="store_true", help="without TLS and keys; on this machine only"
    )
    parser.add_argument("--stop", metavar="HOME", type=Path, help="end the SuperLink of HOME")


def join_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fedsys join``."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what `fedsys enrol` made")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would leave this device, and end"
    )


def enrol_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fedsys enrol``."""
    parser.add_argument("name", metavar="NAME", help="of the device, such as clinic-a")
    parser.add_argument("--home", type=Path, default=HOME, help="of the server (%(default)s)")
    parser.add_argument(
        "--server", metavar="HOST:PORT", default="127.0.0.1:8443", help="as the device calls it"
    )
    parser.add_argument("--folder", type=Path, help="the device folder to make; else ./NAME")
    parser.add_argument("--data", metavar="FILE", help="the device's own rows, there")
    parser.add_argument(
        "--public-key", metavar="FILE", type=Path, help="of a key that the device has made itself"
    )
    parser.add_argument(
        "--module", action="append", default=[], help="of your own that runs may name; repeatable"
    )
    parser.add_argument("--insecure", action="store_true", help="without keys; loopback only")
    parser.add_argument("--revoke", action="store_true", help="let the device join no more")


def serve(arguments: argparse.Namespace) -> int:
    """Run an experiment on the devices that are enrolled, or go on with it."""
    if arguments.stop is not None:
        from fedsys.deployment.superlink import stop

        stopped = stop(arguments.stop)
        sys.stderr.write("stopped\n" if stopped else f"no SuperLink runs for {arguments.stop}\n")
        return 0 if stopped else 1
    insecure = ["engine.insecure=true"] if arguments.insecure else []
    overrides = ["engine=deployment", *insecure, *arguments.overrides]
    from fedsys.config import configure

    begun = _begun(overrides)
    # Refused before anything heavy is imported.
    if begun is None and not isinstance(configure(overrides).engine, Deployment):
        raise ConfigError(["engine: `fedsys serve` runs on devices; simulate by `fedsys run`"])
    from fedsys.console import Terminal
    from fedsys.experiment import resume, run

    with Terminal() as terminal:
        if begun is None:
            run(overrides, terminal)
        else:
            resume(begun, terminal)
    return 0


def join(arguments: argparse.Namespace) -> int:
    """Take part as the device of a folder."""
    from fedsys.deployment.join import join as take_part

    return take_part(arguments.folder, arguments.dry_run)


def enrol(arguments: argparse.Namespace) -> int:
    """Enrol a device, or revoke one."""
    from fedsys.deployment.bundle import bundle
    from fedsys.deployment.enrolment import enrol as enrol_device
    from fedsys.deployment.enrolment import revoke

    if arguments.revoke:
        revoke(arguments.name, arguments.home)
        sys.stdout.write(f"{arguments.name} is revoked; a server that runs takes it off\n")
        return 0
    folder = enrol_device(
        arguments.name,
        arguments.home,
        arguments.server,
        folder=arguments.folder,
        data=arguments.data,
        insecure=arguments.insecure,
        public_key=arguments.public_key,
        code=[bundle(arguments.module).hash],
    )
    sys.stdout.write(f"{folder}\n")
    sys.stderr.write(
        f"copy it to the device, read policy.yaml there, and `fedsys join {folder.name}`\n"
    )
    return 0


def _begun(overrides: Sequence[str]) -> Path | None:
    """Return the folder of a run that was begun by the same words, as when a service restarts."""
    from omegaconf import OmegaConf

    named = [text.partition("=")[2] for text in overrides if text.startswith("out=")]
    if not named:
        return None
    folder = Path(named[-1])
    kept = folder / "overrides.yaml"
    if not (folder / "config.yaml").is_file() or not kept.is_file():
        return None
    if OmegaConf.to_container(OmegaConf.load(kept)) == list(overrides):
        return folder
    raise ConfigError(
        [f"out={folder}: holds another run; `fedsys resume {os.fspath(folder)}` goes on with it"]
    )
