"""OpenAI's chat completions: a request's JSON as a question with pictures, and an answer as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vlm_jax.data.records import BadRecord, Record, parse
from vlm_jax.inference.model import check_sampling
from vlm_jax.inference.slots import Sampling
from vlm_jax.serving.limits import MIB, Limits, Refused
from vlm_jax.settings.checks import ConfigError

# Fields that would change the answer in a way that is not computed here -> the values that change nothing.
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,), "audio": (),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "top_k": (0, -1), "min_p": (0,),
    "repetition_penalty": (1,), "stop_token_ids": ([],), "best_of": (1,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that may be answered."""

    record: Record
    sampling: Sampling
    max_new_tokens: int
    visual_tokens: int  # per picture; 0 = the model's
    stream: bool
    with_usage: bool  # a stream ends with a chunk that counts tokens
    stops: tuple[str, ...]  # the answer ends before the first of them
    answer: str  # of a token map: what is written above it


def read(body: bytes, model: str, limits: Limits) -> Asked:
    """A request's body. Raises Refused, with the status that clients expect, for what cannot be answered."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no valid JSON: {error!s:.200}.") from None
    if not isinstance(raw, dict):
        raise Refused(400, "the body must be a JSON object with 'model' and 'messages'.")
    if raw.get("model", model) != model:
        raise Refused(404, f"model {raw['model']!r:.80} is not served here; use {model!r}.", "model_not_found")  # fmt: skip
    for name, neutral in FIXED.items():
        if raw.get(name) is not None and raw[name] not in neutral:
            raise Refused(400, f"{name!r} is not supported; leave it out.", "unsupported_parameter")
    stops = raw.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, (list, tuple)) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):  # fmt: skip
        raise Refused(400, "'stop' must be a text, or up to four.")
    options = raw.get("stream_options") or {}
    if not isinstance(options, dict) or not isinstance(raw.get("stream") or False, bool):
        raise Refused(400, "'stream' must be true or false, and 'stream_options' an object.")
    wanted = _number(raw, "max_completion_tokens", _number(raw, "max_tokens", min(128, limits.max_new_tokens)))  # fmt: skip
    if wanted < 1:
        raise Refused(400, f"max_tokens {wanted:g} must be 1 or more.")
    if wanted > limits.max_new_tokens:
        raise Refused(400, f"max_tokens {wanted:g} is more than the {limits.max_new_tokens} of this server.")  # fmt: skip
    try:
        sampling = check_sampling(_number(raw, "temperature", 0.0), _number(raw, "top_p", 1.0), int(_number(raw, "seed", 0)), int(wanted))  # fmt: skip
        record = _record(raw.get("messages"), limits)
    except BadRecord as error:
        raise Refused(400, f"messages: {error.reason}.") from None
    except ConfigError as error:
        raise Refused(400, str(error)) from None
    usage = bool(options.get("include_usage"))
    count = int(_number(raw, "visual_tokens", 0))
    return Asked(
        record,
        sampling,
        int(wanted),
        count,
        bool(raw.get("stream")),
        usage,
        tuple(stops),
        str(raw.get("answer", "")),
    )


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**63) < value < 2**63:  # fmt: skip
        raise Refused(400, f"{name!r} must be a number, got {value!r:.60}.")
    return value


def _record(messages: Any, limits: Limits) -> Record:
    """The messages as a conversation whose last turn is to be answered; pictures are encoded bytes."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "'messages' must be a list that ends with a message of the user.")
    said, images = [], 0
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "developer":
            message = {**message, "role": "system"}
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [_part(part, limits) for part in content]
            images += sum(part.get("type") == "image" for part in parts if isinstance(part, dict))
            message = {**message, "content": parts}
        if isinstance(message, dict) and message.get("role") == "system":
            message = {**message, "content": _plain(message.get("content"))}
        said.append(message)
    if images > limits.images:
        raise Refused(400, f"{images} pictures; this server takes {limits.images} per request.")
    return parse({"messages": said}, "request", "/", "", generate=True)


def _plain(content: Any) -> Any:
    """A system message's parts as one text."""
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in content):  # fmt: skip
        return content
    return "".join(str(part.get("text")) for part in content)


def _part(part: Any, limits: Limits) -> Any:
    """A part of a message, its picture replaced by encoded bytes that are checked."""
    if not isinstance(part, dict) or part.get("type") not in ("image_url", "image"):
        return part
    source = next((part[name] for name in ("image_url", "image", "url") if part.get(name)), None)
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str):
        raise Refused(400, "a picture must be {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,...'}}.")  # fmt: skip
    return {"type": "image", "image": checked(_bytes(url, limits), limits)}


def _bytes(url: str, limits: Limits) -> bytes:
    if url.startswith(("http://", "https://")):
        if not limits.remote_images:
            raise Refused(400, "addresses of pictures are not fetched by this server; send a data: URL in base64.", "remote_image")  # fmt: skip
        return fetched(url, limits)
    if not url.startswith("data:"):
        raise Refused(400, f"a picture must be a data: URL in base64, got {url[:40]!r}.")
    if len(url) * 3 / 4 > limits.image_mib * MIB + 100:
        raise _too_large(limits)
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise Refused(400, f"a picture must be a data: URL in base64, got {head[:40]!r}.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refused(400, f"a picture is no valid base64: {error}.", "invalid_image") from None


def checked(data: Any, limits: Limits) -> bytes:
    """An encoded picture. Raises Refused for one that is too large, by its header, or no picture."""
    if len(data) > limits.image_mib * MIB:
        raise _too_large(limits)
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise _too_many_pixels(limits) from None
    except Exception:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise Refused(400, "a picture is in no format that can be read; send PNG, JPEG or WebP.", "invalid_image") from None  # fmt: skip
    if width * height > limits.image_pixels:
        raise _too_many_pixels(limits)
    return data


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"a picture is larger than {limits.image_mib:g} MiB.", "image_too_large")


def _too_many_pixels(limits: Limits) -> Refused:
    return Refused(413, f"a picture has more than {limits.image_pixels:,} pixels.", "image_too_large")  # fmt: skip


def fetched(url: str, limits: Limits) -> bytes:
    """The picture at an http(s) address. Raises Refused when it cannot be fetched or is too large."""
    most = int(limits.image_mib * MIB)
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            data = answer.read(most + 1)
    except (OSError, ValueError) as error:
        raise Refused(400, f"the picture at {url[:100]!r} cannot be fetched: {error!s:.100}.", "invalid_image_url") from None  # fmt: skip
    if len(data) > most:
        raise _too_large(limits)
    return data


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reply:
    """The parts of an answer's JSON that stay the same."""

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, usage: Mapping[str, int], cost: Any) -> dict[str, Any]:
        """A chat.completion. cost: milliseconds and FLOPs of this answer, a field of our own."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage, "vlm_jax": cost}  # fmt: skip

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A chat.completion.chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def counts(self, usage: Mapping[str, int], cost: Any) -> dict[str, Any]:
        """The chunk without a choice that ends a stream with include_usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage, "vlm_jax": cost}  # fmt: skip

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(content: Mapping[str, Any] | str) -> str:
    """One server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(ends)], True) if ends else (text, False)


def unsure(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0) - 1
    ends = range(min(longest, len(text)), 0, -1)
    return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in stops)), 0)
