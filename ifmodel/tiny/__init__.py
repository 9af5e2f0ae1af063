"""How tiny-if, the small IF that is shipped, was made; `scripts/train_if.py` trains one with it.

Read in this order: `icons` (where the images are from), `captions` (which things, and what to call them), `styles` and
`loading` (the images in their styles), `data` (what a step sees of them), `models`, `losses`, `stages` and `training`
(what is trained, and how), `export` (the folders that generate.py and diffusers load), `judge`, `exam`, `measures` and
`algorithm_measures` (how often it draws what it was asked for, and whether the algorithms work on it).
"""
