"""Reading the weights of a model, one tensor or one expert at a time.

transformers' rules, which fuse the matrices of all experts, are applied here to single experts, so that a rank reads
its own experts and no others.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from rq_ep.core.errors import UserError
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.formats.quantized import Parts, Quantized
from rq_ep.model.checkpoint.checkpoint_files import REAL_DTYPES, Checkpoint
from rq_ep.model.checkpoint.leftover_tensors import notes_on_leftovers, some
from rq_ep.model.checkpoint.quantized_checkpoint import QuantizedCheckpoint
from rq_ep.model.checkpoint.weight_conversion import TensorConversion, find_conversions
from rq_ep.model.seam.expert_modules import family_of


class WeightReader:
    """Reads the tensors of a model, named, shaped and fused as transformers keeps them in memory.

    Layers for multi-token prediction, and other tensors that the model does not know, are not read; `notes` names them,
    and what else of the checkpoint is not read.

    Args:
        checkpoint: where they come from.
        model: the model as transformers builds it, experts included; its parameters may lie on the meta device.
        experts: names of its routed experts modules; their tensors are read by `expert`, all others by `tensors`.
        strict: refuse a checkpoint with tensors that neither the model nor its configuration knows.

    Raises:
        UserError: the checkpoint lacks a tensor of the model, or one is left over that may not stay unread.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, experts: Iterable[str], strict: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._config = model.config
        self.notes = list(checkpoint.notes)
        self._state = model.state_dict()
        conversions = find_conversions(model, checkpoint.keys, self._state)
        made = {target for conversion in conversions.values() for target in conversion.targets}
        self.notes += notes_on_leftovers(model, made - set(self._state), checkpoint.path, strict)
        self._check_nothing_missing(model, made)
        self._check_dtypes(conversions.values())
        self._experts: dict[str, dict[str, TensorConversion]] = {}
        self._layouts: dict[str, ExpertLayout] = {}
        for name in experts:
            self._layouts[name] = family_of(model.get_submodule(name)).layout
            tensors = [tensor for tensor, _ in model.get_submodule(name).named_parameters(recurse=False)]
            self._experts[name] = {tensor: conversions.pop(f"{name}.{tensor}") for tensor in tensors}
            for conversion in self._experts[name].values():
                self._check_all_experts(conversion)
                self._expert_tensor(conversion, 0, is_read=False)
        self._others = list(conversions.values())  # outside the experts
        self._check_shapes()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read every stored tensor outside the routed experts, one after another, in the checkpoint's dtype.

        Here and in `expert`, low-bit weights are dequantized to fp32.
        """
        for conversion in self._others:
            if shapes := {name: self._state[name].shape for name in conversion.targets if name in self._state}:
                sources = [(source.pattern, self._checkpoint.tensor(source.key)) for source in conversion.sources]
                yield from self._make(conversion, sources, shapes).items()

    def expert(self, name: str, expert: int) -> dict[str, torch.Tensor]:
        """Read the tensors of one expert of the experts module `name`, in the checkpoint's dtype."""
        return {tensor: self._expert_tensor(conversion, expert) for tensor, conversion in self._experts[name].items()}

    def stored_format(self, name: str, expert: int) -> str | None:
        """The low-bit format that holds an expert as it is stored: that of all its matrices; None if there is none."""
        formats: set[str | None] = set()
        for conversion in self._matrices(name).values():
            operations = [] if conversion.converter is None else conversion.converter.operations
            if not all(isinstance(operation, MergeModulelist | Concatenate) for operation in operations):
                return None
            formats |= {self._checkpoint.format_of(source.key) for source in conversion.of_expert(expert)}
        return formats.pop() if len(formats) == 1 else None

    def stored_expert(self, name: str, expert: int, format_name: str) -> torch.Tensor | None:
        """Read an expert packed as the checkpoint stores it: uint8 [nbytes]; None unless it is in this format.

        Its numbers and scales are merged as the weights would be, and are not rounded again.
        """
        checkpoint = self._checkpoint
        if not isinstance(checkpoint, QuantizedCheckpoint) or self.stored_format(name, expert) != format_name:
            return None
        conversions, matrices = self._experts[name], self._matrices(name)
        biases = {tensor: self._expert_tensor(conversions[tensor], expert) for tensor in conversions.keys() - matrices}
        parts = {tensor: self._expert_parts(checkpoint, conversion, expert) for tensor, conversion in matrices.items()}
        format_ = get_format(format_name)
        assert isinstance(format_, Quantized), format_
        return format_.pack_parts(parts, biases, self._layouts[name])

    def _matrices(self, name: str) -> dict[str, TensorConversion]:
        """The conversions of the matrices, without the biases, of an experts module."""
        conversions = self._experts[name]
        return {tensor: made for tensor, made in conversions.items() if self._state[made.target].ndim == 3}

    def _expert_parts(self, checkpoint: QuantizedCheckpoint, conversion: TensorConversion, expert: int) -> Parts:
        """The parts of one expert's matrix, each merged as the matrix would be."""
        target, converter = conversion.target, conversion.converter
        if converter is None:
            return checkpoint.parts(conversion.sources[0].key, expert)
        sources = [(source.pattern, checkpoint.parts(source.key)) for source in conversion.of_expert(expert)]
        merged = {}
        for part in sources[0][1]:
            tensors = [(pattern, parts[part]) for pattern, parts in sources]
            merged[part] = self._convert(target, converter, tensors, _ShapeSource({}))[target][0]
        return merged

    def _expert_tensor(self, conversion: TensorConversion, expert: int, is_read: bool = True) -> torch.Tensor:
        """A tensor of one expert; if it is not to be read, its shape on the meta device, which is checked alike."""
        checkpoint = self._checkpoint
        sources = []
        for source in conversion.of_expert(expert):
            if not is_read:
                shape = checkpoint.shape(source.key)
                tensor = torch.empty((1, *shape[1:]) if source.expert is None else shape, device="meta")
            elif source.expert is None:
                tensor = checkpoint.rows(source.key, expert, expert + 1)
            else:
                tensor = checkpoint.tensor(source.key)
            sources.append((source.pattern, tensor))
        shape = torch.Size((1, *self._state[conversion.target].shape[1:]))
        return self._make(conversion, sources, {conversion.target: shape})[conversion.target][0]

    def _make(
        self,
        conversion: TensorConversion,
        sources: Sequence[tuple[str, torch.Tensor]],
        shapes: Mapping[str, torch.Size],
    ) -> dict[str, torch.Tensor]:
        """Make the tensors named in `shapes` from (pattern, tensor) pairs."""
        if conversion.converter is None:
            made = {conversion.target: sources[0][1]}
        else:
            made = self._convert(conversion.target, conversion.converter, sources, _ShapeSource(shapes))
        for name, shape in shapes.items():
            self._check_shape(name, made[name].shape, shape)
        return {name: made[name] for name in shapes}

    def _convert(
        self,
        target: str,
        converter: WeightConverter,
        sources: Sequence[tuple[str, torch.Tensor]],
        shapes: "_ShapeSource",
    ) -> dict[str, torch.Tensor]:
        for pattern, tensor in sources:
            converter.add_tensor(target, pattern, pattern, tensor)  # type: ignore[arg-type]  # as saving does
        try:
            made: dict[str, torch.Tensor] = converter.convert(target, model=shapes, config=self._config)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            shown = ", ".join(f"{pattern} {list(tensor.shape)}" for pattern, tensor in sources)
            raise UserError(
                f"{self._checkpoint.path}: {target} cannot be converted from {shown} ({error}): "
                "the weights belong to another configuration"
            ) from None
        return made

    def _check_nothing_missing(self, model: PreTrainedModel, made: set[str]) -> None:
        # Tied tensors are not stored; a tensor that may be missing must have been computed by the model.
        ignored = model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in set(self._state) - made - set(model.all_tied_weights_keys)
            if self._state[name].is_meta or not any(re.search(pattern, name) for pattern in ignored)
        ]
        if missing:
            raise UserError(
                f"{self._checkpoint.path}: the checkpoint lacks {some(missing)}: it is incomplete, or belongs to "
                "another configuration"
            )

    def _check_shapes(self) -> None:
        """Raise a `UserError` for a tensor that is not the model's, outside the experts and not converted."""
        for conversion in self._others:
            if conversion.converter is None and conversion.target in self._state:
                key, wanted = conversion.sources[0].key, self._state[conversion.target]
                self._check_shape(conversion.target, self._checkpoint.shape(key), wanted.shape)

    def _check_dtypes(self, conversions: Iterable[TensorConversion]) -> None:
        """Raise a `UserError` for numbers in the place of weights that are none without a scale, or are not real."""
        for conversion in conversions:
            if any(name in self._state and self._state[name].is_floating_point() for name in conversion.targets):
                for source in conversion.sources:
                    if (dtype := self._checkpoint.dtype(source.key)) not in REAL_DTYPES:
                        raise UserError(
                            f"{self._checkpoint.path}: {source.key} holds {dtype} numbers, which are no weights by "
                            "themselves, and config.json does not say how they are quantized: save a bf16 copy of the "
                            "model and use that"
                        )

    def _check_shape(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(shape) != tuple(wanted):
            raise UserError(
                f"{self._checkpoint.path}: {name} comes out as {list(shape)}, but config.json asks for "
                f"{list(wanted)}: the weights belong to another configuration"
            )

    def _check_all_experts(self, conversion: TensorConversion) -> None:
        """Raise a `UserError` that names the experts that a fused tensor lacks, or has too many of."""
        num_experts = self._state[conversion.target].shape[0]
        for pattern in {source.pattern for source in conversion.sources}:
            sources = [source for source in conversion.sources if source.pattern == pattern]
            numbers = {source.expert for source in sources}
            if numbers == {None}:
                rows = self._checkpoint.shape(sources[0].key)[0]
                wrong = [] if rows == num_experts else [f"{conversion.target} of {rows} experts"]
            else:
                wrong = [f"expert {expert} of {conversion.target}" for expert in numbers ^ set(range(num_experts))]
            if wrong:
                raise UserError(
                    f"{self._checkpoint.path}: config.json asks for experts 0..{num_experts - 1}, but the checkpoint "
                    f"disagrees about {some(wrong)}: it is incomplete, or belongs to another configuration"
                )


class _ShapeSource:
    """The stand-in for a model that gives conversion rules the shapes of their results."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], device="meta")
