"""Exact: divergences of two densities without sampling error: closed forms, sums over states, quadrature."""
