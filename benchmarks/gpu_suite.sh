#!/usr/bin/env bash
# All that wants a GPU, in one command: are the kernels and the trainer right, does a run train, how fast is it all. 25
# minutes at most.
#
# usage: benchmarks/gpu_suite.sh [OUT]     OUT is benchmarks/results/gpu-<name>-<date> unless given
#
# Works in an environment with r4b[test] (make test makes one) or with torch, pytest and pytest-benchmark alone: then the
# stages that train are left out and said to be. Every stage runs, whatever came before; the exit status is that of the worst.
#
#   R4B_PYTHON   the interpreter to use; otherwise .venv/bin/python where there is one, else python3

set -uo pipefail
cd "$(dirname "$0")/.."
python=${R4B_PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
worst=0

name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))' 2>/dev/null) || {
    echo "no GPU that torch can use: $("$python" -c 'import torch; print("torch", torch.__version__)' 2>&1 | tail -1)" >&2
    exit 2
}
out=${1:-benchmarks/results/gpu-$name-$(date -u +%F)}
mkdir -p "$out"

# stage TITLE MINUTES COMMAND...: its output goes to the screen and to OUT/<title>.log
stage() {
    local title=$1 minutes=$2 status start=$SECONDS
    shift 2
    echo "== $title: $*"
    timeout --kill-after=10 "${minutes}m" "$@" 2>&1 | tee "$out/$title.log"
    status=${PIPESTATUS[0]}
    echo "== $title: exit $status after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
    ((status > worst)) && worst=$status
    return "$status"
}

{
    echo "date: $(date -u +%FT%TZ)"
    echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' with changes')"
    echo "command: benchmarks/gpu_suite.sh $*"
    "$python" -c '
import platform, importlib.util, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if importlib.util.find_spec("triton"):
    import triton
    print("triton", triton.__version__)'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
} | tee "$out/summary.txt"

stage build 2 env R4B_BUILD_CUDA=auto "$python" -m r4b_kernels.build
stage correctness 5 "$python" -m pytest -q -m gpu tests/gpu --ignore tests/gpu/test_training.py -p no:cacheprovider
if "$python" -c 'import megatron.core, transformers' 2>/dev/null; then
    stage trainer 5 "$python" -m pytest -q -m gpu tests/gpu/test_training.py -p no:cacheprovider
    stage training 2 "$python" -m r4b_core.cli.main train smoke --run "$out/run"
    stage speed 3 "$python" benchmarks/train_speed.py
else
    echo "== training: left out, Megatron-Core or transformers is not installed" | tee -a "$out/summary.txt"
fi
# The longest comes last: what it loses to a limit, nothing else waits for.
if "$python" -c 'import typer, rich' 2>/dev/null; then
    stage kernels 8 "$python" -m r4b_core.cli.main bench kernels --json "$out/kernels.jsonl"
else
    mapfile -t cases < <(find benchmarks/kernels -name '[a-z]*.py' ! -name conftest.py | sort)
    stage kernels 8 "$python" -m pytest -q "${cases[@]}" -p no:cacheprovider \
        --benchmark-disable-gc --benchmark-json="$out/kernels.json"
fi
echo "results: $out"
exit "$worst"
