"""Decode image files to the uint8 RGB pixels that a network takes."""
