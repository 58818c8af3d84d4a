"""What placements are judged by: calibration steps, weights of experts, formats, and the balance of a split."""
