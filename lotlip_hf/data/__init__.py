"""Data to train on: records of images and captions, caption sampling, collating, and the embedded data set Scenes."""
