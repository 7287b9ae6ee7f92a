"""Calls the observers of a loaded model: one graph callback, and two calls per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.observer import NodeCallback, Observer, Scored, StepLogits
from dsmoe_local.engine.observe.registry import check_observers, make_observer
from dsmoe_local.engine.types import Observation, ObserverOptions
from dsmoe_local.model.hyperparameters import ModelOutline


class Dispatcher:
    """The observers of a loaded model. Only the engine's thread uses it.

    `eval_callback` is an option of the context, which it must outlive. It is None if no observer reads the
    graph. `reads_logits` is true if an observer needs the logits of all scored prompt tokens.
    """

    def __init__(
        self,
        options: Sequence[ObserverOptions],
        model: Model,
        outline: ModelOutline,
        *,
        own: Sequence[Observer] = (),
    ) -> None:
        """Create the observers. `own` are observers of the engine itself, without name and summary.

        Raises UsageError for an unknown observer or parameter, or one that the model does not support;
        FileError and FormatError for an observer's file. `own` are then closed too.
        """
        self._model = model
        self._outline = outline
        self._observers: dict[str, Observer] = {}
        self._own = own
        self._all: list[Observer] = []
        self._nodes: Mapping[bytes, NodeCallback] = {}
        self._weights: Mapping[bytes, NodeCallback] = {}
        self._keys: frozenset[int] | None = None
        self._failure: BaseException | None = None
        self.eval_callback: Any = None
        try:
            check_observers(options)
            for option in options:
                self._observers[option.name] = make_observer(option, model, outline)
            self._add_own(own)
        except BaseException:
            self.close()
            raise
        self.reads_logits = any(observer.reads_logits for observer in self._all)

    def _add_own(self, own: Sequence[Observer]) -> None:
        self._own = own
        self._all = [*own, *self._observers.values()]
        if self.eval_callback is None and any(observer.reads_graph for observer in self._all):
            tensors.check_layout()
            self.eval_callback = tensors.eval_callback(self._visit)

    def successor(self, options: Sequence[ObserverOptions]) -> Dispatcher:
        """Return a dispatcher with new observers and the engine's own ones. Call `retire` on this one next.

        Raises the errors of the constructor; this dispatcher then stays in use.
        """
        successor = Dispatcher(options, self._model, self._outline)
        try:
            successor._add_own(self._own)
        except BaseException:
            successor.retire()
            raise
        return successor

    def retire(self) -> None:
        """Close all observers except the engine's own, which now belong to the successor."""
        self._own = ()
        self.close()

    def before_step(self, rows: Sequence[Row]) -> None:
        """Call the observers before a decode. If it fails or is aborted, `after_step` is not called."""
        # An error in an aborted step does not concern the requests of this one.
        self._failure = None
        observers = self._all
        for observer in observers:
            observer.before_step(rows)
        self._weights = _merged([observer.weights for observer in observers if observer.weights])
        nodes = _merged([observer.nodes for observer in observers if observer.nodes])
        if nodes is not self._nodes:
            self._nodes = nodes
            self._keys = _keys_of(nodes)

    def after_step(
        self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None] = ()
    ) -> None:
        """Call the observers after a complete decode. `scored` has an entry per row, or is empty.

        Raises the first exception that a graph callback raised during the step.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        for observer in self._all:
            observer.after_step(rows, logits, scored)

    def summary(self, name: str) -> Observation:
        """Return the summary of an observer. Raises EngineError if there is none with that name."""
        observer = self._observers.get(name)
        if observer is None:
            raise EngineError(f"no observer {name!r} was loaded", remedy="load the model with it")
        return observer.summary()

    def close(self) -> None:
        """Close all observers, even if one of them raises. May be called twice."""
        with ExitStack() as last_to_first:
            for observer in (*self._own, *self._observers.values()):
                last_to_first.callback(observer.close)

    def _visit(self, tensor: int, ask: bool, _: object) -> bool:
        """Call the callbacks of a graph node (see `tensors.eval_callback`).

        Returns whether to stop after the node if `ask`, otherwise whether to continue.
        """
        try:
            if self._keys is not None and not self._weights and tensors.key_of(tensor) not in self._keys:
                return not ask
            of_name = self._nodes.get(tensors.name_of(tensor))
            of_weight = self._callback_of_weight(tensor) if self._weights else None
            if ask:
                return of_name is not None or of_weight is not None
            for callback in (of_name, of_weight):
                if callback is not None:
                    callback(tensor)
        except BaseException as error:  # noqa: BLE001 - cannot pass through ctypes; raised after the step
            self._failure = self._failure or error
            self._nodes = self._weights = {}
            # Before a node, False means not to stop after it. After a node, True continues the graph.
            return not ask
        return True

    def _callback_of_weight(self, tensor: int) -> NodeCallback | None:
        weight = tensors.source_of(tensor, 0)
        return self._weights.get(tensors.weight_name_of(weight)) if weight else None


def _keys_of(nodes: Mapping[bytes, NodeCallback]) -> frozenset[int] | None:
    """Return the keys of all names; None if a name is too short for a key."""
    keys = [tensors.key_of_name(name) for name in nodes]
    return frozenset(key for key in keys if key is not None) if None not in keys else None


def _merged(tables: Sequence[Mapping[bytes, NodeCallback]]) -> Mapping[bytes, NodeCallback]:
    """Merge the tables of several observers."""
    if len(tables) <= 1:
        return tables[0] if tables else {}
    merged = dict(tables[0])
    for table in tables[1:]:
        for name, callback in table.items():
            merged[name] = _both(merged[name], callback) if name in merged else callback
    return merged


def _both(first: NodeCallback, second: NodeCallback) -> NodeCallback:
    def both(tensor: int) -> None:
        first(tensor)
        second(tensor)

    return both
