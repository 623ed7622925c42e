"""Recorded routing under another capacity, k, placement or layout, without training."""
