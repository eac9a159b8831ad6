#!/usr/bin/env bash
# A minute of load: every route and kind of input once, then both variants at a low rate. Fails if a request does.
#
#   benchmarks/load/smoke.sh
#   URL=http://127.0.0.1:8000 benchmarks/load/smoke.sh
#
# Variables: those of common.sh, and RATE (1 request/s), SECONDS_EACH (12 s a phase).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SHORT="--input-len 32 --output-len 8"
# shellcheck disable=SC2086 # several arguments
{
    bench $SHORT --rounds 1 --burst 4 --json "$OUT/completions.json"
    bench $SHORT --rounds 1 --burst 4 --route chat --json "$OUT/chat.json"
    bench $SHORT --rounds 1 --burst 4 --prefixes 2:32 --turns 2 --json "$OUT/prefixes.json"
    bench $SHORT --rounds 1 --concurrency 2 --requests 4 --text --json "$OUT/text.json"
    bench $SHORT --rounds 2 --rate "${RATE:-1}" --seconds "${SECONDS_EACH:-12}" --json "$OUT/rate.json"
}
"$PY" - "$OUT"/*.json <<'CHECK'
import json, sys
points = [p for path in sys.argv[1:] for r in [json.load(open(path))] for p in r.get("points", [r])]
failed, answered = sum(p["failed"] for p in points), sum(p["completed"] for p in points)
print(f"smoke: {answered} requests answered, {failed} failed")
sys.exit(failed > 0)
CHECK
