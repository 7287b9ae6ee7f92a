"""Encodes prompts to token ids: raw text, conversations through a template, replies by their original ids.

Text of users never becomes a special token; text of the template does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Protocol, TypeAlias

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.text import safe_line, whole_characters
from dsmoe_local.engine.errors import PromptError, too_long
from dsmoe_local.engine.large_stack import large_stack
from dsmoe_local.engine.prompts.segments import Segment
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import Message, Prompt, ends_with_reply

MAX_RUN = 200_000
MAX_TOKEN_BYTES = 128  # more than the longest token of common vocabularies
# Matches only at the start of a run: trying each of its letters would take quadratic time.
_ENDLESS = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1}}}|(?<!\s)\s{{{MAX_RUN + 1}}}")
_CACHE_ENTRIES = 4096
_CACHED_BYTES = 4096  # longer texts are not cached, to bound its memory
_Part: TypeAlias = Segment | tuple[int, ...]
"""Text, or the token ids of a reply."""
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


class Vocabulary(Protocol):
    """The part of `native.Model` that encoding needs."""

    bos: int
    adds_bos: bool
    n_vocab: int

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Return the token ids of UTF-8 text, without BOS."""
        ...

    def special_texts(self) -> frozenset[str]:
        """Return the texts of special tokens."""
        ...


class PromptEncoder:
    """Encodes prompts for one model and template. Any thread may call it."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate | None, n_context: int) -> None:
        self.template = template
        self._vocabulary = vocabulary
        self._n_context = n_context
        # The template's texts and all earlier messages are tokenized again with each message.
        self._cached_ids = lru_cache(_CACHE_ENTRIES)(self._ids)
        # llama.cpp's pre-tokenizers recurse for each letter of a word, so they run on a large stack.
        self._large_stack = large_stack("dsmoe-tokenize")

    def close(self) -> None:
        """End the thread and the template's process."""
        self._large_stack.shutdown()
        if self.template is not None:
            self.template.close()

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """Return the ids of `prompt`, including BOS if the model uses it.

        With `continue_final_message` the last message, which must be the assistant's, is continued; otherwise
        a new reply begins. Raises PromptError, TemplateError, and InterruptedRunError if `stopped` returns
        True.
        """
        if isinstance(prompt, str):
            ids = self._with_bos(self._tokenize([Segment(prompt, 0)], stopped))
        elif prompt and isinstance(prompt[0], Message):
            messages = [message for message in prompt if isinstance(message, Message)]
            parts = self._parts(messages, continue_final_message, stopped)
            ids = self._with_bos(self._tokenize(parts, stopped))
        else:
            ids = [token_id for token_id in prompt if isinstance(token_id, int)]
        if not ids:
            raise PromptError("the prompt is empty")
        # llama.cpp aborts on ids that are not in the vocabulary, which messages may contain.
        self.check_ids(ids)
        return tuple(ids)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise PromptError if an id is not in the vocabulary."""
        if any(not 0 <= token_id < self._vocabulary.n_vocab for token_id in token_ids):
            raise PromptError(
                "a token id is not in the vocabulary", where=f"0 to {self._vocabulary.n_vocab - 1}"
            )

    def _parts(
        self, messages: Sequence[Message], continued: bool, stopped: Callable[[], bool]
    ) -> list[_Part]:
        """Return the parts of a conversation, up to where the next reply begins or the last one continues."""
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"{safe_line(message.role, 40)!r} is not a role", remedy="use system, user or assistant"
                )
        if continued and not ends_with_reply(messages):
            raise PromptError("there is no reply to continue: the last message is not the assistant's")
        if self.template is None:
            raise PromptError(
                "the model has no chat template: it only completes text",
                remedy="send a prompt instead of messages, or name a template with --chat-template",
            )
        exact = self._exactly(self.template, messages, continued, stopped)
        if exact is None and continued:
            raise PromptError("the last reply cannot be continued, since the template changes it")
        return self._plainly(self.template, messages) if exact is None else exact

    def _exactly(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        continued: bool,
        stopped: Callable[[], bool],
    ) -> list[_Part] | None:
        """Return parts with the original ids of each reply. None if the template does not permit it."""
        last = len(messages) - 1
        replies = [
            index
            for index, message in enumerate(messages)
            if message.token_ids and message.role == "assistant"
        ]
        # A last reply without ids is continued as text, behind the prompt for a new reply.
        by_text = continued and last not in replies
        read = messages[:-1] if by_text else messages
        parts: list[_Part] = []
        stretches = template.stretches(read, replies, open_end=by_text or not continued, stopped=stopped)
        for stretch, reply in zip_longest(stretches, replies):
            if stretch is None:
                return None
            parts += stretch
            if reply is not None:
                parts.append(messages[reply].token_ids)
        return [*parts, Segment(messages[-1].content, last)] if by_text else parts

    def _plainly(self, template: ChatTemplate, messages: Sequence[Message]) -> list[_Part]:
        """Return the rendered text. Raises PromptError if a content could become a special token."""
        segments = template.segments(messages)
        if segments is not None:
            return [*segments]
        special = self._vocabulary.special_texts()
        if any(text in message.content for message in messages for text in special):
            raise PromptError(
                "a message holds the text of a special token, and the template changes messages",
                remedy="leave that text out, or name another template with --chat-template",
            )
        return [Segment(template.render(messages))]

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocabulary.bos
        return [bos, *ids] if self._vocabulary.adds_bos and bos >= 0 and ids[:1] != [bos] else ids

    def _tokenize(self, parts: Sequence[_Part], stopped: Callable[[], bool]) -> list[int]:
        """Return the ids of all parts. Special tokens are recognized only in the template's own text."""
        texts = [self._checked(part.text) if isinstance(part, Segment) else b"" for part in parts]

        def run() -> list[int]:
            ids: list[int] = []
            for part, text in zip(parts, texts, strict=True):
                if stopped():
                    raise InterruptedRunError("reading the prompt was interrupted")
                if not isinstance(part, Segment):
                    ids += part
                elif text:
                    tokenize = self._cached_ids if len(text) <= _CACHED_BYTES else self._ids
                    ids += tokenize(text, part.message is None)
            return ids

        return self._large_stack.submit(run).result()

    def _ids(self, text: bytes, special: bool) -> tuple[int, ...]:
        return tuple(self._vocabulary.tokenize(text, special=special))

    def _checked(self, text: str) -> bytes:
        """Return `text` as UTF-8. Raises PromptError if it is too long or has a word that is too long."""
        encoded = whole_characters(text).encode()
        if len(encoded) > self._n_context * MAX_TOKEN_BYTES:
            raise too_long(f"{len(encoded):,} bytes", self._n_context)
        endless = _ENDLESS.search(text)
        if endless is not None:
            raise PromptError(
                f"a word of more than {MAX_RUN} characters cannot be tokenized",
                where=f"it begins with {safe_line(endless[0][:20])!r}",
                remedy="break it with spaces",
            )
        return encoded
