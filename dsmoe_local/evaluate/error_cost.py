"""What errors cost: how far the whole model moves when one group of tensors is quantized and nothing else.

The divergence divided by the group's relative error is the group's weight in a sensitivity file, from which
`dsmoe-quantize --target-*` predicts errors (`dsmoe_quantize.budget`). Everything is kept in that file as soon
as it is known, and a run that was killed goes on there. Runs models through `measure`; how one is loaded is
the caller's to say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Event, Listener, Note, Started, ignore
from dsmoe_local.engine.types import ObserverOptions, TextEngine
from dsmoe_local.evaluate.error_cost_groups import GroupCost, Trial, cost_of, trials_of
from dsmoe_local.evaluate.probe_file import ProbeFile, changed_by, size_of
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.scratch import scratch_folder
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import Windows, cut_windows
from dsmoe_local.model.ggml import GgmlType, type_name
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.sensitivity import Probe, Probes, Sensitivity, measure
from dsmoe_quantize.imatrix import Imatrix

Load: TypeAlias = Callable[
    [Path, int, tuple[ObserverOptions, ...], Listener, threading.Event], AbstractContextManager[TextEngine]
]
"""Loads a model to read windows of so many tokens, with these observers."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure: with which text, in windows of `n_context` tokens (the first `n_windows`; None: all),
    in which types, each kind of group as a whole or each layer by itself. `kept_in` is the sensitivity file.
    """

    kept_in: Path
    text: Text
    n_context: int
    n_windows: int | None
    types: tuple[GgmlType, ...]
    by_layer: bool = False
    threads: int = 0


@dataclass(frozen=True, slots=True)
class ErrorCosts:
    """The result: what was tried, on what, and what each group costs."""

    model: str
    probes: Probes
    groups: Sequence[GroupCost]
    kept_in: Path


def measure_costs(
    file: GgufFile,
    hp: Hyperparameters,
    request: Request,
    load: Load,
    imatrix: Imatrix | None = None,
    *,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> ErrorCosts:
    """Measure what is not in the file yet, and return all of it.

    Raises UsageError if the file was measured with something else, LockedError while another run writes it,
    InterruptedRunError, and what measuring, quantizing and the engine raise. What was measured is kept in any
    case.
    """
    stop = stop or threading.Event()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(request.kept_in))
        except OSError as error:
            raise FileError(f"the costs cannot be kept: {error.strerror}", where=request.kept_in) from error
        known = _measured_errors(file, request, imatrix, listen, stop)
        trials = trials_of(file, hp, known, request.types, imatrix, by_layer=request.by_layer)
        run = _Run(file, request, load, known, listen, stop)
        run.measure(trials)
    probes = run.known.probes
    assert probes is not None
    return ErrorCosts(file.path.stem, probes, [cost_of(trial, probes) for trial in trials], request.kept_in)


def _measured_errors(
    file: GgufFile, request: Request, imatrix: Imatrix | None, listen: Listener, stop: threading.Event
) -> Sensitivity:
    """What the file holds, with the errors of all tensors."""
    wanted = sensitivity_file.start(file, imatrix, None)
    known = sensitivity_file.resume(request.kept_in, wanted, any_sample=True)
    if known.probes is not None:
        _refuse_others(known.probes, request)
    keeper = sensitivity_file.Keeper(request.kept_in)
    try:
        known = measure(
            file, known, imatrix, threads=request.threads, keep=keeper.keep, listen=listen, stop=stop
        )
        keeper.keep(known)
    finally:
        keeper.close()
    return known


def _refuse_others(known: Probes, request: Request) -> None:
    """UsageError if a file's figures and those asked for cannot stand beside each other."""

    def names(types: Sequence[GgmlType]) -> str:
        return ", ".join(sorted(map(type_name, types)))

    for what, had, want in (
        (f"another text, {known.text}", known.text_digest, request.text.digest),
        (f"windows of {known.n_context} tokens", known.n_context, request.n_context),
        (f"other types, {names(known.types)}", names(known.types), names(request.types)),
    ):
        if had != want:
            raise _refusal(request.kept_in, what)
    wanted = _n_windows(request, known.n_windows_of_text)
    if wanted not in (None, known.n_windows):
        raise _refusal(request.kept_in, f"{known.n_windows} windows, not {wanted}")


def _n_windows(request: Request, of_text: int) -> int | None:
    """How many windows a request means if the text has so many; 0: nobody knows. None: neither."""
    if not of_text or request.n_windows is None:
        return request.n_windows or of_text or None
    return min(request.n_windows, of_text)


def _refusal(path: Path, what: str) -> UsageError:
    return UsageError(
        f"costs were measured with {what}", where=path, remedy="measure with the same, or name another file"
    )


class _Run:
    """The models of one run, one after the other: the source, the source again, and what is made of it."""

    def __init__(
        self,
        file: GgufFile,
        request: Request,
        load: Load,
        known: Sensitivity,
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        self.known = known
        self._file = file
        self._request = request
        self._load = load
        self._listen = listen
        self._stop = stop
        self._noted: set[str] = set()

    def measure(self, trials: Sequence[Trial]) -> None:
        """Measure each that is not known yet, keeping what is known after each."""
        found = self.known.probes.groups if self.known.probes else {}
        wanted = [(trial, kind) for trial in trials for kind in trial.plans]
        missing = [(trial, kind) for trial, kind in wanted if kind not in found.get(trial.group, {})]
        if not missing and self.known.probes is not None:
            return
        groups = {(trial.group, kind): changed_by(trial.plans[kind]) for trial, kind in missing}
        # In the order in which least is written.
        missing.sort(key=lambda each: size_of(self._file, groups[each[0].group, each[1]]))
        in_turn = [groups[trial.group, kind] for trial, kind in missing]
        with scratch_folder() as folder:
            n_done = len(wanted) - len(missing)
            try:
                reference, n_windows_of_text = self._record(folder)
                self._begin(reference, n_windows_of_text)
                with ProbeFile(
                    folder / "probe.gguf", self._file, in_turn, self._request.threads
                ) as probe_file:
                    for trial, kind in missing:
                        label = f"{n_done + 1}/{len(wanted)} {trial.group} {type_name(kind)}"
                        self._try(trial, kind, reference, probe_file, label)
                        n_done += 1
            except InterruptedRunError as error:
                raise InterruptedRunError(
                    f"interrupted: {n_done} of {len(wanted)} measurements done",
                    remedy="run the same command again to continue",
                ) from error

    def _record(self, folder: Path) -> tuple[Reference, int]:
        """The reference, and how many windows the whole text has."""
        path = self._file.path
        with self._loaded(path, recorders(folder, path), "reference") as (engine, listen):
            whole = cut_windows(engine, self._request.text, self._request.n_context)
            windows = self._first(whole)
            reference = record(engine, windows, folder, listen, self._stop)[0]
        # Only predictions are compared.
        return replace(reference, routers=None), len(whole.tokens)

    def _first(self, whole: Windows) -> Windows:
        """Those asked for. UsageError if others were measured."""
        windows = replace(whole, tokens=whole.tokens[: self._request.n_windows])
        probes = self.known.probes
        if probes is not None and probes.n_windows != len(windows.tokens):
            raise _refusal(self._request.kept_in, f"{probes.n_windows} windows, not {len(windows.tokens)}")
        return windows

    def _begin(self, reference: Reference, n_windows_of_text: int) -> None:
        """Find the noise, if this is the first run."""
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
                self._request.types,
                floor,
                n_windows_of_text=n_windows_of_text,
            ),
            {},
        )

    def _try(
        self, trial: Trial, kind: GgmlType, reference: Reference, probe_file: ProbeFile, label: str
    ) -> None:
        # The engine of the probe before has ended: nobody maps the file while it is written.
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
        """Mean and standard error."""
        with self._loaded(path, reference.observers(path), label) as (engine, listen):
            found = compare(engine, reference, listen, self._stop).comparison
        assert found is not None
        return found.divergence.kl.value, found.divergence.kl.error

    def _keep(self, probes: Probes, weights: Mapping[str, float]) -> None:
        self.known = replace(self.known, probes=probes, weights={**self.known.weights, **weights})
        sensitivity_file.write_sensitivity(self.known, self._request.kept_in)

    @contextmanager
    def _loaded(
        self, path: Path, observers: tuple[ObserverOptions, ...], label: str
    ) -> Iterator[tuple[TextEngine, Listener]]:
        listen = self._labelled(label)
        with self._load(path, self._request.n_context, observers, listen, self._stop) as engine:
            yield engine, listen

    def _labelled(self, label: str) -> Listener:
        """All stages of one step under its name; of notes that many steps have only the first."""

        def relabelled(event: Event) -> None:
            if isinstance(event, Note):
                if event.text in self._noted:
                    return
                self._noted.add(event.text)
            self._listen(replace(event, stage=label) if isinstance(event, Started) else event)

        return relabelled
