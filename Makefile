PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check slow clean

.venv/done: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	command -v uv >/dev/null || $(BIN)/pip install -q uv
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install -q -e ".[dev]"
	touch $@

demo: .venv/done
	$(BIN)/python tools/demo.py

test: .venv/done
	$(BIN)/python -m pytest

check: .venv/done
	$(BIN)/ruff check .
	$(BIN)/mypy rep_backbones
	$(BIN)/python -m pytest

slow: .venv/done
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv build dist *.egg-info
