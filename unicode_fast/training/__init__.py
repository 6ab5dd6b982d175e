"""Pre-training: the step, its execution on devices and ranks, run folders, and logs."""
