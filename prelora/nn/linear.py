"""``LoRALinear``: ``nn.Linear`` with LoRA whose rank may differ between slices of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelora.config import Execution, check_execution
from prelora.nn.execution import Choice, Work, choose_execution, remembered_choice
from prelora.nn.merged_again import lora_linear_merged_again
from prelora.nn.shared_weight import SharedWeight
from prelora.ops import lora_linear, lora_merge, lora_two_path
from prelora.ops.slices import lora_delta, split_lora
from prelora.shards import full

SHARED = Choice("merged", "merged once for several forwards")
ALWAYS = Choice("merged", "a training step merges on a GPU, and under autocast, where it takes the place of the cast")
HOOK_TABLES = tuple(name for name in vars(nn.Identity()) if "hook" in name)


class LoRALinear(nn.Linear):
    """Drop-in for ``nn.Linear`` that computes x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.

    Parameters: ``weight`` [out, in], ``bias`` [out], ``lora_A`` [sum of ranks, in] and ``lora_B``, which is
    [out, rank] for one slice and every slice's B in row-major order, flat, for more. A starts Kaiming-uniform and
    B zero, so a new layer computes what its Linear does. The state dict of an ``nn.Linear`` loads unchanged.

    Args:
        in_features: features of x.
        out_features: features of y.
        bias: whether there is a b.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.
        rank: rank of every slice, or one for each.
        alpha: the scaling s is alpha / rank; None: alpha = rank, so s = 1.
        rows: rows of each slice, summing to ``out_features``; None: one slice.
        dropout: probability of dropping an element of the low-rank path's input while training.
        execution: ``"merged"`` multiplies by W + s·B·A, merged anew in each forward (see ``merge_once``);
            ``"two_path"`` computes the low-rank path beside the base's; ``"auto"`` takes the cheaper for each input.

    Raises:
        ValueError: ranks, rows, alpha, dropout or execution out of range.
    """

    base_weight: Tensor | None
    defer_lora_grads = False
    """Leave A and B out of backward while W trains: ``lora_grads_from_weights`` gives them theirs."""
    last_plan: Choice | None = None
    """How the last input was computed, and why; not recorded under ``torch.compile``."""
    _shared: SharedWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | Sequence[int],
        alpha: float | None = None,
        rows: Sequence[int] | None = None,
        dropout: float = 0.0,
        execution: Execution = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rows = (out_features,) if rows is None else tuple(rows)
        self.rank = (rank,) * len(self.rows) if isinstance(rank, int) else tuple(rank)
        _check_slices(self.rows, self.rank, out_features, alpha, dropout)
        check_execution(execution, dropout, "dropout")
        self.execution = execution
        self.alpha = alpha
        self.dropout = dropout
        self.scaling = tuple(1.0 if alpha is None else alpha / r for r in self.rank)
        self._allocate_lora(self.weight)
        self.reset_lora_parameters()
        # The weight before ``merge``; a buffer, so that it follows the module between devices.
        self.register_buffer("base_weight", None, persistent=False)

    def _allocate_lora(self, like: Tensor, device: torch.device | None = None) -> None:
        packed = [sum(n * r for n, r in zip(self.rows, self.rank, strict=True))]
        b_shape = [self.out_features, self.rank[0]] if len(self.rows) == 1 else packed
        self.lora_A = nn.Parameter(like.new_empty([sum(self.rank), self.in_features], device=device))
        self.lora_B = nn.Parameter(like.new_empty(b_shape, device=device))

    def reset_lora_parameters(self, generator: torch.Generator | None = None) -> None:
        """A Kaiming-uniform (a = √5), B zero: the update s·B·A is zero."""
        if generator is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            # Drawn on the CPU in fp32, so that every device and dtype starts from the same numbers.
            drawn = torch.empty(self.lora_A.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                self.lora_A.copy_(drawn)
        nn.init.zeros_(self.lora_B)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | Sequence[int],
        *,
        alpha: float | None = None,
        rows: Sequence[int] | None = None,
        dropout: float = 0.0,
        execution: Execution = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> LoRALinear:
        """A ``LoRALinear`` that takes over ``linear``'s own parameters (the same objects), hooks and mode.

        A is drawn from ``generator``; None: from the global random state. A and B come to ``device``; None: the
        weight's.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            device="meta",
            dtype=linear.weight.dtype,
            rank=rank,
            alpha=alpha,
            rows=rows,
            dropout=dropout,
            execution=execution,
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer._allocate_lora(linear.weight, device)
        layer.reset_lora_parameters(generator)
        for table in HOOK_TABLES:
            # The table itself, so that a handle given out before still removes its hook.
            setattr(layer, table, getattr(linear, table))
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W + s·B·A as its weight, sharing the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` now holds W + s·B·A."""
        return self.base_weight is not None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The update s·B·A, [out, in], in at least fp32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return lora_delta(self.lora_A.to(dtype), self.lora_B.to(dtype), self.rows, self.rank, self.scaling)

    @torch.no_grad()
    def delta_norms(self) -> Tensor:
        """‖s·B·A‖ of every slice, [slices], in fp64; from A·Aᵀ and Bᵀ·B, which are [rank, rank].

        Of sharded parameters a collective, as ``merged_weight`` is.
        """
        norms = []
        pairs = split_lora(full(self.lora_A).double(), full(self.lora_B).double(), self.rows, self.rank)
        for (a, b), s in zip(pairs, self.scaling, strict=True):
            norms.append(s * ((a @ a.t()) * (b.t() @ b)).sum().clamp_min(0).sqrt())
        return torch.stack(norms)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s·B·A, [out, in], summed in at least fp32 and then cast to the weight's dtype; always whole."""
        if self.merged:
            return full(self.weight).clone()
        _, _, *layout = lora_arguments([self])
        parts = [[full(tensor)] for tensor in (self.weight, self.lora_A, self.lora_B)]
        # By its definition: a provider may round more than once.
        return lora_merge.reference(*parts, *layout, self.weight.dtype)[0]

    @torch.no_grad()
    def merge(self) -> None:
        """Fold s·B·A into ``weight`` for inference; the base weight is kept, for ``unmerge`` to give back bit for bit.

        Raises:
            RuntimeError: already merged, or sharded.
        """
        if self.sharded:
            raise RuntimeError("merge() of a LoRALinear that FSDP2 shards: take PreLoRA.merged_state_dict()")
        if self.merged:
            raise RuntimeError("merge() of a LoRALinear that is merged already")
        base = self.weight.detach().clone()
        self.weight.copy_(self.merged_weight())
        self.base_weight = base

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give ``weight`` its base value back, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if self.base_weight is None:
            raise RuntimeError("unmerge() of a LoRALinear that is not merged")
        self.weight.copy_(self.base_weight)
        self.base_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """[*, in] → [*, out]."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("a merged LoRALinear cannot train (A and B get no gradient): call unmerge() first")
            return F.linear(x, self.weight, self.bias)
        dtype = self.compute_dtype
        w_eff = self._shared_weight(dtype)
        plan = self._plan(x.numel() // self.in_features, dtype) if w_eff is None else SHARED
        if not torch.compiler.is_compiling():
            self.last_plan = plan
        if plan.execution == "two_path":
            return self._two_path(x)
        trained = (x, self.weight, self.bias, self.lora_A, self.lora_B)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
        if trains and self.sharded:
            lora_a, lora_b = self._adapters()
            return lora_linear_merged_again(
                x, self.weight, self.bias, lora_a, lora_b, self.rows, self.rank, self.scaling, dtype
            )
        if w_eff is None:
            w_eff = merged_weights([self], dtype)[0]
            if self._shared is not None and not torch.compiler.is_compiling():
                self._shared.keep(w_eff, self.weight, self.lora_A, self.lora_B)
        if not trains:
            # As nn.Linear does it, so that injection leaves what a model evaluates to as it was, bit for bit.
            return F.linear(x, w_eff, self.bias)
        return lora_linear(x, w_eff, self.weight, self.bias, *self._adapters(), self.rows, self.rank, self.scaling)

    def _two_path(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # Drawn on the CPU, whose random state is the one that every checkpoint holds.
        seed = torch.randint(2**32, (1,)).to(x.device) if dropout else None
        y, _ = lora_two_path(
            x, self.weight, self.bias, *self._adapters(), self.rows, self.rank, self.scaling, dropout, seed
        )
        return y

    def _adapters(self) -> tuple[Tensor, Tensor]:
        if self.defer_lora_grads and self.weight.requires_grad:
            return self.lora_A.detach(), self.lora_B.detach()
        return self.lora_A, self.lora_B

    def _shared_weight(self, dtype: torch.dtype) -> Tensor | None:
        if self._shared is None or self._drops:
            return None
        return self._shared.current(dtype, self.weight, self.lora_A, self.lora_B)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 gathers the parameters for each use: nothing made of them may be kept between two."""
        return "_is_fsdp_managed_module" in self.__dict__  # ``fully_shard`` leaves it there, for Dynamo

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of this layer's products: autocast's, or the weight's."""
        device = self.weight.device.type
        available = torch.amp.is_autocast_available(device) and self.weight.dtype != torch.float64
        casts = available and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if casts else self.weight.dtype

    @property
    def merges_always(self) -> bool:
        """Whether the layer takes merged execution now, whatever the number of tokens."""
        return self._merges_always(self.compute_dtype)

    def _merges_always(self, dtype: torch.dtype) -> bool:
        if self.merged or self._drops or self.execution == "two_path":
            return False
        if self.execution == "merged":
            return True
        if self.weight.element_size() < 4:
            return False
        is_cast = self.weight.dtype != dtype
        return torch.is_grad_enabled() and (is_cast or self.weight.device.type == "cuda")

    def plan(self, tokens: int) -> Choice:
        """How an input of ``tokens`` rows is computed now, and why; a pure function of sizes, dtypes and phase."""
        return self._plan(tokens, self.compute_dtype)

    def _plan(self, tokens: int, dtype: torch.dtype) -> Choice:
        if self._drops:
            return Choice("two_path", "dropout gives the low-rank path an input of its own")
        if self.execution != "auto":
            return Choice(self.execution, "asked for")
        if self.weight.element_size() < 4:
            return Choice("two_path", f"a sum in {self.weight.dtype} would round LoRA's update away")
        if self._merges_always(dtype):
            return ALWAYS
        trains = self.weight.requires_grad
        work: Work = "inference" if not torch.is_grad_enabled() else "warmup" if trains else "lora"
        choose = choose_execution if torch.compiler.is_compiling() else remembered_choice
        return choose(
            tokens=tokens,
            in_features=self.in_features,
            rows=self.rows,
            ranks=self.rank,
            weight_bytes=self.weight.element_size(),
            compute_bytes=dtype.itemsize,
            device_type=self.weight.device.type,
            work=work,
        )

    def extra_repr(self) -> str:
        rank = self.rank[0] if len(self.rank) == 1 else self.rank
        parts = [super().extra_repr(), f"rank={rank}"]
        if len(self.rows) > 1:
            parts.append(f"rows={self.rows}")
        if self.alpha is not None:
            parts.append(f"alpha={self.alpha}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.execution != "auto":
            parts.append(f"execution={self.execution}")
        return ", ".join([*parts, *(["merged"] if self.merged else [])])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A state dict always holds W, A and B: merged or not, it loads to the same function.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base_weight is not None:
            destination[prefix + "weight"] = self.base_weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        if self.merged:
            self.unmerge()
        ours = {prefix + "lora_A", prefix + "lora_B"}
        known: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, known, *rest)
        # A plain Linear's state dict leaves an untrained adapter as it is; a trained one would change the function.
        plain = ours <= set(known) and not self.lora_B.is_meta and not self.lora_B.any()
        missing.extend(key for key in known if not (plain and key in ours))


@torch.no_grad()
def merged_weights(layers: Sequence[LoRALinear], dtype: torch.dtype) -> list[Tensor]:
    """W + s·B·A of every layer, [out, in] in ``dtype``, in one call; carries no gradient."""
    return lora_merge([layer.weight for layer in layers], *lora_arguments(layers), dtype)


def lora_arguments(layers: Sequence[LoRALinear]) -> tuple[Any, ...]:
    """``lora_a``, ``lora_b``, ``slices``, ``rows``, ``ranks``, ``scaling`` of the operators that take many layers."""
    return (
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        [len(layer.rows) for layer in layers],
        [n for layer in layers for n in layer.rows],
        [r for layer in layers for r in layer.rank],
        [s for layer in layers for s in layer.scaling],
    )


def _check_slices(
    rows: tuple[int, ...], rank: tuple[int, ...], out_features: int, alpha: float | None, dropout: float
) -> None:
    if len(rank) != len(rows):
        raise ValueError(f"rank = {rank}: {len(rank)} ranks for {len(rows)} row slices {rows}; give one for each")
    if not rows or min(rows) < 1 or sum(rows) != out_features:
        raise ValueError(f"rows = {rows}: must be positive and sum to out_features = {out_features}")
    if min(rank) < 1:
        raise ValueError(f"rank = {rank}: every rank must be at least 1")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha}: must be finite and above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}: accepted in [0, 1)")
