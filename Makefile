PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check slow versions clean

.venv/done: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	command -v uv >/dev/null || $(BIN)/pip install -q uv
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install -q --compile-bytecode -e ".[dev]"
	touch $@

demo: .venv/done
	$(BIN)/python tools/demo.py

# the tests of a file are one worker's, so that what its fixtures train is trained once
PARALLEL := -n auto --dist loadfile

test: .venv/done
	$(BIN)/python -m pytest $(PARALLEL)

check: .venv/done
	$(BIN)/ruff check .
	$(BIN)/mypy rep_backbones
	$(BIN)/python -m pytest $(PARALLEL)

slow: .venv/done
	$(BIN)/python -m pytest -m slow

# the adapter's tests on other releases of Ultralytics, each in a folder of its own in front of the installed one
# their own warnings about newer libraries are no errors there
RELEASES := 8.3.252 8.4.100
ADAPTER := $(wildcard tests/test_yolo_*.py tests/test_checkpoint*.py) tests/test_models.py tests/test_rep_yolo.py \
	tests/test_training.py tests/test_tasks.py tests/test_recipes.py tests/test_machines.py \
	tests/test_branch_log.py tests/test_fuse_export.py tests/test_report.py \
	tests/test_samples.py tests/test_formats.py tests/test_backends.py tests/test_demo.py

.versions/%: .venv/done
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install -q --no-deps --target $@ ultralytics==$*

versions: $(RELEASES:%=.versions/%)
	VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install -q scipy  # which 8.3.252 needs, and the latest not
	for release in $(RELEASES); do PYTHONPATH=.versions/$$release $(BIN)/python -m pytest $(PARALLEL) -W default $(ADAPTER) || exit 1; done
	$(BIN)/python -m pytest $(PARALLEL) $(ADAPTER)

clean:
	rm -rf .venv .versions build dist *.egg-info
