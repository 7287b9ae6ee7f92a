"""The rows of benchmarks/engine.py: who runs against whom, on what, and the bar. A function for each row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from benchmarks.support.bare import Bare, HighLevel, Vocabulary
from benchmarks.support.memory import peak_of
from benchmarks.support.ours import Ours
from benchmarks.support.runner import WARM_UP, Bar, Row, compare, in_turn, say
from benchmarks.support.tools import Server, llama_batched_bench, llama_bench, serving
from benchmarks.support.workloads import Corpus, Ids, Workload, as_batch, sentences
from dsmoe_local.engine.load import parallel
from dsmoe_local.engine.types import Message, ModelOptions

MEGABYTE = 1e6
_PAD = 256  # llama.cpp pads a sequence's share of the cache to this
_BAR_OF_DEFAULTS = Bar(1.5)
_UNIFIED = {True: "one cache", False: "a cache each"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3
    n_prompt: int = 512
    n_start: int = 32
    """Tokens of the prompts that are only there to be continued."""
    n_stream: int = 256
    width: int = 16
    n_together: int = 128
    n_requests: int = 64
    n_slots: int = 16
    n_clients: int = 32


QUICK = Sizes(1, 128, 16, 24, 4, 16, 8, 4, 8)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs."""

    path: Path
    vocabulary: Vocabulary
    corpus: Corpus
    sizes: Sizes
    n_threads: int
    kind: str
    """Our engine: one of ours.LOADERS."""
    llama_cpp: Path | None
    is_demo: bool
    unified: bool | None = None
    """The mode of our cache in the rows against llama-server; None: each row's own."""

    def ours(
        self, n_context: int, n_parallel: int = 1, unified: bool | None = None, kind: str | None = None
    ) -> Ours:
        """Our engine, loaded."""
        options = replace(self.options, n_context=n_context, n_parallel=n_parallel, unified=unified)
        return Ours(options, self.vocabulary.ends, kind or self.kind)

    @property
    def options(self) -> ModelOptions:
        """What all of our engines have in common."""
        return ModelOptions(self.path, n_threads=self.n_threads)

    def rounds_of(self, make: Callable[[], list[Ids]]) -> list[list[Ids]]:
        """Prompts for each round, the warm-up included: everybody gets the same ones in the same round."""
        return [make() for _ in range(self.sizes.rounds + 1)]


Measurement = Callable[[Bench], list[Row]]


def padded(n_tokens: int) -> int:
    """A share of the cache that holds `n_tokens`."""
    return -(-n_tokens // _PAD) * _PAD


def _beside(row: Row, program: str, theirs: float, note: str) -> Row:
    """Our figure of a row beside that of a program that measures itself."""
    return Row(row.measure, row.ours, program, theirs, row.ours / theirs, note=note)


def one_stream(bench: Bench) -> list[Row]:
    """One reply, its prompt aside."""
    sizes = bench.sizes
    n_new, n_context = sizes.n_stream, padded(sizes.n_start + sizes.n_stream)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(sizes.n_start)])
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(n_context))
        bare = stack.enter_context(Bare(bench.path, n_context=n_context, n_threads=bench.n_threads))
        high = stack.enter_context(HighLevel(bench.path, n_context=n_context, n_threads=bench.n_threads))
        contenders = {
            bench.kind: lambda at: ours.decode_rate(prompts[at][0], n_new),
            "bare loop": lambda at: bare.decode_rate(prompts[at], n_new),
            "Llama(stream=True)": lambda at: high.decode_rate(prompts[at][0], n_new),
        }
        figures = in_turn(contenders, sizes.rounds, "bare loop")
    name = f"one stream, decode, {n_new} tokens"
    high_bar = None if bench.is_demo else Bar(1.4)
    rows = [
        compare(name, figures, bench.kind, "bare loop", bar=Bar(0.97)),
        compare(name, figures, bench.kind, "Llama(stream=True)", bar=high_bar),
    ]
    if bench.llama_cpp is not None:
        theirs = llama_bench(
            bench.llama_cpp, bench.path, n_threads=bench.n_threads, rounds=sizes.rounds, n_new=n_new
        )
        rows.append(_beside(rows[0], "llama-bench", theirs, "random tokens, from an empty context"))
    return rows


def prompt_processing(bench: Bench) -> list[Row]:
    """A prompt up to its first token."""
    n_prompt = bench.sizes.n_prompt
    n_context = padded(n_prompt + 1)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(n_prompt)])
    with (
        bench.ours(n_context) as ours,
        Bare(bench.path, n_context=n_context, n_threads=bench.n_threads) as bare,
    ):
        figures = in_turn(
            {
                bench.kind: lambda at: n_prompt / ours.reply(prompts[at][0], 1).first_token_seconds,
                "bare loop": lambda at: n_prompt / bare.read_seconds(prompts[at][0]),
            },
            bench.sizes.rounds,
            "bare loop",
        )
    name = f"prompt processing, {n_prompt} tokens"
    rows = [compare(name, figures, bench.kind, "bare loop", bar=Bar(0.97))]
    if bench.llama_cpp is not None:
        theirs = llama_bench(
            bench.llama_cpp,
            bench.path,
            n_threads=bench.n_threads,
            rounds=bench.sizes.rounds,
            n_prompt=n_prompt,
        )
        rows.append(_beside(rows[0], "llama-bench", theirs, "random tokens, no logits"))
    return rows


def sequences_together(bench: Bench) -> list[Row]:
    """Many sequences decoded at once, in both modes of the cache, and against one stream."""
    return [row for unified in (False, True) for row in _together(bench, unified)]


def _together(bench: Bench, unified: bool) -> list[Row]:
    sizes = bench.sizes
    width, n_new = sizes.width, sizes.n_together
    share = padded(sizes.n_start + n_new)
    prompts = bench.rounds_of(lambda: [bench.corpus.take(sizes.n_start) for _ in range(width)])
    with (
        bench.ours(width * share, width, unified) as ours,
        bench.ours(share) as single,
        Bare(
            bench.path,
            n_context=width * share,
            n_sequences=width,
            unified=unified,
            n_threads=bench.n_threads,
        ) as bare,
    ):
        figures = in_turn(
            {
                bench.kind: lambda at: ours.steady_rate(prompts[at], n_new),
                "bare batched loop": lambda at: bare.decode_rate(prompts[at], n_new),
                "one stream of ours": lambda at: single.decode_rate(prompts[at][0], n_new),
            },
            sizes.rounds,
            "bare batched loop",
        )
    name = f"{width} sequences, decode, {_UNIFIED[unified]}"
    # Prompts that share nothing get a cache each: that is the mode to be held against one stream.
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


@dataclass(frozen=True, slots=True)
class Serving:
    """A workload against llama-server. `unified`: the mode in which our engine does this kind of work."""

    work: Workload
    unified: bool
    bar: Bar


SERVING = {
    "prefix400": Serving(Workload("prompts sharing a 400-token prefix", 64, 64, 400), False, Bar(1.15)),
    "prefix1600": Serving(Workload("prompts sharing a 1,600-token prefix", 64, 16, 1600), False, Bar(2.0)),
    "unrelated": Serving(Workload("unrelated prompts", 64, 64, 0), False, Bar(1.0)),
}


def _scaled(bench: Bench, name: str) -> tuple[Serving, str]:
    chosen = SERVING[name]
    work = replace(chosen.work, n_prompts=bench.sizes.n_requests)
    unified = chosen.unified if bench.unified is None else bench.unified
    return replace(chosen, work=work, unified=unified), f"{work.n_prompts} {work.name}, {work.n_new} new each"


def same_slots(bench: Bench, name: str) -> list[Row]:
    """llama-server with our slots, clients and cache, in both of its cache modes; the faster one counts."""
    if bench.llama_cpp is None:
        say("  skipped: it needs --llama-cpp")
        return []
    chosen, title = _scaled(bench, name)
    sizes, work = bench.sizes, chosen.work
    n_context = sizes.n_slots * padded(work.n_each)
    arguments = ["-t", str(bench.n_threads), "-c", str(n_context), "-np", str(sizes.n_slots)]
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(n_context, sizes.n_slots, chosen.unified))
        servers = {
            f"llama-server {flag}": stack.enter_context(
                serving(bench.llama_cpp, bench.path, [*arguments, flag])
            )
            for flag in ("-no-kvu", "-kvu")
        }
        figures, failed = _serve(bench, work, _prompts(bench, work), ours, servers, sizes.n_clients)
    fastest = max(servers, key=lambda server: sorted(figures[server])[len(figures[server]) // 2])
    return [
        compare(
            title,
            figures,
            bench.kind,
            server,
            bar=chosen.bar if server == fastest else None,
            note=f"{sizes.n_slots} slots, ours: {_UNIFIED[chosen.unified]}{_failures(failed[server])}",
        )
        for server in servers
    ]


def own_defaults(bench: Bench, name: str) -> list[Row]:
    """What `--parallel auto` chooses against llama-server as it starts by itself."""
    if bench.llama_cpp is None:
        say("  skipped: it needs --llama-cpp")
        return []
    chosen, title = _scaled(bench, name)
    work = chosen.work
    server_name = "llama-server, defaults"
    prompts = _prompts(bench, work)
    workload, prompt_ratio = as_batch(prompts[-1], work.n_new)
    options = parallel.choose_parallel(replace(bench.options, prompt_ratio=prompt_ratio), workload)
    with (
        Ours(options, bench.vocabulary.ends, bench.kind) as ours,
        serving(bench.llama_cpp, bench.path, []) as server,
    ):
        n_clients = max(bench.sizes.n_clients, 2 * options.n_parallel)
        figures, failed = _serve(bench, work, prompts, ours, {server_name: server}, n_clients)
    mode = _UNIFIED[bool(options.unified)]
    note = f"auto: {options.n_parallel} at once, {mode}{_failures(failed[server_name])}"
    return [compare(f"{title}, auto", figures, bench.kind, server_name, bar=_BAR_OF_DEFAULTS, note=note)]


def _prompts(bench: Bench, work: Workload) -> list[list[Ids]]:
    """The prompts of every round."""
    prompts = [bench.corpus.prompts(work, seed) for seed in range(bench.sizes.rounds + 1)]
    # A whole warm-up would take as long as a round that counts.
    prompts[WARM_UP] = prompts[WARM_UP][:2]
    return prompts


def _serve(
    bench: Bench,
    work: Workload,
    prompts: list[list[Ids]],
    ours: Ours,
    servers: dict[str, Server],
    n_clients: int,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Everybody's throughput, and how many requests each server failed."""
    failed = dict.fromkeys(servers, 0)

    def ask(name: str, at: int) -> float:
        rate = servers[name].throughput(prompts[at], work.n_new, n_clients)
        failed[name] += servers[name].n_failed
        return rate

    contenders = {bench.kind: lambda at: ours.throughput(prompts[at], work.n_new, n_clients)}
    contenders |= {name: partial(ask, name) for name in servers}
    return in_turn(contenders, bench.sizes.rounds), failed


def _failures(count: int) -> str:
    return f"; it failed {count} requests" if count else ""


@dataclass(frozen=True, slots=True)
class _FollowUp:
    """A conversation whose first turn is done: what the second asks, and how many of its ids were read."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    n_read: int


def second_turn(bench: Bench) -> list[Row]:
    """The first token of a follow-up, against a bare loop that reads just the new tokens behind the rest."""
    n_words, n_reply = (40, 8) if bench.sizes == QUICK else (400, 48)
    cached: list[int] = []

    @cache
    def first_turn(at: int) -> _FollowUp:
        question = Message("user", sentences(n_words, at))
        answer = ours.reply((question,), n_reply)
        said = Message("assistant", "".join(answer.pieces), tuple(answer.token_ids))
        messages = (question, said, Message("user", sentences(n_words // 10, 1000 + at)))
        # The reply's last token was chosen but never read.
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

    with bench.ours(2048) as ours, Bare(bench.path, n_context=2048, n_threads=bench.n_threads) as bare:
        figures = in_turn({bench.kind: ours_turn, "bare loop": bare_turn}, bench.sizes.rounds, "bare loop")
        last = first_turn(bench.sizes.rounds)
    note = f"{len(last.ids) - last.n_read} new tokens behind {last.n_read}; {cached[-1]} were cached"
    name = "second turn, time to first token"
    # What a tenth allows for: the template, tokenizing, and the way to the caller.
    return [compare(name, figures, bench.kind, "bare loop", bar=Bar(1.1, at_most=True), unit="ms", note=note)]


def memory(bench: Bench) -> list[Row]:
    """Peak of our process tree above what the same model, context and work need in C functions alone."""
    rows = []
    for n_parallel in (1, bench.sizes.width):
        sizes = (2048 if n_parallel == 1 else n_parallel * 512, n_parallel, bench.n_threads)
        ours = peak_of("ours", bench.path, *sizes).peak
        bare = peak_of("bare", bench.path, *sizes)
        theirs = bare.peak - bare.before
        rows.append(
            Row(
                f"memory, {n_parallel} at once",
                ours / MEGABYTE,
                "llama.cpp's own",
                theirs / MEGABYTE,
                (ours - theirs) / MEGABYTE,
                "MB",
                Bar(150, at_most=True),
                is_difference=True,
            )
        )
        say(f"  {n_parallel} at once: ours {ours / MEGABYTE:.0f} MB, llama.cpp {theirs / MEGABYTE:.0f} MB")
    return rows


MEASURES: dict[str, Measurement] = {
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
