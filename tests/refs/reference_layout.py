"""Compressor checkpoints as the reference repositories name them, put at our parameter paths.

Prefixes `model.mm_projector.` and `model.query_abstractor.` are already removed.
"""

import re

import numpy as np
from einops import rearrange
from refs.hf_layout import State, heads_in, heads_out, linear, norm

from vlm_jax.settings.checks import ConfigError


def maps(state: State, prefix: str = "", first: int = 0) -> list[str]:
    """The names of a projector's linear maps: every second index from `first` on, or no index at all ("linear")."""
    if prefix == "" and "weight" in state:
        return [""]
    found = [re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", name) for name in state]
    indices = sorted(int(match[1]) for match in found if match and int(match[1]) >= first)
    assert indices == list(range(first, first + 2 * len(indices), 2)), (
        f"maps and activations do not alternate: {indices}"
    )
    return [f"{prefix}{index}." for index in indices]


def projector(state: State, prefix: str = "", first: int = 0) -> dict:
    """The linear maps of "linear" or "mlp{k}x_gelu", wherever the checkpoint counts them."""
    trees = [linear({"x." + k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}, "x") for name in maps(state, prefix, first)]  # fmt: skip
    return {f"dense_{i}": tree for i, tree in enumerate(trees)}


def attention(state: State, name: str, heads: int) -> dict:
    """Packed multi-head attention: rows [query; key; value]."""
    weights = np.split(state[f"{name}.in_proj_weight"], 3)
    biases = np.split(state[f"{name}.in_proj_bias"], 3)
    tree = {
        n: heads_out({"x.weight": w, "x.bias": b}, "x", heads)
        for n, w, b in zip("qkv", weights, biases, strict=True)
    }
    return tree | {"out": heads_in(state, f"{name}.out_proj", heads)}


def normed_mlp(state: State, first: str, second: str, norm_name: str) -> dict:
    return {
        "fc1": linear(state, first),
        "fc2": linear(state, second),
        "norm": norm(state, norm_name),
    }


def mqt(state: State, heads: int) -> dict:
    """The compressor alone: there is no projector."""
    tree = attention(state, "attn", heads)
    norms = {f"{n}_norm": norm(state, f"ln_{n}") for n in "qkv"}
    return tree | norms | {"query": state["query"], "project": {"kernel": state["proj"]}}


def quecc(state: State, heads: int, stride: int) -> tuple[dict, dict]:
    """(compressor, projector). Raises ConfigError when the convolution's kernel is not its stride."""
    conv = state["0.q_downsample.weight"]
    kernel = conv.shape[-1]
    if kernel != stride:
        raise ConfigError(
            f"quecc: kernel {kernel} differs from stride {stride}; use a checkpoint with both equal."
        )
    mlps = {
        f"{ours}_mlp": normed_mlp(state, f"0.{n}_proj.0", f"0.{n}_proj.2", f"0.{n}_proj.3")
        for ours, n in (("query", "q"), ("key", "k"), ("value", "v"))
    }
    compressor = mlps | {
        "text": linear(state, "0.text_projection.0"),
        "text_norm": norm(state, "0.text_projection.1"),
        "downsample": {
            "filter": rearrange(conv, "c 1 y x -> y x c"),
            "bias": state["0.q_downsample.bias"],
        },
        "attention": attention(state, "0.clip_attn", heads),
    }
    return compressor, projector(state, first=1)


def tokenpacker(state: State, heads: int) -> tuple[dict, dict]:
    """(compressor, projector)."""
    compressor = {
        "query": linear(state, "q_proj_1"),
        "query_norm": norm(state, "ln_q_1"),
        "key_mlp": normed_mlp(state, "k_proj_1.0", "k_proj_1.2", "ln_k_1"),
        "value_mlp": normed_mlp(state, "v_proj_1.0", "v_proj_1.2", "ln_v_1"),
        "attention": attention(state, "clip_attn", heads),
    }
    return compressor, projector(state, "mlp.")
