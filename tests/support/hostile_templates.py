"""Templates that try to eat memory and time: fixed ones, and random ones from a grammar of what grows."""

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

_NAMES = ("a", "b", "n.s", "n.l", "bos_token", "messages[0].content", "messages", "messages[0]", "range(9)")
_NUMBERS = ("2", "7", "999", "99999", "1048576", "999999999", "10**9", "-5", "0.5")
_BINARY = ("+", "*", "~", "%", "**", "==", "in", "<", "and", "//", "-")
_METHODS = (
    "{0}.ljust({1})", "{0}.center({1}, {2})", "{0}.zfill({1})", "{0}.replace({2}, {2} * 9)", "{0}.join({2})",
    "{0}.format({1}, {2})", "{0}.split()", "{0}.split({2})", "{0}.upper()", "{0}.encode()", "{0}.expandtabs({1})",
    "{0}.splitlines()", "{0}.format_map({{'a': {2}}})", "{0}.items()", "{0}.keys()", "{0}.copy()", "{0}.index({2})",
    "{0}.count({2})", "{0}.partition({2})", "{0}.translate({{97: {2}}})", "{0}.append({2})", "{0}.pop()", "{0}[{1}]",
    "{0}[::-1]", "{0}[:{1}]", "{0}.__class__", "{0}.__mul__({1})", "{0}.real", "{0}.hex()", "{0}.bit_length()",
)  # fmt: skip
_FILTERS = (
    "center({1})", "indent({1})", "indent({1}, true)", "wordwrap(1, wrapstring={2})", "xmlattr", "replace('a', {2})",
    "join({2})", "list", "tojson", "tojson(indent={1})", "pprint", "string", "urlize", "striptags", "escape",
    "forceescape", "title", "truncate({1})", "batch({1}, {2})", "slice({1}, {2})", "map('string') | list", "sum",
    "sum(start={2})", "sort", "unique | list", "groupby(0)", "dictsort", "items | list", "length", "first", "last",
    "reverse | list", "int", "float", "round({1})", "filesizeformat", "format({2}, {1})", "wordcount", "trim",
    "urlencode", "attr('__class__')", "map('center', {1}) | list", "map('list') | list", "select | list", "min",
    "max", "random", "default({2})", "safe", "capitalize", "abs",
)  # fmt: skip


class Hostile:
    """Makes random templates. The same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def template(self) -> str:
        """One template: a few names, then statements that use and grow them."""
        start = (
            "{% set n = namespace(s='ab', l=[1], m=none) %}{% set a = 'xy' %}{% set b = [1, 'z'] %}"
            "{% macro f(x, y) %}{{ x }}{{ y }}{% if x %}{{ f(x[1:], y) }}{{ f(x[1:], y ~ y) }}{% endif %}{% endmacro %}"
        )
        return start + "".join(self._statement(3) for _ in range(self._random.randint(1, 5)))

    def _statement(self, depth: int) -> str:
        choose = self._random.random()
        inner = (
            "".join(self._statement(depth - 1) for _ in range(self._random.randint(1, 2))) if depth else ""
        )
        if choose < 0.3:
            return f"{{% set n.{self._random.choice('slm')} = {self._expression(3)} %}}"
        if choose < 0.45:
            return f"{{{{ {self._expression(3)} }}}}"
        if choose < 0.75 and depth:
            count = self._random.choice(("9", "99", "99999", "n.l", "a * 99"))
            over = f"range({count})" if count.isdigit() else count
            return f"{{% for i in {over} %}}{inner}{{% endfor %}}"
        if choose < 0.8 and depth:
            return f"{{% set a %}}{inner}{{% endset %}}"
        if choose < 0.85 and depth:
            return f"{{% if {self._expression(1)} %}}{inner}{{% endif %}}"
        if choose < 0.88 and depth:
            return f"{{% for i in n.l recursive %}}{{{{ loop(n.l) }}}}{inner}{{% endfor %}}"
        if choose < 0.92 and depth:
            return f"{{% filter {self._filter()} %}}{inner}{{% endfilter %}}"
        if choose < 0.95:
            return f"{{{{ f({self._expression(1)}, {self._expression(1)}) }}}}"
        return f"{{% set n.s = n.s {self._random.choice('+~*')} n.s %}}"

    def _expression(self, depth: int) -> str:
        choose = self._random.random()
        if depth == 0 or choose < 0.2:
            return self._random.choice((*_NAMES, *_NUMBERS, "'%9999s'", "'{:9999}'", "'%(a)s'", "i"))
        one, other = self._expression(depth - 1), self._expression(depth - 1)
        if choose < 0.45:
            return f"({one} {self._random.choice(_BINARY)} {other})"
        if choose < 0.6:
            return f"({self._random.choice(_METHODS).format(one, self._random.choice(_NUMBERS), other)})"
        if choose < 0.8:
            return f"({one} | {self._filter()})"
        return self._random.choice(
            (f"[{one}, {other}]", f"({one}, {other})", f"{{'a': {one}, 'b': {other}}}")
        )

    def _filter(self) -> str:
        return self._random.choice(_FILTERS).format("", self._random.choice(_NUMBERS), self._expression(1))
