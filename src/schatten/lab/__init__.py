"""The laboratory: data, models, the training loop, comparisons and their reports. Needs `pip install schatten[lab]`."""
