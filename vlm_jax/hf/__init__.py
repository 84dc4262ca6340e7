"""Hugging Face model directories, in and out.

directory.py   what lies on disk: config.json and the tensors of its safetensors files, by header; nothing is unpickled
fields.py      the fields of config.json: which change what is computed, as transformers' classes declare them
pixels.py      the image processor's settings, in every form that transformers writes
settings.py    config.json -> our frozen configs of a decoder or an encoder
reference.py   the same for the original LLaVA layout, in which the compressors are released
describe.py    a whole directory -> the settings of each part; whether they agree with a model of ours
pickled.py     pickled weights -> safetensors, with torch
written.py     our frozen configs -> config.json and its companions
naming.py      the names a tensor may have in different files -> the part of the model it belongs to, and one name there
maps.py        one table per part: Hugging Face tensor, our parameter, the layout between them
io.py          tensors -> sharded parameters, streamed, strict both ways; parameters -> tensors
parts.py       which rules read which parts of a directory
export.py      a whole directory that transformers loads; the reference layout of compressor and projector
"""
