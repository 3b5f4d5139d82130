"""Benchmarks on real shaped networks: one namespace and one network card a worker."""
