"""The engine's benchmark: how figures are taken, and that every row still runs. No figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import tiny_model

from benchmarks.support import arguments
from benchmarks.support.clients import throughput
from benchmarks.support.ours import Reply, steady_rate
from benchmarks.support.runner import Bar, compare, compare_all, in_turn
from benchmarks.support.tools import Server, llama_server
from benchmarks.support.workloads import Corpus, Workload, batch_of, completion

ROOT = Path(__file__).parents[2]
FAKE_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {{}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        too_long = len(body["prompt"]) > 8
        n = body["max_tokens"] - (body["prompt"][0] == 13)
        self.answer(500 if too_long else 200, {{"usage": {{"completion_tokens": n}}}})

    def answer(self, status, value):
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_auto_is_asked_as_a_batch_asks_it() -> None:
    """Guards: a row that measures a choice which dsmoe-batch would not make."""
    shared = tuple(range(400))
    with batch_of([completion((*shared, number), 64, ()) for number in range(10)]) as job:
        found, prompt_ratio = job.workload, job.prompt_ratio
    assert (found.n_sequences, found.n_longest, found.n_messages) == (10, 401 + 64, 0)
    # 256 of the tokens in common are seen to be.
    assert found.n_total == 10 * (401 + 64) - 9 * 256
    assert prompt_ratio == (10 * 401 - 9 * 256) / (10 * 64)


def test_contenders_take_turns() -> None:
    """Guards: a warm-up that counts, or one contender that always runs first, on the cooler machine."""
    calls: list[str] = []

    def contender(name: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            calls.append(f"{name}{number}")
            return float(number)

        return measure

    figures = in_turn({"a": contender("a"), "b": contender("b")}, 3)
    assert figures == {"a": [1, 2, 3], "b": [1, 2, 3]}
    assert calls == ["b0", "a0", "a1", "b1", "b2", "a2", "a3", "b3"]


def test_the_ratio_is_that_of_a_round() -> None:
    """Guards: a ratio of medians, in which a slow round of one side meets a fast round of the other."""
    row = compare("x", {"a": [10, 20, 90], "b": [10, 40, 30]}, "a", "b", bar=Bar(1.0))
    assert (row.ours, row.theirs, row.result, row.passed) == (20, 30, 1.0, True)
    assert replace(row, bar=Bar(1.01)).passed is False
    assert replace(row, bar=Bar(0.99, at_most=True)).passed is False


def test_the_control_bounds_what_is_claimed() -> None:
    """Guards: 1.07 x called a gain, or a bar called met, where the same measured twice differs by more."""
    figures = in_turn({"a": lambda _: 1.0, "b": float}, 2, "b")
    assert figures == {"a": [1, 1], "b": [1, 2], "b, again": [1, 2]}
    row = compare("x", {"a": [10.7, 10.7], "b": [10, 10], "b, again": [9, 10]}, "a", "b", bar=Bar(1.0))
    assert row.control == pytest.approx(10 / 9)
    assert row.spread == pytest.approx((1.07 * 0.9, 1.07 / 0.9))
    assert (row.passed, row.is_uncertain, row.is_none) == (True, True, True)
    row = compare("x", {"a": [12, 12], "b": [10, 10], "b, again": [9, 10]}, "a", "b", bar=Bar(1.0))
    assert (row.passed, row.is_uncertain, row.is_none) == (True, False, False)


def test_all_is_compared_with_the_base() -> None:
    """Guards: a contender that is compared with another one, or with the base of another round."""
    contenders = {
        "a": lambda at: {"pp, t/s": 2.0 * at, "load, s": 1.0},
        "b": lambda at: {"pp, t/s": 1.0 * at, "load, s": 4.0},
    }
    rows = compare_all(in_turn(contenders, 3, "b"), "b")
    assert [(row.measure, row.against, row.unit, row.ours, row.result) for row in rows] == [
        ("pp, a", "b", "t/s", 4.0, 2.0),
        ("load, a", "b", "s", 1.0, 0.25),
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "FILE",
            {
                "file": Path("FILE"),
                "rounds": 3,
                "only": ("a", "b"),
                "depths": (0,),
                "quick": False,
                "other": None,
            },
        ),
        ("--rounds 5 --quick", {"file": None, "rounds": 5, "quick": True}),
        ("--only b --depths 1,2 --other x", {"only": ("b",), "depths": (1, 2), "other": Path("x")}),
    ],
)
def test_options_have_the_types_of_their_defaults(
    words: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: numbers that stay words, a default that is not used."""
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    given = arguments.parse("", "file?", rounds=3, only=("a", "b"), depths=(0,), quick=False, other=Path)
    assert {**vars(given), **expected} == vars(given)


def test_no_prompt_is_handed_out_twice() -> None:
    """Guards: rounds that find their prompts in somebody's cache, also once the corpus begins anew."""
    corpus = Corpus(range(10_000))
    prompts = [ids for seed in range(4) for ids in corpus.prompts(Workload("", 16, 8, 0), seed)]
    assert sum(map(len, prompts)) > 5_000
    starts = [corpus.take(300)[0] for _ in range(70)]
    assert len(set(starts)) == len(starts)
    assert len(set(prompts)) == len(prompts)


def test_a_shared_prefix_is_shared_exactly() -> None:
    """Guards: tails that agree by chance of cutting, which would make the prefix longer than it says."""
    work = Workload("", 8, 8, 40)
    prompts = Corpus(range(1_000)).prompts(work, 0)
    assert len({ids[:40] for ids in prompts}) == 1
    assert len({ids[40] for ids in prompts}) == 8
    assert all(len(ids) + work.n_new <= work.n_each for ids in prompts)


def test_the_steady_rate_leaves_out_the_ramps() -> None:
    """Guards: counting tokens from before everybody decodes, or after the first one is done."""
    early = Reply(0, arrivals=[1, 2, 3, 4, 5, 6])
    late = Reply(0, arrivals=[3, 4, 5, 6, 7, 8])
    assert steady_rate([early, late]) == 2
    with pytest.raises(SystemExit, match="not decoded together"):
        steady_rate([Reply(0, arrivals=[1, 2]), Reply(0, arrivals=[2, 3])])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A llama-server that only counts."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(FAKE_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    with llama_server(tmp_path, Path("model")) as server:
        yield server


def test_requests_that_the_server_fails_count_no_tokens(server: Server) -> None:
    """Guards: a server that looks fast because it refuses the work."""
    bodies = [completion(prompt, 5, ()) for prompt in ((1,) * 4, (1,) * 9, (2,) * 4)]
    rate, n_failed = throughput(server.port, bodies, 5, 2)
    assert rate > 0
    assert n_failed == 1
    assert throughput(server.port, bodies[1:2], 5, 1) == (0, 1)


def test_a_server_that_answers_less_is_not_measured(server: Server) -> None:
    """Guards: comparing speeds of replies of different lengths."""
    with pytest.raises(SystemExit, match="a reply has 4 tokens"):
        throughput(server.port, [completion((13,), 5, ())], 5, 1)


def test_rows_without_llama_cpp_run() -> None:
    """Guards: a change of the engine that breaks the benchmark, found out only when figures are wanted."""
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--threads", "1", "--only", "stream,turn"]
    done = subprocess.run(
        [*command, "--model", str(tiny_model())], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 3
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
