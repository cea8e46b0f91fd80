"""`slmperf bench osscar`: the pruning solver beside one factorisation and the plain recurrence."""
