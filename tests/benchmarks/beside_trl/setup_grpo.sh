#!/usr/bin/env bash
# Makes the environment that TRL's GRPOTrainer runs in: the newest TRL, beside the versions that ppod computes with.
# usage: setup.sh VENV PYTHON
set -euo pipefail

venv=$1
python=$2
stamp="$venv/.installed-$(cksum <"$0" | tr ' ' -)"
[ -e "$stamp" ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
"${pip[@]}" torch==2.13.0
"${pip[@]}" trl==1.16.0 transformers==5.19.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
rm -f "$venv"/.installed-*
touch "$stamp"
