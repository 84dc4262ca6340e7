"""Stage 2, instruction tuning: all but the encoder learns (LLaVA-1.5: 665k samples, lr 2e-5, batch 128).

Set init.from to the workdir of stage 1: model, tokenizer and template are then that run's.
"""

from configs import default


def get_config():
    c = default.get_config()
    c.optim.trainable = "^(compressor|projector|lm)/"
    c.optim.learning_rate = 2e-5
    c.data.batch_size = 128
    # Parameters and optimiser state are split over all devices; where there are more devices than rows, the rest split heads.
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 0
    c.data.image_mode = "pad"
    return c
