#!/bin/bash
#SBATCH --job-name=rosa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# Five minutes before the limit, to all tasks: time to write a checkpoint.
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

srun python -m rosa_lightning fit --config configs/rosa.yaml --config configs/slurm.yaml
