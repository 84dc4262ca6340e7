"""A model to ask from Python: what `vlm_jax.load` returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from matplotlib.figure import Figure

from vlm_jax import compressors, sharding
from vlm_jax.compressors import with_tokens
from vlm_jax.data.records import IMAGE
from vlm_jax.data.rows import make_pixels
from vlm_jax.inference import placement, views
from vlm_jax.inference.answer import Answerer
from vlm_jax.inference.batching import Batcher, Ticket, texts
from vlm_jax.inference.conversation import Conversation
from vlm_jax.inference.prompts import Picture, Pictures, Prompter, listed, plain_errors
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.inference.slots import SLOTS_STEP, Sampling, Slots, at_least, ladder, make_slots, sized
from vlm_jax.models.attention import for_inference
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import weights
from vlm_jax.storage.opened import Opened

MAX_NEW_TOKENS = 128  # per answer, as in an evaluation
ROWS = 8  # of ask_many
PICTURE_PX = 640  # at least, of the picture under a token map


class Model:
    """A vision-language model and its tokenizer on a mesh.

    An answer depends on its own picture, question and settings only. It is the text that `vlm_jax.evaluate` gets for the
    same question, whichever method is called and whatever shares the batch. Pictures are paths, encoded bytes, PIL images
    or uint8 arrays [H W 3]; a list of them is several pictures of one question, which stand before it; None is no picture.
    """

    def __init__(self, opened: Opened, mesh: MeshConfig | None = None):
        """mesh: None = the first device; else all devices, where data * fsdp must be 1. Raises ConfigError otherwise."""
        devices = jax.local_devices()[:1] if mesh is None else None
        self.mesh = placement.mesh_for(opened.model, mesh or MeshConfig(), devices)
        if sharding.batch_ways(self.mesh) > 1:
            raise ConfigError(
                f"load: a question is one row, but the mesh splits rows over {sharding.batch_ways(self.mesh)} devices; give "
                "MeshConfig(data=1, tensor=-1)."
            )
        self.opened = opened
        self.config = for_inference(opened.model, self.mesh.devices.flat[0])
        self.params = opened.load(weights.answering(self.config, self.mesh))
        self.prompter = Prompter.of(opened.data, self.config.vit)
        grid = self.config.vit.grid
        self.visual_tokens = self.config.compressor.num_tokens(grid)  # per picture
        self.chat_format = self.prompter.chat(self.visual_tokens)
        self.tokenizer = self.chat_format.tokenizer

    @property
    def visual_token_choices(self) -> tuple[int, ...]:
        """The numbers of visual tokens that were trained for, ascending. Elastic compressors (MQT, M3, querypool) have several."""
        if not self.config.compressor.elastic:
            return (self.visual_tokens,)
        return tuple(reversed(compressors.train_tokens(self.config.compressor, self.config.vit.grid)))  # fmt: skip

    def ask(
        self,
        image: Pictures,
        question: str,
        *,
        visual_tokens: int = 0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
    ) -> str:
        """The answer to a question.

        Args:
          visual_tokens: per picture; 0 = the model's. Elastic compressors can show fewer than they were trained for.
          max_new_tokens: the answer is cut after so many.
          temperature: 0 = the likeliest token each time; else tokens are drawn from logits / temperature.
          top_p: draw among the fewest likeliest tokens that hold this probability.
          seed: of the draws. system: a system prompt in place of the model's own.

        Raises ConfigError, in one line, for a picture that cannot be read, a prompt that is too long, a wrong setting.
        """
        sampling = check_sampling(temperature, top_p, seed, max_new_tokens)
        ticket = self.ticket(image, question, sampling, max_new_tokens, visual_tokens, system)
        self._answer([ticket], 1)
        return self.text(ticket)

    def stream(
        self,
        image: Pictures,
        question: str,
        *,
        visual_tokens: int = 0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
    ) -> Iterator[str]:
        """The answer of `ask`, with the same arguments, in pieces as it grows. To stop it, stop iterating."""
        sampling = check_sampling(temperature, top_p, seed, max_new_tokens)
        ticket = self.ticket(image, question, sampling, max_new_tokens, visual_tokens, system)
        batcher = self.batcher(1, self.room([ticket]))
        batcher.submit(ticket)
        return _cancelling(ticket, texts(ticket, batcher, self.tokenizer))

    def ask_many(
        self,
        questions: Sequence[tuple[Pictures, str]],
        *,
        visual_tokens: int = 0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        rows: int = ROWS,
    ) -> list[str]:
        """The answers of `ask` to many (image, question) pairs of any lengths, in their order.

        rows: answers that grow at the same time; one that ends makes room for the next question.
        """
        sampling = check_sampling(temperature, top_p, seed, max_new_tokens)
        if rows < 1:
            raise ConfigError(f"ask_many: rows must be 1 or more, got {rows}.")
        for pair in questions:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ConfigError(f"ask_many: expected (image, question) pairs, got {pair!r:.80}.")
        tickets = [
            self.ticket(image, question, sampling, max_new_tokens, visual_tokens, system)
            for image, question in questions
        ]
        self._answer(tickets, min(rows, max(len(tickets), 1)))
        return [self.text(ticket) for ticket in tickets]

    def chat(
        self,
        images: Pictures = None,
        *,
        visual_tokens: int = 0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
    ) -> Conversation:
        """A conversation, about pictures or none. Its arguments are those of `ask`; pictures and turns are read once."""
        sampling = check_sampling(temperature, top_p, seed, max_new_tokens)
        count = self.checked_tokens(visual_tokens)
        room = self.context(max_new_tokens)
        parts = (self.prompter, self.params, self.mesh, self.tokenizer)
        slots = self.slots(1, room, count)
        return Conversation(*parts, slots, count, listed(images), sampling, max_new_tokens, system)

    def loss(self, image: Pictures, question: str, answer: str) -> float:
        """The mean cross-entropy in nats of the tokens of an answer, the one that closes it included, given the question."""
        record = self.prompter.record(listed(image), [(question, None)], None)
        row = {"id": "0", "image": listed(image), "conversations": _said(question, len(record.images))}  # fmt: skip
        answerer = self._answerer(len(record.images))
        with plain_errors():
            (((_, (likelihood,)),),) = answerer.likelihoods([row | {"replies": [answer]}], "/", 1)
            (ids,) = self.chat_format.replies(record, [answer])
        return float(-likelihood / len(ids))

    def token_map(
        self,
        image: Picture,
        question: str,
        *,
        visual_tokens: int = 0,
        answer: str | None = None,
    ) -> Figure:
        """Where the visual tokens of a picture look when the question is asked: the figure of `vlm_jax.show`.

        visual_tokens: as in `ask`. answer: written above it; None = the model's own. Save it with `.savefig("map.png")`; a notebook shows it.
        """
        (source,) = listed([image])
        row = {"id": "0", "image": [source], "conversations": _said(question, 1)}
        with plain_errors():
            shown = views.look(self._answerer(1, self.checked_tokens(visual_tokens)), row, "/")
        vit, data = self.config.vit, self.opened.data
        side = vit.image_px * math.ceil(PICTURE_PX / vit.image_px)
        pixels = dataclasses.replace(make_pixels(data, vit), image_px=side)
        record = self.prompter.record([source], [(question, None)], None)
        with plain_errors():
            picture = pixels.load(record, source)
        cut = side * vit.grid * vit.patch_px // vit.image_px  # a narrower border is not seen
        said = answer
        if said is None:
            said = self.ask(image, question, visual_tokens=visual_tokens)
        return views.draw(self.config.compressor.name, picture[:cut, :cut], vit.grid, shown, question, said)  # fmt: skip

    # --- what the server and the chat build on -----------------------------------------------------------------------

    def ticket(
        self,
        images: Pictures,
        question: str,
        sampling: Sampling,
        max_new_tokens: int,
        visual_tokens: int = 0,
        system: str | None = None,
    ) -> Ticket:
        """A question as a request of a Batcher. Raises ConfigError as `ask` does."""
        count = self.checked_tokens(visual_tokens)
        record = self.prompter.record(listed(images), [(question, None)], system)
        return Ticket(self.prompter.prompt(record, count), count, max_new_tokens, sampling)

    def checked_tokens(self, visual_tokens: int) -> int:
        """The number of visual tokens that 0, or a number the compressor can give, stands for. Raises ConfigError."""
        if not visual_tokens or visual_tokens == self.visual_tokens:
            return self.visual_tokens
        compressor, grid = self.config.compressor, self.config.vit.grid
        if not compressor.elastic:
            raise ConfigError(
                f"visual_tokens {visual_tokens}: {compressor.name} gives the {self.visual_tokens} it was trained for; models "
                "with mqt, m3 or querypool can show other numbers."
            )
        return with_tokens(compressor, grid, visual_tokens).num_tokens(grid)

    def slots(self, rows: int, length: int, visual_tokens: int = 0) -> Slots:
        """The functions for `rows` rows of `length` slots. visual_tokens: of what `extend` reads, 0 = the model's."""
        return make_slots(sized(self.config, visual_tokens or self.visual_tokens), rows, length)

    def batcher(self, rows: int, length: int) -> Batcher:
        """An empty Batcher of `rows` rows of `length` slots."""
        return Batcher(self.slots(rows, length), self.params, self.mesh, self.chat_format.closing_ids)  # fmt: skip

    def context(self, max_new_tokens: int) -> int:
        """Slots that hold the longest prompt and its answer."""
        return self.prompter.widths(self.visual_tokens)[-1] + max_new_tokens

    def room(self, tickets: Sequence[Ticket]) -> int:
        """Slots that hold each of the tickets' prompts and answers, one of few sizes."""
        most = max((t.prompt.width + t.max_new_tokens for t in tickets), default=1)
        return at_least(ladder(SLOTS_STEP, max(most, SLOTS_STEP) * 2), most)

    def text(self, ticket: Ticket) -> str:
        return self.tokenizer.decode(ticket.tokens).strip()

    def _answer(self, tickets: Sequence[Ticket], rows: int) -> None:
        batcher = self.batcher(rows, self.room(tickets))
        for ticket in tickets:
            batcher.submit(ticket)
        batcher.run()

    def _answerer(self, images: int, visual_tokens: int = 0) -> Answerer:
        """The evaluation's way to ask, with the parameters that are loaded already."""
        data = dataclasses.replace(self.opened.data, features_dir="", turns="dialogue")
        data = dataclasses.replace(data, max_images=max(images, data.max_images))
        run = dataclasses.replace(self.opened, data=data, load=lambda wanted: self.params)
        count = 0 if visual_tokens == self.visual_tokens else visual_tokens
        return Answerer(EvalConfig(self.opened.where, 1, 1, visual_tokens=count), self.mesh, run)


def _cancelling(ticket: Ticket, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of an answer, whose request ends when they are no longer asked for."""
    try:
        yield from pieces
    finally:
        ticket.cancelled = True


def check_sampling(temperature: float, top_p: float, seed: int, max_new_tokens: int) -> Sampling:
    """Raises ConfigError for a value out of range."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must lie in (0, 1], got {top_p}.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
    return Sampling(float(temperature), float(top_p), int(seed))


def _said(question: str, images: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{IMAGE}\n" * images + question}]
