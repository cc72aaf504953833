# The only entry point: `make` alone says what there is to do. Whatever a target needs it makes
# first, the virtual environment included, and what is up to date is not made again.
# Plain GNU make, 3.81 or newer.

PYTHON ?= python3
VENV   ?= .venv
PRESET ?= quick
MODEL  ?=
SVG    ?=
EXTRAS ?=
ARGS   ?=

# Only what a recipe hands on reaches a notebook or a test.
unexport PRESET MODEL

comma      := ,
PYTHON_MIN := 3.11
PRESETS    := smoke quick paper
ifeq ($(filter $(PRESETS),$(PRESET)),)
$(error PRESET=$(PRESET) is none of the presets: choose one of $(PRESETS))
endif

# A smoke run keeps its figures, and its memory of what it has done, to itself.
FIGS  ?= $(if $(filter smoke,$(PRESET)),build/smoke-figs,figs)
STATE := $(if $(filter smoke,$(PRESET)),build/smoke,build)

.PHONY: help setup figs notebooks lab app site effects methods test test-browser lint check bench clean FORCE

help:
	@awk -F ':.*## |: ' \
	  '/^[a-z-]+:.*## / || /^## [a-z].*: / { sub(/^## /, ""); printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Settings, with what they are now:'
	@printf '  %-15s %s\n' \
	  'PRESET=$(PRESET)' 'how much to compute: $(PRESETS)' \
	  'MODEL=$(MODEL)' 'a model for every notebook, instead of its own choice' \
	  'PYTHON=$(PYTHON)' 'makes $(VENV), has to be $(PYTHON_MIN) or newer' \
	  'SVG=$(SVG)' '1: figures as SVG too' \
	  'AT_ONCE=$(AT_ONCE)' '1 or 2: how many notebooks (or tests) run at a time' \
	  'EXTRAS=$(EXTRAS)' 'for setup: optional parts, as in EXTRAS=judges,honesty' \
	  'ARGS=$(ARGS)' 'for lab, app, tests and bench: handed on, as in ARGS="-k positions"'


# --- the virtual environment ---------------------------------------------------------------

PY   := $(VENV)/bin/python
PIP  := "$(PY)" -m pip --disable-pip-version-check install -qq -c constraints.txt
BASE := $(VENV)/.steerlib-base
DEV  := $(VENV)/.steerlib-dev
JUDGES := $(VENV)/.steerlib-judges
SITE := $(VENV)/.steerlib-site

# What tests and benchmarks compare with. Both declare older versions of transformers and numpy
# than they can live with, so they go in without dependencies: they import nothing that the base
# install does not have.
PEERS := steering-vectors repeng

setup: $(DEV) ## install everything into a virtual environment of its own
ifneq ($(EXTRAS),)
	@$(PIP) -e '.[$(EXTRAS)]'
endif
	@echo 'ready: $(PY)'

$(BASE): pyproject.toml constraints.txt
	@if ! "$(PY)" -m pip --version > /dev/null 2>&1; then \
	  if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < ($(subst .,$(comma) ,$(PYTHON_MIN))))' 2> /dev/null; then \
	    found=$$(command -v "$(PYTHON)" > /dev/null && "$(PYTHON)" --version 2>&1 || echo 'no program here'); \
	    echo "This needs Python $(PYTHON_MIN) or newer, and '$(PYTHON)' is $$found: name another, as in 'make PYTHON=python$(PYTHON_MIN)'." >&2; \
	    exit 1; \
	  fi; \
	  echo 'making the virtual environment $(VENV)'; \
	  rm -f "$(VENV)"/bin/python*; \
	  "$(PYTHON)" -m venv "$(VENV)" || exit 1; \
	fi
	@echo 'installing what steerlib needs into $(VENV) (minutes, the first time)'
	@$(PIP) -e .
	@touch $@

$(DEV): $(BASE)
	@echo 'installing what its tests and benchmarks need'
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(PEERS)
	@touch $@

# The sentence embeddings that one notebook judges with: some 90 MB that nothing else needs.
$(JUDGES): $(BASE)
	@echo 'installing the judges of 09_dilemmas'
	@$(PIP) -e '.[judges]'
	@touch $@

$(SITE): $(BASE)
	@echo 'installing what makes the site'
	@$(PIP) -e '.[site]'
	@touch $@

# The interpreter went away under the environment: make it again.
ifneq ($(shell test -x "$(PY)" || echo gone),)
$(BASE): FORCE
endif


# --- notebooks and figures -----------------------------------------------------------------
#
# notebooks/01_love_hate.ipynb draws every figs/01_*. It does not change when it runs: the executed
# copy lands in build/notebooks/, and build/01_love_hate.done says with which settings it ran (first
# line) and which figures came of it. That list is as old as the start of the run, so an edit made
# meanwhile counts as new.

NOTEBOOKS := $(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.ipynb)))
NUMBERS   := $(sort $(foreach n,$(NOTEBOOKS),$(firstword $(subst _, ,$(n)))))
DONE      := $(NOTEBOOKS:%=$(STATE)/%.done)
LAST      := $(filter $(STATE)/11_%,$(DONE))
SOURCES   := $(shell find steerlib -name '*.py') \
  $(shell test ! -d data || find data -type f ! -name '*.md' ! -name '*.py' ! -name '*.pyc' ! -path '*/.*')

# How long each notebook takes in a quick run on one core, in seconds: for the time left that a first
# `make figs` prints. Later ones go by the last run, which leaves build/<name>.quick.seconds. They run
# in this order: long ones first, so that none is left over at the end.
QUICK_SECONDS := 08:1730 01:790 13:500 05:430 02:400 03:380 10:360 09:300 04:290 12:170 06:150 00:120 07:80 11:20
IN_ORDER := $(foreach s,$(QUICK_SECONDS),$(filter $(STATE)/$(firstword $(subst :, ,$(s)))_%,$(DONE)))
IN_ORDER := $(filter-out $(LAST),$(IN_ORDER) $(filter-out $(IN_ORDER),$(DONE)))

# Two notebooks at a time, each on half of the cores, are done sooner than one after the other on all,
# where there is memory for both (20 GB). Those of the largest packaged model wait for each other. A
# model of one's own gets all there is, and so does the notebook of a single figure.
CORES   := $(shell getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1)
GB      := $(shell { sed -n 's/^MemTotal: *\([0-9]*\)[0-9]\{6\} kB/\1/p' /proc/meminfo || \
  sysctl -n hw.memsize | sed 's/[0-9]\{9\}$$//'; } 2> /dev/null)
AT_ONCE ?= $(shell test -z '$(MODEL)$(filter paper,$(PRESET))$(filter figs/%,$(MAKECMDGOALS))' -a $(CORES) -gt 1 -a 0$(GB) -ge 20 && echo 2 || echo 1)
THREADS := $(shell echo $$(($(CORES) / $(AT_ONCE) > 0 ? $(CORES) / $(AT_ONCE) : 1)))
LARGE   := $(foreach n,06 07 08 09 10,$(filter $(STATE)/$(n)_%,$(IN_ORDER)))
LANES   := $(if $(filter 1,$(AT_ONCE)),lane-all,lane-large lane-small)
all   := $(IN_ORDER)
large := $(filter $(LARGE),$(IN_ORDER))
small := $(filter-out $(LARGE),$(IN_ORDER))

# A run with other settings, or one of which a figure is gone, does not count. One that drew SVGs
# besides does, whether they are asked for or not.
SETTINGS := PRESET=$(PRESET) MODEL=$(MODEL) FIGS=$(FIGS)$(if $(SVG), SVG=1)
STALE := $(shell for list in $(STATE)/*.done; do test ! -f "$$list" || { \
  IFS= read -r settings; \
  test "$$settings" = '$(SETTINGS)' || test "$$settings" = '$(SETTINGS) SVG=1' || echo "$$list"; \
  while IFS= read -r figure; do test -e "$$figure" || echo "$$list"; done; } < "$$list"; done)
ifneq ($(STALE),)
$(sort $(STALE)): FORCE
endif

# Notebooks run in notebooks/, so folders are handed over as absolute paths.
full = $(if $(filter /%,$(1)),$(1),$(CURDIR)/$(1))
NOTEBOOK_ENV = JUPYTER_PREFER_ENV_PATH=1 PRESET=$(PRESET) STEERLIB_FIGS='$(call full,$(FIGS))' \
  $(if $(SVG),STEERLIB_SVG=1) \
  $(if $(MODEL),MODEL='$(if $(wildcard $(MODEL)/config.json),$(call full,$(MODEL)),$(MODEL))')

# What is out of date runs in a make of its own, which goes on after a failure (-k). build/plan says
# what is to be done (`todo`, with the seconds it should take), as a dry run of that make found out,
# and what has been (`done`, `failed`).
PLAN    :=
AFTER   :=
IN_LANE :=
HANDED := -s --no-print-directory AT_ONCE='$(AT_ONCE)' PRESET='$(PRESET)' MODEL='$(MODEL)' FIGS='$(FIGS)' SVG='$(SVG)'

lane-%:
	@$(if $($*),$(MAKE) -k $(HANDED) PLAN='$(PLAN)' IN_LANE=1 $($*),:)

# In a lane one after the other, even if `make -j` would allow for more.
ifneq ($(IN_LANE),)
.NOTPARALLEL:
endif

figs: $(BASE) ## run the notebooks that are out of date, draw every figure
	@mkdir -p $(STATE); $(MAKE) -n $(HANDED) AFTER=1 $(IN_ORDER) $(LAST) \
	  | sed -n 's/^: todo/todo/p' > $(STATE)/plan
	@status=0; for part in '$(LANES)' '$(LAST)'; do \
	  test -z "$$part" || $(MAKE) -k $(if $(JOBS)$(filter 1,$(AT_ONCE)),,-j$(AT_ONCE)) $(HANDED) PLAN=$(STATE)/plan $$part || status=1; \
	done; \
	failed=$$(sed -n 's/^failed //p' $(STATE)/plan | sort | tr '\n' ' '); \
	test -z "$$failed" || echo "failed: $${failed}(the other figures are in $(FIGS)/)" >&2; exit $$status
ifneq ($(LAST),)
	@$(if $(filter figs,$(FIGS)),"$(PY)" -m steerlib.lab.claims README.md)
endif
	@echo 'the figures are in $(FIGS)/'

## figs/<name>.png: draw one figure, by running the notebook of its number

# Prints its argument, between "[3/11] " and ", about 14 min left" if there is a plan: the place in
# it, and what is still to do, at the pace of what is done. The line ends when the notebook does, with
# its time, unless several run at once.
JOBS = $(filter -j% --jobserver%,$(MAKEFLAGS))
progress = awk -v name='$*' -v say='$(1)' ' \
  $$1 == "todo" { n++; if ($$2 == name) place = n; seconds[$$2] = $$3; left += $$3; unknown += !$$3 } \
  $$1 == "done" { past += seconds[$$2]; took += $$3 } \
  $$1 == "done" || $$1 == "failed" { left -= seconds[$$2] } \
  END { \
    minutes = int(left * (past ? took / past : 1) / $(AT_ONCE) / 60 + 0.5); \
    if (place) printf "[%d/%d] ", place, n; printf "%s", say; \
    if (place && !unknown) printf ", about %d min left", minutes ? minutes : 1; \
    printf "$(if $(JOBS),\n, ... )" }' \
  $(or $(PLAN),/dev/null)

$(DONE): $(STATE)/%.done: notebooks/%.ipynb $(SOURCES) $(BASE)
	@: todo $* $(or $(shell cat $(STATE)/$*.$(PRESET).seconds 2> /dev/null),$(if $(filter quick,$(PRESET)),$(patsubst $(firstword $(subst _, ,$*)):%,%,$(filter $(firstword $(subst _, ,$*)):%,$(QUICK_SECONDS)))))
	@mkdir -p $(STATE)/notebooks "$(FIGS)"
	@$(call progress,$*: running (PRESET=$(PRESET)$(if $(MODEL), MODEL=$(MODEL))))
	@rm -f $@; echo '$(SETTINGS)' > $@.part; begin=$$(date +%s); \
	$(NOTEBOOK_ENV) OMP_NUM_THREADS=$(THREADS) JPY_SESSION_NAME=$*.ipynb "$(PY)" -m nbconvert --log-level=WARN --to notebook --execute \
	  --KernelManager.transport_encryption=auto --ExecutePreprocessor.kernel_name=python3 \
	  --ExecutePreprocessor.startup_timeout=300 --ExecutePreprocessor.timeout=-1 \
	  --ExecutePreprocessor.store_widget_state=True --ExecutePreprocessor.record_timing=False \
	  --output-dir $(STATE)/notebooks --output $*.part.ipynb $< 2> $@.log; failed=$$?; \
	test ! -s $@.log || { $(if $(JOBS),,echo;) cat $@.log >&2; }; rm -f $@.log; \
	test $$failed = 0 || { \
	  echo "$*: failed after $$(($$(date +%s) - begin)) s, with the error above" >&2; \
	  echo 'failed $*' >> $(or $(PLAN),/dev/null); exit 1; }; \
	seconds=$$(($$(date +%s) - begin)); \
	mv $(STATE)/notebooks/$*.part.ipynb $(STATE)/notebooks/$*.ipynb && \
	find "$(FIGS)" -type f -name '$(firstword $(subst _, ,$*))_*' -newer $@.part | sort > $@.figures && \
	echo "$(if $(JOBS),$*: )done in $$seconds s, files in $(FIGS)/: $$(wc -l < $@.figures | tr -d ' ')" && \
	echo $$seconds > $(STATE)/$*.$(PRESET).seconds && echo "done $* $$seconds" >> $(or $(PLAN),/dev/null) && \
	touch -r $@.part $@.figures && cat $@.figures >> $@.part && \
	touch -r $@.figures $@.part && rm $@.figures && mv $@.part $@

$(filter $(STATE)/09_%,$(DONE)): | $(JUDGES)

# The notebook that sums up reads the tables of claims that the others left: it runs behind them, even
# if one of them failed, and again when a table is newer than its last run. Asked for alone it takes
# what is there.
ifneq ($(AFTER),)
$(LAST): $(filter-out $(LAST),$(DONE))
endif
ifneq ($(wildcard $(LAST)),)
ifneq ($(shell find '$(FIGS)' -name '[0-9]*_claims.csv' -newer $(LAST) 2> /dev/null),)
$(LAST): FORCE
endif
endif

define figures_of_number
$(FIGS)/$(1)_%: $(filter $(STATE)/$(1)_%,$(DONE))
	@grep -qxF '$$@' $$^ || { echo "$(filter $(1)_%,$(NOTEBOOKS)) makes no $$@; it makes:" $$$$(grep -hv '^PRESET=' $$^) >&2; exit 1; }
endef
$(foreach number,$(NUMBERS),$(eval $(call figures_of_number,$(number))))

figs/%:
	@echo 'No notebook makes $@$(if $(filter-out figs,$(FIGS)), here: with PRESET=$(PRESET) figures go to $(FIGS)/): its name has to begin with the number of one ($(NUMBERS)).' >&2; exit 1

ifneq ($(filter notebooks,$(MAKECMDGOALS)),)
ifneq ($(PRESET)$(MODEL),quick)
$(error notebooks/ shows the quick run on the default models: leave PRESET and MODEL away)
endif
endif

notebooks: figs ## put the outputs of the last quick run into notebooks/
	@for name in $(NOTEBOOKS); do \
	  cmp -s $(STATE)/notebooks/$$name.ipynb notebooks/$$name.ipynb || { \
	    cp $(STATE)/notebooks/$$name.ipynb notebooks/.$$name.part && \
	    mv notebooks/.$$name.part notebooks/$$name.ipynb && touch $(STATE)/$$name.done && \
	    echo "notebooks/$$name.ipynb: new outputs"; } || exit 1; \
	done

# Both listen on the loopback interface alone; where there is no screen they only print the address.
QUIETLY = $(if $(DISPLAY)$(WAYLAND_DISPLAY)$(BROWSER)$(filter Darwin,$(shell uname)),,--no-browser)

lab: $(BASE) ## open JupyterLab on the notebooks, for this machine only
	@$(NOTEBOOK_ENV) "$(PY)" -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=notebooks \
	  --KernelManager.transport_encryption=auto $(QUIETLY) $(ARGS)

app: $(BASE) ## open the panels as one web page, for this machine only
	@$(NOTEBOOK_ENV) "$(PY)" -m voila notebooks/app.ipynb --Voila.ip=127.0.0.1 \
	  --KernelManager.transport_encryption=auto $(QUIETLY) $(ARGS)

site: $(SITE) ## turn notebooks and docstrings into web pages, build/site/index.html first
	@EXECUTED='$(STATE)/notebooks' "$(PY)" -m sphinx -q -d $(STATE)/doctrees docs $(STATE)/site
	@echo 'open $(STATE)/site/index.html'


effects: $(BASE) ## choose layer and strength of every demonstration in MODEL and measure it: data/results
	@"$(PY)" data/make_settings.py $(or $(MODEL),smollm2-135m) $(ARGS)

methods: $(BASE) ## choose how strong each way of steering may be in MODEL, compare them: data/results
	@"$(PY)" data/make_methods.py $(or $(MODEL),smollm2-135m) $(ARGS)


# --- work on the code ----------------------------------------------------------------------

# As many processes as notebooks at a time, each with its share of the cores.
PYTEST = OMP_NUM_THREADS=$(THREADS) "$(PY)" -m pytest -n $(AT_ONCE) --dist worksteal

test: $(DEV) ## run the tests, but for those in a browser
	@$(PYTEST) $(ARGS) -m 'not browser'

test-browser: $(DEV) ## run every notebook and the app in Chromium, move their sliders
	@"$(PY)" -m pytest -m browser $(ARGS)

lint: $(DEV) ## check style and types
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check . || { echo 'to mend this: $(PY) -m ruff format .' >&2; exit 1; }
	@"$(PY)" -m mypy steerlib
	@"$(VENV)/bin/lint-imports" > $(VENV)/imports.log || { cat $(VENV)/imports.log >&2; exit 1; }

check: lint ## style, types and the quick tests, some two minutes; ARGS=tests/engine for a part
	@$(PYTEST) -q $(ARGS) -m 'not browser and not slow and not thorough'

bench: $(DEV) ## measure speed, beside steering-vectors and repeng
	@"$(PY)" -m benchmarks $(ARGS)

clean: ## remove build/ and .venv, never figs/ or the downloaded models
	rm -rf build docs/api docs/notebooks docs/contributing.md .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
