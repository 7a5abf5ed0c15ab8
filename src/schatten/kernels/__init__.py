"""The three products every solver is written in, behind one seam.

`gram(X) = X X^T`, `sym(A, B, C, a, b) = a C + b A B` where the result is known to be symmetric, and
`affine(B, X, a) = a X + B X`. Eager torch is the reference; a faster back-end replaces these names and nothing else.
"""

from schatten.kernels.eager import affine, gram, sym

__all__ = ["affine", "gram", "sym"]
