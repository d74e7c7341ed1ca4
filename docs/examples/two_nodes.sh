#!/bin/bash
# Two torchruns on this machine as two nodes of one process each, and what becomes of the run when something happens to
# the second:   docs/examples/two_nodes.sh killed|stopped|cut-off|slow RUN.yaml DIRECTORY [key=value ...]
#
#   killed   its torchrun and its process, by SIGKILL; then a third node takes its place
#   stopped  the same processes by SIGSTOP, for 5 s: a machine that hangs, and comes back
#   cut-off  its network goes down, for good; then a third node takes its place. Needs root and `ip netns`
#   slow     its process is stopped for 0.2 s of every 0.25 s, from then on
#
# What the nodes say goes to DIRECTORY/node-N, the run to DIRECTORY/run. The run must end by itself; ends with the exit
# code of the first node's torchrun, or with 77 where this machine cannot do what is asked.
set -eu

WHAT=${1:?killed, stopped, cut-off or slow} RUN=${2:?a run file} DIRECTORY=${3:?a directory}
shift 3
PYTHON=${PYTHON:-python}
NET=crystal$$ # of network namespaces, a bridge and its ends
NODES=() # process ids of torchruns
export OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
mkdir -p "$DIRECTORY"

networks() { [ "$WHAT" = cut-off ]; }

say() { echo "$(date +%T) $*"; }

# shellcheck disable=SC2329 # the trap calls it
clean_up() {
  for node in "${NODES[@]}"; do
    { pkill -KILL -P "$node"; kill -KILL "$node"; wait "$node"; } 2>/dev/null || true
  done
  networks || return 0
  for n in 1 2 3; do ip netns delete "$NET-$n" 2>/dev/null || true; done
  ip link delete "br$$" 2>/dev/null || true
}
trap clean_up EXIT

# A network of three machines: a bridge here, and a namespace at each of its ends.
make_network() {
  ip link add "br$$" type bridge && ip link set "br$$" up || return 1
  for n in 1 2 3; do
    ip netns add "$NET-$n" || return 1
    ip link add "v$n-$$" type veth peer name "e$n-$$" || return 1
    ip link set "v$n-$$" master "br$$" up
    ip link set "e$n-$$" netns "$NET-$n"
    ip -n "$NET-$n" addr add "10.213.7.$n/24" dev "e$n-$$"
    ip -n "$NET-$n" link set "e$n-$$" up
    ip -n "$NET-$n" link set lo up
  done
}

node() { # N: start the N-th
  local inside=() place=127.0.0.1 own=127.0.0.1 host=false
  [ "$1" = 1 ] && host=true # the first has the store where all meet; an address in a namespace is not recognized
  if networks; then
    inside=(ip netns exec "$NET-$1" env "GLOO_SOCKET_IFNAME=e$1-$$") place=10.213.7.1 own=10.213.7.$1
  fi
  "${inside[@]}" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 3 \
    --shutdown-timeout 60 --monitor-interval 0.1 --local-addr "$own" \
    --rdzv-backend c10d --rdzv-endpoint "$place:$PORT" --rdzv-id "two-$$" \
    --rdzv-conf "is_host=$host,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120" \
    -m crystal.cli train "$RUN" backend.name=cuda backend.device=cpu backend.parallel.dp=2 \
    "run_dir=$DIRECTORY/run" "${@:2}" >"$DIRECTORY/node-$1" 2>&1 &
  NODES+=($!)
}

saved() { compgen -G "$DIRECTORY/run/checkpoints/step-*/checkpoint.json" >/dev/null; }

PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
if networks && ! make_network 2>"$DIRECTORY/network"; then
  say "no network namespaces here: $(head -n 1 "$DIRECTORY/network")"
  exit 77
fi
node 1 "$@"
sleep 2
node 2 "$@"
until saved; do
  kill -0 "${NODES[0]}" 2>/dev/null || { say "the run ended before a checkpoint"; exit 1; }
  sleep 0.1
done
second=${NODES[1]}
case $WHAT in
  killed)
    pkill -KILL -P "$second" || true
    kill -KILL "$second"
    say "the second node is killed, a third starts"
    node 3 "$@"
    ;;
  stopped)
    worker=$(pgrep -P "$second")
    kill -STOP "$second" "$worker"
    say "the second node hangs"
    sleep 5
    kill -CONT "$worker" "$second"
    say "it goes on"
    ;;
  cut-off)
    ip link set "v2-$$" down
    say "the second node is cut off, a third starts"
    node 3 "$@"
    ;;
  slow)
    worker=$(pgrep -P "$second")
    say "the second node is slow"
    while kill -STOP "$worker" 2>/dev/null; do
      sleep 0.2
      kill -CONT "$worker" 2>/dev/null || true
      sleep 0.05
    done &
    ;;
  *) say "expected killed, stopped, cut-off or slow, got $WHAT"; exit 2 ;;
esac
code=0
wait "${NODES[0]}" || code=$?
say "the first node ended with $code"
exit "$code"
