#!/usr/bin/env bash
# Makes .venv, or brings it up to date, and does nothing when nothing changed.
#
# usage: scripts/setup_venv.sh [EXTRAS]     EXTRAS is what stands in r4b[EXTRAS], such as "test"
#
#   PYTHON   the interpreter to use; otherwise python3.11, python3.12 or python3, the first that will do
#   VENV     the folder to make (.venv)
#   TORCH    "cpu" or "default"; otherwise "cpu" where there is no NVIDIA driver

set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
venv=${VENV:-.venv}
torch=2.13.0
installed=$venv/.installed

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: r4b needs Python 3.11 or 3.12; none of these is: ${PYTHON:-python3.11 python3.12 python3}." >&2
    echo "Install one and name it: make PYTHON=/path/to/python3.11" >&2
    return 1
}

# Everything that decides what has to be installed, in one line. The folder counts: an editable install points to it.
wanted() {
    echo "extras=$extras folder=$PWD torch=$(torch_build)" \
        "$(cat pyproject.toml setup.py constraints.txt tests/oracles.txt scripts/setup_venv.sh | cksum)"
}

torch_build() {
    if [[ -n ${TORCH:-} ]]; then
        echo "$TORCH"
    elif [[ $(uname) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
        echo cpu
    else
        echo default # with a driver the CUDA build; on macOS every build is the CPU build
    fi
}

# The index's own torch for Linux carries several GB of CUDA. A CPU build is one whose version ends in +cpu: pip finds it
# where an index or find-links of yours has it; otherwise uv knows where PyTorch publishes it.
install_torch() {
    if [[ $(torch_build) == default ]]; then
        pip_install "torch==$torch"
    elif has_torch_cpu; then
        echo "torch $torch+cpu is there"
    elif ! pip_install "torch==$torch+cpu" 2>/dev/null; then
        echo "pip finds no torch $torch+cpu here: asking uv for it"
        pip_install uv
        if ! "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend=cpu "torch==$torch"; then
            echo "no CPU build can be reached: taking the index's own, which brings CUDA libraries of several GB"
            pip_install "torch==$torch"
        fi
    fi
}

has_torch_cpu() { "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__ != '$torch+cpu')" 2>/dev/null; }

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

if [[ -f $installed && $(<"$installed") == "$(wanted)" ]]; then
    exit 0
fi

if ! supported "$venv/bin/python"; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
rm -f "$installed"
echo "installing torch $torch ($(torch_build) build)"
install_torch
echo "installing r4b${extras:+[$extras]} and its dependencies (some minutes the first time)"
pip_install --constraint constraints.txt --editable ".${extras:+[$extras]}"
if [[ $extras == *test* ]]; then
    # Without their dependencies, of which some bring a CUDA stack: only what the tests import is installed.
    pip_install --no-deps --requirement tests/oracles.txt
fi
wanted >"$installed"
