# make book | test | lint | bench | sync | browse | interop | env | clean. Each creates what it needs; none repeats what is there.
# make -B test repeats all the same.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PASSED := $(VENV)/.passed
# Two processes at once, each with one thread (conftest.py); one file's tests stay together because a notebook's cells share a kernel.
WORKERS ?= 2
# What the notebooks run on, the chapters' notebooks, and all else that a test may read (tests/test_colab.py runs those of
# exercises and solutions). Folders are among them: a file may go.
CODE := pyproject.toml constraints.txt conftest.py $(shell find cratelab -not -path '*__pycache__*')
NOTEBOOKS := $(wildcard book/*.ipynb)
REST := Makefile $(shell find tests book exercises solutions benchmarks .ci *.md *.yml *.cff -type f \
	-not -path '*__pycache__*' -not -path '*/_build/*' -not -path '*/.*' -not -name '*.pyc')

.DEFAULT_GOAL := help
.PHONY: help env book test lint bench sync browse interop clean

help:
	@echo "make book    build the book into book/_build/html"
	@echo "make test    every test, and every notebook executed and compared; again only what a change concerns"
	@echo "make lint    ruff: style and format"
	@echo "make sync    regenerate the notebooks whose text in book/src or solutions changed"
	@echo "make bench   speed and memory (benchmarks/bench_*.py)"
	@echo "make browse  the built pages in headless Chromium"
	@echo "make interop cratelab in other people's tools, each in an environment of its own, .interop/TOOL"
	@echo "make env     only the virtual environment, $(VENV)"
	@echo "make clean   remove what was built (not $(VENV))"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cratelab needs Python 3.11 or newer as $(PYTHON); found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test,corpora,browse]'
	@touch $@

book: $(STAMP)
	$(BIN)/python book/sync.py --check
	$(BIN)/jupyter-book build book/ -W -n --keep-going

test: $(PASSED)
	$(if $(RAN),,@echo "All tests passed on $$(cat $(PASSED)), and nothing has changed since. make -B test repeats them.")

# Changed code: everything. Else the tests, and the notebooks that changed. The chapters come first and in this order, for
# a long one that came last would leave a process idle.
$(PASSED): $(STAMP) $(CODE) $(NOTEBOOKS) $(REST)
	$(BIN)/python -m pytest --nbval -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 \
	  $(if $(filter $(STAMP) $(CODE),$?),book,$(filter $(NOTEBOOKS),$?)) tests
	@date > $@$(eval RAN := yes)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	@for script in $(sort $(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

sync: $(STAMP)
	$(BIN)/python book/sync.py

browse: book
	$(BIN)/python book/check_pages.py

# tests/interop/TOOL.txt pins what the tool needs, TOOL.no-deps what is installed without all that it asks for, and
# test_TOOL.py tries it: make interop, or make interop-TOOL for one.
interop: $(patsubst tests/interop/%.txt,interop-%,$(wildcard tests/interop/*.txt))

interop-%: tests/interop/%.txt
	@test -x .interop/$*/bin/python || $(PYTHON) -m venv .interop/$*
	.interop/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< -e .
	$(if $(wildcard tests/interop/$*.no-deps),.interop/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/$*.no-deps)
	.interop/$*/bin/python -m pytest -c tests/interop/pytest.ini tests/interop/test_$*.py

clean:
	rm -rf book/_build build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
