#!/usr/bin/env bash
# The GPU of this machine as a part of a file's name: NVIDIA H100 80GB HBM3 is h100.
nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 \
  | sed -E 's/^NVIDIA (GeForce )?//; s/ [0-9]+GB.*//; s/-[0-9]+GB.*//; s/[^A-Za-z0-9.]+/-/g' | tr '[:upper:]' '[:lower:]'
