"""The benchmark beside llama-server: its workloads, its clients against a real server, its ratios and pages."""

from __future__ import annotations

import http.server
import io
import json
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from rich.console import Console

from inference.bench import bars, children, environments, footprint
from inference.bench.environments import PeerUnavailable
from inference.bench.figures import unpack
from inference.bench.load import LoadFailed
from inference.bench.servers import (
    llama_server,
    llama_server_main,
    python_server,
    report,
    sides,
    study,
    texts,
    variants,
    verdicts,
    workloads,
)
from inference.bench.servers.streams import Answer, Client, StreamJob, StreamResult, Turn, run_streams
from inference.bench.servers.workloads import ALIKE, PEER, SIDE, WORKLOADS, Arm, Workload
from inference.management.commands.bench_engine import letters, listed
from llmsite.demo import demo_model_path

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 2, tzinfo=UTC)
MACHINE: dict[str, object] = {
    "processor": "Abacus",
    "cores": 2,
    "memory_gb": 1.0,
    "system": "Linux 1 x",
    "python": "3.11.0",
    "load_average_before": 0.1,
}


# What is asked


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: str(workload.name))
def test_every_workload_asks_every_side_of_a_round_for_the_same(workload: Workload) -> None:
    clients = workload.build(0, 1)
    assert clients == workload.build(0, 1)
    assert all(turn.num_tokens >= 4 for client in clients for turn in client.turns)
    assert [len(client.turns) for client in workload.build(0, 2)] == [len(client.turns) for client in clients] or (
        workload.name == "shared"
    )


def test_prompts_of_two_rounds_have_no_beginning_in_common() -> None:
    for workload in WORKLOADS:
        if workload.letter == "f":
            continue  # its requests switch the prompt cache off
        first, second = (
            {turn.prompt for client in workload.build(number, 1) for turn in client.turns[:1]} for number in (0, 1)
        )
        assert not first & second


def test_a_system_prompt_is_shared_and_a_long_one_is_longer() -> None:
    prompts = [turn.prompt for client in workloads.shared_prompt(0, 1) for turn in client.turns]
    assert len(set(prompts)) == 24
    assert len({prompt.partition("\n\nQuestion")[0] for prompt in prompts}) == 1
    *running, long = workloads.long_prompt(0, 1)
    assert [client.waits_for for client in running] == [0] * 4
    assert (long.role, long.waits_for) == ("long", 8)
    assert len(long.turns[0].prompt) > 2 * len(prompts[0])


def test_what_repeats_is_measured_from_the_start() -> None:
    assert texts.repeated_share(" abcd", "abcdef") == 1.0
    assert texts.repeated_share("abXdef", "abcdef") == pytest.approx(1 / 3)
    assert texts.repeated_share("", "abc") == 0.0


def test_workloads_are_chosen_by_letter() -> None:
    assert letters("a,b,a") == ("a", "b")
    with pytest.raises(ArgumentTypeError, match="'z': use some of a,b,c"):
        letters("a,z")
    assert [workload.name for workload in workloads.chosen(("b",))] == ["four", "eight"]
    assert workloads.chosen(()) == list(WORKLOADS)
    assert all(workload.title in listed() for workload in WORKLOADS)


# The clients


class Model(http.server.BaseHTTPRequestHandler):
    """A server that says numbers in either dialect; `asked` holds the bodies."""

    asked: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(500 if body["prompt"] == "fail" else 200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self.openai(body) if self.path == "/v1/completions" else self.llama(body):
            said = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(said), said))
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b"0\r\n\r\n")

    def llama(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        number = body["n_predict"] - (body["prompt"] == "short")
        for index in range(number):
            yield {"content": f" {index}", "tokens": [index], "stop": False}
        if body["prompt"] == "broken":
            yield {"error": {"message": "out of slots"}}
        yield {
            "content": "",
            "tokens": [],
            "stop": True,
            "stop_type": "limit",
            "tokens_predicted": number,
            "tokens_evaluated": len(body["prompt"].split()),
            "timings": {"cache_n": 2, "prompt_ms": 1.5},
        }

    def openai(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for index in range(body["max_tokens"]):
            yield {"choices": [{"text": f" {index}", "finish_reason": None}]}
        yield {"choices": [{"text": "", "finish_reason": "stop" if body["prompt"] == "short" else "length"}]}

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def model() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (Model,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, asked
    server.shutdown()
    thread.join()
    server.server_close()


def job(port: int, *clients: Client, dialect: str = "llama.cpp") -> StreamJob:
    return StreamJob(port=port, dialect=dialect, clients=list(clients), limit_seconds=20)


def test_clients_stamp_every_event_and_count_every_token(model: tuple[int, list[dict[str, Any]]]) -> None:
    client = Client(role="stream", turns=[Turn(prompt="one two three", num_tokens=5, fields={"lora": []})])
    result = run_streams(job(model[0], client, client))
    assert [answer.text for answer in result.answers] == [" 0 1 2 3 4"] * 2
    first = result.answers[0]
    assert len(first.events) == 5
    assert 0 < first.first_seconds < first.events[-1] <= first.seconds <= result.seconds + 0.1
    assert all(gap >= 0 for gap in first.gaps)
    assert max(first.gaps) > 0.01, "a busy machine may read some events together, but not all"
    assert (first.prompt_tokens, first.cached_tokens, first.timings["prompt_ms"]) == (3, 2, 1.5)
    assert result.num_tokens == 10
    assert model[1][0]["ignore_eos"] is True
    assert model[1][0]["lora"] == []


def test_a_chat_goes_on_after_what_was_said(model: tuple[int, list[dict[str, Any]]]) -> None:
    turns = [Turn(prompt="A", num_tokens=2), Turn(prompt=" B", num_tokens=1)]
    run_streams(job(model[0], Client(role="stream", turns=turns, keeps_history=True)))
    assert [body["prompt"] for body in model[1]] == ["A", "A 0 1 B"]


def test_a_client_can_wait_until_the_others_are_under_way(model: tuple[int, list[dict[str, Any]]]) -> None:
    running = Client(role="running", turns=[Turn(prompt="A", num_tokens=20)])
    late = Client(role="long", turns=[Turn(prompt="B", num_tokens=1)], waits_for=8)
    found = {answer.role: answer for answer in run_streams(job(model[0], running, late)).answers}
    began = found["running"].started + found["running"].events[7]
    assert began <= found["long"].started + 0.005
    assert found["long"].started < found["running"].started + found["running"].seconds


@pytest.mark.parametrize(
    ("prompt", "dialect", "reason"),
    [
        ("short", "llama.cpp", "3 tokens were asked for, 2 counted and 2 sent"),
        ("broken", "llama.cpp", "out of slots"),
        ("fail", "llama.cpp", "status 500"),
        ("short", "openai", "it ended by 'stop', not by length"),
    ],
)
def test_a_wrong_answer_ends_the_run(
    model: tuple[int, list[dict[str, Any]]], prompt: str, dialect: str, reason: str
) -> None:
    wrong = Client(role="stream", turns=[Turn(prompt=prompt, num_tokens=3)])
    late = Client(role="long", turns=[Turn(prompt="B", num_tokens=1)], waits_for=100)
    with pytest.raises(LoadFailed, match=reason):
        run_streams(job(model[0], wrong, late, dialect=dialect))


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with pytest.raises(LoadFailed, match="1 of 1 answers are wrong: ConnectionRefusedError"):
        run_streams(job(children.free_port(), Client(role="stream", turns=[Turn(prompt="A", num_tokens=1)])))


def test_openai_streams_are_read_too(model: tuple[int, list[dict[str, Any]]]) -> None:
    client = Client(role="stream", turns=[Turn(prompt="A", num_tokens=4)])
    (answer,) = run_streams(job(model[0], client, dialect="openai")).answers
    assert (answer.text, answer.num_tokens, answer.prompt_tokens) == (" 0 1 2 3", 4, None)
    assert model[1][0]["max_tokens"] == 4


# The servers


def test_each_side_puts_adapters_into_its_own_words() -> None:
    side = sides.Side(arm=workloads.OURS, port=1, pid=1, fields={"model": "m"}, adapters=[7, 4])
    clients = workloads.three_vectors(0, 1)
    sent = [client.turns[0].fields for client in side.job(clients).clients]
    assert sent[0] == {"model": "m", "lora": []}
    assert sent[2] == {"model": "m", "lora": [{"id": 4, "scale": 1.0}]}


def test_both_servers_are_told_the_same_sizes(tmp_path: Path) -> None:
    setup = llama_server.Setup(model=tmp_path / "m.gguf", slots=8, context=2048, threads=2)
    told = llama_server.arguments(setup, 1234)
    assert (told["n_parallel"], told["n_ctx"], told["n_threads"], told["lookup"]) == (8, 16384, 2, None)
    lookup = llama_server.arguments(replace(setup, lookup=sides.LOOKUP), 1234)["lookup"]
    assert lookup == {"match_tokens": 3, "draft_tokens": 16}
    assert {"--n_ctx", "2048", "--n_threads"} < set(python_server.arguments(setup, 1234))
    arms = [Arm(name="", server=SIDE, variant="q4_0", drafts=drafts) for drafts in ("", ALIKE)]
    models = sides.models_yaml({"shipped": tmp_path / "m.gguf", "q4_0": tmp_path / "q.gguf"}, arms, 2)
    assert models["defaults"] == {"n_ctx": 2048, "n_slots": 8, "n_threads": 2, "load_mode": "eager"}
    assert [adapter["visibility"] for adapter in models["models"][0]["adapters"]] == ["shared", "shared"]
    assert [(model["id"], model.get("draft_kind")) for model in models["models"][1:]] == [
        ("q4_0", None),
        ("q4_0-lookup", "prompt_lookup"),
    ]


STUB = """#!{python}
import http.server, json, sys
asked = json.loads(sys.argv[-1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
{body}
"""
LISTEN = "http.server.HTTPServer(('127.0.0.1', asked['port']), Handler).serve_forever()"


def stub_environment(tmp_path: Path, body: str) -> Path:
    """An environment whose Python is a stand-in."""
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(python=sys.executable, body=body))
    python.chmod(0o755)
    return tmp_path / "environment"


def test_llama_server_says_its_build_and_is_stopped(tmp_path: Path) -> None:
    said = f"print({llama_server_main.BUILD!r} + json.dumps({{'version': '9'}}), flush=True)\n"
    environment = stub_environment(tmp_path, said + LISTEN)
    setup = llama_server.Setup(model=tmp_path / "m.gguf", slots=1, context=256, threads=1)
    with llama_server.running(environment, tmp_path, setup, "llama-server shipped") as running:
        assert running.build == {"version": "9"}
        assert children.answers_200(running.port, "/health")
    assert footprint.tree(running.pid) == []


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    environment = stub_environment(tmp_path, "raise SystemExit('cannot load the model')")
    setup = llama_server.Setup(model=tmp_path / "m.gguf", slots=1, context=256, threads=1)
    with (
        pytest.raises(PeerUnavailable, match="cannot load the model"),
        llama_server.running(environment, tmp_path, setup, "llama-server"),
    ):
        raise AssertionError("it must not start")
    (tmp_path / "log").write_text("no line of a build\n")
    with pytest.raises(PeerUnavailable, match="nothing of its build"):
        llama_server._build(tmp_path / "log")


def test_the_peers_are_locked_with_hashes_and_name_no_host() -> None:
    text = llama_server.REQUIREMENTS.read_text()
    assert "xllamacpp==" in text
    assert "--hash=sha256:" in text
    assert "://" not in text
    assert "llama-cpp-python" not in text  # it is llmsite's own that is measured


def test_llama_cpp_is_linked_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = python_server.link_llama_cpp(tmp_path / "packages")
    assert [path.name for path in folder.iterdir()] == ["llama_cpp"]
    assert (folder / "llama_cpp" / "server" / "app.py").exists()


def test_the_build_of_llmsites_own_llama_cpp_is_known() -> None:
    assert {"version", "system"} <= variants.build().keys()


@pytest.mark.model
def test_a_variant_is_quantized_once(tmp_path: Path) -> None:
    said: list[str] = []
    made = variants.make(demo_model_path(), "q4_0", said.append, tmp_path)
    assert made.read_bytes()[:4] == b"GGUF"
    assert made == variants.make(demo_model_path(), "q4_0", said.append, tmp_path)
    assert len(said) == 1
    with pytest.raises(ValueError, match="q9_9"):
        variants.make(demo_model_path(), "q9_9", said.append, tmp_path)


def test_a_file_that_cannot_be_quantized_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    with pytest.raises(PeerUnavailable, match=r"llama\.cpp ended with"):
        variants.make(tmp_path / "m.gguf", "q4_0", lambda _: None, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.gguf"))


def test_a_peer_that_works_while_idle_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "IDLE_SECONDS", 0.2)
    done = threading.Event()
    thread = threading.Thread(target=lambda: [None for _ in iter(done.is_set, True)])
    thread.start()
    try:
        with pytest.raises(children.NotStarted, match="while idle"):
            sides._idle({"peer": footprint.os.getpid()}, lambda _: None)
    finally:
        done.set()
        thread.join()


# From answers to verdicts


def answer(client: int, events: list[float], *, role: str = "stream", text: str = "x") -> Answer:
    return Answer(
        client=client,
        role=role,
        turn=0,
        started=0.0,
        seconds=events[-1],
        events=events,
        num_tokens=len(events),
        text=text,
        prompt_tokens=10,
        cached_tokens=4,
        timings={"draft_n": 8.0},
    )


def cell(workload: str, arm: str, number: int, seconds: float, *, factor: float = 1.0, text: str = "x") -> study.Cell:
    """Two streams of three tokens, and a long prompt; all waits and gaps are multiplied by factor."""
    answers = [
        answer(1, [0.2 * factor, 0.3 * factor, 0.7 * factor], text=text),
        answer(0, [0.1 * factor, 0.2 * factor, 0.3 * factor], text=text),
    ]
    if workload == "long":
        answers.append(answer(2, [2.0 * factor], role="long", text=text))
    found = next(each for each in WORKLOADS if each.name == workload)
    result = StreamResult(answers=answers, seconds=seconds, cpu_seconds=0.1)
    return study.cell_of(result, found, arm, number, {"worker": 1.0})


def made_up(*cells: study.Cell, only: tuple[str, ...], rounds: int = 2) -> study.Study:
    return study.Study(
        options=study.Options(rounds=rounds, only=only),
        workloads=workloads.chosen(only),
        cells=list(cells),
        model="tiny",
        threads=2,
        builds={SIDE: {"version": "1"}, PEER: {"version": "2026"}},
        commands={SIDE: "manage.py up --demo"},
        idle_cpu={PEER: 0.0},
        seconds=60.0,
        notes=["A note."],
    )


LONG = made_up(
    *(cell("long", SIDE, number, 2.0 + number, factor=0.4) for number in (0, 1)),
    *(cell("long", PEER, number, 2.0 + number) for number in (0, 1)),
    only=("e",),
)


def test_a_cell_keeps_the_long_prompt_apart_from_the_streams() -> None:
    found = LONG.of("long", PEER)[0]
    assert found.waits == [0.1, 0.2]
    assert found.long_waits == [2.0]
    assert sorted(found.gaps) == pytest.approx([0.1, 0.1, 0.1, 0.4])
    assert found.tokens_a_second == 7 / 2.0
    assert found.decoded_a_second == pytest.approx(4 / 0.7)
    assert (found.timings, found.repeated) == ({"draft_n": 8.0}, None)


def test_a_promise_is_judged_by_the_ratio_of_each_round() -> None:
    (target,) = verdicts.targets(LONG)
    assert target.met is True
    assert target.measured == "0.40"
    worse = made_up(cell("long", SIDE, 0, 1.0), cell("long", PEER, 0, 1.0), only=("e",))
    assert verdicts.targets(worse)[0].met is False


def test_a_stretch_is_judged_apart() -> None:
    def found(seconds: float) -> study.Study:
        return made_up(cell("eight", SIDE, 0, seconds), cell("eight", PEER, 0, 1.0), only=("b",), rounds=1)

    assert [(target.met, target.stretch_met) for target in verdicts.targets(found(0.97))] == [(True, False)]
    assert [(target.met, target.stretch_met) for target in verdicts.targets(found(0.9))] == [(True, True)]
    assert [(target.met, target.stretch_met) for target in verdicts.targets(found(1.1))] == [(False, False)]


def test_what_this_llmsite_cannot_do_is_said_to_be_missing() -> None:
    arms = [(SIDE, 1.0), (PEER, 1.0), (f"{PEER}, {ALIKE}", 1.0)]
    cells = [
        cell(name, arm, 0, seconds, text=texts.COPIED[0] if "copied" in name else "x")
        for name in ("copied-q8_0", "fresh-q8_0", "copied-q4_0", "fresh-q4_0")
        for arm, seconds in arms
    ]
    found = verdicts.targets(made_up(*cells, only=("f",), rounds=1))
    assert len(found) == 8
    assert {target.measured for target in found} == {study.NOT_AVAILABLE}
    assert {target.met for target in found} == {None}


def test_a_text_that_was_to_repeat_is_looked_at() -> None:
    assert cell("copied-q8_0", SIDE, 0, 1.0, text=texts.COPIED[0]).repeated == pytest.approx(0, abs=0.1)
    found = next(each for each in WORKLOADS if each.name == "copied-q8_0")
    answers = [answer(0, [0.1, 0.2], text=passage) for passage in texts.COPIED]
    result = StreamResult(answers=answers, seconds=1.0, cpu_seconds=0.0)
    assert study.cell_of(result, found, SIDE, 0, {}).repeated == 1.0


def test_sides_that_count_other_prompts_end_the_run() -> None:
    same = [cell("eight", SIDE, 0, 1.0), cell("eight", PEER, 0, 1.0)]
    study._check_prompts(same)
    other = replace(same[1], prompt_tokens=[10, 11])
    with pytest.raises(LoadFailed, match=r"llmsite counts \[10, 10\] prompt tokens, llama-server \[10, 11\]"):
        study._check_prompts([same[0], other])
    study._check_prompts([same[0], replace(other, round=1)])


def test_the_time_left_is_that_of_the_cells_last_time() -> None:
    one, four = WORKLOADS[0], WORKLOADS[1]
    arm = Arm(name=SIDE, server=SIDE)
    pace = study.Pace([(0, one, arm), (0, four, arm), (1, one, arm), (1, four, arm)])
    assert pace.left_seconds == 4 * 5.0
    pace.done(one, arm, 2.0)
    assert pace.left_seconds == 5.0 + 2.0 + 5.0


def test_every_second_round_goes_backwards() -> None:
    plan = list(study._order(study.Options(rounds=2), workloads.chosen(("a",))))
    assert [(number, arm.name) for number, _, arm in plan] == [
        *((0, name) for name in (SIDE, PEER, workloads.PYTHON)),
        *((1, name) for name in (workloads.PYTHON, PEER, SIDE)),
    ]


# What is written


def test_results_are_written_with_every_gap_and_without_a_path(tmp_path: Path) -> None:
    written = report.write(tmp_path, LONG, MACHINE, NOW)
    assert {path.name for path in written} == {"engine.json", "engine.md", "engine.svg"}
    whole = json.loads((tmp_path / "engine.json").read_text())
    assert whole["builds"][PEER] == {"version": "2026"}
    assert unpack(whole["cells"][2]["gaps"]) == pytest.approx([0.1, 0.1, 0.1, 0.4], abs=1e-5)
    assert whole["targets"][0]["verdict"] == "met"
    assert str(Path.home()) not in json.dumps(whole)
    page = (tmp_path / "engine.md").read_text()
    for words in ("at most 0.5", "the long prompt", "llmsite by llama-server", "A note.", "xllamacpp 2026"):
        assert words in page
    assert ElementTree.fromstring((tmp_path / "engine.svg").read_text()).tag.endswith("svg")


def test_numbers_of_streams_are_drawn_where_they_were_compared(tmp_path: Path) -> None:
    cells = [cell(name, arm, 0, 1.0) for name in ("four", "eight") for arm in (SIDE, PEER)]
    written = report.write(tmp_path, made_up(*cells, only=("b",), rounds=1), MACHINE, NOW)
    assert "engine-streams.svg" in {path.name for path in written}
    assert "engine-streams.svg" in (tmp_path / "engine.md").read_text()


def test_tables_are_printed() -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    report.print_tables(console, LONG)
    text = console.export_text()
    assert "a prompt of 1,500 tokens arrives beside 4 streams" in text
    assert "2 of 2" not in text.split("Targets")[1]


def test_bars_need_a_value() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        bars.draw("Nothing", ["a"], [bars.Group("g", [None])])
    assert bars.draw("One", ["a", "b"], [bars.Group("g & h", [1.0, None])]).count("<rect") == 2


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> study.Study:
        raise LoadFailed("1 stream, llmsite: 1 of 3 answers are wrong: status 503")

    monkeypatch.setattr(study, "run", broken)
    with pytest.raises(CommandError, match="status 503"):
        call_command("bench_engine", "--quick", f"--out={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_prints_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted: list[study.Options] = []

    def found(options: study.Options, *_: object) -> study.Study:
        wanted.append(options)
        return replace(LONG, notes=[])

    monkeypatch.setattr(study, "run", found)
    call_command("bench_engine", "--only=e", "--rounds=2", f"--out={tmp_path}", "--json")
    assert wanted == [study.Options(rounds=2, only=("e",))]
    assert json.loads(capsys.readouterr().out)["targets"][0]["verdict"] == "met"
    assert (tmp_path / "engine.md").exists()
    assert environments.HOME.name == "bench"
