"""Training: options, model, batches, the objective over all processes, the loop, checkpoints and the log."""
