"""`slmperf bench linear`: low-precision linear layers beside torch's own and other packages'."""
