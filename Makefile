PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test

demo: $(INSTALLED)
	$(VENV)/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 1 \
		--mixed_precision no --dynamo_backend no training/train.py training/configs/demo.yaml
	$(VENV)/bin/python training/demo.py outputs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --upgrade pip
	$(VENV)/bin/pip install -e ".[train,dev]"
	touch $@
