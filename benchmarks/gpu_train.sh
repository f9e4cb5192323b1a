#!/usr/bin/env bash
# The training step of the whole 1.1B recipe on one GPU, T=2048: ZeRO-3, ZeRO-1 and no DeepSpeed, eager, compiled and
# DeepCompile, over micro-batch sizes. For machines without a network.
#
#   benchmarks/gpu_train.sh pack WHEELS      where there is a network: gather what a GPU machine with PyTorch may lack
#   benchmarks/gpu_train.sh run WHEELS       on the GPU machine: install these into an environment of its own, and measure
#
# PYTHON: an interpreter that has PyTorch (default python3). MICRO: micro-batch sizes (default 4,8,16,32). SHAPE: 1.1b.
# FOR_PYTHON: the version of the GPU machine's Python that `pack` gathers for (default 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
verb=${1:-help}
wheels=${2:-wheels}

# What train_step.py imports besides torch, numpy and triton, without their own dependencies.
pure=(deepspeed==0.19.8 liger-kernel hjson py-cpuinfo einops rich typer shellingham click markdown-it-py mdurl pygments)
pure+=(annotated-doc annotated-types typing-extensions typing-inspection tqdm packaging)
compiled=(msgpack ninja psutil pydantic pydantic-core safetensors)

case $verb in
pack)
    mkdir -p "$wheels"
    # DeepSpeed comes as source; without a compiler of its operators its wheel fits any machine.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" "${pure[@]}"
    "$python" -m pip download --quiet --no-deps --dest "$wheels" --only-binary :all: --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 --python-version "${FOR_PYTHON:-3.12}" "${compiled[@]}"
    du -sh "$wheels"
    ;;
run)
    home=$(mktemp -d)
    trap 'rm -rf "$home"' EXIT
    "$python" -m venv --system-site-packages "$home/env"
    # A virtual environment of a virtual environment does not see the latter's packages by itself.
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' >"$(echo "$home"/env/lib/python3*/site-packages)/torch.pth"
    "$home/env/bin/python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
    # Rows that do not fit the memory say so and the others go on.
    PYTHONPATH=$PWD "$home/env/bin/python" benchmarks/train_step.py --shape "${SHAPE:-1.1b}" --sequence-length "${LENGTH:-2048}" \
        --micro "${MICRO:-4,8,16,32}" --step-tokens "${STEP_TOKENS:-131072}" --rounds 1 --repeats 5 --rows gpu \
        --output benchmarks/results/gpu_train.json
    ;;
*)
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    [ "$verb" = help ] || exit 2
    ;;
esac
