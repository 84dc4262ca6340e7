"""The miniature with tiny settings: every part runs, nothing is learned. A plumbing test, not a result."""

from configs import mini


def get_config():
    c = mini.get_config()
    c.sweep.lms = ("mini-45k", "mini-82k")
    c.sweep.visual_tokens = (1, 16)
    c.sweep.prepare_settings.num_train_images = 160
    c.sweep.prepare_settings.num_test_images = 80
    c.sweep.prepare_settings.num_encoder_images = 80
    c.sweep.prepare_settings.num_text_records = 64
    c.sweep.max_reruns = 0
    c.sweep.failed_above = 1.01
    for stage in c.sweep.stages.values():
        stage.steps = 3
        stage.batch_size = 8
    return c
