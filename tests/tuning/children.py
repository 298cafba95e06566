"""A child that misbehaves as the question says: `python -m tests.tuning.children`, started by steps.ask_child."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def main() -> None:
    question = json.load(sys.stdin)
    print(json.dumps({"part": 0.5}), flush=True)
    manner = question["manner"]
    if manner == "crash":
        print("GGML_ASSERT failed: a row is too long", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if manner == "hang":
        time.sleep(600)
    if manner == "babble":
        print("this is no JSON", flush=True)
    if manner == "refuse":
        print(json.dumps({"ok": False, "reason": "llama.cpp refuses the format"}), flush=True)
    if manner == "answer":
        print(json.dumps({"ok": True, "pid": os.getpid()}), flush=True)


if __name__ == "__main__":
    main()
