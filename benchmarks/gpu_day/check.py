"""The verdict on a day that ran without a GPU: python -m gpu_day.check OUT. Exit code 1 where a stage fell short."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpu_day import plan, rows
from gpu_day.conduct import ROWS

MAX_FILES, MAX_FILE_BYTES = 8, 16 * 2**20


def faults(found: list[dict[str, Any]], stages: set[int]) -> list[str]:
    """What is wrong with the rows of a day: failed, skipped for another reason than the missing GPU, or missing."""
    wrong = []
    for entry in rows.finished(found):
        if entry["status"] == rows.FAILED or (entry["status"] == rows.SKIPPED and "GPU" not in entry.get("reason", "")):
            wrong.append(f"stage {entry['stage']}: {rows.line_of(entry)}\n{entry.get('error', '')}")
    for stage in plan.STAGES:
        for part in stage.parts:
            ended = [e for e in rows.finished(found) if (e["stage"], e["part"]) == (stage.number, part.name)]
            if stage.number in stages and not ended:
                wrong.append(f"stage {stage.number}: {part.name} left no row")
            wrong += [
                f"stage {stage.number}: {name} began and did not end"
                for name in rows.unfinished(found, stage.number, part.name)
            ]
    return wrong


def check_files(out: Path) -> list[str]:
    """Few and small files, none deeper: they must come back from the machine."""
    files = [path for path in out.rglob("*") if path.is_file()]
    wrong = [f"{path} has {path.stat().st_size:,} bytes" for path in files if path.stat().st_size > MAX_FILE_BYTES]
    wrong += [f"{path} is too deep" for path in files if path.parent != out]
    return wrong + ([f"{len(files)} files"] if len(files) > MAX_FILES else [])


def main() -> int:
    out = Path(sys.argv[1])
    found = rows.read(out / ROWS)
    stages = {int(number) for number in sys.argv[2:]} or {stage.number for stage in plan.STAGES}
    wrong = faults(found, stages) + check_files(out)
    print("\n".join(wrong) if wrong else f"all stages ran: {len(rows.finished(found))} rows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
