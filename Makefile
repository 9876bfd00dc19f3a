# make run    the main job, some minutes: a rule for 32 units, learned on MNIST from zero
# make test   the tests
# make lint   ruff
# make bench  every benchmark that needs no GPU, a table each
# make test-slow  the tests that run the real commands for minutes

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: run test test-slow lint bench clean

# One thread: with batches of 256 a second one costs more than it brings.
run: $(VENV)/installed
	$(RUN) main.py 32 --rule unit_statistics --threads 1 --evaluations 3

test: $(VENV)/installed
	$(RUN) -m pytest

test-slow: $(VENV)/installed
	$(RUN) -m pytest -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	for benchmark in $(filter-out benchmarks/table.py benchmarks/gpu%,$(wildcard benchmarks/*.py)); do \
		echo $$benchmark; $(RUN) $$benchmark || exit 1; \
	done

# torchvision without its dependencies: they would replace the build of torch that is in place.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-deps torchvision==0.28.0
	touch $@

clean:
	rm -rf $(VENV)
