#!/usr/bin/env bash
# Codex CLI: a task for which the model runs a command.
set -euo pipefail
modules=$(cd "$(dirname "$0")/.." && pwd)/node_modules
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export CODEX_HOME=$folder HOME=$folder
cat > config.toml <<END
model = "fake"
model_provider = "ottava"
[model_providers.ottava]
name = "ottava"
base_url = "$1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
END
"$modules/.bin/codex" exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox \
    --output-last-message said.txt "Hi" </dev/null
grep -qx "It is 21 degrees in Bonn." said.txt
