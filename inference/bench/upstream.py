"""A stand-in for an OpenAI-compatible model server that answers at once with a text of a set length.

It is what LiteLLM forwards to, and what the load generator calls directly: the difference is LiteLLM's cost. Runs as
`python -m inference.bench.upstream --text-bytes N --chunks N`, prints its port, serves until it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from typing import cast

import httptools
import uvloop

MODEL = "instant"
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """The two answers, rendered once."""

    whole: bytes
    stream: bytes


def render_answers(text: str, num_chunks: int) -> Answers:
    """OpenAI's chat completion of this text, as one JSON body and as server-sent events of num_chunks deltas."""
    head = {"id": "chatcmpl-instant", "created": 1, "model": MODEL}
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": num_chunks,
        "total_tokens": PROMPT_TOKENS + num_chunks,
    }
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
    body = json.dumps({**head, "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    whole = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    ) + body

    frames = []
    for part in split_text(text, num_chunks):
        delta = {"index": 0, "delta": {"role": "assistant", "content": part}, "finish_reason": None}
        frames.append({**head, "object": "chat.completion.chunk", "choices": [delta]})
    last = {"index": 0, "delta": {}, "finish_reason": "length"}
    frames.append({**head, "object": "chat.completion.chunk", "choices": [last]})
    events = [f"data: {json.dumps(frame)}\n\n".encode() for frame in frames] + [b"data: [DONE]\n\n"]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    stream = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunked
        + b"0\r\n\r\n"
    )
    return Answers(whole, stream)


def split_text(text: str, num_chunks: int) -> list[str]:
    """The text in at most num_chunks parts of nearly equal length."""
    size = max(1, -(-len(text) // num_chunks))
    return [text[start : start + size] for start in range(0, len(text), size)]


class _Upstream(asyncio.Protocol):
    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        streams = b'"stream":true' in self._body.replace(b" ", b"")
        self._transport.write(self._answers.stream if streams else self._answers.whole)


async def _serve(answers: Answers) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Upstream(answers), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text-bytes", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=16)
    options = parser.parse_args()
    text = ("word " * (options.text_bytes // 5 + 1))[: options.text_bytes]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(render_answers(text, options.chunks)))


if __name__ == "__main__":
    main()
