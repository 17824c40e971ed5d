# Two commands from a fresh clone: `make demo` and `make test`.  Each makes what it needs first; see CONTRIBUTING.md.
PYTHON        ?= python3
VENV          ?= .venv
CONSTRAINTS   ?= -c constraints.txt
# A Python >= 3.12 for `make test-arviz1`; empty: the first that .ci/find-python finds.
ARVIZ1_PYTHON ?=
ARVIZ1_VENV   ?= .venv-arviz1
# `make test-lowest`: PyPI's torch of then is a CUDA build, 5 GB installed; LOWEST_TORCH= names another torch beside the lowest rest.
LOWEST_VENV   ?= .venv-lowest
LOWEST_TORCH  ?= $(shell sed -n 's/^torch==//p' constraints-lowest.txt)
BIN            = $(VENV)/bin

# Processes of `make test`, one thread each; 0: no other process than pytest's own.
TEST_PROCESSES ?= 2

export MPLBACKEND ?= Agg

# The site: where it goes, and how many pages are run at once.
DOCS_OUT  ?= build/docs
DOCS_JOBS ?= 2
# --no-run: without pictures, in seconds; `make test` compares the outputs too.
DOCS_FLAGS ?=

# Odd inputs of `make fuzz`; `make test` takes 500.
EXAMPLES ?= 10000
# What `make test-machines` runs: the tests that stand on numbers that another processor may round otherwise.
NUMERICAL = tests/numerics tests/priors tests/likelihoods tests/models tests/guides tests/verbs/test_units.py \
            tests/verbs/test_identities.py tests/verbs/test_exact_fits.py tests/fitting/test_whitened.py tests/strategies/test_certificate.py
# What `make test-lowest` runs: where torch's graphs, tables, arrays, files and figures are used.
CORE = tests/graphs tests/numerics tests/tasks tests/models tests/posteriors tests/plot tests/test_packaging.py

.PHONY: setup demo demo-page landscape bench test test-compiled test-machines fuzz lint test-arviz1 test-wheel test-lowest \
        dist docs clean

setup: $(VENV)/.installed

# The stamp is touched last, so an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.demo --out results/demo

landscape: $(VENV)/.installed
	$(BIN)/python -m experiments.landscape --out results/landscape

# Beside the peers that are installed: pip install -e '.[bench]' first.  Hours in full size.
bench: $(VENV)/.installed
	$(BIN)/python -m experiments.benchmarks --out results/benchmarks

# Put the demonstration's output into docs/demo.md.
demo-page: $(VENV)/.installed
	$(BIN)/python -m experiments.demo --out results/demo | $(BIN)/python -m experiments.demo_page

# The site in docs/, every block of it run and its outputs compared; nothing is fetched.
docs: $(VENV)/.installed
	$(BIN)/python -m docs.site.build --out $(DOCS_OUT) --jobs $(DOCS_JOBS) $(DOCS_FLAGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# Compiled against eager for every strategy, guide and dtype: each case waits for the compiler, most of an hour on two cores.
test-compiled: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m compiled tests/fitting/test_compiled_step.py

# The numerical tests as on other machines: other vector units, another BLAS path, two threads.
test-machines: $(VENV)/.installed
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) $(NUMERICAL)
	VARMETA_THREADS=2 $(BIN)/python -m pytest -q $(NUMERICAL)

# Odd inputs against independent answers: right, or a sentence.  Half an hour or more.
fuzz: $(VENV)/.installed
	VARMETA_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --hypothesis-show-statistics tests/fuzz

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The export under ArviZ 1.x, which needs Python >= 3.12: an environment of its own, without torch.
test-arviz1:
	@python="$(ARVIZ1_PYTHON)"; \
	test -n "$$python" || python="$$(.ci/find-python 12)" || \
	  { echo "test-arviz1 not run: no working Python >= 3.12 here; name one by ARVIZ1_PYTHON=/path/to/python"; exit 0; }; \
	$(MAKE) -s --no-print-directory $(ARVIZ1_VENV)/.installed ARVIZ1_PYTHON="$$python" && \
	$(ARVIZ1_VENV)/bin/python -m pytest -o addopts= tests/posteriors/test_arviz.py

$(ARVIZ1_VENV)/.installed: constraints-arviz1.txt
	$(ARVIZ1_PYTHON) -m venv $(ARVIZ1_VENV)
	$(ARVIZ1_VENV)/bin/python -m pip install -q -c constraints-arviz1.txt 'arviz[h5netcdf,matplotlib]>=1' pytest
	touch $@

# The core beside the oldest versions that pyproject.toml allows; they warn of each other, so warnings are no errors here.
test-lowest: $(LOWEST_VENV)/.installed-$(LOWEST_TORCH)
	$(LOWEST_VENV)/bin/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal -o filterwarnings= \
	  -m 'not slow and not compiled' $(CORE)

$(LOWEST_VENV)/.installed-$(LOWEST_TORCH): pyproject.toml constraints-lowest.txt
	rm -rf $(LOWEST_VENV)
	$(PYTHON) -m venv $(LOWEST_VENV)
	sed 's/^torch==.*/torch==$(LOWEST_TORCH)/' constraints-lowest.txt > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install -q -c $(LOWEST_VENV)/constraints.txt -e '.[test]'
	touch $@

# What goes to an index: the sdist, and the wheel made of it as pip makes one.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m hatchling build -t sdist
	$(BIN)/python -m pip wheel -q $(CONSTRAINTS) --no-deps -w dist dist/*.tar.gz

# As a user has it: both looked into, the wheel alone in a new environment, and the README run there, outside the checkout.
test-wheel: dist
	VARMETA_DIST=dist $(BIN)/python -m pytest -q tests/test_packaging.py
	place="$$(mktemp -d)" && trap 'rm -rf "$$place"' EXIT && \
	$(PYTHON) -m venv "$$place/venv" && \
	"$$place/venv/bin/python" -m pip install -q $(CONSTRAINTS) dist/*.whl && \
	"$$place/venv/bin/python" -m pip check && \
	tar -xzf dist/*.tar.gz -C "$$place" --strip-components=1 --exclude='*/varmeta' && \
	cd "$$place" && venv/bin/python -m tests.installed

clean:
	rm -rf $(VENV) $(ARVIZ1_VENV) $(LOWEST_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
