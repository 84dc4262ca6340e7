"""python -m vlm_jax.aot --config=configs/stage2.py --topology=v5e:16x16 [--slices=N] [--search] [--train-only | --answer-only] [--json=FILE] [--config.x.y=..]

Compiles the train step, the prefill and the decode step for chips that need not exist, and prints the memory, FLOPs, memory
traffic and communication of each chip. --topology=local is this machine's devices. Exit code 1: the chip's memory is too small.

--slices is mesh.slices: so many slices of the topology, joined by a network. Prompts have data.max_tokens tokens, followed
by eval.max_new_tokens more; they are answered on a mesh of their own (inference/placement.py), of one slice, to whose
data * fsdp eval.batch_size is rounded up. Only the config is read: data, tokenizer and weights need not exist.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage.run import resolve

# libtpu queries the TPU machine it runs on; without one each query waits or warns.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def quiet_environment(topology: str) -> None:
    """Selects the CPU backend, on which described topologies are compiled. Call it before JAX is initialised."""
    if topology != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


def _say(text: str) -> None:
    """Writes without buffering, also into a pipe, because a search takes minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def command(argv: Sequence[str]) -> int:
    texts = {
        "topology": "chips: v5e:16x16, v5p:4x4x4, v6e:4x4, ... or local",
        "json": "also write the numbers to this file",
        "slices": "so many slices of the topology, joined by a network; default: mesh.slices",
    }
    switches = {
        "search": "try meshes, remat policies and micro-batches; show the best that fits",
        "train-only": "leave out prefill and decode",
        "answer-only": "leave out the train step",
    }
    flags = cli.parse(argv, texts, switches, required=("config", "topology"), about=__doc__ or "")
    if flags.slices:
        if not flags.slices.isdecimal() or not int(flags.slices):
            raise ConfigError(f"--slices: {flags.slices!r} is no number of slices; give 1 or more.")
        flags.config.mesh.slices = int(flags.slices)
    exp = resolve(flags.config, cli.given_fields(argv))
    quiet_environment(flags.topology)
    from vlm_jax.aot import (  # JAX takes seconds: mistakes are reported before
        footprint,
        programs,
        search,
    )

    devices = programs.devices(flags.topology, exp.mesh.slices)
    if flags.search:
        found = search.search(exp, devices, _say)
        if found is None:
            sys.stdout.write(f"{search.NOTHING}\n")
            return 1
        exp = found
    answers = flags.config.eval
    prompts = 0 if flags["train-only"].value else answers.batch_size
    report = footprint.measure(
        exp,
        flags.topology,
        devices,
        prompts,
        answers.max_new_tokens,
        not flags["answer-only"].value,
    )
    sys.stdout.write(report.table())
    if flags.json:
        report.write(flags.json)
    return 0 if report.fits else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when a program does not fit in the chip's memory, 2 for a mistake of the user's."""
    return cli.run(command, argv)
