"""Runs a template that came with a model where it cannot reach Python. Limits no memory and no time.

That is its process's concern (`render_host`). Provides the helpers that templates on the Hugging Face hub
expect, and renders beginnings of one conversation without rendering each of them anew (`Checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, TypeAlias, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, find_undeclared
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dsmoe_local.engine.prompts.failures import template_error

MAX_OUTPUT = 64 << 20
_WHOLE = 1 << 62
_STATEFUL = frozenset({"cycler", "joiner"})

T = TypeVar("T")
Values: TypeAlias = Sequence[Mapping[str, str]]
"""Messages as templates see them: role and content."""


class _Refused(jinja2.TemplateRuntimeError):
    """The template's own raise_exception, or an output that is too long."""


@dataclass(frozen=True, slots=True)
class Entry:
    """All that a loop, and what comes after it, can know of what came before it: namespaces and variables."""

    spaces: tuple[str, ...]
    variables: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a rendering can go on with more messages: at the beginning of the body of a loop over them.

    `index` is the message that the loop has come to, `position` the length of the output before it, and
    `loop` says which one it is. `spaces` and `changed` are what its earlier iterations leave behind.
    """

    index: int
    position: int
    loop: int
    entry: Entry
    spaces: tuple[dict[str, Any], ...]
    changed: object


@dataclass(frozen=True, slots=True)
class Rendered:
    """An output, from the checkpoint on where there was one; and a checkpoint at the last message, None if
    the loop may have acted on there being no more messages. `before` is the output before the loop.
    """

    text: str
    before: str
    checkpoint: Checkpoint | None


class SandboxedTemplate:
    """A compiled template."""

    def __init__(self, text: str, source: str) -> None:
        """Raises TemplateError if `text` is no template."""
        self._source = source
        self._texts: Mapping[str, str] = {}
        self._environment = _Environment()
        self._template = self._checked(lambda: self._environment.from_string(text))

    def begin_conversation(self, texts: Mapping[str, str]) -> None:
        """Bind the texts of the special tokens. All that follows is rendered at this time, as if at once."""
        self._texts = texts
        self._environment.now = datetime.now()

    def render(self, messages: Values, *, generate: bool = True) -> str:
        """The output. Raises TemplateError if the template refuses or fails."""
        return self._checked(lambda: self._output(list(messages), _Run(()), generate))

    def begin(self, messages: Values, after: Checkpoint | None = None) -> Rendered:
        """The output for `messages`, from the checkpoint `after` of a rendering of fewer of them on.

        Raises TemplateError, also where `render` would not: templates get something that is almost a list.
        """
        run = _Run(messages, after)
        text = self._checked(lambda: self._output(_Turns(run, 0), run, True))
        if after is not None and not run.resumed:
            raise template_error(self._source, "it does not come to the same loop again")
        return Rendered(text, run.before, run.checkpoint)

    def _output(self, messages: object, run: _Run, generate: bool) -> str:
        self._environment.run = run
        room = MAX_OUTPUT
        variables = {**self._texts, "messages": messages, "add_generation_prompt": generate}
        for piece in self._template.generate(variables):
            room -= len(piece)
            if room < 0:
                raise _Refused("its output is too long")
            run.pieces.append(piece)
        return "".join(run.pieces)

    def _checked(self, work: Callable[[], T]) -> T:
        cause: Exception | None = None
        try:
            return work()
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
        except (RecursionError, MemoryError) as error:
            cause, reason = error, f"it is too deep or too large ({type(error).__name__})"
        except Exception as error:  # noqa: BLE001 - filters and Python's compiler raise whatever they like
            reason = str(error) or type(error).__name__
        raise template_error(self._source, reason) from cause


class _Run:
    """One rendering: what it has written, and how many messages its marked loop knows to be there."""

    def __init__(self, messages: Values, after: Checkpoint | None = None) -> None:
        self.items = list(messages)
        self.pieces: list[str] = []
        self.before = ""
        self.n_known = 0
        self.namespaces: list[Namespace] = []
        self.checkpoint: Checkpoint | None = None
        self.resumed = False
        self._after = after
        # Of the marked loop that runs, if it is one over messages.
        self._loop = -1
        self._walk = _Walk(self, 0)
        self._first = 0
        self._entry: Entry | None = None

    def know(self, count: int) -> None:
        """The template has learned whether there are that many messages."""
        self.n_known = max(self.n_known, count)

    def enter_loop(self, number: int, turns: _Turns | None, context: Context) -> _Walk:
        """Begin, or resume, the marked loop of that number. `turns` None: it is not over messages."""
        self._loop = number if turns is not None else -1
        self._first = turns.start if turns is not None else 0
        self._walk = _Walk(self, self._after.index if self._resumes and self._after else self._first)
        # Of another loop than it went on in, what came before is not known.
        self._entry = None if self.resumed else self._state(context)
        if not self.resumed:
            self.before = "".join(self.pieces)
        if self._after is not None and self._resumes and self._entry != self._after.entry:
            raise _Refused("more messages make a difference before the loop")
        self.n_known = 0
        return self._walk

    def _state(self, context: Context) -> Entry | None:
        """None if it may change, or cannot be compared."""
        spaces = [_attributes(space) for space in self.namespaces]
        if not all(map(_is_plain, spaces)):
            return None
        variables: list[tuple[str, object]] = []
        for name, value in context.vars.items():
            if isinstance(value, _Turns):
                variables.append((name, value.start))
            elif isinstance(value, Namespace):
                variables.append((name, [space is value for space in self.namespaces]))
            elif _is_plain(value):
                variables.append((name, repr(value)))
            elif isinstance(value, Macro):
                variables.append((name, None))
            else:
                return None
        return Entry(tuple(map(repr, spaces)), tuple(variables))

    @property
    def _resumes(self) -> bool:
        """Whether the loop that runs is the one to go on with."""
        return self._after is not None and self._after.loop == self._loop and not self.resumed

    def begin_turn(self, loop: LoopContext | None) -> None:
        """An iteration of a marked loop begins."""
        if self._loop < 0:
            return
        if self._after is not None and self._resumes:
            self._resume(self._after, loop)
        index = self._walk.position - 1
        if index < len(self.items) - 1 or self.n_known > len(self.items) or self._entry is None:
            return
        spaces = tuple(dict(_attributes(space)) for space in self.namespaces[: len(self._entry.spaces)])
        if all(map(_is_plain, spaces)):
            changed = None if loop is None else loop._last_changed_value
            position = sum(map(len, self.pieces))
            self.checkpoint = Checkpoint(index, position, self._loop, self._entry, spaces, changed)

    def _resume(self, after: Checkpoint, loop: LoopContext | None) -> None:
        self.resumed = True
        self.pieces.clear()
        for space, values in zip(self.namespaces, after.spaces, strict=True):
            _attributes(space).clear()
            _attributes(space).update(values)
        if loop is not None:
            loop.index0 = after.index - self._first
            loop._last_changed_value = after.changed
            if loop.index0 > 0:
                loop._before = self.items[after.index - 1]


class _Walk(Iterator[Any]):
    """Goes through the messages; `position` is the next one's index."""

    def __init__(self, run: _Run, position: int) -> None:
        self._run = run
        self.position = position

    def __next__(self) -> Any:  # noqa: ANN401 - a message
        self._run.know(self.position + 1)
        if self.position >= len(self._run.items):
            raise StopIteration
        self.position += 1
        return self._run.items[self.position - 1]


class _Turns(Sequence[Any]):
    """The messages from `start` on. Tells its run what the template learns of them."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, run: _Run, start: int) -> None:
        self._run = run
        self.start = start

    def whole(self) -> list[Any]:
        """As a list, whose end the template then may see."""
        self._run.know(_WHOLE)
        return self._run.items[self.start :]

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as Sequence's
        if isinstance(index, slice):
            if (index.start or 0) >= 0 and index.stop is None and index.step is None:
                return _Turns(self._run, self.start + (index.start or 0))
        elif index >= 0:
            self._run.know(self.start + index + 1)
            return self._run.items[self.start + index]
        return self.whole()[index]

    def __iter__(self) -> _Walk:
        return _Walk(self._run, self.start)

    def __len__(self) -> int:
        return len(self.whole())

    def __bool__(self) -> bool:
        self._run.know(self.start + 1)
        return len(self._run.items) > self.start

    def __eq__(self, other: object) -> bool:
        return self.whole() == (other.whole() if isinstance(other, _Turns) else other)

    def __repr__(self) -> str:
        return repr(self.whole())


_SCALARS = (str, int, float, type(None), jinja2.Undefined)
_DEEPEST = 4


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether nothing that a template does can change `value`, and it knows of no run."""
    if isinstance(value, dict) and depth < _DEEPEST:
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return all(_is_plain(item, depth + 1) for item in value)
    return isinstance(value, _SCALARS)


def _attributes(space: Namespace) -> dict[str, Any]:
    attributes: dict[str, Any] = space._Namespace__attrs
    return attributes


class _Generator(CodeGenerator):
    """jinja2's compiler; what the environment itself wants to know of needs no permission."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:  # noqa: N802
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks replies for training; here its body counts as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of the hub's chat templates, with marked loops: those over messages that may go on."""

    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.run = _Run(())
        self.now = datetime.now()
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
            "namespace": self._namespace,
        }
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - jinja2's
        if not any(name.name in _STATEFUL for name in source.find_all(nodes.Name)):
            for number, loop in enumerate(_outer_loops(source.body)):
                _mark(loop, number)
        return super()._generate(source, *args, **kwargs)

    def enter_loop(self, number: int, value: object, context: Context) -> object:
        """What the marked loop of that number goes through."""
        if isinstance(value, _Turns):
            return self.run.enter_loop(number, value, context)
        self.run.enter_loop(number, None, context)
        return value

    def begin_turn(self, loop: LoopContext | None) -> None:
        """Called at the beginning of each iteration of a marked loop."""
        self.run.begin_turn(loop)

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401 - jinja2's own
        """Methods of the list of messages may look at all of them."""
        seen = obj.whole() if isinstance(obj, _Turns) and isinstance(argument, str) else obj
        return super().getitem(seen, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401 - jinja2's own
        """As `getitem`."""
        return super().getattr(obj.whole() if isinstance(obj, _Turns) else obj, attribute)

    def _strftime_now(self, pattern: str) -> str:
        return self.now.strftime(pattern)

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 - as dict's
        space = Namespace(*args, **kwargs)
        self.run.namespaces.append(space)
        return space


def _outer_loops(body: Sequence[nodes.Node]) -> Iterator[nodes.For]:
    """The loops that nothing but conditions surrounds: whatever they write is output at once."""
    for node in body:
        if isinstance(node, nodes.For) and not (node.test or node.recursive or node.else_):
            yield node
        elif isinstance(node, nodes.If):
            yield from _outer_loops([*node.body, *node.elif_, *node.else_])


def _mark(loop: nodes.For, number: int) -> None:
    """Let the environment know when the loop, and each of its iterations, begins."""
    used = "loop" in find_undeclared(loop.body, ("loop",))
    variable: nodes.Expr = nodes.Name("loop", "load") if used else nodes.Const(None)
    loop.body.insert(0, nodes.ExprStmt(_call("begin_turn", variable), lineno=loop.lineno))
    over: Any = loop.iter
    loop.iter = _call("enter_loop", nodes.Const(number), over, nodes.ContextReference())


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own, without HTML escapes: what the hub's templates expect.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
