"""Read a tiktoken.model file, which Moonlight and Kimi-K2 have instead of a tokenizer.json.

Each line has the bytes of a token in base64 and its rank, which is also its id. tiktoken merges the two
adjacent tokens whose concatenation has the lowest rank. llama.cpp needs pairs instead: for each token, the
last merge that builds it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.pretokenizers import KIMI_K2_REGEX
from dsmoe_convert.vocabulary import NO_RANK, merged
from dsmoe_local.base.errors import file_errors
from dsmoe_local.base.text import safe_line

FILE_NAME = "tiktoken.model"
_MAX_BYTES = 16 << 20
_MAX_TOKEN_BYTES = 1024
_CHARACTERS = byte_characters()
# The splitting rules of tiktoken files are in Python code. This class of Moonshot has those of kimi-k2.
_KIMI_CLASS = "TikTokenTokenizer"


def as_tokenizer(path: Path, config: Mapping[str, Any], n_vocab: int, pre: str | None) -> dict[str, Any]:
    """Return the file in the form of a tokenizer.json, without the added tokens of `config`.

    `config` is tokenizer_config.json. Rows that neither names are reserved tokens, as in Moonshot's code.
    Raises FileError or TokenizerError.
    """
    if pre is None and config.get("tokenizer_class") != _KIMI_CLASS:
        raise TokenizerError(
            f"the splitting rules for {FILE_NAME} are known only for the class {_KIMI_CLASS}",
            where=f"{path.with_name('tokenizer_config.json')}: tokenizer_class",
            remedy="name llama.cpp's equivalent, for example: --pre kimi-k2",
        )
    ranks = {_characters(token): rank for token, rank in read_ranks(path).items()}
    named = config.get("added_tokens_decoder")
    named = named if isinstance(named, dict) else {}
    return {
        "added_tokens": [
            {"id": token_id, "content": f"<|reserved_token_{token_id}|>", "special": True}
            for token_id in range(len(ranks), n_vocab)
            if str(token_id) not in named
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": KIMI_K2_REGEX}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": ranks,
            "merges": _merges(ranks),
            "ignore_merges": True,
        },
    }


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token, in the order of ranks: 0, 1, 2 and so on. Each byte is a token."""
    with file_errors("cannot read the tokenizer", path):
        if path.stat().st_size > _MAX_BYTES:
            _refuse(path, f"the file exceeds {_MAX_BYTES >> 20} MiB")
        lines = path.read_bytes().splitlines()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            token = b""
        if not (0 < len(token) <= _MAX_TOKEN_BYTES and rank.isdigit() and len(rank) < 10) or token in ranks:
            shown = safe_line(line.decode("latin-1"), 40)
            _refuse(path, f"line {number} is not a new token and its rank: {shown}")
        ranks[token] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        _refuse(path, "the ranks are not 0, 1, 2 and so on")
    ranks = dict(sorted(ranks.items(), key=itemgetter(1)))
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        _refuse(path, f"there is no token for the byte {missing}")
    return ranks


def _merges(ranks: Mapping[str, int]) -> list[list[str]]:
    """Return the last merge of each token, in the order of ranks. Tokens that no merges build have none."""
    pairs: list[list[str]] = []
    for token, limit in ranks.items():

        def rank(left: str, right: str, limit: int = limit) -> int:
            found = ranks.get(left + right, NO_RANK)
            return found if found < limit else NO_RANK

        parts = merged(list(token), rank)
        if len(parts) == 2:
            pairs.append(parts)
    return pairs


def _characters(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _refuse(path: Path, what: str) -> NoReturn:
    raise TokenizerError(what, where=path, remedy="download it from the model's repository again")
