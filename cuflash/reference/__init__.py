"""Attention written to be read, for arrays of any module (NumPy, CuPy, torch, JAX), with gradients.

`standard_attention` is the definition, `chunked_attention` the algorithm of Rabe & Staats 2021 in O(√n) memory.
"""

from cuflash.reference.chunked import chunked_attention, chunked_attention_vjp
from cuflash.reference.standard import standard_attention, standard_attention_vjp
from cuflash.vjp import register

register(standard_attention, standard_attention_vjp)
register(chunked_attention, chunked_attention_vjp)

__all__ = ["chunked_attention", "chunked_attention_vjp", "standard_attention", "standard_attention_vjp"]
