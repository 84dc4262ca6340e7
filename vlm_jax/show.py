"""python -m vlm_jax.show --config=configs/eval.py --config.eval.checkpoint=RUN image.jpg --question "What is this?" [--out=F]

Draws which patches of the image each visual token of a trained model is made of, as PNG or SVG (default IMAGE.tokens.png
in the current directory), with the model's answer above it. RUN is the workdir of a training run.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from ml_collections import ConfigDict

from vlm_jax import cli, experiment
from vlm_jax.config import ConfigError, MeshConfig, build
from vlm_jax.data import images
from vlm_jax.laws import plot

if TYPE_CHECKING:
    from vlm_jax.answer import Answerer

MAX_PANELS = 24  # small pictures, one per token or head
PICTURE_PX = 640  # at least, of the picture under the weights

# Okabe and Ito's blue and vermilion: apart for every kind of colour vision; the scale also falls in lightness.
KEPT = "#d55e00"
SCALE = LinearSegmentedColormap.from_list("weights", ["#ffffff", "#56b4e9", "#0072b2", "#00263d"])
FATES = ListedColormap(["#ffffff", "#56b4e9", KEPT])  # extra token only, merged, kept


class Shown(NamedTuple):
    """How much of each patch is in each visual token of one image, empty slots left out."""

    weights: Float[np.ndarray, "M P"]  # with several heads their mean
    heads: Float[np.ndarray, "N M P"] | None = None
    kept: Int[np.ndarray, "K"] | None = None  # the patches that the first K tokens started from


Picture = UInt8[np.ndarray, "H W 3"]


class View(NamedTuple):
    """read(what the compressor sowed, grid, M) -> Shown; draw(figure, picture, grid, Shown)."""

    read: Callable[[Mapping[str, Any], int, int], Shown]
    draw: Callable[[Figure, Picture, int, Shown], None]


def show(cfg: ConfigDict, image: str, question: str, out: str) -> Path:
    """Writes the picture and returns its path.

    Raises ConfigError for a run without a checkpoint, an image that cannot be read, or a path that cannot be written.
    """
    checkpoint = cfg.eval.checkpoint
    if not checkpoint:
        raise ConfigError(
            "eval: checkpoint is empty; give the workdir of a training run: --config.eval.checkpoint=DIR."
        )
    run = experiment.read(checkpoint)
    if experiment.last_step(checkpoint) is None:
        raise ConfigError(
            f"eval: checkpoint {checkpoint!r} has no finished checkpoint; train first."
        )
    if run.data.max_images < 1:
        raise ConfigError(f"eval: checkpoint {checkpoint!r} is of a run without images.")
    path = plot.check_path(out or f"{Path(image).stem}.tokens.png")
    vit, data = run.model.vit, run.data
    side = vit.image_px * math.ceil(PICTURE_PX / vit.image_px)
    try:
        picture = images.load(image, side, data.image_mode, vit.mean, data.max_image_pixels)
    except images.ImageError as error:
        raise ConfigError(f"image {image!r}: {error}.") from error
    from vlm_jax.answer import Answerer  # here, not above: jax and orbax take seconds

    answerer = Answerer(
        checkpoint, build(MeshConfig, cfg.mesh.to_dict()), "", cfg.eval.max_new_tokens, cfg.eval.temperature,
        cfg.eval.top_p, cfg.eval.seed,
    )  # fmt: skip
    said = [{"from": "human", "value": f"<image>\n{question}"}]
    file = Path(image).absolute()
    row = {"id": file.stem, "image": file.name, "conversations": said}
    shown = look(answerer, row, str(file.parent))
    (((_, answer),),) = answerer.ask([row], str(file.parent), answerer.mesh.size)
    cut = (
        side * vit.grid * vit.patch_px // vit.image_px
    )  # a border narrower than a patch is not seen
    name = run.model.compressor.name
    figure = draw(name, picture[:cut, :cut], vit.grid, shown, question, answer)
    return plot.save(figure, path)


def look(answerer: Answerer, row: Mapping[str, Any], image_root: str) -> Shown:
    """The model's own weights for a record with one image and one question."""
    import jax

    from vlm_jax import sharding
    from vlm_jax.data import pipeline
    from vlm_jax.models.vlm import VLM, Inputs

    vit, name = answerer.model.vit, answerer.model.compressor.name
    _, batches = pipeline.eval_batches(
        [dict(row)], image_root, answerer.data, answerer.visual_tokens, vit.image_px, vit.mean, answerer.mesh.size
    )  # fmt: skip
    batch = next(batches)
    del batch["ids"]

    def see(params: Any, inputs: Inputs) -> Any:
        model = VLM(answerer.model)
        _, kept = model.apply({"params": params}, inputs, method="see", mutable="intermediates")
        return jax.tree.map(lambda x: x[0], kept)  # the first image's

    with sharding.use(answerer.mesh):
        inputs = Inputs.from_batch(sharding.put(batch, answerer.mesh))
        kept = jax.device_get(jax.jit(see)(answerer.params, inputs))
    sown = kept["intermediates"]["compressor"] if kept else {}
    return VIEWS[name].read(sown, vit.grid, answerer.visual_tokens)


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
    """One large picture of all tokens and small ones of single heads or tokens. picture: what the patches cover."""
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    VIEWS[name].draw(figure, picture, grid, shown)
    asked = textwrap.shorten(question, 160, placeholder=" …")
    said = textwrap.shorten(answer, 160, placeholder=" …") or "(nothing)"
    counts = f"{name}: {len(shown.weights)} visual token(s) from {grid} x {grid} patches"
    figure.suptitle(f"{asked}\n→ {said}\n{counts}", x=0.01, ha="left", fontsize=11)
    return figure


def _draw_windows(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """Windows do not overlap, so one picture holds the weights of all tokens; beside it one per head."""
    tokens, patches = shown.weights.shape
    side = math.isqrt(tokens)
    even = tokens / patches  # of one patch, if all of a window counted the same
    heads = [] if shown.heads is None else [h.sum(axis=0) / even for h in shown.heads]
    overview = shown.weights.sum(axis=0) / even
    top = max([overview.max(), *(h.max() for h in heads), 2.0])
    norm = Normalize(0, top)
    large, small = _panels(figure, len(heads))
    drawn = _overlay(large, picture, grid, overview, norm)
    _lines(large, grid, side)
    large.set_title("all tokens, mean of the heads" if heads else "all tokens", fontsize=10)
    for n, (axes, values) in enumerate(zip(small, heads, strict=False)):
        _overlay(axes, picture, grid, values, norm)
        _lines(axes, grid, side)
        axes.set_title(f"head {n + 1}", fontsize=8)
    _colour_bar(figure, large, drawn, "weight in its window's token (1 = even share)")


def _draw_queries(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """The mean over all tokens, and the first tokens one by one."""
    tokens, patches = shown.weights.shape
    values = shown.weights * patches
    large, small = _panels(figure, min(tokens, MAX_PANELS))
    norm = Normalize(0, max(np.quantile(values, 0.999), 2.0))
    mean = values.mean(axis=0)
    drawn = _overlay(large, picture, grid, mean, norm)
    large.set_title(f"mean of all {tokens} tokens", fontsize=10)
    for m, (axes, row) in enumerate(zip(small, values, strict=False)):
        _overlay(axes, picture, grid, row, norm)
        axes.set_title(f"token {m + 1}", fontsize=8)
    _colour_bar(figure, large, drawn, "weight, mean of the heads (1 = even share)")


def _draw_merged(figure: Figure, picture: Picture, grid: int, shown: Shown) -> None:
    """What became of each patch, and of what the first tokens and the extra one are made."""
    assert shown.kept is not None
    fates = np.zeros(grid**2)
    fates[shown.weights[:-1].max(axis=0) > 0] = 1
    fates[shown.kept] = 2
    first = min(len(shown.kept), MAX_PANELS - 1)
    large, small = _panels(figure, first + 1)
    _overlay(
        large,
        picture,
        grid,
        fates,
        Normalize(0, 2),
        FATES,
        np.array([0.72, 0.45, 0.0])[fates.astype(int)],
    )
    for patch in shown.kept:
        _frame(large, grid, patch, 1.2)
    large.set_title("what became of each patch", fontsize=10)
    counts = [int((fates == fate).sum()) for fate in range(3)]
    large.legend(
        handles=[
            Patch(facecolor="none", edgecolor=KEPT, linewidth=1.5, label=f"kept: {counts[2]}"),
            Patch(facecolor=FATES(1), alpha=0.6, label=f"merged into kept ones: {counts[1]}"),
            Patch(facecolor="#eeeeee", edgecolor="#999999", label=f"in the extra token alone: {counts[0]}"),
        ],
        loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, frameon=False, fontsize=8, handlelength=1.2,
        columnspacing=1.2,
    )  # fmt: skip
    merged = shown.weights.copy()
    merged[np.arange(len(shown.kept)), shown.kept] = (
        0  # its own weight is 1 and more: the frame says so
    )
    norm = Normalize(0, max(merged.max(), 1e-9))
    chosen = [*range(first), len(merged) - 1]
    for axes, m in zip(small, chosen, strict=False):
        drawn = _overlay(axes, picture, grid, merged[m], norm)
        if m < len(shown.kept):
            _frame(axes, grid, shown.kept[m], 1.5)
        axes.set_title(f"token {m + 1}" if m < len(shown.kept) else "extra token", fontsize=8)
    _colour_bar(figure, small, drawn, "weight of a merged patch (the framed one: 1)")


def _panels(figure: Figure, count: int) -> tuple[Axes, list[Axes]]:
    """A large square and `count` small ones right of it, all without ticks."""
    rows = max(math.ceil(math.sqrt(count * 0.75)), 2) if count else 1
    columns = math.ceil(count / rows)
    figure.set_size_inches(5.4 + 5.0 * columns / rows, 6.2)
    spec = figure.add_gridspec(rows, columns + 1, width_ratios=[rows] + [1] * columns)
    large = figure.add_subplot(spec[:, 0])
    small = [figure.add_subplot(spec[i // columns, 1 + i % columns]) for i in range(count)]
    for axes in (large, *small):
        axes.set_axis_off()
    return large, small


def _overlay(
    axes: Axes, picture: Picture, grid: int, values: Float[np.ndarray, "P"], norm: Normalize,
    scale: Any = SCALE, alpha: Float[np.ndarray, "P"] | None = None,
):  # fmt: skip
    """The picture in pale grey and `values` over it, in units of patches; strong ones cover more."""
    light = picture.astype(np.float32).mean(axis=2) / 255
    extent = (0, grid, grid, 0)
    axes.imshow(0.25 + 0.75 * light, cmap="gray", vmin=0, vmax=1, extent=extent)
    opacity = 0.15 + 0.7 * np.clip(norm(values), 0, 1) if alpha is None else alpha
    square = values.reshape(grid, grid)
    return axes.imshow(
        square, cmap=scale, norm=norm, extent=extent, alpha=opacity.reshape(grid, grid)
    )


def _lines(axes: Axes, grid: int, side: int) -> None:
    """The borders of the windows."""
    for at in np.arange(1, side) * grid / side:
        axes.plot([at, at], [0, grid], [0, grid], [at, at], color="white", linewidth=0.8)


def _frame(axes: Axes, grid: int, patch: int, width: float) -> None:
    y, x = divmod(int(patch), grid)
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=KEPT, linewidth=width))


def _colour_bar(figure: Figure, axes: Any, drawn: Any, label: str) -> None:
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8, aspect=40, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.solids.set(alpha=1)


VIEWS: dict[str, View] = {
    "identity": View(_means, _draw_windows),
    "pool": View(_means, _draw_windows),
    "m3": View(_means, _draw_windows),
    "quecc": View(_windows, _draw_windows),
    "tokenpacker": View(_windows, _draw_windows),
    "mqt": View(_queries, _draw_queries),
    "prumerge": View(_merged, _draw_merged),
    "prumerge_plus": View(_merged, _draw_merged),
}


def command(argv: Sequence[str]) -> None:
    flags = cli.parse(
        argv,
        {
            "image": "the picture; its flag may be left out",
            "question": "what to ask about it",
            "out": "the .png or .svg to write (default IMAGE.tokens.png, here)",
        },
        required=("config", "image", "question"),
        positional="image",
    )
    path = show(flags.config, flags.image, flags.question, flags.out)
    sys.stdout.write(f"{path}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
