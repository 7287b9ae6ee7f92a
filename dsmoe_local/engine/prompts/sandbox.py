"""Runs a template that came with a model where it cannot reach Python. Limits no memory and no time.

That is its process's concern (`render_host`). Provides the helpers that templates on the Hugging Face hub
expect, and renders beginnings of one conversation without rendering each of them anew (`Checkpoint`).
"""

from __future__ import annotations

import json
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

from dsmoe_local.engine.prompts.failures import template_error
from dsmoe_local.engine.prompts.turns import Checkpoint, RefusedError, Rendered, Run, Turns, Values

MAX_OUTPUT = 64 << 20
_STATEFUL = frozenset({"cycler", "joiner"})

T = TypeVar("T")


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
        return self._checked(lambda: self._output(list(messages), Run(()), generate))

    def begin(self, messages: Values, after: Checkpoint | None = None) -> Rendered:
        """The output for `messages`, from the checkpoint `after` of a rendering of fewer of them on.

        Raises TemplateError, also where `render` would not: templates get something that is almost a list.
        """
        run = Run(messages, after)
        text = self._checked(lambda: self._output(Turns(run, 0), run, True))
        if after is not None and not run.resumed:
            raise template_error(self._source, "it does not come to the same loop again")
        return Rendered(text, run.before, run.checkpoint)

    def _output(self, messages: object, run: Run, generate: bool) -> str:
        self._environment.run = run
        room = MAX_OUTPUT
        variables = {**self._texts, "messages": messages, "add_generation_prompt": generate}
        for piece in self._template.generate(variables):
            room -= len(piece)
            if room < 0:
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
        except Exception as error:  # noqa: BLE001 - filters and Python's compiler raise whatever they like
            reason = str(error) or type(error).__name__
        raise template_error(self._source, reason) from cause


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
        """What the marked loop of that number goes through."""
        if isinstance(value, Turns):
            return self.run.enter_loop(number, value, context)
        self.run.enter_loop(number, None, context)
        return value

    def begin_turn(self, loop: LoopContext | None) -> None:
        """Called at the beginning of each iteration of a marked loop."""
        self.run.begin_turn(loop)

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401 - jinja2's own
        """Methods of the list of messages may look at all of them."""
        seen = obj.whole() if isinstance(obj, Turns) and isinstance(argument, str) else obj
        return super().getitem(seen, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401 - jinja2's own
        """As `getitem`."""
        return super().getattr(obj.whole() if isinstance(obj, Turns) else obj, attribute)

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
    raise RefusedError(str(message))


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
