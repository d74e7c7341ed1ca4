#!/bin/bash
# Amber on 28 nodes of eight GPUs each, SLURM 22.05 or later:   sbatch docs/examples/slurm.sh
#
# It stops, saves and requeues itself before its time is over, until the run is done. It was not submitted to a
# cluster; docs/clusters.md says what of it was tried, and how. Lines to adapt are marked.
#SBATCH --job-name=amber
#SBATCH --nodes=28
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
# --signal: to this script alone, 900 s before --time is over: longer than --shutdown-timeout below (adapt both).
# --requeue: SLURM starts the job again when a node fails, and only then. The end of its time is `requeue` below.
set -u

NODES=${SLURM_NNODES:?start this with sbatch}
LAYOUT=(backend.name=cuda "backend.parallel.dp=$NODES" backend.parallel.fsdp=8) # adapt
GRACE=700                                                                         # adapt: `crystal plan` prints it
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# restarts over several machines need it (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# adapt, where a node has several networks: without them NCCL and gloo may take one that does not lead to the others
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

stop() {
  kill -TERM "$STEP" # srun passes it on to every torchrun, torchrun to its workers, which stop and save
  wait "$STEP"
}
trap 'stop; scontrol requeue "$SLURM_JOB_ID"; exit' USR1
trap 'stop; exit 130' TERM # somebody's: `scancel --batch --signal=TERM`. The run goes on when it is submitted again

# since SLURM 22.05 srun does not take --cpus-per-task from sbatch: without it all of a node's processes share one core
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
  torchrun --nnodes "$NODES" --nproc-per-node 8 --max-restarts 10 --shutdown-timeout "$GRACE" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m crystal.cli train amber-7b "${LAYOUT[@]}" &
STEP=$!
wait "$STEP"
