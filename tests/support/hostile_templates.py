"""Templates that use much memory and time: fixed ones, and random ones of statements that grow values."""

# ruff: noqa: E501
from __future__ import annotations

import random

FIXED = (
    "{{ 'a' * 10**12 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ('%(a)9999s' * 60000) % {'a': 'x'} }}",
    "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + ['x' * 99999 ~ i] %}{% endfor %}",
    "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + [range(99999) | list] %}{% endfor %}",
    "{% set n = namespace(l=['x']) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "{% set n = namespace(l=['x'], m=['x']) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
    "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format('x', 999999999) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'.encode().zfill(999999999) }}",
    "{{ (1).to_bytes(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ [1] | tojson(indent=999999999) }}",
    "{{ 'a\nb' | indent(999999999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).join('b' * 99999) }}",
    "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "{{ (('a b ' * 9999999) | wordwrap(1)) }}",
    "{{ ('a ' * 99999999).split() | length }}",
    "{{ ('http://a.b ' * 999999) | urlize }}",
    "{{ ('<!--' * 999999) | striptags }}",
    "{{ ('&' * 99999999) | forceescape }}",
    "{{ range(99999) | batch(1, 'x' * 99999) | list | length }}",
    "{{ range(9) | slice(99999999, 'x') | list | length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% set c = cycler('a') %}{% for i in range(99999) %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
    "{% set n = namespace(i=2) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}{{ n.i }}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ 'x' | center(999999) }}" * 2000,
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
)  # fmt: skip

_NUMBERS = ("0", "2", "7", "99", "999", "99999", "1048576", "999999999", "-5", "n.s | length", "n.l | length")
_TEXTS = (
    "n.s", "n.s", "a", "'ab'", "'%9999s'", "'{{:9999}}'", "'<!--&'", "' x\n'", "messages[0].content", "bos_token",
    "{s} ~ {s}", "{s} ~ {l}", "{s} + {s}", "{s} * {n}", "({s} * 99) % {s}", "'%9999s%s' % ({s}, {l})", "{s}[::-1]",
    "{s}.ljust({n})", "{s}.center({n}, 'x')", "{s}.zfill({n})", "{s}.replace('a', {s})", "{s}.replace('', {s})",
    "{s}.join({s})", "{s}.join({l} | map('string'))", "{s}.format({s}, {n})", "'{{0:>{{1}}}}'.format({s}, {n})",
    "{s}.expandtabs({n})", "{s}.upper()", "{s}.translate({{97: {s}}})", "{s}.partition('a')[2]", "{s}.title()",
    "{s} | center({n})", "{s} | indent({n})", "{s} | indent({s}, true)", "{s} | wordwrap({n}, wrapstring={s})",
    "{s} | replace('a', {s})", "{s} | urlize", "{s} | striptags", "{s} | forceescape", "{s} | escape | escape",
    "{s} | title", "{s} | truncate({n})", "{s} | urlencode", "{s} | tojson", "{s} | pprint", "{s} | filesizeformat",
    "{l} | join({s})", "{l} | string", "{l} | tojson", "{l} | tojson(indent={n})", "{l} | pprint", "{l} | sum(start='')",
    "{{'a': {s}}} | xmlattr", "{{'a': {l}, 'b': {s}}} | string", "f({s}, {s})", "{n} | string", "{s} | default({l})",
)  # fmt: skip
_LISTS = (
    "n.l", "n.l", "[1]", "[{s}, {l}]", "[{l}, {l}]", "{l} + {l}", "{l} + [{s}]", "{l} * {n}", "{s}.split()",
    "{s}.split('a')", "{s}.splitlines()", "{s} | list", "range(99999) | list", "range({n}) | list",
    "{l} | batch({n}, {s}) | list", "{l} | slice({n}, {s}) | list", "{l} | map('string') | list", "{l} | sort",
    "{l} | unique | list", "{l} | reverse | list", "{{'a': {s}}} | dictsort", "{l} | groupby(0)", "{l}[::-1]",
    "{l} | map('center', {n}) | list", "{l} | map('list') | list", "({l}, {l}) | list", "messages | list",
    "{l} | sum(start=[])", "{l} | select | list", "{l} | map('tojson') | list", "dict(a={l}).values() | list",
)  # fmt: skip
_CONDITIONS = (
    "{l} == {l}",
    "{s} in {l}",
    "{s} in {s}",
    "{l} < {l}",
    "{s} == {s}",
    "{l}",
    "{s} is in {l}",
    "true",
)
_TRICKS = (
    "{s}.__class__", "{l}.append({s})", "{l}.__mul__({n})", "{s} | attr('__class__')", "{s}.encode() * {n}",
    "(2 ** {n}) | string", "{n} * {n} * {n}", "{s}.format_map(n)", "({n}).to_bytes({n})", "{s} | round({n})", "lipsum({n})",
    "{s} | int", "{l} | random", "cycler({l}).next()", "joiner({s})()", "self", "loop", "f.name", "{s}.format.__globals__",
    "{l}.pop()", "namespace(a={l})", "{n} // 0", "{s} - {l}", "caller()", "{s} | map({s}) | list",
)  # fmt: skip
_FILTERS = ("upper", "forceescape", "center(99999)", "indent(999)", "replace('a', 'b' * 999)")


class Hostile:
    """Generates random templates, reproducibly from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def template(self) -> str:
        """Return a template: a few variables, then statements that use and grow them."""
        start = (
            "{% set n = namespace(s='ab', l=[1], m=none) %}{% set a = 'xy' %}"
            "{% macro f(x, y) %}{{ y }}{% if x %}{{ f(x[1:], y) }}{{ f(x[1:], y ~ y) }}{% endif %}{% endmacro %}"
        )
        return start + "".join(self._statement(3) for _ in range(self._random.randint(1, 5)))

    def _statement(self, depth: int) -> str:
        choose = self._random.random()
        if depth == 0 or choose < 0.45:
            return self._random.choice(
                (
                    f"{{% set n.s = {self._of(_TEXTS, 3)} %}}",
                    f"{{% set n.l = {self._of(_LISTS, 3)} %}}",
                    f"{{{{ {self._of(_TEXTS, 3)} }}}}",
                    f"{{% set n.s = n.s {self._random.choice('+~')} n.s %}}",
                    f"{{% set n.l = {self._random.choice(('[n.l, n.l]', 'n.l + n.l', 'n.l + [n.s]', '[n.l]'))} %}}",
                    f"{{% set n.m = {self._of(_TRICKS, 2) if self._random.random() < 0.2 else 'n.l'} %}}",
                )
            )
        inner = "".join(self._statement(depth - 1) for _ in range(self._random.randint(1, 3)))
        over = self._random.choice(
            ("range(9)", "range(99)", "range(99999)", "n.l", "n.s", self._of(_LISTS, 2))
        )
        return self._random.choice(
            (
                f"{{% for i in {over} %}}{inner}{{% endfor %}}",
                f"{{% for i in {over} %}}{inner}{{% endfor %}}",
                f"{{% for i in {over} recursive %}}{{{{ loop({self._of(_LISTS, 1)}) }}}}{{% endfor %}}",
                f"{{% set a %}}{inner}{{% endset %}}",
                f"{{% if {self._of(_CONDITIONS, 2)} %}}{inner}{{% endif %}}",
                f"{{% filter {self._random.choice(_FILTERS)} %}}{inner}{{% endfilter %}}",
            )
        )

    def _of(self, choices: tuple[str, ...], depth: int) -> str:
        """Return an expression of that kind, made of smaller ones."""
        if depth == 0:
            choices = tuple(choice for choice in choices if "{" not in choice)
        chosen = self._random.choice(choices)
        parts = {
            kind: f"({self._of(smaller, depth - 1)})" if f"{{{kind}}}" in chosen else ""
            for kind, smaller in (("s", _TEXTS), ("l", _LISTS), ("n", _NUMBERS))
        }
        return chosen.format(**parts)
