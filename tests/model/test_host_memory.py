from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, resource, sys, torch
from tinyllama import host_memory

if sys.argv[1] == "keep":
    host_memory.keep()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(64 << 20, dtype=torch.uint8)  # above every threshold of glibc's
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mib():
    return int(re.search(r"Rss: +(\\d+)", open("/proc/self/smaps_rollup").read())[1]) // 1024

faults()
again, full = faults(), resident_mib()
host_memory.trim()
print(again, full - resident_mib())
"""
USUAL = {name: value for name, value in os.environ.items() if not re.match("MALLOC_|GLIBC_TUNABLES|LD_PRELOAD", name)}


def measured(mode: str, **environment: str) -> tuple[int, int]:
    """Page faults of buffers taken and freed anew, and MiB that `trim` gives back."""
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**USUAL, **environment})
    faults, given_back = done.stdout.split()
    return int(faults), int(given_back)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64" or not Path("/proc/self/smaps_rollup").exists(),
    reason="torch allocates by glibc on Linux on x86-64",
)
def test_kept_memory_is_taken_again_without_page_faults_and_can_be_given_back():
    faults, given_back = measured("keep")
    without_faults, without_given_back = measured("leave")
    assert faults < without_faults / 20, (faults, without_faults)
    assert given_back >= 60
    assert abs(without_given_back) < 8  # `trim` leaves a process alone that never asked to keep
    told_faults, _ = measured("keep", MALLOC_MMAP_THRESHOLD_="1048576")
    assert told_faults > without_faults / 2  # the environment's word counts
