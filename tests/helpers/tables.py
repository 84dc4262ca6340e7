"""Made-up tables of errors for the tests of plan, figures and report."""

from vlm_jax.laws.law import Law
from vlm_jax.laws.table import Row

SIZES = {"small": 40e3, "middle": 80e3, "large": 240e3}
TOKENS = (1, 4, 16, 64)
LAWS = {"reasoning": Law(0.01, 0.35, 0.01, 0.0), "ocr": Law(0.6, 0.0, 0.5, 0.0)}


def rows(seeds=(0, 1, 2)) -> list[Row]:
    """Two families, three sizes, four token counts; seeds differ by one per cent; one QueCC cell; one flagged run."""
    found = []
    for family, law in LAWS.items():
        for lm, params in SIZES.items():
            for v in TOKENS:
                for seed in seeds:
                    error = float(law.error(params, v)) * (1 + 0.01 * (seed - 1))
                    found.append(
                        Row(
                            params,
                            v,
                            error,
                            f"mini_{family}",
                            family,
                            lm,
                            "tokenpacker",
                            3200,
                            seed,
                        )
                    )
        found.append(Row(80e3, 1, 0.123, f"mini_{family}", family, "middle", "quecc", 3200, 0))
    found.append(
        Row(
            80e3,
            16,
            0.951,
            "mini_ocr",
            "ocr",
            "middle",
            "tokenpacker",
            3200,
            9,
            flag="chance level",
        )
    )
    found.append(
        Row(80e3, 16, 0.4, "mini_reasoning", "reasoning", "middle", "tokenpacker", 3200, 9)
    )
    return found
