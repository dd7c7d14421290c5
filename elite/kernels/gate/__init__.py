"""What stands between the maps of an MLP: SiLU of the gate times up, or GELU."""
