"""Models: the seam into transformers, the loader, calibration, the tiny model, evaluation."""
