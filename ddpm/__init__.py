"""Denoising diffusion in plain PyTorch: schedules, steps, sampling algorithms, and in `mnist` small models of digits.

Read in this order: `schedule` (how much noise at which timestep), `process` (one step forward, one step back),
`sampling` (the algorithms, with `views` for anagrams and `components` for hybrids), `losses`, `flow` (straight paths
instead of a schedule), then `mnist`. `files` reads and writes.
"""
