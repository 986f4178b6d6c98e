"""Finding the residual branches of a model from one traced forward.

Read in this order: `trace` records a forward, `graph` answers questions about it, `residuals` says which additions are
residual, `seams` where their branches end, `batch` which axis holds the rows; `rdp.branches` puts them together.
"""
