"""`mlxd doctor`: what an operator would check by hand, each with a verdict and the mend.

A check is a function of its `Surroundings` that yields findings; `checks.py` has the list. Nothing here changes
anything, prints a secret, or needs the service to run or to be stopped. Blocks; never in the service's own process.
"""
