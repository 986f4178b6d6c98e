#!/usr/bin/env bash
# Build the wheel and the sdist into dist/, check their metadata, and train with each, installed where nothing else is.
#
#     bash tools/test_release.sh [PYTHON]
#
# PYTHON is 3.11 or the like. Takes seconds where uv's cache holds torch, as it does where the project's environment is
# (files are linked, not copied); else several GB are downloaded. Then `uv publish` uploads what is in dist/. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
unset PYTHONPATH # nothing but what is installed may be imported

rm -rf dist
uv build --quiet
uvx --quiet twine check --strict dist/*

fresh=$(mktemp -d "$root/dist/fresh.XXXX") # on the file system of the checkout, which is mostly that of the cache
trap 'rm -rf "$fresh"' EXIT
for package in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
    # --no-config: a user has no pyproject.toml of ours.
    uv venv --quiet --no-project --clear --python "${1:-3.11}" "$fresh/environment"
    uv pip install --quiet --no-config --python "$fresh/environment/bin/python" "$package"
    (cd "$fresh" && "$fresh/environment/bin/python" -I "$root/tests/release/run_readme.py" "${package##*/}")
done
