#!/usr/bin/env bash
# The ten commands of docs/tutorial.md, as they are written there:
# bash -v scripts/walkthrough.sh 2>&1 shows each before its output. Some minutes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

make setup && source .venv/bin/activate
liger doctor
liger inspect --model llama
liger config init lora.yaml --template lora
liger data preview -c lora.yaml --max-length 128
liger eval -c lora.yaml --max-length 128 --max-eval-samples 16
liger train -c lora.yaml --max-length 128 --per-device-train-batch-size 2 --max-steps 12 --max-eval-samples 16 --output-dir runs/first
liger merge runs/first --output runs/first-merged --dtype float32
liger eval -c lora.yaml --model runs/first-merged --max-length 128 --max-eval-samples 16
liger generate --model runs/first-merged --chat --prompt "Hi! What did you do today?"
