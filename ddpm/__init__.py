"""Denoising diffusion in plain PyTorch: schedules, steps, sampling algorithms, and in `mnist` small models of digits.

Read in this order: `schedule` (how much noise at which timestep), `process` (one step forward, one step back),
`estimates` (guidance, and anagrams and hybrids with their `views` and `components`), `sampling` (the loop, and the
algorithms), `restoration` (one more of them), `losses`, `flow` (straight paths instead of a schedule), then `mnist`.
`convergence` measures how far a few steps end up from many; `tools` holds what is not about diffusion.
"""
