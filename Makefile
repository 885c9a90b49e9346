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
cuda_checks := tests/test_cuda_sources.py tests/test_cuda_emulation.py
apart := $(addprefix --ignore=,$(native_tests) $(cuda_checks))

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test lint native-tests cuda-check python-tests bench cuda-verify cuda-tests cuda-bench wheel build clean
.DELETE_ON_ERROR:

demo: build
	$(python) examples/demo.py

# Fastest first, so that a slip shows in seconds.
test: lint native-tests cuda-check python-tests

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m mypy

native-tests: build
	$(python) -m pytest -q $(native_tests)

# All CUDA code through nvcc for every architecture, and its logic on a model of a GPU: skipped where there is no nvcc,
# unless TORCH_BN_REQUIRE_NVCC=1.
cuda-check: build
	$(python) -m pytest -q $(cuda_checks)

# Everything on the best CPU table of this machine, then on each other table the tests that its kernels could fail.
python-tests: build
	tables=$$($(python) -c "import torch_bn; print(*torch_bn.build_info()['cpu_tables'])"); test -n "$$tables" || exit 1; \
	for table in $$tables; do \
		echo "TORCH_BN_CPU=$$table pytest $$selected"; \
		TORCH_BN_CPU=$$table $(python) -m pytest -q $(apart) $$selected || exit 1; \
		selected="-m kernels"; \
	done

bench: build
	$(python) -m benchmarks
	$(python) -m benchmarks.features
	$(python) -m benchmarks.fused
	$(python) -m benchmarks.network
	$(python) -m benchmarks.inplace

# On a machine with a GPU, as one command or in its two parts. Nothing is installed, as such machines often have no
# network: make cuda-verify VENV=/path/to/environment, with torch and most of requirements-dev.txt in it.
cuda-verify: cuda-tests cuda-bench

cuda-tests:
	$(python) setup.py -q build_ext --inplace
	TORCH_BN_REQUIRE_CUDA=1 $(python) -m pytest -q tests/test_cuda.py -k "not sanitizer"
	TORCH_BN_TEST_DEVICE=cuda $(python) -m pytest -q -m kernels $(apart)
	TORCH_BN_REQUIRE_CUDA=1 $(python) -m pytest -q -k "[cuda or -cuda" $(apart) --ignore=tests/test_cuda.py
	TORCH_BN_REQUIRE_CUDA=1 $(python) -m pytest -q tests/test_cuda.py -k sanitizer

cuda-bench:
	$(python) setup.py -q build_ext --inplace
	$(python) -m benchmarks.cuda

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
