#!/usr/bin/env bash
# Makes an environment that TRL runs in. 1.0.0 is the last line of releases with a PPO trainer.
# usage: setup.sh VENV PYTHON TRL_VERSION
set -euo pipefail

venv=$1
python=$2
trl=$3
stamp="$venv/.installed-$trl-$(cksum <"$0" | tr ' ' -)"
[ -e "$stamp" ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
# First and exactly, as in ppod's own environment, so that both sides compute with the same torch.
"${pip[@]}" torch==2.13.0
"${pip[@]}" trl=="$trl" transformers==5.19.0 accelerate==1.15.0 datasets==5.2.0 \
    numpy==2.4.6 pydantic==2.14.3 pyyaml==6.0.3 safetensors==0.8.0
rm -f "$venv"/.installed-*
touch "$stamp"
