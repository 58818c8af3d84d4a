"""The certificate of a placement: its predicted balance, and a lower bound that no placement can beat."""
