"""Other libraries' densities and models, one ecosystem a file, as functions of tensors that autograd differentiates."""
