# Recipes run in .venv, which they make and fill when they must. In an interpreter that already has what is
# needed: just python=python3 RECIPE (then nothing is installed).
python := ".venv/bin/python"
model := "smollm2-135m-instruct"

# list the recipes
[private]
default:
    @"{{just_executable()}}" --justfile "{{justfile()}}" --list --unsorted

_venv:
    @command -v {{python}} >/dev/null || python3 -m venv .venv

_model:
    @{{python}} -m sharp pull {{model}} >/dev/null

# install what this machine needs to run; --dev: and to test, --notebooks: and JupyterLab
setup *options: _venv
    @{{python}} sharp/environment.py {{options}}

# eight chats through one engine, side by side
demo *options: setup
    @{{python}} -m sharp demo {{options}}

# fetch a model of weights/MANIFEST.toml, or ORG/NAME of the Hugging Face Hub
pull name=model *options: setup
    @{{python}} -m sharp pull {{name}} {{options}}

# One BLAS thread a worker: two workers with two threads each on two cores take several times as long.
# all tests that need no GPU
test *options: (setup "--dev") _model
    @OPENBLAS_NUM_THREADS=1 {{python}} -m pytest -n 2 {{options}}

# the tests that need a CUDA device
test-gpu *options: (setup "--dev") _model
    @{{python}} -m pytest -m gpu {{options}}

# format and sort imports
fmt: (setup "--dev")
    @{{python}} -m ruff check --select I --fix --quiet . && {{python}} -m ruff format .

# check style and formatting
lint: (setup "--dev")
    @{{python}} -m ruff check . && {{python}} -m ruff format --check .

# check types
type: (setup "--dev")
    @{{python}} -m mypy

# measure and compare; options go to python -m sharp.bench
bench *options: setup
    @{{python}} -m sharp.bench {{options}}

# record results measured on another machine; --drop-stale: delete those whose sources have changed
bench-import *options: setup
    @{{python}} -m sharp.bench import {{options}}

# sweep the tiles of an op (gemm) on this GPU and rewrite its table, or print what was found (decode)
tune op="gemm" *options: setup
    @{{python}} -m kernels_numba.bench.tune_{{op}} {{options}}

# run every notebook
nb: (setup "--dev") _model
    @{{python}} -m pytest tests/test_notebooks.py

# open the notebooks in JupyterLab
lab: (setup "--dev" "--notebooks") _model
    @{{python}} -m jupyter lab notebooks

# count lines, file by file
loc:
    @find sharp kernels_numba tests notebooks -name '*.py' | xargs wc -l | sort -n

# solve pyproject.toml again and rewrite requirements.lock
lock: (setup "--dev")
    @{{python}} sharp/environment.py --lock
