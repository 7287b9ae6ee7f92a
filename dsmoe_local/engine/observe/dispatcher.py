"""The observers of a loaded model, behind one graph callback and two calls a step. Sums up nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.observer import Logits, Observer, Scored, Watch
from dsmoe_local.engine.observe.registry import check_observers, make_observer
from dsmoe_local.engine.types import Observation, ObserverOptions
from dsmoe_local.model.hyperparameters import Hyperparameters


class Dispatcher:
    """Owned by the engine's thread.

    `eval_callback` belongs into the context's options (None: nobody wants the graph), and must outlive the
    context. `reads_logits`: somebody wants the logits of scored prompt tokens, so rows have many outputs.
    """

    def __init__(
        self,
        options: Sequence[ObserverOptions],
        model: Model,
        hp: Hyperparameters,
        *,
        own: Sequence[Observer] = (),
    ) -> None:
        """`own` are the engine's, without a name and a summary; they are closed with the others.

        Raises UsageError (an unknown observer or parameter, or one that the model cannot have),
        FileError, FormatError.
        """
        self._model = model
        self._hp = hp
        self._observers: dict[str, Observer] = {}
        self._own = own
        self._all: list[Observer] = []
        self._nodes: Mapping[bytes, Watch] = {}
        self._weights: Mapping[bytes, Watch] = {}
        self._keys: frozenset[int] | None = None
        self._failure: BaseException | None = None
        self.eval_callback: Any = None
        try:
            check_observers(options)
            for option in options:
                self._observers[option.name] = make_observer(option, model, hp)
            self._take_in(own)
        except BaseException:
            self.close()
            raise
        self.reads_logits = any(observer.reads_logits for observer in self._all)

    def _take_in(self, own: Sequence[Observer]) -> None:
        self._own = own
        self._all = [*own, *self._observers.values()]
        if self.eval_callback is None and any(observer.reads_graph for observer in self._all):
            tensors.check_layout()
            self.eval_callback = tensors.eval_callback(self._visit)

    def successor(self, options: Sequence[ObserverOptions]) -> Dispatcher:
        """Another one, with these observers and the engine's own, to be followed by `retire`. Raises as at
        loading; this one then goes on.
        """
        successor = Dispatcher(options, self._model, self._hp)
        try:
            successor._take_in(self._own)
        except BaseException:
            successor.retire()
            raise
        return successor

    def retire(self) -> None:
        """Release the observers' files, but for the engine's own observers, which another one has now."""
        self._own = ()
        self.close()

    def before_step(self, rows: Sequence[Row]) -> None:
        """Call before each decode. A step that no `after_step` follows (it was aborted, or found no room) is
        not counted.
        """
        # Of a step that nobody asked about: this one's requests have no part in it.
        self._failure = None
        observers = self._all
        for observer in observers:
            observer.before_step(rows)
        self._weights = _merged([observer.weights for observer in observers if observer.weights])
        nodes = _merged([observer.nodes for observer in observers if observer.nodes])
        if nodes is not self._nodes:
            self._nodes = nodes
            self._keys = _keys_of(nodes)

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None] = ()) -> None:
        """Call after each complete decode with its logits, shape (n_outputs, n_vocab), in the order of rows.

        `scored` says for each row which tokens its outputs should have predicted; left out: none. Raises what
        an observer raised in the middle of the step.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        for observer in self._all:
            observer.after_step(rows, logits, scored)

    def summary(self, name: str) -> Observation:
        """What the observer of that name has seen. EngineError if there is none."""
        observer = self._observers.get(name)
        if observer is None:
            raise EngineError(f"no observer {name!r} was loaded")
        return observer.summary()

    def close(self) -> None:
        """Release the observers' files, all of them whatever one raises. Closing twice is fine."""
        with ExitStack() as last_to_first:
            for observer in (*self._own, *self._observers.values()):
                last_to_first.callback(observer.close)

    def _visit(self, tensor: int, ask: bool, _: object) -> bool:
        """The graph callback: for each node before it is computed, and for those that are wanted after it."""
        try:
            if self._keys is not None and not self._weights and tensors.key_of(tensor) not in self._keys:
                return not ask
            of_name = self._nodes.get(tensors.name_of(tensor))
            of_weight = self._watch_of_weight(tensor) if self._weights else None
            if ask:
                return of_name is not None or of_weight is not None
            for watch in (of_name, of_weight):
                if watch is not None:
                    watch(tensor)
        except BaseException as error:  # noqa: BLE001 - raised again after the step: it cannot leave ctypes
            self._failure = self._failure or error
            self._nodes = self._weights = {}
            # True would ask for one more stop; False at a stop would end the graph.
            return not ask
        return True

    def _watch_of_weight(self, tensor: int) -> Watch | None:
        weight = tensors.source_of(tensor, 0)
        return self._weights.get(tensors.weight_name_of(weight)) if weight else None


def _keys_of(nodes: Mapping[bytes, Watch]) -> frozenset[int] | None:
    """The keys of all names; None if one of them has none."""
    keys = [tensors.key_of_name(name) for name in nodes]
    return frozenset(key for key in keys if key is not None) if None not in keys else None


def _merged(tables: Sequence[Mapping[bytes, Watch]]) -> Mapping[bytes, Watch]:
    """One table of what several observers want; most often there is one."""
    if len(tables) <= 1:
        return tables[0] if tables else {}
    merged = dict(tables[0])
    for table in tables[1:]:
        for name, watch in table.items():
            merged[name] = _both(merged[name], watch) if name in merged else watch
    return merged


def _both(first: Watch, second: Watch) -> Watch:
    def watch(tensor: int) -> None:
        first(tensor)
        second(tensor)

    return watch
