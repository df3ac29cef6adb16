#!/usr/bin/env bash
# Whole training steps of real shapes, our patch beside eager, torch.compile and liger-kernel:
#
#   scripts/bench_models.sh DIR [--peer-path FOLDER | --peer-python FILE]
#
# writes DIR/bench-MODEL-CARD.json, and what was said meanwhile to DIR/bench-MODEL-CARD.log, one model
# after the other. The flags say where liger-kernel is, as those of `liger bench` do; without them
# that side is left out. A side that fails or does not fit is a line of the report; a model that
# takes longer than LIMIT_S keeps what it has measured. Exits 1 if a model has no report.
#
# From the environment: PYTHON (python3), CARD (what scripts/card.sh says), REPEATS (2), LIMIT_S
# (600), and MODELS, whose lines are preset, batch size, sequence length, steps of a run, and more
# flags of `liger bench`.
set -u
if [ $# -ne 1 ] && [ $# -ne 3 ]; then
  echo "usage: scripts/bench_models.sh DIR [--peer-path FOLDER | --peer-python FILE]" >&2
  exit 2
fi
out=$(realpath -m "$1")
sides=eager
peer=()
if [ $# -eq 3 ]; then
  peer=("$2" "$(realpath -sm "$3")")
  sides+=,liger-kernel
fi
sides+=,compile,patched+compile
cd "$(dirname "$0")/.." || exit 1
card=${CARD:-$(scripts/card.sh)}
[ -n "$card" ] || exit 3
python=${PYTHON:-python3} repeats=${REPEATS:-2} limit_s=${LIMIT_S:-600}
# Rows that all sides have room for on 80 GB.
models=${MODELS:-"llama-1b 8 2048 12
llama-3b 4 4096 8 --gradient-checkpointing
qwen3-0.6b 8 2048 12
gemma3-1b 4 2048 12"}
mkdir -p "$out" || exit 1

code=0
while read -r model batch length steps flags; do
  name=$out/bench-$model-$card
  began=$SECONDS
  # SIGINT has bench report what it has; the last resort must come later than that report.
  # shellcheck disable=SC2086
  timeout --signal=INT --kill-after=60 "$limit_s" "$python" -m liger_cli bench --model "$model" \
    --against "$sides" ${peer[@]+"${peer[@]}"} --repeats "$repeats" --steps "$steps" \
    --per-device-train-batch-size "$batch" --max-length "$length" $flags --json \
    > "$name.unfinished" 2> "$name.log" < /dev/null
  ended=$?
  if grep -q '"arms"' "$name.unfinished"; then
    mv "$name.unfinished" "$name.json"
  else
    rm "$name.unfinished"
    code=1
  fi
  echo "$model: exit $ended after $((SECONDS - began)) s; $(grep -c ' run [0-9]* of ' "$name.log") runs"
  grep -h '^patched against\|^error' "$name.log"
done <<< "$models"
exit $code
