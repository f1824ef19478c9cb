"""Optimizers and ways to decay that torch lacks, each in the few lines that its source has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SignDescent(torch.optim.SGD):
    """m <- beta m + g, then w <- (1 - lr decay) w - lr sign(m): a step of one size everywhere.

    signSGD with momentum (Bernstein et al., 2018) and decoupled decay: AdamW without any memory of
    the size of gradients. Its state and settings are those of SGD.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients that there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    direction = self.direction(state["momentum_buffer"], parameter.grad, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction.sign(), alpha=group["lr"])

    def direction(self, mean: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Whose sign the step takes; updates the mean."""
        return mean.mul_(group["momentum"]).add_(gradient)


class Lion(SignDescent):
    """w <- (1 - lr decay) w - lr sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g.

    Chen et al., 2023, Algorithm 2. `momentum` is beta1; every group has its `beta2`.
    """

    def direction(self, mean: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """See the class."""
        direction = mean.lerp(gradient, 1 - group["momentum"])
        mean.lerp_(gradient, 1 - group["beta2"])
        return direction


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for some matrices and its AdamW for all else, as one optimizer.

    Muon's steps are scaled to the root mean square of AdamW's (0.2 sqrt(max(rows, columns)), Liu et
    al., 2025), so that both take one learning rate; its momentum is torch's default, 0.95.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        **shared: float,
    ) -> None:
        self.parts = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(others, betas=betas, fused=True, **shared),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], shared)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of both."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        """Let both work on the groups and the state that are saved and loaded here."""
        number = len(self.parts[0].param_groups)
        groups = self.param_groups[:number], self.param_groups[number:]
        for part, own in zip(self.parts, groups, strict=True):
            part.param_groups, part.state = own, self.state


class OwnDecay:
    """Decoupled decay in place of torch's where it is not one number for all weights and steps.

    Before an optimizer's step w <- (1 - lr decay share) w, with the share of each row. Cautious:
    after the step w <- w - lr decay share w', w' being the weight before, where the step went
    towards 0 or not at all (Chen et al., 2025, "Cautious weight decay"). Off while the optimizer's
    `decay_is_on` is false.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        weight_decay: float,
        *,
        shares: Mapping[int, Tensor],
        cautious: bool,
    ) -> None:
        """`shares`: (V,), by the id of a parameter (V, D), of those whose rows differ."""
        self.parameters, self.weight_decay, self.cautious = parameters, weight_decay, cautious
        self.shares = {id(p): _rows_of(p, shares[id(p)]) for p in parameters if id(p) in shares}
        self.earlier: list[Tensor] = []
        optimizer.register_step_pre_hook(self.before)
        if cautious:
            optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def before(self, optimizer: Any, *_: Any) -> None:
        """Decay; or keep the weights to decay by afterwards."""
        if self.cautious:
            self.earlier = [parameter.clone() for parameter in self.parameters]
        elif optimizer.decay_is_on:
            for parameter in self.parameters:
                parameter.mul_(1 - self._rate(parameter, optimizer))

    @torch.no_grad()
    def after(self, optimizer: Any, *_: Any) -> None:
        """Decay where the step did not go away from 0."""
        for parameter, earlier in zip(self.parameters, self.earlier, strict=True):
            if optimizer.decay_is_on:
                inwards = (earlier - parameter) * earlier >= 0
                parameter.sub_(earlier * inwards * self._rate(parameter, optimizer))
        self.earlier = []

    def _rate(self, parameter: nn.Parameter, optimizer: Any) -> Tensor | float:
        rate = optimizer.param_groups[0]["lr"] * self.weight_decay
        # Where gradients overflow, a GradScaler calls a fused optimizer all the same.
        if (overflowed := getattr(optimizer, "found_inf", None)) is not None:
            rate = rate * (1 - overflowed)
        return rate * self.shares.get(id(parameter), 1.0)


def _rows_of(parameter: nn.Parameter, shares: Tensor) -> Tensor:
    """Shares (V,) as a column that multiplies a parameter (V, D), cut as FSDP has cut it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    column = shares.to(parameter.device, parameter.dtype)[:, None]
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(column, mesh, placements, src_data_rank=None)
    return column
