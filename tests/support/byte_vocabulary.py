"""A vocabulary with one token for each byte, and markers of reasoning as one token or as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKERS = (b"<think>", b"</think>")


class ByteVocabulary:
    """See `encoder.Vocabulary`.

    `control` makes the markers control tokens, which have no bytes; without it they are text. `more` are
    further tokens, which tokenizing does not find, and `special` control tokens of the template.
    """

    bos = -1
    adds_bos = False

    def __init__(self, *, control: bool, more: Sequence[bytes] = (), special: Sequence[bytes] = ()) -> None:
        self._special: list[bytes] = [*special, *(MARKERS if control else ())]
        self._pieces: list[bytes] = [*(bytes([byte]) for byte in range(256)), *more, *self._special, b"<end>"]
        self.n_vocab = len(self._pieces)
        self.end = self.n_vocab - 1

    def id_of(self, piece: bytes) -> int:
        """Return the id of a token."""
        return self._pieces.index(piece)

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """See `encoder.Vocabulary`."""
        if not special or not self._special:
            return [*text]
        ids: list[int] = []
        for part in re.split(b"(" + b"|".join(map(re.escape, self._special)) + b")", text):
            ids += [self.id_of(part)] if part in self._special else [*part]
        return ids

    def special_texts(self) -> frozenset[str]:
        """See `encoder.Vocabulary`."""
        return frozenset(text.decode() for text in self._special)

    def piece(self, token_id: int) -> bytes:
        """See `reasoning.Vocabulary`."""
        return b"" if self._pieces[token_id] in (*self._special, b"<end>") else self._pieces[token_id]

    def text_of(self, token_id: int) -> str:
        """See `reasoning.Vocabulary`."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def ends(self, token_id: int) -> bool:
        """See `reasoning.Vocabulary`."""
        return token_id == self.end

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, with that of control tokens."""
        return b"".join([self._pieces[token_id] for token_id in token_ids]).decode("utf-8", "replace")
