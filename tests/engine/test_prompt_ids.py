"""Conversations to ids, as `tokenizers` encodes the whole text that transformers renders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import vocabularies
from support.checkpoints import TINY, write_checkpoint
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine import native
from dsmoe_local.engine.prompts.choice import BUILT_IN
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import Message

EOS = vocabularies.EOS
BOS = "<|startoftext|>"
SPECIAL = (BOS, "<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATES = {
    "deepseek-moe": ("deepseek-llm", BUILT_IN["deepseek-moe"]),
    "chatml": ("qwen2", BUILT_IN["chatml"]),
    "GLM": (
        "glm4",
        (
            "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
    ),
    "no special tokens": (
        "llama-bpe",
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}.\n{% endfor %}assistant:",
    ),
}
TALKS = {
    "English": [
        ("system", "Be brief."),
        ("user", "Hello, who are you?"),
        ("assistant", "A model."),
        ("user", "Why?"),
    ],
    "Chinese": [("user", "什么是人工智能？"), ("assistant", "人工智能是…"), ("user", "谢谢。再见！")],
    "code": [("user", "def f(x):\n    return x\n"), ("assistant", "    pass"), ("user", "12345 ... 'll")],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def parts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PromptEncoder, PreTrainedTokenizerFast]]:
    """Our encoder, and the tokenizer of transformers with the same template."""
    pre, template = TEMPLATES[request.param]
    tokenizer = Tokenizer.from_str(vocabularies.trained(pre).to_str())
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=template
    )
    hp = replace(TINY, n_vocab=vocabularies.n_rows(tokenizer))
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", hp)
    vocabularies.write_files(
        folder, tokenizer, {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    )
    model = native.Model(convert_folder(folder, folder / "model.gguf").path, measure_only=True)
    encoder = PromptEncoder(model, ChatTemplate(template, "test", bos=BOS, eos=EOS), 1 << 20)
    yield encoder, reference
    encoder.close()
    model.close()


@pytest.mark.parametrize("name", TALKS)
def test_a_conversation_is_one_text(name: str, parts: tuple[PromptEncoder, PreTrainedTokenizerFast]) -> None:
    """Guards: a space of the template as a token of its own, where the model was trained with " Hello"."""
    encoder, reference = parts
    for end in range(1, len(TALKS[name]) + 1):
        talk = TALKS[name][:end]
        if talk[-1][0] == "user":
            text = reference.apply_chat_template(
                [{"role": role, "content": content} for role, content in talk],
                tokenize=False,
                add_generation_prompt=True,
            )
            assert isinstance(text, str)
            expected = reference.encode(text, add_special_tokens=False)
            assert list(encoder.encode(tuple(Message(*said) for said in talk))) == expected


def test_a_reply_without_ids_is_continued_as_it_would_be_generated(
    parts: tuple[PromptEncoder, PreTrainedTokenizerFast],
) -> None:
    """Guards: a reply joined with the end of the prompt, whose cached ids then change."""
    encoder, reference = parts
    question = (Message("user", "Hello"),)
    continued = encoder.encode((*question, Message("assistant", "Yes")), continue_final_message=True)
    assert continued == encoder.encode(question) + tuple(reference.encode("Yes", add_special_tokens=False))


def test_special_tokens_of_messages_stay_text(
    tmp_path: Path, parts: tuple[PromptEncoder, PreTrainedTokenizerFast]
) -> None:
    """Guards: a special token that a message and the template form together."""
    encoder, reference = parts
    special = {reference.convert_tokens_to_ids(text) for text in SPECIAL}
    plain = encoder.encode((Message("user", "a"),))
    for text in SPECIAL:
        ids = encoder.encode((Message("user", text),))
        assert sum(token in special for token in ids) == sum(token in special for token in plain)
