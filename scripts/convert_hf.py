#!/usr/bin/env python3
"""Hugging Face directories to ours and back.

scripts/convert_hf.py IN OUT                 IN is a model directory: OUT becomes a workdir to evaluate, or to start from (init.*)
scripts/convert_hf.py WORKDIR OUT            WORKDIR is ours: OUT becomes a directory that transformers loads
scripts/convert_hf.py --from-bin IN OUT      pickled weights to safetensors, with torch, which refuses to run code

A decoder, an encoder or a projector need not be converted before training: set init.lm, init.vit, ... to its directory.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package and its configs, from a checkout

from vlm_jax import files  # noqa: E402
from vlm_jax.data import templates, tokenizer  # noqa: E402
from vlm_jax.hf import directory  # noqa: E402
from vlm_jax.hf.describe import describe  # noqa: E402
from vlm_jax.settings import cli  # noqa: E402
from vlm_jax.settings.checks import ConfigError  # noqa: E402
from vlm_jax.settings.hub import hub_hint  # noqa: E402
from vlm_jax.settings.model import DTYPES  # noqa: E402
from vlm_jax.storage import opened  # noqa: E402
from vlm_jax.storage import run as experiment  # noqa: E402

log = logging.getLogger("vlm_jax.convert_hf")

SOURCE = "imported_from.json"  # beside config.json of an imported model: {"base": directory}


def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    given, out = files.to_path(args.given), files.to_path(args.out)
    if args.from_bin:
        from vlm_jax.hf.pickled import unpickle

        unpickle(given, out)
    elif directory.is_model(given):
        import_model(given, out, args)
    elif (given / "checkpoints").is_dir():
        export_model(given, out, args)
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


def import_model(given: files.Path, out: files.Path, args: argparse.Namespace) -> None:
    """A model directory to a workdir with one checkpoint, step 0."""
    from vlm_jax import sharding  # seconds to import
    from vlm_jax.storage import weights  # seconds to import
    from vlm_jax.storage.checkpoint import save_params

    found = describe(given)
    if (out / "checkpoints").exists():
        raise ConfigError(f"{str(out)!r} holds checkpoints already; choose another directory.")
    folder = experiment.open_workdir(str(out))
    vit = args.vit or ""
    sources = opened.directory_sources(given, found, vit)
    config = opened.directory_config(
        given, found, sources, vit, args.template or "", args.param_dtype
    )
    if config.data.tokenizer:
        config.data.tokenizer = str(copy_tokenizer(given, folder / "tokenizer"))
        log.info("prompt format: %s (--template sets another)", config.data.template)
    exp = experiment.resolve(config)
    wanted = weights.abstract(exp.model, sharding.make_mesh(exp.mesh))
    params = weights.load_by_part(sources, exp.model, wanted)
    save_params(folder, params)
    experiment.write(exp, folder)
    (folder / SOURCE).write_text(json.dumps({"base": str(given.resolve())}) + "\n")
    log.info("%s: %s", out, ", ".join(sorted(params)))


def copy_tokenizer(given: files.Path, folder: files.Path) -> files.Path:
    folder.mkdir(exist_ok=True)
    for path in given.iterdir():
        own = path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template"))
        if path.is_file() and (own or path.name in ("vocab.json", "merges.txt")):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def export_model(workdir: files.Path, out: files.Path, args: argparse.Namespace) -> None:
    """The newest checkpoint of a workdir to a model directory."""
    from vlm_jax.hf import export, parts  # seconds to import
    from vlm_jax.storage import streamed

    exp = experiment.read(workdir)

    def load(names: Any, keep: int = 1) -> dict[str, Any]:
        # A base casts what it is given to its own dtypes.
        dtype = args.dtype or ("float32" if base else exp.model.lm.param_dtype)
        return streamed.params(workdir, exp.model, names, dtype, keep)

    base = None if args.standalone else args.base or recorded_base(workdir)
    if base is not None:
        if args.dtype:
            raise ConfigError("--dtype: a base keeps its dtypes; add --standalone for another.")
        there = directory.open_directory(base)
        held = parts.held(there, exp.model)
        leaves = load(held, parts.most_fused(there, exp.model))
        export.onto_base(out, files.to_path(base), leaves, exp.model)
        log.info("%s: %s of %s, the rest as in %s", out, ", ".join(sorted(held)), workdir, base)
        return
    has_tokenizer = bool(exp.data.tokenizer)
    if has_tokenizer and args.what != "vit":
        tokenizer.load(
            exp.data.tokenizer
        )  # what is wrong with it is said before the weights are read
    template = templates.TEMPLATES[exp.data.template]
    companions = export.Companions(
        tokenizer=files.to_path(exp.data.tokenizer) if has_tokenizer and args.what != "vit" else None,
        chat_template=templates.chat_template(template, exp.data.system) if template.keeps_question else None,
        image_mode=exp.data.image_mode,
    )  # fmt: skip
    export.standalone(
        out, args.what, load(export.WHAT[args.what]), exp.model, companions, args.dtype, args.encoder_name
    )  # fmt: skip
    log.info("%s: %s of %s", out, args.what, workdir)


def recorded_base(workdir: files.Path) -> str | None:
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
