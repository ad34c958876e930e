# make run          train the embedded example: a policy learns to search, on a CPU, in minutes
# make test         lint, format check and the fast tests (what CI runs)
# make test-slow    the tests marked slow
# make algorithms   every algorithm on the embedded world, one budget: a table (an hour or two)
# make miniature    the paper's claims on the embedded world: every stage, 3 seeds (some two hours)
# make wikipedia    ten thousand Wikipedia summaries and questions on them, in data/wikipedia
# make tensorboard  curves of everything under runs/
# make smollm2      SmolLM2-135M-Instruct as a Hugging Face directory in models/
# make clean        remove .venv and caches (runs/ and models/ stay)
#
# PYTHON=python3.12 chooses another interpreter; 3.11 and 3.12 are supported.
# ARGS="..." is handed on: make run ARGS="--config.rl.steps=20 --workdir=runs/short"

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/grpo.py
ARGS ?=
CONFIG_SIZE ?=

# The stamps say which requirements are installed, so a second `make run` installs nothing.
STAMP := $(VENV)/.stamp-run
STAMP_TEST := $(VENV)/.stamp-test
STAMP_REPORT := $(VENV)/.stamp-report
STAMP_SMOLLM2 := $(VENV)/.stamp-smollm2
# Once .venv exists its own version counts, whatever PYTHON says.
INTERPRETER := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
VERSION := $(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints-$(VERSION).txt
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# Huge pages for the buffers that XLA allocates anew at every step: a faster step on Linux CPUs.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: run test test-slow algorithms miniature wikipedia tensorboard smollm2 clean python-check

run: $(STAMP)
	$(PY) -m zerosearch_jax.main --config=$(CONFIG) $(ARGS)

test: $(STAMP_TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP_TEST)
	$(PY) -m pytest -m slow $(ARGS)

algorithms: $(STAMP)
	$(PY) -m zerosearch_jax.main --config=configs/algorithms.py $(ARGS)

miniature: $(STAMP_REPORT)
	$(PY) -m zerosearch_jax.main --config=configs/miniature.py$(CONFIG_SIZE) $(ARGS)

wikipedia: $(STAMP)
	$(PY) -m zerosearch_jax.data.build_wikipedia --out data/wikipedia

tensorboard: $(STAMP)
	$(INSTALL) tensorboard
	$(VENV)/bin/tensorboard --logdir runs

smollm2: $(STAMP_SMOLLM2)
	$(PY) -m zerosearch_jax.models.smollm2_gguf --out models/smollm2-135m

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python-check:
	@test -n "$(VERSION)" || { echo "error: '$(PYTHON)' does not run; say PYTHON=python3.11 or python3.12" >&2; exit 2; }
	@test -f "$(CONSTRAINTS)" || { echo "error: Python $(VERSION) is not supported; say PYTHON=python3.11 or python3.12 (after make clean)" >&2; exit 2; }

$(PY): | python-check
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): requirements.txt $(wildcard constraints-*.txt) | python-check $(PY)
	$(INSTALL) -r requirements.txt
	@touch $@

$(STAMP_TEST): requirements-test.txt $(STAMP)
	$(INSTALL) -r requirements-test.txt
	@touch $@

$(STAMP_SMOLLM2): requirements-smollm2.txt $(STAMP)
	$(INSTALL) -r requirements-smollm2.txt
	@touch $@

$(STAMP_REPORT): requirements-report.txt $(STAMP)
	$(INSTALL) -r requirements-report.txt
	@touch $@
