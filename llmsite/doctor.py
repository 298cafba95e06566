"""`manage.py doctor`: what is wrong with this installation, and how to mend each thing.

Works where nothing else does: with wrong settings it lists them and looks at what needs none. It mends nothing itself.
Called by manage.py before Django loads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from accounts.management.help import epilog, parsed
from llmsite.config import MAX_SOCKET_PATH_BYTES, Config, ConfigError, load
from llmsite.install import WITHOUT_AMX

FULL_DISK_BYTES = 200 * 1024**2
TIGHT_DISK_BYTES = 2 * 1024**3
LLAMA_QUESTION_SECONDS = 60
CPU_FLAGS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "BMI2": "bmi2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
}
"""What llama.cpp was compiled to use, and the processor's name for it in /proc/cpuinfo."""

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` says what to do; empty where nothing is wrong."""

    level: Level
    subject: str
    text: str
    mend: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, mend: str) -> Finding:
    return Finding("warning", subject, text, mend)


def error(subject: str, text: str, mend: str) -> Finding:
    return Finding("error", subject, text, mend)


EXAMPLES = ("doctor", "doctor --json", "doctor --settings-table")
STATUSES = {0: "no error was found", 1: "an error was found"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings-table", action="store_true", help="print the table of settings as Markdown")


def main(arguments: list[str]) -> int:
    """The exit status is 1 if anything is an error, else 0."""
    parser = argparse.ArgumentParser(
        prog="manage.py doctor",
        description="Look at settings, database, Redis, workers, models, disk and processor; say how to mend each.",
        epilog=epilog(EXAMPLES, STATUSES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parsed(parser, arguments)
    if options.settings_table:
        print(settings_table())
        return 0
    findings = list(examine())
    has_errors = any(finding.level == "error" for finding in findings)
    if options.json:
        print(json.dumps({"ok": not has_errors, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(as_line(finding))
    return 1 if has_errors else 0


def as_line(finding: Finding) -> str:
    line = f"{finding.level:<8}{finding.subject}: {finding.text}"
    return f"{line}\n        → {finding.mend}" if finding.mend else line


def settings_table() -> str:
    """The README's table of settings, from the fields of Config."""
    rows = ["| Setting | Default | Meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            shown = str(default).lower()
        elif isinstance(default, list):
            shown = ",".join(default)
        else:
            shown = "" if default is None else str(default)
        meaning = (field.description or "").replace("|", "\\|")
        choices = get_args(field.annotation)
        if choices and all(isinstance(choice, str) for choice in choices):
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{name.upper()}` | {f'`{shown}`' if shown else ''} | {meaning} |")
    return "\n".join(rows)


def examine() -> Iterator[Finding]:
    """All findings, the ones that need nothing first."""
    yield from look_at_python()
    yield from look_at_llama()
    try:
        config = load()
    except ConfigError as problem:
        for sentence in problem.problems:
            yield error("settings", sentence, "Change the environment; the README lists every setting.")
        return
    yield ok("settings", f"{len(Config.model_fields)} read from the environment, none wrong")
    yield from look_at_state_folder(config)
    yield from look_at_secrets(config)
    yield from look_at_socket_path(config)
    yield from look_at_django()


# What needs no settings


def look_at_python() -> Iterator[Finding]:
    yield ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def look_at_llama() -> Iterator[Finding]:
    """The version without importing it; its processor features from a child, because the wrong ones kill a process."""
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        yield warning("llama.cpp", "llama-cpp-python is not installed", "A worker needs it: `make install`.")
        return
    question = (
        "import llama_cpp; print(llama_cpp.llama_print_system_info().decode());"
        "print('OFFLOADS = ' + str(int(llama_cpp.llama_supports_gpu_offload())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", question],
        capture_output=True,
        text=True,
        timeout=LLAMA_QUESTION_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    mend = "It was compiled for another processor: `pip cache remove 'llama_cpp_python*'; make clean install`."
    if done.returncode != 0:
        yield error("llama.cpp", f"llama-cpp-python {version} does not load ({done.stderr.strip()[-200:]})", mend)
        return
    if missing := missing_cpu_features(done.stdout, processor_flags()):
        yield error("llama.cpp", f"{version} uses {', '.join(missing)}, which this processor has not", mend)
        return
    if "AMX_INT8" in used_features(done.stdout):
        yield warning(
            "llama.cpp",
            f"{version} was compiled with AMX, which some compilers get wrong, and whose results depend on the batch",
            f"CFLAGS and CXXFLAGS with {WITHOUT_AMX}, as `make install` sets them, leave it out.",
        )
    else:
        yield ok("llama.cpp", f"llama-cpp-python {version} loads and fits this processor")
    yield look_at_processor(done.stdout)
    yield look_at_gpu(done.stdout)


def look_at_processor(system_info: str) -> Finding:
    """What llama.cpp uses of it, and what it leaves."""
    used, flags = used_features(system_info), processor_flags()
    shown = f"llama.cpp uses {', '.join(name for name in CPU_FLAGS if name in used) or 'no vector instructions'}"
    unused = sorted(name for name, flag in CPU_FLAGS.items() if name not in used and flag in (flags or ()))
    if not unused:
        return ok("processor", f"{os.cpu_count()} CPUs; {shown}" + ("" if flags else ", of which none was looked for"))
    mend = "Models would be faster with it: `CMAKE_ARGS=-DGGML_NATIVE=ON make clean install` on this machine."
    return warning("processor", f"{shown}, and leaves {', '.join(unused)} of this processor unused", mend)


def look_at_gpu(system_info: str) -> Finding:
    """Which GPUs the kernel shows, and whether llama.cpp was compiled for any."""
    found, can_offload = gpus(), "OFFLOADS" in used_features(system_info)
    if found and not can_offload:
        options = " or ".join(dict.fromkeys(f"-DGGML_{backend}=ON" for _, backend in found))
        return warning(
            "gpu",
            f"{', '.join(name for name, _ in found)}; llama.cpp was compiled without it, so n_gpu_layers does nothing",
            f"`CMAKE_ARGS={options} make clean install`, with the vendor's compiler installed.",
        )
    seen = ", ".join(name for name, _ in found) or "none is seen"
    return ok("gpu", f"{seen}; llama.cpp was compiled {'to use one' if can_offload else 'for processors alone'}")


def gpus(root: Path = Path("/")) -> list[tuple[str, str]]:
    """(name, llama.cpp's backend for it) of each GPU whose driver is loaded."""
    found = []
    for place in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", place.read_text(errors="replace"), re.MULTILINE)
        found.append((model.group(1).strip() if model else "an NVIDIA GPU", "CUDA"))
    if not found and (root / "dev/nvidiactl").exists():  # a container sees the devices alone
        found.append(("an NVIDIA GPU", "CUDA"))
    if (root / "dev/kfd").exists():
        found.append(("an AMD GPU", "HIP"))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append(("Apple's GPU", "METAL"))
    return found


def processor_flags() -> frozenset[str] | None:
    """None where the system does not say."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return frozenset(found.group(1).split()) if found else None


def used_features(system_info: str) -> set[str]:
    """What llama.cpp says that it was compiled to use."""
    return {name for name, value in re.findall(r"(\w+) = (\d+)", system_info) if value != "0"}


def missing_cpu_features(system_info: str, flags: frozenset[str] | None) -> list[str]:
    """Features that llama.cpp says it uses and the processor does not name."""
    if flags is None:
        return []
    used = used_features(system_info)
    return sorted(name for name, flag in CPU_FLAGS.items() if name in used and flag not in flags)


# What needs settings


def look_at_state_folder(config: Config) -> Iterator[Finding]:
    folder = config.state
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(place, os.W_OK):
        yield error("state folder", f"{place} cannot be written", "Choose another STATE_DIR, or change its owner.")
        return
    free = shutil.disk_usage(place).free
    text = f"{folder}, {free / 1024**3:.1f} GiB free"
    if free < FULL_DISK_BYTES:
        yield error("disk", text, "Make room: the database cannot grow any more.")
    elif free < TIGHT_DISK_BYTES:
        yield warning("disk", text, "Make room before models are added.")
    else:
        yield ok("disk", text)


def look_at_secrets(config: Config) -> Iterator[Finding]:
    """Secrets made in the state folder are right for one machine only."""
    for name, value in (("SECRET_KEY", config.secret_key), ("KEY_PEPPER", config.key_pepper)):
        if value:
            yield ok(name, "set")
        elif config.database_url or config.redis_url:
            mend = f"Set {name} to the same value everywhere before a second machine joins."
            yield warning(name, "made in the state folder, while DATABASE_URL or REDIS_URL may be shared", mend)
        else:
            yield ok(name, "kept in the state folder")


def look_at_socket_path(config: Config) -> Iterator[Finding]:
    if config.redis_url:
        return
    path = config.embedded_valkey_socket
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_SOCKET_PATH_BYTES:
        mend = "Set TMPDIR or STATE_DIR to a shorter path."
        yield error("socket", f"{path} has {num_bytes} bytes, {MAX_SOCKET_PATH_BYTES} are allowed", mend)
    elif not path.is_relative_to(config.state):
        yield ok("socket", f"{path} (the path of STATE_DIR is too long for a socket)")
    else:
        yield ok("socket", f"{path} ({num_bytes} of {MAX_SOCKET_PATH_BYTES} bytes)")


# What needs Django


def look_at_django() -> Iterator[Finding]:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    import django
    from django.apps import apps

    try:
        if not apps.ready:  # else this is the site itself, which shows what it finds in its console
            django.setup()
    except Exception as problem:  # noqa: BLE001 - the border: whatever keeps the site from starting is the finding
        yield error("django", f"the site does not load: {type(problem).__name__}: {problem}", "`make install`?")
        return
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("checks", look_at_system_checks),
        ("database", look_at_database),
        ("redis", look_at_redis),
        ("workers", look_at_workers),
        ("models", look_at_models),
    ]
    for subject, look in looks:
        try:
            yield from look()
        except Exception as problem:  # noqa: BLE001 - one part that is broken must not hide the next
            yield error(subject, f"cannot be looked at: {type(problem).__name__}: {problem}", "See the lines above.")


def look_at_system_checks(*, deployed: bool = False) -> Iterator[Finding]:
    """deployed: also what `manage.py check --deploy` says."""
    from django.core import checks

    told = checks.run_checks(include_deployment_checks=deployed)
    found = [message for message in told if not message.is_silenced() and message.level >= checks.WARNING]
    for message in found:
        level: Level = "error" if message.level >= checks.ERROR else "warning"
        yield Finding(level, f"check {message.id}", str(message.msg), str(message.hint or "See `manage.py check`."))
    if not found:
        yield ok("checks", "none of Django's or ours complains")


def look_at_database() -> Iterator[Finding]:
    from django.db import DatabaseError, connection
    from django.db.migrations.executor import MigrationExecutor

    name = connection.settings_dict["NAME"]
    if connection.vendor == "sqlite" and not Path(name).exists():
        yield warning("database", f"{name} does not exist yet", "`make run` or `manage.py migrate` makes it.")
        return
    try:
        executor = MigrationExecutor(connection)
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as problem:
        yield error("database", f"does not answer: {problem}", "Look at DATABASE_URL and at the server.")
        return
    if missing:
        yield error("database", f"{len(missing)} migrations are missing", "`manage.py migrate`")
    else:
        yield ok("database", f"{connection.vendor} {name}, all migrations applied")


def look_at_redis() -> Iterator[Finding]:
    import redis

    from accounts import redis_client
    from llmsite.config import get_config

    config = get_config()
    try:
        server: Any = redis_client.client().info("server")
        policy = redis_client.client().config_get("maxmemory-policy").get("maxmemory-policy")
    except redis.ResponseError:
        policy = None  # managed servers hide CONFIG
    except redis.RedisError as problem:
        if config.redis_url:
            yield error("redis", f"does not answer: {problem}", "Look at REDIS_URL and at the server.")
        else:
            yield warning("redis", "the embedded Valkey does not run", "`make run` or `manage.py up` starts it.")
        return
    version = server.get("valkey_version") or server.get("redis_version")
    if policy not in {None, "noeviction"}:
        mend = "Set maxmemory-policy to noeviction, or waiting requests may vanish."
        yield warning("redis", f"{version}, maxmemory-policy is {policy}", mend)
    else:
        yield ok("redis", f"{version} answers")


ABILITIES = {
    "trim": "the prompt cache",
    "copy": "copies of slots",
    "shift": "context shift",
    "save": "states of slots",
}


def look_at_workers() -> Iterator[Finding]:
    import redis

    from inference.transport.queue import ticket_queue

    try:
        workers = ticket_queue().workers()
    except redis.RedisError:
        yield warning("workers", "unknown, because Redis does not answer", "See the lines above.")
        return
    if not workers:
        yield warning("workers", "none lives", "`make run` or `manage.py worker` starts one.")
    for worker in workers:
        yield ok("worker", f"{worker.worker_id} in pool {worker.pool}")
        for model in worker.info.get("models", []):
            for ability, reason in (model.get("cannot") or {}).items():
                yield ok("model", f"{model['name']} is served without {ABILITIES.get(ability, ability)}: {reason}")


def look_at_models() -> Iterator[Finding]:
    from django.db import DatabaseError

    from inference.catalog.model_memory import memory_of
    from inference.models import ServedModel
    from inference.vetting.inspection import is_unchanged
    from inference.worker.memory import budget_of_machine

    try:
        rows = list(ServedModel.objects.exclude(load_mode=ServedModel.LoadMode.OFF))
    except DatabaseError:
        yield warning("models", "unknown, because the database is not ready", "See the lines above.")
        return
    if not rows:
        yield warning("models", "none is registered", "`manage.py register_model FILE NAME`, or the admin.")
    for row in rows:
        variant = row.active_variant
        file = variant or row
        path = Path(file.path)
        again = f"`manage.py register_model {row.path} {row.name}` reads it again."
        if variant:
            again = f"`manage.py activate_variant {row.name} --revert` serves the model's own file."
        if not path.is_file():
            yield error(f"model {row.name}", f"{path} is missing", f"Put it back, or: {again}")
        elif not is_unchanged(path, file.digest, file.metadata):
            yield warning(f"model {row.name}", f"{path} is not the file that was registered", again)
        elif (need := memory_of(row, variant).total_bytes) > budget_of_machine():
            yield warning(
                f"model {row.name}",
                f"it needs {need / 1e6:,.0f} MB, more than a worker on this machine has for models",
                "Raise MODEL_MEMORY_MB if the memory is there; else lower n_ctx, n_slots or SLOT_MEMORY_MB.",
            )
        else:
            yield ok(f"model {row.name}", f"{path.name}, {row.n_slots} slots of {row.n_ctx} tokens")
