# Two commands for everybody: `make demo` and `make test`. Each sets everything up by itself in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
GPU    := $(VENV)/gpu
CACHE  := $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/dsmoe-local

.PHONY: help demo test check lint types layers soak gpu-check clean
help:           ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(STAMP)  ## build the demo model with our own converter and quantizer, then chat with it
	@$(BIN)/dsmoe demo --chat

# Four at once on any machine: tests often wait for the disk, for terminals and for child processes.
test: $(STAMP)  ## run the tests
	@$(BIN)/pytest --numprocesses 4 --dist loadfile

check: lint types layers test  ## what CI runs: ruff, mypy, import-linter, tests

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

layers: $(STAMP)
	@$(BIN)/lint-imports

soak: $(STAMP)  ## a thousand kills of what writes files, 50,000 damaged files for each reader, keys for the chat
	@$(BIN)/pytest -m soak --timeout 0 tests

# The first Vulkan device: a GPU, or else Mesa's driver for the CPU, which llama.cpp uses only if it is named. That
# driver compiles each shader on first use; this takes most of the time, so they are kept.
gpu-check: $(GPU)/.ready  ## test offloading with a build for Vulkan; works without a GPU
	@GGML_VK_VISIBLE_DEVICES=0 MESA_SHADER_CACHE_DIR="$(CACHE)/shaders" \
	  $(GPU)/bin/python -m pytest -m "gpu or any_device" --durations 10

clean:          ## remove the virtual environment and tool caches (not the demo's models)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# llama-cpp-python is compiled for this very processor, once, and the wheel kept outside the tree.
# GGML_RPC makes a loopback worker a device, so that offload can be tested without a GPU.
$(STAMP): pyproject.toml tools/setup_venv.py
	@$(PYTHON) tools/setup_venv.py --venv $(VENV) --cache "$(CACHE)"
	@touch $@

$(GPU)/.ready: $(STAMP)
	@$(BIN)/python tools/setup_venv.py --venv $(GPU) --cache "$(CACHE)" --vulkan-beside $(VENV)
	@touch $@
