"""Finding the residual branches of a model in a traced forward; nothing here knows of rows.

Read in this order: `trace` records a forward as `records`, `graph` answers questions about it, `sums` says which
functions add, `residuals` which additions are residual, `seams` where their branches end, `candidates` which of these
can be gated, `cuts` where else gradients are stopped, `nesting` which lie inside others, `find` puts them together.
"""
