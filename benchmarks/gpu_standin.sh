#!/usr/bin/env bash
# The bare GPU machine without its GPU: Python 3.12 and PyPI's torch with CUDA inside, but neither DeepSpeed nor lm-eval
# nor a network. Packs the GPU day and runs every stage of it there, on tiny shapes on the CPU, from a clean copy of the
# tree. Fails if a stage failed, or was skipped for another reason than that it needs a GPU.
#
#   benchmarks/gpu_standin.sh DIR [--env ENV] [--stage N] [--only-environment]
#
# DIR: where the environment is made (or used again, if it is complete) and the results are left: about 7 GB.
# ENV: an environment that is like it already. PYTHON312: the Python 3.12 that makes one (default python3.12).
# PYTHON: this project's environment, which packs (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
[ $# -ge 1 ] || { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2; }
mkdir -p "$1"
home=$(cd "$1" && pwd)
shift
environment=$home/env
stages=()
numbers=()
only_environment=
while [ $# -gt 0 ]; do
    case $1 in
    --env) environment=$2; shift 2 ;;
    --stage) stages+=(--stage "$2"); numbers+=("$2"); shift 2 ;;
    --only-environment) only_environment=1; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
    esac
done

# What is there, and what is not.
packages=(torch==2.11.0 transformers==5.17.0 numpy safetensors sentencepiece einops ninja msgpack psutil rich typer pyarrow)
packages+=(pytest pytest-timeout hypothesis protobuf setuptools wheel)
absent=(deepspeed lm_eval vllm flash_attn liger_kernel datatrove orjson pydantic hjson torchao)

if [ "$environment" = "$home/env" ] && [ ! -e "$environment/complete" ]; then
    rm -rf "$environment"
    "${PYTHON312:-python3.12}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "${packages[@]}"
    # Newer versions of the packages above bring it; the machine has none.
    "$environment/bin/python" -m pip uninstall --quiet --yes pydantic pydantic-core annotated-types typing-inspection || true
    touch "$environment/complete"
fi
"$environment/bin/python" - "${absent[@]}" <<'PYTHON'
import importlib.util
import sys

import torch

found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
assert sys.version_info[:2] == (3, 12), sys.version
assert torch.version.cuda, f"torch {torch.__version__} has no CUDA inside"
if found:
    sys.exit(f"error: {', '.join(found)} is installed, which the GPU machine lacks; use another environment")
print(f"stand-in: Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON
[ -z "$only_environment" ] || exit 0

# A clean copy: what git knows, and nothing that was built here.
copy=$(mktemp -d "$home/tree.XXXXXX")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$copy"' EXIT
trap 'exit 143' TERM INT
git ls-files -z --cached --others --exclude-standard |
    (while IFS= read -r -d '' name; do [ ! -e "$name" ] || printf '%s\0' "$name"; done) |
    tar --null --files-from - --create | tar --extract --directory "$copy"
PACKED_COMMIT=$(git describe --always --dirty --abbrev=12) PYTHON=${PYTHON:-$tree/.venv/bin/python} \
    "$copy/benchmarks/gpu_day.sh" pack

rm -rf "$home/out"
# Without a network for pip and the Hugging Face libraries, and without a GPU even where there is one. The compiler need not
# try out in every process, for many seconds, which vector instructions there are.
env PYTHON="$environment/bin/python" OUT="$home/out" WORK="$home/work" SHAPE=tiny CUDA_VISIBLE_DEVICES= \
    TORCHINDUCTOR_VEC_ISA_OK=1 PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 PYTHONPATH= "$copy/benchmarks/gpu_day.sh" run "${stages[@]}" &
wait $!
cd "$copy/benchmarks"
"$environment/bin/python" -m gpu_day.check "$home/out" "${numbers[@]}"
