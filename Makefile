# Everything works from a fresh clone with Python >= 3.11 and make: each target makes the environment it needs.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$p && break; done)
TORCH = torch==2.13.0
PEFT = peft==0.21.2
ENV = .venv/installed
RUN = .venv/bin/python -m
# The targets are sized for a CPU, and with libtpu installed jax would look for a TPU first.
export JAX_PLATFORMS ?= cpu

.PHONY: help venv test test-tpu test-torch demo demo-full lint bench clean test-browser test-slow

help:
	@echo "make test        the tests (8 simulated CPU devices)"
	@echo "make demo        train, evaluate and fit a grid of small models; leaves runs/demo/report/index.html"
	@echo "make demo-full   the larger grid: hours, can be stopped and continued"
	@echo "make test-tpu    what the TPU compiler says; needs no TPU (installs libtpu)"
	@echo "make test-torch  comparisons with PyTorch (installs $(TORCH), $(PEFT))"
	@echo "make bench       training steps, compressors and generation against PyTorch (installs $(TORCH))"
	@echo "make lint        ruff"
	@echo "make venv        .venv with every extra that runs on a CPU; the targets above call it"
	@echo "make clean       removes .venv and caches, never runs/"

venv: $(ENV)

# The file marks a finished installation: an interrupted one starts again, a changed setup.py too.
$(ENV): setup.py
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found; say where it is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -e '.[test,report,demo,tensorboard]'
	@touch $@

# Compilation keeps one core busy: two processes take three fifths of the time of one.
test: $(ENV)
	$(RUN) pytest --numprocesses=2 --dist=loadfile --durations=10

# pytest ends with 5 when no test carries the marker: said plainly, and no failure.
define marked_tests
$(RUN) pytest -m $(1) --durations=10 || { code=$$?; \
	if [ $$code = 5 ]; then echo "no test is marked $(1) in this version"; else exit $$code; fi; }
endef

test-tpu: $(ENV)
	$(RUN) pip install --quiet --disable-pip-version-check -e '.[aot]'
	$(call marked_tests,tpu_compiler)

test-torch: $(ENV) .venv/torch .venv/peft
	$(call marked_tests,torch)

.venv/torch: $(ENV)
	$(RUN) pip install --quiet --disable-pip-version-check '$(TORCH)'
	@touch $@

.venv/peft: .venv/torch
	$(RUN) pip install --quiet --disable-pip-version-check '$(TORCH)' '$(PEFT)'
	@touch $@

# Checks of the report in Chromium (Debian: chromium) and the long coverage study of the intervals.
test-browser test-slow: test-%: $(ENV)
	$(call marked_tests,$*)

demo: $(ENV)
	.venv/bin/vlm-jax grid --config=configs/demo.py --workdir=runs/demo
	@echo "open runs/demo/report/index.html"

demo-full: $(ENV)
	.venv/bin/vlm-jax grid --config=configs/demo_full.py --workdir=runs/demo_full
	@echo "open runs/demo_full/report/index.html"

lint: $(ENV)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

bench: $(ENV) .venv/torch
	.venv/bin/python benchmarks/train_step.py
	.venv/bin/python benchmarks/compressors.py
	.venv/bin/python benchmarks/generation.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
