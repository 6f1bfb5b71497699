# Two commands: `make demo` does the main job, `make test` runs the tests. Each installs what it needs into .venv, in the
# versions of lock.txt (and torch's of constraints.txt), which are those that were tested.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A worker a core, and one thread each: the tests' tensors are too small to share.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test contract slow soak lint lock compat compat-lowest compat-newest bench matrix clean

demo: .venv/.demo
	$(BIN)/python examples/assets.py
	$(BIN)/lightning-peft fit --config configs/quickstart.yaml
	$(BIN)/lightning-peft test --config configs/quickstart.yaml --ckpt_path checkpoints/quickstart/best.ckpt
	$(BIN)/python examples/summary.py

test: .venv/.test
	$(PYTEST) -m "not slow and not soak"

# All that a method must hold, for the methods of one file: make contract METHOD=examples/first_method.py
contract: .venv/.test
	@test -n "$(METHOD)" || { echo "Say which file: make contract METHOD=path/to/your_file.py"; exit 2; }
	METHOD=$(abspath $(METHOD)) $(PYTEST) tests/conformance -k "not matrix and not families"

# Real models and long runs, and a fixed tenth of what `make soak` has.
slow: .venv/.test
	$(PYTEST) -m slow

# The whole grid, hours of faults, thousands of files, and the oldest dependencies: by hand.
soak: .venv/.test compat-lowest
	$(PYTEST) -m soak

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.demo .venv/.test .venv/.dev: .venv/.%: pyproject.toml constraints.txt lock.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -c lock.txt hatchling editables
	$(BIN)/python $(PIP) -c lock.txt --no-build-isolation -e '.[$*]'
	@touch $@

# What resolves today, for the extras demo, test and dev. pip needs nothing of the old lock for it.
lock:
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python .ci/versions.py lock

# A part of the tests with the oldest and with the newest dependencies that pyproject.toml allows.
compat: compat-lowest compat-newest

compat-lowest compat-newest: compat-%:
	$(PYTHON) -m venv .venv/$*
	$(PYTHON) .ci/versions.py $* > .venv/$*/constraints.txt
	.venv/$*/bin/python $(PIP) --upgrade --upgrade-strategy eager -c .venv/$*/constraints.txt -e '.[test]'
	$(subst $(BIN),.venv/$*/bin,$(PYTEST)) -m compat -p no:cacheprovider

bench: .venv/.test
	$(BIN)/python -m tests.benchmarks --quick
	$(BIN)/python -m tests.benchmarks.mixed_batches --repeats 5
	$(BIN)/python -m tests.benchmarks.serving --rounds 3

matrix: .venv/.test
	cd tests && ../$(BIN)/python -m conformance.matrix --write

clean:
	rm -rf .venv .cache checkpoints lightning_logs
