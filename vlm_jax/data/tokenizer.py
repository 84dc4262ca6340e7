"""A Hugging Face fast tokenizer, reduced to what the pipeline needs: ids with character offsets, and a few special ids."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.hub import hub_hint

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """Text <-> ids.  `load` makes one; `backend` is a `tokenizers.Tokenizer`.

    bos_id: put in front of every sequence; None if the tokenizer has none or is told not to add it (Qwen, Phi-3).
    eos_id: ends generation unless the template closes turns with another token.  pad_id: any harmless id.
    specials: strings that `encode` turns into control ids wherever they stand.
    """

    def __init__(
        self, backend, bos_id: int | None, eos_id: int | None, pad_id: int, specials: Sequence[str]
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.specials = tuple(sorted(set(specials)))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without BOS or EOS, and the span [start, end) of characters each id stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact string, None if the vocabulary does not hold it."""
        return self.backend.token_to_id(token)


def check_directory(directory: str) -> None:
    """Raises ConfigError unless the directory looks like a saved tokenizer. Needs only os: fast."""
    if not os.path.isdir(directory):
        raise ConfigError(
            f"data: tokenizer directory {directory!r} does not exist; save one there with save_pretrained.{hub_hint(directory)}"
        )
    if not any(os.path.isfile(os.path.join(directory, name)) for name in FILES):
        raise ConfigError(
            f"data: {directory!r} holds no tokenizer; expected one of {', '.join(FILES)}."
        )


def load(directory: str) -> Tokenizer:
    """The tokenizer saved in a directory. Raises ConfigError if there is none, or only a slow (Python) one."""
    check_directory(directory)
    from transformers import AutoTokenizer  # seconds to import: only who tokenises pays

    try:
        # Any: its stub allows None, which it never returns.
        hf: Any = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"data: the tokenizer in {directory!r} cannot be read: {reason}"
        ) from error
    if not hf.is_fast:
        raise ConfigError(
            f"data: {directory!r} holds a slow tokenizer; save tokenizer.json (its fast form) there."
        )
    backend = hf.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    specials = [t.content for t in hf.added_tokens_decoder.values() if t.special]
    candidates = (hf.pad_token_id, hf.unk_token_id, hf.eos_token_id, 0)
    pad_id = next(i for i in candidates if i is not None)
    bos_id = hf.bos_token_id if _adds_bos(directory) else None
    return Tokenizer(backend, bos_id, hf.eos_token_id, pad_id, [*hf.all_special_tokens, *specials])


def _adds_bos(directory: str) -> bool:
    """False where tokenizer_config.json says `"add_bos_token": false`."""
    path = os.path.join(directory, "tokenizer_config.json")
    if not os.path.isfile(path):
        return True
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    return not ("add_bos_token" in settings and settings["add_bos_token"] is False)
