"""The benchmark's own arithmetic, wire, counters and reports, with made-up studies and the real load generator."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from inference.bench import (
    batching,
    batching_report,
    calls,
    chart,
    children,
    counters,
    environments,
    footprint,
    gateway,
    page,
    peer,
    report,
    site,
    tables,
)
from inference.bench.digest import digest
from inference.bench.environments import PeerUnavailable
from inference.bench.figures import Spread, added, pack, percentile, ratio, thin, unpack
from inference.bench.load import NUMBER, LoadFailed, LoadJob, _Load, run_load
from inference.bench.upstream import _Upstream, render_answers, split_text
from inference.bench.wire import Connection, render_request
from inference.management.commands.bench import between, clients_list
from inference.tuning import machine

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]


# figures


def test_a_percentile_is_a_sample_of_nearest_rank() -> None:
    samples = [float(number) for number in range(1, 101)]
    assert percentile(samples, 0.5) == 50
    assert percentile(samples, 0.99) == 99
    assert percentile([7.0], 0.99) == 7
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


def test_ratios_and_differences_are_taken_round_by_round() -> None:
    assert ratio([10.0, 40.0], [5.0, 10.0]) == Spread(3.0, 2.0, 4.0)
    assert added([3.0, 5.0], [1.0, 1.0]) == Spread(3.0, 2.0, 4.0)


def test_a_round_that_one_side_lacks_does_not_count() -> None:
    assert ratio([10.0, None], [5.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    assert ratio([None], [1.0]) is None
    assert ratio([1.0], [0.0]) is None


def test_a_spread_shows_its_ends_only_where_they_differ() -> None:
    assert Spread(2.0, 1.0, 3.0).show() == "2.0 (1.0 to 3.0)"
    assert Spread(2.01, 2.0, 2.02).show() == "2.0"


@given(st.lists(st.floats(min_value=0, max_value=100), max_size=50))
def test_packed_samples_come_back_sorted_to_ten_microseconds(samples: list[float]) -> None:
    assert unpack(pack(samples)) == pytest.approx(sorted(samples), abs=1e-5)


def test_thinning_keeps_the_order_and_spans_the_whole() -> None:
    samples = [float(number) for number in range(10_000)]
    kept = thin(samples, 100)
    assert len(kept) == 100
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 9900
    assert thin(samples[:5], 100) == samples[:5]


# wire, load, upstream


@pytest.fixture(scope="module")
def upstream_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with children.upstream(tmp_path_factory.mktemp("upstream") / "log", text_bytes=40, chunks=4) as port:
        yield port


def job(port: int, *, stream: bool = False, marker: str = "", expect: str = "", **changes: object) -> LoadJob:
    whole = LoadJob(
        port=port,
        path=peer.PATH,
        bodies=[peer.body(stream=stream, number=NUMBER)],
        clients=2,
        seconds=0.2,
        marker=marker,
        expect=expect,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_the_load_generator_counts_answers_of_a_real_server(upstream_port: int) -> None:
    result = run_load(job(upstream_port, expect="word", max_requests=40, seconds=30))
    assert result.num_errors == 0
    assert result.errors == []
    assert len(result.latencies) == 40
    assert result.rate == pytest.approx(len(result.latencies) / result.window_seconds)
    assert all(0 < latency <= result.window_seconds for latency in result.latencies)
    assert sum(result.latencies) <= 2 * result.window_seconds, "of two clients"


def test_a_stream_has_a_first_token_before_its_end(upstream_port: int) -> None:
    result = run_load(job(upstream_port, stream=True, marker='"content"', max_requests=40, seconds=30))
    assert result.num_errors == 0
    assert len(result.firsts) == len(result.latencies)
    assert all(first <= last for first, last in zip(result.firsts, result.latencies, strict=True))


def test_an_answer_without_what_was_expected_is_an_error(upstream_port: int) -> None:
    result = run_load(job(upstream_port, expect='"cached":true', max_requests=40, seconds=30))
    assert result.latencies == []
    assert result.num_errors > 5
    assert len(result.errors) == 5
    assert "lacks" in result.errors[0]


def test_a_stream_without_a_first_token_is_an_error(upstream_port: int) -> None:
    result = run_load(job(upstream_port, stream=True, marker="no such thing", max_requests=3))
    assert result.num_errors == 3
    assert "no first token" in result.errors[0]


def test_a_number_of_requests_bounds_the_load(upstream_port: int) -> None:
    result = run_load(job(upstream_port, max_requests=7, seconds=30, first_number=100))
    assert result.num_sent == 7
    assert result.window_seconds < 10


def test_a_server_that_is_not_there_gives_errors_and_no_figures() -> None:
    result = run_load(job(children.free_port(), seconds=0.1))
    assert result.num_errors > 0
    assert result.rate == 0
    assert "Refused" in result.errors[0]


def test_a_load_generator_that_breaks_says_why(upstream_port: int) -> None:
    with pytest.raises(LoadFailed, match="ended with"):
        run_load(job(upstream_port, bodies=[]))


async def _one_shot_server(answer: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def _answer_of(raw: bytes) -> object:
    async with await _one_shot_server(raw) as server:
        port = server.sockets[0].getsockname()[1]
        connection = await Connection.open("127.0.0.1", port)
        try:
            return await connection.send(render_request("POST", "/", "x", {}, b""))
        finally:
            connection.close()


async def test_an_answer_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ConnectionError, match="before its answer was complete"):
        await _answer_of(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")


async def test_an_answer_that_is_not_http_is_an_error() -> None:
    with pytest.raises(ValueError, match="not HTTP"):
        await _answer_of(b"hello\r\n\r\n")


async def test_a_connection_that_the_server_ends_is_not_used_again() -> None:
    raw = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with await _one_shot_server(raw) as server:
        connection = await Connection.open("127.0.0.1", server.sockets[0].getsockname()[1])
        answer = await connection.send(render_request("POST", "/", "x", {"A": "b"}, b""), b"k")
        assert (answer.status, answer.body) == (200, b"ok")
        assert answer.first_seconds is not None
        assert not connection.usable
        with pytest.raises(ConnectionError, match="closed"):
            await connection.send(b"")


async def test_clients_count_refusals_in_process(upstream_port: int) -> None:
    load = _Load(job(upstream_port, bodies=["{}"], headers={"X-A": "b"}, warmup_seconds=0.05))
    result = await load.run()
    assert result.num_sent > len(result.latencies) > 0


async def test_the_upstream_answers_what_it_is_asked_for_and_hangs_up_on_noise() -> None:
    answers = render_answers("word word", 2)
    server = await asyncio.get_running_loop().create_server(lambda: _Upstream(answers), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        load = _Load(job(port, stream=True, marker='"content"', expect="[DONE]"))
        result = await load.run()
        assert result.num_errors == 0
        assert len(result.firsts) == len(result.latencies) > 0
        wrong = await _Load(job(port, expect="nothing like it", max_requests=4, seconds=5)).run()
        assert wrong.num_errors == 4
        connection = await Connection.open("127.0.0.1", port)
        with pytest.raises(ConnectionError):
            await connection.send(b"this is noise\r\n\r\n")


def test_the_upstream_says_the_whole_text_in_both_forms() -> None:
    answers = render_answers("word word word", 3)
    body = json.loads(answers.whole.partition(b"\r\n\r\n")[2])
    assert body["choices"][0]["message"]["content"] == "word word word"
    assert b"[DONE]" in answers.stream
    assert "".join(split_text("word word word", 3)) == "word word word"
    assert len(split_text("abcdefg", 3)) == 3


def test_a_call_that_is_refused_says_what_the_server_said(upstream_port: int) -> None:
    reply = calls.call(upstream_port, "POST", "/", key="k", body={"a": 1})
    assert reply.status == 200
    assert reply.json()["object"] == "chat.completion"
    assert "content-type" in reply.headers
    assert children.answers_200(upstream_port, "/")
    assert not children.answers_200(children.free_port(), "/")


# children, footprint


def test_a_child_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        children.child([sys.executable, "-c", "print('no disk'); raise SystemExit(3)"], log, env={}, cwd=tmp_path) as p,
        pytest.raises(children.NotStarted, match=r"(?s)it ended with 3.*no disk"),
    ):
        children.wait_until(lambda: False, p, log, seconds=20, what="it")


def test_a_child_that_is_not_ready_in_time_is_reported_and_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with children.child([sys.executable, "-c", "import time; time.sleep(60)"], log, env={}, cwd=tmp_path) as process:
        with pytest.raises(children.NotStarted, match="not ready after"):
            children.wait_until(lambda: False, process, log, seconds=0.1, what="it")
        assert process.pid in footprint.tree(os.getpid())
        cost = footprint.costs(process.pid)[0]
        assert cost.pss_mb > 0
        assert cost.rss_mb >= cost.pss_mb
    assert process.returncode is not None
    assert footprint.tree(process.pid) == []


def test_processor_time_is_summed_by_name() -> None:
    def cost(pid: int, name: str, seconds: float) -> footprint.ProcessCost:
        return footprint.ProcessCost(pid=pid, name=name, pss_mb=1, rss_mb=1, cpu_seconds=seconds)

    used = footprint.cpu_seconds_by_name([cost(1, "web", 1.0)], [cost(1, "web", 1.5), cost(2, "worker", 2.0)])
    assert used == {"worker": 2.0, "web": 0.5}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/x/valkey-server", "unixsocket"], "valkey"),
        (["/x/valkey-server unixsocket:/y/valkey.sock"], "valkey"),
        (["python", "manage.py", "up", "--demo"], "supervisor"),
        (["python", "-m", "uvicorn", "llmsite.asgi:application"], "web"),
        (["python", "-m", "llmsite.processes.web"], "web"),
        (["python", "-m", "llmsite.processes.beat"], "beat"),
        (["python", "manage.py", "worker"], "worker"),
        (["python", "-m", "celery", "-A", "llmsite", "beat"], "beat"),
        (["python", "-m", "inference.engine.tokenizer"], "tokenizer"),
        (["/build/bench/litellm/bin/python", "/build/bench/litellm/bin/litellm", "--config"], "litellm"),
        (["/bin/sleep", "1"], "sleep"),
        ([], "?"),
    ],
)
def test_processes_are_named_by_what_they_do(command: list[str], name: str) -> None:
    assert footprint.process_name(command) == name


# counters

METRICS = """# TYPE django_db_execute_total counter
django_db_execute_total{alias="default",vendor="sqlite"} 10.0
# TYPE django_db_execute_many_total counter
django_db_execute_many_total{alias="default",vendor="sqlite"} 2.0
# TYPE other_total counter
other_total 99.0
"""


class FakeRedis:
    def info(self, section: str) -> dict[str, object]:
        return {"stats": {"total_reads_processed": 7}, "commandstats": {"cmdstat_get": {"calls": 3}}}[section]


def test_counters_are_read_from_metrics_and_from_the_server() -> None:
    found = counters.read(METRICS, FakeRedis())  # type: ignore[arg-type]
    assert (found.queries, found.redis_reads, found.redis_commands) == (12, 7, {"get": 3})


def test_work_per_request_leaves_out_what_an_idle_installation_does() -> None:
    before = counters.Counters(at=0, queries=100, redis_reads=0, redis_commands={"get": 5})
    after = counters.Counters(at=2, queries=150, redis_reads=40, redis_commands={"get": 5, "evalsha": 20})
    idle = counters.Work(queries=5, redis_round_trips=10, redis_commands={"evalsha": 0.0})
    found = counters.work_per_request(before, after, 10, idle)
    assert found == counters.Work(queries=4, redis_round_trips=2, redis_commands={"evalsha": 2.0})
    assert counters.work_per_request(before, after, 0, idle) is None


# digest and reports


def point(arm: str, number: int, clients: int, *, rate: float, latency: float, num_errors: int = 0) -> gateway.Point:
    ours = arm.startswith("llmsite")
    return gateway.Point(
        arm=arm,
        round=number,
        clients=clients,
        rate=rate,
        latencies=[latency] * 50,
        firsts=[latency / 2] * 50 if arm.endswith("stream") else [],
        num_sent=60,
        num_errors=num_errors,
        errors=["status 500: oops"] if num_errors else [],
        cpu_seconds={} if arm.startswith("direct") else {"web": 0.002, "worker": 0.001},
        load_cpu_seconds=0.00002,
        work=counters.Work(queries=4.0, redis_round_trips=6.0, redis_commands={"evalsha": 2.0}) if ours else None,
    )


RATES = {"direct": 9000.0, "llmsite": 200.0, "llmsite_cached": 500.0, "litellm": 100.0}
LATENCIES = {"direct": 0.0001, "llmsite": 0.005, "llmsite_cached": 0.002, "litellm": 0.010}


def study(*, errors_in: str = "", rounds: int = 2) -> gateway.Study:
    options = gateway.Options(rounds=rounds, clients=(1, 64))
    arms = ("direct", "direct_stream", "llmsite", "litellm", "llmsite_cached", "llmsite_stream", "litellm_stream")
    points = []
    for number in range(rounds):
        for clients in options.clients:
            for arm in arms:
                kind = arm.removesuffix("_stream")
                errors = 1 if arm == errors_in and clients == 64 else 0
                points.append(
                    point(arm, number, clients, rate=RATES[kind], latency=LATENCIES[kind] * clients, num_errors=errors)
                )
    web = footprint.ProcessCost(pid=1, name="web", pss_mb=120, rss_mb=130, cpu_seconds=1)
    return gateway.Study(
        options=options,
        points=points,
        memory={"llmsite": gateway.Memory(idle=[web], after=[web, replace(web, pid=2)])},
        idle_work=counters.Work(queries=1, redis_round_trips=2),
        commands={"llmsite": "manage.py up"},
        versions={"litellm": "1.2.3"},
        notes=["A note."],
    )


def test_a_digest_says_what_is_added_to_a_direct_call() -> None:
    found = digest(study())
    row = found.row("llmsite", 1)
    assert row is not None
    assert row.added_p50 == Spread(*[pytest.approx(4.9)] * 3)
    assert row.rate == Spread(200, 200, 200)
    assert row.void is None
    stream = found.row("llmsite_stream", 1)
    assert stream is not None
    assert stream.added_first_p50 is not None
    assert stream.added_first_p50.median == pytest.approx(2.45)
    assert found.best_ratio == Spread(2, 2, 2)
    assert found.row("nothing", 1) is None


def test_targets_are_judged_by_the_median() -> None:
    verdicts = {target.text: tables.verdict(target) for target in digest(study()).targets}
    assert list(verdicts.values()) == ["met", "met", "met", "met", "met", "met", "met", "met"]


def test_an_arm_with_one_error_is_void_where_it_happened() -> None:
    found = digest(study(errors_in="litellm"))
    void = found.row("litellm", 64)
    assert void is not None
    assert void.rate is None
    assert void.void == "void: 2 errors in 120 requests; status 500: oops"
    alive = found.row("litellm", 1)
    assert alive is not None
    assert alive.rate is not None
    assert found.ratios == {1: Spread(2, 2, 2), 64: None}
    assert "void: 2 errors" in page.markdown(study(errors_in="litellm"), found, machine.describe(), NOW)


def test_without_its_arm_a_target_is_not_measured() -> None:
    only_direct = replace(study(), points=[p for p in study().points if p.arm == "direct"], memory={})
    assert {tables.verdict(target) for target in digest(only_direct).targets} == {"not measured"}


def test_work_that_grows_with_the_clients_misses_its_target() -> None:
    grown = [
        replace(p, work=counters.Work(queries=9, redis_round_trips=6)) if p.arm == "llmsite" and p.clients == 64 else p
        for p in study().points
    ]
    verdicts = {target.text: tables.verdict(target) for target in digest(replace(study(), points=grown)).targets}
    assert verdicts["database queries per request do not grow with the clients"] == "missed"
    assert verdicts["Redis round trips per request do not grow with the clients"] == "met"


def test_written_results_hold_all_samples_and_no_path(tmp_path: Path) -> None:
    found = digest(study())
    paths = report.write(tmp_path / "new", study(), found, machine.describe(), NOW)
    assert {path.name for path in paths} == {"gateway.json", "gateway.md", "gateway.svg"}
    whole = json.loads((tmp_path / "new" / "gateway.json").read_text())
    points = whole["samples"]["points"]
    assert len(points) == len(study().points)
    assert unpack(points[2]["latencies"]) == pytest.approx([0.005] * 50)
    assert whole["versions"]["litellm"] == "1.2.3"
    for path in paths:
        assert str(ROOT) not in path.read_text()
        assert str(Path.home()) not in path.read_text()


def test_a_full_run_fits_into_its_file() -> None:
    wide = [
        replace(p, latencies=[0.004 + (index * 7919 % 2000) / 1e5 for index in range(2000)])
        for p in study(rounds=8).points
    ]
    whole = report.to_json(replace(study(), points=wide), digest(study()), machine.describe(), NOW)
    assert len(json.dumps(whole)) < 300_000


def test_the_page_says_targets_ratios_and_how_it_was_measured() -> None:
    text = page.markdown(study(), digest(study()), machine.describe(), NOW)
    assert "| each at its best | 2.00 |" in text
    assert "web 2.00, worker 1.00" in text
    assert "evalsha 2.00" in text
    assert "| llmsite: web (2 processes) | 120 | 240 |" in text
    assert text.endswith("A note.\n")
    assert "(gateway.svg)" in text


def test_tables_can_be_printed() -> None:
    console = Console(record=True, width=200)
    tables.print_tables(console, study(), digest(study()))
    text = console.export_text()
    assert "LiteLLM, streaming" in text
    assert "met, stretch" not in text
    assert "A note." in text


def test_the_chart_is_xml_with_a_line_per_arm() -> None:
    drawing = page.draw(digest(study()))
    lines = ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}polyline")
    assert len(list(lines)) == 6


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.draw([chart.Panel("empty", [])], "x")
    assert "<circle" in chart.draw([chart.Panel("one", [chart.Series("a", [(1, 5)])])], "x")


def test_ticks_enclose_the_range() -> None:
    assert chart.ticks(3, 40) == [2, 5, 10, 20, 50]
    assert chart.ticks(1, 1) == [1, 10]


# batching


def batch_run(number: int, *, at_once: bool, seconds: float, errors: list[str] | None = None) -> batching.BatchRun:
    return batching.BatchRun(
        round=number,
        at_once=at_once,
        seconds=seconds,
        latencies=[seconds],
        num_tokens=512,
        batch_sizes=[7.5, 6.0] if at_once else [1.0, 1.0],
        metrics_batch_size=7.0 if at_once else 1.0,
        errors=errors or [],
    )


def batch_study(errors: list[str] | None = None) -> batching.BatchStudy:
    runs = [
        batch_run(0, at_once=True, seconds=3.0, errors=errors),
        batch_run(0, at_once=False, seconds=4.0),
        batch_run(1, at_once=False, seconds=5.0),
        batch_run(1, at_once=True, seconds=4.0),
    ]
    process = footprint.ProcessCost(pid=1, name="worker", pss_mb=300, rss_mb=300, cpu_seconds=1)
    return batching.BatchStudy(
        options=batching.BatchOptions(rounds=2),
        model="demo",
        runs=runs,
        idle=[process],
        after=[process],
        command="manage.py up --demo",
    )


def test_one_batch_is_compared_round_by_round() -> None:
    found = batch_study()
    assert found.time_ratio == Spread(pytest.approx(0.775), 0.75, 0.8)
    assert found.batch_size == 6.0
    assert found.metrics_batch_size == 7.0
    assert [tables.verdict(target) for target in batching_report.targets(found)] == ["met", "met"]


def test_a_batch_with_an_error_is_void() -> None:
    found = batch_study(errors=["status 500"])
    assert found.time_ratio is None
    assert found.batch_size is None
    assert {target.measured for target in batching_report.targets(found)} == {"void: 1 errors; status 500"}


def test_batching_results_are_written(tmp_path: Path) -> None:
    batching_report.write(tmp_path, batch_study(), machine.describe(), NOW)
    whole = json.loads((tmp_path / "batching.json").read_text())
    assert whole["time_ratio"]["median"] == 0.775
    assert "| at once | 3.50 (3.00 to 4.00) |" in (tmp_path / "batching.md").read_text()
    console = Console(record=True, width=200)
    batching_report.print_tables(console, batch_study(errors=["status 500"]))
    assert "void" in console.export_text()


def test_the_batch_of_a_run_is_read_from_the_engines_counters() -> None:
    text = """# TYPE llm_engine_decode_steps_total counter
llm_engine_decode_steps_total{model_id="a"} 10.0
# TYPE llm_engine_decode_sequences_total counter
llm_engine_decode_sequences_total{model_id="a"} 65.0
"""
    assert batching.decode_totals(text) == (10, 65)
    assert batching.mean_step((0, 5), (10, 65)) == 6
    assert batching.mean_step((10, 65), (10, 65)) is None


def test_prompts_of_a_benchmark_are_never_the_same_twice() -> None:
    options = batching.BatchOptions(rounds=3)
    texts = [
        text
        for number in range(options.rounds)
        for at_once in (True, False)
        for text in batching.prompts(options, number, at_once)
    ]
    assert len(set(texts)) == len(texts) == 48


# the peer and the command


def test_litellm_is_configured_for_the_instant_upstream_alone() -> None:
    settings = json.loads(peer.config(1234))
    assert settings["model_list"][0]["litellm_params"]["api_base"] == "http://127.0.0.1:1234/v1"
    assert "database_url" not in json.dumps(settings)


def test_the_peer_is_locked_with_hashes_and_names_no_host() -> None:
    text = peer.REQUIREMENTS.read_text()
    assert "litellm==" in text
    assert "--hash=sha256:" in text
    assert "://" not in text.replace("# via", "")
    assert not any(f"litellm==1.82.{patch} " in text for patch in (7, 8))


def test_a_peer_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    requirements = tmp_path / "bench.txt"
    requirements.write_text("this is not a requirement\n")
    said: list[str] = []
    with pytest.raises(PeerUnavailable, match="pip ended with 1"):
        peer.install(said.append, tmp_path / "environment", requirements)
    assert said
    with pytest.raises(PeerUnavailable, match="litellm is not in"):
        environments.version(tmp_path / "environment", "litellm")


def test_an_environment_that_matches_the_lock_is_used_again(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    environment.mkdir()
    environments.mark_installed(environment, peer.REQUIREMENTS)
    said: list[str] = []
    assert peer.install(said.append, environment) == environment
    assert said == []


STUB = """#!{python}
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
{body}
"""


def stub_peer(tmp_path: Path, body: str) -> Path:
    """An environment whose `litellm` is a stand-in."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "lib/python3.11/site-packages/litellm-9.8.7.dist-info").mkdir(parents=True)
    program = environment / "bin" / "litellm"
    program.write_text(STUB.format(python=sys.executable, body=body))
    program.chmod(0o755)
    return environment


def test_the_peer_is_started_with_a_key_of_its_own_and_stopped(tmp_path: Path) -> None:
    environment = stub_peer(tmp_path, "http.server.HTTPServer(('127.0.0.1', port), Handler).serve_forever()")
    with peer.running(environment, tmp_path, 1234, num_workers=2) as running:
        assert running.version == "9.8.7"
        assert running.master_key.startswith("sk-")
        assert running.master_key not in repr(running)
        assert "--num_workers 2" in running.command
        assert str(tmp_path) not in running.command
        assert children.answers_200(running.port, "/health/liveliness")
        arms = gateway._peer_arms(gateway.Options(), running)
        assert [arm.name for arm in arms] == ["litellm", "litellm_stream"]
    assert footprint.tree(running.pid) == []
    assert json.loads((tmp_path / "litellm.yaml").read_text())["model_list"]


def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    environment = stub_peer(tmp_path, "raise SystemExit('no such option')")
    with (
        pytest.raises(PeerUnavailable, match="no such option"),
        peer.running(environment, tmp_path, 1234, num_workers=1),
    ):
        raise AssertionError("it must not start")


def test_a_run_goes_on_without_a_peer_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Path:
        raise PeerUnavailable("no network")

    monkeypatch.setattr(peer, "install", fail)
    notes: list[str] = []
    assert gateway._peer_environment(gateway.Options(), notes, lambda _: None) is None
    assert notes == ["LiteLLM was not measured: no network"]


def test_the_commands_numbers_are_bounded() -> None:
    assert clients_list("16,1,4") == (1, 4, 16)
    assert between(1, 5, int)("3") == 3
    for wrong in ("", "0", "1,x", "1000"):
        with pytest.raises(ArgumentTypeError):
            clients_list(wrong)
    with pytest.raises(ArgumentTypeError, match="from 1 to 5"):
        between(1, 5, int)("6")


def test_the_machine_is_described_without_names() -> None:
    described = machine.describe()
    assert described["cores"] == len(os.sched_getaffinity(0))
    assert os.uname().nodename not in json.dumps(described)
    assert machine.versions()["django"].startswith("5.2")


def test_a_busy_machine_is_said_to_be_busy() -> None:
    assert machine.busyness({"load_average_before": 0.4, "cores": 2}) == []
    assert "busy" in machine.busyness({"load_average_before": 3.5, "cores": 2})[0]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(170)
def test_the_command_measures_a_real_installation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but LiteLLM, for moments: figures are not judged, only that they are all there and without errors."""
    before = {cost.pid for cost in footprint.costs(os.getpid())}
    call_command("bench", "--no-peer", "--rounds=1", "--seconds=0.4", "--clients=1,4", f"--out={tmp_path}", "--json")
    printed = json.loads(capsys.readouterr().out)
    points = {(point["arm"], point["clients"]): point for point in printed["samples"]["points"]}
    assert set(points) == {
        (arm, clients)
        for arm in ("direct", "direct_stream", "llmsite", "llmsite_cached", "llmsite_stream")
        for clients in (1, 4)
    }
    assert [point["errors"] for point in points.values() if point["num_errors"]] == []
    assert all(point["rate"] > 0 for point in points.values())
    assert points["llmsite", 1]["work"]["queries"] > points["llmsite_cached", 1]["work"]["queries"] > 0
    assert points["llmsite", 1]["work"]["redis_round_trips"] > 0
    assert {"web", "worker", "valkey"} <= points["llmsite", 4]["cpu_seconds"].keys()
    assert {path.name for path in tmp_path.iterdir()} == {"gateway.json", "gateway.md", "gateway.svg"}
    left = [cost.name for cost in footprint.costs(os.getpid()) if cost.pid not in before]
    assert not {"web", "worker", "supervisor"} & set(left)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(170)
def test_the_batching_benchmark_reads_receipts_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fake engine in place of the model: the way is the same, the figures mean nothing."""
    monkeypatch.setattr(batching, "running", lambda scratch, engine: site.running(scratch, engine="fake"))
    monkeypatch.setattr(batching, "BatchOptions", partial(batching.BatchOptions, max_tokens=8))
    call_command("bench", "--engine", "--rounds=1", f"--out={tmp_path}")
    whole = json.loads((tmp_path / "batching.json").read_text())
    assert whole["void"] is None
    assert [run["num_tokens"] for run in whole["runs"]] == [64, 64]
    assert all(len(run["batch_sizes"]) == 8 and min(run["batch_sizes"]) >= 1 for run in whole["runs"])
    assert whole["metrics_batch_size"] >= 1


def test_the_command_says_why_it_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> gateway.Study:
        raise children.NotStarted("llmsite ended with 1: no disk")

    monkeypatch.setattr(gateway, "run", broken)
    with pytest.raises(CommandError, match="no disk"):
        call_command("bench", f"--out={tmp_path}")
