"""Is muP right: the zoo under the audit and the coordinate check of crystal.mup."""
