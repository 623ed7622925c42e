"""Importing this keeps all that was imported before out of garbage collection: forks of this process collect often."""

import gc

gc.collect()
gc.freeze()
