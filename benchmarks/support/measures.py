"""The rows of benchmarks/engine.py: contenders, work, and bars. There is a function for each kind of row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from benchmarks.support.bare import Bare, HighLevel, Vocabulary
from benchmarks.support.clients import throughput
from benchmarks.support.memory import peak_of
from benchmarks.support.ours import Ours
from benchmarks.support.runner import WARM_UP, Bar, Row, compare, in_turn, say
from benchmarks.support.tools import Server, llama_batched_bench, llama_bench, llama_server
from benchmarks.support.workloads import Corpus, Ids, Workload, batch_of, completion, sentences
from dsmoe_local.engine.load.parallel import choose_parallel
from dsmoe_local.engine.types import Message, ModelOptions

MEGABYTE = 1e6
_PAD = 256  # llama.cpp pads a sequence's share of the cache to this
_BAR_OF_DEFAULTS = Bar(1.5)
_CACHES = {True: "one cache", False: "a cache each"}
_CHEAPEST = {"top_k": 1, "samplers": ["top_k"]}
"""Fields of a request that give llama-server its cheapest greedy sampler."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `n_start` is the length of prompts that are only there to be continued."""

    rounds: int = 3
    n_prompt: int = 512
    n_start: int = 32
    n_stream: int = 256
    width: int = 16
    n_together: int = 128
    n_requests: int = 64
    n_slots: int = 16
    n_clients: int = 32


QUICK = Sizes(1, 128, 16, 24, 4, 16, 8, 4, 8)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs. `kind` is our engine, one of `LOADERS`."""

    path: Path
    vocabulary: Vocabulary
    corpus: Corpus
    sizes: Sizes
    n_threads: int
    kind: str
    llama_cpp: Path | None
    is_demo: bool

    @property
    def options(self) -> ModelOptions:
        """The options that all of our engines have in common."""
        return ModelOptions(self.path, n_threads=self.n_threads)

    def ours(self, n_context: int, n_parallel: int = 1, unified: bool | None = None) -> Ours:
        """Load our engine."""
        return self.load(replace(self.options, n_context=n_context, n_parallel=n_parallel, unified=unified))

    def load(self, options: ModelOptions) -> Ours:
        """Load our engine with other options."""
        return Ours(options, self.vocabulary.ends, self.kind)

    def bare(self, n_context: int, n_sequences: int = 1, unified: bool = True) -> Bare:
        """Load the model for a bare loop."""
        return Bare(
            self.path,
            n_context=n_context,
            n_threads=self.n_threads,
            n_sequences=n_sequences,
            unified=unified,
        )

    def measure(
        self, contenders: Mapping[str, Callable[[int], float]], control: str = ""
    ) -> dict[str, list[float]]:
        """Measure contenders in turn."""
        return in_turn(contenders, self.sizes.rounds, control)

    def rounds_of(self, make: Callable[[], list[Ids]]) -> list[list[Ids]]:
        """Return prompts for each round with the warm-up: all contenders get the same ones in a round."""
        return [make() for _ in range(self.sizes.rounds + 1)]

    def llama_bench(self, row: Row, note: str, n_prompt: int = 0, n_new: int = 0) -> list[Row]:
        """Return our figure of a row beside that of llama-bench, if there is one."""
        if self.llama_cpp is None:
            return []
        rate = llama_bench(self.llama_cpp, self.path, self.n_threads, self.sizes.rounds, n_prompt, n_new)
        return [_beside(row, "llama-bench", rate, note)]


def padded(n_tokens: int) -> int:
    """Return the share of the cache that holds `n_tokens`."""
    return -(-n_tokens // _PAD) * _PAD


def _beside(row: Row, program: str, theirs: float, note: str) -> Row:
    """Return our figure of a row beside that of a program that measures itself."""
    return Row(row.measure, row.ours, program, theirs, row.ours / theirs, note=note)


def one_stream(bench: Bench) -> list[Row]:
    """Decode one reply. Its prompt is not timed."""
    sizes = bench.sizes
    n_new, n_context = sizes.n_stream, padded(sizes.n_start + sizes.n_stream)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(sizes.n_start)])
    with (
        bench.ours(n_context) as ours,
        bench.bare(n_context) as bare,
        HighLevel(bench.path, n_context=n_context, n_threads=bench.n_threads) as high,
    ):
        contenders = {
            bench.kind: lambda at: ours.decode_rate(prompts[at][0], n_new),
            "bare loop": lambda at: bare.decode_rate(prompts[at], n_new),
            "Llama(stream=True)": lambda at: high.decode_rate(prompts[at][0], n_new),
        }
        figures = bench.measure(contenders, "bare loop")
    name = f"one stream, decode, {n_new} tokens"
    high_bar = None if bench.is_demo else Bar(1.4)
    first = compare(name, figures, bench.kind, "bare loop", bar=Bar(0.97))
    return [
        first,
        compare(name, figures, bench.kind, "Llama(stream=True)", bar=high_bar),
        *bench.llama_bench(first, "random tokens, from an empty context", n_new=n_new),
    ]


def prompt_processing(bench: Bench) -> list[Row]:
    """Process a prompt up to its first token."""
    n_prompt = bench.sizes.n_prompt
    n_context = padded(n_prompt + 1)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(n_prompt)])
    with bench.ours(n_context) as ours, bench.bare(n_context) as bare:
        contenders = {
            bench.kind: lambda at: n_prompt / ours.reply(prompts[at][0], 1).first_token_seconds,
            "bare loop": lambda at: n_prompt / bare.read_seconds(prompts[at][0]),
        }
        figures = bench.measure(contenders, "bare loop")
    name = f"prompt processing, {n_prompt} tokens"
    first = compare(name, figures, bench.kind, "bare loop", bar=Bar(0.97))
    return [first, *bench.llama_bench(first, "random tokens, no logits", n_prompt=n_prompt)]


def sequences_together(bench: Bench) -> list[Row]:
    """Decode many sequences at once, in both modes of the cache, and compare with one stream."""
    return [row for unified in (False, True) for row in _together(bench, unified)]


def _together(bench: Bench, unified: bool) -> list[Row]:
    sizes = bench.sizes
    width, n_new = sizes.width, sizes.n_together
    share = padded(sizes.n_start + n_new)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(sizes.n_start) for _ in range(width)])
    with (
        bench.ours(width * share, width, unified) as ours,
        bench.ours(share) as single,
        bench.bare(width * share, width, unified) as bare,
    ):
        contenders = {
            bench.kind: lambda at: ours.steady_rate(prompts[at], n_new),
            "bare batched loop": lambda at: bare.decode_rate(prompts[at], n_new),
            "one stream of ours": lambda at: single.decode_rate(prompts[at][0], n_new),
        }
        figures = bench.measure(contenders, "bare batched loop")
    name = f"{width} sequences, decode, {_CACHES[unified]}"
    # Prompts without a common prefix get a cache each, so this mode has the bar.
    bar = None if unified else Bar(1.8)
    rows = [
        compare(name, figures, bench.kind, "bare batched loop", bar=Bar(0.95)),
        compare(name, figures, bench.kind, "one stream of ours", bar=bar),
    ]
    if bench.llama_cpp is not None:
        theirs = llama_batched_bench(
            bench.llama_cpp,
            bench.path,
            n_prompt=sizes.n_start,
            n_new=n_new,
            width=width,
            n_context=width * share,
            n_threads=bench.n_threads,
            unified=unified,
        )
        rows.append(_beside(rows[0], "llama-batched-bench", theirs, "random tokens"))
    return rows


SERVING = {
    "prefix400": (Workload("prompts sharing a 400-token prefix", 64, 64, 400), Bar(1.15)),
    "prefix1600": (Workload("prompts sharing a 1,600-token prefix", 64, 16, 1600), Bar(2.0)),
    "unrelated": (Workload("unrelated prompts", 64, 64, 0), Bar(1.0)),
}
"""Workloads that are compared with llama-server, and their bars if it has our settings."""


def same_slots(bench: Bench, name: str) -> list[Row]:
    """Compare with llama-server with our slots and clients, in both of its cache modes; the faster counts."""
    if bench.llama_cpp is None:
        say("  skipped: it needs --llama-cpp")
        return []
    sizes = bench.sizes
    work, bar = replace(SERVING[name][0], n_prompts=sizes.n_requests), SERVING[name][1]
    n_context = sizes.n_slots * padded(work.n_each)
    arguments = ["-t", str(bench.n_threads), "-c", str(n_context), "-np", str(sizes.n_slots)]
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(n_context, sizes.n_slots, unified=False))
        servers = {
            f"llama-server {flag}": stack.enter_context(
                llama_server(bench.llama_cpp, bench.path, *arguments, flag)
            )
            for flag in ("-no-kvu", "-kvu")
        }
        note = f"{sizes.n_slots} slots, ours: a cache each"
        rows = _serve(bench, work, _prompts(bench, work), ours, servers, sizes.n_clients, note)
    fastest = max(rows, key=lambda row: row.theirs)
    return [replace(row, bar=bar if row is fastest else None) for row in rows]


def own_defaults(bench: Bench, name: str) -> list[Row]:
    """Compare the choice of `--parallel auto` with llama-server's defaults."""
    if bench.llama_cpp is None:
        say("  skipped: it needs --llama-cpp")
        return []
    work = replace(SERVING[name][0], n_prompts=bench.sizes.n_requests)
    prompts = _prompts(bench, work)
    options = options_of_batch(bench.options, prompts[-1], work.n_new)
    with bench.load(options) as ours, llama_server(bench.llama_cpp, bench.path) as server:
        n_clients = max(bench.sizes.n_clients, 2 * options.n_parallel)
        note = f"auto: {options.n_parallel} at once, {_CACHES[bool(options.unified)]}"
        servers = {"llama-server, defaults": server}
        rows = _serve(bench, work, prompts, ours, servers, n_clients, note)
    return [replace(row, measure=f"{row.measure}, auto", bar=_BAR_OF_DEFAULTS) for row in rows]


def options_of_batch(options: ModelOptions, prompts: list[Ids], n_new: int) -> ModelOptions:
    """Return the options that dsmoe-batch chooses for a file of these prompts."""
    with batch_of([{"prompt": prompt, "max_tokens": n_new} for prompt in prompts]) as job:
        return choose_parallel(replace(options, prompt_ratio=job.prompt_ratio), job.workload)


def _prompts(bench: Bench, work: Workload) -> list[list[Ids]]:
    """Return the prompts of every round."""
    prompts = [bench.corpus.prompts(work, seed) for seed in range(bench.sizes.rounds + 1)]
    # A whole warm-up would take as long as a round that counts.
    prompts[WARM_UP] = prompts[WARM_UP][:2]
    return prompts


def _serve(
    bench: Bench,
    work: Workload,
    prompts: list[list[Ids]],
    ours: Ours,
    servers: Mapping[str, Server],
    n_clients: int,
    note: str,
) -> list[Row]:
    """Compare our throughput with that of each server."""
    failed = dict.fromkeys(servers, 0)

    def ask(name: str, at: int) -> float:
        bodies = [completion(prompt, work.n_new, bench.vocabulary.ends) | _CHEAPEST for prompt in prompts[at]]
        rate, n_failed = throughput(servers[name].port, bodies, work.n_new, n_clients)
        failed[name] += n_failed
        return rate

    contenders = {bench.kind: lambda at: ours.throughput(prompts[at], work.n_new, n_clients)}
    contenders |= {name: partial(ask, name) for name in servers}
    figures = bench.measure(contenders)
    title = f"{work.n_prompts} {work.name}, {work.n_new} new each"
    notes = {name: f"{note}; it failed {count} requests" if count else note for name, count in failed.items()}
    return [compare(title, figures, bench.kind, name, note=notes[name]) for name in servers]


@dataclass(frozen=True, slots=True)
class _FollowUp:
    """The messages up to the second question of a chat, their ids, and how many of them are in the cache."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    n_read: int


def second_turn(bench: Bench) -> list[Row]:
    """Wait for the first token of a second turn. The bare loop reads the new tokens behind the others."""
    n_words, n_reply = (40, 8) if bench.sizes == QUICK else (400, 48)
    cached: list[int] = []

    @cache
    def first_turn(at: int) -> _FollowUp:
        question = Message("user", sentences(n_words, at))
        answer = ours.reply((question,), n_reply)
        said = Message("assistant", "".join(answer.pieces), tuple(answer.token_ids))
        messages = (question, said, Message("user", sentences(n_words // 10, 1000 + at)))
        # The reply's last token was sampled but not decoded.
        n_read = len(ours.engine.encode((question,))) + len(answer.token_ids) - 1
        return _FollowUp(messages, ours.engine.encode(messages), n_read)

    def ours_turn(at: int) -> float:
        reply = ours.reply(first_turn(at).messages, 1)
        assert reply.usage is not None
        cached.append(reply.usage.cached_tokens)
        return 1000 * reply.first_token_seconds

    def bare_turn(at: int) -> float:
        turn = first_turn(at)
        return 1000 * bare.read_seconds(turn.ids[turn.n_read :], turn.ids[: turn.n_read])

    with bench.ours(2048) as ours, bench.bare(2048) as bare:
        figures = bench.measure({bench.kind: ours_turn, "bare loop": bare_turn}, "bare loop")
        last = first_turn(bench.sizes.rounds)
    note = f"{len(last.ids) - last.n_read} new tokens behind {last.n_read}; {cached[-1]} were cached"
    name = "second turn, time to first token"
    # The bar allows for the template, tokenizing, and the way to the caller.
    return [compare(name, figures, bench.kind, "bare loop", bar=Bar(1.1, at_most=True), unit="ms", note=note)]


def memory(bench: Bench) -> list[Row]:
    """Compare the peak memory of our processes with that of the same work in C functions alone."""
    rows = []
    for n_parallel in (1, bench.sizes.width):
        sizes = (2048 if n_parallel == 1 else n_parallel * 512, n_parallel, bench.n_threads)
        ours, theirs = (peak_of(who, bench.path, *sizes) / MEGABYTE for who in ("ours", "bare"))
        rows.append(
            Row(
                f"memory, {n_parallel} at once",
                ours,
                "llama.cpp's own",
                theirs,
                ours - theirs,
                "MB",
                Bar(150, at_most=True),
                is_difference=True,
            )
        )
    return rows


MEASURES: Mapping[str, Callable[[Bench], list[Row]]] = {
    "stream": one_stream,
    "prompt": prompt_processing,
    "together": sequences_together,
    "prefix400": partial(same_slots, name="prefix400"),
    "prefix1600": partial(same_slots, name="prefix1600"),
    "unrelated": partial(same_slots, name="unrelated"),
    "auto400": partial(own_defaults, name="prefix400"),
    "auto1600": partial(own_defaults, name="prefix1600"),
    "auto-unrelated": partial(own_defaults, name="unrelated"),
    "turn": second_turn,
    "memory": memory,
}
