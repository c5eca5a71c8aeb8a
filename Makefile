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
PEER   ?= onnxruntime llama.cpp ik_llama.cpp

export WAV ?=

.PHONY: help demo test test-slow check bench bench-paging bench-loop bench-vad bench-turn soak routes parity export-full export-memory gpu-check gpu-plans plugin native wheels sanitize bench-cpu bench-full tiny clean sound

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

demo: $(VENV)/.device $(KERNEL_BUNDLE)/manifest.json  ## a spoken question in, a spoken answer out; WAV=my.wav for yours
	@if [ -e "$$WAV" ]; then set -- --wav "$$WAV"; elif [ -n "$$WAV" ]; then set -- --wav $$WAV; fi; \
	    $(BIN)/python examples/demo.py --bundle $(KERNEL_BUNDLE) --out demo "$$@"

test: $(VENV)/.dev sound  ## run the tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev sound  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev $(BUNDLE)/manifest.json  ## measure the tiny bundle and the full-size codec on this machine
	$(BIN)/python -m deeptalk_edge.bench.answers --bundle $(BUNDLE) --wav $(MODEL)/questions/*-0.wav

bench-vad: $(VENV)/.dev  ## what each voice detector makes of speech in noise
	$(BIN)/python -m deeptalk_edge.bench.vad --wav $(MODEL)/questions/*.wav

bench-loop: $(VENV)/.dev $(BUNDLE)/manifest.json sound  ## how long a listener waits, live through the virtual sound card (portaudio19-dev, pulseaudio, pulseaudio-utils, libasound2-plugins)
	CARD_MAX_S=900 tests/runtime/sound_card/virtual_card.sh exec $(BIN)/python -m deeptalk_edge.bench.voice_wait --port card \
	    --bundle $(BUNDLE) --wav $(MODEL)/questions/*.wav

bench-turn: $(VENV)/.dev $(BUNDLE)/manifest.json  ## whole questions and parts of them: what the end-of-turn cues say (espeak-ng, flite)
	$(BIN)/python -m deeptalk_edge.bench.end_of_turn --bundle $(BUNDLE) --wav $(MODEL)/questions/*.wav

soak: $(VENV)/.dev  ## an hour and 2,000 turns of simulated conversation
	$(BIN)/python -m deeptalk_edge.bench.soak

bench-paging: $(VENV)/.device  ## measure expert paging at full size from this machine's disk (root; 8 GB of disk, 16 GB of memory)
	$(BIN)/python -m deeptalk_edge.bench.paging

bench-full: $(VENV)/.dev  ## spoken questions to a model of the official size, random weights, on this CPU (15 GB of disk, 14 GB of memory, 12 minutes)
	$(BIN)/python -m deeptalk_edge.bench.full_size --like checkpoints/official-size --tokenizer $(MODEL)/tokenizer.json \
	    --wav $(MODEL)/questions/*-0.wav --work build/bench_full $(FLAGS)

routes: $(VENV)/.device $(BUNDLE)/manifest.json  ## record which experts the tiny checkpoint asks for; prints the figures of docs/paging.md
	$(BIN)/deeptalk-edge run --bundle $(BUNDLE) --backend ort --forget --json --wav $(MODEL)/questions/*.wav \
	    --record-routes $(ROUTES) > /dev/null
	$(BIN)/deeptalk-edge routes show $(ROUTES)
	$(BIN)/deeptalk-edge routes replay $(ROUTES) --pool 25% 42% 65% --device orin-nano-8gb
	$(BIN)/deeptalk-edge routes replay synthetic:mid --device all

parity: $(VENV)/.dev $(BUNDLE)/manifest.json  ## the tiny bundle's graphs beside the torch reference
	$(BIN)/python -m deeptalk_edge.bench.parity --checkpoint $(MODEL) --bundle $(BUNDLE)

export-memory: $(VENV)/.dev  ## an export's memory at official width, by number of layers; DEVICE=agx-orin-64gb (30 GB of disk, 8 minutes)
	$(BIN)/python -m deeptalk_edge.bench.export_memory --like checkpoints/official-size --work build/export-memory \
	    --device $(or $(DEVICE),cpu)

export-full: $(VENV)/.dev  ## the official size's decoding step as an engine for RTX cards (10 GB of memory, 5 GB of disk)
	$(BIN)/python -m deeptalk_edge.bench.export_full --like checkpoints/official-size --work build/export-full

gpu-check:  ## check the expert pools, check and time the MoE kernels on this machine's NVIDIA GPU (nvcc and a CUDA PyTorch)
	$(PYTHON) -m deeptalk_edge.bench.gpu.cuda_check
	$(PYTHON) -m deeptalk_edge.bench.gpu.paged
	$(PYTHON) -m deeptalk_edge.bench.gpu.check

gpu-plans: $(VENV)/.dev | need-nvcc need-cmake  ## small TensorRT-RTX plans for the GPU check's second step (needs nvcc)
	cmake -S native/tensorrt_plugin -B build/plugin
	cmake --build build/plugin
	$(BIN)/python -m deeptalk_edge.bench.gpu.plans build/plugin/libdt_moe_plugin.so $(MODEL) build/gpu_plans

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

bench-cpu: $(VENV)/.dev $(patsubst %,build/peers/.%,$(filter-out onnxruntime,$(PEER)))  ## the native decoder at full width beside its roofline and its peers (20 GB of memory); PEER= for none
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m deeptalk_edge.bench.cpu --peer $(PEER) $(FLAGS)

tiny: $(VENV)/.dev  ## train a tiny checkpoint from nothing (needs espeak-ng and flite; about 80 minutes on two cores)
	$(PIP) -e '.[report]'
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000 \
	    OMP_WAIT_POLICY=passive $(BIN)/python -m deeptalk_edge.training.tiny --out $(MODEL) --work build/tiny
	$(BIN)/deeptalk-edge export $(MODEL) --force -o $(BUNDLE)
	$(BIN)/python -m deeptalk_edge.bench.tiny_scores --bundle $(BUNDLE) --snac $(MODEL)/snac \
	    --work build/tiny --report $(MODEL)/SCORES.md --clips $(MODEL)/questions

clean:  ## remove what was made, the environment included
	rm -rf $(VENV) build bundles demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BUNDLE)/manifest.json: $(wildcard $(MODEL)/* export/*.py) | $(VENV)/.device
	$(BIN)/deeptalk-edge export $(MODEL) --force -o $(BUNDLE)

# For our own kernels; ONNX Runtime runs it where they could not be built.
$(KERNEL_BUNDLE)/manifest.json: $(wildcard $(MODEL)/* export/*.py) | $(VENV)/.device
	$(BIN)/deeptalk-edge export $(MODEL) --device cpu-int8 --force -o $(KERNEL_BUNDLE)

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

# Peers of bench-cpu, apart from our own packages; llama.cpp is compiled for this processor (minutes),
# so never taken from pip's cache; but for AMX, with whose buffers 0.3.36 aborts ("cur_backend_id != -1").
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
build/peers/.llama.cpp: | $(VENV)/.dev
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" \
	    $(PIP) --no-cache-dir --upgrade --no-deps --target build/peers gguf==0.19.0 diskcache==5.6.3 llama-cpp-python==0.3.36
	@touch $@

build/peers/.ik_llama.cpp: | $(VENV)/.dev
	$(PIP) --upgrade --no-deps --target build/peers gguf==0.19.0 ik-llama-cpp-python==0.1.5
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
