"""Runs read from their folders, also while they train: config, curves, status. Imports no torch."""
