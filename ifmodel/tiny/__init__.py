"""The next tiny-if: things drawn by many artists. Its data is here; `scripts/train_if.py` does not use it yet."""
