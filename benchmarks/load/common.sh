# Sourced by the scripts of this folder: their variables, and a server to load.
#
# URL       a running server; left empty, one is started on a free port and stopped at the end
# SERVE     arguments of `ottava serve` for that one (default: none, which is the demo model)
# OUT       folder for results (default: a fresh one in /tmp)
# VARIANTS  that take turns (default: w8a8,fp16); empty for servers other than ottava
# PY        interpreter with ottava (default: .venv/bin/python of this tree)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PY:-.venv/bin/python}
OUT=${OUT:-$(mktemp -d /tmp/ottava-load.XXXXXX)}
VARIANTS=${VARIANTS-w8a8,fp16}
mkdir -p "$OUT"

if [ -z "${URL:-}" ]; then
    PORT=$("$PY" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    URL=http://127.0.0.1:$PORT
    # shellcheck disable=SC2086 # several arguments
    "$PY" -m service serve ${SERVE:-} --port "$PORT" >"$OUT/server.log" 2>&1 &
    SERVER_PID=$!
    trap 'kill "$SERVER_PID" 2>/dev/null; wait "$SERVER_PID" 2>/dev/null || true' EXIT
fi

echo "waiting for $URL/ready; results go to $OUT" >&2
until "$PY" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$URL/ready" 2>/dev/null; do
    if [ -n "${SERVER_PID:-}" ] && ! kill -0 "$SERVER_PID" 2>/dev/null; then
        tail -5 "$OUT/server.log" >&2
        exit 1
    fi
    sleep 1
done

bench() {
    "$PY" -m service bench --url "$URL" ${VARIANTS:+--variants "$VARIANTS"} "$@"
}
