"""The miniature's middle size with every compressor, for scripts/compare_compressors.py."""

import ml_collections

from configs import mini


def get_config():
    c = mini.get_config()
    with c.unlocked():
        c.compare = ml_collections.ConfigDict()
        c.compare.query_grid = 8  # as many MQT queries as patches
        c.compare.neighbours = 8  # of 64 patches; PruMerge takes 32 of 576
        # Per compressor its numbers of visual tokens; M3, MQT and querypool train once for all of theirs.
        c.compare.visual_tokens = ml_collections.ConfigDict(
            {
                "identity": (64,), "pool": (1, 4, 16), "tokenpacker": (1, 4, 16), "quecc": (1, 4, 16),
                "m3": (1, 4, 16, 64), "mqt": (1, 4, 16, 64), "querypool": (1, 4, 16, 64), "prumerge": (4, 16), "prumerge_plus": (5, 17),
            }
        )  # fmt: skip
    c.model.compressor.unlock()  # as in default.py
    return c
