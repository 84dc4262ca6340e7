"""The layers that the models share: linear maps, norms, rotary positions, gated MLP, and the scan over layers.

Parameters are created with logical axis names; only `sharding.RULES` maps those to mesh axes.
Parameters are float32 and computation runs in `dtype`, except norms, softmax and rotary angles, which run in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.settings.model import Adapter, RopeScaling

Initializer = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the usual default of linear and convolution weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def weight(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> Array:
    """A float32 parameter of `module` with one logical name per axis."""
    if len(axes) != len(shape):
        raise ValueError(f"{module.path} {name}: {len(axes)} axis names for shape {tuple(shape)}")
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    return cast(Array, module.param(name, boxed, tuple(shape)))


def constrain(x: Array, *names: str | None) -> Array:
    """Constrains the sharding of an activation by the logical names of its axes; does nothing without a mesh."""
    return nn.with_logical_constraint(x, names)


Names = tuple[str | None, ...]


def on_shards(
    function: Callable[..., Any], inputs: Sequence[Names], outputs: Sequence[Names]
) -> Callable[..., Any]:
    """`function` mapped over shards with `jax.shard_map`; `function` itself without a mesh.

    inputs, outputs: the logical axes of each argument and result. Mesh axes that none of them maps to stay automatic. The
    function sees its own shard only and must not communicate with others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    arguments, results = (
        tuple(nn.logical_to_mesh_axes(names) for names in group) for group in (inputs, outputs)
    )
    axes = [
        axis for spec in (*arguments, *results) for entry in spec or () for axis in _names(entry)
    ]
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=arguments,
        out_specs=results,
        axis_names=set(axes),
        check_vma=False,
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


class Linear(nn.Module):
    """y[..., out] = x[..., in] @ kernel + bias, with one logical axis name per kernel axis.

    `out` may have several axes (heads, head_dim); the last `in_axes` axes of x are contracted. An adapter adds
    scale (x lora_a) lora_b; lora_b is initialised to zero, so the adapter has no effect at first.
    """

    out: Sequence[int]
    names: Sequence[str | None]  # of the kernel: contracted axes, then output axes
    in_axes: int = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None  # None: uniform_fan_in
    bias_init: Initializer | None = None  # None: uniform_fan_in
    dtype: str = "float32"
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        contracted = x.shape[-self.in_axes :]
        fan_in = math.prod(contracted)
        kernel_init = self.kernel_init or uniform_fan_in(fan_in)
        kernel = weight(
            self, "kernel", _flat(kernel_init, fan_in), (*contracted, *self.out), self.names
        )
        # One [rows, in] x [in, out] product: XLA's CPU backend takes half the time of the many-axis contraction in
        # the backward pass (measured at 3584 x 64 x 680); elsewhere the reshapes are free.
        rows = x.astype(self.dtype).reshape(-1, fan_in)
        y = rows @ kernel.astype(self.dtype).reshape(fan_in, -1)
        shape = (*x.shape[: x.ndim - self.in_axes], *self.out)
        y = y.reshape(shape)
        if self.use_bias:
            bias_init = self.bias_init or uniform_fan_in(fan_in)
            bias = weight(self, "bias", bias_init, self.out, self.names[self.in_axes :])
            y = y + bias.astype(self.dtype)
        if self.adapter is not None:
            y = y + self._adapted(rows, contracted, self.adapter).reshape(shape)
        return y

    def _adapted(
        self, rows: Float[Array, "R I"], contracted: tuple[int, ...], adapter: Adapter
    ) -> Float[Array, "R O"]:
        """scale (x A) B: two thin products, never the [in, out] matrix A B."""
        fan_in, rank = rows.shape[-1], adapter.rank
        inputs, outputs = self.names[: self.in_axes], self.names[self.in_axes :]
        a = weight(self, "lora_a", uniform_fan_in(fan_in), (*contracted, rank), (*inputs, None))
        b = weight(self, "lora_b", nn.initializers.zeros, (rank, *self.out), (None, *outputs))
        low = rows @ a.astype(self.dtype).reshape(fan_in, rank) * adapter.scale
        return low @ b.astype(self.dtype).reshape(rank, -1)


def _flat(init: Initializer, fan_in: int) -> Initializer:
    """Draws a kernel of several axes as its [in, out] matrix, so that the initialiser sees the right fans."""
    return lambda key, shape, dtype=jnp.float32: init(
        key, (fan_in, math.prod(shape) // fan_in), dtype
    ).reshape(shape)


class LayerNorm(nn.Module):
    """Biased variance over the last axis, affine, in float32."""

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        scale = weight(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        bias = weight(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,))
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = weight(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (y * scale).astype(self.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Rotary frequencies [H/2], in radians per position, scaled as Hugging Face's `linear` or `llama3`."""
    freqs = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling.kind == "llama3":
        turns = (
            scaling.original_max_positions * freqs / (2 * math.pi)
        )  # full turns in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: untouched, 0: divided by factor
        freqs = keep * freqs + (1 - keep) * freqs / scaling.factor
    return freqs.astype(np.float32)


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], freqs: np.ndarray
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head by positions * freqs (the "rotate half" layout of Llama)."""
    angles = positions[..., None, None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Scores(NamedTuple):
    """Queries and keys of an encoder layer's attention, heads concatenated: the importance and similarity of patches."""

    query: Float[Array, "B C"]  # of the class token; without one, the mean of all patches
    keys: Float[Array, "B P C"]
    class_key: (
        Float[Array, "B C"] | None
    )  # of the class token itself, which takes part in the softmax


def resize_matrix(size: int, source: int) -> np.ndarray:
    """Bicubic interpolation along one axis as a matrix [size, source], equal to torch's `interpolate(mode="bicubic")`.

    Half-pixel centres, a = -0.75, taps clamped to the border, no anti-aliasing. jax.image.resize shares only the first.
    """
    a = -0.75
    centre = (np.arange(size) + 0.5) * source / size - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((size, source))
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(size), np.clip(first + tap, 0, source - 1)), weight)
    return matrix.astype(np.float32)


def sincos_positions(grid: int, width: int) -> np.ndarray:
    """Fixed 2-D positions [grid * grid, width] in row-major order.

    The first half of the channels encodes the column and the second the row, each as sines and cosines with the frequencies
    10000^(-4 i / width).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(grid)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, width / 2]
    column = np.broadcast_to(axis[None], (grid, grid, width // 2))
    row = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([column, row], axis=2).reshape(grid * grid, width).astype(np.float32)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). adapters: those of gate, up and down; use_bias: adds a bias to all three."""

    width: int
    dtype: str = "float32"
    adapters: tuple[Adapter | None, Adapter | None, Adapter | None] = (None, None, None)
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = nn.initializers.normal(0.02)
        linear = functools.partial(
            Linear, use_bias=self.use_bias, kernel_init=init, bias_init=nn.initializers.zeros, dtype=self.dtype
        )  # fmt: skip
        of_gate, of_up, of_down = self.adapters
        gate = linear((self.width,), ("embed", "mlp"), name="gate", adapter=of_gate)(x)
        up = linear((self.width,), ("embed", "mlp"), name="up", adapter=of_up)(x)
        hidden = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return linear(x.shape[-1:], ("mlp", "embed"), name="down", adapter=of_down)(hidden)


# The scan over at most so many layers is unrolled, which avoids copies between layers (2 layers: CPU step -25 %).
UNROLLED_LAYERS = 4

# What the forward pass saves for the backward pass; everything else is recomputed.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def scan_layers(
    block: type[nn.Module], length: int, remat: str, in_axes: tuple = ()
) -> type[nn.Module]:
    """`block` repeated `length` times with parameters stacked on a leading "layers" axis.

    in_axes: for each argument after the carry, 0 (one slice per layer) or nn.broadcast.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=length,
        unroll=length if length <= UNROLLED_LAYERS else 1, metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip
