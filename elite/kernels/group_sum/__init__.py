"""Gradients of keys or values that query heads share: summed over the heads of a group, and added to what other queries gave."""
