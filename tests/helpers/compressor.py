"""Settings of any compressor from one list of fields."""

from typing import Any

from vlm_jax import compressors
from vlm_jax.settings.model import CompressorConfig


def compressor_config(
    name: str,
    stride: int = 1,
    num_heads: int = 8,
    taps: tuple[int, ...] = (),
    **fields: Any,
) -> CompressorConfig:
    """The settings of a compressor; stride, num_heads, taps and fields of other compressors are left out."""
    given = {"stride": stride, "num_heads": num_heads, "taps": taps, **fields}
    return compressors.chosen({"name": name, **given})
