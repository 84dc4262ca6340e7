"""Stage 1, alignment: only compressor and projector learn, on captions (LLaVA-1.5: 558k pairs, lr 1e-3, batch 256).

The conversation template is kept (not the bare-caption one), so that a query-aware compressor has a question to look at.
"""

from configs import default


def get_config():
    c = default.get_config()
    c.optim.trainable = "^(compressor|projector)/"
    c.optim.learning_rate = 1e-3
    c.data.batch_size = 256
    # Parameters and optimiser state are split over all devices; where there are more devices than rows, the rest split heads.
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 0
    c.data.image_mode = "crop"
    return c
