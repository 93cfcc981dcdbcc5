# Every target sets up .venv by itself when it is missing or older than pyproject.toml.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check fix speedrun bench docs clean

demo: .venv/ready  ## complete a function and fill a gap with the shipped model
	@$(BIN)/codellama demo

test: .venv/ready-dev  ## all tests that need neither network nor GPU
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: .venv/ready-dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

fix: .venv/ready-dev  ## apply what the formatter and the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

speedrun: .venv/ready  ## from raw source code to a trained tiny model, about two hours on two cores
	$(BIN)/codellama run recipes/tiny.toml

bench: .venv/ready-dev  ## speed beside other implementations; half an hour on an idle machine
	for name in train_step generate engine_guesses engine_long_context sandbox serve; do \
		$(BIN)/codellama bench $$name || exit 1; done

docs: .venv/ready-dev  ## regenerate docs/cli.md
	$(BIN)/python docs/make_cli.py

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches; work/ stays
	rm -rf .venv .pytest_cache .ruff_cache
