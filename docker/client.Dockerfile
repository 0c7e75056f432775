# syntax=docker/dockerfile:1
# The `ppod` command, for calls to services from inside a network: without torch.
#   docker build -f docker/client.Dockerfile -t ppod-client .
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
ARG EXTRAS=deploy
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py pyproject.toml "$EXTRAS" > /tmp/requirements.txt \
    && pip --python /opt/ppod/bin/python install -c constraints.txt -r /tmp/requirements.txt \
    && find /opt/ppod/lib -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +

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
    && install --directory --owner 10001 --group 10001 /models
COPY --from=dependencies /opt/ppod /opt/ppod
COPY --from=application /opt/application /opt/ppod
ENV PATH=/opt/ppod/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/models \
    XDG_CACHE_HOME=/models/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["ppod"]
CMD ["--help"]
# No HEALTHCHECK: nothing here serves.
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="ppod-client" \
      org.opencontainers.image.description="ppod's command line for services over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
