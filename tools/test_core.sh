#!/usr/bin/env bash
# Run the core's tests in an environment of their own; test_oldest.sh and test_pythons.sh say which.
#
#     bash tools/test_core.sh PYTHON TORCH TORCHVISION [DIRECTORY] [PYTEST ARGUMENT...]
#
# PYTHON is 3.13 or the like, and must be at hand. TORCH and TORCHVISION are requirements, such as "torch==2.6.*".
# DIRECTORY gets the environment, which is used again by the next run; by default it is in the system's temporary
# directory. Downloads up to 3 GB (torch with its CUDA libraries), then takes about 8 minutes on one core. Needs uv
# and a C++ compiler.
#
# The core's tests are the laws and tests/test_*.py, 25 examples each instead of 100. The others are about packages beside
# torch, whose newest versions ask for a newer torch than the core does.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=quick

environment=${4:-$(dirname "$(mktemp -u)")/rdp-python-$1-${2//[^a-z0-9.]/}}
[ -d "$environment" ] || uv venv --quiet --no-project --python "$1" "$environment"
# --no-config, and no `uv run`: the project's own environment and its lock are left alone.
uv pip install --quiet --no-config --python "$environment/bin/python" "$2" "$3" \
    "timm>=1.0.20" "transformers>=5.0" "schedulefree>=1.4" "numpy>=1.26" \
    "hypothesis>=6.100" "pytest>=8.2" "pytest-cov>=5.0" "pytest-timeout>=2.3" "pytest-xdist>=3.6" \
    setuptools # with which torch 2.6 compiles to machine code
"$environment/bin/python" -c 'import platform, timm, torch
print("Python", platform.python_version(), "torch", torch.__version__, "timm", timm.__version__)'
"$environment/bin/python" -m pytest -n 0 --no-cov -p no:cacheprovider -q -m "" tests/laws tests/test_*.py "${@:5}"
