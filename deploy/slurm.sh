#!/bin/bash
# RUN=… DATA=… sbatch deploy/slurm.sh --init WEIGHTS --text-tokenizer FILE --fast-last-id 257023: one process for each GPU,
# as JAX counts them under SLURM. RUN, DATA and the weights lie on a shared disk.
# What a preemption ends, or a lost host (exit code 75), is queued again and goes on.
#SBATCH --job-name=insula
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

RUN=${RUN:?a folder on a shared disk}
DATA=${DATA:?a data set or a mapping on a shared disk}

# A sealed checkpoint is something to go on from.
if compgen -G "$RUN/checkpoints/*/SHA256SUMS" > /dev/null; then
    WHAT=(--resume)
else
    WHAT=(--preset pi05 --data "$DATA" --batch-size 256 "$@") # --init, or --from-scratch
fi

code=0
srun --kill-on-bad-exit=0 insula train --processes.join --run "$RUN" "${WHAT[@]}" || code=$?

# srun gives the highest code of all tasks. 75: one was lost; 130: a signal, with a checkpoint; 134 and 137: process 0
# aborted, or one was killed. Not for ever: what one task tells with a 1 hides behind the 75 of the others.
if [[ $code =~ ^(75|130|134|137)$ ]] && (( ${SLURM_RESTART_COUNT:-0} < 20 )); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
