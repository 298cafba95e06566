"""Other quantizations of the served file, made once and kept; and what llmsite's own llama.cpp was compiled for.

llama.cpp works in a child process (`python -m inference.bench.servers.variants`), which a broken file may end.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from inference.bench import environments
from inference.bench.environments import PeerUnavailable, Say

FOLDER = environments.HOME / "models"
LIMIT_SECONDS = 600
TYPES = ("q4_0", "q8_0")


def make(source: Path, kind: str, say: Say, folder: Path = FOLDER) -> Path:
    """The variant's file, quantized on first use. Raises PeerUnavailable."""
    if kind not in TYPES:
        raise ValueError(f"{kind!r} is none of {', '.join(TYPES)}")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = folder / f"{digest[:16]}-{kind}.gguf"
    if not target.exists():
        say(f"quantizing the model to {kind.upper()} (once)")
        folder.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".part")
        _ask({"source": str(source), "target": str(scratch), "kind": kind})
        scratch.replace(target)
    return target


def build() -> dict[str, Any]:
    """Version and processor features of llmsite's llama.cpp. Raises PeerUnavailable."""
    return _ask({})


def _ask(question: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "inference.bench.servers.variants", json.dumps(question)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=environments.ROOT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"quantizing took longer than {LIMIT_SECONDS} s") from error
    if done.returncode != 0:
        raise PeerUnavailable(f"llama.cpp ended with {done.returncode}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(question: dict[str, str]) -> None:
    import llama_cpp

    answer = {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode().strip(" |")}
    if question:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{question['kind'].upper()}")
        params.allow_requantize = True
        status = llama_cpp.llama_model_quantize(question["source"].encode(), question["target"].encode(), params)
        if status != 0:
            sys.exit(f"llama_model_quantize answered {status}")
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
