"""Runs a chat template in jinja2's sandbox, with the helpers that templates on the Hugging Face hub expect.

Prefixes of a conversation are rendered incrementally: a rendering can continue from a `Checkpoint` of a
shorter prefix. `render_host` limits the memory, `renderer` the time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, find_undeclared
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dsmoe_local.engine.errors import template_error
from dsmoe_local.engine.prompts.turns import Checkpoint, RefusedError, Rendered, Run, Turns, Values
from dsmoe_local.engine.reasoning import markers_in

MAX_OUTPUT = 64 << 20
_TESTS_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none")
_STATEFUL = frozenset({"cycler", "joiner"})

T = TypeVar("T")


class SandboxedTemplate:
    """A compiled template.

    `null_content`: it tests whether the content of a message is None, as that of a reply with calls alone is.
    """

    def __init__(self, text: str, source: str) -> None:
        """Compile the template. Raises TemplateError if it is not valid."""
        self.markers = markers_in(text)
        self.null_content = bool(_TESTS_NONE.search(text))
        self._source = source
        self._variables: Mapping[str, Any] = {}
        self._environment = _Environment()
        self._template = self._checked(lambda: self._environment.from_string(text))

    def begin_conversation(self, variables: Mapping[str, Any]) -> None:
        """Set the variables of the template, and the time, for all following renderings."""
        self._variables = variables
        self._environment.now = datetime.now()

    def render(self, messages: Values, tools: object = None, *, generate: bool = True) -> str:
        """Return the output. Raises TemplateError if the template refuses the messages or fails."""
        return self._checked(lambda: self._output(list(messages), tools, Run(()), generate))

    def begin(self, messages: Values, tools: object = None, after: Checkpoint | None = None) -> Rendered:
        """Return the output for `messages`; with the checkpoint of a shorter prefix, the output after it.

        The template gets a list-like object instead of a list, so it may fail although `render` does not.
        Raises TemplateError.
        """
        run = Run(messages, after)
        text = self._checked(lambda: self._output(Turns(run, 0), tools, run, True))
        if after is not None and not run.resumed:
            raise template_error(self._source, "it does not reach the same loop again")
        return Rendered(text, run.before, run.checkpoint)

    def _output(self, messages: object, tools: object, run: Run, generate: bool) -> str:
        self._environment.run = run
        left = MAX_OUTPUT
        offered = {} if tools is None else {"tools": tools}
        variables = {**self._variables, **offered, "messages": messages, "add_generation_prompt": generate}
        for piece in self._template.generate(variables):
            left -= len(piece)
            if left < 0:
                raise RefusedError("its output is too long")
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
        except Exception as error:  # noqa: BLE001 - filters and Python's compiler may raise anything
            reason = str(error) or type(error).__name__
        raise template_error(self._source, reason) from cause


class _Generator(CodeGenerator):
    """jinja2's compiler. Calls of the environment's own methods bypass the sandbox, which is faster."""

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
    """The tag `{% generation %}`, which marks replies for training. Its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment for chat templates.

    Loops in which a rendering may continue are marked: their start and each iteration call the current `Run`.
    """

    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.run = Run(())
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
        """Return the iterable of the marked loop with this number."""
        if isinstance(value, Turns):
            return self.run.enter_loop(number, value, context)
        self.run.enter_loop(number, None, context)
        return value

    def begin_turn(self, loop: LoopContext | None) -> None:
        """Begin an iteration of a marked loop."""
        self.run.begin_turn(loop)

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401 - jinja2's own
        """Return an item. A list method of the messages gets a real list, since it may read all messages."""
        seen = obj.whole() if isinstance(obj, Turns) and isinstance(argument, str) else obj
        return super().getitem(seen, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401 - jinja2's own
        """See `getitem`."""
        return super().getattr(obj.whole() if isinstance(obj, Turns) else obj, attribute)

    def _strftime_now(self, pattern: str) -> str:
        return self.now.strftime(pattern)

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 - as dict's
        space = Namespace(*args, **kwargs)
        self.run.namespaces.append(space)
        return space


def _outer_loops(body: Sequence[nodes.Node]) -> Iterator[nodes.For]:
    """Yield the loops that are nested in conditions only, whose text goes directly to the output."""
    for node in body:
        if isinstance(node, nodes.For) and not (node.test or node.recursive or node.else_):
            yield node
        elif isinstance(node, nodes.If):
            yield from _outer_loops([*node.body, *node.elif_, *node.else_])


def _mark(loop: nodes.For, number: int) -> None:
    """Insert calls of `enter_loop` and `begin_turn` into the loop."""
    used = "loop" in find_undeclared(loop.body, ("loop",))
    variable: nodes.Expr = nodes.Name("loop", "load") if used else nodes.Const(None)
    loop.body.insert(0, nodes.ExprStmt(_call("begin_turn", variable), lineno=loop.lineno))
    over: Any = loop.iter
    loop.iter = _call("enter_loop", nodes.Const(number), over, nodes.ContextReference())


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Templates of the hub expect no HTML escapes, which jinja2's own filter adds.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
