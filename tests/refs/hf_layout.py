"""Hugging Face (and reference checkpoint) tensors [out in] put at our parameter paths; independent of vlm_jax/hf."""

from collections.abc import Mapping

import numpy as np
from einops import rearrange

State = Mapping[str, np.ndarray]


def sub(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The entries below `prefix`, without it."""
    return {k.removeprefix(prefix): np.asarray(v) for k, v in state.items() if k.startswith(prefix)}


def linear(state: State, name: str) -> dict[str, np.ndarray]:
    tree = {"kernel": state[f"{name}.weight"].T}
    if f"{name}.bias" in state:
        tree["bias"] = state[f"{name}.bias"]
    return tree


def norm(state: State, name: str) -> dict[str, np.ndarray]:
    tree = {"scale": state[f"{name}.weight"]}
    if f"{name}.bias" in state:
        tree["bias"] = state[f"{name}.bias"]
    return tree


def heads_out(state: State, name: str, heads: int) -> dict[str, np.ndarray]:
    """A linear map whose output is cut into heads."""
    tree = {"kernel": rearrange(state[f"{name}.weight"], "(n h) c -> c n h", n=heads)}
    if f"{name}.bias" in state:
        tree["bias"] = rearrange(state[f"{name}.bias"], "(n h) -> n h", n=heads)
    return tree


def heads_in(state: State, name: str, heads: int) -> dict[str, np.ndarray]:
    """A linear map whose input is all heads side by side."""
    tree = {"kernel": rearrange(state[f"{name}.weight"], "c (n h) -> n h c", n=heads)}
    if f"{name}.bias" in state:
        tree["bias"] = state[f"{name}.bias"]
    return tree


def stack(trees: list[dict]) -> dict:
    """One tree with a leading layer axis."""
    return {
        k: stack([t[k] for t in trees]) if isinstance(v, dict) else np.stack([t[k] for t in trees])
        for k, v in trees[0].items()
    }


def encoder(state: State, num_layers: int, heads: int, post_norm: bool) -> dict:
    """SigLIP or CLIP vision tower; `num_layers` counts the layers that are kept."""
    state = sub(state, "vision_model.") or state

    def layer(i: int) -> dict:
        s = sub(state, f"encoder.layers.{i}.")
        attn = {n: heads_out(s, f"self_attn.{n}_proj", heads) for n in "qkv"}
        attn["out"] = heads_in(s, "self_attn.out_proj", heads)
        mlp = {n: linear(s, f"mlp.{n}") for n in ("fc1", "fc2")}
        norms = {f"norm{i}": norm(s, f"layer_norm{i}") for i in (1, 2)}
        return {"attn": attn, "mlp": mlp, **norms}

    patch = state["embeddings.patch_embedding.weight"]
    tree: dict = {
        "patch_embed": {"kernel": rearrange(patch, "c k y x -> (y x k) c")},
        "position": state["embeddings.position_embedding.weight"],
        "layers": stack([layer(i) for i in range(num_layers)]),
    }
    if "embeddings.patch_embedding.bias" in state:
        tree["patch_embed"]["bias"] = state["embeddings.patch_embedding.bias"]
    if "embeddings.class_embedding" in state:
        tree["cls"] = state["embeddings.class_embedding"]
    if "pre_layrnorm.weight" in state:
        tree["pre_norm"] = norm(state, "pre_layrnorm")
    if post_norm:
        tree["post_norm"] = norm(state, "post_layernorm")
    return tree


def asking_layer(state: State, index: int, heads: int) -> dict:
    """The first norm and the query and key maps of layer `index` (counted from 0)."""
    state = sub(state, "vision_model.") or state
    s = sub(state, f"encoder.layers.{index}.")
    attn = {n: heads_out(s, f"self_attn.{n}_proj", heads) for n in "qk"}
    return {"norm1": norm(s, "layer_norm1"), "attn": attn}


def decoder(state: State, heads: int, kv_heads: int, tied: bool) -> dict:
    """Llama, Qwen2, Qwen3, Phi-3 (its fused qkv_proj and gate_up_proj are cut)."""
    model = sub(state, "model.")
    count = 1 + max(int(k.split(".")[1]) for k in model if k.startswith("layers."))

    def layer(i: int) -> dict:
        s = sub(model, f"layers.{i}.")
        if "self_attn.qkv_proj.weight" in s:
            head_dim = s["self_attn.o_proj.weight"].shape[1] // heads
            cuts = np.cumsum([heads * head_dim, kv_heads * head_dim])
            for n, w in zip("qkv", np.split(s["self_attn.qkv_proj.weight"], cuts), strict=True):
                s[f"self_attn.{n}_proj.weight"] = w
            gate_up = np.split(s["mlp.gate_up_proj.weight"], 2)
            s["mlp.gate_proj.weight"], s["mlp.up_proj.weight"] = gate_up
        count_of = {"q": heads, "k": kv_heads, "v": kv_heads}
        attn = {n: heads_out(s, f"self_attn.{n}_proj", count_of[n]) for n in "qkv"}
        attn["o"] = heads_in(s, "self_attn.o_proj", heads)
        for n in ("q_norm", "k_norm"):
            if f"self_attn.{n}.weight" in s:
                attn[n] = norm(s, f"self_attn.{n}")
        return {
            "attn": attn,
            "mlp": {n: linear(s, f"mlp.{n}_proj") for n in ("gate", "up", "down")},
            "attn_norm": norm(s, "input_layernorm"),
            "mlp_norm": norm(s, "post_attention_layernorm"),
        }

    tree = {
        "embed": model["embed_tokens.weight"],
        "layers": stack([layer(i) for i in range(count)]),
        "final_norm": norm(model, "norm"),
    }
    if not tied:
        tree["head"] = state["lm_head.weight"].T
    return tree
