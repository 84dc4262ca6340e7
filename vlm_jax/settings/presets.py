"""Named model sizes: one table per kind, numbers from the models' published config.json files.

`vit("clip-l-336", dtype="bfloat16")` is a preset with fields replaced. In a config the `preset` key may also be a model
directory: `hf/named.py` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.hub import hub_hint
from vlm_jax.settings.model import LMConfig, RopeScaling, ViTConfig

# The fields that all encoders of a family share; `hf` uses them for a directory of that family.
SIGLIP: dict[str, Any] = dict(
    activation="gelu_tanh", norm_eps=1e-6, cls_token=False, pre_norm=False, post_norm=True, patch_bias=True,
    feature_layer=-1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    activation="quick_gelu", norm_eps=1e-5, cls_token=True, pre_norm=True, post_norm=False, patch_bias=False,
    feature_layer=-2, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip


def _encoder(
    family: dict, image_px: int, patch_px: int, width: int, layers: int, heads: int, mlp: int
) -> dict:
    return dict(
        family, image_px=image_px, patch_px=patch_px, width=width, num_layers=layers, num_heads=heads, mlp_width=mlp
    )  # fmt: skip


VIT: dict[str, dict[str, Any]] = {
    "clip-b16-224": _encoder(CLIP, 224, 16, 768, 12, 12, 3072),
    "clip-l-224": _encoder(CLIP, 224, 14, 1024, 24, 16, 4096),
    "clip-l-336": _encoder(CLIP, 336, 14, 1024, 24, 16, 4096),
    "siglip-b16-224": _encoder(SIGLIP, 224, 16, 768, 12, 12, 3072),
    "siglip-l16-256": _encoder(SIGLIP, 256, 16, 1024, 24, 16, 4096),
    "siglip-so400m-384": _encoder(SIGLIP, 384, 14, 1152, 27, 16, 4304),
    "siglip2-b16-256": _encoder(SIGLIP, 256, 16, 768, 12, 12, 3072),
    "siglip2-so400m-384": _encoder(SIGLIP, 384, 14, 1152, 27, 16, 4304),
    "mini": _encoder(SIGLIP, 64, 8, 64, 2, 4, 128),  # the embedded experiment's encoder
}

# Hub names of encoders, by which config.json files of the original LLaVA layout refer to them -> preset.
HUB = {
    "openai/clip-vit-base-patch16": "clip-b16-224", "openai/clip-vit-large-patch14": "clip-l-224",
    "openai/clip-vit-large-patch14-336": "clip-l-336", "google/siglip-base-patch16-224": "siglip-b16-224",
    "google/siglip-large-patch16-256": "siglip-l16-256", "google/siglip-so400m-patch14-384": "siglip-so400m-384",
    "google/siglip2-base-patch16-256": "siglip2-b16-256", "google/siglip2-so400m-patch14-384": "siglip2-so400m-384",
}  # fmt: skip


def _decoder(
    vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, *, theta: float, eps: float = 1e-6,
    tied: bool, head_dim: int = 0, qkv_bias: bool = False, qk_norm: bool = False, nominal: float = 0.0,
    rope_scaling: RopeScaling = RopeScaling(),  # noqa: B008 (frozen)
) -> dict[str, Any]:  # fmt: skip
    return dict(
        vocab_size=vocab, width=width, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim or width // heads, mlp_width=mlp, rope_theta=theta, norm_eps=eps, qkv_bias=qkv_bias,
        qk_norm=qk_norm, tied_embeddings=tied, rope_scaling=rope_scaling, nominal_params=nominal,
    )  # fmt: skip


_QWEN2: dict[str, Any] = dict(theta=1e6, qkv_bias=True)
_QWEN3: dict[str, Any] = dict(theta=1e6, head_dim=128, qk_norm=True)
_LLAMA3_SCALING = RopeScaling("llama3", factor=32.0)
# A small rope_theta, because prompts are short.
_MINI: dict[str, Any] = dict(theta=100.0, tied=False, eps=1e-6)

LM: dict[str, dict[str, Any]] = {
    "qwen1.5-0.5b": _decoder(151936, 1024, 24, 16, 16, 2816, tied=True, nominal=0.5e9, **_QWEN2),
    "qwen1.5-1.8b": _decoder(151936, 2048, 24, 16, 16, 5504, tied=False, nominal=1.8e9, **_QWEN2),
    "qwen1.5-4b": _decoder(
        151936, 2560, 40, 20, 20, 6912, tied=False, nominal=4e9, **(_QWEN2 | {"theta": 5e6})
    ),
    "qwen1.5-7b": _decoder(151936, 4096, 32, 32, 32, 11008, tied=False, nominal=7e9, **_QWEN2),
    "qwen1.5-14b": _decoder(152064, 5120, 40, 40, 40, 13696, tied=False, nominal=14e9, **_QWEN2),
    "qwen2.5-0.5b": _decoder(151936, 896, 24, 14, 2, 4864, tied=True, nominal=0.5e9, **_QWEN2),
    "qwen2.5-1.5b": _decoder(151936, 1536, 28, 12, 2, 8960, tied=True, nominal=1.5e9, **_QWEN2),
    "qwen2.5-3b": _decoder(151936, 2048, 36, 16, 2, 11008, tied=True, nominal=3e9, **_QWEN2),
    "qwen2.5-7b": _decoder(152064, 3584, 28, 28, 4, 18944, tied=False, nominal=7e9, **_QWEN2),
    "qwen3-0.6b": _decoder(151936, 1024, 28, 16, 8, 3072, tied=True, nominal=0.6e9, **_QWEN3),
    "qwen3-1.7b": _decoder(151936, 2048, 28, 16, 8, 6144, tied=True, nominal=1.7e9, **_QWEN3),
    "qwen3-4b": _decoder(151936, 2560, 36, 32, 8, 9728, tied=True, nominal=4e9, **_QWEN3),
    "qwen3-8b": _decoder(151936, 4096, 36, 32, 8, 12288, tied=False, nominal=8e9, **_QWEN3),
    "vicuna-7b": _decoder(
        32000, 4096, 32, 32, 32, 11008, theta=1e4, eps=1e-5, tied=False, nominal=7e9
    ),
    "vicuna-13b": _decoder(
        32000, 5120, 40, 40, 40, 13824, theta=1e4, eps=1e-5, tied=False, nominal=13e9
    ),
    "llama3-8b": _decoder(
        128256, 4096, 32, 32, 8, 14336, theta=5e5, eps=1e-5, tied=False, nominal=8e9
    ),
    "llama3.2-1b": _decoder(
        128256,
        2048,
        16,
        32,
        8,
        8192,
        theta=5e5,
        eps=1e-5,
        tied=True,
        nominal=1e9,
        rope_scaling=_LLAMA3_SCALING,
    ),
    "phi3-mini": _decoder(
        32064, 3072, 32, 32, 32, 8192, theta=1e4, eps=1e-5, tied=False, nominal=3.8e9
    ),
    # The embedded experiment: sizes differ in mlp_width, but for the smallest; its tokenizer sets the vocabulary size.
    "mini-21k": _decoder(256, 48, 2, 2, 2, 8, **_MINI),
    "mini-38k": _decoder(256, 64, 2, 2, 2, 12, **_MINI),
    "mini-45k": _decoder(256, 64, 2, 2, 2, 32, **_MINI),
    "mini-62k": _decoder(256, 64, 2, 2, 2, 76, **_MINI),
    "mini-82k": _decoder(256, 64, 2, 2, 2, 128, **_MINI),
    "mini-131k": _decoder(256, 64, 2, 2, 2, 256, **_MINI),
    "mini-181k": _decoder(256, 64, 2, 2, 2, 384, **_MINI),
    "mini-254k": _decoder(256, 64, 2, 2, 2, 576, **_MINI),
    "mini-500k": _decoder(256, 64, 2, 2, 2, 1216, **_MINI),
}


def vit(preset: str, **overrides: Any) -> ViTConfig:
    """The encoder of that name; "" takes every field from `overrides`."""
    return _named(ViTConfig, "encoder", VIT, preset, overrides)


def lm(preset: str, **overrides: Any) -> LMConfig:
    """The language model of that name; "" takes every field from `overrides`."""
    return _named(LMConfig, "language model", LM, preset, overrides)


def _named(cls: type, kind: str, table: dict[str, dict], preset: str, overrides: Mapping[str, Any]):
    if preset and preset not in table:
        raise ConfigError(
            f"unknown {kind} preset {preset!r}; use one of {', '.join(table)}, a model directory, or '' and set every field."
            f"{hub_hint(preset)}"
        )
    return build(cls, {**table.get(preset, {}), **overrides})


def size_name(params: float) -> str:
    """A number of parameters with three significant digits: 24576 -> "24.6k", 303e6 -> "303M", 7e9 -> "7B"."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if params >= 0.9995 * limit:  # 999,900 is 1M, not 1e+03k
            return f"{params / limit:.3g}{unit}"
    return f"{params:.0f}"
