#!/usr/bin/env bash
# The figures that a CUDA device decides, one part after the other, each within LIMIT seconds: a report of a part that did
# not end says so. Parts with vLLM need it in the same environment (pip install -e '.[vllm]').
#
# usage: on_a_device.sh PYTHON OUT [PART...]     DEVICE=cuda:0 MODEL=random-1b ROUNDS=5 LIMIT=600
set -uo pipefail
python=$1 out=$2
shift 2
device=${DEVICE:-cuda:0} model=${MODEL:-random-1b} rounds=${ROUNDS:-5} limit=${LIMIT:-600}
subject=(--model "$model" --device "$device")
# Two engines, or an engine and a trainer, share the device.
vllm='{"kv_cache_gib": 8, "gpu_memory_utilization": 0.3, "max_model_len": 512}'
received_by_workers="{\"backend\": \"vllm\", \"vllm\": ${vllm%\}}, \"weights_received_by\": \"workers\"}}"
missing=()

part() {
    local name=$1
    shift
    echo "== $name"
    timeout --kill-after 10 "$limit" "$python" -m "$@" --out "$out/$name" 2>"$out/$name.stderr" | tee "$out/$name.log"
    # 1: a bar was missed, as its report says.
    local code=${PIPESTATUS[0]}
    ((code <= 1)) || missing+=("$name ($code: $(tail -n 1 "$out/$name.stderr"))")
}

mkdir -p "$out"
for name in "${@:-generation generation-vllm weights weights-vllm overlap overlap-vllm delta}"; do
    for one in $name; do
        case $one in
            generation) part "$one" benchmarks.generation.compare "${subject[@]}" --dtype bfloat16 --rounds "$rounds" --only "32 x" ;;
            generation-vllm)
                part "$one" benchmarks.generation.compare "${subject[@]}" --dtype bfloat16 --rounds "$rounds" --only "32 x" \
                    --backend vllm --vllm "$vllm" ;;
            weights) part "$one" benchmarks.weights grpc shared pause relay "${subject[@]}" --rounds "$rounds" ;;
            weights-vllm)
                part "$one" benchmarks.weights grpc shared pause "${subject[@]}" --rounds "$rounds" \
                    --service "$received_by_workers" ;;
            overlap) part "$one" benchmarks.overlap.compare "${subject[@]}" --rounds 0 --batch-size 128 --max-tokens 128 ;;
            overlap-vllm)
                part "$one" benchmarks.overlap.compare "${subject[@]}" --rounds 0 --batch-size 128 --max-tokens 128 \
                    --service "{\"backend\": \"vllm\", \"vllm\": $vllm}" ;;
            delta) part "$one" benchmarks.weights delta --device "$device" ;;
            *)
                echo "on_a_device.sh: no part $one" >&2
                exit 2
                ;;
        esac
    done
done
((${#missing[@]} == 0)) || { printf 'without a report: %s\n' "${missing[@]}"; exit 1; }
