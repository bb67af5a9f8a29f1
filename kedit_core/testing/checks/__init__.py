"""The checks: plain functions `check_<behaviour>(bench)` that raise AssertionError.

Each looks at the model itself, not at what the method says of it; its first docstring line is
what a method that passes can claim.
"""
