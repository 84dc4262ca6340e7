"""The resources that a compiled program needs per chip, and the lower bound of its time there."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vlm_jax import compressors
from vlm_jax.aot import hlo, programs
from vlm_jax.costs import chips
from vlm_jax.costs.chips import Chip
from vlm_jax.costs.flops import batch_flops, decoder_flops, forward_flops
from vlm_jax.settings.run import Experiment

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Need:
    """Resources of one program per chip: bytes from the compiler, costs from `hlo.count`."""

    name: str
    work: str  # a description: rows x tokens
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int  # outputs that reuse the memory of a donated argument
    host_bytes: int  # offloaded to host memory
    flops: float  # kernels included
    kernel_flops: float  # the part in custom kernels, derived from their shapes
    unknown_kernels: tuple[str, ...]  # custom kernels whose FLOPs are not counted
    memory_bytes: float  # read and written, an estimate
    collectives: dict[str, tuple[float, float]]  # kind -> times, bytes sent
    open_loops: int  # loops with an unknown number of iterations, counted once
    model_flops: float  # analytic, without recomputation, divided by the number of chips
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes + self.temporary_bytes - self.alias_bytes

    @property
    def sent_bytes(self) -> float:
        """To the other chips of the slice."""
        return sum(self._sent(crosses=False))

    @property
    def dcn_bytes(self) -> float:
        """To the other slices."""
        return sum(self._sent(crosses=True))

    def _sent(self, crosses: bool) -> list[float]:
        every = self.collectives.items()
        return [sent for kind, (_, sent) in every if kind.startswith(hlo.DCN) == crosses]

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds of the time from arithmetic, memory traffic, communication within a slice and between slices."""
        return {
            "compute": self.flops / chip.peak_flops,
            "memory": self.memory_bytes / chip.hbm_bandwidth_bytes,
            "links": self.sent_bytes / chip.link_bandwidth_bytes,
            "network": self.dcn_bytes / chip.dcn_bandwidth_bytes,
        }

    def bound(self, chip: Chip) -> float:
        """The lower bound in seconds: the largest of the four, which overlap at best."""
        return max(self.seconds(chip).values())

    def bounded_by(self, chip: Chip) -> str:
        seconds = self.seconds(chip)
        return max(seconds, key=lambda name: seconds[name])

    @property
    def ratio(self) -> float:
        """Compiled FLOPs over the analytic ones."""
        return self.flops / self.model_flops

    def mfu(self, chip: Chip) -> float:
        """The highest model FLOPs utilisation, in [0, 1]: recomputation does not count as useful."""
        return self.model_flops / chip.peak_flops / self.bound(chip)


@dataclasses.dataclass(frozen=True)
class TooBig:
    """A program that the compiler rejected because it exceeds the memory."""

    name: str
    reason: str


def chip_of(devices: list[Any]) -> Chip | None:
    """The specification of one of `devices`; None for a CPU. A v4 chip appears as two devices, each with half of it."""
    chip = chips.find(devices[0].device_kind)
    if chip is None or devices[0].platform != "tpu":
        return chip
    # Coordinates begin anew in each slice.
    places = {(getattr(device, "slice_index", 0), *device.coords) for device in devices}
    cores = len(devices) // len(places)
    return chip if cores == 1 else chips.part(chip, cores)


def train(exp: Experiment, mesh: Mesh) -> Need | TooBig:
    """The training step."""
    data = exp.data
    p = programs.train_plan(exp, mesh)
    learning = flatten_dict(p.state.trainable, sep="/").keys()
    flops = batch_flops(exp, learning, data.max_tokens, data.image_slots > 0).total
    work = f"{data.batch_size} x {data.max_tokens}"
    return _need("train step", work, programs.train(p), mesh, flops)[0]


def answer(exp: Experiment, mesh: Mesh, rows: int, new_tokens: int) -> list[Need | TooBig]:
    """Prefill and one decode step for `rows` prompts of max_tokens tokens; no decode step if the prefill does not fit."""
    data, lm = exp.data, exp.model.lm
    slots = data.max_tokens + new_tokens
    visual = data.max_images * compressors.num_tokens(exp.model.compressor, exp.model.vit.grid)
    question = 0 if data.query == "none" else data.max_query_tokens
    spent = forward_flops(
        exp.model, text_tokens=max(data.max_tokens - visual, 0), query_tokens=question, images=data.max_images
    )  # fmt: skip
    encoder = 0 if data.features_dir else spent.encoder
    vision = encoder + spent.query + spent.compressor + spent.projector
    flops = rows * (vision + decoder_flops(lm, data.max_tokens, data.max_tokens, logits=1))
    lowered = programs.prefill(exp, mesh, rows, new_tokens)
    first, compiled = _need("prefill", f"{rows} x {data.max_tokens}", lowered, mesh, flops)
    if compiled is None:
        return [first]
    lowered = programs.decode(exp, mesh, rows, new_tokens, compiled)
    flops = rows * decoder_flops(lm, 1, slots, logits=1)
    return [first, _need("decode step", f"{rows} x 1 of {slots}", lowered, mesh, flops)[0]]


def _need(
    name: str, work: str, lowered: jax.stages.Lowered, mesh: Mesh, model_flops: float
) -> tuple[Need | TooBig, jax.stages.Compiled | None]:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooBig(name, str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]), None
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    costs = hlo.count(compiled.as_text() or "")
    kernel_flops, unknown = _kernels(costs)
    need = Need(
        name=name,
        work=work,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        flops=costs.flops + kernel_flops,
        kernel_flops=kernel_flops,
        unknown_kernels=unknown,
        memory_bytes=costs.memory_bytes,
        collectives={kind: (n, costs.sent_bytes[kind]) for kind, n in costs.collectives.items()},
        open_loops=costs.open_loops,
        model_flops=model_flops / mesh.size,
        compile_seconds=seconds,
    )
    log.info("%s compiled in %.0f s", name, seconds)
    return need, compiled


def _kernels(costs: hlo.Costs) -> tuple[float, tuple[str, ...]]:
    """FLOPs of the attention kernels, and a line for each unknown kernel."""
    flops, unknown = 0.0, []
    for kernel, times in costs.kernels.items():
        found = attention_flops(kernel)
        if found is None:
            unknown.append(f"{times:g} x {kernel.target} ({kernel.op_name})")
        else:
            flops += times * found
    return flops, tuple(unknown)


def attention_flops(kernel: hlo.Kernel) -> float | None:
    """FLOPs of a flash kernel from its operands' shapes; None for another kernel.

    A pair of blocks needs two products forward (scores, values) and five backward (scores again, four gradients). A causal
    splash kernel, which is given the queries' positions, skips blocks above the diagonal and computes the diagonal ones in
    full; of cudnn's, which is taken for a causal one, the blocks are so small that half counts.
    """
    backward = "dkv" in kernel.op_name or "Backward" in kernel.target
    products = 5 if backward else 2
    if "splash_mha" in kernel.op_name:  # two block tables [1 n n], then queries, keys [B N T H]
        blocks = max(kernel.operands[0].dims)
        queries, keys = kernel.operands[2], kernel.operands[3]
        causal = any(x.dtype == "s32" and len(x.dims) == 2 for x in kernel.operands)
        part = (blocks + 1) / (2 * blocks) if causal else 1
        return 2.0 * products * queries.size * keys.dims[-2] * part
    if kernel.target.startswith("__cudnn$fmha"):  # queries [B T N H]
        queries = kernel.operands[0]
        return 2.0 * products * queries.size * queries.dims[1] / 2
    return None
