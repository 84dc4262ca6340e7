"""The thread that answers: it alone steps the batcher. Every program is compiled before the first request."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vlm_jax import sharding
from vlm_jax.data.rows import Batch
from vlm_jax.inference import timing
from vlm_jax.inference.batching import Ticket
from vlm_jax.inference.model import Model
from vlm_jax.inference.prompts import Prompt, Prompter
from vlm_jax.serving.limits import Limits, Refused, busy
from vlm_jax.serving.protocol import Asked
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger("vlm_jax.serve")

MOST_CHOICES = 6  # numbers of visual tokens that an elastic model is served with


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, **more: Any) -> Any:
            return kind(f"vlm_jax_{name}", text, registry=self.registry, **more)

        seconds = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        self.requests = make(Counter, "requests", "Requests by HTTP status", labelnames=["status"])
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts, visual ones included")  # fmt: skip
        self.answer_tokens = make(Counter, "answer_tokens", "Tokens of answers")
        self.cancelled = make(Counter, "cancelled", "Answers whose client went away or ran out of time")  # fmt: skip
        self.first = make(Histogram, "first_token_seconds", "From arrival to the first token", buckets=seconds)  # fmt: skip
        self.whole = make(Histogram, "request_seconds", "From arrival to the last token", buckets=seconds)  # fmt: skip
        self.live = make(Gauge, "rows_live", "Answers that grow now")
        self.waiting = make(Gauge, "requests_waiting", "Requests that wait for a row")
        self.programs = make(Gauge, "programs_compiled", "Compiled so far; constant under load")


class Engine:
    """A model that answers the requests of many threads."""

    def __init__(self, model: Model, limits: Limits, choices: tuple[int, ...] = ()):
        """choices: numbers of visual tokens that requests may ask for; () = those trained for, at most MOST_CHOICES.

        Raises ConfigError for a number that the model cannot give, or a prompt limit that holds no picture.
        """
        self.model, self.limits, self.metrics = model, limits, Metrics()
        trained = model.visual_token_choices
        every = -(-len(trained) // MOST_CHOICES)
        self.choices = tuple(sorted({model.checked_tokens(n) for n in choices or trained[::-1][::every]}))  # fmt: skip
        self.default = model.visual_tokens if model.visual_tokens in self.choices else self.choices[-1]  # fmt: skip
        data = model.prompter.data
        data = dataclasses.replace(
            data, max_tokens=min(limits.prompt_tokens, data.max_tokens),
            max_image_pixels=min(limits.image_pixels, data.max_image_pixels), max_images=min(limits.images, data.max_images),
        )  # fmt: skip
        if data.max_images and data.max_tokens <= self.choices[-1]:
            raise ConfigError(
                f"serve: prompts of {data.max_tokens} tokens hold no picture of {self.choices[-1]} visual tokens; raise "
                "--prompt-tokens."
            )
        self.prompter = Prompter(data, model.config.vit)
        self.widths = {n: self.prompter.widths(n) for n in self.choices}
        room = max(widths[-1] for widths in self.widths.values()) + limits.max_new_tokens
        self.batcher = model.batcher(limits.rows, room)
        self.reference: dict[int, dict[str, float]] = {}
        self.draining = False
        self._stopped = False
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vlm_jax batcher", daemon=True)

    # --- a request ---------------------------------------------------------------------------------------------------

    def ticket(self, asked: Asked) -> Ticket:
        """What a request waits on. Pictures are decoded and words tokenised here, in the caller's thread. Raises Refused."""
        count = self.count(asked)
        if asked.record.images and not self.prompter.data.max_images:
            raise Refused(400, "this model takes no pictures.")
        try:
            prompt = self.prompter.prompt(asked.record, count)
        except ConfigError as error:
            long = "more than max_tokens" in str(error)
            raise Refused(400, str(error), "context_length_exceeded" if long else "invalid_image") from None  # fmt: skip
        return Ticket(prompt, count, asked.max_new_tokens, asked.sampling)

    def count(self, asked: Asked) -> int:
        """The number of visual tokens that a request asks for. Raises Refused for one that is not served."""
        count = asked.visual_tokens or self.default
        if count not in self.choices:
            raise Refused(400, f"visual_tokens {count} is not served; use one of {', '.join(map(str, self.choices))}.")  # fmt: skip
        return count

    def submit(self, ticket: Ticket, changed: Callable[[], object]) -> None:
        """Queues a request; `changed` is called from the engine's thread after each token. Raises Refused when it is full."""
        if self.draining or self._stopped:
            raise Refused(503, "the server is shutting down.", "shutting_down", retry_s=5)
        if len(self.batcher.waiting) >= self.limits.queue:
            raise busy(len(self.batcher.waiting))
        ticket.changed = lambda _: changed()
        self.batcher.submit(ticket)
        self._work.set()

    def ended(self, ticket: Ticket) -> None:
        """Counts a request that is over."""
        self.metrics.prompt_tokens.inc(ticket.prompt.length)
        self.metrics.answer_tokens.inc(len(ticket.tokens))
        if ticket.first:
            self.metrics.first.observe(ticket.first - ticket.asked)
            self.metrics.whole.observe(ticket.last - ticket.asked)
        if ticket.cancelled:
            self.metrics.cancelled.inc()

    def cost(self, ticket: Ticket) -> dict[str, Any]:
        """Milliseconds and GFLOPs of an answer, and what the same would take with every patch as a visual token."""
        everything = self.model.config.vit.num_patches
        text = ticket.prompt.length - ticket.prompt.images * ticket.visual_tokens
        later, answer = len(ticket.tokens), len(ticket.tokens) + 1

        def way(count: int) -> dict[str, Any]:
            times = self.reference.get(count, {})
            spent = {n: ms * (later if n == "decode" else 1) for n, ms in times.items()}
            if not ticket.prompt.images:
                spent |= {n: 0.0 for n in ("encoder", "compressor") if n in spent}
            work = timing.gflops(self.model.config, count, text, answer, ticket.prompt.images)
            return {"visual_tokens": count, "typical_ms": spent, "gflops": work}

        return {"milliseconds": ticket.milliseconds, "this": way(ticket.visual_tokens), "all_patches": way(everything)}  # fmt: skip

    # --- the thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Compiles every program, measures what a visual token costs, and begins to answer."""
        began = time.perf_counter()
        self._warm_up()
        self.reference = timing.calibrate(self.model, self.choices)
        self.metrics.programs.set(self.batcher.slots.compilations)
        log.info("compiled %d programs in %.0f s", self.batcher.slots.compilations, time.perf_counter() - began)  # fmt: skip
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what has not been answered is cancelled."""
        self._stopped = self.draining = True
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        batcher, metrics = self.batcher, self.metrics
        while not self._stopped:
            try:
                busy_now = batcher.step()
            except Exception:  # of the device; those who wait are told
                log.exception("a step failed; its requests are cancelled")
                busy_now = True
                for ticket in batcher.abandon():
                    ticket.finished = "error"
                    ticket.changed(ticket)
            metrics.live.set(batcher.live)
            metrics.waiting.set(len(batcher.waiting))
            metrics.programs.set(batcher.slots.compilations)
            if not busy_now:
                self._work.wait(0.5)
                self._work.clear()

    def _warm_up(self) -> None:
        """Runs each program once: every width with no picture to the most, every size of a step."""
        batcher = self.batcher
        for count, widths in self.widths.items():
            for width in widths:
                for images in range(self.prompter.data.max_images + 1):
                    if images * count < width and (images or count == self.choices[0]):
                        batcher.submit(Ticket(self._blank(width, images, count), count, 1))
        batcher.run()
        with sharding.use(batcher.mesh):
            for rows in batcher.slots.row_sizes:
                for slots in batcher.slots.slot_sizes:
                    batcher.state, _ = batcher.slots.step(batcher.params, batcher.state, rows, slots)  # fmt: skip

    def _blank(self, width: int, images: int, visual_tokens: int) -> Prompt:
        vit, chat = self.model.config.vit, self.prompter.chat(visual_tokens)
        zeros = np.zeros((1, width), np.int32)
        index = zeros - 1
        index[0, : images * visual_tokens] = np.arange(images * visual_tokens)
        positions = np.arange(width, dtype=np.int32)[None]
        batch: Batch = {"tokens": zeros, "visual_index": index, "positions": positions, "segments": zeros}  # fmt: skip
        if images:
            query = (1, images, chat.max_query_tokens if chat.queries else 0)
            batch["images"] = np.zeros((1, images, vit.image_px, vit.image_px, 3), np.uint8)
            batch |= {"query_tokens": np.zeros(query, np.int32), "query_mask": np.zeros(query, bool)}  # fmt: skip
        return Prompt(batch, width, width, images)
