"""Running a branch on some of its rows.

`plan` says which branches can be, `writer` writes one down as a `program`, `verify` tries it, `branch` runs it.
"""
