"""Tiny random Hugging Face directories, written by transformers itself: one builder per architecture and trait."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT = dict(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8,
)  # fmt: skip
PATCHES = 9
IMAGE_TOKEN = 5
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip


def text(cls: str, model: str = "", **fields):
    config = getattr(transformers, f"{cls}Config")(**TEXT | fields)
    return getattr(transformers, model or f"{cls}ForCausalLM")(config)


def vision(cls: str, **fields):
    config = getattr(transformers, f"{cls}VisionConfig")(**VISION | fields)
    return getattr(transformers, f"{cls}VisionModel")(config)


def pair(cls: str):
    """An image and a text tower together."""
    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, eos_token_id=2, bos_token_id=1, pad_token_id=0)  # fmt: skip
    config = getattr(transformers, f"{cls}Config")(vision_config=VISION, text_config=tower)
    return getattr(transformers, f"{cls}Model")(config)


def llava(vision_cls: str = "CLIP", text_cls: str = "Llama", layer: int = -2, **fields):
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, f"{vision_cls}VisionConfig")(**VISION),
        text_config=getattr(transformers, f"{text_cls}Config")(**TEXT | fields),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=layer, image_seq_length=PATCHES,
        vision_feature_select_strategy="default" if vision_cls == "CLIP" else "full",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


# name -> (model, options of save_pretrained)
MODELS: dict[str, tuple[Callable, dict]] = {
    "llama, grouped queries": (lambda: text("Llama"), {}),
    "llama, one head per key": (lambda: text("Llama", num_key_value_heads=4), {}),
    "llama, tied, odd vocabulary": (lambda: text("Llama", tie_word_embeddings=True, vocab_size=61), {}),
    "llama, linear rope scaling": (
        lambda: text("Llama", rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)), {}
    ),
    "llama 3 rope scaling": (lambda: text("Llama", rope_parameters=LLAMA3), {}),
    "llama, wide heads, all biases": (lambda: text("Llama", head_dim=12, attention_bias=True, mlp_bias=True), {}),
    "llama, many shards": (lambda: text("Llama"), dict(max_shard_size="8KB")),
    "mistral, sliding window": (lambda: text("Mistral", sliding_window=5), {}),
    "mistral, no window": (lambda: text("Mistral", sliding_window=None), {}),
    "qwen2, biases": (lambda: text("Qwen2"), {}),
    "qwen2, tied, bf16 file": (lambda: text("Qwen2", tie_word_embeddings=True).bfloat16(), {}),
    "qwen3, normed heads": (lambda: text("Qwen3", head_dim=10), {}),
    "qwen3, attention biases": (lambda: text("Qwen3", head_dim=10, attention_bias=True), {}),
    "phi3, fused weights": (lambda: text("Phi3"), {}),
    "phi3, sliding window": (lambda: text("Phi3", sliding_window=7), {}),
    "clip tower": (lambda: vision("CLIP"), {}),
    "siglip tower": (lambda: vision("Siglip"), {}),
    "siglip 2 tower": (
        lambda: transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**{k: v for k, v in VISION.items() if k != "image_size"}, num_patches=PATCHES)
        ), {},
    ),
    "clip pair": (lambda: pair("CLIP"), {}),
    "siglip pair": (lambda: pair("Siglip"), {}),
    "llava 1.5": (lambda: llava(), {}),
    "llava, last layer, grouped": (lambda: llava(layer=-1), {}),
    "llava, siglip and qwen2, tied": (lambda: llava("Siglip", "Qwen2", layer=-1, tie_word_embeddings=True), {}),
    "llava, counted from the front": (lambda: llava(layer=2), dict(max_shard_size="16KB")),
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Writes the model `name`, with every parameter away from its initial value, and returns the folder."""
    make, options = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return folder


def as_on_the_hub(folder: Path) -> Path:
    """Renames a saved tower's tensors and rewrites its settings as older transformers did."""
    tensors = load_file(folder / "model.safetensors")
    save_file({f"vision_model.{k}": v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
