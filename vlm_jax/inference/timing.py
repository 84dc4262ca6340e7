"""What a turn cost, in milliseconds and FLOPs by part, beside the same turn with every patch as a visual token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from PIL import Image

from vlm_jax import compressors, sharding
from vlm_jax.costs import flops
from vlm_jax.costs.flops import Flops
from vlm_jax.inference.batching import Ticket, on_device
from vlm_jax.inference.slots import GREEDY, SLOTS_STEP, at_least, ladder, make_slots, rounded, sized
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings.model import VLMConfig

if TYPE_CHECKING:
    from vlm_jax.inference.model import Model

PARTS = ("encoder", "compressor", "prefill", "decode")
REPEATS = 3  # the quickest counts


@dataclasses.dataclass(frozen=True)
class Cost:
    """One way to answer a turn. The encoder's time and FLOPs are the same in every way."""

    visual_tokens: int  # per picture
    text_tokens: int
    answer_tokens: int  # with the one that closes it
    milliseconds: dict[
        str, float
    ]  # by PARTS; compressor: with projector and its look at the question
    gflops: dict[str, float]


def compare(model: Model, ticket: Ticket) -> tuple[Cost, Cost]:
    """(the turn as it was answered, the same with a visual token for every patch), measured on this machine now.

    The first turn of a shape takes seconds longer: the programs of the other way are compiled. The other way's prefill and
    decoding run the same decoder on as many positions; its compressor is nothing but the projector, counted, not timed.
    """
    images, config = ticket.prompt.images, model.config
    text = ticket.prompt.length - images * ticket.visual_tokens
    answer = len(ticket.tokens) + 1
    encoder, visual = _picture_ms(model, ticket)
    everything = config.vit.num_patches
    costs = []
    for count, compressing in ((ticket.visual_tokens, visual), (everything, 0.0)):
        prefill, step = _decoder_ms(model, text + images * count)
        spent = dict(zip(PARTS, (encoder, compressing, prefill, step * (answer - 1)), strict=True))
        costs.append(Cost(count, text, answer, spent, gflops(config, count, text, answer, images)))
    return costs[0], costs[1]


def calibrate(model: Model, counts: Sequence[int], text: int = 32) -> dict[int, dict[str, float]]:
    """Milliseconds of a typical question by number of visual tokens, and with one per patch; decode: of one token."""
    every = sorted({*counts, model.config.vit.num_patches})
    images = 1 if model.prompter.data.max_images else 0
    source = [Image.new("RGB", (32, 32))] * images
    found = {}
    for count in every:
        pictured = count if count in counts else counts[-1]
        ticket = model.ticket(source, "a", GREEDY, 1, pictured)
        encoder, compressor = _picture_ms(model, ticket)
        prefill, step = _decoder_ms(model, text + images * count)
        between = compressor if count in counts else 0.0
        found[count] = dict(zip(PARTS, (encoder, between, prefill, step), strict=True))
    return found


def _with_all(config: VLMConfig) -> VLMConfig:
    return dataclasses.replace(
        config, compressor=compressors.settings("identity", dtype=config.compressor.dtype)
    )


def gflops(config: VLMConfig, count: int, text: int, answer: int, images: int) -> dict[str, float]:
    """GFLOPs of a turn by PARTS, with `count` visual tokens per picture: the compressor's, or one per patch."""
    shown = _with_all(config) if count == config.vit.num_patches else sized(config, count)
    found: Flops = flops.forward_flops(shown, text_tokens=text, output_tokens=answer, images=images)
    between = found.query + found.compressor + found.projector
    return {name: x / 1e9 for name, x in zip(PARTS, (found.encoder, between, found.prefill, found.decode), strict=True)}  # fmt: skip


def _picture_ms(model: Model, ticket: Ticket) -> tuple[float, float]:
    """Milliseconds of the encoder, and of compressor and projector with their look at the question."""
    if not ticket.prompt.images:
        return 0.0, 0.0
    config = sized(model.config, ticket.visual_tokens)

    def encode(params: Any, inputs: Inputs) -> Any:
        return VLM(config).apply({"params": params}, inputs, method="features")

    def whole(params: Any, inputs: Inputs) -> Any:
        return VLM(config).apply({"params": params}, inputs, method="encode_images")

    with sharding.use(model.mesh):
        inputs = Inputs.from_batch(sharding.put(ticket.prompt.batch, model.mesh))
        alone, both = (_quickest(jax.jit(f), model.params, inputs) for f in (encode, whole))
    return alone, max(both - alone, 0.0)


def _decoder_ms(model: Model, length: int) -> tuple[float, float]:
    """Milliseconds of a prompt of `length` slots, and of one more token behind it."""
    width = rounded(length)
    room = at_least(ladder(SLOTS_STEP, max(2 * width, SLOTS_STEP)), width + 1)
    slots = make_slots(model.config, 1, room)
    blank = jnp.zeros((1, width), jnp.int32)
    inputs = Inputs(blank, blank - 1, jnp.arange(width)[None], blank)
    sampling = on_device(GREEDY)
    spent, steps = [], []
    with sharding.use(model.mesh):
        for _ in range(REPEATS):
            state = jax.block_until_ready(slots.empty())
            start = time.perf_counter()
            state, first = slots.join(
                model.params, inputs, state=state, row=jnp.int32(0), sampling=sampling,
                visual_tokens=model.visual_tokens,
            )  # fmt: skip
            jax.block_until_ready(first)
            read = time.perf_counter()
            spent.append(read - start)
            state, token = slots.step(model.params, state, 1, width + 1)
            jax.block_until_ready(token)
            steps.append(time.perf_counter() - read)
    return 1000 * min(spent), 1000 * min(steps)


def _quickest(call: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds of a jitted function."""
    jax.block_until_ready(call(*arguments))
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        spent.append(time.perf_counter() - start)
    return 1000 * min(spent)
