"""Denoising diffusion in plain PyTorch: schedules, steps, sampling algorithms, and in `mnist` small models of digits.

Read in this order: `schedule` (how much noise at which timestep), `process` (one step forward, one step back),
`estimates` (guidance, and anagrams and hybrids with their `views` and `components`), `sampling` (the loop, and the
algorithms), `restoration` (one more of them), `losses`, `flow` (straight paths instead of a schedule), then `mnist`.
`runs` saves and resumes trainings, `files` reads and writes, `images` reads images and masks, `figures` shows and saves
labelled images (`labels`: their fonts), `animation` shows an illusion in motion, `devices` finds the fastest that there
is, `processes` share work under torchrun, `memory` refuses what does not fit and keeps what is needed again, `cpu` has
a layer that is faster there, `timing` compares how long things take, `convergence` how far few steps lead from many.
"""
