# make help    what can be made
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
BUNDLE := bundles/tiny
MODEL  := checkpoints/tiny

.PHONY: help demo test test-slow check bench parity gpu-check plugin tiny clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

demo: $(VENV)/.device $(BUNDLE)/manifest.json  ## a spoken question in, a spoken answer out; WAV=my.wav for yours
	@$(BIN)/python examples/demo.py --bundle $(BUNDLE) --out demo $(if $(WAV),--wav $(WAV))

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev $(BUNDLE)/manifest.json  ## measure the tiny bundle and the full-size codec on this machine
	$(BIN)/python -m deeptalk_edge.bench --bundle $(BUNDLE) --wav $(MODEL)/questions/*-0.wav

parity: $(VENV)/.dev $(BUNDLE)/manifest.json  ## the tiny bundle's graphs beside the torch reference
	$(BIN)/python -m deeptalk_edge.parity --checkpoint $(MODEL) --bundle $(BUNDLE)

gpu-check:  ## check and time the MoE kernels on this machine's NVIDIA GPU (nvcc and a CUDA PyTorch)
	$(PYTHON) -m native.gpu_check.check

plugin:  ## the TensorRT plugin for x86-64 and aarch64 (needs nvcc, g++-aarch64-linux-gnu)
	cmake -S native/tensorrt_plugin -B build/plugin
	cmake --build build/plugin
	cmake -S native/tensorrt_plugin -B build/plugin-aarch64 \
	    -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/tensorrt_plugin/aarch64.cmake
	cmake --build build/plugin-aarch64

tiny: $(VENV)/.dev  ## train a tiny checkpoint from nothing (needs espeak-ng and flite; sized for 90 minutes on two cores)
	$(PIP) -e '.[report]'
	$(BIN)/python -m deeptalk_edge.training.tiny --out $(MODEL) --work build/tiny
	$(BIN)/deeptalk-edge export $(MODEL) --force -o $(BUNDLE)
	$(BIN)/python -m deeptalk_edge.evaluate --bundle $(BUNDLE) --snac $(MODEL)/snac \
	    --work build/tiny --report $(MODEL)/SCORES.md --clips $(MODEL)/questions

clean:  ## remove what was made, the environment included
	rm -rf $(VENV) build bundles demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BUNDLE)/manifest.json: $(wildcard $(MODEL)/*) | $(VENV)/.device
	$(BIN)/deeptalk-edge export $(MODEL) --force -o $(BUNDLE)

# What a device needs, and the exporter: no torch.
$(VENV)/.device: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[export]'
	@touch $@

# torch first and by itself: its CPU build is what the tests want.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.device

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
