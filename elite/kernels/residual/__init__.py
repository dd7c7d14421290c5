"""What joins the residual stream, after dropout, in one pass."""
