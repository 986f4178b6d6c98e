#!/usr/bin/env bash
# Run the core's tests on each supported Python that is at hand, with the newest torch; name those that are not.
#
#     bash tools/test_pythons.sh [VERSION...]
#
# By default the versions that pyproject.toml allows and torch has wheels for. uv finds them (the system's, pyenv's, its
# own), and `uv python install VERSION` gets one. Each takes what tools/test_core.sh says. The classifiers of
# pyproject.toml name those that have passed.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v pyenv > /dev/null; then
    PYENV_VERSION=$(pyenv versions --bare | sort -rV | paste -sd: -)
    export PYENV_VERSION # else it shows only those that it was told to use
fi
absent=() failed=()
[ $# -gt 0 ] || set -- 3.11 3.12 3.13 3.14
for version; do
    if ! python=$(uv python find --system --no-project --no-python-downloads "$version" 2>/dev/null); then
        absent+=("$version")
    elif ! bash tools/test_core.sh "$python" torch torchvision "$(dirname "$(mktemp -u)")/rdp-python-$version"; then
        failed+=("$version")
    fi
done
[ ${#absent[@]} -eq 0 ] || echo "not at hand, so not tested: ${absent[*]}"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
