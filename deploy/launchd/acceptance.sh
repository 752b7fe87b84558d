#!/bin/sh
# Installs mlxd under launchd on this Mac, under a label of its own, and tries what an operator relies on: it becomes
# ready, comes back after kill -9, keeps its keys, drains, reopens its log, stays down with a wrong configuration, and
# goes without a trace. One line for each, pass or FAIL; exit code 0 when all passed. It removes what it installed,
# whatever happens, and touches no other installation.
#
#   sudo deploy/launchd/acceptance.sh            a daemon, as in production
#   deploy/launchd/acceptance.sh --agent         an agent of the user who is logged in on the screen
#   deploy/launchd/acceptance.sh --plan          print what would be tried, and do nothing
#
# MLXD (the command, default .venv/bin/mlxd of this checkout), MODEL (a folder, default the demo model in .state).
set -u

here=$(cd "$(dirname "$0")/../.." && pwd)
MLXD=${MLXD:-$here/.venv/bin/mlxd}
MODEL=${MODEL:-$here/.state/models/SmolLM2-135M-Instruct}
label=mlxd-acceptance
patience=300 # seconds for a load, the throttle of 30 s included
plan=
agent=
for argument in "$@"; do
    case $argument in
    --plan) plan=1 ;;
    --agent) agent=--agent ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

passed=0
failed=0
work=
export PYTHONDONTWRITEBYTECODE=1

if [ -n "$agent" ]; then
    target=gui/$(id -u)/$label
    plist=$HOME/Library/LaunchAgents/$label.plist
    logs=$HOME/Library/Logs/$label
else
    target=system/$label
    plist=/Library/LaunchDaemons/$label.plist
    logs=/var/log/$label
fi

# try WORDS FUNCTION: one line of the report. What FUNCTION prints is shown when it fails.
try() {
    if [ -n "$plan" ]; then
        printf 'would try: %s\n' "$1"
    elif said=$("$2" 2>&1); then
        passed=$((passed + 1))
        printf 'pass  %s\n' "$1"
    else
        failed=$((failed + 1))
        printf 'FAIL  %s\n' "$1"
        printf '%s\n' "$said" | tail -n 20 | sed 's/^/      /'
        return 1
    fi
}

mlxd() { "$MLXD" --config "$work/mlxd.toml" service "$@"; }

# The installed code, as the account that it runs as.
installed() {
    if [ -n "$agent" ]; then
        "$MLXD" --config "$work/mlxd.toml" "$@"
    else
        base="/Library/Application Support/$label"
        (cd / && sudo -u "_$label" "$base/current/env/bin/python" -I -m service --config "$base/config/mlxd.toml" "$@")
    fi
}

print_job() { launchctl print "$target" | sed -n "s/^	$1 = //p" | head -n 1; }
http() { curl -s -o /dev/null -w '%{http_code}' --max-time 10 "$@"; }
ready() { [ "$(http "$url/readyz")" = 200 ]; }
with_key() { curl -sN --max-time 120 -H "authorization: Bearer $(cat "$work/key")" "$@"; }

# within SECONDS COMMAND...: until it succeeds.
within() {
    left=$(($1 * 5))
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { echo "not within its time: $*"; return 1; }
        sleep 0.2
    done
}

generate() {
    with_key "$url/generate" -H 'content-type: application/json' \
        -d '{"prompt": "Once upon a time", "max_tokens": 8}' | grep -q '"finish_reason"'
}

# A stream of many tokens, in the background; returns when it has begun.
stream() {
    : >"$work/stream"
    with_key "$url/v1/completions" -H 'content-type: application/json' -o "$work/stream" -d '{"model": "default",
        "prompt": "Once upon a time", "max_tokens": 600, "stream": true, "logit_bias": {"0": -100, "2": -100}}' &
    streaming=$!
    within 30 grep -q '^data: ' "$work/stream"
}

is_a_mac() {
    [ "$(uname -s)" = Darwin ] || { echo 'launchd is on macOS only'; return 1; }
    [ -n "$agent" ] || [ "$(id -u)" = 0 ] || { echo 'a daemon needs root: sudo'; return 1; }
    [ -x "$MLXD" ] || { echo "no $MLXD: make install"; return 1; }
    [ -d "$MODEL" ] || { echo "no $MODEL: mlxd model fetch"; return 1; }
}

dry_run() {
    mlxd install $agent --name "$label" --model "$MODEL" --dry-run || return 1
    [ ! -e "$plist" ]
}

install_it() { mlxd install $agent --name "$label" --model "$MODEL" --wait "$patience"; }
lint() { plutil -lint "$plist"; }

again() { mlxd install $agent --name "$label" --model "$MODEL" | grep -q '^nothing to do$'; }

make_key() {
    installed keys create --name acceptance --scope inference --scope admin >"$work/key" && within 10 generate
}

kill_9() {
    before=$(print_job pid)
    stream || return 1
    kill -9 "$before" || return 1
    wait "$streaming"
    grep -q 'DONE' "$work/stream" && { echo 'the stream had ended before'; return 1; }
    within "$patience" other_pid "$before" && within "$patience" ready
}

other_pid() {
    now=$(print_job pid)
    [ -n "$now" ] && [ "$now" != "$1" ]
}

rotate() {
    before=$(print_job pid)
    log=$logs/mlxd.log
    [ -f "$log" ] || { echo "no $log"; return 1; }
    mv "$log" "$log.0" && launchctl kill SIGHUP "$target" && within 10 generate && within 10 test -s "$log" || return 1
    [ "$(print_job pid)" = "$before" ]
}

drain() {
    with_key -X POST "$url/admin/drain" && within 60 not_ready && [ "$(http "$url/livez")" = 200 ] || return 1
    with_key -X DELETE "$url/admin/drain" && within 10 generate
}

not_ready() { ! ready; }

restart_it() {
    stream || return 1
    mlxd restart $agent --name "$label" --wait "$patience" || return 1
    wait "$streaming"
    grep -q '^data: \[DONE\]' "$work/stream" || { echo 'the stream was cut'; tail -n 3 "$work/stream"; return 1; }
    case $(print_job 'last exit code') in 0*) ;; *) echo "exit code $(print_job 'last exit code')"; return 1 ;; esac
}

wrong_configuration() {
    if [ -n "$agent" ]; then config=$work/mlxd.toml; else config="/Library/Application Support/$label/config/mlxd.toml"; fi
    cp -p "$config" "$work/right" && printf '\n[nonsense]\nkey = 1\n' >>"$config" || return 1
    before=$(print_job runs)
    launchctl kill SIGTERM "$target" && within 120 down && launchctl kickstart "$target"
    sleep 40 # longer than the throttle: a storm would show
    down && [ "$(print_job runs)" -le $((before + 1)) ]
    stayed=$?
    mlxd status $agent --name "$label" 2>&1 | grep -q nonsense
    told=$?
    cp -p "$work/right" "$config" && launchctl kickstart "$target" && within "$patience" ready || return 1
    [ "$stayed" = 0 ] && [ "$told" = 0 ]
}

down() { [ -z "$(print_job pid)" ]; }

uninstall_it() {
    mlxd uninstall $agent --name "$label" --purge || return 1
    launchctl print "$target" >/dev/null 2>&1 && { echo 'still loaded'; return 1; }
    [ ! -e "$plist" ]
}

clean_up() {
    [ -n "$work" ] || return 0
    launchctl print "$target" >/dev/null 2>&1 && mlxd uninstall $agent --name "$label" --purge >/dev/null 2>&1
    rm -rf "$work"
    work=
}

prepare() {
    work=$(mktemp -d /tmp/mlxd-acceptance.XXXXXX) || exit 1
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    port=$("$(dirname "$MLXD")/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    mkdir "$work/state" && chmod 700 "$work/state"
    cat >"$work/mlxd.toml" <<TOML
[server]
port = $port
state_dir = "$work/state"
[ops]
bind = ""
[log]
file = "$logs/mlxd.log"
[model]
reference = "$MODEL"
[limits.plans.default]
requests_per_minute = 100000
TOML
}

try 'this is a Mac, and what is needed is here' is_a_mac || exit 1
[ -n "$plan" ] || prepare
try 'a dry run changes nothing' dry_run
if try 'install: bootstrapped and ready' install_it; then
    try 'the plist is well-formed' lint
    try 'a second install has nothing to do' again
    try 'a key can be made and used' make_key
    try 'kill -9 in mid-stream: started again, and ready' kill_9
    try 'the key is still good' generate
    try 'the log is opened anew at SIGHUP, by the same process' rotate
    try 'drained: up and not ready; undone: ready' drain
    try 'restart: a running stream ends whole, exit code 0' restart_it
    try 'a wrong configuration stays down, and status says why' wrong_configuration
fi
try 'uninstall: booted out, nothing left' uninstall_it
[ -n "$plan" ] && exit 0
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
