"""The benchmark of kedit: metrics and the runs that compute them."""
