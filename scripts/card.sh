#!/usr/bin/env bash
# The GPU of this machine as a part of a file's name: NVIDIA H100 80GB HBM3 is h100.
if ! names=$(nvidia-smi --query-gpu=name --format=csv,noheader); then
  echo "no name of a GPU from nvidia-smi: say CARD=NAME" >&2
  exit 3
fi
head -n 1 <<< "$names" \
  | sed -E 's/^NVIDIA (GeForce )?//; s/ [0-9]+GB.*//; s/-[0-9]+GB.*//; s/[^A-Za-z0-9.]+/-/g' \
  | tr '[:upper:]' '[:lower:]'
