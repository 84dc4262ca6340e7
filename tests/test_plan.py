"""The plan: the best affordable pair, how firmly it is chosen, and what it says in words."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tables

from vlm_jax.config import ConfigError
from vlm_jax.laws import fit, law, plan


@pytest.fixture(scope="module")
def fits():
    return fit.fit_table(tables.rows(), draws=200)


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
@pytest.mark.parametrize("text_tokens", [0, 12, 200])
@pytest.mark.parametrize("budget", [1e6, 5e6, 2e7, 1e9])
def test_the_choice_is_that_of_brute_force(fits, family, text_tokens, budget):
    pairs = [(lm, params, v) for lm, params in tables.SIZES.items() for v in tables.TOKENS]
    affordable = [p for p in pairs if 2 * p[1] * (text_tokens + p[2]) <= budget]
    if not affordable:
        with pytest.raises(ConfigError, match="buy nothing; the cheapest candidate"):
            plan.choose(fits[family], budget, text_tokens)
        return
    found = plan.choose(fits[family], budget, text_tokens)
    best = min(affordable, key=lambda p: float(fits[family].law.error(p[1], p[2])))
    assert (found.best.lm, found.best.visual_tokens) == (best[0], best[2])
    assert found.best.flops == 2 * best[1] * (text_tokens + best[2])
    shares = [c.share for c in found.candidates]
    assert sum(shares) == pytest.approx(1)
    assert all(c.share == 0 for c in found.candidates if c.flops > budget)


def test_nothing_on_the_frontier_is_beaten_and_all_else_is(fits):
    found = plan.choose(fits["reasoning"], 1e9, 10)
    for c in found.candidates:
        beaten = any(o.flops <= c.flops and o.error < c.error for o in found.candidates)
        assert beaten != (c in found.frontier)


def test_the_closed_form_is_the_minimum_over_a_fine_grid():
    alpha, beta, text = 0.077, 0.015, 50
    v = np.linspace(0.5, 100, 20_000)
    error = (1 / (text + v)) ** -alpha * v**-beta  # N = C / (Q + V)
    assert plan.optimal_visual_tokens(alpha, beta, text) == pytest.approx(
        v[error.argmin()], abs=0.02
    )
    assert plan.optimal_visual_tokens(alpha, beta, text) == pytest.approx(12.1, abs=0.05)
    assert plan.optimal_visual_tokens(0.03, 0.05, 50) == math.inf
    assert plan.optimal_visual_tokens(0.3, -0.01, 50) == 0


def test_a_size_outside_the_table_is_called_an_extrapolation(fits):
    found = plan.choose(fits["reasoning"], 1e9, 10, lms={"huge": 1e6})
    assert found.best.extrapolated and "extrapolation" in found.statements[-1]


def test_the_command_prints_the_plan_as_json_and_draws_it(fits, tmp_path):
    path = tmp_path / "law.json"
    law.save(path, fits, law.provenance("errors.csv", "test", {}))
    command = [
        sys.executable,
        "-m",
        "vlm_jax.laws.plan",
        f"--law={path}",
        "--budget-gflops=0.005",
        "--text-tokens=10",
    ]
    out = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    printed = {p["family"]: p for p in json.loads(out)}
    direct = plan.choose(fits["ocr"], 5e6, 10)
    assert printed["ocr"]["best"]["lm"] == direct.best.lm
    assert printed["ocr"]["best"]["error"] == pytest.approx(direct.best.error, rel=1e-6)
    picture = tmp_path / "{family}.png"
    shown = subprocess.run(
        [*command, f"--plot={picture}"], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "ocr.png").stat().st_size > 10_000
    assert "…" not in shown.stdout  # the table fits 80 columns


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget-gflops=1e-9", "--text-tokens=10"], "buy nothing"),
        (["--budget-gflops=1", "--text-tokens=10", "--family=maths"], "'maths' is not in"),
        (["--budget-gflops=1", "--text-tokens=10", "--visual-tokens=4,x"], "'4,x' is not"),
        (["--budget-gflops=1", "--text-tokens=10", "--lms=qwen9"], "qwen9"),
        (["--text-tokens=10"], "budget-gflops"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(fits, tmp_path, arguments, words):
    path = tmp_path / "law.json"
    law.save(path, fits, law.provenance("errors.csv", "test", {}))
    command = [sys.executable, "-m", "vlm_jax.laws.plan", f"--law={path}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
