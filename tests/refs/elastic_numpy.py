"""Slow float64 twins of MQT and of average pooling, written from their description; share nothing with vlm_jax."""

import math

import numpy as np
from refs.compressors_numpy import layer_norm, linear, softmax


def cubic(distance: float) -> float:
    """The bicubic kernel with a = -3/4."""
    t = abs(distance)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(square, size: int):
    """[g g C] -> [size size C], taps outside the border read the border."""
    side = len(square)
    rows = np.zeros((size, side, square.shape[2]))
    out = np.zeros((size, size, square.shape[2]))
    for i in range(size):
        u = (i + 0.5) * side / size - 0.5
        for tap in range(math.floor(u) - 1, math.floor(u) + 3):
            rows[i] += cubic(u - tap) * square[min(max(tap, 0), side - 1)]
    for i in range(size):
        u = (i + 0.5) * side / size - 0.5
        for tap in range(math.floor(u) - 1, math.floor(u) + 3):
            out[:, i] += cubic(u - tap) * rows[:, min(max(tap, 0), side - 1)]
    return out


def sine_table(side: int, width: int):
    """Position y * side + x: sines, then cosines of x, then of y; in half precision."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for y in range(side):
        for x in range(side):
            for axis, place in enumerate((x, y)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    table[y * side + x, (2 * axis) * quarter + i] = math.sin(angle)
                    table[y * side + x, (2 * axis + 1) * quarter + i] = math.cos(angle)
    return np.float64(np.float16(table))


def mqt(p, features, heads: int, count: int, keys_see_the_image: bool = False):
    """Tokens [B count D] of features [B P C], one query at a time."""
    features = np.float64(features)
    batch, patches, width = features.shape
    side, grid = math.isqrt(len(p["query"])), math.isqrt(patches)
    table = sine_table(side, width)
    places = bicubic(table.reshape(side, side, width), grid).reshape(patches, width)
    w = np.split(np.float64(p["attn.in_proj_weight"]), 3)
    b = np.split(np.float64(p["attn.in_proj_bias"]), 3)
    hd = width // heads
    out = np.zeros((batch, count, p["proj"].shape[1]))
    for image in range(batch):
        seen = places + features[image] if keys_see_the_image else places
        k = layer_norm(p, "ln_k", seen) @ w[1].T + b[1]
        v = layer_norm(p, "ln_v", features[image]) @ w[2].T + b[2]
        for m in range(count):
            q = layer_norm(p, "ln_q", np.float64(p["query"][m]) + table[m]) @ w[0].T + b[0]
            mixed = [
                softmax(k[:, j : j + hd] @ q[j : j + hd] / math.sqrt(hd)) @ v[:, j : j + hd]
                for j in range(0, width, hd)
            ]
            o = linear(p, "attn.out_proj", np.concatenate(mixed))
            out[image, m] = o @ np.float64(p["proj"])
    return out


def pooled(x, stride: int):
    """The mean of each stride x stride window of x [B P C]."""
    grid = math.isqrt(x.shape[1])
    side = grid // stride
    out = np.zeros((x.shape[0], side * side, x.shape[2]))
    for row in range(grid):
        for column in range(grid):
            out[:, row // stride * side + column // stride] += x[:, row * grid + column]
    return out / stride**2


def shapes_mqt(width: int, side: int, hidden: int) -> dict:
    norms = {f"ln_{n}.{w}": (width,) for n in "qkv" for w in ("weight", "bias")}
    return norms | {
        "query": (side * side, width), "proj": (width, hidden), "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
    }  # fmt: skip
