"""The miniature's middle size with every compressor at equal steps: compressor x visual tokens x family error.

    python -m vlm_jax.sweep --config=configs/mini_compressors.py --workdir=runs/mini

A finished miniature's workdir lends its world, encoder, text-trained decoder and the cells that are the same. M3, MQT and
querypool train once for all their counts.
"""

from configs import mini

# Per compressor its numbers of visual tokens.
VISUAL_TOKENS = {
    "identity": (64,), "pool": (1, 4, 16), "tokenpacker": (1, 4, 16), "quecc": (1, 4, 16), "quecc_published": (1, 4, 16),
    "m3": (1, 4, 16, 64), "mqt": (1, 4, 16, 64), "mqt_image": (1, 4, 16, 64), "querypool_short": (1, 4, 16, 64),
    "prumerge": (4, 16), "prumerge_plus": (5, 17),
}  # fmt: skip


def get_config():
    c = mini.get_config()
    s = c.sweep
    s.title = "The miniature with every compressor"
    s.lms = ("mini-82k",)
    s.compressors = tuple(VISUAL_TOKENS)
    with s.unlocked():
        s.visual_tokens_of.update(VISUAL_TOKENS)
        s.compressor_settings.quecc_published = {"name": "quecc"}
        # Half of the steps that mini_elastic.py gives it.
        s.compressor_settings.querypool_short = {"name": "querypool"}
        s.compressor_settings.mqt = {"query_grid": 8}  # as many queries as patches
        s.compressor_settings.mqt_image = {"name": "mqt", "query_grid": 8, "key_source": "image"}
        # 8 of 64 patches are merged into each kept one; the release takes 32 of 576.
        s.compressor_settings.prumerge = s.compressor_settings.prumerge_plus = {"neighbours": 8}
    s.beside, s.looks = (), ()
    s.max_reruns = 0
    c.model.compressor.unlock()  # as in default.py
    return c
