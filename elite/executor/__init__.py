"""How a forward and backward pass is carried out."""
