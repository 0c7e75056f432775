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

"$here/../../../services/install-vllm.sh" "$directory/venv-vllm" "$python"
