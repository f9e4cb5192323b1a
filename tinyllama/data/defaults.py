"""Defaults of a preparation, for the command line and the library alike. Imports nothing, so that `--help` is fast."""

from __future__ import annotations

SHARD_TOKENS = 1 << 30  # 2 GiB of uint16
MAX_DOCUMENT_BYTES = 16 << 20  # bounds a worker's memory
VALIDATION_FRACTION = 0.01
SEED = 1337  # of the choice of held-out documents
TASKS = 256  # into which a cluster's work is divided
TASK_TIME = "24:00:00"  # Slurm's limit for one
TASK_MEMORY_GB = 2
