"""Images, labels and datasets: reading, augmentation, sampling, statistics."""
