"""What computes the features of an `Encoder`: an engine a file."""
