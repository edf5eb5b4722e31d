# Everything runs from .venv, made here from python3 and venv; the second time it is there already.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TYPED := traces replayers reports harness
MYPYROOT := .venv/mypyroot

.PHONY: demo test check test-real

demo: $(READY)
	@$(BIN)/keepwarm demo

test: $(READY)
	@$(BIN)/pytest

# The real Claude Code, Codex and AIPerf, the vendors' own packages, Dynamo and vLLM, installed when they are absent.
# All but vLLM run in make test too, where they are there.
test-real: $(READY)
	@PYTHON=$(BIN)/python tests/real/install.sh all
	@KEEPWARM_REAL=1 $(BIN)/pytest -rs tests/test_real_*.py

# The packages lie at the root but are imported as keepwarm.*: mypy sees them through links.
check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(MYPYROOT)/keepwarm
	@for name in $(TYPED); do ln -sfn ../../../$$name $(MYPYROOT)/keepwarm/$$name; done
	@cd $(MYPYROOT) && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache --strict \
		--namespace-packages --explicit-package-bases $(TYPED:%=-p keepwarm.%)
	@cd $(MYPYROOT) && MYPYPATH=../../benchmarks:../../tests ../bin/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --namespace-packages --explicit-package-bases ../../benchmarks/*.py
	@$(BIN)/pytest tests/test_layers.py

$(READY): pyproject.toml constraints.txt
	@echo "keepwarm: setting up .venv (once)" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
