"""Which patches of an image each visual token is made of: read from what a compressor sows, and drawn over the picture.

VIEWS has one entry per way of drawing; a compressor names its own by its trait `drawn`.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from vlm_jax import compressors
from vlm_jax.settings.model import VLMConfig

if TYPE_CHECKING:
    from vlm_jax.inference.answer import Answerer

MAX_PANELS = 24  # small pictures, one per token or head

# Purple is rare in pictures, and falls in lightness for every kind of colour vision; vermilion (Okabe and Ito's) frames.
KEPT = "#d55e00"
SCALE = LinearSegmentedColormap.from_list("weights", ["#ffffff", "#cf9ad6", "#8a2f96", "#2b0636"])
FATES = ListedColormap(["#ffffff", "#b57bc2", KEPT])  # extra token only, merged, kept


class Shown(NamedTuple):
    """How much of each patch is in each visual token of one image, empty slots left out."""

    weights: Float[np.ndarray, "M P"]  # with several heads their mean
    heads: Float[np.ndarray, "N M P"] | None = None
    kept: Int[np.ndarray, "K"] | None = None  # the patches that the first K tokens started from


Picture = UInt8[np.ndarray, "H W 3"]
Patches = Float[np.ndarray, "P"]


class View(NamedTuple):
    """read(what the compressor sowed, grid, M) -> Shown; draw(figure, picture, grid, Shown)."""

    read: Callable[[Mapping[str, Any], int, int], Shown]
    draw: Callable[[Figure, Picture, int, Shown], None]


def look(answerer: Answerer, row: Mapping[str, Any], image_root: str) -> Shown:
    """The model's own weights for a record with one image and one question."""
    import jax

    from vlm_jax import sharding
    from vlm_jax.data import eval_batches as prompts
    from vlm_jax.models.vlm import Inputs

    vit = answerer.model.vit
    asked = prompts.prepare(
        [dict(row)], image_root, answerer.data, answerer.visual_tokens, vit, answerer.mesh.size
    )  # fmt: skip
    batch = next(asked.batches)
    blank = batch["tokens"][:, :1] * 0  # the prompt is not read: any length is the same program
    batch |= dict.fromkeys(("tokens", "visual_index", "positions", "segments"), blank)
    with sharding.use(answerer.mesh):
        inputs = Inputs.from_batch(sharding.put(batch, answerer.mesh))
        kept = jax.device_get(_sower(answerer.model)(answerer.params, inputs))
    sown = kept["intermediates"]["compressor"] if kept else {}
    return VIEWS[answerer.model.compressor.drawn].read(sown, vit.grid, answerer.visual_tokens)


@functools.lru_cache(16)
def _sower(config: VLMConfig) -> Callable[[Any, Any], Any]:
    """What the compressor of a model sows for the first image of a batch, as a jitted function of (params, inputs)."""
    import jax

    from vlm_jax.models.vlm import VLM

    def sow(params: Any, inputs: Any) -> Any:
        variables = {"params": params}
        _, kept = VLM(config).apply(variables, inputs, method="encode_images", mutable="intermediates")  # fmt: skip
        return jax.tree.map(lambda x: x[0], kept)

    return jax.jit(sow)


# --- what each compressor sows, for one image -------------------------------------------------------------------------


def _windows(sown: Mapping[str, Any], grid: int, tokens: int) -> Shown:
    """Weights inside windows, [M N s s]."""
    (weights,) = sown["attention"]["weights"]
    side = math.isqrt(tokens)
    over_image = rearrange(weights, "(gy gx) n y x -> n 1 (gy y gx x)", gy=side)
    heads = np.where(_members(grid, side), over_image, 0)
    return Shown(heads.mean(axis=0), heads)


def _means(sown: Mapping[str, Any], grid: int, tokens: int) -> Shown:
    """Nothing is sown: every token is the mean of its window."""
    inside = _members(grid, math.isqrt(tokens)).astype(np.float32)
    return Shown(inside / inside.sum(axis=1, keepdims=True))


def _members(grid: int, side: int) -> np.ndarray:
    """Whether a patch lies in a window, bool [M P], for side x side windows."""
    rows, columns = np.divmod(np.arange(grid**2), grid)
    window = rows * side // grid * side + columns * side // grid
    return window == np.arange(side**2)[:, None]


def _queries(sown: Mapping[str, Any], grid: int, tokens: int) -> Shown:
    """Weights of learned queries over the whole image, [N M P]."""
    (heads,) = sown["weights"]
    return Shown(heads.mean(axis=0), heads)


def _merged(sown: Mapping[str, Any], grid: int, tokens: int) -> Shown:
    """Weights of merged patches, [M P], and which slots are filled."""
    (weights,), (chosen,) = sown["weights"], sown["chosen"]
    filled = np.append(chosen.valid, True)
    return Shown(weights[filled], kept=chosen.kept[chosen.valid])


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(
    name: str, picture: Picture, grid: int, shown: Shown, question: str, answer: str
) -> Figure:
    """One large picture of all tokens; beside it `picture`, which the patches cover, and single heads or tokens."""
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    VIEWS[compressors.get(name).drawn].draw(figure, picture, grid, shown)
    asked = textwrap.shorten(question, 110, placeholder=" …")
    said = textwrap.shorten(answer, 110, placeholder=" …") or "(nothing)"
    count = len(shown.weights)
    counts = f"{name}: {count} visual token{'s' * (count > 1)} from {grid} x {grid} patches"
    figure.suptitle(f"{asked}\n→ {said}\n{counts}", x=0.01, ha="left", fontsize=10)
    return figure


def _draw_means(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """Nothing but the windows."""
    large, _ = _panels(figure, picture, grid, 0)
    large.imshow(picture, extent=(0, grid, grid, 0))
    _lines(large, grid, math.isqrt(len(shown.weights)))
    large.set_title("each token is the mean of one window", fontsize=9)


def _draw_windows(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """Windows do not overlap, so one picture holds the weights of all tokens; beside it one per head."""
    assert shown.heads is not None
    tokens, patches = shown.weights.shape
    even = tokens / patches  # of one patch, if all of a window counted the same
    heads = shown.heads.sum(axis=1) / even
    large, small = _panels(figure, picture, grid, min(len(heads), MAX_PANELS))
    drawn = _overlay(large, picture, grid, shown.weights.sum(axis=0) / even)
    norm = Normalize(0, heads.max())
    of_heads = [
        _overlay(axes, picture, grid, values, norm)
        for axes, values in zip(small, heads, strict=False)
    ]
    for n, axes in enumerate(small):
        axes.set_title(f"head {n + 1}", fontsize=8)
    for axes in (large, *small):
        _lines(axes, grid, math.isqrt(tokens))
    title = "where in its window each token looks, mean of the heads"
    large.set_title(title if tokens > 1 else "where the token looks, mean of the heads", fontsize=9)
    _colour_bar(figure, large, drawn, "weight in its window's token (1 = even share)")
    _colour_bar(figure, small, of_heads[0], "the same of single heads")


def _draw_queries(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """The mean over all tokens, and the first tokens one by one."""
    tokens, patches = shown.weights.shape
    values = shown.weights * patches
    large, small = _panels(figure, picture, grid, min(tokens, MAX_PANELS))
    drawn = _overlay(large, picture, grid, values.mean(axis=0))
    large.set_title(f"mean of all {tokens} tokens", fontsize=9)
    norm = Normalize(0, values[: len(small)].max())
    of_tokens = [
        _overlay(axes, picture, grid, row, norm) for axes, row in zip(small, values, strict=False)
    ]
    for m, axes in enumerate(small):
        axes.set_title(f"token {m + 1}", fontsize=8)
    _colour_bar(figure, large, drawn, "weight, mean of the heads (1 = even share)")
    _colour_bar(figure, small, of_tokens[0], "the same of single tokens")


def _draw_merged(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """What became of each patch, and of what the first tokens and the extra one are made."""
    assert shown.kept is not None
    first = min(len(shown.kept), MAX_PANELS - 1)
    large, small = _panels(figure, picture, grid, first + 1)
    _fates(large, picture, grid, shown)
    merged = shown.weights.copy()
    merged[np.arange(len(shown.kept)), shown.kept] = 0  # its own is 1 or more: the frame says so
    norm = Normalize(0, max(merged.max(), 1e-9))
    titles = [f"token {m + 1}" for m in range(first)] + ["extra token"]
    chosen = [*range(first), len(merged) - 1]
    drawn = [
        _overlay(axes, picture, grid, merged[m], norm)
        for axes, m in zip(small, chosen, strict=True)
    ]
    for axes, m, title in zip(small, chosen, titles, strict=True):
        if m < len(shown.kept):
            _frame(axes, grid, int(shown.kept[m]), 1.3)
        axes.set_title(title, fontsize=8)
    _colour_bar(figure, small, drawn[0], "weight of each merged patch (of the framed one: 1)")


def _fates(axes: Axes, picture: Picture, grid: int, shown: Shown) -> None:
    """Kept patches keep their colours, merged ones are purple, the others fade."""
    assert shown.kept is not None
    fates = np.zeros(grid**2)
    fates[shown.weights[:-1].max(axis=0) > 0] = 1
    fates[shown.kept] = 2
    axes.imshow(picture, extent=(0, grid, grid, 0))
    cover = np.array([0.8, 0.6, 0.0])[fates.astype(int)]
    _cells(axes, grid, fates, Normalize(0, 2), FATES, cover)
    for patch in shown.kept.tolist():
        _frame(axes, grid, patch, 1.2)
    axes.set_title("what became of each patch", fontsize=9)
    counts = [int((fates == fate).sum()) for fate in range(3)]
    handles = [
        Patch(facecolor="none", edgecolor=KEPT, linewidth=1.5, label=f"kept: {counts[2]}"),
        Patch(facecolor=FATES(1), alpha=0.7, label=f"merged into kept ones: {counts[1]}"),
        Patch(facecolor="#eeeeee", edgecolor="#999999", label=f"in the extra token alone: {counts[0]}"),
    ]  # fmt: skip
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, frameon=False, fontsize=8,
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def _panels(figure: Figure, picture: Picture, grid: int, count: int) -> tuple[Axes, list[Axes]]:
    """A large square and, right of it, the picture and `count` more small ones (none for 0); no axis has ticks."""
    cells = count + 1 if count else 0
    rows = max(math.ceil(math.sqrt(cells * 0.8)), 2) if cells else 1
    columns = math.ceil(cells / rows)
    height = 4.9  # inches of the large one
    figure.set_size_inches(height * (1 + columns / rows) + 0.4, height + 1.3)
    spec = figure.add_gridspec(rows, columns + 1, width_ratios=[rows] + [1] * columns)
    large = figure.add_subplot(spec[:, 0])
    small = [figure.add_subplot(spec[i // columns, 1 + i % columns]) for i in range(cells)]
    for axes in (large, *small):
        axes.set_axis_off()
    if small:
        small[0].imshow(picture, extent=(0, grid, grid, 0))
        small[0].set_title("the picture", fontsize=8)
    return large, small[1:]


def _overlay(
    axes: Axes, picture: Picture, grid: int, values: Patches, norm: Normalize | None = None
) -> AxesImage:
    """The picture in pale colours and `values` over it; large ones cover more. norm: None = 0 to the largest."""
    colour = picture.astype(np.float32) / 255
    grey = colour.mean(axis=2, keepdims=True)
    pale = (
        0.5 + 0.3 * grey + 0.2 * colour
    )  # some colour: shapes may differ from the ground in nothing else
    axes.imshow(pale, extent=(0, grid, grid, 0))
    norm = norm or Normalize(0, max(float(values.max()), 2.0))
    return _cells(axes, grid, values, norm, SCALE, 0.2 + 0.65 * np.clip(norm(values), 0, 1))


def _cells(
    axes: Axes, grid: int, values: Patches, norm: Normalize, scale: Colormap, cover: Patches
) -> AxesImage:
    square = lambda x: x.reshape(grid, grid)  # noqa: E731
    extent = (0, grid, grid, 0)
    return axes.imshow(square(values), cmap=scale, norm=norm, extent=extent, alpha=square(cover))


def _lines(axes: Axes, grid: int, side: int) -> None:
    """The borders of side x side windows."""
    edges = np.arange(1, side) * grid / side
    axes.vlines(edges, 0, grid, color="white", linewidth=0.8)
    axes.hlines(edges, 0, grid, color="white", linewidth=0.8)


def _frame(axes: Axes, grid: int, patch: int, width: float) -> None:
    y, x = divmod(patch, grid)
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=KEPT, linewidth=width))


def _colour_bar(figure: Figure, axes: Axes | list[Axes], drawn: AxesImage, label: str) -> None:
    """The scale as it looks where it covers everything."""
    full = ScalarMappable(drawn.norm, drawn.cmap)
    bar = figure.colorbar(full, ax=axes, location="bottom", shrink=0.8, aspect=45, pad=0.02)
    bar.locator = MaxNLocator(6)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


# How a compressor's tokens are drawn: its trait `drawn`.
VIEWS: dict[str, View] = {
    "means": View(_means, _draw_means),
    "windows": View(_windows, _draw_windows),
    "queries": View(_queries, _draw_queries),
    "merged": View(_merged, _draw_merged),
}
