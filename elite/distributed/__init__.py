"""More than one process: launching them, and what they tell each other."""
