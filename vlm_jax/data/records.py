"""One record as users write it: its pictures, its system prompt and its conversation, checked field by field.

    {"id", "image" or "images", "system", "conversations": [{"from": "human" | "gpt" | "system", "value"}, ...]}
    {"messages": [{"role": "user" | "assistant" | "system", "content": text or [{"type": "text" | "image", ...}]}, ...]}

An answer whose "loss", "weight" or "train" is 0 or false is read but not supervised. `fields` says what other fields may be
in a record.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vlm_jax.data import fields
from vlm_jax.files import ImageSource
from vlm_jax.settings.checks import ConfigError

IMAGE = "<image>"
HUMAN, GPT, SYSTEM = "human", "gpt", "system"
SPEAKERS = {HUMAN: HUMAN, GPT: GPT, SYSTEM: SYSTEM}  # of messages with from and value
ROLES = {"user": HUMAN, "assistant": GPT, "system": SYSTEM}  # of messages with role and content
SOURCES = ("image", "image_url", "path", "url")  # where a part of a message names its picture
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://")
_DATA = re.compile(r"(?is)data:[^,]*;base64,(.*)")
_TAGGED = re.compile(r"<img>.*?</img>", re.S)  # Qwen-VL's way to name a picture inside the text


class BadRecord(ConfigError):
    """A record that cannot be used: which file, which record (its id, index or line), and why."""

    def __init__(self, file: str, record_id: str, reason: str):
        super().__init__(f"data: {file}: record {record_id}: {reason}")
        self.file, self.record_id, self.reason = file, record_id, reason

    def __reduce__(self):
        return type(self), (self.file, self.record_id, self.reason)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with its pictures, and its answer (None: to be generated).

    places: the character offset of each picture in the question, ascending; (): all pictures precede the question.
    """

    images: int
    question: str
    answer: str | None
    places: tuple[int, ...] = ()
    learnt: bool = True  # False: the answer is read, not supervised


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation. images: paths are relative to root. system: its own system prompt, if any."""

    file: str
    id: str
    root: str
    images: tuple[ImageSource, ...]
    system: str | None
    turns: tuple[Turn, ...]

    def bad(self, reason: str) -> BadRecord:
        return BadRecord(self.file, self.id, reason)


class Message(NamedTuple):
    role: str
    text: str
    learnt: bool


def parse(
    raw: Any,
    file: str,
    root: str,
    fallback_id: str,
    generate: bool = False,
    ignored: Collection[str] = (),
) -> Record:
    """The Record of a parsed JSON object. Raises BadRecord.

    An optional system message comes first. A gpt turn before the first human one is dropped, as LLaVA does. Then human and gpt
    turns alternate; the last one is gpt, or human if `generate`. ignored: fields that are read as if they were absent.
    """
    if not isinstance(raw, dict):
        raise BadRecord(file, fallback_id, f"expected an object, got {type(raw).__name__}")
    record_id = fallback_id
    try:
        if raw.get("id") is not None:
            if not isinstance(raw["id"], (str, int, float)):
                raise ValueError(f"'id' must be a string or a number, got {raw['id']!r:.60}")
            record_id = str(raw["id"])
        if ignored:
            raw = {name: value for name, value in raw.items() if name not in ignored}
        inside: list[ImageSource] = []
        messages = _messages(_conversation(raw), ignored, inside)
        if "image" in ignored:  # its placeholders are gone with it
            messages = [m._replace(text=m.text.replace(IMAGE, "").strip()) for m in messages]
        images = _images(raw, inside)
        if not raw.keys() <= fields.RECORD:
            fields.check_record(raw, ignored, bool(images))
        system = _system(raw, messages)
        turns = _turns(messages, generate)
        _check_images(images, turns, root, raw)
    except ValueError as error:
        raise BadRecord(file, record_id, str(error)) from None
    except RecursionError:
        raise BadRecord(file, record_id, "a value in it has too many levels") from None
    return Record(file, record_id, root, images, system, turns)


def _check_images(
    images: tuple[ImageSource, ...], turns: tuple[Turn, ...], root: str, raw: Mapping[str, Any]
) -> None:
    placeholders = sum(turn.images for turn in turns)
    if placeholders != len(images):
        named = [repr(name) for name in ("image", "images") if raw.get(name)]
        raise ValueError(
            f"{placeholders} {IMAGE} placeholders in human turns but {len(images)} images"
            + (f" (in {' and '.join(named)}); write {IMAGE} where each stands" if named else "")
        )
    if not root and any(isinstance(image, str) and not image.startswith("/") for image in images):
        raise ValueError("names an image, but its image_roots entry is empty")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _images(raw: Mapping[str, Any], inside: list[ImageSource]) -> tuple[ImageSource, ...]:
    """The pictures of a record, named by 'image', 'images' or the messages themselves (`inside`)."""
    given = {name: raw[name] for name in ("image", "images") if raw.get(name) is not None}
    found = {
        name: [_image(value, repr(name)) for value in (v if isinstance(v, (list, tuple)) else [v])]
        for name, v in given.items()
    }
    if inside:
        found = {name: images for name, images in found.items() if images} | {"messages": inside}
    (first, images), *others = found.items() or [("", [])]
    for name, more in others:
        if more != images:
            raise ValueError(f"its pictures are named by {first!r} and {name!r}; keep one of them")
    return tuple(images)


def _image(value: Any, name: str) -> ImageSource:
    if isinstance(value, bytes) or callable(value):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a path or a list of paths, got {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{name} is an empty path; a record without a picture has no {name}")
    data = _DATA.match(value)
    if data:
        try:
            return base64.b64decode("".join(data[1].split()), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name} is no valid base64: {error}") from None
    if value.startswith("data:"):
        raise ValueError(f"{name} {value[:60]!r} is not in base64")
    if value.startswith("file:///"):
        return value.removeprefix("file://")
    if _URL.match(value):
        raise ValueError(f"{name} {value[:200]!r} is a URL; download the picture and give its path")
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


def _conversation(raw: Mapping[str, Any]) -> list:
    given = {n: raw[n] for n in ("conversations", "messages") if raw.get(n) is not None}
    for name, value in given.items():
        if not isinstance(value, list):
            raise ValueError(f"has no list {name!r}: it is {value!r:.60}")
    if not given:
        names = ", ".join(map(repr, itertools.islice(raw, 8))) or "none"
        raise ValueError(f"has no list 'conversations' or 'messages'; its fields: {names}")
    conversation = next(iter(given.values()))
    if len(given) == 2 and not _agree(given["conversations"], given["messages"]):
        raise ValueError("'conversations' and 'messages' differ; keep one of them")
    return conversation


def _agree(read: list, other: list) -> bool:
    """Whether two lists of messages are equal in role and content, and in their weights if `other` has any."""

    def plain(message: Any, weights: bool) -> Any:
        if not isinstance(message, dict):
            return message
        role = message.get("from", message.get("role"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        kept = [message.get(name) for name in fields.WEIGHTS] if weights else []
        return [role, message.get("value", message.get("content")), *kept]

    weighted = any(isinstance(m, dict) and set(fields.WEIGHTS) & m.keys() for m in other)
    return [plain(m, weighted) for m in read] == [plain(m, weighted) for m in other]


def _messages(
    conversation: list, ignored: Collection[str], images: list[ImageSource]
) -> list[Message]:
    """The system message, if any, and the messages from the first question on. Appends their pictures to `images`."""
    messages = []
    for number, message in enumerate(conversation):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} needs 'from' and 'value', got {message!r:.60}")
        if not message.keys() <= fields.MESSAGE:
            fields.check_message(message, number, ignored)
        if "from" in message and "value" in message:
            key, names, role = "value", SPEAKERS, message["from"]
        elif "role" in message and "content" in message:
            key, names, role = "content", ROLES, message["role"]
        else:
            raise ValueError(f"message {number} needs 'from' and 'value', or 'role' and 'content'")
        if not isinstance(role, str) or role not in names or (role == SYSTEM and number):
            first, second, _ = names
            raise ValueError(
                f"message {number} is from {role!r}; expected {first!r} or {second!r} (or a first {SYSTEM!r})"
            )
        text, role = _text(message[key], number, key, images), names[role]
        messages.append(Message(role, text, _learnt(message, role, number)))
    # A leading answer has no question.
    first = messages[1:] if messages and messages[0].role == SYSTEM else messages
    if first and first[0].role == GPT:
        messages.remove(first[0])
    return messages


def _text(content: Any, number: int, key: str, images: list[ImageSource]) -> str:
    """A message's text with a placeholder per picture. A newline follows each picture before the text, as in LLaVA; a picture
    inside the text keeps its position."""
    if isinstance(content, str):
        if "<img>" in content and _TAGGED.search(content):
            raise ValueError(
                f"message {number} names a picture by <img>; write {IMAGE} there and its path in 'images'"
            )
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {number}: {key!r} must be a string, got {content!r:.60}")
    said = ""
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(
                    f"message {number}: the text of a part must be a string, got {part.get('text')!r:.60}"
                )
            if said and not said.replace(IMAGE, ""):  # the first text
                said = f"{IMAGE}\n" * said.count(IMAGE)
            said += part["text"]
        elif kind in ("image", "image_url"):
            said += IMAGE
            named = [part[name] for name in SOURCES if part.get(name) is not None]
            if named:
                source = named[0].get("url") if isinstance(named[0], dict) else named[0]
                images.append(_image(source, f"message {number}: the picture of a part"))
        else:
            raise ValueError(
                f"message {number} has a part of type {kind!r:.60}, which is not read; expected text or image"
            )
    return said


def _learnt(message: Mapping[str, Any], role: str, number: int) -> bool:
    """Whether an answer is supervised: its 'loss', 'weight' or 'train', if it has one."""
    if message.keys().isdisjoint(fields.WEIGHTS):  # nearly always
        return True
    found = {name: message[name] for name in fields.WEIGHTS if message.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {name!r} must be 0 or 1 (false or true), got {value!r:.60}"
            )
        if value and role != GPT and name != "weight":
            raise ValueError(
                f"message {number}: {name!r} asks to learn what {role!r} says; only answers are learnt"
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise ValueError(
            f"message {number}: {' and '.join(map(repr, found))} contradict each other"
        )
    return all(found.values())


def _system(raw: Mapping[str, Any], messages: list[Message]) -> str | None:
    """The record's own system prompt: its first message, which is removed from `messages`, or its field "system"."""
    given = raw.get("system")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"'system' must be a string, got {given!r:.60}")
    if not messages or messages[0].role != SYSTEM:
        return given
    said = messages.pop(0).text
    if given not in (None, said):
        raise ValueError("'system' and its first message are two system prompts; keep one of them")
    return said


def _turns(messages: list[Message], generate: bool) -> tuple[Turn, ...]:
    if not messages:
        raise ValueError("has no human turn")
    for number, message in enumerate(messages):
        if message.role != (HUMAN, GPT)[number % 2]:
            raise ValueError(
                f"two turns in a row are from {message.role!r}; {HUMAN!r} and {GPT!r} must alternate"
            )
    last = messages[-1].role
    if generate != (last == HUMAN):
        raise ValueError(f"the last turn is from {last!r}; expected {HUMAN if generate else GPT!r}")
    if not generate and not any(message.learnt for message in messages[1::2]):
        raise ValueError("none of its answers is learnt (loss, weight or train is 0 for each)")
    pairs = itertools.zip_longest(messages[::2], messages[1::2])
    return tuple(_turn(asked.text, said, i) for i, (asked, said) in enumerate(pairs))


def _turn(question: str, reply: Message | None, number: int) -> Turn:
    """A turn. Placeholders are removed from its question: a single picture precedes the question, several keep their offsets.

    # Differs from haotian-liu/LLaVA@c121f04 preprocess_multimodal: there two placeholders of a turn collapse into one,
    # which shifts the images of all later rows of the batch. LLaVA-NeXT leaves them in place, as here.
    """
    pieces = question.split(IMAGE)
    images, places = len(pieces) - 1, ()
    head = f"{IMAGE}\n" * images
    if images == 1:
        question = "".join(pieces).strip()
    elif images and question.startswith(head) and question[len(head) :].strip():
        question = question[len(head) :]
    elif images:
        question = "".join(pieces)
        places = tuple(itertools.accumulate(map(len, pieces[:-1])))
    elif not question.strip():
        raise ValueError(f"question {number} is empty and has no image")
    if reply is None:
        return Turn(images, question, None, places)
    if not reply.text.strip():
        raise ValueError(f"answer {number} is empty")
    if IMAGE in reply.text:
        raise ValueError(f"answer {number} contains {IMAGE}, which only a question may")
    # The template writes the space or newline before an answer.
    return Turn(images, question, reply.text.lstrip(), places, reply.learnt)
