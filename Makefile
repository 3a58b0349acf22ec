# `make run` and `make test` set up everything that they need; see README.md.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
OUT ?= out
PRESETS := tiny criteo-kaggle paper-benchmark
MAX_ROWS ?= 10000

.PHONY: run test setup proto schema clean

run: setup
	$(BIN)/dlrm engine status
	for preset in $(PRESETS); do \
		$(BIN)/dlrm export $$preset --max-rows $(MAX_ROWS) --out $(OUT)/models/$$preset || exit; done
	$(BIN)/dlrm conform $(PRESETS) --max-rows $(MAX_ROWS) --out $(OUT)
	@echo "The report: $(OUT)/report.html. The exported models: $(OUT)/models"

test: setup
	$(BIN)/python tests/old_onnxruntime.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The stamp is written last, so that an interrupted installation is begun again.
setup: .venv/installed
	$(BIN)/dlrm engine install --optional

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install one, or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# For developers: needs `pip install -e '.[dev]'`.
proto:
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. dlrm_caffe2/proto/caffe2.proto

schema:
	$(BIN)/dlrm spec schema > spec/schema.json.new && mv spec/schema.json.new spec/schema.json

clean:
	rm -rf .venv .venv-caffe2 .venv-onnxruntime $(OUT) build dist *.egg-info
