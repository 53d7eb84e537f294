# What a contributor can do; `make help` lists it. Every target does its own set-up: Python, a C compiler and make
# are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard cbn/kernels/*.pyx cbn/kernels/*.c cbn/kernels/*.h)
SOURCES := $(filter-out cbn/kernels/passes.c,$(SOURCES))

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast peers accuracy readme lint sanitize self-check wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# The environment, with cbn installed in place and compiled. One stamp an extra, so that a target installs just what
# it needs; touched sources compile again.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "setuptools>=77,<84" "cython>=3.3.1,<3.4" "numpy>=2.0,<3"
	@touch $@

$(VENV)/.built: $(VENV)/.created $(SOURCES)
	@echo "compiling cbn"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.with-%: $(VENV)/.built
	@echo "installing what '$*' needs"
	@$(BIN)/python -m pip install -q --no-build-isolation -e ".[$*]"
	@touch $@

demo: $(VENV)/.with-examples ## train and infer on real data; tables and pictures in examples/out
	$(BIN)/python -m examples

test: $(VENV)/.with-test $(VENV)/.with-examples ## every test but those of other packages
	$(BIN)/python -m pytest

test-fast: $(VENV)/.with-test ## the tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow" --ignore=tests/test_examples.py

peers: $(VENV)/.with-test $(VENV)/.with-peers ## the tests against PyTorch and ONNX
	$(BIN)/python -m pytest tests/peers

accuracy: $(VENV)/.with-peers ## largest errors against float64, beside PyTorch's
	$(BIN)/python -m benchmarks.accuracy

readme: accuracy demo ## measure again what README.md shows, and put it there
	$(BIN)/python docs/update_readme.py

lint: $(VENV)/.with-lint ## ruff, cython-lint, mypy, and our C without warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint cbn
	$(BIN)/mypy
	CBN_WERROR=1 $(BIN)/python setup.py -q build_ext --force -t build/lint -b build/lint

sanitize: $(VENV)/.with-test ## the kernels' tests under the address and undefined-behaviour sanitizers
	CBN_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --force -t build/sanitize -b build/sanitize
	cp -r cbn/*.py build/sanitize/cbn/ && cp cbn/kernels/*.py* build/sanitize/cbn/kernels/
	cp -r tests conftest.py pyproject.toml build/sanitize/
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  ../../$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_kernels.py tests/test_accuracy.py tests/test_functional.py

self-check: $(VENV)/.built ## what this build is, and every instruction set against the reference
	$(BIN)/python -m cbn

wheel: $(VENV)/.created ## a source distribution and a wheel, in dist
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist cbn.egg-info examples/out cbn/kernels/passes.c cbn/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
