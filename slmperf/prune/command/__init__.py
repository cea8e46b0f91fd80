"""`slmperf prune`: options (commands) as they were given (asked), what they come to (job), what is
printed and drawn (report)."""
