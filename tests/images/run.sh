#!/usr/bin/env bash
# Builds the images from a base made of Debian's packages and runs the tests of this directory on them:
#   run.sh PYTHON TOOLS CACHE [--generation VLLM_VENV]
# PYTHON has the development tools, TOOLS is the environment of docker/tools.txt. With --generation only the image of
# generation is built, for the CPU, and tested. Without root or the tools it does nothing and says so, but in CI it fails.
set -euo pipefail
python=$1 tools=$2 cache=$3
cd "$(dirname "$0")/../.."

for tool in buildah podman runc debootstrap; do
    command -v "$tool" > /dev/null || missing="$tool is missing: .ci/system-packages installs it"
done
[ "$(id -u)" = 0 ] || missing="building images needs root here"
if [ -n "${missing:-}" ]; then
    echo "tests of the images were skipped: $missing"
    [ -z "${CI:-}" ] || exit 1
    exit 0
fi

export CONTAINERS_CONF=$PWD/tests/images/containers.conf
export BASE_IMAGE=localhost/ppod-debian:bookworm
docker/debian-base.sh "$BASE_IMAGE"
# Checkouts share podman's images: each has tags of its own.
TAG=test-$(pwd | cksum | cut -d ' ' -f 1)
export TAG PPOD_IMAGES_TAG=$TAG PODMAN_COMPOSE=$tools/bin/podman-compose
requirements=$(cat pyproject.toml constraints.txt docker/wheels.sh | cksum | cut -d ' ' -f 1)

if [ "${4:-}" = --generation ]; then
    vllm=$(cat pyproject.toml constraints.txt docker/wheels.sh services/install-vllm.sh | cksum | cut -d ' ' -f 1)
    export WHEELS=$cache/wheels-vllm-$vllm
    docker/wheels.sh "$WHEELS" "$python" --vllm "$5"
    BUILD_ARGS="EXAMPLE_MODEL=1 VLLM=cpu" docker/build.sh generation
    exec "$python" -m pytest tests/images/test_generation.py
fi
export WHEELS=$cache/wheels-$requirements
docker/wheels.sh "$WHEELS" "$python"
BUILD_ARGS=EXAMPLE_MODEL=1 docker/build.sh services trainer client
docker/sbom.sh "localhost/ppod-client:$TAG" "$tools/bin/syft" build/sbom/client.json
exec "$python" -m pytest tests/images --ignore tests/images/test_generation.py
