"""The layers of the model that the rows of a file hold."""

from collections.abc import Sequence

from rq_ep.core.errors import UserError


def select_rows(
    source: str, num_rows: int, labels: Sequence[int] | None, selected: Sequence[int] | None
) -> tuple[list[int], tuple[int, ...]]:
    """Select rows; return their numbers, and the index in the model of each one's layer.

    Args:
        source: the file, for messages.
        num_rows: rows it has.
        labels: index of the layer of each row, where the file has it.
        selected: `--layers`: the layers to take or, of a file without labels, the layer of each row.
    """
    if labels is None:
        layers = tuple(range(num_rows)) if selected is None else tuple(selected)
        if len(layers) != num_rows:
            raise UserError(
                f"--layers names {len(layers)} layers, but {source} has {num_rows} and does not number them"
            )
        return list(range(num_rows)), layers
    if selected is None:
        return list(range(num_rows)), tuple(labels)
    row_of = {layer: row for row, layer in enumerate(labels)}
    if missing := [layer for layer in selected if layer not in row_of]:
        raise UserError(f"--layers: {source} has no layer {missing[0]}; it has {format_layers(tuple(labels))}")
    return [row_of[layer] for layer in selected], tuple(selected)


def format_layers(layers: Sequence[int]) -> str:
    """`3-5,7` for layers 3, 4, 5 and 7, as `--layers` takes them."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
