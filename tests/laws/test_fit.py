"""The law: known constants come back, the published tables give the published picture, and every doubt is said."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.laws import fit, fitting, law, least_squares, table
from vlm_jax.laws.law import Law
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

PAPER = Path(table.__file__).parent / "data"
SIZES = {"tiny": 25e3, "small": 100e3, "big": 400e3}
TOKENS = (1, 4, 16, 64)
TRUE = Law(A=0.06, alpha=0.21, beta=0.13, D=0.05)


def rows_of(truth: Law, seeds=(0,), run_noise=0.0, cell_noise=0.0, rng_seed=0, **changes):
    """A full table of `truth`; run_noise is shared by all the token counts of one (LM, seed)."""
    rng = np.random.default_rng(rng_seed)
    cell = {(lm, v): rng.normal(0, cell_noise) for lm in SIZES for v in TOKENS}
    run = {(lm, seed): rng.normal(0, run_noise) for lm in SIZES for seed in seeds}
    fields = {"benchmark": "b", "family": "f", "compressor": "tokenpacker", **changes}
    return [
        Row(params, v, float(truth.error(params, v)) + cell[lm, v] + run[lm, seed], lm=lm, seed=seed, **fields)
        for lm, params in SIZES.items() for v in TOKENS for seed in seeds
    ]  # fmt: skip


@pytest.fixture(scope="module")
def paper():
    """Both published tables, fitted with few resamples."""
    found = {}
    for family in ("reasoning", "ocr"):
        rows = table.read(PAPER / f"paper_{family}.csv")
        found[family] = (rows, fitting.fit_family(rows, family, draws=200))
    return found


@pytest.mark.parametrize("truth", [
    TRUE, Law(0.59, 0.071, 0.015, 0.0), Law(0.4, 0.9, 0.0, 0.0), Law(0.2, -0.05, 0.6, 0.1), Law(0.02, 1.8, 1.1, 0.02),
], ids=str)  # fmt: skip
def test_the_constants_of_a_noiseless_table_come_back(truth):
    size, tokens = (
        a.ravel() for a in np.meshgrid(np.array([0.5, 1.8, 4, 7]), [1.0, 4, 16, 64, 576])
    )
    errors = truth.error(size * 1e9, tokens)[None]
    found = least_squares.solve(size, tokens, errors, np.ones_like(errors))
    assert found.sse[0] < 1e-12
    got = [float(column[0]) for column in found[:4]]
    np.testing.assert_allclose(got, dataclasses.astuple(truth), atol=2e-4)


def test_the_least_squares_optimum_equals_a_general_optimisers():
    from scipy.optimize import minimize

    size, tokens = (
        a.ravel() for a in np.meshgrid(np.array([0.5, 1.8, 4, 7]), [1.0, 4, 16, 64, 576])
    )
    rng = np.random.default_rng(3)
    y = TRUE.error(size * 1e9, tokens) * np.exp(rng.normal(0, 0.05, size.shape))
    weights = rng.uniform(0.2, 2, size.shape)
    found = least_squares.solve(size, tokens, y[None], weights[None])

    def loss(p):
        return np.sum(weights * (y - p[0] * size ** -p[1] * tokens ** -p[2] - p[3]) ** 2)

    best = min(
        minimize(loss, start, method="L-BFGS-B", bounds=[(0, None), (-5, 5), (-5, 5), (0, None)],
                 options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000}).fun
        for start in ([0.3, 0.1, 0.1, 0.0], [0.2, 0.5, 0.5, 0.1], [0.5, 0.2, 0.05, 0.0])
    )  # fmt: skip
    assert found.sse[0] <= best * (1 + 1e-6)


def test_the_same_table_gives_the_same_law_to_the_last_bit_in_any_row_order(tmp_path):
    rows = rows_of(TRUE, seeds=(0, 1), run_noise=0.02, cell_noise=0.01)
    texts = []
    for ordered in (rows, rows, rows[::-1]):
        law.save(tmp_path / "law.json", {"f": fitting.fit_family(ordered, "f", draws=100)}, {})
        texts.append((tmp_path / "law.json").read_text())
    assert texts[0] == texts[1] == texts[2]
    other = fitting.fit_family(rows, "f", draws=100, seed=1)
    assert (
        other.law == fitting.fit_family(rows, "f", draws=100).law
    )  # the seed moves the intervals only


def _without(field):
    def change(content):
        del content["laws"]["f"][field]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format=1), "not a law.json of format 2; make it again"),
        (lambda c: c.update(laws={}), "holds no law; make it again"),
        (lambda c: c.update(laws=[]), "is damaged (AttributeError"),
        (lambda c: c["laws"].update(f=None), "is damaged ("),
        (_without("law"), "is damaged (KeyError: 'law')"),
        (_without("tails"), "is damaged ("),
        (lambda c: c["laws"]["f"].update(resamples=[]), "is damaged ("),
        (lambda c: c["laws"]["f"].update(lms={}), "is damaged (the law of family 'f' has no"),
        (
            lambda c: c["laws"]["f"]["law"].update(A=float("nan")),
            "is damaged (the law of family 'f' has no",
        ),
        (lambda c: c["laws"]["f"]["law"].update(B=1), "is damaged (TypeError"),
    ],
)
def test_a_damaged_law_json_is_one_line(tmp_path, written_law, change, words):
    content = json.loads(written_law)
    change(content)
    path = tmp_path / "law.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        law.load(path)
    text = str(caught.value)
    assert words in text and text.startswith(str(path)) and "\n" not in text


@pytest.fixture(scope="module")
def written_law(tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "law.json"
    law.save(path, {"f": fitting.fit_family(rows_of(TRUE), "f", draws=100)}, {})
    return path.read_text()


def test_a_law_cut_short_or_written_in_another_encoding_is_one_line(tmp_path, written_law):
    path = tmp_path / "law.json"
    path.write_text(written_law[:500])
    with pytest.raises(ConfigError, match=r"law\.json is not valid JSON"):
        law.load(path)
    path.write_bytes(written_law.encode("utf-16"))
    assert law.load(path).keys() == {"f"}
    with pytest.raises(ConfigError, match=r"cannot be written: Is a directory; give another path"):
        law.save(tmp_path, {}, {})


def test_a_table_with_an_error_of_zero_is_fitted_and_saved(tmp_path):
    rows = [dataclasses.replace(r, error=0.0) if i == 3 else r for i, r in enumerate(rows_of(TRUE))]
    found = fitting.fit_family(rows, "f", draws=100)
    law.save(tmp_path / "law.json", {"f": found}, {})
    assert law.load(tmp_path / "law.json")["f"].law == found.law


def test_law_json_gives_back_the_fit(tmp_path):
    found = fitting.fit_family(rows_of(TRUE, seeds=(0, 1), run_noise=0.01), "f", draws=100)
    law.save(tmp_path / "law.json", {"f": found}, {"table": "errors.csv"})
    (back,) = law.load(tmp_path / "law.json").values()
    assert (
        back.law == found.law
        and back.intervals == found.intervals
        and back.statements == found.statements
    )
    np.testing.assert_allclose(back.resamples, found.resamples, rtol=1e-5, atol=1e-12)


def test_the_published_reasoning_scores_give_an_exponent_ratio_of_4_7(paper):
    found = paper["reasoning"][1]
    assert found.sse <= 3.80e-4 and found.law.D >= 0
    assert found.law.ratio == pytest.approx(4.70, abs=0.05)
    assert found.law.alpha == pytest.approx(0.0709, abs=2e-4)
    assert found.p_alpha_greater["cells"] == 1.0
    low, high = found.d_profile["D"]
    assert low == 0 and high > 0.05 and not found.d_identified


def test_the_published_ocr_scores_give_an_exponent_ratio_of_0_72(paper):
    found = paper["ocr"][1]
    assert found.law.ratio == pytest.approx(0.72, abs=0.02)
    assert found.sse == pytest.approx(5.1e-3, abs=1e-4)
    assert found.p_alpha_greater["cells"] == 0.0


@pytest.mark.parametrize(("family", "worst"), [("reasoning", 0.010), ("ocr", 0.035)])
def test_the_law_of_0_5_to_4b_predicts_7b(paper, family, worst):
    rows = paper[family][0]
    small = [row for row in rows if row.lm_params < 5e9]
    held_out = [row for row in rows if row.lm_params > 5e9]
    assert len(small) == 21 and len(held_out) == 7
    found = fitting.fit_family(small, family, draws=100).law
    predicted = found.error([r.lm_params for r in held_out], [r.visual_tokens for r in held_out])
    measured = np.array([row.error for row in held_out])
    assert np.max(np.abs(predicted / measured - 1)) <= worst


def test_a_flagged_row_is_never_fitted_but_always_named():
    rows = rows_of(TRUE, seeds=(0, 1))
    failed = dataclasses.replace(rows[5], error=0.95, flag="chance level")
    clean = fitting.fit_family([row for row in rows if row is not rows[5]], "f", draws=100)
    found = fitting.fit_family([failed if row is rows[5] else row for row in rows], "f", draws=100)
    assert found.law == clean.law and found.num_cells == 12
    (line,) = found.left_out
    assert "tiny, 16 visual tokens, seed 1 (error 0.950)" in line and "chance level" in line
    assert any(line in statement for statement in found.statements)


def test_another_compressors_rows_are_beside_the_law_and_named():
    rows = rows_of(TRUE)
    extra = dataclasses.replace(rows[0], compressor="quecc", error=0.01)
    found = fitting.fit_family([*rows, extra], "f", draws=100)
    assert found.law == fitting.fit_family(rows, "f", draws=100).law
    assert "1 row(s) with compressor 'quecc'" in found.left_out[0]


def width(found, mode, name="alpha"):
    low, high = found.intervals[mode][name]
    return high - low


def test_run_to_run_noise_widens_the_interval_over_seeds_and_not_a_noiseless_one():
    calm = fitting.fit_family(rows_of(TRUE, seeds=(0, 1, 2), cell_noise=0.004), "f", draws=300)
    wild = fitting.fit_family(
        rows_of(TRUE, seeds=(0, 1, 2), cell_noise=0.004, run_noise=0.03), "f", draws=300
    )
    assert width(calm, "seeds") < 1e-6  # identical runs: nothing to learn from drawing them again
    assert width(wild, "seeds") > 0.02
    assert width(wild, "cells and seeds") > width(wild, "seeds")
    assert wild.mode == "cells and seeds"


def test_one_seed_gives_only_the_interval_over_cells_and_says_so():
    found = fitting.fit_family(rows_of(TRUE, cell_noise=0.004), "f", draws=100)
    assert list(found.intervals) == ["cells", "residuals"] and found.mode == "cells"
    assert any("one seed per cell" in line for line in found.statements)


def test_noise_between_cells_widens_the_interval_over_cells():
    narrow, wide = (
        fitting.fit_family(rows_of(TRUE, cell_noise=noise), "f", draws=300, fixed_d=0.05)
        for noise in (0.001, 0.01)
    )
    assert 3 * width(narrow, "cells") < width(wide, "cells")


def test_a_resource_that_does_nothing_is_said_not_to():
    found = fitting.fit_family(rows_of(Law(0.03, 0.3, 0.0, 0.0), cell_noise=0.01), "f", draws=200)
    assert any("beta is not distinguishable from 0" in line for line in found.statements)
    assert any("alpha > beta in 100.0%" in line for line in found.statements)


def test_tokens_that_harm_are_not_taken_for_sizes_that_help():
    """error = 0.3 V^0.1 whatever N: alpha = 0 is above beta = -0.1, but error falls with nothing."""
    harmed = rows_of(Law(0.3, 0.0, -0.1, 0.0), cell_noise=0.002)
    found = fitting.fit_family(harmed, "f", fixed_d=0, draws=200)
    assert found.statements[0] == (
        "f: alpha > beta in 100.0% of 200 resamples (cells): whether error falls with LM size at all is not settled."
    )


def test_a_d_that_the_data_show_is_called_identified():
    found = fitting.fit_family(rows_of(Law(3e-4, 0.7, 0.5, 0.2), cell_noise=1e-4), "f", draws=100)
    assert found.d_identified and abs(found.law.D - 0.2) < 0.01
    assert any("is identified" in line for line in found.statements)


def test_a_fixed_d_is_kept():
    found = fitting.fit_family(rows_of(TRUE), "f", draws=100, fixed_d=0.02)
    assert found.law.D == 0.02 and set(found.resamples[:, 3]) == {0.02}


def test_cells_with_many_seeds_weigh_no_more_than_cells_with_one():
    rows = rows_of(TRUE, cell_noise=0.02)
    repeated = [dataclasses.replace(rows[0], seed=seed) for seed in range(1, 9)]
    plain, heavy = (fitting.fit_family(r, "f", draws=100) for r in (rows, [*rows, *repeated]))
    assert heavy.law.alpha == pytest.approx(plain.law.alpha, abs=1e-6)
    assert heavy.sse == pytest.approx(plain.sse, rel=1e-6)


FULL = "\n".join(
    f"{n:g},{v},{0.9 * (n / 1e9) ** -0.1 * v**-0.05:.4f}" for n in (1e9, 4e9) for v in (1, 4, 16)
)


@pytest.mark.parametrize(
    ("body", "flags", "words"),
    [
        ("1e9,1,.5\n1e9,4,.4\n4e9,1,.4\n4e9,4,.3", [], "has 4 cells for 4 constants; measure at least 5 or fix D with --fix-d 0"),
        ("1e9,1,.5\n4e9,4,.4", [], "has 2 cells for 4 constants"),
        ("7e9,1,.5\n7e9,4,.4\n7e9,16,.3\n7e9,64,.2\n7e9,144,.1", [], "has 1 LM size(s)"),
        ("1e9,1,.5\n2e9,1,.4\n4e9,1,.3\n7e9,1,.2\n8e9,1,.1", [], "has 1 visual token count(s)"),
        ("1e9,1,nan", [], "errors.csv:2: error nan is outside [0, 1]"),
        ("1e9,1,51.5", [], "errors.csv:2: error 51.5 is outside [0, 1]; error = 1 - metric; divide percentages by 100"),
        ("1e9,1,.5\n1e9,1,.4", [], "duplicate cell (all/all, lm 1B, 1 visual tokens, seed 0)"),
        (FULL, ["--family", "ocr"], "family 'ocr' is not in the table; it has ['all']"),
        (FULL, ["--benchmark", "gqa"], "benchmark 'gqa' is not in family 'all'; it has ['all']"),
        (FULL, ["--compressor", "quecc"], "compressor 'quecc' is not in family 'all'"),
        (FULL, ["--fix-d", "1.5"], "D must lie in [0, 1), got 1.5"),
        (FULL, ["--level", "95"], "level must lie in (0, 1), got 95"),
        (FULL, ["--draws", "3"], "3 draws are too few"),
        (FULL, ["--weights", "binomial"], "binomial weights need the column n (questions scored); 1B, 1 visual tokens, seed 0 has none"),
        (FULL, ["--size", "total"], "--size=total needs presets, and lm '1B' is none"),
        (FULL, ["--check", "alpha=1"], "--check must be alpha=X,beta=Y with numbers up to 5; got 'alpha=1'"),
        (FULL, ["--check", "alpha=x,beta=1"], "--check must be alpha=X,beta=Y"),
        (FULL, ["--check", "alpha=.1,beta=.2,gamma=1"], "--check must be alpha=X,beta=Y"),
        (FULL, ["--check", "alpha=.1,beta=inf"], "--check must be alpha=X,beta=Y"),
        (FULL, ["--text-tokens", "0"], "text_tokens must be at least 1, got 0"),
        (FULL, ["--out", "/nowhere/law.json"], "/nowhere/law.json: its folder does not exist"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    tmp_path, monkeypatch, capsys, body, flags, words
):
    monkeypatch.chdir(tmp_path)
    Path("errors.csv").write_text("lm_params,visual_tokens,error\n" + body + "\n")
    assert fit.main(["errors.csv", *flags]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


def test_when_every_run_of_a_size_failed_the_message_counts_the_flagged_rows():
    rows = [
        dataclasses.replace(r, flag="" if r.lm == "big" else "chance level") for r in rows_of(TRUE)
    ]
    with pytest.raises(ConfigError, match=r"has 1 LM size\(s\) beside 8 flagged row\(s\)"):
        fitting.fit_family(rows, "f", draws=100)


@pytest.mark.parametrize(
    ("size", "alpha"),
    [("given", 0.0709), ("nominal", 0.0709), ("total", 0.0673), ("non-embedding", 0.0619)],
)
def test_what_n_counts_changes_alpha_as_known(size, alpha, capsys):
    table_of = str(PAPER / "paper_reasoning.csv")
    assert fit.main([table_of, "--size", size, "--draws", "100", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    found = content["laws"]["reasoning"]
    assert found["law"]["alpha"] == pytest.approx(alpha, abs=6e-5)
    assert found["law"]["beta"] == pytest.approx(0.0151, abs=1e-4)
    assert content["provenance"]["options"]["size"] == size


def test_a_preset_without_a_nominal_size_is_refused():
    with pytest.raises(ConfigError, match="preset 'mini-38k' has no nominal size"):
        table.counted([Row(38e3, 1, 0.5, lm="mini-38k")], "nominal")


def test_weights_loss_checked_exponents_and_other_laws_survive_law_json(tmp_path):
    rows = [dataclasses.replace(row, n=400) for row in rows_of(TRUE, cell_noise=0.004)]
    found = fitting.fit_family(
        rows, "f", draws=100, weights="binomial", loss="huber", text_tokens=9, check=(0.2, 0.1)
    )
    law.save(tmp_path / "law.json", {"f": found}, {})
    back = law.load(tmp_path / "law.json")["f"]
    assert back.alternatives == found.alternatives and len(back.alternatives) == 6
    assert back.check == found.check and back.profile == found.profile
    assert (back.weights, back.loss) == ("binomial", "huber")
    assert back.down_weighted == found.down_weighted


def test_the_command_writes_law_json_and_a_table_that_fits_a_terminal(tmp_path):
    source, target = PAPER / "paper_reasoning.csv", tmp_path / "law.json"
    done = subprocess.run(
        [sys.executable, "-m", "vlm_jax.laws.fit", str(source), "--out", str(target), "--draws", "100"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert (
        "4.7 " in done.stdout and "0.0709" in done.stdout and "D is not identified" in done.stdout
    )
    assert max(map(len, done.stdout.split("- reasoning")[0].splitlines())) <= 100
    content = json.loads(target.read_text())
    assert (
        content["laws"]["reasoning"]["law"]["D"] == 0
        and str(source) in content["provenance"]["command"]
    )
    missing = subprocess.run(
        [sys.executable, "-m", "vlm_jax.laws.fit", "nothing.csv"], capture_output=True, text=True
    )
    assert (
        missing.returncode == 2
        and missing.stderr.count("\n") == 1
        and "no such file" in missing.stderr
    )


def test_the_law_is_of_elastic_trainings_or_of_the_others_or_of_the_held_out_loss(tmp_path, capsys):
    """Elastic rows have an alpha of 0.3 in place of 0.2, and the loss one of 0.1."""
    rows = [
        Row(
            n * 1e9, v, float(Law(0.6, 0.3 if elastic else 0.2, 0.1, 0).error(n * 1e9, v)), "a", "f", f"{n}b", "m3",
            elastic=elastic, validation_loss=None if elastic else 3 * n**-0.1 * v**-0.05,
        )
        for elastic in (False, True) for n in (0.5, 2.0, 7.0) for v in (1, 4, 16)
    ]  # fmt: skip
    file, out = tmp_path / "errors.csv", tmp_path / "law.json"
    table.write(file, rows)
    given = [str(file), "--draws=100", "--fix-d=0", "--out", str(out)]
    assert fit.main(given) == 2
    assert "equally often from elastic trainings and from others; choose with --elastic" in capsys.readouterr().err  # fmt: skip
    for flag, alpha in (("yes", 0.3), ("no", 0.2)):
        assert fit.main([*given, "--elastic", flag]) == 0
        found = law.load(out)["f"]
        assert (found.law.alpha, found.elastic) == (pytest.approx(alpha), flag == "yes")
        assert found.num_cells == 9 and "9 row(s) with compressor 'm3'" in found.left_out[0]
    assert ("m3, one training per LM" in capsys.readouterr().out) and found.trained == "m3"
    assert fit.main([*given, "--benchmark=validation_loss"]) == 0
    found = law.load(out)["validation_loss"]
    assert (found.law.A, found.law.alpha, found.law.beta) == pytest.approx((3, 0.1, 0.05))
