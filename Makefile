# `make test`, `make book` and `make pages` need Python 3.11 or later and nothing else: everything goes into .venv.
# METATUTOR_DATA (a folder with Omniglot) and METATUTOR_PRESET (fast or full) are taken from your environment.

ifndef PYTHON
PYTHON := $(firstword $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done))
endif
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := build/oldest
OLDEST_PYTHON ?= python3.11
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
LONGEST := $(foreach n,02b 05b 03c 01b 05 08 06 03b,$(wildcard notebooks/$(n)_*.ipynb)) # begun first, so that none is left for the end
EXECUTED := build/executed
SOURCES := $(shell find metatutor results -name '*.py' -o -name '*.html' -o -name '*.css' -o -name '*.js' -o -name '*.json' -o -name '*.safetensors')
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.language_info metadata.colab metadata.accelerator metadata.gpuClass cell.metadata.colab cell.metadata.outputId"
STUDIES ?= comparison lake moved ways transfer classes reinforcement tools recipe splits gaps streams no_convolutions
BENCHMARKS := $(sort $(filter-out benchmarks/harness.py benchmarks/commits.py,$(wildcard benchmarks/[a-z]*.py)))

export METATUTOR_PRESET ?= fast
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait for each other sleep: spinning ones starve those that work where cores are busy.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 1000

NEEDS_PYTHON = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "metatutor needs Python 3.11 or later; install it, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 1; }

.DEFAULT_GOAL := help
.PHONY: help venv test lint types unit oldest notebooks book pages translations links format benchmarks studies tables stamp clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## create .venv with the tested set of packages

$(INSTALLED): requirements.txt pyproject.toml
	@$(NEEDS_PYTHON)
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV) || { echo "$(PYTHON) cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

test: lint ## check style and types, run all tests and every notebook
	@$(MAKE) --no-print-directory --jobs 2 types unit # types take one core
	@$(MAKE) --no-print-directory notebooks

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(STRIP) --verify $(NOTEBOOKS)

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(INSTALLED) ## only the unit tests and the examples in docstrings
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal --durations=10

oldest: $(OLDEST)/.installed ## only the unit tests, with the oldest packages that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -q --numprocesses auto --dist worksteal --durations=10

$(OLDEST)/.installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable '.[chapters,book,dev]'
	@touch $@

notebooks: $(EXECUTED)/.done ## only the notebooks, fast preset, one thread each; what they show is kept for the book

$(EXECUTED)/.done: $(INSTALLED) $(NOTEBOOKS) $(SOURCES)
	@rm -rf $(EXECUTED) && mkdir -p $(EXECUTED) && cp $(NOTEBOOKS) $(EXECUTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider --numprocesses auto --maxschedchunk 1 --nbmake --overwrite --nbmake-timeout=900 --durations=0 $(addprefix $(EXECUTED)/,$(notdir $(LONGEST) $(filter-out $(LONGEST),$(NOTEBOOKS))))
	@touch $@

book: $(EXECUTED)/.done ## build both editions, English and Chinese, of the executed notebooks, warnings being errors
	@$(BIN)/python book/_ext/editions.py sources $(EXECUTED) _build/source
	@$(MAKE) --no-print-directory --jobs 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) edition-en edition-zh
	@$(BIN)/python book/_ext/editions.py site _build
	$(BIN)/python book/_ext/check_pages.py _build/html
	@echo "The book is at file://$(CURDIR)/_build/html/index.html"

pages: $(INSTALLED) ## after `make book`: open every page in a browser, in both languages, light and dark, wide and narrow
	@test -d _build/html || { echo "there are no pages to open; build the book first: make book" >&2; exit 1; }
	$(BIN)/python -m pytest -q -p no:cacheprovider -rs --numprocesses auto tests/book/built_pages.py

edition-%:
	$(BIN)/jupyter-book build --all -n -W --keep-going --path-output _build/$* _build/source/$*

translations: $(EXECUTED)/.done ## after a change of the English: bring the catalogues of the Chinese edition up to date
	@$(BIN)/python book/_ext/editions.py sources $(EXECUTED) _build/source collect
	$(BIN)/jupyter-book build --all --quiet --builder custom --custom-builder dummy --path-output _build/messages _build/source/en
	$(BIN)/python book/_ext/chinese.py update _build/messages/_build/dummy

links: $(INSTALLED) ## check every link of the book (needs the network)
	$(BIN)/jupyter-book build --all --builder linkcheck .

format: $(INSTALLED) ## put code and notebooks into the project's format, and clear outputs
	$(STRIP) $(NOTEBOOKS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(INSTALLED) ## install the peers and print the benchmark tables
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python "$$benchmark" || exit 1; done

studies: $(INSTALLED) ## repeat the recorded studies, which takes hours; some: make studies STUDIES="lake moved"
	@for study in $(STUDIES); do echo "== $$study"; $(BIN)/python studies/$$study.py || exit 1; done

tables: $(INSTALLED) ## fill the tables, the picture and the drawing pads of README.md and the book, from results/ and the code
	@$(BIN)/python book/_ext/readme_tables.py
	@$(BIN)/python book/_ext/readme_picture.py
	@$(BIN)/python book/_ext/alphabet.py
	@$(BIN)/python book/_ext/redraw.py

stamp: ## write version and address everywhere: make stamp, or make stamp URL=https://github.com/you/fork
	@$(NEEDS_PYTHON)
	@"$(PYTHON)" book/_ext/stamp.py $(URL)

clean: ## remove .venv, the built book and every cache
	rm -rf $(VENV) _build build *.egg-info .pytest_cache .ruff_cache .hypothesis .jupyter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
