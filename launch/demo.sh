#!/usr/bin/env bash
# The whole road on this machine's CPU: train a tiny MoE, calibrate, place, serve on 4 ranks, ask, compare, picture.
#   bash launch/demo.sh [--keep] [--port N]      --keep leaves the server running
set -euo pipefail

keep=false port=8000
while [ $# -gt 0 ]; do
    case $1 in
        --keep) keep=true ;;
        --port) port=${2-}; [ $# -eq 1 ] || shift ;;
        -h | --help) sed -n '2,3s/^# *//p' "$0"; exit ;;
        *) echo "demo: error: unknown option $1; try --help" >&2; exit 2 ;;
    esac
    shift
done
if ! [[ $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
    echo "demo: error: --port '$port': must be a number from 1 to 65535" >&2
    exit 2
fi
if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    echo "demo: error: --port $port: something listens there already; name another" >&2
    exit 1
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export DS_ACCELERATOR=cpu # an installed deepspeed would warn about it otherwise
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 # the server is here, whatever proxy leads elsewhere
run=runs/demo ranks=4
mkdir -p "$run"
step() { printf '\n== %s\n' "$*"; "$@"; }

step rq-ep tiny-model --out "$run/model"
step rq-ep calibrate --model "$run/model" --text "$run/model/text/train" --out "$run/stats.safetensors"
step rq-ep place --stats "$run/stats.safetensors" --num-ranks $ranks --budget ep --formats bf16,int8 \
    --strategy rq --out "$run/placement.rq.json"
step rq-ep place --stats "$run/stats.safetensors" --num-ranks $ranks --budget ep --formats bf16 \
    --strategy eplb --out "$run/placement.eplb.json"

printf '\n== torchrun --nproc-per-node %s -m rq_ep.serve (log: %s)\n' $ranks "$run/serve.log"
OMP_NUM_THREADS=1 torchrun --nproc-per-node $ranks -m rq_ep.serve --model "$run/model" \
    --placement "$run/placement.rq.json" --port "$port" --served-model-name tiny > "$run/serve.log" 2>&1 &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
until python -c "import sys, urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" 2>/dev/null; do
    if ! kill -0 $server 2>/dev/null; then
        echo "demo: error: the server ended; the end of its log:" >&2
        tail -n 5 "$run/serve.log" >&2
        exit 1
    fi
    sleep 1
done
step python launch/demo_requests.py --base-url "http://127.0.0.1:$port/v1"
if $keep; then
    trap - EXIT
    disown $server
    echo "the server goes on"
else
    kill -TERM $server
    wait $server || true # torchrun answers a signal with exit code 1
    trap - EXIT
    echo "server stopped"
fi

OMP_NUM_THREADS=1 step rq-ep eval --model "$run/model" --text "$run/model/text/held-out" --num-ranks $ranks \
    --batch-size 32 --max-tokens 65536 --strategies standard,eplb,llep,rq --set llep.min_tokens_per_gemm=16 \
    --placement "$run/placement.eplb.json" --placement "$run/placement.rq.json" --json "$run/eval.json" --plot "$run/load.png"

# The demo's experts are so small that their latency shows nothing. So the routing of the held-out text is replayed
# through experts of Qwen3-30B-A3B's size, with the placements above; ranks take turns, so that each has a core to itself.
step rq-ep calibrate --model "$run/model" --text "$run/model/text/held-out" --formats bf16 --batch-size 16 \
    --out "$run/held-out.stats.safetensors" --trace "$run/held-out.trace.safetensors"
step rq-ep place --stats "$run/stats.safetensors" --num-ranks $ranks --budget ep --formats bf16 \
    --strategy rq --no-plot --out "$run/placement.rq_native.json"
trace=trace:$run/held-out.trace.safetensors
step python -m bench layer --local-ranks $ranks --device cpu --dtype float32 \
    --shape qwen3-moe --num-experts 16 --top-k 2 --hidden-size 2048 --intermediate-size 768 \
    --scenarios "$trace:0+prefill,$trace:3+prefill" --strategies standard,eplb,llep,rq --set llep.min_tokens_per_gemm=16 \
    --placement "$run/placement.eplb.json" --placement "$run/placement.rq.json" \
    --placement "rq, native only=$run/placement.rq_native.json" \
    --batches 4 --steps 8 --brief --json "$run/latency.json" --ranks-png "$run/latency.png"

cat <<END

Everything is in $run/ (load.png shows the load of every rank, latency.png the latency of experts of a real size).
The same on your own model:

  rq-ep calibrate --model MODEL_DIR --text TEXT_DIR --out stats.safetensors
  rq-ep place --stats stats.safetensors --num-ranks 8 --budget ep --formats bf16,int8 --out placement.json
  torchrun --nproc-per-node 8 -m rq_ep.serve --model MODEL_DIR --placement placement.json
END
if $keep; then
    echo
    echo "The server still runs on port $port; stop it with: kill $server"
fi
