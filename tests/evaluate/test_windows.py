"""Windows have the same tokens as in llama.cpp's perplexity tool, for texts of any length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import llama_oracle
from support.fake_engine import FakeEngine
from support.models import smollm2, tiny_model

from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.text import Text, built_in, read_text
from dsmoe_local.evaluate.windows import cut_windows, encode_text, pieces

NASTY = (
    "Don't, it's 3.14   or\n\n\n  12 345 678!  \t tabs\r\nÄpfel, naïve — “quoted”… e\u0301te\u0301 ",
    "def f(x):\n    return x**2  # no\n\n\n\n",
    "今天天气很好，我们去公园。“好。”\n第二行没有空格\n",
)


def test_the_built_in_text_has_all_three() -> None:
    """Guards: a text that is only English where a module is missing, or whose first windows are."""
    text = built_in()
    assert text == built_in()
    assert 40_000 < len(text.content) < 80_000
    parts = re.split("[^\\n]*[\u4e00-\u9fff]+[^\\n]*", text.content)
    assert len(parts) == 9
    assert all(part.count(" the ") > 10 for part in parts[:-1])
    assert all(len(part) > 5000 for part in parts[1:-1])
    assert all(text.content.count(code) > 20 for code in ("def ", "self.", "return "))
    assert "Python 3" in text.name


@pytest.mark.parametrize("make", [tiny_model, smollm2], ids=["deepseek-llm", "smollm"])
def test_long_texts_have_the_tokens_of_the_whole(make: object) -> None:
    """Guards: other tokens where a long text is cut for the tokenizer, a BOS in every part."""
    path: Path = make()  # type: ignore[operator]
    content = built_in().content[:12_000] + "".join(NASTY) * 150
    with llama_oracle.vocabulary(path) as vocabulary:
        expected = vocabulary.encode(content, add_special=True)
    with Engine.load(ModelOptions(path, n_context=32, n_threads=1)) as engine:
        assert len(list(pieces(content, engine.info.n_context * 128))) > 10
        assert encode_text(engine, content) == expected


@given(st.text(), st.integers(4, 64))
def test_pieces_are_the_text(content: str, most_bytes: int) -> None:
    """Guards: characters lost or doubled at a cut, parts that are too long, and one that is never cut."""
    found = list(pieces(content, most_bytes))
    assert "".join(found) == content
    assert all(len(piece.encode("utf-8", "surrogatepass")) <= most_bytes for piece in found)


def test_windows_are_llama_cpps() -> None:
    """Guards: windows that overlap, a BOS that is put in instead of taking a token's place, a last window
    that is not full.
    """
    content = built_in().content[:2000]
    path = tiny_model()
    with llama_oracle.vocabulary(path) as vocabulary:
        ids = vocabulary.encode(content, add_special=True)
        bos = vocabulary.special()["bos"]
    with Engine.load(ModelOptions(path, n_context=256, n_threads=1)) as engine:
        windows = cut_windows(engine, Text("t", content), 50)
        few = cut_windows(engine, Text("t", content), 50, 3)
    expected = [ids[start : start + 50] for start in range(0, len(ids) - len(ids) % 50, 50)]
    assert windows.tokens == tuple((bos, *window[1:]) for window in expected)
    assert few.tokens == windows.tokens[:3]
    assert (windows.first, few.n_tokens, few.n_scored) == (25, 150, 3 * 24)


def test_models_without_bos_keep_every_token() -> None:
    """Guards: the first token of a window replaced where the model wants no BOS."""
    windows = cut_windows(FakeEngine(), Text("t", "abcdefgh" * 5), 16)
    assert windows.tokens == (tuple(byte + 1 for byte in b"abcdefgh" * 2),) * 2


def test_a_short_text_is_refused() -> None:
    """Guards: a perplexity without scored tokens."""
    with pytest.raises(UsageError, match="has 5 tokens, too few for a window of 16"):
        cut_windows(FakeEngine(), Text("t", "abcde"), 16)


def test_texts_are_read_as_they_are(tmp_path: Path) -> None:
    """Guards: newlines translated, more than one taken from the end; a traceback for what is no text."""
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\r\nb\n\n")
    assert read_text(str(path)).content == "a\r\nb\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(FormatError, match="byte 2"):
        read_text(str(path))
    path.write_bytes(b" \n")
    with pytest.raises(FormatError, match="empty"):
        read_text(str(path))
    with pytest.raises(FileError, match="No such file"):
        read_text(str(tmp_path / "none"))
