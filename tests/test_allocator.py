"""Freed memory stays with the process, where glibc can be told so."""

import os
import platform
import subprocess
import sys

import pytest

from pack_ptq import allocator

PAGES_OF_A_LOOP = """
import resource, sys, torch
from pack_ptq.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.zeros(2**24).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Count the faults of 20 tensors of 64 MiB, one after the other, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    command = [sys.executable, "-c", PAGES_OF_A_LOOP, how]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_touched_first_only_once() -> None:
    assert page_faults("kept") < 0.2 * page_faults("given back")


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocator.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
