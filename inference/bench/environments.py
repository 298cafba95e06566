"""Environments of the benchmark's peers: made under build/ from a lock file on first use, never beside llmsite.

Blocking, on the command's main thread; what pip does is said package by package.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from inference.bench import children

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "bench"
"""What the benchmark keeps between runs: environments, quantized variants."""
INSTALL_SECONDS = 900
MARK = "installed.txt"

Say = Callable[[str], None]


class PeerUnavailable(Exception):
    """A peer cannot be installed or started here; the message says why."""


def make(environment: Path, requirements: Path, what: str, say: Say) -> Path:
    """The environment's folder, made or renewed if the lock file or the interpreter changed. Raises PeerUnavailable."""
    mark = environment / MARK
    if mark.exists() and mark.read_text() == _wanted(requirements):
        return environment
    if environment.exists():
        shutil.rmtree(environment)
    say(f"installing {what} into an environment of its own (once)")
    venv.create(environment, with_pip=True)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--require-hashes", "--no-input"]
    _pip([*command, "--progress-bar", "off", "-r", str(requirements)], environment / "install.log", say)
    mark_installed(environment, requirements)
    return environment


def mark_installed(environment: Path, requirements: Path) -> None:
    """Note what the environment holds: the next run compares it with the lock file."""
    (environment / MARK).write_text(_wanted(requirements))


def version(environment: Path, package: str) -> str:
    """The installed version, read from its metadata. Raises PeerUnavailable."""
    found = sorted(environment.glob(f"lib/python*/site-packages/{package}-*.dist-info"))
    if not found:
        raise PeerUnavailable(f"{package} is not in {environment.name}")
    return found[0].name.removeprefix(f"{package}-").removesuffix(".dist-info")


def _wanted(requirements: Path) -> str:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} {python}"


def _pip(command: list[str], log: Path, say: Say) -> None:
    """Run pip, saying how far it is every few packages."""
    with log.open("w") as record:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        num_packages = 0
        for line in process.stdout:
            record.write(line)
            if line.startswith("Collecting "):
                num_packages += 1
                if num_packages % 20 == 0:
                    say(f"{num_packages} packages, at {line.split()[1]}")
        status = process.wait(INSTALL_SECONDS)
    if status != 0:
        raise PeerUnavailable(f"pip ended with {status}:\n{children.tail(log)}")
