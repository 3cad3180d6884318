"""Benchmarks: their files as images with texts or classes."""
