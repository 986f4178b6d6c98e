"""Running a branch on some of its rows.

`plan` says which branches can be: `writer` writes one down as a `program` of `operations`, from two forwards that
`twins` compares, and `verify` tries it. `branch` runs it.
"""
