import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from tinyllama import host_memory

if sys.argv[1] == "keep":
    host_memory.keep()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(64 << 20, dtype=torch.uint8)  # above every threshold of glibc's
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

faults()
again, full = faults(), resident_mib()
host_memory.trim()
print(again, full - resident_mib())
"""


def measured(mode: str) -> tuple[int, int]:
    """Page faults of buffers taken and freed anew, and MiB that `trim` gives back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    faults, given_back = done.stdout.split()
    return int(faults), int(given_back)


def test_kept_memory_is_taken_again_without_page_faults_and_can_be_given_back():
    faults, given_back = measured("keep")
    without_faults, without_given_back = measured("leave")
    assert faults < without_faults / 20, (faults, without_faults)
    assert given_back >= 60
    assert without_given_back == 0  # `trim` leaves a process alone that never asked to keep
