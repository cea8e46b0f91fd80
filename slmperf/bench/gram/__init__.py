"""`slmperf bench gram`: how fast calibration's products are."""
