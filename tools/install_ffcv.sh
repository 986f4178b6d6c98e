#!/usr/bin/env bash
# Install FFCV and what it is built from: Debian's or Ubuntu's packages, about 10 MB, instead of all of OpenCV.
#
#     bash tools/install_ffcv.sh [PYTHON]     # into that Python's environment; default: the first `python` on the path
#
# FFCV calls a single function of OpenCV, cv::resize. Its build asks pkg-config for the whole of OpenCV and includes the
# header of the whole; two files, made here and needed for the build only, answer with the part that is used.
set -euo pipefail
python=${1:-python}

packages=(libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi

shim=$(mktemp -d)
trap 'rm -rf "$shim"' EXIT
mkdir "$shim/opencv2"
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/opencv2/opencv.hpp"
cat >"$shim/opencv4.pc" <<PC
Name: OpenCV
Description: the part of it that FFCV calls
Version: 4
Cflags: -I$shim -I/usr/include/opencv4
Libs: -lopencv_imgproc -lopencv_core
PC
export PKG_CONFIG_PATH="$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"

# --no-deps: FFCV asks for opencv-python, whose desktop build wants libGL; the headless one is the same module.
requirements=(setuptools wheel opencv-python-headless numba terminaltables pytorch-pfn-extras fastargs assertpy tqdm psutil)
if command -v uv >/dev/null; then
    uv pip install --quiet --python "$python" "${requirements[@]}"
    uv pip install --quiet --python "$python" --no-build-isolation --no-deps ffcv==1.0.2
else
    "$python" -m pip install --quiet "${requirements[@]}"
    "$python" -m pip install --quiet --no-build-isolation --no-deps ffcv==1.0.2
fi
"$python" -c 'import ffcv; print("FFCV is installed:", ffcv.__file__)'
