"""One table per part of the model: the tensor's name, our parameter, and the layout between them.

A layout is an einops pattern from the stored axes to ours; export applies it in reverse. `{}` in a name is the number of a
layer: the parameter has all layers stacked on its leading axis. `rows` is a range of the first axis of a fused tensor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from vlm_jax.settings.model import LMConfig, Reference, ViTConfig

LINEAR = "o i -> i o"
HEADS_OUT = "(n h) i -> i n h"  # a linear map whose output axis is split into heads
HEADS_BIAS = "(n h) -> n h"
HEADS_IN = "o (n h) -> n h o"  # one whose input axis is the concatenation of all heads
AS_IT_IS = "... -> ..."

UNNEEDED = (
    r"lm_head\.weight|.*\.rotary_emb\.inv_freq|.*\.masked_bias"
    r"|head\..*|post_layernorm\..*|embeddings\.position_ids|pos_embed"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which stored tensor, or which rows of it, a parameter is made from."""

    tensor: str
    path: str  # "lm/layers/attn/q/kernel"
    layout: str = AS_IT_IS
    sizes: tuple[
        tuple[str, int], ...
    ] = ()  # of the axes that the layout splits, in either direction
    rows: tuple[int, int, int] | None = (
        None  # (first, last, total): rows [first, last) of `total`; None = all
    )
    layers: int = 0  # stacked on the parameter's first axis; 0 = not stacked

    @property
    def names(self) -> list[str]:
        """The tensors, layer by layer."""
        return [self.tensor.format(i) for i in range(self.layers)] or [self.tensor]

    def load(self, tensor: Any) -> Any:
        """The tensor, or its `rows`, in our layout; NumPy or JAX. Raises EinopsError where an axis cannot be split."""
        return rearrange(tensor, self.layout, **dict(self.sizes))

    def stored_axes(self, axes: Sequence[Any]) -> list[Any]:
        """Permutes one value per axis of ours to one per stored axis, such as mesh axes. A split axis takes its first factor's."""
        stored, ours = (re.findall(r"\(([^)]*)\)|(\S+)", side) for side in self.layout.split(" -> "))  # fmt: skip
        if self.layout == AS_IT_IS:
            return list(axes)
        firsts = [(group or name).split()[0] for group, name in ours]
        belongs = dict(zip(firsts, axes, strict=False))
        return [belongs.get((group or name).split()[0]) for group, name in stored]

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `load`."""
        stored, ours = self.layout.split(" -> ")
        return rearrange(parameter, f"{ours} -> {stored}", **dict(self.sizes))


def _heads(count: int, size: int) -> tuple[tuple[str, int], ...]:
    return (("n", count), ("h", size))


def _of_part(part: str, rules: Sequence[Rule], layers: int = 0) -> list[Rule]:
    """The rules with the part as the first component of their paths, and the number of layers of the stacked ones."""
    return [
        dataclasses.replace(
            rule, path=f"{part}/{rule.path}", layers=layers if "{}" in rule.tensor else 0
        )
        for rule in rules
    ]


def _norm(tensor: str, path: str) -> list[Rule]:
    return [Rule(f"{tensor}.weight", f"{path}/scale"), Rule(f"{tensor}.bias", f"{path}/bias")]


def _linear(tensor: str, path: str, bias: bool = True) -> list[Rule]:
    stem = f"{tensor}." if tensor else ""
    rules = [Rule(f"{stem}weight", f"{path}/kernel", LINEAR)]
    return rules + [Rule(f"{stem}bias", f"{path}/bias")] * bias


def vit(c: ViTConfig, flat_patches: bool, scores: bool) -> list[Rule]:
    """SigLIP and CLIP. flat_patches: SigLIP 2 stores the patch projection as a linear map of (y x colour).

    scores: include the norm, queries and keys of the layer after the feature layer, which PruMerge uses.
    """
    heads = _heads(c.num_heads, c.width // c.num_heads)
    side = (("c", 3), ("y", c.patch_px), ("x", c.patch_px))
    patch = "embeddings.patch_embedding"
    rules = [
        Rule(f"{patch}.weight", "patch_embed/kernel", LINEAR)
        if flat_patches
        else Rule(f"{patch}.weight", "patch_embed/kernel", "o c y x -> (y x c) o", side),
        Rule("embeddings.position_embedding.weight", "position"),
    ]
    rules += [Rule(f"{patch}.bias", "patch_embed/bias")] * c.patch_bias
    rules += [Rule("embeddings.class_embedding", "cls")] * c.cls_token
    rules += _norm("pre_layrnorm", "pre_norm") * c.pre_norm
    rules += _norm("post_layernorm", "post_norm") * (c.post_norm and c.feature_layer == -1)
    layer = "encoder.layers.{}"
    for n in "qkv":
        name, path = f"{layer}.self_attn.{n}_proj", f"layers/attn/{n}"
        rules.append(Rule(f"{name}.weight", f"{path}/kernel", HEADS_OUT, heads))
        rules.append(Rule(f"{name}.bias", f"{path}/bias", HEADS_BIAS, heads))
    out = f"{layer}.self_attn.out_proj"
    rules.append(Rule(f"{out}.weight", "layers/attn/out/kernel", HEADS_IN, heads))
    rules.append(Rule(f"{out}.bias", "layers/attn/out/bias"))
    for n in ("1", "2"):
        rules += _norm(f"{layer}.layer_norm{n}", f"layers/norm{n}")
        rules += _linear(f"{layer}.mlp.fc{n}", f"layers/mlp/fc{n}")
    if scores and c.feature_layer != -1:
        asking = ("layers/norm1/", "layers/attn/q/", "layers/attn/k/")
        rules += [
            dataclasses.replace(
                rule, tensor=rule.tensor.format(c.feature_state), path=rule.path.replace("layers/", "next_layer/", 1)
            )
            for rule in rules if rule.path.startswith(asking)
        ]  # fmt: skip
    return _of_part("vit", rules, c.feature_state)


def lm(c: LMConfig, fused: bool) -> list[Rule]:
    """Llama, Mistral, Qwen, Phi-3. fused: Phi-3 stores q, k, v in one tensor, and gate and up in another."""
    layer = "model.layers.{}"
    rules = [
        Rule("model.embed_tokens.weight", "embed"),
        Rule("model.norm.weight", "final_norm/scale"),
        Rule(f"{layer}.input_layernorm.weight", "layers/attn_norm/scale"),
        Rule(f"{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        *_linear(f"{layer}.mlp.down_proj", "layers/mlp/down", c.mlp_bias),
    ]
    rules += [Rule("lm_head.weight", "head", LINEAR)] * (not c.tied_embeddings)
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    start, total = 0, sum(heads.values()) * c.head_dim
    for n, count in heads.items():
        name, path = f"{layer}.self_attn.{n}_proj", f"layers/attn/{n}"
        split, stop = _heads(count, c.head_dim), start + count * c.head_dim
        if fused:
            name = f"{layer}.self_attn.qkv_proj"
        rows = (start, stop, total) if fused else None
        rules.append(Rule(f"{name}.weight", f"{path}/kernel", HEADS_OUT, split, rows))
        rules += [Rule(f"{name}.bias", f"{path}/bias", HEADS_BIAS, split, rows)] * c.qkv_bias
        start = stop
    rules.append(Rule(f"{layer}.self_attn.o_proj.weight", "layers/attn/o/kernel", HEADS_IN, _heads(c.num_heads, c.head_dim)))  # fmt: skip
    rules += [Rule(f"{layer}.self_attn.o_proj.bias", "layers/attn/o/bias")] * c.o_bias
    for n in ("q_norm", "k_norm"):
        rules += [Rule(f"{layer}.self_attn.{n}.weight", f"layers/attn/{n}/scale")] * c.qk_norm
    for i, n in enumerate(("gate", "up")):
        name = f"{layer}.mlp.gate_up_proj" if fused else f"{layer}.mlp.{n}_proj"
        rows = (i * c.mlp_width, (i + 1) * c.mlp_width, 2 * c.mlp_width) if fused else None
        rules.append(Rule(f"{name}.weight", f"layers/mlp/{n}/kernel", LINEAR, rows=rows))
        rules += [Rule(f"{name}.bias", f"layers/mlp/{n}/bias", rows=rows)] * c.mlp_bias
    return _of_part("lm", rules, c.num_layers)


def projector(names: Sequence[str]) -> list[Rule]:
    """Linear maps with GELU between; `names` are the stored ones, in order ("linear_1", "linear_2" in LLaVA)."""
    rules = [rule for i, name in enumerate(names) for rule in _linear(name, f"dense_{i}")]
    return _of_part("projector", rules)


LLAVA_PROJECTOR = ("linear_1", "linear_2")


# --- The reference layout: compressor and projector in one module, mm_projector or query_abstractor. ------------------


def _attention(tensor: str, path: str, width: int, num_heads: int) -> list[Rule]:
    """Packed multi-head attention: rows [query; key; value] of one tensor."""
    heads = _heads(num_heads, width // num_heads)
    rules = []
    for i, n in enumerate("qkv"):
        rows = (i * width, (i + 1) * width, 3 * width)
        rules.append(Rule(f"{tensor}.in_proj_weight", f"{path}{n}/kernel", HEADS_OUT, heads, rows))
        rules.append(Rule(f"{tensor}.in_proj_bias", f"{path}{n}/bias", HEADS_BIAS, heads, rows))
    rules.append(Rule(f"{tensor}.out_proj.weight", f"{path}out/kernel", HEADS_IN, heads))
    return [*rules, Rule(f"{tensor}.out_proj.bias", f"{path}out/bias")]


def mlp(num_layers: int) -> list[Rule]:
    """LLaVA's "mlp2x_gelu" (indices 0, 2, ...), or its "linear", which has no index."""
    return projector([str(2 * i) for i in range(num_layers)] if num_layers > 1 else [""])


# The kinds of stored tensors that a compressor's `Reference` names -> (stored name, our path, more) to rules.
KINDS: dict[str, Callable[..., list[Rule]]] = {
    "linear": _linear,
    "bare": lambda tensor, path: _linear(tensor, path, bias=False),
    "norm": _norm,
    "array": lambda tensor, path, layout=AS_IT_IS: [Rule(tensor, path, layout)],
}


def reference(layout: Reference, width: int, num_heads: int, num_layers: int) -> list[Rule]:
    """Compressor and projector as a release stores them.

    width: of the encoder; num_heads: of the compressor's attention; num_layers: maps of LLaVA's projector.
    """
    kinds = KINDS | {"attention": lambda tensor, path: _attention(tensor, path, width, num_heads)}
    rules = [rule for kind, *names in layout.tensors for rule in kinds[kind](*names)]
    behind = mlp(num_layers) if layout.projector is None else projector(layout.projector)
    return _of_part("compressor", rules) + behind


# --- Tensors that a file may hold and that the model has no use for. -------------------------------------------------


def unneeded(name: str, rules: Sequence[Rule]) -> bool:
    """Whether a stored tensor is known not to be used: the head of tied embeddings, buffers, the encoder's pooling head,
    its last norm where that state is not used, and its layers above the feature layer.
    """
    above = re.fullmatch(r"encoder\.layers\.\d+\.(.*)", name)
    if above:
        return any(rule.tensor == f"encoder.layers.{{}}.{above[1]}" for rule in rules)
    return bool(re.fullmatch(UNNEEDED, name))
