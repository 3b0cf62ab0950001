#!/usr/bin/env bash
# Two machines with eight GPUs each under Open MPI; start it on the first. The project, the data and save_dir are on a file system
# that both machines mount under the same path, and both have the same environment. Adapt the lines with CHANGE.
# To stop the run with a checkpoint: kill -USR1 PID_OF_MPIRUN. On Ctrl-C and SIGTERM mpirun kills the ranks before they can save.
set -euo pipefail
cd "$(dirname "$0")/.."

export MASTER_ADDR=node01        # CHANGE: the first machine of examples/hosts, by a name that the others can reach
export MASTER_PORT=29500         # CHANGE: a free port on that machine

# --bind-to none: otherwise a rank and its dataloader workers may share one core.
mpirun --allow-run-as-root --hostfile examples/hosts -n 16 --bind-to none --merge-stderr-to-stdout \
    -x MASTER_ADDR -x MASTER_PORT -x PATH \
    python train.py --config config/ocrnet/config_ocrnet_hrw48_16k.yml --device_target GPU --mix True \
    --save_dir output --resume_ckpt auto --batch_size 1 \
    --set data.dataset_dir=/shared/cityscapes  # CHANGE: the folder of Cityscapes
