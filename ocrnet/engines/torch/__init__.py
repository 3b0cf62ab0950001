"""The PyTorch engine for CPUs and NVIDIA GPUs."""
