"""Reverse KL and the divergences between the two KLs on fixed nodes, with more of them until the answer stays the same.

Solvers: `natural_gradient` (full Gaussians), `mean_field` (diagonal and low-rank ones), `sample_average` (mixtures), `two_sided`
(divergences that also read points of p). Their parts: `gaussian_rule` (the nodes), `starts` (modes of p), `ensemble` and
`vector_elbo` (losses of several models at once), `doubling` (when there are enough nodes).
"""
