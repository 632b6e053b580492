"""States: reverse KL on discrete targets: sums over all states, coordinate ascent, and the score function."""
