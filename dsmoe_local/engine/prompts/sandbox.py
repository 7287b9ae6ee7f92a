"""Runs a template that came with a model where it can do no harm, in little time and little room.

jinja2's immutable sandbox stops a template from reaching Python; the caps here stop it from eating the
machine. Provides the helpers that templates on the Hugging Face hub expect.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import TemplateError

MAX_OUTPUT = 64 << 20
MAX_SECONDS = 5.0
_MAX_NUMBER = 1 << 20  # as an argument: repetitions, widths
_LONG_FORMAT = re.compile(r"\d{5}|%[^a-zA-Z%]*\*")

T = TypeVar("T")


class _Refused(jinja2.TemplateRuntimeError):
    """The template's own raise_exception, or one of our caps."""


class SandboxedTemplate:
    """A compiled template with global values bound."""

    def __init__(self, text: str, source: str, values: Mapping[str, str]) -> None:
        """Raises TemplateError if `text` is no template."""
        self._source = source
        environment = _Environment()
        environment.globals.update(values)
        with_errors = _errors(source)
        self._template = with_errors(lambda: environment.from_string(text))

    def render(self, **variables: object) -> str:
        """The output. Raises TemplateError: the template refuses, fails, or wants too much time or room."""
        return _errors(self._source)(lambda: _within_time(lambda: self._output(variables)))

    def _output(self, variables: Mapping[str, object]) -> str:
        pieces: list[str] = []
        room = MAX_OUTPUT
        for piece in self._template.generate(**variables):
            room -= len(piece)
            if room < 0:
                raise _Refused("its output is too long")
            pieces.append(piece)
        return "".join(pieces)


def _errors(source: str) -> Callable[[Callable[[], T]], T]:
    def run(work: Callable[[], T]) -> T:
        try:
            return work()
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
        except (RecursionError, MemoryError) as error:
            reason = f"it is too deep or too large ({type(error).__name__})"
        except Exception as error:  # noqa: BLE001 - filters and Python's compiler raise whatever they like
            reason = str(error) or type(error).__name__
        raise TemplateError(
            f"the chat template ({source}) fails: {safe_line(reason, 60)}",
            remedy="check the messages, or name another template with --chat-template",
        )

    return run


def _within_time(work: Callable[[], T]) -> T:
    """Run `work`, looking at the clock on each line of Python: single operations are capped below."""
    deadline = time.monotonic() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ANN401 - settrace's own type
        if time.monotonic() > deadline:
            raise _Refused(f"it takes more than {MAX_SECONDS:.0f} seconds")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(previous)


class _Generator(CodeGenerator):
    """jinja2's compiler, with `~` under the cap of `+`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        self.write("environment.joined((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks replies for training; here its body counts as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of the hub's chat templates, with caps on what one operation may make."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        self.filters = {name: _capped(function) for name, function in self.filters.items()}

    def joined(self, values: tuple[object, ...]) -> str:
        """`~` in a template."""
        texts = [str(value) for value in values]
        _require(sum(map(len, texts)) <= MAX_OUTPUT)
        return "".join(texts)

    def call_binop(self, context: object, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Cap the operators that make large values out of small ones."""
        if operator == "%" and isinstance(left, str):
            _require(not _LONG_FORMAT.search(left))
        elif operator == "**":
            _require(isinstance(right, int | float) and abs(right) <= 64 and abs(left) < _MAX_NUMBER)
        else:
            sizes = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
            numbers = [size for size in sizes if isinstance(size, int | float)]
            if any(hasattr(value, "__len__") for value in (left, right)) and len(numbers) == 2:
                _require(
                    (numbers[0] + numbers[1] if operator == "+" else numbers[0] * numbers[1]) <= MAX_OUTPUT
                )
            elif operator == "*":
                _require(all(abs(number) < 1 << 64 for number in numbers))
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, N805
        """Cap the arguments of methods: a width, a count."""
        _check_arguments(getattr(__obj, "__self__", None), getattr(__obj, "__name__", ""), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _capped(function: Callable[..., Any]) -> Callable[..., Any]:
    # wraps keeps the marks by which jinja2 knows what a filter wants to be passed.
    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any filter
        subject = next((value for value in args if isinstance(value, str)), None)
        _check_arguments(subject, function.__name__.removeprefix("do_"), args, kwargs)
        return function(*args, **kwargs)

    return filtered


def _check_arguments(subject: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    values = [*args, *kwargs.values()]
    _require(all(abs(value) <= _MAX_NUMBER for value in values if isinstance(value, int | float)))
    texts = [value for value in values if isinstance(value, str)]
    if name in ("format", "format_map") and isinstance(subject, str):
        _require(not _LONG_FORMAT.search(subject))
    if name in ("replace", "join", "translate", "indent") and isinstance(subject, str):
        # Each character may become the longest text.
        longest = max(map(len, [*texts, ""]))
        matches = subject.count(texts[-2]) if name == "replace" and len(texts) > 1 else len(subject)
        others = [value for value in values if not isinstance(value, str) and hasattr(value, "__len__")]
        _require(len(subject) + max([matches, *map(len, others)]) * longest <= MAX_OUTPUT or longest <= 1)


def _require(small: bool) -> None:
    if not small:
        raise _Refused("it makes too large a value")


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    _require(len(pattern) < 100)
    return datetime.now().strftime(pattern)


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
