"""Checkpoint files. This file imports nothing, so that runs on OpenVINO do not load torch."""
