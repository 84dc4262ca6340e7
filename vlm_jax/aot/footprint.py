"""The resources that the three programs of a run need per chip, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from vlm_jax import files, sharding
from vlm_jax.aot import programs, roofline
from vlm_jax.aot.roofline import Need, TooBig
from vlm_jax.costs.chips import GIB, Chip
from vlm_jax.settings.run import Experiment

NOTES = """\
arguments are parameters, optimiser state and batch; peak = arguments + outputs + temporaries - reused (donated) ones.
FLOP: matrix products as compiled, recomputation and whole blocks of flash kernels included; beside it their ratio to the
analytic count (vlm_jax/costs/flops.py), which has no recomputation. Traffic is an estimate: what passes
between fused operations and the main memory. Links: bytes a chip sends if each group works as a ring.
DCN: bytes a chip sends to other slices. The bound is the largest of FLOP / peak, traffic / bandwidth, links / bandwidth and
DCN / its share of the network: no run is faster.
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """Measured programs in the order of compilation; a TooBig is one that the compiler rejected."""

    experiment: Experiment
    topology: str
    mesh: Mesh
    answer_mesh: Mesh | None  # of prefill and decode
    chip: Chip | None  # None: not in chips.CHIPS (a CPU), so limits and bounds are unknown
    programs: tuple[Need | TooBig, ...]

    @property
    def fits(self) -> bool:
        return not self.misfits()

    def misfits(self) -> list[str]:
        """One line per program that does not fit in the chip's memory."""
        return [line for need in self.programs if (line := misfit(need, self.chip))]

    def table(self) -> str:
        """One column per program, then notes and the verdict."""
        chip, model = self.chip, self.experiment.model
        kind = f"{chip.name}, {chip.hbm_bytes / GIB:.4g} GiB each" if chip else "no known chip"
        slices = f"{exp.mesh.slices} slices of " if (exp := self.experiment).mesh.slices > 1 else ""
        head = [
            f"{slices}{self.topology}: {self.mesh.size} devices ({kind}); mesh {_spelt(self.mesh)}; remat "
            f"{model.lm.remat}; batch {self.experiment.data.batch_size}",
        ]
        if self.answer_mesh is not None:
            answers = f"prefill and decode: mesh {_spelt(self.answer_mesh)}"
            head.append(answers + f"; {self.answer_mesh.size} devices, one slice" * bool(slices))
        head.append("")
        needs = [need for need in self.programs if isinstance(need, Need)]
        rows = [("per chip", [need.name for need in needs])]
        rows += [(label, [text(need) for need in needs]) for label, text in _rows(chip, needs)]
        lines = [f"{label:<24}" + "".join(f"{c:>22}" for c in cells) for label, cells in rows]
        notes = [f"not counted in {need.name}: {k}" for need in needs for k in need.unknown_kernels]
        notes += [
            f"{need.name}: {need.open_loops} loops of unknown length count once"
            for need in needs
            if need.open_loops
        ]
        verdict = self.misfits() or ["fits." if chip else "no limit known for these devices."]
        return "\n".join([*head, *lines, "", *notes, NOTES, *verdict]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """All numbers, including those derived from the chip's specification."""
        return {
            "topology": self.topology,
            "devices": self.mesh.size,
            "chip": self.chip and self.chip.name,
            "hbm_bytes": self.chip and self.chip.hbm_bytes,
            "slices": self.experiment.mesh.slices,
            "mesh": dict(self.mesh.shape),
            "answer_mesh": self.answer_mesh and dict(self.answer_mesh.shape),
            "fits": self.fits,
            "programs": [_entry(need, self.chip) for need in self.programs],
        }

    def write(self, path: str) -> None:
        """Saves `as_dict` as JSON."""
        files.write_whole(path, json.dumps(self.as_dict(), indent=2) + "\n")


def measure(
    exp: Experiment,
    topology: str,
    devices: list[Any],
    prompts: int,
    new_tokens: int,
    training: bool = True,
) -> Report:
    """Compiles for `devices`. prompts: the batch of prefill and decode, rounded up to split evenly; 0: train step only.

    training: whether the train step is compiled. Prefill and decode are compiled for one slice, on a mesh of their own.
    Raises ConfigError when mesh, batch and parameters do not divide.
    """
    mesh, answers = sharding.mesh_of(exp, devices), None
    found = [roofline.train(exp, mesh)] if training else []
    if prompts:
        one = programs.devices(topology) if exp.mesh.slices > 1 else devices
        answers = programs.answer_mesh(exp, one, prompts)
        found += roofline.answer(exp, answers, programs.rows_of(answers, prompts), new_tokens)
    return Report(exp, topology, mesh, answers, roofline.chip_of(devices), tuple(found))


def _spelt(mesh: Mesh) -> str:
    """The axes of a mesh that split anything."""
    return ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "of one device"


def misfit(need: Need | TooBig, chip: Chip | None) -> str:
    """Why a program does not fit in the chip's memory; "" if it does."""
    if isinstance(need, TooBig):
        return f"does not fit: {need.name}: {need.reason}"
    if chip is None or need.peak_bytes <= chip.hbm_bytes:
        return ""
    return (
        f"does not fit: {need.name} needs {need.peak_bytes / GIB:.2f} GiB, a {chip.name} has "
        f"{chip.hbm_bytes / GIB:.4g} GiB."
    )


def _entry(need: Need | TooBig, chip: Chip | None) -> dict[str, Any]:
    found = dataclasses.asdict(need) | {"fits": not misfit(need, chip)}
    if isinstance(need, TooBig):
        return found
    found |= {
        "peak_bytes": need.peak_bytes,
        "flop_ratio": need.ratio,
        "sent_bytes": need.sent_bytes,
        "dcn_bytes": need.dcn_bytes,
    }
    if chip is not None:
        found |= {
            "seconds": need.seconds(chip),
            "bound_seconds": need.bound(chip),
            "mfu_bound": need.mfu(chip),
        }
    return found


def _rows(chip: Chip | None, needs: list[Need]) -> list[tuple[str, Callable[[Need], str]]]:
    """The label of each line of the table, with a function that makes its cells."""

    def size(name: str) -> Callable[[Need], str]:
        return lambda need: f"{getattr(need, name) / GIB:.3f}"

    rows: list[tuple[str, Callable[[Need], str]]] = [
        ("rows x tokens", lambda need: need.work),
        ("arguments, GiB", size("argument_bytes")),
        ("outputs, GiB", size("output_bytes")),
        ("temporaries, GiB", size("temporary_bytes")),
        ("reused, GiB", size("alias_bytes")),
    ]
    if chip:
        limit = chip.hbm_bytes
        rows.append(
            ("peak, GiB", lambda n: f"{n.peak_bytes / GIB:.3f} ({n.peak_bytes / limit:.0%})")
        )
    else:
        rows.append(("peak, GiB", size("peak_bytes")))
    if any(need.host_bytes for need in needs):
        rows.append(("on the host, GiB", size("host_bytes")))
    rows.append(("GFLOP (ratio)", lambda n: f"{n.flops / 1e9:,.1f} ({n.ratio:.2f})"))
    if any(need.kernel_flops for need in needs):
        rows.append(("  in kernels", lambda n: f"{n.kernel_flops / 1e9:,.1f}"))
    rows.append(("traffic, GiB", size("memory_bytes")))
    for kind in sorted({kind for need in needs for kind in need.collectives}):
        rows.append((kind, lambda n, kind=kind: _collective(n, kind)))
    if chip:
        names = ("compute", "memory", "links", "network")
        for name in names if any(need.dcn_bytes for need in needs) else names[:3]:
            rows.append((f"{name}, ms", lambda n, name=name: f"{n.seconds(chip)[name] * 1e3:,.3f}"))
        rows.append(("bound, ms", lambda n: f"{n.bound(chip) * 1e3:,.3f} ({n.bounded_by(chip)})"))
        rows.append(("MFU at most", lambda n: f"{n.mfu(chip):.1%}"))
    return rows


def _collective(need: Need, kind: str) -> str:
    times, sent = need.collectives.get(kind, (0, 0.0))
    return f"{times:g} x, {sent / GIB:.3f} GiB" if times else "-"
