"""Freed memory stays with the process, where glibc can be told so."""

import os
import platform
import subprocess
import sys

import pytest

from pack_ptq import allocator

FAULTS_BEFORE_AND_AFTER = """
import resource, torch
from pack_ptq.allocator import keep_freed_memory

def faults():
    torch.zeros(2**24).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_of_a_tensor_serve_the_next_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    environment["GLIBC_TUNABLES"] = "glibc.rtld.optional_static_tls=512"  # nothing that concerns memory of tensors
    command = [sys.executable, "-c", FAULTS_BEFORE_AND_AFTER]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    given_back, kept = map(int, output.split())
    assert kept < 0.2 * given_back


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.rtld.nns=4:glibc.malloc.arena_max=1")],
)
def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not allocator.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
