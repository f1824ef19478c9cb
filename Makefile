# make demo      train the small sweep, fit the theory, build the page
# make test      lint, types and every test
# make test-portable  the numerical rooms as on other CPUs: by their kernels, on 1 and 2 threads
# make fuzz      100,000 hostile files for every reader: hours; RUNS=1000 for minutes
# make mutants   break each formula of the closed form once; the tests must notice every time
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   ?= 100000
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

NUMERICAL := frequency_bins ufm theory_tests vision_appendix reports \
	$(addprefix llm_experiments/tests/,models training test_audit.py test_recipes.py)

.PHONY: demo test test-portable browser fuzz mutants lint types clean

demo: $(VENV)/installed
	$(BIN)/python -m reports demo

test: $(VENV)/installed-test browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

# Without a name: the kernels that torch and OpenBLAS choose for this CPU. Every two of them meet.
test-portable: $(VENV)/installed-test
	@for setting in "1" "2 OPENBLAS_CORETYPE=Haswell" \
		"1 ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell" "2 ATEN_CPU_CAPABILITY=avx2" \
		"1 ATEN_CPU_CAPABILITY=default" "2 ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Haswell"; do \
		echo "OMP_NUM_THREADS=$$setting"; \
		env -u ATEN_CPU_CAPABILITY -u OPENBLAS_CORETYPE OMP_NUM_THREADS=$$setting \
			$(BIN)/python -m pytest --numprocesses $$((2 / $${setting%% *})) \
			--ignore reports/tests/test_browser.py $(NUMERICAL) || exit 1; \
	done

# The page's tests need Chromium. Where apt-get may not install it they are skipped, and say so.
browser:
	@command -v chromium || command -v chromium-browser || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get && echo "Installing chromium ..." && \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		chromium fonts-dejavu-core >/dev/null; } || \
		echo "no Chromium: the tests of the page in a browser will be skipped"

fuzz: $(VENV)/installed-test
	-$(PIP) --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m run_store.tests.fuzzing --runs $(RUNS) \
		$(addsuffix .fuzz_targets,frequency_bins.tests theory_tests vision_appendix.tests \
		llm_experiments.tests reports.tests)

mutants: $(VENV)/installed-test
	$(BIN)/python -m theory_tests.mutants

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: $(PYTHON) is not here; name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# torch and torchvision are asked for together and unpinned, so that the registry gives a matching
# pair; everything else is held by constraints.txt.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (about 6.5 GB, mostly torch) ..."
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
