"""How tiny-if, the small IF that is shipped, was made; `scripts/train_if.py` trains one with it.

Read in this order: `captions` (images, what to call them, and what the four styles do to them), `losses`, `training`
(what is trained), `export` (the folders that generate.py and diffusers load), `judge` (how often it draws what it was
asked for). `data` and `styles` are the next one's: things drawn by many artists, which train_if.py does not use yet.
"""
