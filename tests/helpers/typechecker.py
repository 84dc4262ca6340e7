"""beartype as PEP 484 has it: an int is welcome where a float is asked for. conftest.py hooks it into vlm_jax."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
