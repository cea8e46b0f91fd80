"""`slmperf quantize`: commands (the options), asked and job (what is checked, then run), report."""
