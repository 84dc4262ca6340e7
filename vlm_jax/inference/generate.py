"""Generation: one jitted prefill, then a decode loop over a key/value cache of fixed size. Also the likelihood of replies.

The prefix that all prompts share can be computed once: `Generator.prefix` returns its keys and values, and every row of a
batch then continues from them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.lm import EACH_LAYER, Cache, cache_behind, empty_cache
from vlm_jax.models.vlm import VLM, Inputs, Layout
from vlm_jax.settings.checks import ConfigError, check_positive
from vlm_jax.settings.model import LMConfig, VLMConfig


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when a row stops."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]  # a row stops at the first of these, which is part of the output
    pad_id: int  # fills a row after its end
    temperature: float = 0.0  # 0: greedy; otherwise tokens are sampled from logits / temperature
    top_p: float = (
        1.0  # sample from the smallest set of tokens whose probabilities sum to at least this
    )

    def __post_init__(self):
        check_positive("decoding", max_new_tokens=self.max_new_tokens, top_p=self.top_p)
        if self.temperature < 0:
            raise ConfigError(
                f"decoding: temperature must be 0 (greedy) or more, got {self.temperature}."
            )
        if self.top_p > 1:
            raise ConfigError(f"decoding: top_p must lie in (0, 1], got {self.top_p}.")


# Of all layers' weights, which `for_decoding` holds twice. An LM of 1 GiB gains nothing.
EACH_LAYER_BYTES = 512 * 2**20


def for_decoding(config: LMConfig, params: Any) -> Any:
    """The model's parameters; on CPUs, if the LM is small, with the weights of each layer beside those of all layers.

    `_generate` then decodes without a scan, which on a CPU copies a layer's keys, values and weights at every step.
    """
    size = config.non_embedding_params * jnp.dtype(config.dtype).itemsize
    if jax.default_backend() != "cpu" or size > EACH_LAYER_BYTES:
        return params
    each = each_layer(params["lm"]["layers"], config.num_layers)
    return {**params, "lm": {**params["lm"], EACH_LAYER: each}}


@functools.partial(jax.jit, static_argnames="count")
def each_layer(stacked: Any, count: int) -> dict[str, Any]:
    """The weights of each of `count` layers by its number."""
    return {str(i): jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)}


class Loop(NamedTuple):
    """The state carried from one decode step to the next."""

    step: Int[Array, ""]  # number of tokens generated so far
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    output: Int[Array, "B G"]
    cache: Cache | tuple[Cache, ...]


class Generator:
    """A model's jitted functions, each compiled once per shape; `compilations` counts all compilations."""

    def __init__(self, config: VLMConfig, decoding: Decoding):
        self.config, self.decoding, self.compilations = config, decoding, 0
        self._jitted = jax.jit(self._generate)
        self.prefix = jax.jit(self._prefix)
        self.replies = jax.jit(self._replies, static_argnames=("slots", "count"))

    def __call__(
        self,
        params: Any,
        inputs: Inputs,
        seeds: Int[Array, "B"],
        prefix: Cache | None = None,
    ) -> Int[Array, "B G"]:
        """The generated tokens, G = max_new_tokens, padded with pad_id after the end of a row.

        inputs: left-padded prompts in segment 0 (-1 at padding). `inputs.count` is the number of visual tokens that an
        elastic compressor keeps; it is traced, so every count runs the same compiled code. seeds: one per row, so that a
        sampled answer does not depend on the other rows; greedy decoding ignores them. prefix: `self.prefix(params, ids
        [1 P])` of the text before every prompt; the positions in `inputs` start after it.
        """
        return self._jitted(params, inputs, seeds, prefix)

    def _prefix(self, params: Any, tokens: Int[Array, "1 P"]) -> Cache:
        """Keys and values of the text that every prompt begins with."""
        self.compilations += 1  # runs only when jax traces a new shape
        return self._method("shared_prefix")(params, tokens)

    def _replies(
        self, params: Any, inputs: Inputs, prefix: Cache | None, *, slots: int, count: int
    ) -> Float[Array, "B {count}"]:
        """Log-probability of each of up to `count` replies: the sum over its tokens; 0 where a row has fewer replies.

        inputs: prompts with their replies in the last `slots` columns, as data/eval_batches.py lays them out.
        """
        self.compilations += 1  # runs only when jax traces a new shape
        shared, cache = self._room(prefix, inputs.tokens.shape, 0)
        tokens = self._method("replies")(params, inputs, slots, cache, shared)
        numbers = inputs.segments[:, -slots:, None]
        return jnp.where(numbers == 1 + jnp.arange(count), tokens[..., None], 0).sum(axis=1)

    def _method(self, name: str) -> Callable[..., Any]:
        """A method of the model, as a function of its parameters."""
        model = VLM(self.config)
        return lambda params, *inputs: model.apply({"params": params}, *inputs, method=name)

    def _room(self, prefix: Cache | None, shape: tuple[int, ...], new: int) -> tuple[int, Cache]:
        """The length of the prefix, and a cache with room for prompts of `shape` [B T] and `new` more tokens."""
        batch, length = shape
        if prefix is None:
            return 0, empty_cache(self.config.lm, batch, length + new)
        return prefix.length, cache_behind(prefix, batch, length + new)

    def _generate(
        self, params: Any, inputs: Inputs, seeds: Int[Array, "B"], prefix: Cache | None
    ) -> Int[Array, "B G"]:
        self.compilations += 1  # runs only when jax traces a new shape
        new, batch = self.decoding.max_new_tokens, len(inputs.tokens)
        shared, cache = self._room(prefix, inputs.tokens.shape, new)
        logits, cache, layout = self._method("prefill")(params, inputs, cache, shared)
        if EACH_LAYER in params["lm"]:
            cache = cache.layers()
        step, length = self._method("decode"), layout.segments.shape[1]
        following = layout.positions[:, -1:] + 1 + jnp.arange(new, dtype=layout.positions.dtype)
        slots = Layout(
            jnp.concatenate([layout.positions, following], axis=1),
            jnp.pad(layout.segments, ((0, 0), (0, new))),
        )
        first = choose(logits, seeds, jnp.int32(0), self.decoding)
        output = jnp.full((batch, new), self.decoding.pad_id, jnp.int32).at[:, 0].set(first)

        def unfinished(loop: Loop) -> Bool[Array, ""]:
            return (loop.step < new) & ~loop.done.all()

        def decode(loop: Loop) -> Loop:
            slot = length + loop.step - 1
            logits, cache = step(params, loop.last, slot, slots, loop.cache)
            chosen = choose(logits, seeds, loop.step, self.decoding)
            chosen = jnp.where(loop.done, self.decoding.pad_id, chosen)
            output = jax.lax.dynamic_update_slice(loop.output, chosen[:, None], (0, loop.step))
            return Loop(loop.step + 1, chosen, loop.done | self._ends(chosen), output, cache)

        start = Loop(jnp.int32(1), first, self._ends(first), output, cache)
        return jax.lax.while_loop(unfinished, decode, start).output

    def _ends(self, tokens: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.isin(tokens, jnp.array(self.decoding.eos_ids, jnp.int32))


@functools.lru_cache(maxsize=64)
def make_generate(config: VLMConfig, decoding: Decoding) -> Generator:
    """The Generator of these settings; equal arguments share one, so that a sweep compiles each model once."""
    return Generator(config, decoding)


def choose(
    logits: Float[Array, "B V"], seeds: Int[Array, "B"], step: Int[Array, ""], decoding: Decoding
) -> Int[Array, "B"]:
    """The next token of each row: the most likely one, or a sample that depends only on its logits, its seed and `step`."""
    if decoding.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / decoding.temperature
    if decoding.top_p < 1:
        logits = jnp.where(logits >= nucleus_floor(logits, decoding.top_p), logits, -jnp.inf)
    return _draw(logits, seeds, jnp.broadcast_to(step, seeds.shape))


def sample(
    logits: Float[Array, "B V"],
    seeds: Int[Array, "B"],
    steps: Int[Array, "B"],
    temperature: Float[Array, "B"],
    top_p: Float[Array, "B"],
) -> Int[Array, "B"]:
    """The tokens that `choose` gives to rows with settings, and steps, of their own; nothing is drawn if all are greedy."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Int[Array, "B"]:
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        scaled = jnp.where(scaled >= nucleus_floor(scaled, top_p[:, None]), scaled, -jnp.inf)
        return jnp.where(temperature > 0, _draw(scaled, seeds, steps), greedy)

    return jax.lax.cond((temperature > 0).any(), drawn, lambda: greedy)


def _draw(
    logits: Float[Array, "B V"], seeds: Int[Array, "B"], steps: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A sample per row, which depends on its logits, its seed and its step."""

    def draw(seed: Int[Array, ""], step: Int[Array, ""], row: Float[Array, "V"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    return jax.vmap(draw)(seeds, steps, logits).astype(jnp.int32)


CANDIDATES = 256  # tokens that are looked at before the whole vocabulary is sorted


def nucleus_floor(
    logits: Float[Array, "B V"], top_p: float | Float[Array, "B 1"]
) -> Float[Array, "B 1"]:
    """The smallest logit in the nucleus: the fewest most likely tokens whose probabilities sum to at least top_p.

    -inf where top_p is 1 or more. The vocabulary is sorted only where the nucleus of some row has more than CANDIDATES tokens.
    """
    top_p = jnp.broadcast_to(top_p, (len(logits), 1))
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def floor(descending: Float[Array, "B C"]) -> tuple[Float[Array, "B 1"], Bool[Array, "B 1"]]:
        """The smallest logit, and whether these tokens hold the nucleus."""
        probabilities = jnp.exp(descending - total)
        below = jnp.cumsum(probabilities, axis=-1)
        inside = below - probabilities < top_p
        least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(top_p < 1, least, -jnp.inf), (below[:, -1:] >= top_p) | (top_p >= 1)

    size = min(CANDIDATES, logits.shape[-1])
    found, whole = floor(jax.lax.top_k(logits, size)[0])
    return jax.lax.cond(
        whole.all(), lambda: found, lambda: floor(jnp.sort(logits, axis=-1, descending=True))[0]
    )
