"""What is learnt from a little text: loads, importance, errors of low bits; and experts quantized with it."""
