"""Forward KL from a density alone, or from few samples and a density: particles and weighted draws of the model are the rows."""
