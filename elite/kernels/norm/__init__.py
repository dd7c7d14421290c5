"""Root-mean-square and layer norm, with the addition to the residual stream before them."""
