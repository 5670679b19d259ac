"""Freed memory stays with the process where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

SIZE = 80_000_000  # bytes; beyond 32 MiB glibc maps and unmaps a tensor anew each time

# In a process of its own: where a heap has met other mappings, large tensors are mapped after all.
CODE = f"""
import resource, torch
from fedsys.allocator import keep_freed_memory

assert keep_freed_memory()
for _ in range(10):  # until what it needs is there
    torch.ones({SIZE} // 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones({SIZE} // 4)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_that_was_freed_is_used_again():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < SIZE  # ten times as many, had they been given back
