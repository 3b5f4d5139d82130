"""Runs and their folders: training, processes, checkpoints, damage."""
