"""What a question costs: FLOPs, bytes moved, memory, and from a chip's data sheet seconds and dollars; and what it may cost.

Two ways to count. `paper_price` knows the size N alone: 2 N FLOPs per token and one read of N weights per pass of the
language model. `exact_price` counts every part, from the encoder to the last answer token, from the models' shapes.

Bytes moved: each pass reads its weights once for the whole batch, reads the keys and values it looks at and writes the
new ones. Activations are not counted: they follow the FLOPs, which bound the passes that have many of them. Weights, cache
and activations take 2 bytes a value (bfloat16, whose peak the chips' table holds).
A time is therefore a roofline, the sum over phases of max(FLOPs / peak, bytes / bandwidth): a lower bound. Loads no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from vlm_jax import compressors
from vlm_jax.compressors import with_tokens
from vlm_jax.costs import flops, memory
from vlm_jax.costs.chips import CHIPS, GIB, VALUE_BYTES, Chip
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError, check_choice, check_positive
from vlm_jax.settings.model import CompressorConfig, LMConfig, VLMConfig

Number = int | float
UNITS = {"gflops": "GFLOPs", "ms": "ms", "gib": "GiB", "dollars": "$ per 1M questions"}
ON_A_CHIP = ("ms", "dollars")


def paper_flops(
    lm_params: Number | np.ndarray, text_tokens: Number, visual_tokens: Number | np.ndarray
) -> Number | np.ndarray:
    """2 N (Q + V): the forward FLOPs of one prefill as the paper counts them (arXiv 2411.03312, section 3).

    Leaves out the encoder, the compressor, the query pass, attention's quadratic term and the answer's tokens;
    `flops.forward_flops` counts all of them.
    """
    return 2.0 * lm_params * (text_tokens + visual_tokens)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Questions as they arrive. The text stands before the image where it is cached."""

    text_tokens: int  # Q: of the prompt, beside the visual tokens
    cached: bool = (
        False  # the text's keys and values, and what QueCC reads off it, are there already
    )
    output_tokens: int = 0  # of the answer, with its end
    batch: int = 1  # questions answered together

    def __post_init__(self):
        for name, least in (("text_tokens", 0), ("output_tokens", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"plan: {name} must be {least} or more, got {getattr(self, name)}."
                )

    @property
    def paid_tokens(self) -> int:
        """Tokens beside the visual ones that cost compute: the paper's Q, with the answer folded in."""
        return (0 if self.cached else self.text_tokens) + self.output_tokens


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of answering a batch."""

    name: str
    flops: float
    bytes: float  # to and from the chip's memory

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth_bytes)

    def bounded_by(self, chip: Chip) -> str:
        """compute | memory"""
        compute = self.flops / chip.peak_flops >= self.bytes / chip.hbm_bandwidth_bytes
        return "compute" if compute else "memory"


@dataclasses.dataclass(frozen=True)
class Price:
    """What answering one batch takes."""

    phases: tuple[Phase, ...]
    memory_bytes: float  # weights, cache at its longest, and (exact_price) activations
    batch: int

    @property
    def flops(self) -> float:
        """Of one question."""
        return sum(phase.flops for phase in self.phases) / self.batch

    def seconds(self, chip: Chip) -> float:
        """Until the whole batch is answered."""
        return sum(phase.seconds(chip) for phase in self.phases)

    def dollars(self, chip: Chip, chip_hour_dollars: Number) -> float:
        """Of a million questions, on a chip that is never idle."""
        return self.seconds(chip) / 3600 * chip_hour_dollars * 1e6 / self.batch


# (LM name, its parameters, visual tokens, workload) -> price
Pricer = Callable[[str, Number, int, Workload], Price]


def cache_bytes(lm: LMConfig) -> int:
    """Keys and values of one token."""
    return 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * VALUE_BYTES


def typical_cache_bytes(lm_params: Number) -> float:
    """Keys and values of one token in a decoder of which only the size is known.

    N = 12 L D^2 with D = 128 L, every head with keys of its own: within 15 % of Qwen1.5 0.5B to 14B. Grouped queries need
    a fraction of it.
    """
    depth_times_width = (lm_params * 128 / 12) ** (2 / 3) / 128
    return 2 * depth_times_width * VALUE_BYTES


def keys_read(prompt: int, steps: int) -> int:
    """Cache slots that `steps` decode steps behind a prompt look at, each at one more than the last, its own included."""
    return steps * prompt + steps * (steps + 1) // 2


def paper_price(lm: str, lm_params: Number, visual_tokens: int, workload: Workload) -> Price:
    """2 N (Q + V), arXiv 2411.03312: the language model alone, answer tokens counted with Q.

    The cache is that of the preset `lm`, or a typical one of its size. The keys and values of cached text
    are read, but cost no FLOPs. The last answer token is not fed back, so decoding reads the weights one time fewer than it
    gives tokens.
    """
    batch, prompt = workload.batch, workload.text_tokens + visual_tokens
    answer, weights = workload.output_tokens, VALUE_BYTES * lm_params
    cache = cache_bytes(presets.lm(lm)) if lm in presets.LM else typical_cache_bytes(lm_params)
    cache *= batch
    prefill = float(paper_flops(lm_params, workload.paid_tokens - answer, visual_tokens))
    phases = [Phase("prefill", batch * prefill, weights + prompt * cache)]
    if answer:
        decode = float(paper_flops(lm_params, answer, 0))
        moved = (answer - 1) * weights + keys_read(prompt, answer - 1) * cache
        phases.append(Phase("decode", batch * decode, moved))
    return Price(tuple(phases), weights + (prompt + answer) * cache, batch)


def exact_price(vit: str, compressor: str, taps: tuple[int, ...] = ()) -> Pricer:
    """Every part from the encoder to the last answer token, for LMs that are presets. An answer has one token at least."""
    encoder = presets.vit(vit)

    def price(lm: str, _: Number, visual_tokens: int, workload: Workload) -> Price:
        config = VLMConfig(
            encoder,
            with_tokens(_settings(compressor, taps), encoder.grid, visual_tokens),
            presets.lm(lm),
        )
        text, batch = workload.text_tokens, workload.batch
        answer = max(1, workload.output_tokens)
        spent = flops.forward_flops(
            config,
            text_tokens=text,
            cached_text_tokens=text if workload.cached else 0,
            query_tokens=0 if workload.cached else text,
            output_tokens=answer,
        )
        weights, cache = memory.weight_bytes(config), batch * cache_bytes(config.lm)
        prompt, steps = text + visual_tokens, answer - 1
        bytes_of = {
            "encoder": weights.encoder,
            "query": weights.query_layers if spent.query else 0,
            "compressor": weights.compressor,
            "projector": weights.projector,
            "prefill": weights.layers + weights.head + prompt * cache,
            "decode": steps * (weights.layers + weights.head) + keys_read(prompt, steps) * cache,
        }
        phases = [Phase(n, batch * getattr(spent, n), moved) for n, moved in bytes_of.items()]
        held = weights.stored + (prompt + steps) * cache
        held += memory.activation_bytes(config, batch, prompt, text if workload.cached else 0)
        return Price(tuple(p for p in phases if p.flops or p.bytes), held, batch)

    return price


def _settings(compressor: str, taps: tuple[int, ...]) -> CompressorConfig:
    """taps: left out where the compressor has none."""
    return compressors.chosen({"name": compressor, "taps": taps})


def choosable() -> tuple[str, ...]:
    """The compressors whose number of visual tokens can be chosen."""
    return compressors.sizable()


def allowed_tokens(vit: str, compressor: str) -> tuple[int, ...]:
    """Every number of visual tokens the compressor can give; ConfigError if none can be chosen."""
    grid, config = presets.vit(vit).grid, compressors.settings(compressor)

    def gives(count: int) -> bool:
        try:
            with_tokens(config, grid, count)
        except ConfigError:
            return False
        return True

    counts = tuple(filter(gives, range(1, grid**2 + 1)))
    if not counts:
        with_tokens(config, grid, 1)  # says why
    return counts


def spelt(kind: str, amount: Number) -> str:
    """ "50 ms", "$3.5 per 1M questions" """
    return f"${amount:.4g} per 1M questions" if kind == "dollars" else f"{amount:.4g} {UNITS[kind]}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit in the unit of its kind, and the memory beside it: the chip's, or less if `memory_gib` says so."""

    kind: str  # a key of UNITS
    limit: Number
    chip: Chip | None = None
    chip_hour_dollars: Number | None = None
    memory_gib: Number | None = None

    def __post_init__(self):
        check_choice("plan", "budget", self.kind, UNITS)
        check_positive("plan", **{f"the budget in {self.unit}": self.limit})
        if self.memory_gib is not None:
            check_positive("plan", **{"the budget in GiB": self.memory_gib})
        if self.chip_hour_dollars is not None:
            check_positive("plan", chip_hour_dollars=self.chip_hour_dollars)
        if self.kind in ON_A_CHIP and self.chip is None:
            raise ConfigError(
                f"plan: a budget in {self.unit} needs a chip; use one of {', '.join(c.name for c in CHIPS)}."
            )
        if self.kind == "dollars" and self.chip_hour_dollars is None:
            raise ConfigError(
                "plan: a budget in dollars needs chip_hour_dollars, what an hour of one chip costs."
            )

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def memory_bytes(self) -> float:
        """What a model may take; inf where nothing limits it."""
        own = math.inf if self.memory_gib is None else self.memory_gib * GIB
        return min(own, math.inf if self.chip is None else self.chip.hbm_bytes)

    @property
    def text(self) -> str:
        """ "50 ms on a H100" """
        where = f" on a {self.chip.name}" if self.chip else ""
        beside = "" if self.memory_gib is None else f" with {self.memory_gib:.4g} GiB"
        return f"{spelt(self.kind, self.limit)}{where}{beside}"

    def allows(self, price: Price) -> bool:
        return self.amount(price) <= self.limit and price.memory_bytes <= self.memory_bytes

    def amount(self, price: Price) -> float:
        """What a price comes to, in the budget's unit."""
        return self.amounts(price)[self.kind]

    def amounts(self, price: Price) -> dict[str, float]:
        """In every unit for which chip and price are known."""
        found = {"gflops": price.flops / 1e9, "gib": price.memory_bytes / GIB}
        if self.chip:
            found["ms"] = price.seconds(self.chip) * 1e3
            if self.chip_hour_dollars is not None:
                found["dollars"] = price.dollars(self.chip, self.chip_hour_dollars)
        return found


def find_chip(name: str) -> Chip:
    """By the name in `chips.CHIPS`; ConfigError for another."""
    table = {chip.name: chip for chip in CHIPS}
    check_choice("plan", "chip", name, table)
    return table[name]
