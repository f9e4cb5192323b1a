#!/usr/bin/env bash
# Everything worth knowing of a GPU machine, in one command of 500 seconds there. For machines without a network.
#
#   benchmarks/gpu_day.sh pack               where there is a network: gather into .gpu/ what the machine lacks
#   benchmarks/gpu_day.sh run [--stage N]    on the GPU machine, from the same tree with .gpu/ in it
#
# run: OUT is the folder that rows.jsonl and log.txt are written to (default benchmarks/results/gpu-day), WORK that of
# wheels, caches and checkpoints (default /tmp/tinyllama-gpu-day, 40 GB), SHAPE=tiny takes shapes that a CPU can compute.
# PYTHON: an interpreter; for pack this project's (default .venv/bin/python), for run one that has PyTorch (default
# python3). docs/gpu.md has the stages; benchmarks/gpu_report.py makes tables of what came back.
set -euo pipefail
cd "$(dirname "$0")/.."
verb=${1:-help}
[ $# -eq 0 ] || shift

case $verb in
pack)
    PYTHONPATH=$PWD:$PWD/benchmarks exec "${PYTHON:-.venv/bin/python}" -m gpu_day.pack "$@"
    ;;
run)
    tiny=()
    [ "${SHAPE:-full}" != tiny ] || tiny=(--tiny)
    PYTHONPATH=$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m gpu_day.conduct \
        --out "${OUT:-benchmarks/results/gpu-day}" --work "${WORK:-${TMPDIR:-/tmp}/tinyllama-gpu-day}" "${tiny[@]}" "$@"
    ;;
*)
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    [ "$verb" = help ] || exit 2
    ;;
esac
