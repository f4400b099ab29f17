"""What a rank owns of the trained weights and their optimizer state, alike for every ZeRO stage.

ZeRO cuts the float32 weights and AdamW's two moments over the ranks, each stage in its own way.
Here they are pieces of named weights: (name, start, number of elements) in the flattened weight. So
a checkpoint does not depend on the number of ranks or the stage, and a moving average of the
weights needs no communication.

Source of the layouts: DeepSpeed 0.19 (ZeRO stages 1 and 2: ``_hp_mapping`` of a parameter; stage 3:
its ``ds_tensor`` and ``grad_position``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The float32 weight, and AdamW's moments under torch's names."""


@dataclass(frozen=True)
class Fragment:
    """A piece of one weight.

    Attributes:
        name: Name of the weight in the model.
        start: First element, in the flattened weight.
        tensors: Flat float32 views of this piece, by kind (:data:`KINDS`); writing to them changes
            the optimizer's state.
        written: Whether this rank writes the piece into checkpoints (without ZeRO all ranks hold
            all).
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    written: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensors["weight"].numel()


class ShardedState:
    """The pieces this rank holds.

    Args:
        engine: A DeepSpeed engine with torch's AdamW.
        rank: This rank among all.
        world_size: Ranks in all.
    """

    def __init__(self, engine: Any, rank: int, world_size: int) -> None:
        self._engine = engine
        plain = engine.optimizer is engine.basic_optimizer
        self._zero: Any = None if plain else engine.optimizer
        self._adam: torch.optim.Optimizer = engine.basic_optimizer
        self._states = self._make_states()
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()
        self.shapes = {name: full_shape(p) for name, p in trained(engine.module).items()}
        self.fragments = self._find(rank, world_size)

    def set_step(self, step: int) -> None:
        """Tell AdamW how many steps were done; its bias correction depends on it."""
        for state in self._states:
            state["step"].fill_(float(step))

    def publish(self) -> None:
        """Copy the float32 weights, after a change, to where the model computes with them."""
        zero = self._zero
        if zero is None:
            return
        if not hasattr(zero, "fp16_partitioned_groups_flat"):  # ZeRO 1 and 2
            zero.update_lp_params()
            return
        kept = zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _make_states(self) -> list[dict[str, Any]]:
        """AdamW's state of every flat tensor; torch would make it only at the first step."""
        zero = self._zero
        if zero is None:
            flat = [p for group in self._adam.param_groups for p in group["params"]]
        elif hasattr(zero, "fp32_partitioned_groups_flat"):
            flat = list(zero.fp32_partitioned_groups_flat)
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            flat = list(zero.single_partition_of_fp32_groups)
        else:  # DeepSpeed's own class for bfloat16 at stage 1
            flat = list(zero.fp32_groups_flat_partition)
        made: list[dict[str, Any]] = []
        for tensor in flat:
            state = self._adam.state[tensor]
            if not state:
                state["step"] = torch.tensor(0.0)
                for kind in KINDS[1:]:
                    state[kind] = torch.zeros_like(tensor.data)
            made.append(state)
        return made

    def _find(self, rank: int, world_size: int) -> list[Fragment]:
        found: list[Fragment] = []
        for place, (name, p) in enumerate(trained(self._engine.module).items()):
            param: Any = p
            if hasattr(param, "ds_id"):
                start, tensors = self._of_stage3(param)
            elif hasattr(param, "_hp_mapping"):
                mapping = param._hp_mapping
                if mapping is None:  # wholly another rank's
                    continue
                start = mapping.lp_fragment_address.start
                tensors = {"weight": mapping.get_hp_fragment().data}
                tensors |= {k: mapping.get_optim_state_fragment(k) for k in KINDS[1:]}
            else:
                start = 0
                state = self._adam.state[param]
                tensors = {"weight": param.data.view(-1)}
                tensors |= {k: state[k].view(-1) for k in KINDS[1:]}
            if tensors["weight"].numel():
                alone = self._zero is not None or place % world_size == rank
                found.append(Fragment(name, start, tensors, written=alone))
        return found

    def _of_stage3(self, param: Any) -> tuple[int, dict[str, Tensor]]:
        zero = self._zero
        group, offset, size = zero.grad_position[zero.get_param_id(param)]
        flat = zero.fp32_partitioned_groups_flat[group]
        start = size * zero._get_param_partition_rank(param)
        valid = max(0, min(size, param.ds_numel - start))  # the last rank's share is padded
        whole = {"weight": flat.data, **{k: self._adam.state[flat][k] for k in KINDS[1:]}}
        return start, {k: v.narrow(0, offset, valid) for k, v in whole.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full_shape(param: Any) -> tuple[int, ...]:
    """Shape of a weight, whole, also where ZeRO-3 has left an empty tensor in its place."""
    return tuple(param.ds_shape if hasattr(param, "ds_id") else param.shape)


class MovingAverage:
    """Exponential moving average of the float32 weights, piece by piece.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the first steps do not weigh for
    ever; a pure function of the step.

    Args:
        state: The pieces.
        decay: 0 to 1.
    """

    def __init__(self, state: ShardedState, decay: float) -> None:
        self.decay = decay
        self._weights = [f.tensors["weight"] for f in state.fragments]
        self.tensors = [w.clone() for w in self._weights]

    def update(self, step: int) -> None:
        """Take in the weights after a step (1 after the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, weight in zip(self.tensors, self._weights, strict=True):
            mean.lerp_(weight, 1.0 - decay)
