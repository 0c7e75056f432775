#!/usr/bin/env bash
# Builds images with buildah: build.sh NAME...   (services, trainer, client, generation)
# With --tag it tells the default tag and builds nothing. From the environment:
#   TAG            of the images, localhost/ppod-NAME:TAG; default: the version in pyproject.toml
#   BASE_IMAGE     default: that of the Dockerfiles
#   WHEELS         a directory that wheels.sh made: all comes from there, and nothing from the network
#   PIP_CONF       a pip configuration for the build, which leaves no trace in the image
#   APT_CONF       the same for apt
#   SOURCE         address of the repository, for the label
#   BUILD_ARGS     further arguments of the Dockerfiles: BUILD_ARGS="EXAMPLE_MODEL=1 VLLM=cpu"
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
if [ "${1:-}" = --tag ]; then
    echo "$version"
    exit
fi
revision=$(git rev-parse HEAD 2> /dev/null || echo unknown)
options=(
    # Not OCI's format, which has no HEALTHCHECK.
    --format docker --layers
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "SOURCE=${SOURCE:-unknown}"
)
# Without user namespaces, as in most CI jobs, the other kinds of isolation do not work.
[ "$(id -u)" != 0 ] || options+=(--isolation chroot)
[ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
for argument in ${BUILD_ARGS:-}; do
    options+=(--build-arg "$argument")
done
configuration=${PIP_CONF:-}
if [ -n "${WHEELS:-}" ]; then
    configuration=$(mktemp)
    trap 'rm -f "$configuration"' EXIT
    printf '[global]\nno-index = true\n' > "$configuration"
    options+=(--build-context "wheels=$WHEELS")
fi
[ -z "$configuration" ] || options+=(--secret "id=pip.conf,src=$configuration")
[ -z "${APT_CONF:-}" ] || options+=(--secret "id=apt.conf,src=$APT_CONF")

for name in "$@"; do
    tag=localhost/ppod-$name:${TAG:-$version}
    echo "building $tag"
    buildah build "${options[@]}" --file "docker/$name.Dockerfile" --tag "$tag" .
done
