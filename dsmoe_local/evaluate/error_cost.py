"""Measures the cost of quantization errors: the KL divergence if only one group of tensors is quantized.

The divergence divided by the group's relative error is the weight of the group in a sensitivity file, which
`dsmoe-quantize --target-*` needs to predict errors (`dsmoe_quantize.budget`). Every result is saved in that
file at once, so an interrupted run can continue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import InterruptedRunError, UsageError, file_errors
from dsmoe_local.base.progress import Event, Listener, Note, Started, ignore
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.evaluate.error_cost_groups import GroupCost, Trial, cost_of, trials_of
from dsmoe_local.evaluate.probe_file import ProbeFile, changed_by, size_of
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import Windows, cut_windows
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.split_name import model_stem
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.sensitivity import Probe, Probes, Sensitivity, measure
from dsmoe_quantize.imatrix import Imatrix

Load: TypeAlias = Callable[
    [Path, int, tuple[ObserverOptions, ...], Listener, threading.Event], AbstractContextManager[TextEngine]
]
"""Load the model in a file, to read windows of the given number of tokens with the given observers."""


@dataclass(frozen=True, slots=True)
class CostOptions:
    """What to measure, and the sensitivity file to save it in.

    The text is read in windows of `n_context` tokens, the first `n_windows` of them (None: all). Each group
    is quantized to each of `types`. A group is one kind of tensor in all layers, or in one layer if
    `by_layer`. `threads` is the number of threads that quantize (0: one per core).
    """

    path: Path
    text: Text
    n_context: int
    n_windows: int | None
    types: tuple[GgmlType, ...]
    by_layer: bool = False
    threads: int = 0


@dataclass(frozen=True, slots=True)
class ErrorCosts:
    """The results of all groups. `path` is the sensitivity file."""

    model: str
    probes: Probes
    groups: Sequence[GroupCost]
    path: Path


def measure_costs(
    file: GgufFile,
    hp: Hyperparameters,
    wanted: CostOptions,
    load: Load,
    imatrix: Imatrix | None = None,
    *,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> ErrorCosts:
    """Measure all groups that are not in the sensitivity file yet, and return the results of all groups.

    Raises UsageError if the file has measurements with other options, LockedError if another run is writing
    it, InterruptedRunError, and the errors of measuring, quantizing and the engine.
    """
    stop = stop or threading.Event()
    with ExitStack() as stack:
        with file_errors("the sensitivity file cannot be written", wanted.path):
            stack.enter_context(locked(wanted.path))
        known = _measured_errors(file, wanted, imatrix, listen, stop)
        trials = trials_of(file, hp, known, wanted.types, imatrix, by_layer=wanted.by_layer)
        run = _Run(file, wanted, load, known, listen, stop)
        run.measure(trials)
    probes = run.known.probes
    assert probes is not None
    return ErrorCosts(
        model_stem(file.path), probes, [cost_of(trial, probes) for trial in trials], wanted.path
    )


def _measured_errors(
    file: GgufFile, wanted: CostOptions, imatrix: Imatrix | None, listen: Listener, stop: threading.Event
) -> Sensitivity:
    """Return the content of the sensitivity file, with the errors of all tensors in all types."""
    new = sensitivity_file.start(file, imatrix, None)
    known = sensitivity_file.resume(wanted.path, new, any_sample=True)
    if known.probes is not None:
        _refuse_others(known.probes, wanted)
    keeper = sensitivity_file.Keeper(wanted.path)
    try:
        known = measure(
            file, known, imatrix, threads=wanted.threads, keep=keeper.keep, listen=listen, stop=stop
        )
        keeper.keep(known)
    finally:
        keeper.close()
    return known


def _refuse_others(known: Probes, wanted: CostOptions) -> None:
    """Raise UsageError if the file's measurements cannot be compared with the wanted ones."""

    def names(types: Sequence[GgmlType]) -> str:
        return ", ".join(sorted(kind.name for kind in types))

    for what, had, want in (
        (f"another text, {known.text}", known.text_digest, wanted.text.digest),
        (f"windows of {known.n_context} tokens", known.n_context, wanted.n_context),
        (f"other types, {names(known.types)}", names(known.types), names(wanted.types)),
    ):
        if had != want:
            raise _refusal(wanted.path, what)
    n_windows = _n_windows(wanted, known.n_windows_of_text)
    if n_windows not in (None, known.n_windows):
        raise _refusal(wanted.path, f"{known.n_windows} windows, not {n_windows}")


def _n_windows(wanted: CostOptions, of_text: int) -> int | None:
    """Return the number of windows to read. `of_text` is the number in the text, or 0; None if unknown."""
    if not of_text or wanted.n_windows is None:
        return wanted.n_windows or of_text or None
    return min(wanted.n_windows, of_text)


def _refusal(path: Path, what: str) -> UsageError:
    return UsageError(
        f"the costs in this file were measured with {what}",
        where=path,
        remedy="use the same options, or name another file",
    )


class _Run:
    """Loads one model after another: the source for the reference and the noise, then a probe per trial."""

    def __init__(
        self,
        file: GgufFile,
        wanted: CostOptions,
        load: Load,
        known: Sensitivity,
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        self.known = known
        self._file = file
        self._wanted = wanted
        self._load = load
        self._listen = listen
        self._stop = stop
        self._noted: set[str] = set()

    def measure(self, trials: Sequence[Trial]) -> None:
        """Measure each trial that is not known yet, and save its result."""
        found = self.known.probes.groups if self.known.probes else {}
        every = [(trial, kind) for trial in trials for kind in trial.plans]
        missing = [(trial, kind) for trial, kind in every if kind not in found.get(trial.group, {})]
        if not missing and self.known.probes is not None:
            return
        groups = {(trial.group, kind): changed_by(trial.plans[kind]) for trial, kind in missing}
        # Sort by size, so that as little as possible of the probe file is rewritten.
        missing.sort(key=lambda each: size_of(self._file, groups[each[0].group, each[1]]))
        in_turn = [groups[trial.group, kind] for trial, kind in missing]
        with scratch_folder("eval") as folder:
            n_done = len(every) - len(missing)
            try:
                reference, n_windows_of_text = self._record(folder)
                self._begin(reference, n_windows_of_text)
                with ProbeFile(
                    folder / "probe.gguf", self._file, in_turn, self._wanted.threads
                ) as probe_file:
                    for trial, kind in missing:
                        label = f"{n_done + 1}/{len(every)} {trial.group} {kind.name}"
                        self._try(trial, kind, reference, probe_file, label)
                        n_done += 1
            except InterruptedRunError as error:
                raise InterruptedRunError(
                    f"interrupted: {n_done} of {len(every)} measurements done",
                    remedy="run the same command again to continue",
                ) from error

    def _record(self, folder: Path) -> tuple[Reference, int]:
        """Record the reference. Return it, and the number of windows of the whole text."""
        path = self._file.path
        with self._loaded(path, recorders(folder, path), "reference") as (engine, listen):
            whole = cut_windows(engine, self._wanted.text, self._wanted.n_context)
            windows = self._first(whole)
            reference = record(engine, windows, folder, listen, self._stop)[0]
        # Only predictions are compared.
        return replace(reference, routers=None), len(whole.tokens)

    def _first(self, whole: Windows) -> Windows:
        """Return the windows to read. Raises UsageError if the file's measurements used another number."""
        windows = replace(whole, tokens=whole.tokens[: self._wanted.n_windows])
        probes = self.known.probes
        if probes is not None and probes.n_windows != len(windows.tokens):
            raise _refusal(self._wanted.path, f"{probes.n_windows} windows, not {len(windows.tokens)}")
        return windows

    def _begin(self, reference: Reference, n_windows_of_text: int) -> None:
        """In the first run, measure the noise: the divergence of the source from itself."""
        if self.known.probes is not None:
            return
        windows = reference.windows
        floor = self._divergence(self._file.path, reference, "noise")[0]
        self._keep(
            Probes(
                windows.text,
                windows.text_digest,
                windows.n_context,
                len(windows.tokens),
                self._wanted.types,
                floor,
                n_windows_of_text=n_windows_of_text,
            ),
            {},
        )

    def _try(
        self, trial: Trial, kind: GgmlType, reference: Reference, probe_file: ProbeFile, label: str
    ) -> None:
        # The previous engine is closed, so the file is not mapped while it is written.
        probe_file.write(trial.plans[kind], self._labelled(label), self._stop)
        kl, kl_error = self._divergence(probe_file.path, reference, label)
        probes = self.known.probes
        assert probes is not None
        probe = Probe(trial.errors[kind], kl, kl_error)
        of_group = {**probes.groups.get(trial.group, {}), kind: probe}
        probes = replace(probes, groups={**probes.groups, trial.group: of_group})
        cost = cost_of(trial, probes).cost
        self._keep(probes, {} if cost is None else {trial.group: cost})

    def _divergence(self, path: Path, reference: Reference, label: str) -> tuple[float, float]:
        """Return the mean divergence and its standard error."""
        with self._loaded(path, reference.observers(path), label) as (engine, listen):
            found = compare(engine, reference, listen, self._stop).comparison
        assert found is not None
        return found.divergence.kl.value, found.divergence.kl.error

    def _keep(self, probes: Probes, weights: Mapping[str, float]) -> None:
        self.known = replace(self.known, probes=probes, weights={**self.known.weights, **weights})
        sensitivity_file.write_sensitivity(self.known, self._wanted.path)

    @contextmanager
    def _loaded(
        self, path: Path, observers: tuple[ObserverOptions, ...], label: str
    ) -> Iterator[tuple[TextEngine, Listener]]:
        listen = self._labelled(label)
        with self._load(path, self._wanted.n_context, observers, listen, self._stop) as engine:
            yield engine, listen

    def _labelled(self, label: str) -> Listener:
        """Return a listener that names all stages `label`, and drops repeated notes."""

        def relabelled(event: Event) -> None:
            if isinstance(event, Note):
                if event.text in self._noted:
                    return
                self._noted.add(event.text)
            self._listen(replace(event, stage=label) if isinstance(event, Started) else event)

        return relabelled
