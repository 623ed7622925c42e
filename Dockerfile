# An image that trains, not as root. Not built by CI: no machine of the project has a Docker daemon.
#
#   docker build -t turnout .
#   docker run --rm --init -v "$PWD:/work" --user "$(id -u):$(id -g)" turnout train quickstart
#   docker run --rm --init -v "$PWD:/work" --user "$(id -u):$(id -g)" --gpus all --ipc host turnout \
#       launch mine.yaml --nproc 8
#
# It holds exactly the lock (requirements/), checked by hash. torch is its CPU build where pip finds that, with
#   --build-arg PIP_EXTRA_INDEX_URL=URL      PyTorch's index of CPU wheels
# else the default index's build for CUDA, with its libraries (several GB more); that one runs on CPUs too. Kernels that
# are compiled at run time (Triton, DeepSpeed's) need a compiler and, for DeepSpeed's, the CUDA toolkit:
#   --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# A CUDA base has no Python; Debian's own `python` images have theirs.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc g++ python3-dev python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /opt/turnout
ARG PIP_EXTRA_INDEX_URL=""
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY requirements requirements
COPY scripts scripts
COPY configs configs
COPY trainer trainer
RUN PIP_NO_CACHE_DIR=1 scripts/setup.sh launch \
    && .venv/bin/python -m compileall -q trainer \
    && useradd --create-home --uid 10001 turnout \
    && install --directory --owner turnout --mode 0777 /work

# Any user can train: caches of Hugging Face, Triton and wandb go below a home that is a temporary folder.
ENV PATH=/opt/turnout/.venv/bin:$PATH \
    HOME=/tmp/home \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER turnout
WORKDIR /work
ENTRYPOINT ["turnout"]
CMD ["--help"]
