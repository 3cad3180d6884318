"""Training: options, what a run starts from, its batches, the objective over processes, the loop, checkpoints, log."""
