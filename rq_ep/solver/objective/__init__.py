"""What placements are evaluated by: calibration steps, weights of experts, formats, and the balance of a split."""
