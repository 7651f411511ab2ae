# Two commands: `make quickstart` shows the road end to end, `make test` proves it.

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check

.PHONY: quickstart test check extras wheels clean

quickstart: .venv/client
	.venv/bin/python examples/quickstart.py

test: .venv/all
	.venv/bin/python -m pytest

check: .venv/all
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Each extra in an environment of its own, README's commands as printed, and what wheels install.
extras: .venv/all
	.venv/bin/python .ci/extras.py

# What `pip install 'clip-rt[server]'` installs: the client with every command, and the bundled model.
wheels: .venv/all
	.venv/bin/python -m build --no-isolation --wheel --outdir dist .
	.venv/bin/python -m build --no-isolation --wheel --outdir dist model_repository

# What runs a model: the client and the embedded server. No torch.
.venv/client: pyproject.toml model_repository/pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --quiet -c constraints.txt ./model_repository -e '.[server,quickstart]'
	$(PIP) show --quiet nvidia-pytriton 2>/dev/null || \
	  $(PIP) install --quiet --no-deps -c constraints.txt nvidia-pytriton
	touch $@

# What also makes one: training, export, and all that the tests hold them against.
.venv/all: .venv/client
	$(PIP) install --quiet -c constraints.txt ./model_repository -e '.[server,quickstart,export,train,bench,test]'
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "clip_rt needs Python 3.10 to 3.13; name one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv
