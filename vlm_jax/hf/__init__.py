"""Hugging Face model directories, in and out.

directory.py   the files on disk: config.json, the headers of safetensors files, and the part and name of each tensor
pixels.py      the image processor's settings, in every form that transformers writes
settings.py    config.json -> our frozen configs of a decoder or an encoder; which of its fields matter, which are ignored
reference.py   the same for the original LLaVA layout, in which the compressors are released
describe.py    a whole directory -> the settings of each part; whether they agree with a model of ours
named.py       a `preset` of a config, by name or by directory -> our frozen configs
pickled.py     pickled weights -> safetensors, with torch
written.py     our frozen configs -> config.json and its companions
maps.py        one table per part: Hugging Face tensor, our parameter, the layout between them
io.py          tensors -> sharded parameters, streamed, strict both ways; parameters -> tensors
parts.py       which rules read which parts of a directory
export.py      a whole directory that transformers loads; the reference layout of compressor and projector
"""
