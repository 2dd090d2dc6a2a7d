"""Procedural clips with true depth and segments for training and testing tiny models; see README.md."""
