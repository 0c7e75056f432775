#!/usr/bin/env bash
# Writes what an image holds, Debian's packages and Python's, as CycloneDX: sbom.sh IMAGE SYFT FILE
set -euo pipefail
image=$1 syft=$2 file=$3
id=$(podman image inspect --format '{{.Id}}' "$image")
root=$(podman image mount "$id")
trap 'podman image unmount "$id" > /dev/null' EXIT
mkdir -p "$(dirname "$file")"
SYFT_CHECK_FOR_APP_UPDATE=false "$syft" scan --quiet "dir:$root" --source-name "${image##*/}" --output "cyclonedx-json=$file"
echo "$file"
