# make reproduce   the comparison on real experts, one seed: at most 20 minutes from nothing on 2 cores
# make test        environment, lint and tests, as CI runs them
# make sweep       every method, full and LoRA, three seeds: what results/embedded_text is made of
# make tables      results/ from the records of the runs
# make bench       time and memory of every method beside textbook code
# make bench-gpu   the same on a GPU, in at most 6 minutes
PYTHON ?= python3.11
SUITE ?= embedded_text
SEEDS ?= 0,1,2
JOBS ?= 2
# runs of a sweep in parallel processes, e.g. LAUNCHER="hydra/launcher=joblib hydra.launcher.n_jobs=4"
LAUNCHER ?=
RUN := .venv/bin/python -m experiments

.PHONY: reproduce test sweep tables bench bench-gpu clean

# Made anew only when pyproject.toml asks for something else.
.venv/.ready: pyproject.toml
	@echo "setting up .venv: torch, transformers, lm-eval and what else pyproject.toml names; minutes, once"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off --editable ".[all,test]" \
		| grep --line-buffered -E "^(Collecting|Installing|Successfully)" | cut -c1-100
	@.venv/bin/python -c "import torch, hydra" # grep hides whether pip failed
	touch $@

reproduce: .venv/.ready
	$(RUN).run sweep=core suite=$(SUITE)
	$(RUN).tables suite=$(SUITE) finetuning=full seeds=[0] committed=null output=runs/results against=results

test: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS)

sweep: .venv/.ready
	$(RUN).run sweep=all suite=$(SUITE) seed=$(SEEDS) finetuning=full,lora $(LAUNCHER)

tables: .venv/.ready
	$(RUN).tables suite=$(SUITE)

bench: .venv/.ready
	$(RUN).bench

bench-gpu: .venv/.ready
	$(RUN).bench.gpu

clean:
	rm -rf .venv build runs .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
