"""llama-cpp-python's own server, `python -m llama_cpp.server`: one sequence at a time, one request after another.

The llama_cpp that it imports is the one that llmsite runs; what else it imports is in the environment of the peers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from inference.bench import children
from inference.bench.environments import PeerUnavailable
from inference.bench.servers.llama_server import Running, Setup

START_SECONDS = 90
OPTIONS = ("--logits_all", "false", "--interrupt_requests", "false", "--verbose", "false")
"""It would compute the scores of whole prompts, and end a stream when another request comes."""


def arguments(setup: Setup, port: int) -> list[str]:
    return [
        *("--model", str(setup.model), "--host", "127.0.0.1", "--port", str(port)),
        *("--n_ctx", str(setup.context), "--n_threads", str(setup.threads), "--n_threads_batch", str(setup.threads)),
        *OPTIONS,
    ]


def link_llama_cpp(folder: Path) -> Path:
    """A folder to import from that holds llmsite's llama_cpp and nothing else. Raises PeerUnavailable."""
    found = find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise PeerUnavailable("llama-cpp-python is not installed: run `make install`")
    folder.mkdir()
    (folder / "llama_cpp").symlink_to(found.submodule_search_locations[0], target_is_directory=True)
    return folder


@contextmanager
def running(environment: Path, scratch: Path, setup: Setup) -> Iterator[Running]:
    """The server for as long as the block lasts. Raises PeerUnavailable."""
    port = children.free_port()
    log = scratch / "llama_cpp-server.log"
    packages = link_llama_cpp(scratch / "packages")
    command = [str(environment / "bin" / "python"), "-m", "llama_cpp.server", *arguments(setup, port)]
    with children.child(command, log, env={"PYTHONPATH": str(packages)}, cwd=scratch) as process:
        try:
            children.wait_until(
                lambda: children.answers_200(port, "/v1/models"),
                process,
                log,
                seconds=START_SECONDS,
                what="llama_cpp.server",
            )
        except children.NotStarted as error:
            raise PeerUnavailable(str(error)) from error
        yield Running(port=port, pid=process.pid, build={"version": version("llama-cpp-python")})
