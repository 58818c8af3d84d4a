"""Reading checkpoints: files, names, quantization schemes, and which model it is."""
