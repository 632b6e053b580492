"""Process: states that belong to the whole process: threads, seeds, modes of torch, memory and signals."""
