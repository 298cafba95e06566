"""The registry with the real model and real children: trial loads, crashes, limits, the vocabulary file."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.catalog import model_rows, registry
from inference.gguf.header import GGUFError, read_header, write_vocabulary_only
from inference.models import ServedModel
from inference.vetting import trial, trial_load
from inference.vetting.inspection import RegistrationError
from inference.vetting.trial import Trial, TrialError
from tests.inference import gguf_files

pytestmark = [pytest.mark.model, pytest.mark.integration]


@pytest.fixture(scope="module")
def vocabulary(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("vocabulary") / "smollm2.gguf"
    write_vocabulary_only(model_path, target)
    return target


@pytest.fixture
def _fresh_registry() -> Iterator[None]:
    registry.forget()
    yield
    registry.forget()


def test_the_header_of_the_real_model_is_read_in_milliseconds(model_path: Path) -> None:
    began = time.thread_time()
    summary = read_header(model_path).summary()
    assert time.thread_time() - began < 1
    assert (summary["architecture"], summary["quantization"], summary["context_length"]) == ("llama", "Q4_1", 8192)
    assert (summary["num_parameters"], summary["vocabulary_size"]) == (134_515_008, 49152)
    assert summary["kv_elements_per_token"] == 30 * 3 * 2 * 64
    assert "<|im_start|>" in summary["chat_templates"]["default"]


@pytest.mark.django_db
@pytest.mark.usefixtures("_fresh_registry")
def test_the_real_model_is_registered_and_served(model_path: Path) -> None:
    row = model_rows.register(model_path, "smollm2", n_ctx=512)
    assert row.metadata["trial"]["vocabulary_size"] == 49152
    assert row.metadata["trial"]["trained_context"] == 8192
    served = registry.in_pool("default")[0]
    assert (served.name, served.digest, served.is_default) == ("smollm2", row.digest, True)
    assert served.vocabulary_path.stat().st_size < 2_000_000


@pytest.mark.django_db
def test_a_real_file_with_damaged_weights_is_refused(model_path: Path, tmp_path: Path) -> None:
    header = read_header(model_path)
    data = bytearray(model_path.read_bytes())
    middle = header.data_offset + header.tensor_bytes // 2
    data[middle : middle + 4_000_000] = b"\xff\x7f" * 2_000_000  # not-a-number as the scale of every block
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(RegistrationError, match="did not pass its trial load"):
        model_rows.register(damaged, "damaged")
    assert not ServedModel.objects.exists()


@pytest.mark.django_db
def test_a_header_that_llama_cpp_cannot_use_is_refused_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="llama") as caught:
        model_rows.register(gguf_files.write(tmp_path), "tiny")
    assert caught.value.code == "trial_failed"


def test_the_vocabulary_file_loads_small_and_fast_and_tokenizes_alike(model_path: Path, vocabulary: Path) -> None:
    program = textwrap.dedent(
        """
        import json, resource, sys, time
        from pathlib import Path
        import llama_cpp
        from inference.vetting import trial_load

        llama_cpp.llama_backend_init()
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        model = trial_load.load(Path(sys.argv[1]), vocab_only=True)
        seconds = time.perf_counter() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        tokens = trial_load.tokenize(llama_cpp.llama_model_get_vocab(model), trial_load.SAMPLE)
        print(json.dumps({"seconds": seconds, "megabytes": grown / 1024, "tokens": tokens}))
        """
    )
    answers = []
    for path in (vocabulary, model_path):
        result = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            cwd=trial.BASE_DIR,
            capture_output=True,
            check=True,
            timeout=60,
        )
        answers.append(json.loads(result.stdout.splitlines()[-1]))
    small, whole = answers
    assert small["tokens"] == whole["tokens"]
    assert len(small["tokens"]) > 5
    assert small["megabytes"] < 60
    assert small["seconds"] < 5


def test_a_trial_that_takes_too_long_is_killed(model_path: Path, vocabulary: Path) -> None:
    with pytest.raises(TrialError, match=r"within 0\.05 s"):
        Trial(wall_seconds=0.05).run(model_path, vocabulary)


def test_a_trial_that_wants_too_much_memory_is_refused(model_path: Path, vocabulary: Path) -> None:
    with pytest.raises(TrialError):
        Trial(overhead_bytes=64 << 20).run(model_path, vocabulary)


def test_damaged_headers_of_the_real_model_end_in_a_report_or_a_reason(
    model_path: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """What the header reader lets pass goes to the child; whatever llama.cpp does with it, this process goes on."""
    chance = random.Random(20)
    path = tmp_path / "damaged.gguf"
    shutil.copyfile(model_path, path)
    outcomes = []
    for _ in range(40):
        place = chance.randrange(300, 1200)  # the model's dimensions
        with path.open("r+b") as file:
            file.seek(place)
            before = file.read(4)
            file.seek(place)
            file.write(struct.pack("<I", chance.choice((0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1))))
        outcomes.append(_try(path, vocabulary))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(before)
    assert {"refused by the reader", "refused by the trial"} <= set(outcomes)


def _try(path: Path, vocabulary: Path) -> str:
    began = time.monotonic()
    try:
        read_header(path)
        Trial(wall_seconds=20).run(path, vocabulary)
    except GGUFError:
        return "refused by the reader"
    except TrialError as error:
        assert str(error)
        return "refused by the trial"
    finally:
        assert time.monotonic() - began < 25
    return "passed"


def test_the_child_examines_the_model(model_path: Path, vocabulary: Path) -> None:
    report = trial_load.examine(model_path, vocabulary)
    assert report == {
        "vocabulary_size": 49152,
        "trained_context": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "recurrent": False,
    }


def test_the_child_finds_a_vocabulary_that_tokenizes_otherwise_unfit(
    model_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[1, 2, 3], [1, 2]])
    monkeypatch.setattr(trial_load, "tokenize", lambda *_: next(answers))
    with pytest.raises(trial_load.Unfit, match="needs the weights"):
        trial_load.examine(model_path, vocabulary)
    monkeypatch.setattr(trial_load, "tokenize", lambda *_: [])
    with pytest.raises(trial_load.Unfit, match="no tokens"):
        trial_load.examine(model_path, vocabulary)


@pytest.mark.parametrize(
    ("function", "answer", "said"),
    [
        ("llama_model_has_decoder", False, "an encoder"),
        ("llama_init_from_model", None, "cannot make a context"),
        ("llama_decode", 2, "failed with status 2"),
        ("llama_get_logits_ith", [float("nan")] * 49152, "not numbers"),
        ("llama_model_load_from_file", None, "cannot load"),
    ],
)
def test_the_child_names_what_llama_cpp_refuses(
    model_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, function: str, answer: object, said: str
) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, function, lambda *_: answer)
    with pytest.raises(trial_load.Unfit, match=said):
        trial_load.examine(model_path, vocabulary)


class Exited(BaseException):
    """Stands for the end of the process."""


def answer_of_main(monkeypatch: pytest.MonkeyPatch, examine: object, tmp_path: Path) -> dict[str, object]:
    """Run the child's main here, with its limits noted instead of set."""
    limits: dict[int, tuple[int, int]] = {}
    question = {"path": "a", "vocabulary": "b", "parent": os.getppid(), "cpu_seconds": 7, "max_memory_bytes": 1 << 30}

    def end(_status: int) -> None:
        raise Exited

    answers = tmp_path / "answers"
    with answers.open("w") as file:
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(question)))
        monkeypatch.setattr(trial_load, "tie_to", lambda _parent: None)
        monkeypatch.setattr(trial_load, "start_again_with_small_stacks", lambda: None)
        monkeypatch.setattr(trial_load, "examine", examine)
        monkeypatch.setattr(resource, "setrlimit", lambda which, bounds: limits.update({which: bounds}))
        monkeypatch.setattr(os, "dup", lambda _descriptor: file.fileno())
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        monkeypatch.setattr(os, "fdopen", lambda *_: file)
        monkeypatch.setattr(os, "_exit", end)
        with pytest.raises(Exited):
            trial_load.main()
        monkeypatch.undo()
    assert limits[resource.RLIMIT_CPU] == (7, 8)
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    if sys.platform == "linux":
        assert limits[resource.RLIMIT_AS] == (1 << 30, 1 << 30)
    report: dict[str, object] = json.loads(answers.read_text())
    return report


def test_the_child_answers_in_one_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unfit(*_: object) -> None:
        raise trial_load.Unfit("for a reason")

    def without_llama(*_: object) -> None:
        raise ImportError("no llama_cpp")

    assert answer_of_main(monkeypatch, lambda *_: {"add_bos_token": True}, tmp_path) == {
        "ok": True,
        "add_bos_token": True,
    }
    assert answer_of_main(monkeypatch, unfit, tmp_path) == {"ok": False, "reason": "for a reason"}
    assert "make install" in str(answer_of_main(monkeypatch, without_llama, tmp_path)["reason"])


def test_a_child_whose_parent_is_gone_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; from inference.vetting import trial_load; trial_load.tie_to(os.getppid() + 1)"
    assert subprocess.run([sys.executable, "-c", program], cwd=trial.BASE_DIR, check=False).returncode == 1


def child_that_does(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Replace the trial's child by a program with the limits of the real one."""
    package = folder / "inference" / "vetting"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "trial_load.py").write_text(
        f"import json, os, signal, sys, time\nquestion = json.load(sys.stdin)\n"
        f"sys.path.insert(0, {str(trial.BASE_DIR)!r})\n{textwrap.dedent(body)}\n"
    )
    monkeypatch.setattr(trial, "BASE_DIR", folder)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed on it .SIGSEGV"),
        ("print('GGML_ASSERT: no good', file=sys.stderr, flush=True); os.abort()", "SIGABRT.: GGML_ASSERT: no good"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "more processor time"),
        ("sys.exit(3)", "ended with status 3"),
        ("print('not json')", "gave no answer"),
        ("print('[1]')", "an answer that is not one"),
        ("print(json.dumps({'ok': False, 'reason': 'for a reason'}))", "for a reason"),
    ],
)
def test_however_the_child_ends_it_is_a_refusal_with_a_reason(
    model_path: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    child_that_does(monkeypatch, tmp_path, body)
    with pytest.raises(TrialError, match=said):
        Trial().run(model_path, vocabulary)


def test_no_secret_reaches_the_child(
    model_path: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "canary-of-the-environment")
    child_that_does(
        monkeypatch, tmp_path, "print(json.dumps({'ok': True, 'environment': sorted(os.environ.values())}))"
    )
    report = Trial().run(model_path, vocabulary)
    assert "canary-of-the-environment" not in report["environment"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    child = (
        f"import os, sys; from inference.vetting import trial_load; trial_load.tie_to(os.getppid());"
        f"open({str(mark)!r}, 'w').write(str(os.getpid())); import time; time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        cwd=trial.BASE_DIR,
    )
    deadline = time.monotonic() + 20
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(mark.read_text())
    parent.kill()
    parent.wait()
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"} and pid != os.getpid()
