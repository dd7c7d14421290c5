"""What optimizations put into a model: autograd functions and forwards. They need torch, so they are imported where they act."""
