"""Many trainings of one question: trials, slots, folds, and the point to choose."""
