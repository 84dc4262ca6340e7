"""The one door to paths: local ones, gs:// and s3://. Text becomes a path by `to_path`; see docs/buckets.md.

paths reads and writes whole files, lines are files that grow, lease keeps two runs out of one workdir.
"""

from vlm_jax.files.buckets import BucketPath
from vlm_jax.files.lease import Locked, lock
from vlm_jax.files.lines import Lines, read_grown
from vlm_jax.files.paths import (
    ImageSource,
    Path,
    can_hold,
    check_room,
    check_writable,
    copy,
    is_dir,
    is_file,
    local_copy,
    local_file,
    parse_json,
    read_bytes,
    read_json,
    read_span,
    read_text,
    reading,
    reason,
    shown,
    stamp,
    to_path,
    upload,
    whole_file,
    whole_folder,
    write_whole,
    writing,
)

__all__ = [
    "BucketPath", "ImageSource", "Lines", "Locked", "Path", "can_hold", "check_room", "check_writable", "copy", "is_dir", "is_file", "local_copy", "local_file", "lock",
    "parse_json", "read_bytes", "read_grown", "read_json", "read_span", "read_text", "reading", "reason", "shown", "stamp", "to_path",
    "upload", "whole_file", "whole_folder", "write_whole", "writing",
]  # fmt: skip
