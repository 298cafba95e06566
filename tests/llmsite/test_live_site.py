"""`manage.py up --demo` as a newcomer meets it: ready, serving the real model, quick, small, gone without a trace."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.conftest import Site, running_site
from tests.llmsite.test_processes import descendants
from tests.llmsite.test_supervisor import is_alive, wait_until
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow, pytest.mark.xdist_group("live_site")]


def test_the_printed_curl_line_answers_with_text(live_site: Site) -> None:
    wait_until(lambda: "curl -s " in live_site.log.read_text())
    found = re.search(r"^curl .*\\\n.*$", live_site.log.read_text(), flags=re.MULTILINE)
    assert found is not None
    words = shlex.split(found.group(0).replace("\\\n", " "))
    url, key, body = words[2], words[4], words[8]
    assert (words[3], words[5], words[7]) == ("-H", "-H", "-d")
    headers = {"Authorization": key.removeprefix("Authorization: "), "Content-Type": "application/json"}
    answer = httpx.post(url, content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "smollm2-135m"
    assert answer.json()["output"].strip()


def test_demo_json_is_private_and_names_this_site(live_site: Site) -> None:
    assert (live_site.state / "demo.json").stat().st_mode & 0o777 == 0o600
    assert live_site.demo["base_url"] == live_site.base_url
    assert live_site.demo["models"] == ["smollm2-135m"]


def test_the_console_answers_with_its_styles(live_site: Site) -> None:
    page = httpx.get(f"{live_site.base_url}/admin/login/")
    assert page.status_code == 200
    sheets = re.findall(r'href="(/static/[^"]+\.css)"', page.text)
    assert sheets
    assert httpx.get(live_site.base_url + sheets[0]).status_code == 200


def test_no_key_and_no_probe_is_in_the_log(live_site: Site) -> None:
    httpx.post(f"{live_site.base_url}/v1/generate", json={"prompt": ""}, headers=live_site.headers())
    text = live_site.log.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("curl ")]
    assert not [line for line in lines if live_site.key in line or live_site.demo["operator_key"] in line]
    assert not [line for line in lines if "/readyz" in line]


@pytest.mark.memory
def test_the_idle_demo_is_small(tmp_path: Path) -> None:
    """Proportional sizes: pages that processes share are counted once. A site that nobody asked anything of."""
    with running_site(tmp_path / "state") as site:
        supervisor = site.process.pid
        pids = [supervisor, *descendants(supervisor)]
        sizes = {pid: proportional_kib(pid) for pid in pids}
        names = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}
    report = "\n".join(f"{sizes[pid]:>8} KiB {names[pid][:120]}" for pid in pids)
    assert sum(sizes.values()) <= 800 * 1024, report
    (web,) = [pid for pid, name in names.items() if "llmsite.processes.web" in name]
    assert sizes[web] <= 200 * 1024, report


def proportional_kib(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found.group(1))


def test_the_second_start_is_quick_and_kill_9_leaves_no_orphan(tmp_path: Path) -> None:
    """Also: a dead worker is back within ten seconds, tokenizer children included in the count of orphans."""
    state = tmp_path / "state"
    with running_site(state, prepared=False) as site:
        keys = site.demo
    watch = Stopwatch()
    with running_site(state) as site:
        assert watch.seconds() < 20  # 10 s on a machine that does nothing else
        assert site.demo["tenants"] == keys["tenants"]
        body = {"prompt": "Once", "max_new_tokens": 2}
        answer = httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(), timeout=60)
        assert answer.status_code == 200
        everybody = descendants(site.process.pid)
        assert len(everybody) >= 5  # web and its tokenizer, worker, beat, Valkey
        (worker,) = [pid for pid in everybody if "manage.py\0worker" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not is_alive(worker))
        watch = Stopwatch()
        wait_until(lambda: httpx.get(f"{site.base_url}/readyz").status_code == 503)
        wait_until(lambda: httpx.get(f"{site.base_url}/readyz").status_code == 200, seconds=60)
        assert watch.seconds() < 20  # 10 s on a machine that does nothing else
        everybody = descendants(site.process.pid)
        site.process.kill()
        site.process.wait(timeout=PATIENCE_SECONDS)
        wait_until(lambda: not any(map(is_alive, everybody)), lambda: alive_commands(everybody))


def alive_commands(pids: list[int]) -> str:
    alive = ",".join(str(pid) for pid in pids if is_alive(pid))
    return subprocess.run(["ps", "-o", "pid,args", "-p", alive], capture_output=True, text=True, check=False).stdout


def ask(site: Site, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{site.base_url}{path}", json=body, headers=site.headers(), timeout=60)


def test_a_conversation_is_answered_by_the_real_model(live_site: Site) -> None:
    question = [{"role": "user", "content": "What is 2+2?"}]
    fields: dict[str, object] = {"messages": question, "max_new_tokens": 16, "temperature": 0, "cache": False}
    whole = ask(live_site, "/v1/generate", **fields)
    assert whole.status_code == 200, whole.text
    assert whole.json()["output"] == "The answer to this classic math problem is 4."
    streamed = ask(live_site, "/v1/generate", **fields, stream=True)
    texts = re.findall(r'^data: \{"text":"(.*)"\}$', streamed.text, flags=re.MULTILINE)
    assert "".join(texts) == whole.json()["output"]
    assert '"finish_reason":"stop"' in streamed.text
    prompt = ask(live_site, "/apply-template", messages=question).json()["prompt"]
    assert prompt.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")


def test_special_tokens_in_a_message_are_counted_as_text(live_site: Site) -> None:
    """As a control token each would be one token."""

    def num_tokens(content: str) -> int:
        messages = [{"role": "user", "content": content}]
        answer = ask(live_site, "/v1/generate", messages=messages, max_new_tokens=1, cache=False)
        return int(answer.headers["x-usage-prompt-tokens"])

    assert num_tokens("x" + "<|im_end|>" * 10) - num_tokens("x") > 40


def test_a_template_of_a_request_is_refused(live_site: Site) -> None:
    hostile = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    answer = ask(live_site, "/v1/generate", messages=[{"role": "user", "content": "x"}], chat_template=hostile)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
