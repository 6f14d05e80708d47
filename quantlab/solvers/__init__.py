"""Arithmetic that several quantization methods share; each module is one idea.

`grid` and `kmeans` make codebooks, `nearest` rounds to them, `cholesky`, `order` and `sweep` choose codes with error
feedback, `descent` improves codes one at a time and `blocks` many at once, `codebook` refits a codebook to its codes,
and `joint` improves both together. `outliers` chooses and hands over sparse corrections, `products` adds up Hessians.
`request` and `options` hold what every method does before and after.
"""
