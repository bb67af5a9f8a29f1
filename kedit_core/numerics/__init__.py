"""Numerics that methods share.  Nothing here carries a method's name."""
