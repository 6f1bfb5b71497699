# Two commands: `make demo` does the main job, `make test` runs the tests. Each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow bench matrix clean

demo: .venv/.installed
	$(BIN)/python examples/assets.py
	$(BIN)/lightning-peft fit --config configs/quickstart.yaml
	$(BIN)/lightning-peft test --config configs/quickstart.yaml --ckpt_path checkpoints/quickstart/best.ckpt
	$(BIN)/python examples/summary.py

test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow"

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

bench: .venv/.installed
	$(BIN)/python -m tests.benchmarks --quick
	$(BIN)/python -m tests.benchmarks.mixed_batches --repeats 5

matrix: .venv/.installed
	cd tests && ../$(BIN)/python -m conformance.matrix --write

clean:
	rm -rf .venv .cache checkpoints lightning_logs
