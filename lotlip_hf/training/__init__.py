"""Training: the objective over processes, in tiles and in chunks."""
