"""What a process does with memory that it has freed."""

import subprocess
import sys

import pytest

from pipeline import allocator

_PROGRAM = """
import resource
from pipeline.allocator import keep_freed_memory
keep_freed_memory()
bytearray(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again() -> None:
    """64 MiB are 16,384 pages; without it each of ten blocks would fault them in once more (Linux, glibc)."""
    answer = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert int(answer.stdout) < 1_000


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_a_person_sets_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    opened: list[object] = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", opened.append)
    monkeypatch.setenv(name, "1")
    allocator.keep_freed_memory()
    assert not opened
