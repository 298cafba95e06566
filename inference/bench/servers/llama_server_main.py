"""Runs llama.cpp's HTTP server in the environment of the peers: `python llama_server_main.py '{"model": ...}'`.

Standard library and xllamacpp, which only that environment has. Ends with TERM; its parent's death ends it, too.
"""

from __future__ import annotations

import json
import signal
import sys
from importlib import import_module
from typing import Any

BUILD = "build: "


def main(asked: dict[str, Any]) -> None:
    xllamacpp: Any = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.port = asked["port"]
    params.n_parallel = asked["n_parallel"]
    params.n_ctx = asked["n_ctx"]
    params.kv_unified = False  # every slot has its context, as on the other side
    params.cpuparams.n_threads = asked["n_threads"]
    params.cpuparams_batch.n_threads = asked["n_threads"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in asked["adapters"]]
    params.lora_init_without_apply = True  # requests name them
    if asked["lookup"]:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        sizes = params.speculative.ngram_simple
        sizes.size_n = asked["lookup"]["match_tokens"] or sizes.size_n
        sizes.size_m = asked["lookup"]["draft_tokens"] or sizes.size_m
    print(f"{BUILD}{json.dumps(_build(xllamacpp))}", flush=True)
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()  # TERM ends it


def _build(xllamacpp: Any) -> dict[str, Any]:
    return {"version": xllamacpp.__version__, **xllamacpp.BUILD_INFO, "system": xllamacpp.get_system_info().strip(" |")}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
