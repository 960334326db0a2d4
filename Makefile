# make loop      set up, then download, train, evaluate and gate the embedded recipe; RECIPE=name SOURCE=folder-or-zip for your own photos
# make test      set up, then run all tests but the few that `make test-slow` adds
# make test-slow before a release: what repeats on a large scale what other tests have shown on a small one
# make install   set up alone: .venv with the command `loopbook`
# make lab       open the notebooks in JupyterLab
# make notebooks after editing notebooks: clean them and export them to nbs_lib
# make check     are the notebooks clean, is nbs_lib in step with them, do ruff and mypy find anything
# make screenshot the README's picture, of a run made now
# make test-faults  kills the daemon, the runner and the kernel at random moments, a hundred times
# make test-airflow runs the Airflow DAG under a real Airflow, in an environment of its own
# make bench     measure, beside what people use today
# make lock      pin the newest versions that pyproject.toml allows

PYTHON ?= python3
BIN := .venv/bin
UV = $(shell command -v uv || echo $(BIN)/uv)
WORKERS ?= auto
export UV_LINK_MODE ?= hardlink
unexport PYTHONDONTWRITEBYTECODE   # some images set it: then every start would compile all libraries anew

.PHONY: install loop test test-slow test-faults test-airflow lab notebooks check screenshot bench lock

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Loopbook needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

loop: install
	@$(BIN)/loopbook loop $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(SOURCE),--source "$(SOURCE)")

# one by one to whichever worker is free, the longest first
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
test: install
	$(PYTEST) -m "not slow" tests

test-slow: install
	$(PYTEST) -m slow tests

test-faults: install
	FAULTS=100 $(BIN)/python -m pytest -m faults --timeout 7200 tests

test-airflow: install
	test -x .airflow/bin/python || $(UV) venv --quiet --python $(BIN)/python .airflow
	$(UV) pip install --quiet --python .airflow/bin/python --requirement tests/airflow/requirements.txt
	.airflow/bin/python -m pytest tests/airflow/check_dag.py

# photos dropped into a notebook come as one message: up to 500 MB instead of 10
LARGE = --ServerApp.tornado_settings="{'websocket_max_message_size': 500000000}"
lab: install
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start.ipynb $(LARGE)

notebooks: install
	$(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution" $$(find notebooks -name "*.ipynb" -not -path "*/.*")
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

check: install
	$(BIN)/python -m pytest tests/test_project.py
	$(BIN)/ruff check .
	$(BIN)/mypy

screenshot: install
	FACES=1200 $(BIN)/python -m pytest tests/test_whole_loop.py -k browser
	mkdir -p docs && cp outputs/screenshots/evaluate.png docs/evaluate.png

bench: install
	$(BIN)/python tests/bench/bench.py

lock: install
	$(UV) pip compile --quiet --universal --upgrade --no-header --no-annotate --no-emit-index-url --python-version 3.11 --extra dev pyproject.toml --output-file constraints.txt
	printf 'apache-airflow\npytest\n' | $(UV) pip compile --quiet --universal --upgrade --no-header --no-annotate --no-emit-index-url --python-version 3.11 - --output-file tests/airflow/requirements.txt
