"""DIN's activation unit in plain PyTorch: the definition of right, readable in one sitting.

It writes every tensor that the fused kernels avoid, and is what they are tested against, in float64.
Paper: https://arxiv.org/abs/1706.06978, section 4.3 (the unit) and 5.3 (Dice).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from din_fast.spec import HiddenLayer, UnitParameters, UnitSpec, batch_mode


def features(query: Tensor, history: Tensor, blocks: tuple[str, ...]) -> Tensor:
    """(B, D) and (B, L, D) -> (B, L, len(blocks) * D), the blocks side by side."""
    q, k = query.unsqueeze(1).expand_as(history), history
    block: dict[str, Callable[[], Tensor]] = {
        "q": lambda: q,
        "k": lambda: k,
        "q-k": lambda: q - k,
        "k-q": lambda: k - q,
        "q*k": lambda: q * k,
    }
    return torch.cat([block[name]() for name in blocks], dim=-1)


def dice(z: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """Dice: z where its gate is open, alpha z where it is shut; x is the gate's normalised argument."""
    p = torch.sigmoid(x)
    return p * z + (1 - p) * alpha * z


def row_normalised(z: Tensor, eps: float) -> Tensor:
    """torch-rechub's gate: centred over the hidden units of a row, divided by sqrt of the *sum* of squares + eps."""
    centred = z - z.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred.square() + eps).sum(dim=-1, keepdim=True))


def activate(z: Tensor, layer: HiddenLayer, spec: UnitSpec) -> Tensor:
    """The activation of one hidden layer; z is (rows, H)."""
    if spec.activation == "dice_row":
        assert layer.slope is not None
        return dice(z, row_normalised(z, spec.dice_eps), layer.slope.reshape(-1))
    if spec.activation == "dice_batch":
        assert layer.slope is not None and layer.gate_norm is not None
        return dice(z, layer.gate_norm(z), layer.slope.reshape(-1))
    if spec.activation == "prelu":
        assert layer.slope is not None
        return F.prelu(z, layer.slope.reshape(-1))
    simple: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda t: t,
        "relu": torch.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, spec.negative_slope),
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    return simple[spec.activation](z)


def draw_seed(device: torch.device) -> Tensor:
    """The seed of one call's dropout, 0-d int64, from torch's generator of the device."""
    return torch.randint(1 << 62, (), device=device)


def dropout_factors(seed: Tensor, layer: int, rows: Tensor, units: int, p: float) -> Tensor:
    """What dropout multiplies the activations of a hidden layer by, (rows, units) float64: 0, or 1 / (1 - p).

    Counter-based: a number depends on the seed, the layer, its row (candidate * L + position) and its hidden unit only,
    so the backward makes it again and nothing is stored. ``mix`` is the 32-bit hash "lowbias32" of C. Wellons,
    https://nullprogram.com/blog/2018/07/31/; the kernels compute the same.
    """
    low = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
        x = ((x ^ (x >> 15)) * 0x846CA68B) & low
        return x ^ (x >> 16)

    first = mix((seed & low) ^ layer)
    second = mix(((seed >> 32) & low) ^ first)
    row = mix((rows & low) ^ first) ^ mix(((rows >> 32) & low) ^ second)
    unit = (torch.arange(1, units + 1, device=rows.device) * 0x9E3779B9) & low
    kept = mix((row.unsqueeze(1) + unit) & low) >= int(p * 2**32)
    return kept.to(torch.float64) * (1 / (1 - p))


def scores(
    query: Tensor,
    history: Tensor,
    parameters: UnitParameters,
    spec: UnitSpec,
    counted: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The MLP's score of every position, (B, L).

    ``counted`` (B, L) bool, where it is given, says which positions go through the MLP; the others score 0.
    """
    x = features(query, history, spec.blocks).flatten(0, 1)
    rows = torch.arange(x.shape[0], device=x.device)
    if counted is not None:
        rows = rows[counted.flatten()]
        x = x[rows]
        if len(rows) == 0:  # a BatchNorm has nothing to take statistics of
            return x.new_zeros(history.shape[:2])
    for i, layer in enumerate(parameters.hidden):
        x = F.linear(x, layer.weight, layer.bias)
        if layer.norm is not None:
            x = layer.norm(x)
        x = activate(x, layer, spec)
        if layer.dropout:
            seed = draw_seed(x.device) if seed is None else seed
            x = x * dropout_factors(seed, i, rows, x.shape[1], layer.dropout).to(x.dtype)
    score = F.linear(x, parameters.weight, parameters.bias).squeeze(1) * spec.score_factor(history.shape[-1])
    if counted is not None:
        score = score.new_zeros(history.shape[:2].numel()).index_put((rows,), score)
    return score.view(history.shape[:2])


def weights_of(score: Tensor, valid: Tensor | None, spec: UnitSpec, score_slope: Tensor | None = None) -> Tensor:
    """Scores (B, L) -> weights (B, L): the score's activation, the mask, softmax."""
    if spec.score_activation == "sigmoid":
        score = torch.sigmoid(score)
    elif spec.score_activation == "prelu":
        assert score_slope is not None
        score = F.prelu(score, score_slope.reshape(-1))
    if valid is None:
        return score.softmax(dim=-1) if spec.softmax else score
    if not spec.softmax:
        return score.masked_fill(~valid, 0.0)
    empty = ~valid.any(dim=-1, keepdim=True)
    weight = score.masked_fill(~valid, -torch.inf).masked_fill(empty, 0.0).softmax(dim=-1)
    if spec.empty == "zeros":
        return weight.masked_fill(~valid, 0.0)
    return weight if spec.empty == "uniform" else weight.masked_fill(empty, torch.nan)


def uses_batch_statistics(parameters: UnitParameters) -> bool:
    """Whether a BatchNorm of the unit normalises with the statistics of the batch at hand."""
    return any(batch_mode(norm) for layer in parameters.hidden for norm in (layer.norm, layer.gate_norm))


def activation_unit(
    query: Tensor,
    history: Tensor,
    parameters: UnitParameters,
    spec: UnitSpec,
    valid: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The unit on (B, D) and (B, L, D), with ``valid`` (B, L) bool or None: (pooled (B, D), weights (B, L)).

    Padded rows reach the result only where they are input: through the statistics of the batch, where they count, and
    where a softmax over nothing is uniform over all L rows. ``seed``, 0-d int64, is that of the dropout; by default it
    is drawn.
    """
    if history.shape[0] == 0 or history.shape[1] == 0:
        return query * 0.0 + history.sum(dim=1), history.sum(dim=2)
    counted = valid if spec.batch_stats == "valid" and uses_batch_statistics(parameters) else None
    if valid is not None and (counted is not None or not uses_batch_statistics(parameters)):
        keep = valid
        if spec.softmax and spec.empty != "zeros":
            keep = valid | ~valid.any(dim=-1, keepdim=True)
        history = history.masked_fill(~keep.unsqueeze(-1), 0.0)
    score = scores(query, history, parameters, spec, counted, seed)
    weight = weights_of(score, valid, spec, parameters.score_slope)
    pooled = (weight.unsqueeze(-1) * history).sum(dim=1)
    if spec.pooling == "mean" or (spec.pooling == "mean_valid" and valid is None):
        pooled = pooled / history.shape[1]
    elif spec.pooling == "mean_valid":
        assert valid is not None
        pooled = pooled / valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return pooled, weight


class RowDice(nn.Module):
    """torch-rechub's Dice: no running statistics, one alpha, drawn from N(0, 1)."""

    def __init__(self, units: int, spec: UnitSpec) -> None:
        super().__init__()
        self.eps = spec.dice_eps
        self.alpha = nn.Parameter(torch.randn(units if spec.per_channel_slope else 1))

    def forward(self, z: Tensor) -> Tensor:
        return dice(z, row_normalised(z, self.eps), self.alpha)


class BatchDice(nn.Module):
    """Dice with a BatchNorm1d per hidden unit (the paper's; FuxiCTR, DeepCTR-Torch); alpha starts at 0."""

    def __init__(self, units: int, spec: UnitSpec) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(units, eps=spec.dice_eps, momentum=spec.dice_momentum, affine=spec.dice_affine)
        self.alpha = nn.Parameter(torch.zeros(units if spec.per_channel_slope else 1))

    def forward(self, z: Tensor) -> Tensor:
        return dice(z, self.bn(z), self.alpha)


def activation_module(units: int, spec: UnitSpec) -> nn.Module:
    """The activation of a hidden layer of so many units, (..., units) -> (..., units), with fresh parameters."""
    if spec.activation == "dice_row":
        return RowDice(units, spec)
    if spec.activation == "dice_batch":
        return BatchDice(units, spec)
    if spec.activation == "prelu":
        return nn.PReLU(units if spec.per_channel_slope else 1, init=spec.prelu_init)
    if spec.activation == "leaky_relu":
        return nn.LeakyReLU(spec.negative_slope)
    simple = {"identity": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "tanh": nn.Tanh}
    return simple[spec.activation]()


class MLP(nn.Module):
    """The unit's MLP: [Linear, (BatchNorm1d), activation, (Dropout)] per hidden layer, then Linear(., 1), (PReLU)."""

    def __init__(self, emb_dim: int, spec: UnitSpec) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        inputs = len(spec.blocks) * emb_dim
        for units in spec.hidden_units:
            modules.append(nn.Linear(inputs, units, bias=spec.hidden_bias))
            if spec.batch_norm:
                modules.append(nn.BatchNorm1d(units))
            modules.append(activation_module(units, spec))
            if spec.dropout is not None:
                modules.append(nn.Dropout(spec.dropout))
            inputs = units
        modules.append(nn.Linear(inputs, 1))
        if spec.score_activation == "prelu":
            modules.append(nn.PReLU())
        self.mlp = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def unit_parameters(self) -> UnitParameters:
        """The parameters and statistics holders of the layers, as the functional form takes them.

        Read at each call, in one pass, from the modules that are there now: they may be replaced, as
        ``convert_sync_batchnorm`` does.
        """
        hidden: list[HiddenLayer] = []
        linear: nn.Linear | None = None
        norm = gate_norm = slope = None
        dropout = 0.0
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                if linear is not None:
                    hidden.append(HiddenLayer(linear.weight, linear.bias, norm, gate_norm, slope, dropout))
                linear, norm, gate_norm, slope, dropout = module, None, None, None, 0.0
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                norm = module
            elif isinstance(module, nn.PReLU):
                slope = module.weight
            elif isinstance(module, RowDice):
                slope = module.alpha
            elif isinstance(module, BatchDice):
                gate_norm, slope = module.bn, module.alpha
            elif isinstance(module, nn.Dropout) and module.training:
                dropout = module.p
        assert linear is not None
        return UnitParameters(tuple(hidden), linear.weight, linear.bias, slope)  # a PReLU after the last is the score's


class ActivationUnit(nn.Module):
    """The unit that a :class:`~din_fast.UnitSpec` describes, in plain PyTorch.

    With the preset ``rechub`` it is torch-rechub's ``ActivationUnit``: the same argument order (history first),
    the same state_dict keys and the same result.
    """

    def __init__(self, emb_dim: int, spec: UnitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = MLP(emb_dim, spec)

    def forward(self, history: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, D) and an optional bool (B, L), True where a position counts -> (B, D).

        With ``pooling="none"`` the result is the weights, (B, L).
        """
        pooled, weights = activation_unit(target, history, self.attention.unit_parameters(), self.spec, valid)
        return weights if self.spec.pooling == "none" else pooled
