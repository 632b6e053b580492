"""Draws: gradient descent on random batches of rows and on fresh draws of q, for networks, flows and users' modules."""
