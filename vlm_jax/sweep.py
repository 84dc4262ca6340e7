"""python -m vlm_jax.sweep --config=configs/mini.py --workdir=DIR: every (LM, visual tokens) cell, the law, the report.

    DIR/seed0/{data,features}                            what the prepare step wrote, and cached features
    DIR/seed0/<stage>[/<lm>]                             stages that cells share
    DIR/seed0/cells/<compressor>-<lm>-v<tokens>          a cell's last stage; below it <stage>, those before, and eval
    DIR/seed0/logs/<part>.txt                            what a part logged, if it ran beside others
    DIR/errors.csv  questions.jsonl  reruns.json  law.json  law_*.json  *.png  *.svg  report.md  report.html

Parts that do not need each other run side by side, each on one core (sweep.processes). Finished parts are skipped and
others are resumed, so the same command continues a sweep that was killed.
On several machines that share DIR (scripts/sweep_array.sh), `--part=shared` makes what the cells share and `--part=I/N` runs
every N-th training from the I-th on (0 <= I < N). The command without --part then writes the table, the law and the report.

--dry-run prints what every training takes and the total, without data or weights: steps, tokens, FLOPs and, with
--topology=v5e:16x16 or H100:8, memory per chip, hours and chip-hours; with --chip-hour-dollars=1.2 their price. A step's time
is its lower bound, or that at a share of the peak, --mfu=0.4. With --compile memory and bound are those of the program that
XLA compiles for TPU chips, which takes minutes per training.

vlm_jax/sweeps/__init__.py says what a config's block `sweep` holds.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from vlm_jax.settings import cli, huge_pages
from vlm_jax.settings.checks import ConfigError
from vlm_jax.sweeps import running

log = logging.getLogger(__name__)


def command(argv: Sequence[str]) -> None:
    texts = {
        "workdir": "directory of the sweep",
        "part": "shared, or I/N: every N-th training from the I-th; not given: everything that is missing, and the report",
    }
    texts |= {
        "topology": "with --dry-run: chips, such as v5e:16x16 or H100:8",
        "chip-hour-dollars": "with --dry-run: the price of a chip for an hour",
        "mfu": "with --dry-run: the share of the peak that trainings reach; not given: a lower bound on the time",
    }
    switches = {
        "dry-run": "print what every training takes, and begin nothing",
        "compile": "with --dry-run and TPU chips: memory and bounds by XLA's compiler, minutes per training",
    }
    dry = any(word in ("--dry-run", "-dry-run", "--dry-run=true") for word in argv)
    required = ("config",) if dry else ("config", "workdir")
    flags = cli.parse(argv, texts, switches, required, about=__doc__ or "")
    for name in ("topology", "chip-hour-dollars", "mfu", "compile"):
        if flags[name].value and not flags["dry-run"].value:
            raise ConfigError(f"--{name}: is for --dry-run alone; add --dry-run, or leave it out.")
        if flags[name].value and not flags.topology:
            raise ConfigError(f"--{name}: name the chips too, such as --topology=v5e:16x16.")
    if flags["dry-run"].value:
        from vlm_jax.sweeps import dry_run  # here, not above: it loads jax

        on = dry_run.machine(flags.topology, flags.mfu, bool(flags["compile"].value))
        price = dry_run.number("--chip-hour-dollars", str(flags["chip-hour-dollars"].value or ""))
        sys.stdout.write(dry_run.report(flags.config, flags.workdir, on, price))
        return
    huge_pages.use()  # the processes of its parts inherit it
    if flags.part:
        running.sweep_part(flags.config, flags.workdir, flags.part)
        return
    made_by = shlex.join(["python", "-m", "vlm_jax.sweep", *argv])
    path = running.sweep(flags.config, flags.workdir, made_by)
    log.info("report: %s", path)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
