# make help    what can be made
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
BUNDLE := bundles/tiny
KERNEL_BUNDLE := bundles/tiny-int8
MODEL  := checkpoints/tiny
ROUTES ?= tests/runtime/experts/tiny_routes.npz

export WAV ?=

.PHONY: help demo test test-slow check bench bundles routes gpu-check plugin native wheels sanitize tiny sound clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

demo: $(VENV)/.device  ## a spoken question in, a spoken answer out; WAV=my.wav for yours
	@$(BIN)/python -m deeptalk_edge.cli export $(MODEL) --device cpu-int8 --if-changed -o $(KERNEL_BUNDLE) >/dev/null
	@if [ -e "$$WAV" ]; then set -- --wav "$$WAV"; elif [ -n "$$WAV" ]; then set -- --wav $$WAV; fi; \
	    $(BIN)/python examples/demo.py --bundle $(KERNEL_BUNDLE) --out demo "$$@"

test: $(VENV)/.dev sound  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev sound  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev bundles sound  ## run the program behind a figure of the docs: NAME=voice_wait FLAGS="--port card"; without NAME: the list
	$(BENCH_ENV_$(NAME)) $(BIN)/python -m deeptalk_edge.bench $(NAME) $(FLAGS)

BENCH_ENV_forecast := OPENBLAS_NUM_THREADS=1
BENCH_ENV_cpu := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_WAIT_POLICY=passive

routes: $(VENV)/.device bundles  ## record which experts the tiny checkpoint asks for; prints the figures of docs/measurements/routes.md
	$(BIN)/deeptalk-edge run --bundle $(BUNDLE) --backend ort --forget --json --wav $(MODEL)/questions/*.wav \
	    --record-routes $(ROUTES) > /dev/null
	$(BIN)/deeptalk-edge routes show $(ROUTES)
	$(BIN)/deeptalk-edge routes replay $(ROUTES) --pool 25% 42% 65% --device orin-nano-8gb
	$(BIN)/deeptalk-edge routes replay synthetic:mid --device all

gpu-check:  ## the TensorRT backend, the expert pools and the MoE kernels on this machine's NVIDIA GPU (nvcc and a CUDA PyTorch); without a GPU the backend alone, emulated
	$(PYTHON) -m deeptalk_edge.bench gpu_check
	$(PYTHON) -m deeptalk_edge.bench.gpu.cuda_check
	$(PYTHON) -m deeptalk_edge.bench.gpu.paged
	$(PYTHON) -m deeptalk_edge.bench.gpu.check

plugin: | need-nvcc need-cmake need-aarch64-linux-gnu-g++  ## the TensorRT plugin for x86-64 and aarch64 (needs nvcc, g++-aarch64-linux-gnu)
	cmake -S native/tensorrt_plugin -B build/plugin
	cmake --build build/plugin
	cmake -S native/tensorrt_plugin -B build/plugin-aarch64 \
	    -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/tensorrt_plugin/aarch64.cmake
	cmake --build build/plugin-aarch64

need-nvcc need-cmake need-aarch64-linux-gnu-g++: need-%:
	@command -v $* >/dev/null || { echo "$* is not on the PATH; install $(PACKAGE_$*)" >&2; exit 1; }

PACKAGE_nvcc := the CUDA toolkit (13 or later), and add its bin/ to the PATH
PACKAGE_cmake := cmake
PACKAGE_aarch64-linux-gnu-g++ := g++-aarch64-linux-gnu

native: | $(VENV)/bin/python  ## build the native CPU library again, in place
	$(BIN)/python native/cpu/build.py deeptalk_edge/libdeeptalk_cpu.so

wheels: $(VENV)/.dev  ## manylinux wheels for x86-64 and aarch64 in dist/, checked (zig's compilers from PyPI)
	$(PIP) ziglang==0.17.1
	rm -rf dist build/lib.* build/bdist.* build/wheels  # what an earlier build left would be packed as well
	zig=$$(dirname $$($(BIN)/python -c "import ziglang; print(ziglang.__file__)"))/zig; \
	for arch in x86_64 aarch64; do \
	    CXX="$$zig c++ -s -target $$arch-linux-gnu.2.17" $(BIN)/python -m pip wheel -q --no-deps -w dist \
	        -C--build-option=--plat-name=manylinux_2_17_$$arch . ; \
	done
	$(BIN)/python -m pytest -m slow tests/native/cpu/test_wheels.py
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/python -m pip install -q --disable-pip-version-check dist/*_$$(uname -m).whl
	$(BIN)/deeptalk-edge export $(MODEL) --device cpu-int8 -o build/wheels/bundle
	build/wheels/bin/deeptalk-edge run --bundle build/wheels/bundle --backend cpu \
	    --wav $$(ls $(MODEL)/questions/*.wav | head -1)

sanitize: $(VENV)/.dev  ## the native kernels under sanitizers, and on Arm under qemu-user (minutes)
	$(BIN)/python -m pytest -m slow tests/native/cpu

tiny: $(VENV)/.dev  ## train a tiny checkpoint from nothing (needs espeak-ng and flite; about 80 minutes on two cores)
	$(PIP) -e '.[report]'
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000 \
	    OMP_WAIT_POLICY=passive $(BIN)/python -m deeptalk_edge.training.tiny --out $(MODEL) --work build/tiny
	$(BIN)/deeptalk-edge export $(MODEL) --if-changed -o $(BUNDLE)
	$(BIN)/python -m deeptalk_edge.bench tiny_scores --clips $(MODEL)/questions

clean:  ## remove what was made, the environment included
	rm -rf $(VENV) build bundles demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Always asked: the exporter compares its own hash and the checkpoint's with the bundle's, in a second.
bundles: | $(VENV)/.device
	@$(BIN)/python -m deeptalk_edge.cli export $(MODEL) --if-changed -o $(BUNDLE) >/dev/null
	@$(BIN)/python -m deeptalk_edge.cli export $(MODEL) --device cpu-int8 --if-changed -o $(KERNEL_BUNDLE) >/dev/null

# What a device needs, and the exporter: no torch.
$(VENV)/.device: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[export]'
	@touch $@

# torch first and by itself: its CPU build is what the tests want.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.device

# PyAudio has no wheel for Linux: it is built as soon as PortAudio's header and a compiler are there.
HAS_PORTAUDIO := echo '\#include <portaudio.h>' | cc -E - -o /dev/null
sound: $(VENV)/.dev
	@$(BIN)/python -c "import pyaudio" 2>/dev/null || { $(HAS_PORTAUDIO) 2>/dev/null && $(PIP) -e '.[sound]'; } || \
	    echo "no PyAudio, the sound tests are skipped: apt install portaudio19-dev gcc python3-dev, then again" >&2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
