# Every target sets up its own environment: `make test` on a fresh machine needs only Python and make.
#   make demo    a tiny clip end to end           make test-gpu  GPU tests, kernels at production shapes
#   make test    all CPU tests                    make sanitize  small cases under compute-sanitizer
#   make check   lint, types, CUDA compile, test  make bench     benchmarks; make report  tables from them
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= auto
export COSMOS_FAST_BUILD

BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)
RUN_TESTS := $(BIN)/python -m pytest --timeout=300
# A file goes whole to one of as many processes as there are cores, in the order of collection. Tests on a GPU measure it
# and never share it.
PARALLEL := -n $(JOBS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-interpret test-gpu check lint build-cuda-objects sanitize bench report fmt clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	$(BIN)/python tools/demo.py

# Interpreter first: the run that everybody reads is the last one.
test: test-interpret
	$(RUN_TESTS) $(PARALLEL) $(PYTEST_ARGS) -m "not gpu and not multigpu and not interpret"

# TRITON_INTERPRET must be set before Triton is imported, so this is a process of its own. pytest ends with 5
# where nothing is marked interpret; that, and only that, is no failure.
test-interpret: $(VENV)/.installed
	TRITON_INTERPRET=1 $(RUN_TESTS) $(PARALLEL) $(PYTEST_ARGS) -m interpret || [ $$? -eq 5 ]

test-gpu: $(VENV)/.installed
	$(RUN_TESTS) $(PYTEST_ARGS) -m "gpu or multigpu"

check: lint build-cuda-objects test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

# Compiles the CUDA kernels for their architectures; needs nvcc, but neither a GPU nor a CUDA torch. All of them each
# time, so that the log has the registers and spills of every kernel: a test reads it.
CUDA_LOG := build/cuda-objects/log
ifneq ($(shell command -v nvcc 2>/dev/null),)
build-cuda-objects: $(CUDA_LOG)
else
build-cuda-objects:
	@echo "build-cuda-objects: skipped, nvcc not found"
endif

$(CUDA_LOG): $(NATIVE) | $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake -G Ninja -S . -B $(@D) \
	  -DCOSMOS_FAST_COMPILE_ONLY=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	@MAKEFLAGS= $(BIN)/cmake --build $(@D) --clean-first >$@ || { cat $@; exit 1; }
	@grep -v -e 'ptxas info' -e 'bytes stack frame' $@

sanitize: $(VENV)/.installed
	$(BIN)/python tools/sanitize.py

bench: $(VENV)/.installed
	$(BIN)/python -m pytest --benchmark $(PYTEST_ARGS)

report: $(VENV)/.installed
	$(BIN)/python tools/report.py

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix-only -q . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

clean:
	rm -rf build dist *.egg-info cosmos_fast/*.so $(VENV)

# A CUDA torch that the system already has is used as it is (it is gigabytes); anything else is installed at the
# tested release. The native mode then follows: auto with a CUDA torch, else cpu if there is a compiler. The file that
# marks it done holds the pins, for what is installed later.
$(VENV)/.runtime: pyproject.toml constraints.txt $(NATIVE)
	@set -e; torch=fresh; site=; \
	if $(PYTHON) -c "import torch, sys; v = tuple(map(int, torch.__version__.split('.')[:2])); \
	  sys.exit(torch.version.cuda is None or v < (2, 10))" 2>/dev/null; then torch=system; site=--system-site-packages; fi; \
	if [ -z "$$COSMOS_FAST_BUILD" ]; then \
	  if [ $$torch = system ]; then COSMOS_FAST_BUILD=auto; \
	  elif command -v c++ >/dev/null; then COSMOS_FAST_BUILD=cpu; else COSMOS_FAST_BUILD=none; fi; fi; \
	echo "setup: $(VENV), $$torch torch, COSMOS_FAST_BUILD=$$COSMOS_FAST_BUILD"; \
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $$site $(VENV) || \
	  { echo "setup: $(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }; \
	pins=; [ $$torch = system ] || pins="-c constraints.txt"; \
	$(PIP) $$pins torch "setuptools>=77" wheel cmake ninja pybind11; \
	PATH="$(abspath $(BIN)):$$PATH" COSMOS_FAST_BUILD=$$COSMOS_FAST_BUILD $(PIP) $$pins --no-build-isolation -e .; \
	echo "$$pins" >$@

# What the tests need, as the installed package names it: nothing is built again.
$(VENV)/.installed: $(VENV)/.runtime
	@$(PIP) $$(cat $<) $$($(BIN)/python -c "import importlib.metadata as m; \
	  print(*[r.split(';')[0].replace(' ', '') for r in m.requires('cosmos-fast') if 'extra == \"test\"' in r])")
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" COSMOS_FAST_BUILD=none $(PIP) $$(sed -n 's/^dev = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@
