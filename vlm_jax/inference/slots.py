"""Slots of one key/value cache in which answers grow side by side: a prompt joins a free row between two decode steps.

Everything has a static shape, so nothing is compiled while requests come and go: a prompt is padded to one of a few widths,
a step is computed for the first 1, 4, 16, .. rows and reads the first 256, 512, .. slots of each.

    row 0   . . v v What is ?  A cat      decoding; "." is the padding on the left
    row 1   . Hello                       joined just now: its next token goes to the slot behind its prompt
    row 2                                 free
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.compressors import with_tokens
from vlm_jax.inference.generate import sample
from vlm_jax.models.lm import Cache, empty_cache
from vlm_jax.models.vlm import VLM, Inputs, Layout
from vlm_jax.settings.model import VLMConfig

SLOTS_STEP = 256  # the fewest slots that a step reads


def ladder(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """first, first * factor, .. below `last`, then `last`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return (*(size for size in sizes if size < last), last)


def at_least(sizes: tuple[int, ...], size: int) -> int:
    """The smallest of ascending `sizes` that is `size` or more; the largest one if none is."""
    return next((s for s in sizes if s >= size), sizes[-1])


def rounded(length: int) -> int:
    """`length` or more: a multiple of 8."""
    return -(-length // 8) * 8


def sized(config: VLMConfig, visual_tokens: int) -> VLMConfig:
    """The model with `visual_tokens` per picture; `config` itself where it has as many. Raises ConfigError as `with_tokens`."""
    grid = config.vit.grid
    if config.compressor.num_tokens(grid) == visual_tokens:
        return config
    return dataclasses.replace(config, compressor=with_tokens(config.compressor, grid, visual_tokens))  # fmt: skip


class Sampling(NamedTuple):
    """How the tokens of one answer are chosen."""

    temperature: float | Float[Array, ""] = 0.0  # 0: greedy
    top_p: float | Float[Array, ""] = 1.0
    seed: int | Int[Array, ""] = 0


GREEDY = Sampling()


class State(NamedTuple):
    """What the rows hold. R rows of S slots."""

    cache: Cache
    keys: Layout  # of the slots, [R S]
    last: Int[Array, "R"]  # newest token of each row, not in the cache yet
    slot: Int[Array, "R"]  # where it will be written
    position: Int[Array, "R"]  # its position
    steps: Int[Array, "R"]  # tokens chosen so far
    live: Bool[Array, "R"]
    temperature: Float[Array, "R"]
    top_p: Float[Array, "R"]
    seeds: Int[Array, "R"]


class Slots:
    """The jitted functions of a model with R rows of S slots; `compilations` counts them. A state that is given is consumed."""

    def __init__(self, config: VLMConfig, rows: int, length: int):
        self.config, self.rows, self.length, self.compilations = config, rows, length, 0
        self.row_sizes = ladder(1, rows, 4)
        self.slot_sizes = ladder(SLOTS_STEP, length)
        self.join = jax.jit(self._join, static_argnames="visual_tokens", donate_argnames="state")
        self.extend = jax.jit(self._extend, donate_argnames="state")
        self._jitted_step = jax.jit(
            self._step, static_argnames=("rows", "slots"), donate_argnames="state"
        )

    def empty(self) -> State:
        """A state without a live row."""

        def row(dtype: type = jnp.int32) -> Array:
            return jnp.zeros((self.rows,), dtype)  # an array of its own: the state is donated

        layout = jnp.zeros((self.rows, self.length), jnp.int32)
        return State(
            empty_cache(self.config.lm, self.rows, self.length), Layout(layout, layout - 1),
            row(), row(), row(), row(), row(bool), row(jnp.float32), row(jnp.float32), row(),
        )  # fmt: skip

    def step(self, params: Any, state: State, rows: int, slots: int) -> tuple[State, Array]:
        """One token for each live row of the first `rows`, whose slots lie below `slots`; int [.] of at least `rows` tokens."""
        sizes = at_least(self.row_sizes, rows), at_least(self.slot_sizes, slots)
        return self._jitted_step(params, state, *sizes)

    def _method(self, name: str, config: VLMConfig | None = None) -> Callable[..., Any]:
        model = VLM(config or self.config)
        return lambda params, *inputs: model.apply({"params": params}, *inputs, method=name)

    def _join(
        self,
        params: Any,
        inputs: Inputs,
        state: State,
        row: Int[Array, ""],
        sampling: Sampling,
        visual_tokens: int,
    ) -> tuple[State, Int[Array, ""]]:
        """Reads a left-padded prompt [1 T] into a row, and the first token of its answer.

        visual_tokens: per image of the prompt; an elastic compressor may be asked for fewer than the model's.
        """
        self.compilations += 1  # runs only when jax traces a new shape
        config = sized(self.config, visual_tokens)
        length = inputs.tokens.shape[1]
        own = empty_cache(config.lm, 1, length)
        logits, own, layout = self._method("prefill", config)(params, inputs, own)
        rest = ((0, 0), (0, self.length - length))
        keys = Layout(jnp.pad(layout.positions, rest), jnp.pad(layout.segments, rest, constant_values=-1))  # fmt: skip
        return self._placed(state, row, own, keys, logits, jnp.int32(length), layout.positions[0, -1], sampling)  # fmt: skip

    def _extend(
        self,
        params: Any,
        inputs: Inputs,
        state: State,
        row: Int[Array, ""],
        start: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[State, Int[Array, ""]]:
        """As `_join`, behind the first `start` slots of the row, which stay; what the row held after them is dropped.

        The positions in `inputs` start after those of the slots that stay.
        """
        self.compilations += 1
        before = jnp.arange(self.length) < start

        def of_row(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)

        own = Cache(of_row(state.cache.k, 1), of_row(state.cache.v, 1))
        segments = jnp.where(before, of_row(state.keys.segments, 0), -1)
        keys = Layout(of_row(state.keys.positions, 0), segments)
        inputs = inputs._replace(positions=inputs.positions + keys.positions[:, start - 1] + 1)
        logits, own, keys = self._method("extend")(params, inputs, start[None], keys, own)
        slot = start + inputs.tokens.shape[1]
        return self._placed(state, row, own, keys, logits, slot, keys.positions[0, slot - 1], sampling)  # fmt: skip

    def _placed(
        self,
        state: State,
        row: Int[Array, ""],
        own: Cache,
        keys: Layout,
        logits: Float[Array, "1 V"],
        slot: Int[Array, ""],
        position: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[State, Int[Array, ""]]:
        """The state with a row's keys and values in it, and the token that follows them."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(old, new, (0, row, 0, 0, 0))

        temperature, top_p = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
        seed = jnp.asarray(sampling.seed, jnp.int32)
        zero = jnp.zeros((1,), jnp.int32)
        first = sample(logits, seed[None], zero, temperature[None], top_p[None])[0]
        return State(
            Cache(put(state.cache.k, own.k), put(state.cache.v, own.v)),
            Layout(
                state.keys.positions.at[row].set(keys.positions[0]),
                state.keys.segments.at[row].set(keys.segments[0]),
            ),
            state.last.at[row].set(first),
            state.slot.at[row].set(slot),
            state.position.at[row].set(position + 1),
            state.steps.at[row].set(1),
            state.live.at[row].set(True),
            state.temperature.at[row].set(temperature),
            state.top_p.at[row].set(top_p),
            state.seeds.at[row].set(seed),
        ), first

    def _step(
        self, params: Any, state: State, rows: int, slots: int
    ) -> tuple[State, Int[Array, "{rows}"]]:
        """One more token for each live row. A row that is not live is computed too, and changes nothing."""
        self.compilations += 1
        own = State(state.cache, Layout(*(x[:rows, :slots] for x in state.keys[:2])), *(x[:rows] for x in state[2:]))  # fmt: skip
        inputs = Inputs(
            own.last[:, None],
            jnp.full((rows, 1), -1, jnp.int32),
            own.position[:, None],
            jnp.where(own.live, 0, -1)[:, None],
        )
        at = jnp.minimum(own.slot, slots - 1)
        logits, cache, keys = self._method("extend")(params, inputs, at, own.keys, own.cache)
        chosen = sample(logits, own.seeds, own.steps, own.temperature, own.top_p)
        chosen = jnp.where(own.live, chosen, own.last)
        moved = own.live.astype(jnp.int32)

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

        return state._replace(
            cache=cache,
            keys=Layout(
                *(put(old, new) for old, new in zip(state.keys[:2], keys[:2], strict=True))
            ),
            last=put(state.last, chosen),
            slot=put(state.slot, own.slot + moved),
            position=put(state.position, own.position + moved),
            steps=put(state.steps, own.steps + moved),
        ), chosen


@jax.jit
def ended(live: Bool[Array, "R"], row: Int[Array, ""]) -> Bool[Array, "R"]:
    """The flags with that of one row taken away."""
    return live.at[row].set(False)


@functools.lru_cache(maxsize=16)
def make_slots(config: VLMConfig, rows: int, length: int) -> Slots:
    """The Slots of these settings; equal arguments share one, and so its compiled code."""
    return Slots(config, rows, length)
