"""Requests of every kind whose prompts, outputs, labels and keys are words that nobody else says.

Outputs are forced letter by letter, so that no request holds the word that its answer is to be.
"""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

ADAPTER = [{"name": "shakespeare", "scale": 0.5}]
BOUND = {"max_tokens": 60, "temperature": 0}


@dataclass
class Canaries:
    """Words by name; a name says what it is (prompt, output, label, secret, tokens), and of what request."""

    words: dict[str, list[bytes]] = field(default_factory=dict)
    draw: random.Random = field(default_factory=random.SystemRandom)

    def mint(self, kind: str, name: str) -> str:
        word = "".join(self.draw.choices(string.ascii_lowercase, k=20))
        assert f"{kind} {name}" not in self.words
        self.words[f"{kind} {name}"] = [word.encode()]
        return word

    def know(self, name: str, *looks: bytes) -> None:
        self.words[name] = list(looks)

    def text(self, name: str) -> str:
        return self.words[name][0].decode()


def forced(word: str) -> str:
    return "root ::= " + " ".join(f'"{letter}"' for letter in word)


def shaped(word: str) -> dict[str, Any]:
    """A schema whose one value is that word, which is not written in it."""
    pattern = "^" + "".join(f"[{letter}]" for letter in word) + "$"
    return {
        "type": "object",
        "properties": {"word": {"type": "string", "pattern": pattern}},
        "required": ["word"],
        "additionalProperties": False,
    }


@dataclass
class Caller:
    """A tenant that says its words in every dialect. Each method is one kind of request and asserts its answers."""

    client: httpx.Client
    canaries: Canaries

    def prompt(self, name: str) -> str:
        return f"The word {self.canaries.mint('prompt', name)} is mine. Say"

    def post(self, path: str, status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        answer = self.client.post(path, json=body, headers=headers)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer

    def says(self, answer: httpx.Response, name: str) -> None:
        assert self.canaries.text(f"output {name}") in answer.text, (name, answer.text)

    # Dialects

    def native(self) -> None:
        ways: dict[str, dict[str, Any]] = {
            "plain native": {},
            "held native stream": {"stream": True},
            "plain native adapters": {"adapters": ADAPTER},
            "plain native probabilities": {"n_probs": 3},
        }
        for name, more in ways.items():
            body = {
                "prompt": self.prompt(name),
                "max_new_tokens": 60,
                "stop": [self.canaries.mint("prompt", name + " stop")],
            }
            answer = self.post("/v1/generate", **body, grammar=forced(self.canaries.mint("output", name)), **more)
            if "stream" not in more:
                self.says(answer, name)
        prompts = [self.prompt("plain native batch"), self.prompt("plain native batch 2")]
        word = self.canaries.mint("output", "plain native batch")
        self.says(
            self.post("/v1/generate/batch", prompts=prompts, max_new_tokens=60, grammar=forced(word)),
            "plain native batch",
        )

    def held(self) -> None:
        """In the background, and with an Idempotency-Key."""
        word = self.canaries.mint("output", "held background")
        body = {"prompt": self.prompt("held background"), "max_new_tokens": 60, "grammar": forced(word)}
        asked = self.post("/v1/generate", 202, **body, background=True).json()
        self.wait(lambda: "answer" in self.client.get(asked["links"]["self"]).json())
        self.says(self.client.get(asked["links"]["self"]), "held background")
        word = self.canaries.mint("output", "held idempotent")
        key = {"Idempotency-Key": self.canaries.mint("label", "plain idempotency key")}
        body = {"messages": self.talk("held idempotent"), **BOUND, "grammar": forced(word)}
        for _ in range(2):
            self.says(self.post("/v1/chat/completions", headers=key, **body), "held idempotent")

    def talk(self, name: str) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": self.prompt(f"{name} system")},
            {"role": "user", "content": self.prompt(f"{name} user")},
            {"role": "assistant", "content": self.prompt(f"{name} assistant")},
            {"role": "user", "content": self.prompt(f"{name} last")},
        ]

    def openai(self) -> None:
        for name, more in {"plain chat": {}, "held chat stream": {"stream": True}, "plain chat n": {"n": 2}}.items():
            labels = {
                "user": self.canaries.mint("label", f"{name} user"),
                "metadata": {"a": self.canaries.mint("label", f"{name} metadata")},
            }
            word = self.canaries.mint("output", name)
            self.post("/v1/chat/completions", messages=self.talk(name), grammar=forced(word), **BOUND, **labels, **more)
        tool = {
            "name": "note",
            "description": self.prompt("plain tool"),
            "parameters": shaped(self.canaries.mint("output", "plain chat tool")),
        }
        tools = [{"type": "function", "function": tool}]
        answer = self.post(
            "/v1/chat/completions",
            messages=self.talk("plain chat tool"),
            tools=tools,
            tool_choice="required",
            max_tokens=400,
        )
        self.says(answer, "plain chat tool")
        word, user = self.canaries.mint("output", "plain text"), self.canaries.mint("label", "plain text user")
        self.says(
            self.post("/v1/completions", prompt=self.prompt("plain text"), grammar=forced(word), user=user, **BOUND),
            "plain text",
        )

    def responses(self, name: str) -> str:
        """The response's id. Stored where the tenant has them stored."""
        labels = {
            "user": self.canaries.mint("label", f"{name} user"),
            "metadata": {"a": self.canaries.mint("label", f"{name} metadata")},
        }
        body = {
            "input": self.prompt(name),
            "instructions": self.prompt(f"{name} instructions"),
            "max_output_tokens": 60,
        }
        form = {"format": {"type": "json_schema", "name": "x", "schema": shaped(self.canaries.mint("output", name))}}
        answer = self.post("/v1/responses", **body, text=form, **labels)
        self.says(answer, name)
        return str(answer.json()["id"])

    def anthropic(self) -> None:
        for name, more in {"plain messages": {}, "held messages stream": {"stream": True}}.items():
            user = {"user_id": self.canaries.mint("label", name)}
            system, *talk = self.talk(name)
            word = self.canaries.mint("output", name)
            self.post(
                "/v1/messages",
                system=system["content"],
                messages=talk,
                metadata=user,
                grammar=forced(word),
                **BOUND,
                **more,
            )

    def llama(self) -> None:
        word = self.canaries.mint("output", "plain llama")
        answer = self.post(
            "/completion", prompt=self.prompt("plain llama"), n_predict=60, grammar=forced(word), id_slot=1
        )
        self.says(answer, "plain llama")
        self.post("/slots/1?action=save", filename=self.canaries.mint("label", "plain slot"))
        self.post("/tokenize", content=self.prompt("plain tokenize"))
        self.post("/apply-template", messages=self.talk("plain template"))
        self.post("/v1/messages/count_tokens", messages=self.talk("plain count")[1:])
        route = {"X-Admission-Route": "/v1/chat/completions"}
        self.post("/v1/admission", headers=route, messages=self.talk("plain dry run"), **BOUND)

    # Files

    def batch(self) -> dict[str, str]:
        """Ids of the batch and its files, once it has ended."""
        lines = [self._line("batch line"), self._line("batch error", model="nobody")]
        name = self.canaries.mint("label", "batch file name")
        sent = {"file": (f"{name}.jsonl", "\n".join(lines).encode()), "purpose": (None, "batch")}
        file = self.client.post("/v1/files", files=sent).json()
        metadata = {"a": self.canaries.mint("label", "batch metadata")}
        body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = self.post("/v1/batches", **body, metadata=metadata).json()
        self.wait(lambda: self.client.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed", 60.0)
        batch = self.client.get(f"/v1/batches/{batch['id']}").json()
        self.says(self.client.get(f"/v1/files/{batch['output_file_id']}/content"), "batch line")
        wrong = {
            "file": ("x.jsonl", (self.canaries.mint("prompt", "batch wrong line") + "\n").encode()),
            "purpose": (None, "batch"),
        }
        body["input_file_id"] = self.client.post("/v1/files", files=wrong).json()["id"]
        failed = self.post("/v1/batches", **body).json()
        self.wait(lambda: self.client.get(f"/v1/batches/{failed['id']}").json()["status"] == "failed")
        return {
            "input": file["id"],
            "output": batch["output_file_id"],
            "error": batch["error_file_id"],
            "wrong": body["input_file_id"],
        }

    def _line(self, name: str, **more: Any) -> str:
        word = self.canaries.mint("output", name)
        body = {"messages": self.talk(name), "grammar": forced(word), **BOUND, **more}
        label = self.canaries.mint("label", f"{name} custom id")
        return json.dumps({"custom_id": label, "method": "POST", "url": "/v1/chat/completions", "body": body})

    # What is refused, and what ends badly

    def refused(self) -> None:
        mint = self.canaries.mint
        chat, generate = "/v1/chat/completions", "/v1/generate"
        say = [{"role": "user", "content": self.prompt("refused message")}]
        self.post(chat, 404, messages=say, model=mint("prompt", "refused unknown model"))
        self.post(chat, 400, messages=say, **{mint("prompt", "refused field"): 1, "n": 999})
        self.post(chat, 400, messages=[{"role": mint("prompt", "refused role"), "content": "x"}])
        self.post(chat, 400, messages=say, grammar=f"root ::= {mint('prompt', 'refused rule')}")
        self.post(chat, 400, messages=say, json_schema={"type": mint("prompt", "refused type")})
        self.post(
            chat,
            400,
            messages=say,
            tool_choice={"type": "function", "function": {"name": mint("prompt", "refused tool choice")}},
        )
        self.post(generate, 400, prompt=self.prompt("refused too long") * 900)
        self.post(generate, 404, prompt="x", adapters=[{"name": mint("prompt", "refused adapter"), "scale": 1}])
        self.post("/v1/responses", 400, input="x", previous_response_id=f"resp_{mint('prompt', 'refused previous')}")
        for body in (
            b'{"prompt": "' + mint("prompt", "refused no json").encode(),
            mint("prompt", "refused text alone").encode(),
        ):
            assert (
                self.client.post(generate, content=body, headers={"Content-Type": "application/json"}).status_code
                == 400
            )
        assert self.client.get(f"/v1/models?after={mint('label', 'refused query')}").status_code == 200
        agent = {
            "User-Agent": mint("label", "refused agent"),
            "Referer": f"http://x/{mint('label', 'refused referer')}",
        }
        assert self.client.get("/v1/models", headers=agent).status_code == 200

    def cut(self) -> None:
        """The client goes in the middle."""
        body = {"prompt": self.prompt("held cut"), "max_new_tokens": 800, "ignore_eos": True, "stream": True}
        with self.client.stream("POST", "/v1/generate", json=body) as answer:
            next(answer.iter_lines())

    def wrong_keys(self) -> None:
        word = self.canaries.mint("secret", "unknown")
        shape = f"llms_{word[:12]}_{self.canaries.mint('secret', 'shape')}{word}"
        bare = httpx.Client(base_url=self.client.base_url, timeout=30)
        with bare:
            for headers in (
                {"Authorization": f"Bearer {word}"},
                {"Authorization": f"Bearer {shape}"},
                {"X-API-Key": shape},
                {"Authorization": f"Basic {word}"},
                {"Cookie": f"sessionid={self.canaries.mint('secret', 'cookie')}"},
            ):
                assert bare.get("/v1/me", headers=headers).status_code == 401
            assert bare.get(f"/v1/me?api_key={self.canaries.mint('secret', 'query')}").status_code == 401
            page = bare.get("/admin/login/")
            form = {
                "username": self.canaries.mint("secret", "name"),
                "password": self.canaries.mint("secret", "password"),
            }
            form["csrfmiddlewaretoken"] = bare.cookies["csrftoken"]
            answer = bare.post("/admin/login/", data=form, headers={"Referer": str(page.url)})
            assert answer.status_code == 200, answer.status_code

    def know_tokens(self, *names: str) -> None:
        """The prompts of those names are looked for as token ids, too: 32 bits each, and as JSON writes them."""
        for name in names:
            word = self.canaries.text(f"prompt {name}")
            ids = self.post("/tokenize", content=f" {word}", add_special=False).json()["tokens"]
            packed = b"".join(each.to_bytes(4, "little") for each in ids)
            self.canaries.know(
                f"tokens {name}", packed, *(between.join(map(str, ids)).encode() for between in (",", ", "))
            )

    def wait(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.05)
