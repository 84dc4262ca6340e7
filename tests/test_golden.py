"""Every file of a folder of golden vectors: outputs of the public reference implementations, to be matched to 2e-5.

The folder is VLM_JAX_GOLDEN (default ../shared/golden beside the repository); its README is the format. What the runner
does not know fails by name. The formats that the folder lacks (weights from a recipe, end to end from pixels, projectors
of other depths, kernel != stride, quirks) are written here from NumPy twins, so that each branch of the runner is seen to
work.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor import compressor_config
from refs import compressors_numpy as twin
from refs import elastic_numpy, hf_layout, prumerge_numpy, reference_layout

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.modules import mqt, prumerge
from vlm_jax.data import sources, templates
from vlm_jax.layers import Scores
from vlm_jax.models.projector import Projector
from vlm_jax.models.vit import Features, ViT
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, ViTConfig, VLMConfig

TOLERANCE = 2e-5  # of the largest absolute reference value
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("VLM_JAX_GOLDEN", ROOT.parent / "shared" / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
INPUTS = {"features", "multi", "text", "images", "input_ids", "attention_mask", "projected_features", "hidden_states_m2", "q", "k"}  # fmt: skip
PREFIXES = re.compile(r"^(model\.)?(mm_projector|query_abstractor|vision_tower)\.")
REDUCED = ("tokens_first64", "token_sum", "channel_mean", "abs_mean")


@dataclasses.dataclass
class Case:
    """One file: its settings, the reference's tensors, what goes in and what must come out."""

    config: dict
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    mids: dict[str, np.ndarray]


def load(path: Path) -> Case:
    """Raises AssertionError naming what no description of the format has."""
    with np.load(path) as file:
        config = json.loads(str(file["config_json"]))
        group = {
            kind: {k.removeprefix(kind): file[k] for k in file.files if k.startswith(kind)}
            for kind in ("param/", "in/", "out/", "mid/")
        }
        known = ("config_json", *(kind + name for kind, g in group.items() for name in g))
        unknown = set(file.files) - set(known)
        assert not unknown, f"unknown entries {unknown}"
    group["param/"] = {PREFIXES.sub("", name): x for name, x in group["param/"].items()}
    if config.get("weights_from_recipe"):
        for name, entry in recipe_entries(config):
            bare = name.removeprefix("param/").removeprefix("in/")
            kind = "in/" if name.startswith("in/") or bare in INPUTS else "param/"
            fields = {k: entry[k] for k in ("index", "shape", "scale", "offset")}
            group[kind][bare] = twin.draw(config["seed"], **fields)
    unknown = group["in/"].keys() - INPUTS
    assert not unknown, f"unknown inputs {sorted(unknown)}; known: {sorted(INPUTS)}"
    return Case(config, *group.values())


def recipe_entries(node, name=""):
    """(name, {index, shape, scale, offset}) wherever in the settings they stand: as a mapping or a list with names."""
    if isinstance(node, dict) and {"index", "shape", "scale", "offset"} <= node.keys():
        yield node.get("name", name), node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from recipe_entries(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from recipe_entries(value, name)


def encode(case: Case, scores: bool = False) -> Features:
    """The case's own CLIP on its pixels [B 3 H W]; already normalised unless they are bytes."""
    state = hf_layout.sub(case.params, "vision_model.")
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    images = jnp.asarray(case.inputs["images"]).transpose(0, 2, 3, 1)
    layers = {int(k.split(".")[2]) for k in state if k.startswith("encoder.layers.")}
    vit = presets.vit(
        "clip-l-336", image_px=images.shape[1], patch_px=patch, width=width,
        num_layers=case.config.get("clip", {}).get("layers", len(layers)), num_heads=clip_heads(case),
        mlp_width=state["encoder.layers.0.mlp.fc1.weight"].shape[0], feature_layer=case.config.get("select_layer", -2),
    )  # fmt: skip
    if images.dtype == jnp.uint8:
        images = (images / 255.0 - jnp.array(vit.mean)) / jnp.array(vit.std)
    params = hf_layout.encoder(state, vit.feature_state, vit.num_heads, post_norm=False)
    if scores:
        params["next_layer"] = hf_layout.asking_layer(state, vit.feature_state, vit.num_heads)
    taps = tuple(case.config.get("multi_layers", () if scores else (12, 16, 22, 23)))
    return encoder(vit, taps, scores)({"params": params}, images)


def clip_heads(case: Case) -> int:
    """Of the case's CLIP: in a "clip" of the settings, or beside the compressor's (whose own are called num_heads)."""
    clip = case.config.get("clip", {})
    found = [clip[n] for n in ("heads", "num_heads", "num_attention_heads") if n in clip]
    names = ("clip_heads", "vision_heads", "vit_heads", "heads")
    found += [case.config[n] for n in names if n in case.config]
    found += [case.config[n] for n in ("num_heads",) if n in case.config]
    assert found, f"no number of heads of the CLIP: give clip.heads, or one of {names}"
    return found[0]


@functools.cache
def encoder(vit: ViTConfig, taps: tuple[int, ...], scores: bool) -> Callable:
    return jax.jit(ViT(vit, taps, scores).apply)


def features_of(case: Case) -> Features:
    if "images" in case.inputs:
        return encode(case)
    features = jnp.asarray(case.inputs["features"])
    return Features(features, jnp.asarray(case.inputs.get("multi", features)))


def text_of(case: Case) -> jax.Array:
    """The question's state [B D]: given, or from the case's own decoder."""
    if "text" in case.inputs:
        return jnp.asarray(case.inputs["text"])[:, 0]
    settings, state = case.config["llama"], hf_layout.sub(case.params, "llm.")
    lm = LMConfig(
        vocab_size=settings["vocab"], width=settings["hidden"], num_layers=settings["layers"], num_heads=settings["heads"],
        num_kv_heads=settings["kv_heads"], head_dim=settings["hidden"] // settings["heads"],
        mlp_width=settings["intermediate"], rope_theta=settings["rope_theta"], norm_eps=settings["rms_eps"],
        qkv_bias=False, qk_norm=False, tied_embeddings=False,
    )  # fmt: skip
    params = {"lm": hf_layout.decoder(state, lm.num_heads, lm.num_kv_heads, tied=False)}
    model = VLM(VLMConfig(tiny_vit(1), compressor_config("quecc", num_heads=1), lm))
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"] > 0
    order = np.argsort(~mask, axis=1, kind="stable")  # ours are padded on the right
    ids, mask = (np.take_along_axis(x, order, axis=1) for x in (ids, mask))
    nothing = jnp.zeros((len(ids), 1), jnp.int32)
    inputs = Inputs(
        nothing, nothing, nothing, nothing, query_tokens=jnp.asarray(ids, jnp.int32)[:, None], query_mask=jnp.asarray(mask)[:, None],
    )  # fmt: skip
    return jax.jit(model.apply, static_argnames="method")(
        {"params": params}, inputs, method="query"
    )


def tiny_vit(grid: int, width: int = 8) -> ViTConfig:
    """Stands in for the encoder where only its grid and width matter."""
    return presets.vit("mini", image_px=8 * grid, width=width, num_heads=1)


def compressed(
    case: Case, name: str, compressor: dict, projector: dict, stride: int = 1
) -> dict[str, np.ndarray]:
    """Runs compressor and projector, after the same validation as any model."""
    last, taps = features_of(case)[:2]
    grid = round(last.shape[1] ** 0.5)
    heads = case.config.get("num_heads", 1)
    eps = case.config.get("ln_eps", 1e-6)
    config = compressor_config(name, stride, heads, norm_eps=eps)
    VLMConfig(tiny_vit(grid, last.shape[-1]), config, presets.lm("mini-45k"))
    entry = COMPRESSORS[name]
    query = text_of(case) if entry.uses_query else None
    apply = jax.jit(entry.module(config, grid).apply)
    mid = apply({"params": compressor}, last, taps, query).tokens
    assert mid.shape[1] == entry.num_tokens(config, grid)
    tokens = projected(case, projector, mid)
    made = {"tokens": tokens, "compressed": mid, "features": last, "multi": taps}
    return made | ({} if query is None else {"text": query[:, None]})


def projected(case: Case, projector: dict, x: jax.Array) -> jax.Array:
    """Through as many linear maps as the file holds; their number must be the one that its type names."""
    named = case.config.get("mm_projector_type", f"mlp{len(projector)}x_gelu")
    match = re.fullmatch(r"mlp(\d+)x_gelu", named)
    assert match or named in ("linear", "identity"), f"unknown mm_projector_type {named!r}"
    count = int(match[1]) if match else int(named == "linear")
    assert len(projector) == count, f"{named} with {len(projector)} linear maps"
    if not count:
        return x
    width = projector[f"dense_{count - 1}"]["kernel"].shape[1]
    apply = jax.jit(Projector(width, count, "none", "none", "float32").apply)
    return apply({"params": projector}, x)


def run_llava_mlp(case: Case) -> dict:
    return compressed(case, "identity", {}, reference_layout.projector(case.params))


def run_quecc(case: Case) -> dict:
    stride = case.config["stride"]
    trees = reference_layout.quecc(case.params, case.config.get("num_heads", 8), stride)
    return compressed(case, "quecc", *trees, stride)


def run_tokenpacker(case: Case) -> dict:
    trees = reference_layout.tokenpacker(case.params, case.config.get("num_heads", 8))
    return compressed(case, "tokenpacker", *trees, case.config["scale_factor"])


def run_prumerge(case: Case) -> dict:
    """Inputs are the states with the class token and the next layer's queries and keys, or pixels."""
    name, ratio = case.config["compressor"], case.config.get("fixed_ratio")
    adaptive = case.config.get("adaptive", ratio is None)
    if "images" in case.inputs:
        last, _, scores = encode(case, scores=True)
    else:
        states, q, k = (jnp.asarray(case.inputs[n]) for n in ("hidden_states_m2", "q", "k"))
        last, scores = states[:, 1:], Scores(q[:, 0], k[:, 1:], k[:, 0])
    grid, patches = round(last.shape[1] ** 0.5), last.shape[1]
    config = compressor_config(
        name, prune_ratio="batch" if adaptive else "fixed", fixed_ratio=ratio or 0.125,
        neighbours=case.config.get("k_neighbours", 32), sample_last=False,
    )  # fmt: skip
    VLMConfig(tiny_vit(grid, last.shape[-1]), config, presets.lm("mini-45k"))
    module = COMPRESSORS[name].module(config, grid)
    apply = jax.jit(functools.partial(module.apply, mutable="intermediates"))
    (tokens, valid, *_), sown = apply({}, last, last, None, scores)
    (chosen,) = sown["intermediates"]["chosen"]
    filled = np.asarray(chosen.valid)[0]  # as many in every image
    if valid is not None:
        assert tokens.shape[1] == COMPRESSORS[name].num_tokens(config, grid)
        tokens = tokens[:, np.asarray(valid)[0]]
    merged, projector = tokens, reference_layout.projector(case.params)
    if projector:
        tokens = projected(case, projector, tokens)
    a = prumerge.attention(scores)
    return {
        "tokens": tokens, "compressed": merged, "features": last, "cls_attn": a, "kept_idx": np.asarray(chosen.kept)[:, filled],
        "complement_idx": np.stack([np.flatnonzero(rest) for rest in chosen.rest]),
        "outlier_ratio": prumerge.outliers(a.reshape(-1)) / (patches * len(a)),
    }  # fmt: skip


def counts(case: Case, letter: str) -> list[int]:
    """The token counts that the outputs are named after (tokens_m36, quirk_scale100); without one, the largest there is."""
    named = [re.search(rf"{letter}(\d+)", name) for name in case.outputs]
    settings = case.config
    given = settings.get("token_counts", settings.get("scales", [settings.get("max_tokens", 256)]))
    return sorted({int(match[1]) if match else max(given) for match in named})


def run_mqt(case: Case) -> dict:
    last, heads = jnp.asarray(features_of(case)[0]), case.config.get("num_heads", 16)
    grid, width = round(last.shape[1] ** 0.5), last.shape[-1]
    side = case.config.get("query_grid", 16)
    table = mqt.query_positions(side, width)
    for name in case.params.keys() & {"pos_embed", "pos_embed_first8"}:
        stored = case.params[name]
        # A reference that computes sines in float32 may differ by a rounding near 0; unrounded values by 2e-4.
        np.testing.assert_allclose(table[:, : stored.shape[1]], stored, rtol=0, atol=1e-5)
    params = jax.tree.map(jnp.asarray, reference_layout.mqt(case.params, heads))
    made = {"pos_embed_interpolated": np.asarray(mqt.resized(table, side, grid))}
    for count in counts(case, "m"):
        config = compressor_config(
            "mqt", num_heads=heads, norm_eps=case.config.get("ln_eps", 1e-6), query_grid=side, visual_tokens=count
        )  # fmt: skip
        VLMConfig(tiny_vit(grid, width), config, presets.lm("mini-45k"))
        module = COMPRESSORS["mqt"].module(config, grid, case.params["proj"].shape[1])
        apply = jax.jit(functools.partial(module.apply, mutable="intermediates"))
        visual, sown = apply({"params": params}, last, last)
        made[f"tokens_m{count}"] = made["tokens"] = visual.tokens
        made["attn_weights_heads_m_n_batch0"] = sown["intermediates"]["weights"][0][0, :, :8]
    return made


def run_m3(case: Case) -> dict:
    """Inputs are projected patches, or features (or pixels) with the projector's weights."""
    made = {}
    for count in counts(case, "scale"):
        given = case.inputs.get("projected_features")
        last = jnp.asarray(features_of(case)[0] if given is None else given)
        grid = round(last.shape[1] ** 0.5)
        config = compressor_config("m3", visual_tokens=count)
        VLMConfig(tiny_vit(grid, 8), config, presets.lm("mini-45k"))
        module = COMPRESSORS["m3"].module(config, grid)
        if given is None:
            tree = jax.tree.map(jnp.asarray, reference_layout.projector(case.params))
            width = tree[f"dense_{len(tree) - 1}"]["kernel"].shape[1]
            project = Projector(width, len(tree), "none", "none", "float32")
            project = project.bind({"params": tree})
            tokens = project.late(module.apply({}, project.early(last), last).tokens)
        else:
            tokens = jax.jit(module.apply)({}, last, last).tokens
        made[f"tokens_scale{count}"] = made["tokens"] = tokens
    return made


def run_tower(case: Case) -> dict:
    last, taps = encode(case)[:2]
    return {"features": last, "multi": taps, "text": text_of(case)[:, None]}


# golden name -> (our compressor, runner)
RUNNERS: dict[str, tuple[str, Callable[[Case], dict]]] = {
    "llava_mlp": ("identity", run_llava_mlp),
    "quecc": ("quecc", run_quecc),
    "quecc_tower": ("quecc", run_tower),
    "tokenpacker": ("tokenpacker", run_tokenpacker),
    "mqt": ("mqt", run_mqt),
    "m3": ("m3", run_m3),
    "prumerge": ("prumerge", run_prumerge),
    "prumerge_plus": ("prumerge_plus", run_prumerge),
}


def check(case: Case) -> list[str]:
    """Compares every output (and those intermediates that have a name here); the names that were compared."""
    name = case.config["compressor"]
    assert name in RUNNERS, f"unknown compressor {name!r}; known: {', '.join(RUNNERS)}"
    _, run = RUNNERS[name]
    wrong = [name for name in case.outputs if name.startswith("quirk_")]
    right = {name: out for name, out in case.outputs.items() if name not in wrong}
    stride = case.config.get("stride")
    differs = case.config.get("kernel", stride) != stride
    for name in [*right] if differs else wrong:
        with pytest.raises(ConfigError):
            run(dataclasses.replace(case, outputs={name: case.outputs[name]}))
    if differs or not right:
        return wrong or ["kernel != stride"]
    made = run(dataclasses.replace(case, outputs=right))
    for name, reference in right.items():
        kind = next((r for r in REDUCED if r.removeprefix("tokens_") in name), None)
        tokens = tokens_of(name, made)
        assert_close(reduced(kind, tokens, reference) if kind else tokens, reference, name)
    shared = case.mids.keys() & made.keys()
    for name in shared:
        assert_close(np.asarray(made[name]), case.mids[name], f"mid/{name}")
    return [*case.outputs, *shared]


def tokens_of(name: str, made: dict) -> np.ndarray:
    """The output of this name, or the tokens of which it keeps a part (tokens_m36_first64 and tokens_first64 alike)."""
    if name in made:
        return np.asarray(made[name])
    count = re.search(r"(?:m|scale)\d+", name)
    assert any(part.removeprefix("tokens_") in name for part in REDUCED), f"unknown output {name!r}"
    return np.asarray(made[f"tokens_{count[0]}" if count else "tokens"])


def assert_close(ours: np.ndarray, reference: np.ndarray, name: str) -> None:
    assert ours.shape == reference.shape, f"{name}: {ours.shape} but reference {reference.shape}"
    if np.issubdtype(reference.dtype, np.integer):
        np.testing.assert_array_equal(ours, reference, err_msg=name)
        return
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= TOLERANCE, f"{name}: {error:.1e} of the largest value, allowed {TOLERANCE}"


def reduced(name: str, tokens, reference: np.ndarray) -> np.ndarray:
    """What full-size files keep of the tokens [B T D]."""
    tokens = np.asarray(tokens, np.float64)
    if name == "tokens_first64":
        return tokens[..., :64]
    if name == "token_sum":
        return tokens.sum(-1)
    if name == "channel_mean":
        return tokens.mean(1)
    return np.abs(tokens).mean(axis=tuple(range(reference.ndim, 3)))


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.skipif(not FILES, reason=f"no golden vectors in {FOLDER}; set VLM_JAX_GOLDEN")
@pytest.mark.parametrize("path", FILES or [None], ids=lambda p: getattr(p, "stem", "none"))
def test_a_golden_file_is_matched(path):
    assert check(load(path))


STRINGS = FOLDER / "quecc_query_strings.json"
# The reference cuts the query out of decoded text; where that goes wrong, the question itself is right.
QUIRKS = {
    "\nNo assistant marker here": "No assistant marker here",  # there: the last character is lost
    "a caption\n": templates.NO_QUERY,  # a bare caption asks nothing; there: the empty string
}


def conversation(row: str | None) -> dict:
    """The record whose rendering after the image is `row`."""
    if row is None:
        said = ["hello", "hello"]
    elif row == "a caption\n":
        said = ["<image>", "a caption"]
    else:
        question, *rest = re.split(r" (?:ASSISTANT|USER): ?", row)
        said = [f"<image>{question}", *(text or "yes" for text in rest or [""])]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "0", "conversations": turns} | ({} if row is None else {"image": "a.png"})


@pytest.mark.skipif(not STRINGS.is_file(), reason=f"no {STRINGS.name} in {FOLDER}")
def test_the_query_is_the_question_the_reference_finds_where_it_finds_one():
    cases = json.loads(STRINGS.read_text())
    pairs = [pair for c in cases for pair in zip(c["rows"], c["query_text"], strict=True)]
    seen = set()
    for row, reference in pairs:
        record = sources.parse(conversation(row), "golden.json", "images", "0")
        ours = templates.first_turn(record) or [templates.NO_QUERY]
        assert ours == [QUIRKS.get(row, reference)], row
        assert (row in QUIRKS) == (ours != [reference])
        seen.add(row)
    assert len(pairs) >= 9 and QUIRKS.keys() <= seen


# The formats that the folder lacks.


def write(path: Path, config: dict, **groups: dict) -> Case:
    arrays = {f"{kind}/{k}": v for kind, group in groups.items() for k, v in group.items()}
    np.savez_compressed(path, config_json=np.array(json.dumps(config)), **arrays)
    return load(path)


QUECC = {"compressor": "quecc", "num_heads": 4, "kernel": 2, "stride": 2, "seed": 5}


def quecc_state(stride: int = 2, kernel: int = 2):
    state = twin.random_state(twin.shapes_quecc(8, 32, 12, 20, kernel), 5)
    rng = np.random.default_rng(6)
    shapes = {"features": (2, 16, 8), "multi": (2, 16, 32), "text": (2, 1, 12)}
    return state, {k: np.float32(rng.standard_normal(s)) for k, s in shapes.items()}


@pytest.mark.parametrize("layout", ["nested", "list"])
def test_weights_and_inputs_come_from_the_recipe_and_reduced_outputs_are_compared(tmp_path, layout):
    shapes = twin.shapes_quecc(8, 32, 12, 80, 2)
    inputs = {"features": (2, 16, 8), "multi": (2, 16, 32), "text": (2, 1, 12)}
    entries = {"params": twin.recipe(shapes), "inputs": twin.recipe(inputs, first_index=100)}
    drawn = {k: twin.draw(5, **e) for group in entries.values() for k, e in group.items()}
    tokens = twin.quecc(drawn, drawn["features"], drawn["multi"], drawn["text"], 4, 2)[1]
    if layout == "list":
        entries = {k: [{"name": n, **e} for n, e in g.items()] for k, g in entries.items()}
    out = {
        "tokens_first64": tokens[..., :64], "token_sum": tokens.sum(-1), "channel_mean": tokens.mean(1),
        "abs_mean": np.abs(tokens).mean(),
    }  # fmt: skip
    config = QUECC | entries | {"weights_from_recipe": True}
    case = write(tmp_path / "quecc_fullsize.npz", config, out=out)
    assert sorted(check(case)) == sorted(REDUCED)
    case.outputs["channel_mean"][0, 0] += 1e-3 * np.abs(case.outputs["channel_mean"]).max()
    with pytest.raises(AssertionError, match="channel_mean"):
        check(case)


# How a projector of 0 to 3 linear maps is called, and what its maps are called.
DEPTHS = {
    "identity": [], "linear": [""], "mlp1x_gelu": ["0"], "mlp2x_gelu": ["0", "2"], "mlp3x_gelu": ["0", "2", "4"],
}  # fmt: skip


def projector_state(names: list[str], width: int = 8, hidden: int = 20) -> dict[str, np.ndarray]:
    """Random maps width -> hidden -> hidden .."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        dot = f"{name}." if name else ""
        shapes |= {f"{dot}weight": (hidden, width), f"{dot}bias": (hidden,)}
        width = hidden
    return twin.random_state(shapes, 8)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", DEPTHS)
def test_a_projector_has_as_many_maps_as_its_file_holds(tmp_path, kind, named):
    state = projector_state(DEPTHS[kind])
    x = np.float32(np.random.default_rng(0).standard_normal((2, 16, 8)))
    out = {"tokens": np.float32(twin.projector(state, DEPTHS[kind], np.float64(x)))}
    config = {"compressor": "llava_mlp"} | ({"mm_projector_type": kind} if named else {})
    # The prefixes of a whole checkpoint may be there or not.
    state = {f"model.mm_projector.{name}" if named else name: w for name, w in state.items()}
    case = write(tmp_path / "mlp.npz", config, param=state, **{"in": {"features": x}}, out=out)
    assert check(case) == ["tokens"]
    case.config["mm_projector_type"] = "mlp2x_gelu" if kind != "mlp2x_gelu" else "mlp3x_gelu"
    with pytest.raises(AssertionError, match=r"with \d linear maps"):
        check(case)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", ["quecc", "tokenpacker", "m3"])
def test_behind_a_compressor_too_the_projector_has_as_many_maps_as_the_file_holds(
    tmp_path, name, depth
):
    prefix, first = {"quecc": ("", 1), "tokenpacker": ("mlp.", 0), "m3": ("", 0)}[name]
    names = [f"{prefix}{first + 2 * i}" for i in range(depth)]
    state, given = quecc_state()
    if name == "tokenpacker":
        state = twin.random_state(twin.shapes_tokenpacker(8, 32, 20), 5)
    own = re.compile(r"^(mlp\.\d|[13])\.")
    state = {k: w for k, w in state.items() if not own.match(k) and name != "m3"}
    state |= projector_state(names)
    x = np.float64(given["features"])
    if name == "m3":
        tokens = elastic_numpy.pooled(twin.projector(state, names, x), 2)
        config, out = {"compressor": "m3", "grid": 4}, {"tokens_scale4": np.float32(tokens)}
    else:
        both = state | projector_state(["1", "3"]) | projector_state(["mlp.0", "mlp.2"])
        compressed = {
            "quecc": lambda: twin.quecc(both, x, given["multi"], given["text"], 4, 2)[0],
            "tokenpacker": lambda: twin.tokenpacker(both, x, given["multi"], 4, 2)[0],
        }[name]()
        out = {"tokens": np.float32(twin.projector(state, names, compressed))}
        config = {"quecc": QUECC, "tokenpacker": {"compressor": name, "scale_factor": 2, "num_heads": 4}}[name]  # fmt: skip
    case = write(tmp_path / "deep.npz", config, param=state, **{"in": given}, out=out)
    assert check(case) == list(out)


def test_what_no_format_describes_fails_by_name(tmp_path):
    x = np.float32(np.random.default_rng(0).standard_normal((2, 16, 8)))

    def file(config: dict | None = None, **groups: dict) -> Case:
        settings = {"compressor": "llava_mlp", "mm_projector_type": "identity"} | (config or {})
        given = {"in": {"features": x}, "out": {"tokens": x}} | groups
        return write(tmp_path / "file.npz", settings, **given)

    assert check(file()) == ["tokens"]
    wrong = {
        "unknown compressor 'resampler'": lambda: check(file({"compressor": "resampler"})),
        "unknown mm_projector_type 'mlp2x_silu'": lambda: check(file({"mm_projector_type": "mlp2x_silu"})),
        "unknown inputs \\['video'\\]": lambda: file(**{"in": {"features": x, "video": x}}),
        "unknown output 'logits'": lambda: check(file(out={"logits": x})),
        "unknown entries {'grad/x'}": lambda: file(grad={"x": x}),
        "maps and activations do not alternate": lambda: check(file(param=projector_state(["0", "3"]))),
        "no number of heads of the CLIP": lambda: check(
            file(param=twin.random_state(twin.shapes_clip(8, 12, 2, 3, 4), 1), **{"in": {"images": np.zeros((1, 3, 12, 12))}})
        ),
    }  # fmt: skip
    for message, run in wrong.items():
        with pytest.raises(AssertionError, match=message):
            run()


@pytest.mark.parametrize("name", ["llava_mlp", "quecc", "tokenpacker", "m3", "mqt"])
def test_end_to_end_files_start_from_pixels(tmp_path, name):
    settings = {
        "llava_mlp": {}, "quecc": QUECC, "tokenpacker": {"scale_factor": 2, "num_heads": 4}, "m3": {"scales": [4]},
        "mqt": {"num_heads": 4, "query_grid": 2, "token_counts": [3]},
    }  # fmt: skip
    maps = {"0.weight": (20, 8), "0.bias": (20,), "2.weight": (20, 20), "2.bias": (20,)}
    shapes = {
        "llava_mlp": maps,
        "m3": maps,
        "mqt": elastic_numpy.shapes_mqt(8, 2, 20),
        "quecc": twin.shapes_quecc(8, 32, 12, 20, 2),
        "tokenpacker": twin.shapes_tokenpacker(8, 32, 20),
    }
    state = twin.random_state(twin.shapes_clip(8, 12, 24, 4, 3) | shapes[name], 7)
    rng = np.random.default_rng(8)
    given = {"images": np.float32(rng.standard_normal((2, 3, 12, 12)))}
    if name == "quecc":
        given["text"] = np.float32(rng.standard_normal((2, 1, 12)))
    states = twin.clip_states(state, given["images"], heads=2)
    last, multi = (
        states[23][:, 1:],
        np.concatenate([states[i][:, 1:] for i in (12, 16, 22, 23)], -1),
    )
    tokens = {
        "llava_mlp": lambda: twin.mlp(state, "0", "2", last),
        "m3": lambda: elastic_numpy.pooled(twin.mlp(state, "0", "2", last), 2),
        "mqt": lambda: elastic_numpy.mqt(state, last, 4, 3),
        "quecc": lambda: twin.quecc(state, last, multi, given["text"], 4, 2)[1],
        "tokenpacker": lambda: twin.tokenpacker(state, last, multi, 4, 2)[1],
    }[name]()
    config = settings[name] | {"compressor": name, "end_to_end": True, "clip": {"heads": 2}}
    case = write(tmp_path / "e2e.npz", config, param=state, **{"in": given}, out={"tokens": tokens})
    assert check(case) == ["tokens"]
    case.config["clip"]["heads"] = 4
    with pytest.raises(AssertionError, match="tokens"):
        check(case)


@pytest.mark.parametrize(
    ("adaptive", "kind"),
    [(True, "identity"), (False, "mlp2x_gelu"), (True, "linear"), (False, "mlp1x_gelu"), (True, "mlp3x_gelu")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_end_to_end_files_of_prumerge_read_the_last_layers_queries_and_keys(
    tmp_path, name, adaptive, kind
):
    state = twin.random_state(twin.shapes_clip(8, 12, 24, 6, 3), 7)
    given = {"images": np.float32(np.random.default_rng(1).standard_normal((1, 3, 18, 18)))}
    states = twin.clip_states(state, given["images"], heads=2)
    layer = "vision_model.encoder.layers.23."
    normed = twin.layer_norm(state, f"{layer}layer_norm1", states[23], 1e-5)
    q, k = (twin.linear(state, f"{layer}self_attn.{n}_proj", normed) for n in "qk")
    plus, ratio = name == "prumerge_plus", "batch" if adaptive else "fixed"
    (image,) = prumerge_numpy.prumerge(
        states[23], q, k, plus=plus, ratio=ratio, neighbours=4, bound=35
    )
    tokens = image["tokens"][None]
    state |= projector_state(DEPTHS[kind])
    tokens = twin.projector(state, DEPTHS[kind], tokens)
    mid = {
        "kept_idx": np.array([image["kept"]]), "complement_idx": np.array([image["complement"]]),
        "cls_attn": image["attention"][None],
    }  # fmt: skip
    heads = {"clip": {"heads": 2, "layers": 24}} if adaptive else {"num_heads": 2}
    config = {"compressor": name, "end_to_end": True, "k_neighbours": 4} | heads
    config |= {"adaptive": adaptive, "fixed_ratio": None if adaptive else 0.125}
    case = write(tmp_path / "e2e.npz", config, param=state, **{"in": given}, out={"tokens": tokens}, mid=mid)  # fmt: skip
    assert sorted(check(case)) == ["cls_attn", "complement_idx", "kept_idx", "tokens"]
    case.mids["kept_idx"][0, 0] += 1
    with pytest.raises(AssertionError, match="kept_idx"):
        check(case)


def mqt_file(path: Path, **changes) -> Case:
    """A full-size MQT file: weights and inputs from the recipe, the position table from nowhere."""
    shapes = elastic_numpy.shapes_mqt(8, 4, 80)
    given = {"features": (2, 36, 8)}
    entries = {"params": twin.recipe(shapes), "inputs": twin.recipe(given, first_index=100)}
    drawn = {k: twin.draw(5, **e) for group in entries.values() for k, e in group.items()}
    tokens = {m: elastic_numpy.mqt(drawn, drawn["features"], 2, m) for m in (16, 3)}
    config = {"compressor": "mqt", "num_heads": 2, "query_grid": 4, "max_tokens": 16, "seed": 5}
    out = {
        "tokens_first64": tokens[16][..., :64], "token_sum": tokens[16].sum(-1), "channel_mean": tokens[16].mean(1),
        "tokens_m3_first64": tokens[3][..., :64], "abs_mean_m3": np.abs(tokens[3]).mean(),
    }  # fmt: skip
    param = {"pos_embed_first8": elastic_numpy.sine_table(4, 8).astype(np.float32)[:, :8]}
    full = config | entries | {"weights_from_recipe": True} | changes
    return write(path, full, param=param, out={k: np.float32(v) for k, v in out.items()})


def test_a_full_size_mqt_file_gets_its_position_table_from_us(tmp_path):
    case = mqt_file(tmp_path / "mqt_fullsize.npz")
    assert "pos_embed" not in case.params and len(check(case)) == 5
    case.outputs["abs_mean_m3"] *= 1.001
    with pytest.raises(AssertionError, match="abs_mean_m3"):
        check(case)
    case = mqt_file(tmp_path / "mqt_fullsize.npz")
    case.params["pos_embed_first8"][1, 0] += 1e-3
    with pytest.raises(AssertionError):
        check(case)


def test_counts_that_the_reference_silently_bends_must_be_refused_beside_legal_ones(tmp_path):
    case = mqt_file(tmp_path / "mqt.npz")
    case.outputs["quirk_m17"] = case.outputs["tokens_first64"]
    assert "quirk_m17" in check(case)
    case.outputs["quirk_m2"] = case.outputs["tokens_m3_first64"]
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(case)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 36, 8)))
    out = {"tokens_scale9": np.float32(elastic_numpy.pooled(x, 2)), "quirk_scale16": x[:, :9]}
    config = {"compressor": "m3", "grid": 6}
    case = write(tmp_path / "m3.npz", config, out=out, **{"in": {"projected_features": x}})
    assert sorted(check(case)) == ["quirk_scale16", "tokens_scale9"]
    case.outputs["tokens_scale9"] = case.outputs["tokens_scale9"] * 1.001
    with pytest.raises(AssertionError, match="tokens_scale9"):
        check(case)


def test_m3_from_features_goes_through_the_projectors_weights(tmp_path):
    shapes = {"0.weight": (20, 8), "0.bias": (20,), "2.weight": (20, 20), "2.bias": (20,)}
    state = twin.random_state(shapes, 7)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 36, 8)))
    tokens = elastic_numpy.pooled(twin.mlp(state, "0", "2", np.float64(x)), 3)
    config = {"compressor": "m3", "grid": 6}
    given = {"in": {"features": x}}
    case = write(
        tmp_path / "m3.npz", config, param=state, out={"tokens_scale4": np.float32(tokens)}, **given
    )
    assert check(case) == ["tokens_scale4"]


def test_a_kernel_that_differs_from_the_stride_must_be_refused(tmp_path):
    state, given = quecc_state(kernel=3)
    config = QUECC | {"kernel": 3}
    case = write(
        tmp_path / "k3s2.npz", config, param=state, **{"in": given}, out={"tokens": given["text"]}
    )
    assert check(case) == ["kernel != stride"]


def test_what_the_reference_silently_returns_must_be_refused(tmp_path):
    state, given = quecc_state(kernel=3)
    config = QUECC | {"kernel": 3, "stride": 3}
    quirk = {"quirk_tokens": np.zeros((2, 1, 20), np.float32)}
    case = write(tmp_path / "quirk.npz", config, param=state, **{"in": given}, out=quirk)
    assert check(case) == ["quirk_tokens"]
    state, given = quecc_state()
    legal = write(tmp_path / "legal.npz", QUECC, param=state, **{"in": given}, out=quirk)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(legal)


def test_integer_outputs_must_match_exactly():
    with pytest.raises(AssertionError):
        assert_close(np.array([100000]), np.array([100001]), "kept_idx")
