# SPDX-License-Identifier: Apache-2.0
"""Token merging in the vision transformers of Hugging Face ``transformers`` (5.x).

A patched model merges tokens in each layer, between attention and MLP, as ToMe does (Bolya et al.,
"Token Merging: Your ViT But Faster", ICLR 2023): the keys of the attention are the metric, and
attention counts each token by its size. Weights, configuration and ``state_dict`` stay as they are.

Example:
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from tokenops.integrations.transformers import apply_patch, last_trace, remove_patch
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    ...                    intermediate_size=64, image_size=32, patch_size=8)
    >>> model = ViTForImageClassification(config).eval()
    >>> patch = apply_patch(model, r=4)
    >>> logits = model(torch.randn(1, 3, 32, 32)).logits
    >>> [token_map.num_tokens for token_map in last_trace(model).token_maps]
    [13, 9]
    >>> remove_patch(model)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .. import TokenMap, _checks, match, merge_wavg, policy_attention, why_not
from ..compat.tome import parse_r

Schedule = int | list[int] | tuple[int, float]

#: Attributes for the patch of a base model and the index of a layer; as plain attributes they are
#: not in the state_dict.
_ATTRIBUTE = "_tokenops_patch"
_PLACE = "_tokenops_place"

#: Attributes that a layer and its attention must have.
_LAYER_PARTS = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")

#: Attention implementations of transformers that add a floating-point mask to the logits.
_TAKE_BIAS = ("sdpa", "eager")


class MergeTrace:
    """What one forward pass of a patched model did to the tokens, layer by layer.

    Attributes:
        token_maps: The map of each layer from its input tokens to its output tokens.
        sizes: Number of patches in each token after each layer, float32 ``[B, M, 1]``.
        sources: With ``track_source``, the map from the model's input tokens (prefix tokens, then
            patches) to the output tokens of each layer; else empty.
    """

    def __init__(self, patch: MergePatch) -> None:
        self.token_maps: list[TokenMap] = []
        self.sizes: list[Tensor] = []
        self.sources: list[TokenMap] = []
        self._patch = patch
        self._r = patch.r
        self._key: Tensor | None = None  # keys of the running layer's attention

    def _record(self, layer: int, token_map: TokenMap, size: Tensor) -> None:
        if layer < len(self.token_maps):
            return  # activation checkpointing recomputes the layer, with the same result
        self.token_maps.append(token_map)
        self.sizes.append(size)
        if self._patch.track_source:
            self.sources.append(token_map.compose(self.sources[-1]) if layer > 0 else token_map)


class MergePatch:
    """An active patch; :func:`apply_patch` makes it, :func:`remove_patch` removes it.

    Attributes:
        num_prefix: Leading tokens that never merge.
        order: Order of the tokens after each layer.
        proportional: Whether attention counts each token by its size.
        track_source: Whether traces hold ``sources``.
        trace: :class:`MergeTrace` of the last forward pass; None before the first. With
            :class:`torch.nn.DataParallel`, the trace of the replica that finished last.
    """

    def __init__(
        self,
        num_layers: int,
        r: Schedule,
        num_prefix: int,
        order: str,
        proportional: bool,
        track_source: bool,
    ) -> None:
        self._num_layers = num_layers
        self.r = r
        self.num_prefix = num_prefix
        self.order = order
        self.proportional = proportional
        self.track_source = track_source
        self.trace: MergeTrace | None = None
        self._hooks: list[Any] = []

    @property
    def r(self) -> list[int]:
        """Number of tokens that each layer merges away; can be set to any schedule at any time."""
        return list(self._r)

    @r.setter
    def r(self, schedule: Schedule) -> None:
        self._r = _parse_schedule(schedule, self._num_layers)

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a trace for this forward pass, which is passed to the layers as a keyword."""
        mask = kwargs.get("attention_mask", args[3] if len(args) > 3 else None)
        if mask is not None:
            raise ValueError(
                "apply_patch: attention_mask must be None in a model that merges tokens, got "
                f"{type(mask).__name__}"
            )
        attention = getattr(model.config, "_attn_implementation", None)
        if self.proportional and any(self._r[:-1]) and attention not in _TAKE_BIAS:
            raise ValueError(
                f"apply_patch: attention must be one of {', '.join(_TAKE_BIAS)} to count tokens by "
                f"their size, got {attention}; call model.set_attn_implementation('sdpa') or pass "
                "proportional=False"
            )
        return args, {**kwargs, "merge_trace": MergeTrace(self)}

    def _after_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.trace = kwargs["merge_trace"]


def apply_patch(
    model: nn.Module,
    r: Schedule,
    *,
    num_prefix: int | None = None,
    order: str = "tome",
    proportional: bool = True,
    track_source: bool = False,
) -> MergePatch:
    """Make a vision transformer merge tokens in each layer.

    Between attention and MLP, layer ``l`` merges the ``r[l]`` most similar tokens by their keys
    (mean over heads) into the size-weighted mean of each group. Attention then counts a token of
    size s as s patches, unless ``proportional`` is False: :func:`tokenops.policy_attention` does so
    where it has a kernel; with dropout, with eager attention and on other devices, ``log(s)`` is
    added to the logits.

    Args:
        model: ``ViTModel``, ``ViTForImageClassification``, ``DeiTModel``,
            ``DeiTForImageClassification`` or ``DeiTForImageClassificationWithTeacher``; training
            and eval mode, any device and floating dtype.
        r: Tokens to merge away: an int for all layers, a list with an int for each (layers past
            its end merge nothing), or a tuple ``(r, inflect)`` with inflect in [-1, 1]: r on
            average, on a line from ``r * (1 - inflect)`` to ``r * (1 + inflect)``. Clamped in each
            layer to half of the tokens outside the prefix.
        num_prefix: Leading tokens that never merge; by default 1 for ViT (class) and 2 for DeiT
            (class, distillation).
        order: ``"tome"``: after each layer the tokens are in ToMe's order, so that the next layer
            splits them as ToMe does and results equal ToMe's. ``"position"``: they stay in the
            order of their first patch.
        proportional: Whether attention counts each token by its size.
        track_source: Whether the trace records for each layer which patches are in which token.

    Returns:
        The patch. Its ``trace`` describes the last forward pass; its ``r`` can be set.

    Raises:
        TypeError: If the class of ``model`` is not supported, or an argument has a wrong type.
        ValueError: If the model is patched already, or a value does not fit.
        ImportError: If transformers is not installed.

    Note:
        Differentiable in all that the model is differentiable in; the choice of the tokens that
        merge carries no gradient.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                            intermediate_size=64, image_size=32, patch_size=8))
        >>> patch = apply_patch(model, r=[5, 2])
        >>> model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 10, 32])
    """
    base, default_prefix = _base_model(model, "apply_patch")
    if hasattr(base, _ATTRIBUTE):
        raise ValueError("apply_patch: model is patched already, call remove_patch(model) first")
    if num_prefix is None:
        num_prefix = default_prefix
    num_prefix = _checks.check_int("apply_patch", "num_prefix", num_prefix)
    _checks.check_choice("apply_patch", "order", order, ("tome", "position"))
    for argument, flag in (("proportional", proportional), ("track_source", track_source)):
        if not isinstance(flag, bool):
            raise _checks.type_error("apply_patch", argument, "a bool", flag)
    for layer in base.layers:
        _check_layer(layer)
    patch = MergePatch(len(base.layers), r, num_prefix, order, proportional, track_source)
    patch._hooks = [
        base.register_forward_pre_hook(patch._before_forward, with_kwargs=True),
        base.register_forward_hook(patch._after_forward, with_kwargs=True),
    ]
    for place, layer in enumerate(base.layers):
        setattr(layer, _PLACE, place)
        for part, mixin in ((layer, _MergingLayer), (layer.attention, _MergingAttention)):
            kind: Any = type(part)
            part.__class__ = _merging(mixin, kind)
    setattr(base, _ATTRIBUTE, patch)
    return patch


def remove_patch(model: nn.Module) -> None:
    """Undo :func:`apply_patch`: the model's results are again the same bits as before the patch.

    Args:
        model: A model that :func:`apply_patch` patched.

    Raises:
        TypeError: If the class of ``model`` is not supported.
        ValueError: If the model is not patched, or the classes of its layers have changed since.
    """
    base, patch = _patched(model, "remove_patch")
    parts = [part for layer in base.layers for part in (layer, layer.attention)]
    kinds = [vars(type(part)).get("_kind") for part in parts]
    if None in kinds:
        raise ValueError(
            "remove_patch: model's layers must have the classes that apply_patch gave them, got a "
            "layer whose class has changed since"
        )
    for hook in patch._hooks:
        hook.remove()
    for part, kind in zip(parts, kinds, strict=True):
        part.__class__ = kind
    for layer in base.layers:
        delattr(layer, _PLACE)
    delattr(base, _ATTRIBUTE)


def last_trace(model: nn.Module) -> MergeTrace:
    """What the last forward pass of a patched model did to the tokens.

    Args:
        model: A model that :func:`apply_patch` patched and that has run since.

    Returns:
        Token maps, sizes and, if tracked, sources after each layer.

    Raises:
        TypeError: If the class of ``model`` is not supported.
        ValueError: If the model is not patched or has not run.
    """
    _, patch = _patched(model, "last_trace")
    if patch.trace is None:
        raise ValueError("last_trace: model must have run since apply_patch, got no forward pass")
    return patch.trace


class _Merging:
    """Mixin for modules of a patched model, whose class becomes a subclass of the same name.

    A ``forward`` set on the module itself would stay bound to it: the replicas of
    :class:`torch.nn.DataParallel` would compute with the weights of the original.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, kind = type(self).__bases__
        # pickle cannot find the subclass by its name.
        return _unpickle, (mixin, kind), self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def _merging(mixin: Any, kind: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_kind": kind}
    return type(kind.__name__, (mixin, kind), names)


def _unpickle(mixin: Any, kind: Any) -> Any:
    merging = _merging(mixin, kind)
    return merging.__new__(merging)


class _MergingLayer(_Merging):
    """A layer that merges tokens; without a trace it computes as before the patch."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        merge_trace: MergeTrace | None = None,
        **kwargs: Any,
    ) -> Tensor:
        out: Tensor
        if merge_trace is None:
            out = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        else:
            out = _merge_in_layer(self, getattr(self, _PLACE), merge_trace, hidden_states)
        return out


def _merge_in_layer(layer: Any, index: int, trace: MergeTrace, x: Tensor) -> Tensor:
    x = _attend_in_layer(layer, index, trace, x)
    x = _merge_tokens(index, trace, x)
    out: Tensor = layer.dropout(layer.mlp(layer.layernorm_after(x))) + x
    return out


def _attend_in_layer(layer: Any, index: int, trace: MergeTrace, x: Tensor) -> Tensor:
    # Before the first merge all sizes are 1, and plain attention gives the same result.
    weighted = trace._patch.proportional and any(trace._r[:index])
    size = trace.sizes[index - 1] if weighted else None
    attended, _ = layer.attention(layer.layernorm_before(x), merge_trace=trace, key_size=size)
    out: Tensor = layer.dropout(attended) + x
    return out


def _merge_tokens(index: int, trace: MergeTrace, x: Tensor) -> Tensor:
    patch, r = trace._patch, trace._r[index]
    size = trace.sizes[index - 1] if index > 0 else None
    key, trace._key = trace._key, None
    if r > 0 and key is not None:
        token_map = match(key, r, num_prefix=patch.num_prefix, order=patch.order)
        x, size = merge_wavg(x, token_map, size)
        size = size.detach()  # the trace must not keep the graph of this pass alive
    else:
        token_map = TokenMap.identity(x.shape[0], x.shape[1], x.device)
        if size is None:
            size = torch.ones(*x.shape[:2], 1, device=x.device)
    trace._record(index, token_map, size)
    return x


class _MergingAttention(_Merging):
    """An attention that stores its keys in the trace and weights keys by size."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        merge_trace: MergeTrace | None = None,
        key_size: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        out: tuple[Tensor, Tensor | None]
        if merge_trace is None:
            out = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        else:
            out = _attend_by_size(self, hidden_states, merge_trace, key_size)
        return out


def _attend_by_size(
    attention: Any, hidden_states: Tensor, trace: MergeTrace, key_size: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, _ = hidden_states.shape
    per_head = (batch, tokens, -1, attention.head_dim)
    query = attention.q_proj(hidden_states).view(per_head).transpose(1, 2)  # [B, H, N, D]
    key = attention.k_proj(hidden_states).view(per_head).transpose(1, 2)
    value = attention.v_proj(hidden_states).view(per_head).transpose(1, 2)
    trace._key = key
    weights = None
    if key_size is not None and _has_kernel(attention, query):
        out = policy_attention(query, key, value, size=key_size, scale=attention.scaling)
        out = out.transpose(1, 2)  # [B, N, H, D]
    else:
        out, weights = _attend(attention, query, key, value, key_size)
    return attention.o_proj(out.reshape(batch, tokens, -1)), weights


def _has_kernel(attention: Any, query: Tensor) -> bool:
    """Whether a kernel can serve; kernels have no dropout and return no attention weights."""
    if attention.config._attn_implementation != "sdpa":
        return False
    if attention.training and attention.attention_dropout > 0:
        return False
    missing = why_not("policy_attention", query)
    return "native" not in missing or "triton" not in missing


def _attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers, ``[B, N, H, D]``, and its weights if it returns them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.vit.modeling_vit import eager_attention_forward

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    out: tuple[Tensor, Tensor | None] = attend(
        attention,
        query,
        key,
        value,
        None if size is None else _key_bias(size, query),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
    )
    return out


def _key_bias(size: Tensor, query: Tensor) -> Tensor:
    """``log(size)`` [B, 1, 1, N], which SDPA broadcasts over heads and queries."""
    bias = size.to(torch.promote_types(query.dtype, torch.float32)).log()[:, None].mT
    # Only SDPA's CPU kernel takes a float32 bias with half-precision queries, at no extra cost.
    return bias if query.device.type == "cpu" else bias.to(query.dtype)


def _base_model(model: nn.Module, function: str) -> tuple[Any, int]:
    """The module that holds the layers, and the number of prefix tokens of its class."""
    import transformers
    from transformers.models.deit import modeling_deit as deit
    from transformers.models.vit import modeling_vit as vit

    known: Mapping[type, int] = {
        vit.ViTModel: 1,
        vit.ViTForImageClassification: 1,
        deit.DeiTModel: 2,
        deit.DeiTForImageClassification: 2,
        deit.DeiTForImageClassificationWithTeacher: 2,
    }
    for kind, prefix in known.items():
        if isinstance(model, kind):
            base = model.base_model
            if not hasattr(base, "layers"):
                raise TypeError(
                    f"{function}: model must have layers, as in transformers 5.x, got "
                    f"{type(base).__name__} of transformers {transformers.__version__}"
                )
            return base, prefix
    names = ", ".join(kind.__name__ for kind in known)
    raise TypeError(f"{function}: model must be one of {names}, got {type(model).__name__}")


def _patched(model: nn.Module, function: str) -> tuple[Any, MergePatch]:
    base, _ = _base_model(model, function)
    patch = getattr(base, _ATTRIBUTE, None)
    if patch is None:
        raise ValueError(f"{function}: model must have been patched by apply_patch")
    return base, patch


def _check_layer(layer: Any) -> None:
    missing = [part for part in _LAYER_PARTS if not hasattr(layer, part)]
    if not missing:
        missing = [part for part in _ATTENTION_PARTS if not hasattr(layer.attention, part)]
    if missing:
        raise TypeError(
            f"apply_patch: a layer of model must have {', '.join(missing)}, as in transformers "
            f"5.x, got {type(layer).__name__}"
        )
    parts = (layer, layer.attention)
    if any("forward" in vars(part) or isinstance(part, _Merging) for part in parts):
        raise ValueError(
            "apply_patch: model's layers must use the forward of their class, got a layer whose "
            "forward has been replaced"
        )


def _parse_schedule(schedule: Schedule, num_layers: int) -> list[int]:
    """Tokens to merge away in each layer, checked."""
    name = "apply_patch"
    if isinstance(schedule, tuple):
        if len(schedule) != 2 or isinstance(schedule[1], bool) or not isinstance(schedule[1], Real):
            expected = "an int, a list of ints or (int, float)"
            raise _checks.type_error(name, "r", expected, schedule)
        if not -1 <= schedule[1] <= 1:
            raise _checks.value_error(name, "r[1]", "in [-1, 1]", schedule[1])
        schedule = (_checks.check_int(name, "r[0]", schedule[0]), float(schedule[1]))
    elif isinstance(schedule, list):
        if len(schedule) > num_layers:
            expected = f"a list of at most {num_layers} ints, one for each layer"
            raise _checks.value_mismatch(name, "r", expected, f"{len(schedule)} ints")
        schedule = [_checks.check_int(name, f"r[{i}]", value) for i, value in enumerate(schedule)]
    else:
        schedule = _checks.check_int(name, "r", schedule)
    return parse_r(num_layers, schedule)
