#!/bin/bash
# Two machines with 8 GPUs each, a process a GPU, and a file system that both see: sbatch launch/slurm.sh
# Two minutes before its time is over, and when it is preempted, the run saves and leaves; it continues when the job is
# queued again (--requeue does so after preemption) or the same line is typed.
#SBATCH --job-name=deperceiver
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=deperceiver.log
set -euo pipefail

srun --kill-on-bad-exit=1 deperceiver train --config=deperceiver_plus:r50_multiscale --workdir=/shared/runs/plus \
  --config.data.directory=/shared/coco --config.data.prepared_directory=/shared/prepared \
  --config.data.batch_size=64 --config.data.num_workers=6 --config.precision=bfloat16 \
  --config.model.backbone.weights=/shared/resnet50.pth
