"""A command restarts itself once with glibc's huge pages; a program that imports the package is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.settings import huge_pages

ROOT = Path(__file__).resolve().parents[2]
ON_REQUEST = huge_pages.KERNEL.is_file() and "[madvise]" in huge_pages.KERNEL.read_text()


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Stands for the kernel's file, and what a restart would be called with."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, words: calls.append((program, words)))
    monkeypatch.setattr(huge_pages, "KERNEL", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return tmp_path / "enabled", calls


@pytest.mark.parametrize(
    ("says", "given", "then"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        ("", None, None),
    ],
)  # fmt: skip
def test_a_restart_keeps_the_arguments_and_what_glibc_was_told(
    kernel, monkeypatch, says, given, then
):
    file, calls = kernel
    if says:
        file.write_text(says)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    huge_pages.restart()
    assert calls == ([(sys.executable, [sys.executable, *sys.orig_argv[1:]])] if then else [])
    assert os.environ.get("GLIBC_TUNABLES") == (then or given)


def test_a_program_that_only_imports_the_package_is_not_restarted(kernel):
    file, calls = kernel
    file.write_text("always [madvise] never")
    huge_pages.use()
    assert not calls and "GLIBC_TUNABLES" not in os.environ


@pytest.mark.skipif(not ON_REQUEST, reason="this kernel gives no huge pages on request")
def test_a_real_command_says_the_same_after_its_restart(tmp_path):
    words = ["-m", "vlm_jax.train", "--config=configs/stage1.py", f"--workdir={tmp_path}", "--config.data.annotations=('no.json',)"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    said = [
        subprocess.run([sys.executable, *words], cwd=ROOT, env=environment | more, capture_output=True, text=True)
        for more in ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    ]  # fmt: skip
    assert said[0].returncode == said[1].returncode == 2
    assert said[0].stderr == said[1].stderr != ""
