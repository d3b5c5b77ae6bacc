# make demo   see it learn Shakespeare      make test    all checks      make lab   the lessons in JupyterLab
# make docs   API pages in site/            make bundle  the course for a classroom without network, in dist/bundle
# make bench  beside PyTorch, as ratios (installs the extra `parity`, which is large)
PYTHON ?= python3
VENV ?= .venv
# make test EXTRAS=dev,mpi (on a fresh .venv) runs the tests under MPI too
EXTRAS ?= dev
BIN := $(VENV)/bin
PARTS := accounting autograd config data generation gradcheck hardware model ops parallel plots pretrained quant train

.PHONY: demo test lab docs bundle bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m minidsv3 demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest

lab: $(VENV)/.installed-lab
	$(BIN)/jupyter lab notebooks/

docs: $(VENV)/.installed-docs
	$(BIN)/pdoc --docformat numpy --math --output-directory site minidsv3 $(addprefix minidsv3.,$(PARTS))

bundle: $(VENV)/.installed-lab
	$(BIN)/python notebooks/make_bundle.py dist/bundle
	$(BIN)/python notebooks/make_bundle.py dist/bundle --check

bench: $(VENV)/.installed-parity
	for b in step decode fp8 parallel; do $(BIN)/python tests/benchmarks/bench_$$b.py || exit 1; done
	$(BIN)/python tests/benchmarks/bench_step.py --kernel auto --threads 2
	$(BIN)/python tests/benchmarks/bench_step.py --growth

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[parity]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs,mpi]"
	touch $@

$(VENV)/.installed-lab: $(VENV)/.installed requirements.txt
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
