# Needs Python 3.11 or newer, make, and PyPI for the first run. Everything lives in .venv beside this file.
#
# Paths in here are relative on purpose: make cannot handle a folder with a space in its name in any other way.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
PY := .venv/bin/python

# The name says which folder the environment was made for: its scripts do not survive a move or a copy.
STAMP := .venv/.ready-$(shell pwd | cksum | cut -d ' ' -f 1)

# MLX has an environment of its own: its hundreds of megabytes are for those who test that engine.
MLX_PY := .venv-mlx/bin/python
MLX_STAMP := .venv-mlx/$(notdir $(STAMP))

# So has atheris, which the other tests do not need.
FUZZ_PY := .venv-fuzz/bin/python
FUZZ_STAMP := .venv-fuzz/$(notdir $(STAMP))

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(STAMP) ## 4 ranks, a real server, one rank held back: watch the barrier wait for it
	.venv/bin/rankgate up --world-size 4 --hold-back 3:2 --prompt "Why do all ranks have to wait for one another?"

.PHONY: race
race: $(STAMP) ## the race that this project ends, side by side and for real
	.venv/bin/rankgate race

.PHONY: test
test: $(STAMP) ## the quick tests, the wheel's included (ARGS="-k name" for some of them)
	RANKGATE_DEPTH=quick $(PY) -m pytest -n $(or $(WORKERS),auto) -m "not redis and not slow and not bench and not mlx and not compose" $(ARGS)

.PHONY: test-depth
test-depth: $(STAMP) ## the tests that draw random examples, with all of their examples; make test plays an eighth of them
	$(PY) -m pytest -n $(or $(WORKERS),auto) -m "not redis and not slow and not bench and not mlx and not compose" $(ARGS) \
	    tests/property tests/fuzz tests/unit/runner/test_runner_endurance.py

.PHONY: coverage
coverage: $(STAMP) ## the quick tests, and how much of the code they reach, branches included; fails below the floor in pyproject.toml
	RANKGATE_DEPTH=quick $(PY) -m pytest -n $(or $(WORKERS),auto) \
	    -m "not redis and not slow and not bench and not mlx and not compose" --cov --cov-report=term $(ARGS)

.PHONY: matrix
matrix: $(STAMP) ## the unit tests on the newest Python that is here, and on the oldest packages that pyproject.toml allows
	$(PY) -m tests.matrix

.PHONY: simulate
simulate: $(STAMP) ## random histories of the real code under faults (SEED=7 replays and prints one, SEED="0 5000" plays many)
	$(PY) -m tests.simulation $(or $(SEED),0 500) $(ARGS)

.PHONY: chaos
chaos: $(STAMP) ## real processes on real servers, broken at random (SECONDS=900 SEED=7); needs root and Debian's Redis
	$(PY) -m tests.chaos --seconds $(or $(SECONDS),120) --seed $(or $(SEED),1) $(ARGS)

.PHONY: compose-test
compose-test: $(STAMP) ## the docker-compose cluster under faults, with real containers; needs Docker (.ci/compose brings its own)
	$(PY) -m pytest -m compose -o faulthandler_timeout=600 $(ARGS) tests/compose

.PHONY: mutants
mutants: $(STAMP) ## take each guard out and show which search misses it (MUTANT=gate-epoch for one; ten minutes for all with ARGS="--jobs 2")
	$(PY) -m tests.mutants $(MUTANT) $(ARGS)

.PHONY: fuzz
fuzz: $(FUZZ_STAMP) ## foreign bytes for every decoder and live garbage for a running cluster (SECONDS=120)
	$(PY) -m tests.fuzz --seconds $(or $(SECONDS),120) --guided $(FUZZ_PY)

.PHONY: exhaustive
exhaustive: $(STAMP) ## every interleaving of ranks, planners and faults within bounds (ARGS=--help for deeper ones)
	$(PY) -m tests.exhaustive $(ARGS)

.PHONY: searches
searches: $(STAMP) ## exhaustive, and 5,000 seeds of simulate: what .ci/run plays
	$(PY) -m tests.exhaustive --jobs $(or $(JOBS),2)
	$(PY) -m pytest -s -m slow -o faulthandler_timeout=900 tests/simulation

.PHONY: test-mlx
test-mlx: $(MLX_STAMP) ## the MLX engine's tests with a real model, in an environment of their own
	$(MLX_PY) -m pytest -m mlx $(ARGS) tests/mlx

.PHONY: test-mlx-rounds
test-mlx-rounds: $(MLX_STAMP) ## two instances side by side, killed and left-over engines: whose text is it? (ROUNDS=20 SEED=1)
	ROUNDS=$(or $(ROUNDS),20) SEED=$(or $(SEED),1) $(MLX_PY) -m pytest -s -m mlx -o faulthandler_timeout=3600 \
	    $(ARGS) tests/mlx/test_mlx_attempts.py

.PHONY: lint
lint: $(STAMP) ## ruff, pyright, what a user's type checker knows of our types, the import contracts and the dependencies
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	@for package in barrier runner planner; do \
	    found=$$(PATH=".venv/bin:$$PATH" .venv/bin/pyright --verifytypes $$package --ignoreexternal) \
	        || { printf '%s\n' "$$found"; exit 1; }; \
	    printf '%s\n' "$$found" | sed -n "s/^Type completeness score/&, $$package/p"; \
	done
	.venv/bin/lint-imports
	.venv/bin/deptry .

.PHONY: bench
bench: $(STAMP) ## the benchmarks
	$(PY) -m pytest -m "bench and not mlx" -s $(ARGS)

.PHONY: bench-mlx
bench-mlx: $(MLX_STAMP) ## how long two MLX ranks are away when one engine is killed, by what they do meanwhile
	$(MLX_PY) -m pytest -m bench -s $(ARGS) tests/benchmarks/test_mlx_recovery.py

.PHONY: picture
picture: $(STAMP) ## draw docs/imports.md, who imports what, from the code
	$(PY) -m tests.pictures.imports

.PHONY: recording
recording: $(STAMP) ## record docs/recording.svg, the terminal in the README, from the real command
	$(PY) -m tests.pictures

.PHONY: wheel
wheel: $(STAMP) ## build dist/rankgate-*.whl
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: release-check
release-check: $(STAMP) ## whether this may be released: what is built, what an index would show, the wheel's tests, the changelog
	$(PY) -m tests.release

.PHONY: venv
venv: $(STAMP) ## make or renew .venv, if pyproject.toml or constraints.txt changed

# Where PyPI is out of reach, `touch` this file after installing by hand.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! .venv/bin/python -c 'import pip' 2>/dev/null || { ls .venv/.ready-* >/dev/null 2>&1 && [ ! -e $(STAMP) ]; }; then \
	    found=; seen=; \
	    for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python); do \
	        version=$$("$$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue; \
	        if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            found=$$candidate; break; \
	        fi; \
	        seen="$${seen:+$$seen, }$$candidate ($$version)"; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "rankgate needs Python 3.11 or newer with its venv module (on Debian: apt-get install python3-venv), and found $${seen:-no Python at all}: name one with make PYTHON=/path/to/python3." >&2; \
	        exit 1; \
	    fi; \
	    echo "Making .venv with $$found ($$version) …"; \
	    "$$found" -m venv --clear .venv; \
	fi; \
	echo "Installing rankgate and what its development needs into .venv (about a minute the first time) …"; \
	$(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[dev]'; \
	touch $(STAMP)

$(MLX_STAMP): pyproject.toml constraints.txt | $(STAMP)
	@echo "Installing MLX and what its tests need into .venv-mlx (some 150 MB to download) …"
	@$(PY) -m venv --clear .venv-mlx
	@$(MLX_PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	    --editable '.[cli,mlx,testing]' anyio psutil pytest
	@touch $(MLX_STAMP)

$(FUZZ_STAMP): pyproject.toml constraints.txt | $(STAMP)
	@echo "Installing atheris and what is fuzzed into .venv-fuzz (some 60 MB to download) …"
	@$(PY) -m venv --clear .venv-fuzz
	@$(FUZZ_PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	    --editable '.[cli,testing]' atheris
	@touch $(FUZZ_STAMP)

.PHONY: lock
lock: ## renew constraints.txt and the image's lock files with the newest versions that pyproject.toml allows
	@set -e; room=$$(mktemp -d); trap 'rm -rf "$$room"' EXIT; \
	$(PY) -m venv "$$room"; \
	"$$room/bin/python" -m pip --disable-pip-version-check install --quiet '.[dev]'; \
	{ sed -n '/^#/p' constraints.txt; "$$room/bin/python" -m pip freeze --exclude rankgate; } >"$$room/constraints.txt"; \
	cp "$$room/constraints.txt" constraints.txt; \
	"$$room/bin/python" -m pip --disable-pip-version-check install --quiet uv; \
	lock="$$room/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --constraint constraints.txt"; \
	echo hatchling | $$lock --output-file deploy/build.lock -; \
	$$lock --extra cli --output-file deploy/requirements.lock pyproject.toml

.PHONY: clean
clean: ## remove what these targets made, .venv included
	rm -rf .venv .venv-mlx .venv-fuzz dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache bench-results .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
