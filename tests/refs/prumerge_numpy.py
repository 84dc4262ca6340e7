"""A slow float64 twin of PruMerge and PruMerge+, image by image and token by token, with lists of variable length.

Written from the method's description; shares nothing with vlm_jax. Indices of patches count without the class token.
"""

import math
from fractions import Fraction

import numpy as np


def attention(query, keys):
    """softmax over all rows of keys [R C], in one head of the whole width."""
    scores = np.float64(keys) @ np.float64(query) / math.sqrt(len(query))
    e = np.exp(scores - scores.max())
    return e / e.sum()


def percentile(values, part: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def outlier_ratio(values) -> Fraction:
    """The share of the values above the upper whisker of their box plot."""
    q1, q3 = percentile(values, 0.25), percentile(values, 0.75)
    return Fraction(int(sum(v > q3 + 1.5 * (q3 - q1) for v in values)), len(values))


def top(a, count: int) -> list[int]:
    return sorted(range(len(a)), key=lambda i: -a[i])[:count]


def adaptive(a, ratio: Fraction, plus: bool, bound: int) -> tuple[list[int], list[int]]:
    """(kept, complement); at least one patch is kept. Patches from `bound` on are not sampled.

    Exact fractions: 49 x (1 / 49) is less than 1 in floating point (with 576 patches no product is).
    """
    count = max(math.floor(len(a) * ratio), 1)
    kept, ratio = top(a, count), Fraction(count, len(a))
    if plus:
        step = math.floor(math.floor(1 / ratio) / 3)
        kept = kept + [i for i in range(0, bound, step) if i not in kept]
    return kept, [i for i in range(len(a)) if i not in kept]


def fixed(a, ratio: float, plus: bool, bound: int) -> tuple[list[int], list[int]]:
    """(kept, complement); an index that was sampled and is in the top too stands in `kept` twice."""
    kept = top(a, math.floor(len(a) * ratio))
    if plus:
        step = math.floor(1 / ratio)
        kept = kept + list(range(step // 2, bound, step))
    repeats = len(kept) - len(set(kept))
    return kept, [i for i in range(len(a)) if i not in kept][repeats:]


def merge(x, keys, a, kept: list[int], complement: list[int], neighbours: int):
    """x [P C] -> tokens [len(kept) + 1, C]."""
    x, keys = np.float64(x), np.float64(keys)
    unit = [k / max(np.linalg.norm(k), 1e-12) for k in keys]
    tokens = []
    for r, centre in enumerate(kept):
        pool = kept[:r] + kept[r + 1 :] + complement
        nearest = sorted(pool, key=lambda j: -float(unit[centre] @ unit[j]))[:neighbours]
        tokens.append(x[centre] + sum(a[j] * x[j] for j in nearest))
    rest = sum((a[j] * x[j] for j in complement), np.zeros(x.shape[1]))
    return np.stack([*tokens, rest])


def prumerge(
    states, q, k, *, plus=False, ratio="image", fixed_ratio=0.125, neighbours=32, bound=None, cls=True
):  # fmt: skip
    """states, q, k [B R C]; the class token stands in row 0, unless `cls` is False: then the mean query asks.

    Per image a dict with tokens, kept, complement and attention [P]. ratio: image | batch | fixed.
    """
    first = int(cls)
    asks = [np.float64(row[0]) if cls else np.float64(row).mean(0) for row in q]
    scores = [attention(asks[b], k[b])[first:] for b in range(len(k))]
    shared = outlier_ratio(np.concatenate(scores))
    out = []
    for b, a in enumerate(scores):
        limit = len(a) if bound is None else bound
        if ratio == "fixed":
            kept, complement = fixed(a, fixed_ratio, plus, limit)
        else:
            own = shared if ratio == "batch" else outlier_ratio(a)
            kept, complement = adaptive(a, own, plus, limit)
        tokens = merge(states[b][first:], k[b][first:], a, kept, complement, neighbours)
        out.append({"tokens": tokens, "kept": kept, "complement": complement, "attention": a})
    return out
