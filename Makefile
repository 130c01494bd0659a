# What comes before Snakemake exists: the environment. Everything else is a Snakemake target.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench clean

demo: $(READY)  ## Run the demo study to its report. OVERLAY=FILE changes some of its keys.
	@$(BIN)/snakemake --quiet host rules reason --resources mem_mb=9000 \
		--configfile config/config.yaml $(OVERLAY)
	@cat results/studies/demo/report/summary.txt

test: $(READY)  ## All tests that this machine can run.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## Format, lint and types.
	$(BIN)/ruff format --check src tests bench envs workflow/scripts
	$(BIN)/ruff check src tests bench envs workflow/scripts
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy

bench: $(READY) bench/.venv/.ready  ## Cost of scoring, beside other libraries. BENCH="--only ...".
	$(BIN)/python -m bench $(BENCH)

bench/.venv/.ready: bench/requirements.txt
	@echo "building the environment of the compared libraries in bench/.venv (a minute, once)"
	@$(PYTHON) -m venv bench/.venv
	@bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

$(READY): $(addprefix envs/,install.sh lock.txt hashes.txt models.txt) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "building the environment in $(VENV) from envs/lock.txt (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@sh envs/install.sh $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:  ## Remove the environment; results stay.
	rm -rf $(VENV)
