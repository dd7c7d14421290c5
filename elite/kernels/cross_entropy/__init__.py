"""Cross-entropy of a tile of logits, which become their own gradient in place."""
