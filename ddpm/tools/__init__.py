"""What is around the algorithms, for digits and for IF.

Figures: `figures` (labelled images and plots), `labels` (their text), `animation` (an illusion in motion), `images`
(images and masks from files). Runs: `runs` (trainings that save, stop and resume), `files` (read and written safely),
`distributed` (work shared under torchrun). The machine: `devices` (the fastest that there is), `memory` (what fits, and
what is kept), `cpu` (layers that are faster there), `timing` (how long things take beside others).
"""
