"""What LiteLLM gets of a site, as JSON; run by the Python of LiteLLM's own environment: base URL, key, model."""

from __future__ import annotations

import json
import sys
from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def calls(litellm: Any, model: str, **where: Any) -> dict[str, Any]:
    """One answer whole, as a stream, and as a forced call; and the exception for a model that nobody knows."""
    ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16, **where}
    whole = litellm.completion(model=model, temperature=0, **ask)
    pieces = litellm.completion(model=model, temperature=0, stream=True, **ask)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    forced = litellm.completion(model=model, tools=[WEATHER], tool_choice="required", **{**ask, "max_tokens": 120})
    try:
        litellm.completion(model=f"{model}-of-nobody", **ask)
        error = ""
    except Exception as problem:  # noqa: BLE001 - its name is what the test asks for
        error = type(problem).__name__
    return {
        "text": whole.choices[0].message.content,
        "streamed": text,
        "prompt_tokens": whole.usage.prompt_tokens,
        "completion_tokens": whole.usage.completion_tokens,
        "call": forced.choices[0].message.tool_calls[0].function.model_dump(),
        "error": error,
    }


def main() -> None:
    import litellm

    base_url, key, model = sys.argv[1:]
    found = {
        "openai": calls(litellm, f"openai/{model}", api_base=f"{base_url}/v1", api_key=key, max_retries=0),
        "anthropic": calls(litellm, f"anthropic/{model}", api_base=base_url, api_key=key, max_retries=0),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
