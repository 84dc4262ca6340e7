"""The miniature with more sizes and three seeds: a night on a laptop, or an hour on a GPU.

The cells of configs/mini.py are among its cells: with the workdir of a finished miniature it trains the others only.
"""

from configs import mini


def get_config():
    c = mini.get_config()
    c.sweep.seeds = (0, 1, 2)
    c.sweep.lms = (
        "mini-21k", "mini-45k", "mini-62k", "mini-82k", "mini-131k", "mini-181k", "mini-254k", "mini-500k",
    )  # fmt: skip
    return c
