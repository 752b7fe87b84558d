"""The load client of `mlxd bench`, for any OpenAI-compatible server, and the raw engine beside it (`ceiling`).

A library below the command line. It knows nothing of mlxd's API: what it measures is what a client sees. Only
`ceiling` imports the engine and mlx; `plots` alone imports matplotlib.
"""
