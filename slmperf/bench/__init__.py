"""Measurements: one line per shape and implementation, against a roof of the same run.

rows    times the cases of an op and prints their lines; bench/gpu_check.py writes them as JSON
"""
