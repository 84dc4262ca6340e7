"""The miniature with tiny settings: every part runs, nothing is learned. A plumbing test, not a result."""

from configs import mini


def get_config():
    c = mini.get_config()
    c.sweep.lms = ("mini-45k", "mini-82k")
    c.sweep.visual_tokens = (1, 16)
    c.sweep.train_images = 160
    c.sweep.test_images = 80
    c.sweep.encoder_images = 80
    c.sweep.text_records = 64
    c.sweep.max_reruns = 0
    c.sweep.failed_above = 1.01
    for stage in ("encoder", "text", "vlm", "query_aware_vlm"):
        c.sweep[stage].steps = 3
        c.sweep[stage].batch_size = 8
    return c
