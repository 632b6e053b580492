"""Rows: maximum likelihood on rows of p, exactly or to a stated tolerance: closed forms, EM, Newton's method."""
