#!/usr/bin/env python3
"""What stage 2 needs of TPU pods that need not be there: docs/scale_aot.csv, from the TPU compiler alone.

scripts/bench/aot.py [--csv docs/scale_aot.csv] [--only fit|slices|answer|weak] [--lm qwen1.5-7b] [--topology v5e:16x16]

    fit     the training step of SigLIP-so400m + Qwen1.5 of five sizes at 36 and 576 visual tokens on v5e:16x16, v5p and v6e slices
    slices  the same at 36 visual tokens on two slices, joined by a network
    answer  prefill and decode of 8 prompts of 2,048 tokens on 8 chips of a v5e or v6e, 4 of a v5p
    weak    the 1.8B at one row per chip on 8 to 256 chips of a v5e: FLOPs per chip must not change

One row per setting, written as soon as it is known: a run that was killed goes on after the rows that stand there. Each
row is one call of `python -m vlm_jax.aot`, whose command it holds; --table prints the rows as Markdown instead of making any. The encoder reads 336 pixels (24 x 24 patches, its position
table interpolated from 27 x 27): of 27 x 27 no square windows leave 36 or 576 tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
LMS = ("qwen1.5-7b", "qwen1.5-14b", "qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-4b")
STRIDES = {36: 4, 576: 1}  # of the compressor's windows on 24 x 24 patches
TOPOLOGIES = {"v5e:16x16": 256, "v5p:4x4x4": 64, "v6e:8x8": 64}
ANSWERS = {"v5e:2x4": 8, "v6e:2x4": 8, "v5p:2x2x1": 4}
PROMPTS = 8
WEAK = {
    "v5e:2x4": 8,
    "v5e:4x4": 16,
    "v5e:4x8": 32,
    "v5e:8x8": 64,
    "v5e:8x16": 128,
    "v5e:16x16": 256,
}
MODEL = (
    "--config=configs/stage2.py", "--config.model.vit.preset=siglip-so400m-384", "--config.model.vit.image_px=336",
    "--config.model.vit.position_grid=27", "--config.model.vit.param_dtype=bfloat16",
    "--config.model.compressor.name=tokenpacker", "--config.model.compressor.taps=()",
    "--config.model.lm.remat=full",
)  # fmt: skip
FSDP = {"fit": 32, "slices": 32, "weak": 8}
COLUMNS = (
    "kind", "lm", "visual_tokens", "topology", "slices", "chips", "batch", "tokens", "fits", "reason", "argument_gib", "temporary_gib",
    "peak_gib", "hbm_gib", "prefill_peak_gib", "decode_peak_gib", "gflop_per_chip", "flop_ratio", "traffic_gib", "sent_gib",
    "dcn_gib", "compute_ms", "memory_ms", "links_ms", "network_ms", "bound_ms", "mfu_bound", "answer_mesh", "prefill_bound_ms", "decode_bound_ms",
    "compile_s", "command",
)  # fmt: skip


def settings(kind: str, lm: str, visual_tokens: int, topology: str, chips: int) -> list[str]:
    """The flags of one row: one sample per chip.

    Weights are split 32 ways, the 14B's 64 ways (32 ways it needs 16.3 GiB of a v5e): split 256 ways, a chip keeps 16 of the 7B's 4096 columns, less than the 128 a TPU stores side
    by side, and the compiler sums gradients with all-reduce instead of reduce-scatter (13 % more bytes, half the peak).
    Weak scaling: 8 ways. Answers lie on the mesh that vlm_jax/inference/placement.py chooses.
    """
    flags = [
        *MODEL, f"--topology={topology}", f"--config.model.lm.preset={lm}",
        f"--config.model.compressor.stride={STRIDES[visual_tokens]}",
    ]  # fmt: skip
    if kind == "answer":
        return [*flags, f"--config.eval.batch_size={PROMPTS}", "--answer-only"]
    fsdp = 64 if lm == "qwen1.5-14b" else FSDP[kind]
    slices = 2 if kind == "slices" else 1
    flags += [
        f"--config.mesh.data={chips // fsdp}", f"--config.mesh.fsdp={fsdp}", f"--config.data.batch_size={slices * chips}",
        "--train-only",
    ]  # fmt: skip
    return [*flags, f"--slices={slices}"] if slices > 1 else flags


def measure(kind: str, lm: str, visual_tokens: int, topology: str, chips: int) -> dict[str, Any]:
    """One row."""
    flags = settings(kind, lm, visual_tokens, topology, chips)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        words = [sys.executable, "-m", "vlm_jax.aot", *flags, f"--json={file}"]
        done = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
        report = json.loads(file.read_text())
    programs = {need["name"]: need for need in report["programs"]}
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {
        "kind": kind,
        "lm": lm,
        "visual_tokens": visual_tokens,
        "topology": topology,
        "slices": report["slices"],
        "chips": report["devices"],
    }
    row |= {"fits": report["fits"], "command": " ".join(["python -m vlm_jax.aot", *flags])}
    row["reason"] = "; ".join(need["reason"] for need in report["programs"] if "reason" in need)
    train = programs.get("train step", {"reason": ""})
    row |= {"hbm_gib": f"{report['hbm_bytes'] / GIB:.4g}"}
    if "reason" not in train:
        row |= {"batch": int(train["work"].split()[0]), "tokens": int(train["work"].split()[-1])}
        row |= {
            f"{name}_gib": f"{train[f'{name}_bytes'] / GIB:.3f}"
            for name in ("argument", "temporary", "peak", "sent", "dcn")
        }
        row |= {"traffic_gib": f"{train['memory_bytes'] / GIB:.1f}"}
        row |= {
            "gflop_per_chip": f"{train['flops'] / 1e9:.1f}",
            "flop_ratio": f"{train['flop_ratio']:.3f}",
        }
        row |= {f"{name}_ms": f"{seconds * 1e3:.1f}" for name, seconds in train["seconds"].items()}
        row |= {
            "bound_ms": f"{train['bound_seconds'] * 1e3:.1f}",
            "mfu_bound": f"{train['mfu_bound']:.3f}",
        }
        row |= {"compile_s": f"{train['compile_seconds']:.0f}"}
    for name, column in (("prefill", "prefill"), ("decode step", "decode")):
        need = programs.get(name, {})
        if "peak_bytes" in need:
            row |= {
                f"{column}_peak_gib": f"{need['peak_bytes'] / GIB:.3f}",
                f"{column}_bound_ms": f"{need['bound_seconds'] * 1e3:.2f}",
                "batch": int(need["work"].split()[0]),
                "compile_s": f"{float(row['compile_s'] or 0) + need['compile_seconds']:.0f}",
                "answer_mesh": " ".join(
                    f"{k}={n}" for k, n in report["answer_mesh"].items() if n > 1
                ),
            }
    return row


TRAINING = {
    "LM": "lm", "V": "visual_tokens", "chips": "topology", "rows": "batch", "peak GiB": "peak_gib", "of": "hbm_gib",
    "TFLOP/chip": "gflop_per_chip", "sent GiB": "sent_gib", "bound ms": "bound_ms", "MFU at most": "mfu_bound",
}  # fmt: skip
ACROSS = TRAINING | {"sent over DCN, GiB": "dcn_gib", "DCN ms": "network_ms"}
ANSWERING = {
    "LM": "lm", "V": "visual_tokens", "chips": "topology", "prompts": "batch", "mesh": "answer_mesh", "of": "hbm_gib",
    "prefill GiB": "prefill_peak_gib", "prefill ms": "prefill_bound_ms", "decode GiB": "decode_peak_gib",
    "decode ms": "decode_bound_ms",
}  # fmt: skip
TABLES = {"fit": TRAINING, "slices": ACROSS, "answer": ANSWERING, "weak": TRAINING}
DIGITS = {"gflop_per_chip": ".2f", "bound_ms": ",.0f", "network_ms": ",.0f", "mfu_bound": ".0%"}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, a table per kind."""
    lines = []
    for kind, columns in TABLES.items():
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in (row for row in rows if row["kind"] == kind):
            lines.append("| " + " | ".join(_cell(row, name) for name in columns.values()) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str], name: str) -> str:
    text = row[name]
    if name == "topology" and row["slices"] == "2":
        return f"2 x {text}"
    if not text or not (name in DIGITS or name.endswith(("_gib", "_ms"))) or name == "hbm_gib":
        return text or "-"
    value = float(text) / 1e3 if name == "gflop_per_chip" else float(text)
    return format(value, DIGITS.get(name, ".1f"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--csv", default=str(ROOT / "docs" / "scale_aot.csv"))
    parser.add_argument("--only", choices=tuple(TABLES))
    parser.add_argument("--lm", choices=LMS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--topology", choices=(*TOPOLOGIES, *ANSWERS, *WEAK))
    asked = parser.parse_args()
    work = [("fit", lm, v, t, n) for t, n in TOPOLOGIES.items() for lm in LMS for v in STRIDES]
    work += [("slices", lm, 36, t, n) for t, n in TOPOLOGIES.items() for lm in LMS]
    work += [("answer", lm, v, t, n) for t, n in ANSWERS.items() for lm in LMS for v in STRIDES]
    work += [("weak", "qwen1.5-1.8b", 36, t, n) for t, n in WEAK.items()]
    path = Path(asked.csv)
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
    if asked.table:
        print(table(rows))
        return
    done = {(r["kind"], r["lm"], int(r["visual_tokens"]), r["topology"]) for r in rows}
    for item in work:
        if (
            item[:4] in done
            or asked.only not in (None, item[0])
            or asked.lm not in (None, item[1])
            or asked.topology not in (None, item[3])
        ):
            continue
        start = time.time()
        row = measure(*item)
        new = not path.is_file()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(
            *item,
            f"fits {row['fits']}",
            f"peak {row['peak_gib'] or row['decode_peak_gib']} GiB",
            f"{time.time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
