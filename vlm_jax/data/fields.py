"""Which fields of a record are read, and which of the others make a record bad.

A field that is not read is ignored when it cannot change what is learnt (source, split, width, question_id, ...). The name
or the shape of some fields says that they could: they name pictures, video or sound, say which text is learnt, or hold text
of the conversation. A record with such a field is bad, unless the field is empty or listed in `data.ignored_fields`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

RECORD = frozenset({"id", "conversations", "messages", "image", "images", "system"})
WEIGHTS = ("loss", "weight", "train")  # three names for whether an answer is supervised
MESSAGE = frozenset({"from", "value", "role", "content", *WEIGHTS})

PICTURE_WORDS = frozenset({"image", "img", "picture", "photo"})
# A field named by one of these words alone holds such media.
MEDIA_NAMES = PICTURE_WORDS | {"video", "audio"}
MEDIA_WORDS = MEDIA_NAMES | {
    "pic", "pixel", "frame", "clip", "sound", "speech", "voice", "depth", "mask", "media",
}  # fmt: skip
LOSS_WORDS = frozenset({*WEIGHTS, "trainable", "mask", "masked", "supervise", "supervised"})
TEXT_WORDS = frozenset(
    {"system", "tool", "function", "history", "chosen", "rejected", "prefix", "reasoning", "thinking", "thought"}
)  # fmt: skip
DESCRIBING = frozenset({"id", "size", "width", "height", "split", "num", "count"})  # image_id, ...
FILE = re.compile(
    r"(?i)^data:|://|\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|npy|npz|mp4|webm|mkv|avi|mov|mp3|wav|flac|ogg|m4a)$"
)
_EMPTY = (None, "", "[]", "{}", [], {}, (), False)


def check_record(values: Mapping[str, Any], ignored: Collection[str], has_pictures: bool) -> None:
    """Raises ValueError for the first field of a record that is not read and could change what is learnt.

    has_pictures: whether pictures of the record are read.
    """
    for name in values:
        if name in RECORD or name in ignored:
            continue
        meaning = _meaning(name, values[name], has_pictures)
        if meaning:
            raise ValueError(refusal(f"field {name!r}", meaning))


def check_message(message: Mapping[str, Any], number: int, ignored: Collection[str]) -> None:
    """Raises ValueError for the first field of a message that is not read and could change what is learnt."""
    for name, value in message.items():
        if name in MESSAGE or name in ignored:
            continue
        meaning = _meaning(name, value, has_pictures=False)
        if meaning:
            raise ValueError(refusal(f"message {number}: field {name!r}", meaning))


def refusal(what: str, meaning: str) -> str:
    return (
        f"{what} is not read, but {meaning}; mend the record, or name the field in data.ignored_fields "
        "to train as if it were not there"
    )


def _meaning(name: str, value: Any, has_pictures: bool) -> str:
    """Why a field that is not read could change training, as the end of a sentence; "" if it cannot."""
    parts = words(name)
    if name in WEIGHTS:
        return "" if value is None or value in (True, 1) else "says how much is learnt from it"
    if _holds_turns(value):
        return "holds turns of a conversation"
    if _is_empty(value) or parts & DESCRIBING:
        return ""
    if parts & MEDIA_WORDS and not (has_pictures and parts & PICTURE_WORDS):
        whole = parts <= MEDIA_NAMES  # "video", not "video_source"
        if any(whole or not isinstance(v, str) or FILE.search(v) for v in _things(value)):
            return "names pictures, video or sound"
    if parts & LOSS_WORDS and not isinstance(value, str):
        return "says which text is learnt"
    return "holds text that belongs to the conversation" if parts & TEXT_WORDS else ""


@functools.lru_cache(4096)
def words(name: str) -> frozenset[str]:
    """The words of a field's name in the singular: {"image", "path"} of image_paths and imagePath."""
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return frozenset(re.sub(r"(?<!s)s$", "", word.lower()) for word in found)


def _is_empty(value: Any) -> bool:
    return value != value or any(value is e or value == e for e in _EMPTY)  # NaN is empty, too


def _things(value: Any) -> Iterator[Any]:
    """The texts, bytes and objects in a value, also inside lists. Numbers are left out: they describe and name nothing."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _things(item)
    elif value is not None and not isinstance(value, (bool, int, float)):
        yield value


def _holds_turns(value: Any) -> bool:
    """Whether the value is a message of a conversation, or a list that contains one."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(item, dict)
        and any(isinstance(item.get(key), str) for key in ("from", "role"))
        and ("value" in item or "content" in item)
        for item in items
    )
