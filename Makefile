# What a contributor can do; `make help` lists it. Every target does its own set-up: Python, a C compiler and make
# are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODULES := $(wildcard cbn/kernels/*.pyx)
SOURCES := setup.py pyproject.toml $(wildcard $(foreach end,pyx pxd c h,cbn/kernels/*.$(end) cbn/kernels/*/*.$(end)))
SOURCES := $(filter-out $(MODULES:.pyx=.c),$(SOURCES))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-distributed test-sdist neon peers accuracy scaling docs readme bench bench-full bench-peers bench-outofcore bench-compare lint sanitize self-check wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# The environment, with cbn installed in place and compiled. One stamp an extra, so that a target installs just what
# it needs; touched sources compile again.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "setuptools>=77,<84" "cython>=3.3.1,<3.4" "numpy>=2.0,<3"
	@touch $@

# A build of PyTorch for the CPU alone is a fraction of the size of the usual one; where it is not to be had, any will do.
$(VENV)/.with-peers $(VENV)/.with-bench-peers: $(VENV)/.with-torch
$(VENV)/.with-torch: $(VENV)/.built
	@echo "installing PyTorch"
	@$(BIN)/python -m pip install -q "torch==2.13.0+cpu" || $(BIN)/python -m pip install -q "torch==2.13.0"
	@touch $@

$(VENV)/.built: $(VENV)/.created $(SOURCES)
	@echo "compiling cbn"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# The names of an extra's packages, from the metadata: `pip install -e .[extra]` would compile cbn once more.
$(VENV)/.with-%: $(VENV)/.built
	@echo "installing what '$*' needs"
	@$(BIN)/python -c "from importlib.metadata import requires; print(*(r.split(';')[0] for r in requires('cbn') \
	  if 'extra == \"$*\"' in r), sep='\n')" > $(VENV)/$*.txt
	@test -s $(VENV)/$*.txt && $(BIN)/python -m pip install -q -r $(VENV)/$*.txt
	@touch $@

demo: $(VENV)/.with-examples ## train and infer on real data; tables and pictures in examples/out
	$(BIN)/python -m examples

NEEDED_BY_TESTS := $(VENV)/.with-test $(VENV)/.with-examples $(VENV)/.with-bench $(VENV)/.with-lint
test: $(NEEDED_BY_TESTS) ## every test but the slow ones and those of other packages
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(NEEDED_BY_TESTS) ## the tests that compile cbn anew
	$(BIN)/python -m pytest -m slow

test-distributed: $(VENV)/.with-test $(VENV)/.with-examples $(VENV)/.with-test-distributed ## the tests on several processes
	CBN_REQUIRE_PEERS=1 $(BIN)/python -m pytest tests/distributed

test-sdist: $(VENV)/.created ## the tests, in an unpacked source distribution that sets itself up
	rm -rf build/sdist cbn.egg-info/SOURCES.txt
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('build/sdist')" >/dev/null
	@# Without the test that goes through every knob: it takes as long as all others, and the sources are the same
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  tar -xf build/sdist/cbn-*.tar.gz -C "$$folder" --strip-components=1 && \
	  PYTEST_ADDOPTS='-q --deselect tests/test_kernels.py::test_every_path_gives_the_same_bits' \
	  $(MAKE) -C "$$folder" test

neon: $(VENV)/.with-test ## the loops for 64-bit Arm, cross-compiled and emulated, where the tools are there
	$(BIN)/python -m tests.neon

peers: $(VENV)/.with-test $(VENV)/.with-examples $(VENV)/.with-peers ## the tests against PyTorch, ONNX, Keras, Flax, Equinox, Haiku, MLX and scikit-learn
	$(BIN)/python -m pytest tests/peers

accuracy: $(VENV)/.with-peers ## largest errors against float64, beside PyTorch's
	$(BIN)/python -m benchmarks.accuracy

docs: $(VENV)/.with-docs ## the pages and the public API as a site, in docs/_build/html
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d docs/_build/doctrees -b html . docs/_build/html

scaling: $(VENV)/.with-bench $(VENV)/.with-test-distributed ## the cost model for ranks and threads, beside runs of two and four ranks
	$(BIN)/python -m benchmarks.scaling

bench-outofcore: $(VENV)/.built ## files of 4 GB, normalized within 100 MB of memory, beside a copy of the file
	$(BIN)/python -m benchmarks.outofcore

readme: accuracy scaling bench-outofcore demo bench ## measure again what the pages show, and put it there
	$(BIN)/python docs/update_readme.py

bench: $(VENV)/.with-bench ## measure a short list against the peers that are installed; a report to look at
	$(BIN)/python -m benchmarks run

bench-full: $(VENV)/.with-bench ## measure everything: every shape, one core and all
	$(BIN)/python -m benchmarks run --full

bench-peers: $(VENV)/.with-bench $(VENV)/.with-bench-peers ## install the peers: PyTorch, ONNX Runtime, OpenVINO, JAX, oneDNN, scikit-learn
	@echo 'int main(void) { return 0; }' > $(VENV)/onednn.c
	@if $(CC) $(VENV)/onednn.c -o $(VENV)/onednn -ldnnl 2>/dev/null; then echo "oneDNN is there"; 	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq libdnnl-dev; 	else echo "oneDNN is absent; to measure it: sudo apt-get install libdnnl-dev"; fi

bench-compare: $(VENV)/.with-bench ## BASE=file.json: which rows of cbn became slower since; status 1 if any
	@test -n "$(BASE)" || { echo "usage: make bench-compare BASE=results.json [NEW=results.json]"; exit 2; }
	$(BIN)/python -m benchmarks compare "$(BASE)" $(NEW)

lint: $(VENV)/.with-lint ## ruff, cython-lint, mypy, and our C without warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint cbn examples
	$(BIN)/mypy
	CBN_WERROR=1 $(BIN)/python setup.py -q build_ext --force -t build/lint -b build/lint

sanitize: $(VENV)/.with-test ## the kernels' tests under the address and undefined-behaviour sanitizers
	CBN_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --force -t build/sanitize -b build/sanitize
	cp -r cbn/*.py cbn/convert build/sanitize/cbn/ && cp cbn/kernels/*.py* build/sanitize/cbn/kernels/
	cp -r tests conftest.py pyproject.toml build/sanitize/
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  ../../$(BIN)/python -m pytest -q -p no:cacheprovider \
	  tests/test_kernels.py tests/test_accuracy.py tests/test_functional.py tests/test_halves.py tests/test_fusion.py \
	  tests/test_bytes.py tests/test_guard_pages.py

self-check: $(VENV)/.built ## what this build is, and every instruction set against the reference
	$(BIN)/python -m cbn

wheel: $(VENV)/.created ## a source distribution and a wheel, in dist
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist cbn.egg-info docs/_build examples/out $(MODULES:.pyx=.c) cbn/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
