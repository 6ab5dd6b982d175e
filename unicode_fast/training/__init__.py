"""Pre-training: the step, its execution on devices and ranks, run folders, and what is logged."""
