"""DeepFloyd IF in plain PyTorch: the stage-1 and stage-2 UNets. Not here yet; `ddpm` is."""
