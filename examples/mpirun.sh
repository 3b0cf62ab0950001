#!/usr/bin/env bash
# Two machines of eight GPUs under Open MPI, started on the first. The project, the data and save_dir lie on a file system that
# both see under the same path; each has the same environment. Lines with CHANGE are yours.
# To stop it with a checkpoint: kill -USR1 PID_OF_MPIRUN. On Ctrl-C and SIGTERM mpirun kills the ranks before they can save.
set -euo pipefail
cd "$(dirname "$0")/.."

export MASTER_ADDR=node01        # CHANGE: the first machine of examples/hosts, as the others reach it
export MASTER_PORT=29500         # CHANGE: a port that is free there

# --bind-to none: else a rank and its loader's workers may share one core.
mpirun --allow-run-as-root --hostfile examples/hosts -n 16 --bind-to none --merge-stderr-to-stdout \
    -x MASTER_ADDR -x MASTER_PORT -x PATH \
    python train.py --config config/ocrnet/config_ocrnet_hrw48_16k.yml --device_target GPU --mix True \
    --save_dir output --resume_ckpt auto --batch_size 1 \
    --set data.dataset_dir=/shared/cityscapes  # CHANGE: where Cityscapes is
