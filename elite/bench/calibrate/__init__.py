"""Real configurations, drawn by a seed, held against their plans: peaks of memory, time, and whether what fits runs."""
