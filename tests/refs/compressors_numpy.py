"""Slow float64 twins of the compressors and of CLIP, on tensors named and laid out as in the reference checkpoints.

Written from the papers' maths with loops over windows; share nothing with vlm_jax.
"""

import numpy as np
from scipy.special import erf

State = dict[str, np.ndarray]


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear(p: State, name: str, x):
    y = x @ np.float64(p[f"{name}.weight"]).T
    return y + np.float64(p[f"{name}.bias"]) if f"{name}.bias" in p else y


def layer_norm(p: State, name: str, x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * np.float64(p[f"{name}.weight"]) + np.float64(p[f"{name}.bias"])


def mlp(p: State, first: str, second: str, x):
    return linear(p, second, gelu(linear(p, first, x)))


def projector(p: State, names, x):
    """Linear maps with GELU between; a name of "" is a map whose tensors are called just weight and bias."""
    for i, name in enumerate(names):
        own = {f"x.{n}": p[f"{name}.{n}" if name else n] for n in ("weight", "bias")}
        x = linear(own, "x", gelu(x) if i else x)
    return x


def one_query_attention(p: State, name: str, query, keys, values, heads: int):
    """query [C], keys and values [R C] -> [C]."""
    width = query.shape[-1]
    w = np.split(np.float64(p[f"{name}.in_proj_weight"]), 3)
    b = np.split(np.float64(p[f"{name}.in_proj_bias"]), 3)
    q, k, v = query @ w[0].T + b[0], keys @ w[1].T + b[1], values @ w[2].T + b[2]
    hd = width // heads
    mixed = [
        softmax(k[:, j : j + hd] @ q[j : j + hd] / np.sqrt(hd)) @ v[:, j : j + hd]
        for j in range(0, width, hd)
    ]
    return linear(p, f"{name}.out_proj", np.concatenate(mixed))


def window(x, grid: int, stride: int, row: int, column: int):
    """x [P C] -> the patches [stride stride C] of one window."""
    square = x.reshape(grid, grid, -1)
    return square[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]


def over_windows(p: State, name: str, query, keys, values, heads: int, grid: int, stride: int):
    """query [B M C], keys and values [B P C]."""
    out, side = np.zeros_like(query), grid // stride
    for b in range(query.shape[0]):
        for m in range(side * side):
            cut = lambda x: window(x[b], grid, stride, *divmod(m, side)).reshape(stride**2, -1)  # noqa: B023, E731
            out[b, m] = one_query_attention(p, name, query[b, m], cut(keys), cut(values), heads)
    return out


def quecc(p: State, features, multi, text, heads: int, stride: int):
    """(tokens before the projector, tokens)."""
    features, multi, text = np.float64(features), np.float64(multi), np.float64(text)
    grid = round(features.shape[1] ** 0.5)
    side = grid // stride
    asked = features + layer_norm(p, "0.text_projection.1", linear(p, "0.text_projection.0", text))
    keyed = lambda n, x: layer_norm(p, f"0.{n}.3", mlp(p, f"0.{n}.0", f"0.{n}.2", x))  # noqa: E731
    q0, k, v = keyed("q_proj", asked), keyed("k_proj", multi), keyed("v_proj", multi)
    conv = np.float64(p["0.q_downsample.weight"])[:, 0]  # [C K K]
    q = np.zeros((features.shape[0], side * side, features.shape[2]))
    for b in range(q.shape[0]):
        for m in range(side * side):
            for y in range(stride):
                for x in range(stride):
                    patch = window(q0[b], grid, stride, *divmod(m, side))[y, x]
                    q[b, m] += conv[:, y, x] * patch
    q += np.float64(p["0.q_downsample.bias"])
    compressed = over_windows(p, "0.clip_attn", q, k, v, heads, grid, stride)
    return compressed, mlp(p, "1", "3", compressed)


def tokenpacker(p: State, features, multi, heads: int, stride: int):
    """(tokens before the projector, tokens)."""
    features, multi = np.float64(features), np.float64(multi)
    grid = round(features.shape[1] ** 0.5)
    matrix = bilinear_matrix(grid // stride, grid)
    square = features.reshape(features.shape[0], grid, grid, -1)
    q0 = np.einsum("Yy,Xx,byxc->bYXc", matrix, matrix, square)
    q0 = q0.reshape(features.shape[0], -1, features.shape[2])
    q = layer_norm(p, "ln_q_1", linear(p, "q_proj_1", q0))
    k = layer_norm(p, "ln_k_1", mlp(p, "k_proj_1.0", "k_proj_1.2", multi))
    v = layer_norm(p, "ln_v_1", mlp(p, "v_proj_1.0", "v_proj_1.2", multi))
    compressed = over_windows(p, "clip_attn", q, k, v, heads, grid, stride)
    return compressed, mlp(p, "mlp.0", "mlp.2", compressed)


def bilinear_matrix(size: int, source: int):
    """Half-pixel centres, no anti-aliasing: output i reads at u = (i + 1/2) source / size - 1/2."""
    matrix = np.zeros((size, source))
    for i in range(size):
        u = (i + 0.5) * source / size - 0.5
        low = int(np.floor(u))
        matrix[i, low] += 1 - (u - low)
        if u > low:
            matrix[i, low + 1] += u - low
    return matrix


def clip_states(p: State, pixels, heads: int):
    """Hidden states 0 (embeddings after the pre-norm) .. L of CLIP, class token in row 0. pixels [B 3 H W], normalised."""
    p = {k.removeprefix("vision_model."): np.float64(v) for k, v in p.items()}
    kernel = p["embeddings.patch_embedding.weight"]
    size, width = kernel.shape[-1], kernel.shape[0]
    batch, _, height, _ = pixels.shape
    grid = height // size
    rows = [np.tile(p["embeddings.class_embedding"], (batch, 1))]
    for y in range(0, grid * size, size):
        for x in range(0, grid * size, size):
            patch = np.float64(pixels[:, :, y : y + size, x : x + size])
            rows.append(patch.reshape(batch, -1) @ kernel.reshape(width, -1).T)
    x = np.stack(rows, axis=1) + p["embeddings.position_embedding.weight"]
    states = [layer_norm(p, "pre_layrnorm", x, 1e-5)]
    count = 1 + max(int(k.split(".")[2]) for k in p if k.startswith("encoder.layers."))
    for i in range(count):
        states.append(_clip_layer(p, f"encoder.layers.{i}", states[-1], heads))
    return states


def _clip_layer(p: State, name: str, x, heads: int):
    normed = layer_norm(p, f"{name}.layer_norm1", x, 1e-5)
    q, k, v = (linear(p, f"{name}.self_attn.{n}_proj", normed) for n in "qkv")
    hd = x.shape[-1] // heads
    mixed = [
        softmax(q[..., j : j + hd] @ k[..., j : j + hd].swapaxes(1, 2) / np.sqrt(hd))
        @ v[..., j : j + hd]
        for j in range(0, x.shape[-1], hd)
    ]
    x = x + linear(p, f"{name}.self_attn.out_proj", np.concatenate(mixed, axis=-1))
    h = linear(p, f"{name}.mlp.fc1", layer_norm(p, f"{name}.layer_norm2", x, 1e-5))
    return x + linear(p, f"{name}.mlp.fc2", h / (1 + np.exp(-1.702 * h)))


# Random checkpoints, with shapes as in the references.


def shapes_quecc(width: int, multi: int, text: int, hidden: int, stride: int) -> dict:
    return {
        "0.text_projection.0.weight": (width, text), "0.text_projection.0.bias": (width,), **_norm("0.text_projection.1", width),
        **_mlp("0.q_proj", width, width), **_norm("0.q_proj.3", width),
        **_mlp("0.k_proj", multi, width), **_norm("0.k_proj.3", width),
        **_mlp("0.v_proj", multi, width), **_norm("0.v_proj.3", width),
        "0.q_downsample.weight": (width, 1, stride, stride), "0.q_downsample.bias": (width,),
        **_attention("0.clip_attn", width), "1.weight": (hidden, width), "1.bias": (hidden,),
        "3.weight": (hidden, hidden), "3.bias": (hidden,),
    }  # fmt: skip


def shapes_tokenpacker(width: int, multi: int, hidden: int) -> dict:
    return {
        "q_proj_1.weight": (width, width), **_mlp("k_proj_1", multi, width), **_mlp("v_proj_1", multi, width),
        **_norm("ln_q_1", width), **_norm("ln_k_1", width), **_norm("ln_v_1", width), **_attention("clip_attn", width),
        **_mlp("mlp", width, hidden),
    }  # fmt: skip


def shapes_clip(width: int, mlp_width: int, layers: int, grid: int, patch: int) -> dict:
    pre = "vision_model."
    shapes = {
        f"{pre}embeddings.class_embedding": (width,),
        f"{pre}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{pre}embeddings.position_embedding.weight": (grid**2 + 1, width),
        **_norm(f"{pre}pre_layrnorm", width), **_norm(f"{pre}post_layernorm", width),
    }  # fmt: skip
    for i in range(layers):
        name = f"{pre}encoder.layers.{i}"
        for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{name}.self_attn.{n}.weight": (width, width),
                f"{name}.self_attn.{n}.bias": (width,),
            }
        shapes |= {
            f"{name}.mlp.fc1.weight": (mlp_width, width),
            f"{name}.mlp.fc1.bias": (mlp_width,),
        }
        shapes |= {f"{name}.mlp.fc2.weight": (width, mlp_width), f"{name}.mlp.fc2.bias": (width,)}
        shapes |= {**_norm(f"{name}.layer_norm1", width), **_norm(f"{name}.layer_norm2", width)}
    return shapes


def _norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _mlp(name: str, in_width: int, width: int) -> dict:
    return {
        f"{name}.0.weight": (width, in_width), f"{name}.0.bias": (width,),
        f"{name}.2.weight": (width, width), f"{name}.2.bias": (width,),
    }  # fmt: skip


def _attention(name: str, width: int) -> dict:
    return {
        f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,),
        f"{name}.out_proj.weight": (width, width), f"{name}.out_proj.bias": (width,),
    }  # fmt: skip


def recipe(shapes: dict, first_index: int = 0) -> dict:
    """How each tensor is drawn: scaled by its fan-in; one-dimensional weights (of norms) around 1."""
    entries = {}
    for i, (name, shape) in enumerate(shapes.items()):
        vector = len(shape) == 1
        entries[name] = {
            "index": first_index + i,
            "shape": list(shape),
            "scale": 0.1 if vector else float(np.prod(shape[1:])) ** -0.5,
            "offset": float(vector and name.endswith("weight")),
        }
    return entries


def draw(seed: int, index: int, shape, scale: float, offset: float):
    rng = np.random.default_rng([seed, index])
    return np.float32(rng.standard_normal(shape) * scale + offset)


def random_state(shapes: dict, seed: int) -> State:
    return {name: draw(seed, **entry) for name, entry in recipe(shapes).items()}
