"""Training: configuration, batches, the loop and its checkpoints. The part that needs autograd is each backend's `train.py`."""
