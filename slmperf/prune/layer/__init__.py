"""One linear layer that loses inputs.

elimination   osscar: which groups go, one at a time, exactly
refit         the least-squares problem, its refit, keep_groups
swaps         local search after the elimination
methods       osscar and its rivals behind one interface
solve         a layer of a model by one of them, with its record
"""
