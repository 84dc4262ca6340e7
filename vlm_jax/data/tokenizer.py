"""A Hugging Face fast tokenizer, reduced to what the pipeline needs: ids with character offsets, and a few special ids.

Texts are encoded to the ids that transformers' own call gives. The ids it puts before a text (BOS) are observed by encoding
one, not inferred from the tokenizer's name or settings.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from vlm_jax import files
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.hub import TOKENIZER_FILES, hub_hint

# One of these sets of files holds the vocabulary; tokenizer_config.json alone does not.
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
# Small JSON objects that transformers reads beside it.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
LFS = b"version https://git-lfs"
REASON_CHARS = 200  # of another library's message


class Tokenizer:
    """Text <-> ids.  `load` makes one; `backend` is a `tokenizers.Tokenizer`.

    bos_ids: what transformers puts in front of every text: BOS, or nothing (Qwen, Phi-3; SmolLM and GPT-2, which name a
    BOS but do not add it).  eos_id: ends generation, besides the template's closing token.  pad_id: fills
    slots that no token may attend to.  specials: strings that `encode` turns into control ids wherever they occur in a text.
    """

    def __init__(
        self,
        backend: Backend,
        bos_ids: Sequence[int],
        eos_id: int | None,
        pad_id: int,
        specials: Sequence[str],
    ):
        self.backend = backend
        self.bos_ids = tuple(bos_ids)
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.specials = tuple(sorted(set(specials)))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without BOS or EOS, and for each the character offsets [start, end) of its text."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact string, None if the vocabulary does not hold it."""
        return self.backend.token_to_id(token)

    def holds(self, token: str) -> bool:
        """Whether `encode` gives this string's own token; some tokens of a vocabulary are split into others."""
        return self.token_id(token) in self.encode(token)[0]


def check_directory(directory: str) -> None:
    """Raises ConfigError unless the directory has a vocabulary's files and readable settings. Loads no tokenizer."""
    if not files.is_dir(directory):
        raise ConfigError(
            f"data: tokenizer directory {directory!r} does not exist; save one there with save_pretrained.{hub_hint(directory)}"
        )
    if not is_there(directory):
        known = ", ".join(" with ".join(names) for names in VOCABULARIES)
        raise ConfigError(f"data: {directory!r} holds no tokenizer; expected one of {known}.")
    for name in SETTINGS:
        if _has(directory, name):
            _check_special_tokens(_read_object(directory, name), os.path.join(directory, name))


def is_there(directory: str) -> bool:
    """Whether the directory has the files of a tokenizer's vocabulary."""
    return any(all(_has(directory, name) for name in names) for names in VOCABULARIES)


def _has(directory: str, name: str) -> bool:
    return files.is_file(os.path.join(directory, name))


def _read_object(directory: str, name: str) -> dict[str, Any]:
    path = os.path.join(directory, name)
    _check_is_the_file(path)
    try:
        found = json.loads(files.read_bytes(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"data: {path!r} cannot be read: {error}; download or save the tokenizer again."
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"data: {path!r} must hold a JSON object, not a {type(found).__name__}; download or save the tokenizer again."
        )
    return found


def _check_is_the_file(path: str) -> None:
    if files.read_span(path, 0, len(LFS)) == LFS:
        raise ConfigError(
            f"data: {path!r} is a Git LFS pointer, not the file itself; run `git lfs pull` there."
        )


def _check_special_tokens(settings: dict[str, Any], path: str) -> None:
    for name, token in _special_tokens(settings):
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            raise ConfigError(
                f"data: {path!r}: {name} holds {token!r}, which is no token; remove it, or name a token of the vocabulary."
            )
        if not content:
            raise ConfigError(
                f"data: {path!r}: {name} holds the empty string, which is no token; remove it, or name a token of the "
                "vocabulary."
            )


def _special_tokens(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(field, token) of each special token that the settings name; a token is a string or an object with `content`."""
    for name in NAMED:
        if settings.get(name) is not None:
            yield name, settings[name]
    for name in LISTED:
        tokens = settings.get(name) or ()
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield name, token


def load(directory: str) -> Tokenizer:
    """The tokenizer saved in a directory. Raises ConfigError if there is none, or only a slow (Python) one."""
    check_directory(directory)
    with files.reading(files.to_path(directory)):
        local = files.local_copy(directory, TOKENIZER_FILES)
    if not _has(directory, "tokenizer.json") and _has(directory, "tokenizer.model"):
        _check_sentencepiece(os.path.join(local, "tokenizer.model"))
    # Takes seconds to import, so only when a tokenizer is loaded.
    from transformers import AutoTokenizer

    try:
        # Any: its stub allows None, which it never returns.
        hf: Any = AutoTokenizer.from_pretrained(local, use_fast=True, local_files_only=True)
    except Exception as error:  # a broken file makes transformers and its Rust half raise any type, bare Exception too
        if _has(directory, "tokenizer.json"):
            _read_object(directory, "tokenizer.json")
        reason = str(error).strip().split("\n")[0][:REASON_CHARS]
        raise ConfigError(
            f"data: the tokenizer in {directory!r} cannot be read: {type(error).__name__}: {reason}"
        ) from error
    if not hf.is_fast:
        raise ConfigError(
            f"data: {directory!r} holds a slow tokenizer; save tokenizer.json (its fast form) there."
        )
    backend = hf.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    added = [token.content for token in hf.added_tokens_decoder.values() if token.special]
    specials = {*hf.all_special_tokens, *added}
    if "" in specials:
        raise ConfigError(
            f"data: {directory!r}: the empty string is a special token; remove it from tokenizer.json."
        )
    if not set(backend.get_vocab(with_added_tokens=True)) - specials:
        raise ConfigError(
            f"data: the vocabulary in {directory!r} is empty; download or save the tokenizer again."
        )
    candidates = (hf.pad_token_id, hf.unk_token_id, hf.eos_token_id, 0)
    pad_id = next(i for i in candidates if i is not None)
    return Tokenizer(backend, _put_in_front(backend), hf.eos_token_id, pad_id, sorted(specials))


def _check_sentencepiece(path: str) -> None:
    """Raises ConfigError for a damaged model, for which transformers would ask for the library of another format."""
    from sentencepiece import SentencePieceProcessor

    _check_is_the_file(path)
    try:
        SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data: {path!r} is no SentencePiece model, or a part of one; download it again, or save tokenizer.json there."
        ) from error


def _put_in_front(backend: Backend) -> list[int]:
    """The ids that transformers' call puts before a text: those its post-processor marks as added before the text's own.

    A tokenizer may name a BOS and not add it (SmolLM, GPT-2), and `add_bos_token` is lost when transformers saves one.
    """
    text = Backend(models.WordLevel({"a": 0}, unk_token="a")).encode("a")  # any one id
    whole = backend.post_process(text, None, add_special_tokens=True)
    pairs = zip(whole.ids, whole.special_tokens_mask, strict=True)
    return [i for i, added in itertools.takewhile(lambda pair: pair[1], pairs)]
