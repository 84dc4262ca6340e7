"""python -m vlm_jax.show --config=configs/eval.py --config.eval.checkpoint=RUN image.jpg --question "What is this?" [--out=F]

Draws which patches of the image each visual token of a trained model is made of, as PNG or SVG (default IMAGE.tokens.png
in the current directory), with the model's answer above it. RUN is the workdir of a training run. Other fields of `eval`,
such as temperature and visual_tokens, are used too.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import images
from vlm_jax.files import Path, to_path
from vlm_jax.inference import views
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.laws import drawing
from vlm_jax.settings import addresses, cli
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment

PICTURE_PX = 640  # at least, of the picture under the weights


def show(cfg: ConfigDict, image: str, question: str, out: str) -> Path:
    """Writes the picture and returns its path.

    Raises ConfigError for a run without a checkpoint, an image that cannot be read, or a path that cannot be written.
    """
    addresses.check_settings(cfg.to_dict())
    settings = EvalConfig.from_block(cfg.eval.to_dict())
    checkpoint = settings.checkpoint
    run = experiment.read(checkpoint)
    if experiment.last_step(checkpoint) is None:
        raise ConfigError(
            f"eval: checkpoint {checkpoint!r} has no finished checkpoint; train first."
        )
    if run.data.max_images < 1:
        raise ConfigError(f"eval: checkpoint {checkpoint!r} is of a run without images.")
    path = drawing.check_path(out or f"{to_path(image).stem}.tokens.png")
    vit, data = run.model.vit, run.data
    side = vit.image_px * math.ceil(PICTURE_PX / vit.image_px)
    try:
        picture = images.load(
            image,
            side,
            data.image_mode,
            vit.mean,
            data.max_image_pixels,
            vit.resample,
            data.exif_rotation,
        )
    except images.ImageError as error:
        raise ConfigError(f"image {image!r}: {error}.") from error
    from vlm_jax.inference.answer import Answerer  # here, not above: jax and orbax take seconds

    settings = dataclasses.replace(settings, features_dir="")  # the picture is in no cache
    answerer = Answerer(settings, build(MeshConfig, cfg.mesh.to_dict()))
    said = [{"from": "human", "value": f"<image>\n{question}"}]
    file = to_path(image).absolute()
    row = {"id": file.stem, "image": file.name, "conversations": said}
    shown = views.look(answerer, row, str(file.parent))
    (((_, answer),),) = answerer.ask([row], str(file.parent), answerer.mesh.size)
    # A border narrower than a patch is not seen.
    cut = side * vit.grid * vit.patch_px // vit.image_px
    name = run.model.compressor.name
    figure = views.draw(name, picture[:cut, :cut], vit.grid, shown, question, answer)
    return drawing.save(figure, path)


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
        about=__doc__ or "",
    )
    path = show(flags.config, flags.image, flags.question, flags.out)
    sys.stdout.write(f"{path}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
