"""Which layers of a student are worth keeping as softmax attention: found by swapping, without training."""
