#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes and without a package index; a JSON file after every part, so that
# whatever ends it leaves what was found before.
#
#     bash benchmarks/gpu_check.sh OUT            # PYTHON=python3 by default
#
# It runs on torch 2.11 and triton 3.6 too. Packages that the machine lacks (pydantic, mup, optuna) can be brought as
# wheels: WHEELS=folder bash benchmarks/gpu_check.sh OUT. On a machine without a GPU, DEVICE=cpu runs the same parts but
# the kernels over gloo with a tiny model, which shows that the script works and nothing else.
set -uo pipefail
out=${1:?"usage: gpu_check.sh OUT"}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl || exit 2
fi
export PYTHONPATH="$here:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" CRYSTAL_CACHE="$scratch/cache"
failed=0

# part NAME SECONDS COMMAND...: its stdout, which is JSON, is OUT/NAME.json, what else it says OUT/NAME.log
part() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$seconds" "$@" > "$scratch/part.json" 2> "$out/$name.log"
  local code=$?
  # one that was killed or could not begin printed nothing
  [ -s "$scratch/part.json" ] ||
    printf '{"passed": false, "exit": %d, "log": "%s.log"}\n' "$code" "$name" > "$scratch/part.json"
  mv "$scratch/part.json" "$out/$name.json"
  [ "$code" -eq 0 ] || failed=1
  echo "$name: exit $code after $((SECONDS - began)) s"
}

cd "$scratch" || exit 2
part machine 30 "$python" "$here/benchmarks/gpu_check.py" machine --device "$device"
for name in noticed documents pinned; do
  part "$name" 30 "$python" "$here/benchmarks/gpu_check.py" "$name" --device "$device"
done
if [ "$device" = cuda ]; then
  part kernels-verify 80 "$python" -m crystal.cli bench kernels --verify --shapes crystalcoder-7b --json
  part kernels-bench 120 "$python" -m crystal.cli bench kernels --shapes crystalcoder-7b --json
fi
gpus=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
part layout 50 "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
  "$here/benchmarks/gpu_check.py" layout --device "$device"
part step 75 "$python" "$here/benchmarks/gpu_check.py" step --device "$device"
exit "$failed"
