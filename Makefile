# `make demo` trains a CNN on images, `make test` checks everything. Both need only Python, a C++ compiler and make: they
# create .venv, install what requirements-dev.txt pins, and build the extension in place. A second call repeats none of it.
#
#   make test PYTHON=python3.12        the Python that .venv is made with (3.10 or newer)
#   make test TORCH=torch==2.12.0      the torch to install; one that the environment already has stays
#   make test VENV=$VIRTUAL_ENV        an environment of yours in place of .venv

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

python := $(VENV)/bin/python
installed := $(VENV)/.torch_bn-installed
extension := torch_bn/_built_for.txt
native_tests := tests/test_build.py tests/test_cpp.py

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test lint native-tests python-tests bench wheel build clean
.DELETE_ON_ERROR:

demo: build
	$(python) examples/demo.py

# Fastest first, so that a slip shows in seconds.
test: lint native-tests python-tests

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m mypy

native-tests: build
	$(python) -m pytest -q $(native_tests)

# Everything on the best CPU table of this machine, then on each other table the tests that its kernels could fail.
python-tests: build
	tables=$$($(python) -c "import torch_bn; print(*torch_bn.build_info()['cpu_tables'])"); test -n "$$tables" || exit 1; \
	for table in $$tables; do \
		echo "TORCH_BN_CPU=$$table pytest $$selected"; \
		TORCH_BN_CPU=$$table $(python) -m pytest -q $(native_tests:%=--ignore=%) $$selected || exit 1; \
		selected="-m kernels"; \
	done

bench: build
	$(python) -m benchmarks
	$(python) -m benchmarks.features

wheel: build
	$(python) -m build --no-isolation

build: $(extension)

$(extension): $(installed) setup.py torch_bn/_build.py $(shell find csrc -type f)
	$(python) setup.py -q build_ext --inplace

# The .pth line is what an editable install comes down to; pip's own would compile everything anew at each change.
$(installed): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("torch_bn needs Python 3.10 or newer: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -c 'import torch' 2>/dev/null || $(python) -m pip install '$(TORCH)'
	$(python) -m pip install -r requirements-dev.txt
	echo "$(CURDIR)" > "$$($(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_bn-checkout.pth"
	touch $@

clean:
	rm -rf build dist *.egg-info torch_bn/_C*.so $(extension) .mypy_cache .pytest_cache .ruff_cache .hypothesis
