#!/usr/bin/env bash
# Whole training steps of real shapes, our patch beside eager, torch.compile and liger-kernel:
#
#   scripts/bench_models.sh DIR [--peer-path FOLDER | --peer-python FILE] [ROW...]
#
# writes DIR/bench-ROW-CARD.json, and what was said meanwhile to DIR/bench-ROW-CARD.log, one row after
# the other, or those that are named: llama-1b, llama-8b:lora. A row ends within LIMIT_S and a minute.
# The flags say where liger-kernel is, as those of `liger bench` do; without them that side is left
# out. A side that fails or does not fit is a line of the report; a row that takes longer keeps what it
# has measured. Exits 1 if a row has no report.
#
# From the environment: PYTHON (python3), CARD (what scripts/card.sh says), REPEATS (2), LIMIT_S (480),
# WEIGHTS (a folder for random weights of models that are to be quantised, 16 GB for llama-8b; by
# default a temporary one), and MODELS, whose lines are preset, batch size, sequence length, steps of a
# run, and more flags of `liger bench`. A preset may have a label, llama-8b:lora, for a file apart.
set -u
usage() {
  echo "usage: scripts/bench_models.sh DIR [--peer-path FOLDER | --peer-python FILE] [ROW...]" >&2
  exit 2
}
[ $# -ge 1 ] || usage
out=$(realpath -m "$1")
shift
peer=()
wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    --peer-path | --peer-python)
      [ $# -ge 2 ] || usage
      peer=("$1" "$(realpath -sm "$2")")
      shift 2
      ;;
    -*) usage ;;
    *)
      wanted+=("$1")
      shift
      ;;
  esac
done
cd "$(dirname "$0")/.." || exit 1
# Rows that all sides have room for on 80 GB. Those of llama-8b's adapters take 86 GB unpatched.
models=${MODELS:-"llama-1b 8 2048 12
llama-3b 4 4096 8 --gradient-checkpointing
qwen3-0.6b 8 2048 12
gemma3-1b 4 2048 12
llama-8b:lora 4 2048 12 --adapter lora --lora-r 16
llama-8b:lora-checkpointing 4 2048 10 --adapter lora --lora-r 16 --gradient-checkpointing
llama-8b:qlora 4 2048 8 --adapter lora --lora-r 16 --load-in-4bit
qwen3-4b:lora 8 1024 12 --adapter lora --lora-r 16
llama-8b:lora-r64 4 2048 12 --adapter lora --lora-r 64
qwen3-30b-a3b:6-layers 8 2048 8
mixtral-8x7b:2-layers 8 2048 8
gpt-oss-20b:4-layers 8 2048 8
olmoe-1b-7b:8-layers 8 2048 8
qwen3-30b-a3b:6-layers-few 2 1024 12"}
for row in ${wanted[@]+"${wanted[@]}"}; do
  if ! cut -d ' ' -f 1 <<< "$models" | grep -qxF -- "$row"; then
    echo "no row is called $row; rows: $(cut -d ' ' -f 1 <<< "$models" | paste -sd ' ')" >&2
    exit 2
  fi
done
card=${CARD:-$(scripts/card.sh)}
[ -n "$card" ] || exit 3
python=${PYTHON:-python3} repeats=${REPEATS:-2} limit_s=${LIMIT_S:-480}
mkdir -p "$out" || exit 1
weights=${WEIGHTS:-$(mktemp -d)}
[ -n "${WEIGHTS:-}" ] || trap 'rm -rf "$weights"' EXIT

# bitsandbytes quantises what it loads: a model with random weights is written before.
write_weights() {
  [ -f "$weights/$1/config.json" ] || "$python" - "$1" "$weights/$1" << 'PYTHON'
import sys

import torch

from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.model.tokenizers import load_tokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
source = resolve_model(sys.argv[1])
load_model(source, dtype=torch.bfloat16, device=device).save_pretrained(sys.argv[2])
load_tokenizer(source).save_pretrained(sys.argv[2])
PYTHON
}

# A label that begins with a number of layers cuts the preset to them: random weights of its shape.
cut_layers() {
  "$python" - "$1" "$2" "$3" << 'PYTHON'
import json
import sys

from liger_cli.training.model.source import resolve_model

name, num_layers, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = {**resolve_model(name).config, "num_hidden_layers": num_layers}
with open(path, "w") as file:
    json.dump(config, file)
PYTHON
}

code=0
while read -r row batch length steps flags; do
  if [ ${#wanted[@]} -gt 0 ] && ! printf '%s\n' "${wanted[@]}" | grep -qxF -- "$row"; then
    continue
  fi
  name=$out/bench-${row/:/-}-$card model=${row%%:*} began=$SECONDS
  sides=eager${peer[*]:+,liger-kernel}
  case $row in
    # What is asked of an adapter is a share of these two.
    *:*) ;;
    *) sides+=,compile,patched+compile ;;
  esac
  : > "$name.log"
  case $flags in
    *--load-in-*)
      write_weights "$model" 2>> "$name.log" < /dev/null
      model=$weights/$model
      ;;
  esac
  case $row in
    *:*-layers*)
      layers=${row#*:}
      cut_layers "$model" "${layers%%-*}" "$weights/${row/:/-}.json" 2>> "$name.log" < /dev/null
      model=$weights/${row/:/-}.json
      ;;
  esac
  # SIGINT has bench report what it has; the last resort must come later than that report.
  # shellcheck disable=SC2086
  timeout --signal=INT --kill-after=60 "$((limit_s - SECONDS + began))" "$python" -m liger_cli bench \
    --model "$model" --against "$sides" ${peer[@]+"${peer[@]}"} --repeats "$repeats" \
    --steps "$steps" --per-device-train-batch-size "$batch" --max-length "$length" $flags --json \
    > "$name.unfinished" 2>> "$name.log" < /dev/null
  ended=$?
  if grep -q '"arms"' "$name.unfinished"; then
    mv "$name.unfinished" "$name.json"
  else
    rm "$name.unfinished"
    code=1
  fi
  echo "$row: exit $ended after $((SECONDS - began)) s; $(grep -c ' run [0-9]* of ' "$name.log") runs"
  grep -h '^patched against\|^error' "$name.log"
done <<< "$models"
exit $code
