"""Arithmetic that several quantization methods share; each module is one idea and imports only torch.

`grid` and `kmeans` make codebooks, `nearest` rounds to them, `cholesky`, `order` and `sweep` choose codes with error
feedback, `descent` improves codes one at a time, and `codebook` refits a codebook to its codes. `request` holds what
every method does before and after.
"""
