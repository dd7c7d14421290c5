"""Training: the step, the loop around it, optimizers, schedules and validation."""
