"""Quire's PagedAttention engine: a library without Ray, HTTP or a GPU."""
