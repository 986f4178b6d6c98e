#!/usr/bin/env bash
# Run the core's tests with the oldest supported versions of torch and torchvision.
#
#     bash tools/test_oldest.sh [TORCH] [DIRECTORY] [PYTEST ARGUMENT...]
#
# TORCH is 2.6 or the like, by default what pyproject.toml asks for. For the rest see tools/test_core.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=${1:-$(sed -n 's/^dependencies = \["torch>=\(.*\)"\]$/\1/p' pyproject.toml)}
[[ $torch =~ ^2\.[0-9]+$ ]] || { echo "TORCH must be a version such as 2.6, not $torch" >&2; exit 2; }
torchvision=0.$((${torch#2.} + 15)) # released together: 2.6 and 0.21, 2.7 and 0.22, ...

bash tools/test_core.sh 3.11 "torch==$torch.*" "torchvision==$torchvision.*" "${2:-}" "${@:3}"
