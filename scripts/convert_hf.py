#!/usr/bin/env python3
"""Hugging Face directories to ours and back.

scripts/convert_hf.py IN OUT                 IN is a model directory: OUT becomes a workdir to evaluate, or to start from (init.*)
scripts/convert_hf.py WORKDIR OUT            WORKDIR is ours: OUT becomes a directory that transformers loads
scripts/convert_hf.py --from-bin IN OUT      pickled weights to safetensors, with torch, which refuses to run code

A decoder, an encoder or a projector need not be converted before training: set init.lm, init.vit, ... to its directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package and its configs, from a checkout

from ml_collections import ConfigDict  # noqa: E402

from vlm_jax import compressors, files  # noqa: E402
from vlm_jax.data import templates, tokenizer  # noqa: E402
from vlm_jax.hf import directory, named  # noqa: E402
from vlm_jax.hf.describe import describe  # noqa: E402
from vlm_jax.hf.settings import feature_layer, preprocessing  # noqa: E402
from vlm_jax.settings import cli  # noqa: E402
from vlm_jax.settings.checks import ConfigError  # noqa: E402
from vlm_jax.settings.hub import hub_hint  # noqa: E402
from vlm_jax.settings.model import DTYPES  # noqa: E402
from vlm_jax.storage import run as experiment  # noqa: E402

log = logging.getLogger("vlm_jax.convert_hf")

SOURCE = "imported_from.json"  # beside config.json of an imported model: {"base": directory}
# The prompt format that a tokenizer with these tokens was trained on.
FORMATS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "<|assistant|>": "phi3"}


def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    given = Path(args.given)
    if args.from_bin:
        from vlm_jax.hf.pickled import unpickle

        unpickle(given, Path(args.out))
    elif directory.is_model(given):
        import_model(given, Path(args.out), args)
    elif (given / "checkpoints").is_dir():
        export_model(given, Path(args.out), args)
    else:
        raise ConfigError(
            f"{args.given!r} is neither a model directory (config.json with a model_type) nor a workdir (checkpoints/)."
            f"{hub_hint(args.given)}"
        )


def arguments() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("given", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--from-bin", action="store_true", help="pickled weights to safetensors")
    inward = parser.add_argument_group("importing")
    inward.add_argument("--vit", help="directory of the encoder, where IN only names it")
    inward.add_argument("--template", choices=sorted(templates.TEMPLATES), help="prompt format; default: by the tokenizer")  # fmt: skip
    inward.add_argument("--param-dtype", choices=DTYPES, default="float32")
    outward = parser.add_argument_group("exporting")
    outward.add_argument("--what", choices=("llava", "lm", "vit", "reference"), default="llava")
    outward.add_argument("--base", help="directory whose names, files and settings are kept; default: where it was imported from")  # fmt: skip
    outward.add_argument("--standalone", action="store_true", help="names and settings of our own")
    outward.add_argument("--dtype", choices=DTYPES, default="", help="of a standalone export; default: the parameters'")  # fmt: skip
    outward.add_argument("--encoder-name", default="", help="with --what=reference: mm_vision_tower")  # fmt: skip
    return parser


def import_model(given: Path, out: Path, args: argparse.Namespace) -> None:
    """A model directory to a workdir with one checkpoint, step 0."""
    from vlm_jax import sharding  # seconds to import
    from vlm_jax.storage import weights  # seconds to import
    from vlm_jax.storage.checkpoint import save_params

    found = describe(given)
    if (out / "checkpoints").exists():
        raise ConfigError(f"{str(out)!r} holds checkpoints already; choose another directory.")
    folder = experiment.open_workdir(str(out))
    sources = sources_of(given, found, args.vit)
    exp = experiment.resolve(settings_of(given, folder, found, sources, args))
    wanted = weights.abstract(exp.model, sharding.make_mesh(exp.mesh))
    params = weights.load_by_part(sources, exp.model, wanted)
    save_params(folder, params)
    experiment.write(exp, folder)
    (folder / SOURCE).write_text(json.dumps({"base": str(given.resolve())}) + "\n")
    log.info("%s: %s", out, ", ".join(sorted(params)))


def sources_of(given: Path, found: Any, vit: str | None) -> dict[str, str]:
    """The directory that each part comes from."""
    sources = {}
    if found.lm:
        sources["lm"] = str(given)
    if found.projector_layers:
        sources["projector"] = str(given)
    if found.compressor and found.compressor.name != "identity":
        sources["compressor"] = str(given)
    if found.vit:
        sources["vit"] = str(given)
    elif found.encoder:
        inside = directory.sort(directory.open_directory(given).tensors)[directory.VIT]
        sources["vit"] = str(given) if inside and not vit else vit or found.encoder
        if not directory.is_model(sources["vit"]):
            raise ConfigError(
                f"{str(given)!r} names its encoder {found.encoder!r} but does not hold it; give --vit=DIR."
            )
    return sources


def settings_of(given: Path, folder: Path, found: Any, sources: dict[str, str], args: Any) -> Any:
    """configs/default.py with the model, the tokenizer and the images of the directory."""
    c = cli.load_config(str(ROOT / "configs" / "default.py"))
    presets_of = sources | ({"vit": args.vit} if args.vit else {})
    for part in ("vit", "lm"):
        if part in sources:
            c.model[part].preset = presets_of[part]
        c.model[part].param_dtype = args.param_dtype
        c.model[part].dtype = "float32" if args.param_dtype == "float32" else "bfloat16"
    if found.encoder:
        layers = named.vit(presets_of["vit"]).num_layers
        c.model.vit.feature_layer = feature_layer(found.select_layer, layers)
    compressor = found.compressor or compressors.settings("identity")
    compressor = dataclasses.replace(compressor, dtype=c.model.vit.dtype)
    c.model.compressor = ConfigDict(dataclasses.asdict(compressor))
    c.model.projector_layers = found.projector_layers or c.model.projector_layers
    if "vit" in sources:
        vit = named.vit(presets_of["vit"])
        family = "clip_vision_model" if vit.cls_token else "siglip_vision_model"
        pixels = preprocessing(Path(presets_of["vit"]), vit.image_px, family)
        c.data.image_mode = "pad" if found.padded else pixels["image_mode"]
    if tokenizer.is_there(str(given)):
        c.data.tokenizer = str(copy_tokenizer(given, folder / "tokenizer"))
        known = tokenizer.load(c.data.tokenizer)
        marked = [name for token, name in FORMATS.items() if known.token_id(token) is not None]
        c.data.template = args.template or (marked or ["vicuna_v1"])[0]
        log.info("prompt format: %s (--template sets another)", c.data.template)
    return c


def copy_tokenizer(given: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in given.iterdir():
        own = path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template"))
        if path.is_file() and (own or path.name in ("vocab.json", "merges.txt")):
            shutil.copy(path, folder / path.name)
    return folder


def export_model(workdir: Path, out: Path, args: argparse.Namespace) -> None:
    """The newest checkpoint of a workdir to a model directory."""
    import jax

    from vlm_jax import sharding
    from vlm_jax.hf import export, parts
    from vlm_jax.models import adapters
    from vlm_jax.settings.run import MeshConfig
    from vlm_jax.storage import weights

    exp = experiment.read(workdir)
    wanted = weights.abstract(exp.model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))

    def load(names: Any) -> dict[str, Any]:
        own = {name: wanted[name] for name in names if name in wanted}
        params = weights.load(str(workdir), exp.model, own)
        if "lm" in params:
            # A base casts what it is given to its own dtypes.
            dtype = args.dtype or ("float32" if base else exp.model.lm.param_dtype)
            params["lm"] = adapters.merged(params["lm"], exp.model.lm, dtype)
        return params

    base = None if args.standalone else args.base or recorded_base(workdir)
    if base is not None:
        if args.dtype:
            raise ConfigError("--dtype: a base keeps its dtypes; add --standalone for another.")
        held = parts.held(directory.open_directory(base), exp.model)
        export.onto_base(out, Path(base), load(held), exp.model)
        log.info("%s: %s of %s, the rest as in %s", out, ", ".join(sorted(held)), workdir, base)
        return
    has_tokenizer = bool(exp.data.tokenizer)
    if has_tokenizer and args.what != "vit":
        tokenizer.load(
            exp.data.tokenizer
        )  # what is wrong with it is said before the weights are read
    template = templates.TEMPLATES[exp.data.template]
    companions = export.Companions(
        tokenizer=Path(exp.data.tokenizer) if has_tokenizer and args.what != "vit" else None,
        chat_template=templates.chat_template(template, exp.data.system) if template.keeps_question else None,
        image_mode=exp.data.image_mode,
    )  # fmt: skip
    export.standalone(
        out, args.what, load(export.WHAT[args.what]), exp.model, companions, args.dtype, args.encoder_name
    )  # fmt: skip
    log.info("%s: %s of %s", out, args.what, workdir)


def recorded_base(workdir: Path) -> str | None:
    """The directory that an imported model came from."""
    if not (workdir / SOURCE).is_file():
        return None
    base = str(files.read_json(workdir / SOURCE).get("base"))
    if not directory.is_model(base):
        raise ConfigError(
            f"{str(workdir)!r} was imported from {base!r}, which is gone; give --base=DIR, or --standalone to write "
            "without it."
        )
    return base


if __name__ == "__main__":
    sys.exit(cli.run(main))
