"""Encode prompts to token ids: raw text, and conversations with a chat template.

Replies keep their original token ids. Text of messages never becomes a special token, unlike text of the
template. Apart from that, messages and template are tokenized as one text, as for training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import Protocol, TypeAlias

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.text import safe_line, whole_characters
from dsmoe_local.engine import reasoning
from dsmoe_local.engine.errors import PromptError, too_long
from dsmoe_local.engine.large_stack import large_stack
from dsmoe_local.engine.prompts.replies import Part, reply_to_continue, with_reply_ids
from dsmoe_local.engine.prompts.segments import Segment
from dsmoe_local.engine.prompts.template import ChatTemplate, Variables
from dsmoe_local.engine.tools.support import ToolSupport, definition
from dsmoe_local.engine.types import Message, Prompt, Tool, ends_with_reply

MAX_WORD = 200_000  # characters
MAX_TOKEN_BYTES = 128  # more than the longest token of common vocabularies
# It matches only at the start of a word: trying each letter would take quadratic time.
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{MAX_WORD + 1}}}|(?<!\s)\s{{{MAX_WORD + 1}}}")
_CACHE_ENTRIES = 4096
_CACHED_BYTES = 4096  # longer texts are not cached, to limit the memory
_Piece: TypeAlias = bytes | tuple[int, ...]
"""Text without special tokens, or token ids."""
_BREAK: Part = ()
"""No ids. The texts before and after it are not joined: a reply begins there."""
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
# Templates may print ids, which must not contain special tokens.
_CALL_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{0,256}")


class Vocabulary(reasoning.Vocabulary, Protocol):
    """The attributes of `native.Model` that encoding needs."""

    bos: int
    adds_bos: bool
    n_vocab: int

    def special_texts(self) -> frozenset[str]:
        """Return the texts of special tokens."""
        ...


class PromptEncoder:
    """Encodes prompts for one model and template. Any thread may call it.

    `reasoning` says how the model marks reasoning. It is None if the template has no markers of reasoning.
    `tools` says how the model writes tool calls. It is None if there is no template. `n_trained` is the
    context that the model was trained for.
    """

    def __init__(
        self, vocabulary: Vocabulary, template: ChatTemplate | None, n_context: int, n_trained: int = 0
    ) -> None:
        self.template = template
        markers = None if template is None else template.markers
        self.reasoning = None if markers is None else reasoning.ReasoningFormat(markers, vocabulary)
        self.tools = None if template is None else ToolSupport(template.text, vocabulary)
        self._vocabulary = vocabulary
        self._n_context = n_context
        self._n_trained = n_trained
        # Each turn tokenizes the template's texts and all earlier messages again.
        self._cached_ids = lru_cache(_CACHE_ENTRIES)(self._ids)
        self._cached_pieces = lru_cache(_CACHE_ENTRIES)(self._pieces)
        # llama.cpp's pre-tokenizers recurse for each letter of a word, so they need a large stack.
        self._large_stack = large_stack("dsmoe-tokenize")

    def close(self) -> None:
        """End the thread and the template's process."""
        self._large_stack.shutdown()
        if self.template is not None:
            self.template.close()

    def encode(
        self,
        prompt: Prompt,
        variables: Variables | None = None,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """Return the token ids of `prompt`, including BOS if the model uses it.

        A conversation ends where a new reply begins. With `continue_final_message` it ends with its last
        message, which must be the assistant's. `variables` are those of the template, `tools` those that the
        conversation offers.

        Raises PromptError, TemplateError, and InterruptedRunError if `stopped` returns True.
        """
        if isinstance(prompt, str):
            ids = self._with_bos(self._tokenize([Segment(prompt, 0)], stopped))
        elif prompt and isinstance(prompt[0], Message):
            messages = [message for message in prompt if isinstance(message, Message)]
            parts = self._parts(messages, tools, variables, continue_final_message, stopped)
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
                "a token id is not in the vocabulary",
                remedy=f"use ids from 0 to {self._vocabulary.n_vocab - 1}",
            )

    def _parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        variables: Variables | None,
        continued: bool,
        stopped: Callable[[], bool],
    ) -> list[Part]:
        """Return the parts of a conversation. If `continued`, the last part is the reply to continue."""
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"{safe_line(message.role, 40)!r} is not a role", remedy="use system, user or assistant"
                )
            for call_id in (message.tool_call_id, *(call.id for call in message.tool_calls)):
                if not _CALL_ID.fullmatch(call_id):
                    raise PromptError(
                        f"{safe_line(call_id, 40)!r} is not an id of a tool call",
                        remedy="use up to 256 letters, digits, and the characters _ - . : / + =",
                    )
        if continued and not ends_with_reply(messages):
            raise PromptError(
                "there is no reply to continue: the last message does not have the role assistant"
            )
        if self.template is None or self.tools is None:
            raise PromptError(
                "the model has no chat template: it only completes text",
                remedy="send a prompt instead of messages, or name a template with --chat-template",
            )
        messages = self.tools.rendered(messages, tools)
        if tools and self.tools.native:
            variables = {**(variables or {}), "tools": [definition(tool) for tool in tools]}
        if self.reasoning is None:
            messages = [_without_reasoning(message) for message in messages]
            exact = self._with_reply_ids(self.template, messages, variables, continued, stopped)
        else:
            exact = self._as_rendered(self.template, self.reasoning, messages, variables, continued)
        if exact is None and continued:
            raise PromptError(
                "the last reply cannot be continued, since the template changes it",
                remedy="name another template with --chat-template",
            )
        return self._as_text(self.template, messages, variables) if exact is None else exact

    def _as_rendered(
        self,
        template: ChatTemplate,
        form: reasoning.ReasoningFormat,
        messages: Sequence[Message],
        variables: Variables | None,
        continued: bool,
    ) -> list[Part] | None:
        """Return the parts of a reasoning model's conversation; None if the template changes messages.

        Earlier replies are as the template renders them now, not as they were when they were generated,
        since the template decides how much of their reasoning stays.
        """
        for message in messages:
            self.check_ids(message.token_ids)
        segments = template.segments(messages[:-1] if continued else messages, variables)
        if segments is None:
            return None
        parts = with_reply_ids(segments, messages, form)
        if continued:
            parts += [_BREAK, *reply_to_continue(segments, messages[-1], len(messages) - 1, form)]
        return parts

    def _with_reply_ids(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        variables: Variables | None,
        continued: bool,
        stopped: Callable[[], bool],
    ) -> list[Part] | None:
        """Return parts with the original ids of each reply; None if the template does not permit it."""
        last = len(messages) - 1
        replies = [
            index
            for index, message in enumerate(messages)
            if message.token_ids and message.role == "assistant"
        ]
        # A last reply without ids is continued as text, after the prompt for a new reply.
        by_text = continued and last not in replies
        read = messages[:-1] if by_text else messages
        parts: list[Part] = []
        open_end = by_text or not continued
        stretches = template.stretches(read, replies, variables, open_end=open_end, stopped=stopped)
        for stretch, reply in zip_longest(stretches, replies):
            if stretch is None:
                return None
            parts += stretch
            if reply is not None:
                parts.append(messages[reply].token_ids)
        return [*parts, _BREAK, Segment(messages[-1].content, last)] if by_text else parts

    def _as_text(
        self, template: ChatTemplate, messages: Sequence[Message], variables: Variables | None
    ) -> list[Part]:
        """Return the rendered text. Raises PromptError if a message could become a special token."""
        segments = template.segments(messages, variables)
        if segments is not None:
            return [*segments]
        special = self._vocabulary.special_texts()
        texts = [text for message in messages for text in (message.content, message.reasoning_content)]
        texts += [call.arguments for message in messages for call in message.tool_calls]
        if any(name in text for text in texts for name in special):
            raise PromptError(
                "a message contains the text of a special token, and the template changes messages",
                remedy="leave that text out, or name another template with --chat-template",
            )
        return [Segment(template.render(messages, variables))]

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocabulary.bos
        return [bos, *ids] if self._vocabulary.adds_bos and bos >= 0 and ids[:1] != [bos] else ids

    def _tokenize(self, parts: Sequence[Part], stopped: Callable[[], bool]) -> list[int]:
        """Return the ids of all parts. Special tokens are recognized only in the template's own text."""
        texts = [self._checked(part.text) if isinstance(part, Segment) else b"" for part in parts]

        def run() -> list[int]:
            pieces: list[_Piece] = []
            for part, text in zip(parts, texts, strict=True):
                if not isinstance(part, Segment):
                    pieces.append(part)
                elif part.message is None:
                    pieces += self._cached_pieces(text) if len(text) <= _CACHED_BYTES else self._pieces(text)
                else:
                    pieces.append(text)
            ids: list[int] = []
            for joined in _with_joined_text(pieces):
                if stopped():
                    raise InterruptedRunError("reading the prompt was interrupted")
                if isinstance(joined, tuple):
                    ids += joined
                elif joined:
                    ids += self._cached_ids(joined) if len(joined) <= _CACHED_BYTES else self._ids(joined)
            return ids

        return self._large_stack.submit(run).result()

    def _ids(self, text: bytes) -> tuple[int, ...]:
        return tuple(self._vocabulary.tokenize(text, special=False))

    def _pieces(self, text: bytes) -> tuple[_Piece, ...]:
        """Return a template's text as special tokens and the text between them.

        If ids do not spell the text, it cannot be split: SentencePiece adds a space in front.
        """
        ids = self._vocabulary.tokenize(text, special=True)
        # Special tokens have no bytes.
        spelled = [self._vocabulary.piece(token_id) or (token_id,) for token_id in ids]
        whole = b"".join(
            self._vocabulary.text_of(*piece).encode() if isinstance(piece, tuple) else piece
            for piece in spelled
        )
        return tuple(_with_joined_text(spelled)) if whole == text else (tuple(ids),)

    def _checked(self, text: str) -> bytes:
        """Return `text` as UTF-8. Raises PromptError if it is too long or has a word that is too long."""
        encoded = whole_characters(text).encode()
        if len(encoded) > self._n_context * MAX_TOKEN_BYTES:
            raise too_long(f"{len(encoded):,} bytes", self._n_context, self._n_trained)
        long_word = _LONG_WORD.search(text)
        if long_word is not None:
            is_space = long_word[0].isspace()
            what = "whitespace" if is_space else "a word"
            raise PromptError(
                f"{what} of more than {MAX_WORD} characters cannot be tokenized",
                where=f"it begins with {safe_line(long_word[0][:20])!r}",
                remedy="shorten it" if is_space else "break it with spaces",
            )
        return encoded


def _with_joined_text(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Yield the pieces with adjacent texts as one."""
    for kind, group in groupby(pieces, key=type):
        if kind is bytes:
            yield b"".join(piece for piece in group if isinstance(piece, bytes))
        else:
            yield from group


def _without_reasoning(message: Message) -> Message:
    """Return a message for a template without markers of reasoning. Its token ids would contain them."""
    if not message.reasoning_content:
        return message
    return replace(message, reasoning_content="", token_ids=())
