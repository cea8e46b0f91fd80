"""`slmperf eval`: a pruned or quantised model beside the one it was made from.

command   the options and what is printed
job       what is read and checked before weights are, then the measuring
layers    errors of the quantised weights, layer by layer
harness   tasks of lm-eval
report    tables and JSON
"""
