"""Other clients as oracles of the API: LangChain and llm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from support.fake_engine import FakeEngine
from support.serving import Serving, serving


class City(BaseModel):
    """A city."""

    name: str


@pytest.fixture
def server() -> Iterator[Serving]:
    with serving(FakeEngine(n_parallel=4)) as server:
        yield server


def langchain(server: Serving, **options: Any) -> ChatOpenAI:
    settings: Any = {"model": "fake", "base_url": f"{server.url}/v1", "api_key": "-", "max_retries": 0}
    return ChatOpenAI(**settings, **options)


def test_langchain(server: Serving) -> None:
    """Guards: a field that LangChain always sends and that is refused; counts that it does not find."""
    model = langchain(server, temperature=0, stream_usage=True)
    reply = model.invoke("hi")
    assert reply.content == "user: hi"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] == 8
    chunks = list(model.stream("hi"))
    assert "".join(str(chunk.content) for chunk in chunks) == "user: hi"
    counts = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [count["output_tokens"] for count in counts] == [8]
    assert [each.content for each in model.batch(["a", "b"])] == ["user: a", "user: b"]


def test_langchains_structured_output() -> None:
    """Guards: a schema in LangChain's form."""
    engine = FakeEngine(replies=['{"name": "Rome"}'])
    with serving(engine) as server:
        model = langchain(server).with_structured_output(City, method="json_schema")
        assert model.invoke("a city") == City(name="Rome")
    assert engine.requests[0].json_schema is not None


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
def test_llm(server: Serving, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Guards: the command of the `llm` program that docs/serve.md shows."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: fake\n  api_base: {server.url}/v1\n  api_key_name: local\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "local", "--key", "none", *flags, "hi"],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "user: hi", done.stderr
