#!/bin/bash
# Trains, interrupts, resumes, evaluates, converts and serves gates: bash examples/chats_with_tools/run.sh
# About ten minutes on two CPU cores; everything is written to runs/tools, which must not exist.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/chats_with_tools
out=runs/tools
if [ -e "$out" ]; then
    echo "got $out, which exists; accepted: another one moved out of the way" >&2
    exit 2
fi
export WANDB_MODE=offline WANDB_DIR=$out WANDB_SILENT=true

echo "== data"
python $here/make_data.py $out/data

echo "== preview"
tenure preview --config $here/settings.yaml > $out/preview.txt
head -n 12 $out/preview.txt

echo "== train, interrupted after step 15"
tenure train --config $here/settings.yaml 2> $out/train-1.log &
training=$!
until grep -q '"step": 15,' $out/gates/metrics.jsonl 2> /dev/null; do
    kill -0 $training && sleep 0.2
done
kill -TERM $training
status=0
wait $training || status=$?
tail -n 1 $out/train-1.log
[ "$status" -eq 75 ]

echo "== resumed"
tenure train --config $here/settings.yaml 2> $out/train-2.log
tail -n 1 $out/train-2.log
find "$out/gates/tenure" -name 'events.*' | head -n 3
find $out/wandb -name 'run-*.wandb'

echo "== evaluate: KL to the full cache"
tenure fidelity --gates $out/gates/gates --policies full retention streaming_llm --budgets 0.2 --length 512 \
    --documents 2 --cases 0 --out $out/fidelity

echo "== convert: from DBTrimKV's files"
python $here/as_release.py $out/gates/gates $out/release
tenure convert $out/release $out/converted --model demo

echo "== serve"
tenure serve --gates $out/converted --port 8765 --threads 1 > $out/serve.log 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
until curl --silent --fail http://127.0.0.1:8765/health > /dev/null; do
    kill -0 $server && sleep 0.5
done
body='{"model": "demo", "max_tokens": 24, "messages": [{"role": "system", "content": "You are a clerk in a warehouse. There are 41 tents on shelf C17 and 9 lamps on shelf B20."}, {"role": "user", "content": "On which shelf are the tents?"}]}'
curl --silent --fail http://127.0.0.1:8765/v1/chat/completions -H 'Content-Type: application/json' -d "$body"
echo
kill -TERM $server
wait $server
