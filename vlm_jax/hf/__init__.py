"""Hugging Face model directories, in and out.

directory.py   what lies on disk: config.json and the tensors of its safetensors files, by header; nothing is unpickled
settings.py    config.json (and preprocessor_config.json) -> our frozen configs; refuses what we do not compute
naming.py      the names a tensor may have in different files -> the part of the model it belongs to, and one name there
maps.py        one table per part: Hugging Face tensor, our parameter, the layout between them
io.py          tensors -> sharded parameters, streamed, strict both ways; parameters -> tensors
export.py      a whole directory that transformers loads; the reference layout of compressor and projector
"""
