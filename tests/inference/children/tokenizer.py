"""A child with the protocol of inference.engine.tokenizer and the manners of the worst vocabulary.

The text says what happens: words are counted into tokens, but `hang`, `doze`, `die`, `nonsense`, `array` and `long`
misbehave, and `until FILE` waits for a file. The name of the vocabulary file says how it starts.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path


def send(message: object) -> None:
    raw(json.dumps(message).encode())


def raw(body: bytes) -> None:
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()


def answer(request: dict[str, object]) -> None:
    text = str(request.get("text") or request.get("grammar"))
    if text == "hang":
        time.sleep(60)
    elif text == "doze":
        time.sleep(0.9)
        send({"ok": True, "tokens": [4]})
    elif text == "die":
        os._exit(3)
    elif text == "nonsense":
        raw(b"not json")
    elif text == "array":
        send([1])
    elif text == "long":
        sys.stdout.buffer.write(struct.pack(">I", 2**31))
        sys.stdout.buffer.flush()
    elif text == "wrong":
        send({"ok": False, "code": "malformed_request", "message": "cannot"})
    elif text == "pid":
        send({"ok": True, "tokens": [os.getpid()]})
    elif request["op"] == "info":
        send({"ok": True, "n_vocab": 5})
    elif request["op"] == "detokenize":
        send({"ok": True, "text": " ".join(map(str, request["tokens"]))})  # type: ignore[call-overload]
    else:
        while text.startswith("until ") and not Path(text.removeprefix("until ")).exists():
            time.sleep(0.005)
        send({"ok": True, "tokens": [len(word) for word in text.split()]})


def main() -> None:
    vocabulary = Path(sys.argv[1]).name
    if vocabulary == "dies.gguf":
        os._exit(3)
    send({"ok": vocabulary != "bad.gguf", "message": "cannot be read"})
    while header := sys.stdin.buffer.read(4):
        answer(json.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0])))


main()
