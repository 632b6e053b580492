"""States: solvers of reverse KL on discrete targets."""
