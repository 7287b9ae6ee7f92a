"""The text of a reply: what the model generated, without what belongs to the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.batches import answer, batch
from support.fake_engine import FakeEngine
from support.models import tiny_model

from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Prompt
from dsmoe_local.protocol.replies import reply_lead

QUESTION: dict[str, Any] = {"role": "user", "content": "q"}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "def f():"}


class DeepSeekEngine(FakeEngine):
    """Ends prompts with `Assistant:` and renders replies as `Assistant: …`, like DeepSeekMoE's template."""

    def _encode(self, prompt: Prompt, continued: bool = True) -> tuple[int, ...]:
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return super()._encode(prompt, continued)
        texts = [f"{message.role}: {message.content}" for message in prompt if not isinstance(message, int)]
        return super()._encode("\n".join(texts) + "\nassistant:")


@pytest.mark.parametrize("form", ["simple", "openai"])
@pytest.mark.parametrize(
    ("engine", "line", "text"),
    [
        (FakeEngine, {"messages": [QUESTION]}, "    return x"),
        (FakeEngine, {"prompt": "q"}, "    return x"),
        (DeepSeekEngine, {"messages": [QUESTION]}, "   return x"),
        (DeepSeekEngine, {"messages": [QUESTION, BEGUN], "continue_final_message": True}, "    return x"),
        (DeepSeekEngine, {"prompt": "q"}, "    return x"),
        (DeepSeekEngine, {"prompt": ""}, "    return x"),
    ],
)
def test_replies_keep_their_indentation(
    tmp_path: Path, engine: type[FakeEngine], line: dict[str, Any], text: str, form: str
) -> None:
    """Guards: code that loses its first indentation; the space after `Assistant:` in the reply."""
    (record,) = answer(engine(replies=["    return x"]), batch(tmp_path, line, form=form))
    if form == "simple":
        assert record["text"] == text
        return
    (choice,) = record["response"]["body"]["choices"]
    assert choice.get("text", choice.get("message", {}).get("content")) == text


@pytest.mark.parametrize(("template", "lead"), [("deepseek-moe", " "), ("chatml", ""), (None, "")])
def test_what_belongs_to_the_template(template: str | None, lead: str) -> None:
    """Guards: a rule for the space that holds for one template only."""
    with EngineClient.load(ModelOptions(tiny_model(), chat_template=template, n_threads=1)) as engine:
        assert reply_lead(engine) == lead
    assert reply_lead(FakeEngine(template=False)) == ""


def test_a_template_that_refuses_to_tell(tmp_path: Path) -> None:
    """Guards: a batch that does not start, because the template refuses two messages."""

    class Strict(FakeEngine):
        def encode(self, prompt: Prompt, **options: Any) -> tuple[int, ...]:
            if len(prompt) > 1:
                raise TemplateError("one message")
            return super().encode(prompt)

    (record,) = answer(Strict(replies=[" x"]), batch(tmp_path, {"messages": [QUESTION]}))
    assert record["text"] == " x"
