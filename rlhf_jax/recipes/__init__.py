"""Whole runs composed of algorithms: a key in, a learner out."""
