# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed
	$(BIN)/prelora train --recipe digits --output $(RUN) --resume auto
	$(BIN)/prelora export $(RUN) --to merged
	$(BIN)/prelora report $(RUN)
	@echo "The report is at $(RUN)/report.html, the merged model at $(RUN)/export/merged.safetensors"

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A page that warns fails; the tests build them, too.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# pip, and no build isolation: torch is some gigabytes, and once is enough. prelora._C is built against it.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja torch torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,dali-cu13,transformers,accelerate,peft,lightning,wandb,mlflow,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs site build dist *.egg-info prelora/_C.* prelora/_C_build.txt
