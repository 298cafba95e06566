"""Trains a LoRA adapter for a llama-like GGUF model and writes it as GGUF: a script of its own, README.md has examples.

Needs requirements/train.txt in an environment of its own; llmsite itself never runs it, nor imports torch. The base's
weights are read from its GGUF file and stay as they are. Method: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script, from anywhere

from inference.demo_adapters import lessons

TARGETS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Linear layers of a block: their names in transformers, and in GGUF."""
DEFAULT_TARGETS = ("attn_q", "attn_v", "attn_output", "ffn_down")
WARM_STEPS = 20
REPORT_EVERY = 10
SEED = 1
IGNORED = -100
"""torch's label of positions that are not learned."""

Sample = tuple[list[int], list[int]]
"""Tokens, and the token to be learned at each of them."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    rank: int
    alpha: float
    steps: int
    batch: int
    window: int
    learning_rate: float
    targets: tuple[str, ...]
    threads: int


# Pure parts


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="train_lora.py", description="Train a LoRA adapter and write it as GGUF.")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", type=Path, metavar="FOLDER", help="learn to continue the .txt files of a folder")
    what.add_argument("--lessons", type=Path, metavar="FILE", help='learn chat answers: JSONL of {"prompt", "reply"}')
    what.add_argument("--json-reply", action="store_true", help="learn to answer in JSON, from the lessons built in")
    made.add_argument("--base", type=Path, required=True, help="the base model's .gguf file")
    made.add_argument("--out", type=Path, required=True, help="where the adapter is written")
    made.add_argument("--name", help="the adapter's title in the file; the file's stem without it")
    made.add_argument("--license", default="apache-2.0", help="noted in the file")
    made.add_argument("--steps", type=int, default=120)
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=float, default=16.0)
    made.add_argument("--batch", type=int, default=4, help="samples of a step")
    made.add_argument("--window", type=int, default=128, help="tokens of a sample of texts")
    made.add_argument("--learning-rate", type=float, default=1.5e-3, help="its peak")
    made.add_argument("--target", action="append", choices=sorted(TARGETS.values()), help="a layer; repeatable")
    made.add_argument("--threads", type=int, default=2)
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises ValueError where a number makes no sense."""
    for name in ("steps", "rank", "alpha", "batch", "window", "learning_rate", "threads"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
    return Settings(
        rank=options.rank,
        alpha=options.alpha,
        steps=options.steps,
        batch=options.batch,
        window=options.window,
        learning_rate=options.learning_rate,
        targets=tuple(options.target or DEFAULT_TARGETS),
        threads=options.threads,
    )


def learning_rate(step: int, settings: Settings) -> float:
    """Rises over the first steps, then falls in a line to a tenth of its peak."""
    return settings.learning_rate * min(1.0, (step + 1) / WARM_STEPS) * (1 - 0.9 * step / settings.steps)


def text_sample(tokens: list[int], window: int, chance: random.Random) -> Sample:
    """A window anywhere in the text; each token is to be followed by the next."""
    start = chance.randrange(max(1, len(tokens) - window))
    cut = tokens[start : start + window + 1]
    return cut[:-1], cut[1:]


def lesson_sample(prompt: list[int], reply: list[int]) -> Sample:
    """Only the reply is learned, not what the user writes."""
    tokens = prompt + reply
    return tokens[:-1], [IGNORED] * (len(prompt) - 1) + reply


def padded(samples: list[Sample], padding: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one length; what is added is not learned."""
    longest = max(len(tokens) for tokens, _ in samples)
    rows = [tokens + [padding] * (longest - len(tokens)) for tokens, _ in samples]
    labels = [wanted + [IGNORED] * (longest - len(wanted)) for _, wanted in samples]
    return rows, labels


def rope_order(rows: Floats, num_heads: int) -> Floats:
    """Rows of a query or key matrix as llama.cpp wants them: it rotates neighbours, transformers rotates halves."""
    size = rows.shape[0] // num_heads
    halves = rows.reshape(num_heads, 2, size // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def gguf_name(layer: int, target: str) -> str:
    return f"blk.{layer}.{target}.weight"


def matrices_of(name: str, a: Floats, b: Floats, num_heads: int, num_kv_heads: int) -> dict[str, NDArray[np.float16]]:
    """The two tensors of one layer. a: (rank, inputs), b: (outputs, rank), as transformers has the layer."""
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(name.split(".")[-2])
    ordered = rope_order(b, heads) if heads else b
    return {f"{name}.lora_a": a.astype(np.float16), f"{name}.lora_b": np.ascontiguousarray(ordered.astype(np.float16))}


# With torch


def load_base(path: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF file, in 32 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model.requires_grad_(False)
    return tokenizer, model


def add_adapters(model: Any, settings: Settings) -> dict[str, Any]:
    """Put A and B beside each target layer; B starts at zero, so the model is unchanged at first. GGUF name → layer."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer
            self.a = torch.nn.Parameter(torch.randn(settings.rank, layer.in_features) * 0.02)
            self.b = torch.nn.Parameter(torch.zeros(layer.out_features, settings.rank))

        def forward(self, x: Any) -> Any:
            return self.layer(x) + x @ self.a.T @ self.b.T * (settings.alpha / settings.rank)

    made = {}
    for number, block in enumerate(model.model.layers):
        for place, target in TARGETS.items():
            if target in settings.targets:
                part, name = place.split(".")
                layer = Adapted(getattr(getattr(block, part), name))
                setattr(getattr(block, part), name, layer)
                made[gguf_name(number, target)] = layer
    return made


def sampler(options: argparse.Namespace, tokenizer: Any, settings: Settings) -> Callable[[], list[Sample]]:
    """What gives the samples of a step."""
    chance = random.Random(SEED)
    if options.texts:
        tokens = [token for text in lessons.read_texts(options.texts) for token in tokenizer(text)["input_ids"]]
        print(f"{len(tokens):,} tokens of text", flush=True)
        return lambda: [text_sample(tokens, settings.window, chance) for _ in range(settings.batch)]
    found = lessons.json_lessons() if options.json_reply else lessons.read_lessons(options.lessons)
    samples = [lesson_sample(*_encoded(tokenizer, lesson)) for lesson in found]
    return lambda: chance.sample(samples, min(settings.batch, len(samples)))


def _encoded(tokenizer: Any, lesson: lessons.Lesson) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "content": lesson.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    reply = tokenizer(lesson.reply, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt, add_special_tokens=False)["input_ids"], [*reply, tokenizer.eos_token_id]


def train(model: Any, layers: Mapping[str, Any], next_samples: Callable[[], list[Sample]], settings: Settings) -> None:
    import torch

    weights = [weight for layer in layers.values() for weight in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    began = time.monotonic()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        rows, labels = padded(next_samples(), padding=0)
        scores = model(input_ids=torch.tensor(rows)).logits
        loss = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), torch.tensor(labels).flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % REPORT_EVERY == 0 or step == settings.steps - 1:
            print(
                f"step {step + 1}/{settings.steps} loss {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True
            )


def write(path: Path, model: Any, layers: Mapping[str, Any], settings: Settings, name: str, license: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), model.config.model_type)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", settings.alpha)
    writer.add_string("general.name", name)
    writer.add_string("general.license", license)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for tensor, layer in layers.items():
        a, b = layer.a.detach().numpy(), layer.b.detach().numpy()
        for part, matrix in matrices_of(tensor, a, b, heads, kv_heads).items():
            writer.add_tensor(part, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    options = parser().parse_args()
    try:
        settings = settings_of(options)
        import torch
    except ValueError as error:
        sys.exit(str(error))
    except ImportError:
        sys.exit("torch is missing: install requirements/train.txt into an environment of its own (see README.md).")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(SEED)
    tokenizer, model = load_base(options.base)
    layers = add_adapters(model, settings)
    try:
        next_samples = sampler(options, tokenizer, settings)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    train(model, layers, next_samples, settings)
    write(options.out, model, layers, settings, options.name or options.out.stem, options.license)
    print(f"wrote {options.out}", flush=True)


if __name__ == "__main__":
    main()
