"""Conversions: evidence about a distribution that can be neither sampled nor evaluated → a `Target`.

A new kind of evidence is one file in this folder, with a class that keeps the protocol `convert.Evidence`, and one row of
`table.CONVERSIONS`, which the advice shows.
"""
