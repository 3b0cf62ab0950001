"""The PyTorch engine: CPU and NVIDIA GPUs."""
