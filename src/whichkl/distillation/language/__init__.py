"""Language models: continuations drawn from one, and the KL of sequences between two of them, both ways and with errors."""
