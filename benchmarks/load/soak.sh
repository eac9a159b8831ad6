#!/usr/bin/env bash
# An hour of load in one command: memory and open files of both processes and the counters of /metrics are watched, and
# a verdict ends it (benchmarks/load/watch.py says what is judged). Exit code 1 if it fails.
#
#   benchmarks/load/soak.sh
#   DURATION=600 benchmarks/load/soak.sh
#   URL=http://127.0.0.1:8000 SERVER_PID=1234 RATE=8 benchmarks/load/soak.sh
#
# Variables: those of common.sh, and DURATION (3600 s), ROUND (120 s), RATE (1 request/s), INPUT (64), OUTPUT (32),
# SPREAD (0.5), EVERY (10 s between samples), MAX_GROWTH (0.05 of a process's memory), SERVER_PID (of a server that was
# started elsewhere; without it only /metrics is watched).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$PY" -m benchmarks.load.watch --url "$URL" ${SERVER_PID:+--pid "$SERVER_PID"} --every "${EVERY:-10}" \
    --out "$OUT/watch.jsonl" &
watcher=$!
number=0
end=$(($(date +%s) + ${DURATION:-3600}))
while [ "$(date +%s)" -lt "$end" ]; do
    number=$((number + 1))
    bench --rate "${RATE:-1}" --seconds "${ROUND:-120}" --rounds 1 --seed "$number" --input-len "${INPUT:-64}" \
        --output-len "${OUTPUT:-32}" --spread "${SPREAD:-0.5}" --json "$OUT/round-$(printf %04d "$number").json"
done
sleep 2 # until the last runs are released
kill "$watcher"
wait "$watcher" || true
"$PY" -m benchmarks.load.watch --judge "$OUT/watch.jsonl" --max-growth "${MAX_GROWTH:-0.05}" --results "$OUT"/round-*.json
