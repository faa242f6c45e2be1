PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN = $(VENV)/bin

.PHONY: run run-golf test notebooks lint gpu clean

run: $(VENV)/run.stamp  ## train, evaluate and report a small model on the CPU, offline
	@mkdir -p $(OUT)
	@$(BIN)/python tools/nb_convert.py run nanochat_speedrun -p preset cpu -p base_dir "$(abspath $(OUT))/base" -o $(OUT)/nanochat_speedrun.ipynb
	@echo "The executed notebook:      $(OUT)/nanochat_speedrun.ipynb"
	@echo "The report, one page:       $(OUT)/base/report/report.html"
	@echo "The model for transformers: $(OUT)/base/export/d4"
	@echo "Talk to it:                 $(BIN)/python tools/chat.py --base_dir $(OUT)/base    (--serve: in a browser)"

run-golf: $(VENV)/run.stamp  ## both systems of the parameter-golf challenge, small, on the CPU, offline
	@mkdir -p $(OUT)
	@for name in golf_seq4096 golf_recurrent; do \
		$(BIN)/python tools/nb_convert.py run $$name -p preset cpu -p base_dir "$(abspath $(OUT))/base" -o $(OUT)/$$name.ipynb || exit 1; \
	done
	@echo "The executed notebooks: $(OUT)/golf_seq4096.ipynb"
	@echo "                        $(OUT)/golf_recurrent.ipynb"
	@echo "Artifacts and logs:     $(OUT)/base/golf/seq4096_cpu_seed1337"
	@echo "                        $(OUT)/base/golf/recurrent_cpu_seed1337"
	@echo "The submissions:        $(OUT)/base/records/track_non_record_16mb"

test: $(VENV)/test.stamp  ## everything that must hold
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/python tools/nb_convert.py check

notebooks: $(VENV)/run.stamp  ## nb_src -> notebooks
	$(BIN)/python tools/nb_convert.py build

gpu: $(VENV)/test.stamp  ## the tests that need CUDA, then a table of what this GPU does
	$(BIN)/python benchmarks/gpu.py --tests -o $(OUT)/gpu.md

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OUT)
