"""Batches on several machines: what to hand out, to which worker, and what to do when one is lost."""
