#!/usr/bin/env bash
# Claude Code: a task for which the model runs a command.
set -euo pipefail
modules=$(cd "$(dirname "$0")/.." && pwd)/node_modules
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HOME=$folder ANTHROPIC_BASE_URL=${1%/v1} ANTHROPIC_API_KEY=none-none-none
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1
said=$(node "$modules/@anthropic-ai/claude-code/cli-wrapper.cjs" -p "Hi" --model fake --allowedTools 'Bash(echo:*)' </dev/null)
echo "$said"
[ "$said" = "It is 21 degrees in Bonn." ]
