#!/usr/bin/env bash
# Run the core's tests with the oldest supported versions of torch and torchvision.
#
#     bash tools/test_oldest.sh [TORCH] [DIRECTORY] [PYTEST ARGUMENT...]
#
# TORCH is 2.6 or the like, by default what pyproject.toml asks for. DIRECTORY gets a virtual environment of its own, which
# is used again by the next run; by default it is in the system's temporary directory. Downloads up to 3 GB (torch with its
# CUDA libraries), then takes about 4 minutes on one core. Needs uv.
#
# The core's tests are the laws and tests/test_*.py, 25 examples each instead of 200. The others are about packages beside
# torch, whose newest versions ask for a newer torch than the core does.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=quick

torch=${1:-$(sed -n 's/^dependencies = \["torch>=\(.*\)"\]$/\1/p' pyproject.toml)}
[[ $torch =~ ^2\.[0-9]+$ ]] || { echo "TORCH must be a version such as 2.6, not $torch" >&2; exit 2; }
environment=${2:-$(dirname "$(mktemp -u)")/rdp-torch-$torch}
torchvision=0.$((${torch#2.} + 15)) # released together: 2.6 and 0.21, 2.7 and 0.22, ...

[ -d "$environment" ] || uv venv --quiet --no-project --python 3.11 "$environment"
# --no-config, and no `uv run`: the project's own environment and its lock are left alone.
uv pip install --quiet --no-config --python "$environment/bin/python" \
    "torch==$torch.*" "torchvision==$torchvision.*" "timm>=1.0.20" "schedulefree>=1.4" "numpy>=1.26" \
    "hypothesis>=6.100" "pytest>=8.2" "pytest-cov>=5.0" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
"$environment/bin/python" -c 'import timm, torch; print("torch", torch.__version__, "timm", timm.__version__)'
"$environment/bin/python" -m pytest -n 0 --no-cov -p no:cacheprovider -q -m "not slow" tests/laws tests/test_*.py "${@:3}"
