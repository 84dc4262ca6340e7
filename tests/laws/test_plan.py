"""The plan: the best affordable pair, how firmly it is chosen, and what it says in words."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tables

from vlm_jax.costs.price import Budget, Workload, exact_price, find_chip
from vlm_jax.laws import fitting, law, plan, planning, table
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError

PAPER = Path(fitting.__file__).parent / "data" / "paper_reasoning.csv"


@pytest.fixture(scope="module")
def fits():
    return fitting.fit_table(tables.rows(), draws=200)


@pytest.fixture(scope="module")
def paper():
    return fitting.fit_table(table.read(PAPER), draws=200)["reasoning"]


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
@pytest.mark.parametrize("text_tokens", [0, 12, 200])
@pytest.mark.parametrize("budget", [1e6, 5e6, 2e7, 1e9])
def test_the_choice_is_that_of_brute_force(fits, family, text_tokens, budget):
    pairs = [(lm, params, v) for lm, params in tables.SIZES.items() for v in tables.TOKENS]
    affordable = [p for p in pairs if 2 * p[1] * (text_tokens + p[2]) <= budget]
    if not affordable:
        with pytest.raises(ConfigError, match="buy nothing; the cheapest candidate"):
            planning.choose(fits[family], budget, text_tokens)
        return
    found = planning.choose(fits[family], budget, text_tokens)
    best = min(affordable, key=lambda p: float(fits[family].law.error(p[1], p[2])))
    assert (found.best.lm, found.best.visual_tokens) == (best[0], best[2])
    assert found.best.flops == 2 * best[1] * (text_tokens + best[2])
    shares = [c.share for c in found.candidates]
    assert sum(shares) == pytest.approx(1)
    assert all(c.share == 0 for c in found.candidates if c.flops > budget)


def test_nothing_on_the_frontier_is_beaten_and_all_else_is(fits):
    found = planning.choose(fits["reasoning"], 1e9, 10)
    for c in found.candidates:
        beaten = any(o.flops <= c.flops and o.error < c.error for o in found.candidates)
        assert beaten != (c in found.frontier)


def test_the_closed_form_is_the_minimum_over_a_fine_grid():
    """200 seeded laws: N = C / (Q + V) is put into the law, and the best V looked up on a grid of 0.2 % steps."""
    rng = np.random.default_rng(7)
    v = np.geomspace(0.05, 2e4, 6500)
    inside = 0
    for _ in range(200):
        alpha, beta, text = (
            rng.uniform(0.01, 0.5),
            rng.uniform(0.001, 0.5),
            int(rng.integers(1, 500)),
        )
        error = (1 / (text + v)) ** -alpha * v**-beta
        best = v[error.argmin()]
        found = planning.optimal_visual_tokens(alpha, beta, text)
        if v[0] < found < v[-1]:
            inside += 1
            assert found == pytest.approx(best, rel=0.005)
        else:
            assert best == (v[0] if found <= v[0] else v[-1])
    assert inside > 80
    assert planning.optimal_visual_tokens(0.077, 0.015, 50) == pytest.approx(12.1, abs=0.05)
    assert planning.optimal_visual_tokens(0.03, 0.05, 50) == math.inf
    assert planning.optimal_visual_tokens(0.3, -0.01, 50) == 0


@pytest.mark.parametrize(("text_tokens", "tokens"), [(0, 1), (50, 16)])
@pytest.mark.parametrize("gflops", [20, 3000])
def test_the_papers_law_at_a_fixed_cost_takes_the_papers_token_counts(
    paper, text_tokens, tokens, gflops
):
    """The reading: any size may be had, so that every count spends the same FLOPs; best on the paper's grid of counts."""
    sizes = (1e6, 1e13)  # no count is cut off by the largest size
    chosen = planning.choose(paper, gflops * 1e9, text_tokens, free_sizes=sizes).best
    assert chosen.visual_tokens == tokens
    assert 2 * chosen.lm_params * (text_tokens + tokens) == pytest.approx(gflops * 1e9, rel=1e-5)


def enumerated(law, sizes, budget, chip, q, cached, answer, batch):
    """The plan anew, without its code: [(error, cost)] of what is affordable, for a budget in milliseconds on `chip`."""
    found = []
    for (name, n), v in itertools.product(sizes.items(), PAPER_COUNTS):
        shape = presets.lm(name)
        kv = 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        first = max(
            batch * 2 * n * ((0 if cached else q) + v) / chip.peak_flops,
            (2 * n + batch * kv * (q + v)) / chip.hbm_bandwidth_bytes,
        )
        keys = sum(q + v + i for i in range(1, answer))
        later = max(
            batch * 2 * n * answer / chip.peak_flops,
            ((answer - 1) * 2 * n + batch * kv * keys) / chip.hbm_bandwidth_bytes,
        )
        fits = 2 * n + batch * kv * (q + v + answer) <= chip.hbm_bytes
        if fits and (first + (later if answer else 0)) * 1e3 <= budget:
            found.append((float(law.error(n, v)), name, v))
    return min(found)[1:] if found else None


PAPER_COUNTS = (1, 4, 16, 36, 64, 144, 576)


@pytest.mark.parametrize("chip", ["v5e", "H100"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("answer", "batch"), [(0, 1), (8, 1), (3, 16)])
@pytest.mark.parametrize("budget", [4, 30, 200])
def test_a_budget_in_time_chooses_what_an_enumeration_does(
    paper, chip, cached, answer, batch, budget
):
    limit = Budget("ms", budget, find_chip(chip))
    sizes = {**paper.lms, "qwen1.5-14b": 14e9}
    for q in (0, 300):
        best = enumerated(paper.law, sizes, budget, limit.chip, q, cached, answer, batch)
        work = Workload(q, cached, answer, batch)
        if best is None:
            with pytest.raises(ConfigError, match="buy nothing"):
                planning.choose(paper, limit, work, lms=sizes)
            continue
        found = planning.choose(paper, limit, work, lms=sizes)
        assert (found.best.lm, found.best.visual_tokens) == best


@pytest.mark.parametrize("cached", [False, True])
def test_the_choice_flips_exactly_where_the_plan_says(paper, cached):
    budget = Budget("ms", 12, find_chip("H100"))
    work = Workload(50, cached, output_tokens=4, batch=8)
    counts = (1, 36, 576)
    spans = planning.choose(paper, budget, work, visual_tokens=counts).by_text_tokens
    assert spans[0].first == 0 and len(spans) > 3
    for span in spans:
        for q in (span.first, span.last):
            best = planning.choose(
                paper, budget, dataclasses.replace(work, text_tokens=q), visual_tokens=counts
            ).best
            assert (best.lm, best.visual_tokens) == (span.lm, span.visual_tokens)
    assert [span.first for span in spans[1:]] == [span.last + 1 for span in spans[:-1]]
    beyond = dataclasses.replace(work, text_tokens=spans[-1].last + 1)
    with pytest.raises(ConfigError, match="buy nothing"):
        planning.choose(paper, budget, beyond, visual_tokens=counts)


def test_the_flips_are_said_in_words(paper):
    """1000 GFLOPs / (2 x 7e9) = 71.4 tokens: Q <= 55 beside 16 visual ones, Q <= 35 beside 36."""
    said = planning.choose(paper, 1e12, 50).statements
    assert said[2] == (
        "reasoning: at 50 text tokens the choice is qwen1.5-7b with 16 visual tokens; it flips to qwen1.5-7b with 36 "
        "visual tokens below Q = 36; it flips to qwen1.5-4b with 64 visual tokens above Q = 55."
    )
    cached = planning.choose(paper, 1e12, Workload(200_000, cached=True)).statements
    assert cached[2] == "reasoning: the choice is the same for any number of cached text tokens."


def test_free_sizes_spend_the_budget_and_beat_the_measured_ones(paper):
    free = planning.choose(paper, 6e11, 50, free_sizes=(0.5e9, 7e9))
    fixed = planning.choose(paper, 6e11, 50)
    assert free.best.cost == pytest.approx(600, rel=1e-5) and free.best.error < fixed.best.error
    sizes = [(free.budget.limit * 1e9 / 2 / (50 + v), v) for v in PAPER_COUNTS]
    best = min(sizes, key=lambda s: float(paper.law.error(min(s[0], 7e9), s[1])))
    assert (
        free.best.lm_params == pytest.approx(min(best[0], 7e9), rel=1e-5)
        and free.best.visual_tokens == best[1]
    )
    span = next(s for s in free.by_text_tokens if s.first <= 50 <= s.last)
    for q in (span.first, span.last, span.last + 1):
        now = planning.choose(paper, 6e11, q, free_sizes=(0.5e9, 7e9)).best.visual_tokens
        assert (now == span.visual_tokens) == (q <= span.last)


def test_the_budgets_between_which_the_choice_holds_are_the_frontiers_steps(paper):
    found = planning.choose(paper, 1e12, 50)
    step = found.frontier.index(found.best)
    after = found.frontier[step + 1]
    for gflops, best in (
        (found.best.cost, found.best),
        (after.cost * 0.9999, found.best),
        (after.cost, after),
    ):
        again = planning.choose(paper, Budget("gflops", gflops), 50).best
        assert (again.lm, again.visual_tokens) == (best.lm, best.visual_tokens)
    assert f"the choice holds from 924 GFLOPs to {after.cost:.4g} GFLOPs" in " ".join(
        found.statements
    )


def test_what_does_not_fit_in_the_memory_is_not_chosen(paper):
    chip = find_chip("v5e")
    large = {**paper.lms, "qwen1.5-14b": 14e9}
    found = planning.choose(paper, Budget("ms", 1e4, chip), 50, lms=large)
    assert found.best.lm == "qwen1.5-7b"
    assert not any(
        c.affordable or c in found.frontier for c in found.candidates if c.lm == "qwen1.5-14b"
    )
    assert planning.choose(paper, Budget("gib", 4), 50).best.lm == "qwen1.5-1.8b"
    less = planning.choose(paper, Budget("ms", 1e4, chip, memory_gib=4), 50)
    assert less.best.lm == "qwen1.5-1.8b"
    with pytest.raises(
        ConfigError,
        match=r"nothing fits in 0\.5 GiB; the smallest candidate, qwen1.5-0.5b with 1 v",
    ):
        planning.choose(paper, Budget("ms", 1e4, chip, memory_gib=0.5), 50)


def test_a_plan_says_what_the_encoder_changes_in_both_directions(paper):
    exact = planning.Method("counted exactly", exact_price("clip-l-336", "tokenpacker"))
    by_paper = planning.choose(paper, 1e12, 50, other=exact)
    by_parts = planning.choose(paper, 1e12, 50, method=exact, other=planning.PAPER)
    for one, two in ((by_paper, by_parts), (by_parts, by_paper)):
        said = one.instead[-1]
        assert (said.lm, said.visual_tokens) == (two.best.lm, two.best.visual_tokens)
    assert by_paper.best != by_parts.best
    assert by_parts.best.flops < 1e12 and by_parts.best.error > by_paper.best.error
    line = "if cost were counted exactly, the choice would be qwen1.5-4b with 36 visual tokens."
    assert f"reasoning: {line}" in by_paper.statements
    little = planning.choose(paper, 2e11, 50, other=exact)
    assert "there would be no choice: nothing is affordable" in little.statements[-1]


def test_a_plan_says_what_caching_the_text_changes(paper):
    found, cached = (planning.choose(paper, 1e12, Workload(50, c)) for c in (False, True))
    assert found.instead[0][1:3] == (cached.best.lm, cached.best.visual_tokens)
    assert cached.instead[0][1:3] == (found.best.lm, found.best.visual_tokens)
    assert planning.choose(paper, 1e12, 0).instead == ()


def test_a_size_outside_the_table_is_called_an_extrapolation(fits):
    found = planning.choose(fits["reasoning"], 1e9, 10, lms={"huge": 1e6})
    assert found.best.extrapolated and "extrapolation" in found.statements[-1]


def test_an_interval_ends_at_the_largest_error_there_is_and_says_so(fits, paper):
    """Far below the measured sizes the law's errors pass 1."""
    smallest = min(fits["reasoning"].lms.values())
    near, far = (
        planning.choose(fits["reasoning"], 1e12, 10, lms={"tiny": smallest / by}, visual_tokens=[1])
        for by in (10, 1000)
    )
    assert near.best.error == pytest.approx(0.767, abs=1e-3) and near.best.interval[1] == 1
    cut = (
        "reasoning: the interval is cut off at 1, the largest error there is: the measured cells do not bound the error "
        "there."
    )
    assert cut in near.statements and cut not in far.statements
    assert far.best.error > 1
    assert (
        "reasoning: the law predicts an error above 1 there, which no error can be: do not use it."
        in far.statements
    )
    assert cut not in planning.choose(paper, 1e12, 50).statements


@pytest.mark.parametrize("asking", ["--exact", "--visual-tokens=all"])
def test_what_needs_the_compressor_of_a_table_without_one_names_its_flag(tmp_path, capsys, asking):
    rows = [
        dataclasses.replace(r, compressor="")
        for r in tables.rows()
        if r.compressor == "tokenpacker"
    ]
    path = tmp_path / "errors.csv"
    table.write(path, rows)
    words = [f"--table={path}", "--family=ocr", "--budget-gflops=5", "--text-tokens=10"]
    assert plan.main([*words, asking]) == 2
    flag = asking.replace("=", " ")
    assert capsys.readouterr().err == (
        f"error: plan: {flag} needs to know the compressor, which the law's table does not name; add --compressor=NAME, "
        "one of quecc, tokenpacker, pool, m3, mqt, querypool.\n"
    )
    assert plan.main(words) == 0


@pytest.fixture(scope="module")
def law_json(fits, tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "law.json"
    law.save(path, fits, law.provenance("errors.csv", "test", {}))
    return path


def test_the_command_prints_the_plan_as_json(fits, law_json):
    arguments = [f"--law={law_json}", "--budget-gflops=0.005", "--text-tokens=10", "--json"]
    command = [sys.executable, "-m", "vlm_jax.laws.plan", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    printed = {p["family"]: p for p in json.loads(out)}
    direct = planning.choose(fits["ocr"], 5e6, 10)
    assert printed["ocr"]["best"]["lm"] == direct.best.lm
    assert printed["ocr"]["best"]["error"] == pytest.approx(direct.best.error, rel=1e-6)
    assert printed["ocr"]["budget"]["limit"] == 0.005 and printed["ocr"]["workload"]["batch"] == 1
    assert len(printed["ocr"]["candidates"]) == 12


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal_and_the_picture_is_drawn(
    law_json, tmp_path, capsys, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = [f"--law={law_json}", "--budget-ms=0.001", "--text-tokens=10", "--chip=v5e"]
    arguments += ["--chip-hour-dollars=1", "--output-tokens=4", "--batch=2"]
    assert plan.main([*arguments, f"--plot={tmp_path}/{{family}}.png"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "ocr.png").stat().st_size > 10_000
    assert "…" not in shown and max(map(len, shown.splitlines())) <= columns
    assert "decode" in shown and "bounded by" in shown
    assert ("$ / 1M" in shown) == (columns == 120)


def test_a_table_of_errors_plans_as_its_law_does(fits, tmp_path, capsys):
    path = tmp_path / "errors.csv"
    table.write(path, tables.rows())
    arguments = [f"--table={path}", "--budget-gflops=0.005", "--text-tokens=10", "--family=ocr"]
    assert plan.main([*arguments, "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    direct = planning.choose(fits["ocr"], 5e6, 10)
    assert (printed["best"]["lm"], printed["best"]["visual_tokens"]) == (direct.best.lm, direct.best.visual_tokens)  # fmt: skip
    assert printed["best"]["error"] == pytest.approx(direct.best.error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget-gflops=1e-9"], "1e-09 GFLOPs buy nothing; the cheapest candidate, small with 1 visual token, costs 0.0"),
        (["--budget-gflops=1", "--family=maths"], "'maths' is not in"),
        (["--budget-gflops=1", "--visual-tokens=4,x"], "'4,x' is not"),
        (["--budget-gflops=1", "--visual-tokens=0"], "visual_tokens must be positive, got 0"),
        (["--budget-gflops=1", "--lms=qwen9"], "unknown language model preset 'qwen9'; use one of qwen1.5-0.5b"),
        (["--budget-gflops=1", "--lms=a=b"], "--lms: 'b' is not a number of parameters"),
        (["--budget-gflops=1", "--lms=a=-2"], "an LM's size must be positive, got -2.0"),
        ([], "give one of --budget-gflops, --budget-ms, --budget-dollars, --budget-gib; got none"),
        (["--budget-gflops=1", "--budget-ms=3"], "got --budget-gflops and --budget-ms"),
        (["--budget-gflops=-1"], "the budget in GFLOPs must be positive, got -1.0"),
        (["--budget-gflops=1", "--budget-gib=-1"], "the budget in GiB must be positive, got -1"),
        (["--budget-gflops=1", "--text-tokens=-1"], "text_tokens must be 0 or more, got -1"),
        (["--budget-gflops=1", "--batch=0"], "batch must be 1 or more, got 0"),
        (["--budget-ms=1"], "a budget in ms needs a chip; use one of v4, v5e"),
        (["--budget-ms=1", "--chip=H300"], "chip 'H300' is not one of ['A100', 'H100'"),
        (["--budget-dollars=1", "--chip=v4"], "needs chip_hour_dollars"),
        (["--budget-gflops=1", "--free-sizes=9,3"], "from the smaller to the larger, not 9 to 3"),
        (["--budget-gflops=1", "--free-sizes", "--exact"], "goes with neither --lms nor --exact"),
        (["--budget-gflops=inf"], "the budget in GFLOPs must be finite, got inf"),
        (["--budget-gflops=nan"], "the budget in GFLOPs must be positive, got nan"),
        (["--budget-gflops=0"], "the budget in GFLOPs must be positive, got 0.0"),
        (["--budget-gflops=1", "--budget-gib=inf"], "the budget in GiB must be finite, got inf"),
        (["--budget-dollars=1", "--chip=v4", "--chip-hour-dollars=inf"], "chip_hour_dollars must be finite, got inf"),
        (["--budget-gflops=1", "--lms=a=inf"], "an LM's size must be finite, got inf"),
        (["--budget-gflops=1", "--free-sizes=1e9,inf"], "an LM's size must be finite, got inf"),
        (["--budget-gflops=1", "--exact"], "unknown language model preset 'small'"),
        (["--budget-gflops=1", "--exact", "--lms=mini-38k", "--visual-tokens=5"], "visual_tokens 5 cannot be cut from a 24x24 grid"),
        (["--budget-gflops=1", "--visual-tokens=all", "--compressor=prumerge"], "prumerge: its visual tokens cannot be chosen"),
        (["--budget-gflops=1", "--free-sizes", "--plot=x.png"], "--plot draws given sizes"),
        (["--budget-gflops=1", "--table=x.csv"], "give --law law.json or --table errors.csv, one of them"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(law_json, capsys, arguments, words):
    assert plan.main([f"--law={law_json}", "--text-tokens=10", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and not said.out
    assert len(said.err.strip().splitlines()) == 1
