#!/usr/bin/env bash
# Installs the peers of `bench cpu` into build/peers, apart from our own packages:
#     bench/cpu/peers.sh [PYTHON]     default .venv/bin/python
# llama.cpp is compiled for this processor (minutes), so never taken from pip's cache; without AMX,
# with whose buffers 0.3.36 aborts ("cur_backend_id != -1").
set -euo pipefail
cd "$(dirname "$0")/../.."
pip="${1:-.venv/bin/python} -m pip install -q --disable-pip-version-check --upgrade --no-deps --target build/peers"
no_amx=""
[ "$(uname -m)" != x86_64 ] || no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" CFLAGS="$no_amx" CXXFLAGS="$no_amx" \
    $pip --no-cache-dir gguf==0.19.0 diskcache==5.6.3 llama-cpp-python==0.3.36
$pip gguf==0.19.0 ik-llama-cpp-python==0.1.5
