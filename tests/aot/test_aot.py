"""Compiling for chips that are not there: what fits, what does not, and numbers that agree with arithmetic."""

import dataclasses
import json
import re

import jax
import pytest
import tiny

from vlm_jax import aot, sharding
from vlm_jax.aot import hlo, hlo_text, programs, roofline, search
from vlm_jax.costs import chips
from vlm_jax.data import pipeline
from vlm_jax.inference import placement
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights

CONFIG = """
from pathlib import Path
import tiny

def get_config():
    c = tiny.config(Path("nowhere"), num_steps=6)
    c.model.lm.update({"width": 128, "num_layers": 6, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "mlp_width": 256})
    c.model.lm.update({"vocab_size": 512, "dtype": "bfloat16"})
    c.data.update({"max_tokens": 64, "batch_size": 8})
    c.eval.update({"batch_size": 6, "max_new_tokens": 8})
    return c
"""
SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "small.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def resolved(config, **data):
    """The experiment of the file, with fields of its data block replaced."""
    c = cli.load_config(config.removeprefix("--config="))
    c.data.update(data)
    return experiment.resolve(c)


def numbers(config, folder, topology, *flags):
    """Exit code and the written JSON, programs by name."""
    file = folder / "numbers.json"
    code = aot.main([config, f"--topology={topology}", f"--json={file}", *flags])
    report = json.loads(file.read_text())
    return code, report | {"programs": {p["name"]: p for p in report["programs"]}}


@pytest.fixture(scope="module")
def four(config, tmp_path_factory):
    return numbers(config, tmp_path_factory.mktemp("four"), "v5e:2x2", *SPLIT)


@pytest.mark.slow
def test_all_three_programs_compile_for_four_chips_that_are_not_there(four):
    code, report = four
    assert code == 0 and report["fits"]
    assert (report["devices"], report["chip"]) == (4, "v5e")
    assert list(report["programs"]) == ["train step", "prefill", "decode step"]
    # The 6 prompts lie on two by two chips: four do not divide them.
    assert report["programs"]["prefill"]["work"] == "6 x 64"
    assert report["answer_mesh"] == {"data": 2, "fsdp": 1, "tensor": 2, "group": 1}
    for need in report["programs"].values():
        assert 0 < need["argument_bytes"] < need["peak_bytes"] < 2**30
        assert need["open_loops"] == 0 and not need["unknown_kernels"]
        assert need["bound_seconds"] == max(need["seconds"].values())
    gathered = report["programs"]["train step"]["collectives"]["all-gather"]
    assert gathered[0] >= 6  # the split weights, layer by layer


@pytest.mark.slow
def test_flops_agree_with_the_analytic_count(four, config):
    _, report = four
    assert report["programs"]["decode step"]["flop_ratio"] == pytest.approx(1, abs=0.02)
    prefill = report["programs"]["prefill"]
    pairs = 6 * 6 * 4 * 64**2 * 256 / 4
    assert prefill["flops"] - prefill["kernel_flops"] == pytest.approx(
        prefill["model_flops"] - pairs, rel=0.01
    )
    # The flash kernel works on whole blocks of 128 positions and computes scores anew; the count has all pairs of 64 positions.
    train = report["programs"]["train step"]
    pairs = 3 * 8 * 6 * 4 * 64**2 * 256 / 4
    assert train["flops"] - train["kernel_flops"] == pytest.approx(
        train["model_flops"] - pairs, rel=0.01
    )
    forward_and_backward = (
        2 + 5
    )  # products of [128 x 128] scores or of as many weights with a head of 128
    decoder = forward_and_backward * 2 * 2 * 6 * 2 * 128**2 * 128
    vit = resolved(config).model.vit
    encoder = 2 * 2 * 2 * vit.feature_state * vit.num_heads * 128**2 * (vit.width // vit.num_heads)
    assert train["kernel_flops"] == decoder + encoder
    # Twelve rows' heads on four chips: 6 rows of 2 heads, two ways each.
    assert prefill["kernel_flops"] == 2 * 2 * 6 / 4 * (6 * 2 * 128**2 * 128) + encoder * 6 / 8


def gathers(compiled):
    """The sizes in bytes of what the program's all-gathers make, loops' bodies once."""
    program = hlo_text.Program(compiled.as_text())
    every = [i for c in program.computations.values() for i in c.by_name.values()]
    found = [i for i in every if i.op.removesuffix("-start") == "all-gather"]
    return [max(shape.anywhere_bytes for shape in i.shapes) for i in found]


def decode_step(exp, mesh, params):
    """The compiled decode step of 4 rows, with parameters of these shapes."""
    prefill = programs.prefill(exp, mesh, 4, 8).compile()
    step = programs.decode(exp, mesh, 4, 8, prefill, params)
    return step.compile()


@pytest.mark.slow
def test_a_decode_step_gathers_no_weight(config):
    """4 chips, twice as many as key/value heads: the smallest map of the decoder is k's, 128 x 256 values of bfloat16."""
    exp = resolved(config)
    lm = dataclasses.replace(exp.model.lm, num_heads=4, param_dtype="float32")
    heads = {p: dataclasses.replace(getattr(exp.model, p), num_heads=4) for p in ("vit", "compressor")}  # fmt: skip
    exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, lm=lm, **heads))
    devices = programs.devices("v5e:2x2")
    mesh = placement.mesh_for(exp.model, MeshConfig(tensor=4), devices, 4)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 2, "group": 2}
    params = weights.answering(exp.model, mesh)
    held = params["lm"]["layers"]["attn"]
    shards = {
        name: held[name]["kernel"].sharding.shard_shape(held[name]["kernel"].shape) for name in "qk"
    }
    assert shards == {"q": (6, 128, 1, 128), "k": (6, 128, 1, 128)}
    assert (
        held["q"]["kernel"].dtype == "bfloat16"
        and params["lm"]["layers"]["attn_norm"]["scale"].dtype == "float32"
    )
    smallest = 128 * 256 * 2 / 4
    assert max(gathers(decode_step(exp, mesh, params)), default=0) < smallest
    split = sharding.make_mesh(MeshConfig(data=1, fsdp=4), devices)
    trained = weights.abstract(exp.model, split)
    assert max(gathers(decode_step(exp, split, trained))) > smallest  # as training has them


@pytest.mark.slow
def test_gradients_alone_cross_from_one_slice_to_the_other(config, tmp_path, capsys):
    code, report = numbers(config, tmp_path, "v5e:2x2", "--slices=2", *SPLIT, "--train-only")
    assert code == 0 and (report["devices"], report["slices"]) == (8, 2)
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "group": 1}
    (need,) = report["programs"].values()
    crossing = {k: sent for k, (_, sent) in need["collectives"].items() if k.startswith("DCN ")}
    assert need["dcn_bytes"] == sum(crossing.values())
    assert crossing["DCN all-reduce"] > 0.95 * need["dcn_bytes"]
    lm = resolved(config).model.lm
    # A fourth of the decoder's gradients, as bfloat16 products give them; what is copied on each chip (norms, projector, compressor) is small.
    assert lm.dtype == "bfloat16"
    assert need["dcn_bytes"] == pytest.approx(2 * lm.total_params / 4, rel=0.15)
    assert need["seconds"]["network"] == need["dcn_bytes"] / 3.125e9
    assert "2 slices of v5e:2x2: 8 devices" in capsys.readouterr().out


def test_the_data_axis_alone_crosses_from_slice_to_slice():
    devices = programs.devices("v5e:2x2", 2)
    laid = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, slices=2), devices).devices
    assert laid.shape == (4, 2, 1, 1)
    assert [sharding.slices_of(list(part.flat)) for part in laid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(
        ConfigError, match=r"slices 1, but these 8 TPU devices are 2; set mesh.slices=2"
    ):
        sharding.make_mesh(MeshConfig(), devices)


@pytest.mark.slow
def test_flops_per_chip_stay_when_chips_and_batch_grow_together(four, config):
    exp = resolved(config, batch_size=2)
    devices = programs.devices("v5e:1x1")
    assert len(devices) == 1
    one = roofline.train(exp, sharding.make_mesh(exp.mesh, devices))
    assert one.flops == pytest.approx(four[1]["programs"]["train step"]["flops"], rel=0.01)


@pytest.mark.slow
def test_state_is_donated_and_split_over_the_chips(four, config):
    _, report = four
    need = report["programs"]["train step"]
    exp = resolved(config)
    state = 3 * 4 * exp.model.lm.total_params / 4  # float32 weights and two moments, on four chips
    assert state < need["argument_bytes"] < 1.2 * state
    assert need["alias_bytes"] > 0.9 * state


def test_what_does_not_fit_is_exit_code_1_with_the_reason(config, tmp_path, capsys):
    wide = (
        "--config.model.lm.width=8192",
        "--config.model.lm.mlp_width=32768",
        "--config.model.lm.num_layers=40",
    )
    code, report = numbers(config, tmp_path, "v5e:2x2", *SPLIT, *wide)
    assert code == 1 and not report["fits"]
    assert "does not fit: train step" in capsys.readouterr().out


def test_a_flash_kernel_counts_the_blocks_it_computes():
    def array(*dims):
        return hlo.Shape("bf16", dims, 0)

    blocks, heads = array(1, 4, 4), array(2, 8, 2048, 128)
    name = "jit(step)/splash_mha_{}_segmented/pallas_call"
    positions = hlo.Shape("s32", (2048, 128), 0)
    given = (blocks, blocks, heads, heads, heads)
    forward = hlo.Kernel("tpu_custom_call", (*given, positions), name.format("fwd"))
    square = 2 * 8 * 2048**2 * 128
    # 10 of 16 blocks lie on or under the diagonal; two products forward, five backward.
    assert roofline.attention_flops(forward) == 2 * 2 * square * 10 / 16
    whole = dataclasses.replace(forward, operands=given)  # an encoder's: every pair
    assert roofline.attention_flops(whole) == 2 * 2 * square
    backward = dataclasses.replace(forward, op_name=name.format("dkv"))
    assert roofline.attention_flops(backward) == 2 * 5 * square * 10 / 16
    rows = array(2, 2048, 8, 128)
    cudnn = hlo.Kernel("__cudnn$fmhaSoftmax", (rows, rows, rows), "")
    assert roofline.attention_flops(cudnn) == 2 * 2 * square / 2
    assert roofline.attention_flops(dataclasses.replace(forward, op_name="mine")) is None


def test_candidates_use_every_chip_and_start_with_the_least_per_chip(config):
    meshes = list(search.candidates(resolved(config, batch_size=16), 8))
    sizes = [(m.data, m.fsdp, m.tensor) for m in meshes]
    assert sizes[:4] == [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1)]
    assert set(sizes) == {
        (d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8
    }
    # 6 rows: no 4 or 8 ways
    few = search.candidates(resolved(config, batch_size=6), 8)
    assert {m.data * m.fsdp for m in few} == {1, 2}


@pytest.mark.slow
def test_a_search_tries_what_it_says_and_gives_the_flags_of_the_best(config):
    lines = []
    exp = resolved(config)
    devices = programs.devices("v5e:2x2")
    best = search.search(exp, devices, lines.append, limit=4)
    assert "at most 4 compilations of the training step" in lines[0]
    trials = [line for line in lines if " GiB, at least " in line]
    left = [
        re.findall(r"\(\d+ s(?:, (\d) more at most: \d+ min)?\)$", line.strip()) for line in trials
    ]
    assert left == [["3"], ["2"], ["1"], [""]]
    assert len(trials) == 4 and all(line.startswith("--config.mesh.data=") for line in trials)
    bounds = {
        line.split("  ")[0]: float(re.findall(r"at least (\S+) ms", line)[0]) for line in trials
    }
    chosen = next(line for line in lines if line.startswith("best of 4"))
    assert bounds[search.flags(best)] == min(bounds.values())
    assert search.flags(best) in chosen


def test_a_state_that_is_too_large_is_refused_without_compiling(config, monkeypatch):
    monkeypatch.setattr(roofline, "train", None)
    exp = resolved(config)
    lm = dataclasses.replace(exp.model.lm, vocab_size=2 * 10**8)
    exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, lm=lm))
    lines = []
    assert search.search(exp, programs.devices("v5e:2x2"), lines.append) is None
    # float32 weights and two moments, a fourth on each chip
    stated = re.findall(r"the state alone is (\S+) GiB", "".join(lines))
    assert float(stated[0]) == pytest.approx(12 * lm.total_params / 4 / 2**30, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology=v9:2x2",), "'v9:2x2' is not known; give v4, v5e, v5p or v6e"),
        (("--topology=v5e:3x3",), "'v5e:3x3' cannot be built .* use even sides"),
        (("--topology=v5e:2x2", "--config.data.batch_size=6"), r"batch_size 6 is not divisible by mesh data\*fsdp = 4"),
        (("--topology=v5e:2x2", "--config.mesh.fsdp=3"), "does not make 4 devices"),
        (("--topology=v5e:2x2", "--slices=0"), "'0' is no number of slices"),
        (("--topology=v5e:2x2", "--slices=3"), "batch_size 8 is not divisible by mesh data"),
        ((), "--topology is missing"),
        (("--topology=local", "--search"), "'cpu' has no known memory and speed; give a --topology of TPUs"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(config, capsys, flags, message):
    assert aot.main([config, *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and re.search(message, line), line


def test_without_the_compiler_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install libtpu, or use --topology=local"):
        programs.devices("v5e:2x2")


@pytest.mark.parametrize("fields", [{"query": "first_turn"}, {"query": "none"}, {"packing": True}])
def test_the_described_batch_is_the_one_the_pipeline_makes(tmp_path, fields):
    config = tiny.config(tiny.write(tmp_path / "data"))
    config.data.update(fields)
    exp = experiment.resolve(config)
    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
    real = sharding.put(next(iterator), mesh)
    iterator.close()
    described = programs.batch(exp, mesh, 4, training=True)
    assert {n: (x.shape, x.dtype, x.sharding) for n, x in described.items()} == {
        n: (x.shape, x.dtype, x.sharding) for n, x in real.items()
    }


def test_a_chip_is_found_by_the_name_that_jax_gives_it():
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "H100",
    }
    for kind, name in kinds.items():
        chip = chips.find(kind)
        assert chip is not None and chip.name == name
        assert chips.peak_flops(kind) == chip.peak_flops
    assert chips.find("cpu") is None and chips.peak_flops("cpu") is None
