"""`slmperf prune`: options (commands), what they ask for (job), files of text (texts), methods side
by side (compare), what is printed and drawn (report)."""
