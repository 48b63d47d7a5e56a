"""The cache that `paged_attention` reads: blocks with reference counts, and the sequences that hold them."""
