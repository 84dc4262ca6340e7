"""The configs of a sweep's trainings: what each takes from its stage, its LM, its compressor and earlier stages."""

from pathlib import Path

import pytest
import tiny_paper

from configs import default, mini_compressors, paper, table1
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage.run import resolve, write
from vlm_jax.sweeps import checks, plan, stages
from vlm_jax.sweeps.plan import Training

ROOT = Path("/sweep")


def config_of(cfg, stage: str, training: Training):
    (chosen,) = (s for s in plan.stages(cfg) if s.name == stage)
    return stages.config_of(cfg, chosen, training, plan.folders(cfg, ROOT, training.seed))


def test_a_stage_takes_the_recipe_and_starts_where_the_one_before_it_ended():
    cfg = paper.get_config()
    one = Training(3, "tokenpacker", "qwen1.5-4b", (36,))
    align, tune = (config_of(cfg, name, one) for name in ("align", "tune"))
    assert (align.optim.learning_rate, align.data.batch_size, align.data.template) == (1e-3, 256, "plain")  # fmt: skip
    assert (tune.optim.learning_rate, tune.data.batch_size, tune.data.template) == (2e-5, 128, "chatml")  # fmt: skip
    assert tune.data.length_buckets == (292, 548, 1508) and tune.data.max_tokens == 1508
    assert align.init.projector == "" and align.train.seed == 3
    assert tune.init.projector == tune.init.compressor == "/sweep/seed3/cells/tokenpacker-qwen1.5-4b-v36/align"  # fmt: skip
    assert tune.init.lm == tune.data.tokenizer == "inputs/models/Qwen1.5-4B-Chat"
    assert tune.data.annotations == ("inputs/llava/llava_v1_5_mix665k.json",)
    assert resolve(tune).model.compressor.stride == 4


def test_held_out_records_are_those_of_the_last_stage_and_lie_where_its_records_lie():
    cfg = paper.get_config()
    cfg.train.validation, cfg.train.validation_roots = ("held.json",), ("llava/instruct",)
    cfg.train.keep_best = True
    one = Training(0, "tokenpacker", "qwen1.5-4b", (36,))
    align, tune = (config_of(cfg, name, one).train for name in ("align", "tune"))
    assert (align.validation, align.validation_roots, align.keep_best) == ((), (), False)
    assert (tune.validation, tune.validation_roots) == (("inputs/held.json",), ("inputs/llava/instruct",))  # fmt: skip
    assert tune.keep_best


def test_an_lm_has_fields_of_its_own_in_all_stages_or_in_one():
    cfg = paper.get_config()
    given = {"mesh.tensor": 2, "tune.train.micro_batches": 4, "tune.optim.learning_rate": 1e-5}
    cfg.sweep.lm_settings = (("qwen1.5-7b", given),)
    small, large = (Training(0, "tokenpacker", lm, (1,)) for lm in ("qwen1.5-4b", "qwen1.5-7b"))
    assert config_of(cfg, "align", small).mesh.tensor == 0
    align, tune = (config_of(cfg, name, large) for name in ("align", "tune"))
    assert align.mesh.tensor == tune.mesh.tensor == 2
    assert (align.train.micro_batches, tune.train.micro_batches) == (1, 4)
    assert (align.optim.learning_rate, tune.optim.learning_rate) == (1e-3, 1e-5)
    cfg.sweep.lm_settings = (("qwen1.5-7b", {"mesh.tensr": 2}),)
    with pytest.raises(ConfigError, match=r"sets 'mesh\.tensr', which is no field"):
        config_of(cfg, "tune", large)


def test_an_elastic_training_serves_every_count_and_apart_it_is_one_per_count():
    cfg = paper.get_config()
    cfg.sweep.compressors, cfg.sweep.lms = ("m3",), ("qwen1.5-7b",)
    (one,) = plan.trainings(cfg)
    assert one.name == "m3-qwen1.5-7b" and one.visual_tokens == cfg.sweep.visual_tokens
    c = config_of(cfg, "tune", one)
    assert c.model.compressor.train_tokens == (576, 144, 64, 36, 16, 4, 1)
    assert c.data.max_tokens == 2048 and c.init.compressor == "" != c.init.projector
    cfg.sweep.elastic = False
    apart = plan.trainings(cfg)
    assert len(apart) == 7
    assert config_of(cfg, "tune", apart[1]).model.compressor.train_tokens == (4,)


def test_a_resized_image_has_as_many_patches_as_visual_tokens_and_a_cheaper_encoder():
    cfg = paper.get_config()
    cfg.sweep.compressors, cfg.sweep.visual_tokens = ("resized",), (16,)
    (one, *_) = plan.trainings(cfg)
    model = resolve(config_of(cfg, "tune", one)).model
    assert (model.vit.image_px, model.vit.grid, model.vit.position_grid) == (56, 4, 24)
    assert model.compressor.name == "identity" and model.compressor.num_tokens(4) == 16


def test_text_alone_has_no_images_and_no_alignment():
    cfg = paper.get_config()
    cfg.sweep.compressors = ("text_only",)
    one = plan.trainings(cfg)[0]
    assert [s.name for s in plan.cell_stages(cfg, one)] == ["tune"] and one.visual_tokens == (0,)
    c = config_of(cfg, "tune", one)
    assert c.data.max_images == 0 and c.data.max_tokens == 1472 and c.init.projector == ""
    assert "image" in c.data.ignored_fields


@pytest.mark.parametrize("module", [paper, table1, mini_compressors])
def test_every_training_of_a_config_can_be_built(module, tmp_path):
    cfg = module.get_config()
    todo = checks.check(cfg, tmp_path, with_inputs=False)
    assert {t.compressor for t in todo} == set(cfg.sweep.compressors)


def test_two_settings_of_one_compressor_are_two_compressors_of_the_sweep(tmp_path):
    cfg = mini_compressors.get_config()
    built = {t.name: t for t in checks.check(cfg, tmp_path, with_inputs=False)}
    ours, published = built["quecc-mini-82k-v1"], built["quecc_published-mini-82k-v1"]
    assert [plan.cell_stages(cfg, t)[-1].name for t in (ours, published)] == ["query_aware_vlm"] * 2
    found = [config_of(cfg, "query_aware_vlm", t).model.compressor for t in (ours, published)]
    assert [(c.name, c.positions, c.query_layers) for c in found] == [
        ("quecc", "sines", 0), ("quecc", "none", -1),
    ]  # fmt: skip
    assert built["mqt_image-mini-82k"].visual_tokens == (1, 4, 16, 64)  # elastic, as MQT is
    cfg.sweep.compressor_settings.quecc_published.name = "quec"
    with pytest.raises(ConfigError, match="unknown compressor 'quec'"):
        checks.check(cfg, tmp_path, with_inputs=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"align.per": "lm"}, "trained once per lm, so it cannot have each cell's compressor"),
        ({"align.init": {"vit": "tune"}}, "start from each other"),
        ({"align.init": {"vit": "other"}}, "'other' is not one of"),
        ({"align.cells": "query_aware"}, ""),
        ({"tune.init": {}}, "end with stages align and tune; exactly one"),
        ({"tune.steps": 0, "tune.epochs": 0.0}, "make no step"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(change, words, tmp_path):
    cfg = paper.get_config()
    for place, value in change.items():
        name, field = place.split(".")
        block = cfg.sweep.stages[name]
        block[field] = {**dict.fromkeys(plan.PARTS, ""), **value} if field == "init" else value
    if not words:
        checks.check(cfg, tmp_path, with_inputs=False)  # tune alone serves blind compressors
        return
    with pytest.raises(ConfigError, match=words):
        checks.check(cfg, tmp_path, with_inputs=False)


def test_a_folder_that_holds_a_training_with_other_settings_is_named_before_the_first(tmp_path):
    cfg = mini_compressors.get_config()
    one = next(t for t in plan.trainings(cfg) if t.compressor == "querypool_short")
    where = plan.folders(cfg, tmp_path, one.seed)
    (stage,) = plan.cell_stages(cfg, one)
    folder = where.stage(stage, one)
    (folder / "checkpoints" / "400").mkdir(parents=True)
    write(resolve(stages.config_of(cfg, stage, one, where)), folder)
    checks.check(cfg, tmp_path, with_inputs=False)  # the same settings
    cfg.sweep.stages.query_aware_vlm.steps = 800
    with pytest.raises(ConfigError, match=r"querypool_short-mini-82k' holds a run with train.num_steps = 400, now 800"):  # fmt: skip
        checks.check(cfg, tmp_path, with_inputs=False)


def test_a_missing_folder_of_inputs_is_one_mistake_beside_those_of_the_config(tmp_path):
    cfg = paper.get_config()
    cfg.sweep.inputs = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as error:
        checks.check(cfg, tmp_path)
    assert str(error.value).startswith(f"sweep: inputs: the folder '{tmp_path / 'nowhere'}' does not exist; give")  # fmt: skip
    cfg.sweep.visual_tokens = (5,)
    with pytest.raises(ConfigError, match=r"2 mistakes: \(1\) inputs: .* \(2\) .*visual_tokens 5 cannot"):  # fmt: skip
        checks.check(cfg, tmp_path)


def test_two_lms_of_one_name_and_lists_of_other_lengths_are_refused(tmp_path):
    cfg = tiny_paper.get_config()
    cfg.sweep.lms = ("models/small", "others/small")
    with pytest.raises(ConfigError, match="two LMs are called 'small'"):
        plan.cells(cfg)
    cfg.sweep.families = ("a", "b")
    with pytest.raises(ConfigError, match="3 benchmarks but 2 families"):
        plan.asked(cfg)
    with pytest.raises(ValueError, match="no field 'stepz'"):
        default.stage(stepz=1)
