# Two commands: `make quickstart` shows the product end to end, `make test` proves it.

PYTHON ?= python3
VENV ?= .venv
# What runs the models of the quickstart: `make quickstart SERVER=in_process` takes no Triton.
SERVER ?= auto
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-client check docs extras wheels sbom clean

quickstart: $(VENV)/client
	$(VENV)/bin/python examples/quickstart.py --server $(SERVER)

test: $(VENV)/all
	$(VENV)/bin/python -m pytest

# In minutes, what needs neither torch nor patience: the client against a real server and a fake one.
test-client: $(VENV)/test-client
	$(VENV)/bin/python -m pytest -m "not slow and not torch" tests/clip_rt

check: $(VENV)/all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# README and docs/ as a site in build/docs. A warning, as of a broken link, is an error, but not
# with --quiet, where MkDocs does not count them.
docs: $(VENV)/all
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Each extra in an environment of its own, commands of README and docs/ as printed, what wheels install.
extras: $(VENV)/all
	$(VENV)/bin/python .ci/extras.py

# What `pip install 'clip-rt[server]'` installs: the client with every command, and the bundled model.
wheels: $(VENV)/all
	$(VENV)/bin/python -m build --no-isolation --wheel --outdir dist .
	$(VENV)/bin/python -m build --no-isolation --wheel --outdir dist model_repository

# What is installed here, as a CycloneDX bill of materials in build/sbom.json.
sbom: $(VENV)/all
	mkdir -p build
	$(VENV)/bin/cyclonedx-py environment --output-format JSON --output-file build/sbom.json $(VENV)

# What runs a model: the client and the embedded server. No torch.
$(VENV)/client: pyproject.toml model_repository/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt ./model_repository -e '.[server,quickstart]'
	[ "$$(uname -sm)" != "Linux x86_64" ] || $(PIP) show --quiet nvidia-pytriton 2>/dev/null || \
	  $(PIP) install --quiet --no-deps -c constraints.txt nvidia-pytriton
	touch $@

# What tests it. `make test-client PYTHON=python3.13 VENV=.venv-3.13` asks another Python.
$(VENV)/test-client: $(VENV)/client
	$(PIP) install --quiet -c constraints.txt -e '.[server,test-client]'
	touch $@

# What also makes one: training, export, and all that the tests hold them against.
$(VENV)/all: $(VENV)/client
	$(PIP) install --quiet -c constraints.txt ./model_repository -e '.[server,quickstart,export,train,bench,docs,test]'
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "clip_rt needs Python 3.10 to 3.13; name one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
