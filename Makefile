# Two commands from a fresh clone: `make demo` and `make test`.  Each makes what it needs first; see CONTRIBUTING.md.
PYTHON        ?= python3
VENV          ?= .venv
CONSTRAINTS   ?= -c constraints.txt
# A Python >= 3.12 for `make test-arviz1`; empty: the first that .ci/find-python finds.
ARVIZ1_PYTHON ?=
ARVIZ1_VENV   ?= .venv-arviz1
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

.PHONY: setup demo demo-page landscape bench test test-compiled test-machines fuzz lint test-arviz1 docs clean

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

clean:
	rm -rf $(VENV) $(ARVIZ1_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
