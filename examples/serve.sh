#!/usr/bin/env bash
# Serves a model on a GPU with DuetScheduler. Arguments go on to `vllm serve`.
#
#   pip install 'vllm-duet[vllm]'
#   examples/serve.sh                          # Qwen/Qwen3-8B
#   MODEL=meta-llama/Llama-3.1-8B-Instruct TBT_SLO_MS=50 examples/serve.sh --port 9000
set -euo pipefail

exec vllm serve "${MODEL:-Qwen/Qwen3-8B}" \
  --scheduler-cls vllm_duet.DuetScheduler \
  --additional-config "{\"duet\": {\"tbt_slo_ms\": ${TBT_SLO_MS:-100}}}" \
  "$@"
