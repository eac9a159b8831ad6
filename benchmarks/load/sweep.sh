#!/usr/bin/env bash
# Latency over throughput of both variants, as a result and a picture: rates doubled to saturation, or those of RATES.
#
#   benchmarks/load/sweep.sh
#   URL=http://127.0.0.1:8000 RATES=4,8,12,16,20 INPUT=512 OUTPUT=128 GOODPUT='ttft:200 tpot:20' benchmarks/load/sweep.sh
#
# Variables: those of common.sh, and RATE (0.5, where doubling starts), RATES, INPUT (64), OUTPUT (32), SECONDS_EACH
# (30 s a phase), ROUNDS (2), GOODPUT, MORE (further options of `ottava bench`).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "${RATES:-}" ]; then load=(--rates "$RATES"); else load=(--rate "${RATE:-0.5}" --sweep); fi
# shellcheck disable=SC2086 # several options
bench "${load[@]}" --input-len "${INPUT:-64}" --output-len "${OUTPUT:-32}" --seconds "${SECONDS_EACH:-30}" \
    --rounds "${ROUNDS:-2}" ${GOODPUT:+--goodput "$GOODPUT"} --json "$OUT/sweep.json" --picture "$OUT/sweep.png" ${MORE:-}
echo "wrote $OUT/sweep.json and $OUT/sweep.png" >&2
