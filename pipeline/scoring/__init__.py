"""Scoring in bulk: images of which there may be more than fit into memory, into Parquet."""
