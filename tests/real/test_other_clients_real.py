"""langchain-openai and LiteLLM as clients of a running site with the real model, as their users have them."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from inference.bench import peer
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"


def test_langchain_chats_streams_and_calls_tools(llama_site: LlamaSite) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from langchain_core.tools import tool
        from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}"

    site = llama_site.site
    options: dict[str, Any] = {"base_url": f"{site.base_url}/v1", "api_key": site.key, "max_retries": 0}
    model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=16, stream_usage=True, **options)
    whole = model.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    pieces = list(model.stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    sums = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert [each["total_tokens"] for each in sums] == [whole.usage_metadata["total_tokens"]]
    caller = ChatOpenAI(model=MODEL, temperature=0, max_tokens=120, **options)
    answer = caller.bind_tools([get_weather], tool_choice="any").invoke("What is the weather in Rome?")
    assert [call["name"] for call in answer.tool_calls][:1] == ["get_weather"]
    assert isinstance(answer.tool_calls[0]["args"]["city"], str)


def test_langchain_completes_a_batch_of_twenty_in_one_request(llama_site: LlamaSite) -> None:
    """It sends as many prompts at once unless it is told otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_openai import OpenAI

    site = llama_site.site
    options: dict[str, Any] = {"base_url": f"{site.base_url}/v1", "api_key": site.key, "max_retries": 0}
    model = OpenAI(model=MODEL, temperature=0, max_tokens=4, **options)
    assert model.batch_size == 20
    found = model.generate([f"Number {number} is" for number in range(20)])
    assert len(found.generations) == 20
    assert found.generations[7][0].text == model.invoke("Number 7 is")


@pytest.mark.timeout(600)  # the first time it makes LiteLLM's environment
def test_litellm_speaks_both_dialects(llama_site: LlamaSite) -> None:
    python = peer.install(print) / "bin" / "python"  # of its own, as its pins are not ours; made once
    site = llama_site.site
    command = [str(python), str(Path(__file__).with_name("litellm_calls.py")), site.base_url, site.key, MODEL]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index('{"openai"') :])
    for dialect, said in found.items():
        assert said["text"] == said["streamed"] == found["openai"]["text"], dialect
        assert said["prompt_tokens"] == found["openai"]["prompt_tokens"], dialect
        assert said["completion_tokens"] == 16, dialect
        assert said["call"]["name"] == "get_weather", dialect
        assert isinstance(json.loads(said["call"]["arguments"])["city"], str), dialect
        assert said["error"] == "NotFoundError", dialect
