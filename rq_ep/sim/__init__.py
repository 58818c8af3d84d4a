"""Replaying recorded loads through strategies: the plans a server would make, without tensors."""
