#!/usr/bin/env python3
"""A language model in a GGUF file (llama.cpp) as an ordinary Hugging Face directory, without the gguf package.

scripts/demo/gguf_to_hf.py FILE.gguf DIR

Reads what Llama-shaped models with a byte-level tokenizer need: F32, Q4_1 and Q8_0 tensors. Needs torch (the extra [test]).
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
TEXT, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32  # values that share a scale
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class Reader:
    """The bytes of a file, read from front to back."""

    def __init__(self, path: Path):
        self.bytes = np.fromfile(path, np.uint8)
        self.at = 4  # behind "GGUF"
        assert self.bytes[:4].tobytes() == b"GGUF"

    def number(self, code: str):
        (value,) = struct.unpack_from(code, self.bytes, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.number("<Q")
        self.at += length
        return self.bytes[self.at - length : self.at].tobytes().decode("utf-8")

    def value(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        return [self.value(inner) for _ in range(count)]


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(the file's settings, its tensors in float32, rows first)."""
    file = Reader(path)
    assert file.number("<I") == 3
    count, fields = file.number("<Q"), file.number("<Q")
    settings = {file.text(): file.value(file.number("<I")) for _ in range(fields)}
    found = []
    for _ in range(count):
        name, dimensions = file.text(), file.number("<I")
        shape = [file.number("<Q") for _ in range(dimensions)][::-1]
        found.append((name, shape, file.number("<I"), file.number("<Q")))
    start = -(-file.at // 32) * 32  # tensors begin at a multiple of 32 bytes
    return settings, {
        name: values(file.bytes[start + at :], kind, int(np.prod(shape))).reshape(shape)
        for name, shape, kind, at in found
    }


def values(raw: np.ndarray, kind: int, count: int) -> np.ndarray:
    if kind == F32:
        return raw[: 4 * count].view(np.float32)
    size = {Q4_1: 2 + 2 + BLOCK // 2, Q8_0: 2 + BLOCK}[kind]
    blocks = raw[: count // BLOCK * size].reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return scale * blocks[:, 2:].copy().view(np.int8)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + least


def convert(path: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer and chat template with transformers."""
    said, tensors = read(path)
    own = {key.removeprefix("llama."): value for key, value in said.items()}
    config = LlamaConfig(
        vocab_size=own["vocab_size"], hidden_size=own["embedding_length"], num_hidden_layers=own["block_count"],
        intermediate_size=own["feed_forward_length"], num_attention_heads=own["attention.head_count"],
        num_key_value_heads=own["attention.head_count_kv"], rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": own["rope.freq_base"]}, tie_word_embeddings=True,
        max_position_embeddings=own["context_length"], bos_token_id=said["tokenizer.ggml.bos_token_id"],
        eos_token_id=said["tokenizer.ggml.eos_token_id"], _model_name_or_path=said["general.name"],
    )  # fmt: skip
    state = {}
    for name, tensor in tensors.items():
        state[renamed(name)] = torch.tensor(rows_apart(name, tensor, config))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.save_pretrained(folder)
    tokenizer(said).save_pretrained(folder)


def renamed(name: str) -> str:
    kind, *layer, tensor, weight = name.split(".") if name.startswith("blk.") else ("", name, "")
    if not kind:
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]  # fmt: skip
    return f"model.layers.{layer[0]}.{LAYER[tensor]}.{weight}"


def rows_apart(name: str, tensor: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Queries and keys: llama.cpp rotates neighbouring rows of a head, transformers its two halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if f".{part}." in name), 0)
    if not count:
        return tensor
    rows = tensor.reshape(count, len(tensor) // count // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def tokenizer(said: dict) -> PreTrainedTokenizerFast:
    field = {key.removeprefix("tokenizer.ggml."): value for key, value in said.items()}
    merges = [tuple(merge.split(" ")) for merge in field["merges"]]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(field["tokens"])}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    marks = [t for t, kind in zip(field["tokens"], field["token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marks])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    known = {name: field["tokens"][field[f"{key}_token_id"]] for name, key in names.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **known)
    made.chat_template = said["tokenizer.chat_template"]
    return made


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: scripts/demo/gguf_to_hf.py FILE.gguf DIR")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
