"""The line that shows a newcomer that it works. Standard library only: the supervisor prints it."""

from __future__ import annotations

import json

from llmsite.config import Config


def demo_curl_line(config: Config) -> str:
    """A request that anybody can paste, with the first demo tenant's key; empty without a demo."""
    try:
        demo = json.loads((config.state / "demo.json").read_text())
        key = demo["tenants"][0]["api_key"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return (
        f"curl -s {config.base_url}/v1/generate -H 'Authorization: Bearer {key}' "
        "-H 'Content-Type: application/json' \\\n"
        '  -d \'{"prompt": "The capital of France is", "max_new_tokens": 24}\''
    )
