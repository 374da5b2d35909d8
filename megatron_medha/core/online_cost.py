"""A cost model that starts from the roofline and learns from every step, so that no profiling run is needed."""

from __future__ import annotations

from megatron_medha.core.cost import RooflineCost, StepLoad

# Tokens at which the cost per token may change: matrix products are bound by weight reads below, by FLOPs above.
_HINGES_TOKENS = (48, 384)
_RELATIVE_NOISE = 0.04   # of a step's duration, what a quiet machine shows between equal steps
_DRIFT = 2e-5            # share of the prior variance regained per step, so that it follows a changing machine
_CLIP_SIGMAS = 3.0       # a step further off than this (a page fault, a neighbour) counts as if it were this far
_REVISION_CHANGE = 0.03  # relative change of a reference prediction that calls for new tables


class OnlineCost:
    """A linear model of step time, fitted by a Kalman filter on relative errors.

    Predicted seconds = theta . features, with the features 1, tokens, tokens past each hinge, sequences,
    query-key pairs of chunks, keys read by chunks, keys read by decodes. The roofline gives the prior mean; each
    coefficient may be off by a factor of several. Steps are weighted by 1 / duration, since a budget
    is kept or missed in percent, not in milliseconds.
    """

    def __init__(self, prior: RooflineCost) -> None:
        shape, hardware = prior.shape, prior.hardware
        memory = hardware.memory_bytes_per_s * hardware.memory_efficiency
        weights = shape.num_layers * shape.num_layer_params / prior.layout.tp
        per_token = 2 * weights / (hardware.flops_per_s * hardware.linear_efficiency)
        per_key = shape.kv_bytes_per_token / prior.layout.tp / memory
        self.theta = [
            hardware.step_overhead_s
            + shape.num_layers * hardware.layer_overhead_s
            + weights * shape.bytes_per_element / memory,
            per_token,
            0.0,
            0.0,
            hardware.chunk_overhead_s
            + 2 * shape.num_head_params / prior.layout.tp / (hardware.flops_per_s * hardware.linear_efficiency),
            4 * shape.head_dim * shape.num_heads * shape.num_layers / prior.layout.tp
            / (hardware.flops_per_s * hardware.attention_efficiency),
            per_key,
            per_key,
        ]
        spread = [2.0 * value for value in self.theta]
        spread[2] = spread[3] = per_token
        self._prior_variance = [value * value for value in spread]
        size = len(spread)
        self._covariance = [[self._prior_variance[i] if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._reference_s = self._reference()
        self.num_observed = 0
        self.revision = 0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        theta = self.theta
        total = theta[0] + theta[1] * num_tokens + theta[4] * num_sequences
        if num_tokens > _HINGES_TOKENS[0]:
            total += theta[2] * (num_tokens - _HINGES_TOKENS[0])
            if num_tokens > _HINGES_TOKENS[1]:
                total += theta[3] * (num_tokens - _HINGES_TOKENS[1])
        return total

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        return self.theta[5] * num_tokens * (start + 0.5 * (num_tokens + 1)) + self.theta[6] * (start + num_tokens)

    def decode_attention_s(self, context: int) -> float:
        """See CostModel."""
        return self.theta[7] * context

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """See CostModel."""
        if duration_s <= 0.0:
            return
        theta, covariance, prior = self.theta, self._covariance, self._prior_variance
        size = len(theta)
        features = (
            1.0,
            float(load.num_tokens),
            float(max(0, load.num_tokens - _HINGES_TOKENS[0])),
            float(max(0, load.num_tokens - _HINGES_TOKENS[1])),
            float(load.num_sequences),
            load.chunk_pairs,
            float(load.chunk_context),
            float(load.decode_context),
        )
        x = [feature / duration_s for feature in features]
        for i in range(size):
            if covariance[i][i] < prior[i]:
                covariance[i][i] += _DRIFT * prior[i]
        p_x = [sum(p * v for p, v in zip(row, x, strict=True)) for row in covariance]
        variance = sum(v * p for v, p in zip(x, p_x, strict=True)) + _RELATIVE_NOISE * _RELATIVE_NOISE
        error = 1.0 - sum(t * v for t, v in zip(theta, x, strict=True))
        limit = _CLIP_SIGMAS * variance**0.5
        error = max(-limit, min(limit, error))
        for i in range(size):
            gain = p_x[i] / variance
            theta[i] += gain * error
            row = covariance[i]
            for j in range(size):
                row[j] -= gain * p_x[j]
        self._project()
        self.num_observed += 1
        reference_s = self._reference()
        if any(
            abs(new - old) > _REVISION_CHANGE * old for new, old in zip(reference_s, self._reference_s, strict=True)
        ):
            self._reference_s = reference_s
            self.revision += 1

    def _project(self) -> None:
        # Time never falls as work grows: the chunk search relies on it, and noise can pull a small coefficient below 0.
        theta = self.theta
        for i in (0, 1, 4, 5, 6, 7):
            if theta[i] < 0.0:
                theta[i] = 0.0
        if theta[1] + theta[2] < 0.0:
            theta[2] = -theta[1]
        if theta[1] + theta[2] + theta[3] < 0.0:
            theta[3] = -theta[1] - theta[2]

    def _reference(self) -> tuple[float, float, float]:
        return (
            self.linear_s(16, 1),
            self.linear_s(512, 1) + self.attention_s(0, 512),
            self.attention_s(16384, 64),
        )
