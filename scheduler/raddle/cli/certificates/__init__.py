"""Certificates of a cluster: one authority, one certificate an identity."""
