"""A question as what the model takes: one left-padded row of one of a few widths, with its pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data.chat import Chat, Unit
from vlm_jax.data.images import to_rgb
from vlm_jax.data.records import IMAGE, BadRecord, Record, parse
from vlm_jax.data.rows import Batch, make_chat, make_pixels
from vlm_jax.files import ImageSource, to_path
from vlm_jax.inference.slots import at_least, ladder, rounded
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import ViTConfig
from vlm_jax.settings.run import DataConfig

TEXT_STEP = 64  # widths of prompts: one picture's visual tokens and 64, 128, 256, .. of text
MORE_STEP = 32  # widths of what is read behind an earlier turn: 32, 64, 128, ..
MAX_IMAGES = 16  # of one conversation

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture] | None
Turns = Sequence[tuple[str, str | None]]  # (question, its answer; None for the last)


class Prompt(NamedTuple):
    """What is read for a question. batch: a batch of one row, as data/eval_batches.py makes them."""

    batch: Batch
    width: int  # slots of the row
    length: int  # of these, filled ones
    images: int


class Item(NamedTuple):
    """One token of a prompt, or all visual tokens of a picture: then `token` is -1."""

    token: int
    image: int = -1
    query: tuple[int, ...] = ()  # what a compressor reads


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Makes prompts as a run of these settings does in an evaluation, with as many pictures as asked for."""

    data: DataConfig
    vit: ViTConfig

    @classmethod
    def of(cls, data: DataConfig, vit: ViTConfig) -> Prompter:
        """data: of the run. Turns see each other, whatever they did in training: one question is the same either way."""
        most = MAX_IMAGES if data.max_images else 0
        return cls(dataclasses.replace(data, features_dir="", turns="dialogue", max_images=most), vit)  # fmt: skip

    def chat(self, visual_tokens: int) -> Chat:
        return make_chat(self.data, visual_tokens)

    @functools.lru_cache(8)  # noqa: B019 (a Prompter lives as long as its model)
    def widths(self, visual_tokens: int) -> tuple[int, ...]:
        """The widths that a prompt is padded to, ascending."""
        limit = rounded(self.data.max_tokens)
        texts = ladder(TEXT_STEP, max(limit, TEXT_STEP))
        visual = visual_tokens if self.data.max_images else 0
        return tuple(sorted({min(rounded(visual + text), limit) for text in texts}))

    def record(
        self,
        images: Sequence[ImageSource],
        turns: Turns,
        system: str | None,
        shown: Sequence[int] | None = None,
    ) -> Record:
        """A conversation. shown: how many of the pictures each turn has seen; None: all stand before the first question.

        Raises ConfigError for what cannot be asked.
        """
        if images and not self.data.max_images:
            raise ConfigError("this model was trained without pictures; ask it without one.")
        shown = shown or [len(images)] * len(turns)
        said = []
        for (question, answer), before, now in zip(turns, (0, *shown), shown, strict=False):
            if not isinstance(question, str):
                raise ConfigError(f"question: must be a text, got {type(question).__name__}.")
            said.append({"from": "human", "value": f"{IMAGE}\n" * (now - before) + question})
            if answer is not None:
                said.append({"from": "gpt", "value": answer})
        raw: dict[str, Any] = {"image": list(images), "conversations": said}
        raw |= {} if system is None else {"system": system}
        with plain_errors():
            return parse(raw, "question", "/", "", generate=True)

    def prompt(self, record: Record, visual_tokens: int) -> Prompt:
        """The whole of a record. Raises ConfigError when it is too long or a picture cannot be read."""
        with plain_errors():
            units = self.chat(visual_tokens).prompt(record)
            length = self.chat(visual_tokens).length(units)
            width = at_least(self.widths(visual_tokens), length)
            return self._laid_out(record, units, range(len(record.images)), width, visual_tokens)

    def items(self, record: Record, visual_tokens: int) -> list[Item]:
        """The tokens and pictures of a record, in their order."""
        with plain_errors():
            units = self.chat(visual_tokens).prompt(record)
        queries, mask = self.chat(visual_tokens).query_arrays(record)
        found: list[Item] = []
        image = 0
        for unit in units:
            if unit.ids is None:
                query = tuple(queries[image][mask[image]].tolist())
                found.append(Item(-1, image, query))
                image += 1
            else:
                found += [Item(int(token)) for token in unit.ids]
        return found

    def rest(self, record: Record, items: Sequence[Item], visual_tokens: int) -> Prompt:
        """The last `items` of a record; positions start at 0."""
        units = [_IMAGE if i.token < 0 else Unit(np.array([i.token], np.int32), np.zeros(1, bool)) for i in items]  # fmt: skip
        length = self.chat(visual_tokens).length(units)
        width = at_least(ladder(MORE_STEP, 2 * length + MORE_STEP), length)
        images = [item.image for item in items if item.token < 0]
        with plain_errors():
            return self._laid_out(record, units, images, width, visual_tokens)

    def _laid_out(
        self,
        record: Record,
        units: Sequence[Unit],
        images: Sequence[int],
        width: int,
        visual_tokens: int,
    ) -> Prompt:
        chat, pixels = self.chat(visual_tokens), make_pixels(self.data, self.vit)
        row = chat.lay_out(record, units, width, left=True)
        batch: Batch = {name: x[None] for name, x in row._asdict().items() if name != "loss_mask"}
        if images:
            tokens, mask = chat.query_arrays(record)
            chosen = list(images)
            found = [pixels.load(record, record.images[i]) for i in chosen]
            batch["images"] = np.stack(found)[None]
            batch |= {"query_tokens": tokens[None, chosen], "query_mask": mask[None, chosen]}
        return Prompt(batch, width, chat.length(units), len(images))


_IMAGE = Unit(None, np.zeros(0, bool))


@contextlib.contextmanager
def plain_errors() -> Generator[None, None, None]:
    """Turns a BadRecord of a question, which names a file and a record, into a ConfigError with its reason alone."""
    try:
        yield
    except BadRecord as error:
        raise ConfigError(f"question: {error.reason}.") from None


def encoded(image: Picture) -> ImageSource:
    """A picture as data/images.py reads it: an absolute path, or encoded bytes.

    image: path, encoded bytes, PIL image, or uint8 [H W 3] or [H W]. Raises ConfigError for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        text = os.fspath(image)
        return text if text.startswith("data:") or "://" in text else str(to_path(text).absolute())
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ConfigError(
                f"image: an array must be uint8 [H W 3] or [H W], got {image.dtype} {list(image.shape)}; values of 0..1 "
                "become (255 * x).round().astype('uint8')."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ConfigError(
            f"image: must be a path, encoded bytes, a PIL image or a uint8 array, got {type(image).__name__}."
        )
    data = io.BytesIO()
    to_rgb(image).save(data, "PNG", compress_level=1)
    return data.getvalue()


def listed(images: Pictures) -> list[ImageSource]:
    """One picture, several or none, as a list of what `encoded` gives."""
    if images is None:
        return []
    several: Any = images if isinstance(images, (list, tuple)) else [images]
    return [encoded(image) for image in several]
