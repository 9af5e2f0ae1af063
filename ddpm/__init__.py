"""Denoising diffusion in plain PyTorch: schedules, steps, sampling algorithms, and the MNIST models.

Read in this order: `schedule` (how much noise at which timestep), `process` (one step forward, one step back),
`sampling` (the algorithms, with `views` for anagrams and `components` for hybrids), `mnist` (the UNets), `training`
(losses and the loop), `judge` (how samples are measured). `data`, `files` and `checkpoint` read and write.
"""
