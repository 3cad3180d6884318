"""Training data: records of images and captions, readers of data sets, strategies that draw texts, the collator."""
