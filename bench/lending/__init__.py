"""Lending of experts in modelled time: from which imbalance on it pays, and after which drift of the load."""
