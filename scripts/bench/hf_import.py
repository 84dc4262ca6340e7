#!/usr/bin/env python3
"""Peak host memory and speed of the streamed import of a Hugging Face checkpoint, beside reading it whole.

scripts/bench/hf_import.py [--gigabytes 3] [--devices 8] [--keep DIR]

Writes a random Llama checkpoint (bfloat16, several shards), then loads it in one fresh process per way:

    streamed   vlm_jax.storage.weights.load: one tensor at a time to its place on the devices, over a mesh of fake CPU devices
    whole      every tensor of every file in host memory first, then to the same places

On a CPU the devices' memory is the host's: "beyond" is the peak resident memory less what the process held before and less
the parameters themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

LAYERS, WIDTH, MLP, HEADS, VOCAB = 24, 2048, 5504, 16, 151936  # Qwen1.5-1.8B's shapes
SHARD_BYTES = 1_000_000_000


def write_checkpoint(folder: Path, layers: int) -> int:
    """A Llama directory with random bfloat16 weights; its bytes."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}  # fmt: skip
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (MLP, WIDTH) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, MLP)
        shapes |= {f"{layer}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    folder.mkdir(parents=True)
    block = rng.standard_normal(1 << 20).astype(np.float32).astype(ml_dtypes.bfloat16)
    weight_map, current, size, total = {}, {}, 0, 0

    def flush() -> None:
        nonlocal current, size
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(current, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(current, file))
        current, size = {}, 0

    for name, shape in shapes.items():
        count = int(np.prod(shape))
        current[name] = np.resize(block, count).reshape(shape)
        size, total = size + 2 * count, total + 2 * count
        if size > SHARD_BYTES:
            flush()
    flush()
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found, field
    return int(found[1]) * 1024


def measure(folder: Path, way: str) -> dict[str, float]:
    """Loads the checkpoint in this process."""
    import jax

    from vlm_jax import compressors, sharding
    from vlm_jax.hf import directory, io, maps, named
    from vlm_jax.settings.model import VLMConfig
    from vlm_jax.settings.run import MeshConfig
    from vlm_jax.storage import weights

    lm = named.lm(str(folder), param_dtype="bfloat16")
    config = VLMConfig(named.vit("mini"), compressors.settings("identity"), lm)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    wanted = {"lm": weights.abstract(config, mesh)["lm"]}
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start = time.perf_counter()
    if way == "streamed":
        params = weights.load(str(folder), config, wanted)
    else:
        opened = directory.open_directory(folder)
        held = {name: opened.read(name) for name in opened.tensors}
        sources = io.match("lm", {name: name for name in held}, maps.lm(lm, fused=False))
        whole = {
            path: np.stack([rule.load(held[n]) for n in names]) if rule.layers else rule.load(held[names[0]])
            for path, (rule, names) in sources.items()
        }  # fmt: skip
        places = {f"lm/{'/'.join(sharding.path_keys(path))}": leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(wanted["lm"])}  # fmt: skip
        params = {path: jax.device_put(array, places[path]) for path, array in whole.items()}
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    shards = [s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    return {"seconds": seconds, "parameters": sum(shards), "peak": memory("VmHWM"), "before": before}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--keep", help="write the checkpoint there and leave it")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        sys.stdout.write(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    per_layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * MLP)
    layers = max(1, round((args.gigabytes * 1e9 - 4 * VOCAB * WIDTH) / per_layer))
    root = Path(args.keep or tempfile.mkdtemp())
    folder = root / "checkpoint"
    total = write_checkpoint(folder, layers)
    largest = 2 * VOCAB * WIDTH
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Llama of {layers} layers, {total / 1e9:.2f} GB "
        f"bfloat16, largest tensor {largest / 1e9:.2f} GB; {args.devices} fake CPU devices (fsdp)",
        f"allowed beyond the parameters: 3 x largest + 1 GB = {(3 * largest + 1e9) / 1e9:.2f} GB",
        "", f"{'way':<10} {'beyond (GB)':>12} {'peak (GB)':>10} {'parameters (GB)':>16} {'seconds':>8}",
    ]  # fmt: skip
    for way in ("streamed", "whole"):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(args.devices), "JAX_PLATFORMS": "cpu"}  # fmt: skip
        command = [sys.executable, __file__, "--measure", str(folder), way]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        m = json.loads(run.stdout.splitlines()[-1])
        beyond = m["peak"] - m["before"] - m["parameters"]
        lines.append(
            f"{way:<10} {beyond / 1e9:12.2f} {m['peak'] / 1e9:10.2f} {m['parameters'] / 1e9:16.2f} {m['seconds']:8.1f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if not args.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
