# Needs make and Python 3.11 to 3.13, nothing else. See `make help`.

MODEL ?=
ARGS ?=
VARIANT ?= auto
VLLM ?=
BIN := .venv/bin
TYPES := build/types
# Tests that start engines run apart from the others, two at a time. An engine has one thread, on any
# core: vLLM would pin each to the first.
ENGINES := tests/engine tests/frontend/test_server.py tests/standin/test_copies.py \
	tests/standin/test_engine.py tests/libcuda

# The first of these that runs, is new enough and can make virtual environments.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help install serve test lint docs clean

help:
	@echo "make install             set up .venv (CUDA or CPU, found by itself; VARIANT=cpu or cuda to choose)"
	@echo "make serve MODEL=... ARGS=...   serve a model; without MODEL the bundled one"
	@echo "make test                lint, then the tests (ARGS=... for some, as pytest takes them)"
	@echo "make test VLLM=0.33      engine tests on another vLLM (CPU); or VLLM=FILE.whl"
	@echo "make lint                ruff (rules and format) and mypy"
	@echo "make docs                the documentation as a site, build/site/index.html"
	@echo "make clean               remove caches and build files (.venv stays)"

install:
	@py="$(PYTHON)"; test -n "$$py" || { echo "setup: Python 3.11 to 3.13 with its venv module \
	is needed (Debian, Ubuntu: apt install python3-venv), or name one: make PYTHON=..." >&2; \
	exit 2; }; "$$py" setup_env.py --variant $(VARIANT)

serve: install
	@$(BIN)/fusedstep serve $(MODEL) $(ARGS)

test: lint
ifneq ($(VLLM),)
	$(BIN)/python tests/next_vllm.py $(VLLM) $(ARGS)
else ifneq ($(ARGS),)
	$(BIN)/pytest $(ARGS)
else
	@failed=0; \
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ENGINES:%=--ignore=%) || failed=1; \
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	$(BIN)/pytest --numprocesses auto --maxprocesses 2 --dist loadfile $(ENGINES) || failed=1; \
	exit $$failed
endif

# mypy sees the packages under their import names: a tree of links (see pyproject.toml).
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fusedstep
	@ln -s "$(CURDIR)"/fusedstep/* $(TYPES)/fusedstep/
	@ln -s "$(CURDIR)/bench" "$(CURDIR)/cli" $(TYPES)/fusedstep/
	@ln -s "$(CURDIR)/triton_kernels" $(TYPES)/fusedstep/kernels
	cd $(TYPES) && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p fusedstep

# A broken link, and a page that the navigation leaves out, are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "docs: $(CURDIR)/build/site/index.html"

clean:
	rm -rf build fusedstep.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fusedstep triton_kernels cli bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
