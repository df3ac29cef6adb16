#!/usr/bin/env bash
# How a run scales over the GPUs of one host, in parts of at most nine minutes each:
#
#   scripts/gpu/scaling.sh DIR [PART...]
#
# writes into DIR, and what was said meanwhile into DIR/*.log:
#
#   bench:ROW    tokens/s, efficiency, share of exposed collectives and peak memory on each number of
#                processes, patched and eager (bench-ROW-SIDE.json), and the estimate of each number
#                (estimate-ROW-N.json)
#   saves        how long a step waits for a checkpoint, with and without async_save (saves.json)
#   resume       a run on all GPUs that half of them continue (resume.json)
#   kill         the seconds from the death of a rank to the end of the run (kill.json)
#   summary      all of these beside the estimates (scaling.json); reads DIR alone
#
# Without parts all of them. Exits 1 if one has failed.
#
# From the environment: PYTHON (python3); COUNTS (1,2,4,8 up to the GPUs there are); DEVICE=cpu, for a
# try with gloo; MODEL (llama-8b) and MODEL_FLAGS of the last three parts; REPEATS (2), LIMIT_S (480);
# and ROWS, whose lines are a label, model, batch size, sequence length, steps and flags.
set -u
[ $# -ge 1 ] || { echo "usage: scripts/gpu/scaling.sh DIR [PART...]" >&2; exit 2; }
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$out" || exit 1
python=${PYTHON:-python3} repeats=${REPEATS:-2} limit_s=${LIMIT_S:-480}
device=()
[ "${DEVICE:-}" != cpu ] || device=(--use-cpu)
if [ -z "${COUNTS:-}" ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  COUNTS=1
  for count in 2 4 8; do [ "$count" -gt "$gpus" ] || COUNTS+=,$count; done
fi
most=${COUNTS##*,}
[ "$most" -gt 1 ] || { echo "needs two processes or more: COUNTS=$COUNTS" >&2; exit 3; }
model=${MODEL:-llama-8b}
read -r -a model_flags <<< "${MODEL_FLAGS:---gradient-checkpointing --per-device-train-batch-size 4 --max-length 2048}"
rows=${ROWS:-"llama-8b-fsdp2 llama-8b 4 2048 6 --dp-shard-size -1 --gradient-checkpointing
llama-8b-hsdp llama-8b 4 2048 6 --dp-replicate-size 2 --dp-shard-size -1 --gradient-checkpointing
llama-1b-ddp llama-1b 8 2048 8 --dp-shard-size 1
qwen3-30b-a3b-12-layers qwen3-30b-a3b:12 4 2048 6 --dp-shard-size -1 --gradient-checkpointing"}
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
  mapfile -t parts < <(cut -d ' ' -f 1 <<< "$rows" | sed 's/^/bench:/')
  parts+=(saves resume kill summary)
fi

# A model of fewer layers is written as a configuration: llama-8b:4.
model_of() {
  case $1 in
    *:*)
      "$python" - "${1%:*}" "${1#*:}" "$out/${1/:/-}.config.json" << 'PYTHON'
import json
import sys

from liger_cli.training.model.source import resolve_model

name, num_layers, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open(path, "w") as file:
    json.dump({**resolve_model(name).config, "num_hidden_layers": num_layers}, file)
PYTHON
      echo "$out/${1/:/-}.config.json"
      ;;
    *) echo "$1" ;;
  esac
}

liger() { timeout --signal=INT --kill-after=60 "$limit_s" "$python" -m liger_cli "$@"; }

train() {
  liger train --model "$model" "${model_flags[@]}" ${device[@]+"${device[@]}"} --dp-shard-size -1 "$@"
}

bench_row() {
  local row name batch length steps flags side ops count found log
  row=$(grep -- "^$1 " <<< "$rows") || { echo "no row is called $1" >&2; return 2; }
  read -r _ name batch length steps flags <<< "$row"
  name=$(model_of "$name") || return 1
  log=$out/bench-$1.log
  : > "$log"
  for side in patched eager; do
    ops=auto
    [ $side = patched ] || ops=none
    # shellcheck disable=SC2086
    liger bench --model "$name" --nproc "$COUNTS" --ops $ops --repeats "$repeats" --steps "$steps" \
      --per-device-train-batch-size "$batch" --max-length "$length" ${device[@]+"${device[@]}"} \
      $flags --json > "$out/bench-$1-$side.json" 2>> "$log" < /dev/null || return 1
  done
  for count in ${COUNTS//,/ }; do
    found=$flags
    # A process alone has no layout, and copies are as many as processes.
    [ "$count" -gt 1 ] || found=$(sed -E 's/--dp-(replicate|shard)-size -?[0-9]+//g' <<< "$flags")
    [ "$count" -eq 1 ] || found=${found/--dp-shard-size 1/--dp-shard-size 1 --dp-replicate-size $count}
    # shellcheck disable=SC2086
    liger estimate --model "$name" --nproc "$count" --batch-size "$batch" --seq-len "$length" \
      ${device[@]+"${device[@]}"} $found --json \
      > "$out/estimate-$1-$count.json" 2>> "$log" < /dev/null || return 1
  done
}

saves() {
  local on
  for on in true false; do
    rm -rf "$out/saves"
    timeout --kill-after=60 "$limit_s" "$python" -m torch.distributed.run --standalone \
      --nproc-per-node "$most" scripts/gpu/time_saves.py "$out/saves-$on.json" \
      train --model "$model" "${model_flags[@]}" ${device[@]+"${device[@]}"} --dp-shard-size -1 \
      --async-save $on --max-steps 8 --save-steps 2 --save-total-limit 1 \
      --save-consolidated none --output-dir "$out/saves" > "$out/saves-$on.log" 2>&1 || return 1
  done
  rm -rf "$out/saves"
  printf '{"async_save": %s, "waits": %s}\n' "$(cat "$out/saves-true.json")" \
    "$(cat "$out/saves-false.json")" > "$out/saves.json"
  rm "$out/saves-true.json" "$out/saves-false.json"
}

resume() {
  local run=$out/resume half=$((most / 2))
  rm -rf "$run"
  train --nproc "$most" --max-steps 2 --save-consolidated none --output-dir "$run" \
    > "$out/resume.log" 2>&1 || return 1
  train --nproc "$half" --max-steps 4 --save-consolidated none --output-dir "$run" --resume auto \
    --gradient-accumulation-steps 2 >> "$out/resume.log" 2>&1 || return 1
  printf '{"ranks": [%d, %d], "losses": [%s]}\n' "$most" "$half" \
    "$(sed -E 's/.*"loss": ([^,]*),.*/\1/' "$run/metrics.jsonl" | paste -sd ,)" > "$out/resume.json"
  rm -rf "$run"
}

kill_rank() {
  local run=$out/kill began code launcher victim
  rm -rf "$run"
  "$python" -m liger_cli train --model "$model" "${model_flags[@]}" ${device[@]+"${device[@]}"} \
    --dp-shard-size -1 --nproc "$most" --max-steps 100000 --save-steps 0 --output-dir "$run" \
    > "$out/kill.log" 2>&1 &
  launcher=$!
  until [ -s "$run/metrics.jsonl" ]; do
    kill -0 "$launcher" 2> /dev/null && [ "$SECONDS" -lt "$limit_s" ] || { kill "$launcher"; return 1; }
    sleep 0.5
  done
  victim=$(pgrep -P "$launcher" | tail -n 1)
  began=$(date +%s.%N)
  kill -KILL "$victim"
  wait "$launcher"
  code=$?
  printf '{"seconds": %.1f, "exit_code": %d, "said": "%s"}\n' \
    "$(bc <<< "$(date +%s.%N) - $began")" "$code" \
    "$(grep -m 1 '^error: ' "$out/kill.log" | tr -d '"\\')" > "$out/kill.json"
  rm -rf "$run"
  [ "$code" -eq 5 ]
}

failed=0
for part in "${parts[@]}"; do
  SECONDS=0
  case $part in
    bench:*) bench_row "${part#bench:}" ;;
    saves) saves ;;
    resume) resume ;;
    kill) kill_rank ;;
    summary) "$python" scripts/gpu/scaling_summary.py "$out" ;;
    *) echo "no part is called $part" >&2; false ;;
  esac
  code=$?
  echo "$part: exit $code after $SECONDS s"
  [ $code -eq 0 ] || failed=1
done
exit $failed
