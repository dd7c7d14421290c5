"""Cross-entropy over a vocabulary that is seen tile by tile."""
